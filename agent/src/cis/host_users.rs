//! 5.30: users of the container are mapped to others of the host.
//!
//! An identity mapping does not tell whether the container asked for the host's users or the daemon maps none at all; the
//! latter is a finding about the host.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Judgement, Unseen, each_container};

pub const CHECK: Check = Check {
    slug: "host-users",
    v1_3_1: "5.30",
    v1_6: "5.31",
    title: "the host's user namespace is not shared",
    severity: Severity::Notice,
    docker_run: "start dockerd with --userns-remap default, and remove --userns host",
    compose: "remove `userns_mode: host`",
    kubernetes: "hostUsers: false",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    each_container(case, |container| {
        let (map, source) = container.uid_map.needs(DOCKER_API)?;
        let told: Vec<String> =
            map.iter().map(|(inside, outside, count)| format!("{inside} {outside} {count}")).collect();
        let evidence = vec![Evidence::new(source, told.join("; "))];
        match map.iter().all(|(inside, outside, _)| inside == outside) {
            true => Err(Unseen::new(DOCKER_API).with(evidence)),
            false => Ok(Judgement::pass(evidence)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Row, check_rows, hidden};
    use super::*;
    use crate::facts::Seen;

    #[test]
    fn a_mapping_passes_and_its_absence_is_not_blamed_on_the_container() {
        let rows: [Row; 3] = [
            ("mapped", |_| (), "pass"),
            ("identity", |s| s.container().uid_map = Seen::Known(vec![(0, 0, u32::MAX)], "u".into()), "unknown"),
            ("hidden", |s| s.container().uid_map = hidden(), "unknown"),
        ];
        check_rows(&CHECK, &rows);
    }
}
