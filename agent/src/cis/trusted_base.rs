//! 4.2: the image comes from a registry that is trusted, and its base is still looked after.

use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, Judgement, Unseen, api, releases};
use crate::facts::Seen;
use crate::facts::engine::{Image, ImageFiles};

pub const CHECK: Check = Check {
    slug: "trusted-base",
    v1_3_1: "4.2",
    v1_6: "4.2",
    title: "the image has a trusted source and a base that is still maintained",
    severity: Severity::Warning,
    docker_run: "use an image from a registry listed under `images.trusted`, rebuilt on a maintained release",
    compose: "use an image from a registry listed under `images.trusted`, rebuilt on a maintained release",
    kubernetes: "use an image from a registry listed under `images.trusted`, rebuilt on a maintained release",
    judge,
};

const POLICY: &str =
    "a list of trusted sources: `trusted = [\"registry.example/\"]` under `images` in the node agent's configuration";

fn judge(case: &Case<'_>) -> Answer {
    let image = case.image()?;
    let (release, mut evidence) = (judge_release(case, image), Vec::new());
    if let Ok(Some(ended)) = release {
        return Ok(Judgement::fail(vec![ended]));
    }
    evidence.extend(release.err());
    let trusted = &case.declared.images.trusted;
    if trusted.is_empty() {
        return Err(Unseen::new(POLICY).with(evidence));
    }
    let names = image.inspect.repo_digests.iter().chain([&image.inspect.id]);
    match names.clone().find(|name| trusted.iter().any(|t| is_from(name, t))) {
        Some(name) => {
            evidence.insert(0, api("RepoDigests", name));
            Ok(Judgement::pass(evidence))
        }
        None => Ok(Judgement::fail(vec![api("RepoDigests", names.cloned().collect::<Vec<_>>().join(", "))])),
    }
}

/// Evidence that the release has come to its end, or what it is otherwise.
fn judge_release(case: &Case<'_>, image: &Image) -> Result<Option<Evidence>, Evidence> {
    let Seen::Known(ImageFiles { release: Some((id, version)), .. }, source) = &image.files else {
        return Ok(None);
    };
    let line = |told: &str| Evidence::new(source, format!("{id} {version}: {told}"));
    match releases::end_of(id, version) {
        Some(end) if case.now >= end => Ok(Some(line(&format!("its maintenance ended on {}", releases::day(end))))),
        Some(end) => Err(line(&format!("maintained until {}", releases::day(end)))),
        None => Err(line("not in the list of releases")),
    }
}

/// Whether `name` (`registry/name@sha256:…`, `registry/name:tag` or an id) is what `trusted` names: a digest, a whole name,
/// or a beginning that ends with a slash.
fn is_from(name: &str, trusted: &str) -> bool {
    let (repository, digest) = match name.split_once('@') {
        Some((repository, digest)) => (without_tag(repository), digest),
        None if name.starts_with("sha256:") => ("", name),
        None => (without_tag(name), ""),
    };
    // Docker's own registry is not spelt out in names.
    let full = match repository.split('/').next() {
        Some(first) if first.contains(['.', ':']) || first == "localhost" => repository.to_owned(),
        _ if repository.contains('/') => format!("docker.io/{repository}"),
        _ => format!("docker.io/library/{repository}"),
    };
    let has = |name: &str| if trusted.ends_with('/') { name.starts_with(trusted) } else { name == trusted };
    let is_whole = !trusted.is_empty() && (trusted == digest || trusted == name);
    is_whole || (!repository.is_empty() && (has(repository) || has(&full)))
}

/// The part behind the last colon is a tag, unless it is a registry's port.
fn without_tag(name: &str) -> &str {
    name.rsplit_once(':').filter(|(_, tag)| !tag.contains('/')).map_or(name, |(repository, _)| repository)
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Sample, check_rows};
    use super::*;

    fn trust(s: &mut Sample, names: &[&str]) {
        s.told();
        s.declared.images.trusted = names.iter().map(|n| (*n).to_owned()).collect();
    }

    fn release(s: &mut Sample, id: &str, version: &str) {
        let files = ImageFiles { release: Some((id.into(), version.into())), ..ImageFiles::default() };
        s.told_image().files = Seen::Known(files, "etc/os-release".into());
    }

    #[test]
    fn a_source_in_the_list_and_a_release_with_a_future_pass() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("no policy", |s| s.asked(), "unknown"),
                ("the registry", |s| trust(s, &["registry.example/"]), "pass"),
                ("another registry that begins alike", |s| trust(s, &["registry.exam"]), "fail"),
                ("the name", |s| trust(s, &["registry.example/shop/orders"]), "pass"),
                ("the digest", |s| trust(s, &["sha256:aa"]), "pass"),
                ("another", |s| trust(s, &["docker.io/"]), "fail"),
                ("an old Debian fails without any policy", |s| release(s, "debian", "9"), "fail"),
                (
                    "an old Alpine, point release and all",
                    |s| {
                        trust(s, &["registry.example/"]);
                        release(s, "alpine", "3.12.4");
                    },
                    "fail",
                ),
                (
                    "a maintained one",
                    |s| {
                        trust(s, &["registry.example/"]);
                        release(s, "debian", "13");
                    },
                    "pass",
                ),
            ],
        );
    }

    #[test]
    fn names_of_dockers_own_registry_are_spelt_out() {
        let rows = [
            ("nginx@sha256:1", "docker.io/library/", true),
            ("bitnami/redis@sha256:1", "docker.io/bitnami/", true),
            ("bitnami/redis@sha256:1", "docker.io/library/", false),
            ("localhost:5000/x@sha256:1", "docker.io/", false),
            ("evil.example/docker.io/library/nginx@sha256:1", "docker.io/", false),
            ("nginx:1.27@sha256:1", "docker.io/library/nginx", true),
            ("registry.example:5000/x:1", "registry.example:5000/x", true),
            ("registry.example:5000/x", "registry.example:5000/", true),
            ("sha256:ab", "docker.io/library/", false),
            ("sha256:ab", "sha256:ab", true),
            ("nginx:1", "", false),
        ];
        for (name, trusted, expected) in rows {
            assert_eq!(is_from(name, trusted), expected, "{name} {trusted}");
        }
    }
}
