//! What is live and has no peer with a proven name: egress, and plaintext that was let in. It is asked again, too, whenever
//! an answer could have changed.
//!
//! A connection registers before anything is asked: a change in between then finds it here.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use sidewarden_proto::event::RefusalReason;
use sidewarden_proto::policy::connections::At;
use tokio_util::sync::CancellationToken;

use crate::policy::egress::Target;

/// What one of them is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// Somebody without TLS came in here.
    Plaintext(At),
    /// The workload went somewhere.
    Egress {
        /// What it asked for.
        target: Target,
        /// Another proxy looks the name up.
        unresolved: bool,
    },
}

/// One of them.
#[derive(Debug)]
pub struct Live {
    /// What it is.
    pub what: What,
    /// The address that was dialled, once it is known; never, where another proxy dials.
    dialled: OnceLock<SocketAddr>,
    cancel: CancellationToken,
    ended_for: OnceLock<RefusalReason>,
}

impl Live {
    /// The address that was dialled, where it is known.
    pub fn dialled(&self) -> Option<SocketAddr> {
        self.dialled.get().copied()
    }

    /// Now it is known.
    pub fn set_dialled(&self, address: SocketAddr) {
        // It is dialled once.
        let _ = self.dialled.set(address);
    }

    /// Ends it.
    pub fn cancel(&self) -> &CancellationToken {
        &self.cancel
    }

    /// Why a review ended it, if one did.
    pub fn ended_for(&self) -> Option<RefusalReason> {
        self.ended_for.get().copied()
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Unproven {
    live: Mutex<HashMap<u64, Arc<Live>>>,
    next: AtomicU64,
}

/// A place among them, given back on drop.
#[derive(Debug)]
pub struct Entered {
    all: Arc<Unproven>,
    number: u64,
    live: Arc<Live>,
}

impl Unproven {
    /// Registers one.
    pub fn enter(self: &Arc<Unproven>, what: What, parent: &CancellationToken) -> Entered {
        let (dialled, ended_for) = (OnceLock::new(), OnceLock::new());
        let live = Arc::new(Live { what, dialled, cancel: parent.child_token(), ended_for });
        let number = self.next.fetch_add(1, Relaxed);
        self.lock().insert(number, live.clone());
        Entered { all: self.clone(), number, live }
    }

    /// Asks `may` about every one, and ends those that may no longer be.
    pub fn review(&self, may: impl Fn(&Live) -> Result<(), RefusalReason>) {
        for live in self.lock().values() {
            if let Err(reason) = may(live) {
                live.ended_for.get_or_init(|| reason);
                live.cancel.cancel();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::ops::Deref for Entered {
    type Target = Live;
    fn deref(&self) -> &Live {
        &self.live
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.all.lock().remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_review_ends_those_that_may_no_longer_be_and_forgets_who_has_gone() {
        let (all, root) = (Arc::new(Unproven::default()), CancellationToken::new());
        let at = |port| What::Plaintext(At { port, server_name: None });
        let (stays, goes) = (all.enter(at(1), &root), all.enter(at(2), &root));
        let forbidden = at(2);
        all.review(|live| if live.what == forbidden { Err(RefusalReason::NotAllowed) } else { Ok(()) });
        assert!(goes.cancel().is_cancelled() && goes.ended_for() == Some(RefusalReason::NotAllowed));
        assert!(!stays.cancel().is_cancelled() && stays.ended_for().is_none());
        drop((stays, goes));
        assert!(all.lock().is_empty());
    }
}
