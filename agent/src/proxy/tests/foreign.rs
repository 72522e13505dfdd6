//! Peers of other trust domains, and the lists of those whom their CAs have revoked.

use std::collections::BTreeMap;

use rustls::pki_types::CertificateDer;
use sidewarden_proto::crl::{self, Crl};
use sidewarden_proto::identity::TrustDomain;
use sidewarden_proto::tls::Trust;

use super::*;
use crate::identity::foreign::{Crls, Foreign};
use crate::identity::{Checked, Given, Issued};

const PARTNER: &str = "spiffe://partner.example/shop/web";

fn serial(issued: &Issued) -> Vec<u8> {
    let serial = issued.check().unwrap().credential.peer().serial.clone();
    let serial = if serial.len() % 2 == 1 { format!("0{serial}") } else { serial };
    (0..serial.len()).step_by(2).map(|i| u8::from_str_radix(&serial[i..i + 2], 16).unwrap()).collect()
}

fn roots(of: &[(&str, &Ca)]) -> BTreeMap<TrustDomain, Vec<CertificateDer<'static>>> {
    of.iter().map(|(domain, ca)| (domain.parse().unwrap(), vec![ca.root.clone()])).collect()
}

fn terms(domains: &[(&str, &Ca)], lists: Option<(&[Vec<u8>], bool)>) -> Terms {
    let crls = lists.map(|(lists, strict)| {
        let lists = lists.iter().map(|der| Crl::from_der(der).unwrap()).collect();
        Crls { lists: crl::newest(lists).into(), strict }
    });
    Terms { foreign: Foreign { domains: roots(domains), crls, ..Foreign::default() }, ..Terms::default() }
}

fn identity(issued: &Issued, terms: &Terms) -> Arc<Identity> {
    let checked: Checked = issued.check().unwrap();
    Arc::new(Identity::build(checked, None, terms).unwrap())
}

/// The partner's web calls our orders.
struct Pair {
    ours: Ca,
    theirs: Ca,
    orders: Agent,
    orders_issued: Issued,
    web: Agent,
    web_serial: Vec<u8>,
}

impl Pair {
    async fn new(lists: impl Fn(&Ca) -> Option<(Vec<Vec<u8>>, bool)>) -> Pair {
        let (ours, theirs) = (Ca::new("td"), Ca::new("partner.example"));
        let (orders_issued, web_issued) = (ours.issue("shop/orders"), theirs.issue("shop/web"));
        let lists = lists(&theirs);
        let terms_of_orders = terms(&[("partner.example", &theirs)], lists.as_ref().map(|(l, s)| (&l[..], *s)));
        let to = echo().await;
        let orders = Agent::start(Some(identity(&orders_issued, &terms_of_orders)), inbound_config(to, PARTNER)).await;
        let terms_of_web = terms(&[("td", &ours)], None);
        let web = identity(&web_issued, &terms_of_web);
        let web = Agent::start(Some(web), outbound_config(orders.inbound[0], ORDERS)).await;
        Pair { ours, theirs, orders, orders_issued, web, web_serial: serial(&web_issued) }
    }

    /// Orders trusts anew: these domains, these lists.
    fn change(&self, domains: &[(&str, &Ca)], lists: Option<(&[Vec<u8>], bool)>) {
        self.orders.identity.send_replace(Some(identity(&self.orders_issued, &terms(domains, lists))));
    }

    async fn talk(&self) -> TcpStream {
        let mut client = call(&self.web).await;
        client.write_all(b"x").await.unwrap();
        client.read_exact(&mut [0]).await.unwrap();
        client
    }
}

async fn still_talks(client: &mut TcpStream) {
    client.write_all(b"y").await.unwrap();
    client.read_exact(&mut [0]).await.unwrap();
}

async fn is_cut(client: &mut TcpStream) -> bool {
    let mut rest = [0; 16];
    let read = tokio::time::timeout(Duration::from_secs(60), client.read(&mut rest)).await;
    read.expect("the connection is still there after a minute").is_err()
}

#[tokio::test]
async fn a_workload_of_a_federated_domain_comes_in_and_goes_when_its_root_does() {
    let pair = Pair::new(|_| None).await;
    let mut client = pair.talk().await;
    pair.change(&[("partner.example", &pair.theirs), ("other.example", &pair.ours)], None);
    still_talks(&mut client).await;
    pair.change(&[("other.example", &pair.ours)], None);
    assert!(is_cut(&mut client).await, "nobody vouches for it any more");
    assert!(is_reset(call(&pair.web).await).await);
    assert_eq!(pair.orders.refusal().await.0, RefusalReason::UnknownCa);
}

#[tokio::test]
async fn whoever_gets_onto_a_list_is_cut_off_and_stays_out() {
    let pair = Pair::new(|theirs| Some((vec![theirs.list(&[])], true))).await;
    let mut client = pair.talk().await;
    let domains = [("partner.example", &pair.theirs)];
    pair.change(&domains, Some((&[pair.theirs.list(&[vec![0x55; 8]])], true)));
    still_talks(&mut client).await;
    pair.change(&domains, Some((&[pair.theirs.list(&[vec![0x55; 8], pair.web_serial.clone()])], true)));
    assert!(is_cut(&mut client).await);
    assert!(is_reset(call(&pair.web).await).await);
    assert_eq!(pair.orders.refusal().await.0, RefusalReason::Revoked);
}

#[tokio::test]
async fn strict_refuses_whom_no_list_speaks_for_and_lenient_does_not() {
    let pair = Pair::new(|_| Some((vec![], true))).await;
    assert!(is_reset(call(&pair.web).await).await);
    let (reason, detail, _) = pair.orders.refusal().await;
    assert_eq!(reason, RefusalReason::RevocationUnknown, "{detail}");
    assert!(detail.contains("trust.crl_mode"), "{detail}");
    pair.change(&[("partner.example", &pair.theirs)], Some((&[], false)));
    pair.talk().await;
}

#[tokio::test]
async fn our_own_domain_needs_no_list() {
    let (ours, theirs) = (Ca::new("td"), Ca::new("partner.example"));
    let strict = terms(&[("partner.example", &theirs)], Some((&[], true)));
    let orders = identity(&ours.issue("shop/orders"), &strict);
    let orders = Agent::start(Some(orders), inbound_config(echo().await, WEB)).await;
    let web = Agent::start(Some(ours.identity("shop/web")), outbound_config(orders.inbound[0], ORDERS)).await;
    let mut client = call(&web).await;
    still_talks(&mut client).await;
}

/// Our own domain, whose roots are somebody else's: the bundle of a Workload API, or files.
#[tokio::test]
async fn a_workload_of_our_own_domain_goes_when_its_root_leaves_the_bundle_of_another_ca() {
    let (old, next) = (Ca::new("td"), Ca::new("td"));
    let orders_issued = next.issue("shop/orders");
    let given = |cas: &[&Ca]| {
        let trust = Trust::single("td".parse().unwrap(), cas.iter().map(|ca| ca.root.clone()).collect());
        let checked = Checked { from: Given::ByApi, trust, ..orders_issued.check().unwrap() };
        Arc::new(Identity::build(checked, None, &Terms::default()).unwrap())
    };
    let orders = Agent::start(Some(given(&[&old, &next])), inbound_config(echo().await, WEB)).await;
    let mut web = old.issue("shop/web").check().unwrap();
    web.trust = Trust::single("td".parse().unwrap(), vec![next.root.clone()]);
    let web = Arc::new(Identity::build(web, None, &Terms::default()).unwrap());
    let web = Agent::start(Some(web), outbound_config(orders.inbound[0], ORDERS)).await;
    let mut client = call(&web).await;
    still_talks(&mut client).await;
    orders.identity.send_replace(Some(given(&[&next, &old])));
    still_talks(&mut client).await;
    orders.identity.send_replace(Some(given(&[&next])));
    assert!(is_cut(&mut client).await, "nobody vouches for it any more");
}

#[tokio::test]
async fn a_list_that_runs_out_ends_what_it_let_in() {
    let (_pair, mut client, until) = in_time(async |until| {
        let pair = Pair::new(|theirs| Some((vec![theirs.list_until(&[], 1, until)], true))).await;
        let mut client = call(&pair.web).await;
        echoes(&mut client).await.then_some((pair, client, until))
    })
    .await;
    assert!(is_cut(&mut client).await, "no list speaks for it any more");
    assert!(Timestamp::now() >= until);
}
