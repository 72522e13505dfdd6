//! A collector in process on free ports, with a shop that never existed: what the page, the API, alerts and metrics
//! are tested on.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::sync::Arc;
use std::time::Duration;

use sidewarden_collector::app::{self, App};
use sidewarden_collector::commit::Progress;
use sidewarden_collector::config;
use sidewarden_proto::batch::{Batch, Cursor, Epoch, Link};
use sidewarden_proto::event::*;
use sidewarden_proto::finding::{CisIds, Evidence, Finding, Remedy, Vantage, Verdict};
use sidewarden_proto::identity::{AgentId, Sha256};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls;
use tokio::sync::watch;

/// Everything in these tests ends by then, or the test fails.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A running collector and its directory.
pub struct Scene {
    pub app: App,
    pub dir: tempfile::TempDir,
}

/// Starts a collector; `more` is added to its configuration.
pub async fn start(more: &str) -> Scene {
    let dir = tempfile::tempdir().unwrap();
    let app = start_in(dir.path(), more).await;
    Scene { app, dir }
}

/// The same, in a directory that may have been used before.
pub async fn start_in(dir: &std::path::Path, more: &str) -> App {
    let text = format!(
        "[agents]\nlisten = '127.0.0.1:0'\n[api]\nlisten = '127.0.0.1:0'\n[metrics]\nlisten = '127.0.0.1:0'\n{more}"
    );
    let mut settings = config::read(&text, &|_| None).unwrap();
    settings.data_dir = dir.join("data");
    settings.instance = "test".into();
    app::start(settings, Timestamp::now).await.unwrap()
}

/// An agent that exists only as a name; it keeps its place in its chain.
pub struct Agent {
    pub id: Arc<AgentId>,
    epoch: Epoch,
    at: Cursor,
}

impl Agent {
    pub fn new(name: &str) -> Agent {
        let id: AgentId = format!("spiffe://sidewarden.internal/{name}").parse().unwrap();
        let hash = Sha256::of(&[name.as_bytes()]);
        let mut epoch = [0; 16];
        epoch.copy_from_slice(&hash.0[..16]);
        Agent { id: Arc::new(id), epoch: Epoch(epoch), at: Cursor { seq: 0, hash: Sha256::ZERO } }
    }

    /// Has `events` committed.
    pub async fn send(&mut self, app: &App, mut events: Vec<Event>) {
        let batch = Batch::seal(self.epoch, self.at.seq + 1, self.at.hash, &mut events).unwrap();
        let link = Link::Batch(batch);
        self.at = Cursor { seq: link.last_seq(), hash: link.hash() };
        let (progress, mut seen) = watch::channel(Progress::Committed(Cursor { seq: 0, hash: Sha256::ZERO }));
        app.core.commits.link(self.id.clone(), Timestamp::now(), link, progress).await.unwrap();
        let done = seen.wait_for(|p| !matches!(p, Progress::Committed(c) if c.seq < self.at.seq));
        let done = tokio::time::timeout(LIMIT, done).await.unwrap().unwrap().clone();
        assert_eq!(done, Progress::Committed(self.at));
    }

    /// Connects: a certificate, a session, a start.
    pub async fn connect(&mut self, app: &App, mode: Mode, vantage: Vantage) {
        let (workload, instance) = (self.id.workload.clone(), self.id.instance.to_string());
        let not_after_us = Timestamp::now().plus(Duration::from_secs(86_400));
        let issued = CertificateIssued {
            workload: workload.clone(),
            instance: instance.clone(),
            serial: "1f".into(),
            spki: Sha256::ZERO.to_string(),
            not_after_us,
            by: "token".into(),
        };
        own(app, Severity::Info, "certificate issued", issued).await;
        let connected = AgentConnected {
            workload,
            instance,
            source: "172.18.0.4:40112".into(),
            transport: "quic".into(),
            version: "0.1.0".into(),
            clock_ahead_us: 0,
            mode: String::new(),
            certificate: Some(ShownCertificate {
                serial: "1f".into(),
                spki: Sha256::ZERO.to_string(),
                not_before_us: not_after_us.minus(Duration::from_secs(if name_has(&self.id, "db") {
                    340_000
                } else {
                    90_000
                })),
                not_after_us,
                elsewhere: name_has(&self.id, "db"),
            }),
        };
        own(app, Severity::Info, "agent connected", connected).await;
        let started = AgentStarted { version: "0.1.0".into(), mode, vantage, clean: true, heartbeat_secs: 5 };
        self.send(app, vec![event(Severity::Notice, "agent started", started)]).await;
    }

    pub async fn disconnect(&self, app: &App, clean: bool) {
        let gone = AgentDisconnected {
            workload: self.id.workload.clone(),
            instance: self.id.instance.to_string(),
            reason: "connection lost: timed out".into(),
            clean,
        };
        own(app, Severity::Notice, "agent disconnected", gone).await;
    }
}

/// The database has its certificates from another CA, and the last one is old.
fn name_has(id: &AgentId, service: &str) -> bool {
    id.workload.path().ends_with(service)
}

/// An event of the collector itself.
pub async fn own(app: &App, severity: Severity, summary: &str, body: impl Into<Body>) {
    app.core.commits.own(event(severity, summary, body)).await.unwrap();
    app.core.commits.flush().await.unwrap();
}

pub fn event(severity: Severity, summary: &str, body: impl Into<Body>) -> Event {
    Event::new(Timestamp::now(), severity, summary, &body.into())
}

pub fn plaintext(source: &str) -> Event {
    let reason = RefusalReason::Plaintext;
    let body = ConnectionRefused {
        direction: Direction::Inbound,
        reason,
        detail: "GET /orders HTTP/1.1".into(),
        hint: reason.hint().into(),
        listener: "0.0.0.0:8443".into(),
        source: source.into(),
        peer: String::new(),
        count: 1,
    };
    event(Severity::Warning, &format!("refused plaintext from {source}"), body)
}

pub fn finding(check: &str, id: &str, title: &str, severity: Severity, verdict: Verdict, line: &str) -> Finding {
    Finding {
        check: check.into(),
        ids: CisIds { v1_3_1: id.into(), v1_6: String::new() },
        title: title.into(),
        severity,
        verdict,
        evidence: if line.is_empty() { vec![] } else { vec![Evidence::new("/proc/7/status", line)] },
        remedy: Remedy {
            docker_run: "--cap-drop ALL --security-opt no-new-privileges".into(),
            compose: "cap_drop: [ALL]\nsecurity_opt: [no-new-privileges:true]".into(),
            kubernetes: "securityContext:\n  capabilities:\n    drop: [ALL]".into(),
        },
        vantage: Vantage::Open,
    }
}

fn unknown(grant: &str) -> Verdict {
    Verdict::Unknown { grant: grant.into() }
}

/// What a well-kept container looks like from beside it.
pub fn posture(bad: bool) -> Vec<Finding> {
    let broken = |verdict| if bad { Verdict::Fail } else { verdict };
    let node = "run a node agent on this host";
    let ptrace = "cap_add: [SYS_PTRACE] and user: \"0\" for the agent";
    use Severity::*;
    let rows: Vec<(&str, &str, &str, Severity, Verdict, &str)> = vec![
        (
            "non-root",
            "4.1",
            "the workload does not run as root",
            Warning,
            Verdict::Pass,
            "Uid: 10001 10001 10001 10001",
        ),
        (
            "apparmor",
            "5.1",
            "an AppArmor profile is in force",
            Notice,
            Verdict::NotApplicable { why: "the host has no AppArmor".into() },
            "",
        ),
        (
            "capabilities",
            "5.3",
            "Linux capabilities are restricted to what is needed",
            Warning,
            broken(Verdict::Pass),
            "CapBnd: 00000000a82425fb (cap_sys_admin, cap_net_raw, …)",
        ),
        ("privileged", "5.4", "the container is not privileged", Critical, Verdict::Pass, "CapBnd: 00000000a80425fb"),
        (
            "host-mounts",
            "5.5",
            "no sensitive host directory is mounted",
            Critical,
            broken(Verdict::Pass),
            "/ /hostroot rw — host root directory",
        ),
        (
            "no-sshd",
            "5.6",
            "no SSH server runs in the container",
            Warning,
            Verdict::Pass,
            "14 processes, none of them sshd",
        ),
        ("privileged-ports", "5.7", "no privileged host port is mapped", Warning, unknown(node), ""),
        (
            "open-ports",
            "5.8",
            "only needed ports are open",
            Warning,
            Verdict::Pass,
            "127.0.0.1:8080, 0.0.0.0:8443 (agent)",
        ),
        (
            "host-network",
            "5.9",
            "the host's network namespace is not shared",
            Critical,
            Verdict::Pass,
            "net:[4026532281]",
        ),
        ("memory-limit", "5.10", "memory use is limited", Warning, unknown(ptrace), ""),
        ("cpu-priority", "5.11", "CPU priority is set", Notice, unknown(ptrace), ""),
        (
            "read-only-root",
            "5.12",
            "the root file system is read-only",
            Warning,
            Verdict::Fail,
            "overlay / rw,relatime",
        ),
        ("host-bindings", "5.13", "incoming traffic is bound to one interface", Notice, unknown(node), ""),
        ("restart-policy", "5.14", "restarts on failure are limited to five", Notice, unknown(node), ""),
        (
            "host-pid",
            "5.15",
            "the host's PID namespace is not shared",
            Critical,
            broken(Verdict::Pass),
            "pid:[4026531836] is the host's",
        ),
        (
            "seccomp",
            "5.21",
            "a seccomp profile filters system calls",
            Warning,
            unknown("mode exec, or a node agent"),
            "Seccomp: 2",
        ),
        (
            "no-new-privileges",
            "5.25",
            "processes cannot gain privileges",
            Warning,
            if bad {
                Verdict::Fail
            } else {
                Verdict::Waived {
                    by: "platform team".into(),
                    why: "vendor image needs sudo until 2.4".into(),
                    until: Timestamp::now().plus(Duration::from_secs(86_400 * 30)),
                }
            },
            "NoNewPrivs: 0",
        ),
        ("pids-limit", "5.28", "the number of processes is limited", Warning, unknown(ptrace), ""),
        (
            "docker-socket",
            "5.31",
            "the Docker socket is not mounted in the container",
            Critical,
            broken(Verdict::Pass),
            "/run/docker.sock /var/run/docker.sock rw",
        ),
    ];
    rows.into_iter()
        .map(|(check, id, title, severity, verdict, line)| finding(check, id, title, severity, verdict, line))
        .collect()
}

/// A shop under attack.
pub async fn shop(app: &App) -> Vec<Agent> {
    let mut web = Agent::new("shop/web#web-1");
    let mut orders = Agent::new("shop/orders#orders-1");
    let mut second = Agent::new("shop/orders#orders-2");
    let mut db = Agent::new("shop/db#db-1");
    let mut rogue = Agent::new("shop/rogue#rogue-1");
    for agent in [&mut web, &mut orders, &mut second, &mut db] {
        agent.connect(app, Mode::Sidecar, Vantage::Open).await;
        let baseline = PostureBaseline { findings: posture(false), ..Default::default() };
        agent.send(app, vec![event(Severity::Info, "posture: 8 pass, 1 fail, 7 unknown", baseline)]).await;
    }
    rogue.connect(app, Mode::Exec, Vantage::SameUser).await;
    let baseline = PostureBaseline { findings: posture(true), ..Default::default() };
    rogue.send(app, vec![event(Severity::Critical, "posture: 6 fail", baseline)]).await;
    let peer = |peer: &str| PeerFirstSeen {
        direction: Direction::Inbound,
        peer: peer.into(),
        address: "172.18.0.5:50122".into(),
        tls_version: "TLSv1_3".into(),
        group: "X25519MLKEM768".into(),
    };
    orders
        .send(
            app,
            vec![event(
                Severity::Notice,
                "first connection of shop/web, TLSv1_3 X25519MLKEM768",
                peer("spiffe://sidewarden.internal/shop/web"),
            )],
        )
        .await;
    orders.send(app, vec![plaintext("172.18.0.1:47112"), plaintext("172.18.0.9:33810")]).await;
    let entered = ProcessEntered {
        process: ProcessInfo {
            pid: 71,
            ppid: 0,
            uid: 0,
            name: "sh".into(),
            command: "sh -c id".into(),
            parent: String::new(),
        },
        as_root: true,
        privileged: false,
        declared: String::new(),
    };
    orders.send(app, vec![event(Severity::Critical, "somebody entered as root and ran `sh -c id`", entered)]).await;
    let shell = ProcessShell {
        process: ProcessInfo {
            pid: 82,
            ppid: 9,
            uid: 10001,
            name: "sh".into(),
            command: "sh -c <script>alert(1)</script>".into(),
            parent: "orders".into(),
        },
    };
    web.send(
        app,
        vec![event(Severity::Warning, "the service started a shell: <script>document.title='owned'</script>", shell)],
    )
    .await;
    let reason = RefusalReason::UnknownCa;
    let foreign = ConnectionRefused {
        direction: Direction::Inbound,
        reason,
        detail: "CN=evil".into(),
        hint: reason.hint().into(),
        listener: "0.0.0.0:3307".into(),
        source: "172.18.0.1:51200".into(),
        peer: "spiffe://evil.test/web".into(),
        count: 2,
    };
    db.send(app, vec![event(Severity::Warning, "refused a certificate of a foreign CA from 172.18.0.1", foreign)])
        .await;
    vec![web, orders, second, db, rogue]
}

/// An HTTP client that trusts this collector's CA only.
pub fn client(app: &App) -> reqwest::Client {
    let builder = reqwest::Client::builder().tls_backend_preconfigured(tls_config(app)).no_proxy();
    builder.redirect(reqwest::redirect::Policy::none()).timeout(LIMIT).build().unwrap()
}

pub fn tls_config(app: &App) -> rustls::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(app.core.issuer.authority().root().clone()).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(tls::provider()).with_safe_default_protocol_versions();
    config.unwrap().with_root_certificates(roots).with_no_client_auth()
}

pub fn token(app: &App) -> String {
    std::fs::read_to_string(app.core.config.data_dir.join("admin.token")).unwrap().trim().to_owned()
}

/// Asks the API, with the right token.
pub async fn ask(app: &App, path: &str) -> serde_json::Value {
    serde_json::from_str(&read(app, path).await).unwrap()
}

/// The same, whatever form the answer has.
pub async fn read(app: &App, path: &str) -> String {
    let url = format!("https://127.0.0.1:{}{path}", app.api.port());
    let answer = client(app).get(url).bearer_auth(token(app)).send().await.unwrap();
    let (status, text) = (answer.status(), answer.text().await.unwrap());
    assert!(status.is_success(), "{path}: {status} {text}");
    text
}

/// Waits until `done` gives something, or fails with what it was waited for.
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut done: impl FnMut() -> F) -> T {
    let end = tokio::time::Instant::now() + LIMIT;
    loop {
        if let Some(found) = done().await {
            return found;
        }
        assert!(tokio::time::Instant::now() < end, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The path of a program these tests need, or a loud end.
pub fn program(name: &str, package: &str) -> Option<std::path::PathBuf> {
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&dirs).map(|dir| dir.join(name)).find(|path| path.is_file());
    if found.is_none() && std::env::var_os("SIDEWARDEN_ALLOW_SKIP").is_some_and(|v| v == "1") {
        eprintln!("\n**** SKIPPED: {name} is not installed (package {package}) ****\n");
        return None;
    }
    assert!(found.is_some(), "{name} is not installed: apt-get install {package}, or set SIDEWARDEN_ALLOW_SKIP=1");
    found
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A program that ends with the test.
pub struct Running(pub std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
