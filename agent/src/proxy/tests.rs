//! Two agents' proxies against each other, and against everybody who should not get in.

mod ends;
mod foreign;
mod idle;
mod insecure;
mod resumption;
mod streams;

use std::sync::Mutex;

use sidewarden_proto::config::HostPort;
use sidewarden_proto::directive::Deny;
use sidewarden_proto::event::Body;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

use super::*;
use crate::config::{Inbound, Outbound, Permissive, ProxyProtocol, Rates, Service};
use crate::identity::Terms;
use crate::identity::made_up::{Ca, validity};
use crate::proxy::balance::Balance;

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
        Agent::start_with(identity, config, |_| {}).await
    }

    async fn start_with(
        identity: Option<Arc<Identity>>,
        config: Config,
        change: impl FnOnce(&mut Shared) + Send,
    ) -> Agent {
        let listeners = Listeners::bind(&config).await.unwrap();
        let (inbound, outbound) = listeners.addresses();
        let events: Arc<Mutex<Vec<Event>>> = Arc::default();
        let told = events.clone();
        let emit: Arc<dyn Fn(Event) + Send + Sync> = Arc::new(move |event| told.lock().unwrap().push(event));
        let metrics = Arc::new(Metrics::new("test"));
        let (publish, current) = watch::channel(identity);
        let resolver = Resolver::from_system();
        let mut shared = Shared::new(&config, current, resolver, emit, metrics, sidewarden_proto::backoff::random);
        shared.own = Own::new(outbound.clone());
        change(&mut shared);
        let shared = Arc::new(shared);
        shared.begun.cancel();
        let serving = tokio::spawn(listeners.serve(shared.clone()));
        Agent { inbound, outbound, events, identity: publish, shared, _serving: serving }
    }

    /// Waits for an event that `pick` takes.
    async fn event<T>(&self, pick: impl Fn(&Body) -> Option<T>) -> T {
        for _ in 0..12_000 {
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

/// What `attempt` comes to, which must be done before the moment that it is given: later and later, so that there is time
/// enough on a machine as busy as this one.
async fn in_time<T>(attempt: impl AsyncFn(Timestamp) -> Option<T>) -> T {
    for seconds in [2, 8, 32, 128] {
        if let Some(done) = attempt(Timestamp::now().plus(Duration::from_secs(seconds))).await {
            return done;
        }
    }
    panic!("it fails however much time there is");
}

/// Whether `ping` comes back.
async fn echoes(client: &mut TcpStream) -> bool {
    let mut answer = [0; 4];
    client.write_all(b"ping").await.is_ok() && client.read_exact(&mut answer).await.is_ok() && answer == *b"ping"
}

const ANY: &str = "127.0.0.1:0";

fn inbound_config(to: SocketAddr, allow: &str) -> Config {
    let inbound = Inbound {
        listen: ANY.parse().unwrap(),
        to: Service::Tcp(to),
        server_name: None,
        allow: vec![allow.parse().unwrap()],
        allow_dns: vec![],
        hold_service_port: false,
        dial_from: "127.0.0.6".parse().unwrap(),
        proxy_protocol: ProxyProtocol::Off,
        accept_proxy_protocol_from: vec![],
        rates: Rates::default(),
        permissive: None,
        insecure_trust_all: None,
    };
    Config { inbound: vec![inbound], ..Config::default() }
}

fn outbound_config(to: SocketAddr, peer: &str) -> Config {
    let outbound = Outbound {
        listen: ANY.parse().unwrap(),
        to: vec![HostPort { host: to.ip().to_string(), port: to.port() }],
        balance: Balance::RoundRobin,
        peer: crate::config::Peer::Workload(peer.parse().unwrap()),
        server_name: None,
        expose: false,
        rates: Rates::default(),
        insecure_trust_all: None,
    };
    Config { outbound: vec![outbound], ..Config::default() }
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

/// A client of our own: TLS over `tcp`, as `who`, asking for `host`.
async fn tls_over(
    tcp: TcpStream,
    ca: &Ca,
    who: &str,
    host: Option<&str>,
) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let expect = sidewarden_proto::tls::Expect::Workload(ORDERS.parse().unwrap());
    let config = ca.identity(who).client(expect, sidewarden_proto::tls::Floor::Tls12, &[]).unwrap();
    let address = rustls::pki_types::ServerName::from(tcp.peer_addr().unwrap().ip());
    let name = host.map_or(address, |host| rustls::pki_types::ServerName::try_from(host.to_owned()).unwrap());
    tokio_rustls::TlsConnector::from(config).connect(name, tcp).await
}

/// A workload that sends back the first `count` bytes it gets, and its own name.
async fn first_bytes(count: usize, name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind(ANY).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut first = vec![0; count];
                if tcp.read_exact(&mut first).await.is_ok() {
                    let _ = tcp.write_all(&[&first, name.as_bytes()].concat()).await;
                }
            });
        }
    });
    address
}

async fn answer(stream: &mut (impl AsyncReadExt + Unpin), count: usize) -> String {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).await.unwrap();
    String::from_utf8(bytes).unwrap()
}

const HEADER: &[u8] = b"PROXY TCP4 192.0.2.7 192.0.2.9 12345 443\r\n";

fn behind_a_balancer(to: SocketAddr) -> Config {
    let mut config = inbound_config(to, WEB);
    config.inbound[0].accept_proxy_protocol_from = vec!["127.0.0.0/24".parse().unwrap()];
    config
}

#[tokio::test]
async fn behind_a_load_balancer_the_workload_and_the_events_see_who_really_connected() {
    let ca = Ca::new("td");
    let told = "PROXY TCP4 192.0.2.7 127.0.0.1 12345 ";
    let mut config = behind_a_balancer(first_bytes(told.len(), "").await);
    config.inbound[0].proxy_protocol = ProxyProtocol::V1;
    let orders = Agent::start(Some(ca.identity("shop/orders")), config).await;
    let mut tcp = TcpStream::connect(orders.inbound[0]).await.unwrap();
    tcp.write_all(HEADER).await.unwrap();
    let mut client = tls_over(tcp, &ca, "shop/web", None).await.unwrap();
    assert_eq!(answer(&mut client, told.len()).await, told);
    let seen = |body: &Body| if let Body::PeerFirstSeen(seen) = body { Some(seen.address.clone()) } else { None };
    assert_eq!(orders.event(seen).await, "192.0.2.7:12345");
}

#[tokio::test]
async fn a_spoofed_proxy_header_is_refused_and_its_claim_is_not_believed() {
    let ca = Ca::new("td");
    let orders = Agent::start(Some(ca.identity("shop/orders")), inbound_config(echo().await, WEB)).await;
    let mut tcp = TcpStream::connect(orders.inbound[0]).await.unwrap();
    tcp.write_all(HEADER).await.unwrap();
    assert!(tls_over(tcp, &ca, "shop/web", None).await.is_err());
    let refusal = |body: &Body| if let Body::ConnectionRefused(body) = body { Some(body.clone()) } else { None };
    let told = orders.event(refusal).await;
    assert_eq!(told.reason, RefusalReason::ProxyHeaderUntrusted);
    assert!(told.source.starts_with("127.0.0.1:"), "{}", told.source);
    assert!(told.hint.contains("accept_proxy_protocol_from"), "{}", told.hint);
}

#[tokio::test]
async fn a_load_balancer_that_sends_no_header_gets_nobody_through() {
    let ca = Ca::new("td");
    let orders = Agent::start(Some(ca.identity("shop/orders")), behind_a_balancer(echo().await)).await;
    let tcp = TcpStream::connect(orders.inbound[0]).await.unwrap();
    assert!(tls_over(tcp, &ca, "shop/web", None).await.is_err());
    let (reason, detail, _) = orders.refusal().await;
    assert_eq!((reason, detail.as_str()), (RefusalReason::ProxyHeaderBroken, "PROXY header: there is none"));
}

#[tokio::test(start_paused = true)]
async fn a_slow_header_ends_at_its_deadline() {
    let ca = Ca::new("td");
    let orders = Agent::start(Some(ca.identity("shop/orders")), behind_a_balancer(echo().await)).await;
    let mut client = TcpStream::connect(orders.inbound[0]).await.unwrap();
    client.write_all(&HEADER[..20]).await.unwrap();
    assert!(matches!(client.read(&mut [0; 1]).await, Ok(0) | Err(_)));
    let (reason, detail, _) = orders.refusal().await;
    assert_eq!(reason, RefusalReason::HandshakeTimeout);
    assert_eq!(detail, "the PROXY header was not finished within 5s");
}

#[tokio::test]
async fn limits_of_a_source_are_kept_for_who_stands_behind_the_load_balancer() {
    let ca = Ca::new("td");
    let mut config = behind_a_balancer(echo().await);
    config.limits.max_handshakes_per_source = 1;
    let orders = Agent::start(Some(ca.identity("shop/orders")), config).await;
    // Not even a hello: who stands behind the load balancer is counted as soon as it is known.
    let begin = async || {
        let mut tcp = TcpStream::connect(orders.inbound[0]).await.unwrap();
        tcp.write_all(HEADER).await.unwrap();
        tcp
    };
    let _both = (begin().await, begin().await);
    let (reason, detail, _) = orders.refusal().await;
    assert_eq!(reason, RefusalReason::LimitReached, "{detail}");
    assert!(detail.contains("from 192.0.2.7 "), "{detail}");
}

#[tokio::test]
async fn services_behind_one_listener_are_told_apart_by_the_name_that_is_asked_for() {
    let ca = Ca::new("td");
    let mut config = inbound_config(first_bytes(1, "orders").await, WEB);
    let block = config.inbound[0].clone();
    config.inbound[0].server_name = Some("orders.shop.example".into());
    let (to, other) = (Service::Tcp(first_bytes(1, "second").await), "spiffe://td/shop/other".parse().unwrap());
    config.inbound.push(Inbound { to, server_name: Some("*.pay.example".into()), allow: vec![other], ..block });
    let orders = Agent::start(Some(ca.identity("shop/orders")), config).await;
    assert_eq!(orders.inbound[0], orders.inbound[1]);
    let connect = async || TcpStream::connect(orders.inbound[0]).await.unwrap();
    for (who, host, expected) in
        [("shop/web", "orders.shop.example", "xorders"), ("shop/other", "Cards.PAY.example", "xsecond")]
    {
        let mut client = tls_over(connect().await, &ca, who, Some(host)).await.unwrap();
        client.write_all(b"x").await.unwrap();
        assert_eq!(answer(&mut client, 7).await, expected);
    }
    let wrong = tls_over(connect().await, &ca, "shop/web", Some("cards.pay.example")).await;
    if let Ok(mut client) = wrong {
        assert!(client.read(&mut [0; 1]).await.is_err(), "allowed at the other one only");
    }
    assert_eq!(orders.refusal().await.0, RefusalReason::NotAllowed);
}

#[tokio::test]
async fn a_name_that_nobody_has_is_refused_in_tls_and_told() {
    let ca = Ca::new("td");
    for (host, detail) in [(Some("nobody.example"), "asked for `nobody.example`"), (None, "asked for no host name")] {
        let mut config = inbound_config(echo().await, WEB);
        config.inbound[0].server_name = Some("orders.example".into());
        let orders = Agent::start(Some(ca.identity("shop/orders")), config).await;
        let tcp = TcpStream::connect(orders.inbound[0]).await.unwrap();
        let error = tls_over(tcp, &ca, "shop/web", host).await.unwrap_err().to_string();
        assert!(error.contains("UnrecognizedName") || error.contains("UnrecognisedName"), "{error}");
        let (reason, told, _) = orders.refusal().await;
        assert_eq!((reason, told.as_str()), (RefusalReason::UnknownServerName, detail));
    }
}

#[tokio::test]
async fn an_agent_asks_for_the_service_it_means() {
    let ca = Ca::new("td");
    let mut config = inbound_config(first_bytes(1, "orders").await, WEB);
    config.inbound[0].server_name = Some("orders.example".into());
    let orders = Agent::start(Some(ca.identity("shop/orders")), config).await;
    let mut config = outbound_config(orders.inbound[0], ORDERS);
    config.outbound[0].server_name = Some("orders.example".into());
    let web = Agent::start(Some(ca.identity("shop/web")), config).await;
    let mut client = call(&web).await;
    client.write_all(b"x").await.unwrap();
    assert_eq!(answer(&mut client, 7).await, "xorders");
}

#[tokio::test]
async fn a_workload_behind_a_unix_socket_is_reached_and_both_ends_are_heard() {
    let (ca, dir) = (Ca::new("td"), tempfile::tempdir().unwrap());
    let path = dir.path().join("app.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        all.reverse();
        stream.write_all(&all).await.unwrap();
    });
    let mut config = inbound_config(ANY.parse().unwrap(), WEB);
    config.inbound[0].to = Service::Unix(path);
    let orders = Agent::start(Some(ca.identity("shop/orders")), config).await;
    let web = Agent::start(Some(ca.identity("shop/web")), outbound_config(orders.inbound[0], ORDERS)).await;
    let mut client = call(&web).await;
    let sent: Vec<u8> = (0..300_000u32).map(|i| (i * 7) as u8).collect();
    client.write_all(&sent).await.unwrap();
    client.shutdown().await.unwrap();
    let mut got = Vec::new();
    client.read_to_end(&mut got).await.unwrap();
    got.reverse();
    assert!(got == sent, "{} bytes came back", got.len());
}

#[tokio::test]
async fn a_unix_socket_that_is_not_there_is_told() {
    let ca = Ca::new("td");
    let mut config = inbound_config(ANY.parse().unwrap(), WEB);
    config.inbound[0].to = Service::Unix("/nowhere/app.sock".into());
    let orders = Agent::start(Some(ca.identity("shop/orders")), config).await;
    let web = Agent::start(Some(ca.identity("shop/web")), outbound_config(orders.inbound[0], ORDERS)).await;
    assert!(is_reset(call(&web).await).await);
    let (reason, detail, _) = orders.refusal().await;
    assert_eq!(reason, RefusalReason::WorkloadUnreachable);
    assert!(detail.starts_with("dialling unix:/nowhere/app.sock: "), "{detail}");
}

#[tokio::test]
async fn when_one_peer_is_down_the_next_one_answers() {
    let ca = Ca::new("td");
    let orders = Agent::start(Some(ca.identity("shop/orders")), inbound_config(echo().await, WEB)).await;
    let stranger = Agent::start(Some(ca.identity("shop/stranger")), inbound_config(echo().await, WEB)).await;
    let gone = TcpListener::bind(ANY).await.unwrap().local_addr().unwrap();
    let mut config = outbound_config(gone, ORDERS);
    let place = |address: SocketAddr| HostPort { host: address.ip().to_string(), port: address.port() };
    config.outbound[0].to.extend([place(stranger.inbound[0]), place(orders.inbound[0])]);
    let web = Agent::start(Some(ca.identity("shop/web")), config).await;
    for _ in 0..5 {
        let mut client = call(&web).await;
        client.write_all(b"x").await.unwrap();
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 1);
    }
    let refused = |body: &Body| matches!(body, Body::ConnectionRefused(_));
    let told = web.events.lock().unwrap().iter().filter(|event| refused(&event.body().unwrap().unwrap())).count();
    assert_eq!(told, 0, "every attempt of the workload got through");
}

/// `web` with a route to all of `peers`.
async fn web_to(ca: &Ca, who: &str, peers: &[&Agent]) -> Agent {
    let place = |peer: &&Agent| HostPort { host: "127.0.0.1".into(), port: peer.inbound[0].port() };
    let mut config = outbound_config(peers[0].inbound[0], ORDERS);
    config.outbound[0].to = peers.iter().map(place).collect();
    Agent::start(Some(ca.identity(who)), config).await
}

async fn named(ca: &Ca, name: &'static str) -> Agent {
    Agent::start(Some(ca.identity("shop/orders")), inbound_config(first_bytes(1, name).await, WEB)).await
}

async fn who_answers(web: &Agent) -> String {
    let mut client = call(web).await;
    client.write_all(b"x").await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn connections_go_to_all_peers_in_turn_also_over_warm_connections() {
    let ca = Ca::new("td");
    let (first, second) = (named(&ca, "first").await, named(&ca, "second").await);
    let web = web_to(&ca, "shop/web", &[&first, &second]).await;
    let mut answers = Vec::new();
    for _ in 0..6 {
        answers.push(who_answers(&web).await);
    }
    assert_eq!(answers, ["xfirst", "xsecond"].repeat(3));
}

#[tokio::test]
async fn a_peer_whose_workload_is_gone_is_passed_over() {
    let ca = Ca::new("td");
    let gone = TcpListener::bind(ANY).await.unwrap().local_addr().unwrap();
    let first = Agent::start(Some(ca.identity("shop/orders")), inbound_config(gone, WEB)).await;
    let second = named(&ca, "second").await;
    let web = web_to(&ca, "shop/web", &[&first, &second]).await;
    for _ in 0..4 {
        assert_eq!(who_answers(&web).await, "xsecond");
    }
    assert_eq!(first.refusal().await.0, RefusalReason::WorkloadUnreachable);
}

#[tokio::test]
async fn who_is_not_allowed_at_one_peer_does_not_knock_at_all_of_them() {
    let ca = Ca::new("td");
    let (first, second) = (named(&ca, "first").await, named(&ca, "second").await);
    let other = web_to(&ca, "shop/other", &[&first, &second]).await;
    assert!(is_reset(call(&other).await).await);
    assert_eq!(first.refusal().await.0, RefusalReason::NotAllowed);
    let (reason, detail, _) = other.refusal().await;
    assert_eq!((reason, detail.as_str()), (RefusalReason::RefusedByPeer, "its agent says: not allowed"));
    assert!(second.events.lock().unwrap().is_empty());
}

#[tokio::test]
async fn when_all_peers_are_down_one_attempt_is_one_refusal() {
    let ca = Ca::new("td");
    let gone = [TcpListener::bind(ANY).await.unwrap(), TcpListener::bind(ANY).await.unwrap()];
    let mut config = outbound_config(gone[0].local_addr().unwrap(), ORDERS);
    let other = gone[1].local_addr().unwrap();
    config.outbound[0].to.push(HostPort { host: other.ip().to_string(), port: other.port() });
    drop(gone);
    let web = Agent::start(Some(ca.identity("shop/web")), config).await;
    assert!(is_reset(call(&web).await).await);
    let (reason, detail, _) = web.refusal().await;
    assert_eq!(reason, RefusalReason::Unreachable);
    assert!(detail.ends_with("(the last of 2 addresses)"), "{detail}");
}

#[tokio::test]
async fn a_route_that_leads_back_to_its_agent_is_refused_as_a_loop() {
    let ca = Ca::new("td");
    let free = TcpListener::bind(ANY).await.unwrap().local_addr().unwrap();
    let mut config = outbound_config(free, ORDERS);
    config.outbound[0].listen = free;
    let web = Agent::start(Some(ca.identity("shop/web")), config).await;
    assert!(is_reset(call(&web).await).await);
    let (reason, detail, _) = web.refusal().await;
    assert_eq!((reason, detail), (RefusalReason::Loop, format!("{free} is a listener of this agent")));
}

#[tokio::test(start_paused = true)]
async fn a_route_and_a_listener_keep_their_rate_and_lose_nothing() {
    let ca = Ca::new("td");
    let mut config = inbound_config(echo().await, WEB);
    config.inbound[0].rates.each = std::num::NonZeroU64::new(8 << 20);
    let orders = Agent::start(Some(ca.identity("shop/orders")), config).await;
    let mut config = outbound_config(orders.inbound[0], ORDERS);
    config.outbound[0].rates.all = std::num::NonZeroU64::new(8 << 20);
    let web = Agent::start(Some(ca.identity("shop/web")), config).await;
    let begin = Instant::now();
    let mut client = call(&web).await;
    let (mut reader, mut writer) = client.split();
    let sent: Vec<u8> = (0..4_000_000u32).map(|i| (i * 7) as u8).collect();
    let mut got = Vec::new();
    let writing = async {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let ((), read) = tokio::join!(writing, reader.read_to_end(&mut got));
    read.unwrap();
    assert!(got == [&sent[..], b"bye"].concat(), "{} bytes came back", got.len());
    // 8 MB went, at 8 MiB a second, by a clock that stands still but for waits. What may go at once, and the last gust,
    // which nobody waited for, are free.
    assert!(begin.elapsed() > Duration::from_millis(300), "{:?}", begin.elapsed());
}

fn permissive(until: Timestamp) -> Option<Permissive> {
    Some(Permissive { reason: "moving".into(), until, silent_after: Duration::from_millis(50) })
}

#[tokio::test]
async fn plaintext_is_let_in_for_a_while_counted_and_then_ended() {
    let ca = Ca::new("td");
    let is_on = |on| move |body: &Body| matches!(body, Body::ListenerPermissive(body) if body.on == on).then_some(());
    let (orders, _web, mut plain, mut tls) = in_time(async |until| {
        let mut config = inbound_config(echo().await, WEB);
        config.inbound[0].permissive = permissive(until);
        let orders = Agent::start(Some(ca.identity("shop/orders")), config).await;
        let web = Agent::start(Some(ca.identity("shop/web")), outbound_config(orders.inbound[0], ORDERS)).await;
        let (mut plain, mut tls) = (TcpStream::connect(orders.inbound[0]).await.unwrap(), call(&web).await);
        let is_good = echoes(&mut plain).await && echoes(&mut tls).await;
        // The first word about the listener: that it is on, or already that it was.
        let told = |body: &Body| if let Body::ListenerPermissive(told) = body { Some(told.on) } else { None };
        (is_good && orders.event(told).await).then_some((orders, web, plain, tls))
    })
    .await;
    let let_in = |body: &Body| if let Body::ConnectionPlaintext(body) = body { Some(body.clone()) } else { None };
    let told = orders.event(let_in).await;
    assert_eq!((told.network.as_str(), told.detail.as_str(), told.count), ("127.0.0.0/24", "began with `ping`", 1));
    assert!(plain.read(&mut [0; 1]).await.is_err(), "cut, not ended");
    orders.event(is_on(false)).await;
    let ended = |body: &Body| if let Body::ConnectionEnded(body) = body { Some(body.clone()) } else { None };
    let told = orders.event(ended).await;
    assert_eq!((told.peer.as_str(), told.reason.as_str(), told.count), ("plaintext", "permissive_over", 1));
    assert!(echoes(&mut tls).await);
    let mut late = TcpStream::connect(orders.inbound[0]).await.unwrap();
    late.write_all(b"ping").await.unwrap();
    assert!(matches!(late.read(&mut [0; 1]).await, Ok(0) | Err(_)));
    assert_eq!(orders.refusal().await.0, RefusalReason::Plaintext);
}

#[tokio::test]
async fn a_client_that_waits_for_the_service_to_speak_is_served_in_plaintext_while_that_is_allowed() {
    let ca = Ca::new("td");
    let mut config = inbound_config(first_bytes(0, "hello, what do you want?").await, WEB);
    config.inbound[0].permissive = permissive(Timestamp::now().plus(Duration::from_secs(3600)));
    let orders = Agent::start(Some(ca.identity("shop/orders")), config).await;
    let mut plain = TcpStream::connect(orders.inbound[0]).await.unwrap();
    assert_eq!(answer(&mut plain, 5).await, "hello");
}

#[tokio::test]
async fn who_still_knows_the_service_by_its_own_port_is_served_there_while_plaintext_is_let_in() {
    let ca = Ca::new("td");
    let (orders, lenient, port) = in_time(async |until| {
        let mut config = inbound_config(echo().await, WEB);
        config.inbound[0].permissive = permissive(until);
        let orders = Agent::start(Some(ca.identity("shop/orders")), config.clone()).await;
        let address = orders.inbound[0];
        let lenient = Arc::new(inbound::Listener::new(orders.shared.clone(), address, config.inbound));
        let held = TcpListener::bind(ANY).await.unwrap();
        let port = held.local_addr().unwrap();
        tokio::spawn(hold::hold_at(orders.shared.clone(), held, lenient.clone()));
        echoes(&mut TcpStream::connect(port).await.unwrap()).await.then_some((orders, lenient, port))
    })
    .await;
    while lenient.is_lenient_now() {
        sleep(Duration::from_millis(20)).await;
    }
    let mut late = TcpStream::connect(port).await.unwrap();
    late.write_all(b"ping").await.unwrap();
    assert!(matches!(late.read(&mut [0; 1]).await, Ok(0) | Err(_)));
    assert_eq!(orders.refusal().await.0, RefusalReason::DirectToService);
}

#[tokio::test]
async fn without_an_identity_permissive_lets_in_plaintext_and_nothing_else() {
    let ca = Ca::new("td");
    let mut config = inbound_config(echo().await, WEB);
    config.inbound[0].permissive = permissive(Timestamp::now().plus(Duration::from_secs(3600)));
    let orders = Agent::start(None, config).await;
    let mut plain = TcpStream::connect(orders.inbound[0]).await.unwrap();
    plain.write_all(b"ping").await.unwrap();
    assert_eq!(answer(&mut plain, 4).await, "ping");
    let tcp = TcpStream::connect(orders.inbound[0]).await.unwrap();
    assert!(tls_over(tcp, &ca, "shop/web", None).await.is_err());
    assert_eq!(orders.refusal().await.0, RefusalReason::NoIdentity);
}

#[tokio::test]
async fn plaintext_waits_for_the_identity_that_a_kept_directive_is_read_by() {
    let ca = Ca::new("td");
    let mut config = inbound_config(echo().await, WEB);
    config.inbound[0].permissive = permissive(Timestamp::now().plus(Duration::from_secs(3600)));
    let orders = Agent::start_with(None, config, |shared| shared.directive_is_unread = true).await;
    let ping = async || {
        let mut plain = TcpStream::connect(orders.inbound[0]).await.unwrap();
        plain.write_all(b"ping").await.unwrap();
        let mut answer = [0; 4];
        plain.read_exact(&mut answer).await.is_ok()
    };
    assert!(!ping().await);
    let (reason, detail, _) = orders.refusal().await;
    assert!(reason == RefusalReason::NoIdentity && detail.contains("directive.json"), "{reason}: {detail}");
    orders.identity.send_replace(Some(ca.identity("shop/orders")));
    assert!(ping().await);
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
    let (_web, orders, mut client) = in_time(async |until| {
        let mut short = ca.params("shop/web");
        validity(&mut short, until.minus(Duration::from_secs(600)), until);
        let (web, orders) = pair(&ca, ca.identity_of(&short)).await;
        let mut client = call(&web).await;
        echoes(&mut client).await.then_some((web, orders, client))
    })
    .await;
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
