//! Exec mode: starts the workload, and is its PID 1.
//!
//! One thread with an event loop of its own does everything that has to be done in one place: it starts the command, hands
//! signals on, and is the only one in the program that waits for children. Nobody else may: a second waiter would steal
//! the exit code. Where the agent is not PID 1 it is made the reaper of what its children leave behind.
//!
//! The command runs in a process group of its own, which becomes the terminal's foreground group when there is a terminal.
//! So Ctrl-C reaches the command once, from the terminal, and not a second time from us; job control and reading from the
//! terminal work as without an agent. Signals from elsewhere (`docker stop`) come to us and are handed on to the command
//! alone, which knows best what its children should get.

mod reaper;

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{Gid, Pid, Uid, getpgrp, getpid, tcgetpgrp, tcsetpgrp};

pub use reaper::{Exit, Reaper};

/// Variables that begin so are the agent's own: they may hold secrets, and the command does not get them.
const OWN_VARIABLES: &str = "SIDEWARDEN_";

/// The command is the first to be killed when memory runs out, not the agent that has to report it.
const OOM_DISTANCE: i32 = 200;
const OOM_MAX: i32 = 1000;

/// A user to run the command as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// Its uid.
    pub uid: u32,
    /// Its gid; no other groups are kept.
    pub gid: u32,
}

/// Why the command could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No command was given.
    #[error("no command: write it after `exec --`")]
    Empty,
    /// There is no such program.
    #[error("`{0}` was not found: check its path, or PATH")]
    NotFound(String),
    /// It is no program, or may not be run by this user.
    #[error("`{command}` cannot be executed: {source}: check its mode, and that user's right to run it")]
    NotExecutable {
        /// The command.
        command: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// The agent may not do what starting needs.
    #[error("starting `{command}`: {source}")]
    Refused {
        /// The command.
        command: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// The agent could not become another user.
    #[error(
        "running the command as uid {uid} gid {gid} needs CAP_SETUID and CAP_SETGID: start the agent as root, or leave the user out"
    )]
    User {
        /// The uid asked for.
        uid: u32,
        /// The gid asked for.
        gid: u32,
    },
    /// The agent's own thread or event loop could not be made.
    #[error("starting the reaper: {0}")]
    Reaper(io::Error),
}

impl StartError {
    /// The exit code that a shell would give.
    pub fn exit_code(&self) -> i32 {
        match self {
            StartError::NotFound(_) => 127,
            StartError::NotExecutable { .. } => 126,
            StartError::Empty => 2,
            StartError::Refused { .. } | StartError::User { .. } | StartError::Reaper(_) => 125,
        }
    }
}

/// Starts `argv`, as `user` if one is given, and takes care of it until the end.
pub fn run(argv: &[OsString], user: Option<User>) -> Result<Reaper, StartError> {
    let (program, arguments) = argv.split_first().ok_or(StartError::Empty)?;
    if getpid() != Pid::from_raw(1) {
        // Failing is harmless: orphans then go to whoever has them now.
        if let Err(error) = nix::sys::prctl::set_child_subreaper(true) {
            tracing::warn!(%error, "orphans of the command will not be reaped by the agent");
        }
    }
    let command = command(program, arguments, user);
    Reaper::start(command).map_err(|failure| explain(failure, program, user))
}

/// Whether the command would run with the agent's own user, so that it can read what the agent has on disk.
pub fn would_share_uid(user: Option<User>) -> bool {
    user.is_none_or(|user| Uid::effective().as_raw() == user.uid)
}

fn command(program: &OsStr, arguments: &[OsString], user: Option<User>) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).process_group(0);
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_own_variable(name)) {
        command.env_remove(name);
    }
    let groups = user.map(|user| (Uid::from_raw(user.uid), Gid::from_raw(user.gid)));
    let foreground = has_foreground();
    // SAFETY: between fork and exec of a process with threads only async-signal-safe calls are allowed. These are
    // signal(2), tcsetpgrp(3), setgroups(2), setgid(2) and setuid(2), on values made before; nothing allocates.
    unsafe {
        command.pre_exec(move || prepare(foreground, groups).map_err(io::Error::from));
    }
    command
}

fn is_own_variable(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(OWN_VARIABLES.as_bytes())
}

/// Whether we have a terminal and are in its foreground.
fn has_foreground() -> bool {
    tcgetpgrp(io::stdin()).is_ok_and(|foreground| foreground == getpgrp())
}

/// In the child, before it becomes the command.
fn prepare(foreground: bool, user: Option<(Uid, Gid)>) -> Result<(), Errno> {
    if foreground {
        // A group in the background that asks for the foreground is stopped, unless it ignores that.
        // SAFETY: no handler is installed.
        unsafe { signal(Signal::SIGTTOU, SigHandler::SigIgn)? };
        tcsetpgrp(io::stdin().as_fd(), getpgrp())?;
    }
    for each in Signal::iterator().filter(|s| !matches!(s, Signal::SIGKILL | Signal::SIGSTOP)) {
        // What we ignore, the command would ignore too: handlers are reset by exec, this is not.
        // SAFETY: the default is no handler.
        unsafe { signal(each, SigHandler::SigDfl)? };
    }
    if let Some((uid, gid)) = user {
        // Groups first: afterwards there is no right to. A process that has no other groups needs no right for that.
        nix::unistd::setgroups(&[gid]).or_else(|e| if uid == Uid::effective() { Ok(()) } else { Err(e) })?;
        nix::unistd::setgid(gid)?;
        nix::unistd::setuid(uid)?;
    }
    Ok(())
}

fn explain(failure: reaper::StartFailure, program: &OsStr, user: Option<User>) -> StartError {
    let command = program.to_string_lossy().into_owned();
    let source = match failure {
        reaper::StartFailure::Loop(source) => return StartError::Reaper(source),
        reaper::StartFailure::Spawn(source) => source,
    };
    let others = user.filter(|user| !may_become(*user));
    match source.kind() {
        io::ErrorKind::NotFound => StartError::NotFound(command),
        io::ErrorKind::PermissionDenied if others.is_some() && source.raw_os_error() == Some(Errno::EPERM as i32) => {
            let user = others.unwrap_or(User { uid: 0, gid: 0 });
            StartError::User { uid: user.uid, gid: user.gid }
        }
        io::ErrorKind::PermissionDenied => StartError::NotExecutable { command, source },
        _ if source.raw_os_error() == Some(Errno::ENOEXEC as i32) => StartError::NotExecutable { command, source },
        _ => StartError::Refused { command, source },
    }
}

fn may_become(user: User) -> bool {
    Uid::effective().is_root() || (Uid::effective().as_raw() == user.uid && Gid::effective().as_raw() == user.gid)
}

/// Makes `child` the better victim when memory runs out.
fn offer_to_the_oom_killer(child: Pid) -> io::Result<()> {
    let own: i32 = std::fs::read_to_string("/proc/self/oom_score_adj")?.trim().parse().unwrap_or(0);
    let theirs = own.saturating_add(OOM_DISTANCE).min(OOM_MAX);
    std::fs::write(format!("/proc/{child}/oom_score_adj"), theirs.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_own_variables_are_kept_from_the_command() {
        assert!(is_own_variable(OsStr::new("SIDEWARDEN_TOKEN")));
        assert!(!is_own_variable(OsStr::new("PATH")) && !is_own_variable(OsStr::new("MY_SIDEWARDEN_X")));
    }

    #[test]
    fn an_agent_without_a_user_for_the_command_shares_its_own() {
        let own = Uid::effective().as_raw();
        assert!(would_share_uid(None) && would_share_uid(Some(User { uid: own, gid: 7 })));
        assert!(!would_share_uid(Some(User { uid: own + 1, gid: 7 })));
    }

    #[test]
    fn no_command_is_a_fault_of_the_user() {
        let error = run(&[], None).unwrap_err();
        assert_eq!((error.exit_code(), error.to_string().as_str()), (2, "no command: write it after `exec --`"));
    }
}
