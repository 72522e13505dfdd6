//! SOCKS5 (RFC 1928): CONNECT, without authentication. Pure: bytes in, what is asked for out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::policy::egress::{Host, Target};

/// The version, with which every message begins.
pub const VERSION: u8 = 5;
/// What says yes to a greeting: no authentication.
pub const CHOSEN: [u8; 2] = [VERSION, 0];
/// What says that none of the offered methods will do.
pub const NO_METHOD: [u8; 2] = [VERSION, 0xff];

/// How a request is answered (RFC 1928, section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Answer {
    /// Connected.
    Succeeded = 0,
    /// Something else.
    Failure = 1,
    /// The rules do not allow it.
    NotAllowed = 2,
    /// The name has no address, or nobody answers.
    HostUnreachable = 4,
    /// The port is closed.
    Refused = 5,
    /// Not CONNECT.
    CommandNotSupported = 7,
    /// Not an address of a known kind.
    AddressNotSupported = 8,
}

impl Answer {
    /// The message. The address in it is zero: ours is nobody's business.
    pub const fn bytes(self) -> [u8; 10] {
        [VERSION, self as u8, 0, 1, 0, 0, 0, 0, 0, 0]
    }
}

/// What the bytes are so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read<T> {
    /// The beginning: more is needed.
    More,
    /// All of it, and how many bytes it took.
    Whole(T, usize),
    /// Something to refuse, with what it is answered, and what it is.
    Wrong(Answer, String),
}

/// Reads a greeting: whether it offers to go without authentication.
pub fn greeting(bytes: &[u8]) -> Read<bool> {
    match bytes {
        [] | [VERSION] => Read::More,
        [VERSION, count, methods @ ..] => match methods.get(..usize::from(*count)) {
            Some(methods) => Read::Whole(methods.contains(&0), 2 + methods.len()),
            None => Read::More,
        },
        [version, ..] => Read::Wrong(Answer::Failure, format!("SOCKS of version {version}")),
    }
}

/// Reads a request.
pub fn request(bytes: &[u8]) -> Read<Target> {
    let wrong = |answer, what: &str| Read::Wrong(answer, what.to_owned());
    match bytes {
        [] | [VERSION] | [VERSION, 1] | [VERSION, 1, 0] => Read::More,
        [VERSION, 1, 0, kind, rest @ ..] => address(*kind, rest),
        [VERSION, 1, ..] => wrong(Answer::Failure, "a SOCKS request whose reserved byte is not zero"),
        [VERSION, 2, ..] => wrong(Answer::CommandNotSupported, "SOCKS BIND, where only CONNECT is taken"),
        [VERSION, 3, ..] => wrong(Answer::CommandNotSupported, "SOCKS UDP, where only CONNECT is taken"),
        [VERSION, ..] => wrong(Answer::CommandNotSupported, "an unknown SOCKS command"),
        _ => wrong(Answer::Failure, "a SOCKS request of another version than its greeting"),
    }
}

/// The address of a request, after its first four bytes.
fn address(kind: u8, rest: &[u8]) -> Read<Target> {
    match (kind, rest) {
        (1, [a, b, c, d, high, low, ..]) => {
            whole(Host::Address(IpAddr::V4(Ipv4Addr::new(*a, *b, *c, *d))), [*high, *low], 10)
        }
        (4, _) => match rest.split_first_chunk::<16>() {
            Some((octets, [high, low, ..])) => {
                whole(Host::Address(IpAddr::V6(Ipv6Addr::from_octets(*octets))), [*high, *low], 22)
            }
            _ => Read::More,
        },
        (3, [length, rest @ ..]) => match rest.split_at_checked(usize::from(*length)) {
            Some((name, [high, low, ..])) => named(name, [*high, *low]),
            _ => Read::More,
        },
        (1 | 3, _) => Read::More,
        _ => Read::Wrong(Answer::AddressNotSupported, "a SOCKS address of an unknown kind".into()),
    }
}

fn named(name: &[u8], port: [u8; 2]) -> Read<Target> {
    let host = std::str::from_utf8(name).map_err(|_| "a SOCKS name that is not text".to_owned()).and_then(Host::parse);
    match host {
        Ok(host) => whole(host, port, 7 + name.len()),
        Err(what) => Read::Wrong(Answer::Failure, what),
    }
}

fn whole(host: Host, port: [u8; 2], length: usize) -> Read<Target> {
    match u16::from_be_bytes(port) {
        0 => Read::Wrong(Answer::Failure, "port 0".into()),
        port => Read::Whole(Target { host, port }, length),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u8, address: &[u8], port: u16) -> Vec<u8> {
        [&[5, 1, 0, kind], address, &port.to_be_bytes()].concat()
    }

    fn name(name: &str) -> Vec<u8> {
        [&[name.len() as u8], name.as_bytes()].concat()
    }

    #[test]
    fn a_greeting_is_read_across_any_cut() {
        for (bytes, offers) in [(&[5, 1, 0][..], true), (&[5, 3, 1, 2, 0], true), (&[5, 1, 2], false), (&[5, 0], false)]
        {
            for cut in 0..bytes.len() {
                assert_eq!(greeting(&bytes[..cut]), Read::More, "{bytes:?} cut at {cut}");
            }
            assert_eq!(greeting(&[bytes, b"rest"].concat()), Read::Whole(offers, bytes.len()));
        }
        assert!(matches!(greeting(&[4, 1]), Read::Wrong(..)));
    }

    #[test]
    fn a_request_is_read_across_any_cut() {
        for (bytes, host) in [
            (message(1, &[127, 0, 0, 1], 443), "127.0.0.1"),
            (message(4, &Ipv6Addr::LOCALHOST.octets(), 443), "::1"),
            (message(3, &name("API.example.com"), 443), "api.example.com"),
            (message(3, &name("127.0.0.1"), 443), "127.0.0.1"),
            (message(3, &name("::ffff:10.0.0.1"), 443), "::ffff:10.0.0.1"),
            (message(3, &name(&"a.".repeat(126)), 443), &"a.".repeat(126)),
        ] {
            for cut in 0..bytes.len() {
                assert_eq!(request(&bytes[..cut]), Read::More, "{host} cut at {cut}");
            }
            let target = Target { host: Host::parse(host).unwrap(), port: 443 };
            assert_eq!(request(&[&bytes[..], b"rest"].concat()), Read::Whole(target, bytes.len()));
        }
    }

    #[test]
    fn what_is_not_taken_is_answered_by_its_code() {
        for (bytes, answer, part) in [
            (vec![5, 2, 0, 1], Answer::CommandNotSupported, "BIND"),
            (vec![5, 3, 0, 1], Answer::CommandNotSupported, "UDP"),
            (vec![5, 9], Answer::CommandNotSupported, "unknown SOCKS command"),
            (vec![5, 1, 7], Answer::Failure, "reserved"),
            (vec![5, 1, 0, 2], Answer::AddressNotSupported, "unknown kind"),
            (vec![4, 1, 0, 1], Answer::Failure, "another version"),
            (message(1, &[1, 1, 1, 1], 0), Answer::Failure, "port 0"),
            (message(3, &name("2130706433"), 80), Answer::Failure, "spelling"),
            (message(3, &name("0x7f.1"), 80), Answer::Failure, "spelling"),
            (message(3, &name("fe80::1%eth0"), 80), Answer::Failure, "zone"),
            (message(3, &name(""), 80), Answer::Failure, "no host name"),
            (message(3, &name("a\0b"), 80), Answer::Failure, "no host name"),
            (message(3, &[2, 0xc3, 0x28], 80), Answer::Failure, "not text"),
        ] {
            let Read::Wrong(got, what) = request(&bytes) else { panic!("{bytes:?}") };
            assert_eq!((got, what.contains(part)), (answer, true), "{what}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0..5u8) {
            for bytes in [bytes.clone(), [&[5, 1, 0, kind], &bytes[..]].concat()] {
                if let Read::Whole(_, length) = request(&bytes) {
                    prop_assert!(length <= bytes.len());
                }
                if let Read::Whole(_, length) = greeting(&bytes) {
                    prop_assert!(length <= bytes.len());
                }
            }
        }
    }
}
