//! 7.10: management and data go over different networks, which the engine does not tell.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, Unseen, no_swarm};

pub const CHECK: Check = Check {
    slug: "swarm-planes",
    v1_3_1: "7.10",
    v1_6: "7.9",
    title: "management and data traffic are separated",
    severity: Severity::Notice,
    docker_run: "docker swarm init --data-path-addr, and attest it",
    compose: "the same: it is set on the host",
    kubernetes: "not applicable: Kubernetes is no swarm",
    judge,
};

const GRANT: &str = "an attestation: `[[attestation]]` in the node agent's configuration, with who, why and until";

fn judge(case: &Case<'_>) -> Answer {
    let host = case.host()?;
    if host.info.swarm.local_node_state == "inactive" {
        return Ok(no_swarm(host));
    }
    Err(Unseen::new(GRANT))
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
                ("no swarm", |s| s.only_the_host(), "not_applicable"),
                ("a swarm", |s| s.in_a_swarm(), "unknown"),
                (
                    "attested",
                    |s| {
                        s.told_swarm();
                        s.attest(CHECK.slug, true);
                    },
                    "pass",
                ),
            ],
        );
    }
}
