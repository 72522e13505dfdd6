//! What collectors tell agents: one whole document, versioned and signed.
//!
//! It is always complete, so that an agent needs only the newest. An agent keeps it on disk, loads it before its first
//! accept and never takes an older version than the one it has. It is signed by a collector's own certificate.

use serde::{Deserialize, Serialize};

use crate::enrol::Der;
use crate::identity::{Peer, PeerName, Sha256, SpiffeId, TrustDomain, Usage};
use crate::time::Timestamp;
use crate::tls::{self, Credential, Trust};

/// Keeps a signature of something else from being one of a directive.
const CONTEXT: &[u8] = b"sidewarden directive 1\0";
/// Most bytes of a document: it must fit a frame, in base64.
const MAX_DOCUMENT: usize = 700 << 10;

/// What is in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directive {
    /// Grows with every change.
    pub version: u64,
    /// For whom.
    pub trust_domain: TrustDomain,
    /// When it was made.
    pub issued_us: Timestamp,
    /// The roots of the trust domain.
    pub bundle: Vec<Der>,
    /// Who is not let in, whatever the certificate says.
    #[serde(default)]
    pub deny: Vec<Deny>,
}

/// One line of the deny list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Deny {
    /// One key, that is, one instance.
    Key {
        /// SHA-256 of the public key (SPKI).
        spki: Sha256,
        /// The reason given.
        why: String,
    },
    /// Every instance of a workload.
    Workload {
        /// Which.
        id: SpiffeId,
        /// The reason given.
        why: String,
    },
}

impl Directive {
    /// The line that denies `peer`, if there is one.
    pub fn denies(&self, peer: &Peer) -> Option<&Deny> {
        self.deny.iter().find(|deny| match deny {
            Deny::Key { spki, .. } => *spki == peer.spki,
            Deny::Workload { id, .. } => matches!(&peer.name, PeerName::Spiffe(name) if name == id),
        })
    }
}

/// A directive as it travels and is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed {
    /// The directive's JSON, exactly as it was signed.
    document: String,
    /// ECDSA P-256, SHA-256, DER.
    signature: Der,
    /// The signer's chain, leaf first.
    chain: Vec<Der>,
}

/// Why a directive does not count.
#[derive(Debug, thiserror::Error)]
pub enum DirectiveFault {
    /// Not of the form.
    #[error("the directive cannot be read: {0}")]
    Unreadable(String),
    /// The signer is no collector of the trust domain.
    #[error("the directive is signed by {0}, which is no collector of this trust domain")]
    WrongSigner(String),
    /// The signer's chain does not verify.
    #[error("the directive's signer cannot be verified: {0}")]
    Chain(String),
    /// The signature is not of this document.
    #[error("the directive's signature does not fit")]
    Signature,
    /// Signing failed.
    #[error("the directive cannot be signed: {0}")]
    Signing(String),
}

impl Signed {
    /// Signs `directive` with a collector's credential.
    pub fn sign(directive: &Directive, credential: &Credential) -> Result<Signed, DirectiveFault> {
        let document = serde_json::to_string(directive).map_err(|e| DirectiveFault::Signing(e.to_string()))?;
        if document.len() > MAX_DOCUMENT {
            return Err(DirectiveFault::Signing(format!(
                "it has {} bytes, the limit is {MAX_DOCUMENT}",
                document.len()
            )));
        }
        let message = [CONTEXT, document.as_bytes()].concat();
        let signature = credential.sign(&message).map_err(|e| DirectiveFault::Signing(e.to_string()))?;
        let chain = credential.chain().iter().map(|cert| Der(cert.to_vec())).collect();
        Ok(Signed { document, signature: Der(signature), chain })
    }

    /// The bytes of a frame or a file.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("it has string keys and no failing serializer")
    }

    /// Reads what [`Signed::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<Signed, DirectiveFault> {
        serde_json::from_slice(bytes).map_err(|e| DirectiveFault::Unreadable(e.to_string()))
    }

    /// The directive, once it is proven to come from a collector of a domain in `trust`.
    ///
    /// Whether its version is newer than the one at hand is the caller's question.
    pub fn open(&self, trust: &Trust, now: Timestamp) -> Result<Directive, DirectiveFault> {
        let chain: Vec<_> = self.chain.iter().map(|der| der.0.clone().into()).collect();
        let signer =
            tls::verify_chain(&chain, trust, Usage::Server, now).map_err(|e| DirectiveFault::Chain(e.to_string()))?;
        let directive: Directive =
            serde_json::from_str(&self.document).map_err(|e| DirectiveFault::Unreadable(e.to_string()))?;
        if signer.name != PeerName::Spiffe(tls::collector_id(&directive.trust_domain)) {
            return Err(DirectiveFault::WrongSigner(signer.name.to_string()));
        }
        let message = [CONTEXT, self.document.as_bytes()].concat();
        tls::verify_signature(&chain[0], &message, &self.signature.0).map_err(|_| DirectiveFault::Signature)?;
        Ok(directive)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::tests::Authority;

    fn directive(domain: &str) -> Directive {
        let spki = Sha256([4; 32]);
        Directive {
            version: 3,
            trust_domain: domain.parse().unwrap(),
            issued_us: Timestamp(1),
            bundle: vec![Der(vec![1])],
            deny: vec![
                Deny::Key { spki, why: "lost".into() },
                Deny::Workload { id: "spiffe://td/shop/old".parse().unwrap(), why: "retired".into() },
            ],
        }
    }

    #[test]
    fn a_collectors_directive_opens_after_travelling() {
        let ca = Authority::new("td");
        let signed = Signed::sign(&directive("td"), &ca.issue("spiffe://td/sidewarden/collector")).unwrap();
        let arrived = Signed::from_bytes(&signed.to_bytes()).unwrap();
        assert_eq!(arrived.open(&ca.trust(), Timestamp::now()).unwrap(), directive("td"));
    }

    #[test]
    fn nobody_else_can_sign_one() {
        let (ca, foreign) = (Authority::new("td"), Authority::new("td"));
        let agent = Signed::sign(&directive("td"), &ca.issue("spiffe://td/shop/orders")).unwrap();
        let stranger = Signed::sign(&directive("td"), &foreign.issue("spiffe://td/sidewarden/collector")).unwrap();
        let other_domain = Signed::sign(&directive("other"), &ca.issue("spiffe://td/sidewarden/collector")).unwrap();
        let now = Timestamp::now();
        assert!(matches!(agent.open(&ca.trust(), now), Err(DirectiveFault::WrongSigner(_))));
        assert!(matches!(stranger.open(&ca.trust(), now), Err(DirectiveFault::Chain(_))));
        assert!(matches!(other_domain.open(&ca.trust(), now), Err(DirectiveFault::WrongSigner(_))));
    }

    #[test]
    fn a_changed_document_does_not_open() {
        let ca = Authority::new("td");
        let mut signed = Signed::sign(&directive("td"), &ca.issue("spiffe://td/sidewarden/collector")).unwrap();
        signed.document = signed.document.replace("\"version\":3", "\"version\":4");
        assert!(matches!(signed.open(&ca.trust(), Timestamp::now()), Err(DirectiveFault::Signature)));
        assert!(matches!(Signed::from_bytes(b"{"), Err(DirectiveFault::Unreadable(_))));
    }

    #[test]
    fn the_deny_list_knows_keys_and_workloads() {
        let peer = |name: &str, spki| Peer {
            name: PeerName::Spiffe(name.parse().unwrap()),
            spki: Sha256([spki; 32]),
            serial: "1".into(),
            not_before: Timestamp(0),
            not_after: Timestamp(9),
        };
        let directive = directive("td");
        assert!(directive.denies(&peer("spiffe://td/shop/orders", 4)).is_some());
        assert!(directive.denies(&peer("spiffe://td/shop/old", 1)).is_some());
        assert!(directive.denies(&peer("spiffe://td/shop/orders", 1)).is_none());
    }
}
