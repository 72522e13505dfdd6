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
    docker_run: "docker exec without --user root, or the command under [[declared.root_exec]] with a reason",
    compose: "docker compose exec without --user root, or the command under [[declared.root_exec]] with a reason",
    kubernetes: "kubectl exec uses the container's user: set runAsNonRoot",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    let source = "watch since the agent's start";
    match &case.history.entered_root {
        Some(seen) => Ok(Judgement::fail(vec![Evidence::new(source, seen)])),
        None if case.history.unbroken => {
            let declared = case.history.declared_root.as_ref().map(|seen| Evidence::new(source, seen));
            let none = Evidence::new(source, "every process was seen, and none did beyond what is declared");
            Ok(Judgement::pass(declared.into_iter().chain([none]).collect()))
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
        let rows: [Row; 6] = [
            ("nothing seen, nothing missed", |_| (), "pass"),
            ("somebody came in by intent", |s| s.history.declared_root = Some("backup".into()), "pass"),
            (
                "somebody came in by intent, and somebody without",
                |s| {
                    s.history.declared_root = Some("backup".into());
                    s.history.entered_root = Some("pid 40: sh".into());
                },
                "fail",
            ),
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
