//! Two network namespaces with a wire between them, and small servers in them. Everything is gone when it is dropped.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::unistd::Uid;

/// The addresses of the two ends.
pub const INSIDE: [&str; 2] = ["10.83.0.1", "fd83::1"];
pub const OUTSIDE: [&str; 2] = ["10.83.0.2", "fd83::2"];

/// Nobody here is further away than the other end of a wire.
const PATIENCE: Duration = Duration::from_secs(3);

/// `None` where the test may be left out, and has to be: without root, or without one of `programs`.
pub fn provided(name: &str, programs: &[&str]) -> Option<()> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let there = |program: &str| path.split(':').any(|dir| std::path::Path::new(dir).join(program).is_file());
    let missing: Vec<&str> = programs.iter().copied().filter(|program| !there(program)).collect();
    let why = match () {
        () if !Uid::effective().is_root() => "it makes network namespaces, which only root may".to_owned(),
        () if !missing.is_empty() => format!("{} is not installed (packages iproute2, nftables)", missing.join(", ")),
        () => return Some(()),
    };
    assert!(
        std::env::var_os("SIDEWARDEN_ALLOW_SKIP").is_some(),
        "{why} (to leave this test out: SIDEWARDEN_ALLOW_SKIP=1)"
    );
    eprintln!("SKIPPED {name}: {why}");
    None
}

/// The two, and their wire.
pub struct Net {
    pub inside: Space,
    pub outside: Space,
}

/// One network namespace.
pub struct Space {
    name: String,
    file: File,
}

impl Net {
    pub fn new() -> Net {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let own = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        let (inside, outside) = (Space::new(&format!("sw-in-{own}")), Space::new(&format!("sw-out-{own}")));
        ip(&[
            "link",
            "add",
            "eth0",
            "netns",
            &inside.name,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            &outside.name,
        ]);
        for (space, addresses) in [(&inside, INSIDE), (&outside, OUTSIDE)] {
            ip(&["-n", &space.name, "addr", "add", &format!("{}/24", addresses[0]), "dev", "eth0"]);
            ip(&["-n", &space.name, "addr", "add", &format!("{}/64", addresses[1]), "dev", "eth0", "nodad"]);
            ip(&["-n", &space.name, "link", "set", "lo", "up"]);
            ip(&["-n", &space.name, "link", "set", "eth0", "up"]);
        }
        Net { inside, outside }
    }
}

impl Space {
    fn new(name: &str) -> Space {
        ip(&["netns", "add", name]);
        let file = File::open(format!("/run/netns/{name}")).unwrap();
        Space { name: name.to_owned(), file }
    }

    /// What `act` gives, on a thread within this namespace. What it starts and binds stays there.
    pub fn run<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let within = || {
            setns(&self.file, CloneFlags::CLONE_NEWNET).unwrap();
            act()
        };
        std::thread::scope(|scope| scope.spawn(within).join().unwrap())
    }

    /// What somebody here is told at `address`.
    pub fn ask(&self, address: &str) -> Result<String, ErrorKind> {
        self.run(|| ask(address)).map_err(|error| error.kind())
    }

    /// Whether a datagram to `address` is answered.
    pub fn ask_udp(&self, address: &str) -> bool {
        self.run(|| {
            let socket = UdpSocket::bind("[::]:0").or_else(|_| UdpSocket::bind("0.0.0.0:0")).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            let address: SocketAddr = address.parse().unwrap();
            let mapped = match address {
                SocketAddr::V4(v4) => SocketAddr::from((v4.ip().to_ipv6_mapped(), v4.port())),
                v6 => v6,
            };
            socket.send_to(b"?", mapped).is_ok() && socket.recv(&mut [0; 16]).is_ok()
        })
    }

    pub fn nft(&self, script: &str) -> String {
        let mut words = vec!["netns", "exec", &self.name, "nft"];
        words.extend(script.split(' '));
        ip(&words)
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn connect(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address.parse().unwrap(), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn ask(address: &str) -> io::Result<String> {
    let mut stream = connect(address)?;
    stream.write_all(b"hello\n")?;
    let mut said = [0; 64];
    let count = stream.read(&mut said)?;
    Ok(String::from_utf8_lossy(&said[..count]).into_owned())
}

/// A server on a thread, until it is dropped.
pub struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens at `address` and has `serve` speak with each client.
    pub fn tcp(space: &Space, address: &str, serve: impl Fn(TcpStream) + Send + 'static) -> Server {
        let listener = space.run(|| TcpListener::bind(address)).unwrap_or_else(|e| panic!("{address}: {e}"));
        listener.set_nonblocking(true).unwrap();
        Server::start(move || match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                serve(stream);
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        })
    }

    /// Waits for a word, then answers `plain`.
    pub fn plain(space: &Space, address: &str) -> Server {
        Server::tcp(space, address, |mut stream| {
            let heard = stream.read(&mut [0; 512]).unwrap_or(0);
            // Whoever came may be gone.
            let _ = stream.write_all(if heard > 0 { b"plain" } else { b"" });
        })
    }

    /// Answers every datagram.
    pub fn udp(space: &Space, address: &str) -> Server {
        let socket = space.run(|| UdpSocket::bind(address)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        Server::start(move || {
            if let Ok((_, from)) = socket.recv_from(&mut [0; 16]) {
                let _ = socket.send_to(b"!", from);
            }
        })
    }

    fn start(turn: impl Fn() + Send + 'static) -> Server {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Relaxed) {
                turn();
            }
        });
        Server { stop, thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(!matches!(ended, Some(Err(_))) || std::thread::panicking(), "a server broke");
    }
}
