//! One process as the kernel tells everybody about it: nothing here needs a privilege.

use super::machine::Machine;
use super::parse::{self, Cgroup};
use super::seen::Hidden;

/// A process for good: PIDs are used again, a PID with its start time is not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId {
    /// Its start, in clock ticks since boot. First, so that ids sort by age.
    pub started: u64,
    /// Its PID in our PID namespace.
    pub pid: i32,
}

/// How a process came into the container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// The first process of its container.
    First,
    /// Started, directly or not, by the first one.
    #[default]
    Inside,
    /// Came from outside (docker exec, nsenter), or was started by one that did.
    Entered,
}

/// One process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// Who it is.
    pub id: ProcessId,
    /// Its parent; 0 where that is outside of our PID namespace.
    pub ppid: i32,
    /// Its session.
    pub session: i32,
    /// It has ended and waits to be reaped.
    pub zombie: bool,
    /// Its name, as it chose it itself: at most 15 bytes.
    pub name: String,
    /// Its arguments, as it shows them.
    pub arguments: Vec<String>,
    /// Real, effective, saved and file system user.
    pub uids: [u32; 4],
    /// Real, effective, saved and file system group.
    pub gids: [u32; 4],
    /// Its other groups.
    pub groups: Vec<u32>,
    /// Effective capabilities.
    pub cap_effective: u64,
    /// Capabilities it can make effective by itself.
    pub cap_permitted: u64,
    /// Capabilities it can ever have.
    pub cap_bounding: u64,
    /// 0 off, 1 strict, 2 filter; `None` where the kernel does not say.
    pub seccomp: Option<u32>,
    /// It and its children can gain no privileges.
    pub no_new_privs: Option<bool>,
    /// In how many PID namespaces it is, counted from ours: 1 means that it is in ours.
    pub pid_depth: usize,
    /// Its cgroups.
    pub cgroup: Cgroup,
    /// Its network namespace is ours.
    pub same_net: bool,
    /// How it came here. Told by [`super::subject::select`].
    pub role: Role,
}

impl Process {
    /// Reads the process `pid`. `own_net` is the inode of our own `/proc/self/net/dev`: every network namespace has
    /// its own, and reading it needs no privilege, unlike the link in `ns/`.
    pub fn read(machine: &Machine, pid: i32, own_net: Option<u64>) -> Result<Process, Hidden> {
        let path = |file: &str| format!("/proc/{pid}/{file}");
        let line = stat(machine, &path("stat"))?;
        let status = machine.read(&path("status"))?;
        let status = parse::status(&status).map_err(|e| Hidden::unclear(path("status"), e))?;
        let cgroup = machine.read(&path("cgroup"))?;
        let cgroup = Cgroup::parse(&cgroup).map_err(|e| Hidden::unclear(path("cgroup"), e))?;
        let arguments = parse::arguments(&machine.read(&path("cmdline")).unwrap_or_default());
        let net = machine.inode(&path("net/dev")).ok();
        // Read again at the end: what lies between belongs to one process only if the PID was not used again.
        if stat(machine, &path("stat"))?.starttime != line.starttime {
            return Err(Hidden::missing(path("stat")));
        }
        Ok(Process {
            id: ProcessId { started: line.starttime, pid },
            ppid: line.ppid,
            session: line.session,
            zombie: line.state == 'Z',
            name: line.name,
            arguments,
            uids: [status.ruid, status.euid, status.suid, status.fuid],
            gids: [status.rgid, status.egid, status.sgid, status.fgid],
            groups: status.groups,
            cap_effective: status.capeff,
            cap_permitted: status.capprm,
            cap_bounding: status.capbnd.unwrap_or(status.capprm),
            seccomp: status.seccomp,
            no_new_privs: status.nonewprivs.map(|n| n == 1),
            pid_depth: status.nspid.map_or(1, |pids| pids.len().max(1)),
            cgroup,
            same_net: own_net.is_some() && net == own_net,
            role: Role::Inside,
        })
    }

    /// Whether one of its users is root.
    pub fn is_root(&self) -> bool {
        self.uids.contains(&0)
    }

    /// Its command line as one text, or its name where it has none.
    pub fn command(&self) -> String {
        if self.arguments.is_empty() { format!("[{}]", self.name) } else { self.arguments.join(" ") }
    }

    /// The last part of the program's path, by what it shows as its first argument.
    pub fn program(&self) -> &str {
        let first = self.arguments.first().map_or(self.name.as_str(), String::as_str);
        let bare = first.rsplit('/').next().unwrap_or(first);
        // A login shell puts a dash before its name.
        bare.strip_prefix('-').unwrap_or(bare)
    }
}

fn stat(machine: &Machine, path: &str) -> Result<parse::StatLine, Hidden> {
    parse::stat(&machine.read(path)?).ok_or_else(|| Hidden::unclear(path, "it is no stat line"))
}
