//! Evidence over the API: scans of images, and what people attest and sign.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Extension, State};
use serde_json::{Value, json};
use sidewarden_proto::event::{AttestationRemoved, AttestationSet, Severity};
use sidewarden_proto::evidence::{Pledge, Scan};
use tokio::sync::Semaphore;

use super::error::ApiError;
use super::revocations::{body, name, tell};
use super::routes::Operation;
use super::serve::Source;
use super::waivers::{RemoveRequest, end, in_force, not_yet, subject};
use super::{Api, Pairs, asked};
use crate::evidence::attest::{self, AttestError, Key, Statement};
use crate::evidence::taken::{self, Taken};
use crate::evidence::trivy::{self, MAX_REPORT, TrivyError};
use crate::fleet;
use crate::state::MAX_WAIVERS;

/// Reports that are read at a time: each may take its whole size of memory.
static READING: Semaphore = Semaphore::const_new(1);
/// The largest report over a line of 5 Mbit/s.
const ARRIVES_WITHIN: Duration = Duration::from_secs(120);
/// Largest envelope.
const MAX_ENVELOPE: usize = 64 << 10;
/// How old the newer of two attestations may make the older one.
const SIGNED_AHEAD: Duration = Duration::from_secs(300);

/// All of it.
pub async fn list(State(api): State<Arc<Api>>) -> Json<Value> {
    let now = (api.core.clock)();
    let state = api.core.commits.state();
    let shown = state.attestations.iter().map(|attestation| {
        let mut shown = json!(attestation);
        let is_trusted = api.core.config.evidence.attestors.iter().any(|attestor| attestor.name == attestation.key);
        shown["in_force"] = json!(is_trusted && attestation.holds(now));
        shown
    });
    Json(json!({"scans": state.scans, "attestations": shown.collect::<Vec<_>>()}))
}

/// The whole of what is sent, up to `most` bytes. Whoever is gone in the middle of it must not be waited for: others wait.
async fn whole(sent: Body, most: usize) -> Result<axum::body::Bytes, ApiError> {
    let slow = |_| ApiError::bad_request(format!("it was not sent within {ARRIVES_WITHIN:?}"), "send it again");
    let large = |_| ApiError::large(format!("it has more than {most} bytes, or broke off"), "see /api/v1/openapi.json");
    tokio::time::timeout(ARRIVES_WITHIN, axum::body::to_bytes(sent, most)).await.map_err(slow)?.map_err(large)
}

/// Takes a scan in.
pub async fn add_scan(
    State(api): State<Arc<Api>>,
    Extension(Source(source)): Extension<Source>,
    pairs: Pairs,
    sent: Body,
) -> Result<Json<Value>, ApiError> {
    let by = name(asked(Operation::AddScan, pairs)?.value("by").unwrap_or_default())?;
    let _permit = READING.try_acquire().map_err(|_| ApiError::busy("another report is being read"))?;
    let report = whole(sent, MAX_REPORT).await?;
    let read = tokio::task::spawn_blocking(move || trivy::read(&report[..])).await;
    let hint = "send what `trivy image --format json` writes";
    let scan =
        read.map_err(|error| ApiError::internal("reading the report", &error))?.map_err(|error| match error {
            TrivyError::Large => ApiError::large(error.to_string(), hint),
            error => ApiError::bad_request(error.to_string(), hint),
        })?;
    let scan = Scan { by, source: source.to_string(), ..scan };
    let taken = taken::take(&api.core, scan.clone()).await;
    match taken.map_err(|error| ApiError::internal("taking the scan", &error))? {
        Taken::New => Ok(Json(json!({"scan": scan, "new": true}))),
        Taken::Same => Ok(Json(json!({"scan": scan, "new": false}))),
        Taken::Older(newest) => {
            Err(ApiError::conflict(format!("there is a scan of this image of {newest}"), "the newest one counts"))
        }
        Taken::Waiting => Err(not_yet()),
        Taken::Future => Err(ApiError::bad_request("it was made in the future", "set the scanner's clock right")),
    }
}

/// Takes an attestation in.
pub async fn add_attestation(
    State(api): State<Arc<Api>>,
    Extension(Source(source)): Extension<Source>,
    sent: Body,
) -> Result<Json<Value>, ApiError> {
    let envelope = whole(sent, MAX_ENVELOPE).await?;
    let (core, now) = (&api.core, (api.core.clock)());
    let keys: Result<Vec<Key>, AttestError> = core.config.evidence.attestors.iter().map(Key::load).collect();
    let keys = keys.map_err(|error| ApiError::internal("reading the keys of attestors", &error))?;
    let hint = "make one with `sidewarden-collector evidence sign`";
    let (statement, key) = attest::open(&envelope, &keys).map_err(|error| match error {
        AttestError::Unsigned => ApiError::forbidden(error.to_string(), "name its key in [[evidence.attestor]]"),
        error => ApiError::bad_request(error.to_string(), hint),
    })?;
    let (at_us, until_us) = statement.times().map_err(|error| ApiError::bad_request(error.to_string(), hint))?;
    let Statement { check, workload, container, by, why, .. } = statement;
    subject(&check, &workload, container.as_deref())?;
    end(until_us, now)?;
    if at_us > now.plus(SIGNED_AHEAD) {
        return Err(ApiError::bad_request("it was signed in the future", "set the clock right where it is signed"));
    }
    let (by, why, source) = (name(&by)?, fleet::reason(&why)?, source.to_string());
    let attestation = Pledge { check, workload, container, by, why, at_us, until_us, source, key };
    let before = {
        let state = core.commits.state();
        let before = state.attestations.iter().find(|other| other.is_of_same(&attestation)).cloned();
        if before.is_none() && state.attestations.len() >= MAX_WAIVERS {
            return Err(ApiError::conflict(format!("there are {MAX_WAIVERS} attestations"), "take some back"));
        }
        before
    };
    if before.as_ref().is_some_and(|before| before.at_us > attestation.at_us) {
        return Err(ApiError::conflict("one that was signed later is in force", "sign it anew"));
    }
    let summary = format!(
        "{} of {} is attested by {} until {until_us}, signed by the key {}",
        attestation.check,
        attestation.about(),
        attestation.by,
        attestation.key
    );
    tell(core, Severity::Notice, summary, AttestationSet { attestation: attestation.clone(), before }.into()).await?;
    in_force(core.commits.state().attestations.contains(&attestation))?;
    Ok(Json(json!({"attestation": attestation})))
}

/// Takes one back.
pub async fn remove_attestation(
    State(api): State<Arc<Api>>,
    Extension(Source(source)): Extension<Source>,
    sent: Result<Json<RemoveRequest>, JsonRejection>,
) -> Result<Json<Value>, ApiError> {
    let RemoveRequest { check, workload, container, why, by } = body(sent)?;
    let (core, by, why) = (&api.core, name(&by)?, fleet::reason(&why)?);
    let is_meant =
        |other: &&Pledge| (&other.check, &other.workload, &other.container) == (&check, &workload, &container);
    let found = core.commits.state().attestations.iter().find(is_meant).cloned();
    let attestation =
        found.ok_or_else(|| ApiError::not_found("there is no such attestation", "see /api/v1/evidence"))?;
    let summary = format!("{} of {} is attested no longer, by {by}: {why}", attestation.check, attestation.about());
    let told = AttestationRemoved { attestation: attestation.clone(), why, by, source: source.to_string() };
    tell(core, Severity::Warning, summary, told.into()).await?;
    in_force(!core.commits.state().attestations.contains(&attestation))?;
    Ok(Json(json!({"attestation": attestation})))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use axum::body::{Bytes, HttpBody};
    use axum::response::IntoResponse;

    use super::*;

    /// Sent by somebody who is gone.
    struct Stalled;

    impl HttpBody for Stalled {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, Infallible>>> {
            Poll::Pending
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_report_that_stops_in_the_middle_is_waited_for_two_minutes_and_no_longer() {
        let begun = tokio::time::Instant::now();
        let refused = whole(Body::new(Stalled), MAX_REPORT).await.unwrap_err();
        assert_eq!(
            (refused.into_response().status(), begun.elapsed()),
            (axum::http::StatusCode::BAD_REQUEST, ARRIVES_WITHIN)
        );
        assert_eq!(&whole(Body::from("{}"), 2).await.unwrap()[..], b"{}");
        assert_eq!(
            whole(Body::from("{ }"), 2).await.unwrap_err().into_response().status(),
            axum::http::StatusCode::PAYLOAD_TOO_LARGE
        );
    }
}
