//! The data plane: mutual TLS between workloads that know nothing of it.
//!
//! accept -> what is it (handshake) -> who is it (TLS) -> register (connections) -> may it (policy) -> dial -> relay
//! -> one event (accounting). `inbound` and `outbound` tell it in this order, one for each way; `egress` is for places
//! that are no peers; `hold` keeps others off the workload's own port.

pub mod accounting;
pub mod aead;
pub mod balance;
pub mod channel;
pub mod connections;
pub mod egress;
mod entrance;
pub mod flow;
pub mod frame;
pub mod front;
pub mod handshake;
pub mod header;
mod hold;
mod inbound;
mod insecure;
pub mod limits;
pub mod names;
mod outbound;
pub mod own;
mod permissive;
mod pool;
pub mod pump;
pub mod record;
pub mod relay;
mod scratch;
mod secure;
mod service;
pub mod targets;
#[cfg(test)]
mod tests;
mod unproven;
pub mod waiting;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sidewarden_proto::backoff::{Backoff, Random};
use sidewarden_proto::event::{Direction, Event, RefusalReason};
use sidewarden_proto::identity::Peer;
use sidewarden_proto::policy::Extract;
use sidewarden_proto::policy::party::Who;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::Trust;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Inbound, Inward, Limits, Outbound, Timeouts, TrustAll};
use crate::dial::{self, Resolver};
use crate::identity::{Current, Identity};
use crate::metrics::Metrics;
use crate::policy::egress::Target;
use crate::policy::{self, Central, Decision};
use crate::respond::Holding;
use accounting::{Books, Pair, Plaintext, Refusal, Secured, Traffic};
use connections::{Live, Registry};
use insecure::Insecure;
use limits::{Over, Pace, Source, SourceLimits, Sources};
use own::Own;
use permissive::Leniency;
use relay::{Bounds, End, Outcome};
use unproven::{Unproven, What};
use waiting::{STALLED, Waiting};

/// How often the books are looked through, and live connections are judged anew though nothing was announced.
const TICK: Duration = Duration::from_secs(1);
const REVIEW_EVERY: u32 = 15;

/// What every connection shares.
pub struct Shared {
    /// The newest identity.
    pub identity: Current,
    /// The live connections.
    pub registry: Arc<Registry>,
    /// The books.
    pub ledger: Ledger,
    /// Where we take plaintext ourselves.
    pub own: Own,
    /// Resolves the names of routes.
    pub resolver: Resolver,
    /// How long.
    pub timeouts: Timeouts,
    /// Room for connections.
    pub connections: Arc<Semaphore>,
    /// Room for handshakes.
    pub handshakes: Arc<Semaphore>,
    /// What each source may do.
    pub sources: Arc<Mutex<Sources>>,
    /// The handshakes under way.
    waiting: Arc<Mutex<Waiting<Occupied>>>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Whether this workload is quarantined.
    pub holding: Holding,
    /// A directive was kept that counts from the first identity on; until then nobody can say what it forbids.
    pub directive_is_unread: bool,
    /// What is live and has no peer that could be judged: egress, and plaintext that was let in.
    unproven: Arc<Unproven>,
    /// Randomness.
    pub random: Random,
    /// The start of the agent was told: what its listeners have to tell comes after it.
    pub begun: CancellationToken,
    /// Where every certificate is accepted.
    insecure: Vec<Arc<Insecure>>,
    /// Whom we trusted when chains of live connections were last looked at.
    reviewed: Mutex<Option<(Trust, Timestamp)>>,
    /// Nothing is accepted any more.
    pub stop: CancellationToken,
    /// Everything live ends.
    pub cut: CancellationToken,
}

/// Nobody has come yet; the limits of each source are those of `limits`.
pub fn sources(limits: &Limits) -> Arc<Mutex<Sources>> {
    Arc::new(Mutex::new(Sources::new(SourceLimits {
        connections_per_second: NonZeroU64::new(limits.max_new_connections_per_source),
        handshakes: Some(limits.max_handshakes_per_source).filter(|most| *most > 0),
    })))
}

impl Shared {
    /// What connections share under `config`, with nothing live yet.
    pub fn new(
        config: &Config,
        identity: Current,
        resolver: Resolver,
        emit: Arc<dyn Fn(Event) + Send + Sync>,
        metrics: Arc<Metrics>,
        random: Random,
    ) -> Shared {
        let cut = CancellationToken::new();
        Shared {
            identity,
            registry: Arc::default(),
            ledger: Ledger::new(emit, metrics.clone()),
            own: Own::default(),
            resolver,
            timeouts: config.timeouts.clone(),
            connections: Arc::new(Semaphore::new(config.limits.max_connections)),
            handshakes: Arc::new(Semaphore::new(config.limits.max_handshakes)),
            sources: sources(&config.limits),
            waiting: Arc::default(),
            metrics,
            holding: watch::Sender::default().subscribe(),
            directive_is_unread: false,
            unproven: Arc::default(),
            random,
            begun: CancellationToken::new(),
            insecure: config
                .trusting_all()
                .into_iter()
                .map(|(d, place, c)| Arc::new(Insecure::new(d, place, c)))
                .collect(),
            reviewed: Mutex::default(),
            stop: CancellationToken::new(),
            cut,
        }
    }
}

/// The books, and where what they say goes.
pub struct Ledger {
    books: Mutex<Books>,
    /// Of egress: a workload that asks for no end of places must not crowd out its peers.
    egress: Mutex<Books>,
    emit: Arc<dyn Fn(Event) + Send + Sync>,
    metrics: Arc<Metrics>,
}

impl Ledger {
    /// Empty books.
    pub fn new(emit: Arc<dyn Fn(Event) + Send + Sync>, metrics: Arc<Metrics>) -> Ledger {
        Ledger { books: Mutex::default(), egress: Mutex::default(), emit, metrics }
    }

    fn with<T>(&self, direction: Direction, act: impl FnOnce(&mut Books) -> T) -> T {
        let books = if direction == Direction::Egress { &self.egress } else { &self.books };
        act(&mut books.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn refused(&self, refusal: Refusal) {
        let Refusal { direction, reason, detail, listener, source, peer } = &refusal;
        self.metrics.refused(*direction, *reason);
        tracing::debug!(
            direction = direction.word(),
            reason = reason.word(),
            detail,
            listener,
            ?source,
            peer,
            "refused"
        );
        if let Some(event) = self.with(*direction, |books| books.refused(refusal, Timestamp::now())) {
            (self.emit)(event);
        }
    }

    fn opened(&self, pair: &Pair, secured: Secured) {
        self.metrics.opened(pair.direction);
        if let Some(event) = self.with(pair.direction, |books| books.opened(pair, secured, Timestamp::now())) {
            (self.emit)(event);
        }
    }

    fn closed(&self, pair: &Pair, traffic: Traffic) {
        self.metrics.closed(pair.direction, &traffic);
        self.with(pair.direction, |books| books.closed(pair, traffic, Timestamp::now()));
    }

    fn plaintext(&self, plaintext: Plaintext) {
        self.metrics.plaintext_opened();
        if let Some(event) = self.with(Direction::Inbound, |books| books.plaintext(plaintext, Timestamp::now())) {
            (self.emit)(event);
        }
    }

    fn ended(&self, live: &Live, reason: &'static str) {
        self.with(live.direction, |books| books.ended(live.direction, live.peer.name.to_string(), reason));
    }

    fn tell(&self, all: bool) {
        for direction in [Direction::Inbound, Direction::Egress] {
            let due = self.with(direction, |books| books.due(Timestamp::now(), all));
            due.into_iter().for_each(|event| (self.emit)(event));
        }
    }
}

/// Why a listener cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("listening on {address} for {purpose}: {error}{}", hint(.error))]
pub struct BindError {
    /// Where.
    pub address: SocketAddr,
    /// What for.
    pub purpose: &'static str,
    /// Why not.
    pub error: io::Error,
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => ": another program has this port; stop it or choose another",
        io::ErrorKind::PermissionDenied => ": choose a port from 1024 on, or lower net.ipv4.ip_unprivileged_port_start",
        _ => "",
    }
}

/// Binds `address`.
pub async fn bind(address: SocketAddr, purpose: &'static str) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|error| BindError { address, purpose, error })
}

/// Binds `port` for IPv4 and IPv6, or for IPv4 alone where there is nothing else.
async fn bind_both(port: u16) -> Result<TcpListener, BindError> {
    const PURPOSE: &str = "what the rules of `intercept` lead here";
    match bind((Ipv6Addr::UNSPECIFIED, port).into(), PURPOSE).await {
        Err(BindError { error, .. }) if error.kind() != io::ErrorKind::AddrInUse => {
            bind((Ipv4Addr::UNSPECIFIED, port).into(), PURPOSE).await
        }
        bound => bound,
    }
}

/// The listeners of a configuration, bound and not yet served.
pub struct Listeners {
    /// Blocks that are told apart by host names share one.
    inbound: Vec<(TcpListener, Vec<Inbound>)>,
    /// For each inbound block, the number of its listener.
    places: Vec<usize>,
    outbound: Vec<(TcpListener, Outbound)>,
    egress: Vec<(TcpListener, egress::Kind)>,
    egress_config: crate::config::Egress,
    /// Where the rules of `intercept` lead who is to be refused.
    refuse: Option<TcpListener>,
}

impl Listeners {
    /// Binds them all, or none.
    pub async fn bind(config: &Config) -> Result<Listeners, BindError> {
        let (inbound, places, outbound, egress) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let egress_config = config.egress.clone();
        let mut listeners = Listeners { inbound, places, outbound, egress, egress_config, refuse: None };
        for inbound in &config.inbound {
            listeners.bind_inbound(inbound).await?;
        }
        for outbound in &config.outbound {
            listeners.outbound.push((bind(outbound.listen, "outbound connections").await?, outbound.clone()));
        }
        if let Some(address) = config.egress.listen {
            listeners.egress.push((bind(address, "egress").await?, egress::Kind::Explicit));
        }
        for address in &config.egress.transparent_listen {
            listeners.egress.push((bind(*address, "transparent egress").await?, egress::Kind::Transparent));
        }
        if config.intercept.inbound == Inward::Lock {
            listeners.refuse = Some(bind_both(config.intercept.refuse_port).await?);
        }
        Ok(listeners)
    }

    async fn bind_inbound(&mut self, inbound: &Inbound) -> Result<(), BindError> {
        let is_shared =
            |(_, blocks): &(TcpListener, Vec<Inbound>)| blocks.iter().any(|b| b.shares_listener_with(inbound));
        if let Some(place) = self.inbound.iter().position(is_shared) {
            self.inbound[place].1.push(inbound.clone());
            self.places.push(place);
            return Ok(());
        }
        self.places.push(self.inbound.len());
        self.inbound.push((bind(inbound.listen, "inbound connections").await?, vec![inbound.clone()]));
        Ok(())
    }

    /// Where they really listen, inbound first, in the order of the configuration.
    pub fn addresses(&self) -> (Vec<SocketAddr>, Vec<SocketAddr>) {
        let inbound = self.places.iter().filter_map(|place| self.inbound[*place].0.local_addr().ok()).collect();
        let outbound = self.outbound.iter().filter_map(|(listener, _)| listener.local_addr().ok()).collect();
        (inbound, outbound)
    }

    /// Where those for egress really listen, the one that clients know first.
    pub fn egress_addresses(&self) -> Vec<SocketAddr> {
        self.egress.iter().filter_map(|(listener, _)| listener.local_addr().ok()).collect()
    }

    /// Serves them until `shared.stop`, and the connections until they end or `shared.cut`.
    pub async fn serve(self, shared: Arc<Shared>) {
        let (mut tasks, mut leniencies) = (JoinSet::new(), Vec::new());
        for (listener, blocks) in self.inbound {
            let address = listener.local_addr().unwrap_or(blocks[0].listen);
            // Where rules lead whoever comes for that port, the workload may have it on every address.
            let holds = |block: &&Inbound| block.hold_service_port && self.refuse.is_none();
            let services: Vec<Inbound> = blocks.iter().filter(holds).cloned().collect();
            let serving = Arc::new(inbound::Listener::new(shared.clone(), address, blocks));
            leniencies.extend(serving.leniency().cloned());
            for block in services {
                if let Some(service) = block.to.address() {
                    let lenient = block.permissive.is_some().then(|| serving.clone());
                    tasks.spawn(hold::hold(shared.clone(), service, block.listen, lenient));
                }
            }
            tasks.spawn(serving.serve(listener));
        }
        for (listener, config) in self.outbound {
            tasks.spawn(outbound::serve(shared.clone(), listener, config));
        }
        if !self.egress.is_empty() {
            let gate = Arc::new(egress::Gate::new(shared.clone(), &self.egress_config));
            for (listener, kind) in self.egress {
                tasks.spawn(egress::serve(gate.clone(), listener, kind));
            }
        }
        if let Some(listener) = self.refuse {
            tasks.spawn(hold::refuse_led(shared.clone(), listener));
        }
        let keeping = tokio::spawn(keep_books(shared.clone(), leniencies));
        while let Some(result) = tasks.join_next().await {
            log_panic(result);
        }
        keeping.abort();
        shared.ledger.tell(true);
    }
}

/// Tells what is due, and judges live connections when an answer could have changed.
async fn keep_books(shared: Arc<Shared>, leniencies: Vec<Arc<Leniency>>) {
    let mut identity = shared.identity.clone();
    let mut holding = shared.holding.clone();
    let (mut ticks, mut crowd) = (0u32, Crowd::default());
    loop {
        tokio::select! {
            Ok(()) = holding.changed() => shared.review(),
            changed = identity.changed() => match changed {
                Ok(()) => shared.review(),
                // Nobody makes identities any more: the agent ends.
                Err(_) => sleep(TICK).await,
            },
            () = sleep(TICK) => ticks = ticks.wrapping_add(1),
        }
        shared.ledger.tell(false);
        if crowd.has_gone(shared.registry.len()) {
            give_back();
        }
        if shared.begun.is_cancelled() {
            shared.review_plaintext(&leniencies);
            shared.review_insecure();
        }
        if ticks.is_multiple_of(REVIEW_EVERY) {
            // The clock may have been set, which no deadline sees.
            shared.review();
        }
    }
}

/// How many connections there were at most, to tell when a burst is over.
#[derive(Debug, Default)]
struct Crowd {
    peak: usize,
}

impl Crowd {
    /// Fewer are not worth the milliseconds that giving back takes.
    const WORTH: usize = 256;

    /// Whether of many connections most have gone, now that there are `live`; once for each burst.
    fn has_gone(&mut self, live: usize) -> bool {
        self.peak = self.peak.max(live);
        let gone = self.peak >= Crowd::WORTH && live <= self.peak / 4;
        if gone {
            self.peak = live;
        }
        gone
    }
}

/// Gives the memory of a burst back to the system: the allocator would keep it for the next one, and an agent stands
/// beside every container of a host.
fn give_back() {
    // SAFETY: malloc_trim(3) takes any padding and touches free memory only.
    #[cfg(target_env = "gnu")]
    unsafe {
        nix::libc::malloc_trim(0);
    }
}

#[cfg(test)]
#[test]
fn memory_is_given_back_once_after_each_burst_that_was_worth_it() {
    let mut crowd = Crowd::default();
    let seen = [10, 0, 5_000, 4_000, 1_250, 1_250, 0, 900, 100].map(|live| crowd.has_gone(live));
    assert_eq!(seen, [false, false, false, false, true, false, true, false, true]);
}

impl Shared {
    /// Why nothing may pass now, if that is so.
    fn held(&self) -> Result<(), (RefusalReason, String)> {
        match &*self.holding.borrow() {
            Some(held) => {
                let detail = format!("this instance is quarantined by the gate {}: {}", held.gate, held.why);
                Err((RefusalReason::Quarantined, detail))
            }
            None => Ok(()),
        }
    }

    /// A place for what has no peer that could be judged; taken before [`Shared::may`] is asked, so that none slips through.
    fn enter_unproven(&self, what: What) -> unproven::Entered {
        self.unproven.enter(what, &self.cut)
    }

    /// Whether something without a peer may be, by quarantine and the collector's policy; our own settings are asked where
    /// it begins, and do not change.
    fn may(&self, live: &unproven::Live) -> Result<(), (RefusalReason, String)> {
        self.held()?;
        match &live.what {
            What::Plaintext(at) => {
                let lets_in = |policy: &Extract| policy.lets_in(Who::Unproven, at);
                self.by_policy(|policy| lets_in(policy).map_err(|why| (RefusalReason::NotAllowed, why)))
            }
            What::Egress { target, unresolved } => self.may_go(target, live.dialled(), *unresolved),
        }
    }

    /// Whether the collector's policy lets our workload go to `target`; see [`policy::may_go`].
    fn may_go(
        &self,
        target: &Target,
        dialled: Option<SocketAddr>,
        unresolved: bool,
    ) -> Result<(), (RefusalReason, String)> {
        self.by_policy(|policy| policy::may_go(policy, target, dialled, unresolved))
    }

    /// Whether a name could be allowed by the collector's policy where an address alone is not.
    fn policy_asks_for_names(&self, port: u16) -> bool {
        let identity = self.identity.borrow().clone();
        let policy = identity.as_ref().and_then(|identity| identity.policy.as_ref().ok());
        policy.and_then(Extract::egress).is_some_and(|outward| outward.list.asks_for_names(port))
    }

    fn by_policy(
        &self,
        judge: impl FnOnce(&Extract) -> Result<(), (RefusalReason, String)>,
    ) -> Result<(), (RefusalReason, String)> {
        let identity = self.identity.borrow().clone();
        let Some(identity) = identity else { return self.without_identity() };
        judge(identity.policy.as_ref().map_err(|fault| (RefusalReason::Quarantined, fault.clone()))?)
    }

    /// An agent that never had a directive has its own settings alone to keep to.
    fn without_identity(&self) -> Result<(), (RefusalReason, String)> {
        if !self.directive_is_unread {
            return Ok(());
        }
        let detail = "this agent keeps a directive of its collector (directive.json in data_dir) and has no identity yet \
                      to read it by: until then nobody can say what it forbids";
        Err((RefusalReason::NoIdentity, detail.into()))
    }

    /// The identity, if it can be used now.
    fn usable_identity(&self) -> Result<Arc<Identity>, (RefusalReason, String)> {
        self.held()?;
        let identity = self.identity.borrow().clone();
        let identity = identity.ok_or((RefusalReason::NoIdentity, "this agent has not enrolled yet".to_owned()))?;
        identity.usable(Timestamp::now()).map_err(|fault| (RefusalReason::NoIdentity, fault.to_string()))?;
        Ok(identity)
    }

    /// Judges every live connection by what is true now.
    fn review(&self) {
        self.unproven.review(|live| self.may(live).map_err(|(reason, _)| reason));
        let identity = self.identity.borrow().clone();
        let now = Timestamp::now();
        // A chain is judged again only when it may be trusted less: that costs as much as a handshake.
        let judges_chains = identity.as_ref().filter(|identity| self.may_trust_less(identity, now));
        let held = self.held();
        self.registry.review(|live| {
            let central = identity.as_ref().map_or(Central::silent(), |identity| identity.central());
            match (&held, policy::decide(&live.rules, &live.peer, central, now)) {
                (Err((reason, detail)), _) => Decision::Refuse(*reason, detail.clone()),
                (Ok(()), Decision::Allow) => {
                    judges_chains.map_or(Decision::Allow, |identity| identity.judge_again(live, now))
                }
                (Ok(()), refused) => refused,
            }
        });
    }

    /// Whether whom we trust has changed since the last time this was asked, or a revocation list has run out.
    fn may_trust_less(&self, identity: &Identity, now: Timestamp) -> bool {
        let mut last = self.reviewed.lock().unwrap_or_else(PoisonError::into_inner);
        // Who shook hands right before the last time may have come too late for it.
        let since = |at: Timestamp| at.minus(self.timeouts.handshake);
        let less = last.as_ref().is_none_or(|(trust, at)| identity.may_trust_less(trust, (since(*at), now)));
        match &mut *last {
            Some((trust, at)) if *trust == identity.trust => *at = now,
            last => *last = Some((identity.trust.clone(), now)),
        }
        less
    }

    /// Asks policy about a connection that has registered, with the newest directive; and judges its chain again if
    /// whom we trust has changed since the handshake with `identity`.
    fn decide(&self, live: &Live, identity: &Arc<Identity>) -> Decision {
        if let Err((reason, detail)) = self.held() {
            return Decision::Refuse(reason, detail);
        }
        let newest = self.identity.borrow().clone().unwrap_or_else(|| identity.clone());
        let now = Timestamp::now();
        match policy::decide(&live.rules, &live.peer, newest.central(), now) {
            Decision::Allow if !Arc::ptr_eq(&newest, identity) => newest.judge_again(live, now),
            decision => decision,
        }
    }

    /// The listener or route of this name, if by its own settings every certificate is accepted there for a while.
    fn insecure_at(&self, direction: Direction, place: &str, config: Option<&TrustAll>) -> Option<Arc<Insecure>> {
        let config = config?;
        self.insecure.iter().find(|insecure| insecure.is_of(direction, place, config)).cloned()
    }

    /// Says where every certificate is accepted.
    fn review_insecure(&self) {
        let now = Timestamp::now();
        self.insecure.iter().filter_map(|insecure| insecure.review(now)).for_each(|event| (self.ledger.emit)(event));
        self.metrics.insecure(self.insecure.iter().filter(|insecure| insecure.until(now).is_some()).count());
    }

    /// Ends plaintext where its time is over, and says where it is not.
    fn review_plaintext(&self, leniencies: &[Arc<Leniency>]) {
        let now = Timestamp::now();
        leniencies.iter().filter_map(|leniency| leniency.review(now)).for_each(|event| (self.ledger.emit)(event));
        self.metrics.permissive(leniencies.iter().filter(|leniency| leniency.is_on(now)).count());
    }

    fn bounds(&self, live: &Live, own: &Peer, pace: Option<Box<Pace>>) -> Bounds {
        let now = Timestamp::now();
        let certificates = live.peer.not_after.min(own.not_after).since(now);
        let age = self.timeouts.max_connection_age;
        let life = if age.is_zero() { certificates } else { certificates.min(age) };
        let Timeouts { idle, half_closed, .. } = self.timeouts;
        Bounds { cancelled: live.cancel.clone(), deadline: Instant::now().checked_add(life), idle, half_closed, pace }
    }

    fn plaintext_bounds(&self, leniency: &Leniency, cancelled: CancellationToken, pace: Option<Box<Pace>>) -> Bounds {
        let (lasts, age) = (leniency.until().since(Timestamp::now()), self.timeouts.max_connection_age);
        let life = if age.is_zero() { lasts } else { lasts.min(age) };
        let Timeouts { idle, half_closed, .. } = self.timeouts;
        Bounds { cancelled, deadline: Instant::now().checked_add(life), idle, half_closed, pace }
    }

    /// Books the end of a relay without TLS.
    fn settle_plaintext(&self, leniency: &Leniency, live: &unproven::Live, outcome: &Outcome) {
        let reason = match outcome.end {
            End::Cancelled if self.cut.is_cancelled() => Some("agent_stopping"),
            End::Cancelled if live.ended_for().is_some() => live.ended_for().map(RefusalReason::word),
            End::Cancelled => Some("permissive_over"),
            End::Deadline if !leniency.is_on(Timestamp::now()) => Some("permissive_over"),
            End::Deadline => Some("maximum_age"),
            End::Idle => Some("idle"),
            _ => None,
        };
        if let Some(reason) = reason {
            self.ledger
                .with(Direction::Inbound, |books| books.ended(Direction::Inbound, "plaintext".to_owned(), reason));
        }
        let Outcome { bytes_in, bytes_out, .. } = *outcome;
        self.metrics.closed(Direction::Inbound, &Traffic { bytes_in, bytes_out, truncated: false });
    }

    /// Books the end of a relay.
    fn settle(&self, live: &Live, own: &Peer, pair: &Pair, outcome: &Outcome) {
        if let Some(reason) = self.ended_by_us(live, own, &outcome.end) {
            self.ledger.ended(live, reason);
        }
        let truncated = matches!(outcome.end, End::PeerCut(_));
        let Outcome { bytes_in, bytes_out, end } = outcome;
        tracing::debug!(
            direction = pair.direction.word(),
            peer = pair.peer,
            bytes_in,
            bytes_out,
            ?end,
            "connection ended"
        );
        self.ledger.closed(pair, Traffic { bytes_in: *bytes_in, bytes_out: *bytes_out, truncated });
    }

    fn ended_by_us(&self, live: &Live, own: &Peer, end: &End) -> Option<&'static str> {
        match end {
            End::Cancelled => Some(live.ended_for().map_or("agent_stopping", RefusalReason::word)),
            End::Deadline if live.peer.not_after.min(own.not_after) <= Timestamp::now() => Some("expired"),
            End::Deadline => Some("maximum_age"),
            End::Idle => Some("idle"),
            _ => None,
        }
    }
}

/// Room for one connection: as a whole, and while it shakes hands.
struct Room {
    _connection: OwnedSemaphorePermit,
    /// Not for the workload's own connections to a peer, which wait for their turn instead.
    handshake: Option<HandshakeRoom>,
}

/// Room for a handshake, given back on drop.
struct HandshakeRoom {
    waiting: Arc<Mutex<Waiting<Occupied>>>,
    number: u64,
    /// It had to make room for another one.
    evicted: CancellationToken,
    /// The handshake is over: what it occupied is given back, and nothing can be asked of it.
    over: Arc<AtomicBool>,
}

/// What a handshake holds of what all handshakes share.
struct Occupied {
    _permit: OwnedSemaphorePermit,
    _admitted: Option<Admitted>,
    evicted: CancellationToken,
}

impl Drop for HandshakeRoom {
    fn drop(&mut self) {
        self.over.store(true, Relaxed);
        let occupied = lock(&self.waiting).leave(self.number);
        drop(occupied);
    }
}

impl Room {
    /// Waits until it has to make room, for as long as the handshake is not over.
    fn eviction(&self) -> impl Future<Output = ()> + use<> {
        let asked = self.handshake.as_ref().map(|room| (room.evicted.clone(), room.over.clone()));
        async move {
            if let Some((evicted, over)) = asked {
                evicted.cancelled().await;
                if !over.load(Relaxed) {
                    return;
                }
            }
            std::future::pending().await
        }
    }
}

impl HandshakeRoom {
    /// Counts it among the handshakes of the source that it turned out to be from.
    fn count_for(&mut self, admitted: Admitted) {
        let mut waiting = lock(&self.waiting);
        // Without it, it has just been evicted, and nothing is counted any more.
        if let Some(occupied) = waiting.leave(self.number) {
            let source = Some(admitted.source);
            let occupied = Occupied { _admitted: Some(admitted), ..occupied };
            self.number = waiting.enter(source, occupied, Instant::now());
        }
    }
}

/// A source's share, given back on drop.
struct Admitted {
    sources: Arc<Mutex<Sources>>,
    source: Source,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        lock(&self.sources).finished(self.source);
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Room for a connection from `source`, where sources are counted.
    fn room(&self, direction: Direction, source: Option<IpAddr>) -> Result<Room, String> {
        let full = |what: &str| format!("the limit of {what} is reached");
        let admitted = source.map(|source| self.admit(source)).transpose()?;
        let connection = self.connections.clone().try_acquire_owned();
        let connection = connection.map_err(|_| full("connections (limits.max_connections)"))?;
        let handshake = (direction != Direction::Outbound).then(|| self.handshake_room(admitted));
        let handshake = handshake.transpose().map_err(|()| full("handshakes under way (limits.max_handshakes)"))?;
        Ok(Room { _connection: connection, handshake })
    }

    fn handshake_room(&self, admitted: Option<Admitted>) -> Result<HandshakeRoom, ()> {
        let permit = || self.handshakes.clone().try_acquire_owned();
        let permit = permit().or_else(|fault| if self.make_room(None) { permit() } else { Err(fault) });
        let permit = permit.map_err(|_| ())?;
        let (evicted, source) = (CancellationToken::new(), admitted.as_ref().map(|admitted| admitted.source));
        let occupied = Occupied { _permit: permit, _admitted: admitted, evicted: evicted.clone() };
        let number = lock(&self.waiting).enter(source, occupied, Instant::now());
        Ok(HandshakeRoom { waiting: self.waiting.clone(), number, evicted, over: Arc::default() })
    }

    fn admit(&self, ip: IpAddr) -> Result<Admitted, String> {
        let admit = || lock(&self.sources).admit(ip, Instant::now());
        let admitted = admit().or_else(|over| match over {
            Over::Handshakes(source, _) if self.make_room(Some(source)) => admit(),
            over => Err(over),
        });
        let source = admitted.map_err(|over| over.to_string())?;
        Ok(Admitted { sources: self.sources.clone(), source })
    }

    /// Ends the oldest handshake, of `source` or of all, if it stalls. What it occupied is free on return.
    fn make_room(&self, source: Option<Source>) -> bool {
        let oldest = lock(&self.waiting).make_room(source, Instant::now());
        oldest.inspect(|occupied| occupied.evicted.cancel()).is_some()
    }
}

/// Accepts until `shared.stop`; each connection is served by `serve`, in a task of its own that is waited for. Sources are
/// not counted: the workload is the only one of what it opens.
async fn accept_each<F>(
    shared: Arc<Shared>,
    listener: TcpListener,
    direction: Direction,
    name: String,
    serve: impl Fn(TcpStream, SocketAddr, Room) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    accept_counted(shared, listener, direction, name, |_| None, serve).await;
}

/// The same, with `counted` to say whom the limits of each source are kept for.
async fn accept_counted<F>(
    shared: Arc<Shared>,
    listener: TcpListener,
    direction: Direction,
    name: String,
    counted: impl Fn(SocketAddr) -> Option<IpAddr>,
    serve: impl Fn(TcpStream, SocketAddr, Room) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut tasks = JoinSet::new();
    let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(1), shared.random);
    loop {
        let accepted = tokio::select! {
            () = shared.stop.cancelled() => break,
            Some(result) = tasks.join_next(), if !tasks.is_empty() => { log_panic(result); continue }
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Err(error) => {
                // Out of file descriptors, most likely: what is live goes on, and frees some.
                tracing::warn!(%error, listener = name, "accepting failed");
                sleep(backoff.after_failure()).await;
            }
            Ok((tcp, source)) => match shared.room(direction, counted(source)) {
                Ok(room) => {
                    backoff.reset();
                    if let Err(error) = dial::tune(&tcp, source.ip()) {
                        tracing::debug!(%error, "a connection was gone before it was served");
                    }
                    let (eviction, serving) = (room.eviction(), serve(tcp, source, room));
                    // In a box of its own: what is chosen between would be held twice.
                    let serving = Box::pin(serving);
                    tasks.spawn(serve_in(shared.clone(), direction, name.clone(), source, eviction, serving));
                }
                Err(detail) => over_limit(&shared, direction, name.clone(), source, detail),
            },
        }
    }
    drop(listener);
    while let Some(result) = tasks.join_next().await {
        log_panic(result);
    }
}

/// Serves one connection in its room, which it loses if its handshake stalls while others wait for it.
async fn serve_in(
    shared: Arc<Shared>,
    direction: Direction,
    listener: String,
    source: SocketAddr,
    eviction: impl Future<Output = ()>,
    serving: impl Future<Output = ()>,
) {
    tokio::select! {
        biased;
        () = eviction => over_limit(&shared, direction, listener, source, made_room()),
        () = serving => {}
    }
}

fn over_limit(shared: &Shared, direction: Direction, listener: String, source: SocketAddr, detail: String) {
    let (reason, peer) = (RefusalReason::LimitReached, String::new());
    shared.ledger.refused(Refusal { direction, reason, detail, listener, source: Some(source), peer });
}

fn made_room() -> String {
    format!("its handshake took more than {STALLED:?} while others waited for room (limits.max_handshakes)")
}

fn log_panic(result: Result<(), tokio::task::JoinError>) {
    if let Err(error) = result {
        tracing::error!(%error, "a task of the proxy ended by a panic");
    }
}

/// What the handshake settled, for the first sight of a peer.
fn secured(connection: &rustls::CommonState, address: SocketAddr) -> Secured {
    let tls_version = connection.protocol_version().map_or_else(String::new, |version| format!("{version:?}"));
    let group =
        connection.negotiated_key_exchange_group().map_or_else(String::new, |group| format!("{:?}", group.name()));
    Secured { address: address.to_string(), tls_version, group }
}
