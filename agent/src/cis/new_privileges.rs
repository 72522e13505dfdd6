//! 5.25: no process can gain privileges by a setuid program.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, Unseen, each_container, status_of};
use crate::facts::Process;

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
}
