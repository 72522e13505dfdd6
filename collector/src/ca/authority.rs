//! The root, the issuing CA under it, and the collector's own certificate.
//!
//! ```text
//! <dir>/root/cert.pem, key.pem       10 years; its public key's hash is the pin in every token
//! <dir>/issuing/cert.pem, key.pem    1 year, path length 0; made anew from the root when a third of it is left
//! ```
//! The collector's own key is made at each start and kept in memory only.

use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sidewarden_proto::identity::{Sha256, SpiffeId, TrustDomain};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{self, Credential, Trust};
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{CaError, files};

const DAY: Duration = Duration::from_secs(24 * 3600);
const ROOT_LIFE: Duration = Duration::from_secs(3650 * 24 * 3600);
const ISSUING_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);
/// Certificates begin this much before they are made: clocks differ.
pub const LEEWAY: Duration = Duration::from_secs(300);

/// A CA certificate with its key.
#[derive(Debug)]
struct Ca {
    cert: CertificateDer<'static>,
    issuer: rcgen::Issuer<'static, KeyPair>,
    not_after: Timestamp,
}

/// The trust domain's CA.
#[derive(Debug)]
pub struct Authority {
    domain: TrustDomain,
    dir: PathBuf,
    root: Ca,
    issuing: RwLock<Arc<Ca>>,
    own: watch::Sender<Credential>,
    /// Life of the collector's own certificate, and the DNS names and addresses it bears besides its SPIFFE ID.
    own_life: Duration,
    names: Vec<String>,
}

impl Authority {
    /// Opens the CA in `dir`, or makes it; whether it was made. `names` are DNS names and addresses of the API.
    ///
    /// `own_life` is the life of the collector's own certificate. Agents verify directives with it, so it must outlast
    /// what an agent may be out of touch; it is renewed at half of it.
    pub fn open(
        dir: &Path,
        domain: &TrustDomain,
        names: &[String],
        own_life: Duration,
        now: Timestamp,
    ) -> Result<(Authority, bool), CaError> {
        let first = !dir.join("root").exists();
        let root = if first { make_root(dir, domain, now)? } else { load(&dir.join("root"), now)? };
        check_domain(dir, &root, domain)?;
        let issuing = open_issuing(dir, &root, domain, now)?;
        let own = make_own(&root, &issuing, domain, names, own_life, now)?;
        let authority = Authority {
            domain: domain.clone(),
            dir: dir.to_owned(),
            root,
            issuing: RwLock::new(Arc::new(issuing)),
            own: watch::Sender::new(own),
            own_life,
            names: names.to_vec(),
        };
        Ok((authority, first))
    }

    /// The pin of tokens, without the keys: for commands beside a running collector.
    pub fn read_pin(dir: &Path) -> Result<Sha256, CaError> {
        let path = dir.join("root/cert.pem");
        let fault = |fault: String| CaError::Pair { path: path.clone(), fault };
        let pem = std::fs::read(&path).map_err(files::access(&path))?;
        let cert = CertificateDer::from_pem_slice(&pem).map_err(|e| fault(e.to_string()))?;
        tls::spki_of(&cert).map_err(|e| fault(e.to_string()))
    }

    /// The trust domain.
    pub fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// The root certificate.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root.cert
    }

    /// The one trust domain with its root.
    pub fn trust(&self) -> Trust {
        Trust::single(self.domain.clone(), vec![self.root.cert.clone()])
    }

    /// SHA-256 of the root's public key: what a token carries.
    pub fn pin(&self) -> Result<Sha256, CaError> {
        let path = self.dir.join("root/cert.pem");
        tls::spki_of(&self.root.cert).map_err(|e| CaError::Pair { path, fault: e.to_string() })
    }

    /// The collector's own credential, which is renewed by itself: for the sessions, enrolment and the HTTPS API.
    pub fn own(&self) -> watch::Receiver<Credential> {
        self.own.subscribe()
    }

    /// Renews what is due: the issuing CA at a third of its life, our own certificate at half. Whether ours was.
    pub fn renew_due(&self, now: Timestamp) -> Result<bool, CaError> {
        if self.issuing().is_due(now) {
            let made = make_issuing(&self.dir, &self.root, &self.domain, now)?;
            tracing::info!(not_after = %made.not_after, "the issuing CA was renewed");
            *self.issuing.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Arc::new(made);
        }
        let half = self.own.borrow().peer().not_after.minus(self.own_life / 2);
        if now < half {
            return Ok(false);
        }
        let own = make_own(&self.root, &self.issuing(), &self.domain, &self.names, self.own_life, now)?;
        self.own.send_replace(own);
        Ok(true)
    }

    /// Signs a leaf for `workload` with the key in `spki` (DER): the chain, leaf first, root last.
    pub fn sign(
        &self,
        workload: &SpiffeId,
        spki: &impl PublicKeyData,
        life: Duration,
        now: Timestamp,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let issuing = self.issuing();
        let params = leaf(workload, &[], life, now, issuing.not_after)?;
        let cert = params.signed_by(spki, &issuing.issuer)?;
        Ok(vec![cert.der().clone(), issuing.cert.clone(), self.root.cert.clone()])
    }

    fn issuing(&self) -> Arc<Ca> {
        self.issuing.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

impl Ca {
    fn is_due(&self, now: Timestamp) -> bool {
        now.plus(ISSUING_LIFE / 3) >= self.not_after
    }
}

fn make_root(dir: &Path, domain: &TrustDomain, now: Timestamp) -> Result<Ca, CaError> {
    let key = KeyPair::generate()?;
    let params = ca_params(domain, "Sidewarden root", None, ROOT_LIFE, now);
    let cert = params.self_signed(&key)?;
    store(&dir.join("root"), cert.pem(), &key)?;
    load(&dir.join("root"), now)
}

fn open_issuing(dir: &Path, root: &Ca, domain: &TrustDomain, now: Timestamp) -> Result<Ca, CaError> {
    let at = dir.join("issuing");
    if !at.exists() {
        return make_issuing(dir, root, domain, now);
    }
    let issuing = load(&at, now)?;
    check_signed_by(&at.join("cert.pem"), &issuing.cert, &root.cert)?;
    if issuing.is_due(now) { make_issuing(dir, root, domain, now) } else { Ok(issuing) }
}

fn make_issuing(dir: &Path, root: &Ca, domain: &TrustDomain, now: Timestamp) -> Result<Ca, CaError> {
    let key = KeyPair::generate()?;
    let params = ca_params(domain, "Sidewarden issuing", Some(0), ISSUING_LIFE, now);
    let cert = params.signed_by(&key, &root.issuer)?;
    store(&dir.join("issuing"), cert.pem(), &key)?;
    load(&dir.join("issuing"), now)
}

/// Both files or none: they are written beside and moved into place together.
fn store(dir: &Path, cert: String, key: &KeyPair) -> Result<(), CaError> {
    let part = dir.with_extension("part");
    let _ = std::fs::remove_dir_all(&part);
    files::make_dir(&part)?;
    files::write_secret(&part.join("key.pem"), key.serialize_pem().as_bytes())?;
    files::write(&part.join("cert.pem"), cert.as_bytes(), 0o644)?;
    files::replace_dir(&part, dir)
}

fn load(dir: &Path, now: Timestamp) -> Result<Ca, CaError> {
    let (cert_path, key_path) = (dir.join("cert.pem"), dir.join("key.pem"));
    for (present, missing) in [(&cert_path, &key_path), (&key_path, &cert_path)] {
        if present.exists() && !missing.exists() {
            return Err(CaError::Half { present: present.clone(), missing: missing.clone() });
        }
    }
    files::check_mode(dir, 0o700)?;
    let fault = |fault: String| CaError::Pair { path: cert_path.clone(), fault };
    let pem = std::fs::read(&cert_path).map_err(files::access(&cert_path))?;
    let cert = CertificateDer::from_pem_slice(&pem).map_err(|e| fault(format!("no certificate: {e}")))?;
    let key_pem = files::read_secret(&key_path)?;
    let key = String::from_utf8(key_pem).ok().and_then(|pem| KeyPair::from_pem(&pem).ok());
    let key = key.ok_or_else(|| fault(format!("{} holds no key that can be used", key_path.display())))?;
    let (_, parsed) = X509Certificate::from_der(&cert).map_err(|e| fault(e.to_string()))?;
    if !parsed.is_ca() || parsed.public_key().subject_public_key.data != key.public_key_raw() {
        return Err(fault(format!("this is no CA certificate of the key in {}", key_path.display())));
    }
    let not_after = check_dates(&cert_path, &parsed, now)?;
    let issuer = rcgen::Issuer::from_ca_cert_der(&cert, key)?;
    Ok(Ca { cert, issuer, not_after })
}

fn check_dates(path: &Path, cert: &X509Certificate<'_>, now: Timestamp) -> Result<Timestamp, CaError> {
    let at = |t: x509_parser::time::ASN1Time| Timestamp::from_secs(t.timestamp());
    let (from, to) = (at(cert.validity().not_before), at(cert.validity().not_after));
    if from <= now && now <= to {
        return Ok(to);
    }
    let (from, to, now) = (from.to_string(), to.to_string(), now.to_string());
    Err(CaError::Clock { path: path.to_owned(), from, to, now })
}

fn check_domain(dir: &Path, root: &Ca, domain: &TrustDomain) -> Result<(), CaError> {
    let fault = |fault: String| CaError::Pair { path: dir.join("root/cert.pem"), fault };
    let (_, cert) = X509Certificate::from_der(&root.cert).map_err(|e| fault(e.to_string()))?;
    let found = cert.subject().iter_organization().next().and_then(|o| o.as_str().ok()).unwrap_or_default();
    if found == domain.as_str() {
        return Ok(());
    }
    let configured = domain.to_string();
    Err(CaError::OtherDomain { path: dir.to_owned(), found: found.to_owned(), configured })
}

fn check_signed_by(path: &Path, cert: &CertificateDer<'_>, root: &CertificateDer<'_>) -> Result<(), CaError> {
    let fault = |fault: String| CaError::Pair { path: path.to_owned(), fault };
    let (_, cert) = X509Certificate::from_der(cert).map_err(|e| fault(e.to_string()))?;
    let (_, root) = X509Certificate::from_der(root).map_err(|e| fault(e.to_string()))?;
    cert.verify_signature(Some(root.public_key())).map_err(|_| {
        fault("the issuing CA was not signed by this root: restore the one that was, or remove issuing/ to make a new one".into())
    })
}

fn ca_params(
    domain: &TrustDomain,
    name: &str,
    path_len: Option<u8>,
    life: Duration,
    now: Timestamp,
) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.distinguished_name.push(DnType::OrganizationName, domain.as_str());
    params.subject_alt_names = vec![];
    params.is_ca = IsCa::Ca(path_len.map_or(BasicConstraints::Unconstrained, BasicConstraints::Constrained));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial());
    params.not_before = SystemTime::from(now.minus(DAY)).into();
    params.not_after = SystemTime::from(now.plus(life)).into();
    params
}

fn leaf(
    workload: &SpiffeId,
    names: &[String],
    life: Duration,
    now: Timestamp,
    latest: Timestamp,
) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::new(names.to_vec())?;
    params.subject_alt_names.push(SanType::URI(workload.as_str().try_into()?));
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial());
    params.not_before = SystemTime::from(now.minus(LEEWAY)).into();
    params.not_after = SystemTime::from(now.plus(life).min(latest)).into();
    Ok(params)
}

/// 128 random bits, the first bit clear so that it is a positive number of fixed length.
fn serial() -> SerialNumber {
    let mut bytes = [0; 16];
    crate::random(&mut bytes);
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn make_own(
    root: &Ca,
    issuing: &Ca,
    domain: &TrustDomain,
    names: &[String],
    life: Duration,
    now: Timestamp,
) -> Result<Credential, CaError> {
    let key = KeyPair::generate()?;
    let params = leaf(&tls::collector_id(domain), names, life, now, issuing.not_after)?;
    let cert = params.signed_by(&key, &issuing.issuer)?;
    let chain = vec![cert.der().clone(), issuing.cert.clone(), root.cert.clone()];
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Ok(Credential::from_der(chain, key)?)
}
