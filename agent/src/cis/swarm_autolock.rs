//! 7.6: a manager that was restarted has to be unlocked.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, Judgement, UNTOLD_CLUSTER, Unseen, api, manager};

pub const CHECK: Check = Check {
    slug: "swarm-autolock",
    v1_3_1: "7.6",
    v1_6: "7.5",
    title: "managers are locked after a restart",
    severity: Severity::Notice,
    docker_run: "docker swarm update --autolock=true",
    compose: "the same: it is set on the host",
    kubernetes: "not applicable: Kubernetes is no swarm",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    let cluster = match manager(case)? {
        Ok((swarm, _)) => swarm.cluster.as_ref(),
        Err(answer) => return Ok(answer),
    };
    let locked = cluster.and_then(|c| c.spec.as_ref()?.encryption_config.as_ref()?.auto_lock_managers);
    let evidence = vec![api("Swarm.Cluster.Spec.EncryptionConfig.AutoLockManagers", format!("{locked:?}"))];
    match locked {
        Some(true) => Ok(Judgement::pass(evidence)),
        Some(false) => Ok(Judgement::fail(evidence)),
        None => Err(Unseen::new(UNTOLD_CLUSTER).with(evidence)),
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
                ("locked", |s| s.cluster(r#"{"Spec":{"EncryptionConfig":{"AutoLockManagers":true}}}"#), "pass"),
                ("not", |s| s.cluster(r#"{"Spec":{"EncryptionConfig":{"AutoLockManagers":false}}}"#), "fail"),
                ("not told", |s| s.cluster("{}"), "unknown"),
            ],
        );
    }
}
