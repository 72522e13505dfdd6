//! What deserves an alert, as a table: each rule reads one event and says which condition began, held or ended.
//!
//! Rules know nothing of time and of each other; the engine does. What tells two alerts apart goes into labels and is
//! stable (a check, a reason); what changes from one occurrence to the next (addresses, counts) is told in the summary
//! and the evidence, because a changing label makes every occurrence a new alert.

use std::net::SocketAddr;
use std::time::Duration;

use sidewarden_proto::event::{
    AgentConnected, Body, CaCertificate, ConnectionRefused, ContainerRef, Direction, GateStatus, IdentityRestored,
    IdentityRevoked, KINDS, ListenerExposed, ProcessInfo, Protocol, RefusalReason, Severity,
};
use sidewarden_proto::finding::{Finding, Verdict};
use sidewarden_proto::identity::{AgentId, SpiffeId};
use sidewarden_proto::time::Timestamp;

/// One committed event, as the rules read it.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// Who reported it.
    pub agent: &'a AgentId,
    /// When it happened, by the agent's clock.
    pub at: Timestamp,
    /// When the collector had it.
    pub received: Timestamp,
    /// What it is.
    pub kind: &'a str,
    /// How much it matters, in the agent's opinion.
    pub severity: Severity,
    /// Its line for a person.
    pub summary: &'a str,
    /// Its details; `None` for a kind that this version does not know.
    pub body: Option<&'a Body>,
    /// When the collector's clock last ticked before, by its own account.
    pub last_tick: Option<Timestamp>,
    /// It is of a kind that only the collector may tell, and somebody else sent it.
    pub forged: bool,
}

/// Whom an alert is about: one instance of a workload.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subject {
    /// The workload's SPIFFE ID.
    pub workload: String,
    /// The instance.
    pub instance: String,
}

impl Subject {
    /// The workload as people call it: `shop/orders`.
    pub fn name(&self) -> &str {
        self.workload.splitn(4, '/').nth(3).unwrap_or(&self.workload)
    }
}

impl From<&AgentId> for Subject {
    fn from(agent: &AgentId) -> Subject {
        Subject { workload: agent.workload.to_string(), instance: agent.instance.to_string() }
    }
}

/// One occurrence of a condition.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Whom it is about; `None` for the collector itself.
    pub subject: Option<Subject>,
    /// What tells it from other cases of the rule and subject: a label's name and value.
    pub apart: Option<(&'static str, String)>,
    /// Its severity, where that differs from the rule's.
    pub severity: Option<Severity>,
    /// From when on it counts, where that is not now.
    pub due: Option<Timestamp>,
    /// What happened, without whom and how often.
    pub what: String,
    /// From where, when somebody caused it.
    pub source: String,
    /// What shows it.
    pub evidence: Vec<String>,
    /// What to do about it.
    pub what_to_do: String,
    /// How many occurrences the event stands for.
    pub count: u64,
}

/// What a rule read in an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Signal {
    /// The condition holds, or happened again.
    Raise(Case),
    /// The condition of this subject ended, for one value of the label that tells apart or for all.
    Clear(Option<Subject>, Option<String>),
    /// Cases of this subject with other values than these ended.
    Only(Subject, Vec<String>),
    /// The subject is gone in order: every condition of every rule about it ended.
    Gone(Subject),
}

/// How a condition ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasts {
    /// When another event says so.
    UntilCleared,
    /// By itself, some minutes after its last occurrence.
    Moment,
}

/// One line of the table.
pub struct Rule {
    /// The alert's name.
    pub name: &'static str,
    /// How bad it is, unless the case says otherwise.
    pub severity: Severity,
    /// How it ends.
    pub lasts: Lasts,
    /// How long it must hold before it fires.
    pub wait: Duration,
    /// The kinds of event it reads; empty for those this version does not know.
    pub kinds: &'static [&'static str],
    /// What it means when it fires, for somebody who has never seen it.
    pub meaning: &'static str,
    /// What to do first.
    pub what_to_do: &'static str,
    read: fn(&Rule, &Seen<'_>) -> Vec<Signal>,
}

impl Rule {
    /// Whether the rule reads events of `kind`; forged ones go to one rule, and to no other.
    pub fn reads(&self, kind: &str, forged: bool) -> bool {
        let mine = self.kinds.contains(&kind) || (self.kinds.is_empty() && !KINDS.contains(&kind));
        mine && (self.name == FORGED) == forged
    }

    /// What the rule makes of an event.
    pub fn read(&self, seen: &Seen<'_>) -> Vec<Signal> {
        (self.read)(self, seen)
    }
}

/// The rule called `name`.
pub fn by_name(name: &str) -> Option<&'static Rule> {
    RULES.iter().find(|rule| rule.name == name)
}

/// The name of the rule that keeps other alerts of the same instance from beginning.
pub const SILENT: &str = "AgentSilent";

/// The name of the rule about events that somebody had no right to tell.
const FORGED: &str = "ForgedEvent";

const NO_WAIT: Duration = Duration::ZERO;
/// A reconnect after a restart of either side takes a few seconds; this long is not a restart any more.
const SILENCE: Duration = Duration::from_secs(30);
/// A collector's restart lets a renewal fail once; agents try again within a minute or two.
const RENEWAL: Duration = Duration::from_secs(300);
/// Ticks come every ten seconds; a gap of this size is a clock that jumped, or a collector that stood still.
const CLOCK_JUMP: Duration = Duration::from_secs(60);
/// How long before its end a waiver alerts: a weekend must not hide it.
const WAIVER_NOTICE: Duration = Duration::from_secs(3 * 24 * 3600);
/// An agent's clock may be ahead by this much before certificates and time lines suffer.
const CLOCK_AHEAD: Duration = Duration::from_secs(120);

/// Every rule, in the order of the documentation: traffic, processes, posture, agents, identities, the collector.
pub const RULES: &[Rule] = &[
    Rule {
        name: "PlaintextRefused",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["connection.refused"],
        meaning: "somebody spoke plaintext to an agent's mutual TLS port; the connection was refused",
        what_to_do: "find the client by its address: give it an agent, or point it at its own agent's port",
        read: refused,
    },
    Rule {
        name: "DirectToService",
        severity: Severity::Critical,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["connection.refused"],
        meaning: "somebody reached for the service's own port, past the agent; the agent holds that port and refused",
        what_to_do: "find out who has this address and why: nothing but the agent should know the service's own port",
        read: refused,
    },
    Rule {
        name: "ForeignCertificate",
        severity: Severity::Critical,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["connection.refused"],
        meaning: "a client showed a certificate of a CA outside this trust domain; the connection was refused",
        what_to_do: "a foreign client, or an agent that enrolled with another collector: find it by its address",
        read: refused,
    },
    Rule {
        name: "LegacyTls",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["connection.refused"],
        meaning: "a client offered nothing newer than TLS 1.1; the connection was refused",
        what_to_do: "update the client: TLS 1.2 is the floor and cannot be lowered",
        read: refused,
    },
    Rule {
        name: "PeerNotAllowed",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["connection.refused"],
        meaning: "a known workload reached for another that does not allow it; the connection was refused",
        what_to_do: "if it should get in, add it to `allow` of the listener; if not, look at what that workload runs",
        read: refused,
    },
    Rule {
        name: "WrongPeer",
        severity: Severity::Critical,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["connection.refused"],
        meaning: "another workload than the one asked for answers at an address; the connection was refused",
        what_to_do: "check `to` and `peer` of the route and what DNS says; a hijacked name looks exactly like this",
        read: refused,
    },
    Rule {
        name: "ProxyHeaderSpoofed",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["connection.refused"],
        meaning: "somebody who is no load balancer of ours began with a PROXY header, to pass for another address; refused",
        what_to_do: "if it is your load balancer, add it to `accept_proxy_protocol_from`; if not, find out who has this address",
        read: refused,
    },
    Rule {
        name: "RouteLoop",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["connection.refused"],
        meaning: "a route of an agent leads back to that agent: nothing gets through it",
        what_to_do: "check `to` of the route, and what DNS and the hosts file say of its name",
        read: refused,
    },
    Rule {
        name: "PlaintextAllowed",
        severity: Severity::Warning,
        lasts: Lasts::UntilCleared,
        wait: NO_WAIT,
        kinds: &["agent.started", "listener.permissive"],
        meaning: "a listener lets plaintext in beside mutual TLS (`permissive`); it fires until that is switched off or its time is over",
        what_to_do: "give those who still speak plaintext an agent (PlaintextLetIn names them), then remove `permissive`",
        read: permissive,
    },
    Rule {
        name: "InsecureTrustAll",
        severity: Severity::Critical,
        lasts: Lasts::UntilCleared,
        wait: NO_WAIT,
        kinds: &["agent.started", "trust.insecure"],
        meaning: "a listener or route accepts every certificate (`insecure_trust_all`): anybody can pose as the peer",
        what_to_do: "import the peer's CA with `sidewarden-collector trust import`, then remove `insecure_trust_all`",
        read: insecure,
    },
    Rule {
        name: "PlaintextLetIn",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["connection.plaintext"],
        meaning: "somebody still speaks plaintext to a listener that allows it for now (`permissive`)",
        what_to_do: "give this client an agent before the time of `permissive` is over: then it is refused",
        read: plaintext,
    },
    Rule {
        name: "BadPeerCertificate",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["connection.refused"],
        meaning: "a peer showed no certificate, or one that is expired, revoked or breaks a rule",
        what_to_do: "look at that peer's agent: its enrolment, its renewals and its clock",
        read: refused,
    },
    Rule {
        name: "EgressRefused",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["connection.refused"],
        meaning: "the workload asked its agent for a place that is not on its egress list, or in a way that is not taken",
        what_to_do: "if it should get there, add it to `egress.allow`; if not, look at what the workload runs",
        read: refused,
    },
    Rule {
        name: "EgressToPrivateAddress",
        severity: Severity::Critical,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["connection.refused"],
        meaning: "the workload asked its agent for a private, loopback, link-local or metadata address, or a name that leads there; it was refused",
        what_to_do: "server-side request forgery and DNS rebinding look like this: find out what made the workload ask",
        read: refused,
    },
    Rule {
        name: "ConnectionsLimited",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["connection.refused"],
        meaning: "connections were turned away because of a limit, or because handshakes were never finished",
        what_to_do: "if this load is expected raise the limit; if not, somebody tries to exhaust the agent",
        read: refused,
    },
    Rule {
        name: "RootExec",
        severity: Severity::Critical,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["process.entered"],
        meaning: "somebody entered the container as root while the workload does not run as root",
        what_to_do: "find out who ran `docker exec` or `kubectl exec` at that time; if nobody did, isolate the host",
        read: entered,
    },
    Rule {
        name: "PrivilegedExec",
        severity: Severity::Critical,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["process.entered"],
        meaning: "somebody entered the container with capabilities that the workload does not have",
        what_to_do: "find out who ran `docker exec --privileged` at that time; if nobody did, isolate the host",
        read: entered,
    },
    Rule {
        name: "ContainerEntered",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["process.entered"],
        meaning: "a process came into the container from outside (docker exec, kubectl exec, nsenter)",
        what_to_do: "if it is a health check declare it in the agent's `healthcheck`; if not, ask who did it",
        read: entered,
    },
    Rule {
        name: "ShellInWorkload",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["process.shell"],
        meaning: "the service itself started a shell, as it does when an injected command runs",
        what_to_do: "look at the command and at the requests of that moment; if the service never does this, isolate it",
        read: shell,
    },
    Rule {
        name: "ListenerExposed",
        severity: Severity::Warning,
        lasts: Lasts::UntilCleared,
        wait: NO_WAIT,
        kinds: &["listener.exposed", "listener.closed", "listeners.baseline"],
        meaning: "a port of the workload can be reached from outside without TLS, and nobody declared that",
        what_to_do: "bind the service to 127.0.0.1, so that only its agent reaches it, or close it by `intercept.inbound`",
        read: exposed,
    },
    Rule {
        name: "PlaintextPortOpen",
        severity: Severity::Warning,
        lasts: Lasts::UntilCleared,
        wait: NO_WAIT,
        kinds: &["listener.exposed", "listener.closed", "listeners.baseline"],
        meaning: "a port that was declared to be plaintext is open; it fires for as long as that is so",
        what_to_do: "see whether the declared reason still holds; if not close the port and take it from [[declared.plaintext]]",
        read: exposed,
    },
    Rule {
        name: "InterceptionBroken",
        severity: Severity::Critical,
        lasts: Lasts::UntilCleared,
        wait: NO_WAIT,
        kinds: &["interception.broken", "interception.holds", "agent.started"],
        meaning: "the packet rules around a workload are not in force, or the workload can get past them",
        what_to_do: "run the one-shot with `intercept install` again in this network namespace, then `intercept verify`",
        read: interception,
    },
    Rule {
        name: "CheckFailed",
        severity: Severity::Warning,
        lasts: Lasts::UntilCleared,
        wait: NO_WAIT,
        kinds: &["posture.baseline", "verdict.changed"],
        meaning: "a CIS Docker rule of severity warning or above is broken; it fires until the verdict changes",
        what_to_do: "apply the remedy that stands with the check, or record a waiver with a reason and an end",
        read: checks,
    },
    Rule {
        name: "ContainerCheckFailed",
        severity: Severity::Warning,
        lasts: Lasts::UntilCleared,
        wait: NO_WAIT,
        kinds: &["container.posture", "container.verdict_changed", "container.gone"],
        meaning: "a container of a host breaks a CIS Docker rule of severity warning or above, as the node agent there sees it",
        what_to_do: "apply the remedy that stands with the check, or record a waiver with a reason and an end",
        read: container_checks,
    },
    Rule {
        name: "WaiverEnding",
        severity: Severity::Warning,
        lasts: Lasts::UntilCleared,
        wait: NO_WAIT,
        kinds: &[
            "posture.baseline",
            "verdict.changed",
            "container.posture",
            "container.verdict_changed",
            "container.gone",
        ],
        meaning: "a broken rule is waived for three days more, or less; after that it is a failure and alerts again",
        what_to_do: "mend it with the remedy that stands with the check, or have whoever answers for it set the waiver anew",
        read: waivers,
    },
    Rule {
        name: "ContainerExec",
        severity: Severity::Critical,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["container.exec"],
        meaning: "somebody had a program run in a container as root or with all privileges, and the engine of the host told it",
        what_to_do: "find out who it was: the engine's log and the shells of the host tell; nothing should need this in production",
        read: container_exec,
    },
    Rule {
        name: "EngineLost",
        severity: Severity::Critical,
        lasts: Lasts::UntilCleared,
        wait: NO_WAIT,
        kinds: &["engine.lost", "engine.back", "agent.started"],
        meaning: "the container engine of a host does not answer its node agent: nothing is known of its containers",
        what_to_do: "is the engine up, and is its socket mounted where `node.socket` says?",
        read: engine,
    },
    Rule {
        name: SILENT,
        severity: Severity::Critical,
        lasts: Lasts::UntilCleared,
        wait: SILENCE,
        kinds: &["agent.connected", "agent.disconnected"],
        meaning: "an agent went away without saying goodbye: its workload is not watched now",
        what_to_do: "is the container up, is the agent, does the network let it reach the collector? someone may have killed it",
        read: silence,
    },
    Rule {
        name: "AgentKilled",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["agent.started"],
        meaning: "an agent started again after it was killed: what happened in its last moments may be missing",
        what_to_do: "look for an out-of-memory kill, a crash or a `kill -9`; an intruder's first act is to stop the watcher",
        read: killed,
    },
    Rule {
        name: "EventsLost",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["events.lost"],
        meaning: "an agent had to drop events; how many, and why, is counted",
        what_to_do: "give the spool more room, or mend what kept the agent from the collector",
        read: lost,
    },
    Rule {
        name: "SpoolDamaged",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["spool.damaged"],
        meaning: "part of an agent's spool could not be read; it was set aside, and the rest was kept",
        what_to_do: "check the disk under the agent's volume; keep the file that was set aside if this may be an attack",
        read: damaged,
    },
    Rule {
        name: FORGED,
        severity: Severity::Critical,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &[
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
            "waiver.set",
            "waiver.removed",
            "attestation.set",
            "attestation.removed",
            "scan.added",
            "ca.rotated",
            "ca.issued",
            "ca.certificates",
            "alert.firing",
            "alert.resolved",
        ],
        meaning: "an agent sent an event that only the collector itself may tell; it was kept, and not believed",
        what_to_do: "no agent of ours does this: treat that workload's agent, and its key, as taken over",
        read: forged,
    },
    Rule {
        name: "CertificateExpiring",
        severity: Severity::Warning,
        lasts: Lasts::UntilCleared,
        wait: NO_WAIT,
        kinds: &["certificate.issued"],
        meaning: "less than a third of a certificate's life is left and it was not renewed",
        what_to_do: "read why renewing fails in the agent's log; restarting it never makes a valid certificate worse",
        read: issued,
    },
    Rule {
        name: "CertificateEnding",
        severity: Severity::Critical,
        lasts: Lasts::UntilCleared,
        wait: NO_WAIT,
        kinds: &["certificate.issued"],
        meaning: "less than a tenth of a certificate's life is left and it was not renewed: the workload is about to fall silent",
        what_to_do: "read why renewing fails in the agent's log; a certificate that has ended can be renewed within the grace",
        read: issued,
    },
    Rule {
        name: "CaExpiring",
        severity: Severity::Warning,
        lasts: Lasts::UntilCleared,
        wait: RENEWAL,
        kinds: &["ca.certificates"],
        meaning: "less than a third of the life of the root, the issuing CA or the collector's own certificate is left",
        what_to_do: "the root: plan to replace it; the others renew by themselves, and the collector's log says why they do not",
        read: ca_dates,
    },
    Rule {
        name: "CaEnding",
        severity: Severity::Critical,
        lasts: Lasts::UntilCleared,
        wait: RENEWAL,
        kinds: &["ca.certificates"],
        meaning: "less than a tenth of the life of the root, the issuing CA or the collector's own certificate is left",
        what_to_do: "the root: replace it now, every agent falls silent with it; the others: the collector's log says why they are not renewed",
        read: ca_dates,
    },
    Rule {
        name: "RenewalFailing",
        severity: Severity::Warning,
        lasts: Lasts::UntilCleared,
        wait: RENEWAL,
        kinds: &["identity.renewal_failed", "identity.renewed", "certificate.issued"],
        meaning: "an agent cannot renew its certificate; the old one is still in use",
        what_to_do: "the error says why; the certificate in use holds until the time given",
        read: renewal,
    },
    Rule {
        name: "WorkloadQuarantined",
        severity: Severity::Critical,
        lasts: Lasts::UntilCleared,
        wait: NO_WAIT,
        kinds: &["quarantine.changed", "quarantine.alone"],
        meaning: "an instance breaks a gate of the policy: it is off the data plane, or would be if the gate or its limits allowed that",
        what_to_do: "mend what the gate names, and it comes back by itself; or `sidewarden-collector quarantine release` lets it in for a while",
        read: quarantined,
    },
    Rule {
        name: "PolicyChanged",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["policy.applied", "quarantine.released"],
        meaning: "somebody with the admin token changed the policy of all agents, or had a quarantined instance let in",
        what_to_do: "if nobody of yours did this, replace the collector's admin token and apply the policy that should hold",
        read: policy_changed,
    },
    Rule {
        name: "IdentityRevoked",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["identity.revoked", "identity.restored"],
        meaning: "somebody with the admin token revoked an identity, or undid that",
        what_to_do: "if nobody of yours did this, replace the collector's admin token; `revoke --undo` takes it back",
        read: revoked,
    },
    Rule {
        name: "TrustFilesRefused",
        severity: Severity::Warning,
        lasts: Lasts::UntilCleared,
        wait: NO_WAIT,
        kinds: &["trust.files_refused", "trust.changed", "agent.started"],
        meaning: "files that say whom an agent trusts cannot be used; what it had read before stays in force",
        what_to_do: "the error names the file and what is wrong with it: put that right, nothing has to be restarted",
        read: trust_files,
    },
    Rule {
        name: "RevocationListsLacking",
        severity: Severity::Warning,
        lasts: Lasts::UntilCleared,
        wait: NO_WAIT,
        kinds: &["trust.crls", "agent.started"],
        meaning: "revocation lists of foreign CAs are missing or have ended; in strict mode their peers are refused",
        what_to_do: "bring a newer list of each CA that is named to `trust.crls`; nothing has to be restarted",
        read: revocation_lists,
    },
    Rule {
        name: "CaRotated",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["ca.rotated"],
        meaning: "a step was taken by which one root of the trust domain takes over from another",
        what_to_do: "if nobody of you did this, somebody has the collector; `ca status` says what is next, and whom it waits for",
        read: rotated,
    },
    Rule {
        name: "EnrolmentRefused",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["enrolment.refused"],
        meaning: "somebody asked for a certificate and was refused",
        what_to_do: "if it is your agent make a new token with `sidewarden-collector token create`; if not, find the address",
        read: enrolment,
    },
    Rule {
        name: "IngestRefused",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["ingest.refused"],
        meaning: "a connection to the collector's event port was refused",
        what_to_do: "an agent with a wrong or expired identity, or a stranger: find it by its address",
        read: ingest,
    },
    Rule {
        name: "AgentClock",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["agent.started", "agent.connected", "connections.summary", "posture.baseline"],
        meaning: "an agent's clock differs from the collector's: times mislead, and certificates may be refused",
        what_to_do: "synchronise both hosts' clocks (chrony, systemd-timesyncd); if many agents show this it is the collector's",
        read: agent_clock,
    },
    Rule {
        name: "CollectorClock",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["clock.tick"],
        meaning: "the collector's clock jumped, or the collector stood still for a while",
        what_to_do: "look at the host's time synchronisation, and at whether it was suspended or overloaded",
        read: collector_clock,
    },
    Rule {
        name: "UnknownEvent",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &[],
        meaning: "an agent newer than this collector reports something serious that this version has no rule for",
        what_to_do: "read the event; update the collector to the agents' version",
        read: unknown,
    },
];

/// The rule that a refusal belongs to; `None` where somebody is merely down or not ready.
fn refusal_rule(reason: RefusalReason) -> Option<&'static str> {
    Some(match reason {
        RefusalReason::Plaintext => "PlaintextRefused",
        RefusalReason::DirectToService => "DirectToService",
        RefusalReason::UnknownCa => "ForeignCertificate",
        RefusalReason::ProtocolVersion => "LegacyTls",
        RefusalReason::NotAllowed => "PeerNotAllowed",
        RefusalReason::WrongPeer => "WrongPeer",
        RefusalReason::ProxyHeaderUntrusted => "ProxyHeaderSpoofed",
        RefusalReason::Loop => "RouteLoop",
        RefusalReason::NoCertificate
        | RefusalReason::Expired
        | RefusalReason::BadCertificate
        | RefusalReason::Revoked
        | RefusalReason::RevocationUnknown => "BadPeerCertificate",
        RefusalReason::EgressNotListed | RefusalReason::EgressLoop | RefusalReason::BadRequest => "EgressRefused",
        RefusalReason::EgressPrivateAddress => "EgressToPrivateAddress",
        RefusalReason::HandshakeTimeout | RefusalReason::RequestTimeout | RefusalReason::LimitReached => {
            "ConnectionsLimited"
        }
        RefusalReason::HandshakeFailed
        | RefusalReason::RefusedByPeer
        | RefusalReason::Unreachable
        | RefusalReason::WorkloadUnreachable
        | RefusalReason::NoIdentity
        | RefusalReason::ProxyHeaderBroken
        | RefusalReason::UnknownServerName
        | RefusalReason::NameUnresolved
        | RefusalReason::UpstreamRefused
        // The quarantine has an alert of its own.
        | RefusalReason::Quarantined => return None,
    })
}

fn refused(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::ConnectionRefused(body)) = seen.body else { return Vec::new() };
    if refusal_rule(body.reason) != Some(rule.name) {
        return Vec::new();
    }
    let mut case = case(seen, rule, refusal_in_words(body));
    case.apart = Some(("reason", body.reason.word().to_owned()));
    case.source = host_of(&body.source).to_owned();
    case.count = body.count.max(1);
    case.evidence = lines([("detail", &body.detail), ("listener", &body.listener), ("certificate", &body.peer)]);
    if !body.hint.is_empty() {
        case.what_to_do = body.hint.clone();
    }
    vec![Signal::Raise(case)]
}

fn refusal_in_words(body: &ConnectionRefused) -> String {
    let what = match body.reason {
        RefusalReason::Plaintext => "plaintext was refused",
        RefusalReason::DirectToService => "somebody went for the service's own port and was refused",
        RefusalReason::UnknownCa => "a certificate of a foreign CA was refused",
        RefusalReason::ProtocolVersion => "a TLS version older than 1.2 was refused",
        RefusalReason::NotAllowed => "a workload that is not on the allow list was refused",
        RefusalReason::WrongPeer => "another workload than the one asked for answered and was refused",
        RefusalReason::NoCertificate => "a client without a certificate was refused",
        RefusalReason::Expired => "a certificate outside its validity was refused",
        RefusalReason::BadCertificate => "a certificate that breaks the rules was refused",
        RefusalReason::Revoked => "a revoked certificate was refused",
        RefusalReason::RevocationUnknown => "a certificate that no revocation list speaks for was refused",
        RefusalReason::HandshakeTimeout => "a handshake was never finished",
        RefusalReason::LimitReached => "a limit on connections was reached",
        RefusalReason::ProxyHeaderUntrusted => "a PROXY header from where none may come was refused",
        RefusalReason::Loop => "a route that leads back to its agent was refused",
        RefusalReason::EgressNotListed => "a place that is not on the egress list was refused",
        RefusalReason::EgressPrivateAddress => "a way to an address that is not public was refused",
        RefusalReason::EgressLoop => "a connection that was not the workload's own was refused",
        RefusalReason::BadRequest => "a request that is not taken was refused",
        RefusalReason::RequestTimeout => "a request was never finished",
        _ => "a connection was refused",
    };
    let way = match body.direction {
        Direction::Inbound => "at",
        Direction::Outbound | Direction::Egress => "on the way to",
    };
    let peer = if body.peer.is_empty() { String::new() } else { format!(" ({})", body.peer) };
    format!("{what} {way} {}{peer}", body.listener)
}

fn entered(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::ProcessEntered(body)) = seen.body else { return Vec::new() };
    let name = match (body.privileged, body.as_root) {
        (true, _) => "PrivilegedExec",
        (false, true) => "RootExec",
        (false, false) => "ContainerEntered",
    };
    if name != rule.name {
        return Vec::new();
    }
    let how = match name {
        "PrivilegedExec" => "somebody entered with more capabilities than the workload has",
        "RootExec" => "somebody entered as root",
        _ => "somebody entered from outside",
    };
    vec![Signal::Raise(process_case(seen, rule, how, &body.process))]
}

fn shell(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::ProcessShell(body)) = seen.body else { return Vec::new() };
    vec![Signal::Raise(process_case(seen, rule, "the service started a shell", &body.process))]
}

fn process_case(seen: &Seen<'_>, rule: &Rule, what: &str, process: &ProcessInfo) -> Case {
    let mut case = case(seen, rule, format!("{what} and ran `{}`", short(&process.command, 80)));
    case.evidence = vec![format!(
        "pid {} ({}), uid {}, parent {} {}, command: {}",
        process.pid, process.name, process.uid, process.ppid, process.parent, process.command
    )];
    case
}

/// What is declared goes to a rule of its own.
fn exposed(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    const DECLARED: &str = "PlaintextPortOpen";
    let subject = || Subject::from(seen.agent);
    match seen.body {
        Some(Body::ListenerExposed(body)) if body.reason.is_empty() == (rule.name != DECLARED) => {
            vec![Signal::Raise(exposure(rule, seen, body))]
        }
        // It may have been the other rule's before.
        Some(Body::ListenerExposed(body)) => {
            vec![Signal::Clear(Some(subject()), Some(listener(&body.address, body.protocol)))]
        }
        Some(Body::ListenerClosed(body)) => {
            vec![Signal::Clear(Some(subject()), Some(listener(&body.address, body.protocol)))]
        }
        Some(Body::ListenersBaseline(body)) => {
            let open = if rule.name == DECLARED { &body.declared } else { &body.exposed };
            let open = open.iter().map(|place| place.rsplit_once('/').unwrap_or((place, "")));
            let protocol = |word: &str| if word == "udp" { Protocol::Udp } else { Protocol::Tcp };
            vec![Signal::Only(subject(), open.map(|(address, word)| listener(address, protocol(word))).collect())]
        }
        _ => Vec::new(),
    }
}

fn exposure(rule: &Rule, seen: &Seen<'_>, body: &ListenerExposed) -> Case {
    let place = listener(&body.address, body.protocol);
    let mut case = case(seen, rule, format!("{place} can be reached from outside without TLS"));
    case.apart = Some(("listener", place));
    case.evidence = lines([("detail", &body.detail), ("owner", &body.owner), ("declared because", &body.reason)]);
    case
}

/// `0.0.0.0:80/tcp`, or `other` when the address is none.
fn listener(address: &str, protocol: Protocol) -> String {
    match address.parse::<SocketAddr>() {
        Ok(address) => format!("{address}/{}", protocol.word()),
        Err(_) => "other".to_owned(),
    }
}

fn interception(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    match seen.body {
        Some(Body::InterceptionBroken(body)) => {
            let first = body.why.first().map_or("", String::as_str);
            let mut case = case(seen, rule, format!("interception does not hold: {}", short(first, 200)));
            case.evidence = body.why.iter().map(|why| short(why, 300)).collect();
            vec![Signal::Raise(case)]
        }
        // One that starts tells anew, or was told not to ask for rules any more.
        Some(Body::InterceptionHolds(_) | Body::AgentStarted(_)) => vec![Signal::Clear(Some(seen.agent.into()), None)],
        _ => Vec::new(),
    }
}

fn permissive(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let subject = Some(Subject::from(seen.agent));
    match seen.body {
        // Listeners that still do so say it right after.
        Some(Body::AgentStarted(_)) => vec![Signal::Clear(subject, None)],
        Some(Body::ListenerPermissive(body)) if body.on => {
            let mut case = case(seen, rule, format!("{} lets plaintext in until {}", body.listener, body.until_us));
            case.apart = Some(("listener", listener_word(&body.listener)));
            case.evidence = lines([("reason", &body.reason)]);
            vec![Signal::Raise(case)]
        }
        Some(Body::ListenerPermissive(body)) => vec![Signal::Clear(subject, Some(listener_word(&body.listener)))],
        _ => Vec::new(),
    }
}

fn insecure(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let subject = Some(Subject::from(seen.agent));
    match seen.body {
        // Places that still do so are told right after.
        Some(Body::AgentStarted(_)) => vec![Signal::Clear(subject, None)],
        Some(Body::TrustInsecure(body)) if body.on => {
            let place = short(&body.place, 120);
            let mut case = case(seen, rule, format!("{place} accepts every certificate until {}", body.until_us));
            case.apart = Some(("place", insecure_place(body.direction, &body.place)));
            case.evidence = lines([("reason", &body.reason)]);
            vec![Signal::Raise(case)]
        }
        Some(Body::TrustInsecure(body)) => {
            vec![Signal::Clear(subject, Some(insecure_place(body.direction, &body.place)))]
        }
        _ => Vec::new(),
    }
}

/// As a label's value: the way, and of the place what cannot do harm.
fn insecure_place(direction: Direction, place: &str) -> String {
    let good = |c: char| c.is_ascii_alphanumeric() || ".:-_,()[]* ".contains(c);
    let place = if place.len() <= 120 && place.chars().all(good) { place } else { "other" };
    format!("{} {place}", direction.word())
}

fn plaintext(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::ConnectionPlaintext(body)) = seen.body else { return Vec::new() };
    let mut case = case(seen, rule, format!("plaintext from {} was let in at {}", body.network, body.listener));
    case.apart = Some(("listener", listener_word(&body.listener)));
    case.source = host_of(&body.source).to_owned();
    case.count = body.count.max(1);
    case.evidence = lines([("network", &body.network), ("detail", &body.detail)]);
    vec![Signal::Raise(case)]
}

/// As a label's value: an address with a port, or `other`.
fn listener_word(listener: &str) -> String {
    listener.parse::<std::net::SocketAddr>().map_or_else(|_| "other".to_owned(), |address| address.to_string())
}

fn checks(_: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    match seen.body {
        Some(Body::VerdictChanged(body)) => finding(seen, &body.finding).into_iter().collect(),
        Some(Body::PostureBaseline(body)) => {
            let mentioned = body.findings.iter().map(|f| word(&f.check)).collect();
            let mut signals = vec![Signal::Only(seen.agent.into(), mentioned)];
            signals.extend(body.findings.iter().filter_map(|f| finding(seen, f)));
            signals
        }
        _ => Vec::new(),
    }
}

/// A container of a host, as whom an alert is about. No instance has a slash in its name.
fn container_subject(agent: &AgentId, container: &ContainerRef) -> Subject {
    let name = if container.name.is_empty() { &container.id } else { &container.name };
    Subject { workload: agent.workload.to_string(), instance: format!("{}/{}", agent.instance, short(name, 100)) }
}

fn container_checks(_: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let about = |container: &ContainerRef, finding: &Finding| {
        let subject = container_subject(seen.agent, container);
        match (&finding.verdict, broken(seen.agent, finding)) {
            (Verdict::Unknown { .. }, _) => None,
            (_, Some(case)) => Some(Signal::Raise(Case { subject: Some(subject), ..case })),
            (_, None) => Some(Signal::Clear(Some(subject), Some(word(&finding.check)))),
        }
    };
    match seen.body {
        Some(Body::ContainerVerdictChanged(body)) => about(&body.container, &body.finding).into_iter().collect(),
        Some(Body::ContainerPosture(body)) => {
            let mentioned = body.findings.iter().map(|f| word(&f.check)).collect();
            let mut signals = vec![Signal::Only(container_subject(seen.agent, &body.container), mentioned)];
            signals.extend(body.findings.iter().filter_map(|f| about(&body.container, f)));
            signals
        }
        Some(Body::ContainerGone(body)) => vec![Signal::Gone(container_subject(seen.agent, &body.container))],
        _ => Vec::new(),
    }
}

/// Every finding says whether it is waived; one that is not named is judged no longer.
fn waivers(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let of_all = |subject: Subject, findings: &[Finding]| {
        let named = findings.iter().map(|f| word(&f.check)).collect();
        let each = findings.iter().filter_map(|finding| waiver(rule, seen, subject.clone(), finding));
        std::iter::once(Signal::Only(subject.clone(), named)).chain(each).collect()
    };
    match seen.body {
        Some(Body::VerdictChanged(body)) => waiver(rule, seen, seen.agent.into(), &body.finding).into_iter().collect(),
        Some(Body::PostureBaseline(body)) => of_all(seen.agent.into(), &body.findings),
        Some(Body::ContainerVerdictChanged(body)) => {
            waiver(rule, seen, container_subject(seen.agent, &body.container), &body.finding).into_iter().collect()
        }
        Some(Body::ContainerPosture(body)) => of_all(container_subject(seen.agent, &body.container), &body.findings),
        Some(Body::ContainerGone(body)) => vec![Signal::Gone(container_subject(seen.agent, &body.container))],
        _ => Vec::new(),
    }
}

fn waiver(rule: &Rule, seen: &Seen<'_>, subject: Subject, finding: &Finding) -> Option<Signal> {
    let check = word(&finding.check);
    let (by, why, until) = match &finding.verdict {
        Verdict::Waived { by, why, until } => (by, why, until),
        Verdict::Unknown { .. } => return None,
        _ => return Some(Signal::Clear(Some(subject), Some(check))),
    };
    let id = &finding.ids.v1_3_1;
    let mut case = case(seen, rule, format!("the waiver of CIS {id} {check} ends {until}"));
    case.subject = Some(subject);
    case.due = Some(until.minus(WAIVER_NOTICE));
    case.evidence = vec![format!("waived by {}: {}", short(by, 100), short(why, 300))];
    case.apart = Some(("check", check));
    Some(Signal::Raise(case))
}

fn container_exec(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::ContainerExec(body)) = seen.body else { return Vec::new() };
    if seen.severity < Severity::Warning {
        return Vec::new();
    }
    let mut case = case(seen, rule, short(seen.summary, 300));
    case.subject = Some(container_subject(seen.agent, &body.container));
    case.severity = Some(seen.severity);
    case.evidence = lines([("user", &body.user), ("command", &body.command)]);
    vec![Signal::Raise(case)]
}

fn engine(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    match seen.body {
        Some(Body::EngineLost(body)) => {
            let mut case = case(seen, rule, "the container engine does not answer".into());
            case.evidence = lines([("why", &body.why)]);
            vec![Signal::Raise(case)]
        }
        Some(Body::EngineBack(_) | Body::AgentStarted(_)) => vec![Signal::Clear(Some(seen.agent.into()), None)],
        _ => Vec::new(),
    }
}

/// `unknown` neither begins nor ends an alert: what was broken and can no longer be seen is not mended.
fn finding(seen: &Seen<'_>, finding: &Finding) -> Option<Signal> {
    match (&finding.verdict, broken(seen.agent, finding)) {
        (Verdict::Unknown { .. }, _) => None,
        (_, Some(case)) => Some(Signal::Raise(case)),
        (_, None) => Some(Signal::Clear(Some(seen.agent.into()), Some(word(&finding.check)))),
    }
}

/// The case of a finding, if it is a failure that deserves an alert.
pub fn broken(agent: &AgentId, finding: &Finding) -> Option<Case> {
    if finding.verdict != Verdict::Fail || finding.severity < Severity::Warning {
        return None;
    }
    let mut case = about(agent, "apply the remedy that stands with the check, or waive it", failed_in_words(finding));
    case.apart = Some(("check", word(&finding.check)));
    case.severity = Some(finding.severity);
    case.evidence = finding.evidence.iter().map(|e| format!("{}: {}", e.source, e.line)).collect();
    if let Some(remedy) = remedy(finding) {
        case.what_to_do = remedy;
    }
    Some(case)
}

/// Titles say what the rule asks for, so they are quoted: the sentence says that it is broken.
fn failed_in_words(finding: &Finding) -> String {
    let id = if finding.ids.v1_3_1.is_empty() { String::new() } else { format!("CIS {} ", finding.ids.v1_3_1) };
    let evidence = finding.evidence.first().map(|e| format!(": {}", short(&e.line, 120))).unwrap_or_default();
    format!("breaks {id}{} “{}”{evidence}", finding.check, finding.title)
}

fn remedy(finding: &Finding) -> Option<String> {
    let ways = [
        ("compose", &finding.remedy.compose),
        ("docker run", &finding.remedy.docker_run),
        ("kubernetes", &finding.remedy.kubernetes),
    ];
    let told: Vec<String> =
        ways.iter().filter(|(_, how)| !how.is_empty()).map(|(way, how)| format!("{way}: {how}")).collect();
    if told.is_empty() { None } else { Some(told.join("\n")) }
}

fn silence(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    match seen.body {
        Some(Body::AgentConnected(body)) => vec![Signal::Clear(Some(subject(&body.workload, &body.instance)), None)],
        Some(Body::AgentDisconnected(body)) if body.clean => {
            vec![Signal::Gone(subject(&body.workload, &body.instance))]
        }
        Some(Body::AgentDisconnected(body)) => {
            let mut case = case(seen, rule, format!("the agent is silent: {}", body.reason));
            case.subject = Some(subject(&body.workload, &body.instance));
            case.evidence = vec![format!("last connection ended at {}: {}", seen.at, body.reason)];
            vec![Signal::Raise(case)]
        }
        _ => Vec::new(),
    }
}

/// The case for an agent that was not there when the collector began to serve, and has not come back since.
pub fn not_back(agent: &AgentId, since: Timestamp) -> Case {
    let what = "the agent is silent: it did not come back after the collector's restart".to_owned();
    let mut case =
        about(agent, "is the container up, is the agent, does the network let it reach the collector?", what);
    case.due = Some(since);
    case.evidence = vec![format!("not heard since {since}")];
    case
}

fn killed(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    match seen.body {
        Some(Body::AgentStarted(body)) if !body.clean => {
            let what = "the agent was killed and started again: events of its last moments may be missing";
            vec![Signal::Raise(case(seen, rule, what.to_owned()))]
        }
        _ => Vec::new(),
    }
}

fn lost(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::EventsLost(body)) = seen.body else { return Vec::new() };
    let count = body.last_seq.saturating_sub(body.first_seq).saturating_add(1);
    let mut case = case(seen, rule, format!("{count} events were lost: {}", short(&body.reason, 80)));
    case.apart = Some(("reason", known(&body.reason, &["spool_full", "damaged", "collector_rewound"])));
    case.evidence = vec![format!("events {} to {}, by severity {:?}", body.first_seq, body.last_seq, body.by_severity)];
    vec![Signal::Raise(case)]
}

fn damaged(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::SpoolDamaged(body)) = seen.body else { return Vec::new() };
    let mut case = case(seen, rule, format!("{} bytes of the spool were unreadable and set aside", body.bytes));
    case.evidence = lines([("set aside at", &body.quarantined), ("detail", &body.detail)]);
    vec![Signal::Raise(case)]
}

/// How much of a certificate's life is left when a rule is due: a third, and a tenth where it is critical.
pub fn share(severity: Severity) -> u32 {
    if severity == Severity::Critical { 10 } else { 3 }
}

fn issued(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::CertificateIssued(body)) = seen.body else { return Vec::new() };
    let life = body.not_after_us.since(seen.at);
    let mut case = expiring(seen.agent, body.not_after_us, body.not_after_us.minus(life / share(rule.severity)));
    case.subject = Some(subject(&body.workload, &body.instance));
    case.evidence = lines([("serial", &body.serial), ("issued by", &body.by)]);
    vec![Signal::Raise(case)]
}

/// The case of a certificate that ends at `not_after` and should have been renewed by `due`.
pub fn expiring(agent: &AgentId, not_after: Timestamp, due: Timestamp) -> Case {
    let what = format!("the certificate ends at {not_after} and was not renewed");
    let mut case = about(agent, "read why renewing fails in the agent's log, or enrol it anew", what);
    case.due = Some(due);
    case
}

fn renewal(_: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    match seen.body {
        Some(Body::IdentityRenewalFailed(body)) => {
            let mut case = not_renewed(seen.agent, &body.error);
            case.evidence.push(format!("the certificate in use ends at {}", body.not_after_us));
            vec![Signal::Raise(case)]
        }
        Some(Body::IdentityRenewed(_)) => vec![Signal::Clear(Some(seen.agent.into()), None)],
        Some(Body::CertificateIssued(body)) => vec![Signal::Clear(Some(subject(&body.workload, &body.instance)), None)],
        _ => Vec::new(),
    }
}

fn trust_files(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    match seen.body {
        Some(Body::TrustFilesRefused(body)) => {
            let mut case = case(seen, rule, format!("trust files cannot be used: {}", short(&body.error, 200)));
            case.evidence = lines([("error", &body.error)]);
            vec![Signal::Raise(case)]
        }
        // An agent does not start with files that cannot be used.
        Some(Body::TrustChanged(_) | Body::AgentStarted(_)) => vec![Signal::Clear(Some(seen.agent.into()), None)],
        _ => Vec::new(),
    }
}

fn revocation_lists(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    match seen.body {
        Some(Body::TrustCrls(body)) if !body.lacking.is_empty() => {
            let then = if body.strict { "its peers are refused" } else { "its peers are not asked about" };
            let mut case = case(seen, rule, format!("{}: {then}", short(&body.lacking[0], 200)));
            case.evidence = body.lacking.iter().take(20).map(|lack| short(lack, 300)).collect();
            vec![Signal::Raise(case)]
        }
        // One that starts tells anew, or was told not to ask for lists any more.
        Some(Body::TrustCrls(_) | Body::AgentStarted(_)) => vec![Signal::Clear(Some(seen.agent.into()), None)],
        _ => Vec::new(),
    }
}

fn rotated(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::CaRotated(body)) = seen.body else { return Vec::new() };
    let mut case = case(seen, rule, format!("the CA's rotation took the step `{}`", short(&body.step, 20)));
    let steps = ["prepare", "activate", "taint", "retire", "compromise", "abandon"];
    (case.subject, case.apart) = (None, Some(("reason", known(&body.step, &steps))));
    case.evidence = lines([("root that issues now", &body.active), ("left behind", &body.left_behind.to_string())]);
    case.evidence.extend(body.named.iter().map(|name| format!("left behind: {}", short(name, 200))));
    vec![Signal::Raise(case)]
}

/// All of them at once: what is no longer listed has been replaced.
fn ca_dates(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::CaCertificates(body)) = seen.body else { return Vec::new() };
    let whats = ["root", "issuing", "collector"];
    // One alert for each kind, about the one that ends first.
    let soonest = |what: &&str| {
        let of_kind = body.certificates.iter().filter(|one| one.what == **what);
        of_kind.min_by_key(|one| due(one, rule.severity)).cloned()
    };
    let raise = |one: CaCertificate| {
        let which = if one.name.is_empty() { String::new() } else { format!(" ({})", short(&one.name, 120)) };
        let mut case = case(seen, rule, format!("the {} certificate{which} ends at {}", one.what, one.not_after_us));
        (case.subject, case.due) = (None, Some(due(&one, rule.severity)));
        case.apart = Some(("reason", known(&one.what, &whats)));
        Signal::Raise(case)
    };
    [Signal::Clear(None, None)].into_iter().chain(whats.iter().filter_map(soonest).map(raise)).collect()
}

fn due(one: &CaCertificate, severity: Severity) -> Timestamp {
    one.not_after_us.minus(one.not_after_us.since(one.not_before_us) / share(severity))
}

/// The case of an agent whose last renewal failed with `error`.
pub fn not_renewed(agent: &AgentId, error: &str) -> Case {
    let what = format!("renewing the certificate fails: {}", short(error, 200));
    let mut case = about(agent, "the error says why; the certificate in use holds until its end", what);
    case.evidence = lines([("error", &error.to_owned())]);
    case
}

/// What was asked for is not verified, so it stays out of the labels.
fn quarantined(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let (who, gate, status, why) = match seen.body {
        Some(Body::QuarantineChanged(body)) => {
            (subject(&body.workload, &body.instance), &body.gate, body.status, &body.why)
        }
        Some(Body::QuarantineAlone(body)) => {
            let status = if body.on { GateStatus::Quarantined } else { GateStatus::Clear };
            (Subject::from(seen.agent), &body.gate, status, &body.why)
        }
        _ => return Vec::new(),
    };
    let (severity, what) = match status {
        GateStatus::Clear => return vec![Signal::Clear(Some(who), Some(word(gate)))],
        GateStatus::Quarantined => (Severity::Critical, "is quarantined by"),
        GateStatus::Capped => (Severity::Critical, "breaks, and is let be because of the limits of,"),
        GateStatus::DryRun => (Severity::Warning, "would be quarantined by"),
    };
    let mut case = case(seen, rule, format!("it {what} the gate {}: {why}", word(gate)));
    case.subject = Some(who);
    case.severity = Some(severity);
    case.apart = Some(("gate", word(gate)));
    case.evidence = lines([("gate", gate), ("broken", why)]);
    vec![Signal::Raise(case)]
}

fn policy_changed(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let (what, text, by, source, why) = match seen.body {
        Some(Body::PolicyApplied(body)) => {
            ("policy", format!("policy {} was applied", body.version), &body.by, &body.source, &body.why)
        }
        Some(Body::QuarantineReleased(body)) => {
            let text = format!("{}#{} is let in until {}", body.workload, body.instance, body.until_us);
            ("release", text, &body.by, &body.source, &body.why)
        }
        _ => return Vec::new(),
    };
    let mut case = case(seen, rule, format!("{text} by {by}: {why}"));
    case.subject = None;
    case.apart = Some(("change", what.to_owned()));
    case.source = host_of(source).to_owned();
    case.evidence = lines([("reason", why), ("by", by)]);
    vec![Signal::Raise(case)]
}

fn revoked(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let (what, body) = match seen.body {
        Some(Body::IdentityRevoked(IdentityRevoked(body))) => ("revoked", body),
        Some(Body::IdentityRestored(IdentityRestored(body))) => ("restored", body),
        _ => return Vec::new(),
    };
    let mut case = case(seen, rule, format!("{} was {what} by {}: {}", body.revocation.what, body.by, body.why));
    case.subject = None;
    case.apart = Some(("change", what.to_owned()));
    case.source = host_of(&body.source).to_owned();
    case.evidence = lines([("revocation", &body.revocation.id), ("reason", &body.why), ("by", &body.by)]);
    vec![Signal::Raise(case)]
}

fn enrolment(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::EnrolmentRefused(body)) = seen.body else { return Vec::new() };
    let asked = if body.workload.is_empty() { "a workload" } else { &body.workload };
    let mut case = case(seen, rule, format!("a certificate for {} was refused: {}", short(asked, 120), body.reason));
    case.subject = None;
    case.apart = Some(("reason", known(&first_word(&body.reason), ENROLMENT_REASONS)));
    case.count = body.count.max(1);
    case.source = host_of(&body.source).to_owned();
    case.evidence = lines([("asked for (not verified)", &body.workload), ("reason", &body.reason)]);
    vec![Signal::Raise(case)]
}

const ENROLMENT_REASONS: &[&str] = &[
    "token_unknown",
    "token_used_up",
    "token_expired",
    "token_other_workload",
    "bad_request",
    "revoked",
    "grace_over",
    "second_instance",
    "internal",
];

fn ingest(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::IngestRefused(body)) = seen.body else { return Vec::new() };
    let mut case = case(seen, rule, format!("a connection to the collector was refused: {}", body.reason));
    case.subject = None;
    case.apart = Some(("reason", word(&first_word(&body.reason))));
    case.count = body.count.max(1);
    case.source = host_of(&body.source).to_owned();
    vec![Signal::Raise(case)]
}

fn agent_clock(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    if let Some(Body::AgentConnected(body)) = seen.body {
        return connected_clock(rule, seen, body);
    }
    let ahead = seen.at.since(seen.received);
    if ahead < CLOCK_AHEAD {
        return Vec::new();
    }
    let mut case = case(seen, rule, format!("its clock is {} s ahead of the collector's", ahead.as_secs()));
    case.evidence = vec![format!("agent {}, collector {}", seen.at, seen.received)];
    vec![Signal::Raise(case)]
}

/// Events may lie in a spool for days, so only at the handshake can a clock that is behind be told.
fn connected_clock(rule: &Rule, seen: &Seen<'_>, body: &AgentConnected) -> Vec<Signal> {
    let off = Duration::from_micros(body.clock_ahead_us.unsigned_abs());
    if off < CLOCK_AHEAD {
        return Vec::new();
    }
    let way = if body.clock_ahead_us > 0 { "ahead of" } else { "behind" };
    let mut case = case(seen, rule, format!("its clock is {} s {way} the collector's", off.as_secs()));
    case.subject = Some(subject(&body.workload, &body.instance));
    vec![Signal::Raise(case)]
}

fn collector_clock(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(before) = seen.last_tick else { return Vec::new() };
    let (gap, way) = if seen.at < before { (before.since(seen.at), "back") } else { (seen.at.since(before), "ahead") };
    let jumped = gap > CLOCK_JUMP || (way == "back" && gap > Duration::from_secs(1));
    if !jumped {
        return Vec::new();
    }
    let mut case =
        case(seen, rule, format!("the collector's clock went {way} by {} s between two ticks", gap.as_secs()));
    case.subject = None;
    case.evidence = vec![format!("tick before {before}, tick now {}", seen.at)];
    vec![Signal::Raise(case)]
}

fn forged(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let mut case = case(seen, rule, format!("it sent a {} event, which only the collector may tell", word(seen.kind)));
    case.evidence = vec![short(seen.summary, 200)];
    vec![Signal::Raise(case)]
}

fn unknown(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    if seen.severity < Severity::Warning {
        return Vec::new();
    }
    let mut case = case(seen, rule, format!("{}: {}", seen.kind, short(seen.summary, 200)));
    case.severity = Some(seen.severity);
    case.apart = Some(("reason", word(seen.kind)));
    vec![Signal::Raise(case)]
}

fn case(seen: &Seen<'_>, rule: &Rule, what: String) -> Case {
    about(seen.agent, rule.what_to_do, what)
}

fn about(agent: &AgentId, what_to_do: &str, what: String) -> Case {
    Case {
        subject: Some(agent.into()),
        apart: None,
        severity: None,
        due: None,
        what,
        source: String::new(),
        evidence: Vec::new(),
        what_to_do: what_to_do.to_owned(),
        count: 1,
    }
}

fn subject(workload: &SpiffeId, instance: &str) -> Subject {
    Subject { workload: workload.to_string(), instance: instance.to_owned() }
}

fn lines<const N: usize>(pairs: [(&str, &String); N]) -> Vec<String> {
    pairs.iter().filter(|(_, text)| !text.is_empty()).map(|(name, text)| format!("{name}: {text}")).collect()
}

/// `text`, cut to `most` characters.
fn short(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

/// The host of `host:port`; ports of clients change with every connection.
fn host_of(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(host, _)| host)
}

fn first_word(text: &str) -> String {
    text.split([':', ' ']).next().unwrap_or_default().to_owned()
}

/// `text` if it is on the list, otherwise `other`: a label's value never comes from outside unchecked.
fn known(text: &str, list: &[&str]) -> String {
    if list.contains(&text) { text.to_owned() } else { "other".to_owned() }
}

/// A slug as agents send it, or `other` when it is none.
fn word(slug: &str) -> String {
    let plain = slug.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if plain && (1..=64).contains(&slug.len()) { slug.to_owned() } else { "other".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sidewarden_proto::event::*;
    use sidewarden_proto::finding::{CisIds, Evidence, Remedy, Vantage};

    fn agent() -> AgentId {
        "spiffe://x.test/shop/orders#orders-1".parse().unwrap()
    }

    fn read(at: i64, received: i64, last_tick: Option<i64>, body: &Body) -> Vec<(&'static str, Signal)> {
        let agent = agent();
        let seen = Seen {
            agent: &agent,
            at: Timestamp::from_secs(at),
            received: Timestamp::from_secs(received),
            kind: body.kind(),
            severity: Severity::Warning,
            summary: "a line",
            body: Some(body),
            last_tick: last_tick.map(Timestamp::from_secs),
            forged: false,
        };
        let rules = RULES.iter().filter(|rule| rule.reads(seen.kind, false));
        rules.flat_map(|rule| rule.read(&seen).into_iter().map(|signal| (rule.name, signal))).collect()
    }

    /// The alerts an event raises, as `name[reason]`.
    fn raised(body: impl Into<Body>) -> Vec<String> {
        let signals = read(100, 100, None, &body.into());
        let names = signals.into_iter().filter_map(|(name, signal)| match signal {
            Signal::Raise(case) => Some(match case.apart {
                Some((_, value)) => format!("{name}[{value}]"),
                None => name.to_owned(),
            }),
            _ => None,
        });
        names.collect()
    }

    fn refusal(reason: RefusalReason) -> ConnectionRefused {
        ConnectionRefused {
            direction: Direction::Inbound,
            reason,
            detail: "GET / HTTP/1.1".into(),
            hint: reason.hint().into(),
            listener: "0.0.0.0:8443".into(),
            source: "172.18.0.1:4711".into(),
            peer: String::new(),
            count: 3,
        }
    }

    fn a_finding(check: &str, severity: Severity, verdict: Verdict) -> Finding {
        Finding {
            check: check.into(),
            ids: CisIds { v1_3_1: "5.31".into(), v1_6: "5.32".into() },
            title: "the Docker socket is not mounted".into(),
            severity,
            verdict,
            evidence: vec![Evidence::new("/proc/1/mountinfo", "/run/docker.sock")],
            remedy: Remedy { compose: "remove the volume".into(), ..Remedy::default() },
            vantage: Vantage::Open,
        }
    }

    fn process() -> ProcessInfo {
        ProcessInfo { pid: 42, name: "sh".into(), command: "sh -c id".into(), ..ProcessInfo::default() }
    }

    #[test]
    fn every_refusal_goes_to_at_most_one_rule() {
        let rows = [
            (RefusalReason::Plaintext, Some("PlaintextRefused[plaintext]")),
            (RefusalReason::DirectToService, Some("DirectToService[direct_to_service]")),
            (RefusalReason::ProtocolVersion, Some("LegacyTls[protocol_version]")),
            (RefusalReason::NoCertificate, Some("BadPeerCertificate[no_certificate]")),
            (RefusalReason::UnknownCa, Some("ForeignCertificate[unknown_ca]")),
            (RefusalReason::Expired, Some("BadPeerCertificate[expired]")),
            (RefusalReason::BadCertificate, Some("BadPeerCertificate[bad_certificate]")),
            (RefusalReason::Revoked, Some("BadPeerCertificate[revoked]")),
            (RefusalReason::RevocationUnknown, Some("BadPeerCertificate[revocation_unknown]")),
            (RefusalReason::NotAllowed, Some("PeerNotAllowed[not_allowed]")),
            (RefusalReason::WrongPeer, Some("WrongPeer[wrong_peer]")),
            (RefusalReason::HandshakeFailed, None),
            (RefusalReason::HandshakeTimeout, Some("ConnectionsLimited[handshake_timeout]")),
            (RefusalReason::RefusedByPeer, None),
            (RefusalReason::Unreachable, None),
            (RefusalReason::WorkloadUnreachable, None),
            (RefusalReason::LimitReached, Some("ConnectionsLimited[limit_reached]")),
            (RefusalReason::NoIdentity, None),
            (RefusalReason::ProxyHeaderUntrusted, Some("ProxyHeaderSpoofed[proxy_header_untrusted]")),
            (RefusalReason::ProxyHeaderBroken, None),
            (RefusalReason::UnknownServerName, None),
            (RefusalReason::Loop, Some("RouteLoop[loop]")),
            (RefusalReason::EgressNotListed, Some("EgressRefused[egress_not_listed]")),
            (RefusalReason::EgressPrivateAddress, Some("EgressToPrivateAddress[egress_private_address]")),
            (RefusalReason::EgressLoop, Some("EgressRefused[egress_loop]")),
            (RefusalReason::BadRequest, Some("EgressRefused[bad_request]")),
            (RefusalReason::RequestTimeout, Some("ConnectionsLimited[request_timeout]")),
            (RefusalReason::NameUnresolved, None),
            (RefusalReason::UpstreamRefused, None),
            (RefusalReason::Quarantined, None),
        ];
        for (reason, expected) in rows {
            let expected: Vec<String> = expected.iter().map(|name| name.to_string()).collect();
            assert_eq!(raised(refusal(reason)), expected, "{reason}");
        }
    }

    #[test]
    fn events_raise_the_alert_that_names_them() {
        let entered = |as_root, privileged| ProcessEntered { process: process(), as_root, privileged };
        let started = |clean| AgentStarted {
            version: "1".into(),
            mode: Mode::Sidecar,
            vantage: Vantage::Open,
            clean,
            heartbeat_secs: 5,
        };
        let permissive = |on, listener: &str| ListenerPermissive {
            listener: listener.into(),
            on,
            reason: "moving".into(),
            until_us: Timestamp::from_secs(9),
        };
        let insecure = |on, place: &str| TrustInsecure {
            direction: Direction::Outbound,
            place: place.into(),
            on,
            reason: "old".into(),
            until_us: Timestamp::from_secs(9),
        };
        let rows: Vec<(Body, &[&str])> = vec![
            (entered(false, false).into(), &["ContainerEntered"]),
            (entered(true, false).into(), &["RootExec"]),
            (entered(true, true).into(), &["PrivilegedExec"]),
            (entered(false, true).into(), &["PrivilegedExec"]),
            (ProcessShell { process: process() }.into(), &["ShellInWorkload"]),
            (permissive(true, "0.0.0.0:8443").into(), &["PlaintextAllowed[0.0.0.0:8443]"]),
            (permissive(true, "<b>").into(), &["PlaintextAllowed[other]"]),
            (permissive(false, "0.0.0.0:8443").into(), &[]),
            (
                ConnectionPlaintext {
                    listener: "0.0.0.0:8443".into(),
                    source: "10.0.0.9:1".into(),
                    network: "10.0.0.0/24".into(),
                    detail: "began with `GET /`".into(),
                    count: 3,
                }
                .into(),
                &["PlaintextLetIn[0.0.0.0:8443]"],
            ),
            (exposed_at("0.0.0.0:80", "").into(), &["ListenerExposed[0.0.0.0:80/tcp]"]),
            (exposed_at("0.0.0.0:80", "old client").into(), &["PlaintextPortOpen[0.0.0.0:80/tcp]"]),
            (exposed_at("<b>", "").into(), &["ListenerExposed[other]"]),
            (InterceptionBroken { why: vec!["no rules".into()] }.into(), &["InterceptionBroken"]),
            (InterceptionHolds { bypass: Vec::new() }.into(), &[]),
            (insecure(true, "db:5432").into(), &["InsecureTrustAll[outbound db:5432]"]),
            (insecure(true, "<b>").into(), &["InsecureTrustAll[outbound other]"]),
            (insecure(false, "db:5432").into(), &[]),
            (TrustFilesRefused { error: "x.pem: it is empty".into() }.into(), &["TrustFilesRefused"]),
            (TrustChanged { domains: Default::default(), dns_roots: vec![] }.into(), &[]),
            (
                TrustCrls { strict: true, lists: 1, lacking: vec!["there is none of x".into()] }.into(),
                &["RevocationListsLacking"],
            ),
            (TrustCrls { strict: true, lists: 2, lacking: vec![] }.into(), &[]),
            (started(true).into(), &[]),
            (started(false).into(), &["AgentKilled"]),
            (
                EventsLost { first_seq: 5, last_seq: 9, by_severity: [5, 0, 0, 0], reason: "spool_full".into() }.into(),
                &["EventsLost[spool_full]"],
            ),
            (
                EventsLost { first_seq: 5, last_seq: 9, by_severity: [5, 0, 0, 0], reason: "<b>".into() }.into(),
                &["EventsLost[other]"],
            ),
            (SpoolDamaged { quarantined: "/x".into(), bytes: 9, detail: "crc".into() }.into(), &["SpoolDamaged"]),
            (
                EnrolmentRefused {
                    source: "10.0.0.9:1".into(),
                    workload: "spiffe://x.test/a/b".into(),
                    reason: "token_used_up: 1 of 1".into(),
                    count: 1,
                }
                .into(),
                &["EnrolmentRefused[token_used_up]"],
            ),
            (
                IngestRefused { source: "10.0.0.9:1".into(), reason: "garbage".into(), count: 1 }.into(),
                &["IngestRefused[garbage]"],
            ),
            (
                VerdictChanged {
                    before: "pass".into(),
                    finding: a_finding("docker-socket", Severity::Critical, Verdict::Fail),
                }
                .into(),
                &["CheckFailed[docker-socket]"],
            ),
            (
                VerdictChanged {
                    before: "pass".into(),
                    finding: a_finding("ulimits", Severity::Notice, Verdict::Fail),
                }
                .into(),
                &[],
            ),
        ];
        for (body, expected) in rows {
            assert_eq!(raised(body.clone()), expected, "{body:?}");
        }
    }

    fn exposed_at(address: &str, reason: &str) -> ListenerExposed {
        ListenerExposed {
            address: address.into(),
            detail: String::new(),
            protocol: Protocol::Tcp,
            owner: String::new(),
            reason: reason.into(),
        }
    }

    #[test]
    fn an_exposed_listener_stands_until_it_is_closed_or_a_baseline_does_not_name_it() {
        let subject = Subject::from(&agent());
        let place = || Some("0.0.0.0:80/tcp".to_owned());
        let closed = ListenerClosed { address: "0.0.0.0:80".into(), protocol: Protocol::Tcp, detail: String::new() };
        let signals = read(1, 1, None, &closed.into());
        let clear = Signal::Clear(Some(subject.clone()), place());
        assert_eq!(signals, [("ListenerExposed", clear.clone()), ("PlaintextPortOpen", clear.clone())]);
        let baseline =
            ListenersBaseline { exposed: vec!["0.0.0.0:80/tcp".into()], declared: vec!["[::]:53/udp".into()] };
        let signals = read(1, 1, None, &baseline.into());
        let only = |listener: &str| Signal::Only(subject.clone(), vec![listener.into()]);
        let expected = [("ListenerExposed", only("0.0.0.0:80/tcp")), ("PlaintextPortOpen", only("[::]:53/udp"))];
        assert_eq!(signals, expected);
        let signals = read(1, 1, None, &exposed_at("0.0.0.0:80", "now declared").into());
        assert_eq!(signals[0], ("ListenerExposed", clear));
    }

    #[test]
    fn a_failed_check_takes_the_severity_of_its_finding_and_carries_its_remedy() {
        let body = VerdictChanged {
            before: "pass".into(),
            finding: a_finding("docker-socket", Severity::Critical, Verdict::Fail),
        };
        let signals = read(1, 1, None, &body.into());
        let (_, Signal::Raise(case)) = &signals[0] else { panic!("{signals:?}") };
        assert_eq!(case.severity, Some(Severity::Critical));
        assert_eq!(case.what_to_do, "compose: remove the volume");
        assert!(case.what.contains("CIS 5.31") && case.what.contains("/run/docker.sock"), "{}", case.what);
    }

    #[test]
    fn plaintext_that_is_let_in_no_longer_ends_its_alert_and_so_does_a_start() {
        let until_us = Timestamp::from_secs(9);
        let off = ListenerPermissive { listener: "0.0.0.0:8443".into(), on: false, reason: String::new(), until_us };
        let clear = |apart: Option<&str>| {
            ("PlaintextAllowed", Signal::Clear(Some((&agent()).into()), apart.map(str::to_owned)))
        };
        assert_eq!(read(1, 1, None, &off.into()), vec![clear(Some("0.0.0.0:8443"))]);
        let (version, mode, vantage) = ("1".into(), Mode::Sidecar, Vantage::Open);
        let started = AgentStarted { version, mode, vantage, clean: true, heartbeat_secs: 5 };
        assert!(read(1, 1, None, &started.into()).contains(&clear(None)));
    }

    #[test]
    fn a_verdict_of_unknown_neither_begins_nor_ends_an_alert() {
        let unknown = Verdict::Unknown { grant: "CAP_SYS_PTRACE".into() };
        let rows = [(Verdict::Pass, true), (unknown, false), (Verdict::NotApplicable { why: "x".into() }, true)];
        for (verdict, ends) in rows {
            let finding = a_finding("docker-socket", Severity::Critical, verdict.clone());
            let signals = read(1, 1, None, &VerdictChanged { before: "fail".into(), finding }.into());
            let cleared = signals.iter().any(|(_, s)| matches!(s, Signal::Clear(..)));
            assert_eq!(cleared, ends, "{verdict}");
            assert!(!signals.iter().any(|(_, s)| matches!(s, Signal::Raise(..))), "{verdict}");
        }
    }

    #[test]
    fn a_clean_goodbye_ends_everything_and_a_lost_connection_raises_silence() {
        let gone = |clean| AgentDisconnected {
            workload: agent().workload,
            instance: "orders-1".into(),
            reason: "timed out".into(),
            clean,
        };
        assert_eq!(read(1, 1, None, &gone(true).into()), vec![(SILENT, Signal::Gone((&agent()).into()))]);
        assert_eq!(raised(gone(false)), ["AgentSilent"]);
    }

    #[test]
    fn clocks_that_jump_are_told() {
        let tick = Body::from(ClockTick {});
        let rows = [
            (None, 100, false),
            (Some(90), 100, false),
            (Some(100), 200, true),
            (Some(100), 50, true),
            (Some(100), 100, false),
        ];
        for (before, at, expected) in rows {
            assert_eq!(!read(at, at, before, &tick).is_empty(), expected, "{before:?} -> {at}");
        }
        let baseline = Body::from(PostureBaseline::default());
        let ahead = |at| read(at, 1000, None, &baseline).iter().any(|(name, _)| *name == "AgentClock");
        assert!(ahead(1000 + 3600) && !ahead(1000 + 60) && !ahead(10));
    }

    #[test]
    fn an_expiring_certificate_is_due_at_the_last_third_and_tenth() {
        let body = CertificateIssued {
            workload: agent().workload,
            instance: "orders-1".into(),
            serial: "01".into(),
            spki: String::new(),
            not_after_us: Timestamp::from_secs(500),
            by: "token".into(),
        };
        let body = CertificateIssued { not_after_us: Timestamp::from_secs(400), ..body };
        assert_eq!(
            dues(&read(100, 100, None, &body.into())),
            [("CertificateExpiring", 300), ("CertificateEnding", 370)]
        );
    }

    fn dues(signals: &[(&'static str, Signal)]) -> Vec<(&'static str, i64)> {
        let due = |(name, signal): &(&'static str, Signal)| match signal {
            Signal::Raise(Case { due: Some(due), .. }) => Some((*name, due.as_secs())),
            _ => None,
        };
        signals.iter().filter_map(due).collect()
    }

    #[test]
    fn of_each_kind_of_ca_certificate_the_first_to_end_is_told() {
        let one = |what: &str, name: &str, until| CaCertificate {
            what: what.into(),
            name: name.into(),
            not_before_us: Timestamp::from_secs(0),
            not_after_us: Timestamp::from_secs(until),
        };
        let certificates =
            vec![one("root", "1", 3000), one("root", "2", 6000), one("collector", "", 300), one("odd", "", 9)];
        let signals = read(0, 0, None, &CaCertificates { certificates }.into());
        let expected = [("CaExpiring", 2000), ("CaExpiring", 200), ("CaEnding", 2700), ("CaEnding", 270)];
        assert_eq!(dues(&signals), expected);
        let cleared = signals.iter().filter(|(_, signal)| *signal == Signal::Clear(None, None)).count();
        assert_eq!(cleared, 2, "what was replaced alerts no more");
    }

    #[test]
    fn a_clock_that_is_off_at_the_handshake_is_told_either_way() {
        for (ahead_secs, told) in
            [(0, None), (60, None), (-60, None), (90_000, Some("ahead of")), (-90_000, Some("behind"))]
        {
            let body = AgentConnected {
                workload: agent().workload,
                instance: "orders-1".into(),
                source: "10.0.0.1:1".into(),
                transport: "quic".into(),
                version: String::new(),
                clock_ahead_us: ahead_secs * 1_000_000,
            };
            let signals = read(100, 100, None, &body.into());
            let what = signals.iter().find_map(|(name, signal)| match signal {
                Signal::Raise(case) if *name == "AgentClock" => Some(case.what.clone()),
                _ => None,
            });
            assert_eq!(what.is_some(), told.is_some(), "{ahead_secs}");
            assert!(what.zip(told).is_none_or(|(what, word)| what.contains(word)), "{ahead_secs}");
        }
    }

    #[test]
    fn a_kind_from_the_future_alerts_only_when_it_is_serious() {
        let agent = agent();
        for (severity, expected) in [(Severity::Notice, 0), (Severity::Critical, 1)] {
            let seen = Seen {
                agent: &agent,
                at: Timestamp(0),
                received: Timestamp(0),
                kind: "weather.changed",
                severity,
                summary: "hail",
                body: None,
                last_tick: None,
                forged: false,
            };
            let raised = RULES.iter().filter(|r| r.reads(seen.kind, false)).flat_map(|r| r.read(&seen)).count();
            assert_eq!(raised, expected, "{severity}");
        }
    }

    #[test]
    fn no_label_comes_from_outside_unchecked() {
        assert_eq!(word("docker-socket"), "docker-socket");
        assert_eq!(word("<script>"), "other");
        assert_eq!(word(&"x".repeat(65)), "other");
        assert_eq!(word(""), "other");
        assert_eq!(host_of("[fe80::1]:80"), "[fe80::1]");
        assert_eq!(short("äöü", 2), "äö…");
    }

    #[test]
    fn every_rule_is_named_once_and_explained() {
        for (i, rule) in RULES.iter().enumerate() {
            assert!(!RULES[..i].iter().any(|other| other.name == rule.name), "{} twice", rule.name);
            assert!(rule.meaning.len() > 20 && rule.what_to_do.len() > 20, "{}", rule.name);
            assert!(rule.kinds.iter().all(|kind| KINDS.contains(kind)), "{} reads an unknown kind", rule.name);
        }
    }
}
