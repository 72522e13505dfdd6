//! Who trusts whom: what agents say they hold, beside what they were told. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sidewarden_proto::directive::Directive;
use sidewarden_proto::enrol::Der;
use sidewarden_proto::event::{TrustChanged, TrustedRoot};
use sidewarden_proto::identity::{AgentId, Sha256, TrustDomain, describe};
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
    /// Whether its certificate is of another CA than the collectors'.
    pub elsewhere: bool,
}

/// This collector: whose agents it lets in.
#[derive(Clone, Debug)]
pub struct Door<'a> {
    /// How it is called.
    pub name: String,
    /// Other trust domains whose agents may come in.
    pub admitted: &'a [TrustDomain],
    /// What ends first of its own certificates.
    pub first_to_end: Option<(Timestamp, String)>,
}

/// One cell: an agent and those it should trust.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Cell {
    /// It holds every root that it was told of.
    Trusts,
    /// It holds those of the other CA of this domain, which its own certificate is of, and none of the collectors' CA: it was told
    /// so by whoever gave it the certificate.
    OtherCa,
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

/// Compares what agents hold with `directive`; the collector's own row comes first.
pub fn matrix(told: &[Told], directive: &Directive, door: &Door<'_>) -> Matrix {
    let expected = expected(directive);
    let held = told.iter().filter_map(|agent| agent.holds.as_ref());
    let by_themselves = held.flat_map(|holds| roots_of(holds).into_iter().filter(|(_, roots)| !roots.is_empty()));
    let all: BTreeSet<String> = expected.keys().cloned().chain(by_themselves.map(|(column, _)| column)).collect();
    let columns: Vec<String> = all.into_iter().collect();
    let further = directive.foreign.domains.get(&directive.trust_domain).map_or(&[][..], Vec::as_slice);
    let other_ca = OtherCa {
        column: directive.trust_domain.to_string(),
        collectors: directive.bundle.iter().map(hash).collect(),
        further: further.iter().map(hash).collect(),
    };
    let agents = told.iter().map(|agent| row(agent, &columns, &expected, &other_ca));
    let rows = [door_row(door, &columns, &expected, directive)].into_iter().chain(agents).collect();
    Matrix { columns, rows }
}

fn hash(der: &Der) -> Sha256 {
    Sha256::of(&[&der.0])
}

/// Who vouches for the collector's domain.
struct OtherCa {
    column: String,
    collectors: Vec<Sha256>,
    further: Vec<Sha256>,
}

impl OtherCa {
    /// Whether somebody goes by the other CA alone.
    fn is_that_of(&self, told: &Told, column: &str, held: &[TrustedRoot]) -> bool {
        let holds = |roots: &[Sha256]| held.iter().any(|root| roots.contains(&root.sha256));
        told.elsewhere && column == self.column && holds(&self.further) && !holds(&self.collectors)
    }
}

/// It holds what it has told: all that counts is whom it lets in.
fn door_row(
    door: &Door<'_>,
    columns: &[String],
    expected: &BTreeMap<String, Vec<Expected>>,
    directive: &Directive,
) -> Row {
    let cell = |column: &String| {
        let admitted = door.admitted.iter().any(|domain| domain.as_str() == column);
        match expected.contains_key(column) {
            _ if *column == directive.trust_domain.as_str() => Cell::Trusts,
            true if admitted => Cell::Trusts,
            _ => Cell::No,
        }
    };
    Row { agent: door.name.clone(), cells: columns.iter().map(cell).collect(), first_to_end: door.first_to_end.clone() }
}

fn expected(directive: &Directive) -> BTreeMap<String, Vec<Expected>> {
    let root = |der: &Der| {
        let sha256 = Sha256::of(&[&der.0]);
        let named = describe(&der.0).map(|found| format!("{}, until {}", found.subject, found.not_after));
        Expected { sha256, words: format!("{} ({})", named.unwrap_or_default(), &sha256.to_string()[..16]) }
    };
    let mut all: BTreeMap<String, Vec<Expected>> =
        BTreeMap::from([(directive.trust_domain.to_string(), directive.bundle.iter().map(root).collect())]);
    for (domain, roots) in &directive.foreign.domains {
        all.entry(domain.to_string()).or_default().extend(roots.iter().map(root));
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

fn row(told: &Told, columns: &[String], expected: &BTreeMap<String, Vec<Expected>>, other_ca: &OtherCa) -> Row {
    let held = told.holds.as_ref().map(roots_of);
    let cell = |column: &String| {
        let Some(held) = &held else { return Cell::NotTold };
        let held = held.get(column).copied().unwrap_or_default();
        let Some(expected) = expected.get(column) else {
            return if held.is_empty() { Cell::No } else { Cell::ByItself };
        };
        let lacks = |root: &&Expected| !held.iter().any(|held| held.sha256 == root.sha256);
        let roots: Vec<String> = expected.iter().filter(lacks).map(|root| root.words.clone()).collect();
        match roots.is_empty() {
            true => Cell::Trusts,
            false if other_ca.is_that_of(told, column, held) => Cell::OtherCa,
            false => Cell::Lacks { roots },
        }
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
    use super::super::made_up::Ca;
    use super::*;
    use sidewarden_proto::directive::ForeignRoots;

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
        Told { agent, holds, certificate_ends: Some(Timestamp::from_secs(500)), elsewhere: false }
    }

    fn door(admitted: &[TrustDomain]) -> Door<'_> {
        Door { name: "the collector".into(), admitted, first_to_end: Some((Timestamp::from_secs(7), "its own".into())) }
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
        let mut found = matrix(&all, &directive, &door(&[]));
        assert_eq!(found.columns, [DNS, "partner.example", "td", "z.example"]);
        let own = found.rows.remove(0);
        assert_eq!(own.cells, [Cell::No, Cell::No, Cell::Trusts, Cell::No], "imported is not admitted");
        assert_eq!(own.first_to_end, Some((Timestamp::from_secs(7), "its own".into())));
        let admits = matrix(&all, &directive, &door(&["partner.example".parse().unwrap()]));
        assert_eq!(admits.rows[0].cells, [Cell::No, Cell::Trusts, Cell::Trusts, Cell::No]);
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
        assert!(matrix(&all[..1], &directive, &door(&[])).is_whole());
    }

    #[test]
    fn who_goes_by_the_other_ca_of_the_domain_lacks_nothing_and_is_shown_as_such() {
        let (own, spire, stranger) = (Ca::new("own"), Ca::new("spire"), Ca::new("stranger"));
        let json = r#"{"version":1,"trust_domain":"td","issued_us":1,"bundle":[]}"#;
        let mut directive: Directive = serde_json::from_str(json).unwrap();
        directive.bundle = vec![Der(own.cert.to_vec())];
        directive.foreign.domains.insert("td".parse().unwrap(), vec![Der(spire.cert.to_vec())]);
        let cell = |holds: &[&Ca], elsewhere| {
            let held: Vec<_> = holds.iter().map(|ca| ("td", *ca, 900)).collect();
            let told = Told { elsewhere, ..told("a", Some(&held)) };
            matrix(&[told], &directive, &door(&[])).rows.remove(1).cells.remove(0)
        };
        let lacks = |cell: Cell| match cell {
            Cell::Lacks { roots } => roots.len(),
            other => panic!("{other:?}"),
        };
        assert_eq!(cell(&[&own, &spire], false), Cell::Trusts);
        assert_eq!(cell(&[&own, &spire], true), Cell::Trusts);
        assert_eq!(cell(&[&spire], true), Cell::OtherCa);
        assert_eq!(lacks(cell(&[&spire], false)), 1, "an enrolled one needs the collectors' CA");
        assert_eq!(lacks(cell(&[&own], true)), 1, "and one of the other CA its own");
        assert_eq!(lacks(cell(&[&stranger], true)), 2);
    }
}
