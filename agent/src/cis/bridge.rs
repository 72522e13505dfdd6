//! 5.29: the container is not on Docker's default bridge, told by what a user-defined network has and that one has not:
//! Docker's own DNS at 127.0.0.11.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Judgement, Unseen, api, network_owner};

use crate::facts::engine::Host;
use crate::facts::{Container, Told};

pub const CHECK: Check = Check {
    slug: "default-bridge",
    v1_3_1: "5.29",
    v1_6: "5.30",
    title: "Docker's default bridge is not used",
    severity: Severity::Notice,
    docker_run: "docker network create app; --network app",
    compose: "leave `network_mode` out: Compose makes a network of its own",
    kubernetes: "nothing to do: pods are not on Docker's bridge",
    judge,
};

const DOCKER_DNS: [u8; 4] = [127, 0, 0, 11];

fn judge(case: &Case<'_>) -> Answer {
    // From the host nobody sees into the container's own network: the engine's word stands alone.
    case.told().map_or_else(|_| seen(case), |(container, host)| told(container, host, case))
}

fn told(told: &Told, _: &Host, _: &Case<'_>) -> Answer {
    let owner = network_owner(told)?;
    let names: Vec<&str> = owner.network_settings.networks.keys().map(String::as_str).collect();
    let evidence = vec![api("NetworkSettings.Networks", names.join(", "))];
    match owner.host_config.network_mode.as_str() {
        "host" => Ok(Judgement::not_applicable("the host's network namespace is shared: see host-network", evidence)),
        _ if names.contains(&"bridge") => Ok(Judgement::fail(evidence)),
        _ => Ok(Judgement::pass(evidence)),
    }
}

fn seen(case: &Case<'_>) -> Answer {
    let (listeners, source) = case.facts.listeners.needs(DOCKER_API)?;
    if listeners.iter().any(|l| l.address.ip() == std::net::Ipv4Addr::from(DOCKER_DNS)) {
        return Ok(Judgement::pass(vec![Evidence::new(
            source,
            "Docker's DNS listens on 127.0.0.11, as on user-defined networks only",
        )]));
    }
    let (interfaces, net) = case.facts.interfaces.needs(DOCKER_API)?;
    let evidence =
        vec![Evidence::new(net, interfaces.join(", ")), Evidence::new(source, "nothing listens on 127.0.0.11")];
    if interfaces.iter().all(|name| name == "lo") {
        return Ok(Judgement::pass(evidence));
    }
    let host = case.facts.host_net.known().copied();
    match host {
        Some(true) => {
            Ok(Judgement::not_applicable("the host's network namespace is shared: see host-network", evidence))
        }
        Some(false) if case.facts.containers.iter().all(is_dockers) => Ok(Judgement::fail(evidence)),
        _ => Err(Unseen::new(DOCKER_API).with(evidence)),
    }
}

/// Whether Docker made the container, by where its /etc/hosts comes from.
fn is_dockers(container: &Container) -> bool {
    let of_docker = |root: &str| root.contains("/docker/containers/") || root.starts_with("/containers/");
    container.mounts.known().is_some_and(|m| m.iter().any(|m| m.point == "/etc/hosts" && of_docker(&m.root)))
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, Sample, check_rows, hidden};
    use super::*;
    use crate::facts::Seen;

    fn deafen(s: &mut Sample) {
        s.facts.listeners = Seen::Known(Vec::new(), "t".into());
    }

    #[test]
    fn without_dockers_dns_it_is_the_default_bridge() {
        let rows: [Row; 6] = [
            ("a network of its own", |_| (), "pass"),
            ("the default bridge", deafen, "fail"),
            (
                "no network",
                |s| {
                    deafen(s);
                    s.facts.interfaces = Seen::Known(vec!["lo".into()], "d".into());
                },
                "pass",
            ),
            (
                "the host's network",
                |s| {
                    deafen(s);
                    s.facts.host_net = Seen::Known(true, "n".into());
                },
                "not_applicable",
            ),
            (
                "not Docker's container",
                |s| {
                    deafen(s);
                    s.container().mounts = Seen::Known(Vec::new(), "m".into());
                },
                "unknown",
            ),
            ("sockets hidden", |s| s.facts.listeners = hidden(), "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn the_engine_tells_the_networks() {
        check_rows(
            &CHECK,
            &[
                ("its own network", |s| s.asked(), "pass"),
                ("the bridge", |s| s.told_bridge(), "fail"),
                ("the bridge of another container", |s| s.told_network_of(super::super::sample::bridge), "fail"),
            ],
        );
    }
}
