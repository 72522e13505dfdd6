//! All that has to be there before a scene can start: packages, an engine, the two programs, the images.

use anyhow::{Result, anyhow};

use crate::docker::Docker;
use crate::packages::{self, Needed};
use crate::progress::Progress;
use crate::{images, programs};

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
