//! Which alerts are pending, firing and resolved: a fold over the rules' signals, and the clock.
//!
//! An alert fires once and stays one alert however often its condition is seen; it ends when its rule says so or, for
//! what has no end of its own, some minutes after it was last seen. Nothing is kept on disk: after a restart the same
//! alerts come out of the state, of the last events of the log, and of what was told before, which is not told again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sidewarden_proto::event::{AlertChanged, Body, Severity};
use sidewarden_proto::identity::Sha256;
use sidewarden_proto::time::Timestamp;

use super::rule::{self, Case, Lasts, RULES, Rule, SILENT, Seen, Signal, Subject};

/// Labels of an alert: what tells it from every other, and nothing that changes.
pub type Labels = BTreeMap<String, String>;

/// Most alerts at a time; further ones are counted only.
const MAX_ALERTS: usize = 100_000;
/// Most alerts of one rule about one instance, so that one hostile agent cannot use up the room of all, nor one label that it
/// chooses that of what others say of it.
const MAX_OF_RULE: usize = 100;
/// Sources of an alert that are told by name.
const MAX_SOURCES: usize = 5;
/// Evidence lines of an alert.
const MAX_EVIDENCE: usize = 8;

/// Times that an operator may set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How long an alert about something that has no end goes on after its last occurrence.
    pub hold: Duration,
    /// How long a resolved alert is still shown, and still told to sinks that want repeats.
    pub keep_resolved: Duration,
    /// After this long a silent agent is gone, and nothing about its instance is true any more.
    pub gone_after: Duration,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            hold: Duration::from_secs(600),
            keep_resolved: Duration::from_secs(900),
            gone_after: Duration::from_secs(24 * 3600),
        }
    }
}

/// Where an alert stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Its condition holds, but not for long enough, or a silent agent makes it pointless.
    Pending,
    /// It was told.
    Firing,
    /// It ended.
    Resolved,
}

impl Status {
    /// The word in the API and on the page.
    pub const fn word(self) -> &'static str {
        match self {
            Status::Pending => "pending",
            Status::Firing => "firing",
            Status::Resolved => "resolved",
        }
    }
}

/// One alert.
#[derive(Clone, Debug, PartialEq)]
pub struct Alert {
    /// The rule it comes from.
    pub rule: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// Whom it is about; `None` for the collector itself.
    pub subject: Option<Subject>,
    /// The label that tells it from others of the rule and subject.
    pub apart: Option<(&'static str, String)>,
    /// Where it stands.
    pub status: Status,
    /// When its condition began; in the future for one that only time can bring.
    pub since: Timestamp,
    /// From when on it may fire.
    pub due: Timestamp,
    /// When its condition was last seen.
    pub last: Timestamp,
    /// When it ended.
    pub ended: Option<Timestamp>,
    /// How often it was seen.
    pub count: u64,
    /// What happened.
    pub what: String,
    /// From where, the first few.
    pub sources: Vec<String>,
    /// Whether there were more sources than are named.
    pub more_sources: bool,
    /// What shows it; of the last occurrence.
    pub evidence: Vec<String>,
    /// What to do about it.
    pub what_to_do: String,
    /// It would fire, but the agent is silent and that alert says it all.
    pub inhibited: bool,
}

impl Alert {
    fn new(rule: &'static Rule, case: &Case, at: Timestamp) -> Alert {
        let since = case.due.unwrap_or(at);
        Alert {
            rule: rule.name,
            severity: case.severity.unwrap_or(rule.severity),
            subject: case.subject.clone(),
            apart: case.apart.clone(),
            status: Status::Pending,
            since,
            due: since.plus(rule.wait),
            last: at,
            ended: None,
            count: 0,
            what: String::new(),
            sources: Vec::new(),
            more_sources: false,
            evidence: Vec::new(),
            what_to_do: String::new(),
            inhibited: false,
        }
    }

    fn seen(&mut self, case: Case, at: Timestamp) {
        self.last = self.last.max(at);
        self.count = self.count.saturating_add(case.count);
        self.what = case.what;
        self.what_to_do = case.what_to_do;
        self.evidence = case.evidence.into_iter().take(MAX_EVIDENCE).collect();
        if case.source.is_empty() || self.sources.contains(&case.source) {
            return;
        }
        match self.sources.len() < MAX_SOURCES {
            true => self.sources.push(case.source),
            false => self.more_sources = true,
        }
    }

    /// What tells it from every other alert; never an address, a count or a time.
    pub fn labels(&self) -> Labels {
        let mut labels = Labels::from([
            ("alertname".to_owned(), self.rule.to_owned()),
            ("severity".to_owned(), self.severity.word().to_owned()),
        ]);
        if let Some(subject) = &self.subject {
            labels.insert("workload".to_owned(), subject.workload.clone());
            labels.insert("instance".to_owned(), subject.instance.clone());
        }
        if let Some((name, value)) = &self.apart {
            labels.insert((*name).to_owned(), value.clone());
        }
        labels
    }

    /// A short name for the same, for links.
    pub fn id(&self) -> String {
        let text: String = self.labels().iter().map(|(name, value)| format!("{name}={value}\n")).collect();
        Sha256::of(&[text.as_bytes()]).to_string()[..16].to_owned()
    }

    /// One line that says who, what, from where and how often.
    pub fn summary(&self) -> String {
        let who = match &self.subject {
            Some(subject) => format!("{} ({})", subject.name(), subject.instance),
            None => "collector".to_owned(),
        };
        let more = if self.more_sources { " and others" } else { "" };
        let source =
            if self.sources.is_empty() { String::new() } else { format!(", from {}{more}", self.sources.join(", ")) };
        let often = if self.count > 1 {
            format!(", {} times since {}", self.count, to_the_second(self.since))
        } else {
            String::new()
        };
        format!("{who}: {}{source}{often}", self.what)
    }

    /// The body of the event that tells of it.
    pub fn changed(&self) -> AlertChanged {
        AlertChanged { alert: self.rule.to_owned(), labels: self.labels(), since_us: self.since }
    }
}

/// An alert that has something to tell.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// It began to fire.
    Firing(Alert),
    /// It ended.
    Resolved(Alert),
}

impl Change {
    /// The alert.
    pub fn alert(&self) -> &Alert {
        match self {
            Change::Firing(alert) | Change::Resolved(alert) => alert,
        }
    }
}

/// Ordered by subject, so that everything about one instance lies together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    subject: Option<Subject>,
    rule: &'static str,
    apart: Option<String>,
}

impl Key {
    fn of(rule: &Rule, case: &Case) -> Key {
        let apart = case.apart.as_ref().map(|(_, value)| value.clone());
        Key { subject: case.subject.clone(), rule: rule.name, apart }
    }
}

/// All alerts, and what has to be told of them.
pub struct Engine {
    settings: Settings,
    alerts: BTreeMap<Key, Alert>,
    changes: Vec<Change>,
    /// While the past is read again: what was told and not yet called off. `None` once live.
    told: Option<BTreeMap<Labels, Timestamp>>,
    last_tick: Option<Timestamp>,
    over_limit: u64,
}

impl Engine {
    /// An engine that has yet to be shown the past: see [`Engine::settle`].
    pub fn new(settings: Settings) -> Engine {
        Engine {
            settings,
            alerts: BTreeMap::new(),
            changes: Vec::new(),
            told: Some(BTreeMap::new()),
            last_tick: None,
            over_limit: 0,
        }
    }

    /// Takes one committed event in, for the rules whose conditions last so; of the past, in the order of the log.
    pub fn observe(&mut self, mut seen: Seen<'_>, of: &[Lasts]) {
        seen.last_tick = self.last_tick;
        let hears = |rule: &&Rule| of.contains(&rule.lasts) && rule.reads(seen.kind, seen.forged);
        for rule in RULES.iter().filter(hears) {
            for signal in rule.read(&seen) {
                self.apply(rule, signal, seen.received);
            }
        }
        if seen.forged {
            return;
        }
        match (seen.body, &mut self.told) {
            // A restart is no jump of the clock.
            (Some(Body::CollectorStarted(_)), _) => self.last_tick = None,
            (Some(Body::ClockTick(_)), _) => self.last_tick = Some(seen.at),
            (Some(Body::AlertFiring(alert)), Some(told)) => {
                told.insert(alert.0.labels.clone(), alert.0.since_us);
                self.stand(&alert.0.labels, alert.0.since_us);
            }
            (Some(Body::AlertResolved(alert)), Some(told)) => {
                told.remove(&alert.0.labels);
                self.fall(&alert.0.labels);
            }
            _ => {}
        }
    }

    /// States that a case of `rule` holds, without an event: for what is known from the state after a restart.
    pub fn raise(&mut self, rule: &'static Rule, case: Case, at: Timestamp) {
        self.apply(rule, Signal::Raise(case), at);
    }

    /// What only events know was told: it fires, though its beginning may be too long ago to be read again.
    fn stand(&mut self, labels: &Labels, since: Timestamp) {
        let Some((rule, case)) = lasting(labels, "it was told before the collector's restart, and nothing ended it")
        else {
            return;
        };
        let key = Key::of(rule, &case);
        let alert = self.alerts.entry(key).or_insert_with(|| Alert::new(rule, &case, since));
        if alert.count == 0 {
            alert.seen(case, since);
        }
        (alert.status, alert.ended) = (Status::Firing, None);
    }

    /// What only events know was called off. What ended it need not be told to us: a clean goodbye ends everything.
    fn fall(&mut self, labels: &Labels) {
        if let Some((rule, case)) = lasting(labels, "") {
            self.alerts.remove(&Key::of(rule, &case));
        }
    }

    /// Ends the reading of the past: from now on changes are told. What was told before the restart and still fires is
    /// not told again; what was told and does not fire any more is called off. Of who is not here nothing holds any more.
    pub fn settle(&mut self, now: Timestamp, is_here: impl Fn(&Subject) -> bool) {
        let holds =
            |alert: &Alert| !lasts(alert.rule, Lasts::UntilCleared) || alert.subject.as_ref().is_none_or(&is_here);
        self.alerts.retain(|_, alert| holds(alert));
        self.pass(now);
        self.changes.clear();
        let mut told = self.told.take().unwrap_or_default();
        for alert in self.alerts.values_mut().filter(|alert| alert.since <= now) {
            match (alert.status, told.remove(&alert.labels())) {
                (Status::Resolved, Some(_)) => self.changes.push(Change::Resolved(alert.clone())),
                // Told before, and it holds again or still: it goes on without waiting once more.
                (_, Some(since)) => (alert.status, alert.since) = (Status::Firing, alert.since.min(since)),
                (Status::Firing, None) => self.changes.push(Change::Firing(alert.clone())),
                (_, None) => {}
            }
        }
        let called_off = told.into_iter().filter_map(|(labels, since)| ended_meanwhile(&labels, since, now));
        self.changes.extend(called_off.map(Change::Resolved));
    }

    /// Lets time pass, and hands out what there is to tell.
    pub fn advance(&mut self, now: Timestamp) -> Vec<Change> {
        self.pass(now);
        std::mem::take(&mut self.changes)
    }

    /// Every alert, by subject.
    pub fn alerts(&self) -> impl Iterator<Item = &Alert> {
        self.alerts.values()
    }

    /// How many alerts were not raised because there were too many.
    pub fn over_limit(&self) -> u64 {
        self.over_limit
    }

    fn apply(&mut self, rule: &'static Rule, signal: Signal, at: Timestamp) {
        match signal {
            Signal::Raise(case) => self.hold(rule, case, at),
            Signal::Clear(subject, apart) => {
                self.end(subject, at, |key| key.rule == rule.name && (apart.is_none() || key.apart == apart))
            }
            Signal::Only(subject, kept) => self.end(Some(subject), at, |key| {
                key.rule == rule.name && !key.apart.as_ref().is_some_and(|apart| kept.contains(apart))
            }),
            Signal::Gone(subject) => self.end(Some(subject), at, |key| !lasts(key.rule, Lasts::Moment)),
        }
    }

    fn hold(&mut self, rule: &'static Rule, case: Case, at: Timestamp) {
        let key = Key::of(rule, &case);
        let severity = case.severity.unwrap_or(rule.severity);
        // What happens again and is less bad this time does not make what happened before less bad.
        let covers = |alert: &Alert| match rule.lasts {
            Lasts::Moment => alert.severity >= severity,
            Lasts::InState | Lasts::UntilCleared => alert.severity == severity,
        };
        let same = |alert: &Alert| alert.status != Status::Resolved && covers(alert);
        if !self.alerts.get(&key).is_some_and(same) {
            if !self.room_for(rule, &key) {
                self.over_limit += 1;
                return;
            }
            // Another severity is another alert to everybody who was told of the one before.
            let before = self.alerts.insert(key.clone(), Alert::new(rule, &case, at));
            let ended = before.filter(|alert| alert.status == Status::Firing);
            self.changes.extend(ended.map(|alert| Change::Resolved(resolved(alert, at))));
        }
        // A certificate that is renewed in time moves its alert into the future again.
        let moved = case.due.is_some_and(|due| self.alerts[&key].status == Status::Firing && due > at);
        if moved {
            self.end(key.subject.clone(), at, |other| *other == key);
            self.alerts.insert(key.clone(), Alert::new(rule, &case, at));
        }
        let silent = self.is_silent(&key);
        let Some(alert) = self.alerts.get_mut(&key) else { return };
        if let (Some(due), Status::Pending) = (case.due, alert.status) {
            alert.since = due;
            alert.due = due.plus(rule.wait);
        }
        alert.seen(case, at);
        self.changes.extend(fire(alert, at, silent));
    }

    /// Whether there is room for one more, made at the cost of what has ended. Labels of the collector's own word have an end.
    fn room_for(&mut self, rule: &Rule, key: &Key) -> bool {
        if self.alerts.contains_key(key) {
            return true;
        }
        let alike = || self.about(&key.subject).filter(|(other, _)| other.rule == key.rule);
        if !rule.is_of_the_collector() && alike().count() >= MAX_OF_RULE {
            let ended = alike().filter(|(_, alert)| alert.ended.is_some()).min_by_key(|(_, alert)| alert.ended);
            let Some(ended) = ended.map(|(key, _)| key.clone()) else { return false };
            self.alerts.remove(&ended);
        }
        self.alerts.len() < MAX_ALERTS
    }

    fn about<'a>(&'a self, subject: &'a Option<Subject>) -> impl Iterator<Item = (&'a Key, &'a Alert)> {
        let first = Key { subject: subject.clone(), rule: "", apart: None };
        self.alerts.range(first..).take_while(move |(key, _)| key.subject == *subject)
    }

    fn is_silent(&self, key: &Key) -> bool {
        key.rule != SILENT
            && key.subject.is_some()
            && self.about(&key.subject).any(|(key, alert)| key.rule == SILENT && alert.status == Status::Firing)
    }

    fn end(&mut self, subject: Option<Subject>, at: Timestamp, which: impl Fn(&Key) -> bool) {
        let ending: Vec<Key> = self.about(&subject).map(|(key, _)| key.clone()).filter(|key| which(key)).collect();
        for key in ending {
            let Some(alert) = self.alerts.get_mut(&key) else { continue };
            match alert.status {
                Status::Pending => drop(self.alerts.remove(&key)),
                Status::Firing => {
                    *alert = resolved(alert.clone(), at);
                    self.changes.push(Change::Resolved(alert.clone()));
                }
                Status::Resolved => {}
            }
        }
    }

    fn pass(&mut self, now: Timestamp) {
        // Silence first: it decides about the others of the same instance.
        for (_, alert) in self.alerts.iter_mut().filter(|(key, _)| key.rule == SILENT) {
            self.changes.extend(fire(alert, now, false));
        }
        let silent: BTreeSet<Option<Subject>> = self
            .alerts
            .iter()
            .filter(|(key, alert)| key.rule == SILENT && alert.status == Status::Firing)
            .map(|(key, _)| key.subject.clone())
            .collect();
        self.give_up(now);
        for (key, alert) in &mut self.alerts {
            let silent = key.rule != SILENT && key.subject.is_some() && silent.contains(&key.subject);
            self.changes.extend(fire(alert, now, silent));
            self.changes.extend(let_go(alert, now, self.settings.hold));
        }
        let keep = self.settings.keep_resolved;
        self.alerts.retain(|_, alert| alert.ended.is_none_or(|ended| now < ended.plus(keep)));
    }

    fn give_up(&mut self, now: Timestamp) {
        let gone_after = self.settings.gone_after;
        let gone = |alert: &&Alert| alert.rule == SILENT && now >= alert.since.plus(gone_after);
        let subjects: Vec<Option<Subject>> =
            self.alerts.values().filter(gone).filter(|a| a.ended.is_none()).map(|a| a.subject.clone()).collect();
        for subject in subjects.into_iter().flatten() {
            self.apply(&RULES[0], Signal::Gone(subject), now);
        }
    }
}

/// A moment as people read it: `2026-11-22 02:03:09 UTC`.
fn to_the_second(at: Timestamp) -> String {
    match at.to_string().split_once('.') {
        Some((text, _)) => format!("{} UTC", text.replace('T', " ")),
        None => at.to_string(),
    }
}

/// Fires the alert if it is due.
fn fire(alert: &mut Alert, now: Timestamp, silent: bool) -> Option<Change> {
    alert.inhibited = silent && alert.status == Status::Pending;
    if alert.status != Status::Pending || alert.inhibited || now < alert.due {
        return None;
    }
    alert.status = Status::Firing;
    Some(Change::Firing(alert.clone()))
}

/// Ends the alert if it has no end of its own and was not seen for long enough.
fn let_go(alert: &mut Alert, now: Timestamp, hold: Duration) -> Option<Change> {
    if !lasts(alert.rule, Lasts::Moment) || alert.status == Status::Resolved || now < alert.last.plus(hold) {
        return None;
    }
    let told = alert.status == Status::Firing;
    *alert = resolved(alert.clone(), now);
    told.then(|| Change::Resolved(alert.clone()))
}

fn resolved(mut alert: Alert, at: Timestamp) -> Alert {
    alert.status = Status::Resolved;
    alert.inhibited = false;
    alert.ended = Some(at);
    alert
}

fn lasts(rule: &str, how: Lasts) -> bool {
    rule::by_name(rule).is_some_and(|rule| rule.lasts == how)
}

/// The alert that was told with `labels` before a restart, and has ended since; `None` if its rule is gone.
fn ended_meanwhile(labels: &Labels, since: Timestamp, now: Timestamp) -> Option<Alert> {
    let (rule, case) = told_case(labels, "it ended while the collector was not running")?;
    let mut alert = Alert::new(rule, &case, since);
    alert.seen(case, since);
    Some(resolved(alert, now))
}

/// The case that was told with `labels`, where only events know whether it holds.
fn lasting(labels: &Labels, what: &str) -> Option<(&'static Rule, Case)> {
    told_case(labels, what).filter(|(rule, _)| rule.lasts == Lasts::UntilCleared)
}

/// The case that was told with `labels`; `None` if its rule is gone.
fn told_case(labels: &Labels, what: &str) -> Option<(&'static Rule, Case)> {
    let rule = rule::by_name(labels.get("alertname")?)?;
    let subject = labels.get("workload").zip(labels.get("instance"));
    let apart = rule::APART.into_iter().find_map(|name| Some((name, labels.get(name)?.clone())));
    let case = Case {
        subject: subject.map(|(w, i)| Subject { workload: w.clone(), instance: i.clone() }),
        apart,
        severity: labels.get("severity").and_then(|word| word.parse().ok()),
        due: None,
        what: what.to_owned(),
        source: String::new(),
        evidence: Vec::new(),
        what_to_do: rule.what_to_do.to_owned(),
        count: 1,
    };
    Some((rule, case))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sidewarden_proto::event::*;
    use sidewarden_proto::finding::{CisIds, Finding, Remedy, Vantage, Verdict};
    use sidewarden_proto::identity::AgentId;

    fn orders() -> AgentId {
        "spiffe://x.test/shop/orders#orders-1".parse().unwrap()
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_secs(seconds)
    }

    fn plaintext(source: &str) -> Body {
        let reason = RefusalReason::Plaintext;
        Body::from(ConnectionRefused {
            direction: Direction::Inbound,
            reason,
            detail: String::new(),
            hint: reason.hint().into(),
            listener: "0.0.0.0:8443".into(),
            source: source.into(),
            peer: String::new(),
            count: 1,
        })
    }

    fn verdict(check: &str, verdict: Verdict) -> Finding {
        Finding {
            check: check.into(),
            ids: CisIds::default(),
            title: "a title".into(),
            severity: Severity::Critical,
            verdict,
            evidence: Vec::new(),
            remedy: Remedy::default(),
            vantage: Vantage::Open,
        }
    }

    fn changed(check: &str, to: Verdict) -> Body {
        Body::from(VerdictChanged { before: String::new(), finding: verdict(check, to) })
    }

    fn disconnected(clean: bool) -> Body {
        let workload = orders().workload;
        Body::from(AgentDisconnected { workload, instance: "orders-1".into(), reason: "timed out".into(), clean })
    }

    fn connected() -> Body {
        Body::from(AgentConnected {
            workload: orders().workload,
            instance: "orders-1".into(),
            source: "10.0.0.7:1".into(),
            transport: "quic".into(),
            version: "0.1.0".into(),
            clock_ahead_us: 0,
            mode: String::new(),
            certificate: None,
        })
    }

    fn see(engine: &mut Engine, seconds: i64, body: &Body) {
        engine.observe(seen(&orders(), seconds, body), &Lasts::ALL);
    }

    fn seen<'a>(agent: &'a AgentId, seconds: i64, body: &'a Body) -> Seen<'a> {
        Seen {
            agent,
            at: at(seconds),
            received: at(seconds),
            kind: body.kind(),
            severity: Severity::Warning,
            summary: "",
            body: Some(body),
            last_tick: None,
            forged: false,
        }
    }

    fn live() -> Engine {
        let mut engine = Engine::new(Settings::default());
        engine.settle(at(0), |_| true);
        engine
    }

    fn names(changes: &[Change]) -> Vec<String> {
        let name = |change: &Change| match change {
            Change::Firing(alert) => format!("+{}", alert.rule),
            Change::Resolved(alert) => format!("-{}", alert.rule),
        };
        changes.iter().map(name).collect()
    }

    /// Plays `steps` of (second, event or nothing) and compares what is told at each.
    fn play(steps: Vec<(i64, Option<Body>, &[&str])>) {
        let mut engine = live();
        for (i, (seconds, body, expected)) in steps.into_iter().enumerate() {
            if let Some(body) = body {
                see(&mut engine, seconds, &body);
            }
            assert_eq!(names(&engine.advance(at(seconds))), expected, "step {i}, second {seconds}");
        }
    }

    #[test]
    fn a_momentary_alert_is_told_once_and_ends_ten_minutes_after_the_last_occurrence() {
        play(vec![
            (1, Some(plaintext("172.18.0.1:1")), &["+PlaintextRefused"]),
            (2, Some(plaintext("172.18.0.1:2")), &[]),
            (500, Some(plaintext("172.18.0.1:3")), &[]),
            (1099, None, &[]),
            (1100, None, &["-PlaintextRefused"]),
            (1101, None, &[]),
            (1200, Some(plaintext("172.18.0.1:4")), &["+PlaintextRefused"]),
        ]);
    }

    #[test]
    fn a_broken_check_fires_until_its_verdict_changes() {
        play(vec![
            (1, Some(changed("docker-socket", Verdict::Fail)), &["+CheckFailed"]),
            (90_000, None, &[]),
            (90_001, Some(changed("capabilities", Verdict::Pass)), &[]),
            (90_002, Some(changed("docker-socket", Verdict::Unknown { grant: "x".into() })), &[]),
            (90_003, Some(changed("docker-socket", Verdict::Pass)), &["-CheckFailed"]),
        ]);
    }

    #[test]
    fn a_check_that_fails_and_is_mended_within_one_batch_is_still_told() {
        let mut engine = live();
        see(&mut engine, 1, &changed("docker-socket", Verdict::Fail));
        see(&mut engine, 1, &changed("docker-socket", Verdict::Pass));
        assert_eq!(names(&engine.advance(at(1))), ["+CheckFailed", "-CheckFailed"]);
    }

    #[test]
    fn a_baseline_ends_what_it_does_not_mention() {
        let baseline = Body::from(PostureBaseline {
            findings: vec![verdict("capabilities", Verdict::Fail)],
            ..Default::default()
        });
        play(vec![
            (1, Some(changed("docker-socket", Verdict::Fail)), &["+CheckFailed"]),
            (2, Some(baseline), &["-CheckFailed", "+CheckFailed"]),
        ]);
    }

    #[test]
    fn a_silent_agent_is_told_after_half_a_minute_and_keeps_others_from_beginning() {
        play(vec![
            (1, Some(disconnected(false)), &[]),
            (30, None, &[]),
            (31, None, &["+AgentSilent"]),
            (32, Some(changed("docker-socket", Verdict::Fail)), &[]),
            (33, Some(connected()), &["-AgentSilent", "+CheckFailed"]),
        ]);
    }

    #[test]
    fn an_agent_that_stays_silent_for_a_day_is_gone_with_everything_about_it() {
        play(vec![
            (1, Some(changed("docker-socket", Verdict::Fail)), &["+CheckFailed"]),
            (2, Some(disconnected(false)), &[]),
            (32, None, &["+AgentSilent"]),
            (86_401, None, &[]),
            (86_402, None, &["-AgentSilent", "-CheckFailed"]),
        ]);
    }

    #[test]
    fn a_silence_that_was_told_goes_on_over_a_restart() {
        let mut before = live();
        see(&mut before, 1, &disconnected(false));
        before.advance(at(40));
        let labels = before.alerts().next().unwrap().labels();
        let mut after = Engine::new(Settings::default());
        see(&mut after, 40, &told(true, labels, 1));
        let case = rule::not_back(&orders(), at(100));
        after.raise(rule::by_name(SILENT).unwrap(), case, at(1));
        after.settle(at(101), |_| true);
        assert!(after.advance(at(101)).is_empty());
        assert_eq!(after.alerts().next().unwrap().status, Status::Firing);
        see(&mut after, 102, &connected());
        assert_eq!(names(&after.advance(at(102))), ["-AgentSilent"]);
    }

    #[test]
    fn an_agent_that_reconnects_quickly_was_never_silent() {
        play(vec![(1, Some(disconnected(false)), &[]), (5, Some(connected()), &[]), (100, None, &[])]);
    }

    #[test]
    fn a_clean_goodbye_ends_the_conditions_of_the_instance_but_not_what_happened() {
        play(vec![
            (1, Some(changed("docker-socket", Verdict::Fail)), &["+CheckFailed"]),
            (2, Some(plaintext("172.18.0.1:1")), &["+PlaintextRefused"]),
            (3, Some(disconnected(true)), &["-CheckFailed"]),
            (700, None, &["-PlaintextRefused"]),
        ]);
    }

    #[test]
    fn a_certificate_alerts_in_its_last_third_and_tenth_unless_it_is_renewed() {
        let issued = |until| {
            Body::from(CertificateIssued {
                workload: orders().workload,
                instance: "orders-1".into(),
                serial: "01".into(),
                spki: String::new(),
                not_after_us: at(until),
                by: "token".into(),
            })
        };
        play(vec![
            (0, Some(issued(300)), &[]),
            (150, Some(issued(450)), &[]),
            (200, None, &[]),
            (349, None, &[]),
            (350, None, &["+CertificateExpiring"]),
            (360, Some(issued(660)), &["-CertificateExpiring"]),
            (559, None, &[]),
            (560, None, &["+CertificateExpiring"]),
            (629, None, &[]),
            (630, None, &["+CertificateEnding"]),
            (640, Some(issued(940)), &["-CertificateExpiring", "-CertificateEnding"]),
        ]);
    }

    #[test]
    fn a_ca_certificate_that_ends_soon_is_told_once_until_it_is_replaced_or_gone() {
        let one = |what: &str, until| CaCertificate {
            what: what.into(),
            name: String::new(),
            not_before_us: at(0),
            not_after_us: at(until),
        };
        let list = |root, page: Option<i64>| {
            let page = page.map(|until| one("page", until));
            let certificates = [one("root", root)].into_iter().chain(page).collect();
            Some(CaCertificates { certificates }.into())
        };
        play(vec![
            (7100, list(9000, Some(9000)), &["+CaExpiring", "+CaExpiring"]),
            (7101, list(9000, Some(9000)), &[]),
            (7102, list(9000, None), &["-CaExpiring"]),
            (7103, list(90_000, None), &["-CaExpiring"]),
        ]);
    }

    #[test]
    fn labels_stay_the_same_while_the_summary_tells_the_news() {
        let mut engine = live();
        see(&mut engine, 1, &plaintext("172.18.0.1:1"));
        let first = engine.alerts().next().unwrap().clone();
        (2..9).for_each(|n| see(&mut engine, n, &plaintext(&format!("172.18.0.{n}:1"))));
        let later = engine.alerts().next().unwrap();
        assert_eq!((first.labels(), first.id()), (later.labels(), later.id()));
        assert_eq!(
            later.summary(),
            "shop/orders (orders-1): plaintext was refused at 0.0.0.0:8443, from 172.18.0.1, 172.18.0.2, 172.18.0.3, \
             172.18.0.4, 172.18.0.5 and others, 8 times since 1970-01-01 00:00:01 UTC"
        );
    }

    #[test]
    fn another_severity_is_another_alert() {
        let mut finding = verdict("docker-socket", Verdict::Fail);
        finding.severity = Severity::Warning;
        let warning = Body::from(VerdictChanged { before: String::new(), finding });
        play(vec![
            (1, Some(changed("docker-socket", Verdict::Fail)), &["+CheckFailed"]),
            (2, Some(warning), &["-CheckFailed", "+CheckFailed"]),
        ]);
    }

    #[test]
    fn what_happened_stays_as_bad_as_its_worst_for_as_long_as_it_goes_on() {
        let (mut engine, agent) = (live(), orders());
        for (seconds, severity) in [(1, Severity::Warning), (2, Severity::Critical), (3, Severity::Warning)] {
            let reason = "malformed: x".into();
            let body = Body::from(IngestRefused { source: "10.0.0.9:1".into(), reason, count: 1 });
            let seen = Seen { severity, ..seen(&agent, seconds, &body) };
            engine.observe(seen, &Lasts::ALL);
        }
        let changes = engine.advance(at(3));
        assert_eq!(names(&changes), ["+IngestRefused", "-IngestRefused", "+IngestRefused"]);
        assert_eq!(changes[2].alert().severity, Severity::Critical);
    }

    fn told(firing: bool, labels: Labels, since: i64) -> Body {
        let changed = AlertChanged { alert: labels["alertname"].clone(), labels, since_us: at(since) };
        if firing { AlertFiring(changed).into() } else { AlertResolved(changed).into() }
    }

    #[test]
    fn after_a_restart_nothing_is_told_twice_and_what_ended_is_called_off() {
        let mut before = live();
        see(&mut before, 1, &changed("docker-socket", Verdict::Fail));
        see(&mut before, 1, &plaintext("172.18.0.1:1"));
        let labels: Vec<Labels> = before.alerts().map(Alert::labels).collect();

        let mut after = Engine::new(Settings::default());
        see(&mut after, 1, &changed("docker-socket", Verdict::Fail));
        see(&mut after, 1, &plaintext("172.18.0.1:1"));
        labels.iter().for_each(|labels| see(&mut after, 1, &told(true, labels.clone(), 1)));
        see(&mut after, 5000, &changed("capabilities", Verdict::Fail));
        after.settle(at(5001), |_| true);
        let mut changes = names(&after.advance(at(5001)));
        changes.sort();
        assert_eq!(changes, ["+CheckFailed", "-PlaintextRefused"]);
    }

    #[test]
    fn what_was_called_off_before_the_restart_is_not_called_off_again() {
        let mut engine = Engine::new(Settings::default());
        let labels = Labels::from([("alertname".into(), "PlaintextRefused".into())]);
        see(&mut engine, 1, &told(true, labels.clone(), 1));
        see(&mut engine, 2, &told(false, labels, 1));
        engine.settle(at(3), |_| true);
        assert!(engine.advance(at(3)).is_empty());
    }

    fn engine_lost() -> Body {
        EngineLost { why: "connection refused".into() }.into()
    }

    /// What an engine makes of a past that is told by `bodies`, one each second, and of what it told of them.
    fn after_restart(bodies: &[Body], is_here: bool) -> Engine {
        let (mut before, mut after) = (live(), Engine::new(Settings::default()));
        for (seconds, body) in (1..).zip(bodies) {
            see(&mut before, seconds, body);
            see(&mut after, seconds, body);
            for change in before.advance(at(seconds)) {
                let firing = matches!(change, Change::Firing(_));
                see(&mut after, seconds, &told(firing, change.alert().labels(), seconds));
            }
        }
        after.settle(at(90_000), |_| is_here);
        after
    }

    #[test]
    fn what_only_events_know_goes_on_over_a_restart_until_an_event_ends_it() {
        let mut after = after_restart(&[engine_lost()], true);
        assert!(after.advance(at(90_000)).is_empty());
        see(&mut after, 90_001, &EngineBack { version: String::new() }.into());
        assert_eq!(names(&after.advance(at(90_001))), ["-EngineLost"]);
    }

    #[test]
    fn what_was_told_stands_though_its_beginning_cannot_be_read_again() {
        let mut before = live();
        see(&mut before, 1, &engine_lost());
        let labels = before.alerts().next().unwrap().labels();
        let mut after = Engine::new(Settings::default());
        see(&mut after, 1, &told(true, labels, 1));
        after.settle(at(90_000), |_| true);
        assert!(after.advance(at(90_000)).is_empty());
        assert_eq!(after.alerts().next().unwrap().status, Status::Firing);
    }

    #[test]
    fn what_was_called_off_before_the_restart_does_not_fire_again_though_only_its_beginning_is_read() {
        let mut engine = Engine::new(Settings::default());
        see(&mut engine, 1, &engine_lost());
        let labels = engine.alerts().next().unwrap().labels();
        see(&mut engine, 1, &told(true, labels.clone(), 1));
        see(&mut engine, 20, &told(false, labels, 1));
        engine.settle(at(40), |_| true);
        assert!(engine.advance(at(40)).is_empty() && engine.alerts().count() == 0);
    }

    #[test]
    fn what_ended_while_nobody_told_it_is_called_off_and_so_is_everything_about_who_is_gone() {
        let back = Body::from(EngineBack { version: String::new() });
        for (bodies, is_here) in [(vec![engine_lost()], false), (vec![engine_lost(), back.clone()], true)] {
            let gone = after_restart(&bodies, is_here).advance(at(90_000));
            assert_eq!(gone.is_empty(), is_here, "an end that was told is told once: {:?}", names(&gone));
        }
        let mut after = Engine::new(Settings::default());
        see(&mut after, 1, &engine_lost());
        let labels = after.alerts().next().unwrap().labels();
        see(&mut after, 1, &told(true, labels, 1));
        see(&mut after, 2, &back);
        after.settle(at(90_000), |_| true);
        assert_eq!(names(&after.advance(at(90_000))), ["-EngineLost"]);
    }

    #[test]
    fn a_quarantine_that_the_state_holds_goes_on_over_a_restart_and_one_that_ended_does_not_come_back() {
        let case = rule::gated(&orders(), "g", GateStatus::Quarantined, "privileged").unwrap();
        let rule = rule::by_name("WorkloadQuarantined").unwrap();
        let mut before = live();
        before.raise(rule, case.clone(), at(1));
        let labels = before.alerts().next().unwrap().labels();
        let mut after = Engine::new(Settings::default());
        after.raise(rule, case, at(1));
        see(&mut after, 1, &told(true, labels.clone(), 1));
        after.settle(at(7200), |_| true);
        assert!(after.advance(at(7200)).is_empty());
        assert_eq!(after.alerts().next().unwrap().status, Status::Firing);
        let mut ended = Engine::new(Settings::default());
        see(&mut ended, 1, &told(true, labels.clone(), 1));
        see(&mut ended, 2, &told(false, labels, 1));
        ended.settle(at(40), |_| true);
        assert!(ended.advance(at(40)).is_empty() && ended.alerts().count() == 0);
    }

    fn quarantine(gate: &str, status: GateStatus) -> Body {
        let (workload, instance) = (orders().workload, "orders-1".into());
        QuarantineChanged { workload, instance, gate: gate.into(), status, why: "privileged".into() }.into()
    }

    fn alone(on: bool) -> Body {
        QuarantineAlone { gate: "g".into(), on, why: "privileged".into() }.into()
    }

    fn started() -> Body {
        let (version, mode, vantage) = ("1".into(), Mode::Sidecar, Vantage::Open);
        AgentStarted { version, mode, vantage, clean: true, heartbeat_secs: 5 }.into()
    }

    #[test]
    fn what_an_agent_did_without_a_collector_ends_by_its_own_word_or_its_start_and_ends_nothing_of_the_collectors() {
        play(vec![
            (1, Some(alone(true)), &["+QuarantinedAlone"]),
            (2, Some(started()), &["-QuarantinedAlone"]),
            (3, Some(alone(true)), &["+QuarantinedAlone"]),
            (4, Some(quarantine("g", GateStatus::Quarantined)), &["+WorkloadQuarantined"]),
            (5, Some(alone(false)), &["-QuarantinedAlone"]),
            (6, Some(started()), &[]),
            (7, Some(quarantine("g", GateStatus::Clear)), &["-WorkloadQuarantined"]),
        ]);
    }

    #[test]
    fn one_that_ran_on_and_is_quarantined_now_is_told_anew_with_what_is_true_now() {
        let mut engine = live();
        see(&mut engine, 1, &quarantine("g", GateStatus::Capped));
        assert_eq!(names(&engine.advance(at(1))), ["+WorkloadQuarantined"]);
        see(&mut engine, 2, &quarantine("g", GateStatus::Quarantined));
        let changes = engine.advance(at(2));
        assert_eq!(names(&changes), ["-WorkloadQuarantined", "+WorkloadQuarantined"]);
        assert!(changes[1].alert().what.contains("is quarantined by"), "{}", changes[1].alert().what);
    }

    #[test]
    fn what_is_called_off_after_a_restart_bears_the_labels_that_were_told_and_is_called_off_once() {
        for name in rule::APART {
            for rule in RULES {
                let case = Case { apart: Some((name, "x".into())), ..rule::not_back(&orders(), at(1)) };
                let labels = Alert::new(rule, &case, at(1)).labels();
                let mut after = Engine::new(Settings::default());
                see(&mut after, 1, &told(true, labels.clone(), 1));
                after.settle(at(90_000), |_| false);
                let changes = after.advance(at(90_000));
                assert!(matches!(&changes[..], [Change::Resolved(alert)] if alert.labels() == labels), "{labels:?}");
                let mut again = Engine::new(Settings::default());
                see(&mut again, 1, &told(true, labels.clone(), 1));
                see(&mut again, 2, &told(false, changes[0].alert().labels(), 1));
                again.settle(at(90_000), |_| false);
                assert!(again.advance(at(90_000)).is_empty(), "{labels:?}");
            }
        }
    }

    #[test]
    fn one_hostile_agent_cannot_raise_alerts_without_end() {
        let mut engine = live();
        (0..1000).for_each(|n| see(&mut engine, 1, &changed(&format!("check-{n}"), Verdict::Fail)));
        assert_eq!(engine.alerts().count(), MAX_OF_RULE);
        assert_eq!(engine.over_limit(), 900);
    }

    fn listener(n: u16, is_open: bool) -> Body {
        let (address, detail, protocol) = (format!("0.0.0.0:{n}"), String::new(), Protocol::Tcp);
        match is_open {
            true => ListenerExposed { address, detail, protocol, owner: String::new(), reason: String::new() }.into(),
            false => ListenerClosed { address, protocol, detail }.into(),
        }
    }

    #[test]
    fn a_hostile_workload_cannot_keep_what_others_say_of_it_from_being_told() {
        let mut engine = live();
        (1..=200).for_each(|n| see(&mut engine, 1, &listener(n, true)));
        engine.advance(at(1));
        see(&mut engine, 2, &disconnected(false));
        assert_eq!(names(&engine.advance(at(40))), ["+AgentSilent"]);
        let mut engine = live();
        let gates = |gate: u16| quarantine(&format!("gate-{gate}"), GateStatus::Quarantined);
        (1..=200).for_each(|n| see(&mut engine, 1, &gates(n)));
        assert_eq!(engine.alerts().count(), 200, "the collector's own word has an end");
    }

    #[test]
    fn what_has_ended_makes_room_for_what_holds() {
        let mut engine = live();
        (1..=200).for_each(|n| {
            see(&mut engine, 1, &listener(n, true));
            see(&mut engine, 2, &listener(n, false));
        });
        assert_eq!((engine.alerts().count(), engine.over_limit()), (MAX_OF_RULE, 0));
        see(&mut engine, 3, &listener(80, true));
        assert!(engine.alerts().any(|alert| alert.status == Status::Firing));
    }

    #[test]
    fn resolved_alerts_are_forgotten_after_a_while() {
        let mut engine = live();
        see(&mut engine, 1, &plaintext("172.18.0.1:1"));
        engine.advance(at(1000));
        assert_eq!(engine.alerts().count(), 1);
        engine.advance(at(1000 + 901));
        assert_eq!(engine.alerts().count(), 0);
    }
}
