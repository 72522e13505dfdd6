//! 7.3: the swarm is reached at one address of the host, not at all of them.

use sidewarden_proto::event::Severity;
use std::net::SocketAddr;

use super::{Answer, Case, Check, Judgement, Unseen, no_swarm};
use sidewarden_proto::finding::Evidence;

pub const CHECK: Check = Check {
    slug: "swarm-address",
    v1_3_1: "7.3",
    v1_6: "7.2",
    title: "swarm services are bound to one address of the host",
    severity: Severity::Warning,
    docker_run: "docker swarm init --listen-addr 10.0.0.1:2377",
    compose: "the same: it is set on the host",
    kubernetes: "not applicable: Kubernetes is no swarm",
    judge,
};

/// Where managers listen.
const SWARM_PORT: u16 = 2377;

const USUAL_PORT: &str = "a manager that listens at port 2377: another port is not told by the engine";

fn judge(case: &Case<'_>) -> Answer {
    let host = case.host()?;
    if host.info.swarm.local_node_state == "inactive" {
        return Ok(no_swarm(host));
    }
    let (listeners, source) =
        host.listeners.needs("the host's network namespace: run the node agent with --network host")?;
    let swarm: Vec<_> = listeners.iter().filter(|l| l.port() == SWARM_PORT).collect();
    let is_worker = host.info.swarm.local_node_state == "active" && !host.info.swarm.control_available;
    if swarm.is_empty() && !is_worker {
        // A manager may listen at another port, and the engine does not tell at which.
        let evidence = vec![Evidence::new(source, format!("nobody listens at port {SWARM_PORT}"))];
        return Err(Unseen::new(USUAL_PORT).with(evidence));
    }
    let line = |l: &&SocketAddr| Evidence::new(source, l.to_string());
    let wild = swarm.iter().copied().filter(|l| l.ip().to_canonical().is_unspecified()).map(|l| line(&l)).collect();
    Ok(Judgement::none_of(
        wild,
        vec![Evidence::new(source, format!("{} listeners at port {SWARM_PORT}, each at one address", swarm.len()))],
    ))
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
                (
                    "at one address",
                    |s| {
                        s.told_swarm();
                        s.host_listens("10.0.0.1:2377");
                    },
                    "pass",
                ),
                (
                    "at all",
                    |s| {
                        s.told_swarm();
                        s.host_listens("0.0.0.0:2377");
                    },
                    "fail",
                ),
                (
                    "at all of IPv6",
                    |s| {
                        s.told_swarm();
                        s.host_listens("[::]:2377");
                    },
                    "fail",
                ),
                (
                    "another port",
                    |s| {
                        s.told_swarm();
                        s.host_listens("0.0.0.0:80");
                    },
                    "unknown",
                ),
                (
                    "a worker, which has none",
                    |s| {
                        s.told_swarm().control_available = false;
                        s.host_listens("0.0.0.0:80");
                    },
                    "pass",
                ),
                (
                    "a manager that is locked",
                    |s| {
                        let swarm = s.told_swarm();
                        (swarm.local_node_state, swarm.control_available) = ("locked".into(), false);
                        s.host_listens("0.0.0.0:80");
                    },
                    "unknown",
                ),
                ("cannot tell", |s| s.in_a_swarm(), "unknown"),
            ],
        );
    }
}
