//! How an agent without any privilege knows that its packet rules are in force: one of them drops datagrams to a loopback
//! address and port that are made from the text of all the others. Sending there fails where that rule is, and succeeds
//! where there are no rules, or others.
//!
//! It says what the rules were when they were put there. Who could change them one by one (CAP_NET_ADMIN) could keep that
//! one; `intercept verify` reads them all.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};

use aws_lc_rs::digest::{SHA256, digest};

/// Where a ruleset drops datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(SocketAddrV4);

impl Mark {
    /// The mark of rules with this text.
    pub fn of(text: &str) -> Mark {
        let hash = digest(&SHA256, text.as_bytes());
        let hash = hash.as_ref();
        // With its lowest bits set the port is not 0, and neither is its neighbour.
        let port = u16::from_be_bytes([hash[2], hash[3]]) | 3;
        Mark(SocketAddrV4::new(Ipv4Addr::new(127, 83, hash[0], hash[1]), port))
    }

    /// The rule that is looked for; it stands first in its chain.
    pub fn rule(&self) -> String {
        format!("ip daddr {} udp dport {} drop", self.0.ip(), self.0.port())
    }

    /// Whether the rule is there. An error says that it cannot be told: nothing can be sent at all.
    pub fn is_in_force(&self) -> io::Result<bool> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.set_nonblocking(true)?;
        let neighbour = SocketAddrV4::new(*self.0.ip(), self.0.port() ^ 1);
        socket.send_to(&[], neighbour)?;
        match socket.send_to(&[], self.0) {
            Ok(_) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(true),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_rules_have_another_mark_in_a_corner_of_loopback() {
        let (one, other) = (Mark::of("a"), Mark::of("b"));
        assert_eq!(one, Mark::of("a"));
        assert_ne!(one, other);
        for mark in [one, other] {
            assert_eq!(mark.0.ip().octets()[..2], [127, 83]);
            assert_eq!(mark.0.port() % 4, 3);
        }
    }

    #[test]
    fn without_rules_it_is_not_in_force() {
        assert!(!Mark::of("rules that nobody has installed").is_in_force().unwrap());
    }
}
