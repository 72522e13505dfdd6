//! The binary as a user meets it: what it says, and its exit codes.

use std::io::Write;
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

fn agent(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sidewarden-agent"));
    command.args(arguments).env_clear().stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = agent(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn path(file: &tempfile::NamedTempFile) -> &str {
    file.path().to_str().unwrap()
}

/// A configuration that can start here, with whatever follows.
fn good(dir: &tempfile::TempDir, more: &str) -> tempfile::NamedTempFile {
    file(&format!(
        "data_dir = {:?}\ninstance = \"c1\"\n[collector]\naddresses = [\"127.0.0.1:1\"]\n[timeouts]\ndrain = \"1s\"\n{more}",
        dir.path()
    ))
}

#[test]
fn help_teaches_the_commands_and_the_exit_codes() {
    let (code, out, _) = run(&["--help"]);
    assert_eq!(code, 0);
    for word in ["sidecar", "exec", "health", "check-config", "Exit codes", "127", "token create", "SIDEWARDEN_"] {
        assert!(out.contains(word), "no `{word}` in:\n{out}");
    }
}

#[test]
fn a_check_is_explained_and_a_sight_is_told_without_any_settings() {
    let (code, out, _) = run(&["explain", "docker-socket"]);
    assert!(code == 0 && out.contains("5.31") && out.contains("root on the host"), "{out}");
    let (code, _, err) = run(&["explain", "socket"]);
    assert!(code == 2 && err.contains("docker-socket"), "{err}");
    let (code, out, _) = run(&["vantage"]);
    assert!(code == 0 && out.contains("checks are answered from here"), "{out}");
    assert_eq!(run(&["checks"]).1.lines().count(), 54);
}

#[test]
fn one_look_without_an_engine_says_so() {
    let config = file("[node]\nsocket = \"/nowhere/engine.sock\"\n");
    let (code, out, err) = run(&["check", "--config", path(&config)]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("connecting to /nowhere/engine.sock") && err.contains("node.socket"), "{err}");
}

#[test]
fn a_node_agent_never_stands_beside_a_proxy() {
    let dir = tempfile::tempdir().unwrap();
    let more = "[[outbound]]\nlisten = \"127.0.0.1:0\"\nto = \"db:8443\"\npeer = \"spiffe://td/shop/db\"\n";
    let config = good(&dir, more);
    let (code, _, err) = run(&["node", "--config", path(&config)]);
    assert_eq!(code, 1);
    assert!(err.contains("remove `outbound`"), "{err}");
}

#[test]
fn a_wrong_command_line_is_told_with_code_2() {
    for arguments in [&["sidcar"][..], &[], &["exec"], &["sidecar", "--log-level", "a=b=c"]] {
        let (code, _, err) = run(arguments);
        assert_eq!(code, 2, "{arguments:?}: {err}");
        assert!(!err.is_empty());
    }
    assert!(run(&["sidcar"]).2.contains("sidecar"), "the nearest command is named");
}

#[test]
fn all_faults_of_a_file_are_told_at_once() {
    let config = file(
        "dta_dir = \"/x\"\n[admin]\nlisten = \"0.0.0.0:9\"\n[[inbound]]\nlisten = \"0.0.0.0:9\"\nto = \"127.0.0.1:9\"\n[timeouts]\ndrain = \"10\"\n",
    );
    let (code, _, err) = run(&["check-config", "--config", path(&config)]);
    assert_eq!(code, 2);
    for part in
        ["did you mean `data_dir`", "which is itself", "allows nobody", "`timeouts.drain`", "`collector.addresses`"]
    {
        assert!(err.contains(part), "no `{part}` in:\n{err}");
    }
}

#[test]
fn a_good_file_is_good_and_a_missing_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let config = good(&dir, "");
    let (code, out, err) = run(&["check-config", "--config", path(&config)]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("good"), "{out}");
    let (code, _, err) = run(&["check-config", "--config", "/nowhere.toml"]);
    assert_eq!(code, 2);
    assert!(err.contains("reading /nowhere.toml: "), "{err}");
}

#[test]
fn a_port_in_use_is_told_with_what_it_was_for() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let config = good(&dir, &format!("[admin]\nlisten = \"{}\"\n", taken.local_addr().unwrap()));
    let (code, _, err) = run(&["sidecar", "--config", path(&config)]);
    assert_eq!(code, 1);
    assert!(err.contains("for the admin endpoint: ") && err.contains("another program has this port"), "{err}");
}

#[test]
fn an_unusable_data_directory_is_told() {
    let not_a_directory = file("");
    let config = file(&format!(
        "data_dir = \"{}/x\"\ninstance = \"c1\"\n[collector]\naddresses = [\"127.0.0.1:1\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n",
        path(&not_a_directory)
    ));
    let (code, _, err) = run(&["sidecar", "--config", path(&config)]);
    assert_eq!(code, 1);
    assert!(err.contains("set data_dir to one that is"), "{err}");
}

#[test]
fn health_says_no_when_nobody_answers() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let config = good(&dir, &format!("[admin]\nlisten = \"{free}\"\n"));
    let (code, _, err) = run(&["health", "--config", path(&config)]);
    assert_eq!(code, 1);
    assert!(err.contains("is it running?"), "{err}");
    let admin = ("SIDEWARDEN_ADMIN_LISTEN", free.to_string());
    let probe = agent(&["health"]).envs([admin]).output().unwrap();
    let err = String::from_utf8(probe.stderr).unwrap();
    assert_eq!(probe.status.code(), Some(1), "it needs no collector to ask the agent: {err}");
    assert!(err.contains(&format!("asking the agent at {free}")), "{err}");
}

#[test]
fn exec_hands_the_commands_own_code_on() {
    for (command, expected) in [(&["sh", "-c", "exit 7"][..], 7), (&["/no/such/program"], 127), (&["/etc/passwd"], 126)]
    {
        let dir = tempfile::tempdir().unwrap();
        let config = good(&dir, "[admin]\nlisten = \"127.0.0.1:0\"\n");
        let arguments = [&["exec", "--config", path(&config), "--"], command].concat();
        let output = agent(&arguments).env("PATH", "/usr/bin:/bin").output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(expected), "{command:?}: {err}");
    }
}

#[test]
fn a_sidecar_ends_in_order_on_sigterm() {
    use std::io::{BufRead, BufReader};
    let dir = tempfile::tempdir().unwrap();
    let config = good(&dir, "[admin]\nlisten = \"127.0.0.1:0\"\n");
    let mut child = agent(&["sidecar", "--config", path(&config)]).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("accepts connections")));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(dir.path().join("spool/clean").exists());
}

#[test]
fn the_checks_are_listed() {
    let (code, out, _) = run(&["checks"]);
    assert_eq!(code, 0);
    assert!(out.contains("5.31") && out.contains("docker-socket"), "{out}");
}
