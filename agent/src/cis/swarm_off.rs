//! 7.1: swarm mode is off where nobody asked for it.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, Judgement, api};

pub const CHECK: Check = Check {
    slug: "swarm-off",
    v1_3_1: "7.1",
    v1_6: "5.1",
    title: "swarm mode is off unless it is needed",
    severity: Severity::Notice,
    docker_run: "docker swarm leave, or declare it: `swarm = true` under `declared`",
    compose: "the same: it is set on the host",
    kubernetes: "not applicable: Kubernetes is no swarm",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    let state = &case.host()?.info.swarm.local_node_state;
    let evidence = vec![api("Swarm.LocalNodeState", state)];
    Ok(if state == "inactive" || case.declared.swarm { Judgement::pass(evidence) } else { Judgement::fail(evidence) })
}

#[cfg(test)]
mod tests {
    use super::super::sample::check_rows;
    use super::*;

    #[test]
    fn it_is_told_by_the_engine() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("off", |s| s.only_the_host(), "pass"),
                ("on", |s| s.in_a_swarm(), "fail"),
                ("locked is on", |s| s.told_swarm().local_node_state = "locked".into(), "fail"),
                (
                    "on, and declared",
                    |s| {
                        s.told_swarm();
                        s.declared.swarm = true;
                    },
                    "pass",
                ),
            ],
        );
    }
}
