//! Certificates for the tests of this room.

use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use base64::Engine;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::pki_types::CertificateDer;
use sidewarden_proto::time::Timestamp;

/// When the tests take place.
pub const NOW: Timestamp = Timestamp::from_secs(1_800_000_000);

/// A CA with an RSA key of 1024 bits, made by openssl.
pub static RSA_1024: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let text = "\
        MIIB/DCCAWWgAwIBAgIUf+b7uG/ZONaiZ5MaZadbJRfqBNswDQYJKoZIhvcNAQELBQAwDzENMAsGA1UEAwwEd2VhazAgFw0yNjEx\
        MjIwOTE5MjdaGA8yMTI2MTAyOTA5MTkyN1owDzENMAsGA1UEAwwEd2VhazCBnzANBgkqhkiG9w0BAQEFAAOBjQAwgYkCgYEAuI55\
        vxR5KKXBxOEQfAdRRfittzGz+Fad5bIvQOzZJdPrMhoB53VX/vhqlNy78iwCP3fPlrwwMM0cuRIXZ6pdcrfW2CStol9CebvWwID/\
        F/FVQ61YlIOWzYoFn1K7X5ZxVa35qhDPi5s2gzRcW1w9fXR71v0YPMiXXwiBW6aqOfkCAwEAAaNTMFEwHQYDVR0OBBYEFGXzFfNN\
        FTPSiCQO8ZmqpHEpBcgwMB8GA1UdIwQYMBaAFGXzFfNNFTPSiCQO8ZmqpHEpBcgwMA8GA1UdEwEB/wQFMAMBAf8wDQYJKoZIhvcN\
        AQELBQADgYEAsQWYekTejqnhp4+7LgAZv3xzCD1QnkBvBTGGFgU3lY5ktruvfdd518v7HMTbgNlJX7DFbdKx35JBDahbuUwcvNqh\
        Wroo/azfkYbWxIvVCAin6B/ZHDFiyqHRsxa9NMbtnMA/z3GHa+AhxE6eOr2RHhYRKaLIHmOnC57xqGqB6NQ=";
    base64::prelude::BASE64_STANDARD.decode(text.replace(' ', "")).unwrap()
});

/// A CA that signs.
pub struct Ca {
    /// Its certificate.
    pub cert: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    /// A root.
    pub fn new(name: &str) -> Ca {
        Ca::with(name, |_| {})
    }

    /// A root with a change.
    pub fn with(name: &str, change: impl Fn(&mut CertificateParams)) -> Ca {
        let (mut params, key) = (params(name), KeyPair::generate().unwrap());
        change(&mut params);
        let cert = params.self_signed(&key).unwrap().der().clone();
        Ca { cert, issuer: Issuer::new(params, key) }
    }

    /// A CA below.
    pub fn intermediate(&self, name: &str) -> Ca {
        let (params, key) = (params(name), KeyPair::generate().unwrap());
        let cert = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        Ca { cert, issuer: Issuer::new(params, key) }
    }

    /// A leaf of this name.
    pub fn leaf(&self, uri: &str) -> CertificateDer<'static> {
        let mut params = params("leaf");
        params.is_ca = IsCa::ExplicitNoCa;
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.signed_by(&KeyPair::generate().unwrap(), &self.issuer).unwrap().der().clone()
    }
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = (at(NOW.minus(DAY)), at(NOW.plus(DAY * 365)));
    params
}

const DAY: Duration = Duration::from_secs(24 * 3600);

/// As rcgen wants it.
pub fn at(time: Timestamp) -> time::OffsetDateTime {
    SystemTime::from(time).into()
}

/// As PEM.
pub fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::prelude::BASE64_STANDARD.encode(der);
    let lines: Vec<&str> = (0..text.len()).step_by(64).map(|i| &text[i..text.len().min(i + 64)]).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// A value of DER.
fn value(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = (content.len() as u32).to_be_bytes();
    [&[tag, 0x84], &length[..], content].concat()
}

/// Certificates as `openssl crl2pkcs7 -nocrl` packs them.
pub fn pkcs7(certificates: &[&CertificateDer<'_>]) -> Vec<u8> {
    let kind = |last: u8| value(0x06, &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, last]);
    let all: Vec<u8> = certificates.iter().flat_map(|cert| cert.to_vec()).collect();
    let list = if all.is_empty() { Vec::new() } else { value(0xa0, &all) };
    let signed = [value(0x02, &[1]), value(0x31, &[]), value(0x30, &kind(1)), list, value(0x31, &[])].concat();
    value(0x30, &[kind(2), value(0xa0, &value(0x30, &signed))].concat())
}
