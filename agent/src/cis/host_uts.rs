//! 5.20: the UTS namespace (host name) is not the host's.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, PTRACE, api, both, each_container};

use crate::facts::Told;
use crate::facts::engine::Host;

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
    both(case, told, seen)
}

fn told(told: &Told, _: &Host, _: &Case<'_>) -> Answer {
    let mode = &told.inspect.host_config.uts_mode;
    let evidence = vec![api("HostConfig.UTSMode", format!("`{mode}`"))];
    Ok(if mode == "host" { Judgement::fail(evidence) } else { Judgement::pass(evidence) })
}

fn seen(case: &Case<'_>) -> Answer {
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

    #[test]
    fn the_engine_tells_it() {
        check_rows(
            &CHECK,
            &[
                ("its own", |s| s.asked(), "pass"),
                ("the host's", |s| s.told().host_config.uts_mode = "host".into(), "fail"),
            ],
        );
    }
}
