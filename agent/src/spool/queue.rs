//! The chain of links that are not acknowledged yet: where each lies, what goes when there is no room, where a
//! collector stands in it. One thread owns it; nothing here waits for anything but the disk.
//!
//! A disk that fails or is full stops nothing: links are then held in memory, up to a limit of its own, are handed to
//! the collector from there, and are written when the disk takes them again. Sequence numbers of links that were handed
//! out but never reached the disk would be used again after a crash; the collector's cursor is then ahead of ours,
//! which [`Queue::fits`] sees, and the chain goes on in a new epoch.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};

use sidewarden_proto::batch::{Batch, Cursor, Epoch, Fit, Link, LossReason, MAX_EVENTS, Malformed, Tombstone};
use sidewarden_proto::event::{Body, Event, EventsLost, Severity, SpoolDamaged};
use sidewarden_proto::identity::Sha256;
use sidewarden_proto::time::Timestamp;

use super::disk::{Disk, Place};
use super::places::Places;
use super::record::{self, RECORD_HEAD, Scan};
use super::shed::{self, Candidate};

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// On disk.
    pub disk_bytes: u64,
    /// In memory, while the disk takes nothing.
    pub memory_bytes: u64,
    /// Links, wherever: each costs about a hundred bytes of memory.
    pub links: usize,
}

/// Part of the spool that could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Where its bytes were put; empty when they could not be kept.
    pub quarantined: String,
    /// How many.
    pub bytes: u64,
    /// What was wrong.
    pub detail: String,
}

impl Damage {
    /// The event that tells of it.
    pub fn event(&self, at: Timestamp) -> Event {
        let Damage { quarantined, bytes, detail } = self.clone();
        let summary = format!("part of the event spool was unreadable and was set aside: {detail}, {bytes} bytes");
        Event::new(at, Severity::Warning, summary, &SpoolDamaged { quarantined, bytes, detail }.into())
    }
}

/// What [`Queue::open`] found.
#[derive(Debug)]
pub struct Found {
    /// The run before ended in order, or there was none.
    pub clean: bool,
    /// What could not be read.
    pub damage: Vec<Damage>,
}

#[derive(Debug)]
struct Held {
    first: u64,
    last: u64,
    prev: Sha256,
    hash: Sha256,
    by_severity: [u32; 4],
    /// Set for a tombstone.
    loss: Option<LossReason>,
    at: Where,
}

#[derive(Debug)]
enum Where {
    Disk(Place),
    /// A tombstone that belongs into this segment and could not be written there. It is made anew at the next start.
    Derived(u64),
    /// Still to be written; these are always the last of the chain.
    Memory(Vec<u8>),
}

impl Held {
    fn new(link: &Link, at: Where) -> Held {
        let loss = if let Link::Tombstone(tombstone) = link { Some(tombstone.reason) } else { None };
        let (first, last, prev, hash) = (link.first_seq(), link.last_seq(), link.prev(), link.hash());
        Held { first, last, prev, hash, by_severity: link.by_severity(), loss, at }
    }

    fn before(&self) -> Cursor {
        Cursor { seq: self.first - 1, hash: self.prev }
    }

    fn segment(&self) -> Option<u64> {
        match self.at {
            Where::Disk(place) => Some(place.segment),
            Where::Derived(segment) => Some(segment),
            Where::Memory(_) => None,
        }
    }

    fn disk_size(&self) -> u64 {
        if let Where::Disk(place) = self.at { place.length.into() } else { 0 }
    }

    fn memory_size(&self) -> u64 {
        if let Where::Memory(bytes) = &self.at { bytes.len() as u64 } else { 0 }
    }

    fn tombstone(&self, epoch: Epoch, reason: LossReason) -> Link {
        let Held { first: first_seq, last: last_seq, by_severity, prev, hash, .. } = *self;
        Link::Tombstone(Tombstone { epoch, first_seq, last_seq, by_severity, reason, prev, hash })
    }

    /// Drops the events and leaves a tombstone in their place.
    fn drop_events(&mut self, epoch: Epoch, reason: LossReason) {
        self.loss = Some(reason);
        self.at = match self.segment() {
            Some(segment) => Where::Derived(segment),
            None => Where::Memory(self.tombstone(epoch, reason).encode()),
        };
    }
}

/// The queue.
#[derive(Debug)]
pub struct Queue {
    disk: Disk,
    limits: Limits,
    epoch: Epoch,
    held: VecDeque<Held>,
    last: Cursor,
    /// Last sequence number handed out.
    handed: u64,
    failing: Option<String>,
    /// Events dropped for want of room, lowest severity first.
    shed: [u64; 4],
    places: Places,
}

/// A collector that said where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Met {
    /// It is on our chain.
    pub fits: bool,
    /// It lacks something that is here no more.
    pub lacks: bool,
}

impl Queue {
    /// Opens the spool in `dir`. `fresh` is its epoch if it has none yet.
    pub fn open(dir: &Path, limits: Limits, fresh: Epoch) -> io::Result<(Queue, Found)> {
        let disk = Disk::open(dir)?;
        let numbers = disk.segments();
        let clean = disk.take_clean() || numbers.is_empty();
        let in_force = disk.epoch().or_else(|| numbers.iter().rev().find_map(|number| epoch_in(&disk, *number)));
        let mut queue = Queue {
            epoch: in_force.unwrap_or(fresh),
            disk,
            limits,
            held: VecDeque::new(),
            last: Cursor::START,
            handed: 0,
            failing: None,
            shed: [0; 4],
            places: Places::default(),
        };
        let mut damage = Vec::new();
        if !queue.load(&numbers, &mut damage) {
            // Nothing says where the chain stood: numbers must not be used twice, so another chain begins.
            queue.epoch = fresh;
        }
        let result = queue.disk.set_epoch(queue.epoch);
        queue.note(result);
        queue.places = Places::read(&queue.disk.collectors(), queue.epoch);
        queue.places.found(queue.held.front().map_or(queue.last, Held::before));
        Ok((queue, Found { clean, damage }))
    }

    /// Takes in what the segments hold; false when there were segments, but no position in any of them.
    fn load(&mut self, segments: &[u64], damage: &mut Vec<Damage>) -> bool {
        let mut placed = false;
        for &number in segments {
            let bytes = match self.disk.read_segment(number) {
                Ok(bytes) => bytes,
                Err(error) => {
                    let detail = format!("segment {number} cannot be read: {error}");
                    damage.push(Damage { quarantined: String::new(), bytes: 0, detail });
                    continue;
                }
            };
            let scan = record::scan(&bytes);
            if epoch_of(&scan).is_some_and(|epoch| epoch != self.epoch) {
                self.remove(number);
                continue;
            }
            let start = scan.start.map(|(_, cursor)| cursor);
            let start =
                start.or_else(|| scan.links.first().map(|(_, l)| Cursor { seq: l.first_seq() - 1, hash: l.prev() }));
            if let (false, Some(start)) = (placed, start) {
                (self.last, placed) = (start, true);
            }
            let mut spoiled = scan.damage;
            for (range, link) in scan.links {
                let place = Place { segment: number, offset: range.start as u64, length: range.len() as u32 };
                if !self.take(link, place) {
                    spoiled.push(range);
                }
            }
            for range in &spoiled {
                damage.push(self.set_aside(&format!("{number}-{}.bad", range.start), &bytes[range.clone()]));
            }
            if !spoiled.is_empty() {
                self.rewrite(number);
            }
        }
        placed || segments.is_empty()
    }

    /// Adds a link that was read; false when it does not belong to the chain.
    fn take(&mut self, link: Link, place: Place) -> bool {
        if link.epoch() != self.epoch {
            return false;
        }
        if link.first_seq() > self.last.seq + 1 {
            let gap = self.gap(self.last, Cursor { seq: link.first_seq() - 1, hash: link.prev() }, LossReason::Damaged);
            self.last = Cursor { seq: gap.last_seq(), hash: gap.hash() };
            self.held.push_back(Held::new(&gap, Where::Derived(place.segment)));
        }
        match self.last.fit(link) {
            Fit::Next(link, after) => {
                self.last = after;
                self.held.push_back(Held::new(&link, Where::Disk(place)));
                true
            }
            Fit::Known => true,
            Fit::Gap | Fit::Broken => false,
        }
    }

    fn gap(&self, after: Cursor, until: Cursor, reason: LossReason) -> Link {
        Link::Tombstone(Tombstone {
            epoch: self.epoch,
            first_seq: after.seq + 1,
            last_seq: until.seq,
            by_severity: [0; 4],
            reason,
            prev: after.hash,
            hash: until.hash,
        })
    }

    fn set_aside(&self, name: &str, bytes: &[u8]) -> Damage {
        let kept = self.disk.set_aside(name, bytes).unwrap_or_else(|error| {
            tracing::warn!(%error, "a damaged part of the spool could not be kept");
            PathBuf::new()
        });
        let detail = "bytes that are no record of the chain".to_owned();
        Damage { quarantined: kept.display().to_string(), bytes: bytes.len() as u64, detail }
    }

    /// The epoch in force.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Where the chain ends.
    pub fn last(&self) -> Cursor {
        self.last
    }

    /// Links that are not acknowledged.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Bytes on disk.
    pub fn disk_bytes(&self) -> u64 {
        self.disk.bytes()
    }

    /// Why the disk takes nothing at present.
    pub fn failing(&self) -> Option<&str> {
        self.failing.as_deref()
    }

    /// Events dropped for want of room so far, lowest severity first.
    pub fn shed_events(&self) -> [u64; 4] {
        self.shed
    }

    /// Seals `events` and makes them durable, dropping others when there is no room. Returns those that fit no link.
    pub fn append(&mut self, events: Vec<Event>) -> Vec<Event> {
        let mut rejected = Vec::new();
        let mut rest = events;
        while !rest.is_empty() {
            let later = rest.split_off(rest.len().min(MAX_EVENTS));
            self.seal(rest, &mut rejected);
            rest = later;
        }
        self.write();
        rejected
    }

    /// Seals `events` as one link, or as two halves when one would be too large.
    fn seal(&mut self, mut events: Vec<Event>, rejected: &mut Vec<Event>) {
        if events.is_empty() {
            return;
        }
        match Batch::seal(self.epoch, self.last.seq + 1, self.last.hash, &mut events) {
            Ok(batch) => {
                let link = Link::Batch(batch);
                self.last = Cursor { seq: link.last_seq(), hash: link.hash() };
                self.held.push_back(Held::new(&link, Where::Memory(link.encode())));
            }
            Err(Malformed::Limit { .. }) if events.len() > 1 => {
                let second = events.split_off(events.len() / 2);
                self.seal(events, rejected);
                self.seal(second, rejected);
            }
            Err(error) => {
                tracing::warn!(%error, "an event fits no batch");
                rejected.append(&mut events);
            }
        }
    }

    /// Writes what is only in memory; called after an append, and now and then while the disk fails.
    pub fn write(&mut self) {
        self.make_room();
        match self.write_memory() {
            Ok(()) if self.failing.take().is_some() => tracing::info!("the event spool is written again"),
            Ok(()) => {}
            Err(error) => self.note(Err(error)),
        }
        let over = self.memory_bytes().saturating_sub(self.limits.memory_bytes);
        if over > 0 {
            self.shed(over, Held::memory_size);
        }
        if self.held.len() > self.limits.links {
            self.shed((self.held.len() - self.limits.links + self.limits.links / 16) as u64, |_| 1);
        }
    }

    fn write_memory(&mut self) -> io::Result<()> {
        let from = self.held.iter().position(|held| matches!(held.at, Where::Memory(_))).unwrap_or(self.held.len());
        let mut places = Vec::new();
        let mut result = Ok(());
        for held in self.held.range(from..) {
            let Where::Memory(bytes) = &held.at else { continue };
            if self.disk.bytes() + (bytes.len() + RECORD_HEAD) as u64 > self.limits.disk_bytes {
                result = Err(io::Error::from(io::ErrorKind::StorageFull));
                break;
            }
            match self.disk.append(self.epoch, held.before(), bytes) {
                Ok(place) => places.push(place),
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        self.disk.sync()?;
        for (held, place) in self.held.range_mut(from..).zip(places) {
            held.at = Where::Disk(place);
        }
        result
    }

    fn memory_bytes(&self) -> u64 {
        self.held.iter().rev().take_while(|held| matches!(held.at, Where::Memory(_))).map(Held::memory_size).sum()
    }

    fn make_room(&mut self) {
        let wanted = self.disk.bytes() + self.memory_bytes() + record::HEADER as u64 + RECORD_HEAD as u64;
        if wanted > self.limits.disk_bytes {
            // A bit more than needed, so that the next append does not have to do it again.
            self.shed(wanted - self.limits.disk_bytes + self.limits.disk_bytes / 16, Held::disk_size);
        }
    }

    /// Drops links so that `need` of what `measure` counts is given back.
    fn shed(&mut self, need: u64, measure: fn(&Held) -> u64) {
        let rank = |held: &Held| held.by_severity.iter().rposition(|n| *n > 0).unwrap_or(0);
        let candidates: Vec<Candidate> = self
            .held
            .iter()
            .map(|held| Candidate {
                size: measure(held),
                rank: (held.loss.is_none() && measure(held) > 0).then(|| rank(held)),
                under_way: held.last <= self.handed,
            })
            .collect();
        let chosen = shed::choose(&candidates, need);
        let mut touched = BTreeSet::new();
        for i in chosen {
            let held = &mut self.held[i];
            held.by_severity.iter().zip(&mut self.shed).for_each(|(n, total)| *total += u64::from(*n));
            touched.extend(held.segment());
            held.drop_events(self.epoch, LossReason::SpoolFull);
        }
        self.merge_tombstones(&mut touched);
        touched.into_iter().for_each(|segment| self.rewrite(segment));
    }

    /// Makes one of neighbouring tombstones for the same reason.
    fn merge_tombstones(&mut self, touched: &mut BTreeSet<u64>) {
        let mut merged: VecDeque<Held> = VecDeque::with_capacity(self.held.len());
        for held in self.held.drain(..) {
            match merged.back_mut() {
                Some(before) if before.loss.is_some() && before.loss == held.loss => {
                    touched.extend(before.segment());
                    touched.extend(held.segment());
                    before.last = held.last;
                    before.hash = held.hash;
                    before
                        .by_severity
                        .iter_mut()
                        .zip(held.by_severity)
                        .for_each(|(n, more)| *n = n.saturating_add(more));
                    before.drop_events(self.epoch, held.loss.unwrap_or(LossReason::Other));
                }
                _ => merged.push_back(held),
            }
        }
        self.held = merged;
    }

    /// Writes a segment anew with what it should hold. A failure costs room, not truth: what was dropped comes back at
    /// the next start.
    fn rewrite(&mut self, segment: u64) {
        let inside: Vec<usize> = (0..self.held.len()).filter(|i| self.held[*i].segment() == Some(segment)).collect();
        let Some(first) = inside.first() else {
            // The chain's end must stay on disk: an earlier segment has it, or this one is kept.
            if self.held.iter().any(|held| held.segment().is_some()) {
                self.remove(segment);
            }
            return;
        };
        let at = self.held[*first].before();
        let payloads: io::Result<Vec<Vec<u8>>> = inside.iter().map(|i| self.payload(&self.held[*i])).collect();
        match payloads.and_then(|payloads| self.disk.rewrite(segment, self.epoch, at, &payloads)) {
            Ok(places) => inside.iter().zip(places).for_each(|(i, place)| self.held[*i].at = Where::Disk(place)),
            Err(error) => self.note(Err(error)),
        }
    }

    fn payload(&self, held: &Held) -> io::Result<Vec<u8>> {
        match (&held.at, held.loss) {
            (Where::Memory(bytes), _) => Ok(bytes.clone()),
            (_, Some(reason)) => Ok(held.tombstone(self.epoch, reason).encode()),
            (Where::Disk(place), None) => Ok(self.disk.read(*place)?.split_off(RECORD_HEAD)),
            (Where::Derived(_), None) => Err(io::Error::other("a batch without bytes")),
        }
    }

    /// No session is up any more: nothing is under way.
    pub fn recall(&mut self) {
        self.handed = 0;
        self.note_places();
    }

    fn note_places(&mut self) {
        let result = self.disk.set_collectors(&self.places.text(self.epoch));
        self.note(result);
    }

    /// A session with `collector` begins, which has everything up to `cursor`.
    pub fn meet(&mut self, collector: &str, cursor: Cursor) -> Met {
        if !self.fits(cursor) {
            return Met { fits: false, lacks: false };
        }
        self.places.meet(collector, cursor);
        self.note_places();
        Met { fits: true, lacks: self.held.front().map_or(self.last, Held::before).seq > cursor.seq }
    }

    /// Whether a collector that stands at `cursor` is on our chain.
    fn fits(&self, cursor: Cursor) -> bool {
        if cursor.seq == 0 || cursor.seq >= self.last.seq {
            return cursor == Cursor::START || cursor == self.last;
        }
        match self.held.iter().find(|held| held.last >= cursor.seq) {
            Some(held) if held.first > cursor.seq => held.first > cursor.seq + 1 || held.prev == cursor.hash,
            Some(held) if held.last == cursor.seq => held.hash == cursor.hash,
            Some(held) => held.loss.is_some(),
            None => true,
        }
    }

    /// The link to send after `cursor`; a tombstone where the collector has less than was once acknowledged.
    ///
    /// A link that cannot be read any more becomes a tombstone, and `damage` tells of it.
    pub fn after(&mut self, cursor: Cursor, damage: &mut Vec<Damage>) -> Option<Link> {
        if cursor.seq >= self.last.seq {
            return None;
        }
        let at = self.held.partition_point(|held| held.last <= cursor.seq);
        let before = self.held.get(at).map_or(self.last, Held::before);
        let link = if before.seq > cursor.seq {
            let (reason, until) = self.places.missing(cursor, before);
            self.gap(cursor, until, reason)
        } else {
            self.read(at, damage)?
        };
        self.handed = self.handed.max(link.last_seq());
        Some(link)
    }

    fn read(&mut self, at: usize, damage: &mut Vec<Damage>) -> Option<Link> {
        let held = self.held.get(at)?;
        if let Some(reason) = held.loss {
            return Some(held.tombstone(self.epoch, reason));
        }
        let link = match self.payload(held) {
            Ok(payload) => Link::decode(&payload).ok().filter(|l| l.hash() == held.hash && l.first_seq() == held.first),
            Err(error) => {
                tracing::warn!(%error, "a record of the spool cannot be read");
                None
            }
        };
        if link.is_some() {
            return link;
        }
        let (bytes, detail) =
            (held.disk_size(), format!("events {} to {} cannot be read any more", held.first, held.last));
        damage.push(Damage { quarantined: String::new(), bytes, detail });
        let epoch = self.epoch;
        let held = self.held.get_mut(at)?;
        held.drop_events(epoch, LossReason::Damaged);
        Some(held.tombstone(epoch, LossReason::Damaged))
    }

    /// Everything up to `cursor` is on the collector's disk.
    pub fn acknowledge(&mut self, cursor: Cursor) {
        self.places.acknowledged(cursor);
        while self.held.front().is_some_and(|held| held.last <= cursor.seq) {
            self.held.pop_front();
        }
        let keep = self.held.iter().find_map(Held::segment);
        let segments = self.disk.segments();
        // Of an empty queue the last segment stays: it knows where the chain stands.
        let Some(keep) = keep.or(segments.last().copied()) else { return };
        segments.into_iter().filter(|segment| *segment < keep).for_each(|segment| self.remove(segment));
    }

    /// Begins another chain, because this one and the collector's do not fit together.
    ///
    /// A batch carries its epoch and its place in the chain, so it cannot go over as it is: its events are sealed
    /// again, in the same order, and a tombstone goes over as an `events.lost`. An event that the collector had
    /// committed without our hearing of it is then there twice, once in each epoch, rather than not at all. The file
    /// `epoch` is the point of no return: segments of another epoch are removed at the next start.
    pub fn begin_epoch(&mut self, epoch: Epoch, now: Timestamp, damage: &mut Vec<Damage>) {
        let old_segments = self.disk.segments();
        self.disk.end_segment();
        let old = std::mem::take(&mut self.held);
        (self.epoch, self.last, self.handed, self.places) = (epoch, Cursor::START, 0, Places::default());
        let allowed = self.limits.disk_bytes;
        // Both chains are there until the new one is in force.
        self.limits.disk_bytes = allowed.saturating_add(self.disk.bytes());
        for held in old {
            let events = self.events_of(&held, now, damage);
            self.seal(events, &mut Vec::new());
            self.write();
        }
        self.limits.disk_bytes = allowed;
        let result = self.disk.set_epoch(epoch);
        self.note(result);
        old_segments.into_iter().for_each(|number| self.remove(number));
        self.write();
    }

    fn events_of(&self, held: &Held, now: Timestamp, damage: &mut Vec<Damage>) -> Vec<Event> {
        if let Some(reason) = held.loss {
            return vec![lost(held.first, held.last, held.by_severity, reason.word(), now)];
        }
        let opened = self.payload(held).ok().and_then(|payload| match Link::decode(&payload) {
            Ok(Link::Batch(batch)) => batch.open().ok(),
            _ => None,
        });
        match opened.as_ref().map(|lines| lines.events()) {
            Some(Ok(events)) => events.iter().map(|event| event.to_owned()).collect(),
            _ => {
                let detail = format!("events {} to {} cannot be read any more", held.first, held.last);
                damage.push(Damage { quarantined: String::new(), bytes: held.disk_size(), detail });
                vec![lost(held.first, held.last, held.by_severity, LossReason::Damaged.word(), now)]
            }
        }
    }

    /// Ends in order.
    pub fn close(mut self) {
        self.write();
        let result = self.disk.set_clean();
        self.note(result);
    }

    fn remove(&mut self, segment: u64) {
        let result = self.disk.remove(segment);
        self.note(result);
    }

    /// Remembers whether the disk works; tells of a change once.
    fn note(&mut self, result: io::Result<()>) {
        match (result, &self.failing) {
            (Ok(()), _) => {}
            (Err(error), None) => {
                tracing::warn!(%error, "the event spool cannot be written: events are held in memory");
                self.failing = Some(error.to_string());
            }
            (Err(error), Some(_)) => self.failing = Some(error.to_string()),
        }
    }
}

/// The event that tells of events lost.
pub fn lost(first_seq: u64, last_seq: u64, by_severity: [u32; 4], reason: &str, now: Timestamp) -> Event {
    let count: u64 = by_severity.iter().map(|n| u64::from(*n)).sum();
    let count = if last_seq > 0 { last_seq - first_seq + 1 } else { count };
    let body = EventsLost { first_seq, last_seq, by_severity, reason: reason.to_owned() };
    Event::new(now, Severity::Warning, format!("{count} events were lost on the agent: {reason}"), &Body::from(body))
}

fn epoch_in(disk: &Disk, number: u64) -> Option<Epoch> {
    epoch_of(&record::scan(&disk.read_segment(number).ok()?))
}

fn epoch_of(scan: &Scan) -> Option<Epoch> {
    scan.start.map(|(epoch, _)| epoch).or_else(|| scan.links.first().map(|(_, link)| link.epoch()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sidewarden_proto::event::AgentStopping;

    const FRESH: Epoch = Epoch([1; 16]);
    const WIDE: Limits = Limits { disk_bytes: 64 << 20, memory_bytes: 1 << 20, links: 10_000 };

    fn event(severity: Severity, size: usize) -> Event {
        // Text that zstd cannot make small.
        let mut noise = size as u64 | 1;
        let reason: String = (0..size)
            .map(|_| {
                noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                char::from(b'!' + (noise >> 40) as u8 % 90)
            })
            .collect();
        Event::new(Timestamp(1), severity, "x", &AgentStopping { reason }.into())
    }

    fn open(dir: &Path, limits: Limits) -> (Queue, Found) {
        Queue::open(dir, limits, FRESH).unwrap()
    }

    /// Reads everything after `cursor` as a collector would, and checks that it is one chain.
    fn drain(queue: &mut Queue, mut cursor: Cursor) -> (Vec<Link>, Cursor) {
        let mut links = Vec::new();
        while let Some(link) = queue.after(cursor, &mut Vec::new()) {
            let Fit::Next(link, after) = cursor.fit(link) else { panic!("no chain after {cursor:?}") };
            links.push(link);
            cursor = after;
        }
        (links, cursor)
    }

    fn tombstones(links: &[Link]) -> Vec<(u64, u64, LossReason)> {
        let of =
            |link: &Link| if let Link::Tombstone(t) = link { Some((t.first_seq, t.last_seq, t.reason)) } else { None };
        links.iter().filter_map(of).collect()
    }

    fn segment_files(dir: &Path) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
        files.retain(|path| path.extension().is_some_and(|e| e == "seg"));
        files.sort();
        files
    }

    #[test]
    fn what_was_not_acknowledged_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let (mut queue, found) = open(dir.path(), WIDE);
        assert!(found.clean);
        (0..3).for_each(|_| drop(queue.append(vec![event(Severity::Info, 10), event(Severity::Info, 10)])));
        let (links, _) = drain(&mut queue, Cursor::START);
        queue.acknowledge(Cursor { seq: 2, hash: links[0].hash() });
        drop(queue);
        let (mut queue, found) = open(dir.path(), WIDE);
        assert!(!found.clean && found.damage.is_empty());
        let (again, end) = drain(&mut queue, Cursor { seq: 2, hash: links[0].hash() });
        assert_eq!((again.as_slice(), end), (&links[1..], queue.last()));
        queue.close();
        assert!(open(dir.path(), WIDE).1.clean);
    }

    #[test]
    fn an_empty_spool_still_knows_where_its_chain_stands() {
        let dir = tempfile::tempdir().unwrap();
        let (mut queue, _) = open(dir.path(), WIDE);
        queue.append(vec![event(Severity::Info, 10)]);
        let last = queue.last();
        queue.acknowledge(last);
        drop(queue);
        let (mut queue, _) = open(dir.path(), WIDE);
        assert_eq!((queue.last(), queue.epoch()), (last, FRESH));
        queue.append(vec![event(Severity::Info, 10)]);
        assert_eq!(drain(&mut queue, last).0[0].first_seq(), 2);
    }

    #[test]
    fn killed_at_any_byte_of_a_write_it_keeps_what_was_whole_and_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let (mut queue, _) = open(dir.path(), WIDE);
        (0..3).for_each(|_| drop(queue.append(vec![event(Severity::Info, 5)])));
        let file = segment_files(dir.path()).remove(0);
        let whole = std::fs::read(&file).unwrap();
        let ends: Vec<usize> = record::scan(&whole).links.iter().map(|(range, _)| range.end).collect();
        for cut in record::HEADER..whole.len() {
            let copy = tempfile::tempdir().unwrap();
            std::fs::write(copy.path().join(file.file_name().unwrap()), &whole[..cut]).unwrap();
            let (mut queue, found) = open(copy.path(), WIDE);
            let kept = ends.iter().filter(|end| **end <= cut).count() as u64;
            assert_eq!((queue.last().seq, found.damage.len()), (kept, 0), "cut at {cut}");
            queue.append(vec![event(Severity::Info, 5)]);
            assert_eq!(drain(&mut queue, Cursor::START).1.seq, kept + 1, "cut at {cut}");
        }
    }

    #[test]
    fn a_damaged_record_is_set_aside_and_the_rest_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (mut queue, _) = open(dir.path(), WIDE);
        (0..5).for_each(|_| drop(queue.append(vec![event(Severity::Info, 50)])));
        drop(queue);
        let file = segment_files(dir.path()).remove(0);
        let mut bytes = std::fs::read(&file).unwrap();
        let second = record::scan(&bytes).links[1].0.clone();
        bytes[second.start + 40] ^= 1;
        std::fs::write(&file, bytes).unwrap();
        for round in 0..2 {
            let (mut queue, found) = open(dir.path(), WIDE);
            assert_eq!(found.damage.len(), 1 - round, "what was mended is not found again");
            assert!(found.damage.iter().all(|d| d.bytes == second.len() as u64 && Path::new(&d.quarantined).exists()));
            let (links, end) = drain(&mut queue, Cursor::START);
            assert_eq!((tombstones(&links), end.seq), (vec![(2, 2, LossReason::Damaged)], 5));
        }
    }

    #[test]
    fn a_spool_of_garbage_begins_another_epoch() {
        let dir = tempfile::tempdir().unwrap();
        let (mut queue, _) = open(dir.path(), WIDE);
        queue.append(vec![event(Severity::Info, 5)]);
        drop(queue);
        let file = segment_files(dir.path()).remove(0);
        std::fs::write(&file, vec![0xAB; 5000]).unwrap();
        let (queue, found) = Queue::open(dir.path(), WIDE, Epoch([2; 16])).unwrap();
        assert_eq!((queue.epoch(), queue.last(), found.damage.len()), (Epoch([2; 16]), Cursor::START, 1));
    }

    #[test]
    fn a_full_spool_drops_the_least_severe_and_stays_within_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits { disk_bytes: 4 << 20, ..WIDE };
        let (mut queue, _) = open(dir.path(), limits);
        for i in 0..150 {
            let severity = if i % 10 == 0 { Severity::Critical } else { Severity::Info };
            queue.append(vec![event(severity, 60_000)]);
            assert!(queue.disk_bytes() <= limits.disk_bytes, "{} bytes", queue.disk_bytes());
        }
        assert!(queue.failing().is_none());
        let lost = queue.shed_events();
        assert!(lost[0] > 50 && lost[3] == 0, "{lost:?}");
        drop(queue);
        let (mut queue, found) = open(dir.path(), limits);
        assert!(found.damage.is_empty(), "{:?}", found.damage);
        let (links, end) = drain(&mut queue, Cursor::START);
        assert_eq!(end.seq, 150);
        let critical = links.iter().filter(|link| matches!(link, Link::Batch(b) if b.header.by_severity[3] > 0));
        assert_eq!(critical.count(), 15);
        let told: u64 = tombstones(&links).iter().map(|(first, last, _)| last - first + 1).sum();
        assert_eq!(told, lost[0], "every dropped event stands in a tombstone");
        assert!(tombstones(&links).iter().all(|(_, _, reason)| *reason == LossReason::SpoolFull));
    }

    #[test]
    fn on_a_full_disk_events_are_held_in_memory_and_written_later() {
        let dir = tempfile::tempdir().unwrap();
        let (mut queue, _) = open(dir.path(), WIDE);
        // The next segment is a device that is always full: a real ENOSPC.
        let next = dir.path().join(format!("{:020}.seg", 1));
        std::os::unix::fs::symlink("/dev/full", &next).unwrap();
        queue.append(vec![event(Severity::Info, 10)]);
        assert!(queue.failing().is_some_and(|why| why.contains("space")), "{:?}", queue.failing());
        assert_eq!(drain(&mut queue, Cursor::START).0.len(), 1, "it is handed out from memory");
        (0..40).for_each(|_| drop(queue.append(vec![event(Severity::Info, 60_000)])));
        assert!(queue.memory_bytes() <= WIDE.memory_bytes);
        assert!(queue.shed_events()[0] > 0);
        let _ = std::fs::remove_file(&next);
        queue.write();
        assert!(queue.failing().is_none());
        drop(queue);
        let (mut queue, _) = open(dir.path(), WIDE);
        assert_eq!(drain(&mut queue, Cursor::START).1.seq, 41);
    }

    #[test]
    fn a_collector_that_lost_its_disk_gets_a_tombstone_for_what_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (mut queue, _) = open(dir.path(), WIDE);
        (0..4).for_each(|_| drop(queue.append(vec![event(Severity::Info, 5)])));
        let (links, _) = drain(&mut queue, Cursor::START);
        queue.acknowledge(Cursor { seq: 3, hash: links[2].hash() });
        let (again, end) = drain(&mut queue, Cursor::START);
        assert_eq!((tombstones(&again), end.seq), (vec![(1, 3, LossReason::CollectorRewound)], 4));
    }

    #[test]
    fn another_collector_is_told_that_it_lacks_what_the_first_one_has_and_a_restart_does_not_forget_who_has_what() {
        let dir = tempfile::tempdir().unwrap();
        let (mut queue, _) = open(dir.path(), WIDE);
        let (fits, misses) = (Met { fits: true, lacks: false }, Met { fits: true, lacks: true });
        assert_eq!(queue.meet("first:1", Cursor::START), fits);
        // Of several segments, so that a restart does not find what was let go of.
        (0..40).for_each(|_| drop(queue.append(vec![event(Severity::Warning, 60_000)])));
        let (_, at_first) = drain(&mut queue, Cursor::START);
        queue.acknowledge(at_first);
        queue.append(vec![event(Severity::Warning, 5)]);
        for restart in [false, true] {
            if restart {
                drop(queue);
                queue = open(dir.path(), WIDE).0;
            }
            assert_eq!(queue.meet("second:1", Cursor::START), misses);
            let (links, end) = drain(&mut queue, Cursor::START);
            let told = tombstones(&links);
            assert!(matches!(told[..], [(1, 2..=40, LossReason::Elsewhere)]), "{told:?}");
            assert_eq!((end, told[0].1 == 40), (queue.last(), !restart));
        }
        let end = queue.last();
        queue.acknowledge(end);
        queue.append(vec![event(Severity::Warning, 5)]);
        assert_eq!(queue.meet("first:1", at_first), misses);
        assert_eq!(tombstones(&drain(&mut queue, at_first).0), [(41, 41, LossReason::Elsewhere)]);
        // It comes back without its disk.
        assert_eq!(queue.meet("first:1", Cursor::START), misses);
        let told = tombstones(&drain(&mut queue, Cursor::START).0);
        assert_eq!(told, [(1, 40, LossReason::CollectorRewound), (41, 41, LossReason::Elsewhere)]);
        assert!(!queue.meet("first:1", Cursor { seq: 99, ..end }).fits);
    }

    #[test]
    fn a_collector_with_another_history_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let (mut queue, _) = open(dir.path(), WIDE);
        (0..3).for_each(|_| drop(queue.append(vec![event(Severity::Info, 5), event(Severity::Info, 5)])));
        let (links, end) = drain(&mut queue, Cursor::START);
        let check = |seq, hash, expected| assert_eq!(queue.fits(Cursor { seq, hash }), expected, "at {seq}");
        check(0, Sha256::ZERO, true);
        check(2, links[0].hash(), true);
        check(2, Sha256([9; 32]), false);
        check(3, links[0].hash(), false);
        check(6, end.hash, true);
        check(6, Sha256([9; 32]), false);
        check(8, end.hash, false);
    }

    #[test]
    fn another_epoch_takes_over_what_was_not_acknowledged() {
        let dir = tempfile::tempdir().unwrap();
        let (mut queue, _) = open(dir.path(), WIDE);
        (0..3).for_each(|_| drop(queue.append(vec![event(Severity::Warning, 5)])));
        queue.begin_epoch(Epoch([7; 16]), Timestamp(5), &mut Vec::new());
        for _ in 0..2 {
            let (links, end) = drain(&mut queue, Cursor::START);
            assert_eq!((end.seq, links.iter().all(|link| link.epoch() == Epoch([7; 16]))), (3, true));
            drop(queue);
            queue = open(dir.path(), WIDE).0;
        }
    }
}
