//! 5.31: no socket of a container runtime is mounted, by itself or in a directory that holds it.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::host_path::{Exposure, HostMount, is_below, plain_path};
use super::{Answer, Case, Check, DOCKER_API, Judgement, api, both, each_container};

use crate::facts::Told;
use crate::facts::engine::Host;

pub const CHECK: Check = Check {
    slug: "docker-socket",
    v1_3_1: "5.31",
    v1_6: "5.32",
    title: "no socket of the container runtime is mounted",
    severity: Severity::Critical,
    docker_run: "remove -v /var/run/docker.sock:…",
    compose: "remove /var/run/docker.sock from `volumes`",
    kubernetes: "remove the hostPath volume of the runtime's socket",
    judge,
};

const SOCKETS: [&str; 7] = [
    "docker.sock",
    "containerd.sock",
    "crio.sock",
    "podman.sock",
    "cri-dockerd.sock",
    "dockershim.sock",
    "buildkitd.sock",
];

/// Directories of the host in which these lie.
const HOLDERS: [&str; 9] = [
    "/",
    "/run",
    "/var/run",
    "/run/containerd",
    "/var/run/containerd",
    "/run/crio",
    "/var/run/crio",
    "/run/podman",
    "/var/run/podman",
];

fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, _: &Host, _: &Case<'_>) -> Answer {
    let mounts = told.inspect.mounts.iter().filter(|m| m.kind != "volume" && m.kind != "tmpfs" && !m.source.is_empty());
    let shown = mounts.map(|m| HostMount { host: plain_path(&m.source), point: m.destination.clone() });
    let violations = shown.filter(holds_socket).map(|m| m.evidence("Docker API: Mounts")).collect();
    let proof = format!("none of {} mounts is a runtime's socket or its directory", told.inspect.mounts.len());
    Ok(Judgement::none_of(violations, vec![api("Mounts", proof)]))
}

fn seen(case: &Case<'_>) -> Answer {
    each_container(case, |container| {
        let (mounts, source) = container.mounts.needs(DOCKER_API)?;
        let exposure = Exposure::of(container, mounts);
        let violations: Vec<Evidence> =
            exposure.shown.iter().filter(|m| holds_socket(m)).map(|m| m.evidence(source)).collect();
        // A whole disk elsewhere is no place for a runtime's socket; a tmpfs may be /run.
        let may_be_run = |point: &str| mounts.iter().any(|m| m.point == point && m.fs == "tmpfs");
        match exposure.unseen(source, may_be_run) {
            Some(unseen) if violations.is_empty() => Err(unseen),
            _ => {
                let proof = format!("none of {} mounts is a runtime's socket or its directory", mounts.len());
                Ok(Judgement::none_of(violations, vec![Evidence::new(source, proof)]))
            }
        }
    })
}

fn holds_socket(m: &HostMount) -> bool {
    let name = m.host.rsplit('/').next().unwrap_or(&m.host);
    SOCKETS.contains(&name) || HOLDERS.contains(&m.host.as_str()) || is_user_runtime(&m.host)
}

/// The directory of a user's own services, where a rootless runtime has its socket.
fn is_user_runtime(host: &str) -> bool {
    is_below(host, "/run/user") && host.split('/').count() <= 4
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows, hidden};
    use super::*;

    #[test]
    fn the_socket_is_found_under_any_name_and_in_any_directory() {
        let rows: [Row; 13] = [
            ("no socket", |_| (), "pass"),
            ("the socket", |s| s.mount("254:0 /run/docker.sock /var/run/docker.sock rw - ext4 /dev/vda rw"), "fail"),
            ("under another name", |s| s.mount("254:0 /run/docker.sock /srv/x rw - ext4 /dev/vda rw"), "fail"),
            ("on a tmpfs", |s| s.mount("0:25 /docker.sock /srv/x rw - tmpfs tmpfs rw,mode=755"), "fail"),
            ("containerd's", |s| s.mount("254:0 /run/containerd/containerd.sock /c rw - ext4 /dev/vda rw"), "fail"),
            ("/run", |s| s.mount("254:0 /run /hostrun rw - ext4 /dev/vda rw"), "fail"),
            ("/", |s| s.mount("254:0 / /host ro - ext4 /dev/vda rw"), "fail"),
            ("a rootless user's directory", |s| s.mount("254:0 /run/user/1000 /u rw - ext4 /dev/vda rw"), "fail"),
            (
                "the directory of cgroups, which looks like /run and has a `systemd` in it",
                |s| {
                    s.mount("0:25 / /x ro - tmpfs tmpfs rw,mode=755");
                    s.mount("0:30 / /x/systemd ro - cgroup cgroup rw,name=systemd");
                    let names = crate::facts::Seen::Known(vec!["systemd".into(), "memory".into()], String::new());
                    s.container().run_entries.insert("/x".into(), names);
                },
                "pass",
            ),
            ("a data directory", |s| s.mount("254:0 /srv/data /data rw - ext4 /dev/vda rw"), "pass"),
            ("a disk of its own", |s| s.mount("8:16 / /data rw - ext4 /dev/sdb rw"), "pass"),
            (
                "what may be /run and cannot be looked into",
                |s| s.mount("0:25 / /r rw - tmpfs tmpfs rw,mode=755"),
                "unknown",
            ),
            ("mountinfo hidden", |s| s.container().mounts = hidden(), "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn declaring_the_mount_does_not_excuse_the_socket() {
        check_rows(
            &CHECK,
            &[(
                "declared",
                |s| {
                    s.mount("254:0 /run/docker.sock /var/run/docker.sock rw - ext4 /dev/vda rw");
                    s.declared.mounts = vec!["/var/run".into()];
                },
                "fail",
            )],
        );
    }

    #[test]
    fn the_engine_tells_of_the_socket() {
        check_rows(
            &CHECK,
            &[
                ("a volume", |s| s.asked(), "pass"),
                ("the socket", |s| s.told_mount("/var/run/docker.sock", "/x"), "fail"),
                ("its directory", |s| s.told_mount("/run", "/x"), "fail"),
                ("containerd's", |s| s.told_mount("/run/containerd/containerd.sock", "/x"), "fail"),
                ("something else", |s| s.told_mount("/srv", "/x"), "pass"),
            ],
        );
    }
}
