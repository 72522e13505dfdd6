//! `policy`: what all agents go by, beside their own settings.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Subcommand;
use serde_json::json;
use sidewarden_collector::client::{Client, print_json, text};
use sidewarden_proto::policy::Policy;

use super::{confirm, me};
use crate::At;

const ROUTE: &str = "/api/v1/policy";

/// What stands below the commands.
pub const HELP: &str = "A policy is one TOML file:

  [[gate]]                             # what a workload must keep to stay on the data plane
  name = \"no-way-out\"
  workloads = [\"shop/*\"]             # all, if left out
  checks = [\"privileged\", \"docker-socket\"]    # must not fail; `unknown` changes nothing
  events = [\"privileged_exec\"]       # must not happen: privileged_exec, root_exec, exec, shell
  hold = \"10m\"                       # let in again once all was well for so long
  enforce = false                      # only tells, until this is true
  max_per_workload = 1                 # most instances of a workload that are quarantined at a time
  leave = 1                            # connected instances of a workload that are let be
  unreachable = \"quarantine\"         # an agent without collector: quarantine, or keep";

/// What can be done.
#[derive(Subcommand)]
pub enum Command {
    /// Read a policy and report every fault; needs no collector
    Check {
        /// The document
        file: PathBuf,
    },
    /// The policy in force, and which agents run it
    Show {
        #[command(flatten)]
        at: At,
    },
    /// Put a policy in force
    Apply {
        /// The document
        file: PathBuf,
        /// Why; kept in the event
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Do it though some agents are too old for policies
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        at: At,
    },
}

impl Command {
    /// Where the API is, if it is asked.
    pub fn at(&self) -> Option<&At> {
        match self {
            Command::Check { .. } => None,
            Command::Show { at } | Command::Apply { at, .. } => Some(at),
        }
    }
}

/// Does it.
pub async fn run(client: Option<&Client>, command: Command) -> anyhow::Result<()> {
    let asked = || client.context("the API is not known");
    match command {
        Command::Check { file } => {
            let policy = read(&file)?.1;
            println!("The policy has no faults: {} gates.", policy.gates.len());
            Ok(())
        }
        Command::Show { at } => {
            let answer = asked()?.ask(ROUTE, &[]).await?;
            if at.json {
                return print_json(&answer);
            }
            eprintln!("Policy {}.", text(&answer["version"]));
            print!("{}", text(&answer["text"]));
            confirm(asked()?, ROUTE, answer["reach"]["version"].as_u64().unwrap_or_default()).await
        }
        Command::Apply { file, reason, yes, at } => {
            let document = read(&file)?.0;
            let body = json!({"text": document, "why": reason, "by": me(), "confirmed": yes});
            let answer = asked()?.tell(&format!("{ROUTE}/apply"), &body).await?;
            if at.json {
                print_json(&answer)?;
            } else {
                println!("Policy {} is in force.", text(&answer["policy"]));
            }
            confirm(asked()?, ROUTE, answer["version"].as_u64().unwrap_or_default()).await
        }
    }
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
        let document: String = HELP.split_once("\n\n").unwrap().1.to_owned();
        assert_eq!(Policy::parse(&document).unwrap().gates.len(), 1);
    }
}
