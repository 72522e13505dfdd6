//! 5.13: mapped ports are bound to one address of the host. Mappings are the host's.

use sidewarden_proto::event::Severity;
use std::net::IpAddr;

use super::{Answer, Case, Check, Judgement, api, network_owner};
use crate::facts::engine::PortBinding;

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

fn judge(case: &Case<'_>) -> Answer {
    let owner = network_owner(case.told()?.0)?;
    let line = |(port, b): (&str, &PortBinding)| {
        api("NetworkSettings.Ports", format!("{port} at `{}`, port {}", b.host_ip, b.host_port))
    };
    let wild = owner.mappings().filter(|(_, b)| is_wildcard(&b.host_ip)).map(line).collect();
    let proof = format!("{} mapped, each to one address", owner.mappings().count());
    Ok(Judgement::none_of(wild, vec![api("NetworkSettings.Ports", proof)]))
}

/// Whether every address of the host is meant. An empty one is the daemon's default, which is that.
fn is_wildcard(address: &str) -> bool {
    let bare = address.trim_matches(['[', ']']);
    bare.parse::<IpAddr>().map_or(true, |ip| ip.is_unspecified() || ip.to_canonical().is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::super::sample::check_rows;
    use super::*;

    #[test]
    fn every_spelling_of_all_addresses_fails() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("one address", |s| s.asked(), "pass"),
                ("all of IPv4", |s| s.told_port("0.0.0.0", "18443"), "fail"),
                ("all of IPv6", |s| s.told_port("::", "18443"), "fail"),
                ("in brackets", |s| s.told_port("[::]", "18443"), "fail"),
                ("mapped", |s| s.told_port("::ffff:0.0.0.0", "18443"), "fail"),
                ("none given", |s| s.told_port("", "18443"), "fail"),
                ("one of IPv6", |s| s.told_port("::1", "18443"), "pass"),
                ("none mapped", |s| s.told().network_settings.ports.clear(), "pass"),
                (
                    "by another container's network",
                    |s| s.told_network_of(|owner| super::super::sample::map_port(owner, "0.0.0.0", "80")),
                    "fail",
                ),
            ],
        );
    }
}
