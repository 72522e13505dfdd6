//! Who may talk to whom. Pure: a peer, the rules, what the collector says, and the time.
//!
//! Asked when a connection begins, and again for every live one whenever an answer could have changed. Where the workload
//! may go besides its peers is in [`egress`], which both programs read.

use sidewarden_proto::directive::{Denied, Directive};
use sidewarden_proto::event::RefusalReason;
use sidewarden_proto::identity::{Peer, PeerName, SpiffeId};
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
    },
    /// Of a route: this workload answers.
    OutboundTo(SpiffeId),
    /// Of a route: a foreign server with this DNS name answers.
    OutboundToDns(String),
    /// Of either while `insecure_trust_all` is on: whoever has a key that is not on the deny list.
    Anybody,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It may.
    Allow,
    /// It may not.
    Refuse(RefusalReason, String),
}

/// Judges `peer`, whose chain was verified.
pub fn decide(rules: &Rules, peer: &Peer, directive: Option<&Directive>, now: Timestamp) -> Decision {
    if matches!(rules, Rules::Anybody) && peer.not_after <= now {
        let over = format!("the time of `insecure_trust_all` was over at {}", peer.not_after);
        return Decision::Refuse(RefusalReason::UnknownCa, over);
    }
    if peer.not_after <= now {
        return Decision::Refuse(RefusalReason::Expired, format!("its certificate ended at {}", peer.not_after));
    }
    if let Some(denied) = directive.and_then(|directive| directive.denies(peer)) {
        let reason = match denied {
            Denied::Revoked { .. } => RefusalReason::Revoked,
            Denied::Quarantined { .. } => RefusalReason::Quarantined,
        };
        return Decision::Refuse(reason, denied.to_string());
    }
    match rules {
        Rules::Anybody => Decision::Allow,
        Rules::Inbound { allow, allow_dns } if is_listed(&peer.name, allow, allow_dns) => Decision::Allow,
        Rules::Inbound { .. } => {
            Decision::Refuse(RefusalReason::NotAllowed, format!("{} is not on the list of this listener", peer.name))
        }
        Rules::OutboundTo(id) if peer.name == PeerName::Spiffe(id.clone()) => Decision::Allow,
        Rules::OutboundToDns(host) if has_dns_name(&peer.name, host) => Decision::Allow,
        Rules::OutboundTo(id) => wrong_peer(peer, id.as_str()),
        Rules::OutboundToDns(host) => wrong_peer(peer, host),
    }
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

    fn check(rules: &Rules, peer: &Peer, deny: Vec<Deny>, expected: Option<RefusalReason>) {
        let got = match decide(rules, peer, Some(&directive(deny)), NOW) {
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
        let rules = Rules::Inbound { allow: vec![], allow_dns: vec![] };
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
        let refused = decide(&rules, &peer(workload("shop/db")), Some(&directive), NOW);
        let told = "its issuing key is on the deny list: stolen".into();
        assert_eq!(refused, Decision::Refuse(RefusalReason::Revoked, told));
        let other = Peer { issuers: [Sha256([9; 32])].into(), ..peer(workload("shop/db")) };
        assert_eq!(decide(&rules, &other, Some(&directive), NOW), Decision::Allow);
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
}
