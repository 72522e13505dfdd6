//! The processes as they were last seen, kept up to date by reading as little as possible: what the fork gate says is new,
//! what is young (it may still become another program), and once in a while all of the workload's.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::gate::{Created, Gate};
use crate::facts::parse::{last_pid, status};
use crate::facts::{Machine, Ourselves, Process, Subject, has_strangers, ourselves, own_net, select};

/// A process is read at every look until it is this old.
const YOUTH: Duration = Duration::from_secs(1);

/// Of more new PIDs than this, those that are not listed count as missed without being asked one by one.
const MAX_PROBES: u32 = 4096;

/// What one look gave.
#[derive(Debug, Default)]
pub struct Seen {
    /// The workload's processes, each with its role.
    pub members: Vec<Process>,
    /// Tasks created since the last look, without our own.
    pub created: u64,
    /// Of these, how many were gone.
    pub missed: u64,
    /// There are processes that are neither ours nor the workload's.
    pub strangers: bool,
    /// Processes that were gone while they were read.
    pub vanished: u64,
}

/// See the module.
pub struct Sight {
    machine: Machine,
    subject: Subject,
    ourselves: Option<Ourselves>,
    own_net: Option<u64>,
    loadavg: Option<File>,
    gate: Option<Gate>,
    processes: BTreeMap<i32, (Instant, Process)>,
    members: BTreeSet<i32>,
    youngest: Option<Instant>,
    complaint: String,
}

impl Sight {
    /// Sight of `subject` on `machine`, with nothing seen yet.
    pub fn new(machine: Machine, subject: Subject) -> Sight {
        let loadavg = machine.open("/proc/loadavg").ok();
        let gate = loadavg.as_ref().and_then(read_gate).map(|last| Gate::new(last, pid_max(&machine)));
        Sight {
            ourselves: None,
            own_net: None,
            loadavg,
            gate,
            processes: BTreeMap::new(),
            members: BTreeSet::new(),
            youngest: None,
            complaint: String::new(),
            machine,
            subject,
        }
    }

    /// What was created since this was last asked.
    pub fn created(&mut self) -> Option<Created> {
        let now = read_gate(self.loadavg.as_ref()?)?;
        self.gate.as_mut()?.step(now)
    }

    /// Whether some process is so young that it may still become another program.
    pub fn has_young(&self, now: Instant) -> bool {
        self.youngest.is_some_and(|born| now.duration_since(born) < YOUTH)
    }

    /// Looks at what is new, what is young, and at all of the workload's if `all` is set.
    pub fn look(&mut self, created: Option<Created>, all: bool, now: Instant) -> Seen {
        let Some(ourselves) = self.know_ourselves() else { return Seen::default() };
        let vanished = self.refresh(created, all, now);
        let (created, missed) = created.map_or((0, 0), |c| self.account(&c, &ourselves));
        let (all, members) = self.tell_apart(&ourselves);
        let strangers = has_strangers(&ourselves, &all, &members);
        self.members = members.iter().map(|p| p.id.pid).collect();
        Seen { strangers, members, created, missed, vanished }
    }

    fn know_ourselves(&mut self) -> Option<Ourselves> {
        if self.ourselves.is_none() {
            match ourselves(&self.machine) {
                Ok(found) => {
                    self.own_net = own_net(&self.machine);
                    self.ourselves = Some(found);
                }
                Err(e) => complain(&mut self.complaint, format!("reading {}: {}", e.source, e.why)),
            }
        }
        self.ourselves.clone()
    }

    fn refresh(&mut self, created: Option<Created>, all: bool, now: Instant) -> u64 {
        let Ok(listed) = self.machine.pids() else { return 0 };
        let present: BTreeSet<i32> = listed.iter().copied().collect();
        self.processes.retain(|pid, _| present.contains(pid));
        let mut vanished = 0;
        for pid in listed {
            let before = self.processes.get(&pid).map(|(born, _)| *born);
            // A PID that was just given out belongs to a new process, whoever had it before.
            let new = before.is_none() || created.is_some_and(|c| c.contains(pid));
            let young = before.is_some_and(|born| now.duration_since(born) < YOUTH);
            let due = all && self.members.contains(&pid);
            if !(new || young || due) {
                continue;
            }
            match Process::read(&self.machine, pid, self.own_net) {
                Ok(process) => {
                    let born = before.filter(|_| !new).unwrap_or(now);
                    self.processes.insert(pid, (born, process));
                }
                Err(_) => {
                    self.processes.remove(&pid);
                    vanished += 1;
                }
            }
        }
        self.youngest = self.processes.values().map(|(born, _)| *born).max();
        vanished
    }

    fn tell_apart(&mut self, ourselves: &Ourselves) -> (Vec<&Process>, Vec<Process>) {
        let all: Vec<&Process> = self.processes.values().map(|(_, p)| p).collect();
        match select(&self.subject, ourselves, &all) {
            Ok(members) => (all, members),
            Err(why) => {
                complain(&mut self.complaint, why);
                (all, Vec::new())
            }
        }
    }

    /// How many tasks were created that are not ours, and how many of them were gone. A number that is no process may be a
    /// thread, which is not listed and can be asked for.
    fn account(&self, created: &Created, ourselves: &Ourselves) -> (u64, u64) {
        let (mut others, mut missed) = (0, 0);
        let probe = created.count() <= MAX_PROBES;
        for pid in created.pids() {
            let task = match self.processes.get(&pid) {
                Some((_, process)) => Some(process.id.pid),
                None if probe => self.thread_group(pid),
                None => None,
            };
            match task {
                Some(group) if group == ourselves.pid => {}
                Some(_) => others += 1,
                None => {
                    others += 1;
                    missed += 1;
                }
            }
        }
        (others, missed)
    }

    fn thread_group(&self, task: i32) -> Option<i32> {
        let text = self.machine.read(&format!("/proc/{task}/status")).ok()?;
        status(&text).ok().map(|s| s.tgid)
    }
}

/// Logs that the workload cannot be told; the same reason once.
fn complain(last: &mut String, why: String) {
    if *last != why {
        tracing::warn!(reason = %why, "the workload cannot be told");
        *last = why;
    }
}

fn read_gate(loadavg: &File) -> Option<u32> {
    let mut text = [0; 128];
    let length = loadavg.read_at(&mut text, 0).ok()?;
    last_pid(std::str::from_utf8(&text[..length]).ok()?)
}

/// The kernel's own default, where the file cannot be read.
fn pid_max(machine: &Machine) -> u32 {
    const DEFAULT: u32 = 32768;
    machine.read("/proc/sys/kernel/pid_max").ok().and_then(|text| text.trim().parse().ok()).unwrap_or(DEFAULT)
}
