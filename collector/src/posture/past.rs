//! How everything stood at a moment of the past: the same fold as for the present, over the events that say it. Pure.

use sidewarden_proto::event::{Body, Mode};
use sidewarden_proto::evidence::{Pledge, Scan};
use sidewarden_proto::time::Timestamp;

use crate::index::{Past, Told};
use crate::state::{Agent, Session, Stamp, State};

/// What people answer for and what scanners found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known {
    waivers: Vec<Pledge>,
    attestations: Vec<Pledge>,
    scans: Vec<Scan>,
}

impl Known {
    /// What is so now.
    pub fn of(state: &State) -> Known {
        Known { waivers: state.waivers.clone(), attestations: state.attestations.clone(), scans: state.scans.clone() }
    }
}

/// The state at `at`, as far as `past` tells of it; `now` is what is so now.
pub fn fold(past: &Past, now: Known, at: Timestamp) -> State {
    let Known { waivers, attestations, scans } = known_at(now, &past.later);
    let mut state = State { waivers, attestations, scans, ..State::default() };
    for Told { position, agent, epoch, received, event } in &past.events {
        // Its start, which says so, may be older than what is kept; nobody else tells of containers.
        if event.kind.starts_with("container.") {
            let node = || Agent { mode: Some(Mode::Node), ..Agent::default() };
            let known = state.agents.entry((**agent).clone()).or_insert_with(node);
            known.mode = known.mode.or(Some(Mode::Node));
        }
        let stamp = Stamp { position: *position, agent, epoch: *epoch, received: *received };
        state.apply_owned(stamp, event);
    }
    still_live(&mut state);
    state.at = at;
    state
}

/// Who connected before the oldest event that is kept, and tells of things since: were the session over, something that is
/// kept would say so.
fn still_live(state: &mut State) {
    let started = state.started;
    let unheard = |agent: &&mut Agent| agent.session == Session::Never && agent.last_event > started;
    for agent in state.agents.values_mut().filter(unheard) {
        agent.session = Session::Live { since: agent.last_event, source: String::new(), transport: String::new() };
    }
}

/// Goes back from what is so now, one change after the other: the newest comes first.
fn known_at(mut known: Known, later: &[Told]) -> Known {
    let undone = |pledges: &mut Vec<Pledge>, set: &Pledge, before: Option<Pledge>| {
        pledges.retain(|other| !other.is_of_same(set));
        pledges.extend(before);
    };
    for told in later {
        match told.event.body() {
            Ok(Some(Body::WaiverSet(body))) => undone(&mut known.waivers, &body.waiver, body.before),
            Ok(Some(Body::WaiverRemoved(body))) => known.waivers.push(body.waiver),
            Ok(Some(Body::AttestationSet(body))) => undone(&mut known.attestations, &body.attestation, body.before),
            Ok(Some(Body::AttestationRemoved(body))) => known.attestations.push(body.attestation),
            Ok(Some(Body::ScanAdded(body))) => {
                known.scans.retain(|other| !other.is_of_same(&body.scan));
                known.scans.extend(body.before);
            }
            _ => {}
        }
    }
    known
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sidewarden_proto::batch::Epoch;
    use sidewarden_proto::event::{Event, ScanAdded, Severity, WaiverRemoved, WaiverSet};

    use super::*;

    fn pledge(check: &str, why: &str) -> Pledge {
        Pledge {
            check: check.into(),
            workload: "*".into(),
            container: None,
            by: "me".into(),
            why: why.into(),
            at_us: Timestamp(0),
            until_us: Timestamp(9),
            source: String::new(),
            key: String::new(),
        }
    }

    fn told(body: impl Into<Body>) -> Told {
        Told {
            position: 1,
            agent: Arc::new("spiffe://x/sidewarden/collector#c".parse().unwrap()),
            epoch: Epoch([0; 16]),
            received: Timestamp(5),
            event: Event::new(Timestamp(5), Severity::Warning, "", &body.into()),
        }
    }

    #[test]
    fn what_was_done_to_waivers_since_is_undone() {
        let (a, a2, b) = (pledge("a", "first"), pledge("a", "second"), pledge("b", "b"));
        let removed = |waiver: &Pledge| {
            told(WaiverRemoved { waiver: waiver.clone(), why: "x".into(), by: String::new(), source: String::new() })
        };
        let set = |waiver: &Pledge, before: Option<&Pledge>| {
            told(WaiverSet { waiver: waiver.clone(), before: before.cloned() })
        };
        // Oldest first: a is there; a2 takes its place; b is set; a2 is removed.
        let mut later = [set(&a2, Some(&a)), set(&b, None), removed(&a2)];
        later.reverse();
        let back = |steps: usize| {
            let known = Known { waivers: vec![b.clone()], ..Known::default() };
            known_at(known, &later[..steps]).waivers
        };
        assert_eq!(back(1), [b.clone(), a2.clone()]);
        assert_eq!(back(2), [a2]);
        assert_eq!(back(3), [a]);
    }

    #[test]
    fn who_connected_before_all_that_is_kept_is_there_unless_the_collector_started_since() {
        let agent = |last_event| Agent { last_event, ..Agent::default() };
        let ended = Session::Ended { at: Timestamp(8), reason: "bye".into(), clean: true };
        let rows = [
            (agent(Timestamp(9)), true),
            (agent(Timestamp(5)), false),
            (Agent { session: ended, ..agent(Timestamp(9)) }, false),
        ];
        for (agent, is_live) in rows {
            let id = "spiffe://x/hosts/a#h".parse().unwrap();
            let mut state = State { agents: [(id, agent.clone())].into(), started: Timestamp(6), ..State::default() };
            still_live(&mut state);
            let is_so = state.agents.values().all(|agent| matches!(agent.session, Session::Live { .. }));
            assert_eq!(is_so, is_live, "{agent:?}");
        }
    }

    #[test]
    fn a_scan_that_was_taken_since_gives_way_to_the_one_before() {
        let scan = |made| Scan { image_id: "sha256:a".into(), made_us: Timestamp(made), ..Scan::default() };
        let later =
            [told(ScanAdded { scan: scan(3), before: Some(scan(2)) }), told(ScanAdded { scan: scan(2), before: None })];
        let back = |steps: usize| known_at(Known { scans: vec![scan(3)], ..Known::default() }, &later[..steps]).scans;
        assert_eq!((back(0), back(1), back(2)), (vec![scan(3)], vec![scan(2)], vec![]));
    }
}
