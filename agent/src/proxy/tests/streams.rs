//! One stream after the other on a connection between two agents.

use sidewarden_proto::tls::{self, Expect, Floor};
use sidewarden_proto::wire::ALPN_STREAMS;

use super::*;
use crate::proxy::channel::Channel;
use crate::proxy::frame::Frame;
use crate::proxy::header::Header;
use crate::proxy::secure::{Proof, Secure};
use crate::spool::SpoolStats;

async fn ask(agent: &Agent, question: &[u8]) -> Vec<u8> {
    let mut client = call(agent).await;
    client.write_all(question).await.unwrap();
    client.shutdown().await.unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    answer
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..12_000 {
        if holds() {
            return;
        }
        sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {what}");
}

/// A stream is over for its client a moment before its connection rests; nothing waits between the end that is counted and
/// the rest.
async fn rested(web: &Agent, orders: &Agent) {
    until("the connection rests", || live(web, "outbound") == "0" && live(orders, "inbound") == "0").await;
    assert_eq!((web.shared.registry.len(), orders.shared.registry.len()), (1, 1));
}

/// How many streams are relayed, as the metrics tell it.
fn live(agent: &Agent, direction: &str) -> String {
    let text = agent.shared.metrics.render(&SpoolStats::default(), None, None, Timestamp(0));
    let start = format!("sidewarden_agent_connections_live{{direction=\"{direction}\"}} ");
    let text = String::from_utf8(text).unwrap();
    text.lines().find_map(|line| line.strip_prefix(&start)).expect("a gauge from the start").to_owned()
}

/// Another agent by hand: a connection on which it may say what it likes.
async fn by_hand(ca: &Ca, orders: &Agent) -> Channel {
    let expect = Expect::Workload(ORDERS.parse().unwrap());
    let config = ca.identity("shop/web").client(expect, Floor::Tls13, &[ALPN_STREAMS]).unwrap();
    let tcp = TcpStream::connect(orders.inbound[0]).await.unwrap();
    let connected = Secure::connect(tcp, config, Proof { trust: &ca.trust(), insecure: None }, None).await;
    connected.unwrap_or_else(|error| panic!("{error:?}")).into_streams().ok().unwrap().0
}

fn open() -> Frame {
    let ends = "127.0.0.1:1".parse().unwrap();
    Frame::Open(Header::tcp(ends, ends).encode_v2(false).unwrap())
}

#[tokio::test]
async fn one_handshake_serves_many_connections() {
    let ca = Ca::new("td");
    let (web, orders) = pair(&ca, ca.identity("shop/web")).await;
    let serial = |agent: &Agent| agent.shared.registry.registered();
    for i in 0..20u8 {
        assert_eq!(ask(&web, &[i; 100]).await, [&[i; 100][..], b"bye"].concat());
        rested(&web, &orders).await;
    }
    assert_eq!((serial(&web), serial(&orders)), (1, 1), "connections that were ever authenticated");
}

#[tokio::test]
async fn streams_at_the_same_time_have_a_connection_each() {
    let ca = Ca::new("td");
    let (web, orders) = pair(&ca, ca.identity("shop/web")).await;
    let mut long = call(&web).await;
    long.write_all(b"x").await.unwrap();
    long.read_exact(&mut [0]).await.unwrap();
    assert_eq!(ask(&web, b"short").await, b"shortbye");
    assert_eq!(orders.shared.registry.len(), 2);
    long.write_all(b"y").await.unwrap();
    long.read_exact(&mut [0]).await.unwrap();
}

#[tokio::test]
async fn a_connection_at_rest_lets_nobody_in_who_was_revoked_meanwhile() {
    let ca = Ca::new("td");
    let (web, orders) = pair(&ca, ca.identity("shop/web")).await;
    assert_eq!(ask(&web, b"a").await, b"abye");
    rested(&web, &orders).await;
    let why = || "stolen".to_owned();
    let spki = web.shared.identity.borrow().as_ref().unwrap().credential.peer().spki;
    let directive = ca.directive(1, vec![Deny::Key { spki, why: why() }], Timestamp::now());
    let directive = Arc::new(directive.open(&ca.trust(), Timestamp::now()).unwrap());
    let checked = ca.issue("shop/orders").check().unwrap();
    orders.identity.send_replace(Some(Arc::new(Identity::build(checked, Some(directive), &Terms::default()).unwrap())));
    assert!(is_reset(call(&web).await).await);
    assert_eq!(orders.refusal().await.0, RefusalReason::Revoked);
}

#[tokio::test]
async fn a_refusal_leaves_the_connection_free_for_the_next() {
    let ca = Ca::new("td");
    let gone = TcpListener::bind(ANY).await.unwrap();
    let to = gone.local_addr().unwrap();
    drop(gone);
    let orders = Agent::start(Some(ca.identity("shop/orders")), inbound_config(to, WEB)).await;
    let web = Agent::start(Some(ca.identity("shop/web")), outbound_config(orders.inbound[0], ORDERS)).await;
    for _ in 0..3 {
        assert!(is_reset(call(&web).await).await);
    }
    let (reason, detail, _) = web.refusal().await;
    assert_eq!((reason, detail.as_str()), (RefusalReason::RefusedByPeer, "its agent says: workload unreachable"));
    assert_eq!(orders.shared.registry.registered(), 1);
}

#[tokio::test]
async fn connections_at_rest_whose_agent_has_restarted_are_replaced_without_a_loss() {
    let ca = Ca::new("td");
    let (web, orders) = pair(&ca, ca.identity("shop/web")).await;
    assert_eq!(ask(&web, b"a").await, b"abye");
    rested(&web, &orders).await;
    let listen = orders.inbound[0];
    orders.shared.stop.cancel();
    orders._serving.await.unwrap();
    let mut config = inbound_config(echo().await, WEB);
    config.inbound[0].listen = listen;
    let again = Agent::start(Some(ca.identity("shop/orders")), config).await;
    assert_eq!(ask(&web, b"b").await, b"bbye");
    assert_eq!(again.shared.registry.registered(), 1);
}

#[tokio::test]
async fn a_new_identity_uses_no_connection_of_the_old_one() {
    let ca = Ca::new("td");
    let (web, orders) = pair(&ca, ca.identity("shop/web")).await;
    assert_eq!(ask(&web, b"a").await, b"abye");
    rested(&web, &orders).await;
    web.identity.send_replace(Some(ca.identity("shop/web")));
    assert_eq!(ask(&web, b"b").await, b"bbye");
    assert_eq!(orders.shared.registry.registered(), 2);
    until("the old connection is let go", || orders.shared.registry.len() == 1).await;
}

#[tokio::test]
async fn a_cut_stream_takes_its_connection_along() {
    let ca = Ca::new("td");
    let (web, orders) = pair(&ca, ca.identity("shop/web")).await;
    let mut client = call(&web).await;
    client.write_all(b"x").await.unwrap();
    client.read_exact(&mut [0]).await.unwrap();
    client.set_zero_linger().unwrap();
    drop(client);
    until("it is gone", || web.shared.registry.is_empty() && orders.shared.registry.is_empty()).await;
    assert_eq!(ask(&web, b"a").await, b"abye");
}

#[tokio::test]
async fn who_breaks_the_rules_between_agents_gets_no_stream() {
    let ca = Ca::new("td");
    for wrong in [Frame::Accept, Frame::Fin(0), Frame::Refuse("x".into())] {
        let (_, orders) = pair(&ca, ca.identity("shop/web")).await;
        let mut channel = by_hand(&ca, &orders).await;
        channel.send(&wrong).unwrap();
        let (reason, detail, peer) = orders.refusal().await;
        assert_eq!((reason, peer.as_str()), (RefusalReason::HandshakeFailed, WEB), "{detail}");
        assert!(detail.contains("another frame than OPEN"), "{detail}");
    }
    let (_, orders) = pair(&ca, ca.identity("shop/web")).await;
    let mut channel = by_hand(&ca, &orders).await;
    channel.send(&Frame::Open(b"GET / HTTP/1.1".to_vec())).unwrap();
    assert_eq!(channel.receive().await.unwrap(), Some(Frame::Refuse("handshake_failed".into())));
    channel.send(&open()).unwrap();
    assert_eq!(channel.receive().await.unwrap(), Some(Frame::Accept), "and the connection is free again");
}

#[tokio::test]
async fn an_end_that_counts_other_bytes_than_came_cuts_the_workload() {
    let ca = Ca::new("td");
    let listener = TcpListener::bind(ANY).await.unwrap();
    let to = listener.local_addr().unwrap();
    let orders = Agent::start(Some(ca.identity("shop/orders")), inbound_config(to, WEB)).await;
    for (told, ends_whole) in [(0, true), (7, false)] {
        let mut channel = by_hand(&ca, &orders).await;
        channel.send(&open()).unwrap();
        let mut workload = listener.accept().await.unwrap().0;
        assert_eq!(channel.receive().await.unwrap(), Some(Frame::Accept));
        channel.send(&Frame::Fin(told)).unwrap();
        assert_eq!(workload.read(&mut [0; 1]).await.is_ok(), ends_whole, "FIN of {told} bytes after none");
    }
}

/// Every refusal that was told.
fn refusals_of(events: &Mutex<Vec<Event>>) -> Vec<(RefusalReason, String)> {
    let events = events.lock().unwrap();
    let refused = events.iter().filter_map(|event| match event.body() {
        Ok(Some(Body::ConnectionRefused(refused))) => Some((refused.reason, refused.detail)),
        _ => None,
    });
    refused.collect()
}

#[tokio::test]
async fn a_stream_that_never_begins_is_not_waited_for_and_told_once() {
    let ca = Ca::new("td");
    let mut config = inbound_config(echo().await, WEB);
    config.timeouts.handshake = Duration::from_secs(1);
    let orders = Agent::start(Some(ca.identity("shop/orders")), config).await;
    let mut channel = by_hand(&ca, &orders).await;
    assert_eq!(channel.receive().await.unwrap(), None, "the agent closes");
    let (reason, detail, peer) = orders.refusal().await;
    assert_eq!((reason, peer.as_str()), (RefusalReason::HandshakeTimeout, WEB), "{detail}");
    orders.shared.stop.cancel();
    orders._serving.await.unwrap();
    assert_eq!(refusals_of(&orders.events), [(RefusalReason::HandshakeTimeout, "it began no stream within 1s".into())]);
}

#[tokio::test]
async fn a_peer_that_closes_before_its_first_stream_is_told_once_and_one_at_rest_is_not() {
    let ca = Ca::new("td");
    let orders = Agent::start(Some(ca.identity("shop/orders")), inbound_config(echo().await, WEB)).await;
    let mut served = by_hand(&ca, &orders).await;
    served.send(&Frame::Open(b"GET / HTTP/1.1".to_vec())).unwrap();
    assert_eq!(served.receive().await.unwrap(), Some(Frame::Refuse("handshake_failed".into())));
    drop(served);
    until("it is gone", || orders.shared.registry.is_empty()).await;
    drop(by_hand(&ca, &orders).await);
    until("both are gone", || orders.shared.registry.registered() == 2 && orders.shared.registry.is_empty()).await;
    orders.shared.stop.cancel();
    orders._serving.await.unwrap();
    let told = refusals_of(&orders.events);
    let expected = ["its OPEN cannot be read", "it closed before it began a stream"];
    assert_eq!(told, expected.map(|detail| (RefusalReason::HandshakeFailed, detail.to_owned())));
}

/// A server that is no agent: mutual TLS with this identity, `alpn` as the only protocol it knows, and an echo.
async fn foreign_server(identity: &Identity, alpn: &[u8]) -> (SocketAddr, Arc<Mutex<Vec<bool>>>) {
    let tls = tls::server_config(&identity.credential, &identity.trust, Floor::Tls13, &[alpn]).unwrap();
    let (listener, shaken) = (TcpListener::bind(ANY).await.unwrap(), Arc::<Mutex<Vec<bool>>>::default());
    let (address, outcomes) = (listener.local_addr().unwrap(), shaken.clone());
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let accepted = tokio_rustls::TlsAcceptor::from(tls.clone()).accept(tcp).await;
            outcomes.lock().unwrap().push(accepted.is_ok());
            let Ok(stream) = accepted else { continue };
            tokio::spawn(async move {
                let (mut reader, mut writer) = tokio::io::split(stream);
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
                let _ = writer.shutdown().await;
            });
        }
    });
    (address, shaken)
}

#[tokio::test]
async fn a_foreign_server_that_cannot_stand_our_protocols_name_is_asked_without_it_and_remembered() {
    let ca = Ca::new("td");
    let (address, shaken) = foreign_server(&ca.identity("shop/orders"), b"http/1.1").await;
    let web = Agent::start(Some(ca.identity("shop/web")), outbound_config(address, ORDERS)).await;
    assert_eq!(ask(&web, b"first").await, b"first");
    assert_eq!(*shaken.lock().unwrap(), [false, true], "no_application_protocol, and once more without");
    assert_eq!(ask(&web, b"second").await, b"second");
    assert_eq!(*shaken.lock().unwrap(), [false, true, true]);
    assert_eq!(web.shared.registry.registered(), 2);
}

#[tokio::test]
async fn a_foreign_server_that_is_somebody_else_is_asked_once() {
    let (ca, other) = (Ca::new("td"), Ca::new("td"));
    let (address, shaken) = foreign_server(&other.identity("shop/orders"), ALPN_STREAMS).await;
    let web = Agent::start(Some(ca.identity("shop/web")), outbound_config(address, ORDERS)).await;
    assert!(is_reset(call(&web).await).await);
    assert_eq!(web.refusal().await.0, RefusalReason::UnknownCa);
    until("the server has noticed", || !shaken.lock().unwrap().is_empty()).await;
    web.shared.stop.cancel();
    web._serving.await.unwrap();
    assert_eq!(*shaken.lock().unwrap(), [false]);
}
