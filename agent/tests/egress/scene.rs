//! An agent's proxy with nothing but egress, and whom its workload wants to reach.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use sidewarden_agent::config::Config;
use sidewarden_agent::dial::Resolver;
use sidewarden_agent::metrics::Metrics;
use sidewarden_agent::proxy::{Listeners, Shared};
use sidewarden_agent::spool::SpoolStats;
use sidewarden_proto::backoff;
use sidewarden_proto::event::{Body, ConnectionRefused, Event, PeerFirstSeen, RefusalReason};
use sidewarden_proto::time::Timestamp;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::watch;

/// The limit of every wait: it only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(30);

/// The proxy of an agent.
pub struct Agent {
    /// The one that clients know, then those for redirected connections.
    pub egress: Vec<SocketAddr>,
    pub metrics: Arc<Metrics>,
    pub shared: Arc<Shared>,
    events: Arc<Mutex<Vec<Event>>>,
    serving: tokio::task::JoinHandle<()>,
}

impl Agent {
    /// With `egress` as its section of that name; `more` for other sections.
    pub async fn start(egress: &str, more: &str, resolver: Resolver) -> Agent {
        let text = format!("collector.addresses = ['127.0.0.1:1']\n{more}\n[egress]\n{egress}");
        let config = Config::parse(&text, &|_| None).unwrap_or_else(|faults| panic!("{faults}"));
        let listeners = Listeners::bind(&config).await.unwrap();
        let egress = listeners.egress_addresses();
        let events: Arc<Mutex<Vec<Event>>> = Arc::default();
        let told = events.clone();
        let emit: Arc<dyn Fn(Event) + Send + Sync> = Arc::new(move |event| told.lock().unwrap().push(event));
        let metrics = Arc::new(Metrics::new("test"));
        let nobody = watch::channel(None).1;
        let shared = Arc::new(Shared::new(&config, nobody, resolver, emit, metrics.clone(), backoff::random));
        let serving = tokio::spawn(listeners.serve(shared.clone()));
        Agent { egress, metrics, shared, events, serving }
    }

    /// Listens on any port of loopback.
    pub async fn explicit(egress: &str, resolver: Resolver) -> Agent {
        Agent::start(&format!("listen = '127.0.0.1:0'\n{egress}"), "", resolver).await
    }

    /// `http://…` of the listener that clients know.
    pub fn proxy(&self) -> String {
        format!("http://{}", self.egress[0])
    }

    pub async fn dial(&self) -> TcpStream {
        TcpStream::connect(self.egress[0]).await.unwrap()
    }

    /// The first event that `pick` takes, now or soon.
    pub async fn event<T>(&self, pick: impl Fn(&Body) -> Option<T>) -> T {
        let search = async {
            loop {
                let found = self.events.lock().unwrap().iter().find_map(|event| pick(&event.body().unwrap().unwrap()));
                match found {
                    Some(found) => return found,
                    None => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        };
        let found = tokio::time::timeout(LIMIT, search).await;
        found.unwrap_or_else(|_| panic!("no such event among {:#?}", self.summaries()))
    }

    pub async fn refusal(&self, reason: RefusalReason) -> ConnectionRefused {
        self.event(|body| match body {
            Body::ConnectionRefused(refused) if refused.reason == reason => Some(refused.clone()),
            _ => None,
        })
        .await
    }

    pub async fn first_seen(&self) -> PeerFirstSeen {
        self.event(|body| if let Body::PeerFirstSeen(seen) = body { Some(seen.clone()) } else { None }).await
    }

    pub fn summaries(&self) -> Vec<String> {
        self.events.lock().unwrap().iter().map(|event| event.summary.clone()).collect()
    }

    /// Stops it, and gives every event it ever told: what was counted only is told at the end.
    pub async fn stop(self) -> Vec<Event> {
        self.shared.stop.cancel();
        self.shared.cut.cancel();
        tokio::time::timeout(LIMIT, self.serving).await.expect("an end").unwrap();
        std::mem::take(&mut *self.events.lock().unwrap())
    }

    pub fn counted(&self, line: &str) -> bool {
        let text = self.metrics.render(&SpoolStats::default(), None, None, Timestamp(0));
        String::from_utf8(text).unwrap().lines().any(|found| found == line)
    }
}

/// A server that speaks HTTP/1.1, and what it was sent.
#[derive(Clone)]
pub struct Server {
    pub address: SocketAddr,
    pub requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    pub async fn start(address: &str) -> Server {
        let listener = TcpListener::bind(address).await.unwrap();
        let server = Server { address: listener.local_addr().unwrap(), requests: Arc::default() };
        let requests = server.requests.clone();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                tokio::spawn(answer(tcp, requests.clone()));
            }
        });
        server
    }

    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

/// Answers as many requests as come, with the length of their body; never closes by itself.
async fn answer(mut tcp: TcpStream, requests: Arc<Mutex<Vec<String>>>) {
    let mut bytes = Vec::new();
    loop {
        let Some(end) = until(&mut tcp, &mut bytes, |bytes| find(bytes, b"\r\n\r\n").map(|at| at + 4)).await else {
            return;
        };
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        bytes.drain(..end);
        requests.lock().unwrap().push(head.clone());
        let lower = head.to_ascii_lowercase();
        if lower.contains("expect: 100-continue") {
            tcp.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
        }
        let length = lower.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
        let body = match length {
            Some(length) => until(&mut tcp, &mut bytes, |bytes| (bytes.len() >= length).then_some(length)).await,
            None if lower.contains("transfer-encoding: chunked") => {
                until(&mut tcp, &mut bytes, |bytes| find(bytes, b"0\r\n\r\n").map(|at| at + 5)).await
            }
            None => Some(0),
        };
        let Some(body) = body else { return };
        bytes.drain(..body);
        let text = format!("{body} bytes came");
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: keep-alive\r\nKeep-Alive: timeout=60\r\n\r\n{text}",
            text.len()
        );
        if tcp.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

async fn until(tcp: &mut TcpStream, bytes: &mut Vec<u8>, whole: impl Fn(&[u8]) -> Option<usize>) -> Option<usize> {
    loop {
        if let Some(length) = whole(bytes) {
            return Some(length);
        }
        if tcp.read_buf(bytes).await.ok()? == 0 {
            return None;
        }
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// A DNS server that answers as it is told, with records that must not be kept.
pub struct Dns {
    pub address: SocketAddr,
    /// The names it was asked for, one for each type.
    pub asked: Arc<Mutex<Vec<String>>>,
}

impl Dns {
    /// `answer` gets a name and how often it was asked for it before, and says its addresses.
    pub async fn start(answer: impl Fn(&str, usize) -> Vec<IpAddr> + Send + 'static) -> Dns {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let dns = Dns { address: socket.local_addr().unwrap(), asked: Arc::default() };
        let asked = dns.asked.clone();
        tokio::spawn(async move {
            let mut query = [0; 1024];
            while let Ok((length, client)) = socket.recv_from(&mut query).await {
                let (name, kind, end) = question(&query[..length]);
                let before = asked.lock().unwrap().iter().filter(|asked| **asked == format!("{name} {kind}")).count();
                asked.lock().unwrap().push(format!("{name} {kind}"));
                let reply = reply(&query[..end], kind, &answer(&name, before));
                socket.send_to(&reply, client).await.unwrap();
            }
        });
        dns
    }

    /// Every name is at these addresses.
    pub async fn of(addresses: &[&str]) -> Dns {
        let addresses: Vec<IpAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
        Dns::start(move |_, _| addresses.clone()).await
    }

    pub fn resolver(&self) -> Resolver {
        Resolver::with_server(self.address)
    }

    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

/// The name asked for, its type, and where the question ends.
fn question(query: &[u8]) -> (String, u16, usize) {
    let (mut at, mut labels) = (12, Vec::new());
    while query[at] != 0 {
        let length = usize::from(query[at]);
        labels.push(String::from_utf8_lossy(&query[at + 1..at + 1 + length]).to_ascii_lowercase());
        at += 1 + length;
    }
    (labels.join("."), u16::from_be_bytes([query[at + 1], query[at + 2]]), at + 5)
}

fn reply(question: &[u8], kind: u16, addresses: &[IpAddr]) -> Vec<u8> {
    let data = |ip: &IpAddr| match (ip, kind) {
        (IpAddr::V4(ip), 1) => Some(ip.octets().to_vec()),
        (IpAddr::V6(ip), 28) => Some(ip.octets().to_vec()),
        _ => None,
    };
    let records: Vec<Vec<u8>> = addresses.iter().filter_map(data).collect();
    let mut reply = question.to_vec();
    // A name without any address at all does not exist.
    reply[2..4].copy_from_slice(&[0x81, if addresses.is_empty() { 0x83 } else { 0x80 }]);
    reply[4..12].copy_from_slice(&[0, 1, 0, records.len() as u8, 0, 0, 0, 0]);
    for record in records {
        reply.extend([0xc0, 12]);
        reply.extend(kind.to_be_bytes());
        reply.extend([0, 1, 0, 0, 0, 0]);
        reply.extend((record.len() as u16).to_be_bytes());
        reply.extend(record);
    }
    reply
}

/// Where a program is; `None` if this test is to be left out for want of it.
pub fn program(name: &str, package: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let found =
        path.split(':').chain(["/usr/sbin", "/sbin"]).map(|dir| PathBuf::from(dir).join(name)).find(|p| p.is_file());
    if found.is_none() && std::env::var_os("SIDEWARDEN_ALLOW_SKIP").is_some_and(|v| v == "1") {
        println!("SKIPPED: there is no {name}");
        return None;
    }
    assert!(found.is_some(), "{name} is not installed: apt-get install {package}, or set SIDEWARDEN_ALLOW_SKIP=1");
    found
}

/// A public address, of a test that is [`isolated`].
pub const OUTSIDE: &str = "93.184.216.34";
/// The same for IPv6.
pub const OUTSIDE_V6: &str = "2606:2800:220:1::34";

/// Runs `test` in a network namespace of its own, where every address is this machine's, and no packet leaves.
pub fn isolated<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let Some(ip) = program("ip", "iproute2") else { return };
    let ran = std::thread::spawn(move || {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            let skip = std::env::var_os("SIDEWARDEN_ALLOW_SKIP").is_some_and(|v| v == "1");
            assert!(skip, "a network namespace of its own: {error}: run as root, or set SIDEWARDEN_ALLOW_SKIP=1");
            return println!("SKIPPED: a network namespace of its own: {error}");
        }
        for line in [
            "link set lo up",
            "route add local default dev lo",
            "-6 route add local default dev lo",
            // IPv6 listens only on what an interface has.
            &format!("address add {OUTSIDE_V6}/128 dev lo nodad"),
        ] {
            must(Command::new(&ip).args(line.split(' ')));
        }
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test());
    });
    if let Err(panic) = ran.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a command that has to succeed.
pub fn must(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What curl printed, its exit code, and its complaint.
#[derive(Debug)]
pub struct Curled {
    pub code: i32,
    pub out: String,
    pub err: String,
}

/// Runs curl with `args`; `None` if there is none and that is allowed.
pub async fn curl(args: &[&str]) -> Option<Curled> {
    curl_as(args, |_| {}).await
}

pub async fn curl_as(args: &[&str], change: impl FnOnce(&mut Command)) -> Option<Curled> {
    let mut command = Command::new(program("curl", "curl")?);
    command.args(["-q", "-sS", "--max-time", "20"]).args(args).env_clear().stdin(Stdio::null());
    change(&mut command);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let Output { status, stdout, stderr } = output;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Some(Curled { code: status.code().unwrap_or(-1), out: text(stdout), err: text(stderr) })
}

/// A program that ends with the test.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A port that was free just now.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Waits until `address` takes connections.
pub async fn listens(address: SocketAddr) {
    let trying = async {
        while TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, trying).await.unwrap_or_else(|_| panic!("nobody listens on {address}"));
}

/// `openssl s_server` on `address`, which answers `GET /` with its state.
pub async fn tls_server(address: &str, dir: &std::path::Path) -> Option<(SocketAddr, Running)> {
    let openssl = program("openssl", "openssl")?;
    let (key, cert) = (dir.join("key.pem"), dir.join("cert.pem"));
    let made = Command::new(&openssl)
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=api.example.com", "-addext", "subjectAltName=DNS:api.example.com", "-keyout"])
        .args([key.as_os_str(), "-out".as_ref(), cert.as_os_str()])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let child = Command::new(openssl)
        .args(["s_server", "-www", "-quiet", "-accept", address, "-key"])
        .args([key.as_os_str(), "-cert".as_ref(), cert.as_os_str()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (running, address) = (Running(child), address.parse().unwrap());
    listens(address).await;
    Some((address, running))
}

/// Reads to the end, within a limit; a reset is an end too, told by `false`.
pub async fn read_all(tcp: &mut TcpStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(LIMIT, tcp.read_to_end(&mut bytes)).await.expect("an end");
    (bytes, read.is_ok())
}
