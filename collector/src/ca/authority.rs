//! The CA that issues now, the roots that are trusted, and the collector's own certificate.
//!
//! What lies on disk, and how, is `generation`'s; the order of a rotation is `rotate`'s. The collector's own key is made
//! at each start and kept in memory only.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use rcgen::{KeyPair, PublicKeyData};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sidewarden_proto::directive::Directive;
use sidewarden_proto::enrol::Der;
use sidewarden_proto::identity::{Peer, Sha256, SpiffeId, TrustDomain};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{self, Credential, Trust};
use tokio::sync::watch;

use super::generation::{self, Generation};
use super::issue::read_request;
use super::rotate::{self, Entry, Stage, Step};
use super::{CaError, Vault, certificates, files, member};

/// What does not change while a collector runs.
#[derive(Clone, Debug)]
pub struct Terms {
    /// The trust domain.
    pub domain: TrustDomain,
    /// DNS names and addresses that the collector's own certificate bears besides its SPIFFE ID.
    pub names: Vec<String>,
    /// Life of the collector's own certificate. Agents verify directives with it, so it must outlast what an agent may
    /// be out of touch; it is renewed at half of it.
    pub own_life: Duration,
    /// How keys lie on disk.
    pub vault: Vault,
}

/// The trust domain's CA.
#[derive(Debug)]
pub struct Authority {
    terms: Terms,
    dir: PathBuf,
    /// One change at a time.
    changing: Mutex<()>,
    generations: RwLock<Arc<Vec<Generation>>>,
    /// The roots of the directive that a member follows.
    followed: RwLock<Option<Vec<CertificateDer<'static>>>>,
    own: watch::Sender<Credential>,
}

/// What is told of one certificate of the CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dates {
    /// `root`, `issuing` or `collector`.
    pub what: &'static str,
    /// Of which generation.
    pub number: u32,
    /// What that generation is used for.
    pub stage: Stage,
    /// When it begins.
    pub not_before: Timestamp,
    /// When it ends.
    pub not_after: Timestamp,
}

/// A step of a rotation that can be taken. Until it is, or is let go, nothing else changes.
#[derive(Debug)]
pub struct Ready<'a> {
    authority: &'a Authority,
    _changing: MutexGuard<'a, ()>,
    entries: Vec<Entry>,
    opened: Vec<Generation>,
    own: Credential,
}

impl Ready<'_> {
    /// The collector's own credential after the step.
    pub fn own(&self) -> &Credential {
        &self.own
    }

    /// Every root that is trusted after it.
    pub fn bundle(&self) -> Vec<Der> {
        self.opened.iter().map(|generation| Der(generation.root.cert.to_vec())).collect()
    }

    /// The public keys of roots whose certificates are to be renewed then.
    pub fn tainted(&self) -> Vec<Sha256> {
        tainted(&self.opened)
    }

    /// Takes it: on disk first, then in use.
    pub fn take(self) -> Result<(), CaError> {
        let Ready { authority, _changing, entries, opened, own } = self;
        write_bundle(&authority.dir, &opened)?;
        generation::write_list(&authority.dir, &entries)?;
        authority.put(opened);
        authority.own.send_replace(own);
        remove_unlisted(&authority.dir, &entries);
        Ok(())
    }
}

impl Authority {
    /// Opens the CA in `dir`, or makes it; whether it was made.
    pub fn open(dir: &Path, terms: Terms, now: Timestamp) -> Result<(Authority, bool), CaError> {
        let known = generation::read_list(dir)?;
        let first = known.is_none();
        let entries = known.unwrap_or_else(|| vec![Entry::first(now)]);
        generation::check_list(dir, &entries)?;
        let one = |entry: &Entry| match first {
            true => generation::make(dir, entry, &terms.domain, &terms.vault, now),
            false => generation::open(dir, entry, &terms.domain, &terms.vault, now),
        };
        let generations: Vec<Generation> = entries.iter().map(one).collect::<Result<_, _>>()?;
        generation::write_list(dir, &entries)?;
        write_bundle(dir, &generations)?;
        remove_unlisted(dir, &entries);
        let own = make_own(&terms, active(&generations), now)?;
        let (dir, own) = (dir.to_owned(), watch::Sender::new(own));
        let generations = RwLock::new(Arc::new(generations));
        let (changing, followed) = (Mutex::default(), RwLock::default());
        Ok((Authority { terms, dir, changing, generations, followed, own }, first))
    }

    /// Whether there is a CA in `dir`.
    pub fn exists(dir: &Path) -> bool {
        dir.join("generations.json").exists() || dir.join("root").exists()
    }

    /// The pin of tokens, without the keys: for commands beside a running collector.
    pub fn read_pin(dir: &Path) -> Result<Sha256, CaError> {
        let entries = generation::read_list(dir)?.unwrap_or_else(|| vec![Entry::first(Timestamp(0))]);
        let active = entries.iter().find(|entry| entry.stage == Stage::Active).unwrap_or(&entries[0]);
        let path = generation::dir_of(dir, active).join("root/cert.pem");
        tls::spki_of(&generation::read_cert(&path)?).map_err(|e| CaError::Pair { path, fault: e.to_string() })
    }

    /// The trust domain.
    pub fn domain(&self) -> &TrustDomain {
        &self.terms.domain
    }

    /// The certificate of the root that issues now.
    pub fn root(&self) -> CertificateDer<'static> {
        active(&self.generations()).root.cert.clone()
    }

    /// Every root that is trusted now.
    pub fn bundle(&self) -> Vec<Der> {
        self.roots().iter().map(|root| Der(root.to_vec())).collect()
    }

    /// The public keys of roots whose certificates are to be renewed now.
    pub fn tainted(&self) -> Vec<Sha256> {
        tainted(&self.generations())
    }

    /// The public keys of roots that somebody else may have the keys of, and of the issuing CAs under them.
    pub fn compromised(&self) -> Vec<Sha256> {
        let generations = self.generations();
        let lost = generations.iter().filter(|generation| generation.entry.compromised);
        lost.flat_map(|one| [Some(one.root.spki), tls::spki_of(&one.issuing.cert).ok()]).flatten().collect()
    }

    /// The one trust domain with its roots.
    pub fn trust(&self) -> Trust {
        Trust::single(self.terms.domain.clone(), self.roots())
    }

    fn roots(&self) -> Vec<CertificateDer<'static>> {
        let ours = || self.generations().iter().map(|generation| generation.root.cert.clone()).collect();
        self.followed().unwrap_or_else(ours)
    }

    /// SHA-256 of the public key of the root that issues now: what a token carries.
    pub fn pin(&self) -> Sha256 {
        active(&self.generations()).root.spki
    }

    /// The generations, as they stand.
    pub fn entries(&self) -> Vec<Entry> {
        self.generations().iter().map(|generation| generation.entry.clone()).collect()
    }

    /// The collector's own credential, which is renewed by itself: for the sessions, enrolment and the HTTPS API. It also
    /// changes when the roots do.
    pub fn own(&self) -> watch::Receiver<Credential> {
        self.own.subscribe()
    }

    /// Until when each certificate of the CA holds, our own included.
    pub fn dates(&self) -> Vec<Dates> {
        let generations = self.generations();
        let own = self.own.borrow();
        let (not_before, not_after) = (own.peer().not_before, own.peer().not_after);
        let entry = &active(&generations).entry;
        let collector = Dates { what: "collector", number: entry.number, stage: entry.stage, not_before, not_after };
        let of = |generation: &Generation| {
            let Entry { number, stage, .. } = generation.entry;
            let (root, issuing) = (&generation.root, &generation.issuing);
            let dates = |what, not_before, not_after| Dates { what, number, stage, not_before, not_after };
            [dates("root", root.not_before, root.not_after), dates("issuing", issuing.not_before, issuing.not_after)]
        };
        generations.iter().flat_map(of).chain([collector]).collect()
    }

    /// Renews what is due: the issuing CA at a third of its life, our own certificate at half, and with the issuing CA, so
    /// that its chain is always the one in use. Whether ours was.
    pub fn renew_due(&self, now: Timestamp) -> Result<bool, CaError> {
        let _changing = self.lock();
        let generations = self.generations();
        let Generation { root, issuing, .. } = active(&generations);
        let due = root.ca.is_some() && issuing.is_due(root.not_after, now);
        if due {
            self.reopen(&self.entries(), now)?;
            tracing::info!(not_after = %active(&self.generations()).issuing.not_after, "the issuing CA was renewed");
        }
        let (begins, ends) = (self.own.borrow().peer().not_before, self.own.borrow().peer().not_after);
        // One that ends with the CA it is of cannot be made longer.
        let is_good =
            ends >= active(&self.generations()).issuing.not_after || now < ends.minus(self.terms.own_life / 2);
        // One that was made while the clock was ahead does not hold yet: nobody could come in until it does.
        if !due && begins <= now && is_good {
            return Ok(false);
        }
        self.renew_own(now)?;
        Ok(true)
    }

    /// Makes ready what a step of a rotation needs; nothing changes by it. Whether the step may be taken now is for the caller to
    /// ask.
    pub fn ready(&self, step: Step, now: Timestamp) -> Result<Ready<'_>, CaError> {
        let changing = self.lock();
        let before = self.entries();
        let entries = rotate::after(&before, step, now)?;
        let is_new = |entry: &&Entry| before.iter().all(|old| old.number != entry.number);
        for entry in entries.iter().filter(is_new) {
            generation::make(&self.dir, entry, &self.terms.domain, &self.terms.vault, now)?;
        }
        // Opened before they count: a list that names what cannot be opened would keep the next start from succeeding.
        let opened = self.open_all(&entries, now)?;
        let own = make_own(&self.terms, active(&opened), now)?;
        Ok(Ready { authority: self, _changing: changing, entries, opened, own })
    }

    /// Signs a leaf for `workload` with the key in `spki` (DER): the chain, leaf first, root last.
    pub fn sign(
        &self,
        workload: &SpiffeId,
        instance: Option<&str>,
        names: &[String],
        spki: &impl PublicKeyData,
        life: Duration,
        now: Timestamp,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let generations = self.generations();
        let Generation { root, issuing, .. } = active(&generations);
        let params = certificates::leaf(workload, instance, names, life, now, issuing.not_after)?;
        let cert = params.signed_by(spki, &issuing.issuer)?;
        Ok(vec![cert.der().clone(), issuing.cert.clone(), root.cert.clone()])
    }

    /// Signs an issuing CA for another collector, for the key in its request (DER): its certificate, and the root.
    pub fn sign_member(&self, csr: &[u8], now: Timestamp) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let (key, _) = read_request(csr).map_err(|refused| CaError::Request(refused.detail))?;
        let generations = self.generations();
        let root = &active(&generations).root;
        let ca = root.ca.as_ref().ok_or(rotate::OutOfTurn::Member)?;
        let cert =
            generation::issuing_params(&self.terms.domain, tls::MEMBER_CA, ca, now).signed_by(&key, &ca.issuer)?;
        Ok(vec![cert.der().clone(), root.cert.clone()])
    }

    /// The public keys of our own issuing CAs.
    pub fn issuers(&self) -> Vec<Sha256> {
        self.generations().iter().filter_map(|generation| tls::spki_of(&generation.issuing.cert).ok()).collect()
    }

    /// Whether the root's key is kept by another collector.
    pub fn is_member(&self) -> bool {
        self.generations().iter().any(|generation| generation.entry.member)
    }

    /// Of a member: the roots are those of the directive that it follows. Everybody who listens takes them from now on.
    pub fn follow(&self, bundle: &[Der]) {
        let roots: Vec<_> = bundle.iter().map(|der| CertificateDer::from(der.0.clone())).collect();
        let changed = {
            let mut followed = self.followed.write().unwrap_or_else(PoisonError::into_inner);
            followed.replace(roots.clone()) != Some(roots)
        };
        if changed {
            self.own.send_modify(|_| {});
        }
    }

    fn followed(&self) -> Option<Vec<CertificateDer<'static>>> {
        self.followed.read().unwrap_or_else(PoisonError::into_inner).clone().filter(|roots| !roots.is_empty())
    }

    /// Of a member: whether it needs another issuing CA. `signer` signed the directive that it follows.
    pub fn wants_issuing(&self, directive: &Directive, signer: &Peer, now: Timestamp) -> bool {
        let generations = self.generations();
        let Generation { root, issuing, entry } = active(&generations);
        let is_leaving = directive.renew.roots.contains(&root.spki) || !signer.issuers.contains(&root.spki);
        entry.member && (is_leaving || issuing.is_due(root.not_after, now))
    }

    /// Of a member: takes a new issuing CA into use; the one before is deleted.
    pub fn take_issuing(
        &self,
        key: &KeyPair,
        chain: &[CertificateDer<'static>],
        now: Timestamp,
    ) -> Result<(), CaError> {
        let _changing = self.lock();
        let before = self.entries();
        let entries = [member::put(&self.dir, &before, key, chain, &self.terms.domain, &self.terms.vault, now)?];
        self.reopen(&entries, now)?;
        self.renew_own(now)?;
        remove_unlisted(&self.dir, &entries);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_all(&self, entries: &[Entry], now: Timestamp) -> Result<Vec<Generation>, CaError> {
        let Terms { domain, vault, .. } = &self.terms;
        entries.iter().map(|entry| generation::open(&self.dir, entry, domain, vault, now)).collect()
    }

    fn reopen(&self, entries: &[Entry], now: Timestamp) -> Result<(), CaError> {
        self.put(self.open_all(entries, now)?);
        Ok(())
    }

    fn put(&self, generations: Vec<Generation>) {
        *self.generations.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(generations);
    }

    fn renew_own(&self, now: Timestamp) -> Result<(), CaError> {
        let own = make_own(&self.terms, active(&self.generations()), now)?;
        self.own.send_replace(own);
        Ok(())
    }

    fn generations(&self) -> Arc<Vec<Generation>> {
        self.generations.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The one that issues: `read_list` takes no list without it, and no step makes one.
fn active(generations: &[Generation]) -> &Generation {
    let found = generations.iter().find(|generation| generation.entry.stage == Stage::Active);
    found.expect("every list of generations has an active one")
}

fn tainted(generations: &[Generation]) -> Vec<Sha256> {
    generations.iter().filter(|one| one.entry.stage == Stage::Tainted).map(|one| one.root.spki).collect()
}

/// What goes on without it: the next start tries again.
fn remove_unlisted(dir: &Path, listed: &[Entry]) {
    if let Err(error) = generation::remove_unlisted(dir, listed) {
        tracing::error!(%error, "the keys of a retired root could not be removed");
    }
}

fn write_bundle(dir: &Path, generations: &[Generation]) -> Result<(), CaError> {
    let pem: String = generations.iter().map(|generation| pem(&generation.root.cert)).collect();
    files::write(&dir.join("bundle.pem"), pem.as_bytes(), 0o644)
}

/// A certificate in PEM.
pub fn pem(cert: &CertificateDer<'_>) -> String {
    let text = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, cert);
    let lines: Vec<&str> = text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

fn make_own(terms: &Terms, generation: &Generation, now: Timestamp) -> Result<Credential, CaError> {
    let key = KeyPair::generate()?;
    let (id, latest) = (tls::collector_id(&terms.domain), generation.issuing.not_after);
    let params = certificates::leaf(&id, None, &terms.names, terms.own_life, now, latest)?;
    let cert = params.signed_by(&key, &generation.issuing.issuer)?;
    let chain = vec![cert.der().clone(), generation.issuing.cert.clone(), generation.root.cert.clone()];
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Ok(Credential::from_der(chain, key)?)
}
