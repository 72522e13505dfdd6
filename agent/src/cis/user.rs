//! 4.1: no process of the workload runs as root.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, each_container, status_of};
use crate::facts::Process;

pub const CHECK: Check = Check {
    slug: "user",
    v1_3_1: "4.1",
    v1_6: "4.1",
    title: "the container runs as a user that is not root",
    severity: Severity::Warning,
    docker_run: "--user 10001:10001",
    compose: "user: \"10001:10001\"",
    kubernetes: "securityContext: {runAsNonRoot: true, runAsUser: 10001}",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    each_container(case, |container| {
        let line = |p: &Process| {
            let [real, effective, saved, fs] = p.uids;
            Evidence::new(status_of(p), format!("Uid: {real} {effective} {saved} {fs} ({})", p.name))
        };
        let violations = container.own_processes().filter(|p| p.is_root()).map(line).collect();
        Ok(Judgement::none_of(violations, container.own_processes().take(1).map(line).collect()))
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows};
    use super::*;
    use crate::facts::Role;

    #[test]
    fn root_is_found_by_number_in_every_process_of_the_workload() {
        let rows: [Row; 4] = [
            ("another user", |_| (), "pass"),
            ("root", |s| s.first().uids = [0; 4], "fail"),
            ("root in reserve", |s| s.first().uids = [10001, 10001, 0, 10001], "fail"),
            (
                "somebody came in as root: that is another check's",
                |s| {
                    let root = Process { uids: [0; 4], role: Role::Entered, ..s.first().clone() };
                    s.container().processes.push(root);
                },
                "pass",
            ),
        ];
        check_rows(&CHECK, &rows);
    }
}
