//! 5.14: restarts are limited. The policy is the daemon's.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, DOCKER_API, Unseen};

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
