//! What rules read of agents: silence, losses, clocks.

use super::*;

pub(super) fn silence(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    match seen.body {
        Some(Body::AgentConnected(body)) => vec![Signal::Clear(Some(subject(&body.workload, &body.instance)), None)],
        Some(Body::AgentDisconnected(body)) if body.clean => {
            vec![Signal::Gone(subject(&body.workload, &body.instance))]
        }
        Some(Body::AgentDisconnected(body)) => {
            let mut case = case(seen, rule, format!("the agent is silent: {}", body.reason));
            case.subject = Some(subject(&body.workload, &body.instance));
            case.evidence = vec![format!("last connection ended at {}: {}", seen.at, body.reason)];
            vec![Signal::Raise(case)]
        }
        _ => Vec::new(),
    }
}

/// The case for an agent that was not there when the collector began to serve, and has not come back since.
pub fn not_back(agent: &AgentId, since: Timestamp) -> Case {
    let what = "the agent is silent: it did not come back after the collector's restart".to_owned();
    let mut case =
        about(agent, "is the container up, is the agent, does the network let it reach the collector?", what);
    case.due = Some(since);
    case.evidence = vec![format!("not heard since {since}")];
    case
}

pub(super) fn killed(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    match seen.body {
        Some(Body::AgentStarted(body)) if !body.clean => {
            let what = "the agent was killed and started again: events of its last moments may be missing";
            vec![Signal::Raise(case(seen, rule, what.to_owned()))]
        }
        _ => Vec::new(),
    }
}

pub(super) fn lost(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::EventsLost(body)) = seen.body else { return Vec::new() };
    let count = body.last_seq.saturating_sub(body.first_seq).saturating_add(1);
    let mut case = case(seen, rule, format!("{count} events were lost: {}", short(&body.reason, 80)));
    case.apart = Some(("reason", known(&body.reason, &["spool_full", "damaged", "collector_rewound"])));
    case.what_to_do = match body.reason.as_str() {
        "damaged" => "check the disk under the agent's volume".to_owned(),
        "collector_rewound" => {
            "the collector lost what it had taken: was its data_dir restored, or rolled back?".to_owned()
        }
        _ => case.what_to_do,
    };
    case.evidence = vec![format!("events {} to {}, by severity {:?}", body.first_seq, body.last_seq, body.by_severity)];
    vec![Signal::Raise(case)]
}

pub(super) fn damaged(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::SpoolDamaged(body)) = seen.body else { return Vec::new() };
    let mut case = case(seen, rule, format!("{} bytes of the spool were unreadable and set aside", body.bytes));
    case.evidence = lines([("set aside at", &body.quarantined), ("detail", &body.detail)]);
    vec![Signal::Raise(case)]
}

pub(super) fn agent_clock(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    if let Some(Body::AgentConnected(body)) = seen.body {
        return connected_clock(rule, seen, body);
    }
    let ahead = seen.at.since(seen.received);
    if ahead < CLOCK_AHEAD {
        return Vec::new();
    }
    let mut case = case(seen, rule, format!("its clock is {} s ahead of the collector's", ahead.as_secs()));
    case.evidence = vec![format!("agent {}, collector {}", seen.at, seen.received)];
    vec![Signal::Raise(case)]
}

/// Events may lie in a spool for days, so only at the handshake can a clock that is behind be told.
fn connected_clock(rule: &Rule, seen: &Seen<'_>, body: &AgentConnected) -> Vec<Signal> {
    let off = Duration::from_micros(body.clock_ahead_us.unsigned_abs());
    if off < CLOCK_AHEAD {
        return Vec::new();
    }
    let way = if body.clock_ahead_us > 0 { "ahead of" } else { "behind" };
    let mut case = case(seen, rule, format!("its clock is {} s {way} the collector's", off.as_secs()));
    case.subject = Some(subject(&body.workload, &body.instance));
    vec![Signal::Raise(case)]
}

pub(super) fn unknown(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    if seen.severity < Severity::Warning {
        return Vec::new();
    }
    let mut case = case(seen, rule, format!("{}: {}", seen.kind, short(seen.summary, 200)));
    case.severity = Some(seen.severity);
    case.apart = Some(("reason", word(seen.kind)));
    vec![Signal::Raise(case)]
}
