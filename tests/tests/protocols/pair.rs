//! A server, and a client that reaches it only through two agents.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use sidewarden_tests::command::Run;
use sidewarden_tests::metrics::{Metrics, scrape};
use sidewarden_tests::tap::{Seen, Tap};
use sidewarden_tests::{command, packages, python, suite};

use crate::world::{Agent, World, all, eventually, inbound, outbound};

/// In every payload; never on the wire.
pub const CANARY: &str = "canary-in-plain-words-4711";

/// How long a client may take, load tools included.
const PATIENCE: Duration = Duration::from_secs(120);

/// Time for more connections than this machine can make at once, and for a machine that stands still for a while.
const TIMEOUTS: &str = "timeouts.connect = '30s'\ntimeouts.handshake = '30s'\n";

/// What both agents counted.
#[derive(Debug, PartialEq)]
pub struct Counted {
    /// Connections of the client.
    pub connections: u64,
    /// Payload from the client to the server, as the client's agent counted it.
    pub up: u64,
    /// And back.
    pub down: u64,
}

/// Two agents with a wire between them.
pub struct Pair {
    world: World,
    web: Agent,
    orders: Agent,
    tap: Tap,
}

impl Pair {
    /// In front of `server`. Besides the canary, none of `words` may be seen on the wire.
    pub async fn before(server: SocketAddr, words: &[&str]) -> Pair {
        let world = World::start().await;
        let rules = format!("{TIMEOUTS}{}", inbound(server, "shop/web"));
        let orders = world.agent("orders-1", "shop/orders", &rules).await;
        let tap = Tap::start(orders.inbound(), &[&[CANARY], words].concat()).unwrap();
        let rules = format!("{TIMEOUTS}{}", outbound(tap.address, "shop/orders"));
        let web = world.agent("web-1", "shop/web", &rules).await;
        orders.enrolled().await;
        web.enrolled().await;
        Pair { world, web, orders, tap }
    }

    /// Where the client connects to, in plaintext.
    pub fn door(&self) -> SocketAddr {
        self.web.app.addresses.outbound[0]
    }

    /// The door's host and port, as most command lines want them.
    pub fn host_port(&self) -> [String; 2] {
        [self.door().ip().to_string(), self.door().port().to_string()]
    }

    /// Once the clients are done: nothing is live any more, everything was sealed, and metrics and events of both
    /// agents say the same.
    pub async fn settle(self, expected: RangeInclusive<u64>) -> Counted {
        let counted = self.in_metrics(&expected).await;
        let Pair { world, web, orders, tap } = self;
        // The end of an agent tells what was counted since the last telling, and closes what it kept open to the other.
        web.app.stop("test").await;
        orders.app.stop("test").await;
        for (workload, direction) in [("shop/web", "outbound"), ("shop/orders", "inbound")] {
            in_events(&world, workload, direction, &counted).await;
        }
        let seen = told(&tap).await;
        assert!(seen.is_sealed(), "{seen:?}");
        counted
    }

    async fn in_metrics(&self, expected: &RangeInclusive<u64>) -> Counted {
        let quiet = async || {
            let (web, orders) = (scraped(&self.web), scraped(&self.orders));
            (live(&web, "outbound") == 0 && live(&orders, "inbound") == 0).then_some((web, orders))
        };
        let still = || format!("connections are still live: {}", self.live());
        let (web, orders) = eventually(still, quiet).await;
        let opened = counter(&web, "connections_opened_total", &[("direction", "outbound")]);
        assert!(expected.contains(&opened), "the client's agent counted {opened} connections, not {expected:?}");
        let came_in = counter(&orders, "connections_opened_total", &[("direction", "inbound")]);
        assert_eq!(came_in, opened, "as many came in as went out");
        for metrics in [&web, &orders] {
            assert_eq!(counter(metrics, "connections_refused_total", &[]), 0, "{metrics:?}");
        }
        let bytes = |flow| counter(&web, "relayed_bytes_total", &[("direction", "outbound"), ("flow", flow)]);
        Counted { connections: opened, up: bytes("out"), down: bytes("in") }
    }

    fn live(&self) -> String {
        format!("{} out, {} in", live(&scraped(&self.web), "outbound"), live(&scraped(&self.orders), "inbound"))
    }
}

/// What the collector was told of `workload`'s connections adds up to what was counted.
async fn in_events(world: &World, workload: &str, direction: &str, counted: &Counted) {
    let sums = std::sync::Mutex::new((0, 0));
    let told = async || {
        let records = world.query(all()).await;
        let bodies = records.iter().filter(|r| r.agent.workload.path() == workload && r.kind == "connections.summary");
        let bodies: Vec<Value> = bodies.map(|r| serde_json::from_str(r.body.get()).unwrap()).collect();
        let ours = || bodies.iter().filter(|body| body["direction"] == direction);
        let sum = |key: &str| ours().filter_map(|body| body[key].as_u64()).sum::<u64>();
        *sums.lock().unwrap() = (sum("opened"), sum("closed"));
        (*sums.lock().unwrap() == (counted.connections, counted.connections)).then_some(())
    };
    let wrong =
        || format!("{workload} told of {:?} opened and closed, not {}", sums.lock().unwrap(), counted.connections);
    eventually(wrong, told).await;
    let seen = world.event("peer.first_seen", |record| record.agent.workload.path() == workload).await;
    assert!(seen.body.get().contains("TLSv1_3") && seen.body.get().contains("X25519MLKEM768"), "{}", seen.body.get());
}

/// What went over the wire, once both directions of every connection have ended and were judged.
async fn told(tap: &Tap) -> Seen {
    let last = std::sync::Mutex::new(Seen::default());
    let steady = async || {
        let seen = tap.seen();
        let before = std::mem::replace(&mut *last.lock().unwrap(), seen.clone());
        (seen.sealed > 0 && seen == before).then_some(seen)
    };
    eventually(|| format!("the wire is not quiet: {:?}", last.lock().unwrap()), steady).await
}

fn scraped(agent: &Agent) -> Metrics {
    tokio::task::block_in_place(|| scrape(agent.app.addresses.admin)).unwrap()
}

fn live(metrics: &Metrics, direction: &str) -> u64 {
    counter(metrics, "connections_live", &[("direction", direction)])
}

fn counter(metrics: &Metrics, name: &str, labels: &[(&str, &str)]) -> u64 {
    metrics.sum(&format!("sidewarden_agent_{name}"), labels) as u64
}

/// Whether the test may go on: what it needs is there. Otherwise it fails and says what to install, or says that it
/// leaves itself out, where that is allowed.
pub fn has(test: &str, programs: &[&str]) -> bool {
    let missing = programs.iter().find_map(|program| packages::find(program).err());
    let missing = missing.or_else(|| {
        // Scripts need the environment of their own.
        programs.contains(&PYTHON).then(python::interpreter).and_then(Result::err)
    });
    match missing {
        None => true,
        Some(why) if std::env::var_os(suite::ALLOW_SKIP).is_some() => {
            eprintln!("{} {test}: {why}", suite::SKIPPED);
            false
        }
        Some(why) => panic!("{why} (to leave this test out: {}=1)", suite::ALLOW_SKIP),
    }
}

/// Python, with the clients from PyPI.
pub const PYTHON: &str = "python3";

/// `program`, wherever it is, to be started as a server.
pub fn server(program: &str) -> Command {
    Command::new(packages::find(program).unwrap())
}

/// `program`, wherever it is, to be run as a client.
pub fn client(program: &str, args: &[&str]) -> Run {
    command::run(packages::find(program).unwrap(), args).limit(PATIENCE)
}

/// A script of `tests/python`, to be run as a client.
pub fn script(name: &str, args: &[&str]) -> Run {
    command::run(python::interpreter().unwrap(), [python::scripts().join(name)]).args(args).limit(PATIENCE)
}

/// A script of `tests/python`, to be started as a server with the interpreter `python`.
pub fn script_server(python: &Path, name: &str, args: &[&str]) -> Command {
    let mut command = Command::new(python);
    command.arg(python::scripts().join(name)).args(args);
    command
}

/// Runs a client to its end, while the agents go on; what it printed. One that fails is quoted.
pub fn talk(run: Run) -> String {
    tokio::task::block_in_place(|| run.output()).unwrap()
}

/// The whole number after `label` in what a load tool printed.
pub fn number_after(text: &str, label: &str) -> u64 {
    let after = text.split_once(label).map(|(_, after)| after.trim_start());
    let digits = after.map(|after| after.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default());
    digits.and_then(|digits| digits.parse().ok()).unwrap_or_else(|| panic!("no number after `{label}` in\n{text}"))
}
