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

/// Keys that the register holds at a time: a few for each of a hundred thousand agents. The same again for what other collectors
/// tell.
const MOST_KEYS: i64 = 400_000;
/// Instances of a workload that are here, or were a moment ago: whoever has its certificate may make names up.
const MOST_INSTANCES: i64 = 1_000;
/// Keys of a workload, those of instances that are long gone included.
const MOST_OF_WORKLOAD: i64 = 20_000;
/// Clocks differ: a key is known this much longer than its certificate holds.
const LEEWAY: Duration = Duration::from_secs(3600);
/// Who has been away for longer is waited for no more, and counts no more: its certificate may hold for a year, and its container be
/// long gone.
const AWAY: Duration = Duration::from_secs(3600);

/// Somebody who found no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    /// In the whole register.
    #[error("the register holds {MOST_KEYS} keys of certificates that were not issued here, and takes no more")]
    Keys,
    /// Of this workload.
    #[error("{MOST_INSTANCES} instances of this workload are here, and none is taken in any more")]
    Instances,
    /// Of this workload, over time.
    #[error("{MOST_OF_WORKLOAD} keys of this workload are known whose certificates hold, and no more are taken in")]
    OfWorkload,
}

impl Register {
    /// Notes the key of `agent`, who has shown a certificate of somebody else's CA. One that is known costs no writing.
    pub fn guest_seen(&self, agent: &AgentId, peer: &Peer, now: Timestamp) -> Result<Result<(), NoRoom>, CaError> {
        let Peer { spki, serial, not_before, not_after, .. } = peer.clone();
        let (agent, left_us) = (agent.clone(), None);
        let guest = Guest { agent, serial, spki, not_before_us: not_before, not_after_us: not_after, left_us };
        let write = || {
            if is_known(&self.db, &guest)? {
                return Ok(Ok(()));
            }
            let tx = self.db.unchecked_transaction()?;
            let put = put(&tx, &guest, false, now)?;
            tx.commit().map(|()| put)
        };
        write().map_err(|e| self.fault(e))
    }

    /// Notes who has come and who has left since this was noted last.
    pub fn note_guests(&self, come: &[AgentId], left: &[AgentId], now: Timestamp) -> Result<(), CaError> {
        if come.is_empty() && left.is_empty() {
            return Ok(());
        }
        let write = || {
            let tx = self.db.unchecked_transaction()?;
            let sql = "UPDATE guests SET left_at = ?3 WHERE workload = ?1 AND instance = ?2 AND NOT elsewhere";
            for (agents, at) in [(come, None), (left, Some(now.0))] {
                for agent in agents {
                    tx.execute(sql, params![agent.workload.as_str(), agent.instance.as_str(), at])?;
                }
            }
            tx.commit()
        };
        write().map_err(|e| self.fault(e))
    }

    /// At a start nobody is here.
    pub fn guests_left(&self, now: Timestamp) -> Result<(), CaError> {
        let sql = "UPDATE guests SET left_at = ?1 WHERE left_at IS NULL AND NOT elsewhere";
        self.db.execute(sql, [now.0]).map(drop).map_err(|e| self.fault(e))
    }

    /// The last other collector is given up: nobody can say any more who is there.
    pub(super) fn guests_elsewhere_left(&self, now: Timestamp) -> Result<(), CaError> {
        let sql = "UPDATE guests SET left_at = ?1 WHERE left_at IS NULL AND elsewhere";
        self.db.execute(sql, [now.0]).map(drop).map_err(|e| self.fault(e))
    }

    /// Takes in what another collector tells of such agents, all in one transaction; what finds no room is left out.
    pub(super) fn take_guests(&self, guests: &[Guest], now: Timestamp) -> Result<(), CaError> {
        if guests.is_empty() {
            return Ok(());
        }
        let write = || {
            let tx = self.db.unchecked_transaction()?;
            let mut left_out = None;
            for guest in guests {
                if let Err(full) = put(&tx, guest, true, now)? {
                    left_out = Some(full);
                }
            }
            tx.commit().map(|()| left_out)
        };
        if let Some(full) = write().map_err(|e| self.fault(e))? {
            tracing::warn!(%full, "what another collector tells of its agents was not taken in as a whole");
        }
        Ok(())
    }

    /// Every key of such an agent whose certificate holds at `now`, as this collector has seen it.
    pub fn guests(&self, now: Timestamp) -> Result<Vec<Guest>, CaError> {
        self.select_guests("NOT elsewhere", now)
    }

    fn select_guests(&self, which: &str, now: Timestamp) -> Result<Vec<Guest>, CaError> {
        let sql = format!(
            "SELECT workload, instance, serial, spki, not_before, not_after, left_at FROM guests
             WHERE not_after > ?1 AND {which} ORDER BY workload, instance, not_before"
        );
        let mut rows = self.db.prepare(&sql).map_err(|e| self.fault(e))?;
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

    /// Such instances wherever they are: the newest key of each, the directive that it has confirmed, and whether it is here or was a
    /// moment ago. As to roots they are all alike: none has a certificate of ours.
    pub fn guest_holders(&self, root: Sha256, now: Timestamp) -> Result<Vec<(Holder, bool)>, CaError> {
        let sql = "SELECT directive FROM confirmed WHERE workload = ?1 AND instance = ?2";
        let mut newest: Vec<(Guest, bool)> = Vec::new();
        for guest in self.select_guests("true", now)? {
            let is_here = guest.left_us.is_none_or(|left| now.since(left) < AWAY);
            match newest.last_mut() {
                Some((last, was_here)) if last.agent == guest.agent => {
                    (*last, *was_here) = (guest, is_here || *was_here)
                }
                _ => newest.push((guest, is_here)),
            }
        }
        let holder = |(guest, is_here): (Guest, bool)| {
            let names = [guest.agent.workload.as_str(), guest.agent.instance.as_str()];
            let confirmed = self.db.query_row(sql, names, |row| row.get::<_, i64>(0)).optional();
            let confirmed = u64::try_from(confirmed.map_err(|e| self.fault(e))?.unwrap_or(0)).unwrap_or(0);
            let Guest { agent, spki, not_after_us: not_after, .. } = guest;
            Ok((Holder { agent, spki, not_after, confirmed, root }, is_here))
        };
        newest.into_iter().map(holder).collect()
    }

    /// Those that a rotation waits for, because they believe the next directive by our roots: of other trust domains than
    /// `own`, whose CA signs directives as well, and not gone for long.
    pub fn waiting_guests(&self, own: &TrustDomain, active: Sha256, now: Timestamp) -> Result<Vec<Holder>, CaError> {
        let all = self.guest_holders(active, now)?.into_iter();
        let waits = |(holder, is_here): &(Holder, bool)| *is_here && holder.agent.workload.trust_domain() != *own;
        Ok(all.filter(waits).map(|(holder, _)| holder).collect())
    }

    /// Whether an instance has a certificate of another CA that holds.
    pub fn is_guest(&self, agent: &AgentId, now: Timestamp) -> Result<bool, CaError> {
        let sql = "SELECT EXISTS (SELECT 1 FROM guests WHERE workload = ?1 AND instance = ?2 AND not_after > ?3)";
        let values = params![agent.workload.as_str(), agent.instance.as_str(), now.0];
        self.db.query_row(sql, values, |row| row.get(0)).map_err(|e| self.fault(e))
    }

    /// Which other instances that are here, or were a moment ago, have a key in common with `agent`: what is done about its keys
    /// is done to them.
    pub fn sharers(&self, agent: &AgentId, now: Timestamp) -> Result<Vec<AgentId>, CaError> {
        let sql = "SELECT DISTINCT o.workload, o.instance FROM guests g JOIN guests o ON o.spki = g.spki
                   WHERE g.workload = ?1 AND g.instance = ?2 AND g.not_after > ?3 AND (o.left_at IS NULL OR o.left_at > ?4)
                   AND (o.workload <> g.workload OR o.instance <> g.instance) ORDER BY 1, 2";
        let mut rows = self.db.prepare_cached(sql).map_err(|e| self.fault(e))?;
        let values = params![agent.workload.as_str(), agent.instance.as_str(), now.0, now.minus(AWAY).0];
        let names = rows.query_map(values, |row| {
            Ok(format!("{}#{}", row.get::<_, String>(0)?, row.get::<_, String>(1)?).parse().ok())
        });
        let names: Result<Vec<Option<AgentId>>, _> = names.map_err(|e| self.fault(e))?.collect();
        Ok(names.map_err(|e| self.fault(e))?.into_iter().flatten().collect())
    }
}

/// Whether this very certificate was noted.
fn is_known(db: &Connection, guest: &Guest) -> rusqlite::Result<bool> {
    let sql =
        "SELECT EXISTS (SELECT 1 FROM guests WHERE workload = ?1 AND instance = ?2 AND spki = ?3 AND NOT elsewhere
               AND not_after >= ?4)";
    let (workload, instance) = (guest.agent.workload.as_str(), guest.agent.instance.as_str());
    db.query_row(sql, params![workload, instance, guest.spki.0, guest.not_after_us.0], |row| row.get(0))
}

fn put(db: &Connection, guest: &Guest, elsewhere: bool, now: Timestamp) -> rusqlite::Result<Result<(), NoRoom>> {
    db.execute("DELETE FROM guests WHERE not_after < ?1", [now.minus(LEEWAY).0])?;
    if let Err(full) = find_room(db, guest, elsewhere, now)? {
        return Ok(Err(full));
    }
    let sql = "INSERT INTO guests (workload, instance, spki, serial, not_before, not_after, left_at, elsewhere)
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT DO UPDATE SET left_at = excluded.left_at,
               serial = iif(excluded.not_after > not_after, excluded.serial, serial),
               not_before = iif(excluded.not_after > not_after, excluded.not_before, not_before),
               not_after = max(excluded.not_after, not_after)";
    let (workload, instance) = (guest.agent.workload.as_str(), guest.agent.instance.as_str());
    let Guest { serial, spki, not_before_us, not_after_us, left_us, .. } = guest;
    let (dates, left) = ((not_before_us.0, not_after_us.0), left_us.map(|left| left.0));
    db.execute(sql, params![workload, instance, spki.0, serial, dates.0, dates.1, left, elsewhere])?;
    Ok(Ok(()))
}

/// A key that is known needs no room.
fn find_room(db: &Connection, guest: &Guest, elsewhere: bool, now: Timestamp) -> rusqlite::Result<Result<(), NoRoom>> {
    let (workload, instance) = (guest.agent.workload.as_str(), guest.agent.instance.as_str());
    let known =
        "SELECT EXISTS (SELECT 1 FROM guests WHERE workload = ?1 AND instance = ?2 AND spki = ?3 AND elsewhere = ?4)";
    if db.query_row(known, params![workload, instance, guest.spki.0, elsewhere], |row| row.get(0))? {
        return Ok(Ok(()));
    }
    let count = |sql: &str, values: &[&dyn rusqlite::ToSql]| db.query_row(sql, values, |row| row.get::<_, i64>(0));
    let here = "SELECT count(DISTINCT instance) FROM guests WHERE workload = ?1 AND elsewhere = ?2 AND instance <> ?3
                AND (left_at IS NULL OR left_at > ?4)";
    if count(here, &[&workload, &elsewhere, &instance, &now.minus(AWAY).0])? >= MOST_INSTANCES {
        return Ok(Err(NoRoom::Instances));
    }
    let of_workload = "SELECT count(*) FROM guests WHERE workload = ?1 AND elsewhere = ?2";
    if count(of_workload, &[&workload, &elsewhere])? >= MOST_OF_WORKLOAD {
        return Ok(Err(NoRoom::OfWorkload));
    }
    let all = count("SELECT count(*) FROM guests WHERE elsewhere = ?1", &[&elsewhere])?;
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
    fn who_is_long_gone_shares_nothing_and_takes_no_room() {
        let (_dir, register) = register();
        for number in 0..MOST_INSTANCES {
            see(&register, &format!("pod-{number}"), 1, NOW.plus(HOUR * 1000)).unwrap();
        }
        assert_eq!(see(&register, "next", 1, NOW.plus(HOUR * 1000)), Err(NoRoom::Instances));
        let pods: Vec<AgentId> = (0..MOST_INSTANCES).map(|number| agent(&format!("pod-{number}"))).collect();
        register.note_guests(&[], &pods[1..], NOW.minus(HOUR * 2)).unwrap();
        see(&register, "next", 1, NOW.plus(HOUR * 1000)).unwrap();
        assert_eq!(register.sharers(&agent("next"), NOW).unwrap(), [agent("pod-0")]);
        register.note_guests(&pods[5..6], &[], NOW).unwrap();
        assert_eq!(register.sharers(&agent("next"), NOW).unwrap(), [agent("pod-0"), agent("pod-5")], "it is back");
    }

    #[test]
    fn what_another_collector_tells_has_a_room_of_its_own_and_changes_nothing_that_is_known_here() {
        let (_dir, register) = register();
        see(&register, "a", 1, NOW.plus(HOUR * 9)).unwrap();
        let told = |instance: &str, key: u8, left_us| Guest {
            agent: agent(instance),
            serial: "1".into(),
            spki: Sha256([key; 32]),
            not_before_us: NOW,
            not_after_us: NOW.plus(HOUR * 9),
            left_us,
        };
        let made_up: Vec<Guest> = (0..=MOST_INSTANCES).map(|number| told(&format!("x{number}"), 9, None)).collect();
        register.take_guests(&made_up, NOW).unwrap();
        see(&register, "b", 2, NOW.plus(HOUR * 9)).unwrap();
        assert_eq!(register.guests(NOW).unwrap().len(), 2, "ours are not theirs");
        register.take_guests(&[told("a", 1, Some(NOW.minus(HOUR * 5)))], NOW).unwrap();
        let is_here = |name: &str, now| {
            let all = register.guest_holders(Sha256::ZERO, now).unwrap();
            all.iter().find(|(holder, _)| holder.agent == agent(name)).map(|(_, is_here)| *is_here)
        };
        assert_eq!(is_here("a", NOW), Some(true), "it has left there, and is here");
        register.guests_left(NOW).unwrap();
        assert_eq!((is_here("a", NOW.plus(HOUR * 2)), is_here("x7", NOW.plus(HOUR * 2))), (Some(false), Some(true)));
        register.guests_elsewhere_left(NOW).unwrap();
        assert_eq!(is_here("x7", NOW.plus(HOUR * 2)), Some(false));
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
        register.note_guests(&[], &[agent("gone")], NOW.minus(HOUR / 2)).unwrap();
        register.note_guests(&[], &[agent("long-gone")], NOW.minus(HOUR * 2)).unwrap();
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
        register.note_guests(&[agent("b")], &[], NOW.plus(HOUR * 2)).unwrap();
        assert_eq!(waiting(&own, NOW.plus(HOUR * 2)), named(&[("b", 0)]));
    }
}
