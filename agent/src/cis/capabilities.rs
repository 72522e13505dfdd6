//! 5.3: no capability beyond Docker's own set without NET_RAW, and what the operator declared.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, api, both, each_container, status_of};
use crate::facts::Process;
use crate::facts::parse::{capability_bit, capability_names};

use crate::facts::Told;
use crate::facts::engine::Host;

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

/// What Docker leaves a container by default, and that but for NET_RAW, which lets it forge packets of its neighbours.
const DOCKER_DEFAULT: u64 = 0xa804_25fb;
const DOCKER_DEFAULT_WITHOUT_NET_RAW: u64 = DOCKER_DEFAULT & !(1 << 13);

/// Capabilities with which a container can take its host: DAC_READ_SEARCH, SYS_MODULE, SYS_RAWIO, SYS_PTRACE, SYS_ADMIN,
/// SYS_BOOT, BPF.
const TAKE_THE_HOST: u64 = 1 << 2 | 1 << 16 | 1 << 17 | 1 << 19 | 1 << 21 | 1 << 22 | 1 << 39;

fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, _: &Host, case: &Case<'_>) -> Answer {
    let config = &told.inspect.host_config;
    let had = if config.privileged { u64::MAX } else { asked_for(&config.cap_add, &config.cap_drop) };
    let excess = had & !allowed(case);
    let line = match excess {
        0 => "nothing beyond policy".to_owned(),
        _ if config.privileged => "privileged: all of them".into(),
        _ => format!("beyond policy: {}", capability_names(excess)),
    };
    let asked = format!("CapAdd {:?}, CapDrop {:?}: {line}", config.cap_add, config.cap_drop);
    let evidence = vec![api("HostConfig", asked)];
    match excess {
        0 => Ok(Judgement::pass(evidence)),
        _ if excess & TAKE_THE_HOST != 0 => Ok(Judgement::fail(evidence).severity(Severity::Critical)),
        _ => Ok(Judgement::fail(evidence)),
    }
}

/// What Docker makes of the two lists: `ALL` in one of them turns the default round.
fn asked_for(add: &[String], drop: &[String]) -> u64 {
    let all = |names: &[String]| names.iter().any(|n| matches!(n.to_ascii_uppercase().as_str(), "ALL" | "CAP_ALL"));
    let bits = |names: &[String]| names.iter().filter_map(|n| capability_bit(n)).fold(0, |a, b| a | b);
    match (all(add), all(drop)) {
        (true, false) => !bits(drop),
        (true, true) => u64::MAX,
        (false, true) => bits(add),
        (false, false) => (DOCKER_DEFAULT & !bits(drop)) | bits(add),
    }
}

fn allowed(case: &Case<'_>) -> u64 {
    let declared = case.declared.capabilities.iter().filter_map(|name| capability_bit(name)).fold(0, |a, b| a | b);
    DOCKER_DEFAULT_WITHOUT_NET_RAW | declared
}

fn seen(case: &Case<'_>) -> Answer {
    let allowed = allowed(case);
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

    #[test]
    fn the_engine_tells_what_was_asked_for() {
        check_rows(
            &CHECK,
            &[
                ("all dropped", |s| s.asked(), "pass"),
                ("the default keeps NET_RAW", |s| s.told().host_config.cap_drop.clear(), "fail"),
                ("NET_RAW alone dropped", |s| s.told().host_config.cap_drop = vec!["NET_RAW".into()], "pass"),
                ("added under its other name", |s| s.told().host_config.cap_add = vec!["CAP_SYS_ADMIN".into()], "fail"),
                ("in small letters", |s| s.told().host_config.cap_add = vec!["sys_ptrace".into()], "fail"),
                ("all", |s| s.told().host_config.cap_add = vec!["ALL".into()], "fail"),
                ("one of the default", |s| s.told().host_config.cap_add = vec!["CHOWN".into()], "pass"),
                ("privileged", |s| s.told().host_config.privileged = true, "fail"),
            ],
        );
    }
}
