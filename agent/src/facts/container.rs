//! One container of the workload: its processes, and what is true of all of them.
//!
//! Facts about the container are read through one process, the anchor: its first one, or in exec mode our own, which is
//! in the same container and always readable.

use std::collections::BTreeMap;

use sidewarden_proto::event::Mode;

use super::machine::Machine;
use super::parse::{self, Cgroup, Limit, LimitRow, Mount, UidRange};
use super::process::{Process, Role};
use super::seen::{Hidden, Seen, Why};
use super::{initial, namespace_of, parsed};

/// Deeper than any device node of a real container.
const MAX_DEV_DEPTH: usize = 4;

/// A namespace of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its inode.
    pub inode: u64,
    /// It is the one that the host runs in.
    pub host: bool,
}

/// A device node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Device {
    /// Where in the container.
    pub path: String,
    /// `c` or `b`.
    pub kind: char,
    /// Its major number.
    pub major: u64,
    /// Its minor number.
    pub minor: u64,
}

/// One container of the workload.
#[derive(Clone, Debug)]
pub struct Container {
    /// Its processes, oldest first.
    pub processes: Vec<Process>,
    /// Its cgroups.
    pub cgroup: Cgroup,
    /// `/proc/<pid>` of the process that the rest was read through.
    pub anchor: String,
    /// Its mounts.
    pub mounts: Seen<Vec<Mount>>,
    /// Its PID namespace.
    pub pid: Seen<Namespace>,
    /// Its IPC namespace.
    pub ipc: Seen<Namespace>,
    /// Its UTS namespace.
    pub uts: Seen<Namespace>,
    /// Its user namespace.
    pub user: Seen<Namespace>,
    /// How its users are mapped.
    pub uid_map: Seen<Vec<UidRange>>,
    /// Its label for the Linux security module.
    pub label: Seen<String>,
    /// Its resource limits.
    pub limits: Seen<Vec<LimitRow>>,
    /// Device nodes below its /dev.
    pub devices: Seen<Vec<Device>>,
    /// Which devices it may use (cgroup v1 only).
    pub device_rules: Seen<Vec<String>>,
    /// Its memory limit, in bytes.
    pub memory: Seen<Limit>,
    /// Whether its CPU share is set or its CPU time limited: what stands there.
    pub cpu: Seen<Cpu>,
    /// How many tasks it may have.
    pub pids: Seen<Limit>,
    /// Names in mounted directories that may be the host's /run, by mount point.
    pub run_entries: BTreeMap<String, Seen<Vec<String>>>,
}

/// CPU share and limit of a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// The share is not the default.
    pub weighted: bool,
    /// The time is limited.
    pub limited: bool,
    /// The two as they stand there.
    pub text: String,
}

impl Container {
    /// Reads everything about the container that `members` run in.
    pub(super) fn observe(machine: &Machine, mode: Mode, members: &[&Process]) -> Container {
        let first = members.iter().find(|p| p.role == Role::First).or(members.first());
        let first = first.map_or_else(|| "/proc/self".to_owned(), |p| format!("/proc/{}", p.id.pid));
        let anchor = if mode == Mode::Exec { "/proc/self".to_owned() } else { first.clone() };
        let mounts = parsed(machine, &format!("{anchor}/mountinfo"), parse::mounts);
        let files = CgroupFiles { machine, anchor: &anchor, mounts: &mounts };
        let namespace = |kind: &str, host: u64| {
            let path = format!("{anchor}/ns/{kind}");
            Seen::at(path.clone(), namespace_of(machine, &path).map(|inode| Namespace { inode, host: inode == host }))
        };
        Container {
            cgroup: members.first().map(|p| p.cgroup.clone()).unwrap_or_default(),
            pid: pid_namespace(machine, members),
            ipc: namespace("ipc", initial::IPC),
            uts: namespace("uts", initial::UTS),
            user: namespace("user", initial::USER),
            uid_map: parsed(machine, &format!("{anchor}/uid_map"), parse::uid_map),
            label: label(machine, &first),
            limits: parsed(machine, &format!("{first}/limits"), parse::limits),
            devices: devices(machine, &anchor, &mounts),
            device_rules: files.read("devices", "devices.list", None, |t| Ok(t.lines().map(str::to_owned).collect())),
            memory: files.read("memory", "memory.limit_in_bytes", Some("memory.max"), parse::limit),
            cpu: files.cpu(),
            pids: files.read("pids", "pids.max", Some("pids.max"), parse::limit),
            run_entries: run_entries(machine, &anchor, &mounts),
            processes: members.iter().map(|p| (*p).clone()).collect(),
            mounts,
            anchor,
        }
    }

    /// The processes that belong to it, without those that came in from outside.
    pub fn own_processes(&self) -> impl Iterator<Item = &Process> {
        self.processes.iter().filter(|p| p.role != Role::Entered)
    }
}

/// Our own link is always readable. A process in a namespace below ours shows more than one PID.
fn pid_namespace(machine: &Machine, members: &[&Process]) -> Seen<Namespace> {
    const OWN: &str = "/proc/self/ns/pid";
    match members.first() {
        Some(p) if p.pid_depth > 1 => {
            Seen::Known(Namespace { inode: 0, host: false }, format!("/proc/{}/status", p.id.pid))
        }
        _ => Seen::at(OWN, namespace_of(machine, OWN).map(|inode| Namespace { inode, host: inode == initial::PID })),
    }
}

/// Kernels without any security module answer EINVAL here.
fn label(machine: &Machine, process: &str) -> Seen<String> {
    let read = |path: &str| parsed(machine, path, |text| Ok(text.trim_end_matches(['\n', '\0']).to_owned()));
    match read(&format!("{process}/attr/apparmor/current")) {
        Seen::Known(label, source) => Seen::Known(label, source),
        Seen::Hidden(_) => read(&format!("{process}/attr/current")),
    }
}

/// Names of the device nodes below /dev. Other file systems than the one that runtimes put there are not entered: one that
/// the workload mounted itself could answer never.
fn devices(machine: &Machine, anchor: &str, mounts: &Seen<Vec<Mount>>) -> Seen<Vec<Device>> {
    let source = format!("{anchor}/root/dev");
    let elsewhere: Vec<&str> = match mounts {
        Seen::Known(mounts, _) => mounts.iter().map(|m| m.point.as_str()).filter(|p| p.starts_with("/dev/")).collect(),
        Seen::Hidden(hidden) => return Seen::Hidden(hidden.clone()),
    };
    let known = |fs: &str| matches!(fs, "tmpfs" | "devtmpfs" | "overlay");
    let dev = mounts.known().and_then(|m| m.iter().rfind(|m| m.point == "/dev"));
    if let Some(strange) = dev.filter(|m| !known(&m.fs)) {
        return Seen::Hidden(Hidden::unclear(source, format!("/dev is of type {}", strange.fs)));
    }
    let mut found = Vec::new();
    let walked = walk(machine, anchor, "/dev", &elsewhere, MAX_DEV_DEPTH, &mut found);
    found.sort();
    Seen::at(source, walked.map(|()| found))
}

fn walk(
    m: &Machine,
    anchor: &str,
    dir: &str,
    skip: &[&str],
    depth: usize,
    out: &mut Vec<Device>,
) -> Result<(), Hidden> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    for (name, about) in m.list(&format!("{anchor}/root{dir}"))? {
        let path = format!("{dir}/{name}");
        let kind = about.file_type();
        if kind.is_dir() && depth > 0 && !skip.contains(&path.as_str()) {
            walk(m, anchor, &path, skip, depth - 1, out)?;
        } else if (kind.is_char_device() || kind.is_block_device()) && !skip.contains(&path.as_str()) {
            let kind = if kind.is_block_device() { 'b' } else { 'c' };
            let (major, minor) = (nix::sys::stat::major(about.rdev()), nix::sys::stat::minor(about.rdev()));
            out.push(Device { path, kind, major, minor });
        }
    }
    Ok(())
}

/// The host's /run and a scratch tmpfs look alike in mountinfo but for their mode; what is in them tells.
fn run_entries(machine: &Machine, anchor: &str, mounts: &Seen<Vec<Mount>>) -> BTreeMap<String, Seen<Vec<String>>> {
    let Some(mounts) = mounts.known() else { return BTreeMap::new() };
    let names = |m: &Mount| {
        let path = format!("{anchor}/root{}", m.point);
        let listed = machine.list(&path).map(|entries| entries.into_iter().map(|(name, _)| name).collect());
        (m.point.clone(), Seen::at(path, listed))
    };
    mounts.iter().filter(|m| may_be_run(m)).map(names).collect()
}

/// Whether `m` may be the host's /run: a whole tmpfs with the mode that /run has, where no runtime puts one of its own.
pub(crate) fn may_be_run(m: &Mount) -> bool {
    const RUNTIMES: [&str; 4] = ["/dev", "/proc", "/sys", "/etc"];
    m.fs == "tmpfs" && m.root == "/" && m.has("mode=755") && !RUNTIMES.iter().any(|p| m.is_at_or_below(p))
}

/// The cgroup files of a container, found by its own mounts: a path in its root could be anything it likes, a mount of type
/// cgroup is one.
struct CgroupFiles<'a> {
    machine: &'a Machine,
    anchor: &'a str,
    mounts: &'a Seen<Vec<Mount>>,
}

impl CgroupFiles<'_> {
    fn read<T>(
        &self,
        controller: &str,
        v1: &str,
        v2: Option<&str>,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Seen<T> {
        match self.file(controller, v1, v2) {
            Ok(path) => parsed(self.machine, &path, parse),
            Err(hidden) => Seen::Hidden(hidden),
        }
    }

    fn file(&self, controller: &str, v1: &str, v2: Option<&str>) -> Result<String, Hidden> {
        let mounts = match self.mounts {
            Seen::Known(mounts, _) => mounts,
            Seen::Hidden(hidden) => return Err(hidden.clone()),
        };
        let at = |m: &Mount, file: &str| format!("{}/root{}/{file}", self.anchor, m.point.trim_end_matches('/'));
        if let Some(m) = mounts.iter().find(|m| m.fs == "cgroup" && m.has(controller)) {
            return Ok(at(m, v1));
        }
        match (mounts.iter().find(|m| m.fs == "cgroup2"), v2) {
            (Some(m), Some(file)) => Ok(at(m, file)),
            (Some(_), None) => Err(Hidden { source: "cgroup v2".into(), why: Why::Missing }),
            (None, _) => Err(Hidden::unclear(
                format!("{}/mountinfo", self.anchor),
                format!("no cgroup with {controller} is mounted"),
            )),
        }
    }

    fn cpu(&self) -> Seen<Cpu> {
        let shares = self.read("cpu", "cpu.shares", Some("cpu.weight"), |t| Ok(t.trim().to_owned()));
        let quota = self.read("cpu", "cpu.cfs_quota_us", Some("cpu.max"), |t| Ok(t.trim().to_owned()));
        match (shares, quota) {
            (Seen::Known(shares, source), Seen::Known(quota, quota_source)) => {
                let default = if source.ends_with("cpu.weight") { "100" } else { "1024" };
                let unlimited = quota.starts_with("max") || quota.starts_with("-1");
                let source = format!("{source}, {quota_source}");
                Seen::Known(
                    Cpu { weighted: shares != default, limited: !unlimited, text: format!("{shares}; {quota}") },
                    source,
                )
            }
            (Seen::Hidden(hidden), _) | (_, Seen::Hidden(hidden)) => Seen::Hidden(hidden),
        }
    }
}
