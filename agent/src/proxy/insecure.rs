//! Every certificate is accepted, for a while and for a reason: `insecure_trust_all`. Loud all the time.
//!
//! The connection is encrypted, and the other side proves to have some key; whose it is, nobody looks at. When the time is
//! over, what was let in by it is ended, and certificates count again.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use sidewarden_proto::event::{Direction, Event, Severity, TrustInsecure};
use sidewarden_proto::time::Timestamp;

use super::permissive::Told;
use crate::config::TrustAll;

/// One listener or route.
#[derive(Debug)]
pub struct Insecure {
    direction: Direction,
    place: String,
    config: TrustAll,
    told: Mutex<Told>,
    over: AtomicBool,
}

impl Insecure {
    /// The one called `place`, as configured.
    pub fn new(direction: Direction, place: String, config: TrustAll) -> Insecure {
        Insecure { direction, place, config, told: Mutex::default(), over: AtomicBool::new(false) }
    }

    /// Whether this is the one called so, with these settings: routes to one address share a name.
    pub fn is_of(&self, direction: Direction, place: &str, config: &TrustAll) -> bool {
        (self.direction, self.place.as_str(), &self.config) == (direction, place, config)
    }

    /// Until when every certificate is accepted, if it is now. What is over is over: a clock that is set back opens nothing.
    pub fn until(&self, now: Timestamp) -> Option<Timestamp> {
        if now >= self.config.until {
            self.over.store(true, Relaxed);
        }
        (!self.over.load(Relaxed)).then_some(self.config.until)
    }

    /// What there is to tell at `now`, if anything: at the start, each hour, and at the end.
    pub fn review(&self, now: Timestamp) -> Option<Event> {
        let on = self.until(now).is_some();
        let due = self.told.lock().unwrap_or_else(PoisonError::into_inner).is_due(on, now);
        due.then(|| self.event(on, now))
    }

    fn event(&self, on: bool, now: Timestamp) -> Event {
        let (TrustAll { reason, until }, place, direction) = (self.config.clone(), self.place.clone(), self.direction);
        let way = if direction == Direction::Inbound { "of whoever comes to" } else { "of whoever answers at" };
        let summary = match on {
            true => format!("every certificate {way} {place} is accepted until {until}: {reason}"),
            false => format!("certificates {way} {place} count: the time of `insecure_trust_all` was over at {until}"),
        };
        let severity = if on { Severity::Critical } else { Severity::Notice };
        let body = TrustInsecure { direction, place, on, reason, until_us: until };
        Event::new(now, severity, summary, &body.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_while_it_lasts_and_never_begins_again() {
        let config = TrustAll { reason: "old".into(), until: Timestamp::from_secs(9_000) };
        let insecure = Insecure::new(Direction::Outbound, "db:5432".into(), config);
        let told = |at: i64| insecure.review(Timestamp::from_secs(at)).map(|event| event.summary);
        let on = |at| told(at).is_some_and(|text| text.contains("every certificate") && text.contains("db:5432"));
        assert!(on(0) && told(1).is_none() && told(3_599).is_none() && on(3_600));
        assert!(told(9_000).unwrap().contains("was over at"));
        assert_eq!((told(9_001), insecure.until(Timestamp::from_secs(5))), (None, None), "the clock was set back");
    }
}
