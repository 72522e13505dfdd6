//! Reports over the API: the auditor's table, now and at any moment that the log still tells of.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use sidewarden_proto::identity::SpiffeId;
use sidewarden_proto::policy::Pattern;
use sidewarden_proto::time::Timestamp;
use tokio::sync::Semaphore;

use super::error::ApiError;
use super::events::Asked;
use super::routes::Operation;
use super::{Api, Pairs, asked};
use crate::app::Core;
use crate::posture::past;
use crate::report::{self, Builder, Difference, MAX_DETAILED, Made, Numbering, Report, Scope};

/// Reports that are made at a time: each may read much of the log.
static MAKING: Semaphore = Semaphore::const_new(2);
/// Instances that are judged while the state is held: committing waits meanwhile.
const STEP: usize = 100;
const WEEK: Duration = Duration::from_secs(7 * 24 * 3600);
/// Moments of a history.
const POINTS: std::ops::RangeInclusive<u32> = 2..=60;

/// The form of an answer.
#[derive(Clone, Copy, PartialEq)]
enum Format {
    Json,
    Text,
    Csv,
    Html,
}

impl std::str::FromStr for Format {
    type Err = ();

    fn from_str(text: &str) -> Result<Format, ()> {
        Ok(match text {
            "json" => Format::Json,
            "text" => Format::Text,
            "csv" => Format::Csv,
            "html" => Format::Html,
            _ => return Err(()),
        })
    }
}

fn scope(core: &Core, asked: &Asked) -> Result<Scope, ApiError> {
    let hint = "write shop/orders, shop/*, or a SPIFFE ID of this trust domain";
    let wrong = |wrong: String| ApiError::bad_request(wrong, hint);
    let workloads = match asked.value("workload") {
        None => Pattern::all(),
        Some(id) if id.starts_with("spiffe://") => {
            let id: SpiffeId = id.parse().map_err(|_| wrong("`workload` is no SPIFFE ID".into()))?;
            if id.trust_domain() != core.config.trust_domain {
                return Err(wrong(format!("{id} is not of this trust domain")));
            }
            id.path().parse().map_err(wrong)?
        }
        Some(pattern) => pattern.parse().map_err(wrong)?,
    };
    Ok(Scope { workloads, instance: asked.value("instance").map(str::to_owned) })
}

fn moment(asked: &Asked, name: &str, now: Timestamp) -> Result<Option<Timestamp>, ApiError> {
    match asked.moment(name)? {
        Some(at) if at > now => Err(ApiError::bad_request(format!("{name} is in the future"), "nobody knows yet")),
        at => Ok(at),
    }
}

/// The report on a moment of the past, or on the present.
async fn make(
    core: &Core,
    scope: Scope,
    numbering: Numbering,
    at: Option<Timestamp>,
    now: Timestamp,
) -> Result<Report, ApiError> {
    let _permit = MAKING.acquire().await.map_err(|error| ApiError::internal("making a report", &error))?;
    let past = match at {
        Some(at) => {
            let failed = |error| ApiError::internal("reading the past", &error);
            Some(core.index.past(vec![scope.workloads.clone()], at).await.map_err(failed)?)
        }
        None => None,
    };
    let at = at.unwrap_or(now);
    let core = core.clone();
    let made = tokio::task::spawn_blocking(move || {
        let trust_domain = core.config.trust_domain.to_string();
        let made = Made { trust_domain: &trust_domain, numbering, at, now };
        match past {
            None => present(&core, &scope, &made),
            Some(past) => {
                let known = past::Known::of(&core.commits.state());
                report::report(&past::fold(&past, known, at), &core.config.evidence, &scope, &made, &past.unclear)
            }
        }
    });
    made.await.map_err(|error| ApiError::internal("making a report", &error))
}

fn present(core: &Core, scope: &Scope, made: &Made<'_>) -> Report {
    let mut builder = Builder::new(scope, made);
    let ids = builder.ids(&core.commits.state());
    for ids in ids.chunks(STEP) {
        builder.add(&core.commits.state(), &core.config.evidence, ids);
    }
    builder.finish(&[])
}

/// The auditor's table.
pub async fn report(State(api): State<Arc<Api>>, pairs: Pairs) -> Result<Response, ApiError> {
    let asked = asked(Operation::Report, pairs)?;
    let (core, now) = (&api.core, (api.core.clock)());
    let scope = scope(core, &asked)?;
    let (at, since) = (moment(&asked, "at", now)?, moment(&asked, "since", now)?);
    if since.is_some_and(|since| since >= at.unwrap_or(now)) {
        return Err(ApiError::bad_request("`since` is not before `at`", "`since` is the earlier moment of the two"));
    }
    let numbering = asked.parsed("numbering", "1.3.1 or 1.6")?.unwrap_or_default();
    let format = asked.parsed("format", "json, text, csv or html")?.unwrap_or(Format::Json);
    let is_table_alone = match asked.value("detail") {
        None => false,
        Some("table") => true,
        Some(_) => return Err(ApiError::bad_request("`detail` can only be `table`", "leave it out for all subjects")),
    };
    let mut after = make(core, scope.clone(), numbering, at, now).await?;
    let difference = match since {
        Some(since) => {
            let before = make(core, scope, numbering, Some(since), now).await?;
            comparable(&[&before, &after])?;
            Some(report::difference(before, after.clone()))
        }
        None => None,
    };
    let (kind, text) = match format {
        Format::Json => {
            after.subjects.retain(|_| !is_table_alone);
            return Ok(match difference {
                Some(difference) => Json(Difference { after, ..difference }).into_response(),
                None => Json(after).into_response(),
            });
        }
        Format::Text => ("text/plain; charset=utf-8", report::text(&after, difference.as_ref())),
        Format::Csv => ("text/csv; charset=utf-8", report::csv(&after, difference.as_ref())),
        Format::Html => ("text/html; charset=utf-8", report::html(&after, difference.as_ref())),
    };
    Ok(([(header::CONTENT_TYPE, HeaderValue::from_static(kind))], text).into_response())
}

/// What is not listed cannot be compared.
fn comparable(reports: &[&Report]) -> Result<(), ApiError> {
    match reports.iter().all(|report| report.subjects.len() <= MAX_DETAILED) {
        true => Ok(()),
        false => {
            let wrong = format!("more than {MAX_DETAILED} instances and containers cannot be compared at once");
            Err(ApiError::bad_request(wrong, "ask for fewer with `workload`, say shop/*"))
        }
    }
}

/// The score over time.
pub async fn history(State(api): State<Arc<Api>>, pairs: Pairs) -> Result<Json<Value>, ApiError> {
    let asked = asked(Operation::History, pairs)?;
    let (core, now) = (&api.core, (api.core.clock)());
    let scope = scope(core, &asked)?;
    let last = moment(&asked, "until", now)?;
    let until = last.unwrap_or(now);
    let since = moment(&asked, "since", now)?.unwrap_or(until.minus(WEEK));
    let points = asked.parsed::<u32>("points", "a number from 2 to 60")?.unwrap_or(15);
    if since >= until || !POINTS.contains(&points) {
        let hint = "`since` is before `until`, and `points` from 2 to 60";
        return Err(ApiError::bad_request("there is no such span of time", hint));
    }
    let step = until.since(since) / (points - 1);
    let mut shown = Vec::new();
    for point in 0..points {
        let at = if point == points - 1 { last } else { Some(since.plus(step * point)) };
        let report = make(core, scope.clone(), Numbering::default(), at, now).await?;
        let (judged, unclear) = (report.subjects.len(), report.unclear.len());
        shown.push(json!({"at_us": report.at_us, "score": report.score, "counts": report.counts, "judged": judged,
                          "not_known": unclear}));
    }
    Ok(Json(json!({"scope": scope.words(), "points": shown})))
}
