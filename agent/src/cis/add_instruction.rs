//! 4.9: files come into the image by COPY. ADD also fetches from the network and unpacks archives.

use sidewarden_proto::event::Severity;

use super::{Answer, Case, Check, Judgement, api, history};

pub const CHECK: Check = Check {
    slug: "add-instruction",
    v1_3_1: "4.9",
    v1_6: "4.9",
    title: "COPY is used instead of ADD",
    severity: Severity::Notice,
    docker_run: "use COPY instead of ADD in the Dockerfile",
    compose: "use COPY instead of ADD in the Dockerfile",
    kubernetes: "use COPY instead of ADD in the Dockerfile",
    judge,
};

fn judge(case: &Case<'_>) -> Answer {
    let history = history(case)?;
    // The very first layer is how a base image comes by its files; there is no other way to make one.
    let above = history.iter().filter(|(n, _)| *n > 1);
    let adds = above.filter(|(_, line)| is_add(line)).map(|(n, _)| api("history", format!("entry {n}: ADD")));
    Ok(Judgement::none_of(
        adds.collect(),
        vec![api("history", format!("{} entries, no ADD above the base", history.len()))],
    ))
}

/// `/bin/sh -c #(nop) ADD file:… in /` of the old builder, `ADD . /srv # buildkit` of the new one.
fn is_add(line: &str) -> bool {
    let bare =
        line.trim_start().trim_start_matches("/bin/sh -c").trim_start().trim_start_matches("#(nop)").trim_start();
    bare.get(..4).is_some_and(|word| word.eq_ignore_ascii_case("add "))
}

#[cfg(test)]
mod tests {
    use super::super::sample::check_rows;
    use super::*;

    #[test]
    fn an_add_above_the_base_fails() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("the base's own", |s| s.asked(), "pass"),
                ("the old builder's", |s| s.told_history("/bin/sh -c #(nop) ADD file:ab in /srv "), "fail"),
                ("the new builder's", |s| s.told_history("ADD https://example.org/x /x # buildkit"), "fail"),
                ("a program of that name", |s| s.told_history("RUN /bin/sh -c adduser app # buildkit"), "pass"),
                ("COPY", |s| s.told_history("COPY a /b # buildkit"), "pass"),
                ("no history", |s| s.told_image().history.clear(), "unknown"),
            ],
        );
    }
}
