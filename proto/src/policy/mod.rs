//! The policy that a collector gives to every agent: one document, read by both sides with the same reader.
//!
//! Agents get the text as the operator wrote it. One that holds a word which an agent does not know is not half obeyed:
//! that agent lets nothing through until it is updated.

pub mod address;
pub mod connections;
pub mod difference;
pub mod egress;
pub mod extract;
pub mod gate;
pub mod party;
pub mod trial;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::config::{Faults, FromValue, Reader, Value, load_document};
use crate::identity::SpiffeId;
pub use extract::Extract;
pub use gate::{Alone, Gate, Happening};
use party::Party;

/// Largest text of a policy: it travels within the directive.
pub const MAX_TEXT: usize = 256 << 10;
/// Most tables of one kind, and most names in one list.
const MAX_LIST: usize = 500;
/// What an agent must understand to go by gates.
const GATES: u32 = 3;
/// What it must understand to go by `[[allow]]`, `[[deny]]` and `[[egress]]`.
const CONNECTIONS: u32 = 4;

/// A policy as it is kept and travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// Grows with every change, also when an old text comes back.
    pub version: u64,
    /// The document, TOML, as it was written.
    pub text: String,
    /// What an agent must understand ([`crate::directive::UNDERSTANDS`]) to go by it; 0 in policies from before this was kept.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub needs: u32,
}

impl Applied {
    /// What an agent must understand to go by it.
    pub fn needs(&self) -> u32 {
        self.needs.max(GATES)
    }
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// What it says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// What takes a workload off the data plane.
    pub gates: Vec<Gate>,
    /// Who may talk to whom. Empty: that is left to the agents' own settings.
    pub allow: Vec<connections::Rule>,
    /// Who may not, whatever `allow` says.
    pub deny: Vec<connections::Rule>,
    /// Where workloads may go besides. Empty: that is left to the agents' own settings.
    pub egress: Vec<Egress>,
}

/// One `[[egress]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Egress {
    /// Where it stands.
    pub line: usize,
    /// Whose way out.
    pub from: Vec<Party>,
    /// Where to.
    pub places: Vec<Place>,
}

/// Where somebody may go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where it stands.
    pub line: usize,
    /// As it was written.
    pub text: String,
    /// What it means.
    pub rule: egress::Rule,
}

impl Policy {
    /// Reads a document; everything that is wrong with it at once.
    pub fn parse(text: &str) -> Result<Policy, Faults> {
        if text.len() > MAX_TEXT {
            return Err(Faults(vec![format!("it has {} bytes, the limit is {MAX_TEXT}", text.len())]));
        }
        load_document(text, |reader| {
            let gates = tables(reader, "gate", gate::read);
            contradictions(reader, &gates);
            let (allow, deny) = (tables(reader, "allow", connections::read), tables(reader, "deny", connections::read));
            Policy { gates, allow, deny, egress: tables(reader, "egress", read_egress) }
        })
    }

    /// What an agent must understand ([`crate::directive::UNDERSTANDS`]) to go by it.
    pub fn needs(&self) -> u32 {
        let is_only_gates = self.allow.is_empty() && self.deny.is_empty() && self.egress.is_empty();
        if is_only_gates { GATES } else { CONNECTIONS }
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
}

fn tables<T>(reader: &mut Reader<'_>, key: &'static str, read: impl FnMut(&mut Reader<'_>) -> Option<T>) -> Vec<T> {
    let found = reader.list(key, read);
    if found.len() > MAX_LIST {
        reader.fault(key, format!("stands there {} times, the limit is {MAX_LIST}", found.len()));
    }
    found.into_iter().flatten().collect()
}

/// A list of parties that must be there; an empty one means nobody.
fn parties(reader: &mut Reader<'_>, key: &'static str) -> Option<Vec<Party>> {
    if !reader.has(key) {
        reader
            .fault(key, "is missing: write [\"shop/web\"], [\"shop/*\"], [\"*\"] for every workload, or [\"anybody\"]");
    }
    Some(reader.items(key, MAX_LIST)?.into_iter().map(|(_, party)| party).collect())
}

fn read_egress(reader: &mut Reader<'_>) -> Option<Egress> {
    let line = reader.line();
    let from = parties(reader, "from");
    let is_workload = |party: &Party| matches!(party, Party::Ours(_) | Party::Foreign(..));
    if from.as_ref().is_some_and(|from| !from.iter().all(is_workload)) {
        reader.fault("from", "must be workloads: only who has an agent goes out through one");
    }
    if !reader.has("to") {
        reader.fault("to", "is missing: write [\"api.example.com:443\"]; an empty list is nowhere");
    }
    let places = reader.items::<Written>("to", MAX_LIST)?.into_iter();
    let places = places.map(|(line, Written { text, rule })| Place { line, text, rule }).collect();
    Some(Egress { line, from: from?, places })
}

/// A rule for egress, and how it was written.
struct Written {
    text: String,
    rule: egress::Rule,
}

impl FromValue for Written {
    fn from_text(text: &str) -> Result<Written, String> {
        Ok(Written { text: text.to_owned(), rule: text.parse()? })
    }
}

impl FromValue for Party {
    fn from_text(text: &str) -> Result<Party, String> {
        text.parse()
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
    fn each_word_that_means_nothing_is_told_with_its_own_line() {
        let text = "[[allow]]\nfrom = [\n 'shop web',\n 'shop/a',\n 3,\n]\nlisteners = [0, 'a b', true]\n\
                    [[deny]]\nto = 'shop/a'\n[[egress]]\nfrom = ['anybody']\nto = ['a']\n[[allows]]\n";
        let told = faults(text);
        let wanted = [
            "line 1: `allow[0].to` is missing",
            "line 3: `allow[0].from[0]`",
            "line 5: `allow[0].from[2]`",
            "line 7: `allow[0].listeners[0]`",
            "line 7: `allow[0].listeners[1]`",
            "line 7: `allow[0].listeners[2]`",
            "line 8: `deny[0].from` is missing",
            "line 9: `deny[0].to` must be a list",
            "line 11: `egress[0].from`",
            "line 12: `egress[0].to[0]`",
            "line 13: `allows` is unknown; did you mean `allow`?",
        ];
        let told: Vec<&str> = told.lines().collect();
        assert_eq!(told.len(), wanted.len(), "{told:#?}");
        for (told, wanted) in told.iter().zip(wanted) {
            assert!(told.starts_with(wanted), "{told} is not: {wanted}");
        }
    }

    #[test]
    fn a_text_that_is_cut_anywhere_is_read_or_refused_and_never_a_panic() {
        let text = "[[gate]]\nname = 'g'\nworkloads = ['shop/*']\nchecks = ['privileged']\nevents = ['privileged_exec']\n\
                    hold = '5m'\nenforce = true\nmax_per_workload = 2\nunreachable = 'keep'\n";
        let text = text.to_owned()
            + "[[allow]]\nfrom = ['shop/*', 'anybody', 'dns:a.example']\nto = ['spiffe://x/y/*']\nlisteners = [8443, 'b.example']\n\
               [[deny]]\nfrom = ['*']\nto = ['a/b']\n[[egress]]\nfrom = ['*']\nto = ['c.example:1-9', '[2001:db8::/32]:*']\n";
        let policy = Policy::parse(&text).unwrap();
        assert_eq!((policy.gates.len(), policy.allow.len(), policy.deny.len(), policy.egress.len()), (1, 1, 1, 1));
        assert_eq!((policy.needs(), Policy::default().needs()), (4, 3));
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
