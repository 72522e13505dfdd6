//! One connection to a collector: QUIC, or TLS over TCP where QUIC gets no answer. Both are mutually authenticated and
//! carry the same frames on one stream.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Endpoint, IdleTimeout, TransportConfig, VarInt};
use rustls::pki_types::ServerName;
use sidewarden_proto::config::HostPort;
use sidewarden_proto::tls::TlsError;
use sidewarden_proto::wire::ALPN;
use tokio::io::{AsyncRead, AsyncWrite, Join, join};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::dial::{DialError, Resolver, handshake_fault};
use crate::identity::Identity;

/// QUIC that has not answered by then is taken for blocked. An answer takes one round trip and 2 ms of signing.
const QUIC_WITHIN: Duration = Duration::from_millis(1_500);
/// For TCP, and again for its handshake.
const TCP_WITHIN: Duration = Duration::from_secs(5);
/// What a round trip is taken to be before one was measured: a lost first packet is sent again after three of these, well
/// before QUIC is taken for blocked.
const FIRST_RTT: Duration = Duration::from_millis(100);
/// NATs forget UDP mappings after 30 to 60 seconds.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
const MAX_IDLE: Duration = Duration::from_secs(30);
/// Most of one direction that is under way: a batch has up to 4 MiB.
const WINDOW: u32 = 2 << 20;

/// Why a collector was not reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Over TCP, which is tried last.
    #[error("over TCP: {0}")]
    Dial(#[from] DialError),
    /// The handshake over TCP.
    #[error("over TCP: the handshake with {address} failed: {}", handshake_fault(error).1)]
    Handshake {
        /// With whom.
        address: String,
        /// Why.
        error: io::Error,
    },
    /// Our own side.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Over QUIC.
    #[error("over QUIC: {0}")]
    Quic(String),
}

/// A stream of frames.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A connection that stands.
pub struct Connected {
    /// Its frames.
    pub stream: Pin<Box<dyn Stream>>,
    /// `quic` or `tcp`.
    pub transport: &'static str,
    /// What must be kept while it is used.
    pub quic: Option<Quic>,
}

/// A QUIC connection whose stream is not open yet.
pub struct Quic {
    endpoint: Endpoint,
    connection: quinn::Connection,
}

impl Quic {
    /// Opens the one stream.
    pub async fn open(self) -> Result<Connected, ConnectError> {
        let fault = |error: quinn::ConnectionError| ConnectError::Quic(error.to_string());
        let (send, receive) = self.connection.open_bi().await.map_err(fault)?;
        let stream: Join<_, _> = join(receive, send);
        Ok(Connected { stream: Box::pin(stream), transport: "quic", quic: Some(self) })
    }

    /// Ends the connection and lets the last packets go out.
    pub async fn close(self) {
        self.connection.close(VarInt::from_u32(0), b"");
        if timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await.is_err() {
            tracing::debug!("the QUIC connection did not end in time");
        }
    }
}

/// Reaches `collector`, over QUIC if it answers and otherwise over TCP.
pub async fn connect(
    resolver: &Resolver,
    collector: &HostPort,
    identity: &Identity,
) -> Result<Connected, ConnectError> {
    match connect_quic(resolver, collector, identity).await {
        Ok(quic) => quic.open().await,
        Err(error) => {
            tracing::debug!(%collector, %error, "no answer over QUIC; trying TCP");
            connect_tcp(resolver, collector, identity).await
        }
    }
}

/// Reaches `collector` over QUIC, without opening a stream.
pub async fn connect_quic(
    resolver: &Resolver,
    collector: &HostPort,
    identity: &Identity,
) -> Result<Quic, ConnectError> {
    let fault = |error: &dyn std::fmt::Display| ConnectError::Quic(error.to_string());
    let reach = async {
        let address = resolver.lookup(collector).await?.first().copied();
        let address = address.ok_or_else(|| fault(&"the name has no address"))?;
        let endpoint = Endpoint::client(any_for(address)).map_err(|e| fault(&e))?;
        let connecting = endpoint.connect_with(quic_config(identity)?, address, "collector").map_err(|e| fault(&e))?;
        let connection = connecting.await.map_err(|e| fault(&e))?;
        Ok(Quic { endpoint, connection })
    };
    timeout(QUIC_WITHIN, reach).await.unwrap_or_else(|_| Err(fault(&format!("no answer within {QUIC_WITHIN:?}"))))
}

fn any_for(address: SocketAddr) -> SocketAddr {
    if address.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() }
}

fn quic_config(identity: &Identity) -> Result<ClientConfig, ConnectError> {
    let tls = QuicClientConfig::try_from(identity.uplink(&[ALPN])?).map_err(|e| ConnectError::Quic(e.to_string()))?;
    let mut transport = TransportConfig::default();
    transport
        .initial_rtt(FIRST_RTT)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(IdleTimeout::try_from(MAX_IDLE).ok())
        .max_concurrent_bidi_streams(0u8.into())
        .max_concurrent_uni_streams(0u8.into())
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from_u32(WINDOW))
        .receive_window(VarInt::from_u32(WINDOW))
        .send_window(u64::from(WINDOW));
    let mut config = ClientConfig::new(Arc::new(tls));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

async fn connect_tcp(
    resolver: &Resolver,
    collector: &HostPort,
    identity: &Identity,
) -> Result<Connected, ConnectError> {
    let tcp = resolver.connect(collector, TCP_WITHIN).await?;
    let broken = |error: io::Error| ConnectError::Handshake { address: collector.to_string(), error };
    let name = ServerName::from(tcp.peer_addr().map_err(broken)?.ip());
    let connecting = TlsConnector::from(identity.uplink(&[ALPN])?).connect(name, tcp);
    let late = || Err(io::Error::from(io::ErrorKind::TimedOut));
    let stream = timeout(TCP_WITHIN, connecting).await.unwrap_or_else(|_| late()).map_err(broken)?;
    Ok(Connected { stream: Box::pin(stream), transport: "tcp", quic: None })
}
