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

use crate::state;

mod agents;
mod collector;
mod identities;
mod posture;
mod processes;
mod traffic;

pub use agents::not_back;
use agents::{agent_clock, damaged, killed, lost, silence, unknown};
use collector::{collector_clock, forged, given_identity, ingest, leader};
use identities::{
    ca_dates, enrolment, issued, policy_changed, quarantined, quarantined_alone, renewal, revocation_lists, revoked,
    rotated, trust_files,
};
pub use identities::{expiring, gated, not_renewed, share};
pub use posture::broken;
use posture::{checks, container_checks, container_subject, engine, waivers};
use processes::{container_exec, entered, shell};
use traffic::{exposed, insecure, interception, permissive, plaintext, refused};

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
    /// When another event says so; the state knows whether it holds.
    InState,
    /// When another event says so; whether it holds is known from events alone.
    UntilCleared,
    /// By itself, some minutes after its last occurrence.
    Moment,
}

impl Lasts {
    /// All of them.
    pub const ALL: [Lasts; 3] = [Lasts::InState, Lasts::UntilCleared, Lasts::Moment];
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

    /// Whether it goes by the collector's own word alone.
    pub fn is_of_the_collector(&self) -> bool {
        !self.kinds.is_empty() && self.kinds.iter().all(|kind| state::is_of_the_collector(kind)) && self.name != FORGED
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

/// Labels that tell cases of a rule and subject apart.
pub const APART: [&str; 6] = ["check", "reason", "change", "gate", "listener", "place"];

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
        what_to_do: "if it is a health check, add how its command line begins to the agent's `watch.healthchecks`; if not, ask who did it",
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
        lasts: Lasts::InState,
        wait: NO_WAIT,
        kinds: &["posture.baseline", "verdict.changed"],
        meaning: "a CIS Docker rule of severity warning or above is broken; it fires until the verdict changes",
        what_to_do: "apply the remedy that stands with the check, or record a waiver with a reason and an end",
        read: checks,
    },
    Rule {
        name: "ContainerCheckFailed",
        severity: Severity::Warning,
        lasts: Lasts::InState,
        wait: NO_WAIT,
        kinds: &["container.posture", "container.verdict_changed", "container.gone"],
        meaning: "a container of a host breaks a CIS Docker rule of severity warning or above, as the node agent there sees it",
        what_to_do: "apply the remedy that stands with the check, or record a waiver with a reason and an end",
        read: container_checks,
    },
    Rule {
        name: "WaiverEnding",
        severity: Severity::Warning,
        lasts: Lasts::InState,
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
        lasts: Lasts::InState,
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
        what_to_do: "raise the agent's `limits.spool`, or mend what kept it from the collector",
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
        kinds: &state::OF_THE_COLLECTOR,
        meaning: "an agent sent an event that only the collector itself may tell; it was kept, and not believed",
        what_to_do: "no agent of ours does this: treat that agent, and its key, as taken over; `sidewarden-collector revoke --instance WORKLOAD#INSTANCE` shuts it out",
        read: forged,
    },
    Rule {
        name: "CertificateExpiring",
        severity: Severity::Warning,
        lasts: Lasts::InState,
        wait: NO_WAIT,
        kinds: &["certificate.issued", "agent.connected"],
        meaning: "less than a third of a certificate's life is left and it was not renewed",
        what_to_do: "read why renewing fails in the agent's log, or ask whoever issues it, if that is somebody else's CA; restarting the agent never makes a valid certificate worse",
        read: issued,
    },
    Rule {
        name: "CertificateEnding",
        severity: Severity::Critical,
        lasts: Lasts::InState,
        wait: NO_WAIT,
        kinds: &["certificate.issued", "agent.connected"],
        meaning: "less than a tenth of a certificate's life is left and it was not renewed: the workload is about to fall silent",
        what_to_do: "read why renewing fails in the agent's log, or at the CA that is named; one of this collector's CA can still be renewed within the grace after its end",
        read: issued,
    },
    Rule {
        name: "CaExpiring",
        severity: Severity::Warning,
        lasts: Lasts::UntilCleared,
        wait: RENEWAL,
        kinds: &["ca.certificates"],
        meaning: "less than a third of the life of the root, the issuing CA or the collector's own certificate is left, or less than a quarter of one that somebody else keeps for it (identity, page)",
        what_to_do: "the root: begin to replace it with `sidewarden-collector ca prepare`, `ca status` says what is next; issuing CA and collector renew by themselves, and its log says why they do not; the identity, its roots and the page: whoever issues them has given no newer one",
        read: ca_dates,
    },
    Rule {
        name: "CaEnding",
        severity: Severity::Critical,
        lasts: Lasts::UntilCleared,
        wait: RENEWAL,
        kinds: &["ca.certificates"],
        meaning: "less than a tenth of the life of the root, the issuing CA, the collector's own certificate or one that somebody else keeps for it is left",
        what_to_do: "the root: replace it now, every agent falls silent with it: `sidewarden-collector ca prepare`, then `ca status` says what is next; issuing CA and collector: its log says why they are not renewed; the identity: get a newer one to where `[identity]` points, or agents of that CA fall silent; the page: to where `api.cert` points",
        read: ca_dates,
    },
    Rule {
        name: "RenewalFailing",
        severity: Severity::Warning,
        lasts: Lasts::InState,
        wait: RENEWAL,
        kinds: &["identity.renewal_failed", "identity.renewed", "certificate.issued"],
        meaning: "an agent cannot renew its certificate; the old one is still in use",
        what_to_do: "the error says why; the certificate in use holds until the time given",
        read: renewal,
    },
    Rule {
        name: "WorkloadQuarantined",
        severity: Severity::Critical,
        lasts: Lasts::InState,
        wait: NO_WAIT,
        kinds: &["quarantine.changed"],
        meaning: "an instance breaks a gate of the policy: it is off the data plane, or would be if the gate or its limits allowed that",
        what_to_do: "mend what the gate names, and it comes back by itself; or `sidewarden-collector quarantine release` lets it in for a while",
        read: quarantined,
    },
    Rule {
        name: "QuarantinedAlone",
        severity: Severity::Critical,
        lasts: Lasts::UntilCleared,
        wait: NO_WAIT,
        kinds: &["quarantine.alone", "agent.started"],
        meaning: "an agent took its workload off the data plane without a collector's word: it was out of reach of the collector that decides, or cannot read the policy",
        what_to_do: "mend what the gate names and the way to the collector; where the gate is `policy`, update the agent or apply a policy that it can read",
        read: quarantined_alone,
    },
    Rule {
        name: "PolicyChanged",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["policy.applied", "quarantine.released"],
        meaning: "somebody with the admin token changed the policy of all agents, or had a quarantined instance let in",
        what_to_do: "if nobody of yours did this, remove <data_dir>/admin.token and restart the collector, which makes a new one; then apply the policy that should hold",
        read: policy_changed,
    },
    Rule {
        name: "IdentityRevoked",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["identity.revoked", "identity.restored"],
        meaning: "somebody with the admin token revoked an identity, or undid that",
        what_to_do: "if nobody of yours did this, remove <data_dir>/admin.token and restart the collector, which makes a new one; `revoke --undo` takes it back",
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
        name: "CollectorIdentityRefused",
        severity: Severity::Warning,
        lasts: Lasts::UntilCleared,
        wait: Duration::from_secs(30),
        kinds: &["collector.started", "collector.identity_taken", "collector.identity_refused"],
        meaning: "the collector cannot use the identity, or the page's certificate, that somebody else keeps for it; the last good one stays in use until it ends",
        what_to_do: "the error names the file or what the Workload API said: mend that; it is looked at again every second, and nothing has to be restarted",
        read: given_identity,
    },
    Rule {
        name: "LeaderLost",
        severity: Severity::Warning,
        lasts: Lasts::UntilCleared,
        wait: Duration::from_secs(60),
        kinds: &["collector.started", "leader.changed"],
        meaning: "a collector cannot reach the one that makes the directives: what is revoked there is not heard of here",
        what_to_do: "bring the collector that ca.leader names back, or the way to it; until then revoke nothing and rotate nothing",
        read: leader,
    },
    Rule {
        name: "EnrolmentRefused",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["enrolment.refused"],
        meaning: "somebody asked for a certificate and was refused",
        what_to_do: "the reason says what to do; where it names the token or the grace, make a new token with `sidewarden-collector token create`; if it is not your agent, find the address",
        read: enrolment,
    },
    Rule {
        name: "IngestRefused",
        severity: Severity::Warning,
        lasts: Lasts::Moment,
        wait: NO_WAIT,
        kinds: &["ingest.refused"],
        meaning: "a connection to the collector's event port was refused; critical where somebody shows another's key or changed what was told",
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
mod tests;
