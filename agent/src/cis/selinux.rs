//! 5.2: an SELinux label confines the container, where the kernel has SELinux.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Judgement, Unseen, api, both, each_container};

use crate::facts::engine::Host;
use crate::facts::{Seen, Told};

pub const CHECK: Check = Check {
    slug: "selinux",
    v1_3_1: "5.2",
    v1_6: "5.3",
    title: "an SELinux label confines the container",
    severity: Severity::Warning,
    docker_run: "start dockerd with --selinux-enabled, and remove --security-opt label=disable",
    compose: "remove label:disable from `security_opt`",
    kubernetes: "securityContext: {seLinuxOptions: {type: container_t}}",
    judge,
};

/// Types that confine nothing.
const FREE: [&str; 3] = ["spc_t", "unconfined_t", "unconfined_service_t"];

fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, host: &Host, _: &Case<'_>) -> Answer {
    if host.info.security("selinux").is_none() {
        // The kernel may have it on all the same: then containers run without a label, and their processes show it.
        return Err(Unseen::new("dockerd with `selinux-enabled`"));
    }
    let label = &told.inspect.process_label;
    let evidence = vec![api("ProcessLabel", format!("`{label}`"))];
    match label.split(':').nth(2) {
        Some(kind) if !FREE.contains(&kind) => match host.selinux_enforcing {
            Seen::Known(true, _) => Ok(Judgement::pass(evidence)),
            Seen::Known(false, ref source) => {
                Ok(Judgement::fail(vec![Evidence::new(source, "0: SELinux tells, and refuses nothing")]))
            }
            Seen::Hidden(_) => {
                Err(Unseen::new("/sys/fs/selinux of the host, where it says whether it refuses").with(evidence))
            }
        },
        _ if told.inspect.runs() => Ok(Judgement::fail(evidence)),
        _ => Err(Unseen::new("its start, which gives it a label").with(evidence)),
    }
}

fn seen(case: &Case<'_>) -> Answer {
    let (on, source) = case.facts.selinux.needs(DOCKER_API)?;
    if !on {
        let evidence = vec![Evidence::new(source, "this kernel knows no selinuxfs")];
        return Ok(Judgement::not_applicable("SELinux is off on this host", evidence));
    }
    each_container(case, |container| {
        let (label, source) = container.label.needs(DOCKER_API)?;
        let evidence = vec![Evidence::new(source, label)];
        match label.split(':').nth(2) {
            Some(kind) if FREE.contains(&kind) => Ok(Judgement::fail(evidence)),
            // Whether SELinux enforces or only permits is told by a file that containers are not shown.
            Some(_) => Err(Unseen::new(DOCKER_API).with(evidence)),
            None => Ok(Judgement::fail(evidence)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows, hidden};
    use super::*;
    use crate::facts::Seen;

    #[test]
    fn a_type_that_confines_nothing_fails_and_the_rest_is_not_claimed() {
        let rows: [Row; 5] = [
            ("SELinux off", |_| (), "not_applicable"),
            ("cannot tell", |s| s.facts.selinux = hidden(), "unknown"),
            (
                "unconfined",
                |s| {
                    s.facts.selinux = Seen::Known(true, "f".into());
                    s.container().label = Seen::Known("system_u:system_r:spc_t:s0".into(), "l".into());
                },
                "fail",
            ),
            (
                "confined, if it is enforced",
                |s| {
                    s.facts.selinux = Seen::Known(true, "f".into());
                    s.container().label = Seen::Known("system_u:system_r:container_t:s0:c1,c2".into(), "l".into());
                },
                "unknown",
            ),
            (
                "no label",
                |s| {
                    s.facts.selinux = Seen::Known(true, "f".into());
                    s.container().label = Seen::Known("unconfined".into(), "l".into());
                },
                "fail",
            ),
        ];
        check_rows(&CHECK, &rows);
    }
}
