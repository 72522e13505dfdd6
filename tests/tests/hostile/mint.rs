//! Certificates of every kind, under the collector's real CA and under made-up ones.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use sidewarden_proto::tls::provider;

pub const WEB: &str = "spiffe://sidewarden.internal/shop/web";
const HOUR: Duration = Duration::from_secs(3_600);

/// A CA: its certificate, and what signs with its key.
pub struct Authority {
    pub cert: CertificateDer<'static>,
    pub issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// The one that the collector keeps in `dir`.
    pub fn read(dir: &Path) -> Authority {
        let cert = CertificateDer::from_pem_file(dir.join("cert.pem")).unwrap();
        let key = KeyPair::from_pem(&std::fs::read_to_string(dir.join("key.pem")).unwrap()).unwrap();
        Authority { issuer: Issuer::from_ca_cert_der(&cert, key).unwrap(), cert }
    }

    /// A root of nobody's.
    pub fn root(name: &str) -> Authority {
        Authority::self_signed(authority(name))
    }

    /// The same, with these parameters.
    pub fn self_signed(params: CertificateParams) -> Authority {
        let key = KeyPair::generate().unwrap();
        Authority { cert: params.self_signed(&key).unwrap().der().clone(), issuer: Issuer::new(params, key) }
    }

    /// An intermediate under this one.
    pub fn sign(&self, params: CertificateParams) -> Authority {
        self.sign_key(params, KeyPair::generate().unwrap())
    }

    /// The same, for a key that may have another certificate too.
    pub fn sign_key(&self, params: CertificateParams, key: KeyPair) -> Authority {
        let cert = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        Authority { cert, issuer: Issuer::new(params, key) }
    }

    /// A leaf, shown with `rest` after it.
    pub fn leaf(&self, params: &CertificateParams, rest: &[&Authority]) -> Shown {
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        let chain = std::iter::once(leaf).chain(rest.iter().map(|ca| ca.cert.clone())).collect();
        Shown { chain, key: key.serialize_der() }
    }
}

/// What somebody shows, and the key to it.
#[derive(Clone)]
pub struct Shown {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: Vec<u8>,
}

impl Shown {
    pub fn self_signed(params: &CertificateParams) -> Shown {
        let key = KeyPair::generate().unwrap();
        Shown { chain: vec![params.self_signed(&key).unwrap().der().clone()], key: key.serialize_der() }
    }

    /// For rustls, unjudged: it is meant to be wrong.
    pub fn certified(&self) -> Arc<CertifiedKey> {
        let key = PrivateKeyDer::Pkcs8(self.key.clone().into());
        Arc::new(CertifiedKey::new(self.chain.clone(), provider().key_provider.load_private_key(key).unwrap()))
    }

    /// For OpenSSL: the chain and the key in files of `dir`.
    pub fn write(&self, dir: &Path) {
        let pem = |kind: &str, der: &[u8]| {
            let text = base64(der);
            let lines: Vec<&str> = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
            format!("-----BEGIN {kind}-----\n{}\n-----END {kind}-----\n", lines.join("\n"))
        };
        let chain: String = self.chain.iter().map(|cert| pem("CERTIFICATE", cert)).collect();
        std::fs::write(dir.join("chain.pem"), chain).unwrap();
        std::fs::write(dir.join("key.pem"), pem("PRIVATE KEY", &self.key)).unwrap();
    }
}

/// A certificate of `ca` for `id` in files of `dir`, and the settings of an agent or a collector that name them.
pub fn given(dir: &Path, ca: &Authority, id: &str) -> String {
    std::fs::create_dir_all(dir.join("roots")).unwrap();
    let shown = ca.leaf(&leaf(id), &[]);
    shown.write(dir);
    Shown { chain: vec![ca.cert.clone()], key: shown.key }.write(&dir.join("roots"));
    let d = dir.display();
    format!("identity.cert = '{d}/chain.pem'\nidentity.key = '{d}/key.pem'\nidentity.roots = '{d}/roots/chain.pem'\n")
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let three = |part: &[u8]| {
        let bits = part.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - part.len()));
        let digit = |n: usize| if n <= part.len() { DIGITS[(bits >> (18 - 6 * n)) as usize & 63] as char } else { '=' };
        [digit(0), digit(1), digit(2), digit(3)].iter().collect::<String>()
    };
    bytes.chunks(3).map(three).collect()
}

/// The parameters of a good CA.
pub fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid(&mut params, -60, 24 * 3600);
    params
}

/// The parameters of a good leaf.
pub fn leaf(id: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![uri(id)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    valid(&mut params, -60, i64::try_from(HOUR.as_secs()).unwrap());
    params
}

pub fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

pub fn dns(text: &str) -> SanType {
    SanType::DnsName(text.try_into().unwrap())
}

/// Good from `from` until `until`, in seconds from now.
pub fn valid(params: &mut CertificateParams, from: i64, until: i64) {
    let at = |secs: i64| {
        let distance = Duration::from_secs(secs.unsigned_abs());
        if secs < 0 { SystemTime::now() - distance } else { SystemTime::now() + distance }
    };
    (params.not_before, params.not_after) = (at(from).into(), at(until).into());
}
