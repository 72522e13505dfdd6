//! 5.20: the UTS namespace (host name) is not the host's.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, PTRACE, each_container};

pub const CHECK: Check = Check {
    slug: "host-uts",
    v1_3_1: "5.20",
    v1_6: "5.21",
    title: "the host's UTS namespace is not shared",
    severity: Severity::Warning,
    docker_run: "remove --uts host",
    compose: "remove `uts: host`",
    kubernetes: "hostNetwork: false (it brings the host's name along)",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    each_container(case, |container| {
        let (namespace, source) = container.uts.needs(PTRACE)?;
        let told =
            format!("uts:[{}]{}", namespace.inode, if namespace.host { ", the host's" } else { ", not the host's" });
        let evidence = vec![Evidence::new(source, told)];
        Ok(if namespace.host { Judgement::fail(evidence) } else { Judgement::pass(evidence) }.deep())
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows, hidden};
    use super::*;
    use crate::facts::{Namespace, Seen};

    #[test]
    fn the_hosts_name_space_fails() {
        let rows: [Row; 3] = [
            ("its own", |_| (), "pass"),
            (
                "the host's",
                |s| s.container().uts = Seen::Known(Namespace { inode: 4_026_531_838, host: true }, "u".into()),
                "fail",
            ),
            ("hidden", |s| s.container().uts = hidden(), "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }
}
