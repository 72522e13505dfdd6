//! `cargo demo`: everything on this machine, from nothing to an attack that is caught.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use sidewarden_tests::events::Events;
use sidewarden_tests::progress::Progress;
use sidewarden_tests::scene::{self, Ports, Scene};
use sidewarden_tests::story::{self, Outcome};
use sidewarden_tests::{interrupt, packages, stage, wire, workspace};

/// Builds Sidewarden, starts a small shop in containers with an agent beside each, and attacks it.
#[derive(Debug, Parser)]
struct Arguments {
    /// End after the story instead of staying up; the exit code says whether every step was caught.
    #[arg(long)]
    once: bool,
    /// Only build the images that deploy/compose.yaml uses.
    #[arg(long, conflicts_with = "once")]
    images: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match interrupt::watch().and_then(|()| demo(&arguments)) {
        Ok(code) => code,
        Err(_) if interrupt::requested() => {
            println!("\nInterrupted; everything is taken down.");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(arguments: &Arguments) -> Result<ExitCode> {
    let progress = Progress::start();
    progress.note("Sidewarden: a shop in containers, every hop between them in mutual TLS, and an attack on it.\n");
    let docker = stage::provide(packages::DEMO, &progress)?;
    if arguments.images {
        progress.note("\nThe images are there; deploy/compose.yaml uses them.");
        return Ok(ExitCode::SUCCESS);
    }
    let scene = Scene::prepare(docker, &workspace::own_name("sidewarden-demo"), Ports::free()?)?;
    let events = scene.start(&progress)?;
    println!("\nThe shop is open: visitor -> web (nginx) -> orders (Python) -> db (MariaDB).");
    println!("Each speaks plain HTTP or SQL to its own loopback, and knows nothing of TLS; the agents beside them do.");
    tell_of_the_wire(&scene)?;
    let outcomes = attack(&scene, &events)?;
    let good = outcomes.iter().all(Outcome::caught);
    if !arguments.once {
        say_what_to_look_at(&scene)?;
        scene::stay();
    }
    progress.step("taking everything down", |_| scene.clear())?;
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Looks at the packets between the containers, where we may.
fn tell_of_the_wire(scene: &Scene) -> Result<()> {
    let time = Duration::from_secs(2);
    match wire::look(&scene.addresses()?, time) {
        Err(_) if !interrupt::requested() => println!("(Looking at the wire between them needs root; left out.)"),
        looked => {
            let seen = looked?;
            println!(
                "On the wire between them, in {} seconds: {} segments, {} bytes; plain words of HTTP or SQL in {} of them.",
                time.as_secs(),
                seen.segments,
                seen.bytes,
                seen.plain
            );
            anyhow::ensure!(seen.segments > 0, "no traffic was seen between the containers");
            anyhow::ensure!(seen.plain == 0, "plaintext was seen between the containers");
        }
    }
    Ok(())
}

fn attack(scene: &Scene, events: &Events) -> Result<Vec<Outcome>> {
    println!("\nNow somebody attacks orders. For each step: what they saw, then how long until the collector had the");
    println!("event that names it, until a real Alertmanager had the alert, and what the metrics count.");
    let numbered = (1..).zip(story::STEPS);
    let outcomes = numbered.map(|(n, step)| story::play(n, step, scene, events)).collect::<Result<Vec<_>>>()?;
    println!("\n{}", story::table(&outcomes));
    Ok(outcomes)
}

fn say_what_to_look_at(scene: &Scene) -> Result<()> {
    let collector = scene.container("collector")?;
    println!("\nLook around; everything stays up until Ctrl-C.\n");
    println!("  the page       {}", scene.page()?);
    println!("                 (the browser warns: the collector made its own CA)");
    println!("                 orders: what it went through. debug: which CIS rules it breaks, and how to mend it.");
    println!("  the metrics    http://{}/metrics", scene.metrics());
    println!("  the alerts     http://{}/api/v2/alerts", scene.alertmanager());
    println!("  the terminal   docker exec {collector} sidewarden-collector events --min-severity warning");
    println!("                 docker exec {collector} sidewarden-collector posture shop/debug");
    Ok(())
}
