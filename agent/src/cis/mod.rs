//! The CIS checks of a running container, its image and its host's swarm: sections 4, 5 and 7 of the Docker Benchmark.
//!
//! A check is a value: what the rule is, how to mend it, and a pure judgement over facts. One more check is one more file
//! and one line in [`CHECKS`]. What cannot be seen is `unknown` with the grant that would show it; it never passes.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use sidewarden_proto::event::{Protocol, Severity};
use sidewarden_proto::finding::{CisIds, Evidence, Finding, Remedy, Vantage, Verdict};
use sidewarden_proto::time::Timestamp;

use crate::facts::engine::{Host, HostConfig, Image, Inspect, Swarm};
use crate::facts::{Container, Engine, Facts, Hidden, Seen, Told};

mod attested;
mod explain;
mod host_path;
mod releases;
mod secrets;
mod sight;

mod add_instruction;
mod apparmor;
mod bridge;
mod capabilities;
mod cgroup_parent;
mod content_trust;
mod cpu_share;
mod devices;
mod docker_socket;
mod exec_privileged;
mod exec_root;
mod health;
mod host_ipc;
mod host_mounts;
mod host_network;
mod host_pid;
mod host_users;
mod host_uts;
mod image_health;
mod image_latest;
mod image_scan;
mod image_secrets;
mod memory_limit;
mod new_privileges;
mod open_ports;
mod overlay_encryption;
mod packages;
mod pids_limit;
mod port_address;
mod privileged;
mod privileged_ports;
mod propagation;
mod read_only_root;
mod restart;
mod seccomp;
mod selinux;
mod setuid_files;
mod signed_artifacts;
mod sshd;
mod swarm_address;
mod swarm_autolock;
mod swarm_ca;
mod swarm_key;
mod swarm_managers;
mod swarm_node_certs;
mod swarm_off;
mod swarm_planes;
mod swarm_secrets;
mod trusted_base;
mod ulimits;
mod update_alone;
mod user;
mod verified_packages;

pub use explain::explain;
pub use open_ports::{Standing, standing};
pub use sight::sight;

/// All checks, in the order of the benchmark.
pub const CHECKS: &[Check] = &[
    user::CHECK,
    trusted_base::CHECK,
    packages::CHECK,
    image_scan::CHECK,
    content_trust::CHECK,
    image_health::CHECK,
    update_alone::CHECK,
    setuid_files::CHECK,
    add_instruction::CHECK,
    image_secrets::CHECK,
    verified_packages::CHECK,
    signed_artifacts::CHECK,
    apparmor::CHECK,
    selinux::CHECK,
    capabilities::CHECK,
    privileged::CHECK,
    host_mounts::CHECK,
    sshd::CHECK,
    privileged_ports::CHECK,
    open_ports::CHECK,
    host_network::CHECK,
    memory_limit::CHECK,
    cpu_share::CHECK,
    read_only_root::CHECK,
    port_address::CHECK,
    restart::CHECK,
    host_pid::CHECK,
    host_ipc::CHECK,
    devices::CHECK,
    ulimits::CHECK,
    propagation::CHECK,
    host_uts::CHECK,
    seccomp::CHECK,
    exec_privileged::CHECK,
    exec_root::CHECK,
    cgroup_parent::CHECK,
    new_privileges::CHECK,
    health::CHECK,
    image_latest::CHECK,
    pids_limit::CHECK,
    bridge::CHECK,
    host_users::CHECK,
    docker_socket::CHECK,
    swarm_off::CHECK,
    swarm_managers::CHECK,
    swarm_address::CHECK,
    overlay_encryption::CHECK,
    swarm_secrets::CHECK,
    swarm_autolock::CHECK,
    swarm_key::CHECK,
    swarm_node_certs::CHECK,
    swarm_ca::CHECK,
    swarm_planes::CHECK,
];

/// One rule of the benchmark.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// Its name in policy, waivers and gates.
    pub slug: &'static str,
    /// Its number in 1.2 and 1.3.1.
    pub v1_3_1: &'static str,
    /// Its number in 1.6.
    pub v1_6: &'static str,
    /// What it asks for.
    pub title: &'static str,
    /// How bad a failure is.
    pub severity: Severity,
    /// Options of `docker run` that mend it.
    pub docker_run: &'static str,
    /// Lines of a Compose service that mend it.
    pub compose: &'static str,
    /// Lines of a Kubernetes pod that mend it.
    pub kubernetes: &'static str,
    judge: fn(&Case<'_>) -> Answer,
}

/// What a check judges by.
#[derive(Clone, Copy, Debug)]
pub struct Case<'a> {
    /// What was read now.
    pub facts: &'a Facts,
    /// What the operator has declared to be intended.
    pub declared: &'a Declared,
    /// What was seen since the watch began.
    pub history: &'a History,
    /// The time, for what runs out.
    pub now: Timestamp,
}

/// What the operator has declared to be intended: beyond it, a rule is broken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Declared {
    /// Capabilities beyond Docker's own set without NET_RAW, by name.
    pub capabilities: Vec<String>,
    /// TCP ports that the workload may be reached on, with TLS.
    pub ports: Vec<u16>,
    /// Ports that it may be reached on without.
    pub plaintext: Vec<Plaintext>,
    /// Who may come in as root.
    pub root_execs: Vec<RootExec>,
    /// Limits that may differ from the daemon's, as named in `/proc/<pid>/limits`, for example `Max open files`.
    pub ulimits: Vec<String>,
    /// Mount points, and what is below them, that may show the host.
    pub mounts: Vec<String>,
    /// Device nodes that the workload needs, for example `/dev/fuse`.
    pub devices: Vec<String>,
    /// The parent that its cgroup has by intent.
    pub cgroup_parent: Option<String>,
    /// The host is meant to be part of a swarm.
    pub swarm: bool,
    /// What images may be.
    pub images: Images,
    /// What nobody can see and somebody answers for.
    pub attestations: Vec<Promise>,
    /// What is broken and somebody answers for.
    pub waivers: Vec<Promise>,
    /// Listeners and routes with `insecure_trust_all`, in words. Declared elsewhere, and no excuse.
    pub trusting_all: Vec<String>,
}

/// What images may be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Images {
    /// Where they may come from: beginnings of names that end with a slash, whole names, digests.
    pub trusted: Vec<String>,
    /// How old they may be.
    pub max_age: Option<Duration>,
    /// Packages that none should have.
    pub unwanted_packages: Vec<String>,
    /// Setuid and setgid files that they may have.
    pub setuid: Vec<String>,
}

/// Somebody's word about one check: that a rule is kept which nobody can see, or may be broken for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promise {
    /// The slug of the check.
    pub check: String,
    /// The container it is about, by name, where a node agent judges many; may end with `*`.
    pub container: Option<String>,
    /// Who answers for it.
    pub by: String,
    /// Why.
    pub why: String,
    /// When it ends.
    pub until: Timestamp,
}

impl Promise {
    fn is_about(&self, check: &str, container: &str) -> bool {
        self.check == check && fits(self.container.as_deref(), container)
    }
}

/// Whether a container has the wanted name, which may end with `*`; all have where none is wanted.
fn fits(wanted: Option<&str>, container: &str) -> bool {
    wanted.is_none_or(|wanted| match wanted.strip_suffix('*') {
        Some(start) => container.starts_with(start),
        None => container == wanted,
    })
}

/// A program that may be run in the container as root while the workload is somebody else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootExec {
    /// Its whole command line.
    pub command: String,
    /// The container it is about, by name, where a node agent judges many; may end with `*`.
    pub container: Option<String>,
    /// Why that has to be.
    pub reason: String,
}

impl RootExec {
    /// Why `command` may be run as root in `container`; `None` where nobody declared it.
    pub fn reason<'a>(declared: &'a [RootExec], container: &str, command: &str) -> Option<&'a str> {
        let is = |one: &&RootExec| one.command == command && fits(one.container.as_deref(), container);
        declared.iter().find(is).map(|one| one.reason.as_str())
    }

    fn fault(&self) -> Option<String> {
        let program = self.command.rsplit('/').next().unwrap_or_default();
        match () {
            () if self.reason.trim().is_empty() => {
                Some(format!("root_exec: `{}` needs a `reason`: why must it be root?", self.command))
            }
            () if self.command.trim() != self.command || self.command.is_empty() => {
                Some("root_exec: `command` is the whole command line, without spaces around it".into())
            }
            () if crate::watch::SHELLS.contains(&program) => {
                Some(format!("root_exec: `{}` may do anything: name the whole command line", self.command))
            }
            () => None,
        }
    }
}

/// A port that is meant to be reached without TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plaintext {
    /// The port.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Why that has to be.
    pub reason: String,
}

impl Declared {
    /// What is wrong with it, for the operator.
    pub fn faults(&self) -> Vec<String> {
        let bad = |name: &&String| crate::facts::parse::capability_bit(name).is_none();
        let known = |name: &String| format!("capabilities: `{name}` is no capability of Linux");
        let mut faults: Vec<String> = self.capabilities.iter().filter(bad).map(known).collect();
        for (i, Plaintext { port, protocol, reason }) in self.plaintext.iter().enumerate() {
            if *port == 0 {
                faults.push("plaintext: 0 is no port".into());
            }
            if reason.trim().is_empty() {
                faults.push(format!("plaintext: port {port} needs a `reason`: why must it be reached without TLS?"));
            }
            if self.plaintext[..i].iter().any(|other| (other.port, other.protocol) == (*port, *protocol)) {
                faults.push(format!("plaintext: {port}/{} stands there twice", protocol.word()));
            }
        }
        faults.extend(self.root_execs.iter().filter_map(RootExec::fault));
        for (list, promise) in self.promises() {
            if !CHECKS.iter().any(|check| check.slug == promise.check) {
                faults.push(format!("{list}: there is no check `{}`: see `sidewarden-agent checks`", promise.check));
            }
            if promise.by.trim().is_empty() || promise.why.trim().is_empty() {
                faults.push(format!("{list}: that of `{}` needs `by` and `why`: who answers for it?", promise.check));
            }
        }
        faults
    }

    fn promises(&self) -> impl Iterator<Item = (&'static str, &Promise)> {
        let waivers = self.waivers.iter().map(|p| ("waiver", p));
        waivers.chain(self.attestations.iter().map(|p| ("attestation", p)))
    }
}

/// What was seen since the watch began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Every process since the start was seen.
    pub unbroken: bool,
    /// A process that came in with more capabilities than the workload has.
    pub entered_privileged: Option<String>,
    /// A process that came in as root while the workload is not.
    pub entered_root: Option<String>,
    /// One that did so by intent.
    pub declared_root: Option<String>,
}

/// What a check says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// The answer.
    pub verdict: Verdict,
    /// Why.
    pub evidence: Vec<Evidence>,
    /// Worse, or less bad, than the check's severity.
    pub severity: Option<Severity>,
    /// Whether the answer needed more than every process may read.
    pub deep: bool,
}

/// A judgement, or what could not be seen.
type Answer = Result<Judgement, Unseen>;

/// Something that a check needs and cannot see.
#[derive(Clone, Debug)]
struct Unseen {
    grant: String,
    evidence: Vec<Evidence>,
}

/// A container with a thousand processes breaks a rule a thousand times; the first ones tell enough.
const MAX_EVIDENCE: usize = 8;

const PTRACE: &str = "give the agent CAP_SYS_PTRACE: run it as uid 0 with all capabilities dropped but SYS_PTRACE \
     (docker run --user 0 --cap-drop ALL --cap-add SYS_PTRACE)";
const UNBROKEN: &str = "a watch that missed no process since the agent's start: start the agent before the workload, let it share \
     the container's own PID namespace instead of the host's, and give it CAP_SYS_PTRACE, which shows short-lived processes too";
const DOCKER_API: &str = "a node agent on this host (`sidewarden-agent node`), which asks the Docker API";

impl Judgement {
    fn new(verdict: Verdict, evidence: Vec<Evidence>) -> Judgement {
        Judgement { verdict, evidence, severity: None, deep: false }
    }

    fn pass(evidence: Vec<Evidence>) -> Judgement {
        Judgement::new(Verdict::Pass, evidence)
    }

    fn fail(evidence: Vec<Evidence>) -> Judgement {
        Judgement::new(Verdict::Fail, evidence)
    }

    /// `Fail` with the violations if there are any, else `Pass` with the proof.
    fn none_of(violations: Vec<Evidence>, proof: Vec<Evidence>) -> Judgement {
        if violations.is_empty() { Judgement::pass(proof) } else { Judgement::fail(violations) }
    }

    fn not_applicable(why: &str, evidence: Vec<Evidence>) -> Judgement {
        Judgement::new(Verdict::NotApplicable { why: why.into() }, evidence)
    }

    /// The answer was read where not every process may read.
    fn deep(self) -> Judgement {
        Judgement { deep: true, ..self }
    }

    fn severity(self, severity: Severity) -> Judgement {
        Judgement { severity: Some(severity), ..self }
    }
}

impl Unseen {
    fn new(grant: &str) -> Unseen {
        Unseen { grant: grant.into(), evidence: Vec::new() }
    }

    /// The engine was asked, and did not tell.
    fn untold(source: &str, why: &str) -> Unseen {
        Unseen::new(&format!("an answer of the engine that can be read: {why}")).with(vec![Evidence::new(source, why)])
    }

    fn with(self, evidence: Vec<Evidence>) -> Unseen {
        Unseen { evidence, ..self }
    }

    fn because(hidden: &Hidden, grant: &str) -> Unseen {
        Unseen::new(grant).with(vec![Evidence::new(&hidden.source, hidden.why.to_string())])
    }
}

impl<T> Seen<T> {
    /// The value and where it was read, or that it cannot be seen without `grant`.
    fn needs(&self, grant: &str) -> Result<(&T, &str), Unseen> {
        match self {
            Seen::Known(value, source) => Ok((value, source)),
            Seen::Hidden(hidden) => Err(Unseen::because(hidden, grant)),
        }
    }
}

impl<'a> Case<'a> {
    fn engine(&self) -> Option<&'a Engine> {
        self.facts.engine.known()
    }

    /// What would show who has entered since the start.
    fn unbroken_watch(&self) -> &'static str {
        match self.engine() {
            Some(_) => {
                "a node agent that has watched without a gap since the container's start (`sidewarden-agent node`)"
            }
            None => UNBROKEN,
        }
    }

    /// What the engine says of the container and its host, for checks that nothing else can answer.
    fn told(&self) -> Result<(&'a Told, &'a Host), Unseen> {
        let engine = self.engine().ok_or_else(|| Unseen::new(DOCKER_API))?;
        let told = engine.container.as_ref().ok_or_else(|| Unseen::new(DOCKER_API))?;
        Ok((told, &engine.host))
    }

    /// What the engine says of the container's image.
    fn image(&self) -> Result<&'a Image, Unseen> {
        let (told, _) = self.told()?;
        match &told.image {
            Seen::Known(image, _) => Ok(image),
            Seen::Hidden(hidden) => Err(Unseen::untold(&hidden.source, &hidden.why.to_string())),
        }
    }

    /// What the engine says of its host, for checks of section 7.
    fn host(&self) -> Result<&'a Host, Unseen> {
        self.engine().map(|engine| &*engine.host).ok_or_else(|| Unseen::new(DOCKER_API))
    }
}

/// What the engine says and what the container's processes show, where both are to be had. A failure in either is one; the
/// engine has the first word otherwise.
fn both(
    case: &Case<'_>,
    told: impl Fn(&Told, &Host, &Case<'_>) -> Answer,
    seen: impl Fn(&Case<'_>) -> Answer,
) -> Answer {
    let Ok((container, host)) = case.told() else { return seen(case) };
    match (told(container, host, case), seen(case)) {
        (Ok(mut one), Ok(other)) if one.verdict == other.verdict => {
            one.evidence.extend(other.evidence);
            one.severity = one.severity.max(other.severity);
            Ok(one)
        }
        (Ok(_), Ok(seen)) if seen.verdict == Verdict::Fail => Ok(seen),
        (Ok(told), _) => Ok(told),
        (Err(_), Ok(seen)) => Ok(seen),
        (Err(unseen), Err(_)) => Err(unseen),
    }
}

/// Whether the namespace that `owner` has by `mode` is the host's, where `own` may have joined `owner`.
fn resolved(own: &Inspect, owner: &Seen<Arc<Inspect>>, field: &str, mode: fn(&HostConfig) -> &str) -> Answer {
    let asked = mode(&own.host_config);
    let (owner, _) = match owner {
        Seen::Known(owner, source) => (owner, source),
        Seen::Hidden(hidden) => return Err(Unseen::untold(&hidden.source, &hidden.why.to_string())),
    };
    let has = mode(&owner.host_config);
    let line = match own.id == owner.id {
        true => format!("`{asked}`"),
        false => format!("`{asked}`: that of {}, which has `{has}`", owner.short_name()),
    };
    let evidence = vec![api(field, line)];
    Ok(if has == "host" { Judgement::fail(evidence) } else { Judgement::pass(evidence) })
}

/// The container in whose network this one is: its own, unless it joined another's.
fn network_owner(told: &Told) -> Result<&Arc<Inspect>, Unseen> {
    match &told.network {
        Seen::Known(owner, _) => Ok(owner),
        Seen::Hidden(hidden) => Err(Unseen::untold(&hidden.source, &hidden.why.to_string())),
    }
}

/// The image's history, oldest entry first, with its number.
fn history<'a>(case: &Case<'a>) -> Result<Vec<(usize, &'a str)>, Unseen> {
    let image = case.image()?;
    let lines: Vec<_> = (1..).zip(image.history.iter().rev().map(|layer| layer.created_by.as_str())).collect();
    match lines.iter().any(|(_, line)| !line.trim().is_empty()) {
        true => Ok(lines),
        false => Err(Unseen::new("a history of the image: this one was imported or squashed, and has none")),
    }
}

const UNTOLD_CLUSTER: &str = "an answer of the engine about its swarm that can be read";

fn no_swarm(host: &Host) -> Judgement {
    let evidence = vec![api("Swarm.LocalNodeState", &host.info.swarm.local_node_state)];
    Judgement::not_applicable("swarm mode not enabled", evidence)
}

/// The swarm as its manager knows it; the answer where there is no swarm.
fn manager<'a>(case: &Case<'a>) -> Result<Result<(&'a Swarm, &'a Host), Judgement>, Unseen> {
    let host = case.host()?;
    let swarm = &host.info.swarm;
    match swarm.local_node_state.as_str() {
        "inactive" => Ok(Err(no_swarm(host))),
        "active" if swarm.control_available => Ok(Ok((swarm, host))),
        state => {
            let evidence = vec![api("Swarm", format!("{state}, and no manager that answers"))];
            Err(Unseen::new("a node agent on a manager of the swarm").with(evidence))
        }
    }
}

/// Security options as one line; a profile of thousands of lines is only named.
fn short_list(options: &[String]) -> String {
    let short =
        |o: &String| if o.len() > 80 { format!("{}…", o.chars().take(40).collect::<String>()) } else { o.clone() };
    options.iter().map(short).collect::<Vec<_>>().join(", ")
}

/// Evidence from what the engine says in `field`.
fn api(field: &str, line: impl Into<String>) -> Evidence {
    Evidence::new(format!("Docker API: {field}"), line)
}

impl Check {
    /// Whether it is about the host, not about a container.
    pub fn is_of_the_host(&self) -> bool {
        self.v1_3_1.starts_with("7.") || self.slug == host_users::CHECK.slug
    }

    /// Whether it is about a container.
    pub fn is_of_a_container(&self) -> bool {
        !self.v1_3_1.starts_with("7.")
    }

    /// Its answer. Where no container of the workload is seen and no engine tells of it, there is none to give.
    pub fn judge(&self, case: &Case<'_>) -> Judgement {
        let answer = match case.facts.containers.is_empty() && case.engine().is_none() {
            true => Err(Unseen::new(&case.facts.blind)),
            false => (self.judge)(case),
        };
        answer.unwrap_or_else(|unseen| Judgement::new(Verdict::Unknown { grant: unseen.grant }, unseen.evidence))
    }

    /// The judgement, and what somebody answers for: a rule that nobody can see is attested, one that is broken is waived.
    /// An end that has passed is told, and changes nothing.
    fn promised(&self, case: &Case<'_>, mut judgement: Judgement) -> Judgement {
        let name = case.engine().and_then(|e| e.container.as_ref()).map_or("", |told| told.inspect.short_name());
        let (list, word) = match judgement.verdict {
            Verdict::Fail => (&case.declared.waivers, "waived"),
            Verdict::Unknown { .. } if self.can_be_attested() => (&case.declared.attestations, "attested"),
            _ => return judgement,
        };
        let about: Vec<&Promise> = list.iter().filter(|p| p.is_about(self.slug, name)).collect();
        let Some(promise) = about.iter().max_by_key(|p| p.until) else { return judgement };
        let (by, why, until) = (promise.by.clone(), promise.why.clone(), promise.until);
        let ended = case.now >= until;
        let when = if ended { "until its end on" } else { "until" };
        judgement.evidence.insert(
            0,
            Evidence::new("configuration", format!("{word} by {by} {when} {}: {why}", releases::day(until))),
        );
        match judgement.verdict {
            _ if ended => {}
            Verdict::Fail => judgement.verdict = Verdict::Waived { by, why, until },
            _ => judgement.verdict = Verdict::Pass,
        }
        judgement
    }

    /// Whether it asks for something that no agent can see by itself.
    fn can_be_attested(&self) -> bool {
        const MANUAL: [&str; 8] = ["4.3", "4.4", "4.5", "4.11", "4.12", "7.5", "7.7", "7.10"];
        MANUAL.contains(&self.v1_3_1)
    }

    /// Its references.
    pub fn ids(&self) -> CisIds {
        CisIds { v1_3_1: self.v1_3_1.into(), v1_6: self.v1_6.into() }
    }

    fn finding(&self, case: &Case<'_>) -> Finding {
        let judgement = self.promised(case, self.judge(case));
        Finding {
            check: self.slug.into(),
            ids: self.ids(),
            title: self.title.into(),
            severity: judgement.severity.unwrap_or(self.severity),
            verdict: judgement.verdict,
            evidence: presentable(judgement.evidence),
            remedy: Remedy {
                docker_run: self.docker_run.into(),
                compose: self.compose.into(),
                kubernetes: self.kubernetes.into(),
            },
            vantage: match case.engine() {
                Some(_) => Vantage::Node,
                None if judgement.deep => case.facts.vantage,
                None => Vantage::Open,
            },
        }
    }
}

/// At most [`MAX_EVIDENCE`] lines, and nothing in them that a workload could use to write over the reader's terminal.
fn presentable(mut evidence: Vec<Evidence>) -> Vec<Evidence> {
    let more = evidence.len().saturating_sub(MAX_EVIDENCE);
    evidence.truncate(MAX_EVIDENCE);
    let mut shown: Vec<Evidence> = evidence
        .into_iter()
        .map(|e| Evidence::new(crate::watch::plain(&e.source), crate::watch::plain(&e.line)))
        .collect();
    if more > 0 {
        shown.push(Evidence::new("", format!("and {more} more")));
    }
    shown
}

/// Every check's finding, in the order of the benchmark.
pub fn judge_all(case: &Case<'_>) -> Vec<Finding> {
    CHECKS.iter().map(|check| check.finding(case)).chain(trusting_all(case.declared)).collect()
}

/// No rule of the benchmark, and worse than most of them: while it is configured, it is a failure.
fn trusting_all(declared: &Declared) -> Option<Finding> {
    let evidence = declared.trusting_all.iter().map(|line| Evidence::new("the agent's settings", line)).collect();
    let remedy = "import the peer's CA (`sidewarden-collector trust import`) and remove `insecure_trust_all` from the agent's settings";
    (!declared.trusting_all.is_empty()).then(|| Finding {
        check: "insecure-trust-all".into(),
        ids: CisIds::default(),
        title: "no listener or route accepts every certificate".into(),
        severity: Severity::Critical,
        verdict: Verdict::Fail,
        evidence: presentable(evidence),
        remedy: Remedy { docker_run: remedy.into(), compose: remedy.into(), kubernetes: remedy.into() },
        vantage: Vantage::Open,
    })
}

/// The findings about a container that the engine tells of, in the order of the benchmark.
pub fn judge_container(case: &Case<'_>) -> Vec<Finding> {
    CHECKS.iter().filter(|check| check.is_of_a_container()).map(|check| check.finding(case)).collect()
}

/// The findings of section 4 about an image, in the order of the benchmark.
pub fn judge_image(case: &Case<'_>) -> Vec<Finding> {
    CHECKS.iter().filter(|check| check.v1_3_1.starts_with("4.")).map(|check| check.finding(case)).collect()
}

/// The findings about the host itself, in the order of the benchmark.
pub fn judge_host(case: &Case<'_>) -> Vec<Finding> {
    CHECKS.iter().filter(|check| check.is_of_the_host()).map(|check| check.finding(case)).collect()
}

/// The checks as a table for people.
pub fn catalogue_table() -> String {
    let mut table = format!("{:<7}{:<7}{:<25}{:<10}{}\n", "1.3.1", "1.6", "CHECK", "SEVERITY", "ASKS THAT");
    for c in CHECKS {
        // Writing to a String cannot fail.
        let _ = writeln!(table, "{:<7}{:<7}{:<25}{:<10}{}", c.v1_3_1, c.v1_6, c.slug, c.severity.word(), c.title);
    }
    table
}

/// The answer of a rule that holds for each container: the worst one, with the evidence of all that gave it.
fn each_container(case: &Case<'_>, judge: impl Fn(&Container) -> Answer) -> Answer {
    let mut worst: Option<Answer> = None;
    for answer in case.facts.containers.iter().map(judge) {
        worst = Some(match worst {
            None => answer,
            Some(before) => worse(before, answer),
        });
    }
    worst.unwrap_or_else(|| Err(Unseen::new(&case.facts.blind)))
}

fn worse(one: Answer, other: Answer) -> Answer {
    let rank = |answer: &Answer| match answer {
        Ok(Judgement { verdict: Verdict::Fail, .. }) => 3,
        Err(_) => 2,
        Ok(Judgement { verdict: Verdict::Pass, .. }) => 1,
        Ok(_) => 0,
    };
    match rank(&other).cmp(&rank(&one)) {
        std::cmp::Ordering::Greater => other,
        std::cmp::Ordering::Less => one,
        std::cmp::Ordering::Equal => match (one, other) {
            (Ok(mut one), Ok(other)) => {
                one.evidence.extend(other.evidence);
                one.severity = one.severity.max(other.severity);
                Ok(one)
            }
            (one, _) => one,
        },
    }
}

/// The file that something about a process was read in.
fn status_of(process: &crate::facts::Process) -> String {
    format!("/proc/{}/status", process.id.pid)
}

#[cfg(test)]
pub(crate) mod sample;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::sample::Sample;
    use super::*;

    #[test]
    fn every_check_has_a_name_of_its_own_both_numbers_and_a_remedy() {
        let slugs: BTreeSet<&str> = CHECKS.iter().map(|c| c.slug).collect();
        assert_eq!((slugs.len(), CHECKS.len()), (53, 53));
        for c in CHECKS {
            let (section, number) = c.v1_3_1.split_once('.').unwrap();
            let number: u32 = number.parse().unwrap();
            let shifted = match (section, number) {
                ("7", 1) => "5.1".to_owned(),
                ("7", n) => format!("7.{}", n - 1),
                ("5", n) => format!("5.{}", n + 1),
                (_, n) => format!("{section}.{n}"),
            };
            assert_eq!(c.v1_6, shifted, "{}", c.slug);
            for text in [c.title, c.docker_run, c.compose, c.kubernetes] {
                assert!(!text.is_empty(), "{}", c.slug);
            }
        }
    }

    #[test]
    fn sections_four_five_and_seven_are_complete_and_in_order() {
        let have: Vec<&str> = CHECKS.iter().map(|c| c.v1_3_1).collect();
        let ids =
            [(4, 12), (5, 31), (7, 10)].into_iter().flat_map(|(s, last)| (1..=last).map(move |n| format!("{s}.{n}")));
        assert_eq!(have, ids.collect::<Vec<_>>());
    }

    #[test]
    fn a_sound_container_fails_nothing_and_every_verdict_is_backed() {
        for f in Sample::sound().judge_all() {
            assert_ne!(f.verdict, Verdict::Fail, "{}: {:?}", f.check, f.evidence);
            assert!(f.verdict != Verdict::Pass || !f.evidence.is_empty(), "{} passes without evidence", f.check);
        }
    }

    #[test]
    fn an_agent_that_sees_nobody_passes_nothing() {
        let mut sample = Sample::sound();
        sample.facts.containers.clear();
        sample.facts.blind = "share the PID namespace".into();
        for f in sample.judge_all() {
            assert_eq!(f.verdict, Verdict::Unknown { grant: "share the PID namespace".into() }, "{}", f.check);
        }
    }

    #[test]
    fn what_is_hidden_is_never_a_pass() {
        let mut sample = Sample::sound();
        sample.hide_everything();
        for f in sample.judge_all() {
            let seen_in_status =
                ["user", "capabilities", "privileged", "no-new-privileges", "seccomp", "sshd", "cgroup-parent"];
            let may_pass = seen_in_status.contains(&f.check.as_str());
            assert!(may_pass || matches!(f.verdict, Verdict::Unknown { .. }), "{}: {:?}", f.check, f.verdict);
        }
    }

    #[test]
    fn the_worst_container_speaks_for_the_pod() {
        let mut sample = Sample::sound();
        let mut bad = sample.container().clone();
        bad.processes[0].uids = [0; 4];
        sample.facts.containers.push(bad);
        let user = sample.judge_all().into_iter().find(|f| f.check == "user").unwrap();
        assert_eq!(user.verdict, Verdict::Fail);
    }

    #[test]
    fn evidence_is_short_and_writes_over_nothing() {
        let mut sample = Sample::sound();
        let evil = crate::facts::Process { name: "\u{1b}[2Jx".into(), uids: [0; 4], ..sample.first().clone() };
        sample.container().processes.extend(std::iter::repeat_n(evil, 1000));
        let user = sample.judge_all().into_iter().find(|f| f.check == "user").unwrap();
        assert_eq!((user.evidence.len(), user.evidence[8].line.as_str()), (9, "and 992 more"));
        assert!(user.evidence.iter().all(|e| !e.line.contains('\u{1b}')));
    }

    #[test]
    fn the_catalogue_has_one_line_a_check() {
        assert_eq!(catalogue_table().lines().count(), CHECKS.len() + 1);
        assert!(catalogue_table().contains("5.31   5.32   docker-socket"));
        let place = catalogue_table().find("SEVERITY").unwrap();
        for (line, check) in catalogue_table().lines().skip(1).zip(CHECKS) {
            assert!(line[place - 1..].starts_with(&format!(" {}", check.severity.word())), "out of its column: {line}");
        }
    }

    #[test]
    fn a_misspelt_capability_is_a_fault() {
        let declared = Declared { capabilities: vec!["NET_ADMIN".into(), "NET_ADMN".into()], ..Declared::default() };
        assert_eq!(declared.faults(), ["capabilities: `NET_ADMN` is no capability of Linux"]);
    }

    #[test]
    fn who_may_come_in_as_root_is_named_by_a_whole_command_line_and_a_reason() {
        let faults = |command: &str, reason: &str| {
            let one = RootExec { command: command.into(), container: None, reason: reason.into() };
            Declared { root_execs: vec![one], ..Declared::default() }.faults().join("; ")
        };
        assert_eq!(faults("/usr/bin/pg_dump --all", "the backup"), "");
        assert_eq!(faults("sh -c backup", "the backup"), "");
        for (command, reason, expected) in [
            ("/usr/bin/pg_dump", " ", "needs a `reason`"),
            ("", "x", "whole command line"),
            ("ls ", "x", "without spaces"),
            ("/bin/bash", "x", "may do anything"),
            ("sh", "x", "may do anything"),
        ] {
            assert!(faults(command, reason).contains(expected), "{command}: {}", faults(command, reason));
        }
    }

    #[test]
    fn a_declared_root_is_the_one_with_that_command_line_in_that_container() {
        let one = |container: Option<&str>| {
            vec![RootExec { command: "ls /".into(), container: container.map(str::to_owned), reason: "r".into() }]
        };
        let rows = [
            (None, "db", "ls /", true),
            (None, "db", "ls /etc", false),
            (None, "db", "ls", false),
            (Some("db*"), "db-1", "ls /", true),
            (Some("db*"), "web", "ls /", false),
            (Some("db"), "db-1", "ls /", false),
        ];
        for (wanted, container, command, expected) in rows {
            let declared = one(wanted);
            let found = RootExec::reason(&declared, container, command);
            assert_eq!(found, expected.then_some("r"), "{wanted:?} {container} {command}");
        }
    }

    #[test]
    fn a_plaintext_port_has_a_number_and_a_reason_and_stands_there_once() {
        let plain = |port, protocol, reason: &str| Plaintext { port, protocol, reason: reason.into() };
        let (tcp, udp) = (Protocol::Tcp, Protocol::Udp);
        let check = |plaintext: &[Plaintext], expected: &[&str]| {
            let faults = Declared { plaintext: plaintext.to_vec(), ..Declared::default() }.faults();
            assert_eq!(faults.len(), expected.len(), "{faults:?}");
            expected.iter().zip(&faults).for_each(|(part, fault)| assert!(fault.contains(part), "{fault}"));
        };
        check(&[plain(53, tcp, "x"), plain(53, udp, "x")], &[]);
        check(&[plain(0, tcp, " ")], &["0 is no port", "needs a `reason`"]);
        check(&[plain(53, tcp, "x"), plain(53, tcp, "y")], &["53/tcp stands there twice"]);
    }
}
