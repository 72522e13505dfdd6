//! What people attest and sign: that a rule is kept which nobody can see, until a day.
//!
//! The envelope is DSSE (what in-toto and cosign use), so that other tools can sign and look into it; the keys are Ed25519 or
//! P-256, and each is named in the configuration.

use std::path::PathBuf;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, ED25519, EcdsaKeyPair, Ed25519KeyPair, UnparsedPublicKey,
};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer};
use serde::{Deserialize, Serialize};
use sidewarden_proto::config::Reader;
use sidewarden_proto::time::{Timestamp, end_of};
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

/// What the payload of an envelope is.
pub const PAYLOAD_TYPE: &str = "application/vnd.sidewarden.attestation+json";
/// References that may be attested: nobody but people can see them.
pub const REFERENCES: [&str; 8] = ["4.3", "4.4", "4.5", "4.11", "4.12", "7.5", "7.7", "7.10"];

/// Who may attest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attestor {
    /// The name under which it stands in evidence.
    pub name: String,
    /// Its public key, PEM.
    pub key_file: PathBuf,
}

/// Why an attestation is not taken.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum AttestError {
    /// It is no envelope, or its payload is no attestation.
    #[error("this is no attestation: {0}")]
    Malformed(String),
    /// No key of ours signed it.
    #[error("no key of `evidence.attestor` signed this")]
    Unsigned,
    /// A key cannot be used.
    #[error("{0}: this is no Ed25519 or P-256 key in PEM: {1}")]
    Key(PathBuf, String),
}

/// What is attested: the payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statement {
    /// The slug of the check.
    pub check: String,
    /// Whom it is about: `shop/orders`, `shop/*`, `*`.
    pub workload: String,
    /// Containers of the host that this workload's node agents judge, by name; may end with `*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// Who attests it.
    pub by: String,
    /// What was looked at, and how.
    pub why: String,
    /// When it was signed: of two about the same the later one counts.
    pub signed: String,
    /// The last day, or a time.
    pub until: String,
}

impl Statement {
    /// When it was signed, and when it ends.
    pub fn times(&self) -> Result<(Timestamp, Timestamp), AttestError> {
        let wrong = |name: &str, error| AttestError::Malformed(format!("`{name}` {error}"));
        let signed = self.signed.parse().map_err(|error| wrong("signed", error))?;
        Ok((signed, end_of(&self.until).map_err(|error| wrong("until", error))?))
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    payload_type: String,
    payload: String,
    signatures: Vec<Signature>,
}

#[derive(Serialize, Deserialize)]
struct Signature {
    sig: String,
    #[serde(default)]
    keyid: String,
}

/// A public key that may sign.
#[derive(Debug)]
pub struct Key {
    name: String,
    is_ed25519: bool,
    bytes: Vec<u8>,
}

/// One of the configuration.
pub(super) fn read(r: &mut Reader<'_>) -> Option<Attestor> {
    let (name, key_file) = (r.required::<String>("name"), r.required::<PathBuf>("key_file"));
    if name.as_ref().is_some_and(|name| name.trim().is_empty() || name.len() > 64 || name.chars().any(char::is_control))
    {
        r.fault("name", "must be one line of 1 to 64 bytes");
    }
    Some(Attestor { name: name?, key_file: key_file? })
}

impl Key {
    /// Reads the key of an attestor.
    pub fn load(attestor: &Attestor) -> Result<Key, AttestError> {
        let fault = |error: String| AttestError::Key(attestor.key_file.clone(), error);
        let pem = std::fs::read(&attestor.key_file).map_err(|error| fault(error.to_string()))?;
        Key::from_pem(&attestor.name, &pem).map_err(fault)
    }

    fn from_pem(name: &str, pem: &[u8]) -> Result<Key, String> {
        let der = SubjectPublicKeyInfoDer::from_pem_slice(pem).map_err(|error| error.to_string())?;
        let (_, spki) = SubjectPublicKeyInfo::from_der(&der).map_err(|error| error.to_string())?;
        let bytes = spki.subject_public_key.data.to_vec();
        let is_ed25519 = match spki.algorithm.algorithm.to_id_string().as_str() {
            "1.3.101.112" if bytes.len() == 32 => true,
            "1.2.840.10045.2.1" if bytes.len() == 65 => false,
            other => return Err(format!("its algorithm is {other}")),
        };
        Ok(Key { name: name.to_owned(), is_ed25519, bytes })
    }

    fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        match self.is_ed25519 {
            true => UnparsedPublicKey::new(&ED25519, &self.bytes).verify(message, signature).is_ok(),
            false => UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &self.bytes).verify(message, signature).is_ok(),
        }
    }
}

/// What is signed of an envelope: DSSE's pre-authentication encoding.
fn to_be_signed(payload: &[u8]) -> Vec<u8> {
    let head = format!("DSSEv1 {} {PAYLOAD_TYPE} {} ", PAYLOAD_TYPE.len(), payload.len());
    [head.as_bytes(), payload].concat()
}

/// What an envelope attests, and the name of the key that signed it.
pub fn open(envelope: &[u8], keys: &[Key]) -> Result<(Statement, String), AttestError> {
    let malformed = |error: &dyn std::fmt::Display| AttestError::Malformed(crate::table::clean(&error.to_string()));
    let envelope: Envelope = serde_json::from_slice(envelope).map_err(|error| malformed(&error))?;
    if envelope.payload_type != PAYLOAD_TYPE {
        return Err(AttestError::Malformed(format!("its payload is not {PAYLOAD_TYPE}")));
    }
    let payload = BASE64_STANDARD.decode(&envelope.payload).map_err(|error| malformed(&error))?;
    let message = to_be_signed(&payload);
    let signed_by = |signature: &Signature| {
        let signature = BASE64_STANDARD.decode(&signature.sig).ok()?;
        keys.iter().find(|key| key.verifies(&message, &signature))
    };
    let key = envelope.signatures.iter().take(8).find_map(signed_by).ok_or(AttestError::Unsigned)?;
    // Nothing of the payload is read before it is known to be ours.
    let statement: Statement = serde_json::from_slice(&payload).map_err(|error| malformed(&error))?;
    statement.times()?;
    Ok((statement, key.name.clone()))
}

/// Signs a statement with a private key, PKCS #8 in PEM.
pub fn sign(statement: &Statement, key: &[u8]) -> Result<String, AttestError> {
    let fault = |error: &dyn std::fmt::Display| AttestError::Key(PathBuf::from("the private key"), error.to_string());
    let der = PrivatePkcs8KeyDer::from_pem_slice(key).map_err(|error| fault(&error))?;
    let payload = serde_json::to_vec(statement).map_err(|error| AttestError::Malformed(error.to_string()))?;
    let message = to_be_signed(&payload);
    let signature = if let Ok(pair) = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der()) {
        pair.sign(&message).as_ref().to_vec()
    } else {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, der.secret_pkcs8_der());
        let pair = pair.map_err(|error| fault(&error))?;
        pair.sign(&SystemRandom::new(), &message).map_err(|error| fault(&error))?.as_ref().to_vec()
    };
    let envelope = Envelope {
        payload_type: PAYLOAD_TYPE.to_owned(),
        payload: BASE64_STANDARD.encode(payload),
        signatures: vec![Signature { sig: BASE64_STANDARD.encode(signature), keyid: String::new() }],
    };
    serde_json::to_string_pretty(&envelope).map_err(|error| AttestError::Malformed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Private and public, in PEM.
    struct Pair(String, String);

    fn pairs() -> [(&'static str, Pair); 2] {
        let of = |algorithm| {
            let pair = rcgen::KeyPair::generate_for(algorithm).unwrap();
            Pair(pair.serialize_pem(), pair.public_key_pem())
        };
        [("edward", of(&rcgen::PKCS_ED25519)), ("eve", of(&rcgen::PKCS_ECDSA_P256_SHA256))]
    }

    fn statement() -> Statement {
        Statement {
            check: "verified-packages".into(),
            workload: "shop/*".into(),
            container: None,
            by: "jane".into(),
            why: "apt verifies".into(),
            signed: "2026-11-01T00:00:00Z".into(),
            until: "2027-01-31".into(),
        }
    }

    fn keys(pairs: &[(&str, Pair)]) -> Vec<Key> {
        pairs.iter().map(|(name, pair)| Key::from_pem(name, pair.1.as_bytes()).unwrap()).collect()
    }

    #[test]
    fn what_a_known_key_signed_is_taken_and_what_another_did_is_not() {
        let pairs = pairs();
        for (name, pair) in &pairs {
            let envelope = sign(&statement(), pair.0.as_bytes()).unwrap();
            assert_eq!(open(envelope.as_bytes(), &keys(&pairs)), Ok((statement(), (*name).to_owned())));
            let others: Vec<Key> = keys(&pairs).into_iter().filter(|key| key.name != *name).collect();
            assert_eq!(open(envelope.as_bytes(), &others), Err(AttestError::Unsigned));
        }
    }

    #[test]
    fn a_changed_payload_or_type_is_not_taken() {
        let pairs = pairs();
        let envelope = sign(&statement(), pairs[0].1.0.as_bytes()).unwrap();
        let mut changed: Envelope = serde_json::from_str(&envelope).unwrap();
        let other = Statement { workload: "*".into(), ..statement() };
        changed.payload = BASE64_STANDARD.encode(serde_json::to_vec(&other).unwrap());
        let changed = serde_json::to_vec(&changed).unwrap();
        assert_eq!(open(&changed, &keys(&pairs)), Err(AttestError::Unsigned));
        let retyped = envelope.replace("sidewarden", "other");
        assert!(matches!(open(retyped.as_bytes(), &keys(&pairs)), Err(AttestError::Malformed(_))));
    }

    #[test]
    fn an_envelope_cut_at_any_byte_is_refused() {
        let pairs = pairs();
        let (envelope, keys) = (sign(&statement(), pairs[0].1.0.as_bytes()).unwrap(), keys(&pairs));
        for end in 0..envelope.len() {
            assert!(open(&envelope.as_bytes()[..end], &keys).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn a_statement_without_a_day_is_refused_though_it_is_signed() {
        let pairs = pairs();
        for wrong in [Statement { until: "soon".into(), ..statement() }, Statement { signed: "".into(), ..statement() }]
        {
            let envelope = sign(&wrong, pairs[0].1.0.as_bytes()).unwrap();
            let opened = open(envelope.as_bytes(), &keys(&pairs));
            assert!(matches!(opened, Err(AttestError::Malformed(_))), "{wrong:?}");
        }
    }

    #[test]
    fn keys_of_other_kinds_are_refused() {
        let private = &pairs()[0].1.0;
        let foreign = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let garbage = "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n";
        for bad in ["", garbage, private, &foreign.public_key_pem()] {
            assert!(Key::from_pem("x", bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(sign(&statement(), b"nonsense").is_err());
        assert!(sign(&statement(), foreign.serialize_pem().as_bytes()).is_err());
    }
}
