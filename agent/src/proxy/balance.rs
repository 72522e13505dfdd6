//! Which of several addresses a connection goes to: in turn or to the least busy, and past those that do not answer. Pure.
//!
//! Health is passive: what real connections meet. `FAILURES` in a row rest an address for a while; then one connection
//! tries it, and its fate decides between back in the circle and a rest twice as long. While fewer than one in
//! `PANIC_BELOW` are in the circle, rests do not count: the fault is then more likely ours, and what is left would be
//! overrun. An address by itself is therefore never given up.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;

/// So many failures in a row begin a rest.
const FAILURES: u32 = 3;
/// The first rest; each one after it is twice as long.
const FIRST_REST: Duration = Duration::from_secs(1);
/// No rest is longer.
const LONGEST_REST: Duration = Duration::from_secs(60);
/// A trial that nobody tells the end of stands in the way of the next one for this long.
const TRIAL_LASTS: Duration = Duration::from_secs(30);
/// Rests count while at least one of this many addresses is in the circle.
const PANIC_BELOW: usize = 3;
/// Most addresses of one route; more are not looked at.
pub const MAX_ADDRESSES: usize = 256;

/// How one of the healthy is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Balance {
    /// Each in turn.
    #[default]
    RoundRobin,
    /// The one with the fewest connections of ours; in turn among equals.
    LeastConnections,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    /// In the circle, after so many failures in a row.
    Good { failures: u32 },
    /// Not asked before `until`; this is its `rests`th rest in a row.
    Resting { until: Instant, rests: u32 },
    /// One connection tries it.
    Trial { since: Instant, rests: u32 },
}

#[derive(Clone, Debug)]
struct Entry {
    address: SocketAddr,
    health: Health,
    open: usize,
}

/// The addresses of one route and how they are.
#[derive(Clone, Debug, Default)]
pub struct Circle {
    balance: Balance,
    entries: Vec<Entry>,
    /// Where the next turn begins.
    next: usize,
}

/// What somebody should hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The address is left alone for this long.
    Left(Duration),
    /// It answers again.
    Back,
}

impl Circle {
    /// An empty one.
    pub fn new(balance: Balance) -> Circle {
        Circle { balance, ..Circle::default() }
    }

    /// Takes over what names resolve to now: those that stay keep what is known of them.
    pub fn update(&mut self, addresses: &[SocketAddr]) {
        let addresses = &addresses[..addresses.len().min(MAX_ADDRESSES)];
        self.entries.retain(|entry| addresses.contains(&entry.address));
        for address in addresses {
            if self.entry(*address).is_none() {
                self.entries.push(Entry { address: *address, health: Health::Good { failures: 0 }, open: 0 });
            }
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Where the next connection goes, `tried` excepted; `None` when all were tried. The caller tells its fate by
    /// [`Circle::answered`] or [`Circle::failed`].
    pub fn choose(&mut self, tried: &[SocketAddr], now: Instant) -> Option<SocketAddr> {
        let panic = self.panics(now);
        let untried = |entry: &Entry| !tried.contains(&entry.address);
        let healthy = self.pick(|entry| untried(entry) && (panic || entry.health.may_be_asked(now)));
        // Better one that rests than none at all.
        let chosen = healthy.or_else(|| self.pick(untried))?;
        self.next = (chosen + 1) % self.entries.len();
        let entry = &mut self.entries[chosen];
        entry.health.ask(now);
        Some(entry.address)
    }

    fn panics(&self, now: Instant) -> bool {
        let available = self.entries.iter().filter(|entry| entry.health.may_be_asked(now)).count();
        available * PANIC_BELOW < self.entries.len()
    }

    fn pick(&self, open_to: impl Fn(&Entry) -> bool) -> Option<usize> {
        let count = self.entries.len();
        let mut candidates = (0..count).map(|i| (self.next + i) % count).filter(|i| open_to(&self.entries[*i]));
        match self.balance {
            Balance::RoundRobin => candidates.next(),
            Balance::LeastConnections => candidates.min_by_key(|i| self.entries[*i].open),
        }
    }

    /// A connection there was made.
    pub fn answered(&mut self, address: SocketAddr) -> Option<Change> {
        let entry = self.entry_mut(address)?;
        let before = std::mem::replace(&mut entry.health, Health::Good { failures: 0 });
        (!matches!(before, Health::Good { .. })).then_some(Change::Back)
    }

    /// It could not be made. `spread` is a random number from 0 to 1, so that a fleet does not come back as one.
    pub fn failed(&mut self, address: SocketAddr, spread: f64, now: Instant) -> Option<Change> {
        let entry = self.entry_mut(address)?;
        let rests = match entry.health {
            Health::Good { failures } if failures + 1 < FAILURES => {
                entry.health = Health::Good { failures: failures + 1 };
                return None;
            }
            Health::Good { .. } => 0,
            // Asked before its time, or by a connection that was under way when the rest began: no trial.
            Health::Resting { .. } => return None,
            Health::Trial { rests, .. } => rests.saturating_add(1),
        };
        let rest = rest(rests, spread);
        entry.health = Health::Resting { until: now + rest, rests };
        Some(Change::Left(rest))
    }

    /// A connection there begins to live.
    pub fn opened(&mut self, address: SocketAddr) {
        if let Some(entry) = self.entry_mut(address) {
            entry.open += 1;
        }
    }

    /// It ended.
    pub fn closed(&mut self, address: SocketAddr) {
        if let Some(entry) = self.entry_mut(address) {
            entry.open = entry.open.saturating_sub(1);
        }
    }

    fn entry(&self, address: SocketAddr) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.address == address)
    }

    fn entry_mut(&mut self, address: SocketAddr) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.address == address)
    }
}

impl Health {
    fn may_be_asked(self, now: Instant) -> bool {
        match self {
            Health::Good { .. } => true,
            Health::Resting { until, .. } => until <= now,
            Health::Trial { since, .. } => since + TRIAL_LASTS <= now,
        }
    }

    /// A connection goes there. After a rest it is the trial; in the middle of one it changes nothing.
    fn ask(&mut self, now: Instant) {
        if let Health::Resting { rests, .. } | Health::Trial { rests, .. } = *self
            && self.may_be_asked(now)
        {
            *self = Health::Trial { since: now, rests };
        }
    }
}

/// Between half of the span and all of it.
fn rest(rests: u32, spread: f64) -> Duration {
    let span = FIRST_REST.saturating_mul(1 << rests.min(20)).min(LONGEST_REST);
    span.mul_f64(0.5 + spread.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn address(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 8443))
    }

    fn circle(balance: Balance, count: u8) -> Circle {
        let mut circle = Circle::new(balance);
        circle.update(&(1..=count).map(address).collect::<Vec<_>>());
        circle
    }

    /// The last bytes of what is chosen, as many times as asked.
    fn chosen(circle: &mut Circle, times: usize, now: Instant) -> Vec<u8> {
        let last = |address: SocketAddr| match address.ip() {
            std::net::IpAddr::V4(ip) => ip.octets()[3],
            std::net::IpAddr::V6(_) => 0,
        };
        (0..times).filter_map(|_| circle.choose(&[], now)).map(last).collect()
    }

    fn fail(circle: &mut Circle, last: u8, times: u32, now: Instant) -> Option<Change> {
        (0..times).filter_map(|_| circle.failed(address(last), 1.0, now)).last()
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn each_gets_its_turn() {
        let now = Instant::now();
        assert_eq!(chosen(&mut circle(Balance::RoundRobin, 3), 7, now), [1, 2, 3, 1, 2, 3, 1]);
        assert_eq!(chosen(&mut circle(Balance::LeastConnections, 3), 4, now), [1, 2, 3, 1], "equals in turn");
        assert_eq!(circle(Balance::RoundRobin, 0).choose(&[], now), None);
    }

    #[test]
    fn the_least_busy_is_chosen() {
        let (mut circle, now) = (circle(Balance::LeastConnections, 3), Instant::now());
        [1, 1, 2, 3, 3].iter().for_each(|last| circle.opened(address(*last)));
        assert_eq!(chosen(&mut circle, 2, now), [2, 2]);
        circle.opened(address(2));
        circle.closed(address(3));
        assert_eq!(chosen(&mut circle, 1, now), [3]);
        (0..9).for_each(|_| circle.closed(address(3)));
        circle.opened(address(3));
        assert_eq!(circle.entries[2].open, 1, "more ends than begins do not go below zero");
    }

    #[test]
    fn what_was_tried_is_not_tried_again() {
        let (mut circle, now) = (circle(Balance::RoundRobin, 3), Instant::now());
        assert_eq!(circle.choose(&[address(1)], now), Some(address(2)));
        assert_eq!(circle.choose(&[address(3), address(1)], now), Some(address(2)));
        assert_eq!(circle.choose(&[address(1), address(2), address(3)], now), None);
    }

    #[test]
    fn failures_in_a_row_and_only_those_lead_to_a_rest() {
        let (mut circle, now) = (circle(Balance::RoundRobin, 3), Instant::now());
        assert_eq!(fail(&mut circle, 2, 2, now), None);
        assert_eq!(circle.answered(address(2)), None);
        assert_eq!(fail(&mut circle, 2, 2, now), None);
        assert_eq!(fail(&mut circle, 2, 1, now), Some(Change::Left(SECOND)));
        assert_eq!(chosen(&mut circle, 4, now), [1, 3, 1, 3]);
        assert_eq!(circle.failed(address(9), 1.0, now), None, "of nobody we know");
    }

    #[test]
    fn after_a_rest_one_connection_tries_and_decides() {
        let (mut circle, start) = (circle(Balance::RoundRobin, 3), Instant::now());
        fail(&mut circle, 2, 3, start);
        assert_eq!(chosen(&mut circle, 3, start + SECOND * 9 / 10), [1, 3, 1]);
        let later = start + SECOND;
        assert_eq!(chosen(&mut circle, 5, later), [2, 3, 1, 3, 1], "one trial only");
        assert_eq!(fail(&mut circle, 2, 1, later), Some(Change::Left(SECOND * 2)));
        assert_eq!(chosen(&mut circle, 3, later + SECOND), [3, 1, 3]);
        let again = later + SECOND * 2;
        assert_eq!(chosen(&mut circle, 2, again), [1, 2]);
        assert_eq!(circle.answered(address(2)), Some(Change::Back));
        assert_eq!(chosen(&mut circle, 3, again), [3, 1, 2]);
        assert_eq!(fail(&mut circle, 2, 3, again), Some(Change::Left(SECOND)), "a new series begins small");
    }

    #[test]
    fn a_trial_without_an_end_does_not_stand_in_the_way_for_ever() {
        let (mut circle, start) = (circle(Balance::RoundRobin, 2), Instant::now());
        fail(&mut circle, 1, 3, start);
        assert_eq!(chosen(&mut circle, 3, start + SECOND), [1, 2, 2]);
        assert_eq!(chosen(&mut circle, 2, start + SECOND + TRIAL_LASTS), [1, 2]);
    }

    #[test]
    fn rests_grow_up_to_a_limit_and_are_spread() {
        let spans: Vec<u64> = (0..8).map(|rests| rest(rests, 1.0).as_secs()).collect();
        assert_eq!(spans, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(rest(u32::MAX, 0.0), LONGEST_REST / 2);
        assert_eq!(rest(0, f64::NAN.max(9.0)), SECOND);
    }

    #[test]
    fn when_most_seem_to_be_down_all_are_asked_again() {
        let (mut circle, now) = (circle(Balance::RoundRobin, 4), Instant::now());
        for last in [1, 2] {
            fail(&mut circle, last, 3, now);
        }
        assert_eq!(chosen(&mut circle, 3, now), [3, 4, 3]);
        fail(&mut circle, 3, 3, now);
        assert_eq!(chosen(&mut circle, 4, now), [4, 1, 2, 3], "one of four is not enough");
        circle.answered(address(1));
        assert_eq!(chosen(&mut circle, 3, now), [4, 1, 4]);
    }

    #[test]
    fn one_by_itself_is_never_given_up_and_the_resting_are_the_last_resort() {
        let now = Instant::now();
        let mut alone = circle(Balance::RoundRobin, 1);
        fail(&mut alone, 1, 20, now);
        assert_eq!(chosen(&mut alone, 2, now), [1, 1]);
        let mut two = circle(Balance::RoundRobin, 2);
        fail(&mut two, 1, 3, now);
        assert_eq!(two.choose(&[address(2)], now), Some(address(1)));
        assert_eq!(fail(&mut two, 1, 9, now), None, "asked before its time, it is no trial");
        assert_eq!(chosen(&mut two, 2, now + SECOND), [2, 1], "its rest did not grow");
    }

    #[test]
    fn new_addresses_come_in_and_old_ones_keep_their_past() {
        let (mut circle, now) = (circle(Balance::RoundRobin, 3), Instant::now());
        fail(&mut circle, 2, 3, now);
        circle.update(&[address(4), address(3), address(2)]);
        assert_eq!(chosen(&mut circle, 3, now), [3, 4, 3]);
        circle.update(
            &(0..=255).map(address).chain((0..9).map(|i| SocketAddr::from(([10, 1, 0, i], 1)))).collect::<Vec<_>>(),
        );
        assert_eq!(circle.entries.len(), MAX_ADDRESSES);
        circle.update(&[]);
        assert_eq!(circle.choose(&[], now), None);
    }

    proptest! {
        /// Whatever happened before: as long as anything is left to try, it is found, and each only once.
        #[test]
        fn every_address_is_reached_by_trying_on(steps in proptest::collection::vec((1..6u8, 0..4u8, 0..5u64), 0..60), count in 1..6u8) {
            for balance in [Balance::RoundRobin, Balance::LeastConnections] {
                let (mut circle, mut now) = (circle(balance, count), Instant::now());
                for (last, step, secs) in &steps {
                    now += SECOND * *secs as u32;
                    match step {
                        0 => drop(circle.failed(address(*last), 0.5, now)),
                        1 => drop(circle.answered(address(*last))),
                        2 => circle.opened(address(*last)),
                        _ => drop(circle.choose(&[], now)),
                    }
                }
                let mut tried = Vec::new();
                while let Some(address) = circle.choose(&tried, now) {
                    prop_assert!(!tried.contains(&address));
                    tried.push(address);
                }
                prop_assert_eq!(tried.len(), usize::from(count));
            }
        }
    }
}
