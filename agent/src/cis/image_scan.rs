//! 4.4: the image was scanned for vulnerabilities and rebuilt with the patches.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, Unseen};

pub const CHECK: Check = Check {
    slug: "image-scan",
    v1_3_1: "4.4",
    v1_6: "4.4",
    title: "the image was scanned and has the security patches",
    severity: Severity::Warning,
    docker_run: "scan the image, rebuild it with the patches, and attest it",
    compose: "scan the image, rebuild it with the patches, and attest it",
    kubernetes: "scan the image, rebuild it with the patches, and attest it",
    judge,
};

const GRANT: &str =
    "a scan of this image: `sidewarden-collector evidence add` takes in what `trivy image --format json` writes";

fn judge(case: &Case<'_>) -> Answer {
    case.image()?;
    Err(Unseen::new(GRANT))
}
