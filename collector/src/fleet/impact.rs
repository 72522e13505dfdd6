//! Whom a policy would cut off, among those who were seen talking to each other. Pure.

use std::collections::BTreeMap;

use serde::Serialize;
use sidewarden_proto::event::Direction;
use sidewarden_proto::identity::{SpiffeId, TrustDomain};
use sidewarden_proto::policy::connections::{Answer, Side};
use sidewarden_proto::policy::egress::{Host, Target};
use sidewarden_proto::policy::trial::Somebody;
use sidewarden_proto::policy::{Extract, Policy};
use sidewarden_proto::time::Timestamp;

use crate::state::State;

/// Most that are listed.
const MAX_LISTED: usize = 200;
/// Most that are judged.
const MAX_JUDGED: usize = 100_000;

/// Who would be cut off.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Hits {
    /// How many pairs were judged.
    pub seen: usize,
    /// Those that are allowed now and would not be.
    pub would_end: Vec<Hit>,
    /// How many more there are.
    pub more: usize,
    /// Of those that go on, how many would be kept from a listener that is open to them now: which they were seen at is not
    /// known.
    pub depends: usize,
}

/// One pair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Hit {
    /// The workload that saw it.
    pub workload: SpiffeId,
    /// Which way.
    pub direction: Direction,
    /// The other side.
    pub peer: String,
    /// When it was last seen.
    pub last_us: Timestamp,
    /// The line that denies it; 0 if no line allows it.
    pub line: usize,
}

/// Who would be cut off by `new` of those that `old` lets through.
pub fn of(old: &Policy, new: &Policy, state: &State, domain: &TrustDomain) -> Hits {
    let mut hits = Hits::default();
    for (workload, peers) in seen(state) {
        let (before, after) = (Sides::of(old, workload, domain), Sides::of(new, workload, domain));
        for ((direction, peer), last_us) in peers {
            hits.seen += 1;
            let is_cut = before.judge(direction, peer).is_allowed();
            let line = match after.judge(direction, peer) {
                Answer::Denied(line) if is_cut => line,
                Answer::Unlisted if is_cut => 0,
                Answer::Silent | Answer::Allowed(_) if is_cut => {
                    hits.depends += usize::from(after.is_narrower_than(&before, direction, peer));
                    continue;
                }
                _ => continue,
            };
            if hits.would_end.len() == MAX_LISTED {
                hits.more += 1;
                continue;
            }
            hits.would_end.push(Hit { workload: workload.clone(), direction, peer: peer.to_owned(), last_us, line });
        }
    }
    hits
}

type Peers<'a> = BTreeMap<(Direction, &'a str), Timestamp>;

/// Every pair once, whichever instance saw it.
fn seen(state: &State) -> BTreeMap<&SpiffeId, Peers<'_>> {
    let mut all: BTreeMap<&SpiffeId, Peers<'_>> = BTreeMap::new();
    let pairs = state.agents.iter().flat_map(|(id, agent)| agent.peers.iter().map(move |pair| (id, pair)));
    for (id, ((direction, peer), seen)) in pairs.take(MAX_JUDGED) {
        let last = all.entry(&id.workload).or_default().entry((*direction, peer)).or_default();
        *last = (*last).max(seen.last);
    }
    all
}

struct Sides {
    called: Side,
    calling: Side,
    extract: Extract,
}

impl Sides {
    fn of(policy: &Policy, workload: &SpiffeId, domain: &TrustDomain) -> Sides {
        Sides {
            called: Side::called(policy, workload, domain),
            calling: Side::calling(policy, workload, domain),
            extract: Extract::of(policy, 0, workload, domain),
        }
    }

    /// At which listener it was is not known: lines about some listeners alone count as if they allowed it, and
    /// [`Sides::is_narrower_than`] tells where that may be wrong.
    fn judge(&self, direction: Direction, peer: &str) -> Answer {
        if direction == Direction::Egress {
            return self.judge_egress(peer);
        }
        self.side(direction).judge(somebody(peer).who(), None)
    }

    /// Whether lines about some listeners alone leave it fewer of them than `before`.
    fn is_narrower_than(&self, before: &Sides, direction: Direction, peer: &str) -> bool {
        let peer = somebody(peer);
        // Nobody looks at the listeners of who has no agent.
        let has_agent = direction == Direction::Inbound || matches!(peer, Somebody::Workload(_));
        direction != Direction::Egress
            && has_agent
            && self.side(direction).limits(peer.who()).are_narrower_than(&before.side(direction).limits(peer.who()))
    }

    fn side(&self, direction: Direction) -> &Side {
        if direction == Direction::Inbound { &self.called } else { &self.calling }
    }

    fn judge_egress(&self, peer: &str) -> Answer {
        let Some(outward) = self.extract.egress() else { return Answer::Silent };
        let target = peer.rsplit_once(':').and_then(|(host, port)| {
            let host = Host::parse(host.trim_start_matches('[').trim_end_matches(']')).ok()?;
            Some(Target { host, port: port.parse().ok()? })
        });
        // What cannot be read was not made by an agent of ours.
        let is_allowed = target.is_none_or(|target| outward.list.consider(&target).is_ok());
        if is_allowed { Answer::Silent } else { Answer::Unlisted }
    }
}

/// As agents have told it.
fn somebody(peer: &str) -> Somebody {
    if let Ok(id) = peer.parse() {
        return Somebody::Workload(id);
    }
    match peer.strip_prefix("dns:") {
        Some(names) if !names.starts_with("unverified:") => {
            Somebody::Dns(names.split(',').map(str::to_owned).collect())
        }
        _ => Somebody::Unproven,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Agent, PeerSeen};

    #[test]
    fn those_who_were_seen_and_would_be_cut_off_are_told_once_with_the_line() {
        let mut state = State::default();
        for instance in ["c1", "c2"] {
            let mut agent = Agent::default();
            for (direction, peer) in [
                (Direction::Inbound, "spiffe://td/shop/web"),
                (Direction::Inbound, "spiffe://td/shop/old"),
                (Direction::Inbound, "dns:api.partner.example"),
                (Direction::Outbound, "spiffe://td/shop/db"),
                (Direction::Egress, "api.example.com:443"),
                (Direction::Egress, "[2001:db8::1]:443"),
            ] {
                agent.peers.insert((direction, peer.to_owned()), PeerSeen::default());
            }
            state.agents.insert(format!("spiffe://td/shop/orders#{instance}").parse().unwrap(), agent);
        }
        let new = "[[allow]]\nfrom = ['shop/*']\nto = ['shop/orders']\n\
                   [[deny]]\nfrom = ['shop/old']\nto = ['*']\n\
                   [[egress]]\nfrom = ['*']\nto = ['api.example.com:443']\n";
        let (old, new) = (Policy::default(), Policy::parse(new).unwrap());
        let hits = of(&old, &new, &state, &"td".parse().unwrap());
        let told: Vec<(&str, usize)> = hits.would_end.iter().map(|hit| (hit.peer.as_str(), hit.line)).collect();
        let expected = [
            ("dns:api.partner.example", 0),
            ("spiffe://td/shop/old", 4),
            ("spiffe://td/shop/db", 0),
            ("[2001:db8::1]:443", 0),
        ];
        assert_eq!((told.as_slice(), hits.seen, hits.more), (&expected[..], 6, 0));
        assert_eq!(of(&new, &new, &state, &"td".parse().unwrap()).would_end, []);
    }

    #[test]
    fn those_whom_a_line_about_some_listeners_may_cut_off_are_counted() {
        let mut agent = Agent::default();
        for (direction, peer) in [
            (Direction::Inbound, "spiffe://td/shop/web"),
            (Direction::Outbound, "spiffe://td/shop/db"),
            (Direction::Outbound, "dns:db.example.com"),
        ] {
            agent.peers.insert((direction, peer.to_owned()), PeerSeen::default());
        }
        let agents = [("spiffe://td/shop/orders#c1".parse().unwrap(), agent)];
        let state = State { agents: agents.into(), ..State::default() };
        let line = |kind: &str, from: &str, to: &str, listeners: &str| {
            format!("[[{kind}]]\nfrom = ['{from}']\nto = ['{to}']\nlisteners = [{listeners}]\n")
        };
        let all = line("allow", "*", "*", "") + &line("allow", "*", "dns:db.example.com", "");
        let (web, db) = (line("deny", "shop/web", "*", "22"), line("deny", "*", "shop/db", "22, 'db.example'"));
        let none = String::new();
        for (old, new, depends) in [
            (none.clone(), web.clone(), 1),
            (none.clone(), web.clone() + &db, 2),
            (web.clone() + &db, web.clone() + &db, 0),
            (line("deny", "*", "shop/db", "22"), db.clone(), 1),
            (db, web, 1),
            (none, all.clone(), 0),
            (all.clone(), line("allow", "*", "*", "22") + &line("allow", "*", "dns:db.example.com", "22"), 2),
            (line("allow", "*", "*", "22"), all, 0),
        ] {
            let [old, new] = [old, new].map(|text| Policy::parse(&text).unwrap());
            let hits = of(&old, &new, &state, &"td".parse().unwrap());
            assert_eq!((hits.depends, hits.would_end), (depends, vec![]), "{new:?}");
        }
    }

    #[test]
    fn a_foreign_server_is_judged_by_the_name_that_it_was_asked_for() {
        let mut agent = Agent::default();
        agent.peers.insert((Direction::Outbound, "dns:db.example.com".to_owned()), PeerSeen::default());
        let agents = [("spiffe://td/shop/orders#c1".parse().unwrap(), agent)];
        let state = State { agents: agents.into(), ..State::default() };
        for (to, cut) in [("dns:db.example.com", 0), ("dns:www.example.com", 1)] {
            let new = Policy::parse(&format!("[[allow]]\nfrom = ['*']\nto = ['{to}']\n")).unwrap();
            assert_eq!(of(&Policy::default(), &new, &state, &"td".parse().unwrap()).would_end.len(), cut, "{to}");
        }
    }
}
