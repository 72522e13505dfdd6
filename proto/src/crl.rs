//! Revocation lists (CRLs) of CAs that are not ours: read from PEM or DER, asked for each peer, and judged for what is
//! lacking among them. Our own identities are revoked by the directive's deny list.
//!
//! Strict means that a foreign peer gets in only when a list that holds now says nothing against any certificate of its
//! chain. Lenient means that what is listed is refused and what is not known is let in. No list at all is never the same
//! as an empty one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, SignatureVerificationAlgorithm, TrustAnchor, UnixTime,
};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, OwnedCertRevocationList, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::revocation_list::CertificateRevocationList;

use crate::identity::{PeerName, Sha256, TrustDomain, Usage};
use crate::time::Timestamp;
use crate::tls::{PeerFault, Trust};

/// A list that begins this much ahead of our clock holds already: clocks differ.
const LEEWAY: Duration = Duration::from_secs(300);
/// Most lists in one file.
const MAX_LISTS: usize = 64;

/// Why a file holds no revocation lists.
#[derive(Debug, thiserror::Error)]
pub enum CrlFault {
    /// Neither PEM nor DER of a list.
    #[error("it holds no revocation list: {0}")]
    Unreadable(String),
    /// There is none in it.
    #[error("it holds no revocation list")]
    Empty,
    /// More than anybody has.
    #[error("it holds more than {MAX_LISTS} revocation lists")]
    Many,
    /// The number went back.
    #[error("the revocation list of {0} is older than the one in force: it would forget who was revoked since")]
    Older(String),
}

/// One list.
#[derive(Clone)]
pub struct Crl {
    parsed: Arc<CertRevocationList<'static>>,
    der: Arc<[u8]>,
    /// Who made it, as a person reads it.
    pub issuer: String,
    /// When it begins.
    pub begins: Timestamp,
    /// When there should be another one.
    pub ends: Timestamp,
    /// Its number, big-endian without leading zeros; empty for none.
    number: Vec<u8>,
}

impl PartialEq for Crl {
    fn eq(&self, other: &Crl) -> bool {
        self.der == other.der
    }
}

impl Eq for Crl {}

impl fmt::Debug for Crl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Crl({}, until {})", self.issuer, self.ends)
    }
}

impl Crl {
    /// Reads one in DER.
    pub fn from_der(der: &[u8]) -> Result<Crl, CrlFault> {
        let unreadable = |error: &dyn fmt::Display| CrlFault::Unreadable(error.to_string());
        let parsed = OwnedCertRevocationList::from_der(der).map_err(|e| unreadable(&format!("{e:?}")))?;
        let (_, list) = CertificateRevocationList::from_der(der).map_err(|e| unreadable(&e))?;
        let at = |time: x509_parser::time::ASN1Time| Timestamp::from_secs(time.timestamp());
        let ends = list.next_update().map(at).ok_or_else(|| unreadable(&"it does not say when it ends"))?;
        let number = list.crl_number().map(|number| number.to_bytes_be()).unwrap_or_default();
        let issuer = list.issuer().to_string().chars().filter(|c| !c.is_control()).take(120).collect();
        let begins = at(list.last_update());
        Ok(Crl { parsed: Arc::new(CertRevocationList::Owned(parsed)), der: der.into(), issuer, begins, ends, number })
    }

    /// Reads all lists of a file, PEM or DER.
    pub fn read_all(bytes: &[u8]) -> Result<Vec<Crl>, CrlFault> {
        if bytes.is_empty() {
            return Err(CrlFault::Empty);
        }
        if bytes.first() == Some(&0x30) {
            return Ok(vec![Crl::from_der(bytes)?]);
        }
        let mut lists = Vec::new();
        for der in CertificateRevocationListDer::pem_slice_iter(bytes) {
            lists.push(Crl::from_der(&der.map_err(|e| CrlFault::Unreadable(e.to_string()))?)?);
            if lists.len() > MAX_LISTS {
                return Err(CrlFault::Many);
            }
        }
        if lists.is_empty() { Err(CrlFault::Empty) } else { Ok(lists) }
    }

    /// What tells it from lists about other certificates: who made it, and for which part of them.
    fn scope(&self) -> (Vec<u8>, Vec<u8>) {
        (self.parsed.issuer().to_vec(), self.parsed.issuing_distribution_point().unwrap_or_default().to_vec())
    }

    fn age(&self) -> (usize, &[u8], Timestamp) {
        (self.number.len(), &self.number, self.begins)
    }

    fn is_by(&self, ca: &X509Certificate<'_>) -> bool {
        let Ok((_, list)) = CertificateRevocationList::from_der(&self.der) else { return false };
        list.issuer().as_raw() == ca.subject().as_raw() && list.verify_signature(ca.public_key()).is_ok()
    }
}

/// Of several lists about the same certificates only the newest counts: an older one knows less.
pub fn newest(lists: Vec<Crl>) -> Vec<Crl> {
    let mut by_scope: BTreeMap<_, Crl> = BTreeMap::new();
    for list in lists {
        match by_scope.get(&list.scope()) {
            Some(other) if other.age() >= list.age() => {}
            _ => drop(by_scope.insert(list.scope(), list)),
        }
    }
    by_scope.into_values().collect()
}

/// Refuses lists that are older than those in force.
pub fn check_no_older(before: &[Crl], now: &[Crl]) -> Result<(), CrlFault> {
    let older = |list: &&Crl| before.iter().any(|was| was.scope() == list.scope() && was.age() > list.age());
    now.iter().find(older).map_or(Ok(()), |list| Err(CrlFault::Older(list.issuer.clone())))
}

/// What revocation lists are to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revocation {
    /// The lists, from [`newest`].
    pub lists: Arc<[Crl]>,
    /// Whether a foreign peer needs a list that holds; otherwise what is not known is let in.
    pub strict: bool,
    /// Trust domains that are not foreign: what is listed is refused there too, but no list is asked for.
    pub exempt: BTreeSet<TrustDomain>,
}

impl Revocation {
    /// Whether a list that foreign peers need has ended after `then`, and by `now`.
    pub fn ran_out(&self, then: Timestamp, now: Timestamp) -> bool {
        self.strict && self.lists.iter().any(|list| then < list.ends && list.ends <= now)
    }

    fn demands_list(&self, name: &PeerName) -> bool {
        let is_exempt = matches!(name, PeerName::Spiffe(id) if self.exempt.contains(&id.trust_domain()));
        self.strict && !is_exempt
    }

    /// Judges a chain that was verified otherwise.
    pub(crate) fn check(
        &self,
        chain: (&CertificateDer<'_>, &[CertificateDer<'_>]),
        anchors: &[TrustAnchor<'_>],
        algorithms: &[&dyn SignatureVerificationAlgorithm],
        (name, usage): (&PeerName, Usage),
        now: UnixTime,
    ) -> Result<(), PeerFault> {
        let demands = self.demands_list(name);
        let latest = Timestamp::from_secs(i64::try_from(now.as_secs()).unwrap_or(i64::MAX)).plus(LEEWAY);
        // One that has not begun clears nobody. Whom it names is revoked all the same: this machine's clock may be behind.
        let counts = |list: &&Crl| !demands || list.begins <= latest;
        let lists: Vec<_> = self.lists.iter().filter(counts).map(|list| &*list.parsed).collect();
        let Ok(options) = RevocationOptionsBuilder::new(&lists) else {
            return if demands { Err(PeerFault::NoRevocationList) } else { Ok(()) };
        };
        let (status, expiration) = match demands {
            true => (UnknownStatusPolicy::Deny, ExpirationPolicy::Enforce),
            false => (UnknownStatusPolicy::Allow, ExpirationPolicy::Ignore),
        };
        let options = options.with_depth(RevocationCheckDepth::Chain).with_status_policy(status);
        let options = options.with_expiration_policy(expiration).build();
        let usage = match usage {
            Usage::Client => KeyUsage::client_auth(),
            Usage::Server => KeyUsage::server_auth(),
        };
        let leaf = EndEntityCert::try_from(chain.0).map_err(fault)?;
        leaf.verify_for_usage(algorithms, anchors, chain.1, now, usage, Some(options), None).map_err(fault)?;
        Ok(())
    }

    /// What is lacking at `now`: each root of foreign peers needs a list of its own that holds.
    pub fn lacking(&self, trust: &Trust, now: Timestamp) -> Vec<String> {
        let foreign = trust.domains.iter().filter(|(domain, _)| !self.exempt.contains(domain));
        let foreign = foreign.map(|(domain, roots)| (domain.as_str(), roots));
        let all = foreign.chain([("peers with DNS names", &trust.dns_roots)]);
        all.flat_map(|(whom, roots)| roots.iter().filter_map(move |root| self.lack_of(whom, root, now))).collect()
    }

    fn lack_of(&self, whom: &str, root: &CertificateDer<'_>, now: Timestamp) -> Option<String> {
        let Ok((_, ca)) = X509Certificate::from_der(root) else { return None };
        let subject: String = ca.subject().to_string().chars().filter(|c| !c.is_control()).take(120).collect();
        match self.lists.iter().find(|list| list.is_by(&ca)) {
            None => Some(format!("there is no revocation list of {subject} ({whom})")),
            Some(list) if list.begins > now.plus(LEEWAY) => {
                Some(format!("clock: the revocation list of {subject} ({whom}) begins only at {}", list.begins))
            }
            Some(list) if list.ends <= now => {
                Some(format!("the revocation list of {subject} ({whom}) ended at {}", list.ends))
            }
            Some(_) => None,
        }
    }
}

fn fault(error: webpki::Error) -> PeerFault {
    match error {
        webpki::Error::CertRevoked => PeerFault::Listed,
        webpki::Error::UnknownRevocationStatus => PeerFault::NoRevocationList,
        webpki::Error::CrlExpired { .. } => PeerFault::StaleRevocationList,
        other => PeerFault::Revocation(format!("{other:?}")),
    }
}

/// A hash of all lists, to tell whether they have changed.
pub fn fingerprint(lists: &[Crl]) -> Sha256 {
    Sha256::of(&lists.iter().map(|list| &*list.der).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertificateRevocationListParams, ExtendedKeyUsagePurpose, IsCa, Issuer,
        KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
    };

    use super::*;
    use crate::event::RefusalReason;
    use crate::tls::{refusal_of, verify_chain};

    const NOW: Timestamp = Timestamp::from_secs(1_800_000_000);
    const HOUR: Duration = Duration::from_secs(3600);

    fn at(time: Timestamp) -> time::OffsetDateTime {
        time::OffsetDateTime::from_unix_timestamp(time.as_secs()).unwrap()
    }

    /// A CA that signs leaves and lists.
    struct Ca {
        cert: CertificateDer<'static>,
        issuer: Issuer<'static, KeyPair>,
    }

    fn ca_params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = (at(NOW.minus(HOUR)), at(NOW.plus(HOUR * 1000)));
        params
    }

    impl Ca {
        fn new(name: &str) -> Ca {
            let (params, key) = (ca_params(name), KeyPair::generate().unwrap());
            Ca { cert: params.self_signed(&key).unwrap().der().clone(), issuer: Issuer::new(params, key) }
        }

        fn intermediate(&self, name: &str, serial: u8) -> Ca {
            let (mut params, key) = (ca_params(name), KeyPair::generate().unwrap());
            params.serial_number = Some(SerialNumber::from(vec![serial]));
            let cert = params.signed_by(&key, &self.issuer).unwrap().der().clone();
            Ca { cert, issuer: Issuer::new(params, key) }
        }

        fn leaf(&self, name: SanType, serial: u8) -> CertificateDer<'static> {
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![name];
            params.serial_number = Some(SerialNumber::from(vec![serial]));
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
            (params.not_before, params.not_after) = (at(NOW.minus(HOUR)), at(NOW.plus(HOUR * 10)));
            params.signed_by(&KeyPair::generate().unwrap(), &self.issuer).unwrap().der().clone()
        }

        fn list(&self, revoked: &[u8]) -> Crl {
            self.list_of(revoked, 1, NOW.minus(HOUR), NOW.plus(HOUR))
        }

        fn list_of(&self, revoked: &[u8], number: u64, from: Timestamp, until: Timestamp) -> Crl {
            Crl::from_der(&self.list_der(revoked, number, from, until)).unwrap()
        }

        fn list_der(&self, revoked: &[u8], number: u64, from: Timestamp, until: Timestamp) -> Vec<u8> {
            let revoked = revoked.iter().map(|serial| RevokedCertParams {
                serial_number: SerialNumber::from(vec![*serial]),
                revocation_time: at(NOW.minus(HOUR)),
                reason_code: None,
                invalidity_date: None,
            });
            let params = CertificateRevocationListParams {
                this_update: at(from),
                next_update: at(until),
                crl_number: SerialNumber::from(number),
                issuing_distribution_point: None,
                revoked_certs: revoked.collect(),
                key_identifier_method: KeyIdMethod::Sha256,
            };
            params.signed_by(&self.issuer).unwrap().der().to_vec()
        }
    }

    fn partner_name() -> SanType {
        SanType::URI("spiffe://partner/shop/web".try_into().unwrap())
    }

    fn trust(root: &Ca, strict: bool, lists: Vec<Crl>, exempt: &[&str]) -> Trust {
        let exempt = exempt.iter().map(|domain| domain.parse().unwrap()).collect();
        let revocation = Some(Revocation { lists: newest(lists).into(), strict, exempt });
        let domains = BTreeMap::from([("partner".parse().unwrap(), vec![root.cert.clone()])]);
        Trust { domains, dns_roots: vec![root.cert.clone()], revocation }
    }

    fn judge(chain: &[CertificateDer<'static>], trust: &Trust) -> Option<(RefusalReason, String)> {
        let judged = [Usage::Client, Usage::Server].map(|usage| {
            let error = verify_chain(chain, trust, usage, NOW).err()?;
            let said = crate::tls::fault_of(&error).map(ToString::to_string).unwrap_or_default();
            Some((refusal_of(&error), said))
        });
        assert_eq!(judged[0], judged[1], "a client and a server are judged alike");
        judged[0].clone()
    }

    #[test]
    fn strict_lets_in_only_who_is_on_the_books_of_a_list_that_holds() {
        use RefusalReason::{RevocationUnknown, Revoked};
        let (root, other, twin) = (Ca::new("root"), Ca::new("other"), Ca::new("root"));
        let chain = [root.leaf(partner_name(), 7)];
        let ended = root.list_of(&[], 1, NOW.minus(HOUR * 2), NOW.minus(HOUR));
        let early = root.list_of(&[], 1, NOW.plus(HOUR), NOW.plus(HOUR * 2));
        for (lists, strict, lenient, what) in [
            (vec![root.list(&[])], None, None, "a list without this one"),
            (vec![root.list(&[9, 7])], Some(Revoked), Some(Revoked), "a list with this one"),
            (vec![], Some(RevocationUnknown), None, "no list"),
            (vec![other.list(&[7])], Some(RevocationUnknown), None, "the list of another CA"),
            (vec![ended.clone()], Some(RevocationUnknown), None, "a list that has ended"),
            (vec![early], Some(RevocationUnknown), None, "a list that has not begun"),
            (
                vec![root.list_of(&[7], 1, NOW.plus(HOUR), NOW.plus(HOUR * 2))],
                Some(RevocationUnknown),
                Some(Revoked),
                "listed in a list that has not begun",
            ),
            (vec![twin.list(&[])], Some(RevocationUnknown), Some(RevocationUnknown), "a forged list"),
            (
                vec![root.list_of(&[7], 1, NOW.minus(HOUR * 2), NOW.minus(HOUR))],
                Some(RevocationUnknown),
                Some(Revoked),
                "listed in a list that has ended",
            ),
        ] {
            let reason = |strict| judge(&chain, &trust(&root, strict, lists.clone(), &[])).map(|(reason, _)| reason);
            assert_eq!((reason(true), reason(false)), (strict, lenient), "{what}");
        }
        let said = |lists| judge(&chain, &trust(&root, true, lists, &[])).unwrap().1;
        assert!(said(vec![]).contains("no revocation list"), "{}", said(vec![]));
        assert!(said(vec![ended.clone()]).contains("ended"), "{}", said(vec![ended]));
    }

    #[test]
    fn a_list_that_runs_out_is_noticed_where_lists_are_needed() {
        let (before, end) = (NOW.minus(HOUR), NOW);
        let root = Ca::new("root");
        let revocation = |strict| Revocation {
            lists: [root.list_of(&[], 1, NOW.minus(HOUR * 2), end)].into(),
            strict,
            exempt: BTreeSet::new(),
        };
        assert!(revocation(true).ran_out(before, end) && !revocation(false).ran_out(before, end));
        assert!(!revocation(true).ran_out(end, end.plus(HOUR)), "that was told before");
        assert!(!revocation(true).ran_out(before.minus(HOUR), before), "it still holds");
    }

    #[test]
    fn each_certificate_of_a_chain_is_asked_for() {
        use RefusalReason::{RevocationUnknown, Revoked};
        let root = Ca::new("root");
        let below = root.intermediate("below", 5);
        let chain = [below.leaf(partner_name(), 7), below.cert.clone()];
        for (lists, strict, lenient) in [
            (vec![root.list(&[]), below.list(&[])], None, None),
            (vec![root.list(&[5]), below.list(&[])], Some(Revoked), Some(Revoked)),
            (vec![root.list(&[]), below.list(&[7])], Some(Revoked), Some(Revoked)),
            (vec![root.list(&[])], Some(RevocationUnknown), None),
            (vec![below.list(&[])], Some(RevocationUnknown), None),
        ] {
            let reason = |strict| judge(&chain, &trust(&root, strict, lists.clone(), &[])).map(|(reason, _)| reason);
            assert_eq!((reason(true), reason(false)), (strict, lenient), "{lists:?}");
        }
    }

    #[test]
    fn peers_with_dns_names_are_foreign_and_our_own_domain_is_not() {
        let root = Ca::new("root");
        let host = [root.leaf(SanType::DnsName("db.partner.example".try_into().unwrap()), 7)];
        let own = [root.leaf(partner_name(), 7)];
        let reason = |chain: &[_], lists| judge(chain, &trust(&root, true, lists, &["partner"])).map(|r| r.0);
        assert_eq!(reason(&host, vec![]), Some(RefusalReason::RevocationUnknown));
        assert_eq!(reason(&host, vec![root.list(&[])]), None);
        assert_eq!(reason(&own, vec![]), None, "no list is asked for");
        assert_eq!(reason(&own, vec![root.list(&[7])]), Some(RefusalReason::Revoked), "one that is there counts");
    }

    #[test]
    fn the_newest_of_several_lists_counts_in_whatever_order_they_lie() {
        let root = Ca::new("root");
        let chain = [root.leaf(partner_name(), 7)];
        let (old, new) = (
            root.list_of(&[], 255, NOW.minus(HOUR), NOW.plus(HOUR)),
            root.list_of(&[7], 256, NOW.minus(HOUR), NOW.plus(HOUR)),
        );
        for lists in [vec![old.clone(), new.clone()], vec![new.clone(), old.clone()]] {
            let reason = judge(&chain, &trust(&root, false, lists, &[])).map(|(reason, _)| reason);
            assert_eq!(reason, Some(RefusalReason::Revoked));
        }
        assert!(check_no_older(std::slice::from_ref(&new), std::slice::from_ref(&old)).is_err(), "a replay");
        assert!(check_no_older(std::slice::from_ref(&old), std::slice::from_ref(&new)).is_ok());
        assert!(check_no_older(std::slice::from_ref(&new), &[Ca::new("other").list(&[])]).is_ok());
        assert!(check_no_older(&[], &[old]).is_ok());
    }

    #[test]
    fn what_is_lacking_is_named() {
        let (root, twin) = (Ca::new("root"), Ca::new("root"));
        let lacking = |lists, exempt: &[&str]| {
            let trust = trust(&root, true, lists, exempt);
            trust.revocation.clone().unwrap().lacking(&trust, NOW)
        };
        assert_eq!(lacking(vec![root.list(&[])], &[]), [""; 0]);
        assert_eq!(lacking(vec![], &[]).len(), 2, "of the partner's domain, and for DNS names");
        let none = lacking(vec![twin.list(&[])], &["partner"]);
        assert!(none.len() == 1 && none[0].contains("CN=root") && none[0].contains("DNS names"), "{none:?}");
        let ended = lacking(vec![root.list_of(&[], 1, NOW.minus(HOUR * 2), NOW.minus(HOUR))], &["partner"]);
        assert!(ended[0].contains("ended at"), "{ended:?}");
        let early = lacking(vec![root.list_of(&[], 1, NOW.plus(HOUR), NOW.plus(HOUR * 2))], &["partner"]);
        assert!(early[0].starts_with("clock: "), "{early:?}");
    }

    #[test]
    fn files_in_pem_and_der_are_read_and_everything_else_is_refused() {
        let (root, other) = (Ca::new("root"), Ca::new("other"));
        let der = root.list_der(&[1, 2, 3], 1, NOW, NOW.plus(HOUR));
        let pem = |der: &[u8]| {
            let text = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, der);
            let lines: Vec<&str> = (0..text.len()).step_by(64).map(|i| &text[i..text.len().min(i + 64)]).collect();
            format!("-----BEGIN X509 CRL-----\n{}\n-----END X509 CRL-----\n", lines.join("\n"))
        };
        assert_eq!(Crl::read_all(&der).unwrap().len(), 1);
        let both = [pem(&der), "\n# another\n".into(), pem(&other.list_der(&[], 1, NOW, NOW.plus(HOUR)))].concat();
        let issuers: Vec<String> =
            Crl::read_all(both.as_bytes()).unwrap().into_iter().map(|list| list.issuer).collect();
        assert_eq!(issuers.len(), 2);
        assert!(issuers[0].contains("root") && issuers[1].contains("other"), "{issuers:?}");
        for length in 0..der.len() {
            assert!(Crl::read_all(&der[..length]).is_err(), "cut after {length}");
        }
        for wrong in [&b""[..], b"-----BEGIN X509 CRL-----\n", b"hello", &root.cert, &[0x30; 4096], &[0xff; 4096]] {
            assert!(Crl::read_all(wrong).is_err());
        }
        let many = pem(&der).repeat(MAX_LISTS + 1);
        assert!(matches!(Crl::read_all(many.as_bytes()), Err(CrlFault::Many)));
    }

    #[test]
    fn a_list_that_was_changed_in_any_byte_convicts_nobody_and_clears_nobody() {
        let root = Ca::new("root");
        let chain = [root.leaf(partner_name(), 7)];
        let der = root.list_der(&[7], 1, NOW.minus(HOUR), NOW.plus(HOUR));
        for i in (0..der.len()).step_by(3) {
            let mut changed = der.clone();
            changed[i] ^= 0x41;
            let Ok(list) = Crl::from_der(&changed) else { continue };
            let reason = judge(&chain, &trust(&root, true, vec![list], &[])).map(|(reason, _)| reason);
            assert!(reason.is_some(), "byte {i}: a foreign peer got in");
        }
    }
}
