//! Events of the past by cursor, and events of the present as a stream.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderValue, Response, header};
use hyper::body::Frame;
use serde::Serialize;
use sidewarden_proto::event::Severity;
use sidewarden_proto::identity::{InstanceId, SpiffeId};
use sidewarden_proto::time::Timestamp;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{OwnedSemaphorePermit, broadcast, mpsc};

use super::error::ApiError;
use super::routes::Parameter;
use crate::commit::Committed;
use crate::index::{MAX_LIMIT, Order, Place, Query, Record};

/// Pieces of a stream that wait for a slow client; then it loses events, and is told how many.
const WAITING: usize = 64;
/// A comment this often keeps proxies from closing a quiet stream.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// The parameters of `/api/v1/events` and its stream, as text. `kind` may stand more than once.
#[derive(Debug, Default)]
pub struct Asked(Vec<(String, String)>);

impl Asked {
    /// The parameters of a request, or which of them is none of `known`.
    pub fn new(pairs: Vec<(String, String)>, known: &[Parameter]) -> Result<Asked, ApiError> {
        let unknown = pairs.iter().find(|(name, _)| !known.iter().any(|(known, _)| known == name));
        let Some((name, _)) = unknown else { return Ok(Asked(pairs)) };
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        let shown: String = name.chars().take(60).collect();
        Err(ApiError::bad_request(
            format!("there is no parameter `{shown}`"),
            format!("there are {}", names.join(", ")),
        ))
    }

    /// The value of a parameter that stands once; `None` if it is missing or empty.
    pub fn value(&self, wanted: &str) -> Option<&str> {
        self.0.iter().rfind(|(name, _)| name == wanted).map(|(_, value)| value.as_str()).filter(|v| !v.is_empty())
    }

    /// The question, or what is wrong with it.
    pub fn query(&self) -> Result<Query, ApiError> {
        let (before, after) = (self.place("before")?, self.place("after")?);
        if before.is_some() && after.is_some() {
            return Err(ApiError::bad_request("before and after cannot be combined", "leave one of them out"));
        }
        let limit = self.parsed::<usize>("limit", "a number from 1 to 1000")?.unwrap_or(100);
        if !(1..=MAX_LIMIT).contains(&limit) {
            return Err(ApiError::bad_request(format!("limit is {limit}"), "limit must be from 1 to 1000"));
        }
        let severity = self.parsed("min_severity", "one of info, notice, warning, critical")?;
        Ok(Query {
            kinds: self.kinds(),
            workload: self.parsed::<SpiffeId>("workload", "a SPIFFE ID, as /api/v1/workloads shows it")?,
            instance: self.parsed::<InstanceId>("instance", "an instance, as /api/v1/agents shows it")?,
            min_severity: severity.unwrap_or(Severity::Info),
            since: self.moment("since")?,
            until: self.moment("until")?,
            order: if after.is_some() { Order::Oldest(after) } else { Order::Newest(before) },
            limit,
        })
    }

    fn kinds(&self) -> Vec<String> {
        let given = self.0.iter().filter(|(name, _)| name == "kind").flat_map(|(_, kinds)| kinds.split(','));
        given.map(str::trim).filter(|kind| !kind.is_empty()).map(str::to_owned).collect()
    }

    /// The value of a parameter as a `T`; `wanted` says what it must be.
    pub fn parsed<T: std::str::FromStr>(&self, name: &str, wanted: &str) -> Result<Option<T>, ApiError> {
        let Some(text) = self.value(name) else { return Ok(None) };
        let shown: String = text.chars().take(60).collect();
        let fault = |_| ApiError::bad_request(format!("{name} is `{shown}`"), format!("{name} must be {wanted}"));
        text.parse().map(Some).map_err(fault)
    }

    fn place(&self, name: &str) -> Result<Option<Place>, ApiError> {
        self.parsed(name, "a cursor from an earlier answer")
    }

    /// Microseconds since 1970, as answers have it, or RFC 3339.
    pub fn moment(&self, name: &str) -> Result<Option<Timestamp>, ApiError> {
        if let Some(micros) = self.value(name).and_then(|text| text.parse().ok()) {
            return Ok(Some(Timestamp(micros)));
        }
        self.parsed(name, "a time like 2026-01-31T12:00:00Z, or microseconds since 1970")
    }
}

/// The answer to a question about events.
#[derive(Debug, Serialize)]
pub struct Events {
    /// The events, in the order asked for.
    pub events: Vec<Record>,
    /// Pass it as `before` (or `after`, if that was given) to go on; null at the end.
    pub next: Option<Place>,
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
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Response<Body> {
    let (pieces, body) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        tokio::select! {
            () = pump(query, events, pieces, permit) => {}
            () = shutdown => {}
        }
    });
    let mut response = Response::new(Body::new(Stream(body)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Ends when the client is gone, or nothing more can come.
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
        Asked(pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
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
            ("kind", "e.f"),
            ("workload", "spiffe://x.test/a/b"),
            ("min_severity", "warning"),
            ("since", "2026-01-01T00:00:00Z"),
            ("until", "1800000000000000"),
            ("after", "7.3"),
            ("limit", "5"),
        ]);
        let query = query.query().unwrap();
        assert_eq!(query.kinds, ["a.b", "c.d", "e.f"]);
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

    #[test]
    fn a_misspelt_parameter_is_told_with_those_there_are() {
        let error = Asked::new(vec![("kinds".into(), "x".into())], &[("kind", ""), ("limit", "")]).unwrap_err();
        assert!(format!("{error:?}").contains("there are kind, limit"), "{error:?}");
    }
}
