//! 4.11: what is installed was verified. That it was not can be seen; that it was has to be attested.

use sidewarden_proto::event::Severity;

use super::attested::GRANT;
use super::{Answer, Case, Check, Judgement, Unseen, api, history};

pub const CHECK: Check = Check {
    slug: "verified-packages",
    v1_3_1: "4.11",
    v1_6: "4.11",
    title: "only verified packages are installed",
    severity: Severity::Notice,
    docker_run: "remove flags that switch verification off, install from signed repositories, and attest it",
    compose: "remove flags that switch verification off, install from signed repositories, and attest it",
    kubernetes: "remove flags that switch verification off, install from signed repositories, and attest it",
    judge,
};

/// Words by which verification is switched off.
const UNVERIFIED: [&str; 12] = [
    "--allow-unauthenticated",
    "--force-yes",
    "--no-gpg-check",
    "--nogpgcheck",
    "--allow-untrusted",
    "trusted=yes",
    "AllowUnauthenticated=true",
    "allow-insecure=yes",
    "gpgcheck=0",
    "--trusted-host",
    "--no-check-certificate",
    "strict-ssl false",
];

fn judge(case: &Case<'_>) -> Answer {
    let history = history(case)?;
    let mut found = Vec::new();
    for (n, line) in &history {
        let words = UNVERIFIED.iter().filter(|word| line.contains(*word));
        found.extend(words.map(|word| api("history", format!("entry {n}: {word}"))));
        if pipes_into_shell(line) {
            found.push(api("history", format!("entry {n}: what was fetched is run unseen")));
        }
    }
    if found.is_empty() { Err(Unseen::new(GRANT)) } else { Ok(Judgement::fail(found)) }
}

/// `curl … | sh`
fn pipes_into_shell(line: &str) -> bool {
    let fetches = line.contains("curl ") || line.contains("wget ");
    let shells = ["sh", "bash", "ash", "dash", "python", "python3", "sudo"];
    fetches
        && line
            .split('|')
            .skip(1)
            .any(|to| to.split_whitespace().next().is_some_and(|p| shells.contains(&p.rsplit('/').next().unwrap_or(p))))
}

#[cfg(test)]
mod tests {
    use super::super::sample::check_rows;
    use super::*;

    #[test]
    fn what_was_not_verified_fails_and_the_rest_has_to_be_attested() {
        check_rows(
            &CHECK,
            &[
                ("without the API", |_| (), "unknown"),
                ("nothing to be seen", |s| s.asked(), "unknown"),
                (
                    "attested",
                    |s| {
                        s.told();
                        s.attest(CHECK.slug, true);
                    },
                    "pass",
                ),
                ("unauthenticated", |s| s.told_history("RUN apt-get install --allow-unauthenticated x"), "fail"),
                (
                    "attested all the same",
                    |s| {
                        s.told_history("RUN apk add --allow-untrusted x");
                        s.attest(CHECK.slug, true);
                    },
                    "fail",
                ),
                ("piped", |s| s.told_history("RUN /bin/sh -c curl -s https://x | bash -s # buildkit"), "fail"),
            ],
        );
    }
}
