//! A root and the issuing CA under it, and the file that says which of them are in use.
//!
//! ```text
//! <dir>/root/cert.pem, key.pem       10 years; its public key's hash is the pin in tokens
//! <dir>/issuing/cert.pem, key.pem    1 year, path length 0; made anew from the root when a third of it is left
//! <dir>/g<number>/root, issuing      the same for every generation after the first
//! <dir>/generations.json             which there are, and what each is used for; a step of a rotation is one rename of it
//! <dir>/bundle.pem                   the roots of all of them, for programs that ask the API or scrape metrics
//! ```
//! `key.sealed` stands for `key.pem` where a passphrase is set.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use sidewarden_proto::identity::{Sha256, TrustDomain};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::rotate::{Entry, Stage};
use super::vault::{self, Lies, Vault};
use super::{CaError, certificates, files};

const ROOT_LIFE: Duration = Duration::from_secs(3650 * 24 * 3600);
const ISSUING_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);

/// A CA certificate with its key.
#[derive(Debug)]
pub struct Ca {
    /// The certificate.
    pub cert: CertificateDer<'static>,
    /// Signs with its key.
    pub issuer: rcgen::Issuer<'static, KeyPair>,
    /// When it begins.
    pub not_before: Timestamp,
    /// When it ends.
    pub not_after: Timestamp,
}

impl Ca {
    /// Whether a third of an issuing CA's life, or less, is left, or it was made by a clock that was ahead. One that ends
    /// with its root, at `root_until`, cannot be made longer.
    pub fn is_due(&self, root_until: Timestamp, now: Timestamp) -> bool {
        now < self.not_before || self.not_after < root_until && now.plus(ISSUING_LIFE / 3) >= self.not_after
    }
}

/// A root, with its key unless another collector keeps it.
#[derive(Debug)]
pub struct Root {
    /// The certificate.
    pub cert: CertificateDer<'static>,
    /// SHA-256 of its public key.
    pub spki: Sha256,
    /// When it begins.
    pub not_before: Timestamp,
    /// When it ends.
    pub not_after: Timestamp,
    /// With its key, where we have it.
    pub ca: Option<Ca>,
}

/// A root and the issuing CA under it.
#[derive(Debug)]
pub struct Generation {
    /// What it is used for.
    pub entry: Entry,
    /// The root.
    pub root: Root,
    /// What issues under it.
    pub issuing: Ca,
}

/// Where the files of `entry` are.
pub fn dir_of(dir: &Path, entry: &Entry) -> PathBuf {
    if entry.number == 1 { dir.to_owned() } else { dir.join(format!("g{}", entry.number)) }
}

#[derive(Serialize, Deserialize)]
struct List {
    generations: Vec<Entry>,
}

/// The list on disk. Without one there is the first generation alone, as earlier versions made it, or nothing.
pub fn read_list(dir: &Path) -> Result<Option<Vec<Entry>>, CaError> {
    let path = dir.join("generations.json");
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(dir.join("root").exists().then(|| vec![Entry::first(Timestamp(0))]));
        }
        Err(error) => return Err(files::access(&path)(error)),
    };
    let list: List = serde_json::from_slice(&bytes)
        .map_err(|e| CaError::Pair { path: path.clone(), fault: format!("{e}: restore it from a backup") })?;
    let active = list.generations.iter().filter(|entry| entry.stage == Stage::Active).count();
    if active != 1 {
        return Err(CaError::Pair { path, fault: format!("{active} generations are active, and one must be") });
    }
    Ok(Some(list.generations))
}

/// Replaces the list: from here on the step is taken.
pub fn write_list(dir: &Path, entries: &[Entry]) -> Result<(), CaError> {
    let list = List { generations: entries.to_vec() };
    let bytes = serde_json::to_vec_pretty(&list).unwrap_or_default();
    files::write_secret(&dir.join("generations.json"), &bytes)
}

/// Removes the keys of generations that `listed`, the list on disk, does not name: they are of no more use to us, and of much to a
/// thief. Also those that a crash has left.
pub fn remove_unlisted(dir: &Path, listed: &[Entry]) -> Result<(), CaError> {
    for path in unlisted(dir, listed)? {
        std::fs::remove_dir_all(&path).map_err(files::access(&path))?;
    }
    Ok(())
}

/// Whether `found` is all that there is: a list that was lost may have named another one that issues.
pub fn check_list(dir: &Path, found: &[Entry]) -> Result<(), CaError> {
    let path = dir.join("generations.json");
    if path.exists() || !dir.exists() || unlisted(dir, found)?.is_empty() {
        return Ok(());
    }
    let fault = "it is missing, and there are keys of later roots beside it: restore it from a backup".to_owned();
    Err(CaError::Pair { path, fault })
}

fn unlisted(dir: &Path, listed: &[Entry]) -> Result<Vec<PathBuf>, CaError> {
    let is_listed = |number| listed.iter().any(|entry| entry.number == number);
    let number_of = |name: &str| match name {
        "root" | "issuing" => Some(1),
        name => name.strip_prefix('g')?.parse().ok().filter(|number: &u32| format!("g{number}") == name),
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(files::access(dir))? {
        let path = entry.map_err(files::access(dir))?.path();
        let number = path.file_name().and_then(|name| name.to_str()).and_then(number_of);
        found.extend(number.filter(|number| !is_listed(*number)).map(|_| path));
    }
    Ok(found)
}

/// Opens the files of `entry`, or makes those that are missing and can be made.
pub fn open(
    dir: &Path,
    entry: &Entry,
    domain: &TrustDomain,
    vault: &Vault,
    now: Timestamp,
) -> Result<Generation, CaError> {
    let at = dir_of(dir, entry);
    let root = open_root(&at, entry, vault, now)?;
    check_domain(&at, &root.cert, domain)?;
    let issuing = match (at.join("issuing").exists(), &root.ca) {
        // With the root's key at hand, one that does not hold now is simply due.
        (true, Some(_)) => read_pair(&at.join("issuing"), vault)?,
        (true, None) => load(&at.join("issuing"), vault, now)?,
        (false, Some(ca)) => make_issuing(&at, ca, domain, vault, now)?,
        (false, None) => {
            let path = at.join("issuing");
            return Err(CaError::Pair { path, fault: "it is missing, and the root's key is elsewhere".into() });
        }
    };
    check_signed_by(&at.join("issuing/cert.pem"), &issuing.cert, &root.cert)?;
    let issuing = match &root.ca {
        Some(ca) if issuing.is_due(ca.not_after, now) => make_issuing(&at, ca, domain, vault, now)?,
        _ => issuing,
    };
    Ok(Generation { entry: entry.clone(), root, issuing })
}

/// Makes the root and the issuing CA of `entry`.
pub fn make(
    dir: &Path,
    entry: &Entry,
    domain: &TrustDomain,
    vault: &Vault,
    now: Timestamp,
) -> Result<Generation, CaError> {
    let at = dir_of(dir, entry);
    let name = match entry.number {
        1 => "Sidewarden root".to_owned(),
        number => format!("Sidewarden root {number}"),
    };
    let key = KeyPair::generate()?;
    let cert = certificates::ca(domain, &name, None, ROOT_LIFE, now).self_signed(&key)?;
    files::make_dir(&at)?;
    store(&at.join("root"), cert.pem(), &key, vault)?;
    let _ = std::fs::remove_dir_all(at.join("issuing"));
    open(dir, entry, domain, vault, now)
}

/// A new issuing CA under `root`.
pub fn make_issuing(at: &Path, root: &Ca, domain: &TrustDomain, vault: &Vault, now: Timestamp) -> Result<Ca, CaError> {
    let key = KeyPair::generate()?;
    let cert = issuing_params(domain, "Sidewarden issuing", root, now).signed_by(&key, &root.issuer)?;
    store(&at.join("issuing"), cert.pem(), &key, vault)?;
    load(&at.join("issuing"), vault, now)
}

/// What an issuing CA's certificate says. It never outlives its root.
pub fn issuing_params(domain: &TrustDomain, name: &str, root: &Ca, now: Timestamp) -> rcgen::CertificateParams {
    let life = ISSUING_LIFE.min(root.not_after.since(now));
    certificates::ca(domain, name, Some(0), life, now)
}

/// A generation as its files tell it, without its keys.
#[derive(Clone, Debug)]
pub struct Described {
    /// What it is used for.
    pub entry: Entry,
    /// SHA-256 of its root's public key.
    pub pin: Sha256,
    /// When its root ends.
    pub root_until: Timestamp,
    /// When its issuing CA ends.
    pub issuing_until: Timestamp,
    /// How the keys of root and issuing CA lie on disk.
    pub keys: (Lies, Lies),
}

/// Every generation in `dir`, oldest first; for commands.
pub fn describe(dir: &Path) -> Result<Vec<Described>, CaError> {
    let entries = read_list(dir)?.unwrap_or_default();
    entries.into_iter().map(|entry| describe_one(&dir_of(dir, &entry), entry)).collect()
}

fn describe_one(at: &Path, entry: Entry) -> Result<Described, CaError> {
    let (root, issuing) = (at.join("root"), at.join("issuing"));
    let cert = read_cert(&root.join("cert.pem"))?;
    let root_until = dates(&root.join("cert.pem"), &cert)?.1;
    let issuing_until = dates(&issuing.join("cert.pem"), &read_cert(&issuing.join("cert.pem"))?)?.1;
    let keys = (vault::lies(&root), vault::lies(&issuing));
    Ok(Described { entry, pin: spki_at(&root, &cert)?, root_until, issuing_until, keys })
}

/// Whether the key of the root of `entry` lies in `dir`.
pub fn has_root_key(dir: &Path, entry: &Entry) -> bool {
    vault::lies(&dir_of(dir, entry).join("root")) != Lies::Nowhere
}

/// Where keys are, of every generation in `dir`.
pub fn key_dirs(dir: &Path) -> Result<Vec<PathBuf>, CaError> {
    let entries = read_list(dir)?.unwrap_or_default();
    Ok(entries.iter().flat_map(|entry| ["root", "issuing"].map(|name| dir_of(dir, entry).join(name))).collect())
}

fn open_root(at: &Path, entry: &Entry, vault: &Vault, now: Timestamp) -> Result<Root, CaError> {
    let dir = at.join("root");
    if !(entry.member && vault::lies(&dir) == Lies::Nowhere) {
        let ca = load(&dir, vault, now)?;
        let spki = spki_at(&dir, &ca.cert)?;
        let (cert, not_before, not_after) = (ca.cert.clone(), ca.not_before, ca.not_after);
        return Ok(Root { cert, spki, not_before, not_after, ca: Some(ca) });
    }
    let path = dir.join("cert.pem");
    let cert = read_cert(&path)?;
    let (not_before, not_after) = check_dates(&path, &cert, now)?;
    Ok(Root { spki: spki_at(&dir, &cert)?, cert, not_before, not_after, ca: None })
}

fn spki_at(dir: &Path, cert: &CertificateDer<'_>) -> Result<Sha256, CaError> {
    tls::spki_of(cert).map_err(|e| CaError::Pair { path: dir.join("cert.pem"), fault: e.to_string() })
}

/// The one certificate in a file.
pub fn read_cert(path: &Path) -> Result<CertificateDer<'static>, CaError> {
    let pem = std::fs::read(path).map_err(files::access(path))?;
    CertificateDer::from_pem_slice(&pem)
        .map_err(|e| CaError::Pair { path: path.to_owned(), fault: format!("no certificate: {e}") })
}

/// Both files or none: they are written beside and moved into place together.
pub fn store(dir: &Path, cert: String, key: &KeyPair, vault: &Vault) -> Result<(), CaError> {
    let part = dir.with_extension("part");
    let _ = std::fs::remove_dir_all(&part);
    files::make_dir(&part)?;
    vault.write(&part, key)?;
    files::write(&part.join("cert.pem"), cert.as_bytes(), 0o644)?;
    files::replace_dir(&part, dir)
}

fn load(dir: &Path, vault: &Vault, now: Timestamp) -> Result<Ca, CaError> {
    let ca = read_pair(dir, vault)?;
    check_dates(&dir.join("cert.pem"), &ca.cert, now)?;
    Ok(ca)
}

/// The same whether it holds now or not.
fn read_pair(dir: &Path, vault: &Vault) -> Result<Ca, CaError> {
    let (cert_path, key_path) = (dir.join("cert.pem"), vault::path(dir));
    for (present, missing) in [(&cert_path, &key_path), (&key_path, &cert_path)] {
        if present.exists() && !missing.exists() {
            return Err(CaError::Half { present: present.clone(), missing: missing.clone() });
        }
    }
    files::check_mode(dir, 0o700)?;
    let fault = |fault: String| CaError::Pair { path: cert_path.clone(), fault };
    let cert = read_cert(&cert_path)?;
    let key = vault.read(dir)?;
    let (_, parsed) = X509Certificate::from_der(&cert).map_err(|e| fault(e.to_string()))?;
    if !parsed.is_ca() || parsed.public_key().subject_public_key.data != key.public_key_raw() {
        return Err(fault(format!("this is no CA certificate of the key in {}", key_path.display())));
    }
    let (not_before, not_after) = dates(&cert_path, &cert)?;
    let issuer = rcgen::Issuer::from_ca_cert_der(&cert, key)?;
    Ok(Ca { cert, issuer, not_before, not_after })
}

fn dates(path: &Path, cert: &CertificateDer<'_>) -> Result<(Timestamp, Timestamp), CaError> {
    let fault = |fault: String| CaError::Pair { path: path.to_owned(), fault };
    let (_, cert) = X509Certificate::from_der(cert).map_err(|e| fault(e.to_string()))?;
    let at = |t: x509_parser::time::ASN1Time| Timestamp::from_secs(t.timestamp());
    Ok((at(cert.validity().not_before), at(cert.validity().not_after)))
}

fn check_dates(path: &Path, cert: &CertificateDer<'_>, now: Timestamp) -> Result<(Timestamp, Timestamp), CaError> {
    let (from, to) = dates(path, cert)?;
    if from <= now && now <= to {
        return Ok((from, to));
    }
    let (from, to, now) = (from.to_string(), to.to_string(), now.to_string());
    Err(CaError::Clock { path: path.to_owned(), from, to, now })
}

fn check_domain(dir: &Path, root: &CertificateDer<'_>, domain: &TrustDomain) -> Result<(), CaError> {
    let fault = |fault: String| CaError::Pair { path: dir.join("root/cert.pem"), fault };
    let (_, cert) = X509Certificate::from_der(root).map_err(|e| fault(e.to_string()))?;
    let found = cert.subject().iter_organization().next().and_then(|o| o.as_str().ok()).unwrap_or_default();
    if found == domain.as_str() {
        return Ok(());
    }
    let configured = domain.to_string();
    Err(CaError::OtherDomain { path: dir.to_owned(), found: found.to_owned(), configured })
}

/// Whether `cert` is signed by `root`.
pub fn check_signed_by(path: &Path, cert: &CertificateDer<'_>, root: &CertificateDer<'_>) -> Result<(), CaError> {
    let fault = |fault: String| CaError::Pair { path: path.to_owned(), fault };
    let (_, cert) = X509Certificate::from_der(cert).map_err(|e| fault(e.to_string()))?;
    let (_, root) = X509Certificate::from_der(root).map_err(|e| fault(e.to_string()))?;
    cert.verify_signature(Some(root.public_key())).map_err(|_| {
        fault("the issuing CA was not signed by this root: restore the one that was, or remove issuing/ to make a new one".into())
    })
}
