//! 5.1: an AppArmor profile is on, where the kernel has AppArmor.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Judgement, api, both, each_container};

use crate::facts::Told;
use crate::facts::engine::Host;

pub const CHECK: Check = Check {
    slug: "apparmor",
    v1_3_1: "5.1",
    v1_6: "5.2",
    title: "an AppArmor profile is enforced",
    severity: Severity::Warning,
    docker_run: "remove --security-opt apparmor=unconfined",
    compose: "security_opt: [apparmor=docker-default]",
    kubernetes: "securityContext: {appArmorProfile: {type: RuntimeDefault}}",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, host: &Host, _: &Case<'_>) -> Answer {
    if host.info.security("apparmor").is_none() {
        let evidence = vec![api("SecurityOptions", host.info.security_options.join("; "))];
        return Ok(Judgement::not_applicable("AppArmor is off on this host", evidence));
    }
    let inspect = &told.inspect;
    let asked = inspect.host_config.security_opt.iter().find(|o| o.starts_with("apparmor"));
    let free = inspect.app_armor_profile == "unconfined"
        || asked.is_some_and(|option| option.ends_with("unconfined"))
        || (inspect.app_armor_profile.is_empty() && inspect.runs())
        || inspect.host_config.privileged;
    let evidence = vec![api("AppArmorProfile", format!("`{}`", inspect.app_armor_profile))];
    Ok(if free { Judgement::fail(evidence) } else { Judgement::pass(evidence) })
}

fn seen(case: &Case<'_>) -> Answer {
    let (on, source) = case.facts.apparmor.needs(DOCKER_API)?;
    if !on {
        let evidence = vec![Evidence::new(source, "this kernel runs without AppArmor")];
        return Ok(Judgement::not_applicable("AppArmor is off on this host", evidence));
    }
    each_container(case, |container| {
        let (label, source) = container.label.needs(DOCKER_API)?;
        let evidence = vec![Evidence::new(source, label)];
        // `name (enforce)`; `unconfined` and `name (complain)` forbid nothing.
        Ok(if label.ends_with("(enforce)") { Judgement::pass(evidence) } else { Judgement::fail(evidence) })
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows, hidden};
    use super::*;
    use crate::facts::Seen;

    #[test]
    fn only_an_enforced_profile_passes() {
        let rows: [Row; 6] = [
            ("docker-default", |_| (), "pass"),
            ("unconfined", |s| s.container().label = Seen::Known("unconfined".into(), "l".into()), "fail"),
            ("complain", |s| s.container().label = Seen::Known("x (complain)".into(), "l".into()), "fail"),
            ("label hidden", |s| s.container().label = hidden(), "unknown"),
            ("AppArmor off", |s| s.facts.apparmor = Seen::Known(false, "m".into()), "not_applicable"),
            ("cannot tell whether it is on", |s| s.facts.apparmor = hidden(), "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn the_engine_tells_the_profile() {
        check_rows(
            &CHECK,
            &[
                ("Docker's own", |s| s.asked(), "pass"),
                ("unconfined", |s| s.told().app_armor_profile = "unconfined".into(), "fail"),
                ("none", |s| s.told().app_armor_profile.clear(), "fail"),
            ],
        );
    }
}
