//! The commands that change something, each with its arguments.

pub mod ca;
pub mod evidence;
pub mod policy;
pub mod quarantine;
pub mod report;
pub mod revoke;
pub mod waiver;

use std::time::Duration;

use sidewarden_collector::client::{Client, text};
use sidewarden_collector::table::clean;

/// How long is waited for agents to confirm a directive.
const CONFIRM_WITHIN: Duration = Duration::from_secs(5);
/// How often they are asked about.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// Who runs this command, by the account: it stands in the event, and proves nothing.
pub fn me() -> String {
    let name = ["SUDO_USER", "USER", "LOGNAME"].iter().find_map(|name| std::env::var(name).ok());
    name.filter(|name| !name.is_empty()).unwrap_or_else(|| format!("uid {}", nix::unistd::getuid()))
}

/// Waits until every connected agent runs `version`, as `path` tells it, and says how far it has come.
pub async fn confirm(client: &Client, path: &str, version: u64) -> anyhow::Result<()> {
    let end = tokio::time::Instant::now() + CONFIRM_WITHIN;
    loop {
        let reach = client.ask(path, &[]).await?["reach"].clone();
        let count = |name: &str| reach[name].as_u64().unwrap_or_default();
        let behind = count("connected").saturating_sub(count("running"));
        let holds = count("version") >= version && behind == 0;
        if !holds && tokio::time::Instant::now() < end {
            tokio::time::sleep(ASK_EVERY).await;
            continue;
        }
        eprintln!("In force at {} of {} connected agents (directive {version}).", count("running"), count("connected"));
        for (list, what) in
            [("behind", "has not confirmed it yet"), ("too_old", "is too old to do all of it: update it")]
        {
            for agent in reach[list].as_array().into_iter().flatten() {
                eprintln!("  {} {what}", clean(&text(agent)));
            }
        }
        return Ok(());
    }
}
