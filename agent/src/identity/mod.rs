//! Who this agent is: one channel of whole identities, each with everything that follows from it.
//!
//! Key, chain, roots and directive change at different times, but are only ever used together: a change of any of them
//! makes a whole new [`Identity`], and whoever handshakes takes the newest. [`keeper`] makes them.

pub mod enrol;
pub mod foreign;
pub mod keeper;
mod keeping;
#[cfg(test)]
mod spire;
mod store;

use std::sync::Arc;

use foreign::Foreign;
use rustls::{ClientConfig, ServerConfig};
use sidewarden_proto::crl::Revocation;
use sidewarden_proto::directive::{Directive, ForeignRoots};
use sidewarden_proto::event::Direction;
use sidewarden_proto::identity::{Peer, PeerName, SpiffeId, TrustDomain, Usage};
use sidewarden_proto::policy::Extract;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{self, Credential, Expect, Floor, GROUPS, Group, TlsError, Trust, Verifier};
use sidewarden_proto::wire::ALPN_STREAMS;
use tokio::sync::watch;

use crate::dial::tls_fault;
use crate::policy::{Central, Decision};
use crate::proxy::connections::Live;

pub use store::{Checked, Given, Issued, Store, StoreError, certificates};

/// Where everybody looks for the newest identity. `None`: there is none yet, and nothing gets through.
pub type Current = watch::Receiver<Option<Arc<Identity>>>;

/// What every identity of this agent is built with.
#[derive(Clone, Debug)]
pub struct Terms {
    /// Whom else we trust, by files.
    pub foreign: Foreign,
    /// The collector's trust domain, where it is not our own.
    pub home: Option<TrustDomain>,
    /// Key exchange groups, the one we like best first.
    pub groups: Vec<Group>,
}

impl Terms {
    /// The trust domain whose collector we listen to.
    pub fn home_of(&self, workload: &SpiffeId) -> TrustDomain {
        self.home.clone().unwrap_or_else(|| workload.trust_domain())
    }
}

impl Default for Terms {
    fn default() -> Terms {
        Terms { foreign: Foreign::default(), home: None, groups: GROUPS.to_vec() }
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
    /// By which roots a collector is known, and its word.
    pub collectors: Trust,
    /// For whoever connects to us.
    pub server: Arc<ServerConfig>,
    /// For other agents, who carry one stream after the other on a connection.
    pub streams: Arc<ServerConfig>,
    /// What the collector says.
    pub directive: Option<Arc<Directive>>,
    /// The policy in it, as far as it is about us; or why it cannot be read.
    pub policy: Result<Extract, String>,
    /// The collector's trust domain.
    pub home: TrustDomain,
    /// Whether in our own domain, or the collector's, the collector's own CA alone vouches for peers.
    is_closed: bool,
    /// Judges the chains of live connections again.
    verifier: Verifier,
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

/// Adds the roots that the collector tells of beside its own bundle, but for domains whose roots are `settled`.
fn add_imported(trust: &mut Trust, imported: &ForeignRoots, settled: &[&TrustDomain]) {
    let foreign = imported.domains.iter().filter(|(domain, _)| !settled.contains(domain));
    trust.add(&foreign.map(|(domain, roots)| (domain.clone(), certificates(roots))).collect());
    let new: Vec<_> = certificates(&imported.dns).into_iter().filter(|root| !trust.dns_roots.contains(root)).collect();
    trust.dns_roots.extend(new);
}

/// The roots of the collector's domain, if there are any.
fn collectors(trust: &Trust, home: &TrustDomain) -> Trust {
    trust.domains.get(home).map_or_else(Trust::default, |roots| Trust::single(home.clone(), roots.clone()))
}

/// What the policy says about `own`. Half of a policy is none: what it forbids would be allowed here.
fn extract(directive: Option<&Directive>, own: &SpiffeId) -> Result<Extract, String> {
    let applied = directive.and_then(|directive| Some((directive.policy.as_ref()?, &directive.trust_domain)));
    let Some((applied, domain)) = applied else { return Ok(Extract::default()) };
    Extract::of_applied(applied, own, domain)
        .map_err(|faults| format!("this agent cannot read the policy and must be updated: {faults}"))
}

impl Identity {
    /// What the collector says, for whoever decides.
    pub fn central(&self) -> Central<'_> {
        Central { directive: self.directive.as_deref(), policy: self.policy.as_ref().map_err(String::as_str) }
    }

    /// From what was issued or found, what the collector says, and what does not change.
    pub fn build(checked: Checked, directive: Option<Arc<Directive>>, terms: &Terms) -> Result<Identity, TlsError> {
        let Checked { credential, workload, mut trust, from } = checked;
        let home = terms.home_of(&workload);
        // One of the domain that we were in before says nothing about this one.
        let directive = directive.filter(|directive| directive.trust_domain == home);
        // Whoever gave us roots of the collector's domain has the say there; of our own domain the collector never has it.
        let home_is_settled = from == Given::ByApi && trust.domains.contains_key(&home);
        if let Some(directive) = directive.as_ref().filter(|directive| !directive.bundle.is_empty())
            && !home_is_settled
        {
            trust.domains.insert(home.clone(), certificates(&directive.bundle));
        }
        let own = workload.trust_domain();
        let of_collector = [trust.domains.get(&own).cloned(), trust.domains.get(&home).cloned()];
        trust.add(&terms.foreign.domains);
        trust.dns_roots.clone_from(&terms.foreign.dns_roots);
        let by_collector = collectors(&trust, &home);
        if let Some(directive) = &directive {
            let settled = [Some(&own).filter(|own| **own != home), Some(&home).filter(|_| home_is_settled)];
            add_imported(&mut trust, &directive.foreign, &settled.into_iter().flatten().collect::<Vec<_>>());
        }
        // Whoever was enrolled has a collector by its own CA: another CA of the domain speaks for peers, and not for collectors.
        let collectors = if from == Given::ByCollector { by_collector } else { collectors(&trust, &home) };
        let is_closed = from == Given::ByCollector
            && [trust.domains.get(&own).cloned(), trust.domains.get(&home).cloned()] == of_collector;
        trust.revocation = terms.foreign.crls.as_ref().map(|crls| Revocation {
            lists: crls.lists.clone(),
            strict: crls.strict,
            exempt: [workload.trust_domain(), home.clone()].into(),
        });
        let verifier = Verifier::new(&trust)?;
        let groups = terms.groups.clone();
        let server = tls::server_config_with(&groups, &credential, &trust, Floor::Tls12, &[])?;
        let streams = tls::server_config_with(&groups, &credential, &trust, Floor::Tls13, &[ALPN_STREAMS])?;
        let policy = extract(directive.as_deref(), &workload);
        Ok(Identity {
            credential,
            workload,
            trust,
            collectors,
            server,
            streams,
            directive,
            policy,
            home,
            is_closed,
            verifier,
            groups,
        })
    }

    /// For a connection to `expect`.
    pub fn client(&self, expect: Expect, floor: Floor, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, TlsError> {
        tls::client_config_with(&self.groups, &self.credential, &self.trust, expect, floor, alpn)
    }

    /// For a session with a collector.
    pub fn uplink(&self, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, TlsError> {
        let expect = Expect::Collector(self.home.clone());
        tls::client_config_with(&self.groups, &self.credential, &self.collectors, expect, Floor::Tls13, alpn)
    }

    /// For clients whose certificates nobody looks at: `insecure_trust_all`.
    pub fn insecure_server(&self) -> Result<Arc<ServerConfig>, TlsError> {
        tls::insecure_server_config(&self.groups, &self.credential)
    }

    /// For servers whose certificates nobody looks at: `insecure_trust_all`.
    pub fn insecure_client(&self) -> Result<Arc<ClientConfig>, TlsError> {
        tls::insecure_client_config(&self.groups, &self.credential)
    }

    /// Whether the chain of a live connection with `peer` may have to be judged again: a root of another CA can be taken
    /// away, and revocation lists change. Whom the collector's own CA no longer vouches for is told by the directive.
    pub fn may_judge_again(&self, peer: &Peer) -> bool {
        let is_ours = |id: &SpiffeId| [&self.workload.trust_domain(), &self.home].contains(&&id.trust_domain());
        let is_told = self.is_closed && matches!(&peer.name, PeerName::Spiffe(id) if is_ours(id));
        !is_told || self.trust.revocation.is_some()
    }

    /// Whether somebody who was trusted at `then`, by `before`, may not be trusted at `now`.
    pub fn may_trust_less(&self, before: &Trust, (then, now): (Timestamp, Timestamp)) -> bool {
        let lists = self.trust.revocation.as_ref();
        self.trust != *before || lists.is_some_and(|lists| lists.ran_out(then, now))
    }

    /// Whether we still trust the chain of a live connection.
    pub fn judge_again(&self, live: &Live, now: Timestamp) -> Decision {
        let usage = if live.direction == Direction::Inbound { Usage::Client } else { Usage::Server };
        let Some(shown) = &live.shown else { return Decision::Allow };
        match self.verifier.verify(shown, usage, now) {
            Ok(_) => Decision::Allow,
            Err(error) => {
                let (reason, text) = tls_fault(&error);
                Decision::Refuse(reason, text)
            }
        }
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
    use std::fs;
    use std::path::Path;
    use std::time::Duration;

    use rcgen::{
        BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
        SanType,
    };
    use rustls::pki_types::CertificateDer;
    use sidewarden_proto::directive::{Deny, Renew, Signed};
    use sidewarden_proto::enrol::Der;
    use sidewarden_proto::given::files::Files;

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

        /// A revocation list of these serial numbers, DER.
        pub fn list(&self, revoked: &[Vec<u8>]) -> Vec<u8> {
            self.list_until(revoked, 1, Timestamp::now().plus(Duration::from_secs(3600)))
        }

        /// The same, with a number and an end.
        pub fn list_until(&self, revoked: &[Vec<u8>], number: u64, until: Timestamp) -> Vec<u8> {
            let at = |t: Timestamp| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(t.as_secs() as u64);
            let begins = at(Timestamp::now().minus(Duration::from_secs(7200)));
            let revoked = revoked.iter().map(|serial| rcgen::RevokedCertParams {
                serial_number: rcgen::SerialNumber::from_slice(serial),
                revocation_time: begins,
                reason_code: None,
                invalidity_date: None,
            });
            let params = rcgen::CertificateRevocationListParams {
                this_update: begins,
                next_update: at(until),
                crl_number: number.into(),
                issuing_distribution_point: None,
                revoked_certs: revoked.collect(),
                key_identifier_method: rcgen::KeyIdMethod::Sha256,
            };
            params.signed_by(&self.issuer).unwrap().der().to_vec()
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
            let directive = Directive {
                version,
                trust_domain: self.domain.parse().unwrap(),
                issued_us,
                bundle,
                deny,
                revoked: Vec::new(),
                foreign: ForeignRoots::default(),
                renew: Renew::default(),
                quarantined: Vec::new(),
                released: Vec::new(),
                policy: None,
            };
            Signed::sign(&directive, &self.collector()).unwrap()
        }
    }

    /// As PEM.
    pub fn pem(label: &str, der: &[u8]) -> String {
        let text = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, der);
        let lines: Vec<&str> = (0..text.len()).step_by(64).map(|i| &text[i..text.len().min(i + 64)]).collect();
        format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
    }

    /// Writes an identity as PEM.
    pub fn write(dir: &Path, ca: &Ca, path: &str) -> Files {
        let files = Files { cert: dir.join("tls.crt"), key: dir.join("tls.key"), roots: dir.join("ca.crt") };
        let issued = ca.issue(path);
        fs::write(&files.key, pem("PRIVATE KEY", &issued.key().unwrap())).unwrap();
        fs::write(&files.cert, pem("CERTIFICATE", &issued.chain()[0].0)).unwrap();
        fs::write(&files.roots, pem("CERTIFICATE", &ca.root)).unwrap();
        files
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

    use sidewarden_proto::enrol::Der;

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

    /// A collector whose domain has another CA besides its own tells of that CA's roots; who has them from elsewhere needs none.
    #[test]
    fn further_roots_of_the_collectors_domain_are_trusted_beside_its_bundle() {
        let (ca, elsewhere, partner) = (Ca::new("td"), Ca::new("td"), Ca::new("partner"));
        let domain = |name: &str| name.parse::<TrustDomain>().unwrap();
        let now = Timestamp::now();
        let foreign =
            ForeignRoots { domains: [(domain("td"), vec![Der(elsewhere.root.to_vec())])].into(), dns: vec![] };
        let directive = Directive { foreign, ..ca.directive(1, vec![], now).open(&ca.trust(), now).unwrap() };
        let build = |ca: &Ca, from, terms: &Terms| {
            let checked = Checked { from, ..ca.issue("shop/web").check().unwrap() };
            let identity = Identity::build(checked, Some(Arc::new(directive.clone())), terms).unwrap();
            [&identity.trust, &identity.collectors].map(|trust| trust.domains[&domain("td")].clone())
        };
        let (both, ours) = (vec![ca.root.clone(), elsewhere.root.clone()], vec![ca.root.clone()]);
        let theirs = vec![elsewhere.root.clone()];
        let own = Terms::default();
        assert_eq!(
            build(&ca, Given::ByCollector, &own),
            [both.clone(), ours],
            "another CA speaks for peers, and for no collector"
        );
        assert_eq!(build(&elsewhere, Given::InFiles, &own), [both.clone(), both.clone()]);
        assert_eq!(build(&elsewhere, Given::ByApi, &own), [theirs.clone(), theirs]);
        let abroad = Terms { home: Some(domain("td")), ..Terms::default() };
        assert_eq!(build(&partner, Given::InFiles, &abroad), [both.clone(), both]);
    }

    #[test]
    fn chains_are_kept_only_where_another_ca_or_a_list_can_take_trust_away() {
        let (ca, elsewhere, partner) = (Ca::new("td"), Ca::new("td"), Ca::new("partner"));
        let peer = |of: &Ca| of.issue("shop/web").check().unwrap().credential.peer().clone();
        let keeps = |from, directive: Option<&Directive>, peer: &Peer| {
            let checked = Checked { from, ..ca.issue("shop/web").check().unwrap() };
            let directive = directive.map(|directive| Arc::new(directive.clone()));
            Identity::build(checked, directive, &Terms::default()).unwrap().may_judge_again(peer)
        };
        let now = Timestamp::now();
        let alone = ca.directive(1, vec![], now).open(&ca.trust(), now).unwrap();
        let domains = [("td".parse().unwrap(), vec![Der(elsewhere.root.to_vec())])].into();
        let beside = Directive { foreign: ForeignRoots { domains, dns: vec![] }, ..alone.clone() };
        assert!(!keeps(Given::ByCollector, Some(&alone), &peer(&ca)), "the directive tells of those");
        assert!(keeps(Given::ByCollector, Some(&alone), &peer(&partner)));
        assert!(keeps(Given::ByCollector, Some(&beside), &peer(&ca)));
        assert!(keeps(Given::InFiles, None, &peer(&ca)) && keeps(Given::ByApi, Some(&alone), &peer(&ca)));
    }

    #[test]
    fn a_directive_of_another_domain_says_nothing() {
        let (ca, other, now) = (Ca::new("b"), Ca::new("td"), Timestamp::now());
        let directive = other.directive(9, vec![], now).open(&other.trust(), now).unwrap();
        let checked = ca.issue("shop/web").check().unwrap();
        let identity = Identity::build(checked, Some(Arc::new(directive)), &Terms::default()).unwrap();
        assert_eq!((identity.directive_version(), identity.trust.domains), (0, ca.trust().domains));
    }

    #[test]
    fn imported_roots_are_for_others_than_our_own_domain() {
        let (ca, partner, host) = (Ca::new("td"), Ca::new("partner.example"), Ca::new("host"));
        let der = |ca: &Ca| Der(ca.root.to_vec());
        let domain = |name: &str| name.parse::<TrustDomain>().unwrap();
        let domains = [("td", &partner), ("partner.example", &partner), ("partner.example", &host)];
        let mut foreign = ForeignRoots { dns: vec![der(&host)], ..ForeignRoots::default() };
        for (name, ca) in domains {
            foreign.domains.entry(domain(name)).or_default().push(der(ca));
        }
        let now = Timestamp::now();
        let signed = ca.directive(1, vec![], now).open(&ca.trust(), now).unwrap();
        let directive = Some(Arc::new(Directive { foreign, trust_domain: domain("ops"), ..signed }));
        let terms = Terms { home: Some(domain("ops")), ..Terms::default() };
        let identity = Identity::build(ca.issue("shop/web").check().unwrap(), directive, &terms).unwrap();
        assert_eq!(identity.trust.domains[&domain("td")], std::slice::from_ref(&ca.root));
        assert_eq!(identity.trust.domains[&domain("partner.example")].len(), 2);
        assert_eq!(identity.trust.dns_roots, std::slice::from_ref(&host.root));
    }
}
