//! What is true now: a fold of every committed event, one after another.
//!
//! No clock and no I/O: the same links in the same order give the same state, on any machine, so it can be rebuilt from
//! the log at any time. Time is an event here too (`clock.tick`). What the collector says of others (`agent.connected`,
//! `certificate.issued`, …) counts only when the collector itself said it. Unknown kinds are counted and kept.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sidewarden_proto::batch::{Epoch, LossReason, Tombstone};
use sidewarden_proto::event::{
    Body, ContainerRef, Direction, Event, EventRef, GateStatus, Mode, RefusalReason, Severity, ShownCertificate,
    TrustChanged, TrustedRoot,
};
use sidewarden_proto::evidence::{Pledge, Scan};
use sidewarden_proto::finding::{Finding, Vantage};
use sidewarden_proto::identity::AgentId;
use sidewarden_proto::policy::Happening;
use sidewarden_proto::time::Timestamp;

/// Peers kept for one agent, and as many places that its workload goes to; later ones are only counted.
const MAX_PEERS: usize = 256;
/// Findings kept for one agent: far more than there are checks.
const MAX_FINDINGS: usize = 512;
/// Containers of one host, and of one instance.
const MAX_HOSTED: usize = 4_096;
const MAX_CONTAINERS: usize = 64;
/// Waivers kept, ended ones included, and as many attestations.
pub const MAX_WAIVERS: usize = 2_000;
/// Images of which a scan is kept; the oldest goes first.
const MAX_SCANS: usize = 5_000;
/// Bytes of a text that an agent sent and the state keeps.
const MAX_TEXT: usize = 2_048;
/// Trust domains, and roots of each, kept for one agent: as many as can be imported.
const MAX_ROOTS: usize = 200;
/// Lines of evidence kept for one finding.
const MAX_EVIDENCE: usize = 32;
/// Different words counted in one table (kinds, reasons); later ones count as `other`.
const MAX_WORDS: usize = 128;
/// An agent without a heartbeat of its own is expected to speak this often.
const DEFAULT_HEARTBEAT: Duration = Duration::from_secs(10);
/// A session may be away for this many heartbeats before its agent counts as silent.
const SILENT_HEARTBEATS: u32 = 3;
/// An agent that ended or fell silent this long ago counts as gone.
const GONE_AFTER: Duration = Duration::from_secs(24 * 3600);
/// An agent that has been gone this long is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(30 * 24 * 3600);

/// Where an event stands: what the collector knows of it besides the event itself.
#[derive(Clone, Copy, Debug)]
pub struct Stamp<'a> {
    /// Position of its link in the log.
    pub position: u64,
    /// Who sent it, by certificate.
    pub agent: &'a AgentId,
    /// The life of the sender's spool.
    pub epoch: Epoch,
    /// When the collector took it.
    pub received: Timestamp,
}

/// Everything that is true now.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// Position of the last link that was applied.
    pub position: u64,
    /// When that link was taken: the clock of the history.
    pub at: Timestamp,
    /// The collector's last start.
    pub started: Timestamp,
    /// Who the collector is in its own log; set by `collector.started`.
    pub collector: Option<AgentId>,
    /// Every agent that was ever enrolled or heard, until it is forgotten.
    #[serde(with = "pairs")]
    pub agents: BTreeMap<AgentId, Agent>,
    /// What is broken and somebody answers for, those that ended included until they are removed.
    pub waivers: Vec<Pledge>,
    /// What nobody can see and somebody attests.
    pub attestations: Vec<Pledge>,
    /// What scanners found in images, one of each image.
    pub scans: Vec<Scan>,
    /// Sums over all agents, those forgotten included.
    pub totals: Totals,
}

/// Sums over all agents. Every map is capped.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Totals {
    /// Events by kind and severity (lowest first).
    pub events: BTreeMap<String, [u64; 4]>,
    /// Refused connections by reason, repeats included.
    pub refused: BTreeMap<RefusalReason, u64>,
    /// Lost events by reason.
    pub lost: BTreeMap<String, u64>,
    /// Refused requests for a certificate, by reason.
    pub enrolments_refused: BTreeMap<String, u64>,
    /// Refused connections to the collector, by reason.
    pub ingest_refused: BTreeMap<String, u64>,
    /// Certificates issued, by `token`, `renewal`, `grace`.
    pub issued: BTreeMap<String, u64>,
    /// Events of kinds that this version does not know.
    pub unknown_kinds: u64,
    /// Events whose body does not fit their kind.
    pub unreadable: u64,
    /// Events an agent sent of a kind that only the collector may say.
    pub forged: u64,
}

/// What is true of one agent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Agent {
    /// Its version; empty until it said so.
    pub version: String,
    /// How it stands beside its workload.
    pub mode: Option<Mode>,
    /// What it is able to see.
    pub vantage: Option<Vantage>,
    /// Seconds between its signs of life; 0 when not known.
    pub heartbeat_secs: u32,
    /// Its last start, and whether the run before ended in order.
    pub started: Option<Started>,
    /// Its session with the collector.
    pub session: Session,
    /// When an event of its own was last taken.
    pub last_event: Timestamp,
    /// The reason of its last orderly end, until it starts again.
    pub stopping: Option<String>,
    /// Its posture, by check.
    pub findings: BTreeMap<String, Standing>,
    /// The host it runs on, as a hash that everything there agrees on; empty when not known.
    pub host: String,
    /// The ids of the workload's containers.
    pub containers: Vec<String>,
    /// What a node agent says of the containers of its host, by id.
    pub hosted: BTreeMap<String, Hosted>,
    /// Whom it talks to.
    #[serde(with = "pairs")]
    pub peers: BTreeMap<(Direction, String), PeerSeen>,
    /// First sightings of peers that found no room in `peers`.
    pub peers_beyond: u64,
    /// Refused connections by reason.
    pub refused: BTreeMap<RefusalReason, Counted>,
    /// Lost events by reason.
    pub lost: BTreeMap<String, Counted>,
    /// Its certificate.
    pub certificate: Option<Certificate>,
    /// Its last renewal failed, with this error; cleared by the next that works.
    pub renewal_failed: Option<String>,
    /// Whose roots it holds, if it has said so.
    pub trust: Option<TrustChanged>,
    /// Events by severity, lowest first.
    pub events: [u64; 4],
    /// What gates ask about, and when it happened last.
    #[serde(with = "pairs")]
    pub happened: BTreeMap<Happening, Timestamp>,
    /// How it stands before the gates of the policy, as told last; those it keeps are left out.
    pub gates: BTreeMap<String, Gated>,
}

/// How an instance stands before a gate that it does not keep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gated {
    /// What follows from it.
    pub status: GateStatus,
    /// What it did.
    pub why: String,
    /// Since when it stands so.
    pub since: Timestamp,
}

/// An agent's start.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Started {
    /// When.
    pub at: Timestamp,
    /// Whether the run before ended in order.
    pub clean: bool,
}

/// An agent's session with the collector.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Session {
    /// Enrolled, never connected.
    #[default]
    Never,
    /// Connected.
    Live {
        /// Since when.
        since: Timestamp,
        /// From where.
        source: String,
        /// `quic` or `tcp`.
        transport: String,
    },
    /// Not connected any more.
    Ended {
        /// When it ended.
        at: Timestamp,
        /// Why.
        reason: String,
        /// The agent said goodbye.
        clean: bool,
    },
}

/// One word for an agent's presence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Enrolled, not yet heard.
    Known,
    /// Connected.
    Live,
    /// Its connection ended a moment ago; it may be on its way back.
    Away,
    /// It should be there and is not heard.
    Silent,
    /// It said goodbye.
    Stopped,
    /// Stopped or silent for more than a day.
    Gone,
}

impl Status {
    /// All of them, in the order they are shown.
    pub const ALL: [Status; 6] =
        [Status::Live, Status::Away, Status::Silent, Status::Stopped, Status::Known, Status::Gone];

    /// The word in tables, metrics and the API.
    pub const fn word(self) -> &'static str {
        match self {
            Status::Known => "known",
            Status::Live => "live",
            Status::Away => "away",
            Status::Silent => "silent",
            Status::Stopped => "stopped",
            Status::Gone => "gone",
        }
    }
}

/// What a node agent says of a container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hosted {
    /// Which one, as its engine calls it.
    pub container: ContainerRef,
    /// Its posture, by check.
    pub findings: BTreeMap<String, Standing>,
}

/// A finding, and since when its verdict is what it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Standing {
    /// The finding as last sent.
    pub finding: Finding,
    /// Since when its verdict holds, by the agent's clock (never ahead of the collector's).
    pub since: Timestamp,
}

/// A peer of a workload.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PeerSeen {
    /// First sighting.
    pub first: Timestamp,
    /// Last summary or sighting.
    pub last: Timestamp,
    /// Connections opened.
    pub opened: u64,
    /// Bytes from the peer to the workload.
    pub bytes_in: u64,
    /// Bytes from the workload to the peer.
    pub bytes_out: u64,
}

/// How often something happened, and when last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counted {
    /// How often.
    pub count: u64,
    /// When last, by the collector's clock.
    pub last: Timestamp,
}

/// An agent's certificate, as it was issued here or as it was shown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// Serial number, in hex.
    pub serial: String,
    /// SHA-256 of the public key (SPKI), in hex.
    pub spki: String,
    /// Its begin; 0 until it was shown.
    #[serde(default)]
    pub not_before: Timestamp,
    /// Its end.
    pub not_after: Timestamp,
    /// Whether somebody else's CA has issued it.
    #[serde(default)]
    pub elsewhere: bool,
}

impl From<ShownCertificate> for Certificate {
    fn from(shown: ShownCertificate) -> Certificate {
        let ShownCertificate { serial, spki, not_before_us, not_after_us, elsewhere } = shown;
        Certificate { serial, spki, not_before: not_before_us, not_after: not_after_us, elsewhere }
    }
}

impl Agent {
    /// Its presence at `now`. `started` is the collector's own start: nobody is silent before having had time to come back.
    pub fn status(&self, now: Timestamp, started: Timestamp) -> Status {
        match &self.session {
            Session::Never => Status::Known,
            Session::Live { .. } => Status::Live,
            Session::Ended { at, .. } if now.since(*at) >= GONE_AFTER => Status::Gone,
            Session::Ended { clean: true, .. } => Status::Stopped,
            Session::Ended { at, .. } if now.since((*at).max(started)) < self.silent_after() => Status::Away,
            Session::Ended { .. } => Status::Silent,
        }
    }

    /// How long it may be away before it counts as silent.
    pub fn silent_after(&self) -> Duration {
        match self.heartbeat_secs {
            0 => DEFAULT_HEARTBEAT * SILENT_HEARTBEATS,
            secs => Duration::from_secs(secs.into()) * SILENT_HEARTBEATS,
        }
    }

    /// How many findings have this verdict (`fail`, `unknown`, …).
    pub fn count(&self, verdict: &str) -> usize {
        self.findings.values().filter(|s| s.finding.verdict.word() == verdict).count()
    }

    /// Whether it has told of a check.
    pub fn knows(&self, check: &str) -> bool {
        self.findings.contains_key(check) || self.hosted.values().any(|hosted| hosted.findings.contains_key(check))
    }

    fn certified(&mut self, serial: String, spki: String, not_after: Timestamp) {
        let (not_before, elsewhere) = (Timestamp(0), false);
        self.certificate = Some(Certificate { serial, spki, not_before, not_after, elsewhere });
        self.renewal_failed = None;
    }

    /// What is known of a container of its host; `None` where there are too many.
    fn hosted(&mut self, mut container: ContainerRef) -> Option<&mut Hosted> {
        let texts = [&mut container.id, &mut container.name, &mut container.image, &mut container.state];
        texts.into_iter().for_each(|text| *text = short(std::mem::take(text)));
        container.image_id = short(container.image_id);
        container.image_digests = container.image_digests.into_iter().take(16).map(short).collect();
        let known = self.hosted.contains_key(&container.id);
        if self.mode != Some(Mode::Node) || (!known && self.hosted.len() >= MAX_HOSTED) {
            return None;
        }
        let hosted = self.hosted.entry(container.id.clone()).or_default();
        hosted.container = container;
        Some(hosted)
    }

    fn peer(&mut self, direction: Direction, peer: String) -> Option<&mut PeerSeen> {
        let key = (direction, short(peer));
        // A workload may go to any number of places: they must not crowd out its peers.
        let is_egress = |direction| direction == Direction::Egress;
        let alike = || self.peers.keys().filter(|(other, _)| is_egress(*other) == is_egress(direction)).count();
        if !self.peers.contains_key(&key) && alike() >= MAX_PEERS {
            self.peers_beyond += 1;
            return None;
        }
        Some(self.peers.entry(key).or_default())
    }
}

/// A pledge takes the place of the one before about the same.
fn stand_in(pledges: &mut Vec<Pledge>, pledge: Pledge, most: usize) {
    pledges.retain(|other| !other.is_of_same(&pledge));
    if pledges.len() < most {
        pledges.push(pledge);
    }
}

fn stand(findings: &mut BTreeMap<String, Standing>, finding: Finding, at: Timestamp) {
    let finding = bounded(finding);
    let same = findings.get(&finding.check).filter(|s| s.finding.verdict.word() == finding.verdict.word());
    let since = same.map_or(at, |s| s.since);
    if findings.len() < MAX_FINDINGS || findings.contains_key(&finding.check) {
        findings.insert(finding.check.clone(), Standing { finding, since });
    }
}

/// A baseline is the whole posture: what it does not name is no longer judged.
fn stand_all(standing: &mut BTreeMap<String, Standing>, findings: Vec<Finding>, at: Timestamp) {
    standing.retain(|check, _| findings.iter().any(|f| f.check == *check));
    // Those named twice or too long are no work worth more than this.
    findings.into_iter().take(2 * MAX_FINDINGS).for_each(|finding| stand(standing, finding, at));
}

/// Kinds that only a collector may tell.
pub(crate) const OF_THE_COLLECTOR: [&str; 27] = [
    "attestation.set",
    "attestation.removed",
    "scan.added",
    "waiver.set",
    "waiver.removed",
    "trust.store_changed",
    "collector.started",
    "clock.tick",
    "certificate.issued",
    "enrolment.refused",
    "agent.connected",
    "agent.disconnected",
    "ingest.refused",
    "token.created",
    "identity.revoked",
    "identity.restored",
    "quarantine.changed",
    "quarantine.released",
    "policy.applied",
    "ca.rotated",
    "ca.issued",
    "ca.certificates",
    "leader.changed",
    "collector.identity_taken",
    "collector.identity_refused",
    "alert.firing",
    "alert.resolved",
];

/// Whether only a collector may tell this kind.
pub(crate) fn is_of_the_collector(kind: &str) -> bool {
    OF_THE_COLLECTOR.contains(&kind)
}

/// Kinds whose body is read here; those of all others is left alone, which is most of the work saved.
fn changes_state(kind: &str) -> bool {
    const KINDS: [&str; 15] = [
        "trust.changed",
        "container.posture",
        "container.verdict_changed",
        "container.gone",
        "agent.started",
        "agent.stopping",
        "posture.baseline",
        "verdict.changed",
        "connection.refused",
        "peer.first_seen",
        "connections.summary",
        "identity.renewed",
        "identity.renewal_failed",
        "process.entered",
        "process.shell",
    ];
    KINDS.contains(&kind)
}

impl State {
    /// Takes one event in.
    pub fn apply(&mut self, stamp: Stamp<'_>, event: &EventRef<'_>) {
        self.advance(stamp);
        self.count(&event.kind, event.severity, stamp);
        if event.kind == "events.lost" {
            return self.lost_by_event(stamp, event);
        }
        let by_collector = is_of_the_collector(&event.kind);
        if by_collector && !self.is_collector(stamp.agent) {
            self.totals.forged += 1;
            return;
        }
        if !by_collector && !changes_state(&event.kind) {
            return;
        }
        match event.body() {
            Ok(Some(body)) if by_collector => self.told_by_collector(stamp, body),
            Ok(Some(body)) => self.told_by_agent(stamp, event.at_us.min(stamp.received), body),
            Ok(None) => {}
            Err(_) => self.totals.unreadable += 1,
        }
    }

    /// Takes in the place where events were.
    pub fn apply_loss(&mut self, stamp: Stamp<'_>, tombstone: &Tombstone) {
        self.advance(stamp);
        if tombstone.reason == LossReason::Elsewhere {
            return;
        }
        self.lose(stamp, tombstone.reason.word(), tombstone.last_seq - tombstone.first_seq + 1);
    }

    /// The state at the end of `now`: what a reader compares "how long ago" with.
    pub fn status(&self, agent: &Agent, now: Timestamp) -> Status {
        agent.status(now, self.started)
    }

    /// Whether `agent` is the collector's own name in the log.
    pub fn is_collector(&self, agent: &AgentId) -> bool {
        is_collector_path(agent) && self.collector.as_ref().is_none_or(|own| own.workload == agent.workload)
    }

    fn advance(&mut self, stamp: Stamp<'_>) {
        self.position = self.position.max(stamp.position);
        self.at = self.at.max(stamp.received);
    }

    fn agent(&mut self, id: &AgentId) -> &mut Agent {
        if !self.agents.contains_key(id) {
            self.agents.insert(id.clone(), Agent::default());
        }
        self.agents.get_mut(id).expect("it was put there just now")
    }

    fn count(&mut self, kind: &str, severity: Severity, stamp: Stamp<'_>) {
        if !sidewarden_proto::event::KINDS.contains(&kind) {
            self.totals.unknown_kinds += 1;
        }
        capped(&mut self.totals.events, kind)[severity.rank()] += 1;
        if !is_collector_path(stamp.agent) {
            let agent = self.agent(stamp.agent);
            agent.events[severity.rank()] += 1;
            agent.last_event = agent.last_event.max(stamp.received);
        }
    }

    fn lost_by_event(&mut self, stamp: Stamp<'_>, event: &EventRef<'_>) {
        match event.body() {
            Ok(Some(Body::EventsLost(lost))) => {
                let reason = lost.reason.chars().take(32).collect::<String>();
                self.lose(stamp, &reason, lost.last_seq.saturating_sub(lost.first_seq).saturating_add(1));
            }
            _ => self.totals.unreadable += 1,
        }
    }

    fn lose(&mut self, stamp: Stamp<'_>, reason: &str, events: u64) {
        let total = capped(&mut self.totals.lost, reason);
        *total = total.saturating_add(events);
        let counted = capped(&mut self.agent(stamp.agent).lost, reason);
        counted.count = counted.count.saturating_add(events);
        counted.last = stamp.received;
    }

    fn told_by_agent(&mut self, stamp: Stamp<'_>, at: Timestamp, body: Body) {
        let received = stamp.received;
        let agent = self.agent(stamp.agent);
        match body {
            Body::AgentStarted(b) => {
                (agent.version, agent.mode, agent.vantage) = (short(b.version), Some(b.mode), Some(b.vantage));
                agent.heartbeat_secs = b.heartbeat_secs.min(3600);
                agent.started = Some(Started { at, clean: b.clean });
                agent.stopping = None;
                // Its host's containers are told anew: one that went while nobody looked is not.
                agent.hosted.clear();
            }
            Body::AgentStopping(b) => agent.stopping = Some(short(b.reason)),
            Body::PostureBaseline(b) => {
                agent.host = short(b.host);
                agent.containers = b.containers.into_iter().take(MAX_CONTAINERS).map(short).collect();
                stand_all(&mut agent.findings, b.findings, at);
            }
            Body::ContainerPosture(b) => {
                if let Some(hosted) = agent.hosted(b.container) {
                    stand_all(&mut hosted.findings, b.findings, at);
                }
            }
            Body::ContainerVerdictChanged(b) => {
                if let Some(hosted) = agent.hosted(b.container) {
                    stand(&mut hosted.findings, b.finding, at);
                }
            }
            Body::ContainerGone(b) => drop(agent.hosted.remove(&b.container.id)),
            Body::VerdictChanged(b) => stand(&mut agent.findings, b.finding, at),
            Body::ConnectionRefused(b) => {
                let counted = agent.refused.entry(b.reason).or_default();
                (counted.count, counted.last) = (counted.count.saturating_add(b.count), received);
                let total = self.totals.refused.entry(b.reason).or_default();
                *total = total.saturating_add(b.count);
            }
            Body::PeerFirstSeen(b) => {
                if let Some(peer) = agent.peer(b.direction, b.peer) {
                    peer.last = at;
                    if peer.first == Timestamp::default() {
                        peer.first = at;
                    }
                }
            }
            Body::ConnectionsSummary(b) => {
                if let Some(peer) = agent.peer(b.direction, b.peer) {
                    peer.last = at;
                    peer.opened = peer.opened.saturating_add(b.opened);
                    peer.bytes_in = peer.bytes_in.saturating_add(b.bytes_in);
                    peer.bytes_out = peer.bytes_out.saturating_add(b.bytes_out);
                }
            }
            Body::TrustChanged(b) => agent.trust = Some(bounded_trust(b)),
            Body::IdentityRenewed(_) => agent.renewal_failed = None,
            Body::IdentityRenewalFailed(b) => agent.renewal_failed = Some(short(b.error)),
            other => {
                for what in Happening::of(&other) {
                    let last = agent.happened.entry(what).or_default();
                    *last = (*last).max(at);
                }
            }
        }
    }

    fn told_by_collector(&mut self, stamp: Stamp<'_>, body: Body) {
        match body {
            Body::CollectorStarted(_) => self.collector_started(stamp),
            Body::ClockTick(_) => self.forget_the_gone(),
            Body::CertificateIssued(b) => {
                *capped(&mut self.totals.issued, &b.by) += 1;
                if let Ok(instance) = b.instance.parse() {
                    self.agent(&AgentId { workload: b.workload, instance }).certified(b.serial, b.spki, b.not_after_us);
                }
            }
            Body::EnrolmentRefused(b) => {
                *capped(&mut self.totals.enrolments_refused, first_word(&b.reason)) += b.count;
            }
            Body::IngestRefused(b) => *capped(&mut self.totals.ingest_refused, first_word(&b.reason)) += b.count,
            Body::AgentConnected(b) => {
                let Ok(instance) = b.instance.parse() else { return };
                let agent = self.agent(&AgentId { workload: b.workload, instance });
                (agent.version, agent.mode) = (b.version, Mode::of_word(&b.mode).or(agent.mode));
                agent.session = Session::Live { since: stamp.received, source: b.source, transport: b.transport };
                // A collector of before does not say what was shown.
                agent.certificate = b.certificate.map(Certificate::from).or(agent.certificate.take());
            }
            Body::QuarantineChanged(b) => {
                let Ok(instance) = b.instance.parse() else { return };
                let agent = self.agent(&AgentId { workload: b.workload, instance });
                agent.gates.remove(&b.gate);
                if b.status != GateStatus::Clear {
                    let (status, why, since) = (b.status, short(b.why), stamp.received);
                    agent.gates.insert(b.gate, Gated { status, why, since });
                }
            }
            Body::WaiverSet(b) => stand_in(&mut self.waivers, b.waiver, MAX_WAIVERS),
            Body::AttestationSet(b) => stand_in(&mut self.attestations, b.attestation, MAX_WAIVERS),
            Body::AttestationRemoved(b) => self.attestations.retain(|other| !other.is_of_same(&b.attestation)),
            Body::ScanAdded(b) => {
                self.scans.retain(|other| !other.is_of_same(&b.scan));
                self.scans.push(b.scan);
                if self.scans.len() > MAX_SCANS {
                    self.scans.remove(0);
                }
            }
            Body::WaiverRemoved(b) => self.waivers.retain(|waiver| !waiver.is_of_same(&b.waiver)),
            Body::AgentDisconnected(b) => {
                let Ok(instance) = b.instance.parse() else { return };
                let agent = self.agent(&AgentId { workload: b.workload, instance });
                agent.session = Session::Ended { at: stamp.received, reason: b.reason, clean: b.clean };
            }
            _ => {}
        }
    }

    /// A start ends every session of the run before: it had no time to say so.
    fn collector_started(&mut self, stamp: Stamp<'_>) {
        self.started = stamp.received;
        self.collector = Some(stamp.agent.clone());
        for agent in self.agents.values_mut().filter(|a| matches!(a.session, Session::Live { .. })) {
            let reason = "the collector restarted".to_owned();
            agent.session = Session::Ended { at: stamp.received, reason, clean: false };
        }
    }

    fn forget_the_gone(&mut self) {
        let now = self.at;
        self.agents.retain(|_, agent| match agent.session {
            Session::Ended { at, .. } => now.since(at) < FORGET_AFTER,
            _ => true,
        });
    }
}

/// Whether an agent bears the path reserved for collectors; no certificate is issued for it to anybody else.
pub fn is_collector_path(agent: &AgentId) -> bool {
    agent.workload.path() == "sidewarden/collector"
}

/// What the state keeps of a text: agents send what they like, and a state is held in memory.
fn short(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_TEXT));
    text
}

fn bounded_trust(body: TrustChanged) -> TrustChanged {
    let roots = |list: Vec<TrustedRoot>| -> Vec<TrustedRoot> {
        let short_one = |root: TrustedRoot| TrustedRoot { subject: short(root.subject), ..root };
        list.into_iter().take(MAX_ROOTS).map(short_one).collect()
    };
    let domains = body.domains.into_iter().take(MAX_ROOTS).map(|(domain, list)| (domain, roots(list)));
    TrustChanged { domains: domains.collect(), dns_roots: roots(body.dns_roots) }
}

fn bounded(mut finding: Finding) -> Finding {
    finding.evidence.truncate(MAX_EVIDENCE);
    for line in &mut finding.evidence {
        line.source = short(std::mem::take(&mut line.source));
        line.line = short(std::mem::take(&mut line.line));
    }
    let remedy = &mut finding.remedy;
    for text in
        [&mut finding.title, &mut finding.check, &mut remedy.docker_run, &mut remedy.compose, &mut remedy.kubernetes]
    {
        *text = short(std::mem::take(text));
    }
    finding
}

/// The part of a reason before its first colon: `token_expired: …` counts as `token_expired`.
fn first_word(reason: &str) -> &str {
    reason.split(':').next().unwrap_or_default()
}

/// The entry for `word`, or for `other` when there are too many words already.
fn capped<'a, V: Default>(map: &'a mut BTreeMap<String, V>, word: &str) -> &'a mut V {
    let word = if word.len() > 64 || (map.len() >= MAX_WORDS && !map.contains_key(word)) { "other" } else { word };
    if !map.contains_key(word) {
        map.insert(word.to_owned(), V::default());
    }
    map.get_mut(word).expect("it was put there just now")
}

impl State {
    /// Applies an owned event; for tests and for callers that hold no batch.
    pub fn apply_owned(&mut self, stamp: Stamp<'_>, event: &Event) {
        let event = EventRef {
            seq: event.seq,
            at_us: event.at_us,
            kind: event.kind.as_ref().into(),
            severity: event.severity,
            summary: event.summary.as_str().into(),
            body: &event.body,
        };
        self.apply(stamp, &event);
    }
}

/// Maps whose keys are no strings, as JSON lists of pairs.
mod pairs {
    use std::collections::BTreeMap;

    use serde::de::{Deserialize, Deserializer};
    use serde::ser::{Serialize, Serializer};

    pub fn serialize<S: Serializer, K: Serialize, V: Serialize>(map: &BTreeMap<K, V>, s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(map)
    }

    pub fn deserialize<'de, D, K, V>(d: D) -> Result<BTreeMap<K, V>, D::Error>
    where
        D: Deserializer<'de>,
        K: Deserialize<'de> + Ord,
        V: Deserialize<'de>,
    {
        Ok(Vec::<(K, V)>::deserialize(d)?.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use sidewarden_proto::event::*;
    use sidewarden_proto::finding::{CisIds, Evidence, Remedy, Verdict};
    use sidewarden_proto::identity::Sha256;

    use super::*;

    const WEB: &str = "spiffe://x.example/shop/web#c1";
    const COLLECTOR: &str = "spiffe://x.example/sidewarden/collector#k";

    /// A history being told, a second after each event.
    struct Told {
        state: State,
        now: Timestamp,
    }

    impl Told {
        fn new() -> Told {
            let mut told = Told { state: State::default(), now: Timestamp::from_secs(1_000) };
            told.by(COLLECTOR, CollectorStarted { version: "1".into(), first: true });
            told
        }

        fn by(&mut self, agent: &str, body: impl Into<Body>) -> &mut Told {
            self.event(agent, Event::new(self.now, Severity::Info, "", &body.into()))
        }

        fn event(&mut self, agent: &str, event: Event) -> &mut Told {
            let (id, epoch) = (agent.parse().unwrap(), Epoch([0; 16]));
            let stamp = Stamp { position: self.state.position + 1, agent: &id, epoch, received: self.now };
            self.state.apply_owned(stamp, &event);
            self.now = self.now.plus(Duration::from_secs(1));
            self
        }

        fn web(&self) -> &Agent {
            &self.state.agents[&WEB.parse().unwrap()]
        }

        fn web_status(&self, later_secs: u64) -> Status {
            self.state.status(self.web(), self.now.plus(Duration::from_secs(later_secs)))
        }
    }

    fn started() -> AgentStarted {
        let (version, mode, vantage) = ("0.1.0".into(), Mode::Sidecar, Vantage::Ptrace);
        AgentStarted { version, mode, vantage, clean: true, heartbeat_secs: 5 }
    }

    fn connected() -> AgentConnected {
        let workload = WEB.parse::<AgentId>().unwrap().workload;
        let (source, transport) = ("10.0.0.1:1".into(), "quic".into());
        AgentConnected {
            workload,
            instance: "c1".into(),
            source,
            transport,
            version: "0.1.0".into(),
            clock_ahead_us: 0,
            mode: String::new(),
            certificate: None,
        }
    }

    fn disconnected(clean: bool) -> AgentDisconnected {
        let workload = WEB.parse::<AgentId>().unwrap().workload;
        AgentDisconnected { workload, instance: "c1".into(), reason: "r".into(), clean }
    }

    fn finding(check: &str, verdict: Verdict) -> Finding {
        Finding {
            check: check.into(),
            ids: CisIds::default(),
            title: check.into(),
            severity: Severity::Warning,
            verdict,
            evidence: vec![Evidence::new("s", "l")],
            remedy: Remedy::default(),
            vantage: Vantage::Open,
        }
    }

    #[test]
    fn presence_follows_sessions_and_time() {
        let mut told = Told::new();
        told.by(COLLECTOR, connected()).by(WEB, started());
        assert_eq!(told.web_status(9_999_999), Status::Live, "a live session is live however long it says nothing");
        told.by(COLLECTOR, disconnected(false));
        for (later, status) in [(0, Status::Away), (13, Status::Away), (14, Status::Silent), (90_000, Status::Gone)] {
            assert_eq!(told.web_status(later), status, "{later} s later");
        }
        told.by(COLLECTOR, connected()).by(COLLECTOR, disconnected(true));
        assert_eq!((told.web_status(60), told.web_status(90_000)), (Status::Stopped, Status::Gone));
    }

    #[test]
    fn a_restart_of_the_collector_gives_agents_time_to_come_back() {
        let mut told = Told::new();
        told.by(WEB, started()).by(COLLECTOR, connected());
        told.now = told.now.plus(Duration::from_secs(3600));
        told.by(COLLECTOR, CollectorStarted { version: "1".into(), first: false });
        assert_eq!((told.web_status(5), told.web_status(20)), (Status::Away, Status::Silent));
    }

    #[test]
    fn only_the_collector_speaks_for_others() {
        let mut told = Told::new();
        told.by(COLLECTOR, connected());
        let mallory = "spiffe://x.example/shop/mallory#c9";
        told.by(mallory, disconnected(false)).by(mallory, CollectorStarted { version: "9".into(), first: true });
        assert_eq!(told.web_status(0), Status::Live);
        assert_eq!(told.state.totals.forged, 2);
        assert_eq!(told.state.collector, Some(COLLECTOR.parse().unwrap()));
    }

    #[test]
    fn posture_is_the_baseline_and_what_changed_since() {
        let mut told = Told::new();
        let (pass, fail) = (Verdict::Pass, Verdict::Fail);
        told.by(
            WEB,
            PostureBaseline {
                findings: vec![finding("a", pass.clone()), finding("b", fail.clone())],
                ..Default::default()
            },
        );
        let since = |told: &Told, check: &str| told.web().findings[check].since;
        let (a, b) = (since(&told, "a"), since(&told, "b"));
        told.by(WEB, VerdictChanged { before: "pass".into(), finding: finding("a", fail.clone()) });
        assert!(since(&told, "a") > a);
        told.by(WEB, PostureBaseline { findings: vec![finding("b", fail)], ..Default::default() });
        assert_eq!(since(&told, "b"), b, "the same verdict stands since when it first did");
        assert_eq!((told.web().count("fail"), told.web().findings.len()), (1, 1), "what a baseline omits is gone");
    }

    #[test]
    fn an_unknown_kind_and_an_unreadable_body_are_counted_and_hurt_nothing() {
        let mut told = Told::new();
        let event = |kind: &'static str| Event {
            seq: 1,
            at_us: Timestamp(1),
            kind: kind.into(),
            severity: Severity::Critical,
            summary: String::new(),
            body: serde_json::value::RawValue::from_string("{\"version\":7}".into()).unwrap(),
        };
        told.event(WEB, event("weather.changed")).event(WEB, event("agent.started"));
        let totals = &told.state.totals;
        assert_eq!((totals.unknown_kinds, totals.unreadable), (1, 1));
        assert_eq!(totals.events["weather.changed"], [0, 0, 0, 1]);
        assert_eq!(told.web().events, [0, 0, 0, 2]);
    }

    #[test]
    fn maps_that_outsiders_fill_are_bounded() {
        let mut told = Told::new();
        for i in 0..1_000 {
            let mut event = Event::new(told.now, Severity::Info, "", &Body::from(started()));
            event.kind = format!("made.up.{i}").into();
            told.event(WEB, event);
            let seen = |direction| PeerFirstSeen {
                direction,
                peer: format!("p{i}"),
                address: String::new(),
                tls_version: String::new(),
                group: String::new(),
            };
            told.by(WEB, seen(Direction::Egress))
                .by(WEB, seen(Direction::Inbound))
                .by(WEB, VerdictChanged { before: String::new(), finding: finding(&format!("c{i}"), Verdict::Pass) });
        }
        let web = told.web();
        assert_eq!((web.peers.len(), web.peers_beyond, web.findings.len()), (2 * MAX_PEERS, 2 * 744, MAX_FINDINGS));
        assert_eq!(web.peers.keys().filter(|(direction, _)| *direction == Direction::Inbound).count(), MAX_PEERS);
        let kinds = &told.state.totals.events;
        assert!(kinds.len() <= MAX_WORDS + 1);
        assert_eq!(kinds.values().map(|n| n.iter().sum::<u64>()).sum::<u64>(), 4_001);
    }

    #[test]
    fn wild_numbers_and_endless_texts_hurt_nothing() {
        let mut told = Told::new();
        let mut long = finding(&"c".repeat(9_000), Verdict::Fail);
        long.evidence = vec![Evidence::new("s", "é".repeat(9_000)); 500];
        told.by(WEB, VerdictChanged { before: String::new(), finding: long });
        let kept = told.web().findings.values().next().unwrap().finding.clone();
        assert!(
            kept.evidence.len() == MAX_EVIDENCE
                && kept.evidence[0].line.len() <= MAX_TEXT
                && kept.check.len() <= MAX_TEXT
        );
        for _ in 0..3 {
            told.by(WEB, EventsLost { first_seq: 0, last_seq: u64::MAX, by_severity: [0; 4], reason: "x".into() });
            told.by(
                WEB,
                ConnectionsSummary {
                    direction: Direction::Inbound,
                    peer: "p".into(),
                    listener: String::new(),
                    opened: u64::MAX,
                    closed: u64::MAX,
                    truncated: u64::MAX,
                    bytes_in: u64::MAX,
                    bytes_out: u64::MAX,
                    window_secs: 1,
                },
            );
        }
        assert_eq!(told.state.totals.lost["x"], u64::MAX);
        assert_eq!(told.web().peers.values().next().unwrap().bytes_in, u64::MAX);
    }

    #[test]
    fn losses_are_counted_by_reason() {
        let mut told = Told::new();
        let lost = EventsLost { first_seq: 3, last_seq: 7, by_severity: [0; 4], reason: "spool_full".into() };
        told.by(WEB, lost);
        let (prev, hash, reason) = (Sha256::ZERO, Sha256::ZERO, LossReason::Damaged);
        let (epoch, by_severity) = (Epoch([0; 16]), [0; 4]);
        let tombstone = Tombstone { epoch, first_seq: 8, last_seq: 9, by_severity, reason, prev, hash };
        let id = WEB.parse().unwrap();
        told.state.apply_loss(Stamp { position: 9, agent: &id, epoch, received: told.now }, &tombstone);
        let counts = |word: &str| (told.web().lost[word].count, told.state.totals.lost[word]);
        assert_eq!((counts("spool_full"), counts("damaged")), ((5, 5), (2, 2)));
        let elsewhere = Tombstone { first_seq: 10, last_seq: 12, reason: LossReason::Elsewhere, ..tombstone };
        told.state.apply_loss(Stamp { position: 10, agent: &id, epoch, received: told.now }, &elsewhere);
        assert_eq!(told.state.totals.lost.len(), 2, "what another collector has is not lost");
    }

    #[test]
    fn an_agent_gone_for_a_month_is_forgotten_when_time_passes() {
        let mut told = Told::new();
        told.by(COLLECTOR, connected()).by(COLLECTOR, disconnected(true));
        told.now = told.now.plus(Duration::from_secs(31 * 86_400));
        told.by(COLLECTOR, ClockTick {});
        assert!(told.state.agents.is_empty());
    }

    #[test]
    fn a_saved_state_comes_back_whole() {
        let mut told = Told::new();
        let peer = "spiffe://x.example/shop/db".to_owned();
        let (tls_version, group) = (String::new(), String::new());
        told.by(COLLECTOR, connected()).by(WEB, started());
        told.by(WEB, PostureBaseline { findings: vec![finding("a", Verdict::Fail)], ..Default::default() });
        told.by(
            WEB,
            PeerFirstSeen { direction: Direction::Outbound, peer, address: String::new(), tls_version, group },
        );
        let json = serde_json::to_string(&told.state).unwrap();
        let back: State = serde_json::from_str(&json).unwrap();
        assert_eq!(back.agents, told.state.agents);
        assert_eq!((back.position, &back.totals), (told.state.position, &told.state.totals));
        assert_eq!(serde_json::from_str::<State>("{}").unwrap().position, 0, "an older form has defaults");
    }
}
