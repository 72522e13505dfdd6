//! Who may talk to whom. Pure: a peer, the rules, what the collector says, and the time.
//!
//! Asked when a connection begins, and again for every live one whenever an answer could have changed. Where the workload
//! may go besides its peers is in [`egress`], which both programs read.

use std::net::SocketAddr;
use std::sync::LazyLock;

use egress::{Host, Target};
use sidewarden_proto::directive::{Denied, Directive};
use sidewarden_proto::event::RefusalReason;
use sidewarden_proto::identity::{Peer, PeerName, SpiffeId};
use sidewarden_proto::policy::Extract;
use sidewarden_proto::policy::connections::At;
use sidewarden_proto::policy::party::Who;
pub use sidewarden_proto::policy::{address, egress};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::dns_matches;

/// Who is meant to be at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rules {
    /// Of a listener: whoever stands here may come in.
    Inbound {
        /// Workloads.
        allow: Vec<SpiffeId>,
        /// Foreign peers, by a DNS name of their certificate, in lower case.
        allow_dns: Vec<String>,
        /// Which listener, for the policy.
        at: At,
    },
    /// Of a route: this workload answers.
    OutboundTo(SpiffeId),
    /// Of a route: a foreign server with this DNS name answers.
    OutboundToDns(String),
    /// Of either while `insecure_trust_all` is on: whoever has a key that is not on the deny list, where these were asked for.
    Anybody(Box<Rules>),
}

/// What the collector says, of which the newest counts.
#[derive(Clone, Copy, Debug)]
pub struct Central<'a> {
    /// All of it.
    pub directive: Option<&'a Directive>,
    /// The policy, as far as it is about us; or why it cannot be read.
    pub policy: Result<&'a Extract, &'a str>,
}

impl Central<'_> {
    /// Nothing was ever said.
    pub fn silent() -> Central<'static> {
        static SILENT: LazyLock<Extract> = LazyLock::new(Extract::default);
        Central { directive: None, policy: Ok(&SILENT) }
    }
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It may.
    Allow,
    /// It may not.
    Refuse(RefusalReason, String),
}

/// Judges `peer`, whose chain was verified: our own settings must allow it, and so must the collector's policy.
pub fn decide(rules: &Rules, peer: &Peer, central: Central<'_>, now: Timestamp) -> Decision {
    if matches!(rules, Rules::Anybody(_)) && peer.not_after <= now {
        let over = format!("the time of `insecure_trust_all` was over at {}", peer.not_after);
        return Decision::Refuse(RefusalReason::UnknownCa, over);
    }
    if peer.not_after <= now {
        return Decision::Refuse(RefusalReason::Expired, format!("its certificate ended at {}", peer.not_after));
    }
    if let Some(denied) = central.directive.and_then(|directive| denied(rules, peer, directive)) {
        let reason = match denied {
            Denied::Revoked { .. } => RefusalReason::Revoked,
            Denied::Quarantined { .. } => RefusalReason::Quarantined,
        };
        return Decision::Refuse(reason, denied.to_string());
    }
    match by_settings(rules, peer) {
        Decision::Allow => by_policy(rules, peer, central.policy),
        refused => refused,
    }
}

/// Who answers where every certificate is accepted has proven nothing: whom the route was made for is asked about as well.
fn denied<'a>(rules: &Rules, peer: &Peer, directive: &'a Directive) -> Option<Denied<'a>> {
    let asked = || match rules {
        Rules::Anybody(asked) if let Rules::OutboundTo(id) = &**asked => directive.denies_workload(id),
        _ => None,
    };
    directive.denies(peer).or_else(asked)
}

fn by_settings(rules: &Rules, peer: &Peer) -> Decision {
    match rules {
        Rules::Anybody(_) => Decision::Allow,
        Rules::Inbound { allow, allow_dns, .. } if is_listed(&peer.name, allow, allow_dns) => Decision::Allow,
        Rules::Inbound { .. } => {
            Decision::Refuse(RefusalReason::NotAllowed, format!("{} is not on the list of this listener", peer.name))
        }
        Rules::OutboundTo(id) if peer.name == PeerName::Spiffe(id.clone()) => Decision::Allow,
        Rules::OutboundToDns(host) if has_dns_name(&peer.name, host) => Decision::Allow,
        Rules::OutboundTo(id) => wrong_peer(peer, id.as_str()),
        Rules::OutboundToDns(host) => wrong_peer(peer, host),
    }
}

fn by_policy(rules: &Rules, peer: &Peer, policy: Result<&Extract, &str>) -> Decision {
    let policy = match policy {
        Ok(policy) => policy,
        Err(fault) => return Decision::Refuse(RefusalReason::Quarantined, fault.to_owned()),
    };
    let judged = match rules {
        Rules::Inbound { at, .. } => policy.lets_in((&peer.name).into(), at),
        Rules::Anybody(asked) => anybody(asked, policy),
        asked => lets_ask(asked, policy),
    };
    judged.map_or_else(|why| Decision::Refuse(RefusalReason::NotAllowed, why), |()| Decision::Allow)
}

/// Who answers has proven nothing; whom the route was made for counts all the same, so that our own settings switch no line
/// of the policy off.
fn anybody(asked: &Rules, policy: &Extract) -> Result<(), String> {
    match asked {
        Rules::Inbound { at, .. } => policy.lets_in(Who::Unproven, at),
        _ => policy.lets_out(Who::Unproven).and_then(|()| lets_ask(asked, policy)),
    }
}

/// Whether the policy lets our workload call whom a route asks for.
fn lets_ask(asked: &Rules, policy: &Extract) -> Result<(), String> {
    match asked {
        Rules::OutboundTo(id) => policy.lets_out(Who::Workload(id)),
        // Its certificate may have a wildcard: what counts is whom we asked for.
        Rules::OutboundToDns(host) => policy.lets_out(Who::Dns(std::slice::from_ref(host))),
        Rules::Inbound { .. } | Rules::Anybody(_) => Err("nobody was asked for".into()),
    }
}

/// Whether the collector's policy lets our workload go to `target`: by what was `dialled` for it, as far as that is known; or
/// by its name alone, where another proxy looks that up (`unresolved`).
pub fn may_go(
    policy: &Extract,
    target: &Target,
    dialled: Option<SocketAddr>,
    unresolved: bool,
) -> Result<(), (RefusalReason, String)> {
    let Some(outward) = policy.egress() else { return Ok(()) };
    let list = &outward.list;
    let judged = match (&target.host, dialled) {
        _ if unresolved => list.consider_unresolved(target),
        (Host::Name(_), Some(address)) => list.choose(target, &[address.ip()]).map(drop),
        _ => list.consider(target).map(drop),
    };
    judged.map_err(|refused| (refused.reason, policy.no_way_out()))
}

fn wrong_peer(peer: &Peer, expected: &str) -> Decision {
    Decision::Refuse(RefusalReason::WrongPeer, format!("{} answers where {expected} was expected", peer.name))
}

/// A client's name must be listed as it stands: a wildcard in a client's certificate names nobody.
fn is_listed(name: &PeerName, allow: &[SpiffeId], allow_dns: &[String]) -> bool {
    match name {
        PeerName::Spiffe(id) => allow.contains(id),
        PeerName::Dns(names) => names.iter().any(|name| !name.contains('*') && allow_dns.contains(name)),
    }
}

fn has_dns_name(name: &PeerName, host: &str) -> bool {
    matches!(name, PeerName::Dns(names) if names.iter().any(|name| dns_matches(name, host)))
}

#[cfg(test)]
mod tests {
    use sidewarden_proto::directive::{Deny, Revocation, Target};
    use sidewarden_proto::identity::Sha256;
    use sidewarden_proto::policy::Policy;

    use super::*;

    const NOW: Timestamp = Timestamp::from_secs(1_000);

    fn peer(name: PeerName) -> Peer {
        let (not_before, not_after) = (Timestamp::from_secs(0), Timestamp::from_secs(2_000));
        Peer {
            name,
            spki: Sha256([5; 32]),
            serial: "1".into(),
            issuers: [Sha256([8; 32])].into(),
            not_before,
            not_after,
        }
    }

    fn workload(path: &str) -> PeerName {
        PeerName::Spiffe(format!("spiffe://td/{path}").parse().unwrap())
    }

    fn dns(names: &[&str]) -> PeerName {
        PeerName::Dns(names.iter().map(|n| n.to_string()).collect())
    }

    fn directive(deny: Vec<Deny>) -> Directive {
        let trust_domain: sidewarden_proto::identity::TrustDomain = "td".parse().unwrap();
        let json = serde_json::json!({"version": 1, "trust_domain": trust_domain, "issued_us": NOW, "bundle": []});
        Directive { deny, ..serde_json::from_value(json).unwrap() }
    }

    fn central<'a>(directive: &'a Directive, policy: &'a Extract) -> Central<'a> {
        Central { directive: Some(directive), policy: Ok(policy) }
    }

    fn check(rules: &Rules, peer: &Peer, deny: Vec<Deny>, expected: Option<RefusalReason>) {
        let got = match decide(rules, peer, central(&directive(deny), &Extract::default()), NOW) {
            Decision::Allow => None,
            Decision::Refuse(reason, _) => Some(reason),
        };
        assert_eq!(got, expected, "{rules:?} {peer:?}");
    }

    #[test]
    fn only_the_listed_come_in() {
        let rules = Rules::Inbound {
            allow: vec!["spiffe://td/shop/web".parse().unwrap()],
            allow_dns: vec!["api.partner.example".into()],
            at: At::default(),
        };
        check(&rules, &peer(workload("shop/web")), vec![], None);
        check(&rules, &peer(workload("shop/web2")), vec![], Some(RefusalReason::NotAllowed));
        check(&rules, &peer(workload("shop")), vec![], Some(RefusalReason::NotAllowed));
        check(
            &rules,
            &peer(PeerName::Spiffe("spiffe://other/shop/web".parse().unwrap())),
            vec![],
            Some(RefusalReason::NotAllowed),
        );
        check(&rules, &peer(dns(&["x.example", "api.partner.example"])), vec![], None);
        check(&rules, &peer(dns(&["*.partner.example"])), vec![], Some(RefusalReason::NotAllowed));
        check(&rules, &peer(dns(&[])), vec![], Some(RefusalReason::NotAllowed));
    }

    #[test]
    fn a_list_of_nobody_lets_nobody_in() {
        let rules = Rules::Inbound { allow: vec![], allow_dns: vec![], at: At::default() };
        check(&rules, &peer(workload("shop/web")), vec![], Some(RefusalReason::NotAllowed));
    }

    #[test]
    fn the_deny_list_and_the_end_of_a_certificate_go_before_the_list() {
        let rules = Rules::OutboundTo("spiffe://td/shop/db".parse().unwrap());
        let db = peer(workload("shop/db"));
        let key = Deny::Key { spki: Sha256([5; 32]), why: "stolen".into() };
        let other_key = Deny::Key { spki: Sha256([6; 32]), why: "stolen".into() };
        let service = Deny::Workload { id: "spiffe://td/shop/db".parse().unwrap(), why: "hacked".into() };
        check(&rules, &db, vec![], None);
        check(&rules, &db, vec![other_key], None);
        check(&rules, &db, vec![key], Some(RefusalReason::Revoked));
        check(&rules, &db, vec![service], Some(RefusalReason::Revoked));
        check(&rules, &Peer { not_after: NOW, ..db }, vec![], Some(RefusalReason::Expired));
    }

    #[test]
    fn whoever_a_revoked_ca_has_signed_stays_out_and_is_told_why() {
        let rules = Rules::OutboundTo("spiffe://td/shop/db".parse().unwrap());
        let what = Target::IssuingKey { spki: Sha256([8; 32]) };
        let revocation = Revocation { id: "1".into(), what, why: "stolen".into(), at_us: NOW, keys: Vec::new() };
        let directive = directive(vec![]).with_revoked(vec![revocation]);
        let refused = decide(&rules, &peer(workload("shop/db")), central(&directive, &Extract::default()), NOW);
        let told = "its issuing key is on the deny list: stolen".into();
        assert_eq!(refused, Decision::Refuse(RefusalReason::Revoked, told));
        let other = Peer { issuers: [Sha256([9; 32])].into(), ..peer(workload("shop/db")) };
        assert_eq!(decide(&rules, &other, central(&directive, &Extract::default()), NOW), Decision::Allow);
    }

    #[test]
    fn somebody_else_at_the_end_of_a_route_is_the_wrong_peer() {
        let route = Rules::OutboundTo("spiffe://td/shop/db".parse().unwrap());
        check(&route, &peer(workload("shop/web")), vec![], Some(RefusalReason::WrongPeer));
        check(&route, &peer(dns(&["db"])), vec![], Some(RefusalReason::WrongPeer));
        let foreign = Rules::OutboundToDns("db.example.com".into());
        check(&foreign, &peer(dns(&["*.example.com"])), vec![], None);
        check(&foreign, &peer(dns(&["example.com"])), vec![], Some(RefusalReason::WrongPeer));
        check(&foreign, &peer(workload("shop/db")), vec![], Some(RefusalReason::WrongPeer));
    }

    #[test]
    fn a_route_that_takes_whoever_answers_is_still_held_to_what_is_denied_of_whom_it_asks_for() {
        let text = "[[deny]]\nfrom = ['shop/orders']\nto = ['shop/db', 'dns:db.example.com']\n";
        let own = "spiffe://td/shop/orders".parse().unwrap();
        let extract = Extract::of(&Policy::parse(text).unwrap(), 7, &own, &"td".parse().unwrap());
        let route = |path: &str| Rules::OutboundTo(format!("spiffe://td/{path}").parse().unwrap());
        let inbound = Rules::Inbound { allow: vec![], allow_dns: vec![], at: At::default() };
        for (asked, may) in [
            (route("shop/db"), false),
            (route("shop/web"), true),
            (Rules::OutboundToDns("db.example.com".into()), false),
            (Rules::OutboundToDns("www.example.com".into()), true),
            (inbound, true),
        ] {
            let rules = Rules::Anybody(Box::new(asked));
            let name = dns(&["unverified:05"]);
            let decision = decide(&rules, &peer(name), central(&directive(vec![]), &extract), NOW);
            assert_eq!(decision == Decision::Allow, may, "{rules:?}: {decision:?}");
        }
    }

    #[test]
    fn a_route_that_takes_whoever_answers_leads_to_no_revoked_workload() {
        let db: SpiffeId = "spiffe://td/shop/db".parse().unwrap();
        let deny = vec![Deny::Workload { id: db.clone(), why: "stolen".into() }];
        let what = Target::Workload { id: db };
        let told = Revocation { id: "1".into(), what, why: "stolen".into(), at_us: NOW, keys: Vec::new() };
        let anybody =
            |path: &str| Rules::Anybody(Box::new(Rules::OutboundTo(format!("spiffe://td/{path}").parse().unwrap())));
        for directive in [directive(deny), Directive { revoked: vec![told], ..directive(vec![]) }] {
            let judged = |path| {
                let peer = peer(dns(&["unverified:05"]));
                decide(&anybody(path), &peer, Central { directive: Some(&directive), ..Central::silent() }, NOW)
            };
            assert!(matches!(judged("shop/db"), Decision::Refuse(RefusalReason::Revoked, _)));
            assert_eq!(judged("shop/web"), Decision::Allow);
        }
    }

    #[test]
    fn the_policy_and_the_settings_must_both_allow_a_connection() {
        let text = "[[allow]]\nfrom = ['shop/web', 'dns:api.partner.example', 'shop/other']\nto = ['shop/orders']\n\
                    listeners = [8443]\n[[allow]]\nfrom = ['shop/orders']\nto = ['shop/db']\n";
        let policy = Policy::parse(text).unwrap();
        let own = "spiffe://td/shop/orders".parse().unwrap();
        let extract = Extract::of(&policy, 7, &own, &"td".parse().unwrap());
        let at = |port| At { port, server_name: None };
        let inbound = |port| Rules::Inbound {
            allow: ["shop/web", "shop/nosy"].map(|path| format!("spiffe://td/{path}").parse().unwrap()).into(),
            allow_dns: vec!["api.partner.example".into()],
            at: at(port),
        };
        let outbound = |path: &str| Rules::OutboundTo(format!("spiffe://td/{path}").parse().unwrap());
        let anybody = |rules| Rules::Anybody(Box::new(rules));
        let rows = [
            (inbound(8443), workload("shop/web"), ""),
            (inbound(8443), dns(&["api.partner.example"]), ""),
            (
                inbound(9443),
                workload("shop/web"),
                "policy 7 has no line that lets spiffe://td/shop/web in here; line 1 is about it",
            ),
            (
                inbound(8443),
                workload("shop/nosy"),
                "policy 7 has no line that lets spiffe://td/shop/nosy in here; line 1 is about it",
            ),
            (inbound(8443), workload("shop/other"), "is not on the list of this listener"),
            (outbound("shop/db"), workload("shop/db"), ""),
            (
                outbound("shop/web"),
                workload("shop/web"),
                "policy 7 has no line that lets this workload call spiffe://td/shop/web; line 5 is about it",
            ),
            (Rules::OutboundToDns("x.example".into()), dns(&["x.example"]), "call dns:x.example"),
            (anybody(inbound(8443)), workload("shop/web"), "somebody without a proven name"),
            (anybody(outbound("shop/db")), workload("shop/db"), "somebody without a proven name"),
        ];
        for (rules, name, expected) in rows {
            match decide(&rules, &peer(name), central(&directive(vec![]), &extract), NOW) {
                Decision::Allow => assert_eq!(expected, "", "{rules:?}"),
                Decision::Refuse(reason, why) => {
                    assert!(!expected.is_empty() && why.contains(expected), "{rules:?}: {why}");
                    assert_eq!(reason, RefusalReason::NotAllowed);
                }
            }
        }
        let unread = Central { directive: None, policy: Err("it cannot be read") };
        let refused = decide(&inbound(8443), &peer(workload("shop/web")), unread, NOW);
        assert_eq!(refused, Decision::Refuse(RefusalReason::Quarantined, "it cannot be read".into()));
    }
}
