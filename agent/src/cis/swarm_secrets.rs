//! 7.5: secrets of services are kept by the swarm.

use super::{Answer, Case, Check, Judgement, Unseen, manager};
use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

pub const CHECK: Check = Check {
    slug: "swarm-secrets",
    v1_3_1: "7.5",
    v1_6: "7.4",
    title: "the swarm's secrets are used",
    severity: Severity::Notice,
    docker_run: "docker secret create, and --secret for the service",
    compose: "the same: it is set on the host",
    kubernetes: "not applicable: Kubernetes is no swarm",
    judge,
};

const GRANT: &str = "an attestation that no service needs a secret: `sidewarden-collector evidence sign` and `evidence add`, or `[[attestation]]` \
     in the node agent's configuration";

fn judge(case: &Case<'_>) -> Answer {
    let host = match manager(case)? {
        Ok((_, host)) => host,
        Err(answer) => return Ok(answer),
    };
    match host.secrets.needs("an answer of the engine about its secrets")? {
        (0, source) => Err(Unseen::new(GRANT).with(vec![Evidence::new(source, "none is kept")])),
        (n, source) => Ok(Judgement::pass(vec![Evidence::new(source, format!("{n} are kept"))])),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::check_rows;
    use super::*;
    use crate::facts::Seen;

    #[test]
    fn it_is_told_by_the_engine_of_a_manager() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("no swarm", |s| s.only_the_host(), "not_applicable"),
                (
                    "some",
                    |s| {
                        s.told_swarm();
                        s.told_host().secrets = Seen::Known(2, "secrets".into());
                    },
                    "pass",
                ),
                (
                    "none",
                    |s| {
                        s.told_swarm();
                        s.told_host().secrets = Seen::Known(0, "secrets".into());
                    },
                    "unknown",
                ),
            ],
        );
    }
}
