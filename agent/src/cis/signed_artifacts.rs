//! 4.12: all signed artifacts are validated.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, Unseen};

pub const CHECK: Check = Check {
    slug: "signed-artifacts",
    v1_3_1: "4.12",
    v1_6: "4.12",
    title: "signed artifacts are validated",
    severity: Severity::Notice,
    docker_run: "verify signatures (cosign, notation) where images are admitted, and attest it",
    compose: "verify signatures (cosign, notation) where images are admitted, and attest it",
    kubernetes: "verify signatures (cosign, notation) where images are admitted, and attest it",
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
