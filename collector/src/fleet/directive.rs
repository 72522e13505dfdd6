//! The directive in force: made here, its version only growing, kept on disk, signed with our present certificate.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sidewarden_proto::directive::{Deny, Directive, DirectiveFault, Signed};
use sidewarden_proto::enrol::Der;
use sidewarden_proto::identity::TrustDomain;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::Credential;
use tokio::sync::watch;

use crate::ca::{CaError, write_secret};

/// A directive, as it is and as it travels.
#[derive(Clone, Debug)]
pub struct InForce {
    /// What it says.
    pub directive: Directive,
    /// Signed.
    pub signed: Signed,
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
}

impl Directives {
    /// Opens the directive kept at `path`, or makes the first one.
    pub fn open(
        path: &Path,
        domain: &TrustDomain,
        root: &[u8],
        own: &Credential,
        now: Timestamp,
    ) -> Result<Directives, DirectivesError> {
        let bundle = vec![Der(root.to_vec())];
        let directive = match read(path)? {
            Some(kept) if kept.bundle == bundle => kept,
            Some(kept) => Directive { version: kept.version + 1, issued_us: now, bundle, ..kept },
            None => Directive { version: 1, trust_domain: domain.clone(), issued_us: now, bundle, deny: Vec::new() },
        };
        write(path, &directive)?;
        let signed = Signed::sign(&directive, own)?;
        let in_force = watch::Sender::new(Arc::new(InForce { directive, signed }));
        Ok(Directives { path: path.to_owned(), change: Mutex::new(()), in_force })
    }

    /// What is in force, and every change of it.
    pub fn subscribe(&self) -> watch::Receiver<Arc<InForce>> {
        self.in_force.subscribe()
    }

    /// What is in force.
    pub fn now(&self) -> Arc<InForce> {
        self.in_force.borrow().clone()
    }

    /// Replaces the deny list. On disk and signed before anybody is told.
    pub fn set_deny(&self, deny: Vec<Deny>, own: &Credential, now: Timestamp) -> Result<(), DirectivesError> {
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.now();
        if old.directive.deny == deny {
            return Ok(());
        }
        let version = old.directive.version + 1;
        self.put(Directive { version, issued_us: now, deny, ..old.directive.clone() }, own)
    }

    /// Signs it anew with our new certificate: agents verify it against the signer's dates.
    pub fn sign_again(&self, own: &Credential) -> Result<(), DirectivesError> {
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        self.put(self.now().directive.clone(), own)
    }

    fn put(&self, directive: Directive, own: &Credential) -> Result<(), DirectivesError> {
        let signed = Signed::sign(&directive, own)?;
        write(&self.path, &directive)?;
        self.in_force.send_replace(Arc::new(InForce { directive, signed }));
        Ok(())
    }
}

fn read(path: &Path) -> Result<Option<Directive>, DirectivesError> {
    let unreadable = |error: String| DirectivesError::Unreadable { path: path.to_owned(), error };
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| unreadable(e.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unreadable(error.to_string())),
    }
}

fn write(path: &Path, directive: &Directive) -> Result<(), DirectivesError> {
    let bytes = serde_json::to_vec_pretty(directive).map_err(|e| DirectiveFault::Signing(e.to_string()))?;
    Ok(write_secret(path, &bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::Authority;
    use std::time::Duration;

    #[test]
    fn the_version_only_grows_and_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let (domain, now) = ("x.example".parse().unwrap(), Timestamp::now());
        let (authority, _) =
            Authority::open(&dir.path().join("ca"), &domain, &[], Duration::from_secs(86400), now).unwrap();
        let own = authority.own().borrow().clone();
        let path = dir.path().join("directive.json");
        let open = || Directives::open(&path, &domain, authority.root(), &own, now).unwrap();
        let directives = open();
        assert_eq!(directives.now().directive.version, 1);
        let deny = vec![Deny::Workload { id: domain.workload("shop/web").unwrap(), why: "test".into() }];
        directives.set_deny(deny.clone(), &own, now).unwrap();
        directives.set_deny(deny.clone(), &own, now).unwrap();
        let again = open().now();
        assert_eq!((again.directive.version, &again.directive.deny), (2, &deny));
        again.signed.open(&authority.trust(), now).unwrap();
    }

    #[test]
    fn an_unreadable_deny_list_is_not_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("directive.json");
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(read(&path), Err(DirectivesError::Unreadable { .. })));
    }
}
