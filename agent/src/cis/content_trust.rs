//! 4.5: content trust: the image was signed by its publisher.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, Unseen};

pub const CHECK: Check = Check {
    slug: "content-trust",
    v1_3_1: "4.5",
    v1_6: "4.5",
    title: "content trust is on",
    severity: Severity::Notice,
    docker_run: "export DOCKER_CONTENT_TRUST=1 where images are pulled and built, and attest it",
    compose: "export DOCKER_CONTENT_TRUST=1 where images are pulled and built, and attest it",
    kubernetes: "export DOCKER_CONTENT_TRUST=1 where images are pulled and built, and attest it",
    judge,
};

const GRANT: &str = "an attestation: `[[attestation]]` in the node agent's configuration, with who, why and until";

fn judge(case: &Case<'_>) -> Answer {
    case.image()?;
    Err(Unseen::new(GRANT))
}

#[cfg(test)]
mod tests {
    use super::super::sample::check_rows;
    use super::*;

    #[test]
    fn it_is_unknown_until_somebody_answers_for_it() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("with it", |s| s.asked(), "unknown"),
                (
                    "attested",
                    |s| {
                        s.asked();
                        s.attest(CHECK.slug, true);
                    },
                    "pass",
                ),
                (
                    "attested once",
                    |s| {
                        s.asked();
                        s.attest(CHECK.slug, false);
                    },
                    "unknown",
                ),
            ],
        );
    }
}
