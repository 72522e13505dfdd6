//! The policy and what its gates do, over the API.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Extension, State};
use serde::Deserialize;
use serde_json::{Value, json};
use sidewarden_proto::directive::Release;
use sidewarden_proto::event::{PolicyApplied, QuarantineReleased, Severity};
use sidewarden_proto::identity::{InstanceId, Sha256, SpiffeId};

use super::Api;
use super::error::ApiError;
use super::revocations::{body, name, off_the_runtime, tell};
use super::serve::Source;
use crate::app::Core;
use crate::fleet::{self, Reach};

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

fn reach(core: &Core) -> Reach {
    let in_force = core.directives.now();
    Reach::of(in_force.directive.version, in_force.directive.needs(), &core.fleet.all())
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

/// The policy in force.
pub async fn policy(State(api): State<Arc<Api>>) -> Json<Value> {
    let in_force = api.core.directives.now();
    let policy = in_force.directive.policy.as_ref();
    let (version, text) = policy.map_or((0, ""), |policy| (policy.version, &policy.text));
    Json(json!({"version": version, "text": text, "reach": reach(&api.core)}))
}

/// Puts a policy in force.
pub async fn apply(
    State(api): State<Arc<Api>>,
    Extension(Source(source)): Extension<Source>,
    sent: Result<Json<ApplyRequest>, JsonRejection>,
) -> Result<Json<Value>, ApiError> {
    let ApplyRequest { text, why, by, confirmed } = body(sent)?;
    let (core, by, why) = (&api.core, name(&by)?, fleet::reason(&why)?);
    let hash = Sha256::of(&[text.as_bytes()]);
    let (applied, directive) = off_the_runtime(core, move |core| {
        fleet::apply(&core.issuer, &core.directives, &core.fleet, &text, confirmed, (core.clock)())
    })
    .await?;
    let version = applied.version;
    let summary = format!("policy {version} was applied by {by}: {why}");
    let told = PolicyApplied { version, directive, hash, why, by, source: source.to_string() };
    tell(core, Severity::Warning, summary, told.into()).await?;
    Ok(Json(json!({"version": directive, "policy": version})))
}
