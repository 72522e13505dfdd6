//! Programs that somebody has run in a container from outside, as the engine tells of them. Pure.

use sidewarden_proto::event::{Body, ContainerExec, ContainerRef, Event, Severity};
use sidewarden_proto::time::Timestamp;

use crate::cis::{History, RootExec};
use crate::facts::engine::{Exec, ExecProcess, Inspect};
use crate::watch::{mask, plain};

/// What a container is, as far as it matters for who comes in.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The container.
    pub inspect: &'a Inspect,
    /// Names that stand for uid 0 in its image.
    pub roots: &'a [String],
    /// Who may come in as root.
    pub declared: &'a [RootExec],
}

/// How a program was run; `None` where the engine no longer knew.
pub fn told(place: &Place<'_>, about: &ContainerRef, id: &str, exec: Option<&Exec>, at: Timestamp) -> Option<Event> {
    let Some(process) = exec.map(|e| &e.process).filter(|p| p.privileged.is_some()) else {
        let body =
            ContainerExec { container: about.clone(), exec: plain(id), unread: true, ..ContainerExec::default() };
        let summary = format!("{}: a program was run from outside, and the engine does not tell how", about.name);
        return Some(Event::new(at, Severity::Warning, summary, &Body::from(body)));
    };
    let (privileged, root) = (process.privileged == Some(true), place.as_root(process));
    if !privileged && !root && is_health_check(place.inspect, process) {
        return None;
    }
    let declared = place.declared(process).unwrap_or_default().to_owned();
    let command = mask(&command(process));
    let how = match (privileged, root) {
        (true, _) => ", with all privileges".to_owned(),
        (false, true) if !declared.is_empty() => format!(", as root, which is declared ({})", plain(&declared)),
        (false, true) => ", as root".to_owned(),
        (false, false) => String::new(),
    };
    let severity = match (privileged, root) {
        (true, _) => Severity::Critical,
        (false, true) if declared.is_empty() => Severity::Warning,
        (false, true) => Severity::Notice,
        (false, false) => Severity::Notice,
    };
    let summary = format!("{}: a program was run from outside{how}: {command}", about.name);
    let user = plain(&process.user);
    let (container, exec) = (about.clone(), plain(id));
    let body = ContainerExec { container, exec, privileged, user, command, unread: false, declared };
    Some(Event::new(at, severity, summary, &Body::from(body)))
}

/// What the checks remember of it.
pub fn remember(history: &mut History, place: &Place<'_>, exec: Option<&Exec>) {
    let Some(process) = exec.map(|e| &e.process).filter(|p| p.privileged.is_some()) else {
        history.unbroken = false;
        return;
    };
    let line = || format!("exec as `{}`: {}", plain(&process.user), mask(&command(process)));
    if process.privileged == Some(true) {
        history.entered_privileged.get_or_insert_with(line);
    }
    match (place.as_root(process), place.declared(process)) {
        (true, None) => drop(history.entered_root.get_or_insert_with(line)),
        (true, Some(why)) => history.declared_root = Some(format!("{}: declared, {why}", line())),
        (false, _) => {}
    }
}

impl Place<'_> {
    /// Whether root was asked for, in whatever spelling. The container's own user, which health checks run as, was not asked
    /// for.
    fn as_root(&self, process: &ExecProcess) -> bool {
        let name = process.user.split(':').next().unwrap_or_default();
        let is_root = name == "root" || name.parse::<u64>() == Ok(0) || self.roots.iter().any(|root| root == name);
        is_root && process.user != self.inspect.config.user
    }

    /// Why this may be root. With all privileges is nobody's intent.
    fn declared(&self, process: &ExecProcess) -> Option<&str> {
        let reason = RootExec::reason(self.declared, self.inspect.short_name(), &command(process));
        reason.filter(|_| process.privileged == Some(false) && self.as_root(process))
    }
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
        let backup = |container: &str| RootExec {
            command: "pg_dump --all".into(),
            container: Some(container.into()),
            reason: "the backup".into(),
        };
        let declared = [backup("shop_orders*"), RootExec { command: "ls".into(), ..backup("other") }];
        let place = Place { inspect: &inspect, roots: &["toor".to_owned()], declared: &declared };
        remember(&mut history, &place, exec);
        let event = told(&place, &ContainerRef::default(), "e", exec, Timestamp(0));
        let kept = [history.entered_privileged.is_some(), history.entered_root.is_some(), history.unbroken];
        assert_eq!(
            history.declared_root.is_some(),
            exec.is_some_and(|e| e.process.user == "root" && place.declared(&e.process).is_some())
        );
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
            ("10001", Some(run(Some(false), "root", &["pg_dump", "--all"])), Some(Notice), [false, false, true]),
            ("10001", Some(run(Some(true), "root", &["pg_dump", "--all"])), Some(Critical), [true, true, true]),
            ("10001", Some(run(Some(false), "root", &["pg_dump", "--all", "x"])), Some(Warning), [false, true, true]),
            ("10001", Some(run(Some(false), "root", &["ls"])), Some(Warning), [false, true, true]),
        ];
        for (own, exec, severity, kept) in rows {
            assert_eq!(check(own, exec.as_ref()), (severity, kept), "{own} {exec:?}");
        }
    }

    #[test]
    fn a_secret_on_the_command_line_does_not_leave() {
        let exec = run(Some(false), "", &["mysql", "--password=hunter2"]);
        let inspect: Inspect = serde_json::from_str(INSPECT).unwrap();
        let place = Place { inspect: &inspect, roots: &[], declared: &[] };
        let event = told(&place, &ContainerRef::default(), "e", Some(&exec), Timestamp(0)).unwrap();
        assert!(!serde_json::to_string(&event).unwrap().contains("hunter2"));
    }
}
