//! The real programs in real containers: the scene that users start from, attacked, restarted and cut off.
//!
//! Needs a container engine and root, or sudo without a password. `cargo verify` provides everything; elsewhere a test
//! that cannot run fails and says why, unless SIDEWARDEN_ALLOW_SKIP=1.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sidewarden_agent::config::Config;
use sidewarden_agent::node::{self, NodeConfig, Survey};
use sidewarden_proto::finding::Finding;
use sidewarden_tests::events::{Event, Events};
use sidewarden_tests::interrupt::poll;
use sidewarden_tests::progress::Progress;
use sidewarden_tests::scene::{Ports, Scene};
use sidewarden_tests::{attacks, images, packages, stage, story, wire, workspace};

/// One scene at a time: a database and eight more containers are enough for two cores.
static TURN: Mutex<()> = Mutex::new(());

/// How long anything here may take to come back, or to be told.
const LIMIT: Duration = Duration::from_secs(60);

/// A running scene of a test's own; taken down when the test ends, however it ends.
struct Open {
    scene: Scene,
    events: Events,
    _turn: MutexGuard<'static, ()>,
}

/// Starts the scene for the test `name`; `None` where the test may be left out, and has to be.
fn open(name: &str) -> Result<Option<Open>> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(docker) = stage::for_test(name)? else { return Ok(None) };
    let scene = Scene::prepare(docker, &workspace::own_name(&format!("sidewarden-test-{name}")), Ports::any()?)?;
    let events = scene.start(&Progress::start())?;
    Ok(Some(Open { scene, events, _turn: turn }))
}

#[test]
fn every_step_of_the_attack_is_caught() -> Result<()> {
    let Some(open) = open("attack")? else { return Ok(()) };
    let numbered = (1..).zip(story::STEPS);
    let outcomes: Vec<_> =
        numbered.map(|(n, step)| story::play(n, step, &open.scene, &open.events)).collect::<Result<_>>()?;
    assert!(outcomes.iter().all(story::Outcome::caught), "\n{}", story::table(&outcomes));
    Ok(())
}

#[test]
fn a_shop_that_is_left_alone_speaks_no_plain_word_and_breaks_no_rule() -> Result<()> {
    let Some(open) = open("quiet")? else { return Ok(()) };
    let traffic = wire::look(&open.scene.addresses()?, Duration::from_secs(2))?;
    ensure!(traffic.segments > 100 && traffic.plain == 0, "{traffic:?}");
    for workload in ["shop/web", "shop/orders", "shop/db", "shop/visitor"] {
        let broken = poll(LIMIT, Duration::from_millis(200), || open.broken(workload).ok().filter(Vec::is_empty))?;
        ensure!(broken.is_some(), "{workload} breaks {:?}", open.broken(workload));
    }
    for service in ["web-agent", "orders-agent", "db-agent", "collector"] {
        let container = open.scene.container(service)?;
        let health = || open.scene.docker.run(["inspect", "--format", "{{.State.Health.Status}}", &container]).output();
        let healthy =
            poll(LIMIT, Duration::from_millis(500), || health().ok().filter(|told| told.trim() == "healthy"))?;
        ensure!(healthy.is_some(), "{service} is {}", health()?);
    }
    Ok(())
}

/// What our own containers, and the services of the scene, cost by the same rules as everybody's, as a node agent tells it.
/// Beyond what is named here they break none; what only other machines know (AppArmor, SELinux) is left out.
const OWN: [(&str, &[&str]); 9] = [
    ("collector", &["image-latest"]),
    // Full sight needs uid 0 and SYS_PTRACE.
    ("web-agent", &["user", "capabilities", "image-latest"]),
    ("orders-agent", &["user", "capabilities", "image-latest"]),
    ("db-agent", &["user", "capabilities", "image-latest"]),
    ("visitor", &["user", "image-health", "health", "setuid-files", "image-latest"]),
    // Debian's packages as they are, without a health check.
    ("web", &["image-health", "health", "setuid-files", "image-latest"]),
    ("orders", &["image-health", "health", "setuid-files", "image-latest"]),
    ("db", &["image-health", "health", "setuid-files", "image-latest"]),
    ("alertmanager", &["image-health", "health", "setuid-files", "image-latest"]),
];

#[test]
fn our_own_containers_are_judged_like_all_others_and_break_no_rule_that_is_not_named_here() -> Result<()> {
    let Some(open) = open("own")? else { return Ok(()) };
    ensure!(nix::unistd::geteuid().is_root(), "a node agent reads the host's /proc: run this as root");
    let ids: BTreeMap<&str, String> =
        OWN.iter().map(|(service, _)| Ok((*service, open.scene.container(service)?))).collect::<Result<_>>()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let node = NodeConfig::new(&Config::default(), "/".into());
    let wrong = || -> Result<Vec<String>> {
        let survey = runtime.block_on(node::survey(&node))?;
        Ok(OWN.iter().filter_map(|(service, expected)| differs(&survey, service, &ids[service], expected)).collect())
    };
    // Until each has answered its health check for the first time.
    let right = poll(LIMIT, Duration::from_secs(1), || wrong().ok().filter(Vec::is_empty))?;
    ensure!(right.is_some(), "{}", wrong()?.join("\n"));
    Ok(())
}

/// What is wrong with what a survey tells of a container, where it breaks other rules than expected.
fn differs(survey: &Survey, service: &str, id: &str, expected: &[&str]) -> Option<String> {
    let Some((_, findings)) = survey.containers.iter().find(|(about, _)| about.id.starts_with(id)) else {
        return Some(format!("{service}: nothing is told of it"));
    };
    let of_the_machine = |f: &&Finding| ["apparmor", "selinux"].contains(&&*f.check);
    let broken: Vec<&Finding> = findings.iter().filter(|f| f.verdict.word() == "fail" && !of_the_machine(f)).collect();
    let names: BTreeSet<&str> = broken.iter().map(|f| f.check.as_str()).collect();
    let evidence: Vec<_> = broken.iter().map(|f| format!("{} {:?}", f.check, f.evidence.first())).collect();
    (names != expected.iter().copied().collect())
        .then(|| format!("{service} breaks {names:?}, not {expected:?}: {evidence:#?}"))
}

#[test]
fn traffic_and_reports_return_unaided_after_restarts() -> Result<()> {
    let Some(mut open) = open("restart")? else { return Ok(()) };
    for services in
        [&["orders"][..], &["orders-agent"], &["orders-agent", "orders"], &["visitor"], &["db-agent"], &["collector"]]
    {
        let containers = services.iter().map(|s| open.scene.container(s)).collect::<Result<Vec<_>>>()?;
        open.scene.docker.run(["restart"]).args(containers).output()?;
        open.scene.await_collector()?;
        open.events = open.scene.follow()?;
        open.is_well(&services.join("-and-"))?;
    }
    Ok(())
}

#[test]
fn an_agent_that_is_killed_comes_back_and_says_that_it_was() -> Result<()> {
    let Some(open) = open("killed")? else { return Ok(()) };
    let began = SystemTime::now();
    let agent = open.scene.container("orders-agent")?;
    let pid = open.scene.docker.run(["container", "inspect", "--format", "{{.State.Pid}}", &agent]).output()?;
    // Not `docker kill`, after which the engine believes that somebody wants it to stay down.
    packages::Root::find().context("killing it needs root")?.run("kill", ["-KILL", pid.trim()]).output()?;
    let started = open.wait(began, |e| e.of("shop/orders") && e.kind == "agent.started")?;
    assert_eq!(started.body["clean"], false, "{started:?}");
    open.is_well("the-kill")
}

#[test]
fn what_happens_while_the_collector_is_away_is_told_once_when_it_is_back() -> Result<()> {
    let Some(mut open) = open("away")? else { return Ok(()) };
    let (collector, orders) = (open.scene.container("collector")?, open.scene.container("orders")?);
    let began = SystemTime::now();
    open.scene.docker.run(["stop", &collector]).output()?;
    let at = SocketAddr::from((open.scene.address("orders-agent")?, 8443));
    attacks::tls11(at)?;
    attacks::plaintext(at)?;
    open.scene.docker.run(["exec", "--user", "root", &orders, "sh", "-c", "sleep 0.2"]).output()?;
    let answer = open.scene.visit("/orders?while=away", LIMIT)?;
    ensure!(answer.is_some(), "without a collector the shop stops\n{}", open.scene.state());
    open.scene.docker.run(["start", &collector]).output()?;
    open.scene.await_collector()?;
    open.events = open.scene.follow()?;
    open.wait(began, |e| e.text("reason") == "protocol_version")?;
    open.wait(began, |e| e.text("reason") == "plaintext")?;
    open.wait(began, |e| e.of("shop/orders") && e.kind == "process.entered")?;
    let mut told: Vec<_> = open.events.since(0).into_iter().map(|e| e.place()).collect();
    let all = told.len();
    told.sort();
    told.dedup();
    assert_eq!(told.len(), all, "an event was told twice");
    Ok(())
}

impl Open {
    /// The first event that the collector received since `began` and that `is` what is looked for.
    fn wait(&self, began: SystemTime, is: impl Fn(&Event) -> bool) -> Result<Event> {
        let found = self.events.wait(0, LIMIT, |e| e.received() >= began && is(e))?;
        found.with_context(|| format!("no such event came\n{}", self.scene.state()))
    }

    /// Everything came back by itself: requests pass every hop, and what happens is told.
    fn is_well(&self, after: &str) -> Result<()> {
        let path = format!("/orders?after={after}");
        let mut answer = self.scene.visit(&path, LIMIT / 4)?;
        if answer.is_none() {
            self.start_what_docker_gave_up()?;
            answer = self.scene.visit(&path, LIMIT)?;
        }
        ensure!(answer.is_some(), "after {after}: no request passes\n{}", self.scene.state());
        let began = SystemTime::now();
        attacks::tls11(SocketAddr::from((self.scene.address("orders-agent")?, 8443)))?;
        let refused = self.wait(began, |e| e.of("shop/orders") && e.text("reason") == "protocol_version");
        refused.with_context(|| format!("after {after}"))?;
        Ok(())
    }

    /// Docker tries to restart a workload a tenth of a second after its end, and gives up for good when the agent whose
    /// namespaces it joins is not back by then ("cannot join network of a non running container"). Nothing of ours can
    /// mend that; an operator starts the workload, and so does this. What runs is left alone by `docker start`.
    fn start_what_docker_gave_up(&self) -> Result<()> {
        let containers = ["web", "orders", "db"].iter().map(|s| self.scene.container(s)).collect::<Result<Vec<_>>>()?;
        self.scene.docker.run(["start"]).args(containers).output()?;
        Ok(())
    }

    /// The checks that a workload fails now.
    fn broken(&self, workload: &str) -> Result<Vec<String>> {
        let posture = self.scene.collector(["posture", workload, "--json"]).output()?;
        let posture: Value = serde_json::from_str(&posture)?;
        let instances = posture["instances"].as_array().context("no instances")?;
        let findings = instances.iter().filter_map(|i| i["findings"].as_array()).flatten();
        let failed = findings.filter(|f| f["verdict"] == "fail").map(|f| f["check"].to_string());
        ensure!(!instances.is_empty(), "nothing is known of {workload}");
        Ok(failed.collect())
    }
}

#[test]
fn an_image_holds_one_file_that_is_static_and_the_agents_cannot_be_read() -> Result<()> {
    let Some(docker) = stage::for_test("images")? else { return Ok(()) };
    for (image, program, mode) in
        [(images::AGENT, "sidewarden-agent", "-rwx--x--x"), (images::COLLECTOR, "sidewarden-collector", "-rwxr-xr-x")]
    {
        let files = images::files(&docker, image)?;
        let expected = format!("{mode} 0/0 usr/bin/{program}");
        assert_eq!(files, [expected], "{image}");
    }
    Ok(())
}
