//! The imported roots: one JSON file in the data directory, replaced as a whole. Commands change it beside a running
//! collector, one at a time; the collector looks at it every second.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use sidewarden_proto::directive::ForeignRoots;
use sidewarden_proto::enrol::Der;
use sidewarden_proto::event::{Body, Event, Severity, TrustStoreChanged};
use sidewarden_proto::identity::{Sha256, TrustDomain};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::Credential;

use crate::ca::{CaError, write_secret};
use crate::fleet::{Directives, DirectivesError};

const FILE: &str = "trust.json";
const LOCK: &str = "trust.lock";
/// Most roots: all of them must fit into one directive.
pub const MAX_ROOTS: usize = 200;
/// More than [`MAX_ROOTS`] ever need.
const MAX_FILE: u64 = 4 << 20;

/// For whom a root speaks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Serves {
    /// The workloads of a trust domain.
    Domain(TrustDomain),
    /// Peers that have DNS names.
    Dns,
}

impl std::fmt::Display for Serves {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Serves::Domain(domain) => domain.fmt(f),
            Serves::Dns => f.write_str("DNS names"),
        }
    }
}

/// A root that was imported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Imported {
    /// For whom it speaks.
    pub serves: Serves,
    /// The certificate.
    pub der: Der,
    /// When.
    pub at_us: Timestamp,
    /// What was said about it.
    #[serde(default)]
    pub note: String,
}

impl Imported {
    /// SHA-256 of the certificate.
    pub fn sha256(&self) -> Sha256 {
        Sha256::of(&[&self.der.0])
    }
}

/// What can go wrong with the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Its files.
    #[error(transparent)]
    File(#[from] CaError),
    /// A file that is none of ours.
    #[error("{path} cannot be read: {error}: restore it from a backup; removing it takes every imported root away")]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        error: String,
    },
    /// Somebody else is at it.
    #[error("another `trust` command is under way in {0}")]
    Busy(PathBuf),
    /// Too many.
    #[error("there would be more than {MAX_ROOTS} roots: remove some with `sidewarden-collector trust remove`")]
    Full,
    /// None.
    #[error("no imported root has a SHA-256 that begins with `{0}`: see `sidewarden-collector trust list`")]
    NoRoot(String),
    /// Several.
    #[error("{1} imported roots have a SHA-256 that begins with `{0}`: write more of it")]
    Ambiguous(String, usize),
    /// Telling the agents.
    #[error(transparent)]
    Directive(#[from] DirectivesError),
}

/// The store in a data directory.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// In `dir`, which need not hold one yet.
    pub fn new(dir: &Path) -> Store {
        Store { dir: dir.to_owned() }
    }

    fn path(&self) -> PathBuf {
        self.dir.join(FILE)
    }

    /// All roots.
    pub fn roots(&self) -> Result<Vec<Imported>, StoreError> {
        let path = self.path();
        let unreadable = |error: String| StoreError::Unreadable { path: path.clone(), error };
        match std::fs::metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(unreadable(error.to_string())),
            Ok(meta) if meta.len() > MAX_FILE => return Err(unreadable("it is too large".into())),
            Ok(_) => {}
        }
        let bytes = std::fs::read(&path).map_err(|error| unreadable(error.to_string()))?;
        serde_json::from_slice(&bytes).map_err(|error| unreadable(error.to_string()))
    }

    /// Adds roots; how many are new.
    pub fn add(&self, new: Vec<Imported>) -> Result<usize, StoreError> {
        let _lock = self.lock()?;
        let mut roots = self.roots()?;
        let before = roots.len();
        for root in new {
            if !roots.iter().any(|have| (&have.serves, &have.der) == (&root.serves, &root.der)) {
                roots.push(root);
            }
        }
        if roots.len() > MAX_ROOTS {
            return Err(StoreError::Full);
        }
        self.write(&roots)?;
        Ok(roots.len() - before)
    }

    /// Removes the one whose SHA-256 begins with `prefix`.
    pub fn remove(&self, prefix: &str) -> Result<Imported, StoreError> {
        let _lock = self.lock()?;
        let mut roots = self.roots()?;
        let prefix = prefix.trim().to_ascii_lowercase().replace(':', "");
        let fits = |root: &Imported| !prefix.is_empty() && root.sha256().to_string().starts_with(&prefix);
        let found: Vec<usize> = (0..roots.len()).filter(|i| fits(&roots[*i])).collect();
        match found[..] {
            [] => Err(StoreError::NoRoot(prefix)),
            [one] => {
                let removed = roots.remove(one);
                self.write(&roots)?;
                Ok(removed)
            }
            _ => Err(StoreError::Ambiguous(prefix, found.len())),
        }
    }

    fn lock(&self) -> Result<Flock<File>, StoreError> {
        let path = self.dir.join(LOCK);
        let file = File::create(&path).map_err(|error| CaError::Access { path, error })?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| StoreError::Busy(self.dir.clone()))
    }

    fn write(&self, roots: &[Imported]) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec_pretty(roots).unwrap_or_default();
        Ok(write_secret(&self.path(), &bytes)?)
    }
}

/// As agents are told.
pub fn as_foreign(roots: &[Imported]) -> ForeignRoots {
    let mut foreign = ForeignRoots::default();
    for root in roots {
        match &root.serves {
            Serves::Domain(domain) => foreign.domains.entry(domain.clone()).or_default().push(root.der.clone()),
            Serves::Dns => foreign.dns.push(root.der.clone()),
        }
    }
    foreign
}

/// What the running collector has told its agents of the store.
#[derive(Debug)]
pub struct Applied {
    store: Store,
    /// The fault that was told last.
    fault: Option<String>,
}

impl Applied {
    /// Of the store in `dir`.
    pub fn new(dir: &Path) -> Applied {
        Applied { store: Store::new(dir), fault: None }
    }

    /// Puts into the directive what is in the store, and the `further` roots of its own domain; the event, if that was a change.
    /// A store that cannot be read leaves everything as it is, and is told once.
    pub fn look(
        &mut self,
        directives: &Directives,
        further: &[Der],
        own: &Credential,
        now: Timestamp,
    ) -> Result<Option<Event>, StoreError> {
        let before = directives.now().directive.clone();
        let mut foreign = match self.store.roots() {
            Ok(roots) => as_foreign(&roots),
            Err(error) => {
                let text = error.to_string();
                let is_new = self.fault.as_ref() != Some(&text);
                self.fault = Some(text);
                return if is_new { Err(error) } else { Ok(None) };
            }
        };
        self.fault = None;
        // What people import of our own domain counts for nothing: it has its own CA, and who else may vouch is in the settings.
        foreign.domains.remove(&before.trust_domain);
        if !further.is_empty() {
            foreign.domains.insert(before.trust_domain, further.to_vec());
        }
        let before = before.foreign;
        if before == foreign {
            return Ok(None);
        }
        directives.set_foreign(foreign.clone(), own, now)?;
        let (was, is) = (words(&before), words(&foreign));
        let added: Vec<String> = is.difference(&was).cloned().collect();
        let removed: Vec<String> = was.difference(&is).cloned().collect();
        let summary = format!("Foreign roots: {} added, {} removed; agents are told", added.len(), removed.len());
        Ok(Some(Event::new(now, Severity::Notice, summary, &Body::from(TrustStoreChanged { added, removed }))))
    }
}

/// `partner.example 1234…`, for each root.
fn words(foreign: &ForeignRoots) -> BTreeSet<String> {
    let hash = |der: &Der| Sha256::of(&[&der.0]);
    let domains = foreign
        .domains
        .iter()
        .flat_map(|(domain, roots)| roots.iter().map(move |der| format!("{domain} {}", hash(der))));
    domains.chain(foreign.dns.iter().map(|der| format!("DNS names {}", hash(der)))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::made_up::Ca;
    use super::*;
    use crate::ca::{Authority, Terms, Vault};
    use crate::fleet::Roots;
    use std::time::Duration;

    fn imported(serves: Serves, name: &str) -> Imported {
        Imported { serves, der: Der(Ca::new(name).cert.to_vec()), at_us: Timestamp(1), note: "by mail".into() }
    }

    fn partner() -> Serves {
        Serves::Domain("partner.example".parse().unwrap())
    }

    #[test]
    fn roots_are_kept_each_once_and_removed_by_the_begin_of_their_hash() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        assert_eq!(store.roots().unwrap(), []);
        let (one, two) = (imported(partner(), "one"), imported(Serves::Dns, "two"));
        assert_eq!(store.add(vec![one.clone(), two.clone(), one.clone()]).unwrap(), 2);
        assert_eq!(store.add(vec![one.clone()]).unwrap(), 0);
        assert_eq!(store.roots().unwrap(), [one.clone(), two.clone()]);
        for wrong in ["", "zz", &"0".repeat(64)] {
            assert!(matches!(store.remove(wrong), Err(StoreError::NoRoot(_))), "{wrong}");
        }
        assert_eq!(store.remove(&one.sha256().to_string()[..16].to_uppercase()).unwrap(), one);
        assert_eq!(store.roots().unwrap(), std::slice::from_ref(&two));
        store.add(vec![Imported { serves: partner(), ..two.clone() }]).unwrap();
        assert!(matches!(store.remove(&two.sha256().to_string()), Err(StoreError::Ambiguous(_, 2))));
    }

    #[test]
    fn more_roots_than_a_directive_holds_are_refused_and_nothing_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let numbered = |i: usize| Imported { der: Der(i.to_be_bytes().to_vec()), ..imported(Serves::Dns, "x") };
        store.add(vec![numbered(0)]).unwrap();
        let many = (0..=MAX_ROOTS).map(numbered).collect();
        assert!(matches!(store.add(many), Err(StoreError::Full)));
        assert_eq!(store.roots().unwrap().len(), 1);
    }

    #[test]
    fn what_is_in_the_store_reaches_the_directive_and_a_broken_store_takes_nothing_away() {
        let dir = tempfile::tempdir().unwrap();
        let (domain, now): (TrustDomain, _) = ("x.example".parse().unwrap(), Timestamp::now());
        let own_life = Duration::from_secs(86400);
        let terms = Terms { domain: domain.clone(), names: vec![], own_life, vault: Vault::default() };
        let (authority, _) = Authority::open(&dir.path().join("ca"), terms, now).unwrap();
        let own = authority.own().borrow().clone();
        let path = dir.path().join("directive.json");
        let roots = Roots { bundle: authority.bundle(), ..Roots::default() };
        let directives = Directives::open(&path, &domain, roots, &own, now).unwrap();
        let (store, mut applied) = (Store::new(dir.path()), Applied::new(dir.path()));
        assert!(applied.look(&directives, &[], &own, now).unwrap().is_none());
        store.add(vec![imported(partner(), "one")]).unwrap();
        let event = applied.look(&directives, &[], &own, now).unwrap().unwrap();
        assert!(event.summary.contains("1 added"), "{}", event.summary);
        let told = directives.now();
        assert_eq!((told.directive.version, told.directive.foreign.domains.len()), (2, 1));
        told.signed.open(&authority.trust(), now).unwrap();
        assert!(applied.look(&directives, &[], &own, now).unwrap().is_none());

        std::fs::write(dir.path().join(FILE), "{").unwrap();
        assert!(applied.look(&directives, &[], &own, now).is_err());
        assert!(applied.look(&directives, &[], &own, now).unwrap().is_none(), "told once");
        assert_eq!(directives.now().directive.version, 2);
        assert!(store.add(vec![]).is_err(), "and nothing overwrites it");

        std::fs::remove_file(dir.path().join(FILE)).unwrap();
        let event = applied.look(&directives, &[], &own, now).unwrap().unwrap();
        assert!(event.summary.contains("1 removed"), "{}", event.summary);
    }
}
