//! The auditor's table: reference, description, status, for an instance, a service or the fleet, now or at any moment of
//! the past, and what changed between two moments. Pure; `render` makes text, CSV and HTML of it.

mod render;

use std::collections::BTreeMap;

use serde::Serialize;
use sidewarden_proto::event::{Mode, Severity};
use sidewarden_proto::finding::{CisIds, Evidence, Remedy, Verdict};
use sidewarden_proto::identity::{AgentId, SpiffeId};
use sidewarden_proto::policy::Pattern;
use sidewarden_proto::time::Timestamp;

use crate::api::answers::numbers;
use crate::evidence;
use crate::posture::{self, Merged, Neighbours};
use crate::state::{Agent, Hosted, State, Status};

pub use render::{csv, html, text};

/// The numbering of the benchmark that references are written in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum Numbering {
    /// 1.2 and 1.3.1.
    #[default]
    #[serde(rename = "1.3.1")]
    V1_3_1,
    /// 1.6.
    #[serde(rename = "1.6")]
    V1_6,
}

impl Numbering {
    /// As it is written.
    pub const fn word(self) -> &'static str {
        match self {
            Numbering::V1_3_1 => "1.3.1",
            Numbering::V1_6 => "1.6",
        }
    }

    fn of(self, ids: &CisIds) -> &str {
        match self {
            Numbering::V1_3_1 => &ids.v1_3_1,
            Numbering::V1_6 => &ids.v1_6,
        }
    }
}

impl std::str::FromStr for Numbering {
    type Err = String;

    fn from_str(text: &str) -> Result<Numbering, String> {
        match text {
            "1.3.1" | "1.2" => Ok(Numbering::V1_3_1),
            "1.6" => Ok(Numbering::V1_6),
            _ => Err("must be 1.3.1 or 1.6".into()),
        }
    }
}

/// What a report is about.
#[derive(Clone, Debug)]
pub struct Scope {
    /// These workloads.
    pub workloads: Pattern,
    /// Of them only this instance.
    pub instance: Option<String>,
}

impl Scope {
    fn covers(&self, id: &AgentId) -> bool {
        self.workloads.covers(&id.workload) && self.instance.as_ref().is_none_or(|name| id.instance.as_str() == name)
    }

    /// In words.
    pub fn words(&self) -> String {
        match (&self.instance, self.workloads.to_string().as_str()) {
            (Some(instance), workload) => format!("{workload}#{instance}"),
            (None, "*") => "the whole fleet".to_owned(),
            (None, workload) => workload.to_owned(),
        }
    }
}

/// A report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What it is about.
    pub scope: String,
    /// The trust domain.
    pub trust_domain: String,
    /// The numbering of its references.
    pub numbering: Numbering,
    /// The moment that it shows.
    pub at_us: Timestamp,
    /// When it was made.
    pub made_us: Timestamp,
    /// How many subjects there are.
    pub judged: usize,
    /// Verdicts of all subjects.
    pub counts: BTreeMap<&'static str, usize>,
    /// Of all verdicts that apply, how many percent pass; null where there are none.
    pub score: Option<f64>,
    /// The table over all subjects: of each check the worst.
    pub table: Vec<Row>,
    /// Each subject.
    pub subjects: Vec<Subject>,
    /// Instances of which nothing can be said.
    pub unclear: Vec<String>,
}

/// Somebody who was judged.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Subject {
    /// Its name: `shop/web#web-1`, or `hosts/a#h1/db` for a container that has no agent of its own.
    pub name: String,
    /// `instance`, `container` or `host`.
    pub kind: &'static str,
    /// What a container was made from, where that is known.
    pub image: String,
    /// Its presence.
    pub status: &'static str,
    /// Verdicts.
    pub counts: BTreeMap<&'static str, usize>,
    /// See [`Report::score`].
    pub score: Option<f64>,
    /// Every check.
    pub rows: Vec<Row>,
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The reference in the numbering of the report.
    pub reference: String,
    /// The slug of the check.
    pub check: String,
    /// What the rule asks for.
    pub description: String,
    /// As auditors write it: `PASS`, `FAIL (waived by … until …)`.
    pub status: String,
    /// The word of the verdict.
    pub verdict: &'static str,
    /// How bad a failure is.
    pub severity: Severity,
    /// Why.
    pub evidence: Vec<Evidence>,
    /// How to mend it.
    pub remedy: Remedy,
    /// Since when; of a table over several, of the one that is shown.
    pub since_us: Timestamp,
    /// In a table over several: who is not in order, the first of them, and how many in all.
    pub whose: Vec<String>,
    /// See `whose`.
    pub count: usize,
}

/// Names in a line of a table over several.
const MAX_WHOSE: usize = 10;
/// Subjects that are told of with every check; of further ones only how many checks have which verdict.
pub const MAX_DETAILED: usize = 1_000;

/// What changed between two moments.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The report on the earlier moment, without its subjects.
    pub before: Report,
    /// The report on the later moment.
    pub after: Report,
    /// Every verdict that is another one.
    pub changes: Vec<Change>,
}

/// One verdict that changed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// Whose.
    pub subject: String,
    /// The reference.
    pub reference: String,
    /// The check.
    pub check: String,
    /// What the rule asks for.
    pub description: String,
    /// The status before; empty where there was none.
    pub before: String,
    /// The status after; empty where there is none any more.
    pub after: String,
    /// The word of the verdict after; where there is none any more, nothing is known.
    pub verdict_after: &'static str,
}

/// Who the report is by, and when.
#[derive(Clone, Debug)]
pub struct Made<'a> {
    /// The trust domain.
    pub trust_domain: &'a str,
    /// The numbering.
    pub numbering: Numbering,
    /// The moment to show.
    pub at: Timestamp,
    /// Now.
    pub now: Timestamp,
}

/// The report on `scope`, as `state` has it.
pub fn report(
    state: &State,
    evidence: &evidence::Config,
    scope: &Scope,
    made: &Made<'_>,
    unclear: &[AgentId],
) -> Report {
    let mut builder = Builder::new(scope, made);
    let ids: Vec<AgentId> = builder.ids(state);
    builder.add(state, evidence, &ids);
    builder.finish(unclear)
}

/// Makes a report in several steps, so that nobody has to hold the state for long.
#[derive(Debug)]
pub struct Builder<'a> {
    scope: &'a Scope,
    made: &'a Made<'a>,
    table: BTreeMap<String, Row>,
    subjects: Vec<Subject>,
}

impl<'a> Builder<'a> {
    /// A report on nobody yet.
    pub fn new(scope: &'a Scope, made: &'a Made<'a>) -> Builder<'a> {
        Builder { scope, made, table: BTreeMap::new(), subjects: Vec::new() }
    }

    /// Who is to be added.
    pub fn ids(&self, state: &State) -> Vec<AgentId> {
        let is_in = |id: &AgentId, agent: &Agent| self.scope.covers(id) && is_there(state, agent, self.made.at);
        let wanted = state.agents.iter().filter(|(id, agent)| is_in(id, agent));
        wanted.map(|(id, _)| id.clone()).collect()
    }

    /// Adds some of them.
    pub fn add(&mut self, state: &State, evidence: &evidence::Config, ids: &[AgentId]) {
        let neighbours = Neighbours::of(state, evidence);
        let is_in = |other: &AgentId| {
            self.scope.covers(other)
                && state.agents.get(other).is_some_and(|agent| is_there(state, agent, self.made.at))
        };
        let mut added = Vec::new();
        for id in ids {
            let Some((id, agent)) = state.agents.get_key_value(id) else { continue };
            added.push(instance(state, &neighbours, id, agent, self.made));
            for hosted in agent.hosted.values() {
                // Where an agent of this report stands beside it, these verdicts are part of that instance's.
                let beside = neighbours.beside(&agent.host, &hosted.container.id);
                if !beside.iter().any(|other| *other != id && is_in(other)) {
                    added.push(container(state, &neighbours, id, agent, hosted, self.made));
                }
            }
        }
        added.into_iter().for_each(|subject| self.push(subject));
    }

    fn push(&mut self, mut subject: Subject) {
        if subject.rows.is_empty() {
            return;
        }
        subject.rows.iter().for_each(|row| add_to_table(&mut self.table, row, &subject.name));
        if self.subjects.len() >= MAX_DETAILED {
            subject.rows.clear();
        }
        self.subjects.push(subject);
    }

    /// The report.
    pub fn finish(self, unclear: &[AgentId]) -> Report {
        let Builder { scope, made, table, subjects } = self;
        let counts = sum(subjects.iter().map(|subject| &subject.counts));
        let mut table: Vec<Row> = table.into_values().collect();
        in_order(&mut table);
        Report {
            scope: scope.words(),
            trust_domain: made.trust_domain.to_owned(),
            numbering: made.numbering,
            at_us: made.at,
            made_us: made.now,
            judged: subjects.len(),
            score: score(&counts),
            counts,
            table,
            subjects,
            unclear: unclear
                .iter()
                .filter(|id| scope.covers(id))
                .map(|id| name(&id.workload, id.instance.as_str()))
                .collect(),
        }
    }
}

/// What is another verdict in `after` than in `before`.
pub fn difference(before: Report, after: Report) -> Difference {
    let mut all: BTreeMap<(&str, &str), [Option<&Row>; 2]> = BTreeMap::new();
    for (which, report) in [&before, &after].into_iter().enumerate() {
        for subject in &report.subjects {
            for row in &subject.rows {
                all.entry((&subject.name, &row.check)).or_default()[which] = Some(row);
            }
        }
    }
    let status = |row: Option<&Row>| row.map_or_else(String::new, |row| row.status.clone());
    let mut changes = Vec::new();
    for ((subject, _), [old, new]) in all {
        let Some(row) = new.or(old) else { continue };
        // Another reason, or another end of a waiver, is no other verdict.
        if old.map(|row| row.verdict) != new.map(|row| row.verdict) {
            changes.push(Change {
                subject: subject.to_owned(),
                reference: row.reference.clone(),
                check: row.check.clone(),
                description: row.description.clone(),
                before: status(old),
                after: status(new),
                verdict_after: new.map_or("unknown", |row| row.verdict),
            });
        }
    }
    changes.sort_by_cached_key(|change| (change.subject.clone(), numbers(&change.reference)));
    Difference { before: Report { subjects: Vec::new(), ..before }, after, changes }
}

/// Whoever left in order, or is long gone, is in no report.
fn is_there(state: &State, agent: &Agent, at: Timestamp) -> bool {
    !matches!(state.status(agent, at), Status::Stopped | Status::Gone)
}

fn name(workload: &SpiffeId, instance: &str) -> String {
    format!("{}#{instance}", workload.path())
}

fn instance(state: &State, neighbours: &Neighbours<'_>, id: &AgentId, agent: &Agent, made: &Made<'_>) -> Subject {
    let is_host = agent.mode == Some(Mode::Node);
    let status = state.status(agent, made.at).word();
    let name = name(&id.workload, id.instance.as_str());
    let kind = if is_host { "host" } else { "instance" };
    subject(name, kind, String::new(), status, posture::merged(state, neighbours, id, made.at), made.numbering)
}

fn container(
    state: &State,
    neighbours: &Neighbours<'_>,
    id: &AgentId,
    node: &Agent,
    hosted: &Hosted,
    made: &Made<'_>,
) -> Subject {
    let name = format!("{}/{}", name(&id.workload, id.instance.as_str()), hosted.container.name);
    let all = posture::of_container(state, neighbours, id, node, hosted, made.at);
    let status = state.status(node, made.at).word();
    subject(name, "container", hosted.container.image.clone(), status, all, made.numbering)
}

fn subject(
    name: String,
    kind: &'static str,
    image: String,
    status: &'static str,
    all: Vec<Merged>,
    numbering: Numbering,
) -> Subject {
    let mut rows: Vec<Row> = all.into_iter().map(|merged| row(merged, numbering)).collect();
    in_order(&mut rows);
    let mut counts: BTreeMap<&'static str, usize> = Verdict::WORDS.iter().map(|word| (*word, 0)).collect();
    rows.iter().for_each(|row| *counts.entry(row.verdict).or_default() += 1);
    Subject { name, kind, image, status, score: score(&counts), counts, rows }
}

fn in_order(rows: &mut [Row]) {
    rows.sort_by_cached_key(|row| (numbers(&row.reference), row.check.clone()));
}

fn row(merged: Merged, numbering: Numbering) -> Row {
    let finding = merged.finding;
    Row {
        reference: numbering.of(&finding.ids).to_owned(),
        status: status(&finding.verdict),
        verdict: finding.verdict.word(),
        check: finding.check,
        description: finding.title,
        severity: finding.severity,
        evidence: finding.evidence,
        remedy: finding.remedy,
        since_us: merged.since_us,
        whose: Vec::new(),
        count: 0,
    }
}

/// The verdict as auditors write it. What is waived is broken; a swarm that is off breaks no rule about swarms.
fn status(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Pass => "PASS".to_owned(),
        Verdict::Fail => "FAIL".to_owned(),
        Verdict::Waived { by, until, .. } => format!("FAIL (waived by {by} until {until})"),
        Verdict::Unknown { grant } => format!("UNKNOWN (to know: {grant})"),
        Verdict::NotApplicable { why } if why == NO_SWARM => format!("PASS ({why})"),
        Verdict::NotApplicable { why } => format!("NOT APPLICABLE ({why})"),
    }
}

/// As the agent says it.
const NO_SWARM: &str = "swarm mode not enabled";

/// Of each check the worst: what fails, then what is waived, then what is unknown.
fn add_to_table(table: &mut BTreeMap<String, Row>, row: &Row, subject: &str) {
    let worst = table.entry(row.check.clone()).or_insert_with(|| row.clone());
    if worst.verdict != row.verdict && rank(row) > rank(worst) {
        *worst = row.clone();
    } else if worst.verdict != row.verdict {
        return;
    }
    worst.severity = worst.severity.max(row.severity);
    worst.count += 1;
    if matches!(row.verdict, "fail" | "waived" | "unknown") && worst.whose.len() < MAX_WHOSE {
        worst.whose.push(subject.to_owned());
    }
}

fn rank(row: &Row) -> u8 {
    match row.verdict {
        "fail" => 4,
        "waived" => 3,
        "unknown" => 2,
        "pass" => 1,
        _ => 0,
    }
}

fn sum<'a>(all: impl Iterator<Item = &'a BTreeMap<&'static str, usize>>) -> BTreeMap<&'static str, usize> {
    let mut sum: BTreeMap<&'static str, usize> = Verdict::WORDS.iter().map(|word| (*word, 0)).collect();
    all.flatten().for_each(|(word, count)| *sum.entry(word).or_default() += count);
    sum
}

/// What is unknown does not pass, and what is waived is broken.
fn score(counts: &BTreeMap<&'static str, usize>) -> Option<f64> {
    let count = |word: &str| counts.get(word).copied().unwrap_or_default();
    let all = count("pass") + count("fail") + count("waived") + count("unknown");
    (all > 0).then(|| (1000.0 * count("pass") as f64 / all as f64).round() / 10.0)
}

#[cfg(test)]
pub(crate) mod tests;
