//! Interception as a user sets it up: the agent and its workload in real containers, the rules by the one-shot image that
//! has CAP_NET_ADMIN and nothing else, and somebody in another container.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sidewarden_tests::command::Done;
use sidewarden_tests::docker::Docker;
use sidewarden_tests::interrupt::poll;
use sidewarden_tests::{images, stage, workspace};

const LIMIT: Duration = Duration::from_secs(60);

const SETTINGS: &str = "[collector]
addresses = ['127.0.0.1:1']
[intercept]
gid = 13100
inbound = 'lock'
[[inbound]]
listen = '0.0.0.0:8443'
to = '127.0.0.1:8080'
allow = ['spiffe://td/shop/web']
";

/// What nothing here needs.
const HARDENED: [&str; 5] = ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--read-only"];

/// Asks the address that is its first argument for a page, and prints what comes.
const ASK: &str = "import socket, sys
try:
    s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)
    s.sendall(b'GET / HTTP/1.0\\r\\n\\r\\n')
    print(s.recv(100))
except OSError as e:
    print(type(e).__name__)
";

/// An agent with its workload, on a network of their own.
struct Pod {
    docker: Docker,
    name: String,
    settings: String,
    agent: String,
}

impl Pod {
    fn start(docker: Docker) -> Result<Pod> {
        let name = workspace::own_name("sidewarden-test-interception");
        let settings = workspace::folder(&name)?.join("agent.toml");
        std::fs::write(&settings, SETTINGS)?;
        let settings = format!("{}:/etc/sidewarden/agent.toml:ro", settings.display());
        let mut pod = Pod { docker, name, settings, agent: String::new() };
        pod.clear()?;
        pod.docker.run(["network", "create", "--label", &pod.label(), &pod.name]).output()?;
        let network = pod.name.clone();
        pod.agent = pod.run(
            &[
                "--network",
                &network,
                "--user",
                "0:13100",
                "--cap-add",
                "SYS_PTRACE",
                "--env",
                "SIDEWARDEN_LOG_LEVEL=debug",
            ],
            &[images::AGENT],
        )?;
        Ok(pod)
    }

    fn label(&self) -> String {
        format!("sidewarden.test={}", self.name)
    }

    /// Starts a hardened container; its id.
    fn run(&self, options: &[&str], image: &[&str]) -> Result<String> {
        let run = self.docker.run(["run", "--detach", "--label", &self.label(), "--volume", &self.settings]);
        Ok(run.args(HARDENED).args(options).args(image).output()?.trim().to_owned())
    }

    /// A container that shares the agent's network and PID namespace.
    fn join(&self, options: &[&str], image: &[&str]) -> Result<String> {
        let own = format!("container:{}", self.agent);
        self.run(&[&["--network", &own, "--pid", &own][..], options].concat(), image)
    }

    /// The one-shot; what it said.
    fn intercept(&self, action: &str, grants: &[&str]) -> Result<(Option<i32>, String)> {
        let own = format!("container:{}", self.agent);
        let run = self.docker.run(["run", "--rm", "--label", &self.label(), "--volume", &self.settings]);
        let Done { status, stdout, stderr } = run
            .args(HARDENED)
            .args(["--network", &own, "--pid", &own])
            .args(grants)
            .args([images::INTERCEPT, action])
            .finish()?;
        Ok((status.code(), stdout + &stderr))
    }

    /// What somebody in another container is told at `port` of the pod.
    fn asked_from_outside(&self, port: &str) -> Result<String> {
        let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
        let address = self.docker.run(["container", "inspect", "--format", format, &self.agent]).output()?;
        let run = self.docker.run(["run", "--rm", "--label", &self.label(), "--network", &self.name]);
        run.args([images::SERVICES, "python3", "-c", ASK, address.trim(), port]).output()
    }

    /// Waits until the agent's log has a line with all of `parts`.
    fn agent_tells(&self, parts: &[&str]) -> Result<()> {
        let log = || Some(self.docker.run(["logs", &self.agent]).finish().ok()?.stderr);
        let tells = || log()?.lines().any(|line| parts.iter().all(|part| line.contains(part))).then_some(());
        let told = poll(LIMIT, Duration::from_millis(200), tells)?;
        told.with_context(|| format!("no line with {parts:?} in\n{}", log().unwrap_or_default()))
    }

    fn clear(&self) -> Result<()> {
        self.docker.remove_labelled(&self.label())
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Err(error) = self.clear() {
            eprintln!("the containers could not be removed, they have the label {}: {error:#}", self.label());
        }
    }
}

const NET_ADMIN: &[&str] = &["--cap-add", "NET_ADMIN"];

#[test]
fn the_one_shot_locks_a_workload_and_only_the_agent_can_be_reached() -> Result<()> {
    let Some(docker) = stage::for_test("interception")? else { return Ok(()) };
    let pod = Pod::start(docker)?;
    pod.join(&["--user", "10001:10001"], &[images::SERVICES, "python3", "-m", "http.server", "8080"])?;
    // The owner is told by the descriptors of its process, which CAP_SYS_PTRACE alone opens to nobody else.
    pod.agent_tells(&[
        "listener.exposed",
        "0.0.0.0:8080/tcp of python3 (pid ",
        "uid 10001",
        "it answered a TLS hello",
    ])?;
    ensure!(pod.asked_from_outside("8080")?.contains("200 OK"), "the workload cannot be reached before");

    let (code, told) = pod.intercept("install", &[])?;
    ensure!(code == Some(1) && told.contains("CAP_NET_ADMIN"), "{code:?} {told}");
    let (code, told) = pod.intercept("install", NET_ADMIN)?;
    ensure!(code == Some(0) && told.contains("is in force"), "{code:?} {told}");

    let told = pod.asked_from_outside("8080")?;
    ensure!(!told.contains("200 OK"), "the workload answers: {told}");
    pod.agent_tells(&["connection.refused", ":8080", "direct to service: sent `GET / HTTP/1.0`"])?;
    pod.agent_tells(&["listener.closed", "0.0.0.0:8080/tcp", "kept off by the rules"])?;
    pod.asked_from_outside("8443")?;
    pod.agent_tells(&["connection.refused", "0.0.0.0:8443: "])?;
    let (code, told) = pod.intercept("verify", NET_ADMIN)?;
    ensure!(code == Some(0) && told.contains("has group 13100") && told.contains("can get past"), "{code:?} {told}");

    // What Docker gives to a container that nobody hardened is enough to get past any rule.
    let own = format!("container:{}", pod.agent);
    let careless = ["run", "--detach", "--label", &pod.label(), "--network", &own, "--pid", &own, images::SERVICES];
    let careless = pod.docker.run(careless).args(["sleep", "600"]).output()?;
    pod.agent_tells(&["interception.broken", "(sleep) has CAP_SETGID"])?;
    let (code, told) = pod.intercept("verify", NET_ADMIN)?;
    ensure!(code == Some(1) && told.contains("(sleep) has CAP_SETGID and 1 more"), "{code:?} {told}");
    pod.docker.run(["rm", "--force", careless.trim()]).output()?;

    let (code, told) = pod.intercept("remove", NET_ADMIN)?;
    ensure!(code == Some(0) && told.contains("is removed"), "{code:?} {told}");
    ensure!(pod.asked_from_outside("8080")?.contains("200 OK"), "the workload cannot be reached afterwards");
    pod.agent_tells(&["interception.broken", "not in force in this network namespace"])
}
