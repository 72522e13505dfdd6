//! The directive in force: made here, its version only growing, kept on disk, signed with our present certificate.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use sidewarden_proto::directive::{Directive, DirectiveFault, ForeignRoots, Renew, Signed, Target};
use sidewarden_proto::enrol::Der;
use sidewarden_proto::identity::{Peer, TrustDomain};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{Credential, Trust};
use tokio::sync::watch;

use super::policies::History;
use crate::ca::{CaError, write_secret};

/// A directive, as it is and as it travels.
#[derive(Clone, Debug)]
pub struct InForce {
    /// What it says.
    pub directive: Directive,
    /// Signed.
    pub signed: Signed,
}

impl InForce {
    /// The key of a collector may have been stolen: a directive that only such have signed does not count, as with agents.
    fn check_makers(&self, makers: &[Peer]) -> Result<(), DirectivesError> {
        let denied: Option<Vec<_>> = makers.iter().map(|maker| self.directive.denies(maker)).collect();
        match denied.as_ref().and_then(|denied| denied.first()) {
            Some(denied) => Err(DirectivesError::Revoked(denied.to_string())),
            None => Ok(()),
        }
    }
}

/// What a directive says of the trust domain's roots.
#[derive(Clone, Debug, Default)]
pub struct Roots {
    /// Those that are trusted.
    pub bundle: Vec<Der>,
    /// Those whose certificates are to be renewed now.
    pub renew: Renew,
}

/// What can go wrong with it.
#[derive(Debug, thiserror::Error)]
pub enum DirectivesError {
    /// Its file.
    #[error(transparent)]
    File(#[from] CaError),
    /// A file that is none of ours. It is not overwritten: it holds the deny list.
    #[error("{path} cannot be read: {error}: restore it from a backup; removing it forgets every revocation")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        error: String,
    },
    /// Two makers, or one that lost what it had made.
    #[error(
        "directive {0} of the collector that is followed says something else than the one of that number here: apply any change there, the next number settles it"
    )]
    Differs(u64),
    /// Its maker was set back. What it makes next under numbers that were used before would be no news here.
    #[error(
        "directive {theirs} of the collector that is followed is older than the one here, {ours}: it was set back, and what it makes is not taken; bring it ahead by `ca backup` and `ca restore` there, and look through what was revoked since"
    )]
    Older {
        /// The number of theirs.
        theirs: u64,
        /// The number of ours.
        ours: u64,
    },
    /// By a maker whose word counts no more.
    #[error("a directive by a collector that is revoked was not taken: {0}")]
    Revoked(String),
    /// They are made elsewhere.
    #[error("directives are made by the collector that ca.leader names: ask that one")]
    Follows,
    /// Signing.
    #[error(transparent)]
    Signing(#[from] DirectiveFault),
}

/// The one directive in force.
#[derive(Debug)]
pub struct Directives {
    path: PathBuf,
    change: Mutex<()>,
    in_force: watch::Sender<Arc<InForce>>,
    /// Directives are made by another collector, and handed out here as that one signed them.
    follows: bool,
    /// What was kept of them is of before the root under which we issue now: it is held against what comes, and followed no more.
    left_behind: AtomicBool,
    /// Whether that one is within reach; not known at first.
    reached: Mutex<Option<bool>>,
    /// Signs as well, for agents that do not go by our own CA.
    also: Mutex<Option<Credential>>,
}

impl Directives {
    /// Opens the directive kept at `path`, or makes the first one.
    pub fn open(
        path: &Path,
        domain: &TrustDomain,
        roots: Roots,
        own: &Credential,
        now: Timestamp,
    ) -> Result<Directives, DirectivesError> {
        let Roots { bundle, renew } = roots;
        let directive = match read(path)? {
            Some(kept) if kept.bundle == bundle && kept.renew.roots == renew.roots => kept,
            Some(kept) => Directive { version: kept.version + 1, issued_us: now, bundle, renew, ..kept },
            None => first(domain, 1, Roots { bundle, renew }, now),
        };
        // What cannot be signed is not kept: no start could sign it either.
        let signed = Signed::sign(&directive, own)?;
        write(path, &directive)?;
        Ok(Directives::with(path, InForce { directive, signed }, false))
    }

    /// Opens the directive that was taken from another collector last. Before there was one, there is an empty one of
    /// version 0, which no agent takes over another. `roots` are those under which we issue.
    pub fn open_following(
        path: &Path,
        domain: &TrustDomain,
        roots: Roots,
        own: &Credential,
        now: Timestamp,
    ) -> Result<Directives, DirectivesError> {
        let ours = roots.bundle.clone();
        let (directive, signed) = match read_signed(path)? {
            Some(signed) => (signed.as_kept()?, signed),
            None => {
                let none = first(domain, 0, roots, now);
                let signed = Signed::sign(&none, own)?;
                (none, signed)
            }
        };
        let left_behind = !ours.iter().all(|root| directive.bundle.contains(root));
        let opened = Directives::with(path, InForce { directive, signed }, true);
        Ok(Directives { left_behind: left_behind.into(), ..opened })
    }

    fn with(path: &Path, in_force: InForce, follows: bool) -> Directives {
        let in_force = watch::Sender::new(Arc::new(in_force));
        let (path, change, reached, also) = (path.to_owned(), Mutex::default(), Mutex::default(), Mutex::default());
        Directives { path, change, in_force, follows, left_behind: false.into(), reached, also }
    }

    /// Takes a directive of the collector that we follow, if it is newer; whether it was.
    pub fn adopt(&self, signed: Signed, trust: &Trust, now: Timestamp) -> Result<bool, DirectivesError> {
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let (directive, makers) = signed.prove(trust, now)?;
        let have = self.now();
        have.check_makers(&makers)?;
        let (theirs, ours) = (directive.version, have.directive.version);
        // None comes late: a connection keeps the order, and each begins with the newest.
        if theirs < ours {
            return Err(DirectivesError::Older { theirs, ours });
        }
        if theirs == ours && directive != have.directive {
            return Err(DirectivesError::Differs(theirs));
        }
        // The same version signed anew counts too: agents verify it against the signer's dates.
        if signed == have.signed {
            return Ok(false);
        }
        write_secret(&signed_path(&self.path), &signed.to_bytes())?;
        // For commands, which read it while nothing runs.
        write(&self.path, &directive)?;
        let newer = directive.version > have.directive.version;
        self.in_force.send_replace(Arc::new(InForce { directive, signed }));
        self.left_behind.store(false, Ordering::Relaxed);
        Ok(newer)
    }

    /// Whether directives are made by another collector.
    pub fn is_following(&self) -> bool {
        self.follows
    }

    /// Whether there is one that is followed. Without any, nobody can be let in: who is revoked is not known.
    pub fn is_there(&self) -> bool {
        !self.follows || self.now().directive.version > 0 && !self.left_behind.load(Ordering::Relaxed)
    }

    /// Whether an agent that has none yet would take it from us now: its signer must not have run out.
    pub fn is_fresh(&self, trust: &Trust, now: Timestamp) -> bool {
        !self.follows || self.now().signed.open(trust, now).is_ok()
    }

    /// Notes whether the collector that we follow is within reach; whether that has changed.
    pub fn reached(&self, reached: bool) -> bool {
        let mut before = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        before.replace(reached) != Some(reached)
    }

    /// Whether the collector that we follow is within reach; `None` if directives are made here.
    pub fn is_reached(&self) -> Option<bool> {
        let reached = *self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        self.follows.then_some(reached == Some(true))
    }

    /// The policies so far.
    pub fn policies(&self) -> History {
        History::new(&self.path.with_file_name("policies"))
    }

    /// What is in force, and every change of it.
    pub fn subscribe(&self) -> watch::Receiver<Arc<InForce>> {
        self.in_force.subscribe()
    }

    /// What is in force.
    pub fn now(&self) -> Arc<InForce> {
        self.in_force.borrow().clone()
    }

    /// Changes it. On disk and signed before anybody is told; the version that holds afterwards.
    ///
    /// `change` is given what is in force, with nobody else changing it meanwhile. What it makes of version and time does
    /// not count: the version grows if anything else has changed.
    pub fn change<E: From<DirectivesError>>(
        &self,
        own: &Credential,
        now: Timestamp,
        change: impl FnOnce(Directive) -> Result<Directive, E>,
    ) -> Result<u64, E> {
        if self.follows {
            return Err(DirectivesError::Follows.into());
        }
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.now();
        let (version, issued_us) = (old.directive.version, old.directive.issued_us);
        let changed = Directive { version, issued_us, ..change(old.directive.clone())? };
        if changed == old.directive {
            return Ok(version);
        }
        self.put(Directive { version: version + 1, issued_us: now, ..changed }, own)?;
        Ok(version + 1)
    }

    /// Replaces the roots of others than our own domain. On disk and signed before anybody is told.
    pub fn set_foreign(&self, foreign: ForeignRoots, own: &Credential, now: Timestamp) -> Result<(), DirectivesError> {
        self.change(own, now, |old| Ok::<_, DirectivesError>(Directive { foreign, ..old })).map(drop)
    }

    /// Replaces what is said of the roots. Where nothing changes, it is signed anew. `take` makes it so: it is called once the
    /// directive is signed and on disk, before anybody is told, and nobody is if it fails. What is on disk then is put right by
    /// the next change or start.
    ///
    /// `own` must be a credential that agents trust before they have read it.
    pub fn set_roots(
        &self,
        roots: Roots,
        own: &Credential,
        now: Timestamp,
        take: impl FnOnce() -> Result<(), CaError>,
    ) -> Result<(), DirectivesError> {
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let (Roots { bundle, renew }, old) = (roots, self.now().directive.clone());
        if old.bundle == bundle && old.renew.roots == renew.roots {
            return self.put_when(old, own, take);
        }
        self.put_when(Directive { version: old.version + 1, issued_us: now, bundle, renew, ..old }, own, take)
    }

    /// Signs it anew with our new certificate: agents verify it against the signer's dates.
    pub fn sign_again(&self, own: &Credential) -> Result<(), DirectivesError> {
        if self.follows {
            return Ok(());
        }
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        self.put(self.now().directive.clone(), own)
    }

    /// Signs it with `credential` as well from now on, a certificate that somebody else's CA has issued for us. A collector
    /// that follows another hands out what that one has signed.
    pub fn sign_also(&self, credential: Credential, own: &Credential) -> Result<(), DirectivesError> {
        if self.follows {
            return Ok(());
        }
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.also().replace(credential);
        self.put(self.now().directive.clone(), own).inspect_err(|_| *self.also() = before)
    }

    /// What signs besides our own certificate.
    pub fn also_signs(&self) -> Option<Credential> {
        self.also().clone()
    }

    fn also(&self) -> std::sync::MutexGuard<'_, Option<Credential>> {
        self.also.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, directive: Directive, own: &Credential) -> Result<(), DirectivesError> {
        self.put_when(directive, own, || Ok(()))
    }

    fn put_when(
        &self,
        directive: Directive,
        own: &Credential,
        take: impl FnOnce() -> Result<(), CaError>,
    ) -> Result<(), DirectivesError> {
        if self.follows {
            return Err(DirectivesError::Follows);
        }
        let mut signed = Signed::sign(&directive, own)?;
        if let Some(also) = &*self.also() {
            signed = signed.also_by(also)?;
        }
        write(&self.path, &directive)?;
        take()?;
        self.in_force.send_replace(Arc::new(InForce { directive, signed }));
        Ok(())
    }
}

/// What is kept, for changing it: a revocation of a kind that this version does not know would be lost by that.
fn read(path: &Path) -> Result<Option<Directive>, DirectivesError> {
    let unreadable = |error: String| DirectivesError::Unreadable { path: path.to_owned(), error };
    let kept = read_any(path)?;
    let mut revoked = kept.iter().flat_map(|directive| &directive.revoked);
    match revoked.find(|revocation| revocation.what == Target::Unknown) {
        Some(newer) => Err(unreadable(format!("{} was revoked by a newer collector", newer.id))),
        None => Ok(kept),
    }
}

fn read_any(path: &Path) -> Result<Option<Directive>, DirectivesError> {
    let unreadable = |error: String| DirectivesError::Unreadable { path: path.to_owned(), error };
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| unreadable(e.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unreadable(error.to_string())),
    }
}

fn first(domain: &TrustDomain, version: u64, roots: Roots, now: Timestamp) -> Directive {
    Directive {
        version,
        trust_domain: domain.clone(),
        issued_us: now,
        bundle: roots.bundle,
        deny: Vec::new(),
        revoked: Vec::new(),
        foreign: ForeignRoots::default(),
        renew: roots.renew,
        quarantined: Vec::new(),
        released: Vec::new(),
        policy: None,
    }
}

/// Beside the directive, as another collector signed it.
fn signed_path(path: &Path) -> PathBuf {
    path.with_extension("signed.json")
}

fn read_signed(path: &Path) -> Result<Option<Signed>, DirectivesError> {
    let path = signed_path(path);
    match std::fs::read(&path) {
        Ok(bytes) => Ok(Some(Signed::from_bytes(&bytes)?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(DirectivesError::Unreadable { path, error: error.to_string() }),
    }
}

fn write(path: &Path, directive: &Directive) -> Result<(), DirectivesError> {
    let bytes = serde_json::to_vec_pretty(directive).map_err(|e| DirectiveFault::Signing(e.to_string()))?;
    Ok(write_secret(path, &bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::{Authority, Terms, Vault};
    use sidewarden_proto::directive::Revocation;
    use std::time::Duration;

    const OWN_LIFE: Duration = Duration::from_secs(86400);

    fn domain() -> TrustDomain {
        "x.example".parse().unwrap()
    }

    fn open_ca(dir: &Path, name: &str, now: Timestamp) -> Authority {
        let terms = Terms { domain: domain(), names: vec![], own_life: OWN_LIFE, vault: Vault::default() };
        Authority::open(&dir.join(name), terms, now).unwrap().0
    }

    #[test]
    fn the_version_only_grows_and_survives_a_restart() {
        let (dir, domain, now) = (tempfile::tempdir().unwrap(), domain(), Timestamp::now());
        let authority = open_ca(dir.path(), "ca", now);
        let own = authority.own().borrow().clone();
        let path = dir.path().join("directive.json");
        let roots = || Roots { bundle: authority.bundle(), ..Roots::default() };
        let open = || Directives::open(&path, &domain, roots(), &own, now).unwrap();
        let directives = open();
        assert_eq!(directives.now().directive.version, 1);
        let what = Target::Workload { id: domain.workload("shop/web").unwrap() };
        let revoked = vec![Revocation { id: "1".into(), what, why: "test".into(), at_us: now, keys: Vec::new() }];
        let revoke = |directive: Directive| Ok::<_, DirectivesError>(directive.with_revoked(revoked.clone()));
        assert_eq!(directives.change(&own, now, revoke).unwrap(), 2);
        assert_eq!(directives.change(&own, now, revoke).unwrap(), 2);
        let again = open().now();
        assert_eq!((again.directive.version, &again.directive.revoked), (2, &revoked));
        assert_eq!(again.directive.deny.len(), 1);
        again.signed.open(&authority.trust(), now).unwrap();
        let renew = Renew { roots: vec![authority.pin()], within_secs: 5 };
        for (roots, version) in [(roots(), 2), (Roots { renew: renew.clone(), ..roots() }, 3)] {
            directives.set_roots(roots, &own, now, || Ok(())).unwrap();
            assert_eq!((directives.now().directive.version, &directives.now().directive.revoked), (version, &revoked));
        }
        let roots = Roots { renew, ..roots() };
        let kept = Directives::open(&path, &domain, roots, &own, now).unwrap().now();
        assert_eq!(kept.directive.version, 3);
        // What cannot be taken is told to nobody, and the next start goes on from there.
        let none = || Err(CaError::Request("no room".into()));
        assert!(directives.set_roots(Roots::default(), &own, now, none).is_err());
        assert_eq!((directives.now().directive.version, open().now().directive.version), (3, 5));
    }

    #[test]
    fn what_cannot_be_signed_is_not_written_by_a_start_either() {
        let (dir, domain, now) = (tempfile::tempdir().unwrap(), domain(), Timestamp::now());
        let authority = open_ca(dir.path(), "ca", now);
        let own = authority.own().borrow().clone();
        let path = dir.path().join("directive.json");
        let open = |bundle| Directives::open(&path, &domain, Roots { bundle, ..Roots::default() }, &own, now);
        let version = open(authority.bundle()).unwrap().now().directive.version;
        let too_much = open(vec![Der(vec![0; 700 << 10])]);
        assert!(matches!(too_much, Err(DirectivesError::Signing(DirectiveFault::TooLarge { .. }))));
        assert_eq!(open(authority.bundle()).unwrap().now().directive.version, version);
    }

    #[test]
    fn one_that_follows_hands_out_what_it_is_given_makes_none_and_never_goes_back() {
        let (dir, domain, now) = (tempfile::tempdir().unwrap(), domain(), Timestamp::now());
        let authority = open_ca(dir.path(), "ca", now);
        let (own, trust) = (authority.own().borrow().clone(), authority.trust());
        let path = dir.path().join("follows.json");
        let roots = || Roots { bundle: authority.bundle(), ..Roots::default() };
        let open = || Directives::open_following(&path, &domain, roots(), &own, now).unwrap();
        let follows = open();
        assert_eq!((follows.now().directive.version, follows.is_reached()), (0, Some(false)));
        assert!(!follows.is_there(), "nobody can be let in yet");
        let what = Target::Workload { id: domain.workload("shop/web").unwrap() };
        let revoked = vec![Revocation { id: "1".into(), what, why: "test".into(), at_us: now, keys: Vec::new() }];
        let made = |version| {
            let directive = first(&domain, version, roots(), now).with_revoked(revoked.clone());
            Signed::sign(&directive, &own).unwrap()
        };
        for (version, newer) in [(3, true), (3, false), (4, true)] {
            assert_eq!(follows.adopt(made(version), &trust, now).unwrap(), newer, "{version}");
            assert_eq!(follows.now().directive.version, version);
        }
        let back = follows.adopt(made(3), &trust, now);
        assert!(matches!(back, Err(DirectivesError::Older { theirs: 3, ours: 4 })), "{back:?}");
        assert_eq!(follows.now().directive.version, 4);
        let other = first(&domain, 4, roots(), now);
        let other = follows.adopt(Signed::sign(&other, &own).unwrap(), &trust, now);
        assert!(matches!(other, Err(DirectivesError::Differs(4))), "the same number, and nobody is revoked any more");
        assert!(follows.is_there() && follows.is_fresh(&trust, now));
        assert!(!follows.is_fresh(&trust, now.plus(2 * OWN_LIFE)), "nobody takes it from us any more");
        let none =
            |_| -> Result<Directive, DirectivesError> { panic!("nothing is changed, so nothing is asked or kept") };
        assert!(matches!(follows.change(&own, now, none), Err(DirectivesError::Follows)));
        assert!(matches!(follows.set_roots(Roots::default(), &own, now, || Ok(())), Err(DirectivesError::Follows)));
        let stranger = open_ca(dir.path(), "other", now).own().borrow().clone();
        let forged = Signed::sign(&first(&domain, 9, roots(), now), &stranger).unwrap();
        assert!(follows.adopt(forged, &trust, now).is_err());
        let again = open().now();
        assert_eq!((again.directive.version, &again.directive.revoked), (4, &revoked), "it survives a restart");
        assert_eq!(again.signed, follows.now().signed);
    }

    #[test]
    fn a_directive_by_a_key_that_is_revoked_is_not_followed() {
        let (dir, domain, now) = (tempfile::tempdir().unwrap(), domain(), Timestamp::now());
        let stolen = open_ca(dir.path(), "ca", now).own().borrow().clone();
        // The next start makes another key.
        let authority = open_ca(dir.path(), "ca", now);
        let (own, trust) = (authority.own().borrow().clone(), authority.trust());
        let roots = || Roots { bundle: authority.bundle(), ..Roots::default() };
        let path = dir.path().join("follows.json");
        let follows = Directives::open_following(&path, &domain, roots(), &own, now).unwrap();
        let what = Target::Key { spki: stolen.peer().spki };
        let revoked = vec![Revocation { id: "1".into(), what, why: "stolen".into(), at_us: now, keys: Vec::new() }];
        let revoking = first(&domain, 5, roots(), now).with_revoked(revoked);
        follows.adopt(Signed::sign(&revoking, &own).unwrap(), &trust, now).unwrap();
        let next = |by: &Credential| Signed::sign(&first(&domain, 6, roots(), now), by).unwrap();
        let refused = follows.adopt(next(&stolen), &trust, now);
        assert!(matches!(refused, Err(DirectivesError::Revoked(_))), "{refused:?}");
        assert_eq!(follows.now().directive.version, 5);
        assert!(follows.adopt(next(&stolen).also_by(&own).unwrap(), &trust, now).unwrap(), "one who may is enough");
    }

    #[test]
    fn an_unreadable_deny_list_is_not_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("directive.json");
        let newer = r#"{"id":"r1","what":{"by":"moon_phase"},"why":"x","at_us":1}"#;
        let newer = format!(r#"{{"version":1,"trust_domain":"x","issued_us":1,"bundle":[],"revoked":[{newer}]}}"#);
        for text in ["{", &newer] {
            std::fs::write(&path, text).unwrap();
            assert!(matches!(read(&path), Err(DirectivesError::Unreadable { .. })), "{text}");
        }
    }
}
