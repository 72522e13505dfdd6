//! Networks, and what kind an address is. Pure.
//!
//! An address can be written in other forms that reach the same place (`::ffff:127.0.0.1`, `64:ff9b::7f00:1`). It is
//! judged as the one that it stands for.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::config::FromValue;

/// All addresses that begin with the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Network {
    first: IpAddr,
    prefix: u8,
}

impl Network {
    /// The one address alone.
    pub const fn of(ip: IpAddr) -> Network {
        Network { first: ip, prefix: if ip.is_ipv4() { 32 } else { 128 } }
    }

    const fn v4(octets: [u8; 4], prefix: u8) -> Network {
        let [a, b, c, d] = octets;
        Network { first: IpAddr::V4(Ipv4Addr::new(a, b, c, d)), prefix }
    }

    const fn v6(segments: [u16; 8], prefix: u8) -> Network {
        let [a, b, c, d, e, f, g, h] = segments;
        Network { first: IpAddr::V6(Ipv6Addr::new(a, b, c, d, e, f, g, h)), prefix }
    }

    /// Its first address.
    pub const fn first(&self) -> IpAddr {
        self.first
    }

    /// Whether `ip` is in it.
    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self.first, ip) {
            (IpAddr::V4(first), IpAddr::V4(ip)) => (first.to_bits() ^ ip.to_bits()) & mask_v4(self.prefix) == 0,
            (IpAddr::V6(first), IpAddr::V6(ip)) => (first.to_bits() ^ ip.to_bits()) & mask_v6(self.prefix) == 0,
            _ => false,
        }
    }

    /// Whether the whole of it is in `other`.
    pub fn lies_in(&self, other: &Network) -> bool {
        self.prefix >= other.prefix && other.contains(self.first)
    }

    /// Whether every address of its version is in it.
    pub const fn is_everything(&self) -> bool {
        self.prefix == 0
    }

    fn has_bits_beyond(&self) -> bool {
        match self.first {
            IpAddr::V4(ip) => ip.to_bits() & !mask_v4(self.prefix) != 0,
            IpAddr::V6(ip) => ip.to_bits() & !mask_v6(self.prefix) != 0,
        }
    }
}

fn mask_v4(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

fn mask_v6(prefix: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Network::of(self.first) { self.first.fmt(f) } else { write!(f, "{}/{}", self.first, self.prefix) }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Network, String> {
        let fault = || format!("must be a network, like 10.0.0.0/8 or 2001:db8::/32, not `{text}`");
        let (ip, prefix) = text.split_once('/').map_or((text, None), |(ip, prefix)| (ip, Some(prefix)));
        let first: IpAddr = ip.parse().map_err(|_| fault())?;
        let whole = Network::of(first);
        let Some(prefix) = prefix else { return Ok(whole) };
        let is_plain = prefix.bytes().all(|b| b.is_ascii_digit()) && (prefix == "0" || !prefix.starts_with('0'));
        let prefix = prefix.parse().ok().filter(|prefix| is_plain && *prefix <= whole.prefix).ok_or_else(fault)?;
        let network = Network { first, prefix };
        if network.has_bits_beyond() {
            return Err(format!("`{text}` has bits set beyond its first {prefix}: write the network's first address"));
        }
        Ok(network)
    }
}

impl FromValue for Network {
    fn from_text(text: &str) -> Result<Network, String> {
        text.parse()
    }
}

/// What kind an address is that is no public one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// No address at all: "this host".
    Unspecified,
    /// This machine.
    Loopback,
    /// A network of one's own.
    Private,
    /// Between a provider and its customers (RFC 6598).
    Shared,
    /// The next wire.
    LinkLocal,
    /// Where a cloud hands out credentials.
    Metadata,
    /// A group.
    Multicast,
    /// For examples, tests, tunnels, or nothing yet.
    Reserved,
}

impl Kind {
    /// As it stands in a sentence.
    pub const fn words(self) -> &'static str {
        match self {
            Kind::Unspecified => "an unspecified address",
            Kind::Loopback => "a loopback address",
            Kind::Private => "a private address",
            Kind::Shared => "a shared address (RFC 6598)",
            Kind::LinkLocal => "a link-local address",
            Kind::Metadata => "a cloud's metadata address",
            Kind::Multicast => "a multicast address",
            Kind::Reserved => "a reserved address",
        }
    }
}

/// Every block that is not public; of blocks within each other the smaller one stands first. From IANA's special-purpose
/// registries, with the well-known addresses at which clouds hand out credentials.
const SPECIAL: &[(Network, Kind)] = &[
    // AWS, Azure, Google, and most others.
    (Network::v4([169, 254, 169, 254], 32), Kind::Metadata),
    (Network::v6([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254], 128), Kind::Metadata),
    (Network::v6([0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254], 128), Kind::Metadata),
    // Credentials of containers at AWS: ECS, and EKS twice.
    (Network::v4([169, 254, 170, 2], 32), Kind::Metadata),
    (Network::v4([169, 254, 170, 23], 32), Kind::Metadata),
    (Network::v6([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23], 128), Kind::Metadata),
    // Alibaba, Azure's wire server, Oracle, Scaleway.
    (Network::v4([100, 100, 100, 200], 32), Kind::Metadata),
    (Network::v4([168, 63, 129, 16], 32), Kind::Metadata),
    (Network::v4([192, 0, 0, 192], 32), Kind::Metadata),
    (Network::v4([169, 254, 42, 42], 32), Kind::Metadata),
    (Network::v6([0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42], 128), Kind::Metadata),
    (Network::v4([0, 0, 0, 0], 8), Kind::Unspecified),
    (Network::v4([127, 0, 0, 0], 8), Kind::Loopback),
    (Network::v4([10, 0, 0, 0], 8), Kind::Private),
    (Network::v4([172, 16, 0, 0], 12), Kind::Private),
    (Network::v4([192, 168, 0, 0], 16), Kind::Private),
    (Network::v4([100, 64, 0, 0], 10), Kind::Shared),
    (Network::v4([169, 254, 0, 0], 16), Kind::LinkLocal),
    (Network::v4([192, 0, 0, 0], 24), Kind::Reserved),
    (Network::v4([192, 0, 2, 0], 24), Kind::Reserved),
    (Network::v4([192, 88, 99, 0], 24), Kind::Reserved),
    (Network::v4([198, 18, 0, 0], 15), Kind::Reserved),
    (Network::v4([198, 51, 100, 0], 24), Kind::Reserved),
    (Network::v4([203, 0, 113, 0], 24), Kind::Reserved),
    (Network::v4([224, 0, 0, 0], 4), Kind::Multicast),
    (Network::v4([240, 0, 0, 0], 4), Kind::Reserved),
    (Network::v6([0; 8], 128), Kind::Unspecified),
    (Network::v6([0, 0, 0, 0, 0, 0, 0, 1], 128), Kind::Loopback),
    (Network::v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7), Kind::Private),
    (Network::v6([0xfec0, 0, 0, 0, 0, 0, 0, 0], 10), Kind::Private),
    (Network::v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10), Kind::LinkLocal),
    (Network::v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8), Kind::Multicast),
    // Tunnels and identifiers within the public third: Teredo and what stands beside it, examples, 6to4.
    (Network::v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 23), Kind::Reserved),
    (Network::v6([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 32), Kind::Reserved),
    (Network::v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16), Kind::Reserved),
    (Network::v6([0x3fff, 0, 0, 0, 0, 0, 0, 0], 20), Kind::Reserved),
    // Everything but 2000::/3.
    (Network::v6([0; 8], 3), Kind::Reserved),
    (Network::v6([0x4000, 0, 0, 0, 0, 0, 0, 0], 2), Kind::Reserved),
    (Network::v6([0x8000, 0, 0, 0, 0, 0, 0, 0], 1), Kind::Reserved),
];

/// The smallest block that is not public and holds `ip`, which must be as [`judged`] gives it; `None` for a public one.
pub fn special(ip: IpAddr) -> Option<(Network, Kind)> {
    SPECIAL.iter().copied().find(|(network, _)| network.contains(ip))
}

const MAPPED: Network = Network::v6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96);
const NAT64: Network = Network::v6([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96);

/// The address that `ip` stands for: an IPv4 one in the forms `::ffff:a.b.c.d` and `64:ff9b::a.b.c.d`, itself otherwise.
pub fn judged(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V6(v6) if MAPPED.contains(ip) || NAT64.contains(ip) => {
            IpAddr::V4(Ipv4Addr::from_bits((v6.to_bits() & u128::from(u32::MAX)) as u32))
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_network_holds_what_begins_alike() {
        for (network, inside, outside) in [
            ("10.0.0.0/8", "10.255.255.255", "11.0.0.0"),
            ("10.1.2.3", "10.1.2.3", "10.1.2.4"),
            ("10.1.2.2/31", "10.1.2.3", "10.1.2.4"),
            ("0.0.0.0/0", "255.255.255.255", "::"),
            ("2001:db8::/32", "2001:db8:ffff::1", "2001:db9::"),
            ("::/0", "ffff::", "0.0.0.0"),
            ("::1", "::1", "::2"),
        ] {
            let parsed: Network = network.parse().unwrap();
            assert_eq!(parsed.to_string(), network);
            assert!(parsed.contains(ip(inside)) && !parsed.contains(ip(outside)), "{network}");
        }
    }

    #[test]
    fn what_is_no_network_is_told() {
        for (text, part) in [
            ("10.0.0.1/8", "beyond its first 8"),
            ("2001:db8::1/32", "beyond its first 32"),
            ("10.0.0.0/33", "must be a network"),
            ("10.0.0.0/", "must be a network"),
            ("10.0.0.0/+8", "must be a network"),
            ("10.0.0.0/08", "must be a network"),
            ("10.0.0.0/8/8", "must be a network"),
            ("10.0.0/8", "must be a network"),
            ("fe80::1%eth0", "must be a network"),
            ("", "must be a network"),
        ] {
            let error = text.parse::<Network>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn one_network_lies_in_another_only_as_a_whole() {
        for (small, large, expected) in [
            ("10.1.0.0/16", "10.0.0.0/8", true),
            ("10.0.0.0/8", "10.0.0.0/8", true),
            ("10.0.0.0/7", "10.0.0.0/8", false),
            ("0.0.0.0/0", "10.0.0.0/8", false),
            ("11.0.0.0/16", "10.0.0.0/8", false),
            ("::/0", "0.0.0.0/0", false),
        ] {
            let [a, b]: [Network; 2] = [small, large].map(|text| text.parse().unwrap());
            assert_eq!(a.lies_in(&b), expected, "{small} {large}");
        }
    }

    #[test]
    fn every_address_has_its_kind() {
        use Kind as K;
        for (text, expected) in [
            ("93.184.216.34", None),
            ("1.1.1.1", None),
            ("2606:4700::1111", None),
            ("2a00::1", None),
            ("0.0.0.0", Some(K::Unspecified)),
            ("0.1.2.3", Some(K::Unspecified)),
            ("::", Some(K::Unspecified)),
            ("127.0.0.1", Some(K::Loopback)),
            ("127.255.0.9", Some(K::Loopback)),
            ("::1", Some(K::Loopback)),
            ("10.0.0.1", Some(K::Private)),
            ("172.15.255.255", None),
            ("172.16.0.0", Some(K::Private)),
            ("172.31.255.255", Some(K::Private)),
            ("172.32.0.0", None),
            ("192.168.1.1", Some(K::Private)),
            ("fd12::1", Some(K::Private)),
            ("fec0::1", Some(K::Private)),
            ("100.64.0.1", Some(K::Shared)),
            ("100.128.0.1", None),
            ("169.254.1.1", Some(K::LinkLocal)),
            ("fe80::1", Some(K::LinkLocal)),
            ("169.254.169.254", Some(K::Metadata)),
            ("169.254.170.2", Some(K::Metadata)),
            ("fd00:ec2::254", Some(K::Metadata)),
            ("100.100.100.200", Some(K::Metadata)),
            ("168.63.129.16", Some(K::Metadata)),
            ("168.63.129.17", None),
            ("192.0.0.192", Some(K::Metadata)),
            ("224.0.0.1", Some(K::Multicast)),
            ("ff02::1", Some(K::Multicast)),
            ("255.255.255.255", Some(K::Reserved)),
            ("240.0.0.1", Some(K::Reserved)),
            ("192.0.2.1", Some(K::Reserved)),
            ("198.19.0.1", Some(K::Reserved)),
            ("2001:db8::1", Some(K::Reserved)),
            ("2001::7f00:1", Some(K::Reserved)),
            ("2002:7f00:1::", Some(K::Reserved)),
            ("::127.0.0.1", Some(K::Reserved)),
            ("64:ff9b:1::7f00:1", Some(K::Reserved)),
            ("100::1", Some(K::Reserved)),
            ("4000::1", Some(K::Reserved)),
            ("f000::1", Some(K::Reserved)),
        ] {
            assert_eq!(special(ip(text)).map(|(_, kind)| kind), expected, "{text}");
        }
    }

    #[test]
    fn an_address_within_another_is_judged_as_itself() {
        for (text, expected) in [
            ("::ffff:127.0.0.1", "127.0.0.1"),
            ("::ffff:a9fe:a9fe", "169.254.169.254"),
            ("64:ff9b::10.0.0.1", "10.0.0.1"),
            ("64:ff9b::5db8:d822", "93.184.216.34"),
            ("64:ff9b:1::1", "64:ff9b:1::1"),
            ("2001:db8::1", "2001:db8::1"),
            ("127.0.0.1", "127.0.0.1"),
        ] {
            assert_eq!(judged(ip(text)), ip(expected), "{text}");
        }
    }

    #[test]
    fn a_smaller_block_stands_before_the_one_that_holds_it() {
        for (i, (later, _)) in SPECIAL.iter().enumerate() {
            for (earlier, _) in &SPECIAL[..i] {
                assert!(!later.lies_in(earlier), "{later} is never found, because {earlier} stands before it");
            }
            assert!(!later.has_bits_beyond(), "{later}");
        }
    }
}
