//! What rules read of connections and listeners.

use super::*;

/// The rule that a refusal belongs to; `None` where somebody is merely down or not ready.
fn refusal_rule(reason: RefusalReason) -> Option<&'static str> {
    Some(match reason {
        RefusalReason::Plaintext => "PlaintextRefused",
        RefusalReason::DirectToService => "DirectToService",
        RefusalReason::UnknownCa => "ForeignCertificate",
        RefusalReason::ProtocolVersion => "LegacyTls",
        RefusalReason::NotAllowed => "PeerNotAllowed",
        RefusalReason::WrongPeer => "WrongPeer",
        RefusalReason::ProxyHeaderUntrusted => "ProxyHeaderSpoofed",
        RefusalReason::Loop => "RouteLoop",
        RefusalReason::NoCertificate
        | RefusalReason::Expired
        | RefusalReason::BadCertificate
        | RefusalReason::Revoked
        | RefusalReason::RevocationUnknown => "BadPeerCertificate",
        RefusalReason::EgressNotListed | RefusalReason::EgressLoop | RefusalReason::BadRequest => "EgressRefused",
        RefusalReason::EgressPrivateAddress => "EgressToPrivateAddress",
        RefusalReason::HandshakeTimeout | RefusalReason::RequestTimeout | RefusalReason::LimitReached => {
            "ConnectionsLimited"
        }
        RefusalReason::HandshakeFailed
        | RefusalReason::RefusedByPeer
        | RefusalReason::Unreachable
        | RefusalReason::WorkloadUnreachable
        | RefusalReason::NoIdentity
        | RefusalReason::ProxyHeaderBroken
        | RefusalReason::UnknownServerName
        | RefusalReason::NameUnresolved
        | RefusalReason::UpstreamRefused
        // The quarantine has an alert of its own.
        | RefusalReason::Quarantined => return None,
    })
}

pub(super) fn refused(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::ConnectionRefused(body)) = seen.body else { return Vec::new() };
    if refusal_rule(body.reason) != Some(rule.name) {
        return Vec::new();
    }
    let mut case = case(seen, rule, refusal_in_words(body));
    case.apart = Some(("reason", body.reason.word().to_owned()));
    case.source = host_of(&body.source).to_owned();
    case.count = body.count.max(1);
    case.evidence = lines([("detail", &body.detail), ("listener", &body.listener), ("certificate", &body.peer)]);
    if !body.hint.is_empty() {
        case.what_to_do = body.hint.clone();
    }
    vec![Signal::Raise(case)]
}

fn refusal_in_words(body: &ConnectionRefused) -> String {
    let what = match body.reason {
        RefusalReason::Plaintext => "plaintext was refused",
        RefusalReason::DirectToService => "somebody went for the service's own port and was refused",
        RefusalReason::UnknownCa => "a certificate of a foreign CA was refused",
        RefusalReason::ProtocolVersion => "a TLS version older than 1.2 was refused",
        RefusalReason::NotAllowed => "a workload that is not on the allow list was refused",
        RefusalReason::WrongPeer => "another workload than the one asked for answered and was refused",
        RefusalReason::NoCertificate => "a client without a certificate was refused",
        RefusalReason::Expired => "a certificate outside its validity was refused",
        RefusalReason::BadCertificate => "a certificate that breaks the rules was refused",
        RefusalReason::Revoked => "a revoked certificate was refused",
        RefusalReason::RevocationUnknown => "a certificate that no revocation list speaks for was refused",
        RefusalReason::HandshakeTimeout => "a handshake was never finished",
        RefusalReason::LimitReached => "a limit on connections was reached",
        RefusalReason::ProxyHeaderUntrusted => "a PROXY header from where none may come was refused",
        RefusalReason::Loop => "a route that leads back to its agent was refused",
        RefusalReason::EgressNotListed => "a place that is not on the egress list was refused",
        RefusalReason::EgressPrivateAddress => "a way to an address that is not public was refused",
        RefusalReason::EgressLoop => "a connection that was not the workload's own was refused",
        RefusalReason::BadRequest => "a request that is not taken was refused",
        RefusalReason::RequestTimeout => "a request was never finished",
        _ => "a connection was refused",
    };
    let way = match body.direction {
        Direction::Inbound => "at",
        Direction::Outbound | Direction::Egress => "on the way to",
    };
    let peer = if body.peer.is_empty() { String::new() } else { format!(" ({})", body.peer) };
    format!("{what} {way} {}{peer}", body.listener)
}

/// What is declared goes to a rule of its own.
pub(super) fn exposed(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    const DECLARED: &str = "PlaintextPortOpen";
    let subject = || Subject::from(seen.agent);
    match seen.body {
        Some(Body::ListenerExposed(body)) if body.reason.is_empty() == (rule.name != DECLARED) => {
            vec![Signal::Raise(exposure(rule, seen, body))]
        }
        // It may have been the other rule's before.
        Some(Body::ListenerExposed(body)) => {
            vec![Signal::Clear(Some(subject()), Some(listener(&body.address, body.protocol)))]
        }
        Some(Body::ListenerClosed(body)) => {
            vec![Signal::Clear(Some(subject()), Some(listener(&body.address, body.protocol)))]
        }
        Some(Body::ListenersBaseline(body)) => {
            let open = if rule.name == DECLARED { &body.declared } else { &body.exposed };
            let open = open.iter().map(|place| place.rsplit_once('/').unwrap_or((place, "")));
            let protocol = |word: &str| if word == "udp" { Protocol::Udp } else { Protocol::Tcp };
            vec![Signal::Only(subject(), open.map(|(address, word)| listener(address, protocol(word))).collect())]
        }
        _ => Vec::new(),
    }
}

fn exposure(rule: &Rule, seen: &Seen<'_>, body: &ListenerExposed) -> Case {
    let place = listener(&body.address, body.protocol);
    let mut case = case(seen, rule, format!("{place} can be reached from outside without TLS"));
    case.apart = Some(("listener", place));
    case.evidence = lines([("detail", &body.detail), ("owner", &body.owner), ("declared because", &body.reason)]);
    case
}

/// `0.0.0.0:80/tcp`, or `other` when the address is none.
fn listener(address: &str, protocol: Protocol) -> String {
    match address.parse::<SocketAddr>() {
        Ok(address) => format!("{address}/{}", protocol.word()),
        Err(_) => "other".to_owned(),
    }
}

pub(super) fn interception(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    match seen.body {
        Some(Body::InterceptionBroken(body)) => {
            let first = body.why.first().map_or("", String::as_str);
            let mut case = case(seen, rule, format!("interception does not hold: {}", short(first, 200)));
            case.evidence = body.why.iter().map(|why| short(why, 300)).collect();
            vec![Signal::Raise(case)]
        }
        // One that starts tells anew, or was told not to ask for rules any more.
        Some(Body::InterceptionHolds(_) | Body::AgentStarted(_)) => vec![Signal::Clear(Some(seen.agent.into()), None)],
        _ => Vec::new(),
    }
}

pub(super) fn permissive(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let subject = Some(Subject::from(seen.agent));
    match seen.body {
        // Listeners that still do so say it right after.
        Some(Body::AgentStarted(_)) => vec![Signal::Clear(subject, None)],
        Some(Body::ListenerPermissive(body)) if body.on => {
            let mut case = case(seen, rule, format!("{} lets plaintext in until {}", body.listener, body.until_us));
            case.apart = Some(("listener", listener_word(&body.listener)));
            case.evidence = lines([("reason", &body.reason)]);
            vec![Signal::Raise(case)]
        }
        Some(Body::ListenerPermissive(body)) => vec![Signal::Clear(subject, Some(listener_word(&body.listener)))],
        _ => Vec::new(),
    }
}

pub(super) fn insecure(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let subject = Some(Subject::from(seen.agent));
    match seen.body {
        // Places that still do so are told right after.
        Some(Body::AgentStarted(_)) => vec![Signal::Clear(subject, None)],
        Some(Body::TrustInsecure(body)) if body.on => {
            let place = short(&body.place, 120);
            let mut case = case(seen, rule, format!("{place} accepts every certificate until {}", body.until_us));
            case.apart = Some(("place", insecure_place(body.direction, &body.place)));
            case.evidence = lines([("reason", &body.reason)]);
            vec![Signal::Raise(case)]
        }
        Some(Body::TrustInsecure(body)) => {
            vec![Signal::Clear(subject, Some(insecure_place(body.direction, &body.place)))]
        }
        _ => Vec::new(),
    }
}

/// As a label's value: the way, and of the place what cannot do harm.
fn insecure_place(direction: Direction, place: &str) -> String {
    let good = |c: char| c.is_ascii_alphanumeric() || ".:-_,()[]* ".contains(c);
    let place = if place.len() <= 120 && place.chars().all(good) { place } else { "other" };
    format!("{} {place}", direction.word())
}

pub(super) fn plaintext(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::ConnectionPlaintext(body)) = seen.body else { return Vec::new() };
    let mut case = case(seen, rule, format!("plaintext from {} was let in at {}", body.network, body.listener));
    case.apart = Some(("listener", listener_word(&body.listener)));
    case.source = host_of(&body.source).to_owned();
    case.count = body.count.max(1);
    case.evidence = lines([("network", &body.network), ("detail", &body.detail)]);
    vec![Signal::Raise(case)]
}

/// As a label's value: an address with a port, or `other`.
fn listener_word(listener: &str) -> String {
    listener.parse::<std::net::SocketAddr>().map_or_else(|_| "other".to_owned(), |address| address.to_string())
}
