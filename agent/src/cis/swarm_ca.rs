//! 7.9: the swarm's root is replaced once in a while.

use sidewarden_proto::event::Severity;
use std::time::Duration;

use super::{Answer, Case, Check, Judgement, UNTOLD_CLUSTER, Unseen, api, manager};
use sidewarden_proto::time::Timestamp;

pub const CHECK: Check = Check {
    slug: "swarm-ca",
    v1_3_1: "7.9",
    v1_6: "7.8",
    title: "the swarm's root certificate is at most a year old",
    severity: Severity::Notice,
    docker_run: "docker swarm ca --rotate",
    compose: "the same: it is set on the host",
    kubernetes: "not applicable: Kubernetes is no swarm",
    judge,
};

const MOST: Duration = Duration::from_secs(365 * 86_400);

fn judge(case: &Case<'_>) -> Answer {
    let cluster = match manager(case)? {
        Ok((swarm, _)) => swarm.cluster.as_ref(),
        Err(answer) => return Ok(answer),
    };
    if cluster.and_then(|c| c.root_rotation_in_progress) == Some(true) {
        return Ok(Judgement::pass(vec![api("Swarm.Cluster.RootRotationInProgress", "true")]));
    }
    let root = cluster.and_then(|c| c.tls.as_ref()?.trust_root.as_deref());
    let Some(begun) = root.and_then(|pem| begin_of(pem.as_bytes())) else { return Err(Unseen::new(UNTOLD_CLUSTER)) };
    let age = case.now.since(begun);
    let evidence = vec![api("Swarm.Cluster.TLSInfo.TrustRoot", format!("made {} days ago", age.as_secs() / 86_400))];
    Ok(if age <= MOST { Judgement::pass(evidence) } else { Judgement::fail(evidence) })
}

/// When the first certificate in `pem` begins to be valid.
fn begin_of(pem: &[u8]) -> Option<Timestamp> {
    let certificates = sidewarden_proto::tls::certificates(pem).ok()?;
    sidewarden_proto::tls::not_before(certificates.first()?).ok()
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
                ("being replaced", |s| s.cluster(r#"{"RootRotationInProgress":true}"#), "pass"),
                ("young", |s| s.swarm_root(30), "pass"),
                ("old", |s| s.swarm_root(800), "fail"),
                ("no certificate", |s| s.cluster(r#"{"TLSInfo":{"TrustRoot":"nonsense"}}"#), "unknown"),
                ("not told", |s| s.cluster("{}"), "unknown"),
            ],
        );
    }
}
