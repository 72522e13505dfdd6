//! Facts about a container of this host as a node agent has them: what the engine says, and what the host's /proc shows of
//! the container's processes.

use std::sync::Arc;

use sidewarden_proto::event::{Mode, Protocol};
use sidewarden_proto::finding::Vantage;
use sidewarden_proto::identity::Sha256;

use super::container::Container;
use super::engine::{Engine, Host, Info, Network, Told};
use super::machine::Machine;
use super::parse;
use super::process::{Process, Role};
use super::seen::{Hidden, Seen, Why};
use super::{Facts, Lock, apparmor, initial, namespace_of, parsed, selinux, subject};

/// Every process of the host, as it was a moment ago.
#[derive(Debug, Default)]
pub struct Processes(Vec<Process>);

impl Processes {
    /// Reads all of them.
    pub fn read(machine: &Machine) -> Result<Processes, Hidden> {
        let all = machine.pids()?.into_iter().filter_map(|pid| Process::read(machine, pid, None).ok());
        Ok(Processes(all.collect()))
    }

    /// Those of the container `id`, oldest first, with their roles.
    fn of(&self, id: &str, first: i32) -> Vec<Process> {
        let ours = |p: &&Process| p.cgroup.names(id) && !p.is_runtime() && !p.zombie;
        let mut members: Vec<Process> = self.0.iter().filter(ours).cloned().collect();
        members.sort_by_key(|p| p.id);
        subject::give_roles(&mut members);
        for process in members.iter_mut().filter(|p| p.id.pid == first) {
            process.role = Role::First;
        }
        members
    }
}

/// Everything about the container `told`.
pub fn observe(machine: &Machine, host: &Arc<Host>, told: Told, processes: &Processes) -> Facts {
    let members = match told.inspect.runs() {
        true => processes.of(&told.inspect.id, told.inspect.state.pid),
        false => Vec::new(),
    };
    let container = |members: &[Process]| Container::observe(machine, Mode::Node, &members.iter().collect::<Vec<_>>());
    let containers: Vec<Container> = if members.is_empty() { Vec::new() } else { vec![container(&members)] };
    let host_net = containers.first().map(|c| host_net(machine, &c.anchor));
    Facts {
        blind: blind(machine),
        host_net: host_net.unwrap_or_else(|| hidden("it does not run")),
        containers,
        apparmor: apparmor(machine),
        selinux: selinux(machine),
        engine: Seen::Known(Engine { host: Arc::clone(host), container: Some(told) }, "Docker API".into()),
        ..nothing()
    }
}

/// The facts about the host alone.
pub fn of_the_host(host: &Arc<Host>) -> Facts {
    let engine = Engine { host: Arc::clone(host), container: None };
    Facts { engine: Seen::Known(engine, "Docker API".into()), ..nothing() }
}

/// No facts, for this reason.
pub fn unseen(why: &str) -> Facts {
    Facts { blind: why.into(), ..nothing() }
}

/// What a node agent does not read from its own place, which is no container's.
fn nothing() -> Facts {
    Facts {
        mode: Mode::Node,
        vantage: Vantage::Node,
        containers: Vec::new(),
        blind: String::new(),
        vanished: 0,
        host_net: hidden("it is not looked at"),
        listeners: hidden("from here they are the host's"),
        lock: Lock::Off,
        interfaces: hidden("from here they are the host's"),
        apparmor: hidden("it is not looked at"),
        selinux: hidden("it is not looked at"),
        total_memory: parsed(&Machine::new("/"), "/proc/meminfo", parse::total_memory),
        own_limits: hidden("a node agent's limits are nobody else's"),
        own_cgroup: hidden("a node agent's cgroup is nobody else's"),
        filter: hidden("the filter of another container cannot be tried from here"),
        engine: hidden("the engine does not answer"),
    }
}

fn hidden<T>(why: &str) -> Seen<T> {
    Seen::Hidden(Hidden::unclear("node agent", why))
}

fn blind(machine: &Machine) -> String {
    match namespace_of(machine, "/proc/self/ns/pid") {
        Ok(initial::PID) => "the container's processes, which are gone, or did not come up yet".into(),
        _ => "the host's PID namespace: run the node agent with --pid host".into(),
    }
}

/// Whether a process has the network of PID 1.
fn host_net(machine: &Machine, anchor: &str) -> Seen<bool> {
    let source = format!("{anchor}/ns/net");
    let both = namespace_of(machine, &source).and_then(|own| Ok(own == namespace_of(machine, "/proc/1/ns/net")?));
    Seen::at(source, both)
}

/// What is known of the host beside what `info` tells.
pub fn host(machine: &Machine, info: Info, networks: Seen<Vec<Network>>, secrets: Seen<usize>) -> Host {
    let swarm = info.swarm.local_node_state != "inactive";
    let number = |text: &str| text.trim().parse::<u64>().map_err(|e| e.to_string());
    Host {
        listeners: if swarm { listeners(machine) } else { hidden("without a swarm they do not matter") },
        pid_max: parsed(machine, "/proc/sys/kernel/pid_max", number),
        selinux_enforcing: parsed(machine, "/sys/fs/selinux/enforce", |t| Ok(t.trim() == "1")),
        info,
        networks,
        secrets,
    }
}

fn listeners(machine: &Machine) -> Seen<Vec<std::net::SocketAddr>> {
    let read = |path: &str| {
        let found = parse::sockets(&machine.read(path)?, Protocol::Tcp).map_err(|e| Hidden::unclear(path, e))?;
        Ok::<_, Hidden>(found.into_iter().map(|l| l.address).collect::<Vec<_>>())
    };
    let v6 = || match read("/proc/1/net/tcp6") {
        // A kernel without IPv6.
        Err(Hidden { why: Why::Missing, .. }) => Ok(Vec::new()),
        read => read,
    };
    let both = read("/proc/1/net/tcp").and_then(|v4| Ok([v4, v6()?].concat()));
    Seen::at("/proc/1/net/tcp", both)
}

/// The host, as a hash that every container of it can tell and others cannot guess; empty where it cannot be told.
pub fn name_of_host(machine: &Machine) -> String {
    let boot = machine.read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    match boot.trim() {
        "" => String::new(),
        boot => Sha256::of(&[b"sidewarden host ", boot.as_bytes()]).to_string(),
    }
}

/// The id that an engine gave a container: 64 hex digits in its cgroup's path, or in that of its /etc/hostname on the host.
pub fn container_id(container: &Container) -> Option<String> {
    let id = |text: &str| {
        let mut parts = text.rsplit(|c: char| !c.is_ascii_hexdigit()).filter(|part| part.len() == 64);
        parts.next().map(str::to_owned)
    };
    let files = ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"];
    let roots = container.mounts.known().into_iter().flatten().filter(|m| files.contains(&m.point.as_str()));
    id(container.cgroup.path()).or_else(|| roots.filter_map(|m| id(&m.root)).next_back())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::parse::Cgroup;

    fn process(pid: i32, ppid: i32, cgroup: &str) -> Process {
        let id = crate::facts::ProcessId { started: u64::try_from(pid).unwrap(), pid };
        let cgroup = Cgroup::parse(&format!("0::{cgroup}")).unwrap();
        Process { id, ppid, session: pid, cgroup, pid_depth: 2, ..Process::default() }
    }

    #[test]
    fn a_containers_processes_are_told_by_its_id() {
        let (a, b) = ("a".repeat(64), "b".repeat(64));
        let all = Processes(vec![
            process(1, 0, "/init.scope"),
            process(50, 1, "/system.slice/docker.service"),
            process(60, 50, &format!("/system.slice/docker-{a}.scope")),
            Process { session: 60, ..process(61, 60, &format!("/system.slice/docker-{a}.scope")) },
            process(70, 50, &format!("/docker/{b}")),
            process(80, 50, &format!("/system.slice/docker-{a}.scope")),
        ]);
        let got: Vec<(i32, Role)> = all.of(&a, 60).iter().map(|p| (p.id.pid, p.role)).collect();
        assert_eq!(got, [(60, Role::First), (61, Role::Inside), (80, Role::Entered)]);
        assert!(all.of(&"c".repeat(64), 1).is_empty());
    }

    #[test]
    fn listeners_of_the_host_are_known_only_where_both_lists_can_be_read() {
        const HEAD: &str =
            "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
        const REST: &str =
            "00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n";
        let v4 = format!("{HEAD}   0: 0100007F:0949 {REST}");
        let v6 = format!(
            "{HEAD}   0: 00000000000000000000000000000000:0949 00000000000000000000000000000000:0000 {}",
            REST.split_once(' ').unwrap().1
        );
        let check = |v6: Option<&str>, expected: Option<usize>| {
            let dir = tempfile::tempdir().unwrap();
            let net = dir.path().join("proc/1/net");
            std::fs::create_dir_all(&net).unwrap();
            std::fs::write(net.join("tcp"), &v4).unwrap();
            if let Some(text) = v6 {
                std::fs::write(net.join("tcp6"), text).unwrap();
            }
            let all = listeners(&Machine::new(dir.path()));
            assert_eq!(all.known().map(Vec::len), expected, "{v6:?}: {all:?}");
        };
        check(None, Some(1));
        check(Some(&v6), Some(2));
        check(Some(HEAD), Some(1));
        check(Some(&format!("{HEAD}   0: nonsense\n")), None);
        check(Some(&"x".repeat(5 << 20)), None);
    }

    #[test]
    fn a_container_knows_its_own_id() {
        let id = "0123456789abcdef".repeat(4);
        let mut sample = crate::cis::sample::Sample::sound();
        let container = sample.container();
        assert_eq!(container_id(container), None, "the sample's ids are short");
        for path in [format!("/docker/{id}"), format!("/system.slice/docker-{id}.scope"), format!("/../{id}")] {
            container.cgroup = Cgroup::parse(&format!("0::{path}")).unwrap();
            assert_eq!(container_id(container), Some(id.clone()), "{path}");
        }
        container.cgroup = Cgroup::parse("0::/").unwrap();
        let line = format!("9 1 254:0 /var/lib/docker/containers/{id}/hostname /etc/hostname rw - ext4 /dev/vda rw\n");
        container.mounts = Seen::Known(parse::mounts(&line).unwrap(), "m".into());
        assert_eq!(container_id(container), Some(id));
    }
}
