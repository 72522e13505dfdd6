//! Handshakes under way, oldest first: where a limit on them is reached, one that stalls makes room for a newcomer. Who
//! opens connections and says nothing then keeps nobody out, from however many addresses it comes. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::limits::Source;

/// A good handshake is over within two round trips. What takes longer has to go when others wait; what is younger stays,
/// or many that come at once would throw each other out.
pub const STALLED: Duration = Duration::from_millis(500);

/// All of them, each with what it occupies.
#[derive(Debug)]
pub struct Waiting<T> {
    next: u64,
    by_age: BTreeMap<u64, Entry<T>>,
}

#[derive(Debug)]
struct Entry<T> {
    source: Option<Source>,
    since: Instant,
    occupied: T,
}

impl<T> Default for Waiting<T> {
    fn default() -> Waiting<T> {
        Waiting { next: 0, by_age: BTreeMap::new() }
    }
}

impl<T> Waiting<T> {
    /// One begins. Its number is for [`Waiting::leave`]; one without a source is the workload's own, and is let be.
    pub fn enter(&mut self, source: Option<Source>, occupied: T, now: Instant) -> u64 {
        let number = self.next;
        self.next += 1;
        self.by_age.insert(number, Entry { source, since: now, occupied });
        number
    }

    /// One came to an end, good or bad; `None` if it had to make room before.
    pub fn leave(&mut self, number: u64) -> Option<T> {
        self.by_age.remove(&number).map(|entry| entry.occupied)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_age.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_age.is_empty()
    }

    /// The oldest has to go, of `source` or of all that have one; `None` if it is too young for that.
    pub fn make_room(&mut self, source: Option<Source>, now: Instant) -> Option<T> {
        let may_go = |entry: &Entry<T>| if source.is_some() { entry.source == source } else { entry.source.is_some() };
        let (number, oldest) = self.by_age.iter().find(|(_, entry)| may_go(entry))?;
        if now.saturating_duration_since(oldest.since) < STALLED {
            return None;
        }
        let number = *number;
        self.leave(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(last: u8) -> Option<Source> {
        Some(Source::One(std::net::Ipv4Addr::new(10, 0, 0, last).into()))
    }

    #[test]
    fn the_oldest_that_stalls_makes_room_and_the_workloads_own_does_not() {
        let (mut waiting, began) = (Waiting::default(), Instant::now());
        let at = |millis| began + Duration::from_millis(millis);
        for (millis, source, name) in [(0, None, "own"), (10, from(1), "a"), (20, from(2), "b"), (30, from(1), "c")] {
            waiting.enter(source, name, at(millis));
        }
        assert_eq!(waiting.make_room(None, at(509)), None, "everybody is young");
        assert_eq!(waiting.make_room(from(2), at(519)), None);
        assert_eq!(waiting.make_room(from(2), at(520)), Some("b"));
        assert_eq!(waiting.make_room(from(2), at(9999)), None, "there is no other of this source");
        assert_eq!(waiting.make_room(None, at(520)), Some("a"));
        assert_eq!(waiting.make_room(None, at(520)), None, "the next is young");
        assert_eq!(waiting.make_room(from(1), at(530)), Some("c"));
        assert_eq!(waiting.make_room(None, at(9999)), None, "the workload's own stays");
    }

    #[test]
    fn who_made_room_has_nothing_left_to_give_back() {
        let mut waiting = Waiting::default();
        let (one, two) = (waiting.enter(from(1), 1, Instant::now()), waiting.enter(from(1), 2, Instant::now()));
        assert_eq!(waiting.leave(two), Some(2));
        assert_eq!(waiting.make_room(None, Instant::now() + STALLED), Some(1));
        assert_eq!(waiting.leave(one), None);
    }
}
