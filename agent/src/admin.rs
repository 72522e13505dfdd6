//! Health, metrics and posture over plain HTTP, on loopback unless told otherwise. Nothing here changes anything.
//!
//! | path | answer |
//! |---|---|
//! | `/healthz` | 200 while the agent runs |
//! | `/readyz` | 200 when it can do its work; 503 and why not otherwise |
//! | `/metrics` | Prometheus' text format |
//! | `/posture` | the findings as they were last judged, JSON |

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use sidewarden_proto::finding::{Finding, Vantage};
use sidewarden_proto::time::Timestamp;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::identity::Current;
use crate::metrics::Metrics;
use crate::proxy::connections::Registry;
use crate::spool::Spool;
use crate::uplink::SharedStatus;
use crate::watch::View;

/// Connections at a time: a scraper, a probe, a person.
const MAX_CONNECTIONS: usize = 32;
/// Most bytes of a request's head.
const MAX_HEAD: usize = 8 << 10;
/// For a request's head to come.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
/// For a whole connection.
const ALL_WITHIN: Duration = Duration::from_secs(30);
/// For a probe by our own program.
const PROBE_WITHIN: Duration = Duration::from_secs(3);

/// What is looked at to answer.
pub struct Admin {
    /// The newest identity.
    pub identity: Current,
    /// Why there is no certificate, or no newer one.
    pub trouble: tokio::sync::watch::Receiver<Option<String>>,
    /// How the uplink stands.
    pub uplink: SharedStatus,
    /// The spool.
    pub spool: Spool,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Whose certificates were seen.
    pub connections: Arc<Registry>,
    /// What the watch sees, where there is one.
    pub view: Option<Arc<View>>,
    /// Set once nothing is accepted any more.
    pub stopping: CancellationToken,
}

#[derive(Serialize)]
struct Posture<'a> {
    at_us: Timestamp,
    vantage: Vantage,
    findings: &'a [Finding],
}

/// Serves until `shutdown`.
pub async fn serve(listener: TcpListener, admin: Arc<Admin>, shutdown: CancellationToken) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut tasks = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
            accepted = listener.accept() => accepted,
        };
        match (accepted, room.clone().try_acquire_owned()) {
            (Ok((tcp, _)), Ok(permit)) => {
                let admin = admin.clone();
                tasks.spawn(async move {
                    serve_one(tcp, admin).await;
                    drop(permit);
                });
            }
            (Ok(_), Err(_)) => tracing::warn!(limit = MAX_CONNECTIONS, "too many connections to the admin listener"),
            (Err(error), _) => {
                tracing::warn!(%error, "accepting on the admin listener failed");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_one(tcp: TcpStream, admin: Arc<Admin>) {
    let answer = service_fn(move |request: Request<Incoming>| {
        let response = admin.answer(request.method(), request.uri().path());
        async { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_buf_size(MAX_HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(tcp), answer);
    match timeout(ALL_WITHIN, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a request to the admin listener broke off"),
        Err(_) => tracing::debug!("a request to the admin listener took too long"),
    }
}

impl Admin {
    fn answer(&self, method: &Method, path: &str) -> Response<Full<Bytes>> {
        if method != Method::GET && method != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered here\n");
        }
        match path {
            "/healthz" => text(StatusCode::OK, "ok\n"),
            "/readyz" => self.readiness(),
            "/metrics" => {
                let identity = self.identity.borrow().clone();
                let (view, now) = (self.view.as_deref(), Timestamp::now());
                self.metrics.certificates(identity.as_deref(), &self.connections.peer_ends(now));
                let body = self.metrics.render(self.spool.stats(), identity.as_deref(), view, now);
                response(StatusCode::OK, "text/plain; version=0.0.4", body)
            }
            "/posture" => self.posture(),
            _ => text(StatusCode::NOT_FOUND, "here are /healthz, /readyz, /metrics and /posture\n"),
        }
    }

    /// Ready is who can let traffic through, and keeps off what should not come through. A collector that is away is told, but makes nobody unready.
    fn readiness(&self) -> Response<Full<Bytes>> {
        let usable = match self.identity.borrow().as_ref() {
            None => Err("this agent has not enrolled yet".to_owned()),
            Some(identity) => identity.usable(Timestamp::now()).map_err(|error| error.to_string()),
        };
        let stopping = self.stopping.is_cancelled();
        let uplink = self.uplink.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let identity = match (&usable, &*self.trouble.borrow()) {
            (Ok(()), None) => "ok".to_owned(),
            (Ok(()), Some(trouble)) => format!("ok, but renewing it fails: {trouble}"),
            (Err(error), None) => error.clone(),
            (Err(error), Some(trouble)) => format!("{error}: {trouble}"),
        };
        let collector = match (&uplink.session, &uplink.last_error) {
            (Some((collector, transport)), _) => format!("{collector} over {transport}"),
            (None, Some(error)) => error.clone(),
            (None, None) => "not reached yet".into(),
        };
        let proxy = if stopping { "stopping" } else { "ok" };
        let open = self.view.as_ref().and_then(|view| view.interception_trouble());
        let ready = usable.is_ok() && !stopping && open.is_none();
        let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let interception = open.map_or_else(String::new, |why| format!("interception: {why}\n"));
        text(status, format!("identity: {identity}\nproxy: {proxy}\n{interception}collector: {collector}\n"))
    }

    fn posture(&self) -> Response<Full<Bytes>> {
        let Some(view) = &self.view else { return text(StatusCode::NOT_FOUND, "nothing is watched\n") };
        let posture = view.posture();
        let body = Posture { at_us: posture.at, vantage: posture.vantage, findings: &posture.findings };
        match serde_json::to_vec(&body) {
            Ok(json) => response(StatusCode::OK, "application/json", json),
            Err(error) => {
                tracing::error!(%error, "the posture cannot be written as JSON");
                text(StatusCode::INTERNAL_SERVER_ERROR, "the posture cannot be written; see the log\n")
            }
        }
    }
}

fn text(status: StatusCode, body: impl Into<String>) -> Response<Full<Bytes>> {
    response(status, "text/plain; charset=utf-8", body.into().into_bytes())
}

fn response(status: StatusCode, kind: &'static str, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// Asks a running agent whether it is ready: `health`, for probes in images without a shell.
pub fn probe(listen: SocketAddr) -> std::io::Result<(bool, String)> {
    use std::io::{Read, Write};
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    let mut tcp = std::net::TcpStream::connect_timeout(&SocketAddr::new(ip, listen.port()), PROBE_WITHIN)?;
    tcp.set_read_timeout(Some(PROBE_WITHIN))?;
    tcp.set_write_timeout(Some(PROBE_WITHIN))?;
    tcp.write_all(b"GET /readyz HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    tcp.take(64 << 10).read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    Ok((head.starts_with("HTTP/1.1 200 "), body.to_owned()))
}
