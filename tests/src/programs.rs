//! The two programs as they are shipped: release build, one static file each.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::command::run;
use crate::progress::Detail;
use crate::workspace;

/// The built files.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `sidewarden-agent`
    pub agent: PathBuf,
    /// `sidewarden-collector`
    pub collector: PathBuf,
}

/// Builds both.
pub fn build(detail: &Detail<'_>) -> Result<Programs> {
    let target = host()?;
    // Not by RUSTFLAGS: those of the machine's owner stay in force, and build scripts stay dynamic.
    let flags = format!("target.{target}.rustflags=['-C', 'target-feature=+crt-static']");
    let output = run(cargo(), ["build", "--release", "--locked", "--message-format=json-render-diagnostics"])
        .args(["--package=sidewarden-agent", "--package=sidewarden-collector", "--bins"])
        .args(["--target", &target, "--config", &flags])
        .current_dir(&workspace::root())
        .limit(Duration::from_secs(3600))
        .output_with(|line| detail.now(line))?;
    Ok(Programs {
        agent: executable(&output, "sidewarden-agent")?,
        collector: executable(&output, "sidewarden-collector")?,
    })
}

/// The cargo that runs us.
pub fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".into())
}

/// The triple of this machine.
fn host() -> Result<String> {
    let version = run("rustc", ["-vV"]).current_dir(&workspace::root()).output()?;
    version.lines().find_map(|l| l.strip_prefix("host: ")).map(str::to_owned).context("`rustc -vV` names no host")
}

#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    target: Option<MessageTarget>,
}

#[derive(Deserialize)]
struct MessageTarget {
    name: String,
}

/// Where cargo put the program `name`, by its own account.
fn executable(messages: &str, name: &str) -> Result<PathBuf> {
    let built = messages.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok());
    let mut built = built.filter(|m| m.target.as_ref().is_some_and(|t| t.name == name));
    match built.find_map(|m| m.executable) {
        Some(path) => Ok(path),
        None => bail!("cargo built no program `{name}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_where_cargo_says() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"sidewarden_agent"},"executable":null}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"sidewarden-agent"},"executable":"/t/sidewarden-agent"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        assert_eq!(executable(messages, "sidewarden-agent").unwrap(), PathBuf::from("/t/sidewarden-agent"));
        assert!(executable(messages, "sidewarden-collector").is_err());
    }
}
