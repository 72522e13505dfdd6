//! Who somebody is: SPIFFE IDs, instances, and the strict rules for the leaf certificate that proves one.
//!
//! Chains and signatures are webpki's task (see `tls`); it is lenient where a SPIFFE verifier may not be
//! (two URI names, none at all, no key usage), so the leaf is judged here.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use crate::time::Timestamp;

/// Longest SPIFFE ID, in bytes (SPIFFE-ID specification, section 2.3).
const MAX_SPIFFE_ID: usize = 2048;
/// Longest trust domain name, in bytes (the same, section 2.1).
const MAX_TRUST_DOMAIN: usize = 255;
/// Longest name of an instance: that of a DNS label, so that a container's hostname fits.
const MAX_INSTANCE: usize = 63;

/// A name that does not follow the rules, and which rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is no {what}: {rule}")]
pub struct BadName {
    name: String,
    what: &'static str,
    rule: &'static str,
}

fn bad(name: &str, what: &'static str, rule: &'static str) -> BadName {
    BadName { name: name.chars().take(120).collect(), what, rule }
}

/// The name of a trust domain, for example `shop.example`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TrustDomain(String);

impl TrustDomain {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The ID of `namespace/service` in this domain.
    pub fn workload(&self, path: &str) -> Result<SpiffeId, BadName> {
        format!("spiffe://{}/{}", self.0, path.trim_start_matches('/')).parse()
    }
}

impl FromStr for TrustDomain {
    type Err = BadName;

    fn from_str(name: &str) -> Result<TrustDomain, BadName> {
        let fault = |rule| Err(bad(name, "trust domain", rule));
        if name.is_empty() || name.len() > MAX_TRUST_DOMAIN {
            return fault("it must have 1 to 255 characters");
        }
        if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b)) {
            return fault("only a-z, 0-9, dot, dash and underscore are allowed");
        }
        Ok(TrustDomain(name.to_owned()))
    }
}

/// A workload's name, `spiffe://<trust-domain>/<namespace>/<service>`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId {
    text: String,
    /// Where the path begins in `text`, its slash included.
    path_at: usize,
}

impl SpiffeId {
    /// The whole ID.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Its trust domain.
    pub fn trust_domain(&self) -> TrustDomain {
        TrustDomain(self.text["spiffe://".len()..self.path_at].to_owned())
    }

    /// What follows the trust domain, without the first slash: `shop/orders`.
    pub fn path(&self) -> &str {
        &self.text[self.path_at + 1..]
    }
}

impl FromStr for SpiffeId {
    type Err = BadName;

    fn from_str(text: &str) -> Result<SpiffeId, BadName> {
        let fault = |rule| Err(bad(text, "SPIFFE ID", rule));
        if text.len() > MAX_SPIFFE_ID {
            return fault("it is longer than 2048 bytes");
        }
        let Some(rest) = text.strip_prefix("spiffe://") else { return fault("it must begin with spiffe://") };
        let Some(slash) = rest.find('/') else {
            return fault("it names no workload: a path must follow the trust domain");
        };
        rest[..slash].parse::<TrustDomain>()?;
        for segment in rest[slash + 1..].split('/') {
            if segment.is_empty() {
                return fault("a segment of its path is empty, or it ends in a slash");
            }
            if segment == "." || segment == ".." {
                return fault("a segment of its path is a dot segment");
            }
            if !segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
                return fault("its path may have letters, digits, dot, dash and underscore only");
            }
        }
        Ok(SpiffeId { text: text.to_owned(), path_at: "spiffe://".len() + slash })
    }
}

/// One running container of a workload, for example its hostname.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InstanceId(String);

impl InstanceId {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InstanceId {
    type Err = BadName;

    fn from_str(name: &str) -> Result<InstanceId, BadName> {
        if name.is_empty() || name.len() > MAX_INSTANCE {
            return Err(bad(name, "instance name", "it must have 1 to 63 characters"));
        }
        if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
            return Err(bad(name, "instance name", "only letters, digits, dot, dash and underscore are allowed"));
        }
        Ok(InstanceId(name.to_owned()))
    }
}

macro_rules! text_type {
    ($name:ident, $field:tt) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.$field)
            }
        }
        impl TryFrom<String> for $name {
            type Error = BadName;
            fn try_from(text: String) -> Result<$name, BadName> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.$field
            }
        }
    };
}
text_type!(TrustDomain, 0);
text_type!(SpiffeId, text);
text_type!(InstanceId, 0);

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One agent: the workload it stands beside, and which instance of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AgentId {
    /// The workload.
    pub workload: SpiffeId,
    /// The instance.
    pub instance: InstanceId,
}

impl fmt::Display for AgentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.workload, self.instance)
    }
}

impl FromStr for AgentId {
    type Err = BadName;

    fn from_str(text: &str) -> Result<AgentId, BadName> {
        let Some((workload, instance)) = text.split_once('#') else {
            return Err(bad(text, "agent", "it must be <SPIFFE ID>#<instance>"));
        };
        Ok(AgentId { workload: workload.parse()?, instance: instance.parse()? })
    }
}

/// SHA-256 of something: a public key (SPKI), a certificate, a batch. Shows as hex.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Sha256(pub [u8; 32]);

impl Sha256 {
    /// The hash of `parts`, one after another.
    pub fn of(parts: &[&[u8]]) -> Sha256 {
        let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
        parts.iter().for_each(|part| context.update(part));
        let mut hash = [0; 32];
        hash.copy_from_slice(context.finish().as_ref());
        Sha256(hash)
    }

    /// All zero: what stands before the first of a chain.
    pub const ZERO: Sha256 = Sha256([0; 32]);
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Sha256 {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Sha256, BadName> {
        let fault = || bad(text, "SHA-256 hash", "it must be 64 hexadecimal digits");
        if text.len() != 64 || !text.is_ascii() {
            return Err(fault());
        }
        let mut hash = [0; 32];
        for (i, byte) in hash.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| fault())?;
        }
        Ok(Sha256(hash))
    }
}

impl TryFrom<String> for Sha256 {
    type Error = BadName;
    fn try_from(text: String) -> Result<Sha256, BadName> {
        text.parse()
    }
}

impl From<Sha256> for String {
    fn from(hash: Sha256) -> String {
        hash.to_string()
    }
}

/// The name a verified certificate gives its holder.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PeerName {
    /// A workload of a trust domain.
    Spiffe(SpiffeId),
    /// A foreign peer with DNS names; accepted only where configured.
    Dns(Vec<String>),
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PeerName::Spiffe(id) => fmt::Display::fmt(id, f),
            PeerName::Dns(names) => write!(f, "dns:{}", names.join(",")),
        }
    }
}

/// What a leaf certificate says of its holder. Trust it only once the chain was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Who.
    pub name: PeerName,
    /// SHA-256 of the public key (SPKI).
    pub spki: Sha256,
    /// Serial number, in hex.
    pub serial: String,
    /// SHA-256 of the public keys (SPKI) of every CA that may stand between it and a root: a revoked one is found here.
    pub issuers: Arc<[Sha256]>,
    /// Begin of validity.
    pub not_before: Timestamp,
    /// End of validity.
    pub not_after: Timestamp,
}

/// The end of a connection that a leaf is shown at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// Shown by a client.
    Client,
    /// Shown by a server.
    Server,
}

/// Which rule of an X.509-SVID leaf, or of who signed it, a certificate breaks (SPIFFE X509-SVID, sections 2 to 5).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeafFault {
    /// Not parseable, or with bytes left over.
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    /// A CA certificate used as a leaf.
    #[error("the certificate is a CA, not a leaf")]
    IsCa,
    /// Something else used as a CA.
    #[error("the certificate is no CA")]
    NoCa,
    /// Key usage is missing or lacks digitalSignature.
    #[error("the certificate's key usage does not allow digital signatures")]
    NoDigitalSignature,
    /// Key usage allows signing certificates or CRLs.
    #[error("the certificate's key usage allows signing certificates or CRLs")]
    SignsOthers,
    /// Extended key usage is missing or not for this end.
    #[error("the certificate's extended key usage does not include {0}")]
    WrongUsage(&'static str),
    /// More than one URI name.
    #[error("the certificate has {0} URI names, exactly one is allowed")]
    ManyUris(usize),
    /// Neither a URI name nor a DNS name.
    #[error("the certificate has no URI name and no DNS name")]
    NoName,
    /// The URI name is no SPIFFE ID.
    #[error(transparent)]
    BadName(#[from] BadName),
    /// A CA of the chain may not sign certificates.
    #[error("a CA of the chain has a key usage that does not allow signing certificates")]
    IssuerMayNotSign,
    /// A DNS name holds something else than a host name.
    #[error("the certificate has a DNS name that is none")]
    BadDns,
}

/// Judges the leaf `der` by the strict rules for `usage` and returns who it names.
///
/// The signature, the chain and the dates are not looked at here.
pub fn judge_leaf(der: &[u8], usage: Usage) -> Result<Peer, LeafFault> {
    let (rest, cert) = X509Certificate::from_der(der).map_err(|e| LeafFault::Unreadable(e.to_string()))?;
    if !rest.is_empty() {
        return Err(LeafFault::Unreadable(format!("{} bytes follow it", rest.len())));
    }
    judge_usage(&cert, usage)?;
    Ok(Peer {
        name: read_name(&cert)?,
        spki: Sha256::of(&[cert.public_key().raw]),
        serial: cert.serial.to_str_radix(16),
        issuers: Arc::default(),
        not_before: Timestamp::from_secs(cert.validity().not_before.timestamp()),
        not_after: Timestamp::from_secs(cert.validity().not_after.timestamp()),
    })
}

/// Reads the certificate of a server for people's browsers: its names are what it says, host names, addresses or, without any,
/// its subject. Only one that is for something else than servers is refused.
pub fn read_server(der: &[u8]) -> Result<Peer, LeafFault> {
    let unreadable = |e: String| LeafFault::Unreadable(e);
    let (rest, cert) = X509Certificate::from_der(der).map_err(|e| unreadable(e.to_string()))?;
    if !rest.is_empty() {
        return Err(unreadable(format!("{} bytes follow it", rest.len())));
    }
    let extended = cert.extended_key_usage().map_err(|e| unreadable(e.to_string()))?.map(|e| e.value);
    if extended.is_some_and(|e| !e.server_auth && !e.any) {
        return Err(LeafFault::WrongUsage("server authentication"));
    }
    let alternatives = cert.subject_alternative_name().map_err(|e| unreadable(e.to_string()))?;
    let names = alternatives.iter().flat_map(|names| &names.value.general_names).take(MAX_SERVER_NAMES);
    let mut names: Vec<String> = names.filter_map(server_name).collect();
    if names.is_empty() {
        names.push(describe(der)?.subject);
    }
    Ok(Peer {
        name: PeerName::Dns(names),
        spki: Sha256::of(&[cert.public_key().raw]),
        serial: cert.serial.to_str_radix(16),
        issuers: Arc::default(),
        not_before: Timestamp::from_secs(cert.validity().not_before.timestamp()),
        not_after: Timestamp::from_secs(cert.validity().not_after.timestamp()),
    })
}

fn server_name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some(name.chars().filter(|c| !c.is_control()).take(MAX_SUBJECT).collect()),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(std::net::IpAddr::from);
            v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(std::net::IpAddr::from)).ok().map(|ip| ip.to_string())
        }
        _ => None,
    }
}

fn judge_usage(cert: &X509Certificate<'_>, usage: Usage) -> Result<(), LeafFault> {
    let unreadable = |e: x509_parser::error::X509Error| LeafFault::Unreadable(e.to_string());
    if cert.basic_constraints().map_err(unreadable)?.is_some_and(|c| c.value.ca) {
        return Err(LeafFault::IsCa);
    }
    let key_usage = cert.key_usage().map_err(unreadable)?.ok_or(LeafFault::NoDigitalSignature)?.value;
    if !key_usage.digital_signature() {
        return Err(LeafFault::NoDigitalSignature);
    }
    if key_usage.key_cert_sign() || key_usage.crl_sign() {
        return Err(LeafFault::SignsOthers);
    }
    let extended = cert.extended_key_usage().map_err(unreadable)?.map(|e| e.value);
    let (allowed, word) = match usage {
        Usage::Client => (extended.is_some_and(|e| e.client_auth), "client authentication"),
        Usage::Server => (extended.is_some_and(|e| e.server_auth), "server authentication"),
    };
    if allowed { Ok(()) } else { Err(LeafFault::WrongUsage(word)) }
}

/// Whether the CA certificate `der` may sign certificates; what is no CA signs nothing anyhow, and is let be.
///
/// webpki looks at the CA flag and not at the key usage. One without key usage may by RFC 5280, and may not by
/// X509-SVID, section 4.3: that is what `required` says.
pub fn judge_issuer(der: &[u8], required: bool) -> Result<(), LeafFault> {
    let unreadable = |e: String| LeafFault::Unreadable(e);
    let (_, cert) = X509Certificate::from_der(der).map_err(|e| unreadable(e.to_string()))?;
    if !cert.basic_constraints().map_err(|e| unreadable(e.to_string()))?.is_some_and(|c| c.value.ca) {
        return Ok(());
    }
    let usage = cert.key_usage().map_err(|e| unreadable(e.to_string()))?;
    match usage.map(|usage| usage.value.key_cert_sign()) {
        Some(true) => Ok(()),
        None if !required => Ok(()),
        _ => Err(LeafFault::IssuerMayNotSign),
    }
}

/// What a person wants to know of a CA's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// Whom it names, cut to what fits a line and without control characters.
    pub subject: String,
    /// Begin of validity.
    pub not_before: Timestamp,
    /// End of validity.
    pub not_after: Timestamp,
}

/// Most characters of a subject that are shown.
const MAX_SUBJECT: usize = 120;
/// Most names of a server's certificate that are shown.
const MAX_SERVER_NAMES: usize = 20;

/// Reads what a person wants to know; nothing is judged.
pub fn describe(der: &[u8]) -> Result<Described, LeafFault> {
    let (_, cert) = X509Certificate::from_der(der).map_err(|e| LeafFault::Unreadable(e.to_string()))?;
    let subject = cert.subject().to_string();
    Ok(Described {
        subject: subject.chars().filter(|c| !c.is_control()).take(MAX_SUBJECT).collect(),
        not_before: Timestamp::from_secs(cert.validity().not_before.timestamp()),
        not_after: Timestamp::from_secs(cert.validity().not_after.timestamp()),
    })
}

/// Whether the certificate `der` may stand in a trust bundle: it is a CA that may sign certificates.
///
/// A leaf among the roots would vouch for itself, and webpki does not look.
pub fn judge_root(der: &[u8]) -> Result<(), LeafFault> {
    let unreadable = |e: String| LeafFault::Unreadable(e);
    let (rest, cert) = X509Certificate::from_der(der).map_err(|e| unreadable(e.to_string()))?;
    if !rest.is_empty() {
        return Err(unreadable(format!("{} bytes follow it", rest.len())));
    }
    if !cert.basic_constraints().map_err(|e| unreadable(e.to_string()))?.is_some_and(|c| c.value.ca) {
        return Err(LeafFault::NoCa);
    }
    judge_issuer(der, false)
}

fn read_name(cert: &X509Certificate<'_>) -> Result<PeerName, LeafFault> {
    let names = cert
        .subject_alternative_name()
        .map_err(|e| LeafFault::Unreadable(e.to_string()))?
        .map(|san| san.value.general_names.as_slice())
        .unwrap_or_default();
    let uris: Vec<&str> =
        names.iter().filter_map(|n| if let GeneralName::URI(u) = n { Some(*u) } else { None }).collect();
    match uris[..] {
        [id] => Ok(PeerName::Spiffe(id.parse()?)),
        [] => dns_names(names),
        _ => Err(LeafFault::ManyUris(uris.len())),
    }
}

fn dns_names(names: &[GeneralName<'_>]) -> Result<PeerName, LeafFault> {
    let mut found = Vec::new();
    for name in names {
        let GeneralName::DNSName(dns) = name else { continue };
        if dns.is_empty() || dns.len() > 253 || !dns.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._*".contains(&b))
        {
            return Err(LeafFault::BadDns);
        }
        found.push(dns.to_ascii_lowercase());
    }
    if found.is_empty() { Err(LeafFault::NoName) } else { Ok(PeerName::Dns(found)) }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType};

    use super::*;

    fn check_id(text: &str, ok: bool) {
        assert_eq!(text.parse::<SpiffeId>().is_ok(), ok, "{text:?}: {:?}", text.parse::<SpiffeId>());
    }

    #[test]
    fn spiffe_ids_are_strict() {
        check_id("spiffe://shop.example/shop/orders", true);
        check_id("spiffe://td/a", true);
        for bad in [
            "",
            "spiffe://",
            "spiffe://td",
            "spiffe://td/",
            "spiffe://td/a/",
            "spiffe://td//a",
            "spiffe://TD/a",
            "spiffe://td:443/a",
            "spiffe://user@td/a",
            "spiffe://td/a?b",
            "spiffe://td/a#b",
            "spiffe://td/%41",
            "spiffe://td/..",
            "spiffe://td/./a",
            "SPIFFE://td/a",
            "https://td/a",
            "spiffe://td/a b",
            "spiffe://td/a\0",
            "spiffe:///a",
            "spiffe://td/ä",
        ] {
            check_id(bad, false);
        }
        check_id(&format!("spiffe://td/{}", "a".repeat(2040)), false);
    }

    #[test]
    fn a_spiffe_id_comes_apart() {
        let id: SpiffeId = "spiffe://shop.example/shop/orders".parse().unwrap();
        assert_eq!((id.trust_domain().as_str(), id.path()), ("shop.example", "shop/orders"));
        assert_eq!(id.trust_domain().workload("shop/orders").unwrap(), id);
    }

    #[test]
    fn agents_and_hashes_read_what_they_show() {
        let agent: AgentId = "spiffe://td/a/b#c1".parse().unwrap();
        assert_eq!(agent.to_string().parse::<AgentId>().unwrap(), agent);
        let hash = Sha256::of(&[b"a", b"b"]);
        assert_eq!(hash.to_string().parse::<Sha256>().unwrap(), hash);
        assert_eq!(hash, Sha256::of(&[b"ab"]));
        assert!("é".repeat(32).parse::<Sha256>().is_err());
    }

    fn svid() -> CertificateParams {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![uri("spiffe://td/a/b")];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    fn judge(params: CertificateParams, usage: Usage) -> Result<PeerName, LeafFault> {
        let cert = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        judge_leaf(cert.der(), usage).map(|peer| peer.name)
    }

    #[test]
    fn a_proper_leaf_names_its_workload() {
        for usage in [Usage::Client, Usage::Server] {
            assert_eq!(judge(svid(), usage), Ok(PeerName::Spiffe("spiffe://td/a/b".parse().unwrap())));
        }
    }

    #[test]
    fn each_broken_rule_has_its_own_fault() {
        let with = |change: &dyn Fn(&mut CertificateParams)| {
            let mut params = svid();
            change(&mut params);
            judge(params, Usage::Client)
        };
        assert_eq!(with(&|p| p.subject_alt_names.push(uri("spiffe://td/c"))), Err(LeafFault::ManyUris(2)));
        assert_eq!(with(&|p| p.subject_alt_names.clear()), Err(LeafFault::NoName));
        assert!(matches!(with(&|p| p.subject_alt_names = vec![uri("https://td/a")]), Err(LeafFault::BadName(_))));
        assert!(matches!(with(&|p| p.subject_alt_names = vec![uri("spiffe://td/a/")]), Err(LeafFault::BadName(_))));
        assert_eq!(with(&|p| p.key_usages.clear()), Err(LeafFault::NoDigitalSignature));
        assert_eq!(with(&|p| p.key_usages = vec![KeyUsagePurpose::KeyAgreement]), Err(LeafFault::NoDigitalSignature));
        assert_eq!(with(&|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign)), Err(LeafFault::SignsOthers));
        assert_eq!(with(&|p| p.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained)), Err(LeafFault::IsCa));
        let no_client = Err(LeafFault::WrongUsage("client authentication"));
        assert_eq!(with(&|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]), no_client);
        assert_eq!(with(&|p| p.extended_key_usages.clear()), no_client);
        assert_eq!(with(&|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any]), no_client);
    }

    #[test]
    fn dns_names_are_read_when_there_is_no_uri() {
        let mut params = svid();
        params.subject_alt_names = vec![SanType::DnsName("API.shop.example".try_into().unwrap())];
        assert_eq!(judge(params, Usage::Client), Ok(PeerName::Dns(vec!["api.shop.example".into()])));
    }

    #[test]
    fn broken_bytes_are_an_error_at_every_length() {
        let cert = svid().self_signed(&KeyPair::generate().unwrap()).unwrap();
        let der = cert.der();
        for cut in 0..der.len() {
            assert!(judge_leaf(&der[..cut], Usage::Client).is_err(), "cut at {cut}");
        }
        let longer = [der.as_ref(), b"x"].concat();
        assert!(matches!(judge_leaf(&longer, Usage::Client), Err(LeafFault::Unreadable(_))));
    }
}
