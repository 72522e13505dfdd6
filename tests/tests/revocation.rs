//! Whoever is revoked is out within a second, everywhere, and stays out whatever is restarted, until that is undone.

#[allow(dead_code)]
mod world;

use std::time::{Duration, Instant};

use sidewarden_collector::fleet::{self, Asked, Done};
use sidewarden_proto::directive::Target;
use sidewarden_proto::event::{Body, RefusalReason};
use sidewarden_proto::identity::{AgentId, Sha256};
use sidewarden_proto::time::Timestamp;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use world::{Agent, World, echo, eventually, inbound, outbound, says};

fn revoke(world: &World, what: Target, confirmed: bool) -> Done {
    let core = &world.collector().core;
    let asked = Asked { what, why: "taken over".into(), confirmed };
    fleet::revoke(&core.issuer, &core.directives, &core.fleet, asked, Timestamp::now()).unwrap()
}

fn undo(world: &World, id: &str) -> u64 {
    let core = &world.collector().core;
    fleet::undo(&core.issuer, &core.directives, id, Timestamp::now()).unwrap().version
}

fn instance(agent: &Agent, name: &str) -> Target {
    let workload = agent.app.identity.borrow().as_ref().unwrap().workload.clone();
    Target::Instance { workload, instance: name.parse().unwrap() }
}

fn key(agent: &Agent) -> Sha256 {
    agent.app.identity.borrow().as_ref().unwrap().credential.peer().spki
}

fn serial(agent: &Agent) -> String {
    agent.app.identity.borrow().as_ref().unwrap().credential.peer().serial.clone()
}

/// web-1 and web-2 → orders, all enrolled.
async fn shop(world: &World) -> (Agent, Agent, Agent) {
    let orders = world.agent("orders-1", "shop/orders", &inbound(echo().await, "shop/web")).await;
    let route = outbound(orders.inbound(), "shop/orders");
    let one = world.agent("web-1", "shop/web", &route).await;
    let other = world.agent("web-2", "shop/web", &route).await;
    for agent in [&orders, &one, &other] {
        agent.enrolled().await;
    }
    (orders, one, other)
}

/// Whether a new connection through `agent` gets an answer.
async fn gets_through(agent: &Agent) -> bool {
    // The agent may have reset the connection before it is even here: that is a no.
    let Ok(mut socket) = TcpStream::connect(agent.app.addresses.outbound[0]).await else { return false };
    says(&mut socket, b"hello").await.is_ok_and(|answer| answer == b"hello")
}

async fn runs(agent: &Agent, version: u64) {
    let mut identity = agent.app.identity.clone();
    let newest = identity.wait_for(|identity| identity.as_ref().is_some_and(|i| i.directive_version() >= version));
    tokio::time::timeout(Duration::from_secs(60), newest).await.expect("the directive in time").unwrap();
}

/// A connection that was cut, and not merely ended.
async fn is_cut(mut live: TcpStream) {
    let end = tokio::time::timeout(Duration::from_secs(60), live.read(&mut [0; 1])).await.expect("an end in time");
    assert!(matches!(end, Err(_) | Ok(0)), "{end:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_kind_of_revocation_cuts_its_own_and_nobody_else_until_it_is_undone() {
    let world = World::start().await;
    let (orders, one, other) = shop(&world).await;
    let rows: [fn(&Agent) -> Target; 3] = [
        |agent| instance(agent, "web-1"),
        |agent| Target::Key { spki: key(agent) },
        |agent| Target::Serial { serial: serial(agent) },
    ];
    for target in rows {
        let (mut live, mut bystander) = (one.dial().await, other.dial().await);
        assert_eq!(says(&mut live, b"hello").await.unwrap(), b"hello");
        assert_eq!(says(&mut bystander, b"hello").await.unwrap(), b"hello");
        // A connection that rests between the agents is judged as well.
        assert!(gets_through(&one).await);
        let what = target(&one);
        let done = revoke(&world, what.clone(), false);
        is_cut(live).await;
        runs(&orders, done.version).await;
        assert!(!gets_through(&one).await, "{what}");
        assert_eq!(says(&mut bystander, b"still").await.unwrap(), b"still", "{what}");
        let told = world.event("connection.refused", |record| record.summary.contains("revoked")).await;
        assert!(told.body.get().contains("taken over"), "{}", told.body.get());
        runs(&orders, undo(&world, &done.revocation.id)).await;
        assert!(gets_through(&one).await, "{what} undone");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_workload_and_whatever_a_revoked_ca_has_signed_is_cut_off() {
    let world = World::start().await;
    let (orders, one, other) = shop(&world).await;
    let issuing = one.app.identity.borrow().as_ref().unwrap().credential.peer().clone();
    assert!(issuing.issuers.is_empty(), "a leaf alone names none: {issuing:?}");
    let chain = one.app.identity.borrow().as_ref().unwrap().credential.chain().to_vec();
    let workload = one.app.identity.borrow().as_ref().unwrap().workload.clone();
    let done = revoke(&world, Target::Workload { id: workload }, true);
    runs(&orders, done.version).await;
    assert!(!gets_through(&one).await && !gets_through(&other).await);
    runs(&orders, undo(&world, &done.revocation.id)).await;
    assert!(gets_through(&one).await && gets_through(&other).await);
    let spki = sidewarden_proto::tls::spki_of(&chain[1]).unwrap();
    let mut live = one.dial().await;
    assert_eq!(says(&mut live, b"hello").await.unwrap(), b"hello");
    let version = revoke(&world, Target::IssuingKey { spki }, true).version;
    runs(&orders, version).await;
    is_cut(live).await;
    assert!(!gets_through(&one).await && !gets_through(&other).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_outlives_every_restart_and_no_certificate_is_given_to_the_revoked() {
    let mut world = World::start().await;
    let (orders, one, other) = shop(&world).await;
    let done = revoke(&world, instance(&one, "web-1"), false);
    runs(&orders, done.version).await;
    world.event("ingest.refused", |record| record.summary.contains("its instance is on the deny list")).await;
    // Neither by a new token: the name is revoked, not only its key.
    one.app.stop("test").await;
    std::fs::remove_dir_all(&one.home).unwrap();
    let route = outbound(orders.inbound(), "shop/orders");
    let again = world.agent("web-1", "shop/web", &route).await;
    world.event("enrolment.refused", |record| record.summary.contains("revoked")).await;
    assert!(again.app.identity.borrow().is_none());
    // Nor by a restart of either side: the keys are known to peers, on disk.
    world.stop_collector().await;
    let rules = inbound(echo().await, "shop/web");
    orders.app.stop("test").await;
    let orders = world.agent_without_token("orders-1", &rules).await;
    let directive = orders.app.identity.borrow().as_ref().unwrap().directive.clone().unwrap();
    assert_eq!((directive.version, directive.revoked.len()), (done.version, 1));
    world.start_collector_again().await;
    let in_force = world.collector().core.directives.now();
    assert_eq!(in_force.directive.revoked[0].id, done.revocation.id);
    drop(other);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_asked_for_while_its_instance_is_revoked_is_not_handed_out() {
    let world = World::start().await;
    let core = &world.collector().core;
    let pattern: &str = "shop/web";
    for round in 0..20 {
        let name = format!("web-{round}");
        let agent: AgentId = format!("spiffe://sidewarden.internal/{pattern}#{name}").parse().unwrap();
        let token = world.token(pattern, 1, Duration::from_secs(600));
        world.hand_token(&name, &token);
        // Both at once: whichever comes first, the instance must not get through in the end.
        let asked = Asked {
            what: Target::Instance { workload: agent.workload.clone(), instance: agent.instance.clone() },
            why: "race".into(),
            confirmed: false,
        };
        let (starting, core) = (world.agent_without_token(&name, ""), core.clone());
        let revoking = tokio::task::spawn_blocking(move || {
            fleet::revoke(&core.issuer, &core.directives, &core.fleet, asked, Timestamp::now()).unwrap()
        });
        let (started, done) = tokio::join!(starting, revoking);
        done.unwrap();
        let core = &world.collector().core;
        let keys = core.issuer.keys_of(&agent, Timestamp::now()).unwrap();
        let has_key = started.app.identity.borrow().as_ref().map(|identity| identity.credential.peer().spki);
        if let Some(spki) = has_key {
            assert!(keys.contains(&spki));
            let is_denied = core.directives.now().directive.revoked.iter().any(|r| r.keys.contains(&spki));
            assert!(is_denied, "{name} has a key that nobody denies");
        }
        started.app.stop("test").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_says_who_revoked_what_in_its_own_event_kind() {
    let world = World::start().await;
    let (orders, one, _other) = shop(&world).await;
    let version = revoke(&world, Target::Key { spki: key(&one) }, false).version;
    runs(&orders, version).await;
    assert!(!gets_through(&one).await);
    let is_revoked = |record: &sidewarden_collector::index::Record| {
        matches!(Body::from_raw(&record.kind, &record.body),
            Ok(Some(Body::ConnectionRefused(refused))) if refused.reason == RefusalReason::Revoked)
    };
    world.event("connection.refused", is_revoked).await;
}

/// How many agents the measurement has, and how often it revokes.
const FLEET: usize = 100;
const ROUNDS: usize = 10;

/// `cargo test --release -p sidewarden-tests --test revocation -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "not a test: a measurement of how long a revocation takes over a hundred agents"]
async fn measure_from_revoked_to_refused() {
    let world = World::start().await;
    let mut servers = Vec::new();
    let mut routes = String::new();
    for number in 0..FLEET {
        let rules = inbound(echo().await, "shop/web");
        let server = world.agent(&format!("orders-{number}"), "shop/orders", &rules).await;
        routes += &outbound(server.inbound(), "shop/orders");
        servers.push(server);
    }
    let web = world.agent("web-1", "shop/web", &routes).await;
    for server in servers.iter().chain([&web]) {
        server.enrolled().await;
    }
    let all_connected = async || (world.collector().core.fleet.counts().0 > FLEET).then_some(());
    eventually(|| "not all agents are connected".into(), all_connected).await;
    let (mut cut, mut applied) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut live = Vec::new();
        for address in &web.app.addresses.outbound {
            let mut socket = TcpStream::connect(address).await.unwrap();
            says(&mut socket, b"hello").await.unwrap();
            live.push(socket);
        }
        let what = Target::Key { spki: key(&web) };
        let begun = Instant::now();
        let ends: Vec<_> = live
            .into_iter()
            .map(|socket| {
                tokio::spawn(async move {
                    is_cut(socket).await;
                    begun.elapsed()
                })
            })
            .collect();
        let revoking = world.collector().core.clone();
        let done = tokio::task::spawn_blocking(move || {
            let asked = Asked { what, why: "measured".into(), confirmed: false };
            fleet::revoke(&revoking.issuer, &revoking.directives, &revoking.fleet, asked, Timestamp::now()).unwrap()
        })
        .await
        .unwrap();
        for server in &servers {
            runs(server, done.version).await;
        }
        applied.push(begun.elapsed());
        for end in ends {
            cut.push(end.await.unwrap());
        }
        let version = undo(&world, &done.revocation.id);
        for server in &servers {
            runs(server, version).await;
        }
    }
    tell("from the call to the end of a live connection", cut);
    tell("from the call to the last of the agents refusing", applied);
}

fn tell(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)].as_secs_f64() * 1e3;
    println!(
        "{what}: {} samples over {FLEET} agents, p50 {:.1} ms, p99 {:.1} ms, most {:.1} ms",
        times.len(),
        at(50),
        at(99),
        at(100)
    );
}
