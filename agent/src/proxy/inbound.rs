//! From a peer to the workload: nobody gets through without a certificate that policy allows.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use sidewarden_proto::event::{Direction, RefusalReason};
use sidewarden_proto::policy::connections::At;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::wire::ALPN_STREAMS;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use super::accounting::{Pair, Plaintext, Refusal, Secured};
use super::channel::Channel;
use super::connections::Registered;
use super::entrance::{Entrance, Passed, Speaks, Stopped};
use super::flow::Flow;
use super::frame::Frame;
use super::handshake::{Hello, Replayed};
use super::header::{self, Header, Parsed};
use super::insecure::Insecure;
use super::limits::Pacing;
use super::permissive::Leniency;
use super::pool::MAX_WAIT;
use super::pump::Early;
use super::relay::{End, Mover, copying, relay};
use super::secure::{Fault, Proof, Secure};
use super::service::{self, Guest, Proven};
use super::unproven::What;
use super::{Room, Shared, accept_counted, over_limit, serve_in};
use crate::config::{Inbound, ProxyProtocol};
use crate::identity::Identity;
use crate::policy::{Decision, Rules};

/// TLS access_denied: the certificate is good, its holder is not wanted here.
const ACCESS_DENIED: u8 = 49;
/// TLS internal_error: nobody to hand the connection to.
const INTERNAL_ERROR: u8 = 80;

/// One listener, and the services behind it.
pub struct Listener {
    shared: Arc<Shared>,
    name: String,
    entrance: Entrance<Way>,
}

/// The way to one service.
struct Way {
    config: Inbound,
    /// The listener, and the host name that was asked for, where there are several.
    name: String,
    at: At,
    rules: Arc<Rules>,
    pacing: Pacing,
    insecure: Option<Arc<Insecure>>,
}

impl Way {
    fn new(shared: &Shared, address: SocketAddr, config: Inbound) -> Way {
        let at = At { port: address.port(), server_name: config.server_name.clone() };
        let (allow, allow_dns) = (config.allow.clone(), config.allow_dns.clone());
        let (rules, listener) = (Rules::Inbound { allow, allow_dns, at: at.clone() }, address.to_string());
        let name = match &config.server_name {
            Some(host) => format!("{listener} ({host})"),
            None => listener,
        };
        let pacing = Pacing::new(config.rates.all, config.rates.each);
        let insecure = shared.insecure_at(Direction::Inbound, &config.place(), config.insecure_trust_all.as_ref());
        Way { config, name, at, rules: Arc::new(rules), pacing, insecure }
    }
}

/// Why a connection does not get through, and who it said it was.
struct Refused {
    reason: RefusalReason,
    detail: String,
    peer: String,
}

impl Refused {
    fn new((reason, detail): (RefusalReason, String)) -> Refused {
        Refused { reason, detail, peer: String::new() }
    }
}

/// A connection that has begun a handshake.
struct Opened {
    tcp: TcpStream,
    source: SocketAddr,
    bytes: Vec<u8>,
    hello: Hello,
    by: Instant,
    room: Room,
}

/// A peer whose handshake is done.
struct Entered<'a> {
    way: &'a Way,
    identity: Arc<Identity>,
    live: Registered,
    how: Secured,
    source: SocketAddr,
    destination: SocketAddr,
    server_name: Option<String>,
    _connection: OwnedSemaphorePermit,
}

impl Entered<'_> {
    fn refuse(&self, reason: RefusalReason, detail: String) -> Refused {
        Refused { reason, detail, peer: self.live.peer.name.to_string() }
    }

    /// What the workload may be told of a connection from `source`.
    fn guest(&self, source: SocketAddr) -> Guest {
        let proven = || Proven {
            peer: self.live.peer.name.to_string(),
            tls_version: self.how.tls_version.clone(),
            server_name: self.server_name.clone(),
        };
        let is_told = self.way.config.proxy_protocol == ProxyProtocol::V2;
        Guest { source, destination: self.destination, proven: is_told.then(proven) }
    }
}

/// The alert that tells a peer whose connection is one stream why there is none.
fn alert_for(reason: RefusalReason) -> u8 {
    if reason == RefusalReason::WorkloadUnreachable { INTERNAL_ERROR } else { ACCESS_DENIED }
}

/// What an OPEN holds, nothing at an end, or what the other agent did wrong.
type Opening = Result<Option<Vec<u8>>, String>;

fn judge_frame(frame: io::Result<Option<Frame>>) -> Opening {
    match frame {
        Ok(Some(Frame::Open(header))) => Ok(Some(header)),
        Ok(None) => Ok(None),
        Ok(Some(_)) => Err("it began a stream with another frame than OPEN".into()),
        // A connection at rest that breaks has lost nothing.
        Err(error) if error.kind() != io::ErrorKind::InvalidData => Ok(None),
        Err(error) => Err(format!("it broke the rules between agents: {error}")),
    }
}

/// What an OPEN says of who connected to the other agent.
fn header_of(open: &[u8]) -> Option<Header> {
    match header::parse(open) {
        Parsed::Header(header, consumed) if consumed == open.len() => Some(header),
        _ => None,
    }
}

/// Who connected to the other agent, if that is more than its own workload; the peer answers for it.
fn beyond(header: &Header) -> Option<SocketAddr> {
    header.source().filter(|source| !source.ip().is_loopback() && !source.ip().is_unspecified())
}

/// Has `ended` end with `over`.
async fn ends_with(over: CancellationToken, ended: CancellationToken) -> std::convert::Infallible {
    over.cancelled().await;
    ended.cancel();
    std::future::pending().await
}

impl Listener {
    /// Of the blocks that share the listener at `address`.
    pub fn new(shared: Arc<Shared>, address: SocketAddr, blocks: Vec<Inbound>) -> Listener {
        let name = address.to_string();
        let blocks = blocks.into_iter().map(|block| (block.clone(), Way::new(&shared, address, block))).collect();
        Listener { entrance: Entrance::new(&name, blocks, &shared.cut), shared, name }
    }

    /// What is known of plaintext here, if it may ever come in.
    pub fn leniency(&self) -> Option<&Arc<Leniency>> {
        self.entrance.leniency()
    }

    /// Whether plaintext may come in now.
    pub fn is_lenient_now(&self) -> bool {
        self.entrance.lenient_now().is_some()
    }

    /// Serves until the agent stops.
    pub async fn serve(self: Arc<Listener>, listener: TcpListener) {
        let (shared, name, this) = (self.shared.clone(), self.name.clone(), self.clone());
        let counted = move |source: SocketAddr| (!this.entrance.is_balancer(source)).then(|| source.ip());
        accept_counted(shared, listener, Direction::Inbound, name, counted, |tcp, source, room| {
            let this = self.clone();
            async move { this.serve_one(tcp, source, room).await }
        })
        .await;
    }

    /// Serves one connection that came to another port.
    pub async fn take(&self, tcp: TcpStream, source: SocketAddr) {
        match self.shared.room(Direction::Inbound, Some(source.ip())) {
            Ok(room) => {
                let (eviction, serving) = (room.eviction(), Box::pin(self.serve_one(tcp, source, room)));
                let (shared, name) = (self.shared.clone(), self.name.clone());
                serve_in(shared, Direction::Inbound, name, source, eviction, serving).await;
            }
            Err(detail) => over_limit(&self.shared, Direction::Inbound, self.name.clone(), source, detail),
        }
    }

    fn book(&self, refused: Refused, source: SocketAddr, listener: &str) {
        let Refused { reason, detail, peer } = refused;
        let (direction, listener, source) = (Direction::Inbound, listener.to_owned(), Some(source));
        self.shared.ledger.refused(Refusal { direction, reason, detail, listener, source, peer });
    }

    async fn serve_one(&self, mut tcp: TcpStream, from: SocketAddr, mut room: Room) {
        // In a box of its own: what is needed before and for a handshake is not held as long as the connection lives.
        let passing = Box::pin(self.entrance.pass(&self.shared, &mut tcp, from, &mut room));
        match passing.await {
            Err(Stopped { reason, detail, source }) => {
                self.book(Refused::new((reason, detail)), source, &self.name);
            }
            Ok(Passed { source, bytes, service, speaks: Speaks::Tls(hello, by) }) => {
                let opened = Box::new(Opened { tcp, source, bytes, hello, by, room });
                if let Err(refused) = self.serve_tls(service, opened).await {
                    self.book(refused, source, &service.name);
                }
            }
            Ok(Passed { source, bytes, service, speaks: Speaks::Plaintext(leniency, detail) }) => {
                drop(room.handshake);
                let (tcp, listener) = (Replayed::new(bytes, tcp), service.name.clone());
                let plaintext = Plaintext { listener, source, detail };
                let serving = Box::pin(self.serve_plaintext(service, leniency, tcp, plaintext));
                if let Err(refused) = serving.await {
                    self.book(refused, source, &service.name);
                }
            }
        }
    }

    /// What comes after the handshake is in a box of its own, too: a connection lives there for most of its time.
    async fn serve_tls(&self, way: &Way, opened: Box<Opened>) -> Result<(), Refused> {
        let (entered, secure) = Box::pin(self.enter(way, *opened)).await?;
        match secure.into_streams() {
            Ok((channel, early)) => Box::pin(self.serve_streams(&entered, channel, early)).await,
            Err(secure) => Box::pin(self.serve_whole(&entered, *secure)).await,
        }
    }

    async fn enter<'a>(&self, way: &'a Way, opened: Opened) -> Result<(Box<Entered<'a>>, Box<Secure>), Refused> {
        let Opened { tcp, source, bytes, hello, by, room } = opened;
        let identity = self.shared.usable_identity().map_err(Refused::new)?;
        let (destination, server_name) = (tcp.local_addr().unwrap_or(source), hello.server_name.clone());
        let insecure = way.insecure.as_ref().and_then(|insecure| insecure.until(Timestamp::now()));
        let secure = self.shake_hands(accept_tls(tcp, bytes, &hello, &identity, insecure), by).await?;
        let Room { _connection, handshake } = room;
        drop(handshake);
        let (peer, rules, cut) = (secure.peer.clone(), secure.rules(&way.rules), &self.shared.cut);
        let shown = secure.chain_for(&identity);
        let live = self.shared.registry.register(Direction::Inbound, peer, shown, rules, cut);
        let how = Secured { address: source.to_string(), ..secure.how.clone() };
        let entered = Entered { way, identity, live, how, source, destination, server_name, _connection };
        Ok((Box::new(entered), Box::new(secure)))
    }

    /// Without TLS, as long as that is let in.
    async fn serve_plaintext(
        &self,
        way: &Way,
        leniency: &Leniency,
        tcp: Replayed<TcpStream>,
        plaintext: Plaintext,
    ) -> Result<(), Refused> {
        let (live, over) = (self.shared.enter_unproven(What::Plaintext(way.at.clone())), leniency.over());
        self.shared.may(&live).map_err(Refused::new)?;
        let destination = tcp.inner().local_addr().unwrap_or(plaintext.source);
        let guest = Guest { source: plaintext.source, destination, proven: None };
        let workload = self.dial(way, &guest).await?;
        self.shared.ledger.plaintext(plaintext);
        let bounds = self.shared.plaintext_bounds(leniency, live.cancel().clone(), way.pacing.begin());
        let mut mover = copying(workload, tcp);
        let outcome = tokio::select! {
            outcome = relay(&mut mover, bounds, || {}) => outcome,
            never = ends_with(over, live.cancel().clone()) => match never {},
        };
        self.shared.settle_plaintext(leniency, &live, &outcome);
        Ok(())
    }

    /// A connection that is one stream.
    async fn serve_whole(&self, entered: &Entered<'_>, secure: Secure) -> Result<(), Refused> {
        let workload = match Box::pin(self.begin(entered, entered.source)).await {
            Ok(workload) => workload,
            Err(refused) => {
                Box::pin(secure.refuse(alert_for(refused.reason))).await;
                return Err(refused);
            }
        };
        let mut mover = secure.into_mover(workload);
        self.carry(entered, &mut *mover).await;
        Ok(())
    }

    /// A connection that carries one stream after the other, each judged by itself.
    async fn serve_streams(&self, entered: &Entered<'_>, mut channel: Channel, early: Early) -> Result<(), Refused> {
        let mut opened = if early.data.is_empty() {
            self.first_stream(entered, &mut channel).await?
        } else {
            judge_frame(Frame::decode(&early.data).map(Some).map_err(Into::into))
        };
        while let Some(header) = opened.map_err(|detail| entered.refuse(RefusalReason::HandshakeFailed, detail))? {
            let Some(free) = self.serve_stream(entered, channel, &header).await else { return Ok(()) };
            channel = free;
            opened = self.next_stream(entered, &mut channel, MAX_WAIT).await;
        }
        channel.close();
        Ok(())
    }

    /// What the first stream's OPEN holds. A connection that begins none is refused: nothing else would count it.
    async fn first_stream(&self, entered: &Entered<'_>, channel: &mut Channel) -> Result<Opening, Refused> {
        let within = self.shared.timeouts.handshake;
        let patience = Instant::now() + within;
        let opened = self.next_stream(entered, channel, within).await;
        if !matches!(opened, Ok(None)) {
            return Ok(opened);
        }
        let (reason, detail) = match entered.live.ended_for() {
            Some(reason) => (reason, "it lost its right to come in before it began a stream".into()),
            None if self.shared.stop.is_cancelled() => (RefusalReason::HandshakeFailed, "this agent ends".into()),
            None if Instant::now() >= patience => {
                (RefusalReason::HandshakeTimeout, format!("it began no stream within {within:?}"))
            }
            None => (RefusalReason::HandshakeFailed, "it closed before it began a stream".into()),
        };
        Err(entered.refuse(reason, detail))
    }

    /// What the next stream's OPEN holds; nothing when no more are to come.
    async fn next_stream(&self, entered: &Entered<'_>, channel: &mut Channel, wait: Duration) -> Opening {
        let bounds = self.shared.bounds(&entered.live, entered.identity.credential.peer(), None);
        let patience = Instant::now() + wait;
        let end = bounds.deadline.map_or(patience, |deadline| deadline.min(patience));
        tokio::select! {
            biased;
            () = bounds.cancelled.cancelled() => Ok(None),
            frame = channel.receive() => judge_frame(frame),
            () = self.shared.stop.cancelled() => Ok(None),
            () = sleep_until(end) => Ok(None),
        }
    }

    /// One stream; the connection, if it is free for another.
    async fn serve_stream(&self, entered: &Entered<'_>, mut channel: Channel, open: &[u8]) -> Option<Channel> {
        let begun = match header_of(open) {
            Some(header) => Box::pin(self.begin(entered, beyond(&header).unwrap_or(entered.source))).await,
            None => Err(entered.refuse(RefusalReason::HandshakeFailed, "its OPEN cannot be read".into())),
        };
        let workload = match begun {
            Ok(workload) => workload,
            Err(refused) => {
                let answer = Frame::Refuse(refused.reason.word().to_owned());
                self.book(refused, entered.source, &entered.way.name);
                return channel.send(&answer).is_ok().then_some(channel);
            }
        };
        if let Err(error) = channel.send(&Frame::Accept) {
            let refused = entered.refuse(RefusalReason::HandshakeFailed, error.to_string());
            self.book(refused, entered.source, &entered.way.name);
            return None;
        }
        let mut flow = Flow::stream(channel, workload);
        match self.carry(entered, &mut flow).await {
            End::Whole => flow.into_channel(),
            _ => None,
        }
    }

    /// Asks policy with the newest directive, and dials. The connection is registered by now: a change in between is
    /// seen here or by the review.
    async fn begin(&self, entered: &Entered<'_>, source: SocketAddr) -> Result<TcpStream, Refused> {
        if let Decision::Refuse(reason, detail) = self.shared.decide(&entered.live, &entered.identity) {
            return Err(entered.refuse(reason, detail));
        }
        let peer = entered.live.peer.name.to_string();
        self.dial(entered.way, &entered.guest(source)).await.map_err(|refused| Refused { peer, ..refused })
    }

    async fn carry(&self, entered: &Entered<'_>, mover: &mut (dyn Mover + Send)) -> End {
        let Entered { way, identity, live, how, .. } = entered;
        let pair = Pair { direction: Direction::Inbound, peer: live.peer.name.to_string(), listener: way.name.clone() };
        self.shared.ledger.opened(&pair, how.clone());
        let own = identity.credential.peer();
        let outcome = relay(mover, self.shared.bounds(live, own, way.pacing.begin()), || {}).await;
        self.shared.settle(live, own, &pair, &outcome);
        outcome.end
    }

    async fn shake_hands(
        &self,
        shaking: impl Future<Output = Result<Secure, Fault>>,
        by: Instant,
    ) -> Result<Secure, Refused> {
        let within = self.shared.timeouts.handshake;
        let late = || (RefusalReason::HandshakeTimeout, format!("the handshake was not finished within {within:?}"));
        let shaken = timeout_at(by, shaking).await;
        shaken.unwrap_or_else(|_| Err(late())).map_err(Refused::new)
    }

    async fn dial(&self, way: &Way, guest: &Guest) -> Result<TcpStream, Refused> {
        let dialled = service::dial(&way.config, guest, self.shared.timeouts.connect).await;
        dialled.map_err(|detail| Refused::new((RefusalReason::WorkloadUnreachable, detail)))
    }
}

async fn accept_tls(
    tcp: TcpStream,
    bytes: Vec<u8>,
    hello: &Hello,
    identity: &Identity,
    insecure: Option<Timestamp>,
) -> Result<Secure, Fault> {
    let is_agent = hello.offers_1_3 && hello.alpn.iter().any(|name| name == ALPN_STREAMS);
    let config = match insecure {
        Some(_) => identity.insecure_server().map_err(|error| (RefusalReason::NoIdentity, error.to_string()))?,
        None if is_agent => identity.streams.clone(),
        None => identity.server.clone(),
    };
    let proof = Proof { trust: &identity.trust, insecure };
    if !hello.offers_1_3 {
        return Secure::accept_1_2(tcp, bytes, config, proof).await;
    }
    Secure::accept(tcp, bytes, config, proof).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_speaks_for_others_than_its_own_workload_only_with_an_address_of_theirs() {
        for (source, expected) in [
            ("127.0.0.1:4711", None),
            ("[::ffff:127.0.0.1]:4711", None),
            ("[::1]:4711", None),
            ("0.0.0.0:0", None),
            ("10.0.0.7:4711", Some("10.0.0.7:4711")),
            ("[::ffff:10.0.0.7]:4711", Some("10.0.0.7:4711")),
        ] {
            let header = Header::tcp(source.parse().unwrap(), "10.0.0.9:1".parse().unwrap());
            assert_eq!(beyond(&header).map(|source| source.to_string()).as_deref(), expected, "{source}");
        }
        assert_eq!(beyond(&Header::default()), None);
    }
}
