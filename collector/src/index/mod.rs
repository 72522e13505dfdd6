//! Answers every question about events, from a local SQLite file that can be rebuilt from the log at any time.
//!
//! Events of warning and above have rows of their own; of all others only the range, the kinds and the highest severity
//! of their batch are kept, and a batch is decompressed when a question really reaches it. An answer says how far it
//! looked: no question may hold the store for long. Events that say how somebody was judged have rows that name them
//! (`judged`), so that the posture of any past moment is a few steps away.

mod judged;
mod query;
mod writer;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sidewarden_proto::batch::Epoch;
use sidewarden_proto::event::{Event, Severity};
use sidewarden_proto::identity::{AgentId, InstanceId, SpiffeId};
use sidewarden_proto::time::Timestamp;

pub use judged::{Past, Told};
pub use query::Index;
pub use writer::{Indexed, Writer};

use crate::log::LogError;

/// Most events in one answer.
pub const MAX_LIMIT: usize = 1000;

/// Where an event stands in the whole history. Shows as `<position>.<seq>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Place {
    /// Position of its link in the log.
    pub position: u64,
    /// Its number in its agent's epoch.
    pub seq: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.position, self.seq)
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Place, String> {
        let fault = || format!("`{}` is no cursor: take it from an answer", text.chars().take(40).collect::<String>());
        let (position, seq) = text.split_once('.').ok_or_else(fault)?;
        let number = |text: &str| text.parse::<u64>().map_err(|_| fault());
        Ok(Place { position: number(position)?, seq: number(seq)? })
    }
}

impl TryFrom<String> for Place {
    type Error = String;
    fn try_from(text: String) -> Result<Place, String> {
        text.parse()
    }
}

impl From<Place> for String {
    fn from(place: Place) -> String {
        place.to_string()
    }
}

/// From where, and which way, the history is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Newest first, before this place; from the newest when there is none.
    Newest(Option<Place>),
    /// Oldest first, after this place; from the oldest when there is none.
    Oldest(Option<Place>),
}

/// A question.
#[derive(Clone, Debug)]
pub struct Query {
    /// Only these kinds; all when empty.
    pub kinds: Vec<String>,
    /// Only this workload.
    pub workload: Option<SpiffeId>,
    /// Only this instance.
    pub instance: Option<InstanceId>,
    /// Only this severity and above.
    pub min_severity: Severity,
    /// Only what happened at this moment or later, by the agents' clocks.
    pub since: Option<Timestamp>,
    /// Only what happened before this moment, by the agents' clocks.
    pub until: Option<Timestamp>,
    /// From where, and which way.
    pub order: Order,
    /// Most events of the answer; never more than [`MAX_LIMIT`].
    pub limit: usize,
}

impl Default for Query {
    fn default() -> Query {
        Query {
            kinds: Vec::new(),
            workload: None,
            instance: None,
            min_severity: Severity::Info,
            since: None,
            until: None,
            order: Order::Newest(None),
            limit: 100,
        }
    }
}

/// An event of the history, as the API shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Where it stands.
    pub cursor: Place,
    /// Who sent it.
    pub agent: Arc<AgentId>,
    /// The life of the sender's spool.
    pub epoch: Epoch,
    /// Its number in that life.
    pub seq: u64,
    /// When it happened, by the agent's clock.
    pub at_us: Timestamp,
    /// When the collector took it.
    pub received_us: Timestamp,
    /// What it is.
    pub kind: String,
    /// How much it matters.
    pub severity: Severity,
    /// One line for a person.
    pub summary: String,
    /// The details, as sent.
    pub body: Box<RawValue>,
}

impl Record {
    /// The record of `event`, which stands in the link at `position`.
    pub fn of(position: u64, agent: &Arc<AgentId>, epoch: Epoch, received: Timestamp, event: &Event) -> Record {
        Record {
            cursor: Place { position, seq: event.seq },
            agent: agent.clone(),
            epoch,
            seq: event.seq,
            at_us: event.at_us,
            received_us: received,
            kind: event.kind.to_string(),
            severity: event.severity,
            summary: event.summary.clone(),
            body: event.body.clone(),
        }
    }
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The events, in the order asked for.
    pub events: Vec<Record>,
    /// Where to go on; `None` when the history was read to its end.
    pub next: Option<Place>,
}

/// What the index could not do.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// SQLite refused.
    #[error("index {path}: {error}")]
    Sqlite {
        /// Which file.
        path: PathBuf,
        /// What it said.
        error: rusqlite::Error,
    },
    /// The log refused.
    #[error(transparent)]
    Log(#[from] LogError),
    /// What it holds cannot be read; it is rebuilt at the next start.
    #[error("index: {0}")]
    Damaged(String),
}

#[cfg(test)]
mod tests {
    use sidewarden_proto::batch::{Batch, Cursor, Link};
    use sidewarden_proto::event::{AgentStopping, Body};
    use tempfile::TempDir;

    use super::*;
    use crate::log::{Entry, Log, SqliteLog};

    /// Two agents, 20 batches of 5 events in turn; event n of all happens at second n.
    struct World {
        dir: TempDir,
        log: SqliteLog,
    }

    fn agent(name: &str) -> Arc<AgentId> {
        Arc::new(format!("spiffe://x.example/shop/{name}#c1").parse().unwrap())
    }

    fn event(n: usize) -> Event {
        let mut event = Event::new(
            Timestamp::from_secs(n as i64),
            Severity::ALL[n % 4],
            format!("event {n}"),
            &Body::from(AgentStopping { reason: n.to_string() }),
        );
        event.kind = if n.is_multiple_of(10) { "rare".into() } else { "common".into() };
        event
    }

    impl World {
        fn new() -> World {
            let dir = tempfile::tempdir().unwrap();
            let mut log = SqliteLog::open(&dir.path().join("log.db")).unwrap();
            let mut at = [Cursor::START; 2];
            for batch in 0..20 {
                let which = batch % 2;
                let mut events: Vec<Event> = (batch * 5..batch * 5 + 5).map(event).collect();
                let from = at[which];
                let link = Link::Batch(Batch::seal(Epoch([1; 16]), from.seq + 1, from.hash, &mut events).unwrap());
                at[which] = Cursor { seq: link.last_seq(), hash: link.hash() };
                let received = Timestamp::from_secs(1000 + batch as i64);
                log.append(&[Entry { agent: agent(["web", "db"][which]), received, link }]).unwrap();
            }
            World { dir, log }
        }

        fn path(&self) -> std::path::PathBuf {
            self.dir.path().join("index.db")
        }

        fn index(&self) -> Index {
            Writer::open(&self.path()).unwrap().catch_up(&self.log).unwrap();
            Index::open(&self.path(), self.log.reader().unwrap()).unwrap()
        }
    }

    fn numbers(answer: &Answer) -> Vec<usize> {
        answer.events.iter().map(|e| e.summary["event ".len()..].parse().unwrap()).collect()
    }

    fn wanted(query: &Query, newest: bool) -> Vec<usize> {
        let is = |n: &usize| {
            let (event, batch) = (event(*n), n / 5);
            let (since, until) = (query.since.unwrap_or(Timestamp(0)), query.until.unwrap_or(Timestamp(i64::MAX)));
            event.severity >= query.min_severity
                && (query.kinds.is_empty() || query.kinds.contains(&event.kind.to_string()))
                && query.workload.as_ref().is_none_or(|w| *w == agent(["web", "db"][batch % 2]).workload)
                && (since..until).contains(&event.at_us)
        };
        let found = (0..100).filter(is);
        if newest { found.rev().collect::<Vec<_>>() } else { found.collect() }
    }

    /// A batch is one place after another, so newest-first goes by batch and by number: here that is by `n`.
    #[test]
    fn every_question_has_the_same_answer_as_looking_at_everything() {
        let world = World::new();
        let index = world.index();
        let web = Some(agent("web").workload.clone());
        let kinds =
            [vec![], vec!["rare".to_owned()], vec!["rare".to_owned(), "common".to_owned()], vec!["no".to_owned()]];
        for min_severity in Severity::ALL {
            for kinds in &kinds {
                for workload in [None, web.clone()] {
                    for (since, until) in [(None, None), (Some(20), Some(70)), (Some(95), None), (None, Some(3))] {
                        let (since, until) = (since.map(Timestamp::from_secs), until.map(Timestamp::from_secs));
                        let (kinds, workload) = (kinds.clone(), workload.clone());
                        let base = Query { kinds, workload, min_severity, since, until, ..Query::default() };
                        for newest in [true, false] {
                            let order = if newest { Order::Newest(None) } else { Order::Oldest(None) };
                            let query = Query { order, ..base.clone() };
                            let answer = index.query_now(&query).unwrap();
                            assert_eq!(numbers(&answer), wanted(&query, newest), "{query:?}");
                            assert_eq!(answer.next, None, "{query:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn pages_join_without_gap_or_overlap() {
        let world = World::new();
        let index = world.index();
        for min_severity in [Severity::Info, Severity::Warning] {
            for newest in [true, false] {
                let (mut seen, mut at) = (Vec::new(), None);
                loop {
                    let order = if newest { Order::Newest(at) } else { Order::Oldest(at) };
                    let answer = index.query_now(&Query { min_severity, order, limit: 7, ..Query::default() }).unwrap();
                    seen.extend(numbers(&answer));
                    at = answer.next;
                    if at.is_none() {
                        break;
                    }
                }
                assert_eq!(seen, wanted(&Query { min_severity, ..Query::default() }, newest));
            }
        }
    }

    #[test]
    fn a_record_has_the_body_as_sent() {
        let world = World::new();
        for min_severity in [Severity::Info, Severity::Critical] {
            let query = Query { min_severity, limit: 1, ..Query::default() };
            let record = world.index().query_now(&query).unwrap().events.remove(0);
            assert_eq!((record.body.get(), record.cursor.position), (r#"{"reason":"99"}"#, 20));
            assert_eq!((record.received_us, record.agent), (Timestamp::from_secs(1019), agent("db")));
        }
    }

    #[test]
    fn an_index_that_is_missing_corrupt_or_of_another_log_is_made_anew() {
        let world = World::new();
        let count = |index: Index| index.query_now(&Query { limit: 1000, ..Query::default() }).unwrap().events.len();
        assert_eq!(count(world.index()), 100);
        for damage in [&b"garbage"[..], &[0; 40_000]] {
            std::fs::write(world.path(), damage).unwrap();
            assert_eq!(count(world.index()), 100);
        }
        let other = rusqlite::Connection::open(world.path()).unwrap();
        other.execute("UPDATE reach SET position = 999", []).unwrap();
        let mut writer = Writer::open(&world.path()).unwrap();
        writer.catch_up(&world.log).unwrap();
        assert_eq!(writer.reach(), 20);
        assert_eq!(count(world.index()), 100);
    }

    #[test]
    fn what_was_trimmed_is_not_found() {
        let world = World::new();
        let mut writer = Writer::open(&world.path()).unwrap();
        writer.catch_up(&world.log).unwrap();
        writer.trim(11).unwrap();
        let index = Index::open(&world.path(), world.log.reader().unwrap()).unwrap();
        for (min_severity, first) in [(Severity::Info, 50), (Severity::Warning, 50)] {
            let query = Query { min_severity, order: Order::Oldest(None), ..Query::default() };
            assert_eq!(numbers(&index.query_now(&query).unwrap())[0], first);
        }
    }

    #[test]
    fn a_place_is_read_as_it_is_shown() {
        let place = Place { position: 12, seq: 7 };
        assert_eq!("12.7".parse(), Ok(place));
        assert_eq!(place.to_string(), "12.7");
        ["", "12", "a.b", "-1.2", "1.2.3"].iter().for_each(|bad| assert!(bad.parse::<Place>().is_err(), "{bad}"));
    }
}
