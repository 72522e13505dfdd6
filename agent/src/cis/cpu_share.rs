//! 5.11: CPU priority or time is set on purpose.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, PTRACE, api, both, each_container};

use crate::facts::Told;
use crate::facts::engine::Host;

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

/// What a container has that asked for nothing.
const DEFAULT_SHARES: i64 = 1024;
/// Microseconds.
const DEFAULT_PERIOD: i64 = 100_000;

fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, host: &Host, _: &Case<'_>) -> Answer {
    let config = &told.inspect.host_config;
    let weighted = !matches!(config.cpu_shares, 0 | DEFAULT_SHARES);
    let period = if config.cpu_period > 0 { config.cpu_period } else { DEFAULT_PERIOD };
    let cpus = i64::try_from(host.info.cpus).unwrap_or(i64::MAX);
    let by_nanos = config.nano_cpus > 0 && config.nano_cpus < cpus.saturating_mul(1_000_000_000);
    let by_quota = config.cpu_quota > 0 && config.cpu_quota < period.saturating_mul(cpus);
    let line = format!(
        "CpuShares {}, NanoCpus {}, CpuQuota {} of {period}; the machine has {cpus} processors",
        config.cpu_shares, config.nano_cpus, config.cpu_quota
    );
    let evidence = vec![api("HostConfig", line)];
    Ok(if weighted || by_nanos || by_quota { Judgement::pass(evidence) } else { Judgement::fail(evidence) })
}

fn seen(case: &Case<'_>) -> Answer {
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

    #[test]
    fn the_engine_tells_share_and_limit() {
        check_rows(
            &CHECK,
            &[
                ("a share", |s| s.asked(), "pass"),
                ("none", |s| s.told().host_config.cpu_shares = 0, "fail"),
                ("the default, spelt out", |s| s.told().host_config.cpu_shares = 1024, "fail"),
                (
                    "a quota",
                    |s| (s.told().host_config.cpu_shares, s.told().host_config.cpu_quota) = (0, 50_000),
                    "pass",
                ),
                (
                    "a quota above the machine",
                    |s| (s.told().host_config.cpu_shares, s.told().host_config.cpu_quota) = (0, 900_000),
                    "fail",
                ),
                (
                    "half a processor",
                    |s| (s.told().host_config.cpu_shares, s.told().host_config.nano_cpus) = (0, 500_000_000),
                    "pass",
                ),
            ],
        );
    }
}
