//! 5.21: system calls are filtered as by Docker's profile, or more.
//!
//! The kernel says whether a filter is on, not which. In exec mode the filter is ours too and can be tried.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Judgement, Unseen, each_container, status_of};
use crate::facts::{Container, Process, Seen};

pub const CHECK: Check = Check {
    slug: "seccomp",
    v1_3_1: "5.21",
    v1_6: "5.22",
    title: "Docker's seccomp profile is on",
    severity: Severity::Critical,
    docker_run: "remove --security-opt seccomp=unconfined",
    compose: "remove seccomp:unconfined from `security_opt`",
    kubernetes: "securityContext: {seccompProfile: {type: RuntimeDefault}}",
    judge,
};

const CAP_SYS_ADMIN: u64 = 1 << 21;
const FILTER: u32 = 2;

fn judge(case: &Case<'_>) -> Answer {
    each_container(case, |container| {
        let line = |p: &Process| {
            let mode = p.seccomp.map_or("not told".into(), |mode| mode.to_string());
            Evidence::new(status_of(p), format!("Seccomp: {mode} ({})", p.name))
        };
        let off: Vec<Evidence> = container.own_processes().filter(|p| p.seccomp == Some(0)).map(line).collect();
        if !off.is_empty() {
            return Ok(Judgement::fail(off));
        }
        if container.own_processes().any(|p| p.seccomp.is_none_or(|mode| mode < FILTER)) {
            return Err(Unseen::new("a kernel that tells the seccomp mode in /proc/<pid>/status"));
        }
        by_effect(case, container, container.own_processes().take(1).map(line).collect())
    })
}

fn by_effect(case: &Case<'_>, container: &Container, mut evidence: Vec<Evidence>) -> Answer {
    // Docker's profile allows these calls to containers with CAP_SYS_ADMIN, so they say nothing about it there.
    let admin = container.own_processes().any(|p| p.cap_bounding & CAP_SYS_ADMIN != 0);
    match &case.facts.filter {
        Seen::Known(probe, source) if !admin => {
            let word = |refused: bool| if refused { "refused" } else { "allowed" };
            let told = format!("unshare {}, setns {}", word(probe.unshare_refused), word(probe.setns_refused));
            evidence.push(Evidence::new(source, told));
            let as_docker = probe.unshare_refused && probe.setns_refused;
            Ok(if as_docker { Judgement::pass(evidence) } else { Judgement::fail(evidence) })
        }
        _ => Err(Unseen::new(DOCKER_API).with(evidence)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, Sample, check_rows};
    use super::*;
    use crate::facts::FilterProbe;

    fn try_filter(s: &mut Sample, refused: bool) {
        s.facts.filter = Seen::Known(FilterProbe { unshare_refused: refused, setns_refused: refused }, "f".into());
    }

    #[test]
    fn off_fails_and_a_filter_passes_only_when_it_was_tried() {
        let rows: [Row; 6] = [
            ("on, cannot be tried", |s| s.facts.filter = super::super::sample::hidden(), "unknown"),
            ("off", |s| s.first().seccomp = Some(0), "fail"),
            ("an old kernel", |s| s.first().seccomp = None, "unknown"),
            ("on, and refuses", |s| try_filter(s, true), "pass"),
            ("on, and lets everything through", |s| try_filter(s, false), "fail"),
            (
                "on, with CAP_SYS_ADMIN",
                |s| {
                    try_filter(s, false);
                    s.first().cap_bounding |= CAP_SYS_ADMIN;
                },
                "unknown",
            ),
        ];
        check_rows(&CHECK, &rows);
    }
}
