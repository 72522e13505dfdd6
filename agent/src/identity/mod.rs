//! Who this agent is: one channel of whole identities, each with everything that follows from it.
//!
//! Key, chain, roots and directive change at different times, but are only ever used together: a change of any of them
//! makes a whole new [`Identity`], and whoever handshakes takes the newest. [`keeper`] makes them.

pub mod enrol;
pub mod files;
pub mod keeper;
mod store;

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, ServerConfig};
use sidewarden_proto::directive::Directive;
use sidewarden_proto::identity::SpiffeId;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{self, Credential, Expect, Floor, GROUPS, Group, TlsError, Trust};
use sidewarden_proto::wire::ALPN_STREAMS;
use tokio::sync::watch;

pub use store::{Checked, Issued, Store, StoreError, certificates};

/// Where everybody looks for the newest identity. `None`: there is none yet, and nothing gets through.
pub type Current = watch::Receiver<Option<Arc<Identity>>>;

/// What every identity of this agent is built with.
#[derive(Clone, Debug)]
pub struct Terms {
    /// The roots for foreign peers.
    pub dns_roots: Vec<CertificateDer<'static>>,
    /// Key exchange groups, the one we like best first.
    pub groups: Vec<Group>,
}

impl Default for Terms {
    fn default() -> Terms {
        Terms { dns_roots: Vec::new(), groups: GROUPS.to_vec() }
    }
}

/// Everything that follows from one key, chain, set of roots and directive.
#[derive(Debug)]
pub struct Identity {
    /// Key and chain.
    pub credential: Credential,
    /// The workload it names.
    pub workload: SpiffeId,
    /// Whom we trust.
    pub trust: Trust,
    /// For whoever connects to us.
    pub server: Arc<ServerConfig>,
    /// For other agents, who carry one stream after the other on a connection.
    pub streams: Arc<ServerConfig>,
    /// What the collector says.
    pub directive: Option<Arc<Directive>>,
    groups: Vec<Group>,
}

/// Why an identity cannot be used now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// Its time is over.
    #[error("our certificate ended at {0}")]
    Ended(Timestamp),
    /// Its time has not begun.
    #[error("clock: our certificate begins at {begins}, and this machine's clock says {now}: set the clock right")]
    NotYet {
        /// When it begins.
        begins: Timestamp,
        /// What the clock says.
        now: Timestamp,
    },
}

impl Identity {
    /// From what was issued or found, what the collector says, and what does not change.
    pub fn build(checked: Checked, directive: Option<Arc<Directive>>, terms: &Terms) -> Result<Identity, TlsError> {
        let Checked { credential, workload, mut trust } = checked;
        if let Some(directive) = directive.as_ref().filter(|directive| !directive.bundle.is_empty()) {
            trust.domains.insert(workload.trust_domain(), certificates(&directive.bundle));
        }
        trust.dns_roots.clone_from(&terms.dns_roots);
        let groups = terms.groups.clone();
        let server = tls::server_config_with(&groups, &credential, &trust, Floor::Tls12, &[])?;
        let streams = tls::server_config_with(&groups, &credential, &trust, Floor::Tls13, &[ALPN_STREAMS])?;
        Ok(Identity { credential, workload, trust, server, streams, directive, groups })
    }

    /// For a connection to `expect`.
    pub fn client(&self, expect: Expect, floor: Floor, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, TlsError> {
        tls::client_config_with(&self.groups, &self.credential, &self.trust, expect, floor, alpn)
    }

    /// Whether it can be used at `now`.
    pub fn usable(&self, now: Timestamp) -> Result<(), Unusable> {
        let peer = self.credential.peer();
        if now < peer.not_before {
            return Err(Unusable::NotYet { begins: peer.not_before, now });
        }
        if now >= peer.not_after { Err(Unusable::Ended(peer.not_after)) } else { Ok(()) }
    }

    /// Version of the directive in force; 0 for none.
    pub fn directive_version(&self) -> u64 {
        self.directive.as_ref().map_or(0, |directive| directive.version)
    }
}

/// A certificate authority for tests.
#[cfg(test)]
pub mod made_up {
    use std::time::Duration;

    use rcgen::{
        BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
        SanType,
    };
    use sidewarden_proto::directive::{Deny, Signed};
    use sidewarden_proto::enrol::Der;

    use super::*;

    /// A root that signs leaves.
    pub struct Ca {
        domain: String,
        issuer: Issuer<'static, KeyPair>,
        /// Its own certificate.
        pub root: CertificateDer<'static>,
    }

    impl Ca {
        /// For one trust domain.
        pub fn new(domain: &str) -> Ca {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            params.distinguished_name.push(DnType::CommonName, "made up root");
            let key = KeyPair::generate().unwrap();
            let root = params.self_signed(&key).unwrap().der().clone();
            Ca { domain: domain.into(), issuer: Issuer::new(params, key), root }
        }

        /// Trust in this root.
        pub fn trust(&self) -> Trust {
            Trust::single(self.domain.parse().unwrap(), vec![self.root.clone()])
        }

        /// Leaf parameters for `path`, valid from a minute ago for an hour.
        pub fn params(&self, path: &str) -> CertificateParams {
            let mut params = CertificateParams::default();
            let id = format!("spiffe://{}/{path}", self.domain);
            params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
            let now = Timestamp::now();
            validity(&mut params, now.minus(Duration::from_secs(60)), now.plus(Duration::from_secs(3600)));
            params
        }

        /// What would be kept after enrolment.
        pub fn issue_with(&self, params: &CertificateParams) -> Issued {
            let key = KeyPair::generate().unwrap();
            let leaf = params.signed_by(&key, &self.issuer).unwrap();
            let chain = vec![Der(leaf.der().to_vec()), Der(self.root.to_vec())];
            Issued::new(&key.serialize_der(), chain, vec![Der(self.root.to_vec())])
        }

        /// The same for a certificate request.
        pub fn sign_request(&self, path: &str, csr: &[u8]) -> sidewarden_proto::enrol::Issued {
            let request = rcgen::CertificateSigningRequestParams::from_der(&csr.to_vec().into()).unwrap();
            let leaf = self.params(path).signed_by(&request.public_key, &self.issuer).unwrap();
            let chain = vec![Der(leaf.der().to_vec()), Der(self.root.to_vec())];
            sidewarden_proto::enrol::Issued { chain, bundle: vec![Der(self.root.to_vec())], directive: None }
        }

        /// The same, for `path`.
        pub fn issue(&self, path: &str) -> Issued {
            self.issue_with(&self.params(path))
        }

        /// A whole identity for `path`.
        pub fn identity(&self, path: &str) -> Arc<Identity> {
            self.identity_of(&self.params(path))
        }

        /// A whole identity with these parameters.
        pub fn identity_of(&self, params: &CertificateParams) -> Arc<Identity> {
            Arc::new(Identity::build(self.issue_with(params).check().unwrap(), None, &Terms::default()).unwrap())
        }

        /// The collector's credential.
        pub fn collector(&self) -> Credential {
            self.issue("sidewarden/collector").check().unwrap().credential
        }

        /// A directive signed by the collector.
        pub fn directive(&self, version: u64, deny: Vec<Deny>, issued_us: Timestamp) -> Signed {
            let bundle = vec![Der(self.root.to_vec())];
            let (trust_domain, revoked) = (self.domain.parse().unwrap(), Vec::new());
            let directive = Directive { version, trust_domain, issued_us, bundle, deny, revoked };
            Signed::sign(&directive, &self.collector()).unwrap()
        }
    }

    /// Sets when a certificate holds.
    pub fn validity(params: &mut CertificateParams, from: Timestamp, until: Timestamp) {
        let at = |t: Timestamp| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(t.as_secs() as u64);
        (params.not_before, params.not_after) = (at(from), at(until));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::made_up::Ca;
    use super::*;

    #[test]
    fn an_identity_is_usable_within_its_time_and_a_wrong_clock_is_named() {
        let identity = Ca::new("td").identity("shop/web");
        let peer = identity.credential.peer();
        assert_eq!(identity.usable(Timestamp::now()), Ok(()));
        assert_eq!(identity.usable(peer.not_after), Err(Unusable::Ended(peer.not_after)));
        let early = identity.usable(peer.not_before.minus(Duration::from_secs(3600))).unwrap_err();
        assert!(early.to_string().starts_with("clock: "), "{early}");
    }
}
