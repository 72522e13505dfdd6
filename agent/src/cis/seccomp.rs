//! 5.21: system calls are filtered as by Docker's profile, or more.
//!
//! The kernel says whether a filter is on, not which. In exec mode the filter is ours too and can be tried.

use std::collections::BTreeMap;

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Judgement, Unseen, api, both, each_container, status_of};
use crate::facts::{Container, Process, Seen};

use crate::facts::Told;
use crate::facts::engine::Host;

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
    both(case, told, seen)
}

fn told(told: &Told, host: &Host, _: &Case<'_>) -> Answer {
    let config = &told.inspect.host_config;
    let mut options = config.security_opt.iter().filter_map(|o| o.strip_prefix("seccomp"));
    let asked = options.next_back().map(|o| o.trim_start_matches([':', '=']).trim());
    match (asked, host.info.security("seccomp")) {
        _ if config.privileged => Ok(Judgement::fail(vec![api("HostConfig.Privileged", "true: no filter at all")])),
        (_, None) => Ok(Judgement::fail(vec![api("SecurityOptions", "the daemon has no seccomp")])),
        (Some("unconfined"), _) => Ok(Judgement::fail(vec![api("HostConfig.SecurityOpt", "seccomp=unconfined")])),
        (Some(profile), _) if profile.starts_with('{') => by_profile(profile),
        (Some("builtin"), _) | (None, Some("default" | "builtin" | "")) => {
            Ok(Judgement::pass(vec![api("HostConfig.SecurityOpt", "Docker's own profile")]))
        }
        (_, Some(other)) => {
            let evidence = vec![api("SecurityOptions", format!("the profile `{}`", asked.unwrap_or(other)))];
            Err(Unseen::new(
                "Docker's own profile, or one given to the container itself: that of the daemon is not told",
            )
            .with(evidence))
        }
    }
}

/// A profile is judged by what it lets through, not by being there.
fn by_profile(text: &str) -> Answer {
    let Ok(profile) = serde_json::from_str::<Profile>(text) else {
        return Err(
            Unseen::new("a seccomp profile that can be read").with(vec![api("HostConfig.SecurityOpt", "seccomp={…")])
        );
    };
    let through = profile.lets_through();
    let evidence = |line: String| vec![api("HostConfig.SecurityOpt: seccomp profile", line)];
    Ok(match through.as_slice() {
        [] => Judgement::pass(evidence(format!(
            "default {}, and none of {} allowed",
            profile.default_action,
            DANGEROUS.len()
        ))),
        names => {
            Judgement::fail(evidence(format!("default {}, lets through {}", profile.default_action, names.join(", "))))
        }
    })
}

/// Calls that Docker's profile refuses to every container without a capability for them.
const DANGEROUS: [&str; 24] = [
    "acct",
    "add_key",
    "bpf",
    "delete_module",
    "finit_module",
    "fsmount",
    "fsopen",
    "init_module",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "lookup_dcookie",
    "mount",
    "move_mount",
    "open_by_handle_at",
    "perf_event_open",
    "pivot_root",
    "reboot",
    "request_key",
    "setns",
    "swapon",
    "umount2",
    "unshare",
    "userfaultfd",
];

/// Of a seccomp profile, what is needed to tell what it lets through.
#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: String,
    #[serde(default)]
    syscalls: Option<Vec<Rule>>,
}

#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    #[serde(default)]
    names: Vec<String>,
    #[serde(default)]
    name: String,
    action: String,
    #[serde(default)]
    args: Option<Vec<serde::de::IgnoredAny>>,
    #[serde(default)]
    includes: Option<Conditions>,
    #[serde(default)]
    excludes: Option<Conditions>,
}

/// `arches`, `minKernel`, `caps` and whatever may be added.
type Conditions = BTreeMap<String, serde_json::Value>;

impl Profile {
    /// Dangerous calls that it allows to somebody without a capability for them. Where a rule holds only for some machines or
    /// some arguments, a refusal is none, and what it allows is allowed.
    fn lets_through(&self) -> Vec<&'static str> {
        let by_default = is_open(&self.default_action);
        let rules = |call: &str| -> Vec<&Rule> {
            self.syscalls.iter().flatten().filter(|r| r.name == call || r.names.iter().any(|n| n == call)).collect()
        };
        let open = |call: &&str| {
            let rules = rules(call);
            let refused = rules.iter().any(|r| !is_open(&r.action) && r.is_unconditional());
            let allowed = rules.iter().any(|r| is_open(&r.action) && !r.is_for_capabilities());
            allowed || (by_default && !refused)
        };
        DANGEROUS.iter().filter(|call| open(call)).copied().collect()
    }
}

impl Rule {
    fn is_unconditional(&self) -> bool {
        let conditions = self.includes.iter().chain(&self.excludes);
        !conditions.flat_map(Conditions::values).any(is_set) && self.args.as_ref().is_none_or(Vec::is_empty)
    }

    fn is_for_capabilities(&self) -> bool {
        self.includes.as_ref().and_then(|conditions| conditions.get("caps")).is_some_and(is_set)
    }
}

fn is_set(value: &serde_json::Value) -> bool {
    match value {
        serde_json::Value::Null => false,
        serde_json::Value::Array(values) => !values.is_empty(),
        serde_json::Value::String(text) => !text.is_empty(),
        _ => true,
    }
}

fn is_open(action: &str) -> bool {
    matches!(action, "SCMP_ACT_ALLOW" | "SCMP_ACT_LOG" | "SCMP_ACT_TRACE" | "SCMP_ACT_NOTIFY")
}

fn seen(case: &Case<'_>) -> Answer {
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

    #[test]
    fn a_profile_is_judged_by_what_it_lets_through() {
        check_rows(
            &CHECK,
            &[
                ("Docker's own", |s| s.asked(), "pass"),
                ("unconfined", |s| s.told().host_config.security_opt = vec!["seccomp=unconfined".into()], "fail"),
                (
                    "unconfined, spelt otherwise",
                    |s| s.told().host_config.security_opt = vec!["seccomp:unconfined".into()],
                    "fail",
                ),
                (
                    "one that allows everything",
                    |s| {
                        s.told().host_config.security_opt = vec![r#"seccomp={"defaultAction":"SCMP_ACT_ALLOW"}"#.into()]
                    },
                    "fail",
                ),
                (
                    "one that only logs",
                    |s| {
                        s.told().host_config.security_opt =
                            vec![r#"seccomp={"defaultAction":"SCMP_ACT_LOG","syscalls":null}"#.into()]
                    },
                    "fail",
                ),
                (
                    "one that allows mount",
                    |s| {
                        s.told().host_config.security_opt = vec![r#"seccomp={"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read","mount"],"action":"SCMP_ACT_ALLOW"}]}"#.into()]
                    },
                    "fail",
                ),
                (
                    "one that allows mount to those who may",
                    |s| {
                        s.told().host_config.security_opt = vec![r#"seccomp={"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["mount"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN"]}}]}"#.into()]
                    },
                    "pass",
                ),
                (
                    "a strict one",
                    |s| {
                        s.told().host_config.security_opt = vec![r#"seccomp={"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}"#.into()]
                    },
                    "pass",
                ),
                (
                    "nonsense",
                    |s| {
                        s.told().host_config.security_opt = vec!["seccomp={".into()];
                        s.facts.filter = super::super::sample::hidden();
                    },
                    "unknown",
                ),
            ],
        );
    }

    #[test]
    fn a_condition_makes_no_refusal_and_excuses_no_allowance() {
        const OPEN: &str = "SCMP_ACT_ALLOW";
        const CLOSED: &str = "SCMP_ACT_ERRNO";
        let all = DANGEROUS.map(|name| format!("\"{name}\"")).join(",");
        let mount = |default: &str, action: &str, condition: &str| {
            let others = format!(r#"{{"names":[{all}],"action":"{CLOSED}"{condition}}}"#);
            let mount = format!(r#"{{"names":["mount"],"action":"{action}"{condition}}}"#);
            let rules = if action == CLOSED { others } else { mount };
            let profile = format!(r#"{{"defaultAction":"{default}","syscalls":[{rules}]}}"#);
            by_profile(&profile).unwrap().verdict.word()
        };
        let rows = [
            ("", "pass", "fail"),
            (r#","args":null,"includes":{},"excludes":{"caps":[],"arches":null}"#, "pass", "fail"),
            (r#","args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"}]"#, "fail", "fail"),
            (r#","includes":{"arches":["s390x"]}"#, "fail", "fail"),
            (r#","includes":{"minKernel":"9.0"}"#, "fail", "fail"),
            (r#","includes":{"caps":["CAP_SYS_ADMIN"]}"#, "fail", "pass"),
            (r#","excludes":{"arches":["amd64"]}"#, "fail", "fail"),
            (r#","excludes":{"caps":["CAP_SYS_ADMIN"]}"#, "fail", "fail"),
            (r#","excludes":{"minKernel":"4.8"}"#, "fail", "fail"),
        ];
        for (condition, refused, allowed) in rows {
            assert_eq!(mount(OPEN, CLOSED, condition), refused, "refused{condition}");
            assert_eq!(mount(CLOSED, OPEN, condition), allowed, "allowed{condition}");
        }
    }
}
