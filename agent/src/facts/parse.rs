//! Text of the kernel to values, where `procfs` does not do it or would refuse too much. Pure.

use procfs::FromBufRead as _;
use procfs::net::{TcpNetEntries, TcpState, UdpNetEntries, UdpState};
use procfs::process::{MountInfo, MountOptFields, Status};
use procfs::{ExplicitSystemInfo, FromBufReadSI as _};
use sidewarden_proto::event::Protocol;

use super::listeners::Listener;

/// What is used of `/proc/<pid>/stat`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatLine {
    /// Its name. `procfs` cuts the one in `status` at a colon, and runc's first stage is `runc:[2:INIT]`.
    pub name: String,
    /// Its state, for example `S`; `Z` is a zombie.
    pub state: char,
    /// Its parent.
    pub ppid: i32,
    /// Its session.
    pub session: i32,
    /// Clock ticks between boot and its start.
    pub starttime: u64,
}

/// Reads `/proc/<pid>/stat`. The name in it may hold anything, brackets and blanks included.
pub fn stat(text: &str) -> Option<StatLine> {
    let (before, rest) = text.rsplit_once(')')?;
    let (_, name) = before.split_once('(')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let at = |n: usize| fields.get(n).copied();
    Some(StatLine {
        name: name.to_owned(),
        state: at(0)?.chars().next()?,
        ppid: at(1)?.parse().ok()?,
        session: at(3)?.parse().ok()?,
        starttime: at(19)?.parse().ok()?,
    })
}

/// Reads `/proc/<pid>/status`.
pub fn status(text: &str) -> Result<Status, String> {
    Status::from_buf_read(text.as_bytes()).map_err(|e| e.to_string())
}

/// The arguments in `/proc/<pid>/cmdline`.
pub fn arguments(text: &str) -> Vec<String> {
    let text = text.trim_end_matches('\0');
    if text.is_empty() { Vec::new() } else { text.split('\0').map(str::to_owned).collect() }
}

/// The cgroups of one process: path by hierarchy. Two processes with equal ones are in the same container.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cgroup(Vec<(String, String)>);

impl Cgroup {
    /// Reads `/proc/<pid>/cgroup`.
    pub fn parse(text: &str) -> Result<Cgroup, String> {
        let lines = procfs::ProcessCGroups::from_buf_read(text.as_bytes()).map_err(|e| e.to_string())?;
        let mut paths: Vec<_> = lines.into_iter().map(|c| (c.controllers.join(","), c.pathname)).collect();
        if paths.is_empty() {
            return Err("it names no cgroup".into());
        }
        paths.sort();
        Ok(Cgroup(paths))
    }

    /// Whether it is the root in every hierarchy, which says nothing about what it holds.
    pub fn is_root(&self) -> bool {
        self.0.iter().all(|(_, path)| path == "/")
    }

    /// Whether this is `outer` or lies below it. Nothing but the root itself is held to be within the root.
    pub fn is_within(&self, outer: &Cgroup) -> bool {
        if self == outer {
            return true;
        }
        // A path that begins with `/..` lies beside our own cgroup namespace, not below its root.
        let below = |inner: &str, outer: &str| match outer {
            "/" => !inner.starts_with("/.."),
            _ => inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
        };
        let mut pairs = self.0.iter().zip(&outer.0);
        !outer.is_root()
            && self.0.len() == outer.0.len()
            && pairs.all(|((c, inner), (d, outer))| c == d && below(inner, outer))
    }

    /// The path that tells most: of the hierarchy with the longest one.
    pub fn path(&self) -> &str {
        self.0.iter().map(|(_, path)| path.as_str()).max_by_key(|path| path.len()).unwrap_or("/")
    }

    /// Whether some path holds `part`, for example a container's id.
    pub fn names(&self, part: &str) -> bool {
        self.0.iter().any(|(_, path)| path.contains(part))
    }
}

/// One mount of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// The device, as `major:minor`.
    pub device: String,
    /// What of the file system is mounted.
    pub root: String,
    /// Where.
    pub point: String,
    /// The file system's type.
    pub fs: String,
    /// Its source, empty where it has none.
    pub source: String,
    /// It cannot be written.
    pub read_only: bool,
    /// The group its mounts are shared with (`shared:N`).
    pub shared: Option<u32>,
    /// Options of the file system, as `name` or `name=value`, sorted.
    pub options: Vec<String>,
}

impl Mount {
    /// Whether the file system has the option `name`.
    pub fn has(&self, name: &str) -> bool {
        self.options.iter().any(|option| option == name)
    }

    /// Whether the mount point is `path` or below it.
    pub fn is_at_or_below(&self, path: &str) -> bool {
        self.point.strip_prefix(path).is_some_and(|rest| path == "/" || rest.is_empty() || rest.starts_with('/'))
    }
}

/// Reads `/proc/<pid>/mountinfo`. One line that cannot be read spoils all: what it hides could be the violation.
pub fn mounts(text: &str) -> Result<Vec<Mount>, String> {
    let line = |(n, line): (usize, &str)| {
        MountInfo::from_line(line).map(mount).map_err(|e| format!("line {} is unreadable: {e}", n + 1))
    };
    text.lines().enumerate().map(line).collect()
}

fn mount(info: MountInfo) -> Mount {
    let mut options: Vec<String> =
        info.super_options.iter().map(|(k, v)| v.as_ref().map_or_else(|| k.clone(), |v| format!("{k}={v}"))).collect();
    options.sort();
    Mount {
        device: info.majmin,
        root: unescape(&info.root),
        point: unescape(&info.mount_point.to_string_lossy()),
        fs: info.fs_type,
        source: info.mount_source.map(|s| unescape(&s)).unwrap_or_default(),
        read_only: info.mount_options.contains_key("ro") || info.super_options.contains_key("ro"),
        shared: info.opt_fields.iter().find_map(|f| if let MountOptFields::Shared(n) = f { Some(*n) } else { None }),
        options,
    }
}

/// Blank, tab, newline and backslash are written as three octal digits in mountinfo.
fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let octal = (bytes[i] == b'\\')
            .then(|| text.get(i + 1..i + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok()))
            .flatten();
        out.push(octal.unwrap_or(bytes[i]));
        i += if octal.is_some() { 4 } else { 1 };
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// One line of a uid_map: (first inside, first outside, how many).
pub type UidRange = (u32, u32, u32);

/// Reads `/proc/<pid>/uid_map`.
pub fn uid_map(text: &str) -> Result<Vec<UidRange>, String> {
    let line = |line: &str| {
        let mut numbers = line.split_whitespace().map(str::parse::<u32>);
        let mut next = || numbers.next()?.ok();
        Some((next()?, next()?, next()?))
    };
    text.lines().map(|l| line(l).ok_or_else(|| format!("`{l}` is no mapping"))).collect()
}

/// The sockets in `/proc/net/tcp`, `tcp6`, `udp` or `udp6` that take what others send.
pub fn sockets(text: &str, protocol: Protocol) -> Result<Vec<Listener>, String> {
    let found = match protocol {
        Protocol::Tcp => {
            let entries = TcpNetEntries::from_buf_read(text.as_bytes(), &MACHINE).map_err(|e| e.to_string())?;
            let listening = entries.0.into_iter().filter(|e| e.state == TcpState::Listen);
            listening.map(|e| (e.local_address, e.uid, e.inode)).collect::<Vec<_>>()
        }
        Protocol::Udp => {
            let entries = UdpNetEntries::from_buf_read(text.as_bytes(), &MACHINE).map_err(|e| e.to_string())?;
            let unconnected = entries.0.into_iter().filter(|e| e.state == UdpState::Close);
            unconnected.map(|e| (e.local_address, e.uid, e.inode)).collect()
        }
    };
    let listener = |(address, uid, inode)| Listener { protocol, address, uid, inode, ..Listener::default() };
    Ok(found.into_iter().map(listener).collect())
}

const MACHINE: ExplicitSystemInfo = ExplicitSystemInfo {
    boot_time_secs: 0,
    ticks_per_second: 100,
    page_size: 4096,
    is_little_endian: cfg!(target_endian = "little"),
};

/// A limit that may be absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Nothing is limited.
    None,
    /// At most this much.
    At(u64),
}

/// Reads a cgroup file with one number: `max`, `-1`, and the number near 2^63 that v1 writes for "no limit" are none.
pub fn limit(text: &str) -> Result<Limit, String> {
    const V1_NO_MEMORY_LIMIT: u64 = 0x7fff_ffff_ffff_0000;
    match text.trim() {
        "max" | "-1" => Ok(Limit::None),
        number => match number.parse::<u64>() {
            Ok(n) if n >= V1_NO_MEMORY_LIMIT => Ok(Limit::None),
            Ok(n) => Ok(Limit::At(n)),
            Err(_) => Err(format!("`{}` is no limit", number.escape_debug())),
        },
    }
}

/// Total memory in `/proc/meminfo`, in bytes.
pub fn total_memory(text: &str) -> Result<u64, String> {
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib = line.and_then(|l| l.trim().strip_suffix(" kB")).and_then(|n| n.trim().parse::<u64>().ok());
    kib.map(|n| n.saturating_mul(1024)).ok_or_else(|| "it has no MemTotal".into())
}

/// The last field of `/proc/loadavg`: the PID given out last in the reader's PID namespace.
pub fn last_pid(text: &str) -> Option<u32> {
    text.split_whitespace().nth(4)?.parse().ok()
}

/// The inode in the target of a namespace link, `uts:[4026531838]`.
pub fn namespace_inode(link: &str) -> Result<u64, String> {
    let number = link.split_once(":[").and_then(|(_, rest)| rest.strip_suffix(']')).and_then(|n| n.parse().ok());
    number.ok_or_else(|| format!("`{}` is no namespace", link.escape_debug()))
}

/// One row of `/proc/<pid>/limits`: name, soft, hard.
pub type LimitRow = (String, String, String);

/// The rows of `/proc/<pid>/limits`. Names have blanks, so the columns are found by their width.
pub fn limits(text: &str) -> Result<Vec<LimitRow>, String> {
    let row = |line: &str| {
        let (name, rest) = (line.get(..26)?, line.get(26..)?);
        let mut values = rest.split_whitespace();
        Some((name.trim().to_owned(), values.next()?.to_owned(), values.next()?.to_owned()))
    };
    text.lines().skip(1).map(|l| row(l).ok_or_else(|| format!("`{}` is no limit", l.escape_debug()))).collect()
}

/// The names of Linux capabilities, by bit.
const CAPABILITIES: [&str; 41] = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

/// A set of capabilities in words: `net_raw, sys_admin`; `none` when empty.
pub fn capability_names(set: u64) -> String {
    let name = |bit: usize| CAPABILITIES.get(bit).map_or_else(|| format!("bit {bit}"), |n| (*n).to_owned());
    let names: Vec<String> = (0..64).filter(|bit| set >> bit & 1 == 1).map(name).collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

/// The bit of a capability named `NET_RAW`, `net_raw` or `CAP_NET_RAW`.
pub fn capability_bit(name: &str) -> Option<u64> {
    let lower = name.to_ascii_lowercase();
    let bare = lower.strip_prefix("cap_").unwrap_or(&lower);
    CAPABILITIES.iter().position(|c| *c == bare).map(|bit| 1 << bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_is_read_whatever_the_name_in_it() {
        let tail = "S 3 7 5 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 991 0 0";
        for name in ["nginx", "a b", ") R 1 1 1 (", "runc:[2:INIT]", "\u{fffd}", ""] {
            let line = format!("7 ({name}) {tail}");
            let expected = StatLine { name: name.into(), state: 'S', ppid: 3, session: 5, starttime: 991 };
            assert_eq!(stat(&line), Some(expected), "{line}");
        }
        for broken in ["", "7 (x)", "7 (x", "7 (x) S 1", "7 (x) S a b c"] {
            assert_eq!(stat(broken), None, "{broken}");
        }
    }

    #[test]
    fn cgroups_of_one_container_are_within_each_other() {
        let docker = |id: &str| Cgroup::parse(&format!("4:memory:/docker/{id}\n0::/docker/{id}\n")).unwrap();
        let v2 = |path: &str| Cgroup::parse(&format!("0::{path}\n")).unwrap();
        let rows = [
            (docker("a"), docker("a"), true),
            (docker("a/sub"), docker("a"), true),
            (docker("ab"), docker("a"), false),
            (docker("a"), docker("a/sub"), false),
            (v2("/"), v2("/"), true),
            (v2("/../f00"), v2("/"), false),
            (v2("/a"), v2("/"), false),
            (v2("/../f00/sub"), v2("/../f00"), true),
            (v2("/a"), docker("a"), false),
        ];
        for (inner, outer, expected) in rows {
            assert_eq!(inner.is_within(&outer), expected, "{inner:?} in {outer:?}");
        }
        assert!(Cgroup::parse("").is_err() && Cgroup::parse("nonsense").is_err());
    }

    #[test]
    fn mounts_are_read_with_their_escapes_and_flags() {
        let text = "72 48 0:39 / / ro,relatime master:2 - overlay overlay rw,lowerdir=/a\n\
                    89 72 254:0 /my\\040dir\\134x /data rw shared:7 - ext4 /dev/vda rw,discard\n";
        let got = mounts(text).unwrap();
        assert!(got[0].read_only && got[0].shared.is_none() && got[0].has("lowerdir=/a"));
        assert_eq!((got[1].root.as_str(), got[1].shared, got[1].read_only), ("/my dir\\x", Some(7), false));
        for broken in ["72", "72 48 0:39 / / ro", "x y z / / rw - ext4 a rw"] {
            assert!(mounts(broken).unwrap_err().starts_with("line 1"), "{broken}");
        }
    }

    #[test]
    fn a_limit_is_a_number_or_none_and_nothing_else() {
        let rows = [
            ("max\n", Ok(Limit::None)),
            ("-1", Ok(Limit::None)),
            ("9223372036854771712\n", Ok(Limit::None)),
            ("268435456\n", Ok(Limit::At(268_435_456))),
        ];
        for (text, expected) in rows {
            assert_eq!(limit(text), expected, "{text}");
        }
        for broken in ["", "lots", "12 13", "-5"] {
            assert!(limit(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn listeners_are_the_sockets_that_wait_for_somebody() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 10001        0 4711 1 0 100 0 0 10 0\n\
   1: 0100007F:1F90 0100007F:8000 01 00000000:00000000 00:00000000 00000000 10001        0 4712 1 0 100 0 0 10 0\n";
        let on = |protocol, address: &str, uid, inode| {
            let address = address.parse().unwrap();
            Listener { protocol, address, uid, inode, ..Listener::default() }
        };
        assert_eq!(sockets(text, Protocol::Tcp).unwrap(), [on(Protocol::Tcp, "127.0.0.1:8080", 10001, 4711)]);
        let text = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n\
  17: 00000000:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000   101        0 99 2 0000000000000000 0\n\
  18: 0100007F:9C40 0100007F:0035 01 00000000:00000000 00:00000000 00000000   101        0 98 2 0000000000000000 0\n";
        assert_eq!(sockets(text, Protocol::Udp).unwrap(), [on(Protocol::Udp, "0.0.0.0:53", 101, 99)]);
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            assert!(sockets("header\nnonsense", protocol).is_err());
        }
    }

    #[test]
    fn capabilities_have_names_and_names_have_bits() {
        assert_eq!(capability_names(1 << 13 | 1 << 21), "net_raw, sys_admin");
        assert_eq!((capability_names(0), capability_names(1 << 60)), ("none".into(), "bit 60".into()));
        assert_eq!(capability_bit("CAP_SYS_ADMIN"), Some(1 << 21));
        assert_eq!(capability_bit("SYS_FLY"), None);
    }

    #[test]
    fn small_files_are_read_and_broken_ones_refused() {
        assert_eq!(last_pid("0.28 0.23 0.30 1/133 26\n"), Some(26));
        assert_eq!(last_pid("0.28 0.23"), None);
        assert_eq!(namespace_inode("uts:[4026531838]"), Ok(4_026_531_838));
        assert!(namespace_inode("uts:4026531838").is_err());
        assert_eq!(uid_map("         0     200000      65536\n"), Ok(vec![(0, 200_000, 65536)]));
        assert!(uid_map("0 1").is_err());
        assert_eq!(total_memory("MemTotal:       24682416 kB\nMemFree: 1 kB"), Ok(24_682_416 * 1024));
        assert!(total_memory("MemTotal: lots").is_err());
        assert_eq!(arguments("sh\0-c\0x\0"), ["sh", "-c", "x"]);
        let table = "Limit                     Soft Limit           Hard Limit           Units     \n\
                     Max open files            1024                 20000                files     \n";
        assert_eq!(limits(table), Ok(vec![("Max open files".into(), "1024".into(), "20000".into())]));
        assert!(limits("header\nshort").is_err());
    }
}
