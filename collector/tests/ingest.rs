//! The way in, over real sockets: enrolment, sessions, and everybody who should not get in.

mod agent;

use std::sync::Arc;
use std::time::Duration;

use agent::{Agent, domain, enrol, request, start, token, until};
use rcgen::KeyPair;
use sidewarden_collector::app::App;
use sidewarden_collector::ca::orders;
use sidewarden_collector::ca::rotate::Step;
use sidewarden_collector::commit::What;
use sidewarden_collector::fleet::{self, Asked};
use sidewarden_collector::index::{Order, Query};
use sidewarden_collector::state::{Session, Status};
use sidewarden_proto::batch::{Cursor, Link};
use sidewarden_proto::directive::Target;
use sidewarden_proto::enrol::{Answer, Der};
use sidewarden_proto::event::{AgentStarted, Event, Mode, Severity};
use sidewarden_proto::finding::Vantage;
use sidewarden_proto::identity::Sha256;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::wire::Frame;
use tempfile::tempdir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn all(kind: &str) -> Query {
    Query { kinds: vec![kind.to_owned()], order: Order::Oldest(None), limit: 1000, ..Query::default() }
}

fn found(app: &App, kind: &str) -> Vec<String> {
    app.core.index.query_now(&all(kind)).unwrap().events.into_iter().map(|e| e.body.get().to_owned()).collect()
}

async fn wait_for(app: &App, kind: &str, word: &str) {
    until(&format!("{kind} with {word}"), || found(app, kind).iter().any(|body| body.contains(word))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_arrive_over_quic_and_tcp_and_are_found_again() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let mut listener = app.core.commits.subscribe();
    let mut web = Agent::enrolled(&app, "shop/web", "c1").await;
    let (mut quic, cursor) = web.session(app.agents).await;
    assert_eq!(cursor, Cursor::START);
    let link = web.some_events(7);
    quic.deliver(link).await;
    let mut orders = Agent::enrolled(&app, "shop/orders", "c1").await;
    let mut tcp = orders.tcp(app.agents).await;
    tcp.send(&Frame::Hello(orders.hello())).await;
    assert!(matches!(tcp.next().await, Some(Frame::Welcome(_))));
    let link = orders.some_events(3);
    tcp.deliver(link).await;
    app.core.commits.flush().await.unwrap();
    let events = app.core.index.query(all("agent.stopping")).await.unwrap().events;
    assert_eq!(events.len(), 10);
    assert!(events[..7].iter().all(|e| *e.agent == web.id) && events[7..].iter().all(|e| *e.agent == orders.id));
    let statuses: Vec<_> = {
        let state = app.core.commits.state();
        [&web.id, &orders.id].map(|id| state.status(&state.agents[id], Timestamp::now())).to_vec()
    };
    assert_eq!(statuses, [Status::Live, Status::Live]);
    let mut heard = 0;
    while let Ok(committed) = listener.try_recv() {
        heard += committed.events().iter().filter(|e| e.kind == "agent.stopping").count();
        assert!(!matches!(committed.what, What::Lost(_)));
    }
    assert_eq!(heard, 10);
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn state_index_and_cursors_survive_a_restart_and_nothing_is_stored_twice() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let mut web = Agent::enrolled(&app, "shop/web", "c1").await;
    let body = AgentStarted {
        version: "0.1.0".into(),
        mode: Mode::Exec,
        vantage: Vantage::Open,
        clean: true,
        heartbeat_secs: 5,
    };
    let first = web.seal(vec![Event::new(Timestamp::now(), Severity::Info, "started", &body.into())]);
    let (mut connection, _) = web.session(app.agents).await;
    connection.deliver(first.clone()).await;
    app.stop().await;

    let app = start(dir.path()).await;
    assert_eq!(app.core.commits.state().agents[&web.id].mode, Some(Mode::Exec));
    let ended = app.core.commits.state().agents[&web.id].session.clone();
    assert!(matches!(ended, Session::Ended { clean: false, .. }), "{ended:?}");
    let (mut connection, cursor) = web.session(app.agents).await;
    assert_eq!(cursor, web.cursor());
    connection.send(&Frame::Link(first)).await;
    let next = web.some_events(2);
    connection.deliver(next).await;
    app.core.commits.flush().await.unwrap();
    assert_eq!(found(&app, "agent.started").len(), 1);
    assert_eq!(found(&app, "collector.started").len(), 2);
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_goodbye_is_clean_and_a_lost_connection_is_not() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    for (instance, bye) in [("c1", true), ("c2", false)] {
        let web = Agent::enrolled(&app, "shop/web", instance).await;
        let (mut connection, _) = web.session(app.agents).await;
        if bye {
            connection.send(&Frame::Bye("SIGTERM".into())).await;
            assert_eq!(connection.refusal().await, "closed");
        }
        drop(connection);
        let ended = || match &app.core.commits.state().agents[&web.id].session {
            Session::Ended { clean, .. } => Some(*clean),
            _ => None,
        };
        until("the session ends", || ended().is_some()).await;
        assert_eq!(ended(), Some(bye), "{instance}");
    }
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_opens_only_what_it_is_for() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let key = KeyPair::generate().unwrap();
    let once = token(&app, "shop/web", 1);
    let many = token(&app, "shop/*", 9);
    let mut wrong = once.clone();
    wrong.secret = sidewarden_proto::secret::Secret::new("x".repeat(43));
    let revoked = token(&app, "shop/web", 1);
    app.core.issuer.register().revoke(&revoked.id).unwrap();
    let rows = [
        (&wrong, "shop/web", Some("token_unknown")),
        (&once, "shop/orders", Some("token_other_workload")),
        (&once, "sidewarden/collector", Some("token_other_workload")),
        (&once, "shop/web", None),
        (&once, "shop/web", Some("token_used_up")),
        (&many, "shop/anything", None),
        (&many, "shopping/anything", Some("token_other_workload")),
        (&revoked, "shop/web", Some("token_unknown")),
    ];
    for (token, workload, wanted) in rows {
        let answer = enrol(app.agents, token.pin, &request(token, workload, "c1", &key)).await;
        assert_eq!(answer.as_ref().err().map(|r| r.reason.as_str()), wanted, "{workload}: {answer:?}");
    }
    wait_for(&app, "enrolment.refused", "token_used_up").await;
    wait_for(&app, "certificate.issued", "shop/anything").await;
    wait_for(&app, "token.created", &many.id).await;
    let told = format!("{:?}{:?}", found(&app, "enrolment.refused"), found(&app, "token.created"));
    assert!(!told.contains(once.secret.reveal()) && !told.contains(many.secret.reveal()), "a secret was told");
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_token_says_so() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let issuer = app.core.issuer.clone();
    let pin = issuer.authority().pin();
    let long_ago = Timestamp::now().minus(Duration::from_secs(3600));
    let (token, _) =
        issuer.register().create(&"shop/web".parse().unwrap(), 1, Duration::from_secs(60), pin, long_ago).unwrap();
    let key = KeyPair::generate().unwrap();
    let refused = enrol(app.agents, pin, &request(&token, "shop/web", "c1", &key)).await.unwrap_err();
    assert_eq!((refused.reason.as_str(), refused.retry), ("token_expired", false));
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_live_key_of_an_instance_is_refused_and_told() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let first = Agent::enrolled(&app, "shop/web", "c1").await;
    let (connection, _) = first.session(app.agents).await;
    let (token, key) = (token(&app, "shop/web", 3), KeyPair::generate().unwrap());
    let request = request(&token, "shop/web", "c1", &key);
    assert_eq!(enrol(app.agents, token.pin, &request).await.unwrap_err().reason, "second_instance");
    // Its disk is lost: the old session is gone, the same request works, and then the old key does not any more.
    drop(connection);
    until("the old session ends", || app.core.fleet.live(&first.id).is_none()).await;
    let issued = enrol(app.agents, token.pin, &request).await.unwrap();
    let second = Agent::with("shop/web", "c1", issued, &key, first.epoch);
    let (_live, _) = second.session(app.agents).await;
    let mut old = first.quic(app.agents).await;
    old.send(&Frame::Hello(first.hello())).await;
    assert_eq!(old.refusal().await, "second_instance");
    wait_for(&app, "ingest.refused", "second_instance").await;
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_key_that_was_refused_takes_nothing_from_the_one_that_is_live() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let first = Agent::enrolled(&app, "shop/web", "c1").await;
    // Both have tokens, and neither is connected yet.
    let second = Agent::enrolled(&app, "shop/web", "c1").await;
    let (connection, _) = first.session(app.agents).await;
    let mut other = second.quic(app.agents).await;
    other.send(&Frame::Hello(second.hello())).await;
    assert_eq!(other.refusal().await, "second_instance");
    drop(connection);
    until("the session ends", || app.core.fleet.live(&first.id).is_none()).await;
    let (_again, _) = first.session(app.agents).await;
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compromise_that_cannot_be_announced_changes_nothing_and_can_be_ordered_again() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let web = Agent::enrolled(&app, "shop/web", "c1").await;
    let issuer = &app.core.issuer;
    let order = async || {
        let order = orders::Order::Rotate { step: Step::Compromise, force: true };
        let id = issuer.register().order(&order, Timestamp::now()).unwrap();
        until("a reply", || issuer.register().reply(id).unwrap().is_some()).await;
        issuer.register().reply(id).unwrap().unwrap()
    };
    let (entries, own) = (issuer.authority().entries(), issuer.authority().own().borrow().peer().serial.clone());
    // No directive can be written.
    let blocked = dir.path().join("data/directive.part");
    std::fs::create_dir(&blocked).unwrap();
    assert!(matches!(order().await, orders::Reply::Refused { .. }));
    assert_eq!(issuer.authority().entries(), entries);
    assert_eq!(issuer.authority().own().borrow().peer().serial, own);
    drop(web.session(app.agents).await);
    std::fs::remove_dir(&blocked).unwrap();
    assert!(matches!(order().await, orders::Reply::Rotated { .. }));
    assert_eq!(app.core.directives.now().directive.bundle.len(), 2);
    // It knows the new root by a directive alone, which the old one vouches for.
    app.core.directives.now().signed.open(&web.trust, Timestamp::now()).unwrap();
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_to_be_noted_or_told_is_not_lost_when_the_register_fails_for_a_while() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let web = Agent::enrolled(&app, "shop/web", "c1").await;
    let (mut connection, _) = web.session(app.agents).await;
    let (issuer, db) = (&app.core.issuer, rusqlite::Connection::open(dir.path().join("data/ca.db")).unwrap());
    db.busy_timeout(agent::LIMIT).unwrap();
    db.execute_batch("ALTER TABLE confirmed RENAME TO away").unwrap();
    connection.send(&Frame::DirectiveApplied(1)).await;
    until("it is here", || app.core.fleet.confirmed().iter().any(|(_, version)| *version == 1)).await;
    // Time for a round that fails.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    db.execute_batch("ALTER TABLE away RENAME TO confirmed").unwrap();
    let holder = || issuer.register().holders(Duration::ZERO, Timestamp::now()).unwrap().remove(0);
    until("it is noted", || holder().confirmed == 1).await;

    db.execute_batch("ALTER TABLE token RENAME TO away").unwrap();
    let csr = Der(agent::csr(&KeyPair::generate().unwrap()));
    issuer.register().order(&orders::Order::SignMember { csr }, Timestamp::now()).unwrap();
    wait_for(&app, "ca.issued", "sidewarden/collector").await;
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_cannot_pass_for_another_instance() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let web = Agent::enrolled(&app, "shop/web", "c1").await;
    let mut connection = web.quic(app.agents).await;
    let mut hello = web.hello();
    hello.instance = "c2".parse().unwrap();
    connection.send(&Frame::Hello(hello)).await;
    assert_eq!(connection.refusal().await, "wrong_instance");
    wait_for(&app, "ingest.refused", "wrong_instance").await;
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_renewed_over_the_session_and_the_new_key_takes_over() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let web = Agent::enrolled(&app, "shop/web", "c1").await;
    let (mut connection, _) = web.session(app.agents).await;
    let key = KeyPair::generate().unwrap();
    connection.send(&Frame::Renew(agent::csr(&key))).await;
    let Some(Frame::Renewed(json)) = connection.next().await else { panic!("no answer") };
    let Answer::Issued(issued) = serde_json::from_slice(&json).unwrap() else { panic!("refused") };
    let renewed = Agent::with("shop/web", "c1", issued, &key, web.epoch);
    let (_new, _) = renewed.session(app.agents).await;
    assert_eq!(connection.refusal().await, "second_instance", "the old session gives way");
    app.core.commits.flush().await.unwrap();
    let session = app.core.commits.state().agents[&web.id].session.clone();
    assert!(matches!(session, Session::Live { .. }), "{session:?}");
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate_is_renewed_within_the_grace_by_its_own_key_only() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let (token, key) = (token(&app, "shop/web", 1), KeyPair::generate().unwrap());
    let issued = enrol(app.agents, token.pin, &request(&token, "shop/web", "c1", &key)).await.unwrap();
    let other = KeyPair::generate().unwrap();
    let ask = |key: &KeyPair, previous: Vec<Der>| sidewarden_proto::enrol::Request {
        token_id: String::new(),
        previous,
        ..request(&token, "shop/web", "c1", key)
    };
    let (issuer, directive) = (&app.core.issuer, app.core.directives.now().directive.clone());
    let enrol_at = |request: &_, days: i64| {
        let now = Timestamp::now()
            .plus(Duration::from_secs(30 * 86400))
            .minus(Duration::from_secs((30 - days) as u64 * 86400));
        issuer.enrol(request, &directive, &|_| None, now).map(|grant| grant.event.by).map_err(|r| r.reason)
    };
    let chain = issued.chain.clone();
    let mut foreign = issued.chain.clone();
    foreign[0] = foreign[1].clone();
    assert_eq!(enrol_at(&ask(&key, chain.clone()), 3), Ok("grace".into()));
    assert_eq!(enrol_at(&ask(&key, chain.clone()), 9), Err("grace_over".into()));
    // Made while the clock was a day ahead, or longer; what it is of was made then, too.
    assert_eq!(enrol_at(&ask(&key, chain.clone()), -2), Ok("grace".into()));
    assert_eq!(enrol_at(&ask(&other, chain.clone()), -2), Err("bad_request".into()));
    assert_eq!(enrol_at(&ask(&other, chain.clone()), 3), Err("bad_request".into()));
    assert_eq!(enrol_at(&ask(&key, foreign), 3), Err("bad_request".into()));
    let mut elsewhere = ask(&key, chain);
    elsewhere.instance = "c2".parse().unwrap();
    assert_eq!(enrol_at(&elsewhere, 3), Err("bad_request".into()));
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_denied_is_told_and_thrown_out_at_once() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let web = Agent::enrolled(&app, "shop/web", "c1").await;
    let (mut connection, _) = web.session(app.agents).await;
    let what = Target::Key { spki: web.credential.peer().spki };
    let asked = Asked { what, why: "stolen".into(), confirmed: false };
    let core = &app.core;
    fleet::revoke(&core.issuer, &core.directives, &core.fleet, asked, Timestamp::now()).unwrap();
    assert_eq!(connection.refusal().await, "revoked");
    let mut again = web.quic(app.agents).await;
    again.send(&Frame::Hello(web.hello())).await;
    assert_eq!(again.refusal().await, "revoked");
    wait_for(&app, "ingest.refused", "revoked").await;
    let told = app.core.index.query_now(&all("ingest.refused")).unwrap().events;
    assert!(
        told.iter().all(|event| event.severity == Severity::Warning),
        "nobody is woken for what was done on purpose"
    );
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_history_is_refused_and_told() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let mut web = Agent::enrolled(&app, "shop/web", "c1").await;
    let (mut connection, _) = web.session(app.agents).await;
    let first = web.some_events(2);
    connection.deliver(first).await;
    let Link::Batch(mut batch) = web.some_events(2) else { unreachable!() };
    batch.header.prev = Sha256([9; 32]);
    connection.send(&Frame::Link(Link::Batch(batch))).await;
    assert_eq!(connection.refusal().await, "chain_broken");
    wait_for(&app, "ingest.refused", "chain_broken").await;
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_inside_a_session_ends_it_and_is_told() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let rows: [(&str, Vec<u8>, &str); 4] = [
        ("oversized", u32::MAX.to_be_bytes().to_vec(), "malformed"),
        ("no type", vec![0, 0, 0, 0], "malformed"),
        ("a link that is none", [&[0, 0, 0, 9, 3][..], &[7; 8]].concat(), "malformed"),
        ("a collector's frame", Frame::Ack(Cursor::START).encode(), "malformed"),
    ];
    for (i, (what, bytes, wanted)) in rows.into_iter().enumerate() {
        let web = Agent::enrolled(&app, "shop/web", &format!("g{i}")).await;
        let (mut connection, _) = web.session(app.agents).await;
        connection.send_bytes(&bytes).await;
        assert_eq!(connection.refusal().await, wanted, "{what}");
    }
    wait_for(&app, "ingest.refused", "malformed").await;
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_lies_about_itself_is_refused_and_not_stored() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let mut web = Agent::enrolled(&app, "shop/web", "c1").await;
    let (mut connection, _) = web.session(app.agents).await;
    let Link::Batch(mut batch) = web.some_events(3) else { unreachable!() };
    batch.body[10] ^= 0xff;
    connection.send(&Frame::Link(Link::Batch(batch))).await;
    assert_eq!(connection.refusal().await, "malformed");
    let (_again, cursor) = web.session(app.agents).await;
    assert_eq!(cursor, Cursor::START);
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_never_ends_costs_the_session_only() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let web = Agent::enrolled(&app, "shop/web", "c1").await;
    let mut connection = web.quic(app.agents).await;
    let mut hello = web.hello();
    hello.heartbeat_secs = 1;
    connection.send(&Frame::Hello(hello)).await;
    // A byte at a time of a link that would be 4 MiB: bytes are no sign of life, frames are.
    let drip = async {
        connection.send_bytes(&[0, 64, 0, 0, 3]).await;
        while app.core.fleet.live(&web.id).is_some() {
            connection.send_bytes(&[1]).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(agent::LIMIT, drip).await.unwrap();
    wait_for(&app, "agent.disconnected", "silent").await;
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_at_the_door_are_refused_with_a_reason() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let mut plain = TcpStream::connect(app.agents).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    let _ = plain.read_to_end(&mut rest).await;
    wait_for(&app, "ingest.refused", "plaintext").await;

    // One that never finishes its handshake.
    let mut slow = TcpStream::connect(app.agents).await.unwrap();
    slow.write_all(&[22, 3, 1]).await.unwrap();
    wait_for(&app, "ingest.refused", "handshake_timeout").await;

    // A certificate of a foreign CA of the same name, over both ways in.
    let elsewhere = tempdir().unwrap();
    let other = start(elsewhere.path()).await;
    let mut stranger = Agent::enrolled(&other, "shop/web", "c1").await;
    stranger.trust = app.core.issuer.authority().trust();
    let mut tcp = stranger.tcp(app.agents).await;
    tcp.send(&Frame::Hello(stranger.hello())).await;
    assert_eq!(tcp.refusal().await, "closed");
    wait_for(&app, "ingest.refused", "unknown_ca").await;
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(stranger.client_config()).unwrap();
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let connecting = endpoint.connect_with(config, app.agents, "collector").unwrap();
    if let Ok(connection) = connecting.await {
        connection.closed().await;
    }

    // Nobody at all.
    let pin = app.core.issuer.authority().pin();
    let config = sidewarden_proto::tls::pinned_client_config(pin, &[sidewarden_proto::wire::ALPN]).unwrap();
    let tcp = TcpStream::connect(app.agents).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from("collector").unwrap();
    if let Ok(mut stream) = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await {
        let _ = stream.read_to_end(&mut rest).await;
    }
    wait_for(&app, "ingest.refused", "no_certificate").await;
    assert!(app.core.commits.state().totals.ingest_refused["unknown_ca"] >= 1);
    other.stop().await;
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_ends_when_its_certificate_does() {
    let dir = tempdir().unwrap();
    let mut settings = agent::settings(dir.path());
    settings.certificate_life = Duration::from_secs(3);
    let app = sidewarden_collector::app::start(settings, Timestamp::now).await.unwrap();
    let web = Agent::enrolled(&app, "shop/web", "c1").await;
    let (mut connection, _) = web.session(app.agents).await;
    assert_eq!(connection.refusal().await, "expired");
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_door_has_room_for_so_many_and_says_when_it_is_full() {
    let dir = tempdir().unwrap();
    let mut settings = agent::settings(dir.path());
    settings.agents.max_handshakes = 2;
    settings.agents.handshake_timeout = Duration::from_secs(60);
    let app = sidewarden_collector::app::start(settings, Timestamp::now).await.unwrap();
    let _slow = [TcpStream::connect(app.agents).await.unwrap(), TcpStream::connect(app.agents).await.unwrap()];
    let mut third = TcpStream::connect(app.agents).await.unwrap();
    let mut rest = Vec::new();
    assert!(matches!(third.read_to_end(&mut rest).await, Ok(0) | Err(_)), "it is closed at once");
    wait_for(&app, "ingest.refused", "limit_reached").await;
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_thrown_at_the_quic_port_hurt_nobody() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let web = Agent::enrolled(&app, "shop/web", "c1").await;
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut junk = vec![0; 1200];
    for _ in 0..500 {
        sidewarden_collector::random(&mut junk);
        junk[0] |= 0xc0;
        let _ = socket.send_to(&junk, app.agents).await;
    }
    let (_connection, cursor) = web.session(app.agents).await;
    assert_eq!(cursor, Cursor::START);
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_refuses_sends_agents_away_and_takes_them_back() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let mut web = Agent::enrolled(&app, "shop/web", "c1").await;
    let (mut connection, _) = web.session(app.agents).await;
    app.core.commits.flush().await.unwrap();
    // Another process holds the file for writing, longer than we wait for it.
    let blocker = rusqlite::Connection::open(dir.path().join("data/log.db")).unwrap();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    let link = web.some_events(3);
    connection.send(&Frame::Link(link.clone())).await;
    assert_eq!(connection.refusal().await, "overloaded");
    blocker.execute_batch("ROLLBACK").unwrap();
    let (mut connection, cursor) = web.session(app.agents).await;
    assert_eq!(cursor, Cursor::START);
    connection.deliver(link).await;
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_requests_for_a_certificate_are_answered() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let (token, key) = (token(&app, "shop/web", 9), KeyPair::generate().unwrap());
    let good = request(&token, "shop/web", "c1", &key);
    let mut tampered = good.clone();
    let last = tampered.csr.0.len() - 1;
    tampered.csr.0[last] ^= 1;
    let rows = [
        sidewarden_proto::enrol::Request { csr: Der(vec![]), ..good.clone() },
        sidewarden_proto::enrol::Request { csr: Der(vec![0x30; 9000]), ..good.clone() },
        tampered,
    ];
    for request in rows {
        assert_eq!(enrol(app.agents, token.pin, &request).await.unwrap_err().reason, "bad_request");
    }
    assert_eq!(domain(), *app.core.issuer.authority().domain());
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_collectors_do_not_share_a_directory() {
    let dir = tempdir().unwrap();
    let app = start(dir.path()).await;
    let second = sidewarden_collector::app::start(agent::settings(dir.path()), Timestamp::now).await;
    assert!(second.unwrap_err().to_string().contains("another collector runs"));
    app.stop().await;
}
