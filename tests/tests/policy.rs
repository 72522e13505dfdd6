//! A policy from the centre says who may talk to whom and go where: at once, for what is live, too, until it is taken back.

#[allow(dead_code)]
mod world;

use std::net::SocketAddr;
use std::time::Duration;

use sidewarden_collector::fleet::{self, Application};
use sidewarden_proto::time::Timestamp;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use world::{Agent, World, echo, eventually, inbound, outbound, says};

/// Puts `text` in force as whoever has read what it does; the version of the directive.
fn apply(world: &World, text: &str, restores: Option<u64>) -> u64 {
    let core = &world.collector().core;
    let (text, why, by) = (text.to_owned(), "test".to_owned(), "test".to_owned());
    let asked = Application { text, why, by, restores, confirmed: false };
    fleet::apply(&core.issuer, &core.directives, &core.fleet, asked, Timestamp::now()).unwrap().1
}

fn roll_back(world: &World) -> u64 {
    let kept = fleet::earlier(&world.collector().core.directives, None).unwrap();
    apply(world, &kept.text, Some(kept.version))
}

async fn runs(agent: &Agent, version: u64) {
    let mut identity = agent.app.identity.clone();
    let newest = identity.wait_for(|identity| identity.as_ref().is_some_and(|i| i.directive_version() >= version));
    tokio::time::timeout(Duration::from_secs(60), newest).await.expect("the directive in time").unwrap();
}

async fn gets_through(agent: &Agent) -> bool {
    let Ok(mut socket) = TcpStream::connect(agent.app.addresses.outbound[0]).await else { return false };
    says(&mut socket, b"hello").await.is_ok_and(|answer| answer == b"hello")
}

async fn is_cut(mut live: TcpStream) {
    let end = tokio::time::timeout(Duration::from_secs(60), live.read(&mut [0; 1])).await.expect("an end in time");
    assert!(matches!(end, Err(_) | Ok(0)), "{end:?}");
}

/// web → orders and other → orders, all enrolled.
async fn shop(world: &World) -> (Agent, Agent, Agent) {
    let both = "['spiffe://sidewarden.internal/shop/web', 'spiffe://sidewarden.internal/shop/other']";
    let rules = inbound(echo().await, "shop/web").replace("['spiffe://sidewarden.internal/shop/web']", both);
    let orders = world.agent("orders-1", "shop/orders", &rules).await;
    let route = outbound(orders.inbound(), "shop/orders");
    let web = world.agent("web-1", "shop/web", &route).await;
    let other = world.agent("other-1", "shop/other", &route).await;
    for agent in [&orders, &web, &other] {
        agent.enrolled().await;
    }
    (orders, web, other)
}

const WEB_ALONE: &str = "# who may call\n\n[[allow]]\nfrom = ['shop/web']\nto = ['shop/orders']\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_cuts_what_it_does_not_allow_names_the_line_and_can_be_taken_back() {
    let world = World::start().await;
    let (orders, web, other) = shop(&world).await;
    apply(&world, "[[deny]]\nfrom = ['bank/*']\nto = ['*']\n", None);
    let (mut bystander, mut live) = (web.dial().await, other.dial().await);
    assert_eq!(says(&mut bystander, b"hello").await.unwrap(), b"hello");
    assert_eq!(says(&mut live, b"hello").await.unwrap(), b"hello");

    let version = apply(&world, WEB_ALONE, None);
    is_cut(live).await;
    for agent in [&orders, &web, &other] {
        runs(agent, version).await;
    }
    assert!(!gets_through(&other).await);
    assert_eq!(says(&mut bystander, b"still").await.unwrap(), b"still");
    assert!(gets_through(&web).await);
    let refused = world.event("connection.refused", |record| record.body.get().contains("policy 2 has no line")).await;
    assert!(refused.body.get().contains("not_allowed"), "{}", refused.body.get());

    let version = roll_back(&world);
    for agent in [&orders, &other] {
        runs(agent, version).await;
    }
    assert!(gets_through(&other).await, "the rollback lets it in again");
    let policy = world.collector().core.directives.now().directive.policy.clone().unwrap();
    assert_eq!((policy.version, policy.text.contains("bank/*")), (3, true));

    let version = apply(&world, "\n\n[[deny]]\nfrom = ['shop/other']\nto = ['shop/orders']\n", None);
    runs(&orders, version).await;
    assert!(!gets_through(&other).await);
    world.event("connection.refused", |record| record.body.get().contains("policy 4, line 3, denies")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_called_refuses_also_when_the_caller_has_not_heard_yet() {
    let world = World::start().await;
    let (orders, _web, other) = shop(&world).await;
    let port = orders.inbound().port();
    // The caller leaves lines about listeners to who is called: it is the other side that refuses here.
    let text = format!("[[deny]]\nfrom = ['shop/other']\nto = ['shop/orders']\nlisteners = [{port}]\n");
    let version = apply(&world, &text, None);
    runs(&orders, version).await;
    runs(&other, version).await;
    assert!(!gets_through(&other).await);
    let at_orders = |record: &sidewarden_collector::index::Record| {
        record.agent.workload.path() == "shop/orders" && record.body.get().contains("policy 1, line 1, denies")
    };
    world.event("connection.refused", at_orders).await;
    let elsewhere = text.replace(&port.to_string(), "1");
    let version = apply(&world, &elsewhere, None);
    runs(&orders, version).await;
    assert!(gets_through(&other).await, "another listener is not meant");
}

/// Goes to `target` through the agent's egress listener; the connection, and the first line of the answer.
async fn goes(proxy: SocketAddr, target: SocketAddr) -> (TcpStream, String) {
    let mut socket = TcpStream::connect(proxy).await.unwrap();
    socket.write_all(format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") && socket.read_buf(&mut answer).await.is_ok_and(|read| read > 0) {
        if answer.starts_with(b"HTTP/1.1 4") {
            break;
        }
    }
    (socket, String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn egress_from_the_centre_ends_what_is_live_and_refuses_what_is_new() {
    let world = World::start().await;
    let (place, elsewhere) = (echo().await, echo().await);
    let rules = format!("[egress]\nlisten = '127.0.0.1:0'\nallow = ['{place}', '{elsewhere}']\n");
    let web = world.agent("web-1", "shop/web", &rules).await;
    web.enrolled().await;
    let proxy = web.app.addresses.egress[0];
    let (mut live, answer) = goes(proxy, place).await;
    assert!(answer.contains("200"), "{answer}");
    assert_eq!(says(&mut live, b"hello").await.unwrap(), b"hello");

    let version = apply(&world, &format!("[[egress]]\nfrom = ['shop/*']\nto = ['{elsewhere}']\n"), None);
    runs(&web, version).await;
    is_cut(live).await;
    let refused = async || goes(proxy, place).await.1.contains("403").then_some(());
    eventually(|| "it may still go there".into(), refused).await;
    let told = world.event("connection.refused", |record| record.body.get().contains("policy 1 has no line")).await;
    assert!(
        told.body.get().contains("line 1 is about it") && told.body.get().contains("egress"),
        "{}",
        told.body.get()
    );
    let (mut allowed, answer) = goes(proxy, elsewhere).await;
    assert!(answer.contains("200"), "{answer}");
    assert_eq!(says(&mut allowed, b"hello").await.unwrap(), b"hello");

    let version = apply(&world, "# nothing about egress\n", None);
    runs(&web, version).await;
    let back = async || goes(proxy, place).await.1.contains("200").then_some(());
    eventually(|| "it does not come back".into(), back).await;
    assert_eq!(says(&mut allowed, b"still").await.unwrap(), b"still");
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_that_is_let_in_for_a_while_needs_the_policys_leave_too() {
    let world = World::start().await;
    let permissive = "permissive = { reason = 'moving', until = '2099-01-01' }\n";
    let rules = format!("{}{permissive}", inbound(echo().await, "shop/web"));
    let orders = world.agent("orders-1", "shop/orders", &rules).await;
    orders.enrolled().await;
    let plainly = async || {
        let mut socket = TcpStream::connect(orders.inbound()).await.ok()?;
        says(&mut socket, b"hello").await.ok().map(|_| socket)
    };
    let mut live = eventually(|| "plaintext is not let in".into(), plainly).await;
    let version = apply(&world, WEB_ALONE, None);
    runs(&orders, version).await;
    is_cut(live).await;
    let refused = async || plainly().await.is_none().then_some(());
    eventually(|| "plaintext is still let in".into(), refused).await;
    world.event("connection.refused", |record| record.body.get().contains("somebody without a proven name")).await;

    let version = apply(&world, "[[allow]]\nfrom = ['anybody']\nto = ['shop/orders']\n", None);
    runs(&orders, version).await;
    live = eventually(|| "plaintext is not let in again".into(), plainly).await;
    assert_eq!(says(&mut live, b"still").await.unwrap(), b"still");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_policy_holds_before_the_first_connection_after_a_restart_without_collector() {
    let mut world = World::start().await;
    let (orders, web, other) = shop(&world).await;
    let version = apply(&world, WEB_ALONE, None);
    for agent in [&orders, &web, &other] {
        runs(agent, version).await;
    }
    world.stop_collector().await;
    let route = outbound(orders.inbound(), "shop/orders");
    other.app.stop("test").await;
    let other = world.agent_without_token("other-1", &route).await;
    other.enrolled().await;
    assert!(!gets_through(&other).await);
    assert!(gets_through(&web).await);
}
