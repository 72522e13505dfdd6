//! Then and now to events: first the whole posture, then one event for each verdict that changed. Pure.

use sidewarden_proto::event::{
    Body, ContainerPosture, ContainerRef, ContainerVerdictChanged, Event, PostureBaseline, Severity, VerdictChanged,
};
use sidewarden_proto::finding::{Finding, Verdict};
use sidewarden_proto::time::Timestamp;

/// The events that tell how `now` differs from `then`. New evidence for the same verdict is no event.
pub fn differ(then: Option<&[Finding]>, now: &[Finding], of: &Origin, at: Timestamp) -> Vec<Event> {
    let Some(then) = then else { return vec![baseline(now, of, at)] };
    let told = |(before, f)| {
        let (severity, summary) = change(before, f);
        let was = before.map_or("", |f| f.verdict.word());
        let body = VerdictChanged { before: was.into(), finding: f.clone() };
        Event::new(at, severity, summary, &Body::from(body))
    };
    changes(then, now).map(told).collect()
}

/// The same about the container `container` of `host`.
pub fn differ_container(
    then: Option<&[Finding]>,
    now: &[Finding],
    host: &str,
    container: &ContainerRef,
    at: Timestamp,
) -> Vec<Event> {
    let Some(then) = then else {
        let (severity, summary) = whole(now);
        let summary = format!("{} ({}): {summary}", container.name, container.state);
        let body = ContainerPosture { container: container.clone(), host: host.into(), findings: now.to_vec() };
        return vec![Event::new(at, severity, summary, &Body::from(body))];
    };
    let told = |(before, f): (Option<&Finding>, &Finding)| {
        let (severity, summary) = change(before, f);
        let before = before.map_or("", |f| f.verdict.word()).into();
        let body = ContainerVerdictChanged { container: container.clone(), before, finding: f.clone() };
        Event::new(at, severity, format!("{}: {summary}", container.name), &Body::from(body))
    };
    changes(then, now).map(told).collect()
}

/// Where findings come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The host, as [`crate::facts::host::name_of_host`] says.
    pub host: String,
    /// The ids of the containers that were looked at.
    pub containers: Vec<String>,
}

fn changes<'a>(
    then: &'a [Finding],
    now: &'a [Finding],
) -> impl Iterator<Item = (Option<&'a Finding>, &'a Finding)> + 'a {
    let with_before = |f: &'a Finding| (then.iter().find(|b| b.check == f.check), f);
    now.iter().map(with_before).filter(|(before, f)| differs(*before, f))
}

fn differs(before: Option<&Finding>, now: &Finding) -> bool {
    let Some(before) = before else { return true };
    // A failure that got worse (CAP_SYS_ADMIN where there was NET_RAW) is worth a word, too.
    before.verdict.word() != now.verdict.word() || (now.verdict == Verdict::Fail && before.severity < now.severity)
}

fn baseline(now: &[Finding], of: &Origin, at: Timestamp) -> Event {
    let (severity, summary) = whole(now);
    let Origin { host, containers } = of.clone();
    Event::new(at, severity, summary, &Body::from(PostureBaseline { findings: now.to_vec(), host, containers }))
}

fn whole(now: &[Finding]) -> (Severity, String) {
    let failing: Vec<&Finding> = now.iter().filter(|f| f.verdict == Verdict::Fail).collect();
    let unknown = now.iter().filter(|f| matches!(f.verdict, Verdict::Unknown { .. })).count();
    let worst = failing.iter().map(|f| f.severity).max().unwrap_or(Severity::Info);
    let mut named: Vec<&&Finding> = failing.iter().collect();
    named.sort_by_key(|f| std::cmp::Reverse(f.severity));
    let names: Vec<&str> = named.iter().map(|f| f.check.as_str()).collect();
    let told = if names.is_empty() { String::new() } else { format!(" ({})", names.join(", ")) };
    let summary = format!("{} of {} CIS checks fail{told}, {unknown} cannot be seen", failing.len(), now.len());
    (worst, summary)
}

fn change(before: Option<&Finding>, now: &Finding) -> (Severity, String) {
    let was = before.map_or("", |f| f.verdict.word());
    let id = if now.ids.v1_3_1.is_empty() { String::new() } else { format!("CIS {} ", now.ids.v1_3_1) };
    let first = now.evidence.first().map(|e| e.line.as_str()).unwrap_or_default();
    let (said, why) = match &now.verdict {
        Verdict::Fail => ("now FAILS", first),
        Verdict::Pass if was == "fail" => ("passes again", first),
        Verdict::Pass => ("passes", first),
        Verdict::Unknown { grant } => ("can no longer be seen, it needs", grant.as_str()),
        Verdict::NotApplicable { why } => ("does not apply", why.as_str()),
        Verdict::Waived { why, .. } => ("is waived", why.as_str()),
    };
    let summary = format!("{id}{} {said}: {why}", now.check);
    (severity(now), summary)
}

fn severity(now: &Finding) -> Severity {
    match now.verdict {
        Verdict::Fail => now.severity,
        Verdict::Pass | Verdict::Unknown { .. } => Severity::Notice,
        Verdict::NotApplicable { .. } | Verdict::Waived { .. } => Severity::Info,
    }
}

#[cfg(test)]
mod tests {
    use sidewarden_proto::finding::{CisIds, Evidence, Remedy, Vantage};

    use super::*;

    const AT: Timestamp = Timestamp(7);

    fn socket(verdict: Verdict, line: &str) -> Finding {
        Finding {
            check: "docker-socket".into(),
            ids: CisIds { v1_3_1: "5.31".into(), v1_6: "5.32".into() },
            title: "no socket".into(),
            severity: Severity::Critical,
            verdict,
            evidence: vec![Evidence::new("/proc/1/mountinfo", line)],
            remedy: Remedy::default(),
            vantage: Vantage::Open,
        }
    }

    #[test]
    fn the_first_look_is_a_baseline_that_names_what_fails() {
        let got = differ(None, &[socket(Verdict::Fail, "x")], &Origin::default(), AT);
        assert_eq!((got.len(), got[0].kind.as_ref(), got[0].severity), (1, "posture.baseline", Severity::Critical));
        assert_eq!(got[0].summary, "1 of 1 CIS checks fail (docker-socket), 0 cannot be seen");
        assert_eq!(differ(None, &[socket(Verdict::Pass, "x")], &Origin::default(), AT)[0].severity, Severity::Info);
    }

    #[test]
    fn one_event_for_each_verdict_that_changed() {
        let unknown = || Verdict::Unknown { grant: "more sight".into() };
        let rows = [
            (Verdict::Pass, Verdict::Fail, "CIS 5.31 docker-socket now FAILS: y", Severity::Critical),
            (Verdict::Fail, Verdict::Pass, "CIS 5.31 docker-socket passes again: y", Severity::Notice),
            (unknown(), Verdict::Pass, "CIS 5.31 docker-socket passes: y", Severity::Notice),
            (
                Verdict::Fail,
                unknown(),
                "CIS 5.31 docker-socket can no longer be seen, it needs: more sight",
                Severity::Notice,
            ),
        ];
        for (before, now, summary, severity) in rows {
            let word = before.word();
            let got = differ(Some(&[socket(before, "x")]), &[socket(now, "y")], &Origin::default(), AT);
            assert_eq!(got.len(), 1, "{summary}");
            assert_eq!((got[0].summary.as_str(), got[0].severity), (summary, severity));
            let Ok(Some(Body::VerdictChanged(body))) = got[0].body() else { panic!("{summary}") };
            assert_eq!(body.before, word);
        }
    }

    #[test]
    fn new_evidence_is_no_event_but_a_worse_failure_is() {
        let same = differ(Some(&[socket(Verdict::Fail, "x")]), &[socket(Verdict::Fail, "y")], &Origin::default(), AT);
        assert!(same.is_empty());
        let milder = Finding { severity: Severity::Warning, ..socket(Verdict::Fail, "x") };
        assert_eq!(
            differ(Some(std::slice::from_ref(&milder)), &[socket(Verdict::Fail, "y")], &Origin::default(), AT).len(),
            1
        );
        assert!(differ(Some(&[socket(Verdict::Fail, "x")]), &[milder], &Origin::default(), AT).is_empty());
    }

    #[test]
    fn a_check_that_was_not_there_before_is_told() {
        assert_eq!(differ(Some(&[]), &[socket(Verdict::Fail, "y")], &Origin::default(), AT).len(), 1);
    }
}
