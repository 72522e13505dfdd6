//! 4.3: no package is installed that the image does not need.

use super::{Answer, Case, Check, Judgement, Unseen};
use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

pub const CHECK: Check = Check {
    slug: "packages",
    v1_3_1: "4.3",
    v1_6: "4.3",
    title: "no unnecessary package is installed",
    severity: Severity::Notice,
    docker_run: "leave out of the image what is listed under `images.unwanted_packages`",
    compose: "leave out of the image what is listed under `images.unwanted_packages`",
    kubernetes: "leave out of the image what is listed under `images.unwanted_packages`",
    judge,
};

const POLICY: &str = "a list of packages that no image needs: `unwanted_packages = [\"gcc\"]` under `images` in the node agent's configuration";

fn judge(case: &Case<'_>) -> Answer {
    let image = case.image()?;
    let (files, source) =
        image.files.needs("a running container of this image, whose files this node agent may read")?;
    let unread = || Unseen::new("a list of packages of dpkg or apk that is read whole: rpm's is not read");
    if files.packages.is_none() && files.unread_packages {
        return Err(unread());
    }
    let Some(packages) = &files.packages else {
        let evidence = vec![Evidence::new(source, "no list of packages of dpkg or apk")];
        return Ok(Judgement::not_applicable("the image has no package manager's list", evidence));
    };
    let evidence = vec![Evidence::new(source, format!("{} packages", packages.len()))];
    if case.declared.images.unwanted_packages.is_empty() {
        return Err(Unseen::new(POLICY).with(evidence));
    }
    let unwanted = packages.iter().filter(|p| case.declared.images.unwanted_packages.contains(p));
    let unwanted: Vec<Evidence> = unwanted.map(|p| Evidence::new(source, p)).collect();
    if unwanted.is_empty() && files.unread_packages {
        return Err(unread().with(evidence));
    }
    Ok(Judgement::none_of(unwanted, evidence))
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Sample, check_rows};
    use super::*;
    use crate::facts::Seen;
    use crate::facts::engine::ImageFiles;

    fn installed(s: &mut Sample, names: &[&str]) {
        let packages = Some(names.iter().map(|n| (*n).to_owned()).collect());
        s.told_image().files = Seen::Known(ImageFiles { packages, ..ImageFiles::default() }, "dpkg".into());
        s.declared.images.unwanted_packages = vec!["gcc".into()];
    }

    fn unread(s: &mut Sample) {
        let Seen::Known(files, _) = &mut s.told_image().files else { panic!("they are hidden") };
        files.unread_packages = true;
    }

    #[test]
    fn packages_are_held_against_the_list() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("no files to be seen", |s| s.asked(), "unknown"),
                ("none unwanted", |s| installed(s, &["bash", "gcc-base"]), "pass"),
                ("one unwanted", |s| installed(s, &["bash", "gcc"]), "fail"),
                (
                    "no policy",
                    |s| {
                        installed(s, &["gcc"]);
                        s.declared.images.unwanted_packages.clear();
                    },
                    "unknown",
                ),
                (
                    "rpm",
                    |s| {
                        let files = ImageFiles { unread_packages: true, ..ImageFiles::default() };
                        s.told_image().files = Seen::Known(files, "rpm".into());
                    },
                    "unknown",
                ),
                (
                    "rpm's list beside one that is sound",
                    |s| {
                        installed(s, &["bash"]);
                        unread(s);
                    },
                    "unknown",
                ),
                (
                    "rpm's list beside one that is not",
                    |s| {
                        installed(s, &["gcc"]);
                        unread(s);
                    },
                    "fail",
                ),
                (
                    "FROM scratch",
                    |s| s.told_image().files = Seen::Known(ImageFiles::default(), "dpkg".into()),
                    "not_applicable",
                ),
            ],
        );
    }
}
