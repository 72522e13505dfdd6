//! Which listeners can be reached from outside without TLS: whom to ask, and what to tell. Pure: listeners, answers and
//! the time in; questions and events out.
//!
//! A listener is asked once when it is new, and again only while its answer leaves it open, ever more rarely. That it is
//! exposed is told when it is known, and that it no longer is, too.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use sidewarden_proto::backoff::{Backoff, Random};
use sidewarden_proto::event::{Body, Event, ListenerClosed, ListenerExposed, ListenersBaseline, Protocol, Severity};
use sidewarden_proto::time::Timestamp;

use super::mask;
use crate::cis::{Declared, Standing, standing};
use crate::facts::{Listener, Lock, Speech};

/// A listener that comes and goes is asked at most this often.
const ASK_AT_MOST: Duration = Duration::from_secs(10);
/// An answer that leaves it open is asked for again, from up to this long after, up to this seldom.
const AGAIN_FIRST: Duration = Duration::from_secs(20);
const AGAIN_MOST: Duration = Duration::from_secs(900);
/// UDP that is gone again before this was nobody's service: a client binds, asks, and closes.
const UDP_SETTLED: Duration = Duration::from_secs(3);
/// So many exposures are told one by one; what is more shows in the verdict of 5.8.
const MAX_TOLD: usize = 64;

/// A listener by what does not change while it is there.
pub type Key = (Protocol, SocketAddr);

/// What is known of every listener that others can reach.
#[derive(Debug)]
pub struct Exposures {
    known: BTreeMap<Key, Known>,
    random: Random,
    baseline_wanted: bool,
}

#[derive(Debug)]
struct Known {
    listener: Listener,
    since: Instant,
    asked: Option<Instant>,
    /// When to ask; `None` while it is being asked, and when its answer settles it.
    due: Option<Instant>,
    backoff: Backoff,
    told: Option<Told>,
}

impl Known {
    fn is_kept(&self, declared: &Declared, lock: Lock) -> bool {
        matches!(standing(&self.listener, declared, lock), Standing::Kept(_))
    }
}

/// What was told of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Told {
    Exposed,
    Declared,
}

impl Exposures {
    /// Nothing is known yet.
    pub fn new(random: Random) -> Exposures {
        Exposures { known: BTreeMap::new(), random, baseline_wanted: true }
    }

    /// Takes in what listens now; what is to be told of it.
    pub fn look(
        &mut self,
        listeners: &[Listener],
        declared: &Declared,
        lock: Lock,
        now: Instant,
        at: Timestamp,
    ) -> Vec<Event> {
        let mut present: BTreeMap<Key, &Listener> = BTreeMap::new();
        for listener in listeners.iter().filter(|l| !l.is_loopback()) {
            // Several sockets may share an address: the oldest one speaks for them.
            present.entry((listener.protocol, listener.address)).or_insert(listener);
        }
        let gone: Vec<Key> = self.known.keys().filter(|key| !present.contains_key(key)).copied().collect();
        let mut events: Vec<Event> = gone.iter().filter_map(|key| self.forget(key, at)).collect();
        for (key, listener) in present {
            self.meet(key, listener, now);
        }
        events.extend(self.tell(declared, lock, now, at));
        if self.baseline_wanted && !self.is_asking(now, declared, lock) {
            self.baseline_wanted = false;
            events.push(self.baseline(at));
        }
        events
    }

    /// Whom to ask now: they are held to be asked until [`Exposures::answered`].
    pub fn due(&mut self, now: Instant, declared: &Declared, lock: Lock) -> Vec<Listener> {
        let mut ask = Vec::new();
        for known in self.known.values_mut().filter(|k| k.due.is_some_and(|due| due <= now)) {
            if known.listener.protocol == Protocol::Tcp && !known.is_kept(declared, lock) {
                (known.due, known.asked) = (None, Some(now));
                ask.push(known.listener.clone());
            }
        }
        ask
    }

    /// What the listener `key` answered.
    pub fn answered(&mut self, key: Key, speech: Speech, now: Instant) {
        let Some(known) = self.known.get_mut(&key) else { return };
        known.due = match speech {
            Speech::Tls | Speech::Plain(_) | Speech::First(_) => None,
            // It may have been starting, or stopping.
            Speech::Silent | Speech::Closed | Speech::Unasked(_) => Some(now + known.backoff.after_failure()),
        };
        known.listener.speech = Some(speech);
    }

    /// Nobody could be found to ask `key`.
    pub fn not_asked(&mut self, key: Key, now: Instant) {
        if let Some(known) = self.known.get_mut(&key) {
            known.due = Some(now);
        }
    }

    /// Writes what is known into `listeners`.
    pub fn annotate(&self, listeners: &mut [Listener]) {
        for listener in listeners {
            let known = self.known.get(&(listener.protocol, listener.address));
            listener.speech = known.and_then(|known| known.listener.speech.clone());
        }
    }

    /// Whether somebody is being asked for the first time, so that it is too early to say how things stand.
    pub fn is_asking(&self, now: Instant, declared: &Declared, lock: Lock) -> bool {
        let is_new = |k: &&Known| k.listener.speech.is_none() && now.duration_since(k.since) < ASK_AT_MOST;
        let is_asked = |k: &Known| k.listener.protocol == Protocol::Tcp && !k.is_kept(declared, lock);
        self.known.values().filter(is_new).any(is_asked)
    }

    /// How many were told to be exposed, and how many to be declared so.
    pub fn told(&self) -> (u64, u64) {
        let count = |which: Told| self.known.values().filter(|k| k.told.as_ref() == Some(&which)).count() as u64;
        (count(Told::Exposed), count(Told::Declared))
    }

    /// Everything is told anew with the next look.
    pub fn want_baseline(&mut self) {
        self.baseline_wanted = true;
        self.known.values_mut().for_each(|known| known.told = None);
    }

    fn meet(&mut self, key: Key, listener: &Listener, now: Instant) {
        let known = self.known.entry(key).or_insert_with(|| Known {
            listener: listener.clone(),
            since: now,
            asked: None,
            due: Some(now),
            backoff: Backoff::new(AGAIN_FIRST, AGAIN_MOST, self.random),
            told: None,
        });
        if known.listener.inode != listener.inode {
            // Another socket at the same place: what its predecessor said does not count for it.
            known.due = Some(known.asked.map_or(now, |asked| (asked + ASK_AT_MOST).max(now)));
            known.backoff.reset();
            known.listener = Listener { speech: None, ..listener.clone() };
        }
        known.listener = Listener { speech: known.listener.speech.take(), ..listener.clone() };
    }

    fn forget(&mut self, key: &Key, at: Timestamp) -> Option<Event> {
        let known = self.known.remove(key)?;
        known.told.is_some().then(|| closed(&known.listener, "nobody listens there any more", at))
    }

    fn tell(&mut self, declared: &Declared, lock: Lock, now: Instant, at: Timestamp) -> Vec<Event> {
        let mut told = self.known.values().filter(|known| known.told.is_some()).count();
        let mut events = Vec::new();
        for known in self.known.values_mut() {
            let listener = &known.listener;
            let settled = listener.protocol == Protocol::Tcp || now.duration_since(known.since) >= UDP_SETTLED;
            let (next, event) = match standing(listener, declared, lock) {
                Standing::Open(_) => continue,
                Standing::Exposed(_) | Standing::Declared(_) if !settled => continue,
                Standing::Declared(_) if listener.protocol == Protocol::Tcp && listener.speech.is_none() => continue,
                Standing::Exposed(how) => (Some(Told::Exposed), exposed(listener, &how, "", at)),
                Standing::Declared(reason) => (Some(Told::Declared), exposed(listener, "declared", &reason, at)),
                Standing::Kept(why) => (None, closed(listener, why, at)),
                Standing::Tls => (None, closed(listener, "it speaks TLS", at)),
                Standing::Client => (None, closed(listener, "it is held to be a client's", at)),
            };
            if next == known.told || (next.is_some() && known.told.is_none() && told >= MAX_TOLD) {
                continue;
            }
            told = told + usize::from(next.is_some()) - usize::from(known.told.is_some());
            known.told = next;
            events.push(event);
        }
        events
    }

    fn baseline(&self, at: Timestamp) -> Event {
        let all = |which: Told| -> Vec<String> {
            self.known.values().filter(|k| k.told.as_ref() == Some(&which)).map(|k| label(&k.listener)).collect()
        };
        let body = ListenersBaseline { exposed: all(Told::Exposed), declared: all(Told::Declared) };
        let summary = format!(
            "{} listeners can be reached without TLS, and {} more are declared to be",
            body.exposed.len(),
            body.declared.len()
        );
        let severity = if body.exposed.is_empty() { Severity::Info } else { Severity::Notice };
        Event::new(at, severity, summary, &Body::from(body))
    }
}

/// `0.0.0.0:8080/tcp`
fn label(listener: &Listener) -> String {
    format!("{}/{}", listener.address, listener.protocol.word())
}

fn exposed(listener: &Listener, how: &str, reason: &str, at: Timestamp) -> Event {
    let detail = mask(how);
    let (summary, severity) = if reason.is_empty() {
        (format!("{listener} can be reached without TLS: {detail}"), Severity::Warning)
    } else {
        (format!("{listener} can be reached without TLS, as declared: {reason}"), Severity::Notice)
    };
    let body = ListenerExposed {
        address: listener.address.to_string(),
        detail,
        protocol: listener.protocol,
        owner: mask(listener.owner.to_string().trim_start_matches(" of ")),
        reason: reason.to_owned(),
    };
    Event::new(at, severity, summary, &Body::from(body))
}

fn closed(listener: &Listener, why: &str, at: Timestamp) -> Event {
    let summary = format!("{} can no longer be reached without TLS: {why}", label(listener));
    let body =
        ListenerClosed { address: listener.address.to_string(), protocol: listener.protocol, detail: why.to_owned() };
    Event::new(at, Severity::Notice, summary, &Body::from(body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cis::Plaintext;

    /// Exposures, with a clock.
    struct Rig {
        exposures: Exposures,
        declared: Declared,
        lock: Lock,
        begun: Instant,
        secs: u64,
    }

    impl Rig {
        fn new() -> Rig {
            let exposures = Exposures::new(|bytes| bytes.fill(0xFF));
            let mut rig =
                Rig { exposures, declared: Declared::default(), lock: Lock::Off, begun: Instant::now(), secs: 0 };
            assert_eq!(
                rig.look(&[]),
                ["listeners.baseline: 0 listeners can be reached without TLS, and 0 more are declared to be"]
            );
            rig
        }

        fn now(&self) -> Instant {
            self.begun + Duration::from_secs(self.secs)
        }

        /// The events of a look, as `kind: summary`.
        fn look(&mut self, listeners: &[Listener]) -> Vec<String> {
            let at = Timestamp::from_secs(self.secs.cast_signed());
            let events = self.exposures.look(listeners, &self.declared, self.lock, self.now(), at);
            events.iter().map(|e| format!("{}: {}", e.kind, e.summary)).collect()
        }

        /// Who is asked now.
        fn asked(&mut self) -> Vec<String> {
            let due = self.exposures.due(self.now(), &self.declared, self.lock);
            due.iter().map(|l| l.address.to_string()).collect()
        }

        fn answer(&mut self, listener: &Listener, speech: Speech) {
            self.exposures.answered((listener.protocol, listener.address), speech, self.now());
        }
    }

    fn on(address: &str, inode: u64) -> Listener {
        Listener { address: address.parse().unwrap(), inode, uid: 33, ..Listener::default() }
    }

    #[test]
    fn a_new_listener_is_asked_once_and_told_once_with_its_end() {
        let (mut rig, web) = (Rig::new(), on("0.0.0.0:80", 1));
        assert!(rig.look(std::slice::from_ref(&web)).is_empty());
        assert_eq!(rig.asked(), ["0.0.0.0:80"]);
        assert!(rig.asked().is_empty(), "it is being asked");
        rig.answer(&web, Speech::Plain("`HTTP/1.1 400`".into()));
        let told = "listener.exposed: 0.0.0.0:80/tcp, uid 33 can be reached without TLS: it answered a TLS hello with `HTTP/1.1 400`";
        assert_eq!(rig.look(std::slice::from_ref(&web)), [told]);
        assert_eq!(rig.exposures.told(), (1, 0));
        rig.secs = 100_000;
        assert!(rig.look(std::slice::from_ref(&web)).is_empty() && rig.asked().is_empty(), "its answer settles it");
        let end = "listener.closed: 0.0.0.0:80/tcp can no longer be reached without TLS: nobody listens there any more";
        assert_eq!(rig.look(&[]), [end]);
        assert!(rig.look(&[]).is_empty());
    }

    #[test]
    fn tls_and_loopback_and_what_is_kept_off_are_no_news() {
        let mut rig = Rig::new();
        let tls = on("0.0.0.0:443", 1);
        assert!(rig.look(&[tls.clone(), on("127.0.0.1:80", 2)]).is_empty());
        assert_eq!(rig.asked(), ["0.0.0.0:443"]);
        rig.answer(&tls, Speech::Tls);
        assert!(rig.look(std::slice::from_ref(&tls)).is_empty());
        rig.lock = Lock::InForce;
        assert!(rig.look(&[on("0.0.0.0:80", 3)]).is_empty() && rig.asked().is_empty());
        assert!(!rig.exposures.is_asking(rig.now(), &rig.declared, rig.lock), "there is nobody to wait for");
        rig.lock = Lock::Broken;
        assert_eq!(rig.asked(), ["0.0.0.0:80"], "without the rules it can be reached");
    }

    #[test]
    fn an_open_answer_is_asked_for_again_ever_more_rarely() {
        let (mut rig, web) = (Rig::new(), on("0.0.0.0:80", 1));
        rig.look(std::slice::from_ref(&web));
        let mut asked_at = Vec::new();
        while rig.secs < 3000 {
            if !rig.asked().is_empty() {
                asked_at.push(rig.secs);
                rig.answer(&web, Speech::Silent);
            }
            rig.secs += 1;
        }
        assert_eq!(asked_at, [0, 20, 60, 140, 300, 620, 1260, 2160]);
        let told = rig.look(std::slice::from_ref(&web));
        assert!(told[0].ends_with("it did not answer a TLS hello"), "{told:?}");
        rig.secs += 10_000;
        assert_eq!(rig.asked().len(), 1);
        rig.answer(&web, Speech::Tls);
        let told = rig.look(std::slice::from_ref(&web));
        assert_eq!(told, ["listener.closed: 0.0.0.0:80/tcp can no longer be reached without TLS: it speaks TLS"]);
    }

    #[test]
    fn another_socket_at_the_same_place_is_asked_anew_but_not_all_the_time() {
        let mut rig = Rig::new();
        rig.look(&[on("0.0.0.0:80", 1)]);
        assert_eq!(rig.asked().len(), 1);
        rig.answer(&on("0.0.0.0:80", 1), Speech::Tls);
        rig.secs = 1;
        rig.look(&[on("0.0.0.0:80", 2)]);
        assert!(rig.asked().is_empty());
        rig.secs = 10;
        assert_eq!(rig.asked().len(), 1);
    }

    #[test]
    fn udp_is_told_when_it_stays_and_never_asked() {
        let mut rig = Rig::new();
        let dns = Listener { protocol: Protocol::Udp, ..on("0.0.0.0:53", 1) };
        assert!(rig.look(std::slice::from_ref(&dns)).is_empty() && rig.asked().is_empty());
        rig.secs = 3;
        assert!(rig.look(std::slice::from_ref(&dns))[0].contains("0.0.0.0:53/udp, uid 33 can be reached without TLS"));
        let client =
            Listener { ephemeral: true, ..Listener { address: "0.0.0.0:40000".parse().unwrap(), ..dns.clone() } };
        rig.look(&[dns.clone(), client.clone()]);
        rig.secs = 9;
        assert!(rig.look(&[dns, client]).is_empty());
    }

    #[test]
    fn what_is_declared_is_told_with_its_reason() {
        let (mut rig, xmpp) = (Rig::new(), on("0.0.0.0:5222", 1));
        rig.declared.plaintext =
            vec![Plaintext { port: 5222, protocol: Protocol::Tcp, reason: "old desktop client".into() }];
        assert!(rig.look(std::slice::from_ref(&xmpp)).is_empty(), "it may turn out to speak TLS");
        rig.asked();
        rig.answer(&xmpp, Speech::First("`<stream>`".into()));
        let told = rig.look(std::slice::from_ref(&xmpp));
        let expected =
            "listener.exposed: 0.0.0.0:5222/tcp, uid 33 can be reached without TLS, as declared: old desktop client";
        assert_eq!(told, [expected]);
    }

    #[test]
    fn a_baseline_tells_everything_anew_and_waits_for_first_answers() {
        let (mut rig, web) = (Rig::new(), on("0.0.0.0:80", 1));
        rig.look(std::slice::from_ref(&web));
        rig.asked();
        rig.exposures.want_baseline();
        assert!(rig.look(std::slice::from_ref(&web)).is_empty());
        rig.answer(&web, Speech::Closed);
        let told = rig.look(std::slice::from_ref(&web));
        let kinds: Vec<&str> = told.iter().filter_map(|line| line.split(':').next()).collect();
        assert_eq!(kinds, ["listener.exposed", "listeners.baseline"]);
        assert!(told[1].contains("1 listeners can be reached without TLS"), "{told:?}");
    }

    #[test]
    fn a_thousand_open_ports_are_not_a_thousand_events() {
        let mut rig = Rig::new();
        let many: Vec<Listener> = (1..=1000).map(|port| on(&format!("0.0.0.0:{port}"), port)).collect();
        rig.look(&many);
        assert_eq!(rig.asked().len(), 1000);
        many.iter().for_each(|l| rig.answer(l, Speech::Closed));
        assert_eq!(rig.look(&many).len(), MAX_TOLD);
        assert_eq!(rig.look(&[]).len(), MAX_TOLD);
    }

    #[test]
    fn a_banner_with_a_secret_keeps_it() {
        let (mut rig, web) = (Rig::new(), on("0.0.0.0:80", 1));
        rig.look(std::slice::from_ref(&web));
        rig.answer(&web, Speech::First("`password=hunter2`".into()));
        assert!(!rig.look(std::slice::from_ref(&web))[0].contains("hunter2"));
    }
}
