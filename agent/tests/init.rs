//! PID 1 with real processes. Whoever waits for children has to be alone in its process, so each case runs in one of its
//! own: this test program again, with only `inner` chosen.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use sidewarden_agent::init::{User, run};

const COMMAND: &str = "INIT_TEST_COMMAND";
const USER: &str = "INIT_TEST_USER";
const LINGER: &str = "INIT_TEST_LINGER";

#[test]
#[ignore = "not a test: the other tests run it, in a process of its own"]
fn inner() {
    let Ok(command) = std::env::var(COMMAND) else { return };
    let argv: Vec<OsString> = command.split('|').map(OsString::from).collect();
    let user = std::env::var(USER).ok().map(|uid| uid.parse().unwrap()).map(|uid| User { uid, gid: uid });
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let code = match run(&argv, user) {
        Ok(mut reaper) => {
            let code = runtime.block_on(reaper.wait()).code;
            if std::env::var(LINGER).is_ok() {
                // Until the test closes our stdin the reaper goes on.
                let _ = std::io::stdin().read(&mut [0]);
            }
            code
        }
        Err(error) => {
            eprintln!("{error}");
            error.exit_code()
        }
    };
    std::process::exit(code);
}

fn inner_command(command: &str) -> Command {
    let mut inner = Command::new(std::env::current_exe().unwrap());
    inner.args(["inner", "--exact", "--ignored", "--nocapture", "--quiet"]).env(COMMAND, command);
    inner.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    inner
}

fn code_of(command: &str) -> (Option<i32>, String) {
    let output = inner_command(command).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code(), text)
}

#[test]
fn the_exit_code_is_the_commands() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    std::fs::write(&data, "no program").unwrap();
    std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o644)).unwrap();
    let rows = [
        ("true".to_owned(), 0),
        ("sh|-c|exit 42".to_owned(), 42),
        ("sh|-c|kill -KILL $$".to_owned(), 137),
        ("sh|-c|kill -TERM $$".to_owned(), 143),
        ("/no/such/program".to_owned(), 127),
        ("no-such-program".to_owned(), 127),
        (data.to_string_lossy().into_owned(), 126),
        ("/".to_owned(), 126),
    ];
    for (command, expected) in rows {
        let (code, text) = code_of(&command);
        assert_eq!(code, Some(expected), "{command}: {text}");
    }
}

#[test]
fn signals_are_handed_on() {
    for (signal, name) in
        [(Signal::SIGTERM, "TERM"), (Signal::SIGHUP, "HUP"), (Signal::SIGUSR1, "USR1"), (Signal::SIGINT, "INT")]
    {
        let script = format!("sh|-c|trap 'exit 7' {name}; echo ready; while :; do sleep 60 & wait $!; done");
        let mut inner = inner_command(&script).spawn().unwrap();
        let mut lines = BufReader::new(inner.stdout.take().unwrap()).lines();
        assert!(lines.any(|l| l.unwrap().contains("ready")));
        kill(Pid::from_raw(i32::try_from(inner.id()).unwrap()), signal).unwrap();
        assert_eq!(inner.wait().unwrap().code(), Some(7), "{name}");
    }
}

#[test]
fn orphans_are_reaped_by_us_also_after_the_command() {
    // The inner `sh` leaves a child behind that ends after it, when told so by a pipe.
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("go");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let script = format!("sh|-c|sh -c 'read x < {0}' & echo orphan $!; exit 0", fifo.display());
    let mut inner = inner_command(&script).env(LINGER, "1").stdin(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(inner.stdout.take().unwrap()).lines().map(Result::unwrap);
    let orphan: i32 = lines.find_map(|l| l.split("orphan ").nth(1)?.trim().parse().ok()).unwrap();
    let parent_of = |pid: i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        status.lines().find_map(|l| l.strip_prefix("PPid:")?.trim().parse::<u32>().ok())
    };
    wait_until("the orphan is ours", || parent_of(orphan) == Some(inner.id()));
    std::fs::write(&fifo, "go\n").unwrap();
    wait_until("the orphan is reaped", || parent_of(orphan).is_none());
    drop(inner.stdin.take());
    assert_eq!(inner.wait().unwrap().code(), Some(0));
}

/// Asks again until it holds; the limit only turns a hang into a failure.
fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let begun = std::time::Instant::now();
    while !holds() {
        assert!(begun.elapsed().as_secs() < 30, "never: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn the_agents_secrets_stay_with_the_agent() {
    let output = inner_command("env").env("SIDEWARDEN_TOKEN", "s3cret").env("OTHER", "kept").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("OTHER=kept") && !text.contains("s3cret"), "{text}");
}

#[test]
fn the_command_has_no_signal_ignored_or_blocked_and_a_group_of_its_own() {
    let script = "sh|-c|grep -e SigIgn -e SigBlk /proc/self/status; cut -d' ' -f5 /proc/$$/stat; echo me $$; cat /proc/self/oom_score_adj";
    let mut inner = inner_command(script);
    // SAFETY: ignoring a signal is allowed between fork and exec.
    unsafe {
        inner.pre_exec(|| {
            nix::sys::signal::signal(Signal::SIGHUP, nix::sys::signal::SigHandler::SigIgn)?;
            nix::sys::signal::SigSet::from(Signal::SIGUSR1).thread_block()?;
            Ok(())
        });
    }
    let output = inner.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<&str> = text.lines().skip_while(|l| !l.starts_with("Sig")).collect();
    let set = |line: &str| u64::from_str_radix(line.split_whitespace().last().unwrap(), 16).unwrap();
    // Signals from 32 on are the C library's own, and nobody may change them.
    assert_eq!((set(lines[0]) & 0x7fff_ffff, set(lines[1]) & 0x7fff_ffff), (0, 0), "{text}");
    assert_eq!(lines[3], format!("me {}", lines[2]), "{text}");
    let own: i32 = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap().trim().parse().unwrap();
    assert!(lines[4].parse::<i32>().unwrap() > own, "{text}");
}

#[test]
fn the_command_runs_as_the_user_asked_for_and_no_other_groups() {
    if !Uid::effective().is_root() {
        eprintln!("NOT RUN: becoming another user needs root");
        let (code, text) = code_of_user("true", "12345");
        assert!(code == Some(125) && text.contains("CAP_SETUID"), "{text}");
        return;
    }
    let (code, text) = code_of_user("sh|-c|grep -e Uid -e Gid -e Groups -e CapEff /proc/self/status", "12345");
    assert_eq!(code, Some(0), "{text}");
    for line in [
        "Uid:\t12345\t12345\t12345\t12345",
        "Gid:\t12345\t12345\t12345\t12345",
        "Groups:\t12345",
        "CapEff:\t0000000000000000",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
}

fn code_of_user(command: &str, user: &str) -> (Option<i32>, String) {
    let output = inner_command(command).env(USER, user).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code(), text)
}
