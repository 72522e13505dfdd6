//! The scene of `deploy/compose.yaml`, under a project name of its own: started as the README tells its readers to,
//! and taken down whatever happens.

use std::collections::HashSet;
use std::fs::{self, Permissions};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::command::Run;
use crate::docker::Docker;
use crate::events::Events;
use crate::images;
use crate::interrupt::{self, poll};
use crate::progress::Progress;
use crate::workspace;

/// The workloads of the scene that have an agent.
pub const WORKLOADS: &[&str] = &["web", "orders", "db", "visitor"];

/// How long the collector may take to answer, and the shop to open.
const COLLECTOR_LIMIT: Duration = Duration::from_secs(60);
const SHOP_LIMIT: Duration = Duration::from_secs(120);

/// A running scene; taken down when it is dropped.
#[derive(Debug)]
pub struct Scene {
    /// The engine it runs in.
    pub docker: Docker,
    /// What it published on this machine's loopback.
    pub ports: Ports,
    project: String,
    dir: PathBuf,
}

/// Ports on this machine's loopback.
#[derive(Clone, Copy, Debug)]
pub struct Ports {
    /// The collector's page and API, HTTPS.
    pub page: u16,
    /// The collector's metrics, plain.
    pub metrics: u16,
    /// Alertmanager.
    pub alertmanager: u16,
}

impl Ports {
    /// The usual ones, or others where those are taken.
    pub fn free() -> Result<Ports> {
        Ok(Ports { page: free(7444)?, metrics: free(7445)?, alertmanager: free(9093)? })
    }

    /// Any: for tests, of which several may run.
    pub fn any() -> Result<Ports> {
        Ok(Ports { page: free(0)?, metrics: free(0)?, alertmanager: free(0)? })
    }
}

fn free(usual: u16) -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", usual)).or_else(|_| TcpListener::bind("127.0.0.1:0"))?;
    Ok(listener.local_addr()?.port())
}

impl Scene {
    /// Clears what an earlier run under this name may have left, and makes ready.
    pub fn prepare(docker: Docker, project: &str, ports: Ports) -> Result<Scene> {
        let dir = workspace::folder(project)?;
        let scene = Scene { docker, ports, project: project.into(), dir };
        scene.clear()?;
        scene.make_folders()?;
        fs::write(scene.env_file(), scene.environment())?;
        Ok(scene)
    }

    /// Starts the collector, has it make a token for each workload, then starts everything, and waits until the shop is
    /// open. Gives the collector's events from its start on.
    pub fn start(&self, progress: &Progress) -> Result<Events> {
        progress.step("starting the collector and Alertmanager", |_| self.start_collector())?;
        progress.step("a token for each workload, then the shop with its agents", |_| {
            WORKLOADS.iter().try_for_each(|name| self.issue_token(name))?;
            self.compose(["up", "--detach"]).limit(Duration::from_secs(300)).output()?;
            Ok(())
        })?;
        // Not before all is up: a busy engine has been seen to end an exec of its own accord while it starts containers.
        let events = self.follow()?;
        progress.step("waiting until every agent has its identity and the shop answers", |detail| {
            for name in WORKLOADS {
                detail.now(name);
                self.await_agent(&events, name)?;
            }
            detail.now("the first answer");
            self.await_shop()
        })?;
        Ok(events)
    }

    /// The collector and Alertmanager alone.
    pub fn start_collector(&self) -> Result<()> {
        let up = self.compose(["up", "--detach", "collector", "alertmanager"]);
        up.limit(Duration::from_secs(300)).output()?;
        self.await_collector()
    }

    /// Waits until the collector answers.
    pub fn await_collector(&self) -> Result<()> {
        let healthy = poll(COLLECTOR_LIMIT, Duration::from_millis(100), || self.collector(["health"]).output().ok())?;
        if healthy.is_none() {
            bail!("the collector is not healthy after {COLLECTOR_LIMIT:?}:\n{}", self.logs("collector"));
        }
        Ok(())
    }

    /// The collector's events, from the last ones on.
    pub fn follow(&self) -> Result<Events> {
        Events::follow(&self.docker, &self.container("collector")?)
    }

    /// Puts an enrolment token where the workload's agent looks for it.
    pub fn issue_token(&self, name: &str) -> Result<()> {
        let workload = format!("shop/{name}");
        let token = self.collector(["token", "create", "--workload", &workload]).output()?;
        let file = self.tokens().join(name).join("token");
        fs::write(&file, token.trim()).with_context(|| format!("writing {}", file.display()))?;
        // The agent is another uid, without the power to read everybody's files; the folder above is closed to others.
        fs::set_permissions(&file, Permissions::from_mode(0o644))?;
        Ok(())
    }

    fn await_agent(&self, events: &Events, name: &str) -> Result<()> {
        let workload = format!("shop/{name}");
        let here = events.wait(0, SHOP_LIMIT, |e| {
            e.kind == "agent.connected" && (e.of(&workload) || e.text("workload").ends_with(&format!("/{workload}")))
        })?;
        let agent = if name == "visitor" { name.to_owned() } else { format!("{name}-agent") };
        here.map(|_| ()).with_context(|| format!("no agent of {workload} came:\n{}", self.logs(&agent)))
    }

    fn await_shop(&self) -> Result<()> {
        let open = poll(SHOP_LIMIT, Duration::from_millis(100), || {
            self.logs("visitor").contains("the shop answers").then_some(())
        })?;
        open.with_context(|| format!("the visitor gets no answer of the shop:\n{}", self.logs("visitor")))
    }

    /// `sidewarden-collector …` in the collector's container.
    pub fn collector<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Run {
        let container = self.container("collector").unwrap_or_default();
        self.docker.run(["exec", &container, "/usr/bin/sidewarden-collector"]).args(args)
    }

    /// `docker compose …` of this scene.
    pub fn compose<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Run {
        let file = workspace::root().join("deploy/compose.yaml");
        self.docker
            .compose(["--project-name", &self.project])
            .args([Path::new("--file"), &file, Path::new("--env-file"), &self.env_file()])
            .args(args)
    }

    /// The container of a service of the scene.
    pub fn container(&self, service: &str) -> Result<String> {
        let project = format!("label=com.docker.compose.project={}", self.project);
        let service_label = format!("label=com.docker.compose.service={service}");
        let list = ["container", "ls", "--all", "--quiet", "--filter", &project, "--filter", &service_label];
        let ids = self.docker.run(list).output()?;
        ids.lines().next().map(str::to_owned).with_context(|| format!("no container of {service}"))
    }

    /// Its address on the scene's network.
    pub fn address(&self, service: &str) -> Result<Ipv4Addr> {
        let container = self.container(service)?;
        let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
        let address = self.docker.run(["container", "inspect", "--format", format, &container]).output()?;
        address.trim().parse().with_context(|| format!("{service} has no address"))
    }

    /// The addresses of all agents, between which everything should be sealed.
    pub fn addresses(&self) -> Result<HashSet<Ipv4Addr>> {
        let agents = ["web-agent", "orders-agent", "db-agent", "visitor"];
        agents.into_iter().map(|agent| self.address(agent)).collect()
    }

    /// The last lines of a service's log.
    pub fn logs(&self, service: &str) -> String {
        let said = self.container(service).and_then(|c| self.docker.run(["logs", "--tail", "30", &c]).finish());
        said.map_or_else(|error| format!("{error:#}"), |done| done.stdout + &done.stderr)
    }

    /// What there is to say when something went wrong: which containers run, and the last lines of all.
    pub fn state(&self) -> String {
        let services = ["collector", "web-agent", "web", "orders-agent", "orders", "db-agent", "db", "visitor"];
        let filter = format!("label=com.docker.compose.project={}", self.project);
        let list = self.docker.run(["container", "ls", "--all", "--filter", &filter]).output();
        let logs = services.map(|service| format!("--- {service}\n{}", self.logs(service)));
        format!("{}{}", list.unwrap_or_default(), logs.concat())
    }

    /// Has the visitor ask the shop for `path`, and gives what it was answered: the way through every hop. The visitor
    /// tries again while the shop does not answer; `None` when it never did within `limit`.
    pub fn visit(&self, path: &str, limit: Duration) -> Result<Option<String>> {
        self.wish(path)?;
        let begin = format!("visited {path} -> ");
        let answer = |logs: String| logs.lines().rev().find_map(|line| line.strip_prefix(&begin).map(str::to_owned));
        poll(limit, Duration::from_millis(50), || answer(self.logs("visitor")))
    }

    fn wish(&self, path: &str) -> Result<()> {
        // Renamed into place: the visitor never reads half a path.
        let dir = self.tokens().join("visitor-next");
        fs::write(dir.join("next.new"), path)?;
        fs::set_permissions(dir.join("next.new"), Permissions::from_mode(0o644))?;
        fs::rename(dir.join("next.new"), dir.join("next"))?;
        Ok(())
    }

    /// Makes a container of the visitor's image with an agent in `exec` mode that enrols as shop/`name`, with more
    /// `options` for Docker; not started yet. It is taken down with the scene.
    pub fn create_wrapped(&self, name: &str, options: &[&str], command: &[&str]) -> Result<String> {
        fs::create_dir_all(self.tokens().join(name))?;
        open_to_agents(&self.tokens().join(name))?;
        self.issue_token(name)?;
        let config = workspace::root().join(format!("deploy/scene/{name}.toml"));
        let mounts =
            [bind(&config, "/etc/sidewarden/agent.toml:ro"), bind(&self.tokens().join(name), "/run/sidewarden")];
        let network = format!("{}_shop", self.project);
        let create = self
            .docker
            .run(["create", "--label", &self.label(), "--network", &network, "--hostname", &format!("{name}-1")])
            .args(mounts.iter().flat_map(|m| ["--volume", m]))
            .args(options)
            .args([images::VISITOR, "exec", "--config", "/etc/sidewarden/agent.toml", "--"])
            .args(command);
        Ok(create.output()?.trim().to_owned())
    }

    /// Where the page is, with the token that opens it.
    pub fn page(&self) -> Result<String> {
        let file = self.dir.join("admin.token");
        let source = format!("{}:/var/lib/sidewarden/admin.token", self.container("collector")?);
        self.docker.run(["cp", &source]).args([&file]).output()?;
        let token = fs::read_to_string(&file).context("reading the admin token")?;
        fs::remove_file(&file)?;
        Ok(format!("https://127.0.0.1:{}/#token={}", self.ports.page, token.trim()))
    }

    /// The metrics of the collector.
    pub fn metrics(&self) -> SocketAddr {
        loopback(self.ports.metrics)
    }

    /// The Alertmanager.
    pub fn alertmanager(&self) -> SocketAddr {
        loopback(self.ports.alertmanager)
    }

    /// A folder for what a test or an attacker makes.
    pub fn scratch(&self) -> PathBuf {
        self.dir.join("scratch")
    }

    fn tokens(&self) -> PathBuf {
        self.dir.join("tokens")
    }

    fn env_file(&self) -> PathBuf {
        self.dir.join("compose.env")
    }

    fn label(&self) -> String {
        format!("sidewarden.project={}", self.project)
    }

    fn environment(&self) -> String {
        let Ports { page, metrics, alertmanager } = self.ports;
        format!(
            "SIDEWARDEN_TOKENS={}\nSIDEWARDEN_PAGE_PORT={page}\nSIDEWARDEN_METRICS_PORT={metrics}\nSIDEWARDEN_ALERTMANAGER_PORT={alertmanager}\n",
            self.tokens().display()
        )
    }

    /// Each agent gets a folder that it may empty; all of them lie in one that nobody else on this machine may enter.
    fn make_folders(&self) -> Result<()> {
        // What agents left belongs to their uid; the folder is ours, so it can be renamed away and replaced.
        if self.dir.join("tokens").exists() {
            fs::remove_dir_all(self.tokens())?;
        }
        fs::create_dir_all(self.tokens())?;
        fs::set_permissions(self.tokens(), Permissions::from_mode(0o700))?;
        for name in WORKLOADS.iter().chain(&["visitor-next"]) {
            fs::create_dir(self.tokens().join(name))?;
            open_to_agents(&self.tokens().join(name))?;
        }
        Ok(())
    }

    /// Takes everything down.
    pub fn clear(&self) -> Result<()> {
        self.docker.remove_labelled(&self.label())?;
        self.docker.remove_labelled(&format!("com.docker.compose.project={}", self.project))
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if let Err(error) = self.clear() {
            eprintln!("the scene could not be taken down: {error:#}");
            eprintln!("what is left has the label com.docker.compose.project={}", self.project);
        }
    }
}

fn open_to_agents(dir: &Path) -> Result<()> {
    Ok(fs::set_permissions(dir, Permissions::from_mode(0o777))?)
}

fn bind(source: &Path, target: &str) -> String {
    format!("{}:{target}", source.display())
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

/// Waits until Ctrl-C.
pub fn stay() {
    while !interrupt::requested() {
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_replaced_by_a_free_one() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        assert_ne!(free(port).unwrap(), port);
    }
}
