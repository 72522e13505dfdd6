//! What the agent counts, in Prometheus' words. Every label value is from a closed list.

use std::sync::atomic::Ordering::Relaxed;

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};
use rustls::pki_types::CertificateDer;
use sidewarden_proto::event::{Direction, RefusalReason, Severity};
use sidewarden_proto::finding::Verdict;
use sidewarden_proto::identity::PeerName;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls;

use crate::identity::Identity;
use crate::proxy::accounting::Traffic;
use crate::spool::SpoolStats;
use crate::watch::View;

/// All of them.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    opened: IntCounterVec,
    live: IntGaugeVec,
    refused: IntCounterVec,
    bytes: IntCounterVec,
    truncated: IntCounterVec,
    plaintext: IntCounter,
    permissive: IntGauge,
    insecure: IntGauge,
    events: IntCounterVec,
    lost: IntCounterVec,
    spool_bytes: IntGauge,
    spool_links: IntGauge,
    spool_failing: IntGauge,
    uplink: IntGaugeVec,
    uplink_failures: IntCounter,
    acknowledge: Histogram,
    certificate_end: Gauge,
    ca_end: GaugeVec,
    peer_end: GaugeVec,
    directive_version: IntGauge,
    policy_version: IntGauge,
    directive_age: Gauge,
    findings: IntGaugeVec,
    tasks_created: IntCounter,
    tasks_missed: IntCounter,
    listeners: IntGaugeVec,
    interception_broken: IntGauge,
}

impl Metrics {
    /// All at zero.
    pub fn new(version: &str) -> Metrics {
        let registry = Registry::new();
        let metrics = Metrics {
            opened: counters(&registry, "connections_opened_total", "Connections let through.", &["direction"]),
            live: gauges(&registry, "connections_live", "Connections being relayed.", &["direction"]),
            refused: counters(
                &registry,
                "connections_refused_total",
                "Connections not let through.",
                &["direction", "reason"],
            ),
            bytes: counters(&registry, "relayed_bytes_total", "Payload bytes relayed.", &["direction", "flow"]),
            truncated: counters(
                &registry,
                "connections_truncated_total",
                "Connections that ended without a proper close of TLS.",
                &["direction"],
            ),
            plaintext: register(
                &registry,
                IntCounter::new(
                    name("connections_plaintext_total"),
                    "Of the connections let through, those without TLS (`permissive`).",
                ),
            ),
            permissive: gauge(&registry, "permissive_listeners", "Listeners that let plaintext in now (`permissive`)."),
            insecure: gauge(
                &registry,
                "insecure_trust_all",
                "Listeners and routes that accept every certificate now (`insecure_trust_all`).",
            ),
            events: counters(&registry, "events_total", "Events taken in.", &["severity"]),
            lost: counters(&registry, "events_lost_total", "Events lost, by the spool or before it.", &["severity"]),
            spool_bytes: gauge(&registry, "spool_bytes", "Bytes of the spool on disk."),
            spool_links: gauge(&registry, "spool_links", "Links that no collector has acknowledged."),
            spool_failing: gauge(
                &registry,
                "spool_failing",
                "1 while the disk takes nothing and events stay in memory.",
            ),
            uplink: gauges(&registry, "uplink_connected", "1 for the transport that is in use.", &["transport"]),
            uplink_failures: register(
                &registry,
                IntCounter::new(name("uplink_failures_total"), "Sessions with a collector that failed."),
            ),
            acknowledge: register(
                &registry,
                Histogram::with_opts(
                    HistogramOpts::new(name("acknowledge_seconds"), "From sending a link to its acknowledgement.")
                        .buckets(vec![0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0]),
                ),
            ),
            certificate_end: register(
                &registry,
                Gauge::new(name("certificate_not_after_seconds"), "When our certificate ends, Unix time; 0 for none."),
            ),
            ca_end: register(
                &registry,
                GaugeVec::new(
                    Opts::new(
                        name("ca_certificate_not_after_seconds"),
                        "When the first CA above our certificate, and the first root we trust, ends, Unix time.",
                    ),
                    &["what"],
                ),
            ),
            peer_end: register(
                &registry,
                GaugeVec::new(
                    Opts::new(
                        name("peer_certificate_not_after_seconds"),
                        "When the certificate ends that a peer was last seen with, Unix time; at most 256 peers.",
                    ),
                    &["peer"],
                ),
            ),
            directive_version: gauge(&registry, "directive_version", "Version of the directive in force; 0 for none."),
            policy_version: gauge(
                &registry,
                "policy_version",
                "Version of the collector's policy in force; 0 for none, -1 for one that this agent cannot read.",
            ),
            directive_age: register(
                &registry,
                Gauge::new(name("directive_age_seconds"), "Age of the directive in force; 0 for none."),
            ),
            findings: gauges(&registry, "findings", "Checks by verdict, as last judged.", &["verdict"]),
            tasks_created: register(
                &registry,
                IntCounter::new(
                    name("workload_tasks_created_total"),
                    "Processes and threads that the workload created.",
                ),
            ),
            tasks_missed: register(
                &registry,
                IntCounter::new(name("workload_tasks_missed_total"), "Of these, gone before they could be seen."),
            ),
            listeners: gauges(
                &registry,
                "listeners_without_tls",
                "Listeners of the workload that can be reached without TLS.",
                &["declared"],
            ),
            interception_broken: gauge(
                &registry,
                "interception_broken",
                "1 while the packet rules that should be in force are not, or can be got past.",
            ),
            registry,
        };
        gauges(&metrics.registry, "build_info", "1, with the version.", &["version"])
            .with_label_values(&[version])
            .set(1);
        metrics.begin_at_zero();
        metrics
    }

    /// Series that are not there cannot be told from zero by an alert.
    fn begin_at_zero(&self) {
        for direction in Direction::ALL.map(Direction::word) {
            self.opened.with_label_values(&[direction]);
            self.live.with_label_values(&[direction]);
            self.truncated.with_label_values(&[direction]);
            ["in", "out"].iter().for_each(|flow| drop(self.bytes.with_label_values(&[direction, flow])));
        }
        for severity in Severity::ALL.map(Severity::word) {
            self.events.with_label_values(&[severity]);
            self.lost.with_label_values(&[severity]);
        }
        TRANSPORTS.iter().for_each(|transport| drop(self.uplink.with_label_values(&[transport])));
    }

    /// A connection was not let through.
    pub fn refused(&self, direction: Direction, reason: RefusalReason) {
        self.refused.with_label_values(&[direction.word(), reason.word()]).inc();
    }

    /// A connection was let through.
    pub fn opened(&self, direction: Direction) {
        self.opened.with_label_values(&[direction.word()]).inc();
        self.live.with_label_values(&[direction.word()]).inc();
    }

    /// A connection without TLS was let through.
    pub fn plaintext_opened(&self) {
        self.opened(Direction::Inbound);
        self.plaintext.inc();
    }

    /// So many listeners let plaintext in.
    pub fn permissive(&self, listeners: usize) {
        self.permissive.set(listeners as i64);
    }

    /// So many listeners and routes accept every certificate.
    pub fn insecure(&self, places: usize) {
        self.insecure.set(places as i64);
    }

    /// It ended.
    pub fn closed(&self, direction: Direction, traffic: &Traffic) {
        self.live.with_label_values(&[direction.word()]).dec();
        self.bytes.with_label_values(&[direction.word(), "in"]).inc_by(traffic.bytes_in);
        self.bytes.with_label_values(&[direction.word(), "out"]).inc_by(traffic.bytes_out);
        self.truncated.with_label_values(&[direction.word()]).inc_by(u64::from(traffic.truncated));
    }

    /// An event was made.
    pub fn event(&self, severity: Severity) {
        self.events.with_label_values(&[severity.word()]).inc();
    }

    /// The session runs over `transport`, `quic` or `tcp`; `None` when there is none.
    pub fn uplink(&self, transport: Option<&str>) {
        TRANSPORTS.iter().for_each(|name| {
            self.uplink.with_label_values(&[name]).set(i64::from(transport == Some(*name)));
        });
    }

    /// A session failed.
    pub fn uplink_failed(&self) {
        self.uplink_failures.inc();
    }

    /// A link was acknowledged this long after it was sent.
    pub fn acknowledged(&self, after: std::time::Duration) {
        self.acknowledge.observe(after.as_secs_f64());
    }

    /// When certificates end that are not ours: of the CAs, and of peers as they were last seen.
    pub fn certificates(&self, identity: Option<&Identity>, peers: &[(PeerName, Timestamp)]) {
        self.ca_end.reset();
        self.peer_end.reset();
        let roots = identity.into_iter().flat_map(|i| i.trust.domains.values().flatten().chain(&i.trust.dns_roots));
        let above = identity.into_iter().flat_map(|i| i.credential.chain().iter().skip(1));
        for (what, soonest) in [("issuer", soonest(above)), ("root", soonest(roots))] {
            if let Some(end) = soonest {
                self.ca_end.with_label_values(&[what]).set(end.as_secs() as f64);
            }
        }
        for (peer, end) in peers {
            self.peer_end.with_label_values(&[&peer.to_string()]).set(end.as_secs() as f64);
        }
    }

    /// The text a scraper reads, with what the spool, the identity and the watch say now.
    pub fn render(
        &self,
        spool: &SpoolStats,
        identity: Option<&Identity>,
        watch: Option<&View>,
        now: Timestamp,
    ) -> Vec<u8> {
        if let Some(view) = watch {
            self.look_at(view);
        }
        self.spool_bytes.set(spool.bytes.load(Relaxed) as i64);
        self.spool_links.set(spool.links.load(Relaxed) as i64);
        self.spool_failing.set(i64::from(spool.failing.load(Relaxed)));
        for (severity, lost) in Severity::ALL.iter().zip(&spool.lost) {
            raise(&self.lost.with_label_values(&[severity.word()]), lost.load(Relaxed));
        }
        let directive = identity.and_then(|identity| identity.directive.as_ref());
        self.certificate_end.set(identity.map_or(0.0, |i| i.credential.peer().not_after.as_secs() as f64));
        self.directive_version.set(directive.map_or(0, |directive| directive.version as i64));
        let policy = identity.map_or(Ok(0), |identity| identity.policy.as_ref().map(|policy| policy.version));
        self.policy_version.set(policy.map_or(-1, |version| version as i64));
        self.directive_age.set(directive.map_or(0.0, |directive| now.since(directive.issued_us).as_secs_f64()));
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "the metrics cannot be written");
        }
        text
    }
}

impl Metrics {
    fn look_at(&self, view: &View) {
        raise(&self.tasks_created, view.stats.tasks_created.load(Relaxed));
        raise(&self.tasks_missed, view.stats.tasks_missed.load(Relaxed));
        for (declared, count) in [("false", &view.stats.exposed), ("true", &view.stats.declared)] {
            self.listeners.with_label_values(&[declared]).set(count.load(Relaxed) as i64);
        }
        self.interception_broken.set(i64::from(view.interception_trouble().is_some()));
        let posture = view.posture();
        for word in Verdict::WORDS {
            let count = posture.findings.iter().filter(|finding| finding.verdict.word() == word).count();
            self.findings.with_label_values(&[word]).set(count as i64);
        }
    }
}

fn soonest<'a>(certificates: impl Iterator<Item = &'a CertificateDer<'static>>) -> Option<Timestamp> {
    certificates.filter_map(|cert| tls::validity(cert).ok()).map(|(_, end)| end).min()
}

/// Brings a counter up to a total that is counted elsewhere.
fn raise(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

const TRANSPORTS: [&str; 2] = ["quic", "tcp"];

fn name(name: &str) -> String {
    format!("sidewarden_agent_{name}")
}

/// The names are constants of this file: a fault in one shows in every test.
fn register<C: prometheus::core::Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<C>) -> C {
    let collector = made.expect("names and labels are well formed");
    registry.register(Box::new(collector.clone())).expect("every name is used once");
    collector
}

fn counters(registry: &Registry, what: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    register(registry, IntCounterVec::new(Opts::new(name(what), help), labels))
}

fn gauges(registry: &Registry, what: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    register(registry, IntGaugeVec::new(Opts::new(name(what), help), labels))
}

fn gauge(registry: &Registry, what: &str, help: &str) -> IntGauge {
    register(registry, IntGauge::new(name(what), help))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_is_in_the_text() {
        let metrics = Metrics::new("1.2.3");
        metrics.refused(Direction::Inbound, RefusalReason::Plaintext);
        metrics.opened(Direction::Outbound);
        metrics.uplink(Some("tcp"));
        let text = String::from_utf8(metrics.render(&SpoolStats::default(), None, None, Timestamp(0))).unwrap();
        for line in [
            r#"sidewarden_agent_connections_refused_total{direction="inbound",reason="plaintext"} 1"#,
            r#"sidewarden_agent_connections_live{direction="outbound"} 1"#,
            r#"sidewarden_agent_uplink_connected{transport="tcp"} 1"#,
            r#"sidewarden_agent_uplink_connected{transport="quic"} 0"#,
            r#"sidewarden_agent_events_lost_total{severity="critical"} 0"#,
            r#"sidewarden_agent_build_info{version="1.2.3"} 1"#,
        ] {
            assert!(text.lines().any(|l| l == line), "no {line} in:\n{text}");
        }
    }

    #[test]
    fn a_peer_that_is_forgotten_and_a_root_that_is_gone_leave_no_series() {
        let metrics = Metrics::new("1.2.3");
        let text = || String::from_utf8(metrics.render(&SpoolStats::default(), None, None, Timestamp(0))).unwrap();
        let peer = PeerName::Spiffe("spiffe://td/shop/web".parse().unwrap());
        let identity = crate::identity::made_up::Ca::new("td").identity("shop/orders");
        metrics.certificates(Some(&identity), &[(peer, Timestamp::from_secs(700))]);
        let shown = text();
        let of_peer = r#"sidewarden_agent_peer_certificate_not_after_seconds{peer="spiffe://td/shop/web"} 700"#;
        assert!(shown.lines().any(|line| line == of_peer), "{shown}");
        for what in ["issuer", "root"] {
            assert!(shown.contains(&format!("ca_certificate_not_after_seconds{{what=\"{what}\"}}")), "{shown}");
        }
        metrics.certificates(None, &[]);
        assert!(!text().contains("not_after_seconds{"), "{}", text());
    }
}
