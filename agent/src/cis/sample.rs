//! A sound container to spoil in tests: hardened, seen with CAP_SYS_PTRACE.

use std::collections::BTreeMap;

use sidewarden_proto::event::Mode;

use super::*;
use crate::facts::parse::{self, Cgroup};
use crate::facts::{
    Device, FilterProbe, Hidden, Limit, Listener, Lock, Namespace, Process, ProcessId, Role, Speech, Why,
};

/// Facts, declarations and history that a test may change before it asks.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub facts: Facts,
    pub declared: Declared,
    pub history: History,
}

/// The mounts of a container of Docker's with a read-only root.
pub(crate) const MOUNTS: &str = "72 48 0:39 / / ro,relatime master:2 - overlay overlay rw\n\
73 72 0:42 / /proc rw,nosuid - proc proc rw\n\
74 72 0:43 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755\n\
75 74 0:44 / /dev/pts rw - devpts devpts rw\n\
76 72 0:45 / /sys ro,nosuid - sysfs sysfs ro\n\
77 76 0:46 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
81 77 0:32 /docker/add509 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n\
87 74 0:41 / /dev/mqueue rw - mqueue mqueue rw\n\
88 74 0:47 / /dev/shm rw - tmpfs shm rw,size=65536k\n\
89 72 254:0 /var/lib/docker/containers/add509/resolv.conf /etc/resolv.conf rw - ext4 /dev/vda rw\n\
90 72 254:0 /var/lib/docker/containers/add509/hostname /etc/hostname rw - ext4 /dev/vda rw\n\
91 72 254:0 /var/lib/docker/containers/add509/hosts /etc/hosts rw - ext4 /dev/vda rw\n\
92 72 254:0 /var/lib/docker/volumes/data/_data /data rw - ext4 /dev/vda rw\n\
52 73 0:42 /sys /proc/sys ro - proc proc rw\n\
53 73 0:48 / /proc/acpi ro - tmpfs tmpfs ro\n\
54 73 0:43 /null /proc/keys rw - tmpfs tmpfs rw,size=65536k,mode=755\n";

fn known<T>(value: T) -> Seen<T> {
    Seen::Known(value, "/proc/1/file".into())
}

fn process() -> Process {
    Process {
        id: ProcessId { started: 100, pid: 1 },
        name: "nginx".into(),
        arguments: vec!["nginx".into()],
        uids: [10001; 4],
        gids: [10001; 4],
        cap_bounding: 0xa804_05fb,
        seccomp: Some(2),
        no_new_privs: Some(true),
        pid_depth: 1,
        cgroup: Cgroup::parse("4:memory:/docker/add509\n").unwrap(),
        same_net: true,
        role: Role::First,
        ..Process::default()
    }
}

fn container() -> Container {
    let own = Namespace { inode: 4_026_532_190, host: false };
    Container {
        processes: vec![process()],
        cgroup: process().cgroup,
        anchor: "/proc/1".into(),
        mounts: known(parse::mounts(MOUNTS).unwrap()),
        pid: known(own),
        ipc: known(own),
        uts: known(own),
        user: known(own),
        uid_map: known(vec![(0, 200_000, 65536)]),
        label: known("docker-default (enforce)".into()),
        limits: known(vec![("Max open files".into(), "1024".into(), "20000".into())]),
        devices: known(vec![Device { path: "/dev/null".into(), kind: 'c', major: 1, minor: 3 }]),
        device_rules: known(vec!["c *:* m".into(), "c 1:3 rwm".into()]),
        memory: known(Limit::At(256 << 20)),
        cpu: known(crate::facts::Cpu { weighted: true, limited: false, text: "512; -1".into() }),
        pids: known(Limit::At(100)),
        run_entries: BTreeMap::new(),
    }
}

impl Sample {
    pub fn sound() -> Sample {
        let facts = Facts {
            mode: Mode::Sidecar,
            vantage: Vantage::Ptrace,
            containers: vec![container()],
            blind: String::new(),
            vanished: 0,
            host_net: known(false),
            listeners: known(Vec::new()),
            lock: Lock::Off,
            interfaces: known(vec!["lo".into(), "eth0".into()]),
            apparmor: known(true),
            selinux: known(false),
            total_memory: known(8 << 30),
            own_limits: known(vec![("Max open files".into(), "1024".into(), "20000".into())]),
            own_cgroup: known(Cgroup::parse("4:memory:/docker/us\n").unwrap()),
            filter: known(FilterProbe { unshare_refused: true, setns_refused: true }),
        };
        let history = History { unbroken: true, ..History::default() };
        let mut sample = Sample { facts, declared: Declared::default(), history };
        sample.listen("127.0.0.11:4711");
        sample
    }

    pub fn container(&mut self) -> &mut Container {
        &mut self.facts.containers[0]
    }

    pub fn first(&mut self) -> &mut Process {
        &mut self.container().processes[0]
    }

    /// Adds a TCP listener that speaks TLS.
    pub fn listen(&mut self, address: &str) -> &mut Listener {
        let Seen::Known(listeners, _) = &mut self.facts.listeners else { panic!("the listeners are hidden") };
        let (address, speech) = (address.parse().unwrap(), Some(Speech::Tls));
        listeners.push(Listener { address, uid: 10001, inode: 7, speech, ..Listener::default() });
        listeners.last_mut().unwrap()
    }

    /// Adds a mount to the container, as a line of mountinfo without its first two fields.
    pub fn mount(&mut self, line: &str) {
        let Seen::Known(mounts, _) = &mut self.container().mounts else { return };
        mounts.extend(parse::mounts(&format!("99 72 {line}\n")).unwrap());
    }

    pub fn hide_everything(&mut self) {
        let f = &mut self.facts;
        (f.host_net, f.apparmor, f.selinux) = (hidden(), hidden(), hidden());
        (f.listeners, f.interfaces, f.total_memory, f.own_limits) = (hidden(), hidden(), hidden(), hidden());
        f.filter = hidden();
        self.history.unbroken = false;
        let c = self.container();
        (c.pid, c.ipc, c.uts, c.user) = (hidden(), hidden(), hidden(), hidden());
        (c.mounts, c.uid_map, c.label, c.limits) = (hidden(), hidden(), hidden(), hidden());
        (c.devices, c.device_rules, c.memory, c.pids) = (hidden(), hidden(), hidden(), hidden());
        c.cpu = hidden();
    }

    pub fn judge_all(&self) -> Vec<Finding> {
        judge_all(&Case { facts: &self.facts, declared: &self.declared, history: &self.history })
    }
}

pub(crate) fn hidden<T>() -> Seen<T> {
    Seen::Hidden(Hidden { source: "/proc/1/file".into(), why: Why::Denied })
}

/// What to change on a sound container, and the word of the verdict then.
pub(crate) type Row = (&'static str, fn(&mut Sample), &'static str);

/// Judges `check` for each row.
pub(crate) fn check_rows(check: &Check, rows: &[Row]) {
    for (what, spoil, expected) in rows {
        let mut sample = Sample::sound();
        spoil(&mut sample);
        let case = Case { facts: &sample.facts, declared: &sample.declared, history: &sample.history };
        let got = check.judge(&case);
        assert_eq!(got.verdict.word(), *expected, "{}: {what}: {:?}", check.slug, got);
        if let Verdict::Unknown { grant } = &got.verdict {
            assert!(!grant.is_empty(), "{}: {what}: unknown without a grant", check.slug);
        }
    }
}
