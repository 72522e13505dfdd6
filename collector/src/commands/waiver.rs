//! `waiver`: who answers for a broken rule, and until when.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use sidewarden_collector::client::{self, Client, list, print_json, text};
use sidewarden_collector::table::table;
use sidewarden_proto::config::{Reader, load};
use sidewarden_proto::identity::TrustDomain;
use sidewarden_proto::time::{Timestamp, end_of};

use super::me;
use crate::At;

const ROUTE: &str = "/api/v1/waivers";
/// Largest document.
const MAX_TEXT: u64 = 4 << 20;

/// What stands below the commands.
pub const HELP: &str = "A waived failure is shown as `FAIL (waived by … until …)` and raises no alert; it never counts as pass, and it opens no gate
of the policy. Three days before its end WaiverEnding fires; after its end it is a failure again.

A document for `waiver apply` is one TOML file, and says what waivers there are, all of them:

  [[waiver]]
  check = \"read-only-root\"            # as in `sidewarden-agent checks`
  workload = \"shop/orders\"            # or shop/*, or *
  # container = \"db-*\"                # of the host that this workload's node agents judge
  by = \"jane@shop.example\"            # who answers for it; whoever runs the command, if left out
  why = \"the vendor writes to /opt until 4.2\"
  until = \"2027-01-31\"                # the last day (UTC), or a time";

/// Which one.
#[derive(Args)]
pub struct Which {
    /// The check: its name, as `sidewarden-agent checks` lists it
    #[arg(long)]
    check: String,
    /// Whose: shop/orders, shop/* for every service of shop, or * for all
    #[arg(long)]
    workload: String,
    /// Containers of the host that this workload's node agents judge, by name; may end with *
    #[arg(long)]
    container: Option<String>,
}

/// What can be done.
#[derive(Subcommand)]
pub enum Command {
    /// Which there are, until when, and how many failures each covers
    List {
        #[command(flatten)]
        at: At,
    },
    /// Answer for a broken rule until a day
    Set {
        #[command(flatten)]
        which: Which,
        /// Why; kept in the event
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// The last day (UTC), like 2027-01-31, or a time; at most a year from now
        #[arg(long, value_name = "DAY", value_parser = end_of)]
        until: Timestamp,
        /// Who answers for it; you, if not given
        #[arg(long, value_name = "NAME")]
        by: Option<String>,
        #[command(flatten)]
        at: At,
    },
    /// Answer for it no longer
    Remove {
        #[command(flatten)]
        which: Which,
        /// Why; kept in the event
        #[arg(long, value_name = "TEXT")]
        reason: String,
        #[command(flatten)]
        at: At,
    },
    /// Have exactly those that a document says
    Apply {
        /// The document
        file: PathBuf,
        /// Why those that it does not say are removed; kept in the event
        #[arg(long, value_name = "TEXT", default_value = "it is not in the document")]
        reason: String,
        /// Only tell what would change
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        at: At,
    },
}

impl Command {
    /// Where the API is.
    pub fn at(&self) -> &At {
        match self {
            Command::List { at } | Command::Set { at, .. } | Command::Remove { at, .. } | Command::Apply { at, .. } => {
                at
            }
        }
    }
}

/// One of a document, in the words of the API.
#[derive(Clone, Debug, PartialEq)]
struct Wanted {
    check: String,
    workload: String,
    container: Option<String>,
    by: String,
    why: String,
    until: Timestamp,
}

/// Does it.
pub async fn run(client: &Client, command: Command, domain: &TrustDomain) -> anyhow::Result<()> {
    match command {
        Command::List { at } => show(client, at.json).await,
        Command::Set { which, reason, until, by, at } => {
            let workload = client::path_in(&which.workload, domain)?;
            let Which { check, container, .. } = which;
            let by = by.unwrap_or_else(me);
            let answer = set(client, &Wanted { check, workload, container, by, why: reason, until }).await?;
            if at.json {
                return print_json(&answer);
            }
            println!("Waived until {until}.");
            Ok(())
        }
        Command::Remove { which, reason, at } => {
            let body = json!({"check": which.check, "workload": client::path_in(&which.workload, domain)?,
                              "container": which.container, "why": reason, "by": me()});
            let answer = client.tell(&format!("{ROUTE}/remove"), &body).await?;
            if at.json {
                return print_json(&answer);
            }
            println!("Waived no longer.");
            Ok(())
        }
        Command::Apply { file, reason, dry_run, .. } => apply(client, &read(&file)?, &reason, dry_run).await,
    }
}

async fn set(client: &Client, wanted: &Wanted) -> anyhow::Result<Value> {
    let Wanted { check, workload, container, by, why, until } = wanted;
    let body = json!({"check": check, "workload": workload, "container": container, "why": why, "by": by,
                      "until_us": until});
    let answer = client.tell(&format!("{ROUTE}/set"), &body).await?;
    list(&answer, "notes").iter().for_each(|note| eprintln!("{check}: {}", text(note)));
    Ok(answer)
}

async fn show(client: &Client, json: bool) -> anyhow::Result<()> {
    let answer = client.ask(ROUTE, &[]).await?;
    if json {
        return print_json(&answer);
    }
    let rows = list(&answer, "waivers").iter().map(|waiver| {
        let state = if waiver["in_force"] == true { "in force" } else { "ended" };
        let until = waiver["until_us"].as_i64().map(|us| Timestamp(us).to_string()).unwrap_or_default();
        let cell = |name: &str| text(&waiver[name]);
        vec![cell("check"), about(waiver), state.into(), until, cell("covers"), cell("by"), cell("why")]
    });
    print!("{}", table(&["CHECK", "WORKLOAD", "STATE", "UNTIL", "COVERS", "BY", "WHY"], rows));
    Ok(())
}

fn about(waiver: &Value) -> String {
    match waiver["container"].as_str() {
        Some(container) => format!("{}/{container}", text(&waiver["workload"])),
        None => text(&waiver["workload"]),
    }
}

async fn apply(client: &Client, wanted: &[Wanted], reason: &str, dry_run: bool) -> anyhow::Result<()> {
    let answer = client.ask(ROUTE, &[]).await?;
    let have: Vec<Wanted> = list(&answer, "waivers").iter().map(of_answer).collect();
    let of_same = |one: &Wanted, other: &Wanted| {
        (&one.check, &one.workload, &one.container) == (&other.check, &other.workload, &other.container)
    };
    let gone: Vec<&Wanted> = have.iter().filter(|old| !wanted.iter().any(|new| of_same(old, new))).collect();
    let new: Vec<&Wanted> = wanted.iter().filter(|new| !have.contains(new)).collect();
    for Wanted { check, workload, container, .. } in &gone {
        println!("remove {check} of {workload} {}", container.as_deref().unwrap_or_default());
        if !dry_run {
            let body = json!({"check": check, "workload": workload, "container": container, "why": reason, "by": me()});
            client.tell(&format!("{ROUTE}/remove"), &body).await?;
        }
    }
    for wanted in &new {
        println!("set {} of {} until {}", wanted.check, wanted.workload, wanted.until);
        if !dry_run {
            set(client, wanted).await?;
        }
    }
    println!("{} set, {} removed, {} as they were.", new.len(), gone.len(), wanted.len() - new.len());
    Ok(())
}

fn of_answer(waiver: &Value) -> Wanted {
    let cell = |name: &str| text(&waiver[name]);
    Wanted {
        check: cell("check"),
        workload: cell("workload"),
        container: waiver["container"].as_str().map(str::to_owned),
        by: cell("by"),
        why: cell("why"),
        until: Timestamp(waiver["until_us"].as_i64().unwrap_or_default()),
    }
}

fn read(file: &Path) -> anyhow::Result<Vec<Wanted>> {
    let size = std::fs::metadata(file).with_context(|| format!("waivers {}", file.display()))?.len();
    anyhow::ensure!(size <= MAX_TEXT, "{} has {size} bytes, the limit is {MAX_TEXT}", file.display());
    let document = std::fs::read_to_string(file).with_context(|| format!("waivers {}", file.display()))?;
    parse(&document).map_err(|faults| anyhow::anyhow!("{}: {faults}", file.display()))
}

fn parse(document: &str) -> Result<Vec<Wanted>, sidewarden_proto::config::Faults> {
    load(document, &|_| None, |reader| {
        let wanted: Vec<Wanted> = reader.list("waiver", one).into_iter().flatten().collect();
        for (i, new) in wanted.iter().enumerate() {
            let of_same = |other: &&Wanted| {
                (&new.check, &new.workload, &new.container) == (&other.check, &other.workload, &other.container)
            };
            if wanted[..i].iter().any(|other| of_same(&other)) {
                reader.fault(&format!("waiver[{i}]"), "says the same check and workload as one before");
            }
        }
        wanted
    })
}

fn one(r: &mut Reader<'_>) -> Option<Wanted> {
    let (check, workload) = (r.required("check"), r.required("workload"));
    let (container, by) = (r.optional("container"), r.optional::<String>("by").unwrap_or_else(me));
    let (why, until) = (r.required::<String>("why"), r.required::<String>("until"));
    let until = until.and_then(|text| match end_of(&text) {
        Ok(until) => Some(until),
        Err(wrong) => {
            r.fault("until", wrong);
            None
        }
    });
    Some(Wanted { check: check?, workload: workload?, container, by, why: why?, until: until? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_in_the_help_is_one() {
        let document = HELP.split_once("all of them:\n\n").unwrap().1;
        let wanted = parse(document).unwrap();
        assert_eq!((wanted[0].check.as_str(), wanted[0].by.as_str()), ("read-only-root", "jane@shop.example"));
        assert_eq!(wanted[0].until.to_string(), "2027-02-01T00:00:00.000Z");
    }

    #[test]
    fn every_fault_of_a_document_is_told_at_once() {
        let faults = parse(
            "[[waiver]]\ncheck = 'user'\nworkload = 'a/b'\nwhy = 'x'\nuntil = 'soon'\n[[waiver]]\nchek = 'user'\n\
             [[waiver]]\ncheck = 'u'\nworkload = '*'\nwhy = 'x'\nuntil = '2027-01-31'\n\
             [[waiver]]\ncheck = 'u'\nworkload = '*'\nwhy = 'y'\nuntil = '2027-02-01'\n",
        );
        let faults = faults.unwrap_err().to_string();
        for wanted in ["must be a day", "chek", "waiver[1].why", "as one before"] {
            assert!(faults.contains(wanted), "{wanted} is missing in {faults}");
        }
    }
}
