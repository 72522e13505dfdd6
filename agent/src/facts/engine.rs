//! What the container engine says of a container, its image and its host, as far as checks need it. Pure: models and how
//! they are read from the engine's JSON.
//!
//! A field that every engine sends is required: an answer without it is no answer, and never looks like a container that
//! has everything switched off.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Deserializer};

use super::seen::{Hidden, Seen};

/// References to other containers are followed this deep.
const MAX_HOPS: usize = 8;

/// What the engine says.
#[derive(Clone, Debug)]
pub struct Engine {
    /// Of the host.
    pub host: Arc<Host>,
    /// Of the container that is judged; `None` where the host itself is.
    pub container: Option<Told>,
}

/// What the engine says of one container.
#[derive(Clone, Debug)]
pub struct Told {
    /// The container.
    pub inspect: Arc<Inspect>,
    /// Its image.
    pub image: Seen<Arc<Image>>,
    /// Whose network it has, `container:` followed to its end.
    pub network: Seen<Arc<Inspect>>,
    /// The same for its PID namespace.
    pub pid: Seen<Arc<Inspect>>,
    /// The same for its IPC namespace.
    pub ipc: Seen<Arc<Inspect>>,
}

/// The engine's host.
#[derive(Clone, Debug)]
pub struct Host {
    /// `/info`
    pub info: Info,
    /// `/networks`
    pub networks: Seen<Vec<Network>>,
    /// How many secrets the swarm keeps; hidden where this is no manager.
    pub secrets: Seen<usize>,
    /// Addresses of the host that take TCP connections.
    pub listeners: Seen<Vec<std::net::SocketAddr>>,
    /// The largest PID there can be.
    pub pid_max: Seen<u64>,
    /// SELinux refuses, and does not only tell.
    pub selinux_enforcing: Seen<bool>,
}

/// `/info`
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Info {
    /// The engine's version.
    #[serde(default)]
    pub server_version: String,
    /// Bytes of memory of the host.
    pub mem_total: u64,
    /// Processors of the host.
    #[serde(rename = "NCPU")]
    pub cpus: u64,
    /// For example `name=seccomp,profile=default`.
    #[serde(deserialize_with = "nullable")]
    pub security_options: Vec<String>,
    /// The swarm.
    pub swarm: Swarm,
}

impl Info {
    /// The value of `profile` in the security option `name`: empty where the option has none, `None` where it is off.
    pub fn security(&self, name: &str) -> Option<&str> {
        let mut options = self.security_options.iter().map(|o| o.split(','));
        let parts = options.find_map(|mut o| (o.next()?.strip_prefix("name=")? == name).then_some(o))?;
        Some(parts.filter_map(|p| p.strip_prefix("profile=")).next().unwrap_or_default())
    }
}

/// The part of `/info` about the swarm.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Swarm {
    /// `inactive`, `active`, `pending`, `locked`, `error`
    pub local_node_state: String,
    /// This is a manager.
    #[serde(default)]
    pub control_available: bool,
    /// How many there are.
    #[serde(default)]
    pub managers: u64,
    /// The address that it tells others.
    #[serde(default)]
    pub node_addr: String,
    /// Told to managers only.
    #[serde(default)]
    pub cluster: Option<Cluster>,
}

/// The swarm as its managers know it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Cluster {
    /// What was asked for.
    pub spec: Option<ClusterSpec>,
    /// Its roots.
    #[serde(rename = "TLSInfo")]
    pub tls: Option<TlsInfo>,
    /// The root is being replaced now.
    pub root_rotation_in_progress: Option<bool>,
}

/// `Spec` of the swarm.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ClusterSpec {
    /// Locked managers.
    pub encryption_config: Option<EncryptionConfig>,
    /// Certificates of nodes.
    #[serde(rename = "CAConfig")]
    pub ca_config: Option<CaConfig>,
}

/// Locked managers.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct EncryptionConfig {
    /// They need a key after a restart.
    pub auto_lock_managers: Option<bool>,
}

/// Certificates of nodes.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct CaConfig {
    /// Their life in nanoseconds.
    pub node_cert_expiry: Option<u64>,
}

/// The swarm's roots.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TlsInfo {
    /// PEM.
    pub trust_root: Option<String>,
}

/// One of `/networks`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Network {
    /// Its name.
    pub name: String,
    /// `bridge`, `overlay`, …
    pub driver: String,
    /// The swarm's own entrance.
    #[serde(default)]
    pub ingress: bool,
    /// Options of the driver.
    #[serde(deserialize_with = "nullable")]
    pub options: BTreeMap<String, String>,
}

/// `/containers/{id}/json`
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Inspect {
    /// 64 hex digits.
    pub id: String,
    /// With a slash in front.
    pub name: String,
    /// The id of its image.
    pub image: String,
    /// How it is.
    pub state: State,
    /// Its AppArmor profile; empty where there is none.
    #[serde(deserialize_with = "nullable")]
    pub app_armor_profile: String,
    /// Its SELinux label; empty where there is none.
    #[serde(deserialize_with = "nullable")]
    pub process_label: String,
    /// What is mounted.
    #[serde(deserialize_with = "nullable")]
    pub mounts: Vec<MountPoint>,
    /// Programs that run in it by `docker exec` now.
    #[serde(rename = "ExecIDs", default, deserialize_with = "nullable")]
    pub execs: Vec<String>,
    /// What it was asked to have of the host.
    pub host_config: HostConfig,
    /// What it was asked to be.
    pub config: ContainerConfig,
    /// Its networks.
    pub network_settings: NetworkSettings,
}

/// How a container is.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct State {
    /// `created`, `running`, `paused`, `restarting`, `removing`, `exited`, `dead`
    pub status: String,
    /// Its first process in the host's PID namespace; 0 while it does not run.
    pub pid: i32,
    /// When it was started last.
    pub started_at: String,
    /// What its health check says.
    #[serde(default)]
    pub health: Option<Health>,
}

/// What a health check says.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Health {
    /// `starting`, `healthy`, `unhealthy`, `none`
    pub status: String,
}

/// Something mounted.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct MountPoint {
    /// `bind`, `volume`, `tmpfs`, …
    #[serde(rename = "Type", default)]
    pub kind: String,
    /// Where it is on the host.
    #[serde(default)]
    pub source: String,
    /// Where in the container.
    pub destination: String,
    /// `rprivate`, `rshared`, …
    #[serde(default)]
    pub propagation: String,
}

/// What a container was asked to have of the host.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct HostConfig {
    /// `default`, `bridge`, `host`, `none`, `container:…`, or a network's name.
    pub network_mode: String,
    /// Empty, `host`, `container:…`
    #[serde(deserialize_with = "nullable")]
    pub pid_mode: String,
    /// `private`, `shareable`, `host`, `container:…`, `none`
    #[serde(deserialize_with = "nullable")]
    pub ipc_mode: String,
    /// Empty or `host`.
    #[serde(rename = "UTSMode", deserialize_with = "nullable")]
    pub uts_mode: String,
    /// Empty or `host`.
    #[serde(deserialize_with = "nullable")]
    pub userns_mode: String,
    /// Everything at once.
    pub privileged: bool,
    /// The root cannot be written.
    pub readonly_rootfs: bool,
    /// Every port of the image is mapped.
    pub publish_all_ports: bool,
    /// Mappings as they were asked for.
    #[serde(deserialize_with = "nullable")]
    pub port_bindings: Ports,
    /// When it is started again.
    pub restart_policy: RestartPolicy,
    /// Capabilities beyond the default.
    #[serde(deserialize_with = "nullable")]
    pub cap_add: Vec<String>,
    /// Capabilities taken away.
    #[serde(deserialize_with = "nullable")]
    pub cap_drop: Vec<String>,
    /// `no-new-privileges`, `seccomp=…`, …
    #[serde(deserialize_with = "nullable")]
    pub security_opt: Vec<String>,
    /// Bytes; 0 for none.
    pub memory: i64,
    /// Weight; 0 and 1024 are the default.
    pub cpu_shares: i64,
    /// Billionths of a processor; 0 for none.
    #[serde(deserialize_with = "nullable")]
    pub nano_cpus: i64,
    /// Microseconds of each period; 0 and -1 for none.
    pub cpu_quota: i64,
    /// Microseconds; 0 for the default of 100,000.
    pub cpu_period: i64,
    /// Tasks; 0, -1 and none for no limit.
    #[serde(deserialize_with = "nullable")]
    pub pids_limit: Option<i64>,
    /// Limits other than the daemon's.
    #[serde(deserialize_with = "nullable")]
    pub ulimits: Vec<Ulimit>,
    /// Device nodes.
    #[serde(deserialize_with = "nullable")]
    pub devices: Vec<DeviceMapping>,
    /// Rules of the device cgroup.
    #[serde(deserialize_with = "nullable")]
    pub device_cgroup_rules: Vec<String>,
    /// Devices by driver, as GPUs are asked for.
    #[serde(default, deserialize_with = "nullable")]
    pub device_requests: Vec<DeviceRequest>,
    /// The parent of its cgroup; empty for the daemon's.
    #[serde(deserialize_with = "nullable")]
    pub cgroup_parent: String,
}

/// When a container is started again.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RestartPolicy {
    /// Empty, `no`, `always`, `unless-stopped`, `on-failure`
    pub name: String,
    /// After so many failures no more; 0 for never.
    pub maximum_retry_count: i64,
}

/// A resource limit.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Ulimit {
    /// For example `nofile`.
    pub name: String,
    /// What the process may raise its own to.
    #[serde(default)]
    pub hard: i64,
}

/// A device node.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DeviceMapping {
    /// On the host.
    pub path_on_host: String,
    /// In the container.
    #[serde(default)]
    pub path_in_container: String,
}

/// Devices by driver.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DeviceRequest {
    /// For example `nvidia`.
    #[serde(default)]
    pub driver: String,
}

/// What a container was asked to be.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ContainerConfig {
    /// `user`, `uid`, `user:group`, …; empty for root.
    #[serde(deserialize_with = "nullable")]
    pub user: String,
    /// `NAME=value`
    #[serde(deserialize_with = "nullable")]
    pub env: Vec<String>,
    /// The image as it was asked for.
    pub image: String,
    /// Labels.
    #[serde(default, deserialize_with = "nullable")]
    pub labels: BTreeMap<String, String>,
    /// Its health check.
    #[serde(default)]
    pub healthcheck: Option<Healthcheck>,
}

/// A health check.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Healthcheck {
    /// What is run; `["NONE"]` switches off that of the image.
    #[serde(default, deserialize_with = "nullable")]
    pub test: Vec<String>,
}

impl Healthcheck {
    /// Whether it checks anything.
    pub fn is_on(&self) -> bool {
        self.test.first().is_some_and(|word| word != "NONE" && !word.is_empty())
    }
}

/// Mappings by port of the container, like `80/tcp`.
pub type Ports = BTreeMap<String, Option<Vec<PortBinding>>>;

/// A port of the host.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PortBinding {
    /// An address of the host; empty for the daemon's default.
    #[serde(deserialize_with = "nullable")]
    pub host_ip: String,
    /// A number, a range, or empty for any.
    #[serde(deserialize_with = "nullable")]
    pub host_port: String,
}

/// A container's networks.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct NetworkSettings {
    /// Mappings as they are.
    #[serde(default, deserialize_with = "nullable")]
    pub ports: Ports,
    /// By name.
    #[serde(deserialize_with = "nullable")]
    pub networks: BTreeMap<String, serde::de::IgnoredAny>,
}

/// `/images/{id}/json` and its history.
#[derive(Clone, Debug)]
pub struct Image {
    /// The image.
    pub inspect: ImageInspect,
    /// `/images/{id}/history`, newest first.
    pub history: Vec<Layer>,
    /// What its files say; hidden where no container of it runs that could be looked into.
    pub files: Seen<ImageFiles>,
}

/// What the files of an image say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageFiles {
    /// `ID` and `VERSION_ID` of its os-release, where it has one.
    pub release: Option<(String, String)>,
    /// Names that stand for uid 0; none where they cannot be told.
    pub roots: Vec<String>,
    /// Names of installed packages, where it has a list.
    pub packages: Option<Vec<String>>,
    /// There is a list of packages that cannot be read here, or not whole: rpm's, and one that is too long.
    pub unread_packages: bool,
    /// Files with the setuid or setgid bit; `None` where there are too many files, or directories in directories, to look at
    /// all, or too many with the bit.
    pub setuid: Option<Vec<String>>,
}

/// `/images/{id}/json`
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ImageInspect {
    /// Its id.
    pub id: String,
    /// `registry/name@sha256:…`
    #[serde(deserialize_with = "nullable")]
    pub repo_digests: Vec<String>,
    /// `registry/name:tag`
    #[serde(deserialize_with = "nullable")]
    pub repo_tags: Vec<String>,
    /// When it was made, RFC 3339; empty where that is not known.
    #[serde(default, deserialize_with = "nullable")]
    pub created: String,
    /// What it asks for.
    pub config: ImageConfig,
}

/// What an image asks for.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ImageConfig {
    /// `NAME=value`
    #[serde(default, deserialize_with = "nullable")]
    pub env: Vec<String>,
    /// Its user.
    #[serde(default, deserialize_with = "nullable")]
    pub user: String,
    /// Labels.
    #[serde(default, deserialize_with = "nullable")]
    pub labels: BTreeMap<String, String>,
    /// Its health check.
    #[serde(default)]
    pub healthcheck: Option<Healthcheck>,
}

/// One line of an image's history.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Layer {
    /// What made it.
    #[serde(deserialize_with = "nullable")]
    pub created_by: String,
    /// Bytes that it added.
    #[serde(default)]
    pub size: i64,
}

/// How a program is run in a container: `/exec/{id}/json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Exec {
    /// In which one.
    #[serde(rename = "ContainerID")]
    pub container: String,
    /// How.
    #[serde(rename = "ProcessConfig")]
    pub process: ExecProcess,
}

/// See [`Exec`].
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ExecProcess {
    /// With all privileges.
    pub privileged: Option<bool>,
    /// As whom; empty for the container's own user.
    #[serde(default, deserialize_with = "nullable")]
    pub user: String,
    /// The program.
    #[serde(default, deserialize_with = "nullable")]
    pub entrypoint: String,
    /// Its arguments.
    #[serde(default, deserialize_with = "nullable")]
    pub arguments: Vec<String>,
}

fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(d).map(Option::unwrap_or_default)
}

impl Inspect {
    /// Its name without the slash.
    pub fn short_name(&self) -> &str {
        self.name.trim_start_matches('/')
    }

    /// Whether it is, or may become, a running container.
    pub fn is_alive(&self) -> bool {
        matches!(self.state.status.as_str(), "created" | "running" | "paused" | "restarting")
    }

    /// Whether its processes are there.
    pub fn runs(&self) -> bool {
        self.state.pid > 0 && matches!(self.state.status.as_str(), "running" | "paused")
    }

    /// Its mappings: as they are while it runs, as asked for before.
    pub fn mappings(&self) -> impl Iterator<Item = (&str, &PortBinding)> {
        let ports = if self.runs() { &self.network_settings.ports } else { &self.host_config.port_bindings };
        ports.iter().flat_map(|(port, bound)| bound.iter().flatten().map(move |b| (port.as_str(), b)))
    }
}

/// Follows `container:` from `start` to the container whose own namespace it is. `find` takes an id or a name.
pub fn resolve<'a>(
    start: &'a Arc<Inspect>,
    mode: impl Fn(&HostConfig) -> &str,
    find: impl Fn(&str) -> Option<&'a Arc<Inspect>>,
) -> Seen<Arc<Inspect>> {
    let source = || format!("Docker API: container {}", start.short_name());
    let mut at = start;
    for _ in 0..MAX_HOPS {
        let Some(other) = mode(&at.host_config).strip_prefix("container:") else {
            return Seen::Known(Arc::clone(at), source());
        };
        match find(other) {
            Some(next) => at = next,
            None => return Seen::Hidden(Hidden::unclear(source(), format!("it joins `{other}`, which is gone"))),
        }
    }
    Seen::Hidden(Hidden::unclear(source(), "it joins one container after the other without an end"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A hardened container as Docker 20.10 tells it.
    pub const INSPECT: &str = r#"{"Id":"add509add509add509add509add509add509add509add509add509add509add5","Created":"2026-11-22T07:16:02Z",
      "State":{"Status":"running","Running":true,"Pid":1,"StartedAt":"2026-11-22T08:42:27Z","Health":{"Status":"healthy","Log":[]}},
      "Image":"sha256:cf22","Name":"/shop_orders_1","MountLabel":"","ProcessLabel":"","AppArmorProfile":"docker-default","ExecIDs":null,
      "HostConfig":{"Binds":null,"NetworkMode":"shop","PortBindings":{},"RestartPolicy":{"Name":"on-failure","MaximumRetryCount":5},
        "CapAdd":null,"CapDrop":["ALL"],"IpcMode":"private","PidMode":"","Privileged":false,"PublishAllPorts":false,"ReadonlyRootfs":true,
        "SecurityOpt":["no-new-privileges:true"],"UTSMode":"","UsernsMode":"","CpuShares":512,"Memory":134217728,"NanoCpus":0,"CgroupParent":"",
        "CpuPeriod":0,"CpuQuota":0,"Devices":null,"DeviceCgroupRules":null,"DeviceRequests":null,"PidsLimit":64,"Ulimits":null},
      "Mounts":[{"Type":"volume","Name":"data","Source":"/var/lib/docker/volumes/data/_data","Destination":"/data","Driver":"local","Mode":"rw","RW":true,"Propagation":""}],
      "Config":{"User":"10001:10001","Env":["PATH=/usr/bin"],"Image":"registry.example/shop/orders@sha256:aa","Labels":null,
        "Healthcheck":{"Test":["CMD","/bin/health"]}},
      "NetworkSettings":{"Ports":{"8443/tcp":[{"HostIp":"127.0.0.1","HostPort":"18443"}]},"Networks":{"shop":{"NetworkID":"f"}}}}"#;

    /// A host without a swarm, and without AppArmor switched off.
    pub const INFO: &str = r#"{"ServerVersion":"20.10.24","MemTotal":8589934592,"NCPU":2,"Swarm":{"NodeID":"","LocalNodeState":"inactive",
      "ControlAvailable":false,"Error":"","RemoteManagers":null},"SecurityOptions":["name=apparmor","name=seccomp,profile=default","name=userns"]}"#;

    #[test]
    fn an_answer_is_read_and_one_with_a_part_missing_is_none() {
        let whole: serde_json::Value = serde_json::from_str(INSPECT).unwrap();
        assert!(serde_json::from_value::<Inspect>(whole.clone()).is_ok());
        for section in ["HostConfig", "State", "Config", "NetworkSettings"] {
            for field in whole[section].as_object().unwrap().keys() {
                let mut cut = whole.clone();
                cut[section].as_object_mut().unwrap().remove(field);
                let may_be_absent = ["Binds", "DeviceRequests", "Running", "Health", "Labels", "Healthcheck", "Ports"];
                let read = serde_json::from_value::<Inspect>(cut).is_ok();
                assert_eq!(read, may_be_absent.contains(&field.as_str()), "{section}.{field}");
            }
        }
        for end in (0..INSPECT.len()).filter(|end| INSPECT.is_char_boundary(*end)) {
            assert!(serde_json::from_str::<Inspect>(&INSPECT[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn security_options_are_found_by_name() {
        let info: Info = serde_json::from_str(INFO).unwrap();
        assert_eq!(info.security("seccomp"), Some("default"));
        assert_eq!(info.security("apparmor"), Some(""));
        assert_eq!(info.security("selinux"), None);
    }

    fn named(name: &str, network: &str) -> Arc<Inspect> {
        let mut one: Inspect = serde_json::from_str(INSPECT).unwrap();
        (one.name, one.host_config.network_mode) = (format!("/{name}"), network.into());
        Arc::new(one)
    }

    #[test]
    fn references_to_other_containers_are_followed_to_their_end() {
        let all =
            [named("a", "container:b"), named("b", "container:c"), named("c", "host"), named("d", "container:gone")];
        let looped = [named("x", "container:y"), named("y", "container:x")];
        let end = |set: &[Arc<Inspect>], from: usize| {
            let find = |name: &str| set.iter().find(|i| i.short_name() == name);
            resolve(&set[from], |h| &h.network_mode, find).known().map(|i| i.host_config.network_mode.clone())
        };
        assert_eq!(end(&all, 0).as_deref(), Some("host"));
        assert_eq!(end(&all, 2).as_deref(), Some("host"));
        assert_eq!(end(&all, 3), None);
        assert_eq!(end(&looped, 0), None);
    }
}
