//! 5.3: no capability beyond Docker's own set without NET_RAW, and what the operator declared.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, each_container, status_of};
use crate::facts::Process;
use crate::facts::parse::{capability_bit, capability_names};

pub const CHECK: Check = Check {
    slug: "capabilities",
    v1_3_1: "5.3",
    v1_6: "5.4",
    title: "no capability beyond Docker's default set without NET_RAW",
    severity: Severity::Warning,
    docker_run: "--cap-drop ALL, and --cap-add only what is needed",
    compose: "cap_drop: [ALL]",
    kubernetes: "securityContext: {capabilities: {drop: [ALL]}}",
    judge,
};

/// What Docker leaves a container by default, but for NET_RAW, which lets it forge packets of its neighbours.
const DOCKER_DEFAULT_WITHOUT_NET_RAW: u64 = 0xa804_25fb & !(1 << 13);

/// Capabilities with which a container can take its host: DAC_READ_SEARCH, SYS_MODULE, SYS_RAWIO, SYS_PTRACE, SYS_ADMIN,
/// SYS_BOOT, BPF.
const TAKE_THE_HOST: u64 = 1 << 2 | 1 << 16 | 1 << 17 | 1 << 19 | 1 << 21 | 1 << 22 | 1 << 39;

fn judge(case: &Case<'_>) -> Answer {
    let declared = case.declared.capabilities.iter().filter_map(|name| capability_bit(name)).fold(0, |a, b| a | b);
    let allowed = DOCKER_DEFAULT_WITHOUT_NET_RAW | declared;
    each_container(case, |container| {
        let excess = |p: &&Process| p.cap_bounding & !allowed != 0;
        let violations: Vec<Evidence> = container.own_processes().filter(excess).map(|p| line(p, allowed)).collect();
        let worst = container.own_processes().any(|p| p.cap_bounding & !allowed & TAKE_THE_HOST != 0);
        let proof = container.own_processes().take(1).map(|p| line(p, allowed)).collect();
        let judgement = Judgement::none_of(violations, proof);
        Ok(if worst { judgement.severity(Severity::Critical) } else { judgement })
    })
}

fn line(p: &Process, allowed: u64) -> Evidence {
    let excess = p.cap_bounding & !allowed;
    let told = if excess == 0 {
        "nothing beyond policy".into()
    } else {
        format!("beyond policy: {}", capability_names(excess))
    };
    Evidence::new(status_of(p), format!("CapBnd: {:016x}, {told} ({})", p.cap_bounding, p.name))
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, Sample, check_rows};
    use super::*;

    #[test]
    fn what_is_beyond_policy_fails() {
        let rows: [Row; 5] = [
            ("Docker's set without NET_RAW", |_| (), "pass"),
            ("none at all", |s| s.first().cap_bounding = 0, "pass"),
            ("Docker's default, which has NET_RAW", |s| s.first().cap_bounding = 0xa804_25fb, "fail"),
            (
                "NET_RAW, declared",
                |s| {
                    s.first().cap_bounding = 0xa804_25fb;
                    s.declared.capabilities = vec!["CAP_NET_RAW".into()];
                },
                "pass",
            ),
            ("all", |s| s.first().cap_bounding = 0x1ff_ffff_ffff, "fail"),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn what_takes_the_host_is_critical_and_named() {
        let severity_of = |caps: u64| {
            let mut sample = Sample::sound();
            sample.first().cap_bounding = caps;
            sample.judge_all().into_iter().find(|f| f.check == "capabilities").unwrap()
        };
        assert_eq!(severity_of(0xa804_25fb).severity, Severity::Warning);
        let admin = severity_of(0xa804_05fb | 1 << 21);
        assert_eq!(admin.severity, Severity::Critical);
        assert!(admin.evidence[0].line.contains("beyond policy: sys_admin"), "{:?}", admin.evidence);
    }
}
