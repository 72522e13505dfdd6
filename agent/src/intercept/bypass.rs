//! Who could get past the packet rules, or take them away. Pure.

use crate::facts::Process;

/// Capabilities with which packet rules are no hindrance, and why.
const PAST: [(u32, &str, &str); 6] = [
    (6, "CAP_SETGID", "it can take the agent's group"),
    (12, "CAP_NET_ADMIN", "it can remove the rules"),
    (13, "CAP_NET_RAW", "it can send and receive below them"),
    (16, "CAP_SYS_MODULE", "it can change the kernel"),
    (19, "CAP_SYS_PTRACE", "it can act through the agent's process"),
    (21, "CAP_SYS_ADMIN", "it can enter other namespaces"),
];

/// How the processes of the workload could get past rules that know the agent by `gid`, one line each.
pub fn bypasses(workload: &[&Process], gid: u32) -> Vec<String> {
    workload.iter().filter(|p| !p.zombie).flat_map(|p| by_group(p, gid).into_iter().chain(by_capability(p))).collect()
}

fn by_group(p: &Process, gid: u32) -> Option<String> {
    let has = p.gids.contains(&gid) || p.groups.contains(&gid);
    has.then(|| format!("{} has the agent's group {gid}: the rules take it for the agent", who(p)))
}

fn by_capability(p: &Process) -> Option<String> {
    let set = attainable(p);
    let (_, name, why) = PAST.iter().find(|(bit, ..)| set >> bit & 1 == 1)?;
    let more = PAST.iter().filter(|(bit, ..)| set >> bit & 1 == 1).count() - 1;
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    Some(format!("{} has {name}{more}: {why}; drop it (docker run --cap-drop ALL)", who(p)))
}

/// Root gets everything in its bounding set with the next program it runs, unless it can gain no privileges.
fn attainable(p: &Process) -> u64 {
    let regained = if p.is_root() && p.no_new_privs != Some(true) { p.cap_bounding } else { 0 };
    p.cap_effective | p.cap_permitted | regained
}

fn who(p: &Process) -> String {
    format!("pid {} ({})", p.id.pid, crate::watch::plain(&p.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::ProcessId;

    #[test]
    fn whoever_could_get_past_is_named_with_the_way() {
        let hardened = Process {
            id: ProcessId { started: 1, pid: 7 },
            name: "nginx".into(),
            uids: [33; 4],
            gids: [33; 4],
            no_new_privs: Some(true),
            ..Process::default()
        };
        let root = Process { uids: [0; 4], ..hardened.clone() };
        // What Docker gives to every container unless it is told otherwise.
        let of_docker = 0xa804_25fb;
        let rows = [
            ("hardened", hardened.clone(), ""),
            ("the group", Process { gids: [33, 33, 13100, 33], ..hardened.clone() }, "has the agent's group 13100"),
            ("as one of its others", Process { groups: vec![4, 13100], ..hardened.clone() }, "has the agent's group"),
            ("a capability", Process { cap_permitted: 1 << 12, ..hardened.clone() }, "CAP_NET_ADMIN: it can remove"),
            ("several", Process { cap_effective: 1 << 13 | 1 << 6, ..hardened.clone() }, "CAP_SETGID and 1 more"),
            ("harmless ones", Process { cap_effective: 1 << 10, ..hardened.clone() }, ""),
            ("bounding set of nobody special", Process { cap_bounding: of_docker, ..hardened.clone() }, ""),
            ("root that can gain nothing", Process { cap_bounding: of_docker, ..root.clone() }, ""),
            (
                "root that can",
                Process { cap_bounding: of_docker, no_new_privs: Some(false), ..root },
                "CAP_SETGID and 1 more",
            ),
            ("a zombie", Process { zombie: true, gids: [13100; 4], ..hardened }, ""),
        ];
        for (what, process, expected) in rows {
            let told = bypasses(&[&process], 13100).join("\n");
            assert!(told.contains(expected) && told.is_empty() == expected.is_empty(), "{what}: {told}");
            assert!(told.is_empty() || told.starts_with("pid 7 (nginx) has "), "{told}");
        }
    }
}
