//! 7.2: a swarm has few managers, and enough.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, Judgement, api, manager};

pub const CHECK: Check = Check {
    slug: "swarm-managers",
    v1_3_1: "7.2",
    v1_6: "7.1",
    title: "the swarm has three, five or seven managers",
    severity: Severity::Notice,
    docker_run: "docker node promote, or docker node demote",
    compose: "the same: it is set on the host",
    kubernetes: "not applicable: Kubernetes is no swarm",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    let (swarm, _) = match manager(case)? {
        Ok(manager) => manager,
        Err(answer) => return Ok(answer),
    };
    let evidence = vec![api("Swarm.Managers", swarm.managers.to_string())];
    Ok(if matches!(swarm.managers, 3 | 5 | 7) { Judgement::pass(evidence) } else { Judgement::fail(evidence) })
}

#[cfg(test)]
mod tests {
    use super::super::sample::check_rows;
    use super::*;

    #[test]
    fn it_is_told_by_the_engine_of_a_manager() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("no swarm", |s| s.only_the_host(), "not_applicable"),
                ("one", |s| s.told_swarm().managers = 1, "fail"),
                ("three", |s| s.told_swarm().managers = 3, "pass"),
                ("four", |s| s.told_swarm().managers = 4, "fail"),
                ("nine", |s| s.told_swarm().managers = 9, "fail"),
                ("a worker", |s| s.told_swarm().control_available = false, "unknown"),
            ],
        );
    }
}
