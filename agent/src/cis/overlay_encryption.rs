//! 7.4: what containers say to each other over overlay networks is encrypted.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, Judgement, api, no_swarm};
use crate::facts::engine::Network;

pub const CHECK: Check = Check {
    slug: "overlay-encryption",
    v1_3_1: "7.4",
    v1_6: "7.3",
    title: "overlay networks are encrypted",
    severity: Severity::Warning,
    docker_run: "docker network create --driver overlay --opt encrypted …",
    compose: "the same: it is set on the host",
    kubernetes: "not applicable: Kubernetes is no swarm",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    let host = case.host()?;
    if host.info.swarm.local_node_state == "inactive" {
        return Ok(no_swarm(host));
    }
    let (networks, _) = host.networks.needs("an answer of the engine about its networks")?;
    // The entrance of the swarm cannot be made otherwise.
    let overlays: Vec<&Network> =
        networks.iter().filter(|n| n.driver == "overlay" && !n.ingress && n.name != "ingress").collect();
    let encrypted =
        |n: &&Network| n.options.get("encrypted").is_some_and(|v| !matches!(v.as_str(), "false" | "0" | "f"));
    let open =
        overlays.iter().filter(|n| !encrypted(n)).map(|n| api("networks", format!("{} is not encrypted", n.name)));
    Ok(Judgement::none_of(open.collect(), vec![api("networks", format!("{} overlays, all encrypted", overlays.len()))]))
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
                (
                    "none",
                    |s| {
                        s.told_swarm();
                        s.networks(&[]);
                    },
                    "pass",
                ),
                (
                    "encrypted",
                    |s| {
                        s.told_swarm();
                        s.networks(&[("a", &[("encrypted", "")])]);
                    },
                    "pass",
                ),
                (
                    "not",
                    |s| {
                        s.told_swarm();
                        s.networks(&[("a", &[])]);
                    },
                    "fail",
                ),
                (
                    "switched off",
                    |s| {
                        s.told_swarm();
                        s.networks(&[("a", &[("encrypted", "false")])]);
                    },
                    "fail",
                ),
                (
                    "the entrance",
                    |s| {
                        s.told_swarm();
                        s.networks(&[("ingress", &[])]);
                    },
                    "pass",
                ),
                ("not told", |s| s.in_a_swarm(), "unknown"),
            ],
        );
    }
}
