//! When to look, and what to tell: a plain thread of its own, so that a stalled disk or network stalls nothing here, and
//! a slow look here stalls no connection.
//!
//! The fork gate is read every tick. When it moved, the processes are looked at; once a second all of them again, since
//! a process can become another program without a fork, and all listeners with them. Posture is judged at the start, when
//! mounts, containers or listeners change, when somebody comes in, and every now and then.

mod differ;
mod exposure;
mod gate;
mod guard;
mod mask;
mod probe;
mod sight;
mod tracker;
mod wake;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use sidewarden_proto::backoff::{self, Random};
use sidewarden_proto::event::Event;
use sidewarden_proto::finding::{Finding, Vantage};
use sidewarden_proto::time::Timestamp;
use tokio_util::sync::CancellationToken;

pub use differ::{Origin, differ, differ_container};
pub use mask::{mask, plain};
pub use tracker::Normal;
pub(crate) use tracker::SHELLS;

use crate::cis::{self, Case, Declared};
use crate::facts::{self, Listener, ListenerSight, Lock, Machine, Process, ProcessId, Role, Seen, Subject};
use crate::intercept::Ruleset;
use exposure::Exposures;
use guard::Guard;
use probe::Prober;
use sight::Sight;
use tracker::Tracker;
use wake::Wake;

/// All processes of the workload are looked at again after this time, forks or not.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Posture is judged at most this often, however often mounts change.
const JUDGE_AT_MOST: Duration = Duration::from_secs(1);

/// A workload that is gone for less than this was restarted. Only then its posture is told to be unknown.
const GONE_AFTER: Duration = Duration::from_secs(5);

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
    /// The packet rules that should be in force.
    pub intercept: Option<Ruleset>,
    /// Randomness.
    pub random: Random,
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
            intercept: None,
            random: backoff::random,
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
    /// Listeners that can be reached without TLS now, and are not declared.
    pub exposed: AtomicU64,
    /// Those that are.
    pub declared: AtomicU64,
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
    interception: ArcSwapOption<String>,
    baseline_wanted: AtomicBool,
}

impl View {
    pub(crate) fn new() -> View {
        let posture = Posture { at: Timestamp::default(), vantage: Vantage::Open, findings: Vec::new() };
        View {
            stats: WatchStats::default(),
            posture: ArcSwap::from_pointee(posture),
            interception: ArcSwapOption::empty(),
            baseline_wanted: AtomicBool::new(false),
        }
    }

    /// What is wrong with the packet rules that should be in force, if anything is.
    pub fn interception_trouble(&self) -> Option<Arc<String>> {
        self.interception.load_full()
    }

    /// The posture as it was last judged.
    pub fn posture(&self) -> Arc<Posture> {
        self.posture.load_full()
    }

    /// Whether the whole posture was asked for since this was last called.
    pub(crate) fn take_baseline_wanted(&self) -> bool {
        self.baseline_wanted.swap(false, Relaxed)
    }

    pub(crate) fn set_posture(&self, posture: Posture) {
        self.posture.store(Arc::new(posture));
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
        let view = Arc::new(View::new());
        let prober = Prober::start(config.random, shutdown.clone())?;
        let mut watcher = Watcher::new(config, Arc::clone(&view), Box::new(emit));
        watcher.prober = Some(prober);
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
    listening: ListenerSight,
    exposures: Exposures,
    /// `None` where nobody is asked anything, in tests.
    prober: Option<Prober>,
    guard: Option<Guard>,
    listeners: Vec<Listener>,
    members: Vec<Process>,
    wake: Wake,
    containers: Vec<ProcessId>,
    lived: Vec<ProcessId>,
    told: Option<Vec<Finding>>,
    told_of_somebody: bool,
    origin: Origin,
    nobody_since: Option<Instant>,
    judged: Option<Instant>,
    looked: Option<Instant>,
    judge_soon: bool,
}

impl Watcher {
    fn new(config: WatchConfig, view: Arc<View>, emit: Box<dyn Fn(Event) + Send>) -> Watcher {
        let machine = Machine::new(&config.root);
        Watcher {
            sight: Sight::new(machine.clone(), config.subject.clone()),
            tracker: Tracker::new(Normal { root_execs: config.declared.root_execs.clone(), ..config.normal.clone() }),
            listening: ListenerSight::new(machine.clone()),
            exposures: Exposures::new(config.random),
            prober: None,
            guard: config.intercept.clone().map(Guard::new),
            listeners: Vec::new(),
            members: Vec::new(),
            wake: Wake::default(),
            containers: Vec::new(),
            lived: Vec::new(),
            told: None,
            told_of_somebody: false,
            origin: Origin::default(),
            nobody_since: None,
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
        if self.take_answers(now) || due {
            self.listen(due, now, at);
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
        self.follow(&seen.members, now);
        let before = self.tracker.history().clone();
        for event in self.tracker.look(&seen.members, at) {
            (self.emit)(event);
        }
        self.judge_soon |= before != *self.tracker.history();
        self.members = seen.members;
    }

    /// Whether somebody who was asked has answered.
    fn take_answers(&mut self, now: Instant) -> bool {
        let answers: Vec<_> = self.prober.iter().flat_map(Prober::answers).collect();
        let any = !answers.is_empty();
        answers.into_iter().for_each(|(key, speech)| self.exposures.answered(key, speech, now));
        self.judge_soon |= any;
        any
    }

    /// Looks at what can be reached, has new listeners asked, and tells what changed. Between two looks, when an answer has
    /// come, those of the last one are gone through again.
    fn listen(&mut self, anew: bool, now: Instant, at: Timestamp) {
        if anew {
            self.guard_rules(now, at);
            let Seen::Known(listeners, _) = self.listening.look(&self.members) else { return };
            let places = |all: &[Listener]| all.iter().map(|l| (l.protocol, l.address)).collect::<Vec<_>>();
            self.judge_soon |= places(&listeners) != places(&self.listeners);
            self.listeners = listeners;
        }
        let (declared, lock) = (&self.config.declared, self.lock());
        for event in self.exposures.look(&self.listeners, declared, lock, now, at) {
            (self.emit)(event);
        }
        let (exposed, declared_so) = self.exposures.told();
        self.view.stats.exposed.store(exposed, Relaxed);
        self.view.stats.declared.store(declared_so, Relaxed);
        let Some(prober) = &self.prober else { return };
        for listener in self.exposures.due(now, declared, lock) {
            let key = (listener.protocol, listener.address);
            if !prober.ask(listener) {
                self.exposures.not_asked(key, now);
            }
        }
    }

    /// Whether the rules that should be in force are, and nobody can get past them.
    fn guard_rules(&mut self, now: Instant, at: Timestamp) {
        let Some(guard) = &mut self.guard else { return };
        let before = guard.lock();
        if let Some(event) = guard.look(&self.members, now, at) {
            (self.emit)(event);
        }
        self.judge_soon |= before != guard.lock();
        self.view.interception.store(guard.trouble().map(|why| Arc::new(why.join("; "))));
    }

    fn lock(&self) -> Lock {
        self.guard.as_ref().map_or(Lock::Off, Guard::lock)
    }

    /// Whether the workload is gone for a moment, as it is in a restart and before its first start.
    fn is_between_lives(&self, now: Instant) -> bool {
        let news = self.told_of_somebody || self.told.is_none();
        news && self.nobody_since.is_some_and(|since| now.duration_since(since) < GONE_AFTER)
    }

    /// Asks for notices about other containers when the workload's have changed.
    fn follow(&mut self, members: &[facts::Process], now: Instant) {
        let firsts = members.iter().filter(|p| p.role == Role::First && !p.is_runtime());
        let containers: Vec<ProcessId> = firsts.map(|p| p.id).collect();
        self.nobody_since = if containers.is_empty() { self.nobody_since.or(Some(now)) } else { None };
        if containers == self.containers {
            return;
        }
        if !containers.is_empty() {
            // Nothing of the containers there were before is left: they were started anew.
            let anew = !self.lived.is_empty() && !containers.iter().any(|id| self.lived.contains(id));
            self.lived.clone_from(&containers);
            if anew {
                self.tracker.begin_anew();
            }
        }
        let anchors: Vec<String> = containers.iter().map(|id| format!("/proc/{}", id.pid)).collect();
        self.wake = Wake::of(&self.machine, &anchors);
        tracing::info!(containers = containers.len(), exec_notices = self.wake.sees_programs(), "workload changed");
        self.containers = containers;
        self.judge_soon = true;
    }

    fn judgement_is_due(&self, now: Instant) -> bool {
        let early = || self.exposures.is_asking(now, &self.config.declared, self.lock());
        if self.is_between_lives(now) || (self.judged.is_none() && early()) {
            return false;
        }
        let since = self.judged.map(|then| now.duration_since(then));
        let wanted = self.judge_soon || self.view.baseline_wanted.load(Relaxed);
        let pause = if wanted { JUDGE_AT_MOST } else { self.config.posture_interval };
        since.is_none_or(|since| since >= pause)
    }

    fn judge(&mut self, now: Instant, at: Timestamp) {
        self.judged = Some(now);
        self.judge_soon = false;
        self.view.stats.judgements.fetch_add(1, Relaxed);
        let mut facts = facts::observe(&self.config.root, &self.config.subject, &mut self.listening);
        facts.lock = self.lock();
        if let Seen::Known(listeners, _) = &mut facts.listeners {
            self.exposures.annotate(listeners);
        }
        let (declared, history) = (&self.config.declared, self.tracker.history());
        let case = Case { facts: &facts, declared, history, now: at };
        let findings = cis::judge_all(&case);
        let wanted = self.view.baseline_wanted.swap(false, Relaxed);
        if wanted {
            self.exposures.want_baseline();
            self.guard.iter_mut().for_each(Guard::tell_anew);
        }
        // Somebody came or went: one event with everything, instead of one for each check.
        let somebody = !facts.containers.is_empty();
        let mut ids: Vec<String> = facts.containers.iter().filter_map(facts::host::container_id).collect();
        ids.sort();
        let origin = Origin { host: facts::host::name_of_host(&self.machine), containers: ids };
        let moved = somebody && origin != self.origin;
        let baseline = wanted || somebody != self.told_of_somebody || moved;
        self.told_of_somebody = somebody;
        let then = self.told.as_deref().filter(|_| !baseline);
        if somebody {
            self.origin = origin.clone();
        }
        for event in differ(then, &findings, &origin, at) {
            (self.emit)(event);
        }
        self.view.posture.store(Arc::new(Posture { at, vantage: facts.vantage, findings: findings.clone() }));
        self.told = Some(findings);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::sync::mpsc;

    use sidewarden_proto::event::Mode;

    use super::*;

    const STATUS: &str = "State:\tS\nTgid:\t1\nPid:\t1\nPPid:\t0\nTracerPid:\t0\nUid:\t7 7 7 7\nGid:\t7 7 7 7\n\
        FDSize:\t64\nGroups:\t\nThreads:\t1\nSigQ:\t0/9\nSigPnd:\t0\nShdPnd:\t0\nSigBlk:\t0\nSigIgn:\t0\nSigCgt:\t0\n\
        CapInh:\t0\nCapPrm:\t0\nCapEff:\t0\nCapBnd:\t0\nNoNewPrivs:\t1\nSeccomp:\t2\n";

    /// A made-up machine, a watch of it, and its events.
    struct Rig {
        root: tempfile::TempDir,
        watcher: Watcher,
        events: mpsc::Receiver<Event>,
        begun: Instant,
    }

    impl Rig {
        fn new() -> Rig {
            let root = tempfile::tempdir().unwrap();
            put(root.path(), "proc/loadavg", "0.1 0.1 0.1 1/9 20");
            put(root.path(), "net-dev", "");
            process(root.path(), 9, 0, "agent", "/us");
            std::os::unix::fs::symlink("9", root.path().join("proc/self")).unwrap();
            let (sender, events) = mpsc::channel();
            let view = Arc::new(View::new());
            let config = WatchConfig {
                root: root.path().into(),
                ..WatchConfig::new(Subject { mode: Mode::Sidecar, cgroup: None })
            };
            let watcher = Watcher::new(config, view, Box::new(move |e| sender.send(e).unwrap()));
            Rig { root, watcher, events, begun: Instant::now() }
        }

        fn start(&self, pid: i32, ppid: i32, name: &str) {
            process(self.root.path(), pid, ppid, name, "/w");
        }

        fn stop(&self, pid: i32) {
            fs::remove_dir_all(self.root.path().join(format!("proc/{pid}"))).unwrap();
        }

        /// One tick, `ms` after the beginning; the kinds of its events.
        fn step(&mut self, ms: u64, last_pid: u32) -> Vec<String> {
            put(self.root.path(), "proc/loadavg", &format!("0.1 0.1 0.1 1/9 {last_pid}"));
            let now = self.begun + Duration::from_millis(ms);
            self.watcher.step(now, Timestamp(i64::try_from(ms).unwrap() * 1000));
            self.events.try_iter().map(|e| e.kind.into_owned()).collect()
        }
    }

    fn put(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn process(root: &Path, pid: i32, ppid: i32, name: &str, cgroup: &str) {
        let at = format!("proc/{pid}");
        put(
            root,
            &format!("{at}/stat"),
            &format!("{pid} ({name}) S {ppid} {pid} {pid} 0 0 0 0 0 0 0 0 0 0 0 20 0 1 0 {pid} 0"),
        );
        put(root, &format!("{at}/status"), &format!("Name:\t{name}\n{STATUS}"));
        put(root, &format!("{at}/cgroup"), &format!("0::{cgroup}\n"));
        put(root, &format!("{at}/cmdline"), &format!("{name}\0"));
        fs::create_dir_all(root.join(format!("{at}/net"))).unwrap();
        fs::hard_link(root.join("net-dev"), root.join(format!("{at}/net/dev"))).unwrap();
    }

    #[test]
    fn a_shell_is_told_at_the_tick_after_its_fork_and_the_missed_are_counted() {
        let mut rig = Rig::new();
        rig.start(1, 0, "nginx");
        assert_eq!(rig.step(0, 20), ["posture.baseline"]);
        assert!(rig.step(1500, 20).is_empty());
        rig.start(23, 1, "sh");
        assert_eq!(rig.step(1550, 23), ["process.shell"]);
        let stats = &rig.watcher.view.stats;
        assert_eq!((stats.tasks_created.load(Relaxed), stats.tasks_missed.load(Relaxed)), (3, 2));
        assert!(rig.step(12_000, 23).contains(&"process.missed".to_owned()));
    }

    #[test]
    fn a_still_gate_costs_no_look() {
        let mut rig = Rig::new();
        rig.start(1, 0, "nginx");
        rig.step(0, 20);
        rig.step(2000, 20);
        let before = rig.watcher.view.stats.looks.load(Relaxed);
        for ms in (2050..2950).step_by(50) {
            rig.step(ms, 20);
        }
        assert_eq!(rig.watcher.view.stats.looks.load(Relaxed), before);
    }

    #[test]
    fn a_restart_is_no_storm_of_verdicts_and_a_workload_that_stays_away_is_told_once() {
        let mut rig = Rig::new();
        assert!(rig.step(0, 20).is_empty(), "the workload may still be starting");
        rig.start(21, 0, "nginx");
        assert_eq!(rig.step(1000, 21), ["posture.baseline"]);
        rig.stop(21);
        assert!(rig.step(3000, 21).is_empty());
        rig.start(30, 0, "nginx");
        assert!(rig.step(4000, 30).iter().all(|kind| kind == "process.missed"));
        rig.stop(30);
        rig.step(6000, 30);
        assert_eq!(rig.step(20_000, 30).iter().filter(|k| *k == "posture.baseline").count(), 1);
        assert!(rig.watcher.view.posture().findings.iter().all(|f| f.verdict.word() == "unknown"));
    }

    #[test]
    fn a_baseline_comes_when_it_is_asked_for() {
        let mut rig = Rig::new();
        rig.start(1, 0, "nginx");
        rig.step(0, 20);
        assert!(rig.step(1100, 20).is_empty());
        rig.watcher.view.want_baseline();
        assert_eq!(rig.step(2200, 20), ["posture.baseline"]);
    }

    #[test]
    fn a_pid_used_again_is_another_process() {
        let mut rig = Rig::new();
        rig.start(1, 0, "nginx");
        rig.start(300, 1, "worker");
        rig.step(0, 32766);
        rig.step(2000, 32766);
        rig.stop(300);
        rig.start(300, 1, "sh");
        put(rig.root.path(), "proc/300/stat", "300 (sh) S 1 1 1 0 0 0 0 0 0 0 0 0 0 0 20 0 1 0 9999 0");
        assert_eq!(rig.step(2050, 300), ["process.shell"]);
    }

    #[test]
    fn the_thread_ends_when_it_is_told_to() {
        let shutdown = CancellationToken::new();
        let root = tempfile::tempdir().unwrap();
        let config = WatchConfig {
            root: root.path().into(),
            tick: Duration::from_millis(1),
            ..WatchConfig::new(Subject { mode: Mode::Sidecar, cgroup: None })
        };
        let watch = Watch::start(config, |_| {}, shutdown.clone()).unwrap();
        shutdown.cancel();
        watch.thread.join().unwrap();
    }
}
