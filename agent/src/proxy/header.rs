//! The PROXY protocol, versions 1 and 2: who connected, told in front of the bytes of a connection. Pure.
//!
//! <https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>. Whoever may send a header is believed, so who may is decided
//! elsewhere, before [`parse`] is asked. Only streams are known here: a header about datagrams is refused.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::handshake::Fields;

/// The longest header of version 1, its line end included.
const MAX_LINE: usize = 107;
/// The longest header of version 2 that is taken, 16 bytes of fixed part included; what is sent in practice has less
/// than 600, or some thousand when it carries a whole certificate.
pub const MAX_HEADER: usize = 16 << 10;
/// Most TLVs of one header.
const MAX_TLVS: usize = 64;
/// The longest unique id, by the specification.
const MAX_UNIQUE_ID: usize = 128;
/// A path of AF_UNIX is in a field of this size.
const UNIX_PATH: usize = 108;
/// The fixed part of version 2: signature, command, family, length.
const FIXED: usize = 16;
const LINE_START: &[u8] = b"PROXY ";
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// Application protocol, as of ALPN.
pub const TLV_ALPN: u8 = 0x01;
/// The host name that the client asked for, in UTF-8.
pub const TLV_AUTHORITY: u8 = 0x02;
/// Checksum over the whole header.
pub const TLV_CRC32C: u8 = 0x03;
/// Padding.
pub const TLV_NOOP: u8 = 0x04;
/// A name for the connection, at most 128 bytes.
pub const TLV_UNIQUE_ID: u8 = 0x05;
/// How the client's own connection was secured; passed on as it is.
pub const TLV_SSL: u8 = 0x20;

/// What the bytes are so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// The beginning of a header: more is needed.
    More,
    /// No header, or one that breaks the rules, and how.
    Bad(&'static str),
    /// A header, and how many bytes it took.
    Header(Header, usize),
}

/// What a header says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Between whom the connection is; `None` when it does not say: then the connection's own ends count.
    pub ends: Option<Ends>,
    /// What else it says, in its order, without padding and checksum.
    pub tlvs: Vec<Tlv>,
}

/// The two ends of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ends {
    /// Over TCP.
    Tcp {
        /// Who connected.
        source: SocketAddr,
        /// To where.
        destination: SocketAddr,
    },
    /// Over a Unix socket; paths without the zeros that fill their field up.
    Unix {
        /// Who connected.
        source: Vec<u8>,
        /// To where.
        destination: Vec<u8>,
    },
}

/// One more thing that a header of version 2 says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tlv {
    /// What; the `TLV_` constants, and 0xE0 to 0xEF for one's own.
    pub kind: u8,
    /// Its value.
    pub value: Vec<u8>,
}

/// A header that cannot be written because it would be longer than [`MAX_HEADER`], or a path of it too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the PROXY header would be too long")]
pub struct TooLong;

impl Header {
    /// Of a TCP connection, without more.
    pub fn tcp(source: SocketAddr, destination: SocketAddr) -> Header {
        Header { ends: Some(Ends::Tcp { source, destination }), tlvs: Vec::new() }
    }

    /// Who connected, over TCP; an IPv4 address in IPv6 form as IPv4.
    pub fn source(&self) -> Option<SocketAddr> {
        match &self.ends {
            Some(Ends::Tcp { source, .. }) => Some(SocketAddr::new(source.ip().to_canonical(), source.port())),
            _ => None,
        }
    }

    /// The value of the first TLV of this kind.
    pub fn tlv(&self, kind: u8) -> Option<&[u8]> {
        self.tlvs.iter().find(|tlv| tlv.kind == kind).map(|tlv| &tlv.value[..])
    }

    /// Version 1: one line, which knows neither Unix sockets nor TLVs.
    pub fn encode_v1(&self) -> Vec<u8> {
        let Some(Ends::Tcp { source, destination }) = &self.ends else { return b"PROXY UNKNOWN\r\n".to_vec() };
        let (family, from, to) = match same_family(source.ip(), destination.ip()) {
            Pair::V4(from, to) => ("TCP4", from.to_string(), to.to_string()),
            Pair::V6(from, to) => ("TCP6", in_groups(from), in_groups(to)),
        };
        format!("PROXY {family} {from} {to} {} {}\r\n", source.port(), destination.port()).into_bytes()
    }

    /// Version 2, with a checksum if `checked`.
    pub fn encode_v2(&self, checked: bool) -> Result<Vec<u8>, TooLong> {
        let mut out = SIGNATURE.to_vec();
        let local = self.ends.is_none() && self.tlvs.is_empty();
        out.push(if local { 0x20 } else { 0x21 });
        let (family, addresses) = addresses(self.ends.as_ref())?;
        out.extend([family, 0, 0]);
        out.extend(addresses);
        for Tlv { kind, value } in &self.tlvs {
            push_tlv(&mut out, *kind, value)?;
        }
        let checksum_at = out.len() + 3;
        if checked {
            push_tlv(&mut out, TLV_CRC32C, &[0; 4])?;
        }
        if out.len() > MAX_HEADER {
            return Err(TooLong);
        }
        let length = (out.len() - FIXED) as u16;
        out[14..FIXED].copy_from_slice(&length.to_be_bytes());
        if checked {
            let sum = crc32c::crc32c(&out).to_be_bytes();
            out[checksum_at..].copy_from_slice(&sum);
        }
        Ok(out)
    }
}

fn push_tlv(out: &mut Vec<u8>, kind: u8, value: &[u8]) -> Result<(), TooLong> {
    let length = u16::try_from(value.len()).map_err(|_| TooLong)?;
    out.push(kind);
    out.extend(length.to_be_bytes());
    out.extend(value);
    Ok(())
}

enum Pair {
    V4(Ipv4Addr, Ipv4Addr),
    V6(Ipv6Addr, Ipv6Addr),
}

/// Both in one family, as a header needs them: IPv4 if both can be.
fn same_family(from: IpAddr, to: IpAddr) -> Pair {
    let in_v6 = |ip| match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    match (from.to_canonical(), to.to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => Pair::V4(from, to),
        (from, to) => Pair::V6(in_v6(from), in_v6(to)),
    }
}

/// Without the dotted form of a mapped address, which not every reader of version 1 knows.
fn in_groups(ip: Ipv6Addr) -> String {
    if ip.to_ipv4_mapped().is_none() {
        return ip.to_string();
    }
    let [.., a, b] = ip.segments();
    format!("::ffff:{a:x}:{b:x}")
}

/// Family and addresses of version 2.
fn addresses(ends: Option<&Ends>) -> Result<(u8, Vec<u8>), TooLong> {
    match ends {
        None => Ok((0, Vec::new())),
        Some(Ends::Tcp { source, destination }) => {
            let ports = [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat();
            Ok(match same_family(source.ip(), destination.ip()) {
                Pair::V4(from, to) => (0x11, [&from.octets()[..], &to.octets(), &ports].concat()),
                Pair::V6(from, to) => (0x21, [&from.octets()[..], &to.octets(), &ports].concat()),
            })
        }
        Some(Ends::Unix { source, destination }) => {
            Ok((0x31, [path_field(source)?, path_field(destination)?].concat()))
        }
    }
}

fn path_field(path: &[u8]) -> Result<[u8; UNIX_PATH], TooLong> {
    let mut field = [0; UNIX_PATH];
    field.get_mut(..path.len()).ok_or(TooLong)?.copy_from_slice(path);
    Ok(field)
}

/// Reads the header that `bytes` begin with, however they were cut.
pub fn parse(bytes: &[u8]) -> Parsed {
    let begins = |with: &[u8]| bytes.iter().zip(with).all(|(a, b)| a == b);
    if begins(LINE_START) {
        if bytes.len() < LINE_START.len() { Parsed::More } else { parse_v1(bytes) }
    } else if begins(SIGNATURE) {
        if bytes.len() < FIXED { Parsed::More } else { parse_v2(bytes) }
    } else {
        Parsed::Bad("there is none")
    }
}

fn parse_v1(bytes: &[u8]) -> Parsed {
    let within = &bytes[..bytes.len().min(MAX_LINE)];
    let Some(end) = within.windows(2).position(|two| two == b"\r\n") else {
        return if within.len() == MAX_LINE {
            Parsed::Bad("its line does not end within 107 bytes")
        } else {
            Parsed::More
        };
    };
    let Ok(line) = std::str::from_utf8(&bytes[..end]) else { return Parsed::Bad("its line is no text") };
    let fields: Vec<&str> = line.split(' ').collect();
    let consumed = end + 2;
    match fields[..] {
        ["PROXY", "UNKNOWN", ..] => Parsed::Header(Header::default(), consumed),
        ["PROXY", "TCP4", from, to, source, destination] => {
            line_ends::<Ipv4Addr>([from, to], [source, destination], consumed)
        }
        ["PROXY", "TCP6", from, to, source, destination] => {
            line_ends::<Ipv6Addr>([from, to], [source, destination], consumed)
        }
        _ => Parsed::Bad("its line is not of the form PROXY TCP4 <from> <to> <port> <port>"),
    }
}

fn line_ends<A: std::str::FromStr + Into<IpAddr>>(ips: [&str; 2], ports: [&str; 2], consumed: usize) -> Parsed {
    let address = |i: usize| Some(SocketAddr::new(ips[i].parse::<A>().ok()?.into(), port(ports[i])?));
    match (address(0), address(1)) {
        (Some(source), Some(destination)) => Parsed::Header(Header::tcp(source, destination), consumed),
        _ => Parsed::Bad("an address or port of its line is wrong"),
    }
}

/// Decimal, without a sign or leading zeros.
fn port(text: &str) -> Option<u16> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    plain.then(|| text.parse().ok()).flatten()
}

fn parse_v2(bytes: &[u8]) -> Parsed {
    let length = usize::from(u16::from_be_bytes([bytes[14], bytes[15]]));
    let consumed = FIXED + length;
    if consumed > MAX_HEADER {
        return Parsed::Bad("it is longer than 16 KiB");
    }
    let Some(header) = bytes.get(..consumed) else { return Parsed::More };
    let said = match header[12] {
        // The sender itself speaks; what else is there is to be skipped.
        0x20 => Ok(Header::default()),
        0x21 => read_v2(header),
        byte if byte >> 4 != 2 => Err("its version is not 2"),
        _ => Err("its command is not known"),
    };
    match said {
        Ok(header) => Parsed::Header(header, consumed),
        Err(wrong) => Parsed::Bad(wrong),
    }
}

/// Reads a whole header of version 2 with command PROXY.
fn read_v2(header: &[u8]) -> Result<Header, &'static str> {
    let mut fields = Fields(&header[FIXED..]);
    let ends = match header[13] {
        0x00 => None,
        0x11 => Some(tcp_ends::<4>(&mut fields).ok_or(SHORT)?),
        0x21 => Some(tcp_ends::<16>(&mut fields).ok_or(SHORT)?),
        0x31 => Some(unix_ends(&mut fields).ok_or(SHORT)?),
        0x12 | 0x22 | 0x32 => return Err("it is about datagrams"),
        _ => return Err("its family is not known"),
    };
    Ok(Header { ends, tlvs: tlvs(&mut fields, header)? })
}

const SHORT: &str = "its addresses are cut off";

fn tcp_ends<const N: usize>(fields: &mut Fields<'_>) -> Option<Ends> {
    let (from, to) = (ip(fields.take(N)?)?, ip(fields.take(N)?)?);
    let (source, destination) = (SocketAddr::new(from, fields.u16()?), SocketAddr::new(to, fields.u16()?));
    Some(Ends::Tcp { source, destination })
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

fn unix_ends(fields: &mut Fields<'_>) -> Option<Ends> {
    let mut path = || {
        let field = fields.take(UNIX_PATH)?;
        let end = field.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        Some(field[..end].to_vec())
    };
    Some(Ends::Unix { source: path()?, destination: path()? })
}

fn tlvs(fields: &mut Fields<'_>, header: &[u8]) -> Result<Vec<Tlv>, &'static str> {
    let mut found: Vec<Tlv> = Vec::new();
    for _ in 0..=MAX_TLVS {
        if fields.0.is_empty() {
            return Ok(found);
        }
        let (kind, value) = tlv(fields).ok_or("a TLV of it is cut off")?;
        match kind {
            TLV_CRC32C => check_sum(header, header.len() - fields.0.len() - value.len(), value)?,
            TLV_NOOP => {}
            TLV_UNIQUE_ID if value.len() > MAX_UNIQUE_ID => return Err("its unique id is longer than 128 bytes"),
            // Two answers to one question: somebody behind us might take the other one.
            TLV_AUTHORITY | TLV_UNIQUE_ID if found.iter().any(|tlv| tlv.kind == kind) => {
                return Err("it names the host or the connection twice");
            }
            TLV_AUTHORITY if std::str::from_utf8(value).is_err() => return Err("its host name is no text"),
            _ => found.push(Tlv { kind, value: value.to_vec() }),
        }
    }
    Err("it has more than 64 TLVs")
}

fn tlv<'a>(fields: &mut Fields<'a>) -> Option<(u8, &'a [u8])> {
    let (kind, length) = (fields.u8()?, fields.u16()?);
    Some((kind, fields.take(length.into())?))
}

/// The sum is over the whole header with zeros in its own place, which is `at`.
fn check_sum(header: &[u8], at: usize, value: &[u8]) -> Result<(), &'static str> {
    let expected = <[u8; 4]>::try_from(value).map_err(|_| "its checksum is not of 4 bytes")?;
    let sum = crc32c::crc32c(&header[..at]);
    let sum = crc32c::crc32c_append(crc32c::crc32c_append(sum, &[0; 4]), &header[at + 4..]);
    if sum == u32::from_be_bytes(expected) { Ok(()) } else { Err("its checksum is wrong") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn tcp(source: &str, destination: &str) -> Header {
        Header::tcp(address(source), address(destination))
    }

    fn tlv(kind: u8, value: &[u8]) -> Tlv {
        Tlv { kind, value: value.to_vec() }
    }

    /// A header of version 2 by hand.
    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        [&SIGNATURE[..], &[command, family], &(body.len() as u16).to_be_bytes(), body].concat()
    }

    const IPV4: [u8; 12] = [10, 0, 0, 7, 10, 0, 0, 9, 0x30, 0x39, 0x01, 0xbb];

    fn bad(bytes: &[u8], why: &str) {
        match parse(bytes) {
            Parsed::Bad(got) => assert!(got.contains(why), "{got}: {}", bytes.escape_ascii()),
            other => panic!("{other:?}: {}", bytes.escape_ascii()),
        }
    }

    /// Cut anywhere it needs more; whole, and with anything behind it, it says `expected`.
    fn good(bytes: &[u8], expected: &Header) {
        for cut in 0..bytes.len() {
            assert_eq!(parse(&bytes[..cut]), Parsed::More, "cut at {cut}: {}", bytes.escape_ascii());
        }
        for behind in [&b""[..], b"\x16\x03\x01", b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1\r\n"] {
            let parsed = parse(&[bytes, behind].concat());
            assert_eq!(parsed, Parsed::Header(expected.clone(), bytes.len()), "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn lines_of_version_1_are_read() {
        let of_line = |line: &str, expected| good(format!("{line}\r\n").as_bytes(), &expected);
        of_line("PROXY TCP4 10.0.0.7 10.0.0.9 12345 443", tcp("10.0.0.7:12345", "10.0.0.9:443"));
        of_line(
            "PROXY TCP4 255.255.255.255 255.255.255.255 65535 0",
            tcp("255.255.255.255:65535", "255.255.255.255:0"),
        );
        of_line("PROXY TCP6 2001:db8::7 ::1 1 2", tcp("[2001:db8::7]:1", "[::1]:2"));
        of_line("PROXY UNKNOWN", Header::default());
        of_line("PROXY UNKNOWN ffff::1 whatever \u{e9}", Header::default());
        let longest =
            "PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535";
        assert_eq!(longest.len() + 2, MAX_LINE);
        of_line(longest, Header::default());
    }

    #[test]
    fn lines_that_break_the_rules_are_refused() {
        for line in [
            "PROXY TCP4 10.0.0.7 10.0.0.9 12345",
            "PROXY TCP4 10.0.0.7 10.0.0.9 12345 443 ",
            "PROXY TCP4  10.0.0.7 10.0.0.9 12345 443",
            "PROXY tcp4 10.0.0.7 10.0.0.9 12345 443",
            "PROXY UDP4 10.0.0.7 10.0.0.9 12345 443",
            "PROXY TCP4\t10.0.0.7 10.0.0.9 12345 443",
            "PROXY ",
        ] {
            bad(format!("{line}\r\n").as_bytes(), "not of the form");
        }
        for fields in [
            "TCP4 10.0.0.07 10.0.0.9 12345 443",
            "TCP4 10.0.7 10.0.0.9 12345 443",
            "TCP4 ::1 ::1 1 1",
            "TCP6 10.0.0.7 10.0.0.9 1 1",
            "TCP6 fe80::1%eth0 ::1 1 1",
            "TCP4 10.0.0.7 10.0.0.9 65536 443",
            "TCP4 10.0.0.7 10.0.0.9 +1 443",
            "TCP4 10.0.0.7 10.0.0.9 01 443",
            "TCP4 10.0.0.7 10.0.0.9 -1 443",
            "TCP4 10.0.0.7 10.0.0.9  443",
            "TCP4 10.0.0.7 10.0.0.9 1\n 443",
        ] {
            match parse(format!("PROXY {fields}\r\n").as_bytes()) {
                Parsed::Bad(_) => {}
                other => panic!("{fields}: {other:?}"),
            }
        }
        bad(b"PROXY TCP4 \xff 10.0.0.9 1 443\r\n", "no text");
        bad(&[b"PROXY UNKNOWN ".to_vec(), vec![b'x'; 200]].concat(), "107");
        let late = [b"PROXY UNKNOWN ".to_vec(), vec![b'x'; MAX_LINE - 15], b"\r\n".to_vec()].concat();
        bad(&late, "107");
    }

    #[test]
    fn what_is_no_header_is_told_at_its_first_wrong_byte() {
        for bytes in [&b"GET / HTTP/1.1"[..], b"\x16\x03\x01", b"PROXZ", b"proxy ", b"\r\n\r\n\0\r\nQUIZ", b"\r\n\r\nx"]
        {
            bad(bytes, "there is none");
        }
        assert_eq!(parse(b""), Parsed::More);
    }

    #[test]
    fn headers_of_version_2_are_read() {
        let of_ipv4 = tcp("10.0.0.7:12345", "10.0.0.9:443");
        good(&v2(0x21, 0x11, &IPV4), &of_ipv4);
        let ipv6 = [[[0; 15].as_slice(), &[1]].concat(), vec![0x20; 16], vec![0, 1, 0, 2]].concat();
        let of_ipv6 = tcp("[::1]:1", "[2020:2020:2020:2020:2020:2020:2020:2020]:2");
        good(&v2(0x21, 0x21, &ipv6), &of_ipv6);
        let mut paths = [0; 216];
        paths[..4].copy_from_slice(b"/a/b");
        paths[108..112].copy_from_slice(b"\0abs");
        let of_unix = Ends::Unix { source: b"/a/b".to_vec(), destination: b"\0abs".to_vec() };
        good(&v2(0x21, 0x31, &paths), &Header { ends: Some(of_unix), tlvs: vec![] });
        let more = [&IPV4[..], &[4, 0, 2, 9, 9], &[2, 0, 2, b'd', b'b'], &[0xE0, 0, 0]].concat();
        let said = vec![tlv(TLV_AUTHORITY, b"db"), tlv(0xE0, b"")];
        good(&v2(0x21, 0x11, &more), &Header { tlvs: said, ..of_ipv4 });
    }

    #[test]
    fn a_sender_that_speaks_for_itself_says_nothing_about_others() {
        for (command, family, body) in [
            (0x20, 0x00, &b""[..]),
            (0x20, 0x11, &IPV4),
            (0x20, 0xff, b"anything"),
            (0x20, 0x11, b"short"),
            (0x21, 0x00, b""),
        ] {
            good(&v2(command, family, body), &Header::default());
        }
        let named = Header { ends: None, tlvs: vec![tlv(TLV_AUTHORITY, b"db")] };
        good(&v2(0x21, 0x00, &[2, 0, 2, b'd', b'b']), &named);
        assert_eq!(named.encode_v2(false).unwrap(), v2(0x21, 0x00, &[2, 0, 2, b'd', b'b']));
    }

    #[test]
    fn headers_of_version_2_that_break_the_rules_are_refused() {
        let with = |tlvs: &[u8]| v2(0x21, 0x11, &[&IPV4[..], tlvs].concat());
        bad(&v2(0x11, 0x11, &IPV4), "version is not 2");
        bad(&v2(0x31, 0x11, &IPV4), "version is not 2");
        bad(&v2(0x22, 0x11, &IPV4), "command is not known");
        bad(&v2(0x21, 0x12, &IPV4), "datagrams");
        bad(&v2(0x21, 0x41, &IPV4), "family is not known");
        bad(&v2(0x21, 0x10, &IPV4), "family is not known");
        bad(&v2(0x21, 0x11, &IPV4[..11]), "addresses are cut off");
        bad(&v2(0x21, 0x21, &IPV4), "addresses are cut off");
        bad(&v2(0x21, 0x31, &[0; 215]), "addresses are cut off");
        bad(&with(&[2]), "TLV of it is cut off");
        bad(&with(&[2, 0]), "TLV of it is cut off");
        bad(&with(&[2, 0, 3, b'd', b'b']), "TLV of it is cut off");
        bad(&with(&[2, 0, 1, b'a', 2, 0, 1, b'b']), "twice");
        bad(&with(&[2, 0, 1, 0xff]), "no text");
        bad(&with(&[&[5, 0, 129][..], &[7; 129]].concat()), "128 bytes");
        bad(&with(&[3, 0, 3, 1, 2, 3]), "4 bytes");
        bad(&with(&[3, 0, 4, 1, 2, 3, 4]), "checksum is wrong");
        bad(&with(&[0xE0, 0, 0].repeat(65)), "more than 64");
        let (mut long, length) = (v2(0x21, 0x11, &IPV4), MAX_HEADER - FIXED + 1);
        long[14..16].copy_from_slice(&(length as u16).to_be_bytes());
        bad(&long[..FIXED], "longer than 16 KiB");
    }

    #[test]
    fn a_checksum_holds_over_every_byte() {
        let header = Header { tlvs: vec![tlv(TLV_UNIQUE_ID, b"42")], ..tcp("10.0.0.7:1", "10.0.0.9:2") };
        let bytes = header.encode_v2(true).unwrap();
        good(&bytes, &header);
        // The signature, the version and the length are judged before the sum.
        for at in FIXED..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(matches!(parse(&changed), Parsed::Bad(_)), "byte {at}");
        }
    }

    #[test]
    fn what_is_written_is_known_to_the_byte() {
        let header = tcp("10.0.0.7:12345", "10.0.0.9:443");
        assert_eq!(header.encode_v1(), b"PROXY TCP4 10.0.0.7 10.0.0.9 12345 443\r\n");
        assert_eq!(header.encode_v2(false).unwrap(), v2(0x21, 0x11, &IPV4));
        assert_eq!(tcp("[::ffff:10.0.0.7]:12345", "10.0.0.9:443").encode_v2(false), header.encode_v2(false));
        assert_eq!(tcp("[2001:db8::1]:1", "10.0.0.9:2").encode_v1(), b"PROXY TCP6 2001:db8::1 ::ffff:a00:9 1 2\r\n");
        assert_eq!(Header::default().encode_v1(), b"PROXY UNKNOWN\r\n");
        assert_eq!(Header::default().encode_v2(false).unwrap(), v2(0x20, 0, b""));
    }

    #[test]
    fn what_is_too_long_is_not_written() {
        let unix =
            |length| Header { ends: Some(Ends::Unix { source: vec![1; length], destination: vec![] }), tlvs: vec![] };
        assert!(unix(108).encode_v2(false).is_ok());
        assert_eq!(unix(109).encode_v2(false), Err(TooLong));
        let with = |length| Header { tlvs: vec![tlv(0xE0, &vec![0; length])], ..tcp("10.0.0.7:1", "10.0.0.9:2") };
        let most = MAX_HEADER - FIXED - IPV4.len() - 3;
        assert_eq!(with(most).encode_v2(false).unwrap().len(), MAX_HEADER);
        assert_eq!(with(most + 1).encode_v2(false), Err(TooLong));
        assert_eq!(with(70_000).encode_v2(false), Err(TooLong));
    }

    fn ends() -> impl Strategy<Value = Option<Ends>> {
        let path = || proptest::collection::vec(1..=255u8, 0..=UNIX_PATH);
        let pair = |(source, destination)| Some(Ends::Tcp { source, destination });
        prop_oneof![
            (any::<std::net::SocketAddrV4>(), any::<std::net::SocketAddrV4>())
                .prop_map(move |(a, b)| pair((a.into(), b.into()))),
            (any::<u128>(), any::<u128>(), any::<u16>(), any::<u16>()).prop_map(move |(a, b, p, q)| {
                let address = |bits, port| SocketAddr::new(Ipv6Addr::from_bits(bits | 1 << 127).into(), port);
                pair((address(a, p), address(b, q)))
            }),
            (path(), path()).prop_map(|(source, destination)| Some(Ends::Unix { source, destination })),
        ]
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_again(ends in ends(), values in proptest::collection::vec((0x20..=255u8, any::<Vec<u8>>()), 0..9), checked: bool) {
            let tlvs = values.iter().map(|(kind, value)| tlv(*kind, value)).collect();
            let header = Header { ends, tlvs };
            let bytes = header.encode_v2(checked).unwrap();
            prop_assert_eq!(parse(&bytes), Parsed::Header(header.clone(), bytes.len()));
            if let Some(Ends::Tcp { .. }) = header.ends {
                let line = header.encode_v1();
                let expected = Header { tlvs: vec![], ..header };
                prop_assert_eq!(parse(&line), Parsed::Header(expected, line.len()));
            }
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), kind in 0..3usize) {
            let begin = [&b""[..], LINE_START, SIGNATURE][kind];
            if let Parsed::Header(_, consumed) = parse(&[begin, &bytes].concat()) {
                prop_assert!(consumed <= begin.len() + bytes.len());
            }
        }

        #[test]
        fn any_body_of_version_2_is_read_without_a_panic(family: u8, body in proptest::collection::vec(any::<u8>(), 0..400)) {
            for family in [family, 0x11, 0x21, 0x31] {
                prop_assert!(!matches!(parse(&v2(0x21, family, &body)), Parsed::More));
            }
        }
    }
}
