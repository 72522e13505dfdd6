//! What collectors tell agents: one whole document, versioned and signed.
//!
//! It is always complete, so that an agent needs only the newest. An agent keeps it on disk, loads it before its first
//! accept and never takes an older version than the one it has. It is signed by a collector's own certificate.

use std::collections::BTreeMap;
use std::fmt;

use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use crate::enrol::Der;
use crate::identity::{AgentId, InstanceId, Peer, PeerName, Sha256, SpiffeId, TrustDomain, Usage};
use crate::policy::Applied;
use crate::time::Timestamp;
use crate::tls::{self, Credential, Trust};
use crate::wire::MAX_JSON;

/// Keeps a signature of something else from being one of a directive.
const CONTEXT: &[u8] = b"sidewarden directive 1\0";
/// Most bytes of a document.
const MAX_DOCUMENT: usize = 700 << 10;
/// Most bytes of it as a JSON string, which is how it travels: quotes and newlines count twice there. The rest of a frame is
/// for the signatures, so that what could be signed once can be signed with another certificate, or by one more.
const MAX_ESCAPED: usize = MAX_JSON - (16 << 10);
/// Most signatures after the first that are looked at.
const MAX_FURTHER: usize = 3;
/// What this version understands of a directive; agents tell it in their hello.
///
/// 1: `deny`. 2: `revoked`, with serial numbers and issuing keys. 3: `quarantined`, `released` and `policy`, with gates. 4: who
/// may talk to whom and go where in `policy`; an agent of 3 that is given such a policy lets nothing through. A collector keeps
/// `deny` such that an agent of 1 misses as little as possible, and shows which agents run a directive without understanding
/// all of it.
pub const UNDERSTANDS: u32 = 4;

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
    /// Who is not let in, whatever the certificate says. Follows from `revoked` and `quarantined`; all that the first agents
    /// look at.
    #[serde(default)]
    pub deny: Vec<Deny>,
    /// What was revoked, in full.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub revoked: Vec<Revocation>,
    /// Whom else agents trust.
    #[serde(default, skip_serializing_if = "ForeignRoots::is_empty")]
    pub foreign: ForeignRoots,
    /// Whose certificates are to be renewed now, long before they end.
    #[serde(default)]
    pub renew: Renew,
    /// Who is off the data plane, and stays in touch with its collector.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub quarantined: Vec<Quarantine>,
    /// Who was let in again although a gate says otherwise, for a while.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub released: Vec<Release>,
    /// What all agents go by, in addition to their own settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Applied>,
}

/// An instance that is quarantined by a gate of the policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantine {
    /// Of which workload.
    pub workload: SpiffeId,
    /// Which instance.
    pub instance: InstanceId,
    /// By which gate.
    pub gate: String,
    /// What it did.
    pub why: String,
    /// Since when.
    pub at_us: Timestamp,
    /// Its public keys (SHA-256 of the SPKI).
    #[serde(default)]
    pub keys: Vec<Sha256>,
}

/// An instance that no gate quarantines for a while, because an operator says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// Of which workload.
    pub workload: SpiffeId,
    /// Which instance.
    pub instance: InstanceId,
    /// The reason given.
    pub why: String,
    /// Until when.
    pub until_us: Timestamp,
}

/// Certificates that are to be renewed now, because their root is about to leave the bundle.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renew {
    /// SHA-256 of the public keys (SPKI) of these roots.
    #[serde(default)]
    pub roots: Vec<Sha256>,
    /// Each agent waits for a random part of this, seconds, so that not all come at once.
    #[serde(default)]
    pub within_secs: u32,
}

/// The roots of those who are not of the trust domain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeignRoots {
    /// Of other trust domains; each speaks for its own names alone. The directive's own domain may be among them: then these
    /// are roots of it that are no collector's, which agents trust beside its `bundle`.
    #[serde(default)]
    pub domains: BTreeMap<TrustDomain, Vec<Der>>,
    /// Of peers that have DNS names.
    #[serde(default)]
    pub dns: Vec<Der>,
}

impl ForeignRoots {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.domains.is_empty() && self.dns.is_empty()
    }
}

/// One act of revoking.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// Names it, for undoing it.
    pub id: String,
    /// What was revoked.
    pub what: Target,
    /// The reason given.
    pub why: String,
    /// When.
    pub at_us: Timestamp,
    /// The public keys (SHA-256 of the SPKI) that it was found to stand for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<Sha256>,
}

/// What can be revoked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum Target {
    /// One certificate.
    Serial {
        /// Its number, in hex.
        serial: String,
    },
    /// Every instance of a workload.
    Workload {
        /// Which.
        id: SpiffeId,
    },
    /// One instance of a workload. Its peers know it by its keys.
    Instance {
        /// Of which workload.
        workload: SpiffeId,
        /// Which.
        instance: InstanceId,
    },
    /// One key.
    Key {
        /// SHA-256 of the public key (SPKI).
        spki: Sha256,
    },
    /// Whatever a CA has signed, or one below it.
    IssuingKey {
        /// SHA-256 of the CA's public key (SPKI).
        spki: Sha256,
    },
    /// Something that a newer collector can revoke; its `keys` are denied all the same.
    #[serde(other)]
    Unknown,
}

impl Target {
    /// What an agent must understand ([`UNDERSTANDS`]) to deny it in full.
    pub fn needs(&self) -> u32 {
        match self {
            Target::Serial { .. } | Target::IssuingKey { .. } => 2,
            Target::Workload { .. } | Target::Instance { .. } | Target::Key { .. } => 1,
            Target::Unknown => u32::MAX,
        }
    }

    fn is_met_by(&self, peer: &Peer) -> bool {
        match self {
            Target::Serial { serial } => *serial == peer.serial,
            Target::Workload { id } => matches!(&peer.name, PeerName::Spiffe(name) if name == id),
            Target::Key { spki } => *spki == peer.spki,
            Target::IssuingKey { spki } => peer.issuers.contains(spki),
            Target::Instance { .. } | Target::Unknown => false,
        }
    }

    fn noun(&self) -> &'static str {
        match self {
            Target::Serial { .. } => "certificate",
            Target::Workload { .. } => "workload",
            Target::Instance { .. } => "instance",
            Target::Key { .. } | Target::Unknown => "key",
            Target::IssuingKey { .. } => "issuing key",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Serial { serial } => write!(f, "certificate {serial}"),
            Target::Workload { id } => write!(f, "workload {id}"),
            Target::Instance { workload, instance } => write!(f, "instance {workload}#{instance}"),
            Target::Key { spki } => write!(f, "key {spki}"),
            Target::IssuingKey { spki } => write!(f, "issuing key {spki}"),
            Target::Unknown => f.write_str("something that a newer collector can revoke"),
        }
    }
}

impl Revocation {
    fn is_met_by(&self, peer: &Peer) -> bool {
        self.what.is_met_by(peer) || self.keys.contains(&peer.spki)
    }

    /// The lines of the deny list that say the same, as far as they can.
    fn denials(&self) -> Vec<Deny> {
        let why = || self.why.clone();
        let keys = self.keys.iter().map(|spki| Deny::Key { spki: *spki, why: why() });
        match &self.what {
            Target::Workload { id } => vec![Deny::Workload { id: id.clone(), why: why() }],
            Target::Key { spki } => vec![Deny::Key { spki: *spki, why: why() }],
            _ => keys.collect(),
        }
    }
}

/// Why somebody is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied<'a> {
    /// It was revoked.
    Revoked {
        /// What of it.
        noun: &'static str,
        /// The reason given.
        why: &'a str,
    },
    /// It is quarantined, which ends.
    Quarantined {
        /// By which gate.
        gate: &'a str,
        /// What it did.
        why: &'a str,
    },
}

impl fmt::Display for Denied<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Denied::Revoked { noun, why } => write!(f, "its {noun} is on the deny list: {why}"),
            Denied::Quarantined { gate, why } => write!(f, "it is quarantined by the gate {gate}: {why}"),
        }
    }
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
    /// Whether a chain (DER, leaf first) leads to a root whose certificates are to be renewed now.
    pub fn wants_renewed(&self, chain: &[CertificateDer<'_>]) -> bool {
        let is_listed = |cert| tls::spki_of(cert).is_ok_and(|spki| self.renew.roots.contains(&spki));
        !self.renew.roots.is_empty() && chain.iter().skip(1).any(is_listed)
    }

    /// Why `peer` is denied on the data plane, if it is.
    pub fn denies(&self, peer: &Peer) -> Option<Denied<'_>> {
        let by_list = || self.deny.iter().find_map(|deny| deny.meets(peer));
        self.revokes(peer).or_else(|| self.quarantines(peer.spki)).or_else(by_list)
    }

    /// Why `peer` is revoked, if it is: then its collector has nothing to do with it either.
    pub fn revokes(&self, peer: &Peer) -> Option<Denied<'_>> {
        let revoked = self.revoked.iter().find(|revocation| revocation.is_met_by(peer));
        revoked.map(|found| Denied::Revoked { noun: found.what.noun(), why: &found.why })
    }

    /// Why the holder of a key is quarantined, if it is.
    pub fn quarantines(&self, spki: Sha256) -> Option<Denied<'_>> {
        let found = self.quarantined.iter().find(|quarantine| quarantine.keys.contains(&spki));
        found.map(|quarantine| Denied::Quarantined { gate: &quarantine.gate, why: &quarantine.why })
    }

    /// Why `agent` is quarantined whatever its key, if it is: one that somebody else's CA gives it may be known to nobody yet.
    pub fn quarantines_agent(&self, agent: &AgentId) -> Option<Denied<'_>> {
        let found = self.quarantined.iter().find(|quarantine| quarantine.is_of(agent));
        found.map(|quarantine| Denied::Quarantined { gate: &quarantine.gate, why: &quarantine.why })
    }

    /// Whether an operator has `agent` let in at `now`, whatever gates say.
    pub fn releases(&self, agent: &AgentId, now: Timestamp) -> bool {
        let is_it = |release: &Release| release.workload == agent.workload && release.instance == agent.instance;
        self.released.iter().any(|release| is_it(release) && now < release.until_us)
    }

    /// Why every instance of `workload` is denied, if they are.
    pub fn denies_workload(&self, workload: &SpiffeId) -> Option<Denied<'_>> {
        let is_it = |what: &Target| matches!(what, Target::Workload { id } if id == workload);
        let revoked = self.revoked.iter().find(|revocation| is_it(&revocation.what));
        let revoked = revoked.map(|found| Denied::Revoked { noun: found.what.noun(), why: &found.why });
        revoked.or_else(|| self.deny.iter().find_map(|deny| deny.meets_workload(workload)))
    }

    /// Why `agent` is revoked whatever its key, if it is. Only its collector knows instances by name.
    pub fn revokes_agent(&self, agent: &AgentId) -> Option<Denied<'_>> {
        let is_it = |what: &Target| match what {
            Target::Workload { id } => *id == agent.workload,
            Target::Instance { workload, instance } => *workload == agent.workload && *instance == agent.instance,
            _ => false,
        };
        let revoked = self.revoked.iter().find(|revocation| is_it(&revocation.what));
        revoked.map(|found| Denied::Revoked { noun: found.what.noun(), why: &found.why })
    }

    /// The same directive with these revocations, and the deny list that follows.
    pub fn with_revoked(self, revoked: Vec<Revocation>) -> Directive {
        Directive { revoked, ..self }.with_deny_list()
    }

    /// The same with these instances quarantined.
    pub fn with_quarantined(self, quarantined: Vec<Quarantine>) -> Directive {
        Directive { quarantined, ..self }.with_deny_list()
    }

    fn with_deny_list(self) -> Directive {
        let mut deny: Vec<Deny> = Vec::new();
        let quarantined = self.quarantined.iter().flat_map(Quarantine::denials);
        for line in self.revoked.iter().flat_map(Revocation::denials).chain(quarantined) {
            if !deny.iter().any(|known| known.is_about_the_same(&line)) {
                deny.push(line);
            }
        }
        Directive { deny, ..self }
    }

    /// What an agent must understand to do all that is said here.
    pub fn needs(&self) -> u32 {
        let revoked = self.revoked.iter().map(|revocation| revocation.what.needs()).max().unwrap_or(1);
        let policy = self.policy.as_ref().map_or(1, Applied::needs);
        let quarantined = if self.quarantined.is_empty() { 1 } else { 3 };
        revoked.max(policy).max(quarantined)
    }
}

impl Quarantine {
    /// Whether it is of this instance.
    pub fn is_of(&self, agent: &AgentId) -> bool {
        self.workload == agent.workload && self.instance == agent.instance
    }

    fn denials(&self) -> Vec<Deny> {
        let why = format!("quarantined by the gate {}: {}", self.gate, self.why);
        self.keys.iter().map(|spki| Deny::Key { spki: *spki, why: why.clone() }).collect()
    }
}

impl Deny {
    fn meets(&self, peer: &Peer) -> Option<Denied<'_>> {
        match (self, &peer.name) {
            (Deny::Key { spki, why }, _) if *spki == peer.spki => Some(Denied::Revoked { noun: "key", why }),
            (_, PeerName::Spiffe(name)) => self.meets_workload(name),
            _ => None,
        }
    }

    fn meets_workload(&self, workload: &SpiffeId) -> Option<Denied<'_>> {
        match self {
            Deny::Workload { id, why } if id == workload => Some(Denied::Revoked { noun: "workload", why }),
            _ => None,
        }
    }

    fn is_about_the_same(&self, other: &Deny) -> bool {
        match (self, other) {
            (Deny::Key { spki, .. }, Deny::Key { spki: other, .. }) => spki == other,
            (Deny::Workload { id, .. }, Deny::Workload { id: other, .. }) => id == other,
            _ => false,
        }
    }
}

/// A directive as it travels and is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed {
    /// The directive's JSON, exactly as it was signed.
    document: String,
    /// The first signature.
    #[serde(flatten)]
    by: Signature,
    /// By whom else: agents that do not trust the CA of the first signer may trust one of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    also_by: Vec<Signature>,
}

/// A signature under a directive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Signature {
    /// ECDSA P-256, SHA-256, DER.
    signature: Der,
    /// The signer's chain, leaf first.
    chain: Vec<Der>,
}

impl Signature {
    fn of(document: &str, credential: &Credential) -> Result<Signature, DirectiveFault> {
        let message = [CONTEXT, document.as_bytes()].concat();
        let signature = credential.sign(&message).map_err(|e| DirectiveFault::Signing(e.to_string()))?;
        let chain = credential.chain().iter().map(|cert| Der(cert.to_vec())).collect();
        Ok(Signature { signature: Der(signature), chain })
    }

    fn chain(&self) -> Vec<CertificateDer<'_>> {
        self.chain.iter().map(|der| der.0.as_slice().into()).collect()
    }

    /// Who has signed `document`, which must be a collector that makes directives.
    fn prove(&self, document: &str, trust: &Trust, now: Timestamp) -> Result<Peer, DirectiveFault> {
        let chain = self.chain();
        let fault = |e: &dyn fmt::Display| DirectiveFault::Chain(e.to_string());
        tls::verify_chain(&chain, trust, Usage::Server, now).map_err(|e| fault(&e))?;
        let signer = tls::peer_with(&chain, trust, Usage::Server).map_err(|e| fault(&e))?;
        let is_maker = matches!(&signer.name, PeerName::Spiffe(id) if *id == tls::collector_id(&id.trust_domain()));
        if !is_maker {
            return Err(DirectiveFault::WrongSigner(signer.name.to_string()));
        }
        // The verifier took a path through what was shown; a follower has no other to show than through its own CA.
        if tls::is_of_member(&chain).map_err(|e| fault(&e))? {
            return Err(DirectiveFault::Follower);
        }
        let message = [CONTEXT, document.as_bytes()].concat();
        tls::verify_signature(&chain[0], &message, &self.signature.0).map_err(|_| DirectiveFault::Signature)?;
        Ok(signer)
    }
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
    /// The signer is a collector that hands directives out and makes none.
    #[error("the directive is signed by a collector that follows another: only the one with the root's key makes them")]
    Follower,
    /// The signature is not of this document.
    #[error("the directive's signature does not fit")]
    Signature,
    /// It would not fit a frame.
    #[error(
        "the directive is full: it would have {bytes} bytes of {MAX_DOCUMENT} ({escaped} of {MAX_ESCAPED} as it travels), {parts}"
    )]
    TooLarge {
        /// How large it is.
        bytes: usize,
        /// And as it travels.
        escaped: usize,
        /// What of it has how many.
        parts: Parts,
    },
    /// Signing failed.
    #[error("the directive cannot be signed: {0}")]
    Signing(String),
}

/// How many bytes of a directive are of what, with the lines of the deny list that follow from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    policy: usize,
    revoked: usize,
    quarantined: usize,
    released: usize,
}

impl Parts {
    fn of(directive: &Directive) -> Result<Parts, DirectiveFault> {
        let Directive { revoked, quarantined, .. } = directive;
        let denied: Vec<Deny> = revoked.iter().flat_map(Revocation::denials).collect();
        let off: Vec<Deny> = quarantined.iter().flat_map(Quarantine::denials).collect();
        Ok(Parts {
            policy: json(&directive.policy)?.len(),
            revoked: json(&(revoked, denied))?.len(),
            quarantined: json(&(quarantined, off))?.len(),
            released: json(&directive.released)?.len(),
        })
    }
}

impl fmt::Display for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parts { policy, revoked, quarantined, released } = self;
        write!(f, "{policy} for the policy, {revoked} for revocations, ")?;
        write!(f, "{quarantined} for quarantines and {released} for releases")
    }
}

fn json(value: &impl Serialize) -> Result<String, DirectiveFault> {
    serde_json::to_string(value).map_err(|e| DirectiveFault::Signing(e.to_string()))
}

impl Signed {
    /// Signs `directive` with a collector's credential.
    pub fn sign(directive: &Directive, credential: &Credential) -> Result<Signed, DirectiveFault> {
        let document = json(directive)?;
        let (bytes, escaped) = (document.len(), json(&document)?.len());
        if bytes > MAX_DOCUMENT || escaped > MAX_ESCAPED {
            return Err(DirectiveFault::TooLarge { bytes, escaped, parts: Parts::of(directive)? });
        }
        let by = Signature::of(&document, credential)?;
        Ok(Signed { document, by, also_by: Vec::new() })
    }

    /// The same, signed with another credential as well.
    pub fn also_by(mut self, credential: &Credential) -> Result<Signed, DirectiveFault> {
        self.also_by.push(Signature::of(&self.document, credential)?);
        Ok(self)
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
    /// Whether its version is newer than the one at hand, and whether its signer was revoked, is the caller's question.
    pub fn open(&self, trust: &Trust, now: Timestamp) -> Result<Directive, DirectiveFault> {
        self.prove(trust, now).map(|(directive, _)| directive)
    }

    /// The same, and everybody who has provably signed it: one at least. Of several faults the first signature's is told.
    pub fn prove(&self, trust: &Trust, now: Timestamp) -> Result<(Directive, Vec<Peer>), DirectiveFault> {
        let all = [&self.by].into_iter().chain(self.also_by.iter().take(MAX_FURTHER));
        let mut proofs: Vec<_> = all.map(|signature| signature.prove(&self.document, trust, now)).collect();
        if proofs.iter().all(Result::is_err) {
            return Err(proofs.swap_remove(0).expect_err("none of them holds"));
        }
        let directive = self.as_kept()?;
        let maker = PeerName::Spiffe(tls::collector_id(&directive.trust_domain));
        let (makers, others): (Vec<Peer>, _) = proofs.into_iter().flatten().partition(|signer| signer.name == maker);
        match others.first() {
            Some(other) if makers.is_empty() => Err(DirectiveFault::WrongSigner(other.name.to_string())),
            _ => Ok((directive, makers)),
        }
    }

    /// What it says, proven by nothing: for whoever has kept it since it was proven.
    pub fn as_kept(&self) -> Result<Directive, DirectiveFault> {
        serde_json::from_str(&self.document).map_err(|e| DirectiveFault::Unreadable(e.to_string()))
    }

    /// Who says to have signed it first; proven by [`Signed::prove`] alone.
    pub fn signer(&self, trust: &Trust) -> Result<Peer, DirectiveFault> {
        tls::peer_with(&self.by.chain(), trust, Usage::Server).map_err(|e| DirectiveFault::Chain(e.to_string()))
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
            revoked: Vec::new(),
            foreign: ForeignRoots::default(),
            quarantined: Vec::new(),
            released: Vec::new(),
            policy: None,
            renew: Renew { roots: vec![spki], within_secs: 2 },
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
    fn what_would_not_fit_a_frame_is_not_signed_and_its_parts_are_told() {
        let ca = Authority::new("td");
        let own = ca.issue("spiffe://td/sidewarden/collector");
        let with = |text: String, why: String| {
            let what = Target::Key { spki: Sha256([5; 32]) };
            let revoked = vec![Revocation { id: "1".into(), what, why, at_us: Timestamp(1), keys: Vec::new() }];
            let policy = Some(Applied { version: 1, text, needs: 3 });
            Signed::sign(&Directive { policy, ..directive("td") }.with_revoked(revoked), &own)
        };
        let rows = [
            ("x".repeat(250_000), "y".repeat(200_000), true),
            ("x".repeat(250_000), "y".repeat(240_000), false),
            // It travels in a string, in which each quote of the policy takes four bytes.
            ("\"".repeat(250_000), "y".repeat(10_000), true),
            ("\"".repeat(250_000), "y".repeat(40_000), false),
        ];
        for (text, why, fits) in rows {
            let (text_bytes, why_bytes) = (json(&text).unwrap().len(), why.len());
            match with(text, why) {
                Ok(signed) => assert!(fits && signed.to_bytes().len() <= MAX_JSON),
                Err(fault @ DirectiveFault::TooLarge { parts, .. }) => {
                    assert!(!fits && (text_bytes..text_bytes + 100).contains(&parts.policy), "{fault}");
                    assert!((2 * why_bytes..2 * why_bytes + 500).contains(&parts.revoked), "{fault}");
                }
                Err(other) => panic!("{other}"),
            }
        }
    }

    /// A collector with certificates of two CAs signs with both; agents trust one of them, or both.
    #[test]
    fn a_directive_that_two_have_signed_opens_for_whoever_trusts_one_of_them() {
        const NAME: &str = "spiffe://td/sidewarden/collector";
        let (ca, elsewhere, stranger, now) =
            (Authority::new("td"), Authority::new("td"), Authority::new("td"), Timestamp::now());
        let (own, other) = (ca.issue(NAME), elsewhere.issue(NAME));
        let signed = Signed::sign(&directive("td"), &own).unwrap().also_by(&other).unwrap();
        let signed = Signed::from_bytes(&signed.to_bytes()).unwrap();
        let signers = |trust: &Trust| {
            let proven = signed.prove(trust, now).map_err(|fault| fault.to_string())?;
            assert_eq!(proven.0, directive("td"));
            Ok::<_, String>(proven.1.into_iter().map(|peer| peer.spki).collect::<Vec<_>>())
        };
        assert_eq!(signers(&ca.trust()).unwrap(), [own.peer().spki]);
        assert_eq!(signers(&elsewhere.trust()).unwrap(), [other.peer().spki]);
        let mut both = ca.trust();
        both.add(&elsewhere.trust().domains);
        assert_eq!(signers(&both).unwrap(), [own.peer().spki, other.peer().spki]);
        assert!(signers(&stranger.trust()).unwrap_err().contains("cannot be verified"));

        // What is under another document, by no collector, or by one that only follows, proves nothing.
        for (name, version) in [(NAME, 4), ("spiffe://td/shop/web", 3), ("spiffe://td/sidewarden/collector/second", 3)]
        {
            let another = Directive { version, ..directive("td") };
            let another = Signed::sign(&another, &elsewhere.issue(name)).unwrap();
            let forged =
                Signed { also_by: vec![another.by], ..Signed::sign(&directive("td"), &stranger.issue(NAME)).unwrap() };
            assert!(forged.open(&elsewhere.trust(), now).is_err(), "{name} {version}");
        }
        let many = vec![signed.also_by[0].clone(); 1000];
        let last =
            Signed { by: Signed::sign(&directive("td"), &stranger.issue(NAME)).unwrap().by, also_by: many, ..signed };
        assert_eq!(last.prove(&elsewhere.trust(), now).unwrap().1.len(), MAX_FURTHER, "work has an end");
    }

    #[test]
    fn an_agent_of_before_reads_the_first_signature_of_several_and_an_older_document_has_one() {
        #[derive(Deserialize)]
        struct Before {
            document: String,
            signature: Der,
            chain: Vec<Der>,
        }
        let ca = Authority::new("td");
        let own = ca.issue("spiffe://td/sidewarden/collector");
        let signed = Signed::sign(&directive("td"), &own).unwrap();
        let both = signed.clone().also_by(&own).unwrap();
        let before: Before = serde_json::from_slice(&both.to_bytes()).unwrap();
        let same = (&before.document, &before.signature, &before.chain);
        assert_eq!(same, (&signed.document, &signed.by.signature, &signed.by.chain));
        assert!(!String::from_utf8(signed.to_bytes()).unwrap().contains("also_by"));
    }

    fn peer(name: &str, spki: u8) -> Peer {
        Peer {
            name: PeerName::Spiffe(name.parse().unwrap()),
            spki: Sha256([spki; 32]),
            serial: "5a".into(),
            issuers: [Sha256([20; 32]), Sha256([21; 32])].into(),
            not_before: Timestamp(0),
            not_after: Timestamp(9),
        }
    }

    #[test]
    fn the_deny_list_knows_keys_and_workloads() {
        let directive = directive("td");
        assert!(directive.denies(&peer("spiffe://td/shop/orders", 4)).is_some());
        assert!(directive.denies(&peer("spiffe://td/shop/old", 1)).is_some());
        assert!(directive.denies(&peer("spiffe://td/shop/orders", 1)).is_none());
    }

    fn revoked(what: Target, keys: &[u8]) -> Directive {
        let keys = keys.iter().map(|key| Sha256([*key; 32])).collect();
        let (id, why, at_us) = ("1".into(), "lost".into(), Timestamp(1));
        directive("td").with_revoked(vec![Revocation { id, what, why, at_us, keys }])
    }

    #[test]
    fn each_kind_of_revocation_denies_its_own_and_nobody_else() {
        let (web, agent) = ("spiffe://td/shop/web", "spiffe://td/shop/web#1".parse::<AgentId>().unwrap());
        let (id, instance) = (agent.workload.clone(), agent.instance.clone());
        let spki = Sha256([3; 32]);
        // What is revoked, the keys it stands for, whether the peer and the instance are denied, and what old agents see.
        let rows = [
            (Target::Serial { serial: "5a".into() }, vec![], (true, false), 0),
            (Target::Serial { serial: "5b".into() }, vec![], (false, false), 0),
            (Target::Serial { serial: "5b".into() }, vec![3], (true, false), 1),
            (Target::Workload { id }, vec![], (true, true), 1),
            (Target::Instance { workload: agent.workload.clone(), instance }, vec![9], (false, true), 1),
            (
                Target::Instance { workload: agent.workload.clone(), instance: "2".parse().unwrap() },
                vec![3],
                (true, false),
                1,
            ),
            (Target::Key { spki }, vec![], (true, false), 1),
            (Target::Key { spki: Sha256([20; 32]) }, vec![], (false, false), 1),
            (Target::IssuingKey { spki: Sha256([21; 32]) }, vec![], (true, false), 0),
            (Target::IssuingKey { spki }, vec![], (false, false), 0),
            (Target::Unknown, vec![3], (true, false), 1),
        ];
        for (what, keys, denied, old) in rows {
            let directive = revoked(what, &keys);
            let found = (directive.denies(&peer(web, 3)).is_some(), directive.revokes_agent(&agent).is_some());
            assert_eq!((found, directive.deny.len()), (denied, old), "{directive:?}");
        }
    }

    #[test]
    fn the_quarantined_is_denied_by_peers_and_not_by_its_collector() {
        let agent: AgentId = "spiffe://td/shop/web#1".parse().unwrap();
        let (workload, instance) = (agent.workload.clone(), agent.instance.clone());
        let keys = vec![Sha256([3; 32])];
        let quarantine = Quarantine {
            workload: workload.clone(),
            instance: instance.clone(),
            gate: "g".into(),
            why: "privileged".into(),
            at_us: Timestamp(1),
            keys,
        };
        let directive = directive("td").with_quarantined(vec![quarantine]);
        let web = peer(agent.workload.as_str(), 3);
        assert_eq!(directive.denies(&web).unwrap().to_string(), "it is quarantined by the gate g: privileged");
        assert!(directive.revokes(&web).is_none() && directive.revokes_agent(&agent).is_none());
        assert!(
            matches!(&directive.deny[..], [Deny::Key { why, .. }] if why.contains("quarantined")),
            "for old agents"
        );
        assert_eq!(directive.needs(), 3);
        let release = Release { workload, instance, why: "x".into(), until_us: Timestamp(5) };
        let directive = Directive { released: vec![release], ..directive };
        assert!(directive.releases(&agent, Timestamp(4)) && !directive.releases(&agent, Timestamp(5)));
    }

    #[test]
    fn a_revocation_of_a_kind_from_the_future_denies_its_keys_and_is_known_as_such() {
        let json = r#"{"id":"1","what":{"by":"moon_phase","moon":7},"why":"x","at_us":1,"keys":[]}"#;
        let read: Revocation = serde_json::from_str(json).unwrap();
        assert_eq!((&read.what, read.what.needs() > UNDERSTANDS), (&Target::Unknown, true));
    }

    #[test]
    fn an_agent_of_the_first_version_reads_what_it_can() {
        #[derive(Deserialize)]
        struct First {
            version: u64,
            deny: Vec<Deny>,
        }
        let json = serde_json::to_string(&revoked(Target::Serial { serial: "5b".into() }, &[3])).unwrap();
        let first: First = serde_json::from_str(&json).unwrap();
        assert_eq!(first.version, 3);
        assert_eq!(first.deny, [Deny::Key { spki: Sha256([3; 32]), why: "lost".into() }]);
        let old = r#"{"version":1,"trust_domain":"td","issued_us":1,"bundle":[]}"#;
        assert_eq!(serde_json::from_str::<Directive>(old).unwrap().needs(), 1);
    }

    #[test]
    fn the_same_key_revoked_twice_is_one_line_of_the_deny_list() {
        let (spki, why) = (Sha256([3; 32]), String::from("x"));
        let one = Revocation { id: "1".into(), what: Target::Key { spki }, why, at_us: Timestamp(1), keys: vec![] };
        let other =
            Revocation { id: "2".into(), what: Target::Serial { serial: "1".into() }, keys: vec![spki], ..one.clone() };
        let directive = directive("td").with_revoked(vec![one, other]);
        assert_eq!((directive.deny.len(), directive.revoked.len(), directive.needs()), (1, 2, 2));
    }

    #[test]
    fn a_directive_of_an_earlier_version_wants_nothing_renewed() {
        let (ca, other) = (Authority::new("td"), Authority::new("td"));
        let chain = ca.issue("spiffe://td/shop/orders").chain().to_vec();
        let earlier = r#"{"version":1,"trust_domain":"td","issued_us":1,"bundle":[]}"#;
        let mut directive: Directive = serde_json::from_str(earlier).unwrap();
        assert!(!directive.wants_renewed(&chain));
        directive.renew.roots = vec![tls::spki_of(&other.trust().domains.into_values().next().unwrap()[0]).unwrap()];
        assert!(!directive.wants_renewed(&chain) && !directive.wants_renewed(&[]));
        let root = ca.trust().domains.into_values().next().unwrap().remove(0);
        directive.renew.roots.push(tls::spki_of(&root).unwrap());
        let with_root = [chain[0].clone(), root];
        assert!(directive.wants_renewed(&with_root));
    }
}
