//! 5.30: users of the container are mapped to others of the host.
//!
//! An identity mapping does not tell whether the container asked for the host's users or the daemon maps none at all; the
//! latter is a finding about the host.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Judgement, Unseen, api, each_container};

use crate::facts::Told;
use crate::facts::engine::Host;

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
    match case.engine() {
        Some(engine) => match &engine.container {
            Some(container) => told(container, &engine.host, case),
            None => of_the_host(&engine.host),
        },
        None => seen(case),
    }
}

fn told(told: &Told, host: &Host, _: &Case<'_>) -> Answer {
    let mode = &told.inspect.host_config.userns_mode;
    let evidence = vec![api("HostConfig.UsernsMode", format!("`{mode}`"))];
    match mode.as_str() {
        "host" => Ok(Judgement::fail(evidence)),
        _ if maps(host) => Ok(Judgement::pass(evidence)),
        _ => Ok(Judgement::not_applicable(
            "the daemon maps no users at all, which is a finding about the host",
            evidence,
        )),
    }
}

fn maps(host: &Host) -> bool {
    host.info.security("userns").is_some() || host.info.security("rootless").is_some()
}

/// Whether the daemon maps users at all.
fn of_the_host(host: &Host) -> Answer {
    let evidence = vec![api("SecurityOptions", host.info.security_options.join("; "))];
    Ok(if maps(host) { Judgement::pass(evidence) } else { Judgement::fail(evidence) })
}

fn seen(case: &Case<'_>) -> Answer {
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

    #[test]
    fn the_engine_tells_whether_the_hosts_were_asked_for() {
        check_rows(
            &CHECK,
            &[
                ("mapped", |s| s.asked(), "pass"),
                ("the host's", |s| s.told().host_config.userns_mode = "host".into(), "fail"),
                (
                    "a daemon that maps none",
                    |s| s.told_host().info.security_options.retain(|o| o != "name=userns"),
                    "not_applicable",
                ),
                ("the host itself maps", |s| s.only_the_host(), "pass"),
                (
                    "the host itself maps none",
                    |s| {
                        s.only_the_host();
                        s.told_host().info.security_options.clear();
                    },
                    "fail",
                ),
            ],
        );
    }
}
