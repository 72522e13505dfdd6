//! Which processes are the workload. Never "PID 1": that may be our own agent, a pause container, an init, or the
//! host's. Pure.
//!
//! A sidecar's workload is every process that shares our network namespace and is not in our cgroup, and what is
//! in the same cgroup as one of these or was started by one, so that `unshare -n` does not hide it. In exec mode the
//! workload is what we started, and whatever else runs in our own cgroup, without ourselves.

use std::collections::{BTreeMap, BTreeSet};

use sidewarden_proto::event::Mode;

use super::parse::Cgroup;
use super::process::{Process, ProcessId, Role};

/// What an agent guards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// How the agent stands beside it.
    pub mode: Mode,
    /// Where the above cannot tell (host PID and host network namespace at once): part of the workload's cgroup path,
    /// for example its container's id.
    pub cgroup: Option<String>,
}

/// Ourselves, as far as it matters for telling who is not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ourselves {
    /// Our PID.
    pub pid: i32,
    /// Our cgroups.
    pub cgroup: Cgroup,
    /// Our PID namespace is the host's.
    pub host_pids: bool,
    /// Our network namespace is the host's.
    pub host_net: bool,
}

/// The workload's processes, oldest first, each with its [`Role`]; an error says why they cannot be told.
pub fn select(subject: &Subject, ourselves: &Ourselves, all: &[&Process]) -> Result<Vec<Process>, String> {
    let mut members = closure(subject, ourselves, all)?;
    members.sort_by_key(|p| p.id);
    let roles = roles(subject.mode, ourselves, &members);
    for (process, role) in members.iter_mut().zip(roles) {
        process.role = role;
    }
    Ok(members)
}

/// Tells the role of each of one container's processes, as the host sees them.
pub fn give_roles(members: &mut [Process]) {
    let ourselves = Ourselves { host_pids: true, ..Ourselves::default() };
    let roles = roles(Mode::Node, &ourselves, members);
    for (process, role) in members.iter_mut().zip(roles) {
        process.role = role;
    }
}

/// Whether `all` shows processes that are neither ours nor the workload's, so that a count of forks in the PID namespace
/// says nothing about the workload.
pub fn has_strangers(ourselves: &Ourselves, all: &[&Process], members: &[Process]) -> bool {
    let known: BTreeSet<ProcessId> = members.iter().map(|p| p.id).collect();
    let stranger = |p: &&&Process| !known.contains(&p.id) && !p.zombie && !p.is_runtime();
    all.iter().filter(stranger).any(|p| p.id.pid != ourselves.pid && !p.cgroup.is_within(&ourselves.cgroup))
}

fn closure(subject: &Subject, ourselves: &Ourselves, all: &[&Process]) -> Result<Vec<Process>, String> {
    let seed = seed(subject, ourselves)?;
    let mut chosen: BTreeSet<i32> = all.iter().filter(|p| seed(p)).map(|p| p.id.pid).collect();
    // `runc` is in the container's namespaces for a moment before it is in its cgroup.
    let settled =
        all.iter().filter(|p| chosen.contains(&p.id.pid) && !p.is_runtime() && !p.zombie && !p.cgroup.is_root());
    let mut cgroups: BTreeSet<&Cgroup> = settled.map(|p| &p.cgroup).collect();
    if ourselves.host_pids {
        // Where the host's processes show, the parent of what is on its way in is the runtime, in a cgroup of the host's.
        let parents: BTreeSet<i32> = all.iter().filter(|p| chosen.contains(&p.id.pid)).map(|p| p.ppid).collect();
        for runtime in all.iter().filter(|p| parents.contains(&p.id.pid) && !p.same_net) {
            cgroups.remove(&runtime.cgroup);
        }
    }
    let ours =
        |p: &Process| p.id.pid == ourselves.pid || (subject.mode == Mode::Sidecar && p.cgroup == ourselves.cgroup);
    chosen.extend(all.iter().filter(|p| !ours(p) && cgroups.contains(&p.cgroup)).map(|p| p.id.pid));
    // Children of members are members, however deep.
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for p in all.iter().filter(|p| !ours(p)) {
        children.entry(p.ppid).or_default().push(p.id.pid);
    }
    let mut parents: Vec<i32> = chosen.iter().copied().collect();
    while let Some(parent) = parents.pop() {
        let born = children.get(&parent).into_iter().flatten().copied();
        parents.extend(born.filter(|pid| chosen.insert(*pid)));
    }
    Ok(all.iter().filter(|p| chosen.contains(&p.id.pid)).map(|p| (*p).clone()).collect())
}

/// Whether a process belongs to the workload by itself.
type Rule<'a> = Box<dyn Fn(&Process) -> bool + 'a>;

/// The rule by which a process belongs to the workload by itself.
fn seed<'a>(subject: &'a Subject, ourselves: &'a Ourselves) -> Result<Rule<'a>, String> {
    let ours = |p: &Process| p.id.pid == ourselves.pid || p.cgroup.is_within(&ourselves.cgroup);
    if let Some(part) = &subject.cgroup {
        return Ok(Box::new(move |p| p.cgroup.names(part) && p.id.pid != ourselves.pid));
    }
    Ok(match subject.mode {
        Mode::Sidecar if ourselves.host_pids && ourselves.host_net => {
            return Err("this agent shares both the host's PID and the host's network namespace, where every process \
                        looks like the workload: name the workload's container with `subject`"
                .into());
        }
        Mode::Sidecar => Box::new(move |p| p.same_net && !ours(p)),
        // Our cgroup is the root of everything: only our own children are surely the workload's.
        Mode::Node => return Err("a node agent has no workload of its own".into()),
        Mode::Exec if ourselves.cgroup.is_root() && ourselves.host_pids => Box::new(move |p| p.ppid == ourselves.pid),
        Mode::Exec => Box::new(move |p| p.id.pid != ourselves.pid && (p.ppid == ourselves.pid || ours(p))),
    })
}

fn roles(mode: Mode, ourselves: &Ourselves, members: &[Process]) -> Vec<Role> {
    let pids: BTreeSet<i32> = members.iter().map(|p| p.id.pid).collect();
    let outsider = |p: &Process| is_outsider(ourselves, &pids, p);
    let firsts: BTreeSet<ProcessId> = containers(members).iter().filter_map(|c| first(mode, c, &outsider)).collect();
    let parents: BTreeMap<i32, &Process> = members.iter().map(|p| (p.id.pid, p)).collect();
    let role = |p: &Process| match () {
        () if firsts.contains(&p.id) => Role::First,
        () if ancestry(p, &parents).take_while(|p| !firsts.contains(&p.id)).any(outsider) => Role::Entered,
        () => Role::Inside,
    };
    members.iter().map(role).collect()
}

/// `p`, its parent, and so on. Cut where a tree read while it changed might lead in a circle.
fn ancestry<'a>(p: &'a Process, by_pid: &'a BTreeMap<i32, &'a Process>) -> impl Iterator<Item = &'a Process> {
    std::iter::successors(Some(p), |p| by_pid.get(&p.ppid).copied()).take(by_pid.len())
}

/// Whether `p` was started from outside of the workload. In a PID namespace of the pod's own its parent is then 0.
/// Where the host's processes show, the parent is the runtime's shim; that also adopts orphans, which are told apart by
/// not leading a session, as everything that a runtime starts does.
fn is_outsider(ourselves: &Ourselves, members: &BTreeSet<i32>, p: &Process) -> bool {
    let adopted = p.ppid == 1 || p.ppid == ourselves.pid || members.contains(&p.ppid);
    p.ppid == 0 || (!adopted && p.session == p.id.pid)
}

fn first(mode: Mode, container: &[&Process], outsider: &dyn Fn(&Process) -> bool) -> Option<ProcessId> {
    let oldest =
        |from_outside: bool| container.iter().filter(|p| !p.zombie && outsider(p) == from_outside).map(|p| p.id).min();
    match mode {
        // What we did not start ourselves came in later.
        Mode::Exec => oldest(false),
        Mode::Sidecar | Mode::Node => oldest(true).or_else(|| oldest(false)),
    }
}

/// The members by container. A cgroup below another one belongs to that container, and so does a child of its processes.
pub fn containers(members: &[Process]) -> Vec<Vec<&Process>> {
    let mut groups: Vec<Vec<&Process>> = Vec::new();
    let mut cgroups: Vec<(&Cgroup, usize)> = Vec::new();
    let mut homes: BTreeMap<i32, usize> = BTreeMap::new();
    for p in members {
        let by_cgroup = cgroups.iter().find(|(cgroup, _)| p.cgroup.is_within(cgroup)).map(|(_, home)| *home);
        let home = by_cgroup.or_else(|| homes.get(&p.ppid).copied()).unwrap_or(groups.len());
        if home == groups.len() {
            groups.push(Vec::new());
        }
        if by_cgroup.is_none() && !p.zombie {
            cgroups.push((&p.cgroup, home));
        }
        homes.insert(p.id.pid, home);
        groups[home].push(p);
    }
    groups
}

impl Process {
    /// Whether it is a container runtime on its way to becoming something else. What it may do is not yet what it will.
    /// runc runs a copy of itself from memory as `runc init`; crun keeps its name.
    pub fn is_runtime(&self) -> bool {
        const STAGES: [&str; 5] = ["runc:[", "memfd:runc", "memfd:crun", "exe", "crun"];
        let init = self.arguments.len() == 2 && self.program() == "runc" && self.arguments[1] == "init";
        init || STAGES.iter().any(|stage| self.name.starts_with(stage) && (*stage != "exe" || self.program() == "runc"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What it is, who we are, every process, and the workload's with their roles.
    type Row = (&'static str, Ourselves, Vec<Process>, Vec<(i32, Role)>);

    fn cgroup(path: &str) -> Cgroup {
        Cgroup::parse(&format!("0::{path}")).unwrap()
    }

    fn process(pid: i32, ppid: i32, path: &str, same_net: bool) -> Process {
        let id = ProcessId { started: u64::try_from(pid).unwrap(), pid };
        Process { id, ppid, session: pid, cgroup: cgroup(path), same_net, pid_depth: 1, ..Process::default() }
    }

    fn child(pid: i32, ppid: i32, path: &str) -> Process {
        Process { session: ppid, ..process(pid, ppid, path, true) }
    }

    fn check(what: &str, mode: Mode, ourselves: &Ourselves, all: &[Process], expected: &[(i32, Role)]) {
        let all: Vec<&Process> = all.iter().collect();
        let got = select(&Subject { mode, cgroup: None }, ourselves, &all).unwrap();
        let got: Vec<(i32, Role)> = got.iter().map(|p| (p.id.pid, p.role)).collect();
        assert_eq!(got, expected, "{what}");
    }

    #[test]
    fn a_sidecar_finds_its_workload_wherever_it_stands() {
        use Role::{Entered, First, Inside};
        let us = |pid| Ourselves { pid, cgroup: cgroup("/docker/us"), ..Ourselves::default() };
        let (w, u) = ("/docker/w", "/docker/us");
        let host = Ourselves { host_pids: true, ..us(900) };
        let rows: [Row; 8] = [
            (
                "workload is PID 1",
                us(9),
                vec![process(1, 0, w, true), child(5, 1, w), process(9, 0, u, true)],
                vec![(1, First), (5, Inside)],
            ),
            (
                "agent is PID 1, workload joined, its orphan was adopted by the agent",
                us(1),
                vec![process(1, 0, u, true), process(7, 0, w, true), child(8, 7, w), process(12, 1, w, true)],
                vec![(7, First), (8, Inside), (12, Inside)],
            ),
            (
                "docker exec, and what it started",
                us(9),
                vec![process(1, 0, w, true), process(9, 0, u, true), process(20, 0, w, true), child(21, 20, w)],
                vec![(1, First), (20, Entered), (21, Entered)],
            ),
            (
                "host PID namespace: parents are shims, neighbours are not ours",
                host.clone(),
                vec![
                    process(1, 0, "/init.scope", false),
                    process(500, 1, "/system.slice/docker", false),
                    process(600, 500, w, true),
                    child(601, 600, w),
                    process(700, 500, "/docker/other", false),
                    process(800, 500, w, true),
                    Process { session: 555, ..process(801, 500, w, true) },
                    process(900, 500, u, true),
                ],
                vec![(600, First), (601, Inside), (800, Entered), (801, Inside)],
            ),
            (
                "leaving the network namespace does not hide a process",
                us(9),
                vec![
                    process(1, 0, w, true),
                    process(9, 0, u, true),
                    process(30, 1, w, false),
                    process(31, 30, "/x", false),
                ],
                vec![(1, First), (30, Inside), (31, Inside)],
            ),
            (
                "a pod: pause is PID 1, the workload has its own cgroup",
                us(30),
                vec![
                    process(1, 0, "/kubepods/pod/pause", true),
                    process(7, 0, "/kubepods/pod/app", true),
                    process(30, 0, u, true),
                    process(40, 0, "/kubepods/pod/app", true),
                ],
                vec![(1, First), (7, First), (40, Entered)],
            ),
            ("nobody there", us(9), vec![process(9, 0, u, true)], vec![]),
            (
                "a runtime on its way in does not bring its own cgroup along",
                host,
                vec![
                    process(500, 1, "/system.slice/docker", false),
                    process(600, 500, w, true),
                    process(801, 500, "/system.slice/docker", true),
                    process(900, 500, u, true),
                ],
                vec![(600, First), (801, First)],
            ),
        ];
        for (what, ourselves, all, expected) in rows {
            check(what, Mode::Sidecar, &ourselves, &all, &expected);
        }
    }

    #[test]
    fn in_exec_mode_the_workload_is_what_we_started_and_who_came_in() {
        use Role::{Entered, First, Inside};
        let us = |pid, path: &str, host_pids| Ourselves { pid, cgroup: cgroup(path), host_pids, host_net: false };
        let rows: [Row; 4] = [
            (
                "we are PID 1 of a private cgroup namespace",
                us(1, "/", false),
                vec![
                    process(1, 0, "/", true),
                    child(2, 1, "/"),
                    child(3, 2, "/"),
                    child(4, 1, "/"),
                    process(9, 0, "/", true),
                ],
                vec![(2, First), (3, Inside), (4, Inside), (9, Entered)],
            ),
            (
                "the host's PID namespace shows everybody",
                us(700, "/docker/w", true),
                vec![
                    process(1, 0, "/init", false),
                    process(500, 1, "/sys", false),
                    process(700, 500, "/docker/w", true),
                    child(701, 700, "/docker/w"),
                    process(800, 500, "/docker/w", true),
                    process(900, 500, "/docker/other", false),
                ],
                vec![(701, First), (800, Entered)],
            ),
            (
                "on a bare host in the root cgroup only our children count",
                us(700, "/", true),
                vec![
                    process(1, 0, "/", true),
                    process(700, 1, "/", true),
                    child(701, 700, "/"),
                    process(800, 1, "/", true),
                ],
                vec![(701, First)],
            ),
            (
                "a child that moved to a cgroup of its own is still the workload's",
                us(1, "/docker/w", false),
                vec![process(1, 0, "/docker/w", true), child(2, 1, "/docker/w"), child(3, 2, "/elsewhere")],
                vec![(2, First), (3, Inside)],
            ),
        ];
        for (what, ourselves, all, expected) in rows {
            check(what, Mode::Exec, &ourselves, &all, &expected);
        }
    }

    #[test]
    fn a_runtime_on_its_way_is_known_by_its_stages() {
        let named = |name: &str, command: &str| Process {
            name: name.into(),
            arguments: command.split(' ').map(str::to_owned).collect(),
            ..Process::default()
        };
        let rows = [
            ("runc:[2:INIT]", "runc init", true),
            ("memfd:runc_clon", "runc init", true),
            ("6", "/usr/sbin/runc init", true),
            ("crun", "crun exec", true),
            ("exe", "app", false),
            ("runc", "runc list", false),
            ("sh", "sh -c init", false),
        ];
        for (name, command, expected) in rows {
            assert_eq!(named(name, command).is_runtime(), expected, "{name}: {command}");
        }
    }

    #[test]
    fn where_it_cannot_be_told_the_operator_is_asked() {
        let us = Ourselves { pid: 9, cgroup: cgroup("/us"), host_pids: true, host_net: true };
        let all = [process(1, 0, "/init", true), process(5, 1, "/docker/cafe", true), process(9, 1, "/us", true)];
        let all: Vec<&Process> = all.iter().collect();
        let blind = select(&Subject { mode: Mode::Sidecar, cgroup: None }, &us, &all);
        assert!(blind.unwrap_err().contains("`subject`"));
        let told = select(&Subject { mode: Mode::Sidecar, cgroup: Some("cafe".into()) }, &us, &all).unwrap();
        assert_eq!(told.iter().map(|p| p.id.pid).collect::<Vec<_>>(), [5]);
    }

    #[test]
    fn strangers_are_those_that_are_neither_ours_nor_the_workloads() {
        let us = Ourselves { pid: 9, cgroup: cgroup("/us"), ..Ourselves::default() };
        let ours_and_theirs = [process(1, 0, "/w", true), process(9, 0, "/us", true), process(10, 9, "/us", true)];
        let all: Vec<&Process> = ours_and_theirs.iter().collect();
        assert!(!has_strangers(&us, &all, &ours_and_theirs[..1]));
        assert!(has_strangers(&us, &all, &[]));
    }
}
