//! Keeps others off the workload's own port: the agent occupies it on every address of the network namespace that is
//! not loopback, and refuses whoever comes there, with an event.
//!
//! That only works while the workload itself listens on loopback alone. Where it does not, the watch tells that it can be
//! reached, and the rules of `intercept` lead whoever comes for its port here all the same: [`refuse_led`].

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use nix::ifaddrs::getifaddrs;
use sidewarden_proto::event::{Direction, RefusalReason};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::accounting::Refusal;
use super::egress::original_destination;
use super::handshake::{Opening, classify, shown};
use super::inbound::Listener;
use super::{Shared, log_panic};

/// How often is looked for new addresses, and for ports that have become free.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// How long somebody who came is listened to, to know what they wanted.
const LISTEN_TO: Duration = Duration::from_secs(1);
/// How many at a time; the others are only counted.
const MAX_LISTENED: usize = 64;

/// A connection for the listener that lets plaintext in.
type Led = mpsc::Sender<(TcpStream, SocketAddr)>;

/// Holds the port of `service` until the agent stops. While `lenient` lets plaintext in, who comes here is served there:
/// clients that have no agent yet still know the service by this port.
pub async fn hold(shared: Arc<Shared>, service: SocketAddr, own: SocketAddr, lenient: Option<Arc<Listener>>) {
    let (led, mut incoming) = mpsc::channel(MAX_LISTENED);
    let mut held: HashMap<IpAddr, tokio::task::AbortHandle> = HashMap::new();
    let mut taken: BTreeSet<IpAddr> = BTreeSet::new();
    let mut tasks = JoinSet::new();
    loop {
        let wanted = wanted(&outside_addresses(), service, own);
        held.retain(|ip, task| {
            wanted.contains(ip) || {
                task.abort();
                false
            }
        });
        for ip in wanted {
            if held.contains_key(&ip) {
                continue;
            }
            match TcpListener::bind(SocketAddr::new(ip, service.port())).await {
                Ok(listener) => {
                    taken.remove(&ip);
                    let lenient = lenient.clone().map(|lenient| (lenient, led.clone()));
                    held.insert(ip, tasks.spawn(refuse_all(shared.clone(), listener, lenient)));
                }
                Err(error) => tell(SocketAddr::new(ip, service.port()), &error, taken.insert(ip)),
            }
        }
        tokio::select! {
            () = shared.stop.cancelled() => break,
            () = sleep(LOOK_AGAIN) => {}
            // Both are never ready to the end: they only ever stop being looked at.
            () = serve_each(&mut incoming, &mut tasks, lenient.as_ref()) => {}
        }
    }
    held.values().for_each(tokio::task::AbortHandle::abort);
    while let Some(result) = tasks.join_next().await {
        if !was_aborted(&result) {
            log_panic(result);
        }
    }
}

/// Why the port is not held, once.
fn tell(address: SocketAddr, error: &io::Error, first: bool) {
    if first {
        tracing::warn!(%address, %error, "the workload's port cannot be held: it should listen on 127.0.0.1 alone");
    }
}

/// Refuses whoever the rules of `intercept` lead to `listener`, until the agent stops.
pub async fn refuse_led(shared: Arc<Shared>, listener: TcpListener) {
    let stop = shared.stop.clone();
    tokio::select! {
        () = stop.cancelled() => {}
        () = refuse_all(shared, listener, None) => {}
    }
}

/// Addresses of this network namespace that others can reach.
fn outside_addresses() -> Vec<IpAddr> {
    let interfaces = match getifaddrs() {
        Ok(interfaces) => interfaces,
        Err(error) => {
            tracing::warn!(%error, "the network addresses cannot be listed");
            return Vec::new();
        }
    };
    let address_of = |storage: nix::sys::socket::SockaddrStorage| {
        let v4 = storage.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| storage.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    };
    interfaces.filter_map(|interface| interface.address.and_then(address_of)).collect()
}

/// Which of `addresses` are to be held: not loopback, not link-local (they need a zone), not where we listen ourselves.
fn wanted(addresses: &[IpAddr], service: SocketAddr, own: SocketAddr) -> BTreeSet<IpAddr> {
    let is_outside = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => !ip.is_loopback(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    };
    let is_ours = |ip: &IpAddr| own.port() == service.port() && (own.ip() == *ip || own.ip().is_unspecified());
    let mut wanted: BTreeSet<IpAddr> = addresses.iter().copied().filter(|ip| is_outside(ip) && !is_ours(ip)).collect();
    // A service that is meant to be on one outside address keeps it.
    wanted.remove(&service.ip());
    wanted
}

/// Holds one port that is bound already.
#[cfg(test)]
pub async fn hold_at(shared: Arc<Shared>, listener: TcpListener, lenient: Arc<Listener>) {
    let ((led, mut incoming), mut tasks) = (mpsc::channel(MAX_LISTENED), JoinSet::new());
    let refusing = refuse_all(shared, listener, Some((lenient.clone(), led)));
    tokio::select! {
        () = refusing => {}
        () = serve_each(&mut incoming, &mut tasks, Some(&lenient)) => {}
    }
}

/// Serves who was led here, each in a task that is waited for, as long as it is polled.
async fn serve_each(
    incoming: &mut mpsc::Receiver<(TcpStream, SocketAddr)>,
    tasks: &mut JoinSet<()>,
    lenient: Option<&Arc<Listener>>,
) {
    loop {
        tokio::select! {
            Some(result) = tasks.join_next(), if !tasks.is_empty() => if !was_aborted(&result) { log_panic(result) },
            Some((tcp, source)) = incoming.recv() => if let Some(lenient) = lenient.cloned() {
                tasks.spawn(async move { lenient.take(tcp, source).await });
            },
        }
    }
}

fn was_aborted(result: &Result<(), tokio::task::JoinError>) -> bool {
    matches!(result, Err(error) if error.is_cancelled())
}

async fn refuse_all(shared: Arc<Shared>, listener: TcpListener, lenient: Option<(Arc<Listener>, Led)>) {
    let Ok(own) = listener.local_addr() else { return };
    let room = Arc::new(Semaphore::new(MAX_LISTENED));
    let mut tasks = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            Some(result) = tasks.join_next(), if !tasks.is_empty() => { log_panic(result); continue }
            accepted = listener.accept() => accepted,
        };
        let lenient = lenient.as_ref().filter(|(lenient, _)| lenient.is_lenient_now());
        let accepted = match (accepted, lenient) {
            // Where the queue is full it is refused as it would be without leniency.
            (Ok(accepted), Some((_, led))) => match led.try_send(accepted) {
                Ok(()) => continue,
                Err(full) => Ok(full.into_inner()),
            },
            (accepted, _) => accepted,
        };
        match (accepted, room.clone().try_acquire_owned()) {
            (Ok((tcp, source)), Ok(permit)) => {
                let shared = shared.clone();
                let address = destination(&tcp, own);
                tasks.spawn(async move {
                    let detail = listen_to(tcp).await;
                    drop(permit);
                    book(&shared, address, source, detail);
                });
            }
            (Ok((tcp, source)), Err(_)) => book(&shared, destination(&tcp, own), source, "many at a time".into()),
            (Err(error), _) => {
                tracing::warn!(%error, address = %own, "accepting on the held port failed");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Where somebody wanted to go before a rule led them here; where they came to, if none did.
fn destination(tcp: &TcpStream, own: SocketAddr) -> SocketAddr {
    let told = original_destination(tcp).or_else(|| tcp.local_addr().ok()).unwrap_or(own);
    SocketAddr::new(told.ip().to_canonical(), told.port())
}

fn book(shared: &Shared, address: SocketAddr, source: SocketAddr, detail: String) {
    let (direction, reason) = (Direction::Inbound, RefusalReason::DirectToService);
    let (listener, peer) = (address.to_string(), String::new());
    shared.ledger.refused(Refusal { direction, reason, detail, listener, source: Some(source), peer });
}

/// What somebody says to the service's port, in few words.
async fn listen_to(mut tcp: TcpStream) -> String {
    let mut bytes = [0; 512];
    match timeout(LISTEN_TO, tcp.read(&mut bytes)).await {
        Err(_) => "waited for the service to speak first".into(),
        Ok(Err(error)) => format!("broke off: {error}"),
        Ok(Ok(0)) => "closed without a byte".into(),
        Ok(Ok(count)) => match classify(&bytes[..count]) {
            Opening::Refuse(RefusalReason::Plaintext, _) => format!("sent {}", shown(&bytes[..count])),
            _ => "began a TLS handshake".into(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_held_on_outside_addresses_that_are_not_our_own() {
        let all: Vec<IpAddr> =
            ["127.0.0.1", "10.0.0.5", "10.1.0.5", "::1", "fd00::7", "fe80::1"].map(|ip| ip.parse().unwrap()).into();
        let check = |service: &str, own: &str, expected: &[&str]| {
            let expected: BTreeSet<IpAddr> = expected.iter().map(|ip| ip.parse().unwrap()).collect();
            assert_eq!(wanted(&all, service.parse().unwrap(), own.parse().unwrap()), expected, "{service} {own}");
        };
        check("127.0.0.1:8080", "0.0.0.0:8443", &["10.0.0.5", "10.1.0.5", "fd00::7"]);
        check("127.0.0.1:8080", "10.0.0.5:8080", &["10.1.0.5", "fd00::7"]);
        check("10.1.0.5:8080", "0.0.0.0:8443", &["10.0.0.5", "fd00::7"]);
    }

    #[tokio::test]
    async fn what_came_is_said_in_few_words() {
        for (sent, expected) in [
            (&b"GET /orders?secret=1 HTTP/1.1\r\nAuthorization: x\r\n"[..], "sent `GET /orders`"),
            (&[22, 3, 1, 0, 5, 1], "began a TLS handshake"),
            (b"", "closed without a byte"),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut client, sent).await.unwrap();
            drop(client);
            assert_eq!(listen_to(listener.accept().await.unwrap().0).await, expected);
        }
    }
}
