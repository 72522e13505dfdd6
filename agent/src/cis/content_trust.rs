//! 4.5: content trust: the image was signed by its publisher.

use sidewarden_proto::event::Severity;

use super::{Check, attested};

pub const CHECK: Check = Check {
    slug: "content-trust",
    v1_3_1: "4.5",
    v1_6: "4.5",
    title: "content trust is on",
    severity: Severity::Notice,
    docker_run: "export DOCKER_CONTENT_TRUST=1 where images are pulled and built, and attest it",
    compose: "export DOCKER_CONTENT_TRUST=1 where images are pulled and built, and attest it",
    kubernetes: "export DOCKER_CONTENT_TRUST=1 where images are pulled and built, and attest it",
    judge: attested::image,
};
