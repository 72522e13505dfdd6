//! A sealed copy of everything in the data directory but the events: CA, register, directive, tokens.
//!
//! ```text
//! sealed { "backup": 1, "made_us": …, "files": [ { "path": "ca/root/cert.pem", "mode": 420, "bytes": <base64> }, … ] }
//! ```
//! Keys lie in it as they lie on disk: sealed ones stay sealed, and need their own passphrase besides.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use sidewarden_proto::directive::Directive;
use sidewarden_proto::enrol::Der;
use sidewarden_proto::secret::Secret;
use sidewarden_proto::time::Timestamp;

use super::seal::{self, Cost, SealFault};
use super::{CaError, files};

const PURPOSE: &str = "backup";
/// Where a restore gathers what it puts in place; it is there for as long as not everything is.
const PART: &str = "restore.part";
/// Most bytes of a backup that is made, or read.
const MAX_BACKUP: u64 = 1 << 30;
/// Deepest path in a backup.
const MAX_DEPTH: usize = 6;
/// The least that a directive's version grows by when it is restored.
const VERSIONS_AHEAD: u64 = 1_000;

#[derive(Serialize, Deserialize)]
struct Backup {
    backup: u8,
    made_us: Timestamp,
    files: Vec<Kept>,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    path: String,
    mode: u32,
    bytes: Der,
}

/// Why there is no backup, or nothing restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// A file.
    #[error(transparent)]
    File(#[from] CaError),
    /// The seal.
    #[error("the backup: {0}")]
    Seal(#[from] SealFault),
    /// A step of a rotation was taken while files were read.
    #[error("the CA changed while it was copied: try again")]
    Changed,
    /// The backup holds what none of ours does.
    #[error("the backup holds {0:?}, which no backup of ours does")]
    Strange(String),
    /// What it leads to would be missing from the backup.
    #[error(
        "{0} is a link, and what it leads to would not be in the backup: put the file or directory itself in its place"
    )]
    Link(PathBuf),
    /// There is something already.
    #[error("{0} is there already: restore into an empty data_dir, nothing is overwritten")]
    Occupied(PathBuf),
    /// A restore ended in the middle.
    #[error("{0} shows that a restore was not finished: empty data_dir, and restore the backup again")]
    Unfinished(PathBuf),
    /// More than anybody needs.
    #[error(
        "the backup is over the limit of {MAX_BACKUP} bytes: data_dir holds more than a CA and its register; move out of it what is none of the collector's"
    )]
    Large,
}

/// What was restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// When the backup was made.
    pub made: Timestamp,
    /// How many files it held.
    pub files: usize,
}

/// Copies `data_dir`, beside a running collector or without one, and seals the copy.
pub fn make(data_dir: &Path, passphrase: &Secret, cost: Cost, now: Timestamp) -> Result<Vec<u8>, BackupError> {
    let list = data_dir.join("ca/generations.json");
    let before = fs::read(&list).ok();
    let mut kept = Gathered { most: MAX_BACKUP, ..Gathered::default() };
    gather(data_dir, Path::new(""), &mut kept)?;
    if fs::read(&list).ok() != before {
        return Err(BackupError::Changed);
    }
    let backup = Backup { backup: 1, made_us: now, files: kept.files };
    let text = serde_json::to_vec(&backup).map_err(|_| SealFault::Form)?;
    let sealed = seal::seal(&text, PURPOSE, passphrase, cost, crate::random)?;
    // It would not be read again.
    if sealed.len() as u64 > MAX_BACKUP { Err(BackupError::Large) } else { Ok(sealed) }
}

/// What was gathered so far, of `most` bytes.
#[derive(Default)]
struct Gathered {
    files: Vec<Kept>,
    bytes: u64,
    most: u64,
}

impl Gathered {
    /// Refuses a file before it is read that would make it too much.
    fn expect(&mut self, path: &Path) -> Result<(), BackupError> {
        self.bytes += fs::metadata(path).map_err(files::access(path))?.len();
        if self.bytes > self.most { Err(BackupError::Large) } else { Ok(()) }
    }
}

/// Whether a file at the top of the data directory belongs to the events, or to nobody once the collector has ended.
fn is_left_out(name: &str) -> bool {
    let passing = [".part", "-wal", "-shm", "-journal", ".sock"];
    name == "lock" || ["log.db", "index.db"].iter().any(|db| name.starts_with(db)) || is_any_end(name, &passing)
}

fn is_any_end(name: &str, ends: &[&str]) -> bool {
    ends.iter().any(|end| name.ends_with(end))
}

fn gather(data_dir: &Path, at: &Path, kept: &mut Gathered) -> Result<(), BackupError> {
    let dir = data_dir.join(at);
    let entries = fs::read_dir(&dir).map_err(files::access(&dir))?;
    let mut names = entries.collect::<Result<Vec<_>, _>>().map_err(files::access(&dir))?;
    names.sort_by_key(fs::DirEntry::file_name);
    for entry in names {
        let name = entry.file_name().to_string_lossy().into_owned();
        let (path, full) = (at.join(&name), entry.path());
        let kind = entry.file_type().map_err(files::access(&full))?;
        if is_left_out(&name) {
            continue;
        }
        if kind.is_symlink() {
            return Err(BackupError::Link(full));
        }
        if kind.is_dir() {
            gather(data_dir, &path, kept)?;
        }
        if !kind.is_file() {
            continue;
        }
        kept.expect(&full)?;
        let bytes =
            if name.ends_with(".db") { copy_of_db(&full)? } else { fs::read(&full).map_err(files::access(&full))? };
        let mode = fs::metadata(&full).map_err(files::access(&full))?.permissions().mode() & 0o777;
        kept.files.push(Kept { path: path.to_string_lossy().into_owned(), mode, bytes: Der(bytes) });
    }
    Ok(())
}

/// A database as of one moment, whoever writes to it.
fn copy_of_db(path: &Path) -> Result<Vec<u8>, BackupError> {
    let fault = |error| CaError::Register { path: path.to_owned(), error };
    let copy = path.with_extension("copy.part");
    let _ = fs::remove_file(&copy);
    let db = Connection::open(path).map_err(fault)?;
    db.busy_timeout(std::time::Duration::from_secs(5)).map_err(fault)?;
    db.execute("VACUUM INTO ?1", [copy.to_string_lossy()]).map_err(fault)?;
    let bytes = fs::read(&copy).map_err(files::access(&copy));
    fs::remove_file(&copy).map_err(files::access(&copy))?;
    Ok(bytes?)
}

/// Puts a backup into `data_dir`, where there is none of it yet. The caller holds the directory's lock.
pub fn restore(data_dir: &Path, sealed: &[u8], passphrase: &Secret, now: Timestamp) -> Result<Restored, BackupError> {
    if sealed.len() as u64 > MAX_BACKUP {
        return Err(BackupError::Large);
    }
    let text = seal::open(sealed, PURPOSE, passphrase)?;
    let backup: Backup = serde_json::from_slice(&text).map_err(|_| SealFault::Form)?;
    let paths: Vec<PathBuf> = backup.files.iter().map(|file| safe(&file.path)).collect::<Result<_, _>>()?;
    let tops: std::collections::BTreeSet<&Path> =
        paths.iter().filter_map(|path| path.iter().next()).map(Path::new).collect();
    for top in tops.iter().chain(&[Path::new("log.db"), Path::new("ca")]) {
        if data_dir.join(top).symlink_metadata().is_ok() {
            return Err(BackupError::Occupied(data_dir.join(top)));
        }
    }
    let part = data_dir.join(PART);
    let _ = fs::remove_dir_all(&part);
    for (path, file) in paths.iter().zip(&backup.files) {
        let to = part.join(path);
        files::make_dir(to.parent().unwrap_or(&part))?;
        let is_directive = path == Path::new("directive.json");
        let bytes = if is_directive { raised(&file.bytes.0, now) } else { file.bytes.0.clone() };
        files::write(&to, &bytes, file.mode & 0o755)?;
    }
    for top in &tops {
        fs::rename(part.join(top), data_dir.join(top)).map_err(files::access(&data_dir.join(top)))?;
    }
    files::sync_dir(data_dir)?;
    fs::remove_dir_all(&part).map_err(files::access(&part))?;
    Ok(Restored { made: backup.made_us, files: backup.files.len() })
}

/// Refuses to begin with half of a backup: without the directive nobody would be revoked.
pub fn check_restored(data_dir: &Path) -> Result<(), BackupError> {
    let part = data_dir.join(PART);
    if part.exists() { Err(BackupError::Unfinished(part)) } else { Ok(()) }
}

/// A path below the data directory, and nowhere else.
fn safe(path: &str) -> Result<PathBuf, BackupError> {
    let wanted = PathBuf::from(path);
    let plain = wanted.components().all(|part| matches!(part, Component::Normal(_)));
    let depth = wanted.components().count();
    let top = wanted.iter().next().and_then(|top| top.to_str()).unwrap_or_default();
    if !plain || depth == 0 || depth > MAX_DEPTH || is_left_out(top) {
        return Err(BackupError::Strange(path.chars().take(200).collect()));
    }
    Ok(wanted)
}

/// The directive with a version that agents have not seen: they take none that is older than theirs, and what was told after
/// the backup must not outrank what comes next. However old it is, and whatever was restored in between: versions grow by
/// less than one in a millisecond, so the time of the restore in milliseconds is ahead of them all.
///
/// One that cannot be read stays as it is: the start says so.
fn raised(bytes: &[u8], now: Timestamp) -> Vec<u8> {
    let Ok(mut directive) = serde_json::from_slice::<Directive>(bytes) else { return bytes.to_vec() };
    let millis = u64::try_from(now.0 / 1_000).unwrap_or(0);
    directive.version = directive.version.saturating_add(VERSIONS_AHEAD).max(millis);
    serde_json::to_vec_pretty(&directive).unwrap_or_else(|_| bytes.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::Register;
    use crate::ca::seal::tests::{CHEAP, passphrase};

    fn filled() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        files::make_dir(&dir.path().join("ca/root")).unwrap();
        files::write_secret(&dir.path().join("ca/root/key.pem"), b"the key").unwrap();
        files::write(&dir.path().join("ca/bundle.pem"), b"the roots", 0o644).unwrap();
        let directive = r#"{"version":7,"trust_domain":"td","issued_us":1,"bundle":[]}"#;
        files::write_secret(&dir.path().join("directive.json"), directive.as_bytes()).unwrap();
        for left_out in ["log.db", "index.db", "lock"] {
            files::write_secret(&dir.path().join(left_out), b"events").unwrap();
        }
        let register = Register::open(&dir.path().join("ca.db")).unwrap();
        register
            .create(&"shop/web".parse().unwrap(), 1, MINUTE, sidewarden_proto::identity::Sha256::ZERO, Timestamp(0))
            .unwrap();
        dir
    }

    const MINUTE: std::time::Duration = std::time::Duration::from_secs(60);

    fn backup(dir: &Path) -> Vec<u8> {
        make(dir, &passphrase(), CHEAP, Timestamp(5)).unwrap()
    }

    #[test]
    fn what_is_restored_is_what_was_there_but_the_events() {
        let (from, to) = (filled(), tempfile::tempdir().unwrap());
        let restored = restore(to.path(), &backup(from.path()), &passphrase(), Timestamp(5)).unwrap();
        assert_eq!(restored, Restored { made: Timestamp(5), files: 4 });
        assert_eq!(fs::read(to.path().join("ca/root/key.pem")).unwrap(), b"the key");
        let mode = |path: &str| fs::metadata(to.path().join(path)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("ca/root/key.pem"), mode("ca/root"), mode("ca/bundle.pem")), (0o600, 0o700, 0o644));
        assert!(!to.path().join("log.db").exists() && !to.path().join("restore.part").exists());
        let directive: Directive =
            serde_json::from_slice(&fs::read(to.path().join("directive.json")).unwrap()).unwrap();
        assert_eq!(directive.version, 7 + VERSIONS_AHEAD);
        assert_eq!(Register::open(&to.path().join("ca.db")).unwrap().tokens().unwrap().len(), 1);
    }

    #[test]
    fn what_is_restored_outranks_all_that_was_told_before_however_old_the_backup_is() {
        let directive =
            |version: u64| format!(r#"{{"version":{version},"trust_domain":"td","issued_us":1,"bundle":[]}}"#);
        let restored = |version, at: i64| {
            let bytes = raised(directive(version).as_bytes(), Timestamp::from_secs(at));
            serde_json::from_slice::<Directive>(&bytes).unwrap().version
        };
        let day = 86_400;
        // A new change each second for ninety days after the backup.
        assert!(restored(7, 100 * day) > 7 + 90 * 86_400);
        // An older backup was restored in the meantime, and changes went on.
        let meanwhile = restored(2, 99 * day) + 86_400;
        assert!(restored(7, 100 * day) > meanwhile);
        assert_eq!(restored(7, 0), 7 + VERSIONS_AHEAD, "also where the clock is of no use");
        assert_eq!(restored(u64::MAX, day), u64::MAX);
        assert_eq!(raised(b"{", Timestamp(0)), b"{");
    }

    #[test]
    fn what_cannot_be_gathered_or_would_be_too_much_is_no_backup() {
        let (from, elsewhere) = (filled(), tempfile::tempdir().unwrap());
        let gathered = |most| gather(from.path(), Path::new(""), &mut Gathered { most, ..Gathered::default() });
        assert!(gathered(1 << 20).is_ok());
        assert!(matches!(gathered(100), Err(BackupError::Large)));
        let ca = from.path().join("ca");
        fs::rename(&ca, elsewhere.path().join("ca")).unwrap();
        std::os::unix::fs::symlink(elsewhere.path().join("ca"), &ca).unwrap();
        assert!(matches!(gathered(1 << 20), Err(BackupError::Link(path)) if path == ca));
        let made = make(from.path(), &passphrase(), CHEAP, Timestamp(5)).unwrap_err().to_string();
        assert!(made.contains("is a link"), "{made}");
    }

    #[test]
    fn nothing_is_overwritten_and_a_wrong_passphrase_restores_nothing() {
        let (from, to) = (filled(), tempfile::tempdir().unwrap());
        let sealed = backup(from.path());
        assert!(restore(to.path(), &sealed, &Secret::new("not the passphrase"), Timestamp(5)).is_err());
        assert!(restore(to.path(), &sealed[..sealed.len() / 2], &passphrase(), Timestamp(5)).is_err());
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 0);
        restore(to.path(), &sealed, &passphrase(), Timestamp(5)).unwrap();
        let error = restore(to.path(), &sealed, &passphrase(), Timestamp(5)).unwrap_err().to_string();
        assert!(error.contains("nothing is overwritten"), "{error}");
    }

    #[test]
    fn half_a_restore_is_no_start() {
        let (from, to) = (filled(), tempfile::tempdir().unwrap());
        restore(to.path(), &backup(from.path()), &passphrase(), Timestamp(5)).unwrap();
        check_restored(to.path()).unwrap();
        // As a crash leaves it.
        files::make_dir(&to.path().join(PART)).unwrap();
        fs::rename(to.path().join("directive.json"), to.path().join(PART).join("directive.json")).unwrap();
        let error = check_restored(to.path()).unwrap_err().to_string();
        assert!(error.contains("restore the backup again"), "{error}");
    }

    #[test]
    fn a_path_that_leads_elsewhere_is_refused() {
        for path in ["../x", "/etc/passwd", "", "ca/../../x", "a/b/c/d/e/f/g", "log.db", "./lock"] {
            assert!(matches!(safe(path), Err(BackupError::Strange(_))), "{path}");
            let files = vec![Kept { path: path.into(), mode: 0o600, bytes: Der(vec![1]) }];
            let text = serde_json::to_vec(&Backup { backup: 1, made_us: Timestamp(0), files }).unwrap();
            let sealed = seal::seal(&text, PURPOSE, &passphrase(), CHEAP, crate::random).unwrap();
            assert!(
                restore(tempfile::tempdir().unwrap().path(), &sealed, &passphrase(), Timestamp(5)).is_err(),
                "{path}"
            );
        }
        assert!(safe("ca/g2/root/key.sealed").is_ok());
    }
}
