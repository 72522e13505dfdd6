//! The attack that the demo plays, step by step, and how each step is caught: by an event that names it, a count in the
//! metrics, and an alert at a real Alertmanager. A step that is not caught is told as plainly as one that is.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};

use crate::alertmanager;
use crate::attacks;
use crate::events::{Event, Events};
use crate::interrupt::poll;
use crate::metrics;
use crate::scene::Scene;

/// An event has to be at the collector within this.
pub const PROMPT: Duration = Duration::from_secs(2);

/// How long we wait to learn how late it was.
const PATIENCE: Duration = Duration::from_secs(15);

/// What the container of the last step can do, and no container of a service should.
const TOO_MUCH: [&str; 3] = ["capabilities", "host-pid", "docker-socket"];

/// One thing an attacker does, and what must come of it.
pub struct Step {
    /// A few words, for the table.
    pub name: &'static str,
    /// What is done, in a sentence.
    pub told: &'static str,
    act: fn(&Scene) -> Result<Act>,
    workload: &'static str,
    is: fn(&Event) -> bool,
    alert: Alert,
    metric: Metric,
}

struct Alert {
    name: &'static str,
    labels: &'static [(&'static str, &'static str)],
}

struct Metric {
    name: &'static str,
    labels: &'static [(&'static str, &'static str)],
}

/// An act of the attacker, just begun or done.
struct Act {
    began: SystemTime,
    saw: String,
}

impl Act {
    fn now(act: impl FnOnce() -> Result<String>) -> Result<Act> {
        let began = SystemTime::now();
        Ok(Act { began, saw: act()? })
    }
}

/// How a step ended.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// How it was in the table's words.
    pub name: &'static str,
    /// The event: after how long, of which kind.
    pub event: Option<(Duration, String)>,
    /// The alert: after how long, by which name.
    pub alert: Option<(Duration, String)>,
    /// Whether the metrics count it.
    pub counted: bool,
}

impl Outcome {
    /// Caught: the event in time, and what follows from it.
    pub fn caught(&self) -> bool {
        self.event.as_ref().is_some_and(|(after, _)| *after <= PROMPT) && self.alert.is_some() && self.counted
    }
}

const REFUSED: &str = "sidewarden_collector_connections_refused_total";
const EVENTS: &str = "sidewarden_collector_events_total";
const FINDINGS: &str = "sidewarden_collector_findings";

/// The attack, in order.
pub const STEPS: &[Step] = &[
    Step {
        name: "plaintext to the agent",
        told: "Somebody on the network speaks plain HTTP to the port where orders' agent listens.",
        act: |scene| Act::now(|| attacks::plaintext(at(scene, 8443)?)),
        workload: "shop/orders",
        is: |e| refused(e, "plaintext"),
        alert: Alert { name: "PlaintextRefused", labels: &[] },
        metric: Metric { name: REFUSED, labels: &[("reason", "plaintext")] },
    },
    Step {
        name: "plaintext to the service",
        told: "They look for a way past the agent, and try the service's own port.",
        act: |scene| Act::now(|| attacks::plaintext(at(scene, 8080)?)),
        workload: "shop/orders",
        is: |e| refused(e, "direct_to_service"),
        alert: Alert { name: "DirectToService", labels: &[] },
        metric: Metric { name: REFUSED, labels: &[("reason", "direct_to_service")] },
    },
    Step {
        name: "foreign certificate",
        told: "They come with TLS 1.3 and a certificate that says it is shop/web, signed by a CA of their own.",
        act: |scene| {
            let claims = "spiffe://sidewarden.internal/shop/web";
            let forged = scene.scratch().join("foreign-ca");
            attacks::forge(claims, &forged)?;
            Act::now(|| attacks::foreign_certificate(at(scene, 8443)?, &forged))
        },
        workload: "shop/orders",
        is: |e| refused(e, "unknown_ca"),
        alert: Alert { name: "ForeignCertificate", labels: &[] },
        metric: Metric { name: REFUSED, labels: &[("reason", "unknown_ca")] },
    },
    Step {
        name: "TLS 1.1",
        told: "They try an old client, in the hope of an old protocol: TLS 1.1.",
        act: |scene| Act::now(|| attacks::tls11(at(scene, 8443)?)),
        workload: "shop/orders",
        is: |e| refused(e, "protocol_version"),
        alert: Alert { name: "LegacyTls", labels: &[] },
        metric: Metric { name: REFUSED, labels: &[("reason", "protocol_version")] },
    },
    Step {
        name: "docker exec as root",
        told: "Somebody with access to the engine enters the container of orders as root.",
        act: |scene| Act::now(|| enter_as_root(scene)),
        workload: "shop/orders",
        is: |e| e.kind == "process.entered" && e.body["as_root"] == true,
        alert: Alert { name: "RootExec", labels: &[] },
        metric: Metric { name: EVENTS, labels: &[("kind", "process.entered")] },
    },
    Step {
        name: "a shell in the service",
        told: "A visitor, by the front door, asks for an export named `today; id; sleep 1`. The service starts a shell for it.",
        act: |scene| Act::now(|| slip_in_a_command(scene)),
        workload: "shop/orders",
        is: |e| e.kind == "process.shell",
        alert: Alert { name: "ShellInWorkload", labels: &[] },
        metric: Metric { name: EVENTS, labels: &[("kind", "process.shell")] },
    },
    Step {
        name: "an overpowered container",
        told: "A container is started with CAP_SYS_ADMIN, the host's PID namespace and the Docker socket.",
        act: start_overpowered,
        workload: "shop/debug",
        is: |e| TOO_MUCH.iter().all(|check| fails(e, check)),
        alert: Alert { name: "CheckFailed", labels: &[("check", "docker-socket")] },
        metric: Metric { name: FINDINGS, labels: &[("check", "docker-socket"), ("verdict", "fail")] },
    },
];

/// Plays one step, and tells of it.
pub fn play(number: usize, step: &Step, scene: &Scene, events: &Events) -> Result<Outcome> {
    println!("\n{number}. {}", step.told);
    let before = count(scene, &step.metric)?;
    let mark = events.mark();
    // Side by side: neither an attacker who stays a while nor a slow event may keep us from seeing the rest in time.
    let (act, alert, event) = std::thread::scope(|scope| {
        let act = scope.spawn(|| (step.act)(scene));
        let alert = scope.spawn(|| await_alert(scene, step));
        let event = events.wait(mark, PATIENCE, |e| e.of(step.workload) && (step.is)(e));
        (act.join(), alert.join(), event)
    });
    let act = act.map_err(|_| anyhow!("the attacker's thread broke"))?;
    let act = act.with_context(|| format!("playing `{}`", step.name))?;
    println!("     they saw   {}", act.saw);
    let mut outcome = Outcome { name: step.name, ..Outcome::default() };
    if let Some(event) = event? {
        let after = since(act.began, event.received());
        println!("     event      {:>7}  {}: {}", millis(after), event.kind, event.summary);
        outcome.event = Some((after, event.kind));
    }
    if let Some((at, summary)) = alert.map_err(|_| anyhow!("waiting for the alert broke"))?? {
        let after = since(act.began, at);
        println!("     alert      {:>7}  {}: {summary}", millis(after), step.alert.name);
        outcome.alert = Some((after, step.alert.name.to_owned()));
    }
    let counted = || count(scene, &step.metric).ok().filter(|now| *now > before);
    if let Some(now) = poll(PATIENCE, Duration::from_millis(50), counted)? {
        println!("     metric              {}: {before} -> {now}", step.metric.text());
        outcome.counted = true;
    }
    tell_what_is_missing(&outcome);
    Ok(outcome)
}

fn since(began: SystemTime, at: SystemTime) -> Duration {
    at.duration_since(began).unwrap_or_default()
}

fn tell_what_is_missing(outcome: &Outcome) {
    match &outcome.event {
        None => println!("     NOT CAUGHT   no event came within {PATIENCE:?}"),
        Some((after, _)) if *after > PROMPT => println!("     LATE         the event took longer than {PROMPT:?}"),
        Some(_) => {}
    }
    if outcome.event.is_some() && outcome.alert.is_none() {
        println!("     NO ALERT     none at Alertmanager within {PATIENCE:?}");
    }
    if !outcome.counted {
        println!("     NOT COUNTED  the metrics did not change within {PATIENCE:?}");
    }
}

/// All of it on one screen.
pub fn table(outcomes: &[Outcome]) -> String {
    let mut text = format!("{:<26}{:<22}{:>9}   {:<22}{:>9}\n", "STEP", "EVENT", "AFTER", "ALERT", "AFTER");
    for outcome in outcomes {
        let (event, event_after) = cell(outcome.event.as_ref());
        let (alert, alert_after) = cell(outcome.alert.as_ref());
        text += &format!("{:<26}{event:<22}{event_after:>9}   {alert:<22}{alert_after:>9}\n", outcome.name);
    }
    let caught = outcomes.iter().filter(|o| o.caught()).count();
    text + &format!("{caught} of {} caught", outcomes.len())
}

fn cell(found: Option<&(Duration, String)>) -> (String, String) {
    found.map_or_else(|| ("none".into(), "-".into()), |(after, name)| (name.clone(), millis(*after)))
}

fn millis(duration: Duration) -> String {
    format!("{} ms", duration.as_millis())
}

impl Metric {
    fn text(&self) -> String {
        let labels: Vec<String> = self.labels.iter().map(|(key, value)| format!("{key}={value:?}")).collect();
        format!("{}{{{}}}", self.name, labels.join(","))
    }
}

fn count(scene: &Scene, metric: &Metric) -> Result<f64> {
    Ok(metrics::scrape(scene.metrics())?.sum(metric.name, metric.labels))
}

/// When the step's alert is at Alertmanager, and what it says.
fn await_alert(scene: &Scene, step: &Step) -> Result<Option<(SystemTime, String)>> {
    poll(PATIENCE, Duration::from_millis(20), || {
        let alerts = alertmanager::alerts(scene.alertmanager()).ok()?;
        let at = SystemTime::now();
        let alert = alerts.into_iter().find(|alert| {
            alert.label("alertname") == step.alert.name
                && alert.label("workload").ends_with(step.workload)
                && step.alert.labels.iter().all(|(key, value)| alert.label(key) == *value)
        })?;
        Some((at, alert.annotations.get("summary").cloned().unwrap_or_default()))
    })
}

fn refused(event: &Event, reason: &str) -> bool {
    event.kind == "connection.refused" && event.text("reason") == reason
}

/// Whether the event says that `check` fails.
fn fails(event: &Event, check: &str) -> bool {
    let findings = event.body["findings"].as_array().map(Vec::as_slice).unwrap_or_default();
    findings.iter().any(|f| f["check"] == check && f["verdict"] == "fail")
}

/// The address of orders, as any machine on the network sees it.
fn at(scene: &Scene, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::from((scene.address("orders-agent")?, port)))
}

fn enter_as_root(scene: &Scene) -> Result<String> {
    let orders = scene.container("orders")?;
    let said = scene.docker.run(["exec", "--user", "root", &orders, "sh", "-c", "id; sleep 0.2"]).output()?;
    Ok(format!("a root shell: {}", said.trim()))
}

fn slip_in_a_command(scene: &Scene) -> Result<String> {
    scene.visit("/export?name=today%3B%20id%3B%20sleep%201", PATIENCE)?.context("the visitor had no answer")
}

fn start_overpowered(scene: &Scene) -> Result<Act> {
    let power = ["--cap-add", "SYS_ADMIN", "--pid", "host", "--volume", "/var/run/docker.sock:/var/run/docker.sock"];
    let container = scene.create_wrapped("debug", &power, &["sleep", "infinity"])?;
    Act::now(|| {
        scene.docker.run(["start", &container]).output()?;
        Ok("a container that can take the host over".into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(millis: u64, alert: bool, counted: bool) -> Outcome {
        let alert = alert.then(|| (Duration::from_millis(millis), "A".into()));
        Outcome { name: "s", event: Some((Duration::from_millis(millis), "k".into())), alert, counted }
    }

    #[test]
    fn a_step_is_caught_by_event_alert_and_metric_in_time() {
        for (outcome, caught) in [
            (outcome(2000, true, true), true),
            (outcome(2001, true, true), false),
            (outcome(5, false, true), false),
            (outcome(5, true, false), false),
            (Outcome::default(), false),
        ] {
            assert_eq!(outcome.caught(), caught, "{outcome:?}");
        }
    }

    #[test]
    fn the_table_counts_what_was_caught() {
        let table = table(&[outcome(12, true, true), Outcome { name: "x", ..Outcome::default() }]);
        assert!(table.ends_with("1 of 2 caught"), "{table}");
        assert!(table.contains("12 ms") && table.contains("none"), "{table}");
    }
}
