//! 4.6: the image says how its health is checked.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, Judgement, api};

pub const CHECK: Check = Check {
    slug: "image-health",
    v1_3_1: "4.6",
    v1_6: "4.6",
    title: "the image has a HEALTHCHECK",
    severity: Severity::Notice,
    docker_run: "add HEALTHCHECK to the Dockerfile",
    compose: "add HEALTHCHECK to the Dockerfile",
    kubernetes: "add HEALTHCHECK to the Dockerfile",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    let image = case.image()?;
    let check = image.inspect.config.healthcheck.as_ref().filter(|check| check.is_on());
    Ok(match check {
        Some(check) => {
            Judgement::pass(vec![api("image: Config.Healthcheck", check.test.first().cloned().unwrap_or_default())])
        }
        None => Judgement::fail(vec![api("image: Config.Healthcheck", "none")]),
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample::check_rows;
    use super::*;

    #[test]
    fn only_a_check_that_checks_passes() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("one", |s| s.asked(), "pass"),
                ("none", |s| s.told_image().inspect.config.healthcheck = None, "fail"),
                (
                    "switched off",
                    |s| s.told_image().inspect.config.healthcheck.as_mut().unwrap().test = vec!["NONE".into()],
                    "fail",
                ),
                ("empty", |s| s.told_image().inspect.config.healthcheck.as_mut().unwrap().test.clear(), "fail"),
            ],
        );
    }
}
