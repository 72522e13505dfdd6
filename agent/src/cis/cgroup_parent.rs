//! 5.24: the container's cgroup lies where containers' cgroups lie by default, or where the operator says.

use sidewarden_proto::event::{Mode, Severity};
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Judgement, Unseen, api, each_container};

use crate::facts::Told;
use crate::facts::engine::Host;

pub const CHECK: Check = Check {
    slug: "cgroup-parent",
    v1_3_1: "5.24",
    v1_6: "5.25",
    title: "the cgroup has the expected parent",
    severity: Severity::Notice,
    docker_run: "remove --cgroup-parent, or declare it to the agent",
    compose: "remove `cgroup_parent`, or declare it to the agent",
    kubernetes: "kubelet decides: see its --cgroup-root",
    judge,
};

/// Where Docker and kubelet put containers by themselves.
const DEFAULTS: [&str; 4] = ["/docker", "/system.slice", "/kubepods", "/kubepods.slice"];

fn judge(case: &Case<'_>) -> Answer {
    // Where the daemon puts containers by itself is its own affair: what was asked for decides.
    case.told().map_or_else(|_| seen(case), |(container, host)| told(container, host, case))
}

fn told(told: &Told, _: &Host, case: &Case<'_>) -> Answer {
    let parent = &told.inspect.host_config.cgroup_parent;
    let evidence = vec![api("HostConfig.CgroupParent", format!("`{parent}`"))];
    let expected = parent.is_empty() || case.declared.cgroup_parent.as_ref() == Some(parent);
    Ok(if expected { Judgement::pass(evidence) } else { Judgement::fail(evidence) })
}

fn seen(case: &Case<'_>) -> Answer {
    each_container(case, |container| {
        let path = container.cgroup.path();
        let source = container
            .own_processes()
            .next()
            .map_or("/proc/self/cgroup".into(), |p| format!("/proc/{}/cgroup", p.id.pid));
        let evidence = vec![Evidence::new(source, path)];
        let expected: Vec<&str> = match &case.declared.cgroup_parent {
            Some(parent) => vec![parent],
            None => DEFAULTS.to_vec(),
        };
        match path.strip_prefix("/../") {
            // A cgroup namespace hides the parent's name. One step up means the same parent as ours.
            Some(rest) if case.facts.mode == Mode::Sidecar && case.declared.cgroup_parent.is_none() => {
                Ok(if rest.starts_with("..") { Judgement::fail(evidence) } else { Judgement::pass(evidence) })
            }
            None if path != "/" => {
                let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
                let fits =
                    |dir: &&str| parent == *dir || parent.strip_prefix(*dir).is_some_and(|rest| rest.starts_with('/'));
                Ok(if expected.iter().any(fits) { Judgement::pass(evidence) } else { Judgement::fail(evidence) })
            }
            _ => Err(Unseen::new(DOCKER_API).with(evidence)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, Sample, check_rows};
    use super::*;
    use crate::facts::parse::Cgroup;

    fn put(s: &mut Sample, path: &str) {
        s.container().cgroup = Cgroup::parse(&format!("0::{path}")).unwrap();
    }

    #[test]
    fn an_unexpected_parent_fails() {
        let rows: [Row; 9] = [
            ("Docker's", |_| (), "pass"),
            ("systemd's", |s| put(s, "/system.slice/docker-add509.scope"), "pass"),
            ("kubelet's", |s| put(s, "/kubepods/besteffort/pod1/add509"), "pass"),
            ("another", |s| put(s, "/mine/add509"), "fail"),
            (
                "another, declared",
                |s| {
                    put(s, "/mine/add509");
                    s.declared.cgroup_parent = Some("/mine".into());
                },
                "pass",
            ),
            ("v2: beside our own", |s| put(s, "/../add509"), "pass"),
            ("v2: elsewhere", |s| put(s, "/../../mine/add509"), "fail"),
            ("v2: our own root", |s| put(s, "/"), "unknown"),
            (
                "v2: declared, and hidden",
                |s| {
                    put(s, "/../add509");
                    s.declared.cgroup_parent = Some("/mine".into());
                },
                "unknown",
            ),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn the_engine_tells_what_was_asked_for() {
        check_rows(
            &CHECK,
            &[
                ("nothing", |s| s.asked(), "pass"),
                ("a parent", |s| s.told().host_config.cgroup_parent = "/mine".into(), "fail"),
                (
                    "declared",
                    |s| {
                        s.told().host_config.cgroup_parent = "/mine".into();
                        s.declared.cgroup_parent = Some("/mine".into());
                    },
                    "pass",
                ),
            ],
        );
    }
}
