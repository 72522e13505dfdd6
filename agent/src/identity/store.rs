//! What an agent keeps of its identity on disk: one file for key, chain and roots, so that they cannot disagree, and
//! one for the newest directive. Both are replaced as a whole; the key's file is readable by the agent alone.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use sidewarden_proto::directive::{Directive, Signed};
use sidewarden_proto::enrol::Der;
use sidewarden_proto::given::Offered;
use sidewarden_proto::identity::{PeerName, SpiffeId, TrustDomain};
use sidewarden_proto::secret::Secret;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{Credential, TlsError, Trust};

const IDENTITY: &str = "identity.json";
const DIRECTIVE: &str = "directive.json";

/// Why what is on disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It cannot be read or written.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// It is not what we wrote.
    #[error("{} is damaged ({detail}): remove it and enrol again with a new token", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
}

/// Key, chain and roots, as they were issued together.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Issued {
    /// PKCS#8, base64.
    key: Secret,
    /// Leaf first.
    chain: Vec<Der>,
    /// The roots of the trust domain.
    bundle: Vec<Der>,
}

/// An issued identity that was looked through: the key fits the leaf, and the leaf names a workload.
#[derive(Clone, Debug)]
pub struct Checked {
    /// Key and chain.
    pub credential: Credential,
    /// The workload it names.
    pub workload: SpiffeId,
    /// The roots it came with.
    pub trust: Trust,
    /// Who gave it.
    pub from: Given,
}

/// Who has given an identity, and so has the say about the roots of its domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Given {
    /// A collector: it is known by the roots of its own CA, and by no other that it tells of.
    ByCollector,
    /// Files: what the collector says later counts in place of their roots.
    InFiles,
    /// A Workload API, which keeps its roots up to date: what the collector says of a domain among them does not count.
    ByApi,
}

impl Checked {
    /// What lay in files: the collector's word on the domain's roots is newer than theirs.
    pub fn from_files(Offered { credential, workload, trust }: Offered) -> Checked {
        Checked { credential, workload, trust, from: Given::InFiles }
    }
}

impl Issued {
    /// A new one.
    pub fn new(key_pkcs8: &[u8], chain: Vec<Der>, bundle: Vec<Der>) -> Issued {
        let key = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, key_pkcs8);
        Issued { key: Secret::new(key), chain, bundle }
    }

    /// The private key, PKCS#8.
    pub fn key(&self) -> Result<Vec<u8>, TlsError> {
        let bytes = base64::Engine::decode(&base64::prelude::BASE64_STANDARD, self.key.reveal());
        bytes.map_err(|_| TlsError::Pem("the private key is no base64".into()))
    }

    /// The chain, leaf first.
    pub fn chain(&self) -> &[Der] {
        &self.chain
    }

    /// Looks it through.
    pub fn check(&self) -> Result<Checked, TlsError> {
        let chain = certificates(&self.chain);
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key()?));
        let credential = Credential::from_der(chain, key)?;
        let PeerName::Spiffe(workload) = credential.peer().name.clone() else {
            return Err(TlsError::Pem("our certificate names no workload".into()));
        };
        let trust = Trust::single(workload.trust_domain(), certificates(&self.bundle));
        Ok(Checked { credential, workload, trust, from: Given::ByCollector })
    }
}

/// As rustls wants them.
pub fn certificates(list: &[Der]) -> Vec<CertificateDer<'static>> {
    list.iter().map(|der| CertificateDer::from(der.0.clone())).collect()
}

/// A directive with the moment it was taken: its signer's certificate may have ended since, which does not undo it.
#[derive(Serialize, Deserialize)]
struct Kept {
    accepted_us: Timestamp,
    signed: Signed,
    /// The roots it was proven with, which may have been replaced since: that does not undo it either.
    #[serde(default)]
    roots: Vec<Der>,
}

/// The two files; or nothing at all, where the workload could read them.
#[derive(Clone, Debug)]
pub struct Store {
    dir: Option<PathBuf>,
    /// Held while something is written.
    writing: Arc<Mutex<()>>,
}

impl Store {
    /// In `dir`, which is made if it is not there.
    pub fn open(dir: &Path) -> Result<Store, StoreError> {
        fs::create_dir_all(dir).map_err(|error| StoreError::File { path: dir.to_owned(), error })?;
        Ok(Store { dir: Some(dir.to_owned()), writing: Arc::default() })
    }

    /// Keeps nothing: what is published is all there is.
    pub fn in_memory() -> Store {
        Store { dir: None, writing: Arc::default() }
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.dir.as_ref().map(|dir| dir.join(name))
    }

    /// The identity, if there is one.
    pub fn load(&self) -> Result<Option<Issued>, StoreError> {
        let Some(path) = self.path(IDENTITY) else { return Ok(None) };
        let Some(bytes) = read(&path)? else { return Ok(None) };
        // What serde says may quote the key; where it is wrong is enough.
        let damaged = |detail: String| StoreError::Damaged { path: path.clone(), detail };
        let issued: Issued = serde_json::from_slice(&bytes)
            .map_err(|e| damaged(format!("it is cut short or changed, at line {}, column {}", e.line(), e.column())))?;
        issued.check().map_err(|e| damaged(e.to_string()))?;
        Ok(Some(issued))
    }

    /// Replaces the identity.
    pub fn save(&self, issued: &Issued) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(issued).unwrap_or_default();
        // One that a slow disk still writes is older, and must not end up in its place.
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.replace(IDENTITY, &bytes)
    }

    /// The directive for `domain`, if there is one.
    pub fn load_directive(&self, trust: &Trust, domain: &TrustDomain) -> Result<Option<Directive>, StoreError> {
        let Some((path, kept)) = self.kept_for(domain)? else { return Ok(None) };
        let then = Trust::single(domain.clone(), certificates(&kept.roots));
        let opened = kept.signed.open(trust, kept.accepted_us);
        let opened = opened.or_else(|error| kept.signed.open(&then, kept.accepted_us).map_err(|_| error));
        opened.map(Some).map_err(|error| StoreError::Damaged { path, detail: error.to_string() })
    }

    /// The same for whoever has just enrolled: the roots it was proven with then say nothing, for they may be of a CA that
    /// is no more.
    pub fn directive_proven_by(&self, trust: &Trust, domain: &TrustDomain) -> Result<Option<Directive>, StoreError> {
        let Some((_, kept)) = self.kept_for(domain)? else { return Ok(None) };
        let opened = kept.signed.open(trust, kept.accepted_us);
        let refused = |error| tracing::warn!(%error, "the directive on disk is of another CA, and does not count");
        Ok(opened.map_err(refused).ok())
    }

    fn kept_for(&self, domain: &TrustDomain) -> Result<Option<(PathBuf, Kept)>, StoreError> {
        let Some(path) = self.path(DIRECTIVE) else { return Ok(None) };
        let Some(bytes) = read(&path)? else { return Ok(None) };
        let damaged = |detail: String| StoreError::Damaged { path: path.clone(), detail };
        let kept: Kept = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        let of = kept.signed.as_kept().map_err(|e| damaged(e.to_string()))?.trust_domain;
        // The signer of another domain's is nobody we know.
        Ok(Some((path, kept)).filter(|_| of == *domain))
    }

    /// Whether a directive is kept, readable or not; if in doubt, one is.
    pub fn keeps_directive(&self) -> bool {
        self.path(DIRECTIVE).is_some_and(|path| path.try_exists().unwrap_or(true))
    }

    /// Replaces the directive by one that was proven with `roots`. Which one is newer only its taker knows: versions of
    /// different trust domains do not compare.
    pub fn save_directive(
        &self,
        signed: &Signed,
        roots: &[CertificateDer<'static>],
        accepted_us: Timestamp,
    ) -> Result<(), StoreError> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let roots = roots.iter().map(|root| Der(root.to_vec())).collect();
        let signed = signed.clone();
        let bytes = serde_json::to_vec(&Kept { accepted_us, signed, roots }).unwrap_or_default();
        self.replace(DIRECTIVE, &bytes)
    }

    /// Writes nothing while this is held, as on a disk that stalls.
    #[cfg(test)]
    pub fn stall(&self) -> std::sync::mpsc::Sender<()> {
        let (release, released) = std::sync::mpsc::channel();
        let (tell, told) = std::sync::mpsc::channel();
        let writing = self.writing.clone();
        std::thread::spawn(move || {
            let _stalled = writing.lock().unwrap();
            tell.send(()).unwrap();
            let _ = released.recv();
        });
        told.recv().unwrap();
        release
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let Some(dir) = &self.dir else { return Ok(()) };
        let path = dir.join(name);
        let write = || -> io::Result<()> {
            let new = path.with_extension("new");
            // One that a crash left may have another mode.
            let _ = fs::remove_file(&new);
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(dir)?.sync_all()
        };
        write().map_err(|error| StoreError::File { path: path.clone(), error })
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::File { path: path.to_owned(), error }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use sidewarden_proto::directive::Deny;
    use sidewarden_proto::identity::Sha256;

    use super::*;
    use crate::identity::made_up::Ca;

    #[test]
    fn an_identity_comes_back_and_its_file_is_for_us_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert!(store.load().unwrap().is_none());
        store.save(&Ca::new("td").issue("shop/web")).unwrap();
        let loaded = store.load().unwrap().unwrap().check().unwrap();
        assert_eq!(loaded.workload.as_str(), "spiffe://td/shop/web");
        let mode = fs::metadata(dir.path().join(IDENTITY)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_torn_or_mixed_file_is_an_error_that_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let ca = Ca::new("td");
        let (one, other) = (ca.issue("shop/web"), ca.issue("shop/web"));
        let whole = serde_json::to_vec(&one).unwrap();
        let mixed = serde_json::to_vec(&Issued { key: other.key, ..one }).unwrap();
        for bytes in [&whole[..whole.len() / 2], b"", b"{}", &mixed] {
            fs::write(dir.path().join(IDENTITY), bytes).unwrap();
            let error = store.load().unwrap_err().to_string();
            assert!(error.contains("enrol again"), "{error}");
            assert!(!error.contains("MIG"), "no key in {error}");
        }
    }

    #[test]
    fn a_directive_holds_though_its_signer_has_ended_since() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let ca = Ca::new("td");
        let deny = vec![Deny::Key { spki: Sha256([1; 32]), why: "stolen".into() }];
        let signed = ca.directive(3, deny, Timestamp::now());
        let domain: TrustDomain = "td".parse().unwrap();
        let foreign = Ca::new("td");
        store.save_directive(&signed, &[], Timestamp::now()).unwrap();
        let loaded = store.load_directive(&ca.trust(), &domain).unwrap().unwrap();
        assert_eq!((loaded.version, loaded.deny.len()), (3, 1));
        assert!(store.load_directive(&foreign.trust(), &domain).is_err());
        store.save_directive(&signed, std::slice::from_ref(&ca.root), Timestamp::now()).unwrap();
        let loaded = store.load_directive(&foreign.trust(), &domain).unwrap().unwrap();
        assert_eq!(loaded.version, 3, "its root has been replaced since");
        let elsewhere = Ca::new("b");
        assert!(store.load_directive(&elsewhere.trust(), &"b".parse().unwrap()).unwrap().is_none(), "it is td's");
    }
}
