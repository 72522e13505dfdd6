//! 5.17: the container has the device nodes that every container has, and no others.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, PTRACE, api, both, each_container};
use crate::facts::{Device, Seen};

use crate::facts::Told;
use crate::facts::engine::{DeviceMapping, Host, MountPoint};

pub const CHECK: Check = Check {
    slug: "devices",
    v1_3_1: "5.17",
    v1_6: "5.18",
    title: "no device of the host is exposed",
    severity: Severity::Warning,
    docker_run: "remove --device and --device-cgroup-rule",
    compose: "remove `devices` and `device_cgroup_rules`",
    kubernetes: "remove device plugins' resources from `limits`",
    judge,
};

/// null, zero, full, random, urandom; tty, console, ptmx: what runtimes give to every container.
const ORDINARY: [(u64, u64); 8] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)];
/// Pseudo terminals.
const PTS: u64 = 136;
/// What Docker allows in cgroup v1 beyond these: making nodes, and /dev/net/tun where a node is given.
const ORDINARY_RULES: [&str; 4] = ["b *:* m", "c *:* m", "c 10:200 rwm", "c 136:* rwm"];

fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, _: &Host, case: &Case<'_>) -> Answer {
    let config = &told.inspect.host_config;
    let mut violations = Vec::new();
    if config.privileged {
        violations.push(api("HostConfig.Privileged", "true: every device of the host"));
    }
    let foreign = |d: &&DeviceMapping| !case.declared.devices.contains(&d.path_in_container);
    let devices = config.devices.iter().filter(foreign);
    violations
        .extend(devices.map(|d| api("HostConfig.Devices", format!("{} as {}", d.path_on_host, d.path_in_container))));
    let rules = config.device_cgroup_rules.iter().filter(|rule| !is_ordinary_rule(rule));
    violations.extend(rules.map(|rule| api("HostConfig.DeviceCgroupRules", rule)));
    violations
        .extend(config.device_requests.iter().map(|r| api("HostConfig.DeviceRequests", format!("`{}`", r.driver))));
    let directory = |m: &&MountPoint| m.source == "/dev" || m.source.starts_with("/dev/");
    violations.extend(
        told.inspect
            .mounts
            .iter()
            .filter(directory)
            .map(|m| api("Mounts", format!("{} at {}", m.source, m.destination))),
    );
    Ok(Judgement::none_of(violations, vec![api("HostConfig.Devices", "none")]))
}

fn seen(case: &Case<'_>) -> Answer {
    each_container(case, |container| {
        let (devices, source) = container.devices.needs(PTRACE)?;
        let foreign = |d: &&Device| !is_ordinary(d) && !case.declared.devices.contains(&d.path);
        let line = |d: &Device| Evidence::new(source, format!("{} {} {}:{}", d.path, d.kind, d.major, d.minor));
        let mut violations: Vec<Evidence> = devices.iter().filter(foreign).take(16).map(line).collect();
        let mut proof = vec![Evidence::new(source, format!("{} nodes, all ordinary", devices.len()))];
        if let Seen::Known(rules, source) = &container.device_rules {
            let declared = devices.iter().filter(|d| case.declared.devices.contains(&d.path));
            let allowed: Vec<String> = declared.map(|d| format!("{} {}:{} ", d.kind, d.major, d.minor)).collect();
            let foreign =
                |rule: &&String| !is_ordinary_rule(rule) && !allowed.iter().any(|a| rule.starts_with(a.as_str()));
            violations.extend(rules.iter().filter(foreign).map(|rule| Evidence::new(source, rule)));
            proof.push(Evidence::new(source, format!("{} rules, all ordinary", rules.len())));
        }
        Ok(Judgement::none_of(violations, proof).deep())
    })
}

fn is_ordinary(d: &Device) -> bool {
    d.kind == 'c' && (ORDINARY.contains(&(d.major, d.minor)) || d.major == PTS)
}

fn is_ordinary_rule(rule: &str) -> bool {
    ORDINARY_RULES.contains(&rule) || ORDINARY.iter().any(|(a, b)| rule.strip_prefix(&format!("c {a}:{b} ")).is_some())
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, Sample, check_rows, hidden};
    use super::*;

    fn give(s: &mut Sample, path: &str, kind: char, major: u64, minor: u64) {
        let Seen::Known(devices, _) = &mut s.container().devices else { return };
        devices.push(Device { path: path.into(), kind, major, minor });
    }

    fn rule(s: &mut Sample, rule: &str) {
        let Seen::Known(rules, _) = &mut s.container().device_rules else { return };
        rules.push(rule.into());
    }

    #[test]
    fn a_device_more_than_usual_fails() {
        let rows: [Row; 8] = [
            ("the usual", |_| (), "pass"),
            ("a terminal", |s| give(s, "/dev/console", 'c', 136, 0), "pass"),
            ("a disk", |s| give(s, "/dev/vda", 'b', 254, 0), "fail"),
            ("a disk under a harmless name", |s| give(s, "/dev/null2", 'b', 1, 3), "fail"),
            ("fuse", |s| give(s, "/dev/fuse", 'c', 10, 229), "fail"),
            (
                "fuse, declared",
                |s| {
                    give(s, "/dev/fuse", 'c', 10, 229);
                    rule(s, "c 10:229 rwm");
                    s.declared.devices = vec!["/dev/fuse".into()];
                },
                "pass",
            ),
            ("a rule without a node", |s| rule(s, "b 254:* rwm"), "fail"),
            ("/dev hidden", |s| s.container().devices = hidden(), "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn where_the_kernel_has_no_rules_the_nodes_decide() {
        check_rows(&CHECK, &[("cgroup v2", |s| s.container().device_rules = hidden(), "pass")]);
        check_rows(&CHECK, &[("privileged", |s| rule(s, "a *:* rwm"), "fail")]);
    }

    #[test]
    fn the_engine_tells_what_was_given() {
        check_rows(
            &CHECK,
            &[
                ("none", |s| s.asked(), "pass"),
                ("a rule", |s| s.told().host_config.device_cgroup_rules = vec!["b 8:* rwm".into()], "fail"),
                ("all", |s| s.told().host_config.privileged = true, "fail"),
                ("a mounted node", |s| s.told_mount("/dev/fuse", "/dev/fuse"), "fail"),
            ],
        );
    }
}
