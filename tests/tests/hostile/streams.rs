//! An identity that dies in the middle: what was opened with it ends at once, and nobody else loses a byte.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::gate::{Gate, LIMIT};
use crate::world::{Agent, eventually, outbound};

const STREAMS: usize = 50;

/// What became of a stream: how many words went there and back before it ended, and how.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// Told to stop, with every byte there.
    Whole(u64),
    /// A reset.
    Cut,
    /// An end of file that nobody had asked for.
    LooksWhole,
}

/// Words and their echoes until told to stop. A kilobyte that differs each time: a lost or doubled one shows.
async fn stream(mut socket: TcpStream, stop: Arc<AtomicBool>, count: Arc<AtomicU64>) -> End {
    let mut answer = vec![0; 1024];
    for round in 0u64.. {
        if stop.load(Relaxed) {
            return End::Whole(round);
        }
        let word: Vec<u8> = round.to_be_bytes().repeat(128);
        if socket.write_all(&word).await.is_err() {
            return End::Cut;
        }
        match timeout(LIMIT, socket.read_exact(&mut answer)).await.expect("an echo in time") {
            Ok(_) => assert_eq!(answer, word),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return End::LooksWhole,
            Err(_) => return End::Cut,
        }
        count.fetch_add(1, Relaxed);
    }
    unreachable!("the rounds have no end")
}

/// Streams through one agent.
struct Streams {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<End>>,
}

impl Streams {
    async fn through(agent: &Agent) -> Streams {
        let (stop, count) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let mut tasks = Vec::new();
        for _ in 0..STREAMS {
            tasks.push(tokio::spawn(stream(agent.dial().await, stop.clone(), count.clone())));
        }
        Streams { stop, count, tasks }
    }

    /// Until each has gone there and back some more times, on the average.
    async fn go_on(&self) {
        let from = self.count.load(Relaxed);
        let further = async || (self.count.load(Relaxed) > from + 10 * STREAMS as u64).then_some(());
        eventually(|| format!("{} words is all that came back", self.count.load(Relaxed)), further).await;
    }

    async fn ends(self) -> Vec<End> {
        let mut ends = Vec::new();
        for task in self.tasks {
            ends.push(task.await.unwrap());
        }
        ends
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_a_revoked_key_are_cut_at_once_and_the_others_lose_no_byte() {
    let gate = Gate::open().await;
    let (mut agents, mut streams) = (Vec::new(), Vec::new());
    for name in ["web-1", "web-2"] {
        let agent = gate.world.agent(name, "shop/web", &outbound(gate.address(), "shop/orders")).await;
        agent.enrolled().await;
        streams.push(Streams::through(&agent).await);
        agents.push(agent);
    }
    for streams in &streams {
        streams.go_on().await;
    }
    let own = agents[0].app.identity.borrow().clone().unwrap();
    gate.deny(own.credential.peer().spki).await;
    let (spared, denied) = (streams.pop().unwrap(), streams.pop().unwrap());
    for end in denied.ends().await {
        assert_eq!(end, End::Cut);
    }
    spared.go_on().await;
    spared.stop.store(true, Relaxed);
    for end in spared.ends().await {
        assert!(matches!(end, End::Whole(1..)), "{end:?}");
    }
    let told = async || {
        let events = gate.world.events("connection.ended").await;
        let bodies = events.iter().filter(|r| r.agent.workload.path() == "shop/orders");
        let bodies: Vec<Value> = bodies.map(|r| serde_json::from_str(r.body.get()).unwrap()).collect();
        let counts = bodies.iter().filter(|b| b["reason"] == "revoked").filter_map(|b| b["count"].as_u64());
        (counts.sum::<u64>() == STREAMS as u64).then_some(())
    };
    eventually(|| "the event does not tell of as many as were cut".into(), told).await;
}
