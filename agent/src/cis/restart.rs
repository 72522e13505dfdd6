//! 5.14: restarts are limited. The policy is the daemon's.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, Judgement, api};

pub const CHECK: Check = Check {
    slug: "restart-policy",
    v1_3_1: "5.14",
    v1_6: "5.15",
    title: "restarts after failures are limited to five",
    severity: Severity::Notice,
    docker_run: "--restart on-failure:5",
    compose: "restart: on-failure:5",
    kubernetes: "restartPolicy: OnFailure, with backoffLimit on the Job",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    let policy = &case.told()?.0.inspect.host_config.restart_policy;
    let times = policy.maximum_retry_count;
    let evidence = vec![api("HostConfig.RestartPolicy", format!("`{}`, at most {times} times", policy.name))];
    Ok(match policy.name.as_str() {
        "" | "no" => Judgement::pass(evidence),
        // 0 stands for as often as it takes.
        "on-failure" if (1..=5).contains(&times) => Judgement::pass(evidence),
        _ => Judgement::fail(evidence),
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample::check_rows;
    use super::*;

    #[test]
    fn only_a_few_restarts_pass() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("five", |s| s.asked(), "pass"),
                ("none", |s| s.told().host_config.restart_policy.name = "no".into(), "pass"),
                ("six", |s| s.told().host_config.restart_policy.maximum_retry_count = 6, "fail"),
                ("as often as it takes", |s| s.told().host_config.restart_policy.maximum_retry_count = 0, "fail"),
                ("always", |s| s.told().host_config.restart_policy.name = "always".into(), "fail"),
                ("unless stopped", |s| s.told().host_config.restart_policy.name = "unless-stopped".into(), "fail"),
            ],
        );
    }
}
