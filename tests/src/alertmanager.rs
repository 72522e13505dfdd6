//! What a real Alertmanager holds, by its API.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::http;

/// One alert there.
#[derive(Clone, Debug, Deserialize)]
pub struct Alert {
    /// Its labels; `alertname` is one of them.
    pub labels: BTreeMap<String, String>,
    /// Its texts.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

impl Alert {
    /// A label's value, empty if it has none.
    pub fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }
}

/// Those that fire now.
pub fn alerts(addr: SocketAddr) -> Result<Vec<Alert>> {
    let json = http::get(addr, "/api/v2/alerts?active=true")?;
    serde_json::from_str(&json).context("reading Alertmanager's alerts")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alert_is_read_as_alertmanager_writes_it() {
        let json = r#"{"annotations":{"summary":"s"},"endsAt":"2026-01-01T00:00:00.000Z","fingerprint":"f",
            "receivers":[{"name":"nobody"}],"startsAt":"2026-01-01T00:00:00.000Z","status":{"state":"active"},
            "updatedAt":"2026-01-01T00:00:00.000Z","generatorURL":"","labels":{"alertname":"A"}}"#;
        let alert: Alert = serde_json::from_str(json).unwrap();
        assert_eq!((alert.label("alertname"), alert.label("workload")), ("A", ""));
    }
}
