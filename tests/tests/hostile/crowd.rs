//! A crowd at the gate that never finishes its handshakes, and good clients that have to get past it.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::gate::{Answer, BOTH, Gate, LIMIT, dial_from, home};
use crate::world::eventually;

const CROWD: usize = 5_000;
const GOOD: usize = 200;

/// Room for both ends of every connection in this one process.
fn room_for_descriptors() {
    let needed = 2 * CROWD as u64 + 1_000;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(hard >= needed, "this test needs {needed} descriptors and may have {hard}: raise the limit (ulimit -Hn)");
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 20), hard).unwrap();
}

/// Where the crowd comes from: one machine.
const CROWDED: Ipv4Addr = Ipv4Addr::new(127, 200, 0, 1);

/// One of the crowd: begins a hello, says no more, and stays until it is thrown out.
async fn stall(to: std::net::SocketAddr) {
    let mut stream = dial_from(CROWDED, to).await;
    let _ = stream.write_all(&[22, 3, 1, 2, 0]).await;
    let _ = timeout(LIMIT, stream.read(&mut [0; 1])).await.expect("nobody is kept longer than a handshake may take");
}

#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_stalled_handshakes_keep_no_good_client_out() {
    room_for_descriptors();
    let gate = Gate::open().await;
    let (mut crowd, to) = (JoinSet::new(), gate.address());
    // The crowd keeps coming while good clients do.
    let shown = gate.web();
    let (mut alone, mut among) = (Vec::new(), Vec::new());
    for _ in 0..GOOD / 4 {
        alone.push(good(&gate, &shown).await);
    }
    let each = CROWD / GOOD;
    for _ in 0..GOOD {
        (0..each).for_each(|_| drop(crowd.spawn(stall(to))));
        among.push(good(&gate, &shown).await);
    }
    while let Some(ended) = crowd.join_next().await {
        ended.unwrap();
    }
    // Each of the crowd is counted once, for the one reason or the other.
    let counted = || gate.refused("handshake_timeout") + gate.refused("limit_reached");
    let all = async || (counted() == CROWD as u64).then_some(());
    eventually(|| format!("{} of {CROWD} are counted", counted()), all).await;
    eprintln!("latency of good clients: alone {}, among {CROWD} stalled {}", told(&mut alone), told(&mut among));
    gate.is_open().await;
}

/// A good client's visit: it gets in. How long that took.
async fn good(gate: &Gate, shown: &crate::mint::Shown) -> Duration {
    let began = Instant::now();
    assert_eq!(gate.knock(shown, &BOTH, home()).await, Answer::Accepted);
    began.elapsed()
}

fn told(times: &mut [Duration]) -> String {
    times.sort();
    format!("p50 {:?}, p99 {:?}", times[times.len() / 2], times[times.len() * 99 / 100])
}
