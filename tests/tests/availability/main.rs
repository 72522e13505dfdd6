//! Several collectors with one root: whichever is lost, traffic goes on, and what is denied at one is denied everywhere.

#[allow(dead_code)] // what other tests need of it
#[path = "../hostile/mint.rs"]
mod mint;
#[allow(dead_code)] // what other tests need of it
#[path = "../world/mod.rs"]
mod world;

mod load;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;
use sidewarden_collector::app::{self as collector, App, Core};
use sidewarden_collector::ca::orders::{Order, Reply};
use sidewarden_collector::ca::rotate::Step;
use sidewarden_collector::ca::{Vault, make_dir, member};
use sidewarden_collector::index::Query;
use sidewarden_collector::{config, fleet};
use sidewarden_proto::directive::Target;
use sidewarden_proto::enrol::Der;
use sidewarden_proto::event::Mode;
use sidewarden_proto::identity::AgentId;
use sidewarden_proto::secret::Secret;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls;

use world::{Agent, World, echo, eventually, inbound, outbound, says};

/// Has a collector carry an order out.
async fn ask(core: &Core, order: &Order) -> Reply {
    let register = || core.issuer.register();
    let id = register().order(order, Timestamp::now()).unwrap();
    eventually(|| format!("{order:?} was not answered"), async || register().reply(id).unwrap()).await
}

/// Has the running collector take a step as soon as everybody has followed.
async fn turn(core: &Core, step: Step) {
    let last = std::sync::Mutex::new(None);
    let taken = async || {
        let reply = ask(core, &Order::Rotate { step, force: false }).await;
        let done = matches!(reply, Reply::Rotated { .. });
        *last.lock().unwrap() = Some(reply);
        done.then_some(())
    };
    eventually(|| format!("{step:?}: {:?}", last.lock().unwrap()), taken).await;
}

/// Gives the collector in `dir` an issuing CA under the root of `leader`, as the `ca member` commands do.
async fn join(leader: &Core, dir: &Path) {
    let vault = Vault::default();
    make_dir(&dir.join("ca")).unwrap();
    let request = member::request(&dir.join("ca"), &vault).unwrap();
    let csr = Der(CertificateSigningRequestDer::from_pem_slice(request.as_bytes()).unwrap().to_vec());
    let Reply::Issued { pem } = ask(leader, &Order::SignMember { csr }).await else { panic!("no issuing CA") };
    let (chain, domain) = (tls::certificates(pem.as_bytes()).unwrap(), "sidewarden.internal".parse().unwrap());
    member::install(&dir.join("ca"), &chain, &domain, &vault, Timestamp::now()).unwrap();
}

fn follower(dir: &Path, leader: SocketAddr, agents: SocketAddr) -> config::Config {
    let text = format!(
        "data_dir = '{}'\ninstance = 'second'\ncertificate_life = '4m'\nagents.listen = '{agents}'\napi.listen = '127.0.0.1:0'\n\
         metrics.listen = '127.0.0.1:0'\nca.leader = '{leader}'\n",
        dir.display()
    );
    config::read(&text, &|_| None).unwrap()
}

/// A second collector under the first one's root, which follows it.
async fn second(world: &World) -> App {
    let dir = world.dir.path().join("second");
    join(&world.collector().core, &dir).await;
    let free = SocketAddr::from(([127, 0, 0, 1], 0));
    let app = collector::start(follower(&dir, world.agents, free), Timestamp::now).await.unwrap();
    follows(world, &app).await;
    app
}

/// Waits until the second collector hands out what the first has in force.
async fn follows(world: &World, second: &App) {
    let version = |core: &Core| core.directives.now().directive.version;
    let same = async || (version(&second.core) == version(&world.collector().core)).then_some(());
    eventually(|| format!("the second collector is at version {}", version(&second.core)), same).await;
}

fn id(name: &str) -> AgentId {
    let service = name.rsplit_once('-').unwrap().0;
    format!("spiffe://sidewarden.internal/shop/{service}#{name}").parse().unwrap()
}

/// What a collector believes to be lost, by reason.
fn losses(app: &App) -> Vec<String> {
    app.core.commits.state().totals.lost.keys().cloned().collect()
}

fn token(app: &App, pattern: &str) -> Secret {
    let (register, pin) = (app.core.issuer.register(), app.core.issuer.authority().pin());
    register.create(&pattern.parse().unwrap(), 1, Duration::from_secs(600), pin, Timestamp::now()).unwrap().0.text()
}

async fn connected(core: &Core, names: &[&str]) {
    let live = async || names.iter().all(|name| core.fleet.live(&id(name)).is_some()).then_some(());
    eventually(|| format!("{names:?} do not come to this collector"), live).await;
}

fn revoke(core: &Core, workload: &str) -> Result<fleet::Done, fleet::RevokeError> {
    let what = Target::Workload { id: core.config.trust_domain.workload(workload).unwrap() };
    let asked = fleet::Asked { what, why: "stolen".into(), confirmed: true };
    fleet::revoke(&core.issuer, &core.directives, &core.fleet, asked, Timestamp::now())
}

/// A request of its own; one that is refused may be so before the connection is seen to stand.
async fn asks(agent: &Agent) -> std::io::Result<Vec<u8>> {
    let mut socket = tokio::net::TcpStream::connect(agent.app.addresses.outbound[0]).await?;
    says(&mut socket, b"hello").await
}

/// Requests on connections of their own, one after the other.
struct Load {
    done: Arc<AtomicU64>,
    end: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Load {
    fn start(web: &Agent) -> Load {
        let (end, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (to, ended, counted) = (web.app.addresses.outbound[0], end.clone(), done.clone());
        let task = tokio::spawn(async move {
            while !ended.load(Relaxed) {
                let mut socket = tokio::net::TcpStream::connect(to).await?;
                says(&mut socket, b"request").await?;
                counted.fetch_add(1, Relaxed);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Ok(())
        });
        Load { done, end, task }
    }

    async fn goes_on(&self) {
        let wanted = self.done.load(Relaxed) + 50;
        let answered = async || (self.done.load(Relaxed) >= wanted || self.task.is_finished()).then_some(());
        eventually(|| "the load stands still".into(), answered).await;
    }

    async fn stop(self) {
        self.end.store(true, Relaxed);
        self.task.await.unwrap().unwrap();
    }
}

/// A service that two others may call, and one that calls it.
async fn pair(world: &World) -> (Agent, Agent) {
    let allowed = "allow = ['spiffe://sidewarden.internal/shop/web', 'spiffe://sidewarden.internal/shop/late']";
    let rules = inbound(echo().await, "shop/web").replace("allow = ['spiffe://sidewarden.internal/shop/web']", allowed);
    let orders = world.agent("orders-1", "shop/orders", &rules).await;
    let web = world.agent("web-1", "shop/web", &outbound(orders.inbound(), "shop/orders")).await;
    orders.enrolled().await;
    web.enrolled().await;
    connected(&world.collector().core, &["orders-1", "web-1"]).await;
    (orders, web)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_lost_changes_nothing_for_traffic() {
    let mut world = World::start().await;
    let second = second(&world).await;
    world.others = vec![second.agents];
    let (orders, web) = pair(&world).await;
    let load = Load::start(&web);
    load.goes_on().await;
    world.stop_collector().await;
    connected(&second.core, &["orders-1", "web-1"]).await;
    load.goes_on().await;

    // One that comes only now enrols there, and is known to those that were issued by the first.
    world.hand_token("late-1", &token(&second, "shop/late"));
    let late = world.agent_without_token("late-1", &outbound(orders.inbound(), "shop/orders")).await;
    late.enrolled().await;
    assert_eq!(asks(&late).await.unwrap(), b"hello");
    load.goes_on().await;
    load.stop().await;
    let lost = second.core.index.query(Query { kinds: vec!["leader.changed".into()], ..world::all() });
    let told: Vec<String> = lost.await.unwrap().events.into_iter().map(|record| record.summary).collect();
    assert!(told.last().is_some_and(|last| last.contains("cannot be reached")), "{told:?}");

    assert!(losses(&second).is_empty(), "what went to the first is not lost: {:?}", losses(&second));
    let mode = second.core.commits.state().agents[&id("web-1")].mode;
    assert_eq!(mode, Some(Mode::Sidecar), "it came in the middle of its life");

    // The first comes back, is told whom the second has enrolled meanwhile, and is the first again.
    world.start_collector_again().await;
    connected(&world.collector().core, &["orders-1", "web-1"]).await;
    assert!(losses(world.collector()).is_empty(), "what went to the second is not lost");
    let known = async || {
        let holders = world.collector().core.issuer.register().holders(Duration::ZERO, Timestamp::now()).unwrap();
        holders.iter().any(|holder| holder.agent.instance.as_str() == "late-1").then_some(())
    };
    eventually(|| "the first collector does not hear of the second one's agents".into(), known).await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_revoked_at_one_collector_is_denied_everywhere_and_stays_so_when_that_one_is_lost() {
    let mut world = World::start().await;
    let second = second(&world).await;
    world.others = vec![second.agents];
    let (_orders, web) = pair(&world).await;
    assert_eq!(asks(&web).await.unwrap(), b"hello");
    revoke(&world.collector().core, "shop/web").unwrap();
    follows(&world, &second).await;
    let refused = async || asks(&web).await.is_err().then_some(());
    eventually(|| "a revoked workload is still let in".into(), refused).await;
    world.stop_collector().await;
    connected(&second.core, &["orders-1"]).await;
    assert!(asks(&web).await.is_err(), "the second collector undoes nothing");
    let error = revoke(&second.core, "shop/late").unwrap_err().to_string();
    assert!(error.contains("ca.leader"), "{error}");
    second.stop().await;
}

fn runs(agent: &Agent) -> u64 {
    agent.app.identity.borrow().as_ref().unwrap().directive_version()
}

/// The second collector once more, in its directory.
async fn again(world: &World, second: App) -> App {
    let agents = second.agents;
    second.stop().await;
    let started = async || match collector::start(
        follower(&world.dir.path().join("second"), world.agents, agents),
        Timestamp::now,
    )
    .await
    {
        Err(error) if error.to_string().contains("already in use") => None,
        started => Some(started.unwrap()),
    };
    eventually(|| format!("the port of {agents} stays taken"), started).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_survives_restarts_of_everything_and_no_collector_that_is_behind_undoes_it() {
    let mut world = World::start_with("certificate_life = '4m'").await;
    let second = second(&world).await;
    world.others = vec![second.agents];
    let (orders, web) = pair(&world).await;
    let other = world.agent("web-2", "shop/web", &outbound(orders.inbound(), "shop/orders")).await;
    connected(&world.collector().core, &["web-2"]).await;
    // The second is away while the first revokes, and the first is away when the second comes back.
    let agents = second.agents;
    second.stop().await;
    revoke(&world.collector().core, "shop/web").unwrap();
    let version = world.collector().core.directives.now().directive.version;
    eventually(|| format!("orders runs {}", runs(&orders)), async || (runs(&orders) == version).then_some(())).await;
    world.stop_collector().await;
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 9));
    let started = async || {
        let config = follower(&world.dir.path().join("second"), nowhere, agents);
        collector::start(config, Timestamp::now).await.ok()
    };
    let behind = eventually(|| "the second collector does not start again".into(), started).await;
    assert!(behind.core.directives.now().directive.version < version, "it has not heard of it");
    connected(&behind.core, &["orders-1"]).await;
    // A renewal brings the directive of the collector along, which is an older one.
    let serial = || orders.app.identity.borrow().as_ref().unwrap().credential.peer().serial.clone();
    let before = serial();
    eventually(|| "nothing was renewed".into(), async || (serial() != before).then_some(())).await;
    for client in [&web, &other] {
        assert!(asks(client).await.is_err(), "it is let in again");
    }
    assert_eq!(runs(&orders), version);

    // Every agent restarts, with nobody but the collector that is behind.
    let rules = inbound(echo().await, "shop/web");
    orders.app.stop("test").await;
    web.app.stop("test").await;
    let orders = world.agent_without_token("orders-1", &rules).await;
    let web = world.agent_without_token("web-1", &outbound(orders.inbound(), "shop/orders")).await;
    connected(&behind.core, &["orders-1"]).await;
    assert_eq!(runs(&orders), version);
    assert!(asks(&web).await.is_err(), "it is let in after restarts");
    behind.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_killed_ends_no_connection_and_renewals_go_on_at_the_other() {
    let (mut world, threads) = World::start_apart("certificate_life = '4m'").await;
    let second = second(&world).await;
    world.others = vec![second.agents];
    let (orders, web) = pair(&world).await;
    let mut open = web.dial().await;
    assert_eq!(says(&mut open, b"before").await.unwrap(), b"before");
    let load = Load::start(&web);
    load.goes_on().await;
    threads.shutdown_background();
    connected(&second.core, &["orders-1", "web-1"]).await;
    let issuers = second.core.issuer.authority().issuers();
    for agent in [&orders, &web] {
        let renewed = async || {
            let identity = agent.app.identity.borrow().clone().unwrap();
            issuers.contains(&tls::spki_of(&identity.credential.chain()[1]).unwrap()).then_some(())
        };
        eventually(|| "an agent gets no certificate from the second collector".into(), renewed).await;
    }
    load.goes_on().await;
    load.stop().await;
    assert_eq!(says(&mut open, b"after").await.unwrap(), b"after", "the connection of before");
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_does_not_know_yet_who_is_revoked_lets_nobody_in() {
    let mut world = World::start().await;
    let dir = world.dir.path().join("second");
    join(&world.collector().core, &dir).await;
    world.stop_collector().await;
    let free = SocketAddr::from(([127, 0, 0, 1], 0));
    let second = collector::start(follower(&dir, world.agents, free), Timestamp::now).await.unwrap();
    let leader = std::mem::replace(&mut world.agents, second.agents);
    world.hand_token("web-1", &token(&second, "shop/web"));
    let web = world.agent_without_token("web-1", &outbound(leader, "shop/orders")).await;
    let refused = async || {
        let query = Query { kinds: vec!["enrolment.refused".into()], ..world::all() };
        let events = second.core.index.query(query).await.unwrap().events;
        events.iter().any(|record| record.body.to_string().contains("not_ready")).then_some(())
    };
    eventually(|| "an agent was not refused".into(), refused).await;
    assert!(web.app.identity.borrow().is_none());
    world.agents = leader;
    world.start_collector_again().await;
    web.enrolled().await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_was_restarted_without_its_leader_hands_out_what_it_had() {
    let mut world = World::start().await;
    let second = second(&world).await;
    revoke(&world.collector().core, "shop/web").unwrap();
    follows(&world, &second).await;
    let (before, agents) = (second.core.directives.now(), second.agents);
    world.stop_collector().await;
    let again = again(&world, second).await;
    assert_eq!(again.agents, agents);
    assert_eq!(again.core.directives.now().signed, before.signed);
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_was_set_back_is_not_followed_and_both_say_so() {
    let mut world = World::start().await;
    let second = second(&world).await;
    turn(&world.collector().core, Step::Prepare).await;
    let kept = world.collector().core.config.data_dir.join("directive.json");
    let before = std::fs::read(&kept).unwrap();
    revoke(&world.collector().core, "shop/web").unwrap();
    follows(&world, &second).await;
    world.stop_collector().await;
    std::fs::write(&kept, before).unwrap();
    world.start_collector_again().await;
    let told = async || {
        let query = Query { kinds: vec!["leader.changed".into()], ..world::all() };
        let events = second.core.index.query(query).await.unwrap().events;
        events.iter().any(|record| record.summary.contains("is older than the one here")).then_some(())
    };
    eventually(|| "the second collector says nothing".into(), told).await;
    assert_eq!(second.core.directives.now().directive.revoked.len(), 1, "and nothing is undone");
    let core = &world.collector().core;
    let waits = async || match ask(core, &Order::Rotate { step: Step::Activate, force: false }).await {
        Reply::Waits { missing } => missing.iter().any(|one| one.lacks.contains("ahead")).then_some(()),
        other => panic!("{other:?}"),
    };
    eventually(|| "the first does not see that the other is ahead".into(), waits).await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_a_compromise_left_behind_comes_back_with_an_issuing_ca_of_the_new_root() {
    let world = World::start().await;
    let behind = second(&world).await;
    let (dir, free) = (world.dir.path().join("second"), SocketAddr::from(([127, 0, 0, 1], 0)));
    behind.stop().await;
    let core = &world.collector().core;
    for step in [Step::Compromise, Step::Retire] {
        let reply = ask(core, &Order::Rotate { step, force: true }).await;
        assert!(matches!(reply, Reply::Rotated { .. }), "{reply:?}");
    }
    join(core, &dir).await;
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 9));
    let alone = collector::start(follower(&dir, nowhere, free), Timestamp::now).await.unwrap();
    assert!(alone.core.directives.now().directive.version > 0, "it keeps what it had");
    assert!(!alone.core.directives.is_there(), "and lets nobody in by it");
    alone.stop().await;
    let again = collector::start(follower(&dir, world.agents, free), Timestamp::now).await.unwrap();
    follows(&world, &again).await;
    assert!(again.core.directives.is_there());
    assert_eq!(again.core.issuer.authority().bundle(), core.issuer.authority().bundle());
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_takes_the_agents_of_the_other_collector_and_that_collector_with_it() {
    let mut world = World::start().await;
    let second = second(&world).await;
    let leader = std::mem::replace(&mut world.agents, second.agents);
    // These know the second collector only.
    world.hand_token("orders-1", &token(&second, "shop/orders"));
    world.hand_token("web-1", &token(&second, "shop/web"));
    let orders = world.agent_without_token("orders-1", &inbound(echo().await, "shop/web")).await;
    let web = world.agent_without_token("web-1", &outbound(orders.inbound(), "shop/orders")).await;
    connected(&second.core, &["orders-1", "web-1"]).await;
    world.agents = leader;
    let core = &world.collector().core;
    let (old, load) = (core.issuer.authority().pin(), Load::start(&web));
    for step in [Step::Prepare, Step::Activate, Step::Taint, Step::Retire] {
        turn(core, step).await;
        load.goes_on().await;
    }
    let active = core.issuer.authority().pin();
    assert_ne!(active, old);
    assert_eq!(second.core.issuer.authority().pin(), active, "it has an issuing CA under the new root");
    assert!(!world.dir.path().join("second/ca/root").exists(), "and the old one's key is gone");
    for agent in [&orders, &web] {
        let only = async || {
            let identity = agent.app.identity.borrow().clone().unwrap();
            let roots: Vec<_> = identity.trust.domains.values().flatten().map(|r| tls::spki_of(r).unwrap()).collect();
            (roots == [active]).then_some(())
        };
        eventually(|| "an agent of the second collector still trusts the old root".into(), only).await;
    }
    load.goes_on().await;
    load.stop().await;
    second.stop().await;
}

/// A certificate of `ca` in files of `dir`, and the settings that name them.
fn given(dir: &Path, ca: &mint::Authority, path: &str) -> String {
    mint::given(dir, ca, &format!("spiffe://sidewarden.internal/{path}"))
}

/// Agents that know of somebody else's CA alone go from one collector to the other and back; what is signed for them at the first
/// is what the other hands out.
#[tokio::test(flavor = "multi_thread")]
async fn agents_of_somebody_elses_ca_fail_over_as_well_and_nothing_is_undone_by_it() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), mint::Authority::root("the company"));
    let mut world = World::start_with(&given(&dir.path().join("first"), &ca, "sidewarden/collector")).await;
    let at = world.dir.path().join("second");
    join(&world.collector().core, &at).await;
    let follows_with = |name: &str| {
        let mut config = follower(&at, world.agents, SocketAddr::from(([127, 0, 0, 1], 0)));
        let text = given(&dir.path().join("second"), &ca, name);
        config.identity = config::read(&text, &|_| None).unwrap().identity;
        config
    };
    // One with the name of the collector that makes the directives could make some, so it is not taken.
    let misnamed = collector::start(follows_with("sidewarden/collector"), Timestamp::now).await.unwrap();
    assert!(misnamed.core.identities.given().is_none());
    misnamed.stop().await;
    let second = collector::start(follows_with("sidewarden/collector/second"), Timestamp::now).await.unwrap();
    follows(&world, &second).await;
    world.others = vec![second.agents];

    let identity = |name: &str, path: &str| given(&dir.path().join(name), &ca, path);
    let rules = inbound(echo().await, "shop/web");
    let orders = world.agent_of("orders-1", &format!("{}{rules}", identity("orders", "shop/orders")), None).await;
    let to_orders = outbound(orders.inbound(), "shop/orders");
    let web = world.agent_of("web-1", &format!("{}{to_orders}", identity("web", "shop/web")), None).await;
    connected(&world.collector().core, &["orders-1", "web-1"]).await;
    let load = Load::start(&web);
    load.goes_on().await;
    world.stop_collector().await;
    connected(&second.core, &["orders-1", "web-1"]).await;
    load.goes_on().await;
    // One that comes only now takes the directive from the second.
    let other = world.agent_of("web-2", &format!("{}{to_orders}", identity("web2", "shop/web")), None).await;
    connected(&second.core, &["web-2"]).await;
    let version = second.core.directives.now().directive.version;
    eventually(|| format!("web-2 runs {}", runs(&other)), async || (runs(&other) == version).then_some(())).await;

    world.start_collector_again().await;
    connected(&world.collector().core, &["orders-1", "web-1"]).await;
    load.goes_on().await;
    load.stop().await;
    assert!(losses(&second).is_empty() && losses(world.collector()).is_empty());

    // What the second has seen the first knows: all keys of an instance are revoked.
    let core = &world.collector().core;
    let reported = async || (!core.issuer.keys_of(&id("web-2"), Timestamp::now()).unwrap().is_empty()).then_some(());
    eventually(|| "the first collector does not hear of the second one's agents".into(), reported).await;
    revoke(core, "shop/web").unwrap();
    follows(&world, &second).await;
    for agent in [&web, &other] {
        eventually(|| "a revoked workload is still let in".into(), async || asks(agent).await.is_err().then_some(()))
            .await;
    }
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_that_could_take_no_directive_are_not_let_in_and_it_is_said_what_is_missing() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), mint::Authority::root("the company"));
    let world = World::start().await;
    let at = world.dir.path().join("second");
    join(&world.collector().core, &at).await;
    let mut config = follower(&at, world.agents, SocketAddr::from(([127, 0, 0, 1], 0)));
    let text = given(&dir.path().join("second"), &ca, "sidewarden/collector/second");
    config.identity = config::read(&text, &|_| None).unwrap().identity;
    let second = collector::start(config, Timestamp::now).await.unwrap();
    follows(&world, &second).await;
    let identity = given(&dir.path().join("web"), &ca, "shop/web");
    let web = world::agent_in(world.dir.path(), &[second.agents], "web-1", &identity, None).await;
    let refused = async || {
        let query = Query { kinds: vec!["ingest.refused".into()], ..world::all() };
        let events = second.core.index.query(query).await.unwrap().events;
        events.iter().any(|record| record.body.get().contains("needs an `[identity]` of the same CA")).then_some(())
    };
    eventually(|| "it is let in, or not told why not".into(), refused).await;
    assert!(second.core.fleet.live(&id("web-1")).is_none() && runs(&web) == 0);
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_nobody_signed_here_is_not_told_anything() {
    let world = World::start().await;
    let second = second(&world).await;
    let serial = world.collector().core.issuer.register().members(Timestamp::now()).unwrap()[0].serial.clone();
    assert_eq!(ask(&world.collector().core, &Order::ForgetMember { serial: "77".into() }).await.clone(), {
        Reply::Refused { why: "nothing waits for an issuing CA 77: see `ca member list`".into() }
    });
    assert_eq!(ask(&world.collector().core, &Order::ForgetMember { serial }).await, Reply::Done);
    second.stop().await;
    let config = follower(&world.dir.path().join("second"), world.agents, SocketAddr::from(([127, 0, 0, 1], 0)));
    let again = collector::start(config, Timestamp::now).await.unwrap();
    world.event("ingest.refused", |record| record.summary.contains("not_allowed")).await;
    assert_eq!(again.core.directives.is_reached(), Some(false));
    again.stop().await;
}
