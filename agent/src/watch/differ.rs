//! Then and now to events: first the whole posture, then one event for each verdict that changed. Pure.

use sidewarden_proto::event::{Body, Event, PostureBaseline, Severity, VerdictChanged};
use sidewarden_proto::finding::{Finding, Verdict};
use sidewarden_proto::time::Timestamp;

/// The events that tell how `now` differs from `then`. New evidence for the same verdict is no event.
pub fn differ(then: Option<&[Finding]>, now: &[Finding], at: Timestamp) -> Vec<Event> {
    let Some(then) = then else { return vec![baseline(now, at)] };
    let before = |f: &Finding| then.iter().find(|b| b.check == f.check);
    now.iter().filter(|f| differs(before(f), f)).map(|f| changed(before(f), f, at)).collect()
}

fn differs(before: Option<&Finding>, now: &Finding) -> bool {
    let Some(before) = before else { return true };
    // A failure that got worse (CAP_SYS_ADMIN where there was NET_RAW) is worth a word, too.
    before.verdict.word() != now.verdict.word() || (now.verdict == Verdict::Fail && before.severity < now.severity)
}

fn baseline(now: &[Finding], at: Timestamp) -> Event {
    let failing: Vec<&Finding> = now.iter().filter(|f| f.verdict == Verdict::Fail).collect();
    let unknown = now.iter().filter(|f| matches!(f.verdict, Verdict::Unknown { .. })).count();
    let worst = failing.iter().map(|f| f.severity).max().unwrap_or(Severity::Info);
    let mut named: Vec<&&Finding> = failing.iter().collect();
    named.sort_by_key(|f| std::cmp::Reverse(f.severity));
    let names: Vec<&str> = named.iter().map(|f| f.check.as_str()).collect();
    let told = if names.is_empty() { String::new() } else { format!(" ({})", names.join(", ")) };
    let summary = format!("{} of {} CIS checks fail{told}, {unknown} cannot be seen", failing.len(), now.len());
    Event::new(at, worst, summary, &Body::from(PostureBaseline { findings: now.to_vec() }))
}

fn changed(before: Option<&Finding>, now: &Finding, at: Timestamp) -> Event {
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
    let body = VerdictChanged { before: was.into(), finding: now.clone() };
    Event::new(at, severity(now), summary, &Body::from(body))
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
        let got = differ(None, &[socket(Verdict::Fail, "x")], AT);
        assert_eq!((got.len(), got[0].kind.as_ref(), got[0].severity), (1, "posture.baseline", Severity::Critical));
        assert_eq!(got[0].summary, "1 of 1 CIS checks fail (docker-socket), 0 cannot be seen");
        assert_eq!(differ(None, &[socket(Verdict::Pass, "x")], AT)[0].severity, Severity::Info);
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
            let got = differ(Some(&[socket(before, "x")]), &[socket(now, "y")], AT);
            assert_eq!(got.len(), 1, "{summary}");
            assert_eq!((got[0].summary.as_str(), got[0].severity), (summary, severity));
            let Ok(Some(Body::VerdictChanged(body))) = got[0].body() else { panic!("{summary}") };
            assert_eq!(body.before, word);
        }
    }

    #[test]
    fn new_evidence_is_no_event_but_a_worse_failure_is() {
        let same = differ(Some(&[socket(Verdict::Fail, "x")]), &[socket(Verdict::Fail, "y")], AT);
        assert!(same.is_empty());
        let milder = Finding { severity: Severity::Warning, ..socket(Verdict::Fail, "x") };
        assert_eq!(differ(Some(std::slice::from_ref(&milder)), &[socket(Verdict::Fail, "y")], AT).len(), 1);
        assert!(differ(Some(&[socket(Verdict::Fail, "x")]), &[milder], AT).is_empty());
    }

    #[test]
    fn a_check_that_was_not_there_before_is_told() {
        assert_eq!(differ(Some(&[]), &[socket(Verdict::Fail, "y")], AT).len(), 1);
    }
}
