//! Reads what `trivy image --format json` writes. The file comes from a build pipeline, and some of it from the packages of
//! an image: whatever is in it, what is kept of it is small, and nothing is held that is not kept.

use std::fmt;
use std::io::Read;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use sidewarden_proto::evidence::{Found, Scan, Vulnerability};
use sidewarden_proto::time::Timestamp;

use crate::table::clean;

/// Largest report, in bytes. One of an image with ten thousand vulnerabilities is smaller.
pub const MAX_REPORT: usize = 64 << 20;
/// Vulnerabilities that are kept by name, the worst.
const MAX_WORST: usize = 10;
/// Names by which one image is known.
const MAX_DIGESTS: usize = 16;
/// Characters that are kept of a text.
const MAX_TEXT: usize = 200;

/// The severities of Trivy, the mildest first.
pub const SEVERITIES: [&str; 5] = ["unknown", "low", "medium", "high", "critical"];

/// Why a report is not taken.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum TrivyError {
    /// It is too large.
    #[error("the report has more than {MAX_REPORT} bytes: write it without --list-all-pkgs")]
    Large,
    /// It is no JSON of the kind.
    #[error("this is no report of `trivy image --format json`: {0}")]
    Unreadable(String),
    /// It names no image.
    #[error("the report names no image (Metadata.ImageID, Metadata.RepoDigests): scan an image, not a file system")]
    NoImage,
    /// It does not say when.
    #[error("the report does not say when it was made (CreatedAt): use Trivy 0.49 or newer")]
    NoTime,
    /// Nothing was searched for what 4.4 asks for.
    #[error("the scan looked at no packages, so that no vulnerability could be found: scan with `--scanners vuln`")]
    NoPackages,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Report {
    #[serde(default)]
    created_at: Text,
    #[serde(default)]
    artifact_name: Text,
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    results: Results,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Metadata {
    #[serde(rename = "OS")]
    os: Os,
    #[serde(rename = "ImageID")]
    image_id: Text,
    repo_digests: Digests,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Os {
    #[serde(rename = "Family")]
    family: Text,
    #[serde(rename = "Name")]
    name: Text,
    #[serde(rename = "EOSL")]
    eosl: bool,
}

/// A text of which only the beginning is kept; `null` is empty.
#[derive(Default)]
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Text, D::Error> {
        struct Short;
        impl Visitor<'_> for Short {
            type Value = Text;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }
            fn visit_str<E>(self, text: &str) -> Result<Text, E> {
                Ok(Text(clean(&text.chars().take(MAX_TEXT).collect::<String>())))
            }
            fn visit_unit<E>(self) -> Result<Text, E> {
                Ok(Text::default())
            }
        }
        d.deserialize_any(Short)
    }
}

/// The first few texts of a list.
#[derive(Default)]
struct Digests(Vec<String>);

impl<'de> Deserialize<'de> for Digests {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Digests, D::Error> {
        struct Few;
        impl<'de> Visitor<'de> for Few {
            type Value = Digests;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of digests")
            }
            fn visit_unit<E>(self) -> Result<Digests, E> {
                Ok(Digests::default())
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Digests, A::Error> {
                let mut kept = Vec::new();
                while let Some(Text(text)) = list.next_element()? {
                    if kept.len() < MAX_DIGESTS {
                        kept.push(text);
                    }
                }
                Ok(Digests(kept))
            }
        }
        d.deserialize_any(Few)
    }
}

/// What all results together say, added up while they are read.
#[derive(Default)]
struct Results {
    found: [Found; SEVERITIES.len()],
    worst: Vec<(usize, Vulnerability)>,
    secrets: u64,
    /// Packages of the system or of a language were looked at, whatever was found.
    packages: bool,
}

impl Results {
    fn add(&mut self, one: RawVulnerability) {
        self.packages = true;
        let rank = SEVERITIES.iter().position(|word| one.severity.0.eq_ignore_ascii_case(word)).unwrap_or(0);
        let found = &mut self.found[rank];
        found.all = found.all.saturating_add(1);
        let is_fixable = !one.fixed_version.0.is_empty();
        found.fixable = found.fixable.saturating_add(u64::from(is_fixable));
        // Of the same severity those that can be mended come first.
        let place = self.worst.partition_point(|(other, kept)| (*other, !kept.fixed.is_empty()) >= (rank, is_fixable));
        if place < MAX_WORST {
            let vulnerability = Vulnerability {
                id: one.vulnerability_id.0,
                package: one.pkg_name.0,
                installed: one.installed_version.0,
                fixed: one.fixed_version.0,
                severity: SEVERITIES[rank].to_owned(),
            };
            self.worst.insert(place, (rank, vulnerability));
            self.worst.truncate(MAX_WORST);
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawVulnerability {
    #[serde(rename = "VulnerabilityID", default)]
    vulnerability_id: Text,
    #[serde(default)]
    pkg_name: Text,
    #[serde(default)]
    installed_version: Text,
    #[serde(default)]
    fixed_version: Text,
    #[serde(default)]
    severity: Text,
}

impl<'de> Deserialize<'de> for Results {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Results, D::Error> {
        let mut results = Results::default();
        d.deserialize_any(ResultList(&mut results))?;
        Ok(results)
    }
}

/// `Results`: a list of tables, or null.
struct ResultList<'a>(&'a mut Results);

impl<'de> Visitor<'de> for ResultList<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of results")
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(OneResult(self.0))?.is_some() {}
        Ok(())
    }
}

/// Results that tell of packages, also where none of them is vulnerable.
const PACKAGES: [&str; 2] = ["os-pkgs", "lang-pkgs"];

/// One of them: its vulnerabilities and secrets are added up, the rest is passed over.
struct OneResult<'a>(&'a mut Results);

impl<'de> serde::de::DeserializeSeed<'de> for OneResult<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for OneResult<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a result")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Text(key)) = map.next_key()? {
            match key.as_str() {
                "Class" => {
                    let Text(class) = map.next_value()?;
                    self.0.packages |= PACKAGES.contains(&class.as_str());
                }
                "Vulnerabilities" => map.next_value_seed(each(|one: RawVulnerability| self.0.add(one)))?,
                "Secrets" => map.next_value_seed(each(|IgnoredAny| self.0.secrets += 1))?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

/// A list, each element handed on and forgotten; or null.
struct EachOf<T, F> {
    each: F,
    of: std::marker::PhantomData<T>,
}

fn each<T, F: FnMut(T)>(each: F) -> EachOf<T, F> {
    EachOf { each, of: std::marker::PhantomData }
}

impl<'de, T: Deserialize<'de>, F: FnMut(T)> serde::de::DeserializeSeed<'de> for EachOf<T, F> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de, T: Deserialize<'de>, F: FnMut(T)> Visitor<'de> for EachOf<T, F> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        while let Some(one) = list.next_element::<T>()? {
            (self.each)(one);
        }
        Ok(())
    }
}

/// Reads a report.
pub fn read(report: impl Read) -> Result<Scan, TrivyError> {
    let mut limited = report.take(MAX_REPORT as u64 + 1);
    let read = serde_json::from_reader::<_, Report>(std::io::BufReader::new(&mut limited));
    if limited.limit() == 0 {
        return Err(TrivyError::Large);
    }
    scan(read.map_err(|error| TrivyError::Unreadable(clean(&error.to_string())))?)
}

fn scan(report: Report) -> Result<Scan, TrivyError> {
    let Report { created_at, artifact_name, metadata, results } = report;
    let image_id = if is_digest(&metadata.image_id.0) { metadata.image_id.0 } else { String::new() };
    let of_digest = |name: &String| name.split_once('@').map(|(_, digest)| digest.to_owned());
    let digests: Vec<String> =
        metadata.repo_digests.0.iter().filter_map(of_digest).filter(|digest| is_digest(digest)).collect();
    if image_id.is_empty() && digests.is_empty() {
        return Err(TrivyError::NoImage);
    }
    if !results.packages {
        return Err(TrivyError::NoPackages);
    }
    let os = format!("{} {}", metadata.os.family.0, metadata.os.name.0).trim().to_owned();
    let found = SEVERITIES.iter().zip(results.found).filter(|(_, found)| found.all > 0);
    Ok(Scan {
        image_id,
        digests,
        name: artifact_name.0,
        made_us: created_at.0.parse::<Timestamp>().map_err(|_| TrivyError::NoTime)?,
        os,
        os_ended: metadata.os.eosl,
        found: found.map(|(word, found)| ((*word).to_owned(), found)).collect(),
        worst: results.worst.into_iter().map(|(_, vulnerability)| vulnerability).collect(),
        secrets: results.secrets,
        by: String::new(),
        source: String::new(),
    })
}

fn is_digest(text: &str) -> bool {
    let hex = text.strip_prefix("sha256:").unwrap_or_default();
    hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const ID: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

    /// As Trivy writes it, shortened.
    pub(crate) const REPORT: &str = r#"{
      "SchemaVersion": 2, "CreatedAt": "2026-11-01T10:00:00.123456789+02:00", "ArtifactName": "shop/orders:1.2",
      "ArtifactType": "container_image",
      "Metadata": {
        "OS": {"Family": "debian", "Name": "12.5"},
        "ImageID": "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "DiffIDs": ["sha256:00"], "RepoTags": ["shop/orders:1.2"],
        "RepoDigests": ["registry.example/shop/orders@sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb", "nonsense"],
        "ImageConfig": {"architecture": "amd64", "created": "2026-10-01T00:00:00Z"}
      },
      "Results": [
        {"Target": "debian", "Class": "os-pkgs", "Type": "debian", "Vulnerabilities": [
          {"VulnerabilityID": "CVE-1", "PkgName": "libc6", "InstalledVersion": "2.36", "Severity": "CRITICAL", "Title": "x"},
          {"VulnerabilityID": "CVE-2", "PkgName": "zlib", "InstalledVersion": "1", "FixedVersion": "2", "Severity": "HIGH"},
          {"VulnerabilityID": "CVE-3", "PkgName": "zlib", "InstalledVersion": "1", "FixedVersion": "2", "Severity": "CRITICAL"},
          {"VulnerabilityID": "CVE-4", "PkgName": "tar", "Severity": "NEGLIGIBLE"}
        ]},
        {"Target": "app", "Class": "lang-pkgs", "Vulnerabilities": null},
        {"Target": "/run.sh", "Class": "secret", "Secrets": [{"RuleID": "aws", "Severity": "CRITICAL"}]}
      ]}"#;

    fn read_text(text: &str) -> Result<Scan, TrivyError> {
        read(text.as_bytes())
    }

    #[test]
    fn a_report_is_counted_by_severity_and_the_worst_that_can_be_mended_comes_first() {
        let scan = read_text(REPORT).unwrap();
        let of = |word: &str| scan.found.get(word).map(|found| (found.all, found.fixable));
        assert_eq!(
            [of("critical"), of("high"), of("unknown"), of("low")],
            [Some((2, 1)), Some((1, 1)), Some((1, 0)), None]
        );
        let worst: Vec<&str> = scan.worst.iter().map(|v| v.id.as_str()).collect();
        assert_eq!(worst, ["CVE-3", "CVE-1", "CVE-2", "CVE-4"]);
        assert_eq!((scan.image_id.as_str(), scan.digests.len(), scan.secrets), (ID, 1, 1));
        assert_eq!((scan.name.as_str(), scan.os.as_str(), scan.os_ended), ("shop/orders:1.2", "debian 12.5", false));
        assert_eq!(scan.made_us.to_string(), "2026-11-01T08:00:00.123Z");
    }

    #[test]
    fn a_report_cut_at_any_byte_is_refused() {
        for end in 0..REPORT.len() {
            assert!(read(&REPORT.as_bytes()[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn what_is_no_report_of_an_image_is_refused() {
        let without = |from: &str, to: &str| REPORT.replace(from, to);
        assert_eq!(read_text("{}"), Err(TrivyError::NoImage));
        assert_eq!(read_text(&without("CreatedAt", "MadeAt")), Err(TrivyError::NoTime));
        let file_system = without("sha256:aaaa", "sha256:zzzz").replace("@sha256:bbbb", "@sha256:zzzz");
        assert_eq!(read_text(&file_system), Err(TrivyError::NoImage));
        let deep = format!(r#"{{"x":{}1{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        for bad in ["", "null", "SQLite format 3\0", "{\"Results\": 7}", "{\"Results\": [[]]}", &deep] {
            assert!(read_text(bad).is_err(), "{}", &bad[..bad.len().min(40)]);
        }
    }

    #[test]
    fn a_scan_that_looked_at_no_packages_is_refused_and_one_that_found_none_vulnerable_is_not() {
        let with = |results: &str| {
            let head = &REPORT[..REPORT.find("\"Results\"").unwrap()];
            read_text(&format!("{head}\"Results\": {results}}}"))
        };
        let head = REPORT[..REPORT.find("\"Results\"").unwrap()].trim_end().trim_end_matches(',');
        assert_eq!(read_text(&format!("{head}}}")), Err(TrivyError::NoPackages));
        for none in ["null", "[]", "[{\"Class\":\"secret\",\"Secrets\":[{}]}]", "[{\"Class\":\"config\"}]"] {
            assert_eq!(with(none), Err(TrivyError::NoPackages), "{none}");
        }
        for searched in ["[{\"Class\":\"os-pkgs\"}]", "[{\"Class\":\"secret\"},{\"Class\":\"lang-pkgs\"}]"] {
            assert_eq!(with(searched).unwrap().found, [].into(), "{searched}");
        }
    }

    #[test]
    fn texts_of_packages_are_cut_and_obeyed_by_no_terminal() {
        let evil = REPORT.replace("CVE-3", &format!("\\u001b[2J{}", "x".repeat(100_000)));
        let scan = read_text(&evil).unwrap();
        assert!(scan.worst[0].id.chars().count() <= MAX_TEXT && !scan.worst[0].id.contains('\u{1b}'));
    }

    /// Text without an end, made while it is read.
    struct Endless {
        head: &'static [u8],
        repeated: &'static [u8],
        at: usize,
        given: u64,
    }

    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let from = |at: usize| {
                *self.head.get(at).unwrap_or_else(|| &self.repeated[(at - self.head.len()) % self.repeated.len()])
            };
            buffer.iter_mut().enumerate().for_each(|(i, byte)| *byte = from(self.at + i));
            self.at += buffer.len();
            self.given += buffer.len() as u64;
            Ok(buffer.len())
        }
    }

    #[test]
    fn a_report_without_an_end_is_given_up_at_the_limit_and_nothing_of_it_is_held() {
        let head = br#"{"Results":[{"Vulnerabilities":["#;
        let mut endless = Endless { head, repeated: br#"{"Severity":"LOW"},"#, at: 0, given: 0 };
        assert_eq!(read(&mut endless), Err(TrivyError::Large));
        assert!(endless.given <= MAX_REPORT as u64 + 2, "{}", endless.given);
    }
}
