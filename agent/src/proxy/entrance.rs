//! From accept to what a connection wants: who really connected, TLS to which of the services, or plaintext where that is
//! let in for a while. Everything else is refused here, for its own reason.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use sidewarden_proto::event::RefusalReason;
use sidewarden_proto::time::Timestamp;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::front::{opening, real_source, unmask};
use super::handshake::{ALERT_PROTOCOL_VERSION, ALERT_UNRECOGNIZED_NAME, Hello, Opening, part_soon};
use super::names::Names;
use super::permissive::Leniency;
use super::secure::Fault;
use super::{Room, Shared};
use crate::config::Inbound;
use crate::policy::address::Network;

/// What stands before the services of one listener.
pub struct Entrance<W> {
    services: Names<W>,
    balancers: Vec<Network>,
    /// Where plaintext may come in for a while, and to which service.
    leniency: Option<Arc<Leniency>>,
}

/// A connection that may go on.
pub struct Passed<'a, W> {
    /// Who connected, by the load balancer's word if there is one.
    pub source: SocketAddr,
    /// What was read of it.
    pub bytes: Vec<u8>,
    /// The service it is for.
    pub service: &'a W,
    /// What it speaks.
    pub speaks: Speaks<'a>,
}

/// What a connection speaks.
pub enum Speaks<'a> {
    /// TLS, as far as the hello tells; the handshake must be over at this moment.
    Tls(Hello, Instant),
    /// Plaintext, with what it began with in few words.
    Plaintext(&'a Arc<Leniency>, String),
}

/// Why a connection does not get further.
pub struct Stopped {
    /// From the closed list.
    pub reason: RefusalReason,
    /// What exactly happened.
    pub detail: String,
    /// Who connected, as far as that was known.
    pub source: SocketAddr,
}

impl Stopped {
    fn new((reason, detail): Fault, source: SocketAddr) -> Stopped {
        Stopped { reason, detail, source }
    }
}

impl<W> Entrance<W> {
    /// Of blocks that share the listener called `name`, each with its service; `cut` ends everything.
    pub fn new(name: &str, blocks: Vec<(Inbound, W)>, cut: &CancellationToken) -> Entrance<W> {
        let first = blocks.first().map(|(block, _)| block);
        let balancers = first.map(|block| block.accept_proxy_protocol_from.clone()).unwrap_or_default();
        let lenient = blocks.iter().find_map(|(block, _)| block.permissive.clone());
        let leniency = lenient.map(|permissive| Leniency::new(name.to_owned(), permissive, cut.child_token()));
        let leniency = leniency.map(Arc::new);
        let services = blocks.into_iter().map(|(block, service)| (block.server_name, service));
        Entrance { services: Names::new(services.collect()), balancers, leniency }
    }

    /// The listener's leniency, on or over.
    pub fn leniency(&self) -> Option<&Arc<Leniency>> {
        self.leniency.as_ref()
    }

    /// Whether plaintext may come in now.
    pub fn lenient_now(&self) -> Option<&Arc<Leniency>> {
        self.leniency.as_ref().filter(|leniency| leniency.is_on(Timestamp::now()))
    }

    /// Whether this address has to tell who connects through it.
    pub fn is_balancer(&self, address: SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        self.balancers.iter().any(|network| network.contains(ip))
    }

    /// Lets a connection pass, or ends it in the way its client understands.
    pub async fn pass(
        &self,
        shared: &Shared,
        tcp: &mut TcpStream,
        from: SocketAddr,
        room: &mut Room,
    ) -> Result<Passed<'_, W>, Stopped> {
        if self.lenient_now().is_none() {
            // Nobody gets further without one, so nothing is read.
            shared.usable_identity().map_err(|fault| Stopped::new(fault, from))?;
        }
        let (by, mut bytes) = (Instant::now() + shared.timeouts.handshake, Vec::with_capacity(2048));
        let source = match self.is_balancer(from) {
            true => behind(shared, tcp, from, &mut bytes, by, room).await?,
            false => from,
        };
        let silent_after = self.lenient_now().map(|leniency| leniency.silent_after()).unwrap_or_default();
        let reading = opening(tcp, &mut bytes, silent_after);
        let read = in_time(shared, by, "the ClientHello", reading).await;
        let opening = read.map_err(|fault| Stopped::new(fault, source))?;
        let opening = if self.is_balancer(from) { opening } else { unmask(opening, &bytes) };
        match self.judge(opening, by) {
            Ok((service, speaks)) => Ok(Passed { source, bytes, service, speaks }),
            Err(fault) => {
                part_soon(tcp, farewell(fault.0)).await;
                Err(Stopped::new(fault, source))
            }
        }
    }

    fn judge(&self, opening: Opening, by: Instant) -> Result<(&W, Speaks<'_>), Fault> {
        match opening {
            Opening::Tls(hello) => match self.services.find(hello.server_name.as_deref()) {
                Some(service) => Ok((service, Speaks::Tls(hello, by))),
                None => Err((RefusalReason::UnknownServerName, asked_for(&hello))),
            },
            Opening::Refuse(RefusalReason::Plaintext, detail) => match (self.lenient_now(), self.services.find(None)) {
                (Some(leniency), Some(service)) => Ok((service, Speaks::Plaintext(leniency, detail))),
                _ => Err((RefusalReason::Plaintext, detail)),
            },
            Opening::Refuse(reason, detail) => Err((reason, detail)),
            Opening::More => Err((RefusalReason::HandshakeFailed, "its hello has no end".to_owned())),
        }
    }
}

/// Who stands behind the load balancer at `from`; limits of a source are kept for them from here on.
async fn behind(
    shared: &Shared,
    tcp: &mut TcpStream,
    from: SocketAddr,
    bytes: &mut Vec<u8>,
    by: Instant,
    room: &mut Room,
) -> Result<SocketAddr, Stopped> {
    let read = in_time(shared, by, "the PROXY header", real_source(tcp, bytes)).await;
    let real = read.map_err(|fault| Stopped::new(fault, from))?;
    let real = real.map_err(|why| Stopped::new((RefusalReason::ProxyHeaderBroken, why), from))?;
    let source = real.unwrap_or(from);
    let admitted = shared.admit(source.ip());
    let admitted = admitted.map_err(|over| Stopped::new((RefusalReason::LimitReached, over), source))?;
    if let Some(room) = &mut room.handshake {
        room.count_for(admitted);
    }
    Ok(source)
}

async fn in_time<T>(
    shared: &Shared,
    by: Instant,
    what: &str,
    reading: impl Future<Output = io::Result<T>>,
) -> Result<T, Fault> {
    match timeout_at(by, reading).await {
        Ok(read) => read.map_err(|error| (RefusalReason::HandshakeFailed, error.to_string())),
        Err(_) => {
            let within = shared.timeouts.handshake;
            Err((RefusalReason::HandshakeTimeout, format!("{what} was not finished within {within:?}")))
        }
    }
}

/// What a client that is refused before TLS gets to read. Who speaks no TLS gets nothing: nothing of ours ever goes out
/// in plaintext.
fn farewell(reason: RefusalReason) -> &'static [u8] {
    match reason {
        RefusalReason::ProtocolVersion => &ALERT_PROTOCOL_VERSION,
        RefusalReason::UnknownServerName => &ALERT_UNRECOGNIZED_NAME,
        _ => &[],
    }
}

fn asked_for(hello: &Hello) -> String {
    match &hello.server_name {
        Some(name) => format!("asked for `{name}`"),
        None => "asked for no host name".to_owned(),
    }
}
