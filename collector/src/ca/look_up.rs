//! What the register knows of a certificate, a key or an instance: for whoever wants to revoke it.

use std::time::Duration;

use rusqlite::{OptionalExtension, Row, params};
use sidewarden_proto::identity::{AgentId, Sha256, SpiffeId};
use sidewarden_proto::time::Timestamp;

use super::{CaError, Issuer};

/// Clocks differ: a certificate counts this much longer than it holds.
const LEEWAY: Duration = Duration::from_secs(24 * 3600);
/// Most keys of one instance that are listed, the newest first.
pub const MAX_KEYS: usize = 256;

/// Whom a certificate was issued to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The instance.
    pub agent: AgentId,
    /// Its key.
    pub spki: Sha256,
    /// The serial number of its certificate, in hex.
    pub serial: String,
}

/// What was issued before what was only seen, the newest first.
const EVERYBODY: &str = "SELECT workload, instance, spki, serial FROM (
    SELECT 1 AS ours, id AS age, workload, instance, spki, serial, not_after FROM issued
    UNION ALL SELECT 0, not_before, workload, instance, spki, serial, not_after FROM guests)";

fn holder(row: &Row<'_>) -> rusqlite::Result<Option<Holder>> {
    let (workload, instance): (String, String) = (row.get(0)?, row.get(1)?);
    let (spki, serial) = (Sha256(row.get(2)?), row.get(3)?);
    let (Ok(workload), Ok(instance)) = (workload.parse::<SpiffeId>(), instance.parse()) else { return Ok(None) };
    Ok(Some(Holder { agent: AgentId { workload, instance }, spki, serial }))
}

impl Issuer {
    fn holder_where(&self, condition: &str, values: impl rusqlite::Params) -> Result<Option<Holder>, CaError> {
        let register = self.register();
        let sql = format!("{EVERYBODY} WHERE {condition} ORDER BY ours DESC, age DESC LIMIT 1");
        let row = register.db.query_row(&sql, values, holder).optional();
        Ok(row.map_err(|e| register.fault(e))?.flatten())
    }

    /// Who has the certificate with this serial number.
    pub fn holder_of_serial(&self, serial: &str) -> Result<Option<Holder>, CaError> {
        self.holder_where("serial = ?1", [serial])
    }

    /// Who has a certificate for this key, the last one if there are several.
    pub fn holder_of_key(&self, spki: Sha256) -> Result<Option<Holder>, CaError> {
        self.holder_where("spki = ?1", params![spki.0])
    }

    /// The newest certificate of an instance.
    pub fn newest_of(&self, agent: &AgentId) -> Result<Option<Holder>, CaError> {
        self.holder_where("workload = ?1 AND instance = ?2", [agent.workload.as_str(), agent.instance.as_str()])
    }

    /// The keys of an instance's certificates that still hold, the newest first; at most [`MAX_KEYS`].
    pub fn keys_of(&self, agent: &AgentId, now: Timestamp) -> Result<Vec<Sha256>, CaError> {
        let register = self.register();
        let sql = "SELECT spki FROM (
                       SELECT spki, 1 AS ours, max(id) AS age FROM issued
                       WHERE workload = ?1 AND instance = ?2 AND not_after > ?3 GROUP BY spki
                       UNION ALL SELECT spki, 0, not_before FROM guests
                       WHERE workload = ?1 AND instance = ?2 AND not_after > ?3)
                   GROUP BY spki ORDER BY max(ours) DESC, max(age) DESC LIMIT ?4";
        let values = params![agent.workload.as_str(), agent.instance.as_str(), now.minus(LEEWAY).0, MAX_KEYS as i64];
        let mut rows = register.db.prepare_cached(sql).map_err(|e| register.fault(e))?;
        let keys = rows.query_map(values, |row| Ok(Sha256(row.get(0)?))).map_err(|e| register.fault(e))?;
        keys.collect::<Result<_, _>>().map_err(|e| register.fault(e))
    }
}
