//! The log in one SQLite file: a row for each link, WAL, and an fsync before every acknowledgement.
//!
//! ```text
//! agent    id | workload | instance
//! link     position | agent | epoch | first_seq | last_seq | tombstone | events | min_at | max_at | severity |
//!          received | bytes (as sent)                                  unique (agent, epoch, first_seq)
//! chain    agent | epoch | seq | hash | touched: how far each chain is known; outlives the links
//! total    head | links | events | bytes: one row, moved in the same transaction as the links
//! snapshot position | state: one row
//! ```
//! A torn write cannot be seen: SQLite takes back what was not committed when the file is opened next.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, params};
use sidewarden_proto::batch::{Cursor, Epoch, Link};
use sidewarden_proto::identity::{AgentId, Sha256};
use sidewarden_proto::time::Timestamp;

use super::{Entry, Extent, Keep, Log, LogError, Stored};

/// The form of the file that this version writes.
const FORM: i64 = 1;
/// Links looked at by one step of [`Log::trim`], so that committing is never held up for long.
const TRIM_STEP: usize = 256;
/// How long a writer in another process (a backup, a shell) may hold the file.
const BUSY: Duration = Duration::from_secs(5);

const SCHEMA: &str = "
    CREATE TABLE agent (id INTEGER PRIMARY KEY, workload TEXT NOT NULL, instance TEXT NOT NULL,
        UNIQUE (workload, instance));
    CREATE TABLE link (position INTEGER PRIMARY KEY, agent INTEGER NOT NULL, epoch BLOB NOT NULL,
        first_seq INTEGER NOT NULL, last_seq INTEGER NOT NULL, tombstone INTEGER NOT NULL, events INTEGER NOT NULL,
        min_at INTEGER NOT NULL, max_at INTEGER NOT NULL, severity INTEGER NOT NULL, received INTEGER NOT NULL,
        bytes BLOB NOT NULL, UNIQUE (agent, epoch, first_seq));
    CREATE TABLE chain (agent INTEGER NOT NULL, epoch BLOB NOT NULL, seq INTEGER NOT NULL, hash BLOB NOT NULL,
        touched INTEGER NOT NULL, PRIMARY KEY (agent, epoch)) WITHOUT ROWID;
    CREATE TABLE total (head INTEGER NOT NULL, links INTEGER NOT NULL, events INTEGER NOT NULL, bytes INTEGER NOT NULL);
    INSERT INTO total VALUES (0, 0, 0, 0);
    CREATE TABLE snapshot (position INTEGER NOT NULL, state BLOB NOT NULL);
";

/// The log in a SQLite file.
#[derive(Debug)]
pub struct SqliteLog {
    path: PathBuf,
    db: Connection,
}

impl SqliteLog {
    /// Opens the log at `path`, or makes it.
    pub fn open(path: &Path) -> Result<SqliteLog, LogError> {
        let mut log = SqliteLog { path: path.to_owned(), db: connect(path, OpenFlags::default())? };
        // FULL: a commit returns after the fsync of the WAL. What was acknowledged survives a power cut.
        log.db
            .execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 4000;")?;
        match log.form()? {
            0 => log.create()?,
            FORM => {}
            found => return Err(LogError::Form { path: path.to_owned(), found, known: FORM }),
        }
        Ok(log)
    }

    fn form(&self) -> Result<i64, LogError> {
        Ok(self.db.pragma_query_value(None, "user_version", |row| row.get(0))?)
    }

    fn create(&mut self) -> Result<(), LogError> {
        let tx = self.db.transaction()?;
        tx.execute_batch(SCHEMA)?;
        tx.pragma_update(None, "user_version", FORM)?;
        Ok(tx.commit()?)
    }

    fn oldest(&self) -> Result<Vec<Oldest>, LogError> {
        let sql = "SELECT position, received, events, length(bytes) FROM link ORDER BY position LIMIT ?1";
        let mut rows = self.db.prepare_cached(sql)?;
        let oldest = rows.query_map([TRIM_STEP as i64], |row| {
            Ok(Oldest { position: row.get(0)?, received: row.get(1)?, events: row.get(2)?, bytes: row.get(3)? })
        })?;
        Ok(oldest.collect::<Result<_, _>>()?)
    }
}

struct Oldest {
    position: i64,
    received: i64,
    events: i64,
    bytes: i64,
}

fn connect(path: &Path, flags: OpenFlags) -> Result<Connection, LogError> {
    let db = Connection::open_with_flags(path, flags).map_err(|error| match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::CannotOpen) => {
            LogError::Access { path: path.to_owned(), error: std::io::Error::other("the file cannot be opened") }
        }
        _ => error.into(),
    })?;
    db.busy_timeout(BUSY)?;
    db.set_prepared_statement_cache_capacity(32);
    Ok(db)
}

fn agent_id(tx: &Connection, agent: &AgentId) -> Result<Option<i64>, LogError> {
    let mut row = tx.prepare_cached("SELECT id FROM agent WHERE workload = ?1 AND instance = ?2")?;
    Ok(row.query_row([agent.workload.as_str(), agent.instance.as_str()], |row| row.get(0)).optional()?)
}

fn agent_id_or_new(tx: &Connection, agent: &AgentId) -> Result<i64, LogError> {
    if let Some(id) = agent_id(tx, agent)? {
        return Ok(id);
    }
    let mut row = tx.prepare_cached("INSERT INTO agent (workload, instance) VALUES (?1, ?2)")?;
    Ok(row.insert([agent.workload.as_str(), agent.instance.as_str()])?)
}

/// Puts one link down; its size in events and bytes.
fn insert(tx: &Transaction<'_>, position: i64, entry: &Entry) -> Result<(i64, i64), LogError> {
    let (agent, link, bytes) = (agent_id_or_new(tx, &entry.agent)?, &entry.link, entry.link.encode());
    let (tombstone, events, min_at, max_at) = match link {
        Link::Batch(b) => (0, i64::from(b.header.count), b.header.min_at.0, b.header.max_at.0),
        Link::Tombstone(_) => (1, 0, entry.received.0, entry.received.0),
    };
    let severity = link.by_severity().iter().rposition(|n| *n > 0).unwrap_or(0) as i64;
    let (first, last, epoch) = (link.first_seq() as i64, link.last_seq() as i64, link.epoch().0);
    tx.prepare_cached("INSERT INTO link VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)")?.execute(
        params![
            position,
            agent,
            epoch,
            first,
            last,
            tombstone,
            events,
            min_at,
            max_at,
            severity,
            entry.received.0,
            bytes
        ],
    )?;
    tx.prepare_cached(
        "INSERT INTO chain VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT DO UPDATE SET seq = excluded.seq, hash = excluded.hash, touched = excluded.touched",
    )?
    .execute(params![agent, epoch, last, link.hash().0, position])?;
    Ok((events, bytes.len() as i64))
}

impl Log for SqliteLog {
    fn append(&mut self, entries: &[Entry]) -> Result<u64, LogError> {
        let tx = self.db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let head: i64 = tx.query_row("SELECT head FROM total", [], |row| row.get(0))?;
        let (mut events, mut bytes) = (0, 0);
        for (position, entry) in (head + 1..).zip(entries) {
            let (e, b) = insert(&tx, position, entry)?;
            (events, bytes) = (events + e, bytes + b);
        }
        tx.prepare_cached(
            "UPDATE total SET head = head + ?1, links = links + ?1, events = events + ?2, bytes = bytes + ?3",
        )?
        .execute([entries.len() as i64, events, bytes])?;
        tx.commit()?;
        Ok(head as u64 + 1)
    }

    fn read_from(&self, position: u64, limit: usize) -> Result<Vec<Stored>, LogError> {
        let mut rows = self.db.prepare_cached(
            "SELECT position, workload, instance, received, bytes FROM link JOIN agent ON agent.id = agent
             WHERE position >= ?1 ORDER BY position LIMIT ?2",
        )?;
        let mut rows = rows.query([clamp(position), clamp(limit as u64)])?;
        let mut links = Vec::new();
        while let Some(row) = rows.next()? {
            match stored(row) {
                Err(LogError::Damaged { .. }) if !links.is_empty() => break,
                read => links.push(read?),
            }
        }
        Ok(links)
    }

    fn cursor(&self, agent: &AgentId, epoch: Epoch) -> Result<Cursor, LogError> {
        let Some(agent) = agent_id(&self.db, agent)? else { return Ok(Cursor::START) };
        let mut row = self.db.prepare_cached("SELECT seq, hash FROM chain WHERE agent = ?1 AND epoch = ?2")?;
        let cursor = row
            .query_row(params![agent, epoch.0], |row| {
                Ok(Cursor { seq: row.get::<_, i64>(0)? as u64, hash: Sha256(row.get(1)?) })
            })
            .optional()?;
        Ok(cursor.unwrap_or(Cursor::START))
    }

    fn last_epoch(&self, agent: &AgentId) -> Result<Option<Epoch>, LogError> {
        let Some(agent) = agent_id(&self.db, agent)? else { return Ok(None) };
        let sql = "SELECT epoch FROM chain WHERE agent = ?1 ORDER BY touched DESC LIMIT 1";
        Ok(self.db.prepare_cached(sql)?.query_row([agent], |row| Ok(Epoch(row.get(0)?))).optional()?)
    }

    fn extent(&self) -> Result<Extent, LogError> {
        let tail: Option<i64> = self.db.query_row("SELECT min(position) FROM link", [], |row| row.get(0))?;
        Ok(self.db.query_row("SELECT head, links, events, bytes FROM total", [], |row| {
            let number = |i| row.get::<_, i64>(i).map(|n| n as u64);
            let tail = tail.unwrap_or(0) as u64;
            Ok(Extent { tail, head: number(0)?, links: number(1)?, events: number(2)?, bytes: number(3)? })
        })?)
    }

    fn trim(&mut self, keep: Keep) -> Result<u64, LogError> {
        let mut over = (self.extent()?.bytes).saturating_sub(keep.bytes) as i64;
        let mut gone: Vec<Oldest> = Vec::new();
        for link in self.oldest()? {
            if link.position > clamp(keep.up_to) || (link.received >= keep.before.0 && over <= 0) {
                break;
            }
            over -= link.bytes;
            gone.push(link);
        }
        let Some(last) = gone.last() else { return Ok(0) };
        let tx = self.db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        tx.execute("DELETE FROM link WHERE position <= ?1", [last.position])?;
        let (events, bytes) = gone.iter().fold((0, 0), |(e, b), link| (e + link.events, b + link.bytes));
        tx.execute(
            "UPDATE total SET links = links - ?1, events = events - ?2, bytes = bytes - ?3",
            [gone.len() as i64, events, bytes],
        )?;
        tx.commit()?;
        Ok(gone.len() as u64)
    }

    fn save_snapshot(&mut self, position: u64, state: &[u8]) -> Result<(), LogError> {
        let tx = self.db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        tx.execute("DELETE FROM snapshot", [])?;
        tx.execute("INSERT INTO snapshot VALUES (?1, ?2)", params![clamp(position), state])?;
        Ok(tx.commit()?)
    }

    fn snapshot(&self) -> Result<Option<(u64, Vec<u8>)>, LogError> {
        let row = self.db.query_row("SELECT position, state FROM snapshot", [], |row| {
            Ok((row.get::<_, i64>(0)? as u64, row.get(1)?))
        });
        Ok(row.optional()?)
    }

    fn reader(&self) -> Result<Box<dyn Log>, LogError> {
        let db = connect(&self.path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        Ok(Box::new(SqliteLog { path: self.path.clone(), db }))
    }
}

fn clamp(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn stored(row: &rusqlite::Row<'_>) -> Result<Stored, LogError> {
    let position = row.get::<_, i64>(0)? as u64;
    let (workload, instance): (String, String) = (row.get(1)?, row.get(2)?);
    let agent = Arc::new(AgentId { workload: workload.parse()?, instance: instance.parse()? });
    let bytes = row.get_ref(4)?.as_blob().map_err(rusqlite::Error::from)?;
    let link = Link::decode(bytes).map_err(|error| LogError::Damaged { position, error })?;
    Ok(Stored { position, entry: Entry { agent, received: Timestamp(row.get(3)?), link } })
}
