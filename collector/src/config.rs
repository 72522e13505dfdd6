//! Every setting of the collector, with its default. None is needed to start.
//!
//! `deploy/collector.toml` shows them all with a comment each; a test keeps it equal to the defaults here.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sidewarden_proto::config::{Bytes, Env, Faults, HostPort, Reader, load};
use sidewarden_proto::given::Elsewhere;
use sidewarden_proto::given::files::Pair;
use sidewarden_proto::identity::TrustDomain;
use sidewarden_proto::secret::Secret;

use crate::alert;
use crate::evidence;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// All settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// CA, log, index, tokens.
    pub data_dir: PathBuf,
    /// The trust domain this collector issues identities for. Fixed by the first start.
    pub trust_domain: TrustDomain,
    /// The collector's own name among the instances of `sidewarden/collector`; the hostname when empty.
    pub instance: String,
    /// Life of agents' certificates.
    pub certificate_life: Duration,
    /// How long after its end a certificate may still be renewed with its own key.
    pub grace: Duration,
    /// How long a stop may take.
    pub drain_timeout: Duration,
    /// The CA's keys.
    pub ca: Ca,
    /// Where somebody else keeps a further identity of this collector, for agents that do not trust its CA.
    pub identity: Option<Elsewhere>,
    /// Where agents come in.
    pub agents: Agents,
    /// The HTTPS API and the page.
    pub api: Api,
    /// `/metrics`.
    pub metrics: Metrics,
    /// Who is told of alerts.
    pub alerts: alert::Config,
    /// How long events are kept.
    pub retention: Retention,
    /// What scans and attestations must be like.
    pub evidence: evidence::Config,
}

/// The CA's keys.
#[derive(Clone, Debug)]
pub struct Ca {
    /// The passphrase that seals them. Without one the systemd credential `sidewarden-ca-passphrase` counts, and without
    /// that they are plain.
    pub passphrase_file: Option<PathBuf>,
    /// The collector that has the root's key, where this one has only an issuing CA under it.
    pub leader: Option<HostPort>,
}

/// Where agents come in.
#[derive(Clone, Debug)]
pub struct Agents {
    /// QUIC (UDP) and TLS (TCP), the same number.
    pub listen: SocketAddr,
    /// How long a handshake and the first frame may take.
    pub handshake_timeout: Duration,
    /// Most handshakes at a time.
    pub max_handshakes: usize,
    /// Most connections at a time.
    pub max_connections: usize,
    /// Most links (batches) a second of one agent; it is slowed down to this, nothing is lost.
    pub max_links_per_second: u32,
    /// Other trust domains whose agents may come in.
    pub trust_domains: Vec<TrustDomain>,
}

/// The HTTPS API and the page.
#[derive(Clone, Debug)]
pub struct Api {
    /// HTTPS.
    pub listen: SocketAddr,
    /// DNS names and addresses in its certificate.
    pub names: Vec<String>,
    /// A certificate of somebody else's CA to show instead of our own.
    pub certificate: Option<Pair>,
}

/// `/metrics`.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// HTTP, or HTTPS when `tls` is set.
    pub listen: SocketAddr,
    /// HTTPS with the collector's own certificate.
    pub tls: bool,
    /// A bearer token that scrapers must show.
    pub token: Option<Secret>,
}

/// How long events are kept. Whatever is reached first.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    /// Days.
    pub days: u32,
    /// Bytes of batches, compressed as sent.
    pub bytes: Bytes,
}

impl Retention {
    /// The days as a duration.
    pub fn age(&self) -> Duration {
        DAY * self.days
    }
}

impl Default for Config {
    fn default() -> Config {
        read("", &|_| None).expect("the defaults have no faults")
    }
}

/// Reads `text` (TOML), each key overridden by the environment.
pub fn read(text: &str, env: Env<'_>) -> Result<Config, Faults> {
    load(text, env, config)
}

/// Reads the file at `path`; without one, only the environment counts.
pub fn read_file(path: Option<&Path>, env: Env<'_>) -> anyhow::Result<Config> {
    let text = match path {
        Some(path) => {
            std::fs::read_to_string(path).map_err(|e| anyhow::anyhow!("configuration {}: {e}", path.display()))?
        }
        None => String::new(),
    };
    Ok(read(&text, env)?)
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("the defaults are addresses")
}

fn config(reader: &mut Reader<'_>) -> Config {
    let trust_domain: TrustDomain = "sidewarden.internal".parse().expect("the default is a trust domain");
    let config = Config {
        data_dir: reader.value("data_dir", PathBuf::from("/var/lib/sidewarden-collector")),
        trust_domain: reader.value("trust_domain", trust_domain),
        instance: reader.value("instance", String::new()),
        certificate_life: reader.value("certificate_life", DAY),
        grace: reader.value("grace", 7 * DAY),
        drain_timeout: reader.value("drain_timeout", Duration::from_secs(10)),
        ca: reader.section("ca", ca),
        identity: reader.section("identity", Elsewhere::read),
        agents: reader.section("agents", agents),
        api: reader.section("api", api),
        metrics: reader.section("metrics", metrics),
        alerts: reader.section("alerts", alert::Config::read),
        retention: reader.section("retention", retention),
        evidence: reader.section("evidence", evidence::Config::read),
    };
    contradictions(reader, &config);
    config
}

fn ca(reader: &mut Reader<'_>) -> Ca {
    Ca { passphrase_file: reader.optional("passphrase_file"), leader: reader.optional("leader") }
}

fn agents(reader: &mut Reader<'_>) -> Agents {
    Agents {
        listen: reader.value("listen", address("0.0.0.0:7443")),
        handshake_timeout: reader.value("handshake_timeout", Duration::from_secs(10)),
        max_handshakes: reader.value("max_handshakes", 256),
        max_connections: reader.value("max_connections", 12_000),
        max_links_per_second: reader.value("max_links_per_second", 200),
        trust_domains: reader.value("trust_domains", Vec::new()),
    }
}

fn api(reader: &mut Reader<'_>) -> Api {
    let names = ["localhost", "127.0.0.1", "collector"].map(str::to_owned).to_vec();
    let (listen, names) = (reader.value("listen", address("0.0.0.0:7444")), reader.value("names", names));
    let certificate = match (reader.optional("cert"), reader.optional("key")) {
        (Some(cert), Some(key)) => Some(Pair { cert, key }),
        (None, None) => None,
        _ => {
            reader.fault("cert", "goes with `key`: a certificate needs both");
            None
        }
    };
    Api { listen, names, certificate }
}

fn metrics(reader: &mut Reader<'_>) -> Metrics {
    Metrics {
        listen: reader.value("listen", address("127.0.0.1:7445")),
        tls: reader.value("tls", false),
        token: reader.optional::<Secret>("token").filter(|token| !token.is_empty()),
    }
}

fn retention(reader: &mut Reader<'_>) -> Retention {
    Retention { days: reader.value("days", 30), bytes: reader.value("bytes", Bytes(16 << 30)) }
}

/// What is wrong only when two settings are seen together, or has a limit.
fn contradictions(reader: &mut Reader<'_>, config: &Config) {
    let listens = [
        ("agents.listen", config.agents.listen),
        ("api.listen", config.api.listen),
        ("metrics.listen", config.metrics.listen),
    ];
    for (i, (name, one)) in listens.iter().enumerate() {
        for (other_name, other) in listens.iter().skip(i + 1).filter(|(_, other)| collide(one, other)) {
            reader.fault(other_name, format!("is {other}, which {name} ({one}) has already"));
        }
    }
    if config.certificate_life < Duration::from_secs(60) || config.certificate_life > 90 * DAY {
        reader.fault("certificate_life", "must be from 1m to 90d");
    }
    if config.grace > 90 * DAY {
        reader.fault("grace", "must be at most 90d");
    }
    if config.retention.days == 0 {
        reader.fault("retention.days", "must be at least 1");
    }
    if config.retention.bytes.0 < 16 << 20 {
        reader.fault("retention.bytes", "must be at least 16MiB");
    }
    if !config.instance.is_empty()
        && let Err(error) = config.instance.parse::<sidewarden_proto::identity::InstanceId>()
    {
        reader.fault("instance", format!("is wrong: {error}"));
    }
    for (key, number) in [
        ("agents.max_handshakes", config.agents.max_handshakes),
        ("agents.max_connections", config.agents.max_connections),
        ("agents.max_links_per_second", config.agents.max_links_per_second as usize),
    ] {
        if number == 0 {
            reader.fault(key, "must be at least 1");
        }
    }
    if config.agents.trust_domains.contains(&config.trust_domain) {
        reader.fault("agents.trust_domains", "names others than `trust_domain`, whose agents may come in anyway");
    }
    if config.metrics.token.is_some() && !config.metrics.tls && !config.metrics.listen.ip().is_loopback() {
        reader.fault("metrics.token", "would cross the network in plain text: set metrics.tls = true");
    }
}

/// Whether two TCP listeners want the same port on the same address.
fn collide(one: &SocketAddr, other: &SocketAddr) -> bool {
    let same_ip = one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() == other.port() && one.port() != 0 && same_ip
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../deploy/collector.toml");

    fn faults(text: &str) -> Vec<String> {
        read(text, &|_| None).map(|_| Vec::new()).unwrap_or_else(|faults| faults.0)
    }

    #[test]
    fn the_example_file_shows_the_defaults() {
        let example = read(EXAMPLE, &|_| None).unwrap();
        assert_eq!(format!("{example:?}"), format!("{:?}", Config::default()));
    }

    #[test]
    fn the_example_file_shows_every_key() {
        // Keys that have no default stand there as comments.
        let keys = ["data_dir", "trust_domain", "instance", "certificate_life", "grace", "drain_timeout", "listen"];
        let more = ["handshake_timeout", "max_handshakes", "max_connections", "max_links_per_second", "names", "tls"];
        let last = ["token", "alertmanagers", "webhooks", "url", "ca_file", "log", "hold", "resend", "days", "bytes"];
        let further = ["workload_api", "cert", "key", "roots", "trust_domains"];
        let evidence = ["fail_on", "with_fix_only", "max_age", "folder", "attestor", "name", "key_file"];
        for key in
            keys.iter().chain(&more).chain(&last).chain(&evidence).chain(&["passphrase_file", "leader"]).chain(&further)
        {
            let shown = EXAMPLE.contains(&format!("{key} = ")) || EXAMPLE.contains(&format!("{key}]]"));
            assert!(shown, "{key} is not in deploy/collector.toml");
        }
    }

    #[test]
    fn every_fault_is_told_at_once() {
        let text = "trust_domian = 'x'\ngrace = '400d'\n[api]\nlisten = '0.0.0.0:7443'\n[retention]\nbytes = '1KiB'\ndays = 0\n[alerts]\nalertmanagers = ['am:9093']\n";
        let faults = faults(text).join("\n");
        let wanted = ["trust_domain", "`grace`", "api.listen", "retention.bytes", "retention.days", "http://"];
        wanted.iter().for_each(|word| assert!(faults.contains(word), "{word} is missing in:\n{faults}"));
    }

    #[test]
    fn an_identity_comes_whole_and_from_one_place() {
        for (text, wanted) in [
            ("[identity]\ncert = '/c'\nkey = '/k'\n", "needs all three"),
            ("[identity]\ncert = '/c'\nkey = '/k'\nroots = '/r'\nworkload_api = 'unix:///s'\n", "exclude each other"),
            ("[identity]\nworkload_api = 'tcp://h:1'\n", "must be unix://"),
            ("[api]\nkey = '/k'\n", "a certificate needs both"),
            ("trust_domain = 'x'\n[agents]\ntrust_domains = ['y', 'x']\n", "others than `trust_domain`"),
        ] {
            let found = faults(text);
            assert!(matches!(&found[..], [one] if one.contains(wanted)), "{found:?}");
        }
        let whole = "[identity]\ncert = '/c'\nkey = '/k'\nroots = '/r'\n[api]\ncert = '/c'\nkey = '/k'\n";
        let config = read(whole, &|_| None).unwrap();
        assert!(matches!(config.identity, Some(Elsewhere::Files(_))) && config.api.certificate.is_some());
    }

    #[test]
    fn a_metrics_token_never_crosses_the_network_in_plain_text() {
        assert_eq!(faults("[metrics]\nlisten = '0.0.0.0:7445'\ntoken = 'x'\n").len(), 1);
        assert!(faults("[metrics]\nlisten = '0.0.0.0:7445'\ntoken = 'x'\ntls = true\n").is_empty());
        assert!(faults("[metrics]\ntoken = 'x'\n").is_empty());
    }

    #[test]
    fn the_environment_overrides_the_file() {
        let env = |name: &str| (name == "SIDEWARDEN_TRUST_DOMAIN").then(|| "shop.example".to_owned());
        assert_eq!(read("trust_domain = 'other.example'", &env).unwrap().trust_domain.as_str(), "shop.example");
    }
}
