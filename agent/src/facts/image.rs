//! What the files of an image say, read through a running container of it.
//!
//! A container's root is a hostile place to read from: paths are resolved inside of it (`RESOLVE_IN_ROOT`), so that no link
//! leads out, files are read up to a limit, and a walk ends at a limit.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

use super::engine::ImageFiles;
use super::machine::Machine;
use super::seen::{Hidden, Seen, Why};

/// dpkg's list of a large desktop is about half of this.
pub(crate) const MAX_FILE: u64 = 16 << 20;
/// Files and directories that are looked at for setuid bits.
const MAX_ENTRIES: usize = 150_000;
/// Directories below directories.
const MAX_DEPTH: usize = 48;
/// Packages and files that are kept.
pub(crate) const MAX_KEPT: usize = 10_000;

/// Reads them through the process `pid` of this PID namespace.
pub fn files(machine: &Machine, pid: i32) -> Seen<ImageFiles> {
    let source = format!("/proc/{pid}/root");
    let root = open(&machine.path(&source), OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
    match root {
        Ok(root) => Seen::Known(read(&root), source),
        Err(error) => Seen::Hidden(Hidden::from_io(&source, &error.into())),
    }
}

fn read(root: &OwnedFd) -> ImageFiles {
    let release = ["etc/os-release", "usr/lib/os-release"].iter().find_map(|path| text(root, path));
    let (dpkg, apk) = (text(root, "var/lib/dpkg/status"), text(root, "lib/apk/db/installed"));
    let passwd = text(root, "etc/passwd");
    let rpm = ["var/lib/rpm", "usr/lib/sysimage/rpm", "usr/share/rpm"].iter().any(|path| within(root, path).is_ok());
    ImageFiles {
        unread_packages: rpm,
        setuid: setuid(root),
        ..of_texts(release.as_deref(), dpkg.as_deref(), apk.as_deref(), passwd.as_deref())
    }
}

/// What these files say: os-release, the packages of dpkg and apk, and passwd.
pub(crate) fn of_texts(
    release: Option<&str>,
    dpkg: Option<&str>,
    apk: Option<&str>,
    passwd: Option<&str>,
) -> ImageFiles {
    let packages = dpkg.map(|text| names(text, "Package: "));
    ImageFiles {
        release: release.and_then(os_release),
        packages: packages.or_else(|| apk.map(|text| names(text, "P:"))),
        unread_packages: false,
        roots: passwd.map(roots).unwrap_or_default(),
        setuid: None,
    }
}

fn within(root: &OwnedFd, path: &str) -> Result<OwnedFd, Hidden> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how).map_err(|error| Hidden::from_io(path, &error.into()))
}

/// The text of a regular file, without what is too long.
fn text(root: &OwnedFd, path: &str) -> Option<String> {
    let file = File::from(within(root, path).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).ok()?;
    (bytes.len() as u64 <= MAX_FILE).then(|| String::from_utf8_lossy(&bytes).into_owned())
}

/// `ID` and `VERSION_ID`; a rolling release has no version.
fn os_release(text: &str) -> Option<(String, String)> {
    let value = |key: &str| {
        let line = text.lines().find_map(|l| l.trim().strip_prefix(key)?.strip_prefix('='))?;
        let bare: String = line.trim().trim_matches(['"', '\'']).chars().take(64).collect();
        Some(bare).filter(|v| !v.is_empty())
    };
    Some((value("ID")?, value("VERSION_ID").unwrap_or_default()))
}

/// Users with the number 0.
fn roots(passwd: &str) -> Vec<String> {
    let root = |line: &str| {
        let mut fields = line.split(':');
        let (name, _, uid) = (fields.next()?, fields.next()?, fields.next()?);
        (uid.parse() == Ok(0_u32)).then(|| name.to_owned())
    };
    passwd.lines().filter_map(root).take(MAX_KEPT).collect()
}

fn names(text: &str, key: &str) -> Vec<String> {
    text.lines().filter_map(|line| line.strip_prefix(key)).take(MAX_KEPT).map(|n| n.trim().to_owned()).collect()
}

/// Setuid and setgid files of the root's own file system; `None` where not all of it could be looked at.
fn setuid(root: &OwnedFd) -> Option<Vec<String>> {
    let device = fs::metadata(below(root)).ok()?.dev();
    let (mut found, mut left) = (Vec::new(), MAX_ENTRIES);
    walk(root, "", device, 0, &mut left, &mut found)?;
    found.sort();
    Some(found)
}

/// An open directory as a path that a container cannot turn elsewhere.
fn below(dir: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", dir.as_raw_fd())
}

fn walk(root: &OwnedFd, dir: &str, device: u64, depth: usize, left: &mut usize, found: &mut Vec<String>) -> Option<()> {
    let here = within(root, if dir.is_empty() { "/" } else { dir }).ok()?;
    let base = below(&here);
    for entry in fs::read_dir(&base).ok()? {
        *left = left.checked_sub(1)?;
        let Ok(entry) = entry else { return None };
        let (Ok(kind), name) = (entry.file_type(), entry.file_name()) else { return None };
        let name = name.to_string_lossy();
        let path = format!("{dir}/{name}");
        if kind.is_dir() {
            let Ok(about) = entry.metadata() else { continue };
            if about.dev() == device && depth < MAX_DEPTH {
                walk(root, &path, device, depth + 1, left, found)?;
            }
        } else if kind.is_file() {
            let Ok(about) = entry.metadata() else { continue };
            if about.mode() & 0o6000 != 0 && found.len() < MAX_KEPT {
                found.push(path);
            }
        }
    }
    Some(())
}

/// Why an image of which nothing runs here has no files to show.
pub fn nothing_runs() -> Seen<ImageFiles> {
    Seen::Hidden(Hidden { source: "files of the image".into(), why: Why::Unclear("no container of it runs".into()) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::Path;

    use super::*;

    fn put(root: &Path, path: &str, text: &str, mode: u32) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// A machine whose process 7 has `root`.
    fn look(dir: &Path) -> ImageFiles {
        match files(&Machine::new(dir), 7) {
            Seen::Known(files, _) => files,
            Seen::Hidden(why) => panic!("{why:?}"),
        }
    }

    #[test]
    fn release_packages_and_setuid_files_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("proc/7/root");
        put(&root, "usr/lib/os-release", "NAME=x\nID=debian\nVERSION_ID=\"12\"\n", 0o644);
        fs::create_dir_all(root.join("etc")).unwrap();
        symlink("/usr/lib/os-release", root.join("etc/os-release")).unwrap();
        put(&root, "var/lib/dpkg/status", "Package: bash\nVersion: 1\n\nPackage: gcc\n", 0o644);
        put(&root, "etc/passwd", "root:x:0:0::/:/bin/sh\ntoor:x:0:0::/:\napp:x:7:7::/:\nbroken\n", 0o644);
        put(&root, "usr/bin/su", "", 0o4755);
        put(&root, "usr/bin/wall", "", 0o2755);
        put(&root, "usr/bin/ls", "", 0o755);
        let files = look(dir.path());
        assert_eq!(files.release, Some(("debian".into(), "12".into())));
        assert_eq!(files.roots, ["root", "toor"]);
        assert_eq!(files.packages, Some(vec!["bash".to_owned(), "gcc".into()]));
        assert_eq!(files.setuid, Some(vec!["/usr/bin/su".to_owned(), "/usr/bin/wall".into()]));
    }

    #[test]
    fn nothing_leads_out_of_the_root_and_nothing_hangs() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("proc/7/root");
        put(dir.path(), "outside/os-release", "ID=host\nVERSION_ID=1\n", 0o644);
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::create_dir_all(root.join("var/lib/dpkg")).unwrap();
        symlink(dir.path().join("outside/os-release"), root.join("etc/os-release")).unwrap();
        symlink("../../../../outside", root.join("out")).unwrap();
        nix::unistd::mkfifo(&root.join("var/lib/dpkg/status"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let files = look(dir.path());
        assert_eq!(files, ImageFiles { setuid: Some(Vec::new()), ..ImageFiles::default() });
    }

    #[test]
    fn a_hostile_release_file_is_cut() {
        assert_eq!(os_release("ID=\nVERSION_ID=3"), None);
        assert_eq!(os_release("\u{0}\u{1}"), None);
        let long = format!("ID={}\n", "x".repeat(1 << 20));
        assert_eq!(os_release(&long).unwrap().0.len(), 64);
    }
}
