//! All that has to be there before a scene can start: packages, an engine, the two programs, the images.

use std::sync::OnceLock;

use anyhow::{Result, anyhow, bail};

use crate::docker::Docker;
use crate::packages::{self, Needed};
use crate::progress::Progress;
use crate::{images, programs, suite};

/// Makes what is missing. The two long pieces, cargo and debootstrap, go on side by side.
pub fn provide(needed: &[Needed], progress: &Progress) -> Result<Docker> {
    packages::provide(needed, progress)?;
    let docker = Docker::provide(progress)?;
    let programs = std::thread::scope(|scope| {
        let servers = scope.spawn(|| {
            progress.step("the shop's servers, from Debian's packages", |detail| images::services(&docker, detail))
        });
        let programs = progress.step("the agent and the collector: release build, static", programs::build);
        servers.join().unwrap_or_else(|_| Err(anyhow!("making the servers' image broke")))?;
        programs
    })?;
    progress.step("their images, FROM scratch", |detail| images::programs(&docker, &programs, detail))?;
    Ok(docker)
}

/// The same for the test `name`, once in each program; `None` where the test may be left out, and has to be.
pub fn for_test(name: &str) -> Result<Option<Docker>> {
    static STAGE: OnceLock<Result<Docker, String>> = OnceLock::new();
    let make = || provide(packages::DEMO, &Progress::start()).map_err(|error| format!("{error:#}"));
    match STAGE.get_or_init(make) {
        Ok(docker) => Ok(Some(docker.clone())),
        Err(why) if std::env::var_os(suite::ALLOW_SKIP).is_some() => {
            eprintln!("{} {name}: {why}", suite::SKIPPED);
            Ok(None)
        }
        Err(why) => bail!("{why} (to leave this test out: {}=1)", suite::ALLOW_SKIP),
    }
}
