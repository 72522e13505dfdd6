//! What ends the wait before the tick is over: a program opened in the workload's root (needs CAP_SYS_PTRACE or the
//! workload's user), and a change of its mounts (needs nothing). Without either, the tick is all there is.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::facts::Machine;

/// Where programs are. What is elsewhere is seen at the next tick.
const PROGRAM_DIRS: [&str; 7] = ["/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/app"];

/// After a program was opened, the next ones within this time wake nobody, so that a workload that opens files all the
/// time costs at most this many looks.
const QUIET: Duration = Duration::from_millis(2);

/// More containers than this are watched by the tick alone.
const MAX_ANCHORS: usize = 16;

/// Why a wait ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Woken {
    /// A program was opened.
    pub program: bool,
    /// Mounts changed.
    pub mounts: bool,
}

/// The kernel's notices about one set of containers.
#[derive(Default)]
pub struct Wake {
    programs: Option<Inotify>,
    mounts: Vec<File>,
    quiet: bool,
}

impl Wake {
    /// Notices about the containers of `anchors` (`/proc/<pid>`), as far as they can be had.
    pub fn of(machine: &Machine, anchors: &[String]) -> Wake {
        let anchors = &anchors[..anchors.len().min(MAX_ANCHORS)];
        let mounts = anchors.iter().filter_map(|anchor| machine.open(&format!("{anchor}/mountinfo")).ok()).collect();
        Wake { programs: programs(machine, anchors), mounts, quiet: false }
    }

    /// Whether programs are noticed the moment they are opened.
    pub fn sees_programs(&self) -> bool {
        self.programs.is_some()
    }

    /// Waits until something happens, at most for `tick`.
    pub fn wait(&mut self, tick: Duration) -> Woken {
        let tick = if self.quiet { QUIET.min(tick) } else { tick };
        let programs = self.programs.as_ref().filter(|_| !self.quiet);
        let mut fds: Vec<PollFd<'_>> = self.mounts.iter().map(|f| PollFd::new(f.as_fd(), PollFlags::POLLPRI)).collect();
        fds.extend(programs.map(|inotify| PollFd::new(inotify.as_fd(), PollFlags::POLLIN)));
        let timeout = PollTimeout::try_from(tick).unwrap_or(PollTimeout::MAX);
        // An interrupted wait is a short one; the fork gate is asked either way.
        let _ = poll(&mut fds, timeout);
        let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|r| !r.is_empty());
        let mounts = fds[..self.mounts.len()].iter().any(ready);
        let program = fds[self.mounts.len()..].iter().any(ready);
        drop(fds);
        if program {
            self.drain();
        }
        self.quiet = program;
        Woken { program, mounts }
    }

    fn drain(&self) {
        if let Some(inotify) = &self.programs {
            // What was opened does not matter, only that something was: an overflow loses nothing.
            let _ = inotify.read_events();
        }
    }
}

fn programs(machine: &Machine, anchors: &[String]) -> Option<Inotify> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).ok()?;
    let dirs = anchors.iter().flat_map(|anchor| PROGRAM_DIRS.map(|dir| machine.path(&format!("{anchor}/root{dir}"))));
    let flags = AddWatchFlags::IN_OPEN | AddWatchFlags::IN_ONLYDIR;
    let watched = dirs.filter(|dir| inotify.add_watch(dir, flags).is_ok()).count();
    (watched > 0).then_some(inotify)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_opened_program_ends_the_wait_and_the_next_ones_are_quiet() {
        let root = tempfile::tempdir().unwrap();
        let bin = root.path().join("proc/1/root/bin");
        std::fs::create_dir_all(&bin).unwrap();
        std::fs::write(bin.join("sh"), "").unwrap();
        let mut wake = Wake::of(&Machine::new(root.path()), &["/proc/1".into()]);
        assert!(wake.sees_programs());
        assert_eq!(wake.wait(Duration::from_millis(1)), Woken::default());
        let open = || std::fs::File::open(bin.join("sh")).unwrap();
        open();
        assert!(wake.wait(Duration::from_secs(60)).program);
        open();
        assert!(
            !wake.wait(Duration::from_secs(60)).program,
            "the second one is left for the look after the quiet time"
        );
        assert!(wake.wait(Duration::from_secs(60)).program);
    }

    #[test]
    fn without_sight_there_is_the_tick() {
        let root = tempfile::tempdir().unwrap();
        let mut wake = Wake::of(&Machine::new(root.path()), &["/proc/1".into()]);
        assert!(!wake.sees_programs());
        assert_eq!(wake.wait(Duration::from_millis(1)), Woken::default());
    }
}
