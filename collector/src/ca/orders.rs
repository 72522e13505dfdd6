//! What commands ask of the running collector: steps of a rotation, and certificates for clients without an agent.
//!
//! An order is a row in the register, which only the collector's own user can write; the collector looks once a second,
//! takes it, carries it out, and puts the reply beside it. What is taken is taken once: a step that was carried out and could
//! not be answered is not carried out again. So there is no further door, and everything stays in one hand: the keys
//! in the collector's memory, the bundle, the directive and the collector's own certificate change together.

use std::sync::Arc;
use std::time::Duration;

use rusqlite::{OptionalExtension, params};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use sidewarden_proto::directive::{Directive, Renew};
use sidewarden_proto::enrol::Der;
use sidewarden_proto::event::{Body, CaIssued, CaRotated, Event, Severity};
use sidewarden_proto::identity::{Peer, PeerName, Sha256, SpiffeId, Usage};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls;

use super::holders::{Outside, outside_missing};
use super::issue::read_request;
use super::member::{self, Member};
use super::rotate::{self, Missing, Step};
use super::tokens::is_reserved;
use super::{CaError, Issuer, Register, pem};
use crate::fleet::{self, Directives, Roots};

/// An order that nobody has taken by then is taken by nobody.
const STALE: Duration = Duration::from_secs(30);
/// Agents renew spread over one second for each so many of them.
const RENEWALS_PER_SECOND: usize = 50;
/// Names in an event; the count is always whole.
const MAX_NAMED: usize = 50;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// A step of a rotation.
    Rotate {
        /// Which.
        step: Step,
        /// Take it even if agents are left behind.
        force: bool,
    },
    /// An issuing CA for another collector.
    SignMember {
        /// Its request (PKCS#10).
        csr: Der,
    },
    /// Another collector is gone for good: nothing waits for it.
    ForgetMember {
        /// The serial number of its issuing CA.
        serial: String,
    },
    /// A certificate for a client without an agent.
    Issue {
        /// Its request (PKCS#10).
        csr: Der,
        /// The SPIFFE ID it gets.
        name: SpiffeId,
        /// DNS names and addresses it gets as well.
        names: Vec<String>,
        /// How long it lives, seconds.
        life_secs: u64,
        /// Also if agents bear this name.
        although_agents: bool,
    },
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The step is taken; these are left behind, or will be unless they come in time.
    Rotated {
        /// Who.
        left: Vec<Missing>,
    },
    /// The step is not taken, because of these.
    Waits {
        /// Who.
        missing: Vec<Missing>,
    },
    /// A chain in PEM, leaf first, root last.
    Issued {
        /// The chain.
        pem: String,
    },
    /// It is done, and there is nothing to say.
    Done,
    /// No.
    Refused {
        /// Why, and what to do.
        why: String,
    },
}

fn refused(why: impl ToString) -> Reply {
    Reply::Refused { why: why.to_string() }
}

impl Register {
    /// Leaves an order for the running collector.
    pub fn order(&self, order: &Order, now: Timestamp) -> Result<i64, CaError> {
        let text = serde_json::to_string(order).expect("orders have string keys and no failing serializer");
        let sql = "INSERT INTO orders (at, text) VALUES (?1, ?2)";
        self.db.execute(sql, params![now.0, text]).map_err(|e| self.fault(e))?;
        Ok(self.db.last_insert_rowid())
    }

    /// The reply to an order, once there is one.
    pub fn reply(&self, id: i64) -> Result<Option<Reply>, CaError> {
        let row = self.db.query_row("SELECT reply FROM orders WHERE id = ?1", [id], |row| row.get(0)).optional();
        let text: Option<String> = row.map_err(|e| self.fault(e))?.flatten();
        Ok(text
            .map(|text| serde_json::from_str(&text).unwrap_or_else(|e| refused(format!("an unreadable reply: {e}")))))
    }

    /// Takes an order back; false when it is already answered, or taken.
    pub fn withdraw(&self, id: i64) -> Result<bool, CaError> {
        let deleted = self.db.execute("DELETE FROM orders WHERE id = ?1 AND reply IS NULL AND taken = 0", [id]);
        deleted.map(|count| count > 0).map_err(|e| self.fault(e))
    }

    fn next_order(&self, now: Timestamp) -> Result<Option<(i64, Order)>, CaError> {
        let stale = "DELETE FROM orders WHERE reply IS NULL AND taken = 0 AND abs(?1 - at) > ?2";
        let stale_us = i64::try_from(STALE.as_micros()).unwrap_or(i64::MAX);
        let sql = "SELECT id, text FROM orders WHERE reply IS NULL AND taken = 0 ORDER BY id LIMIT 1";
        let waiting: Option<(i64, String)> =
            self.db.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?))).optional().map_err(|e| self.fault(e))?;
        let Some((id, text)) = waiting else { return Ok(None) };
        if self.db.execute(stale, params![now.0, stale_us]).map_err(|e| self.fault(e))? > 0 {
            return Ok(None);
        }
        // Whoever has left it may have taken it back since it was read.
        let take = "UPDATE orders SET taken = 1 WHERE id = ?1 AND taken = 0";
        if self.db.execute(take, [id]).map_err(|e| self.fault(e))? == 0 {
            return Ok(None);
        }
        match serde_json::from_str(&text) {
            Ok(order) => Ok(Some((id, order))),
            Err(error) => {
                self.put_reply(id, &refused(format!("this collector does not know the order: {error}")))?;
                Ok(None)
            }
        }
    }

    fn put_reply(&self, id: i64, reply: &Reply) -> Result<(), CaError> {
        let text = serde_json::to_string(reply).expect("replies have string keys and no failing serializer");
        // Only the newest are of use to anybody.
        let sql = "UPDATE orders SET reply = ?2 WHERE id = ?1";
        self.db.execute(sql, params![id, text]).map_err(|e| self.fault(e))?;
        self.db.execute("DELETE FROM orders WHERE id < ?1 - 100", [id]).map(drop).map_err(|e| self.fault(e))
    }
}

/// Carries out the oldest order, if there is one; what is to be told.
pub fn carry_out(issuer: &Issuer, directives: &Directives, now: Timestamp) -> Result<Vec<Event>, CaError> {
    let Some((id, order)) = issuer.register().next_order(now)? else { return Ok(Vec::new()) };
    let (reply, event) = match order {
        Order::Rotate { step, force } => turn(issuer, directives, step, force, now),
        Order::SignMember { csr } => match sign_member(issuer, &csr.0, None, now) {
            Ok((chain, event)) => (Reply::Issued { pem: chain.iter().map(pem).collect() }, Some(event)),
            Err(error) => (refused(error), None),
        },
        Order::ForgetMember { serial } => match issuer.register().forget_member(&serial, now) {
            Ok(true) => (Reply::Done, None),
            Ok(false) => (refused(format!("nothing waits for an issuing CA {serial}: see `ca member list`")), None),
            Err(error) => (refused(error), None),
        },
        Order::Issue { csr, name, names, life_secs, although_agents } => {
            let life = Duration::from_secs(life_secs);
            issue(issuer, &Ask { csr: &csr.0, name: &name, names: &names, life, although_agents }, now)
        }
    };
    // It is done, and told, even if nobody gets the answer.
    if let Err(error) = issuer.register().put_reply(id, &reply) {
        tracing::error!(%error, ?reply, "an order was carried out, and its reply could not be kept");
    }
    Ok(event.into_iter().collect())
}

/// Whom `step` would leave behind now. `active` is the root that issues now or, before it is activated, the one that
/// does at the time.
pub fn missing(
    register: &Register,
    directive: &Directive,
    active: Sha256,
    step: Step,
    grace: Duration,
    now: Timestamp,
) -> Result<Vec<Missing>, CaError> {
    let mut holders = register.holders(grace, now)?;
    holders.extend(register.waiting_guests(&directive.trust_domain, active, now)?);
    // Whoever is revoked is not waited for; whoever is quarantined stays in touch, and follows like everybody.
    holders.retain(|holder| {
        let name = PeerName::Spiffe(holder.agent.workload.clone());
        let (serial, not_before, not_after, issuers) = (String::new(), now, now, Arc::default());
        let peer = Peer { name, spki: holder.spki, serial, not_before, not_after, issuers };
        directive.revokes(&peer).is_none() && directive.revokes_agent(&holder.agent).is_none()
    });
    let mut missing = rotate::missing(&holders, step, directive.version, active, grace, now);
    let mut members = register.members(now)?;
    // The agents of one whose root has left are out with it.
    members.retain(|member| {
        directive.bundle.iter().any(|root| tls::spki_of(&root.0.as_slice().into()).ok() == Some(member.root))
    });
    missing.extend(member::missing(&members, step, directive, active));
    if step == Step::Retire {
        missing.extend(outside_missing(&register.outside(now)?, active));
    }
    Ok(missing)
}

fn turn(issuer: &Issuer, directives: &Directives, step: Step, force: bool, now: Timestamp) -> (Reply, Option<Event>) {
    let in_force = directives.now();
    let active = issuer.authority().pin();
    let before = missing(&issuer.register(), &in_force.directive, active, step, issuer.grace(), now);
    let before = match before {
        Ok(missing) => missing,
        Err(error) => return (refused(error), None),
    };
    if let Err(out_of_turn) = rotate::after(&issuer.authority().entries(), step, now) {
        return (refused(out_of_turn), None);
    }
    if !force && before.iter().any(|missing| !missing.away) {
        return (Reply::Waits { missing: before }, None);
    }
    match take(issuer, directives, step, now) {
        Ok(()) => {
            let event = rotated(issuer, step, force, &before, now);
            (Reply::Rotated { left: before }, Some(event))
        }
        Err(error) => {
            tracing::error!(%error, step = step.word(), "a step of the CA's rotation failed");
            (refused(error), None)
        }
    }
}

/// Takes the step, and tells the agents.
fn take(issuer: &Issuer, directives: &Directives, step: Step, now: Timestamp) -> anyhow::Result<()> {
    let authority = issuer.authority();
    let before = authority.own().borrow().clone();
    if step == Step::Retire {
        // Roots that leave say nothing of connections that stand: those of a thief must end as well.
        fleet::deny_issuers(
            directives,
            &before,
            &authority.compromised(),
            "its CA was replaced after a compromise",
            now,
        )?;
    }
    let ready = authority.ready(step, now)?;
    let roots = roots_of(issuer, ready.bundle(), ready.tainted(), now)?;
    // Agents have not heard of the new root when it issues at once: they only believe what the old one vouches for.
    let own = if step == Step::Compromise { before } else { ready.own().clone() };
    // A root that issues and that nobody can be told of would lock everybody out; and who is told to renew must get a
    // certificate of the new one at once.
    directives.set_roots(roots, &own, now, || ready.take())?;
    tracing::warn!(step = step.word(), pin = %authority.pin(), "a step of the CA's rotation was taken");
    Ok(())
}

/// What directives say of the roots now.
pub fn roots(issuer: &Issuer, now: Timestamp) -> Result<Roots, CaError> {
    roots_of(issuer, issuer.authority().bundle(), issuer.authority().tainted(), now)
}

fn roots_of(issuer: &Issuer, bundle: Vec<Der>, roots: Vec<Sha256>, now: Timestamp) -> Result<Roots, CaError> {
    let holders = issuer.register().holders(Duration::ZERO, now)?.len();
    let within_secs = u32::try_from(holders / RENEWALS_PER_SECOND).unwrap_or(u32::MAX).clamp(1, 600);
    let within_secs = if roots.is_empty() { 0 } else { within_secs };
    Ok(Roots { bundle, renew: Renew { roots, within_secs } })
}

/// Signs an issuing CA for another collector, in place of the one with the key `replaces`: the chain, and what is told.
pub fn sign_member(
    issuer: &Issuer,
    csr: &[u8],
    replaces: Option<Sha256>,
    now: Timestamp,
) -> Result<(Vec<CertificateDer<'static>>, Event), CaError> {
    let authority = issuer.authority();
    let chain = authority.sign_member(csr, now)?;
    let member = Member::of(&chain)?;
    issuer.register().record_member(&member, replaces, now)?;
    let (name, not_after_us) = (tls::collector_id(authority.domain()), member.not_after);
    let (severity, whose) = match replaces {
        Some(_) => (Severity::Notice, "the next issuing CA of"),
        None => (Severity::Critical, "an issuing CA for"),
    };
    let summary = format!("{whose} another collector was signed, until {not_after_us}");
    let (serial, spki) = (member.serial, member.spki.to_string());
    let body = CaIssued { name, names: Vec::new(), serial, spki, not_after_us };
    Ok((chain, Event::new(now, severity, summary, &Body::from(body))))
}

fn rotated(issuer: &Issuer, step: Step, force: bool, left: &[Missing], now: Timestamp) -> Event {
    let body = CaRotated {
        step: step.word().to_owned(),
        forced: force,
        active: issuer.authority().pin().to_string(),
        left_behind: left.len() as u64,
        named: left.iter().take(MAX_NAMED).map(|missing| missing.who.clone()).collect(),
    };
    let severity = if force || step == Step::Compromise { Severity::Critical } else { Severity::Warning };
    let summary = format!("the CA's rotation took the step `{}`, {} left behind", step.word(), left.len());
    Event::new(now, severity, summary, &Body::from(body))
}

/// What [`issue`] is asked.
struct Ask<'a> {
    csr: &'a [u8],
    name: &'a SpiffeId,
    names: &'a [String],
    life: Duration,
    although_agents: bool,
}

fn issue(issuer: &Issuer, ask: &Ask<'_>, now: Timestamp) -> (Reply, Option<Event>) {
    match try_issue(issuer, ask, now) {
        Ok((pem, event)) => (Reply::Issued { pem }, Some(event)),
        Err(error) => (refused(error), None),
    }
}

fn try_issue(issuer: &Issuer, ask: &Ask<'_>, now: Timestamp) -> anyhow::Result<(String, Event)> {
    let authority = issuer.authority();
    // The leader would know nothing of it: its rotation would not wait for it.
    if authority.is_member() {
        anyhow::bail!(
            "certificates for clients without an agent are issued by the collector that ca.leader names: ask there"
        );
    }
    let path = ask.name.path();
    if ask.name.trust_domain() != *authority.domain() {
        anyhow::bail!("{} is not of trust domain {}", ask.name, authority.domain());
    }
    if is_reserved(path) {
        return Err(CaError::Reserved(path.to_owned()).into());
    }
    if !ask.although_agents && issuer.register().is_an_agents(ask.name.as_str(), path, now)? {
        anyhow::bail!(
            "{} is a name that agents bear: whoever has this certificate could pass for the service; take another name, or say --although-agents-bear-it",
            ask.name
        );
    }
    let (key, spki) = read_request(ask.csr).map_err(|refused| anyhow::anyhow!(refused.detail))?;
    let chain = authority.sign(ask.name, None, ask.names, &key, ask.life, now)?;
    let peer = tls::peer_of(&chain, Usage::Client)?;
    let (serial, name, not_after) = (peer.serial, ask.name.to_string(), peer.not_after);
    let root = chain.last().map(tls::spki_of).transpose()?.unwrap_or(authority.pin());
    let outside = Outside { serial, spki, name, not_after, root };
    issuer.register().record_outside(&outside, now)?;
    let summary = format!("a certificate for {} went to a client without an agent, until {not_after}", ask.name);
    let body = CaIssued {
        name: ask.name.clone(),
        names: ask.names.to_vec(),
        serial: outside.serial,
        spki: spki.to_string(),
        not_after_us: not_after,
    };
    let event = Event::new(now, Severity::Notice, summary, &Body::from(body));
    Ok((chain.iter().map(pem).collect(), event))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rustls::pki_types::CertificateSigningRequestDer;
    use rustls::pki_types::pem::PemObject;
    use sidewarden_proto::identity::TrustDomain;

    use super::*;
    use crate::ca::{Authority, Terms, Vault};

    const NOW: Timestamp = Timestamp::from_secs(1_000_000);

    fn register() -> (tempfile::TempDir, Register) {
        let dir = tempfile::tempdir().unwrap();
        let register = Register::open(&dir.path().join("ca.db")).unwrap();
        (dir, register)
    }

    fn prepare() -> Order {
        Order::Rotate { step: Step::Prepare, force: false }
    }

    #[test]
    fn an_order_is_taken_once_and_what_is_taken_cannot_be_taken_back() {
        let (_dir, register) = register();
        let (first, second) = (register.order(&prepare(), NOW).unwrap(), register.order(&prepare(), NOW).unwrap());
        assert_eq!(register.next_order(NOW).unwrap(), Some((first, prepare())));
        assert!(!register.withdraw(first).unwrap(), "it is under way");
        // The process ended before it was answered, or the answer could not be kept.
        assert_eq!(register.next_order(NOW).unwrap(), Some((second, prepare())));
        assert_eq!(register.next_order(NOW).unwrap(), None);
        register.put_reply(first, &refused("late")).unwrap();
        assert_eq!(register.reply(first).unwrap(), Some(refused("late")), "and the answer finds it");
        let third = register.order(&prepare(), NOW).unwrap();
        assert!(register.withdraw(third).unwrap() && register.next_order(NOW).unwrap().is_none());
    }

    #[test]
    fn an_order_that_nobody_took_in_time_is_taken_by_nobody() {
        let (_dir, register) = register();
        let id = register.order(&prepare(), NOW).unwrap();
        assert_eq!(register.next_order(NOW.plus(STALE + Duration::from_secs(1))).unwrap(), None);
        assert_eq!(register.next_order(NOW).unwrap(), None);
        assert!(!register.withdraw(id).unwrap());
    }

    #[test]
    fn a_collector_that_follows_issues_nothing_to_clients_without_an_agent() {
        let (first, second, now) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Timestamp::now());
        let (domain, vault) = ("x.example".parse::<TrustDomain>().unwrap(), Vault::default());
        let open = |dir: &Path| {
            let terms = Terms { domain: domain.clone(), names: vec![], own_life: STALE, vault: Vault::default() };
            Authority::open(dir, terms, now).unwrap().0
        };
        let pem = member::request(second.path(), &vault).unwrap();
        let csr = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).unwrap();
        let chain = open(first.path()).sign_member(&csr, now).unwrap();
        member::install(second.path(), &chain, &domain, &vault, now).unwrap();
        for (dir, refused) in [(first.path(), false), (second.path(), true)] {
            let register = Register::open(&dir.join("ca.db")).unwrap();
            let issuer = Issuer::new(Arc::new(open(dir)), register, STALE, STALE);
            let name = domain.workload("monitoring/probe").unwrap();
            let ask = Ask { csr: &csr, name: &name, names: &[], life: STALE, although_agents: false };
            let answer = try_issue(&issuer, &ask, now).map(drop).map_err(|error| error.to_string());
            assert_eq!(answer.is_err(), refused, "{answer:?}");
            assert!(answer.err().is_none_or(|error| error.contains("ca.leader")));
        }
    }

    #[test]
    fn a_register_of_before_gets_its_new_column() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.db");
        let old = "CREATE TABLE orders (id INTEGER PRIMARY KEY, at INTEGER NOT NULL, text TEXT NOT NULL, reply TEXT);";
        rusqlite::Connection::open(&path).unwrap().execute_batch(old).unwrap();
        let register = Register::open(&path).unwrap();
        let id = register.order(&prepare(), NOW).unwrap();
        assert_eq!(register.next_order(NOW).unwrap(), Some((id, prepare())));
    }
}
