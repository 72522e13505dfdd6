//! 4.10: no secret stands in the image: not in its history, environment or labels. Where it is, is told; what it is, is not.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, Judgement, api, secrets};

pub const CHECK: Check = Check {
    slug: "image-secrets",
    v1_3_1: "4.10",
    v1_6: "4.10",
    title: "no secret is in the image",
    severity: Severity::Critical,
    docker_run: "pass secrets when the container runs (docker secret, a mounted file), rebuild the image, and replace the secret",
    compose: "pass secrets when the container runs (docker secret, a mounted file), rebuild the image, and replace the secret",
    kubernetes: "pass secrets when the container runs (docker secret, a mounted file), rebuild the image, and replace the secret",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    let (told, _) = case.told()?;
    let image = case.image()?;
    let mut found = Vec::new();
    let mut look = |place: &str, name: &str, value: &str| {
        if let Some(kind) = secrets::in_value(name, value) {
            found.push(api(place, format!("{}: {kind}", crate::watch::plain(name))));
        }
    };
    for (place, env) in [("image: Config.Env", &image.inspect.config.env), ("Config.Env", &told.inspect.config.env)] {
        for (name, value) in env.iter().filter_map(|line| line.split_once('=')) {
            look(place, name, value);
        }
    }
    image.inspect.config.labels.iter().for_each(|(name, value)| look("image: Config.Labels", name, value));
    for (n, layer) in (1..).zip(image.history.iter().rev()) {
        found.extend(secrets::in_text(&layer.created_by).map(|kind| api("history", format!("entry {n}: {kind}"))));
    }
    found.dedup();
    let looked = format!("{} variables and {} entries of history", told.inspect.config.env.len(), image.history.len());
    Ok(Judgement::none_of(found, vec![api("image", looked)]))
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Sample, check_rows};
    use super::*;

    fn env(s: &mut Sample, line: &str) {
        s.told_image().inspect.config.env = vec![line.into()];
    }

    #[test]
    fn secrets_are_found_wherever_they_stand() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("none", |s| s.asked(), "pass"),
                ("a password in the environment", |s| env(s, "DB_PASSWORD=hunter2"), "fail"),
                ("where the password is", |s| env(s, "DB_PASSWORD_FILE=/run/secrets/db"), "pass"),
                ("given to the container", |s| s.told().config.env = vec!["API_TOKEN=abcdef123456".into()], "fail"),
                ("an access key in the history", |s| s.told_history("ENV X=AKIAIOSFODNN7EXAMPLE"), "fail"),
                ("a private key in a label", |s| s.told_label("note", "-----BEGIN EC PRIVATE KEY-----"), "fail"),
                ("a password in a URL", |s| s.told_history("RUN git clone https://me:s3cr3tpw@git.example/x"), "fail"),
            ],
        );
    }

    #[test]
    fn what_the_secret_is_never_gets_out() {
        let mut sample = Sample::sound();
        env(&mut sample, "DB_PASSWORD=hunter2-correct-horse");
        let text = serde_json::to_string(&sample.judge_all()).unwrap();
        assert!(text.contains("DB_PASSWORD: a value"), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
}
