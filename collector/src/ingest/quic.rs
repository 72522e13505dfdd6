//! QUIC: one connection an agent, one bidirectional stream in it, nothing before the client's certificate is verified.

use std::net::UdpSocket;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{ConnectionError, Endpoint, EndpointConfig, IdleTimeout, Incoming, ServerConfig, TransportConfig, VarInt};
use rustls::pki_types::CertificateDer;
use sidewarden_proto::event::RefusalReason;
use sidewarden_proto::wire::ALPN;
use tokio::time::timeout;

use super::session::{self, Come};
use super::{IngestError, Shared};
use crate::identity::Front;

/// The kernel's default of 208 KiB overflows when a fleet reconnects at once, and each lost flight costs a second.
const SOCKET_BUFFER: usize = 8 << 20;
/// Most one stream may have on its way: a few links, so that one agent cannot hold much memory.
const STREAM_WINDOW: u32 = 1 << 20;
/// Agents ping far more often.
const IDLE: Duration = Duration::from_secs(30);

/// Sessions get this long to end by themselves.
const PART_WITHIN: Duration = Duration::from_secs(2);

/// The endpoint on a bound socket.
pub fn endpoint(socket: UdpSocket, shared: &Shared) -> Result<Endpoint, IngestError> {
    let fault = |e: &dyn std::fmt::Display| IngestError::Quic(e.to_string());
    for result in
        [setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER), setsockopt(&socket, sockopt::SndBuf, &SOCKET_BUFFER)]
    {
        if let Err(error) = result {
            tracing::warn!(%error, "the UDP buffers stay small: a fleet that reconnects at once will take longer");
        }
    }
    socket.set_nonblocking(true).map_err(|e| fault(&e))?;
    let config = server_config(&shared.identities.front().borrow())?;
    let runtime = Arc::new(quinn::TokioRuntime);
    Endpoint::new(EndpointConfig::default(), Some(config), socket, runtime).map_err(|e| fault(&e))
}

fn server_config(front: &Front) -> Result<ServerConfig, IngestError> {
    let crypto = QuicServerConfig::try_from(front.config(&[ALPN])?).map_err(|e| IngestError::Quic(e.to_string()))?;
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(STREAM_WINDOW))
        .send_window(u64::from(STREAM_WINDOW))
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE.as_millis() as u32))));
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(Arc::new(transport)).max_incoming(1024).migration(true);
    Ok(config)
}

/// Takes connections until the shutdown; a renewed certificate of ours serves from the next handshake on.
pub async fn serve(endpoint: Endpoint, shared: Arc<Shared>) {
    let mut front = shared.identities.front();
    // It may have changed since the first configuration was made.
    front.mark_changed();
    loop {
        tokio::select! {
            incoming = endpoint.accept() => match incoming {
                Some(incoming) => take(incoming, &shared),
                None => break,
            },
            Ok(()) = front.changed() => match server_config(&front.borrow_and_update()) {
                Ok(config) => endpoint.set_server_config(Some(config)),
                Err(error) => tracing::error!(%error, "QUIC keeps the certificate it has"),
            },
            () = shared.shutdown.cancelled() => break,
        }
    }
    endpoint.set_server_config(None);
    if timeout(PART_WITHIN, endpoint.wait_idle()).await.is_err() {
        endpoint.close(VarInt::from_u32(0), b"shutdown");
        leave(&endpoint);
    }
}

/// Lets go of the port. quinn keeps a connection that was closed in its very first packet (a client that gave up before we
/// listened) for its idle time, and the socket with it; it keeps one socket back besides, so it is given two others.
fn leave(endpoint: &Endpoint) {
    for _ in 0..2 {
        let other = UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0));
        if let Err(error) = other.and_then(|socket| endpoint.rebind(socket)) {
            tracing::warn!(%error, "the QUIC port stays taken until the last connection has timed out");
        }
    }
}

fn take(incoming: Incoming, shared: &Arc<Shared>) {
    let source = incoming.remote_address();
    let (Ok(handshake), Ok(connection)) =
        (shared.handshakes.clone().try_acquire_owned(), shared.connections.clone().try_acquire_owned())
    else {
        shared.refusals.ingest(
            source,
            RefusalReason::LimitReached.word(),
            "too many connections or handshakes at once",
        );
        return incoming.refuse();
    };
    // When half of the handshakes are taken, an address must first prove that it can be reached.
    let busy = shared.handshakes.available_permits() < shared.max_handshakes / 2;
    if busy && !incoming.remote_address_validated() && incoming.may_retry() {
        let _ = incoming.retry();
        return;
    }
    let shared = shared.clone();
    shared.tasks.clone().spawn(async move {
        let _connection = connection;
        let shaken = timeout(shared.handshake_timeout, shake(incoming)).await;
        drop(handshake);
        match shaken {
            Ok(Ok((connection, send, receive, chain))) => {
                session::serve(&shared, Come { source, transport: "quic", chain }, receive, send).await;
                connection.close(VarInt::from_u32(0), b"done");
            }
            Ok(Err(error)) => refused(&shared, source, &error),
            Err(_) => {
                let detail = "the QUIC handshake, or the first stream, did not come in time";
                shared.refusals.ingest(source, RefusalReason::HandshakeTimeout.word(), detail);
            }
        }
    });
}

type Shaken = (quinn::Connection, quinn::SendStream, quinn::RecvStream, Vec<CertificateDer<'static>>);

async fn shake(incoming: Incoming) -> Result<Shaken, ConnectionError> {
    let connection = incoming.accept()?.await?;
    let chain = connection.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let (send, receive) = connection.accept_bi().await?;
    Ok((connection, send, receive, chain.map(|chain| *chain).unwrap_or_default()))
}

fn refused(shared: &Shared, source: std::net::SocketAddr, error: &ConnectionError) {
    // One that goes away before it has said anything was a probe, or a race that TCP won.
    if matches!(error, ConnectionError::ApplicationClosed(_) | ConnectionError::Reset | ConnectionError::LocallyClosed)
    {
        return;
    }
    shared.refusals.ingest(source, reason(error).word(), error.to_string());
}

/// The closed word for a QUIC handshake that failed: what TLS said is in the alert of the error code (RFC 9001, 4.8).
fn reason(error: &ConnectionError) -> RefusalReason {
    let code = match error {
        ConnectionError::TransportError(error) => u64::from(error.code),
        ConnectionError::ConnectionClosed(close) => u64::from(close.error_code),
        ConnectionError::TimedOut => return RefusalReason::HandshakeTimeout,
        _ => return RefusalReason::HandshakeFailed,
    };
    match code.checked_sub(0x100) {
        Some(116) => RefusalReason::NoCertificate,
        Some(48) => RefusalReason::UnknownCa,
        Some(45) => RefusalReason::Expired,
        Some(42 | 43 | 46) => RefusalReason::BadCertificate,
        Some(70) => RefusalReason::ProtocolVersion,
        _ => RefusalReason::HandshakeFailed,
    }
}
