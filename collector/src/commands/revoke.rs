//! `revoke`: by serial number, key, instance, workload or issuing key; listed and undone by the same command.

use clap::Args;
use serde_json::{Value, json};
use sidewarden_collector::client::{self, Client, list, print_json, text};
use sidewarden_collector::table::{clean, table};
use sidewarden_proto::identity::{AgentId, Sha256, TrustDomain};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls;

use super::{confirm, me};

const ROUTE: &str = "/api/v1/revocations";

/// What stands below the options.
pub const HELP: &str = "Examples:
  sidewarden-collector revoke --instance shop/orders#orders-1 --reason 'host taken over'
  sidewarden-collector revoke --serial 4F:1A:… --reason 'certificate copied'
  sidewarden-collector revoke --list
  sidewarden-collector revoke --undo 3fa1c2d40b11 --reason 'false alarm'

It is done by the running collector, over its API, with the admin token: so it is in force at once, and one place decides.
What is revoked gets no certificate either, by token, by renewal, or within the grace. Whole workloads, issuing keys and
the collector's own certificate need --yes.";

/// What is wanted.
#[derive(Args)]
#[group(required = true, multiple = false, id = "wanted")]
pub struct Wanted {
    /// One certificate, by its serial number in hex
    #[arg(long, value_name = "HEX")]
    serial: Option<String>,
    /// One instance, with every key it has: shop/orders#orders-1
    #[arg(long, value_name = "WORKLOAD#INSTANCE")]
    instance: Option<String>,
    /// Every instance of a workload: shop/orders
    #[arg(long, value_name = "WORKLOAD")]
    workload: Option<String>,
    /// One key: SHA-256 of its SPKI in hex, or a PEM file with its certificate
    #[arg(long, value_name = "HEX|FILE")]
    key: Option<String>,
    /// Whatever a CA has signed: SHA-256 of its SPKI in hex, or a PEM file with its certificate
    #[arg(long, value_name = "HEX|FILE")]
    issuing_key: Option<String>,
    /// Show what is revoked, and which agents know
    #[arg(long)]
    list: bool,
    /// Undo a revocation, by its id
    #[arg(long, value_name = "ID")]
    undo: Option<String>,
}

/// All arguments.
#[derive(Args)]
pub struct What {
    #[command(flatten)]
    wanted: Wanted,
    /// Why; kept with it, and told to whoever is refused
    #[arg(long, value_name = "TEXT", required_unless_present = "list")]
    reason: Option<String>,
    /// Do it though it hits more than one instance, or this collector itself
    #[arg(long)]
    yes: bool,
}

/// Does it.
pub async fn run(client: &Client, what: What, domain: &TrustDomain, json: bool) -> anyhow::Result<()> {
    if what.wanted.list {
        return show(client, json).await;
    }
    let (why, by) = (what.reason.unwrap_or_default(), me());
    let (path, body) = match &what.wanted.undo {
        Some(id) => ("/undo", json!({"id": id, "why": why, "by": by})),
        None => {
            let target = target(&what.wanted, domain)?;
            ("/revoke", json!({"what": target, "why": why, "by": by, "confirmed": what.yes}))
        }
    };
    let answer = client.tell(&format!("{ROUTE}{path}"), &body).await?;
    if json {
        print_json(&answer)?;
    } else {
        let done = if path == "/undo" { "is no longer revoked" } else { "is revoked" };
        let (id, what) = (text(&answer["revocation"]["id"]), text(&answer["revocation"]["text"]));
        println!("{} {done} ({}).", clean(&what), clean(&id));
        for note in list(&answer["notes"], "") {
            eprintln!("Note: {}.", clean(&text(note)));
        }
    }
    confirm(client, ROUTE, answer["version"].as_u64().unwrap_or_default()).await
}

fn target(wanted: &Wanted, domain: &TrustDomain) -> anyhow::Result<Value> {
    if let Some(serial) = &wanted.serial {
        return Ok(json!({"by": "serial", "serial": serial}));
    }
    if let Some(name) = &wanted.instance {
        let wrong = || anyhow::anyhow!("--instance {name}: write shop/orders#orders-1, as `agents` shows both");
        let (workload, instance) = name.split_once('#').ok_or_else(wrong)?;
        let agent = AgentId { workload: client::workload(workload, domain)?, instance: instance.parse()? };
        return Ok(json!({"by": "instance", "workload": agent.workload, "instance": agent.instance}));
    }
    if let Some(name) = &wanted.workload {
        return Ok(json!({"by": "workload", "id": client::workload(name, domain)?}));
    }
    if let Some(key) = &wanted.key {
        return Ok(json!({"by": "key", "spki": key_of(key)?}));
    }
    let key = wanted.issuing_key.as_deref().unwrap_or_default();
    Ok(json!({"by": "issuing_key", "spki": key_of(key)?}))
}

/// The hash as it stands, or that of the first certificate in a file.
fn key_of(text: &str) -> anyhow::Result<Sha256> {
    if let Ok(hash) = text.to_ascii_lowercase().replace(':', "").parse() {
        return Ok(hash);
    }
    let pem = std::fs::read(text).map_err(|error| {
        anyhow::anyhow!("`{text}` is neither 64 hexadecimal digits nor a file that can be read: {error}")
    })?;
    let certificates = tls::certificates(&pem).map_err(|error| anyhow::anyhow!("{text}: {error}"))?;
    Ok(tls::spki_of(&certificates[0])?)
}

async fn show(client: &Client, json: bool) -> anyhow::Result<()> {
    let answer = client.ask(ROUTE, &[]).await?;
    if json {
        return print_json(&answer);
    }
    let rows = list(&answer, "revoked").iter().map(|revocation| {
        let at = revocation["at_us"].as_i64().map(|us| Timestamp(us).to_string()).unwrap_or_default();
        vec![text(&revocation["id"]), at, text(&revocation["text"]), text(&revocation["why"])]
    });
    print!("{}", table(&["ID", "SINCE", "WHAT", "WHY"], rows));
    confirm(client, ROUTE, answer["reach"]["version"].as_u64().unwrap_or_default()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_a_hash_or_a_certificate_in_a_file() {
        let hash = "ab".repeat(32);
        assert_eq!(key_of(&hash.to_uppercase()).unwrap().to_string(), hash);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cert.pem");
        let made = rcgen::generate_simple_self_signed(["x".to_owned()]).unwrap();
        std::fs::write(&path, made.cert.pem()).unwrap();
        assert_eq!(key_of(path.to_str().unwrap()).unwrap(), tls::spki_of(made.cert.der()).unwrap());
        std::fs::write(&path, "none").unwrap();
        for bad in [path.to_str().unwrap(), "/no/such/file", "", "abc"] {
            assert!(key_of(bad).is_err(), "{bad}");
        }
    }
}
