//! The agent's way to a collector: one session at a time, over QUIC where it gets through and TCP where not.
//!
//! Collectors are tried in the order they are named; the one that answered last is tried first. While a session runs with
//! another than the first, the first is tried again now and then, and so is QUIC while a session runs over TCP: UDP may
//! have been blocked for a moment only.

pub mod connect;
pub mod drive;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sidewarden_proto::backoff::{Backoff, Random, part_of};
use sidewarden_proto::config::HostPort;
use sidewarden_proto::event::Mode;
use sidewarden_proto::identity::InstanceId;
use sidewarden_proto::session::SessionError;
use sidewarden_proto::time::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::dial::Resolver;
use crate::identity::keeper::Renewal;
use crate::identity::{Current, Identity};
use crate::metrics::Metrics;
use crate::spool::Spool;
use connect::{ConnectError, Connected, connect, connect_quic};
use drive::{Ended, Fault, Session, drive};

/// QUIC is tried again this often while a session runs over TCP.
const PROBE_QUIC: Duration = Duration::from_secs(600);
/// The first collector is tried again this often while a session runs with another one, give or take a half. One that was
/// restarted takes whoever has not come back after half a minute for silent.
pub const GO_HOME: Duration = Duration::from_secs(15);
/// A collector that says it will not have us is asked again after this long.
const AFTER_A_NO: Duration = Duration::from_secs(300);
/// The clock is looked at again this often while the certificate is not usable.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// How the uplink stands, for whoever asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The collector and the transport, while there is a session.
    pub session: Option<(String, &'static str)>,
    /// Whether the collector of the session, or of the last one, decides about gates.
    pub keeps_gates: bool,
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
    /// How we stand beside our workload.
    pub mode: Mode,
    /// Who we are.
    pub identity: Current,
    /// Events.
    pub spool: Spool,
    /// Resolves the collectors' names.
    pub resolver: Resolver,
    /// Requests for certificates.
    pub renewals: mpsc::Receiver<Renewal>,
    /// Takes directives; each is a whole document, so that the newest stands for all that nobody has looked at yet.
    pub directives: watch::Sender<Vec<u8>>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Randomness.
    pub random: Random,
    /// How often the first collector is tried while a session runs with another.
    pub go_home: Duration,
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
    AtOnce(Option<Connected>),
    /// The first collector is back.
    Home(Connected),
}

impl Uplink {
    /// Keeps a session up until `shutdown`, and says goodbye then.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30), self.random);
        let mut at = 0;
        let mut better = None;
        let mut home_at = Instant::now();
        while let Some(identity) = self.usable_identity(&shutdown).await {
            let collector = self.collectors[at % self.collectors.len()].clone();
            let first = self.collectors.first().filter(|first| **first != collector).cloned();
            if first.is_none() || home_at <= Instant::now() {
                home_at = Instant::now() + self.go_home / 2 + part_of(self.go_home, self.random);
            }
            let first = first.map(|first| (first, home_at));
            let welcomed = std::sync::atomic::AtomicBool::new(false);
            let result = self.session((&collector, first), identity, better.take(), &welcomed, &shutdown).await;
            self.metrics.uplink(None);
            self.spool.recall();
            let was_welcomed = welcomed.into_inner();
            if was_welcomed {
                backoff.reset();
            }
            let pause = match result {
                Ok(Next::Stop) => return,
                Ok(Next::AtOnce(connected)) if was_welcomed => {
                    better = connected;
                    continue;
                }
                Ok(Next::Home(connected)) => {
                    (at, better) = (0, Some(connected));
                    continue;
                }
                // A new epoch before a welcome: once is to be expected, again and again would be a busy loop.
                Ok(Next::AtOnce(_)) => backoff.after_failure(),
                Err(failure) => {
                    at += 1;
                    let was_last = at % self.collectors.len() == 0;
                    self.failed(&collector, &failure, was_last, &mut backoff).await
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = sleep(pause) => {}
            }
        }
    }

    /// What one collector says no to, the next one in the round may not: `was_last` is about the end of the round.
    async fn failed(&self, collector: &HostPort, failure: &Failure, was_last: bool, backoff: &mut Backoff) -> Duration {
        self.metrics.uplink_failed();
        let first = self.status.lock().unwrap_or_else(PoisonError::into_inner).session.take().is_some();
        let known = self.set_error(failure.to_string());
        let mut pause = backoff.after_failure();
        if let Failure::Session(Fault::Session(SessionError::Refused(refuse))) = failure {
            if refuse.reason == "chain_broken" {
                self.spool.begin_epoch(self.random).await;
            } else if !refuse.retry && was_last {
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
        (collector, first): (&HostPort, Option<(HostPort, Instant)>),
        identity: Arc<Identity>,
        ready: Option<Connected>,
        welcomed: &std::sync::atomic::AtomicBool,
        shutdown: &CancellationToken,
    ) -> Result<Next, Failure> {
        let Connected { stream, transport, quic } = match ready {
            Some(connected) => connected,
            None => tokio::select! {
                () = shutdown.cancelled() => return Ok(Next::Stop),
                connected = connect(&self.resolver, collector, &identity) => connected?,
            },
        };
        let (status, metrics, leave) = (&self.status, &self.metrics, CancellationToken::new());
        let name = collector.to_string();
        let session = Session {
            collector: &name,
            instance: &self.instance,
            mode: self.mode,
            identity: identity.clone(),
            current: self.identity.clone(),
            spool: &self.spool,
            renewals: &mut self.renewals,
            directives: &self.directives,
            metrics,
            random: self.random,
            leave: &leave,
            welcomed: &|welcome| {
                welcomed.store(true, std::sync::atomic::Ordering::Relaxed);
                metrics.uplink(Some(transport));
                let session = Some((collector.to_string(), transport));
                let keeps_gates = welcome.keeps_gates;
                *status.lock().unwrap_or_else(PoisonError::into_inner) =
                    Status { session, keeps_gates, last_error: None };
                tracing::info!(%collector, transport, version = welcome.version, "a session with a collector stands");
            },
        };
        let on_tcp = quic.is_none();
        let (resolver, every, random) = (&self.resolver, self.go_home, self.random);
        let go_home = async {
            match &first {
                Some((first, at)) => probe_first(resolver, first, &identity, *at, every, random).await,
                None => std::future::pending().await,
            }
        };
        let driving = drive(session, stream, shutdown);
        tokio::pin!(go_home, driving);
        let mut home = None;
        let result = loop {
            tokio::select! {
                ended = &mut driving => break ended.map(|ended| match (ended, home) {
                    (Ended::Left, Some(connected)) => Next::Home(connected),
                    (Ended::Shutdown, _) => Next::Stop,
                    (Ended::ComeBack | Ended::Left, _) => Next::AtOnce(None),
                }),
                better = probe_quic(&self.resolver, collector, &identity), if on_tcp && home.is_none() => {
                    break Ok(Next::AtOnce(Some(better)));
                }
                connected = &mut go_home, if home.is_none() => {
                    home = Some(connected);
                    leave.cancel();
                }
            }
        };
        if let Some(quic) = quic {
            quic.close().await;
        }
        Ok(result?)
    }
}

/// Returns once the first collector answers. It is asked at `at`, whatever sessions end and begin until then, and from
/// then on at each agent at another time.
async fn probe_first(
    resolver: &Resolver,
    first: &HostPort,
    identity: &Identity,
    at: Instant,
    every: Duration,
    random: Random,
) -> Connected {
    sleep_until(at).await;
    loop {
        match connect(resolver, first, identity).await {
            Ok(connected) => return connected,
            Err(error) => tracing::debug!(%first, %error, "the first collector is still away"),
        }
        sleep(every / 2 + part_of(every, random)).await;
    }
}

/// Returns once QUIC gets through.
async fn probe_quic(resolver: &Resolver, collector: &HostPort, identity: &Identity) -> Connected {
    loop {
        sleep(PROBE_QUIC).await;
        let probed = async { connect_quic(resolver, collector, identity).await?.open().await };
        match probed.await {
            Ok(connected) => return connected,
            Err(error) => tracing::debug!(%collector, %error, "QUIC is still blocked"),
        }
    }
}
