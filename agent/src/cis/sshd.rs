//! 5.6: no SSH server runs in the container.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, each_container};
use crate::facts::Process;

pub const CHECK: Check = Check {
    slug: "sshd",
    v1_3_1: "5.6",
    v1_6: "5.7",
    title: "no SSH server runs in the container",
    severity: Severity::Warning,
    docker_run: "remove the SSH server from the image; use docker exec",
    compose: "remove the SSH server from the image; use docker compose exec",
    kubernetes: "remove the SSH server from the image; use kubectl exec",
    judge,
};

const SERVERS: [&str; 3] = ["sshd", "sshd-session", "dropbear"];

fn judge(case: &Case<'_>) -> Answer {
    each_container(case, |container| {
        let serves = |p: &&Process| SERVERS.contains(&p.name.as_str()) || SERVERS.contains(&program(p));
        let line = |p: &Process| Evidence::new(format!("/proc/{}/cmdline", p.id.pid), crate::watch::mask(&p.command()));
        let violations = container.processes.iter().filter(serves).map(line).collect();
        let names: Vec<&str> = container.processes.iter().map(|p| p.name.as_str()).take(8).collect();
        Ok(Judgement::none_of(violations, vec![Evidence::new("/proc/*/comm", names.join(", "))]))
    })
}

/// `sshd: root@pts/0` and `sshd: /usr/sbin/sshd -D [listener]` write over their arguments.
fn program(p: &Process) -> &str {
    p.program().split(':').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows};
    use super::*;

    #[test]
    fn a_server_is_found_by_either_of_its_names() {
        let rows: [Row; 4] = [
            ("a web server", |_| (), "pass"),
            ("sshd", |s| s.first().name = "sshd".into(), "fail"),
            ("sshd that renamed itself", |s| s.first().arguments = vec!["/usr/sbin/sshd".into(), "-D".into()], "fail"),
            ("a client", |s| s.first().name = "ssh".into(), "pass"),
        ];
        check_rows(&CHECK, &rows);
    }
}
