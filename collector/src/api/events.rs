//! Events of the past by cursor, and events of the present as a stream.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderValue, Response, header};
use hyper::body::Frame;
use serde::{Deserialize, Serialize};
use sidewarden_proto::event::Severity;
use sidewarden_proto::identity::{InstanceId, SpiffeId};
use sidewarden_proto::time::Timestamp;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{OwnedSemaphorePermit, broadcast, mpsc};

use super::error::ApiError;
use crate::commit::Committed;
use crate::index::{MAX_LIMIT, Order, Place, Query, Record};

/// Pieces of a stream that wait for a slow client; then it loses events, and is told how many.
const WAITING: usize = 64;
/// A comment this often keeps proxies from closing a quiet stream.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// The parameters of `/api/v1/events` and its stream, as text.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    kind: Option<String>,
    workload: Option<String>,
    instance: Option<String>,
    min_severity: Option<String>,
    since: Option<String>,
    until: Option<String>,
    before: Option<String>,
    after: Option<String>,
    limit: Option<String>,
}

/// The answer to a question about events.
#[derive(Debug, Serialize)]
pub struct Events {
    /// The events, in the order asked for.
    pub events: Vec<Record>,
    /// Pass it as `before` (or `after`, if that was given) to go on; null at the end.
    pub next: Option<Place>,
}

impl Asked {
    /// The question, or what is wrong with it.
    pub fn query(&self) -> Result<Query, ApiError> {
        let (before, after) = (place("before", &self.before)?, place("after", &self.after)?);
        if before.is_some() && after.is_some() {
            return Err(ApiError::bad_request("before and after cannot be combined", "leave one of them out"));
        }
        let limit = parsed::<usize>("limit", &self.limit, "a number from 1 to 1000")?.unwrap_or(100);
        if !(1..=MAX_LIMIT).contains(&limit) {
            return Err(ApiError::bad_request(format!("limit is {limit}"), "limit must be from 1 to 1000"));
        }
        let kinds = self.kind.iter().flat_map(|kinds| kinds.split(',')).map(str::trim).filter(|kind| !kind.is_empty());
        Ok(Query {
            kinds: kinds.map(str::to_owned).collect(),
            workload: parsed::<SpiffeId>("workload", &self.workload, "a SPIFFE ID, as /api/v1/workloads shows it")?,
            instance: parsed::<InstanceId>("instance", &self.instance, "an instance, as /api/v1/agents shows it")?,
            min_severity: parsed("min_severity", &self.min_severity, "one of info, notice, warning, critical")?
                .unwrap_or(Severity::Info),
            since: moment("since", &self.since)?,
            until: moment("until", &self.until)?,
            order: if after.is_some() { Order::Oldest(after) } else { Order::Newest(before) },
            limit,
        })
    }
}

fn parsed<T: std::str::FromStr>(name: &str, text: &Option<String>, wanted: &str) -> Result<Option<T>, ApiError> {
    let Some(text) = text.as_deref().filter(|text| !text.is_empty()) else { return Ok(None) };
    let shown: String = text.chars().take(60).collect();
    let fault = |_| ApiError::bad_request(format!("{name} is `{shown}`"), format!("{name} must be {wanted}"));
    text.parse().map(Some).map_err(fault)
}

fn place(name: &str, text: &Option<String>) -> Result<Option<Place>, ApiError> {
    parsed(name, text, "a cursor from an earlier answer")
}

/// Microseconds since 1970, as answers have it, or RFC 3339.
fn moment(name: &str, text: &Option<String>) -> Result<Option<Timestamp>, ApiError> {
    if let Some(micros) = text.as_deref().and_then(|text| text.parse().ok()) {
        return Ok(Some(Timestamp(micros)));
    }
    parsed(name, text, "a time like 2026-01-31T12:00:00Z, or microseconds since 1970")
}

/// Whether a live event answers the question; cursors and limits are of the past only.
fn wanted(query: &Query, record: &Record) -> bool {
    (query.kinds.is_empty() || query.kinds.contains(&record.kind))
        && query.workload.as_ref().is_none_or(|workload| *workload == record.agent.workload)
        && query.instance.as_ref().is_none_or(|instance| *instance == record.agent.instance)
        && record.severity >= query.min_severity
}

/// Server-sent events: `event: event` with one record each, `event: skipped` when the client was too slow.
pub fn stream(
    query: Query,
    events: broadcast::Receiver<Arc<Committed>>,
    permit: OwnedSemaphorePermit,
) -> Response<Body> {
    let (pieces, body) = mpsc::channel(WAITING);
    tokio::spawn(pump(query, events, pieces, permit));
    let mut response = Response::new(Body::new(Stream(body)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Ends when the client is gone, the collector stops, or nothing can be sent.
async fn pump(
    query: Query,
    mut events: broadcast::Receiver<Arc<Committed>>,
    pieces: mpsc::Sender<Bytes>,
    _permit: OwnedSemaphorePermit,
) {
    let mut piece = Bytes::from_static(b": ready\n\n");
    loop {
        if !piece.is_empty() && pieces.send(piece).await.is_err() {
            return;
        }
        let next = tokio::select! {
            next = tokio::time::timeout(KEEPALIVE, events.recv()) => next,
            () = pieces.closed() => return,
        };
        piece = match next {
            Ok(Ok(link)) => told(&query, &link),
            Ok(Err(RecvError::Lagged(batches))) => {
                format!("event: skipped\ndata: {{\"batches\":{batches}}}\n\n").into()
            }
            Ok(Err(RecvError::Closed)) => return,
            Err(_quiet) => Bytes::from_static(b": still here\n\n"),
        };
    }
}

fn told(query: &Query, link: &Committed) -> Bytes {
    let mut text = String::new();
    for record in link.records().filter(|record| wanted(query, record)) {
        // JSON has no raw line break, so one data line is enough.
        if let Ok(json) = serde_json::to_string(&record) {
            text.push_str(&format!("event: event\nid: {}\ndata: {json}\n\n", record.cursor));
        }
    }
    text.into()
}

struct Stream(mpsc::Receiver<Bytes>);

impl HttpBody for Stream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|piece| piece.map(|bytes| Ok(Frame::data(bytes))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(pairs: &[(&str, &str)]) -> Asked {
        let map: serde_json::Map<String, serde_json::Value> =
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).into())).collect();
        serde_json::from_value(map.into()).unwrap()
    }

    #[test]
    fn no_parameters_mean_the_newest_hundred() {
        let query = asked(&[]).query().unwrap();
        assert_eq!((query.order, query.limit, query.min_severity), (Order::Newest(None), 100, Severity::Info));
    }

    #[test]
    fn parameters_become_the_question() {
        let query = asked(&[
            ("kind", "a.b, c.d"),
            ("workload", "spiffe://x.test/a/b"),
            ("min_severity", "warning"),
            ("since", "2026-01-01T00:00:00Z"),
            ("until", "1800000000000000"),
            ("after", "7.3"),
            ("limit", "5"),
        ]);
        let query = query.query().unwrap();
        assert_eq!(query.kinds, ["a.b", "c.d"]);
        assert_eq!(query.order, Order::Oldest(Some(Place { position: 7, seq: 3 })));
        assert_eq!(query.until, Some(Timestamp(1_800_000_000_000_000)));
        assert_eq!(query.since.unwrap().to_string(), "2026-01-01T00:00:00.000Z");
    }

    #[test]
    fn what_cannot_be_read_is_refused_with_what_would_be_right() {
        let rows = [
            ("limit", "0"),
            ("limit", "1001"),
            ("limit", "many"),
            ("min_severity", "bad"),
            ("workload", "web"),
            ("instance", "../x"),
            ("since", "yesterday"),
            ("before", "x"),
        ];
        for (name, value) in rows {
            let error = asked(&[(name, value)]).query().unwrap_err();
            assert!(format!("{error:?}").contains(name), "{name}={value}: {error:?}");
        }
        assert!(asked(&[("before", "1.1"), ("after", "1.1")]).query().is_err());
    }
}
