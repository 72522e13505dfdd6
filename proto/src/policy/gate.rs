//! A gate: what a workload must keep in order to stay on the data plane. Pure, and the same for agent and collector.
//!
//! The worst verdict counts, and `unknown` neither closes a gate nor opens it again.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Pattern, words};
use crate::config::{FromValue, Reader, Value};
use crate::event::{Body, Event};
use crate::finding::Verdict;
use crate::time::Timestamp;

/// How long a workload must have kept a gate before it is let in again, unless said otherwise.
const HOLD: Duration = Duration::from_secs(600);
/// Most checks that a posture is kept of; far more than there are.
const MAX_CHECKS: usize = 512;

/// One gate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gate {
    /// Where it stands.
    pub line: usize,
    /// What it is called, in events and lists.
    pub name: String,
    /// Who has to pass it.
    pub workloads: Vec<Pattern>,
    /// Checks that must not fail, by slug.
    pub checks: Vec<String>,
    /// What must not happen.
    pub events: Vec<Happening>,
    /// How long it must have been kept before the workload is let in again.
    pub hold: Duration,
    /// Whether it does anything; otherwise it only tells what it would do.
    pub enforce: bool,
    /// Most instances of one workload that are quarantined at a time.
    pub max_per_workload: usize,
    /// Connected instances of a workload that are let be, so that one rule cannot stop all of it.
    pub leave: usize,
    /// What an agent does that cannot reach its collector.
    pub unreachable: Alone,
}

/// What an agent does on its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Alone {
    /// It quarantines its workload. Nobody counts how many others do the same.
    #[default]
    Quarantine,
    /// It waits for the collector's word.
    Keep,
}

/// What can happen in a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Happening {
    /// Somebody came in with capabilities that the workload does not have.
    PrivilegedExec,
    /// Somebody came in as root where the workload is not.
    RootExec,
    /// Somebody came in at all.
    Exec,
    /// The workload started a shell.
    Shell,
}

impl Happening {
    /// All of them.
    pub const ALL: [Happening; 4] = [Happening::PrivilegedExec, Happening::RootExec, Happening::Exec, Happening::Shell];

    /// The word in a policy.
    pub const fn word(self) -> &'static str {
        match self {
            Happening::PrivilegedExec => "privileged_exec",
            Happening::RootExec => "root_exec",
            Happening::Exec => "exec",
            Happening::Shell => "shell",
        }
    }

    /// What the body of an event tells.
    pub fn of(body: &Body) -> Vec<Happening> {
        let Body::ProcessEntered(entered) = body else {
            return if matches!(body, Body::ProcessShell(_)) { vec![Happening::Shell] } else { Vec::new() };
        };
        // Root by intent is no happening; more capabilities than the workload has are one all the same.
        if !entered.declared.is_empty() && !entered.privileged {
            return Vec::new();
        }
        let told = [(Happening::PrivilegedExec, entered.privileged), (Happening::RootExec, entered.as_root)];
        told.into_iter().filter(|(_, is_so)| *is_so).map(|(what, _)| what).chain([Happening::Exec]).collect()
    }
}

impl FromValue for Vec<Happening> {
    fn from_value(value: &Value) -> Result<Vec<Happening>, String> {
        let known = Happening::ALL.map(Happening::word).join(", ");
        let named = |word: &String| Happening::ALL.into_iter().find(|what| what.word() == word);
        words(value)?
            .iter()
            .map(|word| named(word).ok_or_else(|| format!("holds `{word}`; known are {known}")))
            .collect()
    }

    fn from_text(text: &str) -> Result<Vec<Happening>, String> {
        Err(format!("must be a list, not `{text}`"))
    }
}

/// Slugs of checks.
struct Slugs(Vec<String>);

impl FromValue for Slugs {
    fn from_value(value: &Value) -> Result<Slugs, String> {
        let slugs = words(value)?;
        match slugs.iter().find(|slug| !is_slug(slug)) {
            Some(bad) => {
                Err(format!("holds `{}`, which is no check: see `sidewarden-agent checks`", bad.escape_debug()))
            }
            None => Ok(Slugs(slugs)),
        }
    }

    fn from_text(text: &str) -> Result<Slugs, String> {
        Err(format!("must be a list, not `{text}`"))
    }
}

impl FromValue for Alone {
    fn from_text(text: &str) -> Result<Alone, String> {
        match text {
            "quarantine" => Ok(Alone::Quarantine),
            "keep" => Ok(Alone::Keep),
            _ => Err(format!("must be \"quarantine\" or \"keep\", not `{text}`")),
        }
    }
}

/// Lower-case words with hyphens: what checks are called, and gates as well.
fn is_slug(text: &str) -> bool {
    (1..=63).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// Reads one.
pub(super) fn read(reader: &mut Reader<'_>) -> Option<Gate> {
    let line = reader.line();
    let name: Option<String> = reader.required("name");
    if name.as_ref().is_some_and(|name| !is_slug(name)) {
        reader.fault("name", "must be 1 to 63 of a-z, 0-9 and -");
    }
    let workloads = reader.value("workloads", vec![Pattern::all()]);
    let Slugs(checks) = reader.value("checks", Slugs(Vec::new()));
    let events: Vec<Happening> = reader.value("events", Vec::new());
    let hold = reader.value("hold", HOLD);
    let enforce = reader.value("enforce", false);
    let max_per_workload = reader.value("max_per_workload", 1usize);
    let leave = reader.value("leave", 1usize);
    let unreachable = reader.value("unreachable", Alone::Quarantine);
    if checks.is_empty() && events.is_empty() {
        reader.fault("checks", "and `events` are both empty: the gate would guard nothing");
    }
    if workloads.is_empty() {
        reader.fault("workloads", "is empty: leave it out for all, or remove the gate");
    }
    if hold.is_zero() || hold > Duration::from_secs(30 * 24 * 3600) {
        reader.fault("hold", "must be more than 0 and at most 30d");
    }
    if max_per_workload == 0 {
        reader.fault("max_per_workload", "must be at least 1; leave `enforce` out to be told only");
    }
    Some(Gate { line, name: name?, workloads, checks, events, hold, enforce, max_per_workload, leave, unreachable })
}

/// What is known of one instance, as far as gates ask.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// The verdict of each check, and since when.
    pub verdicts: BTreeMap<String, (Seen, Timestamp)>,
    /// What has happened, and when last.
    pub happened: BTreeMap<Happening, Timestamp>,
}

/// A verdict, as a gate sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The rule is broken, though somebody may answer for it: whom a gate lets be is the policy's to say, or a release.
    Broken,
    /// It is kept, or does not apply.
    Kept,
    /// It cannot be told.
    Unclear,
}

impl From<&Verdict> for Seen {
    fn from(verdict: &Verdict) -> Seen {
        match verdict {
            Verdict::Fail | Verdict::Waived { .. } => Seen::Broken,
            Verdict::Unknown { .. } => Seen::Unclear,
            Verdict::Pass | Verdict::NotApplicable { .. } => Seen::Kept,
        }
    }
}

impl Known {
    /// Takes in what an agent itself has to tell.
    pub fn take(&mut self, event: &Event) {
        match event.body() {
            Ok(Some(Body::PostureBaseline(baseline))) => {
                self.verdicts.retain(|check, _| baseline.findings.iter().any(|finding| finding.check == *check));
                for finding in &baseline.findings {
                    self.stand(&finding.check, Seen::from(&finding.verdict), event.at_us);
                }
            }
            Ok(Some(Body::VerdictChanged(changed))) => {
                self.stand(&changed.finding.check, Seen::from(&changed.finding.verdict), event.at_us);
            }
            Ok(Some(body)) => {
                for what in Happening::of(&body) {
                    let last = self.happened.entry(what).or_default();
                    *last = (*last).max(event.at_us);
                }
            }
            _ => {}
        }
    }

    fn stand(&mut self, check: &str, seen: Seen, at: Timestamp) {
        let since = self.verdicts.get(check).filter(|(before, _)| *before == seen).map_or(at, |(_, since)| *since);
        if self.verdicts.len() < MAX_CHECKS || self.verdicts.contains_key(check) {
            self.verdicts.insert(check.to_owned(), (seen, since));
        }
    }
}

/// How an instance stands before a gate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stand {
    /// It breaks it.
    Broken {
        /// How.
        why: String,
    },
    /// It keeps it.
    Kept {
        /// Since when.
        since: Timestamp,
    },
    /// It cannot be told.
    Unclear,
}

impl Gate {
    /// How an instance of which this is `known` stands at `now`. What happened counts for as long as the gate's hold.
    pub fn judge(&self, known: &Known, now: Timestamp) -> Stand {
        let verdicts = || self.checks.iter().map(|check| (check, known.verdicts.get(check)));
        let failing: Vec<&str> =
            verdicts().filter(|(_, v)| matches!(v, Some((Seen::Broken, _)))).map(|(check, _)| check.as_str()).collect();
        let happened = || self.events.iter().filter_map(|what| Some((what, *known.happened.get(what)?)));
        let recent: Vec<&str> =
            happened().filter(|(_, at)| now < at.plus(self.hold)).map(|(what, _)| what.word()).collect();
        if !failing.is_empty() || !recent.is_empty() {
            return Stand::Broken { why: [failing, recent].concat().join(", ") };
        }
        if verdicts().any(|(_, v)| !matches!(v, Some((Seen::Kept, _)))) {
            return Stand::Unclear;
        }
        let kept = verdicts().filter_map(|(_, v)| v.map(|(_, since)| *since)).max().unwrap_or_default();
        Stand::Kept { since: happened().map(|(_, at)| at).fold(kept, Timestamp::max) }
    }

    /// Whether an instance that was quarantined may come back at `now`.
    pub fn opens(&self, stand: &Stand, now: Timestamp) -> bool {
        matches!(stand, Stand::Kept { since } if now >= since.plus(self.hold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{ProcessEntered, ProcessInfo};

    const HOUR: Timestamp = Timestamp::from_secs(3_600);

    fn gate() -> Gate {
        let text = "[[gate]]\nname = 'g'\nchecks = ['privileged', 'docker-socket']\nevents = ['privileged_exec']\nhold = '60s'\n";
        super::super::Policy::parse(text).unwrap().gates.remove(0)
    }

    fn at(secs: u64) -> Timestamp {
        HOUR.plus(Duration::from_secs(secs))
    }

    fn known(verdicts: &[(&str, Seen, u64)], happened: &[(Happening, u64)]) -> Known {
        Known {
            verdicts: verdicts.iter().map(|(check, seen, since)| ((*check).to_owned(), (*seen, at(*since)))).collect(),
            happened: happened.iter().map(|(what, secs)| (*what, at(*secs))).collect(),
        }
    }

    #[test]
    fn the_worst_verdict_counts_and_unknown_neither_closes_nor_opens() {
        use Seen::{Broken, Kept, Unclear};
        let exec = Happening::PrivilegedExec;
        let broken = |why: &str| Stand::Broken { why: why.into() };
        let rows = [
            (known(&[("privileged", Kept, 1), ("docker-socket", Kept, 5)], &[]), Stand::Kept { since: at(5) }),
            (known(&[("privileged", Broken, 1), ("docker-socket", Kept, 5)], &[]), broken("privileged")),
            (known(&[("privileged", Broken, 1), ("docker-socket", Unclear, 5)], &[]), broken("privileged")),
            (known(&[("privileged", Kept, 1), ("docker-socket", Unclear, 5)], &[]), Stand::Unclear),
            (known(&[("privileged", Kept, 1)], &[]), Stand::Unclear),
            (known(&[], &[(exec, 50)]), broken("privileged_exec")),
            (known(&[("privileged", Kept, 1), ("docker-socket", Kept, 5)], &[(exec, 50)]), broken("privileged_exec")),
            (
                known(&[("privileged", Kept, 1), ("docker-socket", Kept, 5)], &[(exec, 30)]),
                Stand::Kept { since: at(30) },
            ),
            (
                known(&[("privileged", Kept, 1), ("docker-socket", Kept, 5)], &[(Happening::Shell, 95)]),
                Stand::Kept { since: at(5) },
            ),
        ];
        for (known, expected) in rows {
            assert_eq!(gate().judge(&known, at(100)), expected, "{known:?}");
        }
    }

    /// Whoever can write the agent's file could take a workload out of every gate otherwise.
    #[test]
    fn a_waived_failure_breaks_a_gate_as_any_other() {
        let waived = Verdict::Waived { by: "ops".into(), why: "x".into(), until: at(1_000) };
        for (verdict, seen) in [
            (Verdict::Fail, Seen::Broken),
            (waived, Seen::Broken),
            (Verdict::Pass, Seen::Kept),
            (Verdict::NotApplicable { why: "x".into() }, Seen::Kept),
            (Verdict::Unknown { grant: "x".into() }, Seen::Unclear),
        ] {
            assert_eq!(Seen::from(&verdict), seen, "{verdict:?}");
        }
    }

    #[test]
    fn a_gate_opens_once_it_was_kept_for_the_hold() {
        let gate = gate();
        for (stand, opens) in [
            (Stand::Kept { since: at(0) }, true),
            (Stand::Kept { since: at(41) }, false),
            (Stand::Kept { since: at(40) }, true),
            (Stand::Unclear, false),
            (Stand::Broken { why: String::new() }, false),
        ] {
            assert_eq!(gate.opens(&stand, at(100)), opens, "{stand:?}");
        }
    }

    #[test]
    fn a_dry_run_and_a_cap_of_one_are_the_defaults() {
        let gate = gate();
        assert_eq!(
            (gate.enforce, gate.max_per_workload, gate.leave, gate.unreachable),
            (false, 1, 1, Alone::Quarantine)
        );
    }

    #[test]
    fn who_comes_in_as_root_by_intent_closes_no_gate() {
        let happened = |as_root, privileged, declared: &str| {
            let entered =
                ProcessEntered { process: ProcessInfo::default(), as_root, privileged, declared: declared.into() };
            Happening::of(&entered.into())
        };
        assert_eq!(happened(true, false, ""), [Happening::RootExec, Happening::Exec]);
        assert_eq!(happened(true, false, "the backup"), []);
        let both = [Happening::PrivilegedExec, Happening::RootExec, Happening::Exec];
        assert_eq!(happened(true, true, "the backup"), both);
    }
}
