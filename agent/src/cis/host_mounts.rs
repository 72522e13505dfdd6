//! 5.5: sensitive directories of the host are not mounted, under whatever name.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::host_path::{Exposure, HostMount, is_below, plain_path};
use super::{Answer, Case, Check, DOCKER_API, Judgement, api, both, each_container};
use crate::facts::Mount;

use crate::facts::Told;
use crate::facts::engine::Host;

pub const CHECK: Check = Check {
    slug: "host-mounts",
    v1_3_1: "5.5",
    v1_6: "5.6",
    title: "no sensitive directory of the host is mounted",
    severity: Severity::Critical,
    docker_run: "remove -v /etc:…, -v /usr:… and the like; use a named volume: -v data:/data",
    compose: "volumes: [data:/data]",
    kubernetes: "remove hostPath volumes",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, _: &Host, case: &Case<'_>) -> Answer {
    let mounts = &told.inspect.mounts;
    let declared = |point: &str| case.declared.mounts.iter().any(|allowed| is_below(point, allowed));
    let shown = mounts.iter().filter(|m| !m.source.is_empty() && m.kind != "volume" && m.kind != "tmpfs");
    let shown = shown.map(|m| HostMount { host: plain_path(&m.source), point: m.destination.clone() });
    let violates = |m: &HostMount| is_sensitive(&m.host) && !is_init(m) && !declared(&m.point);
    let violations = shown.filter(violates).map(|m| m.evidence("Docker API: Mounts")).collect();
    let proof = format!("{} mounts, none of a sensitive directory of the host", mounts.len());
    Ok(Judgement::none_of(violations, vec![api("Mounts", proof)]))
}

fn seen(case: &Case<'_>) -> Answer {
    each_container(case, |container| {
        let (mounts, source) = container.mounts.needs(DOCKER_API)?;
        let exposure = Exposure::of(container, mounts);
        let declared = |point: &str| case.declared.mounts.iter().any(|allowed| is_below(point, allowed));
        let violates = |m: &&HostMount| is_sensitive(&m.host) && !is_init(m) && !declared(&m.point);
        let violations: Vec<Evidence> = exposure.shown.iter().filter(violates).map(|m| m.evidence(source)).collect();
        match exposure.unseen(source, |point| !declared(point)) {
            Some(unseen) if violations.is_empty() => Err(unseen),
            _ => Ok(Judgement::none_of(violations, vec![Evidence::new(source, described(mounts))])),
        }
    })
}

fn described(mounts: &[Mount]) -> String {
    format!("{} mounts, none of a sensitive directory of the host", mounts.len())
}

/// The small PID 1 that `docker run --init` mounts from the host.
fn is_init(m: &HostMount) -> bool {
    let file = m.host.rsplit('/').next().unwrap_or(&m.host);
    let point = matches!(m.point.as_str(), "/sbin/docker-init" | "/run/podman-init");
    point && matches!(file, "docker-init" | "tini" | "tini-static" | "catatonit" | "dumb-init")
}

/// Whether a path of the host is one that a container should not have. Docker's own files and named volumes are not.
fn is_sensitive(host: &str) -> bool {
    const TREES: [&str; 13] = [
        "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/sys", "/usr", "/bin", "/sbin", "/run",
        "/var/run",
    ];
    const EXACT: [&str; 4] = ["/", "/var", "/var/lib", "/var/lib/kubelet"];
    const RUNTIMES: [&str; 3] = ["/var/lib/docker", "/var/lib/containerd", "/var/lib/containers"];
    EXACT.contains(&host)
        || TREES.iter().any(|tree| is_below(host, tree))
        || (RUNTIMES.iter().any(|tree| is_below(host, tree)) && !is_of_the_runtime(host))
}

fn is_of_the_runtime(host: &str) -> bool {
    let file = host.rsplit('/').next().unwrap_or(host);
    host.contains("/volumes/")
        || (host.contains("/containers/") && matches!(file, "hosts" | "hostname" | "resolv.conf" | ".containerenv"))
        || host.contains("/mounts/secrets")
        || host.contains("/mounts/shm")
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows, hidden};
    use super::*;
    use crate::facts::Seen;

    #[test]
    fn each_spelling_of_a_host_directory_is_found() {
        let rows: [Row; 22] = [
            ("Docker's own mounts and a named volume", |_| (), "pass"),
            ("/etc", |s| s.mount("254:0 /etc /hostetc rw - ext4 /dev/vda rw"), "fail"),
            ("/etc, read-only", |s| s.mount("254:0 /etc /hostetc ro - ext4 /dev/vda rw"), "fail"),
            ("below /etc", |s| s.mount("254:0 /etc/ssl /ssl ro - ext4 /dev/vda rw"), "fail"),
            ("the host's own /etc/hosts", |s| s.mount("254:0 /etc/hosts /etc/hosts rw - ext4 /dev/vda rw"), "fail"),
            ("/", |s| s.mount("254:0 / /host rw - ext4 /dev/vda rw"), "fail"),
            ("/var/lib/docker", |s| s.mount("254:0 /var/lib/docker /d rw - ext4 /dev/vda rw"), "fail"),
            (
                "the init that Docker brings along",
                |s| s.mount("254:0 /usr/bin/tini-static /sbin/docker-init ro - ext4 /dev/vda rw"),
                "pass",
            ),
            (
                "something else in its place",
                |s| s.mount("254:0 /usr/bin /sbin/docker-init ro - ext4 /dev/vda rw"),
                "fail",
            ),
            ("/home is not in the list", |s| s.mount("254:0 /home/app /data rw - ext4 /dev/vda rw"), "pass"),
            ("/etcetera is not /etc", |s| s.mount("254:0 /etcetera /data rw - ext4 /dev/vda rw"), "pass"),
            ("/proc elsewhere", |s| s.mount("0:21 / /hostproc rw - proc proc rw"), "fail"),
            ("/sys elsewhere", |s| s.mount("0:22 / /hostsys ro - sysfs sysfs ro"), "fail"),
            (
                "/sys in place, with what is below",
                |s| s.mount("0:7 / /sys/kernel/security rw - securityfs s rw"),
                "fail",
            ),
            ("/sys/fs/cgroup elsewhere", |s| s.mount("0:26 / /hostcg ro - cgroup2 cgroup2 rw"), "fail"),
            (
                "the host's /sys/fs/cgroup in place",
                |s| s.mount("0:32 / /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu"),
                "fail",
            ),
            ("/dev", |s| s.mount("0:6 / /hostdev rw - devtmpfs udev rw"), "fail"),
            (
                "a directory of a host's /run that is a tmpfs",
                |s| s.mount("0:25 /dbus /dbus rw - tmpfs tmpfs rw,mode=755"),
                "fail",
            ),
            ("a scratch tmpfs", |s| s.mount("0:90 / /tmp rw,nosuid - tmpfs tmpfs rw"), "pass"),
            ("a volume on a disk of its own", |s| s.mount("8:16 / /data rw - ext4 /dev/sdb rw"), "unknown"),
            (
                "the same, declared",
                |s| {
                    s.mount("8:16 / /data rw - ext4 /dev/sdb rw");
                    s.declared.mounts = vec!["/data".into()];
                },
                "pass",
            ),
            ("mountinfo hidden", |s| s.container().mounts = hidden(), "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn a_tmpfs_with_the_mode_of_run_is_looked_into() {
        let rows: [Row; 4] = [
            ("not allowed to look", |s| s.mount("0:25 / /r rw - tmpfs tmpfs rw,mode=755"), "unknown"),
            (
                "namespaces of Docker's below it",
                |s| {
                    s.mount("0:25 / /r rw - tmpfs tmpfs rw,mode=755");
                    s.mount("0:4 net:[4026532] /r/docker/netns/x rw - nsfs nsfs rw");
                },
                "fail",
            ),
            (
                "systemd in it",
                |s| {
                    s.mount("0:25 / /r rw - tmpfs tmpfs rw,mode=755");
                    s.container().run_entries.insert("/r".into(), Seen::Known(vec!["systemd".into()], String::new()));
                },
                "fail",
            ),
            (
                "a scratch directory",
                |s| {
                    s.mount("0:25 / /r rw - tmpfs tmpfs rw,mode=755");
                    s.container().run_entries.insert("/r".into(), Seen::Known(vec!["nginx.pid".into()], String::new()));
                },
                "pass",
            ),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn the_engine_tells_what_was_mounted() {
        check_rows(
            &CHECK,
            &[
                ("a volume", |s| s.asked(), "pass"),
                ("/etc", |s| s.told_mount("/etc", "/x"), "fail"),
                ("below /etc, with detours", |s| s.told_mount("/srv/..//etc/./ssl", "/x"), "fail"),
                ("/", |s| s.told_mount("/", "/x"), "fail"),
                ("a directory of data", |s| s.told_mount("/srv/data", "/x"), "pass"),
                ("the socket in /run", |s| s.told_mount("/run/docker.sock", "/x"), "fail"),
            ],
        );
    }
}
