//! A folder into which a build pipeline puts reports of scanners. Each file is read once, and again when it changes.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sidewarden_proto::evidence::Scan;

use super::taken::{self, Taken};
use super::trivy::{self, MAX_REPORT};
use crate::app::Core;

/// Files looked at; those beyond are told of.
const MAX_FILES: usize = 10_000;

/// What tells a file from the same one later: its inode, size and time of change.
type Mark = (u64, u64, i64, i64);

/// The folder, and what was read in it.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    seen: BTreeMap<PathBuf, Mark>,
    /// Files that stand still since the last look are whole.
    waiting: BTreeMap<PathBuf, Mark>,
}

/// Files read at a time; the rest waits for the next look.
const AT_ONCE: usize = 8;
/// How often the folder is looked at.
const EVERY: Duration = Duration::from_secs(10);

/// Takes in what is put into the folder, until the shutdown.
pub async fn keep(core: Core, mut folder: Folder) {
    let mut beat = tokio::time::interval(EVERY);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut is_lost = false;
    loop {
        tokio::select! {
            _ = beat.tick() => {}
            () = core.shutdown.cancelled() => return,
        }
        let looked = tokio::task::spawn_blocking(move || (folder.look(AT_ONCE), folder)).await;
        let Ok((read, again)) = looked else { return };
        folder = again;
        match read {
            Ok(read) => {
                is_lost = false;
                for (path, read) in read {
                    if !take(&core, &path, read).await {
                        folder.forget(&path);
                    }
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut is_lost, true) {
                    tracing::warn!(folder = %folder.path.display(), %error, "the folder of scans cannot be read");
                }
            }
        }
    }
}

/// Takes in what was read; not if it has to be tried again.
async fn take(core: &Core, path: &Path, read: Result<Scan, String>) -> bool {
    let shown = crate::table::clean(&path.display().to_string());
    let scan = match read {
        Ok(scan) => Scan { by: "the folder of scans".into(), source: shown.chars().take(300).collect(), ..scan },
        Err(error) => {
            tracing::warn!(file = shown, error, "a file in the folder of scans is no report");
            return true;
        }
    };
    match taken::take(core, scan).await {
        Ok(Taken::New) => tracing::info!(file = shown, "a scan was taken in"),
        Ok(Taken::Same) | Err(_) => {}
        Ok(Taken::Older(newest)) => tracing::debug!(file = shown, %newest, "there is a newer scan of this image"),
        Ok(Taken::Future) => tracing::warn!(file = shown, "the scan says that it was made in the future"),
        Ok(Taken::Waiting) => {
            tracing::warn!(file = shown, "the store has not taken the scan yet: it is read again");
            return false;
        }
    }
    true
}

/// A file that was read: what is in it, or why that is of no use.
pub type Read = (PathBuf, Result<Scan, String>);

impl Folder {
    /// The folder at `path`; it may not be there yet.
    pub fn new(path: &Path) -> Folder {
        Folder { path: path.to_owned(), seen: BTreeMap::new(), waiting: BTreeMap::new() }
    }

    /// Has a file read again.
    pub fn forget(&mut self, path: &Path) {
        self.seen.remove(path);
    }

    /// Files that are new or have changed, and have stood still since the last look; at most `most` of them.
    pub fn look(&mut self, most: usize) -> Result<Vec<Read>, std::io::Error> {
        let mut found = BTreeMap::new();
        for entry in std::fs::read_dir(&self.path)? {
            let path = entry?.path();
            let is_report = path.extension().is_some_and(|end| end == "json");
            let Ok(about) = std::fs::symlink_metadata(&path) else { continue };
            if is_report && about.is_file() && found.len() < MAX_FILES {
                found.insert(path, (about.ino(), about.size(), about.mtime(), about.mtime_nsec()));
            }
        }
        self.seen.retain(|path, _| found.contains_key(path));
        let still = |(path, mark): &(&PathBuf, &Mark)| {
            self.waiting.get(*path) == Some(*mark) && self.seen.get(*path) != Some(*mark)
        };
        let due: Vec<(PathBuf, Mark)> =
            found.iter().filter(still).take(most).map(|(path, mark)| (path.clone(), *mark)).collect();
        let read = due.iter().map(|(path, _)| (path.clone(), read(path))).collect();
        self.seen.extend(due);
        self.waiting = found;
        Ok(read)
    }
}

fn read(path: &Path) -> Result<Scan, String> {
    // Neither a link that leads elsewhere nor a pipe that never ends, should it have become one meanwhile.
    let flags = nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK;
    let opened = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path);
    let file = opened.map_err(|error| error.to_string())?;
    let about = file.metadata().map_err(|error| error.to_string())?;
    if !about.is_file() {
        return Err("it is no regular file".into());
    }
    if about.size() > MAX_REPORT as u64 {
        return Err(trivy::TrivyError::Large.to_string());
    }
    trivy::read(file).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::trivy::tests::{ID, REPORT};
    use super::*;

    fn names(read: &[Read]) -> Vec<&str> {
        read.iter().map(|(path, _)| path.file_name().unwrap().to_str().unwrap()).collect()
    }

    #[test]
    fn a_file_is_read_once_it_stands_still_and_again_when_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let mut folder = Folder::new(dir.path());
        let file = dir.path().join("a.json");
        std::fs::write(&file, &REPORT[..100]).unwrap();
        assert_eq!(names(&folder.look(9).unwrap()), [""; 0], "it may still be being written");
        std::fs::write(&file, REPORT).unwrap();
        assert_eq!(names(&folder.look(9).unwrap()), [""; 0]);
        let read = folder.look(9).unwrap();
        assert_eq!((names(&read), read[0].1.as_ref().unwrap().image_id.as_str()), (vec!["a.json"], ID));
        assert_eq!(names(&folder.look(9).unwrap()), [""; 0]);
        std::fs::write(&file, "{}").unwrap();
        folder.look(9).unwrap();
        let read = folder.look(9).unwrap();
        assert!(read[0].1.as_ref().unwrap_err().contains("names no image"), "{read:?}");
    }

    #[test]
    fn what_is_no_report_by_name_or_kind_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.txt"), REPORT).unwrap();
        std::fs::create_dir(dir.path().join("d.json")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("l.json")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("p.json"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let large = std::fs::File::create(dir.path().join("large.json")).unwrap();
        large.set_len(MAX_REPORT as u64 + 1).unwrap();
        let mut folder = Folder::new(dir.path());
        folder.look(9).unwrap();
        let read = folder.look(9).unwrap();
        assert_eq!(names(&read), ["large.json"]);
        assert!(read[0].1.as_ref().unwrap_err().contains("more than"), "{read:?}");
        assert!(super::read(&dir.path().join("p.json")).is_err(), "a pipe is not waited for");
    }

    #[test]
    fn no_more_than_asked_for_are_read_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        (0..5).for_each(|n| std::fs::write(dir.path().join(format!("{n}.json")), REPORT).unwrap());
        let mut folder = Folder::new(dir.path());
        folder.look(2).unwrap();
        let counts: Vec<usize> = (0..4).map(|_| folder.look(2).unwrap().len()).collect();
        assert_eq!(counts, [2, 2, 1, 0]);
        assert!(Folder::new(&dir.path().join("none")).look(2).is_err());
    }
}
