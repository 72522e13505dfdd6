//! Who holds certificates now, and which directive they confirmed: what a rotation waits for.

use std::time::Duration;

use rusqlite::params;
use sidewarden_proto::identity::{AgentId, Sha256};
use sidewarden_proto::time::Timestamp;

use super::rotate::{Holder, Missing};
use super::{CaError, Register};

/// The newest certificate of each instance, with the root of the newest one it was seen with.
const HOLDERS: &str = "
    SELECT i.workload, i.instance, i.spki, i.not_after, COALESCE(c.directive, 0),
        COALESCE((SELECT s.root FROM issued s WHERE s.workload = i.workload AND s.instance = i.instance AND s.seen = 1
                  AND NOT s.superseded ORDER BY s.id DESC LIMIT 1), i.root)
    FROM issued i LEFT JOIN confirmed c ON c.workload = i.workload AND c.instance = i.instance
    WHERE i.not_after > ?1 AND i.id =
        (SELECT MAX(n.id) FROM issued n WHERE n.workload = i.workload AND n.instance = i.instance
         AND NOT n.superseded)
    ORDER BY i.workload, i.instance";

/// A certificate that went to somebody without an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outside {
    /// Its serial number, in hexadecimal.
    pub serial: String,
    /// Its key.
    pub spki: Sha256,
    /// Its SPIFFE ID.
    pub name: String,
    /// When it ends.
    pub not_after: Timestamp,
    /// Its root.
    pub root: Sha256,
}

impl Register {
    /// Certificates of before roots were recorded are of `root`: the only one there was.
    pub fn attribute(&self, root: Sha256) -> Result<(), CaError> {
        let sql = "UPDATE issued SET root = ?1 WHERE root IS NULL";
        self.db.execute(sql, [root.0]).map(drop).map_err(|e| self.fault(e))
    }

    /// Notes which directives agents run, all in one transaction.
    pub fn confirm(&self, confirmed: &[(AgentId, u64)]) -> Result<(), CaError> {
        if confirmed.is_empty() {
            return Ok(());
        }
        let write = || {
            let tx = self.db.unchecked_transaction()?;
            let sql = "INSERT INTO confirmed (workload, instance, directive) VALUES (?1, ?2, ?3)
                       ON CONFLICT DO UPDATE SET directive = excluded.directive";
            for (agent, directive) in confirmed {
                let directive = i64::try_from(*directive).unwrap_or(i64::MAX);
                tx.execute(sql, params![agent.workload.as_str(), agent.instance.as_str(), directive])?;
            }
            tx.commit()
        };
        write().map_err(|e| self.fault(e))
    }

    /// Every instance whose newest certificate holds, or ended no longer than `grace` ago.
    pub fn holders(&self, grace: Duration, now: Timestamp) -> Result<Vec<Holder>, CaError> {
        let mut rows = self.db.prepare(HOLDERS).map_err(|e| self.fault(e))?;
        let found = rows.query_map([now.minus(grace).0], |row| {
            let name = format!("{}#{}", row.get::<_, String>(0)?, row.get::<_, String>(1)?);
            let confirmed: i64 = row.get(4)?;
            Ok(name.parse().ok().map(|agent| Holder {
                agent,
                spki: sha256(row, 2),
                not_after: Timestamp(row.get(3).unwrap_or(0)),
                confirmed: u64::try_from(confirmed).unwrap_or(0),
                root: sha256(row, 5),
            }))
        });
        let found: Result<Vec<Option<Holder>>, _> = found.map_err(|e| self.fault(e))?.collect();
        Ok(found.map_err(|e| self.fault(e))?.into_iter().flatten().collect())
    }

    /// Whether an agent ever had a certificate for this name, or a token that is still good lets one have it.
    pub fn is_an_agents(&self, name: &str, path: &str, now: Timestamp) -> Result<bool, CaError> {
        let sql = "SELECT EXISTS (SELECT 1 FROM issued WHERE workload = ?1)";
        if self.db.query_row(sql, [name], |row| row.get(0)).map_err(|e| self.fault(e))? {
            return Ok(true);
        }
        let good = self.tokens()?.into_iter().filter(|token| token.state(now) == super::TokenState::Valid);
        Ok(good.filter_map(|token| token.pattern.parse::<super::Pattern>().ok()).any(|pattern| pattern.covers(path)))
    }

    /// Records a certificate that goes to somebody without an agent.
    pub fn record_outside(&self, outside: &Outside, now: Timestamp) -> Result<(), CaError> {
        let sql = "INSERT INTO outside (serial, spki, name, not_after, issued, root) VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
        let Outside { serial, spki, name, not_after, root } = outside;
        let row = params![serial, spki.0, name, not_after.0, now.0, root.0];
        self.db.execute(sql, row).map(drop).map_err(|e| self.fault(e))
    }

    /// Certificates of somebody without an agent that still hold.
    pub fn outside(&self, now: Timestamp) -> Result<Vec<Outside>, CaError> {
        let sql = "SELECT serial, spki, name, not_after, root FROM outside WHERE not_after > ?1 ORDER BY name, serial";
        let mut rows = self.db.prepare(sql).map_err(|e| self.fault(e))?;
        let found = rows.query_map([now.0], |row| {
            let (serial, name, not_after) = (row.get(0)?, row.get(2)?, Timestamp(row.get(3)?));
            Ok(Outside { serial, spki: sha256(row, 1), name, not_after, root: sha256(row, 4) })
        });
        found.map_err(|e| self.fault(e))?.collect::<Result<_, _>>().map_err(|e| self.fault(e))
    }
}

/// Those of `outside` that end when `active` is the only root left.
pub fn outside_missing(outside: &[Outside], active: Sha256) -> Vec<Missing> {
    let of_old = outside.iter().filter(|one| one.root != active);
    of_old
        .map(|one| Missing {
            who: format!("{} (serial {})", one.name, one.serial),
            lacks: format!("has no agent to renew it, is of the old root and ends {}: issue another", one.not_after),
            away: false,
        })
        .collect()
}

/// A column with a hash; one that is none counts as nobody's.
fn sha256(row: &rusqlite::Row<'_>, column: usize) -> Sha256 {
    let bytes: Option<Vec<u8>> = row.get(column).ok();
    bytes.and_then(|bytes| bytes.try_into().ok()).map_or(Sha256::ZERO, Sha256)
}
