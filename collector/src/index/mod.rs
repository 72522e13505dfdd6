//! Answers every question about events, from a local SQLite file that can be rebuilt from the log at any time.
//!
//! Events of warning and above have rows of their own; of all others only the range, the kinds and the highest severity
//! of their batch are kept, and a batch is decompressed when a question really reaches it. An answer says how far it
//! looked: no question may hold the store for long.

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
