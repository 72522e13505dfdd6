//! `report` and `score`: the auditor's table, now or at a moment of the past, and how it went over time.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use serde_json::Value;
use sidewarden_collector::client::{self, Client, list, print_json};
use sidewarden_collector::table::table;
use sidewarden_proto::config::FromValue;
use sidewarden_proto::identity::TrustDomain;
use sidewarden_proto::time::Timestamp;

use crate::At;

/// What stands below the command.
pub const HELP: &str = "A moment is a time (2026-11-01T12:00:00Z), a day (its first moment, UTC), or how long ago: 90m, 7d. The past is told as
far as events are kept. The HTML file needs nothing else, runs nothing, and prints well: to PDF, too.

  sidewarden-collector report                                        # the fleet, now
  sidewarden-collector report --workload shop/orders --at 2026-11-01
  sidewarden-collector report --since 7d                             # what changed within a week
  sidewarden-collector report --format html --output report.html";

/// How it looks.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people at a terminal
    Text,
    /// Everything, for programs
    Json,
    /// For spreadsheets: a line for each instance and check
    Csv,
    /// One file that prints well
    Html,
}

/// What is asked for.
#[derive(Args)]
pub struct Wanted {
    /// Whose: shop/orders, or shop/* for every service of shop; the whole fleet if not given
    #[arg(long)]
    workload: Option<String>,
    /// Of that workload only this instance
    #[arg(long, requires = "workload")]
    instance: Option<String>,
    /// The moment to show; now if not given
    #[arg(long, value_name = "MOMENT", value_parser = moment)]
    at: Option<Timestamp>,
    /// A moment before: tells what changed between the two
    #[arg(long, value_name = "MOMENT", value_parser = moment)]
    since: Option<Timestamp>,
    /// The numbering of the benchmark: 1.3.1 or 1.6
    #[arg(long, default_value = "1.3.1", value_name = "VERSION")]
    numbering: String,
    /// How it looks
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// A file to write it to, instead of the terminal
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Of which span of time.
#[derive(Args)]
pub struct Span {
    /// Whose: shop/orders, or shop/* for every service of shop; the whole fleet if not given
    #[arg(long)]
    workload: Option<String>,
    /// The first moment; a week ago if not given
    #[arg(long, value_name = "MOMENT", value_parser = moment)]
    since: Option<Timestamp>,
    /// The last moment; now if not given
    #[arg(long, value_name = "MOMENT", value_parser = moment)]
    until: Option<Timestamp>,
    /// How many moments
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(2..=60))]
    points: u32,
}

/// A time, a day, or how long ago.
fn moment(text: &str) -> Result<Timestamp, String> {
    if let Ok(ago) = Duration::from_text(text) {
        return Ok(Timestamp::now().minus(ago));
    }
    let whole = if text.contains('T') { text.to_owned() } else { format!("{text}T00:00:00Z") };
    whole.parse().map_err(|_| "write a time like 2026-11-01T12:00:00Z, a day, or how long ago: 90m, 7d".to_owned())
}

/// Makes a report.
pub async fn run(client: &Client, wanted: Wanted, at: &At, domain: &TrustDomain) -> anyhow::Result<()> {
    let format = match wanted.format {
        _ if at.json => "json",
        Format::Text => "text",
        Format::Json => "json",
        Format::Csv => "csv",
        Format::Html => "html",
    };
    let mut query = vec![("format", format.to_owned()), ("numbering", wanted.numbering)];
    if let Some(workload) = &wanted.workload {
        query.push(("workload", client::path_in(workload, domain)?));
    }
    query.extend(wanted.instance.map(|instance| ("instance", instance)));
    query.extend(wanted.at.map(|at| ("at", at.0.to_string())));
    query.extend(wanted.since.map(|since| ("since", since.0.to_string())));
    let text = client.ask_text("/api/v1/report", &query).await?;
    let Some(file) = wanted.output else {
        print!("{text}");
        return Ok(());
    };
    // Evidence is for those who asked, not for everybody on the machine.
    let opened = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&file);
    let written = opened.and_then(|mut opened| opened.write_all(text.as_bytes()));
    written.with_context(|| format!("writing {}", file.display()))
}

/// Shows how the score went.
pub async fn score(client: &Client, span: Span, json: bool, domain: &TrustDomain) -> anyhow::Result<()> {
    let mut query = vec![("points", span.points.to_string())];
    if let Some(workload) = &span.workload {
        query.push(("workload", client::path_in(workload, domain)?));
    }
    query.extend(span.since.map(|since| ("since", since.0.to_string())));
    query.extend(span.until.map(|until| ("until", until.0.to_string())));
    let answer = client.ask("/api/v1/report/history", &query).await?;
    if json {
        return print_json(&answer);
    }
    let heads = ["AT", "SCORE", "PASS", "FAIL", "WAIVED", "UNKNOWN", "JUDGED", "NOT KNOWN"];
    print!("{}", table(&heads, list(&answer, "points").iter().map(point)));
    Ok(())
}

fn point(point: &Value) -> Vec<String> {
    let at = point["at_us"].as_i64().map(|us| Timestamp(us).to_string()).unwrap_or_default();
    let score = point["score"].as_f64().map_or_else(|| "-".to_owned(), |score| format!("{score:.1} %"));
    let count = |word: &str| client::text(&point["counts"][word]);
    let counts = ["pass", "fail", "waived", "unknown"].map(count);
    [vec![at, score], counts.to_vec(), vec![client::text(&point["judged"]), client::text(&point["not_known"])]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_a_time_a_day_or_so_long_ago() {
        assert_eq!(moment("2026-11-01").unwrap().to_string(), "2026-11-01T00:00:00.000Z");
        assert_eq!(moment("2026-11-01T12:00:00Z").unwrap().to_string(), "2026-11-01T12:00:00.000Z");
        assert!(moment("7d").unwrap() < Timestamp::now());
        ["", "soon", "2026-13-01", "-1"].iter().for_each(|bad| assert!(moment(bad).is_err(), "{bad}"));
    }
}
