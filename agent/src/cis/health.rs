//! 5.26: a health check is defined and says healthy. Its processes can be seen come and go, but not what they said.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, DOCKER_API, Unseen};

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

/// Nothing inside of the container shows it.
fn judge(_: &Case<'_>) -> Answer {
    Err(Unseen::new(DOCKER_API))
}

#[cfg(test)]
mod tests {
    use super::super::sample::check_rows;
    use super::*;

    #[test]
    fn it_is_unknown_without_the_api_whatever_is_seen() {
        check_rows(&CHECK, &[("sound", |_| (), "unknown"), ("hidden", |s| s.hide_everything(), "unknown")]);
    }
}
