//! `evidence`: what scanners found and what people attest.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Subcommand;
use serde_json::{Value, json};
use sidewarden_collector::client::{self, Client, list, print_json, text};
use sidewarden_collector::evidence::attest::{self, Statement};
use sidewarden_collector::evidence::trivy::MAX_REPORT;
use sidewarden_collector::table::table;
use sidewarden_proto::identity::TrustDomain;
use sidewarden_proto::time::{Timestamp, end_of};

use super::me;
use crate::At;

const ROUTE: &str = "/api/v1/evidence";

/// What stands below the commands.
pub const HELP: &str = "Scans answer CIS 4.4 of every container whose image they are of, by its digest:

  trivy image --format json --output orders.json shop/orders:1.2
  sidewarden-collector evidence add orders.json

Attestations answer what nobody but people can see (CIS 4.3, 4.5, 4.11, 4.12, 7.5, 7.7, 7.10), until a day. Whose are taken
stands in [[evidence.attestor]]:

  openssl genpkey -algorithm ed25519 -out security.pem
  openssl pkey -in security.pem -pubout -out security.pub.pem
  sidewarden-collector evidence sign --key security.pem --check verified-packages --workload 'shop/*' \\
      --reason 'apt verifies every package' --until 2027-01-31 > packages.json
  sidewarden-collector evidence add packages.json";

/// What can be done.
#[derive(Subcommand)]
pub enum Command {
    /// Take in reports of Trivy and signed attestations; each file says which it is
    Add {
        /// The files
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        #[command(flatten)]
        at: At,
    },
    /// What there is
    List {
        #[command(flatten)]
        at: At,
    },
    /// Sign an attestation, to be added; needs no collector
    Sign {
        /// The private key: Ed25519 or P-256, PKCS #8 in PEM
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// The check: its name, as `sidewarden-agent checks` lists it
        #[arg(long)]
        check: String,
        /// Whose: shop/orders, shop/* for every service of shop, or * for all
        #[arg(long)]
        workload: String,
        /// Containers of the host that this workload's node agents judge, by name; may end with *
        #[arg(long)]
        container: Option<String>,
        /// What was looked at, and how
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// The last day (UTC), like 2027-01-31, or a time; at most a year from now
        #[arg(long, value_name = "DAY")]
        until: String,
        /// Who attests it; you, if not given
        #[arg(long, value_name = "NAME")]
        by: Option<String>,
    },
    /// Take an attestation back
    Remove {
        /// The check
        #[arg(long)]
        check: String,
        /// As it was given
        #[arg(long)]
        workload: String,
        /// As it was given
        #[arg(long)]
        container: Option<String>,
        /// Why; kept in the event
        #[arg(long, value_name = "TEXT")]
        reason: String,
        #[command(flatten)]
        at: At,
    },
}

impl Command {
    /// Where the API is, if it is asked.
    pub fn at(&self) -> Option<&At> {
        match self {
            Command::Sign { .. } => None,
            Command::Add { at, .. } | Command::List { at } | Command::Remove { at, .. } => Some(at),
        }
    }
}

/// Does it.
pub async fn run(client: Option<&Client>, command: Command, domain: &TrustDomain) -> anyhow::Result<()> {
    let asked = || client.context("the API is not known");
    match command {
        Command::Add { files, at } => {
            for file in &files {
                add(asked()?, file, at.json).await?;
            }
            Ok(())
        }
        Command::List { at } => show(asked()?, at.json).await,
        Command::Sign { key, check, workload, container, reason, until, by } => {
            end_of(&until).map_err(|wrong| anyhow::anyhow!("--until {wrong}"))?;
            let pem = std::fs::read(&key).with_context(|| format!("key {}", key.display()))?;
            let workload = client::path_in(&workload, domain)?;
            let (by, signed) = (by.unwrap_or_else(me), Timestamp::now().to_string());
            let statement = Statement { check, workload, container, by, why: reason, signed, until };
            println!("{}", attest::sign(&statement, &pem)?);
            Ok(())
        }
        Command::Remove { check, workload, container, reason, at } => {
            let workload = client::path_in(&workload, domain)?;
            let body = json!({"check": check, "workload": workload, "container": container, "why": reason, "by": me()});
            let answer = asked()?.tell(&format!("{ROUTE}/attestation/remove"), &body).await?;
            if at.json {
                return print_json(&answer);
            }
            println!("Attested no longer.");
            Ok(())
        }
    }
}

async fn add(client: &Client, path: &Path, json: bool) -> anyhow::Result<()> {
    let bytes = read(path)?;
    let is_envelope = bytes.len() < 64 << 10 && bytes.windows(13).any(|window| window == b"\"payloadType\"");
    let route = if is_envelope { format!("{ROUTE}/attestation") } else { format!("{ROUTE}/trivy") };
    let query: &[(&'static str, String)] = if is_envelope { &[] } else { &[("by", me())] };
    let answer = client.tell_bytes(&route, query, bytes).await.with_context(|| path.display().to_string())?;
    if json {
        return print_json(&answer);
    }
    match answer.get("scan") {
        Some(scan) if answer["new"] == true => println!("{}: a scan of {}.", path.display(), text(&scan["name"])),
        Some(_) => println!("{}: it is there already.", path.display()),
        None => println!("{}: attested until {}.", path.display(), moment(&answer["attestation"]["until_us"])),
    }
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
    let mut bytes = Vec::new();
    file.take(MAX_REPORT as u64 + 1).read_to_end(&mut bytes).with_context(|| path.display().to_string())?;
    let most = MAX_REPORT >> 20;
    anyhow::ensure!(
        bytes.len() <= MAX_REPORT,
        "{}: it has more than {most} MiB: write it without --list-all-pkgs",
        path.display()
    );
    Ok(bytes)
}

fn moment(value: &Value) -> String {
    value.as_i64().map(|us| Timestamp(us).to_string()).unwrap_or_default()
}

async fn show(client: &Client, json: bool) -> anyhow::Result<()> {
    let answer = client.ask(ROUTE, &[]).await?;
    if json {
        return print_json(&answer);
    }
    let scans = list(&answer, "scans").iter().map(|scan| {
        let count = |word: &str| text(&scan["found"][word]["all"]);
        let image = text(&scan["image_id"]).chars().take(19).collect();
        vec![text(&scan["name"]), image, moment(&scan["made_us"]), count("critical"), count("high"), text(&scan["by"])]
    });
    print!("{}", table(&["SCAN OF", "IMAGE", "MADE", "CRITICAL", "HIGH", "BY"], scans));
    let attested = list(&answer, "attestations").iter().map(|one| {
        let state = if one["in_force"] == true { "in force" } else { "ended" };
        let cell = |name: &str| text(&one[name]);
        vec![
            cell("check"),
            cell("workload"),
            state.into(),
            moment(&one["until_us"]),
            cell("by"),
            cell("key"),
            cell("why"),
        ]
    });
    print!("\n{}", table(&["ATTESTED", "WORKLOAD", "STATE", "UNTIL", "BY", "KEY", "WHY"], attested));
    Ok(())
}
