//! What the API says of workloads, agents and posture: the state, in the form that clients read. Pure.

use std::collections::BTreeMap;

use serde::Serialize;
use sidewarden_proto::event::{ContainerRef, Direction, Severity, TrustChanged};
use sidewarden_proto::finding::{Vantage, Verdict};
use sidewarden_proto::guards;
use sidewarden_proto::identity::AgentId;
use sidewarden_proto::time::Timestamp;

use crate::alert::{Alert, Status as AlertStatus};
use crate::evidence;
use crate::posture::{Merged, Neighbours, merged, of_container};
use crate::state::{Agent, Certificate, Counted, Hosted, PeerSeen, Session, State, Status};

/// How many checks have which verdict.
pub type Counts = BTreeMap<&'static str, usize>;

/// One instance of a workload, and its agent.
#[derive(Debug, Serialize)]
pub struct AgentView {
    /// The workload's SPIFFE ID.
    pub workload: String,
    /// The instance.
    pub instance: String,
    /// `sidecar` or `exec`; empty until the agent said so.
    pub mode: &'static str,
    /// What it can see; null until it said so.
    pub vantage: Option<Vantage>,
    /// Its version.
    pub version: String,
    /// `live`, `away`, `silent`, `stopped`, `known` or `gone`.
    pub status: Status,
    /// Its session with the collector.
    pub session: Session,
    /// When an event of its own was last taken; null if never.
    pub last_event_us: Option<Timestamp>,
    /// When it started; null until it said so.
    pub started_us: Option<Timestamp>,
    /// Checks by verdict.
    pub posture: Counts,
    /// Its certificate.
    pub certificate: Option<Certificate>,
    /// Why its last renewal failed.
    pub renewal_failed: Option<String>,
    /// Whose roots it holds, if it has said so.
    pub trust: Option<TrustChanged>,
    /// Refused connections by reason.
    pub refused: BTreeMap<&'static str, Counted>,
    /// Lost events by reason.
    pub lost: BTreeMap<String, Counted>,
    /// Events by severity.
    pub events: BTreeMap<&'static str, u64>,
    /// Whom it talks to.
    pub peers: Vec<PeerView>,
    /// Peers that found no room in that list.
    pub peers_beyond: u64,
}

/// One peer of a workload.
#[derive(Debug, Serialize)]
pub struct PeerView {
    /// `inbound`, `outbound` or `egress`.
    pub direction: Direction,
    /// Its verified identity.
    pub peer: String,
    /// When, and how much.
    #[serde(flatten)]
    pub seen: PeerSeen,
}

/// A workload: all its instances together.
#[derive(Debug, Serialize)]
pub struct WorkloadView {
    /// Its SPIFFE ID.
    pub workload: String,
    /// Its short name: `shop/orders`.
    pub name: String,
    /// The state of the worst of its instances.
    pub status: Status,
    /// Checks by verdict, over all instances.
    pub posture: Counts,
    /// Firing alerts by severity.
    pub alerts: BTreeMap<&'static str, usize>,
    /// Its instances.
    pub instances: Vec<AgentView>,
}

/// The posture of one instance.
#[derive(Debug, Serialize)]
pub struct PostureView {
    /// The workload's SPIFFE ID.
    pub workload: String,
    /// The instance.
    pub instance: String,
    /// Its presence: the posture of one that is not live is as old as `last_event_us`.
    pub status: Status,
    /// When an event of its own was last taken.
    pub last_event_us: Option<Timestamp>,
    /// Checks by verdict.
    pub counts: Counts,
    /// Every check, worst first.
    pub findings: Vec<Merged>,
    /// For a node agent: the containers of its host.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub containers: Vec<ContainerView>,
}

/// What a node agent says of a container of its host.
#[derive(Debug, Serialize)]
pub struct ContainerView {
    /// Which one.
    #[serde(flatten)]
    pub container: ContainerRef,
    /// Checks by verdict.
    pub counts: Counts,
    /// Every check, worst first.
    pub findings: Vec<Merged>,
}

/// Every agent, by workload and instance.
pub fn agents(state: &State, evidence: &evidence::Config, now: Timestamp) -> Vec<AgentView> {
    let neighbours = Neighbours::of(state, evidence);
    state.agents.iter().map(|(id, agent)| agent_view(state, &neighbours, id, agent, now)).collect()
}

/// Every workload, those with something wrong first.
pub fn workloads(state: &State, evidence: &evidence::Config, alerts: &[Alert], now: Timestamp) -> Vec<WorkloadView> {
    let neighbours = Neighbours::of(state, evidence);
    let mut workloads: BTreeMap<String, WorkloadView> = BTreeMap::new();
    for (id, agent) in &state.agents {
        let view = agent_view(state, &neighbours, id, agent, now);
        let workload = workloads.entry(view.workload.clone()).or_insert_with(|| WorkloadView {
            workload: view.workload.clone(),
            name: id.workload.path().to_owned(),
            status: view.status,
            posture: Counts::new(),
            alerts: firing(alerts, &view.workload),
            instances: Vec::new(),
        });
        if matters(view.status) > matters(workload.status) {
            workload.status = view.status;
        }
        // An instance that ended does not make the workload better or worse any more.
        if !matches!(view.status, Status::Gone | Status::Stopped) {
            view.posture.iter().for_each(|(word, count)| *workload.posture.entry(word).or_default() += count);
        }
        workload.instances.push(view);
    }
    let mut workloads: Vec<WorkloadView> = workloads.into_values().collect();
    workloads.sort_by_key(|w| std::cmp::Reverse(trouble(w)));
    workloads
}

/// The posture of every instance of `workload`, or of one.
pub fn posture(
    state: &State,
    evidence: &evidence::Config,
    workload: &str,
    instance: Option<&str>,
    now: Timestamp,
) -> Vec<PostureView> {
    let wanted =
        |id: &&AgentId| id.workload.as_str() == workload && instance.is_none_or(|name| id.instance.as_str() == name);
    let of = |id: &AgentId| (id.clone(), &state.agents[id]);
    let neighbours = Neighbours::of(state, evidence);
    let views = state.agents.keys().filter(wanted).map(of).map(|(id, agent)| {
        let findings = merged(state, &neighbours, &id, now);
        let shown = agent.hosted.values().map(|hosted| container_view(state, &neighbours, &id, agent, hosted, now));
        let containers = shown.collect();
        PostureView {
            workload: id.workload.to_string(),
            instance: id.instance.to_string(),
            status: state.status(agent, now),
            last_event_us: told(agent.last_event),
            counts: counts(&findings),
            findings: worst_first(findings),
            containers,
        }
    });
    views.collect()
}

/// What the rules guard against that these are judged by, by check: said once, however many they are.
pub fn guards_against(instances: &[PostureView]) -> BTreeMap<&str, &'static str> {
    let hosted = instances.iter().flat_map(|instance| &instance.containers).flat_map(|container| &container.findings);
    let all = instances.iter().flat_map(|instance| &instance.findings).chain(hosted);
    all.filter_map(|merged| Some((merged.finding.check.as_str(), guards::guards_against(&merged.finding.check)?)))
        .collect()
}

/// How many agents have which status; every status is there.
pub fn presence(state: &State, now: Timestamp) -> BTreeMap<&'static str, usize> {
    let mut counts: BTreeMap<_, _> = Status::ALL.iter().map(|status| (status.word(), 0)).collect();
    for agent in state.agents.values() {
        *counts.entry(state.status(agent, now).word()).or_default() += 1;
    }
    counts
}

fn agent_view(state: &State, neighbours: &Neighbours<'_>, id: &AgentId, agent: &Agent, now: Timestamp) -> AgentView {
    let status = state.status(agent, now);
    AgentView {
        workload: id.workload.to_string(),
        instance: id.instance.to_string(),
        mode: agent.mode.map_or("", |mode| mode.word()),
        vantage: agent.vantage,
        version: agent.version.clone(),
        status,
        session: agent.session.clone(),
        last_event_us: told(agent.last_event),
        started_us: agent.started.map(|started| started.at),
        posture: counts(&merged(state, neighbours, id, now)),
        certificate: agent.certificate.clone(),
        renewal_failed: agent.renewal_failed.clone(),
        trust: agent.trust.clone(),
        refused: agent.refused.iter().map(|(reason, counted)| (reason.word(), *counted)).collect(),
        lost: agent.lost.clone(),
        events: Severity::ALL.iter().map(|s| (s.word(), agent.events[s.rank()])).collect(),
        peers: agent
            .peers
            .iter()
            .map(|((direction, peer), seen)| PeerView { direction: *direction, peer: peer.clone(), seen: seen.clone() })
            .collect(),
        peers_beyond: agent.peers_beyond,
    }
}

fn container_view(
    state: &State,
    neighbours: &Neighbours<'_>,
    id: &AgentId,
    node: &Agent,
    hosted: &Hosted,
    now: Timestamp,
) -> ContainerView {
    let findings = of_container(state, neighbours, id, node, hosted, now);
    ContainerView { container: hosted.container.clone(), counts: counts(&findings), findings: worst_first(findings) }
}

/// How many have which verdict; every word is there.
pub fn counts(findings: &[Merged]) -> Counts {
    let mut counts: Counts = Verdict::WORDS.iter().map(|word| (*word, 0)).collect();
    for merged in findings {
        *counts.entry(merged.finding.verdict.word()).or_default() += 1;
    }
    counts
}

/// Worst first: what fails by severity, then what is unknown, then the rest in the order of the benchmark.
pub(crate) fn worst_first(mut views: Vec<Merged>) -> Vec<Merged> {
    let rank = |verdict: &Verdict| Verdict::WORDS.iter().position(|word| *word == verdict.word());
    views.sort_by_cached_key(|view| {
        let finding = &view.finding;
        let failing = finding.verdict == Verdict::Fail;
        let severity = if failing { std::cmp::Reverse(finding.severity) } else { std::cmp::Reverse(Severity::Info) };
        (rank(&finding.verdict), severity, numbers(&finding.ids.v1_3_1), finding.check.clone())
    });
    views
}

/// `5.10` comes after `5.9`.
pub(crate) fn numbers(id: &str) -> Vec<u32> {
    id.split('.').map(|part| part.parse().unwrap_or(u32::MAX)).collect()
}

fn firing(alerts: &[Alert], workload: &str) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    let about = |alert: &&Alert| alert.subject.as_ref().is_some_and(|s| s.workload == workload);
    for alert in alerts.iter().filter(|alert| alert.status == AlertStatus::Firing).filter(about) {
        *counts.entry(alert.severity.word()).or_default() += 1;
    }
    counts
}

/// What a reader should look at first has the highest number.
fn trouble(workload: &WorkloadView) -> (usize, usize, u8, usize, usize) {
    let alerts = |word| workload.alerts.get(word).copied().unwrap_or_default();
    let checks = |word| workload.posture.get(word).copied().unwrap_or_default();
    (alerts("critical"), alerts("warning"), matters(workload.status), checks("fail"), checks("unknown"))
}

fn matters(status: Status) -> u8 {
    match status {
        Status::Silent => 5,
        Status::Away => 4,
        Status::Live => 3,
        Status::Known => 2,
        Status::Stopped => 1,
        Status::Gone => 0,
    }
}

fn told(at: Timestamp) -> Option<Timestamp> {
    (at != Timestamp::default()).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Standing;
    use sidewarden_proto::finding::{CisIds, Finding, Remedy};

    fn finding(check: &str, id: &str, severity: Severity, verdict: Verdict) -> (String, Standing) {
        let finding = Finding {
            check: check.into(),
            ids: CisIds { v1_3_1: id.into(), v1_6: String::new() },
            title: "t".into(),
            severity,
            verdict,
            evidence: Vec::new(),
            remedy: Remedy::default(),
            vantage: Vantage::Open,
        };
        (check.into(), Standing { finding, since: Timestamp(1) })
    }

    fn evidence() -> evidence::Config {
        crate::config::Config::default().evidence
    }

    fn state() -> State {
        let mut state = State::default();
        let unknown = Verdict::Unknown { grant: "x".into() };
        let agent = Agent {
            session: Session::Live { since: Timestamp(0), source: String::new(), transport: "quic".into() },
            findings: BTreeMap::from([
                finding("a", "5.10", Severity::Warning, Verdict::Pass),
                finding("b", "5.9", Severity::Warning, Verdict::Pass),
                finding("c", "5.1", Severity::Notice, unknown),
                finding("d", "5.2", Severity::Warning, Verdict::Fail),
                finding("e", "5.31", Severity::Critical, Verdict::Fail),
            ]),
            ..Agent::default()
        };
        let gone =
            Agent { session: Session::Ended { at: Timestamp(0), reason: "bye".into(), clean: true }, ..agent.clone() };
        state.agents.insert("spiffe://x.test/shop/db#db-1".parse().unwrap(), Agent::default());
        state.agents.insert("spiffe://x.test/shop/web#web-1".parse().unwrap(), agent);
        state.agents.insert("spiffe://x.test/shop/web#web-0".parse().unwrap(), gone);
        state
    }

    #[test]
    fn findings_come_worst_first_and_in_the_order_of_the_benchmark() {
        let views = posture(&state(), &evidence(), "spiffe://x.test/shop/web", Some("web-1"), Timestamp(0));
        let checks: Vec<&str> = views[0].findings.iter().map(|view| view.finding.check.as_str()).collect();
        assert_eq!(checks, ["e", "d", "c", "b", "a"]);
    }

    #[test]
    fn a_workload_counts_its_living_instances_and_the_troubled_come_first() {
        let views = workloads(&state(), &evidence(), &[], Timestamp(0));
        let names: Vec<&str> = views.iter().map(|view| view.name.as_str()).collect();
        assert_eq!(names, ["shop/web", "shop/db"]);
        assert_eq!((views[0].posture["fail"], views[0].posture["unknown"], views[0].posture["pass"]), (2, 1, 2));
        assert_eq!(views[0].instances.len(), 2);
        assert_eq!(views[0].status, Status::Live);
    }

    #[test]
    fn a_workload_that_is_not_there_has_no_posture() {
        assert!(posture(&state(), &evidence(), "spiffe://x.test/shop/none", None, Timestamp(0)).is_empty());
        assert!(posture(&state(), &evidence(), "spiffe://x.test/shop/web", Some("none"), Timestamp(0)).is_empty());
        assert_eq!(posture(&state(), &evidence(), "spiffe://x.test/shop/web", None, Timestamp(0)).len(), 2);
    }

    #[test]
    fn every_presence_is_counted() {
        let counts = presence(&state(), Timestamp(0));
        assert_eq!((counts["live"], counts["known"], counts["stopped"], counts["silent"]), (1, 1, 1, 0));
    }
}
