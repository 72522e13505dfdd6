//! What really goes over the wire between the containers: a look at the bridge's packets, and whether any plain word of
//! HTTP or SQL is among them.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::interrupt;

/// Words that every plain connection of the scene has in it.
const PLAIN: &[&[u8]] = &[b"HTTP/1.", b"GET /", b"POST /", b"SELECT ", b"INSERT "];

/// What was seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// TCP segments with something in them.
    pub segments: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Segments with a plain word in them.
    pub plain: u64,
}

/// Looks at all TCP between `hosts` for `time`. Needs CAP_NET_RAW.
pub fn look(hosts: &HashSet<Ipv4Addr>, time: Duration) -> Result<Traffic> {
    let socket = listen().context("opening a packet socket")?;
    let end = Instant::now() + time;
    let (mut traffic, mut frame) = (Traffic::default(), vec![0; 65536]);
    while Instant::now() < end {
        interrupt::check()?;
        // A timeout is a quiet wire.
        if let Ok(length) = recv(socket.as_raw_fd(), &mut frame, MsgFlags::empty()) {
            traffic.count(&frame[..length], hosts);
        }
    }
    Ok(traffic)
}

fn listen() -> nix::Result<OwnedFd> {
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(100))?;
    Ok(socket)
}

impl Traffic {
    fn count(&mut self, frame: &[u8], hosts: &HashSet<Ipv4Addr>) {
        let Some(segment) = segment(frame).filter(|s| hosts.contains(&s.from) && hosts.contains(&s.to)) else { return };
        if segment.payload.is_empty() {
            return;
        }
        self.segments += 1;
        self.bytes += segment.payload.len() as u64;
        self.plain += u64::from(PLAIN.iter().any(|word| holds(segment.payload, word)));
    }
}

fn holds(payload: &[u8], word: &[u8]) -> bool {
    payload.windows(word.len()).any(|part| part == word)
}

struct Segment<'a> {
    from: Ipv4Addr,
    to: Ipv4Addr,
    payload: &'a [u8],
}

/// The TCP segment in an Ethernet frame, if it is one over IPv4.
fn segment(frame: &[u8]) -> Option<Segment<'_>> {
    let packet = frame.get(14..).filter(|_| frame[12..14] == [0x08, 0x00])?;
    let length = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
    // With segmentation done by the device the length can be 0: then the frame is the packet.
    let packet = if length == 0 { packet } else { packet.get(..length)? };
    let tcp = packet.get(usize::from(packet[0] & 15) * 4..).filter(|_| packet.get(9) == Some(&6))?;
    let payload = tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?;
    let address = |at: usize| packet.get(at..at + 4).map(|a| Ipv4Addr::new(a[0], a[1], a[2], a[3]));
    Some(Segment { from: address(12)?, to: address(16)?, payload })
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 2);
    const B: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 3);

    fn frame(from: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend(u16::try_from(40 + payload.len()).unwrap().to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 6, 0, 0]);
        frame.extend(from.octets());
        frame.extend(to.octets());
        frame.extend([0; 12]);
        frame.extend([0x50, 0, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }

    #[test]
    fn plain_words_are_found_between_the_containers_only() {
        let hosts = HashSet::from([A, B]);
        let elsewhere = Ipv4Addr::new(10, 0, 0, 1);
        for (from, to, payload, expected) in [
            (A, B, &b"\x17\x03\x03\x00\x20sealed"[..], Traffic { segments: 1, bytes: 11, plain: 0 }),
            (B, A, b"GET /orders HTTP/1.1\r\n", Traffic { segments: 1, bytes: 22, plain: 1 }),
            (A, B, b"\x21\x00\x00\x00\x03SELECT id FROM orders", Traffic { segments: 1, bytes: 26, plain: 1 }),
            (A, B, b"", Traffic::default()),
            (A, elsewhere, b"GET / HTTP/1.1\r\n", Traffic::default()),
        ] {
            let mut traffic = Traffic::default();
            traffic.count(&frame(from, to, payload), &hosts);
            assert_eq!(traffic, expected, "{payload:?}");
        }
    }

    #[test]
    fn cut_and_foreign_frames_are_passed_over() {
        let whole = frame(A, B, b"GET / HTTP/1.1\r\n");
        for length in 0..whole.len() {
            let mut traffic = Traffic::default();
            traffic.count(&whole[..length], &HashSet::from([A, B]));
            assert_eq!(traffic, Traffic::default(), "cut at {length}");
        }
    }
}
