//! The spool's directory: segments appended to, replaced as a whole, removed. No decisions.
//!
//! ```text
//! <number>.seg    segments, in the order of their numbers
//! collectors      how far each collector has the chain (`places`)
//! epoch           the epoch in force, in hex; segments of another epoch are leftovers of a change that was cut short
//! clean           there while nothing runs and the last run ended in order
//! damaged/        copies of what could not be read
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sidewarden_proto::batch::{Cursor, Epoch};

use super::record::{self, MAX_SEGMENT, SEGMENT};

/// Most bytes of copies of damaged parts: evidence, not an archive.
const MAX_DAMAGED: u64 = 4 << 20;

/// Most bytes of what is noted of collectors.
const MAX_COLLECTORS: u64 = 64 << 10;

/// Where a record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of its segment.
    pub segment: u64,
    /// Offset of its record.
    pub offset: u64,
    /// Length of its record.
    pub length: u32,
}

/// The directory.
#[derive(Debug)]
pub struct Disk {
    dir: PathBuf,
    sizes: BTreeMap<u64, u64>,
    next: u64,
    active: Option<Active>,
}

#[derive(Debug)]
struct Active {
    number: u64,
    file: File,
    length: u64,
}

impl Disk {
    /// Opens or makes `dir` and lists its segments.
    pub fn open(dir: &Path) -> io::Result<Disk> {
        fs::create_dir_all(dir)?;
        let mut sizes = BTreeMap::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let number = name.to_str().and_then(|n| n.strip_suffix(".seg")).and_then(|n| n.parse().ok());
            if let Some(number) = number {
                sizes.insert(number, entry.metadata()?.len());
            }
        }
        let next = sizes.keys().next_back().map_or(1, |last| last + 1);
        Ok(Disk { dir: dir.to_owned(), sizes, next, active: None })
    }

    /// Numbers of the segments, oldest first.
    pub fn segments(&self) -> Vec<u64> {
        self.sizes.keys().copied().collect()
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.sizes.values().sum()
    }

    /// Everything in a segment, up to the limit.
    pub fn read_segment(&self, number: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(self.path(number))?.take(MAX_SEGMENT).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// One record.
    pub fn read(&self, place: Place) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; place.length as usize];
        File::open(self.path(place.segment))?.read_exact_at(&mut bytes, place.offset)?;
        Ok(bytes)
    }

    /// Appends a record for `payload`, in a new segment of `epoch` that begins at `at` when the last one is full.
    ///
    /// Not durable before [`Disk::sync`]. After an error nothing of it stays, and the next append takes a new segment.
    pub fn append(&mut self, epoch: Epoch, at: Cursor, payload: &[u8]) -> io::Result<Place> {
        if self.active.as_ref().is_none_or(|active| active.length >= SEGMENT) {
            self.begin_segment(epoch, at)?;
        }
        let Some(active) = &mut self.active else { return Err(io::Error::other("no segment to write to")) };
        let record = record::record(payload);
        if let Err(error) = active.file.write_all_at(&record, active.length) {
            self.abandon();
            return Err(error);
        }
        let place = Place { segment: active.number, offset: active.length, length: record.len() as u32 };
        active.length += record.len() as u64;
        self.sizes.insert(active.number, active.length);
        Ok(place)
    }

    fn begin_segment(&mut self, epoch: Epoch, at: Cursor) -> io::Result<()> {
        if let Some(full) = self.active.take() {
            full.file.sync_data()?;
        }
        let (number, header) = (self.next, record::header(epoch, at));
        let path = self.path(number);
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        // A file with half a header is written anew by the next try, or reads as torn.
        file.write_all_at(&header, 0).and_then(|()| self.sync_dir())?;
        self.next += 1;
        self.sizes.insert(number, header.len() as u64);
        self.active = Some(Active { number, file, length: header.len() as u64 });
        Ok(())
    }

    /// Cuts what a failed write may have left and writes no more to that segment.
    fn abandon(&mut self) {
        if let Some(active) = self.active.take()
            && let Err(error) = active.file.set_len(active.length)
        {
            tracing::debug!(%error, segment = active.number, "a failed write stays as a torn tail");
        }
    }

    /// Makes everything appended durable. After an error the segment is written to no more.
    pub fn sync(&mut self) -> io::Result<()> {
        let result = self.active.as_ref().map_or(Ok(()), |active| active.file.sync_data());
        if result.is_err() {
            self.active = None;
        }
        result
    }

    /// Replaces a segment: a header at `at` and `payloads`. Durable on return; a crash leaves the old or the new one.
    pub fn rewrite(&mut self, number: u64, epoch: Epoch, at: Cursor, payloads: &[Vec<u8>]) -> io::Result<Vec<Place>> {
        let mut bytes = record::header(epoch, at);
        let mut places = Vec::with_capacity(payloads.len());
        for payload in payloads {
            let record = record::record(payload);
            places.push(Place { segment: number, offset: bytes.len() as u64, length: record.len() as u32 });
            bytes.extend(record);
        }
        self.replace(&self.path(number), &bytes)?;
        if self.active.as_ref().is_some_and(|active| active.number == number) {
            self.active = None;
        }
        self.sizes.insert(number, bytes.len() as u64);
        Ok(places)
    }

    /// Removes a segment.
    pub fn remove(&mut self, number: u64) -> io::Result<()> {
        if self.active.as_ref().is_some_and(|active| active.number == number) {
            self.active = None;
        }
        fs::remove_file(self.path(number))?;
        self.sizes.remove(&number);
        Ok(())
    }

    /// Ends the segment being written; the next append begins a new one.
    pub fn end_segment(&mut self) {
        self.active = None;
    }

    /// The epoch in force, if it was written and can be read.
    pub fn epoch(&self) -> Option<Epoch> {
        fs::read_to_string(self.dir.join("epoch")).ok()?.trim().parse().ok()
    }

    /// Puts `epoch` in force.
    pub fn set_epoch(&self, epoch: Epoch) -> io::Result<()> {
        self.replace(&self.dir.join("epoch"), format!("{epoch}\n").as_bytes())
    }

    /// What is noted of collectors; empty when there is nothing that can be read.
    pub fn collectors(&self) -> String {
        let mut text = String::new();
        let file = File::open(self.dir.join("collectors"));
        match file.and_then(|file| file.take(MAX_COLLECTORS).read_to_string(&mut text)) {
            Ok(_) => text,
            Err(_) => String::new(),
        }
    }

    /// Notes it.
    pub fn set_collectors(&self, text: &str) -> io::Result<()> {
        self.replace(&self.dir.join("collectors"), text.as_bytes())
    }

    /// Whether the last run ended in order; from now on it did not.
    pub fn take_clean(&self) -> bool {
        fs::remove_file(self.dir.join("clean")).is_ok()
    }

    /// This run ends in order.
    pub fn set_clean(&self) -> io::Result<()> {
        self.replace(&self.dir.join("clean"), b"")
    }

    /// Keeps a copy of `bytes` that could not be read, and says where; without one when there are too many already.
    pub fn set_aside(&self, name: &str, bytes: &[u8]) -> io::Result<PathBuf> {
        let dir = self.dir.join("damaged");
        fs::create_dir_all(&dir)?;
        let held: u64 = fs::read_dir(&dir)?.filter_map(|e| e.ok()?.metadata().ok()).map(|m| m.len()).sum();
        if held + bytes.len() as u64 > MAX_DAMAGED {
            return Err(io::Error::other(format!("{} holds {held} bytes already", dir.display())));
        }
        let path = dir.join(name);
        self.replace(&path, bytes)?;
        Ok(path)
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let new = path.with_extension("new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        let written = file.write_all(bytes).and_then(|()| file.sync_data()).and_then(|()| fs::rename(&new, path));
        if written.is_err() {
            let _ = fs::remove_file(&new);
        }
        written.and_then(|()| self.sync_dir())
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number:020}.seg"))
    }
}
