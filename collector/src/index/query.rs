//! Reading: one question, one answer, and never more work than a question may cost.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::types::Value;
use rusqlite::{Connection, OpenFlags, params_from_iter};
use serde_json::value::RawValue;
use sidewarden_proto::batch::{Epoch, Link, Malformed};
use sidewarden_proto::event::{EventRef, Severity};
use sidewarden_proto::identity::AgentId;
use sidewarden_proto::policy::Pattern;
use sidewarden_proto::time::Timestamp;

use super::judged::Past;
use super::{Answer, IndexError, MAX_LIMIT, Order, Place, Query, Record};
use crate::log::{Log, LogError, Stored};

/// Batches decompressed for one answer; then it ends early and says where to go on.
const MAX_BATCHES: usize = 512;

/// A reader of the index, for any number of tasks.
#[derive(Clone)]
pub struct Index(Arc<Mutex<Reader>>);

pub(super) struct Reader {
    pub(super) db: Connection,
    log: Box<dyn Log>,
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Index")
    }
}

impl Index {
    /// A reader of the index at `path`, which a [`super::Writer`] has opened before, over `log`.
    pub fn open(path: &Path, log: Box<dyn Log>) -> Result<Index, IndexError> {
        let open = || {
            let db =
                Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
            db.busy_timeout(Duration::from_secs(5))?;
            Ok(db)
        };
        let db = open().map_err(|error| IndexError::Sqlite { path: path.to_owned(), error })?;
        Ok(Index(Arc::new(Mutex::new(Reader { db, log }))))
    }

    /// Answers `query` on a thread that may block.
    pub async fn query(&self, query: Query) -> Result<Answer, IndexError> {
        let index = self.clone();
        tokio::task::spawn_blocking(move || index.query_now(&query))
            .await
            .unwrap_or_else(|error| Err(IndexError::Damaged(format!("a question did not end: {error}"))))
    }

    /// What was told by `at` of how those in `scope` were judged, on a thread that may block.
    pub async fn past(&self, scope: Vec<Pattern>, at: Timestamp) -> Result<Past, IndexError> {
        let index = self.clone();
        tokio::task::spawn_blocking(move || index.past_now(&scope, at))
            .await
            .unwrap_or_else(|error| Err(IndexError::Damaged(format!("a question did not end: {error}"))))
    }

    /// The same on this thread.
    pub fn past_now(&self, scope: &[Pattern], at: Timestamp) -> Result<Past, IndexError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).past(scope, at)
    }

    /// Answers `query` on this thread.
    pub fn query_now(&self, query: &Query) -> Result<Answer, IndexError> {
        // Nothing in here leaves the reader half changed, so a panic of another question does not matter.
        let reader = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = query.limit.clamp(1, MAX_LIMIT);
        if query.min_severity >= Severity::Warning { reader.rows(query, limit) } else { reader.batches(query, limit) }
    }
}

/// Conditions of a question in SQL, with their values.
struct Where {
    text: String,
    values: Vec<Value>,
}

impl Where {
    fn new() -> Where {
        Where { text: "1".to_owned(), values: Vec::new() }
    }

    fn and(&mut self, condition: &str, values: impl IntoIterator<Item = Value>) {
        self.text += " AND ";
        self.text += condition;
        self.values.extend(values);
    }

    fn number(&mut self, condition: &str, number: i64) {
        self.and(condition, [Value::Integer(number)]);
    }

    /// Conditions on the agent, by its id, so that SQLite can use the index on it.
    fn agent(&mut self, query: &Query) {
        let mut inner = Where::new();
        if let Some(workload) = &query.workload {
            inner.and("workload = ?", [Value::Text(workload.to_string())]);
        }
        if let Some(instance) = &query.instance {
            inner.and("instance = ?", [Value::Text(instance.to_string())]);
        }
        if !inner.values.is_empty() {
            self.and(&format!("agent IN (SELECT id FROM agent WHERE {})", inner.text), inner.values);
        }
    }
}

fn order_words(order: Order) -> &'static str {
    match order {
        Order::Newest(_) => "DESC",
        Order::Oldest(_) => "ASC",
    }
}

impl Reader {
    /// Warning and above: from the rows alone.
    fn rows(&self, query: &Query, limit: usize) -> Result<Answer, IndexError> {
        let mut conditions = Where::new();
        conditions.number("severity >= ?", query.min_severity.rank() as i64);
        conditions.agent(query);
        if !query.kinds.is_empty() {
            let marks = vec!["?"; query.kinds.len()].join(", ");
            conditions.and(&format!("kind IN ({marks})"), query.kinds.iter().cloned().map(Value::Text));
        }
        query.since.into_iter().for_each(|at| conditions.number("at >= ?", at.0));
        query.until.into_iter().for_each(|at| conditions.number("at < ?", at.0));
        match query.order {
            Order::Newest(Some(p)) => conditions.and("(position, seq) < (?, ?)", place_values(p)),
            Order::Oldest(Some(p)) => conditions.and("(position, seq) > (?, ?)", place_values(p)),
            _ => {}
        }
        let way = order_words(query.order);
        let sql = format!(
            "SELECT position, seq, workload, instance, epoch, at, received, severity, kind, summary, body
             FROM notable JOIN agent ON agent.id = notable.agent WHERE {}
             ORDER BY position {way}, seq {way} LIMIT {}",
            conditions.text,
            limit + 1
        );
        let mut statement = self.db.prepare_cached(&sql).map_err(unreadable)?;
        let mut rows = statement.query(params_from_iter(conditions.values)).map_err(unreadable)?;
        let mut events = Vec::new();
        while let Some(row) = rows.next().map_err(unreadable)? {
            events.push(record(row)?);
        }
        let more = events.len() > limit;
        events.truncate(limit);
        let next = events.last().filter(|_| more).map(|e| e.cursor);
        Ok(Answer { events, next })
    }

    /// Everything: batch after batch, decompressing only those that can hold an answer.
    fn batches(&self, query: &Query, limit: usize) -> Result<Answer, IndexError> {
        let positions = self.candidates(query)?;
        let (mut events, mut looked_at) = (Vec::<Record>::new(), None);
        let exhausted = positions.len() <= MAX_BATCHES;
        for position in positions.into_iter().take(MAX_BATCHES) {
            // Trimmed between the two reads: then it is no longer part of the history.
            let Some(stored) = self.link(position)? else { continue };
            match matching(&stored, query) {
                Ok(found) => events.extend(found),
                // One damaged batch does not hide all the others; the start of the collector names it, too.
                Err(error) => tracing::error!(position, %error, "a batch in the log is damaged"),
            }
            if events.len() > limit {
                events.truncate(limit);
                let next = events.last().map(|e| e.cursor);
                return Ok(Answer { events, next });
            }
            looked_at = Some(far_end(&stored, query.order));
        }
        Ok(Answer { events, next: looked_at.filter(|_| !exhausted) })
    }

    /// The link at `position`, unless it was trimmed or is damaged.
    pub(super) fn link(&self, position: u64) -> Result<Option<Stored>, IndexError> {
        match self.log.read_from(position, 1) {
            Ok(mut links) => Ok(links.pop().filter(|stored| stored.position == position)),
            Err(LogError::Damaged { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn candidates(&self, query: &Query) -> Result<Vec<u64>, IndexError> {
        let mut conditions = Where::new();
        conditions.agent(query);
        conditions.number("severity >= ?", query.min_severity.rank() as i64);
        query.since.into_iter().for_each(|at| conditions.number("max_at >= ?", at.0));
        query.until.into_iter().for_each(|at| conditions.number("min_at < ?", at.0));
        match query.order {
            Order::Newest(Some(p)) => conditions.number("position <= ?", clamp(p.position)),
            Order::Oldest(Some(p)) => conditions.number("position >= ?", clamp(p.position)),
            _ => {}
        }
        if !query.kinds.is_empty() {
            let any = vec!["instr(kinds, ',' || ? || ',')"; query.kinds.len()].join(" OR ");
            conditions.and(&format!("(kinds = '*' OR {any})"), query.kinds.iter().cloned().map(Value::Text));
        }
        let sql = format!(
            "SELECT position FROM batch WHERE {} ORDER BY position {} LIMIT {}",
            conditions.text,
            order_words(query.order),
            MAX_BATCHES + 1
        );
        let mut statement = self.db.prepare_cached(&sql).map_err(unreadable)?;
        let rows = statement
            .query_map(params_from_iter(conditions.values), |row| row.get::<_, i64>(0).map(|p| p as u64))
            .map_err(unreadable)?;
        rows.collect::<Result<_, _>>().map_err(unreadable)
    }
}

fn clamp(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn place_values(place: Place) -> [Value; 2] {
    [Value::Integer(clamp(place.position)), Value::Integer(clamp(place.seq))]
}

pub(super) fn unreadable(error: rusqlite::Error) -> IndexError {
    IndexError::Damaged(error.to_string())
}

/// The last place of a batch in the direction of reading.
fn far_end(stored: &Stored, order: Order) -> Place {
    let link = &stored.entry.link;
    let seq = if matches!(order, Order::Newest(_)) { link.first_seq() } else { link.last_seq() };
    Place { position: stored.position, seq }
}

fn matching(stored: &Stored, query: &Query) -> Result<Vec<Record>, Malformed> {
    let Link::Batch(batch) = &stored.entry.link else { return Ok(Vec::new()) };
    let lines = batch.open()?;
    let events = lines.events()?;
    let found = events.iter().filter(|event| is_wanted(stored.position, event, query));
    let to_record = |event: &EventRef<'_>| {
        let entry = &stored.entry;
        Record::of(stored.position, &entry.agent, entry.link.epoch(), entry.received, &event.to_owned())
    };
    Ok(match query.order {
        Order::Newest(_) => found.rev().map(to_record).collect(),
        Order::Oldest(_) => found.map(to_record).collect(),
    })
}

fn is_wanted(position: u64, event: &EventRef<'_>, query: &Query) -> bool {
    let place = Place { position, seq: event.seq };
    let beyond = match query.order {
        Order::Newest(Some(before)) => place < before,
        Order::Oldest(Some(after)) => place > after,
        _ => true,
    };
    beyond
        && event.severity >= query.min_severity
        && (query.kinds.is_empty() || query.kinds.iter().any(|k| *k == event.kind))
        && query.since.is_none_or(|since| event.at_us >= since)
        && query.until.is_none_or(|until| event.at_us < until)
}

fn record(row: &rusqlite::Row<'_>) -> Result<Record, IndexError> {
    let damaged = |what: &str| IndexError::Damaged(format!("a row's {what} cannot be read"));
    let read = || -> Result<_, rusqlite::Error> {
        let numbers = [row.get(0)?, row.get(1)?, row.get(5)?, row.get(6)?, row.get::<_, i64>(7)?];
        let texts: [String; 5] = [row.get(2)?, row.get(3)?, row.get(8)?, row.get(9)?, row.get(10)?];
        Ok((numbers, Epoch(row.get(4)?), texts))
    };
    let ([position, seq, at, received, severity], epoch, [workload, instance, kind, summary, body]) =
        read().map_err(unreadable)?;
    let workload = workload.parse().map_err(|_| damaged("workload"))?;
    let instance = instance.parse().map_err(|_| damaged("instance"))?;
    Ok(Record {
        cursor: Place { position: position as u64, seq: seq as u64 },
        agent: Arc::new(AgentId { workload, instance }),
        epoch,
        seq: seq as u64,
        at_us: Timestamp(at),
        received_us: Timestamp(received),
        kind,
        severity: *Severity::ALL.get(severity as usize).ok_or_else(|| damaged("severity"))?,
        summary,
        body: RawValue::from_string(body).map_err(|_| damaged("body"))?,
    })
}
