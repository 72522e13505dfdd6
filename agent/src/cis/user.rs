//! 4.1: no process of the workload runs as root.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, Unseen, api, both, each_container, status_of};
use crate::facts::Process;

use crate::facts::Told;
use crate::facts::engine::Host;

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
    both(case, told, seen)
}

fn told(told: &Told, _: &Host, case: &Case<'_>) -> Answer {
    let user = &told.inspect.config.user;
    let evidence = vec![api("Config.User", format!("`{user}`"))];
    if told.inspect.runs() {
        // Whom its processes run as decides: a name may stand for uid 0, and a root may have become somebody else.
        return Err(Unseen::new("a look at the container's processes, in the host's /proc").with(evidence));
    }
    match user.split(':').next().unwrap_or_default() {
        "" | "root" => Ok(Judgement::fail(evidence)),
        name => match name.parse::<u32>() {
            Ok(0) => Ok(Judgement::fail(evidence)),
            Ok(_) => Ok(Judgement::pass(evidence)),
            Err(_) => by_name(name, case, evidence),
        },
    }
}

/// Whom a name stands for is in the image's passwd; one that is not there cannot be started.
fn by_name(name: &str, case: &Case<'_>, mut evidence: Vec<Evidence>) -> Answer {
    let files = case.image().ok().and_then(|image| image.files.known()).filter(|files| !files.roots.is_empty());
    let Some(files) = files else {
        return Err(Unseen::new("the container's start, which tells the number of this user").with(evidence));
    };
    let is_root = files.roots.iter().any(|root| root == name);
    let line = if is_root { "this name has the number 0" } else { "no name of the number 0" };
    evidence.push(Evidence::new("passwd of the image", line));
    Ok(if is_root { Judgement::fail(evidence) } else { Judgement::pass(evidence) })
}

fn seen(case: &Case<'_>) -> Answer {
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

    #[test]
    fn before_the_start_the_engine_tells_the_user() {
        check_rows(
            &CHECK,
            &[
                ("runs: its processes decide", |s| s.told().config.user = "0".into(), "pass"),
                ("a number", |s| s.before_its_start(), "pass"),
                (
                    "none",
                    |s| {
                        s.before_its_start();
                        s.told().config.user.clear();
                    },
                    "fail",
                ),
                (
                    "root and a group",
                    |s| {
                        s.before_its_start();
                        s.told().config.user = "0:0".into();
                    },
                    "fail",
                ),
                (
                    "root, spelt with zeros",
                    |s| {
                        s.before_its_start();
                        s.told().config.user = "00".into();
                    },
                    "fail",
                ),
                (
                    "a name",
                    |s| {
                        s.before_its_start();
                        s.told().config.user = "app".into();
                    },
                    "unknown",
                ),
            ],
        );
    }
}
