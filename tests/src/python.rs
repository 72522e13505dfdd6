//! Clients that Debian does not have, or has too old: Python's, from PyPI, in an environment under the target folder.
//! `tests/python/requirements.txt` names each with its version.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::command::run;
use crate::progress::Progress;
use crate::workspace;

/// Debian's own interpreter, whatever else is in PATH: the package python3-venv belongs to it.
const SYSTEM: &str = "/usr/bin/python3";

fn requirements() -> PathBuf {
    scripts().join("requirements.txt")
}

/// Where the scripts are that use those clients.
pub fn scripts() -> PathBuf {
    workspace::root().join("tests/python")
}

/// The interpreter of the environment; an error says how to get one.
pub fn interpreter() -> Result<PathBuf> {
    let dir = workspace::folder("python")?;
    if is_current(&dir)? {
        return Ok(dir.join("bin/python"));
    }
    bail!(
        "the Python clients are not there: `cargo verify` installs them; by hand: {SYSTEM} -m venv {0} && {0}/bin/pip install -r {1} && cp {1} {0}/",
        dir.display(),
        requirements().display()
    )
}

/// Makes the environment, if it is not there or not the one that is wanted.
pub fn provide(progress: &Progress) -> Result<()> {
    let dir = workspace::folder("python")?;
    if is_current(&dir)? {
        return Ok(());
    }
    progress.step("Python clients from PyPI", |detail| {
        detail.now("making an environment for them");
        run(SYSTEM, ["-m", "venv", "--clear"]).args([&dir]).output()?;
        detail.now("downloading");
        run(dir.join("bin/pip"), ["install", "--disable-pip-version-check", "--quiet", "--requirement"])
            .args([requirements()])
            .limit(Duration::from_secs(900))
            .output()?;
        // Last, so that a half-made environment is none.
        std::fs::copy(requirements(), dir.join("requirements.txt")).context("marking the environment as made")?;
        Ok(())
    })
}

fn is_current(dir: &Path) -> Result<bool> {
    let wanted = std::fs::read(requirements()).with_context(|| format!("reading {}", requirements().display()))?;
    let made = std::fs::read(dir.join("requirements.txt"));
    // It has its own path in it, and does not work from another.
    let settings = std::fs::read_to_string(dir.join("pyvenv.cfg"));
    let is_here = settings.is_ok_and(|settings| settings.contains(&*dir.to_string_lossy()));
    Ok(is_here && made.is_ok_and(|made| made == wanted))
}
