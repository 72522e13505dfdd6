//! A crowd at the gate that never finishes its handshakes, and good clients that have to get past it.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sidewarden_agent::proxy::waiting::STALLED;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::gate::{Answer, BOTH, Gate, LIMIT, dial_from, home};
use crate::world::{echo, eventually};

const CROWD: usize = 5_000;
const GOOD: usize = 200;

/// Room for both ends of every connection in this one process.
fn room_for_descriptors() {
    let needed = 2 * CROWD as u64 + 1_000;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(hard >= needed, "this test needs {needed} descriptors and may have {hard}: raise the limit (ulimit -Hn)");
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 20), hard).unwrap();
}

/// One of the crowd: begins a hello, says no more, and stays until it is thrown out.
async fn stall(from: Ipv4Addr, to: SocketAddr) {
    let mut stream = dial_from(from, to).await;
    let _ = stream.write_all(&[22, 3, 1, 2, 0]).await;
    let _ = timeout(LIMIT, stream.read(&mut [0; 1])).await.expect("nobody is kept longer than a handshake may take");
}

/// Each of the crowd is counted once, whichever way it went.
async fn all_are_counted(gate: &Gate) {
    let reasons = ["handshake_timeout", "limit_reached", "handshake_failed"];
    let counted = || reasons.iter().map(|reason| gate.refused(reason)).sum::<u64>();
    let all = async || (counted() == CROWD as u64).then_some(());
    eventually(|| format!("{} of {CROWD} are counted", counted()), all).await;
}

/// Listeners of other tests come and go on 127.0.0.1 with the same port, and so do those who still knock for them.
#[tokio::test(flavor = "multi_thread")]
async fn who_knocks_for_somebody_else_is_not_counted() {
    let gate = Gate::open().await;
    // It may even find one of them.
    drop(tokio::net::TcpStream::connect((home(), gate.address().port())).await);
    gate.is_open().await;
    assert_eq!(gate.refused("handshake_failed"), 0);
}

/// The crowd keeps coming while good clients do: from one machine, which may not take the room of the others.
#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_stalled_handshakes_of_one_machine_keep_no_good_client_out() {
    room_for_descriptors();
    let gate = Gate::open().await;
    let (mut crowd, to, shown) = (JoinSet::new(), gate.address(), gate.web());
    let (mut alone, mut among) = (Vec::new(), Vec::new());
    for _ in 0..GOOD / 4 {
        alone.push(good(&gate, &shown).await);
    }
    for _ in 0..GOOD {
        (0..CROWD / GOOD).for_each(|_| drop(crowd.spawn(stall(Ipv4Addr::new(127, 200, 0, 1), to))));
        among.push(good(&gate, &shown).await);
    }
    while let Some(ended) = crowd.join_next().await {
        ended.unwrap();
    }
    all_are_counted(&gate).await;
    eprintln!("latency of good clients: alone {}, among {CROWD} stalled {}", told(&mut alone), told(&mut among));
}

/// The crowd comes from everywhere, the good clients' own address included, and holds every place there is.
#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_stalled_handshakes_from_everywhere_make_room() {
    room_for_descriptors();
    // Longer than the test: nobody leaves by himself.
    let gate = Gate::before(echo().await, "timeouts.handshake = '60s'\n").await;
    let (mut crowd, to, shown) = (JoinSet::new(), gate.address(), gate.web());
    for number in 0..CROWD {
        let network = u8::try_from(number % 100).unwrap();
        let from = if network == 0 { home() } else { Ipv4Addr::new(127, 200, network, 1) };
        crowd.spawn(async move {
            let mut stream = dial_from(from, to).await;
            let _ = stream.write_all(&[22, 3, 1, 2, 0]).await;
            stream
        });
    }
    let mut stalled = Vec::new();
    while let Some(stream) = crowd.join_next().await {
        stalled.push(stream.unwrap());
    }
    // All places are taken, and those who took them are no longer young.
    eventually(|| "the limit was not reached".into(), async || (gate.refused("limit_reached") > 4_000).then_some(()))
        .await;
    tokio::time::sleep(STALLED).await;
    let mut among = Vec::new();
    for _ in 0..GOOD {
        among.push(good(&gate, &shown).await);
    }
    drop(stalled);
    all_are_counted(&gate).await;
    eprintln!("latency of good clients where {CROWD} stalled from everywhere: {}", told(&mut among));
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
