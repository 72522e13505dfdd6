//! From the workload to a named peer: it is resolved, dialled, and must prove to be who was asked for.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use sidewarden_proto::event::{Direction, RefusalReason};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{Expect, Floor, TlsError};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::accounting::{Pair, Refusal};
use super::relay::{End, Side, relay};
use super::secure::{Fault, Secure};
use super::{Room, Shared, accept_each};
use crate::config::{self, Outbound};
use crate::dial::handshake_fault;
use crate::identity::Identity;
use crate::policy::{Decision, Rules, decide};

struct Route {
    shared: Arc<Shared>,
    config: Outbound,
    name: String,
    rules: Arc<Rules>,
    /// The TLS configuration of the newest identity: making one for each connection would cost more than it.
    tls: Mutex<Option<(Arc<Identity>, Arc<ClientConfig>)>>,
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

/// Serves one route.
pub async fn serve(shared: Arc<Shared>, listener: TcpListener, config: Outbound) {
    let name = config.to.to_string();
    let rules = match &config.peer {
        config::Peer::Workload(id) => Rules::OutboundTo(id.clone()),
        config::Peer::Dns(host) => Rules::OutboundToDns(host.clone()),
    };
    let tls = Mutex::new(None);
    let this = Arc::new(Route { shared: shared.clone(), config, name: name.clone(), rules: Arc::new(rules), tls });
    accept_each(shared, listener, Direction::Outbound, name, |tcp, _, room| {
        let this = this.clone();
        async move {
            if let Err(refused) = this.serve_one(tcp, room).await {
                this.book(refused);
            }
        }
    })
    .await;
}

impl Route {
    fn book(&self, refused: Refused) {
        let Refused { reason, detail, peer, address: source } = refused;
        let (direction, listener) = (Direction::Outbound, self.name.clone());
        self.shared.ledger.refused(Refusal { direction, reason, detail, listener, source, peer });
    }

    async fn serve_one(&self, workload: TcpStream, room: Room) -> Result<(), Refused> {
        let (identity, secure) = match self.reach().await {
            Ok(reached) => reached,
            Err(refused) => {
                // What the workload may not see is an end that looks whole.
                workload.reset_on_drop();
                return Err(refused);
            }
        };
        let Room { _connection, handshake } = room;
        drop(handshake);
        let (peer, how) = (secure.peer.clone(), secure.how.clone());
        let address = how.address.parse().ok();
        let refuse = |reason, detail| Refused { reason, detail, peer: peer.name.to_string(), address };
        let live =
            self.shared.registry.register(Direction::Outbound, peer.clone(), self.rules.clone(), &self.shared.cut);
        let newest = self.shared.identity.borrow().clone().unwrap_or_else(|| identity.clone());
        if let Decision::Refuse(reason, detail) =
            decide(&self.rules, &peer, newest.directive.as_deref(), Timestamp::now())
        {
            workload.reset_on_drop();
            return Err(refuse(reason, detail));
        }
        let mover = secure.into_mover(workload);
        let mover = mover.map_err(|error| refuse(RefusalReason::HandshakeFailed, error.to_string()))?;
        let pair = Pair { direction: Direction::Outbound, peer: peer.name.to_string(), listener: self.name.clone() };
        let own = identity.credential.peer();
        let told = AtomicBool::new(false);
        let tell = || {
            told.store(true, Relaxed);
            self.shared.ledger.opened(&pair, how.clone());
        };
        let outcome = relay(mover, self.shared.bounds(&live, own), tell).await;
        if let (false, End::PeerCut(error)) = (told.load(Relaxed), &outcome.end) {
            let (reason, detail) = refused_by_peer(error);
            return Err(refuse(reason, detail));
        }
        if !told.load(Relaxed) {
            self.shared.ledger.opened(&pair, how.clone());
        }
        self.shared.settle(&live, own, &pair, &outcome);
        Ok(())
    }

    async fn reach(&self) -> Result<(Arc<Identity>, Secure), Refused> {
        let identity = self.shared.usable_identity().map_err(|(reason, detail)| Refused::new(reason, detail))?;
        let unreachable = |error: String| Refused::new(RefusalReason::Unreachable, error);
        let tcp = self.shared.resolver.connect(&self.config.to, self.shared.timeouts.connect).await;
        let tcp = tcp.map_err(|error| unreachable(error.to_string()))?;
        let address = tcp.peer_addr().map_err(|error| unreachable(error.to_string()))?;
        let config = self.tls_config(&identity).map_err(|error| (RefusalReason::NoIdentity, error.to_string()));
        let secure = match config {
            Ok(config) => self.shake_hands(tcp, config).await,
            Err(fault) => Err(fault),
        };
        let at = |(reason, detail)| Refused { address: Some(address), ..Refused::new(reason, detail) };
        Ok((identity, secure.map_err(at)?))
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
        let config = identity.client(expect, floor, &[])?;
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
