//! 4.8: no file of the image gives its caller the rights of its owner.

use super::{Answer, Case, Check, Judgement, Unseen};
use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::Evidence;

pub const CHECK: Check = Check {
    slug: "setuid-files",
    v1_3_1: "4.8",
    v1_6: "4.8",
    title: "the image has no setuid or setgid file",
    severity: Severity::Notice,
    docker_run: "RUN find / -xdev -perm /6000 -type f -exec chmod a-s {} +",
    compose: "RUN find / -xdev -perm /6000 -type f -exec chmod a-s {} +",
    kubernetes: "RUN find / -xdev -perm /6000 -type f -exec chmod a-s {} +",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    let image = case.image()?;
    let (files, source) =
        image.files.needs("a running container of this image, whose files this node agent may read")?;
    let Some(found) = &files.setuid else {
        return Err(Unseen::new("an image of fewer files: not all of them were looked at"));
    };
    let allowed = &case.declared.images.setuid;
    let violations = found.iter().filter(|f| !allowed.contains(f)).map(|f| Evidence::new(source, f)).collect();
    Ok(Judgement::none_of(violations, vec![Evidence::new(source, format!("{} files, all declared", found.len()))]))
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Sample, check_rows};
    use super::*;
    use crate::facts::Seen;
    use crate::facts::engine::ImageFiles;

    fn has(s: &mut Sample, names: Option<&[&str]>) {
        let setuid = names.map(|all| all.iter().map(|n| (*n).to_owned()).collect());
        s.told_image().files = Seen::Known(ImageFiles { setuid, ..ImageFiles::default() }, "files".into());
    }

    #[test]
    fn each_file_is_declared_or_fails() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("not seen", |s| s.asked(), "unknown"),
                ("none", |s| has(s, Some(&[])), "pass"),
                ("su", |s| has(s, Some(&["/bin/su"])), "fail"),
                ("too many files", |s| has(s, None), "unknown"),
                (
                    "declared",
                    |s| {
                        has(s, Some(&["/bin/su"]));
                        s.declared.images.setuid = vec!["/bin/su".into()];
                    },
                    "pass",
                ),
            ],
        );
    }
}
