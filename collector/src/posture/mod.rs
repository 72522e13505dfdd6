//! One posture from several vantages: what an agent beside a workload sees, and what the node agent of its host sees of the
//! same containers. Pure.
//!
//! The vantage with more authority has the word; an answer counts more than no answer; all are kept, and where two answers
//! differ that is shown. A node agent's word counts only for containers of its own host: the agent beside the workload has
//! told the same host and the container's id. Where two node agents tell of one container, neither has the word.
//! What people answer for comes last (`pledges`): it changes what counts, not what the agents said.

pub mod past;
pub mod pledges;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use serde::Serialize;
use sidewarden_proto::event::{ContainerRef, Mode};
use sidewarden_proto::finding::{Finding, Vantage, Verdict};
use sidewarden_proto::identity::AgentId;
use sidewarden_proto::time::Timestamp;

use self::pledges::Names;
use crate::evidence;
use crate::state::{Agent, Hosted, Session, Standing, State};

/// One check's answer, and whose it is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Merged {
    /// The answer that counts.
    #[serde(flatten)]
    pub finding: Finding,
    /// Since when its verdict holds.
    pub since_us: Timestamp,
    /// Every answer, where there is more than one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<Source>,
    /// Two of them say pass and fail.
    pub disagree: bool,
}

/// One answer of several.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Source {
    /// Who gave it.
    pub agent: String,
    /// From where.
    pub vantage: Vantage,
    /// The word of the verdict.
    pub verdict: &'static str,
    /// The first line of its evidence.
    pub evidence: String,
    /// It has no say: two node agents tell of the container.
    pub disputed: bool,
}

/// An answer before it is merged.
struct Answer<'a> {
    agent: &'a AgentId,
    finding: Cow<'a, Finding>,
    since: Timestamp,
    disputed: bool,
}

impl<'a> Answer<'a> {
    fn new(agent: &'a AgentId, standing: &'a Standing, disputed: bool) -> Answer<'a> {
        Answer { agent, finding: Cow::Borrowed(&standing.finding), since: standing.since, disputed }
    }
}

/// Has the newest scan of a container's image answer for it.
pub fn scanned(
    state: &State,
    neighbours: &Neighbours<'_>,
    container: &ContainerRef,
    finding: &mut Cow<'_, Finding>,
    now: Timestamp,
) {
    if finding.check == evidence::CHECK
        && let Some(scan) = evidence::scan_of(&state.scans, container)
    {
        evidence::answer(neighbours.evidence, scan, finding.to_mut(), now);
    }
}

/// Who tells of the same host and the same containers, looked up once for many questions.
#[derive(Debug)]
pub struct Neighbours<'a> {
    /// Node agents that are connected, by host.
    nodes: HashMap<&'a str, Vec<(&'a AgentId, &'a Agent)>>,
    /// Agents that stand beside a container, by host and container.
    beside: HashMap<&'a str, HashMap<&'a str, Vec<&'a AgentId>>>,
    /// What evidence must be like.
    evidence: &'a evidence::Config,
}

impl<'a> Neighbours<'a> {
    /// Those of `state`.
    pub fn of(state: &'a State, evidence: &'a evidence::Config) -> Neighbours<'a> {
        let (mut nodes, mut beside): (HashMap<_, Vec<_>>, HashMap<_, HashMap<_, Vec<_>>>) = Default::default();
        for (id, agent) in state.agents.iter().filter(|(_, agent)| !agent.host.is_empty()) {
            let host = agent.host.as_str();
            if agent.mode == Some(Mode::Node) {
                let is_live = matches!(agent.session, Session::Live { .. });
                nodes.entry(host).or_default().extend(is_live.then_some((id, agent)));
            }
            for container in &agent.containers {
                beside.entry(host).or_default().entry(container.as_str()).or_default().push(id);
            }
        }
        Neighbours { nodes, beside, evidence }
    }

    /// The agents that stand beside a container of a host.
    pub fn beside(&self, host: &str, container: &str) -> &[&'a AgentId] {
        self.beside.get(host).and_then(|there| there.get(container)).map_or(&[], Vec::as_slice)
    }

    /// The node agents that see the containers of `agent` now, and what they see; whether another one does so, too.
    fn hosts(&self, agent: &Agent) -> Vec<(&'a AgentId, &'a Agent, &'a Hosted, bool)> {
        let Some(nodes) = self.nodes.get(agent.host.as_str()) else { return Vec::new() };
        let mut found = Vec::new();
        for container in &agent.containers {
            let seen: Vec<_> =
                nodes.iter().filter_map(|(id, node)| Some((*id, *node, node.hosted.get(container)?))).collect();
            let disputed = seen.len() > 1;
            found.extend(seen.into_iter().map(|(id, node, hosted)| (id, node, hosted, disputed)));
        }
        found
    }
}

/// The posture of the instance `id` at `now`, by check.
pub fn merged(state: &State, neighbours: &Neighbours<'_>, id: &AgentId, now: Timestamp) -> Vec<Merged> {
    let Some(agent) = state.agents.get(id) else { return Vec::new() };
    let mut answers: BTreeMap<&str, Vec<Answer<'_>>> = BTreeMap::new();
    for (check, standing) in &agent.findings {
        answers.entry(check).or_default().push(Answer::new(id, standing, false));
    }
    for (node, told, hosted, disputed) in neighbours.hosts(agent) {
        // What it says of its host's swarm is true of everything there.
        let of_swarm = told.findings.iter().filter(|(_, s)| s.finding.ids.v1_3_1.starts_with("7."));
        for (check, standing) in hosted.findings.iter().chain(of_swarm) {
            let mut answer = Answer::new(node, standing, disputed);
            scanned(state, neighbours, &hosted.container, &mut answer.finding, now);
            answers.entry(check).or_default().push(answer);
        }
    }
    let mut merged: Vec<Merged> = answers.into_values().filter_map(|all| merge(&all)).collect();
    answered_for(state, neighbours, &Names::of_instance(id), &mut merged, now);
    merged
}

/// The posture at `now` of a container that the node agent `id` tells of, by check.
pub fn of_container(
    state: &State,
    neighbours: &Neighbours<'_>,
    id: &AgentId,
    node: &Agent,
    hosted: &Hosted,
    now: Timestamp,
) -> Vec<Merged> {
    let alone = |standing: &Standing| {
        let mut finding = Cow::Borrowed(&standing.finding);
        scanned(state, neighbours, &hosted.container, &mut finding, now);
        Merged { finding: finding.into_owned(), since_us: standing.since, sources: Vec::new(), disagree: false }
    };
    let mut all: Vec<Merged> = hosted.findings.values().map(alone).collect();
    answered_for(state, neighbours, &Names::of_container(neighbours, id, node, &hosted.container), &mut all, now);
    all
}

fn answered_for(state: &State, neighbours: &Neighbours<'_>, names: &Names<'_>, all: &mut [Merged], now: Timestamp) {
    let attestors = &neighbours.evidence.attestors;
    for merged in all {
        pledges::attest(&state.attestations, attestors, names, &mut merged.finding, now);
        pledges::waive(&state.waivers, names, &mut merged.finding, now);
    }
}

fn merge(answers: &[Answer<'_>]) -> Option<Merged> {
    let best = answers.iter().filter(|a| !a.disputed).max_by_key(|a| weight(&a.finding))?;
    let word = |a: &Answer<'_>| a.finding.verdict.word();
    let kept = answers.iter().any(|a| word(a) == "pass");
    let broken = answers.iter().any(|a| matches!(word(a), "fail" | "waived"));
    Some(Merged {
        finding: best.finding.clone().into_owned(),
        since_us: best.since,
        sources: if answers.len() > 1 { answers.iter().map(source).collect() } else { Vec::new() },
        disagree: kept && broken,
    })
}

/// An answer before none; then the vantage; then, among several containers of one instance, the worse.
fn weight(finding: &Finding) -> (bool, u8, u8) {
    let authority = match finding.vantage {
        Vantage::Open => 0,
        Vantage::SameUser => 1,
        Vantage::Ptrace => 2,
        Vantage::Node => 3,
    };
    let worse = match finding.verdict {
        Verdict::Fail => 3,
        Verdict::Waived { .. } => 2,
        Verdict::Pass => 1,
        Verdict::NotApplicable { .. } | Verdict::Unknown { .. } => 0,
    };
    (!matches!(finding.verdict, Verdict::Unknown { .. }), authority, worse)
}

fn source(answer: &Answer<'_>) -> Source {
    let finding = &answer.finding;
    let evidence = finding.evidence.first().map(|e| format!("{}: {}", e.source, e.line)).unwrap_or_default();
    Source {
        agent: answer.agent.to_string(),
        vantage: finding.vantage,
        verdict: finding.verdict.word(),
        evidence,
        disputed: answer.disputed,
    }
}

#[cfg(test)]
mod tests {
    use sidewarden_proto::event::Severity;
    use sidewarden_proto::finding::{CisIds, Evidence, Remedy};

    use super::*;

    fn id(workload: &str, instance: &str) -> AgentId {
        let workload = format!("spiffe://td/{workload}").parse().unwrap();
        AgentId { workload, instance: instance.parse().unwrap() }
    }

    fn standing(verdict: &str, vantage: Vantage) -> Standing {
        let verdict = match verdict {
            "pass" => Verdict::Pass,
            "fail" => Verdict::Fail,
            "na" => Verdict::NotApplicable { why: "x".into() },
            _ => Verdict::Unknown { grant: "x".into() },
        };
        let finding = Finding {
            check: "user".into(),
            ids: CisIds::default(),
            title: String::new(),
            severity: Severity::Warning,
            verdict,
            evidence: vec![Evidence::new("s", "l")],
            remedy: Remedy::default(),
            vantage,
        };
        Standing { finding, since: Timestamp(1) }
    }

    fn live() -> Session {
        Session::Live { since: Timestamp(0), source: String::new(), transport: String::new() }
    }

    fn node(host: &str, container: &str, verdict: &str) -> Agent {
        let findings = [("user".to_owned(), standing(verdict, Vantage::Node))].into();
        let hosted = [(container.to_owned(), Hosted { findings, ..Hosted::default() })].into();
        Agent { mode: Some(Mode::Node), host: host.into(), session: live(), hosted, ..Agent::default() }
    }

    /// The word, whether there is disagreement, and how many answers there are, for a sidecar that says `own` and `nodes`.
    fn check(own: &str, vantage: Vantage, nodes: Vec<Agent>) -> (&'static str, bool, usize) {
        let findings = [("user".to_owned(), standing(own, vantage))].into();
        let (host, containers) = ("h1".into(), vec!["c1".into()]);
        let sidecar = Agent { host, containers, findings, session: live(), ..Agent::default() };
        let mut state = State::default();
        state.agents.insert(id("shop/web", "w"), sidecar);
        for (n, node) in nodes.into_iter().enumerate() {
            state.agents.insert(id("hosts/a", &format!("n{n}")), node);
        }
        let evidence = crate::config::Config::default().evidence;
        let all = merged(&state, &Neighbours::of(&state, &evidence), &id("shop/web", "w"), Timestamp(1));
        (all[0].finding.verdict.word(), all[0].disagree, all[0].sources.len())
    }

    #[test]
    fn the_better_vantage_has_the_word_and_disagreement_is_shown() {
        use Vantage::{Open, Ptrace};
        let of = |verdict: &str| vec![node("h1", "c1", verdict)];
        let rows = [
            ("pass", Open, vec![], ("pass", false, 0)),
            ("unknown", Open, of("pass"), ("pass", false, 2)),
            ("pass", Open, of("unknown"), ("pass", false, 2)),
            ("pass", Ptrace, of("fail"), ("fail", true, 2)),
            ("fail", Ptrace, of("pass"), ("pass", true, 2)),
            ("fail", Ptrace, of("na"), ("not_applicable", false, 2)),
            ("unknown", Open, of("unknown"), ("unknown", false, 2)),
        ];
        for (own, vantage, nodes, expected) in rows {
            let told = format!("{own} {vantage:?} {}", nodes.len());
            assert_eq!(check(own, vantage, nodes), expected, "{told}");
        }
    }

    #[test]
    fn a_node_agent_of_another_host_or_one_that_is_gone_has_no_say() {
        let gone = Agent { session: Session::Never, ..node("h1", "c1", "fail") };
        let sidecar = Agent { mode: Some(Mode::Sidecar), ..node("h1", "c1", "fail") };
        for other in [node("h2", "c1", "fail"), node("h1", "c2", "fail"), node("", "c1", "fail"), gone, sidecar] {
            assert_eq!(check("pass", Vantage::Open, vec![other]), ("pass", false, 0));
        }
    }

    #[test]
    fn where_two_node_agents_tell_of_one_container_neither_decides_and_both_are_shown() {
        let both = vec![node("h1", "c1", "pass"), node("h1", "c1", "pass")];
        assert_eq!(check("fail", Vantage::Open, both), ("fail", true, 3));
    }
}
