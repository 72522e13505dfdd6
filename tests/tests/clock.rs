//! Clocks that jump by a day, either way: the whole machine's, and an agent's alone.
//!
//! Each test runs itself once more in a process whose clock is read from a file (libfaketime). Time that passes stays real.

#[allow(dead_code)]
mod world;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sidewarden_proto::time::Timestamp;
use sidewarden_tests::packages;
use tokio::net::TcpStream;

use world::{Agent, World, echo, eventually, inbound, outbound, says};

/// Where the process finds how far its clock is off.
const CLOCK: &str = "FAKETIME_TIMESTAMP_FILE";

/// Whether we are in the process with a clock of its own. Otherwise runs the test `name` in one, and it has to pass there.
fn with_a_clock(name: &str) -> bool {
    if std::env::var_os(CLOCK).is_some() {
        return true;
    }
    let library = match packages::find(packages::FAKETIME) {
        Ok(library) => library,
        Err(error) if std::env::var_os("SIDEWARDEN_ALLOW_SKIP").is_some_and(|v| v == "1") => {
            eprintln!("\n**** SKIPPED: {error:#} ****\n");
            return false;
        }
        Err(error) => panic!("{error:#}, or set SIDEWARDEN_ALLOW_SKIP=1"),
    };
    let dir = tempfile::tempdir().unwrap();
    let clock = dir.path().join("clock");
    std::fs::write(&clock, "+0\n").unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--test-threads", "1"]).env("LD_PRELOAD", library).env(CLOCK, &clock);
    let ran = command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1").output().unwrap();
    assert!(ran.status.success(), "{}\n{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(said.contains("1 passed"), "it was not run there: {said}");
    false
}

/// Sets this process's clock so many hours off.
fn set(hours: i64) {
    let clock = PathBuf::from(std::env::var_os(CLOCK).unwrap());
    // A reader sees the old or the new text, never half of one.
    let new = clock.with_extension("new");
    std::fs::write(&new, format!("{:+}\n", hours * 3_600)).unwrap();
    std::fs::rename(new, clock).unwrap();
}

fn serial(agent: &Agent) -> String {
    agent.app.identity.borrow().as_ref().unwrap().credential.peer().serial.clone()
}

/// Whether it has a certificate that holds by this process's clock.
fn holds(agent: &Agent) -> bool {
    agent.app.identity.borrow().as_ref().is_some_and(|identity| identity.usable(Timestamp::now()).is_ok())
}

async fn gets_through(web: &Agent, what: &str) {
    let asks = async || {
        let mut socket = TcpStream::connect(web.app.addresses.outbound[0]).await.ok()?;
        says(&mut socket, b"hello").await.is_ok_and(|answer| answer == b"hello").then_some(())
    };
    eventually(|| format!("nobody gets through {what}"), asks).await;
}

async fn shop(world: &World) -> (Agent, Agent) {
    let orders = world.agent("orders-1", "shop/orders", &inbound(echo().await, "shop/web")).await;
    let web = world.agent("web-1", "shop/web", &outbound(orders.inbound(), "shop/orders")).await;
    orders.enrolled().await;
    web.enrolled().await;
    (orders, web)
}

/// Waits until the collector has a session with it, with the certificate that it has now.
async fn heard(world: &World, agent: &Agent) {
    let told = async || {
        let name = agent.home.file_name().unwrap().to_string_lossy().into_owned();
        let live = world.collector().core.fleet.all().into_iter().find(|(id, _)| id.instance.as_str() == name)?;
        (live.1.spki == agent.app.identity.borrow().as_ref()?.credential.peer().spki).then_some(())
    };
    eventually(|| format!("{} does not come back", agent.home.display()), told).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_whose_clock_jumps_a_day_ahead_and_is_set_right_again_goes_on_without_anybody() {
    if !with_a_clock("a_machine_whose_clock_jumps_a_day_ahead_and_is_set_right_again_goes_on_without_anybody") {
        return;
    }
    let world = World::start().await;
    let (orders, web) = shop(&world).await;
    gets_through(&web, "at first").await;
    let first = serial(&web);

    set(25);
    for agent in [&orders, &web] {
        eventually(|| "no certificate holds".into(), async || holds(agent).then_some(())).await;
        heard(&world, agent).await;
    }
    gets_through(&web, "a day ahead").await;
    let ahead = serial(&web);
    assert_ne!(ahead, first, "its day was over");

    // What was made meanwhile begins tomorrow.
    set(0);
    for agent in [&orders, &web] {
        eventually(|| "no certificate holds".into(), async || holds(agent).then_some(())).await;
        heard(&world, agent).await;
    }
    gets_through(&web, "with the clock set right").await;
    assert_ne!(serial(&web), ahead);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_whose_clock_falls_a_day_back_and_is_set_right_again_goes_on_without_anybody() {
    if !with_a_clock("a_machine_whose_clock_falls_a_day_back_and_is_set_right_again_goes_on_without_anybody") {
        return;
    }
    // The CA is older than the jump: nobody can say anything before there was one.
    set(-72);
    let world = World::start().await;
    let (orders, web) = shop(&world).await;
    gets_through(&web, "at first").await;
    for (hours, what) in [(0, "three days later"), (-25, "a day back"), (0, "with the clock set right")] {
        set(hours);
        for agent in [&orders, &web] {
            eventually(|| format!("no certificate holds {what}"), async || holds(agent).then_some(())).await;
            heard(&world, agent).await;
        }
        gets_through(&web, what).await;
    }
}

/// The collector's clock is right: only the agents' process has another one.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_whose_clock_is_a_day_off_is_told_so_by_name_and_needs_no_token_afterwards() {
    const NAME: &str = "an_agent_whose_clock_is_a_day_off_is_told_so_by_name_and_needs_no_token_afterwards";
    let Some(dir) = std::env::var_os("SIDEWARDEN_TEST_WORLD").map(PathBuf::from) else {
        let world = World::start().await;
        world.hand_token("web-1", &world.token("shop/web", 1, Duration::from_secs(600)));
        let (dir, at) = (world.dir.path().to_owned(), world.agents);
        // SAFETY: no other thread of this test reads the environment, and the process with the clock needs to inherit these.
        unsafe {
            std::env::set_var("SIDEWARDEN_TEST_WORLD", &dir);
            std::env::set_var("SIDEWARDEN_TEST_COLLECTOR", at.to_string());
        }
        tokio::task::block_in_place(|| with_a_clock(NAME));
        return;
    };
    agents_alone(&dir).await;
}

async fn agents_alone(dir: &Path) {
    let at = std::env::var("SIDEWARDEN_TEST_COLLECTOR").unwrap().parse().unwrap();
    let token = format!("collector.token_file = '{}'\n", dir.join("web-1.token").display());
    let web = world::agent_in(dir, &[at], "web-1", &token, None).await;
    web.enrolled().await;
    for hours in [-25, 25] {
        set(hours);
        let said = async || {
            let ready = web.admin("/readyz").await;
            (ready.contains("clock: ") && ready.contains("set the clock right")).then_some(())
        };
        eventually(|| format!("the clock is not named at {hours} h"), said).await;
        set(0);
        let ready = async || (holds(&web) && !web.admin("/readyz").await.contains("clock: ")).then_some(());
        eventually(|| format!("it does not come back from {hours} h"), ready).await;
    }
}
