//! What changes from one policy to another: by what they mean, not by how they are written. Pure.

use std::collections::BTreeMap;
use std::fmt::Display;

use super::connections::Rule;
use super::gate::Gate;
use super::{Egress, Policy};

/// More pairs of one kind than this are not taken apart: a rule is then compared as a whole.
const MAX_PAIRS: usize = 20_000;

/// What happened to something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// It is new; its line is one of the new document.
    Added,
    /// It is gone; its line was one of the old document.
    Removed,
    /// It means something else; the line is one of the new document.
    Changed,
    /// What follows for everything else.
    Notice,
}

impl Kind {
    /// What stands before it in a list.
    pub const fn sign(self) -> char {
        match self {
            Kind::Added => '+',
            Kind::Removed => '-',
            Kind::Changed => '~',
            Kind::Notice => '!',
        }
    }
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which way.
    pub kind: Kind,
    /// The line, from 1; 0 for what no line says.
    pub line: usize,
    /// What.
    pub text: String,
}

/// What each thing that a document says is called, and its line.
type Said = BTreeMap<String, usize>;

/// Everything that is different in `new`.
pub fn between(old: &Policy, new: &Policy) -> Vec<Change> {
    let mut changes = notices(old, new);
    let pairs = |policy: &Policy| pairs(&policy.allow).max(pairs(&policy.deny)).max(egress_pairs(&policy.egress));
    let apart = pairs(old).max(pairs(new)) <= MAX_PAIRS;
    compare(&connections("allow", &old.allow, apart), &connections("allow", &new.allow, apart), &mut changes);
    compare(&connections("deny", &old.deny, apart), &connections("deny", &new.deny, apart), &mut changes);
    compare(&places(&old.egress, apart), &places(&new.egress, apart), &mut changes);
    gates(old, new, &mut changes);
    changes
}

/// The first line of a kind turns everything else into a refusal, and the last one takes that back.
fn notices(old: &Policy, new: &Policy) -> Vec<Change> {
    let rows = [
        ("[[allow]]", "who may talk to whom", old.allow.is_empty(), new.allow.is_empty()),
        ("[[egress]]", "where workloads may go", old.egress.is_empty(), new.egress.is_empty()),
    ];
    let told = rows.into_iter().filter(|(_, _, old, new)| old != new).map(|(table, what, _, none)| match none {
        true => format!("no {table} is left: {what} is decided by the agents' own settings alone"),
        false => format!("with the first {table}, whatever none of them covers is refused, everywhere"),
    });
    told.map(|text| Change { kind: Kind::Notice, line: 0, text }).collect()
}

fn pairs(rules: &[Rule]) -> usize {
    rules.iter().map(|rule| rule.from.len().saturating_mul(rule.to.len())).sum()
}

fn egress_pairs(egress: &[Egress]) -> usize {
    egress.iter().map(|egress| egress.from.len().saturating_mul(egress.places.len())).sum()
}

fn connections(kind: &str, rules: &[Rule], apart: bool) -> Said {
    let mut said = Said::new();
    for rule in rules {
        let mut listeners: Vec<String> = rule.listeners.iter().map(ToString::to_string).collect();
        listeners.sort();
        let at = if listeners.is_empty() { String::new() } else { format!(" at {}", listeners.join(", ")) };
        for (from, to) in cross(&rule.from, &rule.to, apart) {
            said.entry(format!("{kind} {from} to {to}{at}")).or_insert(rule.line);
        }
    }
    said
}

fn places(egress: &[Egress], apart: bool) -> Said {
    let mut said = Said::new();
    for one in egress {
        let texts: Vec<&String> = one.places.iter().map(|place| &place.text).collect();
        for (from, to) in cross(&one.from, &texts, apart) {
            let place = one.places.iter().find(|place| place.text == to);
            said.entry(format!("egress of {from} to {to}")).or_insert(place.map_or(one.line, |place| place.line));
        }
    }
    said
}

/// Each of the one with each of the other, or all of them at once.
fn cross<A: Display, B: Display>(one: &[A], other: &[B], apart: bool) -> Vec<(String, String)> {
    if apart {
        let each = |a: &A| other.iter().map(|b| (a.to_string(), b.to_string())).collect::<Vec<_>>();
        return one.iter().flat_map(each).collect();
    }
    vec![(sorted(one), sorted(other))]
}

fn sorted<T: Display>(items: &[T]) -> String {
    let mut items: Vec<String> = items.iter().map(T::to_string).collect();
    items.sort();
    items.join(", ")
}

fn compare(old: &Said, new: &Said, changes: &mut Vec<Change>) {
    let only = |these: &Said, those: &Said, kind: Kind| {
        let only = these.iter().filter(|(text, _)| !those.contains_key(*text));
        only.map(|(text, line)| Change { kind, line: *line, text: text.clone() }).collect::<Vec<_>>()
    };
    changes.extend(only(old, new, Kind::Removed));
    changes.extend(only(new, old, Kind::Added));
}

fn gates(old: &Policy, new: &Policy, changes: &mut Vec<Change>) {
    let named = |policy: &'_ Policy, name: &str| policy.gates.iter().find(|gate| gate.name == name).cloned();
    for gate in old.gates.iter().filter(|gate| named(new, &gate.name).is_none()) {
        changes.push(Change { kind: Kind::Removed, line: gate.line, text: format!("gate {}", gate.name) });
    }
    for gate in &new.gates {
        let (kind, text) = match named(old, &gate.name) {
            None => (
                Kind::Added,
                format!("gate {}: {}", gate.name, terms(gate).map(|(key, is)| format!("{key} {is}")).join(", ")),
            ),
            Some(before) => (Kind::Changed, format!("gate {}: {}", gate.name, changed(&before, gate))),
        };
        if kind == Kind::Added || !text.ends_with(": ") {
            changes.push(Change { kind, line: gate.line, text });
        }
    }
}

fn changed(old: &Gate, new: &Gate) -> String {
    let both = terms(old).into_iter().zip(terms(new)).filter(|(old, new)| old != new);
    both.map(|((key, was), (_, is))| format!("{key} {was} -> {is}")).collect::<Vec<_>>().join(", ")
}

fn terms(gate: &Gate) -> [(&'static str, String); 8] {
    [
        ("workloads", format!("[{}]", sorted(&gate.workloads))),
        ("checks", format!("[{}]", sorted(&gate.checks))),
        ("events", format!("[{}]", sorted(&gate.events.iter().map(|what| what.word()).collect::<Vec<_>>()))),
        ("hold", format!("{}s", gate.hold.as_secs_f64())),
        ("enforce", gate.enforce.to_string()),
        ("max_per_workload", gate.max_per_workload.to_string()),
        ("leave", gate.leave.to_string()),
        ("unreachable", format!("{:?}", gate.unreachable).to_lowercase()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(old: &str, new: &str, expected: &[&str]) {
        let policy = |text: &str| Policy::parse(text).unwrap_or_else(|faults| panic!("{text}: {faults}"));
        let told: Vec<String> = between(&policy(old), &policy(new))
            .into_iter()
            .map(|change| format!("{}{} {}", change.kind.sign(), change.line, change.text))
            .collect();
        assert_eq!(told, expected, "{old}\n{new}");
    }

    #[test]
    fn what_means_the_same_is_no_difference() {
        let one = "[[allow]]\nfrom = ['shop/a', 'shop/b']\nto = ['shop/c', 'shop/d']\nlisteners = [1, 2]\n";
        let other = "# moved\n[[allow]]\nto = ['shop/d']\nlisteners = ['2', '1']\nfrom = ['shop/b', 'shop/a']\n\
                     [[allow]]\nfrom = ['shop/a', 'shop/b']\nto = ['shop/c']\nlisteners = [1, 2]\n";
        check(one, other, &[]);
        check("", "# nothing", &[]);
    }

    #[test]
    fn each_difference_has_the_line_of_the_document_that_says_it() {
        let old = "[[allow]]\nfrom = ['shop/a']\nto = ['shop/c']\n";
        let new = "\n\n[[allow]]\nfrom = ['shop/b']\nto = ['shop/c']\nlisteners = [8443]\n[[deny]]\nfrom = ['*']\nto = ['shop/x']\n";
        check(old, new, &["-1 allow shop/a to shop/c", "+3 allow shop/b to shop/c at 8443", "+7 deny * to shop/x"]);
        let gate = |more: &str| format!("[[gate]]\nname = 'g'\nchecks = ['privileged']\n{more}");
        check(
            &gate(""),
            &gate("hold = '60s'\nenforce = true\n"),
            &["~1 gate g: hold 600s -> 60s, enforce false -> true"],
        );
        check(&gate(""), "", &["-1 gate g"]);
        check(&gate(""), &format!("\n{}", gate("")), &[]);
    }

    #[test]
    fn the_first_and_the_last_line_of_a_kind_are_told_with_what_follows() {
        let egress = "[[egress]]\nfrom = ['*']\nto = [\n 'api.example.com:443',\n]\n";
        let first = "!0 with the first [[egress]], whatever none of them covers is refused, everywhere";
        check("", egress, &[first, "+4 egress of * to api.example.com:443"]);
        let last = "!0 no [[egress]] is left: where workloads may go is decided by the agents' own settings alone";
        check(egress, "", &[last, "-4 egress of * to api.example.com:443"]);
    }

    #[test]
    fn the_longest_document_is_compared_without_taking_every_pair_apart() {
        let names = |word: &str| (0..400).map(|i| format!("'{word}/{i}'")).collect::<Vec<_>>().join(", ");
        let rule = format!("[[allow]]\nfrom = [{}]\nto = [{}]\n", names("a"), names("b"));
        let text = rule.repeat(20);
        let changes = between(&Policy::parse(&text).unwrap(), &Policy::parse(&format!("\n{text}")).unwrap());
        assert_eq!(changes, []);
    }
}
