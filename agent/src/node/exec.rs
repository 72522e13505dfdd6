//! Programs that somebody has run in a container from outside, as the engine tells of them. Pure.

use sidewarden_proto::event::{Body, ContainerExec, ContainerRef, Event, Severity};
use sidewarden_proto::time::Timestamp;

use crate::cis::History;
use crate::facts::engine::{Exec, ExecProcess, Inspect};
use crate::watch::{mask, plain};

/// How a program was run; `None` where the engine no longer knew.
pub fn told(
    inspect: &Inspect,
    roots: &[String],
    about: &ContainerRef,
    id: &str,
    exec: Option<&Exec>,
    at: Timestamp,
) -> Option<Event> {
    let Some(process) = exec.map(|e| &e.process).filter(|p| p.privileged.is_some()) else {
        let body =
            ContainerExec { container: about.clone(), exec: plain(id), unread: true, ..ContainerExec::default() };
        let summary = format!("{}: a program was run from outside, and the engine does not tell how", about.name);
        return Some(Event::new(at, Severity::Warning, summary, &Body::from(body)));
    };
    let (privileged, root) = (process.privileged == Some(true), as_root(inspect, roots, process));
    if !privileged && !root && is_health_check(inspect, process) {
        return None;
    }
    let command = mask(&command(process));
    let how = match (privileged, root) {
        (true, _) => ", with all privileges",
        (false, true) => ", as root",
        (false, false) => "",
    };
    let severity = match (privileged, root) {
        (true, _) => Severity::Critical,
        (false, true) => Severity::Warning,
        (false, false) => Severity::Notice,
    };
    let summary = format!("{}: a program was run from outside{how}: {command}", about.name);
    let user = plain(&process.user);
    let body = ContainerExec { container: about.clone(), exec: plain(id), privileged, user, command, unread: false };
    Some(Event::new(at, severity, summary, &Body::from(body)))
}

/// What the checks remember of it.
pub fn remember(history: &mut History, inspect: &Inspect, roots: &[String], exec: Option<&Exec>) {
    let Some(process) = exec.map(|e| &e.process).filter(|p| p.privileged.is_some()) else {
        history.unbroken = false;
        return;
    };
    let line = || format!("exec as `{}`: {}", plain(&process.user), mask(&command(process)));
    if process.privileged == Some(true) {
        history.entered_privileged.get_or_insert_with(line);
    }
    if as_root(inspect, roots, process) {
        history.entered_root.get_or_insert_with(line);
    }
}

/// Whether root was asked for, in whatever spelling; `roots` are the names that stand for uid 0 in this image. The
/// container's own user, which health checks run as, was not asked for.
fn as_root(inspect: &Inspect, roots: &[String], process: &ExecProcess) -> bool {
    let name = process.user.split(':').next().unwrap_or_default();
    let is_root = name == "root" || name.parse::<u64>() == Ok(0) || roots.iter().any(|root| root == name);
    is_root && process.user != inspect.config.user
}

fn command(process: &ExecProcess) -> String {
    std::iter::once(&process.entrypoint).chain(&process.arguments).cloned().collect::<Vec<_>>().join(" ")
}

fn is_health_check(inspect: &Inspect, process: &ExecProcess) -> bool {
    let Some(check) = inspect.config.healthcheck.as_ref().filter(|check| check.is_on()) else { return false };
    let run = std::iter::once(&process.entrypoint).chain(&process.arguments);
    match check.test.split_first() {
        Some((kind, words)) if kind == "CMD" => run.eq(words),
        Some((kind, [line])) if kind == "CMD-SHELL" => process.arguments.last() == Some(line),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::engine::tests::INSPECT;

    fn run(privileged: Option<bool>, user: &str, line: &[&str]) -> Exec {
        let (entrypoint, arguments) = line.split_first().unwrap();
        let arguments = arguments.iter().map(|a| (*a).to_owned()).collect();
        let process = ExecProcess { privileged, user: user.into(), entrypoint: (*entrypoint).into(), arguments };
        Exec { container: "x".into(), process }
    }

    /// Severity of the event, and whether privilege, root and an unbroken watch are remembered.
    fn check(own: &str, exec: Option<&Exec>) -> (Option<Severity>, [bool; 3]) {
        let mut inspect: Inspect = serde_json::from_str(INSPECT).unwrap();
        inspect.config.user = own.into();
        let mut history = History { unbroken: true, ..History::default() };
        remember(&mut history, &inspect, &["toor".to_owned()], exec);
        let event = told(&inspect, &["toor".to_owned()], &ContainerRef::default(), "e", exec, Timestamp(0));
        let kept = [history.entered_privileged.is_some(), history.entered_root.is_some(), history.unbroken];
        (event.map(|e| e.severity), kept)
    }

    #[test]
    fn privilege_and_root_are_told_in_every_spelling_and_health_checks_are_not() {
        use Severity::{Critical, Notice, Warning};
        let rows = [
            ("10001", Some(run(Some(false), "", &["sh"])), Some(Notice), [false, false, true]),
            ("10001", Some(run(Some(true), "", &["sh"])), Some(Critical), [true, false, true]),
            ("10001", Some(run(Some(false), "root", &["sh"])), Some(Warning), [false, true, true]),
            ("10001", Some(run(Some(false), "0:0", &["sh"])), Some(Warning), [false, true, true]),
            ("10001", Some(run(Some(false), "00", &["sh"])), Some(Warning), [false, true, true]),
            ("10001", Some(run(Some(false), "10002", &["sh"])), Some(Notice), [false, false, true]),
            ("10001", Some(run(Some(false), "toor", &["sh"])), Some(Warning), [false, true, true]),
            ("", Some(run(Some(false), "root", &["sh"])), Some(Warning), [false, true, true]),
            ("0", Some(run(Some(false), "0", &["sh"])), Some(Notice), [false, false, true]),
            ("10001", Some(run(Some(false), "10001", &["/bin/health"])), None, [false, false, true]),
            ("10001", Some(run(Some(true), "", &["/bin/health"])), Some(Critical), [true, false, true]),
            ("10001", Some(run(None, "", &["sh"])), Some(Warning), [false, false, false]),
            ("10001", None, Some(Warning), [false, false, false]),
        ];
        for (own, exec, severity, kept) in rows {
            assert_eq!(check(own, exec.as_ref()), (severity, kept), "{own} {exec:?}");
        }
    }

    #[test]
    fn a_secret_on_the_command_line_does_not_leave() {
        let exec = run(Some(false), "", &["mysql", "--password=hunter2"]);
        let inspect: Inspect = serde_json::from_str(INSPECT).unwrap();
        let event = told(&inspect, &[], &ContainerRef::default(), "e", Some(&exec), Timestamp(0)).unwrap();
        assert!(!serde_json::to_string(&event).unwrap().contains("hunter2"));
    }
}
