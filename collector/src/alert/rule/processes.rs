//! What rules read of processes: who came in, and what was started.

use super::*;

pub(super) fn entered(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::ProcessEntered(body)) = seen.body else { return Vec::new() };
    // Root by intent is told, and no alert.
    if !body.declared.is_empty() && !body.privileged {
        return Vec::new();
    }
    let name = match (body.privileged, body.as_root) {
        (true, _) => "PrivilegedExec",
        (false, true) => "RootExec",
        (false, false) => "ContainerEntered",
    };
    if name != rule.name {
        return Vec::new();
    }
    let how = match name {
        "PrivilegedExec" => "somebody entered with more capabilities than the workload has",
        "RootExec" => "somebody entered as root",
        _ => "somebody entered from outside",
    };
    vec![Signal::Raise(process_case(seen, rule, how, &body.process))]
}

pub(super) fn shell(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::ProcessShell(body)) = seen.body else { return Vec::new() };
    vec![Signal::Raise(process_case(seen, rule, "the service started a shell", &body.process))]
}

fn process_case(seen: &Seen<'_>, rule: &Rule, what: &str, process: &ProcessInfo) -> Case {
    let mut case = case(seen, rule, format!("{what} and ran `{}`", short(&process.command, 80)));
    case.evidence = vec![format!(
        "pid {} ({}), uid {}, parent {} {}, command: {}",
        process.pid, process.name, process.uid, process.ppid, process.parent, process.command
    )];
    case
}

pub(super) fn container_exec(rule: &Rule, seen: &Seen<'_>) -> Vec<Signal> {
    let Some(Body::ContainerExec(body)) = seen.body else { return Vec::new() };
    if seen.severity < Severity::Warning {
        return Vec::new();
    }
    let mut case = case(seen, rule, short(seen.summary, 300));
    case.subject = Some(container_subject(seen.agent, &body.container));
    case.severity = Some(seen.severity);
    case.evidence = lines([("user", &body.user), ("command", &body.command)]);
    vec![Signal::Raise(case)]
}
