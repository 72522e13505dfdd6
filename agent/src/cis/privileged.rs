//! 5.4: the container is not privileged, told by everything that `--privileged` does at once.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Judgement, api, both, each_container, status_of};
use crate::facts::Mount;

use crate::facts::Told;
use crate::facts::engine::Host;

pub const CHECK: Check = Check {
    slug: "privileged",
    v1_3_1: "5.4",
    v1_6: "5.5",
    title: "the container is not privileged",
    severity: Severity::Critical,
    docker_run: "remove --privileged",
    compose: "remove `privileged: true`",
    kubernetes: "securityContext: {privileged: false}",
    judge,
};

/// Docker 20.10 gives 38 capabilities to a privileged container on a kernel that has 41: "all" is not a fixed number.
const MANY: u32 = 30;

fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, _: &Host, _: &Case<'_>) -> Answer {
    let privileged = told.inspect.host_config.privileged;
    let evidence = vec![api("HostConfig.Privileged", privileged.to_string())];
    Ok(if privileged { Judgement::fail(evidence) } else { Judgement::pass(evidence) })
}

fn seen(case: &Case<'_>) -> Answer {
    each_container(case, |container| {
        let Some(p) = container.own_processes().next() else {
            return Ok(Judgement::pass(vec![Evidence::new(&container.anchor, "no process of its own is left")]));
        };
        let caps = p.cap_bounding.count_ones();
        let status = Evidence::new(status_of(p), format!("CapBnd: {:016x}: {caps} capabilities", p.cap_bounding));
        if caps < MANY {
            return Ok(Judgement::pass(vec![status]));
        }
        let (mounts, source) = container.mounts.needs(DOCKER_API)?;
        let masked = mounts.iter().filter(|m| masks(m)).count();
        let told = format!("{masked} of the mounts that hide or protect parts of /proc and /sys");
        let evidence =
            vec![status, Evidence::new(source, told), Evidence::new(status_of(p), format!("Seccomp: {:?}", p.seccomp))];
        let privileged = masked == 0 && p.seccomp.unwrap_or(0) == 0;
        Ok(if privileged { Judgement::fail(evidence) } else { Judgement::pass(evidence) })
    })
}

/// Whether a runtime put `m` there to keep an ordinary container from the kernel's switches.
fn masks(m: &Mount) -> bool {
    let over_proc = m.is_at_or_below("/proc") && m.point != "/proc";
    let read_only_sys = m.point == "/sys" && m.fs == "sysfs" && m.read_only;
    over_proc || read_only_sys
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, Sample, check_rows, hidden};
    use super::*;
    use crate::facts::parse;

    fn privilege(s: &mut Sample) {
        s.first().cap_bounding = 0x3f_ffff_ffff;
        s.first().seccomp = Some(0);
        let mounts = "72 48 0:39 / / rw - overlay overlay rw\n73 72 0:42 / /proc rw - proc proc rw\n76 72 0:45 / /sys rw - sysfs sysfs rw\n";
        s.container().mounts = crate::facts::Seen::Known(parse::mounts(mounts).unwrap(), "m".into());
    }

    #[test]
    fn only_everything_at_once_is_privileged() {
        let rows: [Row; 4] = [
            ("an ordinary container", |_| (), "pass"),
            ("privileged", privilege, "fail"),
            ("all capabilities and nothing else: 5.3's", |s| s.first().cap_bounding = 0x1ff_ffff_ffff, "pass"),
            (
                "many capabilities, mounts hidden",
                |s| {
                    privilege(s);
                    s.container().mounts = hidden();
                },
                "unknown",
            ),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn the_engine_tells_it() {
        check_rows(
            &CHECK,
            &[("not", |s| s.asked(), "pass"), ("privileged", |s| s.told().host_config.privileged = true, "fail")],
        );
    }
}
