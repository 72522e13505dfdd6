//! A further collector of the same trust domain: its own issuing CA under the same root, whose key it never has.
//!
//! The new collector makes a key and a request, the one with the root's key signs an issuing CA for it, and the new one
//! takes that in. The key does not travel. Of the request nothing but its key counts. The first time, people carry both by
//! hand (`ca member`); from then on the collectors do, over their own connection (`fleet::follow`).

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair};
use rusqlite::params;
use rustls::pki_types::CertificateDer;
use sidewarden_proto::directive::Directive;
use sidewarden_proto::identity::{AgentId, InstanceId, Peer, PeerName, Sha256, SpiffeId, TrustDomain};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls;
use sidewarden_proto::wire::{Guest, Issued, Report};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::issue::SUPERSEDED;
use super::rotate::{Entry, Missing, Stage, Step, Wants};
use super::tokens::is_reserved;
use super::{CaError, Register, Vault, files, generation};

/// How the register calls the way of a certificate that another collector issued.
pub(super) const ELSEWHERE: &str = "elsewhere";
/// Certificates in one report, and confirmed directives.
const MOST_ISSUED: usize = 1_000;
/// Certificates of other collectors that the register holds at a time: a few for each of a hundred thousand agents.
const MOST_ELSEWHERE: i64 = 400_000;
/// A certificate that ends later is none of an agent.
const LONGEST_LIFE: Duration = Duration::from_secs(400 * 24 * 3600);
/// The same of one that another CA has issued: more than any CA's own life.
const LONGEST_OF_OTHERS: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
/// Longest serial number, in hex digits.
const MAX_SERIAL: usize = 40;

/// Where the first key waits for its certificate.
fn waiting(ca_dir: &Path) -> PathBuf {
    ca_dir.join("member")
}

/// A certificate request (DER) for the issuing CA with this key.
pub fn certificate_request(key: &KeyPair) -> Result<Vec<u8>, CaError> {
    Ok(CertificateParams::default().serialize_request(key)?.der().to_vec())
}

/// Makes the key of an issuing CA and a request for it (PEM). A collector with a CA of its own is refused.
pub fn request(ca_dir: &Path, vault: &Vault) -> Result<String, CaError> {
    check_no_root(ca_dir)?;
    let dir = waiting(ca_dir);
    let _ = std::fs::remove_dir_all(&dir);
    files::make_dir(&dir)?;
    let key = KeyPair::generate()?;
    vault.write(&dir, &key)?;
    Ok(CertificateParams::default().serialize_request(&key)?.pem()?)
}

/// A root that issues is never replaced behind somebody's back.
fn check_no_root(ca_dir: &Path) -> Result<(), CaError> {
    let entries = generation::read_list(ca_dir)?.unwrap_or_default();
    // An interrupted `install` leaves a root without a key and no list.
    if entries.iter().all(|entry| entry.member || !generation::has_root_key(ca_dir, entry)) {
        return Ok(());
    }
    let (path, fault) = (ca_dir.to_owned(), "it holds a root of its own: use another data_dir".to_owned());
    Err(CaError::Pair { path, fault })
}

/// Takes in what was signed for [`request`]: the issuing CA's certificate and the root above it.
pub fn install(
    ca_dir: &Path,
    chain: &[CertificateDer<'static>],
    domain: &TrustDomain,
    vault: &Vault,
    now: Timestamp,
) -> Result<(), CaError> {
    check_no_root(ca_dir)?;
    let key = vault.read(&waiting(ca_dir))?;
    let before = generation::read_list(ca_dir)?.unwrap_or_default();
    let entry = put(ca_dir, &before, &key, chain, domain, vault, now)?;
    std::fs::remove_dir_all(waiting(ca_dir)).map_err(files::access(&waiting(ca_dir)))?;
    generation::remove_unlisted(ca_dir, &[entry])
}

/// Puts a new issuing CA on disk in place of those `before`; its entry. In use with the next start, or when it is opened.
pub(super) fn put(
    ca_dir: &Path,
    before: &[Entry],
    key: &KeyPair,
    chain: &[CertificateDer<'static>],
    domain: &TrustDomain,
    vault: &Vault,
    now: Timestamp,
) -> Result<Entry, CaError> {
    let number = before.iter().map(|entry| entry.number).max().unwrap_or(0) + 1;
    let entry = Entry { number, stage: Stage::Active, since_us: now, member: true, compromised: false };
    let at = generation::dir_of(ca_dir, &entry);
    let fault = |fault: &str| CaError::Pair { path: at.join("issuing/cert.pem"), fault: fault.to_owned() };
    let [issuing, root] = chain else { return Err(fault("it must hold the issuing CA's certificate and the root")) };
    let (_, parsed) = X509Certificate::from_der(issuing).map_err(|e| fault(&e.to_string()))?;
    if parsed.public_key().subject_public_key.data != key.public_key_raw() {
        return Err(fault("it is for another request than the last one made here"));
    }
    generation::check_signed_by(&at.join("issuing/cert.pem"), issuing, root)?;
    files::make_dir(&at.join("root"))?;
    files::write(&at.join("root/cert.pem"), super::pem(root).as_bytes(), 0o644)?;
    generation::store(&at.join("issuing"), super::pem(issuing), key, vault)?;
    generation::open(ca_dir, &entry, domain, vault, now)?;
    generation::write_list(ca_dir, std::slice::from_ref(&entry))?;
    Ok(entry)
}

/// The instance that another collector of the trust domain issued `chain` (verified, leaf first) to; `None` if it says
/// nothing of one, or if one of `ours` issued it: then it must be in our own register.
pub fn instance_of(chain: &[CertificateDer<'_>], ours: &[Sha256]) -> Option<InstanceId> {
    if ours.contains(&issuer_of(chain)?) {
        return None;
    }
    let (_, leaf) = X509Certificate::from_der(chain.first()?).ok()?;
    leaf.subject().iter_common_name().next()?.as_str().ok()?.parse().ok()
}

/// The public key that signed the leaf of `chain`, if that is the second certificate's. The verifier may have found
/// another way to a root: what counts is who signed the name.
pub fn issuer_of(chain: &[CertificateDer<'_>]) -> Option<Sha256> {
    let [leaf, issuing, ..] = chain else { return None };
    let (_, leaf) = X509Certificate::from_der(leaf).ok()?;
    let (_, signer) = X509Certificate::from_der(issuing).ok()?;
    leaf.verify_signature(Some(signer.public_key())).ok()?;
    tls::spki_of(issuing).ok()
}

/// Another collector's issuing CA, as the one that signed it knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The certificate's serial number, in hex.
    pub serial: String,
    /// SHA-256 of the issuing CA's public key.
    pub spki: Sha256,
    /// The same of its root.
    pub root: Sha256,
    /// When it ends.
    pub not_after: Timestamp,
    /// The newest directive that it hands out.
    pub confirmed: u64,
    /// It was replaced, lost on its way, or given up: nobody waits for it, and it may not follow. What it has signed is
    /// believed all the same, until it ends or is revoked.
    pub gone: bool,
}

impl Member {
    /// Of what was signed: the issuing CA's certificate, then the root.
    pub(super) fn of(chain: &[CertificateDer<'_>]) -> Result<Member, CaError> {
        let fault = |e: &dyn std::fmt::Display| CaError::Request(format!("what was signed cannot be read: {e}"));
        let [issuing, root] = chain else { return Err(fault(&"it has no root")) };
        let (_, parsed) = X509Certificate::from_der(issuing).map_err(|e| fault(&e))?;
        let not_after = Timestamp::from_secs(parsed.validity().not_after.timestamp());
        let (spki, root) = (tls::spki_of(issuing).map_err(|e| fault(&e))?, tls::spki_of(root).map_err(|e| fault(&e))?);
        Ok(Member { serial: parsed.serial.to_str_radix(16), spki, root, not_after, confirmed: 0, gone: false })
    }

    fn is_revoked(&self, directive: &Directive) -> bool {
        let name = PeerName::Spiffe(tls::collector_id(&directive.trust_domain));
        let (serial, not_before, issuers) = (self.serial.clone(), self.not_after, Arc::from([self.spki]));
        let peer = Peer { name, spki: self.spki, serial, not_before, not_after: self.not_after, issuers };
        directive.revokes(&peer).is_some()
    }
}

/// Which of `members` keep `step` from being taken.
pub fn missing(members: &[Member], step: Step, directive: &Directive, active: Sha256) -> Vec<Missing> {
    let newest = directive.version;
    let lacks = |member: &Member| match step {
        _ if step.wants() == Wants::Nothing => None,
        _ if member.confirmed < newest => {
            Some(format!("hands out directive {}, the newest is {newest}", member.confirmed))
        }
        _ if member.confirmed > newest => Some(format!(
            "hands out directive {}, which is ahead of our newest, {newest}: it takes none of ours",
            member.confirmed
        )),
        Step::Taint | Step::Retire if member.root != active => Some(
            "has no issuing CA under the new root yet; it gets one by itself while it reaches this collector".into(),
        ),
        _ => None,
    };
    let one = |member: &Member| {
        let who = format!("another collector (issuing CA {})", member.serial);
        Some(Missing { who, lacks: lacks(member)?, away: false })
    };
    members.iter().filter(|member| !member.is_revoked(directive)).filter_map(one).collect()
}

impl Register {
    /// Records an issuing CA that was signed for another collector, in place of the one with the key `replaces` as soon
    /// as it is seen in use.
    pub fn record_member(&self, member: &Member, replaces: Option<Sha256>, now: Timestamp) -> Result<(), CaError> {
        let write = || {
            let tx = self.db.unchecked_transaction()?;
            let sql = "INSERT INTO members (serial, spki, root, not_after, issued) VALUES (?1, ?2, ?3, ?4, ?5)";
            let Member { serial, spki, root, not_after, .. } = member;
            // One that was signed before and never came into use was lost on its way.
            let lost = "UPDATE members SET gone = 1 WHERE confirmed = 0 AND spki IN
                        (SELECT replaced_by FROM members WHERE spki = ?1)";
            if let Some(replaced) = replaces {
                tx.execute(lost, [replaced.0])?;
            }
            tx.execute(sql, params![serial, spki.0, root.0, not_after.0, now.0])?;
            if let Some(replaced) = replaces {
                tx.execute("UPDATE members SET replaced_by = ?1 WHERE spki = ?2", params![spki.0, replaced.0])?;
            }
            tx.commit()
        };
        write().map_err(|e| self.fault(e))
    }

    /// Notes that another collector hands out this directive with the issuing CA `spki`; what that replaced is gone.
    pub fn member_seen(&self, spki: Sha256, directive: u64) -> Result<(), CaError> {
        let write = || {
            let tx = self.db.unchecked_transaction()?;
            tx.execute("UPDATE members SET gone = 1 WHERE replaced_by = ?1 AND NOT gone", [spki.0])?;
            let directive = i64::try_from(directive).unwrap_or(i64::MAX);
            tx.execute("UPDATE members SET confirmed = ?2 WHERE spki = ?1", params![spki.0, directive])?;
            tx.commit()
        };
        write().map_err(|e| self.fault(e))
    }

    /// Other collectors whose issuing CA holds at `now`, and that are not gone.
    pub fn members(&self, now: Timestamp) -> Result<Vec<Member>, CaError> {
        Ok(self.issuing_cas(now)?.into_iter().filter(|member| !member.gone).collect())
    }

    /// Every issuing CA of another collector that holds at `now`.
    pub fn issuing_cas(&self, now: Timestamp) -> Result<Vec<Member>, CaError> {
        let sql =
            "SELECT serial, spki, root, not_after, confirmed, gone FROM members WHERE not_after > ?1 ORDER BY issued";
        let mut rows = self.db.prepare(sql).map_err(|e| self.fault(e))?;
        let found = rows.query_map([now.0], |row| {
            let confirmed: i64 = row.get(4)?;
            Ok(Member {
                serial: row.get(0)?,
                spki: Sha256(row.get(1)?),
                root: Sha256(row.get(2)?),
                not_after: Timestamp(row.get(3)?),
                confirmed: u64::try_from(confirmed).unwrap_or(0),
                gone: row.get(5)?,
            })
        });
        found.map_err(|e| self.fault(e))?.collect::<Result<_, _>>().map_err(|e| self.fault(e))
    }

    /// Waits no more for a collector that is gone for good; whether there was one.
    pub fn forget_member(&self, serial: &str, now: Timestamp) -> Result<bool, CaError> {
        let tx = self.db.unchecked_transaction().map_err(|e| self.fault(e))?;
        let marked = tx.execute("UPDATE members SET gone = 1 WHERE serial = ?1 AND NOT gone", [serial]);
        let was_there = marked.map_err(|e| self.fault(e))? > 0;
        // Whose the agents are is not kept: while there is another, it may be there that they are.
        if was_there && self.members(now)?.is_empty() {
            self.guests_elsewhere_left(now)?;
        }
        tx.commit().map(|()| was_there).map_err(|e| self.fault(e))
    }

    /// What has been written to the register since it was opened: while this stays, nothing has changed.
    pub fn writes(&self) -> Result<i64, CaError> {
        self.db.query_row("SELECT total_changes()", [], |row| row.get(0)).map_err(|e| self.fault(e))
    }

    /// Everything that another collector should know of our agents, in parts of a bounded size.
    pub fn report(&self, now: Timestamp) -> Result<Report, CaError> {
        let sql = format!(
            "SELECT i.workload, i.instance, i.serial, i.spki, i.not_before, i.not_after, i.root, i.seen, {SUPERSEDED}
             FROM issued i WHERE i.not_after > ?1 AND i.root IS NOT NULL ORDER BY i.id"
        );
        let mut rows = self.db.prepare(&sql).map_err(|e| self.fault(e))?;
        let issued = rows.query_map([now.0], |row| {
            let name = format!("{}#{}", row.get::<_, String>(0)?, row.get::<_, String>(1)?);
            let (serial, spki, root) = (row.get(2)?, Sha256(row.get(3)?), Sha256(row.get(6)?));
            let (not_before_us, not_after_us) = (Timestamp(row.get(4)?), Timestamp(row.get(5)?));
            let (seen, superseded) = (row.get(7)?, row.get(8)?);
            Ok(name.parse().ok().map(|agent| Issued {
                agent,
                serial,
                spki,
                not_before_us,
                not_after_us,
                root,
                seen,
                superseded,
            }))
        });
        let issued: Result<Vec<Option<Issued>>, _> = issued.map_err(|e| self.fault(e))?.collect();
        let issued = issued.map_err(|e| self.fault(e))?.into_iter().flatten().collect();
        let mut rows =
            self.db.prepare("SELECT workload, instance, directive FROM confirmed").map_err(|e| self.fault(e))?;
        let confirmed = rows.query_map([], |row| {
            let name = format!("{}#{}", row.get::<_, String>(0)?, row.get::<_, String>(1)?);
            let directive: i64 = row.get(2)?;
            Ok(name.parse().ok().map(|agent| (agent, u64::try_from(directive).unwrap_or(0))))
        });
        let confirmed: Result<Vec<Option<_>>, _> = confirmed.map_err(|e| self.fault(e))?.collect();
        let confirmed = confirmed.map_err(|e| self.fault(e))?.into_iter().flatten().collect();
        Ok(Report { issued, confirmed, guests: self.guests(now)? })
    }

    /// Takes in what another collector tells of its agents. Of what was issued only what is of `domain` counts. An agent that has moved on to
    /// us may be told of late: what it confirmed here is not taken back.
    pub fn take_report(&self, report: &Report, domain: &TrustDomain, now: Timestamp) -> Result<(), CaError> {
        if report.issued.len().max(report.confirmed.len()).max(report.guests.len()) > MOST_ISSUED {
            return Err(CaError::Request(format!("a report of more than {MOST_ISSUED} certificates")));
        }
        let is_agents = |workload: &SpiffeId| workload.trust_domain() == *domain && !is_reserved(workload.path());
        let is_serial = |serial: &str| serial.len() <= MAX_SERIAL && serial.bytes().all(|b| b.is_ascii_hexdigit());
        let is_guest =
            |one: &&Guest| !is_reserved(one.agent.workload.path()) && is_serial(&one.serial) && one.not_after_us > now;
        // Other CAs issue for longer than we do; a number that is none must not overflow.
        let ends = now.plus(LONGEST_OF_OTHERS);
        let bounded = |one: &Guest| Guest { not_after_us: one.not_after_us.min(ends), ..one.clone() };
        let guests: Vec<Guest> = report.guests.iter().filter(is_guest).map(bounded).collect();
        self.take_guests(&guests, now)?;
        let ends = now.plus(LONGEST_LIFE);
        let counts = |one: &&Issued| {
            is_agents(&one.agent.workload) && is_serial(&one.serial) && (now..ends).contains(&one.not_after_us)
        };
        let write = || {
            let tx = self.db.unchecked_transaction()?;
            let held = "SELECT count(*) FROM issued WHERE way = 'elsewhere' AND not_after > ?1";
            let room = MOST_ELSEWHERE - tx.query_row(held, [now.0], |row| row.get::<_, i64>(0))?;
            if room <= 0 {
                tracing::warn!(MOST_ELSEWHERE, "the register takes no more certificates of other collectors");
            }
            for one in report.issued.iter().filter(counts).take(usize::try_from(room).unwrap_or(0)) {
                let sql = "INSERT INTO issued
                    (serial, spki, workload, instance, not_before, not_after, issued, way, root, seen, superseded)
                    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
                    ON CONFLICT (serial) DO UPDATE SET seen = max(seen, excluded.seen),
                    superseded = max(superseded, excluded.superseded) WHERE spki = excluded.spki";
                let (workload, instance) = (one.agent.workload.as_str(), one.agent.instance.as_str());
                let dates = (one.not_before_us.0, one.not_after_us.0);
                let (serial, spki, root) = (&one.serial, one.spki.0, one.root.0);
                tx.execute(
                    sql,
                    params![
                        serial,
                        spki,
                        workload,
                        instance,
                        dates.0,
                        dates.1,
                        now.0,
                        ELSEWHERE,
                        root,
                        one.seen,
                        one.superseded
                    ],
                )?;
            }
            for (agent, directive) in report.confirmed.iter().filter(|(agent, _)| !is_reserved(agent.workload.path())) {
                let sql = "INSERT INTO confirmed (workload, instance, directive) SELECT ?1, ?2, ?3
                           WHERE EXISTS (SELECT 1 FROM issued WHERE workload = ?1 AND instance = ?2)
                           OR EXISTS (SELECT 1 FROM guests WHERE workload = ?1 AND instance = ?2)
                           ON CONFLICT DO UPDATE SET directive = max(directive, excluded.directive)";
                let directive = i64::try_from(*directive).unwrap_or(i64::MAX);
                tx.execute(sql, params![agent.workload.as_str(), agent.instance.as_str(), directive])?;
            }
            tx.commit()
        };
        write().map_err(|e| self.fault(e))
    }
}

/// What of `all` was not told yet, at most one frame's worth; it is in `told` afterwards.
#[derive(Debug, Default)]
pub struct Told {
    issued: HashMap<String, (bool, bool)>,
    confirmed: HashMap<AgentId, u64>,
    guests: HashMap<(AgentId, Sha256), (Timestamp, Option<Timestamp>)>,
}

impl Told {
    /// The next part of `all` that was not told.
    pub fn next(&mut self, all: &Report) -> Option<Report> {
        let issued = all.issued.iter().filter(|one| self.issued.get(&one.serial) != Some(&(one.seen, one.superseded)));
        let issued: Vec<Issued> = issued.take(MOST_ISSUED).cloned().collect();
        let confirmed = all.confirmed.iter().filter(|(agent, version)| self.confirmed.get(agent) != Some(version));
        let confirmed: Vec<_> = confirmed.take(MOST_ISSUED).cloned().collect();
        let key = |guest: &Guest| (guest.agent.clone(), guest.spki);
        let guests = all
            .guests
            .iter()
            .filter(|guest| self.guests.get(&key(guest)) != Some(&(guest.not_after_us, guest.left_us)));
        let guests: Vec<Guest> = guests.take(MOST_ISSUED).cloned().collect();
        if issued.is_empty() && confirmed.is_empty() && guests.is_empty() {
            self.forget_ended(all);
            return None;
        }
        self.guests.extend(guests.iter().map(|guest| (key(guest), (guest.not_after_us, guest.left_us))));
        self.issued.extend(issued.iter().map(|one| (one.serial.clone(), (one.seen, one.superseded))));
        self.confirmed.extend(confirmed.iter().cloned());
        Some(Report { issued, confirmed, guests })
    }

    /// What has ended is in no report any more.
    fn forget_ended(&mut self, all: &Report) {
        if self.issued.len() > all.issued.len() {
            let held: HashSet<&String> = all.issued.iter().map(|one| &one.serial).collect();
            self.issued.retain(|serial, _| held.contains(serial));
        }
        if self.confirmed.len() > all.confirmed.len() {
            let held: HashSet<&AgentId> = all.confirmed.iter().map(|(agent, _)| agent).collect();
            self.confirmed.retain(|agent, _| held.contains(agent));
        }
        if self.guests.len() > all.guests.len() {
            let held: HashSet<(&AgentId, Sha256)> = all.guests.iter().map(|guest| (&guest.agent, guest.spki)).collect();
            self.guests.retain(|(agent, spki), _| held.contains(&(agent, *spki)));
        }
    }
}

#[cfg(test)]
mod tests {
    use sidewarden_proto::identity::Usage;

    use super::*;
    use crate::ca::{Authority, Issuer, Terms};
    use sidewarden_proto::directive::DirectiveFault;

    const DAY: Duration = Duration::from_secs(86_400);

    fn terms() -> Terms {
        Terms { domain: "x.example".parse().unwrap(), names: vec![], own_life: 16 * DAY, vault: Vault::default() }
    }

    fn csr_der(pem: &str) -> Vec<u8> {
        use rustls::pki_types::pem::PemObject;
        rustls::pki_types::CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
    }

    #[test]
    fn a_second_collector_issues_under_the_same_root_without_its_key() {
        let (first, second, now) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Timestamp::now());
        let (leader, _) = Authority::open(first.path(), terms(), now).unwrap();
        let wanted = csr_der(&request(second.path(), &Vault::default()).unwrap());
        let chain = leader.sign_member(&wanted, now).unwrap();
        install(second.path(), &chain, &terms().domain, &Vault::default(), now).unwrap();
        let (member, first_start) = Authority::open(second.path(), terms(), now).unwrap();
        assert!(!first_start && member.pin() == leader.pin() && !second.path().join("root/key.pem").exists());

        let (workload, key) = (terms().domain.workload("shop/web").unwrap(), KeyPair::generate().unwrap());
        let issued = member.sign(&workload, Some("web-1"), &[], &key, DAY, now).unwrap();
        tls::verify_chain(&issued, &leader.trust(), Usage::Client, now).unwrap();
        assert_eq!(instance_of(&issued, &leader.issuers()).unwrap().as_str(), "web-1");
        assert_eq!(instance_of(&issued, &member.issuers()), None, "what we issued must be in our own register");
        let unnamed = member.sign(&workload, None, &[], &key, DAY, now).unwrap();
        assert_eq!(instance_of(&unnamed, &leader.issuers()), None);
        let decoy = [&issued[..1], &leader.sign(&workload, None, &[], &key, DAY, now).unwrap()[1..]].concat();
        assert_eq!(instance_of(&decoy, &member.issuers()), None, "the issuer shown is not the one that signed");
        assert!(member.ready(super::super::rotate::Step::Prepare, now).is_err());
        let none =
            sidewarden_proto::directive::Signed::sign(&directive(&[leader.root()]), &member.own().borrow()).unwrap();
        assert!(matches!(none.open(&leader.trust(), now), Err(DirectiveFault::Follower)), "it makes no directives");
        assert!(member.sign_member(&wanted, now).is_err());
        let year = now.plus(300 * DAY);
        assert!(Authority::open(second.path(), terms(), year).is_ok(), "it goes on to the end");
    }

    #[test]
    fn who_has_a_followers_issuing_key_has_no_collectors_name_signed_by_the_one_that_makes_directives() {
        let (first, second, now) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Timestamp::now());
        let (made, ended) = (now.minus(2 * DAY), now.minus(DAY).minus(Duration::from_secs(60)));
        let (leader, _) = Authority::open(&first.path().join("ca"), terms(), made).unwrap();
        let chain = leader.sign_member(&csr_der(&request(second.path(), &Vault::default()).unwrap()), made).unwrap();
        install(second.path(), &chain, &terms().domain, &Vault::default(), made).unwrap();
        let (member, _) = Authority::open(second.path(), terms(), made).unwrap();
        let issuer = issuer(first.path());
        let enrol = |path: &str| {
            let (name, key) = (terms().domain.workload(path).unwrap(), KeyPair::generate().unwrap());
            let previous = member.sign(&name, Some("x"), &[], &key, DAY, ended).unwrap();
            let request = sidewarden_proto::enrol::Request {
                version: String::new(),
                workload: None,
                instance: "x".parse().unwrap(),
                token_id: String::new(),
                token_secret: sidewarden_proto::secret::Secret::default(),
                csr: sidewarden_proto::enrol::Der(certificate_request(&key).unwrap()),
                previous: previous.iter().map(|cert| sidewarden_proto::enrol::Der(cert.to_vec())).collect(),
            };
            let granted = issuer.enrol(&request, &directive(&[]), &|_| None, now);
            granted.map(|grant| grant.event.workload.to_string()).map_err(|refused| refused.reason)
        };
        assert_eq!(enrol("sidewarden/collector"), Err("bad_request".into()));
        assert_eq!(enrol("sidewarden/collector/2"), Err("bad_request".into()));
        assert_eq!(enrol("shop/web"), Ok("spiffe://x.example/shop/web".into()));
        assert_eq!(issuer.register().report(made).unwrap().issued.len(), 2, "of who was refused nothing is kept");
    }

    fn directive(roots: &[CertificateDer<'static>]) -> Directive {
        let json = serde_json::json!({ "version": 7, "trust_domain": "x.example", "issued_us": 1, "bundle": [] });
        let bundle = roots.iter().map(|root| sidewarden_proto::enrol::Der(root.to_vec())).collect();
        Directive { bundle, ..serde_json::from_value(json).unwrap() }
    }

    fn issuer(dir: &Path) -> Issuer {
        let (authority, _) = Authority::open(&dir.join("ca"), terms(), Timestamp::now()).unwrap();
        let register = Register::open(&dir.join("ca.db")).unwrap();
        Issuer::new(Arc::new(authority), register, DAY, 7 * DAY)
    }

    fn cert(number: u8, begins: i64, superseded: bool) -> Issued {
        let now = Timestamp::now();
        Issued {
            agent: "spiffe://x.example/shop/web#web-1".parse().unwrap(),
            serial: format!("{number:02x}"),
            spki: Sha256([number; 32]),
            not_before_us: Timestamp(now.0 + begins * 60_000_000),
            not_after_us: now.plus(DAY),
            root: Sha256([0; 32]),
            seen: true,
            superseded,
        }
    }

    #[test]
    fn no_report_that_comes_late_takes_its_newest_key_from_an_agent() {
        use crate::ca::KeyState::{Current, Superseded};
        let current = Current { renewal: false };
        // What is reported, in this order: number, beginning, whether a newer one is known there; then whose key is in use.
        let rows = [
            (vec![(1, 0, false), (2, 10, false)], [(1, Superseded), (2, current.clone())]),
            (vec![(2, 10, false), (1, 0, false)], [(1, current.clone()), (2, current.clone())]),
            (vec![(2, 10, false), (1, 0, true)], [(1, Superseded), (2, current.clone())]),
            // The clock where 2 was issued is behind.
            (vec![(1, 10, false), (2, 0, false)], [(1, current.clone()), (2, current.clone())]),
            (vec![(1, 10, true), (2, 0, false)], [(1, Superseded), (2, current.clone())]),
            (vec![(1, 0, false), (1, 0, true), (2, 10, false)], [(1, Superseded), (2, current.clone())]),
        ];
        for (reported, expected) in rows {
            let dir = tempfile::tempdir().unwrap();
            let issuer = issuer(dir.path());
            for (number, begins, superseded) in &reported {
                let report = Report { issued: vec![cert(*number, *begins, *superseded)], ..Report::default() };
                issuer.register().take_report(&report, &terms().domain, Timestamp::now()).unwrap();
            }
            for (number, state) in expected {
                let one = cert(number, 0, false);
                assert_eq!(issuer.key_state(&one.agent, one.spki).unwrap(), state, "{reported:?}: {number}");
            }
            let told = issuer.register().report(Timestamp::now()).unwrap();
            let superseded = told.issued.iter().filter(|one| one.superseded).count();
            assert!(superseded <= 1, "{told:?}");
        }
    }

    #[test]
    fn of_a_report_counts_what_an_agent_can_have() {
        let dir = tempfile::tempdir().unwrap();
        let (issuer, now) = (issuer(dir.path()), Timestamp::now());
        let take = |report: &Report| issuer.register().take_report(report, &terms().domain, now);
        let named = |name: &str| Issued { agent: name.parse().unwrap(), ..cert(1, 0, false) };
        let confirmed = |name: &str| (name.parse::<AgentId>().unwrap(), 3);
        let issued = vec![
            named("spiffe://other.example/shop/web#1"),
            named("spiffe://x.example/sidewarden/collector#1"),
            Issued { serial: "zz".into(), ..cert(1, 0, false) },
            Issued { serial: "a".repeat(41), ..cert(1, 0, false) },
            Issued { not_after_us: Timestamp(i64::MAX), ..cert(1, 0, false) },
            Issued { not_after_us: now.minus(DAY), ..cert(1, 0, false) },
        ];
        let nobody =
            vec![confirmed("spiffe://x.example/shop/nobody#1"), confirmed("spiffe://other.example/shop/web#1")];
        let guest = |name: &str| Guest {
            agent: name.parse().unwrap(),
            serial: "1".into(),
            spki: Sha256([3; 32]),
            not_before_us: now.minus(DAY),
            not_after_us: now.plus(DAY),
            left_us: None,
        };
        let guests = vec![
            guest("spiffe://other.example/sidewarden/collector#1"),
            Guest { serial: "zz".into(), ..guest("spiffe://other.example/shop/web#1") },
            Guest { not_after_us: now.minus(DAY), ..guest("spiffe://other.example/shop/web#1") },
        ];
        take(&Report { issued, confirmed: nobody, guests }).unwrap();
        assert_eq!(issuer.register().report(now).unwrap(), Report::default());
        let many = vec![cert(1, 0, false); MOST_ISSUED + 1];
        assert!(take(&Report { issued: many, ..Report::default() }).is_err());
        take(&Report {
            issued: vec![cert(1, 0, false)],
            confirmed: vec![
                confirmed("spiffe://x.example/shop/web#web-1"),
                confirmed("spiffe://other.example/shop/web#1"),
            ],
            guests: vec![guest("spiffe://other.example/shop/web#1")],
        })
        .unwrap();
        let report = issuer.register().report(now).unwrap();
        let told = issuer.register().guest_holders(Sha256::ZERO, now).unwrap();
        assert_eq!((report.issued.len(), report.confirmed.len(), told.len()), (1, 2, 1));
        assert!(report.guests.is_empty(), "what others told is not told on");
    }

    #[test]
    fn everything_is_told_once_in_parts_and_again_when_it_changes() {
        let one = |number: usize| Issued { serial: format!("{number:x}"), ..cert(1, 0, false) };
        let mut all = Report { issued: (0..MOST_ISSUED * 2 + 5).map(one).collect(), ..Report::default() };
        let mut told = Told::default();
        let parts: Vec<usize> = std::iter::from_fn(|| told.next(&all)).map(|part| part.issued.len()).collect();
        assert_eq!(parts, [MOST_ISSUED, MOST_ISSUED, 5]);
        all.issued[7].superseded = true;
        assert_eq!(told.next(&all).unwrap().issued, [all.issued[7].clone()]);
        all.issued.truncate(3);
        assert_eq!((told.next(&all), told.issued.len()), (None, 3), "what has ended is forgotten");
        let guest = |until| Guest {
            agent: "spiffe://x/shop/web#1".parse().unwrap(),
            serial: "1".into(),
            spki: Sha256([3; 32]),
            not_before_us: Timestamp(1),
            not_after_us: Timestamp(until),
            left_us: None,
        };
        for until in [5, 9] {
            all.guests = vec![guest(until)];
            assert_eq!(told.next(&all).unwrap().guests, [guest(until)], "the same key with a newer certificate");
            assert_eq!(told.next(&all), None);
        }
        all.guests.clear();
        assert_eq!((told.next(&all), told.guests.len()), (None, 0));
    }

    #[test]
    fn an_issuing_ca_that_was_lost_on_its_way_or_replaced_is_waited_for_no_more_and_can_still_be_found() {
        let dir = tempfile::tempdir().unwrap();
        let (issuer, now) = (issuer(dir.path()), Timestamp::now());
        let register = issuer.register();
        let member = |n: u8| Member {
            serial: n.to_string(),
            spki: Sha256([n; 32]),
            root: Sha256([0; 32]),
            not_after: now.plus(DAY),
            confirmed: 0,
            gone: false,
        };
        let serials = || register.members(now).unwrap().into_iter().map(|member| member.serial).collect::<Vec<_>>();
        register.record_member(&member(1), None, now).unwrap();
        register.member_seen(Sha256([1; 32]), 4).unwrap();
        for next in [2, 3] {
            register.record_member(&member(next), Some(Sha256([1; 32])), now).unwrap();
            assert_eq!(serials(), ["1".to_owned(), next.to_string()]);
        }
        register.member_seen(Sha256([3; 32]), 4).unwrap();
        assert_eq!(serials(), ["3"]);
        assert!(register.forget_member("3", now).unwrap() && !register.forget_member("3", now).unwrap());
        assert!(serials().is_empty());
        let all =
            |at| register.issuing_cas(at).unwrap().into_iter().map(|one| (one.serial, one.gone)).collect::<Vec<_>>();
        assert_eq!(all(now), ["1", "2", "3"].map(|serial| (serial.to_owned(), true)), "what they sign still counts");
        assert!(all(now.plus(DAY)).is_empty());
    }

    #[test]
    fn only_with_the_last_other_collector_its_guests_are_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let (issuer, now) = (issuer(dir.path()), Timestamp::now());
        let register = issuer.register();
        for n in [1, 2] {
            let (serial, spki, root) = (n.to_string(), Sha256([n; 32]), Sha256::ZERO);
            let member = Member { serial, spki, root, not_after: now.plus(DAY), confirmed: 4, gone: false };
            register.record_member(&member, None, now).unwrap();
        }
        let guest = Guest {
            agent: "spiffe://other.example/shop/web#1".parse().unwrap(),
            serial: "1".into(),
            spki: Sha256([3; 32]),
            not_before_us: now.minus(DAY),
            not_after_us: now.plus(DAY),
            left_us: None,
        };
        register.take_guests(&[guest], now).unwrap();
        for (serial, known, here) in [("77", false, true), ("1", true, true), ("1", false, true), ("2", true, false)] {
            assert_eq!(register.forget_member(serial, now).unwrap(), known, "{serial}");
            let later = register.guest_holders(Sha256::ZERO, now.plus(DAY / 2)).unwrap();
            assert_eq!(later[0].1, here, "{serial}");
        }
    }

    #[test]
    fn a_step_waits_for_a_collector_that_is_behind_ahead_or_of_the_old_root() {
        let (dir, now) = (tempfile::tempdir().unwrap(), Timestamp::now());
        let (leader, _) = Authority::open(dir.path(), terms(), now).unwrap();
        let csr = certificate_request(&KeyPair::generate().unwrap()).unwrap();
        let one = Member::of(&leader.sign_member(&csr, now).unwrap()).unwrap();
        let (active, other, newest) = (leader.pin(), Sha256([9; 32]), directive(&[]).version);
        let rows = [
            (newest - 1, active, Step::Activate, Some("the newest is")),
            (newest, active, Step::Activate, None),
            (newest + 1, active, Step::Activate, Some("ahead of our newest")),
            (newest + 1, active, Step::Prepare, None),
            (newest, other, Step::Activate, None),
            (newest, other, Step::Retire, Some("under the new root")),
        ];
        for (confirmed, active, step, wanted) in rows {
            let named = missing(&[Member { confirmed, ..one.clone() }], step, &directive(&[]), active);
            let lacks = named.first().map_or("", |one| one.lacks.as_str());
            assert!(named.is_empty() == wanted.is_none() && lacks.contains(wanted.unwrap_or("")), "{step:?} {named:?}");
        }
    }

    #[test]
    fn what_was_signed_for_another_request_or_by_another_root_is_not_taken_in() {
        let (first, second, now) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Timestamp::now());
        let (leader, _) = Authority::open(first.path(), terms(), now).unwrap();
        let vault = Vault::default();
        let earlier = leader.sign_member(&csr_der(&request(second.path(), &vault).unwrap()), now).unwrap();
        let wanted = csr_der(&request(second.path(), &vault).unwrap());
        let take = |chain: &[CertificateDer<'static>]| {
            install(second.path(), chain, &terms().domain, &vault, now).map_err(|e| e.to_string())
        };
        assert!(take(&earlier).unwrap_err().contains("another request"));
        let chain = leader.sign_member(&wanted, now).unwrap();
        assert!(take(&chain[..1]).unwrap_err().contains("the root"));
        let (other, _) = Authority::open(tempfile::tempdir().unwrap().path(), terms(), now).unwrap();
        assert!(take(&[chain[0].clone(), other.root()]).unwrap_err().contains("not signed by this root"));
        assert!(request(first.path(), &vault).unwrap_err().to_string().contains("a root of its own"));
        assert!(leader.sign_member(b"no request", now).is_err());
        take(&chain).unwrap();
        assert!(second.path().join("issuing").exists());
        let wanted = csr_der(&request(second.path(), &vault).unwrap());
        take(&leader.sign_member(&wanted, now).unwrap()).unwrap();
        assert!(!second.path().join("issuing").exists(), "a member renews its issuing CA the same way");
        Authority::open(second.path(), terms(), now).unwrap();
    }
}
