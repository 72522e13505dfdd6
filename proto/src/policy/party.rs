//! Who is meant by a line of the policy, and how that is found quickly.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use super::Pattern;
use super::egress::Host;
use crate::identity::{PeerName, SpiffeId, TrustDomain};

/// What a line of the policy calls somebody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Party {
    /// Everybody, also who has proven no name (`permissive`, `insecure_trust_all`).
    Anybody,
    /// Workloads of the trust domain that the policy is for.
    Ours(Pattern),
    /// Workloads of another one.
    Foreign(TrustDomain, Pattern),
    /// Who has this DNS name in the certificate, in lower case.
    Dns(String),
}

/// Somebody, as far as proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who<'a> {
    /// A workload.
    Workload(&'a SpiffeId),
    /// Somebody with these DNS names, or a server that was asked for by one.
    Dns(&'a [String]),
    /// Somebody without a proven name.
    Unproven,
}

impl<'a> From<&'a PeerName> for Who<'a> {
    fn from(name: &'a PeerName) -> Who<'a> {
        match name {
            PeerName::Spiffe(id) => Who::Workload(id),
            PeerName::Dns(names) => Who::Dns(names),
        }
    }
}

impl fmt::Display for Who<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::Workload(id) => write!(f, "{id}"),
            Who::Dns(names) => write!(f, "dns:{}", names.join(",")),
            Who::Unproven => f.write_str("somebody without a proven name"),
        }
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Party::Anybody => f.write_str("anybody"),
            Party::Ours(pattern) => write!(f, "{pattern}"),
            Party::Foreign(domain, pattern) => write!(f, "spiffe://{}/{pattern}", domain.as_str()),
            Party::Dns(name) => write!(f, "dns:{name}"),
        }
    }
}

impl FromStr for Party {
    type Err = String;

    fn from_str(text: &str) -> Result<Party, String> {
        if text == "anybody" {
            return Ok(Party::Anybody);
        }
        if let Some(name) = text.strip_prefix("dns:") {
            return match Host::parse(name)? {
                Host::Name(name) => Ok(Party::Dns(name)),
                Host::Address(_) => Err(format!("`{text}` is an address: certificates have names")),
            };
        }
        let Some(rest) = text.strip_prefix("spiffe://") else { return text.parse().map(Party::Ours) };
        let (domain, path) = rest.split_once('/').ok_or_else(|| format!("`{}` names no workload", shown(text)))?;
        let domain = domain.parse::<TrustDomain>().map_err(|error| error.to_string())?;
        Ok(Party::Foreign(domain, path.parse()?))
    }
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

impl Party {
    /// Whether `who` is meant; `domain` is the one that the policy is for.
    pub fn covers(&self, who: Who<'_>, domain: &TrustDomain) -> bool {
        match (self, who) {
            (Party::Anybody, _) => true,
            (Party::Ours(pattern), Who::Workload(id)) => id.trust_domain() == *domain && pattern.covers(id),
            (Party::Foreign(of, pattern), Who::Workload(id)) => id.trust_domain() == *of && pattern.covers(id),
            // A wildcard in a certificate names nobody.
            (Party::Dns(name), Who::Dns(names)) => !name.contains('*') && names.contains(name),
            _ => false,
        }
    }

    /// What somebody who is meant is looked up by: an ID, the beginning of IDs with its slash, or a DNS name.
    fn key(&self, domain: &TrustDomain) -> Option<String> {
        let of = |domain: &TrustDomain, pattern: &Pattern| {
            let path = pattern.to_string();
            format!("spiffe://{}/{}", domain.as_str(), path.strip_suffix('*').unwrap_or(&path))
        };
        match self {
            Party::Anybody => None,
            Party::Ours(pattern) => Some(of(domain, pattern)),
            Party::Foreign(domain, pattern) => Some(of(domain, pattern)),
            Party::Dns(name) => Some(name.clone()),
        }
    }
}

/// What stands about whom, found by a few look-ups however long the policy is.
#[derive(Clone, Debug)]
pub struct Index<T> {
    by_key: HashMap<String, Vec<T>>,
    of_anybody: Vec<T>,
}

impl<T> Default for Index<T> {
    fn default() -> Index<T> {
        Index { by_key: HashMap::new(), of_anybody: Vec::new() }
    }
}

impl<T> Index<T> {
    /// Adds what stands about `party`.
    pub fn add(&mut self, party: &Party, domain: &TrustDomain, what: T) {
        match party.key(domain) {
            Some(key) => self.by_key.entry(key).or_default().push(what),
            None => self.of_anybody.push(what),
        }
    }

    /// What stands about `who`, in no order.
    pub fn about<'a>(&'a self, who: Who<'a>) -> impl Iterator<Item = &'a T> {
        let (id, names) = match who {
            Who::Workload(id) => (Some(id.as_str()), &[][..]),
            Who::Dns(names) => (None, names),
            Who::Unproven => (None, &[][..]),
        };
        // `spiffe://td/`, `spiffe://td/shop/`, and the ID itself.
        let begins = "spiffe://".len();
        let slashes = id.into_iter().flat_map(move |id| id.match_indices('/').filter(move |(at, _)| *at >= begins));
        let beginnings = slashes.filter_map(move |(at, _)| id.map(|id| &id[..=at]));
        let names = names.iter().map(String::as_str).filter(|name| !name.contains(['*', ':']));
        let keys = beginnings.chain(id).chain(names);
        keys.filter_map(move |key| self.by_key.get(key)).flatten().chain(&self.of_anybody)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each with the same answer by the plain reading and by the index.
    fn check(party: &str, who: Who<'_>, covered: bool) {
        let (parsed, domain) = (party.parse::<Party>().unwrap(), "td".parse().unwrap());
        let mut index = Index::default();
        index.add(&parsed, &domain, ());
        let got = (parsed.covers(who, &domain), index.about(who).next().is_some());
        assert_eq!(got, (covered, covered), "{party} {who}");
        assert_eq!(parsed.to_string(), party);
    }

    #[test]
    fn a_party_is_who_it_says_and_nobody_else() {
        let id = |text: &str| text.parse::<SpiffeId>().unwrap();
        let (web, deep, foreign) =
            (id("spiffe://td/shop/web"), id("spiffe://td/shop/web/a"), id("spiffe://ex/shop/web"));
        let rows = [
            ("shop/web", [true, false, false]),
            ("shop/*", [true, true, false]),
            ("shop/web/*", [false, true, false]),
            ("sho/*", [false, false, false]),
            ("*", [true, true, false]),
            ("spiffe://td/shop/web", [true, false, false]),
            ("spiffe://ex/shop/web", [false, false, true]),
            ("spiffe://ex/*", [false, false, true]),
            ("spiffe://e/*", [false, false, false]),
            ("dns:shop.example", [false, false, false]),
            ("anybody", [true, true, true]),
        ];
        for (party, covered) in rows {
            for (who, covered) in [&web, &deep, &foreign].into_iter().zip(covered) {
                check(party, Who::Workload(who), covered);
            }
            check(party, Who::Unproven, party == "anybody");
        }
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        check("dns:shop.example", Who::Dns(&names(&["a", "shop.example"])), true);
        check("dns:shop.example", Who::Dns(&names(&["*.example", "unverified:ab"])), false);
        check("*", Who::Dns(&names(&["shop.example"])), false);
    }

    #[test]
    fn what_is_nobody_is_told() {
        for bad in
            ["", "spiffe://", "spiffe://td", "spiffe://TD/x", "dns:", "dns:*.x", "dns:10.0.0.1", "a*", "Anybody x"]
        {
            assert!(bad.parse::<Party>().is_err(), "{bad:?}");
        }
        assert_eq!("dns:API.example.".parse::<Party>().unwrap(), Party::Dns("api.example".into()));
    }
}
