//! What the workload's processes did since the last look, as events. Pure: processes and the time in, events out.
//!
//! Three things are told: somebody came in from outside, the workload started a shell, tasks lived too briefly to be
//! seen. Nothing is learnt silently: what is normal (a health check, an entry point that starts shells) is declared.

use std::collections::BTreeMap;
use std::time::Duration;

use sidewarden_proto::event::{Body, Event, ProcessEntered, ProcessInfo, ProcessMissed, ProcessShell, Severity};
use sidewarden_proto::time::Timestamp;

use super::{mask, plain};
use crate::cis::{History, RootExec};
use crate::facts::parse::capability_names;
use crate::facts::{Process, ProcessId, Role, containers};

/// Missed tasks are told once in this time.
const MISSED_WINDOW: Duration = Duration::from_secs(10);

/// Shells of the same kind from the same program are told once in this time, the others counted.
const SHELL_WINDOW: Duration = Duration::from_secs(60);

/// So many kinds of shell bursts are kept apart; further ones are told one by one.
const MAX_BURSTS: usize = 64;

/// How long a runtime that has just come in may take to become what it was asked to run. Until then its user and
/// capabilities are its own.
const RUNTIME_GRACE: Duration = Duration::from_secs(2);

/// Names of shells.
pub(crate) const SHELLS: [&str; 8] = ["sh", "bash", "dash", "ash", "zsh", "ksh", "mksh", "fish"];

/// Programs that are PID 1 only to start and reap the real first process.
const INITS: [&str; 6] = ["docker-init", "tini", "dumb-init", "catatonit", "s6-svscan", "pause"];

/// What the operator has declared to be normal, as beginnings of command lines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Normal {
    /// Health checks, which come in from outside as `docker exec` does.
    pub healthchecks: Vec<String>,
    /// Shells that the workload starts by design.
    pub shells: Vec<String>,
    /// Who may come in as root.
    pub root_execs: Vec<RootExec>,
}

/// The workload's processes by PID.
type Family<'a> = BTreeMap<i32, &'a Process>;

/// What was told about each process of the workload, and what is still to be told.
#[derive(Debug)]
pub struct Tracker {
    normal: Normal,
    known: BTreeMap<ProcessId, Known>,
    bursts: BTreeMap<(String, String), Burst>,
    missed: Missed,
    history: History,
    started: bool,
}

#[derive(Debug)]
struct Known {
    process: Process,
    since: Timestamp,
    entry_told: bool,
    shell_told: bool,
}

#[derive(Debug)]
struct Burst {
    since: Timestamp,
    more: u64,
    last: ProcessInfo,
}

#[derive(Debug, Default)]
struct Missed {
    since: Option<Timestamp>,
    created: u64,
    missed: u64,
}

impl Tracker {
    /// A tracker that has seen nothing yet.
    pub fn new(normal: Normal) -> Tracker {
        let history = History { unbroken: true, ..History::default() };
        Tracker {
            normal,
            known: BTreeMap::new(),
            bursts: BTreeMap::new(),
            missed: Missed::default(),
            history,
            started: false,
        }
    }

    /// What checks may know of the past.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// From now on it cannot be said that everything was seen.
    pub fn lose_track(&mut self) {
        self.history.unbroken = false;
    }

    /// The container was started anew: nobody has come into this one yet, and it was watched from its beginning.
    pub fn begin_anew(&mut self) {
        self.history = History { unbroken: true, ..History::default() };
    }

    /// Compares the workload's processes, each with its role, with the last look.
    pub fn look(&mut self, members: &[Process], at: Timestamp) -> Vec<Event> {
        let mut events = self.forget(members, at);
        let family: Family<'_> = members.iter().map(|p| (p.id.pid, p)).collect();
        for group in containers(members) {
            let first = group.iter().find(|p| p.role == Role::First).copied();
            for p in &group {
                self.note(p, at);
                events.extend(self.entered(p, first, &family, at));
                events.extend(self.shell(p, &family, at));
            }
        }
        self.started = true;
        events
    }

    /// Counts tasks that were created, of which `missed` were gone before they could be seen.
    pub fn count(&mut self, created: u64, missed: u64, at: Timestamp) {
        self.missed.since.get_or_insert(at);
        self.missed.created += created;
        self.missed.missed += missed;
        if missed > 0 {
            self.history.unbroken = false;
        }
    }

    /// What a window that has come to its end has to tell.
    pub fn tick(&mut self, at: Timestamp) -> Vec<Event> {
        let mut events = Vec::new();
        if self.missed.since.is_some_and(|since| at.since(since) >= MISSED_WINDOW) {
            events.extend(std::mem::take(&mut self.missed).told(at));
        }
        let over = |burst: &Burst| at.since(burst.since) >= SHELL_WINDOW;
        let ended: Vec<_> = self.bursts.iter().filter(|(_, b)| over(b)).map(|(key, _)| key.clone()).collect();
        for key in ended {
            let Some(burst) = self.bursts.remove(&key) else { continue };
            if burst.more > 0 {
                let summary = format!(
                    "{} started {} more shells ({}), the last: {}",
                    key.0, burst.more, key.1, burst.last.command
                );
                events.push(Event::new(
                    at,
                    Severity::Warning,
                    summary,
                    &Body::from(ProcessShell { process: burst.last }),
                ));
            }
        }
        events
    }

    fn note(&mut self, p: &Process, at: Timestamp) {
        let fresh = || Known { process: p.clone(), since: at, entry_told: false, shell_told: false };
        let known = self.known.entry(p.id).or_insert_with(fresh);
        // A zombie keeps its name, and nothing else that is worth to be remembered.
        if !p.zombie {
            known.process.clone_from(p);
        }
    }

    /// Processes that are gone. One that came in and never showed what it was is told all the same.
    fn forget(&mut self, members: &[Process], at: Timestamp) -> Vec<Event> {
        let present: std::collections::BTreeSet<ProcessId> = members.iter().map(|p| p.id).collect();
        let gone: Vec<ProcessId> = self.known.keys().filter(|id| !present.contains(id)).copied().collect();
        let mut events = Vec::new();
        for known in gone.iter().filter_map(|id| self.known.remove(id)) {
            if known.process.is_runtime() && known.process.role == Role::Entered && !known.entry_told {
                let what = format!(
                    "somebody came into the container and was gone before its command could be read ({})",
                    info(&known.process, "").command
                );
                let process = info(&known.process, "");
                let body = ProcessEntered { process, as_root: false, privileged: false, declared: String::new() };
                self.history.unbroken = false;
                // It may have been a declared health check that was over quickly.
                let severity = if self.normal.healthchecks.is_empty() { Severity::Warning } else { Severity::Notice };
                events.push(Event::new(at, severity, what, &Body::from(body)));
            }
        }
        events
    }

    fn entered(&mut self, p: &Process, first: Option<&Process>, family: &Family<'_>, at: Timestamp) -> Option<Event> {
        let from_entered = family.get(&p.ppid).is_some_and(|parent| parent.role == Role::Entered);
        let known = self.known.get_mut(&p.id)?;
        let waiting = p.is_runtime() && at.since(known.since) < RUNTIME_GRACE;
        if p.role != Role::Entered || from_entered || known.entry_told || waiting || p.zombie {
            return None;
        }
        known.entry_told = true;
        let as_root = p.is_root() && !first.is_some_and(Process::is_root);
        let more = p.cap_bounding & !first.map_or(p.cap_bounding, |f| f.cap_bounding);
        let privileged = more != 0;
        let is_healthcheck = begins_with_one_of(&p.command(), &self.normal.healthchecks);
        if is_healthcheck && !as_root && !privileged {
            return None;
        }
        Some(self.tell_entry(p, as_root, more, at))
    }

    fn tell_entry(&mut self, p: &Process, as_root: bool, more: u64, at: Timestamp) -> Event {
        let process = info(p, "");
        // Who has more capabilities than the workload is nobody's intent.
        let declared = RootExec::reason(&self.normal.root_execs, "", &p.command()).filter(|_| as_root && more == 0);
        let declared = declared.unwrap_or_default().to_owned();
        let how = match (as_root, more != 0) {
            (true, true) => format!(" AS ROOT and with {} that the workload does not have", short_list(more)),
            (true, false) if !declared.is_empty() => format!(" as root, which is declared ({})", plain(&declared)),
            (true, false) => " AS ROOT".into(),
            (false, true) => format!(" with {} that the workload does not have", short_list(more)),
            (false, false) => String::new(),
        };
        let summary =
            format!("somebody came into the container{how}: {} (pid {}, uid {})", process.command, p.id.pid, p.uids[0]);
        let seen = format!("{at}: {} (pid {}, uid {})", process.command, p.id.pid, p.uids[0]);
        match (as_root, declared.is_empty()) {
            (true, true) => self.history.entered_root = Some(seen.clone()),
            (true, false) => self.history.declared_root = Some(format!("{seen}: declared, {declared}")),
            (false, _) => {}
        }
        if more != 0 {
            self.history.entered_privileged = Some(seen);
        }
        let severity = match as_root || more != 0 {
            _ if !declared.is_empty() => Severity::Notice,
            true => Severity::Critical,
            false => Severity::Warning,
        };
        Event::new(
            at,
            severity,
            summary,
            &Body::from(ProcessEntered { process, as_root, privileged: more != 0, declared }),
        )
    }

    fn shell(&mut self, p: &Process, family: &Family<'_>, at: Timestamp) -> Option<Event> {
        let known = self.known.get_mut(&p.id)?;
        let parent = family.get(&p.ppid).copied();
        if p.role != Role::Inside || known.shell_told || !is_shell(p) || is_fork(p, parent) {
            return None;
        }
        known.shell_told = true;
        let normal = begins_with_one_of(&p.command(), &self.normal.shells)
            || is_entry_point(p, parent, family)
            || parent.is_some_and(|q| is_script(q, family));
        if normal || !self.started {
            return None;
        }
        let parent = parent.map_or("an ended process", |q| q.name.as_str());
        self.tell_shell(info(p, parent), at)
    }

    /// The first shell of a burst is told at once, the rest is counted.
    fn tell_shell(&mut self, process: ProcessInfo, at: Timestamp) -> Option<Event> {
        let key = (process.parent.clone(), process.name.clone());
        if let Some(burst) = self.bursts.get_mut(&key) {
            burst.more += 1;
            burst.last = process;
            return None;
        }
        let summary = format!(
            "{} started a shell: {} (pid {}, uid {})",
            process.parent, process.command, process.pid, process.uid
        );
        if self.bursts.len() < MAX_BURSTS {
            self.bursts.insert(key, Burst { since: at, more: 0, last: process.clone() });
        }
        Some(Event::new(at, Severity::Warning, summary, &Body::from(ProcessShell { process })))
    }
}

impl Missed {
    fn told(self, at: Timestamp) -> Option<Event> {
        let window_secs = u32::try_from(at.since(self.since?).as_secs()).unwrap_or(u32::MAX);
        let body = ProcessMissed { missed: self.missed, created: self.created, window_secs };
        let summary = format!(
            "{} of {} tasks created in {window_secs} s were gone before they could be seen",
            self.missed, self.created
        );
        (self.missed > 0).then(|| Event::new(at, Severity::Notice, summary, &Body::from(body)))
    }
}

fn info(p: &Process, parent: &str) -> ProcessInfo {
    ProcessInfo {
        pid: p.id.pid,
        ppid: p.ppid,
        uid: p.uids[0],
        name: mask(&p.name),
        command: mask(&p.command()),
        parent: mask(parent),
    }
}

/// At most four names: the list of all capabilities is no line for a person.
fn short_list(set: u64) -> String {
    let names = capability_names(set);
    let mut names = names.split(", ");
    let first: Vec<&str> = names.by_ref().take(4).collect();
    match names.count() {
        0 => first.join(", "),
        more => format!("{} and {more} more capabilities", first.join(", ")),
    }
}

fn begins_with_one_of(command: &str, beginnings: &[String]) -> bool {
    beginnings.iter().any(|b| !b.is_empty() && command.starts_with(b.as_str()))
}

fn is_shell(p: &Process) -> bool {
    let is = |name: &str| SHELLS.contains(&name);
    let busybox = p.name == "busybox" || p.program() == "busybox";
    is(&p.name) || is(p.program()) || (busybox && p.arguments.get(1).is_some_and(|applet| is(applet)))
}

/// A shell that forks is its own copy until it has become something else.
fn is_fork(p: &Process, parent: Option<&Process>) -> bool {
    parent.is_some_and(|q| q.name == p.name && q.arguments == p.arguments)
}

/// Whether the entry point is `p` and a shell: a script, whose own shells are no news. Those of what it starts are.
fn is_script(p: &Process, family: &Family<'_>) -> bool {
    is_shell(p) && (p.role == Role::First || is_entry_point(p, family.get(&p.ppid).copied(), family))
}

/// Behind an init the entry point is its oldest child.
fn is_entry_point(p: &Process, parent: Option<&Process>, family: &Family<'_>) -> bool {
    let behind_init = parent.is_some_and(|q| q.role == Role::First && INITS.contains(&q.name.as_str()));
    behind_init && !family.values().any(|q| q.ppid == p.ppid && q.id < p.id && q.role == Role::Inside)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::parse::Cgroup;

    const CAPS: u64 = 0xa804_25fb;

    fn process(pid: i32, ppid: i32, role: Role, command: &str) -> Process {
        Process {
            id: ProcessId { started: u64::try_from(pid).unwrap(), pid },
            ppid,
            role,
            name: command.split(' ').next().unwrap().rsplit('/').next().unwrap().into(),
            arguments: command.split(' ').map(str::to_owned).collect(),
            uids: [10001; 4],
            cap_bounding: CAPS,
            cgroup: Cgroup::parse("0::/docker/w").unwrap(),
            ..Process::default()
        }
    }

    fn web() -> Process {
        process(1, 0, Role::First, "nginx -g daemon")
    }

    fn backup() -> RootExec {
        RootExec { command: "pg_dump --all".into(), container: None, reason: "the nightly backup".into() }
    }

    fn tracker() -> Tracker {
        let mut tracker = Tracker::new(Normal {
            healthchecks: vec!["curl -f".into()],
            shells: vec!["sh -c logrotate".into()],
            root_execs: vec![backup()],
        });
        assert!(tracker.look(&[web()], Timestamp(0)).is_empty());
        tracker
    }

    fn kinds(events: &[Event]) -> Vec<(&str, Severity)> {
        events.iter().map(|e| (e.kind.as_ref(), e.severity)).collect()
    }

    #[test]
    fn who_comes_in_is_told_once_with_what_it_has_more() {
        let root = |p: Process| Process { uids: [0; 4], ..p };
        let entered = process(40, 0, Role::Entered, "ls /");
        let rows = [
            ("as the workload's user", entered.clone(), Some(Severity::Warning)),
            ("as root", root(entered.clone()), Some(Severity::Critical)),
            ("privileged", Process { cap_bounding: CAPS | 1 << 21, ..entered.clone() }, Some(Severity::Critical)),
            ("the declared health check", process(40, 0, Role::Entered, "curl -f http://x"), None),
            (
                "as root in the clothes of the health check",
                root(process(40, 0, Role::Entered, "curl -f http://x")),
                Some(Severity::Critical),
            ),
            ("the workload's own child", process(40, 1, Role::Inside, "ls /"), None),
        ];
        for (what, p, expected) in rows {
            let mut tracker = tracker();
            let got = tracker.look(&[web(), p.clone()], Timestamp(1));
            assert_eq!(kinds(&got), expected.map(|s| ("process.entered", s)).into_iter().collect::<Vec<_>>(), "{what}");
            assert!(tracker.look(&[web(), p], Timestamp(2)).is_empty(), "{what}: told twice");
        }
    }

    #[test]
    fn root_by_intent_is_a_notice_and_is_remembered_as_that() {
        let look = |p: Process| {
            let mut tracker = tracker();
            let got = kinds(&tracker.look(&[web(), p], Timestamp(1)))[0].1;
            (got, [tracker.history().entered_root.is_some(), tracker.history().declared_root.is_some()])
        };
        let root = |line: &str| Process { uids: [0; 4], ..process(40, 0, Role::Entered, line) };
        assert_eq!(look(root("pg_dump --all")), (Severity::Notice, [false, true]));
        assert_eq!(look(root("pg_dump --all -f /x")), (Severity::Critical, [true, false]));
        let more = Process { cap_bounding: CAPS | 1 << 21, ..root("pg_dump --all") };
        assert_eq!(look(more), (Severity::Critical, [true, false]));
        assert_eq!(look(process(40, 0, Role::Entered, "pg_dump --all")), (Severity::Warning, [false, false]));
    }

    #[test]
    fn a_root_workload_makes_nobody_special_for_being_root() {
        let root = |p: Process| Process { uids: [0; 4], ..p };
        let mut tracker = Tracker::new(Normal::default());
        tracker.look(&[root(web())], Timestamp(0));
        let got = tracker.look(&[root(web()), root(process(40, 0, Role::Entered, "ls"))], Timestamp(1));
        assert_eq!(kinds(&got), [("process.entered", Severity::Warning)]);
    }

    #[test]
    fn a_runtime_on_its_way_in_is_judged_by_what_it_becomes() {
        let runtime = Process {
            name: "runc:[2:INIT]".into(),
            uids: [0; 4],
            cap_bounding: u64::MAX,
            ..process(40, 0, Role::Entered, "runc init")
        };
        let mut tracker = tracker();
        assert!(tracker.look(&[web(), runtime.clone()], Timestamp(1)).is_empty());
        let got = tracker.look(&[web(), process(40, 0, Role::Entered, "ls")], Timestamp(2));
        assert_eq!(kinds(&got), [("process.entered", Severity::Warning)]);

        let mut tracker = super::tests::tracker();
        tracker.look(&[web(), runtime.clone()], Timestamp(1));
        let vanished = tracker.look(&[web()], Timestamp(2));
        assert_eq!(kinds(&vanished), [("process.entered", Severity::Notice)], "it may have been the health check");
        assert!(!tracker.history().unbroken);

        let mut tracker = super::tests::tracker();
        tracker.look(&[web(), runtime.clone()], Timestamp(1));
        let stays = tracker.look(&[web(), runtime], Timestamp::from_secs(3));
        assert_eq!(kinds(&stays), [("process.entered", Severity::Critical)], "a name does not hide for ever");
    }

    #[test]
    fn what_an_entered_process_starts_is_not_told_again() {
        let shell = process(40, 0, Role::Entered, "sh");
        let child = process(41, 40, Role::Entered, "bash");
        assert_eq!(tracker().look(&[web(), shell, child], Timestamp(1)).len(), 1);
    }

    #[test]
    fn a_shell_of_the_workload_is_told_unless_it_was_there_or_is_declared() {
        let rows = [
            ("sh", process(40, 1, Role::Inside, "/bin/sh -c id"), true),
            ("bash by its real name", Process { name: "evil".into(), ..process(40, 1, Role::Inside, "-bash") }, true),
            ("busybox", process(40, 1, Role::Inside, "busybox sh -i"), true),
            ("busybox as something else", process(40, 1, Role::Inside, "busybox ls"), false),
            ("python", process(40, 1, Role::Inside, "python3 x.py"), false),
            ("declared", process(40, 1, Role::Inside, "sh -c logrotate /x"), false),
        ];
        for (what, p, told) in rows {
            assert_eq!(tracker().look(&[web(), p], Timestamp(1)).len(), usize::from(told), "{what}");
        }
        let mut tracker = Tracker::new(Normal::default());
        assert!(tracker.look(&[web(), process(40, 1, Role::Inside, "sh")], Timestamp(0)).is_empty(), "there before");
    }

    #[test]
    fn a_process_that_becomes_a_shell_is_told() {
        let mut tracker = tracker();
        assert!(tracker.look(&[web(), process(40, 1, Role::Inside, "nginx")], Timestamp(1)).is_empty());
        let got = tracker.look(&[web(), process(40, 1, Role::Inside, "sh -i")], Timestamp(2));
        assert_eq!(got[0].summary, "nginx started a shell: sh -i (pid 40, uid 10001)");
    }

    #[test]
    fn behind_an_init_the_entry_point_may_be_a_shell_and_what_it_starts_later_is_told() {
        let init = process(1, 0, Role::First, "docker-init -- sh run.sh");
        let mut tracker = Tracker::new(Normal::default());
        tracker.look(std::slice::from_ref(&init), Timestamp(0));
        let entry = process(7, 1, Role::Inside, "sh run.sh");
        assert!(tracker.look(&[init.clone(), entry.clone()], Timestamp(1)).is_empty());
        assert_eq!(
            tracker
                .look(
                    &[init, entry, process(8, 7, Role::Inside, "app"), process(9, 8, Role::Inside, "sh -i")],
                    Timestamp(2)
                )
                .len(),
            1
        );
    }

    #[test]
    fn a_script_as_entry_point_starts_shells_and_its_programs_do_not() {
        let script = process(1, 0, Role::First, "sh run.sh");
        let mut tracker = Tracker::new(Normal::default());
        tracker.look(std::slice::from_ref(&script), Timestamp(0));
        let app = process(5, 1, Role::Inside, "python3 app.py");
        let helper = process(6, 1, Role::Inside, "sh -c helper");
        assert!(tracker.look(&[script.clone(), app.clone(), helper.clone()], Timestamp(1)).is_empty());
        let injected = process(7, 5, Role::Inside, "sh -c id");
        assert_eq!(tracker.look(&[script, app, helper, injected], Timestamp(2)).len(), 1);
    }

    #[test]
    fn a_shells_fork_of_itself_is_told_when_it_becomes_another() {
        let app = process(5, 1, Role::Inside, "python3 app.py");
        let mut tracker = tracker();
        let shell = process(6, 5, Role::Inside, "bash x");
        assert_eq!(tracker.look(&[web(), app.clone(), shell.clone()], Timestamp(1)).len(), 1);
        let fork = process(7, 6, Role::Inside, "bash x");
        assert!(tracker.look(&[web(), app.clone(), shell.clone(), fork], Timestamp(2)).is_empty());
        assert_eq!(tracker.look(&[web(), app, shell, process(7, 6, Role::Inside, "sh -i")], Timestamp(3)).len(), 1);
    }

    #[test]
    fn a_container_started_anew_has_no_past() {
        let mut tracker = tracker();
        tracker.look(&[web(), Process { uids: [0; 4], ..process(40, 0, Role::Entered, "sh") }], Timestamp(1));
        tracker.lose_track();
        assert!(tracker.history().entered_root.is_some());
        tracker.begin_anew();
        assert_eq!(*tracker.history(), History { unbroken: true, ..History::default() });
    }

    #[test]
    fn a_burst_of_shells_is_two_events() {
        let mut tracker = tracker();
        let mut told = 0;
        for pid in 100..150 {
            told += tracker.look(&[web(), process(pid, 1, Role::Inside, "sh -c x")], Timestamp(1)).len();
        }
        assert_eq!(told, 1);
        let rest = tracker.tick(Timestamp::from_secs(61));
        assert_eq!(rest[0].summary, "nginx started 49 more shells (sh), the last: sh -c x");
        assert!(tracker.tick(Timestamp::from_secs(200)).is_empty());
    }

    #[test]
    fn a_zombie_shell_is_told_by_its_name() {
        let zombie = Process {
            zombie: true,
            arguments: Vec::new(),
            cgroup: Cgroup::parse("0::/").unwrap(),
            ..process(40, 1, Role::Inside, "sh")
        };
        assert_eq!(tracker().look(&[web(), zombie], Timestamp(1)).len(), 1);
    }

    #[test]
    fn missed_tasks_are_told_once_a_window_and_break_the_history() {
        let mut tracker = tracker();
        tracker.count(10, 0, Timestamp::from_secs(1));
        assert!(tracker.tick(Timestamp::from_secs(12)).is_empty() && tracker.history().unbroken);
        tracker.count(10, 3, Timestamp::from_secs(20));
        tracker.count(5, 1, Timestamp::from_secs(21));
        assert!(tracker.tick(Timestamp::from_secs(29)).is_empty());
        let told = tracker.tick(Timestamp::from_secs(30));
        assert_eq!(told[0].summary, "4 of 15 tasks created in 10 s were gone before they could be seen");
        assert!(!tracker.history().unbroken && tracker.tick(Timestamp::from_secs(60)).is_empty());
    }

    #[test]
    fn secrets_in_command_lines_stay_inside() {
        let shell = process(40, 1, Role::Inside, "sh -c login --password=hunter2");
        let got = tracker().look(&[web(), shell], Timestamp(1));
        assert!(!got[0].summary.contains("hunter2") && !got[0].body.get().contains("hunter2"));
    }
}
