//! The container engine: found, or started when there is none and we may; and the few things we ask of it.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::statfs::{FsType, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, statfs};

use crate::command::{Run, run};
use crate::interrupt;
use crate::packages::Root;
use crate::progress::Progress;
use crate::workspace;

/// A running engine, and how we talk to it.
#[derive(Clone, Debug)]
pub struct Docker {
    prefix: Vec<String>,
    compose: Vec<String>,
}

impl Docker {
    /// Finds the engine, or starts one.
    pub fn provide(progress: &Progress) -> Result<Docker> {
        if let Some(docker) = Docker::find() {
            return Ok(docker);
        }
        let Some(root) = Root::find() else {
            bail!(
                "no container engine answers; run this once: sudo systemctl start docker && sudo usermod -aG docker $USER (then log in anew)"
            );
        };
        progress.step("starting the container engine", |_| start(root))?;
        Docker::find().context("the engine was started, and does not answer `docker version`")
    }

    fn find() -> Option<Docker> {
        let direct = ["docker"].map(String::from).to_vec();
        let sudo = ["sudo", "-n", "docker"].map(String::from).to_vec();
        let prefix = [direct, sudo].into_iter().find(|prefix| answers(prefix))?;
        let plugin = [&prefix[..], &["compose".into()]].concat();
        let own = [&prefix[..prefix.len() - 1], &["docker-compose".into()]].concat();
        let compose = if command(&plugin).args(["version"]).output().is_ok() { plugin } else { own };
        Some(Docker { prefix, compose })
    }

    /// `docker …`
    pub fn run<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Run {
        command(&self.prefix).args(args)
    }

    /// `docker compose …`, in whichever form this machine has.
    pub fn compose<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Run {
        command(&self.compose).args(args)
    }

    /// A long-running `docker …` whose output is read as it comes.
    pub fn follow<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new(&self.prefix[0]);
        command.args(&self.prefix[1..]).args(args).stdin(Stdio::null()).process_group(0);
        command
    }

    /// Ids of `what` (`container`, `network`, `volume`) with this label.
    pub fn labelled(&self, what: &str, label: &str) -> Result<Vec<String>> {
        let filter = format!("label={label}");
        let all: &[&str] = if what == "container" { &["--all"] } else { &[] };
        let listed = self.run([what, "ls", "--quiet", "--filter", &filter]).args(all).despite_interrupt().output()?;
        Ok(listed.lines().map(str::to_owned).collect())
    }

    /// Removes everything that has this label, running or not.
    pub fn remove_labelled(&self, label: &str) -> Result<()> {
        for (what, args) in [
            ("container", &["container", "rm", "--force", "--volumes"][..]),
            ("network", &["network", "rm"]),
            ("volume", &["volume", "rm", "--force"]),
        ] {
            let ids = self.labelled(what, label)?;
            if !ids.is_empty() {
                let gone = self.run(args.iter().copied()).args(ids).despite_interrupt();
                gone.limit(Duration::from_secs(120)).output()?;
            }
        }
        Ok(())
    }
}

fn command(words: &[String]) -> Run {
    run(&words[0], &words[1..])
}

fn answers(prefix: &[String]) -> bool {
    command(prefix).args(["version", "--format", "{{.Server.Version}}"]).output().is_ok()
}

/// Starts the engine as the machine's init would, or by ourselves where there is none (a container, a small VM). It
/// stays up afterwards, as it does on every machine where the package was installed.
fn start(root: Root) -> Result<()> {
    if Path::new("/run/systemd/system").is_dir() {
        root.run("systemctl", ["start", "docker"]).limit(Duration::from_secs(120)).output()?;
    } else {
        start_dockerd(root)?;
    }
    let limit = Duration::from_secs(60);
    let up = interrupt::poll(limit, Duration::from_millis(200), || Docker::find().map(|_| ()))?;
    up.with_context(|| format!("dockerd did not answer within {limit:?}; its log is {}", log_path().display()))
}

fn start_dockerd(root: Root) -> Result<()> {
    let log = std::fs::File::create(log_path()).context("making dockerd's log")?;
    let mut dockerd = match root {
        Root::Already => Command::new("dockerd"),
        Root::Sudo => {
            let mut sudo = Command::new("sudo");
            sudo.args(["-n", "dockerd"]);
            sudo
        }
    };
    if let Some(dir) = data_root(kind_of(Path::new("/var/lib")), &workspace::target()) {
        dockerd.arg("--data-root").arg(dir);
    }
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    dockerd.env("PATH", path).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
    dockerd.spawn().context("starting dockerd")?;
    Ok(())
}

fn log_path() -> PathBuf {
    // The target folder is there: we were built into it.
    workspace::target().join("dockerd.log")
}

fn kind_of(path: &Path) -> Option<FsType> {
    statfs(path).ok().map(|s| s.filesystem_type())
}

/// Overlay file systems do not stack: inside a container the images have to lie somewhere else.
fn data_root(var_lib: Option<FsType>, target: &Path) -> Option<PathBuf> {
    let unfit = |kind| kind == OVERLAYFS_SUPER_MAGIC || kind == TMPFS_MAGIC;
    var_lib.is_some_and(unfit).then(|| target.join("demo").join("docker"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::statfs::EXT4_SUPER_MAGIC;

    #[test]
    fn images_never_lie_on_an_overlay() {
        let target = Path::new("/t");
        let ours = Some(PathBuf::from("/t/demo/docker"));
        for (kind, expected) in [
            (Some(EXT4_SUPER_MAGIC), None),
            (None, None),
            (Some(OVERLAYFS_SUPER_MAGIC), ours.clone()),
            (Some(TMPFS_MAGIC), ours),
        ] {
            assert_eq!(data_root(kind, target), expected);
        }
    }
}
