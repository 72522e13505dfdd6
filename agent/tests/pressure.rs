//! The program itself where a process is needed: descriptors that run out, and SIGTERM with a thousand streams open.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

mod made_up;

use made_up::Ca;

/// Nothing here takes longer, or the test fails.
const LIMIT: Duration = Duration::from_secs(30);
const WEB: &str = "spiffe://td/shop/web";
const ORDERS: &str = "spiffe://td/shop/orders";

/// A running agent; ended with the test.
struct Agent {
    child: Child,
    admin: SocketAddr,
    listen: SocketAddr,
}

impl Agent {
    /// With `route`, which listens on `listen`; with at most `descriptors`, if that is said.
    fn start(ca: &Ca, id: &str, listen: SocketAddr, route: &str, descriptors: Option<u64>) -> (Agent, TempDir) {
        let (dir, admin) = (TempDir::new().unwrap(), free());
        ca.identify(id, dir.path());
        let config = dir.path().join("agent.toml");
        let text = format!(
            "data_dir = '{}'\ninstance = 'one'\nadmin.listen = '{admin}'\ncollector.addresses = ['127.0.0.1:1']\n\
             timeouts.drain = '6s'\n{route}",
            dir.path().display()
        );
        std::fs::write(&config, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_sidewarden-agent"));
        command.arg("sidecar").arg("--config").arg(&config).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(std::fs::File::create(dir.path().join("log")).unwrap()).env_clear();
        if let Some(most) = descriptors {
            // SAFETY: setrlimit may be called between fork and exec.
            unsafe { command.pre_exec(move || Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)) };
        }
        let agent = Agent { child: command.spawn().unwrap(), admin, listen };
        eventually("it is up", || TcpStream::connect(admin).is_ok());
        (agent, dir)
    }

    fn metric(&self, line: &str) -> u64 {
        let mut socket = TcpStream::connect(self.admin).unwrap();
        socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        let value = text.lines().find_map(|l| l.strip_prefix(&format!("sidewarden_agent_{line} ")));
        value.map_or(0, |value| value.parse().unwrap())
    }

    fn terminate(&self) {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).unwrap();
    }

    fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("it ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !is() {
        assert!(Instant::now() < end, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// On loopback addresses that no outgoing connection of this machine uses, so that it is still free when it is bound.
fn free() -> SocketAddr {
    let process = std::process::id().to_le_bytes()[0];
    TcpListener::bind((std::net::Ipv4Addr::new(127, 78, process, 1), 0)).unwrap().local_addr().unwrap()
}

/// A workload that sends back what it gets, a thread for each connection.
fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut socket in listener.incoming().map_while(Result::ok) {
            std::thread::Builder::new()
                .stack_size(64 << 10)
                .spawn(move || {
                    let mut chunk = [0; 4096];
                    while let Ok(count @ 1..) = socket.read(&mut chunk) {
                        if socket.write_all(&chunk[..count]).is_err() {
                            return;
                        }
                    }
                })
                .unwrap();
        }
    });
    address
}

fn inbound(listen: SocketAddr, to: SocketAddr) -> String {
    format!("[[inbound]]\nlisten = '{listen}'\nto = '{to}'\nallow = ['{WEB}']\nhold_service_port = false\n")
}

fn outbound(listen: SocketAddr, to: SocketAddr) -> String {
    format!("[[outbound]]\nlisten = '{listen}'\nto = '{to}'\npeer = '{ORDERS}'\n")
}

/// web's agent and orders' agent, with an echo behind; orders' may have few descriptors.
fn pair(descriptors: Option<u64>) -> (Agent, Agent, [TempDir; 2]) {
    let (ca, inner, outer) = (Ca::new(), free(), free());
    let (orders, one) = Agent::start(&ca, ORDERS, inner, &inbound(inner, echo()), descriptors);
    let (web, two) = Agent::start(&ca, WEB, outer, &outbound(outer, inner), None);
    (web, orders, [one, two])
}

fn open(door: SocketAddr) -> TcpStream {
    let socket = TcpStream::connect(door).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket
}

/// A word and its echo.
fn says(mut socket: &TcpStream, word: &[u8]) -> std::io::Result<()> {
    socket.write_all(word)?;
    let mut answer = vec![0; word.len()];
    socket.read_exact(&mut answer)?;
    assert_eq!(answer, word);
    Ok(())
}

#[test]
fn an_agent_that_runs_out_of_descriptors_recovers_and_keeps_what_it_has() {
    let (web, orders, dirs) = pair(Some(48));
    let early = open(web.listen);
    says(&early, b"early").unwrap();
    // More than it can take; some get in, the others wait in its queue or are refused.
    let crowd: Vec<TcpStream> = (0..100).map(|_| TcpStream::connect(orders.listen).unwrap()).collect();
    let log = dirs[0].path().join("log");
    eventually("it ran out", || std::fs::read_to_string(&log).unwrap().contains("accepting failed"));
    says(&early, b"still").unwrap();
    drop(crowd);
    eventually("a new client gets in", || says(&open(web.listen), b"late").is_ok());
    says(&early, b"still").unwrap();
    let complaints = std::fs::read_to_string(&log).unwrap().matches("accepting failed").count();
    assert!(complaints < 200, "it backs off rather than complain {complaints} times");
}

/// Descriptors of this process: both ends of each stream but those of the agents.
fn room_for(streams: u64) {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let needed = 2 * streams + 200;
    assert!(hard >= needed, "this test needs {needed} descriptors and may have {hard}: raise the limit (ulimit -Hn)");
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 20), hard).unwrap();
}

#[test]
fn sigterm_lets_a_thousand_streams_finish_and_cuts_what_does_not() {
    const STREAMS: usize = 1_000;
    room_for(STREAMS as u64);
    for which in ["web", "orders"] {
        let (mut web, mut orders, _dirs) = pair(None);
        // One after another: all at once are more handshakes than one source may have under way.
        let begin = |_| {
            let stream = open(web.listen);
            says(&stream, b"before").unwrap();
            stream
        };
        let streams: Vec<TcpStream> = (0..STREAMS).map(begin).collect();
        assert_eq!(orders.metric("connections_live{direction=\"inbound\"}"), STREAMS as u64);
        let door = if which == "web" { web.listen } else { orders.listen };
        (if which == "web" { &web } else { &orders }).terminate();
        eventually("nobody new is let in", || TcpStream::connect(door).is_err());
        // Those that are there go on: each of them says more, and half of them end in order.
        for stream in &streams {
            says(stream, b"while it drains").unwrap();
        }
        let (finished, held) = streams.split_at(STREAMS / 2);
        for stream in finished {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut rest = Vec::new();
            let mut reader = stream;
            assert_eq!(reader.read_to_end(&mut rest).unwrap(), 0, "a whole end");
        }
        let status = if which == "web" { web.ended() } else { orders.ended() };
        assert!(status.success(), "{which}: {status}");
        for mut stream in held {
            // What was cut is a reset, never an end that looks whole.
            assert!(stream.read(&mut [0; 1]).is_err(), "{which}");
        }
    }
}
