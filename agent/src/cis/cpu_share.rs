//! 5.11: CPU priority or time is set on purpose.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, PTRACE, each_container};

pub const CHECK: Check = Check {
    slug: "cpu-share",
    v1_3_1: "5.11",
    v1_6: "5.12",
    title: "CPU priority or time is set",
    severity: Severity::Notice,
    docker_run: "--cpus 1 or --cpu-shares 512",
    compose: "cpus: 1.0",
    kubernetes: "resources: {limits: {cpu: \"1\"}}",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    each_container(case, |container| {
        let (cpu, source) = container.cpu.needs(PTRACE)?;
        let evidence = vec![Evidence::new(source, &cpu.text)];
        let set = cpu.weighted || cpu.limited;
        Ok(if set { Judgement::pass(evidence) } else { Judgement::fail(evidence) }.deep())
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, Sample, check_rows, hidden};
    use super::*;
    use crate::facts::{Cpu, Seen};

    fn set(s: &mut Sample, weighted: bool, limited: bool) {
        s.container().cpu = Seen::Known(Cpu { weighted, limited, text: "x".into() }, "c".into());
    }

    #[test]
    fn the_defaults_fail() {
        let rows: [Row; 4] = [
            ("shares set", |s| set(s, true, false), "pass"),
            ("time limited", |s| set(s, false, true), "pass"),
            ("defaults", |s| set(s, false, false), "fail"),
            ("cgroup hidden", |s| s.container().cpu = hidden(), "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }
}
