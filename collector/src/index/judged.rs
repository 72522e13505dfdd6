//! How somebody was judged at a moment: the few events of the whole history that say it.
//!
//! An agent tells its whole posture when it starts, once a day, and after a loss; between, it tells changes. So the posture
//! at a moment is the last whole one before it and the changes since, and a row here names each of these events with whom
//! it is about. The events themselves stay in the log.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rusqlite::params;
use serde::Deserialize;
use sidewarden_proto::batch::{Epoch, Link};
use sidewarden_proto::event::{Event, EventRef};
use sidewarden_proto::identity::{AgentId, SpiffeId};
use sidewarden_proto::policy::Pattern;
use sidewarden_proto::time::Timestamp;

use super::IndexError;
use super::query::{Reader, unreadable};

/// What an agent says of itself.
const OF_AGENTS: [&str; 4] = ["posture.baseline", "verdict.changed", "agent.started", "agent.stopping"];
/// What a node agent says of a container.
const OF_CONTAINERS: [&str; 3] = ["container.posture", "container.verdict_changed", "container.gone"];
/// What the collector says of an agent.
const OF_SESSIONS: [&str; 2] = ["agent.connected", "agent.disconnected"];
/// What the collector says of itself, or of what people answer for.
const OF_THE_COLLECTOR: [&str; 6] =
    ["collector.started", "waiver.set", "waiver.removed", "attestation.set", "attestation.removed", "scan.added"];

/// Rows read for one agent, and of one container; with more changes than that since the last whole posture, the answer is
/// not known.
const MAX_ROWS: usize = 20_000;
/// Events read for one answer: a thousand agents and their hosts have fewer.
const MAX_EVENTS: usize = 200_000;

/// What was told, in order, and where it was not enough.
#[derive(Clone, Debug, Default)]
pub struct Past {
    /// The events, oldest first.
    pub events: Vec<Told>,
    /// What the collector said after the moment of what people answer for and scanners found, newest first.
    pub later: Vec<Told>,
    /// Agents that were there, and of whom the events that would say how they stood are no longer kept, or too many.
    pub unclear: Vec<AgentId>,
}

/// One event of the past.
#[derive(Clone, Debug)]
pub struct Told {
    /// Position of its link.
    pub position: u64,
    /// Who sent it.
    pub agent: Arc<AgentId>,
    /// The life of the sender's spool.
    pub epoch: Epoch,
    /// When it was taken.
    pub received: Timestamp,
    /// The event.
    pub event: Event,
}

/// Whom an event judges, and the container, if it has a row here.
pub(super) fn about(sender: &AgentId, event: &EventRef<'_>) -> Option<(AgentId, String)> {
    #[derive(Deserialize)]
    struct Whom {
        workload: SpiffeId,
        instance: String,
    }
    #[derive(Deserialize)]
    struct OfContainer {
        container: Id,
    }
    #[derive(Deserialize)]
    struct Id {
        id: String,
    }
    let kind = event.kind.as_ref();
    if OF_AGENTS.contains(&kind) {
        return Some((sender.clone(), String::new()));
    }
    if OF_CONTAINERS.contains(&kind) {
        let OfContainer { container } = serde_json::from_str(event.body.get()).ok()?;
        return (!container.id.is_empty() && container.id.len() <= 128).then(|| (sender.clone(), container.id));
    }
    if !crate::state::is_collector_path(sender) {
        return None;
    }
    if OF_SESSIONS.contains(&kind) {
        let Whom { workload, instance } = serde_json::from_str(event.body.get()).ok()?;
        return Some((AgentId { workload, instance: instance.parse().ok()? }, String::new()));
    }
    OF_THE_COLLECTOR.contains(&kind).then(|| (sender.clone(), String::new()))
}

type Key = (u64, u64);

struct Row {
    key: Key,
    kind: String,
}

impl Reader {
    /// See [`super::Index::past`].
    pub(super) fn past(&self, scope: &[Pattern], at: Timestamp) -> Result<Past, IndexError> {
        let agents = self.agents()?;
        let (mut keys, mut past) = (BTreeSet::new(), Past::default());
        let mut wanted: BTreeSet<i64> = BTreeSet::new();
        for (number, id) in &agents {
            if crate::state::is_collector_path(id) {
                let rows = self.rows_of(*number, at)?;
                keys.extend(rows.iter().find(|row| row.kind == "collector.started").map(|row| row.key));
            } else if scope.iter().any(|pattern| pattern.covers(&id.workload)) {
                wanted.insert(*number);
            }
        }
        for number in &wanted {
            self.agent_at(*number, &agents[number], at, &mut keys, &mut past)?;
            self.containers_at(*number, None, at, &mut keys)?;
        }
        past.events = self.events(&keys)?;
        // Node agents of their hosts tell of the same containers.
        let mut more = BTreeSet::new();
        let mut nodes = BTreeSet::new();
        for container in containers_told(&past.events) {
            for node in self.tellers(&container, at)?.into_iter().filter(|node| !wanted.contains(node)) {
                self.containers_at(node, Some(&container), at, &mut more)?;
                nodes.insert(node);
            }
        }
        for node in nodes {
            // Its own posture is the host's; that it is not known is no fault of those who were asked for.
            self.agent_at(node, &agents[&node], at, &mut more, &mut Past::default())?;
        }
        past.events.extend(self.events(&more.difference(&keys).copied().collect())?);
        past.events.sort_by_key(|told| (told.position, told.event.seq));
        past.later = self.evidence_after(&agents, at)?;
        Ok(past)
    }

    fn agents(&self) -> Result<BTreeMap<i64, AgentId>, IndexError> {
        let mut statement = self.db.prepare_cached("SELECT id, workload, instance FROM agent").map_err(unreadable)?;
        let read = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get::<_, String>(1)?, row.get::<_, String>(2)?));
        let rows = statement.query_map([], read).map_err(unreadable)?;
        let mut agents = BTreeMap::new();
        for row in rows {
            let (number, workload, instance) = row.map_err(unreadable)?;
            let (Ok(workload), Ok(instance)) = (workload.parse(), instance.parse()) else { continue };
            agents.insert(number, AgentId { workload, instance });
        }
        Ok(agents)
    }

    /// What stands there of an agent itself, newest first.
    fn rows_of(&self, agent: i64, at: Timestamp) -> Result<Vec<Row>, IndexError> {
        let sql = "SELECT position, seq, kind FROM judged WHERE agent = ?1 AND container = '' AND received <= ?2
                   ORDER BY position DESC, seq DESC LIMIT ?3";
        let mut statement = self.db.prepare_cached(sql).map_err(unreadable)?;
        let rows = statement.query_map(params![agent, at.0, MAX_ROWS as i64], row).map_err(unreadable)?;
        rows.collect::<Result<_, _>>().map_err(unreadable)
    }

    /// The last whole posture, what came after it, and the last word about start, end and session.
    fn agent_at(
        &self,
        agent: i64,
        id: &AgentId,
        at: Timestamp,
        keys: &mut BTreeSet<Key>,
        past: &mut Past,
    ) -> Result<(), IndexError> {
        let rows = self.rows_of(agent, at)?;
        let mut once: BTreeSet<&str> = BTreeSet::new();
        let mut whole = false;
        for row in &rows {
            match row.kind.as_str() {
                "verdict.changed" if !whole => drop(keys.insert(row.key)),
                "verdict.changed" => {}
                "posture.baseline" => {
                    if !std::mem::replace(&mut whole, true) {
                        keys.insert(row.key);
                    }
                }
                kind => {
                    if once.insert(kind) {
                        keys.insert(row.key);
                    }
                }
            }
        }
        if !whole && !rows.is_empty() {
            past.unclear.push(id.clone());
        }
        Ok(())
    }

    /// The same for containers that a node agent told of since its last start: all of them, or one.
    fn containers_at(
        &self,
        agent: i64,
        only: Option<&str>,
        at: Timestamp,
        keys: &mut BTreeSet<Key>,
    ) -> Result<(), IndexError> {
        let sql = "SELECT position, seq, kind, container FROM judged
                   WHERE agent = ?1 AND container <> '' AND (?2 IS NULL OR container = ?2) AND received <= ?3
                   AND position >= COALESCE((SELECT max(position) FROM judged WHERE agent = ?1 AND container = ''
                       AND kind = 'agent.started' AND received <= ?3), 0)
                   ORDER BY container, position, seq";
        let mut statement = self.db.prepare_cached(sql).map_err(unreadable)?;
        let mut rows = statement.query(params![agent, only, at.0]).map_err(unreadable)?;
        let (mut standing, mut of): (Vec<Key>, String) = (Vec::new(), String::new());
        while let Some(next) = rows.next().map_err(unreadable)? {
            let Row { key, kind } = row(next).map_err(unreadable)?;
            let container: String = next.get(3).map_err(unreadable)?;
            if container != of {
                keys.extend(standing.drain(..));
                of = container;
            }
            match kind.as_str() {
                "container.gone" => standing.clear(),
                "container.posture" => standing = vec![key],
                _ if standing.len() < MAX_ROWS => standing.push(key),
                _ => {}
            }
        }
        keys.extend(standing);
        Ok(())
    }

    /// Who told of a container.
    fn tellers(&self, container: &str, at: Timestamp) -> Result<Vec<i64>, IndexError> {
        let sql = "SELECT DISTINCT agent FROM judged WHERE container = ?1 AND container <> '' AND received <= ?2";
        let mut statement = self.db.prepare_cached(sql).map_err(unreadable)?;
        let rows = statement.query_map(params![container, at.0], |row| row.get(0)).map_err(unreadable)?;
        rows.collect::<Result<_, _>>().map_err(unreadable)
    }

    /// What was said after `at` of what people answer for and scanners found, newest first.
    fn evidence_after(&self, agents: &BTreeMap<i64, AgentId>, at: Timestamp) -> Result<Vec<Told>, IndexError> {
        let sql = "SELECT position, seq, kind FROM judged WHERE agent = ?1 AND container = '' AND received > ?2
                   AND kind <> 'collector.started'";
        let mut keys = BTreeSet::new();
        for (number, _) in agents.iter().filter(|(_, id)| crate::state::is_collector_path(id)) {
            let mut statement = self.db.prepare_cached(sql).map_err(unreadable)?;
            let rows = statement.query_map(params![number, at.0], row).map_err(unreadable)?;
            for row in rows {
                keys.insert(row.map_err(unreadable)?.key);
            }
        }
        let mut told = self.events(&keys)?;
        told.reverse();
        Ok(told)
    }

    /// The events at these places, each batch read once.
    fn events(&self, keys: &BTreeSet<Key>) -> Result<Vec<Told>, IndexError> {
        if keys.len() > MAX_EVENTS {
            return Err(IndexError::Damaged(format!(
                "{} events would have to be read: ask for fewer workloads",
                keys.len()
            )));
        }
        let mut found = Vec::with_capacity(keys.len());
        let mut keys = keys.iter().peekable();
        while let Some((position, seq)) = keys.next() {
            let mut seqs = BTreeSet::from([*seq]);
            while let Some((_, seq)) = keys.next_if(|(next, _)| next == position) {
                seqs.insert(*seq);
            }
            let Some(stored) = self.link(*position)? else { continue };
            let Link::Batch(batch) = &stored.entry.link else { continue };
            let read = batch.open().and_then(|lines| {
                let events = lines.events()?;
                let wanted = events.iter().filter(|event| seqs.contains(&event.seq));
                found.extend(wanted.map(|event| Told {
                    position: *position,
                    agent: stored.entry.agent.clone(),
                    epoch: batch.header.epoch,
                    received: stored.entry.received,
                    event: event.to_owned(),
                }));
                Ok(())
            });
            if let Err(error) = read {
                tracing::error!(position, %error, "a batch in the log is damaged");
            }
        }
        Ok(found)
    }
}

/// The containers that these postures say their workloads have.
fn containers_told(told: &[Told]) -> BTreeSet<String> {
    #[derive(Deserialize)]
    struct Baseline {
        #[serde(default)]
        containers: Vec<String>,
    }
    let baselines = told.iter().filter(|told| told.event.kind == "posture.baseline");
    let read = baselines.filter_map(|told| serde_json::from_str::<Baseline>(told.event.body.get()).ok());
    read.flat_map(|baseline| baseline.containers.into_iter().take(64)).collect()
}

fn row(row: &rusqlite::Row<'_>) -> Result<Row, rusqlite::Error> {
    let key = (row.get::<_, i64>(0)? as u64, row.get::<_, i64>(1)? as u64);
    Ok(Row { key, kind: row.get(2)? })
}
