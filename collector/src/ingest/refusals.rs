//! What was refused at the door, told without letting a flood of refusals become a flood of events.
//!
//! The first of its kind (stage, reason, source network) is told at once. What follows within the window is counted and
//! told in one event at its end. Each attempt is counted in exactly one event.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sidewarden_proto::event::{Body, EnrolmentRefused, Event, IngestRefused, Severity};
use sidewarden_proto::time::Timestamp;
use tokio::sync::mpsc;

use crate::commit::Committer;

/// How long repeats are gathered.
const WINDOW: Duration = Duration::from_secs(10);
/// Kinds of refusals gathered at a time; more are gathered as one.
const MAX_KINDS: usize = 512;
/// Refusals on their way; what finds no room is counted and told with the next.
const QUEUE: usize = 1024;

/// Where somebody was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Coming in.
    Ingest,
    /// Asking for a certificate.
    Enrolment,
}

/// One refusal.
#[derive(Clone, Debug)]
pub struct Refusal {
    stage: Stage,
    source: SocketAddr,
    reason: String,
    detail: String,
    workload: String,
    severity: Severity,
}

/// Where refusals are handed in. Never waits.
#[derive(Clone, Debug)]
pub struct Refusals {
    queue: mpsc::Sender<Refusal>,
    uncounted: Arc<AtomicU64>,
}

impl Refusals {
    /// The place to hand them in, and the task that tells them until every such place is gone.
    pub fn new(commits: Committer, clock: fn() -> Timestamp) -> (Refusals, impl Future<Output = ()>) {
        let (queue, refusals) = mpsc::channel(QUEUE);
        let uncounted = Arc::new(AtomicU64::new(0));
        (Refusals { queue, uncounted: uncounted.clone() }, tell(refusals, uncounted, commits, clock))
    }

    /// Somebody was refused coming in.
    pub fn ingest(&self, source: SocketAddr, reason: &str, detail: impl Into<String>) {
        self.put(Stage::Ingest, source, reason, detail.into(), String::new(), Severity::Warning);
    }

    /// Somebody was refused coming in, in a way that needs a person now.
    pub fn ingest_critical(&self, source: SocketAddr, reason: &str, detail: impl Into<String>) {
        self.put(Stage::Ingest, source, reason, detail.into(), String::new(), Severity::Critical);
    }

    /// Somebody was refused a certificate.
    pub fn enrolment(&self, source: SocketAddr, reason: &str, detail: impl Into<String>, workload: String) {
        self.put(Stage::Enrolment, source, reason, detail.into(), workload, Severity::Warning);
    }

    fn put(
        &self,
        stage: Stage,
        source: SocketAddr,
        reason: &str,
        detail: String,
        workload: String,
        severity: Severity,
    ) {
        let detail = detail.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
        let refusal = Refusal { stage, source, reason: reason.to_owned(), detail, workload, severity };
        if self.queue.try_send(refusal).is_err() {
            self.uncounted.fetch_add(1, Ordering::Relaxed);
        }
    }
}

async fn tell(
    mut refusals: mpsc::Receiver<Refusal>,
    uncounted: Arc<AtomicU64>,
    commits: Committer,
    clock: fn() -> Timestamp,
) {
    let mut gathered = Gathered::default();
    let mut beat = tokio::time::interval(Duration::from_secs(1));
    loop {
        let events = tokio::select! {
            refusal = refusals.recv() => match refusal {
                Some(refusal) => gathered.take(refusal, clock()).into_iter().collect(),
                None => break,
            },
            _ = beat.tick() => {
                gathered.overflow += uncounted.swap(0, Ordering::Relaxed);
                gathered.due(clock())
            }
        };
        for event in events {
            if commits.own(event).await.is_err() {
                return;
            }
        }
    }
    for event in gathered.due(Timestamp(i64::MAX)) {
        let _ = commits.own(event).await;
    }
}

type Kind = (Stage, String, IpAddr);

/// What is gathered in windows: decides, and knows no clock.
#[derive(Default)]
struct Gathered {
    windows: HashMap<Kind, (Timestamp, Refusal, u64)>,
    overflow: u64,
}

impl Gathered {
    /// The event to tell at once, if this is the first of its kind.
    fn take(&mut self, refusal: Refusal, now: Timestamp) -> Option<Event> {
        let kind = (refusal.stage, refusal.reason.clone(), network(refusal.source.ip()));
        if let Some((_, last, more)) = self.windows.get_mut(&kind) {
            (*last, *more) = (refusal, *more + 1);
            return None;
        }
        if self.windows.len() >= MAX_KINDS {
            self.overflow += 1;
            return None;
        }
        let event = event(&refusal, 1, now);
        self.windows.insert(kind, (now, refusal, 0));
        Some(event)
    }

    /// What the windows that ended have gathered.
    fn due(&mut self, now: Timestamp) -> Vec<Event> {
        let mut events = Vec::new();
        self.windows.retain(|_, (since, last, more)| {
            if now.since(*since) < WINDOW {
                return true;
            }
            if *more == 0 {
                return false;
            }
            events.push(event(last, *more, now));
            (*since, *more) = (now, 0);
            true
        });
        if self.overflow > 0 {
            events.push(overflow(std::mem::take(&mut self.overflow), now));
        }
        events
    }
}

/// The network an address counts as: /24 or /64, so that one attacker is one source.
fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V4(ip) => IpAddr::V4(Ipv4Addr::from(u32::from(ip) & 0xffff_ff00)),
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from(u128::from(ip) & !u128::from(u64::MAX))),
    }
}

fn event(refusal: &Refusal, count: u64, now: Timestamp) -> Event {
    let Refusal { stage, source, reason, detail, workload, severity } = refusal;
    let source = source.to_string();
    let more = if count > 1 { format!(" ({count} times)") } else { String::new() };
    let text = format!("{reason}: {detail}");
    let (what, body) = match stage {
        Stage::Ingest => {
            ("Connection to the collector", Body::from(IngestRefused { source: source.clone(), reason: text, count }))
        }
        Stage::Enrolment => {
            let body = EnrolmentRefused { source: source.clone(), workload: workload.clone(), reason: text, count };
            ("Certificate request", Body::from(body))
        }
    };
    Event::new(now, *severity, format!("{what} from {source} refused{more}: {reason}: {detail}"), &body)
}

fn overflow(count: u64, now: Timestamp) -> Event {
    let reason = "other: too many kinds of refusals at once to tell them apart".to_owned();
    let body = Body::from(IngestRefused { source: "many".into(), reason, count });
    Event::new(now, Severity::Warning, format!("{count} more connections to the collector were refused"), &body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(source: &str, reason: &str) -> Refusal {
        Refusal {
            stage: Stage::Ingest,
            source: source.parse().unwrap(),
            reason: reason.into(),
            detail: "d".into(),
            workload: String::new(),
            severity: Severity::Warning,
        }
    }

    fn count(event: &Event) -> u64 {
        match event.body() {
            Ok(Some(Body::IngestRefused(body))) => body.count,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_first_is_told_at_once_and_repeats_are_counted_once() {
        let (mut gathered, start) = (Gathered::default(), Timestamp::from_secs(100));
        assert_eq!(gathered.take(refusal("10.0.0.1:1", "plaintext"), start).map(|e| count(&e)), Some(1));
        assert!(gathered.take(refusal("10.0.0.77:2", "plaintext"), start).is_none(), "the same network");
        assert!(gathered.take(refusal("10.0.0.1:3", "plaintext"), start).is_none());
        assert!(gathered.take(refusal("10.0.1.1:3", "plaintext"), start).is_some(), "another network");
        assert!(gathered.take(refusal("10.0.0.1:3", "unknown_ca"), start).is_some(), "another reason");
        assert!(gathered.due(start.plus(WINDOW / 2)).is_empty());
        let told: Vec<u64> = gathered.due(start.plus(WINDOW)).iter().map(count).collect();
        assert_eq!(told, [2]);
        assert!(gathered.due(start.plus(WINDOW * 3)).is_empty());
        assert!(gathered.windows.is_empty());
    }

    #[test]
    fn a_flood_of_kinds_is_bounded_and_still_counted() {
        let (mut gathered, start) = (Gathered::default(), Timestamp::from_secs(100));
        let told: u64 = (0..2000u32)
            .filter_map(|i| gathered.take(refusal(&format!("10.{}.{}.1:1", i / 256, i % 256), "plaintext"), start))
            .map(|e| count(&e))
            .sum();
        let later: u64 = gathered.due(start.plus(WINDOW)).iter().map(count).sum();
        assert_eq!(told + later, 2000);
        assert!(told <= MAX_KINDS as u64);
    }
}
