//! kill -9 at any moment: what was acknowledged is there, and nothing is there twice.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use sidewarden_collector::commit::{self, Parts, Progress};
use sidewarden_collector::index::{Index, Order, Query, Writer};
use sidewarden_collector::log::{Log, SqliteLog};
use sidewarden_proto::batch::{Batch, Cursor, Epoch, Fit, Link};
use sidewarden_proto::event::{AgentStopping, Body, Event, Severity};
use sidewarden_proto::identity::AgentId;
use sidewarden_proto::time::Timestamp;
use tokio::sync::watch;

const DIR: &str = "SIDEWARDEN_TEST_CRASH_DIR";
const CHAINS: u8 = 3;

fn agent(chain: u8) -> AgentId {
    format!("spiffe://x.example/shop/web#c{chain}").parse().unwrap()
}

fn epoch(chain: u8) -> Epoch {
    Epoch([chain; 16])
}

fn parts(dir: &Path) -> Parts {
    Parts {
        log: Box::new(SqliteLog::open(&dir.join("log.db")).unwrap()),
        index: Writer::open(&dir.join("index.db")).unwrap(),
        own: "spiffe://x.example/sidewarden/collector#k".parse().unwrap(),
        new_epoch: Epoch([99; 16]),
        keep_for: Duration::from_secs(3600),
        keep_bytes: 1 << 30,
    }
}

/// Not a test of its own: the process that the test below kills. Writes as fast as it can, and says what was acknowledged.
#[tokio::test]
#[ignore = "not a test: the child process of the next one"]
async fn writer_process() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let (commits, _thread) = commit::start(parts(Path::new(&dir))).unwrap();
    let mut sessions = Vec::new();
    for chain in 1..=CHAINS {
        let agent = Arc::new(agent(chain));
        let at = commits.cursor(agent.clone(), epoch(chain)).await.unwrap().unwrap();
        sessions.push((chain, agent, at, watch::channel(Progress::Committed(at))));
    }
    loop {
        for (chain, agent, at, (progress, heard)) in &mut sessions {
            for _ in 0..4 {
                let link = next(*chain, *at);
                *at = Cursor { seq: link.last_seq(), hash: link.hash() };
                commits.link(agent.clone(), Timestamp::now(), link, progress.clone()).await.unwrap();
            }
            let Progress::Committed(acked) = *heard.borrow_and_update() else { panic!("refused") };
            println!("acked {chain} {}", acked.seq);
            std::io::stdout().flush().unwrap();
        }
        commits.tick(Timestamp::now()).await.unwrap();
    }
}

fn next(chain: u8, at: Cursor) -> Link {
    let body = Body::from(AgentStopping { reason: "x".into() });
    let mut events: Vec<Event> =
        (0..3).map(|i| Event::new(Timestamp::now(), Severity::ALL[i % 4], "written", &body)).collect();
    Link::Batch(Batch::seal(epoch(chain), at.seq + 1, at.hash, &mut events).unwrap())
}

/// Lets the writer run for `lines` acknowledgements, kills it, and returns the last one of each chain.
fn run_and_kill(dir: &Path, lines: usize) -> HashMap<u8, u64> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["writer_process", "--exact", "--ignored", "--nocapture"])
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut acked = HashMap::new();
    let mut seen = 0;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let Ok(line) = line else { break };
        // The first line may stand behind what the test harness prints.
        let Some(at) = line.find("acked ") else { continue };
        let mut words = line[at..].split_whitespace().skip(1);
        let (Some(Ok(chain)), Some(Ok(seq))) = (words.next().map(str::parse), words.next().map(str::parse)) else {
            continue;
        };
        acked.insert(chain, seq);
        seen += 1;
        if seen == lines {
            child.kill().unwrap();
        }
    }
    child.wait().unwrap();
    assert!(seen >= lines, "the writer ended by itself after {seen} lines");
    acked
}

#[test]
fn nothing_acknowledged_is_missing_and_nothing_is_twice_after_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    for (round, lines) in [1, 7, 40, 3, 90, 200, 11, 2].into_iter().enumerate() {
        let acked = run_and_kill(dir.path(), lines);
        let log = SqliteLog::open(&dir.path().join("log.db")).unwrap();
        for (chain, seq) in acked {
            let kept = log.cursor(&agent(chain), epoch(chain)).unwrap().seq;
            assert!(kept >= seq, "round {round}: chain {chain} was acknowledged to {seq}, the log has {kept}");
        }
    }
    let log = SqliteLog::open(&dir.path().join("log.db")).unwrap();
    let mut cursors: HashMap<(AgentId, Epoch), Cursor> = HashMap::new();
    let mut events = 0;
    for (position, stored) in (1..).zip(log.read_from(0, usize::MAX).unwrap()) {
        assert_eq!(stored.position, position, "a position is missing");
        let key = ((*stored.entry.agent).clone(), stored.entry.link.epoch());
        let at = cursors.entry(key).or_insert(Cursor::START);
        events += stored.entry.link.by_severity().iter().map(|n| u64::from(*n)).sum::<u64>();
        let Fit::Next(_, after) = at.fit(stored.entry.link) else { panic!("position {position} does not follow") };
        *at = after;
    }
    // State and index agree with the log, whatever they had when they were killed.
    let (commits, thread) = commit::start(parts(dir.path())).unwrap();
    let counted: u64 = commits.state().totals.events.values().flatten().sum();
    assert_eq!(counted, events);
    let index = Index::open(&dir.path().join("index.db"), log.reader().unwrap()).unwrap();
    assert_eq!(found(&index), events);
    drop(commits);
    thread.join().unwrap();
}

fn found(index: &Index) -> u64 {
    let (mut count, mut at) = (0, None);
    loop {
        let query = Query { order: Order::Oldest(at), limit: 1000, ..Query::default() };
        let answer = index.query_now(&query).unwrap();
        count += answer.events.len() as u64;
        at = answer.next;
        if at.is_none() {
            return count;
        }
    }
}
