//! What takes connections and datagrams in the network namespace, and whose it is: by sock_diag, or from /proc/net where
//! the kernel has no sock_diag.
//!
//! Who has a socket is told by the links in `/proc/<pid>/fd` where those can be read, and by its cgroup otherwise. Both cost
//! more than the list itself, so what was found out about a socket is remembered as long as it is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use sidewarden_proto::event::Protocol;

use super::machine::Machine;
use super::parse;
use super::process::Process;
use super::seen::{Hidden, Seen, Why};
use super::{diag, parsed};

/// So many looks try to tell whose a socket is.
const MAX_TRIES: u8 = 5;

/// Where the kernel's own choice of ports begins and ends, unless it says otherwise.
const EPHEMERAL: (u16, u16) = (32_768, 60_999);

/// A socket that takes what others send: a listening one, or one of UDP that is connected to nobody.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listener {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where.
    pub address: SocketAddr,
    /// On `[::]`: it takes IPv6 only.
    pub v6_only: bool,
    /// Its user.
    pub uid: u32,
    /// Its inode, which no other socket has while it is there.
    pub inode: u64,
    /// The id of its owner's cgroup v2, where the kernel tells it.
    pub cgroup: Option<u64>,
    /// Whose it is, as far as that can be told.
    pub owner: Owner,
    /// UDP on a port that the kernel gives out by itself: as a rule the near end of a client.
    pub ephemeral: bool,
    /// What it speaks, once that was tried.
    pub speech: Option<Speech>,
}

/// Who has a socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// It cannot be told.
    #[default]
    Unknown,
    /// A process of this container, by its cgroup.
    Container(String),
    /// This process of the workload.
    Process {
        /// Its PID.
        pid: i32,
        /// Its name.
        name: String,
    },
}

/// What a listener answered to the beginning of a TLS handshake.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Speech {
    /// TLS.
    Tls,
    /// Something else; how it began, in few words.
    Plain(String),
    /// It began by itself, before it was asked; how.
    First(String),
    /// Nothing, and it did not close the connection either.
    Silent,
    /// It closed the connection without a word.
    Closed,
    /// It could not be asked.
    Unasked(String),
}

/// Whether the rules of `intercept` keep others off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lock {
    /// Nobody asked for them.
    #[default]
    Off,
    /// They do.
    InForce,
    /// They were asked for, and are not there or can be got past.
    Broken,
}

impl Default for Listener {
    fn default() -> Listener {
        Listener {
            protocol: Protocol::Tcp,
            address: SocketAddr::from(([0; 4], 0)),
            v6_only: false,
            uid: 0,
            inode: 0,
            cgroup: None,
            owner: Owner::Unknown,
            ephemeral: false,
            speech: None,
        }
    }
}

impl Listener {
    /// Whether only the same network namespace can reach it.
    pub fn is_loopback(&self) -> bool {
        match self.address.ip() {
            IpAddr::V4(ip) => ip.is_loopback(),
            IpAddr::V6(ip) => ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback()),
        }
    }
}

/// `0.0.0.0:8080/tcp of nginx (pid 7), uid 33`
impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}{}, uid {}", self.address, self.protocol.word(), self.owner, self.uid)
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Unknown => Ok(()),
            Owner::Container(path) => write!(f, " of container {path}"),
            Owner::Process { pid, name } => write!(f, " of {name} (pid {pid})"),
        }
    }
}

/// Reads the listeners again and again, and remembers whose they are.
#[derive(Clone, Debug)]
pub struct ListenerSight {
    machine: Machine,
    /// Sockets that were there at the last look, with what is known of each.
    known: BTreeMap<u64, Known>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Known {
    /// It is one of this agent's.
    Ours,
    /// It is somebody else's; `tries` looks have not told whose.
    Theirs { owner: Owner, tries: u8 },
}

impl ListenerSight {
    /// A sight of `machine` that remembers nothing yet.
    pub fn new(machine: Machine) -> ListenerSight {
        ListenerSight { machine, known: BTreeMap::new() }
    }

    /// What listens in our network namespace, without ourselves, by protocol and address. `members` are the workload's
    /// processes.
    pub fn look(&mut self, members: &[Process]) -> Seen<Vec<Listener>> {
        let (found, source) = match read(&self.machine) {
            Ok(read) => read,
            Err(hidden) => return Seen::Hidden(hidden),
        };
        self.know(&found, members);
        let range = ephemeral_range(&self.machine);
        let mut theirs: Vec<Listener> = found.into_iter().filter_map(|l| self.told(l, range)).collect();
        theirs.sort();
        Seen::Known(theirs, source.into())
    }

    /// The listener with what is known of it; `None` for our own.
    fn told(&self, listener: Listener, (first, last): (u16, u16)) -> Option<Listener> {
        let owner = match self.known.get(&listener.inode) {
            Some(Known::Ours) => return None,
            Some(Known::Theirs { owner, .. }) => owner.clone(),
            None => Owner::Unknown,
        };
        let ephemeral = listener.protocol == Protocol::Udp && (first..=last).contains(&listener.address.port());
        Some(Listener { owner, ephemeral, ..listener })
    }

    fn know(&mut self, found: &[Listener], members: &[Process]) {
        let present: BTreeSet<u64> = found.iter().map(|l| l.inode).collect();
        self.known.retain(|inode, _| present.contains(inode));
        let mut new: BTreeSet<u64> = present.iter().copied().filter(|i| !self.known.contains_key(i)).collect();
        if !new.is_empty() {
            let ours = holders::take(&self.machine, "/proc/self", &mut new);
            self.known.extend(ours.into_iter().map(|inode| (inode, Known::Ours)));
            let theirs = Known::Theirs { owner: Owner::Unknown, tries: 0 };
            self.known.extend(new.into_iter().map(|inode| (inode, theirs.clone())));
        }
        self.find_owners(found, members);
    }

    /// Tells the owners that are not known yet. The process may not have been seen when its socket first was, so it is tried
    /// some more times.
    fn find_owners(&mut self, found: &[Listener], members: &[Process]) {
        let mut open: BTreeSet<u64> = BTreeSet::new();
        for (inode, known) in &mut self.known {
            if let Known::Theirs { owner: Owner::Unknown, tries } = known
                && *tries < MAX_TRIES
            {
                *tries += 1;
                open.insert(*inode);
            }
        }
        if open.is_empty() {
            return;
        }
        for p in members.iter().filter(|p| !p.zombie) {
            for inode in holders::take(&self.machine, &format!("/proc/{}", p.id.pid), &mut open) {
                self.own(inode, Owner::Process { pid: p.id.pid, name: crate::watch::plain(&p.name) });
            }
        }
        if open.is_empty() {
            return;
        }
        let containers: BTreeMap<u64, String> =
            members.iter().filter_map(|p| Some((cgroup_id(&self.machine, p)?, short(p)))).collect();
        for listener in found.iter().filter(|l| open.contains(&l.inode)) {
            if let Some(container) = listener.cgroup.and_then(|id| containers.get(&id)) {
                self.own(listener.inode, Owner::Container(container.clone()));
            }
        }
    }

    fn own(&mut self, inode: u64, owner: Owner) {
        self.known.insert(inode, Known::Theirs { owner, tries: MAX_TRIES });
    }
}

/// Which process has a socket open.
mod holders {
    use std::collections::BTreeSet;

    use crate::facts::machine::Machine;

    /// So many descriptors of one process are looked through for a socket.
    const MAX_DESCRIPTORS: usize = 65_536;

    /// Takes from `wanted` the sockets that the process at `process` (`/proc/7`) has. The links in fd/ need the process's
    /// own user; with CAP_SYS_PTRACE alone fdinfo/ can be read, which has the inode from kernel 5.14 on.
    pub fn take(machine: &Machine, process: &str, wanted: &mut BTreeSet<u64>) -> Vec<u64> {
        by_link(machine, process, wanted).or_else(|| by_info(machine, process, wanted)).unwrap_or_default()
    }

    fn by_link(machine: &Machine, process: &str, wanted: &mut BTreeSet<u64>) -> Option<Vec<u64>> {
        let inode = |link: String| link.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok();
        let descriptors = machine.names(&format!("{process}/fd")).ok()?;
        let read = |fd: String| machine.link(&format!("{process}/fd/{fd}")).ok().and_then(inode);
        Some(search(descriptors, read, wanted))
    }

    fn by_info(machine: &Machine, process: &str, wanted: &mut BTreeSet<u64>) -> Option<Vec<u64>> {
        let sockets = socket_mount(machine)?;
        let descriptors = machine.names(&format!("{process}/fdinfo")).ok()?;
        let read = |fd: String| {
            let text = machine.read(&format!("{process}/fdinfo/{fd}")).ok()?;
            // The number alone could be that of a file.
            (field(&text, "mnt_id:")? == sockets).then(|| field(&text, "ino:"))?
        };
        Some(search(descriptors, read, wanted))
    }

    fn search(
        descriptors: impl Iterator<Item = String>,
        read: impl Fn(String) -> Option<u64>,
        wanted: &mut BTreeSet<u64>,
    ) -> Vec<u64> {
        let mut found = Vec::new();
        for descriptor in descriptors.take(MAX_DESCRIPTORS) {
            if wanted.is_empty() {
                break;
            }
            found.extend(read(descriptor).filter(|inode| wanted.remove(inode)));
        }
        found
    }

    /// The mount that all sockets of the machine are in, by one of our own.
    fn socket_mount(machine: &Machine) -> Option<u64> {
        use std::os::fd::AsRawFd;
        let socket = std::os::unix::net::UnixDatagram::unbound().ok()?;
        field(&machine.read(&format!("/proc/self/fdinfo/{}", socket.as_raw_fd())).ok()?, "mnt_id:")
    }

    fn field(text: &str, name: &str) -> Option<u64> {
        text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
    }
}

/// The last part of the cgroup's path, which is the container's id, cut as `docker ps` does.
fn short(p: &Process) -> String {
    const ID: usize = 12;
    let name = p.cgroup.path().rsplit('/').next().unwrap_or_default();
    let name = name.trim_start_matches("docker-").trim_start_matches("cri-containerd-");
    name.chars().take(ID).collect()
}

/// The id by which sockets name the cgroup of `p`: the inode of its folder, where we can see that.
fn cgroup_id(machine: &Machine, p: &Process) -> Option<u64> {
    let below = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(|mount| format!("{mount}{}", p.cgroup.path()));
    let own_root = format!("/proc/{}/root/sys/fs/cgroup", p.id.pid);
    let of_cgroups =
        |path: &String| statfs(&machine.path(path)).is_ok_and(|kind| kind.filesystem_type() == CGROUP2_SUPER_MAGIC);
    let places = below.into_iter().chain([own_root]).filter(|path| !path.contains("/.."));
    places.filter(of_cgroups).find_map(|path| machine.inode(&path).ok())
}

/// The sockets, and how they were read.
fn read(machine: &Machine) -> Result<(Vec<Listener>, &'static str), Hidden> {
    if machine.is_this_one() {
        match diag::listeners() {
            Ok(found) => return Ok((found, "sock_diag")),
            Err(error) => tracing::debug!(error, "no answer from sock_diag: reading /proc/net"),
        }
    }
    from_text(machine).map(|found| (found, "/proc/self/net"))
}

fn from_text(machine: &Machine) -> Result<Vec<Listener>, Hidden> {
    const TCP: &str = "/proc/self/net/tcp";
    let mut found = Vec::new();
    for (path, protocol) in [
        (TCP, Protocol::Tcp),
        ("/proc/self/net/tcp6", Protocol::Tcp),
        ("/proc/self/net/udp", Protocol::Udp),
        ("/proc/self/net/udp6", Protocol::Udp),
    ] {
        match machine.read(path) {
            Ok(text) => found.extend(parse::sockets(&text, protocol).map_err(|e| Hidden::unclear(path, e))?),
            // Without IPv6 there is no such file.
            Err(e) if path != TCP && e.why == Why::Missing => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

fn ephemeral_range(machine: &Machine) -> (u16, u16) {
    let range = |text: &str| {
        let mut numbers = text.split_whitespace().map(str::parse::<u16>);
        let mut next = || numbers.next()?.ok();
        next().zip(next()).ok_or_else(|| "it is no range".to_owned())
    };
    let read = parsed(machine, "/proc/sys/net/ipv4/ip_local_port_range", range);
    read.known().copied().unwrap_or(EPHEMERAL)
}

/// The address to ask `listener` at, as somebody outside would: one of `own`, the addresses of this network namespace.
pub fn reached_at(listener: &Listener, own: &[IpAddr]) -> SocketAddr {
    let ip = listener.address.ip();
    if !ip.is_unspecified() {
        return listener.address;
    }
    let takes_v4 = ip.is_ipv4() || !listener.v6_only;
    let fits = |own: &&IpAddr| match own {
        IpAddr::V4(v4) => !v4.is_loopback() && takes_v4,
        // Link-local addresses need a zone.
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local() && ip.is_ipv6(),
    };
    let loopback = if takes_v4 { IpAddr::from(Ipv4Addr::LOCALHOST) } else { IpAddr::from(Ipv6Addr::LOCALHOST) };
    SocketAddr::new(own.iter().find(fits).copied().unwrap_or(loopback), listener.address.port())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    fn on(address: &str) -> Listener {
        Listener { address: address.parse().unwrap(), ..Listener::default() }
    }

    #[test]
    fn loopback_is_known_in_all_its_spellings() {
        for (address, expected) in [
            ("127.0.0.1:80", true),
            ("127.0.0.11:53", true),
            ("[::1]:80", true),
            ("[::ffff:127.0.0.1]:80", true),
            ("0.0.0.0:80", false),
            ("[::]:80", false),
            ("10.0.0.5:80", false),
            ("[::ffff:10.0.0.5]:80", false),
        ] {
            assert_eq!(on(address).is_loopback(), expected, "{address}");
        }
    }

    #[test]
    fn a_listener_on_every_address_is_asked_where_others_would() {
        let own: Vec<IpAddr> =
            ["127.0.0.1", "::1", "fe80::1", "10.0.0.5", "fd00::5"].map(|ip| ip.parse().unwrap()).into();
        let six = |address| Listener { v6_only: true, ..on(address) };
        for (listener, own, expected) in [
            (on("0.0.0.0:80"), &own[..], "10.0.0.5:80"),
            (on("[::]:80"), &own[..], "10.0.0.5:80"),
            (six("[::]:80"), &own[..], "[fd00::5]:80"),
            (on("10.9.9.9:80"), &own[..], "10.9.9.9:80"),
            (on("0.0.0.0:80"), &own[..1], "127.0.0.1:80"),
            (six("[::]:80"), &own[..3], "[::1]:80"),
        ] {
            assert_eq!(reached_at(&listener, own).to_string(), expected, "{listener}");
        }
    }

    #[test]
    fn our_own_sockets_are_left_out_and_others_have_their_owner() {
        let ours = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sight = ListenerSight::new(Machine::new("/"));
        let seen = sight.look(&[]);
        let Seen::Known(listeners, source) = &seen else { panic!("{seen:?}") };
        assert_eq!(source, "sock_diag");
        assert!(!listeners.iter().any(|l| l.address == ours.local_addr().unwrap()), "{listeners:?}");
    }

    #[test]
    fn a_socket_that_goes_is_forgotten_and_its_number_may_be_anothers() {
        let mut sight = ListenerSight::new(Machine::new("/nowhere"));
        let socket = |inode| Listener { inode, ..on("0.0.0.0:80") };
        sight.known.insert(7, Known::Ours);
        sight.know(&[socket(7)], &[]);
        assert_eq!(sight.told(socket(7), EPHEMERAL), None);
        sight.know(&[], &[]);
        sight.know(&[socket(7)], &[]);
        assert_eq!(sight.told(socket(7), EPHEMERAL), Some(socket(7)));
    }

    #[test]
    fn udp_on_a_port_of_the_kernels_choice_is_told_apart() {
        let sight = ListenerSight::new(Machine::new("/nowhere"));
        let udp = |address| Listener { protocol: Protocol::Udp, ..on(address) };
        assert!(sight.told(udp("0.0.0.0:40000"), EPHEMERAL).unwrap().ephemeral);
        assert!(!sight.told(udp("0.0.0.0:53"), EPHEMERAL).unwrap().ephemeral);
        assert!(!sight.told(on("0.0.0.0:40000"), EPHEMERAL).unwrap().ephemeral, "TCP listens by intent");
    }

    #[test]
    fn both_ways_of_reading_tell_the_same() {
        let _tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let _six = TcpListener::bind("[::1]:0").unwrap();
        let _udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let plain = |l: &Listener| (l.protocol, l.address, l.uid, l.inode);
        let ours: BTreeSet<u64> = [inode(&_tcp), inode(&_six), inode(&_udp)].into();
        let told = |found: Vec<Listener>| {
            let mut found: Vec<_> = found.iter().filter(|l| ours.contains(&l.inode)).map(plain).collect();
            found.sort();
            found
        };
        let by_diag = told(diag::listeners().unwrap());
        assert_eq!(by_diag.len(), 3);
        assert_eq!(told(from_text(&Machine::new("/")).unwrap()), by_diag);
    }

    fn inode(socket: &impl std::os::fd::AsFd) -> u64 {
        nix::sys::stat::fstat(socket).unwrap().st_ino
    }

    /// How long the two ways take; run by hand: `cargo test -p sidewarden-agent --release listeners_cost -- --ignored --nocapture`.
    #[test]
    #[ignore = "not a test: a measurement"]
    fn listeners_cost() {
        let machine = Machine::new("/");
        for sockets in [0, 500, 2000] {
            let _open: Vec<_> = (0..sockets / 2)
                .map(|_| (TcpListener::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap()))
                .collect();
            let median = |act: &mut dyn FnMut()| {
                let mut times: Vec<_> = (0..101)
                    .map(|_| {
                        let begun = std::time::Instant::now();
                        act();
                        begun.elapsed()
                    })
                    .collect();
                times.sort();
                times[50]
            };
            let mut sight = ListenerSight::new(machine.clone());
            println!(
                "{sockets} sockets: sock_diag {:?}, /proc/net {:?}, a look {:?}",
                median(&mut || drop(diag::listeners().unwrap())),
                median(&mut || drop(from_text(&machine).unwrap())),
                median(&mut || drop(sight.look(&[]))),
            );
        }
    }
}
