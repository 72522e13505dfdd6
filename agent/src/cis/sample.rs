//! A sound container to spoil in tests: hardened, seen with CAP_SYS_PTRACE.

use std::collections::BTreeMap;

use sidewarden_proto::event::Mode;

use super::*;
use crate::facts::engine::{self, Image, ImageInspect, Layer, MountPoint, Network, PortBinding, Swarm};
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
    /// Whose network the container has, where it is not its own.
    joined: Option<Inspect>,
}

/// The time of the sample's judgements: 2026-11-22.
pub(crate) const NOW: Timestamp = Timestamp::from_secs(1_795_305_600);

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
            engine: hidden(),
        };
        let history = History { unbroken: true, ..History::default() };
        let mut sample = Sample { facts, declared: Declared::default(), history, joined: None };
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

    fn engine(&mut self) -> &mut Engine {
        if self.facts.engine.known().is_none() {
            let (host, container) = (Arc::new(host()), Some(told()));
            self.facts.engine = known(Engine { host, container });
        }
        let Seen::Known(engine, _) = &mut self.facts.engine else { panic!("it is known now") };
        engine
    }

    fn told_all(&mut self) -> &mut Told {
        self.engine().container.get_or_insert_with(told)
    }

    /// What the engine says of the container; from now on there is an engine.
    pub fn told(&mut self) -> &mut Inspect {
        Arc::make_mut(&mut self.told_all().inspect)
    }

    /// The engine tells of the container, as sound as it is.
    pub fn asked(&mut self) {
        self.told();
    }

    /// The host alone is judged, a manager of a swarm.
    pub fn in_a_swarm(&mut self) {
        self.told_swarm();
    }

    /// What it says of the image.
    pub fn told_image(&mut self) -> &mut Image {
        let Seen::Known(image, _) = &mut self.told_all().image else { panic!("the image is hidden") };
        Arc::make_mut(image)
    }

    /// What it says of the host.
    pub fn told_host(&mut self) -> &mut Host {
        Arc::make_mut(&mut self.engine().host)
    }

    /// The host alone is judged.
    pub fn only_the_host(&mut self) {
        self.facts.containers.clear();
        self.engine().container = None;
    }

    /// The same, with a swarm that it manages.
    pub fn told_swarm(&mut self) -> &mut Swarm {
        self.only_the_host();
        let swarm = &mut self.told_host().info.swarm;
        (swarm.local_node_state, swarm.control_available) = ("active".into(), true);
        swarm
    }

    pub fn cluster(&mut self, json: &str) {
        self.told_swarm().cluster = Some(serde_json::from_str(json).unwrap());
    }

    /// The swarm's root was made `days` ago.
    pub fn swarm_root(&mut self, days: i64) {
        let mut params = rcgen::CertificateParams::new(vec!["swarm-ca".into()]).unwrap();
        let begun = Timestamp(NOW.0 - days * 86_400_000_000);
        params.not_before = std::time::SystemTime::from(begun).into();
        let pem = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem();
        let text = serde_json::json!({"TLSInfo": {"TrustRoot": pem}}).to_string();
        self.cluster(&text);
    }

    pub fn host_listens(&mut self, address: &str) {
        self.told_host().listeners = known(vec![address.parse().unwrap()]);
    }

    pub fn networks(&mut self, overlays: &[(&str, &[(&str, &str)])]) {
        let options = |all: &[(&str, &str)]| all.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let network = |(name, all): &(&str, &[(&str, &str)])| Network {
            name: (*name).into(),
            driver: "overlay".into(),
            ingress: *name == "ingress",
            options: options(all),
        };
        self.told_host().networks = known(overlays.iter().map(network).collect());
    }

    /// The container was made and not started.
    pub fn before_its_start(&mut self) {
        self.facts.containers.clear();
        let state = &mut self.told().state;
        (state.status, state.pid, state.health) = ("created".into(), 0, None);
    }

    /// The container joined the network of another one.
    pub fn told_network_of(&mut self, change: fn(&mut Inspect)) {
        let mut other: Inspect = serde_json::from_str(engine::tests::INSPECT).unwrap();
        (other.id, other.name) = ("0".repeat(64), "/owner".into());
        change(&mut other);
        self.told().host_config.network_mode = "container:owner".into();
        self.joined = Some(other);
    }

    pub fn told_bridge(&mut self) {
        bridge(self.told());
    }

    pub fn told_mount(&mut self, source: &str, destination: &str) {
        let (kind, propagation) = ("bind".into(), "rprivate".into());
        let mount = MountPoint { kind, source: source.into(), destination: destination.into(), propagation };
        self.told().mounts.push(mount);
    }

    pub fn told_port(&mut self, ip: &str, port: &str) {
        map_port(self.told(), ip, port);
    }

    pub fn told_history(&mut self, line: &str) {
        self.told_image().history.insert(0, Layer { created_by: line.into(), size: 0 });
    }

    pub fn told_label(&mut self, name: &str, value: &str) {
        self.told_image().inspect.config.labels.insert(name.into(), value.into());
    }

    pub fn health(&mut self, word: &str) {
        self.told().state.health = Some(engine::Health { status: word.into() });
    }

    /// Somebody answers for `check`, still or no longer.
    pub fn attest(&mut self, check: &str, still: bool) {
        let until = if still { NOW.plus(Duration::from_secs(9)) } else { NOW };
        let promise = Promise { check: check.into(), container: None, by: "ops".into(), why: "seen".into(), until };
        self.declared.attestations.push(promise);
    }

    /// Whose namespaces the container has, as a census would find out.
    fn settle(&mut self) {
        let joined = self.joined.clone().map(Arc::new);
        let Seen::Known(Engine { container: Some(told), .. }, _) = &mut self.facts.engine else { return };
        told.network = known(joined.unwrap_or_else(|| told.inspect.clone()));
        (told.pid, told.ipc) = (known(told.inspect.clone()), known(told.inspect.clone()));
    }

    pub fn case(&mut self) -> Case<'_> {
        self.settle();
        Case { facts: &self.facts, declared: &self.declared, history: &self.history, now: NOW }
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
        judge_all(&self.clone().case())
    }
}

fn told() -> Told {
    let inspect: Arc<Inspect> = Arc::new(serde_json::from_str(engine::tests::INSPECT).unwrap());
    let image = ImageInspect {
        id: "sha256:cf22".into(),
        repo_digests: vec!["registry.example/shop/orders@sha256:aa".into()],
        repo_tags: Vec::new(),
        created: "2026-11-12T00:00:00Z".into(),
        config: serde_json::from_str(r#"{"Env":["PATH=/usr/bin"],"User":"10001","Healthcheck":{"Test":["CMD","/h"]}}"#)
            .unwrap(),
    };
    let line = |text: &str| Layer { created_by: text.into(), size: 1 };
    let history = vec![
        line("/bin/sh -c #(nop) CMD [\"app\"]"),
        line("COPY app / # buildkit"),
        line("ADD rootfs.tar / # buildkit"),
    ];
    Told {
        network: known(inspect.clone()),
        pid: known(inspect.clone()),
        ipc: known(inspect.clone()),
        image: known(Arc::new(Image { inspect: image, history, files: hidden() })),
        inspect,
    }
}

fn host() -> Host {
    Host {
        info: serde_json::from_str(engine::tests::INFO).unwrap(),
        networks: hidden(),
        secrets: hidden(),
        listeners: hidden(),
        pid_max: known(4_194_304),
        selinux_enforcing: hidden(),
    }
}

/// Puts a container on Docker's default bridge.
pub(crate) fn bridge(inspect: &mut Inspect) {
    let networks = &mut inspect.network_settings.networks;
    networks.clear();
    networks.insert("bridge".into(), serde::de::IgnoredAny);
}

/// Maps one port of a container.
pub(crate) fn map_port(inspect: &mut Inspect, ip: &str, port: &str) {
    let binding = PortBinding { host_ip: ip.into(), host_port: port.into() };
    inspect.network_settings.ports = [("8443/tcp".to_owned(), Some(vec![binding]))].into();
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
        let case = sample.case();
        let got = check.promised(&case, check.judge(&case));
        assert_eq!(got.verdict.word(), *expected, "{}: {what}: {:?}", check.slug, got);
        if let Verdict::Unknown { grant } = &got.verdict {
            assert!(!grant.is_empty(), "{}: {what}: unknown without a grant", check.slug);
        }
    }
}

/// Judges `check`, prepared so, with somebody who answers for it still, and no longer.
pub(crate) fn check_attested(check: &Check, prepare: fn(&mut Sample)) {
    for (still, expected) in [(true, "pass"), (false, "unknown")] {
        let mut sample = Sample::sound();
        prepare(&mut sample);
        sample.attest(check.slug, still);
        let case = sample.case();
        let got = check.promised(&case, check.judge(&case));
        assert_eq!(got.verdict.word(), expected, "{}: attested {still}: {got:?}", check.slug);
    }
}
