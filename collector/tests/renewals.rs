//! How many certificates a collector renews in a second: every agent of a fleet asks at once, over the session it has,
//! as after `ca taint` without a spread. Run it by hand, in release:
//! `cargo test --release -p sidewarden-collector --test renewals -- --ignored --nocapture`

mod agent;

use std::time::{Duration, Instant};

use agent::Agent;
use nix::sys::resource::{UsageWho, getrusage};
use rcgen::KeyPair;
use sidewarden_proto::enrol::{Answer, from_payload};
use sidewarden_proto::wire::Frame;

const AGENTS: usize = 500;

fn cpu() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let span = |t: nix::sys::time::TimeVal| Duration::new(t.tv_sec() as u64, t.tv_usec() as u32 * 1000);
    span(usage.user_time()) + span(usage.system_time())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "not a test: a measurement of how many certificates are renewed in a second"]
async fn renewals() {
    let dir = tempfile::tempdir().unwrap();
    let app = agent::start(dir.path()).await;
    let mut sessions = Vec::new();
    for number in 0..AGENTS {
        let agent = Agent::enrolled(&app, "shop/web", &format!("c{number}")).await;
        let mut connection = agent.tcp(app.agents).await;
        connection.send(&Frame::Hello(agent.hello())).await;
        assert!(matches!(connection.next().await, Some(Frame::Welcome(_))));
        let csr = agent::csr(&KeyPair::generate().unwrap());
        sessions.push((connection, Frame::Renew(csr)));
    }
    let (started, spent) = (Instant::now(), cpu());
    for (connection, renew) in &mut sessions {
        connection.send(renew).await;
    }
    for (connection, _) in &mut sessions {
        let answer = loop {
            match connection.next().await {
                Some(Frame::Renewed(json)) => break from_payload(&json).unwrap(),
                Some(_) => {}
                None => panic!("the session ended"),
            }
        };
        assert!(matches!(answer, Answer::Issued(_)));
    }
    let (wall, spent) = (started.elapsed(), cpu() - spent);
    println!(
        "{:.0} renewals/s ({AGENTS} agents in {:.2} s), {:.0} us CPU a renewal, both ends of the sessions included",
        AGENTS as f64 / wall.as_secs_f64(),
        wall.as_secs_f64(),
        spent.as_secs_f64() * 1e6 / AGENTS as f64
    );
    app.stop().await;
}
