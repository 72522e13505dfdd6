//! TLS over TCP: the way in when UDP is blocked, and the only one for enrolment.
//!
//! The ALPN of the ClientHello chooses the configuration before the handshake: sessions need a client certificate,
//! enrolment has none to show yet. Whoever names neither is held to the stricter one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::server::Acceptor;
use sidewarden_proto::event::RefusalReason;
use sidewarden_proto::tls::{self, Floor};
use sidewarden_proto::wire::{ALPN, ALPN_COLLECTOR, ALPN_ENROL};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{LazyConfigAcceptor, StartHandshake};

use super::session::{self, Come};
use super::{IngestError, Shared, collectors, enrol, handshake_refusal};
use crate::identity::Front;

/// Both configurations, made anew whenever a certificate of ours is, or whom we trust.
#[derive(Clone, Debug)]
pub struct Configs {
    session: Arc<ServerConfig>,
    enrol: Arc<ServerConfig>,
}

impl Configs {
    /// With our present certificates.
    pub fn new(front: &Front) -> Result<Configs, IngestError> {
        Ok(Configs {
            session: front.config(&[ALPN, ALPN_COLLECTOR])?,
            enrol: tls::server_config_without_client(front.own(), Floor::Tls13, &[ALPN_ENROL])?,
        })
    }

    fn for_hello(&self, start: &StartHandshake<TcpStream>) -> (Arc<ServerConfig>, bool) {
        let enrols = start.client_hello().alpn().is_some_and(|mut names| names.any(|name| name == ALPN_ENROL));
        (if enrols { self.enrol.clone() } else { self.session.clone() }, enrols)
    }
}

/// Takes connections until the shutdown.
pub async fn serve(listener: TcpListener, configs: Configs, shared: Arc<Shared>) {
    let mut front = shared.identities.front();
    // It may have changed since the first configuration was made.
    front.mark_changed();
    let configs = watch::Sender::new(configs);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, source)) => take(stream, source, &configs, &shared),
                Err(error) => {
                    // Out of file descriptors, most likely: without a pause this would be a busy loop.
                    tracing::warn!(%error, "a connection could not be accepted");
                    sleep(Duration::from_millis(200)).await;
                }
            },
            Ok(()) = front.changed() => match Configs::new(&front.borrow_and_update()) {
                Ok(new) => drop(configs.send_replace(new)),
                Err(error) => tracing::error!(%error, "TCP keeps the certificate it has"),
            },
            () = shared.shutdown.cancelled() => return,
        }
    }
}

fn take(stream: TcpStream, source: SocketAddr, configs: &watch::Sender<Configs>, shared: &Arc<Shared>) {
    let (Ok(handshake), Ok(connection)) =
        (shared.handshakes.clone().try_acquire_owned(), shared.connections.clone().try_acquire_owned())
    else {
        shared.refusals.ingest(
            source,
            RefusalReason::LimitReached.word(),
            "too many connections or handshakes at once",
        );
        return;
    };
    let (configs, shared) = (configs.borrow().clone(), shared.clone());
    shared.tasks.clone().spawn(async move {
        let _connection = connection;
        let _ = stream.set_nodelay(true);
        let shaken = tokio::select! {
            shaken = timeout(shared.handshake_timeout, shake(stream, &configs)) => shaken,
            () = shared.shutdown.cancelled() => return,
        };
        drop(handshake);
        match shaken {
            Ok(Ok((stream, true))) => enrol::serve(&shared, source, stream).await,
            Ok(Ok((stream, false))) => run_session(&shared, source, stream).await,
            Ok(Err(error)) => {
                let (reason, detail) = handshake_refusal(&error);
                shared.refusals.ingest(source, reason, detail);
            }
            Err(_) => {
                let detail = "the TLS handshake was not finished in time";
                shared.refusals.ingest(source, RefusalReason::HandshakeTimeout.word(), detail);
            }
        }
    });
}

async fn shake(stream: TcpStream, configs: &Configs) -> std::io::Result<(TlsStream<TcpStream>, bool)> {
    let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
    let (config, enrols) = configs.for_hello(&start);
    Ok((start.into_stream(config).await?, enrols))
}

async fn run_session(shared: &Arc<Shared>, source: SocketAddr, stream: TlsStream<TcpStream>) {
    let (_, connection) = stream.get_ref();
    let chain = connection.peer_certificates().unwrap_or_default();
    let chain: Vec<_> = chain.iter().map(|cert| cert.clone().into_owned()).collect();
    if connection.alpn_protocol() == Some(ALPN_COLLECTOR) {
        return collectors::serve(shared, source, &chain, stream).await;
    }
    if connection.alpn_protocol() != Some(ALPN) {
        let detail = "the client names no protocol of ours (ALPN sidewarden/1)";
        return shared.refusals.ingest(source, RefusalReason::HandshakeFailed.word(), detail);
    }
    let (reader, writer) = tokio::io::split(stream);
    session::serve(shared, Come { source, transport: "tcp", chain }, reader, writer).await;
}
