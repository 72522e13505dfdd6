//! Where this agent itself takes plaintext: a route that leads there would feed itself until nothing is left.

use std::net::{IpAddr, SocketAddr, UdpSocket};

/// The agent's own listeners for plaintext.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Own(Vec<SocketAddr>);

impl Own {
    /// Of these, as they are bound.
    pub fn new(listeners: Vec<SocketAddr>) -> Own {
        Own(listeners)
    }

    /// Whether a connection to `address` would come back to us.
    pub fn is_at(&self, address: SocketAddr) -> bool {
        self.leads_here(address, is_local)
    }

    fn leads_here(&self, address: SocketAddr, is_local: impl Fn(IpAddr) -> bool) -> bool {
        let ip = address.ip().to_canonical();
        let reached = |own: &SocketAddr| match own.ip().to_canonical() {
            // 0.0.0.0 as a destination is this machine.
            own if own == ip || ip.is_unspecified() => true,
            own if own.is_unspecified() => (own.is_ipv6() || ip.is_ipv4()) && is_local(ip),
            _ => false,
        };
        self.0.iter().any(|own| own.port() == address.port() && reached(own))
    }
}

/// Whether this network namespace has `ip`: only then may a socket be bound to it.
fn is_local(ip: IpAddr) -> bool {
    UdpSocket::bind(SocketAddr::new(ip, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_to_one_of_our_listeners_is_told_from_what_does_not() {
        let own = Own::new(["127.0.0.1:3306", "0.0.0.0:5432", "[::]:6379"].map(|a| a.parse().unwrap()).into());
        let ours = |ip: IpAddr| ["10.0.0.5", "127.0.0.1", "127.0.0.9", "fd00::5"].contains(&&*ip.to_string());
        for (address, expected) in [
            ("127.0.0.1:3306", true),
            ("[::ffff:127.0.0.1]:3306", true),
            ("0.0.0.0:3306", true),
            ("127.0.0.9:3306", false),
            ("127.0.0.1:3307", false),
            ("10.0.0.5:5432", true),
            ("127.0.0.9:5432", true),
            ("10.0.0.6:5432", false),
            ("[fd00::5]:5432", false),
            ("10.0.0.5:6379", true),
            ("[fd00::5]:6379", true),
            ("[fd00::6]:6379", false),
        ] {
            assert_eq!(own.leads_here(address.parse().unwrap(), ours), expected, "{address}");
        }
    }

    #[test]
    fn our_own_addresses_are_known() {
        for (ip, expected) in [("127.0.0.1", true), ("127.0.0.77", true), ("192.0.2.1", false), ("2001:db8::1", false)]
        {
            assert_eq!(is_local(ip.parse().unwrap()), expected, "{ip}");
        }
    }
}
