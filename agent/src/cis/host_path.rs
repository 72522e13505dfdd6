//! What of the host a container's mounts show, read from its mountinfo.
//!
//! The kernel tells the path inside a file system, not the host's path. The files that the runtime itself mounts
//! (`/etc/hosts`) tell where the host's own file system is; what lies on the same device has its host path.

use std::collections::BTreeMap;

use sidewarden_proto::finding::Evidence;

use super::{PTRACE, Unseen};
use crate::facts::{Container, Mount, Seen, may_be_run};

/// A mount that shows something of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HostMount {
    /// Its path on the host.
    pub host: String,
    /// Where it is mounted.
    pub point: String,
}

/// What the mounts of a container show of its host.
#[derive(Clone, Debug, Default)]
pub(super) struct Exposure {
    /// What surely does.
    pub shown: Vec<HostMount>,
    /// What cannot be told, and why.
    pub unclear: Vec<Unclear>,
}

/// A mount of which nothing can be said, and what would show it.
#[derive(Clone, Debug)]
pub(super) struct Unclear {
    pub point: String,
    pub why: String,
    pub grant: &'static str,
}

const DECLARE: &str = "the Docker API of the host, which this agent does not have; or declare the mount point with `mounts` if it is intended";

/// File systems by which the kernel is controlled. Nobody mounts one by itself into a container: they come with the host's /sys.
const KERNEL_CONTROL: [&str; 8] =
    ["securityfs", "debugfs", "tracefs", "bpf", "pstore", "configfs", "efivarfs", "fusectl"];

impl HostMount {
    pub fn evidence(&self, source: &str) -> Evidence {
        Evidence::new(source, format!("{} is mounted at {}", self.host, self.point))
    }
}

impl Exposure {
    /// Reads it from `mounts`, which are those of `container`.
    pub fn of(container: &Container, mounts: &[Mount]) -> Exposure {
        let mut exposure = Exposure::default();
        let base = host_base(mounts);
        for m in mounts {
            exposure.add(container, mounts, base, m);
        }
        exposure
    }

    /// The first thing that could not be told, as an answer.
    pub fn unseen(&self, source: &str, matters: impl Fn(&str) -> bool) -> Option<Unseen> {
        let first = self.unclear.iter().find(|u| matters(&u.point))?;
        Some(Unseen::new(first.grant).with(vec![Evidence::new(source, format!("{}: {}", first.point, first.why))]))
    }

    fn show(&mut self, host: impl Into<String>, m: &Mount) {
        self.shown.push(HostMount { host: host.into(), point: m.point.clone() });
    }

    fn doubt(&mut self, m: &Mount, why: &str, grant: &'static str) {
        self.unclear.push(Unclear { point: m.point.clone(), why: why.into(), grant });
    }

    fn add(&mut self, container: &Container, all: &[Mount], base: Option<(&str, &str)>, m: &Mount) {
        match m.fs.as_str() {
            "proc" if !m.is_at_or_below("/proc") => self.show("/proc", m),
            "sysfs" if !m.is_at_or_below("/sys") => self.show("/sys", m),
            "cgroup" | "cgroup2" if !m.is_at_or_below("/sys/fs/cgroup") => self.show("/sys/fs/cgroup", m),
            "cgroup" if m.root == "/" && container.cgroup.path() != "/" => self.show("/sys/fs/cgroup", m),
            "devtmpfs" => self.show("/dev", m),
            fs if KERNEL_CONTROL.contains(&fs) => self.show(format!("/sys ({fs})"), m),
            "tmpfs" => self.add_tmpfs(all, &container.run_entries, m),
            _ if is_on_disk(m) && m.point != "/" => self.add_disk(base, m),
            _ => {}
        }
    }

    fn add_tmpfs(&mut self, all: &[Mount], entries: &BTreeMap<String, Seen<Vec<String>>>, m: &Mount) {
        if m.root != "/" {
            let own = all.iter().any(|other| other.device == m.device && other.root == "/" && !may_be_run(other));
            let runtime = [
                "/dev",
                "/proc",
                "/etc/hosts",
                "/etc/hostname",
                "/etc/resolv.conf",
                "/run/secrets",
                "/var/run/secrets",
            ];
            if !own && !runtime.iter().any(|p| m.is_at_or_below(p)) {
                self.show(format!("/run{}", m.root), m);
            }
            return;
        }
        if !may_be_run(m) {
            return;
        }
        // The directory that cgroups are mounted in is a tmpfs with the same mode, and has a `systemd` in it.
        let cgroup = |o: &Mount| matches!(o.fs.as_str(), "cgroup" | "cgroup2") && o.is_at_or_below(&m.point);
        if all.iter().any(cgroup) {
            return self.show("/sys/fs/cgroup", m);
        }
        let inside = |other: &Mount| other.fs == "nsfs" && other.point != m.point && other.is_at_or_below(&m.point);
        match entries.get(&m.point) {
            _ if all.iter().any(inside) => self.show("/run", m),
            Some(Seen::Known(names, _)) if names.iter().any(|n| is_in_run(n)) => self.show("/run", m),
            Some(Seen::Known(..)) => {}
            _ => self.doubt(m, "a tmpfs that may be the host's /run", PTRACE),
        }
    }

    fn add_disk(&mut self, base: Option<(&str, &str)>, m: &Mount) {
        match base {
            Some((device, prefix)) if device == m.device => {
                let host = format!("{prefix}{}", m.root);
                let host = if host.len() > 1 { host.trim_end_matches('/') } else { &host };
                self.show(host, m);
            }
            None => self.show(m.root.clone(), m),
            Some(_) if m.root == "/" => {
                self.doubt(m, "a whole file system: a volume of its own, or one of the host's", DECLARE)
            }
            // A disk of its own. It is the host's root where it has the directories of one.
            Some(_) => self.show(m.root.clone(), m),
        }
    }
}

fn is_on_disk(m: &Mount) -> bool {
    // Anonymous devices (major 0) are virtual file systems, but for those that keep several volumes on one disk.
    !m.device.starts_with("0:") || matches!(m.fs.as_str(), "btrfs" | "zfs" | "virtiofs" | "9p")
}

fn is_in_run(name: &str) -> bool {
    matches!(
        name,
        "docker.sock" | "docker" | "containerd" | "systemd" | "udev" | "dbus" | "crio" | "podman" | "initctl"
    )
}

/// The device that the host's files are on, and what must stand before a path in it: nothing when it is the host's root.
fn host_base(mounts: &[Mount]) -> Option<(&str, &str)> {
    let own =
        |m: &&Mount| matches!(m.point.as_str(), "/etc/hosts" | "/etc/hostname" | "/etc/resolv.conf") && is_on_disk(m);
    let m = mounts.iter().find(own)?;
    let prefix = match m.root.as_str() {
        root if root.starts_with("/lib/") && root.contains("/containers/") => "/var",
        root if root.starts_with("/docker/containers/") => "/var/lib",
        root if root.starts_with("/containers/") => "/var/lib/docker",
        _ => "",
    };
    Some((&m.device, prefix))
}

/// `path` without empty parts, `.` and `..`.
pub(super) fn plain_path(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// Whether `path` is `dir` or below it.
pub(super) fn is_below(path: &str, dir: &str) -> bool {
    path.strip_prefix(dir).is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || rest.starts_with(' '))
}
