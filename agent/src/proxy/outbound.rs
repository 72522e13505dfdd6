//! From the workload to a named peer: it is resolved, dialled, and must prove to be who was asked for.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use sidewarden_proto::event::{Direction, RefusalReason};
use sidewarden_proto::identity::PeerName;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{Expect, Floor, TlsError};
use sidewarden_proto::wire::ALPN_STREAMS;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::accounting::{Pair, Refusal, Secured};
use super::connections::Registered;
use super::flow::Flow;
use super::frame::Frame;
use super::header::Header;
use super::insecure::Insecure;
use super::limits::Pacing;
use super::pool::{Pool, Warm};
use super::relay::{End, Side, relay};
use super::secure::{NotConnected, Proof, Secure};
use super::targets::{InUse, Targets};
use super::{Room, Shared, accept_each};
use crate::config::{self, Outbound};
use crate::dial::{ONE_ADDRESS, connect_from, handshake_fault};
use crate::identity::Identity;
use crate::policy::{Decision, Rules};

/// How often connections at rest are looked through.
const SWEEP: Duration = Duration::from_secs(1);
/// Handshakes with one peer at a time; well below what an agent takes from one source (`max_handshakes_per_source`).
const MAX_DIALS: usize = 64;
/// Connections at rest that may turn out to be gone before a new one is made.
const STALE_TRIES: usize = 3;
/// How long a peer that ended a handshake because of our protocol's name is not offered it again.
const REMEMBER_FOREIGN: Duration = Duration::from_secs(600);

struct Route {
    shared: Arc<Shared>,
    config: Outbound,
    name: String,
    rules: Arc<Rules>,
    targets: Arc<Targets>,
    pacing: Pacing,
    /// The TLS configuration of the newest identity: making one for each connection would cost more than it.
    tls: Mutex<Option<Prepared>>,
    /// Until when the peer is taken for a foreign server that cannot stand the name of our protocol.
    foreign_until: Mutex<Option<Instant>>,
    insecure: Option<Arc<Insecure>>,
    /// Connections at rest.
    pool: Pool,
    /// Turns to make new ones.
    dials: Semaphore,
}

/// A TLS configuration, and what it was made for: which identity, and whether streams are offered.
struct Prepared {
    identity: Arc<Identity>,
    offers_streams: bool,
    config: Arc<ClientConfig>,
}

struct Refused {
    reason: RefusalReason,
    detail: String,
    peer: String,
    /// The peer's address, once there is one.
    address: Option<SocketAddr>,
    /// Another address would say the same.
    everywhere: bool,
}

impl Refused {
    fn new(reason: RefusalReason, detail: String) -> Refused {
        Refused { reason, detail, peer: String::new(), address: None, everywhere: false }
    }
}

/// A connection that was made, and by what.
struct Made {
    identity: Arc<Identity>,
    live: Registered,
    how: Secured,
    address: SocketAddr,
}

impl Made {
    fn refuse(&self, reason: RefusalReason, detail: String) -> Refused {
        let (peer, address) = (self.live.peer.name.to_string(), Some(self.address));
        Refused { peer, address, ..Refused::new(reason, detail) }
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

/// How long one try at an address may take, and the turn to make a connection that the tries share.
struct Patience<'t, 'a> {
    by: Instant,
    is_last: bool,
    turn: &'t mut Option<SemaphorePermit<'a>>,
}

impl Patience<'_, '_> {
    fn span(&self) -> Duration {
        let left = self.by.saturating_duration_since(Instant::now());
        if self.is_last { left } else { left.min(ONE_ADDRESS) }
    }
}

/// Whether the other agent refuses us rather than this stream: its word, which is of the closed list.
fn is_about_us(word: &str) -> bool {
    [RefusalReason::NotAllowed, RefusalReason::Revoked, RefusalReason::Expired].map(RefusalReason::word).contains(&word)
}

/// The OPEN of a stream for `workload`, which connected from `source`.
fn open_for(workload: &TcpStream, source: SocketAddr) -> Frame {
    let destination = workload.local_addr().unwrap_or(source);
    // Only TLVs can make a header too long.
    Frame::Open(Header::tcp(source, destination).encode_v2(false).unwrap_or_default())
}

/// Serves one route.
pub async fn serve(shared: Arc<Shared>, listener: TcpListener, config: Outbound) {
    let name = config.name();
    let targets = Arc::new(Targets::new(config.to.clone(), config.balance, shared.random));
    let pacing = Pacing::new(config.rates.all, config.rates.each);
    let rules = match &config.peer {
        config::Peer::Workload(id) => Rules::OutboundTo(id.clone()),
        config::Peer::Dns(host) => Rules::OutboundToDns(host.clone()),
    };
    let (tls, pool, rules) = (Mutex::new(None), Pool::default(), Arc::new(rules));
    let dials = Semaphore::new(MAX_DIALS);
    let insecure = shared.insecure_at(Direction::Outbound, &config.place(), config.insecure_trust_all.as_ref());
    let (shared_by_route, foreign_until) = (shared.clone(), Mutex::new(None));
    let this = Arc::new(Route {
        shared: shared_by_route,
        config,
        name: name.clone(),
        rules,
        targets,
        pacing,
        tls,
        foreign_until,
        insecure,
        pool,
        dials,
    });
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

/// Lets go of connections at rest that are of no more use, also when nobody asks for one, and looks up names in time, so
/// that nobody who asks has to wait for it.
async fn sweep(route: Arc<Route>) {
    loop {
        sleep(SWEEP).await;
        let identity = route.shared.identity.borrow().clone();
        route.pool.sweep(identity.as_ref());
        let within = route.shared.timeouts.connect;
        if timeout(within, route.targets.refresh(&route.shared.resolver)).await.is_err() {
            tracing::debug!(route = route.name, ?within, "looking up the addresses of a route took too long");
        }
    }
}

impl Route {
    fn book(&self, refused: Refused) {
        let Refused { reason, detail, peer, address: source, .. } = refused;
        let (direction, listener) = (Direction::Outbound, self.name.clone());
        self.shared.ledger.refused(Refusal { direction, reason, detail, listener, source, peer });
    }

    async fn serve_one(&self, workload: TcpStream, source: SocketAddr, room: Room) -> Result<(), Refused> {
        // In a box of its own: what a handshake needs is not held as long as the connection lives.
        let (reached, in_use) = match Box::pin(self.reach(&workload, source)).await {
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
                self.carry_stream(warm, workload).await;
                drop(in_use);
                Ok(())
            }
            Reached::Whole(made, secure) => Box::pin(self.carry_whole(&made, *secure, workload, in_use)).await,
        }
    }

    async fn carry_stream(&self, warm: Box<Warm>, workload: TcpStream) {
        let Warm { channel, how, identity, live, address } = *warm;
        let made = Made { identity, live, how, address };
        let mut flow = Flow::stream(channel, workload);
        let pair = self.pair(&made);
        self.shared.ledger.opened(&pair, made.how.clone());
        let own = made.identity.credential.peer();
        let outcome = relay(&mut flow, self.shared.bounds(&made.live, own, self.pacing.begin()), || {}).await;
        self.shared.settle(&made.live, own, &pair, &outcome);
        let free = matches!(outcome.end, End::Whole) && !self.shared.stop.is_cancelled();
        if let Some(channel) = free.then(|| flow.into_channel()).flatten() {
            let Made { identity, live, how, address } = made;
            self.pool.put(Warm { channel, how, identity, live, address });
        }
    }

    /// A connection that is one stream. Nobody says that it is established but the server's first byte.
    async fn carry_whole(
        &self,
        made: &Made,
        secure: Secure,
        workload: TcpStream,
        in_use: InUse,
    ) -> Result<(), Refused> {
        let mut mover = secure.into_mover(workload);
        let pair = self.pair(made);
        let own = made.identity.credential.peer();
        let told = AtomicBool::new(false);
        let tell = || {
            told.store(true, Relaxed);
            self.shared.ledger.opened(&pair, made.how.clone());
        };
        let outcome = relay(&mut *mover, self.shared.bounds(&made.live, own, self.pacing.begin()), tell).await;
        if let (false, End::PeerCut(error)) = (told.load(Relaxed), &outcome.end) {
            let (reason, detail) = refused_by_peer(error);
            in_use.failed();
            return Err(made.refuse(reason, detail));
        }
        if !told.load(Relaxed) {
            self.shared.ledger.opened(&pair, made.how.clone());
        }
        self.shared.settle(&made.live, own, &pair, &outcome);
        Ok(())
    }

    fn pair(&self, made: &Made) -> Pair {
        let peer = booked(&made.live.rules, &made.live.peer.name);
        Pair { direction: Direction::Outbound, peer, listener: self.name.clone() }
    }

    /// A connection to the peer for one stream, at one address after another until one takes it.
    async fn reach(&self, workload: &TcpStream, source: SocketAddr) -> Result<(Reached, InUse), Refused> {
        let identity = self.shared.usable_identity().map_err(|(reason, detail)| Refused::new(reason, detail))?;
        let (open, within) = (open_for(workload, source), self.shared.timeouts.connect);
        let (by, mut turn) = (Instant::now() + within, None);
        let unreachable = |error: String| Refused::new(RefusalReason::Unreachable, error);
        let late = || unreachable(format!("{} was not looked up within {within:?}", self.name));
        let round = timeout_at(by, self.targets.round(&self.shared.resolver)).await.map_err(|_| late())?;
        let mut round = round.map_err(|error| unreachable(error.to_string()))?;
        let (mut last, mut tries) = (unreachable("it has no address".into()), 0);
        while let Some(tried) = round.next_try() {
            let (address, is_last) = (tried.address, round.is_last());
            match self.reach_at(address, &identity, &open, Patience { by, is_last, turn: &mut turn }).await {
                Ok(reached) => return Ok((reached, tried.answered())),
                Err(refused) if refused.everywhere => return Err(refused),
                Err(refused) => last = refused,
            }
            tried.failed();
            tries += 1;
            if Instant::now() >= by {
                break;
            }
        }
        self.targets.look_again();
        if tries > 1 {
            last.detail = format!("{} (the last of {tries} addresses)", last.detail);
        }
        Err(last)
    }

    /// A connection at rest if there is one to this address, otherwise a new one.
    async fn reach_at<'a>(
        &'a self,
        address: SocketAddr,
        identity: &Arc<Identity>,
        open: &Frame,
        patience: Patience<'_, 'a>,
    ) -> Result<Reached, Refused> {
        if let Some(warm) = self.reuse(address, identity, open).await? {
            return Ok(Reached::Stream(warm));
        }
        if patience.turn.is_none() {
            *patience.turn = Some(self.turn(patience.by).await?);
            // While we waited for our turn, a stream may have ended and left its connection.
            if let Some(warm) = self.reuse(address, identity, open).await? {
                return Ok(Reached::Stream(warm));
            }
        }
        let secure = self.connect(address, identity, patience.span()).await?;
        *patience.turn = None;
        let (peer, rules, cut) = (secure.peer.clone(), secure.rules(&self.rules), &self.shared.cut);
        let shown = secure.chain_for(identity);
        let live = self.shared.registry.register(Direction::Outbound, peer, shown, rules, cut);
        let (identity, how) = (identity.clone(), secure.how.clone());
        self.judge(&live, &identity, address)?;
        match secure.into_streams() {
            Err(secure) => Ok(Reached::Whole(Made { identity, live, how, address }, secure)),
            Ok((channel, _)) => match self.open(Warm { channel, how, identity, live, address }, open).await {
                Ok(warm) => Ok(Reached::Stream(Box::new(warm))),
                Err(Failed::Refused(refused)) => Err(refused),
                Err(Failed::Gone(error)) => {
                    let (reason, detail) = refused_by_peer(&error);
                    Err(Refused { address: Some(address), ..Refused::new(reason, detail) })
                }
            },
        }
    }

    /// Begins a stream on a connection at rest at this address, if there is one.
    async fn reuse(
        &self,
        address: SocketAddr,
        identity: &Arc<Identity>,
        open: &Frame,
    ) -> Result<Option<Box<Warm>>, Refused> {
        for _ in 0..STALE_TRIES {
            let Some(warm) = self.pool.take(identity, address) else { break };
            self.judge(&warm.live, identity, address)?;
            match self.open(warm, open).await {
                Err(Failed::Gone(error)) => tracing::debug!(%error, "a connection at rest had ended"),
                Err(Failed::Refused(refused)) => return Err(refused),
                Ok(warm) => return Ok(Some(Box::new(warm))),
            }
        }
        Ok(None)
    }

    /// Our turn to shake hands with the peer: a workload that opens a thousand connections at once must not be taken for
    /// an attack there, so the others wait. No address is to blame for the wait.
    async fn turn(&self, by: Instant) -> Result<SemaphorePermit<'_>, Refused> {
        let turn = timeout_at(by, self.dials.acquire()).await.ok().and_then(Result::ok);
        turn.ok_or_else(|| {
            let late = format!("{MAX_DIALS} handshakes with it were under way for {:?}", self.shared.timeouts.connect);
            Refused { everywhere: true, ..Refused::new(RefusalReason::LimitReached, late) }
        })
    }

    /// Asks policy with the newest directive. The connection is registered by now: a change in between is seen here or
    /// by the review.
    fn judge(&self, live: &Registered, identity: &Arc<Identity>, address: SocketAddr) -> Result<(), Refused> {
        match self.shared.decide(live, identity) {
            Decision::Allow => Ok(()),
            Decision::Refuse(reason, detail) => {
                let (peer, address) = (live.peer.name.to_string(), Some(address));
                Err(Refused { peer, address, ..Refused::new(reason, detail) })
            }
        }
    }

    /// Begins a stream. Nothing but OPEN goes out before the answer, so a connection that turns out to be gone can be
    /// replaced without anything being sent twice.
    async fn open(&self, mut warm: Warm, open: &Frame) -> Result<Warm, Failed> {
        warm.channel.send(open).map_err(Failed::Gone)?;
        let within = self.shared.timeouts.connect + self.shared.timeouts.connect / 2;
        let answer = timeout(within, warm.channel.receive()).await;
        let refuse = |warm: &Warm, detail| Refused {
            peer: warm.live.peer.name.to_string(),
            address: Some(warm.address),
            ..Refused::new(RefusalReason::RefusedByPeer, detail)
        };
        match answer {
            Ok(Ok(Some(Frame::Accept))) => Ok(warm),
            Ok(Ok(Some(Frame::Refuse(word)))) => {
                let refused = refuse(&warm, format!("its agent says: {}", word.replace('_', " ")));
                self.pool.put(warm);
                Err(Failed::Refused(Refused { everywhere: is_about_us(&word), ..refused }))
            }
            Ok(Ok(Some(_))) => Err(Failed::Refused(refuse(&warm, "its agent broke the rules between agents".into()))),
            Ok(Ok(None)) => Err(Failed::Gone(io::ErrorKind::UnexpectedEof.into())),
            Ok(Err(error)) => Err(Failed::Gone(error)),
            Err(_) => Err(Failed::Refused(refuse(&warm, format!("its agent did not answer within {within:?}")))),
        }
    }

    async fn connect(&self, address: SocketAddr, identity: &Arc<Identity>, span: Duration) -> Result<Secure, Refused> {
        let at = |(reason, detail)| Refused { address: Some(address), ..Refused::new(reason, detail) };
        let offers_streams = self.offers_streams();
        match self.try_connect(address, identity, span, offers_streams).await {
            Err(error) if error.wants_other_alpn && offers_streams => {
                tracing::info!(route = self.name, %address, "the peer is no agent: it is asked without our protocol");
                *self.foreign_until.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some(Instant::now() + REMEMBER_FOREIGN);
                self.try_connect(address, identity, span, false).await
            }
            result => result,
        }
        .map_err(|error| at(error.fault))
    }

    /// Whether the peer is asked for streams: an agent on TLS 1.3. A foreign server may be older, and most of them ignore
    /// the name of a protocol they do not know; one that does not was remembered. Whoever forges its alert gains nothing
    /// but a handshake for each stream.
    fn offers_streams(&self) -> bool {
        let foreign_until = *self.foreign_until.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(self.config.peer, config::Peer::Workload(_)) && foreign_until.is_none_or(|end| Instant::now() >= end)
    }

    async fn try_connect(
        &self,
        address: SocketAddr,
        identity: &Arc<Identity>,
        span: Duration,
        offers_streams: bool,
    ) -> Result<Secure, NotConnected> {
        if self.shared.own.is_at(address) {
            return Err((RefusalReason::Loop, format!("{address} is a listener of this agent")).into());
        }
        let unreachable = |why: String| (RefusalReason::Unreachable, format!("dialling {address}: {why}"));
        let dialled = timeout(span, connect_from(None, address)).await;
        let dialled = dialled.map_err(|_| unreachable(format!("no answer within {span:?}")))?;
        let tcp = dialled.map_err(|error| unreachable(error.to_string()))?;
        let insecure = self.insecure.as_ref().and_then(|insecure| insecure.until(Timestamp::now()));
        let config = match insecure {
            Some(_) => identity.insecure_client(),
            None => self.tls_config(identity, offers_streams),
        };
        let config = config.map_err(|error| (RefusalReason::NoIdentity, error.to_string()))?;
        self.shake_hands(tcp, config, Proof { trust: &identity.trust, insecure }).await
    }

    async fn shake_hands(
        &self,
        tcp: TcpStream,
        config: Arc<ClientConfig>,
        proof: Proof<'_>,
    ) -> Result<Secure, NotConnected> {
        let within = self.shared.timeouts.handshake;
        let late = || (RefusalReason::HandshakeTimeout, format!("the handshake was not finished within {within:?}"));
        let host = self.config.server_name.as_deref();
        let shaking = async {
            match &self.config.peer {
                config::Peer::Workload(_) if proof.insecure.is_none() => {
                    Secure::connect(tcp, config, proof, host).await
                }
                _ => {
                    let name = self.asked_name(&tcp).map_err(|text| (RefusalReason::WrongPeer, text))?;
                    Ok(Secure::connect_foreign(tcp, config, proof, name).await?)
                }
            }
        };
        timeout(within, shaking).await.unwrap_or_else(|_| Err(late().into()))
    }

    /// The name that a foreign server is asked for, which may need it to choose a certificate.
    fn asked_name(&self, tcp: &TcpStream) -> Result<ServerName<'static>, String> {
        let name = match &self.config.peer {
            config::Peer::Dns(host) => Some(host),
            config::Peer::Workload(_) => self.config.server_name.as_ref(),
        };
        match name {
            Some(name) => ServerName::try_from(name.clone()).map_err(|_| format!("`{name}` is no DNS name")),
            None => tcp.peer_addr().map(|address| ServerName::from(address.ip())).map_err(|error| error.to_string()),
        }
    }

    fn tls_config(&self, identity: &Arc<Identity>, offers_streams: bool) -> Result<Arc<ClientConfig>, TlsError> {
        let mut prepared = self.tls.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Prepared { identity: of, offers_streams: offered, config }) = prepared.as_ref()
            && Arc::ptr_eq(of, identity)
            && *offered == offers_streams
        {
            return Ok(config.clone());
        }
        // Agents speak TLS 1.3 among themselves; a foreign server may be older.
        let (expect, floor) = match &self.config.peer {
            config::Peer::Workload(id) => (Expect::Workload(id.clone()), Floor::Tls13),
            config::Peer::Dns(host) => (Expect::Dns(host.clone()), Floor::Tls12),
        };
        let streams: &[&[u8]] = &[ALPN_STREAMS];
        let config = identity.client(expect, floor, if offers_streams { streams } else { &[] })?;
        *prepared = Some(Prepared { identity: identity.clone(), offers_streams, config: config.clone() });
        Ok(config)
    }
}

/// What a peer is called in the books. A foreign server goes by the name that it was asked for, as in the policy: its
/// certificate may have a wildcard, or the names of others as well.
fn booked(rules: &Rules, name: &PeerName) -> String {
    match rules {
        Rules::OutboundToDns(host) => PeerName::Dns(vec![host.clone()]).to_string(),
        _ => name.to_string(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_server_is_booked_by_the_name_that_it_was_asked_for_once_it_has_proven_it() {
        let dns = |name: &str| PeerName::Dns(vec![name.to_owned(), "other.example".to_owned()]);
        let (id, asked) = ("spiffe://td/shop/db".parse().unwrap(), Rules::OutboundToDns("db.example.com".into()));
        let anybody = Rules::Anybody(Box::new(asked.clone()));
        for (rules, name, expected) in [
            (&asked, dns("*.example.com"), "dns:db.example.com"),
            (&anybody, dns("unverified:05"), "dns:unverified:05,other.example"),
            (&Rules::OutboundTo(id), PeerName::Spiffe("spiffe://td/shop/db".parse().unwrap()), "spiffe://td/shop/db"),
        ] {
            assert_eq!(booked(rules, &name), expected);
        }
    }
}
