//! Warm connections to one peer: authenticated, at rest, and used again for the next stream.
//!
//! A handshake costs several times what a connection without TLS does, so none is made for a stream while a connection
//! rests. One stream at a time uses a connection: a long one never stands in the way of another.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sidewarden_proto::time::Timestamp;
use tokio::time::Instant;

use super::accounting::Secured;
use super::channel::Channel;
use super::connections::Registered;
use crate::identity::Identity;

/// Most connections that rest: more come and go with the bursts that need them.
const MAX_IDLE: usize = 64;
/// How long one may rest. The server waits longer, so that it is we who close.
pub const MAX_REST: Duration = Duration::from_secs(60);
/// How long a server waits for the next stream.
pub const MAX_WAIT: Duration = Duration::from_secs(90);

/// An authenticated connection with what it was authenticated by.
pub struct Warm {
    /// The connection.
    pub channel: Channel,
    /// How it was settled.
    pub how: Secured,
    /// Our side: a connection made with another identity is not used any more.
    pub identity: Arc<Identity>,
    /// Where it leads.
    pub address: SocketAddr,
    /// The peer, judged again by every review also while the connection rests.
    pub live: Registered,
}

impl Warm {
    fn is_good(&self, identity: &Arc<Identity>) -> bool {
        Arc::ptr_eq(&self.identity, identity)
            && !self.live.cancel.is_cancelled()
            && self.live.peer.not_after > Timestamp::now()
            && self.channel.is_quiet()
    }
}

/// The connections at rest, the one used last on top.
#[derive(Default)]
pub struct Pool {
    resting: Mutex<Vec<(Instant, Warm)>>,
}

impl Pool {
    /// A connection to `address` that is still good, if there is one.
    pub fn take(&self, identity: &Arc<Identity>, address: SocketAddr) -> Option<Warm> {
        let mut resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(newest) = resting.iter().rposition(|(_, warm)| warm.address == address) {
            let (since, warm) = resting.remove(newest);
            if since.elapsed() < MAX_REST && warm.is_good(identity) {
                return Some(warm);
            }
        }
        None
    }

    /// Lays one to rest.
    pub fn put(&self, warm: Warm) {
        let mut resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        if resting.len() < MAX_IDLE {
            resting.push((Instant::now(), warm));
        }
    }

    /// Lets go of those that rested too long or are no longer good.
    pub fn sweep(&self, identity: Option<&Arc<Identity>>) {
        let mut resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        resting.retain(|(since, warm)| since.elapsed() < MAX_REST && identity.is_some_and(|id| warm.is_good(id)));
        if resting.is_empty() {
            *resting = Vec::new();
        }
    }
}
