//! What rules read of the collector itself, and of events that somebody made up.

use super::*;

pub(super) fn ingest(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::IngestRefused(body)) = seen.body else { return Vec::new() };
    let mut case = case(seen, rule, format!("a connection to the collector was refused: {}", body.reason));
    let reason = word(&first_word(&body.reason));
    if let Some(then) = ingest_way_out(&reason) {
        case.what_to_do = then.to_owned();
    }
    (case.subject, case.severity, case.apart) = (None, Some(seen.severity), Some(("reason", reason)));
    case.count = body.count.max(1);
    case.source = host_of(&body.source).to_owned();
    vec![Signal::Raise(case)]
}

/// What to do about a refusal that has another cause than a wrong identity.
fn ingest_way_out(reason: &str) -> Option<&'static str> {
    Some(match reason {
        "chain_broken" => {
            "events of this agent were removed or changed: keep its disk and the collector's log, and look at its host"
        }
        "wrong_instance" | "second_instance" | "not_issued_here" => {
            "two have one name, or a key was copied: stop the one that should not be there, or `sidewarden-collector revoke --instance WORKLOAD#INSTANCE`"
        }
        "malformed" => {
            "no agent of ours sends this: find it by its address, and update the agent if it is one of yours"
        }
        "limit_reached" => {
            "the detail says of what; if so many are expected raise `agents.max_connections` or `agents.max_handshakes`, if not find out who they are"
        }
        _ => return None,
    })
}

pub(super) fn collector_clock(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(before) = seen.last_tick else { return Vec::new() };
    let (gap, way) = if seen.at < before { (before.since(seen.at), "back") } else { (seen.at.since(before), "ahead") };
    let jumped = gap > CLOCK_JUMP || (way == "back" && gap > Duration::from_secs(1));
    if !jumped {
        return Vec::new();
    }
    let mut case =
        case(seen, rule, format!("the collector's clock went {way} by {} s between two ticks", gap.as_secs()));
    case.subject = None;
    case.evidence = vec![format!("tick before {before}, tick now {}", seen.at)];
    vec![Signal::Raise(case)]
}

pub(super) fn leader(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let body = match seen.body {
        Some(Body::LeaderChanged(body)) if !body.reached => body,
        // One that starts tells anew, or follows nobody any more.
        Some(Body::LeaderChanged(_) | Body::CollectorStarted(_)) => {
            return vec![Signal::Clear(Some(seen.agent.into()), None)];
        }
        _ => return Vec::new(),
    };
    let mut case =
        case(seen, rule, format!("{}, whose directives are followed, is not reached", short(&body.leader, 200)));
    case.evidence = lines([("why", &body.why)]);
    vec![Signal::Raise(case)]
}

pub(super) fn given_identity(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let what = |what: &str| known(what, &["identity", "page"]);
    match seen.body {
        // One that starts tells anew, or was told to ask for none any more.
        Some(Body::CollectorStarted(_)) => vec![Signal::Clear(Some(seen.agent.into()), None)],
        Some(Body::CollectorIdentityTaken(body)) => {
            vec![Signal::Clear(Some(seen.agent.into()), Some(what(&body.what)))]
        }
        Some(Body::CollectorIdentityRefused(body)) => {
            let mut case = case(seen, rule, short(&format!("{}: {}", body.what, body.error), 300));
            case.apart = Some(("reason", what(&body.what)));
            case.evidence = lines([("error", &body.error)]);
            case.evidence.push(match body.in_use_until_us {
                Some(until) => format!("the last good one is in use, until {until}"),
                None => "there is no other one".to_owned(),
            });
            vec![Signal::Raise(case)]
        }
        _ => Vec::new(),
    }
}

pub(super) fn forged(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let mut case = case(seen, rule, format!("it sent a {} event, which only the collector may tell", word(seen.kind)));
    case.evidence = vec![short(seen.summary, 200)];
    vec![Signal::Raise(case)]
}
