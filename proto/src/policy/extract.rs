//! What a policy says about one workload: made once for each directive, asked for every connection. Pure.

use std::fmt::Write;

use super::connections::{Answer, At, Side};
use super::egress::List;
use super::party::Who;
use super::{Applied, Policy};
use crate::config::Faults;
use crate::identity::{SpiffeId, TrustDomain};

/// The extract for one workload.
#[derive(Clone, Debug, Default)]
pub struct Extract {
    /// Of which version of the policy; 0 for none.
    pub version: u64,
    called: Side,
    calling: Side,
    egress: Option<Outward>,
}

/// Where the policy lets a workload go.
#[derive(Clone, Debug, Default)]
pub struct Outward {
    /// The places.
    pub list: List,
    /// The lines of the `[[egress]]` that are about it.
    lines: Vec<usize>,
}

impl Extract {
    /// Of the policy in force, for `own`; `domain` is the one that the policy is for.
    pub fn of_applied(applied: &Applied, own: &SpiffeId, domain: &TrustDomain) -> Result<Extract, Faults> {
        Ok(Extract::of(&Policy::parse(&applied.text)?, applied.version, own, domain))
    }

    /// Of `policy`, for `own`.
    pub fn of(policy: &Policy, version: u64, own: &SpiffeId, domain: &TrustDomain) -> Extract {
        let called = Side::called(policy, own, domain);
        let calling = Side::calling(policy, own, domain);
        let is_about = |from: &[super::Party]| from.iter().any(|party| party.covers(Who::Workload(own), domain));
        let about = || policy.egress.iter().filter(|egress| is_about(&egress.from));
        let rules = about().flat_map(|egress| egress.places.iter().map(|place| place.rule.clone())).collect();
        let lines = about().map(|egress| egress.line).collect();
        let egress = (!policy.egress.is_empty()).then_some(Outward { list: List { rules }, lines });
        Extract { version, called, calling, egress }
    }

    /// Whether `peer` may come in at `at`; otherwise why not, with the line that says so.
    pub fn lets_in(&self, peer: Who<'_>, at: &At) -> Result<(), String> {
        match self.called.judge(peer, Some(at)) {
            Answer::Silent | Answer::Allowed(_) => Ok(()),
            Answer::Denied(line) => Err(format!("policy {}, line {line}, denies {peer}", self.version)),
            Answer::Unlisted => {
                let missing = format!("policy {} has no line that lets {peer} in here", self.version);
                Err(with_lines(missing, self.called.lines_about()))
            }
        }
    }

    /// Whether `peer` may be called; otherwise why not.
    pub fn lets_out(&self, peer: Who<'_>) -> Result<(), String> {
        match self.calling.judge(peer, None) {
            Answer::Silent | Answer::Allowed(_) => Ok(()),
            Answer::Denied(line) => Err(format!("policy {}, line {line}, denies calls to {peer}", self.version)),
            Answer::Unlisted => {
                let missing = format!("policy {} has no line that lets this workload call {peer}", self.version);
                Err(with_lines(missing, self.calling.lines_about()))
            }
        }
    }

    /// Where the workload may go besides its peers; nothing if the policy leaves that to the agent's own settings.
    pub fn egress(&self) -> Option<&Outward> {
        self.egress.as_ref()
    }

    /// Why it may not go somewhere.
    pub fn no_way_out(&self) -> String {
        let missing = format!("policy {} has no line that lets this workload go there", self.version);
        with_lines(missing, self.egress.as_ref().map_or(&[], |outward| &outward.lines[..outward.lines.len().min(5)]))
    }
}

/// Names the lines that somebody should look at who thinks otherwise.
fn with_lines(mut text: String, lines: &[usize]) -> String {
    if !lines.is_empty() {
        let shown: Vec<String> = lines.iter().map(usize::to_string).collect();
        let (noun, verb) = if lines.len() == 1 { ("line", "is") } else { ("lines", "are") };
        // Writing to a String cannot fail.
        let _ = write!(text, "; {noun} {} {verb} about it", shown.join(", "));
    }
    text
}
