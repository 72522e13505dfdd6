//! The Debian packages that are needed, and how they get onto the machine: by apt-get when we may, otherwise by one
//! line that says what to run.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::command::{Run, run};
use crate::progress::{Detail, Progress};

/// A program that is needed, and the packages it comes in: those of these that this release of Debian has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needed {
    /// Its name in PATH.
    pub program: &'static str,
    /// Its packages.
    pub packages: &'static [&'static str],
}

const fn needed(program: &'static str, packages: &'static [&'static str]) -> Needed {
    Needed { program, packages }
}

/// For the demo. Since Debian 13 the command `docker` is a package of its own.
pub const DEMO: &[Needed] = &[
    needed("docker", &["docker.io", "docker-cli"]),
    needed("dockerd", &["docker.io"]),
    needed("docker-compose", &["docker-compose"]),
    needed("debootstrap", &["debootstrap"]),
    needed("openssl", &["openssl"]),
    needed("nft", &["nftables"]),
    needed("ip", &["iproute2"]),
];

/// For the tests, besides those of the demo.
pub const TESTS: &[Needed] = &[
    needed("prometheus", &["prometheus"]),
    needed("promtool", &["prometheus"]),
    needed("prometheus-alertmanager", &["prometheus-alertmanager"]),
    needed("chromium", &["chromium"]),
    needed("curl", &["curl"]),
    needed("squid", &["squid"]),
    // Servers and clients whose connections are led through a pair of agents, unchanged.
    needed("mariadbd", &["mariadb-server-core"]),
    needed("mariadb", &["mariadb-client-core"]),
    needed("mariadb-slap", &["mariadb-client"]),
    needed("sysbench", &["sysbench"]),
    needed("postgres", &["postgresql"]),
    needed("psql", &["postgresql-client"]),
    needed("redis-server", &["redis-server"]),
    needed("redis-benchmark", &["redis-tools"]),
    needed("nginx", &["nginx-light"]),
    needed("catalina.sh", &["tomcat10"]),
    needed("activemq", &["activemq"]),
    needed("nats-server", &["nats-server"]),
    needed("h2load", &["nghttp2-client"]),
    needed("wrk", &["wrk"]),
    // A load balancer in front of an agent.
    needed("haproxy", &["haproxy"]),
    // Clocks that jump.
    needed(FAKETIME, &["faketime"]),
    // What looks at a TLS port from outside.
    needed("testssl", &["testssl.sh"]),
    needed("sslscan", &["sslscan"]),
    // For the clients that Debian does not have; see `python`.
    needed("python3", &["python3"]),
    needed(PIP, &["python3-venv"]),
    needed(PROTON, &["python3-qpid-proton"]),
];

/// Says by being there that `python3 -m venv` works.
const PIP: &str = "ensurepip/__main__.py";
/// A clock for one process.
pub const FAKETIME: &str = "faketime/libfaketimeMT.so.1";
/// Client and server of AMQP 1.0, for Debian's own Python.
pub const PROTON: &str = "dist-packages/proton/__init__.py";

/// Installs what is not there.
pub fn provide(needed: &[Needed], progress: &Progress) -> Result<()> {
    let missing: Vec<Needed> = needed.iter().copied().filter(|n| !present(n)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = names(&missing);
    if run("apt-get", ["--version"]).output().is_err() {
        bail!("this needs Debian's packages {}: install them, then run this again", names.join(", "));
    }
    let Some(root) = Root::find() else {
        bail!("some packages are missing; run this once: sudo apt-get install {}", names.join(" "));
    };
    progress.step(&format!("installing {}", names.join(", ")), |detail| install(root, &missing, detail))?;
    match missing.iter().find(|n| !present(n)) {
        Some(absent) => bail!("apt-get installed {}, and still there is no `{}`", names.join(", "), absent.program),
        None => Ok(()),
    }
}

fn present(needed: &Needed) -> bool {
    let compose_plugin = needed.program == "docker-compose" && run("docker", ["compose", "version"]).output().is_ok();
    compose_plugin || in_path(needed.program, &std::env::var("PATH").unwrap_or_default())
}

/// Where `program` is; an error says what to install.
pub fn find(program: &str) -> Result<PathBuf> {
    if let Some(path) = look(program, &std::env::var("PATH").unwrap_or_default()) {
        return Ok(path);
    }
    match DEMO.iter().chain(TESTS).find(|needed| needed.program == program) {
        Some(needed) => bail!(
            "there is no `{program}`: install Debian's package {} (`cargo verify` does it)",
            needed.packages.join(" or ")
        ),
        None => bail!("there is no `{program}`"),
    }
}

/// Whether `program` is in one of the folders of `path`, or where Debian keeps what is not in PATH.
fn in_path(program: &str, path: &str) -> bool {
    look(program, path).is_some()
}

fn look(program: &str, path: &str) -> Option<PathBuf> {
    let apart = elsewhere();
    let folders =
        path.split(':').filter(|dir| !dir.is_empty()).map(Path::new).chain(apart.iter().map(PathBuf::as_path));
    folders.map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// Folders of programs that are not in everybody's PATH: root's, each release of PostgreSQL, Tomcat, Python's modules.
fn elsewhere() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = ["/usr/sbin", "/sbin", "/usr/share/tomcat10/bin"].map(PathBuf::from).into();
    folders.extend(children("/usr/lib/postgresql").map(|release| release.join("bin")));
    folders.extend(children("/usr/lib").filter(|dir| dir.to_string_lossy().ends_with("-linux-gnu")));
    folders.extend(children("/usr/lib").filter(|dir| dir.to_string_lossy().starts_with("/usr/lib/python3")));
    folders
}

fn children(dir: &str) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn names(missing: &[Needed]) -> Vec<&'static str> {
    let mut names: Vec<_> = missing.iter().flat_map(|n| n.packages).copied().collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn install(root: Root, missing: &[Needed], detail: &Detail<'_>) -> Result<()> {
    detail.now("reading the package lists");
    let wait_for_lock = "DPkg::Lock::Timeout=300";
    root.run("apt-get", ["-o", wait_for_lock, "update"]).limit(Duration::from_secs(600)).output()?;
    let packages: Vec<_> = names(missing).into_iter().filter(|name| known_to_apt(name)).collect();
    detail.now("downloading and unpacking");
    root.run("env", ["DEBIAN_FRONTEND=noninteractive", "apt-get", "-o", wait_for_lock])
        .args(["install", "--yes", "--no-install-recommends"])
        .args(packages)
        .limit(Duration::from_secs(1800))
        .output()?;
    Ok(())
}

fn known_to_apt(package: &str) -> bool {
    let policy = run("apt-cache", ["policy", package]).output().unwrap_or_default();
    policy.lines().any(|l| l.trim_start().starts_with("Candidate:") && !l.contains("(none)"))
}

/// How we get root's power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// We are root.
    Already,
    /// `sudo` asks for no password.
    Sudo,
}

impl Root {
    /// `None` when we may not.
    pub fn find() -> Option<Root> {
        if nix::unistd::Uid::effective().is_root() {
            return Some(Root::Already);
        }
        run("sudo", ["-n", "true"]).output().is_ok().then_some(Root::Sudo)
    }

    /// `program`, as root.
    pub fn run<'a>(self, program: &'a str, args: impl IntoIterator<Item = &'a str>) -> Run {
        match self {
            Root::Already => run(program, args),
            Root::Sudo => run("sudo", ["-n", program]).args(args).in_our_group(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_asked_for_once() {
        assert_eq!(names(&DEMO[..2]), ["docker-cli", "docker.io"]);
    }

    #[test]
    fn a_program_is_looked_for_in_path_and_where_roots_are() {
        for (program, path, there) in [("sh", "/bin", true), ("sh", "", false), ("no-such-program", "/bin", false)] {
            assert_eq!(in_path(program, path), there, "{program} in {path:?}");
        }
    }
}
