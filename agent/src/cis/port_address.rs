//! 5.13: mapped ports are bound to one address of the host. Mappings are the host's.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, DOCKER_API, Unseen};

pub const CHECK: Check = Check {
    slug: "port-address",
    v1_3_1: "5.13",
    v1_6: "5.14",
    title: "mapped ports are bound to one address of the host",
    severity: Severity::Notice,
    docker_run: "-p 127.0.0.1:8443:8443",
    compose: "ports: [\"127.0.0.1:8443:8443\"]",
    kubernetes: "hostIP: 127.0.0.1 beside hostPort",
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
