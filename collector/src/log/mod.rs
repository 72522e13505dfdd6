//! The durable truth: every link of every agent, in the order it was taken, its bytes untouched.
//!
//! A log knows nothing of events. It appends groups whole or not at all, answers how far each agent's chain is known,
//! and forgets from its old end. Everything else (state, index) can be rebuilt from it. The tests at the end of
//! `contract.rs` are the contract that every implementation meets.

mod sqlite;

#[cfg(test)]
mod contract;

use std::path::PathBuf;
use std::sync::Arc;

pub use sqlite::SqliteLog;

use sidewarden_proto::batch::{Cursor, Epoch, Link, Malformed};
use sidewarden_proto::identity::{AgentId, BadName};
use sidewarden_proto::time::Timestamp;

/// A link to append: the next of its agent's chain.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Who sent it.
    pub agent: Arc<AgentId>,
    /// When it was taken.
    pub received: Timestamp,
    /// The link.
    pub link: Link,
}

/// A link as it stands in the log.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Where it stands. Grows by one with every link and is never used twice.
    pub position: u64,
    /// The link and where it came from.
    pub entry: Entry,
}

/// What a log holds, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Position of the oldest link still there; 0 when there is none.
    pub tail: u64,
    /// Position of the newest link; 0 before the first.
    pub head: u64,
    /// Links.
    pub links: u64,
    /// Events in them.
    pub events: u64,
    /// Bytes of the links.
    pub bytes: u64,
}

/// What is kept: links older than `before` go, and the oldest ones until no more than `bytes` are left.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    /// Links taken before this moment go.
    pub before: Timestamp,
    /// Most bytes of links.
    pub bytes: u64,
    /// Nothing after this position goes: what a snapshot does not cover yet is still needed.
    pub up_to: u64,
}

/// What a log could not do, and whose fault it is.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file or its directory does not let us.
    #[error("{path}: {error}")]
    Access {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The disk is full. Nothing is acknowledged until there is room again.
    #[error("the disk is full: make room, or lower `retention.bytes` or `retention.days`")]
    Full,
    /// SQLite refused.
    #[error("SQLite: {0}")]
    Sqlite(rusqlite::Error),
    /// The file was written by a newer version.
    #[error("{path} has form {found}, this version knows {known}: use the newer sidewarden-collector")]
    Form {
        /// Which file.
        path: PathBuf,
        /// The form in the file.
        found: i64,
        /// The newest form this version knows.
        known: i64,
    },
    /// A link in the log cannot be read.
    #[error("the link at position {position} cannot be read: {error}")]
    Damaged {
        /// Where.
        position: u64,
        /// What is wrong.
        error: Malformed,
    },
    /// A name in the log is none.
    #[error("the log holds a name that is none: {0}")]
    Name(#[from] BadName),
}

impl From<rusqlite::Error> for LogError {
    fn from(error: rusqlite::Error) -> LogError {
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => LogError::Full,
            _ => LogError::Sqlite(error),
        }
    }
}

/// The durable truth. One writer; any number of readers of their own.
pub trait Log: Send {
    /// Appends all of `entries` or none, and returns once they are on disk; the position of the first.
    ///
    /// Each must be the next of its chain; a second link at the same (agent, epoch, first sequence number) is an error.
    fn append(&mut self, entries: &[Entry]) -> Result<u64, LogError>;

    /// Up to `limit` links at `position` and after, oldest first. Stops before one that is damaged; when that is the
    /// very first, it is the error, and its position says where to go on.
    fn read_from(&self, position: u64, limit: usize) -> Result<Vec<Stored>, LogError>;

    /// How far the chain of `agent` in `epoch` is known; it outlives the links themselves.
    fn cursor(&self, agent: &AgentId, epoch: Epoch) -> Result<Cursor, LogError>;

    /// The epoch in which `agent` was last heard.
    fn last_epoch(&self, agent: &AgentId) -> Result<Option<Epoch>, LogError>;

    /// What is there.
    fn extent(&self) -> Result<Extent, LogError>;

    /// Forgets some of what `keep` does not cover, oldest first; how many links. To be called until it returns 0.
    fn trim(&mut self, keep: Keep) -> Result<u64, LogError>;

    /// Keeps a copy of the folded state, in the same file as the links it comes from.
    fn save_snapshot(&mut self, position: u64, state: &[u8]) -> Result<(), LogError>;

    /// The last copy, and up to which position it was folded.
    fn snapshot(&self) -> Result<Option<(u64, Vec<u8>)>, LogError>;

    /// Another reader of the same log, for another thread.
    fn reader(&self) -> Result<Box<dyn Log>, LogError>;
}
