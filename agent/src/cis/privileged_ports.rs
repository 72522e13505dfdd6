//! 5.7: no port of the host below 1024 is mapped to the container. Mappings are the host's.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, DOCKER_API, Unseen};

pub const CHECK: Check = Check {
    slug: "privileged-ports",
    v1_3_1: "5.7",
    v1_6: "5.8",
    title: "no port of the host below 1024 is mapped",
    severity: Severity::Notice,
    docker_run: "-p 8443:8443 instead of -p 443:8443",
    compose: "ports: [\"8443:8443\"]",
    kubernetes: "hostPort: 8443, or none",
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
