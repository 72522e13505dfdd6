//! Other programs: run with a limit, ended by Ctrl-C, and quoted with their last words when they fail.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::interrupt;

/// One run of another program.
#[derive(Debug)]
pub struct Run {
    command: Command,
    input: Option<Vec<u8>>,
    limit: Duration,
    heeds_interrupt: bool,
    own_group: bool,
}

/// What it said.
#[derive(Debug)]
pub struct Done {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// `program` with `args`; a minute unless told otherwise.
pub fn run<A: AsRef<OsStr>>(program: impl AsRef<OsStr>, args: impl IntoIterator<Item = A>) -> Run {
    let mut command = Command::new(program);
    command.args(args);
    Run { command, input: None, limit: Duration::from_secs(60), heeds_interrupt: true, own_group: true }
}

impl Run {
    /// More arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Run {
        self.command.args(args);
        self
    }

    /// An environment variable.
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Run {
        self.command.env(key, value);
        self
    }

    /// Its working directory.
    pub fn current_dir(mut self, dir: &Path) -> Run {
        self.command.current_dir(dir);
        self
    }

    /// What it reads on standard input.
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Run {
        self.input = Some(bytes.into());
        self
    }

    /// How long it may take.
    pub fn limit(mut self, limit: Duration) -> Run {
        self.limit = limit;
        self
    }

    /// Goes on after Ctrl-C: for cleaning up.
    pub fn despite_interrupt(mut self) -> Run {
        self.heeds_interrupt = false;
        self
    }

    /// Stays in our process group, so that the terminal's Ctrl-C reaches it: sudo's children are not ours to signal.
    pub fn in_our_group(mut self) -> Run {
        self.own_group = false;
        self
    }

    /// Runs it to its end, whatever its exit code.
    pub fn finish(self) -> Result<Done> {
        self.finish_with(|_| ())
    }

    /// The same; `line` is told each line of standard error as it comes.
    pub fn finish_with(mut self, line: impl FnMut(&str) + Send) -> Result<Done> {
        let name = self.to_string();
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if self.own_group {
            self.command.process_group(0);
        }
        let child = self.command.spawn().with_context(|| format!("starting {name}"))?;
        self.attend(child, line).with_context(|| name)
    }

    /// Runs it, and gives its standard output; an exit code other than 0 is an error that quotes its last words.
    pub fn output(self) -> Result<String> {
        self.output_with(|_| ())
    }

    /// The same; `line` is told each line of standard error as it comes.
    pub fn output_with(self, line: impl FnMut(&str) + Send) -> Result<String> {
        let name = self.to_string();
        let done = self.finish_with(line)?;
        if !done.status.success() {
            bail!("{name}: {}: {}", done.status, last_words(&done));
        }
        Ok(done.stdout)
    }

    fn attend(self, mut child: Child, mut line: impl FnMut(&str) + Send) -> Result<Done> {
        let pid = Pid::from_raw(child.id().cast_signed());
        let (mut stdin, mut stdout) = (child.stdin.take(), child.stdout.take());
        let stderr = child.stderr.take();
        let (ended, end) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                if let (Some(pipe), Some(bytes)) = (stdin.as_mut(), self.input.as_deref()) {
                    // A program that ends before it has read everything says so by its exit code.
                    let _ = pipe.write_all(bytes);
                }
                drop(stdin.take());
            });
            let said = scope.spawn(move || read_all(stdout.as_mut()));
            let complained = scope.spawn(move || {
                let mut all = String::new();
                for text in stderr.into_iter().flat_map(|pipe| BufReader::new(pipe).split(b'\n').map_while(Result::ok))
                {
                    let text = String::from_utf8_lossy(&text).into_owned();
                    line(&text);
                    all.push_str(&text);
                    all.push('\n');
                }
                all
            });
            scope.spawn(move || ended.send(child.wait()));
            let status = self.wait(pid, &end);
            let stdout = said.join().map_err(|_| anyhow!("reading its output broke"))?;
            let stderr = complained.join().map_err(|_| anyhow!("reading its errors broke"))?;
            Ok(Done { status: status?, stdout, stderr })
        })
    }

    fn wait(&self, pid: Pid, end: &mpsc::Receiver<std::io::Result<ExitStatus>>) -> Result<ExitStatus> {
        let deadline = Instant::now() + self.limit;
        loop {
            match end.recv_timeout(Duration::from_millis(50)) {
                Ok(status) => return Ok(status?),
                Err(RecvTimeoutError::Disconnected) => bail!("nobody waited for it"),
                Err(RecvTimeoutError::Timeout) => {}
            }
            let interrupted = self.heeds_interrupt && interrupt::requested();
            if interrupted || Instant::now() >= deadline {
                self.end(pid, end);
                bail!(if interrupted { "interrupted".into() } else { format!("still running after {:?}", self.limit) });
            }
        }
    }

    /// Asks it to end, with all it started, so that it can clean up; makes it end if it does not.
    fn end(&self, pid: Pid, end: &mpsc::Receiver<std::io::Result<ExitStatus>>) {
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            // It may have ended by itself just now, or be sudo, which the terminal's Ctrl-C has reached already.
            let _ = if self.own_group { killpg(pid, signal) } else { kill(pid, signal) };
            if end.recv_timeout(Duration::from_secs(15)).is_ok() {
                break;
            }
        }
        // What it started may outlive it, and holds its output open.
        let _ = if self.own_group { killpg(pid, Signal::SIGKILL) } else { Ok(()) };
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<OsString> =
            std::iter::once(self.command.get_program()).chain(self.command.get_args()).map(Into::into).collect();
        let words: Vec<_> = words.iter().map(|w| w.to_string_lossy()).collect();
        write!(f, "`{}`", words.join(" "))
    }
}

fn read_all(pipe: Option<&mut impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        // What came before a broken pipe is still worth having.
        let _ = pipe.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The last lines of what a failed program said.
fn last_words(done: &Done) -> String {
    let text = if done.stderr.trim().is_empty() { &done.stdout } else { &done.stderr };
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_says_comes_back() {
        let done = run("sh", ["-c", "cat; echo no >&2; exit 3"]).input("yes").finish().unwrap();
        assert_eq!((done.stdout.as_str(), done.stderr.as_str(), done.status.code()), ("yes", "no\n", Some(3)));
    }

    #[test]
    fn a_failure_quotes_the_last_words() {
        let error = run("sh", ["-c", "echo the disk is full >&2; exit 1"]).output().unwrap_err();
        assert!(format!("{error:#}").contains("the disk is full"), "{error:#}");
    }

    #[test]
    fn a_program_that_takes_too_long_is_ended_with_its_children() {
        let error = run("sh", ["-c", "sleep 600 & wait"]).limit(Duration::ZERO).output().unwrap_err();
        assert!(format!("{error:#}").contains("still running"), "{error:#}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = run("/no/such/program", [""; 0]).output().unwrap_err();
        assert!(format!("{error:#}").contains("/no/such/program"), "{error:#}");
    }
}
