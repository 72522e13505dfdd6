//! Who may talk to whom: `[[allow]]` and `[[deny]]`. Pure.
//!
//! A document without `[[allow]]` leaves that to the agents' own settings; with one, whatever no `[[allow]]` lets through
//! is refused. `[[deny]]` goes before. An agent's own settings must allow a connection, too.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::egress::Host;
use super::party::{Index, Party, Who};
use super::{MAX_LIST, Policy, parties};
use crate::config::{FromValue, Reader, Value};
use crate::identity::{SpiffeId, TrustDomain};

/// One `[[allow]]` or `[[deny]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Where it stands.
    pub line: usize,
    /// Who calls.
    pub from: Vec<Party>,
    /// Who is called.
    pub to: Vec<Party>,
    /// Only at these listeners of who is called; at all of them if there are none.
    pub listeners: Vec<Listener>,
}

/// What a listener is called.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Listener {
    /// Its port.
    Port(u16),
    /// The host name that is asked for there (`server_name`).
    Name(String),
}

impl FromStr for Listener {
    type Err = String;

    fn from_str(text: &str) -> Result<Listener, String> {
        if let Some(port) = text.parse().ok().filter(|port| *port != 0) {
            return Ok(Listener::Port(port));
        }
        match Host::parse(text.strip_prefix("*.").unwrap_or(text)) {
            Ok(Host::Name(_)) => Ok(Listener::Name(text.to_ascii_lowercase())),
            _ => {
                let shown: String = text.chars().take(80).collect();
                Err(format!("`{shown}` is neither a port nor a `server_name`"))
            }
        }
    }
}

impl FromValue for Listener {
    fn from_value(value: &Value) -> Result<Listener, String> {
        match value {
            Value::Integer(port) => Listener::from_text(&port.to_string()),
            Value::String(text) => Listener::from_text(text),
            other => Err(format!("must be a port or a `server_name`, not {}", other.type_str())),
        }
    }

    fn from_text(text: &str) -> Result<Listener, String> {
        text.parse()
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listener::Port(port) => write!(f, "{port}"),
            Listener::Name(name) => f.write_str(name),
        }
    }
}

/// Where somebody comes in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct At {
    /// The port of the agent's listener.
    pub port: u16,
    /// Its `server_name`, where several share the port.
    pub server_name: Option<String>,
}

impl At {
    fn is(&self, listener: &Listener) -> bool {
        match listener {
            Listener::Port(port) => *port == self.port,
            Listener::Name(name) => self.server_name.as_ref() == Some(name),
        }
    }
}

impl Rule {
    /// Whether it is about these two, at some listener.
    pub fn covers(&self, from: Who<'_>, to: Who<'_>, domain: &TrustDomain) -> bool {
        let is_among = |parties: &[Party], who: Who<'_>| parties.iter().any(|party| party.covers(who, domain));
        is_among(&self.from, from) && is_among(&self.to, to)
    }
}

/// Reads one.
pub(super) fn read(reader: &mut Reader<'_>) -> Option<Rule> {
    let line = reader.line();
    let (from, to) = (parties(reader, "from"), parties(reader, "to"));
    let listeners = reader.items("listeners", MAX_LIST);
    let listeners = listeners?.into_iter().map(|(_, listener)| listener).collect();
    Some(Rule { line, from: from?, to: to?, listeners })
}

/// The answer about one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The policy has no word about who may talk to whom.
    Silent,
    /// This line allows it.
    Allowed(usize),
    /// This line denies it.
    Denied(usize),
    /// No line allows it.
    Unlisted,
}

impl Answer {
    /// Whether the policy lets it through.
    pub fn is_allowed(self) -> bool {
        matches!(self, Answer::Silent | Answer::Allowed(_))
    }
}

/// A line, and where it holds.
#[derive(Clone, Debug)]
struct Hit {
    line: usize,
    listeners: Arc<[Listener]>,
}

/// What the policy says about one workload as the end of connections, ready to be asked for each of them.
#[derive(Clone, Debug, Default)]
pub struct Side {
    deny: Index<Hit>,
    /// Nothing, where the policy has no `[[allow]]`.
    allow: Option<Index<Hit>>,
    /// The lines that are about this workload, though maybe not about its peer.
    about: Vec<usize>,
}

impl Side {
    /// For connections to `own`.
    pub fn called(policy: &Policy, own: &SpiffeId, domain: &TrustDomain) -> Side {
        Side::of(policy, own, domain, |rule| (&rule.to, &rule.from))
    }

    /// For connections of `own` to others.
    pub fn calling(policy: &Policy, own: &SpiffeId, domain: &TrustDomain) -> Side {
        Side::of(policy, own, domain, |rule| (&rule.from, &rule.to))
    }

    fn of(
        policy: &Policy,
        own: &SpiffeId,
        domain: &TrustDomain,
        ends: impl Fn(&Rule) -> (&Vec<Party>, &Vec<Party>),
    ) -> Side {
        let is_about = |rule: &&Rule| ends(rule).0.iter().any(|party| party.covers(Who::Workload(own), domain));
        let indexed = |rules: &[Rule]| {
            let mut index = Index::default();
            for rule in rules.iter().filter(is_about) {
                let listeners: Arc<[Listener]> = rule.listeners.clone().into();
                for party in ends(rule).1 {
                    index.add(party, domain, Hit { line: rule.line, listeners: listeners.clone() });
                }
            }
            index
        };
        let allow = (!policy.allow.is_empty()).then(|| indexed(&policy.allow));
        let about = policy.allow.iter().filter(is_about).map(|rule| rule.line).collect();
        Side { deny: indexed(&policy.deny), allow, about }
    }

    /// Whether `peer` may be at the other end; `at` is where it comes in. Whoever calls does not know what the listener over
    /// there is called: lines with listeners are then left to who is called.
    pub fn judge(&self, peer: Who<'_>, at: Option<&At>) -> Answer {
        let holds = |hit: &&Hit, unknown: bool| {
            hit.listeners.is_empty() || at.map_or(unknown, |at| hit.listeners.iter().any(|listener| at.is(listener)))
        };
        let first = |index: &Index<Hit>, unknown: bool| {
            index.about(peer).filter(|hit| holds(hit, unknown)).map(|hit| hit.line).min()
        };
        if let Some(line) = first(&self.deny, false) {
            return Answer::Denied(line);
        }
        match &self.allow {
            None => Answer::Silent,
            Some(allow) => first(allow, true).map_or(Answer::Unlisted, Answer::Allowed),
        }
    }

    /// Where `peer` may be at the other end, as far as that depends on the listener.
    pub fn limits<'a>(&'a self, peer: Who<'a>) -> Limits<'a> {
        let listeners = |index: &'a Index<Hit>| index.about(peer).flat_map(|hit| hit.listeners.iter()).collect();
        let is_limited = |index: &&'a Index<Hit>| index.about(peer).all(|hit| !hit.listeners.is_empty());
        Limits { denied: listeners(&self.deny), allowed: self.allow.as_ref().filter(is_limited).map(listeners) }
    }

    /// The first lines that are about this workload, for whoever finds no line about its peer.
    pub fn lines_about(&self) -> &[usize] {
        &self.about[..self.about.len().min(5)]
    }
}

/// At which listeners alone somebody may come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits<'a> {
    denied: BTreeSet<&'a Listener>,
    /// Nothing, where it is allowed at all others.
    allowed: Option<BTreeSet<&'a Listener>>,
}

impl Limits<'_> {
    /// Whether one of the listeners that were open `before` is not.
    pub fn are_narrower_than(&self, before: &Limits<'_>) -> bool {
        let fewer = match (&self.allowed, &before.allowed) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(now), Some(before)) => !before.is_subset(now),
        };
        fewer || !self.denied.is_subset(&before.denied)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", listed(&self.from), listed(&self.to))?;
        if self.listeners.is_empty() { Ok(()) } else { write!(f, " at {}", listed(&self.listeners)) }
    }
}

/// The first few, and how many more.
fn listed<T: fmt::Display>(items: &[T]) -> String {
    const SHOWN: usize = 8;
    let mut shown: Vec<String> = items.iter().take(SHOWN).map(T::to_string).collect();
    match items.len() {
        0 => return "nobody".into(),
        more if more > SHOWN => shown.push(format!("and {} more", more - SHOWN)),
        _ => {}
    }
    shown.join(", ")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WHO: [&str; 6] = ["shop/a", "shop/b", "bank/a", "shop/*", "*", "anybody"];

    fn rules(kind: &str, picked: &[(usize, usize, usize)]) -> String {
        let rule = |(from, to, at): &(usize, usize, usize)| {
            let listeners = ["", "listeners = [1]\n", "listeners = ['x.example']\n"][at % 3];
            format!("[[{kind}]]\nfrom = ['{}']\nto = ['{}']\n{listeners}", WHO[from % 6], WHO[to % 6])
        };
        picked.iter().map(rule).collect()
    }

    /// The plain reading of the document, rule by rule.
    fn plainly(policy: &Policy, from: &SpiffeId, to: &SpiffeId, at: &At, domain: &TrustDomain) -> Answer {
        let covers = |rule: &&Rule| {
            let here = rule.listeners.is_empty() || rule.listeners.iter().any(|listener| at.is(listener));
            rule.covers(Who::Workload(from), Who::Workload(to), domain) && here
        };
        if let Some(rule) = policy.deny.iter().find(covers) {
            return Answer::Denied(rule.line);
        }
        match policy.allow.iter().find(covers) {
            Some(rule) => Answer::Allowed(rule.line),
            None if policy.allow.is_empty() => Answer::Silent,
            None => Answer::Unlisted,
        }
    }

    proptest! {
        #[test]
        fn what_is_asked_for_each_connection_says_what_the_document_says(
            allow in prop::collection::vec((0..6usize, 0..6usize, 0..3usize), 0..5),
            deny in prop::collection::vec((0..6usize, 0..6usize, 0..3usize), 0..3),
            from in 0..3usize,
            to in 0..3usize,
            port in 1..3u16,
            named: bool,
        ) {
            let domain: TrustDomain = "td".parse().unwrap();
            let policy = Policy::parse(&(rules("allow", &allow) + &rules("deny", &deny))).unwrap();
            let (from, to) = (domain.workload(WHO[from]).unwrap(), domain.workload(WHO[to]).unwrap());
            let at = At { port, server_name: named.then(|| "x.example".to_owned()) };
            let expected = plainly(&policy, &from, &to, &at, &domain);
            let called = Side::called(&policy, &to, &domain).judge(Who::Workload(&from), Some(&at));
            prop_assert_eq!(called, expected);
            // Who calls refuses nothing that who is called would let in.
            let calling = Side::calling(&policy, &from, &domain).judge(Who::Workload(&to), None);
            prop_assert!(calling.is_allowed() || !expected.is_allowed(), "{:?} {:?}", calling, expected);
        }
    }

    #[test]
    fn listeners_are_ports_or_names() {
        for (text, good) in [
            ("8443", true),
            ("orders.example", true),
            ("*.example", true),
            ("0", false),
            ("70000", false),
            ("", false),
            ("a b", false),
        ] {
            assert_eq!(text.parse::<Listener>().is_ok(), good, "{text:?}");
        }
    }
}
