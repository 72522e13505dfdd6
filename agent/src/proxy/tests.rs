//! Two agents' proxies against each other, and against everybody who should not get in.

mod ends;
mod idle;
mod resumption;
mod streams;

use std::sync::Mutex;

use sidewarden_proto::config::HostPort;
use sidewarden_proto::directive::Deny;
use sidewarden_proto::event::Body;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

use super::*;
use crate::config::{Inbound, Outbound};
use crate::identity::Terms;
use crate::identity::made_up::{Ca, validity};

/// One agent's proxy, with what it told.
struct Agent {
    inbound: Vec<SocketAddr>,
    outbound: Vec<SocketAddr>,
    events: Arc<Mutex<Vec<Event>>>,
    identity: watch::Sender<Option<Arc<Identity>>>,
    shared: Arc<Shared>,
    _serving: tokio::task::JoinHandle<()>,
}

impl Agent {
    async fn start(identity: Option<Arc<Identity>>, config: Config) -> Agent {
        let listeners = Listeners::bind(&config).await.unwrap();
        let (inbound, outbound) = listeners.addresses();
        let events: Arc<Mutex<Vec<Event>>> = Arc::default();
        let told = events.clone();
        let emit: Arc<dyn Fn(Event) + Send + Sync> = Arc::new(move |event| told.lock().unwrap().push(event));
        let metrics = Arc::new(Metrics::new("test"));
        let (publish, current) = watch::channel(identity);
        let resolver = Resolver::from_system();
        let shared = Shared::new(&config, current, resolver, emit, metrics, crate::backoff::random);
        let shared = Arc::new(shared);
        let serving = tokio::spawn(listeners.serve(shared.clone()));
        Agent { inbound, outbound, events, identity: publish, shared, _serving: serving }
    }

    /// Waits for an event that `pick` takes.
    async fn event<T>(&self, pick: impl Fn(&Body) -> Option<T>) -> T {
        for _ in 0..2_000 {
            let found = {
                let events = self.events.lock().unwrap();
                events.iter().find_map(|event| pick(&event.body().unwrap().unwrap()))
            };
            if let Some(found) = found {
                return found;
            }
            sleep(Duration::from_millis(5)).await;
        }
        panic!("no such event in {:#?}", self.events.lock().unwrap());
    }

    async fn refusal(&self) -> (RefusalReason, String, String) {
        self.event(|body| match body {
            Body::ConnectionRefused(r) => Some((r.reason, r.detail.clone(), r.peer.clone())),
            _ => None,
        })
        .await
    }
}

/// A workload that echoes until the other side has ended, and then says bye.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, source)) = listener.accept().await {
            assert_eq!(source.ip().to_string(), "127.0.0.6");
            tokio::spawn(async move {
                let mut all = Vec::new();
                let mut chunk = [0; 9000];
                while let Ok(count) = tcp.read(&mut chunk).await {
                    if count == 0 {
                        tcp.write_all(b"bye").await.unwrap();
                        break;
                    }
                    all.extend_from_slice(&chunk[..count]);
                    tcp.write_all(&chunk[..count]).await.unwrap();
                }
            });
        }
    });
    address
}

const ANY: &str = "127.0.0.1:0";

fn inbound_config(to: SocketAddr, allow: &str) -> Config {
    let inbound = Inbound {
        listen: ANY.parse().unwrap(),
        to,
        allow: vec![allow.parse().unwrap()],
        allow_dns: vec![],
        hold_service_port: false,
        dial_from: "127.0.0.6".parse().unwrap(),
    };
    Config { inbound: vec![inbound], ..Config::default() }
}

fn outbound_config(to: SocketAddr, peer: &str) -> Config {
    let to = HostPort { host: to.ip().to_string(), port: to.port() };
    let peer = crate::config::Peer::Workload(peer.parse().unwrap());
    Config { outbound: vec![Outbound { listen: ANY.parse().unwrap(), to, peer, expose: false }], ..Config::default() }
}

const WEB: &str = "spiffe://td/shop/web";
const ORDERS: &str = "spiffe://td/shop/orders";

/// `web` calls `orders` through both of their agents.
async fn pair(ca: &Ca, web: Arc<Identity>) -> (Agent, Agent) {
    let orders = Agent::start(Some(ca.identity("shop/orders")), inbound_config(echo().await, WEB)).await;
    let web = Agent::start(Some(web), outbound_config(orders.inbound[0], ORDERS)).await;
    (web, orders)
}

async fn call(agent: &Agent) -> TcpStream {
    TcpStream::connect(agent.outbound[0]).await.unwrap()
}

/// What a client of the outbound listener gets to see when the other side says no: a reset.
async fn is_reset(mut client: TcpStream) -> bool {
    let _ = client.write_all(b"hello").await;
    client.read(&mut [0; 1]).await.is_err()
}

#[tokio::test]
async fn bytes_flow_both_ways_and_the_peers_are_told_by_name() {
    let ca = Ca::new("td");
    let (web, orders) = pair(&ca, ca.identity("shop/web")).await;
    let mut client = call(&web).await;
    let request: Vec<u8> = (0..500_000u32).map(|i| (i * 7) as u8).collect();
    let sent = request.clone();
    let (mut reader, mut writer) = client.split();
    let mut reply = Vec::new();
    let both = tokio::join!(
        async {
            writer.write_all(&sent).await.unwrap();
            writer.shutdown().await.unwrap();
        },
        reader.read_to_end(&mut reply)
    );
    both.1.unwrap();
    assert!(reply == [&request[..], b"bye"].concat(), "{} bytes came back", reply.len());
    let seen = |body: &Body| if let Body::PeerFirstSeen(seen) = body { Some(seen.clone()) } else { None };
    let (by_web, by_orders) = (web.event(seen).await, orders.event(seen).await);
    assert_eq!((by_web.peer.as_str(), by_orders.peer.as_str()), (ORDERS, WEB));
    assert_eq!((by_orders.tls_version.as_str(), by_orders.group.as_str()), ("TLSv1_3", "X25519MLKEM768"));
}

#[tokio::test]
async fn a_peer_that_is_not_listed_is_refused_by_name_on_both_sides() {
    let ca = Ca::new("td");
    let (other, orders) = pair(&ca, ca.identity("shop/other")).await;
    assert!(is_reset(call(&other).await).await);
    let (reason, _, peer) = orders.refusal().await;
    assert_eq!((reason, peer.as_str()), (RefusalReason::NotAllowed, "spiffe://td/shop/other"));
    assert_eq!(other.refusal().await.0, RefusalReason::RefusedByPeer);
}

#[tokio::test]
async fn a_certificate_that_does_not_count_is_refused_for_its_own_reason() {
    let ca = Ca::new("td");
    let now = Timestamp::now();
    let hour = Duration::from_secs(3600);
    let mut early = ca.params("shop/web");
    validity(&mut early, now.plus(hour), now.plus(hour * 2));
    let mut no_client = ca.params("shop/web");
    no_client.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    for (identity, reason) in [
        (Ca::new("td").issue("shop/web"), RefusalReason::UnknownCa),
        (Ca::new("elsewhere").issue("shop/web"), RefusalReason::UnknownCa),
        (ca.issue_with(&early), RefusalReason::Expired),
        (ca.issue_with(&no_client), RefusalReason::BadCertificate),
    ] {
        let orders = Agent::start(Some(ca.identity("shop/orders")), inbound_config(echo().await, WEB)).await;
        let credential = identity.check().unwrap().credential;
        let expect = sidewarden_proto::tls::Expect::Workload(ORDERS.parse().unwrap());
        let floor = sidewarden_proto::tls::Floor::Tls12;
        let config = sidewarden_proto::tls::client_config(&credential, &ca.trust(), expect, floor, &[]).unwrap();
        let tcp = TcpStream::connect(orders.inbound[0]).await.unwrap();
        let name = rustls::pki_types::ServerName::from(orders.inbound[0].ip());
        if let Ok(mut stream) = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await {
            assert!(stream.read(&mut [0; 1]).await.is_err(), "{reason}");
        }
        let (got, detail, _) = orders.refusal().await;
        assert_eq!(got, reason, "{detail}");
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let ca = Ca::new("td");
    let orders = Agent::start(Some(ca.identity("shop/orders")), inbound_config(echo().await, WEB)).await;
    let pin = sidewarden_proto::tls::spki_of(&ca.root).unwrap();
    let config = sidewarden_proto::tls::pinned_client_config(pin, &[]).unwrap();
    let tcp = TcpStream::connect(orders.inbound[0]).await.unwrap();
    let name = rustls::pki_types::ServerName::from(orders.inbound[0].ip());
    // It also refuses us, for it wants a collector: a client that accepts anything is in the container tests.
    let _ = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await;
    let (reason, detail, _) = orders.refusal().await;
    assert!(matches!(reason, RefusalReason::NoCertificate | RefusalReason::RefusedByPeer), "{reason} {detail}");
}

#[tokio::test]
async fn somebody_else_at_the_other_end_is_the_wrong_peer_and_gets_nothing() {
    let ca = Ca::new("td");
    let db = Agent::start(Some(ca.identity("shop/db")), inbound_config(echo().await, WEB)).await;
    let web = Agent::start(Some(ca.identity("shop/web")), outbound_config(db.inbound[0], ORDERS)).await;
    assert!(is_reset(call(&web).await).await);
    let (reason, detail, _) = web.refusal().await;
    assert_eq!(reason, RefusalReason::WrongPeer);
    assert!(detail.contains("shop/db") && detail.contains("shop/orders"), "{detail}");
}

#[tokio::test]
async fn old_clients_get_a_real_alert_and_plaintext_gets_nothing() {
    let ca = Ca::new("td");
    let hello = super::handshake::made_up::records(&super::handshake::made_up::hello(0x0302, None), 9999);
    for (sent, reason, detail, answer) in [
        (&hello[..], RefusalReason::ProtocolVersion, "offered TLS 1.1", &[21, 3, 1, 0, 2, 2, 70][..]),
        (b"GET / HTTP/1.1\r\n\r\n", RefusalReason::Plaintext, "began with `GET / HTTP/1.1`", b""),
    ] {
        let orders = Agent::start(Some(ca.identity("shop/orders")), inbound_config(echo().await, WEB)).await;
        let mut client = TcpStream::connect(orders.inbound[0]).await.unwrap();
        client.write_all(sent).await.unwrap();
        let mut got = Vec::new();
        client.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, answer);
        drop(client);
        let (told, told_detail, _) = orders.refusal().await;
        assert_eq!((told, told_detail.as_str()), (reason, detail));
    }
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_is_not_finished_ends_at_its_deadline() {
    let ca = Ca::new("td");
    let orders = Agent::start(Some(ca.identity("shop/orders")), inbound_config(echo().await, WEB)).await;
    let mut client = TcpStream::connect(orders.inbound[0]).await.unwrap();
    client.write_all(&[22, 3, 1]).await.unwrap();
    assert!(matches!(client.read(&mut [0; 1]).await, Ok(0) | Err(_)));
    assert_eq!(orders.refusal().await.0, RefusalReason::HandshakeTimeout);
}

#[tokio::test]
async fn without_an_identity_nothing_gets_through() {
    let orders = Agent::start(None, inbound_config(echo().await, WEB)).await;
    let mut client = TcpStream::connect(orders.inbound[0]).await.unwrap();
    assert!(matches!(client.read(&mut [0; 1]).await, Ok(0) | Err(_)));
    assert_eq!(orders.refusal().await.0, RefusalReason::NoIdentity);
    let web = Agent::start(None, outbound_config(orders.inbound[0], ORDERS)).await;
    assert!(is_reset(call(&web).await).await);
    assert_eq!(web.refusal().await.0, RefusalReason::NoIdentity);
}

#[tokio::test]
async fn what_is_down_is_told_from_what_is_forbidden() {
    let ca = Ca::new("td");
    let gone = TcpListener::bind(ANY).await.unwrap().local_addr().unwrap();
    let orders = Agent::start(Some(ca.identity("shop/orders")), inbound_config(gone, WEB)).await;
    let web = Agent::start(Some(ca.identity("shop/web")), outbound_config(orders.inbound[0], ORDERS)).await;
    assert!(is_reset(call(&web).await).await);
    assert_eq!(orders.refusal().await.0, RefusalReason::WorkloadUnreachable);
    let lost = Agent::start(Some(ca.identity("shop/web")), outbound_config(gone, ORDERS)).await;
    assert!(is_reset(call(&lost).await).await);
    assert_eq!(lost.refusal().await.0, RefusalReason::Unreachable);
}

#[tokio::test]
async fn over_a_limit_a_connection_is_refused_and_counted() {
    let ca = Ca::new("td");
    let mut config = inbound_config(echo().await, WEB);
    config.limits.max_handshakes = 1;
    let orders = Agent::start(Some(ca.identity("shop/orders")), config).await;
    let _first = TcpStream::connect(orders.inbound[0]).await.unwrap();
    let _second = TcpStream::connect(orders.inbound[0]).await.unwrap();
    assert_eq!(orders.refusal().await.0, RefusalReason::LimitReached);
}

#[tokio::test]
async fn one_source_cannot_take_the_handshakes_of_the_others() {
    let ca = Ca::new("td");
    let mut config = inbound_config(echo().await, WEB);
    (config.limits.max_handshakes, config.limits.max_handshakes_per_source) = (9, 2);
    let orders = Agent::start(Some(ca.identity("shop/orders")), config).await;
    let from = |source: &str| crate::dial::connect_from(Some(source.parse().unwrap()), orders.inbound[0]);
    let mut stalled = [from("127.0.0.9").await.unwrap(), from("127.0.0.9").await.unwrap()];
    let mut third = from("127.0.0.9").await.unwrap();
    assert!(matches!(third.read(&mut [0; 1]).await, Ok(0) | Err(_)));
    let (reason, detail, _) = orders.refusal().await;
    assert_eq!(reason, RefusalReason::LimitReached);
    assert_eq!(detail, "more than 2 handshakes under way from 127.0.0.9 (limits.max_handshakes_per_source)");
    let web = Agent::start(Some(ca.identity("shop/web")), outbound_config(orders.inbound[0], ORDERS)).await;
    let mut good = call(&web).await;
    good.write_all(b"x").await.unwrap();
    assert_eq!(good.read(&mut [0; 1]).await.unwrap(), 1);
    stalled[0].write_all(b"GET /").await.unwrap();
    stalled[0].read_to_end(&mut Vec::new()).await.unwrap();
    let given_back = || lock(&orders.shared.sources).admit("127.0.0.9".parse().unwrap(), Instant::now()).is_ok();
    while !given_back() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_handshake_that_stalls_makes_room_for_one_that_does_not() {
    let ca = Ca::new("td");
    for (all, per_source) in [(2, 0), (9, 2)] {
        let mut config = inbound_config(echo().await, WEB);
        (config.limits.max_handshakes, config.limits.max_handshakes_per_source) = (all, per_source);
        let orders = Agent::start(Some(ca.identity("shop/orders")), config).await;
        let web = Agent::start(Some(ca.identity("shop/web")), outbound_config(orders.inbound[0], ORDERS)).await;
        let mut stalled = Vec::new();
        for _ in 0..2 {
            stalled.push(TcpStream::connect(orders.inbound[0]).await.unwrap());
        }
        while lock(&orders.shared.waiting).len() < 2 {
            tokio::task::yield_now().await;
        }
        assert!(is_reset(call(&web).await).await, "both are young");
        tokio::time::pause();
        tokio::time::advance(STALLED).await;
        tokio::time::resume();
        let mut good = call(&web).await;
        good.write_all(b"x").await.unwrap();
        assert_eq!(good.read(&mut [0; 1]).await.unwrap(), 1);
        assert!(matches!(stalled[0].read(&mut [0; 1]).await, Ok(0) | Err(_)), "the oldest had to go");
        assert_eq!(lock(&orders.shared.waiting).len(), 1, "the other one stays, and the good one is through");
        orders.shared.ledger.tell(true);
        let limited = |body: Body| match body {
            Body::ConnectionRefused(refused) if refused.reason == RefusalReason::LimitReached => refused.count,
            _ => 0,
        };
        let events = orders.events.lock().unwrap();
        let counted: u64 = events.iter().filter_map(|event| event.body().unwrap()).map(limited).sum();
        assert_eq!(counted, 2, "who came too early, and who made room");
    }
}

#[tokio::test]
async fn one_source_opens_no_more_connections_a_second_than_it_may() {
    let ca = Ca::new("td");
    let mut config = inbound_config(echo().await, WEB);
    config.limits.max_new_connections_per_source = 1;
    let orders = Agent::start(Some(ca.identity("shop/orders")), config).await;
    // Many, because a slow machine may let another one in each second.
    let mut clients = Vec::new();
    for _ in 0..50 {
        clients.push(TcpStream::connect(orders.inbound[0]).await.unwrap());
    }
    let (reason, detail, _) = orders.refusal().await;
    assert_eq!(reason, RefusalReason::LimitReached);
    assert!(detail.starts_with("more than 1 new connections a second from 127.0.0.1"), "{detail}");
}

#[tokio::test]
async fn a_new_directive_ends_live_connections_of_those_it_denies_and_no_others() {
    let ca = Ca::new("td");
    let web_identity = ca.identity("shop/web");
    let key = web_identity.credential.peer().spki;
    let (web, orders) = pair(&ca, web_identity).await;
    let second = Agent::start(Some(ca.identity("shop/web")), outbound_config(orders.inbound[0], ORDERS)).await;
    let (mut denied, mut other) = (call(&web).await, call(&second).await);
    for client in [&mut denied, &mut other] {
        client.write_all(b"x").await.unwrap();
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 1);
    }
    let signed = ca.directive(1, vec![Deny::Key { spki: key, why: "stolen".into() }], Timestamp::now());
    let directive = Arc::new(signed.open(&ca.trust(), Timestamp::now()).unwrap());
    let checked = ca.issue("shop/orders").check().unwrap();
    orders.identity.send_replace(Some(Arc::new(Identity::build(checked, Some(directive), &Terms::default()).unwrap())));
    assert!(denied.read(&mut [0; 1]).await.is_err(), "cut, not ended");
    let ended = |body: &Body| if let Body::ConnectionEnded(ended) = body { Some(ended.clone()) } else { None };
    let told = orders.event(ended).await;
    assert_eq!((told.reason.as_str(), told.count), ("revoked", 1));
    other.write_all(b"y").await.unwrap();
    assert_eq!(other.read(&mut [0; 1]).await.unwrap(), 1);
    assert!(is_reset(call(&web).await).await);
    assert_eq!(orders.refusal().await.0, RefusalReason::Revoked);
}

#[tokio::test]
async fn a_connection_ends_with_the_certificate_it_was_made_with() {
    let ca = Ca::new("td");
    let now = Timestamp::now();
    let mut short = ca.params("shop/web");
    validity(&mut short, now.minus(Duration::from_secs(60)), now.plus(Duration::from_secs(2)));
    let (web, orders) = pair(&ca, ca.identity_of(&short)).await;
    let mut client = call(&web).await;
    client.write_all(b"x").await.unwrap();
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 1);
    assert!(client.read(&mut [0; 1]).await.is_err());
    let ended = |body: &Body| if let Body::ConnectionEnded(ended) = body { Some(ended.reason.clone()) } else { None };
    assert_eq!(orders.event(ended).await, "expired");
}

#[tokio::test]
async fn the_workloads_port_is_held_on_outside_addresses() {
    let outside = nix::ifaddrs::getifaddrs().unwrap().find_map(|interface| {
        let ip = interface.address?.as_sockaddr_in()?.ip();
        (!ip.is_loopback()).then_some(ip)
    });
    let Some(outside) = outside else { panic!("this test needs a network address that is not loopback") };
    let ca = Ca::new("td");
    let service = echo().await;
    let mut config = inbound_config(service, WEB);
    config.inbound[0].hold_service_port = true;
    let orders = Agent::start(Some(ca.identity("shop/orders")), config).await;
    let to = SocketAddr::from((outside, service.port()));
    let mut client = loop {
        match TcpStream::connect(to).await {
            Ok(client) => break client,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    client.write_all(b"GET /admin HTTP/1.1\r\n\r\n").await.unwrap();
    let (reason, detail, _) = orders.refusal().await;
    assert_eq!((reason, detail.as_str()), (RefusalReason::DirectToService, "sent `GET /admin HTTP/1.1`"));
}

#[tokio::test]
async fn after_stop_live_connections_go_on_until_they_are_cut() {
    let ca = Ca::new("td");
    let (web, orders) = pair(&ca, ca.identity("shop/web")).await;
    let mut client = call(&web).await;
    client.write_all(b"x").await.unwrap();
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 1);
    orders.shared.stop.cancel();
    while TcpStream::connect(orders.inbound[0]).await.is_ok() {
        tokio::task::yield_now().await;
    }
    client.write_all(b"y").await.unwrap();
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 1);
    orders.shared.cut.cancel();
    assert!(client.read(&mut [0; 1]).await.is_err());
}

#[tokio::test]
async fn a_workload_that_goes_everywhere_does_not_crowd_out_its_peers() {
    let told: Arc<Mutex<Vec<Event>>> = Arc::default();
    let events = told.clone();
    let emit = Arc::new(move |event| events.lock().unwrap().push(event));
    let ledger = Ledger::new(emit, Arc::new(Metrics::new("test")));
    let pair = |direction, peer: &str| Pair { direction, peer: peer.into(), listener: "l".into() };
    for i in 0..3_000 {
        ledger.opened(&pair(Direction::Egress, &format!("x{i}.example:443")), Secured::default());
    }
    ledger.opened(&pair(Direction::Inbound, WEB), Secured::default());
    ledger.tell(true);
    let told = told.lock().unwrap();
    let about_web: Vec<&str> = told.iter().map(|event| event.summary.as_str()).filter(|s| s.contains(WEB)).collect();
    assert_eq!(about_web.len(), 2, "its first sight and its sum: {about_web:?}");
}
