//! Where agents come in: QUIC and TLS over TCP on one port number, and enrolment beside them.
//!
//! Who somebody is comes from the certificate alone; which instance it is must be the one its key was issued to.
//! Nothing is acknowledged here that `commit` has not put on disk. A hostile peer costs a handshake at most: deadlines
//! on every step, caps on handshakes and connections, one aggregated event for what was refused.

mod collectors;
mod enrol;
mod quic;
mod refusals;
mod session;
mod tcp;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use sidewarden_proto::event::RefusalReason;
use sidewarden_proto::time::Timestamp;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use refusals::{Refusals, Stage};

use crate::ca::Issuer;
use crate::commit::Committer;
use crate::fleet::{Directives, Fleet};
use crate::identity::Identities;

/// Why a collector that follows another lets nobody in.
const NO_DIRECTIVE: &str =
    "this collector has no directive of the one it follows that still holds: see `ca.leader` and its log";

/// What every connection needs.
#[derive(Debug)]
pub struct Shared {
    /// The way to disk.
    pub commits: Committer,
    /// Live sessions.
    pub fleet: Arc<Fleet>,
    /// The directive in force.
    pub directives: Arc<Directives>,
    /// Certificates.
    pub issuer: Arc<Issuer>,
    /// Who we are, and whose word counts for others.
    pub identities: Arc<Identities>,
    /// What was refused.
    pub refusals: Refusals,
    /// Most connections at a time.
    pub connections: Arc<Semaphore>,
    /// Most handshakes at a time.
    pub handshakes: Arc<Semaphore>,
    /// How many that are.
    pub max_handshakes: usize,
    /// How long a handshake, a first frame or an enrolment may take.
    pub handshake_timeout: Duration,
    /// Most links a second of one agent.
    pub links_per_second: u32,
    /// Ends everything.
    pub shutdown: CancellationToken,
    /// Every connection's task.
    pub tasks: TaskTracker,
    /// The clock.
    pub clock: fn() -> Timestamp,
}

/// What keeps agents from coming in.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// The address cannot be listened at.
    #[error("agents.listen {address} ({protocol}): {error}{hint}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// `tcp` or `udp`.
        protocol: &'static str,
        /// What the system said.
        error: std::io::Error,
        /// What to change, with a colon in front.
        hint: &'static str,
    },
    /// Our own certificate cannot be used.
    #[error(transparent)]
    Tls(#[from] sidewarden_proto::tls::TlsError),
    /// QUIC cannot be set up.
    #[error("quic: {0}")]
    Quic(String),
}

/// What to change when an address cannot be listened at.
pub fn bind_hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => ": another program has it; stop that one, or set another port",
        std::io::ErrorKind::PermissionDenied => ": ports below 1024 need CAP_NET_BIND_SERVICE; set another port",
        std::io::ErrorKind::AddrNotAvailable => ": this machine has no such address",
        _ => "",
    }
}

/// Listens, and takes agents in until the shutdown; the bound address.
pub async fn start(listen: SocketAddr, shared: Arc<Shared>) -> Result<SocketAddr, IngestError> {
    let (listener, socket) = bind(listen).await?;
    let address = listener.local_addr().map_err(|e| bind_error(listen, "tcp", e))?;
    let endpoint = quic::endpoint(socket, &shared)?;
    let configs = tcp::Configs::new(&shared.identities.front().borrow())?;
    shared.tasks.spawn(quic::serve(endpoint, shared.clone()));
    shared.tasks.spawn(tcp::serve(listener, configs, shared.clone()));
    Ok(address)
}

/// TCP and UDP on one number. With port 0 the number that TCP got may be taken for UDP: then another one is tried.
async fn bind(listen: SocketAddr) -> Result<(tokio::net::TcpListener, std::net::UdpSocket), IngestError> {
    let mut attempts = if listen.port() == 0 { 16 } else { 1 };
    loop {
        attempts -= 1;
        let listener = tokio::net::TcpListener::bind(listen).await.map_err(|e| bind_error(listen, "tcp", e))?;
        let address = listener.local_addr().map_err(|e| bind_error(listen, "tcp", e))?;
        match std::net::UdpSocket::bind(address) {
            Ok(socket) => return Ok((listener, socket)),
            Err(_) if attempts > 0 => continue,
            Err(error) => return Err(bind_error(address, "udp", error)),
        }
    }
}

fn bind_error(address: SocketAddr, protocol: &'static str, error: std::io::Error) -> IngestError {
    let hint = bind_hint(&error);
    IngestError::Bind { address, protocol, error, hint }
}

/// The word and details of a failed handshake.
fn handshake_refusal(error: &std::io::Error) -> (&'static str, String) {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidMessage(_)) => (RefusalReason::Plaintext.word(), "the bytes were not TLS".into()),
        Some(error) => (sidewarden_proto::tls::refusal_of(error).word(), error.to_string()),
        None => (RefusalReason::HandshakeFailed.word(), error.to_string()),
    }
}
