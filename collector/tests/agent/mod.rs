//! A collector in process on free ports, and the smallest agent there can be: enrols, connects, sends links.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use sidewarden_collector::app::{self, App};
use sidewarden_collector::config::{self, Config};
use sidewarden_proto::batch::{Batch, Cursor, Epoch, Link};
use sidewarden_proto::enrol::{Answer, Der, Issued, Refused, Request, Token, from_payload, to_message};
use sidewarden_proto::event::{AgentStopping, Body, Event, Severity};
use sidewarden_proto::identity::{AgentId, InstanceId, TrustDomain};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{self, Credential, Expect, Floor, Trust};
use sidewarden_proto::wire::{ALPN, ALPN_ENROL, Decoder, Frame, Hello};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Everything in these tests ends by then, or the test fails.
pub const LIMIT: Duration = Duration::from_secs(20);

pub fn settings(dir: &std::path::Path) -> Config {
    let text = "[agents]\nlisten = '127.0.0.1:0'\nhandshake_timeout = '1s'\n[api]\nlisten = '127.0.0.1:0'\n[metrics]\nlisten = '127.0.0.1:0'\n";
    let mut config = config::read(text, &|_| None).unwrap();
    config.data_dir = dir.join("data");
    config.instance = "test".into();
    config
}

pub async fn start(dir: &std::path::Path) -> App {
    app::start(settings(dir), Timestamp::now).await.unwrap()
}

pub fn domain() -> TrustDomain {
    "sidewarden.internal".parse().unwrap()
}

pub fn token(app: &App, pattern: &str, uses: u32) -> Token {
    let issuer = &app.core.issuer;
    let pin = issuer.authority().pin();
    let life = Duration::from_secs(60);
    issuer.register().create(&pattern.parse().unwrap(), uses, life, pin, Timestamp::now()).unwrap().0
}

pub fn csr(key: &KeyPair) -> Vec<u8> {
    CertificateParams::default().serialize_request(key).unwrap().der().to_vec()
}

pub fn request(token: &Token, workload: &str, instance: &str, key: &KeyPair) -> Request {
    Request {
        version: "0".into(),
        workload: Some(domain().workload(workload).unwrap()),
        instance: instance.parse().unwrap(),
        token_id: token.id.clone(),
        token_secret: token.secret.clone(),
        csr: Der(csr(key)),
        previous: Vec::new(),
    }
}

/// Without a delay for small writes, as agents connect.
async fn connected(collector: SocketAddr) -> TcpStream {
    let tcp = TcpStream::connect(collector).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    tcp
}

pub async fn enrol(
    collector: SocketAddr,
    pin: sidewarden_proto::identity::Sha256,
    request: &Request,
) -> Result<Issued, Refused> {
    let config = tls::pinned_client_config(pin, &[ALPN_ENROL]).unwrap();
    let tcp = connected(collector).await;
    let name = ServerName::try_from("collector").unwrap();
    let mut stream = TlsConnector::from(config).connect(name, tcp).await.unwrap();
    stream.write_all(&to_message(request)).await.unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    match from_payload(&bytes[4..]).unwrap() {
        Answer::Issued(issued) => Ok(issued),
        Answer::Refused(refused) => Err(refused),
    }
}

/// An agent with its identity and its unsent links.
pub struct Agent {
    pub id: AgentId,
    pub credential: Credential,
    pub trust: Trust,
    pub epoch: Epoch,
    pub links: Vec<Link>,
}

impl Agent {
    pub async fn enrolled(app: &App, workload: &str, instance: &str) -> Agent {
        let token = token(app, workload, 1);
        let key = KeyPair::generate().unwrap();
        let issued = enrol(app.agents, token.pin, &request(&token, workload, instance, &key)).await.unwrap();
        let mut epoch = Epoch([0; 16]);
        sidewarden_collector::random(&mut epoch.0);
        Agent::with(workload, instance, issued, &key, epoch)
    }

    pub fn with(workload: &str, instance: &str, issued: Issued, key: &KeyPair, epoch: Epoch) -> Agent {
        let chain: Vec<CertificateDer<'static>> = issued.chain.into_iter().map(|der| der.0.into()).collect();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let roots = issued.bundle.into_iter().map(|der| der.0.into()).collect();
        Agent {
            id: AgentId {
                workload: domain().workload(workload).unwrap(),
                instance: instance.parse::<InstanceId>().unwrap(),
            },
            credential: Credential::from_der(chain, key).unwrap(),
            trust: Trust::single(domain(), roots),
            epoch,
            links: Vec::new(),
        }
    }

    pub fn hello(&self) -> Hello {
        let instance = self.id.instance.clone();
        Hello {
            version: "0.1.0".into(),
            instance,
            epoch: self.epoch,
            directive: 0,
            heartbeat_secs: 5,
            understands: 0,
            at_us: Timestamp::now(),
            mode: String::new(),
        }
    }

    pub fn cursor(&self) -> Cursor {
        self.links.last().map_or(Cursor::START, |link| Cursor { seq: link.last_seq(), hash: link.hash() })
    }

    /// Seals `events` as the next link.
    pub fn seal(&mut self, mut events: Vec<Event>) -> Link {
        let at = self.cursor();
        let link = Link::Batch(Batch::seal(self.epoch, at.seq + 1, at.hash, &mut events).unwrap());
        self.links.push(link.clone());
        link
    }

    pub fn some_events(&mut self, count: usize) -> Link {
        let body = Body::from(AgentStopping { reason: "x".into() });
        let event = |i: usize| Event::new(Timestamp::now(), Severity::ALL[i % 4], format!("event {i}"), &body);
        self.seal((0..count).map(event).collect())
    }

    pub fn client_config(&self) -> Arc<rustls::ClientConfig> {
        let expect = Expect::Collector(domain());
        tls::client_config(&self.credential, &self.trust, expect, Floor::Tls13, &[ALPN]).unwrap()
    }

    pub async fn quic(&self, collector: SocketAddr) -> Connection {
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(self.client_config()).unwrap();
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let config = quinn::ClientConfig::new(Arc::new(crypto));
        let connection = endpoint.connect_with(config, collector, "collector").unwrap().await.unwrap();
        let (send, receive) = connection.open_bi().await.unwrap();
        Connection::new(receive, send, Some((endpoint, connection)))
    }

    pub async fn tcp(&self, collector: SocketAddr) -> Connection {
        let tcp = connected(collector).await;
        let name = ServerName::try_from("collector").unwrap();
        let stream = TlsConnector::from(self.client_config()).connect(name, tcp).await.unwrap();
        let (reader, writer) = tokio::io::split(stream);
        Connection::new(reader, writer, None)
    }

    /// A session that has been welcomed, with the cursor the collector knows.
    pub async fn session(&self, collector: SocketAddr) -> (Connection, Cursor) {
        let mut connection = self.quic(collector).await;
        connection.send(&Frame::Hello(self.hello())).await;
        match connection.next().await {
            Some(Frame::Welcome(welcome)) => (connection, welcome.cursor),
            other => panic!("no welcome but {other:?}"),
        }
    }
}

pub struct Connection {
    reader: Box<dyn AsyncRead + Unpin + Send>,
    writer: Box<dyn AsyncWrite + Unpin + Send>,
    decoder: Decoder,
    _quic: Option<(quinn::Endpoint, quinn::Connection)>,
}

impl Connection {
    pub fn new(
        reader: impl AsyncRead + Unpin + Send + 'static,
        writer: impl AsyncWrite + Unpin + Send + 'static,
        quic: Option<(quinn::Endpoint, quinn::Connection)>,
    ) -> Connection {
        Connection { reader: Box::new(reader), writer: Box::new(writer), decoder: Decoder::default(), _quic: quic }
    }

    pub async fn send(&mut self, frame: &Frame) {
        self.send_bytes(&frame.encode()).await;
    }

    /// The other side may have closed already: what it said is read with [`Connection::next`].
    pub async fn send_bytes(&mut self, bytes: &[u8]) {
        let _ = self.writer.write_all(bytes).await;
        let _ = self.writer.flush().await;
    }

    /// The next frame but directives; `None` at the end.
    pub async fn next(&mut self) -> Option<Frame> {
        loop {
            match self.any().await {
                Some(Frame::Directive(_)) => {}
                other => return other,
            }
        }
    }

    /// The next directive.
    pub async fn directive(&mut self) -> Vec<u8> {
        loop {
            match self.any().await {
                Some(Frame::Directive(bytes)) => return bytes,
                Some(_) => {}
                None => panic!("no directive"),
            }
        }
    }

    async fn any(&mut self) -> Option<Frame> {
        let next = async {
            loop {
                if let Some(frame) = self.decoder.next_frame().unwrap() {
                    return Some(frame);
                }
                let mut buffer = vec![0; 64 << 10];
                let read = self.reader.read(&mut buffer).await.unwrap_or(0);
                if read == 0 {
                    return None;
                }
                self.decoder.push(&buffer[..read]);
            }
        };
        tokio::time::timeout(LIMIT, next).await.expect("the collector says nothing")
    }

    /// Sends `link` and waits until it is acknowledged.
    pub async fn deliver(&mut self, link: Link) {
        let wanted = link.last_seq();
        self.send(&Frame::Link(link)).await;
        self.acked(wanted).await;
    }

    pub async fn acked(&mut self, wanted: u64) {
        loop {
            match self.next().await {
                Some(Frame::Ack(cursor)) if cursor.seq >= wanted => return,
                Some(Frame::Ack(_)) => {}
                other => panic!("no acknowledgement but {other:?}"),
            }
        }
    }

    /// The reason the collector gave for ending, or `closed`.
    pub async fn refusal(&mut self) -> String {
        loop {
            match self.next().await {
                Some(Frame::Refuse(refuse)) => return refuse.reason,
                Some(_) => {}
                None => return "closed".into(),
            }
        }
    }
}

/// Waits until `condition` holds.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
