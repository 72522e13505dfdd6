//! Keys on disk: written whole or not at all, and readable by nobody else.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::CaError;

/// Makes `path` and its parents with mode 0700 where they are missing.
pub fn make_dir(path: &Path) -> Result<(), CaError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(access(path))
}

/// Writes a file with mode 0600 so that after a crash it is there whole or not at all.
pub fn write_secret(path: &Path, content: &[u8]) -> Result<(), CaError> {
    write(path, content, 0o600)
}

/// Writes a file with `mode`, whole or not at all, and on disk when this returns.
pub(super) fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), CaError> {
    let parent = parent_of(path);
    let part = path.with_extension("part");
    let write = || -> io::Result<()> {
        let _ = fs::remove_file(&part);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&part)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&part, path)?;
        File::open(parent)?.sync_all()
    };
    write().map_err(access(path))
}

/// Puts the directory `from` where `to` is or was. After a crash in between there is none: then it is made anew.
pub(super) fn replace_dir(from: &Path, to: &Path) -> Result<(), CaError> {
    let parent = parent_of(to);
    let replace = || -> io::Result<()> {
        if to.exists() {
            fs::remove_dir_all(to)?;
        }
        fs::rename(from, to)?;
        File::open(parent)?.sync_all()
    };
    replace().map_err(access(to))
}

/// Brings what was renamed or removed in `dir` to disk.
pub(super) fn sync_dir(dir: &Path) -> Result<(), CaError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(access(dir))
}

/// Where `path` lies, also if it is a bare name.
fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Reads a key, which nobody but its owner may be able to read.
pub(super) fn read_secret(path: &Path) -> Result<Vec<u8>, CaError> {
    check_mode(path, 0o600)?;
    fs::read(path).map_err(access(path))
}

/// Refuses a file or directory that group or others may touch.
pub(super) fn check_mode(path: &Path, wanted: u32) -> Result<(), CaError> {
    let mode = fs::metadata(path).map_err(access(path))?.mode() & 0o777;
    if mode & 0o077 == 0 { Ok(()) } else { Err(CaError::Mode { path: path.to_owned(), mode, wanted }) }
}

pub(super) fn access(path: &Path) -> impl Fn(io::Error) -> CaError + use<> {
    let path = path.to_owned();
    move |error| CaError::Access { path: path.clone(), error }
}

#[cfg(test)]
#[test]
fn a_bare_name_lies_in_the_working_directory() {
    for (path, parent) in [("backup.sealed", "."), ("./x", "."), ("a/b", "a"), ("/x", "/"), ("/", ".")] {
        assert_eq!(parent_of(Path::new(path)), Path::new(parent), "{path}");
    }
}
