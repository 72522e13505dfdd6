//! From a peer to the workload: nobody gets through without a certificate that policy allows.

use std::net::SocketAddr;
use std::sync::Arc;

use sidewarden_proto::event::{Direction, RefusalReason};
use sidewarden_proto::time::Timestamp;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::accounting::{Pair, Refusal};
use super::handshake::{ALERT_PROTOCOL_VERSION, Opening, part_soon, read_opening};
use super::relay::relay;
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

/// Serves one listener.
pub async fn serve(shared: Arc<Shared>, listener: TcpListener, config: Inbound) {
    let name = listener.local_addr().unwrap_or(config.listen).to_string();
    let rules = Rules::Inbound { allow: config.allow.clone(), allow_dns: config.allow_dns.clone() };
    let this = Arc::new(Listener { shared: shared.clone(), config, name: name.clone(), rules: Arc::new(rules) });
    accept_each(shared, listener, Direction::Inbound, name, |tcp, source, room| {
        let this = this.clone();
        async move {
            if let Err(refused) = this.serve_one(tcp, room).await {
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

    async fn serve_one(&self, tcp: TcpStream, room: Room) -> Result<(), Refused> {
        let identity = self.shared.usable_identity().map_err(Refused::new)?;
        let secure = self.shake_hands(tcp, &identity).await?;
        let Room { _connection, handshake } = room;
        drop(handshake);
        let peer = secure.peer.clone();
        let live =
            self.shared.registry.register(Direction::Inbound, peer.clone(), self.rules.clone(), &self.shared.cut);
        // Asked after registering, with the newest directive: a change in between is seen here or by the review.
        let newest = self.shared.identity.borrow().clone().unwrap_or_else(|| identity.clone());
        let refuse = |reason, detail| Refused { reason, detail, peer: peer.name.to_string() };
        if let Decision::Refuse(reason, detail) =
            decide(&self.rules, &peer, newest.directive.as_deref(), Timestamp::now())
        {
            secure.refuse(ACCESS_DENIED).await;
            return Err(refuse(reason, detail));
        }
        let workload = match self.dial().await {
            Ok(workload) => workload,
            Err(detail) => {
                secure.refuse(INTERNAL_ERROR).await;
                return Err(refuse(RefusalReason::WorkloadUnreachable, detail));
            }
        };
        let pair = Pair { direction: Direction::Inbound, peer: peer.name.to_string(), listener: self.name.clone() };
        let how = secure.how.clone();
        let mover = secure.into_mover(workload);
        let mover = mover.map_err(|error| refuse(RefusalReason::HandshakeFailed, error.to_string()))?;
        self.shared.ledger.opened(&pair, how);
        let own = identity.credential.peer();
        let outcome = relay(mover, self.shared.bounds(&live, own), || {}).await;
        self.shared.settle(&live, own, &pair, &outcome);
        Ok(())
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
