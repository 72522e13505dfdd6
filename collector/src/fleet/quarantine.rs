//! Who is off the data plane by a gate of the policy: a pure decision over the state, and what follows from it.
//!
//! The state is a fold of events, and so is what was told of a gate; the directive says who is quarantined. Whatever is
//! interrupted between the two is found and finished by the next look.

use std::collections::{BTreeMap, BTreeSet};

use sidewarden_proto::directive::{Directive, Quarantine, Release};
use sidewarden_proto::event::{GateStatus, QuarantineChanged};
use sidewarden_proto::identity::{AgentId, SpiffeId};
use sidewarden_proto::policy::Policy;
use sidewarden_proto::policy::gate::{Gate, Known, Seen, Stand};
use sidewarden_proto::time::Timestamp;

use super::{Directives, RevokeError, refresh};
use crate::ca::Issuer;
use crate::state::{Agent, State, Status, is_collector_path};

/// Most that are quarantined at a time, by whatever gate: each is told to every agent, and with its keys and reasons all of
/// them must fit a directive, beside what is revoked.
const MAX_QUARANTINED: usize = 200;
/// Most characters of a reason that is told to every agent.
const MAX_WHY: usize = 200;
/// Most releases in force.
const MAX_RELEASED: usize = 1_000;

/// What is to be so.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decided {
    /// Who is quarantined; without keys where somebody is new.
    pub quarantined: Vec<Quarantine>,
    /// What has changed since it was told last.
    pub changes: Vec<QuarantineChanged>,
}

/// How many more may be quarantined in all.
#[derive(Clone, Debug)]
pub struct Free {
    places: usize,
    /// What whoever finds none is told.
    why_no_more: String,
}

impl Free {
    /// As many as are told to every agent at most.
    pub fn of(directive: &Directive) -> Free {
        let places = MAX_QUARANTINED.saturating_sub(directive.quarantined.len());
        Free {
            places,
            why_no_more: format!("{MAX_QUARANTINED} are quarantined already, which is the most there can be"),
        }
    }

    /// Half as many as are new in what was decided, which had no room in the directive. `None`: nobody is, so that nobody can
    /// be left out.
    pub fn fewer(decided: &Decided, directive: &Directive, why_no_more: String) -> Option<Free> {
        let is_new = |q: &&Quarantine| !is_in(directive, &agent_of(q), &q.gate);
        let new = decided.quarantined.iter().filter(is_new).count();
        (new > 0).then_some(Free { places: new / 2, why_no_more })
    }
}

/// How many more of a workload may be quarantined.
#[derive(Default)]
struct Room {
    /// Instances that are quarantined now, by whatever gate.
    held: usize,
    /// Connected ones that are not.
    running: usize,
}

/// Who has a key in common with an instance: what peers refuse by that key is all of them.
pub type Sharers = BTreeMap<AgentId, Vec<AgentId>>;

/// Decides over every instance.
pub fn decide(
    policy: &Policy,
    directive: &Directive,
    state: &State,
    sharers: &Sharers,
    mut free: Free,
    now: Timestamp,
) -> Decided {
    let mut decided = Decided::default();
    let is_told = || state.agents.values().any(|agent| !agent.gates.is_empty());
    if policy.gates.is_empty() && directive.quarantined.is_empty() && !is_told() {
        return decided;
    }
    // What is held already takes no more room: not for another gate, and not for a key that is denied anyway.
    let quarantined: Vec<AgentId> = directive.quarantined.iter().map(agent_of).collect();
    let mut held: BTreeSet<&AgentId> = quarantined.iter().flat_map(|id| with_sharers(id, sharers)).collect();
    let mut rooms = rooms(&held, state, now);
    for (id, agent) in state.agents.iter().filter(|(id, _)| !is_collector_path(id)) {
        let gates: Vec<&Gate> = policy.gates_of(&id.workload).collect();
        if gates.is_empty() && agent.gates.is_empty() {
            continue;
        }
        let (known, mut left) = (known(agent, &gates), agent.gates.clone());
        for gate in gates {
            let room = rooms.entry(&id.workload).or_default();
            let hit: Vec<&AgentId> = with_sharers(id, sharers).filter(|id| !held.contains(id)).collect();
            let stands = stand(gate, id, agent, &known, directive, (room, &hit), now);
            let (status, why) = within(&mut free, stands, directive, gate, id);
            left.remove(&gate.name);
            if status == GateStatus::Quarantined {
                held.extend(hit);
                decided.quarantined.push(entry(directive, id, gate, &why, now));
            }
            change(&mut decided.changes, id, agent, &gate.name, status, why);
        }
        // Gates that the policy has no longer, or not for this workload.
        for name in left.into_keys() {
            change(&mut decided.changes, id, agent, &name, GateStatus::Clear, "the policy has no such gate".into());
        }
    }
    decided.quarantined.extend(unseen(policy, directive, state, now));
    decided
}

/// The same as far as there is room for one more in the directive. Who is in it keeps the place.
fn within(
    free: &mut Free,
    (status, why): (GateStatus, String),
    directive: &Directive,
    gate: &Gate,
    id: &AgentId,
) -> (GateStatus, String) {
    if status != GateStatus::Quarantined || is_in(directive, id, &gate.name) {
        return (status, why);
    }
    if free.places == 0 {
        return (GateStatus::Capped, format!("{why} ({})", free.why_no_more));
    }
    free.places -= 1;
    (status, why)
}

fn is_in(directive: &Directive, id: &AgentId, gate: &str) -> bool {
    directive.quarantined.iter().any(|quarantine| quarantine.is_of(id) && quarantine.gate == gate)
}

/// Who is quarantined and not in the state: its events are lost, or it has been away for long. Of whom nothing is known,
/// nothing is known that opens the gate; it ends with the last certificate, when [`refresh`] finds no keys any more.
fn unseen<'a>(
    policy: &'a Policy,
    directive: &'a Directive,
    state: &'a State,
    now: Timestamp,
) -> impl Iterator<Item = Quarantine> + 'a {
    let stays = move |quarantine: &&Quarantine| {
        let id = agent_of(quarantine);
        let mut gates = policy.gates_of(&id.workload);
        !quarantine.keys.is_empty()
            && !state.agents.contains_key(&id)
            && !directive.releases(&id, now)
            && gates.any(|gate| gate.name == quarantine.gate && gate.enforce)
    };
    directive.quarantined.iter().filter(stays).cloned()
}

/// Who is held takes room though the state has nothing of it: its events may be lost while it runs.
fn rooms<'a>(held: &BTreeSet<&'a AgentId>, state: &'a State, now: Timestamp) -> BTreeMap<&'a SpiffeId, Room> {
    let mut rooms: BTreeMap<&SpiffeId, Room> = BTreeMap::new();
    for id in held {
        rooms.entry(&id.workload).or_default().held += 1;
    }
    let is_running = |(id, agent): &(&AgentId, &Agent)| !held.contains(*id) && state.status(agent, now) == Status::Live;
    for (id, _) in state.agents.iter().filter(is_running) {
        rooms.entry(&id.workload).or_default().running += 1;
    }
    rooms
}

/// An instance, and all who are refused with it.
fn with_sharers<'a>(id: &'a AgentId, sharers: &'a Sharers) -> impl Iterator<Item = &'a AgentId> {
    std::iter::once(id).chain(sharers.get(id).into_iter().flatten())
}

/// What these gates ask of the state.
fn known(agent: &Agent, gates: &[&Gate]) -> Known {
    let is_asked = |check: &String| gates.iter().any(|gate| gate.checks.contains(check));
    let verdicts = agent
        .findings
        .iter()
        .filter(|(check, _)| is_asked(check))
        .map(|(check, standing)| (check.clone(), (Seen::from(&standing.finding.verdict), standing.since)));
    Known { verdicts: verdicts.collect(), happened: agent.happened.clone() }
}

fn stand(
    gate: &Gate,
    id: &AgentId,
    agent: &Agent,
    known: &Known,
    directive: &Directive,
    (room, hit): (&mut Room, &[&AgentId]),
    now: Timestamp,
) -> (GateStatus, String) {
    let before = directive.quarantined.iter().find(|q| q.is_of(id) && q.gate == gate.name);
    let told = agent.gates.get(&gate.name);
    if directive.releases(id, now) {
        return (GateStatus::Clear, "an operator lets it in".into());
    }
    let stand = match (gate.judge(known, now), before) {
        // Where the event is forgotten (events are in no backup), it was quarantined after it all the same.
        (Stand::Kept { since }, Some(before)) if !gate.events.is_empty() => {
            Stand::Kept { since: since.max(before.at_us) }
        }
        (stand, _) => stand,
    };
    match (stand, before) {
        (Stand::Broken { why }, _) if !gate.enforce => (GateStatus::DryRun, why),
        (_, Some(_)) if !gate.enforce => (GateStatus::Clear, "the gate only tells now".into()),
        (Stand::Broken { why }, Some(_)) => (GateStatus::Quarantined, why),
        (stand, Some(before)) if !gate.opens(&stand, now) => (GateStatus::Quarantined, before.why.clone()),
        (Stand::Broken { why }, None) => (enter(gate, room, hit.len()), with_others(why, id, hit)),
        // What cannot be told changes nothing.
        (Stand::Unclear, None) => told.map_or((GateStatus::Clear, String::new()), |told| match told.status {
            GateStatus::Quarantined => (GateStatus::Clear, "it is quarantined no longer".into()),
            status => (status, told.why.clone()),
        }),
        (Stand::Kept { .. } | Stand::Unclear, _) => (GateStatus::Clear, "it keeps the gate".into()),
    }
}

/// Takes the room for as many as are `hit`, if there is enough.
fn enter(gate: &Gate, room: &mut Room, hit: usize) -> GateStatus {
    if hit == 0 {
        return GateStatus::Quarantined;
    }
    if room.held + hit > gate.max_per_workload || room.running < gate.leave + hit {
        return GateStatus::Capped;
    }
    (room.held, room.running) = (room.held + hit, room.running - hit);
    GateStatus::Quarantined
}

fn with_others(why: String, id: &AgentId, hit: &[&AgentId]) -> String {
    let others: Vec<&AgentId> = hit.iter().filter(|other| **other != id).copied().collect();
    match &others[..] {
        [] => why,
        [one] => format!("{why} (its key is also that of {})", one.instance),
        [one, rest @ ..] => format!("{why} (its key is also that of {} and {} more)", one.instance, rest.len()),
    }
}

fn entry(directive: &Directive, id: &AgentId, gate: &Gate, why: &str, now: Timestamp) -> Quarantine {
    let before = directive.quarantined.iter().find(|q| q.is_of(id) && q.gate == gate.name).cloned();
    let (workload, instance) = (id.workload.clone(), id.instance.clone());
    // The first reason stays: another one is no reason to tell every agent anew.
    before.unwrap_or_else(|| {
        let (gate, why, keys) = (gate.name.clone(), why.chars().take(MAX_WHY).collect(), Vec::new());
        Quarantine { workload, instance, gate, why, at_us: now, keys }
    })
}

fn change(
    changes: &mut Vec<QuarantineChanged>,
    id: &AgentId,
    agent: &Agent,
    gate: &str,
    status: GateStatus,
    why: String,
) {
    let told = agent.gates.get(gate).map_or(GateStatus::Clear, |told| told.status);
    if told != status {
        let (workload, instance) = (id.workload.clone(), id.instance.to_string());
        changes.push(QuarantineChanged { workload, instance, gate: gate.to_owned(), status, why });
    }
}

/// Puts what was decided into the directive, with the keys that it takes; releases whose time is over leave it.
pub fn enforce(issuer: &Issuer, directives: &Directives, decided: &Decided, now: Timestamp) -> Result<(), RevokeError> {
    let own = issuer.authority().own().borrow().clone();
    directives.change(&own, now, |directive| {
        let mut quarantined = decided.quarantined.clone();
        // An operator may have let somebody in since this was decided.
        quarantined.retain(|quarantine| !directive.releases(&agent_of(quarantine), now));
        for quarantine in &mut quarantined {
            quarantine.keys = issuer.keys_of(&agent_of(quarantine), now)?;
        }
        let released = directive.released.iter().filter(|release| now < release.until_us).cloned().collect();
        Ok::<_, RevokeError>(Directive { released, ..directive }.with_quarantined(quarantined))
    })?;
    refresh(issuer, directives, now).map(drop)
}

/// The instance that is quarantined.
pub fn agent_of(quarantine: &Quarantine) -> AgentId {
    AgentId { workload: quarantine.workload.clone(), instance: quarantine.instance.clone() }
}

/// Has an instance let in until a moment, whatever gates say.
pub fn release(issuer: &Issuer, directives: &Directives, release: Release, now: Timestamp) -> Result<u64, RevokeError> {
    let own = issuer.authority().own().borrow().clone();
    directives.change(&own, now, |directive| {
        let is_other = |other: &Release| other.workload != release.workload || other.instance != release.instance;
        let mut released: Vec<Release> =
            directive.released.iter().filter(|other| now < other.until_us && is_other(other)).cloned().collect();
        if released.len() >= MAX_RELEASED {
            return Err(RevokeError::Wrong(format!("{MAX_RELEASED} releases are in force: wait until some are over")));
        }
        let id = AgentId { workload: release.workload.clone(), instance: release.instance.clone() };
        let quarantined = directive.quarantined.iter().filter(|quarantine| !quarantine.is_of(&id)).cloned().collect();
        released.push(release);
        Ok(Directive { released, ..directive }.with_quarantined(quarantined))
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sidewarden_proto::event::Severity;
    use sidewarden_proto::finding::{CisIds, Finding, Remedy, Vantage, Verdict};
    use sidewarden_proto::identity::Sha256;

    use super::*;
    use crate::state::{Session, Standing};

    const NOW: Timestamp = Timestamp::from_secs(10_000);

    fn decide(policy: &Policy, directive: &Directive, state: &State, sharers: &Sharers, now: Timestamp) -> Decided {
        super::decide(policy, directive, state, sharers, Free::of(directive), now)
    }

    fn policy(more: &str) -> Policy {
        Policy::parse(&format!("[[gate]]\nname = 'g'\nchecks = ['privileged']\nhold = '60s'\n{more}")).unwrap()
    }

    fn directive() -> Directive {
        let json = r#"{"version":1,"trust_domain":"x","issued_us":1,"bundle":[]}"#;
        serde_json::from_str(json).unwrap()
    }

    fn id(name: &str) -> AgentId {
        format!("spiffe://x/{name}").parse().unwrap()
    }

    fn agent(verdict: Verdict, since: i64) -> Agent {
        let finding = Finding {
            check: "privileged".into(),
            ids: CisIds::default(),
            title: String::new(),
            severity: Severity::Critical,
            verdict,
            evidence: Vec::new(),
            remedy: Remedy::default(),
            vantage: Vantage::Open,
        };
        let standing = Standing { finding, since: Timestamp::from_secs(since) };
        let session = Session::Live { since: NOW, source: String::new(), transport: "quic".into() };
        Agent { findings: [("privileged".to_owned(), standing)].into(), session, ..Agent::default() }
    }

    fn state(agents: &[(&str, Verdict, i64)]) -> State {
        let agents = agents.iter().map(|(name, verdict, since)| (id(name), agent(verdict.clone(), *since)));
        State { agents: agents.collect(), ..State::default() }
    }

    /// The status of every instance that was told of.
    fn told(decided: &Decided) -> Vec<(&str, GateStatus)> {
        decided.changes.iter().map(|change| (change.instance.as_str(), change.status)).collect()
    }

    fn unknown() -> Verdict {
        Verdict::Unknown { grant: String::new() }
    }

    /// Takes a decision as carried out and told.
    fn carried_out(state: &mut State, directive: Directive, decided: &Decided) -> Directive {
        for change in &decided.changes {
            let agent = state.agents.get_mut(&id(&format!("{}#{}", change.workload.path(), change.instance))).unwrap();
            agent.gates.remove(&change.gate);
            if change.status != GateStatus::Clear {
                let gated = crate::state::Gated { status: change.status, why: change.why.clone(), since: NOW };
                agent.gates.insert(change.gate.clone(), gated);
            }
        }
        directive.with_quarantined(decided.quarantined.clone())
    }

    /// SPIRE gives all instances that one host runs of a workload the same key: whoever is refused by it, all are.
    #[test]
    fn those_who_have_a_key_in_common_count_against_the_limits_together() {
        let all =
            [("shop/web#1", Verdict::Fail, 1), ("shop/web#2", Verdict::Pass, 1), ("shop/web#3", Verdict::Pass, 1)];
        let (one, two) = (id("shop/web#1"), id("shop/web#2"));
        let sharers = Sharers::from([(one.clone(), vec![two.clone()]), (two, vec![one])]);
        for (limits, shared, expected) in [
            ("enforce = true\n", false, GateStatus::Quarantined),
            ("enforce = true\n", true, GateStatus::Capped),
            ("enforce = true\nmax_per_workload = 2\n", true, GateStatus::Quarantined),
            ("enforce = true\nmax_per_workload = 2\nleave = 2\n", true, GateStatus::Capped),
            ("enforce = true\nmax_per_workload = 2\nleave = 2\n", false, GateStatus::Quarantined),
        ] {
            let none = Sharers::new();
            let decided =
                decide(&policy(limits), &directive(), &state(&all), if shared { &sharers } else { &none }, NOW);
            assert_eq!(told(&decided), [("1", expected)], "{limits}, shared: {shared}");
            assert_eq!(decided.changes[0].why.contains("its key is also that of 2"), shared, "{:?}", decided.changes);
        }
        // Who is held by somebody else's quarantine takes room, too.
        let mut broken = state(&[
            ("shop/web#1", Verdict::Fail, 1),
            ("shop/web#2", Verdict::Pass, 1),
            ("shop/web#3", Verdict::Fail, 1),
        ]);
        let policy = policy("enforce = true\nmax_per_workload = 2\nleave = 0\n");
        let first = decide(&policy, &directive(), &state(&all), &sharers, NOW);
        let held = carried_out(&mut broken, directive(), &first);
        assert_eq!(told(&decide(&policy, &held, &broken, &sharers, NOW)), [("3", GateStatus::Capped)]);
    }

    #[test]
    fn who_is_held_already_is_quarantined_at_once_and_takes_no_more_room() {
        use GateStatus::{Capped, Quarantined};
        let twice =
            ["g1", "g2"].map(|gate| format!("[[gate]]\nname = '{gate}'\nchecks = ['privileged']\nenforce = true\n"));
        let twice = Policy::parse(&twice.concat()).unwrap();
        let (one, two) = (id("shop/web#1"), id("shop/web#2"));
        let sharers = Sharers::from([(one.clone(), vec![two.clone()]), (two, vec![one])]);
        let all =
            [("shop/web#1", Verdict::Fail, 1), ("shop/web#2", Verdict::Fail, 1), ("shop/web#3", Verdict::Fail, 1)];
        let both = policy("enforce = true\nleave = 1\nmax_per_workload = 2");
        let rows = [
            (
                twice,
                Sharers::new(),
                vec![
                    ("1", Quarantined),
                    ("1", Quarantined),
                    ("2", Capped),
                    ("2", Capped),
                    ("3", Capped),
                    ("3", Capped),
                ],
            ),
            (both, sharers.clone(), vec![("1", Quarantined), ("2", Quarantined), ("3", Capped)]),
        ];
        for (policy, sharers, expected) in rows {
            let mut state = state(&all);
            let decided = decide(&policy, &directive(), &state, &sharers, NOW);
            assert_eq!(told(&decided), expected);
            let held = carried_out(&mut state, directive(), &decided);
            let again = decide(&policy, &held, &state, &sharers, NOW);
            assert_eq!((again.changes, again.quarantined), (vec![], decided.quarantined));
        }
        // The second one fails only later, when its key has been denied for a while.
        let mut later = state(&[all[0].clone(), ("shop/web#2", Verdict::Pass, 1), ("shop/web#3", Verdict::Pass, 1)]);
        let both = policy("enforce = true\nmax_per_workload = 2");
        let decided = decide(&both, &directive(), &later, &sharers, NOW);
        let held = carried_out(&mut later, directive(), &decided);
        later.agents.insert(id("shop/web#2"), agent(Verdict::Fail, 1));
        assert_eq!(told(&decide(&both, &held, &later, &sharers, NOW)), [("2", Quarantined)]);
    }

    #[test]
    fn a_dry_run_tells_and_does_nothing() {
        let state =
            state(&[("shop/web#1", Verdict::Fail, 1), ("shop/web#2", Verdict::Pass, 1), ("shop/db#1", unknown(), 1)]);
        let decided = decide(&policy(""), &directive(), &state, &Sharers::new(), NOW);
        assert_eq!((told(&decided), decided.quarantined.len()), (vec![("1", GateStatus::DryRun)], 0));
    }

    #[test]
    fn a_waiver_in_an_agents_own_file_opens_no_gate() {
        let waived = || Verdict::Waived { by: "ops".into(), why: "x".into(), until: NOW.plus(Duration::from_secs(60)) };
        let policy = policy("enforce = true\nleave = 0");
        let mut state = state(&[("shop/web#1", waived(), 1)]);
        let decided = decide(&policy, &directive(), &state, &Sharers::new(), NOW);
        assert_eq!(told(&decided), [("1", GateStatus::Quarantined)]);
        let held = carried_out(&mut state, directive(), &decided);
        let again = decide(&policy, &held, &state, &Sharers::new(), NOW.plus(Duration::from_secs(3_600)));
        assert_eq!((again.changes, again.quarantined), (vec![], decided.quarantined));
    }

    #[test]
    fn one_rule_never_stops_all_of_a_workload() {
        use GateStatus::{Capped, Quarantined};
        let three =
            [("shop/web#1", Verdict::Fail, 1), ("shop/web#2", Verdict::Fail, 1), ("shop/web#3", Verdict::Fail, 1)];
        let rows: [(&str, usize, &[GateStatus]); 5] = [
            ("", 3, &[Quarantined, Capped, Capped]),
            ("max_per_workload = 9", 3, &[Quarantined, Quarantined, Capped]),
            ("max_per_workload = 9\nleave = 0", 3, &[Quarantined, Quarantined, Quarantined]),
            ("", 1, &[Capped]),
            ("leave = 0", 1, &[Quarantined]),
        ];
        for (more, count, expected) in rows {
            let mut state = state(&three[..count]);
            let policy = policy(&format!("enforce = true\n{more}"));
            let decided = decide(&policy, &directive(), &state, &Sharers::new(), NOW);
            let got: Vec<GateStatus> = decided.changes.iter().map(|change| change.status).collect();
            assert_eq!(got, expected, "{more}");
            // And nothing more at the next look.
            let directive = carried_out(&mut state, directive(), &decided);
            let again = decide(&policy, &directive, &state, &Sharers::new(), NOW);
            assert_eq!((again.changes, again.quarantined), (vec![], decided.quarantined), "{more}");
        }
    }

    #[test]
    fn who_finds_no_room_is_told_as_such_and_pushes_nobody_out() {
        let all = policy("enforce = true\nleave = 0\nmax_per_workload = 9999");
        let names: Vec<String> = (0..MAX_QUARANTINED + 2).map(|n| format!("shop/web#{n:04}")).collect();
        let rows: Vec<_> = names.iter().map(|name| (name.as_str(), Verdict::Fail, 1)).collect();
        let mut state = state(&rows[1..]);
        let decided = decide(&all, &directive(), &state, &Sharers::new(), NOW);
        let of = |decided: &Decided, status| decided.changes.iter().filter(|change| change.status == status).count();
        let counts = (of(&decided, GateStatus::Quarantined), of(&decided, GateStatus::Capped));
        assert_eq!((decided.quarantined.len(), counts), (MAX_QUARANTINED, (MAX_QUARANTINED, 1)));
        let held = carried_out(&mut state, directive(), &decided);
        // One more, before all others by its name.
        state.agents.insert(id(&names[0]), agent(Verdict::Fail, 1));
        let again = decide(&all, &held, &state, &Sharers::new(), NOW);
        assert_eq!(again.quarantined, held.quarantined);
        assert_eq!(told(&again), [("0000", GateStatus::Capped)]);
        let held = carried_out(&mut state, held, &again);
        // A place that comes free is taken by the next look.
        state.agents.remove(&id(&names[1]));
        let freed = decide(&all, &held, &state, &Sharers::new(), NOW);
        assert_eq!(freed.quarantined.len(), MAX_QUARANTINED - 1);
        let held = held.with_quarantined(freed.quarantined);
        assert_eq!(told(&decide(&all, &held, &state, &Sharers::new(), NOW)), [("0000", GateStatus::Quarantined)]);
    }

    #[test]
    fn half_of_the_new_ones_are_tried_where_the_directive_is_full_and_in_the_end_none() {
        let all = policy("enforce = true\nleave = 0\nmax_per_workload = 9");
        let state = state(&[
            ("shop/web#1", Verdict::Fail, 1),
            ("shop/web#2", Verdict::Fail, 1),
            ("shop/web#3", Verdict::Fail, 1),
        ]);
        let first = decide(&all, &directive(), &state, &Sharers::new(), NOW);
        let mut held = first.clone();
        held.quarantined.truncate(1);
        let held = directive().with_quarantined(held.quarantined);
        let mut decided = decide(&all, &held, &state, &Sharers::new(), NOW);
        for left in [2, 1] {
            let free = Free::fewer(&decided, &held, "it is full".into()).unwrap();
            decided = super::decide(&all, &held, &state, &Sharers::new(), free, NOW);
            assert_eq!(decided.quarantined, first.quarantined[..left]);
            let capped = decided.changes.last().unwrap();
            assert_eq!((capped.status, capped.why.as_str()), (GateStatus::Capped, "privileged (it is full)"));
        }
        assert!(Free::fewer(&decided, &held, String::new()).is_none());
    }

    #[test]
    fn as_many_as_can_be_quarantined_fit_a_directive() {
        let workload = || id(&format!("{}/web#1", "n".repeat(150))).workload;
        let one = |n: usize| Quarantine {
            workload: workload(),
            instance: format!("{n:063}").parse().unwrap(),
            gate: "g".repeat(63),
            why: "w".repeat(MAX_WHY),
            at_us: NOW,
            keys: (0..3u8)
                .map(|key| Sha256([(n / 256) as u8, (n % 256) as u8, key].repeat(11)[..32].try_into().unwrap()))
                .collect(),
        };
        let full = directive().with_quarantined((0..MAX_QUARANTINED).map(one).collect());
        let size = serde_json::to_vec(&full).unwrap().len();
        assert!(full.deny.len() == 3 * MAX_QUARANTINED && size < 500 << 10, "{size} bytes");
    }

    #[test]
    fn who_was_quarantined_comes_back_when_it_has_passed_for_the_hold_and_unknown_is_no_pass() {
        let policy = policy("enforce = true\nleave = 0");
        let mut state = state(&[("shop/web#1", Verdict::Fail, 1)]);
        let decided = decide(&policy, &directive(), &state, &Sharers::new(), NOW);
        let held = carried_out(&mut state, directive(), &decided);
        let secs = NOW.as_secs();
        for (verdict, since, stays) in [
            (unknown(), 1, true),
            (Verdict::Pass, secs - 59, true),
            (Verdict::Fail, 1, true),
            (Verdict::Pass, secs - 60, false),
        ] {
            let gates = state.agents[&id("shop/web#1")].gates.clone();
            state.agents.insert(id("shop/web#1"), Agent { gates, ..agent(verdict.clone(), since) });
            let decided = decide(&policy, &held, &state, &Sharers::new(), NOW);
            assert_eq!(
                (decided.quarantined.len(), decided.changes.len()),
                (usize::from(stays), usize::from(!stays)),
                "{verdict:?}"
            );
        }
    }

    #[test]
    fn an_operators_release_a_dry_run_and_a_gate_that_is_gone_end_a_quarantine() {
        let enforced = policy("enforce = true\nleave = 0");
        let mut state = state(&[("shop/web#1", Verdict::Fail, 1)]);
        let decided = decide(&enforced, &directive(), &state, &Sharers::new(), NOW);
        let held = carried_out(&mut state, directive(), &decided);
        assert_eq!(held.quarantined.len(), 1);
        let agent = id("shop/web#1");
        let until_us = NOW.plus(Duration::from_secs(60));
        let release = Release { workload: agent.workload, instance: agent.instance, why: "x".into(), until_us };
        let released = Directive { released: vec![release], ..held.clone() };
        for (policy, directive, now, status) in [
            (&enforced, &released, NOW, Some(GateStatus::Clear)),
            (&enforced, &released, until_us, None),
            (&policy(""), &held, NOW, Some(GateStatus::DryRun)),
            (&Policy::default(), &held, NOW, Some(GateStatus::Clear)),
        ] {
            let decided = decide(policy, directive, &state, &Sharers::new(), now);
            assert_eq!(decided.changes.first().map(|change| change.status), status);
            assert_eq!(decided.quarantined.is_empty(), status.is_some());
        }
    }

    #[test]
    fn who_is_quarantined_and_not_in_the_state_stays_so_until_its_certificates_end_or_somebody_says_otherwise() {
        let enforced = policy("enforce = true\nleave = 0");
        let decided =
            decide(&enforced, &directive(), &state(&[("shop/web#1", Verdict::Fail, 1)]), &Sharers::new(), NOW);
        let mut written = directive().with_quarantined(decided.quarantined);
        written.quarantined[0].keys = vec![Sha256([1; 32])];
        let ended = Quarantine { keys: Vec::new(), ..written.quarantined[0].clone() };
        let (workload, instance) = (ended.workload.clone(), ended.instance.clone());
        let release = Release { workload, instance, why: "x".into(), until_us: NOW.plus(Duration::from_secs(60)) };
        for (policy, directive, stays) in [
            (&enforced, written.clone(), true),
            (&enforced, written.clone().with_quarantined(vec![ended]), false),
            (&enforced, Directive { released: vec![release], ..written.clone() }, false),
            (&policy(""), written.clone(), false),
            (&Policy::default(), written.clone(), false),
        ] {
            let decided = decide(policy, &directive, &State::default(), &Sharers::new(), NOW);
            assert_eq!((decided.quarantined == directive.quarantined, decided.changes.len()), (stays, 0));
        }
        // It takes room all the same: another one that breaks the gate runs on.
        let other = state(&[("shop/web#2", Verdict::Fail, 1), ("shop/web#3", Verdict::Pass, 1)]);
        assert_eq!(told(&decide(&enforced, &written, &other, &Sharers::new(), NOW)), [("2", GateStatus::Capped)]);
        // It comes back, and what is known of it counts again.
        let passes = state(&[("shop/web#1", Verdict::Pass, NOW.as_secs() - 60)]);
        assert!(decide(&enforced, &written, &passes, &Sharers::new(), NOW).quarantined.is_empty());
        assert_eq!(
            decide(&enforced, &written, &state(&[("shop/web#1", unknown(), 1)]), &Sharers::new(), NOW)
                .quarantined
                .len(),
            1
        );
    }

    #[test]
    fn where_the_event_is_forgotten_the_hold_counts_from_the_quarantine() {
        let text = "[[gate]]\nname = 'g'\nevents = ['exec']\nhold = '60s'\nenforce = true\nleave = 0\n";
        let policy = Policy::parse(text).unwrap();
        let AgentId { workload, instance } = id("shop/web#1");
        let (gate, why, keys) = ("g".to_owned(), "exec".to_owned(), vec![Sha256([1; 32])]);
        let held = directive().with_quarantined(vec![Quarantine { workload, instance, gate, why, at_us: NOW, keys }]);
        let back = state(&[("shop/web#1", Verdict::Pass, 1)]);
        let left_at = |secs| {
            decide(&policy, &held, &back, &Sharers::new(), NOW.plus(Duration::from_secs(secs))).quarantined.len()
        };
        assert_eq!((left_at(59), left_at(60)), (1, 0));
    }

    #[test]
    fn a_crash_between_the_directive_and_the_event_is_made_good() {
        let policy = policy("enforce = true\nleave = 0");
        let state = state(&[("shop/web#1", Verdict::Fail, 1)]);
        let decided = decide(&policy, &directive(), &state, &Sharers::new(), NOW);
        let mut written = directive().with_quarantined(decided.quarantined.clone());
        written.quarantined[0].keys = vec![Sha256([1; 32])];
        let again = decide(&policy, &written, &state, &Sharers::new(), NOW);
        assert_eq!(told(&again), [("1", GateStatus::Quarantined)]);
        assert_eq!(again.quarantined, written.quarantined);
    }
}
