//! 5.27: the image is pinned and recent. Which image it was is known to the daemon only.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, DOCKER_API, Unseen};

pub const CHECK: Check = Check {
    slug: "image-latest",
    v1_3_1: "5.27",
    v1_6: "5.28",
    title: "the image is pinned and recent",
    severity: Severity::Notice,
    docker_run: "name the image by digest: image@sha256:…",
    compose: "image: name@sha256:…",
    kubernetes: "image: name@sha256:…",
    judge,
};

/// Nothing inside of the container shows it.
fn judge(_: &Case<'_>) -> Answer {
    Err(Unseen::new(DOCKER_API))
}

#[cfg(test)]
mod tests {
    use super::super::sample::check_rows;
    use super::*;

    #[test]
    fn it_is_unknown_without_the_api_whatever_is_seen() {
        check_rows(&CHECK, &[("sound", |_| (), "unknown"), ("hidden", |s| s.hide_everything(), "unknown")]);
    }
}
