//! Reports as text for a terminal, as CSV for a spreadsheet, and as one HTML file that prints well. Everything in a report
//! may come from a workload: a terminal, a spreadsheet and a browser obey none of it.

use std::fmt::Write as _;

use sidewarden_proto::finding::Evidence;

use super::{Change, Difference, Report, Row, Subject};
use crate::table::{clean, table};

/// For people at a terminal.
pub fn text(report: &Report, since: Option<&Difference>) -> String {
    let mut text = format!("{}\n{}\n\n", heading(report), totals(report));
    if let Some(difference) = since {
        text += &changes_as_text(difference);
    }
    let one = report.subjects.len() == 1;
    let last = if one { "EVIDENCE" } else { "WHOSE" };
    let rows = report.table.iter().map(|row| {
        let more = if one { evidence(row) } else { whose(row) };
        vec![row.reference.clone(), short(&row.description, 72), short(&row.status, 90), short(&more, 120)]
    });
    text += &table(&["REFERENCE", "DESCRIPTION", "STATUS", last], rows);
    if !one {
        for subject in &report.subjects {
            text += &subject_as_text(subject);
        }
    }
    for name in &report.unclear {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "\nNot known: {}: what it told by then is not kept any more.", clean(name));
    }
    text
}

fn heading(report: &Report) -> String {
    let Report { numbering, scope, trust_domain, at_us, .. } = report;
    format!("CIS Docker Benchmark {}, {} of {trust_domain}, at {at_us}", numbering.word(), clean(scope))
}

fn totals(report: &Report) -> String {
    let count = |word: &str| report.counts.get(word).copied().unwrap_or_default();
    let score = report.score.map_or_else(|| "nothing is known".to_owned(), |score| format!("{score:.1} % pass"));
    format!(
        "{score}: {} pass, {} fail, {} waived, {} unknown, {} do not apply; {} judged",
        count("pass"),
        count("fail"),
        count("waived"),
        count("unknown"),
        count("not_applicable"),
        report.judged
    )
}

fn subject_as_text(subject: &Subject) -> String {
    let image = if subject.image.is_empty() { String::new() } else { format!(", {}", clean(&subject.image)) };
    let mut text = format!("\n{} ({}{image})\n", clean(&subject.name), subject.kind);
    let wanted = subject.rows.iter().filter(|row| matches!(row.verdict, "fail" | "waived"));
    let rows: Vec<_> = wanted
        .map(|row| {
            vec![format!("  {}", row.reference), row.check.clone(), short(&row.status, 90), short(&evidence(row), 120)]
        })
        .collect();
    text += &match unlisted(subject) {
        Some(unlisted) => format!("  {unlisted}\n"),
        None if rows.is_empty() => "  nothing fails\n".to_owned(),
        None => table(&["  REFERENCE", "CHECK", "STATUS", "EVIDENCE"], rows),
    };
    text
}

/// Where a report is too large to list the checks of everybody: what there is of this one.
fn unlisted(Subject { name, counts, rows, .. }: &Subject) -> Option<String> {
    let told = counts.iter().filter(|(_, count)| **count > 0).map(|(word, count)| format!("{count} {word}"));
    let told: Vec<String> = told.collect();
    let is_left_out = rows.is_empty() && !told.is_empty();
    let workload = name.split('#').next().unwrap_or(name);
    is_left_out.then(|| format!("{}; too many to list here: ask for {} alone", told.join(", "), clean(workload)))
}

fn changes_as_text(difference: &Difference) -> String {
    let mut text = format!("{} verdicts changed since {}:\n", difference.changes.len(), difference.before.at_us);
    let word = |status: &str| if status.is_empty() { "-".to_owned() } else { short(status, 60) };
    let rows = difference.changes.iter().map(|Change { subject, reference, check, before, after, .. }| {
        vec![subject.clone(), reference.clone(), check.clone(), word(before), word(after)]
    });
    text += &table(&["WHOSE", "REFERENCE", "CHECK", "BEFORE", "AFTER"], rows);
    text.push('\n');
    text
}

fn whose(row: &Row) -> String {
    match row.count.saturating_sub(row.whose.len()) {
        0 => row.whose.join(", "),
        _ if row.whose.is_empty() => String::new(),
        more => format!("{} and {more} more", row.whose.join(", ")),
    }
}

fn evidence(row: &Row) -> String {
    row.evidence.first().map(line).unwrap_or_default()
}

fn line(Evidence { source, line }: &Evidence) -> String {
    if source.is_empty() { line.clone() } else { format!("{source}: {line}") }
}

fn short(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

/// For spreadsheets: a line for each subject and check. What changed, instead, where two moments are compared.
pub fn csv(report: &Report, since: Option<&Difference>) -> String {
    if let Some(difference) = since {
        let heads = ["subject", "reference", "check", "description", "before", "after"].map(str::to_owned);
        let rows = difference
            .changes
            .iter()
            .map(|c| [&c.subject, &c.reference, &c.check, &c.description, &c.before, &c.after].map(Clone::clone));
        return std::iter::once(heads).chain(rows).map(|cells| csv_line(&cells)).collect();
    }
    let heads =
        ["subject", "kind", "reference", "check", "description", "status", "verdict", "severity", "since", "evidence"];
    let mut text = csv_line(&heads.map(str::to_owned));
    for subject in &report.subjects {
        if let Some(unlisted) = unlisted(subject) {
            let mut cells = heads.map(|_| String::new());
            (cells[0], cells[1], cells[9]) = (subject.name.clone(), subject.kind.to_owned(), unlisted);
            text += &csv_line(&cells);
        }
        for row in &subject.rows {
            let evidence = row.evidence.iter().map(line).collect::<Vec<_>>().join(" | ");
            text += &csv_line(&[
                subject.name.clone(),
                subject.kind.to_owned(),
                row.reference.clone(),
                row.check.clone(),
                row.description.clone(),
                row.status.clone(),
                row.verdict.to_owned(),
                row.severity.word().to_owned(),
                row.since_us.to_string(),
                evidence,
            ]);
        }
    }
    text
}

fn csv_line(cells: &[String]) -> String {
    cells.iter().map(|cell| csv_cell(cell)).collect::<Vec<_>>().join(",") + "\r\n"
}

/// Quoted always; what a spreadsheet would take for a formula begins with an apostrophe.
fn csv_cell(cell: &str) -> String {
    let text: String = cell.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let formula = text.trim_start().starts_with(['=', '+', '-', '@']);
    format!("\"{}{}\"", if formula { "'" } else { "" }, text.replace('"', "\"\""))
}

/// Colours only where they say something; on paper no line of a table is cut in two.
const STYLE: &str = "
:root { color-scheme: light; }
body { font: 14px/1.45 system-ui, sans-serif; color: #1b1f24; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.soft, td .soft { color: #59636e; } p { margin: .25rem 0; }
table { border-collapse: collapse; width: 100%; margin: .75rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid #d1d9e0; overflow-wrap: anywhere; }
th { border-bottom: 2px solid #59636e; font-weight: 600; }
td:first-child, th:first-child { white-space: nowrap; }
td ul { margin: 0; padding-left: 1rem; } code { font: 12px/1.4 ui-monospace, monospace; }
.fail { color: #b3261e; font-weight: 600; } .waived { color: #8a4b00; font-weight: 600; } .unknown { color: #59636e; font-weight: 600; }
.pass { color: #1a6b35; } .not_applicable { color: #59636e; }
@page { size: A4 landscape; margin: 14mm; }
@media print {
  body { margin: 0; max-width: none; font-size: 10px; padding: 0; }
  h2 { break-after: avoid; } tr { break-inside: avoid; } thead { display: table-header-group; }
  section.subject { break-before: page; }
}
";

/// One HTML file that needs nothing else and runs nothing; printed, or printed to PDF, each subject begins a page.
pub fn html(report: &Report, since: Option<&Difference>) -> String {
    let title = format!("CIS Docker Benchmark {}: {}", report.numbering.word(), report.scope);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta http-equiv=\"Content-Security-Policy\" \
         content=\"default-src 'none'; style-src 'unsafe-inline'\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>{}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n",
        escaped(&title)
    );
    page += &format!("<h1>{}</h1>\n<p>{}</p>\n", escaped(&title), escaped(&totals(report)));
    page += &format!(
        "<p class=\"soft\">Trust domain {}, as it stood at {}; made {} by Sidewarden {}.</p>\n",
        escaped(&report.trust_domain),
        report.at_us,
        report.made_us,
        env!("CARGO_PKG_VERSION")
    );
    for name in &report.unclear {
        page += &format!(
            "<p class=\"unknown\">Not known: {}: what it told by then is not kept any more.</p>\n",
            escaped(name)
        );
    }
    if let Some(difference) = since {
        page += &changes_as_html(difference);
    }
    page += "<h2>The table</h2>\n";
    page += &html_table(
        &["Reference", "Description", "Status", "Whose"],
        report
            .table
            .iter()
            .map(|row| [row.reference.clone(), row.description.clone(), row.status.clone(), whose(row)])
            .zip(report.table.iter().map(|row| row.verdict)),
    );
    report.subjects.iter().for_each(|subject| page += &subject_as_html(subject));
    page += "</body>\n</html>\n";
    page
}

fn html_table<const N: usize>(heads: &[&str; N], rows: impl Iterator<Item = ([String; N], &'static str)>) -> String {
    let heads: String = heads.iter().map(|head| format!("<th scope=\"col\">{}</th>", escaped(head))).collect();
    let mut text = format!("<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n");
    for (cells, verdict) in rows {
        let cells = cells.iter().enumerate().map(|(i, cell)| {
            let class = if i == 2 { format!(" class=\"{verdict}\"") } else { String::new() };
            format!("<td{class}>{}</td>", escaped(cell))
        });
        text += &format!("<tr>{}</tr>\n", cells.collect::<String>());
    }
    text + "</tbody>\n</table>\n"
}

fn changes_as_html(difference: &Difference) -> String {
    let heads = ["Reference", "Whose", "After", "Before", "Description"];
    let rows = difference.changes.iter().map(|c| {
        let class = c.verdict_after;
        let cells = [&c.reference, &c.subject, &c.after, &c.before, &c.description].map(Clone::clone);
        (cells, class)
    });
    format!("<h2>Changed since {}</h2>\n{}", difference.before.at_us, html_table(&heads, rows))
}

fn subject_as_html(subject: &Subject) -> String {
    let image = if subject.image.is_empty() { String::new() } else { format!(", made from {}", subject.image) };
    let score = subject.score.map_or_else(String::new, |score| format!(", {score:.1} % pass"));
    let left_out =
        unlisted(subject).map_or_else(String::new, |told| format!("<p class=\"unknown\">{}</p>\n", escaped(&told)));
    let mut text = format!(
        "<section class=\"subject\">\n<h2>{}</h2>\n<p class=\"soft\">{}</p>\n{left_out}<table>\n<thead><tr><th scope=\"col\">Reference</th>\
         <th scope=\"col\">Description</th><th scope=\"col\">Status</th><th scope=\"col\">Evidence and remedy</th></tr></thead>\n<tbody>\n",
        escaped(&subject.name),
        escaped(&format!("{}, {}{image}{score}", subject.kind, subject.status)),
    );
    for row in &subject.rows {
        text += &row_as_html(row);
    }
    text + "</tbody>\n</table>\n</section>\n"
}

fn row_as_html(row: &Row) -> String {
    let lines: String = row.evidence.iter().map(|e| format!("<li>{}</li>", escaped(&line(e)))).collect();
    let lines = if lines.is_empty() { lines } else { format!("<ul>{lines}</ul>") };
    let broken = matches!(row.verdict, "fail" | "waived");
    let severity = if broken { format!(" <span class=\"soft\">{}</span>", row.severity.word()) } else { String::new() };
    let ways = [
        ("docker run", &row.remedy.docker_run),
        ("Compose", &row.remedy.compose),
        ("Kubernetes", &row.remedy.kubernetes),
    ];
    let told = ways.iter().filter(|(_, how)| broken && !how.is_empty());
    let told: String =
        told.map(|(way, how)| format!("<p class=\"soft\">{way}: <code>{}</code></p>", escaped(how))).collect();
    format!(
        "<tr><td>{}</td><td>{}<br><span class=\"soft\">{}</span></td><td class=\"{}\">{}{severity}</td><td>{lines}{told}</td></tr>\n",
        escaped(&row.reference),
        escaped(&row.description),
        escaped(&row.check),
        row.verdict,
        escaped(&row.status),
    )
}

/// As text of a document or the value of a quoted attribute.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in clean(&text.replace('\n', "; ")).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}
