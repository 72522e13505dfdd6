//! `cargo test` over the whole workspace, watched for tests that did not really run.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::{interrupt, programs, workspace};

/// With this a test may leave itself out where something it needs is missing; it then prints a line that begins with
/// [`SKIPPED`].
pub const ALLOW_SKIP: &str = "SIDEWARDEN_ALLOW_SKIP";

/// How such a line begins.
pub const SKIPPED: &str = "SKIPPED";

/// The reason of an ignored test that is none: the child process of other tests, or a measurement. Those run elsewhere.
const NOT_A_TEST: &str = " ... ignored, not a test: ";

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ran {
    /// Cargo's own word for it.
    pub passed: bool,
    /// Tests that ran and were good.
    pub tests: u64,
    /// Tests that did not run, as they told it.
    pub left_out: Vec<String>,
    /// The closing line of each test program.
    pub closing: Vec<String>,
}

impl Ran {
    /// Everything ran, and was good.
    pub fn good(&self) -> bool {
        self.passed && self.tests > 0 && self.left_out.is_empty()
    }

    fn take(&mut self, line: &str) {
        let is_ignored = line.contains(" ... ignored") && !line.contains(NOT_A_TEST);
        if line.trim_start().starts_with(SKIPPED) || is_ignored {
            self.left_out.push(line.trim().to_owned());
        }
        if let Some(count) = passed(line) {
            self.tests += count;
            self.closing.push(line.to_owned());
        }
    }
}

/// The count in `test result: ok. 26 passed; …`.
fn passed(line: &str) -> Option<u64> {
    let (_, rest) = line.strip_prefix("test result: ")?.split_once(". ")?;
    rest.split_once(" passed")?.0.parse().ok()
}

/// Runs all tests, with `arguments` for `cargo test`. Everything they print is passed on; what passing tests print is
/// shown too, because that is where a test says that it left itself out.
pub fn run(arguments: &[String]) -> Result<Ran> {
    let mut command = Command::new(programs::cargo());
    command.args(["test", "--workspace", "--locked", "--no-fail-fast"]).args(arguments);
    if !arguments.iter().any(|a| a == "--") {
        command.args(["--", "--show-output"]);
    }
    command.current_dir(workspace::root()).env_remove(ALLOW_SKIP).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.process_group(0).spawn().context("starting `cargo test`")?;
    let stdout = child.stdout.take().context("cargo has no standard output")?;
    let group = Pid::from_raw(child.id().cast_signed());
    std::thread::spawn(move || {
        crate::scene::stay();
        // It may have ended by itself just now.
        let _ = killpg(group, Signal::SIGINT);
    });
    let mut ran = Ran::default();
    for line in BufReader::new(stdout).lines() {
        let line = line.context("reading what `cargo test` prints")?;
        ran.take(&line);
        println!("{line}");
    }
    ran.passed = child.wait()?.success();
    interrupt::check()?;
    tell(&ran);
    Ok(ran)
}

fn tell(ran: &Ran) {
    println!("\n{}\n{} tests passed", ran.closing.join("\n"), ran.tests);
    if !ran.left_out.is_empty() {
        println!("\n{} DID NOT RUN, and here every test has to:", ran.left_out.len());
        ran.left_out.iter().for_each(|line| println!("  {line}"));
    }
    if !ran.passed {
        println!("\n`cargo test` FAILED; what failed stands above");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(output: &str) -> Ran {
        let mut ran = Ran { passed: true, ..Ran::default() };
        output.lines().for_each(|line| ran.take(line));
        ran
    }

    #[test]
    fn a_test_that_did_not_run_spoils_the_run() {
        let fine = "test a ... ok\ntest result: ok. 26 passed; 0 failed; 0 ignored\n";
        for (output, tests, good) in [
            (fine.to_owned(), 26, true),
            (format!("{fine}{fine}"), 52, true),
            (format!("{fine}SKIPPED scrape: there is no prometheus\n"), 26, false),
            (format!("test b ... ignored\n{fine}"), 26, false),
            (format!("test b ... ignored, needs a day\n{fine}"), 26, false),
            (format!("test b ... ignored, not a test: the child of another one\n{fine}"), 26, true),
            (String::new(), 0, false),
        ] {
            let ran = ran(&output);
            assert_eq!((ran.tests, ran.good()), (tests, good), "{output}");
        }
    }
}
