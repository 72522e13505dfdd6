//! From a peer to the workload: nobody gets through without a certificate that policy allows.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use sidewarden_proto::event::{Direction, RefusalReason};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::wire::ALPN_STREAMS;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep_until, timeout};

use super::accounting::{Pair, Refusal, Secured};
use super::channel::Channel;
use super::connections::Registered;
use super::flow::Flow;
use super::frame::Frame;
use super::handshake::{ALERT_PROTOCOL_VERSION, Opening, part_soon, read_opening};
use super::header::{self, Header, Parsed};
use super::pool::MAX_WAIT;
use super::pump::Early;
use super::relay::{End, Mover, relay};
use super::secure::Secure;
use super::{Room, Shared, accept_each};
use crate::config::Inbound;
use crate::dial::connect_from;
use crate::identity::Identity;
use crate::policy::{Decision, Rules, decide};

/// TLS access_denied: the certificate is good, its holder is not wanted here.
const ACCESS_DENIED: u8 = 49;
/// TLS internal_error: nobody to hand the connection to.
const INTERNAL_ERROR: u8 = 80;

struct Listener {
    shared: Arc<Shared>,
    config: Inbound,
    name: String,
    rules: Arc<Rules>,
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

/// A peer whose handshake is done.
struct Entered {
    identity: Arc<Identity>,
    live: Registered,
    how: Secured,
    source: SocketAddr,
}

impl Entered {
    fn refuse(&self, reason: RefusalReason, detail: String) -> Refused {
        Refused { reason, detail, peer: self.live.peer.name.to_string() }
    }
}

/// The alert that tells a peer whose connection is one stream why there is none.
fn alert_for(reason: RefusalReason) -> u8 {
    if reason == RefusalReason::WorkloadUnreachable { INTERNAL_ERROR } else { ACCESS_DENIED }
}

/// What an OPEN holds, nothing at an end, or what the other agent did wrong.
fn judge_frame(frame: io::Result<Option<Frame>>) -> Result<Option<Vec<u8>>, String> {
    match frame {
        Ok(Some(Frame::Open(header))) => Ok(Some(header)),
        Ok(None) => Ok(None),
        Ok(Some(_)) => Err("it began a stream with another frame than OPEN".into()),
        // A connection at rest that breaks has lost nothing.
        Err(error) if error.kind() != io::ErrorKind::InvalidData => Ok(None),
        Err(error) => Err(format!("it broke the rules between agents: {error}")),
    }
}

/// Who connected to the other agent, as its OPEN says.
fn source_of(open: &[u8]) -> Option<Header> {
    match header::parse(open) {
        Parsed::Header(header, consumed) if consumed == open.len() => Some(header),
        _ => None,
    }
}

/// Serves one listener.
pub async fn serve(shared: Arc<Shared>, listener: TcpListener, config: Inbound) {
    let name = listener.local_addr().unwrap_or(config.listen).to_string();
    let rules = Rules::Inbound { allow: config.allow.clone(), allow_dns: config.allow_dns.clone() };
    let this = Arc::new(Listener { shared: shared.clone(), config, name: name.clone(), rules: Arc::new(rules) });
    accept_each(shared, listener, Direction::Inbound, name, |tcp, source, room| {
        let this = this.clone();
        async move {
            if let Err(refused) = this.serve_one(tcp, source, room).await {
                this.book(refused, source);
            }
        }
    })
    .await;
}

impl Listener {
    fn book(&self, refused: Refused, source: SocketAddr) {
        let Refused { reason, detail, peer } = refused;
        let (direction, listener, source) = (Direction::Inbound, self.name.clone(), Some(source));
        self.shared.ledger.refused(Refusal { direction, reason, detail, listener, source, peer });
    }

    async fn serve_one(&self, tcp: TcpStream, source: SocketAddr, room: Room) -> Result<(), Refused> {
        let identity = self.shared.usable_identity().map_err(Refused::new)?;
        // In a box of its own: what a handshake needs is not held as long as the connection lives.
        let secure = Box::pin(self.shake_hands(tcp, &identity)).await?;
        let Room { _connection, handshake } = room;
        drop(handshake);
        let (peer, rules, cut) = (secure.peer.clone(), self.rules.clone(), &self.shared.cut);
        let live = self.shared.registry.register(Direction::Inbound, peer, rules, cut);
        let entered = Entered { identity, live, how: secure.how.clone(), source };
        match secure.into_streams() {
            Ok((channel, early)) => self.serve_streams(&entered, channel, early).await,
            Err(secure) => self.serve_whole(&entered, *secure).await,
        }
    }

    /// A connection that is one stream.
    async fn serve_whole(&self, entered: &Entered, secure: Secure) -> Result<(), Refused> {
        let workload = match self.begin(entered).await {
            Ok(workload) => workload,
            Err(refused) => {
                secure.refuse(alert_for(refused.reason)).await;
                return Err(refused);
            }
        };
        let mut mover = secure.into_mover(workload);
        self.carry(entered, &mut *mover).await;
        Ok(())
    }

    /// A connection that carries one stream after the other, each judged by itself.
    async fn serve_streams(&self, entered: &Entered, mut channel: Channel, early: Early) -> Result<(), Refused> {
        let mut opened = if early.data.is_empty() {
            self.next_stream(entered, &mut channel, self.shared.timeouts.handshake).await
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

    /// What the next stream's OPEN holds; nothing when no more are to come.
    async fn next_stream(
        &self,
        entered: &Entered,
        channel: &mut Channel,
        wait: Duration,
    ) -> Result<Option<Vec<u8>>, String> {
        let bounds = self.shared.bounds(&entered.live, entered.identity.credential.peer());
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
    async fn serve_stream(&self, entered: &Entered, mut channel: Channel, open: &[u8]) -> Option<Channel> {
        let begun = match source_of(open) {
            Some(_) => self.begin(entered).await,
            None => Err(entered.refuse(RefusalReason::HandshakeFailed, "its OPEN cannot be read".into())),
        };
        let workload = match begun {
            Ok(workload) => workload,
            Err(refused) => {
                let answer = Frame::Refuse(refused.reason.word().to_owned());
                self.book(refused, entered.source);
                return channel.send(&answer).is_ok().then_some(channel);
            }
        };
        if let Err(error) = channel.send(&Frame::Accept) {
            self.book(entered.refuse(RefusalReason::HandshakeFailed, error.to_string()), entered.source);
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
    async fn begin(&self, entered: &Entered) -> Result<TcpStream, Refused> {
        let newest = self.shared.identity.borrow().clone().unwrap_or_else(|| entered.identity.clone());
        if let Decision::Refuse(reason, detail) =
            decide(&self.rules, &entered.live.peer, newest.directive.as_deref(), Timestamp::now())
        {
            return Err(entered.refuse(reason, detail));
        }
        self.dial().await.map_err(|detail| entered.refuse(RefusalReason::WorkloadUnreachable, detail))
    }

    async fn carry(&self, entered: &Entered, mover: &mut (dyn Mover + Send)) -> End {
        let Entered { identity, live, how, .. } = entered;
        let pair =
            Pair { direction: Direction::Inbound, peer: live.peer.name.to_string(), listener: self.name.clone() };
        self.shared.ledger.opened(&pair, how.clone());
        let own = identity.credential.peer();
        let outcome = relay(mover, self.shared.bounds(live, own), || {}).await;
        self.shared.settle(live, own, &pair, &outcome);
        outcome.end
    }

    async fn shake_hands(&self, tcp: TcpStream, identity: &Identity) -> Result<Secure, Refused> {
        let within = self.shared.timeouts.handshake;
        let late = || {
            Refused::new((RefusalReason::HandshakeTimeout, format!("the handshake was not finished within {within:?}")))
        };
        timeout(within, accept_tls(tcp, identity)).await.unwrap_or_else(|_| Err(late()))
    }

    async fn dial(&self) -> Result<TcpStream, String> {
        let Inbound { to, dial_from, .. } = self.config;
        let within = self.shared.timeouts.connect;
        match timeout(within, connect_from(Some(dial_from), to)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(format!("dialling {to} from {dial_from}: {error}")),
            Err(_) => Err(format!("dialling {to} from {dial_from}: no answer within {within:?}")),
        }
    }
}

async fn accept_tls(mut tcp: TcpStream, identity: &Identity) -> Result<Secure, Refused> {
    let broken = |error: std::io::Error| Refused::new((RefusalReason::HandshakeFailed, error.to_string()));
    let (opening, hello) = read_opening(&mut tcp).await.map_err(broken)?;
    let config = identity.server.clone();
    let secure = match opening {
        Opening::Tls(asked) if asked.offers_1_3 && asked.alpn.iter().any(|name| name == ALPN_STREAMS) => {
            Secure::accept(tcp, hello, identity.streams.clone()).await
        }
        Opening::Tls(asked) if asked.offers_1_3 => Secure::accept(tcp, hello, config).await,
        Opening::Tls(_) => Secure::accept_1_2(tcp, hello, config).await,
        Opening::Refuse(reason, detail) => {
            // Who speaks no TLS gets no answer: nothing of ours ever goes out in plaintext.
            let farewell: &[u8] = if reason == RefusalReason::ProtocolVersion { &ALERT_PROTOCOL_VERSION } else { &[] };
            part_soon(&mut tcp, farewell).await;
            Err((reason, detail))
        }
        Opening::More => Err((RefusalReason::HandshakeFailed, "its hello has no end".to_owned())),
    };
    secure.map_err(Refused::new)
}
