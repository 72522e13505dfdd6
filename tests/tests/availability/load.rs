//! The whole of it at once: root and issuing CAs replaced, every leaf renewed, and a collector killed, while requests of all
//! kinds and long downloads run through the agents. Nothing fails, and nothing open is seen on any wire.
//!
//! Through six agents with every run of the tests; through twenty, with wrk, by hand:
//! `cargo test -p sidewarden-tests --test availability -- --ignored --nocapture twenty`

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use sidewarden_collector::ca::rotate::Step;
use sidewarden_proto::identity::Sha256;
use sidewarden_proto::tls;
use sidewarden_tests::metrics::scrape;
use sidewarden_tests::tap::Tap;
use sidewarden_tests::{command, packages};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::world::{Agent, World, eventually, inbound, outbound};
use super::{connected, second, turn};

/// How many clients there are, each with a service of its own, and what the first of them do; the rest make requests, each
/// on a connection of its own or one after the other.
struct Plan {
    pairs: usize,
    wrk: usize,
    downloads: usize,
}

/// In every answer; never on a wire.
const CANARY: &str = "canary-in-plain-words-4711";
/// A server thinks for this long, so that the load leaves the machine some time for everything else.
const THINKS: Duration = Duration::from_millis(10);

/// A client, the wire, and the service.
struct Line {
    client: Agent,
    service: Agent,
    tap: Tap,
}

async fn line(world: &World, number: usize, server: SocketAddr) -> Line {
    let (service, client) = (format!("shop/orders{number}"), format!("shop/web{number}"));
    let rules = inbound(server, &client);
    let service_agent = world.agent(&format!("orders{number}-1"), &service, &rules).await;
    let tap = Tap::start(service_agent.inbound(), &[CANARY, "HTTP/1.", "GET /"]).unwrap();
    let client = world.agent(&format!("web{number}-1"), &client, &outbound(tap.address, &service)).await;
    Line { client, service: service_agent, tap }
}

fn names(pairs: usize) -> Vec<String> {
    (0..pairs).flat_map(|number| [format!("orders{number}-1"), format!("web{number}-1")]).collect()
}

/// The byte at a place of a download.
fn pattern(at: usize) -> u8 {
    CANARY.as_bytes()[at % CANARY.len()]
}

/// `GET /page` is answered at once and the connection kept; `GET /download` goes on until `end`.
async fn http_server(end: Arc<AtomicBool>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let end = end.clone();
            tokio::spawn(async move { drop(answer(socket, &end).await) });
        }
    });
    address
}

async fn answer(mut socket: TcpStream, end: &AtomicBool) -> std::io::Result<()> {
    let mut request = Vec::new();
    loop {
        while !request.ends_with(b"\r\n\r\n") {
            if socket.read_buf(&mut request).await? == 0 {
                return Ok(());
            }
        }
        if request.starts_with(b"GET /download") {
            return stream(socket, end).await;
        }
        request.clear();
        tokio::time::sleep(THINKS).await;
        let page = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{CANARY}", CANARY.len());
        socket.write_all(page.as_bytes()).await?;
    }
}

async fn stream(mut socket: TcpStream, end: &AtomicBool) -> std::io::Result<()> {
    let part: Vec<u8> = (0..CANARY.len() * 1000).map(pattern).collect();
    while !end.load(Relaxed) {
        socket.write_all(&part).await?;
        tokio::time::sleep(THINKS).await;
    }
    socket.shutdown().await
}

/// What runs through the agents until `end`; each part gives how much it had, or what failed.
struct Load {
    end: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<Result<u64, String>>>,
}

impl Load {
    fn start(plan: &Plan, lines: &[Line], end: Arc<AtomicBool>) -> Load {
        let done = Arc::new(AtomicU64::new(0));
        let mut tasks = Vec::new();
        for (number, line) in lines.iter().enumerate() {
            let to = line.client.app.addresses.outbound[0];
            let (end, done) = (end.clone(), done.clone());
            tasks.push(match number {
                _ if number < plan.wrk => tokio::task::spawn_blocking(move || wrk(to, &end)),
                _ if number < plan.wrk + plan.downloads => {
                    tokio::spawn(async move { download(to).await.map_err(|e| format!("a download: {e}")) })
                }
                _ => {
                    let keeps = number % 2 == 0;
                    let asking = async move { ask_again(to, keeps, &end, &done).await };
                    tokio::spawn(async move { asking.await.map_err(|e| format!("a request, kept {keeps}: {e}")) })
                }
            });
        }
        Load { end, done, tasks }
    }

    /// Until so many more requests were answered, or something has failed.
    async fn goes_on(&self) {
        let wanted = self.done.load(Relaxed) + 200;
        let enough = async || {
            (self.done.load(Relaxed) >= wanted || self.tasks.iter().any(JoinHandle::is_finished)).then_some(())
        };
        eventually(|| format!("{} of {wanted} requests", self.done.load(Relaxed)), enough).await;
    }

    /// What each part had.
    async fn stop(self) -> Vec<u64> {
        self.end.store(true, Relaxed);
        let mut had = Vec::new();
        for task in self.tasks {
            had.push(task.await.unwrap().unwrap());
        }
        had
    }
}

/// wrk, again and again; how many requests it made.
fn wrk(to: SocketAddr, end: &AtomicBool) -> Result<u64, String> {
    let (program, url, mut requests) = (packages::find("wrk").unwrap(), format!("http://{to}/page"), 0);
    while !end.load(Relaxed) {
        let args = ["--threads", "1", "--connections", "4", "--duration", "3s", "--timeout", "30s", &url];
        let said = command::run(&program, args).output().map_err(|e| format!("wrk: {e:#}"))?;
        if said.contains("Non-2xx") || said.contains("Socket errors") {
            return Err(said);
        }
        let count = said.split(" requests in ").next().and_then(|text| text.split_whitespace().last());
        requests += count.and_then(|count| count.parse::<u64>().ok()).ok_or_else(|| format!("wrk said {said}"))?;
    }
    Ok(requests)
}

/// One download, as long as everything else; every byte is looked at, and the end must be a clean one.
async fn download(to: SocketAddr) -> std::io::Result<u64> {
    let mut socket = TcpStream::connect(to).await?;
    socket.write_all(b"GET /download HTTP/1.1\r\n\r\n").await?;
    let (mut buffer, mut at) = (vec![0; 64 << 10], 0_usize);
    loop {
        let count = socket.read(&mut buffer).await?;
        if count == 0 {
            return Ok(at as u64);
        }
        if (0..count).any(|n| buffer[n] != pattern(at + n)) {
            return Err(std::io::Error::other(format!("a wrong byte after {at}")));
        }
        at += count;
    }
}

async fn ask_again(to: SocketAddr, keeps: bool, end: &AtomicBool, done: &AtomicU64) -> std::io::Result<u64> {
    let mut socket = TcpStream::connect(to).await?;
    let mut count = 0;
    while !end.load(Relaxed) {
        if !keeps {
            socket = TcpStream::connect(to).await?;
        }
        socket.write_all(b"GET /page HTTP/1.1\r\n\r\n").await?;
        let mut answer = Vec::new();
        while !answer.ends_with(CANARY.as_bytes()) {
            if socket.read_buf(&mut answer).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
        count += 1;
        done.fetch_add(1, Relaxed);
    }
    Ok(count)
}

fn serial_and_roots(agent: &Agent) -> (String, Vec<Sha256>) {
    let identity = agent.app.identity.borrow().clone().unwrap();
    let roots = identity.trust.domains.values().flatten().map(|root| tls::spki_of(root).unwrap()).collect();
    (identity.credential.peer().serial.clone(), roots)
}

/// What an agent refused since it started.
fn refused(agent: &Agent) -> u64 {
    let metrics = tokio::task::block_in_place(|| scrape(agent.app.addresses.admin)).unwrap();
    metrics.sum("sidewarden_agent_connections_refused_total", &[]) as u64
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_and_a_killed_collector_under_load_cost_no_request_and_show_nothing() {
    run(Plan { pairs: 3, wrk: 0, downloads: 1 }).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "not a test: the same through twenty agents and with wrk, which takes a machine of its own"]
async fn twenty_agents() {
    packages::find("wrk").unwrap();
    run(Plan { pairs: 10, wrk: 2, downloads: 2 }).await;
}

async fn run(plan: Plan) {
    let (mut world, leaders_threads) = World::start_apart("").await;
    let second = second(&world).await;
    world.others = vec![second.agents];
    let end = Arc::new(AtomicBool::new(false));
    let server = http_server(end.clone()).await;
    let mut lines = Vec::new();
    for number in 0..plan.pairs {
        lines.push(line(&world, number, server).await);
    }
    let (names, agents) = (names(plan.pairs), || lines.iter().flat_map(|line| [&line.client, &line.service]));
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    connected(&world.collector().core, &names).await;
    let before: Vec<_> = agents().map(serial_and_roots).collect();
    let load = Load::start(&plan, &lines, end);
    load.goes_on().await;

    let core = &world.collector().core;
    for step in [Step::Prepare, Step::Activate, Step::Taint, Step::Retire] {
        turn(core, step).await;
        load.goes_on().await;
    }
    let active = core.issuer.authority().pin();
    let renewed = async || agents().all(|agent| serial_and_roots(agent).1 == [active]).then_some(());
    eventually(|| "an agent still trusts the old root".into(), renewed).await;
    assert!(agents().zip(&before).all(|(agent, before)| serial_and_roots(agent).0 != before.0), "every leaf is new");

    leaders_threads.shutdown_background();
    connected(&second.core, &names).await;
    load.goes_on().await;
    let had = load.stop().await;
    assert!(had.iter().all(|had| *had > 0), "{had:?}");
    println!("requests, and bytes of downloads: {had:?}");
    assert_eq!(agents().map(refused).sum::<u64>(), 0);
    let mut judged = (0, 0);
    for line in lines {
        line.client.app.stop("test").await;
        line.service.app.stop("test").await;
        let last = std::sync::Mutex::new(Default::default());
        let steady = async || {
            let seen = line.tap.seen();
            let before = std::mem::replace(&mut *last.lock().unwrap(), seen.clone());
            (seen.sealed > 0 && seen == before).then_some(seen)
        };
        let seen = eventually(|| format!("a wire is not quiet: {:?}", last.lock().unwrap()), steady).await;
        assert!(seen.is_sealed(), "{seen:?}");
        judged = (judged.0 + seen.connections, judged.1 + seen.bytes);
    }
    println!("on the wires {} connections, {} bytes, all sealed", judged.0, judged.1);
    second.stop().await;
}
