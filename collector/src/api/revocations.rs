//! Revoking over the API: what the running collector does at once, and tells in one event.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Extension, State};
use serde::Deserialize;
use serde_json::{Value, json};
use sidewarden_proto::directive::{Revocation, Target};
use sidewarden_proto::event::{Body, Event, IdentityRestored, IdentityRevoked, RevocationChanged, Severity};

use super::Api;
use super::error::ApiError;
use super::serve::Source;
use crate::app::Core;
use crate::fleet::{self, Asked, DirectivesError, Done, Reach, RevokeError};

/// Longest name of who does it.
const MAX_BY: usize = 64;

/// What a revocation is asked for with.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RevokeRequest {
    what: Target,
    why: String,
    #[serde(default)]
    by: String,
    #[serde(default)]
    confirmed: bool,
}

/// What its undoing is asked for with.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UndoRequest {
    id: String,
    why: String,
    #[serde(default)]
    by: String,
}

impl From<RevokeError> for ApiError {
    fn from(error: RevokeError) -> ApiError {
        let text = error.to_string();
        if error.is_full() {
            return ApiError::conflict(text, "undo revocations whose certificates have ended, or shorten the policy");
        }
        match error {
            RevokeError::Wrong(_) => ApiError::bad_request(text, "see /api/v1/openapi.json"),
            RevokeError::Unconfirmed(_) => ApiError::conflict(text, "if that is meant, say `confirmed` (--yes)"),
            RevokeError::Already { .. } => ApiError::conflict(text, "nothing is left to do"),
            RevokeError::Unknown(_) => ApiError::not_found(text, "see what is revoked: /api/v1/revocations"),
            RevokeError::Full => ApiError::conflict(text, "see what is revoked: /api/v1/revocations"),
            RevokeError::Directive(DirectivesError::Follows) => {
                ApiError::conflict(text, "see ca.leader in this collector's settings")
            }
            RevokeError::Directive(_) | RevokeError::Register(_) => ApiError::internal("changing the directive", &text),
        }
    }
}

pub(super) fn body<T>(sent: Result<Json<T>, JsonRejection>) -> Result<T, ApiError> {
    let wrong = |fault: JsonRejection| ApiError::bad_request(fault.body_text(), "see /api/v1/openapi.json");
    sent.map(|Json(body)| body).map_err(wrong)
}

/// What is revoked, and how far that has come.
pub async fn list(State(api): State<Arc<Api>>) -> Json<Value> {
    let in_force = api.core.directives.now();
    let revoked: Vec<Value> = in_force.directive.revoked.iter().map(shown).collect();
    let reach = Reach::of(in_force.directive.version, in_force.directive.needs(), &api.core.fleet.all());
    Json(json!({"revoked": revoked, "reach": reach}))
}

fn shown(revocation: &Revocation) -> Value {
    let Revocation { id, what, why, at_us, keys } = revocation;
    json!({"id": id, "what": what, "text": what.to_string(), "why": why, "at_us": at_us, "keys": keys})
}

/// Revokes.
pub async fn revoke(
    State(api): State<Arc<Api>>,
    Extension(source): Extension<Source>,
    sent: Result<Json<RevokeRequest>, JsonRejection>,
) -> Result<Json<Value>, ApiError> {
    let RevokeRequest { what, why, by, confirmed } = body(sent)?;
    let (core, by) = (&api.core, name(&by)?);
    let asked = Asked { what, why: why.clone(), confirmed };
    let done = off_the_runtime(core, move |core| {
        fleet::revoke(&core.issuer, &core.directives, &core.fleet, asked, (core.clock)())
    })
    .await?;
    let summary = format!("{} was revoked by {by}: {}", done.revocation.what, done.revocation.why);
    let changed = changed(&done, done.revocation.why.clone(), by, source);
    tell(core, Severity::Warning, summary, IdentityRevoked(changed).into()).await?;
    Ok(answer(&done))
}

/// Undoes a revocation.
pub async fn undo(
    State(api): State<Arc<Api>>,
    Extension(source): Extension<Source>,
    sent: Result<Json<UndoRequest>, JsonRejection>,
) -> Result<Json<Value>, ApiError> {
    let UndoRequest { id, why, by } = body(sent)?;
    let (core, by, why) = (&api.core, name(&by)?, fleet::reason(&why)?);
    let done =
        off_the_runtime(core, move |core| fleet::undo(&core.issuer, &core.directives, &id, (core.clock)())).await?;
    let summary = format!("the revocation of {} was undone by {by}: {why}", done.revocation.what);
    let changed = changed(&done, why, by, source);
    tell(core, Severity::Warning, summary, IdentityRestored(changed).into()).await?;
    Ok(answer(&done))
}

/// How long is waited until the event of an act is in the log.
const TELL_WITHIN: std::time::Duration = std::time::Duration::from_secs(5);

/// The register and the directive are on disk.
pub(super) async fn off_the_runtime<T: Send + 'static>(
    core: &Core,
    act: impl FnOnce(Core) -> Result<T, RevokeError> + Send + 'static,
) -> Result<T, ApiError> {
    let core = core.clone();
    let done = tokio::task::spawn_blocking(move || act(core)).await;
    Ok(done.map_err(|error| ApiError::internal("changing the directive", &error))??)
}

/// Who does it, by their own account: all who have the token are equal before us.
pub(super) fn name(by: &str) -> Result<String, ApiError> {
    let by = by.trim();
    if by.chars().count() > MAX_BY || by.chars().any(char::is_control) {
        let wrong = format!("`by` is one line of at most {MAX_BY} characters");
        return Err(ApiError::bad_request(wrong, "say who you are, or leave it out"));
    }
    Ok(if by.is_empty() { "somebody with the admin token".to_owned() } else { by.to_owned() })
}

fn changed(done: &Done, why: String, by: String, Source(source): Source) -> RevocationChanged {
    let (revocation, version) = (done.revocation.clone(), done.version);
    RevocationChanged { revocation, version, why, by, source: source.to_string() }
}

pub(super) async fn tell(core: &Core, severity: Severity, summary: String, body: Body) -> Result<(), ApiError> {
    let event = Event::new((core.clock)(), severity, summary, &body);
    core.commits.own(event).await.map_err(|error| ApiError::internal("telling of it", &error))?;
    // Whoever did it may ask for the event at once. What is done is in force all the same: a store that stands still is told
    // elsewhere.
    let _ = tokio::time::timeout(TELL_WITHIN, core.commits.flush()).await;
    Ok(())
}

fn answer(done: &Done) -> Json<Value> {
    Json(json!({"revocation": shown(&done.revocation), "version": done.version, "notes": done.notes}))
}
