//! 5.18: the daemon's limits are overridden only on purpose. A sidecar has the daemon's own, to compare with.

use sidewarden_proto::event::{Mode, Severity};
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Judgement, Unseen, api, both, each_container};
use crate::facts::parse::LimitRow;

use crate::facts::Told;
use crate::facts::engine::{Host, Ulimit};

pub const CHECK: Check = Check {
    slug: "ulimits",
    v1_3_1: "5.18",
    v1_6: "5.19",
    title: "resource limits are the daemon's, or overridden on purpose",
    severity: Severity::Notice,
    docker_run: "remove --ulimit, or declare it to the agent with `ulimits`",
    compose: "remove `ulimits`, or declare them to the agent",
    kubernetes: "leave limits to the runtime's default",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, _: &Host, case: &Case<'_>) -> Answer {
    let declared =
        |l: &&Ulimit| case.declared.ulimits.iter().any(|d| d == &l.name || kernel_name(&l.name) == Some(d.as_str()));
    let limits = &told.inspect.host_config.ulimits;
    let line = |l: &Ulimit| api("HostConfig.Ulimits", format!("{}: {}", l.name, l.hard));
    let violations = limits.iter().filter(|l| !declared(l)).map(line).collect();
    Ok(Judgement::none_of(violations, vec![api("HostConfig.Ulimits", format!("{} set, all declared", limits.len()))]))
}

/// What `/proc/<pid>/limits` calls a limit of `docker run --ulimit`.
fn kernel_name(docker: &str) -> Option<&'static str> {
    Some(match docker {
        "core" => "Max core file size",
        "cpu" => "Max cpu time",
        "data" => "Max data size",
        "fsize" => "Max file size",
        "locks" => "Max file locks",
        "memlock" => "Max locked memory",
        "msgqueue" => "Max msgqueue size",
        "nice" => "Max nice priority",
        "nofile" => "Max open files",
        "nproc" => "Max processes",
        "rss" => "Max resident set",
        "rtprio" => "Max realtime priority",
        "rttime" => "Max realtime timeout",
        "sigpending" => "Max pending signals",
        "stack" => "Max stack size",
        _ => return None,
    })
}

fn seen(case: &Case<'_>) -> Answer {
    if case.facts.mode != Mode::Sidecar {
        let why = "the agent's own limits are the container's: there is nothing to compare with";
        return Err(Unseen::new(DOCKER_API).with(vec![Evidence::new("/proc/self/limits", why)]));
    }
    let (own, _) = case.facts.own_limits.needs(DOCKER_API)?;
    each_container(case, |container| {
        let (limits, source) = container.limits.needs(DOCKER_API)?;
        // Soft limits are a program's own to move; hard ones are given to it.
        let differs = |row: &&LimitRow| own.iter().any(|o| o.0 == row.0 && o.2 != row.2);
        let violates = |row: &&LimitRow| differs(row) && !case.declared.ulimits.contains(&row.0);
        let line = |row: &LimitRow| Evidence::new(source, format!("{}: {} {}", row.0, row.1, row.2));
        let proof = format!("{} hard limits, as in the agent's own container", limits.len());
        Ok(Judgement::none_of(limits.iter().filter(violates).map(line).collect(), vec![Evidence::new(source, proof)]))
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, Sample, check_rows, hidden};
    use super::*;
    use crate::facts::Seen;

    fn set(s: &mut Sample, soft: &str, hard: &str) {
        s.container().limits = Seen::Known(vec![("Max open files".into(), soft.into(), hard.into())], "l".into());
    }

    #[test]
    fn hard_limits_other_than_our_own_fail_unless_declared() {
        let rows: [Row; 6] = [
            ("the same", |_| (), "pass"),
            ("another soft limit", |s| set(s, "20000", "20000"), "pass"),
            ("another hard limit", |s| set(s, "1024", "999999"), "fail"),
            (
                "declared",
                |s| {
                    set(s, "1024", "999999");
                    s.declared.ulimits = vec!["Max open files".into()];
                },
                "pass",
            ),
            ("exec mode", |s| s.facts.mode = Mode::Exec, "unknown"),
            ("hidden", |s| s.container().limits = hidden(), "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn the_engine_tells_what_was_overridden() {
        check_rows(
            &CHECK,
            &[
                ("nothing", |s| s.asked(), "pass"),
                (
                    "open files",
                    |s| s.told().host_config.ulimits = vec![Ulimit { name: "nofile".into(), hard: 99 }],
                    "fail",
                ),
                (
                    "declared",
                    |s| {
                        s.told().host_config.ulimits = vec![Ulimit { name: "nofile".into(), hard: 99 }];
                        s.declared.ulimits = vec!["Max open files".into()];
                    },
                    "pass",
                ),
            ],
        );
    }
}
