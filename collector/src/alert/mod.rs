//! Conditions that last, told to people: rules read events, the engine decides what fires, sinks pass it on.
//!
//! Every change of an alert is also an event of the collector (`alert.firing`, `alert.resolved`), so that the history
//! shows what was told and when, and a restart tells nothing twice.

mod alertmanager;
pub mod config;
pub mod deliver;
pub mod engine;
mod log;
pub mod rule;
mod watch;
mod webhook;

use std::future::Future;
use std::pin::Pin;

use serde::Serialize;
use sidewarden_proto::event::Severity;
use sidewarden_proto::time::Timestamp;

pub use config::Config;
pub use engine::{Alert, Labels, Settings, Status};
pub use watch::{Alerts, Parts, start};

/// What a sink is given to pass on.
#[derive(Clone, Debug)]
pub struct Notice {
    /// When it was put together.
    pub at: Timestamp,
    /// The alerts: those that changed or, in a repeat, all that stand.
    pub alerts: Vec<Alert>,
    /// Where the collector's page is, for links; empty when not known.
    pub page: String,
}

/// Why a notice was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct SinkError {
    /// What went wrong; never with a secret in it.
    pub what: String,
    /// Whether it may help to try again.
    pub retry: bool,
}

/// What a sink does with a notice.
pub type Delivery<'a> = Pin<Box<dyn Future<Output = Result<(), SinkError>> + Send + 'a>>;

/// Somewhere alerts are told. Retry, queues and counts are `deliver`'s; a sink tries once.
pub trait Sink: Send + Sync {
    /// A name for metrics and logs, from the configuration: `alertmanager/10.0.0.5:9093`.
    fn name(&self) -> &str;

    /// Whether it wants everything that stands told again and again, or only what changed.
    fn wants_repeats(&self) -> bool {
        false
    }

    /// Tries once.
    fn deliver<'a>(&'a self, notice: &'a Notice) -> Delivery<'a>;
}

/// An alert as the API, the page and webhooks show it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct View {
    /// Stays the same as long as the labels do.
    pub id: String,
    /// The rule's name.
    pub alert: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// `pending`, `firing` or `resolved`.
    pub status: &'static str,
    /// It would fire if its agent were not silent.
    pub inhibited: bool,
    /// What tells it from every other.
    pub labels: Labels,
    /// Who, what, from where, how often.
    pub summary: String,
    /// What this alert means in general.
    pub meaning: &'static str,
    /// What to do about it.
    pub what_to_do: String,
    /// What shows it.
    pub evidence: Vec<String>,
    /// From where, the first few.
    pub sources: Vec<String>,
    /// How often it was seen.
    pub count: u64,
    /// When its condition began.
    pub since_us: Timestamp,
    /// When it was last seen.
    pub last_us: Timestamp,
    /// When it ended.
    pub ended_us: Option<Timestamp>,
}

impl From<&Alert> for View {
    fn from(alert: &Alert) -> View {
        View {
            id: alert.id(),
            alert: alert.rule,
            severity: alert.severity,
            status: alert.status.word(),
            inhibited: alert.inhibited,
            labels: alert.labels(),
            summary: alert.summary(),
            meaning: rule::by_name(alert.rule).map_or("", |rule| rule.meaning),
            what_to_do: alert.what_to_do.clone(),
            evidence: alert.evidence.clone(),
            sources: alert.sources.clone(),
            count: alert.count,
            since_us: alert.since,
            last_us: alert.last,
            ended_us: alert.ended,
        }
    }
}
