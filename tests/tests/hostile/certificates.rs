//! Certificates that are wrong in one way each, shown in TLS 1.3 and 1.2: who is refused, by which alert, for which
//! reason; and the odd ones that are right.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose as Eku, GeneralSubtree, IsCa, KeyPair,
    KeyUsagePurpose as Ku, NameConstraints,
};
use rustls::SupportedProtocolVersion;

use crate::gate::{Answer, Gate, elsewhere};
use crate::mint::{self, Authority, Shown, WEB, authority, dns, uri, valid};

static EACH: [&[&SupportedProtocolVersion]; 2] = [&[&rustls::version::TLS13], &[&rustls::version::TLS12]];

impl Gate {
    /// Shows `shown` in both versions; it is refused for `reason`, with `detail` in the event.
    async fn refuses(&self, what: &str, shown: &Shown, reason: &str, detail: &str) {
        for versions in EACH {
            let source = elsewhere();
            let answer = self.knock(shown, versions, source).await;
            assert_ne!(answer, Answer::Accepted, "{what}, {:?}", versions[0]);
            let (told, why) = self.event_about(source).await;
            assert_eq!(told, reason, "{what}, {:?}: {why}", versions[0]);
            assert!(why.contains(detail), "{what}, {:?}: {why}", versions[0]);
        }
    }

    async fn accepts(&self, what: &str, shown: &Shown) {
        for versions in EACH {
            assert_eq!(self.knock(shown, versions, elsewhere()).await, Answer::Accepted, "{what}, {:?}", versions[0]);
        }
    }

    /// A leaf of the real CA.
    fn issue(&self, params: &CertificateParams) -> Shown {
        self.issuing.leaf(params, &[&self.issuing, &self.root])
    }
}

/// A good leaf, changed.
fn with(change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = mint::leaf(WEB);
    change(&mut params);
    params
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_no_spiffe_id_of_ours_does_not_get_in() {
    let gate = Gate::open().await;
    let named = |names: Vec<rcgen::SanType>| gate.issue(&with(|p| p.subject_alt_names = names));
    gate.refuses("two URIs", &named(vec![uri(WEB), uri(WEB)]), "bad_certificate", "2 URI names").await;
    gate.refuses("no name", &named(vec![]), "bad_certificate", "no URI name and no DNS name").await;
    gate.refuses("a DNS name only", &named(vec![dns("web.shop")]), "unknown_ca", "peers with DNS names").await;
    gate.refuses("NUL in a DNS name", &named(vec![dns("web\0.shop")]), "bad_certificate", "DNS name that is none")
        .await;
    let many: Vec<_> = (0..1_000).map(|n| uri(&format!("{WEB}-{n}"))).collect();
    gate.refuses("a thousand URIs", &named(many), "bad_certificate", "1000 URI names").await;
    for (id, detail) in [
        ("spiffe://sidewarden.internal:443/shop/web", "only a-z"),
        ("spiffe://web@sidewarden.internal/shop/web", "only a-z"),
        ("spiffe://Sidewarden.internal/shop/web", "only a-z"),
        ("spiffe://sidewarden.internal/shop/web?a", "its path may have"),
        ("spiffe://sidewarden.internal/shop/web#a", "its path may have"),
        ("spiffe://sidewarden.internal/shop/%77eb", "its path may have"),
        ("spiffe://sidewarden.internal/shop/web/", "ends in a slash"),
        ("spiffe://sidewarden.internal//shop/web", "is empty"),
        ("spiffe://sidewarden.internal/shop/../shop/web", "dot segment"),
        ("spiffe://sidewarden.internal", "names no workload"),
        ("SPIFFE://sidewarden.internal/shop/web", "begin with spiffe://"),
        ("https://sidewarden.internal/shop/web", "begin with spiffe://"),
        ("", "begin with spiffe://"),
    ] {
        gate.refuses(id, &named(vec![uri(id)]), "bad_certificate", detail).await;
    }
    let long = format!("{WEB}{}", "x".repeat(2048));
    gate.refuses("too long", &named(vec![uri(&long)]), "bad_certificate", "longer than 2048").await;
    let other_domain = named(vec![uri("spiffe://elsewhere.internal/shop/web")]);
    gate.refuses("another domain under our root", &other_domain, "unknown_ca", "elsewhere.internal").await;
    for id in ["shop/webx", "shop/we", "shop/WEB", "other/web"] {
        let id = format!("spiffe://sidewarden.internal/{id}");
        gate.refuses(&id, &named(vec![uri(&id)]), "not_allowed", &id).await;
    }
    gate.accepts("a DNS name beside the ID", &named(vec![dns("web.shop"), uri(WEB)])).await;
    gate.is_open().await;
}

/// More than a handshake message may hold: it ends before anybody parses it.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_names_are_too_many() {
    let gate = Gate::open().await;
    let names: Vec<_> = (0..10_000).map(|n| dns(&format!("w{n}.shop"))).chain([uri(WEB)]).collect();
    let shown = gate.issue(&with(|p| p.subject_alt_names = names));
    for versions in EACH {
        let source = elsewhere();
        assert_ne!(gate.knock(&shown, versions, source).await, Answer::Accepted);
        let (reason, detail) = gate.event_about(source).await;
        assert!(reason == "handshake_failed" || reason == "bad_certificate", "{reason}: {detail}");
    }
    gate.is_open().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leaf_that_may_not_do_this_does_not_get_in() {
    let gate = Gate::open().await;
    for (what, params, reason, detail) in [
        ("for servers only", with(|p| p.extended_key_usages = vec![Eku::ServerAuth]), "bad_certificate", "client auth"),
        ("for anything", with(|p| p.extended_key_usages = vec![Eku::Any]), "bad_certificate", "client auth"),
        ("for mail", with(|p| p.extended_key_usages = vec![Eku::EmailProtection]), "bad_certificate", "client auth"),
        ("for nothing", with(|p| p.extended_key_usages = vec![]), "bad_certificate", "client auth"),
        ("a CA", with(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)), "bad_certificate", "is a CA"),
        ("no key usage", with(|p| p.key_usages = vec![]), "bad_certificate", "digital signatures"),
        ("for encryption", with(|p| p.key_usages = vec![Ku::KeyEncipherment]), "bad_certificate", "digital signatures"),
        (
            "signs certificates",
            with(|p| p.key_usages = vec![Ku::DigitalSignature, Ku::KeyCertSign]),
            "bad_certificate",
            "signing certificates",
        ),
        ("ended", with(|p| valid(p, -3600, -60)), "expired", ""),
        ("not begun", with(|p| valid(p, 3600, 7200)), "expired", ""),
    ] {
        gate.refuses(what, &gate.issue(&params), reason, detail).await;
    }
    gate.is_open().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_does_not_lead_to_our_root_does_not_get_in() {
    let gate = Gate::open().await;
    let (root, good) = (&gate.root, mint::leaf(WEB));
    gate.refuses("signed by itself", &Shown::self_signed(&good), "unknown_ca", "").await;
    gate.refuses("no intermediate", &gate.issuing.leaf(&good, &[]), "unknown_ca", "").await;
    let foreign = Authority::root("foreign");
    gate.refuses("a foreign root", &foreign.leaf(&good, &[&foreign]), "unknown_ca", "").await;
    gate.refuses("a foreign root with ours beside it", &foreign.leaf(&good, &[&gate.issuing, root]), "unknown_ca", "")
        .await;

    // Same names, other keys: from the root down, and the intermediate alone.
    let false_root = Authority::self_signed(named("Sidewarden root"));
    let false_issuing = false_root.sign(named("Sidewarden issuing"));
    let shown = false_issuing.leaf(&good, &[&false_issuing, &false_root]);
    gate.refuses("an impostor of the root", &shown, "unknown_ca", "").await;
    let shown = false_issuing.leaf(&good, &[&gate.issuing, root]);
    gate.refuses("an impostor of the intermediate", &shown, "unknown_ca", "").await;

    let refused = |params: CertificateParams| {
        let ca = root.sign(params);
        ca.leaf(&good, &[&ca, root])
    };
    let mut no_ca = authority("no CA");
    no_ca.is_ca = IsCa::ExplicitNoCa;
    gate.refuses("an intermediate that is no CA", &refused(no_ca), "bad_certificate", "").await;
    let mut cannot_sign = authority("cannot sign");
    cannot_sign.key_usages = vec![Ku::DigitalSignature, Ku::CrlSign];
    gate.refuses("an intermediate that may not sign", &refused(cannot_sign), "bad_certificate", "sign").await;
    let mut ended = authority("ended");
    valid(&mut ended, -7200, -3600);
    gate.refuses("an intermediate that ended", &refused(ended), "expired", "").await;
    let mut elsewhere = authority("elsewhere");
    elsewhere.name_constraints = Some(NameConstraints {
        permitted_subtrees: vec![GeneralSubtree::DnsName("elsewhere.example".into())],
        excluded_subtrees: vec![],
    });
    let constrained = root.sign(elsewhere);
    let named = with(|p| p.subject_alt_names.push(dns("web.shop")));
    let shown = constrained.leaf(&named, &[&constrained, root]);
    gate.refuses("a name that its CA may not give", &shown, "bad_certificate", "").await;

    let mut last = authority("last");
    last.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let last = root.sign(last);
    let beyond = last.sign(authority("beyond"));
    gate.refuses("a path that is too long", &beyond.leaf(&good, &[&beyond, &last, root]), "bad_certificate", "").await;
    let decoys: Vec<Authority> = (0..100).map(|n| root.sign(authority(&format!("decoy {n}")))).collect();
    let chain: Vec<&Authority> = decoys.iter().chain([&gate.issuing, root]).collect();
    gate.refuses("a hundred decoys", &gate.issuing.leaf(&good, &chain), "bad_certificate", "103 certificates").await;
    gate.is_open().await;
}

/// A CA whose name is that of one of the collector's.
fn named(name: &str) -> CertificateParams {
    let mut params = authority(name);
    params.distinguished_name.push(DnType::OrganizationName, "sidewarden.internal");
    params
}

/// What looks odd and is right: whoever refuses these breaks a rotation.
#[tokio::test(flavor = "multi_thread")]
async fn odd_chains_that_lead_to_our_root_get_in() {
    let gate = Gate::open().await;
    let (root, good) = (&gate.root, mint::leaf(WEB));
    gate.accepts("without the root", &gate.issuing.leaf(&good, &[&gate.issuing])).await;
    gate.accepts("in another order", &gate.issuing.leaf(&good, &[root, &gate.issuing])).await;
    gate.accepts("straight from the root", &root.leaf(&good, &[])).await;

    let key = KeyPair::generate().unwrap();
    let again = KeyPair::from_pem(&key.serialize_pem()).unwrap();
    let mut ended = authority("renewed");
    valid(&mut ended, -7200, -3600);
    let (ended, renewed) = (root.sign_key(ended, key), root.sign_key(authority("renewed"), again));
    for rest in [[&ended, &renewed], [&renewed, &ended]] {
        gate.accepts("an ended intermediate beside its successor", &renewed.leaf(&good, &rest)).await;
    }

    // The next root, signed by the one that everybody knows.
    let key = KeyPair::generate().unwrap();
    let crossed = root.sign_key(authority("next root"), key);
    let below = crossed.sign(authority("below the next root"));
    gate.accepts("a cross-signed root", &below.leaf(&good, &[&below, &crossed])).await;
}
