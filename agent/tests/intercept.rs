//! The packet rules and the watch over listeners, on real network namespaces with a wire between them: somebody outside,
//! and a workload with its agent inside.

mod netns;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use netns::{Net, Server, Space, connect, provided};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

const GID: u32 = 13100;
/// By then whatever is waited for has happened, or never will.
const LIMIT: Duration = Duration::from_secs(30);

/// An agent's settings, in a folder of their own.
struct Settings(TempDir);

impl Settings {
    fn new(more: &str) -> Settings {
        let dir = TempDir::new().unwrap();
        // Whoever runs the agent must be able to write here.
        let text = format!(
            "data_dir = '{}/data'\ninstance = 'c1'\ncollector.addresses = ['127.0.0.1:1']\ntimeouts.drain = '1s'\n{more}",
            dir.path().display()
        );
        std::fs::write(dir.path().join("agent.toml"), text).unwrap();
        Settings(dir)
    }

    /// With the workload's port 8080 behind the agent's 8443, locked.
    fn locked(more: &str) -> Settings {
        Settings::new(&format!(
            "[intercept]\ngid = {GID}\ninbound = 'lock'\n[[inbound]]\nlisten = '[::]:8443'\nto = '127.0.0.1:8080'\n\
             allow = ['spiffe://td/shop/web']\n{more}"
        ))
    }

    fn agent(&self, words: &[&str]) -> Command {
        self.command(env!("CARGO_BIN_EXE_sidewarden-agent").as_ref(), words)
    }

    fn command(&self, program: &Path, words: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(words).arg("--config").arg(self.0.path().join("agent.toml"));
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::null());
        command
    }

    /// `intercept …` within `space`: its exit code, and what it said.
    fn intercept(&self, space: &Space, action: &str) -> (i32, String) {
        said(space, self.agent(&["intercept", action]))
    }

    /// The agent itself, with `gid`.
    fn start(&self, space: &Space, gid: u32) -> Agent {
        let mut command = self.agent(&["sidecar", "--log-level", "info,sidewarden_agent=debug"]);
        command.gid(gid).stderr(Stdio::piped());
        let mut child = space.run(|| command.spawn().unwrap());
        let (sender, lines) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let mut agent = Agent { child, lines, told: Vec::new() };
        agent.tells("accepts connections");
        agent
    }
}

fn said(space: &Space, mut command: Command) -> (i32, String) {
    let output = space.run(|| command.output().unwrap());
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8(text).unwrap())
}

/// A running agent, and what it logs.
struct Agent {
    child: Child,
    lines: Receiver<String>,
    told: Vec<String>,
}

impl Agent {
    /// Waits for a line with all of these, divided by ` … `.
    fn tells(&mut self, parts: &str) -> String {
        let is = |line: &str| parts.split(" … ").all(|part| line.contains(part));
        loop {
            match self.lines.recv_timeout(LIMIT) {
                Ok(line) if is(&line) => return line,
                Ok(line) => self.told.push(line),
                Err(error) => panic!("no line with `{parts}` ({error}) among\n{}", self.told.join("\n")),
            }
        }
    }

    fn has_told(&self, part: &str) -> bool {
        self.told.iter().any(|line| line.contains(part))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

const REFUSED: Result<String, ErrorKind> = Err(ErrorKind::ConnectionRefused);

fn plain() -> Result<String, ErrorKind> {
    Ok("plain".into())
}

#[test]
fn what_is_locked_is_reached_through_the_agent_alone_until_the_rules_are_removed() {
    let Some(()) = provided("lock", &["ip", "nft"]) else { return };
    let net = Net::new();
    let settings = Settings::locked("[[declared.plaintext]]\nport = 9000\nreason = 'an old client'\n");
    let _servers = ["[::]:8080", "[::]:7777", "[::]:9000"].map(|address| Server::plain(&net.inside, address));
    let _udp = Server::udp(&net.inside, "[::]:5353");
    let everywhere = |port: u16| netns::INSIDE.map(|ip| net.outside.ask(&at(ip, port)));
    for port in [8080, 7777, 9000] {
        assert_eq!(everywhere(port), [plain(), plain()], "{port}");
    }
    assert!(net.outside.ask_udp("10.83.0.1:5353") && net.outside.ask_udp("[fd83::1]:5353"));

    let (code, told) = settings.intercept(&net.inside, "verify");
    assert!(code == 1 && told.contains("run `intercept install`"), "{told}");
    let (code, told) = settings.intercept(&net.inside, "install");
    assert!(code == 0 && told.contains("nothing else can be reached from outside"), "{told}");

    assert_eq!(everywhere(8080), [REFUSED, REFUSED], "nobody refuses there yet");
    let mut agent = settings.start(&net.inside, GID);
    for (ip, from) in netns::INSIDE.into_iter().zip(netns::OUTSIDE) {
        assert_ne!(net.outside.ask(&at(ip, 8080)), plain());
        agent.tells(&format!("connection.refused … {from} … {}: direct to service: sent `hello`", at(ip, 8080)));
        assert!(net.outside.run(|| connect(&at(ip, 8443))).is_ok(), "the agent is there");
    }
    assert_eq!(everywhere(7777), [REFUSED, REFUSED]);
    assert_eq!(everywhere(9000), [plain(), plain()], "it is declared");
    assert!(!net.outside.ask_udp("10.83.0.1:5353") && !net.outside.ask_udp("[fd83::1]:5353"));
    assert_eq!(net.inside.ask("127.0.0.1:8080"), plain(), "loopback is the agent's way to the workload");
    let _far = Server::plain(&net.outside, "[::]:6000");
    assert_eq!(net.inside.ask("10.83.0.2:6000"), plain(), "the way out is open");
    let (code, told) = settings.intercept(&net.inside, "verify");
    assert!(code == 0 && told.contains("are those of the configuration") && told.contains("has group 13100"), "{told}");

    let (code, told) = settings.intercept(&net.inside, "remove");
    assert!(code == 0 && told.contains("is removed"), "{told}");
    assert_eq!(everywhere(7777), [plain(), plain()]);
    agent.tells("interception.broken");
    let (code, told) = settings.intercept(&net.inside, "remove");
    assert!(code == 0 && told.contains("nothing to remove"), "{told}");
}

fn at(ip: &str, port: u16) -> String {
    if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
}

#[test]
fn a_connection_that_was_there_before_the_rules_is_cut() {
    let Some(()) = provided("cut", &["ip", "nft"]) else { return };
    let net = Net::new();
    let settings = Settings::locked("");
    // One server that waits for its client, and one that talks all the time.
    let _waits = Server::plain(&net.inside, "0.0.0.0:7777");
    let _talks = Server::tcp(&net.inside, "0.0.0.0:7778", |mut stream| {
        while stream.write_all(b"x").is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let mut open = net.outside.run(|| ["10.83.0.1:7777", "10.83.0.1:7778"].map(|address| connect(address).unwrap()));
    assert_eq!(open[1].read(&mut [0; 1]).unwrap(), 1);
    assert_eq!(settings.intercept(&net.inside, "install").0, 0);
    open[0].write_all(b"hello").unwrap();
    assert!(open[0].read(&mut [0; 8]).is_err(), "it was answered over a connection from before");
    let mut rest = Vec::new();
    // What was on its way comes still, and then no more.
    let end = open[1].read_to_end(&mut rest).unwrap_err();
    assert!(matches!(end.kind(), ErrorKind::ConnectionReset | ErrorKind::WouldBlock), "{end}");
    assert!(rest.len() < 100, "{} bytes came", rest.len());
}

#[test]
fn what_goes_out_goes_through_the_agent_or_not_at_all() {
    let Some(()) = provided("outbound", &["ip", "nft"]) else { return };
    let net = Net::new();
    let listen = "transparent_listen = ['127.0.0.1:15001', '[::1]:15001']";
    let settings = Settings::new(&format!(
        "[intercept]\ngid = {GID}\noutbound = 'redirect'\n[[intercept.bypass]]\nto = '10.83.0.2'\nport = 6002\nreason = 'a try'\n\
         [[intercept.bypass]]\nto = 'fd83::/64'\nprotocol = 'udp'\nport = 5353\nreason = 'another'\n\
         [egress]\n{listen}\nallow = ['10.83.0.0/24:6000', '[fd83::/64]:6000']\n"
    ));
    let _servers = [6000, 6001, 6002].map(|port| Server::plain(&net.outside, &format!("[::]:{port}")));
    let _udp = Server::udp(&net.outside, "[::]:5353");
    let _inside = Server::plain(&net.inside, "[::]:7777");
    let out = |port: u16| netns::OUTSIDE.map(|ip| net.inside.ask(&at(ip, port)));
    let (code, told) = settings.intercept(&net.inside, "install");
    assert!(code == 0 && told.contains("over IPv6 is led to the agent's port 15001"), "{told}");
    assert_eq!(out(6000), [REFUSED, REFUSED], "there is no agent yet");

    let mut agent = settings.start(&net.inside, GID);
    agent.tells("interception.holds");
    agent.tells("listener.exposed … [::]:7777/tcp");
    assert_eq!(out(6000), [plain(), plain()]);
    assert!(out(6001).iter().all(|answer| *answer != plain()), "it is on no list");
    for ip in netns::OUTSIDE {
        agent.tells(&format!("connection.refused … no egress to {} … not on the list", at(ip, 6001)));
    }
    assert_eq!(net.inside.ask("10.83.0.2:6002"), plain(), "it goes past the agent");
    assert_ne!(net.inside.ask("[fd83::2]:6002"), plain(), "of IPv6 nothing was said");
    assert!(!net.inside.ask_udp("10.83.0.2:5353") && net.inside.ask_udp("[fd83::2]:5353"));
    assert_eq!(net.inside.ask("127.0.0.1:7777"), plain());
    assert_eq!(net.outside.ask("10.83.0.1:7777"), plain(), "who comes in is answered");
    let (code, told) = settings.intercept(&net.inside, "verify");
    assert!(code == 0, "{told}");

    // Without the agent nothing gets out, and nothing goes around it.
    drop(agent);
    assert_eq!(out(6000), [REFUSED, REFUSED]);
    assert_eq!(settings.intercept(&net.inside, "remove").0, 0);
    assert_eq!(out(6001), [plain(), plain()]);
}

#[test]
fn what_is_blocked_does_not_get_out_and_only_ipv4_may_be_led() {
    let Some(()) = provided("block", &["ip", "nft"]) else { return };
    let net = Net::new();
    let _far = Server::plain(&net.outside, "[::]:6000");
    let _udp = Server::udp(&net.outside, "[::]:5353");
    let _inside = Server::plain(&net.inside, "[::]:7777");
    let out = || netns::OUTSIDE.map(|ip| net.inside.ask(&at(ip, 6000)));
    let before = net.inside.run(|| connect("10.83.0.2:6000").unwrap());
    let block = Settings::new(&format!("[intercept]\ngid = {GID}\noutbound = 'block'\n"));
    let (code, told) = block.intercept(&net.inside, "install");
    assert!(code == 0 && told.contains("nothing but the agent gets out"), "{told}");
    assert_eq!(out(), [REFUSED, REFUSED]);
    assert!(!net.inside.ask_udp("10.83.0.2:5353") && !net.inside.ask_udp("[fd83::2]:5353"));
    assert_eq!(net.outside.ask("10.83.0.1:7777"), plain(), "who comes in is answered");
    let mut before = before;
    let answered = before.write_all(b"hello").and_then(|()| before.read(&mut [0; 8]));
    assert!(!matches!(answered, Ok(count) if count > 0), "a connection from before the rules gets out");

    let v4 = Settings::new(&format!(
        "[intercept]\ngid = {GID}\noutbound = 'redirect'\n[egress]\ntransparent_listen = ['127.0.0.1:15001']\n\
         allow = ['10.83.0.0/24:6000']\n"
    ));
    let (code, told) = v4.intercept(&net.inside, "install");
    assert!(code == 0 && told.contains("IPv6 does not get out"), "{told}");
    let _agent = v4.start(&net.inside, GID);
    assert_eq!(out(), [plain(), REFUSED]);
}

#[test]
fn nobody_answers_in_the_place_of_an_agent_that_is_away() {
    let Some(()) = provided("impostor", &["ip", "nft"]) else { return };
    let net = Net::new();
    let settings = Settings::locked("");
    assert_eq!(settings.intercept(&net.inside, "install").0, 0);
    let _impostors = ["[::]:8443", "[::]:15006"].map(|address| Server::plain(&net.inside, address));
    for (ip, port) in [("10.83.0.1", 8443), ("fd83::1", 8080)] {
        assert_eq!(net.outside.ask(&at(ip, port)), Err(ErrorKind::TimedOut), "{ip} {port}");
    }
}

#[test]
fn rules_that_were_changed_are_told_line_by_line_and_installing_again_mends_them() {
    let Some(()) = provided("changed", &["ip", "nft"]) else { return };
    let net = Net::new();
    let settings = Settings::locked("");
    let mut agent = settings.start(&net.inside, GID);
    let _free = Server::plain(&net.inside, "[::]:8080");
    assert_eq!(settings.intercept(&net.inside, "install").0, 0);
    agent.tells("interception.holds");
    assert_eq!(settings.intercept(&net.inside, "verify").0, 0);
    net.inside.nft("insert rule inet sidewarden input tcp dport 7777 accept");
    let (code, told) = settings.intercept(&net.inside, "verify");
    assert!(code == 1 && told.contains("+ chain input: tcp dport 7777 accept"), "{told}");
    net.inside.nft("flush chain inet sidewarden output");
    let (code, told) = settings.intercept(&net.inside, "verify");
    assert!(code == 1 && told.contains("- chain output: oifname \"lo\" accept"), "{told}");
    agent.tells("interception.broken … not in force in this network namespace");
    assert_eq!(settings.intercept(&net.inside, "install").0, 0);
    assert_eq!(settings.intercept(&net.inside, "verify").0, 0);
    agent.tells("interception.holds");
    // The rules of other settings are not these.
    let other = Settings::locked("[[declared.plaintext]]\nport = 7777\nreason = 'x'\n");
    assert_eq!(other.intercept(&net.inside, "install").0, 0);
    agent.tells("interception.broken");
    let listed = net.inside.nft("list tables");
    assert_eq!(listed, "table inet sidewarden\n", "nothing else is left behind");
}

#[test]
fn an_agent_without_the_group_does_not_start_and_a_workload_with_it_is_found() {
    let Some(()) = provided("group", &["ip", "nft"]) else { return };
    let net = Net::new();
    let settings = Settings::locked("");
    let (code, told) = said(&net.inside, settings.agent(&["sidecar"]));
    assert!(code == 1 && told.contains("runs with group 0") && told.contains("--user 0:13100"), "{told}");
    let mut command = settings.agent(&["exec"]);
    command.gid(GID).args(["--", "true"]);
    let (code, told) = said(&net.inside, command);
    assert!(code == 125 && told.contains("set `exec.user`"), "{told}");

    assert_eq!(settings.intercept(&net.inside, "install").0, 0);
    let _agent = settings.start(&net.inside, GID);
    let mut thief = Command::new("sleep");
    thief.arg("600").gid(GID).uid(33);
    let mut thief = net.inside.run(|| thief.spawn().unwrap());
    let (code, told) = settings.intercept(&net.inside, "verify");
    thief.kill().unwrap();
    thief.wait().unwrap();
    assert!(code == 1 && told.contains("(sleep) has the agent's group 13100"), "{told}");
    assert!(told.contains("good: the rules are those"), "{told}");
}

#[test]
fn a_wrapped_command_is_started_once_the_rules_are_in_force() {
    let Some(()) = provided("exec", &["ip", "nft"]) else { return };
    let net = Net::new();
    let settings = Settings::locked("[exec]\nuser = '33:33'\n[admin]\nlisten = '127.0.0.1:0'\n");
    let mut command = settings.agent(&["exec"]);
    command.gid(GID).args(["--", "echo", "started"]).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut agent = net.inside.run(|| command.spawn().unwrap());
    // Its first listener is there: from here on it waits for nothing but the rules.
    while net.inside.ask("127.0.0.1:8443") == REFUSED {
        assert!(agent.try_wait().unwrap().is_none());
    }
    std::thread::sleep(Duration::from_millis(300));
    assert!(agent.try_wait().unwrap().is_none(), "the command was started without rules");
    assert_eq!(settings.intercept(&net.inside, "install").0, 0);
    let output = agent.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), &b"started\n"[..]));
}

#[test]
fn where_rules_cannot_be_installed_it_is_said_why() {
    let Some(()) = provided("refusals", &["ip", "nft"]) else { return };
    let net = Net::new();
    let settings = Settings::locked("");
    let refused = |mut command: Command, expected: &str| {
        let (code, told) = said(&net.inside, {
            command.args(["intercept", "install"]);
            command
        });
        assert!(code == 1 && told.contains(expected), "{expected}\n{told}");
    };
    let mut without_nft = settings.agent(&[]);
    without_nft.env("PATH", "/nowhere");
    refused(without_nft, "apt-get install nftables");
    // Where the tests were built may be open to nobody else.
    let program = settings.0.path().join("sidewarden-agent");
    std::fs::copy(env!("CARGO_BIN_EXE_sidewarden-agent"), &program).unwrap();
    std::os::unix::fs::chown(settings.0.path(), Some(65534), None).unwrap();
    let mut without_power = settings.command(&program, &[]);
    without_power.uid(65534).gid(65534);
    refused(without_power, "CAP_NET_ADMIN");

    // In a container this would install them around the tests themselves.
    if Path::new("/proc/sys/net/core/netdev_budget").exists() {
        let on_host = settings.agent(&["intercept", "install"]).output().unwrap();
        let told = String::from_utf8(on_host.stderr).unwrap();
        assert!(on_host.status.code() == Some(1) && told.contains("the host's own network namespace"), "{told}");
    }
    let off = Settings::new("");
    let (code, told) = off.intercept(&net.inside, "install");
    assert!(code == 2 && told.contains("set `intercept.inbound` or `intercept.outbound`"), "{told}");
}

#[test]
fn every_listener_is_asked_once_and_what_is_not_tls_is_told_until_it_closes() {
    let Some(()) = provided("listeners", &["ip"]) else { return };
    let net = Net::new();
    let settings = Settings::new("[[declared.plaintext]]\nport = 9000\nreason = 'an old client'\n");
    let _loopback = Server::plain(&net.inside, "127.0.0.1:9999");
    let plain_server = Server::plain(&net.inside, "0.0.0.0:8080");
    let _declared = Server::plain(&net.inside, "[::]:9000");
    let _banner = Server::tcp(&net.inside, "[::]:2525", |mut stream| {
        let _ = stream.write_all(b"220 mail.example ESMTP\r\n");
        assert_eq!(stream.read(&mut [0; 8]).unwrap_or(0), 0, "a server that speaks first was spoken to");
    });
    let _tls = tls_server(&net.inside, "0.0.0.0:443");
    let _udp = Server::udp(&net.inside, "0.0.0.0:5353");
    let mut agent = settings.start(&net.inside, 0);
    // In whichever order they answer.
    let expected = [
        "listener.exposed … 0.0.0.0:8080/tcp … it answered a TLS hello with `plain`",
        "listener.exposed … [::]:2525/tcp … it spoke first, in plaintext: `220 mail.example ESMTP`",
        "listener.exposed … [::]:9000/tcp … as declared: an old client",
        "listener.exposed … 0.0.0.0:5353/udp",
    ];
    let mut open: Vec<&str> = expected.into();
    while !open.is_empty() {
        let line = agent.tells("listener.exposed");
        let before = open.len();
        open.retain(|parts| !parts.split(" … ").all(|part| line.contains(part)));
        assert_eq!(open.len() + 1, before, "not expected: {line}");
    }
    drop(plain_server);
    agent.tells("listener.closed … 0.0.0.0:8080/tcp … nobody listens there any more");
    assert!(!agent.has_told("0.0.0.0:443") && !agent.has_told("127.0.0.1:9999"), "{:#?}", agent.told);
}

/// Speaks TLS with a certificate of its own.
fn tls_server(space: &Space, address: &str) -> Server {
    let key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![key.cert.der().clone()],
            rustls::pki_types::PrivatePkcs8KeyDer::from(key.signing_key.serialize_der()).into(),
        )
        .unwrap();
    let config = std::sync::Arc::new(config);
    Server::tcp(space, address, move |mut stream| {
        let mut tls = rustls::ServerConnection::new(config.clone()).unwrap();
        // The probe hangs up in the middle of the handshake.
        let _ = tls.complete_io(&mut stream);
    })
}
