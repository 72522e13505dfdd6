//! What an agent is told: `agent.toml`, each key also by `SIDEWARDEN_…`, contradictions found before anything starts.
//!
//! `deploy/agent.toml` holds every key with its default and what it does.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustls::pki_types::DnsName;
use sidewarden_proto::config::{self, Bytes, Env, Faults, FromValue, HostPort, Reader, Value};
use sidewarden_proto::event::{Direction, Protocol};
use sidewarden_proto::given::{Elsewhere, workload_api};
use sidewarden_proto::identity::{InstanceId, SpiffeId, TrustDomain};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{GROUPS, Group};

use crate::cis::{Declared, Images, Plaintext, Promise, RootExec};
use crate::identity::foreign::ForeignFiles;
use crate::policy::address::Network;
use crate::policy::egress::{Lines, List, Rule};
use crate::proxy::balance::Balance;
use crate::watch::Normal;

/// A whole configuration without contradictions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where key, certificate, directive and spool are kept.
    pub data_dir: PathBuf,
    /// The name of this instance; the hostname if not set.
    pub instance: Option<InstanceId>,
    /// Where events go and certificates come from.
    pub collector: Collector,
    /// Where the identity lies, if somebody else keeps it.
    pub identity: Option<Elsewhere>,
    /// Health, metrics and posture, over HTTP.
    pub admin: Admin,
    /// Who may come in, and to where.
    pub inbound: Vec<Inbound>,
    /// Where the workload may go.
    pub outbound: Vec<Outbound>,
    /// Where else the workload may go.
    pub egress: Egress,
    /// Foreign peers.
    pub trust: ForeignFiles,
    /// How TLS is spoken.
    pub tls: Tls,
    /// How the wrapped command runs.
    pub exec: Exec,
    /// Packet rules around the workload.
    pub intercept: Intercept,
    /// What is watched.
    pub watch: Watch,
    /// What the operator intends, for the checks.
    pub declared: Declared,
    /// How a node agent finds the containers of its host.
    pub node: Node,
    /// How many.
    pub limits: Limits,
    /// How long.
    pub timeouts: Timeouts,
}

/// `[collector]`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collector {
    /// In the order they are tried.
    pub addresses: Vec<HostPort>,
    /// Holds the enrolment token; removed once the token was used.
    pub token_file: Option<PathBuf>,
    /// Which workload this is, when the token is good for several, or the Workload API offers several.
    pub workload: Option<SpiffeId>,
    /// Its trust domain, where that is not the workload's.
    pub trust_domain: Option<TrustDomain>,
}

/// `[admin]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    /// Its address.
    pub listen: SocketAddr,
}

/// One `[[inbound]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inbound {
    /// Where peers connect to.
    pub listen: SocketAddr,
    /// The workload's own port or socket.
    pub to: Service,
    /// The host name that peers ask for, where several blocks share `listen`; in lower case, may begin with `*.`.
    pub server_name: Option<String>,
    /// SPIFFE IDs that may come in.
    pub allow: Vec<SpiffeId>,
    /// DNS names of foreign peers that may come in.
    pub allow_dns: Vec<String>,
    /// Whether the agent occupies the workload's port on every other address and refuses who comes there.
    pub hold_service_port: bool,
    /// The source address of connections to the workload: not 127.0.0.1, which many servers believe.
    pub dial_from: IpAddr,
    /// Whether the workload is told who connects, and how.
    pub proxy_protocol: ProxyProtocol,
    /// Load balancers, which must tell us who connects.
    pub accept_proxy_protocol_from: Vec<Network>,
    /// How many bytes.
    pub rates: Rates,
    /// Plaintext is let in, too.
    pub permissive: Option<Permissive>,
    /// Every certificate is accepted.
    pub insecure_trust_all: Option<TrustAll>,
}

impl Inbound {
    /// The block as people and events call it: `0.0.0.0:8443`, or `0.0.0.0:8443 (orders.example)`.
    pub fn place(&self) -> String {
        self.server_name.as_ref().map_or_else(|| self.listen.to_string(), |host| format!("{} ({host})", self.listen))
    }

    /// Whether both are blocks of one listener, told apart by the host name that is asked for.
    pub fn shares_listener_with(&self, other: &Inbound) -> bool {
        let named = self.server_name.is_some() || other.server_name.is_some();
        self.listen == other.listen && (named || self.listen.port() != 0)
    }
}

/// The workload's own port or socket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Service {
    /// An address, mostly of loopback.
    Tcp(SocketAddr),
    /// A Unix socket at this absolute path.
    Unix(PathBuf),
}

impl Service {
    /// Its address, if it has one.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Service::Tcp(address) => Some(*address),
            Service::Unix(_) => None,
        }
    }
}

impl std::fmt::Display for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Service::Tcp(address) => address.fmt(f),
            Service::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Version of the PROXY protocol that a service is spoken to in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProxyProtocol {
    /// None.
    #[default]
    Off,
    /// One line of text.
    V1,
    /// Binary, with the peer's name.
    V2,
}

/// Bytes a second, both ways together; `None` for as many as come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Of all connections of the block.
    pub all: Option<NonZeroU64>,
    /// Of each one.
    pub each: Option<NonZeroU64>,
}

/// `permissive` of an inbound block
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permissive {
    /// Why.
    pub reason: String,
    /// When it is over.
    pub until: Timestamp,
    /// A client that says nothing for this long waits for the service to speak first, in plaintext; zero for never.
    pub silent_after: Duration,
}

/// `insecure_trust_all` of an inbound or outbound block
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustAll {
    /// Why.
    pub reason: String,
    /// When it is over.
    pub until: Timestamp,
}

/// One `[[outbound]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outbound {
    /// Where the workload connects to, in plaintext.
    pub listen: SocketAddr,
    /// The peer's agents; never empty.
    pub to: Vec<HostPort>,
    /// Which of them is next.
    pub balance: Balance,
    /// Who must answer there.
    pub peer: Peer,
    /// The host name to ask for, where the peer's agent has several services behind one listener.
    pub server_name: Option<String>,
    /// Whether `listen` may be an address that others can reach.
    pub expose: bool,
    /// How many bytes.
    pub rates: Rates,
    /// Every certificate is accepted.
    pub insecure_trust_all: Option<TrustAll>,
}

impl Config {
    /// Every place where each certificate is accepted, as people and events call it.
    pub fn trusting_all(&self) -> Vec<(Direction, String, TrustAll)> {
        let inbound = self.inbound.iter().map(|one| (Direction::Inbound, one.place(), &one.insecure_trust_all));
        let outbound = self.outbound.iter().map(|one| (Direction::Outbound, one.place(), &one.insecure_trust_all));
        let all = inbound.chain(outbound);
        all.filter_map(|(direction, place, config)| Some((direction, place, config.clone()?))).collect()
    }
}

impl Outbound {
    /// The route as people and events call it: `db1:8443,db2:8443`.
    pub fn name(&self) -> String {
        self.to.iter().map(HostPort::to_string).collect::<Vec<_>>().join(",")
    }

    /// The same where it must not be taken for another route to there: `db1:8443,db2:8443 (from 127.0.0.1:5432)`.
    pub fn place(&self) -> String {
        format!("{} (from {})", self.name(), self.listen)
    }
}

/// Who must answer at the other end of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A workload.
    Workload(SpiffeId),
    /// A foreign server with this DNS name.
    Dns(String),
}

/// `[egress]`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Egress {
    /// Where the workload finds its proxy: HTTP CONNECT, requests for `http://`, SOCKS5.
    pub listen: Option<SocketAddr>,
    /// Where nftables redirects the workload's connections to.
    pub transparent_listen: Vec<SocketAddr>,
    /// Whether these may be addresses that others can reach.
    pub expose: bool,
    /// Where it may go.
    pub allow: List,
    /// Another proxy that everything goes through.
    pub upstream: Option<HostPort>,
    /// Holds `user:password` for it.
    pub upstream_credentials_file: Option<PathBuf>,
    /// Whether it looks names up, instead of the agent.
    pub upstream_resolves: bool,
}

impl Egress {
    /// Every listener, with its key.
    fn listeners(&self) -> impl Iterator<Item = (&'static str, SocketAddr)> {
        let explicit = self.listen.iter().map(|address| ("egress.listen", *address));
        explicit.chain(self.transparent_listen.iter().map(|address| ("egress.transparent_listen", *address)))
    }
}

/// `[tls]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Key exchange groups, the one we like best first.
    pub groups: Vec<Group>,
}

impl Default for Tls {
    fn default() -> Tls {
        Tls { groups: GROUPS.to_vec() }
    }
}

/// `[exec]`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exec {
    /// Whom the wrapped command runs as.
    pub user: Option<User>,
}

/// A user and group by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// `[intercept]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intercept {
    /// The group that the agent has and the workload has not.
    pub gid: Option<u32>,
    /// What may come in past the agent.
    pub inbound: Inward,
    /// Where connections to the workload's own ports are led, to be refused with an event.
    pub refuse_port: u16,
    /// What may go out past the agent.
    pub outbound: Outward,
    /// What may all the same.
    pub bypass: Vec<Bypass>,
}

/// One `[[intercept.bypass]]`: where the workload goes without its agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bypass {
    /// Where.
    pub to: Network,
    /// Over what.
    pub protocol: Protocol,
    /// At which port; at every one if not set.
    pub port: Option<u16>,
    /// Why that has to be.
    pub reason: String,
}

/// `udp to 10.96.0.10, port 53: the cluster's DNS`
impl fmt::Display for Bypass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Bypass { to, protocol, port, reason } = self;
        let port = port.map_or_else(|| "every port".to_owned(), |port| format!("port {port}"));
        write!(f, "{} to {to}, {port}: {reason}", protocol.word())
    }
}

/// `intercept.outbound`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Outward {
    /// Everything, as without any rules.
    #[default]
    Off,
    /// Nothing: the workload has the agent's listeners on loopback.
    Block,
    /// TCP is led to the transparent listeners of `[egress]`, the rest is stopped.
    Redirect,
}

/// `intercept.inbound`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Inward {
    /// Everything, as without any rules.
    #[default]
    Off,
    /// Nothing but what is declared.
    Lock,
}

impl Intercept {
    /// Whether there are rules to be installed.
    pub fn is_on(&self) -> bool {
        self.inbound != Inward::Off || self.outbound != Outward::Off
    }
}

impl Egress {
    /// The ports on this machine's loopback where redirected connections of IPv4 and of IPv6 are taken.
    pub fn redirected_to(&self) -> [Option<u16>; 2] {
        let takes = |wanted: IpAddr| {
            let listens = |l: &&SocketAddr| {
                let everywhere = l.ip().is_unspecified() && (l.is_ipv6() || wanted.is_ipv4());
                l.ip().to_canonical() == wanted || everywhere
            };
            self.transparent_listen.iter().find(listens).map(SocketAddr::port)
        };
        [takes(Ipv4Addr::LOCALHOST.into()), takes(Ipv6Addr::LOCALHOST.into())]
    }
}

/// `[watch]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watch {
    /// How often is looked for new processes.
    pub tick: Duration,
    /// How often everything is judged anew even if nothing seems to have changed.
    pub posture_interval: Duration,
    /// Part of the workload's cgroup path, where nothing else tells it from others.
    pub subject: Option<String>,
    /// What is no news.
    pub normal: Normal,
}

/// `[node]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The container engine's socket.
    pub socket: PathBuf,
}

impl Default for Node {
    fn default() -> Node {
        Node { socket: "/run/docker.sock".into() }
    }
}

/// `[limits]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections that are being relayed or wait for it.
    pub max_connections: usize,
    /// Connections that have not finished their handshake.
    pub max_handshakes: usize,
    /// Of these, how many may come from one source; zero for no limit of its own.
    pub max_handshakes_per_source: usize,
    /// New connections a second from one source; zero for no limit.
    pub max_new_connections_per_source: u64,
    /// The spool on disk.
    pub spool: Bytes,
}

/// `[timeouts]`; zero means none where that is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// From accept to the end of the handshake.
    pub handshake: Duration,
    /// To reach the workload or a peer, name resolution included.
    pub connect: Duration,
    /// Without a byte in either direction; zero for none.
    pub idle: Duration,
    /// The same once one side has closed its half.
    pub half_closed: Duration,
    /// From SIGTERM to the end.
    pub drain: Duration,
    /// The longest life of a connection; zero for none.
    pub max_connection_age: Duration,
}

/// Where connections to the workload come from.
const DIAL_FROM: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6));

impl Default for Config {
    fn default() -> Config {
        Config {
            data_dir: "/var/lib/sidewarden".into(),
            instance: None,
            collector: Collector::default(),
            identity: None,
            admin: Admin { listen: SocketAddr::from(([127, 0, 0, 1], 9901)) },
            inbound: Vec::new(),
            outbound: Vec::new(),
            egress: Egress::default(),
            trust: ForeignFiles::default(),
            tls: Tls::default(),
            exec: Exec::default(),
            intercept: Intercept::default(),
            watch: Watch::default(),
            declared: Declared::default(),
            node: Node::default(),
            limits: Limits::default(),
            timeouts: Timeouts::default(),
        }
    }
}

impl Default for Intercept {
    fn default() -> Intercept {
        Intercept { gid: None, inbound: Inward::Off, refuse_port: 15006, outbound: Outward::Off, bypass: Vec::new() }
    }
}

impl Default for Watch {
    fn default() -> Watch {
        Watch {
            tick: Duration::from_millis(50),
            posture_interval: Duration::from_secs(30),
            subject: None,
            normal: Normal::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_connections: 10_000,
            max_handshakes: 256,
            max_handshakes_per_source: 128,
            max_new_connections_per_source: 0,
            spool: Bytes(64 << 20),
        }
    }
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            handshake: Duration::from_secs(5),
            connect: Duration::from_secs(5),
            idle: Duration::ZERO,
            half_closed: Duration::from_secs(300),
            drain: Duration::from_secs(10),
            max_connection_age: Duration::ZERO,
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("reading {}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
    /// It is wrong.
    #[error(transparent)]
    Faults(#[from] Faults),
}

impl Config {
    /// Reads the file, if one is named, and the environment.
    pub fn load(path: Option<&Path>, env: Env<'_>) -> Result<Config, ConfigError> {
        Ok(Config::parse(&text_of(path)?, env)?)
    }

    /// Reads a text and the environment.
    pub fn parse(text: &str, env: Env<'_>) -> Result<Config, Faults> {
        config::load(text, env, read)
    }

    /// Where the spool is.
    pub fn spool_dir(&self) -> PathBuf {
        self.data_dir.join("spool")
    }
}

fn text_of(path: Option<&Path>) -> Result<String, ConfigError> {
    let Some(path) = path else { return Ok(String::new()) };
    std::fs::read_to_string(path).map_err(|error| ConfigError::File { path: path.to_owned(), error })
}

impl Config {
    /// Reads no more than what the checks need, for one look at the host: `[node]`, `[declared]`, `[images]` and the lists of
    /// waivers and attestations.
    pub fn load_for_checks(path: Option<&Path>, env: Env<'_>) -> Result<Config, ConfigError> {
        let read = |r: &mut Reader<'_>| {
            let config = Config { declared: whole_declared(r), node: r.section("node", node), ..Config::default() };
            for fault in config.declared.faults() {
                r.fault("declared", fault);
            }
            config
        };
        Ok(config::load_part(&text_of(path)?, env, read)?)
    }
}

impl Admin {
    /// Reads no more than this part, for whoever asks a running agent.
    pub fn load(path: Option<&Path>, env: Env<'_>) -> Result<Admin, ConfigError> {
        Ok(config::load_part(&text_of(path)?, env, |r| r.section("admin", admin))?)
    }
}

fn admin(r: &mut Reader<'_>) -> Admin {
    Admin { listen: r.value("listen", Config::default().admin.listen) }
}

fn read(r: &mut Reader<'_>) -> Config {
    let default = Config::default();
    let config = Config {
        data_dir: r.value("data_dir", default.data_dir),
        instance: r.optional::<String>("instance").filter(|name| !name.is_empty()).and_then(|name| instance(r, &name)),
        collector: r.section("collector", collector),
        identity: r.section("identity", Elsewhere::read),
        admin: r.section("admin", admin),
        inbound: r.list("inbound", inbound).into_iter().flatten().collect(),
        outbound: r.list("outbound", outbound).into_iter().flatten().collect(),
        egress: r.section("egress", egress),
        trust: r.section("trust", trust),
        tls: r.section("tls", |r| Tls { groups: r.value("groups", default.tls.groups) }),
        exec: r.section("exec", |r| Exec { user: r.optional("user") }),
        intercept: r.section("intercept", intercept),
        watch: r.section("watch", watch),
        declared: whole_declared(r),
        node: r.section("node", node),
        limits: r.section("limits", limits),
        timeouts: r.section("timeouts", timeouts),
    };
    let config = with_ambient(r, config);
    for (key, wrong) in contradictions(&config) {
        r.fault(key, wrong);
    }
    config
}

fn node(r: &mut Reader<'_>) -> Node {
    Node { socket: r.value("socket", Node::default().socket) }
}

fn whole_declared(r: &mut Reader<'_>) -> Declared {
    Declared {
        images: r.section("images", images),
        waivers: r.list("waiver", promise).into_iter().flatten().collect(),
        attestations: r.list("attestation", promise).into_iter().flatten().collect(),
        ..r.section("declared", declared)
    }
}

fn images(r: &mut Reader<'_>) -> Images {
    Images {
        trusted: r.value("trusted", Vec::new()),
        max_age: r.optional("max_age"),
        unwanted_packages: r.value("unwanted_packages", Vec::new()),
        setuid: r.value("setuid", Vec::new()),
    }
}

fn promise(r: &mut Reader<'_>) -> Option<Promise> {
    let (check, by, why) = (r.required("check"), r.required("by"), r.required("why"));
    let (container, until) = (r.optional("container"), r.required::<Until>("until"));
    Some(Promise { check: check?, container, by: by?, why: why?, until: until?.0 })
}

fn instance(r: &mut Reader<'_>, name: &str) -> Option<InstanceId> {
    name.parse().map_err(|error| r.fault("instance", format_args!("is wrong: {error}"))).ok()
}

fn collector(r: &mut Reader<'_>) -> Collector {
    Collector {
        addresses: r.value("addresses", Vec::new()),
        token_file: r.optional("token_file"),
        workload: r.optional("workload"),
        trust_domain: r.optional("trust_domain"),
    }
}

/// Where nothing says who this is, the variable that SPIFFE has for it does.
fn with_ambient(r: &mut Reader<'_>, config: Config) -> Config {
    if config.identity.is_some() || config.collector.token_file.is_some() {
        return config;
    }
    let identity = r.ambient(workload_api::ENVIRONMENT).map(Elsewhere::WorkloadApi);
    Config { identity, ..config }
}

fn trust(r: &mut Reader<'_>) -> ForeignFiles {
    let (bundles, dns_roots, crls) = (r.optional("bundles"), r.optional("dns_roots"), r.optional("crls"));
    let lenient = match r.value("crl_mode", "strict".to_owned()).as_str() {
        "strict" => false,
        "lenient" => true,
        other => {
            r.fault("crl_mode", format_args!("must be \"strict\" or \"lenient\", not `{other}`"));
            false
        }
    };
    if lenient && crls.is_none() {
        r.fault("crl_mode", "is about `crls`, which is not set");
    }
    ForeignFiles { bundles, dns_roots, crls, lenient }
}

fn inbound(r: &mut Reader<'_>) -> Option<Inbound> {
    let (listen, to) = (r.required("listen"), r.required("to"));
    let server_name = server_name(r);
    let (allow, allow_dns) = (r.value("allow", Vec::new()), r.value("allow_dns", Vec::<String>::new()));
    let (hold, dial_from) = (r.optional("hold_service_port"), r.optional("dial_from"));
    if matches!(to, Some(Service::Unix(_))) {
        for key in [hold.map(|_| "hold_service_port"), dial_from.map(|_: IpAddr| "dial_from")].into_iter().flatten() {
            r.fault(key, "is about a port, and `to` is a Unix socket: remove it");
        }
    }
    let allow_dns = allow_dns.iter().map(|name| plain_name(name)).collect();
    let (hold_service_port, dial_from) = (hold.unwrap_or(true), dial_from.unwrap_or(DIAL_FROM));
    let proxy_protocol = r.value("proxy_protocol", ProxyProtocol::Off);
    let accept_proxy_protocol_from = r.value("accept_proxy_protocol_from", Vec::new());
    let (rates, permissive) = (rates(r), r.optional_section("permissive", permissive).flatten());
    let insecure_trust_all = r.optional_section("insecure_trust_all", trust_all).flatten();
    Some(Inbound {
        listen: listen?,
        to: to?,
        server_name,
        allow,
        allow_dns,
        hold_service_port,
        dial_from,
        proxy_protocol,
        accept_proxy_protocol_from,
        rates,
        permissive,
        insecure_trust_all,
    })
}

fn server_name(r: &mut Reader<'_>) -> Option<String> {
    let name = r.optional::<String>("server_name")?.to_ascii_lowercase();
    let host = name.strip_prefix("*.").unwrap_or(&name);
    if DnsName::try_from(host).is_err() || host.ends_with('.') || (host.len() < name.len() && !host.contains('.')) {
        r.fault(
            "server_name",
            format_args!("must be a host name, like orders.example or *.shop.example, not `{name}`"),
        );
    }
    Some(name)
}

fn rates(r: &mut Reader<'_>) -> Rates {
    let mut rate = |key| r.optional::<Bytes>(key).and_then(|bytes| NonZeroU64::new(bytes.0));
    Rates { all: rate("max_bytes_per_second"), each: rate("max_bytes_per_second_each") }
}

fn permissive(r: &mut Reader<'_>) -> Option<Permissive> {
    let (reason, until) = (r.required::<String>("reason"), r.required::<Until>("until"));
    let silent_after = r.value("silent_after", Duration::ZERO);
    if reason.as_ref().is_some_and(|reason| reason.trim().is_empty()) {
        r.fault("reason", "is empty: say why plaintext has to be let in");
    }
    Some(Permissive { reason: reason?, until: until?.0, silent_after })
}

fn trust_all(r: &mut Reader<'_>) -> Option<TrustAll> {
    let (reason, until) = (r.required::<String>("reason"), r.required::<Until>("until"));
    if reason.as_ref().is_some_and(|reason| reason.trim().is_empty()) {
        r.fault("reason", "is empty: say why every certificate has to be accepted");
    }
    Some(TrustAll { reason: reason?, until: until?.0 })
}

/// The end of a day, or a moment.
struct Until(Timestamp);

impl FromValue for Until {
    fn from_text(text: &str) -> Result<Until, String> {
        let fault = |_| format!("must be a day, like 2027-01-31, or a time, like 2027-01-31T12:00:00Z, not `{text}`");
        if text.contains('T') {
            return text.parse().map(Until).map_err(fault);
        }
        let begin: Timestamp = format!("{text}T00:00:00Z").parse().map_err(fault)?;
        Ok(Until(begin.plus(Duration::from_secs(24 * 3600))))
    }
}

impl FromValue for Service {
    fn from_text(text: &str) -> Result<Service, String> {
        let Some(path) = text.strip_prefix("unix:") else {
            let fault = |_| {
                format!("must be an address with a port, like 127.0.0.1:8080, or unix:/path/to/socket, not `{text}`")
            };
            return text.parse().map(Service::Tcp).map_err(fault);
        };
        // The kernel's field has 108 bytes, the last one zero.
        if !path.starts_with('/') || path.len() > 107 || path.contains('\0') {
            return Err(format!("must be unix: and an absolute path of at most 107 bytes, not `{text}`"));
        }
        Ok(Service::Unix(path.into()))
    }
}

impl FromValue for ProxyProtocol {
    fn from_text(text: &str) -> Result<ProxyProtocol, String> {
        match text {
            "off" => Ok(ProxyProtocol::Off),
            "v1" => Ok(ProxyProtocol::V1),
            "v2" => Ok(ProxyProtocol::V2),
            _ => Err(format!("must be off, v1 or v2, not `{text}`")),
        }
    }
}

impl FromValue for Balance {
    fn from_text(text: &str) -> Result<Balance, String> {
        match text {
            "round_robin" => Ok(Balance::RoundRobin),
            "least_connections" => Ok(Balance::LeastConnections),
            _ => Err(format!("must be round_robin or least_connections, not `{text}`")),
        }
    }
}

/// A DNS name as the policy writes it. To TLS its spellings are one name, so a line that denies it must meet them all.
fn plain_name(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

fn outbound(r: &mut Reader<'_>) -> Option<Outbound> {
    let (listen, to) = (r.required("listen"), r.required::<OneOrMore<HostPort>>("to"));
    let (id, dns) = (r.optional("peer"), r.optional::<String>("peer_dns"));
    let (expose, balance) = (r.value("expose", false), r.value("balance", Balance::RoundRobin));
    let (server_name, rates) = (server_name(r), rates(r));
    let insecure_trust_all = r.optional_section("insecure_trust_all", trust_all).flatten();
    if server_name.as_ref().is_some_and(|name| name.starts_with('*')) {
        r.fault("server_name", "is what this route asks for: one name, without `*`");
    }
    let peer = match (id, dns) {
        (Some(id), None) => Some(Peer::Workload(id)),
        (None, Some(name)) => Some(Peer::Dns(plain_name(&name))),
        (None, None) => {
            r.fault("peer", "is missing: say who must answer, by `peer` (a SPIFFE ID) or `peer_dns` (a DNS name)");
            None
        }
        (Some(_), Some(_)) => {
            r.fault("peer", "and `peer_dns` exclude each other: who must answer has one name");
            None
        }
    };
    let (listen, to, peer) = (listen?, to?.0, peer?);
    Some(Outbound { listen, to, balance, peer, server_name, expose, rates, insecure_trust_all })
}

/// One value, or a list of at least one.
struct OneOrMore<V>(Vec<V>);

impl<V: FromValue> FromValue for OneOrMore<V> {
    fn from_value(value: &Value) -> Result<OneOrMore<V>, String> {
        let all = match value {
            Value::Array(_) => Vec::from_value(value)?,
            one => vec![V::from_value(one)?],
        };
        if all.is_empty() { Err("is an empty list: name at least one".into()) } else { Ok(OneOrMore(all)) }
    }

    fn from_text(text: &str) -> Result<OneOrMore<V>, String> {
        Vec::from_text(text).map(OneOrMore)
    }
}

fn egress(r: &mut Reader<'_>) -> Egress {
    Egress {
        listen: r.optional("listen"),
        transparent_listen: r.value("transparent_listen", Vec::new()),
        expose: r.value("expose", false),
        allow: egress_rules(r),
        upstream: r.optional("upstream"),
        upstream_credentials_file: r.optional("upstream_credentials_file"),
        upstream_resolves: r.value("upstream_resolves", false),
    }
}

fn egress_rules(r: &mut Reader<'_>) -> List {
    let Lines(lines) = r.value("allow", Lines::default());
    let rules: Vec<Result<Rule, String>> = lines.iter().map(|line| line.parse()).collect();
    for (i, error) in rules.iter().enumerate().filter_map(|(i, rule)| Some((i, rule.as_ref().err()?))) {
        r.fault("allow", format_args!("(item {}) {error}", i + 1));
    }
    List { rules: rules.into_iter().flatten().collect() }
}

impl FromValue for User {
    fn from_text(text: &str) -> Result<User, String> {
        let fault = || format!("must be numbers, like 10001:10001, not `{text}`");
        let (uid, gid) = text.split_once(':').ok_or_else(fault)?;
        Ok(User { uid: uid.parse().map_err(|_| fault())?, gid: gid.parse().map_err(|_| fault())? })
    }
}

fn intercept(r: &mut Reader<'_>) -> Intercept {
    let default = Intercept::default();
    Intercept {
        gid: r.optional("gid"),
        inbound: r.value("inbound", default.inbound),
        refuse_port: r.value("refuse_port", default.refuse_port),
        outbound: r.value("outbound", default.outbound),
        bypass: r.list("bypass", bypass).into_iter().flatten().collect(),
    }
}

fn bypass(r: &mut Reader<'_>) -> Option<Bypass> {
    let (to, reason) = (r.required("to"), r.required("reason"));
    let (protocol, port) = (r.value("protocol", Protocol::Tcp), r.optional("port"));
    Some(Bypass { to: to?, protocol, port, reason: reason? })
}

impl FromValue for Outward {
    fn from_text(text: &str) -> Result<Outward, String> {
        match text {
            "off" => Ok(Outward::Off),
            "block" => Ok(Outward::Block),
            "redirect" => Ok(Outward::Redirect),
            other => Err(format!("must be \"off\", \"block\" or \"redirect\", not `{other}`")),
        }
    }
}

impl FromValue for Inward {
    fn from_text(text: &str) -> Result<Inward, String> {
        match text {
            "off" => Ok(Inward::Off),
            "lock" => Ok(Inward::Lock),
            other => Err(format!("must be \"off\" or \"lock\", not `{other}`")),
        }
    }
}

fn watch(r: &mut Reader<'_>) -> Watch {
    let default = Watch::default();
    Watch {
        tick: r.value("tick", default.tick),
        posture_interval: r.value("posture_interval", default.posture_interval),
        subject: r.optional("subject"),
        normal: Normal {
            healthchecks: r.value("healthchecks", Vec::new()),
            shells: r.value("shells", Vec::new()),
            ..Normal::default()
        },
    }
}

fn declared(r: &mut Reader<'_>) -> Declared {
    Declared {
        capabilities: r.value("capabilities", Vec::new()),
        ports: r.value("ports", Vec::new()),
        plaintext: r.list("plaintext", plaintext).into_iter().flatten().collect(),
        root_execs: r.list("root_exec", root_exec).into_iter().flatten().collect(),
        ulimits: r.value("ulimits", Vec::new()),
        mounts: r.value("mounts", Vec::new()),
        devices: r.value("devices", Vec::new()),
        cgroup_parent: r.optional("cgroup_parent"),
        swarm: r.value("swarm", false),
        ..Declared::default()
    }
}

fn plaintext(r: &mut Reader<'_>) -> Option<Plaintext> {
    let (port, protocol, reason) = (r.required("port"), r.value("protocol", Protocol::Tcp), r.required("reason"));
    Some(Plaintext { port: port?, protocol, reason: reason? })
}

fn root_exec(r: &mut Reader<'_>) -> Option<RootExec> {
    let (command, container, reason) = (r.required("command"), r.optional("container"), r.required("reason"));
    Some(RootExec { command: command?, container, reason: reason? })
}

fn limits(r: &mut Reader<'_>) -> Limits {
    let default = Limits::default();
    Limits {
        max_connections: r.value("max_connections", default.max_connections),
        max_handshakes: r.value("max_handshakes", default.max_handshakes),
        max_handshakes_per_source: r.value("max_handshakes_per_source", default.max_handshakes_per_source),
        max_new_connections_per_source: r
            .value("max_new_connections_per_source", default.max_new_connections_per_source),
        spool: r.value("spool", default.spool),
    }
}

fn timeouts(r: &mut Reader<'_>) -> Timeouts {
    let default = Timeouts::default();
    Timeouts {
        handshake: r.value("handshake", default.handshake),
        connect: r.value("connect", default.connect),
        idle: r.value("idle", default.idle),
        half_closed: r.value("half_closed", default.half_closed),
        drain: r.value("drain", default.drain),
        max_connection_age: r.value("max_connection_age", default.max_connection_age),
    }
}

/// The smallest spool: two segments and room to write one anew.
const MIN_SPOOL: u64 = 4 << 20;

/// What is right key by key and wrong together.
fn contradictions(config: &Config) -> Vec<(&'static str, String)> {
    let mut wrong = Vec::new();
    let mut say = |key: &'static str, text: String| wrong.push((key, text));
    if config.collector.addresses.is_empty() {
        say("collector.addresses", "is missing: name at least one collector, like [\"collector:7443\"]".into());
    }
    if config.identity.is_some() && config.collector.token_file.is_some() {
        say("identity", "and `collector.token_file` exclude each other: who this is comes from one place".into());
    }
    for (i, inbound) in config.inbound.iter().enumerate() {
        inbound_contradictions(config, i, inbound, &mut say);
    }
    for outbound in &config.outbound {
        if !outbound.listen.ip().is_loopback() && !outbound.expose {
            say(
                "outbound",
                format!(
                    "listens on {}, where others can send plaintext in this workload's name: use a loopback address, or set `expose = true`",
                    outbound.listen
                ),
            );
        }
    }
    for outbound in &config.outbound {
        if matches!(outbound.peer, Peer::Dns(_)) && outbound.server_name.is_some() {
            say("outbound", "has `server_name` and `peer_dns`, which is the name that is asked for".into());
        }
    }
    egress_contradictions(&config.egress, &mut say);
    port_conflicts(config, &mut say);
    plaintext_conflicts(config, &mut say);
    if config.intercept.is_on() {
        intercept_contradictions(config, &mut say);
    }
    bypass_contradictions(&config.intercept, &mut say);
    value_faults(config, &mut say);
    wrong
}

fn inbound_contradictions(config: &Config, i: usize, inbound: &Inbound, say: &mut dyn FnMut(&'static str, String)) {
    let Inbound { listen, to, allow, allow_dns, .. } = inbound;
    if let Service::Tcp(address) = to {
        port_contradictions(inbound, *address, say);
    }
    if allow.is_empty() && allow_dns.is_empty() {
        say("inbound", format!("on {listen} allows nobody: list SPIFFE IDs in `allow`, or DNS names in `allow_dns`"));
    }
    permissive_contradictions(config, inbound, say);
    for other in &config.inbound[i + 1..] {
        let same_port = to.address().is_some() && other.to == *to;
        if same_port && inbound.hold_service_port && other.hold_service_port {
            say("inbound", format!("{to} is led to twice: set `hold_service_port = false` on one"));
        }
        if other.shares_listener_with(inbound) && other.accept_proxy_protocol_from != inbound.accept_proxy_protocol_from
        {
            say(
                "inbound",
                format!(
                    "on {listen} has different `accept_proxy_protocol_from` in two blocks: the header comes before the name"
                ),
            );
        }
    }
}

fn port_contradictions(inbound: &Inbound, to: SocketAddr, say: &mut dyn FnMut(&'static str, String)) {
    let Inbound { listen, dial_from, .. } = inbound;
    if overlaps(*listen, to) {
        say("inbound", format!("listens on {listen} and leads to {to}, which is itself"));
    }
    if to.port() == 0 {
        say("inbound", format!("leads to {to}: 0 is no port to connect to"));
    }
    if dial_from.is_ipv4() != to.is_ipv4() {
        let hint = if to.is_ipv4() { "127.0.0.6" } else { "::1" };
        say(
            "inbound",
            format!(
                "dials {to} from {dial_from}, which is of the other IP version: set `dial_from`, for example to {hint}"
            ),
        );
    }
}

fn permissive_contradictions(config: &Config, inbound: &Inbound, say: &mut dyn FnMut(&'static str, String)) {
    let Some(permissive) = &inbound.permissive else { return };
    if inbound.server_name.is_some() {
        let text =
            "has `permissive` and `server_name`: plaintext asks for no name, put `permissive` into a block without";
        say("inbound", text.into());
    }
    if config.intercept.inbound == Inward::Lock && inbound.hold_service_port {
        let text = "has `permissive`, while `intercept.inbound = \"lock\"` refuses whoever comes in plaintext to the service's port: lock once every client is moved";
        say("inbound", text.into());
    }
    let within = config.timeouts.handshake;
    if permissive.silent_after >= within {
        say(
            "inbound",
            format!(
                "has `permissive.silent_after` not below `timeouts.handshake`, {within:?}: it would never come to it"
            ),
        );
    }
}

fn egress_contradictions(egress: &Egress, say: &mut dyn FnMut(&'static str, String)) {
    let default = Egress::default();
    if egress.listeners().next().is_none() && *egress != default {
        say(
            "egress",
            "is set while nothing listens: set `egress.listen`, like \"127.0.0.1:3128\", or `egress.transparent_listen`".into(),
        );
    }
    for (key, address) in egress.listeners().filter(|(_, address)| !address.ip().is_loopback() && !egress.expose) {
        say(
            key,
            format!(
                "listens on {address}, where others can go out in this workload's name: use a loopback address, or set `expose = true`"
            ),
        );
    }
    match &egress.upstream {
        Some(upstream) => {
            let ip = upstream.host.parse::<IpAddr>().ok();
            let itself =
                |address: SocketAddr| ip.is_some_and(|ip| overlaps(address, SocketAddr::new(ip, upstream.port)));
            if egress.listeners().any(|(_, address)| itself(address)) {
                say("egress.upstream", format!("is {upstream}, which is this agent's own egress listener"));
            }
        }
        None if egress.upstream_credentials_file.is_some() => {
            say("egress.upstream_credentials_file", "is set without `egress.upstream`".into());
        }
        None if egress.upstream_resolves => say("egress.upstream_resolves", "is set without `egress.upstream`".into()),
        None => {}
    }
}

/// Two listeners on one port, or one that we hold ourselves.
fn port_conflicts(config: &Config, say: &mut dyn FnMut(&'static str, String)) {
    let mut listeners: Vec<(&'static str, SocketAddr)> = vec![("admin.listen", config.admin.listen)];
    for (i, inbound) in config.inbound.iter().enumerate() {
        // Blocks of different names share their listener.
        let mut sharing = config.inbound[..i].iter().filter(|other| other.shares_listener_with(inbound));
        match sharing.find(|other| other.server_name == inbound.server_name) {
            Some(same) => say("inbound", same_name(same)),
            None if config.inbound[..i].iter().any(|other| other.shares_listener_with(inbound)) => {}
            None => listeners.push(("inbound", inbound.listen)),
        }
    }
    listeners.extend(config.outbound.iter().map(|outbound| ("outbound", outbound.listen)));
    listeners.extend(config.egress.listeners());
    if config.intercept.inbound == Inward::Lock {
        listeners.push(("intercept.refuse_port", SocketAddr::from(([0; 4], config.intercept.refuse_port))));
    }
    let mut by_port: BTreeMap<u16, Vec<(&'static str, SocketAddr)>> = BTreeMap::new();
    for (key, address) in listeners.into_iter().filter(|(_, address)| address.port() != 0) {
        let taken = by_port.entry(address.port()).or_default();
        if let Some((other, there)) = taken.iter().find(|(_, there)| overlaps(*there, address)) {
            say(key, format!("listens on {address}, which `{other}` has already, as {there}"));
        }
        taken.push((key, address));
    }
    for inbound in config.inbound.iter().filter(|inbound| inbound.hold_service_port) {
        let Some(to) = inbound.to.address() else { continue };
        let held = by_port.get(&to.port()).into_iter().flatten();
        for (key, address) in held.filter(|(_, address)| !address.ip().is_loopback()) {
            say(
                key,
                format!(
                    "listens on {address}, a port that is held for the service {to}: choose another, or set `hold_service_port = false`"
                ),
            );
        }
    }
}

fn same_name(inbound: &Inbound) -> String {
    let Inbound { listen, server_name, .. } = inbound;
    match server_name {
        Some(name) => format!("has two blocks on {listen} for `{name}`: each name leads to one service"),
        None => format!("has two blocks on {listen} without a `server_name`: tell them apart by one"),
    }
}

/// A port cannot be the agent's, or be refused by it, and be open in plaintext as well.
fn plaintext_conflicts(config: &Config, say: &mut dyn FnMut(&'static str, String)) {
    let tcp = config.declared.plaintext.iter().filter(|p| p.protocol == Protocol::Tcp);
    for Plaintext { port, .. } in tcp {
        for inbound in &config.inbound {
            if inbound.listen.port() == *port && !inbound.listen.ip().is_loopback() {
                say(
                    "declared.plaintext",
                    format!("names {port}, where `inbound` takes mutual TLS on {}", inbound.listen),
                );
            }
            if inbound.to.address().is_some_and(|to| to.port() == *port) && inbound.hold_service_port {
                say(
                    "declared.plaintext",
                    format!("names {port}, which is held for {}: set `hold_service_port = false` there", inbound.to),
                );
            }
        }
    }
}

/// What the packet rules of `[intercept]` cannot do, or what would get past them.
fn intercept_contradictions(config: &Config, say: &mut dyn FnMut(&'static str, String)) {
    const NOBODY: u32 = u32::MAX;
    match config.intercept.gid {
        None => say(
            "intercept.gid",
            "is missing: choose a group for the agent alone, like 13100, and run the agent with it".into(),
        ),
        Some(0 | NOBODY) => {
            say("intercept.gid", "must be a group that nobody else has: root has 0, and 4294967295 is none".into());
        }
        Some(gid) if config.exec.user.is_some_and(|user| user.gid == gid) => {
            say("exec.user", format!("has the group {gid} of `intercept.gid`: the command would pass as the agent"));
        }
        Some(_) => {}
    }
    if config.intercept.inbound == Inward::Lock {
        lock_contradictions(config, say);
    }
    if config.intercept.outbound == Outward::Redirect && config.egress.redirected_to() == [None, None] {
        say(
            "intercept.outbound",
            "redirects to 127.0.0.1 and ::1, where nothing listens: set `egress.transparent_listen`, like [\"127.0.0.1:15001\", \"[::1]:15001\"]".into(),
        );
    }
}

fn bypass_contradictions(intercept: &Intercept, say: &mut dyn FnMut(&'static str, String)) {
    if intercept.outbound == Outward::Off && !intercept.bypass.is_empty() {
        say("intercept.bypass", "is set while `intercept.outbound` is off: there is nothing to go past".into());
    }
    for Bypass { to, port, reason, .. } in &intercept.bypass {
        if *port == Some(0) {
            say("intercept.bypass", format!("to {to} names port 0, which is none: leave `port` out for every port"));
        }
        if port.is_none() && to.is_everything() {
            say(
                "intercept.bypass",
                format!("to {to} lets everything past: name ports, or set `intercept.outbound = \"off\"`"),
            );
        }
        if reason.trim().is_empty() {
            say("intercept.bypass", format!("to {to} needs a `reason`: why must it go past the agent?"));
        }
    }
}

fn lock_contradictions(config: &Config, say: &mut dyn FnMut(&'static str, String)) {
    if config.intercept.refuse_port == 0 {
        say("intercept.refuse_port", "must be a port: the rules name it".into());
    }
    for inbound in config.inbound.iter().filter(|inbound| inbound.listen.port() == 0) {
        say("inbound", format!("listens on {}, a port that no rule can name: choose one", inbound.listen));
    }
    let declared = |port: u16| config.declared.plaintext.iter().any(|p| p.port == port && p.protocol == Protocol::Tcp);
    let mut plain: Vec<(&'static str, SocketAddr)> = vec![("admin.listen", config.admin.listen)];
    plain.extend(config.outbound.iter().map(|outbound| ("outbound", outbound.listen)));
    plain.extend(config.egress.listeners());
    for (key, listen) in plain.into_iter().filter(|(_, l)| !l.ip().is_loopback() && !declared(l.port())) {
        say(
            key,
            format!(
                "listens on {listen}, which `intercept.inbound = \"lock\"` closes: use a loopback address, or list the port in [[declared.plaintext]]"
            ),
        );
    }
    for port in config.declared.ports.iter().filter(|port| !declared(**port)) {
        say(
            "declared.ports",
            format!(
                "names {port}, which `intercept.inbound = \"lock\"` closes: lead there by an [[inbound]], or list it in [[declared.plaintext]] with a reason"
            ),
        );
    }
}

/// Whether one of them takes the other's connections.
fn overlaps(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port() && a.port() != 0 && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
}

fn value_faults(config: &Config, say: &mut dyn FnMut(&'static str, String)) {
    let Timeouts { handshake, connect, half_closed, .. } = config.timeouts;
    for (key, value) in [
        ("timeouts.handshake", handshake),
        ("timeouts.connect", connect),
        ("timeouts.half_closed", half_closed),
        ("watch.tick", config.watch.tick),
        ("watch.posture_interval", config.watch.posture_interval),
    ] {
        if value.is_zero() {
            say(key, "must be more than zero: every wait has a limit".into());
        }
    }
    for (key, value) in [
        ("limits.max_connections", config.limits.max_connections),
        ("limits.max_handshakes", config.limits.max_handshakes),
    ] {
        if value == 0 {
            say(key, "must be more than zero: nothing would get in".into());
        }
    }
    if config.tls.groups.is_empty() {
        say("tls.groups", "is empty: without a key exchange there is no TLS".into());
    }
    if config.limits.spool.0 < MIN_SPOOL {
        say("limits.spool", "must be at least 4MiB".into());
    }
    for fault in config.declared.faults() {
        say("declared", fault);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        [collector]
        addresses = ["collector:7443"]
        token_file = "/run/sidewarden/token"
        [[inbound]]
        listen = "0.0.0.0:8443"
        to = "127.0.0.1:8080"
        allow = ["spiffe://td/shop/web"]
        [[outbound]]
        listen = "127.0.0.1:3306"
        to = "db:8443"
        peer = "spiffe://td/shop/db"
        [exec]
        user = "10001:10002"
    "#;

    fn no_env(_: &str) -> Option<String> {
        None
    }

    fn check(text: &str, expected: &[&str]) {
        let faults = match Config::parse(text, &no_env) {
            Ok(_) => Vec::new(),
            Err(Faults(faults)) => faults,
        };
        for part in expected {
            assert!(faults.iter().any(|fault| fault.contains(part)), "no fault says `{part}`: {faults:#?}\n{text}");
        }
        assert_eq!(faults.len(), expected.len(), "{faults:#?}\n{text}");
    }

    fn changed(from: &str, to: &str) -> String {
        assert!(GOOD.contains(from), "{from}");
        GOOD.replace(from, to)
    }

    #[test]
    fn a_good_file_is_read() {
        let config = Config::parse(GOOD, &no_env).unwrap();
        assert_eq!(config.inbound[0].dial_from, DIAL_FROM);
        assert!(config.inbound[0].hold_service_port);
        assert_eq!(config.outbound[0].peer, Peer::Workload("spiffe://td/shop/db".parse().unwrap()));
        assert_eq!(config.exec.user, Some(User { uid: 10001, gid: 10002 }));
    }

    #[test]
    fn a_dns_name_is_called_as_the_policy_calls_it_however_it_is_spelled() {
        let text = changed("peer = \"spiffe://td/shop/db\"", "peer_dns = \"DB.Example.com.\"");
        let text = text.replace("allow = [", "allow_dns = [\"API.partner.example.\"]\nallow = [");
        let config = Config::parse(&text, &no_env).unwrap();
        assert_eq!(config.outbound[0].peer, Peer::Dns("db.example.com".into()));
        assert_eq!(config.inbound[0].allow_dns, ["api.partner.example"]);
    }

    #[test]
    fn contradictions_are_found() {
        check(GOOD, &[]);
        check("", &["`collector.addresses` is missing"]);
        check(&changed("127.0.0.1:8080", "127.0.0.1:8443"), &["which is itself", "held for the service"]);
        check(&changed("127.0.0.1:3306", "127.0.0.1:9901"), &["`admin.listen` has already"]);
        check(&changed("127.0.0.1:3306", "0.0.0.0:3306"), &["`expose = true`"]);
        check(&changed("127.0.0.1:3306", "127.0.0.1:8443"), &["`inbound` has already, as 0.0.0.0:8443"]);
        check(&changed("peer = \"spiffe://td/shop/db\"", ""), &["say who must answer"]);
        check(&changed("peer = ", "peer_dns = \"db.example\"\npeer = "), &["exclude each other"]);
        check(&changed("allow = [\"spiffe://td/shop/web\"]", ""), &["allows nobody"]);
        check(&changed("127.0.0.1:8080", "[::1]:8080"), &["of the other IP version"]);
        check(&changed("10001:10002", "root"), &["`exec.user` must be numbers"]);
        let api = |text: &str| format!("{}[identity]\nworkload_api = \"{text}\"\n", GOOD.replace("token_file", "#"));
        check(&api("unix:///run/spire/agent.sock"), &[]);
        check(&api("tcp://127.0.0.1:8000"), &["`identity.workload_api` must be unix:// and an absolute path"]);
        check(&format!("{}cert = \"/tls.crt\"", api("unix:///a.sock")), &["comes from one place"]);
        check(&format!("{GOOD}[trust]\ncrl_mode = \"lenient\""), &["is about `crls`, which is not set"]);
        check(&format!("{GOOD}[trust]\ncrls = \"/x\"\ncrl_mode = \"lax\""), &["must be \"strict\" or \"lenient\""]);
        let files = |text: &str| format!("{GOOD}[identity]\ncert = \"/tls.crt\"\n{text}");
        check(&files(""), &["needs all three"]);
        check(&files("key = \"/tls.key\"\nroots = \"/ca.crt\""), &["`identity` and `collector.token_file` exclude"]);
        check(&format!("{GOOD}[tls]\ngroups = []"), &["`tls.groups` is empty"]);
        check(
            &format!("{GOOD}[tls]\ngroups = [\"x448\"]"),
            &["`x448` is no group that is spoken here: X25519MLKEM768"],
        );
        check(
            &format!("{GOOD}[timeouts]\nhandshake = \"0s\"\n[limits]\nspool = \"1MiB\""),
            &["more than zero", "4MiB"],
        );
    }

    /// The good file with more in its inbound block.
    fn inbound_with(more: &str) -> String {
        changed("allow = [", &format!("{more}\nallow = ["))
    }

    fn outbound_with(more: &str) -> String {
        changed("peer = ", &format!("{more}\npeer = "))
    }

    /// The good file with a second inbound block.
    fn second_inbound(first: &str, second: &str) -> String {
        let block = "[[inbound]]\nto = \"127.0.0.1:8081\"\nallow = [\"spiffe://td/shop/web\"]\n";
        format!("{}\n{block}{second}", inbound_with(first))
    }

    #[test]
    fn what_an_inbound_block_may_say_is_read() {
        let text = inbound_with(
            r#"
            server_name = "Orders.Example"
            proxy_protocol = "v2"
            accept_proxy_protocol_from = ["10.0.0.0/24", "fd00::1"]
            max_bytes_per_second = "100MiB"
            max_bytes_per_second_each = "10MiB"
            "#,
        );
        let inbound = &Config::parse(&text, &no_env).unwrap().inbound[0];
        assert_eq!(inbound.server_name.as_deref(), Some("orders.example"));
        assert_eq!(inbound.proxy_protocol, ProxyProtocol::V2);
        assert_eq!(inbound.accept_proxy_protocol_from.len(), 2);
        assert_eq!(inbound.rates, Rates { all: NonZeroU64::new(100 << 20), each: NonZeroU64::new(10 << 20) });
        let text = changed("127.0.0.1:8080", "unix:/run/app.sock");
        assert_eq!(Config::parse(&text, &no_env).unwrap().inbound[0].to, Service::Unix("/run/app.sock".into()));
    }

    #[test]
    fn what_an_outbound_block_may_say_is_read() {
        let text = changed("\"db:8443\"", r#"["db1:8443", "db2:8443"]"#)
            .replace("peer = ", "balance = \"least_connections\"\nserver_name = \"db.example\"\npeer = ");
        let outbound = &Config::parse(&text, &no_env).unwrap().outbound[0];
        assert_eq!((outbound.name().as_str(), outbound.balance), ("db1:8443,db2:8443", Balance::LeastConnections));
        assert_eq!(outbound.server_name.as_deref(), Some("db.example"));
        assert_eq!(Config::parse(GOOD, &no_env).unwrap().outbound[0].name(), "db:8443");
    }

    #[test]
    fn permissive_has_a_reason_and_an_end() {
        let permissive = |inside: &str| inbound_with(&format!("permissive = {{ {inside} }}"));
        let read = |inside: &str| Config::parse(&permissive(inside), &no_env).unwrap().inbound[0].permissive.clone();
        let whole_day = read(r#"reason = "moving", until = "2027-01-31""#).unwrap();
        assert_eq!(whole_day.until.to_string(), "2027-02-01T00:00:00.000Z");
        let moment = read(r#"reason = "moving", until = "2027-01-31T12:00:00Z", silent_after = "1s""#).unwrap();
        assert_eq!(moment.until.to_string(), "2027-01-31T12:00:00.000Z");
        check(&permissive(r#"reason = "moving""#), &["`inbound[0].permissive.until` is missing"]);
        check(&permissive(r#"until = "2027-01-31""#), &["`inbound[0].permissive.reason` is missing"]);
        check(&permissive(r#"reason = " ", until = "2027-01-31""#), &["say why plaintext has to be let in"]);
        for until in ["soon", "2027-13-01", "2027-1-1", "31.1.2027", "2027-01-31T12:00", ""] {
            check(&permissive(&format!(r#"reason = "x", until = "{until}""#)), &["must be a day, like 2027-01-31"]);
        }
        check(
            &permissive(r#"reason = "x", until = "2027-01-31", silent_after = "5s""#),
            &["not below `timeouts.handshake`"],
        );
        check(&inbound_with("permissive = true"), &["must be a table"]);
        check(
            &inbound_with("server_name = \"a.example\"\npermissive = { reason = \"x\", until = \"2027-01-31\" }"),
            &["plaintext asks for no name"],
        );
        let locked = "[intercept]\ninbound = \"lock\"\ngid = 13100\n";
        let both = permissive(r#"reason = "x", until = "2027-01-31""#) + locked;
        check(&both, &["lock once every client is moved"]);
    }

    #[test]
    fn what_images_may_be_and_who_answers_for_what_is_read() {
        let promises = "[images]\ntrusted = [\"r.example/\"]\nmax_age = \"90d\"\n[declared]\nswarm = true\n\
            [[waiver]]\ncheck = \"user\"\ncontainer = \"db*\"\nby = \"me\"\nwhy = \"it must\"\nuntil = \"2027-01-31\"\n\
            [[attestation]]\ncheck = \"swarm-planes\"\nby = \"me\"\nwhy = \"seen\"\nuntil = \"2027-01-31\"\n";
        let declared = Config::parse(&format!("{GOOD}{promises}"), &no_env).unwrap().declared;
        assert_eq!((declared.images.trusted.len(), declared.swarm), (1, true));
        assert_eq!(declared.images.max_age, Some(Duration::from_secs(90 * 86_400)));
        assert_eq!(
            (declared.waivers[0].check.as_str(), declared.waivers[0].container.as_deref()),
            ("user", Some("db*"))
        );
        assert_eq!(declared.attestations.len(), 1);
        check(&format!("{GOOD}{}", promises.replace("\"user\"", "\"usr\"")), &["there is no check `usr`"]);
        check(&format!("{GOOD}{}", promises.replacen("\"it must\"", "\" \"", 1)), &["who answers for it"]);
        check(&format!("{GOOD}[[waiver]]\ncheck = \"user\"\n"), &["waiver[0].by", "waiver[0].why", "waiver[0].until"]);
    }

    #[test]
    fn who_may_come_in_as_root_is_read_with_a_reason() {
        let text = |more: &str| format!("{GOOD}[[declared.root_exec]]\ncommand = \"pg_dump --all\"\n{more}");
        let good = text("reason = \"the backup\"\ncontainer = \"db*\"\n");
        let declared = Config::parse(&good, &no_env).unwrap().declared;
        assert_eq!(declared.root_execs[0].container.as_deref(), Some("db*"));
        check(&text(""), &["`declared.root_exec[0].reason` is missing"]);
        check(&good.replace("pg_dump --all", "/bin/sh"), &["may do anything"]);
        check(&good.replace("the backup", " "), &["needs a `reason`"]);
    }

    #[test]
    fn one_look_needs_no_collector() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        std::fs::write(&path, "[node]\nsocket = \"/x.sock\"\n[declared]\nports = [8443]\n").unwrap();
        let config = Config::load_for_checks(Some(&path), &no_env).unwrap();
        assert_eq!((config.node.socket.as_path(), config.declared.ports), (Path::new("/x.sock"), vec![8443]));
        assert!(Config::load_for_checks(None, &no_env).is_ok());
        std::fs::write(&path, "[declared]\ncapabilities = [\"CAP_EVERYTHING\"]\n").unwrap();
        assert!(Config::load_for_checks(Some(&path), &no_env).is_err());
    }

    #[test]
    fn who_asks_a_running_agent_needs_no_more_than_its_address() {
        let (dir, env) = (tempfile::tempdir().unwrap(), |name: &str| {
            (name == "SIDEWARDEN_ADMIN_LISTEN").then(|| "127.0.0.1:9".to_owned())
        });
        let path = dir.path().join("agent.toml");
        std::fs::write(&path, "half = 1\n[admin]\nlisten = \"127.0.0.1:7\"\n[inbound]\n").unwrap();
        let listen = |path, env| Admin::load(path, env).map(|admin| admin.listen.port());
        assert_eq!(listen(Some(&path), &no_env).unwrap(), 7);
        assert_eq!(listen(Some(&path), &env).unwrap(), 9);
        assert_eq!(listen(None, &no_env).unwrap(), 9901);
        std::fs::write(&path, "[admin]\nlisten = \"nowhere\"").unwrap();
        assert!(listen(Some(&path), &no_env).unwrap_err().to_string().contains("`admin.listen` must be"));
        assert!(listen(Some(&dir.path().join("other")), &no_env).is_err(), "a file that was named must be there");
    }

    #[test]
    fn blocks_that_share_a_listener_are_told_apart() {
        let here = "listen = \"0.0.0.0:8443\"\n";
        let named = |name: &str| format!("{here}server_name = \"{name}\"");
        check(&second_inbound("", &named("a.example")), &[]);
        check(&second_inbound("server_name = \"b.example\"", &named("a.example")), &[]);
        check(&second_inbound("", here), &["without a `server_name`: tell them apart"]);
        check(&second_inbound("server_name = \"a.example\"", &named("A.example")), &["for `a.example`: each name"]);
        check(
            &second_inbound("accept_proxy_protocol_from = [\"10.0.0.1\"]", &named("a.example")),
            &["different `accept_proxy_protocol_from`"],
        );
        let elsewhere = "listen = \"127.0.0.1:8443\"\nserver_name = \"a.example\"";
        check(&second_inbound("", elsewhere), &["`inbound` has already, as 0.0.0.0:8443"]);
        for name in ["", "a..example", "10.0.0.1", "*.example", "a.*.example", "*", "a.example.", "a b"] {
            check(&inbound_with(&format!("server_name = \"{name}\"")), &["must be a host name"]);
        }
        check(&inbound_with("server_name = \"*.shop.example\""), &[]);
    }

    #[test]
    fn the_variable_of_spiffe_counts_where_nothing_else_says_who_this_is() {
        let env = |name: &str| (name == "SPIFFE_ENDPOINT_SOCKET").then(|| "unix:///run/spire/agent.sock".to_owned());
        let identity = |text: &str| Config::parse(text, &env).unwrap().identity;
        let bare = "collector.addresses = [\"collector:7443\"]\n";
        let ambient = Some(Elsewhere::WorkloadApi("unix:///run/spire/agent.sock".parse().unwrap()));
        assert_eq!(identity(bare), ambient);
        assert_eq!(identity(&format!("{bare}collector.token_file = \"/token\"")), None);
        let own = identity(&format!("{bare}identity.workload_api = \"unix:///own.sock\""));
        assert_eq!(own, Some(Elsewhere::WorkloadApi("unix:///own.sock".parse().unwrap())));
        let wrong = |_: &str| Some("tcp://x".to_owned());
        let only = |name: &str| if name == "SPIFFE_ENDPOINT_SOCKET" { wrong(name) } else { None };
        let faults = Config::parse(bare, &only).unwrap_err().to_string();
        assert!(faults.contains("`SPIFFE_ENDPOINT_SOCKET` must be unix://"), "{faults}");
    }

    #[test]
    fn new_keys_are_told_what_is_wrong_with_them() {
        check(&changed("127.0.0.1:8080", "unix:app.sock"), &["an absolute path of at most 107 bytes"]);
        check(&changed("127.0.0.1:8080", &format!("unix:/{}", "x".repeat(107))), &["an absolute path"]);
        check(&changed("127.0.0.1:8080", "/run/app.sock"), &["or unix:/path/to/socket"]);
        let unix = changed("127.0.0.1:8080", "unix:/run/app.sock");
        check(
            &unix.replace("allow = [", "hold_service_port = false\ndial_from = \"127.0.0.6\"\nallow = ["),
            &["`inbound[0].hold_service_port` is about a port", "`inbound[0].dial_from` is about a port"],
        );
        check(&inbound_with("proxy_protocol = \"v3\""), &["must be off, v1 or v2"]);
        let all = "insecure_trust_all = { reason = \"old\", until = \"2027-01-31\" }";
        check(&inbound_with(all), &[]);
        check(&outbound_with(all), &[]);
        check(
            &inbound_with("insecure_trust_all = {}"),
            &["insecure_trust_all.reason` is missing", "insecure_trust_all.until` is missing"],
        );
        check(
            &outbound_with("insecure_trust_all = { reason = \" \", until = \"soon\" }"),
            &["is empty: say why", "must be a day"],
        );
        check(&inbound_with("insecure_trust_all = true"), &["must be a table"]);
        check(&inbound_with("accept_proxy_protocol_from = [\"10.0.0.1/24\"]"), &["bits set beyond"]);
        check(&outbound_with("balance = \"random\""), &["must be round_robin or least_connections"]);
        check(&changed("\"db:8443\"", "[]"), &["is an empty list"]);
        check(&changed("\"db:8443\"", "[\"db\"]"), &["(item 1) must be host:port"]);
        check(&outbound_with("server_name = \"*.db.example\""), &["one name, without `*`"]);
        let foreign =
            changed("peer = \"spiffe://td/shop/db\"", "peer_dns = \"db.example\"\nserver_name = \"x.example\"");
        check(
            &format!("{foreign}[trust]\ndns_roots = \"/x.pem\""),
            &["`peer_dns`, which is the name that is asked for"],
        );
        check(
            &second_inbound("", "listen = \"0.0.0.0:9443\"").replace("127.0.0.1:8081", "127.0.0.1:8080"),
            &["127.0.0.1:8080 is led to twice"],
        );
    }

    #[test]
    fn egress_without_contradictions_is_read_and_with_them_refused() {
        let good = GOOD.to_owned()
            + "[egress]\nlisten = '127.0.0.1:3128'\ntransparent_listen = ['127.0.0.1:15001', '[::1]:15001']\n\
               allow = ['api.example.com:443', '10.0.0.0/8:5432,5433']\nupstream = 'proxy:3128'\n\
               upstream_credentials_file = '/run/proxy'\nupstream_resolves = true\n";
        let egress = Config::parse(&good, &no_env).unwrap().egress;
        assert_eq!((egress.allow.rules.len(), egress.transparent_listen.len()), (2, 2));
        let env = |name: &str| (name == "SIDEWARDEN_EGRESS_ALLOW").then(|| "a.example:80,443,b.example:22".to_owned());
        assert_eq!(Config::parse(&good, &env).unwrap().egress.allow.rules.len(), 2);
        let with = |text: &str| format!("{GOOD}[egress]\n{text}\n");
        check(&with("allow = ['a.example:443']"), &["nothing listens"]);
        check(&with("listen = '0.0.0.0:3128'"), &["`egress.listen` listens on 0.0.0.0:3128"]);
        check(&with("listen = '0.0.0.0:3128'\nexpose = true"), &[]);
        check(&with("transparent_listen = ['[::]:15001']"), &["`egress.transparent_listen` listens on [::]:15001"]);
        check(&with("listen = '127.0.0.1:3306'"), &["`outbound` has already"]);
        check(&with("listen = '127.0.0.1:1'\ntransparent_listen = ['127.0.0.1:1']"), &["`egress.listen` has already"]);
        check(&with("listen = '127.0.0.1:1'\nupstream = '127.0.0.1:1'"), &["own egress listener"]);
        check(&with("listen = '127.0.0.1:1'\nupstream_resolves = true"), &["without `egress.upstream`"]);
        check(&with("listen = '127.0.0.1:1'\nupstream_credentials_file = '/x'"), &["without `egress.upstream`"]);
        check(
            &with("listen = '127.0.0.1:1'\nallow = ['a.example', 'b.example:1', '*:443']"),
            &["`egress.allow` (item 1) must be whom and a port", "`egress.allow` (item 3) `*` is no name"],
        );
        check(&with("listen = '127.0.0.1:1'\nalow = []"), &["did you mean `allow`"]);
    }

    #[test]
    fn plaintext_ports_have_a_reason_and_are_nobody_elses() {
        let plaintext = |more: &str| format!("{GOOD}[[declared.plaintext]]\nport = 5222\n{more}");
        check(&plaintext("reason = \"old client\""), &[]);
        check(&plaintext("protocol = \"udp\"\nreason = \"DNS\""), &[]);
        check(&plaintext(""), &["`declared.plaintext[0].reason` is missing"]);
        check(&plaintext("reason = \"  \""), &["needs a `reason`"]);
        check(&plaintext("reason = \"x\"\nprotocol = \"sctp\""), &["\"tcp\" or \"udp\""]);
        check(&plaintext("reason = \"x\"").replace("5222", "8443"), &["`inbound` takes mutual TLS"]);
        check(&plaintext("reason = \"x\"").replace("5222", "8080"), &["held for 127.0.0.1:8080"]);
    }

    #[test]
    fn rules_that_would_be_got_past_are_refused() {
        let lock = |more: &str| format!("{GOOD}[intercept]\ninbound = \"lock\"\n{more}");
        check(&lock("gid = 13100"), &[]);
        check(&lock(""), &["`intercept.gid` is missing"]);
        check(&lock("gid = 0"), &["root has 0"]);
        check(&lock("gid = 4294967295"), &["nobody else has"]);
        check(&lock("gid = 10002"), &["would pass as the agent"]);
        check(&lock("gid = 13100\nrefuse_port = 0"), &["must be a port"]);
        check(&lock("gid = 13100\nrefuse_port = 8443"), &["`inbound` has already"]);
        check(&lock("gid = 13100\nrefuse_port = 8080"), &["held for the service"]);
        check(&lock("gid = 13100").replace("0.0.0.0:8443", "0.0.0.0:0"), &["no rule can name"]);
        check(&lock("gid = 13100\n[declared]\nports = [9443]"), &["`declared.ports` names 9443"]);
        let admin = lock("gid = 13100\n[admin]\nlisten = \"0.0.0.0:9901\"");
        check(&admin, &["`admin.listen` listens on 0.0.0.0:9901"]);
        check(&format!("{admin}\n[[declared.plaintext]]\nport = 9901\nreason = \"scraped by Prometheus\""), &[]);
        check(&format!("{GOOD}[intercept]\ninbound = \"shut\""), &["\"off\" or \"lock\""]);
        check(&format!("{GOOD}[intercept]\ngid = 0"), &[]);
        check(
            &lock("gid = 13100\n[egress]\nlisten = \"0.0.0.0:3128\"\nexpose = true"),
            &["`egress.listen` listens on"],
        );
    }

    #[test]
    fn ways_out_that_cannot_work_or_hide_nothing_are_refused() {
        let out = |more: &str| format!("{GOOD}[intercept]\ngid = 13100\noutbound = {more}");
        let bypass = |more: &str| out(&format!("\"block\"\n[[intercept.bypass]]\n{more}"));
        check(&out("\"block\""), &[]);
        check(&out("\"open\""), &["\"off\", \"block\" or \"redirect\""]);
        check(&out("\"redirect\""), &["set `egress.transparent_listen`"]);
        let listen =
            |addresses: &str| out(&format!("\"redirect\"\n[egress]\nexpose = true\ntransparent_listen = {addresses}"));
        check(&listen("[\"127.0.0.1:15001\"]"), &[]);
        check(&listen("[\"[::]:15001\"]"), &[]);
        check(&listen("[\"10.0.0.5:15001\"]"), &["set `egress.transparent_listen`"]);
        let dns = "to = \"10.96.0.10\"\nprotocol = \"udp\"\nport = 53\nreason = \"DNS of the cluster\"";
        check(&bypass(dns), &[]);
        check(&bypass(dns).replace("\"block\"", "\"off\""), &["nothing to go past"]);
        check(&bypass(&dns.replace("53", "0")), &["names port 0"]);
        check(&bypass(&dns.replace("DNS of the cluster", "")), &["needs a `reason`"]);
        check(&bypass(&dns.replace("10.96.0.10", "10.96.0.10/8")), &["`intercept.bypass[0].to`"]);
        check(&bypass("to = \"0.0.0.0/0\"\nreason = \"x\""), &["lets everything past"]);
        check(&bypass("to = \"::/0\"\nport = 53\nreason = \"x\""), &[]);
        check(&bypass("to = \"::/0\"\nport = 53"), &["`intercept.bypass[0].reason` is missing"]);
    }

    #[test]
    fn redirected_connections_are_taken_where_the_kernel_sends_them() {
        let ports = |listen: &[&str]| {
            let transparent_listen = listen.iter().map(|address| address.parse().unwrap()).collect();
            Egress { transparent_listen, ..Egress::default() }.redirected_to()
        };
        assert_eq!(ports(&["127.0.0.1:1", "[::1]:2"]), [Some(1), Some(2)]);
        assert_eq!(ports(&["0.0.0.0:1"]), [Some(1), None]);
        assert_eq!(ports(&["[::]:1"]), [Some(1), Some(1)]);
        assert_eq!(ports(&["127.0.0.2:1", "[::ffff:127.0.0.1]:2"]), [Some(2), None]);
    }

    #[test]
    fn all_faults_come_at_once() {
        let text = changed("addresses", "adresses") + "[admin]\nlisten = \"nowhere\"\n[limits]\nmax_handshakes = 0";
        check(
            &text,
            &[
                "did you mean `addresses`",
                "`collector.addresses` is missing",
                "`admin.listen` must be",
                "max_handshakes",
            ],
        );
    }

    #[test]
    fn the_environment_overrides_the_file() {
        let env = |name: &str| (name == "SIDEWARDEN_TIMEOUTS_DRAIN").then(|| "3s".to_owned());
        assert_eq!(Config::parse(GOOD, &env).unwrap().timeouts.drain, Duration::from_secs(3));
    }

    #[test]
    fn the_example_shows_the_defaults() {
        let text = include_str!("../../deploy/agent.toml");
        let mut config = Config::parse(text, &no_env).unwrap();
        assert_eq!(config.collector.addresses.len(), 1);
        config.collector.addresses.clear();
        assert_eq!(config, Config::default());
        let all = [
            "data_dir",
            "instance",
            "addresses",
            "token_file",
            "workload",
            "listen",
            "to",
            "allow",
            "allow_dns",
            "hold_service_port",
            "dial_from",
            "server_name",
            "proxy_protocol",
            "accept_proxy_protocol_from",
            "max_bytes_per_second",
            "max_bytes_per_second_each",
            "permissive",
            "insecure_trust_all",
            "balance",
            "peer",
            "peer_dns",
            "expose",
            "transparent_listen",
            "upstream",
            "upstream_credentials_file",
            "upstream_resolves",
            "dns_roots",
            "bundles",
            "crls",
            "crl_mode",
            "trust_domain",
            "workload_api",
            "cert",
            "key",
            "roots",
            "groups",
            "user",
            "tick",
            "posture_interval",
            "subject",
            "healthchecks",
            "shells",
            "capabilities",
            "ports",
            "port",
            "protocol",
            "reason",
            "gid",
            "inbound",
            "refuse_port",
            "outbound",
            "ulimits",
            "mounts",
            "devices",
            "cgroup_parent",
            "max_connections",
            "max_handshakes",
            "max_handshakes_per_source",
            "max_new_connections_per_source",
            "spool",
            "handshake",
            "connect",
            "idle",
            "half_closed",
            "drain",
            "max_connection_age",
        ];
        for key in all {
            let shown = text.lines().any(|line| line.trim_start_matches(['#', ' ']).starts_with(&format!("{key} = ")));
            assert!(shown, "`{key}` is missing in deploy/agent.toml");
        }
    }
}
