//! The real programs in real containers: the scene that users start from, attacked, restarted and cut off.
//!
//! Needs a container engine and root, or sudo without a password. `cargo verify` provides everything; elsewhere a test
//! that cannot run fails and says why, unless SIDEWARDEN_ALLOW_SKIP=1.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::Result;
use sidewarden_tests::docker::Docker;
use sidewarden_tests::events::Events;
use sidewarden_tests::progress::Progress;
use sidewarden_tests::scene::{Ports, Scene};
use sidewarden_tests::{images, packages, stage, story, suite, workspace};

/// One scene at a time: a database and eight more containers are enough for two cores.
static TURN: Mutex<()> = Mutex::new(());

/// A running scene of a test's own; taken down when the test ends, however it ends.
struct Open {
    scene: Scene,
    events: Events,
    _turn: MutexGuard<'static, ()>,
}

/// Starts the scene for the test `name`; `None` where the test may be left out, and has to be.
fn open(name: &str) -> Result<Option<Open>> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(docker) = docker(name)? else { return Ok(None) };
    let scene = Scene::prepare(docker, &workspace::own_name(&format!("sidewarden-test-{name}")), Ports::any()?)?;
    let events = scene.start(&Progress::start())?;
    Ok(Some(Open { scene, events, _turn: turn }))
}

/// The engine, with everything built; made ready once.
fn docker(name: &str) -> Result<Option<Docker>> {
    static STAGE: OnceLock<Result<Docker, String>> = OnceLock::new();
    let provide = || stage::provide(packages::DEMO, &Progress::start()).map_err(|error| format!("{error:#}"));
    match STAGE.get_or_init(provide) {
        Ok(docker) => Ok(Some(docker.clone())),
        Err(why) if std::env::var_os(suite::ALLOW_SKIP).is_some() => {
            eprintln!("{} {name}: {why}", suite::SKIPPED);
            Ok(None)
        }
        Err(why) => anyhow::bail!("{why} (to leave this test out: {}=1)", suite::ALLOW_SKIP),
    }
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
fn an_image_holds_one_file_that_is_static_and_the_agents_cannot_be_read() -> Result<()> {
    let Some(docker) = docker("images")? else { return Ok(()) };
    for (image, program, mode) in
        [(images::AGENT, "sidewarden-agent", "-rwx--x--x"), (images::COLLECTOR, "sidewarden-collector", "-rwxr-xr-x")]
    {
        let files = images::files(&docker, image)?;
        let expected = format!("{mode} 0/0 usr/bin/{program}");
        assert_eq!(files, [expected], "{image}");
    }
    Ok(())
}
