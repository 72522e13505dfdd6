//! The containers of the zoo, one a line: how it is run beside what a sound one has, and exactly which checks it fails.

/// One container.
#[derive(Clone, Copy, Debug)]
pub struct Cage {
    /// Its name, without that of the zoo.
    pub name: &'static str,
    /// Options of a sound container that it goes without.
    pub without: &'static [&'static str],
    /// Options it has beyond. `{zoo}` stands for the zoo's name, `{dir}` for its folder.
    pub with: &'static [&'static str],
    /// The image.
    pub image: Image,
    /// What is run in it.
    pub command: &'static [&'static str],
    /// It is made and not started: some machines cannot start it, and it is judged before its first instruction.
    pub only_made: bool,
    /// The checks that fail; all others do not.
    pub fails: &'static [&'static str],
}

/// The images of the zoo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image {
    Sound,
    /// Without a user and a health check.
    Bare,
    /// With an ADD above its base, and a setuid file.
    Added,
    /// With a password in its environment, on a Debian of long ago.
    Old,
}

impl Image {
    pub const ALL: [Image; 4] = [Image::Sound, Image::Bare, Image::Added, Image::Old];
}

/// Options of a sound container, by the word they are left out by.
pub const SOUND: &[(&str, &[&str])] = &[
    ("user", &["--user", "10001:10001"]),
    ("caps", &["--cap-drop", "ALL"]),
    ("nnp", &["--security-opt", "no-new-privileges"]),
    ("ro", &["--read-only"]),
    ("memory", &["--memory", "64m"]),
    ("cpu", &["--cpu-shares", "512"]),
    ("pids", &["--pids-limit", "32"]),
    ("restart", &["--restart", "on-failure:5"]),
    ("net", &["--network", "{zoo}"]),
];

const A: Cage =
    Cage { name: "", without: &[], with: &[], image: Image::Sound, command: &[], only_made: false, fails: &[] };

macro_rules! cages {
    ($($name:literal $(-[$($out:literal),*])? $(+[$($with:literal),*])? => [$($fails:literal),*] $({$($field:ident: $value:expr),*})?;)*) => {
        /// Every container.
        pub const CAGES: &[Cage] = &[$(Cage {
            name: $name,
            $(without: &[$($out),*],)?
            $(with: &[$($with),*],)?
            fails: &[$($fails),*],
            $($($field: $value,)*)?
            ..A
        },)*];
    };
}

cages! {
    "sound" => [];
    "sound-port" +["-p", "127.0.0.1::9000"] => [];
    "sound-none" -["net"] +["--network", "none"] => [];
    "sound-volume" +["-v", "{zoo}:/data"] => [];
    "sound-caps" -["caps"] +["--cap-drop", "NET_RAW"] => [];
    "sound-quota" -["cpu"] +["--cpus", "0.5"] => [];
    "sound-data" +["-v", "{dir}/data:/data:ro"] => [];
    "sound-profile" +["--security-opt", "seccomp={dir}/strict.json"] => [];
    "user-none" -["user"] => ["user", "image-health", "health"] {image: Image::Bare};
    "user-root" -["user"] +["--user", "root"] => ["user"];
    "user-zero" -["user"] +["--user", "0:0"] => ["user"];
    "user-zeros" -["user"] +["--user", "00"] => ["user"];
    "user-toor" -["user"] +["--user", "toor"] => ["user"];
    "caps-default" -["caps"] => ["capabilities"];
    "caps-admin" +["--cap-add", "SYS_ADMIN"] => ["capabilities"];
    "caps-lower" +["--cap-add", "cap_net_admin"] => ["capabilities"];
    "caps-raw" +["--cap-add", "NET_RAW"] => ["capabilities"];
    "privileged" +["--privileged"] => ["privileged", "capabilities", "devices", "seccomp"] {only_made: true};
    "mount-etc" +["-v", "/etc:/x"] => ["host-mounts"];
    "mount-etc-ro" +["-v", "/etc:/x:ro"] => ["host-mounts"];
    "mount-ssl" +["-v", "/etc/ssl:/x:ro"] => ["host-mounts"];
    "mount-docker" +["-v", "/var/lib/docker:/x:ro"] => ["host-mounts"];
    "mount-proc" +["-v", "/proc:/x:ro"] => ["host-mounts"];
    "mount-cgroup" +["-v", "/sys/fs/cgroup:/x:ro"] => ["host-mounts"];
    "mount-dev" +["-v", "/dev:/x:ro"] => ["host-mounts", "devices"];
    "mount-root" +["-v", "/:/x:ro"] => ["host-mounts", "docker-socket"];
    "mount-long" +["--mount", "type=bind,source=/usr/bin,target=/x,readonly"] => ["host-mounts"];
    "mount-link" +["-v", "{dir}/link:/x:ro"] => ["host-mounts"];
    "mount-volume" +["-v", "{zoo}-etc:/x"] => ["host-mounts"];
    "socket" +["-v", "/run/docker.sock:/var/run/docker.sock"] => ["docker-socket", "host-mounts"];
    "socket-renamed" +["-v", "/var/run/docker.sock:/x.sock"] => ["docker-socket", "host-mounts"];
    "socket-dir" +["-v", "/run:/x:ro"] => ["docker-socket", "host-mounts"];
    "socket-link" +["-v", "{dir}/sock:/x.sock"] => ["docker-socket", "host-mounts"];
    "sshd" => ["sshd"] {command: &["/usr/sbin/sshd", "-D"]};
    "port-low" +["-p", "127.0.0.1:1009:9000"] => ["privileged-ports"];
    "port-low6" +["-p", "[::]:1010:9000"] => ["privileged-ports", "port-address"];
    "port-all" +["-p", "0.0.0.0::9000"] => ["port-address"];
    "port-default" +["-p", "9000"] => ["port-address"];
    "port-every" +["-P", "--expose", "9000"] => ["port-address"];
    "net-host" -["net"] +["--network", "host"] => ["host-network"];
    "net-via" -["net"] +["--network", "container:{zoo}-net-host"] => ["host-network"];
    "net-bridge" -["net"] => ["default-bridge"];
    "net-bridge-via" -["net"] +["--network", "container:{zoo}-net-bridge"] => ["default-bridge"];
    "memory-none" -["memory"] => ["memory-limit"];
    "memory-huge" -["memory"] +["--memory", "900g"] => ["memory-limit"];
    "cpu-none" -["cpu"] => ["cpu-share"];
    "cpu-default" -["cpu"] +["--cpu-shares", "1024"] => ["cpu-share"];
    "cpu-quota" -["cpu"] +["--cpu-period", "1000", "--cpu-quota", "900000"] => ["cpu-share"];
    "root-writable" -["ro"] => ["read-only-root"];
    "restart-always" -["restart"] +["--restart", "always"] => ["restart-policy"];
    "restart-unless" -["restart"] +["--restart", "unless-stopped"] => ["restart-policy"];
    "restart-endless" -["restart"] +["--restart", "on-failure"] => ["restart-policy"];
    "restart-six" -["restart"] +["--restart", "on-failure:6"] => ["restart-policy"];
    "pid-host" +["--pid", "host"] => ["host-pid"];
    "pid-via" +["--pid", "container:{zoo}-pid-host"] => ["host-pid"];
    "ipc-host" +["--ipc", "host"] => ["host-ipc"];
    "ipc-via" +["--ipc", "container:{zoo}-ipc-host"] => ["host-ipc"];
    "uts-host" +["--uts", "host"] => ["host-uts"];
    "userns-host" +["--userns", "host"] => ["host-users"];
    "device" +["--device", "/dev/kmsg:/dev/harmless"] => ["devices"];
    "device-rule" +["--device-cgroup-rule", "b 7:* rmw"] => ["devices"];
    "ulimit" +["--ulimit", "nofile=123:456"] => ["ulimits"];
    "propagation" +["--mount", "type=bind,source={dir}/data,target=/x,bind-propagation=rshared"] => ["mount-propagation"] {only_made: true};
    "seccomp-off" +["--security-opt", "seccomp=unconfined"] => ["seccomp"];
    "seccomp-open" +["--security-opt", "seccomp={dir}/open.json"] => ["seccomp"];
    "seccomp-log" +["--security-opt", "seccomp={dir}/log.json"] => ["seccomp"];
    "nnp-none" -["nnp"] => ["no-new-privileges"];
    "nnp-false" -["nnp"] +["--security-opt", "no-new-privileges:false"] => ["no-new-privileges"];
    "cgroup" +["--cgroup-parent", "/{zoo}"] => ["cgroup-parent"];
    "health-none" +["--no-healthcheck"] => ["health"];
    "health-ill" +["--health-cmd", "/animal ill", "--health-retries", "1"] => ["health"];
    "pids-none" -["pids"] => ["pids-limit"];
    "pids-minus" -["pids"] +["--pids-limit", "-1"] => ["pids-limit"];
    "pids-huge" -["pids"] +["--pids-limit", "4194304"] => ["pids-limit"];
    "image-added" => ["add-instruction", "setuid-files"] {image: Image::Added};
    "image-old" => ["image-secrets", "trusted-base"] {image: Image::Old};
    "secret-env" +["-e", "API_TOKEN=abcdefghijkl"] => ["image-secrets"];
    "entered" => ["exec-root"];
}
