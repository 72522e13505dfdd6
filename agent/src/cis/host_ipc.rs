//! 5.16: the IPC namespace is not the host's.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Judgement, PTRACE, Unseen, both, each_container, resolved};
use crate::facts::{Container, Seen};

use crate::facts::Told;
use crate::facts::engine::Host;

pub const CHECK: Check = Check {
    slug: "host-ipc",
    v1_3_1: "5.16",
    v1_6: "5.17",
    title: "the host's IPC namespace is not shared",
    severity: Severity::Warning,
    docker_run: "remove --ipc host",
    compose: "remove `ipc: host`",
    kubernetes: "hostIPC: false",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, _: &Host, _: &Case<'_>) -> Answer {
    resolved(&told.inspect, &told.ipc, "HostConfig.IpcMode", |h| &h.ipc_mode)
}

fn seen(case: &Case<'_>) -> Answer {
    each_container(case, |container| match &container.ipc {
        Seen::Known(namespace, source) => {
            let told = format!(
                "ipc:[{}]{}",
                namespace.inode,
                if namespace.host { ", the host's" } else { ", not the host's" }
            );
            let evidence = vec![Evidence::new(source, told)];
            Ok(if namespace.host { Judgement::fail(evidence) } else { Judgement::pass(evidence) }.deep())
        }
        Seen::Hidden(_) => by_shared_memory(container),
    })
}

/// Without a look at the namespace: what is mounted at /dev/shm. Runtimes mount one named `shm` for a private namespace,
/// and the host's own tmpfs for the host's.
fn by_shared_memory(container: &Container) -> Answer {
    let (mounts, source) = container.mounts.needs(DOCKER_API)?;
    let Some(shm) = mounts.iter().rfind(|m| m.point == "/dev/shm") else { return Err(Unseen::new(PTRACE)) };
    let evidence = vec![Evidence::new(source, format!("/dev/shm has the source `{}`", shm.source))];
    match (shm.fs.as_str(), shm.source.as_str()) {
        ("tmpfs", "shm") => Ok(Judgement::pass(evidence)),
        ("tmpfs", "tmpfs") => Ok(Judgement::fail(evidence)),
        _ => Err(Unseen::new(PTRACE).with(evidence)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows, hidden};
    use super::*;
    use crate::facts::Namespace;

    #[test]
    fn the_namespace_tells_and_shared_memory_where_it_is_hidden() {
        let rows: [Row; 5] = [
            ("its own", |_| (), "pass"),
            (
                "the host's",
                |s| s.container().ipc = Seen::Known(Namespace { inode: 4_026_531_839, host: true }, "i".into()),
                "fail",
            ),
            ("hidden, its own /dev/shm", |s| s.container().ipc = hidden(), "pass"),
            (
                "hidden, the host's /dev/shm",
                |s| {
                    s.container().ipc = hidden();
                    s.mount("0:24 / /dev/shm rw - tmpfs tmpfs rw");
                },
                "fail",
            ),
            (
                "hidden, another file system there",
                |s| {
                    s.container().ipc = hidden();
                    s.mount("254:0 /x /dev/shm rw - ext4 /dev/vda rw");
                },
                "unknown",
            ),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn the_engine_tells_whose_it_is() {
        check_rows(
            &CHECK,
            &[
                ("its own", |s| s.asked(), "pass"),
                ("the host's", |s| s.told().host_config.ipc_mode = "host".into(), "fail"),
            ],
        );
    }
}
