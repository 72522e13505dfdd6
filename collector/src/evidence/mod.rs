//! Evidence that no agent can see: what scanners found in images, and what people attest and sign.
//!
//! `trivy` reads reports, `attest` what was signed, `folder` takes reports from where a pipeline puts them; here it is
//! decided what a scan says of 4.4. What was taken is an event of the collector's, and the state keeps it.

pub mod attest;
pub mod folder;
pub mod taken;
pub mod trivy;

use std::path::PathBuf;
use std::time::Duration;

use sidewarden_proto::config::Reader;
use sidewarden_proto::event::ContainerRef;
use sidewarden_proto::evidence::{Found, Scan};
use sidewarden_proto::finding::{Evidence, Finding, Verdict};
use sidewarden_proto::time::Timestamp;

pub use attest::Attestor;

/// The check that scans answer.
pub const CHECK: &str = "image-scan";

const DAY: Duration = Duration::from_secs(24 * 3600);

/// What evidence must be like.
#[derive(Clone, Debug)]
pub struct Config {
    /// Vulnerabilities of this severity and above break 4.4.
    pub fail_on: Severity,
    /// Only those count that a newer package mends.
    pub with_fix_only: bool,
    /// A scan that is older proves nothing.
    pub max_age: Duration,
    /// Where a pipeline puts reports; none if not set.
    pub folder: Option<PathBuf>,
    /// Who may attest what nobody can see.
    pub attestors: Vec<Attestor>,
}

/// A severity of a scanner, by its place among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Severity(usize);

impl sidewarden_proto::config::FromValue for Severity {
    fn from_text(text: &str) -> Result<Severity, String> {
        let place = trivy::SEVERITIES.iter().position(|word| *word == text);
        place.map(Severity).ok_or_else(|| format!("must be one of {}, not `{text}`", trivy::SEVERITIES.join(", ")))
    }
}

impl Config {
    /// Reads the section.
    pub fn read(reader: &mut Reader<'_>) -> Config {
        let config = Config {
            fail_on: reader.value("fail_on", Severity(3)),
            with_fix_only: reader.value("with_fix_only", true),
            max_age: reader.value("max_age", 30 * DAY),
            folder: reader.optional::<PathBuf>("folder").filter(|path| !path.as_os_str().is_empty()),
            attestors: reader.list("attestor", attest::read).into_iter().flatten().collect(),
        };
        if config.max_age < DAY {
            reader.fault("max_age", "must be at least 1d: databases of scanners change daily");
        }
        for (i, attestor) in config.attestors.iter().enumerate() {
            if config.attestors[..i].iter().any(|other| other.name == attestor.name) {
                reader.fault(&format!("attestor[{i}].name"), "stands there twice");
            }
        }
        config
    }
}

/// The newest scan of a container's image.
pub fn scan_of<'a>(scans: &'a [Scan], container: &ContainerRef) -> Option<&'a Scan> {
    let of_it = scans.iter().filter(|scan| scan.is_of(&container.image_id, &container.image_digests));
    of_it.max_by_key(|scan| scan.made_us)
}

/// Has a scan answer 4.4 about the image it is of, where nothing else does.
pub fn answer(config: &Config, scan: &Scan, finding: &mut Finding, now: Timestamp) {
    if finding.check != CHECK || !matches!(finding.verdict, Verdict::Unknown { .. }) {
        return;
    }
    let (verdict, evidence) = judge(config, scan, now);
    finding.verdict = verdict;
    finding.evidence = evidence;
}

fn judge(config: &Config, scan: &Scan, now: Timestamp) -> (Verdict, Vec<Evidence>) {
    let line = |line: String| Evidence::new("Trivy", line);
    let age = now.since(scan.made_us);
    let made = line(format!("{} scanned {}: {}", scan.name, scan.made_us, counts(scan)));
    if age > config.max_age {
        let days = |age: Duration| age.as_secs() / DAY.as_secs();
        let old = line(format!("the scan is {} days old; {} are allowed", days(age), days(config.max_age)));
        return (
            Verdict::Unknown { grant: "a newer scan: `sidewarden-collector evidence add`".into() },
            vec![old, made],
        );
    }
    let counted = |found: &Found| if config.with_fix_only { found.fixable } else { found.all };
    let bad: u64 = trivy::SEVERITIES[config.fail_on.0..]
        .iter()
        .filter_map(|word| scan.found.get(*word))
        .map(counted)
        .fold(0, u64::saturating_add);
    let mut evidence = Vec::new();
    if bad > 0 {
        let which = if config.with_fix_only { " that a newer package mends" } else { "" };
        evidence.push(line(format!("{bad} of severity {} or worse{which}", trivy::SEVERITIES[config.fail_on.0])));
        let is_meant = |fixed: &str| !config.with_fix_only || !fixed.is_empty();
        let worst = scan.worst.iter().filter(|v| is_meant(&v.fixed)).take(5);
        evidence.extend(worst.map(|v| {
            let mended = if v.fixed.is_empty() { "no fix yet".to_owned() } else { format!("mended in {}", v.fixed) };
            line(format!("{} {} in {} {}, {mended}", v.severity, v.id, v.package, v.installed))
        }));
    }
    // No patch will come: that nothing can be mended is no comfort.
    if scan.os_ended {
        evidence.push(line(format!("{} has reached its end of life: there are no patches any more", scan.os)));
    }
    let verdict = if evidence.is_empty() { Verdict::Pass } else { Verdict::Fail };
    evidence.push(made);
    (verdict, evidence)
}

fn counts(scan: &Scan) -> String {
    let told: Vec<String> = trivy::SEVERITIES
        .iter()
        .rev()
        .filter_map(|word| Some((word, scan.found.get(*word)?)))
        .map(|(word, found)| format!("{} {word} ({} can be mended)", found.all, found.fixable))
        .collect();
    if told.is_empty() { "no vulnerabilities".to_owned() } else { told.join(", ") }
}

#[cfg(test)]
mod tests {
    use sidewarden_proto::finding::{CisIds, Remedy, Vantage};

    use super::*;

    const NOW: Timestamp = Timestamp::from_secs(1_800_000_000);

    fn config(text: &str) -> Config {
        sidewarden_proto::config::load(text, &|_| None, Config::read).unwrap()
    }

    fn scan(found: &[(&str, u64, u64)]) -> Scan {
        let found =
            found.iter().map(|(word, all, fixable)| ((*word).to_owned(), Found { all: *all, fixable: *fixable }));
        Scan { made_us: NOW.minus(DAY), found: found.collect(), name: "x".into(), ..Scan::default() }
    }

    #[test]
    fn a_scan_is_judged_by_severity_by_whether_it_can_be_mended_and_by_age() {
        /// Settings, what was found, and the verdict.
        type Row = (&'static str, &'static [(&'static str, u64, u64)], &'static str);
        let rows: &[Row] = &[
            ("", &[], "pass"),
            ("", &[("medium", 9, 9)], "pass"),
            ("", &[("high", 9, 0)], "pass"),
            ("", &[("high", 9, 1)], "fail"),
            ("", &[("critical", 1, 1)], "fail"),
            ("with_fix_only = false", &[("high", 1, 0)], "fail"),
            ("fail_on = 'critical'", &[("high", 1, 1)], "pass"),
            ("fail_on = 'low'", &[("low", 1, 1), ("unknown", 1, 1)], "fail"),
            ("fail_on = 'low'", &[("unknown", 1, 1)], "pass"),
            ("max_age = '1d'", &[], "pass"),
        ];
        for (text, found, expected) in rows {
            let (verdict, evidence) = judge(&config(text), &scan(found), NOW);
            assert_eq!(verdict.word(), *expected, "{text} {found:?}: {evidence:?}");
        }
        let old = Scan { made_us: NOW.minus(31 * DAY), ..scan(&[("critical", 1, 1)]) };
        assert_eq!(judge(&config(""), &old, NOW).0.word(), "unknown");
        let ended = Scan { os: "debian 9".into(), os_ended: true, ..scan(&[]) };
        assert_eq!(judge(&config(""), &ended, NOW).0, Verdict::Fail);
    }

    #[test]
    fn a_scan_answers_what_is_unknown_and_nothing_else() {
        let finding = |check: &str, verdict| Finding {
            check: check.into(),
            ids: CisIds::default(),
            title: String::new(),
            severity: sidewarden_proto::event::Severity::Warning,
            verdict,
            evidence: Vec::new(),
            remedy: Remedy::default(),
            vantage: Vantage::Node,
        };
        let unknown = || Verdict::Unknown { grant: "x".into() };
        for (check, verdict, expected) in
            [(CHECK, unknown(), "pass"), (CHECK, Verdict::Fail, "fail"), ("image-health", unknown(), "unknown")]
        {
            let mut finding = finding(check, verdict);
            answer(&config(""), &scan(&[]), &mut finding, NOW);
            assert_eq!(finding.verdict.word(), expected, "{check}");
        }
    }

    #[test]
    fn wrong_settings_are_told() {
        let text = "fail_on = 'bad'\nmax_age = '1h'\n[[attestor]]\nname = 'a'\n";
        let faults = sidewarden_proto::config::load(text, &|_| None, Config::read).unwrap_err().to_string();
        for wanted in ["fail_on", "max_age", "attestor[0].key_file"] {
            assert!(faults.contains(wanted), "{wanted} is missing in {faults}");
        }
    }
}
