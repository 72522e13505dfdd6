//! The one place that decides how TLS is spoken: provider, versions, groups, verifiers, ALPN. Resumption is off.
//!
//! A resumed handshake does not run the verifier, so it would let in a peer that was revoked or has expired since;
//! every mutually authenticated handshake here is a full one. A change of key, roots or floor makes a whole new config.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, SupportedKxGroup, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore, ServerConfig,
    SignatureScheme, SupportedProtocolVersion,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::crl::Revocation;
use crate::event::RefusalReason;
use crate::identity::{
    LeafFault, Peer, PeerName, Sha256, SpiffeId, TrustDomain, Usage, judge_issuer, judge_leaf, read_server,
};
use crate::time::Timestamp;
use crate::traffic::ToWhoHears;

/// Most certificates of a presented chain: building paths costs time, and an attacker chooses the chain.
const MAX_CHAIN: usize = 6;
/// Most roots that a client names: they must fit into the first packets of a handshake.
const MAX_HINTS: usize = 16;

/// The lowest version spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Floor {
    /// TLS 1.2 with ECDHE and AEAD, and 1.3.
    #[default]
    Tls12,
    /// TLS 1.3 only. QUIC needs it.
    Tls13,
}

static FROM_1_2: [&SupportedProtocolVersion; 2] = [&rustls::version::TLS13, &rustls::version::TLS12];

impl Floor {
    fn versions(self) -> &'static [&'static SupportedProtocolVersion] {
        match self {
            Floor::Tls12 => &FROM_1_2,
            Floor::Tls13 => &FROM_1_2[..1],
        }
    }
}

/// What is wrong with our own side: a key, a certificate, a set of roots.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A PEM file that holds no certificate, no key, or something else.
    #[error("the PEM cannot be read: {0}")]
    Pem(String),
    /// A key that does not belong to its certificate.
    #[error("the private key does not belong to the certificate")]
    KeyMismatch,
    /// Our own leaf breaks a rule.
    #[error("our certificate cannot be used: {0}")]
    Leaf(#[from] LeafFault),
    /// A root that is none.
    #[error("the trust bundle cannot be used: {0}")]
    Roots(String),
    /// Anything else that rustls says.
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
}

/// A key exchange group, by its name in the IANA registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// The hybrid of X25519 and ML-KEM-768: what is recorded today stays closed to a quantum computer.
    X25519MlKem768,
    /// Curve25519.
    X25519,
    /// NIST P-256.
    Secp256r1,
    /// NIST P-384.
    Secp384r1,
}

/// What is offered unless said otherwise, the post-quantum hybrid first.
pub const GROUPS: [Group; 4] = [Group::X25519MlKem768, Group::X25519, Group::Secp256r1, Group::Secp384r1];

impl Group {
    /// Its name.
    pub fn word(self) -> &'static str {
        match self {
            Group::X25519MlKem768 => "X25519MLKEM768",
            Group::X25519 => "X25519",
            Group::Secp256r1 => "secp256r1",
            Group::Secp384r1 => "secp384r1",
        }
    }

    fn supported(self) -> &'static dyn SupportedKxGroup {
        match self {
            Group::X25519MlKem768 => aws_lc_rs::kx_group::X25519MLKEM768,
            Group::X25519 => aws_lc_rs::kx_group::X25519,
            Group::Secp256r1 => aws_lc_rs::kx_group::SECP256R1,
            Group::Secp384r1 => aws_lc_rs::kx_group::SECP384R1,
        }
    }
}

impl std::str::FromStr for Group {
    type Err = String;
    fn from_str(text: &str) -> Result<Group, String> {
        let found = GROUPS.into_iter().find(|group| group.word().eq_ignore_ascii_case(text));
        found.ok_or_else(|| {
            let known: Vec<&str> = GROUPS.iter().map(|group| group.word()).collect();
            format!("`{text}` is no group that is spoken here: {}", known.join(", "))
        })
    }
}

/// aws-lc-rs with the groups in our order: see [`provider_with`].
pub fn provider() -> Arc<CryptoProvider> {
    provider_with(&GROUPS)
}

/// aws-lc-rs with these groups, in this order.
///
/// They are listed, because the order that rustls chooses by itself depends on its features. AES-128-GCM goes before
/// AES-256-GCM: it is the faster one, and neither is within anybody's reach.
pub fn provider_with(groups: &[Group]) -> Arc<CryptoProvider> {
    let kx_groups = groups.iter().map(|group| group.supported()).collect();
    let mut provider = CryptoProvider { kx_groups, ..aws_lc_rs::default_provider() };
    provider.cipher_suites.sort_by_key(|suite| suite.suite() == rustls::CipherSuite::TLS13_AES_256_GCM_SHA384);
    let tls13 = |suite: &rustls::SupportedCipherSuite| suite.tls13().is_none();
    provider.cipher_suites.sort_by_key(tls13);
    Arc::new(provider)
}

/// The name every collector of `domain` bears. Nothing under `sidewarden/` is given to agents.
pub fn collector_id(domain: &TrustDomain) -> SpiffeId {
    domain.workload("sidewarden/collector").expect("the path is a constant that follows the rules")
}

/// Whether this is the name of a collector: the one that makes the directives, or one below it, whose word on directives counts
/// for nothing.
pub fn is_collector(id: &SpiffeId) -> bool {
    let below = id.path().strip_prefix("sidewarden/collector");
    below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The common name of an issuing CA that was signed for a further collector: what bears it hands directives out, and makes none.
pub const MEMBER_CA: &str = "Sidewarden issuing, further collector";

/// Whether the issuing CA of a further collector is in `chain`, leaf first.
pub fn is_of_member(chain: &[CertificateDer<'_>]) -> Result<bool, LeafFault> {
    let bears = |cert: &X509Certificate<'_>| {
        let mut names = cert.subject().iter_common_name();
        names.any(|name| name.as_str().is_ok_and(|name| name == MEMBER_CA))
    };
    let cas = chain.iter().skip(1).map(parse).collect::<Result<Vec<_>, _>>()?;
    Ok(cas.iter().any(bears))
}

/// A key with its certificate chain.
#[derive(Clone)]
pub struct Credential {
    key: Arc<CertifiedKey>,
    peer: Arc<Peer>,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credential({}, serial {})", self.peer.name, self.peer.serial)
    }
}

impl Credential {
    /// From PEM: a chain, leaf first, and its private key.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Credential, TlsError> {
        let chain = certificates(chain)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| TlsError::Pem(format!("private key: {e}")))?;
        Credential::from_der(chain, key)
    }

    /// From a chain, leaf first, and its private key. The key must fit and the leaf must keep the rules.
    pub fn from_der(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Credential, TlsError> {
        let Some(leaf) = chain.first() else { return Err(TlsError::Pem("there is no certificate in it".into())) };
        let peer = Arc::new(judge_leaf(leaf, Usage::Client).or_else(|_| judge_leaf(leaf, Usage::Server))?);
        let key = provider().key_provider.load_private_key(key)?;
        let key = CertifiedKey::new(chain, key);
        key.keys_match().map_err(|_| TlsError::KeyMismatch)?;
        Ok(Credential { key: Arc::new(key), peer })
    }

    /// The same for a server whose clients are people with their browsers: whatever those take is good, a self-signed one too.
    pub fn for_people(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Credential, TlsError> {
        let Some(leaf) = chain.first() else { return Err(TlsError::Pem("there is no certificate in it".into())) };
        let peer = Arc::new(read_server(leaf)?);
        let key = CertifiedKey::new(chain, provider().key_provider.load_private_key(key)?);
        key.keys_match().map_err(|_| TlsError::KeyMismatch)?;
        Ok(Credential { key: Arc::new(key), peer })
    }

    /// The chain, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    /// Whom the leaf names, and until when.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Signs `message`: ECDSA P-256 with SHA-256.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, TlsError> {
        let signer = self.key.key.choose_scheme(&[SignatureScheme::ECDSA_NISTP256_SHA256]);
        Ok(signer.ok_or_else(|| TlsError::Pem("only a P-256 key can sign here".into()))?.sign(message)?)
    }

    fn resolver(&self) -> Arc<SingleCertAndKey> {
        Arc::new(SingleCertAndKey::from(self.key.clone()))
    }
}

/// Every certificate of a PEM text; an error if there is none.
pub fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = read.map_err(|e| TlsError::Pem(e.to_string()))?;
    if found.is_empty() { Err(TlsError::Pem("there is no certificate in it".into())) } else { Ok(found) }
}

/// Whom we trust to say who somebody is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trust {
    /// The roots of each trust domain. A SPIFFE ID counts only under the roots of its own domain.
    pub domains: BTreeMap<TrustDomain, Vec<CertificateDer<'static>>>,
    /// The roots for peers that have DNS names and no SPIFFE ID. Empty: there are none.
    pub dns_roots: Vec<CertificateDer<'static>>,
    /// Revocation lists; `None`: none are asked for.
    pub revocation: Option<Revocation>,
}

impl Trust {
    /// One domain with its roots.
    pub fn single(domain: TrustDomain, roots: Vec<CertificateDer<'static>>) -> Trust {
        Trust { domains: BTreeMap::from([(domain, roots)]), dns_roots: Vec::new(), revocation: None }
    }

    /// Adds roots, to those that a domain has already.
    pub fn add(&mut self, domains: &BTreeMap<TrustDomain, Vec<CertificateDer<'static>>>) {
        for (domain, roots) in domains {
            let have = self.domains.entry(domain.clone()).or_default();
            let new: Vec<_> = roots.iter().filter(|root| !have.contains(root)).cloned().collect();
            have.extend(new);
        }
    }
}

fn root_store(roots: &[CertificateDer<'static>]) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone()).map_err(|e| TlsError::Roots(e.to_string()))?;
    }
    if store.is_empty() { Err(TlsError::Roots("it is empty".into())) } else { Ok(store) }
}

/// Whom a client wants to reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// One workload.
    Workload(SpiffeId),
    /// Any of these.
    AnyOf(Vec<SpiffeId>),
    /// A foreign server by its DNS name.
    Dns(String),
    /// Any collector of a trust domain.
    Collector(TrustDomain),
}

impl Expect {
    fn is_met_by(&self, name: &PeerName) -> bool {
        match (self, name) {
            (Expect::Workload(id), PeerName::Spiffe(name)) => id == name,
            (Expect::AnyOf(ids), PeerName::Spiffe(name)) => ids.contains(name),
            (Expect::Collector(domain), PeerName::Spiffe(name)) => name.trust_domain() == *domain && is_collector(name),
            (Expect::Dns(host), PeerName::Dns(names)) => names.iter().any(|name| dns_matches(name, host)),
            _ => false,
        }
    }
}

/// Whether the DNS name of a certificate covers `host`; a wildcard stands for one whole leftmost label (RFC 9525).
pub fn dns_matches(name: &str, host: &str) -> bool {
    let (name, host) = (name.trim_end_matches('.'), host.trim_end_matches('.'));
    if name.eq_ignore_ascii_case(host) {
        return !name.contains('*');
    }
    let (Some(suffix), Some((label, rest))) = (name.strip_prefix("*."), host.split_once('.')) else { return false };
    !label.is_empty() && suffix.contains('.') && !suffix.contains('*') && suffix.eq_ignore_ascii_case(rest)
}

/// Why a peer's certificate was not accepted, beyond what webpki says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerFault {
    /// The leaf breaks a rule, or a CA that it is shown with does.
    #[error(transparent)]
    Leaf(#[from] LeafFault),
    /// Nobody vouches for this trust domain, or for DNS names.
    #[error("no root is known for {0}")]
    UnknownDomain(String),
    /// Somebody else answers.
    #[error("{found} answers where {expected} was expected")]
    WrongPeer {
        /// Who.
        found: String,
        /// Whom we wanted.
        expected: String,
    },
    /// Too many certificates.
    #[error("a chain of {0} certificates is longer than {MAX_CHAIN}")]
    LongChain(usize),
    /// On a revocation list.
    #[error("its certificate, or a CA of its chain, is on the revocation list of whoever issued it")]
    Listed,
    /// Nobody can tell whether it was revoked.
    #[error("there is no revocation list of one of its CAs, and `trust.crl_mode` is strict")]
    NoRevocationList,
    /// The list is too old to tell.
    #[error("the revocation list of one of its CAs has ended, and `trust.crl_mode` is strict")]
    StaleRevocationList,
    /// The list cannot be used.
    #[error("the revocation lists cannot be used for it: {0}")]
    Revocation(String),
    /// The pinned CA is not in the chain.
    #[error("the collector's CA is not the pinned one: this is another collector, or the token is for another one")]
    PinMismatch,
}

impl From<PeerFault> for rustls::Error {
    fn from(fault: PeerFault) -> rustls::Error {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(fault))))
    }
}

/// The fault of ours inside a rustls error, if there is one.
pub fn fault_of(error: &rustls::Error) -> Option<&PeerFault> {
    let rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) = error else { return None };
    inner.downcast_ref()
}

/// The closed word for a failed handshake.
pub fn refusal_of(error: &rustls::Error) -> RefusalReason {
    use rustls::{AlertDescription as Alert, Error, PeerIncompatible as Peer};
    if let Some(fault) = fault_of(error) {
        return match fault {
            PeerFault::UnknownDomain(_) | PeerFault::PinMismatch => RefusalReason::UnknownCa,
            PeerFault::WrongPeer { .. } => RefusalReason::WrongPeer,
            PeerFault::Listed => RefusalReason::Revoked,
            PeerFault::NoRevocationList | PeerFault::StaleRevocationList | PeerFault::Revocation(_) => {
                RefusalReason::RevocationUnknown
            }
            PeerFault::Leaf(_) | PeerFault::LongChain(_) => RefusalReason::BadCertificate,
        };
    }
    match error {
        Error::NoCertificatesPresented => RefusalReason::NoCertificate,
        Error::InvalidCertificate(fault) => certificate_refusal(fault),
        Error::AlertReceived(Alert::ProtocolVersion) => RefusalReason::ProtocolVersion,
        Error::AlertReceived(_) => RefusalReason::RefusedByPeer,
        Error::PeerIncompatible(Peer::ServerDoesNotSupportTls12Or13 | Peer::Tls12NotOffered) => {
            RefusalReason::ProtocolVersion
        }
        Error::PeerIncompatible(Peer::Tls13RequiredForQuic | Peer::SupportedVersionsExtensionRequired) => {
            RefusalReason::ProtocolVersion
        }
        _ => RefusalReason::HandshakeFailed,
    }
}

fn certificate_refusal(fault: &CertificateError) -> RefusalReason {
    use CertificateError as Fault;
    match fault {
        Fault::UnknownIssuer | Fault::BadSignature => RefusalReason::UnknownCa,
        Fault::Expired | Fault::ExpiredContext { .. } | Fault::NotValidYet | Fault::NotValidYetContext { .. } => {
            RefusalReason::Expired
        }
        Fault::Revoked => RefusalReason::Revoked,
        _ => RefusalReason::BadCertificate,
    }
}

/// Judges a presented chain: length, leaf rules, and a path to a root of the leaf's own trust domain.
///
/// `chain` is leaf first. The key's possession is proven elsewhere: by the handshake, or by a signature.
pub fn verify_chain(
    chain: &[CertificateDer<'_>],
    trust: &Trust,
    usage: Usage,
    now: Timestamp,
) -> Result<Peer, rustls::Error> {
    Verifier::new(trust).map_err(|e| rustls::Error::General(e.to_string()))?.verify(chain, usage, now)
}

/// [`Trust`], made ready to judge many chains.
#[derive(Debug)]
pub struct Verifier(Anchors);

impl Verifier {
    /// For one set of roots and revocation lists.
    pub fn new(trust: &Trust) -> Result<Verifier, TlsError> {
        Anchors::new(trust).map(Verifier)
    }

    /// The same as [`verify_chain`].
    pub fn verify(&self, chain: &[CertificateDer<'_>], usage: Usage, now: Timestamp) -> Result<Peer, rustls::Error> {
        let Some((leaf, rest)) = chain.split_first() else { return Err(rustls::Error::NoCertificatesPresented) };
        let now = Duration::from_secs(u64::try_from(now.as_secs()).unwrap_or(0));
        self.0.verify(leaf, rest, usage, UnixTime::since_unix_epoch(now))
    }
}

/// [`Trust`], made ready for many handshakes.
#[derive(Debug)]
struct Anchors {
    domains: BTreeMap<TrustDomain, Roots>,
    dns: Option<Roots>,
    revocation: Option<Revocation>,
    provider: Arc<CryptoProvider>,
}

/// The roots of one domain, as each end needs them.
#[derive(Debug)]
struct Roots {
    store: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
}

impl Roots {
    fn new(roots: &[CertificateDer<'static>]) -> Result<Roots, TlsError> {
        let store = Arc::new(root_store(roots)?);
        let clients = WebPkiClientVerifier::builder_with_provider(store.clone(), provider()).build();
        Ok(Roots { store, clients: clients.map_err(|e| TlsError::Roots(e.to_string()))? })
    }
}

impl Anchors {
    fn new(trust: &Trust) -> Result<Anchors, TlsError> {
        let domain = |(name, roots): (&TrustDomain, &Vec<_>)| Ok::<_, TlsError>((name.clone(), Roots::new(roots)?));
        let dns = (!trust.dns_roots.is_empty()).then(|| Roots::new(&trust.dns_roots)).transpose()?;
        let domains = trust.domains.iter().map(domain).collect::<Result<_, _>>()?;
        Ok(Anchors { domains, dns, revocation: trust.revocation.clone(), provider: provider() })
    }

    fn roots_for(&self, name: &PeerName) -> Result<&Roots, PeerFault> {
        let roots = match name {
            PeerName::Spiffe(id) => self.domains.get(&id.trust_domain()),
            PeerName::Dns(_) => self.dns.as_ref(),
        };
        roots.ok_or_else(|| PeerFault::UnknownDomain(domain_word(name)))
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
    ) -> Result<Peer, rustls::Error> {
        if rest.len() >= MAX_CHAIN {
            return Err(PeerFault::LongChain(rest.len() + 1).into());
        }
        let peer = judge_leaf(leaf, usage).map_err(PeerFault::from)?;
        let roots = self.roots_for(&peer.name)?;
        let is_workload = matches!(peer.name, PeerName::Spiffe(_));
        rest.iter().try_for_each(|ca| judge_issuer(ca, is_workload)).map_err(PeerFault::from)?;
        match usage {
            Usage::Client => {
                roots.clients.verify_client_cert(leaf, rest, now)?;
            }
            Usage::Server => {
                let algorithms = self.provider.signature_verification_algorithms.all;
                let leaf = ParsedCertificate::try_from(leaf)?;
                verify_server_cert_signed_by_trust_anchor(&leaf, &roots.store, rest, now, algorithms)?;
            }
        }
        if let Some(revocation) = &self.revocation {
            let algorithms = self.provider.signature_verification_algorithms.all;
            revocation.check((leaf, rest), &roots.store.roots, algorithms, (&peer.name, usage), now)?;
        }
        Ok(peer)
    }
}

fn domain_word(name: &PeerName) -> String {
    match name {
        PeerName::Spiffe(id) => format!("trust domain {}", id.trust_domain()),
        PeerName::Dns(_) => "peers with DNS names".into(),
    }
}

/// Whom a chain that was verified names, and by which of its CAs.
pub fn peer_of(chain: &[CertificateDer<'_>], usage: Usage) -> Result<Peer, LeafFault> {
    peer_under(chain, &[], usage)
}

/// The same, where a root of `trust` may have signed without being shown.
pub fn peer_with(chain: &[CertificateDer<'_>], trust: &Trust, usage: Usage) -> Result<Peer, LeafFault> {
    let leaf = chain.first().ok_or_else(|| LeafFault::Unreadable("there is none".into()))?;
    let roots = match judge_leaf(leaf, usage)?.name {
        PeerName::Spiffe(id) => trust.domains.get(&id.trust_domain()).map_or(&[][..], Vec::as_slice),
        PeerName::Dns(_) => &trust.dns_roots,
    };
    peer_under(chain, roots, usage)
}

/// Which of several paths was taken is not told by the verifier: each CA that was shown counts, and each root whose name
/// is that of an issuer. A path goes by names, so none that could have been taken is missing.
fn peer_under(chain: &[CertificateDer<'_>], roots: &[CertificateDer<'_>], usage: Usage) -> Result<Peer, LeafFault> {
    let (leaf, rest) = chain.split_first().ok_or_else(|| LeafFault::Unreadable("there is none".into()))?;
    let peer = judge_leaf(leaf, usage)?;
    let shown = chain.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    let is_issuer = |root: &X509Certificate<'_>| shown.iter().any(|c| c.issuer().as_raw() == root.subject().as_raw());
    let mut issuers = rest.iter().map(spki_of).collect::<Result<Vec<_>, _>>()?;
    for root in roots {
        let root = parse(root)?;
        let spki = Sha256::of(&[root.public_key().raw]);
        if is_issuer(&root) && !issuers.contains(&spki) {
            issuers.push(spki);
        }
    }
    Ok(Peer { issuers: issuers.into(), ..peer })
}

fn parse<'a>(cert: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, LeafFault> {
    X509Certificate::from_der(cert).map(|(_, cert)| cert).map_err(|e| LeafFault::Unreadable(e.to_string()))
}

/// Whether `signature` (ECDSA P-256, SHA-256, DER) is the leaf's over `message`.
pub fn verify_signature(leaf: &CertificateDer<'_>, message: &[u8], signature: &[u8]) -> Result<(), LeafFault> {
    use ::aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
    let (_, cert) = X509Certificate::from_der(leaf).map_err(|e| LeafFault::Unreadable(e.to_string()))?;
    let key = &cert.public_key().subject_public_key.data;
    let check = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key).verify(message, signature);
    check.map_err(|_| LeafFault::Unreadable("its signature does not fit".into()))
}

/// SHA-256 of the public key (SPKI) of a certificate: what a pin is.
pub fn spki_of(cert: &CertificateDer<'_>) -> Result<Sha256, LeafFault> {
    Ok(Sha256::of(&[parse(cert)?.public_key().raw]))
}

/// When a certificate begins to be valid.
pub fn not_before(cert: &CertificateDer<'_>) -> Result<crate::time::Timestamp, LeafFault> {
    let (_, cert) = X509Certificate::from_der(cert).map_err(|e| LeafFault::Unreadable(e.to_string()))?;
    Ok(crate::time::Timestamp::from_secs(cert.validity().not_before.timestamp()))
}

/// When a certificate begins, and when it ends.
pub fn validity(cert: &CertificateDer<'_>) -> Result<(Timestamp, Timestamp), LeafFault> {
    let (_, cert) = X509Certificate::from_der(cert).map_err(|e| LeafFault::Unreadable(e.to_string()))?;
    let at = |time: x509_parser::time::ASN1Time| Timestamp::from_secs(time.timestamp());
    Ok((at(cert.validity().not_before), at(cert.validity().not_after)))
}

/// A server whose clients must show a certificate that `trust` verifies.
pub fn server_config(
    credential: &Credential,
    trust: &Trust,
    floor: Floor,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, TlsError> {
    server_config_with(&GROUPS, credential, trust, floor, alpn)
}

/// The same, with these groups only.
pub fn server_config_with(
    groups: &[Group],
    credential: &Credential,
    trust: &Trust,
    floor: Floor,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = provider_with(groups);
    let verifier = StrictClients { anchors: Anchors::new(trust)?, provider: provider.clone() };
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(floor.versions())?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(credential.resolver());
    Ok(finish_server(config, alpn))
}

/// A server with two certificates, whose clients say which roots they go by (RFC 8446, 4.2.4): whoever names one of `roots`, and
/// none of those of `credential`, is shown `other`.
pub fn server_config_with_another(
    credential: &Credential,
    (other, roots): (&Credential, &[CertificateDer<'static>]),
    trust: &Trust,
    floor: Floor,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = provider();
    let verifier = StrictClients { anchors: Anchors::new(trust)?, provider: provider.clone() };
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(floor.versions())?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(ByRoots::new(credential, other, roots)?));
    Ok(finish_server(config, alpn))
}

/// The same for clients that show no certificate.
pub fn server_config_without_client_with_another(
    credential: &Credential,
    (other, roots): (&Credential, &[CertificateDer<'static>]),
    floor: Floor,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, TlsError> {
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(floor.versions())?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(ByRoots::new(credential, other, roots)?));
    Ok(finish_server(config, alpn))
}

/// Chooses between two certificates by the roots that the client goes by.
#[derive(Debug)]
struct ByRoots {
    keys: (Arc<CertifiedKey>, Arc<CertifiedKey>),
    roots: (Vec<DistinguishedName>, Vec<DistinguishedName>),
}

impl ByRoots {
    fn new(
        credential: &Credential,
        other: &Credential,
        roots: &[CertificateDer<'static>],
    ) -> Result<ByRoots, TlsError> {
        let keys = (credential.key.clone(), other.key.clone());
        // The last one of a chain may be its root, or is of a CA below it.
        let top = credential.chain().last().cloned().into_iter().collect::<Vec<_>>();
        Ok(ByRoots { keys, roots: (subjects(&top), root_store(roots)?.subjects()) })
    }
}

/// The names of `roots`, as far as they can be read: a name that is missing is only not chosen by.
fn subjects(roots: &[CertificateDer<'static>]) -> Vec<DistinguishedName> {
    root_store(roots).map(|store| store.subjects()).unwrap_or_default()
}

impl ResolvesServerCert for ByRoots {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let named = hello.certificate_authorities().unwrap_or_default();
        let is_of =
            |name: &DistinguishedName, roots: &[DistinguishedName]| roots.iter().any(|r| r.as_ref() == name.as_ref());
        let names_one_of = |roots: &[DistinguishedName]| named.iter().any(|name| is_of(name, roots));
        let other = names_one_of(&self.roots.1) && !names_one_of(&self.roots.0);
        Some(if other { self.keys.1.clone() } else { self.keys.0.clone() })
    }
}

/// A server whose clients show no certificate: enrolment and the HTTPS API, which know their callers by a token.
pub fn server_config_without_client(
    credential: &Credential,
    floor: Floor,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, TlsError> {
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(floor.versions())?
        .with_no_client_auth()
        .with_cert_resolver(credential.resolver());
    Ok(finish_server(config, alpn))
}

fn finish_server(mut config: ServerConfig, alpn: &[&[u8]]) -> Arc<ServerConfig> {
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    // The agent's record layer takes the traffic keys over once the handshake is done.
    config.enable_secret_extraction = true;
    config.key_log = Arc::new(ToWhoHears);
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Arc::new(config)
}

/// A client that shows `credential` and accepts nobody but `expect`.
pub fn client_config(
    credential: &Credential,
    trust: &Trust,
    expect: Expect,
    floor: Floor,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, TlsError> {
    client_config_with(&GROUPS, credential, trust, expect, floor, alpn)
}

/// The same, with these groups only.
pub fn client_config_with(
    groups: &[Group],
    credential: &Credential,
    trust: &Trust,
    expect: Expect,
    floor: Floor,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = provider_with(groups);
    let hints = match &expect {
        Expect::Collector(domain) => Some(hints(trust, domain)),
        _ => None,
    };
    let verifier = StrictServer { anchors: Anchors::new(trust)?, expect, hints, provider: provider.clone() };
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(floor.versions())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(credential.resolver());
    Ok(finish_client(config, alpn))
}

/// The names of the roots of `domain`: a collector may have certificates of several CAs, and shows the one that is asked for.
fn hints(trust: &Trust, domain: &TrustDomain) -> Vec<DistinguishedName> {
    let roots = trust.domains.get(domain).map_or(&[][..], Vec::as_slice);
    subjects(roots).into_iter().take(MAX_HINTS).collect()
}

/// A client without a certificate that knows the collector by the hash of its root CA's public key.
pub fn pinned_client_config(pin: Sha256, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, TlsError> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(Floor::Tls13.versions())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedServer { pin, provider: provider() }))
        .with_no_client_auth();
    Ok(finish_client(config, alpn))
}

/// A server that takes every client which proves to have the key of the certificate that it shows, whatever that says.
/// For `insecure_trust_all` alone.
pub fn insecure_server_config(groups: &[Group], credential: &Credential) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = provider_with(groups);
    let config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(Floor::Tls12.versions())?
        .with_client_cert_verifier(Arc::new(AnyKey { provider }))
        .with_cert_resolver(credential.resolver());
    Ok(finish_server(config, &[]))
}

/// The same for a client: whoever answers is taken.
pub fn insecure_client_config(groups: &[Group], credential: &Credential) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = provider_with(groups);
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(Floor::Tls12.versions())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyKey { provider }))
        .with_client_cert_resolver(credential.resolver());
    Ok(finish_client(config, &[]))
}

/// Who is there where nobody vouches for anybody: a key, and nothing but that. It counts until `until`.
pub fn unverified_peer(chain: &[CertificateDer<'_>], until: Timestamp) -> Result<Peer, LeafFault> {
    let leaf = chain.first().ok_or_else(|| LeafFault::Unreadable("there is none".into()))?;
    let (_, cert) = X509Certificate::from_der(leaf).map_err(|e| LeafFault::Unreadable(e.to_string()))?;
    let spki = Sha256::of(&[cert.public_key().raw]);
    // No host name has a colon: nobody can bear this one.
    let name = PeerName::Dns(vec![format!("unverified:{}", &spki.to_string()[..16])]);
    let (serial, not_before) = (cert.serial.to_str_radix(16), Timestamp::from_secs(0));
    Ok(Peer { name, spki, serial, issuers: Arc::default(), not_before, not_after: until })
}

fn finish_client(mut config: ClientConfig, alpn: &[&[u8]]) -> Arc<ClientConfig> {
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.enable_secret_extraction = true;
    config.key_log = Arc::new(ToWhoHears);
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Arc::new(config)
}

/// Accepts clients that [`verify_chain`] accepts.
#[derive(Debug)]
struct StrictClients {
    anchors: Anchors,
    provider: Arc<CryptoProvider>,
}

/// Accepts the one server that is expected.
#[derive(Debug)]
struct StrictServer {
    anchors: Anchors,
    expect: Expect,
    /// What the server is told of whose certificates we take.
    hints: Option<Vec<DistinguishedName>>,
    provider: Arc<CryptoProvider>,
}

/// Accepts a collector under the pinned root.
#[derive(Debug)]
struct PinnedServer {
    pin: Sha256,
    provider: Arc<CryptoProvider>,
}

/// Accepts everybody who has the key of the certificate that is shown.
#[derive(Debug)]
struct AnyKey {
    provider: Arc<CryptoProvider>,
}

/// The part of a verifier that is always the same: the handshake's own signature.
macro_rules! handshake_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            let algorithms = &self.provider.signature_verification_algorithms;
            rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            let algorithms = &self.provider.signature_verification_algorithms;
            rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.provider.signature_verification_algorithms.supported_schemes()
        }
    };
}

impl ClientCertVerifier for StrictClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.anchors.verify(leaf, rest, Usage::Client, now)?;
        Ok(ClientCertVerified::assertion())
    }

    handshake_signatures!();
}

impl ClientCertVerifier for AnyKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _rest: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    handshake_signatures!();
}

impl ServerCertVerifier for AnyKey {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _rest: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    handshake_signatures!();
}

impl ServerCertVerifier for StrictServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let peer = self.anchors.verify(leaf, rest, Usage::Server, now)?;
        if self.expect.is_met_by(&peer.name) {
            return Ok(ServerCertVerified::assertion());
        }
        Err(PeerFault::WrongPeer { found: peer.name.to_string(), expected: format!("{:?}", self.expect) }.into())
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        self.hints.as_deref()
    }

    handshake_signatures!();
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let root = rest.iter().find(|cert| spki_of(cert).is_ok_and(|spki| spki == self.pin));
        let root = root.ok_or(PeerFault::PinMismatch)?.clone().into_owned();
        let named = judge_leaf(leaf, Usage::Server).map_err(PeerFault::from)?;
        let PeerName::Spiffe(id) = &named.name else {
            return Err(PeerFault::UnknownDomain(domain_word(&named.name)).into());
        };
        let trust = Trust::single(id.trust_domain(), vec![root]);
        let anchors = Anchors::new(&trust).map_err(|e| rustls::Error::General(e.to_string()))?;
        let peer = anchors.verify(leaf, rest, Usage::Server, now)?;
        let expected = collector_id(&id.trust_domain());
        if peer.name == PeerName::Spiffe(expected.clone()) {
            return Ok(ServerCertVerified::assertion());
        }
        Err(PeerFault::WrongPeer { found: peer.name.to_string(), expected: expected.to_string() }.into())
    }

    handshake_signatures!();
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::{Read, Write};

    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
    };

    use super::*;

    /// A root with its key.
    pub(crate) struct Authority {
        domain: TrustDomain,
        root: CertificateDer<'static>,
        issuer: Issuer<'static, KeyPair>,
    }

    impl Authority {
        pub(crate) fn new(domain: &str) -> Authority {
            Authority::called("rcgen self signed cert", domain)
        }

        pub(crate) fn called(name: &str, domain: &str) -> Authority {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
            let key = KeyPair::generate().unwrap();
            let root = params.self_signed(&key).unwrap().der().clone();
            Authority { domain: domain.parse().unwrap(), root, issuer: Issuer::new(params, key) }
        }

        pub(crate) fn trust(&self) -> Trust {
            Trust::single(self.domain.clone(), vec![self.root.clone()])
        }

        pub(crate) fn root(&self) -> &[u8] {
            &self.root
        }

        /// Leaf and key, DER.
        pub(crate) fn issue_raw(&self, uri: &str) -> (Vec<u8>, Vec<u8>) {
            self.make(uri, |_| {})
        }

        pub(crate) fn issue_expired_raw(&self, uri: &str) -> (Vec<u8>, Vec<u8>) {
            self.make(uri, |params| params.not_after = rcgen::date_time_ymd(2020, 1, 1))
        }

        fn make(&self, uri: &str, change: impl Fn(&mut CertificateParams)) -> (Vec<u8>, Vec<u8>) {
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
            change(&mut params);
            let key = KeyPair::generate().unwrap();
            (params.signed_by(&key, &self.issuer).unwrap().der().to_vec(), key.serialize_der())
        }

        pub(crate) fn issue(&self, uri: &str) -> Credential {
            self.issue_with(uri, |_| {})
        }

        fn issue_with(&self, uri: &str, change: impl Fn(&mut CertificateParams)) -> Credential {
            let (leaf, key) = self.make(uri, change);
            let key = PrivateKeyDer::try_from(key).unwrap();
            Credential::from_der(vec![leaf.into(), self.root.clone()], key).unwrap()
        }
    }

    const WEB: &str = "spiffe://td/shop/web";
    const ORDERS: &str = "spiffe://td/shop/orders";

    fn expect(id: &str) -> Expect {
        Expect::Workload(id.parse().unwrap())
    }

    /// A handshake in memory; on failure the side that noticed first and its error.
    fn shake(
        client: Arc<ClientConfig>,
        server: Arc<ServerConfig>,
    ) -> Result<(rustls::ClientConnection, rustls::ServerConnection), (&'static str, rustls::Error)> {
        let mut client = rustls::ClientConnection::new(client, "peer".try_into().unwrap()).unwrap();
        let mut server = rustls::ServerConnection::new(server).unwrap();
        for _ in 0..6 {
            let mut wire = Vec::new();
            client.write_tls(&mut wire).unwrap();
            server.read_tls(&mut wire.as_slice()).unwrap();
            server.process_new_packets().map_err(|e| ("server", e))?;
            let mut wire = Vec::new();
            server.write_tls(&mut wire).unwrap();
            client.read_tls(&mut wire.as_slice()).unwrap();
            client.process_new_packets().map_err(|e| ("client", e))?;
        }
        Ok((client, server))
    }

    fn check(
        client: &Credential,
        theirs: &Trust,
        wants: Expect,
        server: &Credential,
        ours: &Trust,
    ) -> Option<RefusalReason> {
        let client = client_config(client, theirs, wants, Floor::Tls12, &[]).unwrap();
        let server = server_config(server, ours, Floor::Tls12, &[]).unwrap();
        shake(client, server).err().map(|(_, error)| refusal_of(&error))
    }

    #[test]
    fn two_workloads_of_one_domain_meet() {
        let ca = Authority::new("td");
        assert_eq!(check(&ca.issue(WEB), &ca.trust(), expect(ORDERS), &ca.issue(ORDERS), &ca.trust()), None);
    }

    #[test]
    fn everybody_else_is_refused_with_a_reason() {
        use RefusalReason as Why;
        let (ca, foreign, other) = (Authority::new("td"), Authority::new("td"), Authority::new("other"));
        let (web, orders, trust) = (ca.issue(WEB), ca.issue(ORDERS), ca.trust());
        let refused = |client: &Credential| check(client, &trust, expect(ORDERS), &orders, &trust);
        assert_eq!(refused(&foreign.issue(WEB)), Some(Why::UnknownCa), "same name, foreign CA");
        assert_eq!(refused(&other.issue("spiffe://other/a")), Some(Why::UnknownCa), "unknown domain");
        let expired = ca.issue_with(WEB, |p| p.not_after = rcgen::date_time_ymd(2020, 1, 1));
        assert_eq!(refused(&expired), Some(Why::Expired));
        let early = ca.issue_with(WEB, |p| p.not_before = rcgen::date_time_ymd(2999, 1, 1));
        assert_eq!(refused(&early), Some(Why::Expired));
        let server_only = ca.issue_with(WEB, |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
        assert_eq!(refused(&server_only), Some(Why::BadCertificate));
        assert_eq!(check(&web, &trust, expect(WEB), &orders, &trust), Some(Why::WrongPeer));
        assert_eq!(check(&web, &foreign.trust(), expect(ORDERS), &orders, &trust), Some(Why::UnknownCa));
    }

    #[test]
    fn a_right_name_under_another_domains_root_is_refused() {
        let (ca, other) = (Authority::new("td"), Authority::new("other"));
        let mut trust = ca.trust();
        trust.domains.extend(other.trust().domains);
        let impostor = other.issue(WEB);
        let reason = check(&impostor, &trust, expect(ORDERS), &ca.issue(ORDERS), &trust);
        assert_eq!(reason, Some(RefusalReason::UnknownCa));
    }

    /// Each domain's word counts for its own names, in both directions and whatever else is trusted.
    #[test]
    fn of_several_trust_domains_each_vouches_for_itself_alone() {
        let (td, partner, unknown) = (Authority::new("td"), Authority::new("partner"), Authority::new("unknown"));
        let both = || {
            let mut trust = td.trust();
            trust.domains.extend(partner.trust().domains);
            trust
        };
        let by_dns_only = Trust { dns_roots: vec![partner.root.clone()], ..td.trust() };
        let (none, no_ca) = (None, Some(RefusalReason::UnknownCa));
        const THEIRS: &str = "spiffe://partner/shop/web";
        for (client, trust, expected, what) in [
            (td.issue(WEB), both(), none, "our own"),
            (partner.issue(THEIRS), both(), none, "theirs, federated"),
            (partner.issue(THEIRS), td.trust(), no_ca, "theirs, not federated"),
            (partner.issue(WEB), both(), no_ca, "our name by their root"),
            (td.issue(THEIRS), both(), no_ca, "their name by our root"),
            (partner.issue("spiffe://td/sidewarden/collector"), both(), no_ca, "our collector's name by their root"),
            (unknown.issue(THEIRS), both(), no_ca, "their name by a stranger's root"),
            (unknown.issue("spiffe://unknown/a"), both(), no_ca, "a stranger"),
            (partner.issue(THEIRS), by_dns_only, no_ca, "a root for DNS names vouches for no SPIFFE ID"),
        ] {
            let orders = td.issue(ORDERS);
            assert_eq!(check(&client, &td.trust(), expect(ORDERS), &orders, &trust), expected, "client: {what}");
            let PeerName::Spiffe(id) = client.peer().name.clone() else { panic!("{what}") };
            let answers = check(&td.issue(WEB), &trust, Expect::Workload(id), &client, &td.trust());
            assert_eq!(answers, expected, "server: {what}");
        }
    }

    /// The other domain's CA in the chain, or ours signed by it, opens no way round.
    #[test]
    fn a_chain_through_another_domains_root_is_refused() {
        let (td, partner) = (Authority::new("td"), Authority::new("partner"));
        let mut trust = td.trust();
        trust.domains.extend(partner.trust().domains);
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let below_partner = params.signed_by(&key, &partner.issuer).unwrap().der().clone();
        let intermediate =
            Authority { domain: td.domain.clone(), root: below_partner.clone(), issuer: Issuer::new(params, key) };
        let (leaf, _) = intermediate.issue_raw(WEB);
        let chains = [
            vec![leaf.clone().into(), below_partner.clone()],
            vec![leaf.clone().into(), below_partner.clone(), partner.root.clone()],
            vec![leaf.into(), td.root.clone(), below_partner, partner.root.clone()],
        ];
        for chain in chains {
            let judged = verify_chain(&chain, &trust, Usage::Client, Timestamp::now());
            assert_eq!(judged.map_err(|e| refusal_of(&e)), Err(RefusalReason::UnknownCa), "{} long", chain.len());
        }
    }

    #[test]
    fn a_client_without_a_certificate_is_refused() {
        let ca = Authority::new("td");
        let client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(Floor::Tls12.versions())
            .unwrap()
            .with_root_certificates(root_store(std::slice::from_ref(&ca.root)).unwrap())
            .with_no_client_auth();
        let mut client = rustls::ClientConnection::new(Arc::new(client), "peer".try_into().unwrap()).unwrap();
        let server = server_config(&ca.issue(ORDERS), &ca.trust(), Floor::Tls12, &[]).unwrap();
        let mut server = rustls::ServerConnection::new(server).unwrap();
        let mut wire = Vec::new();
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut wire.as_slice()).unwrap();
        server.process_new_packets().unwrap();
        assert!(server.is_handshaking(), "nothing but a certificate ends the handshake");
        assert_eq!(refusal_of(&rustls::Error::NoCertificatesPresented), RefusalReason::NoCertificate);
    }

    #[test]
    fn a_second_handshake_is_a_full_one_in_both_versions() {
        let ca = Authority::new("td");
        let server = server_config(&ca.issue(ORDERS), &ca.trust(), Floor::Tls12, &[]).unwrap();
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            // A client that would resume if it could: the server must be the one that does not.
            let verifier = StrictServer {
                anchors: Anchors::new(&ca.trust()).unwrap(),
                expect: expect(ORDERS),
                hints: None,
                provider: provider(),
            };
            let client = ClientConfig::builder_with_provider(provider())
                .with_protocol_versions(&[version])
                .unwrap()
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(verifier))
                .with_client_cert_resolver(ca.issue(WEB).resolver());
            let client = Arc::new(client);
            for round in 0..2 {
                let (mut one, mut two) = shake(client.clone(), server.clone()).unwrap();
                one.writer().write_all(b"hello").unwrap();
                let mut wire = Vec::new();
                one.write_tls(&mut wire).unwrap();
                two.read_tls(&mut wire.as_slice()).unwrap();
                two.process_new_packets().unwrap();
                let mut got = [0; 5];
                two.reader().read_exact(&mut got).unwrap();
                assert_eq!(two.handshake_kind(), Some(rustls::HandshakeKind::Full), "{version:?}, round {round}");
            }
        }
    }

    #[test]
    fn the_post_quantum_group_is_chosen() {
        let ca = Authority::new("td");
        let client = client_config(&ca.issue(WEB), &ca.trust(), expect(ORDERS), Floor::Tls12, &[]).unwrap();
        let server = server_config(&ca.issue(ORDERS), &ca.trust(), Floor::Tls12, &[]).unwrap();
        let (client, _) = shake(client, server).unwrap();
        let group = client.negotiated_key_exchange_group().unwrap().name();
        assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
    }

    #[test]
    fn an_intermediate_signs_only_if_its_key_usage_says_so() {
        let ca = Authority::new("td");
        let judged = |usages: &[KeyUsagePurpose], name: SanType| {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = usages.to_vec();
            let key = KeyPair::generate().unwrap();
            let intermediate = params.signed_by(&key, &ca.issuer).unwrap().der().clone();
            let below = Authority { domain: ca.domain.clone(), root: intermediate, issuer: Issuer::new(params, key) };
            let leaf = below.issue_with(WEB, |p| p.subject_alt_names = vec![name.clone()]);
            let trust = Trust { dns_roots: vec![ca.root.clone()], ..ca.trust() };
            verify_chain(leaf.chain(), &trust, Usage::Client, Timestamp::now()).map(|_| ()).map_err(|e| refusal_of(&e))
        };
        let workload = || SanType::URI(WEB.try_into().unwrap());
        let host = || SanType::DnsName("partner.example".try_into().unwrap());
        let no = Err(RefusalReason::BadCertificate);
        assert_eq!(judged(&[KeyUsagePurpose::KeyCertSign], workload()), Ok(()));
        assert_eq!(judged(&[KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::CrlSign], workload()), no);
        assert_eq!(judged(&[], workload()), no, "X509-SVID wants it said");
        assert_eq!(judged(&[KeyUsagePurpose::CrlSign], host()), no);
        assert_eq!(judged(&[], host()), Ok(()), "RFC 5280 does not");
    }

    #[test]
    fn a_pin_finds_its_collector_and_nobody_else() {
        let (ca, foreign) = (Authority::new("td"), Authority::new("td"));
        let enrol = |pin: &Authority, server: Credential| {
            let client = pinned_client_config(spki_of(&pin.root).unwrap(), &[]).unwrap();
            let server = server_config_without_client(&server, Floor::Tls13, &[]).unwrap();
            shake(client, server).err().map(|(_, error)| fault_of(&error).cloned())
        };
        let collector = "spiffe://td/sidewarden/collector";
        assert_eq!(enrol(&ca, ca.issue(collector)), None);
        assert_eq!(enrol(&foreign, ca.issue(collector)), Some(Some(PeerFault::PinMismatch)));
        assert!(
            matches!(enrol(&ca, ca.issue(WEB)), Some(Some(PeerFault::WrongPeer { .. }))),
            "an agent is no collector"
        );
    }

    /// The one certificate that each can verify, whatever else the collector has.
    #[test]
    fn a_collector_with_two_certificates_shows_each_agent_the_one_of_its_own_roots() {
        // Two CAs of one trust domain, told apart by their names.
        let (ca, elsewhere, stranger) =
            (Authority::called("ours", "td"), Authority::called("spire", "td"), Authority::called("x", "td"));
        const NAME: &str = "spiffe://td/sidewarden/collector";
        let (own, other) = (ca.issue(NAME), elsewhere.issue(NAME));
        let both = Trust::single(ca.domain.clone(), vec![ca.root.clone(), elsewhere.root.clone()]);
        let roots = std::slice::from_ref(&elsewhere.root);
        let server = server_config_with_another(&own, (&other, roots), &both, Floor::Tls13, &[]).unwrap();
        let shown = |agent: Credential, trust: &Trust, expect: Expect| {
            let client = client_config(&agent, trust, expect, Floor::Tls13, &[]).unwrap();
            let (client, _) = shake(client, server.clone()).map_err(|(_, error)| refusal_of(&error))?;
            Ok(if client.peer_certificates().unwrap() == own.chain() { "own" } else { "other" })
        };
        let of_domain = || Expect::Collector("td".parse().unwrap());
        assert_eq!(shown(ca.issue(WEB), &ca.trust(), of_domain()), Ok("own"));
        assert_eq!(shown(elsewhere.issue(WEB), &elsewhere.trust(), of_domain()), Ok("other"));
        assert_eq!(shown(elsewhere.issue(WEB), &both, of_domain()), Ok("own"), "who takes both");
        assert_eq!(
            shown(ca.issue(WEB), &ca.trust(), Expect::Workload(NAME.parse().unwrap())),
            Ok("own"),
            "an older agent"
        );
        assert_eq!(shown(ca.issue(WEB), &stranger.trust(), of_domain()), Err(RefusalReason::UnknownCa));
    }

    #[test]
    fn a_collector_bears_the_one_name_or_one_below_it() {
        let is_met = |name: &str| {
            let name = PeerName::Spiffe(format!("spiffe://{name}").parse().unwrap());
            Expect::Collector("td".parse().unwrap()).is_met_by(&name)
        };
        assert!(is_met("td/sidewarden/collector") && is_met("td/sidewarden/collector/second"));
        for wrong in [
            "td/sidewarden/collector2",
            "td/sidewarden",
            "td/shop/web",
            "other/sidewarden/collector",
            "td/x/sidewarden/collector",
        ] {
            assert!(!is_met(wrong), "{wrong}");
        }
    }

    #[test]
    fn wildcards_cover_one_label() {
        for (name, host, covers) in [
            ("api.shop", "API.shop", true),
            ("*.shop.example", "a.shop.example", true),
            ("*.shop.example", "a.b.shop.example", false),
            ("*.shop.example", "shop.example", false),
            ("*.example", "shop.example", false),
            ("*", "example", false),
            ("a*.shop.example", "ab.shop.example", false),
        ] {
            assert_eq!(dns_matches(name, host), covers, "{name} {host}");
        }
    }

    #[test]
    fn our_own_side_is_judged_too() {
        let (ca, other) = (Authority::new("td"), KeyPair::generate().unwrap());
        let chain = ca.issue(WEB).chain().to_vec();
        let stranger = PrivateKeyDer::try_from(other.serialize_der()).unwrap();
        assert!(matches!(Credential::from_der(chain, stranger), Err(TlsError::KeyMismatch)));
        assert!(matches!(Credential::from_pem(b"nothing", b""), Err(TlsError::Pem(_))));
        let empty = Trust::single("td".parse().unwrap(), vec![]);
        assert!(matches!(server_config(&ca.issue(WEB), &empty, Floor::Tls12, &[]), Err(TlsError::Roots(_))));
        let shown = format!("{:?}", ca.issue(WEB));
        assert!(shown.starts_with("Credential(spiffe://td/shop/web"), "{shown}");
    }
}
