//! Plaintext beside mutual TLS, for a while and for a reason, while clients are being moved. Loud all the time.
//!
//! When it is over, connections in plaintext that still live are ended, as those of the revoked are.

use std::sync::Mutex;
use std::time::Duration;

use sidewarden_proto::event::{Event, ListenerPermissive, Severity};
use sidewarden_proto::time::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::config::Permissive;

/// What is still true is told again after this long, in case that it was lost on the way.
const TOLD_AGAIN: Duration = Duration::from_secs(3600);

/// One listener that lets plaintext in.
#[derive(Debug)]
pub struct Leniency {
    listener: String,
    config: Permissive,
    told: Mutex<Told>,
    over: CancellationToken,
}

/// What was said last, and when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Told(Option<(bool, Timestamp)>);

impl Leniency {
    /// Of the listener called `listener`, as configured; `over` is cancelled with it, and ends its connections.
    pub fn new(listener: String, config: Permissive, over: CancellationToken) -> Leniency {
        Leniency { listener, config, told: Mutex::default(), over }
    }

    /// Whether plaintext is let in now.
    pub fn is_on(&self, now: Timestamp) -> bool {
        now < self.config.until && !self.over.is_cancelled()
    }

    /// Cancelled when plaintext is no longer let in.
    pub fn over(&self) -> CancellationToken {
        self.over.clone()
    }

    /// When that is.
    pub fn until(&self) -> Timestamp {
        self.config.until
    }

    /// How long a client may say nothing before it is taken for one that waits for the service to speak; zero for ever.
    pub fn silent_after(&self) -> Duration {
        self.config.silent_after
    }

    /// Ends what has to end at `now`; what there is to tell, if anything.
    pub fn review(&self, now: Timestamp) -> Option<Event> {
        if now >= self.config.until {
            // For good: a clock that is set back does not open the door again.
            self.over.cancel();
        }
        let on = self.is_on(now);
        let due = self.told.lock().unwrap_or_else(std::sync::PoisonError::into_inner).is_due(on, now);
        due.then(|| self.event(on, now))
    }

    fn event(&self, on: bool, now: Timestamp) -> Event {
        let (Permissive { reason, until, .. }, listener) = (self.config.clone(), self.listener.clone());
        let summary = match on {
            true => format!("{listener} lets plaintext in beside TLS until {until}: {reason}"),
            false => format!("{listener} takes TLS alone: the time of `permissive` was over at {until}"),
        };
        let severity = if on { Severity::Warning } else { Severity::Notice };
        let body = ListenerPermissive { listener, on, reason, until_us: until };
        Event::new(now, severity, summary, &body.into())
    }
}

impl Told {
    /// Whether it is time to say that it is `on`, or not.
    pub(super) fn is_due(&mut self, on: bool, now: Timestamp) -> bool {
        let due = match self.0 {
            None => true,
            Some((before, _)) if before != on => true,
            Some((_, at)) => on && now.since(at) >= TOLD_AGAIN,
        };
        if due {
            self.0 = Some((on, now));
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3600;

    fn leniency(until: i64) -> Leniency {
        let (reason, until) = ("moving".to_owned(), Timestamp::from_secs(until));
        Leniency::new(
            "0.0.0.0:8443".into(),
            Permissive { reason, until, silent_after: Duration::ZERO },
            CancellationToken::new(),
        )
    }

    /// At each of these seconds: what is told, if anything.
    fn check(leniency: &Leniency, rows: &[(i64, Option<&str>)]) {
        for (at, expected) in rows {
            let event = leniency.review(Timestamp::from_secs(*at));
            match (event, expected) {
                (Some(event), Some(part)) => assert!(event.summary.contains(part), "{at}: {}", event.summary),
                (got, expected) => assert_eq!(got.map(|event| event.summary).as_deref(), *expected, "{at}"),
            }
        }
    }

    #[test]
    fn it_is_told_at_the_start_each_hour_and_at_the_end() {
        let rows = [
            (0, Some("lets plaintext in beside TLS until 1970-01-01T02:30:00.000Z: moving")),
            (1, None),
            (HOUR - 1, None),
            (HOUR, Some("lets plaintext in")),
            (2 * HOUR, Some("lets plaintext in")),
            (2 * HOUR + 1800, Some("takes TLS alone")),
            (2 * HOUR + 1801, None),
            (9 * HOUR, None),
        ];
        check(&leniency(2 * HOUR + 1800), &rows);
    }

    #[test]
    fn what_is_over_before_it_begins_says_so_once() {
        let leniency = leniency(100);
        assert!(!leniency.is_on(Timestamp::from_secs(100)));
        check(&leniency, &[(100, Some("takes TLS alone")), (101, None), (9 * HOUR, None)]);
    }

    #[test]
    fn its_end_reaches_live_connections_and_is_for_good() {
        let leniency = leniency(100);
        let live = leniency.over();
        leniency.review(Timestamp::from_secs(99));
        assert!(!live.is_cancelled() && leniency.is_on(Timestamp::from_secs(99)));
        leniency.review(Timestamp::from_secs(100));
        assert!(live.is_cancelled() && leniency.over().is_cancelled());
        assert!(!leniency.is_on(Timestamp::from_secs(50)), "the clock was set back");
    }
}
