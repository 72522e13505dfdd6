//! How an agent's events become a chain that shows every removal and every change.
//!
//! Events are sealed into a [`Batch`] once and never cut again. Each link carries the hash of the one before. What had
//! to be dropped leaves a [`Tombstone`] that stands in the chain for the range it covers. The same bytes are kept in
//! the spool, sent on the wire and stored by the collector.
//!
//! ```text
//! batch:      0x01 | header (96) | zstd(JSON lines, one event each)
//! tombstone:  0x02 | epoch 16 | first_seq 8 | last_seq 8 | by_severity 4x4 | reason 1 | prev 32 | hash 32
//! header:     epoch 16 | first_seq 8 | count 4 | min_at 8 | max_at 8 | by_severity 4x4 | raw_len 4 | prev 32
//! ```
//! Numbers are big-endian. A batch's hash is SHA-256 over header and body; a tombstone takes over the hash of the last
//! link it replaces, so that the next link still fits.

use serde::{Deserialize, Serialize};
use std::fmt;

use crate::event::{Event, EventRef};
use crate::identity::{BadName, Sha256};
use crate::time::Timestamp;

/// Most events of one batch.
pub const MAX_EVENTS: usize = 10_000;
/// Most bytes of one batch before compression.
pub const MAX_RAW: usize = 32 << 20;
/// Most bytes of one link as sent.
pub const MAX_LINK: usize = 4 << 20;

const HEADER: usize = 96;
const TOMBSTONE: usize = 16 + 8 + 8 + 16 + 1 + 32 + 32;
/// zstd's fastest regular level: higher ones cost the agent more than they save (research/events.md).
const LEVEL: i32 = 1;

/// One life of a spool: random, so that sequence numbers of two lives never mix. Shows as hex.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Epoch(pub [u8; 16]);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Epoch {
    type Err = String;

    fn from_str(text: &str) -> Result<Epoch, String> {
        let fault = || format!("`{}` is no epoch: 32 hexadecimal digits", text.chars().take(40).collect::<String>());
        if text.len() != 32 || !text.is_ascii() {
            return Err(fault());
        }
        let mut epoch = [0; 16];
        for (i, byte) in epoch.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| fault())?;
        }
        Ok(Epoch(epoch))
    }
}

impl TryFrom<String> for Epoch {
    type Error = String;
    fn try_from(text: String) -> Result<Epoch, String> {
        text.parse()
    }
}

impl From<Epoch> for String {
    fn from(epoch: Epoch) -> String {
        epoch.to_string()
    }
}

/// Bytes that are no link, or no batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Fewer or more bytes than the form has.
    #[error("a link of {0} bytes is cut short, too long or of an unknown form")]
    Form(usize),
    /// A number outside its limit.
    #[error("{what} is {value}, the limit is {limit}")]
    Limit {
        /// Which number.
        what: &'static str,
        /// What it is.
        value: u64,
        /// What it may be.
        limit: u64,
    },
    /// The body does not decompress to what the header says.
    #[error("the batch does not decompress to the {0} bytes its header states")]
    Compression(u32),
    /// An event is no JSON of ours.
    #[error("event {seq} of the batch cannot be read: {error}")]
    Event {
        /// The position it should have had.
        seq: u64,
        /// What is wrong.
        error: String,
    },
    /// The header's counts are not those of the body.
    #[error("the batch holds {found} events where its header states {stated}")]
    Count {
        /// Events found.
        found: u64,
        /// Events stated.
        stated: u64,
    },
}

/// The fixed part of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The spool's life.
    pub epoch: Epoch,
    /// Sequence number of its first event.
    pub first_seq: u64,
    /// Number of events.
    pub count: u32,
    /// Earliest moment of its events.
    pub min_at: Timestamp,
    /// Latest moment of its events.
    pub max_at: Timestamp,
    /// Events of each severity, lowest first.
    pub by_severity: [u32; 4],
    /// Bytes before compression.
    pub raw_len: u32,
    /// Hash of the link before; zero for the first.
    pub prev: Sha256,
}

/// A sealed batch of events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The fixed part.
    pub header: Header,
    /// Hash over header and body.
    pub hash: Sha256,
    /// The events: JSON lines, zstd.
    pub body: Vec<u8>,
}

/// Why events were dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossReason {
    /// The spool was full.
    SpoolFull,
    /// The spool's file was damaged.
    Damaged,
    /// The collector has less than it once acknowledged.
    CollectorRewound,
    /// Nothing is lost: another collector has them.
    Elsewhere,
    /// A reason of a newer version.
    Other,
}

impl LossReason {
    /// The word in events and metrics.
    pub const fn word(self) -> &'static str {
        match self {
            LossReason::SpoolFull => "spool_full",
            LossReason::Damaged => "damaged",
            LossReason::CollectorRewound => "collector_rewound",
            LossReason::Elsewhere => "elsewhere",
            LossReason::Other => "other",
        }
    }

    fn from_byte(byte: u8) -> LossReason {
        match byte {
            1 => LossReason::SpoolFull,
            2 => LossReason::Damaged,
            3 => LossReason::CollectorRewound,
            4 => LossReason::Elsewhere,
            _ => LossReason::Other,
        }
    }

    fn byte(self) -> u8 {
        match self {
            LossReason::SpoolFull => 1,
            LossReason::Damaged => 2,
            LossReason::CollectorRewound => 3,
            LossReason::Elsewhere => 4,
            LossReason::Other => 0,
        }
    }
}

/// What stands for events that are gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tombstone {
    /// The spool's life.
    pub epoch: Epoch,
    /// First sequence number that is gone.
    pub first_seq: u64,
    /// Last sequence number that is gone.
    pub last_seq: u64,
    /// How many of each severity; all zero where that is not known.
    pub by_severity: [u32; 4],
    /// Why.
    pub reason: LossReason,
    /// Hash of the link before the first one dropped.
    pub prev: Sha256,
    /// Hash of the last link dropped: what the next link refers to.
    pub hash: Sha256,
}

/// One link of an agent's chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// Events.
    Batch(Batch),
    /// The place where events were.
    Tombstone(Tombstone),
}

impl Link {
    /// The spool's life.
    pub fn epoch(&self) -> Epoch {
        match self {
            Link::Batch(batch) => batch.header.epoch,
            Link::Tombstone(tombstone) => tombstone.epoch,
        }
    }

    /// First sequence number covered.
    pub fn first_seq(&self) -> u64 {
        match self {
            Link::Batch(batch) => batch.header.first_seq,
            Link::Tombstone(tombstone) => tombstone.first_seq,
        }
    }

    /// Last sequence number covered.
    pub fn last_seq(&self) -> u64 {
        match self {
            Link::Batch(batch) => batch.header.first_seq + u64::from(batch.header.count) - 1,
            Link::Tombstone(tombstone) => tombstone.last_seq,
        }
    }

    /// Hash of the link before.
    pub fn prev(&self) -> Sha256 {
        match self {
            Link::Batch(batch) => batch.header.prev,
            Link::Tombstone(tombstone) => tombstone.prev,
        }
    }

    /// What the next link refers to.
    pub fn hash(&self) -> Sha256 {
        match self {
            Link::Batch(batch) => batch.hash,
            Link::Tombstone(tombstone) => tombstone.hash,
        }
    }

    /// How many events of each severity it covers, lowest first.
    pub fn by_severity(&self) -> [u32; 4] {
        match self {
            Link::Batch(batch) => batch.header.by_severity,
            Link::Tombstone(tombstone) => tombstone.by_severity,
        }
    }

    /// Its bytes, as described at the head of this module.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Link::Batch(batch) => [&[1][..], &batch.header.encode(), &batch.body].concat(),
            Link::Tombstone(tombstone) => [&[2][..], &tombstone.encode()].concat(),
        }
    }

    /// Reads what [`Link::encode`] wrote. The body of a batch is not decompressed.
    pub fn decode(bytes: &[u8]) -> Result<Link, Malformed> {
        if bytes.len() > MAX_LINK {
            return Err(Malformed::Limit {
                what: "the size of a link",
                value: bytes.len() as u64,
                limit: MAX_LINK as u64,
            });
        }
        match bytes.split_first() {
            Some((1, rest)) if rest.len() >= HEADER => Batch::decode(rest).map(Link::Batch),
            Some((2, rest)) if rest.len() == TOMBSTONE => Tombstone::decode(rest).map(Link::Tombstone),
            _ => Err(Malformed::Form(bytes.len())),
        }
    }
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER);
        out.extend(self.epoch.0);
        out.extend(self.first_seq.to_be_bytes());
        out.extend(self.count.to_be_bytes());
        out.extend(self.min_at.0.to_be_bytes());
        out.extend(self.max_at.0.to_be_bytes());
        self.by_severity.iter().for_each(|n| out.extend(n.to_be_bytes()));
        out.extend(self.raw_len.to_be_bytes());
        out.extend(self.prev.0);
        out
    }

    fn decode(reader: &mut Fields<'_>) -> Result<Header, Malformed> {
        let header = Header {
            epoch: Epoch(reader.take()),
            first_seq: u64::from_be_bytes(reader.take()),
            count: u32::from_be_bytes(reader.take()),
            min_at: Timestamp(i64::from_be_bytes(reader.take())),
            max_at: Timestamp(i64::from_be_bytes(reader.take())),
            by_severity: [(); 4].map(|()| u32::from_be_bytes(reader.take())),
            raw_len: u32::from_be_bytes(reader.take()),
            prev: Sha256(reader.take()),
        };
        let limit = |what, value: u64, limit: u64| Malformed::Limit { what, value, limit };
        if header.count == 0 || header.count as usize > MAX_EVENTS {
            return Err(limit("the number of events", header.count.into(), MAX_EVENTS as u64));
        }
        if header.raw_len as usize > MAX_RAW {
            return Err(limit("the size before compression", header.raw_len.into(), MAX_RAW as u64));
        }
        check_range(header.first_seq, header.first_seq.checked_add(header.count.into()))?;
        let stated: u64 = header.by_severity.iter().map(|n| u64::from(*n)).sum();
        if stated != u64::from(header.count) {
            return Err(Malformed::Count { found: stated, stated: header.count.into() });
        }
        Ok(header)
    }
}

fn check_range(first: u64, end: Option<u64>) -> Result<(), Malformed> {
    if first > 0 && end.is_some_and(|end| end > first && end < u64::MAX / 2) {
        return Ok(());
    }
    Err(Malformed::Limit { what: "a sequence number", value: first, limit: u64::MAX / 2 })
}

/// Fields of a fixed layout, one after another. The caller has checked that there are enough bytes.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk::<N>().expect("the length was checked before");
        self.0 = rest;
        *field
    }
}

impl Batch {
    /// Seals `events` as the next link after `prev`, and writes their sequence numbers from `first_seq` on.
    ///
    /// There must be 1 to [`MAX_EVENTS`] of them.
    pub fn seal(epoch: Epoch, first_seq: u64, prev: Sha256, events: &mut [Event]) -> Result<Batch, Malformed> {
        if events.is_empty() || events.len() > MAX_EVENTS {
            let (value, limit) = (events.len() as u64, MAX_EVENTS as u64);
            return Err(Malformed::Limit { what: "the number of events", value, limit });
        }
        let raw = to_lines(first_seq, events)?;
        let mut by_severity = [0; 4];
        events.iter().for_each(|event| by_severity[event.severity.rank()] += 1);
        let times = || events.iter().map(|event| event.at_us);
        let header = Header {
            epoch,
            first_seq,
            count: events.len() as u32,
            min_at: times().min().unwrap_or_default(),
            max_at: times().max().unwrap_or_default(),
            by_severity,
            raw_len: raw.len() as u32,
            prev,
        };
        let body = zstd::bulk::compress(&raw, LEVEL).map_err(|_| Malformed::Compression(header.raw_len))?;
        let size = 1 + HEADER + body.len();
        if size > MAX_LINK {
            return Err(Malformed::Limit { what: "the size of a link", value: size as u64, limit: MAX_LINK as u64 });
        }
        let hash = Sha256::of(&[&header.encode(), &body]);
        Ok(Batch { header, hash, body })
    }

    fn decode(bytes: &[u8]) -> Result<Batch, Malformed> {
        let (head, body) = bytes.split_at(HEADER);
        let header = Header::decode(&mut Fields(head))?;
        Ok(Batch { header, hash: Sha256::of(&[head, body]), body: body.to_vec() })
    }

    /// Decompresses the events' text, within the limits.
    pub fn open(&self) -> Result<Lines, Malformed> {
        let fault = || Malformed::Compression(self.header.raw_len);
        let raw = zstd::bulk::decompress(&self.body, self.header.raw_len as usize).map_err(|_| fault())?;
        if raw.len() != self.header.raw_len as usize {
            return Err(fault());
        }
        let text = String::from_utf8(raw).map_err(|_| fault())?;
        Ok(Lines { text, first_seq: self.header.first_seq, count: self.header.count })
    }
}

fn to_lines(first_seq: u64, events: &mut [Event]) -> Result<Vec<u8>, Malformed> {
    let mut raw = Vec::with_capacity(events.len() * 256);
    for (seq, event) in (first_seq..).zip(events) {
        event.seq = seq;
        serde_json::to_writer(&mut raw, event).map_err(|e| Malformed::Event { seq, error: e.to_string() })?;
        raw.push(b'\n');
    }
    if raw.len() > MAX_RAW {
        let (value, limit) = (raw.len() as u64, MAX_RAW as u64);
        return Err(Malformed::Limit { what: "the size before compression", value, limit });
    }
    Ok(raw)
}

/// The text of a batch: one event a line.
#[derive(Debug)]
pub struct Lines {
    text: String,
    first_seq: u64,
    count: u32,
}

impl Lines {
    /// Every event, borrowed; an error if one cannot be read, is out of order, or their number is not the stated one.
    pub fn events(&self) -> Result<Vec<EventRef<'_>>, Malformed> {
        let mut events = Vec::with_capacity(self.count as usize);
        for line in self.text.lines() {
            let seq = self.first_seq + events.len() as u64;
            let event: EventRef<'_> =
                serde_json::from_str(line).map_err(|e| Malformed::Event { seq, error: e.to_string() })?;
            if event.seq != seq {
                return Err(Malformed::Event { seq, error: format!("its number is {}", event.seq) });
            }
            events.push(event);
        }
        if events.len() as u64 != u64::from(self.count) {
            return Err(Malformed::Count { found: events.len() as u64, stated: self.count.into() });
        }
        Ok(events)
    }
}

impl Tombstone {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(TOMBSTONE);
        out.extend(self.epoch.0);
        out.extend(self.first_seq.to_be_bytes());
        out.extend(self.last_seq.to_be_bytes());
        self.by_severity.iter().for_each(|n| out.extend(n.to_be_bytes()));
        out.push(self.reason.byte());
        out.extend(self.prev.0);
        out.extend(self.hash.0);
        out
    }

    fn decode(bytes: &[u8]) -> Result<Tombstone, Malformed> {
        let mut fields = Fields(bytes);
        let tombstone = Tombstone {
            epoch: Epoch(fields.take()),
            first_seq: u64::from_be_bytes(fields.take()),
            last_seq: u64::from_be_bytes(fields.take()),
            by_severity: [(); 4].map(|()| u32::from_be_bytes(fields.take())),
            reason: LossReason::from_byte(u8::from_be_bytes(fields.take())),
            prev: Sha256(fields.take()),
            hash: Sha256(fields.take()),
        };
        check_range(tombstone.first_seq, tombstone.last_seq.checked_add(1))?;
        Ok(tombstone)
    }
}

/// How far a chain is known: the last sequence number and the hash of its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Last sequence number; 0 before the first.
    pub seq: u64,
    /// Hash of the link that ends with it; zero before the first.
    pub hash: Sha256,
}

impl Cursor {
    /// Before the first link.
    pub const START: Cursor = Cursor { seq: 0, hash: Sha256::ZERO };
}

/// What a link is to a chain that is known up to a cursor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fit {
    /// The next one: the link to keep, and the cursor after it.
    Next(Link, Cursor),
    /// Wholly known already.
    Known,
    /// Links are missing before it.
    Gap,
    /// It does not continue this chain: history was changed on one side.
    Broken,
}

impl Cursor {
    /// Judges `link` against this cursor.
    ///
    /// A tombstone may begin before the cursor, when what it stands for had arrived but the acknowledgement had not:
    /// it is then shortened to what is really missing, and its counts are an upper bound.
    pub fn fit(self, link: Link) -> Fit {
        if link.last_seq() <= self.seq {
            return Fit::Known;
        }
        if link.first_seq() > self.seq + 1 {
            return Fit::Gap;
        }
        let after = Cursor { seq: link.last_seq(), hash: link.hash() };
        match link {
            Link::Tombstone(t) if t.first_seq <= self.seq => {
                Fit::Next(Link::Tombstone(Tombstone { first_seq: self.seq + 1, prev: self.hash, ..t }), after)
            }
            link if link.first_seq() == self.seq + 1 && link.prev() == self.hash => Fit::Next(link, after),
            _ => Fit::Broken,
        }
    }
}

impl From<BadName> for Malformed {
    fn from(fault: BadName) -> Malformed {
        Malformed::Event { seq: 0, error: fault.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::event::{AgentStopping, Body, Severity};

    pub(crate) fn events(count: usize) -> Vec<Event> {
        let body = Body::from(AgentStopping { reason: "x".into() });
        (0..count).map(|i| Event::new(Timestamp(i as i64), Severity::ALL[i % 4], format!("event {i}"), &body)).collect()
    }

    fn seal(first: u64, count: usize, prev: Sha256) -> Batch {
        Batch::seal(Epoch([7; 16]), first, prev, &mut events(count)).unwrap()
    }

    fn tombstone(first_seq: u64, last_seq: u64, prev: Sha256, hash: Sha256) -> Link {
        let (epoch, reason) = (Epoch([7; 16]), LossReason::SpoolFull);
        Link::Tombstone(Tombstone { epoch, first_seq, last_seq, by_severity: [1, 0, 0, 0], reason, prev, hash })
    }

    #[test]
    fn a_batch_comes_back_as_it_was_sealed() {
        let batch = seal(5, 9, Sha256([1; 32]));
        let Link::Batch(got) = Link::decode(&Link::Batch(batch.clone()).encode()).unwrap() else { panic!("no batch") };
        assert_eq!(got, batch);
        let lines = got.open().unwrap();
        let seqs: Vec<u64> = lines.events().unwrap().iter().map(|e| e.seq).collect();
        assert_eq!(seqs, (5..14).collect::<Vec<_>>());
        assert_eq!(got.header.by_severity, [3, 2, 2, 2]);
    }

    #[test]
    fn a_tombstone_comes_back_as_it_was() {
        let link = tombstone(3, 9, Sha256([1; 32]), Sha256([2; 32]));
        assert_eq!(Link::decode(&link.encode()), Ok(link));
    }

    #[test]
    fn every_cut_is_an_error() {
        let bytes = tombstone(3, 9, Sha256::ZERO, Sha256::ZERO).encode();
        (0..bytes.len()).for_each(|cut| assert!(Link::decode(&bytes[..cut]).is_err(), "tombstone cut at {cut}"));
        let bytes = Link::Batch(seal(1, 3, Sha256::ZERO)).encode();
        for cut in 0..bytes.len() {
            let opened = match Link::decode(&bytes[..cut]) {
                Ok(Link::Batch(batch)) => batch.open().map(|lines| lines.events().map(|e| e.len())),
                _ => continue,
            };
            assert!(!matches!(opened, Ok(Ok(_))), "batch cut at {cut}");
        }
    }

    #[test]
    fn a_changed_bit_changes_the_hash() {
        let batch = seal(1, 3, Sha256::ZERO);
        let bytes = Link::Batch(batch.clone()).encode();
        for at in 1..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            if let Ok(link) = Link::decode(&changed) {
                assert_ne!(link.hash(), batch.hash, "bit changed at {at}");
            }
        }
    }

    #[test]
    fn a_bomb_is_refused_before_it_opens() {
        let mut batch = seal(1, 1, Sha256::ZERO);
        batch.body = zstd::bulk::compress(&vec![b'x'; 8 << 20], 1).unwrap();
        assert_eq!(batch.open().unwrap_err(), Malformed::Compression(batch.header.raw_len));
        batch.header.raw_len = u32::MAX;
        assert!(matches!(Link::decode(&Link::Batch(batch).encode()), Err(Malformed::Limit { .. })));
    }

    #[test]
    fn wild_sequence_numbers_are_refused() {
        for (first, last) in [(0, 3), (5, 4), (1, u64::MAX), (u64::MAX, u64::MAX)] {
            assert!(
                Link::decode(&tombstone(first, last, Sha256::ZERO, Sha256::ZERO).encode()).is_err(),
                "{first}..{last}"
            );
        }
    }

    #[test]
    fn a_cursor_takes_the_next_link_only() {
        let first = seal(1, 3, Sha256::ZERO);
        let second = seal(4, 2, first.hash);
        let at3 = Cursor { seq: 3, hash: first.hash };
        let link = |batch: &Batch| Link::Batch(batch.clone());
        assert_eq!(Cursor::START.fit(link(&first)), Fit::Next(link(&first), at3));
        assert_eq!(at3.fit(link(&first)), Fit::Known);
        assert_eq!(Cursor::START.fit(link(&second)), Fit::Gap);
        assert_eq!(Cursor { seq: 3, hash: Sha256([9; 32]) }.fit(link(&second)), Fit::Broken);
        assert_eq!(Cursor { seq: 4, hash: second.hash }.fit(link(&second)), Fit::Broken);
    }

    #[test]
    fn a_tombstone_over_known_events_is_shortened() {
        let at3 = Cursor { seq: 3, hash: Sha256([3; 32]) };
        let Fit::Next(Link::Tombstone(kept), after) = at3.fit(tombstone(1, 9, Sha256::ZERO, Sha256([9; 32]))) else {
            panic!("not taken")
        };
        assert_eq!((kept.first_seq, kept.last_seq, kept.prev), (4, 9, at3.hash));
        assert_eq!(after, Cursor { seq: 9, hash: Sha256([9; 32]) });
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(Link::Batch(batch)) = Link::decode(&bytes) {
                let _ = batch.open().map(|lines| lines.events().map(|e| e.len()));
            }
        }
    }
}
