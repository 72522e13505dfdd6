//! The one thread that has children: starts the command, hands signals on to it, reaps everything.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::thread::{Builder, JoinHandle};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{Signal as Stream, SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::offer_to_the_oom_killer;

/// Signals that are handed on to the command.
const HANDED_ON: [Signal; 7] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGQUIT,
    Signal::SIGWINCH,
];

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its exit code; 128 and the signal's number when a signal ended it.
    pub code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
}

/// The running command, and the thread that takes care of it.
#[derive(Debug)]
pub struct Reaper {
    pid: i32,
    exit: watch::Receiver<Option<Exit>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What stood in the way of starting.
#[derive(Debug)]
pub(super) enum StartFailure {
    /// The thread, its event loop or its signal handlers.
    Loop(io::Error),
    /// The command.
    Spawn(io::Error),
}

impl Reaper {
    /// Starts `command` on a thread of its own.
    pub(super) fn start(command: Command) -> Result<Reaper, StartFailure> {
        let (started, answer) = std::sync::mpsc::sync_channel(1);
        let (exited, exit) = watch::channel(None);
        let (stop, stopped) = oneshot::channel();
        let body = move || run(command, &started, &exited, stopped);
        let thread = Builder::new().name("init".into()).spawn(body).map_err(StartFailure::Loop)?;
        let gone = || StartFailure::Loop(io::Error::other("its thread ended"));
        let pid = answer.recv().map_err(|_| gone())??;
        Ok(Reaper { pid, exit, stop: Some(stop), thread: Some(thread) })
    }

    /// The command's PID.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits for the command to end. Orphans are reaped further on.
    pub async fn wait(&mut self) -> Exit {
        match self.exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or(LOST),
            Err(_) => LOST,
        }
    }

    /// Sends the command a signal, unless it has ended: its PID may then be another's.
    pub fn signal(&self, signal: Signal) -> Result<(), Errno> {
        if self.exit.borrow().is_some() { Err(Errno::ESRCH) } else { kill(Pid::from_raw(self.pid), signal) }
    }
}

/// The exit that is told when the thread ended without one.
const LOST: Exit = Exit { code: 125, signal: None };

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It has nothing left to do but to end; a panic of it was already shown.
            let _ = thread.join();
        }
    }
}

type Started = std::sync::mpsc::SyncSender<Result<i32, StartFailure>>;

fn run(command: Command, started: &Started, exited: &watch::Sender<Option<Exit>>, stop: oneshot::Receiver<()>) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().build() {
        Ok(runtime) => runtime,
        // The receiver waits for exactly one answer.
        Err(error) => return drop(started.send(Err(StartFailure::Loop(error)))),
    };
    runtime.block_on(async {
        match begin(command) {
            Ok(mut family) => {
                let _ = started.send(Ok(family.child.as_raw()));
                family.live(exited, stop).await;
            }
            Err(failure) => drop(started.send(Err(failure))),
        }
    });
}

/// The command and the notices about it.
struct Family {
    child: Pid,
    children: Stream,
    forwarders: JoinSet<()>,
}

/// Handlers first, so that no signal and no exit falls between.
fn begin(mut command: Command) -> Result<Family, StartFailure> {
    let children = signal(SignalKind::child()).map_err(StartFailure::Loop)?;
    let streams: io::Result<Vec<(Signal, Stream)>> =
        HANDED_ON.into_iter().map(|s| Ok((s, signal(SignalKind::from_raw(s as i32))?))).collect();
    let streams = streams.map_err(StartFailure::Loop)?;
    let child = command.spawn().map_err(StartFailure::Spawn)?;
    let child = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
    if let Err(error) = offer_to_the_oom_killer(child) {
        tracing::warn!(%error, pid = child.as_raw(), "the command is no better victim than the agent when memory runs out");
    }
    let mut forwarders = JoinSet::new();
    for (each, stream) in streams {
        forwarders.spawn(hand_on(each, stream, child));
    }
    Ok(Family { child, children, forwarders })
}

async fn hand_on(each: Signal, mut stream: Stream, child: Pid) {
    while stream.recv().await.is_some() {
        // This thread also reaps, and the loop ends when the command has: its PID is still its own here.
        if let Err(error) = kill(child, each) {
            tracing::warn!(%error, signal = each.as_str(), "a signal could not be handed on");
        }
    }
}

impl Family {
    async fn live(&mut self, exited: &watch::Sender<Option<Exit>>, mut stop: oneshot::Receiver<()>) {
        loop {
            if let Some(exit) = reap(self.child) {
                self.forwarders.abort_all();
                exited.send_replace(Some(exit));
            }
            tokio::select! {
                _ = self.children.recv() => {}
                _ = &mut stop => return,
            }
        }
    }
}

/// Reaps whatever has ended; the command's end if that was among it.
fn reap(child: Pid) -> Option<Exit> {
    let mut exit = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => exit = Some(Exit { code, signal: None }),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                exit = Some(exit_of(ExitStatus::from_raw(signal as i32)));
            }
            Err(Errno::EINTR) => {}
            Ok(WaitStatus::StillAlive) | Err(_) => return exit,
            Ok(_) => {}
        }
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit { code, signal: None },
        (None, Some(signal)) => Exit { code: 128 + signal, signal: Some(signal) },
        (None, None) => LOST,
    }
}
