//! A check in full, for people who have never seen it: what it guards against, and how to mend it.

use std::fmt::Write as _;

use sidewarden_proto::guards;

use super::{CHECKS, Check};

impl Check {
    /// What the rule guards against.
    pub fn guards_against(&self) -> &'static str {
        guards::guards_against(self.slug).unwrap_or_default()
    }
}

/// What a person wants to know of the check `slug`; an error names the nearest ones.
pub fn explain(slug: &str) -> Result<String, String> {
    let wanted = |c: &&Check| c.slug == slug || c.v1_3_1 == slug;
    let Some(check) = CHECKS.iter().find(wanted) else {
        let near: Vec<&str> = CHECKS.iter().map(|c| c.slug).filter(|s| s.contains(slug) || slug.contains(s)).collect();
        let near = if near.is_empty() { String::new() } else { format!(": did you mean {}?", near.join(", ")) };
        return Err(format!("there is no check `{slug}`{near} `sidewarden-agent checks` lists them all"));
    };
    let mut text = format!("{}: {}\n", check.slug, check.title);
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "CIS Docker Benchmark {} (1.2 and 1.3.1), {} (1.6); {}\n",
        check.v1_3_1, check.v1_6, check.severity
    );
    let _ = writeln!(text, "{}\n", check.guards_against());
    for (way, lines) in [("docker run", check.docker_run), ("Compose", check.compose), ("Kubernetes", check.kubernetes)]
    {
        let _ = writeln!(text, "{way:<12}{lines}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_is_explained_and_nothing_else() {
        for check in CHECKS {
            assert!(check.guards_against().len() > 40, "{}", check.slug);
        }
        // Of a failure that is no rule of the benchmark, too.
        for (slug, _) in guards::GUARDS.iter().filter(|(slug, _)| *slug != "insecure-trust-all") {
            assert!(CHECKS.iter().any(|c| c.slug == *slug), "{slug}");
        }
    }

    #[test]
    fn a_check_is_explained_by_slug_or_number() {
        let text = explain("docker-socket").unwrap();
        for part in ["5.31", "5.32", "critical", "root on the host", "docker run", "Compose", "Kubernetes"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(explain("5.31"), Ok(text));
        assert!(explain("socket").unwrap_err().contains("did you mean docker-socket"));
    }
}
