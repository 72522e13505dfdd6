//! Takes HTTP connections in: TLS with the newest certificate, deadlines, caps, and an orderly end.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use crate::identity::page::Shown;

/// Connections at a time; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 512;
/// Of those, from one address, so that one client cannot keep all others out.
const MAX_FROM_ONE: usize = 64;
/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How long the head of a request may take.
const HEAD: Duration = Duration::from_secs(10);
/// How long an HTTP/2 peer may leave a ping unanswered.
const PING: Duration = Duration::from_secs(20);
/// How long open requests may take when the program ends.
const GRACE: Duration = Duration::from_secs(2);
/// How long to wait when accepting fails, for example for lack of file descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// The address a request came from, for handlers.
#[derive(Clone, Copy, Debug)]
pub struct Source(pub SocketAddr);

/// One listener's way of working.
pub struct Door {
    /// Where connections come in.
    pub listener: TcpListener,
    /// The certificate, always the newest; plain HTTP when there is none.
    pub shown: Option<watch::Receiver<Shown>>,
    /// What answers.
    pub router: Router,
    /// Ends it.
    pub shutdown: CancellationToken,
}

/// Serves until the shutdown, then lets open requests end.
pub async fn serve(door: Door) {
    let Door { listener, shown, router, shutdown } = door;
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let sources = Sources::default();
    let connections = TaskTracker::new();
    loop {
        let permit = room.clone().acquire_owned();
        let accepted = tokio::select! {
            accepted = async { (permit.await, listener.accept().await) } => accepted,
            () = shutdown.cancelled() => break,
        };
        match accepted {
            (Ok(permit), Ok((stream, source))) => {
                let Some(place) = sources.enter(source.ip(), permit) else { continue };
                let (shown, router) = (shown.clone(), router.clone());
                connections.spawn(connection(stream, source, shown, router, shutdown.clone(), place));
            }
            (_, Err(error)) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
            (Err(_closed), _) => break,
        }
    }
    connections.close();
    let _ = tokio::time::timeout(GRACE, connections.wait()).await;
}

async fn connection(
    stream: TcpStream,
    source: SocketAddr,
    shown: Option<watch::Receiver<Shown>>,
    router: Router,
    shutdown: CancellationToken,
    _place: Place,
) {
    // Answers are small: waiting for more to send only makes them late.
    let _ = stream.set_nodelay(true);
    let Some(shown) = shown else { return speak(stream, source, router, shutdown).await };
    let secured = tokio::select! {
        secured = tokio::time::timeout(HANDSHAKE, secure(stream, &shown)) => secured,
        () = shutdown.cancelled() => return,
    };
    match secured {
        Ok(Ok(Some(stream))) => speak(stream, source, router, shutdown).await,
        Ok(Ok(None)) => {}
        Ok(Err(error)) => tracing::debug!(%source, %error, "a TLS handshake failed"),
        Err(_late) => tracing::debug!(%source, "a TLS handshake was not finished in time"),
    }
}

/// Does the handshake, or tells a client of plain HTTP where to go.
async fn secure(
    mut stream: TcpStream,
    shown: &watch::Receiver<Shown>,
) -> io::Result<Option<tokio_rustls::server::TlsStream<TcpStream>>> {
    let mut first = [0];
    if stream.peek(&mut first).await? == 0 {
        return Ok(None);
    }
    if first[0].is_ascii_uppercase() {
        redirect(&mut stream).await?;
        return Ok(None);
    }
    let config = shown.borrow().config().map_err(io::Error::other)?;
    TlsAcceptor::from(config).accept(stream).await.map(Some)
}

async fn redirect(stream: &mut TcpStream) -> io::Result<()> {
    let mut head = Vec::with_capacity(1024);
    while head.len() < 4096 && !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if stream.read_buf(&mut head).await? == 0 {
            break;
        }
    }
    stream.write_all(to_https(&head).as_bytes()).await?;
    stream.shutdown().await
}

/// The answer to plain HTTP: the same place by HTTPS, if the request says which.
fn to_https(head: &[u8]) -> String {
    let text = String::from_utf8_lossy(head);
    let path = text.split(' ').nth(1).filter(|path| path.starts_with('/')).unwrap_or("/");
    let host = text.lines().skip(1).find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("host").then(|| value.trim())
    });
    let plain = |text: &str| text.bytes().all(|b| b.is_ascii_graphic() && !b"<>\"\\".contains(&b));
    let said = "This port speaks HTTPS only.\n";
    let rest = format!("Content-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{said}", said.len());
    match host {
        Some(host) if plain(host) && plain(path) && !host.is_empty() && !host.contains('/') => {
            format!("HTTP/1.1 301 Moved Permanently\r\nLocation: https://{host}{path}\r\n{rest}")
        }
        _ => format!("HTTP/1.1 400 Bad Request\r\n{rest}"),
    }
}

async fn speak<S>(stream: S, source: SocketAddr, router: Router, shutdown: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = router.map_request(move |mut request: Request<_>| {
        request.extensions_mut().insert(Source(source));
        request
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(64 << 10);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .max_concurrent_streams(64)
        .max_header_list_size(32 << 10);
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    tokio::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        () = shutdown.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    let _ = tokio::time::timeout(GRACE, connection).await;
}

/// Connections by address.
#[derive(Clone, Default)]
struct Sources(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl Sources {
    fn enter(&self, source: IpAddr, permit: OwnedSemaphorePermit) -> Option<Place> {
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = sources.entry(source).or_default();
        if *count >= MAX_FROM_ONE {
            return None;
        }
        *count += 1;
        Some(Place { sources: self.clone(), source, _permit: permit })
    }
}

/// One connection's room, given back when it ends.
struct Place {
    sources: Sources,
    source: IpAddr,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut sources = self.sources.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = sources.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                sources.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_sent_to_https() {
        let rows = [
            ("GET /x?y=1 HTTP/1.1\r\nHost: c:7444\r\n\r\n", "301", "Location: https://c:7444/x?y=1\r\n"),
            ("GET http://a/ HTTP/1.1\r\nhost: c\r\n\r\n", "301", "Location: https://c/\r\n"),
            ("GET / HTTP/1.0\r\n\r\n", "400", "HTTPS only"),
            ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", "400", "HTTPS only"),
            ("GET / HTTP/1.1\r\nHost: \"><b\r\n\r\n", "400", "HTTPS only"),
            ("", "400", "HTTPS only"),
        ];
        for (head, status, expected) in rows {
            let answer = to_https(head.as_bytes());
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(expected), "{head}: {answer}");
        }
    }

    #[test]
    fn one_address_gets_only_its_share_and_gives_it_back() {
        let (sources, room) = (Sources::default(), Arc::new(Semaphore::new(1000)));
        let enter = |ip: &str| sources.enter(ip.parse().unwrap(), room.clone().try_acquire_owned().unwrap());
        let places: Vec<Option<Place>> = (0..MAX_FROM_ONE + 1).map(|_| enter("10.0.0.1")).collect();
        assert_eq!(places.iter().flatten().count(), MAX_FROM_ONE);
        assert!(enter("10.0.0.2").is_some());
        drop(places);
        assert!(enter("10.0.0.1").is_some());
        assert!(sources.0.lock().unwrap().is_empty());
    }
}
