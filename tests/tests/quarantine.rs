//! A workload that breaks a gate of the policy is off the data plane, in touch with its collector, and comes back.

#[allow(dead_code)]
#[path = "hostile/mint.rs"]
mod mint;
#[allow(dead_code)]
mod world;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use sidewarden_collector::fleet;
use sidewarden_collector::index::Record;
use sidewarden_proto::directive::Release;
use sidewarden_proto::event::{Body, GateStatus};
use sidewarden_proto::identity::AgentId;
use sidewarden_proto::time::Timestamp;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use world::{Agent, World, echo, eventually, hook, inbound, outbound, says};

/// What an agent sees of a made-up machine: itself, and a workload that may gain privileges or not.
struct Machine(TempDir);

impl Machine {
    fn new() -> Machine {
        let machine = Machine(TempDir::new().unwrap());
        machine.put("proc/sys/net/core/somaxconn", "4096");
        machine.put("proc/meminfo", "MemTotal: 1000 kB\n");
        machine.put("proc/filesystems", "nodev\tproc\n");
        machine.put("proc/loadavg", "0.1 0.1 0.1 1/2 9\n");
        fs::create_dir_all(machine.0.path().join("sys/module")).unwrap();
        machine.process(9, "/docker/us", "sidewarden-agen", true);
        symlink("9", machine.0.path().join("proc/self")).unwrap();
        machine.process(1, "/docker/w", "nginx", true);
        machine
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        // A reader sees the old or the new text, never half of one.
        let new = path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, path).unwrap();
    }

    fn process(&self, pid: i32, cgroup: &str, name: &str, no_new_privs: bool) {
        let at = format!("proc/{pid}");
        let stat = format!("{pid} ({name}) S 0 {pid} {pid} 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 {pid} 0 0");
        self.put(&format!("{at}/stat"), &stat);
        self.put(&format!("{at}/status"), &status(pid, name, no_new_privs));
        self.put(&format!("{at}/cgroup"), &format!("4:memory:{cgroup}\n0::{cgroup}\n"));
        self.put(&format!("{at}/cmdline"), &format!("/bin/{name}\0--x\0"));
        self.put(&format!("{at}/mountinfo"), "72 48 0:39 / / ro,relatime master:2 - overlay overlay rw\n");
        let net = self.0.path().join("net-dev");
        if !net.exists() {
            fs::write(&net, "Inter-|\n face |\n    lo: 0\n").unwrap();
        }
        fs::create_dir_all(self.0.path().join(format!("{at}/net"))).unwrap();
        fs::hard_link(&net, self.0.path().join(format!("{at}/net/dev"))).unwrap();
    }

    /// A process is there that was not, a child of `parent`.
    fn starts(&self, pid: i32, parent: i32, name: &str) {
        self.process(pid, "/docker/w", name, true);
        let stat = format!("{pid} ({name}) S {parent} {pid} {pid} 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 {pid} 0 0");
        self.put(&format!("proc/{pid}/stat"), &stat);
        self.put("proc/loadavg", &format!("0.1 0.1 0.1 1/2 {pid}\n"));
    }

    /// From now on the workload may gain privileges, or no more.
    fn lets_gain_privileges(&self, so: bool) {
        self.put("proc/1/status", &status(1, "nginx", !so));
    }
}

fn status(pid: i32, name: &str, no_new_privs: bool) -> String {
    format!(
        "Name:\t{name}\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t{pid}\nNgid:\t0\nPid:\t{pid}\nPPid:\t0\n\
         TracerPid:\t0\nUid:\t10001\t10001\t10001\t10001\nGid:\t10001\t10001\t10001\t10001\nFDSize:\t64\n\
         Groups:\t10001 \nNSpid:\t{pid}\nThreads:\t1\nSigQ:\t0/96343\nSigPnd:\t0\nShdPnd:\t0\nSigBlk:\t0\nSigIgn:\t0\nSigCgt:\t0\nCapInh:\t0\nCapPrm:\t0\nCapEff:\t0\n\
         CapBnd:\t00000000a80405fb\nCapAmb:\t0\nNoNewPrivs:\t{}\nSeccomp:\t2\n",
        u8::from(no_new_privs)
    )
}

fn gate(more: &str) -> String {
    format!(
        "[[gate]]\nname = 'no-gain'\nworkloads = ['shop/orders']\nchecks = ['no-new-privileges']\nhold = '2s'\n{more}\n"
    )
}

fn apply(world: &World, text: &str) -> u64 {
    let core = &world.collector().core;
    let (text, why, by) = (text.to_owned(), "test".to_owned(), "test".to_owned());
    let asked = fleet::Application { text, why, by, restores: None, confirmed: false };
    fleet::apply(&core.issuer, &core.directives, &core.fleet, asked, Timestamp::now()).unwrap().1
}

async fn runs(agent: &Agent, version: u64) {
    let mut identity = agent.app.identity.clone();
    let newest = identity.wait_for(|identity| identity.as_ref().is_some_and(|i| i.directive_version() >= version));
    tokio::time::timeout(Duration::from_secs(60), newest).await.expect("the directive in time").unwrap();
}

/// web → orders, which watches a machine of its own.
async fn shop(world: &World) -> (Agent, Agent, Machine) {
    let machine = Machine::new();
    let rules = format!("watch.posture_interval = '1s'\n{}", inbound(echo().await, "shop/web"));
    world.hand_token("orders-1", &world.token("shop/orders", 1, Duration::from_secs(600)));
    let orders = world.agent_below("orders-1", &rules, Some(machine.0.path().to_owned())).await;
    let web = world.agent("web-1", "shop/web", &outbound(orders.inbound(), "shop/orders")).await;
    orders.enrolled().await;
    web.enrolled().await;
    world.event("posture.baseline", |record| record.agent.workload.path() == "shop/orders").await;
    (web, orders, machine)
}

async fn gets_through(web: &Agent) -> bool {
    let Ok(mut socket) = TcpStream::connect(web.app.addresses.outbound[0]).await else { return false };
    says(&mut socket, b"hello").await.is_ok_and(|answer| answer == b"hello")
}

async fn comes_back(web: &Agent) {
    let again = async || gets_through(web).await.then_some(());
    eventually(|| "it does not come back".into(), again).await;
}

/// Waits until the collector has told that `orders-1` stands so.
async fn told(world: &World, status: GateStatus) {
    world
        .event("quarantine.changed", |record| {
            matches!(Body::from_raw(&record.kind, &record.body), Ok(Some(Body::QuarantineChanged(c))) if c.status == status)
        })
        .await;
}

async fn is_cut(mut live: TcpStream) {
    let end = tokio::time::timeout(Duration::from_secs(60), live.read(&mut [0; 1])).await.expect("an end in time");
    assert!(matches!(end, Err(_) | Ok(0)), "{end:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_that_breaks_a_gate_is_off_the_data_plane_until_it_has_kept_it_for_the_hold() {
    let (hook, bodies) = hook().await;
    let world = World::start_with(&format!("[[alerts.webhooks]]\nurl = 'http://{hook}/'")).await;
    let (web, orders, machine) = shop(&world).await;
    let version = apply(&world, &gate(""));
    runs(&orders, version).await;
    machine.lets_gain_privileges(true);
    told(&world, GateStatus::DryRun).await;
    let mut live = web.dial().await;
    assert_eq!(says(&mut live, b"hello").await.unwrap(), b"hello", "a dry run stops nobody");
    apply(&world, &gate("enforce = true"));
    told(&world, GateStatus::Capped).await;
    assert_eq!(says(&mut live, b"still").await.unwrap(), b"still", "the only instance is let be");
    apply(&world, &gate("enforce = true\nleave = 0"));
    told(&world, GateStatus::Quarantined).await;
    is_cut(live).await;
    assert!(!gets_through(&web).await);
    let refused = world.event("connection.refused", |record| record.summary.contains("quarantined")).await;
    assert!(refused.body.get().contains("no-gain"), "{}", refused.body.get());
    let agent: AgentId = "spiffe://sidewarden.internal/shop/orders#orders-1".parse().unwrap();
    assert!(world.collector().core.fleet.live(&agent).is_some(), "its way to the collector is never cut");
    let alert = async || bodies.lock().unwrap().iter().find(|body| body.contains("WorkloadQuarantined")).cloned();
    let alert = eventually(|| format!("no alert among {:#?}", bodies.lock().unwrap()), alert).await;
    assert!(alert.contains("no-new-privileges") && alert.contains("quarantine release"), "{alert}");
    machine.lets_gain_privileges(false);
    told(&world, GateStatus::Clear).await;
    comes_back(&web).await;
}

/// A certificate of `ca` in files of `dir`, and the settings that name them.
fn given(dir: &Path, ca: &mint::Authority, path: &str) -> String {
    mint::given(dir, ca, &format!("spiffe://sidewarden.internal/{path}"))
}

/// SPIRE gives the instances of a workload on one host one key. Peers refuse all of them by it, so all of them count.
#[tokio::test(flavor = "multi_thread")]
async fn instances_with_one_key_are_quarantined_together_or_not_at_all() {
    let (dir, ca) = (TempDir::new().unwrap(), mint::Authority::root("the company"));
    let world = World::start_with(&given(&dir.path().join("collector"), &ca, "sidewarden/collector")).await;
    let shared = given(&dir.path().join("orders"), &ca, "shop/orders");
    let machines = [Machine::new(), Machine::new(), Machine::new()];
    let mut orders = Vec::new();
    for (number, machine) in machines.iter().enumerate() {
        // The third has a key of its own.
        let own = given(&dir.path().join("third"), &ca, "shop/orders");
        let identity = if number == 2 { &own } else { &shared };
        let rules = format!("{identity}watch.posture_interval = '1s'\n{}", inbound(echo().await, "shop/web"));
        orders.push(world.agent_of(&format!("orders-{number}"), &rules, Some(machine.0.path().to_owned())).await);
    }
    let mut webs = Vec::new();
    for (number, orders) in orders.iter().enumerate() {
        let rules =
            format!("{}{}", given(&dir.path().join("web"), &ca, "shop/web"), outbound(orders.inbound(), "shop/orders"));
        webs.push(world.agent_of(&format!("web-{number}"), &rules, None).await);
    }
    for number in 0..3 {
        let name = format!("orders-{number}");
        world.event("posture.baseline", |record| record.agent.instance.as_str() == name).await;
    }
    apply(&world, &gate("enforce = true"));
    machines[0].lets_gain_privileges(true);
    let capped = world.event("quarantine.changed", |record| record.summary.contains("no more may be stopped")).await;
    assert!(capped.summary.contains("its key is also that of orders-1"), "{}", capped.summary);
    for web in &webs {
        comes_back(web).await;
    }
    apply(&world, &gate("enforce = true\nmax_per_workload = 2"));
    told(&world, GateStatus::Quarantined).await;
    for web in &webs[..2] {
        eventually(|| "who shares the key is let in".into(), async || (!gets_through(web).await).then_some(())).await;
    }
    assert!(gets_through(&webs[2]).await, "another key is another instance");
    machines[0].lets_gain_privileges(false);
    for web in &webs {
        comes_back(web).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_lets_a_quarantined_instance_in_for_a_while() {
    let world = World::start().await;
    let (web, _orders, machine) = shop(&world).await;
    apply(&world, &gate("enforce = true\nleave = 0"));
    machine.lets_gain_privileges(true);
    told(&world, GateStatus::Quarantined).await;
    let gone = async || (!gets_through(&web).await).then_some(());
    eventually(|| "it is still let in".into(), gone).await;
    let agent: AgentId = "spiffe://sidewarden.internal/shop/orders#orders-1".parse().unwrap();
    let until_us = Timestamp::now().plus(Duration::from_secs(3_600));
    let release = Release { workload: agent.workload, instance: agent.instance, why: "needed now".into(), until_us };
    let core = &world.collector().core;
    fleet::release(&core.issuer, &core.directives, release, Timestamp::now()).unwrap();
    told(&world, GateStatus::Clear).await;
    comes_back(&web).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_without_collector_goes_by_the_last_policy() {
    let mut world = World::start().await;
    let (web, orders, machine) = shop(&world).await;
    let version = apply(&world, &gate("enforce = true\nleave = 0"));
    runs(&orders, version).await;
    runs(&web, version).await;
    world.stop_collector().await;
    assert!(gets_through(&web).await, "a dead collector is no outage");
    machine.lets_gain_privileges(true);
    let gone = async || (!gets_through(&web).await).then_some(());
    eventually(|| "it is still let in".into(), gone).await;
    machine.lets_gain_privileges(false);
    comes_back(&web).await;
    world.start_collector_again().await;
    world.event("quarantine.alone", |record| record.summary.contains("without a collector's word by the gate")).await;
    world.event("quarantine.alone", |record| record.summary.contains("let back in")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_in_the_container_closes_a_gate_until_its_hold_is_over() {
    let world = World::start().await;
    let (web, orders, machine) = shop(&world).await;
    let gate = |hold: &str| {
        format!(
            "[[gate]]\nname = 'no-shell'\nworkloads = ['shop/orders']\nevents = ['shell']\nhold = '{hold}'\n\
             enforce = true\nleave = 0\n"
        )
    };
    runs(&orders, apply(&world, &gate("1h"))).await;
    let mut live = web.dial().await;
    assert_eq!(says(&mut live, b"hello").await.unwrap(), b"hello");
    machine.starts(20, 1, "sh");
    told(&world, GateStatus::Quarantined).await;
    is_cut(live).await;
    let gone = async || (!gets_through(&web).await).then_some(());
    eventually(|| "it is still let in".into(), gone).await;
    let refused = world.event("connection.refused", |record| record.body.get().contains("no-shell")).await;
    assert!(refused.body.get().contains("shell"), "{}", refused.body.get());
    // What has happened cannot be mended: it is over when it is long enough ago.
    apply(&world, &gate("1s"));
    told(&world, GateStatus::Clear).await;
    comes_back(&web).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn egress_and_plaintext_stop_with_the_quarantine_too() {
    let world = World::start().await;
    let (machine, place) = (Machine::new(), echo().await);
    let rules = format!(
        "watch.posture_interval = '1s'\n{}permissive = {{ reason = 'moving', until = '2099-01-01' }}\n\
         [egress]\nlisten = '127.0.0.1:0'\nallow = ['{place}']\n",
        inbound(echo().await, "shop/web")
    );
    world.hand_token("orders-1", &world.token("shop/orders", 1, Duration::from_secs(600)));
    let orders = world.agent_below("orders-1", &rules, Some(machine.0.path().to_owned())).await;
    orders.enrolled().await;
    runs(&orders, apply(&world, &gate("enforce = true\nleave = 0"))).await;
    let plainly = async || {
        let mut socket = TcpStream::connect(orders.inbound()).await.ok()?;
        says(&mut socket, b"hello").await.ok().map(|_| socket)
    };
    let outside = async || {
        let mut socket = TcpStream::connect(orders.app.addresses.egress[0]).await.ok()?;
        let ask = format!("CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n");
        socket.write_all(ask.as_bytes()).await.ok()?;
        let mut answer = [0; 39];
        socket.read_exact(&mut answer).await.ok()?;
        answer.starts_with(b"HTTP/1.1 200").then_some(socket)
    };
    let plain = eventually(|| "plaintext is not let in".into(), plainly).await;
    let mut out = eventually(|| "there is no way out".into(), outside).await;
    assert_eq!(says(&mut out, b"hello").await.unwrap(), b"hello");

    machine.lets_gain_privileges(true);
    told(&world, GateStatus::Quarantined).await;
    is_cut(plain).await;
    is_cut(out).await;
    let closed = async || (plainly().await.is_none() && outside().await.is_none()).then_some(());
    eventually(|| "something still gets through".into(), closed).await;
    for way in ["inbound", "egress"] {
        let is_it = |record: &Record| {
            let body = record.body.get();
            body.contains("quarantined by the gate no-gain") && body.contains(&format!("\"direction\":\"{way}\""))
        };
        world.event("connection.refused", is_it).await;
    }
    machine.lets_gain_privileges(false);
    told(&world, GateStatus::Clear).await;
    eventually(|| "plaintext does not come back".into(), plainly).await;
    eventually(|| "the way out does not come back".into(), outside).await;
}

/// How many agents the measurement has, and how often it quarantines.
const FLEET: usize = 100;
const ROUNDS: usize = 10;

/// `cargo test --release -p sidewarden-tests --test quarantine -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "not a test: a measurement of how long a quarantine takes over a hundred agents"]
async fn measure_from_quarantined_to_refused() {
    let world = World::start().await;
    let mut servers = Vec::new();
    let mut routes = String::from("watch.posture_interval = '1s'\n");
    for number in 0..FLEET {
        let server = world.agent(&format!("orders-{number}"), "shop/orders", &inbound(echo().await, "shop/web")).await;
        routes += &outbound(server.inbound(), "shop/orders");
        servers.push(server);
    }
    let machine = Machine::new();
    world.hand_token("web-1", &world.token("shop/web", 1, Duration::from_secs(600)));
    let web = world.agent_below("web-1", &routes, Some(machine.0.path().to_owned())).await;
    for server in servers.iter().chain([&web]) {
        server.enrolled().await;
    }
    let text = "[[gate]]\nname = 'no-gain'\nworkloads = ['shop/web']\nchecks = ['no-new-privileges']\nhold = '1s'\n\
                enforce = true\nleave = 0\n";
    let version = apply(&world, text);
    for server in &servers {
        runs(server, version).await;
    }
    let (mut cut, mut applied) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        let mut live = Vec::new();
        for address in &web.app.addresses.outbound {
            let dial = async || {
                let mut socket = TcpStream::connect(address).await.ok()?;
                says(&mut socket, b"hello").await.ok().map(|_| socket)
            };
            live.push(eventually(|| "it is not let in".into(), dial).await);
        }
        let ends: Vec<_> = live
            .into_iter()
            .map(|socket| {
                tokio::spawn(async move {
                    is_cut(socket).await;
                    Instant::now()
                })
            })
            .collect();
        machine.lets_gain_privileges(true);
        // The verdict is told when the agent next looks; what counts here is the time from then.
        let broken = async || {
            let is_it = |record: &&Record| {
                let body = record.body.get();
                record.agent.workload.path() == "shop/web"
                    && body.contains("\"check\":\"no-new-privileges\"")
                    && body.contains("\"verdict\":\"fail\"")
            };
            let told = world.events("verdict.changed").await;
            (told.iter().filter(is_it).count() >= round).then(Instant::now)
        };
        let begun = eventually(|| "the verdict does not change".into(), broken).await;
        let quarantined =
            async || (!world.collector().core.directives.now().directive.quarantined.is_empty()).then_some(());
        eventually(|| "it is not quarantined".into(), quarantined).await;
        let version = world.collector().core.directives.now().directive.version;
        for server in &servers {
            runs(server, version).await;
        }
        applied.push(begun.elapsed());
        for end in ends {
            cut.push(end.await.unwrap().saturating_duration_since(begun));
        }
        machine.lets_gain_privileges(false);
        let free = async || world.collector().core.directives.now().directive.quarantined.is_empty().then_some(());
        eventually(|| "it is not let in again".into(), free).await;
        let version = world.collector().core.directives.now().directive.version;
        for server in &servers {
            runs(server, version).await;
        }
    }
    tell("from the verdict at the collector to the end of a live connection", cut);
    tell("from the verdict at the collector to the last of the agents refusing", applied);
}

fn tell(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)].as_secs_f64() * 1e3;
    let count = times.len();
    println!(
        "{what}: {count} samples over {FLEET} agents, p50 {:.1} ms, p99 {:.1} ms, most {:.1} ms",
        at(50),
        at(99),
        at(100)
    );
}
