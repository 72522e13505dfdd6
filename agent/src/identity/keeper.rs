//! Keeps the agent's identity alive: enrols, renews, takes directives, and publishes what follows.
//!
//! A renewal goes over the session with the collector while the certificate holds. One that ended while no collector
//! could be reached, or that a clock which was ahead has dated into the future, is renewed with its own key over the enrolment
//! port, within the collector's grace. Where somebody
//! else keeps it in files, the files are watched instead. A failure never throws away what still holds.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use sidewarden_proto::backoff::{Backoff, Random, part_of};
use sidewarden_proto::config::HostPort;
use sidewarden_proto::crl::{self, CrlFault};
use sidewarden_proto::directive::{Directive, Signed};
use sidewarden_proto::enrol::{self as wire, Answer, Request, Token};
use sidewarden_proto::event::{
    Event, IdentityRenewalFailed, IdentityRenewed, Severity, TrustChanged, TrustCrls, TrustFilesRefused, TrustedRoot,
};
use sidewarden_proto::given::answer::Answer as ApiAnswer;
use sidewarden_proto::given::files::{Files, FilesError, Look, Steady};
use sidewarden_proto::given::workload_api::{self, WorkloadApiError};
use sidewarden_proto::given::{Elsewhere, Offered};
use sidewarden_proto::identity::{InstanceId, Peer, PeerName, Sha256, SpiffeId, TrustDomain, Usage, describe};
use sidewarden_proto::secret::Secret;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{self, TlsError, Trust};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinError;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::enrol::{self, EnrolError};
use super::foreign::{self, ForeignFiles};
use super::keeping::{Adopting, KEEP_WITHIN, Proven, keep_directives};
use super::store::{Checked, Given, Issued, Store, StoreError};
use super::{Current, Identity, Terms};
use crate::dial::Resolver;

/// A renewal over the session may take this long, waiting for a session included.
const RENEW_WITHIN: Duration = Duration::from_secs(30);
/// At most so much of a directive's spread for renewals is believed.
const LONGEST_SPREAD: Duration = Duration::from_secs(3600);
/// What does not go on by itself is looked at again this often.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// The same for the clock, which may be set.
const LOOK_AT_CLOCK: Duration = Duration::from_secs(5);
/// How often files are looked at.
const LOOK_AT_FILES: Duration = Duration::from_secs(1);
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
    /// What was issued a moment ago does not hold now.
    #[error(
        "clock: a certificate made just now holds from {from} to {until}, and this machine's clock says {now}: set the clock right, here or at the collector"
    )]
    Clock {
        /// When it begins.
        from: Timestamp,
        /// When it ends.
        until: Timestamp,
        /// What the clock says.
        now: Timestamp,
    },
    /// It cannot be kept.
    #[error("keeping the identity: {0}")]
    Store(#[from] StoreError),
    /// Nor is it known that it cannot.
    #[error("keeping the identity: the disk has not taken it within {KEEP_WITHIN:?}")]
    NotYetKept,
    /// Our own fault.
    #[error("keeping the identity ended by a panic: {0}")]
    Panic(#[from] JoinError),
    /// The files hold none.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The Workload API gives none.
    #[error(transparent)]
    WorkloadApi(#[from] WorkloadApiError),
    /// A revocation list went back.
    #[error(transparent)]
    Crl(#[from] CrlFault),
    /// It still gives none.
    #[error("{0}")]
    StillNone(String),
    /// The files hold one that ends soon.
    #[error("nobody has given us a newer certificate, and this one ends at {0}")]
    NotReplaced(Timestamp),
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
    /// Where somebody else keeps the identity; no token is asked for then.
    pub elsewhere: Option<Elsewhere>,
    /// Whom else we trust.
    pub foreign: ForeignFiles,
}

impl Source {
    fn files(&self) -> Option<&Files> {
        match &self.elsewhere {
            Some(Elsewhere::Files(files)) => Some(files),
            _ => None,
        }
    }
}

/// What the keeper needs from others.
#[derive(Clone)]
pub struct Parts {
    /// From where certificates come.
    pub source: Source,
    /// Resolves the collectors' names.
    pub resolver: Resolver,
    /// What does not change.
    pub terms: Terms,
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
    /// Why the last attempt failed; `None` after one that did not.
    trouble: watch::Sender<Option<String>>,
    /// What the collector issued.
    issued: Option<Issued>,
    /// The same, or what the files held, looked through.
    held: Option<Checked>,
    /// The files that `held` came from.
    files: Steady,
    /// The files of foreign roots, and why they were not taken.
    foreign: Steady<foreign::Stamp>,
    foreign_fault: Option<String>,
    /// Why the Workload API gives nothing, since its last answer.
    api_fault: Option<String>,
    /// Its last answer, if that could not be taken: the fault may be ours, and pass.
    untaken: Option<ApiAnswer>,
    /// Whom we trust, as it was last told.
    told_trust: Option<Trust>,
    /// The same of revocation lists.
    told_crls: Option<TrustCrls>,
    /// For which identity, and when, that was looked at.
    looked_at_crls: Option<(usize, Instant)>,
    directive: Option<Arc<Directive>>,
    /// The same, for whoever writes it to disk.
    to_keep: watch::Sender<Option<Arc<Proven>>>,
    /// Made once, so that a request whose answer was lost is repeated with the same key.
    key: Option<KeyPair>,
    /// A renewal that is under way.
    pending: Option<Pending>,
    /// What was issued, on its way to disk and into use.
    adopting: Option<Adopting>,
    /// The token that was refused for good.
    refused: Option<Sha256>,
    /// Where within its span the renewal of this certificate lies.
    jitter: Duration,
    /// When a renewal is due that the directive asks for.
    asked: Option<Timestamp>,
    /// That there is no (newer) certificate was told, and not yet that there is, or that none is due.
    failing: bool,
}

/// A renewal over the session.
struct Pending {
    key: KeyPair,
    /// Until the session has taken it.
    request: Option<Renewal>,
    answered: oneshot::Receiver<Vec<u8>>,
}

impl Pending {
    fn new() -> Result<Pending, KeeperError> {
        let key = enrol::new_key()?;
        let csr = enrol::certificate_request(&key)?.0;
        let (answer, answered) = oneshot::channel();
        Ok(Pending { key, request: Some(Renewal { csr, answer }), answered })
    }

    /// The answer; may be cancelled and called again.
    async fn answer(&mut self, renewals: &mpsc::Sender<Renewal>) -> Option<Vec<u8>> {
        if self.request.is_some() {
            let permit = renewals.reserve().await.ok()?;
            permit.send(self.request.take()?);
        }
        (&mut self.answered).await.ok()
    }
}

/// What is due.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Enrol,
    Renew,
    RenewEnded,
    RenewNotYet,
    Keep,
    LookAtFiles,
    LookAtApi,
    TakeAgain,
    Wait(Duration),
}

/// What is due for a certificate with these dates. `jitter` moves the renewal past half of its life; `asked` is when one
/// is due that the directive asks for.
fn plan(dates: Option<(Timestamp, Timestamp)>, jitter: Duration, asked: Option<Timestamp>, now: Timestamp) -> Step {
    let Some((from, until)) = dates else { return Step::Enrol };
    if now >= until {
        return Step::RenewEnded;
    }
    // Made while a clock was ahead; or ours is behind, which the answer will tell.
    if now < from {
        return Step::RenewNotYet;
    }
    let half = from.plus(until.since(from) / 2).plus(jitter);
    let due = asked.map_or(half, |asked| asked.min(half));
    if now >= due { Step::Renew } else { Step::Wait(due.since(now).min(LOOK_AT_CLOCK)) }
}

impl Keeper {
    /// Loads what is on disk and publishes it. Only a damaged file without a token to replace it is an error.
    pub fn load(store: Store, parts: Parts) -> Result<(Keeper, Current), KeeperError> {
        let (publish, current) = watch::channel(None);
        let has_token = parts.source.token_file.as_ref().is_some_and(|path| path.exists());
        let loaded = if parts.source.elsewhere.is_some() { Ok(None) } else { store.load() };
        let issued = match loaded {
            Ok(issued) => issued,
            Err(error @ StoreError::Damaged { .. }) if has_token => {
                tracing::error!(%error, "the identity is unusable; enrolling anew");
                None
            }
            Err(error) => return Err(error.into()),
        };
        let held = issued.as_ref().map(Issued::check).transpose()?;
        let (directive, jitter) = (None, Duration::ZERO);
        let mut keeper = Keeper {
            parts,
            store,
            publish,
            trouble: watch::Sender::default(),
            issued,
            held,
            files: Default::default(),
            foreign: Default::default(),
            foreign_fault: None,
            api_fault: None,
            untaken: None,
            told_trust: None,
            told_crls: None,
            looked_at_crls: None,
            directive,
            to_keep: watch::Sender::default(),
            key: None,
            pending: None,
            adopting: None,
            refused: None,
            jitter,
            asked: None,
            failing: false,
        };
        // Before they are read: what changes meanwhile is read again.
        keeper.foreign = Steady::taken(keeper.parts.source.foreign.stamp());
        keeper.parts.terms.foreign = keeper.parts.source.foreign.read()?;
        keeper.first_look()?;
        keeper.load_directive()?;
        keeper.publish_current()?;
        Ok((keeper, current))
    }

    /// Why there is no certificate, or no newer one, for whoever has to tell a person.
    pub fn trouble(&self) -> watch::Receiver<Option<String>> {
        self.trouble.subscribe()
    }

    /// Whether a directive is kept that nobody could read yet, for want of an identity to believe it by.
    pub fn directive_is_unread(&self) -> bool {
        self.held.is_none() && self.store.keeps_directive()
    }

    /// A directive that cannot be read any more is an error: without it the deny list would be forgotten.
    fn load_directive(&mut self) -> Result<(), KeeperError> {
        let Some(held) = &self.held else { return Ok(()) };
        let (trust, home) = self.judges_of_directives(held);
        let loaded = self.store.load_directive(&trust, &home)?;
        self.directive = loaded.map(Arc::new);
        Ok(())
    }

    /// The trust domain whose collector is listened to.
    fn home(&self) -> Option<TrustDomain> {
        self.held.as_ref().map(|held| self.parts.terms.home_of(&held.workload))
    }

    /// Who vouches for directives, and of which domain they are.
    fn judges_of_directives(&self, held: &Checked) -> (Trust, TrustDomain) {
        let mut trust = held.trust.clone();
        trust.add(&self.parts.terms.foreign.domains);
        (trust, self.parts.terms.home_of(&held.workload))
    }

    fn publish_current(&mut self) -> Result<(), KeeperError> {
        let Some(held) = self.held.clone() else { return Ok(()) };
        let identity = Identity::build(held, self.directive.clone(), &self.parts.terms)?;
        let (from, until) = (identity.credential.peer().not_before, identity.credential.peer().not_after);
        self.jitter = part_of(until.since(from) / 10, self.parts.random);
        self.asked = self.asked_renewal(&identity, Timestamp::now());
        self.publish.send_replace(Some(Arc::new(identity)));
        Ok(())
    }

    /// When the directive wants this certificate renewed. One that is still of an unwanted root after a renewal waits: a
    /// collector that knows no better would be asked again and again.
    fn asked_renewal(&self, identity: &Identity, now: Timestamp) -> Option<Timestamp> {
        let directive = identity.directive.as_ref()?;
        if !directive.wants_renewed(identity.credential.chain()) {
            return None;
        }
        let within = Duration::from_secs(directive.renew.within_secs.into()).min(LONGEST_SPREAD);
        let spread = part_of(within, self.parts.random);
        match self.asked {
            Some(at) if at > now => Some(at),
            Some(_) => Some(now.plus(LOOK_AGAIN + spread)),
            None => Some(now.plus(spread)),
        }
    }

    fn dates(&self) -> Option<(Timestamp, Timestamp)> {
        let current = self.publish.borrow();
        let peer = current.as_ref()?.credential.peer();
        Some((peer.not_before, peer.not_after))
    }

    /// Does what is due until `shutdown`.
    pub async fn run(mut self, mut directives: watch::Receiver<Vec<u8>>, shutdown: CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60), self.parts.random);
        let mut retry_at = Instant::now();
        let (tell, mut told) = mpsc::channel(1);
        let (elsewhere, random) = (self.parts.source.elsewhere.clone(), self.parts.random);
        let asking = async {
            if let Some(Elsewhere::WorkloadApi(endpoint)) = &elsewhere {
                workload_api::follow(endpoint, tell, random).await;
            }
            std::future::pending::<()>().await
        };
        let keeping = keep_directives(self.store.clone(), self.to_keep.subscribe());
        tokio::pin!(asking, keeping);
        loop {
            self.tell_trust();
            let step = self.next_step();
            if step != Step::Renew {
                self.pending = None;
            }
            let (wait, is_due) = match step {
                Step::Wait(wait) => (wait, true),
                Step::LookAtFiles => (LOOK_AT_FILES, true),
                Step::LookAtApi => (LOOK_AGAIN, true),
                // The clock may be set while we wait, and then something else is due.
                _ => {
                    let left = retry_at.saturating_duration_since(Instant::now());
                    (left.min(LOOK_AT_CLOCK), left <= LOOK_AT_CLOCK)
                }
            };
            let result = tokio::select! {
                () = shutdown.cancelled() => break,
                () = &mut asking => break,
                () = &mut keeping => return,
                Ok(()) = directives.changed() => {
                    self.take_directive(&directives.borrow_and_update());
                    continue;
                }
                Some(answer) = told.recv() => self.take_answer(answer),
                result = async {
                    self.wait(wait).await;
                    if is_due { Some(self.act(step).await) } else { None }
                } => match result {
                    Some(result) => result,
                    None => continue,
                },
            };
            match result {
                Ok(()) => {
                    backoff.reset();
                    retry_at = Instant::now();
                    self.trouble.send_replace(None);
                }
                Err(error) => {
                    let mut pause = backoff.after_failure();
                    // Each try is a certificate that is made for nothing.
                    if matches!(error, KeeperError::Clock { .. }) {
                        pause = pause.max(LOOK_AGAIN);
                    }
                    retry_at = Instant::now() + pause;
                    self.tell_failure(&error, pause);
                }
            }
        }
        // Without a sender it ends, with the last one written.
        drop(self);
        if timeout(KEEP_WITHIN, keeping).await.is_err() {
            tracing::error!("the disk is too slow to keep the directive: after a restart an older one is in force");
        }
    }

    /// Waits, and looks at the trust files meanwhile.
    async fn wait(&mut self, wait: Duration) {
        let end = Instant::now() + wait;
        while !self.parts.source.foreign.is_empty() && end.saturating_duration_since(Instant::now()) > LOOK_AT_FILES {
            sleep(LOOK_AT_FILES).await;
            self.look_at_trust();
        }
        sleep_until(end).await;
        self.look_at_foreign();
    }

    fn look_at_trust(&mut self) {
        self.look_at_foreign();
        self.tell_trust();
    }

    fn next_step(&self) -> Step {
        match self.parts.source.elsewhere {
            Some(Elsewhere::Files(_)) => Step::LookAtFiles,
            Some(Elsewhere::WorkloadApi(_)) if self.untaken.is_some() => Step::TakeAgain,
            Some(Elsewhere::WorkloadApi(_)) => Step::LookAtApi,
            // It is there, and only the disk has not taken it: another one would be made for nothing.
            None if self.adopting.is_some() => Step::Keep,
            None => plan(self.dates(), self.jitter, self.asked, Timestamp::now()),
        }
    }

    async fn act(&mut self, step: Step) -> Result<(), KeeperError> {
        match step {
            Step::Wait(_) => {
                self.tell_well();
                Ok(())
            }
            Step::LookAtFiles => self.look_at_files(),
            Step::LookAtApi => match &self.api_fault {
                Some(fault) => Err(KeeperError::StillNone(fault.clone())),
                None => self.look_at_dates(),
            },
            Step::TakeAgain => self.untaken.take().map_or(Ok(()), |answer| self.take_answer(Ok(answer))),
            Step::Keep => self.finish_adopting().await,
            Step::Enrol => self.enrol().await,
            Step::Renew => self.renew().await,
            Step::RenewNotYet => self.renew_by_its_key().await,
            Step::RenewEnded => match self.renew_by_its_key().await {
                // Past the grace only a new token helps.
                Err(KeeperError::Enrol(EnrolError::Refused(refused))) if !refused.retry && self.has_token() => {
                    tracing::warn!(reason = refused.reason, "the ended certificate cannot be renewed; enrolling anew");
                    self.enrol().await
                }
                result => result,
            },
        }
    }

    /// What is in the files when the agent starts. That they are not there yet is no reason not to start: nothing gets
    /// through until they are.
    fn first_look(&mut self) -> Result<(), KeeperError> {
        let Some(files) = self.parts.source.files().cloned() else { return Ok(()) };
        if files.key_is_open() {
            tracing::warn!(path = %files.key.display(), "others than the agent may read the private key: chmod 600");
        }
        let stamp = files.stamp();
        match files.read() {
            Ok(offered) => self.held = Some(Checked::from_files(offered)),
            Err(error) => {
                self.trouble.send_replace(Some(error.to_string()));
                tracing::warn!(%error, "no identity yet; waiting for the files");
                return Ok(());
            }
        }
        self.files = Steady::taken(stamp);
        Ok(())
    }

    /// Takes what is in the files, when they have changed and have stood still since the last look.
    fn look_at_files(&mut self) -> Result<(), KeeperError> {
        let Some(files) = self.parts.source.files().cloned() else { return Ok(()) };
        match self.files.look(files.stamp()) {
            Look::Moves => Ok(()),
            Look::Same => self.look_at_dates(),
            Look::New => {
                self.take_checked(Checked::from_files(files.read()?))?;
                self.files.take();
                Ok(())
            }
        }
    }

    /// What the Workload API says, or why it says nothing.
    fn take_answer(&mut self, answer: Result<ApiAnswer, WorkloadApiError>) -> Result<(), KeeperError> {
        self.api_fault = answer.as_ref().err().map(ToString::to_string);
        self.untaken = None;
        let answer = answer?;
        let taken = self.take_offered(&answer);
        self.untaken = taken.is_err().then_some(answer);
        taken
    }

    fn take_offered(&mut self, answer: &ApiAnswer) -> Result<(), KeeperError> {
        let chosen = answer.choose(self.parts.source.workload.as_ref(), Timestamp::now());
        let Offered { credential, workload, trust } = chosen.map_err(WorkloadApiError::from)?;
        let same = |held: &Checked| held.credential.chain() == credential.chain() && held.trust == trust;
        if self.held.as_ref().is_some_and(same) {
            return self.look_at_dates();
        }
        self.take_checked(Checked { credential, workload, trust, from: Given::ByApi })
    }

    /// Takes an identity that somebody else keeps for us. With the first one, and with one of another domain, comes the
    /// directive that is on disk: until now nobody could say whether it is our collector's.
    fn take_checked(&mut self, checked: Checked) -> Result<(), KeeperError> {
        let identity = Identity::build(checked.clone(), self.directive.clone(), &self.parts.terms)?;
        identity.usable(Timestamp::now()).map_err(|e| KeeperError::Unusable(e.to_string()))?;
        let moves = self.home().as_ref() != Some(&identity.home);
        let before = self.held.replace(checked);
        if moves && let Err(error) = self.load_directive() {
            self.held = before;
            return Err(error);
        }
        self.publish_current()?;
        self.tell_renewed(&identity);
        Ok(())
    }

    /// Takes the foreign roots, when their files have changed and have stood still since the last look.
    fn look_at_foreign(&mut self) {
        let taken = match self.foreign.look(self.parts.source.foreign.stamp()) {
            Look::Moves => return,
            Look::Same => Ok(()),
            Look::New => self.take_foreign(),
        };
        if let Err(error) = taken {
            return self.tell_foreign_fault(&error);
        }
        self.foreign.take();
        if self.foreign_fault.take().is_some() {
            self.told_trust = None;
        }
    }

    fn take_foreign(&mut self) -> Result<(), KeeperError> {
        let foreign = self.parts.source.foreign.read()?;
        if let (Some(was), Some(now)) = (&self.parts.terms.foreign.crls, &foreign.crls) {
            crl::check_no_older(&was.lists, &now.lists)?;
        }
        let before = std::mem::replace(&mut self.parts.terms.foreign, foreign);
        if let Err(error) = self.publish_current() {
            self.parts.terms.foreign = before;
            return Err(error);
        }
        tracing::info!("the trust files were read anew");
        Ok(())
    }

    /// Once for each fault, not once a second.
    fn tell_foreign_fault(&mut self, error: &KeeperError) {
        let fault = error.to_string();
        if self.foreign_fault.as_ref() == Some(&fault) {
            return;
        }
        let summary = format!("the trust files cannot be used, what was read before stays in force: {fault}");
        self.emit(Severity::Warning, summary, TrustFilesRefused { error: fault.clone() });
        self.foreign_fault = Some(fault);
    }

    /// The files are somebody else's to renew: all we can do is to say in time that nobody did.
    fn look_at_dates(&mut self) -> Result<(), KeeperError> {
        match self.dates() {
            Some((from, until)) if until.since(Timestamp::now()) < until.since(from) / ALARM_SHARE => {
                Err(KeeperError::NotReplaced(until))
            }
            _ => {
                self.tell_well();
                Ok(())
            }
        }
    }

    /// Tells whom we trust when that has changed, and when files that could not be used can be used again.
    fn tell_trust(&mut self) {
        let Some(identity) = self.publish.borrow().clone() else { return };
        self.tell_crls(&identity);
        let same =
            |told: &Trust| (&told.domains, &told.dns_roots) == (&identity.trust.domains, &identity.trust.dns_roots);
        if self.told_trust.as_ref().is_some_and(same) {
            return;
        }
        let roots = |list: &Vec<_>| list.iter().filter_map(root_in_words).collect::<Vec<_>>();
        let domains = identity.trust.domains.iter().map(|(domain, list)| (domain.clone(), roots(list))).collect();
        let body = TrustChanged { domains, dns_roots: roots(&identity.trust.dns_roots) };
        let count = body.domains.values().map(Vec::len).sum::<usize>() + body.dns_roots.len();
        let names = body.domains.keys().map(TrustDomain::as_str).collect::<Vec<_>>().join(", ");
        self.emit(Severity::Info, format!("this agent trusts {count} CAs, of {names}"), body);
        self.told_trust = Some(identity.trust.clone());
        // What was told ends the alert about files, which may still be broken.
        self.foreign_fault = None;
    }

    /// Tells how revocation lists stand when that has changed, as it does when one ends.
    fn tell_crls(&mut self, identity: &Arc<Identity>) {
        let Some(revocation) = &identity.trust.revocation else { return };
        // The signatures of large lists are not for every second.
        let looked = self.looked_at_crls.replace((Arc::as_ptr(identity) as usize, Instant::now()));
        if looked.is_some_and(|(of, at)| of == Arc::as_ptr(identity) as usize && at.elapsed() < LOOK_AGAIN) {
            self.looked_at_crls = looked;
            return;
        }
        let lacking = revocation.lacking(&identity.trust, Timestamp::now());
        let body = TrustCrls { strict: revocation.strict, lists: revocation.lists.len(), lacking };
        if self.told_crls.as_ref() == Some(&body) {
            return;
        }
        let (severity, summary) = match body.lacking.first() {
            Some(first) => (Severity::Warning, first.clone()),
            None => (Severity::Info, format!("{} revocation lists hold, none is lacking", body.lists)),
        };
        self.told_crls = Some(body.clone());
        self.emit(severity, summary, body);
    }

    /// That the present certificate is good, to whoever was told that there is no other.
    fn tell_well(&mut self) {
        let Some(identity) = self.publish.borrow().clone().filter(|_| self.failing) else { return };
        let (serial, not_after_us) = (identity.credential.peer().serial.clone(), identity.credential.peer().not_after);
        let summary = format!("the present certificate is good until {not_after_us}, and no other is due");
        self.emit(Severity::Info, summary, IdentityRenewed { serial, not_after_us });
        self.failing = false;
    }

    fn tell_renewed(&mut self, identity: &Identity) {
        self.failing = false;
        let (serial, not_after_us) = (identity.credential.peer().serial.clone(), identity.credential.peer().not_after);
        tracing::info!(workload = %identity.workload, serial, until = %not_after_us, "this agent has a certificate");
        let summary = format!("the certificate was renewed and holds until {not_after_us}");
        self.emit(Severity::Info, summary, IdentityRenewed { serial, not_after_us });
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
        if self.key.is_none() {
            self.key = Some(enrol::new_key()?);
        }
        let Some(key) = &self.key else { return Ok(()) };
        let source = &self.parts.source;
        let der = key.serialize_der();
        let mut request = request(source, key)?;
        (request.token_id, request.token_secret) = (token.id, token.secret);
        let answer = enrol::ask(&self.parts.resolver, &source.collectors, &[token.pin], &request).await;
        if matches!(&answer, Err(error) if !error.may_pass()) {
            self.refused = Some(hash);
        }
        self.adopt(&der, answer?, Some(path)).await
    }

    /// Over the session, with a new key. A directive may come first: then this is called again, and goes on waiting for the
    /// same answer. Another request would be one too many for the collector.
    async fn renew(&mut self) -> Result<(), KeeperError> {
        if self.pending.is_none() {
            self.pending = Some(Pending::new()?);
        }
        let payload = self.renewal_answer().await;
        let Some(Pending { key, .. }) = self.pending.take() else { return Ok(()) };
        let payload = payload.ok_or(KeeperError::NoSession)?;
        let unusable = |e: wire::EnrolError| KeeperError::Unusable(e.to_string());
        match wire::from_payload(&payload).map_err(unusable)? {
            Answer::Issued(issued) => self.adopt_next(&key.serialize_der(), issued).await,
            Answer::Refused(refused) => Err(EnrolError::Refused(refused).into()),
        }
    }

    /// What a collector answers, if it does in time; the trust files are looked at meanwhile.
    async fn renewal_answer(&mut self) -> Option<Vec<u8>> {
        let (renewals, end) = (self.parts.renewals.clone(), Instant::now() + RENEW_WITHIN);
        while Instant::now() < end {
            let answer = self.pending.as_mut()?.answer(&renewals);
            match timeout(LOOK_AT_FILES, answer).await {
                Ok(answer) => return answer,
                Err(_) => self.look_at_trust(),
            }
        }
        None
    }

    /// Over the enrolment port, with the key of a certificate that does not hold now.
    async fn renew_by_its_key(&mut self) -> Result<(), KeeperError> {
        let Some(issued) = self.issued.clone() else { return self.enrol().await };
        let der = issued.key()?;
        let key = KeyPair::try_from(der.as_slice()).map_err(|e| KeeperError::Unusable(e.to_string()))?;
        let mut request = request(&self.parts.source, &key)?;
        request.previous = issued.chain().to_vec();
        let pins = self.root_pins();
        let source = &self.parts.source;
        let answer = enrol::ask(&self.parts.resolver, &source.collectors, &pins, &request).await?;
        self.adopt_next(&der, answer).await
    }

    /// A renewal makes nobody somebody else.
    async fn adopt_next(&mut self, key: &[u8], answer: wire::Issued) -> Result<(), KeeperError> {
        let chain = answer.chain.iter().map(|der| der.0.as_slice().into()).collect::<Vec<_>>();
        let named = tls::peer_of(&chain, Usage::Client).map_err(TlsError::from)?.name;
        let is_ours = |held: &Checked| named == PeerName::Spiffe(held.workload.clone());
        if !self.held.as_ref().is_none_or(is_ours) {
            return Err(KeeperError::Unusable(format!("it is for {named}, and this agent is another workload's")));
        }
        self.adopt(key, answer, None).await
    }

    fn root_pins(&self) -> Vec<Sha256> {
        let current = self.publish.borrow();
        let Some(identity) = current.as_ref() else { return Vec::new() };
        identity.collectors.domains.values().flatten().filter_map(|root| tls::spki_of(root).ok()).collect()
    }

    /// Takes what was issued, for a `token` if there was one: it must hold together and hold now.
    async fn adopt(&mut self, key: &[u8], answer: wire::Issued, token: Option<PathBuf>) -> Result<(), KeeperError> {
        let issued = Issued::new(key, answer.chain, answer.bundle);
        let checked = issued.check()?;
        let identity = Identity::build(checked.clone(), self.directive.clone(), &self.parts.terms)?;
        judge_clock(&identity, Timestamp::now())?;
        self.adopting = Some(Adopting::new(issued, checked, answer.directive, token));
        self.finish_adopting().await
    }

    /// On disk first, then in use; but no disk keeps us with a certificate that is about to end. A directive may come
    /// first: then this is called again.
    async fn finish_adopting(&mut self) -> Result<(), KeeperError> {
        let store = self.store.clone();
        let Some(adopting) = &mut self.adopting else { return Ok(()) };
        let unkept = match adopting.keep(&store).await {
            Err(error) if !self.is_urgent() => return Err(error),
            kept => kept.err(),
        };
        let Some(adopting) = &self.adopting else { return Ok(()) };
        self.directive = self.directive_for(&adopting.checked)?;
        let Some(Adopting { issued, checked, directive, token, .. }) = self.adopting.take() else { return Ok(()) };
        let (is_first, trust) = (self.issued.is_none(), checked.trust.clone());
        (self.issued, self.held) = (Some(issued), Some(checked));
        self.publish_current()?;
        if let Some(path) = token {
            self.use_up(&path);
        }
        self.tell_adopted(is_first, unkept);
        if let Some(signed) = directive {
            self.take_signed(signed, &trust);
        }
        Ok(())
    }

    /// The directive that goes with what was issued. Where the agent was in no domain, or in another one, it is the one on
    /// disk, of whoever was here before or of ourselves: none that is older counts.
    fn directive_for(&self, checked: &Checked) -> Result<Option<Arc<Directive>>, KeeperError> {
        let (trust, home) = self.judges_of_directives(checked);
        if self.home().as_ref() == Some(&home) {
            return Ok(self.directive.clone());
        }
        Ok(self.store.directive_proven_by(&trust, &home)?.map(Arc::new))
    }

    fn use_up(&mut self, token: &std::path::Path) {
        self.key = None;
        if let Err(error) = std::fs::remove_file(token) {
            tracing::warn!(path = %token.display(), %error, "the used token cannot be removed");
        }
    }

    fn tell_adopted(&mut self, is_first: bool, unkept: Option<KeeperError>) {
        let Some(identity) = self.publish.borrow().clone() else { return };
        let not_after_us = identity.credential.peer().not_after;
        if is_first {
            self.failing = false;
            tracing::info!(workload = %identity.workload, until = %not_after_us, "this agent has its first certificate");
        } else {
            self.tell_renewed(&identity);
        }
        if let Some(error) = unkept {
            let error = format!("the new certificate is in use but not kept, and a restart may need a token: {error}");
            self.emit(Severity::Warning, error.clone(), IdentityRenewalFailed { error, not_after_us });
        }
    }

    fn take_directive(&mut self, bytes: &[u8]) {
        let Some(trust) = self.publish.borrow().as_ref().map(|identity| identity.collectors.clone()) else { return };
        match Signed::from_bytes(bytes) {
            Ok(signed) => self.take_signed(signed, &trust),
            Err(error) => tracing::warn!(%error, "a directive was not taken"),
        }
    }

    /// Takes a directive that is proven and newer than the one in force.
    fn take_signed(&mut self, signed: Signed, trust: &tls::Trust) {
        let now = Timestamp::now();
        let (directive, signers) = match signed.prove(trust, now) {
            Ok(proven) => proven,
            Err(error) => return tracing::warn!(%error, "a directive was not taken"),
        };
        if let Some(why) = self.all_denied(&signers) {
            return tracing::warn!(why, "a directive of a collector that was revoked was not taken");
        }
        let have = self.directive.as_ref().map_or(0, |directive| directive.version);
        let home = self.home();
        // A foreign domain that we trust has collectors, too: they vouch for their own.
        let ours = home.as_ref() == Some(&directive.trust_domain);
        if ours && directive.version < have {
            let version = directive.version;
            return tracing::warn!(
                version,
                have,
                "a directive that is older than ours was not taken: its collector was set back, or is another one"
            );
        }
        if directive.version == have || !ours {
            return tracing::debug!(version = directive.version, have, "a directive that is not newer");
        }
        let (version, denied) = (directive.version, directive.deny.len());
        let roots = trust.domains.get(&directive.trust_domain).cloned().unwrap_or_default();
        let before = self.directive.replace(Arc::new(directive));
        if let Err(error) = self.publish_current() {
            tracing::error!(%error, version, "the directive cannot be used; the old one stays in force");
            self.directive = before;
            return;
        }
        tracing::info!(version, denied, "a new directive is in force");
        // In force before it is kept, and even if it cannot be: neither a slow disk nor a full one keeps a revoked peer in.
        self.to_keep.send_replace(Some(Arc::new(Proven { signed, roots, at: now })));
    }

    /// Why the word of none of the signers counts any more, by the directive in force: a collector's key may have been stolen.
    fn all_denied(&self, signers: &[Peer]) -> Option<String> {
        let in_force = self.directive.as_ref()?;
        let denied: Option<Vec<_>> = signers.iter().map(|signer| in_force.denies(signer)).collect();
        denied?.first().map(|denied| denied.to_string())
    }

    /// Whether the certificate in use ends soon, or does not hold now.
    fn is_urgent(&self) -> bool {
        let now = Timestamp::now();
        self.dates().is_some_and(|(from, until)| now < from || until.since(now) < until.since(from) / ALARM_SHARE)
    }

    fn tell_failure(&mut self, error: &KeeperError, pause: Duration) {
        // That the same token was refused before says less than why.
        if !matches!(error, KeeperError::SameToken(_)) {
            self.trouble.send_replace(Some(error.to_string()));
        }
        let dates = self.dates();
        if self.failing && !self.is_urgent() {
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

fn root_in_words(root: &CertificateDer<'_>) -> Option<TrustedRoot> {
    let described = describe(root).ok()?;
    Some(TrustedRoot { sha256: Sha256::of(&[root]), subject: described.subject, not_after_us: described.not_after })
}

/// What a collector has just made holds now, or one of the two clocks is wrong.
fn judge_clock(identity: &Identity, now: Timestamp) -> Result<(), KeeperError> {
    let (from, until) = (identity.credential.peer().not_before, identity.credential.peer().not_after);
    identity.usable(now).map_err(|_| KeeperError::Clock { from, until, now })
}

fn request(source: &Source, key: &KeyPair) -> Result<Request, EnrolError> {
    Ok(Request {
        version: env!("CARGO_PKG_VERSION").into(),
        workload: source.workload.clone(),
        instance: source.instance.clone(),
        token_id: String::new(),
        token_secret: Secret::default(),
        csr: enrol::certificate_request(key)?,
        previous: Vec::new(),
    })
}

fn read_token(path: &std::path::Path) -> Result<String, KeeperError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(KeeperError::NoToken(path.to_owned())),
        Err(error) => Err(KeeperError::TokenFile { path: path.to_owned(), error }),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use sidewarden_proto::directive::{Deny, Renew};
    use sidewarden_proto::enrol::{Der, Refused};
    use sidewarden_proto::tls::Floor;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::identity::made_up::{self, Ca, validity};

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_certificate_is_renewed_past_half_of_its_life_and_enrolled_anew_never_before_its_end() {
        let (from, until) = (Timestamp::from_secs(0), Timestamp::from_secs(7200));
        let check = |now: i64, expected| {
            let plan = plan(Some((from, until)), Duration::from_secs(100), None, Timestamp::from_secs(now));
            assert_eq!(plan, expected, "at {now}");
        };
        check(-500, Step::RenewNotYet);
        check(3600, Step::Wait(LOOK_AT_CLOCK));
        check(3697, Step::Wait(Duration::from_secs(3)));
        check(3700, Step::Renew);
        check(7199, Step::Renew);
        check(7200, Step::RenewEnded);
        assert_eq!(plan(None, Duration::ZERO, None, from), Step::Enrol);
    }

    #[test]
    fn a_renewal_that_is_asked_for_comes_before_half_of_the_life_and_never_after() {
        let dates = Some((Timestamp::from_secs(0), Timestamp::from_secs(7200)));
        let at = |asked, now| plan(dates, HOUR / 60, Some(Timestamp::from_secs(asked)), Timestamp::from_secs(now));
        assert_eq!(at(1000, 997), Step::Wait(Duration::from_secs(3)));
        assert_eq!(at(1000, 1000), Step::Renew);
        assert_eq!(at(7000, 3660), Step::Renew, "half of its life counts as well");
        assert_eq!(at(1000, 7200), Step::RenewEnded);
    }

    #[test]
    fn a_clock_that_jumps_a_day_neither_throws_a_certificate_away_nor_asks_for_a_token() {
        let day = 86_400;
        let (from, until) = (Timestamp::from_secs(10 * day - 300), Timestamp::from_secs(11 * day));
        let at = |now| plan(Some((from, until)), Duration::ZERO, None, Timestamp::from_secs(now));
        let now = 10 * day + 3600;
        assert_eq!(at(now), Step::Wait(LOOK_AT_CLOCK));
        assert_eq!(at(now - day), Step::RenewNotYet, "a day back: the collector says whose clock is wrong");
        assert_eq!(at(now + day), Step::RenewEnded, "a day ahead: renewed with its own key, no token needed");
        assert_eq!(at(now), Step::Wait(LOOK_AT_CLOCK), "and back: nothing was lost");
    }

    #[test]
    fn what_was_made_just_now_and_does_not_hold_is_the_clock() {
        let identity = Ca::new("td").identity("shop/web");
        let now = Timestamp::now();
        assert!(judge_clock(&identity, now).is_ok());
        for wrong in [now.plus(HOUR * 24), now.minus(HOUR * 24)] {
            let error = judge_clock(&identity, wrong).unwrap_err().to_string();
            assert!(error.starts_with("clock: ") && error.contains("set the clock right"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_certificate_of_a_root_on_its_way_out_is_renewed_when_the_directive_says_so() {
        let (ca, next) = (Arc::new(Ca::new("td")), Ca::new("td"));
        let nobody = HostPort { host: "127.0.0.1".into(), port: 1 };
        let mut world = World::new(ca.clone(), nobody, Some(ca.issue("shop/web")));
        assert!(matches!(world.keeper.next_step(), Step::Wait(_)));
        let roots = vec![tls::spki_of(&ca.root).unwrap()];
        let bundle = vec![Der(ca.root.to_vec()), Der(next.root.to_vec())];
        let directive = |version, renew| Directive {
            version,
            trust_domain: "td".parse().unwrap(),
            issued_us: Timestamp::now(),
            bundle: bundle.clone(),
            deny: Vec::new(),
            revoked: Vec::new(),
            foreign: Default::default(),
            renew,
            quarantined: Vec::new(),
            released: Vec::new(),
            policy: None,
        };
        let asks = directive(1, Renew { roots: roots.clone(), within_secs: 0 });
        world.keeper.take_directive(&Signed::sign(&asks, &ca.collector()).unwrap().to_bytes());
        assert_eq!(world.keeper.next_step(), Step::Renew);

        // The next directive is signed under the new root, and still counts after a restart.
        let newer = directive(2, Renew { roots, within_secs: 0 });
        world.keeper.take_directive(&Signed::sign(&newer, &next.collector()).unwrap().to_bytes());
        let (mut keeper, current) = restarted(world.keeper).await;
        assert_eq!(current.borrow().as_ref().unwrap().directive_version(), 2);
        assert_eq!(keeper.next_step(), Step::Renew);

        // A collector that goes on issuing by the old root is not asked again at once.
        let (key, answer) = renewed(&ca);
        keeper.adopt(&key, answer, None).await.unwrap();
        assert!(matches!(keeper.next_step(), Step::Wait(_)));
        assert!(keeper.asked.is_some_and(|at| at > Timestamp::now().plus(Duration::from_secs(30))));
        let (key, answer) = renewed(&next);
        keeper.adopt(&key, answer, None).await.unwrap();
        assert_eq!(keeper.asked, None);
    }

    /// Another CA of the domain may vouch for peers; whoever was enrolled takes no directive from it, and no other name.
    #[tokio::test]
    async fn an_enrolled_agent_takes_the_word_of_its_own_ca_alone_and_stays_who_it_is() {
        let (ca, other) = (Arc::new(Ca::new("td")), Ca::new("td"));
        let nobody = HostPort { host: "127.0.0.1".into(), port: 1 };
        let mut world = World::new(ca.clone(), nobody.clone(), Some(ca.issue("shop/web")));
        let signed = ca.directive(1, vec![], Timestamp::now());
        let domains = [("td".parse().unwrap(), vec![Der(other.root.to_vec())])].into();
        let foreign = sidewarden_proto::directive::ForeignRoots { domains, dns: vec![] };
        let told = Directive { foreign, ..signed.as_kept().unwrap() };
        world.keeper.take_directive(&Signed::sign(&told, &ca.collector()).unwrap().to_bytes());
        let identity = world.current.borrow().clone().unwrap();
        assert_eq!((identity.directive_version(), identity.trust.domains[&"td".parse().unwrap()].len()), (1, 2));
        let forged = Directive { version: 2, ..told };
        world.keeper.take_directive(&Signed::sign(&forged, &other.collector()).unwrap().to_bytes());
        assert_eq!(world.current.borrow().as_ref().unwrap().directive_version(), 1);
        assert_eq!(world.keeper.root_pins(), [tls::spki_of(&ca.root).unwrap()]);

        let mut world = World::new(ca.clone(), nobody, Some(ca.issue("shop/db")));
        let (key, answer) = renewed(&ca);
        let refused = world.keeper.adopt_next(&key, answer).await.unwrap_err().to_string();
        assert!(refused.contains("another workload"), "{refused}");
    }

    fn renewed(ca: &Ca) -> (Vec<u8>, wire::Issued) {
        let key = enrol::new_key().unwrap();
        let csr = enrol::certificate_request(&key).unwrap();
        (key.serialize_der(), ca.sign_request("shop/web", &csr.0))
    }

    /// A collector's enrolment port that answers as told, one answer a request.
    async fn enrolment_port(ca: &Arc<Ca>, answers: Vec<Option<Refused>>) -> (HostPort, Arc<Mutex<Vec<Request>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked: Arc<Mutex<Vec<Request>>> = Arc::default();
        let alpn = &[sidewarden_proto::wire::ALPN_ENROL];
        let tls = tls::server_config_without_client(&ca.collector(), Floor::Tls13, alpn).unwrap();
        let (ca, heard) = (ca.clone(), asked.clone());
        tokio::spawn(async move {
            for answer in answers {
                let (tcp, _) = listener.accept().await.unwrap();
                let Ok(mut stream) = tokio_rustls::TlsAcceptor::from(tls.clone()).accept(tcp).await else { continue };
                let mut prefix = [0; 4];
                stream.read_exact(&mut prefix).await.unwrap();
                let mut payload = vec![0; wire::message_length(prefix).unwrap()];
                stream.read_exact(&mut payload).await.unwrap();
                let request: Request = wire::from_payload(&payload).unwrap();
                let answer = match answer {
                    Some(refused) => Answer::Refused(refused),
                    None => Answer::Issued(ca.sign_request("shop/web", &request.csr.0)),
                };
                heard.lock().unwrap().push(request);
                stream.write_all(&wire::to_message(&answer)).await.unwrap();
                stream.shutdown().await.unwrap();
            }
        });
        (HostPort { host: "127.0.0.1".into(), port: address.port() }, asked)
    }

    struct World {
        ca: Arc<Ca>,
        dir: tempfile::TempDir,
        events: Arc<Mutex<Vec<Event>>>,
        renewal_requests: mpsc::Receiver<Renewal>,
        keeper: Keeper,
        current: Current,
    }

    impl World {
        fn new(ca: Arc<Ca>, collector: HostPort, kept: Option<Issued>) -> World {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(dir.path()).unwrap();
            if let Some(issued) = kept {
                store.save(&issued).unwrap();
            }
            let token_file = Some(dir.path().join("token"));
            let events: Arc<Mutex<Vec<Event>>> = Arc::default();
            let told = events.clone();
            let (renewals, renewal_requests) = mpsc::channel(1);
            let instance = "c1".parse().unwrap();
            let parts = Parts {
                source: Source {
                    collectors: vec![collector],
                    token_file,
                    workload: None,
                    instance,
                    elsewhere: None,
                    foreign: ForeignFiles::default(),
                },
                resolver: Resolver::from_system(),
                terms: Terms::default(),
                emit: Arc::new(move |event| told.lock().unwrap().push(event)),
                random: sidewarden_proto::backoff::random,
                renewals,
            };
            let (keeper, current) = Keeper::load(store, parts).unwrap();
            World { ca, dir, events, renewal_requests, keeper, current }
        }

        fn token_path(&self) -> PathBuf {
            self.dir.path().join("token")
        }

        fn put_token(&self, pin: Sha256) {
            let token = Token::new(sidewarden_proto::backoff::random, pin);
            std::fs::write(self.token_path(), token.text().reveal()).unwrap();
        }

        fn pin(&self) -> Sha256 {
            tls::spki_of(&self.ca.root).unwrap()
        }

        fn workload(&self) -> Option<String> {
            self.current.borrow().as_ref().map(|identity| identity.workload.to_string())
        }

        fn serial(&self) -> String {
            self.current.borrow().as_ref().unwrap().credential.peer().serial.clone()
        }
    }

    fn refused(reason: &str, retry: bool) -> Option<Refused> {
        Some(Refused { reason: reason.into(), detail: String::new(), retry })
    }

    #[tokio::test]
    async fn a_token_makes_an_identity_that_is_kept_and_the_token_is_gone() {
        let ca = Arc::new(Ca::new("td"));
        let (collector, asked) = enrolment_port(&ca, vec![None]).await;
        let mut world = World::new(ca, collector, None);
        world.put_token(world.pin());
        world.keeper.act(Step::Enrol).await.unwrap();
        assert_eq!(world.workload().as_deref(), Some("spiffe://td/shop/web"));
        assert!(!world.token_path().exists());
        let kept = world.keeper.store.load().unwrap().unwrap().check().unwrap();
        assert_eq!(kept.credential.peer().serial, world.serial());
        assert_eq!(asked.lock().unwrap()[0].instance.as_str(), "c1");
    }

    #[tokio::test]
    async fn whoever_enrols_goes_by_the_directive_that_is_kept_if_it_is_its_own_cas() {
        let (ca, before, now) = (Arc::new(Ca::new("td")), Ca::new("td"), Timestamp::now());
        for (kept_by, in_force) in [(&*ca, 9), (&before, 3)] {
            let (collector, _) = enrolment_port(&ca, vec![None]).await;
            let mut world = World::new(ca.clone(), collector, None);
            let kept = kept_by.directive(9, vec![], now);
            world.keeper.store.save_directive(&kept, std::slice::from_ref(&kept_by.root), now).unwrap();
            world.put_token(world.pin());
            world.keeper.act(Step::Enrol).await.unwrap();
            world.keeper.take_directive(&ca.directive(3, vec![], now).to_bytes());
            assert_eq!(world.current.borrow().as_ref().unwrap().directive_version(), in_force);
        }
    }

    #[tokio::test]
    async fn a_refused_token_is_not_tried_again_and_another_one_is() {
        let ca = Arc::new(Ca::new("td"));
        let (collector, asked) = enrolment_port(&ca, vec![refused("token_used_up", false), None]).await;
        let mut world = World::new(ca, collector, None);
        world.put_token(world.pin());
        let error = world.keeper.act(Step::Enrol).await.unwrap_err().to_string();
        assert!(
            error.contains("the token is used up; make a new one with `sidewarden-collector token create"),
            "{error}"
        );
        assert!(matches!(world.keeper.act(Step::Enrol).await, Err(KeeperError::SameToken(_))));
        assert_eq!(asked.lock().unwrap().len(), 1);
        world.put_token(world.pin());
        world.keeper.act(Step::Enrol).await.unwrap();
        assert!(world.workload().is_some());
    }

    #[tokio::test]
    async fn a_request_whose_answer_was_lost_is_repeated_with_the_same_key() {
        let ca = Arc::new(Ca::new("td"));
        let (collector, asked) = enrolment_port(&ca, vec![refused("internal", true), None]).await;
        let mut world = World::new(ca, collector, None);
        world.put_token(world.pin());
        assert!(world.keeper.act(Step::Enrol).await.is_err());
        world.keeper.act(Step::Enrol).await.unwrap();
        let key = |request: &Request| {
            rcgen::CertificateSigningRequestParams::from_der(&request.csr.0.clone().into()).unwrap().public_key
        };
        let asked = asked.lock().unwrap();
        assert!(key(&asked[0]) == key(&asked[1]));
    }

    #[tokio::test]
    async fn another_collector_than_the_pinned_one_gets_no_token() {
        let ca = Arc::new(Ca::new("td"));
        let (collector, asked) = enrolment_port(&ca, vec![None]).await;
        let mut world = World::new(ca, collector, None);
        world.put_token(Sha256([7; 32]));
        let error = world.keeper.act(Step::Enrol).await.unwrap_err().to_string();
        assert!(error.contains("not the pinned one"), "{error}");
        assert!(asked.lock().unwrap().is_empty() && world.token_path().exists());
    }

    #[tokio::test]
    async fn what_is_wrong_with_a_token_file_is_said() {
        let ca = Arc::new(Ca::new("td"));
        let mut world = World::new(ca, HostPort { host: "127.0.0.1".into(), port: 1 }, None);
        let missing = world.keeper.act(Step::Enrol).await.unwrap_err().to_string();
        assert!(missing.contains("there is no identity and no token at"), "{missing}");
        std::fs::write(world.token_path(), "my-secret").unwrap();
        let bad = world.keeper.act(Step::Enrol).await.unwrap_err().to_string();
        assert!(bad.contains("no enrolment token") && !bad.contains("my-secret"), "{bad}");
    }

    #[tokio::test]
    async fn a_renewal_over_the_session_has_a_new_key_and_is_told() {
        let ca = Arc::new(Ca::new("td"));
        let kept = ca.issue("shop/web");
        let mut world = World::new(ca.clone(), HostPort { host: "127.0.0.1".into(), port: 1 }, Some(kept));
        let before = world.current.borrow().clone().unwrap();
        let mut requests = std::mem::replace(&mut world.renewal_requests, mpsc::channel(1).1);
        let answering = tokio::spawn(async move {
            let renewal = requests.recv().await.unwrap();
            let answer = Answer::Issued(ca.sign_request("shop/web", &renewal.csr));
            renewal.answer.send(wire::to_message(&answer)[4..].to_vec()).unwrap();
        });
        world.keeper.act(Step::Renew).await.unwrap();
        answering.await.unwrap();
        let after = world.current.borrow().clone().unwrap();
        assert_ne!(before.credential.peer().spki, after.credential.peer().spki);
        assert_eq!(world.events.lock().unwrap()[0].kind, "identity.renewed");
    }

    #[tokio::test]
    async fn a_renewal_that_a_directive_interrupts_goes_on_with_the_same_request() {
        let ca = Arc::new(Ca::new("td"));
        let kept = ca.issue("shop/web");
        let mut world = World::new(ca.clone(), HostPort { host: "127.0.0.1".into(), port: 1 }, Some(kept));
        let before = world.serial();
        let mut requests = std::mem::replace(&mut world.renewal_requests, mpsc::channel(1).1);
        // Cancelled while it waits, as by a directive.
        assert!(timeout(Duration::from_millis(50), world.keeper.act(Step::Renew)).await.is_err());
        let renewal = requests.recv().await.unwrap();
        let answer = Answer::Issued(ca.sign_request("shop/web", &renewal.csr));
        renewal.answer.send(wire::to_message(&answer)[4..].to_vec()).unwrap();
        world.keeper.act(Step::Renew).await.unwrap();
        assert_ne!(world.serial(), before);
        assert!(requests.try_recv().is_err(), "there is no second request");
    }

    #[tokio::test(start_paused = true)]
    async fn trust_files_are_looked_at_while_a_renewal_waits_for_its_collector() {
        let (ca, partner) = (Arc::new(Ca::new("td")), Ca::new("partner.example"));
        let nobody = HostPort { host: "127.0.0.1".into(), port: 1 };
        let mut world = World::new(ca.clone(), nobody, Some(ca.issue("shop/web")));
        let bundles = world.dir.path().join("bundles");
        std::fs::create_dir(&bundles).unwrap();
        std::fs::write(bundles.join("partner.example.pem"), made_up::pem("CERTIFICATE", &partner.root)).unwrap();
        world.keeper.parts.source.foreign = ForeignFiles { bundles: Some(bundles), ..ForeignFiles::default() };
        assert!(timeout(Duration::from_secs(5), world.keeper.act(Step::Renew)).await.is_err());
        assert_eq!(world.current.borrow().as_ref().unwrap().trust.domains.len(), 2);
        assert!(world.events.lock().unwrap().iter().any(|event| event.kind == "trust.changed"));
    }

    /// A disk that takes nothing: what it writes to is a directory.
    fn fill_disk(world: &World) -> PathBuf {
        let in_the_way = world.dir.path().join("identity.new");
        std::fs::create_dir(&in_the_way).unwrap();
        in_the_way
    }

    #[tokio::test]
    async fn a_certificate_that_cannot_be_kept_waits_for_the_disk_and_is_asked_for_once() {
        let ca = Arc::new(Ca::new("td"));
        let nobody = HostPort { host: "127.0.0.1".into(), port: 1 };
        let mut world = World::new(ca.clone(), nobody, Some(ca.issue("shop/web")));
        let (before, in_the_way) = (world.serial(), fill_disk(&world));
        let (key, answer) = renewed(&ca);
        let error = world.keeper.adopt(&key, answer, None).await.unwrap_err().to_string();
        assert!(error.contains("identity.json"), "{error}");
        assert_eq!((world.serial(), world.keeper.next_step()), (before.clone(), Step::Keep));
        std::fs::remove_dir(in_the_way).unwrap();

        // A directive interrupts while the disk stalls.
        let stalled = world.keeper.store.stall();
        assert!(timeout(Duration::from_millis(50), world.keeper.act(Step::Keep)).await.is_err());
        assert_eq!((world.serial(), world.keeper.next_step()), (before.clone(), Step::Keep));
        drop(stalled);
        world.keeper.act(Step::Keep).await.unwrap();
        assert_ne!(world.serial(), before);
        let kept = world.keeper.store.load().unwrap().unwrap().check().unwrap();
        assert_eq!(kept.credential.peer().serial, world.serial());
        assert!(matches!(world.keeper.next_step(), Step::Wait(_)));
    }

    #[tokio::test]
    async fn a_certificate_about_to_end_is_replaced_though_the_new_one_cannot_be_kept() {
        let ca = Arc::new(Ca::new("td"));
        let nobody = HostPort { host: "127.0.0.1".into(), port: 1 };
        let mut params = ca.params("shop/web");
        let now = Timestamp::now();
        validity(&mut params, now.minus(HOUR * 4), now.plus(HOUR));
        let mut world = World::new(ca.clone(), nobody, Some(ca.issue_with(&params)));
        let (before, _) = (world.serial(), fill_disk(&world));
        let (key, answer) = renewed(&ca);
        world.keeper.adopt(&key, answer, None).await.unwrap();
        assert_ne!(world.serial(), before);
        let events = world.events.lock().unwrap();
        let told: Vec<_> = events.iter().map(|event| (event.kind.as_ref(), event.summary.contains("token"))).collect();
        assert_eq!(told, [("identity.renewed", false), ("identity.renewal_failed", true)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_renewal_leaves_what_holds_and_is_told_once() {
        let ca = Arc::new(Ca::new("td"));
        let kept = ca.issue("shop/web");
        let mut world = World::new(ca, HostPort { host: "127.0.0.1".into(), port: 1 }, Some(kept));
        let before = world.serial();
        for _ in 0..2 {
            let error = world.keeper.act(Step::Renew).await.unwrap_err();
            world.keeper.tell_failure(&error, HOUR);
        }
        assert_eq!(world.serial(), before);
        let events = world.events.lock().unwrap();
        assert_eq!(
            events.iter().map(|e| e.kind.as_ref()).collect::<Vec<_>>(),
            ["trust.changed", "identity.renewal_failed"]
        );
    }

    #[tokio::test]
    async fn an_ended_certificate_is_renewed_with_its_own_key_and_without_a_token() {
        let ca = Arc::new(Ca::new("td"));
        let (collector, asked) = enrolment_port(&ca, vec![None]).await;
        let now = Timestamp::now();
        let mut params = ca.params("shop/web");
        validity(&mut params, now.minus(HOUR * 2), now.minus(HOUR));
        let mut world = World::new(ca.clone(), collector, Some(ca.issue_with(&params)));
        let before = world.current.borrow().clone().unwrap();
        assert!(before.usable(now).is_err());
        world.keeper.act(plan(world.keeper.dates(), Duration::ZERO, None, now)).await.unwrap();
        let after = world.current.borrow().clone().unwrap();
        assert_eq!(before.credential.peer().spki, after.credential.peer().spki);
        assert!(after.usable(now).is_ok());
        let request = asked.lock().unwrap()[0].clone();
        assert!(request.token_id.is_empty() && request.previous[0] == Der(before.credential.chain()[0].to_vec()));
    }

    #[tokio::test]
    async fn what_was_issued_for_another_key_or_another_time_is_not_taken() {
        let ca = Arc::new(Ca::new("td"));
        let world = World::new(ca.clone(), HostPort { host: "127.0.0.1".into(), port: 1 }, None);
        let mut keeper = world.keeper;
        let (ours, other) = (enrol::new_key().unwrap(), enrol::new_key().unwrap());
        let foreign = ca.sign_request("shop/web", &enrol::certificate_request(&other).unwrap().0);
        let error = keeper.adopt(&ours.serialize_der(), foreign, None).await.unwrap_err().to_string();
        assert!(error.contains("does not belong"), "{error}");
        assert!(world.current.borrow().is_none() && keeper.store.load().unwrap().is_none());
    }

    #[test]
    fn an_identity_of_another_trust_domain_comes_without_the_old_domains_directive() {
        let (dir, a, b) = (tempfile::tempdir().unwrap(), Ca::new("a"), Ca::new("b"));
        let mut world = OverFiles::new(made_up::write(dir.path(), &a, "shop/web"));
        world.keeper.take_directive(&a.directive(9, vec![], Timestamp::now()).to_bytes());
        let version = |world: &OverFiles| world.current.borrow().as_ref().unwrap().directive_version();
        assert_eq!(version(&world), 9);
        made_up::write(dir.path(), &b, "shop/web");
        world.look().unwrap();
        world.look().unwrap();
        assert_eq!((world.workload().as_deref(), version(&world)), (Some("spiffe://b/shop/web"), 0));
        world.keeper.take_directive(&b.directive(3, vec![], Timestamp::now()).to_bytes());
        assert_eq!(version(&world), 3, "its collector counts anew");
    }

    #[tokio::test]
    async fn whoever_enrols_into_another_trust_domain_leaves_the_old_domains_directive_behind() {
        let (a, b) = (Arc::new(Ca::new("a")), Ca::new("b"));
        let nobody = HostPort { host: "127.0.0.1".into(), port: 1 };
        let mut world = World::new(a.clone(), nobody, Some(a.issue("shop/web")));
        world.keeper.take_directive(&a.directive(9, vec![], Timestamp::now()).to_bytes());
        let (key, answer) = renewed(&b);
        world.keeper.adopt(&key, answer, None).await.unwrap();
        world.keeper.take_directive(&b.directive(3, vec![], Timestamp::now()).to_bytes());
        assert_eq!(world.current.borrow().as_ref().unwrap().directive_version(), 3);
    }

    /// A keeper over files, and its looks one after the other.
    struct OverFiles {
        keeper: Keeper,
        current: Current,
        events: Arc<Mutex<Vec<Event>>>,
    }

    impl OverFiles {
        fn new(files: Files) -> OverFiles {
            let World { keeper, events, .. } =
                World::new(Arc::new(Ca::new("td")), HostPort { host: "127.0.0.1".into(), port: 1 }, None);
            let source = Source { elsewhere: Some(Elsewhere::Files(files)), ..keeper.parts.source.clone() };
            let (keeper, current) = Keeper::load(keeper.store, Parts { source, ..keeper.parts }).unwrap();
            OverFiles { keeper, current, events }
        }

        fn workload(&self) -> Option<String> {
            self.current.borrow().as_ref().map(|identity| identity.workload.to_string())
        }

        /// As `run` does once a second.
        fn look(&mut self) -> Result<(), String> {
            let looked = self.keeper.look_at_files();
            if let Err(error) = &looked {
                self.keeper.tell_failure(error, LOOK_AT_FILES);
            }
            looked.map_err(|error| error.to_string())
        }

        fn kinds(&self) -> Vec<String> {
            self.events.lock().unwrap().iter().map(|event| event.kind.to_string()).collect()
        }
    }

    #[test]
    fn an_identity_in_files_is_taken_when_it_stands_still_and_the_last_good_one_is_kept() {
        let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("td"));
        let files = made_up::write(dir.path(), &ca, "shop/web");
        let mut world = OverFiles::new(files.clone());
        assert_eq!(world.workload().as_deref(), Some("spiffe://td/shop/web"));
        assert_eq!(world.keeper.next_step(), Step::LookAtFiles);

        // The key is written first, and the certificate a look later.
        let other = tempfile::tempdir().unwrap();
        let newer = made_up::write(other.path(), &ca, "shop/orders");
        std::fs::copy(&newer.key, &files.key).unwrap();
        world.look().unwrap();
        std::fs::copy(&newer.cert, &files.cert).unwrap();
        std::fs::copy(&newer.roots, &files.roots).unwrap();
        world.look().unwrap();
        assert_eq!(world.workload().as_deref(), Some("spiffe://td/shop/web"), "it has just moved");
        world.look().unwrap();
        assert_eq!(world.workload().as_deref(), Some("spiffe://td/shop/orders"));
        assert_eq!(world.kinds(), ["identity.renewed"]);

        std::fs::write(&files.cert, "").unwrap();
        world.look().unwrap();
        assert!(world.look().unwrap_err().contains("tls.crt"));
        assert!(world.look().is_err());
        assert_eq!(world.workload().as_deref(), Some("spiffe://td/shop/orders"), "what holds is kept");
        assert_eq!(world.kinds(), ["identity.renewed", "identity.renewal_failed"], "told once");
        std::fs::copy(&newer.cert, &files.cert).unwrap();
        world.look().unwrap();
        world.look().unwrap();
    }

    #[test]
    fn trust_files_are_taken_when_they_stand_still_and_what_was_read_before_is_kept() {
        let (dir, ca, partner) = (tempfile::tempdir().unwrap(), Ca::new("td"), Ca::new("partner.example"));
        let files = made_up::write(dir.path(), &ca, "shop/web");
        let (bundles, crls) = (dir.path().join("bundles"), dir.path().join("crls"));
        std::fs::create_dir(&bundles).unwrap();
        std::fs::create_dir(&crls).unwrap();
        let mut world = OverFiles::new(files);
        world.keeper.parts.source.foreign =
            ForeignFiles { bundles: Some(bundles.clone()), crls: Some(crls.clone()), ..ForeignFiles::default() };
        let domains = |world: &OverFiles| world.current.borrow().as_ref().unwrap().trust.domains.len();
        let look = |world: &mut OverFiles| {
            world.keeper.look_at_foreign();
            world.keeper.looked_at_crls = None;
            world.keeper.tell_trust();
        };
        world.keeper.tell_trust();
        std::fs::write(bundles.join("partner.example.pem"), made_up::pem("CERTIFICATE", &partner.root)).unwrap();
        look(&mut world);
        assert_eq!(domains(&world), 1, "it has just moved");
        look(&mut world);
        assert_eq!(domains(&world), 2);
        assert_eq!(world.kinds(), ["trust.changed", "trust.crls", "trust.changed"], "a list is lacking");

        let newer = partner.list_until(&[vec![7]], 9, Timestamp::now().plus(HOUR));
        std::fs::write(crls.join("partner.crl"), &newer).unwrap();
        look(&mut world);
        look(&mut world);
        let held = || world.current.borrow().as_ref().unwrap().trust.revocation.clone().unwrap();
        assert_eq!((held().lists.len(), held().strict), (1, true));
        let before = held();
        for wrong in [&b"broken"[..], b"", &partner.list_until(&[], 8, Timestamp::now().plus(HOUR))] {
            std::fs::write(crls.join("partner.crl"), wrong).unwrap();
            look(&mut world);
            look(&mut world);
            look(&mut world);
            assert_eq!(world.current.borrow().as_ref().unwrap().trust.revocation.as_ref(), Some(&before));
        }
        let kinds = world.kinds();
        let refused = kinds.iter().filter(|kind| *kind == "trust.files_refused").count();
        assert_eq!(refused, 2, "no list, and an older one, each once: {kinds:?}");
        std::fs::write(crls.join("partner.crl"), &newer).unwrap();
        look(&mut world);
        look(&mut world);
        assert_eq!(world.kinds().last().unwrap(), "trust.changed", "which ends the alert");
    }

    #[test]
    fn trust_files_that_change_while_they_are_read_at_the_start_are_read_again() {
        let (dir, ca, partner) = (tempfile::tempdir().unwrap(), Ca::new("td"), Ca::new("partner.example"));
        let OverFiles { keeper, .. } = OverFiles::new(made_up::write(dir.path(), &ca, "shop/web"));
        let (bundles, dns) = (dir.path().join("bundles"), dir.path().join("dns.pem"));
        std::fs::create_dir(&bundles).unwrap();
        let foreign =
            ForeignFiles { bundles: Some(bundles.clone()), dns_roots: Some(dns.clone()), ..Default::default() };
        let root = made_up::pem("CERTIFICATE", &partner.root);
        assert!(std::process::Command::new("mkfifo").arg(&dns).status().unwrap().success());
        let writing = std::thread::spawn(move || {
            // Until it is read, and the bundles were.
            let mut pipe = std::fs::OpenOptions::new().write(true).open(&dns).unwrap();
            std::fs::write(bundles.join("partner.example.pem"), &root).unwrap();
            std::fs::write(bundles.join("dns"), &root).unwrap();
            std::fs::rename(bundles.join("dns"), dns).unwrap();
            std::io::Write::write_all(&mut pipe, root.as_bytes()).unwrap();
        });
        let source = Source { foreign, ..keeper.parts.source.clone() };
        let (mut keeper, current) = Keeper::load(keeper.store, Parts { source, ..keeper.parts }).unwrap();
        writing.join().unwrap();
        let domains = || current.borrow().as_ref().unwrap().trust.domains.len();
        assert_eq!(domains(), 1);
        keeper.look_at_foreign();
        keeper.look_at_foreign();
        assert_eq!(domains(), 2);
    }

    /// A keeper over files that trusts others by the bundles in a folder.
    fn with_bundles(dir: &std::path::Path, ca: &Ca) -> (OverFiles, PathBuf) {
        let bundles = dir.join("bundles");
        std::fs::create_dir(dir.join("good")).unwrap();
        std::os::unix::fs::symlink(dir.join("good"), &bundles).unwrap();
        let OverFiles { keeper, events, .. } = OverFiles::new(made_up::write(dir, ca, "shop/web"));
        let foreign = ForeignFiles { bundles: Some(bundles.clone()), ..ForeignFiles::default() };
        let source = Source { foreign, ..keeper.parts.source.clone() };
        let (mut keeper, current) = Keeper::load(keeper.store, Parts { source, ..keeper.parts }).unwrap();
        keeper.tell_trust();
        (OverFiles { keeper, current, events }, bundles)
    }

    fn look_at_trust(world: &mut OverFiles) {
        for _ in 0..3 {
            world.keeper.look_at_foreign();
            world.keeper.tell_trust();
        }
    }

    #[test]
    fn trust_files_that_are_still_broken_are_told_again_after_a_change_that_ends_the_alert() {
        let (dir, ca, partner) = (tempfile::tempdir().unwrap(), Ca::new("td"), Ca::new("partner.example"));
        let (mut world, bundles) = with_bundles(dir.path(), &ca);
        std::fs::write(bundles.join("broken.example.pem"), "").unwrap();
        look_at_trust(&mut world);
        let domains = [("partner.example".parse().unwrap(), vec![Der(partner.root.to_vec())])].into();
        let foreign = sidewarden_proto::directive::ForeignRoots { domains, dns: vec![] };
        let told = ca.directive(1, vec![], Timestamp::now()).as_kept().unwrap();
        let directive = Signed::sign(&Directive { foreign, ..told }, &ca.collector()).unwrap();
        world.keeper.take_directive(&directive.to_bytes());
        world.keeper.tell_trust();
        look_at_trust(&mut world);
        assert_eq!(world.kinds(), ["trust.changed", "trust.files_refused", "trust.changed", "trust.files_refused"]);
    }

    #[test]
    fn trust_files_that_are_again_those_that_were_taken_end_the_alert() {
        let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("td"));
        let (mut world, bundles) = with_bundles(dir.path(), &ca);
        std::fs::rename(&bundles, dir.path().join("away")).unwrap();
        look_at_trust(&mut world);
        std::fs::rename(dir.path().join("away"), &bundles).unwrap();
        look_at_trust(&mut world);
        assert_eq!(world.kinds(), ["trust.changed", "trust.files_refused", "trust.changed"]);
    }

    #[test]
    fn an_identity_that_is_again_the_one_in_use_ends_the_alert() {
        let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("td"));
        let (good, bad, live) = (dir.path().join("good"), dir.path().join("bad"), dir.path().join("live"));
        let point_at = |at: &PathBuf| {
            let _ = std::fs::remove_file(&live);
            std::os::unix::fs::symlink(at, &live).unwrap();
        };
        std::fs::create_dir(&good).unwrap();
        point_at(&good);
        let mut world = OverFiles::new(made_up::write(&live, &ca, "shop/web"));
        point_at(&bad);
        world.look().unwrap();
        assert!(world.look().is_err());
        point_at(&good);
        world.look().unwrap();
        assert_eq!(world.kinds(), ["identity.renewal_failed"], "they have just moved");
        world.look().unwrap();
        world.look().unwrap();
        assert_eq!(world.kinds(), ["identity.renewal_failed", "identity.renewed"]);
    }

    #[test]
    fn files_that_come_late_are_waited_for() {
        let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("td"));
        let files = made_up::write(dir.path(), &ca, "shop/web");
        let away = dir.path().join("away");
        std::fs::rename(&files.cert, &away).unwrap();
        let mut world = OverFiles::new(files.clone());
        assert_eq!(world.workload(), None);
        assert!(world.keeper.trouble().borrow().as_ref().unwrap().contains("tls.crt"));
        std::fs::rename(&away, &files.cert).unwrap();
        world.look().unwrap();
        world.look().unwrap();
        assert_eq!(world.workload().as_deref(), Some("spiffe://td/shop/web"));
    }

    #[test]
    fn a_certificate_in_a_file_that_nobody_replaces_is_told_before_it_ends() {
        let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("td"));
        let files = made_up::write(dir.path(), &ca, "shop/web");
        let mut world = OverFiles::new(files);
        world.look().unwrap();
        let mut params = ca.params("shop/web");
        let now = Timestamp::now();
        validity(&mut params, now.minus(HOUR * 4), now.plus(HOUR));
        world.keeper.held = Some(ca.issue_with(&params).check().unwrap());
        world.keeper.publish_current().unwrap();
        assert!(world.look().unwrap_err().contains("nobody has given us a newer certificate"));
        assert_eq!(world.kinds(), ["identity.renewal_failed"]);
    }

    #[tokio::test]
    async fn directives_count_only_when_proven_and_newer() {
        let ca = Arc::new(Ca::new("td"));
        let kept = ca.issue("shop/web");
        let mut world = World::new(ca.clone(), HostPort { host: "127.0.0.1".into(), port: 1 }, Some(kept));
        let version = |world: &World| world.current.borrow().as_ref().unwrap().directive_version();
        let deny = |why: &str| vec![Deny::Key { spki: Sha256([1; 32]), why: why.into() }];
        let now = Timestamp::now();
        for (bytes, expected) in [
            (ca.directive(2, deny("a"), now).to_bytes(), 2),
            (ca.directive(1, deny("older"), now).to_bytes(), 2),
            (Ca::new("td").directive(9, deny("foreign"), now).to_bytes(), 2),
            (b"garbage".to_vec(), 2),
            (ca.directive(3, deny("newer"), now).to_bytes(), 3),
        ] {
            world.keeper.take_directive(&bytes);
            assert_eq!(version(&world), expected);
        }
        let (_, current) = restarted(world.keeper).await;
        assert_eq!(current.borrow().as_ref().unwrap().directive_version(), 3, "it is there after a restart");
    }

    #[tokio::test]
    async fn a_directive_is_in_force_though_the_one_before_still_waits_for_the_disk() {
        let ca = Arc::new(Ca::new("td"));
        let nobody = HostPort { host: "127.0.0.1".into(), port: 1 };
        let World { dir, keeper, mut current, .. } = World::new(ca.clone(), nobody, Some(ca.issue("shop/web")));
        let (store, parts) = (keeper.store.clone(), keeper.parts.clone());
        let stalled = store.stall();
        let (directives, incoming) = watch::channel(Vec::new());
        let stop = CancellationToken::new();
        let running = tokio::spawn(keeper.run(incoming, stop.clone()));
        for version in [2, 3, 4] {
            directives.send_replace(ca.directive(version, vec![], Timestamp::now()).to_bytes());
            let in_force = current.wait_for(|now| now.as_ref().is_some_and(|now| now.directive_version() == version));
            assert!(timeout(HOUR / 360, in_force).await.is_ok(), "version {version}");
        }
        drop(stalled);
        stop.cancel();
        running.await.unwrap();
        let (_, current) = Keeper::load(store, parts).unwrap();
        assert_eq!(current.borrow().as_ref().unwrap().directive_version(), 4, "the newest is what is kept");
        drop(dir);
    }

    /// After all that waits for the disk was written.
    async fn restarted(keeper: Keeper) -> (Keeper, Current) {
        let Keeper { store, parts, to_keep, .. } = keeper;
        let newest = to_keep.subscribe();
        drop(to_keep);
        keep_directives(store.clone(), newest).await;
        Keeper::load(store, parts).unwrap()
    }
}
