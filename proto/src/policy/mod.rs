//! The policy that a collector gives to every agent: one document, read by both sides with the same reader.
//!
//! Agents get the text as the operator wrote it. One that holds a word which an agent does not know is not half obeyed:
//! that agent lets nothing through until it is updated.

pub mod address;
pub mod egress;
pub mod gate;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::config::{Faults, FromValue, Reader, Value, load};
use crate::identity::SpiffeId;
pub use gate::{Alone, Gate, Happening};

/// Largest text of a policy: it travels within the directive.
pub const MAX_TEXT: usize = 256 << 10;
/// Most gates, and most names in one list.
const MAX_LIST: usize = 500;

/// A policy as it is kept and travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// Grows with every change, also when an old text comes back.
    pub version: u64,
    /// The document, TOML, as it was written.
    pub text: String,
}

/// What it says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// What takes a workload off the data plane.
    pub gates: Vec<Gate>,
}

impl Policy {
    /// Reads a document; everything that is wrong with it at once.
    pub fn parse(text: &str) -> Result<Policy, Faults> {
        if text.len() > MAX_TEXT {
            return Err(Faults(vec![format!("it has {} bytes, the limit is {MAX_TEXT}", text.len())]));
        }
        load(text, &|_| None, |reader| {
            let gates = reader.list("gate", gate::read);
            let gates: Vec<Gate> = gates.into_iter().flatten().collect();
            contradictions(reader, &gates);
            Policy { gates }
        })
    }

    /// The gates that a workload has to pass.
    pub fn gates_of<'a>(&'a self, workload: &'a SpiffeId) -> impl Iterator<Item = &'a Gate> {
        self.gates.iter().filter(|gate| gate.workloads.iter().any(|pattern| pattern.covers(workload)))
    }
}

fn contradictions(reader: &mut Reader<'_>, gates: &[Gate]) {
    for (i, gate) in gates.iter().enumerate() {
        if gates[..i].iter().any(|other| other.name == gate.name) {
            reader.fault(&format!("gate[{i}].name"), format!("is `{}`, which another gate has already", gate.name));
        }
    }
    if gates.len() > MAX_LIST {
        reader.fault("gate", format!("has {} gates, the limit is {MAX_LIST}", gates.len()));
    }
}

/// Which workloads are meant: `shop/orders`, `shop/*`, or `*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// Every workload.
    pub fn all() -> Pattern {
        Pattern("*".into())
    }

    /// Whether `workload` is meant. Patterns are of the trust domain that the policy is for.
    pub fn covers(&self, workload: &SpiffeId) -> bool {
        let path = workload.path();
        match self.0.strip_suffix('*') {
            Some("") => true,
            Some(namespace) => path.starts_with(namespace),
            None => self.0 == path,
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Pattern, String> {
        let path = text.strip_suffix("/*").unwrap_or(text);
        let is_path = format!("spiffe://x/{path}").parse::<SpiffeId>().is_ok();
        if text == "*" || is_path {
            return Ok(Pattern(text.to_owned()));
        }
        let shown: String = text.chars().take(80).collect();
        Err(format!("`{shown}` is no workload: write shop/orders, shop/* for every service of shop, or * for all"))
    }
}

impl FromValue for Vec<Pattern> {
    fn from_value(value: &Value) -> Result<Vec<Pattern>, String> {
        words(value)?.iter().map(|word| word.parse()).collect()
    }

    fn from_text(text: &str) -> Result<Vec<Pattern>, String> {
        Ok(vec![text.parse()?])
    }
}

/// A list of strings, and not an endless one.
fn words(value: &Value) -> Result<Vec<String>, String> {
    let wrong = || format!("must be a list of strings, [\"…\"], not {}", value.type_str());
    let list = value.as_array().ok_or_else(wrong)?;
    if list.len() > MAX_LIST {
        return Err(format!("has {} entries, the limit is {MAX_LIST}", list.len()));
    }
    list.iter().map(|word| word.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(text: &str) -> String {
        Policy::parse(text).map(|_| Vec::new()).unwrap_or_else(|faults| faults.0).join("\n")
    }

    #[test]
    fn everything_that_is_wrong_is_told_at_once() {
        let text = "[[gate]]\nname = 'a b'\nchecks = ['x']\n[[gate]]\nname = 'g'\nchecks = []\nhold = 'soon'\n\
                    [[gate]]\nname = 'h'\nevents = ['moon']\nenforced = true\nworkloads = ['/']\n[[gates]]\n";
        let told = faults(text);
        for wanted in
            ["gate[0].name", "gate[1].checks", "gate[1].hold", "gate[2].events", "`enforce`", "workloads", "`gate`?"]
        {
            assert!(told.contains(wanted), "{wanted} is missing in:\n{told}");
        }
        assert!(
            faults("[[gate]]\nname = 'g'\nchecks = ['x']\n[[gate]]\nname = 'g'\nchecks = ['x']\n").contains("already")
        );
        assert!(faults(&"#".repeat(MAX_TEXT + 1)).contains("limit"));
        assert_eq!(Policy::parse("").unwrap(), Policy::default());
    }

    #[test]
    fn a_text_that_is_cut_anywhere_is_read_or_refused_and_never_a_panic() {
        let text = "[[gate]]\nname = 'g'\nworkloads = ['shop/*']\nchecks = ['privileged']\nevents = ['privileged_exec']\n\
                    hold = '5m'\nenforce = true\nmax_per_workload = 2\nunreachable = 'keep'\n";
        assert_eq!(Policy::parse(text).unwrap().gates.len(), 1);
        for cut in 0..text.len() {
            let _ = Policy::parse(&text[..cut]);
        }
    }

    #[test]
    fn patterns_mean_what_they_say() {
        let rows = [
            ("shop/web", "shop/web", true),
            ("shop/web", "shop/webby", false),
            ("shop/*", "shop/web", true),
            ("shop/*", "shopping/web", false),
            ("*", "a/b", true),
        ];
        for (pattern, path, covered) in rows {
            let id = format!("spiffe://x/{path}").parse().unwrap();
            assert_eq!(pattern.parse::<Pattern>().unwrap().covers(&id), covered, "{pattern} {path}");
        }
        for bad in ["", "/", "a*", "*/a", "shop//x", "a b"] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad:?}");
        }
    }
}
