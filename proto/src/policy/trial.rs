//! Would it be allowed, and by which line: what a policy says about one made-up case. Pure, and by the same code that
//! agents ask.

use std::net::IpAddr;

use super::connections::{Answer, At, Listener, Rule, Side};
use super::egress::{Host, List, Target, Way};
use super::gate::{Gate, Happening, Seen};
use super::party::Who;
use super::{Place, Policy};
use crate::identity::{SpiffeId, TrustDomain};

/// A case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Case {
    /// Somebody calls somebody.
    Connection {
        /// Who calls.
        from: Somebody,
        /// Who is called.
        to: Somebody,
        /// Where it comes in there, if that is asked, too.
        listener: Option<Listener>,
    },
    /// A workload goes to a place that is no peer.
    Egress {
        /// Which workload.
        from: SpiffeId,
        /// Where to.
        target: Target,
        /// What its name leads to, if that is asked, too.
        address: Option<IpAddr>,
    },
    /// A check has a verdict.
    Verdict {
        /// Of which workload.
        workload: SpiffeId,
        /// The check's slug.
        check: String,
        /// The verdict.
        seen: Seen,
    },
    /// Something happens in a container.
    Event {
        /// Of which workload.
        workload: SpiffeId,
        /// What.
        what: Happening,
    },
}

/// Somebody in a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Somebody {
    /// A workload.
    Workload(SpiffeId),
    /// Somebody with this DNS name.
    Dns(Vec<String>),
    /// Somebody without a proven name.
    Unproven,
}

impl Somebody {
    /// `shop/web` of `domain`, a whole SPIFFE ID, `dns:api.example`, or `unproven`.
    pub fn parse(text: &str, domain: &TrustDomain) -> Result<Somebody, String> {
        if text == "unproven" {
            return Ok(Somebody::Unproven);
        }
        if let Some(name) = text.strip_prefix("dns:") {
            return match Host::parse(name)? {
                Host::Name(name) => Ok(Somebody::Dns(vec![name])),
                Host::Address(_) => Err(format!("`{text}` is an address: certificates have names")),
            };
        }
        let id = if text.starts_with("spiffe://") { text.parse() } else { domain.workload(text) };
        id.map(Somebody::Workload).map_err(|error| error.to_string())
    }

    /// As lines of a policy see it.
    pub fn who(&self) -> Who<'_> {
        match self {
            Somebody::Workload(id) => Who::Workload(id),
            Somebody::Dns(names) => Who::Dns(names),
            Somebody::Unproven => Who::Unproven,
        }
    }
}

/// What the policy says. An agent's own settings must allow it, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Nothing against it.
    Allowed,
    /// It depends on what the case leaves open.
    Depends,
    /// No.
    Refused,
}

impl Outcome {
    /// The word for people and JSON.
    pub const fn word(self) -> &'static str {
        match self {
            Outcome::Allowed => "allowed",
            Outcome::Depends => "depends",
            Outcome::Refused => "refused",
        }
    }
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    /// Whether.
    pub outcome: Outcome,
    /// Why: a line of the document, or 0 for what no single line says, and words.
    pub because: Vec<(usize, String)>,
}

impl Tried {
    fn new(outcome: Outcome, because: Vec<(usize, String)>) -> Tried {
        Tried { outcome, because }
    }

    fn one(outcome: Outcome, line: usize, words: impl Into<String>) -> Tried {
        Tried::new(outcome, vec![(line, words.into())])
    }
}

impl Policy {
    /// What it says about `case`; `domain` is the one that it is for.
    pub fn try_case(&self, case: &Case, domain: &TrustDomain) -> Tried {
        match case {
            Case::Connection { from, to, listener } => self.try_connection(from, to, listener.as_ref(), domain),
            Case::Egress { from, target, address } => self.try_egress(from, target, *address, domain),
            Case::Verdict { workload, check, seen } => {
                self.try_gates(workload, *seen, |gate| gate.checks.contains(check))
            }
            Case::Event { workload, what } => self.try_gates(workload, Seen::Broken, |gate| gate.events.contains(what)),
        }
    }

    /// Both agents judge: the one that calls, and the one that is called.
    fn try_connection(
        &self,
        from: &Somebody,
        to: &Somebody,
        listener: Option<&Listener>,
        domain: &TrustDomain,
    ) -> Tried {
        // What is not said is at first no listener's.
        let at = match listener {
            Some(Listener::Port(port)) => At { port: *port, server_name: None },
            Some(Listener::Name(name)) => At { port: 0, server_name: Some(name.clone()) },
            None => At::default(),
        };
        let mut answers = Vec::new();
        if let Somebody::Workload(id) = from {
            let side = Side::calling(self, id, domain);
            answers.push((side.judge(to.who(), None), side.lines_about().to_vec()));
        }
        if let Somebody::Workload(id) = to {
            let side = Side::called(self, id, domain);
            answers.push((side.judge(from.who(), Some(&at)), side.lines_about().to_vec()));
        }
        // Who refuses counts, and who is called knows more.
        let worst = answers.into_iter().rev().min_by_key(|(answer, _)| answer.is_allowed());
        let Some((answer, about)) = worst else {
            return Tried::one(Outcome::Allowed, 0, "neither side has an agent that would judge it");
        };
        let somewhere = |rule: &&Rule| !rule.listeners.is_empty() && rule.covers(from.who(), to.who(), domain);
        if !matches!(to, Somebody::Workload(_)) {
            return self.told_of_the_agentless(answer, about, self.deny.iter().find(somewhere));
        }
        let maybe = |rule: &&Rule| somewhere(rule) && rule.listeners.iter().any(|other| is_open(listener, other));
        let (rules, word) = match answer {
            Answer::Denied(_) => return self.told(answer, about),
            Answer::Silent | Answer::Allowed(_) => (&self.deny, "denies"),
            Answer::Unlisted => (&self.allow, "allows"),
        };
        match rules.iter().find(maybe) {
            Some(rule) => Tried::one(Outcome::Depends, rule.line, format!("{word} it at some listeners: {rule}")),
            None => self.told(answer, about),
        }
    }

    /// Nobody over there looks at listeners.
    fn told_of_the_agentless(&self, answer: Answer, about: Vec<usize>, limited_deny: Option<&Rule>) -> Tried {
        let mut tried = self.told(answer, about);
        let unseen = "has `listeners`, which nobody looks at where no agent is called";
        if let Answer::Allowed(line) = answer
            && self.allow.iter().any(|rule| rule.line == line && !rule.listeners.is_empty())
        {
            tried.because.push((line, format!("{unseen}: it allows every one")));
        }
        if let Some(rule) = limited_deny.filter(|_| answer.is_allowed()) {
            tried.because.push((rule.line, format!("{unseen}: it denies none")));
        }
        tried
    }

    fn told(&self, answer: Answer, about: Vec<usize>) -> Tried {
        let rule = |line: usize| self.allow.iter().chain(&self.deny).find(|rule| rule.line == line);
        let words = |line: usize| rule(line).map(Rule::to_string).unwrap_or_default();
        match answer {
            Answer::Silent => {
                let words = "the policy has no [[allow]]: the agents' own settings decide alone";
                Tried::one(Outcome::Allowed, 0, words)
            }
            Answer::Allowed(line) => Tried::one(Outcome::Allowed, line, format!("allows it: {}", words(line))),
            Answer::Denied(line) => Tried::one(Outcome::Refused, line, format!("denies it: {}", words(line))),
            Answer::Unlisted => {
                let near = about.into_iter().map(|line| (line, format!("does not cover it: {}", words(line))));
                let none = (0, "no [[allow]] covers it, and the policy has some".to_owned());
                Tried::new(Outcome::Refused, std::iter::once(none).chain(near).collect())
            }
        }
    }

    fn try_egress(&self, from: &SpiffeId, target: &Target, address: Option<IpAddr>, domain: &TrustDomain) -> Tried {
        if self.egress.is_empty() {
            let words = "the policy has no [[egress]]: the agents' own settings decide alone";
            return Tried::one(Outcome::Allowed, 0, words);
        }
        let is_about = |egress: &&super::Egress| egress.from.iter().any(|p| p.covers(Who::Workload(from), domain));
        let places: Vec<&Place> = self.egress.iter().filter(is_about).flat_map(|egress| &egress.places).collect();
        let tried: Vec<(Outcome, &Place)> =
            places.iter().map(|place| (try_place(place, target, address), *place)).collect();
        if let Some((_, place)) = tried.iter().find(|(outcome, _)| *outcome == Outcome::Allowed) {
            return Tried::one(Outcome::Allowed, place.line, format!("allows it: {}", place.text));
        }
        let depends = tried.iter().filter(|(outcome, _)| *outcome == Outcome::Depends);
        let depends: Vec<(usize, String)> = depends
            .map(|(_, place)| (place.line, format!("allows it if its name leads there: {}", place.text)))
            .collect();
        if !depends.is_empty() {
            return Tried::new(Outcome::Depends, depends);
        }
        let near = self.egress.iter().filter(is_about).map(|egress| (egress.line, "does not cover it".to_owned()));
        let none = (0, "no [[egress]] covers it, and the policy has some".to_owned());
        Tried::new(Outcome::Refused, std::iter::once(none).chain(near.take(5)).collect())
    }

    fn try_gates(&self, workload: &SpiffeId, seen: Seen, asks: impl Fn(&Gate) -> bool) -> Tried {
        let gates: Vec<&Gate> = self.gates_of(workload).filter(|gate| asks(gate)).collect();
        if gates.is_empty() {
            return Tried::one(Outcome::Allowed, 0, "no gate asks for it");
        }
        let outcome = |gate: &&Gate| match seen {
            Seen::Broken if gate.enforce => Outcome::Refused,
            _ => Outcome::Allowed,
        };
        let worst = gates.iter().map(outcome).max().unwrap_or(Outcome::Allowed);
        Tried::new(worst, gates.iter().map(|gate| (gate.line, words(gate, seen))).collect())
    }
}

/// Whether a listener that is asked for may be this one as well: it has a port and maybe a name, and one of them is said.
fn is_open(asked: Option<&Listener>, other: &Listener) -> bool {
    match asked {
        None => true,
        Some(asked) => matches!(asked, Listener::Port(_)) != matches!(other, Listener::Port(_)),
    }
}

fn words(gate: &Gate, seen: Seen) -> String {
    let Gate { name, max_per_workload, leave, .. } = gate;
    match seen {
        Seen::Broken if gate.enforce => format!(
            "the gate {name} takes the instance off the data plane; at most {max_per_workload} of a workload at a time, and {leave} connected are let be"
        ),
        Seen::Broken => {
            format!("the gate {name} would take the instance off the data plane, and only tells (`enforce`)")
        }
        Seen::Kept => format!("the gate {name} is kept"),
        Seen::Unclear => format!("the gate {name} neither closes nor opens for what cannot be told"),
    }
}

fn try_place(place: &Place, target: &Target, address: Option<IpAddr>) -> Outcome {
    let list = List { rules: vec![place.rule.clone()] };
    match (list.consider(target), address) {
        (Err(_), _) => Outcome::Refused,
        (Ok(Way::Dial(_)), _) => Outcome::Allowed,
        (Ok(Way::Resolve), Some(ip)) if list.choose(target, &[ip]).is_ok() => Outcome::Allowed,
        (Ok(Way::Resolve), Some(_)) => Outcome::Refused,
        (Ok(Way::Resolve), None) if list.consider_unresolved(target).is_ok() => Outcome::Allowed,
        (Ok(Way::Resolve), None) => Outcome::Depends,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
[[allow]]
from = ['shop/web', 'dns:api.partner.example']
to = ['shop/orders']
listeners = [8443, 'orders.example']

[[allow]]
from = ['shop/orders']
to = ['shop/*', 'spiffe://partner/pay/card', 'dns:db.example.com']

[[deny]]
from = ['shop/orders']
to = ['shop/legacy']

[[egress]]
from = ['shop/*']
to = [
  'api.example.com:443',
  '10.0.0.0/8:5432',
]

[[gate]]
name = 'g'
checks = ['privileged']
events = ['shell']
enforce = true

[[gate]]
name = 'told'
workloads = ['bank/*']
checks = ['privileged']

[[deny]]
from = ['*']
to = ['shop/db']
listeners = [22]

[[deny]]
from = ['*']
to = ['shop/admin']
listeners = ['admin.example']

[[allow]]
from = ['shop/cache']
to = ['shop/queue']
listeners = [8443]

[[allow]]
from = ['shop/cache']
to = ['shop/queue']
";

    fn domain() -> TrustDomain {
        "td".parse().unwrap()
    }

    fn check(case: &Case, outcome: Outcome, line: usize) {
        let policy = Policy::parse(TEXT).unwrap_or_else(|faults| panic!("{faults}"));
        let tried = policy.try_case(case, &domain());
        assert_eq!((tried.outcome, tried.because[0].0), (outcome, line), "{case:?}: {tried:?}");
    }

    fn connection(from: &str, to: &str, listener: &str) -> Case {
        let somebody = |text: &str| Somebody::parse(text, &domain()).unwrap();
        let listener = (!listener.is_empty()).then(|| listener.parse().unwrap());
        Case::Connection { from: somebody(from), to: somebody(to), listener }
    }

    #[test]
    fn connections_are_allowed_by_a_line_denied_by_a_line_or_by_none() {
        use Outcome::{Allowed, Depends, Refused};
        for (from, to, listener, outcome, line) in [
            ("shop/web", "shop/orders", "8443", Allowed, 1),
            ("shop/web", "shop/orders", "orders.example", Allowed, 1),
            // There may be a listener of the name on the port, and the name may be on another port.
            ("shop/web", "shop/orders", "9443", Depends, 1),
            ("shop/web", "shop/orders", "other.example", Depends, 1),
            ("shop/web", "shop/orders", "", Depends, 1),
            ("dns:api.partner.example", "shop/orders", "8443", Allowed, 1),
            ("dns:other.example", "shop/orders", "8443", Refused, 0),
            ("spiffe://partner/shop/web", "shop/orders", "8443", Refused, 0),
            ("unproven", "shop/orders", "8443", Refused, 0),
            ("shop/orders", "shop/cache", "", Allowed, 6),
            ("shop/orders", "shop/db", "23", Allowed, 6),
            ("shop/orders", "shop/legacy", "", Refused, 10),
            ("shop/orders", "spiffe://partner/pay/card", "", Allowed, 6),
            ("shop/orders", "dns:db.example.com", "", Allowed, 6),
            ("shop/orders", "bank/core", "", Refused, 0),
            ("shop/orders", "shop/db", "22", Refused, 32),
            ("shop/orders", "shop/db", "", Depends, 32),
            ("shop/orders", "shop/db", "db.example", Depends, 32),
            ("shop/orders", "shop/admin", "8443", Depends, 37),
            ("shop/orders", "shop/admin", "admin.example", Refused, 37),
            ("shop/orders", "shop/admin", "other.example", Allowed, 6),
            ("shop/cache", "shop/queue", "", Allowed, 47),
            ("shop/cache", "shop/queue", "9443", Allowed, 47),
        ] {
            check(&connection(from, to, listener), outcome, line);
        }
    }

    #[test]
    fn listeners_of_who_has_no_agent_are_said_to_be_looked_at_by_nobody() {
        let text = "[[allow]]\nfrom = ['shop/web']\nto = ['dns:db.example.com']\nlisteners = [5432]\n\
                    [[deny]]\nfrom = ['shop/web']\nto = ['dns:db.example.com']\nlisteners = [22]\n";
        let policy = Policy::parse(text).unwrap();
        for listener in ["5432", "22", "80", ""] {
            let tried = policy.try_case(&connection("shop/web", "dns:db.example.com", listener), &domain());
            let lines: Vec<usize> = tried.because.iter().map(|(line, _)| *line).collect();
            assert_eq!((tried.outcome, &lines[..]), (Outcome::Allowed, &[1, 1, 5][..]), "{listener}: {tried:?}");
            assert!(tried.because[1].1.contains("allows every one") && tried.because[2].1.contains("denies none"));
        }
        let other = policy.try_case(&connection("shop/web", "dns:x.example", "5432"), &domain());
        assert_eq!((other.outcome, other.because.len()), (Outcome::Refused, 1 + 1), "{other:?}");
    }

    #[test]
    fn who_is_near_is_named_where_no_line_fits() {
        let policy = Policy::parse(TEXT).unwrap();
        let tried = policy.try_case(&connection("shop/other", "shop/orders", "8443"), &domain());
        let lines: Vec<usize> = tried.because.iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, [0, 1, 6], "{tried:?}");
    }

    #[test]
    fn without_lines_the_agents_settings_decide_alone() {
        let silent = Policy::parse("[[deny]]\nfrom = ['shop/a']\nto = ['shop/b']").unwrap();
        let tried = |from: &str| silent.try_case(&connection(from, "shop/b", ""), &domain()).outcome;
        assert_eq!((tried("shop/c"), tried("shop/a")), (Outcome::Allowed, Outcome::Refused));
        let nobody = Policy::parse("[[allow]]\nfrom = []\nto = ['*']").unwrap();
        let refused = nobody.try_case(&connection("shop/c", "shop/b", ""), &domain());
        assert_eq!(refused.outcome, Outcome::Refused, "an empty list is nobody");
        let from: SpiffeId = "spiffe://td/shop/web".parse().unwrap();
        let target = Target { host: Host::parse("x.example").unwrap(), port: 1 };
        let egress = silent.try_case(&Case::Egress { from, target, address: None }, &domain());
        assert_eq!(egress.outcome, Outcome::Allowed);
    }

    #[test]
    fn egress_is_allowed_by_the_line_of_its_place() {
        use Outcome::{Allowed, Depends, Refused};
        for (from, host, port, address, outcome, line) in [
            ("shop/web", "api.example.com", 443, "", Allowed, 17),
            ("shop/web", "api.example.com", 80, "", Refused, 0),
            ("shop/web", "10.1.2.3", 5432, "", Allowed, 18),
            ("shop/web", "db.internal", 5432, "", Depends, 18),
            ("shop/web", "db.internal", 5432, "10.9.9.9", Allowed, 18),
            ("shop/web", "db.internal", 5432, "192.0.2.1", Refused, 0),
            ("shop/web", "api.example.com", 443, "127.0.0.1", Refused, 0),
            ("bank/core", "api.example.com", 443, "", Refused, 0),
        ] {
            let from = domain().workload(from).unwrap();
            let target = Target { host: Host::parse(host).unwrap(), port };
            check(&Case::Egress { from, target, address: address.parse().ok() }, outcome, line);
        }
    }

    #[test]
    fn verdicts_and_events_meet_the_gates_that_ask_for_them() {
        use Outcome::{Allowed, Refused};
        for (workload, check_name, seen, outcome, line) in [
            ("shop/web", "privileged", Seen::Broken, Refused, 21),
            ("shop/web", "privileged", Seen::Kept, Allowed, 21),
            ("shop/web", "privileged", Seen::Unclear, Allowed, 21),
            ("shop/web", "docker-socket", Seen::Broken, Allowed, 0),
        ] {
            let workload = domain().workload(workload).unwrap();
            check(&Case::Verdict { workload, check: check_name.into(), seen }, outcome, line);
        }
        let workload = domain().workload("bank/core").unwrap();
        check(&Case::Event { workload: workload.clone(), what: Happening::Shell }, Refused, 21);
        check(&Case::Event { workload, what: Happening::Exec }, Allowed, 0);
    }
}
