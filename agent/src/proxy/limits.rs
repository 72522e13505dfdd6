//! How much, how often, how many at once: for the bytes of a connection or a listener, and for each source. Pure.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// So much of a second's worth may go at once: bytes come in gusts, and a wait per gust is what a limit costs.
const BYTES_AT_ONCE: Duration = Duration::from_millis(100);
/// The same for new connections: a client that opens some at its start is no attack.
const CONNECTIONS_AT_ONCE: Duration = Duration::from_secs(1);
/// Sources that are told apart; the rest are counted together.
const MAX_SOURCES: usize = 4_096;
/// Sources that want nothing any more are looked for at most this often.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// A rate that is kept: a token bucket, written as the moment when it will be full again.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    per_second: NonZeroU64,
    at_once: Duration,
    full_at: Option<Instant>,
}

impl Bucket {
    /// A full one for `per_second` bytes.
    pub fn of_bytes(per_second: NonZeroU64) -> Bucket {
        Bucket { per_second, at_once: BYTES_AT_ONCE, full_at: None }
    }

    /// A full one for `per_second` new connections.
    fn of_connections(per_second: NonZeroU64) -> Bucket {
        Bucket { per_second, at_once: CONNECTIONS_AT_ONCE, full_at: None }
    }

    /// Takes `count` that are already gone, into debt if need be: what was read has to be written.
    pub fn spend(&mut self, count: u64, now: Instant) {
        self.full_at = Some(self.full_at(now) + self.worth(count));
    }

    /// How long nothing more may go; zero for at once.
    pub fn wait(&self, now: Instant) -> Duration {
        self.full_at(now).saturating_duration_since(now).saturating_sub(self.at_once)
    }

    /// Takes one if there is one.
    fn take_one(&mut self, now: Instant) -> bool {
        let after = self.full_at(now) + self.worth(1);
        // Less than one a second still lets one in at a time.
        let allowed = after.saturating_duration_since(now) <= self.at_once.max(self.worth(1));
        if allowed {
            self.full_at = Some(after);
        }
        allowed
    }

    fn full_at(&self, now: Instant) -> Instant {
        self.full_at.map_or(now, |at| at.max(now))
    }

    /// The time in which `count` come in; at most an hour, so that no sum of them is beyond an [`Instant`].
    fn worth(&self, count: u64) -> Duration {
        let nanos = u128::from(count) * 1_000_000_000 / u128::from(self.per_second.get());
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).min(Duration::from_secs(3600))
    }

    fn is_full(&self, now: Instant) -> bool {
        self.full_at.is_none_or(|at| at <= now)
    }
}

/// The rate that the connections of one listener or route keep together, and each by itself.
#[derive(Clone, Debug, Default)]
pub struct Pacing {
    all: Option<Arc<Mutex<Bucket>>>,
    each: Option<NonZeroU64>,
}

impl Pacing {
    /// Bytes a second of all and of each; `None` for as many as come.
    pub fn new(all: Option<NonZeroU64>, each: Option<NonZeroU64>) -> Pacing {
        Pacing { all: all.map(|rate| Arc::new(Mutex::new(Bucket::of_bytes(rate)))), each }
    }

    /// For one more connection; `None` where there is no limit, which costs it nothing.
    pub fn begin(&self) -> Option<Box<Pace>> {
        let pace = || Pace { all: self.all.clone(), each: self.each.map(Bucket::of_bytes), counted: 0 };
        (self.all.is_some() || self.each.is_some()).then(|| Box::new(pace()))
    }
}

/// The rates of one connection.
#[derive(Debug)]
pub struct Pace {
    all: Option<Arc<Mutex<Bucket>>>,
    each: Option<Bucket>,
    counted: u64,
}

impl Pace {
    /// `moved` bytes have gone since the connection began: how long nothing more may.
    pub fn wait_after(&mut self, moved: u64, now: Instant) -> Duration {
        let new = moved.saturating_sub(std::mem::replace(&mut self.counted, moved));
        let spend = |bucket: &mut Bucket| {
            bucket.spend(new, now);
            bucket.wait(now)
        };
        let each = self.each.as_mut().map_or(Duration::ZERO, spend);
        let all = self.all.as_ref();
        let all = all.map_or(Duration::ZERO, |all| spend(&mut all.lock().unwrap_or_else(PoisonError::into_inner)));
        each.max(all)
    }
}

/// What one source may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceLimits {
    /// New connections a second; `None` for as many as come.
    pub connections_per_second: Option<NonZeroU64>,
    /// Handshakes under way; `None` for as many as come.
    pub handshakes: Option<usize>,
}

/// Whom a limit is kept for: one IPv4 address, or one /64 of IPv6, for who has one address there has them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// An address of IPv4, or the first of a /64.
    One(IpAddr),
    /// All that are too many to be told apart.
    Others,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::One(ip @ IpAddr::V4(_)) => write!(f, "{ip}"),
            Source::One(ip) => write!(f, "{ip}/64"),
            Source::Others => f.write_str("the many other sources"),
        }
    }
}

/// What a source has used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// It opened too many connections in too short a time.
    Rate(Source, NonZeroU64),
    /// It has too many handshakes under way.
    Handshakes(Source, usize),
}

impl std::fmt::Display for Over {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Over::Rate(source, limit) => write!(
                f,
                "more than {limit} new connections a second from {source} (limits.max_new_connections_per_source)"
            ),
            Over::Handshakes(source, limit) => {
                write!(f, "more than {limit} handshakes under way from {source} (limits.max_handshakes_per_source)")
            }
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Use {
    rate: Option<Bucket>,
    handshakes: usize,
}

/// Every source that does something now.
#[derive(Debug)]
pub struct Sources {
    limits: SourceLimits,
    uses: HashMap<Source, Use>,
    swept: Option<Instant>,
}

impl Sources {
    /// Nobody yet.
    pub fn new(limits: SourceLimits) -> Sources {
        Sources { limits, uses: HashMap::new(), swept: None }
    }

    /// A connection from `ip` begins its handshake. Give back what is returned by [`Sources::finished`].
    pub fn admit(&mut self, ip: IpAddr, now: Instant) -> Result<Source, Over> {
        let source = self.source_of(ip, now);
        let SourceLimits { connections_per_second, handshakes } = self.limits;
        let used = self.uses.entry(source).or_default();
        if let Some(limit) = handshakes.filter(|limit| used.handshakes >= *limit) {
            return Err(Over::Handshakes(source, limit));
        }
        if let Some(limit) = connections_per_second
            && !used.rate.get_or_insert_with(|| Bucket::of_connections(limit)).take_one(now)
        {
            return Err(Over::Rate(source, limit));
        }
        used.handshakes += 1;
        Ok(source)
    }

    /// Its handshake came to an end, good or bad.
    pub fn finished(&mut self, source: Source) {
        if let Some(used) = self.uses.get_mut(&source) {
            used.handshakes = used.handshakes.saturating_sub(1);
            if used.handshakes == 0 && used.rate.is_none() {
                self.uses.remove(&source);
            }
        }
    }

    fn source_of(&mut self, ip: IpAddr, now: Instant) -> Source {
        let source = Source::One(match ip.to_canonical() {
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
            v4 => v4,
        });
        if self.uses.len() < MAX_SOURCES || self.uses.contains_key(&source) {
            return source;
        }
        self.sweep(now);
        if self.uses.len() < MAX_SOURCES { source } else { Source::Others }
    }

    fn sweep(&mut self, now: Instant) {
        if self.swept.is_some_and(|swept| now < swept + SWEEP_EVERY) {
            return;
        }
        self.swept = Some(now);
        self.uses.retain(|_, used| used.handshakes > 0 || used.rate.is_some_and(|rate| !rate.is_full(now)));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn per_second(count: u64) -> NonZeroU64 {
        NonZeroU64::new(count).unwrap()
    }

    /// What goes through in `span` when each pass takes as much as `gust`, and the bucket is asked before each.
    fn moved(rate: u64, gust: u64, span: Duration) -> u64 {
        let (start, mut bucket, mut total) = (Instant::now(), Bucket::of_bytes(per_second(rate)), 0);
        let mut now = start;
        while now < start + span {
            let wait = bucket.wait(now);
            if wait.is_zero() {
                bucket.spend(gust, now);
                total += gust;
                now += Duration::from_micros(1);
            }
            now += wait;
        }
        total
    }

    #[test]
    fn a_byte_rate_holds() {
        const MIB: u64 = 1 << 20;
        for (rate, gust) in
            [(10 * MIB, 16 << 10), (10 * MIB, 256 << 10), (MIB, MIB), (100, 16 << 10), (1 << 40, 64 << 10)]
        {
            let span = Duration::from_secs(10);
            let (total, exact) = (moved(rate, gust, span), rate * 10);
            // More by what may go at once, and by the last gust, which was begun in time.
            assert!(total <= exact + rate / 10 + gust, "{rate}/s in gusts of {gust}: {total}");
            if rate < 1 << 40 {
                assert!(total + gust >= exact, "{rate}/s in gusts of {gust}: {total}");
            }
        }
    }

    #[test]
    fn rest_is_not_saved_up() {
        let (start, mut bucket) = (Instant::now(), Bucket::of_bytes(per_second(1_000)));
        bucket.spend(100, start);
        assert_eq!(bucket.wait(start), Duration::ZERO, "a tenth of a second's worth at once");
        bucket.spend(1_000, start);
        assert_eq!(bucket.wait(start), Duration::from_secs(1));
        let later = start + Duration::from_secs(3600);
        assert_eq!(bucket.wait(later), Duration::ZERO);
        bucket.spend(1_100, later);
        assert_eq!(bucket.wait(later), Duration::from_secs(1));
    }

    #[test]
    fn two_that_share_a_bucket_share_its_rate() {
        let (mut now, mut bucket, mut total) = (Instant::now(), Bucket::of_bytes(per_second(1 << 20)), [0u64; 2]);
        let end = now + Duration::from_secs(5);
        for turn in 0.. {
            now += bucket.wait(now);
            if now >= end {
                break;
            }
            bucket.spend(32 << 10, now);
            total[turn % 2] += 32 << 10;
        }
        assert!(total[0].abs_diff(total[1]) <= 32 << 10, "{total:?}");
        assert!(total[0] + total[1] <= (5 << 20) + (1 << 20) / 10 + (64 << 10), "{total:?}");
    }

    #[test]
    fn a_connection_keeps_its_own_rate_and_the_one_it_shares() {
        let (now, pacing) = (Instant::now(), Pacing::new(Some(per_second(1_000)), Some(per_second(500))));
        let (mut first, mut second) = (pacing.begin().unwrap(), pacing.begin().unwrap());
        assert_eq!(first.wait_after(50, now), Duration::ZERO);
        assert_eq!(first.wait_after(50, now), Duration::ZERO, "nothing new");
        assert_eq!(first.wait_after(550, now), Duration::from_secs(1), "500 more at 500 a second");
        assert_eq!(
            second.wait_after(50, now),
            Duration::from_millis(500),
            "600 together, a tenth of a second's at once"
        );
        assert!(Pacing::default().begin().is_none());
    }

    fn sources(rate: Option<u64>, handshakes: Option<usize>) -> Sources {
        Sources::new(SourceLimits { connections_per_second: rate.map(per_second), handshakes })
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn one_source_cannot_take_the_handshakes_of_others() {
        let (mut all, now) = (sources(None, Some(2)), Instant::now());
        let first = all.admit(ip("10.0.0.7"), now).unwrap();
        all.admit(ip("::ffff:10.0.0.7"), now).unwrap();
        let over = all.admit(ip("10.0.0.7"), now).unwrap_err();
        assert_eq!(
            over.to_string(),
            "more than 2 handshakes under way from 10.0.0.7 (limits.max_handshakes_per_source)"
        );
        assert!(all.admit(ip("10.0.0.8"), now).is_ok());
        all.finished(first);
        assert!(all.admit(ip("10.0.0.7"), now).is_ok());
    }

    #[test]
    fn an_ipv6_source_is_its_network() {
        let (mut all, now) = (sources(None, Some(1)), Instant::now());
        all.admit(ip("2001:db8:1:2::1"), now).unwrap();
        let over = all.admit(ip("2001:db8:1:2:ffff::9"), now).unwrap_err();
        assert!(over.to_string().contains("from 2001:db8:1:2::/64 "), "{over}");
        assert!(all.admit(ip("2001:db8:1:3::1"), now).is_ok());
    }

    #[test]
    fn new_connections_come_in_at_their_rate() {
        let (mut all, start) = (sources(Some(10), None), Instant::now());
        let admitted = |all: &mut Sources, now| (0..100).filter(|_| all.admit(ip("10.0.0.7"), now).is_ok()).count();
        assert_eq!(admitted(&mut all, start), 10, "a second's worth at once");
        assert_eq!(admitted(&mut all, start + Duration::from_millis(99)), 0);
        assert_eq!(admitted(&mut all, start + Duration::from_millis(350)), 3);
        assert_eq!(admitted(&mut all, start + Duration::from_secs(60)), 10, "rest is not saved up");
        let over = all.admit(ip("10.0.0.7"), start + Duration::from_secs(60)).unwrap_err();
        assert!(over.to_string().contains("more than 10 new connections a second"), "{over}");
    }

    #[test]
    fn what_is_kept_is_bounded_and_those_beyond_share_one_limit() {
        let (mut all, now) = (sources(Some(1), Some(1)), Instant::now());
        let many = |all: &mut Sources, net: u32, now| {
            (0..10_000u32).filter(|i| all.admit(IpAddr::V4((net + i).into()), now).is_ok()).count()
        };
        assert_eq!(many(&mut all, 0x0A00_0000, now), MAX_SOURCES + 1);
        assert!(all.uses.len() <= MAX_SOURCES + 1);
        assert!(matches!(all.admit(ip("192.0.2.1"), now), Err(Over::Handshakes(Source::Others, 1))));
        let known: Vec<Source> = all.uses.keys().copied().collect();
        known.into_iter().for_each(|source| all.finished(source));
        assert!(
            matches!(all.admit(ip("192.0.2.1"), now), Err(Over::Rate(Source::Others, _))),
            "looked through a moment ago"
        );
        assert!(all.admit(ip("192.0.2.1"), now + SWEEP_EVERY).is_ok());
        assert!(all.uses.len() < 10, "{}", all.uses.len());
    }

    #[test]
    fn who_is_done_is_forgotten() {
        let (mut all, now) = (sources(None, Some(9)), Instant::now());
        let source = all.admit(ip("10.0.0.7"), now).unwrap();
        all.finished(source);
        all.finished(source);
        assert!(all.uses.is_empty());
    }

    proptest! {
        #[test]
        fn no_amounts_overflow(spends in proptest::collection::vec((any::<u64>(), 0..100_000u64), 0..50), rate in 1..=u64::MAX) {
            let (mut now, mut bucket) = (Instant::now(), Bucket::of_bytes(per_second(rate)));
            for (count, millis) in spends {
                now += Duration::from_millis(millis);
                bucket.spend(count, now);
                bucket.wait(now);
            }
        }
    }
}
