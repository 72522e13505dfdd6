//! What a check found: a verdict with its evidence, self-describing, so that a collector needs no catalogue.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::event::Severity;
use crate::time::Timestamp;

/// The answer of one check about one instance. `unknown` is never shown as `pass`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// The rule is kept.
    Pass,
    /// The rule is broken.
    Fail,
    /// It cannot be seen from here.
    Unknown {
        /// The exact grant that would show it, as an instruction to the operator.
        grant: String,
    },
    /// The rule does not concern this instance.
    NotApplicable {
        /// Why not.
        why: String,
    },
    /// The rule is broken and somebody answers for that, until a date.
    Waived {
        /// Who allowed it.
        by: String,
        /// The reason given.
        why: String,
        /// When the waiver ends.
        until: Timestamp,
    },
}

impl Verdict {
    /// The word used in metrics, the API and tables.
    pub fn word(&self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Fail => "fail",
            Verdict::Unknown { .. } => "unknown",
            Verdict::NotApplicable { .. } => "not_applicable",
            Verdict::Waived { .. } => "waived",
        }
    }

    /// Every word a verdict can have, in the order they are shown.
    pub const WORDS: [&'static str; 5] = ["fail", "unknown", "pass", "waived", "not_applicable"];
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// One line that shows why the verdict is what it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Where it was read, for example `/proc/7/status`.
    pub source: String,
    /// What stood there, for example `CapBnd: 00000000a80425fb (cap_net_raw, …)`.
    pub line: String,
}

impl Evidence {
    /// Evidence `line`, read at `source`.
    pub fn new(source: impl Into<String>, line: impl Into<String>) -> Evidence {
        Evidence { source: source.into(), line: line.into() }
    }
}

/// The lines that mend it, one for each way of deploying. Empty where there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remedy {
    /// Options of `docker run`.
    #[serde(default)]
    pub docker_run: String,
    /// Lines of a Compose service.
    #[serde(default)]
    pub compose: String,
    /// Lines of a Kubernetes pod.
    #[serde(default)]
    pub kubernetes: String,
}

/// The reference of a check in the two numberings of the CIS Docker Benchmark that people quote.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CisIds {
    /// Number in benchmark 1.2 and 1.3.1, for example `5.31`. Empty where it has none.
    #[serde(default)]
    pub v1_3_1: String,
    /// Number in benchmark 1.6, for example `5.32`. Empty where it has none.
    #[serde(default)]
    pub v1_6: String,
}

/// From where the facts were read: what the agent is able to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Vantage {
    /// Another uid, no capability: what every process may read (cis.md: a).
    Open,
    /// The workload's uid and gid, no capability (b).
    SameUser,
    /// CAP_SYS_PTRACE effective (c).
    Ptrace,
    /// The host's /proc and the Docker API (d).
    Node,
}

/// One check's answer about one instance, with everything a reader needs to believe and mend it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The slug that policy, waivers and gates use, for example `docker-socket`.
    pub check: String,
    /// Its CIS references.
    pub ids: CisIds,
    /// What the rule asks for, in one line.
    pub title: String,
    /// How bad a failure is.
    pub severity: Severity,
    /// The answer.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// Why. At least one line for `pass` and `fail`.
    #[serde(default)]
    pub evidence: Vec<Evidence>,
    /// How to mend it.
    #[serde(default)]
    pub remedy: Remedy,
    /// The vantage whose way of seeing was used.
    pub vantage: Vantage,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(verdict: Verdict) -> Finding {
        Finding {
            check: "docker-socket".into(),
            ids: CisIds { v1_3_1: "5.31".into(), v1_6: "5.32".into() },
            title: "the Docker socket is not mounted".into(),
            severity: Severity::Critical,
            verdict,
            evidence: vec![Evidence::new("/proc/1/mountinfo", "/run/docker.sock")],
            remedy: Remedy::default(),
            vantage: Vantage::Open,
        }
    }

    #[test]
    fn survives_json_with_every_verdict() {
        let verdicts = [
            Verdict::Pass,
            Verdict::Fail,
            Verdict::Unknown { grant: "a node agent on this host".into() },
            Verdict::NotApplicable { why: "swarm mode not enabled".into() },
            Verdict::Waived { by: "ops".into(), why: "vendor".into(), until: Timestamp(5) },
        ];
        for verdict in verdicts {
            let sent = finding(verdict);
            let json = serde_json::to_string(&sent).unwrap();
            assert_eq!(serde_json::from_str::<Finding>(&json).unwrap(), sent, "{json}");
        }
    }

    #[test]
    fn every_word_is_listed() {
        assert!(Verdict::WORDS.contains(&Verdict::Fail.word()));
        assert!(Verdict::WORDS.contains(&Verdict::Unknown { grant: String::new() }.word()));
    }
}
