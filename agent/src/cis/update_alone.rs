//! 4.7: the list of packages is not brought up to date in an instruction of its own, whose layer grows old in the cache.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, Judgement, api, history};

pub const CHECK: Check = Check {
    slug: "update-alone",
    v1_3_1: "4.7",
    v1_6: "4.7",
    title: "no update instruction stands alone",
    severity: Severity::Notice,
    docker_run: "RUN apt-get update && apt-get install …, in one instruction",
    compose: "RUN apt-get update && apt-get install …, in one instruction",
    kubernetes: "RUN apt-get update && apt-get install …, in one instruction",
    judge,
};

/// Commands that fetch the list of packages and install nothing.
const UPDATES: [(&str, &str); 9] = [
    ("apt-get", "update"),
    ("apt", "update"),
    ("aptitude", "update"),
    ("apk", "update"),
    ("yum", "makecache"),
    ("yum", "check-update"),
    ("dnf", "makecache"),
    ("dnf", "check-update"),
    ("zypper", "refresh"),
];
/// What makes use of the list.
const USES: [&str; 8] =
    ["install", "add", "upgrade", "dist-upgrade", "full-upgrade", "build-dep", "download", "source"];

fn judge(case: &Case<'_>) -> Answer {
    let history = history(case)?;
    let alone = |(_, line): &(usize, &str)| updates(line);
    let found = history
        .iter()
        .filter(|l| alone(l))
        .map(|(n, _)| api("history", format!("entry {n}: an update and nothing else")));
    Ok(Judgement::none_of(found.collect(), vec![api("history", format!("{} entries", history.len()))]))
}

/// Whether a list of packages is fetched and not used. Options may stand anywhere.
fn updates(line: &str) -> bool {
    let words: Vec<&str> = line.split_whitespace().filter(|word| !word.starts_with('-')).collect();
    let bare = |word: &str| word.trim_end_matches([';', '&']).to_owned();
    let pair = |pair: &[&str]| {
        UPDATES.iter().any(|(program, command)| pair[0].ends_with(program) && bare(pair[1]) == *command)
    };
    words.windows(2).any(pair) && !words.iter().any(|word| USES.contains(word))
}

#[cfg(test)]
mod tests {
    use super::super::sample::check_rows;
    use super::*;

    #[test]
    fn an_update_by_itself_fails() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("no update", |s| s.asked(), "pass"),
                ("alone", |s| s.told_history("/bin/sh -c apt-get update"), "fail"),
                ("with flags", |s| s.told_history("RUN /bin/sh -c apt-get -qq update # buildkit"), "fail"),
                (
                    "with what it is for",
                    |s| s.told_history("/bin/sh -c apt-get update && apt-get install -y nginx"),
                    "pass",
                ),
                ("apk", |s| s.told_history("RUN /bin/sh -c apk update # buildkit"), "fail"),
                ("no history", |s| s.told_image().history.clear(), "unknown"),
            ],
        );
    }
}
