//! An identity that somebody else keeps for this collector: looked at or listened to, judged, taken, told.
//!
//! What cannot be used leaves the last good one in force, and an alert fires until another one is taken.

use std::sync::Arc;
use std::time::Duration;

use sidewarden_proto::event::{Body, CollectorIdentityRefused, CollectorIdentityTaken, Event, Severity};
use sidewarden_proto::given::answer::Answer;
use sidewarden_proto::given::files::{Files, Look, Steady};
use sidewarden_proto::given::workload_api::{self, Endpoint, WorkloadApiError};
use sidewarden_proto::given::{Elsewhere, Offered};
use sidewarden_proto::identity::{Sha256, SpiffeId};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::judge;
use crate::app::Core;

/// How often files are looked at.
pub(super) const LOOK_AT_FILES: Duration = Duration::from_secs(1);
/// How the identity stands in events and alerts.
const IDENTITY: &str = "identity";

/// Reads what lies in files before the first agent comes; then keeps it until the shutdown. The task to run.
pub async fn start(core: &Core) -> Option<impl Future<Output = ()> + use<>> {
    let elsewhere = core.config.identity.clone()?;
    let mut keeper = Keeper { core: core.clone(), files: Steady::default(), told: None };
    if let Elsewhere::Files(files) = &elsewhere {
        keeper.first_look(files).await;
    }
    Some(async move {
        let shutdown = keeper.core.shutdown.clone();
        let keeping = async {
            match elsewhere {
                Elsewhere::Files(files) => keeper.watch(&files).await,
                Elsewhere::WorkloadApi(endpoint) => keeper.listen(&endpoint).await,
            }
        };
        tokio::select! {
            () = keeping => {}
            () = shutdown.cancelled() => {}
        }
    })
}

struct Keeper {
    core: Core,
    files: Steady,
    /// The fault that was told last, while it lasts.
    told: Option<String>,
}

impl Keeper {
    async fn first_look(&mut self, files: &Files) {
        if files.key_is_open() {
            tracing::warn!(path = %files.key.display(), "others than the collector may read the private key: chmod 600");
        }
        self.files = Steady::taken(files.stamp());
        if !self.take(files.read().map_err(|fault| fault.to_string())).await {
            // Read again though nothing moves: what is wrong may be the clock.
            self.files = Steady::default();
        }
    }

    async fn watch(&mut self, files: &Files) {
        let mut beat = interval(LOOK_AT_FILES);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            beat.tick().await;
            if self.files.look(files.stamp()) == Look::New
                && self.take(files.read().map_err(|fault| fault.to_string())).await
            {
                self.files.take();
            }
        }
    }

    async fn listen(&mut self, endpoint: &Endpoint) {
        let (tell, mut told) = mpsc::channel::<Result<Answer, WorkloadApiError>>(1);
        let taking = async {
            while let Some(answer) = told.recv().await {
                let offered = answer.map_err(|fault| fault.to_string()).and_then(|answer| self.choose(answer));
                self.take(offered).await;
            }
        };
        tokio::join!(taking, workload_api::follow(endpoint, tell, crate::random));
    }

    /// The one with a collector's name. If there is none, the first says what is wrong.
    fn choose(&self, answer: Answer) -> Result<Offered, String> {
        let domain = &self.core.config.trust_domain;
        let ours = tls::collector_id(domain);
        let fits = |id: &SpiffeId| match self.core.directives.is_following() {
            true => id.trust_domain() == *domain && tls::is_collector(id) && *id != ours,
            false => *id == ours,
        };
        let wanted = answer.svids.iter().map(|svid| svid.id.clone()).find(fits);
        answer.choose(wanted.as_ref(), (self.core.clock)()).map_err(|fault| fault.to_string())
    }

    /// Takes it, or tells why not; whether it was taken.
    async fn take(&mut self, offered: Result<Offered, String>) -> bool {
        let put = match offered {
            Ok(offered) => self.put(offered).await,
            Err(error) => Err(error),
        };
        match put {
            Ok(None) => true,
            Ok(Some(taken)) => {
                let until = taken.credential.peer().not_after;
                self.told = None;
                let (name, serial) = (taken.workload.to_string(), taken.credential.peer().serial.clone());
                tracing::info!(name, serial, %until, "this collector has an identity that is somebody else's to renew");
                let summary = format!("{name} is this collector's, given by somebody else, until {until}");
                let body = CollectorIdentityTaken { what: IDENTITY.into(), name, serial, not_after_us: until };
                tell(&self.core, Severity::Info, summary, body).await;
                true
            }
            Err(error) => {
                if !self.told.as_ref().is_some_and(|told| is_same_fault(told, &error)) {
                    let in_use = self.core.identities.given().map(|given| given.credential.peer().not_after);
                    refused(&self.core, IDENTITY, &error, in_use).await;
                }
                self.told = Some(error);
                false
            }
        }
    }

    /// Puts it in force; `None` if it is what we have, and nothing was wrong meanwhile.
    async fn put(&self, offered: Offered) -> Result<Option<Arc<Offered>>, String> {
        let Core { identities, directives, config, issuer, clock, .. } = self.core.clone();
        let ours = issuer.authority().trust();
        let own: Vec<Sha256> = ours.domains.values().flatten().filter_map(|root| tls::spki_of(root).ok()).collect();
        judge(&offered, &config.trust_domain, directives.is_following(), &own, clock())?;
        let same = |have: &Arc<Offered>| {
            (have.credential.chain(), &have.trust) == (offered.credential.chain(), &offered.trust)
        };
        if identities.given().as_ref().is_some_and(same) && self.told.is_none() {
            return Ok(None);
        }
        // The directive is signed anew on disk.
        let put = move || {
            let (own, credential) = (issuer.authority().own().borrow().clone(), offered.credential.clone());
            identities.take(offered).map_err(|error| error.to_string())?;
            directives
                .sign_also(credential, &own)
                .map_err(|error| format!("the directive cannot be signed: {error}"))?;
            Ok(identities.given())
        };
        tokio::task::spawn_blocking(put).await.map_err(|error| error.to_string())?
    }
}

/// Whether two texts say the same but for numbers: what is wrong with a date has another time in it each second.
pub(super) fn is_same_fault(one: &str, other: &str) -> bool {
    let words = |text: &'_ str| text.chars().filter(|c| !c.is_ascii_digit()).collect::<String>();
    words(one) == words(other)
}

/// Tells that something that others keep for us was not taken, and until when what is in use holds.
pub(super) async fn refused(core: &Core, what: &str, error: &str, in_use: Option<Timestamp>) {
    let (whose, goes_on) = match (what, in_use) {
        (IDENTITY, None) => ("the identity", "agents that go by its CA cannot report".to_owned()),
        (IDENTITY, Some(until)) => ("the identity", format!("the last good one is in use, until {until}")),
        (_, None) => ("the page's certificate", "one of the collector's own CA is shown".to_owned()),
        (_, Some(until)) => ("the page's certificate", format!("the last good one is in use, until {until}")),
    };
    let summary = format!("{whose} that somebody else keeps cannot be used, {goes_on}: {error}");
    tracing::warn!("{summary}");
    let body = CollectorIdentityRefused { what: what.into(), error: error.into(), in_use_until_us: in_use };
    tell(core, Severity::Warning, summary, body).await;
}

pub(super) async fn tell(core: &Core, severity: Severity, summary: String, body: impl Into<Body>) {
    if core.commits.own(Event::new((core.clock)(), severity, summary, &body.into())).await.is_err() {
        tracing::debug!("an event came after the store was closed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_that_only_counts_on_is_the_same_one() {
        let text = |now: &str| format!("tls.crt: it holds from 2026-01-01 to 2026-02-01, and the clock says {now}");
        assert!(is_same_fault(&text("12:00:01.123"), &text("12:00:02.001")));
        assert!(!is_same_fault(&text("12:00:01"), "tls.crt: there is no certificate in it"));
    }
}
