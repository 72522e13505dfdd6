//! The live connections, so that a change of policy, deny list or identity reaches them within a second.
//!
//! A connection registers before it asks policy: a change in between then finds it here.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use sidewarden_proto::event::{Direction, RefusalReason};
use sidewarden_proto::identity::{Peer, PeerName, Sha256};
use sidewarden_proto::time::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::policy::{Decision, Rules};

/// What a peer showed, leaf first.
type Chain = [CertificateDer<'static>];

/// What is known of one of them.
#[derive(Debug)]
pub struct Live {
    /// Which way.
    pub direction: Direction,
    /// The other side.
    pub peer: Peer,
    /// The chain that it showed, where that may have to be judged again: revocation lists change.
    pub shown: Option<Arc<Chain>>,
    /// What it is judged by.
    pub rules: Arc<Rules>,
    /// Ends it.
    pub cancel: CancellationToken,
    ended_for: OnceLock<RefusalReason>,
}

impl Live {
    /// Why a review ended it, if one did.
    pub fn ended_for(&self) -> Option<RefusalReason> {
        self.ended_for.get().copied()
    }
}

/// A peer's certificate that ended is remembered this much longer.
const FORGET_AFTER: Duration = Duration::from_secs(24 * 3600);
/// Most peers whose certificates are remembered.
const MAX_PEERS: usize = 256;

/// All of them.
#[derive(Debug, Default)]
pub struct Registry {
    live: Mutex<HashMap<u64, Arc<Live>>>,
    /// When the certificate ends that each peer was last seen with.
    ends: Mutex<HashMap<PeerName, Timestamp>>,
    /// The chains that are kept, by the leaf's key: the connections of one peer share one.
    chains: Mutex<HashMap<Sha256, Weak<Chain>>>,
    next: AtomicU64,
}

/// A place in the registry, given back on drop.
#[derive(Debug)]
pub struct Registered {
    registry: Arc<Registry>,
    id: u64,
    live: Arc<Live>,
}

impl Registry {
    /// Registers a connection.
    pub fn register(
        self: &Arc<Registry>,
        direction: Direction,
        peer: Peer,
        shown: Option<Arc<Chain>>,
        rules: Arc<Rules>,
        parent: &CancellationToken,
    ) -> Registered {
        // Where nobody looks at certificates, their ends mean nothing.
        if !matches!(*rules, Rules::Anybody(_)) {
            self.remember(&peer);
        }
        let shown = shown.map(|chain| self.share(peer.spki, chain));
        let (cancel, ended_for) = (parent.child_token(), OnceLock::new());
        let live = Arc::new(Live { direction, peer, shown, rules, cancel, ended_for });
        let id = self.next.fetch_add(1, Relaxed);
        self.lock().insert(id, live.clone());
        Registered { registry: self.clone(), id, live }
    }

    fn share(&self, spki: Sha256, chain: Arc<Chain>) -> Arc<Chain> {
        let mut chains = self.chains.lock().unwrap_or_else(PoisonError::into_inner);
        match chains.get(&spki).and_then(Weak::upgrade) {
            Some(known) if known == chain => known,
            _ => {
                chains.insert(spki, Arc::downgrade(&chain));
                chain
            }
        }
    }

    /// Once there are too many, only those that are known are kept up to date.
    fn remember(&self, peer: &Peer) {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = ends.len() >= MAX_PEERS;
        match ends.get_mut(&peer.name) {
            Some(end) => *end = peer.not_after,
            None if is_full => {}
            None => drop(ends.insert(peer.name.clone(), peer.not_after)),
        }
    }

    /// When the certificate ends that each peer was last seen with. One that ended a day ago says no more: that peer is
    /// gone.
    pub fn peer_ends(&self, now: Timestamp) -> Vec<(PeerName, Timestamp)> {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        ends.retain(|_, end| now < end.plus(FORGET_AFTER));
        ends.iter().map(|(name, end)| (name.clone(), *end)).collect()
    }

    /// Asks `decide` about every connection and ends those that are no longer allowed.
    pub fn review(&self, decide: impl Fn(&Live) -> Decision) {
        let mut chains = self.chains.lock().unwrap_or_else(PoisonError::into_inner);
        chains.retain(|_, chain| chain.strong_count() > 0);
        drop(chains);
        for live in self.lock().values() {
            if let Decision::Refuse(reason, _) = decide(live) {
                live.ended_for.get_or_init(|| reason);
                live.cancel.cancel();
            }
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// How many there ever were.
    pub fn registered(&self) -> u64 {
        self.next.load(Relaxed)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::ops::Deref for Registered {
    type Target = Live;
    fn deref(&self) -> &Live {
        &self.live
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.registry.lock().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(key: u8) -> Peer {
        let name = PeerName::Spiffe("spiffe://td/shop/web".parse().unwrap());
        let (not_before, not_after) = (Timestamp(0), Timestamp(9));
        Peer { name, spki: Sha256([key; 32]), serial: String::new(), issuers: Arc::default(), not_before, not_after }
    }

    #[test]
    fn a_review_ends_exactly_those_that_are_no_longer_allowed() {
        let (registry, root) = (Arc::new(Registry::default()), CancellationToken::new());
        let rules = Arc::new(Rules::Anybody(Box::new(Rules::OutboundToDns("x".into()))));
        let stays = registry.register(Direction::Inbound, peer(1), None, rules.clone(), &root);
        let goes = registry.register(Direction::Inbound, peer(2), None, rules, &root);
        registry.review(|live| match live.peer.spki.0[0] {
            2 => Decision::Refuse(RefusalReason::Revoked, String::new()),
            _ => Decision::Allow,
        });
        assert!(goes.cancel.is_cancelled() && goes.ended_for() == Some(RefusalReason::Revoked));
        assert!(!stays.cancel.is_cancelled() && stays.ended_for().is_none());
        drop(goes);
        assert_eq!(registry.len(), 1);
    }

    #[test]
    fn the_connections_of_one_peer_share_the_chain_that_it_showed() {
        let (registry, root) = (Arc::new(Registry::default()), CancellationToken::new());
        let rules = Arc::new(Rules::OutboundToDns("x".into()));
        let register = |key, chain: &[u8]| {
            let shown = Some(Arc::from([CertificateDer::from(chain.to_vec())]));
            registry.register(Direction::Inbound, peer(key), shown, rules.clone(), &root)
        };
        let is_one = |a: &Registered, b: &Registered| Arc::ptr_eq(a.shown.as_ref().unwrap(), b.shown.as_ref().unwrap());
        let (first, second) = (register(1, b"chain"), register(1, b"chain"));
        let (renewed, other) = (register(1, b"renewed"), register(2, b"chain"));
        assert!(is_one(&first, &second) && !is_one(&first, &renewed) && !is_one(&first, &other));
        assert_eq!(renewed.shown.as_deref().unwrap()[0].as_ref(), b"renewed");
        drop((first, second, renewed, other));
        registry.review(|_| Decision::Allow);
        assert!(registry.chains.lock().unwrap().is_empty(), "what nobody holds is forgotten");
    }

    #[test]
    fn the_ends_of_peers_certificates_are_known_and_bounded_in_number_and_time() {
        let (registry, root) = (Arc::new(Registry::default()), CancellationToken::new());
        let rules = Arc::new(Rules::OutboundToDns("x".into()));
        let see = |name: &str, end: i64| {
            let name = PeerName::Spiffe(format!("spiffe://td/{name}").parse().unwrap());
            let seen = Peer { name, not_after: Timestamp::from_secs(end), ..peer(1) };
            drop(registry.register(Direction::Inbound, seen, None, rules.clone(), &root));
        };
        see("shop/web", 100);
        see("shop/web", 200);
        assert_eq!(registry.peer_ends(Timestamp(0))[0].1, Timestamp::from_secs(200), "the newest counts");
        (0..2 * MAX_PEERS).for_each(|n| see(&format!("x/n{n}"), 300));
        assert_eq!(registry.peer_ends(Timestamp(0)).len(), MAX_PEERS);
        assert_eq!(registry.peer_ends(Timestamp::from_secs(250 + 86_400)).len(), MAX_PEERS - 1);
        assert!(registry.peer_ends(Timestamp::from_secs(300 + 86_400)).is_empty());
    }
}
