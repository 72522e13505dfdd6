//! 5.12: the root file system is read-only.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Judgement, api, both, each_container};

use crate::facts::Told;
use crate::facts::engine::Host;

pub const CHECK: Check = Check {
    slug: "read-only-root",
    v1_3_1: "5.12",
    v1_6: "5.13",
    title: "the root file system is read-only",
    severity: Severity::Notice,
    docker_run: "--read-only --tmpfs /tmp",
    compose: "read_only: true",
    kubernetes: "securityContext: {readOnlyRootFilesystem: true}",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, _: &Host, _: &Case<'_>) -> Answer {
    let read_only = told.inspect.host_config.readonly_rootfs;
    let evidence = vec![api("HostConfig.ReadonlyRootfs", read_only.to_string())];
    Ok(if read_only { Judgement::pass(evidence) } else { Judgement::fail(evidence) })
}

fn seen(case: &Case<'_>) -> Answer {
    each_container(case, |container| {
        let (mounts, source) = container.mounts.needs(DOCKER_API)?;
        // What was mounted last on a point is what is seen there.
        let root = mounts.iter().rfind(|m| m.point == "/");
        let read_only = root.is_some_and(|m| m.read_only);
        let told = root.map_or("nothing is mounted at /".into(), |m| {
            format!("/ ({}) is {}", m.fs, if m.read_only { "read-only" } else { "writable" })
        });
        let evidence = vec![Evidence::new(source, told)];
        Ok(if read_only { Judgement::pass(evidence) } else { Judgement::fail(evidence) })
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows, hidden};
    use super::*;

    #[test]
    fn a_writable_root_fails() {
        let rows: [Row; 3] = [
            ("read-only", |_| (), "pass"),
            ("writable, mounted over", |s| s.mount("0:39 / / rw - overlay overlay rw"), "fail"),
            ("mountinfo hidden", |s| s.container().mounts = hidden(), "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn the_engine_tells_it() {
        check_rows(
            &CHECK,
            &[
                ("read-only", |s| s.asked(), "pass"),
                ("writable", |s| s.told().host_config.readonly_rootfs = false, "fail"),
            ],
        );
    }
}
