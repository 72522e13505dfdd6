//! From the workload to a named peer: it is resolved, dialled, and must prove to be who was asked for.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use sidewarden_proto::event::{Direction, RefusalReason};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{Expect, Floor, TlsError};
use sidewarden_proto::wire::ALPN_STREAMS;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

use super::accounting::{Pair, Refusal, Secured};
use super::connections::Registered;
use super::flow::Flow;
use super::frame::Frame;
use super::header::Header;
use super::pool::{Pool, Warm};
use super::relay::{End, Side, relay};
use super::secure::{Fault, Secure};
use super::{Room, Shared, accept_each};
use crate::config::{self, Outbound};
use crate::dial::handshake_fault;
use crate::identity::Identity;
use crate::policy::{Decision, Rules, decide};

/// How often connections at rest are looked through.
const SWEEP: Duration = Duration::from_secs(1);
/// Connections at rest that may turn out to be gone before a new one is made.
const STALE_TRIES: usize = 3;

struct Route {
    shared: Arc<Shared>,
    config: Outbound,
    name: String,
    rules: Arc<Rules>,
    /// The TLS configuration of the newest identity: making one for each connection would cost more than it.
    tls: Mutex<Option<(Arc<Identity>, Arc<ClientConfig>)>>,
    /// Connections at rest.
    pool: Pool,
}

struct Refused {
    reason: RefusalReason,
    detail: String,
    peer: String,
    /// The peer's address, once there is one.
    address: Option<SocketAddr>,
}

impl Refused {
    fn new(reason: RefusalReason, detail: String) -> Refused {
        Refused { reason, detail, peer: String::new(), address: None }
    }
}

/// A connection that was made, and by what.
struct Made {
    identity: Arc<Identity>,
    live: Registered,
    how: Secured,
}

impl Made {
    fn refuse(&self, reason: RefusalReason, detail: String) -> Refused {
        Refused { reason, detail, peer: self.live.peer.name.to_string(), address: self.how.address.parse().ok() }
    }
}

/// The peer's side, for one stream.
enum Reached {
    /// The peer's agent has accepted it.
    Stream(Box<Warm>),
    /// The peer is no agent of ours: the connection is the stream.
    Whole(Made, Box<Secure>),
}

/// Why a stream did not begin.
enum Failed {
    /// The connection was gone: another may do.
    Gone(io::Error),
    /// It would be the same on another one.
    Refused(Refused),
}

/// The OPEN of a stream for `workload`, which connected from `source`.
fn open_for(workload: &TcpStream, source: SocketAddr) -> Frame {
    let destination = workload.local_addr().unwrap_or(source);
    // Only TLVs can make a header too long.
    Frame::Open(Header::tcp(source, destination).encode_v2(false).unwrap_or_default())
}

/// Serves one route.
pub async fn serve(shared: Arc<Shared>, listener: TcpListener, config: Outbound) {
    let name = config.to.to_string();
    let rules = match &config.peer {
        config::Peer::Workload(id) => Rules::OutboundTo(id.clone()),
        config::Peer::Dns(host) => Rules::OutboundToDns(host.clone()),
    };
    let (tls, pool, rules) = (Mutex::new(None), Pool::default(), Arc::new(rules));
    let this = Arc::new(Route { shared: shared.clone(), config, name: name.clone(), rules, tls, pool });
    let sweeping = tokio::spawn(sweep(this.clone()));
    accept_each(shared, listener, Direction::Outbound, name, |tcp, source, room| {
        let this = this.clone();
        async move {
            if let Err(refused) = this.serve_one(tcp, source, room).await {
                this.book(refused);
            }
        }
    })
    .await;
    sweeping.abort();
}

/// Lets go of connections at rest that are of no more use, also when nobody asks for one.
async fn sweep(route: Arc<Route>) {
    loop {
        sleep(SWEEP).await;
        let identity = route.shared.identity.borrow().clone();
        route.pool.sweep(identity.as_ref());
    }
}

impl Route {
    fn book(&self, refused: Refused) {
        let Refused { reason, detail, peer, address: source } = refused;
        let (direction, listener) = (Direction::Outbound, self.name.clone());
        self.shared.ledger.refused(Refusal { direction, reason, detail, listener, source, peer });
    }

    async fn serve_one(&self, workload: TcpStream, source: SocketAddr, room: Room) -> Result<(), Refused> {
        // In a box of its own: what a handshake needs is not held as long as the connection lives.
        let reached = match Box::pin(self.reach(&workload, source)).await {
            Ok(reached) => reached,
            Err(refused) => {
                // What the workload may not see is an end that looks whole.
                workload.reset_on_drop();
                return Err(refused);
            }
        };
        let Room { _connection, handshake } = room;
        drop(handshake);
        match reached {
            Reached::Stream(warm) => {
                self.carry_stream(*warm, workload).await;
                Ok(())
            }
            Reached::Whole(made, secure) => self.carry_whole(&made, *secure, workload).await,
        }
    }

    async fn carry_stream(&self, warm: Warm, workload: TcpStream) {
        let Warm { channel, how, identity, live } = warm;
        let made = Made { identity, live, how };
        let mut flow = Flow::stream(channel, workload);
        let pair = self.pair(&made);
        self.shared.ledger.opened(&pair, made.how.clone());
        let own = made.identity.credential.peer();
        let outcome = relay(&mut flow, self.shared.bounds(&made.live, own), || {}).await;
        self.shared.settle(&made.live, own, &pair, &outcome);
        let free = matches!(outcome.end, End::Whole) && !self.shared.stop.is_cancelled();
        if let Some(channel) = free.then(|| flow.into_channel()).flatten() {
            let Made { identity, live, how } = made;
            self.pool.put(Warm { channel, how, identity, live });
        }
    }

    /// A connection that is one stream. Nobody says that it is established but the server's first byte.
    async fn carry_whole(&self, made: &Made, secure: Secure, workload: TcpStream) -> Result<(), Refused> {
        let mut mover = secure.into_mover(workload);
        let pair = self.pair(made);
        let own = made.identity.credential.peer();
        let told = AtomicBool::new(false);
        let tell = || {
            told.store(true, Relaxed);
            self.shared.ledger.opened(&pair, made.how.clone());
        };
        let outcome = relay(&mut *mover, self.shared.bounds(&made.live, own), tell).await;
        if let (false, End::PeerCut(error)) = (told.load(Relaxed), &outcome.end) {
            let (reason, detail) = refused_by_peer(error);
            return Err(made.refuse(reason, detail));
        }
        if !told.load(Relaxed) {
            self.shared.ledger.opened(&pair, made.how.clone());
        }
        self.shared.settle(&made.live, own, &pair, &outcome);
        Ok(())
    }

    fn pair(&self, made: &Made) -> Pair {
        let peer = made.live.peer.name.to_string();
        Pair { direction: Direction::Outbound, peer, listener: self.name.clone() }
    }

    /// A connection to the peer for one stream: one at rest if there is one, otherwise a new one.
    async fn reach(&self, workload: &TcpStream, source: SocketAddr) -> Result<Reached, Refused> {
        let identity = self.shared.usable_identity().map_err(|(reason, detail)| Refused::new(reason, detail))?;
        let open = open_for(workload, source);
        for _ in 0..STALE_TRIES {
            let Some(warm) = self.pool.take(&identity) else { break };
            self.judge(&warm.live, &identity, &warm.how)?;
            match self.open(warm, &open).await {
                Err(Failed::Gone(error)) => tracing::debug!(%error, "a connection at rest had ended"),
                Err(Failed::Refused(refused)) => return Err(refused),
                Ok(warm) => return Ok(Reached::Stream(Box::new(warm))),
            }
        }
        let secure = self.connect(&identity).await?;
        let (peer, rules, cut) = (secure.peer.clone(), self.rules.clone(), &self.shared.cut);
        let live = self.shared.registry.register(Direction::Outbound, peer, rules, cut);
        let how = secure.how.clone();
        self.judge(&live, &identity, &how)?;
        match secure.into_streams() {
            Err(secure) => Ok(Reached::Whole(Made { identity, live, how }, secure)),
            Ok((channel, _)) => {
                let warm = Warm { channel, how, identity, live };
                let refuse = |error: io::Error, how: &Secured| {
                    let (reason, detail) = refused_by_peer(&error);
                    Refused { address: how.address.parse().ok(), ..Refused::new(reason, detail) }
                };
                let how = warm.how.clone();
                match self.open(warm, &open).await {
                    Ok(warm) => Ok(Reached::Stream(Box::new(warm))),
                    Err(Failed::Gone(error)) => Err(refuse(error, &how)),
                    Err(Failed::Refused(refused)) => Err(refused),
                }
            }
        }
    }

    /// Asks policy with the newest directive. The connection is registered by now: a change in between is seen here or
    /// by the review.
    fn judge(&self, live: &Registered, identity: &Arc<Identity>, how: &Secured) -> Result<(), Refused> {
        let newest = self.shared.identity.borrow().clone().unwrap_or_else(|| identity.clone());
        match decide(&self.rules, &live.peer, newest.directive.as_deref(), Timestamp::now()) {
            Decision::Allow => Ok(()),
            Decision::Refuse(reason, detail) => {
                let (peer, address) = (live.peer.name.to_string(), how.address.parse().ok());
                Err(Refused { reason, detail, peer, address })
            }
        }
    }

    /// Begins a stream. Nothing but OPEN goes out before the answer, so a connection that turns out to be gone can be
    /// replaced without anything being sent twice.
    async fn open(&self, mut warm: Warm, open: &Frame) -> Result<Warm, Failed> {
        warm.channel.send(open).map_err(Failed::Gone)?;
        let within = self.shared.timeouts.connect + self.shared.timeouts.connect / 2;
        let answer = timeout(within, warm.channel.receive()).await;
        let address = warm.how.address.parse().ok();
        let refuse = |peer: &Warm, detail| Refused {
            reason: RefusalReason::RefusedByPeer,
            detail,
            peer: peer.live.peer.name.to_string(),
            address,
        };
        match answer {
            Ok(Ok(Some(Frame::Accept))) => Ok(warm),
            Ok(Ok(Some(Frame::Refuse(word)))) => {
                let refused = refuse(&warm, format!("its agent says: {}", word.replace('_', " ")));
                self.pool.put(warm);
                Err(Failed::Refused(refused))
            }
            Ok(Ok(Some(_))) => Err(Failed::Refused(refuse(&warm, "its agent broke the rules between agents".into()))),
            Ok(Ok(None)) => Err(Failed::Gone(io::ErrorKind::UnexpectedEof.into())),
            Ok(Err(error)) => Err(Failed::Gone(error)),
            Err(_) => Err(Failed::Refused(refuse(&warm, format!("its agent did not answer within {within:?}")))),
        }
    }

    async fn connect(&self, identity: &Arc<Identity>) -> Result<Secure, Refused> {
        let unreachable = |error: String| Refused::new(RefusalReason::Unreachable, error);
        let tcp = self.shared.resolver.connect(&self.config.to, self.shared.timeouts.connect).await;
        let tcp = tcp.map_err(|error| unreachable(error.to_string()))?;
        let address = tcp.peer_addr().map_err(|error| unreachable(error.to_string()))?;
        let config = self.tls_config(identity).map_err(|error| (RefusalReason::NoIdentity, error.to_string()));
        let secure = match config {
            Ok(config) => self.shake_hands(tcp, config).await,
            Err(fault) => Err(fault),
        };
        let at = |(reason, detail)| Refused { address: Some(address), ..Refused::new(reason, detail) };
        secure.map_err(at)
    }

    async fn shake_hands(&self, tcp: TcpStream, config: Arc<ClientConfig>) -> Result<Secure, Fault> {
        let within = self.shared.timeouts.handshake;
        let late = || (RefusalReason::HandshakeTimeout, format!("the handshake was not finished within {within:?}"));
        let shaking = async {
            match &self.config.peer {
                config::Peer::Workload(_) => Secure::connect(tcp, config).await,
                config::Peer::Dns(host) => {
                    let bad = |_| (RefusalReason::WrongPeer, format!("`{host}` is no DNS name"));
                    Secure::connect_foreign(tcp, config, ServerName::try_from(host.clone()).map_err(bad)?).await
                }
            }
        };
        timeout(within, shaking).await.unwrap_or_else(|_| Err(late()))
    }

    fn tls_config(&self, identity: &Arc<Identity>) -> Result<Arc<ClientConfig>, TlsError> {
        let mut cached = self.tls.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, config)) = cached.as_ref()
            && Arc::ptr_eq(of, identity)
        {
            return Ok(config.clone());
        }
        // Agents speak TLS 1.3 among themselves; a foreign server may be older.
        let (expect, floor) = match &self.config.peer {
            config::Peer::Workload(id) => (Expect::Workload(id.clone()), Floor::Tls13),
            config::Peer::Dns(host) => (Expect::Dns(host.clone()), Floor::Tls12),
        };
        let streams: &[&[u8]] = &[ALPN_STREAMS];
        let alpn = if floor == Floor::Tls13 { streams } else { &[] };
        let config = identity.client(expect, floor, alpn)?;
        *cached = Some((identity.clone(), config.clone()));
        Ok(config)
    }
}

/// With TLS 1.3 our handshake is over before the peer has judged our certificate: its no comes as the first thing.
fn refused_by_peer(error: &io::Error) -> (RefusalReason, String) {
    match handshake_fault(error) {
        (RefusalReason::HandshakeFailed, detail) => {
            (RefusalReason::RefusedByPeer, format!("it closed before a first byte: {detail}"))
        }
        told => told,
    }
}
