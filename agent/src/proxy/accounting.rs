//! Every connection attempt in exactly one event. Pure: attempts and the time in, events out.
//!
//! A refusal is told at once, so that an alert is quick; more like it (same reason, listener and source prefix) are
//! counted and told once at the end of each [`REFUSAL_WINDOW`]. A peer's first connection is told at once as
//! `peer.first_seen`; what a pair of peers does is summed up once in each [`SUMMARY_WINDOW`]. Bytes are counted when a
//! connection ends. What is kept is bounded: past that, sources and peers are counted together as `other`.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use sidewarden_proto::event::{
    ConnectionEnded, ConnectionPlaintext, ConnectionRefused, ConnectionsSummary, Direction, Event, PeerFirstSeen,
    RefusalReason, Severity,
};
use sidewarden_proto::time::Timestamp;

/// Refusals like the first one are counted for this long.
pub const REFUSAL_WINDOW: Duration = Duration::from_secs(10);
/// Connections of a pair are summed up for this long.
pub const SUMMARY_WINDOW: Duration = Duration::from_secs(60);
/// Most kinds of refusals, and most pairs, that are told apart.
const MAX_KEPT: usize = 1_024;
/// What the rest is called.
const OTHER: &str = "other";

/// One connection that was not let through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Which way.
    pub direction: Direction,
    /// Why.
    pub reason: RefusalReason,
    /// What exactly happened.
    pub detail: String,
    /// The listener it came to, or where the route leads; of egress, where the workload wanted to go.
    pub listener: String,
    /// The other side; of egress, who asked.
    pub source: Option<SocketAddr>,
    /// Who it said it is.
    pub peer: String,
}

/// One pair of peers on one listener.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pair {
    /// Which way.
    pub direction: Direction,
    /// The other side's verified name; of egress, where the workload asked to go.
    pub peer: String,
    /// The listener or route.
    pub listener: String,
}

/// How a connection was secured, for the first sight of a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Secured {
    /// The other side's address.
    pub address: String,
    /// Version of TLS.
    pub tls_version: String,
    /// Key exchange group.
    pub group: String,
}

/// What a connection did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// From the peer.
    pub bytes_in: u64,
    /// To the peer.
    pub bytes_out: u64,
    /// It ended without a proper close.
    pub truncated: bool,
}

/// One connection in plaintext that was let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plaintext {
    /// The listener it came to.
    pub listener: String,
    /// Who.
    pub source: SocketAddr,
    /// What it began with, in few words.
    pub detail: String,
}

#[derive(Debug)]
struct Plaintexts {
    since: Timestamp,
    count: u64,
    last: Plaintext,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Likeness {
    direction: Direction,
    reason: RefusalReason,
    listener: String,
    prefix: String,
}

#[derive(Debug)]
struct Repeats {
    since: Timestamp,
    count: u64,
    last: Refusal,
}

#[derive(Debug, Default)]
struct Sums {
    opened: u64,
    closed: u64,
    truncated: u64,
    bytes_in: u64,
    bytes_out: u64,
}

/// The books.
#[derive(Debug, Default)]
pub struct Books {
    refusals: HashMap<Likeness, Repeats>,
    pairs: HashMap<Pair, Sums>,
    summed_since: Option<Timestamp>,
    seen: HashSet<Pair>,
    ended: HashMap<(Direction, String, &'static str), u64>,
    /// By listener and network.
    plaintexts: HashMap<(String, String), Plaintexts>,
}

impl Books {
    /// Counts a refusal; the event if it is the first of its kind for a while.
    pub fn refused(&mut self, refusal: Refusal, now: Timestamp) -> Option<Event> {
        let key = self.likeness(&refusal);
        if let Some(repeats) = self.refusals.get_mut(&key) {
            repeats.count += 1;
            repeats.last = refusal;
            return None;
        }
        let event = refusal_event(&refusal, 1, now);
        self.refusals.insert(key, Repeats { since: now, count: 0, last: refusal });
        Some(event)
    }

    fn likeness(&self, refusal: &Refusal) -> Likeness {
        let Refusal { direction, reason, listener, source, .. } = refusal;
        let prefix = source.map_or_else(String::new, |source| prefix_of(source.ip()));
        let key = Likeness { direction: *direction, reason: *reason, listener: listener.clone(), prefix };
        if self.refusals.len() < MAX_KEPT || self.refusals.contains_key(&key) {
            return key;
        }
        // Listeners and routes are few; where a workload wants to go is without end.
        let listener = if *direction == Direction::Egress { OTHER.into() } else { key.listener };
        Likeness { prefix: OTHER.into(), listener, ..key }
    }

    /// Counts a connection that was let through; an event if this peer was never seen here before.
    pub fn opened(&mut self, pair: &Pair, secured: Secured, now: Timestamp) -> Option<Event> {
        self.sums(pair, now).opened += 1;
        if self.seen.len() >= MAX_KEPT || !self.seen.insert(pair.clone()) {
            return None;
        }
        let Pair { direction, peer, .. } = pair.clone();
        let Secured { address, tls_version, group } = secured;
        let summary = match direction {
            Direction::Inbound => format!("{peer} came in for the first time, {address}, {tls_version}"),
            Direction::Outbound => format!("{peer} was reached for the first time, {address}, {tls_version}"),
            Direction::Egress => format!("the workload went to {peer} for the first time, {address}"),
        };
        let body = PeerFirstSeen { direction, peer, address, tls_version, group };
        Some(Event::new(now, Severity::Info, summary, &body.into()))
    }

    /// Counts a connection in plaintext that was let in; the event if its network was silent for a while.
    pub fn plaintext(&mut self, plaintext: Plaintext, now: Timestamp) -> Option<Event> {
        let mut key = (plaintext.listener.clone(), prefix_of(plaintext.source.ip()));
        if self.plaintexts.len() >= MAX_KEPT && !self.plaintexts.contains_key(&key) {
            key.1 = OTHER.into();
        }
        if let Some(known) = self.plaintexts.get_mut(&key) {
            known.count += 1;
            known.last = plaintext;
            return None;
        }
        let event = plaintext_event(&plaintext, &key.1, 1, now);
        self.plaintexts.insert(key, Plaintexts { since: now, count: 0, last: plaintext });
        Some(event)
    }

    /// Counts the end of a connection that was let through.
    pub fn closed(&mut self, pair: &Pair, traffic: Traffic, now: Timestamp) {
        let sums = self.sums(pair, now);
        sums.closed += 1;
        sums.truncated += u64::from(traffic.truncated);
        sums.bytes_in += traffic.bytes_in;
        sums.bytes_out += traffic.bytes_out;
    }

    /// Counts a live connection that we ended; told with the next [`Books::due`].
    pub fn ended(&mut self, direction: Direction, peer: String, reason: &'static str) {
        let peer = if self.ended.len() < MAX_KEPT { peer } else { OTHER.into() };
        *self.ended.entry((direction, peer, reason)).or_default() += 1;
    }

    fn sums(&mut self, pair: &Pair, now: Timestamp) -> &mut Sums {
        self.summed_since.get_or_insert(now);
        let mut pair = pair.clone();
        if self.pairs.len() >= MAX_KEPT && !self.pairs.contains_key(&pair) {
            (pair.peer, pair.listener) = (OTHER.into(), OTHER.into());
        }
        self.pairs.entry(pair).or_default()
    }

    /// What is due to be told at `now`; with `all`, everything, because the agent ends.
    pub fn due(&mut self, now: Timestamp, all: bool) -> Vec<Event> {
        let ended = self.ended.drain();
        let mut events: Vec<Event> =
            ended.map(|((way, peer, why), count)| ended_event(way, peer, why, count, now)).collect();
        self.refusals.retain(|_, repeats| {
            if now.since(repeats.since) < REFUSAL_WINDOW && !all {
                return true;
            }
            if repeats.count == 0 {
                return false;
            }
            events.push(refusal_event(&repeats.last, repeats.count, now));
            (repeats.since, repeats.count) = (now, 0);
            !all
        });
        self.plaintexts.retain(|(_, network), known| {
            if now.since(known.since) < SUMMARY_WINDOW && !all {
                return true;
            }
            let more = known.count > 0;
            if more {
                events.push(plaintext_event(&known.last, network, known.count, now));
            }
            (known.since, known.count) = (now, 0);
            more && !all
        });
        let window = self.summed_since.map_or(Duration::ZERO, |since| now.since(since));
        if self.summed_since.is_some() && (all || window >= SUMMARY_WINDOW) {
            self.summed_since = None;
            let window_secs = window.as_secs().max(1).min(u64::from(u32::MAX)) as u32;
            events.extend(self.pairs.drain().map(|(pair, sums)| summary_event(pair, &sums, window_secs, now)));
        }
        events
    }
}

fn ended_event(direction: Direction, peer: String, reason: &str, count: u64, now: Timestamp) -> Event {
    let connections = if count == 1 { "a live connection".into() } else { format!("{count} live connections") };
    let summary = format!("{connections} with {peer} ended: {}", reason.replace('_', " "));
    let severity = if reason == "maximum_age" { Severity::Info } else { Severity::Notice };
    let body = ConnectionEnded { direction, peer, reason: reason.to_owned(), count };
    Event::new(now, severity, summary, &body.into())
}

/// The network a source is counted by: /24 of IPv4, /64 of IPv6.
fn prefix_of(ip: IpAddr) -> String {
    match ip.to_canonical() {
        IpAddr::V4(ip) => format!("{}/24", Ipv4Addr::from_bits(ip.to_bits() & !0xFF)),
        IpAddr::V6(ip) => format!("{}/64", Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64)),
    }
}

/// What only says that something is down is worth a note; what may be an attack, a warning.
fn severity_of(reason: RefusalReason) -> Severity {
    use RefusalReason as R;
    match reason {
        R::Unreachable | R::WorkloadUnreachable | R::RefusedByPeer | R::NoIdentity => Severity::Notice,
        R::NameUnresolved | R::UpstreamRefused => Severity::Notice,
        _ => Severity::Warning,
    }
}

fn refusal_event(refusal: &Refusal, count: u64, now: Timestamp) -> Event {
    let Refusal { direction, reason, detail, listener, source, peer } = refusal.clone();
    let source = source.map_or_else(String::new, |source| source.to_string());
    let who = if peer.is_empty() { &source } else { &peer };
    let way = match direction {
        Direction::Inbound => format!("refused {who} at {listener}"),
        Direction::Outbound => format!("no connection to {listener}"),
        Direction::Egress if never_said_where(reason) => format!("refused {who} at {listener}"),
        Direction::Egress => format!("no egress to {listener}"),
    };
    let more = if count > 1 { format!(" ({count} times)") } else { String::new() };
    let summary = format!("{way}: {}: {detail}{more}", reason.word().replace('_', " "));
    let hint = reason.hint().to_owned();
    let body = ConnectionRefused { direction, reason, detail, hint, listener, source, peer, count };
    Event::new(now, severity_of(reason), summary, &body.into())
}

fn plaintext_event(plaintext: &Plaintext, network: &str, count: u64, now: Timestamp) -> Event {
    let Plaintext { listener, source, detail } = plaintext.clone();
    let more = if count > 1 { format!(" ({count} times)") } else { String::new() };
    let summary = format!("{source} was let in at {listener} without TLS: {detail}{more}");
    let (source, network) = (source.to_string(), network.to_owned());
    let body = ConnectionPlaintext { listener, source, network, detail, count };
    Event::new(now, Severity::Warning, summary, &body.into())
}

/// Whether a refusal of egress is about a connection that did not come to the point of asking for a place.
fn never_said_where(reason: RefusalReason) -> bool {
    use RefusalReason as R;
    matches!(reason, R::BadRequest | R::RequestTimeout | R::LimitReached | R::EgressLoop)
}

fn summary_event(pair: Pair, sums: &Sums, window_secs: u32, now: Timestamp) -> Event {
    let Pair { direction, peer, listener } = pair;
    let Sums { opened, closed, truncated, bytes_in, bytes_out } = *sums;
    let summary =
        format!("{peer} at {listener}: {opened} opened, {closed} closed, {bytes_in} bytes in, {bytes_out} out");
    let body =
        ConnectionsSummary { direction, peer, listener, opened, closed, truncated, bytes_in, bytes_out, window_secs };
    Event::new(now, Severity::Info, summary, &body.into())
}

#[cfg(test)]
mod tests {
    use sidewarden_proto::event::Body;

    use super::*;

    fn refusal(reason: RefusalReason, source: &str) -> Refusal {
        Refusal {
            direction: Direction::Inbound,
            reason,
            detail: "began with `GET /`".into(),
            listener: "0.0.0.0:8443".into(),
            source: Some(source.parse().unwrap()),
            peer: String::new(),
        }
    }

    fn pair(peer: &str) -> Pair {
        Pair { direction: Direction::Inbound, peer: peer.into(), listener: "0.0.0.0:8443".into() }
    }

    fn counts(events: &[Event]) -> Vec<u64> {
        let of = |event: &Event| match event.body().unwrap().unwrap() {
            Body::ConnectionRefused(body) => body.count,
            Body::ConnectionsSummary(body) => body.opened,
            Body::ConnectionPlaintext(body) => body.count,
            other => panic!("{other:?}"),
        };
        let mut counts: Vec<u64> = events.iter().map(of).collect();
        counts.sort_unstable();
        counts
    }

    const fn at(secs: i64) -> Timestamp {
        Timestamp::from_secs(secs)
    }

    #[test]
    fn the_first_refusal_is_told_at_once_and_the_others_are_counted() {
        let mut books = Books::default();
        let first = books.refused(refusal(RefusalReason::Plaintext, "10.0.0.7:1"), at(0)).unwrap();
        assert_eq!(first.summary, "refused 10.0.0.7:1 at 0.0.0.0:8443: plaintext: began with `GET /`");
        for i in 1..=41 {
            assert!(books.refused(refusal(RefusalReason::Plaintext, &format!("10.0.0.{i}:1")), at(1)).is_none());
        }
        assert!(books.refused(refusal(RefusalReason::Plaintext, "10.0.1.7:1"), at(1)).is_some(), "another network");
        assert!(books.refused(refusal(RefusalReason::UnknownCa, "10.0.0.7:1"), at(1)).is_some(), "another reason");
        assert!(books.due(at(9), false).is_empty());
        assert_eq!(counts(&books.due(at(11), false)), [41]);
        assert!(books.due(at(30), false).is_empty());
        assert!(books.refused(refusal(RefusalReason::Plaintext, "10.0.0.7:1"), at(31)).is_some(), "a new series");
    }

    #[test]
    fn every_attempt_is_counted_once_however_many_sources_there_are() {
        let mut books = Books::default();
        let mut told = Vec::new();
        for i in 0..5_000u32 {
            let source = format!("10.{}.{}.1:1", i >> 8, i & 0xFF);
            told.extend(books.refused(refusal(RefusalReason::UnknownCa, &source), at(0)));
        }
        assert!(books.refusals.len() <= MAX_KEPT + 1);
        told.extend(books.due(at(1), true));
        assert_eq!(counts(&told).iter().sum::<u64>(), 5_000);
        assert!(books.due(at(2), true).is_empty(), "nothing is told twice");
    }

    #[test]
    fn places_a_workload_asks_for_are_counted_apart_as_long_as_they_are_not_too_many() {
        let mut books = Books::default();
        let ask = |books: &mut Books, i: usize| {
            let listener = format!("x{i}.example:443");
            let refusal = Refusal {
                direction: Direction::Egress,
                listener,
                detail: "it is not on the list".into(),
                ..refusal(RefusalReason::EgressNotListed, "127.0.0.1:4711")
            };
            books.refused(refusal, at(0))
        };
        let first = ask(&mut books, 0).unwrap();
        assert_eq!(first.summary, "no egress to x0.example:443: egress not listed: it is not on the list");
        assert!(ask(&mut books, 0).is_none() && ask(&mut books, 1).is_some());
        let mut told: Vec<Event> = (2..5_000).filter_map(|i| ask(&mut books, i)).collect();
        assert!(books.refusals.len() <= MAX_KEPT + 1, "{}", books.refusals.len());
        told.extend(books.due(at(1), true));
        assert_eq!(counts(&told).iter().sum::<u64>(), 5_001 - 2);
    }

    #[test]
    fn pairs_are_summed_up_and_a_first_sight_is_told_once() {
        let mut books = Books::default();
        let web = pair("spiffe://td/shop/web");
        assert!(books.opened(&web, Secured::default(), at(0)).is_some());
        assert!(books.opened(&web, Secured::default(), at(1)).is_none());
        books.closed(&web, Traffic { bytes_in: 3, bytes_out: 5, truncated: true }, at(2));
        assert!(books.due(at(59), false).is_empty());
        let events = books.due(at(60), false);
        let Body::ConnectionsSummary(body) = events[0].body().unwrap().unwrap() else { panic!() };
        assert_eq!((body.opened, body.closed, body.truncated, body.bytes_in, body.bytes_out), (2, 1, 1, 3, 5));
        assert_eq!(body.window_secs, 60);
        assert!(books.due(at(200), false).is_empty());
    }

    #[test]
    fn connections_that_we_ended_are_told_together() {
        let mut books = Books::default();
        (0..3).for_each(|_| books.ended(Direction::Inbound, "spiffe://td/shop/web".into(), "revoked"));
        let events = books.due(at(1), false);
        assert_eq!(events[0].summary, "3 live connections with spiffe://td/shop/web ended: revoked");
        assert!(books.due(at(2), false).is_empty());
    }

    #[test]
    fn plaintext_that_is_let_in_is_counted_by_network() {
        let mut books = Books::default();
        let come = |books: &mut Books, source: &str, now| {
            let (listener, detail) = ("0.0.0.0:8443".into(), "began with `GET /`".into());
            books.plaintext(Plaintext { listener, source: source.parse().unwrap(), detail }, now)
        };
        let first = come(&mut books, "10.0.0.7:1", at(0)).unwrap();
        assert_eq!(first.summary, "10.0.0.7:1 was let in at 0.0.0.0:8443 without TLS: began with `GET /`");
        (0..41).for_each(|i| assert!(come(&mut books, &format!("10.0.0.{i}:1"), at(1)).is_none()));
        assert!(come(&mut books, "10.0.1.7:1", at(1)).is_some(), "another network");
        assert!(books.due(at(59), false).is_empty());
        assert_eq!(counts(&books.due(at(61), false)), [41]);
        assert!(come(&mut books, "10.0.0.7:1", at(62)).is_none(), "within the next window");
        assert_eq!(counts(&books.due(at(63), true)), [1]);
        assert!(books.due(at(64), true).is_empty());
    }

    #[test]
    fn plaintext_is_counted_however_many_networks_there_are() {
        let (mut books, mut told) = (Books::default(), Vec::new());
        for i in 0..5_000u32 {
            let source = format!("10.{}.{}.1:1", i >> 8, i & 0xFF).parse().unwrap();
            told.extend(books.plaintext(Plaintext { listener: "x".into(), source, detail: String::new() }, at(0)));
        }
        assert!(books.plaintexts.len() <= MAX_KEPT + 1);
        told.extend(books.due(at(1), true));
        assert_eq!(counts(&told).iter().sum::<u64>(), 5_000);
    }

    #[test]
    fn sources_are_counted_by_network() {
        for (ip, expected) in [
            ("10.1.2.3", "10.1.2.0/24"),
            ("::ffff:10.1.2.3", "10.1.2.0/24"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ] {
            assert_eq!(prefix_of(ip.parse().unwrap()), expected);
        }
    }
}
