//! 4.12: all signed artifacts are validated.

use sidewarden_proto::event::Severity;

use super::{Check, attested};

pub const CHECK: Check = Check {
    slug: "signed-artifacts",
    v1_3_1: "4.12",
    v1_6: "4.12",
    title: "signed artifacts are validated",
    severity: Severity::Notice,
    docker_run: "verify signatures (cosign, notation) where images are admitted, and attest it",
    compose: "verify signatures (cosign, notation) where images are admitted, and attest it",
    kubernetes: "verify signatures (cosign, notation) where images are admitted, and attest it",
    judge: attested::image,
};
