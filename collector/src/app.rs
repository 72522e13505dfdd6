//! Builds everything, in order, and hands back where it listens. Tests call it with port 0.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use sidewarden_proto::batch::Epoch;
use sidewarden_proto::enrol::Der;
use sidewarden_proto::event::{Body, CollectorStarted, Event, Severity};
use sidewarden_proto::identity::{AgentId, InstanceId};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::alert;
use crate::api;
use crate::ca::{self, Authority, Issuer, Register, Terms, Vault, orders};
use crate::commit::{self, Committer, Parts};
use crate::config::Config;
use crate::evidence;
use crate::fleet::{self, Directives, Fleet};
use crate::identity::{self, Identities};
use crate::index::{Index, Writer};
use crate::ingest::{self, Refusals, Shared};
use crate::log::{Log, SqliteLog};
use crate::metrics;
use crate::trust::Applied;

/// How often time passes in the log: the grain of silence, `for` and retention.
const TICK: Duration = Duration::from_secs(10);
/// How often due renewals and new tokens are looked for.
const HOUSEKEEPING: Duration = Duration::from_secs(1);
/// How often certificates that ended long ago are looked for.
const FORGET: Duration = Duration::from_secs(3600);
/// How far the clock may be behind the log without a word.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(5);

/// What the other parts of the program (API, metrics, alerts) are given.
#[derive(Clone, Debug)]
pub struct Core {
    /// The settings.
    pub config: Arc<Config>,
    /// State, own events, and every event as it is committed.
    pub commits: Committer,
    /// Questions about events.
    pub index: Index,
    /// Live sessions.
    pub fleet: Arc<Fleet>,
    /// The directive in force.
    pub directives: Arc<Directives>,
    /// Certificates and tokens.
    pub issuer: Arc<Issuer>,
    /// Who this collector is to others.
    pub identities: Arc<Identities>,
    /// Ends everything.
    pub shutdown: CancellationToken,
    /// Every task of the program; a stop waits for them.
    pub tasks: TaskTracker,
    /// The clock.
    pub clock: fn() -> Timestamp,
}

/// A collector that runs.
#[derive(Debug)]
pub struct App {
    /// Where agents come in.
    pub agents: SocketAddr,
    /// Where the API and the page are, by HTTPS.
    pub api: SocketAddr,
    /// Where Prometheus scrapes.
    pub metrics: SocketAddr,
    /// What the parts share.
    pub core: Core,
    /// The committing thread, which ends when nobody can hand anything in any more.
    committing: std::thread::JoinHandle<()>,
    /// Held as long as we run: two collectors on one directory would each believe in their own order.
    lock: Flock<File>,
}

/// Starts everything. On an error nothing keeps running.
pub async fn start(config: Config, clock: fn() -> Timestamp) -> anyhow::Result<App> {
    let config = Arc::new(config);
    let dir = config.data_dir.clone();
    let lock = prepare(&dir)?;
    ca::backup::check_restored(&dir)?;
    let now = clock();
    let (authority, first) = open_authority(&config, now)?;
    let register = Register::open(&dir.join("ca.db"))?;
    register.attribute(authority.pin())?;
    register.guests_left(now)?;
    let issuer = Arc::new(Issuer::new(authority.clone(), register, config.certificate_life, config.grace));
    let own = authority.own().borrow().clone();
    let path = dir.join("directive.json");
    let roots = orders::roots(&issuer, now)?;
    let open = if authority.is_member() { Directives::open_following } else { Directives::open };
    let directives = Arc::new(open(&path, &config.trust_domain, roots, &own, now)?);
    judge_leader(&config, &authority, &directives)?;
    let admitted = config.agents.trust_domains.clone();
    let identities = Arc::new(Identities::new(authority, directives.clone(), admitted)?);
    let (commits, index, committing) = open_store(&config)?;
    let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
    let fleet = Arc::new(Fleet::default());
    let core = Core { config, commits, index, fleet, directives, issuer, identities, shutdown, tasks, clock };
    tell_start(&core, first).await?;
    core.tasks.spawn(identity::page::start(&core).await);
    if let Some(keeping) = identity::given::start(&core).await {
        core.tasks.spawn(keeping);
    }
    core.tasks.spawn(identity::keep(core.clone()));
    let (api, metrics) = open_face(&core).await.inspect_err(|_| core.shutdown.cancel())?;
    let agents = open_ingest(&core).await.inspect_err(|_| core.shutdown.cancel())?;
    core.tasks.spawn(tick(core.clone()));
    core.tasks.spawn(keep_house(core.clone()));
    core.tasks.spawn(forget(core.clone()));
    if let Some(folder) = &core.config.evidence.folder {
        core.tasks.spawn(evidence::folder::keep(core.clone(), evidence::folder::Folder::new(folder)));
    }
    core.tasks.spawn(ca::tell(core.clone()));
    match core.config.ca.leader.clone() {
        Some(leader) => core.tasks.spawn(fleet::follow(core.clone(), leader)),
        None => core.tasks.spawn(fleet::keep(core.clone())),
    };
    Ok(App { agents, api, metrics, core, committing, lock })
}

impl App {
    /// Ends everything in order: no new connections, sessions told, then the store closed.
    pub async fn stop(self) {
        let App { core, committing, lock, .. } = self;
        core.shutdown.cancel();
        core.tasks.close();
        if tokio::time::timeout(core.config.drain_timeout, core.tasks.wait()).await.is_err() {
            tracing::warn!("some connections did not end in time");
        }
        let _ = tokio::time::timeout(core.config.drain_timeout, core.commits.flush()).await;
        drop(core);
        let joined = tokio::task::spawn_blocking(move || committing.join());
        if !matches!(tokio::time::timeout(Duration::from_secs(10), joined).await, Ok(Ok(Ok(())))) {
            tracing::warn!("the store was not closed in order; nothing that was acknowledged is lost");
        }
        drop(lock);
    }

    /// Whether the committing thread has ended: then nothing can be taken any more.
    pub fn is_broken(&self) -> bool {
        self.committing.is_finished()
    }
}

fn prepare(dir: &Path) -> anyhow::Result<Flock<File>> {
    let hint = "data_dir must be a directory this user can write; set data_dir or SIDEWARDEN_DATA_DIR";
    ca::make_dir(dir).map_err(|error| anyhow::anyhow!("{error}: {hint}"))?;
    let path = dir.join("lock");
    let file = File::create(&path).map_err(|error| anyhow::anyhow!("{}: {error}: {hint}", path.display()))?;
    let taken = Flock::lock(file, FlockArg::LockExclusiveNonblock);
    taken.map_err(|_| anyhow::anyhow!("{}: another collector runs on this data_dir: stop it first", dir.display()))
}

fn open_authority(config: &Config, now: Timestamp) -> anyhow::Result<(Arc<Authority>, bool)> {
    // Renewed at half: what agents keep on disk can then be verified as long as they may still come back.
    let own_life = (config.certificate_life + config.grace) * 2;
    let dir = config.data_dir.join("ca");
    // A new root would lock every agent out: that is never done behind somebody's back.
    if !Authority::exists(&dir) && config.data_dir.join("log.db").exists() {
        anyhow::bail!(
            "{} is gone and the log beside it is not: restore ca/ from a backup, or move all of {} away to begin a new trust domain",
            dir.join("root").display(),
            config.data_dir.display()
        );
    }
    if !Authority::exists(&dir) && config.ca.leader.is_some() {
        anyhow::bail!(
            "ca.leader is set, and {} has no issuing CA yet: `ca member request` here, `ca member sign` at the leader, `ca member install` here",
            dir.display()
        );
    }
    let (domain, names) = (config.trust_domain.clone(), config.api.names.clone());
    let (authority, first) = Authority::open(&dir, Terms { domain, names, own_life, vault: vault(config)? }, now)?;
    Ok((Arc::new(authority), first))
}

/// Whom to follow is said exactly where there is somebody to follow.
fn judge_leader(config: &Config, authority: &Authority, directives: &Directives) -> anyhow::Result<()> {
    match (&config.ca.leader, authority.is_member()) {
        (Some(_), false) => {
            anyhow::bail!("ca.leader is set, and this collector has a root of its own: take the setting away")
        }
        (None, true) => anyhow::bail!(
            "this collector has no root of its own: set ca.leader to the collector that has, or nobody hears of revocations here"
        ),
        (Some(_), true) if directives.is_there() => authority.follow(&directives.now().directive.bundle),
        (Some(leader), true) => {
            tracing::warn!(%leader, "nobody is let in until the collector that is followed was reached")
        }
        _ => {}
    }
    Ok(())
}

/// How the CA's keys lie on disk, by the settings and what systemd hands over.
pub fn vault(config: &Config) -> Result<Vault, ca::CaError> {
    let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(std::path::PathBuf::from);
    Vault::from_files(config.ca.passphrase_file.as_deref(), credentials.as_deref())
}

fn open_store(config: &Config) -> anyhow::Result<(Committer, Index, std::thread::JoinHandle<()>)> {
    let log = SqliteLog::open(&config.data_dir.join("log.db"))?;
    let reader = log.reader()?;
    let index_path = config.data_dir.join("index.db");
    let writer = Writer::open(&index_path)?;
    let index = Index::open(&index_path, reader)?;
    let mut new_epoch = Epoch([0; 16]);
    crate::random(&mut new_epoch.0);
    let own = AgentId { workload: tls::collector_id(&config.trust_domain), instance: instance(config) };
    let parts = Parts {
        log: Box::new(log),
        index: writer,
        own,
        new_epoch,
        keep_for: config.retention.age(),
        keep_bytes: config.retention.bytes.0,
    };
    let (commits, committing) = commit::start(parts)?;
    Ok((commits, index, committing))
}

/// The configured name, or the hostname as far as it can be one.
fn instance(config: &Config) -> InstanceId {
    let hostname = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    let name = if config.instance.is_empty() { hostname } else { config.instance.clone() };
    let name: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || "._-".contains(*c)).take(63).collect();
    name.parse().unwrap_or_else(|_| "collector".parse().expect("a constant that follows the rules"))
}

async fn tell_start(core: &Core, first: bool) -> anyhow::Result<()> {
    let (last, now) = (core.commits.state().at, (core.clock)());
    if last > now.plus(CLOCK_TOLERANCE) {
        tracing::warn!(%last, %now, "the clock is behind the last event in the log: set this machine's clock right");
    }
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let summary = format!("Collector {version} of {} started", core.config.trust_domain);
    let body = Body::from(CollectorStarted { version, first });
    core.commits.own(Event::new((core.clock)(), Severity::Notice, summary, &body)).await?;
    core.commits.flush().await?;
    if core.commits.stats().failures.get() > 0 {
        anyhow::bail!("the store in {} takes nothing: see the line above", core.config.data_dir.display());
    }
    Ok(())
}

async fn open_ingest(core: &Core) -> anyhow::Result<SocketAddr> {
    let (refusals, telling) = Refusals::new(core.commits.clone(), core.clock);
    core.tasks.spawn(telling);
    let agents = &core.config.agents;
    let shared = Shared {
        commits: core.commits.clone(),
        fleet: core.fleet.clone(),
        directives: core.directives.clone(),
        issuer: core.issuer.clone(),
        identities: core.identities.clone(),
        refusals,
        connections: Arc::new(Semaphore::new(agents.max_connections)),
        handshakes: Arc::new(Semaphore::new(agents.max_handshakes)),
        max_handshakes: agents.max_handshakes,
        handshake_timeout: agents.handshake_timeout,
        links_per_second: agents.max_links_per_second,
        shutdown: core.shutdown.clone(),
        tasks: core.tasks.clone(),
        clock: core.clock,
    };
    Ok(ingest::start(agents.listen, Arc::new(shared)).await?)
}

/// What people and Prometheus see, before the first agent comes in: no event is too early for its alert.
async fn open_face(core: &Core) -> anyhow::Result<(SocketAddr, SocketAddr)> {
    let name = core.config.api.names.first().map_or("localhost", String::as_str);
    let parts = alert::Parts {
        config: core.config.alerts.clone(),
        committer: core.commits.clone(),
        index: core.index.clone(),
        page: format!("https://{name}:{}/", core.config.api.listen.port()),
        evidence: core.config.evidence.clone(),
        certificate_life: core.config.certificate_life,
        now: core.clock,
    };
    let (alerts, watching) = alert::start(parts, core.shutdown.clone().cancelled_owned())?;
    core.tasks.spawn(async move { drop(watching.await) });
    let api = api::start(core, alerts.clone()).await?;
    let metrics = metrics::start(core, alerts).await?;
    Ok((api, metrics))
}

async fn tick(core: Core) {
    let mut beat = tokio::time::interval(TICK);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            _ = beat.tick() => if core.commits.tick((core.clock)()).await.is_err() { return },
            () = core.shutdown.cancelled() => return,
        }
    }
}

/// Keeps the register from growing with each renewal for ever.
async fn forget(core: Core) {
    let mut beat = tokio::time::interval(FORGET);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            _ = beat.tick() => {}
            () = core.shutdown.cancelled() => return,
        }
        let (issuer, now) = (core.issuer.clone(), (core.clock)());
        match tokio::task::spawn_blocking(move || issuer.forget_ended(now)).await {
            Ok(Ok(count)) => tracing::debug!(count, "certificates that ended long ago were forgotten"),
            Ok(Err(error)) => {
                tracing::error!(%error, "certificates that ended long ago stay in the register; it is tried again")
            }
            Err(error) => {
                tracing::error!(%error, "certificates that ended long ago stay in the register; it is tried again")
            }
        }
    }
}

/// Renews our own certificates, signs the directive again with the new one, notes what agents confirmed, carries out what
/// commands ask, and tells of tokens made elsewhere.
async fn keep_house(core: Core) {
    let mut beat = tokio::time::interval(HOUSEKEEPING);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let trust = Arc::new(Mutex::new(Applied::new(&core.config.data_dir)));
    let (mut noted, mut here) = (HashMap::new(), HashSet::new());
    loop {
        tokio::select! {
            _ = beat.tick() => {}
            () = core.shutdown.cancelled() => return,
        }
        let (issuer, directives, now) = (core.issuer.clone(), core.directives.clone(), (core.clock)());
        let (runs, guests) = (core.fleet.confirmed().into_iter().collect(), core.fleet.guests().into_iter().collect());
        let (confirmed, (come, left)) = (newly(&noted, &runs), moves(&here, &guests));
        let (trust, further) = (trust.clone(), further_roots(&core));
        let done = tokio::task::spawn_blocking(move || {
            issuer.register().confirm(&confirmed)?;
            issuer.register().note_guests(&come, &left, now)?;
            let mut events = renew_and_collect(&issuer, &directives, now);
            let own = issuer.authority().own().borrow().clone();
            if directives.is_following() {
                return Ok(events);
            }
            let mut trust = trust.lock().unwrap_or_else(PoisonError::into_inner);
            match trust.look(&directives, &further, &own, now) {
                Ok(event) => events.extend(event),
                Err(error) => tracing::error!(%error, "the imported roots stay as they were"),
            }
            Ok::<_, anyhow::Error>(events)
        })
        .await;
        match done {
            Ok(Ok(events)) => {
                (noted, here) = (runs, guests);
                for event in events {
                    if core.commits.own(event).await.is_err() {
                        return;
                    }
                }
            }
            Ok(Err(error)) => tracing::error!(%error, "housekeeping failed; it is tried again"),
            Err(error) => tracing::error!(%error, "housekeeping failed; it is tried again"),
        }
    }
}

/// Roots of our own trust domain that are somebody else's. While nobody can say what they are, those that were told stay.
fn further_roots(core: &Core) -> Vec<Der> {
    if core.config.identity.is_none() || core.identities.given().is_some() {
        return core.identities.further_roots();
    }
    let in_force = core.directives.now();
    in_force.directive.foreign.domains.get(&core.config.trust_domain).cloned().unwrap_or_default()
}

/// What differs from what was noted before; agents that have left are forgotten here, not in the register.
fn newly(noted: &HashMap<AgentId, u64>, confirmed: &HashMap<AgentId, u64>) -> Vec<(AgentId, u64)> {
    let new = confirmed.iter().filter(|(agent, version)| noted.get(*agent) != Some(*version));
    new.map(|(agent, version)| (agent.clone(), *version)).collect()
}

/// Who has come and who has left since this was noted last.
fn moves(here: &HashSet<AgentId>, now: &HashSet<AgentId>) -> (Vec<AgentId>, Vec<AgentId>) {
    (now.difference(here).cloned().collect(), here.difference(now).cloned().collect())
}

fn renew(issuer: &Issuer, directives: &Directives, now: Timestamp) -> anyhow::Result<()> {
    if issuer.authority().renew_due(now)? {
        let own = issuer.authority().own().borrow().clone();
        directives.sign_again(&own)?;
        tracing::info!(not_after = %own.peer().not_after, "our own certificate was renewed");
    }
    Ok(())
}

/// What one of these fails at may be what the order that waits would mend, and what an order did is told whatever fails after it.
fn renew_and_collect(issuer: &Issuer, directives: &Directives, now: Timestamp) -> Vec<Event> {
    if let Err(error) = renew(issuer, directives, now) {
        tracing::error!(%error, "the CA's certificates could not be renewed; it is tried again");
    }
    if let Err(error) = fleet::refresh(issuer, directives, now) {
        tracing::error!(%error, "the keys of who is revoked or quarantined could not be looked up; it is tried again");
    }
    let ordered = orders::carry_out(issuer, directives, now).unwrap_or_else(|error| {
        tracing::error!(%error, "what commands ask could not be looked for; it is tried again");
        Vec::new()
    });
    let created = issuer.register().take_unannounced().unwrap_or_else(|error| {
        tracing::error!(%error, "new tokens could not be looked for; it is tried again");
        Vec::new()
    });
    let told = created.into_iter().map(|token| {
        let summary =
            format!("Token {} for {} made, {} uses, until {}", token.id, token.workload, token.uses, token.expires_us);
        Event::new(now, Severity::Notice, summary, &Body::from(token))
    });
    ordered.into_iter().chain(told).collect()
}
