//! A wire between two agents that is looked into: a relay that reads along, and judges every byte as a record of TLS.
//!
//! Unlike a packet socket it needs no privilege and misses nothing under load. What it cannot see is traffic that goes
//! another way; the tests therefore count the connections at both agents too.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result};

use crate::service::own_ip;

/// Of each direction this much is searched for plain words: looking through gigabytes would take longer than sending them.
const SEARCHED: usize = 1 << 20;
/// The largest record of TLS, RFC 8446 section 5.2 and RFC 5246 section 6.2.3.
const LARGEST: usize = (1 << 14) + 2048;

/// What went by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// TCP connections.
    pub connections: u64,
    /// Bytes, both ways.
    pub bytes: u64,
    /// Records of TLS.
    pub records: u64,
    /// Of those, how many are sealed: application data.
    pub sealed: u64,
    /// What was no record of TLS, and what was sent openly after the handshake.
    pub faults: Vec<String>,
    /// The plain words that went by.
    pub plain: Vec<String>,
}

impl Seen {
    /// Something went by, and all of it was sealed.
    pub fn is_sealed(&self) -> bool {
        self.sealed > 0 && self.faults.is_empty() && self.plain.is_empty()
    }

    fn add(&mut self, other: Seen) {
        self.bytes += other.bytes;
        self.records += other.records;
        self.sealed += other.sealed;
        self.faults.extend(other.faults);
        self.plain.extend(other.plain);
    }
}

/// The relay. Ends with this value; connections that are open then end with their ends.
#[derive(Debug)]
pub struct Tap {
    /// Where it listens.
    pub address: SocketAddr,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Tap {
    /// Leads whoever connects to `to`, and looks for `words`.
    pub fn start(to: SocketAddr, words: &[&str]) -> Result<Tap> {
        let listener = TcpListener::bind((own_ip(), 0)).context("binding the tap")?;
        let address = listener.local_addr()?;
        let (seen, stop) = (Arc::<Mutex<Seen>>::default(), Arc::<AtomicBool>::default());
        let words: Arc<[String]> = words.iter().map(|word| (*word).to_owned()).collect();
        let (told, stopped) = (seen.clone(), stop.clone());
        let accepting = std::thread::spawn(move || {
            while let Ok((from, _)) = listener.accept() {
                if stopped.load(SeqCst) {
                    return;
                }
                // Nobody there: the one who came sees the end.
                let Ok(to) = TcpStream::connect(to) else { continue };
                lock(&told).connections += 1;
                for (from, to) in [(from.try_clone(), to.try_clone()), (Ok(to), Ok(from))] {
                    let (Ok(from), Ok(to), judge, told) = (from, to, Judge::new(&words), told.clone()) else {
                        continue;
                    };
                    std::thread::spawn(move || lead(from, to, judge, &told));
                }
            }
        });
        Ok(Tap { address, seen, stop, accepting: Some(accepting) })
    }

    /// What went by so far; of a connection that is still open, nothing but that it is there.
    pub fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        // Wakes the accepting thread; if that cannot be, it ends with the process.
        if let (Ok(_), Some(accepting)) = (TcpStream::connect(self.address), self.accepting.take()) {
            let _ = accepting.join();
        }
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One direction, to its end. A cut becomes an end without close_notify, which to TLS is a cut too.
fn lead(mut from: TcpStream, mut to: TcpStream, mut judge: Judge, seen: &Mutex<Seen>) {
    let mut buffer = vec![0; 128 << 10];
    let whole = loop {
        match from.read(&mut buffer) {
            Ok(0) => break true,
            Ok(count) => {
                judge.take(&buffer[..count]);
                if to.write_all(&buffer[..count]).is_err() {
                    break false;
                }
            }
            Err(_) => break false,
        }
    };
    lock(seen).add(judge.seen);
    // An end is handed on; after a cut nothing goes either way.
    let _ = to.shutdown(if whole { Shutdown::Write } else { Shutdown::Both });
    if !whole {
        let _ = from.shutdown(Shutdown::Both);
    }
}

/// One direction of one connection, judged while it goes by.
#[derive(Debug)]
struct Judge {
    words: Arc<[String]>,
    header: Vec<u8>,
    /// Bytes of the record that are still to come.
    left: usize,
    /// The end of what was searched, for words across two reads.
    tail: Vec<u8>,
    searched: usize,
    seen: Seen,
}

impl Judge {
    fn new(words: &Arc<[String]>) -> Judge {
        let (header, tail) = (Vec::new(), Vec::new());
        Judge { words: words.clone(), header, left: 0, tail, searched: 0, seen: Seen::default() }
    }

    fn take(&mut self, mut bytes: &[u8]) {
        self.seen.bytes += bytes.len() as u64;
        self.search(bytes);
        while !bytes.is_empty() && self.seen.faults.is_empty() {
            let body = self.left.min(bytes.len());
            (self.left, bytes) = (self.left - body, &bytes[body..]);
            let head = (5 - self.header.len()).min(bytes.len());
            if self.left == 0 {
                self.header.extend_from_slice(&bytes[..head]);
                bytes = &bytes[head..];
                self.begin();
            }
        }
    }

    /// Judges a header, once it is whole.
    fn begin(&mut self) {
        let [kind, major, minor, high, low] = self.header[..] else { return };
        self.header.clear();
        self.left = usize::from(u16::from_be_bytes([high, low]));
        self.seen.records += 1;
        match kind {
            _ if major != 3 || minor > 3 || self.left > LARGEST => {
                self.fault("no record of TLS", &[kind, major, minor])
            }
            23 => self.seen.sealed += 1,
            // Of the handshake, what TLS 1.3 leaves open: two hellos, a change of ciphers, an alert before the keys.
            20..=22 if self.seen.sealed == 0 => {}
            20..=22 => self.fault("an open record after sealed ones", &[kind]),
            _ => self.fault("no record of TLS", &[kind, major, minor]),
        }
    }

    fn fault(&mut self, what: &str, bytes: &[u8]) {
        self.seen.faults.push(format!("{what}, record {}, {bytes:02x?}", self.seen.records));
    }

    fn search(&mut self, bytes: &[u8]) {
        let part = &bytes[..bytes.len().min(SEARCHED - self.searched)];
        if part.is_empty() {
            return;
        }
        self.searched += part.len();
        self.tail.extend_from_slice(part);
        for word in self.words.iter().filter(|word| holds(&self.tail, word.as_bytes())) {
            if !self.seen.plain.contains(word) {
                self.seen.plain.push(word.clone());
            }
        }
        let longest = self.words.iter().map(String::len).max().unwrap_or(0).saturating_sub(1);
        self.tail.drain(..self.tail.len().saturating_sub(longest));
    }
}

fn holds(bytes: &[u8], word: &[u8]) -> bool {
    bytes.windows(word.len()).any(|part| part == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        [&[kind, 3, 3, length[0], length[1]], body].concat()
    }

    /// What is made of `bytes` that come `size` at a time.
    fn judged(bytes: &[u8], size: usize) -> Seen {
        let mut judge = Judge::new(&Arc::from(["SELECT".to_owned(), "HTTP/1.".to_owned()]));
        bytes.chunks(size).for_each(|part| judge.take(part));
        judge.seen
    }

    #[test]
    fn sealed_records_are_told_from_everything_else_however_they_are_cut() {
        let hello = [record(22, b"hello"), record(20, &[1])].concat();
        let sealed = [&hello[..], &record(23, &[7; 300]), &record(23, b"")].concat();
        for (bytes, good) in [
            (sealed.clone(), true),
            (hello.clone(), false),
            ([&sealed[..], &record(22, b"again")].concat(), false),
            ([&sealed[..], b"SELECT id FROM orders"].concat(), false),
            (record(23, b"SELECT in a record"), false),
            (b"GET / HTTP/1.1\r\n".to_vec(), false),
            ([&sealed[..], &[23, 3, 3, 0xff, 0xff]].concat(), false),
            (Vec::new(), false),
        ] {
            for size in [1, 2, 3, 5, 7, 4096] {
                let seen = judged(&bytes, size);
                assert_eq!(seen.is_sealed(), good, "{bytes:02x?} by {size}: {seen:?}");
            }
        }
        let seen = judged(&sealed, 4);
        assert_eq!((seen.records, seen.sealed, seen.bytes), (4, 2, sealed.len() as u64));
    }

    #[test]
    fn a_word_is_found_across_two_reads_and_once() {
        let seen = judged(b"xxSELECT SELECT HTTP/1.1", 4);
        assert_eq!(seen.plain, ["SELECT", "HTTP/1."]);
    }

    /// The control: what these tests are there to catch is caught.
    #[test]
    fn plain_traffic_through_the_tap_is_seen_as_such() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let tap = Tap::start(server.local_addr().unwrap(), &["SELECT"]).unwrap();
        let mut client = TcpStream::connect(tap.address).unwrap();
        client.write_all(b"SELECT id").unwrap();
        let (mut there, _) = server.accept().unwrap();
        let mut got = [0; 9];
        there.read_exact(&mut got).unwrap();
        there.write_all(b"1").unwrap();
        drop(there);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        drop(client);
        while tap.seen().bytes < 10 {
            std::thread::yield_now();
        }
        let seen = tap.seen();
        assert_eq!((&got, &answer[..], seen.connections), (b"SELECT id", &b"1"[..], 1));
        assert!(!seen.is_sealed() && seen.plain == ["SELECT"], "{seen:?}");
    }
}
