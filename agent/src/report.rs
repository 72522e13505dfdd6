//! What one look at a host gave, for people and for build pipelines: a table, JSON, SARIF, JUnit. Pure.

use std::fmt::Write as _;

use serde::Serialize;
use serde_json::{Value, json};
use sidewarden_proto::event::Severity;
use sidewarden_proto::finding::{Finding, Verdict};

/// Something that was judged.
#[derive(Clone, Debug, Serialize)]
pub struct Target {
    /// `host`, a container's name, an image's, or a file's.
    pub name: String,
    /// Its image; empty where there is none.
    pub image: String,
    /// The file it was read from, where evidence has lines of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// One finding for each check.
    pub findings: Vec<Finding>,
}

/// How a report looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// Everything.
    Json,
    /// For code hosts.
    Sarif,
    /// For build servers.
    Junit,
}

/// The report on `targets`.
pub fn render(targets: &[Target], format: Format) -> String {
    match format {
        Format::Table => table(targets),
        Format::Json => pretty(&json!({ "targets": targets })),
        Format::Sarif => pretty(&sarif(targets)),
        Format::Junit => junit(targets),
    }
}

/// How many rules are broken with this severity or a worse one.
pub fn broken(targets: &[Target], least: Severity) -> usize {
    let findings = targets.iter().flat_map(|t| &t.findings);
    findings.filter(|f| f.verdict == Verdict::Fail && f.severity >= least).count()
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn why(finding: &Finding) -> String {
    let evidence = || finding.evidence.first().map(|e| format!("{}: {}", e.source, e.line)).unwrap_or_default();
    match &finding.verdict {
        Verdict::Unknown { grant } => format!("needs {grant}"),
        Verdict::NotApplicable { why } => why.clone(),
        Verdict::Waived { by, why, .. } => format!("{why} ({by})"),
        Verdict::Pass | Verdict::Fail => evidence(),
    }
}

fn table(targets: &[Target]) -> String {
    let mut text = String::new();
    for target in targets {
        let of = |word: &str| target.findings.iter().filter(|f| f.verdict.word() == word).count();
        let counts: Vec<String> = Verdict::WORDS.iter().map(|word| format!("{} {word}", of(word))).collect();
        let image = if target.image.is_empty() { String::new() } else { format!(" ({})", target.image) };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}{image}: {}", target.name, counts.join(", "));
        for f in &target.findings {
            let severity = if f.verdict == Verdict::Fail { f.severity.word() } else { "" };
            let word = f.verdict.word();
            let _ = writeln!(text, "  {:<6}{:<26}{word:<16}{severity:<10}{}", f.ids.v1_3_1, f.check, why(f));
        }
        text.push('\n');
    }
    text
}

fn sarif(targets: &[Target]) -> Value {
    let level = |severity: Severity| match severity {
        Severity::Critical => "error",
        Severity::Warning => "warning",
        Severity::Notice | Severity::Info => "note",
    };
    let rule = |check: &crate::cis::Check| {
        json!({
            "id": check.slug,
            "shortDescription": { "text": format!("CIS {}: {}", check.v1_3_1, check.title) },
            "fullDescription": { "text": check.guards_against() },
            "help": { "text": format!("docker run: {}\nCompose: {}\nKubernetes: {}", check.docker_run, check.compose, check.kubernetes) },
            "defaultConfiguration": { "level": level(check.severity) },
        })
    };
    let result = |target: &Target, f: &Finding| {
        json!({
            "ruleId": f.check,
            "level": level(f.severity),
            "message": { "text": format!("{}: {} ({})", target.name, f.title, why(f)) },
            "locations": [location(target, f)],
        })
    };
    let failing = |target: &Target| -> Vec<Value> {
        target.findings.iter().filter(|f| f.verdict == Verdict::Fail).map(|f| result(target, f)).collect()
    };
    json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": {
                "name": "sidewarden-agent",
                "version": env!("CARGO_PKG_VERSION"),
                "rules": crate::cis::CHECKS.iter().map(rule).collect::<Vec<_>>(),
            }},
            "results": targets.iter().flat_map(failing).collect::<Vec<_>>(),
        }],
    })
}

/// A line of a file where there is one: code hosts show the result there.
fn location(target: &Target, finding: &Finding) -> Value {
    let Some(file) = &target.file else {
        return json!({ "logicalLocations": [{ "fullyQualifiedName": target.name, "kind": "resource" }] });
    };
    let line = |source: &str| source.rsplit_once(':').and_then(|(_, line)| line.parse::<u64>().ok());
    let line = finding.evidence.iter().find_map(|e| line(&e.source)).unwrap_or(1);
    json!({ "physicalLocation": { "artifactLocation": { "uri": file }, "region": { "startLine": line } } })
}

fn junit(targets: &[Target]) -> String {
    let mut text = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n");
    for target in targets {
        let failing = target.findings.iter().filter(|f| f.verdict == Verdict::Fail).count();
        let skipped = target.findings.iter().filter(|f| is_skipped(f)).count();
        let name = escaped(&target.name);
        let tests = target.findings.len();
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "  <testsuite name=\"{name}\" tests=\"{tests}\" failures=\"{failing}\" skipped=\"{skipped}\">"
        );
        for f in &target.findings {
            let case = format!("classname=\"{name}\" name=\"{} {}\"", escaped(&f.ids.v1_3_1), escaped(&f.check));
            let inside = match &f.verdict {
                Verdict::Fail => format!("<failure type=\"{}\" message=\"{}\"/>", f.severity, escaped(&why(f))),
                _ if is_skipped(f) => format!("<skipped message=\"{}\"/>", escaped(&why(f))),
                _ => String::new(),
            };
            let _ = writeln!(text, "    <testcase {case}>{inside}</testcase>");
        }
        text.push_str("  </testsuite>\n");
    }
    text.push_str("</testsuites>\n");
    text
}

fn is_skipped(finding: &Finding) -> bool {
    matches!(finding.verdict, Verdict::Unknown { .. } | Verdict::NotApplicable { .. } | Verdict::Waived { .. })
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // XML has no way to write these.
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cis::sample::Sample;

    fn targets() -> Vec<Target> {
        let mut sample = Sample::sound();
        sample.told().host_config.privileged = true;
        vec![Target { name: "a<b>\"\u{1b}".into(), image: "x".into(), file: None, findings: sample.judge_all() }]
    }

    #[test]
    fn what_is_broken_is_counted_from_a_severity_on() {
        assert_eq!(broken(&targets(), Severity::Critical), 3, "privileged, capabilities, seccomp");
        assert!(broken(&targets(), Severity::Info) > 3);
        assert_eq!(broken(&[], Severity::Info), 0);
    }

    #[test]
    fn a_table_has_a_line_for_each_check_and_its_reason() {
        let text = render(&targets(), Format::Table);
        assert!(
            text.lines().any(|l| l.contains("5.4 ") && l.contains("fail") && l.contains("HostConfig.Privileged")),
            "{text}"
        );
        assert_eq!(text.lines().filter(|l| l.starts_with("  ")).count(), crate::cis::CHECKS.len());
    }

    #[test]
    fn sarif_has_every_rule_and_a_result_for_each_failure() {
        let all: Value = serde_json::from_str(&render(&targets(), Format::Sarif)).unwrap();
        let run = &all["runs"][0];
        assert_eq!(run["tool"]["driver"]["rules"].as_array().unwrap().len(), crate::cis::CHECKS.len());
        let results = run["results"].as_array().unwrap();
        assert_eq!(results.len(), broken(&targets(), Severity::Info));
        assert!(results.iter().any(|r| r["ruleId"] == "privileged" && r["level"] == "error"));
    }

    #[test]
    fn what_was_read_from_a_file_stands_on_its_line() {
        let mut target = targets().remove(0);
        target.file = Some("Dockerfile".into());
        target.findings.retain(|finding| finding.check == "privileged");
        target.findings[0].evidence[0].source = "Dockerfile:12".into();
        let all: Value = serde_json::from_str(&render(&[target], Format::Sarif)).unwrap();
        let place = &all["runs"][0]["results"][0]["locations"][0]["physicalLocation"];
        assert_eq!(
            (place["artifactLocation"]["uri"].as_str(), place["region"]["startLine"].as_u64()),
            (Some("Dockerfile"), Some(12))
        );
    }

    #[test]
    fn junit_is_xml_whatever_the_name() {
        let text = render(&targets(), Format::Junit);
        assert!(text.contains("<testsuite name=\"a&lt;b&gt;&quot; \" tests=\"53\""), "{text}");
        assert_eq!(text.matches("<testcase ").count(), text.matches("</testcase>").count());
        assert!(!text.contains('\u{1b}'));
    }

    #[test]
    fn json_has_everything() {
        let all: Value = serde_json::from_str(&render(&targets(), Format::Json)).unwrap();
        assert_eq!(all["targets"][0]["findings"].as_array().unwrap().len(), crate::cis::CHECKS.len());
    }
}
