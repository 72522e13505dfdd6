//! `insecure_trust_all`: everybody gets in, loudly and for a while, and nobody afterwards.

use sidewarden_proto::event::TrustInsecure;
use sidewarden_proto::tls;

use super::*;

fn all(until: Timestamp) -> Option<TrustAll> {
    Some(TrustAll { reason: "old".into(), until })
}

fn soon() -> Timestamp {
    Timestamp::now().plus(Duration::from_secs(3600))
}

async fn orders_until(ca: &Ca, until: Timestamp) -> Agent {
    let mut config = inbound_config(echo().await, WEB);
    config.inbound[0].insecure_trust_all = all(until);
    Agent::start(Some(ca.identity("shop/orders")), config).await
}

async fn told(agent: &Agent) -> TrustInsecure {
    agent.event(|body| if let Body::TrustInsecure(told) = body { Some(told.clone()) } else { None }).await
}

async fn answers(agent: &Agent) -> TcpStream {
    let mut client = call(agent).await;
    client.write_all(b"x").await.unwrap();
    client.read_exact(&mut [0]).await.unwrap();
    client
}

#[tokio::test]
async fn a_route_takes_whoever_answers_and_says_so() {
    let (ca, stranger) = (Ca::new("td"), Ca::new("elsewhere"));
    let mut server = inbound_config(echo().await, WEB);
    server.inbound[0].insecure_trust_all = all(soon());
    let server = Agent::start(Some(stranger.identity("any/body")), server).await;
    let mut config = outbound_config(server.inbound[0], ORDERS);
    let strict = Agent::start(Some(ca.identity("shop/web")), config.clone()).await;
    assert!(is_reset(call(&strict).await).await);
    assert_eq!(strict.refusal().await.0, RefusalReason::UnknownCa);

    config.outbound[0].insecure_trust_all = all(soon());
    let web = Agent::start(Some(ca.identity("shop/web")), config).await;
    answers(&web).await;
    let insecure = told(&web).await;
    assert!(insecure.on && insecure.direction == Direction::Outbound && insecure.reason == "old", "{insecure:?}");
    let seen = |body: &Body| if let Body::PeerFirstSeen(seen) = body { Some(seen.peer.clone()) } else { None };
    let peer = web.event(seen).await;
    assert!(peer.starts_with("dns:unverified:"), "it is not called by a name that nobody proved: {peer}");
}

#[tokio::test]
async fn a_route_is_as_strict_as_its_own_settings_say_though_another_one_leads_to_the_same_address() {
    let (ca, stranger) = (Ca::new("td"), Ca::new("elsewhere"));
    let mut server = inbound_config(echo().await, WEB);
    server.inbound[0].insecure_trust_all = all(soon());
    let server = Agent::start(Some(stranger.identity("any/body")), server).await;
    let mut config = outbound_config(server.inbound[0], ORDERS);
    let (lax, strict, over) = (config.outbound[0].clone(), config.outbound[0].clone(), config.outbound[0].clone());
    let lax = Outbound { insecure_trust_all: all(soon()), ..lax };
    config.outbound = vec![lax, strict, Outbound { insecure_trust_all: all(Timestamp::from_secs(9)), ..over }];
    let web = Agent::start(Some(ca.identity("shop/web")), config).await;
    answers(&web).await;
    for route in [web.outbound[1], web.outbound[2]] {
        assert!(is_reset(TcpStream::connect(route).await.unwrap()).await);
        assert_eq!(web.refusal().await.0, RefusalReason::UnknownCa);
        web.events.lock().unwrap().clear();
    }
}

#[tokio::test]
async fn a_listener_takes_strangers_but_nobody_without_a_key_and_nobody_who_is_denied() {
    let (ca, stranger) = (Ca::new("td"), Ca::new("td"));
    let orders = orders_until(&ca, soon()).await;
    let denied = stranger.identity("shop/other");
    let spki = denied.credential.peer().spki;
    let directive = ca.directive(1, vec![Deny::Key { spki, why: "stolen".into() }], Timestamp::now());
    let directive = Arc::new(directive.open(&ca.trust(), Timestamp::now()).unwrap());
    let checked = ca.issue("shop/orders").check().unwrap();
    orders.identity.send_replace(Some(Arc::new(Identity::build(checked, Some(directive), &Terms::default()).unwrap())));
    let call_as = async |config: Arc<rustls::ClientConfig>| {
        let tcp = TcpStream::connect(orders.inbound[0]).await.unwrap();
        let name = rustls::pki_types::ServerName::from(orders.inbound[0].ip());
        let Ok(mut stream) = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await else { return false };
        stream.write_all(b"x").await.is_ok() && stream.read_exact(&mut [0]).await.is_ok()
    };
    let with = |identity: &Identity| identity.insecure_client().unwrap();
    assert!(call_as(with(&stranger.identity("shop/other"))).await);
    assert!(!call_as(with(&denied)).await);
    assert_eq!(orders.refusal().await.0, RefusalReason::Revoked);
    let mut bare = rustls::ClientConfig::clone(&with(&denied));
    bare.client_auth_cert_resolver = Arc::new(NoCertificate);
    assert!(!call_as(Arc::new(bare)).await, "no certificate, no key");
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }
    fn has_certs(&self) -> bool {
        false
    }
}

/// Somebody without any proof who was let in.
async fn let_in(ca: &Ca, stranger: &Ca) -> (Agent, Agent, TcpStream) {
    in_time(async |until| {
        let orders = orders_until(ca, until).await;
        let mut config = outbound_config(orders.inbound[0], ORDERS);
        config.outbound[0].insecure_trust_all = all(soon());
        let web = Agent::start(Some(stranger.identity("shop/web")), config).await;
        let mut client = call(&web).await;
        echoes(&mut client).await.then_some((orders, web, client))
    })
    .await
}

#[tokio::test]
async fn when_the_time_is_over_what_was_let_in_is_cut_and_certificates_count_again() {
    let (ca, stranger) = (Ca::new("td"), Ca::new("td"));
    let (orders, web, mut client) = let_in(&ca, &stranger).await;
    let cut = tokio::time::timeout(Duration::from_secs(300), client.read(&mut [0; 1])).await;
    assert!(cut.expect("the connection is still there though its time is over").is_err());
    assert!(is_reset(call(&web).await).await);
    assert_eq!(orders.refusal().await.0, RefusalReason::UnknownCa);
}

#[tokio::test]
async fn what_is_over_from_the_start_lets_nobody_in() {
    let (ca, stranger) = (Ca::new("td"), Ca::new("td"));
    let orders = orders_until(&ca, Timestamp::from_secs(9)).await;
    let floor = tls::Floor::Tls12;
    let expect = tls::Expect::Workload(ORDERS.parse().unwrap());
    let credential = stranger.issue("shop/web").check().unwrap().credential;
    let config = tls::client_config(&credential, &ca.trust(), expect, floor, &[]).unwrap();
    let tcp = TcpStream::connect(orders.inbound[0]).await.unwrap();
    let name = rustls::pki_types::ServerName::from(orders.inbound[0].ip());
    if let Ok(mut stream) = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await {
        assert!(stream.read(&mut [0; 1]).await.is_err());
    }
    assert_eq!(orders.refusal().await.0, RefusalReason::UnknownCa);
    assert!(!told(&orders).await.on);
}
