//! From a peer to the workload: nobody gets through without a certificate that policy allows.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use sidewarden_proto::event::{Direction, RefusalReason};
use sidewarden_proto::identity::{Peer, Usage};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::peer_of;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::accounting::{Pair, Refusal};
use super::handshake::{ALERT_PROTOCOL_VERSION, Opening, Replayed, part, read_opening};
use super::relay::{Side, relay};
use super::{Room, Shared, accept_each, secured};
use crate::config::Inbound;
use crate::dial::{connect_from, handshake_fault};
use crate::identity::Identity;
use crate::policy::{Decision, Rules, decide};

/// A refused client gets this long to read why.
const PART_WITHIN: Duration = Duration::from_secs(1);

type PeerStream = TlsStream<Replayed<TcpStream>>;

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
        let mut stream = self.shake_hands(tcp, &identity).await?;
        let Room { _connection, handshake } = room;
        drop(handshake);
        let peer = peer_of_stream(&stream)?;
        let live =
            self.shared.registry.register(Direction::Inbound, peer.clone(), self.rules.clone(), &self.shared.cut);
        // Asked after registering, with the newest directive: a change in between is seen here or by the review.
        let newest = self.shared.identity.borrow().clone().unwrap_or_else(|| identity.clone());
        let refuse = |reason, detail| Refused { reason, detail, peer: peer.name.to_string() };
        if let Decision::Refuse(reason, detail) =
            decide(&self.rules, &peer, newest.directive.as_deref(), Timestamp::now())
        {
            stream.reset_on_drop();
            return Err(refuse(reason, detail));
        }
        let mut workload = match self.dial().await {
            Ok(workload) => workload,
            Err(detail) => {
                stream.reset_on_drop();
                return Err(refuse(RefusalReason::WorkloadUnreachable, detail));
            }
        };
        let pair = Pair { direction: Direction::Inbound, peer: peer.name.to_string(), listener: self.name.clone() };
        self.shared.ledger.opened(&pair, secured(stream.get_ref().1, source));
        let own = identity.credential.peer();
        let outcome = relay(&mut workload, &mut stream, self.shared.bounds(&live, own), || {}).await;
        self.shared.settle(&live, own, &pair, &outcome);
        Ok(())
    }

    async fn shake_hands(&self, tcp: TcpStream, identity: &Identity) -> Result<PeerStream, Refused> {
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

async fn accept_tls(mut tcp: TcpStream, identity: &Identity) -> Result<PeerStream, Refused> {
    let broken = |error: std::io::Error| Refused::new((RefusalReason::HandshakeFailed, error.to_string()));
    let (opening, first) = read_opening(&mut tcp).await.map_err(broken)?;
    if let Opening::Refuse(reason, detail) = opening {
        // Who speaks no TLS gets no answer: nothing of ours ever goes out in plaintext.
        let farewell: &[u8] = if reason == RefusalReason::ProtocolVersion { &ALERT_PROTOCOL_VERSION } else { &[] };
        part_soon(&mut tcp, farewell).await;
        return Err(Refused::new((reason, detail)));
    }
    let accepting = TlsAcceptor::from(identity.server.clone()).accept(Replayed::new(first, tcp)).into_fallible();
    match accepting.await {
        Ok(stream) => Ok(stream),
        Err((error, mut rest)) => {
            // rustls has written its alert; the client should get to read it.
            part_soon(&mut rest, &[]).await;
            Err(Refused::new(handshake_fault(&error)))
        }
    }
}

async fn part_soon<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(stream: &mut S, farewell: &[u8]) {
    match timeout(PART_WITHIN, part(stream, farewell)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::trace!(%error, "a refused client was gone first"),
        Err(_) => tracing::trace!("a refused client did not close"),
    }
}

fn peer_of_stream(stream: &PeerStream) -> Result<Peer, Refused> {
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    peer_of(chain, Usage::Client).map_err(|fault| Refused::new((RefusalReason::BadCertificate, fault.to_string())))
}
