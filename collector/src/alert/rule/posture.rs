//! What rules read of verdicts and waivers, of workloads and of containers that a node agent judges.

use super::*;

pub(super) fn checks(_: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    match seen.body {
        Some(Body::VerdictChanged(body)) => finding(seen, &body.finding).into_iter().collect(),
        Some(Body::PostureBaseline(body)) => {
            let mentioned = body.findings.iter().map(|f| word(&f.check)).collect();
            let mut signals = vec![Signal::Only(seen.agent.into(), mentioned)];
            signals.extend(body.findings.iter().filter_map(|f| finding(seen, f)));
            signals
        }
        _ => Vec::new(),
    }
}

/// A container of a host, as whom an alert is about. No instance has a slash in its name.
pub(super) fn container_subject(agent: &AgentId, container: &ContainerRef) -> Subject {
    let name = if container.name.is_empty() { &container.id } else { &container.name };
    Subject { workload: agent.workload.to_string(), instance: format!("{}/{}", agent.instance, short(name, 100)) }
}

pub(super) fn container_checks(_: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let about = |container: &ContainerRef, finding: &Finding| {
        let subject = container_subject(seen.agent, container);
        match (&finding.verdict, broken(seen.agent, finding)) {
            (Verdict::Unknown { .. }, _) => None,
            (_, Some(case)) => Some(Signal::Raise(Case { subject: Some(subject), ..case })),
            (_, None) => Some(Signal::Clear(Some(subject), Some(word(&finding.check)))),
        }
    };
    match seen.body {
        Some(Body::ContainerVerdictChanged(body)) => about(&body.container, &body.finding).into_iter().collect(),
        Some(Body::ContainerPosture(body)) => {
            let mentioned = body.findings.iter().map(|f| word(&f.check)).collect();
            let mut signals = vec![Signal::Only(container_subject(seen.agent, &body.container), mentioned)];
            signals.extend(body.findings.iter().filter_map(|f| about(&body.container, f)));
            signals
        }
        Some(Body::ContainerGone(body)) => vec![Signal::Gone(container_subject(seen.agent, &body.container))],
        _ => Vec::new(),
    }
}

/// Every finding says whether it is waived; one that is not named is judged no longer.
pub(super) fn waivers(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let of_all = |subject: Subject, findings: &[Finding]| {
        let named = findings.iter().map(|f| word(&f.check)).collect();
        let each = findings.iter().filter_map(|finding| waiver(rule, seen, subject.clone(), finding));
        std::iter::once(Signal::Only(subject.clone(), named)).chain(each).collect()
    };
    match seen.body {
        Some(Body::VerdictChanged(body)) => waiver(rule, seen, seen.agent.into(), &body.finding).into_iter().collect(),
        Some(Body::PostureBaseline(body)) => of_all(seen.agent.into(), &body.findings),
        Some(Body::ContainerVerdictChanged(body)) => {
            waiver(rule, seen, container_subject(seen.agent, &body.container), &body.finding).into_iter().collect()
        }
        Some(Body::ContainerPosture(body)) => of_all(container_subject(seen.agent, &body.container), &body.findings),
        Some(Body::ContainerGone(body)) => vec![Signal::Gone(container_subject(seen.agent, &body.container))],
        _ => Vec::new(),
    }
}

fn waiver(rule: &Rule, seen: &Seen<'_>, subject: Subject, finding: &Finding) -> Option<Signal> {
    let check = word(&finding.check);
    let (by, why, until) = match &finding.verdict {
        Verdict::Waived { by, why, until } => (by, why, until),
        Verdict::Unknown { .. } => return None,
        _ => return Some(Signal::Clear(Some(subject), Some(check))),
    };
    let id = &finding.ids.v1_3_1;
    let mut case = case(seen, rule, format!("the waiver of CIS {id} {check} ends {until}"));
    case.subject = Some(subject);
    case.due = Some(until.minus(WAIVER_NOTICE));
    case.evidence = vec![format!("waived by {}: {}", short(by, 100), short(why, 300))];
    case.apart = Some(("check", check));
    Some(Signal::Raise(case))
}

pub(super) fn engine(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    match seen.body {
        Some(Body::EngineLost(body)) => {
            let mut case = case(seen, rule, "the container engine does not answer".into());
            case.evidence = lines([("why", &body.why)]);
            vec![Signal::Raise(case)]
        }
        Some(Body::EngineBack(_) | Body::AgentStarted(_)) => vec![Signal::Clear(Some(seen.agent.into()), None)],
        _ => Vec::new(),
    }
}

/// `unknown` neither begins nor ends an alert: what was broken and can no longer be seen is not mended.
fn finding(seen: &Seen<'_>, finding: &Finding) -> Option<Signal> {
    match (&finding.verdict, broken(seen.agent, finding)) {
        (Verdict::Unknown { .. }, _) => None,
        (_, Some(case)) => Some(Signal::Raise(case)),
        (_, None) => Some(Signal::Clear(Some(seen.agent.into()), Some(word(&finding.check)))),
    }
}

/// The case of a finding, if it is a failure that deserves an alert.
pub fn broken(agent: &AgentId, finding: &Finding) -> Option<Case> {
    if finding.verdict != Verdict::Fail || finding.severity < Severity::Warning {
        return None;
    }
    let mut case = about(agent, "apply the remedy that stands with the check, or waive it", failed_in_words(finding));
    case.apart = Some(("check", word(&finding.check)));
    case.severity = Some(finding.severity);
    case.evidence = finding.evidence.iter().map(|e| format!("{}: {}", e.source, e.line)).collect();
    if let Some(remedy) = remedy(finding) {
        case.what_to_do = remedy;
    }
    Some(case)
}

/// Titles say what the rule asks for, so they are quoted: the sentence says that it is broken.
fn failed_in_words(finding: &Finding) -> String {
    let id = if finding.ids.v1_3_1.is_empty() { String::new() } else { format!("CIS {} ", finding.ids.v1_3_1) };
    let evidence = finding.evidence.first().map(|e| format!(": {}", short(&e.line, 120))).unwrap_or_default();
    format!("breaks {id}{} “{}”{evidence}", finding.check, finding.title)
}

fn remedy(finding: &Finding) -> Option<String> {
    let ways = [
        ("compose", &finding.remedy.compose),
        ("docker run", &finding.remedy.docker_run),
        ("kubernetes", &finding.remedy.kubernetes),
    ];
    let told: Vec<String> =
        ways.iter().filter(|(_, how)| !how.is_empty()).map(|(way, how)| format!("{way}: {how}")).collect();
    if told.is_empty() { None } else { Some(told.join("\n")) }
}
