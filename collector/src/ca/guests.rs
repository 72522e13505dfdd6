//! Agents whose certificates somebody else's CA has issued: which key each was seen with, so that an instance can be revoked and
//! quarantined by its keys as those are that were issued here.
//!
//! Such a certificate says which workload somebody is. Which instance of it is the agent's own word, and one key may be that of
//! several instances: SPIRE gives all containers of a host that one entry is for the same.

use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};
use sidewarden_proto::identity::{AgentId, Peer, Sha256, TrustDomain};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::wire::Guest;

use super::rotate::Holder;
use super::{CaError, Register};

/// Keys that the register holds at a time: a few for each of a hundred thousand agents.
const MOST_KEYS: i64 = 400_000;
/// Instances of a workload with keys that hold: whoever has its certificate may make names up.
const MOST_INSTANCES: i64 = 1_000;
/// Clocks differ: a key is known this much longer than its certificate holds.
const LEEWAY: Duration = Duration::from_secs(3600);
/// Who has been away for longer is waited for no more: its certificate may hold for a year, and its container be long gone.
const AWAY: Duration = Duration::from_secs(3600);

/// Somebody who found no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    /// In the whole register.
    #[error("the register holds {MOST_KEYS} keys of certificates that were not issued here, and takes no more")]
    Keys,
    /// Of this workload.
    #[error("{MOST_INSTANCES} instances of this workload are known, and none is taken in any more")]
    Instances,
}

impl Register {
    /// Notes the key of `agent`, who has shown a certificate of somebody else's CA.
    pub fn guest_seen(&self, agent: &AgentId, peer: &Peer, now: Timestamp) -> Result<Result<(), NoRoom>, CaError> {
        let Peer { spki, serial, not_before, not_after, .. } = peer.clone();
        let (agent, left_us) = (agent.clone(), None);
        let guest = Guest { agent, serial, spki, not_before_us: not_before, not_after_us: not_after, left_us };
        self.put_guests(&[guest], now)
    }

    /// Notes that its session has ended.
    pub fn guest_left(&self, agent: &AgentId, now: Timestamp) -> Result<(), CaError> {
        let sql = "UPDATE guests SET left_at = ?3 WHERE workload = ?1 AND instance = ?2 AND left_at IS NULL";
        let values = params![agent.workload.as_str(), agent.instance.as_str(), now.0];
        self.db.execute(sql, values).map(drop).map_err(|e| self.fault(e))
    }

    /// At a start nobody is connected.
    pub fn guests_left(&self, now: Timestamp) -> Result<(), CaError> {
        self.db
            .execute("UPDATE guests SET left_at = ?1 WHERE left_at IS NULL", [now.0])
            .map(drop)
            .map_err(|e| self.fault(e))
    }

    /// Takes in what another collector tells of such agents; what finds no room is left out.
    pub(super) fn take_guests(&self, guests: &[Guest], now: Timestamp) -> Result<(), CaError> {
        for guest in guests {
            if let Err(full) = self.put_guests(std::slice::from_ref(guest), now)? {
                tracing::warn!(agent = %guest.agent, %full, "what another collector tells of an agent was not taken in");
            }
        }
        Ok(())
    }

    fn put_guests(&self, guests: &[Guest], now: Timestamp) -> Result<Result<(), NoRoom>, CaError> {
        let write = || {
            let tx = self.db.unchecked_transaction()?;
            tx.execute("DELETE FROM guests WHERE not_after < ?1", [now.minus(LEEWAY).0])?;
            for guest in guests {
                let (workload, instance) = (guest.agent.workload.as_str(), guest.agent.instance.as_str());
                if let Err(full) = find_room(&tx, workload, instance, guest.spki)? {
                    return Ok(Err(full));
                }
                let sql = "INSERT INTO guests (workload, instance, spki, serial, not_before, not_after, left_at)
                           VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT DO UPDATE SET left_at = excluded.left_at,
                           serial = iif(excluded.not_after > not_after, excluded.serial, serial),
                           not_before = iif(excluded.not_after > not_after, excluded.not_before, not_before),
                           not_after = max(excluded.not_after, not_after)";
                let Guest { serial, spki, not_before_us, not_after_us, left_us, .. } = guest;
                let (spki, left) = (spki.0, left_us.map(|left| left.0));
                tx.execute(sql, params![workload, instance, spki, serial, not_before_us.0, not_after_us.0, left])?;
            }
            tx.commit().map(Ok)
        };
        write().map_err(|e| self.fault(e))
    }

    /// Every key of such an agent whose certificate holds at `now`.
    pub fn guests(&self, now: Timestamp) -> Result<Vec<Guest>, CaError> {
        let sql =
            "SELECT workload, instance, serial, spki, not_before, not_after, left_at FROM guests WHERE not_after > ?1
                   ORDER BY workload, instance, not_before";
        let mut rows = self.db.prepare(sql).map_err(|e| self.fault(e))?;
        let found = rows.query_map([now.0], |row| {
            let name = format!("{}#{}", row.get::<_, String>(0)?, row.get::<_, String>(1)?);
            let (serial, spki) = (row.get(2)?, Sha256(row.get(3)?));
            let (not_before_us, not_after_us) = (Timestamp(row.get(4)?), Timestamp(row.get(5)?));
            let left_us = row.get::<_, Option<i64>>(6)?.map(Timestamp);
            Ok(name.parse().ok().map(|agent| Guest { agent, serial, spki, not_before_us, not_after_us, left_us }))
        });
        let found: Result<Vec<Option<Guest>>, _> = found.map_err(|e| self.fault(e))?.collect();
        Ok(found.map_err(|e| self.fault(e))?.into_iter().flatten().collect())
    }

    /// The newest key of each such instance, and the directive that it has confirmed. As to roots they are all alike: none has a
    /// certificate of ours.
    pub fn guest_holders(&self, root: Sha256, now: Timestamp) -> Result<Vec<(Holder, Guest)>, CaError> {
        let sql = "SELECT directive FROM confirmed WHERE workload = ?1 AND instance = ?2";
        let mut newest: Vec<Guest> = self.guests(now)?;
        newest.reverse();
        newest.dedup_by(|older, newer| older.agent == newer.agent);
        let holder = |guest: Guest| {
            let names = [guest.agent.workload.as_str(), guest.agent.instance.as_str()];
            let confirmed = self.db.query_row(sql, names, |row| row.get::<_, i64>(0)).optional();
            let confirmed = u64::try_from(confirmed.map_err(|e| self.fault(e))?.unwrap_or(0)).unwrap_or(0);
            let (agent, spki, not_after) = (guest.agent.clone(), guest.spki, guest.not_after_us);
            Ok((Holder { agent, spki, not_after, confirmed, root }, guest))
        };
        newest.into_iter().rev().map(holder).collect()
    }

    /// Those that a rotation waits for, because they believe the next directive by our roots: of other trust domains than
    /// `own`, whose CA signs directives as well, and not gone for long.
    pub fn waiting_guests(&self, own: &TrustDomain, active: Sha256, now: Timestamp) -> Result<Vec<Holder>, CaError> {
        let is_here = |guest: &Guest| guest.left_us.is_none_or(|left| now.since(left) < AWAY);
        let waits = |guest: &Guest| guest.agent.workload.trust_domain() != *own && is_here(guest);
        let all = self.guest_holders(active, now)?;
        Ok(all.into_iter().filter(|(_, guest)| waits(guest)).map(|(holder, _)| holder).collect())
    }

    /// Which other instances have a key in common with `agent`: what is done about its keys is done to them.
    pub fn sharers(&self, agent: &AgentId, now: Timestamp) -> Result<Vec<AgentId>, CaError> {
        let sql = "SELECT DISTINCT o.workload, o.instance FROM guests g JOIN guests o ON o.spki = g.spki
                   WHERE g.workload = ?1 AND g.instance = ?2 AND g.not_after > ?3
                   AND (o.workload <> g.workload OR o.instance <> g.instance) ORDER BY 1, 2";
        let mut rows = self.db.prepare_cached(sql).map_err(|e| self.fault(e))?;
        let names = rows.query_map(params![agent.workload.as_str(), agent.instance.as_str(), now.0], |row| {
            Ok(format!("{}#{}", row.get::<_, String>(0)?, row.get::<_, String>(1)?).parse().ok())
        });
        let names: Result<Vec<Option<AgentId>>, _> = names.map_err(|e| self.fault(e))?.collect();
        Ok(names.map_err(|e| self.fault(e))?.into_iter().flatten().collect())
    }
}

/// A key that is known needs no room.
fn find_room(db: &Connection, workload: &str, instance: &str, spki: Sha256) -> rusqlite::Result<Result<(), NoRoom>> {
    let known = "SELECT EXISTS (SELECT 1 FROM guests WHERE workload = ?1 AND instance = ?2 AND spki = ?3)";
    if db.query_row(known, params![workload, instance, spki.0], |row| row.get(0))? {
        return Ok(Ok(()));
    }
    let others = "SELECT count(DISTINCT instance) FROM guests WHERE workload = ?1 AND instance <> ?2";
    if db.query_row(others, [workload, instance], |row| row.get::<_, i64>(0))? >= MOST_INSTANCES {
        return Ok(Err(NoRoom::Instances));
    }
    let all = db.query_row("SELECT count(*) FROM guests", [], |row| row.get::<_, i64>(0))?;
    Ok(if all >= MOST_KEYS { Err(NoRoom::Keys) } else { Ok(()) })
}

#[cfg(test)]
mod tests {
    use sidewarden_proto::identity::PeerName;

    use super::*;

    const NOW: Timestamp = Timestamp::from_secs(1_000_000);
    const HOUR: Duration = Duration::from_secs(3600);

    fn register() -> (tempfile::TempDir, Register) {
        let dir = tempfile::tempdir().unwrap();
        let register = Register::open(&dir.path().join("ca.db")).unwrap();
        (dir, register)
    }

    fn agent(instance: &str) -> AgentId {
        format!("spiffe://example.org/shop/web#{instance}").parse().unwrap()
    }

    fn peer(key: u8, until: Timestamp) -> Peer {
        Peer {
            name: PeerName::Spiffe(agent("x").workload),
            spki: Sha256([key; 32]),
            serial: format!("{key:x}"),
            issuers: Default::default(),
            not_before: until.minus(HOUR),
            not_after: until,
        }
    }

    fn see(register: &Register, instance: &str, key: u8, until: Timestamp) -> Result<(), NoRoom> {
        register.guest_seen(&agent(instance), &peer(key, until), NOW).unwrap()
    }

    #[test]
    fn each_key_is_known_once_for_as_long_as_it_holds() {
        let (_dir, register) = register();
        for (instance, key, until) in [("a", 1, NOW.plus(HOUR)), ("a", 1, NOW.plus(HOUR)), ("a", 2, NOW.plus(HOUR * 2))]
        {
            see(&register, instance, key, until).unwrap();
        }
        let keys = |now| register.guests(now).unwrap().iter().map(|guest| guest.spki.0[0]).collect::<Vec<_>>();
        assert_eq!(keys(NOW), [1, 2]);
        assert_eq!(keys(NOW.plus(HOUR)), [2]);
        see(&register, "a", 1, NOW.plus(HOUR * 3)).unwrap();
        assert_eq!(keys(NOW.plus(HOUR * 2)), [1], "the same key with another certificate");
        see(&register, "a", 1, NOW.plus(HOUR)).unwrap();
        assert_eq!(keys(NOW.plus(HOUR * 2)), [1], "an older one does not take that back");
    }

    #[test]
    fn a_key_may_be_that_of_several_instances_and_that_is_known() {
        let (_dir, register) = register();
        for (instance, key) in [("a", 1), ("b", 1), ("c", 2), ("a", 3)] {
            see(&register, instance, key, NOW.plus(HOUR)).unwrap();
        }
        let sharers = |instance| register.sharers(&agent(instance), NOW).unwrap();
        assert_eq!(sharers("a"), [agent("b")]);
        assert_eq!(sharers("b"), [agent("a")]);
        assert!(sharers("c").is_empty());
        assert!(register.sharers(&agent("a"), NOW.plus(HOUR)).unwrap().is_empty(), "their time is over");
    }

    #[test]
    fn names_that_are_made_up_find_an_end() {
        let (_dir, register) = register();
        for number in 0..MOST_INSTANCES {
            see(&register, &format!("i{number}"), 1, NOW.plus(HOUR)).unwrap();
        }
        assert_eq!(see(&register, "one-more", 1, NOW.plus(HOUR)), Err(NoRoom::Instances));
        assert_eq!(see(&register, "i7", 2, NOW.plus(HOUR)), Ok(()), "who is known stays");
        let later = NOW.plus(HOUR * 3);
        register.guest_seen(&agent("later"), &peer(9, later.plus(HOUR)), later).unwrap().unwrap();
        assert_eq!(register.guests(later).unwrap().len(), 1, "what has ended makes room");
    }

    #[test]
    fn a_rotation_waits_for_those_of_other_domains_that_are_here_or_were_a_moment_ago() {
        let (_dir, register) = register();
        for (instance, key) in [("a", 1), ("a", 2), ("b", 3), ("gone", 4), ("long-gone", 5)] {
            see(&register, instance, key, NOW.plus(HOUR * 9)).unwrap();
        }
        register.confirm(&[(agent("a"), 7)]).unwrap();
        register.guest_left(&agent("gone"), NOW.minus(HOUR / 2)).unwrap();
        register.guest_left(&agent("long-gone"), NOW.minus(HOUR * 2)).unwrap();
        let (root, own, theirs) = (Sha256([9; 32]), "own.example".parse().unwrap(), "example.org".parse().unwrap());
        let waiting = |own: &TrustDomain, now| {
            let found = register.waiting_guests(own, root, now).unwrap();
            found.iter().map(|one| (one.agent.instance.to_string(), one.confirmed)).collect::<Vec<_>>()
        };
        let named = |list: &[(&str, u64)]| list.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect::<Vec<_>>();
        assert_eq!(waiting(&own, NOW), named(&[("a", 7), ("b", 0), ("gone", 0)]));
        assert!(waiting(&theirs, NOW).is_empty(), "directives are signed for those of our own domain");
        register.guests_left(NOW).unwrap();
        assert_eq!(waiting(&own, NOW.plus(HOUR * 2)), [], "nobody has come back after a restart");
        see(&register, "b", 3, NOW.plus(HOUR * 9)).unwrap();
        assert_eq!(waiting(&own, NOW.plus(HOUR * 2)), named(&[("b", 0)]));
    }
}
