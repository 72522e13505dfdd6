//! 7.8: certificates of nodes are renewed often.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, Judgement, UNTOLD_CLUSTER, Unseen, api, manager};

pub const CHECK: Check = Check {
    slug: "swarm-node-certificates",
    v1_3_1: "7.8",
    v1_6: "7.7",
    title: "certificates of nodes live two days at most",
    severity: Severity::Notice,
    docker_run: "docker swarm update --cert-expiry 48h",
    compose: "the same: it is set on the host",
    kubernetes: "not applicable: Kubernetes is no swarm",
    judge,
};

/// Two days, in nanoseconds.
const MOST: u64 = 48 * 3600 * 1_000_000_000;

fn judge(case: &Case<'_>) -> Answer {
    let cluster = match manager(case)? {
        Ok((swarm, _)) => swarm.cluster.as_ref(),
        Err(answer) => return Ok(answer),
    };
    let life = cluster.and_then(|c| c.spec.as_ref()?.ca_config.as_ref()?.node_cert_expiry);
    match life {
        Some(life) => {
            let evidence =
                vec![api("Swarm.Cluster.Spec.CAConfig.NodeCertExpiry", format!("{} hours", life / 3_600_000_000_000))];
            Ok(if life > 0 && life <= MOST { Judgement::pass(evidence) } else { Judgement::fail(evidence) })
        }
        None => Err(Unseen::new(UNTOLD_CLUSTER)),
    }
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
                ("a day", |s| s.cluster(r#"{"Spec":{"CAConfig":{"NodeCertExpiry":86400000000000}}}"#), "pass"),
                (
                    "the default of ninety",
                    |s| s.cluster(r#"{"Spec":{"CAConfig":{"NodeCertExpiry":7776000000000000}}}"#),
                    "fail",
                ),
                ("not told", |s| s.cluster("{}"), "unknown"),
            ],
        );
    }
}
