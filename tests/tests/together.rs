//! Agent and collector together, in process: what one does the other knows, and what breaks is told and made good.

mod world;

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use sidewarden_collector::index::Query;
use sidewarden_proto::event::{Body, RefusalReason};
use sidewarden_proto::identity::Sha256;
use sidewarden_proto::secret::Secret;
use sidewarden_proto::time::Timestamp;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use world::{World, all, echo, eventually, hook, http, inbound, outbound, says};

const HOUR: Duration = Duration::from_secs(3_600);

/// web → orders, both enrolled.
async fn shop(world: &World) -> (world::Agent, world::Agent) {
    let orders = world.agent("orders-1", "shop/orders", &inbound(echo().await, "shop/web")).await;
    let web = world.agent("web-1", "shop/web", &outbound(orders.inbound(), "shop/orders")).await;
    orders.enrolled().await;
    web.enrolled().await;
    (web, orders)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workloads_meet_and_the_collector_knows_who_they_are() {
    let world = World::start().await;
    let (web, orders) = shop(&world).await;
    assert_eq!(says(&mut web.dial().await, b"hello").await.unwrap(), b"hello");
    for (workload, peer) in [("shop/orders", "shop/web"), ("shop/web", "shop/orders")] {
        let seen = world.event("peer.first_seen", |record| record.agent.workload.path() == workload).await;
        assert!(seen.summary.contains(peer), "{}", seen.summary);
    }
    assert!(orders.admin("/readyz").await.starts_with("HTTP/1.1 200 "), "{}", orders.admin("/readyz").await);
    let metrics = orders.admin("/metrics").await;
    for wanted in [
        "peer_certificate_not_after_seconds{peer=\"spiffe://sidewarden.internal/shop/web\"}",
        "ca_certificate_not_after_seconds{what=\"issuer\"}",
        "ca_certificate_not_after_seconds{what=\"root\"}",
    ] {
        assert!(metrics.contains(wanted), "{wanted} is not in:\n{metrics}");
    }
    let told = world.event("ca.certificates", |_| true).await;
    for what in ["collector", "issuing", "root"] {
        assert!(told.body.get().contains(&format!("\"what\":\"{what}\"")), "{}", told.body.get());
    }
    let clock = world.event("agent.connected", |record| record.summary.contains("shop/web")).await;
    assert!(clock.body.get().contains("clock_ahead_us"), "{}", clock.body.get());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_used_token_is_gone_and_the_key_is_nobody_elses() {
    let world = World::start().await;
    let (_, orders) = shop(&world).await;
    let gone = async || (!world.dir.path().join("orders-1.token").exists()).then_some(());
    eventually(|| "the token stays".into(), gone).await;
    let mut files = vec![orders.home.clone()];
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert!(!text.contains("PRIVATE KEY") || mode == 0o600, "{} has mode {mode:o}", path.display());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_connection_becomes_an_alert_at_a_webhook() {
    let (hook, bodies) = hook().await;
    let world = World::start_with(&format!("[[alerts.webhooks]]\nurl = 'http://{hook}/'")).await;
    let (_web, orders) = shop(&world).await;
    http(orders.inbound(), "GET /orders HTTP/1.1\r\n\r\n").await;
    world.event("connection.refused", |record| record.summary.contains("plaintext")).await;
    let has_it = async || bodies.lock().unwrap().iter().find(|body| body.contains("PlaintextRefused")).cloned();
    let alert = eventually(|| format!("no alert among {:#?}", bodies.lock().unwrap()), has_it).await;
    assert!(alert.contains("shop/orders") && alert.contains("127.0.0.1"), "{alert}");
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_that_is_let_in_for_a_while_is_loud_until_it_is_over() {
    let (hook, bodies) = hook().await;
    let world = World::start_with(&format!("[[alerts.webhooks]]\nurl = 'http://{hook}/'")).await;
    let until = Timestamp::now().plus(Duration::from_secs(10));
    let permissive = format!("permissive = {{ reason = 'the batch host has no agent', until = '{until}' }}\n");
    let rules = inbound(echo().await, "shop/web") + &permissive;
    let orders = world.agent("orders-1", "shop/orders", &rules).await;
    let mut old = TcpStream::connect(orders.inbound()).await.unwrap();
    assert_eq!(says(&mut old, b"hello").await.unwrap(), b"hello", "also before it has an identity");
    orders.enrolled().await;
    let alert = async |name: &str, status: &str| {
        let (name, status) = (format!("\"{name}\""), format!("\"{status}\""));
        let is_it = |body: &&String| body.contains(&name) && body.contains(&status);
        let has_it = async || bodies.lock().unwrap().iter().find(is_it).cloned();
        eventually(|| format!("no {name} {status} among {:#?}", bodies.lock().unwrap()), has_it).await
    };
    let firing = alert("PlaintextAllowed", "firing").await;
    assert!(firing.contains("the batch host has no agent"), "{firing}");
    let let_in = alert("PlaintextLetIn", "firing").await;
    assert!(let_in.contains("127.0.0.0/24") && let_in.contains("began with `hello`"), "{let_in}");
    let metrics = orders.admin("/metrics").await;
    assert!(metrics.contains("sidewarden_agent_permissive_listeners 1"), "{metrics}");
    assert!(metrics.contains("sidewarden_agent_connections_plaintext_total 1"), "{metrics}");
    let end = tokio::time::timeout(HOUR, old.read(&mut [0; 1])).await.expect("an end");
    assert!(end.is_err(), "cut when it is over, not ended");
    alert("PlaintextAllowed", "resolved").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_that_asks_for_the_metadata_service_raises_a_critical_alert() {
    let (hook, bodies) = hook().await;
    let world = World::start_with(&format!("[[alerts.webhooks]]\nurl = 'http://{hook}/'")).await;
    let rules = "[egress]\nlisten = '127.0.0.1:0'\nallow = ['api.example.com:443', '0.0.0.0/0:80']\n";
    let web = world.agent("web-1", "shop/web", rules).await;
    web.enrolled().await;
    let asked = "GET http://169.254.169.254/latest/meta-data/iam HTTP/1.1\r\nHost: x\r\n\r\n";
    let answer = http(web.app.addresses.egress[0], asked).await;
    assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("a cloud's metadata address"), "{answer}");
    let told = world.event("connection.refused", |record| record.summary.contains("169.254.169.254:80")).await;
    assert!(told.summary.starts_with("no egress to 169.254.169.254:80: egress private address"), "{}", told.summary);
    let has_it = async || bodies.lock().unwrap().iter().find(|body| body.contains("EgressToPrivateAddress")).cloned();
    let alert = eventually(|| format!("no alert among {:#?}", bodies.lock().unwrap()), has_it).await;
    assert!(
        alert.contains("shop/web") && alert.contains("critical") && alert.contains("169.254.169.254:80"),
        "{alert}"
    );
    assert!(!alert.contains("iam"), "what was asked for there is nobody's business: {alert}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_while_the_collector_is_away_arrives_once_and_in_order() {
    let mut world = World::start().await;
    let (web, orders) = shop(&world).await;
    world.event("agent.started", |record| record.agent.workload.path() == "shop/orders").await;
    world.stop_collector().await;
    for attack in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\x80\x2e\x01\x00\x02", b"\x16\x03\x01\xff\xff"] {
        http(orders.inbound(), &String::from_utf8_lossy(attack)).await;
    }
    assert_eq!(says(&mut web.dial().await, b"still").await.unwrap(), b"still", "watching is never an outage");
    world.start_collector_again().await;
    let plaintext = RefusalReason::Plaintext;
    world
        .event("connection.refused", |record| match Body::from_raw(&record.kind, &record.body) {
            Ok(Some(Body::ConnectionRefused(refused))) => refused.reason == plaintext,
            _ => false,
        })
        .await;
    let id = "spiffe://sidewarden.internal/shop/orders".parse().unwrap();
    let seqs: Vec<u64> = world.query(Query { workload: Some(id), ..all() }).await.iter().map(|r| r.seq).collect();
    assert_eq!(seqs, (1..=seqs.len() as u64).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_starts_again_needs_neither_token_nor_collector() {
    let mut world = World::start().await;
    let (web, orders) = shop(&world).await;
    let to = web.app.addresses.outbound[0];
    let rules = outbound(orders.inbound(), "shop/orders");
    web.app.stop("test").await;
    world.stop_collector().await;
    let web = world.agent_without_token("web-1", &rules).await;
    assert_ne!(web.app.addresses.outbound[0], to, "another listener, the same identity");
    assert_eq!(says(&mut web.dial().await, b"hello").await.unwrap(), b"hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_does_not_count_is_refused_and_both_sides_say_why() {
    let world = World::start().await;
    let used_up = world.token("shop/orders", 1, HOUR);
    world.hand_token("first", &used_up);
    world.agent_without_token("first", "").await.enrolled().await;
    let unknown = Secret::new(with_other_secret(world.token("shop/orders", 1, HOUR).reveal()));
    let expired = world.token("shop/orders", 1, Duration::ZERO);
    let elsewhere = world.token("shop/other", 1, HOUR);
    let cases = [
        ("used", used_up, "", "token_used_up"),
        ("unknown", unknown, "", "token_unknown"),
        ("expired", expired, "", "token_expired"),
        (
            "elsewhere",
            elsewhere,
            "collector.workload = 'spiffe://sidewarden.internal/shop/orders'\n",
            "token_other_workload",
        ),
    ];
    for (name, token, rules, why) in cases {
        world.hand_token(name, &token);
        let agent = world.agent_without_token(name, rules).await;
        let told = world.event("enrolment.refused", |record| record.summary.contains(why)).await;
        assert!(!told.summary.contains(token.reveal()) && !told.body.get().contains(secret_of(&token)));
        assert!(agent.app.identity.borrow().is_none(), "{name}");
        let says_so = async || agent.admin("/readyz").await.contains("the collector refused").then_some(());
        eventually(|| format!("{name}: its agent does not say why it is not ready"), says_so).await;
    }
}

fn secret_of(token: &Secret) -> &str {
    token.reveal().split('.').nth(2).expect("a token has four parts")
}

fn with_other_secret(token: &str) -> String {
    let mut parts: Vec<&str> = token.split('.').collect();
    parts[2] = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
    parts.join(".")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_with_another_ca_gets_no_token() {
    let world = World::start().await;
    let good = world.token("shop/orders", 1, HOUR);
    let pin = Sha256([7; 32]).to_string();
    let foreign = Secret::new(format!("{}.{pin}", good.reveal().rsplit_once('.').unwrap().0));
    world.hand_token("pinned", &foreign);
    let agent = world.agent_without_token("pinned", "").await;
    let heard = std::sync::Mutex::new(String::new());
    let refused = async || {
        *heard.lock().unwrap() = agent.admin("/readyz").await;
        heard.lock().unwrap().contains("pinned").then_some(())
    };
    eventually(
        || format!("the agent does not say that the CA is not the pinned one: {}", heard.lock().unwrap()),
        refused,
    )
    .await;
    assert!(agent.app.identity.borrow().is_none());
    // The token was not spent on the wrong collector: with the right pin it still works.
    world.hand_token("pinned", &good);
    agent.enrolled().await;
}

/// A root of somebody else, PEM and DER.
fn partner_root() -> rcgen::Certificate {
    let mut root = rcgen::CertificateParams::default();
    root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    root.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    root.distinguished_name.push(rcgen::DnType::CommonName, "Partner root");
    root.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_root_reaches_every_agent_and_the_matrix_tells_who_has_it() {
    use sidewarden_collector::trust::Store;
    use sidewarden_collector::trust::matrix::{Cell, Door, Told, matrix};
    use sidewarden_collector::trust::store::{Imported, Serves};
    use sidewarden_proto::enrol::Der;

    let world = World::start().await;
    let (_web, _orders) = shop(&world).await;
    let domain = || "partner.example".parse().unwrap();
    let root = partner_root();
    let (der, serves) = (Der(root.der().to_vec()), Serves::Domain(domain()));
    let store = Store::new(&world.dir.path().join("collector"));
    store.add(vec![Imported { serves, der, at_us: Timestamp::now(), note: String::new() }]).unwrap();
    let held = async |wanted: bool| {
        let told = || -> Vec<Told> {
            let state = world.collector().core.commits.state();
            let known = state.agents.iter().filter(|(id, _)| id.workload.path().starts_with("shop/"));
            known
                .map(|(id, agent)| Told {
                    agent: id.clone(),
                    holds: agent.trust.clone(),
                    certificate_ends: None,
                    elsewhere: false,
                })
                .collect()
        };
        let what = || format!("{:?}", told());
        eventually(what, async || {
            let door = Door { name: "the collector".into(), admitted: &[domain()], first_to_end: None };
            let mut found = matrix(&told(), &world.collector().core.directives.now().directive, &door);
            found.rows.remove(0);
            let has = found.columns.iter().any(|column| column == "partner.example");
            (found.rows.len() == 2 && found.is_whole() && has == wanted).then_some(found)
        })
        .await
    };
    let found = held(true).await;
    assert!(found.rows.iter().all(|row| row.cells == [Cell::Trusts, Cell::Trusts]), "{found:?}");
    let changed = world.event("trust.store_changed", |_| true).await;
    assert!(changed.summary.contains("1 added"), "{}", changed.summary);

    store.remove(&Sha256::of(&[root.der()]).to_string()).unwrap();
    held(false).await;
}
