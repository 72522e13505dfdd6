//! 5.8: the workload listens on the ports that were declared, and no others.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Judgement, Unseen};
use crate::facts::Listener;

pub const CHECK: Check = Check {
    slug: "open-ports",
    v1_3_1: "5.8",
    v1_6: "5.9",
    title: "only declared ports are open",
    severity: Severity::Warning,
    docker_run: "make the service listen on 127.0.0.1, and publish only the agent's port",
    compose: "make the service listen on 127.0.0.1, and publish only the agent's port",
    kubernetes: "make the service listen on 127.0.0.1, and name only the agent's port in `ports`",
    judge,
};

const DECLARE: &str = "a list of the intended ports: `ports = [8080]` under `declared` in the agent's configuration";

fn judge(case: &Case<'_>) -> Answer {
    let (listeners, source) = case.facts.listeners.needs(DOCKER_API)?;
    let line = |l: &Listener| Evidence::new(source, format!("{} (uid {})", l.address, l.uid));
    let open: Vec<&Listener> = listeners.iter().filter(|l| !l.is_loopback()).collect();
    if open.is_empty() {
        let told = format!("{} listeners, all on loopback", listeners.len());
        return Ok(Judgement::pass(vec![Evidence::new(source, told)]));
    }
    if case.declared.ports.is_empty() {
        return Err(Unseen::new(DECLARE).with(open.into_iter().map(line).collect()));
    }
    let (declared, others): (Vec<&Listener>, Vec<&Listener>) =
        open.into_iter().partition(|l| case.declared.ports.contains(&l.address.port()));
    Ok(Judgement::none_of(others.into_iter().map(line).collect(), declared.into_iter().map(line).collect()))
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows, hidden};
    use super::*;

    #[test]
    fn open_ports_are_those_declared() {
        let rows: [Row; 6] = [
            ("loopback only", |_| (), "pass"),
            ("open, nothing declared", |s| s.listen("0.0.0.0:8080"), "unknown"),
            (
                "open and declared",
                |s| {
                    s.listen("0.0.0.0:8080");
                    s.declared.ports = vec![8080];
                },
                "pass",
            ),
            (
                "another one, on IPv6",
                |s| {
                    s.listen("0.0.0.0:8080");
                    s.listen("[::]:4444");
                    s.declared.ports = vec![8080];
                },
                "fail",
            ),
            ("loopback spelt as IPv6", |s| s.listen("[::ffff:127.0.0.1]:99"), "pass"),
            ("sockets hidden", |s| s.facts.listeners = hidden(), "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }
}
