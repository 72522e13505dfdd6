//! What people answer for, and what scanners found: the parts of a posture that no agent can see. Data only.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::time::Timestamp;

/// Somebody's word about one check of some workloads: a waiver (it is broken, and may be for a while) or an attestation (it
/// is kept, and nobody but people can see that).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pledge {
    /// The slug of the check.
    pub check: String,
    /// Whom it is about: `shop/orders`, `shop/*`, `*`.
    pub workload: String,
    /// Containers of the host that this workload's node agents judge, by name; may end with `*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// Who answers for it.
    pub by: String,
    /// Why.
    pub why: String,
    /// When it was given.
    #[serde(default)]
    pub at_us: Timestamp,
    /// When it ends.
    pub until_us: Timestamp,
    /// The address it came from.
    #[serde(default)]
    pub source: String,
    /// The name of the key that signed it; empty for one that nobody had to sign.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub key: String,
}

impl Pledge {
    /// Whether both speak of the same: then the later one replaces the other.
    pub fn is_of_same(&self, other: &Pledge) -> bool {
        (&self.check, &self.workload, &self.container) == (&other.check, &other.workload, &other.container)
    }

    /// Whether it is about the workload with this path; `container` is the name of a container that the workload, a node
    /// agent, tells of.
    pub fn is_about(&self, check: &str, workload: &str, container: Option<&str>) -> bool {
        let fits = match (&self.container, container) {
            (None, None) => true,
            (Some(pattern), Some(name)) => covers(pattern, name),
            _ => false,
        };
        fits && self.check == check && covers(&self.workload, workload)
    }

    /// Whether it is in force.
    pub fn holds(&self, now: Timestamp) -> bool {
        now < self.until_us
    }

    /// Whom it is about, in one word.
    pub fn about(&self) -> String {
        match &self.container {
            Some(container) => format!("{}/{container}", self.workload),
            None => self.workload.clone(),
        }
    }
}

/// Whether `pattern`, which may end with `*`, covers `name`.
fn covers(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => pattern == name,
    }
}

/// What a scanner found in an image. Small whatever it found: only the worst is kept by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Scan {
    /// The id of the image (SHA-256 of its configuration), `sha256:…`; empty if the scanner did not say it.
    pub image_id: String,
    /// Digests that registries know it by, `sha256:…`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub digests: Vec<String>,
    /// What it was called when it was scanned.
    pub name: String,
    /// When it was scanned.
    pub made_us: Timestamp,
    /// Its distribution.
    pub os: String,
    /// That distribution has reached its end of life.
    pub os_ended: bool,
    /// Vulnerabilities by severity: `critical`, `high`, `medium`, `low`, `unknown`.
    pub found: BTreeMap<String, Found>,
    /// The worst, those first that can be mended.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub worst: Vec<Vulnerability>,
    /// Secrets found in it; nothing else is kept of them.
    pub secrets: u64,
    /// Who brought it.
    pub by: String,
    /// The address or the file it came from.
    pub source: String,
}

/// How many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// All.
    pub all: u64,
    /// Those that a newer package mends.
    #[serde(default)]
    pub fixable: u64,
}

/// One vulnerability.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Vulnerability {
    /// For example `CVE-2026-1234`.
    pub id: String,
    /// The package.
    pub package: String,
    /// Its version.
    pub installed: String,
    /// The version that mends it; empty if there is none.
    pub fixed: String,
    /// See [`Scan::found`].
    pub severity: String,
}

impl Scan {
    /// Whether it is of the image with this id, or with one of these digests, `name@sha256:…` or `sha256:…`.
    pub fn is_of(&self, image_id: &str, digests: &[String]) -> bool {
        let bare = |name: &String| name.rsplit('@').next().unwrap_or_default().to_owned();
        (!image_id.is_empty() && self.image_id == image_id)
            || digests.iter().map(bare).any(|digest| self.digests.contains(&digest))
    }

    /// Whether both are of the same image.
    pub fn is_of_same(&self, other: &Scan) -> bool {
        self.is_of(&other.image_id, &other.digests)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pledge(workload: &str, container: Option<&str>) -> Pledge {
        Pledge {
            check: "user".into(),
            workload: workload.into(),
            container: container.map(str::to_owned),
            by: "me".into(),
            why: "it must".into(),
            at_us: Timestamp(1),
            until_us: Timestamp(9),
            source: String::new(),
            key: String::new(),
        }
    }

    #[test]
    fn a_pledge_is_about_what_it_names_and_nothing_else() {
        let rows = [
            ("shop/web", None, "user", "shop/web", None, true),
            ("shop/web", None, "users", "shop/web", None, false),
            ("shop/web", None, "user", "shop/web2", None, false),
            ("shop/*", None, "user", "shop/web", None, true),
            ("shop/*", None, "user", "shopping/web", None, false),
            ("*", None, "user", "shop/web", None, true),
            // What is said of a node agent is not said of every container that it tells of.
            ("hosts/a", None, "user", "hosts/a", Some("db"), false),
            ("hosts/a", Some("db*"), "user", "hosts/a", Some("db-1"), true),
            ("hosts/a", Some("db"), "user", "hosts/a", Some("db-1"), false),
            ("hosts/a", Some("db"), "user", "hosts/a", None, false),
        ];
        for (workload, container, check, of, name, expected) in rows {
            assert_eq!(
                pledge(workload, container).is_about(check, of, name),
                expected,
                "{workload} {container:?} {of}"
            );
        }
    }

    #[test]
    fn it_holds_up_to_its_end() {
        let pledge = pledge("*", None);
        assert_eq!([1, 8, 9, 10].map(|at| pledge.holds(Timestamp(at))), [true, true, false, false]);
    }

    #[test]
    fn a_scan_is_of_an_image_by_its_id_or_by_a_digest() {
        let scan = Scan { image_id: "sha256:a".into(), digests: vec!["sha256:b".into()], ..Scan::default() };
        for (id, digests, expected) in [
            ("sha256:a", vec![], true),
            ("sha256:c", vec![], false),
            ("sha256:c", vec!["registry/x@sha256:b".to_owned()], true),
            ("", vec!["sha256:b".to_owned()], true),
            ("", vec!["registry/x@sha256:a".to_owned()], false),
            ("", vec![], false),
        ] {
            assert_eq!(scan.is_of(id, &digests), expected, "{id} {digests:?}");
        }
        assert!(!Scan::default().is_of_same(&Scan::default()), "without a name it is of no image");
    }
}
