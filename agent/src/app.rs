//! Puts the agent together, hands back where it listens, and takes it apart again in the right order.
//!
//! Tests call the same function with port 0.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sidewarden_proto::backoff::{Random, part_of};
use sidewarden_proto::event::{AgentStarted, AgentStopping, Body, Direction, Event, Mode, Severity, WorkloadExited};
use sidewarden_proto::finding::Vantage;
use sidewarden_proto::given::Elsewhere;
use sidewarden_proto::identity::{BadName, InstanceId};
use sidewarden_proto::time::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::admin::{self, Admin};
use crate::cis::Declared;
use crate::config::{Config, TrustAll};
use crate::dial::Resolver;
use crate::facts::{self, ListenerSight, Machine, Subject};
use crate::identity::foreign::Foreign;
use crate::identity::keeper::{Keeper, KeeperError, Parts, Renewal, Source};
use crate::identity::{Current, Store, StoreError, Terms};
use crate::intercept::{self, InterceptError};
use crate::metrics::Metrics;
use crate::node::{self, NodeConfig};
use crate::proxy::egress::{CredentialsError, read_credentials};
use crate::proxy::own::Own;
use crate::proxy::{self, BindError, Listeners, Shared};
use crate::respond::{self, Observed};
use crate::spool::{Limits, Opened, Spool, SpoolError, Writer};
use crate::uplink::drive::HEARTBEAT_SECS;
use crate::uplink::{GO_HOME, SharedStatus, Uplink};
use crate::watch::{View, Watch, WatchConfig};

/// Of the time to drain, what is kept for sending the last events.
const FOR_LAST_EVENTS: Duration = Duration::from_secs(3);
/// Events in memory while the disk takes nothing.
const SPOOL_MEMORY: u64 = 4 << 20;
/// Links of the spool, each about a hundred bytes of memory.
const SPOOL_LINKS: usize = 32_768;
/// How often the whole posture is told, changed or not; less a part, so that a fleet does not tell it as one.
const BASELINE_EVERY: Duration = Duration::from_secs(24 * 3600);

/// What to start.
pub struct Setup {
    /// How we stand beside the workload.
    pub mode: Mode,
    /// What we are told.
    pub config: Config,
    /// Where /proc and /sys are found, `/`; `None` watches nothing.
    pub root: Option<PathBuf>,
    /// The workload runs as the agent's own user: what is on disk is not hidden from it.
    pub shares_user: bool,
    /// Randomness.
    pub random: Random,
}

/// Why the agent does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The hostname names no instance.
    #[error("this machine's name cannot be the instance's: {0}: set `instance`")]
    Instance(BadName),
    /// The spool.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// What is kept of the identity.
    #[error("the identity on disk: {0}")]
    Store(#[from] StoreError),
    /// The same.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// A listener.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The credentials for the upstream proxy.
    #[error("`egress.upstream_credentials_file`: {0}")]
    Credentials(#[from] CredentialsError),
    /// With the rules of `intercept` it would not work.
    #[error(transparent)]
    Intercept(#[from] InterceptError),
    /// A node agent beside a proxy.
    #[error(
        "a node agent has the container engine's socket, and so never carries anybody's traffic: remove `{0}` from its configuration"
    )]
    NotBesideAProxy(&'static str),
    /// The watch's thread.
    #[error("the watch's thread cannot be started: {0}")]
    Watch(std::io::Error),
}

/// Where the agent listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// In the order of the configuration.
    pub inbound: Vec<SocketAddr>,
    /// The same.
    pub outbound: Vec<SocketAddr>,
    /// For egress: the one that clients know, then those for redirected connections.
    pub egress: Vec<SocketAddr>,
    /// Health and metrics.
    pub admin: SocketAddr,
}

/// A running agent.
pub struct App {
    /// Where it listens.
    pub addresses: Addresses,
    /// Its identity, for whoever waits for one.
    pub identity: Current,
    /// How it stands with the collectors.
    pub uplink: SharedStatus,
    emit: Emit,
    spool: Spool,
    writer: Writer,
    shared: Arc<Shared>,
    drain: Duration,
    proxying: JoinHandle<()>,
    watching: Option<Watch>,
    stop_watching: CancellationToken,
    talking: JoinHandle<()>,
    stop_talking: CancellationToken,
    /// The keeper and the admin listener, which need no farewell.
    rest: Vec<JoinHandle<()>>,
    stop_rest: CancellationToken,
}

type Emit = Arc<dyn Fn(Event) + Send + Sync>;

/// Starts the agent. On return it accepts connections, with the identity that was on disk.
pub async fn start(setup: Setup) -> Result<App, StartError> {
    let Setup { mode, config, root, shares_user, random } = setup;
    if mode == Mode::Node {
        never_beside_a_proxy(&config)?;
    }
    intercept::check_ourselves(&config, mode == Mode::Exec && config.exec.user.is_none())?;
    let instance = instance(&config)?;
    check_credentials(&config)?;
    let listeners = Listeners::bind(&config).await?;
    let admin_listener = proxy::bind(config.admin.listen, "the admin endpoint").await?;
    let (inbound, outbound) = listeners.addresses();
    let admin_address = admin_listener.local_addr().unwrap_or(config.admin.listen);
    let egress = listeners.egress_addresses();
    let addresses = Addresses { inbound, outbound, egress, admin: admin_address };

    let limits = Limits { disk_bytes: config.limits.spool.0, memory_bytes: SPOOL_MEMORY, links: SPOOL_LINKS };
    let (spool, writer, opened) = Spool::open(&config.spool_dir(), limits, random, Timestamp::now)?;
    let metrics = Arc::new(Metrics::new(env!("CARGO_PKG_VERSION")));
    let emit = emit_into(&spool, &metrics);
    let observed = Observed::default();
    let resolver = Resolver::from_system();

    let (renewals, renewal_requests) = mpsc::channel(1);
    let keeping = Keeping { config: &config, instance: &instance, shares_user, random };
    let (keeper, identity) = keeping.load(resolver.clone(), emit.clone(), renewals)?;

    let mut shared = Shared::new(&config, identity.clone(), resolver.clone(), emit.clone(), metrics.clone(), random);
    let (holding, held) = watch::channel(None);
    shared.holding = held;
    shared.directive_is_unread = keeper.directive_is_unread();
    shared.own = Own::new([&addresses.outbound[..], &addresses.egress, &[addresses.admin]].concat());
    let shared = Arc::new(shared);
    let proxying = tokio::spawn(listeners.serve(shared.clone()));

    let stop_watching = CancellationToken::new();
    let watching = start_watch(mode, &config, root, &observing(&emit, &observed), &opened, &stop_watching)?;
    shared.begun.cancel();
    let view = watching.as_ref().map(|watch| watch.view.clone());

    let (stop_talking, stop_rest) = (CancellationToken::new(), CancellationToken::new());
    let (directives, incoming_directives) = watch::channel(Vec::new());
    let uplink_status = SharedStatus::default();
    let responding = respond::Parts {
        instance: instance.clone(),
        identity: identity.clone(),
        uplink: uplink_status.clone(),
        observed,
        emit: emit.clone(),
        holding,
    };
    let uplink = Uplink {
        collectors: config.collector.addresses.clone(),
        instance,
        identity: identity.clone(),
        spool: spool.clone(),
        resolver,
        renewals: renewal_requests,
        directives,
        metrics: metrics.clone(),
        random,
        go_home: GO_HOME,
        mode,
        status: uplink_status.clone(),
    };
    let talking = tokio::spawn(uplink.run(stop_talking.clone()));
    let admin = Admin {
        identity: identity.clone(),
        trouble: keeper.trouble(),
        uplink: uplink_status.clone(),
        spool: spool.clone(),
        metrics,
        connections: shared.registry.clone(),
        view: view.clone(),
        stopping: shared.stop.clone(),
    };
    let rest = vec![
        tokio::spawn(keeper.run(incoming_directives, stop_rest.clone())),
        tokio::spawn(admin::serve(admin_listener, Arc::new(admin), stop_rest.clone())),
        tokio::spawn(renew_baseline(spool.clone(), view, random, stop_rest.clone())),
        tokio::spawn(respond::run(responding, stop_rest.clone())),
    ];
    tracing::info!(?addresses, "the agent accepts connections");
    Ok(App {
        addresses,
        identity,
        uplink: uplink_status,
        emit,
        spool,
        writer,
        shared,
        drain: config.timeouts.drain,
        proxying,
        watching,
        stop_watching,
        talking,
        stop_talking,
        rest,
        stop_rest,
    })
}

impl App {
    /// Tells that the wrapped command has ended.
    pub fn workload_exited(&self, code: i32) {
        let severity = if code == 0 { Severity::Notice } else { Severity::Warning };
        let summary = format!("the workload's command ended with code {code}");
        (self.emit)(Event::new(Timestamp::now(), severity, summary, &WorkloadExited { code }.into()));
    }

    /// Ends in order, within the time to drain: no new connections, live ones to their end or cut, the last events out.
    pub async fn stop(self, reason: &str) {
        tracing::info!(reason, "the agent ends");
        self.shared.stop.cancel();
        let mut proxying = self.proxying;
        let patience = self.drain.saturating_sub(FOR_LAST_EVENTS).max(self.drain / 2);
        if timeout(patience, &mut proxying).await.is_err() {
            tracing::info!(live = self.shared.registry.len(), "cutting the connections that are still live");
            self.shared.cut.cancel();
            log_panic(proxying.await);
        }
        self.stop_watching.cancel();
        if let Some(watch) = self.watching {
            join_thread(watch.thread).await;
        }
        let body = Body::from(AgentStopping { reason: reason.to_owned() });
        (self.emit)(Event::new(Timestamp::now(), Severity::Notice, format!("the agent ends: {reason}"), &body));
        self.spool.flush().await;
        self.stop_talking.cancel();
        log_panic(self.talking.await);
        self.stop_rest.cancel();
        for task in self.rest {
            log_panic(task.await);
        }
        let writer = self.writer;
        log_panic(tokio::task::spawn_blocking(move || writer.finish()).await);
    }
}

fn log_panic(result: Result<(), tokio::task::JoinError>) {
    if let Err(error) = result {
        tracing::error!(%error, "a task ended by a panic");
    }
}

async fn join_thread(thread: std::thread::JoinHandle<()>) {
    match tokio::task::spawn_blocking(move || thread.join()).await {
        Ok(Ok(())) => {}
        _ => tracing::error!("the watch's thread ended by a panic"),
    }
}

/// Whoever breaks into a proxy must not find the engine's socket there.
fn never_beside_a_proxy(config: &Config) -> Result<(), StartError> {
    let carries = [
        ("inbound", !config.inbound.is_empty()),
        ("outbound", !config.outbound.is_empty()),
        ("egress.listen", config.egress.listen.is_some()),
        ("egress.transparent_listen", !config.egress.transparent_listen.is_empty()),
        ("intercept", config.intercept.is_on()),
    ];
    match carries.iter().find(|(_, is_set)| *is_set) {
        Some((key, _)) => Err(StartError::NotBesideAProxy(key)),
        None => Ok(()),
    }
}

fn instance(config: &Config) -> Result<InstanceId, StartError> {
    if let Some(instance) = &config.instance {
        return Ok(instance.clone());
    }
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().parse().map_err(StartError::Instance)
}

fn emit_into(spool: &Spool, metrics: &Arc<Metrics>) -> Emit {
    let (spool, metrics) = (spool.clone(), metrics.clone());
    Arc::new(move |event: Event| {
        metrics.event(event.severity);
        if event.severity >= Severity::Warning {
            tracing::warn!(kind = %event.kind, severity = %event.severity, "{}", event.summary);
        } else {
            tracing::debug!(kind = %event.kind, severity = %event.severity, "{}", event.summary);
        }
        spool.emit(event);
    })
}

/// The same for what the watch tells, which gates of the policy ask about.
fn observing(emit: &Emit, observed: &Observed) -> Emit {
    let (emit, observed) = (emit.clone(), observed.clone());
    Arc::new(move |event: Event| {
        observed.take(&event);
        emit(event);
    })
}

/// What the keeper is made from.
struct Keeping<'a> {
    config: &'a Config,
    instance: &'a InstanceId,
    shares_user: bool,
    random: Random,
}

impl Keeping<'_> {
    fn load(
        self,
        resolver: Resolver,
        emit: Emit,
        renewals: mpsc::Sender<Renewal>,
    ) -> Result<(Keeper, Current), StartError> {
        let Keeping { config, instance, shares_user, random } = self;
        let (home, groups) = (config.collector.trust_domain.clone(), config.tls.groups.clone());
        let terms = Terms { foreign: Foreign::default(), home, groups };
        if let (true, Some(Elsewhere::Files(files))) = (shares_user, &config.identity) {
            tracing::warn!(key = %files.key.display(), "the workload runs as the agent's own user and can read the private key: set exec.user");
        }
        let store = if shares_user && config.identity.is_none() {
            tracing::warn!(
                "the workload runs as the agent's own user and could read a key on disk: the key is kept in memory, and each start needs a token; set exec.user to avoid both"
            );
            Store::in_memory()
        } else {
            Store::open(&config.data_dir)?
        };
        let source = Source {
            collectors: config.collector.addresses.clone(),
            token_file: config.collector.token_file.clone(),
            workload: config.collector.workload.clone(),
            instance: instance.clone(),
            elsewhere: config.identity.clone(),
            foreign: config.trust.clone(),
        };
        Ok(Keeper::load(store, Parts { source, resolver, terms, emit, random, renewals })?)
    }
}

/// Tells that the agent has started, and then starts the watch, so that its baseline comes after.
fn start_watch(
    mode: Mode,
    config: &Config,
    root: Option<PathBuf>,
    emit: &Emit,
    opened: &Opened,
    stop: &CancellationToken,
) -> Result<Option<Watch>, StartError> {
    let subject = Subject { mode, cgroup: config.watch.subject.clone() };
    let seen_from = root.as_deref().unwrap_or(Path::new("/"));
    let vantage = match mode {
        Mode::Node => Vantage::Node,
        _ => facts::observe(seen_from, &subject, &mut ListenerSight::new(Machine::new(seen_from))).vantage,
    };
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let body = AgentStarted { version, mode, vantage, clean: opened.clean, heartbeat_secs: HEARTBEAT_SECS };
    let after = if opened.clean { "" } else { ", after a run that did not end in order" };
    let summary = format!("the agent started in {} mode{after}", mode.word());
    let severity = if opened.clean { Severity::Info } else { Severity::Notice };
    emit(Event::new(Timestamp::now(), severity, summary, &body.into()));
    let Some(root) = root else { return Ok(None) };
    if mode == Mode::Node {
        let emit = emit.clone();
        let node = NodeConfig::new(config, root);
        return node::start(node, move |event| emit(event), stop.clone()).map(Some).map_err(StartError::Watch);
    }
    let watch = WatchConfig {
        root,
        tick: config.watch.tick,
        posture_interval: config.watch.posture_interval,
        declared: declared(config),
        intercept: intercept::ruleset(config),
        normal: config.watch.normal.clone(),
        ..WatchConfig::new(subject)
    };
    let emit = emit.clone();
    Watch::start(watch, move |event| emit(event), stop.clone()).map(Some).map_err(StartError::Watch)
}

/// What the operator intends, and what no intention excuses.
fn declared(config: &Config) -> Declared {
    let in_words = |(direction, place, TrustAll { reason, until }): (Direction, String, TrustAll)| {
        format!("{} {place}: insecure_trust_all until {until}: {reason}", direction.word())
    };
    Declared { trusting_all: config.trusting_all().into_iter().map(in_words).collect(), ..config.declared.clone() }
}

/// After events were lost, the whole posture is told anew; and once a day, so that a collector that keeps events for a month
/// knows of every moment of it how the workload stood.
async fn renew_baseline(spool: Spool, view: Option<Arc<View>>, random: Random, stop: CancellationToken) {
    let mut wanted = spool.baseline_wanted();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(BASELINE_EVERY - part_of(BASELINE_EVERY / 10, random)) => {
                view.iter().for_each(|view| view.want_baseline());
            }
            changed = wanted.changed() => match (changed, &view) {
                (Ok(()), Some(view)) => view.want_baseline(),
                (Ok(()), None) => {}
                (Err(_), _) => return,
            },
        }
    }
}

/// Binds nothing, starts nothing: whether the configuration could start here as far as that can be told.
pub fn check(config: &Config) -> Result<(), StartError> {
    instance(config)?;
    config.trust.read().map_err(KeeperError::from)?;
    check_credentials(config)
}

/// They are read anew for every connection; that they cannot be read at all is better known now.
fn check_credentials(config: &Config) -> Result<(), StartError> {
    config.egress.upstream_credentials_file.as_deref().map(read_credentials).transpose()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use sidewarden_proto::batch::{Cursor, Link};
    use sidewarden_proto::config::HostPort;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::config::Collector;
    use crate::identity::made_up::Ca;
    use sidewarden_proto::backoff;
    use sidewarden_proto::given::files::Files;

    /// A collector that nobody runs.
    fn config(dir: &Path) -> Config {
        let nowhere = HostPort { host: "127.0.0.1".into(), port: 1 };
        let mut config = Config { data_dir: dir.to_owned(), ..Config::default() };
        config.collector = Collector { addresses: vec![nowhere], ..Collector::default() };
        config.admin.listen = "127.0.0.1:0".parse().unwrap();
        config.instance = Some("c1".parse().unwrap());
        config
    }

    fn setup(config: Config) -> Setup {
        Setup { mode: Mode::Sidecar, config, root: None, shares_user: false, random: backoff::random }
    }

    async fn ask(admin: SocketAddr, request: &str) -> String {
        let mut tcp = TcpStream::connect(admin).await.unwrap();
        tcp.write_all(format!("{request} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        tcp.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn with_an_identity_on_disk_it_is_ready_without_a_collector() {
        let dir = tempfile::tempdir().unwrap();
        Store::open(dir.path()).unwrap().save(&Ca::new("td").issue("shop/web")).unwrap();
        let app = start(setup(config(dir.path()))).await.unwrap();
        let admin = app.addresses.admin;
        for (request, status, part) in [
            ("GET /healthz", 200, "ok"),
            ("GET /readyz", 200, "identity: ok"),
            ("GET /metrics", 200, "sidewarden_agent_certificate_not_after_seconds 1"),
            ("GET /posture", 404, "nothing is watched"),
            ("GET /elsewhere", 404, "/healthz"),
            ("POST /healthz", 405, "only GET"),
        ] {
            let answer = ask(admin, request).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(part), "{request}: {answer}");
        }
        let (ready, _) = tokio::task::spawn_blocking(move || admin::probe(admin)).await.unwrap().unwrap();
        assert!(ready);
        app.stop("test").await;
    }

    #[tokio::test]
    async fn without_an_identity_it_runs_but_is_not_ready_and_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let app = start(setup(config(dir.path()))).await.unwrap();
        let answer = ask(app.addresses.admin, "GET /readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("has not enrolled yet"), "{answer}");
        app.stop("test").await;
    }

    #[tokio::test]
    async fn an_endless_head_and_a_silent_client_get_no_room() {
        let dir = tempfile::tempdir().unwrap();
        let app = start(setup(config(dir.path()))).await.unwrap();
        let mut tcp = TcpStream::connect(app.addresses.admin).await.unwrap();
        let head = format!("GET /healthz HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(64 << 10));
        let _ = tcp.write_all(head.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = tcp.read_to_end(&mut answer).await;
        assert!(!answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
        app.stop("test").await;
    }

    #[tokio::test]
    async fn a_run_begins_and_ends_with_an_event_and_the_next_one_knows_how_it_ended() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let app = start(setup(config(dir.path()))).await.unwrap();
            app.stop("SIGTERM").await;
        }
        let limits = Limits { disk_bytes: 8 << 20, memory_bytes: 1 << 20, links: 100 };
        let (spool, writer, opened) =
            Spool::open(&dir.path().join("spool"), limits, backoff::random, Timestamp::now).unwrap();
        assert!(opened.clean);
        let (mut at, mut kinds) = (Cursor::START, Vec::new());
        while let Some(link) = spool.after(at).await {
            at = Cursor { seq: link.last_seq(), hash: link.hash() };
            let Link::Batch(batch) = link else { continue };
            kinds.extend(batch.open().unwrap().events().unwrap().iter().map(|event| event.kind.to_string()));
        }
        writer.finish();
        assert_eq!(kinds, ["agent.started", "agent.stopping", "agent.started", "agent.stopping"]);
    }

    #[tokio::test]
    async fn a_key_that_the_workload_could_read_is_not_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        Store::open(dir.path()).unwrap().save(&Ca::new("td").issue("shop/web")).unwrap();
        let app = start(Setup { shares_user: true, ..setup(config(dir.path())) }).await.unwrap();
        assert!(app.identity.borrow().is_none(), "what is there is not taken");
        app.stop("test").await;
    }

    /// A directive lies on disk, and the identity that it would be believed by comes late, or never.
    #[tokio::test]
    async fn what_a_kept_directive_may_forbid_waits_for_an_identity_to_read_it_by() {
        let service = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let place = service.local_addr().unwrap();
        for (kept, answer) in [(None, "HTTP/1.1 200 "), (Some("{"), "HTTP/1.1 502 ")] {
            let dir = tempfile::tempdir().unwrap();
            if let Some(kept) = kept {
                std::fs::write(dir.path().join("directive.json"), kept).unwrap();
            }
            let file = |name| dir.path().join(name);
            let files = Files { cert: file("tls.crt"), key: file("tls.key"), roots: file("ca.crt") };
            let mut config = Config { identity: Some(Elsewhere::Files(files)), ..config(dir.path()) };
            config.egress.listen = Some("127.0.0.1:0".parse().unwrap());
            config.egress.allow.rules = vec![place.to_string().parse().unwrap()];
            let app = start(setup(config)).await.unwrap();
            let mut tcp = TcpStream::connect(app.addresses.egress[0]).await.unwrap();
            tcp.write_all(format!("CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n").as_bytes()).await.unwrap();
            let mut got = [0; 13];
            tcp.read_exact(&mut got).await.unwrap();
            assert_eq!(std::str::from_utf8(&got).unwrap(), answer, "{kept:?}");
            app.stop("test").await;
        }
    }

    #[tokio::test]
    async fn a_damaged_identity_is_an_error_and_nothing_is_left_running() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("identity.json"), "{").unwrap();
        let Err(error) = start(setup(config(dir.path()))).await else { panic!("it started") };
        assert!(error.to_string().contains("enrol again with a new token"), "{error}");
    }
}
