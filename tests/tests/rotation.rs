//! The trust domain's root is replaced while everything runs: nobody is restarted, and nobody notices.

#[allow(dead_code)] // what other tests need of it
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use sidewarden_collector::ca::backup;
use sidewarden_collector::ca::orders::{Order, Reply};
use sidewarden_collector::ca::rotate::{Stage, Step};
use sidewarden_collector::ca::seal::Cost;
use sidewarden_proto::identity::Sha256;
use sidewarden_proto::secret::Secret;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls;
use tokio::task::JoinHandle;

use world::{Agent, World, echo, eventually, inbound, outbound, says};

/// Has the running collector take a step, as the command does.
async fn ask(world: &World, step: Step, force: bool) -> Reply {
    let register = || world.collector().core.issuer.register();
    let id = register().order(&Order::Rotate { step, force }, Timestamp::now()).unwrap();
    eventually(|| format!("{step:?} was not answered"), async || register().reply(id).unwrap()).await
}

/// The same, as soon as everybody has followed.
async fn turn(world: &World, step: Step) {
    let last = std::sync::Mutex::new(None);
    let taken = async || {
        let reply = ask(world, step, false).await;
        let done = matches!(reply, Reply::Rotated { .. });
        *last.lock().unwrap() = Some(reply);
        done.then_some(())
    };
    eventually(|| format!("{step:?}: {:?}", last.lock().unwrap()), taken).await;
}

fn pin(world: &World) -> Sha256 {
    world.collector().core.issuer.authority().pin()
}

/// The root that an agent's certificate leads to, and those it trusts.
fn roots_of(agent: &Agent) -> (Sha256, Vec<Sha256>) {
    let identity = agent.app.identity.borrow().clone().unwrap();
    let own = tls::spki_of(identity.credential.chain().last().unwrap()).unwrap();
    (own, identity.trust.domains.values().flatten().map(|root| tls::spki_of(root).unwrap()).collect())
}

/// A service, and several others that call it.
async fn fleet(world: &World, clients: usize) -> (Agent, Vec<Agent>) {
    let orders = world.agent("orders-1", "shop/orders", &inbound(echo().await, "shop/web")).await;
    let mut webs = Vec::new();
    for n in 1..=clients {
        webs.push(world.agent(&format!("web-{n}"), "shop/web", &outbound(orders.inbound(), "shop/orders")).await);
    }
    orders.enrolled().await;
    for web in &webs {
        web.enrolled().await;
    }
    (orders, webs)
}

/// Requests on connections of their own, one after the other, and one connection that stays open.
struct Load {
    done: Arc<AtomicU64>,
    end: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<Result<(), String>>>,
}

impl Load {
    fn start(agents: &[Agent]) -> Load {
        let (done, end) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let each = |agent: &Agent| {
            let to = agent.app.addresses.outbound[0];
            [false, true].map(|stays| tokio::spawn(talk(to, stays, done.clone(), end.clone())))
        };
        let tasks = agents.iter().flat_map(each).collect();
        Load { done, end, tasks }
    }

    /// Waits until so many more requests were answered.
    async fn goes_on(&self) {
        let wanted = self.done.load(Relaxed) + 20 * self.tasks.len() as u64;
        let answered = async || {
            (self.done.load(Relaxed) >= wanted || self.tasks.iter().any(JoinHandle::is_finished)).then_some(())
        };
        eventually(|| format!("{} of {wanted} requests", self.done.load(Relaxed)), answered).await;
    }

    async fn stop(self) -> u64 {
        self.end.store(true, Relaxed);
        for task in self.tasks {
            task.await.unwrap().unwrap();
        }
        self.done.load(Relaxed)
    }
}

async fn talk(to: std::net::SocketAddr, stays: bool, done: Arc<AtomicU64>, end: Arc<AtomicBool>) -> Result<(), String> {
    let connect = async || tokio::net::TcpStream::connect(to).await.map_err(|e| format!("connecting: {e}"));
    let mut socket = connect().await?;
    while !end.load(Relaxed) {
        let nth = done.fetch_add(1, Relaxed);
        let text = format!("request {nth:20}");
        let answer = says(&mut socket, text.as_bytes()).await.map_err(|e| format!("{nth}, stays {stays}: {e}"))?;
        assert_eq!(answer, text.as_bytes());
        if !stays {
            socket = connect().await?;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_root_is_replaced_under_load_and_no_request_fails() {
    let world = World::start().await;
    let (orders, webs) = fleet(&world, 4).await;
    let (old, before) = (pin(&world), serials(&orders, &webs));
    let load = Load::start(&webs);
    for step in [Step::Prepare, Step::Activate, Step::Taint, Step::Retire] {
        turn(&world, step).await;
        load.goes_on().await;
    }
    assert_ne!(pin(&world), old);
    let everybody_trusts_only_the_new_one = async || {
        let only_new = (pin(&world), vec![pin(&world)]);
        webs.iter().chain([&orders]).all(|agent| roots_of(agent) == only_new).then_some(())
    };
    eventually(|| "an agent still trusts the old root".into(), everybody_trusts_only_the_new_one).await;
    load.goes_on().await;
    assert!(load.stop().await > 0);
    let after = serials(&orders, &webs);
    assert!(before.iter().zip(&after).all(|(before, after)| before != after), "every leaf was renewed");
    let steps: Vec<String> = world.events("ca.rotated").await.into_iter().map(|record| record.summary).collect();
    assert_eq!(steps.len(), 4, "{steps:?}");
    assert!(!world.dir.path().join("collector/ca/root").exists(), "the old keys are gone");
}

fn serials(orders: &Agent, webs: &[Agent]) -> Vec<String> {
    let serial = |agent: &Agent| agent.app.identity.borrow().as_ref().unwrap().credential.peer().serial.clone();
    webs.iter().chain([orders]).map(serial).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_waits_for_an_agent_that_is_away_and_names_it() {
    let world = World::start().await;
    let (orders, mut webs) = fleet(&world, 2).await;
    world.event("agent.connected", |record| record.summary.contains("web-2")).await;
    webs.pop().unwrap().app.stop("test").await;
    turn(&world, Step::Prepare).await;
    let named = async || match ask(&world, Step::Activate, false).await {
        Reply::Waits { missing } if missing.len() == 1 => Some(missing[0].who.clone()),
        Reply::Waits { .. } => None,
        other => panic!("{other:?}"),
    };
    let who = eventually(|| "nobody, or more than one, is missing".into(), named).await;
    assert!(who.ends_with("/shop/web#web-2"), "{who}");
    assert_eq!(world.collector().core.issuer.authority().entries()[1].stage, Stage::Prepared, "nothing was done");

    // It comes back, and the step goes through.
    let back = world.agent_without_token("web-2", &outbound(orders.inbound(), "shop/orders")).await;
    turn(&world, Step::Activate).await;
    assert_eq!(says(&mut back.dial().await, b"hello").await.unwrap(), b"hello");
    assert!(matches!(ask(&world, Step::Prepare, true).await, Reply::Refused { .. }), "one rotation at a time");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prepared_root_is_abandoned_and_leaves_every_bundle() {
    let world = World::start().await;
    let (orders, webs) = fleet(&world, 1).await;
    let (before, count) = (pin(&world), async |count: usize| {
        let trusts = async || webs.iter().chain([&orders]).all(|a| roots_of(a).1.len() == count).then_some(());
        eventually(|| format!("an agent does not trust {count} roots"), trusts).await;
    });
    turn(&world, Step::Prepare).await;
    count(2).await;
    assert!(matches!(ask(&world, Step::Abandon, false).await, Reply::Rotated { .. }));
    count(1).await;
    assert_eq!(pin(&world), before);
    assert!(!world.dir.path().join("collector/ca/g2").exists(), "its keys are gone");
    assert!(matches!(ask(&world, Step::Abandon, false).await, Reply::Refused { .. }));
    turn(&world, Step::Prepare).await;
    turn(&world, Step::Activate).await;
    assert!(matches!(ask(&world, Step::Abandon, true).await, Reply::Refused { .. }), "it has issued by now");
    assert_eq!(says(&mut webs[0].dial().await, b"hello").await.unwrap(), b"hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_goes_on_after_everything_was_restarted_in_the_middle() {
    let mut world = World::start().await;
    let (orders, mut webs) = fleet(&world, 1).await;
    for step in [Step::Prepare, Step::Activate, Step::Taint] {
        turn(&world, step).await;
        world.stop_collector().await;
        world.start_collector_again().await;
        webs.pop().unwrap().app.stop("test").await;
        webs.push(world.agent_without_token("web-1", &outbound(orders.inbound(), "shop/orders")).await);
        assert_eq!(says(&mut webs[0].dial().await, b"hello").await.unwrap(), b"hello", "after {step:?}");
    }
    turn(&world, Step::Retire).await;
    assert_eq!(world.collector().core.issuer.authority().entries().len(), 1);
    assert_eq!(says(&mut webs[0].dial().await, b"hello").await.unwrap(), b"hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_compromise_connected_agents_go_on_and_the_old_root_counts_for_nothing() {
    let world = World::start().await;
    let (orders, mut webs) = fleet(&world, 3).await;
    for n in 1..=3 {
        world.event("agent.connected", |record| record.summary.contains(&format!("web-{n}"))).await;
    }
    world.event("agent.connected", |record| record.summary.contains("orders-1")).await;
    let away = webs.pop().unwrap();
    away.app.stop("test").await;
    let old = pin(&world);
    let mut stands = webs[0].dial().await;
    assert_eq!(says(&mut stands, b"before").await.unwrap(), b"before");
    assert!(matches!(ask(&world, Step::Compromise, true).await, Reply::Rotated { .. }));
    let renewed = async || webs.iter().chain([&orders]).all(|agent| roots_of(agent).0 != old).then_some(());
    eventually(|| "an agent keeps its certificate of the old root".into(), renewed).await;
    assert!(matches!(ask(&world, Step::Retire, true).await, Reply::Rotated { .. }));
    for web in &webs {
        let out = async || (roots_of(web).1 == vec![pin(&world)]).then_some(());
        eventually(|| "an agent still trusts the old root".into(), out).await;
        let through = async || (says(&mut web.dial().await, b"hello").await.ok()? == b"hello").then_some(());
        eventually(|| "nothing gets through after the compromise".into(), through).await;
    }
    let end = async { while says(&mut stands, b"still").await.is_ok() {} };
    let ended = tokio::time::timeout(Duration::from_secs(60), end).await;
    ended.expect("a connection that the old root vouches for ends");
    // One that was away still has its old certificate; nobody lets it in.
    let back = world.agent_without_token("web-3", &outbound(orders.inbound(), "shop/orders")).await;
    assert_eq!(roots_of(&back).0, old);
    // It may be cut before it is connected.
    if let Ok(mut socket) = tokio::net::TcpStream::connect(back.app.addresses.outbound[0]).await {
        assert!(says(&mut socket, b"hello").await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_go_on_with_a_fresh_collector_that_was_made_of_a_backup() {
    let mut world = World::start().await;
    let (_orders, webs) = fleet(&world, 1).await;
    let data_dir = world.dir.path().join("collector");
    let passphrase = Secret::new("correct horse battery");
    let cheap = Cost { memory_kib: 8, passes: 1 };
    let sealed = backup::make(&data_dir, &passphrase, cheap, Timestamp::now()).unwrap();
    let (before, old_pin) = (webs[0].app.identity.borrow().as_ref().unwrap().directive_version(), pin(&world));
    world.stop_collector().await;
    std::fs::remove_dir_all(&data_dir).unwrap();
    std::fs::create_dir(&data_dir).unwrap();
    backup::restore(&data_dir, &sealed, &passphrase, Timestamp::now()).unwrap();
    world.start_collector_again().await;
    assert_eq!(pin(&world), old_pin);
    for name in ["web-1", "orders-1"] {
        world.event("agent.connected", |record| record.summary.contains(name)).await;
    }
    let newer = async || {
        let version = webs[0].app.identity.borrow().as_ref().unwrap().directive_version();
        (version > before).then_some(())
    };
    eventually(|| "the restored collector's directive is not taken".into(), newer).await;
    assert_eq!(says(&mut webs[0].dial().await, b"hello").await.unwrap(), b"hello");
    turn(&world, Step::Prepare).await;
    turn(&world, Step::Activate).await;
}
