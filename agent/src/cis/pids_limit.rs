//! 5.28: the number of tasks is limited, so that a fork bomb stays inside.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, PTRACE, each_container};
use crate::facts::Limit;

pub const CHECK: Check = Check {
    slug: "pids-limit",
    v1_3_1: "5.28",
    v1_6: "5.29",
    title: "the number of processes is limited",
    severity: Severity::Warning,
    docker_run: "--pids-limit 200",
    compose: "pids_limit: 200",
    kubernetes: "podPidsLimit in the kubelet's configuration",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    each_container(case, |container| {
        let (limit, source) = container.pids.needs(PTRACE)?;
        let answer = match limit {
            Limit::None => Judgement::fail(vec![Evidence::new(source, "max: no limit")]),
            Limit::At(tasks) => Judgement::pass(vec![Evidence::new(source, format!("{tasks} tasks"))]),
        };
        Ok(answer.deep())
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows, hidden};
    use super::*;
    use crate::facts::Seen;

    #[test]
    fn no_limit_fails() {
        let rows: [Row; 3] = [
            ("100", |_| (), "pass"),
            ("max", |s| s.container().pids = Seen::Known(Limit::None, "p".into()), "fail"),
            ("cgroup hidden", |s| s.container().pids = hidden(), "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }
}
