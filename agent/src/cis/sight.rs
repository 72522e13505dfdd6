//! What an agent can answer from where it stands, and what each further grant would add. Pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use sidewarden_proto::finding::{Finding, Vantage, Verdict};

/// The vantage in words.
const fn words(vantage: Vantage) -> &'static str {
    match vantage {
        Vantage::Open => "open: what every process may read",
        Vantage::SameUser => "same_user: the workload's own user and group",
        Vantage::Ptrace => "ptrace: CAP_SYS_PTRACE",
        Vantage::Node => "node: the engine's API and the host's /proc",
    }
}

/// What `findings`, made at `vantage`, could answer, and by which grant the rest could be.
pub fn sight(vantage: Vantage, findings: &[Finding]) -> String {
    let mut wanting: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for finding in findings {
        if let Verdict::Unknown { grant } = &finding.verdict {
            wanting.entry(grant).or_default().push(&finding.check);
        }
    }
    let unknown: usize = wanting.values().map(Vec::len).sum();
    let mut text = format!("{}\n", words(vantage));
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{} of {} checks are answered from here\n", findings.len() - unknown, findings.len());
    let mut grants: Vec<_> = wanting.into_iter().collect();
    grants.sort_by_key(|(_, checks)| std::cmp::Reverse(checks.len()));
    for (grant, checks) in grants {
        let _ = writeln!(text, "{} more with {grant}:\n  {}", checks.len(), checks.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::sample::Sample;
    use super::*;

    #[test]
    fn each_grant_is_told_once_with_what_it_adds() {
        let mut sample = Sample::sound();
        sample.container().uts = super::super::sample::hidden();
        sample.container().memory = super::super::sample::hidden();
        let findings = sample.judge_all();
        let text = sight(Vantage::Open, &findings);
        let answered = findings.iter().filter(|f| f.verdict.word() != "unknown").count();
        assert!(text.contains(&format!("{answered} of 53 checks")), "{text}");
        assert!(text.contains("2 more with give the agent CAP_SYS_PTRACE"), "{text}");
        assert!(text.contains("memory-limit, host-uts"), "{text}");
    }
}
