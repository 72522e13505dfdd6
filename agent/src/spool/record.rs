//! The bytes of the spool's files. Pure: bytes in, links out.
//!
//! ```text
//! segment:  header 72 | record, record, …                     files `<number, 20 digits>.seg`, about 1 MiB each
//! header:   "SWSP" 4 | version 1 | zero 3 | epoch 16 | seq 8 | hash 32 | zero 4 | crc32c 4 of the 68 before
//! record:   "SWRC" 4 | length 4 | crc32c 4 of length and payload | payload (a link, as `sidewarden_proto::batch` has it)
//! ```
//! Numbers are big-endian. `seq` and `hash` are the cursor before the segment's first record: with them an empty spool
//! still knows where its chain stands. A segment is written by appending only, or replaced as a whole by a rename, so a
//! crash can leave one record cut short at the end, or zeros where the file system had room but no data yet: both are a
//! *torn* tail and were never offered to a collector. Anything else that does not check is *damage*: reading goes on
//! at the next record that checks.

use std::ops::Range;

use sidewarden_proto::batch::{Cursor, Epoch, Link, MAX_LINK};
use sidewarden_proto::identity::Sha256;

/// Bytes of a segment's header.
pub const HEADER: usize = 72;
/// Bytes in front of a record's payload.
pub const RECORD_HEAD: usize = 12;
/// A segment is closed when it is as long as this.
pub const SEGMENT: u64 = 1 << 20;
/// No segment is longer than this; what follows is not read.
pub const MAX_SEGMENT: u64 = SEGMENT + (MAX_LINK + RECORD_HEAD) as u64;

const SEGMENT_MAGIC: &[u8; 4] = b"SWSP";
const RECORD_MAGIC: &[u8; 4] = b"SWRC";
const VERSION: u8 = 1;

/// The header of a segment whose first record follows `at`.
pub fn header(epoch: Epoch, at: Cursor) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER);
    out.extend(SEGMENT_MAGIC);
    out.extend([VERSION, 0, 0, 0]);
    out.extend(epoch.0);
    out.extend(at.seq.to_be_bytes());
    out.extend(at.hash.0);
    out.extend([0; 4]);
    let crc = crc32c::crc32c(&out);
    out.extend(crc.to_be_bytes());
    out
}

/// The record of `payload`.
pub fn record(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    let crc = crc32c::crc32c_append(crc32c::crc32c(&length), payload);
    [RECORD_MAGIC, &length[..], &crc.to_be_bytes(), payload].concat()
}

/// What a segment's bytes hold.
#[derive(Debug, Default)]
pub struct Scan {
    /// Epoch and cursor of the header; `None` when it does not check.
    pub start: Option<(Epoch, Cursor)>,
    /// Every link that checks, with where its record lies.
    pub links: Vec<(Range<usize>, Link)>,
    /// What does not check.
    pub damage: Vec<Range<usize>>,
    /// Where a torn tail begins.
    pub torn: Option<usize>,
}

/// Reads a segment.
pub fn scan(bytes: &[u8]) -> Scan {
    let mut scan = Scan { start: read_header(bytes), ..Scan::default() };
    let mut at = HEADER.min(bytes.len());
    if scan.start.is_none() {
        at = next_record(bytes, 0).unwrap_or(bytes.len());
        note_fault(&mut scan, bytes, 0..at);
    }
    while at < bytes.len() {
        match read_record(&bytes[at..]) {
            Some((link, length)) => {
                scan.links.push((at..at + length, link));
                at += length;
            }
            None => {
                let next = next_record(bytes, at + 1).unwrap_or(bytes.len());
                note_fault(&mut scan, bytes, at..next);
                at = next;
            }
        }
    }
    scan
}

fn note_fault(scan: &mut Scan, bytes: &[u8], range: Range<usize>) {
    if range.is_empty() {
        return;
    }
    if range.end == bytes.len() && is_torn(&bytes[range.clone()], range.start == 0) {
        scan.torn = Some(range.start);
    } else {
        scan.damage.push(range);
    }
}

fn read_header(bytes: &[u8]) -> Option<(Epoch, Cursor)> {
    let head = bytes.get(..HEADER)?;
    let (fields, crc) = head.split_at(HEADER - 4);
    if &fields[..4] != SEGMENT_MAGIC || fields[4] != VERSION || crc32c::crc32c(fields).to_be_bytes() != crc {
        return None;
    }
    let epoch = Epoch(fields[8..24].try_into().ok()?);
    let seq = u64::from_be_bytes(fields[24..32].try_into().ok()?);
    Some((epoch, Cursor { seq, hash: Sha256(fields[32..64].try_into().ok()?) }))
}

/// The link at the front of `bytes` and the length of its record.
pub fn read_record(bytes: &[u8]) -> Option<(Link, usize)> {
    let (head, rest) = bytes.split_first_chunk::<RECORD_HEAD>()?;
    let length = u32::from_be_bytes([head[4], head[5], head[6], head[7]]) as usize;
    if &head[..4] != RECORD_MAGIC || length > MAX_LINK {
        return None;
    }
    let payload = rest.get(..length)?;
    if crc32c::crc32c_append(crc32c::crc32c(&head[4..8]), payload).to_be_bytes() != head[8..] {
        return None;
    }
    Some((Link::decode(payload).ok()?, RECORD_HEAD + length))
}

fn next_record(bytes: &[u8], from: usize) -> Option<usize> {
    (from..bytes.len().saturating_sub(RECORD_HEAD))
        .find(|at| bytes[*at..].starts_with(RECORD_MAGIC) && read_record(&bytes[*at..]).is_some())
}

/// Whether `tail` is what an interrupted append leaves: zeros, or the beginning of a header or record.
fn is_torn(tail: &[u8], at_front: bool) -> bool {
    if tail.iter().all(|byte| *byte == 0) || (at_front && tail.len() < HEADER && begins(tail, SEGMENT_MAGIC)) {
        return true;
    }
    let Some(length) = tail.get(4..8) else { return begins(tail, RECORD_MAGIC) };
    let stated = u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize;
    tail.starts_with(RECORD_MAGIC) && stated <= MAX_LINK && tail.len() < RECORD_HEAD + stated
}

fn begins(tail: &[u8], magic: &[u8; 4]) -> bool {
    let shared = tail.len().min(4);
    tail[..shared] == magic[..shared]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sidewarden_proto::batch::Batch;
    use sidewarden_proto::event::{AgentStopping, Body, Event, Severity};
    use sidewarden_proto::time::Timestamp;

    use super::*;

    const EPOCH: Epoch = Epoch([3; 16]);

    fn chain(count: u64) -> Vec<Link> {
        let mut at = Cursor::START;
        let body = Body::from(AgentStopping { reason: "x".into() });
        (0..count)
            .map(|_| {
                let mut events = vec![Event::new(Timestamp(1), Severity::Info, "x", &body)];
                let link = Link::Batch(Batch::seal(EPOCH, at.seq + 1, at.hash, &mut events).unwrap());
                at = Cursor { seq: link.last_seq(), hash: link.hash() };
                link
            })
            .collect()
    }

    fn segment(links: &[Link]) -> (Vec<u8>, Vec<usize>) {
        let mut bytes = header(EPOCH, Cursor::START);
        let mut ends = vec![bytes.len()];
        for link in links {
            bytes.extend(record(&link.encode()));
            ends.push(bytes.len());
        }
        (bytes, ends)
    }

    #[test]
    fn what_was_written_is_read() {
        let links = chain(3);
        let scan = scan(&segment(&links).0);
        assert_eq!(scan.start, Some((EPOCH, Cursor::START)));
        assert_eq!(scan.links.into_iter().map(|(_, l)| l).collect::<Vec<_>>(), links);
        assert!(scan.damage.is_empty() && scan.torn.is_none());
    }

    #[test]
    fn a_write_torn_at_any_byte_keeps_every_whole_record_and_is_no_damage() {
        let links = chain(3);
        let (bytes, ends) = segment(&links);
        for cut in 0..bytes.len() {
            let scan = scan(&bytes[..cut]);
            let whole = ends[1..].iter().filter(|end| **end <= cut).count();
            assert_eq!((scan.links.len(), scan.damage.len()), (whole, 0), "cut at {cut}: {scan:?}");
            assert_eq!(scan.torn.is_some(), cut != 0 && !ends.contains(&cut), "cut at {cut}");
        }
    }

    #[test]
    fn one_changed_byte_costs_one_record_at_most() {
        let links = chain(3);
        let (bytes, ends) = segment(&links);
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x55;
            let scan = scan(&changed);
            let hit_header = at < ends[0];
            assert_eq!(scan.links.len(), if hit_header { 3 } else { 2 }, "byte {at}");
            assert_eq!(scan.start.is_none(), hit_header, "byte {at}");
            let seen = scan.damage.iter().any(|range| range.contains(&at)) || scan.torn.is_some_and(|from| from <= at);
            assert!(seen, "byte {at} is not accounted for: {scan:?}");
        }
    }

    #[test]
    fn zeros_at_the_end_are_a_torn_write() {
        let (mut bytes, ends) = segment(&chain(1));
        bytes.extend([0; 500]);
        assert_eq!(scan(&bytes).torn, Some(ends[1]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let scan = scan(&bytes);
            prop_assert!(scan.links.is_empty());
        }
    }
}
