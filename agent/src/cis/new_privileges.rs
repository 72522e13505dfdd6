//! 5.25: no process can gain privileges by a setuid program.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, Unseen, api, both, each_container, short_list, status_of};
use crate::facts::Process;

use crate::facts::Told;
use crate::facts::engine::Host;

pub const CHECK: Check = Check {
    slug: "no-new-privileges",
    v1_3_1: "5.25",
    v1_6: "5.26",
    title: "processes cannot gain new privileges",
    severity: Severity::Warning,
    docker_run: "--security-opt no-new-privileges",
    compose: "security_opt: [no-new-privileges]",
    kubernetes: "securityContext: {allowPrivilegeEscalation: false}",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, host: &Host, _: &Case<'_>) -> Answer {
    let asked =
        told.inspect.host_config.security_opt.iter().filter_map(|option| option.strip_prefix("no-new-privileges"));
    // The last one counts, and `no-new-privileges` alone means that it is on.
    let mut asked = asked
        .map(|value| matches!(value.trim_start_matches([':', '=']), "" | "true" | "1" | "t" | "T" | "TRUE" | "True"));
    let on = asked.next_back().unwrap_or(host.info.security("no-new-privileges").is_some());
    let evidence = vec![api("HostConfig.SecurityOpt", short_list(&told.inspect.host_config.security_opt))];
    Ok(if on { Judgement::pass(evidence) } else { Judgement::fail(evidence) })
}

fn seen(case: &Case<'_>) -> Answer {
    each_container(case, |container| {
        if container.own_processes().any(|p| p.no_new_privs.is_none()) {
            return Err(Unseen::new("a kernel of 4.10 or newer, which tells NoNewPrivs in /proc/<pid>/status"));
        }
        let line = |p: &Process| {
            let value = u8::from(p.no_new_privs == Some(true));
            Evidence::new(status_of(p), format!("NoNewPrivs: {value} ({})", p.name))
        };
        let violations = container.own_processes().filter(|p| p.no_new_privs == Some(false)).map(line).collect();
        Ok(Judgement::none_of(violations, container.own_processes().take(1).map(line).collect()))
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows};
    use super::*;

    #[test]
    fn every_process_has_to_have_it() {
        let rows: [Row; 4] = [
            ("on", |_| (), "pass"),
            ("off, also when spelt no-new-privileges:false", |s| s.first().no_new_privs = Some(false), "fail"),
            (
                "one process without",
                |s| {
                    let free =
                        Process { no_new_privs: Some(false), role: crate::facts::Role::Inside, ..s.first().clone() };
                    s.container().processes.push(free);
                },
                "fail",
            ),
            ("an old kernel", |s| s.first().no_new_privs = None, "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn the_engine_tells_what_was_asked_for() {
        check_rows(
            &CHECK,
            &[
                ("on", |s| s.asked(), "pass"),
                ("not asked for", |s| s.told().host_config.security_opt.clear(), "fail"),
                (
                    "asked for, and off",
                    |s| s.told().host_config.security_opt = vec!["no-new-privileges:false".into()],
                    "fail",
                ),
                ("off, spelt 0", |s| s.told().host_config.security_opt = vec!["no-new-privileges=0".into()], "fail"),
                ("the short form", |s| s.told().host_config.security_opt = vec!["no-new-privileges".into()], "pass"),
            ],
        );
    }
}
