//! 5.27: the image is pinned and recent. Which image it was is known to the daemon only.

use sidewarden_proto::event::Severity;
use std::time::Duration;

use super::{Answer, Case, Check, Judgement, Unseen, api};
use sidewarden_proto::time::Timestamp;

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

fn judge(case: &Case<'_>) -> Answer {
    let asked = &case.told()?.0.inspect.config.image;
    let image = case.image()?;
    let mut evidence = vec![api("Config.Image", asked)];
    // By digest, or by the image's own id.
    if !asked.contains("@sha256:")
        && !image.inspect.id.trim_start_matches("sha256:").starts_with(asked.trim_start_matches("sha256:"))
    {
        evidence.push(api("Config.Image", "a tag may stand for another image tomorrow"));
        return Ok(Judgement::fail(evidence));
    }
    let Some(most) = case.declared.images.max_age else { return Ok(Judgement::pass(evidence)) };
    let Ok(made) = image.inspect.created.parse::<Timestamp>() else {
        return Err(Unseen::new("the date on which the image was made").with(evidence));
    };
    let days = |age: Duration| age.as_secs() / 86_400;
    let age = case.now.since(made);
    evidence.push(api("Created", format!("{} days ago; {} are allowed", days(age), days(most))));
    Ok(if age <= most { Judgement::pass(evidence) } else { Judgement::fail(evidence) })
}

#[cfg(test)]
mod tests {
    use super::super::sample::check_rows;
    use super::*;

    #[test]
    fn only_a_pinned_image_of_the_allowed_age_passes() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("by digest", |s| s.asked(), "pass"),
                ("by id", |s| s.told().config.image = "sha256:cf22".into(), "pass"),
                ("by tag", |s| s.told().config.image = "nginx:1.29".into(), "fail"),
                ("latest", |s| s.told().config.image = "nginx".into(), "fail"),
                (
                    "young",
                    |s| {
                        s.told();
                        s.declared.images.max_age = Some(Duration::from_secs(90 * 86_400));
                    },
                    "pass",
                ),
                (
                    "old",
                    |s| {
                        s.told();
                        s.declared.images.max_age = Some(Duration::from_secs(86_400));
                    },
                    "fail",
                ),
                (
                    "of no date",
                    |s| {
                        s.told_image().inspect.created.clear();
                        s.declared.images.max_age = Some(Duration::from_secs(1));
                    },
                    "unknown",
                ),
            ],
        );
    }
}
