//! What Prometheus scrapes: counts from the state, gauges from the parts, on a listener of their own.
//!
//! Every label's value comes from a closed list or a capped one; what belongs to one workload or instance is the API's.
//! A thousand agents therefore make no more series than one.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State as Shared};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::proto::MetricFamily;
use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder};
use sidewarden_proto::event::{KINDS, Severity};
use sidewarden_proto::finding::Verdict;
use sidewarden_proto::secret::Secret;
use sidewarden_proto::time::Timestamp;
use tokio::net::TcpListener;

use crate::alert::{Alert, Alerts, Status as AlertStatus};
use crate::api::auth;
use crate::api::serve::{self, Door};
use crate::app::Core;
use crate::posture::pledges::{self, Names};
use crate::state::{Agent, State, Status};

/// Different checks that get series of their own; there are fewer than half as many.
const MAX_CHECKS: usize = 150;

/// What a scrape shares.
struct Scrape {
    core: Core,
    alerts: Alerts,
    token: Option<Secret>,
    /// What parts count by themselves.
    registry: Registry,
}

/// Opens the listener and serves until the shutdown; where it listens.
pub async fn start(core: &Core, alerts: Alerts) -> anyhow::Result<SocketAddr> {
    let settings = &core.config.metrics;
    let listener = TcpListener::bind(settings.listen).await.map_err(|error| {
        let hint = crate::ingest::bind_hint(&error);
        anyhow::anyhow!("metrics.listen {}: {error}{hint}", settings.listen)
    })?;
    let address = listener.local_addr()?;
    let registry = registry(core, &alerts)?;
    let scrape = Scrape { core: core.clone(), alerts, token: settings.token.clone(), registry };
    let router =
        Router::new().route("/metrics", get(metrics)).route("/healthz", get(health)).with_state(Arc::new(scrape));
    let shown = settings.tls.then(|| core.identities.page());
    core.tasks.spawn(serve::serve(Door { listener, shown, router, shutdown: core.shutdown.clone() }));
    Ok(address)
}

fn registry(core: &Core, alerts: &Alerts) -> prometheus::Result<Registry> {
    let registry = Registry::new();
    core.commits.stats().collectors().into_iter().try_for_each(|collector| registry.register(collector))?;
    alerts.stats().collectors().into_iter().try_for_each(|collector| registry.register(collector))?;
    Ok(registry)
}

async fn metrics(Shared(scrape): Shared<Arc<Scrape>>, request: Request) -> Response {
    if let Some(token) = &scrape.token {
        let header = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        if !auth::bearer(header).is_some_and(|shown| token.matches(shown)) {
            return (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")], "a token is needed\n")
                .into_response();
        }
    }
    match text(&scrape) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "metrics could not be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

async fn health(Shared(scrape): Shared<Arc<Scrape>>) -> Response {
    match scrape.core.commits.stats().store_up.get() {
        1 => "ok\n".into_response(),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "the store refuses events\n").into_response(),
    }
}

fn text(scrape: &Scrape) -> prometheus::Result<String> {
    let core = &scrape.core;
    let now = (core.clock)();
    let mut families = scrape.registry.gather();
    families.extend(of_state(&core.commits.state(), now)?);
    families.extend(of_alerts(&scrape.alerts.shown())?);
    families.extend(of_parts(core)?);
    families.sort_by(|one, other| one.name().cmp(other.name()));
    TextEncoder::new().encode_to_string(&families)
}

/// Series that are made anew for each scrape.
#[derive(Default)]
struct Page(Registry);

impl Page {
    fn counter(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
        let counter = IntCounterVec::new(Opts::new(format!("sidewarden_collector_{name}"), help), labels)?;
        self.0.register(Box::new(counter.clone()))?;
        Ok(counter)
    }

    fn gauge(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntGaugeVec> {
        let gauge = IntGaugeVec::new(Opts::new(format!("sidewarden_collector_{name}"), help), labels)?;
        self.0.register(Box::new(gauge.clone()))?;
        Ok(gauge)
    }

    fn seconds(&self, name: &str, help: &str, at: Option<Timestamp>) -> prometheus::Result<()> {
        let gauge = GaugeVec::new(Opts::new(format!("sidewarden_collector_{name}"), help), &[])?;
        if let Some(at) = at {
            gauge.with_label_values::<&str>(&[]).set(at.0 as f64 / 1e6);
        }
        self.0.register(Box::new(gauge))
    }
}

/// What the state says.
pub fn of_state(state: &State, now: Timestamp) -> prometheus::Result<Vec<MetricFamily>> {
    let page = Page::default();
    agents(&page, state, now)?;
    events(&page, state)?;
    findings(&page, state, now)?;
    waivers(&page, state, now)?;
    totals(&page, state)?;
    let present = state.agents.values().filter(|agent| state.status(agent, now) == Status::Live);
    let soonest = present.filter_map(|agent| agent.certificate.as_ref()).map(|certificate| certificate.not_after).min();
    page.seconds(
        "agents_certificate_soonest_end_timestamp_seconds",
        "When the first certificate of a live agent ends, in seconds since 1970.",
        soonest,
    )?;
    page.seconds("start_time_seconds", "When the collector started, in seconds since 1970.", Some(state.started))?;
    Ok(page.0.gather())
}

fn agents(page: &Page, state: &State, now: Timestamp) -> prometheus::Result<()> {
    let agents = page.gauge("agents", "Agents by presence.", &["status"])?;
    for status in Status::ALL {
        agents.with_label_values(&[status.word()]);
    }
    state.agents.values().for_each(|agent| agents.with_label_values(&[state.status(agent, now).word()]).inc());
    Ok(())
}

/// Agents choose the names of kinds, so those this version does not know are one.
fn events(page: &Page, state: &State) -> prometheus::Result<()> {
    let events = page.counter("events_total", "Events taken, by kind and severity.", &["kind", "severity"])?;
    for (kind, counts) in &state.totals.events {
        let kind = if KINDS.contains(&kind.as_str()) { kind } else { "other" };
        for severity in Severity::ALL.into_iter().filter(|severity| counts[severity.rank()] > 0) {
            events.with_label_values(&[kind, severity.word()]).inc_by(counts[severity.rank()]);
        }
    }
    Ok(())
}

fn findings(page: &Page, state: &State, now: Timestamp) -> prometheus::Result<()> {
    let findings = page.gauge("findings", "Checks of present instances by verdict.", &["check", "verdict"])?;
    let mut counts: BTreeMap<(&str, &str), i64> = BTreeMap::new();
    let mut checks = 0;
    let ended = |agent: &Agent| matches!(state.status(agent, now), Status::Gone | Status::Stopped);
    for (id, agent) in state.agents.iter().filter(|(_, agent)| !ended(agent)) {
        let names = Names::of_instance(id);
        for (check, standing) in &agent.findings {
            let verdict = &standing.finding.verdict;
            let waiver = Some(check).filter(|_| *verdict == Verdict::Fail);
            let waiver = waiver.and_then(|check| pledges::about(&state.waivers, &names, check));
            let word = if waiver.is_some_and(|waiver| waiver.holds(now)) { "waived" } else { verdict.word() };
            let known = counts.contains_key(&(check.as_str(), Verdict::WORDS[0]));
            let check = if known || checks < MAX_CHECKS { check.as_str() } else { "other" };
            if !counts.contains_key(&(check, Verdict::WORDS[0])) {
                checks += 1;
                counts.extend(Verdict::WORDS.iter().map(|word| ((check, *word), 0)));
            }
            *counts.entry((check, word)).or_default() += 1;
        }
    }
    counts.iter().for_each(|((check, verdict), count)| findings.with_label_values(&[check, verdict]).set(*count));
    Ok(())
}

fn waivers(page: &Page, state: &State, now: Timestamp) -> prometheus::Result<()> {
    let waivers = page.gauge("waivers", "Waivers, in force and ended but not removed.", &["state"])?;
    let holding = state.waivers.iter().filter(|waiver| waiver.holds(now));
    waivers.with_label_values(&["in_force"]).set(holding.clone().count() as i64);
    waivers.with_label_values(&["ended"]).set((state.waivers.len() - holding.clone().count()) as i64);
    page.seconds(
        "waivers_soonest_end_timestamp_seconds",
        "When the first waiver in force ends, in seconds since 1970.",
        holding.map(|waiver| waiver.until_us).min(),
    )
}

fn totals(page: &Page, state: &State) -> prometheus::Result<()> {
    let totals = &state.totals;
    let refused: BTreeMap<String, u64> =
        totals.refused.iter().map(|(reason, count)| (reason.word().to_owned(), *count)).collect();
    let by_word = [
        ("connections_refused_total", "Connections that agents refused, by reason.", "reason", &refused),
        ("events_lost_total", "Events that agents had to drop, by reason.", "reason", &totals.lost),
        ("enrolments_refused_total", "Refused requests for a certificate.", "reason", &totals.enrolments_refused),
        ("ingest_refused_total", "Refused connections to the collector.", "reason", &totals.ingest_refused),
        ("certificates_issued_total", "Certificates issued, by what they were issued for.", "by", &totals.issued),
    ];
    for (name, help, label, counts) in by_word {
        let counter = page.counter(name, help, &[label])?;
        counts.iter().for_each(|(word, count)| counter.with_label_values(&[word]).inc_by(*count));
    }
    let plain = [
        ("events_unknown_total", "Events of kinds this version does not know.", totals.unknown_kinds),
        ("events_unreadable_total", "Events whose body does not fit their kind.", totals.unreadable),
        ("events_forged_total", "Events of kinds that only a collector may tell.", totals.forged),
    ];
    for (name, help, count) in plain {
        page.counter(name, help, &[])?.with_label_values::<&str>(&[]).inc_by(count);
    }
    Ok(())
}

/// What fires.
pub fn of_alerts(alerts: &[Alert]) -> prometheus::Result<Vec<MetricFamily>> {
    let page = Page::default();
    let firing = page.gauge("alerts_firing", "Alerts that fire, by rule and severity.", &["alertname", "severity"])?;
    for alert in alerts.iter().filter(|alert| alert.status == AlertStatus::Firing) {
        firing.with_label_values(&[alert.rule, alert.severity.word()]).inc();
    }
    Ok(page.0.gather())
}

fn of_parts(core: &Core) -> prometheus::Result<Vec<MetricFamily>> {
    let page = Page::default();
    let build = page.gauge("build_info", "The version that runs.", &["version"])?;
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
    let waiting = page.gauge("commit_queue_waiting", "Requests that wait to be committed.", &[])?;
    waiting.with_label_values::<&str>(&[]).set(i64::try_from(core.commits.waiting()).unwrap_or(i64::MAX));
    let own = core.issuer.authority().own().borrow().peer().not_after;
    let help = "When the collector's own certificate ends, in seconds since 1970.";
    page.seconds("certificate_end_timestamp_seconds", help, Some(own))?;
    ca_ends(&page, core)?;
    given_ends(&page, core)?;
    if let Some(reached) = core.directives.is_reached() {
        let help = "1 while the collector whose directives are followed is within reach.";
        page.gauge("leader_connected", help, &[])?.with_label_values::<&str>(&[]).set(i64::from(reached));
    }
    Ok(page.0.gather())
}

/// The CAs of every generation.
fn ca_ends(page: &Page, core: &Core) -> prometheus::Result<()> {
    let help = "When each root and its issuing CA end, in seconds since 1970.";
    let opts = Opts::new("sidewarden_collector_ca_end_timestamp_seconds", help);
    let gauge = GaugeVec::new(opts, &["what", "generation"])?;
    for dates in core.issuer.authority().dates().into_iter().filter(|dates| dates.what != "collector") {
        let generation = dates.number.to_string();
        gauge.with_label_values(&[dates.what, &generation]).set(dates.not_after.0 as f64 / 1e6);
    }
    page.0.register(Box::new(gauge))
}

/// What others keep for the collector: of each kind the one that ends first.
fn given_ends(page: &Page, core: &Core) -> prometheus::Result<()> {
    let help = "When the first certificate of a kind ends that others keep for the collector, in seconds since 1970.";
    let opts = Opts::new("sidewarden_collector_given_end_timestamp_seconds", help);
    let gauge = GaugeVec::new(opts, &["what"])?;
    let mut soonest: BTreeMap<String, Timestamp> = BTreeMap::new();
    for date in core.identities.dates() {
        let end = soonest.entry(date.what).or_insert(date.not_after_us);
        *end = date.not_after_us.min(*end);
    }
    soonest.iter().for_each(|(what, end)| gauge.with_label_values(&[what]).set(end.0 as f64 / 1e6));
    page.0.register(Box::new(gauge))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Agent, Session, Standing};
    use sidewarden_proto::finding::{CisIds, Finding, Remedy, Vantage};

    /// `agents` agents, each with `checks` failing checks; names of checks differ from agent to agent if `hostile`.
    fn state(agents: usize, checks: usize, hostile: bool) -> State {
        let mut state = State::default();
        for n in 0..agents {
            let mut agent = Agent {
                session: Session::Live { since: Timestamp(0), source: String::new(), transport: "quic".into() },
                ..Agent::default()
            };
            for c in 0..checks {
                let check = if hostile { format!("check-{n}-{c}") } else { format!("check-{c}") };
                let finding = Finding {
                    check: check.clone(),
                    ids: CisIds::default(),
                    title: String::new(),
                    severity: Severity::Warning,
                    verdict: Verdict::Fail,
                    evidence: Vec::new(),
                    remedy: Remedy::default(),
                    vantage: Vantage::Open,
                };
                agent.findings.insert(check, Standing { finding, since: Timestamp(0) });
            }
            state.agents.insert(format!("spiffe://x.test/shop/w{n}#i{n}").parse().unwrap(), agent);
        }
        state
    }

    fn lines(state: &State) -> Vec<String> {
        let text = TextEncoder::new().encode_to_string(&of_state(state, Timestamp(0)).unwrap()).unwrap();
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
    }

    #[test]
    fn a_thousand_workloads_make_no_more_series_than_one() {
        assert_eq!(lines(&state(1000, 40, false)).len(), lines(&state(1, 40, false)).len());
    }

    #[test]
    fn agents_that_invent_checks_and_kinds_do_not_grow_the_series_beyond_a_bound() {
        let mut state = state(1000, 5, true);
        for n in 0..1000 {
            state.totals.events.insert(format!("kind.{n}"), [1, 1, 1, 1]);
        }
        let lines = lines(&state);
        assert!(lines.len() < (MAX_CHECKS + 1) * Verdict::WORDS.len() + 50, "{} series", lines.len());
        let other = "sidewarden_collector_events_total{kind=\"other\",severity=\"critical\"} 1000";
        assert!(lines.iter().any(|line| line == other));
    }

    #[test]
    fn every_failing_check_is_counted_once() {
        let lines = lines(&state(7, 2, false));
        for expected in [
            "sidewarden_collector_findings{check=\"check-1\",verdict=\"fail\"} 7",
            "sidewarden_collector_findings{check=\"check-1\",verdict=\"unknown\"} 0",
            "sidewarden_collector_agents{status=\"live\"} 7",
            "sidewarden_collector_agents{status=\"silent\"} 0",
        ] {
            assert!(lines.iter().any(|line| line == expected), "{expected} is missing in {lines:#?}");
        }
    }
}
