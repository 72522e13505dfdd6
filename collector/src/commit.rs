//! One thread, one order: log, acknowledge, state, index, everybody who listens.
//!
//! Links wait in a bounded queue; while it is full their sessions wait too, nothing is dropped. What has gathered during
//! one fsync goes to disk with the next (group commit). A link is taken only if it is the next of its chain as the log
//! knows it, so an event is stored once, whatever sessions overlap. The collector's own events take the same way, as
//! those of an agent of its own.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, RwLock, RwLockReadGuard};

use prometheus::{Histogram, HistogramOpts, IntCounter, IntGauge};
use sidewarden_proto::batch::{Batch, Cursor, Epoch, Fit, Lines, Link, MAX_EVENTS, MAX_LINK, Malformed, Tombstone};
use sidewarden_proto::event::{Body, ClockTick, Event, EventRef, Severity};
use sidewarden_proto::identity::AgentId;
use sidewarden_proto::time::Timestamp;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, mpsc, oneshot, watch};

use crate::index::{Indexed, Record, Writer};
use crate::log::{Entry, Keep, Log, LogError, Stored};
use crate::state::{Stamp, State};

/// Requests that wait.
const QUEUE: usize = 1024;
/// KiB of links that wait, as sent: sixteen of the largest.
const QUEUE_KIB: usize = 16 * MAX_LINK / 1024;
/// Most links of one group.
const GROUP_LINKS: usize = 512;
/// A group is closed once it holds this many bytes, decompressed.
const GROUP_BYTES: usize = 32 << 20;
/// Links a slow listener may lag behind before it loses the oldest and is told so.
const LISTENERS_LAG: usize = 4096;
/// Own events kept while the store refuses them; the oldest go first, counted.
const OWN_PENDING: usize = 4096;
/// Chains whose cursor is kept in memory; the log knows the others.
const CACHED_CHAINS: usize = 50_000;
/// The state is saved after this many links, or at the first tick after [`SNAPSHOT_EVERY`].
const SNAPSHOT_LINKS: u64 = 50_000;
/// See [`SNAPSHOT_LINKS`].
const SNAPSHOT_EVERY: std::time::Duration = std::time::Duration::from_secs(600);

/// A link that is on disk, with what the collector knows of it.
#[derive(Clone, Debug)]
pub struct Committed {
    /// Where it stands in the log.
    pub position: u64,
    /// Who sent it, by certificate.
    pub agent: Arc<AgentId>,
    /// The life of the sender's spool.
    pub epoch: Epoch,
    /// When the collector took it.
    pub received: Timestamp,
    /// What it carries.
    pub what: What,
}

/// What a link carries.
#[derive(Clone, Debug)]
pub enum What {
    /// Events, in order.
    Events(Vec<Event>),
    /// The place where events were.
    Lost(Tombstone),
}

impl Committed {
    /// Its events, as the API shows them.
    pub fn records(&self) -> impl Iterator<Item = Record> + '_ {
        self.events().iter().map(|event| Record::of(self.position, &self.agent, self.epoch, self.received, event))
    }

    /// Its events; none for a tombstone.
    pub fn events(&self) -> &[Event] {
        match &self.what {
            What::Events(events) => events,
            What::Lost(_) => &[],
        }
    }
}

/// How far the links of one session have come.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress {
    /// Up to here they are on disk.
    Committed(Cursor),
    /// One could not be taken; those after it will not be either.
    Failed(Fault),
}

/// Why a link could not be taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Fault {
    /// The store refuses; it may take it later.
    #[error("the store refuses: {0}")]
    Store(String),
    /// The batch is not readable, and never will be.
    #[error("{0}")]
    Malformed(String),
    /// It does not follow what is on disk.
    #[error("the chain of events is broken after {after}")]
    ChainBroken {
        /// The last number that fits.
        after: u64,
    },
    /// Links before it are missing.
    #[error("links after {after} are missing")]
    Gap {
        /// The last number that is there.
        after: u64,
    },
}

/// The collector is shutting down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the collector is shutting down")]
pub struct Closed;

enum Request {
    Link(Offer),
    Own(Event),
    Tick(Timestamp),
    Cursor { agent: Arc<AgentId>, epoch: Epoch, reply: oneshot::Sender<Result<Cursor, String>> },
    Flush(oneshot::Sender<()>),
}

/// A link of a session, and the room it takes in the queue.
struct Offer {
    agent: Arc<AgentId>,
    received: Timestamp,
    link: Link,
    progress: watch::Sender<Progress>,
    room: OwnedSemaphorePermit,
}

/// What committing did, in numbers.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Time from taking a group to its fsync.
    pub commit_seconds: Histogram,
    /// Links on disk.
    pub links: IntCounter,
    /// Events on disk.
    pub events: IntCounter,
    /// Groups that the store refused.
    pub failures: IntCounter,
    /// Own events that found no room while the store refused.
    pub own_lost: IntCounter,
    /// Links that retention took away.
    pub trimmed: IntCounter,
    /// Bytes of links in the log.
    pub log_bytes: IntGauge,
    /// 1 while the store takes what comes, 0 while it refuses.
    pub store_up: IntGauge,
}

impl Stats {
    fn new() -> Stats {
        let counter = |name: &str, help: &str| IntCounter::new(name, help).expect("the name is a constant");
        let gauge = |name: &str, help: &str| IntGauge::new(name, help).expect("the name is a constant");
        let seconds =
            HistogramOpts::new("sidewarden_collector_commit_seconds", "Time to put a group of links on disk.")
                .buckets(vec![0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0]);
        let stats = Stats {
            commit_seconds: Histogram::with_opts(seconds).expect("the options are constants"),
            links: counter("sidewarden_collector_links_committed_total", "Links on disk."),
            events: counter("sidewarden_collector_events_committed_total", "Events on disk."),
            failures: counter("sidewarden_collector_commit_failures_total", "Groups that the store refused."),
            own_lost: counter("sidewarden_collector_own_events_lost_total", "Own events lost while the store refused."),
            trimmed: counter("sidewarden_collector_links_trimmed_total", "Links that retention took away."),
            log_bytes: gauge("sidewarden_collector_log_bytes", "Bytes of links in the log."),
            store_up: gauge("sidewarden_collector_store_up", "1 while the store takes what comes."),
        };
        stats.store_up.set(1);
        stats
    }

    /// All of them, to be registered.
    pub fn collectors(&self) -> Vec<Box<dyn prometheus::core::Collector>> {
        vec![
            Box::new(self.commit_seconds.clone()),
            Box::new(self.links.clone()),
            Box::new(self.events.clone()),
            Box::new(self.failures.clone()),
            Box::new(self.own_lost.clone()),
            Box::new(self.trimmed.clone()),
            Box::new(self.log_bytes.clone()),
            Box::new(self.store_up.clone()),
        ]
    }
}

/// The way to the committing thread. Cheap to clone; the thread ends when the last one is gone.
#[derive(Clone, Debug)]
pub struct Committer {
    queue: mpsc::Sender<Request>,
    room: Arc<Semaphore>,
    listeners: broadcast::Sender<Arc<Committed>>,
    state: Arc<RwLock<State>>,
    stats: Stats,
}

impl Committer {
    /// Takes the next link of a session's agent; waits while the queue is full.
    pub async fn link(
        &self,
        agent: Arc<AgentId>,
        received: Timestamp,
        link: Link,
        progress: watch::Sender<Progress>,
    ) -> Result<(), Closed> {
        let size = if let Link::Batch(batch) = &link { batch.body.len() } else { 0 };
        let kib = u32::try_from(size / 1024 + 1).unwrap_or(u32::MAX).min(QUEUE_KIB as u32);
        let room = self.room.clone().acquire_many_owned(kib).await.map_err(|_| Closed)?;
        self.queue.send(Request::Link(Offer { agent, received, link, progress, room })).await.map_err(|_| Closed)
    }

    /// Takes an event of the collector itself; waits while the queue is full.
    pub async fn own(&self, event: Event) -> Result<(), Closed> {
        self.queue.send(Request::Own(event)).await.map_err(|_| Closed)
    }

    /// Lets time pass: a `clock.tick` event, retention, a snapshot when it is due.
    pub async fn tick(&self, now: Timestamp) -> Result<(), Closed> {
        self.queue.send(Request::Tick(now)).await.map_err(|_| Closed)
    }

    /// How far the chain of `agent` in `epoch` is on disk, after everything that was queued before.
    pub async fn cursor(&self, agent: Arc<AgentId>, epoch: Epoch) -> Result<Result<Cursor, String>, Closed> {
        let (reply, answer) = oneshot::channel();
        self.queue.send(Request::Cursor { agent, epoch, reply }).await.map_err(|_| Closed)?;
        answer.await.map_err(|_| Closed)
    }

    /// Returns once everything that was queued before is on disk, in the state, in the index and told to listeners.
    pub async fn flush(&self) -> Result<(), Closed> {
        let (reply, done) = oneshot::channel();
        self.queue.send(Request::Flush(reply)).await.map_err(|_| Closed)?;
        done.await.map_err(|_| Closed)
    }

    /// Every link committed from now on, in order. A listener that lags loses the oldest and is told how many.
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<Committed>> {
        self.listeners.subscribe()
    }

    /// What is true now. Committing waits while this is held: copy what is needed, and let go.
    pub fn state(&self) -> RwLockReadGuard<'_, State> {
        // Applying an event leaves no half-changed state behind that a reader could not show.
        self.state.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// What committing did, in numbers.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Requests that wait now.
    pub fn waiting(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity()
    }
}

/// What [`start`] needs.
pub struct Parts {
    /// The log.
    pub log: Box<dyn Log>,
    /// The index over it.
    pub index: Writer,
    /// The collector's own name.
    pub own: AgentId,
    /// The epoch of its own events when the log has none yet.
    pub new_epoch: Epoch,
    /// How long events are kept.
    pub keep_for: std::time::Duration,
    /// Most bytes of links kept.
    pub keep_bytes: u64,
}

/// Rebuilds state and index from the log and starts the committing thread.
pub fn start(parts: Parts) -> Result<(Committer, std::thread::JoinHandle<()>), LogError> {
    let Parts { log, mut index, own, new_epoch, keep_for, keep_bytes } = parts;
    let (state, snapshot_position) = restore(&*log)?;
    if let Err(error) = index.catch_up(&*log) {
        tracing::error!(%error, "the index is behind the log; questions about events are answered in part");
    }
    let own_epoch = log.last_epoch(&own)?.unwrap_or(new_epoch);
    let (queue, requests) = mpsc::channel(QUEUE);
    let (listeners, _) = broadcast::channel(LISTENERS_LAG);
    let (state, stats) = (Arc::new(RwLock::new(state)), Stats::new());
    stats.log_bytes.set(i64::try_from(log.extent()?.bytes).unwrap_or(i64::MAX));
    let thread = Thread {
        log,
        index,
        own: Arc::new(own),
        own_epoch,
        own_pending: VecDeque::new(),
        cursors: HashMap::new(),
        state: state.clone(),
        listeners: listeners.clone(),
        stats: stats.clone(),
        keep_for,
        keep_bytes,
        snapshot_position,
        snapshot_at: Timestamp::default(),
    };
    let handle = std::thread::Builder::new()
        .name("commit".into())
        .spawn(move || thread.run(requests))
        .map_err(|error| LogError::Access { path: "the commit thread".into(), error })?;
    let room = Arc::new(Semaphore::new(QUEUE_KIB));
    Ok((Committer { queue, room, listeners, state, stats }, handle))
}

/// The last snapshot and everything after it. A snapshot that cannot be read is no loss while the log has it all.
fn restore(log: &dyn Log) -> Result<(State, u64), LogError> {
    let mut state = State::default();
    let mut snapshot_position = 0;
    if let Some((position, bytes)) = log.snapshot()? {
        match serde_json::from_slice(&bytes) {
            Ok(saved) => (state, snapshot_position) = (saved, position),
            Err(error) => tracing::warn!(%error, "the saved state cannot be read and is folded anew from the log"),
        }
    }
    let mut from = state.position.max(snapshot_position) + 1;
    loop {
        match log.read_from(from, GROUP_LINKS) {
            Ok(links) if links.is_empty() => return Ok((state, snapshot_position)),
            Ok(links) => {
                from += links.len() as u64;
                links.iter().for_each(|stored| replay(&mut state, stored));
                from = from.max(state.position + 1);
            }
            Err(LogError::Damaged { position, error }) => {
                damaged(position, &error);
                from = position + 1;
            }
            Err(error) => return Err(error),
        }
    }
}

fn damaged(position: u64, error: &Malformed) {
    tracing::error!(position, %error, "a link in the log is damaged: what it said is missing from the state");
}

fn replay(state: &mut State, stored: &Stored) {
    let text = match &stored.entry.link {
        Link::Batch(batch) => batch.open().map(Some),
        Link::Tombstone(_) => Ok(None),
    };
    let read = text.and_then(|text| {
        let events = text.as_ref().map_or(Ok(Vec::new()), Lines::events)?;
        apply(state, stored, &events);
        Ok(())
    });
    if let Err(error) = read {
        damaged(stored.position, &error);
    }
}

fn apply(state: &mut State, stored: &Stored, events: &[EventRef<'_>]) {
    let Stored { position, entry } = stored;
    let stamp = Stamp { position: *position, agent: &entry.agent, epoch: entry.link.epoch(), received: entry.received };
    match &entry.link {
        Link::Batch(_) => events.iter().for_each(|event| state.apply(stamp, event)),
        Link::Tombstone(tombstone) => state.apply_loss(stamp, tombstone),
    }
}

type Chain = (Arc<AgentId>, Epoch);

struct Thread {
    log: Box<dyn Log>,
    index: Writer,
    own: Arc<AgentId>,
    own_epoch: Epoch,
    own_pending: VecDeque<Event>,
    cursors: HashMap<Chain, Cursor>,
    state: Arc<RwLock<State>>,
    listeners: broadcast::Sender<Arc<Committed>>,
    stats: Stats,
    keep_for: std::time::Duration,
    keep_bytes: u64,
    snapshot_position: u64,
    snapshot_at: Timestamp,
}

/// What has gathered for one fsync.
#[derive(Default)]
struct Group {
    entries: Vec<Entry>,
    /// The text of each entry; none for a tombstone.
    texts: Vec<Option<Lines>>,
    sessions: Vec<Waiting>,
    /// How far each chain is known once this group is on disk.
    cursors: HashMap<Chain, Cursor>,
    tick: Option<Timestamp>,
    flushes: Vec<oneshot::Sender<()>>,
    bytes: usize,
    /// Given back when the group is done.
    room: Vec<OwnedSemaphorePermit>,
}

/// A session that waits to hear how far it is on disk.
struct Waiting {
    chain: Chain,
    progress: watch::Sender<Progress>,
    then: Cursor,
}

impl Thread {
    fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        while let Some(first) = requests.blocking_recv() {
            let mut group = Group::default();
            self.take(first, &mut group);
            while group.entries.len() < GROUP_LINKS && group.bytes < GROUP_BYTES {
                let Ok(next) = requests.try_recv() else { break };
                self.take(next, &mut group);
            }
            self.commit(group);
        }
        self.save_snapshot();
    }

    fn take(&mut self, request: Request, group: &mut Group) {
        match request {
            Request::Link(offer) => self.take_link(offer, group),
            Request::Own(event) => self.take_own(event),
            Request::Tick(now) => {
                group.tick = Some(now);
                self.take_own(Event::new(now, Severity::Info, "tick", &Body::from(ClockTick {})));
            }
            Request::Cursor { agent, epoch, reply } => {
                let cursor = self.cursor(&(agent, epoch), group).map_err(|e| e.to_string());
                let _ = reply.send(cursor);
            }
            Request::Flush(reply) => group.flushes.push(reply),
        }
    }

    fn take_own(&mut self, event: Event) {
        if self.own_pending.len() >= OWN_PENDING {
            self.own_pending.pop_front();
            self.stats.own_lost.inc();
        }
        self.own_pending.push_back(event);
    }

    /// How far a chain is known, links of this group included.
    fn cursor(&mut self, chain: &Chain, group: &Group) -> Result<Cursor, LogError> {
        if let Some(cursor) = group.cursors.get(chain).or_else(|| self.cursors.get(chain)) {
            return Ok(*cursor);
        }
        let cursor = self.log.cursor(&chain.0, chain.1)?;
        if self.cursors.len() >= CACHED_CHAINS {
            self.cursors.clear();
        }
        self.cursors.insert(chain.clone(), cursor);
        Ok(cursor)
    }

    fn take_link(&mut self, offer: Offer, group: &mut Group) {
        let Offer { agent, received, link, progress, room } = offer;
        group.room.push(room);
        if matches!(*progress.borrow(), Progress::Failed(_)) {
            return;
        }
        let chain = (agent, link.epoch());
        let then = match self.judge(&chain, link, group) {
            Ok(Judged::Next { link, after, text }) => {
                group.bytes += if let Link::Batch(batch) = &link { batch.header.raw_len as usize } else { 128 };
                group.cursors.insert(chain.clone(), after);
                group.entries.push(Entry { agent: chain.0.clone(), received, link });
                group.texts.push(text);
                after
            }
            // On disk already, or in this very group: acknowledged with it.
            Ok(Judged::Known(cursor)) => cursor,
            Err(fault) => return drop(progress.send_replace(Progress::Failed(fault))),
        };
        group.sessions.push(Waiting { chain, progress, then });
    }

    fn judge(&mut self, chain: &Chain, link: Link, group: &Group) -> Result<Judged, Fault> {
        let cursor = self.cursor(chain, group).map_err(|e| Fault::Store(e.to_string()))?;
        let (link, after) = match cursor.fit(link) {
            Fit::Next(link, after) => (link, after),
            Fit::Known => return Ok(Judged::Known(cursor)),
            Fit::Gap => return Err(Fault::Gap { after: cursor.seq }),
            Fit::Broken => return Err(Fault::ChainBroken { after: cursor.seq }),
        };
        let text = match &link {
            Link::Batch(batch) => {
                let malformed = |error: Malformed| Fault::Malformed(error.to_string());
                Some(batch.open().map_err(malformed)?)
            }
            Link::Tombstone(_) => None,
        };
        Ok(Judged::Next { link, after, text })
    }

    fn commit(&mut self, mut group: Group) {
        let own = self.seal_own(&mut group);
        let started = std::time::Instant::now();
        let texts = std::mem::take(&mut group.texts);
        let events = self.read_events(&texts, &mut group);
        if !group.entries.is_empty() {
            match self.log.append(&group.entries) {
                Ok(first) => {
                    self.stats.commit_seconds.observe(started.elapsed().as_secs_f64());
                    self.appended(first, &mut group, &events, own);
                }
                Err(error) => self.refused(&error, &mut group),
            }
        }
        acknowledge(&mut group);
        if let Some(now) = group.tick {
            self.keep_house(now);
        }
        for flush in group.flushes.drain(..) {
            let _ = flush.send(());
        }
    }

    /// The events of every entry. An entry that cannot be read leaves the group, and so does what follows it in its chain.
    fn read_events<'t>(&mut self, texts: &'t [Option<Lines>], group: &mut Group) -> Vec<Vec<EventRef<'t>>> {
        let mut broken: HashMap<Chain, Fault> = HashMap::new();
        let mut events = Vec::with_capacity(texts.len());
        let mut texts = texts.iter();
        group.entries.retain(|entry| {
            let chain = (entry.agent.clone(), entry.link.epoch());
            let text = texts.next().and_then(Option::as_ref);
            match text.map_or_else(|| Ok(Vec::new()), Lines::events) {
                Ok(read) if !broken.contains_key(&chain) => events.push(read),
                Ok(_) => return false,
                Err(error) => {
                    broken.entry(chain).or_insert(Fault::Malformed(error.to_string()));
                    return false;
                }
            }
            true
        });
        for (chain, fault) in broken {
            // What of the chain stays in the group will be in the log, which then knows how far it goes.
            group.cursors.remove(&chain);
            self.cursors.remove(&chain);
            fail(group, |waiting| waiting.chain == chain, &fault);
        }
        events
    }

    /// Makes a link of the own events that wait; how many of them.
    fn seal_own(&mut self, group: &mut Group) -> usize {
        let count = self.own_pending.len().min(MAX_EVENTS);
        let (Some(last), chain) = (self.own_pending.back(), (self.own.clone(), self.own_epoch)) else { return 0 };
        let received = last.at_us;
        let mut events: Vec<Event> = self.own_pending.iter().take(count).cloned().collect();
        let sealed = self.cursor(&chain, group).map_err(|e| e.to_string()).and_then(|cursor| {
            Batch::seal(self.own_epoch, cursor.seq + 1, cursor.hash, &mut events).map_err(|e| e.to_string())
        });
        match sealed.and_then(|batch| batch.open().map(|text| (batch, text)).map_err(|e| e.to_string())) {
            Ok((batch, text)) => {
                let link = Link::Batch(batch);
                group.cursors.insert(chain, Cursor { seq: link.last_seq(), hash: link.hash() });
                group.entries.push(Entry { agent: self.own.clone(), received, link });
                group.texts.push(Some(text));
                count
            }
            Err(error) => {
                tracing::error!(error, count, "own events could not be sealed");
                0
            }
        }
    }

    fn appended(&mut self, first: u64, group: &mut Group, events: &[Vec<EventRef<'_>>], own: usize) {
        self.cursors.extend(group.cursors.drain());
        self.own_pending.drain(..own);
        // The acknowledgement comes first: it waits for the disk and for nothing else.
        acknowledge(group);
        if self.stats.store_up.get() == 0 {
            tracing::info!("the store takes events again");
            self.stats.store_up.set(1);
        }
        let stored: Vec<Stored> =
            (first..).zip(group.entries.drain(..)).map(|(position, entry)| Stored { position, entry }).collect();
        self.tell(&stored, events);
    }

    /// State, then index, then listeners: who is told of an event finds it in both.
    fn tell(&mut self, stored: &[Stored], events: &[Vec<EventRef<'_>>]) {
        {
            let mut state = self.state.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            stored.iter().zip(events).for_each(|(stored, events)| apply(&mut state, stored, events));
        }
        let indexed: Vec<_> = stored.iter().zip(events).map(|(stored, events)| Indexed { stored, events }).collect();
        self.index(&indexed);
        self.stats.links.inc_by(stored.len() as u64);
        self.stats.events.inc_by(events.iter().map(|e| e.len() as u64).sum());
        for (stored, events) in stored.iter().zip(events) {
            if self.listeners.receiver_count() > 0 {
                let _ = self.listeners.send(Arc::new(committed(stored, events)));
            }
        }
    }

    fn index(&mut self, links: &[Indexed<'_>]) {
        let follows = links.first().is_some_and(|l| l.stored.position == self.index.reach() + 1);
        let done = if follows { self.index.apply(links) } else { self.index.catch_up(&*self.log).map(drop) };
        if let Err(error) = done {
            tracing::error!(%error, "the index does not take events; it catches up when it can");
        }
    }

    fn refused(&mut self, error: &LogError, group: &mut Group) {
        self.stats.failures.inc();
        if self.stats.store_up.get() == 1 {
            tracing::error!(%error, "the store refuses events: agents keep theirs until it takes them again");
            self.stats.store_up.set(0);
        }
        fail(group, |_| true, &Fault::Store(error.to_string()));
    }

    fn keep_house(&mut self, now: Timestamp) {
        let position = self.state.read().map_or(0, |state| state.position);
        let due = now.since(self.snapshot_at) >= SNAPSHOT_EVERY || position >= self.snapshot_position + SNAPSHOT_LINKS;
        if due && position > self.snapshot_position {
            self.snapshot_at = now;
            self.save_snapshot();
        }
        if let Err(error) = self.retain(now) {
            tracing::error!(%error, "old events could not be removed");
        }
    }

    /// One step of retention a tick, or several while much is over: never so many that agents wait long.
    fn retain(&mut self, now: Timestamp) -> Result<(), LogError> {
        let keep = Keep { before: now.minus(self.keep_for), bytes: self.keep_bytes, up_to: self.snapshot_position };
        let mut gone = 0;
        for _ in 0..16 {
            let step = self.log.trim(keep)?;
            gone += step;
            if step == 0 {
                break;
            }
        }
        let extent = self.log.extent()?;
        self.stats.log_bytes.set(i64::try_from(extent.bytes).unwrap_or(i64::MAX));
        if gone > 0 {
            self.stats.trimmed.inc_by(gone);
            let tail = if extent.tail == 0 { extent.head + 1 } else { extent.tail };
            if let Err(error) = self.index.trim(tail) {
                tracing::error!(%error, "old events could not be removed from the index");
            }
        }
        Ok(())
    }

    fn save_snapshot(&mut self) {
        let (position, bytes) = match self.state.read() {
            Ok(state) => (state.position, serde_json::to_vec(&*state)),
            Err(_) => return,
        };
        let saved = bytes
            .map_err(|e| e.to_string())
            .and_then(|bytes| self.log.save_snapshot(position, &bytes).map_err(|e| e.to_string()));
        match saved {
            Ok(()) => self.snapshot_position = position,
            Err(error) => tracing::error!(error, "the state could not be saved"),
        }
    }
}

enum Judged {
    Next { link: Link, after: Cursor, text: Option<Lines> },
    Known(Cursor),
}

/// Tells every session of the group that its links are on disk.
fn acknowledge(group: &mut Group) {
    for Waiting { progress, then, .. } in group.sessions.drain(..) {
        progress.send_if_modified(|progress| advance(progress, then));
    }
}

/// Tells some sessions of the group that theirs are not.
fn fail(group: &mut Group, which: impl Fn(&Waiting) -> bool, fault: &Fault) {
    for Waiting { progress, .. } in group.sessions.extract_if(.., |waiting| which(waiting)) {
        progress.send_replace(Progress::Failed(fault.clone()));
    }
}

fn advance(progress: &mut Progress, to: Cursor) -> bool {
    match progress {
        Progress::Committed(at) if at.seq < to.seq => {
            *at = to;
            true
        }
        _ => false,
    }
}

fn committed(stored: &Stored, events: &[EventRef<'_>]) -> Committed {
    let entry = &stored.entry;
    let what = match &entry.link {
        Link::Batch(_) => What::Events(events.iter().map(EventRef::to_owned).collect()),
        Link::Tombstone(tombstone) => What::Lost(tombstone.clone()),
    };
    Committed {
        position: stored.position,
        agent: entry.agent.clone(),
        epoch: entry.link.epoch(),
        received: entry.received,
        what,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use sidewarden_proto::event::AgentStopping;
    use sidewarden_proto::identity::Sha256;
    use tempfile::TempDir;

    use super::*;
    use crate::log::{Extent, SqliteLog};

    /// A log whose disk can be made full.
    struct Moody {
        log: Box<dyn Log>,
        full: Arc<AtomicBool>,
    }

    impl Log for Moody {
        fn append(&mut self, entries: &[Entry]) -> Result<u64, LogError> {
            if self.full.load(Ordering::SeqCst) { Err(LogError::Full) } else { self.log.append(entries) }
        }
        fn read_from(&self, position: u64, limit: usize) -> Result<Vec<Stored>, LogError> {
            self.log.read_from(position, limit)
        }
        fn cursor(&self, agent: &AgentId, epoch: Epoch) -> Result<Cursor, LogError> {
            self.log.cursor(agent, epoch)
        }
        fn last_epoch(&self, agent: &AgentId) -> Result<Option<Epoch>, LogError> {
            self.log.last_epoch(agent)
        }
        fn extent(&self) -> Result<Extent, LogError> {
            self.log.extent()
        }
        fn trim(&mut self, keep: Keep) -> Result<u64, LogError> {
            self.log.trim(keep)
        }
        fn save_snapshot(&mut self, position: u64, state: &[u8]) -> Result<(), LogError> {
            self.log.save_snapshot(position, state)
        }
        fn snapshot(&self) -> Result<Option<(u64, Vec<u8>)>, LogError> {
            self.log.snapshot()
        }
        fn reader(&self) -> Result<Box<dyn Log>, LogError> {
            self.log.reader()
        }
    }

    struct World {
        dir: TempDir,
        commits: Committer,
        thread: std::thread::JoinHandle<()>,
        full: Arc<AtomicBool>,
    }

    impl World {
        fn new() -> World {
            World::at(tempfile::tempdir().unwrap(), 1 << 30)
        }

        fn at(dir: TempDir, keep_bytes: u64) -> World {
            let full = Arc::new(AtomicBool::new(false));
            let log = Box::new(SqliteLog::open(&dir.path().join("log.db")).unwrap());
            let parts = Parts {
                log: Box::new(Moody { log, full: full.clone() }),
                index: Writer::open(&dir.path().join("index.db")).unwrap(),
                own: "spiffe://x.example/sidewarden/collector#k".parse().unwrap(),
                new_epoch: Epoch([7; 16]),
                keep_for: Duration::from_secs(1000),
                keep_bytes,
            };
            let (commits, thread) = start(parts).unwrap();
            World { dir, commits, thread, full }
        }

        fn end(self) -> TempDir {
            drop(self.commits);
            self.thread.join().unwrap();
            self.dir
        }

        /// Keeps the thread from finishing its group, so that what is given meanwhile forms one group.
        fn hold(&self) -> RwLockReadGuard<'_, State> {
            self.commits.queue.try_send(Request::Own(event("first"))).unwrap();
            self.commits.state()
        }

        async fn give(&self, agent: &str, link: Link) -> watch::Receiver<Progress> {
            let (progress, heard) = watch::channel(Progress::Committed(Cursor::START));
            self.give_with(agent, link, &progress).await;
            heard
        }

        async fn give_with(&self, agent: &str, link: Link, progress: &watch::Sender<Progress>) {
            self.commits.link(agent_id(agent), Timestamp::from_secs(5), link, progress.clone()).await.unwrap();
        }

        fn log(&self) -> Vec<Stored> {
            SqliteLog::open(&self.dir.path().join("log.db")).unwrap().read_from(0, usize::MAX).unwrap()
        }
    }

    fn agent_id(name: &str) -> Arc<AgentId> {
        Arc::new(format!("spiffe://x.example/shop/{name}#c1").parse().unwrap())
    }

    fn event(summary: &str) -> Event {
        let body = Body::from(AgentStopping { reason: "x".into() });
        Event::new(Timestamp::from_secs(5), Severity::Info, summary, &body)
    }

    fn links(count: usize) -> Vec<Link> {
        let mut at = Cursor::START;
        let next = |_| {
            let link = Link::Batch(Batch::seal(Epoch([1; 16]), at.seq + 1, at.hash, &mut [event("x")]).unwrap());
            at = Cursor { seq: link.last_seq(), hash: link.hash() };
            link
        };
        (0..count).map(next).collect()
    }

    fn seq(progress: &watch::Receiver<Progress>) -> Option<u64> {
        match &*progress.borrow() {
            Progress::Committed(cursor) => Some(cursor.seq),
            Progress::Failed(_) => None,
        }
    }

    #[tokio::test]
    async fn a_link_that_comes_twice_is_stored_once_and_acknowledged_twice() {
        let (world, links) = (World::new(), links(2));
        for _ in 0..3 {
            let first = world.give("web", links[0].clone()).await;
            let second = world.give("web", links[1].clone()).await;
            world.commits.flush().await.unwrap();
            assert!(seq(&first) >= Some(1) && seq(&second) == Some(2));
        }
        assert_eq!(world.log().len(), 2);
        world.end();
    }

    #[tokio::test]
    async fn what_does_not_follow_is_refused_with_its_reason() {
        let (world, links) = (World::new(), links(3));
        let gap = world.give("web", links[1].clone()).await;
        let Link::Batch(mut other) = links[0].clone() else { unreachable!() };
        other.header.prev = Sha256([1; 32]);
        let broken = world.give("web", Link::Batch(other.clone())).await;
        other.header.prev = Sha256::ZERO;
        other.body.truncate(3);
        let malformed = world.give("web", Link::Batch(other)).await;
        world.commits.flush().await.unwrap();
        assert_eq!(*gap.borrow(), Progress::Failed(Fault::Gap { after: 0 }));
        assert_eq!(*broken.borrow(), Progress::Failed(Fault::ChainBroken { after: 0 }));
        assert!(matches!(&*malformed.borrow(), Progress::Failed(Fault::Malformed(_))));
        assert!(world.log().is_empty());
        world.end();
    }

    #[tokio::test]
    async fn after_a_failure_nothing_more_of_that_session_is_taken() {
        let (world, links) = (World::new(), links(2));
        let (progress, heard) = watch::channel(Progress::Committed(Cursor::START));
        world.give_with("web", links[1].clone(), &progress).await;
        world.give_with("web", links[0].clone(), &progress).await;
        world.commits.flush().await.unwrap();
        assert_eq!((seq(&heard), world.log().len()), (None, 0));
        world.end();
    }

    #[tokio::test]
    #[expect(
        clippy::await_holding_lock,
        reason = "holding it is how the thread is kept waiting; nothing else runs here"
    )]
    async fn an_unreadable_event_is_refused_with_all_that_follows_and_spares_other_chains() {
        let world = World::new();
        // Sealed by somebody who cannot count: the body's numbers are not those of the header.
        let (good, after) = (links(3), Cursor { seq: 1, hash: links(1)[0].hash() });
        let Ok(mut lying) = Batch::seal(Epoch([1; 16]), 9, after.hash, &mut [event("x")]) else { unreachable!() };
        lying.header.first_seq = 2;
        let follows = Batch::seal(Epoch([1; 16]), 3, lying.hash, &mut [event("x")]).unwrap();
        let hold = world.hold();
        let first = world.give("web", good[0].clone()).await;
        let broken = world.give("web", Link::Batch(lying)).await;
        let next = world.give("web", Link::Batch(follows)).await;
        let other = world.give("db", good[0].clone()).await;
        drop(hold);
        world.commits.flush().await.unwrap();
        assert!(matches!(&*broken.borrow(), Progress::Failed(Fault::Malformed(_))));
        assert_eq!((seq(&next), seq(&other)), (None, Some(1)));
        assert!(seq(&first).is_none_or(|seq| seq == 1), "what it was told is true");
        assert_eq!(world.log().len(), 3, "the first of each chain, and our own");
        let again = world.give("web", good[1].clone()).await;
        world.commits.flush().await.unwrap();
        assert_eq!(seq(&again), Some(2));
        world.end();
    }

    #[tokio::test]
    async fn a_full_disk_acknowledges_nothing_and_loses_nothing() {
        let (world, links) = (World::new(), links(2));
        world.full.store(true, Ordering::SeqCst);
        world.commits.own(event("while the disk is full")).await.unwrap();
        let refused = world.give("web", links[0].clone()).await;
        world.commits.flush().await.unwrap();
        assert!(matches!(&*refused.borrow(), Progress::Failed(Fault::Store(_))));
        assert_eq!((world.commits.stats().store_up.get(), world.commits.state().position), (0, 0));
        world.full.store(false, Ordering::SeqCst);
        let again = world.give("web", links[0].clone()).await;
        world.commits.flush().await.unwrap();
        assert_eq!((seq(&again), world.commits.stats().store_up.get()), (Some(1), 1));
        let own = world.log().into_iter().filter(|s| s.entry.agent.workload.path() == "sidewarden/collector");
        assert_eq!(own.count(), 1, "the collector's own event waited");
        world.end();
    }

    #[tokio::test]
    async fn who_is_told_finds_it_in_state_and_index() {
        let world = World::new();
        let mut listener = world.commits.subscribe();
        world.commits.own(event("hello")).await.unwrap();
        let told = listener.recv().await.unwrap();
        assert_eq!((told.position, told.events()[0].summary.as_str()), (1, "hello"));
        assert_eq!(world.commits.state().position, 1);
        let reader = SqliteLog::open(&world.dir.path().join("log.db")).unwrap().reader().unwrap();
        let index = crate::index::Index::open(&world.dir.path().join("index.db"), reader).unwrap();
        assert_eq!(index.query_now(&Default::default()).unwrap().events.len(), 1);
        world.end();
    }

    #[tokio::test]
    async fn a_slow_listener_is_told_what_it_lost_and_delays_nobody() {
        let world = World::new();
        let mut slow = world.commits.subscribe();
        for link in links(LISTENERS_LAG + 10) {
            world.give("web", link).await;
        }
        world.commits.flush().await.unwrap();
        assert!(matches!(slow.recv().await, Err(broadcast::error::RecvError::Lagged(10))));
        world.end();
    }

    #[tokio::test]
    async fn retention_leaves_state_and_chains_as_they_were() {
        let world = World::at(tempfile::tempdir().unwrap(), 1);
        let links = links(50);
        for link in &links[..49] {
            world.give("web", link.clone()).await;
        }
        world.commits.flush().await.unwrap();
        let before = { world.commits.state().agents[&*agent_id("web")].events };
        for _ in 0..3 {
            world.commits.tick(Timestamp::from_secs(1_000)).await.unwrap();
            world.commits.flush().await.unwrap();
        }
        assert!(world.log().len() <= 3, "{} links are left", world.log().len());
        let world = World::at(world.end(), 1);
        assert_eq!(world.commits.state().agents[&*agent_id("web")].events, before);
        let next = world.give("web", links[49].clone()).await;
        world.commits.flush().await.unwrap();
        assert_eq!(seq(&next), Some(50));
        world.end();
    }

    #[tokio::test]
    async fn a_damaged_link_costs_itself_and_nothing_else() {
        let world = World::new();
        for link in links(5) {
            world.give("web", link).await;
        }
        world.commits.flush().await.unwrap();
        let dir = world.end();
        let db = rusqlite::Connection::open(dir.path().join("log.db")).unwrap();
        db.execute("DELETE FROM snapshot", []).unwrap();
        db.execute("UPDATE link SET bytes = x'00' WHERE position = 1", []).unwrap();
        db.execute("UPDATE link SET bytes = substr(bytes, 1, 110) WHERE position = 4", []).unwrap();
        std::fs::remove_file(dir.path().join("index.db")).unwrap();
        let world = World::at(dir, 1 << 30);
        let web = world.commits.state().agents[&*agent_id("web")].clone();
        assert_eq!((world.commits.state().position, web.events), (5, [3, 0, 0, 0]));
        let reader = SqliteLog::open(&world.dir.path().join("log.db")).unwrap().reader().unwrap();
        let index = crate::index::Index::open(&world.dir.path().join("index.db"), reader).unwrap();
        assert_eq!(index.query_now(&Default::default()).unwrap().events.len(), 3);
        world.end();
    }

    #[tokio::test]
    async fn the_state_is_the_same_from_a_snapshot_and_from_the_whole_log() {
        let world = World::new();
        for link in links(20) {
            world.give("web", link).await;
        }
        world.commits.tick(Timestamp::from_secs(1_000)).await.unwrap();
        world.commits.own(event("after the snapshot")).await.unwrap();
        world.commits.flush().await.unwrap();
        let saved = serde_json::to_value(&*world.commits.state()).unwrap();
        let dir = world.end();
        let db = rusqlite::Connection::open(dir.path().join("log.db")).unwrap();
        for spoil in
            ["UPDATE snapshot SET position = position", "UPDATE snapshot SET state = x'78'", "DELETE FROM snapshot"]
        {
            db.execute(spoil, []).unwrap();
            let log = SqliteLog::open(&dir.path().join("log.db")).unwrap();
            assert_eq!(serde_json::to_value(restore(&log).unwrap().0).unwrap(), saved, "{spoil}");
        }
    }
}
