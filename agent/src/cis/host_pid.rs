//! 5.15: the PID namespace is not the host's.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, PTRACE, both, each_container, resolved};

use crate::facts::Told;
use crate::facts::engine::Host;

pub const CHECK: Check = Check {
    slug: "host-pid",
    v1_3_1: "5.15",
    v1_6: "5.16",
    title: "the host's PID namespace is not shared",
    severity: Severity::Critical,
    docker_run: "remove --pid host",
    compose: "remove `pid: host`",
    kubernetes: "hostPID: false",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, _: &Host, _: &Case<'_>) -> Answer {
    resolved(&told.inspect, &told.pid, "HostConfig.PidMode", |h| &h.pid_mode)
}

fn seen(case: &Case<'_>) -> Answer {
    each_container(case, |container| {
        let (namespace, source) = container.pid.needs(PTRACE)?;
        let told = match (namespace.host, namespace.inode) {
            (true, inode) => format!("pid:[{inode}], the host's"),
            (false, 0) => "NSpid has more than one number: a PID namespace of its own".into(),
            (false, inode) => format!("pid:[{inode}], not the host's"),
        };
        let evidence = vec![Evidence::new(source, told)];
        Ok(if namespace.host { Judgement::fail(evidence) } else { Judgement::pass(evidence) })
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows, hidden};
    use super::*;
    use crate::facts::{Namespace, Seen};

    #[test]
    fn the_hosts_pid_namespace_fails() {
        let rows: [Row; 3] = [
            ("its own", |_| (), "pass"),
            (
                "the host's",
                |s| s.container().pid = Seen::Known(Namespace { inode: 4_026_531_836, host: true }, "p".into()),
                "fail",
            ),
            ("cannot tell", |s| s.container().pid = hidden(), "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn the_engine_tells_whose_it_is() {
        check_rows(
            &CHECK,
            &[
                ("its own", |s| s.asked(), "pass"),
                ("the host's", |s| s.told().host_config.pid_mode = "host".into(), "fail"),
            ],
        );
    }
}
