//! A fleet whose certificates somebody else issues, in files and by a Workload API: the collector's as well, and beside agents that
//! are enrolled here.

#[path = "../hostile/mint.rs"]
#[allow(dead_code)]
mod mint;
#[path = "../world/spire.rs"]
#[allow(dead_code)]
mod spire;
#[path = "../world/mod.rs"]
#[allow(dead_code)]
mod world;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use sidewarden_collector::app::Core;
use sidewarden_collector::fleet;
use sidewarden_proto::directive::Target;
use sidewarden_proto::identity::AgentId;
use sidewarden_proto::time::Timestamp;
use tokio::net::TcpStream;

use mint::{Authority, Shown};
use spire::{Spire, X509Svid, X509SvidResponse};
use world::{Agent, World, echo, eventually, inbound, outbound, says};

const COLLECTOR: &str = "sidewarden/collector";

fn id(path: &str) -> String {
    format!("spiffe://sidewarden.internal/{path}")
}

fn agent_id(workload: &str, instance: &str) -> AgentId {
    format!("{}#{instance}", id(workload)).parse().unwrap()
}

/// A certificate for `path` in files of `dir`, and the settings that name them.
fn files(dir: &Path, ca: &Authority, path: &str) -> String {
    mint::given(dir, ca, &id(path))
}

/// A world whose collector has its identity from `ca`, in files of `dir`.
async fn world_of(dir: &Path, ca: &Authority) -> World {
    World::start_with(&files(dir, ca, COLLECTOR)).await
}

async fn connected(core: &Core, agents: &[(&str, &str)]) {
    let live = async || {
        agents.iter().all(|(workload, name)| core.fleet.live(&agent_id(workload, name)).is_some()).then_some(())
    };
    eventually(|| format!("{agents:?} do not come"), live).await;
}

async fn asks(agent: &Agent) -> bool {
    let Ok(mut socket) = TcpStream::connect(agent.app.addresses.outbound[0]).await else { return false };
    says(&mut socket, b"hello").await.is_ok_and(|answer| answer == b"hello")
}

async fn gets_through(agent: &Agent, what: &str) {
    eventually(|| what.to_owned(), async || asks(agent).await.then_some(())).await;
}

fn revoke(world: &World, what: Target) -> fleet::Done {
    let core = &world.collector().core;
    let asked = fleet::Asked { what, why: "stolen".into(), confirmed: true };
    fleet::revoke(&core.issuer, &core.directives, &core.fleet, asked, Timestamp::now()).unwrap()
}

fn instance(workload: &str, name: &str) -> Target {
    let AgentId { workload, instance } = agent_id(workload, name);
    Target::Instance { workload, instance }
}

/// Requests on connections of their own, one after the other; the first that fails ends it.
struct Load {
    done: Arc<AtomicU64>,
    end: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Load {
    fn start(agent: &Agent) -> Load {
        let (end, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (to, ended, counted) = (agent.app.addresses.outbound[0], end.clone(), done.clone());
        let task = tokio::spawn(async move {
            while !ended.load(Relaxed) {
                let mut socket = TcpStream::connect(to).await?;
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

#[tokio::test(flavor = "multi_thread")]
async fn agents_with_certificates_in_files_and_enrolled_ones_are_one_fleet() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), Authority::root("the company"));
    let mut world = world_of(&dir.path().join("collector"), &ca).await;
    let allow = "allow = ['spiffe://sidewarden.internal/shop/web', 'spiffe://sidewarden.internal/shop/late']";
    let rules = inbound(echo().await, "shop/web").replace("allow = ['spiffe://sidewarden.internal/shop/web']", allow);
    let identity = |name: &str, path: &str| files(&dir.path().join(name), &ca, path);
    let orders = world.agent_of("orders-1", &format!("{}{rules}", identity("orders", "shop/orders")), None).await;
    let to_orders = outbound(orders.inbound(), "shop/orders");
    let web = world.agent_of("web-1", &format!("{}{to_orders}", identity("web", "shop/web")), None).await;
    let other = world.agent_of("web-2", &format!("{}{to_orders}", identity("web2", "shop/web")), None).await;
    let late = world.agent("late-1", "shop/late", &to_orders).await;
    let all = [("shop/orders", "orders-1"), ("shop/web", "web-1"), ("shop/web", "web-2"), ("shop/late", "late-1")];
    connected(&world.collector().core, &all).await;
    gets_through(&web, "one of the company's CA does not reach another").await;
    gets_through(&late, "one that was enrolled does not reach one of the company's CA").await;
    world.event("peer.first_seen", |record| record.agent.instance.as_str() == "orders-1").await;

    // One instance is revoked by name: it is cut off, its sibling is not, and a restart of everything changes nothing.
    let mut live = web.dial().await;
    assert_eq!(says(&mut live, b"before").await.unwrap(), b"before");
    let done = revoke(&world, instance("shop/web", "web-1"));
    assert_eq!(done.revocation.keys.len(), 1, "{done:?}");
    let cut = async || {
        says(&mut TcpStream::connect(web.app.addresses.outbound[0]).await.ok()?, b"x").await.is_err().then_some(())
    };
    eventually(|| "who is revoked gets through".into(), cut).await;
    assert!(says(&mut live, b"after").await.is_err(), "nor does what stood");
    gets_through(&other, "its sibling is cut off as well").await;
    world.stop_collector().await;
    orders.app.stop("test").await;
    let orders = world.agent_of("orders-1", &format!("{}{rules}", identity("orders", "shop/orders")), None).await;
    world.start_collector_again().await;
    connected(&world.collector().core, &[("shop/orders", "orders-1"), ("shop/web", "web-2")]).await;
    let version = orders.app.identity.borrow().as_ref().unwrap().directive_version();
    assert!(version >= done.version, "the directive is in force with the identity: {version}");
}

/// What a Workload API says to one workload.
fn svid(ca: &Authority, path: &str, bundle: &[&Authority]) -> X509SvidResponse {
    let Shown { chain, key } = ca.leaf(&mint::leaf(&id(path)), &[]);
    let svid = X509Svid {
        spiffe_id: id(path),
        x509_svid: chain[0].to_vec(),
        x509_svid_key: key,
        bundle: bundle.iter().flat_map(|ca| ca.cert.to_vec()).collect(),
        hint: String::new(),
    };
    X509SvidResponse { svids: vec![svid], crl: vec![], federated_bundles: Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_of_a_workload_api_rotates_leaves_and_roots_while_traffic_and_events_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let (first, next) = (Authority::root("spire 1"), Authority::root("spire 2"));
    let api = |name: &str| dir.path().join(format!("{name}.sock"));
    let settings = |name: &str| format!("identity.workload_api = 'unix://{}'\n", api(name).display());
    let names = [("collector", COLLECTOR), ("orders", "shop/orders"), ("web", "shop/web")];
    let spires = names.map(|(name, path)| {
        let spire = Spire::new(Ok(svid(&first, path, &[&first])));
        (path, spire.serve(&api(name)), spire)
    });
    let world = World::start_with(&settings("collector")).await;
    let rules = inbound(echo().await, "shop/web");
    let orders = world.agent_of("orders-1", &format!("{}{rules}", settings("orders")), None).await;
    let to_orders = outbound(orders.inbound(), "shop/orders");
    let web = world.agent_of("web-1", &format!("{}{to_orders}", settings("web")), None).await;
    let both = [("shop/orders", "orders-1"), ("shop/web", "web-1")];
    connected(&world.collector().core, &both).await;
    gets_through(&web, "a fleet of a Workload API has no traffic").await;
    let load = Load::start(&web);
    load.goes_on().await;

    // As SPIRE does it: both roots for everybody, then leaves of the next, then the next root alone.
    let stages: [(&Authority, &[&Authority]); 3] =
        [(&first, &[&first, &next]), (&next, &[&first, &next]), (&next, &[&next])];
    for (issuer, bundle) in stages {
        for (path, _, spire) in &spires {
            spire.say(Ok(svid(issuer, path, bundle)));
        }
        load.goes_on().await;
        // Each comes back with what it was given, and is known by it.
        let keys = async || {
            let has = |agent: &Agent, (workload, name): (&str, &str)| {
                let spki = agent.app.identity.borrow().as_ref().unwrap().credential.peer().spki;
                world.collector().core.fleet.live(&agent_id(workload, name)).is_some_and(|live| live.spki == spki)
            };
            let roots = |agent: &Agent| {
                agent.app.identity.borrow().as_ref().unwrap().trust.domains.values().next().unwrap().len()
            };
            let settled = has(&orders, both[0]) && has(&web, both[1]);
            (settled && roots(&orders) == bundle.len() && roots(&web) == bundle.len()).then_some(())
        };
        eventually(|| "the agents do not come back with what they were given".into(), keys).await;
        load.goes_on().await;
    }
    let refused = world.events("ingest.refused").await;
    assert!(refused.is_empty(), "{refused:#?}");

    // What is revoked reaches agents that know of SPIRE's root alone.
    load.stop().await;
    revoke(&world, instance("shop/web", "web-1"));
    eventually(|| "a revoked agent gets through".into(), async || (!asks(&web).await).then_some(())).await;

    // Without the API all goes on with what there is, and is told.
    let [(_, serving, _), ..] = spires;
    serving.abort();
    let _ = serving.await;
    world.event("collector.identity_refused", |record| record.summary.contains("the last good one is in use")).await;
    connected(&world.collector().core, &both[..1]).await;
}
