//! What rules read of certificates, trust, revocations and policies.

use super::*;

/// How much of a certificate's life is left when a rule is due: a tenth where it is critical, a third otherwise, and a quarter of one
/// that is somebody else's to renew: many do so at a third, which is no fault yet.
pub fn share(severity: Severity, elsewhere: bool) -> u32 {
    match (severity, elsewhere) {
        (Severity::Critical, _) => 10,
        (_, true) => 4,
        (_, false) => 3,
    }
}

/// As it was issued here, or as an agent has shown it.
pub(super) fn issued(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let mut elsewhere = false;
    let (whose, begins, ends, serial, by) = match seen.body {
        Some(Body::CertificateIssued(body)) => {
            (subject(&body.workload, &body.instance), seen.at, body.not_after_us, &body.serial, body.by.as_str())
        }
        Some(Body::AgentConnected(AgentConnected { workload, instance, certificate: Some(shown), .. })) => {
            elsewhere = shown.elsewhere;
            let by = if elsewhere { "somebody else's CA" } else { "a collector" };
            (subject(workload, instance), shown.not_before_us, shown.not_after_us, &shown.serial, by)
        }
        _ => return Vec::new(),
    };
    let due = ends.minus(ends.since(begins) / share(rule.severity, elsewhere));
    let mut case = expiring(seen.agent, ends, due, elsewhere);
    case.subject = Some(whose);
    case.evidence = lines([("serial", serial), ("issued by", &by.to_owned())]);
    vec![Signal::Raise(case)]
}

/// The case of a certificate that ends at `not_after` and should have been renewed by `due`.
pub fn expiring(agent: &AgentId, not_after: Timestamp, due: Timestamp, elsewhere: bool) -> Case {
    let what = format!("the certificate ends at {not_after} and was not renewed");
    let then = match elsewhere {
        true => "its certificates are of another CA: ask why that one, or what fetches them, gives no newer one",
        false => "read why renewing fails in the agent's log, or enrol it anew",
    };
    let mut case = about(agent, then, what);
    case.due = Some(due);
    case
}

pub(super) fn renewal(_: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    match seen.body {
        Some(Body::IdentityRenewalFailed(body)) => {
            let mut case = not_renewed(seen.agent, &body.error);
            case.evidence.push(format!("the certificate in use ends at {}", body.not_after_us));
            vec![Signal::Raise(case)]
        }
        Some(Body::IdentityRenewed(_)) => vec![Signal::Clear(Some(seen.agent.into()), None)],
        Some(Body::CertificateIssued(body)) => vec![Signal::Clear(Some(subject(&body.workload, &body.instance)), None)],
        _ => Vec::new(),
    }
}

pub(super) fn trust_files(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    match seen.body {
        Some(Body::TrustFilesRefused(body)) => {
            let mut case = case(seen, rule, format!("trust files cannot be used: {}", short(&body.error, 200)));
            case.evidence = lines([("error", &body.error)]);
            vec![Signal::Raise(case)]
        }
        // An agent does not start with files that cannot be used.
        Some(Body::TrustChanged(_) | Body::AgentStarted(_)) => vec![Signal::Clear(Some(seen.agent.into()), None)],
        _ => Vec::new(),
    }
}

pub(super) fn revocation_lists(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    match seen.body {
        Some(Body::TrustCrls(body)) if !body.lacking.is_empty() => {
            let then = if body.strict { "its peers are refused" } else { "its peers are not asked about" };
            let mut case = case(seen, rule, format!("{}: {then}", short(&body.lacking[0], 200)));
            case.evidence = body.lacking.iter().take(20).map(|lack| short(lack, 300)).collect();
            vec![Signal::Raise(case)]
        }
        // One that starts tells anew, or was told not to ask for lists any more.
        Some(Body::TrustCrls(_) | Body::AgentStarted(_)) => vec![Signal::Clear(Some(seen.agent.into()), None)],
        _ => Vec::new(),
    }
}

pub(super) fn rotated(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::CaRotated(body)) = seen.body else { return Vec::new() };
    let mut case = case(seen, rule, format!("the CA's rotation took the step `{}`", short(&body.step, 20)));
    let steps = ["prepare", "activate", "taint", "retire", "compromise", "abandon"];
    (case.subject, case.apart) = (None, Some(("reason", known(&body.step, &steps))));
    case.evidence = lines([("root that issues now", &body.active), ("left behind", &body.left_behind.to_string())]);
    case.evidence.extend(body.named.iter().map(|name| format!("left behind: {}", short(name, 200))));
    vec![Signal::Raise(case)]
}

/// All of them at once: what is no longer listed has been replaced.
pub(super) fn ca_dates(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::CaCertificates(body)) = seen.body else { return Vec::new() };
    let whats = ["root", "issuing", "collector", "identity", "identity_root", "page"];
    // One alert for each kind, about the one that ends first.
    let soonest = |what: &str| {
        let of_kind = body.certificates.iter().filter(|one| one.what == what);
        of_kind.min_by_key(|one| due(one, rule.severity)).cloned()
    };
    let raise = |one: CaCertificate| {
        let which = if one.name.is_empty() { String::new() } else { format!(" ({})", short(&one.name, 120)) };
        let whose = match one.what.as_str() {
            "identity" => "collector's certificate of another CA",
            "identity_root" => "root of another CA",
            "page" => "page's certificate",
            what => &format!("{what} certificate"),
        };
        let mut case = case(seen, rule, format!("the {whose}{which} ends at {}", one.not_after_us));
        (case.subject, case.due) = (None, Some(due(&one, rule.severity)));
        case.apart = Some(("reason", known(&one.what, &whats)));
        Signal::Raise(case)
    };
    let clear = |what: &str| Signal::Clear(None, Some(what.to_owned()));
    whats.into_iter().map(|what| soonest(what).map_or_else(|| clear(what), raise)).collect()
}

fn due(one: &CaCertificate, severity: Severity) -> Timestamp {
    let is_elsewhere = ["identity", "identity_root", "page"].contains(&one.what.as_str());
    one.not_after_us.minus(one.not_after_us.since(one.not_before_us) / share(severity, is_elsewhere))
}

/// The case of an agent whose last renewal failed with `error`.
pub fn not_renewed(agent: &AgentId, error: &str) -> Case {
    let what = format!("renewing the certificate fails: {}", short(error, 200));
    let mut case = about(agent, "the error says why; the certificate in use holds until its end", what);
    case.evidence = lines([("error", &error.to_owned())]);
    case
}

pub(super) fn quarantined(_: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::QuarantineChanged(body)) = seen.body else { return Vec::new() };
    let who = subject(&body.workload, &body.instance);
    let case = gated(seen.agent, &body.gate, body.status, &body.why);
    // What it stands for now is told anew: one that ran on and is off the data plane now is another thing to everybody.
    let raise = case.map(|case| Signal::Raise(Case { subject: Some(who.clone()), ..case }));
    [Signal::Clear(Some(who), Some(word(&body.gate)))].into_iter().chain(raise).collect()
}

pub(super) fn quarantined_alone(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let clear = |gate| vec![Signal::Clear(Some(seen.agent.into()), gate)];
    match seen.body {
        Some(Body::QuarantineAlone(body)) if body.on => {
            let gate = word(&body.gate);
            let what =
                format!("without a collector's word it is quarantined by the gate {gate}: {}", short(&body.why, 200));
            let mut case = case(seen, rule, what);
            case.apart = Some(("gate", gate));
            case.evidence = lines([("gate", &body.gate), ("broken", &body.why)]);
            vec![Signal::Raise(case)]
        }
        Some(Body::QuarantineAlone(body)) => clear(Some(word(&body.gate))),
        // One that starts keeps its workload in until it has been alone for long enough again.
        Some(Body::AgentStarted(_)) => clear(None),
        _ => Vec::new(),
    }
}

/// The case of an instance that stands so before a gate; `None` of one that keeps it.
pub fn gated(agent: &AgentId, gate: &str, status: GateStatus, why: &str) -> Option<Case> {
    let (severity, what) = match status {
        GateStatus::Clear => return None,
        GateStatus::Quarantined => (Severity::Critical, "is quarantined by"),
        GateStatus::Capped => (Severity::Critical, "breaks, and is let be because of the limits of,"),
        GateStatus::DryRun => (Severity::Warning, "would be quarantined by"),
    };
    let then = by_name("WorkloadQuarantined").map_or("", |rule| rule.what_to_do);
    let mut case = about(agent, then, format!("it {what} the gate {}: {why}", word(gate)));
    case.severity = Some(severity);
    case.apart = Some(("gate", word(gate)));
    case.evidence = lines([("gate", &gate.to_owned()), ("broken", &why.to_owned())]);
    Some(case)
}

pub(super) fn policy_changed(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let (what, text, by, source, why) = match seen.body {
        Some(Body::PolicyApplied(body)) => {
            ("policy", format!("policy {} was applied", body.version), &body.by, &body.source, &body.why)
        }
        Some(Body::QuarantineReleased(body)) => {
            let text = format!("{}#{} is let in until {}", body.workload, body.instance, body.until_us);
            ("release", text, &body.by, &body.source, &body.why)
        }
        _ => return Vec::new(),
    };
    let mut case = case(seen, rule, format!("{text} by {by}: {why}"));
    case.subject = None;
    case.apart = Some(("change", what.to_owned()));
    case.source = host_of(source).to_owned();
    case.evidence = lines([("reason", why), ("by", by)]);
    vec![Signal::Raise(case)]
}

pub(super) fn revoked(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let (what, body) = match seen.body {
        Some(Body::IdentityRevoked(IdentityRevoked(body))) => ("revoked", body),
        Some(Body::IdentityRestored(IdentityRestored(body))) => ("restored", body),
        _ => return Vec::new(),
    };
    let mut case = case(seen, rule, format!("{} was {what} by {}: {}", body.revocation.what, body.by, body.why));
    case.subject = None;
    case.apart = Some(("change", what.to_owned()));
    case.source = host_of(&body.source).to_owned();
    case.evidence = lines([("revocation", &body.revocation.id), ("reason", &body.why), ("by", &body.by)]);
    vec![Signal::Raise(case)]
}

/// What was asked for is not verified, so it stays out of the labels.
pub(super) fn enrolment(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::EnrolmentRefused(body)) = seen.body else { return Vec::new() };
    let asked = if body.workload.is_empty() { "a workload" } else { &body.workload };
    let mut case = case(seen, rule, format!("a certificate for {} was refused: {}", short(asked, 120), body.reason));
    case.subject = None;
    case.apart = Some(("reason", known(&first_word(&body.reason), ENROLMENT_REASONS)));
    case.count = body.count.max(1);
    case.source = host_of(&body.source).to_owned();
    case.evidence = lines([("asked for (not verified)", &body.workload), ("reason", &body.reason)]);
    vec![Signal::Raise(case)]
}

const ENROLMENT_REASONS: &[&str] = &[
    "token_unknown",
    "token_used_up",
    "token_expired",
    "token_other_workload",
    "bad_request",
    "revoked",
    "grace_over",
    "clock",
    "second_instance",
    "internal",
];
