//! A collector and agents in this process: real sockets on free ports of addresses that nobody else has, a real CA, real
//! disks in a temporary folder.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sidewarden_agent::app::{self as agent, Setup};
use sidewarden_agent::config::Config as AgentConfig;
use sidewarden_collector::app::{self as collector};
use sidewarden_collector::config as collector_config;
use sidewarden_collector::index::{Order, Query, Record};
use sidewarden_proto::backoff;
use sidewarden_proto::event::Mode;
use sidewarden_proto::secret::Secret;
use sidewarden_proto::time::Timestamp;
use sidewarden_tests::service::own_ip;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

/// Everything in these tests happens by then, or the test fails and says what did not.
const LIMIT: Duration = Duration::from_secs(60);

/// A folder, a collector in it, and what is needed to start it again on the same ports.
pub struct World {
    pub dir: TempDir,
    pub collector: Option<collector::App>,
    pub agents: SocketAddr,
    /// Further collectors that agents know.
    pub others: Vec<SocketAddr>,
    extra: String,
}

impl World {
    pub async fn start() -> World {
        World::start_with("").await
    }

    /// With more settings of the collector.
    pub async fn start_with(extra: &str) -> World {
        let dir = TempDir::new().unwrap();
        let free = SocketAddr::from((own_ip(), 0));
        let app = start_collector(dir.path(), free, extra).await;
        World { dir, agents: app.agents, others: Vec::new(), collector: Some(app), extra: extra.to_owned() }
    }

    /// With a collector on threads of its own: dropped with [`Runtime::shutdown_background`], it ends as by `kill -9`.
    #[allow(dead_code)] // for the tests of availability
    pub async fn start_apart(extra: &'static str) -> (World, Runtime) {
        let apart = Runtime::new().unwrap();
        let dir = TempDir::new().unwrap();
        let (path, free) = (dir.path().to_owned(), SocketAddr::from((own_ip(), 0)));
        let app = apart.spawn(async move { start_collector(&path, free, extra).await }).await.unwrap();
        let (agents, extra) = (app.agents, extra.to_owned());
        (World { dir, agents, others: Vec::new(), collector: Some(app), extra }, apart)
    }

    pub fn collector(&self) -> &collector::App {
        self.collector.as_ref().expect("the collector runs in this part of the test")
    }

    pub async fn stop_collector(&mut self) {
        self.collector.take().expect("it ran").stop().await;
    }

    /// On the same ports. QUIC lets go of its own a moment after the collector has stopped, where the process goes on.
    pub async fn start_collector_again(&mut self) {
        let started = async || match try_start_collector(self.dir.path(), self.agents, &self.extra).await {
            Err(error) if error.to_string().contains("already in use") => None,
            started => Some(started.unwrap()),
        };
        self.collector = Some(eventually(|| format!("the port of {} stays taken", self.agents), started).await);
    }

    /// A token for `pattern`; its text.
    pub fn token(&self, pattern: &str, uses: u32, life: Duration) -> Secret {
        let issuer = &self.collector().core.issuer;
        let pin = issuer.authority().pin();
        let now = Timestamp::now();
        issuer.register().create(&pattern.parse().unwrap(), uses, life, pin, now).unwrap().0.text()
    }

    /// Puts a token where the agent `name` looks for one.
    pub fn hand_token(&self, name: &str, token: &Secret) -> PathBuf {
        let path = self.dir.path().join(format!("{name}.token"));
        std::fs::write(&path, token.reveal()).unwrap();
        path
    }

    /// An agent with a fresh token for `workload`, and `rules` in its settings.
    pub async fn agent(&self, name: &str, workload: &str, rules: &str) -> Agent {
        self.hand_token(name, &self.token(workload, 1, Duration::from_secs(600)));
        self.agent_without_token(name, rules).await
    }

    pub async fn agent_without_token(&self, name: &str, rules: &str) -> Agent {
        self.agent_below(name, rules, None).await
    }

    /// The same, watching a machine whose /proc and /sys are below `root`.
    pub async fn agent_below(&self, name: &str, rules: &str, root: Option<PathBuf>) -> Agent {
        let token = self.dir.path().join(format!("{name}.token"));
        self.agent_of(name, &format!("collector.token_file = '{}'\n{rules}", token.display()), root).await
    }

    /// An agent whose identity is where `settings` say.
    pub async fn agent_of(&self, name: &str, settings: &str, root: Option<PathBuf>) -> Agent {
        let collectors: Vec<SocketAddr> = [self.agents].iter().chain(&self.others).copied().collect();
        agent_in(self.dir.path(), &collectors, name, settings, root).await
    }

    /// Every event of `kind` that the collector has, oldest first.
    pub async fn events(&self, kind: &str) -> Vec<Record> {
        self.query(Query { kinds: vec![kind.to_owned()], ..all() }).await
    }

    /// Every event, of whatever kind, oldest first.
    pub async fn query(&self, query: Query) -> Vec<Record> {
        self.collector().core.index.query(query).await.unwrap().events
    }

    /// The first event of `kind` for which `holds`, now or soon.
    pub async fn event(&self, kind: &str, holds: impl Fn(&Record) -> bool) -> Record {
        let told = std::sync::Mutex::new(Vec::new());
        let search = async || {
            let events = self.events(kind).await;
            *told.lock().unwrap() = events.iter().map(|record| record.summary.clone()).collect();
            events.into_iter().find(&holds)
        };
        eventually(|| format!("no such {kind} among {:#?}", told.lock().unwrap()), search).await
    }
}

pub fn all() -> Query {
    Query { order: Order::Oldest(None), limit: 1000, ..Query::default() }
}

async fn start_collector(dir: &Path, agents: SocketAddr, extra: &str) -> collector::App {
    try_start_collector(dir, agents, extra).await.unwrap()
}

async fn try_start_collector(dir: &Path, agents: SocketAddr, extra: &str) -> anyhow::Result<collector::App> {
    let text = format!(
        "data_dir = '{}'\ninstance = 'test'\nagents.listen = '{agents}'\napi.listen = '127.0.0.1:0'\n\
         metrics.listen = '127.0.0.1:0'\n{extra}",
        dir.join("collector").display()
    );
    collector::start(collector_config::read(&text, &|_| None).unwrap(), Timestamp::now).await
}

/// An agent that keeps its data in a folder of `dir`.
pub async fn agent_in(
    dir: &Path,
    collectors: &[SocketAddr],
    name: &str,
    settings: &str,
    root: Option<PathBuf>,
) -> Agent {
    let home = dir.join(name);
    let collectors: Vec<String> = collectors.iter().map(|at| format!("'{at}'")).collect();
    let text = format!(
        "data_dir = '{}'\ninstance = '{name}'\ntimeouts.drain = '4s'\ncollector.addresses = [{}]\n\
         admin.listen = '127.0.0.1:0'\n{settings}",
        home.display(),
        collectors.join(", "),
    );
    let config = AgentConfig::parse(&text, &|_| None).unwrap();
    let setup = Setup { mode: Mode::Sidecar, config, root, shares_user: false, random: backoff::random };
    Agent { app: agent::start(setup).await.unwrap(), home }
}

/// A running agent.
pub struct Agent {
    pub app: agent::App,
    pub home: PathBuf,
}

impl Agent {
    pub fn inbound(&self) -> SocketAddr {
        self.app.addresses.inbound[0]
    }

    pub async fn dial(&self) -> TcpStream {
        TcpStream::connect(self.app.addresses.outbound[0]).await.unwrap()
    }

    /// Waits until it has a certificate.
    pub async fn enrolled(&self) {
        let mut identity = self.app.identity.clone();
        let found = tokio::time::timeout(LIMIT, identity.wait_for(Option::is_some)).await;
        found.expect("an identity in time").expect("a keeper that lives");
    }

    /// What its admin endpoint answers for `path`.
    pub async fn admin(&self, path: &str) -> String {
        http(self.app.addresses.admin, &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).await
    }
}

pub async fn http(address: SocketAddr, request: &str) -> String {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(LIMIT, socket.read_to_end(&mut answer)).await.expect("an end");
    String::from_utf8_lossy(&answer).into_owned()
}

/// Asks again until there is an answer.
pub async fn eventually<T>(what: impl Fn() -> String, ask: impl AsyncFn() -> Option<T>) -> T {
    let asking = async {
        loop {
            if let Some(found) = ask().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, asking).await.unwrap_or_else(|_| panic!("{}, after {LIMIT:?}", what()))
}

/// A workload that sends back what it gets.
pub async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = socket.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    address
}

pub fn inbound(to: SocketAddr, allow: &str) -> String {
    format!(
        "[[inbound]]\nlisten = '{}:0'\nto = '{to}'\nallow = ['spiffe://sidewarden.internal/{allow}']\nhold_service_port = false\n",
        own_ip()
    )
}

pub fn outbound(to: SocketAddr, peer: &str) -> String {
    format!("[[outbound]]\nlisten = '{}:0'\nto = '{to}'\npeer = 'spiffe://sidewarden.internal/{peer}'\n", own_ip())
}

/// Sends `text` and waits for it to come back.
pub async fn says(socket: &mut TcpStream, text: &[u8]) -> std::io::Result<Vec<u8>> {
    socket.write_all(text).await?;
    let mut answer = vec![0; text.len()];
    tokio::time::timeout(LIMIT, socket.read_exact(&mut answer)).await.expect("an answer or an end")?;
    Ok(answer)
}

/// Takes HTTP requests and keeps their bodies, as the far end of a webhook.
pub async fn hook() -> (SocketAddr, Arc<std::sync::Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let bodies = Arc::new(std::sync::Mutex::new(Vec::new()));
    let kept = bodies.clone();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let kept = kept.clone();
            tokio::spawn(async move {
                let mut request = Vec::new();
                while !is_whole(&request) && socket.read_buf(&mut request).await.is_ok_and(|n| n > 0) {}
                kept.lock().unwrap().push(String::from_utf8_lossy(&request).into_owned());
                let _ = socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
            });
        }
    });
    (address, bodies)
}

fn is_whole(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request).to_ascii_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    body.len() >= length.unwrap_or(0usize)
}
