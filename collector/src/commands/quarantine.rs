//! `quarantine`: who is off the data plane by a gate of the policy, and letting them in for a while.

use std::time::Duration;

use clap::Subcommand;
use serde_json::{Value, json};
use sidewarden_collector::client::{self, Client, list, print_json, text};
use sidewarden_collector::table::table;
use sidewarden_proto::identity::{AgentId, TrustDomain};
use sidewarden_proto::time::Timestamp;

use super::{confirm, me};
use crate::{At, duration};

const ROUTE: &str = "/api/v1/quarantine";

/// What can be done.
#[derive(Subcommand)]
pub enum Command {
    /// Who is quarantined, who would be, and who was let in
    List {
        #[command(flatten)]
        at: At,
    },
    /// Let an instance in for a while, whatever gates say
    Release {
        /// Which: shop/orders#orders-1
        instance: String,
        /// Why; kept in the event
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// For how long: 30m, 1h, at most 7d
        #[arg(long = "for", default_value = "1h", value_parser = duration)]
        life: Duration,
        #[command(flatten)]
        at: At,
    },
}

impl Command {
    /// Where the API is.
    pub fn at(&self) -> &At {
        match self {
            Command::List { at } | Command::Release { at, .. } => at,
        }
    }
}

/// Does it.
pub async fn run(client: &Client, command: Command, domain: &TrustDomain) -> anyhow::Result<()> {
    match command {
        Command::List { at } => show(client, at.json).await,
        Command::Release { instance: name, reason, life, at } => {
            let wrong = || anyhow::anyhow!("{name}: write shop/orders#orders-1, as `agents` shows both");
            let (workload, instance) = name.split_once('#').ok_or_else(wrong)?;
            let agent = AgentId { workload: client::workload(workload, domain)?, instance: instance.parse()? };
            let body = json!({"workload": agent.workload, "instance": agent.instance, "seconds": life.as_secs(),
                              "why": reason, "by": me()});
            let answer = client.tell(&format!("{ROUTE}/release"), &body).await?;
            if at.json {
                print_json(&answer)?;
            } else {
                println!("{agent} is let in until {}.", at_of(&answer["until_us"]));
            }
            confirm(client, ROUTE, answer["version"].as_u64().unwrap_or_default()).await
        }
    }
}

async fn show(client: &Client, json: bool) -> anyhow::Result<()> {
    let answer = client.ask(ROUTE, &[]).await?;
    if json {
        return print_json(&answer);
    }
    let who = |entry: &Value| format!("{}#{}", text(&entry["workload"]), text(&entry["instance"]));
    let broken = list(&answer, "broken").iter().map(|entry| {
        let status = text(&entry["status"]).replace('_', " ");
        vec![who(entry), text(&entry["gate"]), status, at_of(&entry["since_us"]), text(&entry["why"])]
    });
    print!("{}", table(&["INSTANCE", "GATE", "STATUS", "SINCE", "WHY"], broken));
    for entry in list(&answer, "released") {
        println!("Let in until {}: {} ({})", at_of(&entry["until_us"]), who(entry), text(&entry["why"]));
    }
    Ok(())
}

fn at_of(value: &Value) -> String {
    value.as_i64().map(|us| Timestamp(us).to_string()).unwrap_or_default()
}
