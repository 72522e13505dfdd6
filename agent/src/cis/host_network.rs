//! 5.9: the network namespace is not the host's.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Judgement, both, resolved};

use crate::facts::Told;
use crate::facts::engine::Host;

pub const CHECK: Check = Check {
    slug: "host-network",
    v1_3_1: "5.9",
    v1_6: "5.10",
    title: "the host's network namespace is not shared",
    severity: Severity::Critical,
    docker_run: "remove --network host",
    compose: "remove `network_mode: host`",
    kubernetes: "hostNetwork: false",
    judge,
};

/// The workload shares our network namespace, or it would not have been found, so ours answers for it.
fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, _: &Host, _: &Case<'_>) -> Answer {
    resolved(&told.inspect, &told.network, "HostConfig.NetworkMode", |h| &h.network_mode)
}

fn seen(case: &Case<'_>) -> Answer {
    let (host, source) = case.facts.host_net.needs(DOCKER_API)?;
    let told = if *host {
        "is there, as in the host's network namespace only"
    } else {
        "is not there: not the host's network namespace"
    };
    let evidence = vec![Evidence::new(source, told)];
    Ok(if *host { Judgement::fail(evidence) } else { Judgement::pass(evidence) })
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows, hidden};
    use super::*;
    use crate::facts::Seen;

    #[test]
    fn the_hosts_network_namespace_fails() {
        let rows: [Row; 3] = [
            ("its own", |_| (), "pass"),
            ("the host's", |s| s.facts.host_net = Seen::Known(true, "n".into()), "fail"),
            ("cannot tell", |s| s.facts.host_net = hidden(), "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn the_engine_tells_whose_network_it_is() {
        check_rows(
            &CHECK,
            &[
                ("its own", |s| s.asked(), "pass"),
                ("the host's", |s| s.told().host_config.network_mode = "host".into(), "fail"),
                (
                    "that of one with the host's",
                    |s| s.told_network_of(|owner| owner.host_config.network_mode = "host".into()),
                    "fail",
                ),
            ],
        );
    }
}
