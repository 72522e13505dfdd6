//! 7.7: the key that unlocks managers is replaced once in a while, which the engine does not tell.

use sidewarden_proto::event::Severity;

use super::{Check, attested};

pub const CHECK: Check = Check {
    slug: "swarm-unlock-key",
    v1_3_1: "7.7",
    v1_6: "7.6",
    title: "the key that unlocks managers is replaced",
    severity: Severity::Notice,
    docker_run: "docker swarm unlock-key --rotate, and attest it",
    compose: "the same: it is set on the host",
    kubernetes: "not applicable: Kubernetes is no swarm",
    judge: attested::swarm,
};
