//! Sockets by NETLINK_SOCK_DIAG: what `ss` asks. It needs no privilege, its cost depends on what listens and not on the
//! size of the kernel's tables, and it tells the cgroup of the socket's owner.
//!
//! Asking is at the bottom; reading the answer is pure, and takes nothing of it on trust.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use sidewarden_proto::event::Protocol;

use super::listeners::Listener;

/// NLMSG_ERROR, NLMSG_DONE, SOCK_DIAG_BY_FAMILY; and NLM_F_REQUEST with NLM_F_DUMP.
const ERROR: u16 = 2;
const DONE: u16 = 3;
const BY_FAMILY: u16 = 20;
const REQUEST_DUMP: u16 = 0x301;

/// INET_DIAG_SKV6ONLY and INET_DIAG_CGROUP_ID.
const V6_ONLY: u16 = 11;
const CGROUP_ID: u16 = 21;

/// Lengths of `nlmsghdr`, `inet_diag_msg` and `rtattr`.
const HEADER: usize = 16;
const MESSAGE: usize = 72;
const ATTRIBUTE: usize = 4;

/// States as bits: a TCP socket that listens; a UDP socket that is connected to nobody.
const LISTENING: u32 = 1 << 10;
const UNCONNECTED: u32 = 1 << 7;

/// A container with more open ports than this is told to be unreadable.
const MAX_SOCKETS: usize = 16_384;

/// The kernel answers at once, or something is badly wrong.
const WITHIN_SECS: i64 = 1;

/// What an answer holds, as far as it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// More follows.
    More,
    /// That was all.
    Done,
}

/// All sockets that take what comes from others: listening TCP, and UDP that is connected to nobody.
pub(super) fn listeners() -> Result<Vec<Listener>, String> {
    let socket = open().map_err(|e| e.to_string())?;
    let mut found = Vec::new();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            ask(&socket, protocol, family as u8, &mut found)?;
        }
    }
    Ok(found)
}

fn open() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkSockDiag)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(WITHIN_SECS))?;
    Ok(socket)
}

fn ask(socket: &OwnedFd, protocol: Protocol, family: u8, found: &mut Vec<Listener>) -> Result<(), String> {
    let kernel = NetlinkAddr::new(0, 0);
    sendto(socket.as_raw_fd(), &request(protocol, family), &kernel, MsgFlags::empty()).map_err(|e| e.to_string())?;
    let mut buffer = vec![0; 32 << 10];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(|e| e.to_string())?;
        if read(&buffer[..length], protocol, found)? == Progress::Done {
            return Ok(());
        }
    }
}

/// `nlmsghdr`, then `inet_diag_req_v2` with no filter but the state.
fn request(protocol: Protocol, family: u8) -> Vec<u8> {
    let (number, states) = match protocol {
        Protocol::Tcp => (6, LISTENING),
        Protocol::Udp => (17, UNCONNECTED),
    };
    let mut bytes = Vec::with_capacity(72);
    bytes.extend(72u32.to_ne_bytes());
    bytes.extend(BY_FAMILY.to_ne_bytes());
    bytes.extend(REQUEST_DUMP.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, number, 0, 0]);
    bytes.extend(states.to_ne_bytes());
    bytes.resize(72, 0);
    bytes
}

/// Reads one datagram of an answer.
fn read(mut bytes: &[u8], protocol: Protocol, found: &mut Vec<Listener>) -> Result<Progress, String> {
    while !bytes.is_empty() {
        let length = u32_at(bytes, 0).ok_or("a message is cut")? as usize;
        let message = bytes.get(..length).filter(|m| m.len() >= HEADER).ok_or("a message is cut")?;
        match u16_at(message, 4).ok_or("a message is cut")? {
            DONE => return Ok(Progress::Done),
            ERROR => return Err(refusal(message)),
            BY_FAMILY if found.len() >= MAX_SOCKETS => {
                return Err(format!("there are more than {MAX_SOCKETS} sockets"));
            }
            BY_FAMILY => found.push(listener(&message[HEADER..], protocol).ok_or("a socket is cut")?),
            _ => {}
        }
        // Messages begin at multiples of four.
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(Progress::More)
}

fn refusal(message: &[u8]) -> String {
    let code = u32_at(message, HEADER).map_or(0, u32::cast_signed);
    nix::errno::Errno::from_raw(code.wrapping_neg()).to_string()
}

/// `inet_diag_msg` with what follows it.
fn listener(message: &[u8], protocol: Protocol) -> Option<Listener> {
    let (fixed, mut attributes) = message.split_at_checked(MESSAGE)?;
    let (mut v6_only, mut cgroup) = (false, None);
    while let Some(length) = u16_at(attributes, 0).map(usize::from).filter(|l| *l >= ATTRIBUTE) {
        let value = attributes.get(ATTRIBUTE..length)?;
        match u16_at(attributes, 2)? {
            V6_ONLY => v6_only = value.first().is_some_and(|on| *on != 0),
            CGROUP_ID => cgroup = value.try_into().ok().map(u64::from_ne_bytes).filter(|id| *id != 0),
            _ => {}
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    let port = u16::from_be_bytes(fixed[4..6].try_into().ok()?);
    let v4 = fixed[0] == AddressFamily::Inet as u8;
    let ip: IpAddr = match v4 {
        true => Ipv4Addr::from(<[u8; 4]>::try_from(&fixed[8..12]).ok()?).into(),
        false => Ipv6Addr::from(<[u8; 16]>::try_from(&fixed[8..24]).ok()?).into(),
    };
    Some(Listener {
        protocol,
        address: SocketAddr::new(ip, port),
        v6_only: v4 || v6_only,
        uid: u32_at(fixed, 64)?,
        inode: u32_at(fixed, 68)?.into(),
        cgroup,
        ..Listener::default()
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (value.len() as u16 + 4).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = (body.len() as u32 + 16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(16, 0);
        bytes.extend(body);
        bytes
    }

    /// `[::]:8080` of uid 33 in cgroup 4711.
    fn a_socket() -> Vec<u8> {
        let mut body = vec![0; 72];
        body[0] = AddressFamily::Inet6 as u8;
        body[4..6].copy_from_slice(&8080u16.to_be_bytes());
        body[64..68].copy_from_slice(&33u32.to_ne_bytes());
        body[68..72].copy_from_slice(&99u32.to_ne_bytes());
        body.extend(attribute(8, &[0]));
        body.extend(attribute(V6_ONLY, &[1]));
        body.extend(attribute(CGROUP_ID, &4711u64.to_ne_bytes()));
        message(BY_FAMILY, &body)
    }

    #[test]
    fn a_socket_is_read_with_its_owner() {
        let mut found = Vec::new();
        let answer = [a_socket(), message(DONE, &[0; 4])].concat();
        assert_eq!(read(&answer, Protocol::Tcp, &mut found), Ok(Progress::Done));
        let expected = Listener {
            protocol: Protocol::Tcp,
            address: "[::]:8080".parse().unwrap(),
            v6_only: true,
            uid: 33,
            inode: 99,
            cgroup: Some(4711),
            ..Listener::default()
        };
        assert_eq!(found, [expected]);
        assert_eq!(read(&a_socket(), Protocol::Tcp, &mut found), Ok(Progress::More));
    }

    #[test]
    fn a_refusal_of_the_kernel_is_told_by_its_name() {
        let refused = message(ERROR, &(-2i32).to_ne_bytes());
        assert!(read(&refused, Protocol::Tcp, &mut Vec::new()).unwrap_err().starts_with("ENOENT"));
    }

    #[test]
    fn nothing_broken_is_read_as_a_socket_and_nothing_panics() {
        let whole = a_socket();
        for cut in 1..whole.len() {
            assert!(read(&whole[..cut], Protocol::Tcp, &mut Vec::new()).is_err(), "cut at {cut}");
        }
        for at in 0..whole.len() {
            for byte in [0, 1, 3, 0x7F, 0xFF] {
                let mut wrong = whole.clone();
                wrong[at] = byte;
                let _ = read(&wrong, Protocol::Udp, &mut Vec::new());
            }
        }
        let endless = [0u32.to_ne_bytes(), [0; 4], [0; 4], [0; 4]].concat();
        assert!(read(&endless, Protocol::Tcp, &mut Vec::new()).is_err(), "a message of no length");
        let mut many = vec![Listener::default(); MAX_SOCKETS];
        assert!(read(&whole, Protocol::Tcp, &mut many).unwrap_err().contains("more than"));
    }

    #[test]
    fn the_kernel_tells_of_our_own_sockets() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("[::1]:0").unwrap();
        let connected = UdpSocket::bind("127.0.0.1:0").unwrap();
        connected.connect("127.0.0.1:9").unwrap();
        let found = listeners().unwrap();
        let has = |protocol, address| found.iter().any(|l| l.protocol == protocol && l.address == address);
        assert!(has(Protocol::Tcp, tcp.local_addr().unwrap()), "{found:?}");
        assert!(has(Protocol::Udp, udp.local_addr().unwrap()), "{found:?}");
        assert!(!has(Protocol::Udp, connected.local_addr().unwrap()), "it takes nothing from strangers");
    }
}
