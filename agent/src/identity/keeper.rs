//! Keeps the agent's identity alive: enrols, renews, takes directives, and publishes what follows.
//!
//! A renewal goes over the session with the collector while the certificate holds. One that ended while no collector
//! could be reached is renewed with its own key over the enrolment port, within the collector's grace. A failure never
//! throws away what still holds.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use sidewarden_proto::config::HostPort;
use sidewarden_proto::directive::{Directive, Signed};
use sidewarden_proto::enrol::{self as wire, Answer, Request, Token};
use sidewarden_proto::event::{Event, IdentityRenewalFailed, IdentityRenewed, Severity};
use sidewarden_proto::identity::{InstanceId, Sha256, SpiffeId};
use sidewarden_proto::secret::Secret;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{self, TlsError};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::enrol::{self, EnrolError};
use super::store::{self, Issued, Store, StoreError};
use super::{Current, Identity};
use crate::backoff::{Backoff, Random, part_of};
use crate::dial::Resolver;

/// A renewal over the session may take this long, waiting for a session included.
const RENEW_WITHIN: Duration = Duration::from_secs(30);
/// The clock is looked at again this often: it may be set.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// With less than this part of its life left, a certificate that could not be renewed is worth an alarm.
const ALARM_SHARE: u32 = 4;

/// A certificate request on its way through the session.
#[derive(Debug)]
pub struct Renewal {
    /// PKCS#10, DER.
    pub csr: Vec<u8>,
    /// Takes the collector's answer.
    pub answer: oneshot::Sender<Vec<u8>>,
}

/// Why there is no (new) identity.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// There is neither an identity nor a token.
    #[error(
        "there is no identity and no token at {0}: make one with `sidewarden-collector token create --workload <namespace>/<service>` and put it there"
    )]
    NoToken(PathBuf),
    /// Nor a place where one could be.
    #[error("there is no identity and collector.token_file is not set")]
    NoTokenFile,
    /// The token file cannot be read.
    #[error("reading {}: {error}", path.display())]
    TokenFile {
        /// Which.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
    /// It holds no token.
    #[error("{}: {fault}", path.display())]
    BadToken {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        fault: wire::BadToken,
    },
    /// The collector refused this token before, for good.
    #[error("the token at {0} was refused before; waiting for another one there")]
    SameToken(PathBuf),
    /// The request failed.
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    /// No session took the request, or none answered.
    #[error("no collector answered the renewal within {RENEW_WITHIN:?}")]
    NoSession,
    /// What was issued cannot be used.
    #[error("what was issued cannot be used: {0}")]
    Unusable(String),
    /// It cannot be kept.
    #[error("keeping the identity: {0}")]
    Store(#[from] StoreError),
}

impl From<TlsError> for KeeperError {
    fn from(error: TlsError) -> KeeperError {
        KeeperError::Unusable(error.to_string())
    }
}

/// From where certificates come.
#[derive(Clone)]
pub struct Source {
    /// Collectors, in the order they are tried.
    pub collectors: Vec<HostPort>,
    /// Where a token is found.
    pub token_file: Option<PathBuf>,
    /// Which workload this is, when the token is good for several.
    pub workload: Option<SpiffeId>,
    /// Which instance of it.
    pub instance: InstanceId,
}

/// What the keeper needs from others.
pub struct Parts {
    /// From where certificates come.
    pub source: Source,
    /// Resolves the collectors' names.
    pub resolver: Resolver,
    /// The roots for foreign peers.
    pub dns_roots: Vec<CertificateDer<'static>>,
    /// Takes events.
    pub emit: Arc<dyn Fn(Event) + Send + Sync>,
    /// Randomness.
    pub random: Random,
    /// Takes requests for the session.
    pub renewals: mpsc::Sender<Renewal>,
}

/// The keeper.
pub struct Keeper {
    parts: Parts,
    store: Store,
    publish: watch::Sender<Option<Arc<Identity>>>,
    issued: Option<Issued>,
    directive: Option<Arc<Directive>>,
    /// Made once, so that a request whose answer was lost is repeated with the same key.
    key: Option<KeyPair>,
    /// The token that was refused for good.
    refused: Option<Sha256>,
    /// Where within its span the renewal of this certificate lies.
    jitter: Duration,
    failing: bool,
}

/// What is due.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Enrol,
    Renew,
    RenewEnded,
    Wait(Duration),
}

/// What is due for a certificate with these dates. `jitter` moves the renewal past half of its life.
fn plan(dates: Option<(Timestamp, Timestamp)>, jitter: Duration, now: Timestamp) -> Step {
    let Some((from, until)) = dates else { return Step::Enrol };
    if now >= until {
        return Step::RenewEnded;
    }
    let due = from.plus(until.since(from) / 2).plus(jitter);
    if now >= due { Step::Renew } else { Step::Wait(due.since(now).min(LOOK_AGAIN)) }
}

impl Keeper {
    /// Loads what is on disk and publishes it. Only a damaged file without a token to replace it is an error.
    pub fn load(store: Store, parts: Parts) -> Result<(Keeper, Current), KeeperError> {
        let (publish, current) = watch::channel(None);
        let has_token = parts.source.token_file.as_ref().is_some_and(|path| path.exists());
        let issued = match store.load() {
            Ok(issued) => issued,
            Err(error @ StoreError::Damaged { .. }) if has_token => {
                tracing::error!(%error, "the identity is unusable; enrolling anew");
                None
            }
            Err(error) => return Err(error.into()),
        };
        let (directive, jitter) = (None, Duration::ZERO);
        let mut keeper =
            Keeper { parts, store, publish, issued, directive, key: None, refused: None, jitter, failing: false };
        keeper.load_directive()?;
        keeper.publish_current()?;
        Ok((keeper, current))
    }

    /// A directive that cannot be read any more is an error: without it the deny list would be forgotten.
    fn load_directive(&mut self) -> Result<(), KeeperError> {
        let Some(issued) = &self.issued else { return Ok(()) };
        let checked = issued.check()?;
        let loaded = self.store.load_directive(&checked.trust, &checked.workload.trust_domain())?;
        self.directive = loaded.map(Arc::new);
        Ok(())
    }

    fn publish_current(&mut self) -> Result<(), KeeperError> {
        let Some(issued) = &self.issued else { return Ok(()) };
        let identity = Identity::build(issued.check()?, self.directive.clone(), &self.parts.dns_roots)?;
        let (from, until) = (identity.credential.peer().not_before, identity.credential.peer().not_after);
        self.jitter = part_of(until.since(from) / 10, self.parts.random);
        self.publish.send_replace(Some(Arc::new(identity)));
        Ok(())
    }

    fn dates(&self) -> Option<(Timestamp, Timestamp)> {
        let current = self.publish.borrow();
        let peer = current.as_ref()?.credential.peer();
        Some((peer.not_before, peer.not_after))
    }

    /// Does what is due until `shutdown`.
    pub async fn run(mut self, mut directives: mpsc::Receiver<Vec<u8>>, shutdown: CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60), self.parts.random);
        let mut pause = Duration::ZERO;
        loop {
            let step = plan(self.dates(), self.jitter, Timestamp::now());
            let wait = if let Step::Wait(wait) = step { wait } else { pause };
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some(bytes) = directives.recv() => self.take_directive(&bytes),
                result = async { sleep(wait).await; self.act(step).await } => match result {
                    Ok(()) => {
                        backoff.reset();
                        (pause, self.failing) = (Duration::ZERO, false);
                    }
                    Err(error) => {
                        pause = backoff.after_failure();
                        self.tell_failure(&error, pause);
                    }
                },
            }
        }
    }

    async fn act(&mut self, step: Step) -> Result<(), KeeperError> {
        match step {
            Step::Wait(_) => Ok(()),
            Step::Enrol => self.enrol().await,
            Step::Renew => self.renew().await,
            Step::RenewEnded => match self.renew_ended().await {
                // Past the grace only a new token helps.
                Err(KeeperError::Enrol(EnrolError::Refused(refused))) if !refused.retry && self.has_token() => {
                    tracing::warn!(reason = refused.reason, "the ended certificate cannot be renewed; enrolling anew");
                    self.enrol().await
                }
                result => result,
            },
        }
    }

    fn has_token(&self) -> bool {
        self.parts.source.token_file.as_ref().is_some_and(|path| path.exists())
    }

    async fn enrol(&mut self) -> Result<(), KeeperError> {
        let path = self.parts.source.token_file.clone().ok_or(KeeperError::NoTokenFile)?;
        let text = Secret::new(read_token(&path)?);
        let hash = Sha256::of(&[text.reveal().as_bytes()]);
        if self.refused == Some(hash) {
            return Err(KeeperError::SameToken(path));
        }
        let token: Token =
            text.reveal().parse().map_err(|fault| KeeperError::BadToken { path: path.clone(), fault })?;
        let key = match self.key.take() {
            Some(key) => key,
            None => enrol::new_key()?,
        };
        let mut request = self.request(&key)?;
        (request.token_id, request.token_secret) = (token.id, token.secret);
        let source = &self.parts.source;
        let answer = enrol::ask(&self.parts.resolver, &source.collectors, &[token.pin], &request).await;
        if matches!(&answer, Err(error) if !error.may_pass()) {
            self.refused = Some(hash);
        }
        let key = self.key.insert(key).serialize_der();
        self.adopt(&key, answer?)?;
        self.key = None;
        match std::fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) => tracing::warn!(path = %path.display(), %error, "the used token cannot be removed"),
        }
        Ok(())
    }

    fn request(&self, key: &KeyPair) -> Result<Request, KeeperError> {
        Ok(Request {
            version: env!("CARGO_PKG_VERSION").into(),
            workload: self.parts.source.workload.clone(),
            instance: self.parts.source.instance.clone(),
            token_id: String::new(),
            token_secret: Secret::default(),
            csr: enrol::certificate_request(key)?,
            previous: Vec::new(),
        })
    }

    /// Over the session, with a new key.
    async fn renew(&mut self) -> Result<(), KeeperError> {
        let key = enrol::new_key()?;
        let csr = enrol::certificate_request(&key)?.0;
        let (answer, answered) = oneshot::channel();
        let exchange = async {
            self.parts.renewals.send(Renewal { csr, answer }).await.ok()?;
            answered.await.ok()
        };
        let payload = timeout(RENEW_WITHIN, exchange).await.ok().flatten().ok_or(KeeperError::NoSession)?;
        let unusable = |e: wire::EnrolError| KeeperError::Unusable(e.to_string());
        match wire::from_payload(&payload).map_err(unusable)? {
            Answer::Issued(issued) => self.adopt(&key.serialize_der(), issued),
            Answer::Refused(refused) => Err(EnrolError::Refused(refused).into()),
        }
    }

    /// Over the enrolment port, with the key of the certificate that ended.
    async fn renew_ended(&mut self) -> Result<(), KeeperError> {
        let Some(issued) = self.issued.clone() else { return self.enrol().await };
        let der = issued.key()?;
        let key = KeyPair::try_from(der.as_slice()).map_err(|e| KeeperError::Unusable(e.to_string()))?;
        let mut request = self.request(&key)?;
        request.previous = issued.chain().to_vec();
        let pins = self.root_pins();
        let source = &self.parts.source;
        let answer = enrol::ask(&self.parts.resolver, &source.collectors, &pins, &request).await?;
        self.adopt(&der, answer)
    }

    fn root_pins(&self) -> Vec<Sha256> {
        let current = self.publish.borrow();
        let Some(identity) = current.as_ref() else { return Vec::new() };
        identity.trust.domains.values().flatten().filter_map(|root| tls::spki_of(root).ok()).collect()
    }

    /// Takes what was issued: it must hold together and hold now. On disk first, then in use.
    fn adopt(&mut self, key: &[u8], answer: wire::Issued) -> Result<(), KeeperError> {
        let issued = Issued::new(key, answer.chain, answer.bundle);
        let checked = issued.check()?;
        let (renewed, workload, trust) = (self.issued.is_some(), checked.workload.clone(), checked.trust.clone());
        let identity = Identity::build(checked, self.directive.clone(), &self.parts.dns_roots)?;
        identity.usable(Timestamp::now()).map_err(|e| KeeperError::Unusable(e.to_string()))?;
        self.store.save(&issued)?;
        self.issued = Some(issued);
        self.publish_current()?;
        let (serial, not_after_us) = (identity.credential.peer().serial.clone(), identity.credential.peer().not_after);
        tracing::info!(%workload, serial, until = %not_after_us, "this agent has a certificate");
        if renewed {
            let summary = format!("the certificate was renewed and holds until {not_after_us}");
            self.emit(Severity::Info, summary, IdentityRenewed { serial, not_after_us });
        }
        if let Some(signed) = answer.directive {
            self.take_signed(signed, &trust);
        }
        Ok(())
    }

    fn take_directive(&mut self, bytes: &[u8]) {
        let Some(trust) = self.publish.borrow().as_ref().map(|identity| identity.trust.clone()) else { return };
        match Signed::from_bytes(bytes) {
            Ok(signed) => self.take_signed(signed, &trust),
            Err(error) => tracing::warn!(%error, "a directive was not taken"),
        }
    }

    /// Takes a directive that is proven and newer than the one in force.
    fn take_signed(&mut self, signed: Signed, trust: &tls::Trust) {
        let now = Timestamp::now();
        let directive = match signed.open(trust, now) {
            Ok(directive) => directive,
            Err(error) => return tracing::warn!(%error, "a directive was not taken"),
        };
        let have = self.directive.as_ref().map_or(0, |directive| directive.version);
        let ours = trust.domains.contains_key(&directive.trust_domain);
        if directive.version <= have || !ours {
            return tracing::debug!(version = directive.version, have, "a directive that is not newer");
        }
        // In force even if it cannot be kept: a full disk must not keep a revoked peer in.
        if let Err(error) = self.store.save_directive(signed, now) {
            tracing::error!(%error, "the directive cannot be kept: after a restart the old one is in force");
        }
        let (version, denied) = (directive.version, directive.deny.len());
        let before = self.directive.replace(Arc::new(directive));
        match self.publish_current() {
            Ok(()) => tracing::info!(version, denied, "a new directive is in force"),
            Err(error) => {
                tracing::error!(%error, version, "the directive cannot be used; the old one stays in force");
                self.directive = before;
            }
        }
    }

    fn tell_failure(&mut self, error: &KeeperError, pause: Duration) {
        let dates = self.dates();
        let urgent = dates.is_some_and(|(from, until)| until.since(Timestamp::now()) < until.since(from) / ALARM_SHARE);
        if self.failing && !urgent {
            return tracing::debug!(%error, ?pause, "still no certificate");
        }
        tracing::warn!(%error, ?pause, "no certificate; trying again");
        if let (false, Some((_, not_after_us))) = (self.failing, dates) {
            let summary = format!("renewing the certificate failed, the present one ends at {not_after_us}: {error}");
            self.emit(Severity::Warning, summary, IdentityRenewalFailed { error: error.to_string(), not_after_us });
        }
        self.failing = true;
    }

    fn emit(&self, severity: Severity, summary: String, body: impl Into<sidewarden_proto::event::Body>) {
        (self.parts.emit)(Event::new(Timestamp::now(), severity, summary, &body.into()));
    }
}

fn read_token(path: &std::path::Path) -> Result<String, KeeperError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(KeeperError::NoToken(path.to_owned())),
        Err(error) => Err(KeeperError::TokenFile { path: path.to_owned(), error }),
    }
}

/// The roots of foreign peers, from a PEM file.
pub fn read_dns_roots(path: &std::path::Path) -> Result<Vec<CertificateDer<'static>>, StoreError> {
    let pem = std::fs::read(path).map_err(|error| StoreError::File { path: path.to_owned(), error })?;
    tls::certificates(&pem).map_err(|e| store::StoreError::Damaged { path: path.to_owned(), detail: e.to_string() })
}
