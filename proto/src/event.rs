//! Something that happened, once, at a time; never edited.
//!
//! The envelope is fixed; `body` is JSON by kind and is kept as it was sent, so that a collector stores, shows,
//! counts and alerts on kinds it does not know. One more kind is one struct and one line in the list below.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::directive::Revocation;
use crate::evidence::{Pledge, Scan};
use crate::finding::{Finding, Vantage};
use crate::identity::{Sha256, SpiffeId, TrustDomain};
use crate::time::Timestamp;

/// How much an event matters. Ordered: a full spool drops the lowest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Worth keeping.
    #[default]
    Info,
    /// Worth reading the next day.
    Notice,
    /// Worth an alert.
    Warning,
    /// Worth waking somebody.
    Critical,
}

impl Severity {
    /// All of them, lowest first.
    pub const ALL: [Severity; 4] = [Severity::Info, Severity::Notice, Severity::Warning, Severity::Critical];

    /// The word in files, metrics and tables.
    pub const fn word(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Notice => "notice",
            Severity::Warning => "warning",
            Severity::Critical => "critical",
        }
    }

    /// Position in [`Severity::ALL`].
    pub const fn rank(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl std::str::FromStr for Severity {
    type Err = String;

    fn from_str(word: &str) -> Result<Severity, String> {
        Severity::ALL
            .into_iter()
            .find(|s| s.word() == word)
            .ok_or_else(|| format!("`{word}` is no severity: info, notice, warning, critical"))
    }
}

/// One event, owned. Agent, epoch and workload stand once in the batch that carries it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Event {
    /// Position in the agent's epoch: 1, 2, 3, … with no holes. 0 until the spool has sealed it.
    #[serde(default)]
    pub seq: u64,
    /// When it happened, by the agent's clock.
    pub at_us: Timestamp,
    /// What it is, for example `connection.refused`.
    pub kind: Cow<'static, str>,
    /// How much it matters.
    pub severity: Severity,
    /// One line for a person, complete without the body.
    pub summary: String,
    /// The details, by kind.
    pub body: Box<RawValue>,
}

/// The same, borrowed from the text of a batch: what a collector decodes of every event.
#[derive(Clone, Debug, Deserialize)]
pub struct EventRef<'a> {
    /// See [`Event::seq`].
    #[serde(default)]
    pub seq: u64,
    /// See [`Event::at_us`].
    pub at_us: Timestamp,
    /// See [`Event::kind`].
    #[serde(borrow)]
    pub kind: Cow<'a, str>,
    /// See [`Event::severity`].
    #[serde(default, deserialize_with = "unknown_severity_is_warning")]
    pub severity: Severity,
    /// See [`Event::summary`].
    #[serde(borrow)]
    pub summary: Cow<'a, str>,
    /// See [`Event::body`].
    #[serde(borrow)]
    pub body: &'a RawValue,
}

/// A severity from a newer agent counts as a warning: seen, never dropped first.
fn unknown_severity_is_warning<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Severity, D::Error> {
    let word = Cow::<str>::deserialize(d)?;
    Ok(word.parse().unwrap_or(Severity::Warning))
}

impl Event {
    /// An event of `body`'s kind.
    pub fn new(at: Timestamp, severity: Severity, summary: impl Into<String>, body: &Body) -> Event {
        Event {
            seq: 0,
            at_us: at,
            kind: Cow::Borrowed(body.kind()),
            severity,
            summary: summary.into(),
            body: body.to_raw(),
        }
    }

    /// The details, when this program knows the kind.
    pub fn body(&self) -> Result<Option<Body>, serde_json::Error> {
        Body::from_raw(&self.kind, &self.body)
    }
}

impl EventRef<'_> {
    /// The details, when this program knows the kind.
    pub fn body(&self) -> Result<Option<Body>, serde_json::Error> {
        Body::from_raw(&self.kind, self.body)
    }

    /// The same, owned.
    pub fn to_owned(&self) -> Event {
        Event {
            seq: self.seq,
            at_us: self.at_us,
            kind: Cow::Owned(self.kind.to_string()),
            severity: self.severity,
            summary: self.summary.to_string(),
            body: self.body.to_owned(),
        }
    }
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $kind:literal),* $(,)?) => {
        /// The details of an event, by kind.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Body { $($(#[$doc])* $name($name),)* }

        /// Every kind this version knows.
        pub const KINDS: &[&str] = &[$($kind),*];

        impl Body {
            /// The name of its kind.
            pub fn kind(&self) -> &'static str {
                match self { $(Body::$name(_) => $kind,)* }
            }

            /// Its JSON.
            pub fn to_raw(&self) -> Box<RawValue> {
                let raw = match self { $(Body::$name(body) => serde_json::value::to_raw_value(body),)* };
                raw.expect("bodies have string keys and no failing serializer")
            }

            /// Reads the body of an event of `kind`; `None` for a kind this version does not know.
            pub fn from_raw(kind: &str, raw: &RawValue) -> Result<Option<Body>, serde_json::Error> {
                Ok(Some(match kind {
                    $($kind => Body::$name(serde_json::from_str(raw.get())?),)*
                    _ => return Ok(None),
                }))
            }
        }

        $(impl From<$name> for Body { fn from(body: $name) -> Body { Body::$name(body) } })*
    };
}

kinds! {
    /// An agent began to watch.
    AgentStarted = "agent.started",
    /// An agent ends of its own will.
    AgentStopping = "agent.stopping",
    /// The whole posture at once: after a start, and after events were lost.
    PostureBaseline = "posture.baseline",
    /// A verdict changed.
    VerdictChanged = "verdict.changed",
    /// A connection was not let through. Repeats within a window are counted in one event.
    ConnectionRefused = "connection.refused",
    /// A peer was seen for the first time.
    PeerFirstSeen = "peer.first_seen",
    /// What one pair of peers did in a window.
    ConnectionsSummary = "connections.summary",
    /// Live connections were ended because they are no longer allowed.
    ConnectionEnded = "connection.ended",
    /// Somebody came into the container from outside (docker exec, nsenter).
    ProcessEntered = "process.entered",
    /// The workload started a shell.
    ProcessShell = "process.shell",
    /// Tasks were created that lived too briefly to be seen.
    ProcessMissed = "process.missed",
    /// A port of the workload can be reached from outside without TLS.
    ListenerExposed = "listener.exposed",
    /// A listener lets plaintext in, for a while and for a reason, or does so no longer.
    ListenerPermissive = "listener.permissive",
    /// Connections in plaintext were let in. Repeats within a window are counted in one event.
    ConnectionPlaintext = "connection.plaintext",
    /// It no longer can.
    ListenerClosed = "listener.closed",
    /// All ports of the workload that can be reached without TLS: after a start, and after events were lost.
    ListenersBaseline = "listeners.baseline",
    /// The packet rules that the configuration asks for are not in force, or the workload can get past them.
    InterceptionBroken = "interception.broken",
    /// They are in force, and it cannot.
    InterceptionHolds = "interception.holds",
    /// The agent has a new certificate.
    IdentityRenewed = "identity.renewed",
    /// Renewing failed; the old certificate is still in use.
    IdentityRenewalFailed = "identity.renewal_failed",
    /// Whom an agent trusts: after a start, and after each change.
    TrustChanged = "trust.changed",
    /// Files that say whom to trust cannot be used; what was read before stays in force.
    TrustFilesRefused = "trust.files_refused",
    /// A listener or route accepts every certificate, for a while and for a reason, or does so no longer.
    TrustInsecure = "trust.insecure",
    /// How revocation lists stand: after a start with some, and after each change.
    TrustCrls = "trust.crls",
    /// The workload that `exec` wraps came to its end.
    WorkloadExited = "workload.exited",
    /// The whole posture of one container of the host: when it came, after a start, and after events were lost.
    ContainerPosture = "container.posture",
    /// A verdict about one container of the host changed.
    ContainerVerdictChanged = "container.verdict_changed",
    /// A container of the host is gone.
    ContainerGone = "container.gone",
    /// Somebody had a program run in a container (docker exec).
    ContainerExec = "container.exec",
    /// The engine of the host does not answer: nothing is known of its containers.
    EngineLost = "engine.lost",
    /// It answers again.
    EngineBack = "engine.back",
    /// Part of the spool was unreadable and set aside.
    SpoolDamaged = "spool.damaged",
    /// Events were dropped on the agent, counted here.
    EventsLost = "events.lost",
    /// A collector began to serve.
    CollectorStarted = "collector.started",
    /// The collector's clock, so that time is part of the history.
    ClockTick = "clock.tick",
    /// An agent was given its first certificate, or a next one.
    CertificateIssued = "certificate.issued",
    /// A request for a certificate was refused.
    EnrolmentRefused = "enrolment.refused",
    /// An agent's session began.
    AgentConnected = "agent.connected",
    /// An agent's session ended.
    AgentDisconnected = "agent.disconnected",
    /// A connection to the collector was refused.
    IngestRefused = "ingest.refused",
    /// An enrolment token was made.
    TokenCreated = "token.created",
    /// A certificate, key, instance, workload or CA was revoked.
    IdentityRevoked = "identity.revoked",
    /// A revocation was undone.
    IdentityRestored = "identity.restored",
    /// Somebody has imported roots of others, or removed them.
    TrustStoreChanged = "trust.store_changed",
    /// An instance stands differently before a gate of the policy than it did.
    QuarantineChanged = "quarantine.changed",
    /// An agent took its workload off the data plane, or let it back, without the collector's word.
    QuarantineAlone = "quarantine.alone",
    /// An operator has an instance let in for a while, whatever gates say.
    QuarantineReleased = "quarantine.released",
    /// A policy came into force.
    PolicyApplied = "policy.applied",
    /// Somebody answers for a broken rule, until a date.
    WaiverSet = "waiver.set",
    /// Nobody answers for it any more.
    WaiverRemoved = "waiver.removed",
    /// Somebody attests what nobody can see, until a date.
    AttestationSet = "attestation.set",
    /// Nobody attests it any more.
    AttestationRemoved = "attestation.removed",
    /// A scanner's report about an image was taken in.
    ScanAdded = "scan.added",
    /// One root is on its way to take over from another: a step of that was taken.
    CaRotated = "ca.rotated",
    /// A certificate went to a client without an agent.
    CaIssued = "ca.issued",
    /// Every certificate that the collector answers for: after a start, and after a change of one.
    CaCertificates = "ca.certificates",
    /// An identity, or a certificate of its page, that somebody else keeps for the collector was taken.
    CollectorIdentityTaken = "collector.identity_taken",
    /// What is there cannot be used; the last good one is still in use.
    CollectorIdentityRefused = "collector.identity_refused",
    /// The collector whose directives this one hands out was reached, or lost.
    LeaderChanged = "leader.changed",
    /// An alert began to fire.
    AlertFiring = "alert.firing",
    /// An alert ended.
    AlertResolved = "alert.resolved",
}

/// How an agent stands beside its workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// A container of its own that shares the workload's PID and network namespace.
    Sidecar,
    /// PID 1 of the workload's container, or the parent of its command.
    Exec,
    /// One for each host, with the engine's API: judges every container, guards none.
    Node,
}

impl Mode {
    /// The word in files and tables.
    pub const fn word(self) -> &'static str {
        match self {
            Mode::Sidecar => "sidecar",
            Mode::Exec => "exec",
            Mode::Node => "node",
        }
    }

    /// The mode of that word.
    pub fn of_word(word: &str) -> Option<Mode> {
        [Mode::Sidecar, Mode::Exec, Mode::Node].into_iter().find(|mode| mode.word() == word)
    }
}

/// Body of `agent.started`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentStarted {
    /// The agent's version.
    pub version: String,
    /// How it stands beside its workload.
    pub mode: Mode,
    /// What it is able to see.
    pub vantage: Vantage,
    /// Whether the run before ended in order. False after a kill: events of its last moments may be missing.
    pub clean: bool,
    /// Seconds between two keepalives, by which a collector knows that it fell silent.
    #[serde(default)]
    pub heartbeat_secs: u32,
}

/// Body of `agent.stopping`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentStopping {
    /// Why, for example `SIGTERM`.
    pub reason: String,
}

/// Body of `posture.baseline`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PostureBaseline {
    /// One finding for each check.
    pub findings: Vec<Finding>,
    /// The host that the agent runs on, as a hash that all containers of a host agree on; empty where it cannot be told.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub host: String,
    /// The ids of the workload's containers, as far as they can be told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub containers: Vec<String>,
}

/// A container, as the engine of its host calls it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerRef {
    /// Its id, 64 hex digits.
    pub id: String,
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// Its image as it was asked for, for example `nginx:1.29`.
    #[serde(default)]
    pub image: String,
    /// Its state in the engine's word, for example `running`.
    #[serde(default)]
    pub state: String,
    /// The id of its image, `sha256:…`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub image_id: String,
    /// Digests that registries know the image by, `name@sha256:…`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_digests: Vec<String>,
}

/// Body of `container.posture`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerPosture {
    /// Which one.
    pub container: ContainerRef,
    /// The host, as in [`PostureBaseline::host`].
    #[serde(default)]
    pub host: String,
    /// One finding for each check about containers.
    pub findings: Vec<Finding>,
}

/// Body of `container.verdict_changed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerVerdictChanged {
    /// Which one.
    pub container: ContainerRef,
    /// The word of the verdict before; empty if there was none.
    #[serde(default)]
    pub before: String,
    /// What is true now.
    pub finding: Finding,
}

/// Body of `container.gone`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerGone {
    /// Which one.
    pub container: ContainerRef,
}

/// Body of `container.exec`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ContainerExec {
    /// In which container.
    pub container: ContainerRef,
    /// The engine's id of the exec.
    pub exec: String,
    /// With all privileges.
    #[serde(default)]
    pub privileged: bool,
    /// As whom; empty for the container's own user.
    #[serde(default)]
    pub user: String,
    /// What was run, masked.
    #[serde(default)]
    pub command: String,
    /// The engine no longer knew how it was run: it was gone before it could be asked.
    #[serde(default)]
    pub unread: bool,
    /// Why it may come in as root, where the agent's settings declare it; empty otherwise.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub declared: String,
}

/// Body of `engine.lost`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineLost {
    /// Why.
    pub why: String,
}

/// Body of `engine.back`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EngineBack {
    /// Its version.
    #[serde(default)]
    pub version: String,
}

/// Body of `verdict.changed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VerdictChanged {
    /// The word of the verdict before; empty if there was none.
    #[serde(default)]
    pub before: String,
    /// What is true now.
    pub finding: Finding,
}

/// Which way a connection goes, seen from the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Somebody connects to the workload.
    Inbound,
    /// The workload connects to a peer that is named in the configuration.
    Outbound,
    /// The workload asks to be connected to somewhere.
    Egress,
}

impl Direction {
    /// All of them.
    pub const ALL: [Direction; 3] = [Direction::Inbound, Direction::Outbound, Direction::Egress];

    /// The word in metrics.
    pub const fn word(self) -> &'static str {
        match self {
            Direction::Inbound => "inbound",
            Direction::Outbound => "outbound",
            Direction::Egress => "egress",
        }
    }
}

/// Over what a port is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// Both.
    pub const ALL: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

    /// The word in files, labels and tables.
    pub const fn word(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

/// Why a connection was not let through: a closed list, used as a metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalReason {
    /// The bytes were not TLS.
    Plaintext,
    /// Somebody reached for the workload's own port, past the agent.
    DirectToService,
    /// TLS 1.1, 1.0, SSL 3 or SSL 2.
    ProtocolVersion,
    /// The peer sent no certificate.
    NoCertificate,
    /// The peer's certificate was signed by a CA we do not trust.
    UnknownCa,
    /// The peer's certificate has run out, or is not valid yet.
    Expired,
    /// The peer's certificate breaks a rule (no SPIFFE ID, wrong usage, a CA as leaf, …).
    BadCertificate,
    /// The peer is on the deny list, or on the revocation list of its CA.
    Revoked,
    /// No revocation list of the peer's CA holds now, and one is demanded.
    RevocationUnknown,
    /// The peer is who it says, but policy does not allow it.
    NotAllowed,
    /// The peer is not the one that was asked for.
    WrongPeer,
    /// The handshake broke some other way.
    HandshakeFailed,
    /// The handshake took too long.
    HandshakeTimeout,
    /// The other side refused us.
    RefusedByPeer,
    /// Nobody answered at the address.
    Unreachable,
    /// The workload's own port did not answer.
    WorkloadUnreachable,
    /// A limit on connections or handshakes was reached.
    LimitReached,
    /// The agent has no valid identity of its own yet.
    NoIdentity,
    /// A PROXY header from an address that may not send one.
    ProxyHeaderUntrusted,
    /// No PROXY header, or a broken one, from an address that must send one.
    ProxyHeaderBroken,
    /// The peer asked for a host name that no listener here has.
    UnknownServerName,
    /// The way leads back to this agent.
    Loop,
    /// The workload asked for a place that is not on its egress list.
    EgressNotListed,
    /// The workload asked for a private, loopback, link-local or metadata address, or a name that leads there.
    EgressPrivateAddress,
    /// A connection came back to the agent that had made it, or was never redirected.
    EgressLoop,
    /// What the workload sent to an egress listener is no request that is taken.
    BadRequest,
    /// The workload did not finish its request in time.
    RequestTimeout,
    /// The name has no address.
    NameUnresolved,
    /// The upstream proxy did not connect us.
    UpstreamRefused,
    /// This instance, or its peer, is quarantined by a gate of the policy.
    Quarantined,
}

impl RefusalReason {
    /// The word in metrics and tables; the same as in JSON.
    pub const fn word(self) -> &'static str {
        match self {
            RefusalReason::Plaintext => "plaintext",
            RefusalReason::DirectToService => "direct_to_service",
            RefusalReason::ProtocolVersion => "protocol_version",
            RefusalReason::NoCertificate => "no_certificate",
            RefusalReason::UnknownCa => "unknown_ca",
            RefusalReason::Expired => "expired",
            RefusalReason::BadCertificate => "bad_certificate",
            RefusalReason::Revoked => "revoked",
            RefusalReason::RevocationUnknown => "revocation_unknown",
            RefusalReason::NotAllowed => "not_allowed",
            RefusalReason::WrongPeer => "wrong_peer",
            RefusalReason::HandshakeFailed => "handshake_failed",
            RefusalReason::HandshakeTimeout => "handshake_timeout",
            RefusalReason::RefusedByPeer => "refused_by_peer",
            RefusalReason::Unreachable => "unreachable",
            RefusalReason::WorkloadUnreachable => "workload_unreachable",
            RefusalReason::LimitReached => "limit_reached",
            RefusalReason::NoIdentity => "no_identity",
            RefusalReason::ProxyHeaderUntrusted => "proxy_header_untrusted",
            RefusalReason::ProxyHeaderBroken => "proxy_header_broken",
            RefusalReason::UnknownServerName => "unknown_server_name",
            RefusalReason::Loop => "loop",
            RefusalReason::EgressNotListed => "egress_not_listed",
            RefusalReason::EgressPrivateAddress => "egress_private_address",
            RefusalReason::EgressLoop => "egress_loop",
            RefusalReason::BadRequest => "bad_request",
            RefusalReason::RequestTimeout => "request_timeout",
            RefusalReason::NameUnresolved => "name_unresolved",
            RefusalReason::UpstreamRefused => "upstream_refused",
            RefusalReason::Quarantined => "quarantined",
        }
    }

    /// What an operator should look at first.
    pub const fn hint(self) -> &'static str {
        match self {
            RefusalReason::Plaintext => {
                "the client speaks no TLS: give it an agent, or point it at its own agent's port"
            }
            RefusalReason::DirectToService => {
                "somebody reached past the agent for the service's own port: find out who has this address"
            }
            RefusalReason::ProtocolVersion => {
                "the client offers nothing newer than TLS 1.1: update it, TLS 1.2 is the floor"
            }
            RefusalReason::NoCertificate => {
                "the client showed no certificate: give it an agent, or look at the enrolment of the one it has"
            }
            RefusalReason::UnknownCa => {
                "the certificate is from a CA that this trust domain does not know: enrol that agent here, or `sidewarden-collector trust import` its CA if it should get in; if not, find the address"
            }
            RefusalReason::Expired => {
                "the certificate is outside its validity: look at that agent's renewals, and at both clocks"
            }
            RefusalReason::BadCertificate => "the certificate breaks a rule of X.509-SVID: have it issued anew",
            RefusalReason::Revoked => {
                "the certificate was revoked: `sidewarden-collector revoke --list` says why and since when"
            }
            RefusalReason::RevocationUnknown => {
                "the revocation list of a foreign CA is missing or has ended: bring a newer one to `trust.crls`"
            }
            RefusalReason::NotAllowed => {
                "add the peer to `allow` of this listener if it should get in; where the detail names a policy, try `sidewarden-collector policy test`"
            }
            RefusalReason::WrongPeer => {
                "another workload answers at this address: check `to` and `peer` of the route, and DNS"
            }
            RefusalReason::HandshakeFailed => {
                "the TLS handshake broke: compare versions, groups and ciphers of both sides"
            }
            RefusalReason::HandshakeTimeout => {
                "the client opened a connection and did not finish its handshake in time: a probe that only connects does so, and so does who tries to exhaust the agent; find it by its address"
            }
            RefusalReason::RefusedByPeer => "the peer's agent refused us: its own event says why",
            RefusalReason::Unreachable => "no answer at the address: is it up there, does the name resolve?",
            RefusalReason::WorkloadUnreachable => {
                "the service does not accept on its own port: is it up, does it listen on 127.0.0.1?"
            }
            RefusalReason::LimitReached => {
                "raise the limit if this load is expected; if not, somebody tries to exhaust the agent: find the address"
            }
            RefusalReason::NoIdentity => "the agent has no certificate: see its enrolment",
            RefusalReason::ProxyHeaderUntrusted => {
                "somebody claims to speak for another address: if it is your load balancer, add it to `accept_proxy_protocol_from`"
            }
            RefusalReason::ProxyHeaderBroken => {
                "who is listed in `accept_proxy_protocol_from` must begin each connection with a PROXY header: switch it on there, or take the address off the list"
            }
            RefusalReason::UnknownServerName => {
                "no inbound block of this listener has this `server_name`: add one, or correct what the client asks for"
            }
            RefusalReason::Loop => "the route leads back to this agent: check its `to`, and what the name resolves to",
            RefusalReason::EgressNotListed => {
                "add it to `egress.allow` if the workload should get there; where the detail names a policy, to `[[egress]]` of that"
            }
            RefusalReason::EgressPrivateAddress => {
                "server-side request forgery and DNS rebinding look like this: find out what made the workload ask; if it should get there, list the network itself"
            }
            RefusalReason::EgressLoop => {
                "only redirected connections may come to `egress.transparent_listen`, and never the agent's own: exempt the agent's group from interception, and look at `egress.upstream`"
            }
            RefusalReason::BadRequest => {
                "the egress listener takes HTTP CONNECT, http:// requests and SOCKS5: look at the client's proxy settings"
            }
            RefusalReason::RequestTimeout => {
                "the client connected to the egress listener and did not finish its request: look at what the workload runs, and at its proxy settings"
            }
            RefusalReason::NameUnresolved => {
                "the name has no address: is it spelt right, does the agent's DNS know it?"
            }
            RefusalReason::Quarantined => {
                "a gate of the policy took an instance off the data plane: see `sidewarden-collector quarantine list`"
            }
            RefusalReason::UpstreamRefused => {
                "the upstream proxy did not connect us: look at `egress.upstream_credentials_file` and at the proxy's own rules"
            }
        }
    }
}

impl fmt::Display for RefusalReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// Body of `connection.refused`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConnectionRefused {
    /// Which way it went.
    pub direction: Direction,
    /// Why, from a closed list.
    pub reason: RefusalReason,
    /// What exactly happened, for example `offered TLS 1.1`.
    pub detail: String,
    /// What to look at first.
    pub hint: String,
    /// The listener it came to, or the route it took, as `host:port`.
    pub listener: String,
    /// The address of the other side.
    pub source: String,
    /// Who the peer said it is, when a certificate was seen. Not verified unless `reason` is `not_allowed` or `revoked`.
    #[serde(default)]
    pub peer: String,
    /// How many connections like this one are counted here.
    pub count: u64,
}

/// Body of `peer.first_seen`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerFirstSeen {
    /// Which way.
    pub direction: Direction,
    /// Its verified identity.
    pub peer: String,
    /// Its address.
    pub address: String,
    /// `TLSv1_3` or `TLSv1_2`.
    pub tls_version: String,
    /// The key exchange group, for example `X25519MLKEM768`.
    pub group: String,
}

/// Body of `connections.summary`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConnectionsSummary {
    /// Which way.
    pub direction: Direction,
    /// The verified identity of the other side.
    pub peer: String,
    /// The listener or route.
    pub listener: String,
    /// Connections that were opened in the window.
    pub opened: u64,
    /// Connections that ended in the window.
    pub closed: u64,
    /// Of those, how many ended without a proper close of TLS.
    #[serde(default)]
    pub truncated: u64,
    /// Bytes from the peer to the workload.
    pub bytes_in: u64,
    /// Bytes from the workload to the peer.
    pub bytes_out: u64,
    /// Length of the window.
    pub window_secs: u32,
}

/// Body of `connection.ended`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConnectionEnded {
    /// Which way.
    pub direction: Direction,
    /// The other side.
    pub peer: String,
    /// Why, for example `revoked`, `expired`, `not_allowed`, `maximum_age`.
    pub reason: String,
    /// How many.
    pub count: u64,
}

/// A process, as it is told in events. Command lines are masked before they leave the container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Its PID in the agent's PID namespace.
    pub pid: i32,
    /// Its parent there; 0 for one that came from outside.
    pub ppid: i32,
    /// Its real user id.
    pub uid: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// Its command line, masked and cut to 256 bytes.
    pub command: String,
    /// Its parent's name, if the parent is still there.
    #[serde(default)]
    pub parent: String,
}

/// Body of `process.entered`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProcessEntered {
    /// Who came in.
    pub process: ProcessInfo,
    /// It runs as root while the workload does not.
    pub as_root: bool,
    /// It has capabilities that the workload does not have.
    pub privileged: bool,
    /// Why it may come in as root, where the agent's settings declare it; empty otherwise.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub declared: String,
}

/// Body of `process.shell`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProcessShell {
    /// The shell.
    pub process: ProcessInfo,
}

/// Body of `process.missed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProcessMissed {
    /// Tasks (processes and threads) created in the window that were never seen.
    pub missed: u64,
    /// Tasks created in the window.
    pub created: u64,
    /// Length of the window.
    pub window_secs: u32,
}

/// Body of `listener.exposed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListenerExposed {
    /// Its address, as `host:port`.
    pub address: String,
    /// What is known about it.
    pub detail: String,
    /// Over what.
    #[serde(default)]
    pub protocol: Protocol,
    /// Whose it is, where that can be told.
    #[serde(default)]
    pub owner: String,
    /// Why that was declared to be so; empty if it was not.
    #[serde(default)]
    pub reason: String,
}

/// Body of `listener.permissive`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListenerPermissive {
    /// Which one.
    pub listener: String,
    /// Whether plaintext is let in now.
    pub on: bool,
    /// Why, by whoever configured it.
    pub reason: String,
    /// Until when.
    pub until_us: Timestamp,
}

/// Body of `connection.plaintext`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConnectionPlaintext {
    /// The listener it came to.
    pub listener: String,
    /// The address of the last one.
    pub source: String,
    /// The network that is counted here, as `10.0.0.0/24`.
    pub network: String,
    /// What the last one began with, in few words.
    pub detail: String,
    /// How many connections like this one are counted here.
    pub count: u64,
}

/// Body of `listener.closed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListenerClosed {
    /// Its address, as `host:port`.
    pub address: String,
    /// Over what.
    #[serde(default)]
    pub protocol: Protocol,
    /// What became of it.
    pub detail: String,
}

/// Body of `listeners.baseline`: each as `host:port/protocol`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListenersBaseline {
    /// Those that nobody declared.
    pub exposed: Vec<String>,
    /// Those that were declared.
    pub declared: Vec<String>,
}

/// Body of `interception.broken`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InterceptionBroken {
    /// What is wrong with it.
    pub why: Vec<String>,
}

/// Body of `interception.holds`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InterceptionHolds {
    /// What the workload may send past the agent all the same, each with its reason.
    #[serde(default)]
    pub bypass: Vec<String>,
}

/// Body of `identity.renewed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IdentityRenewed {
    /// Serial number of the new certificate, in hex.
    pub serial: String,
    /// Its end.
    pub not_after_us: Timestamp,
}

/// Body of `identity.renewal_failed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IdentityRenewalFailed {
    /// What went wrong.
    pub error: String,
    /// Until when the present certificate holds.
    pub not_after_us: Timestamp,
}

/// Body of `trust.changed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrustChanged {
    /// The roots of each trust domain.
    pub domains: std::collections::BTreeMap<TrustDomain, Vec<TrustedRoot>>,
    /// The roots of peers that have DNS names.
    #[serde(default)]
    pub dns_roots: Vec<TrustedRoot>,
}

/// A root that an agent holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustedRoot {
    /// SHA-256 of the certificate.
    pub sha256: Sha256,
    /// Whom it names.
    #[serde(default)]
    pub subject: String,
    /// Its end.
    pub not_after_us: Timestamp,
}

/// Body of `trust.insecure`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrustInsecure {
    /// Which way.
    pub direction: Direction,
    /// The listener, or the route.
    pub place: String,
    /// Whether every certificate is accepted now.
    pub on: bool,
    /// Why, by whoever configured it.
    pub reason: String,
    /// Until when.
    pub until_us: Timestamp,
}

/// Body of `trust.crls`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrustCrls {
    /// Whether foreign peers need a list that holds.
    pub strict: bool,
    /// How many lists there are.
    pub lists: usize,
    /// What is lacking, one line each; empty when nothing is.
    #[serde(default)]
    pub lacking: Vec<String>,
}

/// Body of `trust.files_refused`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrustFilesRefused {
    /// What is wrong, with the file.
    pub error: String,
}

/// Body of `workload.exited`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkloadExited {
    /// Its exit code, 128 and the signal's number when a signal ended it.
    pub code: i32,
}

/// Body of `spool.damaged`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpoolDamaged {
    /// Where the unreadable part was put.
    pub quarantined: String,
    /// How many bytes.
    pub bytes: u64,
    /// What was wrong.
    pub detail: String,
}

/// Body of `events.lost`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventsLost {
    /// First sequence number lost.
    pub first_seq: u64,
    /// Last sequence number lost.
    pub last_seq: u64,
    /// How many of each severity, lowest first; all zero where that is not known.
    pub by_severity: [u32; 4],
    /// Why.
    pub reason: String,
}

/// Body of `collector.started`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CollectorStarted {
    /// The collector's version.
    pub version: String,
    /// Whether this start made the trust domain: a new CA, a new store.
    pub first: bool,
}

/// Body of `clock.tick`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClockTick {}

/// Body of `certificate.issued`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CertificateIssued {
    /// For whom.
    pub workload: SpiffeId,
    /// For which instance of it.
    pub instance: String,
    /// Serial number, in hex.
    pub serial: String,
    /// SHA-256 of the public key (SPKI), in hex.
    pub spki: String,
    /// Its end.
    pub not_after_us: Timestamp,
    /// `token`, `renewal` or `grace`.
    pub by: String,
}

fn once() -> u64 {
    1
}

/// Body of `enrolment.refused`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EnrolmentRefused {
    /// The address it came from.
    pub source: String,
    /// What it asked for; not verified.
    pub workload: String,
    /// Why, for example `token is used up`.
    pub reason: String,
    /// How many requests like this one are counted here.
    #[serde(default = "once")]
    pub count: u64,
}

/// Body of `agent.connected`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentConnected {
    /// Who.
    pub workload: SpiffeId,
    /// Which instance.
    pub instance: String,
    /// From where.
    pub source: String,
    /// `quic` or `tcp`.
    pub transport: String,
    /// The agent's version.
    pub version: String,
    /// How far its clock is ahead of the collector's, microseconds; negative when it is behind, 0 when it does not tell.
    #[serde(default)]
    pub clock_ahead_us: i64,
    /// How it stands beside its workload ([`Mode`]'s word); empty when it does not tell. A collector that it comes to in the
    /// middle of its life learns it from this.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mode: String,
    /// What it has shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<ShownCertificate>,
}

/// A certificate that an agent has shown to the collector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShownCertificate {
    /// Its serial number, in hex.
    pub serial: String,
    /// SHA-256 of the public key (SPKI), in hex.
    pub spki: String,
    /// When it begins.
    pub not_before_us: Timestamp,
    /// When it ends.
    pub not_after_us: Timestamp,
    /// Whether somebody else's CA has issued it, whose it is to renew.
    #[serde(default)]
    pub elsewhere: bool,
}

/// Body of `agent.disconnected`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentDisconnected {
    /// Who.
    pub workload: SpiffeId,
    /// Which instance.
    pub instance: String,
    /// Why, for example `agent stopped`, `connection lost: timed out`.
    pub reason: String,
    /// The agent said goodbye.
    pub clean: bool,
}

/// Body of `ingest.refused`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IngestRefused {
    /// The address it came from.
    pub source: String,
    /// Why.
    pub reason: String,
    /// How many connections like this one are counted here.
    #[serde(default = "once")]
    pub count: u64,
}

/// Body of `ca.rotated`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CaRotated {
    /// `prepare`, `activate`, `taint`, `retire`, `compromise` or `abandon`.
    pub step: String,
    /// Taken although agents had not confirmed the one before.
    #[serde(default)]
    pub forced: bool,
    /// SHA-256 of the public key of the root that issues now.
    #[serde(default)]
    pub active: String,
    /// How many have not followed.
    #[serde(default)]
    pub left_behind: u64,
    /// Some of them.
    #[serde(default)]
    pub named: Vec<String>,
}

/// Body of `collector.identity_taken`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CollectorIdentityTaken {
    /// `identity` or `page`.
    pub what: String,
    /// Whom it names.
    #[serde(default)]
    pub name: String,
    /// Its serial number, in hex.
    #[serde(default)]
    pub serial: String,
    /// When it ends.
    pub not_after_us: Timestamp,
}

/// Body of `collector.identity_refused`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CollectorIdentityRefused {
    /// `identity` or `page`.
    pub what: String,
    /// What is wrong.
    #[serde(default)]
    pub error: String,
    /// When the one that is used instead ends; `None`: there is none, and for the page one of the collector's own CA is shown.
    #[serde(default)]
    pub in_use_until_us: Option<Timestamp>,
}

/// Body of `leader.changed`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LeaderChanged {
    /// Where it is.
    pub leader: String,
    /// Whether it is within reach.
    pub reached: bool,
    /// Why it is not.
    #[serde(default)]
    pub why: String,
}

/// Body of `ca.issued`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaIssued {
    /// The SPIFFE ID.
    pub name: SpiffeId,
    /// DNS names and addresses.
    #[serde(default)]
    pub names: Vec<String>,
    /// Its serial number, in hexadecimal.
    #[serde(default)]
    pub serial: String,
    /// SHA-256 of its public key.
    #[serde(default)]
    pub spki: String,
    /// When it ends.
    #[serde(default)]
    pub not_after_us: Timestamp,
}

/// Body of `ca.certificates`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CaCertificates {
    /// The root, the issuing CA, the collector's own, and those that others keep for it.
    #[serde(default)]
    pub certificates: Vec<CaCertificate>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaCertificate {
    /// `root`, `issuing` or `collector`; and of those that others renew `identity`, `identity_root` or `page`.
    pub what: String,
    /// Which one, where there are several.
    #[serde(default)]
    pub name: String,
    /// When it begins.
    #[serde(default)]
    pub not_before_us: Timestamp,
    /// When it ends.
    pub not_after_us: Timestamp,
}

/// Body of `token.created`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenCreated {
    /// The token's public half.
    pub id: String,
    /// The workload, or pattern of workloads, it is good for.
    pub workload: String,
    /// How often it can be used.
    pub uses: u32,
    /// When it ends.
    pub expires_us: Timestamp,
}

/// How an instance stands before a gate, as the collector decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateStatus {
    /// It keeps the gate, or has kept it for long enough again, or an operator lets it in.
    Clear,
    /// It breaks the gate, which only tells.
    DryRun,
    /// It breaks the gate, and too many of its workload are quarantined already.
    Capped,
    /// It is off the data plane.
    Quarantined,
}

/// Body of `quarantine.changed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuarantineChanged {
    /// Of which workload.
    pub workload: SpiffeId,
    /// Which instance.
    pub instance: String,
    /// The gate.
    pub gate: String,
    /// How it stands now.
    pub status: GateStatus,
    /// What it did, or why it is let in again.
    pub why: String,
}

/// Body of `quarantine.alone`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuarantineAlone {
    /// The gate.
    pub gate: String,
    /// Whether the workload is off the data plane now.
    pub on: bool,
    /// What it did, or why it is let back.
    pub why: String,
}

/// Body of `quarantine.released`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuarantineReleased {
    /// Of which workload.
    pub workload: SpiffeId,
    /// Which instance.
    pub instance: String,
    /// Until when no gate quarantines it.
    pub until_us: Timestamp,
    /// The reason given.
    pub why: String,
    /// Who did it, by their own account.
    #[serde(default)]
    pub by: String,
    /// The address it came from.
    #[serde(default)]
    pub source: String,
}

/// Body of `policy.applied`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyApplied {
    /// Its version.
    pub version: u64,
    /// The directive that carries it.
    pub directive: u64,
    /// SHA-256 of its text.
    pub hash: Sha256,
    /// The reason given.
    pub why: String,
    /// Who did it, by their own account.
    #[serde(default)]
    pub by: String,
    /// The address it came from.
    #[serde(default)]
    pub source: String,
    /// The older version whose text it has, if somebody went back to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restores: Option<u64>,
}

/// Body of `waiver.set`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WaiverSet {
    /// What it is.
    pub waiver: Pledge,
    /// The one about the same whose place it takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Pledge>,
}

/// Body of `waiver.removed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WaiverRemoved {
    /// What it was.
    pub waiver: Pledge,
    /// The reason given.
    pub why: String,
    /// Who did it, by their own account.
    #[serde(default)]
    pub by: String,
    /// The address it came from.
    #[serde(default)]
    pub source: String,
}

/// Body of `attestation.set`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttestationSet {
    /// What it is.
    pub attestation: Pledge,
    /// The one about the same whose place it takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Pledge>,
}

/// Body of `attestation.removed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttestationRemoved {
    /// What it was.
    pub attestation: Pledge,
    /// The reason given.
    pub why: String,
    /// Who did it, by their own account.
    #[serde(default)]
    pub by: String,
    /// The address it came from.
    #[serde(default)]
    pub source: String,
}

/// Body of `scan.added`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScanAdded {
    /// What was found.
    pub scan: Scan,
    /// The scan of the same image whose place it takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Scan>,
}

/// Body of `identity.revoked`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IdentityRevoked(pub RevocationChanged);

/// Body of `identity.restored`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IdentityRestored(pub RevocationChanged);

/// Body of `identity.revoked` and `identity.restored`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RevocationChanged {
    /// The revocation.
    pub revocation: Revocation,
    /// The directive that says so.
    pub version: u64,
    /// The reason of this act: for revoking, or for undoing it.
    pub why: String,
    /// Who did it, by their own account.
    #[serde(default)]
    pub by: String,
    /// The address it came from.
    #[serde(default)]
    pub source: String,
}

/// Body of `trust.store_changed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrustStoreChanged {
    /// For whom, and SHA-256 of the certificate.
    pub added: Vec<String>,
    /// The same.
    pub removed: Vec<String>,
}

/// Body of `alert.firing` and `alert.resolved`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AlertChanged {
    /// The rule's name.
    pub alert: String,
    /// What tells this alert from others of the rule.
    pub labels: std::collections::BTreeMap<String, String>,
    /// When the condition began.
    pub since_us: Timestamp,
}

/// Body of `alert.firing`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AlertFiring(pub AlertChanged);

/// Body of `alert.resolved`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AlertResolved(pub AlertChanged);

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> Body {
        Body::from(ConnectionRefused {
            direction: Direction::Inbound,
            reason: RefusalReason::Plaintext,
            detail: "GET / HTTP/1.1".into(),
            hint: RefusalReason::Plaintext.hint().into(),
            listener: "0.0.0.0:8443".into(),
            source: "172.18.0.1:4711".into(),
            peer: String::new(),
            count: 1,
        })
    }

    #[test]
    fn an_event_survives_json_with_its_body() {
        let sent = Event::new(Timestamp(7), Severity::Warning, "plaintext refused", &refused());
        let json = serde_json::to_string(&sent).unwrap();
        let got: EventRef<'_> = serde_json::from_str(&json).unwrap();
        assert_eq!(got.kind, "connection.refused");
        assert_eq!(got.body().unwrap(), Some(refused()));
    }

    #[test]
    fn an_unknown_kind_is_kept_as_sent() {
        let json =
            r#"{"seq":3,"at_us":9,"kind":"weather.changed","severity":"info","summary":"rain","body":{"mm": 4}}"#;
        let got: EventRef<'_> = serde_json::from_str(json).unwrap();
        assert!(got.body().unwrap().is_none());
        assert_eq!(got.body.get(), r#"{"mm": 4}"#);
    }

    #[test]
    fn a_severity_from_the_future_is_a_warning() {
        let json = r#"{"seq":3,"at_us":9,"kind":"x","severity":"catastrophic","summary":"","body":{}}"#;
        assert_eq!(serde_json::from_str::<EventRef<'_>>(json).unwrap().severity, Severity::Warning);
    }

    #[test]
    fn refusal_words_are_those_of_the_json() {
        for reason in [
            RefusalReason::DirectToService,
            RefusalReason::ProtocolVersion,
            RefusalReason::UnknownCa,
            RefusalReason::EgressNotListed,
            RefusalReason::EgressPrivateAddress,
            RefusalReason::EgressLoop,
            RefusalReason::BadRequest,
            RefusalReason::RequestTimeout,
            RefusalReason::NameUnresolved,
            RefusalReason::UpstreamRefused,
            RefusalReason::Quarantined,
        ] {
            assert_eq!(serde_json::to_string(&reason).unwrap(), format!("\"{}\"", reason.word()));
        }
    }
}
