//! A made-up machine, read as a real one is.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::*;

const STATUS: &str = "Umask:\t0022\nState:\tS (sleeping)\nTgid:\t1\nNgid:\t0\nPid:\t1\nPPid:\t0\nTracerPid:\t0\n\
    Uid:\t10001\t10001\t10001\t10001\nGid:\t10001\t10001\t10001\t10001\nFDSize:\t64\nGroups:\t10001 \nNSpid:\t1\n\
    Threads:\t1\nSigQ:\t0/96343\nSigPnd:\t0\nShdPnd:\t0\nSigBlk:\t0\nSigIgn:\t0\nSigCgt:\t0\nCapInh:\t0\nCapPrm:\t0\n\
    CapEff:\t0\nCapBnd:\t00000000a80425fb\nCapAmb:\t0\nNoNewPrivs:\t1\nSeccomp:\t2\n";

const MOUNTS: &str = "72 48 0:39 / / ro,relatime master:2 - overlay overlay rw\n\
    74 72 0:43 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755\n\
    75 72 0:31 /docker/w /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";

struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Tree {
        let tree = Tree(tempfile::tempdir().unwrap());
        tree.put("proc/sys/net/core/somaxconn", "4096");
        tree.put("proc/meminfo", "MemTotal: 1000 kB\n");
        tree.put("proc/filesystems", "nodev\tproc\n");
        fs::create_dir_all(tree.0.path().join("sys/module")).unwrap();
        tree.process(9, "/docker/us", "sidewarden-agen");
        symlink("9", tree.0.path().join("proc/self")).unwrap();
        tree
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn link(&self, path: &str, target: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    fn process(&self, pid: i32, cgroup: &str, name: &str) {
        let at = format!("proc/{pid}");
        self.put(
            &format!("{at}/stat"),
            &format!("{pid} ({name}) S 0 {pid} {pid} 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 {pid} 0 0"),
        );
        self.put(&format!("{at}/status"), &format!("Name:\t{name}\n{STATUS}"));
        self.put(&format!("{at}/cgroup"), &format!("4:memory:{cgroup}\n0::{cgroup}\n"));
        self.put(&format!("{at}/cmdline"), &format!("/bin/{name}\0--x\0"));
        self.put(&format!("{at}/mountinfo"), MOUNTS);
        let net = self.0.path().join("net-dev");
        if !net.exists() {
            fs::write(&net, "Inter-|\n face |\n    lo: 0\n  eth0: 0\n").unwrap();
        }
        fs::create_dir_all(self.0.path().join(format!("{at}/net"))).unwrap();
        fs::hard_link(&net, self.0.path().join(format!("{at}/net/dev"))).unwrap();
    }

    fn observe(&self) -> Facts {
        observe_below(self.0.path(), Mode::Sidecar)
    }
}

fn observe_below(root: &Path, mode: Mode) -> Facts {
    observe(root, &Subject { mode, cgroup: None }, &mut ListenerSight::new(Machine::new(root)))
}

#[test]
fn a_made_up_machine_is_read_as_a_real_one() {
    let tree = Tree::new();
    tree.process(1, "/docker/w", "nginx");
    tree.link("proc/1/ns/uts", "uts:[4026531838]");
    tree.put("proc/1/root/sys/fs/cgroup/memory/memory.limit_in_bytes", "4096\n");
    tree.put("proc/1/root/dev/null", "");
    let facts = tree.observe();
    let container = &facts.containers[0];
    assert_eq!((facts.containers.len(), facts.blind.as_str(), facts.vantage), (1, "", Vantage::SameUser));
    assert_eq!(container.processes[0].command(), "/bin/nginx --x");
    assert_eq!(container.processes[0].role, Role::First);
    assert_eq!(container.memory.known(), Some(&Limit::At(4096)));
    assert!(container.uts.known().unwrap().host);
    assert_eq!(
        container.device_rules,
        Seen::Hidden(Hidden::unclear("/proc/1/mountinfo", "no cgroup with devices is mounted"))
    );
    assert_eq!(facts.interfaces.known().unwrap(), &["lo", "eth0"]);
    assert_eq!((facts.apparmor.known(), facts.host_net.known()), (Some(&false), Some(&false)));
}

#[test]
fn what_is_not_there_is_hidden_and_says_why() {
    let tree = Tree::new();
    tree.process(1, "/docker/w", "nginx");
    let facts = tree.observe();
    assert_eq!(facts.vantage, Vantage::Open);
    assert_eq!(facts.containers[0].uts, Seen::Hidden(Hidden::missing("/proc/1/ns/uts")));
    assert!(facts.containers[0].limits.known().is_none());
    assert!(facts.listeners.known().is_none());
}

#[test]
fn broken_and_vanishing_processes_are_counted_and_do_not_stop_the_look() {
    let tree = Tree::new();
    tree.process(1, "/docker/w", "nginx");
    tree.put("proc/33/stat", "33 (");
    tree.put("proc/34/cmdline", "");
    tree.put("proc/35/stat", "");
    tree.process(36, "/docker/w", "half");
    tree.put("proc/36/status", "Name:\thalf\nUid:\tx");
    let facts = tree.observe();
    assert_eq!((facts.vanished, facts.containers.len(), facts.containers[0].processes.len()), (4, 1, 1));
}

#[test]
fn an_agent_that_sees_nobody_says_what_to_share() {
    assert!(Tree::new().observe().blind.contains("--pid=container:"));
    let tree = Tree::new();
    tree.process(1, "/docker/w", "nginx");
    fs::remove_file(tree.0.path().join("proc/1/net/dev")).unwrap();
    tree.put("proc/1/net/dev", "another network namespace");
    assert!(tree.observe().blind.contains("--network=container:"));
    assert!(!observe_below(Path::new("/nowhere"), Mode::Exec).blind.is_empty());
}

#[test]
fn the_real_machine_can_be_read() {
    let facts = observe_below(Path::new("/"), Mode::Exec);
    assert!(facts.total_memory.known().is_some_and(|bytes| *bytes > 1 << 20));
    assert!(facts.own_limits.known().is_some() && facts.own_cgroup.known().is_some());
}

/// How long one look at everything takes; by hand: `cargo test -p sidewarden-agent --release observe_costs -- --ignored --nocapture`.
#[test]
#[ignore = "not a test: a measurement"]
fn observe_costs() {
    let (root, subject) = (Path::new("/"), Subject { mode: Mode::Exec, cgroup: None });
    let mut listening = ListenerSight::new(Machine::new(root));
    let mut times: Vec<_> = (0..101)
        .map(|_| {
            let begun = std::time::Instant::now();
            let facts = observe(root, &subject, &mut listening);
            assert!(facts.total_memory.known().is_some());
            begun.elapsed()
        })
        .collect();
    times.sort();
    println!("median {:?}, best {:?}, worst {:?}", times[50], times[0], times[100]);
}
