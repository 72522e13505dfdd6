//! The agent's durable queue of events: bounded, chained, and in nobody's way.
//!
//! [`Spool::emit`] never waits: what does not fit is counted and told of later. A thread of its own seals what comes in
//! within [`GROUP`] as one batch, writes it, makes it durable, and only then hands it to the uplink. It is a thread and
//! not a task because a stalled disk must not stall the proxy.

mod disk;
mod places;
mod queue;
mod record;
mod shed;

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sidewarden_proto::backoff::Random;
use sidewarden_proto::batch::{Cursor, Epoch, Link};
use sidewarden_proto::event::{Event, Severity};
use sidewarden_proto::time::Timestamp;
use tokio::sync::{Notify, oneshot};

pub use queue::{Damage, Limits, Met};
use queue::{Found, Queue};

/// Events that come within this of the first one go into the same batch.
pub const GROUP: Duration = Duration::from_millis(20);
/// The same while no collector takes anything: fewer and larger links, a little later on disk.
const GROUP_BEHIND: Duration = Duration::from_millis(250);
/// This many links not acknowledged mean that no collector takes anything.
const BEHIND: usize = 256;
/// Events that wait to be sealed.
const INBOX: usize = 8_192;
/// Bytes of them.
const INBOX_BYTES: usize = 8 << 20;
/// Larger events are lost: one of them could fill a batch.
const MAX_EVENT: usize = 1 << 20;
/// How long the uplink waits for the thread, which may be waiting for the disk.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// A failing disk is tried again this often.
const RETRY: Duration = Duration::from_secs(2);

/// Why there is no spool.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The directory cannot be used.
    #[error("the spool directory {} cannot be used: {error}: make it writable, or set data_dir to one that is", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// The thread cannot be started.
    #[error("the spool's thread cannot be started: {0}")]
    Thread(io::Error),
}

/// What was found at the start.
#[derive(Clone, Debug)]
pub struct Opened {
    /// The epoch in force.
    pub epoch: Epoch,
    /// The run before ended in order, or there was none.
    pub clean: bool,
    /// What could not be read. Events that tell of it are in the spool already.
    pub damage: Vec<Damage>,
}

/// What the spool counts, for metrics.
#[derive(Debug, Default)]
pub struct SpoolStats {
    /// Links not acknowledged.
    pub links: AtomicU64,
    /// Bytes on disk.
    pub bytes: AtomicU64,
    /// Last sequence number sealed.
    pub last_seq: AtomicU64,
    /// Events lost before they were sealed, or dropped for want of room, by severity, lowest first.
    pub lost: [AtomicU64; 4],
    /// The disk takes nothing at present.
    pub failing: AtomicBool,
}

/// The queue; clones are handles of the same one.
#[derive(Clone, Debug)]
pub struct Spool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    inbox: Mutex<Inbox>,
    wake: Condvar,
    /// There is something new after the last link.
    sealed: Notify,
    /// Counts losses that call for a fresh baseline.
    baseline: tokio::sync::watch::Sender<u64>,
    epoch: Mutex<Epoch>,
    stats: SpoolStats,
    now: fn() -> Timestamp,
}

#[derive(Debug, Default)]
struct Inbox {
    events: VecDeque<Event>,
    bytes: usize,
    lost: [u32; 4],
    acked: Option<Cursor>,
    recalled: bool,
    requests: VecDeque<Request>,
    stop: bool,
}

#[derive(Debug)]
enum Request {
    After(Cursor, oneshot::Sender<Option<Link>>),
    Meet(String, Cursor, oneshot::Sender<Met>),
    NewEpoch(Epoch, oneshot::Sender<()>),
    Flush(oneshot::Sender<()>),
}

/// The spool's thread. Dropping it without [`Writer::finish`] leaves the spool as a crash would.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

impl Spool {
    /// Opens the spool in `dir` and starts its thread.
    pub fn open(
        dir: &Path,
        limits: Limits,
        random: Random,
        now: fn() -> Timestamp,
    ) -> Result<(Spool, Writer, Opened), SpoolError> {
        let (queue, Found { clean, damage }) = Queue::open(dir, limits, random_epoch(random))
            .map_err(|error| SpoolError::Directory { path: dir.to_owned(), error })?;
        let opened = Opened { epoch: queue.epoch(), clean, damage };
        let shared = Arc::new(Shared::new(queue.epoch(), now));
        let spool = Spool { shared: shared.clone() };
        opened.damage.iter().for_each(|damage| spool.emit(damage.event(now())));
        let owned = shared.clone();
        let thread = std::thread::Builder::new().name("spool".into()).spawn(move || run(&owned, queue));
        Ok((spool, Writer { shared, thread: thread.map_err(SpoolError::Thread)? }, opened))
    }

    /// Takes an event, or counts it as lost. Never waits for the disk.
    pub fn emit(&self, event: Event) {
        let mut inbox = self.shared.lock();
        let size = event.body.get().len() + event.summary.len() + 128;
        // The last quarter is for what matters.
        let share = if event.severity >= Severity::Warning { 4 } else { 3 };
        let full = inbox.events.len() >= INBOX / 4 * share || inbox.bytes + size > INBOX_BYTES / 4 * share;
        if full || size > MAX_EVENT || inbox.stop {
            let rank = event.severity.rank();
            inbox.lost[rank] = inbox.lost[rank].saturating_add(1);
            self.shared.stats.lost[rank].fetch_add(1, Relaxed);
        } else {
            inbox.bytes += size;
            inbox.events.push_back(event);
        }
        drop(inbox);
        self.shared.wake.notify_one();
    }

    /// The link to send after `cursor`, when there is one.
    pub async fn after(&self, cursor: Cursor) -> Option<Link> {
        self.ask(|answer| Request::After(cursor, answer)).await.flatten()
    }

    /// Whether `collector`, which stands at `cursor`, has the same history, and all of it; `None` when the spool does not
    /// answer. What is acknowledged from now on, that collector has. One that lacks something is told the posture anew.
    pub async fn meet(&self, collector: &str, cursor: Cursor) -> Option<Met> {
        self.ask(|answer| Request::Meet(collector.to_owned(), cursor, answer)).await
    }

    /// Goes on in another epoch: what was not acknowledged is sealed again there, in the same order.
    pub async fn begin_epoch(&self, random: Random) {
        let epoch = random_epoch(random);
        self.ask(|answer| Request::NewEpoch(epoch, answer)).await;
    }

    /// Returns when everything emitted before is sealed.
    pub async fn flush(&self) {
        self.ask(Request::Flush).await;
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Option<T> {
        let (answer, wait) = oneshot::channel();
        self.shared.lock().requests.push_back(request(answer));
        self.shared.wake.notify_one();
        tokio::time::timeout(ANSWER_WITHIN, wait).await.ok()?.ok()
    }

    /// Everything up to `cursor` is on the collector's disk.
    pub fn acknowledge(&self, cursor: Cursor) {
        self.shared.lock().acked = Some(cursor);
        self.shared.wake.notify_one();
    }

    /// The session ended: what was handed out and not acknowledged is not under way any more.
    pub fn recall(&self) {
        self.shared.lock().recalled = true;
        self.shared.wake.notify_one();
    }

    /// Waits until something was sealed since the last call.
    pub async fn sealed(&self) {
        self.shared.sealed.notified().await;
    }

    /// The epoch in force.
    pub fn epoch(&self) -> Epoch {
        *self.shared.epoch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes whenever events were lost, so that the posture should be told anew.
    pub fn baseline_wanted(&self) -> tokio::sync::watch::Receiver<u64> {
        self.shared.baseline.subscribe()
    }

    /// What is counted.
    pub fn stats(&self) -> &SpoolStats {
        &self.shared.stats
    }
}

impl Writer {
    /// Seals and writes what is there, marks the run as ended in order, and ends the thread.
    pub fn finish(self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_one();
        if self.thread.join().is_err() {
            tracing::error!("the spool's thread ended by a panic");
        }
    }
}

impl Shared {
    fn new(epoch: Epoch, now: fn() -> Timestamp) -> Shared {
        Shared {
            inbox: Mutex::default(),
            wake: Condvar::new(),
            sealed: Notify::new(),
            baseline: tokio::sync::watch::Sender::new(0),
            epoch: Mutex::new(epoch),
            stats: SpoolStats::default(),
            now,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn random_epoch(random: Random) -> Epoch {
    let mut epoch = Epoch([0; 16]);
    random(&mut epoch.0);
    epoch
}

/// What the thread found to do.
struct Work {
    events: Vec<Event>,
    lost: [u32; 4],
    acked: Option<Cursor>,
    recalled: bool,
    requests: VecDeque<Request>,
    stop: bool,
}

fn run(shared: &Shared, mut queue: Queue) {
    let mut told_shed = queue.shed_events();
    loop {
        let work = wait(shared, &queue);
        let mut damage = Vec::new();
        if let Some(cursor) = work.acked {
            queue.acknowledge(cursor);
        }
        if work.recalled {
            queue.recall();
        }
        seal(shared, &mut queue, work.events, work.lost);
        told_shed = report(shared, &queue, told_shed);
        for request in work.requests {
            answer(shared, &mut queue, request, &mut damage);
        }
        told_shed = report(shared, &queue, told_shed);
        tell(shared, damage);
        if work.stop {
            return queue.close();
        }
    }
}

/// Waits for something to do. Events alone wait for others to come, requests do not.
fn wait(shared: &Shared, queue: &Queue) -> Work {
    let group = if queue.len() > BEHIND { GROUP_BEHIND } else { GROUP };
    let mut inbox = shared.lock();
    let mut since: Option<Instant> = None;
    loop {
        let flush = inbox.requests.iter().any(|request| matches!(request, Request::Flush(_)));
        let waiting = !inbox.events.is_empty() || inbox.lost != [0; 4];
        if waiting && since.is_none() {
            since = Some(Instant::now());
        }
        let left = since.map_or(RETRY, |since| group.saturating_sub(since.elapsed()));
        let due = inbox.stop || flush || (waiting && (left.is_zero() || inbox.events.len() >= INBOX / 2));
        if due || !inbox.requests.is_empty() || inbox.acked.is_some() || inbox.recalled {
            return take(&mut inbox, due);
        }
        let (next, timeout) = shared.wake.wait_timeout(inbox, left).unwrap_or_else(PoisonError::into_inner);
        inbox = next;
        if timeout.timed_out() && !waiting && queue.failing().is_some() {
            return take(&mut inbox, true);
        }
    }
}

fn take(inbox: &mut Inbox, due: bool) -> Work {
    let events = if due { inbox.events.drain(..).collect() } else { Vec::new() };
    let lost = if due { std::mem::take(&mut inbox.lost) } else { [0; 4] };
    if due {
        inbox.bytes = 0;
    }
    Work {
        events,
        lost,
        acked: inbox.acked.take(),
        recalled: std::mem::take(&mut inbox.recalled),
        requests: std::mem::take(&mut inbox.requests),
        stop: inbox.stop,
    }
}

fn seal(shared: &Shared, queue: &mut Queue, mut events: Vec<Event>, lost: [u32; 4]) {
    if lost != [0; 4] {
        events.push(queue::lost(0, 0, lost, "more events than the agent could take in", (shared.now)()));
        shared.baseline.send_modify(|count| *count += 1);
    }
    if events.is_empty() {
        if queue.failing().is_some() {
            queue.write();
        }
        return;
    }
    for event in queue.append(events) {
        shared.stats.lost[event.severity.rank()].fetch_add(1, Relaxed);
    }
    shared.sealed.notify_one();
}

fn answer(shared: &Shared, queue: &mut Queue, request: Request, damage: &mut Vec<Damage>) {
    let heard = match request {
        Request::After(cursor, answer) => answer.send(queue.after(cursor, damage)).is_ok(),
        Request::Meet(collector, cursor, answer) => {
            let met = queue.meet(&collector, cursor);
            if met.lacks {
                shared.baseline.send_modify(|count| *count += 1);
            }
            answer.send(met).is_ok()
        }
        Request::Flush(answer) => answer.send(()).is_ok(),
        Request::NewEpoch(epoch, answer) => {
            queue.begin_epoch(epoch, (shared.now)(), damage);
            *shared.epoch.lock().unwrap_or_else(PoisonError::into_inner) = epoch;
            answer.send(()).is_ok()
        }
    };
    if !heard {
        tracing::debug!("whoever asked the spool did not wait for the answer");
    }
}

fn tell(shared: &Shared, damage: Vec<Damage>) {
    if damage.is_empty() {
        return;
    }
    let events = damage.iter().map(|damage| damage.event((shared.now)()));
    shared.lock().events.extend(events);
    shared.baseline.send_modify(|count| *count += 1);
}

fn report(shared: &Shared, queue: &Queue, told_shed: [u64; 4]) -> [u64; 4] {
    let stats = &shared.stats;
    stats.links.store(queue.len() as u64, Relaxed);
    stats.bytes.store(queue.disk_bytes(), Relaxed);
    stats.last_seq.store(queue.last().seq, Relaxed);
    stats.failing.store(queue.failing().is_some(), Relaxed);
    let shed = queue.shed_events();
    if shed != told_shed {
        stats.lost.iter().zip(shed.iter().zip(told_shed)).for_each(|(lost, (now, before))| {
            lost.fetch_add(now - before, Relaxed);
        });
        shared.baseline.send_modify(|count| *count += 1);
    }
    shed
}

#[cfg(test)]
mod tests {
    use sidewarden_proto::event::AgentStopping;

    use super::*;

    const LIMITS: Limits = Limits { disk_bytes: 8 << 20, memory_bytes: 1 << 20, links: 1_000 };

    fn open(dir: &Path) -> (Spool, Writer, Opened) {
        Spool::open(dir, LIMITS, |bytes| bytes.fill(4), || Timestamp(9)).unwrap()
    }

    fn event(severity: Severity) -> Event {
        Event::new(Timestamp(1), severity, "x", &AgentStopping { reason: "x".into() }.into())
    }

    #[tokio::test]
    async fn events_become_links_that_an_acknowledgement_removes() {
        let dir = tempfile::tempdir().unwrap();
        let (spool, writer, opened) = open(dir.path());
        assert!(opened.clean && opened.epoch == Epoch([4; 16]));
        (0..5).for_each(|_| spool.emit(event(Severity::Notice)));
        spool.sealed().await;
        let link = spool.after(Cursor::START).await.unwrap();
        assert_eq!((link.first_seq(), link.last_seq()), (1, 5), "one batch for what came together");
        spool.acknowledge(Cursor { seq: 5, hash: link.hash() });
        spool.flush().await;
        assert_eq!(spool.stats().links.load(Relaxed), 0);
        writer.finish();
        assert!(open(dir.path()).2.clean);
    }

    #[test]
    fn what_does_not_fit_is_counted_and_told_and_the_last_quarter_is_for_what_matters() {
        let dir = tempfile::tempdir().unwrap();
        let (mut queue, _) = Queue::open(dir.path(), LIMITS, Epoch([4; 16])).unwrap();
        let spool = Spool { shared: Arc::new(Shared::new(queue.epoch(), || Timestamp(9))) };
        (0..INBOX).for_each(|_| spool.emit(event(Severity::Info)));
        spool.emit(event(Severity::Critical));
        let quarter = (INBOX / 4) as u32;
        let work = take(&mut spool.shared.lock(), true);
        assert_eq!((work.lost, work.events.len()), ([quarter, 0, 0, 0], INBOX / 4 * 3 + 1));
        seal(&spool.shared, &mut queue, work.events, work.lost);
        let link = queue.after(Cursor::START, &mut Vec::new()).unwrap();
        let Link::Batch(batch) = link else { panic!("no batch") };
        let lines = batch.open().unwrap();
        assert_eq!(lines.events().unwrap().last().unwrap().kind, "events.lost");
        assert_eq!(*spool.baseline_wanted().borrow(), 1, "a fresh baseline is asked for");
    }

    #[test]
    fn an_unusable_directory_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = Spool::open(&file.join("spool"), LIMITS, |_| {}, || Timestamp(0)).unwrap_err();
        assert!(error.to_string().contains("set data_dir to one that is"), "{error}");
    }
}
