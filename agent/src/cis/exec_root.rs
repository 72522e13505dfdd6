//! 5.23: nobody enters as root while the workload is not (docker exec --user root).

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, Unseen};

pub const CHECK: Check = Check {
    slug: "exec-root",
    v1_3_1: "5.23",
    v1_6: "5.24",
    title: "nobody enters the container as root",
    severity: Severity::Critical,
    docker_run: "docker exec without --user root",
    compose: "docker compose exec without --user root",
    kubernetes: "kubectl exec uses the container's user: set runAsNonRoot",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    let source = "watch since the agent's start";
    match &case.history.entered_root {
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
            ("somebody came in", |s| s.history.entered_root = Some("pid 40: sh".into()), "fail"),
            (
                "somebody came in, and something was missed",
                |s| {
                    s.history.unbroken = false;
                    s.history.entered_root = Some("pid 40: sh".into());
                },
                "fail",
            ),
        ];
        check_rows(&CHECK, &rows);
    }
}
