//! 7.10: management and data go over different networks, which the engine does not tell.

use sidewarden_proto::event::Severity;

use super::{Check, attested};

pub const CHECK: Check = Check {
    slug: "swarm-planes",
    v1_3_1: "7.10",
    v1_6: "7.9",
    title: "management and data traffic are separated",
    severity: Severity::Notice,
    docker_run: "docker swarm init --data-path-addr, and attest it",
    compose: "the same: it is set on the host",
    kubernetes: "not applicable: Kubernetes is no swarm",
    judge: attested::swarm,
};
