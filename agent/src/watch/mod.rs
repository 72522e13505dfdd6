//! When to look, and what to tell: a plain thread of its own, so that a stalled disk or network stalls nothing here, and
//! a slow look here stalls no connection.
//!
//! The fork gate is read every tick. When it moved, the processes are looked at; once a second all of them again, since
//! a process can become another program without a fork. Posture is judged at the start, when mounts or containers
//! change, when somebody comes in, and every now and then.

mod differ;
mod gate;
mod mask;
mod sight;
mod tracker;
mod wake;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use sidewarden_proto::event::Event;
use sidewarden_proto::finding::{Finding, Vantage};
use sidewarden_proto::time::Timestamp;
use tokio_util::sync::CancellationToken;

pub use differ::differ;
pub use mask::mask;
pub use tracker::Normal;

use crate::cis::{self, Case, Declared};
use crate::facts::{self, Machine, ProcessId, Role, Subject};
use sight::Sight;
use tracker::Tracker;
use wake::Wake;

/// All processes of the workload are looked at again after this time, forks or not.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Posture is judged at most this often, however often mounts change.
const JUDGE_AT_MOST: Duration = Duration::from_secs(1);

/// What to watch, and how closely.
#[derive(Clone, Debug)]
pub struct WatchConfig {
    /// Where /proc and /sys are: `/`.
    pub root: PathBuf,
    /// The workload.
    pub subject: Subject,
    /// How often the fork gate is read; 50 ms by default.
    pub tick: Duration,
    /// How often posture is judged when nothing seems to change; 30 s by default.
    pub posture_interval: Duration,
    /// What the operator intends.
    pub declared: Declared,
    /// Processes that are no news.
    pub normal: Normal,
}

impl WatchConfig {
    /// The defaults, for `subject` on this machine.
    pub fn new(subject: Subject) -> WatchConfig {
        WatchConfig {
            root: "/".into(),
            subject,
            tick: Duration::from_millis(50),
            posture_interval: Duration::from_secs(30),
            declared: Declared::default(),
            normal: Normal::default(),
        }
    }
}

/// Counters since the start, for metrics.
#[derive(Debug, Default)]
pub struct WatchStats {
    /// Readings of the fork gate.
    pub ticks: AtomicU64,
    /// Looks at the processes.
    pub looks: AtomicU64,
    /// Judgements of the whole posture.
    pub judgements: AtomicU64,
    /// Tasks created in the PID namespace, as far as they can be laid to the workload.
    pub tasks_created: AtomicU64,
    /// Of these, how many were gone before they could be seen.
    pub tasks_missed: AtomicU64,
    /// Tasks created where strangers share the PID namespace, which says nothing about the workload.
    pub tasks_of_strangers: AtomicU64,
    /// Processes that vanished while they were read.
    pub vanished: AtomicU64,
    /// Processes of the workload now.
    pub processes: AtomicU64,
}

/// The posture as it was last judged.
#[derive(Clone, Debug)]
pub struct Posture {
    /// When. The epoch, before the first time.
    pub at: Timestamp,
    /// What the agent was able to see.
    pub vantage: Vantage,
    /// One finding for each check.
    pub findings: Vec<Finding>,
}

/// What others may ask a running watch.
#[derive(Debug)]
pub struct View {
    /// Counters.
    pub stats: WatchStats,
    posture: ArcSwap<Posture>,
    baseline_wanted: AtomicBool,
}

impl View {
    /// The posture as it was last judged.
    pub fn posture(&self) -> Arc<Posture> {
        self.posture.load_full()
    }

    /// Asks for the whole posture as an event, for example after events were lost.
    pub fn want_baseline(&self) {
        self.baseline_wanted.store(true, Relaxed);
    }
}

/// A running watch.
#[derive(Debug)]
pub struct Watch {
    /// What it sees.
    pub view: Arc<View>,
    /// Its thread, which ends soon after the shutdown was asked for.
    pub thread: JoinHandle<()>,
}

impl Watch {
    /// Starts it. `emit` is called on the watch's own thread and must not wait.
    pub fn start(
        config: WatchConfig,
        emit: impl Fn(Event) + Send + 'static,
        shutdown: CancellationToken,
    ) -> std::io::Result<Watch> {
        let posture = Posture { at: Timestamp::default(), vantage: Vantage::Open, findings: Vec::new() };
        let view = Arc::new(View {
            stats: WatchStats::default(),
            posture: ArcSwap::from_pointee(posture),
            baseline_wanted: AtomicBool::new(false),
        });
        let mut watcher = Watcher::new(config, Arc::clone(&view), Box::new(emit));
        let thread = Builder::new().name("watch".into()).spawn(move || watcher.run(&shutdown))?;
        Ok(Watch { view, thread })
    }
}

struct Watcher {
    config: WatchConfig,
    machine: Machine,
    view: Arc<View>,
    emit: Box<dyn Fn(Event) + Send>,
    sight: Sight,
    tracker: Tracker,
    wake: Wake,
    containers: Vec<ProcessId>,
    told: Option<Vec<Finding>>,
    judged: Option<Instant>,
    looked: Option<Instant>,
    judge_soon: bool,
}

impl Watcher {
    fn new(config: WatchConfig, view: Arc<View>, emit: Box<dyn Fn(Event) + Send>) -> Watcher {
        let machine = Machine::new(&config.root);
        Watcher {
            sight: Sight::new(machine.clone(), config.subject.clone()),
            tracker: Tracker::new(config.normal.clone()),
            wake: Wake::default(),
            containers: Vec::new(),
            told: None,
            judged: None,
            looked: None,
            judge_soon: true,
            machine,
            view,
            emit,
            config,
        }
    }

    fn run(&mut self, shutdown: &CancellationToken) {
        while !shutdown.is_cancelled() {
            self.step(Instant::now(), Timestamp::now());
            let woken = self.wake.wait(self.config.tick);
            self.judge_soon |= woken.mounts;
        }
    }

    /// One tick: the gate, a look if it moved or is due, a judgement if there is reason for one.
    fn step(&mut self, now: Instant, at: Timestamp) {
        self.view.stats.ticks.fetch_add(1, Relaxed);
        let due = self.looked.is_none_or(|then| now.duration_since(then) >= LOOK_AGAIN);
        let created = self.sight.created();
        if created.is_some() || due || self.sight.has_young(now) {
            self.look(created, due, now, at);
        }
        for event in self.tracker.tick(at) {
            (self.emit)(event);
        }
        if self.judgement_is_due(now) {
            self.judge(now, at);
        }
    }

    fn look(&mut self, created: Option<gate::Created>, all: bool, now: Instant, at: Timestamp) {
        if all {
            self.looked = Some(now);
        }
        let stats = &self.view.stats;
        stats.looks.fetch_add(1, Relaxed);
        let seen = self.sight.look(created, all, now);
        stats.vanished.fetch_add(seen.vanished, Relaxed);
        stats.processes.store(seen.members.len() as u64, Relaxed);
        if seen.strangers {
            stats.tasks_of_strangers.fetch_add(seen.created, Relaxed);
            self.tracker.lose_track();
        } else {
            stats.tasks_created.fetch_add(seen.created, Relaxed);
            stats.tasks_missed.fetch_add(seen.missed, Relaxed);
            self.tracker.count(seen.created, seen.missed, at);
        }
        let before = self.tracker.history().clone();
        for event in self.tracker.look(&seen.members, at) {
            (self.emit)(event);
        }
        self.judge_soon |= before != *self.tracker.history();
        self.follow(&seen.members);
    }

    /// Asks for notices about other containers when the workload's have changed.
    fn follow(&mut self, members: &[facts::Process]) {
        let firsts = members.iter().filter(|p| p.role == Role::First && !p.is_runtime());
        let containers: Vec<ProcessId> = firsts.map(|p| p.id).collect();
        if containers == self.containers {
            return;
        }
        let anchors: Vec<String> = containers.iter().map(|id| format!("/proc/{}", id.pid)).collect();
        self.wake = Wake::of(&self.machine, &anchors);
        tracing::info!(containers = containers.len(), exec_notices = self.wake.sees_programs(), "workload changed");
        self.containers = containers;
        self.judge_soon = true;
    }

    fn judgement_is_due(&self, now: Instant) -> bool {
        let since = self.judged.map(|then| now.duration_since(then));
        let wanted = self.judge_soon || self.view.baseline_wanted.load(Relaxed);
        let pause = if wanted { JUDGE_AT_MOST } else { self.config.posture_interval };
        since.is_none_or(|since| since >= pause)
    }

    fn judge(&mut self, now: Instant, at: Timestamp) {
        self.judged = Some(now);
        self.judge_soon = false;
        self.view.stats.judgements.fetch_add(1, Relaxed);
        let facts = facts::observe(&self.config.root, &self.config.subject);
        let case = Case { facts: &facts, declared: &self.config.declared, history: self.tracker.history() };
        let findings = cis::judge_all(&case);
        let baseline = self.view.baseline_wanted.swap(false, Relaxed);
        let then = self.told.as_deref().filter(|_| !baseline);
        for event in differ(then, &findings, at) {
            (self.emit)(event);
        }
        self.view.posture.store(Arc::new(Posture { at, vantage: facts.vantage, findings: findings.clone() }));
        self.told = Some(findings);
    }
}
