//! Quarantine from the inside: whether this agent lets nothing through, by its collector's word or on its own.
//!
//! While a collector is in reach it decides, for it knows how many others are quarantined. An agent that is alone goes by
//! the last signed policy and what it sees itself. Only the data plane stops; the way to the collector never does.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sidewarden_proto::directive::{Denied, Directive};
use sidewarden_proto::event::{Event, QuarantineAlone, Severity};
use sidewarden_proto::identity::{AgentId, InstanceId, Sha256};
use sidewarden_proto::policy::gate::{Alone, Known, Stand};
use sidewarden_proto::policy::{Applied, Policy};
use sidewarden_proto::time::Timestamp;
use tokio::sync::{Notify, watch};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::identity::Current;
use crate::uplink::SharedStatus;

/// How long no collector must have been in reach before an agent acts alone: a restart of one takes less.
const ALONE_AFTER: Duration = Duration::from_secs(10);
/// How often is looked for what only time changes.
const EVERY: Duration = Duration::from_secs(1);

/// Why nothing gets through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Which gate of the policy.
    pub gate: String,
    /// What was done.
    pub why: String,
}

/// Whether something holds this workload off the data plane.
pub type Holding = watch::Receiver<Option<Arc<Held>>>;

/// What this agent itself has told, as gates see it. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    known: Arc<Mutex<Known>>,
    changed: Arc<Notify>,
}

impl Observed {
    /// Takes an event in.
    pub fn take(&self, event: &Event) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let before = known.clone();
        known.take(event);
        if *known != before {
            self.changed.notify_one();
        }
    }

    fn now(&self) -> Known {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What a decision is made from.
struct Input<'a> {
    directive: Option<&'a Directive>,
    /// Our own name and key.
    agent: &'a AgentId,
    spki: Sha256,
    known: &'a Known,
    /// For how long no collector has been in reach; zero while one is.
    alone_for: Duration,
    now: Timestamp,
}

/// Remembers what was decided before. Pure.
#[derive(Debug)]
struct Responder {
    of: Option<Applied>,
    policy: Result<Arc<Policy>, String>,
    /// What this agent did on its own.
    alone: Option<Held>,
}

impl Responder {
    fn new() -> Responder {
        Responder { of: None, policy: Ok(Arc::default()), alone: None }
    }

    fn decide(&mut self, input: &Input<'_>) -> Option<Held> {
        let applied = input.directive.and_then(|directive| directive.policy.as_ref());
        if self.of.as_ref() != applied {
            let text = applied.map_or("", |applied| &applied.text);
            self.policy = Policy::parse(text).map(Arc::new).map_err(|faults| faults.to_string());
            self.of = applied.cloned();
        }
        let Ok(policy) = self.policy.clone() else { return self.unread() };
        // By its name, too: a key that somebody else's CA has just given us is known to nobody yet.
        let by_key = input.directive.and_then(|directive| directive.quarantines(input.spki));
        let by_name = || input.directive.and_then(|directive| directive.quarantines_agent(input.agent));
        if let Some(Denied::Quarantined { gate, why }) = by_key.or_else(by_name) {
            return Some(Held { gate: gate.to_owned(), why: why.to_owned() });
        }
        self.alone = self.decide_alone(&policy, input);
        self.alone.clone()
    }

    /// Half of a policy is none: what it forbids would be allowed here.
    fn unread(&self) -> Option<Held> {
        let error = self.policy.as_ref().err()?;
        let why = format!("this agent cannot read the policy and must be updated: {error}");
        Some(Held { gate: "policy".into(), why })
    }

    /// What no collector knows of until this agent tells it.
    fn own(&self) -> [Option<Held>; 2] {
        [self.alone.clone(), self.unread()]
    }

    fn decide_alone(&self, policy: &Policy, input: &Input<'_>) -> Option<Held> {
        if input.directive.is_some_and(|directive| directive.releases(input.agent, input.now)) {
            return None;
        }
        let mut gates = policy.gates_of(&input.agent.workload).filter(|gate| gate.enforce);
        if let Some(held) = &self.alone {
            let gate = gates.find(|gate| gate.name == held.gate)?;
            let opens = gate.opens(&gate.judge(input.known, input.now), input.now);
            return (!opens).then(|| held.clone());
        }
        if input.alone_for < ALONE_AFTER {
            return None;
        }
        gates.filter(|gate| gate.unreachable == Alone::Quarantine).find_map(|gate| {
            let Stand::Broken { why } = gate.judge(input.known, input.now) else { return None };
            Some(Held { gate: gate.name.clone(), why })
        })
    }
}

/// What the response needs.
pub struct Parts {
    /// Which instance this is.
    pub instance: InstanceId,
    /// Who we are, and what the collector says.
    pub identity: Current,
    /// Whether a collector is in reach.
    pub uplink: SharedStatus,
    /// What was observed.
    pub observed: Observed,
    /// Takes events.
    pub emit: Arc<dyn Fn(Event) + Send + Sync>,
    /// Where the answer goes.
    pub holding: watch::Sender<Option<Arc<Held>>>,
}

/// Decides again whenever an answer could have changed, until `stop`.
pub async fn run(mut parts: Parts, stop: CancellationToken) {
    let mut responder = Responder::new();
    let mut in_reach = tokio::time::Instant::now();
    loop {
        parts.look(&mut responder, &mut in_reach);
        tokio::select! {
            () = stop.cancelled() => return,
            () = parts.observed.changed.notified() => {}
            changed = parts.identity.changed() => if changed.is_err() { return },
            () = sleep(EVERY) => {}
        }
    }
}

impl Parts {
    fn look(&mut self, responder: &mut Responder, in_reach: &mut tokio::time::Instant) {
        let uplink = self.uplink.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // One that follows another collector's directives decides nothing: with it an agent is alone, too.
        if uplink.session.is_some() && uplink.keeps_gates {
            *in_reach = tokio::time::Instant::now();
        }
        let Some(identity) = self.identity.borrow_and_update().clone() else { return };
        let agent = AgentId { workload: identity.workload.clone(), instance: self.instance.clone() };
        let before = responder.own();
        let held = responder.decide(&Input {
            directive: identity.directive.as_deref(),
            agent: &agent,
            spki: identity.credential.peer().spki,
            known: &self.observed.now(),
            alone_for: in_reach.elapsed(),
            now: Timestamp::now(),
        });
        let changed = self.holding.send_if_modified(|holding| {
            let is_new = holding.as_deref() != held.as_ref();
            *holding = held.clone().map(Arc::new);
            is_new
        });
        if changed {
            match &held {
                Some(Held { gate, why }) => tracing::error!(gate, why, "this workload is quarantined"),
                None => tracing::warn!("this workload is quarantined no longer"),
            }
        }
        for (before, now) in before.into_iter().zip(responder.own()) {
            self.tell(before, now);
        }
    }

    /// The collector tells of its own decisions; ours are told by us.
    fn tell(&self, before: Option<Held>, now: Option<Held>) {
        let (on, Held { gate, why }) = match (before, now) {
            (None, Some(held)) => (true, held),
            (Some(held), None) => (false, held),
            _ => return,
        };
        let (severity, summary) = if on {
            (Severity::Critical, format!("quarantined without a collector's word by the gate {gate}: {why}"))
        } else {
            (Severity::Notice, format!("let back in without a collector's word: the gate {gate} is kept again"))
        };
        (self.emit)(Event::new(Timestamp::now(), severity, summary, &QuarantineAlone { gate, on, why }.into()));
    }
}

#[cfg(test)]
mod tests {
    use sidewarden_proto::finding::Verdict;
    use sidewarden_proto::policy::gate::Seen;

    use super::*;

    const NOW: Timestamp = Timestamp::from_secs(10_000);
    const LONG: Duration = Duration::from_secs(60);

    fn directive(gate: &str) -> Directive {
        let json = r#"{"version":1,"trust_domain":"td","issued_us":1,"bundle":[]}"#;
        let text = format!("[[gate]]\nname = 'g'\nchecks = ['privileged']\nhold = '60s'\n{gate}");
        Directive { policy: Some(Applied { version: 1, text, needs: 0 }), ..serde_json::from_str(json).unwrap() }
    }

    fn known(seen: Seen, since: i64) -> Known {
        let verdict = (seen, Timestamp::from_secs(since));
        Known { verdicts: [("privileged".to_owned(), verdict)].into(), ..Known::default() }
    }

    fn ask(responder: &mut Responder, directive: &Directive, known: &Known, alone_for: Duration) -> bool {
        let agent = "spiffe://td/shop/web#1".parse().unwrap();
        let spki = Sha256([3; 32]);
        responder
            .decide(&Input { directive: Some(directive), agent: &agent, spki, known, alone_for, now: NOW })
            .is_some()
    }

    #[test]
    fn an_agent_acts_alone_only_when_no_collector_is_in_reach_and_the_gate_is_enforced() {
        let rows = [
            ("enforce = true", Seen::Broken, LONG, true),
            ("enforce = true", Seen::Broken, Duration::from_secs(9), false),
            ("enforce = true", Seen::Broken, Duration::ZERO, false),
            ("enforce = true", Seen::Unclear, LONG, false),
            ("enforce = true", Seen::Kept, LONG, false),
            ("", Seen::Broken, LONG, false),
            ("enforce = true\nunreachable = 'keep'", Seen::Broken, LONG, false),
            ("enforce = true\nworkloads = ['bank/*']", Seen::Broken, LONG, false),
        ];
        for (gate, seen, alone_for, held) in rows {
            let got = ask(&mut Responder::new(), &directive(gate), &known(seen, 1), alone_for);
            assert_eq!(got, held, "{gate} {seen:?} {alone_for:?}");
        }
    }

    #[test]
    fn a_waiver_in_our_own_file_opens_no_gate() {
        let waived = Verdict::Waived { by: "ops".into(), why: "x".into(), until: NOW.plus(LONG) };
        let known = known(Seen::from(&waived), 1);
        assert!(ask(&mut Responder::new(), &directive("enforce = true"), &known, LONG));
    }

    #[test]
    fn what_it_did_alone_lasts_until_the_gate_was_kept_for_the_hold_also_when_a_collector_is_back() {
        let (mut responder, directive) = (Responder::new(), directive("enforce = true"));
        assert!(ask(&mut responder, &directive, &known(Seen::Broken, 1), LONG));
        let secs = NOW.as_secs();
        for (known, held) in [
            (known(Seen::Broken, 1), true),
            (known(Seen::Unclear, 1), true),
            (known(Seen::Kept, secs - 59), true),
            (known(Seen::Kept, secs - 60), false),
        ] {
            assert_eq!(ask(&mut responder, &directive, &known, Duration::ZERO), held, "{known:?}");
        }
    }

    #[test]
    fn an_operators_release_counts_also_for_an_agent_that_is_alone() {
        let mut directive = directive("enforce = true");
        let (workload, instance) = ("spiffe://td/shop/web".parse().unwrap(), "1".parse().unwrap());
        let until_us = NOW.plus(Duration::from_secs(1));
        directive.released =
            vec![sidewarden_proto::directive::Release { workload, instance, why: "x".into(), until_us }];
        assert!(!ask(&mut Responder::new(), &directive, &known(Seen::Broken, 1), LONG));
    }

    #[test]
    fn a_policy_that_cannot_be_read_lets_nothing_through() {
        let directive = directive("newer = 'than this agent'");
        assert!(ask(&mut Responder::new(), &directive, &known(Seen::Kept, 1), Duration::ZERO));
    }

    #[test]
    fn a_policy_that_cannot_be_read_is_told_once_and_again_when_one_can() {
        let ca = crate::identity::made_up::Ca::new("td");
        let (publish, identity) = watch::channel(None);
        let events: Arc<Mutex<Vec<Event>>> = Arc::default();
        let told = events.clone();
        let mut parts = Parts {
            instance: "1".parse().unwrap(),
            identity,
            uplink: SharedStatus::default(),
            observed: Observed::default(),
            emit: Arc::new(move |event| told.lock().unwrap().push(event)),
            holding: watch::Sender::default(),
        };
        let (mut responder, mut in_reach) = (Responder::new(), tokio::time::Instant::now());
        for gate in ["newer = 'than this agent'", "enforce = true"] {
            let checked = ca.issue("shop/web").check().unwrap();
            let directive = Some(Arc::new(directive(gate)));
            let identity = crate::identity::Identity::build(checked, directive, &Default::default()).unwrap();
            publish.send_replace(Some(Arc::new(identity)));
            parts.look(&mut responder, &mut in_reach);
            parts.look(&mut responder, &mut in_reach);
        }
        let events = events.lock().unwrap();
        let told: Vec<_> = events.iter().map(|event| (event.kind.as_ref(), event.severity)).collect();
        assert_eq!(told, [("quarantine.alone", Severity::Critical), ("quarantine.alone", Severity::Notice)]);
        assert!(events[0].summary.contains("must be updated"), "{}", events[0].summary);
    }

    #[test]
    fn the_collectors_word_counts_at_once_about_our_key_and_about_our_name() {
        let mut responder = Responder::new();
        for (instance, key, expected) in [("1", 3, true), ("2", 3, true), ("1", 4, true), ("2", 4, false)] {
            let (workload, instance) = ("spiffe://td/shop/web".parse().unwrap(), instance.parse().unwrap());
            let (keys, gate, why) = (vec![Sha256([key; 32])], "g".into(), "privileged".into());
            let quarantine =
                sidewarden_proto::directive::Quarantine { workload, instance, gate, why, at_us: NOW, keys };
            let held = directive("enforce = true").with_quarantined(vec![quarantine]);
            let got = ask(&mut responder, &held, &known(Seen::Kept, 1), Duration::ZERO);
            assert_eq!(got, expected, "{held:?}");
        }
        assert!(!ask(&mut responder, &directive("enforce = true"), &known(Seen::Broken, 1), Duration::ZERO));
    }
}
