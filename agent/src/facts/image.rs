//! What the files of an image say, read through a running container of it.
//!
//! A container's root is a hostile place to read from: paths are resolved inside of it (`RESOLVE_IN_ROOT`), so that no link
//! leads out, files are read up to a limit, and a walk ends at a limit.

use std::collections::HashSet;
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
    let release = ["etc/os-release", "usr/lib/os-release"].iter().map(|path| text(root, path));
    let release = release.reduce(|first, other| if first == Text::Missing { other } else { first });
    let (dpkg, apk) = (text(root, "var/lib/dpkg/status"), text(root, "lib/apk/db/installed"));
    let passwd = text(root, "etc/passwd");
    let rpm = ["var/lib/rpm", "usr/lib/sysimage/rpm", "usr/share/rpm"].iter().any(|path| within(root, path).is_ok());
    let files = of_texts(&release.unwrap_or_default(), &dpkg, &apk, &passwd);
    ImageFiles { unread_packages: rpm || files.unread_packages, setuid: setuid(root), ..files }
}

/// The text of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Text {
    /// There is none.
    #[default]
    Missing,
    /// It is too long, or is no file, or cannot be read.
    Unread,
    /// All of it.
    Whole(String),
}

impl Text {
    fn whole(&self) -> Option<&str> {
        match self {
            Text::Whole(text) => Some(text),
            Text::Missing | Text::Unread => None,
        }
    }
}

/// What these files say: os-release, the packages of dpkg and apk, and passwd.
pub(crate) fn of_texts(release: &Text, dpkg: &Text, apk: &Text, passwd: &Text) -> ImageFiles {
    let packages = packages(dpkg, apk);
    ImageFiles {
        release: release.whole().and_then(os_release),
        unread_packages: packages.is_none(),
        packages: packages.flatten(),
        roots: passwd.whole().map(roots).unwrap_or_default(),
        setuid: None,
    }
}

/// The names in both lists, where there is one; `None` where not all of them can be told.
fn packages(dpkg: &Text, apk: &Text) -> Option<Option<Vec<String>>> {
    let mut all = None;
    for (list, key) in [(dpkg, "Package: "), (apk, "P:")] {
        match list {
            Text::Missing => {}
            Text::Unread => return None,
            Text::Whole(text) => all.get_or_insert_with(Vec::new).extend(names(text, key)?),
        }
    }
    Some(all)
}

fn within(root: &OwnedFd, path: &str) -> Result<OwnedFd, Hidden> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how).map_err(|error| Hidden::from_io(path, &error.into()))
}

fn text(root: &OwnedFd, path: &str) -> Text {
    let read = |file: OwnedFd| {
        let file = File::from(file);
        let is_file = file.metadata().ok()?.is_file();
        let mut bytes = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut bytes).ok()?;
        (is_file && bytes.len() as u64 <= MAX_FILE).then(|| String::from_utf8_lossy(&bytes).into_owned())
    };
    match within(root, path) {
        Ok(file) => read(file).map_or(Text::Unread, Text::Whole),
        Err(Hidden { why: Why::Missing, .. }) => Text::Missing,
        Err(_) => Text::Unread,
    }
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

/// Names that stand for the number 0, as docker reads them: what is no number, or is not there, is 0, and of two lines with
/// one name the first counts. None at all where there are too many to keep.
fn roots(passwd: &str) -> Vec<String> {
    let (mut seen, mut roots) = (HashSet::new(), Vec::new());
    for line in passwd.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let mut fields = line.split(':');
        let (name, uid) = (fields.next().unwrap_or_default(), fields.nth(1).unwrap_or_default());
        if seen.insert(name) && is_zero(uid) {
            roots.push(name.to_owned());
        }
    }
    if roots.len() > MAX_KEPT { Vec::new() } else { roots }
}

fn is_zero(uid: &str) -> bool {
    let digits = uid.strip_prefix(['+', '-']).unwrap_or(uid);
    digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) || digits.bytes().all(|b| b == b'0')
}

/// What stands behind `key`; `None` where that is more than is kept.
fn names(text: &str, key: &str) -> Option<Vec<String>> {
    let all = text.lines().filter_map(|line| line.strip_prefix(key)).map(|name| name.trim().to_owned());
    let all: Vec<String> = all.take(MAX_KEPT + 1).collect();
    (all.len() <= MAX_KEPT).then_some(all)
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
            if about.dev() == device {
                let deeper = Some(depth + 1).filter(|deeper| *deeper <= MAX_DEPTH)?;
                walk(root, &path, device, deeper, left, found)?;
            }
        } else if kind.is_file() {
            let Ok(about) = entry.metadata() else { continue };
            if about.mode() & 0o6000 != 0 {
                found.push(path);
            }
            if found.len() > MAX_KEPT {
                return None;
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
        assert_eq!(files.roots, ["root", "toor", "broken"]);
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
        let expected = ImageFiles { setuid: Some(Vec::new()), unread_packages: true, ..ImageFiles::default() };
        assert_eq!(files, expected, "a pipe is no list of packages");
    }

    #[test]
    fn what_could_not_be_looked_at_whole_is_not_known() {
        let deep = |levels: usize| {
            let dir = tempfile::tempdir().unwrap();
            put(&dir.path().join("proc/7/root"), &("d/".repeat(levels) + "su"), "", 0o4755);
            look(dir.path()).setuid.map(|found| found.len())
        };
        assert_eq!((deep(MAX_DEPTH), deep(MAX_DEPTH + 1)), (Some(1), None));
        let many = |count: usize| {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path().join("proc/7/root");
            put(&root, "first", "", 0o4755);
            for n in 1..count {
                fs::hard_link(root.join("first"), root.join(n.to_string())).unwrap();
            }
            look(dir.path()).setuid.map(|found| found.len())
        };
        assert_eq!((many(MAX_KEPT), many(MAX_KEPT + 1)), (Some(MAX_KEPT), None));
    }

    #[test]
    fn packages_of_both_lists_count_and_a_list_that_is_not_read_whole_is_unread() {
        let dpkg = |count: usize| Text::Whole("Package: x\n".repeat(count));
        let apk = Text::Whole("P:musl\nV:1\n".into());
        let check = |dpkg: &Text, apk: &Text, expected: (Option<usize>, bool)| {
            let files = of_texts(&Text::Missing, dpkg, apk, &Text::Missing);
            assert_eq!((files.packages.map(|p| p.len()), files.unread_packages), expected);
        };
        check(&Text::Missing, &Text::Missing, (None, false));
        check(&dpkg(2), &Text::Missing, (Some(2), false));
        check(&dpkg(2), &apk, (Some(3), false));
        check(&dpkg(MAX_KEPT), &Text::Missing, (Some(MAX_KEPT), false));
        check(&dpkg(MAX_KEPT + 1), &apk, (None, true));
        check(&Text::Unread, &apk, (None, true));
        check(&dpkg(1), &Text::Unread, (None, true));
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("proc/7/root");
        put(&root, "var/lib/dpkg/status", "", 0o644);
        File::options().write(true).open(root.join("var/lib/dpkg/status")).unwrap().set_len(MAX_FILE + 1).unwrap();
        let files = look(dir.path());
        assert_eq!((files.packages, files.unread_packages), (None, true));
    }

    #[test]
    fn a_line_of_passwd_that_docker_takes_for_root_is_roots() {
        let rows = [
            ("root:x:0:0::/:", true),
            ("  indented:x:0:0::/:", true),
            ("short", true),
            ("short:x", true),
            ("empty:x::5::/:", true),
            ("words:x:ten:5::/:", true),
            ("spaced:x: 7:5::/:", true),
            ("zeros:x:000:5::/:", true),
            ("signed:x:-0:5::/:", true),
            ("huge:x:99999999999999999999:5::/:", false),
            ("app:x:7:7::/:", false),
            ("minus:x:-1:7::/:", false),
        ];
        for (line, expected) in rows {
            assert_eq!(roots(line).len(), usize::from(expected), "{line}");
        }
        assert_eq!(roots("app:x:7:7::/:\napp:x:0:0::/:\n\n"), Vec::<String>::new(), "the first line counts");
        let many: String = (0..=MAX_KEPT).map(|n| format!("r{n}:x:0\n")).collect();
        assert!(roots(&many).is_empty(), "unknown, and not cut");
    }

    #[test]
    fn a_hostile_release_file_is_cut() {
        assert_eq!(os_release("ID=\nVERSION_ID=3"), None);
        assert_eq!(os_release("\u{0}\u{1}"), None);
        let long = format!("ID={}\n", "x".repeat(1 << 20));
        assert_eq!(os_release(&long).unwrap().0.len(), 64);
    }
}
