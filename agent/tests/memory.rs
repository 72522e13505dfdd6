//! What a connection at rest holds: two agents in this process, an echo behind them, and what malloc has given out.

use std::ffi::{c_int, c_void};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sidewarden_agent::app::{self, Setup};
use sidewarden_agent::config::Config;
use sidewarden_proto::backoff;
use sidewarden_proto::event::Mode;
use tempfile::TempDir;

mod made_up;

use made_up::Ca;

const WEB: &str = "spiffe://td/shop/web";
const ORDERS: &str = "spiffe://td/shop/orders";
const LIMIT: Duration = Duration::from_secs(60);

/// Bytes per connection and agent that may be held (design.md, budgets). Debug builds hold a little more than release ones.
const BUDGET: i64 = 6 << 10;

/// Bytes from which a piece is no connection's: each attempt to reach the collector over QUIC reads into 3 MB, and whether
/// one is under way when we look is chance.
const NO_CONNECTIONS: usize = 1 << 20;

/// What malloc needs for itself beside each piece.
const HEADER: usize = 8;

/// Live pieces by what they take, the last for all larger ones, and the bytes of all of them.
///
/// malloc(3) itself is replaced, so that AWS-LC's pieces count as well. mallinfo2(3) will not do: it has one figure for
/// everything.
struct Live {
    pieces: [AtomicI64; SIZES],
    bytes: AtomicI64,
}

const SIZES: usize = 8192;
static LIVE: Live = Live { pieces: [const { AtomicI64::new(0) }; SIZES], bytes: AtomicI64::new(0) };

impl Live {
    fn count(&self, piece: *mut c_void, sign: i64) {
        if piece.is_null() {
            return;
        }
        // SAFETY: the piece is alive: it has just been given out, or is about to be given back.
        let size = unsafe { malloc_usable_size(piece) } + HEADER;
        if size < NO_CONNECTIONS {
            self.pieces[size.min(SIZES - 1)].fetch_add(sign, Relaxed);
            self.bytes.fetch_add(sign * i64::try_from(size).unwrap_or(i64::MAX), Relaxed);
        }
    }

    fn given(&self, piece: *mut c_void) -> *mut c_void {
        self.count(piece, 1);
        piece
    }

    fn pieces(&self) -> Vec<i64> {
        self.pieces.iter().map(|count| count.load(Relaxed)).collect()
    }
}

// glibc's manual, "Replacing malloc": a program may define all of these, and its own remain under these names.
unsafe extern "C" {
    fn __libc_malloc(size: usize) -> *mut c_void;
    fn __libc_calloc(count: usize, size: usize) -> *mut c_void;
    fn __libc_realloc(piece: *mut c_void, size: usize) -> *mut c_void;
    fn __libc_memalign(align: usize, size: usize) -> *mut c_void;
    fn __libc_free(piece: *mut c_void);
    fn malloc_usable_size(piece: *mut c_void) -> usize;
}

#[unsafe(no_mangle)]
unsafe extern "C" fn malloc(size: usize) -> *mut c_void {
    // SAFETY: handed on as it came, here and below.
    LIVE.given(unsafe { __libc_malloc(size) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
    LIVE.given(unsafe { __libc_calloc(count, size) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn realloc(piece: *mut c_void, size: usize) -> *mut c_void {
    LIVE.count(piece, -1);
    LIVE.given(unsafe { __libc_realloc(piece, size) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memalign(align: usize, size: usize) -> *mut c_void {
    LIVE.given(unsafe { __libc_memalign(align, size) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aligned_alloc(align: usize, size: usize) -> *mut c_void {
    unsafe { memalign(align, size) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn posix_memalign(to: *mut *mut c_void, align: usize, size: usize) -> c_int {
    let piece = unsafe { memalign(align, size) };
    if piece.is_null() {
        return nix::libc::ENOMEM;
    }
    unsafe { to.write(piece) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn free(piece: *mut c_void) {
    LIVE.count(piece, -1);
    unsafe { __libc_free(piece) }
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

/// Bytes that are held once a second went by in which they did not become fewer: whoever made a connection a moment ago
/// still holds what the handshake needed.
fn at_rest() -> i64 {
    let (mut least, mut since) = (i64::MAX, Instant::now());
    while since.elapsed() < Duration::from_secs(1) {
        let bytes = LIVE.bytes.load(Relaxed);
        if bytes < least {
            (least, since) = (bytes, Instant::now());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    least
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
    let (bytes, pieces) = (at_rest(), LIVE.pieces());
    open(outer, MANY - FEW, &mut kept);
    let held = (at_rest() - bytes) / i64::try_from(2 * (MANY - FEW)).unwrap();
    println!("{held} bytes per connection and agent; its pieces by size, where half of the connections have one:");
    for (size, (after, before)) in LIVE.pieces().into_iter().zip(pieces).enumerate() {
        let each = (after - before) as f64 / (MANY - FEW) as f64;
        if each > 0.5 {
            println!("{size:6} bytes x {each:.2}");
        }
    }
    assert!(held <= BUDGET, "{held} bytes per connection and agent, and {BUDGET} are allowed");
}
