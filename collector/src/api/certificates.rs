//! Every certificate that the collector knows to be in use, and when it ends: its CA's, its own, what others keep for it, and
//! those of its agents.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::{Value, json};
use sidewarden_proto::time::Timestamp;

use super::Api;
use crate::app::Core;
use crate::ca;
use crate::state::Status;

/// One of them.
#[derive(Debug, Serialize)]
struct Line {
    /// `root`, `issuing`, `collector`, `identity`, `identity_root`, `page` or `agent`.
    what: String,
    /// Whose it is.
    name: String,
    /// When it begins; 0 where that is not known.
    not_before_us: Timestamp,
    /// When it ends.
    not_after_us: Timestamp,
    /// Whether somebody else's CA has issued it, whose it is to renew.
    elsewhere: bool,
}

pub(super) async fn list(State(api): State<Arc<Api>>) -> Json<Value> {
    let core = &api.core;
    let mut lines: Vec<Line> = of_collector(core).chain(of_agents(core)).collect();
    lines.sort_by(|one, other| (one.not_after_us, &one.name).cmp(&(other.not_after_us, &other.name)));
    Json(json!({"page": page(core), "certificates": lines}))
}

fn of_collector(core: &Core) -> impl Iterator<Item = Line> + use<> {
    let own = ca::dates_of(core.issuer.authority()).into_iter().map(|date| (date, false));
    let given = core.identities.dates().into_iter().map(|date| (date, true));
    own.chain(given).map(|(date, elsewhere)| Line {
        what: date.what,
        name: date.name,
        not_before_us: date.not_before_us,
        not_after_us: date.not_after_us,
        elsewhere,
    })
}

/// Those that are there, or should be.
fn of_agents(core: &Core) -> Vec<Line> {
    let (state, now) = (core.commits.state(), (core.clock)());
    let is_here = |status| !matches!(status, Status::Gone | Status::Stopped);
    let agents = state.agents.iter().filter(|(_, agent)| is_here(state.status(agent, now)));
    let line = |(id, agent): (&sidewarden_proto::identity::AgentId, &crate::state::Agent)| {
        let certificate = agent.certificate.as_ref()?;
        Some(Line {
            what: "agent".into(),
            name: id.to_string(),
            not_before_us: certificate.not_before,
            not_after_us: certificate.not_after,
            elsewhere: certificate.elsewhere,
        })
    };
    agents.filter_map(line).collect()
}

/// What this very page shows.
fn page(core: &Core) -> Value {
    let shown = core.identities.page().borrow().clone();
    let peer = shown.credential().peer();
    json!({
        "file": shown.from(),
        "names": shown.names(),
        "serial": peer.serial,
        "not_after_us": peer.not_after,
    })
}
