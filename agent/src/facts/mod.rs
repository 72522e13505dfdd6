//! What the machine says now about the workload: the only reader of /proc and cgroups.
//!
//! [`observe`] reads everything a check needs, below a root that may be a made-up tree. What cannot be read is
//! [`Seen::Hidden`] with the reason, never a default. Nothing here judges.

mod container;
mod diag;
pub mod engine;
pub mod host;
pub mod image;
mod listeners;
mod machine;
pub mod parse;
mod process;
mod seen;
mod subject;

use std::path::Path;

use sidewarden_proto::event::Mode;
use sidewarden_proto::finding::Vantage;

pub(crate) use container::may_be_run;
pub use container::{Container, Cpu, Device, Namespace};
pub use engine::{Engine, Told};
pub use listeners::{Listener, ListenerSight, Lock, Owner, Speech, reached_at};
pub use machine::Machine;
pub use parse::{Limit, Mount};
pub use process::{Process, ProcessId, Role};
pub use seen::{Hidden, Seen, Why};
pub use subject::{Ourselves, Subject, containers, has_strangers, select};

/// CAP_SYS_PTRACE in a capability set.
const CAP_SYS_PTRACE: u64 = 1 << 19;

/// Inodes of the namespaces that the kernel starts with. Those of the network and mount namespace are not constant before 6.18.
mod initial {
    pub const PID: u64 = 4_026_531_836;
    pub const USER: u64 = 4_026_531_837;
    pub const UTS: u64 = 4_026_531_838;
    pub const IPC: u64 = 4_026_531_839;
}

/// Everything that was read in one look.
#[derive(Clone, Debug)]
pub struct Facts {
    /// How the agent stands beside the workload.
    pub mode: Mode,
    /// What this agent is able to see of the workload.
    pub vantage: Vantage,
    /// The workload's containers; empty, with `blind` saying why, where none is seen.
    pub containers: Vec<Container>,
    /// Why there is no container.
    pub blind: String,
    /// Processes that were gone before they were read.
    pub vanished: u32,
    /// Whether the network namespace, which is ours too, is the host's.
    pub host_net: Seen<bool>,
    /// Listeners of the network namespace that are not our own.
    pub listeners: Seen<Vec<Listener>>,
    /// Whether the rules of `intercept` keep others off them, as whoever asked for these facts found out.
    pub lock: Lock,
    /// Names of the network interfaces.
    pub interfaces: Seen<Vec<String>>,
    /// AppArmor is on in this kernel.
    pub apparmor: Seen<bool>,
    /// SELinux is on in this kernel.
    pub selinux: Seen<bool>,
    /// Bytes of memory of the machine.
    pub total_memory: Seen<u64>,
    /// Our own limits, which a sidecar has from the same daemon as the workload.
    pub own_limits: Seen<Vec<parse::LimitRow>>,
    /// Our own cgroups.
    pub own_cgroup: Cgroups,
    /// In exec mode: what the filter of system calls, which is ours too, refuses.
    pub filter: Seen<FilterProbe>,
    /// What the container engine says; known to a node agent only.
    pub engine: Seen<Engine>,
}

/// See [`Facts::own_cgroup`].
pub type Cgroups = Seen<parse::Cgroup>;

/// How the kernel answered two harmless system calls that Docker's seccomp profile refuses to containers without CAP_SYS_ADMIN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FilterProbe {
    /// `unshare(0)` was refused. Without a filter it does nothing and succeeds.
    pub unshare_refused: bool,
    /// `setns` on something that is no namespace was refused. Without a filter it is an invalid argument.
    pub setns_refused: bool,
}

/// Reads everything about `subject` below `root`; `listening` is the sight of that machine's listeners.
pub fn observe(root: &Path, subject: &Subject, listening: &mut ListenerSight) -> Facts {
    let machine = Machine::new(root);
    let (blind, vanished, members) = match look_around(&machine, subject) {
        Ok(scene) => (scene.blind(), scene.vanished, scene.members),
        Err(why) => (why, 0, Vec::new()),
    };
    let members: Vec<Process> = members.into_iter().filter(|p| !p.is_runtime() && !p.zombie).collect();
    let containers: Vec<Container> =
        subject::containers(&members).iter().map(|c| Container::observe(&machine, subject.mode, c)).collect();
    Facts {
        mode: subject.mode,
        vantage: vantage(&machine, &containers),
        blind,
        vanished,
        host_net: host_net(&machine),
        listeners: listening.look(&members),
        lock: Lock::Off,
        interfaces: interfaces(&machine),
        apparmor: apparmor(&machine),
        selinux: selinux(&machine),
        total_memory: parsed(&machine, "/proc/meminfo", parse::total_memory),
        own_limits: parsed(&machine, "/proc/self/limits", parse::limits),
        own_cgroup: parsed(&machine, "/proc/self/cgroup", parse::Cgroup::parse),
        filter: filter(subject.mode, root),
        engine: Seen::Hidden(Hidden::missing("Docker API")),
        containers,
    }
}

/// All visible processes, and which of them are the workload's.
#[derive(Clone, Debug, Default)]
pub struct Scene {
    /// Ourselves.
    pub ourselves: Ourselves,
    /// Every process that was read.
    pub all: Vec<Process>,
    /// The workload's.
    pub members: Vec<Process>,
    /// How many were gone before they were read.
    pub vanished: u32,
}

impl Scene {
    fn blind(&self) -> String {
        if !self.members.is_empty() {
            String::new()
        } else if self.all.iter().all(|p| p.cgroup.is_within(&self.ourselves.cgroup) || p.id.pid == self.ourselves.pid)
        {
            "no process of another container is visible: share its PID namespace (docker run --pid=container:NAME, \
             Compose `pid: service:NAME`, Kubernetes `shareProcessNamespace: true`)"
                .into()
        } else {
            "no visible process shares this agent's network namespace: share it (docker run --network=container:NAME, \
             Compose `network_mode: service:NAME`)"
                .into()
        }
    }
}

/// Reads every visible process and tells the workload's.
pub fn look_around(machine: &Machine, subject: &Subject) -> Result<Scene, String> {
    let ourselves = ourselves(machine).map_err(|e| format!("reading {}: {}", e.source, e.why))?;
    let own_net = own_net(machine);
    let pids = machine.pids().map_err(|e| format!("reading {}: {}", e.source, e.why))?;
    let read: Vec<Result<Process, Hidden>> = pids.into_iter().map(|pid| Process::read(machine, pid, own_net)).collect();
    let vanished = u32::try_from(read.iter().filter(|r| r.is_err()).count()).unwrap_or(u32::MAX);
    let all: Vec<Process> = read.into_iter().flatten().collect();
    let members = select(subject, &ourselves, &all.iter().collect::<Vec<_>>())?;
    Ok(Scene { ourselves, all, members, vanished })
}

/// The inode by which a process in our network namespace is known.
pub fn own_net(machine: &Machine) -> Option<u64> {
    machine.inode("/proc/self/net/dev").ok()
}

/// Who we are.
pub fn ourselves(machine: &Machine) -> Result<Ourselves, Hidden> {
    let cgroup = machine.read("/proc/self/cgroup")?;
    let host = |path: &str, inode: u64| namespace_of(machine, path).is_ok_and(|found| found == inode);
    Ok(Ourselves {
        pid: machine.own_pid()?,
        cgroup: parse::Cgroup::parse(&cgroup).map_err(|e| Hidden::unclear("/proc/self/cgroup", e))?,
        host_pids: host("/proc/self/ns/pid", initial::PID),
        host_net: host_net(machine).known().copied().unwrap_or(false),
    })
}

fn namespace_of(machine: &Machine, path: &str) -> Result<u64, Hidden> {
    parse::namespace_inode(&machine.link(path)?).map_err(|e| Hidden::unclear(path, e))
}

fn parsed<T>(machine: &Machine, path: &str, parse: impl Fn(&str) -> Result<T, String>) -> Seen<T> {
    let read = machine.read(path).and_then(|text| parse(&text).map_err(|e| Hidden::unclear(path, e)));
    Seen::at(path, read)
}

/// A few settings exist in the initial network namespace only, on every kernel.
pub fn host_net(machine: &Machine) -> Seen<bool> {
    const ONLY_THERE: &str = "/proc/sys/net/core/netdev_budget";
    const EVERYWHERE: &str = "/proc/sys/net/core/somaxconn";
    if !machine.exists(EVERYWHERE) {
        return Seen::Hidden(Hidden::missing(EVERYWHERE));
    }
    Seen::Known(machine.exists(ONLY_THERE), ONLY_THERE.into())
}

fn interfaces(machine: &Machine) -> Seen<Vec<String>> {
    let names = |text: &str| {
        Ok(text.lines().skip(2).filter_map(|l| l.split_once(':')).map(|(name, _)| name.trim().to_owned()).collect())
    };
    parsed(machine, "/proc/self/net/dev", names)
}

fn apparmor(machine: &Machine) -> Seen<bool> {
    const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
    match parsed(machine, ENABLED, |text| Ok(text.trim() == "Y")) {
        Seen::Hidden(Hidden { why: Why::Missing, .. }) if machine.exists("/sys/module") => {
            Seen::Known(false, ENABLED.into())
        }
        seen => seen,
    }
}

/// The file system that SELinux is controlled by is known to the kernel only where it is on.
fn selinux(machine: &Machine) -> Seen<bool> {
    parsed(machine, "/proc/filesystems", |text| Ok(text.split_whitespace().any(|word| word == "selinuxfs")))
}

/// The vantage is tried, not computed: uid, gid, capabilities, dumpability and AppArmor all have a say in it.
fn vantage(machine: &Machine, containers: &[Container]) -> Vantage {
    let deep = containers.iter().any(|c| c.uts.known().is_some());
    let effective =
        machine.read("/proc/self/status").ok().and_then(|text| parse::status(&text).ok()).map_or(0, |s| s.capeff);
    match deep {
        true if effective & CAP_SYS_PTRACE != 0 => Vantage::Ptrace,
        true => Vantage::SameUser,
        false => Vantage::Open,
    }
}

fn filter(mode: Mode, root: &Path) -> Seen<FilterProbe> {
    const SOURCE: &str = "system calls unshare, setns";
    if mode != Mode::Exec || root != Path::new("/") {
        return Seen::Hidden(Hidden::unclear(SOURCE, "the filter of another container cannot be tried from here"));
    }
    use nix::errno::Errno;
    use nix::sched::{CloneFlags, setns, unshare};
    let probe = std::fs::File::open("/proc/self/status").map(|no_namespace| FilterProbe {
        unshare_refused: unshare(CloneFlags::empty()) == Err(Errno::EPERM),
        setns_refused: setns(&no_namespace, CloneFlags::empty()) == Err(Errno::EPERM),
    });
    Seen::at(SOURCE, probe.map_err(|e| Hidden::from_io("/proc/self/status", &e)))
}

#[cfg(test)]
mod tests;
