//! Bounded reads below one root: the only place that touches /proc, /sys and cgroup files.
//!
//! Files are opened without blocking and read up to a limit, because a workload may have put something else where a
//! kernel file is expected. A path is always given as it would be on the machine (`/proc/7/status`).

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::seen::{Hidden, Why};

/// More than any file read here has; mountinfo of a host with thousands of mounts is the largest.
const MAX_FILE: u64 = 4 << 20;

/// A directory listing longer than this is cut: nothing read here has more.
const MAX_ENTRIES: usize = 4096;

/// The machine as seen below a root: `/`, or a made-up tree.
#[derive(Clone, Debug)]
pub struct Machine {
    root: PathBuf,
}

impl Machine {
    /// The machine whose `/` is `root`.
    pub fn new(root: impl Into<PathBuf>) -> Machine {
        Machine { root: root.into() }
    }

    /// Where `path` lies.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Opens `path` for reading, never waiting for a writer.
    pub fn open(&self, path: &str) -> Result<File, Hidden> {
        let flags = nix::libc::O_NONBLOCK | nix::libc::O_CLOEXEC | nix::libc::O_NOCTTY;
        OpenOptions::new().read(true).custom_flags(flags).open(self.path(path)).map_err(|e| Hidden::from_io(path, &e))
    }

    /// The text of `path`. Bytes that are not UTF-8 (a process may name itself so) are replaced, not refused.
    pub fn read(&self, path: &str) -> Result<String, Hidden> {
        self.bytes(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The bytes of `path`.
    pub fn bytes(&self, path: &str) -> Result<Vec<u8>, Hidden> {
        let mut bytes = Vec::new();
        let mut limited = self.open(path)?.take(MAX_FILE + 1);
        limited.read_to_end(&mut bytes).map_err(|e| Hidden::from_io(path, &e))?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(Hidden { source: path.into(), why: Why::Unclear("it is too long".into()) });
        }
        Ok(bytes)
    }

    /// What the link at `path` says.
    pub fn link(&self, path: &str) -> Result<String, Hidden> {
        let target = fs::read_link(self.path(path)).map_err(|e| Hidden::from_io(path, &e))?;
        Ok(target.to_string_lossy().into_owned())
    }

    /// The inode of `path`.
    pub fn inode(&self, path: &str) -> Result<u64, Hidden> {
        fs::metadata(self.path(path)).map(|m| m.ino()).map_err(|e| Hidden::from_io(path, &e))
    }

    /// Whether `path` is there.
    pub fn exists(&self, path: &str) -> bool {
        fs::symlink_metadata(self.path(path)).is_ok()
    }

    /// The names in the directory `path`, with what each is (links are not followed).
    pub fn list(&self, path: &str) -> Result<Vec<(String, fs::Metadata)>, Hidden> {
        let entries = fs::read_dir(self.path(path)).map_err(|e| Hidden::from_io(path, &e))?;
        let named = |entry: fs::DirEntry| {
            let about = fs::symlink_metadata(entry.path()).ok()?;
            Some((entry.file_name().to_string_lossy().into_owned(), about))
        };
        Ok(entries.flatten().filter_map(named).take(MAX_ENTRIES).collect())
    }

    /// The names in the directory `path`, as they come.
    pub fn names(&self, path: &str) -> Result<impl Iterator<Item = String> + use<>, Hidden> {
        let entries = fs::read_dir(self.path(path)).map_err(|e| Hidden::from_io(path, &e))?;
        Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()))
    }

    /// Whether this is the machine we run on, and no made-up tree.
    pub fn is_this_one(&self) -> bool {
        self.root == Path::new("/")
    }

    /// The PIDs of all processes that this PID namespace shows, ascending.
    pub fn pids(&self) -> Result<Vec<i32>, Hidden> {
        let entries = fs::read_dir(self.path("/proc")).map_err(|e| Hidden::from_io("/proc", &e))?;
        let mut pids: Vec<i32> = entries.flatten().filter_map(|e| pid_of(Path::new(&e.file_name()))).collect();
        pids.sort_unstable();
        Ok(pids)
    }

    /// Our own PID, as this /proc counts.
    pub fn own_pid(&self) -> Result<i32, Hidden> {
        let link = self.link("/proc/self")?;
        pid_of(Path::new(&link)).ok_or_else(|| Hidden::unclear("/proc/self", format!("`{link}` is no process")))
    }
}

fn pid_of(name: &Path) -> Option<i32> {
    name.to_str()?.parse().ok().filter(|pid| *pid > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_never_ends_and_a_pipe_without_writer_are_answers_and_no_hang() {
        let dir = tempfile::tempdir().unwrap();
        let machine = Machine::new(dir.path());
        nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(machine.read("/pipe").unwrap(), "");
        let zeros = Machine::new("/").bytes("/dev/zero").unwrap_err();
        assert_eq!(zeros.why, Why::Unclear("it is too long".into()));
        assert_eq!(machine.read("/nothing").unwrap_err().why, Why::Missing);
    }

    #[test]
    fn bytes_that_are_no_text_do_not_hide_a_file() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("comm"), b"\xff\xfeevil").unwrap();
        assert!(Machine::new(dir.path()).read("/comm").unwrap().ends_with("evil"));
    }
}
