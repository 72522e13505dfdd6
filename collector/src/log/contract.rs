//! What every log must do, as tests that know nothing of how it does it.

use std::path::Path;
use std::sync::Arc;

use sidewarden_proto::batch::{Batch, Cursor, Epoch, Link, LossReason, Tombstone};
use sidewarden_proto::event::{AgentStopping, Body, Event, Severity};
use sidewarden_proto::identity::{AgentId, Sha256};
use sidewarden_proto::time::Timestamp;

use super::{Entry, Keep, Log, LogError, SqliteLog};

type Open = fn(&Path) -> Result<Box<dyn Log>, LogError>;

const IMPLEMENTATIONS: [(&str, Open); 1] = [("sqlite", |path| Ok(Box::new(SqliteLog::open(path)?)))];

/// Runs `test` against every implementation, each with a way to open the same log again.
fn every(test: impl Fn(&str, &dyn Fn() -> Box<dyn Log>)) {
    for (name, open) in IMPLEMENTATIONS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.db");
        test(name, &|| open(&path).unwrap());
    }
}

const E1: Epoch = Epoch([1; 16]);
const E2: Epoch = Epoch([2; 16]);

fn agent(name: &str) -> Arc<AgentId> {
    Arc::new(format!("spiffe://x.example/shop/{name}#c1").parse().unwrap())
}

/// Links of one chain, `events` each, taken a second after each other.
fn chain(name: &str, epoch: Epoch, links: usize, events: usize) -> Vec<Entry> {
    let body = Body::from(AgentStopping { reason: "x".into() });
    let mut at = Cursor::START;
    let next = |i: usize| {
        let mut events: Vec<Event> =
            (0..events).map(|n| Event::new(Timestamp(n as i64), Severity::ALL[n % 4], "x", &body)).collect();
        let link = Link::Batch(Batch::seal(epoch, at.seq + 1, at.hash, &mut events).unwrap());
        at = Cursor { seq: link.last_seq(), hash: link.hash() };
        Entry { agent: agent(name), received: Timestamp::from_secs(i as i64), link }
    };
    (0..links).map(next).collect()
}

fn tombstone_after(at: Cursor, epoch: Epoch) -> Link {
    let (by_severity, reason, hash) = ([1, 0, 0, 0], LossReason::SpoolFull, Sha256([7; 32]));
    let (first_seq, last_seq) = (at.seq + 1, at.seq + 4);
    Link::Tombstone(Tombstone { epoch, first_seq, last_seq, by_severity, reason, prev: at.hash, hash })
}

fn everything(log: &dyn Log) -> Vec<(u64, Link)> {
    log.read_from(0, usize::MAX).unwrap().into_iter().map(|s| (s.position, s.entry.link)).collect()
}

#[test]
fn what_was_appended_comes_back_untouched_and_in_order() {
    every(|name, open| {
        let entries = [chain("web", E1, 3, 5), chain("db", E1, 2, 1)].concat();
        assert_eq!(open().append(&entries[..2]).unwrap(), 1, "{name}");
        let mut log = open();
        assert_eq!(log.append(&entries[2..]).unwrap(), 3, "{name}");
        let wanted: Vec<(u64, Link)> = (1..).zip(entries.iter().map(|e| e.link.clone())).collect();
        assert_eq!(everything(&*log), wanted, "{name}");
        let third = log.read_from(3, 1).unwrap().remove(0);
        assert_eq!(
            (third.position, &third.entry.agent, third.entry.received),
            (3, &entries[2].agent, entries[2].received)
        );
        assert_eq!(everything(&*open().reader().unwrap()), wanted, "{name}: by a reader of its own");
    });
}

#[test]
fn each_chain_has_its_own_cursor() {
    every(|name, open| {
        let entries = [chain("web", E1, 3, 5), chain("web", E2, 1, 2), chain("db", E1, 2, 1)].concat();
        let mut log = open();
        log.append(&entries).unwrap();
        let at = |agent_name: &str, epoch| log.cursor(&agent(agent_name), epoch).unwrap();
        assert_eq!(at("web", E1), Cursor { seq: 15, hash: entries[2].link.hash() }, "{name}");
        assert_eq!((at("web", E2).seq, at("db", E1).seq, at("db", E2)), (2, 2, Cursor::START), "{name}");
        assert_eq!(log.last_epoch(&agent("web")).unwrap(), Some(E2), "{name}");
        assert_eq!(log.last_epoch(&agent("nobody")).unwrap(), None, "{name}");
    });
}

#[test]
fn a_tombstone_is_a_link_like_others() {
    every(|name, open| {
        let mut log = open();
        let entries = chain("web", E1, 1, 2);
        log.append(&entries).unwrap();
        let link = tombstone_after(log.cursor(&agent("web"), E1).unwrap(), E1);
        log.append(&[Entry { link: link.clone(), ..entries[0].clone() }]).unwrap();
        assert_eq!(everything(&*log)[1].1, link, "{name}");
        assert_eq!(log.cursor(&agent("web"), E1).unwrap(), Cursor { seq: 6, hash: link.hash() }, "{name}");
        assert_eq!(log.extent().unwrap().events, 2, "{name}");
    });
}

#[test]
fn a_group_is_taken_whole_or_not_at_all() {
    every(|name, open| {
        let mut log = open();
        let entries = chain("web", E1, 3, 2);
        log.append(&entries[..1]).unwrap();
        let before = log.extent().unwrap();
        // The last of the group is there already.
        let group = [entries[1].clone(), entries[2].clone(), entries[0].clone()];
        assert!(log.append(&group).is_err(), "{name}: the same link twice");
        assert_eq!((log.extent().unwrap(), everything(&*log).len()), (before, 1), "{name}");
        assert_eq!(log.append(&entries[1..]).unwrap(), 2, "{name}");
    });
}

#[test]
fn trimming_takes_the_oldest_and_keeps_cursors_and_positions() {
    every(|name, open| {
        let mut log = open();
        let entries = chain("web", E1, 10, 3);
        log.append(&entries).unwrap();
        let two: usize = entries[8..].iter().map(|e| e.link.encode().len()).sum();
        let keep = |secs, bytes, up_to| Keep { before: Timestamp::from_secs(secs), bytes, up_to };
        assert_eq!(log.trim(keep(0, u64::MAX, 99)).unwrap(), 0, "{name}: nothing is over");
        assert_eq!(log.trim(keep(5, u64::MAX, 3)).unwrap(), 3, "{name}: by age, as far as the snapshot reaches");
        assert_eq!(log.trim(keep(5, u64::MAX, 99)).unwrap(), 2, "{name}: by age");
        assert_eq!(log.trim(keep(0, two as u64, 99)).unwrap(), 3, "{name}: by size");
        let left = log.extent().unwrap();
        assert_eq!((left.tail, left.head, left.links, left.events), (9, 10, 2, 6), "{name}");
        while log.trim(keep(99, 0, 99)).unwrap() > 0 {}
        assert_eq!((log.extent().unwrap().links, log.extent().unwrap().bytes), (0, 0), "{name}");
        drop(log);
        let mut log = open();
        assert_eq!(log.cursor(&agent("web"), E1).unwrap().seq, 30, "{name}");
        assert_eq!(log.append(&chain("db", E1, 1, 1)).unwrap(), 11, "{name}: positions are not used twice");
    });
}

#[test]
fn a_snapshot_replaces_the_one_before() {
    every(|name, open| {
        let mut log = open();
        assert_eq!(log.snapshot().unwrap(), None, "{name}");
        log.save_snapshot(3, b"three").unwrap();
        log.save_snapshot(5, b"five").unwrap();
        assert_eq!(open().snapshot().unwrap(), Some((5, b"five".to_vec())), "{name}");
    });
}

#[test]
fn a_reader_sees_what_is_appended_after_it_was_opened() {
    every(|name, open| {
        let mut log = open();
        let reader = log.reader().unwrap();
        log.append(&chain("web", E1, 2, 1)).unwrap();
        assert_eq!(everything(&*reader).len(), 2, "{name}");
    });
}

#[test]
fn a_file_of_a_newer_version_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log.db");
    drop(SqliteLog::open(&path).unwrap());
    rusqlite::Connection::open(&path).unwrap().pragma_update(None, "user_version", 9).unwrap();
    assert!(matches!(SqliteLog::open(&path), Err(LogError::Form { found: 9, .. })));
}

#[test]
fn a_file_that_is_no_log_is_an_error_and_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log.db");
    std::fs::write(&path, vec![b'x'; 8192]).unwrap();
    assert!(SqliteLog::open(&path).is_err());
    assert_eq!(std::fs::read(&path).unwrap().len(), 8192);
}
