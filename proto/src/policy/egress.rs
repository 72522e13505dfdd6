//! Where the workload may go. Pure: what it asks for, the list, the addresses found; out come the addresses that may be
//! dialled, or why not.
//!
//! A name is allowed by a rule for it, an address by a rule for its network. Either way only public addresses are meant,
//! unless a rule says otherwise in so many words: a network counts for private, loopback, link-local and metadata
//! addresses only if it lies within such a block itself, so that `0.0.0.0/0` is every public address and no more; a name
//! may lie in a private network only if its rule says which (`db.internal:5432 in 10.0.0.0/8`). What is dialled is
//! exactly what [`List::consider`] or [`List::choose`] gave: nothing is looked up twice.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use crate::config::{FromValue, Value};
use crate::event::RefusalReason;

use super::address::{Kind, Network, judged, special};

/// Most addresses of one name that are looked at.
const MAX_ADDRESSES: usize = 16;
/// Most of a wrong text that is shown.
const MAX_SHOWN: usize = 60;

/// Whom the workload asks for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// A DNS name: lower case, A-labels, without the dot at the end.
    Name(String),
    /// An address.
    Address(IpAddr),
}

impl Host {
    /// Reads what a client sent; an IPv6 address stands without brackets here. Spellings of IPv4 addresses that only some
    /// programs know (`127.1`, `0x7f000001`, `2130706433`, `0177.0.0.1`) are refused: as a name they would reach the same
    /// address unjudged.
    pub fn parse(text: &str) -> Result<Host, String> {
        if let Some((address, _zone)) = text.split_once('%')
            && address.parse::<Ipv6Addr>().is_ok()
        {
            return Err(format!("`{}` has a zone, which means something on one machine only", shown(text)));
        }
        if let Ok(ip) = text.parse::<Ipv6Addr>() {
            return Ok(Host::Address(ip.into()));
        }
        let name = text.strip_suffix('.').unwrap_or(text);
        if let Ok(ip) = name.parse::<Ipv4Addr>() {
            return Ok(Host::Address(ip.into()));
        }
        if ends_in_a_number(name) {
            return Err(format!(
                "`{}` is an address in a spelling that is not taken: write it like 127.0.0.1",
                shown(text)
            ));
        }
        name_of(name).map(Host::Name)
    }
}

fn ends_in_a_number(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or_default();
    let hex = last.strip_prefix("0x").or_else(|| last.strip_prefix("0X"));
    match hex {
        Some(digits) => digits.bytes().all(|b| b.is_ascii_hexdigit()),
        None => !last.is_empty() && last.bytes().all(|b| b.is_ascii_digit()),
    }
}

fn name_of(name: &str) -> Result<String, String> {
    if !name.is_ascii() {
        return Err(format!("`{}` is not ASCII: write an international name in its xn-- form", shown(name)));
    }
    let is_label = |label: &str| {
        let inner = label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        inner && (1..=63).contains(&label.len()) && !label.starts_with('-') && !label.ends_with('-')
    };
    match name.len() <= 253 && name.split('.').all(is_label) {
        true => Ok(name.to_ascii_lowercase()),
        false => Err(format!("`{}` is no host name", shown(name))),
    }
}

/// `text`, cut and without anything that a terminal would act on.
fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(MAX_SHOWN).flat_map(char::escape_default).collect();
    if text.chars().nth(MAX_SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

/// What the workload asks for: whom, and the port there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// Whom.
    pub host: Host,
    /// The port.
    pub port: u16,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Name(name) => write!(f, "{name}:{}", self.port),
            Host::Address(ip) => write!(f, "{}", SocketAddr::new(*ip, self.port)),
        }
    }
}

/// One line of the list: `api.example.com:443`, `*.example.com:80,443`, `10.0.0.0/8:5432`, `[2001:db8::/32]:8000-8999`,
/// `db.internal:5432 in 10.0.0.0/8`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    whom: Whom,
    ports: Vec<(u16, u16)>,
    /// Where the name may lie besides public addresses.
    within: Option<Network>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Whom {
    Name(String),
    /// Every name below this one, at any depth.
    Below(String),
    Network(Network),
}

impl Rule {
    fn has_port(&self, port: u16) -> bool {
        self.ports.iter().any(|(first, last)| (*first..=*last).contains(&port))
    }

    fn is_for_name(&self, name: &str) -> bool {
        match &self.whom {
            Whom::Name(listed) => listed == name,
            Whom::Below(listed) => name.strip_suffix(listed).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
            Whom::Network(_) => false,
        }
    }
}

/// Whether `network` lists `ip`: one that is not public must be meant by it.
fn lists(network: &Network, ip: IpAddr) -> bool {
    network.contains(ip) && special(ip).is_none_or(|(block, _)| network.lies_in(&block))
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Rule, String> {
        let (place, within) = match text.split_once(" in ") {
            Some((place, network)) => (place, Some(network.trim().parse::<Network>()?)),
            None => (text, None),
        };
        let fault = || {
            format!(
                "must be whom and a port, like api.example.com:443, *.example.com:80,443, 10.0.0.0/8:5432 or [2001:db8::/32]:8000-8999, not `{text}`"
            )
        };
        let (whom, ports) = place.rsplit_once(':').ok_or_else(fault)?;
        let whom = whom_of(whom)?;
        match (&whom, within) {
            (Whom::Network(_), Some(_)) => Err(format!("`{text}`: only a name can lie `in` a network")),
            (_, Some(network)) if special(network.first()).is_none_or(|(block, _)| !network.lies_in(&block)) => {
                Err(format!("`{text}`: {network} is no private network, and public addresses need no `in`"))
            }
            _ => Ok(Rule { whom, ports: ports_of(ports).ok_or_else(fault)?, within }),
        }
    }
}

fn whom_of(text: &str) -> Result<Whom, String> {
    if let Some(inner) = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        let network: Network = inner.parse()?;
        return match network.first() {
            IpAddr::V4(_) => Err(format!("`{text}`: only IPv6 stands in brackets")),
            ip if judged(ip) != ip => Err(format!("`{text}` stands for {}: list that", judged(ip))),
            _ => Ok(Whom::Network(network)),
        };
    }
    if text.contains("://") {
        return Err(format!("`{text}`: a rule has no scheme; https:// is port 443, http:// is port 80"));
    }
    if text.contains(':') {
        return Err(format!("`{text}`: an IPv6 network stands in brackets, like [2001:db8::/32]:443"));
    }
    if text.contains('/') {
        return text.parse().map(Whom::Network);
    }
    if text == "*" {
        return Err("`*` is no name: every public address is 0.0.0.0/0 and [::/0]".into());
    }
    if let Some(name) = text.strip_prefix("*.") {
        return match Host::parse(name)? {
            Host::Name(name) => Ok(Whom::Below(name)),
            Host::Address(_) => Err(format!("`{text}` is no name: write a network, like 10.0.0.0/8")),
        };
    }
    match Host::parse(text)? {
        Host::Name(name) => Ok(Whom::Name(name)),
        Host::Address(ip) => Ok(Whom::Network(Network::of(ip))),
    }
}

fn ports_of(text: &str) -> Option<Vec<(u16, u16)>> {
    if text == "*" {
        return Some(vec![(1, u16::MAX)]);
    }
    text.split(',').map(span_of).collect()
}

fn span_of(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0 && !text.starts_with(['+', '0']));
    let (first, last) = (port(first)?, port(last)?);
    (first <= last).then_some((first, last))
}

/// Rules as they are written, each on its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lines(pub Vec<String>);

impl FromValue for Lines {
    fn from_value(value: &Value) -> Result<Lines, String> {
        Vec::from_value(value).map(Lines)
    }

    /// All in one line, with commas between; what has no colon is one more port of the rule before it.
    fn from_text(text: &str) -> Result<Lines, String> {
        let mut rules: Vec<String> = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            match rules.last_mut() {
                Some(rule) if !part.contains(':') => *rule += &format!(",{part}"),
                _ => rules.push(part.to_owned()),
            }
        }
        Ok(Lines(rules))
    }
}

/// The list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct List {
    /// In no order: one that allows is enough.
    pub rules: Vec<Rule>,
}

/// What there is to do for a target that may be allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Dial this.
    Dial(SocketAddr),
    /// Look its name up, and [`List::choose`].
    Resolve,
}

/// Why it may not go there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The closed word.
    pub reason: RefusalReason,
    /// What exactly.
    pub detail: String,
    /// The line that would allow it.
    pub rule: String,
}

impl List {
    /// Judges a target before anything is looked up.
    pub fn consider(&self, target: &Target) -> Result<Way, Refused> {
        let Target { host, port } = target;
        match host {
            Host::Address(ip) if self.lists_address(*ip, *port) => Ok(Way::Dial(dialled(*ip, *port))),
            Host::Address(ip) => Err(self.not_listed_address(target, *ip)),
            // Whoever lists a network means those in it by whatever name.
            Host::Name(name) if self.lists_name(name, *port) || self.has_network(*port) => Ok(Way::Resolve),
            Host::Name(name) => Err(self.not_listed_name(target, name)),
        }
    }

    /// Of the addresses `found` for the name of `target`, those that may be dialled.
    pub fn choose(&self, target: &Target, found: &[IpAddr]) -> Result<Vec<SocketAddr>, Refused> {
        let Target { host: Host::Name(name), port } = target else { return Err(not_listed(target, "it is no name")) };
        let found = &found[..found.len().min(MAX_ADDRESSES)];
        let may = |ip: &&IpAddr| self.lists_address(**ip, *port) || self.lists_name_at(name, *port, judged(**ip));
        let chosen: Vec<SocketAddr> = found.iter().filter(may).map(|ip| dialled(*ip, *port)).collect();
        if !chosen.is_empty() {
            return Ok(chosen);
        }
        let not_public = found.iter().find_map(|ip| special(judged(*ip)).map(|(_, kind)| (*ip, kind)));
        Err(match not_public {
            Some((ip, kind)) => Refused {
                reason: RefusalReason::EgressPrivateAddress,
                detail: format!("its name leads to {}, {}, and no rule says that it may lie there", ip, kind.words()),
                rule: format!("{target} in {}", judged(ip)),
            },
            None => not_listed(target, "neither its name nor its address is on the list"),
        })
    }

    /// Judges a target that somebody else will look up: only rules for names count.
    pub fn consider_unresolved(&self, target: &Target) -> Result<(), Refused> {
        match &target.host {
            Host::Name(name) if self.lists_name(name, target.port) => Ok(()),
            Host::Name(name) => Err(self.not_listed_name(target, name)),
            Host::Address(_) => self.consider(target).map(|_| ()),
        }
    }

    /// Whether a name could allow what an address alone does not.
    pub fn asks_for_names(&self, port: u16) -> bool {
        self.rules.iter().any(|rule| !matches!(rule.whom, Whom::Network(_)) && rule.has_port(port))
    }

    fn lists_address(&self, ip: IpAddr, port: u16) -> bool {
        let ip = judged(ip);
        let mut rules = self.rules.iter().filter(|rule| rule.has_port(port));
        rules.any(|rule| matches!(&rule.whom, Whom::Network(network) if lists(network, ip)))
    }

    fn has_network(&self, port: u16) -> bool {
        self.rules.iter().any(|rule| matches!(rule.whom, Whom::Network(_)) && rule.has_port(port))
    }

    fn lists_name(&self, name: &str, port: u16) -> bool {
        self.rules.iter().any(|rule| rule.has_port(port) && rule.is_for_name(name))
    }

    fn lists_name_at(&self, name: &str, port: u16, ip: IpAddr) -> bool {
        let mut rules = self.rules.iter().filter(|rule| rule.has_port(port) && rule.is_for_name(name));
        rules.any(|rule| special(ip).is_none() || rule.within.is_some_and(|network| lists(&network, ip)))
    }

    fn not_listed_name(&self, target: &Target, name: &str) -> Refused {
        match self.rules.iter().any(|rule| rule.is_for_name(name)) {
            true => not_listed(target, "it is on the list for other ports only"),
            false => not_listed(target, "it is not on the list"),
        }
    }

    fn not_listed_address(&self, target: &Target, ip: IpAddr) -> Refused {
        match special(judged(ip)) {
            Some((_, kind)) => private(target, ip, kind),
            None => not_listed(target, "it is not on the list"),
        }
    }
}

/// `::ffff:a.b.c.d` is dialled as IPv4; an address behind NAT64 only as it stands.
fn dialled(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip.to_canonical(), port)
}

fn not_listed(target: &Target, detail: &str) -> Refused {
    Refused { reason: RefusalReason::EgressNotListed, detail: detail.to_owned(), rule: target.to_string() }
}

fn private(target: &Target, ip: IpAddr, kind: Kind) -> Refused {
    let meant = judged(ip);
    let detail = match meant == ip {
        true => format!("it is {}, and not on the list", kind.words()),
        false => format!("it stands for {meant}, {}, and that is not on the list", kind.words()),
    };
    let rule = SocketAddr::new(meant, target.port).to_string();
    Refused { reason: RefusalReason::EgressPrivateAddress, detail, rule }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policy(rules: &[&str]) -> List {
        List { rules: rules.iter().map(|rule| rule.parse().unwrap_or_else(|e| panic!("{rule}: {e}"))).collect() }
    }

    fn target(text: &str) -> Target {
        let (host, port) = text.rsplit_once(':').unwrap();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        Target { host: Host::parse(host).unwrap(), port: port.parse().unwrap() }
    }

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// `found` is what the name leads to, if it comes to that; `expected` what is dialled, or the reason.
    fn check(rules: &[&str], asked: &str, found: &[&str], expected: Result<&[&str], RefusalReason>) {
        let (policy, target) = (policy(rules), target(asked));
        let got = match policy.consider(&target) {
            Ok(Way::Dial(address)) => Ok(vec![address]),
            Ok(Way::Resolve) => policy.choose(&target, &ips(found)),
            Err(refused) => Err(refused),
        };
        let expected = expected.map(|all| all.iter().map(|a| a.parse().unwrap()).collect::<Vec<SocketAddr>>());
        assert_eq!(got.map_err(|refused| refused.reason), expected, "{rules:?} {asked} {found:?}");
    }

    const NOT_LISTED: Result<&[&str], RefusalReason> = Err(RefusalReason::EgressNotListed);
    const PRIVATE: Result<&[&str], RefusalReason> = Err(RefusalReason::EgressPrivateAddress);

    #[test]
    fn a_name_is_allowed_by_its_rule_and_no_other() {
        let at = &["93.184.216.34", "2606:4700::1"];
        let both = Ok(&["93.184.216.34:443", "[2606:4700::1]:443"][..]);
        check(&["api.example.com:443"], "api.example.com:443", at, both);
        check(&["API.Example.COM.:443"], "api.example.com.:443", at, both);
        check(&["api.example.com:443"], "API.EXAMPLE.com:443", at, both);
        check(&["api.example.com:443"], "api.example.com:80", at, NOT_LISTED);
        check(&["api.example.com:443"], "example.com:443", at, NOT_LISTED);
        check(&["api.example.com:443"], "api.example.com.evil.org:443", at, NOT_LISTED);
        check(&["api.example.com:443"], "xapi.example.com:443", at, NOT_LISTED);
        check(&["xn--bcher-kva.example:443"], "XN--bcher-kva.example:443", at, both);
        check(&[], "api.example.com:443", at, NOT_LISTED);
    }

    #[test]
    fn a_wildcard_is_every_name_below_and_not_the_name_itself() {
        let (at, good) = (&["93.184.216.34"], Ok(&["93.184.216.34:443"][..]));
        check(&["*.example.com:443"], "a.example.com:443", at, good);
        check(&["*.example.com:443"], "a.b.example.com:443", at, good);
        check(&["*.example.com:443"], "example.com:443", at, NOT_LISTED);
        check(&["*.example.com:443"], "aexample.com:443", at, NOT_LISTED);
        check(&["*.example.com:443"], "a.example.com.evil.org:443", at, NOT_LISTED);
    }

    #[test]
    fn ports_are_one_several_a_range_or_all() {
        let (at, rules) = (&["1.1.1.1"], &["x.example:80,8000-8002,443"]);
        for (port, allowed) in [(80, true), (443, true), (8000, true), (8002, true), (8003, false), (79, false)] {
            let dialled = format!("1.1.1.1:{port}");
            let expected: [&str; 1] = [&dialled];
            check(rules, &format!("x.example:{port}"), at, if allowed { Ok(&expected) } else { NOT_LISTED });
        }
        check(&["x.example:*"], "x.example:65535", at, Ok(&["1.1.1.1:65535"]));
    }

    #[test]
    fn an_address_is_allowed_by_its_network() {
        check(&["93.184.216.0/24:443"], "93.184.216.34:443", &[], Ok(&["93.184.216.34:443"]));
        check(&["93.184.216.34:443"], "93.184.216.34:443", &[], Ok(&["93.184.216.34:443"]));
        check(&["93.184.216.0/24:443"], "93.184.217.34:443", &[], NOT_LISTED);
        check(&["93.184.216.0/24:443"], "93.184.216.34:80", &[], NOT_LISTED);
        check(&["[2606:4700::/32]:443"], "[2606:4700::1111]:443", &[], Ok(&["[2606:4700::1111]:443"]));
        check(&["[2606:4700::1]:443"], "[2606:4700::1111]:443", &[], NOT_LISTED);
        check(&["api.example.com:443"], "93.184.216.34:443", &[], NOT_LISTED);
    }

    #[test]
    fn a_name_in_a_listed_network_is_allowed_whatever_it_is() {
        check(&["10.0.0.0/8:5432"], "db:5432", &["10.1.2.3"], Ok(&["10.1.2.3:5432"]));
        check(&["10.0.0.0/8:5432"], "db:5432", &["10.1.2.3", "11.0.0.1"], Ok(&["10.1.2.3:5432"]));
        check(&["10.0.0.0/8:5432"], "db:5432", &["11.0.0.1"], NOT_LISTED);
        check(&["10.0.0.0/8:5432"], "db:5432", &["192.168.0.1"], PRIVATE);
    }

    #[test]
    fn a_listed_name_that_leads_inside_is_refused_unless_its_rule_says_where() {
        for inside in [
            "127.0.0.1",
            "::1",
            "10.0.0.5",
            "172.16.3.4",
            "192.168.1.1",
            "fd00::5",
            "169.254.169.254",
            "fd00:ec2::254",
            "fe80::1",
            "0.0.0.0",
            "::",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.5",
            "64:ff9b::7f00:1",
            "64:ff9b::a9fe:a9fe",
            "100.64.0.1",
            "255.255.255.255",
            "224.0.0.1",
            "2002:7f00:1::",
            "::127.0.0.1",
        ] {
            check(&["api.example.com:80"], "api.example.com:80", &[inside], PRIVATE);
            check(&["*.example.com:80", "0.0.0.0/0:80", "[::/0]:80"], "api.example.com:80", &[inside], PRIVATE);
        }
        let rule = &["db.internal:5432 in 10.0.0.0/8"];
        check(rule, "db.internal:5432", &["10.0.0.5"], Ok(&["10.0.0.5:5432"]));
        check(rule, "db.internal:5432", &["::ffff:10.0.0.5"], Ok(&["10.0.0.5:5432"]));
        check(rule, "db.internal:5432", &["192.168.0.5"], PRIVATE);
        check(rule, "db.internal:5432", &["127.0.0.1"], PRIVATE);
        check(rule, "db.internal:5432", &["93.184.216.34"], Ok(&["93.184.216.34:5432"]));
        check(rule, "db.internal:22", &["10.0.0.5"], NOT_LISTED);
        check(rule, "10.0.0.5:5432", &[], PRIVATE);
        check(&["db.internal:5432", "10.0.0.0/8:80"], "db.internal:5432", &["10.0.0.5"], PRIVATE);
    }

    #[test]
    fn of_several_addresses_only_the_good_ones_are_dialled() {
        let found = &["127.0.0.1", "93.184.216.34", "10.0.0.1", "2606:4700::1"];
        check(&["x.example:80"], "x.example:80", found, Ok(&["93.184.216.34:80", "[2606:4700::1]:80"]));
        let many: Vec<String> = (0..200).map(|i| format!("1.1.1.{i}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let chosen = policy(&["x.example:80"]).choose(&target("x.example:80"), &ips(&many)).unwrap();
        assert_eq!(chosen.len(), MAX_ADDRESSES);
    }

    #[test]
    fn an_address_that_is_not_public_must_be_meant() {
        for (rules, asked) in [
            (&["0.0.0.0/0:80", "[::/0]:80"][..], "127.0.0.1:80"),
            (&["0.0.0.0/0:80", "[::/0]:80"], "10.0.0.1:80"),
            (&["0.0.0.0/0:80", "[::/0]:80"], "169.254.169.254:80"),
            (&["0.0.0.0/0:80", "[::/0]:80"], "[::1]:80"),
            (&["0.0.0.0/0:80", "[::/0]:80"], "[::ffff:127.0.0.1]:80"),
            (&["0.0.0.0/0:80", "[::/0]:80"], "[64:ff9b::a9fe:a9fe]:80"),
            (&["0.0.0.0/0:80", "[::/0]:80"], "[fd00:ec2::254]:80"),
            (&["8.0.0.0/5:80"], "10.0.0.1:80"),
            (&["169.254.0.0/16:80"], "169.254.169.254:80"),
            (&["[fd00::/8]:80"], "[fd00:ec2::254]:80"),
            (&["127.0.0.1:80"], "127.0.0.2:80"),
            (&["api.example.com:80"], "0.0.0.0:80"),
        ] {
            check(rules, asked, &[], PRIVATE);
        }
        for (rules, asked, dialled) in [
            (&["127.0.0.0/8:80"][..], "127.0.0.1:80", "127.0.0.1:80"),
            (&["127.0.0.0/8:80"], "[::ffff:127.0.0.1]:80", "127.0.0.1:80"),
            (&["10.1.0.0/16:80"], "10.1.2.3:80", "10.1.2.3:80"),
            (&["10.1.0.0/16:80"], "[64:ff9b::a01:203]:80", "[64:ff9b::a01:203]:80"),
            (&["169.254.169.254:80"], "169.254.169.254:80", "169.254.169.254:80"),
            (&["169.254.0.0/16:80"], "169.254.1.1:80", "169.254.1.1:80"),
            (&["[::1]:80"], "[::1]:80", "[::1]:80"),
            (&["0.0.0.0/0:80"], "[64:ff9b::808:808]:80", "[64:ff9b::808:808]:80"),
        ] {
            check(rules, asked, &[], Ok(&[dialled]));
        }
    }

    #[test]
    fn spellings_of_addresses_are_refused_or_are_the_address() {
        for (text, expected) in [
            ("127.0.0.1", Ok(Host::Address("127.0.0.1".parse().unwrap()))),
            ("127.0.0.1.", Ok(Host::Address("127.0.0.1".parse().unwrap()))),
            ("::1", Ok(Host::Address("::1".parse().unwrap()))),
            ("::ffff:127.0.0.1", Ok(Host::Address("::ffff:127.0.0.1".parse().unwrap()))),
            ("Db_1.Internal.", Ok(Host::Name("db_1.internal".into()))),
            ("0x7f.example", Ok(Host::Name("0x7f.example".into()))),
            ("2130706433", Err("in a spelling that is not taken")),
            ("127.1", Err("in a spelling that is not taken")),
            ("0x7f.1", Err("in a spelling that is not taken")),
            ("0x7f000001", Err("in a spelling that is not taken")),
            ("0X7F000001.", Err("in a spelling that is not taken")),
            ("0x", Err("in a spelling that is not taken")),
            ("0177.0.0.1", Err("in a spelling that is not taken")),
            ("017700000001", Err("in a spelling that is not taken")),
            ("127.0.0.01", Err("in a spelling that is not taken")),
            ("127.0.0.0x1", Err("in a spelling that is not taken")),
            ("1.2.3.4.5", Err("in a spelling that is not taken")),
            ("a.example.256", Err("in a spelling that is not taken")),
            ("127.0.0.1..", Err("no host name")),
            ("fe80::1%eth0", Err("has a zone")),
            ("::1%lo", Err("has a zone")),
            ("::1%25lo", Err("has a zone")),
            ("１２７.0.0.1", Err("in a spelling that is not taken")),
            ("127。0。0。1", Err("not ASCII")),
            ("bücher.example", Err("its xn-- form")),
            ("", Err("no host name")),
            (".", Err("no host name")),
            ("..", Err("no host name")),
            ("a..b", Err("no host name")),
            ("-a.example", Err("no host name")),
            ("a b", Err("no host name")),
            ("a@b", Err("no host name")),
            ("a:80", Err("no host name")),
            ("[::1]", Err("no host name")),
            ("a\0.example", Err("no host name")),
            ("a\r\nHost: b", Err("no host name")),
        ] {
            match (Host::parse(text), expected) {
                (Ok(got), Ok(host)) => assert_eq!(got, host, "{text}"),
                (Err(got), Err(part)) => assert!(got.contains(part) && !got.contains(['\r', '\0']), "{text}: {got}"),
                (got, _) => panic!("{text}: {got:?}"),
            }
        }
        assert!(Host::parse(&"a".repeat(64)).is_err());
        assert!(Host::parse(&"a.".repeat(126)).is_ok() && Host::parse(&"a.".repeat(128)).is_err());
        assert!(Host::parse(&"x".repeat(100_000)).unwrap_err().len() < 200);
    }

    #[test]
    fn what_is_no_rule_is_told_with_what_would_be_right() {
        for (text, part) in [
            ("api.example.com", "must be whom and a port"),
            ("api.example.com:", "must be whom and a port"),
            ("api.example.com:0", "must be whom and a port"),
            ("api.example.com:65536", "must be whom and a port"),
            ("api.example.com:80,", "must be whom and a port"),
            ("api.example.com:90-80", "must be whom and a port"),
            ("api.example.com:+80", "must be whom and a port"),
            ("api.example.com:080", "must be whom and a port"),
            ("api.example.com:*,80", "must be whom and a port"),
            ("https://api.example.com:443", "has no scheme"),
            ("2001:db8::1:443", "in brackets"),
            ("[10.0.0.0/8]:443", "only IPv6"),
            ("[::ffff:10.0.0.1]:443", "stands for 10.0.0.1"),
            ("[64:ff9b::/96]:443", "stands for 0.0.0.0"),
            ("10.0.0.1/8:443", "beyond its first 8"),
            ("*:443", "0.0.0.0/0 and [::/0]"),
            ("*.1.2.3:443", "spelling"),
            ("*.1.2.3.4:443", "write a network"),
            ("a.*.example:443", "no host name"),
            ("127.1:80", "spelling"),
            ("bücher.example:443", "xn--"),
            (":443", "no host name"),
            ("10.0.0.0/8:443 in 10.0.0.0/8", "only a name"),
            ("db:443 in 8.8.8.0/24", "no private network"),
            ("db:443 in 0.0.0.0/0", "no private network"),
            ("db:443 in everywhere", "must be a network"),
        ] {
            let error = text.parse::<Rule>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn rules_of_one_line_may_have_several_ports() {
        let Lines(got) = Lines::from_text("a.example:80,443,8000-8010, 10.0.0.0/8:5432 ,db:1 in 10.0.0.0/8,").unwrap();
        assert_eq!(got, ["a.example:80,443,8000-8010", "10.0.0.0/8:5432", "db:1 in 10.0.0.0/8"]);
        assert_eq!(Lines::from_text("443,a.example:80").unwrap().0, ["443", "a.example:80"]);
        assert_eq!(Lines::from_text("").unwrap(), Lines::default());
    }

    #[test]
    fn a_refusal_says_the_rule_that_would_allow_it() {
        for (rules, asked, found) in [
            (&[][..], "api.example.com:443", "93.184.216.34"),
            (&[], "93.184.216.34:443", ""),
            (&[], "[2606:4700::1]:443", ""),
            (&[], "127.0.0.1:80", ""),
            (&[], "[::ffff:169.254.169.254]:80", ""),
            (&["10.0.0.0/8:80"], "x.example:80", "11.0.0.1"),
            (&["x.example:80"], "x.example:80", "10.0.0.5"),
            (&["x.example:80"], "x.example:80", "::1"),
            (&["x.example:80"], "x.example:80", "::ffff:127.0.0.1"),
            (&["x.example:81"], "x.example:80", "1.1.1.1"),
        ] {
            let (before, target) = (policy(rules), target(asked));
            let found: Vec<IpAddr> = found.parse().into_iter().collect();
            let judge = |policy: &List| match policy.consider(&target)? {
                Way::Dial(address) => Ok(vec![address]),
                Way::Resolve => policy.choose(&target, &found),
            };
            let refused = judge(&before).unwrap_err();
            let mut after = before.clone();
            after.rules.push(refused.rule.parse().unwrap_or_else(|e| panic!("{}: {e}", refused.rule)));
            assert!(judge(&after).is_ok(), "{} does not allow {asked}", refused.rule);
        }
    }

    #[test]
    fn unresolved_names_need_a_rule_for_the_name() {
        let policy = policy(&["*.example.com:443", "10.0.0.0/8:443"]);
        for (asked, allowed) in
            [("a.example.com:443", true), ("db.internal:443", false), ("10.0.0.1:443", true), ("127.0.0.1:443", false)]
        {
            assert_eq!(policy.consider_unresolved(&target(asked)).is_ok(), allowed, "{asked}");
        }
        assert!(policy.asks_for_names(443) && !policy.asks_for_names(80));
    }

    proptest! {
        #[test]
        fn no_text_is_a_panic_or_a_name_that_reads_as_an_address(text in ".{0,80}") {
            if let Ok(Host::Name(name)) = Host::parse(&text) {
                prop_assert!(name.parse::<IpAddr>().is_err() && !ends_in_a_number(&name), "{text:?}");
            }
            let _ = text.parse::<Rule>();
            let _ = Lines::from_text(&text);
        }

        #[test]
        fn whatever_a_name_leads_to_only_public_addresses_come_of_a_plain_rule(bits: u128, v4: bool, near in 0..8u8) {
            // Half of them near the forms that hold an IPv4 address.
            let bits = match near { 0 => bits >> 96 | 0xffff << 32, 1 => bits >> 96 | 0x64_ff9b << 96, _ => bits };
            let ip: IpAddr = if v4 { Ipv4Addr::from_bits(bits as u32).into() } else { Ipv6Addr::from_bits(bits).into() };
            let chosen = policy(&["x.example:1", "0.0.0.0/0:1", "[::/0]:1"]).choose(&target("x.example:1"), &[ip]);
            prop_assert_eq!(chosen.is_ok(), special(judged(ip)).is_none(), "{}", ip);
            if let Ok(chosen) = chosen {
                prop_assert!(special(judged(chosen[0].ip())).is_none());
            }
        }
    }
}
