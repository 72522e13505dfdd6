//! Who trusts whom: what agents say they hold, beside what they were told. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sidewarden_proto::directive::Directive;
use sidewarden_proto::event::{TrustChanged, TrustedRoot};
use sidewarden_proto::identity::{AgentId, Sha256, describe};
use sidewarden_proto::time::Timestamp;

/// How DNS names stand beside trust domains.
pub const DNS: &str = "DNS names";

/// What an agent has said of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Told {
    /// Who.
    pub agent: AgentId,
    /// What it holds; `None` for one that has not said so, as older versions do not.
    pub holds: Option<TrustChanged>,
    /// The end of its own certificate, if that is known.
    pub certificate_ends: Option<Timestamp>,
}

/// One cell: an agent and those it should trust.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Cell {
    /// It holds every root that it was told of.
    Trusts,
    /// It lacks some.
    Lacks {
        /// Which, in words.
        roots: Vec<String>,
    },
    /// It holds roots that this collector did not tell it of.
    ByItself,
    /// It trusts nobody there, and was not told to.
    No,
    /// It has not said.
    NotTold,
}

/// One agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Who.
    pub agent: String,
    /// Whom it trusts, in the order of the columns.
    pub cells: Vec<Cell>,
    /// What ends first of all that it depends on.
    pub first_to_end: Option<(Timestamp, String)>,
}

/// All agents and all that they could trust.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Matrix {
    /// Trust domains, and those with DNS names.
    pub columns: Vec<String>,
    /// Agents.
    pub rows: Vec<Row>,
}

impl Matrix {
    /// Whether nobody lacks anything, as far as that is known.
    pub fn is_whole(&self) -> bool {
        !self.rows.iter().flat_map(|row| &row.cells).any(|cell| matches!(cell, Cell::Lacks { .. } | Cell::NotTold))
    }
}

/// A root that agents should hold.
struct Expected {
    sha256: Sha256,
    words: String,
}

/// Compares what agents hold with `directive`.
pub fn matrix(told: &[Told], directive: &Directive) -> Matrix {
    let expected = expected(directive);
    let held = told.iter().filter_map(|agent| agent.holds.as_ref());
    let by_themselves = held.flat_map(|holds| roots_of(holds).into_iter().filter(|(_, roots)| !roots.is_empty()));
    let all: BTreeSet<String> = expected.keys().cloned().chain(by_themselves.map(|(column, _)| column)).collect();
    let columns: Vec<String> = all.into_iter().collect();
    let rows = told.iter().map(|agent| row(agent, &columns, &expected)).collect();
    Matrix { columns, rows }
}

fn expected(directive: &Directive) -> BTreeMap<String, Vec<Expected>> {
    let root = |der: &sidewarden_proto::enrol::Der| {
        let sha256 = Sha256::of(&[&der.0]);
        let named = describe(&der.0).map(|found| format!("{}, until {}", found.subject, found.not_after));
        Expected { sha256, words: format!("{} ({})", named.unwrap_or_default(), &sha256.to_string()[..16]) }
    };
    let mut all = BTreeMap::from([(directive.trust_domain.to_string(), directive.bundle.iter().map(root).collect())]);
    for (domain, roots) in &directive.foreign.domains {
        all.insert(domain.to_string(), roots.iter().map(root).collect());
    }
    if !directive.foreign.dns.is_empty() {
        all.insert(DNS.into(), directive.foreign.dns.iter().map(root).collect());
    }
    all
}

fn roots_of(holds: &TrustChanged) -> BTreeMap<String, &[TrustedRoot]> {
    let domains = holds.domains.iter().map(|(domain, roots)| (domain.to_string(), roots.as_slice()));
    domains.chain([(DNS.to_owned(), holds.dns_roots.as_slice())]).collect()
}

fn row(told: &Told, columns: &[String], expected: &BTreeMap<String, Vec<Expected>>) -> Row {
    let held = told.holds.as_ref().map(roots_of);
    let cell = |column: &String| {
        let Some(held) = &held else { return Cell::NotTold };
        let held = held.get(column).copied().unwrap_or_default();
        let Some(expected) = expected.get(column) else {
            return if held.is_empty() { Cell::No } else { Cell::ByItself };
        };
        let lacks = |root: &&Expected| !held.iter().any(|held| held.sha256 == root.sha256);
        let roots: Vec<String> = expected.iter().filter(lacks).map(|root| root.words.clone()).collect();
        if roots.is_empty() { Cell::Trusts } else { Cell::Lacks { roots } }
    };
    let roots = held.iter().flatten().flat_map(|(_, roots)| roots.iter());
    let ends = roots.map(|root| (root.not_after_us, root.subject.clone()));
    let own = told.certificate_ends.map(|end| (end, "its own certificate".to_owned()));
    Row {
        agent: told.agent.to_string(),
        cells: columns.iter().map(cell).collect(),
        first_to_end: ends.chain(own).min(),
    }
}

#[cfg(test)]
mod tests {
    use sidewarden_proto::directive::ForeignRoots;
    use sidewarden_proto::enrol::Der;

    use super::super::made_up::Ca;
    use super::*;

    fn held(ca: &Ca, ends: i64) -> TrustedRoot {
        let (sha256, subject) = (Sha256::of(&[&ca.cert]), describe(&ca.cert).unwrap().subject);
        TrustedRoot { sha256, subject, not_after_us: Timestamp::from_secs(ends) }
    }

    fn told(name: &str, holds: Option<&[(&str, &Ca, i64)]>) -> Told {
        let holds = holds.map(|list| {
            let mut body = TrustChanged { domains: BTreeMap::new(), dns_roots: Vec::new() };
            for (column, ca, ends) in list {
                match *column {
                    DNS => body.dns_roots.push(held(ca, *ends)),
                    domain => body.domains.entry(domain.parse().unwrap()).or_default().push(held(ca, *ends)),
                }
            }
            body
        });
        let agent = format!("spiffe://td/shop/{name}#c1").parse().unwrap();
        Told { agent, holds, certificate_ends: Some(Timestamp::from_secs(500)) }
    }

    #[test]
    fn each_agent_is_compared_with_what_it_was_told() {
        let (own, partner, other, host) = (Ca::new("own"), Ca::new("partner"), Ca::new("other"), Ca::new("host"));
        let der = |ca: &Ca| Der(ca.cert.to_vec());
        let domains = BTreeMap::from([("partner.example".parse().unwrap(), vec![der(&partner)])]);
        let directive = Directive {
            version: 1,
            trust_domain: "td".parse().unwrap(),
            issued_us: Timestamp(1),
            bundle: vec![der(&own)],
            deny: vec![],
            revoked: vec![],
            quarantined: vec![],
            released: vec![],
            policy: None,
            foreign: ForeignRoots { domains, dns: vec![der(&host)] },
            renew: Default::default(),
        };
        let all = [
            told("a", Some(&[("td", &own, 900), ("partner.example", &partner, 400), (DNS, &host, 900)])),
            told("b", Some(&[("td", &own, 900), ("partner.example", &other, 900), ("z.example", &other, 900)])),
            told("c", None),
        ];
        let found = matrix(&all, &directive);
        assert_eq!(found.columns, [DNS, "partner.example", "td", "z.example"]);
        assert_eq!(found.rows[0].cells, [Cell::Trusts, Cell::Trusts, Cell::Trusts, Cell::No]);
        assert_eq!(found.rows[0].first_to_end, Some((Timestamp::from_secs(400), "CN=partner".into())));
        let [Cell::Lacks { roots: dns }, Cell::Lacks { roots: lacks }, Cell::Trusts, Cell::ByItself] =
            &found.rows[1].cells[..]
        else {
            panic!("{:?}", found.rows[1])
        };
        assert!(dns[0].starts_with("CN=host") && lacks[0].starts_with("CN=partner"), "{lacks:?}");
        assert_eq!(found.rows[1].first_to_end, Some((Timestamp::from_secs(500), "its own certificate".into())));
        assert_eq!(found.rows[2].cells, vec![Cell::NotTold; 4]);
        assert!(!found.is_whole());
        assert!(matrix(&all[..1], &directive).is_whole());
    }
}
