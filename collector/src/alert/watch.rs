//! Keeps the engine at work: committed events go in, changes go out to sinks and into the history.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use sidewarden_proto::batch::LossReason;
use sidewarden_proto::event::{
    AlertFiring, AlertResolved, Body, ContainerRef, ContainerVerdictChanged, Event, EventsLost, Severity,
    VerdictChanged,
};
use sidewarden_proto::evidence::{Pledge, Scan};
use sidewarden_proto::finding::{Finding, Verdict};
use sidewarden_proto::identity::AgentId;
use sidewarden_proto::time::Timestamp;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};

use super::deliver::{Outbox, Stats};
use super::engine::{Alert, Change, Engine, Settings, Status};
use super::rule::{self, Lasts, Seen, Subject};
use super::{Config, Notice, SinkError};
use crate::commit::{Committed, Committer, What};
use crate::evidence;
use crate::index::{Index, IndexError, Order, Query, Record};
use crate::posture::Neighbours;
use crate::posture::pledges::{self, Names};
use crate::state::{self, Agent, Session, Standing, State};

/// How often time passes for alerts: for `for`, hold and expiry, not for what events raise.
const STEP: Duration = Duration::from_secs(1);
/// Events that are read again after a restart, at most: the rest would be older than any hold.
const TAIL_EVENTS: usize = 20_000;
/// Alert events that are read again after a restart, newest first.
const TOLD_EVENTS: usize = 20_000;
/// Events that are read again after a restart because they begin or end what only events know, newest first: what is older and
/// was told stands all the same.
const LASTING_EVENTS: usize = 20_000;
/// Events of the last moments may carry agents' clocks that are behind.
const CLOCK_SLACK: Duration = Duration::from_secs(3600);
/// How long sinks may take to be rid of what waits when the collector ends.
const DRAIN: Duration = Duration::from_secs(3);

/// What [`start`] needs.
pub struct Parts {
    /// Whom to tell.
    pub config: Config,
    /// Where events come from, and where changes of alerts go.
    pub committer: Committer,
    /// Where the last events are read after a restart.
    pub index: Index,
    /// Where the page is, for links; empty when not known.
    pub page: String,
    /// What evidence must be like.
    pub evidence: evidence::Config,
    /// The life of a certificate, of which the last third alerts.
    pub certificate_life: Duration,
    /// The clock.
    pub now: fn() -> Timestamp,
}

/// What fires now, for the API and the metrics. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Alerts {
    shown: watch::Receiver<Arc<Vec<Alert>>>,
    stats: Stats,
}

impl Alerts {
    /// Every alert that is shown: firing, resolved a while ago, or pending.
    pub fn shown(&self) -> Arc<Vec<Alert>> {
        self.shown.borrow().clone()
    }

    /// What delivering did, in numbers.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Waits until what is shown changes; false when alerts are watched no more.
    pub async fn changed(&mut self) -> bool {
        self.shown.changed().await.is_ok()
    }

    /// Alerts that never change, for tests of what shows them.
    pub fn fixed(alerts: Vec<Alert>) -> Alerts {
        Alerts { shown: watch::channel(Arc::new(alerts)).1, stats: Stats::default() }
    }
}

/// Begins to watch; ends when `shutdown` does. To be called after the collector's own start is committed, since that
/// is what ends the sessions of the run before.
pub fn start(
    parts: Parts,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(Alerts, JoinHandle<()>), SinkError> {
    let stats = Stats::default();
    let outbox = Outbox::start(parts.config.sinks()?, parts.config.resend, stats.clone());
    let (show, shown) = watch::channel(Arc::new(Vec::new()));
    // Subscribed before the state is read: an event in between is seen twice rather than never.
    let events = parts.committer.subscribe();
    let settings = parts.config.settings();
    let watcher = Watcher {
        engine: Engine::new(settings),
        settings,
        parts,
        outbox,
        show,
        up_to: 0,
        looked: Timestamp::default(),
    };
    Ok((Alerts { shown, stats }, tokio::spawn(watcher.run(events, shutdown))))
}

/// Kinds that carry verdicts, which waivers change.
const JUDGED: [&str; 4] = ["posture.baseline", "verdict.changed", "container.posture", "container.verdict_changed"];

struct Watcher {
    parts: Parts,
    settings: Settings,
    engine: Engine,
    outbox: Outbox,
    show: watch::Sender<Arc<Vec<Alert>>>,
    /// Everything up to this position was in the state that the engine began with.
    up_to: u64,
    /// Waivers that ended by then are known to have ended.
    looked: Timestamp,
}

impl Watcher {
    async fn run(mut self, mut events: broadcast::Receiver<Arc<Committed>>, shutdown: impl Future<Output = ()>) {
        tokio::pin!(shutdown);
        self.restore().await;
        let mut step = tokio::time::interval(STEP);
        step.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut repeated = Instant::now();
        loop {
            tokio::select! {
                biased;
                () = &mut shutdown => break,
                link = events.recv() => match link {
                    Ok(link) => self.take(&link, &mut events),
                    Err(RecvError::Lagged(missed)) => {
                        tracing::warn!(missed, "alerts fell behind the events and begin again from the state");
                        self.restore().await;
                    }
                    Err(RecvError::Closed) => break,
                },
                _ = step.tick() => self.end_waivers(),
            }
            self.tell().await;
            if repeated.elapsed() >= self.parts.config.resend {
                repeated = Instant::now();
                self.repeat();
            }
        }
        self.outbox.drain(DRAIN).await;
    }

    /// Takes a link, and whatever else is there already, so that a burst is one notice.
    fn take(&mut self, first: &Committed, events: &mut broadcast::Receiver<Arc<Committed>>) {
        self.observe(first);
        for _ in 0..256 {
            // What is lost here is found by the next `recv`.
            let Ok(link) = events.try_recv() else { break };
            self.observe(&link);
        }
    }

    fn observe(&mut self, link: &Committed) {
        if link.position <= self.up_to {
            return;
        }
        match &link.what {
            What::Events(events) => self.observe_events(link, events),
            What::Lost(tombstone) if tombstone.reason == LossReason::Elsewhere => {}
            What::Lost(tombstone) => {
                let body = Body::from(EventsLost {
                    first_seq: tombstone.first_seq,
                    last_seq: tombstone.last_seq,
                    by_severity: tombstone.by_severity,
                    reason: tombstone.reason.word().to_owned(),
                });
                let event = Event::new(link.received, Severity::Warning, "events were lost", &body);
                observe(&mut self.engine, None, &link.agent, link.received, &event, &Lasts::ALL);
            }
        }
    }

    fn observe_events(&mut self, link: &Committed, events: &[Event]) {
        let (now, mut changed) = ((self.parts.now)(), Vec::new());
        for event in events {
            // Committing waits while the state is held, so it is held where verdicts are read and nowhere else.
            let state = JUDGED.contains(&event.kind.as_ref()).then(|| self.parts.committer.state());
            let known = state.as_deref().map(|state| Judging { state, evidence: &self.parts.evidence, now });
            observe(&mut self.engine, known, &link.agent, link.received, event, &Lasts::ALL);
            if ANSWERING.contains(&event.kind.as_ref()) && state::is_collector_path(&link.agent) {
                changed.extend(event.body().ok().flatten().and_then(answers));
            }
        }
        if !changed.is_empty() {
            let state = self.parts.committer.state();
            let judging = Judging { state: &state, evidence: &self.parts.evidence, now };
            rejudge(&mut self.engine, judging, &changed);
        }
    }

    /// What was waived until a moment ago is a failure again.
    fn end_waivers(&mut self) {
        let now = (self.parts.now)();
        let since = std::mem::replace(&mut self.looked, now);
        let state = self.parts.committer.state();
        let ended = |waiver: &&Pledge| since < waiver.until_us && waiver.until_us <= now;
        let ended: Vec<Answers> = state.waivers.iter().filter(ended).cloned().map(Answers::Pledge).collect();
        if !ended.is_empty() {
            let judging = Judging { state: &state, evidence: &self.parts.evidence, now };
            rejudge(&mut self.engine, judging, &ended);
        }
    }

    /// Tells what changed: first people, then the history.
    async fn tell(&mut self) {
        let now = (self.parts.now)();
        let changes = self.engine.advance(now);
        self.outbox.stats().over_limit.set(i64::try_from(self.engine.over_limit()).unwrap_or(i64::MAX));
        if changes.is_empty() && self.show.borrow().is_empty() && self.engine.alerts().next().is_none() {
            return;
        }
        self.show.send_replace(Arc::new(self.engine.alerts().filter(|a| a.since <= now).cloned().collect()));
        if changes.is_empty() {
            return;
        }
        let alerts = changes.iter().map(|change| change.alert().clone()).collect();
        self.outbox.tell(Notice { at: now, alerts, page: self.parts.page.clone() });
        for change in &changes {
            if self.parts.committer.own(event_of(now, change)).await.is_err() {
                return;
            }
        }
    }

    fn repeat(&self) {
        let standing =
            self.engine.alerts().filter(|alert| alert.status != Status::Pending).cloned().collect::<Vec<_>>();
        if !standing.is_empty() {
            self.outbox.repeat(Notice { at: (self.parts.now)(), alerts: standing, page: self.parts.page.clone() });
        }
    }

    /// Begins anew from what is true, what happened last, and what was told.
    async fn restore(&mut self) {
        let now = (self.parts.now)();
        let mut engine = Engine::new(self.settings);
        let here = {
            let state = self.parts.committer.state();
            (self.up_to, self.looked) = (state.position, now);
            let judging = Judging { state: &state, evidence: &self.parts.evidence, now };
            from_state(&mut engine, judging, self.parts.certificate_life);
            here(judging)
        };
        match self.past(now).await {
            Ok(Past { lasting, recent }) => {
                // What came after the state was read is no past: it is heard in its turn, and told.
                let is_past = |record: &&Record| record.cursor.position <= self.up_to;
                let lasting = lasting.iter().filter(is_past);
                lasting.for_each(|record| replay(&mut engine, record, Lasts::UntilCleared));
                recent.iter().filter(is_past).for_each(|record| replay(&mut engine, record, Lasts::Moment));
            }
            Err(error) => tracing::error!(%error, "the last events cannot be read: some alerts may be told again"),
        }
        // What happened up to the state that was read has happened by now: to be told, it must not seem to come later.
        engine.settle((self.parts.now)(), |subject| here.contains(subject));
        self.engine = engine;
    }

    async fn past(&self, now: Timestamp) -> Result<Past, IndexError> {
        let of =
            |kinds: &[&str]| Query { kinds: kinds.iter().map(|kind| (*kind).to_owned()).collect(), ..Query::default() };
        let mut lasting = self.page(of(&TOLD), TOLD_EVENTS).await?;
        lasting.extend(self.page(of(&lasting_kinds()), LASTING_EVENTS).await?);
        lasting.sort_by_key(|record| record.cursor);
        let since = now.minus(self.settings.hold + CLOCK_SLACK);
        let recent = Query { min_severity: Severity::Warning, since: Some(since), ..Query::default() };
        let mut recent = self.page(recent, TAIL_EVENTS).await?;
        recent.retain(|record| !TOLD.contains(&record.kind.as_str()));
        Ok(Past { lasting, recent })
    }

    /// The newest `most` events that answer `query`, oldest first.
    async fn page(&self, query: Query, most: usize) -> Result<Vec<Record>, IndexError> {
        let mut found = Vec::new();
        let mut before = None;
        while found.len() < most {
            let query = Query { order: Order::Newest(before), limit: crate::index::MAX_LIMIT, ..query.clone() };
            let answer = self.parts.index.query(query).await?;
            found.extend(answer.events);
            before = answer.next;
            if before.is_none() {
                break;
            }
        }
        found.reverse();
        Ok(found)
    }
}

/// What is read again after a restart, oldest first. What is in the state is read there: an end of it may be no warning.
struct Past {
    /// What was told, and what begins or ends what only events know, however long ago.
    lasting: Vec<Record>,
    /// Warnings of the last moments.
    recent: Vec<Record>,
}

/// Kinds of events that tell what was told.
const TOLD: [&str; 2] = ["alert.firing", "alert.resolved"];

fn lasting_kinds() -> Vec<&'static str> {
    let rules = rule::RULES.iter().filter(|rule| rule.lasts == Lasts::UntilCleared);
    rules.flat_map(|rule| rule.kinds).copied().collect::<BTreeSet<_>>().into_iter().collect()
}

/// The event that keeps a change in the history.
fn event_of(now: Timestamp, change: &Change) -> Event {
    let alert = change.alert();
    let (severity, word, body) = match change {
        Change::Firing(_) => (alert.severity, "firing", Body::from(AlertFiring(alert.changed()))),
        Change::Resolved(_) => (Severity::Notice, "resolved", Body::from(AlertResolved(alert.changed()))),
    };
    Event::new(now, severity, format!("{} {word}: {}", alert.rule, alert.summary()), &body)
}

fn replay(engine: &mut Engine, record: &Record, lasts: Lasts) {
    let event = Event {
        seq: record.seq,
        at_us: record.at_us,
        kind: record.kind.clone().into(),
        severity: record.severity,
        summary: record.summary.clone(),
        body: record.body.clone(),
    };
    observe(engine, None, &record.agent, record.received_us, &event, &[lasts]);
}

/// Shows one event to the engine. What only a collector may say is not believed of anybody else; verdicts count as waivers
/// make them where those are known.
fn observe(
    engine: &mut Engine,
    known: Option<Judging<'_>>,
    agent: &AgentId,
    received: Timestamp,
    event: &Event,
    of: &[Lasts],
) {
    let forged = state::is_of_the_collector(&event.kind) && !state::is_collector_path(agent);
    let read = |rule: &rule::Rule| of.contains(&rule.lasts) && rule.reads(&event.kind, forged);
    let remembered = event.kind == "collector.started" || TOLD.contains(&event.kind.as_ref());
    if !remembered && !rule::RULES.iter().any(read) {
        return;
    }
    let mut body = event.body().unwrap_or_else(|error| {
        tracing::debug!(%agent, kind = %event.kind, %error, "an event's body does not fit its kind");
        None
    });
    if let (Some(judging), Some(body)) = (known, &mut body) {
        answer(judging, agent, body);
    }
    let seen = Seen {
        agent,
        at: event.at_us,
        received,
        kind: &event.kind,
        severity: event.severity,
        summary: &event.summary,
        body: body.as_ref(),
        last_tick: None,
        forged,
    };
    engine.observe(seen, of);
}

/// By what verdicts count.
#[derive(Clone, Copy)]
struct Judging<'a> {
    state: &'a State,
    evidence: &'a evidence::Config,
    now: Timestamp,
}

/// What changes how verdicts count.
enum Answers {
    Pledge(Pledge),
    Scan(Scan),
}

/// Kinds of events that tell of it.
const ANSWERING: [&str; 5] = ["waiver.set", "waiver.removed", "attestation.set", "attestation.removed", "scan.added"];

fn answers(body: Body) -> Option<Answers> {
    match body {
        Body::WaiverSet(body) => Some(Answers::Pledge(body.waiver)),
        Body::WaiverRemoved(body) => Some(Answers::Pledge(body.waiver)),
        Body::AttestationSet(body) => Some(Answers::Pledge(body.attestation)),
        Body::AttestationRemoved(body) => Some(Answers::Pledge(body.attestation)),
        Body::ScanAdded(body) => Some(Answers::Scan(body.scan)),
        _ => None,
    }
}

/// Has people and scanners answer in the verdicts that an event tells of.
fn answer(Judging { state, evidence, now }: Judging<'_>, id: &AgentId, body: &mut Body) {
    let apply = |names: &Names<'_>, finding: &mut Finding| {
        pledges::attest(&state.attestations, &evidence.attestors, names, finding, now);
        pledges::waive(&state.waivers, names, finding, now);
    };
    let neighbours = std::cell::OnceCell::new();
    let of_container = |container: &ContainerRef, finding: &mut Finding| {
        let neighbours = neighbours.get_or_init(|| Neighbours::of(state, evidence));
        if finding.check == evidence::CHECK
            && let Some(scan) = evidence::scan_of(&state.scans, container)
        {
            evidence::answer(evidence, scan, finding, now);
        }
        if let Some((id, node)) = state.agents.get_key_value(id) {
            apply(&Names::of_container(neighbours, id, node, container), finding);
        }
    };
    match body {
        _ if state.waivers.is_empty() && state.attestations.is_empty() && state.scans.is_empty() => {}
        Body::VerdictChanged(body) => apply(&Names::of_instance(id), &mut body.finding),
        Body::PostureBaseline(body) => {
            let names = Names::of_instance(id);
            body.findings.iter_mut().for_each(|finding| apply(&names, finding));
        }
        Body::ContainerVerdictChanged(body) => of_container(&body.container, &mut body.finding),
        Body::ContainerPosture(body) => {
            body.findings.iter_mut().for_each(|finding| of_container(&body.container, finding));
        }
        _ => {}
    }
}

/// Shows the engine again what these are about, as it stands now.
fn rejudge(engine: &mut Engine, judging: Judging<'_>, changed: &[Answers]) {
    let Judging { state, evidence, now } = judging;
    let by_pledge = |names: &Names<'_>, check: &str| {
        changed.iter().any(|answers| matches!(answers, Answers::Pledge(pledge) if names.are_meant_by(pledge, check)))
    };
    let by_scan = |container: &ContainerRef, check: &str| {
        let is_of = |scan: &Scan| scan.is_of(&container.image_id, &container.image_digests);
        check == evidence::CHECK && changed.iter().any(|answers| matches!(answers, Answers::Scan(scan) if is_of(scan)))
    };
    let neighbours = Neighbours::of(state, evidence);
    for (id, agent) in &state.agents {
        if matches!(state.status(agent, now), state::Status::Stopped | state::Status::Gone) {
            continue;
        }
        let names = Names::of_instance(id);
        for (_, standing) in agent.findings.iter().filter(|(check, _)| by_pledge(&names, check)) {
            stands(engine, judging, id, None, standing, now);
        }
        for hosted in agent.hosted.values() {
            let names = Names::of_container(&neighbours, id, agent, &hosted.container);
            let meant = |check: &str| by_pledge(&names, check) || by_scan(&hosted.container, check);
            for (_, standing) in hosted.findings.iter().filter(|(check, _)| meant(check)) {
                stands(engine, judging, id, Some(&hosted.container), standing, now);
            }
        }
    }
}

/// Shows the engine a verdict that the state holds, as it counts.
fn stands(
    engine: &mut Engine,
    judging: Judging<'_>,
    agent: &AgentId,
    container: Option<&ContainerRef>,
    standing: &Standing,
    at: Timestamp,
) {
    let finding = standing.finding.clone();
    let mut body = match container.cloned() {
        Some(container) => Body::from(ContainerVerdictChanged { container, before: String::new(), finding }),
        None => Body::from(VerdictChanged { before: String::new(), finding }),
    };
    answer(judging, agent, &mut body);
    let seen = Seen {
        agent,
        at,
        received: at,
        kind: body.kind(),
        severity: standing.finding.severity,
        summary: "",
        body: Some(&body),
        last_tick: None,
        forged: false,
    };
    engine.observe(seen, &Lasts::ALL);
}

/// Raises what the state says holds.
fn from_state(engine: &mut Engine, judging: Judging<'_>, certificate_life: Duration) {
    for (id, agent) in present(judging) {
        from_agent(engine, judging, id, agent, certificate_life);
    }
}

/// Agents that have not gone, in whatever way.
fn present(judging: Judging<'_>) -> impl Iterator<Item = (&AgentId, &Agent)> {
    let has_gone =
        move |agent| matches!(judging.state.status(agent, judging.now), state::Status::Stopped | state::Status::Gone);
    judging.state.agents.iter().filter(move |(_, agent)| !has_gone(agent))
}

/// Of whom something may hold: of them, and of the collector.
fn here(judging: Judging<'_>) -> BTreeSet<Subject> {
    present(judging).map(|(id, _)| id).chain(&judging.state.collector).map(Subject::from).collect()
}

fn from_agent(engine: &mut Engine, judging: Judging<'_>, id: &AgentId, agent: &Agent, life: Duration) {
    let started = judging.state.started;
    let raise = |engine: &mut Engine, name, case, at| {
        let rule = rule::by_name(name).expect("the name stands in the table of rules");
        engine.raise(rule, case, at);
    };
    if let Session::Ended { at, clean: false, .. } = agent.session {
        raise(engine, rule::SILENT, rule::not_back(id, at.max(started)), at);
    }
    // What passes now has nothing to tell: there is no alert that it could end.
    let wanted = |s: &&Standing| s.finding.verdict != Verdict::Pass;
    for standing in agent.findings.values().filter(wanted) {
        stands(engine, judging, id, None, standing, standing.since);
    }
    for hosted in agent.hosted.values() {
        for standing in hosted.findings.values().filter(wanted) {
            stands(engine, judging, id, Some(&hosted.container), standing, standing.since);
        }
    }
    if let Some(certificate) = &agent.certificate {
        for (name, severity) in [("CertificateExpiring", Severity::Warning), ("CertificateEnding", Severity::Critical)]
        {
            let life = if certificate.not_before == Timestamp(0) {
                life
            } else {
                certificate.not_after.since(certificate.not_before)
            };
            let elsewhere = certificate.elsewhere;
            let due = certificate.not_after.minus(life / rule::share(severity, elsewhere));
            raise(engine, name, rule::expiring(id, certificate.not_after, due, elsewhere), started);
        }
    }
    if let Some(error) = &agent.renewal_failed {
        raise(engine, "RenewalFailing", rule::not_renewed(id, error), started);
    }
    for (gate, gated) in &agent.gates {
        if let Some(case) = rule::gated(id, gate, gated.status, &gated.why) {
            raise(engine, "WorkloadQuarantined", case, gated.since);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Gated;
    use sidewarden_proto::config::FromValue;
    use sidewarden_proto::event::GateStatus;

    fn orders() -> AgentId {
        "spiffe://x.test/shop/orders#orders-1".parse().unwrap()
    }

    /// What is told and what stands after a restart at `now`, where the state says this of the agent.
    fn begun_from(agent: Agent, now: i64) -> (Vec<String>, BTreeSet<Subject>) {
        let now = Timestamp::from_secs(now);
        let state = State { agents: [(orders(), agent)].into(), ..State::default() };
        let evidence = evidence::Config {
            fail_on: FromValue::from_text("high").unwrap(),
            with_fix_only: true,
            max_age: Duration::from_secs(1),
            folder: None,
            attestors: Vec::new(),
        };
        let mut engine = Engine::new(Settings::default());
        let judging = Judging { state: &state, evidence: &evidence, now };
        from_state(&mut engine, judging, Duration::from_secs(1));
        let here = here(judging);
        engine.settle(now, |subject| here.contains(subject));
        (engine.advance(now).iter().map(|change| change.alert().summary()).collect(), here)
    }

    #[test]
    fn what_breaks_a_gate_of_the_policy_is_known_from_the_state() {
        let since = Timestamp::from_secs(10);
        let gate = |status| Gated { status, why: "privileged".into(), since };
        let gates = [("g".to_owned(), gate(GateStatus::Quarantined)), ("h".to_owned(), gate(GateStatus::DryRun))];
        let (told, here) = begun_from(Agent { gates: gates.into(), ..Agent::default() }, 20);
        assert_eq!(
            told,
            [
                "shop/orders (orders-1): it is quarantined by the gate g: privileged",
                "shop/orders (orders-1): it would be quarantined by the gate h: privileged"
            ]
        );
        assert_eq!(here, BTreeSet::from([Subject::from(&orders())]));
    }

    #[test]
    fn of_an_agent_that_said_goodbye_nothing_holds() {
        let since = Timestamp::from_secs(10);
        let gated = Gated { status: GateStatus::Quarantined, why: "privileged".into(), since };
        let session = Session::Ended { at: since, reason: "stopped".into(), clean: true };
        let agent = Agent { gates: [("g".to_owned(), gated)].into(), session, ..Agent::default() };
        assert_eq!(begun_from(agent, 20), (Vec::new(), BTreeSet::new()));
    }

    #[test]
    fn what_ends_something_that_only_events_know_is_read_again_with_what_begins_it() {
        let kinds = lasting_kinds();
        assert!(["engine.lost", "engine.back", "agent.started"].iter().all(|kind| kinds.contains(kind)), "{kinds:?}");
        assert!(!JUDGED.iter().any(|kind| kinds.contains(kind)), "verdicts are in the state");
    }
}
