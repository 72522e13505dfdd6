//! `policy`: what all agents go by, beside their own settings.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use sidewarden_collector::client::{Client, list, print_json, text};
use sidewarden_collector::fleet;
use sidewarden_collector::table::{clean, table};
use sidewarden_proto::identity::TrustDomain;
use sidewarden_proto::policy::connections::Listener;
use sidewarden_proto::policy::egress::{Host, Target};
use sidewarden_proto::policy::gate::Seen;
use sidewarden_proto::policy::trial::{Case, Outcome, Somebody, Tried};
use sidewarden_proto::policy::{Happening, Policy, difference};
use sidewarden_proto::time::Timestamp;

use super::{confirm, me};
use crate::At;

const ROUTE: &str = "/api/v1/policy";

/// What stands below the commands.
pub const HELP: &str =
    "A policy is one TOML file. What it says holds beside the agents' own settings: both must allow a connection.

  [[allow]]                            # with the first one, what none of them covers is refused, everywhere
  from = [\"shop/web\", \"dns:api.partner.example\"]   # shop/*, *, spiffe://other.domain/shop/*, anybody
  to = [\"shop/orders\"]                 # the same words
  listeners = [8443]                   # only at these ports or server_names of `to`, whose agent looks at them; all, if left out

  [[deny]]                             # goes before every [[allow]]
  from = [\"shop/legacy\"]
  to = [\"*\"]

  [[egress]]                           # with the first one, what none of them covers is refused, everywhere
  from = [\"shop/*\"]
  to = [\"api.example.com:443\", \"10.0.0.0/8:5432\"]   # as in egress.allow of an agent

  [[gate]]                             # what a workload must keep to stay on the data plane
  name = \"no-way-out\"
  workloads = [\"shop/*\"]             # all, if left out
  checks = [\"privileged\", \"docker-socket\"]    # must not fail, waived or not; `unknown` changes nothing
  events = [\"privileged_exec\"]       # must not happen: privileged_exec, root_exec, exec, shell
  hold = \"10m\"                       # let in again once all was well for so long
  enforce = false                      # only tells, until this is true
  max_per_workload = 1                 # most instances of a workload that are quarantined at a time
  leave = 1                            # connected instances of a workload that are let be
  unreachable = \"quarantine\"         # an agent without collector: quarantine, or keep

`anybody` covers those without a proven name, too: plaintext where an agent has `permissive`, peers where it has
`insecure_trust_all`.";

/// What can be done.
#[derive(Subcommand)]
pub enum Command {
    /// Read a policy and report every fault with its line; needs no collector
    Check {
        /// The document
        file: PathBuf,
    },
    /// The policy in force, and which agents run it
    Show {
        /// An earlier version
        #[arg(long, value_name = "N")]
        version: Option<u64>,
        #[command(flatten)]
        at: At,
    },
    /// Every policy so far: when, by whom, and why
    History {
        #[command(flatten)]
        at: At,
    },
    /// What a policy would change: its lines, and whom of those seen talking to each other it would cut off
    Diff {
        /// The document
        file: PathBuf,
        /// Compare with this document rather than with the policy in force; needs no collector
        #[arg(long, value_name = "FILE")]
        with: Option<PathBuf>,
        #[command(flatten)]
        at: At,
    },
    /// Would it be allowed, and by which line; exit code 1 if not. Agents' own settings must allow it, too
    #[command(subcommand)]
    Test(Test),
    /// Put a policy in force
    Apply {
        /// The document
        file: PathBuf,
        /// Why; kept in the event
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Do it though some agents are too old for it
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        at: At,
    },
    /// Put an earlier policy in force again, as a new version
    Rollback {
        /// Which; the one before the one in force, if left out
        version: Option<u64>,
        /// Why; kept in the event
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Do it though some agents are too old for it
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        at: At,
    },
}

/// A case to try.
#[derive(Subcommand)]
pub enum Test {
    /// Somebody calls a service
    Connection {
        /// Who calls: shop/web, spiffe://…, dns:api.example, unproven
        from: String,
        /// Who is called, likewise
        to: String,
        /// At which port or server_name of it
        #[arg(long, value_name = "LISTENER")]
        listener: Option<Listener>,
        #[command(flatten)]
        of: Of,
    },
    /// A workload goes to a place that is no peer
    Egress {
        /// Which workload
        from: String,
        /// Where to: api.example.com:443
        target: String,
        /// What its name leads to
        #[arg(long, value_name = "IP")]
        address: Option<std::net::IpAddr>,
        #[command(flatten)]
        of: Of,
    },
    /// A check has a verdict: does a gate take the workload off the data plane?
    Verdict {
        /// Which workload
        workload: String,
        /// The check: privileged
        check: String,
        /// fail, pass or unknown
        #[arg(value_parser = verdict)]
        verdict: Seen,
        #[command(flatten)]
        of: Of,
    },
    /// Something happens: does a gate take the workload off the data plane?
    Event {
        /// Which workload
        workload: String,
        /// privileged_exec, root_exec, exec or shell
        #[arg(value_parser = happening)]
        event: Happening,
        #[command(flatten)]
        of: Of,
    },
}

/// Which policy is tried.
#[derive(Args)]
pub struct Of {
    /// This document rather than the policy in force; needs no collector
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    at: At,
}

fn verdict(text: &str) -> Result<Seen, String> {
    match text {
        "fail" => Ok(Seen::Broken),
        "pass" => Ok(Seen::Kept),
        "unknown" => Ok(Seen::Unclear),
        _ => Err("must be fail, pass or unknown".into()),
    }
}

fn happening(text: &str) -> Result<Happening, String> {
    let known = Happening::ALL.map(Happening::word).join(", ");
    Happening::ALL.into_iter().find(|what| what.word() == text).ok_or_else(|| format!("must be one of {known}"))
}

impl Test {
    fn of(&self) -> &Of {
        match self {
            Test::Connection { of, .. }
            | Test::Egress { of, .. }
            | Test::Verdict { of, .. }
            | Test::Event { of, .. } => of,
        }
    }

    fn case(&self, domain: &TrustDomain) -> anyhow::Result<Case> {
        let workload = |name: &str| sidewarden_collector::client::workload(name, domain);
        let somebody = |name: &str| Somebody::parse(name, domain).map_err(anyhow::Error::msg);
        Ok(match self {
            Test::Connection { from, to, listener, .. } => {
                Case::Connection { from: somebody(from)?, to: somebody(to)?, listener: listener.clone() }
            }
            Test::Egress { from, target, address, .. } => {
                Case::Egress { from: workload(from)?, target: place(target)?, address: *address }
            }
            Test::Verdict { workload: name, check, verdict, .. } => {
                Case::Verdict { workload: workload(name)?, check: check.clone(), seen: *verdict }
            }
            Test::Event { workload: name, event, .. } => Case::Event { workload: workload(name)?, what: *event },
        })
    }
}

fn place(text: &str) -> anyhow::Result<Target> {
    let wrong = || format!("`{text}` is no place: write api.example.com:443 or [2001:db8::1]:443");
    let (host, port) = text.rsplit_once(':').with_context(wrong)?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let host = Host::parse(host).map_err(anyhow::Error::msg)?;
    Ok(Target { host, port: port.parse().ok().filter(|port| *port != 0).with_context(wrong)? })
}

impl Command {
    /// Where the API is, if it is asked.
    pub fn at(&self) -> Option<&At> {
        match self {
            Command::Check { .. } | Command::Diff { with: Some(_), .. } => None,
            Command::Test(test) if test.of().file.is_some() => None,
            Command::Test(test) => Some(&test.of().at),
            Command::Show { at, .. }
            | Command::History { at }
            | Command::Diff { at, .. }
            | Command::Apply { at, .. }
            | Command::Rollback { at, .. } => Some(at),
        }
    }
}

/// Does it.
pub async fn run(client: Option<&Client>, command: Command, domain: &TrustDomain) -> anyhow::Result<()> {
    let asked = || client.context("the API is not known");
    match command {
        Command::Check { file } => {
            let document = read(&file)?.0;
            let wrong = |faults| anyhow::anyhow!("{}: {faults}", file.display());
            let policy = fleet::read(&document).map_err(wrong)?;
            println!("The policy has no faults: {}.", contents(&policy));
            Ok(())
        }
        Command::Show { version, at } => show(asked()?, version, at.json).await,
        Command::History { at } => history(asked()?, at.json).await,
        Command::Diff { file, with: Some(old), .. } => {
            let changes = difference::between(&read(&old)?.1, &read(&file)?.1);
            let lines = changes.iter().map(|change| (change.kind.sign().to_string(), change.line, change.text.clone()));
            print_changes(lines);
            Ok(())
        }
        Command::Diff { file, with: None, at } => diff(asked()?, &file, at.json).await,
        Command::Test(test) => {
            let document = match &test.of().file {
                Some(file) => read(file)?.0,
                None => text(&asked()?.ask(ROUTE, &[]).await?["text"]),
            };
            let policy = Policy::parse(&document)?;
            tell(&policy.try_case(&test.case(domain)?, domain), &document, test.of().at.json)
        }
        Command::Apply { file, reason, yes, at } => {
            let document = read(&file)?.0;
            let body = json!({"text": document, "why": reason, "by": me(), "confirmed": yes});
            put_in_force(asked()?, "apply", &body, at.json).await
        }
        Command::Rollback { version, reason, yes, at } => {
            let body = json!({"version": version, "why": reason, "by": me(), "confirmed": yes});
            put_in_force(asked()?, "rollback", &body, at.json).await
        }
    }
}

fn contents(policy: &Policy) -> String {
    let counts = [
        (policy.allow.len(), "[[allow]]"),
        (policy.deny.len(), "[[deny]]"),
        (policy.egress.len(), "[[egress]]"),
        (policy.gates.len(), "[[gate]]"),
    ];
    counts.map(|(count, what)| format!("{count} {what}")).join(", ")
}

async fn show(client: &Client, version: Option<u64>, json: bool) -> anyhow::Result<()> {
    let query: Vec<(&'static str, String)> = version.iter().map(|version| ("version", version.to_string())).collect();
    let answer = client.ask(ROUTE, &query).await?;
    if json {
        return print_json(&answer);
    }
    let (shown, in_force) = (text(&answer["version"]), text(&answer["in_force"]));
    print!("{}", text(&answer["text"]));
    if shown != in_force {
        eprintln!("Policy {shown}; {in_force} is in force.");
        return Ok(());
    }
    eprintln!("Policy {shown}.");
    confirm(client, ROUTE, answer["reach"]["version"].as_u64().unwrap_or_default()).await
}

async fn history(client: &Client, json: bool) -> anyhow::Result<()> {
    let answer = client.ask(&format!("{ROUTE}/history"), &[]).await?;
    if json {
        return print_json(&answer);
    }
    let row = |kept: &Value| {
        let again = kept["restores"].as_u64().map_or_else(String::new, |old| format!("{old} again: "));
        let mark = if kept["in_force"] == true { "in force" } else { "" };
        let at = kept["at_us"].as_i64().map(|us| Timestamp(us).to_string()).unwrap_or_default();
        vec![text(&kept["version"]), mark.to_owned(), at, text(&kept["by"]), format!("{again}{}", text(&kept["why"]))]
    };
    print!("{}", table(&["POLICY", "", "SINCE", "BY", "WHY"], list(&answer, "policies").iter().map(row)));
    Ok(())
}

async fn diff(client: &Client, file: &Path, json: bool) -> anyhow::Result<()> {
    let document = read(file)?.0;
    let answer = client.tell(&format!("{ROUTE}/compare"), &json!({"text": document})).await?;
    if json {
        return print_json(&answer);
    }
    let line =
        |change: &Value| (text(&change["sign"]), change["line"].as_u64().unwrap_or(0) as usize, text(&change["text"]));
    print_changes(list(&answer, "changes").iter().map(line));
    let hits = list(&answer, "would_end");
    println!("Of {} pairs that were seen, {} would be cut off.", text(&answer["seen"]), hits.len());
    let row = |hit: &Value| {
        let last = hit["last_us"].as_i64().map(|us| Timestamp(us).to_string()).unwrap_or_default();
        let line =
            hit["line"].as_u64().filter(|line| *line > 0).map_or("none allows it".into(), |line| line.to_string());
        vec![text(&hit["workload"]), text(&hit["direction"]), text(&hit["peer"]), last, line]
    };
    if !hits.is_empty() {
        print!("{}", table(&["WORKLOAD", "WAY", "PEER", "LAST SEEN", "LINE"], hits.iter().map(row)));
    }
    if let Some(more) = answer["more"].as_u64().filter(|more| *more > 0) {
        println!("and {more} more");
    }
    if let Some(depends) = answer["depends"].as_u64().filter(|depends| *depends > 0) {
        println!("Of {depends} others it depends on the listener, which is not known of what was seen.");
    }
    Ok(())
}

fn print_changes(changes: impl Iterator<Item = (String, usize, String)>) {
    let mut none = true;
    for (sign, line, text) in changes {
        none = false;
        let line = if line == 0 { String::new() } else { format!("line {line}: ") };
        println!("{sign} {line}{}", clean(&text));
    }
    if none {
        println!("It means the same.");
    }
}

fn tell(tried: &Tried, document: &str, json: bool) -> anyhow::Result<()> {
    let source = |line: usize| document.lines().nth(line.wrapping_sub(1)).unwrap_or_default().trim().to_owned();
    if json {
        let because =
            tried.because.iter().map(|(line, words)| json!({"line": line, "text": words, "source": source(*line)}));
        print_json(&json!({"outcome": tried.outcome.word(), "because": because.collect::<Vec<_>>()}))?;
    } else {
        println!("{}", tried.outcome.word());
        for (line, words) in &tried.because {
            match line {
                0 => println!("  {}", clean(words)),
                line => println!("  line {line}, `{}`, {}", clean(&source(*line)), clean(words)),
            }
        }
    }
    anyhow::ensure!(tried.outcome == Outcome::Allowed, "the policy does not allow it as it stands");
    Ok(())
}

async fn put_in_force(client: &Client, how: &str, body: &Value, json: bool) -> anyhow::Result<()> {
    let answer = client.tell(&format!("{ROUTE}/{how}"), body).await?;
    if json {
        print_json(&answer)?;
    } else {
        let again = answer["restores"].as_u64().map_or_else(String::new, |old| format!(", which is {old} again,"));
        println!("Policy {}{again} is in force.", text(&answer["policy"]));
    }
    confirm(client, ROUTE, answer["version"].as_u64().unwrap_or_default()).await
}

fn read(file: &Path) -> anyhow::Result<(String, Policy)> {
    let document = std::fs::read_to_string(file).with_context(|| format!("policy {}", file.display()))?;
    let policy = Policy::parse(&document).map_err(|faults| anyhow::anyhow!("{}: {faults}", file.display()))?;
    Ok((document, policy))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_in_the_help_is_one() {
        let document = HELP.split_once("\n\n").unwrap().1.rsplit_once("\n\n").unwrap().0;
        let policy = Policy::parse(document).unwrap_or_else(|faults| panic!("{faults}"));
        assert_eq!(contents(&policy), "1 [[allow]], 1 [[deny]], 1 [[egress]], 1 [[gate]]");
    }

    #[test]
    fn places_are_read_as_they_are_written() {
        for (text, good) in [
            ("a.example:443", true),
            ("[2001:db8::1]:1", true),
            ("a.example", false),
            ("a:0", false),
            ("127.1:80", false),
        ] {
            assert_eq!(place(text).is_ok(), good, "{text}");
        }
    }
}
