//! Checks that nothing in a container or its engine shows: they are unknown until somebody answers for them.

use super::{Answer, Case, Unseen, no_swarm};

/// What would show them.
pub const GRANT: &str = "an attestation: `sidewarden-collector evidence sign` and `evidence add`, or `[[attestation]]` in \
                         the node agent's configuration, with who, why and until";

/// For a check about images.
pub fn image(case: &Case<'_>) -> Answer {
    case.image()?;
    Err(Unseen::new(GRANT))
}

/// For a check about swarms.
pub fn swarm(case: &Case<'_>) -> Answer {
    let host = case.host()?;
    if host.info.swarm.local_node_state == "inactive" {
        return Ok(no_swarm(host));
    }
    Err(Unseen::new(GRANT))
}

#[cfg(test)]
mod tests {
    use super::super::sample::{check_attested, check_rows};
    use super::super::{content_trust, image_scan, signed_artifacts, swarm_key, swarm_planes};

    #[test]
    fn what_is_about_an_image_is_unknown_until_somebody_answers_for_it() {
        for check in [&content_trust::CHECK, &image_scan::CHECK, &signed_artifacts::CHECK] {
            check_rows(check, &[("without the API", |_| (), "unknown"), ("with it", |s| s.asked(), "unknown")]);
            check_attested(check, |s| s.asked());
        }
    }

    #[test]
    fn what_is_about_a_swarm_is_unknown_where_there_is_one_until_somebody_answers_for_it() {
        for check in [&swarm_key::CHECK, &swarm_planes::CHECK] {
            check_rows(
                check,
                &[
                    ("without the API", |_| (), "unknown"),
                    ("no swarm", |s| s.only_the_host(), "not_applicable"),
                    ("a swarm", |s| s.in_a_swarm(), "unknown"),
                ],
            );
            check_attested(check, |s| s.in_a_swarm());
        }
    }
}
