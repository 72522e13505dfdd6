//! What certificates are to each other, and whether one may be trusted as a root. Pure: certificates and the time.

use std::time::Duration;

use rustls::pki_types::CertificateDer;
use sidewarden_proto::identity::{Sha256, TrustDomain};
use sidewarden_proto::time::Timestamp;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::public_key::PublicKey;

/// The fewest bits of an RSA key.
const RSA_BITS: usize = 2048;
/// A root that ends sooner is worth a word.
const SOON: Duration = Duration::from_secs(90 * 24 * 3600);
/// Most characters of a name that are shown.
const MAX_NAME: usize = 120;

/// What a certificate is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A CA that signed itself.
    Root,
    /// A CA that another one signed.
    Intermediate,
    /// No CA.
    Leaf,
}

impl Kind {
    /// The word in tables.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Root => "root CA",
            Kind::Intermediate => "intermediate CA",
            Kind::Leaf => "leaf",
        }
    }
}

/// Why one may not be trusted as a root.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// No CA. Trusted as one, whoever has its key could make certificates for every name.
    #[error("it is a leaf, no CA: trust the CA that signed it, or say --allow-leaf")]
    Leaf,
    /// A CA that may not sign certificates.
    #[error("its key usage does not allow signing certificates")]
    MayNotSign,
    /// Its time is over.
    #[error("it ended at {0}")]
    Ended(Timestamp),
    /// Its time has not begun.
    #[error("it begins only at {0}: is this machine's clock right?")]
    NotYet(Timestamp),
    /// A key that can be broken, or that nobody here can check.
    #[error("its key is too weak or of a kind that is not in use: {0}")]
    WeakKey(String),
}

/// One certificate, as people want to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// The certificate.
    pub der: CertificateDer<'static>,
    /// What it is.
    pub kind: Kind,
    /// SHA-256 of it.
    pub sha256: Sha256,
    /// Whom it names.
    pub subject: String,
    /// Who signed it.
    pub issuer: String,
    /// Its key: `ECDSA P-256`.
    pub key: String,
    /// Begin of validity.
    pub not_before: Timestamp,
    /// End of validity.
    pub not_after: Timestamp,
    /// The trust domain that a SPIFFE root names.
    pub trust_domain: Option<TrustDomain>,
    /// Whom it speaks for: SPIFFE IDs and DNS names of it, or those that its CA is limited to.
    pub serves: Vec<String>,
    /// Whether no other certificate of the file has signed it.
    pub is_top: bool,
    /// Why it may not be trusted as a root.
    pub faults: Vec<Fault>,
}

impl Judged {
    /// Whether it is the one to be trusted: the others of a chain are shown by the peers themselves.
    pub fn is_wanted(&self, allow_leaf: bool) -> bool {
        self.is_top && (self.kind != Kind::Leaf || allow_leaf)
    }

    /// What keeps it out, with `allow_leaf` taken into account.
    pub fn refusals(&self, allow_leaf: bool) -> Vec<&Fault> {
        self.faults.iter().filter(|fault| !(allow_leaf && **fault == Fault::Leaf)).collect()
    }

    /// Whether it ends soon.
    pub fn ends_soon(&self, now: Timestamp) -> bool {
        self.not_after < now.plus(SOON)
    }
}

/// Judges all certificates of a file, in whatever order they lie.
pub fn judge(certificates: &[CertificateDer<'static>], now: Timestamp) -> Vec<Judged> {
    let parsed: Vec<_> = certificates
        .iter()
        .filter_map(|der| X509Certificate::from_der(der).ok().map(|(_, cert)| (der, cert)))
        .collect();
    let signed_here = |cert: &X509Certificate<'_>| {
        parsed.iter().any(|(_, other)| {
            other.as_raw() != cert.as_raw()
                && other.subject().as_raw() == cert.issuer().as_raw()
                && other.is_ca()
                && cert.verify_signature(Some(other.public_key())).is_ok()
        })
    };
    parsed.iter().map(|(der, cert)| judge_one(der, cert, !signed_here(cert), now)).collect()
}

fn judge_one(der: &CertificateDer<'static>, cert: &X509Certificate<'_>, is_top: bool, now: Timestamp) -> Judged {
    let at = |time: x509_parser::time::ASN1Time| Timestamp::from_secs(time.timestamp());
    let (not_before, not_after) = (at(cert.validity().not_before), at(cert.validity().not_after));
    let self_signed = cert.subject().as_raw() == cert.issuer().as_raw() && cert.verify_signature(None).is_ok();
    let kind = match (cert.is_ca(), self_signed) {
        (false, _) => Kind::Leaf,
        (true, true) => Kind::Root,
        (true, false) => Kind::Intermediate,
    };
    let (key, is_strong) = key_of(cert);
    let mut faults = Vec::new();
    if kind == Kind::Leaf {
        faults.push(Fault::Leaf);
    } else if cert.key_usage().ok().flatten().is_some_and(|usage| !usage.value.key_cert_sign()) {
        faults.push(Fault::MayNotSign);
    }
    if not_after <= now {
        faults.push(Fault::Ended(not_after));
    } else if not_before > now {
        faults.push(Fault::NotYet(not_before));
    }
    if !is_strong {
        faults.push(Fault::WeakKey(key.clone()));
    }
    let (subject, issuer) = (line(&cert.subject().to_string()), line(&cert.issuer().to_string()));
    let (trust_domain, serves) = serves(cert);
    let (der, sha256) = (der.clone(), Sha256::of(&[der]));
    Judged { der, kind, sha256, subject, issuer, key, not_before, not_after, trust_domain, serves, is_top, faults }
}

/// As one line of limited length: names come from whoever made the certificate.
fn line(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_NAME).collect()
}

fn key_of(cert: &X509Certificate<'_>) -> (String, bool) {
    let curve = |bits: usize| matches!(bits, 256 | 384 | 521 | 528);
    match cert.public_key().parsed() {
        Ok(PublicKey::RSA(key)) => (format!("RSA {}", key.key_size()), (RSA_BITS..=8192).contains(&key.key_size())),
        Ok(PublicKey::EC(point)) => {
            let bits = point.key_size();
            (format!("ECDSA P-{}", if bits == 528 { 521 } else { bits }), curve(bits) && has_nist_curve(cert))
        }
        _ if cert.public_key().algorithm.algorithm.to_id_string() == "1.3.101.112" => ("Ed25519".into(), true),
        _ => (format!("algorithm {}", cert.public_key().algorithm.algorithm), false),
    }
}

fn has_nist_curve(cert: &X509Certificate<'_>) -> bool {
    const NIST: [&str; 3] = ["1.2.840.10045.3.1.7", "1.3.132.0.34", "1.3.132.0.35"];
    let curve = cert.public_key().algorithm.parameters.as_ref().and_then(|any| any.as_oid().ok());
    curve.is_some_and(|oid| NIST.contains(&oid.to_id_string().as_str()))
}

/// The trust domain of a SPIFFE root, and all names.
fn serves(cert: &X509Certificate<'_>) -> (Option<TrustDomain>, Vec<String>) {
    let names = cert.subject_alternative_name().ok().flatten();
    let names = names.map(|san| san.value.general_names.clone()).unwrap_or_default();
    let word = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some(line(uri)),
        GeneralName::DNSName(dns) => Some(line(dns)),
        _ => None,
    };
    let mut words: Vec<String> = names.iter().filter_map(word).take(20).collect();
    let domain = match words.as_slice() {
        [one] => one.strip_prefix("spiffe://").and_then(|domain| domain.parse().ok()),
        _ => None,
    };
    if let Ok(Some(limits)) = cert.name_constraints() {
        let permitted = limits.value.permitted_subtrees.iter().flatten();
        words.extend(permitted.filter_map(|tree| word(&tree.base)).take(20).map(|name| format!("only {name}")));
    }
    (domain, words)
}

#[cfg(test)]
mod tests {
    use super::super::made_up::{Ca, NOW, RSA_1024, at};
    use super::*;

    fn one(certificates: &[CertificateDer<'static>], which: usize) -> Judged {
        judge(certificates, NOW)[which].clone()
    }

    #[test]
    fn a_chain_in_any_order_has_one_top() {
        let root = Ca::new("root");
        let (below, other) = (root.intermediate("below"), Ca::new("other"));
        let leaf = below.leaf("spiffe://partner.example/shop/web");
        let all = [leaf.clone(), below.cert.clone(), root.cert.clone(), other.cert.clone()];
        for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]] {
            let file: Vec<_> = order.iter().map(|i: &usize| all[*i].clone()).collect();
            let judged = judge(&file, NOW);
            let mut wanted: Vec<_> = judged.iter().filter(|j| j.is_wanted(false)).map(|j| j.subject.clone()).collect();
            wanted.sort();
            assert_eq!(wanted, ["CN=other", "CN=root"], "{order:?}");
            let kinds: Vec<Kind> =
                order.iter().map(|i| [Kind::Leaf, Kind::Intermediate, Kind::Root, Kind::Root][*i]).collect();
            assert_eq!(judged.iter().map(|j| j.kind).collect::<Vec<_>>(), kinds);
        }
        let half = judge(&[leaf, below.cert.clone()], NOW);
        assert_eq!(
            (half[1].is_wanted(false), half[1].kind),
            (true, Kind::Intermediate),
            "an intermediate may be the top"
        );
    }

    #[test]
    fn a_ca_of_the_same_name_is_not_taken_for_the_one_that_signed() {
        let (root, twin) = (Ca::new("root"), Ca::new("root"));
        let below = root.intermediate("below");
        assert!(one(&[below.cert.clone(), twin.cert.clone()], 0).is_top);
        assert!(!one(&[below.cert.clone(), root.cert.clone()], 0).is_top);
    }

    #[test]
    fn what_may_not_be_a_root_is_refused_with_its_reason() {
        let root = Ca::new("root");
        let hour = Duration::from_secs(3600);
        let dated = |from: Timestamp, until: Timestamp| {
            Ca::with("x", |params| (params.not_before, params.not_after) = (at(from), at(until))).cert
        };
        let no_signer = Ca::with("x", |params| params.key_usages = vec![rcgen::KeyUsagePurpose::CrlSign]).cert;
        for (cert, says) in [
            (root.cert.clone(), ""),
            (root.leaf("spiffe://partner.example/a"), "it is a leaf, no CA"),
            (dated(NOW.minus(hour * 2), NOW.minus(hour)), "it ended at"),
            (dated(NOW.plus(hour), NOW.plus(hour * 2)), "it begins only at"),
            (no_signer, "key usage"),
            (RSA_1024.to_vec().into(), "RSA 1024"),
        ] {
            let judged = one(&[cert], 0);
            let said: Vec<String> = judged.refusals(false).iter().map(ToString::to_string).collect();
            assert_eq!(said.is_empty(), says.is_empty(), "{said:?}");
            assert!(says.is_empty() || said.iter().any(|fault| fault.contains(says)), "{said:?} instead of {says}");
        }
        let leaf = one(&[root.leaf("spiffe://partner.example/a")], 0);
        assert!(leaf.is_wanted(true) && leaf.refusals(true).is_empty(), "when told");
    }

    #[test]
    fn a_spiffe_root_names_its_trust_domain() {
        let uri = |text: &str| rcgen::SanType::URI(text.try_into().unwrap());
        let named = |names: Vec<rcgen::SanType>| {
            one(&[Ca::with("x", |params| params.subject_alt_names = names.clone()).cert], 0)
        };
        let domain = |judged: &Judged| judged.trust_domain.as_ref().map(ToString::to_string);
        assert_eq!(domain(&named(vec![uri("spiffe://partner.example")])).as_deref(), Some("partner.example"));
        assert_eq!(domain(&named(vec![uri("spiffe://a"), uri("spiffe://b")])), None);
        assert_eq!(domain(&named(vec![uri("https://a")])), None);
        assert_eq!(domain(&named(vec![])), None);
    }

    #[test]
    fn names_from_outside_stay_one_line() {
        let judged = one(&[Ca::new(&format!("evil\n\x1b[31m{}", "x".repeat(500))).cert], 0);
        assert!(judged.subject.chars().all(|c| !c.is_control()) && judged.subject.chars().count() <= MAX_NAME);
    }
}
