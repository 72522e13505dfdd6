//! The agent's way to a collector: one session at a time, over QUIC where it gets through and TCP where not.
//!
//! Collectors are tried in the order they are named; the one that answered last is tried first. While a session runs over
//! TCP, QUIC is tried again now and then: UDP may have been blocked for a moment only.

pub mod connect;
pub mod drive;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sidewarden_proto::config::HostPort;
use sidewarden_proto::identity::InstanceId;
use sidewarden_proto::session::SessionError;
use sidewarden_proto::time::Timestamp;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::backoff::{Backoff, Random};
use crate::dial::Resolver;
use crate::identity::keeper::Renewal;
use crate::identity::{Current, Identity};
use crate::metrics::Metrics;
use crate::spool::Spool;
use connect::{ConnectError, Connected, Quic, connect, connect_quic};
use drive::{Ended, Fault, Session, drive};

/// QUIC is tried again this often while a session runs over TCP.
const PROBE_QUIC: Duration = Duration::from_secs(600);
/// A collector that says it will not have us is asked again after this long.
const AFTER_A_NO: Duration = Duration::from_secs(300);
/// The clock is looked at again this often while the certificate is not usable.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// How the uplink stands, for whoever asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The collector and the transport, while there is a session.
    pub session: Option<(String, &'static str)>,
    /// Why there is none, or why the last one ended.
    pub last_error: Option<String>,
}

/// Shared with the admin listener.
pub type SharedStatus = Arc<Mutex<Status>>;

/// The uplink.
pub struct Uplink {
    /// In the order they are tried.
    pub collectors: Vec<HostPort>,
    /// Which instance we are.
    pub instance: InstanceId,
    /// Who we are.
    pub identity: Current,
    /// Events.
    pub spool: Spool,
    /// Resolves the collectors' names.
    pub resolver: Resolver,
    /// Requests for certificates.
    pub renewals: mpsc::Receiver<Renewal>,
    /// Takes directives.
    pub directives: mpsc::Sender<Vec<u8>>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Randomness.
    pub random: Random,
    /// How it stands.
    pub status: SharedStatus,
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Session(#[from] Fault),
}

/// What follows an end.
enum Next {
    Stop,
    AtOnce(Option<Quic>),
}

impl Uplink {
    /// Keeps a session up until `shutdown`, and says goodbye then.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30), self.random);
        let mut at = 0;
        let mut better = None;
        while let Some(identity) = self.usable_identity(&shutdown).await {
            let collector = self.collectors[at % self.collectors.len()].clone();
            let welcomed = std::sync::atomic::AtomicBool::new(false);
            let result = self.session(&collector, identity, better.take(), &welcomed, &shutdown).await;
            self.metrics.uplink(None);
            if welcomed.into_inner() {
                backoff.reset();
            }
            let pause = match result {
                Ok(Next::Stop) => return,
                Ok(Next::AtOnce(quic)) => {
                    better = quic;
                    continue;
                }
                Err(failure) => self.failed(&collector, &failure, &mut backoff).await,
            };
            at += 1;
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = sleep(pause) => {}
            }
        }
    }

    async fn failed(&self, collector: &HostPort, failure: &Failure, backoff: &mut Backoff) -> Duration {
        self.metrics.uplink_failed();
        let first = self.status.lock().unwrap_or_else(PoisonError::into_inner).session.take().is_some();
        let known = self.set_error(failure.to_string());
        let mut pause = backoff.after_failure();
        if let Failure::Session(Fault::Session(SessionError::Refused(refuse))) = failure {
            if refuse.reason == "chain_broken" {
                self.spool.begin_epoch(self.random).await;
            } else if !refuse.retry {
                pause = AFTER_A_NO;
            }
        }
        if first || !known {
            tracing::warn!(%collector, error = %failure, ?pause, "no session with a collector; trying again");
        } else {
            tracing::debug!(%collector, error = %failure, ?pause, "still no session with a collector");
        }
        pause
    }

    /// Remembers the error; says whether it was there already.
    fn set_error(&self, error: String) -> bool {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        status.last_error.replace(error.clone()) == Some(error)
    }

    /// Waits for an identity that can be used now; `None` at `shutdown`.
    async fn usable_identity(&mut self, shutdown: &CancellationToken) -> Option<Arc<Identity>> {
        loop {
            if shutdown.is_cancelled() {
                return None;
            }
            let newest = self.identity.borrow_and_update().clone();
            match newest.map(|identity| identity.usable(Timestamp::now()).map(|()| identity)) {
                Some(Ok(identity)) => return Some(identity),
                Some(Err(error)) => drop(self.set_error(error.to_string())),
                None => drop(self.set_error("this agent has not enrolled yet".into())),
            }
            tokio::select! {
                () = shutdown.cancelled() => return None,
                changed = self.identity.changed() => if changed.is_err() { return None },
                () = sleep(LOOK_AGAIN) => {}
            }
        }
    }

    async fn session(
        &mut self,
        collector: &HostPort,
        identity: Arc<Identity>,
        ready: Option<Quic>,
        welcomed: &std::sync::atomic::AtomicBool,
        shutdown: &CancellationToken,
    ) -> Result<Next, Failure> {
        let Connected { stream, transport, quic } = match ready {
            Some(quic) => quic.open().await?,
            None => tokio::select! {
                () = shutdown.cancelled() => return Ok(Next::Stop),
                connected = connect(&self.resolver, collector, &identity) => connected?,
            },
        };
        let (status, metrics) = (&self.status, &self.metrics);
        let session = Session {
            instance: &self.instance,
            identity: identity.clone(),
            current: self.identity.clone(),
            spool: &self.spool,
            renewals: &mut self.renewals,
            directives: &self.directives,
            metrics,
            random: self.random,
            welcomed: &|welcome| {
                welcomed.store(true, std::sync::atomic::Ordering::Relaxed);
                metrics.uplink(Some(transport));
                let session = Some((collector.to_string(), transport));
                *status.lock().unwrap_or_else(PoisonError::into_inner) = Status { session, last_error: None };
                tracing::info!(%collector, transport, version = welcome.version, "a session with a collector stands");
            },
        };
        let on_tcp = quic.is_none();
        let result = tokio::select! {
            ended = drive(session, stream, shutdown) => ended.map(|ended| match ended {
                Ended::Shutdown => Next::Stop,
                Ended::ComeBack => Next::AtOnce(None),
            }),
            better = probe_quic(&self.resolver, collector, &identity), if on_tcp => Ok(Next::AtOnce(Some(better))),
        };
        if let Some(quic) = quic {
            quic.close().await;
        }
        Ok(result?)
    }
}

/// Returns once QUIC gets through.
async fn probe_quic(resolver: &Resolver, collector: &HostPort, identity: &Identity) -> Quic {
    loop {
        sleep(PROBE_QUIC).await;
        match connect_quic(resolver, collector, identity).await {
            Ok(quic) => return quic,
            Err(error) => tracing::debug!(%collector, %error, "QUIC is still blocked"),
        }
    }
}
