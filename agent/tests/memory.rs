//! What a connection at rest holds: two agents in this process, an echo behind them, and what malloc has given out.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sidewarden_agent::app::{self, Setup};
use sidewarden_agent::backoff;
use sidewarden_agent::config::Config;
use sidewarden_proto::event::Mode;
use tempfile::TempDir;

mod made_up;

use made_up::Ca;

const WEB: &str = "spiffe://td/shop/web";
const ORDERS: &str = "spiffe://td/shop/orders";
const LIMIT: Duration = Duration::from_secs(60);

/// Bytes per connection and agent that may be held (design.md, budgets). Debug builds hold a little more than release ones.
const BUDGET: i64 = 6 << 10;

/// Live allocations of Rust by their size, to see what a connection is made of (`--nocapture`).
struct BySize;

const SIZES: usize = 8192;
static LIVE: [AtomicI64; SIZES] = [const { AtomicI64::new(0) }; SIZES];

// SAFETY: every call is handed on as it came; only numbers are kept beside.
unsafe impl GlobalAlloc for BySize {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE[layout.size().min(SIZES - 1)].fetch_add(1, Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE[layout.size().min(SIZES - 1)].fetch_sub(1, Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: BySize = BySize;

fn live() -> Vec<i64> {
    LIVE.iter().map(|count| count.load(Relaxed)).collect()
}

/// Bytes that malloc has given out to anybody, C included, with what it needs for itself.
fn given_out() -> i64 {
    // SAFETY: mallinfo2(3) reads counters.
    let info = unsafe { nix::libc::mallinfo2() };
    i64::try_from(info.uordblks + info.hblkhd).unwrap()
}

/// Starts an agent on a thread of its own; it lives as long as the test.
fn agent(ca: &Ca, id: &str, route: &str) -> (SocketAddr, TempDir) {
    let dir = TempDir::new().unwrap();
    ca.identify(id, dir.path());
    let text = format!(
        "data_dir = '{}'\ninstance = 'one'\nadmin.listen = '127.0.0.1:0'\ncollector.addresses = ['127.0.0.1:1']\n{route}",
        dir.path().display()
    );
    let config = Config::parse(&text, &|_| None).unwrap();
    let (told, addresses) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let setup = Setup { mode: Mode::Sidecar, config, root: None, shares_user: false, random: backoff::random };
            let app = app::start(setup).await.unwrap();
            let addresses = &app.addresses;
            told.send(*addresses.inbound.iter().chain(&addresses.outbound).next().unwrap()).unwrap();
            std::future::pending::<()>().await;
        });
    });
    (addresses.recv().unwrap(), dir)
}

/// Answers the first byte of each connection with itself, and keeps the connection.
fn echo_once() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut kept = Vec::with_capacity(16 << 10);
        for mut socket in listener.incoming().map_while(Result::ok) {
            let mut byte = [0; 1];
            socket.read_exact(&mut byte).unwrap();
            socket.write_all(&byte).unwrap();
            kept.push(socket);
        }
    });
    address
}

fn open(door: SocketAddr, count: usize, kept: &mut Vec<TcpStream>) {
    for _ in 0..count {
        let mut socket = TcpStream::connect(door).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket.write_all(b"x").unwrap();
        socket.read_exact(&mut [0; 1]).unwrap();
        kept.push(socket);
    }
}

#[test]
fn a_connection_at_rest_keeps_to_its_budget() {
    const FEW: usize = 200;
    const MANY: usize = 1_200;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 20), hard).unwrap();
    let ca = Ca::new();
    let inbound = format!(
        "[[inbound]]\nlisten = '127.0.0.1:0'\nto = '{}'\nallow = ['{WEB}']\nhold_service_port = false\n",
        echo_once()
    );
    let (inner, _one) = agent(&ca, ORDERS, &inbound);
    let outbound = format!("[[outbound]]\nlisten = '127.0.0.1:0'\nto = '{inner}'\npeer = '{ORDERS}'\n");
    let (outer, _two) = agent(&ca, WEB, &outbound);

    let mut kept = Vec::with_capacity(16 << 10);
    open(outer, FEW, &mut kept);
    let (bytes, sizes) = (given_out(), live());
    open(outer, MANY - FEW, &mut kept);
    let held = (given_out() - bytes) / i64::try_from(2 * (MANY - FEW)).unwrap();
    println!("{held} bytes per connection and agent; Rust's part by size, where half of the connections have one:");
    for (size, (after, before)) in live().into_iter().zip(sizes).enumerate() {
        let each = (after - before) as f64 / (MANY - FEW) as f64;
        if each > 0.5 {
            println!("{size:6} bytes x {each:.2}");
        }
    }
    assert!(held <= BUDGET, "{held} bytes per connection and agent, and {BUDGET} are allowed");
}
