//! The uplink against a minimal collector, made of `session::Receiver`, over real QUIC and real TCP.

use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;

use quinn::crypto::rustls::QuicServerConfig;
use sidewarden_proto::batch::{Cursor, Epoch, Link};
use sidewarden_proto::enrol::{Answer, to_message};
use sidewarden_proto::event::{AgentStopping, Event, Mode, Severity};
use sidewarden_proto::identity::Sha256;
use sidewarden_proto::session::{FromAgent, Receiver};
use sidewarden_proto::tls::{Floor, server_config};
use sidewarden_proto::wire::{ALPN, Decoder, Frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::*;
use crate::identity::Terms;
use crate::identity::made_up::Ca;
use crate::spool::{Limits, Writer};

/// What the collector has on its disk, and what it heard.
#[derive(Default)]
struct Log {
    links: Vec<Link>,
    epoch: Option<Epoch>,
    byes: Vec<String>,
    applied: Vec<u64>,
    sessions: usize,
}

impl Log {
    fn cursor(&self) -> Cursor {
        self.links.last().map_or(Cursor::START, |link| Cursor { seq: link.last_seq(), hash: link.hash() })
    }
}

struct Collector {
    ca: Arc<Ca>,
    log: Mutex<Log>,
    /// Sent to the agent right after the welcome.
    directives: Vec<Vec<u8>>,
    /// Cuts each session after this many links, without acknowledging the last.
    cut_after: Option<usize>,
}

impl Collector {
    fn new() -> Collector {
        Collector { ca: Arc::new(Ca::new("td")), log: Mutex::default(), directives: vec![], cut_after: None }
    }

    /// Serves QUIC and TCP on one port; `quic` can be left out.
    async fn listen(self: &Arc<Collector>, quic: bool) -> HostPort {
        self.listen_at(SocketAddr::from(([127, 0, 0, 1], 0)), quic).await
    }

    async fn listen_at(self: &Arc<Collector>, at: SocketAddr, quic: bool) -> HostPort {
        let tcp = TcpListener::bind(at).await.unwrap();
        let address = tcp.local_addr().unwrap();
        let tls = server_config(&self.ca.collector(), &self.ca.trust(), Floor::Tls13, &[ALPN]).unwrap();
        if quic {
            self.clone().listen_quic(address, tls.clone());
        }
        let this = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = tcp.accept().await {
                let (this, tls) = (this.clone(), tls.clone());
                tokio::spawn(async move {
                    let Ok(stream) = tokio_rustls::TlsAcceptor::from(tls).accept(stream).await else { return };
                    this.serve(stream).await;
                });
            }
        });
        HostPort { host: "127.0.0.1".into(), port: address.port() }
    }

    fn listen_quic(self: Arc<Collector>, address: SocketAddr, tls: Arc<rustls::ServerConfig>) {
        let crypto = QuicServerConfig::try_from(tls).unwrap();
        let endpoint = quinn::Endpoint::server(quinn::ServerConfig::with_crypto(Arc::new(crypto)), address).unwrap();
        tokio::spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                let this = self.clone();
                tokio::spawn(async move {
                    let Ok(connection) = incoming.await else { return };
                    let (send, receive) = connection.accept_bi().await.unwrap();
                    this.serve(tokio::io::join(receive, send)).await;
                    connection.closed().await;
                });
            }
        });
    }

    async fn serve<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(&self, mut stream: S) {
        let (mut decoder, mut receiver, mut buffer, mut links) = (Decoder::default(), None, [0; 4096], 0);
        loop {
            while let Some(frame) = decoder.next_frame().unwrap() {
                let now = std::time::Instant::now();
                let replies = match (&mut receiver, frame) {
                    (None, Frame::Hello(hello)) => {
                        let (made, welcome) = {
                            let mut log = self.log.lock().unwrap();
                            log.sessions += 1;
                            if log.epoch.is_some_and(|epoch| epoch != hello.epoch) {
                                log.links.clear();
                            }
                            log.epoch = Some(hello.epoch);
                            Receiver::new(&hello, log.cursor(), "test", now)
                        };
                        receiver = Some(made);
                        let directives = self.directives.iter().cloned().map(Frame::Directive);
                        [welcome].into_iter().chain(directives).collect()
                    }
                    (Some(receiver), frame) => {
                        let told = receiver.handle(frame, now).unwrap();
                        if matches!(told, Some(FromAgent::Commit(_))) {
                            links += 1;
                            if Some(links) == self.cut_after {
                                return;
                            }
                        }
                        self.obey(receiver, told)
                    }
                    (None, frame) => panic!("{frame:?} before a hello"),
                };
                for reply in replies {
                    stream.write_all(&reply.encode()).await.unwrap();
                }
            }
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(count) => decoder.push(&buffer[..count]),
            }
        }
    }

    fn obey(&self, receiver: &mut Receiver, told: Option<FromAgent>) -> Vec<Frame> {
        let mut log = self.log.lock().unwrap();
        match told {
            None => return vec![],
            Some(FromAgent::Commit(link)) => {
                log.links.push(link);
                return vec![receiver.committed(log.cursor())];
            }
            Some(FromAgent::Reply(frame)) => return vec![frame],
            Some(FromAgent::Renew(csr)) => {
                let answer = Answer::Issued(self.ca.sign_request("shop/web", &csr));
                return vec![Frame::Renewed(to_message(&answer)[4..].to_vec())];
            }
            Some(FromAgent::DirectiveApplied(version)) => log.applied.push(version),
            Some(FromAgent::Bye(reason)) => log.byes.push(reason),
        }
        vec![]
    }

    async fn wait<T>(&self, what: &str, pick: impl Fn(&Log) -> Option<T>) -> T {
        for _ in 0..2_000 {
            if let Some(found) = pick(&self.log.lock().unwrap()) {
                return found;
            }
            sleep(Duration::from_millis(5)).await;
        }
        panic!("{what} never came");
    }
}

struct Agent {
    spool: Spool,
    writer: Writer,
    _dir: tempfile::TempDir,
    identity: watch::Sender<Option<Arc<Identity>>>,
    renewals: mpsc::Sender<Renewal>,
    directives: watch::Receiver<Vec<u8>>,
    status: SharedStatus,
    shutdown: CancellationToken,
    running: tokio::task::JoinHandle<()>,
}

impl Agent {
    fn start(identity: Arc<Identity>, collectors: Vec<HostPort>) -> Agent {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits { disk_bytes: 8 << 20, memory_bytes: 1 << 20, links: 1_000 };
        let (spool, writer, _) =
            Spool::open(dir.path(), limits, sidewarden_proto::backoff::random, Timestamp::now).unwrap();
        let (publish, current) = watch::channel(Some(identity));
        let (renewals, renewal_requests) = mpsc::channel(1);
        let (directive_sender, directives) = watch::channel(Vec::new());
        let (status, shutdown) = (SharedStatus::default(), CancellationToken::new());
        let uplink = Uplink {
            collectors,
            instance: "c1".parse().unwrap(),
            identity: current,
            spool: spool.clone(),
            resolver: Resolver::from_system(),
            renewals: renewal_requests,
            directives: directive_sender,
            metrics: Arc::new(Metrics::new("test")),
            random: sidewarden_proto::backoff::random,
            go_home: Duration::from_millis(100),
            mode: Mode::Sidecar,
            status: status.clone(),
        };
        let running = tokio::spawn(uplink.run(shutdown.clone()));
        Agent { spool, writer, _dir: dir, identity: publish, renewals, directives, status, shutdown, running }
    }

    async fn emit(&self, count: usize) {
        for _ in 0..count {
            let body = AgentStopping { reason: "x".into() };
            self.spool.emit(Event::new(Timestamp::now(), Severity::Notice, "x", &body.into()));
            self.spool.flush().await;
        }
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.running.await.unwrap();
        self.writer.finish();
    }
}

#[tokio::test]
async fn events_arrive_are_acknowledged_and_the_agent_says_goodbye() {
    for quic in [true, false] {
        let collector = Arc::new(Collector::new());
        let at = collector.listen(quic).await;
        let agent = Agent::start(collector.ca.identity("shop/web"), vec![at]);
        agent.emit(5).await;
        collector.wait("the last event", |log| (log.cursor().seq == 5).then_some(())).await;
        let transport = agent.status.lock().unwrap().session.clone().unwrap().1;
        assert_eq!(transport, if quic { "quic" } else { "tcp" });
        let spool = agent.spool.clone();
        agent.stop().await;
        assert_eq!(collector.wait("a goodbye", |log| log.byes.first().cloned()).await, "the agent ends");
        assert_eq!(spool.stats().links.load(Relaxed), 0, "everything is acknowledged");
    }
}

#[tokio::test]
async fn a_session_that_is_cut_again_and_again_loses_and_repeats_nothing() {
    let collector = Arc::new(Collector { cut_after: Some(3), ..Collector::new() });
    let at = collector.listen(true).await;
    let agent = Agent::start(collector.ca.identity("shop/web"), vec![at]);
    agent.emit(9).await;
    collector.wait("the last event", |log| (log.cursor().seq == 9).then_some(())).await;
    let log = collector.log.lock().unwrap();
    let seqs: Vec<u64> = log.links.iter().map(Link::first_seq).collect();
    assert_eq!(seqs, (1..=9).collect::<Vec<_>>());
    assert!(log.sessions >= 4, "{} sessions", log.sessions);
    drop(log);
    agent.running.abort();
}

#[tokio::test]
async fn a_collector_that_is_not_there_is_passed_over() {
    let collector = Arc::new(Collector::new());
    let at = collector.listen(true).await;
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let gone = HostPort { host: "127.0.0.1".into(), port: nobody.port() };
    let agent = Agent::start(collector.ca.identity("shop/web"), vec![gone, at]);
    agent.emit(1).await;
    collector.wait("the event", |log| (log.cursor().seq == 1).then_some(())).await;
    agent.stop().await;
}

#[tokio::test]
async fn an_agent_goes_back_to_the_first_collector_when_that_is_there_again() {
    let first = Arc::new(Collector::new());
    let ca = first.ca.clone();
    let second = Arc::new(Collector { ca: ca.clone(), ..Collector::new() });
    // Its port is taken until it comes.
    let held = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = HostPort { host: "127.0.0.1".into(), port: held.local_addr().unwrap().port() };
    drop(held);
    let other = second.listen(true).await;
    let agent = Agent::start(ca.identity("shop/web"), vec![at.clone(), other]);
    agent.emit(1).await;
    second.wait("the event", |log| (log.cursor().seq == 1).then_some(())).await;
    first.listen_at(SocketAddr::from(([127, 0, 0, 1], at.port)), false).await;
    first.wait("a session", |log| (log.sessions > 0).then_some(())).await;
    assert_eq!(second.wait("a goodbye", |log| log.byes.first().cloned()).await, "it goes to another collector");
    agent.emit(1).await;
    first.wait("the next event", |log| (log.cursor().seq == 2).then_some(())).await;
    agent.stop().await;
}

#[tokio::test]
async fn an_impostor_gets_no_event() {
    let impostor = Arc::new(Collector::new());
    let at = impostor.listen(true).await;
    let agent = Agent::start(Ca::new("td").identity("shop/web"), vec![at]);
    agent.emit(1).await;
    let error = loop {
        if let Some(error) = agent.status.lock().unwrap().last_error.clone() {
            break error;
        }
        tokio::task::yield_now().await;
    };
    assert!(error.contains("signed by a CA that is not trusted here"), "{error}");
    assert_eq!(impostor.log.lock().unwrap().sessions, 0);
    agent.stop().await;
}

#[tokio::test]
async fn a_collector_with_another_history_gets_everything_in_a_new_epoch() {
    let collector = Arc::new(Collector::new());
    let at = collector.listen(true).await;
    let agent = Agent::start(collector.ca.identity("shop/web"), vec![at]);
    let before = agent.spool.epoch();
    {
        // As if the spool had been restored from a copy: the collector is ahead of it.
        let mut log = collector.log.lock().unwrap();
        let mut events =
            vec![Event::new(Timestamp(1), Severity::Info, "y", &AgentStopping { reason: "y".into() }.into())];
        let batch = sidewarden_proto::batch::Batch::seal(before, 1, Sha256::ZERO, &mut events).unwrap();
        (log.links, log.epoch) = (vec![Link::Batch(batch)], Some(before));
    }
    agent.emit(2).await;
    let epoch = collector.wait("a new epoch", |log| (log.cursor().seq == 2).then_some(log.epoch)).await;
    assert!(epoch.is_some_and(|epoch| epoch != before));
    agent.stop().await;
}

#[tokio::test]
async fn directives_go_down_and_their_version_comes_back() {
    let mut collector = Collector::new();
    let signed = collector.ca.directive(7, vec![], Timestamp::now());
    collector.directives = vec![signed.to_bytes()];
    let collector = Arc::new(collector);
    let at = collector.listen(true).await;
    let issued = collector.ca.issue("shop/web");
    let identity = Arc::new(Identity::build(issued.check().unwrap(), None, &Terms::default()).unwrap());
    let mut agent = Agent::start(identity, vec![at]);
    agent.directives.changed().await.unwrap();
    assert_eq!(*agent.directives.borrow(), signed.to_bytes());
    let directive = Arc::new(signed.open(&collector.ca.trust(), Timestamp::now()).unwrap());
    let with = Identity::build(issued.check().unwrap(), Some(directive), &Terms::default()).unwrap();
    agent.identity.send_replace(Some(Arc::new(with)));
    assert_eq!(collector.wait("the version", |log| log.applied.first().copied()).await, 7);
    agent.stop().await;
}

#[tokio::test]
async fn of_directives_that_nobody_has_looked_at_yet_the_newest_is_there() {
    let mut collector = Collector::new();
    let signed = |version| collector.ca.directive(version, vec![], Timestamp::now()).to_bytes();
    let directives: Vec<_> = (1..=8).map(signed).collect();
    collector.directives = directives.clone();
    let collector = Arc::new(collector);
    let at = collector.listen(true).await;
    let mut agent = Agent::start(collector.ca.identity("shop/web"), vec![at]);
    let newest = agent.directives.wait_for(|bytes| *bytes == directives[7]);
    assert!(timeout(Duration::from_secs(10), newest).await.is_ok());
    agent.stop().await;
}

#[tokio::test]
async fn a_renewal_goes_over_the_session_and_a_new_certificate_makes_a_new_session() {
    let collector = Arc::new(Collector::new());
    let at = collector.listen(true).await;
    let agent = Agent::start(collector.ca.identity("shop/web"), vec![at]);
    let key = crate::identity::enrol::new_key().unwrap();
    let csr = crate::identity::enrol::certificate_request(&key).unwrap().0;
    let (answer, answered) = oneshot::channel();
    agent.renewals.send(Renewal { csr, answer }).await.unwrap();
    let payload = answered.await.unwrap();
    assert!(matches!(sidewarden_proto::enrol::from_payload(&payload).unwrap(), Answer::Issued(_)));
    agent.identity.send_replace(Some(collector.ca.identity("shop/web")));
    collector.wait("a second session", |log| (log.sessions == 2).then_some(())).await;
    agent.stop().await;
}
