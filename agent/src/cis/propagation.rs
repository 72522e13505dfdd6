//! 5.19: no mount is shared with the host, so that what is mounted here does not show there.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Judgement, api, both, each_container};

use crate::facts::Told;
use crate::facts::engine::{Host, MountPoint};

pub const CHECK: Check = Check {
    slug: "mount-propagation",
    v1_3_1: "5.19",
    v1_6: "5.20",
    title: "no mount propagates to the host",
    severity: Severity::Warning,
    docker_run: "-v data:/data instead of -v …:/data:shared",
    compose: "bind: {propagation: rprivate}",
    kubernetes: "mountPropagation: None",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    both(case, told, seen)
}

fn told(told: &Told, _: &Host, _: &Case<'_>) -> Answer {
    let mounts = &told.inspect.mounts;
    let shared = mounts.iter().filter(|m| matches!(m.propagation.as_str(), "shared" | "rshared"));
    let line = |m: &MountPoint| api("Mounts", format!("{} is {}", m.destination, m.propagation));
    Ok(Judgement::none_of(
        shared.map(line).collect(),
        vec![api("Mounts", format!("{} mounts, none shared", mounts.len()))],
    ))
}

fn seen(case: &Case<'_>) -> Answer {
    each_container(case, |container| {
        let (mounts, source) = container.mounts.needs(DOCKER_API)?;
        let shared = mounts.iter().filter_map(|m| m.shared.map(|group| (m, group)));
        let violations =
            shared.map(|(m, group)| Evidence::new(source, format!("{} is shared:{group}", m.point))).collect();
        Ok(Judgement::none_of(violations, vec![Evidence::new(source, format!("{} mounts, none shared", mounts.len()))]))
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows, hidden};
    use super::*;

    #[test]
    fn a_shared_mount_fails() {
        let rows: [Row; 4] = [
            ("private", |_| (), "pass"),
            ("shared", |s| s.mount("254:0 /srv /srv rw shared:1 - ext4 /dev/vda rw"), "fail"),
            (
                "slave: changes come in, and do not go out",
                |s| s.mount("254:0 /srv /srv rw master:1 - ext4 /dev/vda rw"),
                "pass",
            ),
            ("mountinfo hidden", |s| s.container().mounts = hidden(), "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn the_engine_tells_it() {
        check_rows(
            &CHECK,
            &[
                ("none", |s| s.asked(), "pass"),
                ("shared", |s| s.told().mounts[0].propagation = "rshared".into(), "fail"),
                ("one way only", |s| s.told().mounts[0].propagation = "rslave".into(), "pass"),
            ],
        );
    }
}
