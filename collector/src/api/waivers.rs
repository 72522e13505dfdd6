//! Waivers over the API: who answers for a broken rule, and until when. Each change is one event; the state is the list.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Extension, State};
use serde::Deserialize;
use serde_json::{Value, json};
use sidewarden_proto::event::{Severity, WaiverRemoved, WaiverSet};
use sidewarden_proto::evidence::Pledge;
use sidewarden_proto::policy::Pattern;
use sidewarden_proto::time::Timestamp;

use super::Api;
use super::error::ApiError;
use super::revocations::{body, name, tell};
use super::serve::Source;
use crate::fleet;
use crate::posture::{Neighbours, pledges};
use crate::state::MAX_WAIVERS;

/// Longest life: what should hold for longer is no exception.
const MAX_LIFE: Duration = Duration::from_secs(366 * 24 * 3600);
/// Longest pattern of a container's name.
const MAX_NAME: usize = 200;

/// What a waiver is set with.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetRequest {
    check: String,
    workload: String,
    #[serde(default)]
    container: Option<String>,
    why: String,
    #[serde(default)]
    by: String,
    until_us: Timestamp,
}

/// What one is removed with, and an attestation taken back.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveRequest {
    pub(super) check: String,
    pub(super) workload: String,
    #[serde(default)]
    pub(super) container: Option<String>,
    pub(super) why: String,
    #[serde(default)]
    pub(super) by: String,
}

/// What is wrong with whom a pledge is about.
pub(super) fn subject(check: &str, workload: &str, container: Option<&str>) -> Result<(), ApiError> {
    let is_slug = !check.is_empty()
        && check.len() <= 64
        && check.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if !is_slug {
        return Err(ApiError::bad_request("`check` is no check", "see `sidewarden-agent checks`"));
    }
    let hint = "write shop/orders, shop/* for every service of shop, or * for all";
    workload.parse::<Pattern>().map_err(|wrong| ApiError::bad_request(wrong, hint))?;
    let is_name = |name: &str| !name.is_empty() && name.len() <= MAX_NAME && !name.chars().any(char::is_control);
    match container {
        Some(name) if !is_name(name) => {
            Err(ApiError::bad_request("`container` is no name", "a container's name; it may end with *"))
        }
        _ => Ok(()),
    }
}

/// What is wrong with an end.
pub(super) fn end(until: Timestamp, now: Timestamp) -> Result<(), ApiError> {
    let hint = "an end is in the future, and at most a year from now";
    match until > now && until.since(now) <= MAX_LIFE {
        true => Ok(()),
        false => Err(ApiError::bad_request(format!("it cannot end {until}"), hint)),
    }
}

/// What was told counts once it is on disk: of a store that refuses it, nobody must be told that all is well.
pub(super) fn in_force(is_so: bool) -> Result<(), ApiError> {
    is_so.then_some(()).ok_or_else(not_yet)
}

/// A store that stands still or is full.
pub(super) fn not_yet() -> ApiError {
    ApiError::busy("the store has not taken it yet, and nothing has changed; it may still do so: look again")
}

/// All of them, with how many failures each covers now.
pub async fn list(State(api): State<Arc<Api>>) -> Json<Value> {
    let now = (api.core.clock)();
    let state = api.core.commits.state();
    let neighbours = Neighbours::of(&state, &api.core.config.evidence);
    let covered = pledges::covered(&state, &neighbours, &state.waivers);
    let shown = state.waivers.iter().zip(covered).map(|(waiver, covers)| {
        let mut shown = json!(waiver);
        shown["in_force"] = json!(waiver.holds(now));
        shown["covers"] = json!(covers);
        shown
    });
    Json(json!({"waivers": shown.collect::<Vec<_>>()}))
}

/// Sets one; the one before about the same goes.
pub async fn set(
    State(api): State<Arc<Api>>,
    Extension(Source(source)): Extension<Source>,
    sent: Result<Json<SetRequest>, JsonRejection>,
) -> Result<Json<Value>, ApiError> {
    let SetRequest { check, workload, container, why, by, until_us } = body(sent)?;
    let (core, by, why) = (&api.core, name(&by)?, fleet::reason(&why)?);
    let at_us = (core.clock)();
    subject(&check, &workload, container.as_deref())?;
    end(until_us, at_us)?;
    let source = source.to_string();
    let waiver = Pledge { check, workload, container, by, why, at_us, until_us, source, key: String::new() };
    let (before, is_full, is_known) = {
        let state = core.commits.state();
        let before = state.waivers.iter().find(|other| other.is_of_same(&waiver)).cloned();
        let is_full = before.is_none() && state.waivers.len() >= MAX_WAIVERS;
        (before, is_full, state.agents.values().any(|agent| agent.knows(&waiver.check)))
    };
    if is_full {
        let full = format!("there are {MAX_WAIVERS} waivers");
        return Err(ApiError::conflict(full, "remove those that have ended: /api/v1/waivers"));
    }
    let Pledge { by, why, .. } = &waiver;
    let summary = format!("{} of {} is waived by {by} until {until_us}: {why}", waiver.check, waiver.about());
    tell(core, Severity::Warning, summary, WaiverSet { waiver: waiver.clone(), before }.into()).await?;
    in_force(core.commits.state().waivers.contains(&waiver))?;
    let note = "no agent has told of such a check yet: is it spelt right?";
    let notes: Vec<&str> = if is_known { Vec::new() } else { vec![note] };
    Ok(Json(json!({"waiver": waiver, "notes": notes})))
}

/// Removes one.
pub async fn remove(
    State(api): State<Arc<Api>>,
    Extension(Source(source)): Extension<Source>,
    sent: Result<Json<RemoveRequest>, JsonRejection>,
) -> Result<Json<Value>, ApiError> {
    let RemoveRequest { check, workload, container, why, by } = body(sent)?;
    let (core, by, why) = (&api.core, name(&by)?, fleet::reason(&why)?);
    let is_meant =
        |waiver: &&Pledge| (&waiver.check, &waiver.workload, &waiver.container) == (&check, &workload, &container);
    let waiver = core.commits.state().waivers.iter().find(is_meant).cloned();
    let waiver = waiver.ok_or_else(|| ApiError::not_found("there is no such waiver", "see /api/v1/waivers"))?;
    let summary = format!("the waiver of {} of {} was removed by {by}: {why}", waiver.check, waiver.about());
    let told = WaiverRemoved { waiver: waiver.clone(), why, by, source: source.to_string() };
    tell(core, Severity::Warning, summary, told.into()).await?;
    in_force(!core.commits.state().waivers.contains(&waiver))?;
    Ok(Json(json!({"waiver": waiver})))
}
