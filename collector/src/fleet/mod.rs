//! Who is connected now, and what everybody is told: the directive in force.
//!
//! Presence over time (silent, stopped, gone) is a fold of events and lives in `state`; here is only what dies with the
//! process: live sessions, one for each instance, and the way to end them.

mod directive;
mod follow;
mod gatekeeper;
pub mod impact;
mod policies;
mod quarantine;
mod reach;
mod revocations;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sidewarden_proto::identity::{AgentId, Sha256};
use sidewarden_proto::time::Timestamp;
use tokio_util::sync::CancellationToken;

pub use directive::{Directives, DirectivesError, InForce, Roots};
pub use follow::follow;
pub use gatekeeper::keep;
pub use policies::{Application, History, Kept, apply, earlier, read};
pub use quarantine::{agent_of, release};
pub use reach::Reach;
pub use revocations::{Asked, Done, RevokeError, deny_issuers, hand_out, reason, refresh, revoke, undo};

/// A session that is live.
#[derive(Clone, Debug)]
pub struct Live {
    /// The key it was opened with.
    pub spki: Sha256,
    /// Since when.
    pub since: Timestamp,
    /// From where.
    pub source: String,
    /// `quic` or `tcp`.
    pub transport: &'static str,
    /// The directive version the agent runs; 0 for none.
    pub directive: Arc<AtomicU64>,
    /// What it understands of directives; 0 for an agent that does not say.
    pub understands: Arc<AtomicU32>,
    /// See [`Coming::begins`].
    pub begins: Option<Timestamp>,
    /// Ends it in favour of another.
    replaced: CancellationToken,
    number: u64,
}

/// How an agent comes in, and what it says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coming {
    /// From where.
    pub source: String,
    /// `quic` or `tcp`.
    pub transport: &'static str,
    /// See [`Live::directive`].
    pub directive: u64,
    /// See [`Live::understands`].
    pub understands: u32,
    /// When its certificate begins, if somebody else's CA has issued it.
    pub begins: Option<Timestamp>,
}

/// Another key of the same instance is connected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{agent} is connected from {source_address} with another key")]
pub struct SecondKey {
    agent: AgentId,
    source_address: String,
}

/// Live sessions by agent.
#[derive(Debug, Default)]
pub struct Fleet {
    live: Mutex<HashMap<AgentId, Live>>,
    numbers: AtomicU64,
}

/// A session's place in the fleet; it leaves when this is dropped.
#[derive(Debug)]
pub struct Place {
    fleet: Arc<Fleet>,
    agent: Arc<AgentId>,
    number: u64,
    /// Set when another session takes over.
    pub replaced: CancellationToken,
    /// See [`Live::directive`].
    pub directive: Arc<AtomicU64>,
    /// See [`Live::understands`].
    pub understands: Arc<AtomicU32>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut live = self.fleet.lock();
        if live.get(&*self.agent).is_some_and(|l| l.number == self.number) {
            live.remove(&*self.agent);
        }
    }
}

impl Fleet {
    fn lock(&self) -> MutexGuard<'_, HashMap<AgentId, Live>> {
        // A map of plain values: every change is one insert or remove.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a session in: whoever looks at it afterwards sees what it has said. One that came back with the same key, or with
    /// the key that follows it, takes over. Where keys are somebody else's to issue, the one with the newer certificate follows, and one that was enrolled here takes the
    /// place of any such.
    pub fn enter(
        self: &Arc<Fleet>,
        agent: &Arc<AgentId>,
        spki: Sha256,
        follows: bool,
        coming: Coming,
        now: Timestamp,
    ) -> Result<Place, SecondKey> {
        let mut live = self.lock();
        if let Some(other) = live.get(&**agent) {
            let takes_over = match (other.begins, coming.begins) {
                (Some(was), Some(is)) => is > was,
                // Which instance a guest is, is its own word.
                (Some(_), None) => true,
                (None, _) => false,
            };
            if other.spki != spki && !follows && !takes_over {
                return Err(SecondKey { agent: (**agent).clone(), source_address: other.source.clone() });
            }
            other.replaced.cancel();
        }
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let Coming { source, transport, directive, understands, begins } = coming;
        let (directive, understands) = (Arc::new(AtomicU64::new(directive)), Arc::new(AtomicU32::new(understands)));
        let replaced = CancellationToken::new();
        let place = Place {
            fleet: self.clone(),
            agent: agent.clone(),
            number,
            replaced: replaced.clone(),
            directive: directive.clone(),
            understands: understands.clone(),
        };
        let entry = Live { spki, since: now, source, transport, directive, understands, begins, replaced, number };
        live.insert((**agent).clone(), entry);
        Ok(place)
    }

    /// The session of `agent`, if it is live.
    pub fn live(&self, agent: &AgentId) -> Option<Live> {
        self.lock().get(agent).cloned()
    }

    /// Every live session, by agent.
    pub fn all(&self) -> Vec<(AgentId, Live)> {
        let mut all: Vec<_> = self.lock().iter().map(|(agent, live)| (agent.clone(), live.clone())).collect();
        all.sort_by(|(one, _), (other, _)| one.cmp(other));
        all
    }

    /// The directive that each live agent says it runs.
    pub fn confirmed(&self) -> Vec<(AgentId, u64)> {
        let confirmed = |live: &Live| live.directive.load(Ordering::Relaxed);
        self.lock().iter().map(|(agent, live)| (agent.clone(), confirmed(live))).collect()
    }

    /// Those whose certificates somebody else's CA has issued.
    pub fn guests(&self) -> Vec<AgentId> {
        self.lock().iter().filter(|(_, live)| live.begins.is_some()).map(|(agent, _)| agent.clone()).collect()
    }

    /// How many sessions are live, over QUIC and over TCP.
    pub fn counts(&self) -> (usize, usize) {
        let live = self.lock();
        let quic = live.values().filter(|l| l.transport == "quic").count();
        (quic, live.len() - quic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const K1: Sha256 = Sha256([1; 32]);
    const K2: Sha256 = Sha256([2; 32]);

    fn enter(fleet: &Arc<Fleet>, key: Sha256, follows: bool) -> Result<Place, SecondKey> {
        let agent = Arc::new("spiffe://x/shop/web#c1".parse::<AgentId>().unwrap());
        let coming = Coming { source: "10.0.0.1:5".into(), transport: "quic", ..Coming::default() };
        fleet.enter(&agent, key, follows, coming, Timestamp(1))
    }

    #[test]
    fn a_second_live_key_is_refused_unless_it_follows_the_first() {
        for (key, follows, allowed) in [(K1, false, true), (K2, false, false), (K2, true, true)] {
            let fleet = Arc::new(Fleet::default());
            let first = enter(&fleet, K1, false).unwrap();
            let second = enter(&fleet, key, follows);
            assert_eq!((second.is_ok(), first.replaced.is_cancelled()), (allowed, allowed), "{key:?} {follows}");
        }
    }

    /// An agent whose certificate is rotated by somebody else comes with a newer one; a copy of it comes back with the older.
    #[test]
    fn of_keys_that_others_issue_the_newer_takes_over_and_one_that_was_issued_here_keeps_its_place() {
        let at = |secs| Some(Timestamp::from_secs(secs));
        for (first, second, allowed) in [
            (at(10), at(20), true),
            (at(20), at(10), false),
            (at(10), at(10), false),
            (None, at(20), false),
            (at(10), None, true),
        ] {
            let fleet = Arc::new(Fleet::default());
            let agent = Arc::new("spiffe://x/shop/web#c1".parse::<AgentId>().unwrap());
            let come =
                |key, begins| fleet.enter(&agent, key, false, Coming { begins, ..Coming::default() }, Timestamp(1));
            let _live = come(K1, first).unwrap();
            assert_eq!(come(K2, second).is_ok(), allowed, "{first:?} {second:?}");
        }
    }

    #[test]
    fn leaving_late_does_not_remove_the_one_that_took_over() {
        let fleet = Arc::new(Fleet::default());
        let first = enter(&fleet, K1, false).unwrap();
        let second = enter(&fleet, K1, false).unwrap();
        drop(first);
        assert_eq!(fleet.counts(), (1, 0));
        drop(second);
        assert_eq!(fleet.counts(), (0, 0));
    }
}
