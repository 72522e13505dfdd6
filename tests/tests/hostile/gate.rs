//! The gate that everybody knocks at: an agent in front of an echo, its collector, and the CA behind both.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme, SupportedProtocolVersion};
use serde_json::Value;
use sidewarden_proto::tls::provider;
use sidewarden_tests::metrics::scrape;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::mint::{self, Authority, Shown, WEB};
use crate::world::{Agent, World, echo, inbound};

/// Nothing here takes longer, or the test fails.
pub const LIMIT: Duration = Duration::from_secs(30);

pub static BOTH: [&SupportedProtocolVersion; 2] = [&rustls::version::TLS13, &rustls::version::TLS12];

pub struct Gate {
    pub world: World,
    pub orders: Agent,
    pub root: Authority,
    pub issuing: Authority,
}

impl Gate {
    /// In front of an echo; shop/web may come in.
    pub async fn open() -> Gate {
        Gate::before(echo().await, "").await
    }

    /// In front of `workload`, with more settings.
    pub async fn before(workload: SocketAddr, more: &str) -> Gate {
        let world = World::start().await;
        let orders = world.agent("orders-1", "shop/orders", &format!("{more}{}", inbound(workload, "shop/web"))).await;
        orders.enrolled().await;
        let ca = world.dir.path().join("collector/ca");
        let (root, issuing) = (Authority::read(&ca.join("root")), Authority::read(&ca.join("issuing")));
        Gate { world, orders, root, issuing }
    }

    pub fn address(&self) -> SocketAddr {
        self.orders.inbound()
    }

    /// A good certificate of shop/web.
    pub fn web(&self) -> Shown {
        self.issuing.leaf(&mint::leaf(WEB), &[&self.issuing, &self.root])
    }

    /// A good client gets through, whatever happened before.
    pub async fn is_open(&self) {
        let answer = self.knock(&self.web(), &BOTH, home()).await;
        assert_eq!(answer, Answer::Accepted);
    }

    /// Connects from `source`, shows what there is to show, and says a word.
    pub async fn knock(
        &self,
        shown: &Shown,
        versions: &'static [&'static SupportedProtocolVersion],
        source: Ipv4Addr,
    ) -> Answer {
        let tcp = dial_from(source, self.address()).await;
        let talking = talk(tcp, trusting(shown, versions));
        match timeout(LIMIT, talking).await.expect("an answer in time") {
            Ok(()) => Answer::Accepted,
            Err(error) => answer_of(&error),
        }
    }

    /// How many the agent refused for `reason` so far.
    pub fn refused(&self, reason: &str) -> u64 {
        let metrics = tokio::task::block_in_place(|| scrape(self.orders.app.addresses.admin)).unwrap();
        metrics.sum("sidewarden_agent_connections_refused_total", &[("direction", "inbound"), ("reason", reason)])
            as u64
    }

    /// Reason and detail of the event about `source`.
    pub async fn event_about(&self, source: Ipv4Addr) -> (String, String) {
        let from = format!("\"source\":\"{source}:");
        let event = self.world.event("connection.refused", |record| record.body.get().contains(&from)).await;
        let body: Value = serde_json::from_str(event.body.get()).unwrap();
        let text = |key: &str| body[key].as_str().unwrap_or_default().to_owned();
        assert!(!text("hint").is_empty(), "{body}");
        (text("reason"), text("detail"))
    }
}

/// What somebody at the gate gets to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The workload's own answer.
    Accepted,
    /// An alert, by its name in rustls.
    Alert(String),
    /// Something else.
    Other(String),
}

pub fn answer_of(error: &io::Error) -> Answer {
    match error.get_ref().and_then(|inner| inner.downcast_ref()) {
        Some(rustls::Error::AlertReceived(alert)) => Answer::Alert(format!("{alert:?}")),
        Some(other) => Answer::Other(format!("{other:?}")),
        None => Answer::Other(error.to_string()),
    }
}

/// A handshake, a word, its echo, and the end.
async fn talk(tcp: TcpStream, config: ClientConfig) -> io::Result<()> {
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name(), tcp).await?;
    says(&mut stream, b"hello").await
}

/// A word and its echo.
pub async fn says<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, word: &[u8]) -> io::Result<()> {
    stream.write_all(word).await?;
    stream.flush().await?;
    let mut answer = vec![0; word.len()];
    stream.read_exact(&mut answer).await?;
    assert_eq!(answer, word);
    Ok(())
}

pub fn name() -> ServerName<'static> {
    ServerName::from(IpAddr::from([127, 0, 0, 1]))
}

/// Where good clients are at home.
pub fn home() -> Ipv4Addr {
    Ipv4Addr::LOCALHOST
}

/// A network that nobody has come from yet: what an attacker does is told at once, not summed up with what others did.
pub fn elsewhere() -> Ipv4Addr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let [high, low] = NEXT.fetch_add(1, Relaxed).to_be_bytes();
    Ipv4Addr::new(127, 100 + high, low, 9)
}

/// A connection from `source`.
pub async fn dial_from(source: Ipv4Addr, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from((source, 0))).unwrap();
    let stream = socket.connect(to).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// A client that believes every server, and keeps every session it is offered.
pub fn trusting(shown: &Shown, versions: &'static [&'static SupportedProtocolVersion]) -> ClientConfig {
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(shown.certified())))
}

#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
