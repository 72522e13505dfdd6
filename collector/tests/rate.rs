//! How fast links get to disk and into state and index, and what an event costs. Run it by hand, in release:
//! `cargo test --release -p sidewarden-collector --test rate -- --ignored --nocapture`

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use sidewarden_collector::commit::{self, Parts, Progress};
use sidewarden_collector::index::Writer;
use sidewarden_collector::log::{Log, SqliteLog};
use sidewarden_proto::batch::{Batch, Cursor, Epoch, Link};
use sidewarden_proto::event::{Body, ConnectionsSummary, Direction, Event, Severity};
use sidewarden_proto::identity::AgentId;
use sidewarden_proto::time::Timestamp;
use tokio::sync::watch;

const AGENTS: u64 = 50;
const LINKS: u64 = 200;
const EVENTS: u64 = 100;

fn event(n: u64) -> Event {
    let peer = format!("spiffe://sidewarden.internal/shop/service-{}", n % 17);
    let body = Body::from(ConnectionsSummary {
        direction: Direction::Inbound,
        peer: peer.clone(),
        listener: "0.0.0.0:8443".into(),
        opened: n % 91,
        closed: n % 89,
        truncated: 0,
        bytes_in: n * 7919 % 1_000_003,
        bytes_out: n * 104_729 % 10_000_019,
        window_secs: 60,
    });
    let severity = if n.is_multiple_of(100) { Severity::Warning } else { Severity::Info };
    Event::new(
        Timestamp(1_795_000_000_000_000 + n as i64 * 1_237),
        severity,
        format!("{} connections from {peer}", n % 91),
        &body,
    )
}

fn chain(agent: u64) -> Vec<Link> {
    let mut at = Cursor::START;
    let next = |link: u64| {
        let mut events: Vec<Event> = (0..EVENTS).map(|n| event(agent * 1_000_003 + link * EVENTS + n)).collect();
        let link = Link::Batch(Batch::seal(Epoch([agent as u8; 16]), at.seq + 1, at.hash, &mut events).unwrap());
        at = Cursor { seq: link.last_seq(), hash: link.hash() };
        link
    };
    (0..LINKS).map(next).collect()
}

fn cpu() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let span = |t: nix::sys::time::TimeVal| Duration::new(t.tv_sec() as u64, t.tv_usec() as u32 * 1000);
    span(usage.user_time()) + span(usage.system_time())
}

#[tokio::test]
#[ignore = "not a test: a measurement, which says how fast, not whether"]
async fn rate() {
    let dir = tempfile::tempdir().unwrap();
    let log = SqliteLog::open(&dir.path().join("log.db")).unwrap();
    let reader = log.reader().unwrap();
    let parts = Parts {
        log: Box::new(log),
        index: Writer::open(&dir.path().join("index.db")).unwrap(),
        own: "spiffe://sidewarden.internal/sidewarden/collector#k".parse().unwrap(),
        new_epoch: Epoch([99; 16]),
        keep_for: Duration::from_secs(3600),
        keep_bytes: 1 << 40,
    };
    let chains: Vec<Vec<Link>> = (0..AGENTS).map(chain).collect();
    let (commits, thread) = commit::start(parts).unwrap();
    let mut listener = commits.subscribe();
    let listening = tokio::spawn(async move {
        let mut heard = 0;
        while let Ok(committed) = listener.recv().await {
            heard += committed.events().len();
        }
        heard
    });
    let sessions: Vec<_> = (0..AGENTS)
        .map(|n| {
            let agent: AgentId = format!("spiffe://sidewarden.internal/shop/s{n}#c1").parse().unwrap();
            (Arc::new(agent), watch::channel(Progress::Committed(Cursor::START)))
        })
        .collect();
    let (started, spent) = (Instant::now(), cpu());
    for link in 0..LINKS as usize {
        for ((agent, (progress, _)), chain) in sessions.iter().zip(&chains) {
            commits.link(agent.clone(), Timestamp::now(), chain[link].clone(), progress.clone()).await.unwrap();
        }
    }
    commits.flush().await.unwrap();
    let (wall, spent) = (started.elapsed(), cpu() - spent);
    let events = (AGENTS * LINKS * EVENTS) as f64;
    let bytes = reader.extent().unwrap().bytes as f64;
    let stats = commits.stats().commit_seconds.clone();
    println!(
        "{:.0} events/s, {:.2} us CPU an event, {:.0} bytes of links an event, {} groups, {:.1} ms a commit",
        events / wall.as_secs_f64(),
        spent.as_secs_f64() * 1e6 / events,
        bytes / events,
        stats.get_sample_count(),
        stats.get_sample_sum() * 1e3 / stats.get_sample_count() as f64
    );
    for name in ["log.db", "index.db"] {
        let size = std::fs::metadata(dir.path().join(name)).unwrap().len() as f64;
        println!("{name}: {:.1} bytes an event", size / events);
    }
    drop(commits);
    thread.join().unwrap();
    println!("a listener heard {} events", listening.await.unwrap());
}
