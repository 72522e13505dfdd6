//! 5.22: nobody enters with more capabilities than the workload has (docker exec --privileged).

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, Unseen};

pub const CHECK: Check = Check {
    slug: "exec-privileged",
    v1_3_1: "5.22",
    v1_6: "5.23",
    title: "nobody enters the container with more privileges than it has",
    severity: Severity::Critical,
    docker_run: "docker exec without --privileged",
    compose: "docker compose exec without --privileged",
    kubernetes: "kubectl exec cannot; see who called docker exec on the node",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    let source = "watch since the agent's start";
    match &case.history.entered_privileged {
        Some(seen) => Ok(Judgement::fail(vec![Evidence::new(source, seen)])),
        None if case.history.unbroken => {
            Ok(Judgement::pass(vec![Evidence::new(source, "every process was seen, and none did")]))
        }
        None => Err(Unseen::new(case.unbroken_watch())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows};
    use super::*;

    #[test]
    fn only_an_unbroken_watch_passes() {
        let rows: [Row; 4] = [
            ("nothing seen, nothing missed", |_| (), "pass"),
            ("something was missed", |s| s.history.unbroken = false, "unknown"),
            ("somebody came in", |s| s.history.entered_privileged = Some("pid 40: sh".into()), "fail"),
            (
                "somebody came in, and something was missed",
                |s| {
                    s.history.unbroken = false;
                    s.history.entered_privileged = Some("pid 40: sh".into());
                },
                "fail",
            ),
        ];
        check_rows(&CHECK, &rows);
    }
}
