//! The policy and what its gates do, over the API.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Extension, Query, State};
use serde::Deserialize;
use serde_json::{Value, json};
use sidewarden_proto::config::Faults;
use sidewarden_proto::directive::Release;
use sidewarden_proto::event::{PolicyApplied, QuarantineReleased, Severity};
use sidewarden_proto::identity::{InstanceId, Sha256, SpiffeId};
use sidewarden_proto::policy::{Policy, difference};

use super::Api;
use super::error::ApiError;
use super::revocations::{body, name, off_the_runtime, tell};
use super::serve::Source;
use crate::app::Core;
use crate::fleet::{self, Application, Kept, Reach, impact};

/// Longest release, in seconds: what should hold for longer belongs into the policy.
const MAX_RELEASE: u64 = 7 * 24 * 3600;

/// What a release is asked for with.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseRequest {
    workload: SpiffeId,
    instance: InstanceId,
    seconds: u64,
    why: String,
    #[serde(default)]
    by: String,
}

/// What a policy is put in force with.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApplyRequest {
    text: String,
    why: String,
    #[serde(default)]
    by: String,
    #[serde(default)]
    confirmed: bool,
}

/// What an earlier policy is put in force again with.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RollBackRequest {
    /// Which; the one before the one in force, if it is left out.
    #[serde(default)]
    version: Option<u64>,
    why: String,
    #[serde(default)]
    by: String,
    #[serde(default)]
    confirmed: bool,
}

/// A policy that is not in force.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompareRequest {
    text: String,
}

type Answer = Result<Json<Value>, ApiError>;

fn reach(core: &Core) -> Reach {
    let in_force = core.directives.now();
    Reach::of(in_force.directive.version, in_force.directive.needs(), &core.fleet.all())
}

/// Which policy is in force, and how far the directive has come that carries it.
pub fn in_force(core: &Core) -> Value {
    let version = core.directives.now().directive.policy.as_ref().map_or(0, |policy| policy.version);
    json!({"version": version, "reach": reach(core)})
}

/// Who is quarantined, who breaks a gate and is not, and who was let in.
pub async fn quarantine(State(api): State<Arc<Api>>) -> Json<Value> {
    let in_force = api.core.directives.now();
    let gates = |(id, agent): (&sidewarden_proto::identity::AgentId, &crate::state::Agent)| {
        let (workload, instance) = (id.workload.clone(), id.instance.clone());
        let shown = agent.gates.iter().map(move |(gate, gated)| {
            json!({"workload": workload, "instance": instance, "gate": gate, "status": gated.status, "why": gated.why,
                   "since_us": gated.since})
        });
        shown.collect::<Vec<_>>()
    };
    let broken: Vec<Value> = api.core.commits.state().agents.iter().flat_map(gates).collect();
    let directive = &in_force.directive;
    let (quarantined, released) = (&directive.quarantined, &directive.released);
    Json(json!({"quarantined": quarantined, "released": released, "broken": broken, "reach": reach(&api.core)}))
}

/// Lets an instance in for a while.
pub async fn release(
    State(api): State<Arc<Api>>,
    Extension(Source(source)): Extension<Source>,
    sent: Result<Json<ReleaseRequest>, JsonRejection>,
) -> Result<Json<Value>, ApiError> {
    let ReleaseRequest { workload, instance, seconds, why, by } = body(sent)?;
    let (core, by, why) = (&api.core, name(&by)?, fleet::reason(&why)?);
    if seconds == 0 || seconds > MAX_RELEASE {
        let wrong = format!("`seconds` must be from 1 to {MAX_RELEASE}");
        return Err(ApiError::bad_request(wrong, "for longer than that, change the policy"));
    }
    let until_us = (core.clock)().plus(Duration::from_secs(seconds));
    let release = Release { workload: workload.clone(), instance: instance.clone(), why: why.clone(), until_us };
    let version =
        off_the_runtime(core, move |core| fleet::release(&core.issuer, &core.directives, release, (core.clock)()))
            .await?;
    let summary = format!("{workload}#{instance} is let in until {until_us} by {by}, whatever gates say: {why}");
    let (instance, source) = (instance.to_string(), source.to_string());
    let told = QuarantineReleased { workload, instance, until_us, why, by, source };
    tell(core, Severity::Warning, summary, told.into()).await?;
    Ok(Json(json!({"version": version, "until_us": until_us})))
}

/// Which policy is asked for.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Which {
    version: Option<u64>,
}

/// The policy in force, or an earlier one.
pub async fn policy(State(api): State<Arc<Api>>, which: Result<Query<Which>, QueryRejection>) -> Answer {
    let which = which.map_err(|wrong| ApiError::bad_request(wrong.body_text(), "`version` is a number"))?.0;
    let in_force = api.core.directives.now();
    let policy = in_force.directive.policy.as_ref();
    let (version, text) = policy.map_or((0, String::new()), |policy| (policy.version, policy.text.clone()));
    let (shown, text) = match which.version.filter(|wanted| *wanted != version) {
        None => (version, text),
        Some(wanted) => {
            let kept = off_the_runtime(&api.core, move |core| fleet::earlier(&core.directives, Some(wanted))).await?;
            (kept.version, kept.text)
        }
    };
    Ok(Json(json!({"version": shown, "in_force": version, "text": text, "reach": reach(&api.core)})))
}

/// Every policy so far, without its text.
pub async fn history(State(api): State<Arc<Api>>) -> Answer {
    let kept = off_the_runtime(&api.core, |core| Ok(core.directives.policies().all()?)).await?;
    let in_force = api.core.directives.now().directive.policy.as_ref().map_or(0, |policy| policy.version);
    let shown = kept.into_iter().rev().map(|kept| {
        let Kept { version, at_us, why, by, restores, text } = kept;
        json!({"version": version, "at_us": at_us, "why": why, "by": by, "restores": restores,
               "hash": Sha256::of(&[text.as_bytes()]), "in_force": version == in_force})
    });
    Ok(Json(json!({"policies": shown.collect::<Vec<_>>()})))
}

/// Puts a policy in force.
pub async fn apply(
    State(api): State<Arc<Api>>,
    Extension(Source(source)): Extension<Source>,
    sent: Result<Json<ApplyRequest>, JsonRejection>,
) -> Answer {
    let ApplyRequest { text, why, by, confirmed } = body(sent)?;
    let (by, why) = (name(&by)?, fleet::reason(&why)?);
    put_in_force(&api.core, source, Application { text, why, by, restores: None, confirmed }).await
}

/// Puts an earlier policy in force again, as a new version.
pub async fn roll_back(
    State(api): State<Arc<Api>>,
    Extension(Source(source)): Extension<Source>,
    sent: Result<Json<RollBackRequest>, JsonRejection>,
) -> Answer {
    let RollBackRequest { version, why, by, confirmed } = body(sent)?;
    let (by, why) = (name(&by)?, fleet::reason(&why)?);
    let kept = off_the_runtime(&api.core, move |core| fleet::earlier(&core.directives, version)).await?;
    let (text, restores) = (kept.text, Some(kept.version));
    put_in_force(&api.core, source, Application { text, why, by, restores, confirmed }).await
}

async fn put_in_force(core: &Core, source: SocketAddr, asked: Application) -> Answer {
    let hash = Sha256::of(&[asked.text.as_bytes()]);
    let (why, by, restores) = (asked.why.clone(), asked.by.clone(), asked.restores);
    let (applied, directive) = off_the_runtime(core, move |core| {
        fleet::apply(&core.issuer, &core.directives, &core.fleet, asked, (core.clock)())
    })
    .await?;
    let version = applied.version;
    let what = restores.map_or_else(String::new, |old| format!(", which is {old} again,"));
    let summary = format!("policy {version}{what} was applied by {by}: {why}");
    let told = PolicyApplied { version, directive, hash, why, by, source: source.to_string(), restores };
    tell(core, Severity::Warning, summary, told.into()).await?;
    Ok(Json(json!({"version": directive, "policy": version, "restores": restores})))
}

/// What a policy would change: by its lines, and for whoever was seen talking to whom.
pub async fn compare(State(api): State<Arc<Api>>, sent: Result<Json<CompareRequest>, JsonRejection>) -> Answer {
    let CompareRequest { text } = body(sent)?;
    let wrong = |faults: Faults| ApiError::bad_request(faults.to_string(), "see `policy check`");
    let new = Policy::parse(&text).map_err(wrong)?;
    let core = api.core.clone();
    let compared = tokio::task::spawn_blocking(move || {
        let in_force = core.directives.now();
        let applied = in_force.directive.policy.as_ref();
        let old = Policy::parse(applied.map_or("", |applied| &applied.text)).unwrap_or_default();
        let changes = difference::between(&old, &new)
            .into_iter()
            .map(|change| json!({"sign": change.kind.sign(), "line": change.line, "text": change.text}));
        let hits = impact::of(&old, &new, &core.commits.state(), &in_force.directive.trust_domain);
        json!({"in_force": applied.map_or(0, |applied| applied.version), "changes": changes.collect::<Vec<_>>(),
               "seen": hits.seen, "would_end": hits.would_end, "more": hits.more, "depends": hits.depends})
    });
    Ok(Json(compared.await.map_err(|error| ApiError::internal("comparing policies", &error))?))
}
