//! 5.7: no port of the host below 1024 is mapped to the container. Mappings are the host's.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, Judgement, api, network_owner};
use crate::facts::engine::PortBinding;

pub const CHECK: Check = Check {
    slug: "privileged-ports",
    v1_3_1: "5.7",
    v1_6: "5.8",
    title: "no port of the host below 1024 is mapped",
    severity: Severity::Notice,
    docker_run: "-p 8443:8443 instead of -p 443:8443",
    compose: "ports: [\"8443:8443\"]",
    kubernetes: "hostPort: 8443, or none",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    let owner = network_owner(case.told()?.0)?;
    let line = |(port, b): (&str, &PortBinding)| {
        api("NetworkSettings.Ports", format!("{port} at `{}`, port {}", b.host_ip, b.host_port))
    };
    let low = owner.mappings().filter(|(_, b)| is_privileged(&b.host_port)).map(line).collect();
    let proof = format!("{} mapped, none below 1024", owner.mappings().count());
    Ok(Judgement::none_of(low, vec![api("NetworkSettings.Ports", proof)]))
}

/// Whether a port, or the first one of a range, is below 1024. An empty one is any that is free, which are above.
fn is_privileged(port: &str) -> bool {
    let first = port.split('-').next().unwrap_or_default().trim();
    !first.is_empty() && first.parse::<u16>().map_or(true, |n| n < 1024 && n > 0)
}

#[cfg(test)]
mod tests {
    use super::super::sample::check_rows;
    use super::*;

    #[test]
    fn ports_below_1024_fail_in_every_spelling() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("above", |s| s.asked(), "pass"),
                ("80", |s| s.told_port("127.0.0.1", "80"), "fail"),
                ("on IPv6", |s| s.told_port("::1", "81"), "fail"),
                ("a range", |s| s.told_port("127.0.0.1", "1000-2000"), "fail"),
                ("1024", |s| s.told_port("127.0.0.1", "1024"), "pass"),
                ("1023", |s| s.told_port("127.0.0.1", "1023"), "fail"),
                ("any", |s| s.told_port("127.0.0.1", ""), "pass"),
                ("nonsense", |s| s.told_port("127.0.0.1", "http"), "fail"),
            ],
        );
    }
}
