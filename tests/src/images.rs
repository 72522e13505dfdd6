//! The container images, all made on this machine: ours FROM scratch, and one with the real servers of the scene, from
//! Debian's packages by debootstrap.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::command::run;
use crate::docker::Docker;
use crate::packages::{self, Root};
use crate::programs::Programs;
use crate::progress::Detail;
use crate::workspace;

/// The recipe of [`SERVICES`], run as root.
const RECIPE: &str = include_str!("../images/services.sh");

/// nginx, MariaDB, Python and Alertmanager on a minimal Debian.
pub const SERVICES: &str = "sidewarden-scene/services:local";

/// The same with the agent in it, for `exec` mode.
pub const VISITOR: &str = "sidewarden-scene/visitor:local";

/// The agent alone.
pub const AGENT: &str = "sidewarden/agent:local";

/// The collector alone.
pub const COLLECTOR: &str = "sidewarden/collector:local";

/// The one-shot that installs packet rules: the agent's program, with `nft`.
pub const INTERCEPT: &str = "sidewarden/intercept:local";

/// Makes [`SERVICES`], unless the engine has it from the same recipe. What debootstrap made is kept.
pub fn services(docker: &Docker, detail: &Detail<'_>) -> Result<()> {
    let suite = suite(&std::fs::read_to_string("/etc/os-release").unwrap_or_default());
    let recipe = fingerprint(&(RECIPE, &suite));
    if label_of(docker, SERVICES, "sidewarden.recipe") == recipe {
        return Ok(());
    }
    let tar = workspace::folder("images")?.join(format!("services-{recipe}.tar"));
    if !tar.exists() {
        debootstrap(&suite, &tar, detail)?;
    }
    detail.now("importing it");
    let label = format!("LABEL sidewarden.recipe={recipe}");
    docker
        .run(["import", "--change", "ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin", "--change", &label])
        .args([tar.as_os_str(), SERVICES.as_ref()])
        .limit(Duration::from_secs(300))
        .output()?;
    Ok(())
}

fn debootstrap(suite: &str, tar: &Path, detail: &Detail<'_>) -> Result<()> {
    let Some(root) = Root::find() else {
        bail!(
            "debootstrap needs root; run this once: sudo tests/images/services.sh {suite} {MIRROR} '{}'",
            tar.display()
        );
    };
    let script = workspace::root().join("tests/images/services.sh");
    let output = root
        .run("sh", [&*script.to_string_lossy(), suite, MIRROR, &*tar.to_string_lossy()])
        .limit(Duration::from_secs(1800));
    output.output_with(|line| detail.now(line))?;
    Ok(())
}

const MIRROR: &str = "http://deb.debian.org/debian";

/// The Debian release of the servers: this machine's own, or a fixed one when it is not a Debian.
fn suite(os_release: &str) -> String {
    let value = |key: &str| {
        let line = os_release.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
        line.map(|v| v.trim_matches('"').to_owned())
    };
    match (value("ID").as_deref(), value("VERSION_CODENAME")) {
        (Some("debian"), Some(suite)) => suite,
        _ => "bookworm".into(),
    }
}

/// Makes the images that hold our programs.
pub fn programs(docker: &Docker, programs: &Programs, detail: &Detail<'_>) -> Result<()> {
    let context = context(programs)?;
    for (target, image) in [("agent", AGENT), ("collector", COLLECTOR), ("intercept", INTERCEPT)] {
        detail.now(image);
        build(docker, &workspace::root().join("deploy/Dockerfile"), &["--target", target], image, &context)?;
    }
    detail.now(VISITOR);
    build(docker, &workspace::root().join("deploy/scene/visitor.Dockerfile"), &[], VISITOR, &context)
}

fn build(docker: &Docker, file: &Path, args: &[&str], image: &str, context: &Path) -> Result<()> {
    docker
        .run(["build", "--quiet", "--tag", image, "--file"])
        .args([file])
        .args(args)
        .args([context])
        .limit(Duration::from_secs(300))
        .output()?;
    Ok(())
}

/// A folder with nothing but what goes into the images. The agent's file can be run and not read: such a process is
/// non-dumpable from its first instruction.
fn context(programs: &Programs) -> Result<PathBuf> {
    let dir = workspace::folder("context")?;
    std::fs::create_dir_all(dir.join("data"))?;
    for (program, mode) in [(&programs.agent, 0o711), (&programs.collector, 0o755)] {
        let name = program.file_name().context("a program without a name")?;
        let copy = dir.join(name);
        std::fs::copy(program, &copy).with_context(|| format!("copying {}", program.display()))?;
        std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(mode))?;
    }
    nft(&dir.join("nft"))?;
    Ok(dir)
}

/// This machine's `nft` with the libraries it loads, each where it looks for them.
fn nft(dir: &Path) -> Result<()> {
    let program = packages::find("nft")?;
    let loaded = run("ldd", [&program]).output()?;
    for file in libraries(&loaded).into_iter().chain(["/usr/sbin/nft".into()]) {
        let from = if file.ends_with("sbin/nft") { program.clone() } else { file.clone() };
        let copy = dir.join(file.strip_prefix("/").unwrap_or(&file));
        std::fs::create_dir_all(copy.parent().unwrap_or(dir))?;
        std::fs::copy(&from, &copy).with_context(|| format!("copying {}", from.display()))?;
    }
    Ok(())
}

/// The paths in what `ldd` prints.
fn libraries(ldd: &str) -> Vec<PathBuf> {
    ldd.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

fn label_of(docker: &Docker, image: &str, label: &str) -> String {
    let format = format!("{{{{index .Config.Labels {label:?}}}}}");
    let found = docker.run(["image", "inspect", "--format", &format, image]).output();
    found.unwrap_or_default().trim().to_owned()
}

/// The regular files of `image`, with mode and owner; those that the engine puts into every container left out.
pub fn files(docker: &Docker, image: &str) -> Result<Vec<String>> {
    let container = docker.run(["create", image]).output()?.trim().to_owned();
    let tar = workspace::folder("images")?.join(format!("{container}.tar"));
    let exported = docker.run(["export", &container, "--output"]).args([&tar]).output();
    docker.run(["rm", "--volumes", &container]).despite_interrupt().output()?;
    exported?;
    let list = run("tar", ["--list", "--verbose", "--numeric-owner", "--file"]).args([&tar]).output()?;
    std::fs::remove_file(&tar)?;
    Ok(list.lines().filter_map(regular_file).collect())
}

/// `-rwxr-xr-x 0/0 12345 2026-01-01 00:00 usr/bin/x` without size and time.
fn regular_file(line: &str) -> Option<String> {
    const OF_THE_ENGINE: [&str; 5] = [".dockerenv", "etc/hosts", "etc/hostname", "etc/resolv.conf", "dev/console"];
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [mode, owner, _size, _day, _time, name] = fields[..] else { return None };
    let ours = mode.starts_with('-') && !OF_THE_ENGINE.contains(&name);
    ours.then(|| format!("{mode} {owner} {name}"))
}

fn fingerprint(of: &impl Hash) -> String {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_listed_without_what_the_engine_adds() {
        for (line, expected) in [
            ("-rwx--x--x 0/0 10 2026-01-01 00:00 usr/bin/a", Some("-rwx--x--x 0/0 usr/bin/a")),
            ("-rwxr-xr-x 0/0 0 2026-01-01 00:00 .dockerenv", None),
            ("drwxr-xr-x 0/0 0 2026-01-01 00:00 usr/", None),
            ("", None),
        ] {
            assert_eq!(regular_file(line).as_deref(), expected, "{line}");
        }
    }

    #[test]
    fn libraries_are_those_with_a_path() {
        let ldd = "\tlinux-vdso.so.1 (0x00007fdf)\n\tlibmnl.so.0 => /lib/x86_64-linux-gnu/libmnl.so.0 (0x00007f)\n\
                   \t/lib64/ld-linux-x86-64.so.2 (0x00007fdf)\n";
        let expected = ["/lib/x86_64-linux-gnu/libmnl.so.0", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(libraries(ldd), expected);
    }

    #[test]
    fn the_servers_are_of_this_machines_debian() {
        for (text, expected) in [
            ("ID=debian\nVERSION_CODENAME=trixie\n", "trixie"),
            ("ID=ubuntu\nVERSION_CODENAME=noble\n", "bookworm"),
            ("", "bookworm"),
        ] {
            assert_eq!(suite(text), expected, "{text:?}");
        }
    }
}
