//! What each rule guards against, in words for people who have never seen it: the agent's `explain`, its reports and the
//! collector's page all say it from here.

/// Slug and what breaking the rule makes possible.
pub const GUARDS: [(&str, &str); 54] = [
    (
        "user",
        "Root in a container is root on the host for every file, device and kernel interface it gets hold of. One flaw in the runtime or one careless mount, and an intruder who is root inside is root outside.",
    ),
    (
        "trusted-base",
        "An image is a program that somebody else wrote. From an unknown source it may hold anything; on a release that is no longer maintained its flaws are known and stay open.",
    ),
    (
        "packages",
        "Every package is code that can be attacked, and a tool for whoever got in: a compiler, a shell, a download program.",
    ),
    (
        "image-scan",
        "Known vulnerabilities are the first thing that is tried. An image that nobody scans and rebuilds collects them.",
    ),
    ("content-trust", "Without signatures, whoever controls the registry or the way to it decides what is run here."),
    ("image-health", "Without a health check an engine takes a hung service for a good one, and keeps it."),
    (
        "update-alone",
        "An update in a layer of its own is kept by the build's cache: later builds install from an old list, without the patches made since.",
    ),
    (
        "setuid-files",
        "A setuid program gives whoever runs it the rights of its owner, mostly root: the usual step from a broken service to root in the container.",
    ),
    (
        "add-instruction",
        "ADD fetches from the network without verifying and unpacks archives by itself; COPY does neither.",
    ),
    (
        "image-secrets",
        "What stands in an image's history, environment or labels can be read by everybody who can pull it, for ever: a later layer does not remove it.",
    ),
    ("verified-packages", "A package that was not verified may have been put there by whoever stood in between."),
    ("signed-artifacts", "A signature that nobody verifies protects nothing."),
    (
        "apparmor",
        "AppArmor keeps a process from files, mounts and kernel interfaces that it has no use for, even as root. Unconfined, or in complain mode, nothing is kept from it.",
    ),
    (
        "selinux",
        "SELinux keeps containers from each other and from the host by their labels. Without one, or while it only tells, nothing is kept apart.",
    ),
    (
        "capabilities",
        "Each capability is a part of root's power. NET_RAW forges packets of neighbours; SYS_ADMIN, SYS_PTRACE, SYS_MODULE and a few more take the host.",
    ),
    (
        "privileged",
        "A privileged container has every capability, every device and no filter: it is root on the host in all but name.",
    ),
    (
        "host-mounts",
        "Whoever can write to /etc, /usr or /boot owns the host; whoever can read /etc or /var/lib/docker knows its secrets and every other container's.",
    ),
    (
        "sshd",
        "A server for logins inside of a container has keys and accounts that nobody manages, and a way in that nobody's policy sees.",
    ),
    (
        "privileged-ports",
        "Ports below 1024 are those that clients trust: a container that has one can stand in for a service of the host.",
    ),
    (
        "open-ports",
        "Every port that is open without need is a way in; one without TLS can be read and changed by whoever is on the way.",
    ),
    (
        "host-network",
        "In the host's network a container sees all its traffic, reaches services on its loopback, and can take its ports.",
    ),
    (
        "memory-limit",
        "Without a limit below what the machine has, one container can have the kernel kill all others, and the host's services.",
    ),
    ("cpu-share", "With the default share and no limit, one busy container takes the processors from all others."),
    ("read-only-root", "A root that can be written lets an intruder replace programs, leave tools, and stay."),
    (
        "port-address",
        "Mapped at every address, a port is open on networks that nobody thought of, and past the host's firewall, which Docker goes around.",
    ),
    (
        "restart-policy",
        "A container that is restarted without an end hides that it fails, and takes the machine's time for it.",
    ),
    (
        "host-pid",
        "In the host's PID namespace a container sees every process with its command line, and can signal and trace those of its user.",
    ),
    (
        "host-ipc",
        "Shared memory and semaphores of the host's processes can be read and written through the host's IPC namespace.",
    ),
    (
        "devices",
        "A device of the host goes past every file permission: a disk can be read raw, /dev/kmsg has the kernel's log.",
    ),
    (
        "ulimits",
        "The daemon's limits are chosen for the host. An override that nobody intended lets one container use up descriptors or processes of all.",
    ),
    (
        "mount-propagation",
        "With shared propagation a mount made in the container appears on the host, over whatever lies there.",
    ),
    ("host-uts", "In the host's UTS namespace a container can rename the host."),
    (
        "seccomp",
        "The filter refuses system calls that no service needs and that most escapes use. Without it, or with a profile that lets all through, the whole kernel can be attacked.",
    ),
    (
        "exec-privileged",
        "`docker exec --privileged` gives a process in the container what the container itself was denied.",
    ),
    (
        "exec-root",
        "A root shell in a container that runs as somebody else goes around that; nobody should need it in production.",
    ),
    (
        "cgroup-parent",
        "Under another parent a container has other limits than those that were set, and may share them with the host.",
    ),
    ("no-new-privileges", "Without it, a setuid program in the image gives its caller root."),
    ("health", "A container that fails its own check, or has none, is taken for a good one until somebody complains."),
    (
        "image-latest",
        "A tag can stand for another image tomorrow: what was tested is not what runs. An old image lacks the patches made since.",
    ),
    (
        "pids-limit",
        "Without a limit one container can start processes until nobody on the host can start any: a fork bomb.",
    ),
    (
        "default-bridge",
        "On Docker's default bridge every container reaches every other one, without names and without a say in it.",
    ),
    ("host-users", "Without a mapping of users, uid 0 of the container is uid 0 of the host."),
    (
        "docker-socket",
        "Whoever can talk to the runtime can start a privileged container: the socket is root on the host, however it is named and whatever directory shows it.",
    ),
    (
        "swarm-off",
        "A swarm opens ports for management and for data on the host. Where nobody needs it, they are only a way in.",
    ),
    (
        "swarm-managers",
        "One manager is a single point of failure; an even number, or many, is more to be attacked and no more that can be lost.",
    ),
    ("swarm-address", "At every address the management port is open on networks that it was not meant for."),
    (
        "overlay-encryption",
        "Containers on different hosts talk over the network in between; unencrypted, everybody there can read it.",
    ),
    (
        "swarm-secrets",
        "Secrets in the environment or in images are seen by everybody who can inspect them; the swarm's own are encrypted and given only to the service that needs them.",
    ),
    (
        "swarm-autolock",
        "The key to a manager's log, with all secrets, lies on its disk: unlocked, whoever has the disk has them.",
    ),
    ("swarm-unlock-key", "A key that is never replaced is known to everybody who ever had it."),
    ("swarm-node-certificates", "The certificate of a lost node is good until its end: ninety days by default."),
    ("swarm-ca", "A root that is never replaced is a key that was used, copied and backed up for years."),
    ("swarm-planes", "On one network, a flood of data delays or stops the swarm's management."),
    (
        "insecure-trust-all",
        "A listener or route that accepts every certificate is encrypted towards whoever answers: in the middle, anybody can read and change everything.",
    ),
];

/// What the check `slug` guards against; `None` for one of another version that this program does not know.
pub fn guards_against(slug: &str) -> Option<&'static str> {
    GUARDS.iter().find(|(name, _)| *name == slug).map(|(_, text)| *text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_has_one_text_that_says_something() {
        for (slug, text) in GUARDS {
            assert!(text.len() > 40 && text.ends_with('.'), "{slug}");
            assert_eq!(guards_against(slug), Some(text), "{slug} stands there twice");
        }
        assert_eq!(guards_against("nothing"), None);
    }
}
