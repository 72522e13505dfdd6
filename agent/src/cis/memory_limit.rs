//! 5.10: memory is limited, to less than the machine has.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Judgement, PTRACE, api, both, each_container};
use crate::facts::Limit;

use crate::facts::Told;
use crate::facts::engine::Host;

pub const CHECK: Check = Check {
    slug: "memory-limit",
    v1_3_1: "5.10",
    v1_6: "5.11",
    title: "memory is limited",
    severity: Severity::Warning,
    docker_run: "--memory 256m",
    compose: "mem_limit: 256m",
    kubernetes: "resources: {limits: {memory: 256Mi}}",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, host: &Host, _: &Case<'_>) -> Answer {
    let (limit, total) = (told.inspect.host_config.memory, host.info.mem_total);
    let evidence = vec![api("HostConfig.Memory", format!("{limit} bytes; the machine has {total}"))];
    let limited = u64::try_from(limit).is_ok_and(|limit| limit > 0 && limit < total);
    Ok(if limited { Judgement::pass(evidence) } else { Judgement::fail(evidence) })
}

fn seen(case: &Case<'_>) -> Answer {
    let (total, _) = case.facts.total_memory.needs(DOCKER_API)?;
    each_container(case, |container| {
        let (limit, source) = container.memory.needs(PTRACE)?;
        let answer = match limit {
            Limit::None => Judgement::fail(vec![Evidence::new(source, "no limit")]),
            Limit::At(bytes) => {
                let evidence = vec![Evidence::new(source, format!("{bytes} bytes; the machine has {total}"))];
                if bytes < total { Judgement::pass(evidence) } else { Judgement::fail(evidence) }
            }
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
    fn a_limit_above_the_machine_is_none() {
        let rows: [Row; 5] = [
            ("256 MiB", |_| (), "pass"),
            ("none", |s| s.container().memory = Seen::Known(Limit::None, "m".into()), "fail"),
            (
                "900 GiB on a machine with 8",
                |s| s.container().memory = Seen::Known(Limit::At(900 << 30), "m".into()),
                "fail",
            ),
            ("cgroup hidden", |s| s.container().memory = hidden(), "unknown"),
            ("machine unknown", |s| s.facts.total_memory = hidden(), "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn the_engine_tells_the_limit() {
        check_rows(
            &CHECK,
            &[
                ("limited", |s| s.asked(), "pass"),
                ("none", |s| s.told().host_config.memory = 0, "fail"),
                ("more than the machine has", |s| s.told().host_config.memory = 900 << 30, "fail"),
                ("nonsense", |s| s.told().host_config.memory = -1, "fail"),
            ],
        );
    }
}
