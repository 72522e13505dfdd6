//! The certificate of the page, the API and of metrics over HTTPS: one of our own CA, or one that somebody else keeps in files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use sidewarden_proto::event::{CollectorIdentityTaken, Severity};
use sidewarden_proto::given::files::{Look, Pair, Steady};
use sidewarden_proto::identity::PeerName;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{self, Credential, Floor, TlsError};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use super::Identities;
use super::given::{LOOK_AT_FILES, is_same_fault, refused, tell};
use crate::app::Core;

/// How it stands in events and alerts.
const PAGE: &str = "page";

/// What is shown.
#[derive(Clone, Debug)]
pub struct Shown {
    /// A certificate of our own CA: for whoever names its root, as our commands do, and for all where there is no other one.
    own: Credential,
    /// One that somebody else keeps, and the file that it came from.
    given: Option<(Credential, PathBuf)>,
}

impl Shown {
    /// A certificate of our own CA.
    pub fn own(own: Credential) -> Shown {
        Shown { own, given: None }
    }

    /// What people see.
    pub fn credential(&self) -> &Credential {
        self.given.as_ref().map_or(&self.own, |(credential, _)| credential)
    }

    /// Whom it names, in words.
    pub fn names(&self) -> String {
        match &self.credential().peer().name {
            PeerName::Dns(names) => names.join(", "),
            PeerName::Spiffe(id) => id.to_string(),
        }
    }

    /// The file that it came from; `None`: it is of our own CA.
    pub fn from(&self) -> Option<&Path> {
        self.given.as_ref().map(|(_, path)| path.as_path())
    }

    /// For HTTPS.
    pub fn config(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let alpn: &[&[u8]] = &[b"h2", b"http/1.1"];
        let Some((given, _)) = &self.given else {
            return tls::server_config_without_client(&self.own, Floor::Tls12, alpn);
        };
        let root = self.own.chain().last().map(std::slice::from_ref).unwrap_or_default();
        tls::server_config_without_client_with_another(given, (&self.own, root), Floor::Tls12, alpn)
    }
}

/// Reads what somebody else keeps for the page before anybody looks at it; then keeps it until the shutdown. The task to run.
pub async fn start(core: &Core) -> impl Future<Output = ()> + use<> {
    let (core, shutdown) = (core.clone(), core.shutdown.clone());
    let mut keeper = core.config.api.certificate.clone().map(|pair| Keeper::new(core.clone(), pair));
    if let Some(keeper) = &mut keeper {
        keeper.first_look().await;
    }
    async move {
        let keeping = async {
            match keeper {
                Some(keeper) => keeper.watch().await,
                None => mirror(&core).await,
            }
        };
        tokio::select! {
            () = keeping => {}
            () = shutdown.cancelled() => {}
        }
    }
}

/// The newest of our own CA.
async fn mirror(core: &Core) {
    let mut own = core.issuer.authority().own();
    while own.changed().await.is_ok() {
        core.identities.show_own(&own);
    }
}

impl Identities {
    fn show_own(&self, own: &watch::Receiver<Credential>) {
        self.page.send_modify(|shown| shown.own = own.borrow().clone());
    }

    fn show_given(&self, credential: Credential, from: PathBuf) {
        self.page.send_modify(|shown| shown.given = Some((credential, from)));
    }
}

/// What is in the files, if it holds at `now`.
pub(super) fn read(pair: &Pair, now: Timestamp) -> Result<Credential, String> {
    let credential = pair.read().map_err(|fault| fault.to_string())?;
    let (from, until) = (credential.peer().not_before, credential.peer().not_after);
    if now < from || now >= until {
        let cert = pair.cert.display();
        return Err(format!("{cert}: it holds from {from} to {until}, and this machine's clock says {now}"));
    }
    Ok(credential)
}

struct Keeper {
    core: Core,
    pair: Pair,
    files: Steady,
    /// The fault that was told last, while it lasts.
    told: Option<String>,
}

impl Keeper {
    fn new(core: Core, pair: Pair) -> Keeper {
        if pair.key_is_open() {
            tracing::warn!(path = %pair.key.display(), "others than the collector may read the private key: chmod 600");
        }
        Keeper { core, pair, files: Steady::default(), told: None }
    }

    async fn first_look(&mut self) {
        let stamp = self.pair.stamp();
        if self.take().await {
            self.files = Steady::taken(stamp);
        }
    }

    async fn watch(mut self) {
        let mut own = self.core.issuer.authority().own();
        let mut beat = interval(LOOK_AT_FILES);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = beat.tick() => {}
                changed = own.changed() => match changed {
                    Ok(()) => self.core.identities.show_own(&own),
                    Err(_) => return,
                },
            }
            if self.files.look(self.pair.stamp()) == Look::New && self.take().await {
                self.files.take();
            }
        }
    }

    /// Takes what is in the files, or tells why not; whether it was taken.
    async fn take(&mut self) -> bool {
        match read(&self.pair, (self.core.clock)()) {
            Ok(credential) => {
                let (serial, not_after_us) = (credential.peer().serial.clone(), credential.peer().not_after);
                self.core.identities.show_given(credential, self.pair.cert.clone());
                let name = self.core.identities.page().borrow().names();
                let summary = format!("the page shows a certificate of {name} from files, until {not_after_us}");
                tracing::info!("{summary}");
                self.told = None;
                let body = CollectorIdentityTaken { what: PAGE.into(), name, serial, not_after_us };
                tell(&self.core, Severity::Info, summary, body).await;
                true
            }
            Err(error) => {
                if !self.told.as_ref().is_some_and(|told| is_same_fault(told, &error)) {
                    let shown = self.core.identities.page().borrow().clone();
                    let in_use = shown.from().map(|_| shown.credential().peer().not_after);
                    refused(&self.core, PAGE, &error, in_use).await;
                }
                self.told = Some(error);
                false
            }
        }
    }
}
