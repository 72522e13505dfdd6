//! 5.26: a health check is defined and says healthy. Its processes can be seen come and go, but not what they said.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, Judgement, Unseen, api};
use crate::facts::engine::Healthcheck;

pub const CHECK: Check = Check {
    slug: "health",
    v1_3_1: "5.26",
    v1_6: "5.27",
    title: "a health check is defined and the container is healthy",
    severity: Severity::Notice,
    docker_run: "--health-cmd 'sidewarden-agent health'",
    compose: "healthcheck: {test: [CMD, sidewarden-agent, health]}",
    kubernetes: "livenessProbe and readinessProbe",
    judge,
};

const FIRST_ANSWER: &str = "the first answer of its health check, which is still to come";

fn judge(case: &Case<'_>) -> Answer {
    let inspect = &case.told()?.0.inspect;
    let says = |word: &str| vec![api("State.Health", word)];
    if !inspect.config.healthcheck.as_ref().is_some_and(Healthcheck::is_on) {
        return Ok(Judgement::fail(vec![api("Config.Healthcheck", "none")]));
    }
    match inspect.state.health.as_ref().map(|h| h.status.as_str()) {
        Some("healthy") => Ok(Judgement::pass(says("healthy"))),
        Some("starting") => Err(Unseen::new(FIRST_ANSWER).with(says("starting"))),
        None if !inspect.runs() => Err(Unseen::new(FIRST_ANSWER)),
        other => Ok(Judgement::fail(says(other.unwrap_or("none")))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::check_rows;
    use super::*;

    #[test]
    fn only_healthy_passes() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("healthy", |s| s.asked(), "pass"),
                ("unhealthy", |s| s.health("unhealthy"), "fail"),
                ("starting", |s| s.health("starting"), "unknown"),
                ("no check", |s| s.told().config.healthcheck = None, "fail"),
                ("switched off", |s| s.told().config.healthcheck.as_mut().unwrap().test = vec!["NONE".into()], "fail"),
            ],
        );
    }
}
