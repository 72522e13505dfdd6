//! 5.28: the number of tasks is limited, so that a fork bomb stays inside.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, PTRACE, api, both, each_container};
use crate::facts::Limit;

use crate::facts::Told;
use crate::facts::engine::Host;

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

/// No kernel has more.
const MOST_PIDS: u64 = 1 << 22;

fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, host: &Host, _: &Case<'_>) -> Answer {
    let limit = told.inspect.host_config.pids_limit.unwrap_or(0);
    let most = host.pid_max.known().copied().unwrap_or(MOST_PIDS);
    let evidence = vec![api("HostConfig.PidsLimit", format!("{limit}; the machine can have {most}"))];
    let limited = u64::try_from(limit).is_ok_and(|limit| limit > 0 && limit < most);
    Ok(if limited { Judgement::pass(evidence) } else { Judgement::fail(evidence) })
}

fn seen(case: &Case<'_>) -> Answer {
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

    #[test]
    fn the_engine_tells_the_limit() {
        check_rows(
            &CHECK,
            &[
                ("limited", |s| s.asked(), "pass"),
                ("none", |s| s.told().host_config.pids_limit = None, "fail"),
                ("spelt 0", |s| s.told().host_config.pids_limit = Some(0), "fail"),
                ("spelt -1", |s| s.told().host_config.pids_limit = Some(-1), "fail"),
                ("more than there can be", |s| s.told().host_config.pids_limit = Some(1 << 30), "fail"),
            ],
        );
    }
}
