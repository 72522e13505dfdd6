//! What people answer for, applied to what agents say. Pure.
//!
//! A waiver makes a failure a waived one until its end, and says so in the evidence before and after; it changes nothing
//! else, and never makes anything pass.

use std::collections::BTreeMap;

use sidewarden_proto::event::ContainerRef;
use sidewarden_proto::evidence::Pledge;
use sidewarden_proto::finding::{Evidence, Finding, Verdict};
use sidewarden_proto::identity::AgentId;
use sidewarden_proto::time::Timestamp;

use super::Neighbours;
use crate::evidence::attest::{Attestor, REFERENCES};
use crate::state::{Agent, Standing, State};

/// By which names a finding is spoken of: paths of workloads, and the name of a container where a node agent tells of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Names<'a>(Vec<(&'a str, Option<&'a str>)>);

impl<'a> Names<'a> {
    /// An instance of a workload, or a host's node agent itself.
    pub fn of_instance(id: &'a AgentId) -> Names<'a> {
        Names(vec![(id.workload.path(), None)])
    }

    /// A container of a host: as its node agent tells of it, and as the workload whose agent is beside it.
    pub fn of_container(
        neighbours: &Neighbours<'a>,
        id: &'a AgentId,
        node: &Agent,
        container: &'a ContainerRef,
    ) -> Names<'a> {
        let beside = neighbours.beside(&node.host, &container.id).iter().map(|id| (id.workload.path(), None));
        Names(std::iter::once((id.workload.path(), Some(container.name.as_str()))).chain(beside).collect())
    }

    /// Whether `pledge` is about a check of theirs.
    pub fn are_meant_by(&self, pledge: &Pledge, check: &str) -> bool {
        self.0.iter().any(|(workload, container)| pledge.is_about(check, workload, *container))
    }
}

/// The pledge about a check of these names that ends last.
pub fn about<'a>(pledges: &'a [Pledge], names: &Names<'_>, check: &str) -> Option<&'a Pledge> {
    pledges.iter().filter(|pledge| names.are_meant_by(pledge, check)).max_by_key(|pledge| pledge.until_us)
}

/// Makes a failure that somebody answers for a waived one. What an agent waived by its own configuration and cannot take
/// back, because it is away, ends here.
pub fn waive(waivers: &[Pledge], names: &Names<'_>, finding: &mut Finding, now: Timestamp) {
    if let Verdict::Waived { by, until, .. } = &finding.verdict
        && *until <= now
    {
        let line = format!("no longer waived: the waiver by {by} ended {until}");
        finding.evidence.insert(0, Evidence::new("waiver", line));
        finding.verdict = Verdict::Fail;
    }
    if finding.verdict != Verdict::Fail {
        return;
    }
    let Some(Pledge { by, why, until_us: until, .. }) = about(waivers, names, &finding.check) else { return };
    let holds = now < *until;
    let line = match holds {
        true => format!("waived by {by} until {until}: {why}"),
        false => format!("no longer waived: the waiver by {by} ended {until} ({why})"),
    };
    finding.evidence.insert(0, Evidence::new("waiver", line));
    if holds {
        finding.verdict = Verdict::Waived { by: by.clone(), why: why.clone(), until: *until };
    }
}

/// Has what is attested pass where only people can see it, until the end that was signed, and while the key that signed it
/// is one of the `attestors`.
pub fn attest(
    attestations: &[Pledge],
    attestors: &[Attestor],
    names: &Names<'_>,
    finding: &mut Finding,
    now: Timestamp,
) {
    let is_unknown = matches!(finding.verdict, Verdict::Unknown { .. });
    if !is_unknown || !REFERENCES.contains(&finding.ids.v1_3_1.as_str()) {
        return;
    }
    let Some(Pledge { by, why, key, until_us: until, .. }) = about(attestations, names, &finding.check) else { return };
    let is_trusted = attestors.iter().any(|attestor| attestor.name == *key);
    let line = match now < *until {
        _ if !is_trusted => {
            format!("no longer attested: the key {key}, by which {by} signed, is in no [[evidence.attestor]]")
        }
        true => format!("attested by {by}, signed by the key {key}, until {until}: {why}"),
        false => format!("no longer attested: that of {by} ended {until} ({why})"),
    };
    finding.evidence.insert(0, Evidence::new("attestation", line));
    if is_trusted && now < *until {
        finding.verdict = Verdict::Pass;
    }
}

/// How many failures each of `waivers` covers now, or would if it had not ended.
pub fn covered(state: &State, neighbours: &Neighbours<'_>, waivers: &[Pledge]) -> Vec<usize> {
    let mut covers = vec![0; waivers.len()];
    let mut count = |names: &Names<'_>, findings: &BTreeMap<String, Standing>| {
        for (check, _) in findings.iter().filter(|(_, standing)| standing.finding.verdict == Verdict::Fail) {
            let meant = waivers.iter().zip(&mut covers).filter(|(waiver, _)| names.are_meant_by(waiver, check));
            meant.for_each(|(_, count)| *count += 1);
        }
    };
    for (id, agent) in &state.agents {
        count(&Names::of_instance(id), &agent.findings);
        for hosted in agent.hosted.values() {
            count(&Names::of_container(neighbours, id, agent, &hosted.container), &hosted.findings);
        }
    }
    covers
}

#[cfg(test)]
mod tests {
    use sidewarden_proto::event::Severity;
    use sidewarden_proto::finding::{CisIds, Remedy, Vantage};

    use super::*;

    fn pledge(workload: &str, container: Option<&str>, until: i64) -> Pledge {
        Pledge {
            check: "user".into(),
            workload: workload.into(),
            container: container.map(str::to_owned),
            by: "ops".into(),
            why: "vendor".into(),
            at_us: Timestamp(0),
            until_us: Timestamp(until),
            source: String::new(),
            key: "security".into(),
        }
    }

    fn finding(verdict: Verdict) -> Finding {
        Finding {
            check: "user".into(),
            ids: CisIds::default(),
            title: String::new(),
            severity: Severity::Warning,
            verdict,
            evidence: vec![Evidence::new("status", "Uid: 0")],
            remedy: Remedy::default(),
            vantage: Vantage::Open,
        }
    }

    fn id(text: &str) -> AgentId {
        text.parse().unwrap()
    }

    #[test]
    fn a_failure_is_waived_until_the_end_and_is_one_again_after_it() {
        let id = id("spiffe://x/shop/web#1");
        let names = Names::of_instance(&id);
        for (now, word, line) in [(8, "waived", "waived by ops until"), (9, "fail", "no longer waived")] {
            let mut finding = finding(Verdict::Fail);
            waive(&[pledge("shop/*", None, 9)], &names, &mut finding, Timestamp(now));
            assert_eq!(finding.verdict.word(), word);
            assert!(finding.evidence[0].line.starts_with(line), "{:?}", finding.evidence);
            assert_eq!(finding.evidence[1].line, "Uid: 0", "what was seen stays");
        }
    }

    #[test]
    fn what_an_agent_waived_itself_is_a_failure_after_its_end_though_the_agent_is_away() {
        let id = id("spiffe://x/shop/web#1");
        let own = || Verdict::Waived { by: "the agent".into(), why: "x".into(), until: Timestamp(9) };
        for (now, waivers, word) in
            [(8, vec![], "waived"), (9, vec![], "fail"), (9, vec![pledge("shop/web", None, 20)], "waived")]
        {
            let mut waived = finding(own());
            waive(&waivers, &Names::of_instance(&id), &mut waived, Timestamp(now));
            assert_eq!(waived.verdict.word(), word, "at {now} with {}", waivers.len());
        }
    }

    #[test]
    fn nothing_but_a_failure_is_waived_and_nothing_ever_passes_by_it() {
        let id = id("spiffe://x/shop/web#1");
        for verdict in
            [Verdict::Pass, Verdict::Unknown { grant: "x".into() }, Verdict::NotApplicable { why: "x".into() }]
        {
            let mut waived = finding(verdict.clone());
            waive(&[pledge("*", None, 9)], &Names::of_instance(&id), &mut waived, Timestamp(1));
            assert_eq!(waived, finding(verdict));
        }
    }

    #[test]
    fn what_only_people_can_see_passes_while_it_is_attested_and_nothing_else_does() {
        let id = id("spiffe://x/shop/web#1");
        let unknown = || Verdict::Unknown { grant: "x".into() };
        let rows = [
            ("4.11", unknown(), 8, "security", "pass"),
            ("4.11", unknown(), 9, "security", "unknown"),
            ("4.11", unknown(), 8, "another", "unknown"),
            ("4.11", Verdict::Fail, 8, "security", "fail"),
            ("5.31", unknown(), 8, "security", "unknown"),
        ];
        for (reference, verdict, now, trusted, expected) in rows {
            let attestors = [Attestor { name: trusted.into(), key_file: "key.pem".into() }];
            let mut attested = finding(verdict);
            attested.ids.v1_3_1 = reference.into();
            let names = Names::of_instance(&id);
            attest(&[pledge("shop/*", None, 9)], &attestors, &names, &mut attested, Timestamp(now));
            assert_eq!(attested.verdict.word(), expected, "{reference} at {now} where {trusted} is trusted");
        }
    }

    #[test]
    fn the_waiver_that_ends_last_counts() {
        let id = id("spiffe://x/shop/web#1");
        let mut waived = finding(Verdict::Fail);
        let all = [pledge("*", None, 5), pledge("shop/web", None, 20), pledge("shop/*", None, 9)];
        waive(&all, &Names::of_instance(&id), &mut waived, Timestamp(10));
        assert_eq!(waived.verdict, Verdict::Waived { by: "ops".into(), why: "vendor".into(), until: Timestamp(20) });
    }

    #[test]
    fn a_container_answers_to_its_node_agents_name_and_to_the_workload_beside_it() {
        let mut state = State::default();
        let node = Agent { host: "h".into(), ..Agent::default() };
        let (sidecar, other) = (
            Agent { host: "h".into(), containers: vec!["c1".into()], ..Agent::default() },
            Agent { host: "h2".into(), containers: vec!["c1".into()], ..Agent::default() },
        );
        let host = id("spiffe://x/hosts/a#h");
        state.agents.insert(host.clone(), node.clone());
        state.agents.insert(id("spiffe://x/shop/web#1"), sidecar);
        state.agents.insert(id("spiffe://x/shop/db#1"), other);
        let container = ContainerRef { id: "c1".into(), name: "web-1".into(), ..ContainerRef::default() };
        let evidence = crate::config::Config::default().evidence;
        let neighbours = Neighbours::of(&state, &evidence);
        let names = Names::of_container(&neighbours, &host, &node, &container);
        for (workload, pattern, expected) in [
            ("hosts/a", Some("web-*"), true),
            ("shop/web", None, true),
            ("shop/db", None, false),
            ("hosts/a", None, false),
            ("hosts/a", Some("db-*"), false),
        ] {
            let found = about(&[pledge(workload, pattern, 9)], &names, "user").is_some();
            assert_eq!(found, expected, "{workload} {pattern:?}");
        }
    }
}
