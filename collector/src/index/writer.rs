//! Puts committed links into the index, and makes it anew from the log where it is missing, behind or corrupt.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Transaction, params};
use sidewarden_proto::batch::{Lines, Link, Malformed};
use sidewarden_proto::event::{EventRef, Severity};
use sidewarden_proto::identity::AgentId;

use super::{IndexError, judged};
use crate::log::{Log, LogError, Stored};

/// The form of the file. Another one is not converted but rebuilt.
const FORM: i64 = 2;
/// Links read from the log at once while catching up.
const STEP: usize = 256;
/// Distinct kinds noted for a batch; a batch with more is looked into for every question.
const MAX_KINDS: usize = 32;

const SCHEMA: &str = "
    CREATE TABLE agent (id INTEGER PRIMARY KEY, workload TEXT NOT NULL, instance TEXT NOT NULL,
        UNIQUE (workload, instance));
    CREATE TABLE batch (position INTEGER PRIMARY KEY, agent INTEGER NOT NULL, min_at INTEGER NOT NULL,
        max_at INTEGER NOT NULL, severity INTEGER NOT NULL, kinds TEXT NOT NULL);
    CREATE INDEX batch_agent ON batch (agent, position);
    CREATE TABLE notable (position INTEGER NOT NULL, seq INTEGER NOT NULL, agent INTEGER NOT NULL,
        epoch BLOB NOT NULL, at INTEGER NOT NULL, received INTEGER NOT NULL, severity INTEGER NOT NULL,
        kind TEXT NOT NULL, summary TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (position, seq)) WITHOUT ROWID;
    CREATE INDEX notable_agent ON notable (agent, position, seq);
    CREATE INDEX notable_kind ON notable (kind, position, seq);
    CREATE TABLE judged (agent INTEGER NOT NULL, container TEXT NOT NULL, position INTEGER NOT NULL,
        seq INTEGER NOT NULL, received INTEGER NOT NULL, kind TEXT NOT NULL,
        PRIMARY KEY (agent, container, position, seq)) WITHOUT ROWID;
    CREATE INDEX judged_container ON judged (container, position) WHERE container <> '';
    CREATE INDEX judged_position ON judged (position);
    CREATE TABLE reach (position INTEGER NOT NULL);
    INSERT INTO reach VALUES (0);
";

/// A committed link with its events, to be indexed. A tombstone has none.
#[derive(Debug)]
pub struct Indexed<'a> {
    /// The link.
    pub stored: &'a Stored,
    /// Its events.
    pub events: &'a [EventRef<'a>],
}

/// The index's one writer.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    db: Connection,
    reach: u64,
}

impl Writer {
    /// Opens the index at `path`. One that cannot be used is thrown away: it holds nothing that the log does not.
    pub fn open(path: &Path) -> Result<Writer, IndexError> {
        match Writer::open_as_is(path) {
            Ok(writer) => Ok(writer),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the index cannot be used and is rebuilt from the log");
                remove(path);
                Writer::open_as_is(path)
            }
        }
    }

    fn open_as_is(path: &Path) -> Result<Writer, IndexError> {
        let open = || -> Result<(Connection, u64), rusqlite::Error> {
            let mut db = Connection::open(path)?;
            db.busy_timeout(Duration::from_secs(5))?;
            db.set_prepared_statement_cache_capacity(32);
            // NORMAL: after a power cut the index may be behind the log, and catches up.
            db.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;")?;
            prepare(&mut db)?;
            db.query_row("PRAGMA quick_check(1)", [], |row| row.get::<_, String>(0))
                .and_then(|word| if word == "ok" { Ok(()) } else { Err(corrupt()) })?;
            let reach: i64 = db.query_row("SELECT position FROM reach", [], |row| row.get(0))?;
            Ok((db, reach as u64))
        };
        let (db, reach) = open().map_err(|error| IndexError::Sqlite { path: path.to_owned(), error })?;
        Ok(Writer { path: path.to_owned(), db, reach })
    }

    /// Up to which position of the log it reaches.
    pub fn reach(&self) -> u64 {
        self.reach
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes in links that follow what it has. Those it has are skipped.
    pub fn apply(&mut self, links: &[Indexed<'_>]) -> Result<(), IndexError> {
        let reach = self.reach;
        let Some(last) = links.last().map(|l| l.stored.position).filter(|last| *last > reach) else { return Ok(()) };
        let mut write = || -> Result<(), rusqlite::Error> {
            let tx = self.db.transaction()?;
            links.iter().filter(|l| l.stored.position > reach).try_for_each(|link| insert(&tx, link))?;
            tx.execute("UPDATE reach SET position = ?1", [last as i64])?;
            tx.commit()
        };
        write().map_err(|error| IndexError::Sqlite { path: self.path.clone(), error })?;
        self.reach = last;
        Ok(())
    }

    /// Reads what it misses from `log`; how many links. An index that is ahead of the log belongs to another one.
    pub fn catch_up(&mut self, log: &dyn Log) -> Result<u64, IndexError> {
        let extent = log.extent()?;
        if self.reach > extent.head {
            self.rebuild()?;
        }
        let (mut count, mut from) = (0, self.reach + 1);
        loop {
            let links = match log.read_from(from, STEP) {
                Ok(links) if links.is_empty() => return Ok(count),
                Ok(links) => links,
                Err(LogError::Damaged { position, error }) => {
                    tracing::error!(position, %error, "a link in the log is damaged and not in the index");
                    from = position + 1;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            (count, from) = (count + links.len() as u64, from + links.len() as u64);
            self.take(&links)?;
            from = from.max(self.reach + 1);
        }
    }

    fn take(&mut self, links: &[Stored]) -> Result<(), IndexError> {
        let texts: Vec<Option<Lines>> = links.iter().map(text).collect();
        let events: Vec<Vec<EventRef<'_>>> =
            links.iter().zip(&texts).map(|(stored, text)| readable(stored, text.as_ref().map(Lines::events))).collect();
        let indexed: Vec<_> = links.iter().zip(&events).map(|(stored, events)| Indexed { stored, events }).collect();
        self.apply(&indexed)
    }

    /// Forgets what stands before `tail`, the oldest position left in the log.
    pub fn trim(&mut self, tail: u64) -> Result<(), IndexError> {
        let mut write = || -> Result<(), rusqlite::Error> {
            let tx = self.db.transaction()?;
            tx.execute("DELETE FROM batch WHERE position < ?1", [tail as i64])?;
            tx.execute("DELETE FROM notable WHERE position < ?1", [tail as i64])?;
            tx.execute("DELETE FROM judged WHERE position < ?1", [tail as i64])?;
            tx.commit()
        };
        write().map_err(|error| IndexError::Sqlite { path: self.path.clone(), error })
    }

    fn rebuild(&mut self) -> Result<(), IndexError> {
        tracing::warn!(path = %self.path.display(), "the index belongs to another log and is rebuilt");
        let mut write = || -> Result<(), rusqlite::Error> {
            let tx = self.db.transaction()?;
            tx.execute_batch(
                "DELETE FROM batch; DELETE FROM notable; DELETE FROM judged; DELETE FROM agent; UPDATE reach SET position = 0;",
            )?;
            tx.commit()
        };
        write().map_err(|error| IndexError::Sqlite { path: self.path.clone(), error })?;
        self.reach = 0;
        Ok(())
    }
}

fn text(stored: &Stored) -> Option<Lines> {
    match &stored.entry.link {
        Link::Batch(batch) => Some(readable(stored, Some(batch.open().map(Some)))).flatten(),
        Link::Tombstone(_) => None,
    }
}

/// What could be read; nothing, and a line in our log, where that part of the file is damaged.
fn readable<T: Default>(stored: &Stored, read: Option<Result<T, Malformed>>) -> T {
    read.unwrap_or_else(|| Ok(T::default())).unwrap_or_else(|error| {
        tracing::error!(position = stored.position, %error, "a link in the log is damaged and its events are not found");
        T::default()
    })
}

fn corrupt() -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT), None)
}

fn prepare(db: &mut Connection) -> Result<(), rusqlite::Error> {
    let form: i64 = db.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if form == FORM {
        return Ok(());
    }
    if form != 0 {
        return Err(corrupt());
    }
    let tx = db.transaction()?;
    tx.execute_batch(SCHEMA)?;
    tx.pragma_update(None, "user_version", FORM)?;
    tx.commit()
}

fn remove(path: &Path) {
    for end in ["", "-wal", "-shm"] {
        let mut name = path.as_os_str().to_owned();
        name.push(end);
        let _ = std::fs::remove_file(name);
    }
}

fn insert(tx: &Transaction<'_>, link: &Indexed<'_>) -> Result<(), rusqlite::Error> {
    let (stored, Link::Batch(batch)) = (link.stored, &link.stored.entry.link) else { return Ok(()) };
    let agent = agent_id(tx, &stored.entry.agent)?;
    // The header is the agent's word; what is searched by is taken from the events themselves.
    let times = || link.events.iter().map(|e| e.at_us.0);
    let severity = link.events.iter().map(|e| e.severity.rank()).max().unwrap_or(0) as i64;
    tx.prepare_cached("INSERT INTO batch VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?.execute(params![
        stored.position as i64,
        agent,
        times().min().unwrap_or(batch.header.min_at.0),
        times().max().unwrap_or(batch.header.max_at.0),
        severity,
        kinds(link.events)
    ])?;
    let mut row = tx.prepare_cached("INSERT INTO notable VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)")?;
    for event in link.events.iter().filter(|e| e.severity >= Severity::Warning) {
        row.execute(params![
            stored.position as i64,
            event.seq as i64,
            agent,
            batch.header.epoch.0,
            event.at_us.0,
            stored.entry.received.0,
            event.severity.rank() as i64,
            event.kind,
            event.summary,
            event.body.get()
        ])?;
    }
    let mut judged = tx.prepare_cached("INSERT OR IGNORE INTO judged VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?;
    for event in link.events {
        let Some((of, container)) = judged::about(&stored.entry.agent, event) else { continue };
        let of = if of == *stored.entry.agent { agent } else { agent_id(tx, &of)? };
        let (position, received) = (stored.position as i64, stored.entry.received.0);
        judged.execute(params![of, container, position, event.seq as i64, received, event.kind])?;
    }
    Ok(())
}

/// Every kind of a batch as `,a,b,`, or `*` when there are too many to note.
fn kinds(events: &[EventRef<'_>]) -> String {
    let mut kinds: Vec<&str> = Vec::new();
    for event in events {
        if !kinds.contains(&event.kind.as_ref()) {
            kinds.push(&event.kind);
        }
        if kinds.len() > MAX_KINDS || event.kind.contains(',') {
            return "*".to_owned();
        }
    }
    format!(",{},", kinds.join(","))
}

fn agent_id(tx: &Transaction<'_>, agent: &AgentId) -> Result<i64, rusqlite::Error> {
    let names = [agent.workload.as_str(), agent.instance.as_str()];
    let known = tx
        .prepare_cached("SELECT id FROM agent WHERE workload = ?1 AND instance = ?2")?
        .query_row(names, |row| row.get(0))
        .optional()?;
    match known {
        Some(id) => Ok(id),
        None => tx.prepare_cached("INSERT INTO agent (workload, instance) VALUES (?1, ?2)")?.insert(names),
    }
}
