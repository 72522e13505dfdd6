//! Whether somebody gets a certificate, and for which name: by token, by renewal, or within the grace after it ran out.
//!
//! Everything issued is recorded before it is handed out. An instance has one live key: a newer key takes over when it
//! first connects, and from then on the older one is refused.

use std::sync::Mutex;
use std::time::Duration;

use rcgen::{PublicKeyData, SubjectPublicKeyInfo};
use rusqlite::{OptionalExtension, params};
use rustls::pki_types::CertificateDer;
use sidewarden_proto::directive::Directive;
use sidewarden_proto::enrol::{Der, Issued, Refused, Request};
use sidewarden_proto::event::CertificateIssued;
use sidewarden_proto::identity::{AgentId, InstanceId, Peer, PeerName, Sha256, SpiffeId, Usage};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls;
use x509_parser::prelude::{FromDer, X509CertificationRequest};

use super::member::{self, ELSEWHERE};
use super::tokens::{Pattern, TokenInfo, TokenState, is_reserved};
use super::{Authority, CaError, Register};
use std::sync::Arc;

/// Largest certificate request looked at.
const MAX_CSR: usize = 8 << 10;
/// The certificates of one instance follow each other no faster, but for those by a token.
pub const RENEW_EVERY: Duration = Duration::from_secs(5);

/// A certificate, and what is to be told about it.
#[derive(Clone, Debug)]
pub struct Grant {
    /// For the agent. Without a directive: the caller adds the one in force.
    pub issued: Issued,
    /// For whom.
    pub agent: AgentId,
    /// For the log.
    pub event: CertificateIssued,
}

/// What is known of a key that an agent shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyState {
    /// It was issued to this instance and may be used. `renewal`: it follows an earlier key of the same instance.
    Current {
        /// Issued over an authenticated session or within the grace.
        renewal: bool,
    },
    /// It was issued to another instance.
    OtherInstance(String),
    /// A newer key of this instance is in use.
    Superseded,
    /// It was not issued here.
    Unknown,
}

/// Decides and issues.
#[derive(Debug)]
pub struct Issuer {
    authority: Arc<Authority>,
    register: Mutex<Register>,
    life: Duration,
    grace: Duration,
}

pub(super) fn refuse(reason: &str, detail: impl Into<String>, retry: bool) -> Refused {
    Refused { reason: reason.to_owned(), detail: detail.into(), retry }
}

impl From<CaError> for Refused {
    /// The agent is told that it is our fault; the details are for our own log.
    fn from(error: CaError) -> Refused {
        tracing::error!(%error, "a certificate could not be issued");
        refuse("internal", "the collector could not issue a certificate: see its log", true)
    }
}

/// Whether a newer key of the instance is in use than that of the row `i`.
///
/// What another collector told may have come late: it replaces nothing that begins after it, and what is replaced by its
/// own word replaces nothing at all. So no report, and no clock that is off, takes an agent's newest key from it.
pub(super) const SUPERSEDED: &str = "(i.superseded OR EXISTS (SELECT 1 FROM issued n
    WHERE n.workload = i.workload AND n.instance = i.instance AND n.spki <> i.spki AND n.seen = 1 AND n.id > i.id
    AND NOT n.superseded AND (n.way <> 'elsewhere' OR n.not_before >= i.not_before)))";

/// Nobody may come back with a certificate that ended this much longer ago than the grace.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(24 * 3600);

/// Why and to whom: what goes into the register beside the certificate.
struct Reason<'a> {
    way: &'static str,
    token: Option<&'a str>,
}

impl Issuer {
    /// An issuer of certificates that live for `life` and may be renewed until `grace` after their end.
    pub fn new(authority: Arc<Authority>, register: Register, life: Duration, grace: Duration) -> Issuer {
        Issuer { authority, register: Mutex::new(register), life, grace }
    }

    /// The CA behind it.
    pub fn authority(&self) -> &Arc<Authority> {
        &self.authority
    }

    /// How long after its end a certificate may be renewed.
    pub fn grace(&self) -> Duration {
        self.grace
    }

    /// The register, for as long as the guard is held.
    pub fn register(&self) -> std::sync::MutexGuard<'_, Register> {
        // Every change of the register is one SQLite statement or transaction: a panic leaves nothing half done.
        self.register.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Answers a request that came without a client certificate. `live` tells the key of an instance's live session.
    pub fn enrol(
        &self,
        request: &Request,
        directive: &Directive,
        live: &dyn Fn(&AgentId) -> Option<Sha256>,
        now: Timestamp,
    ) -> Result<Grant, Refused> {
        let (key, spki) = read_request(&request.csr.0)?;
        if request.previous.is_empty() {
            self.by_token(request, &key, spki, directive, live, now)
        } else {
            self.within_grace(request, &key, spki, directive, now)
        }
    }

    fn by_token(
        &self,
        request: &Request,
        key: &SubjectPublicKeyInfo,
        spki: Sha256,
        directive: &Directive,
        live: &dyn Fn(&AgentId) -> Option<Sha256>,
        now: Timestamp,
    ) -> Result<Grant, Refused> {
        let register = self.register();
        let token = register.find(&request.token_id, &request.token_secret)?;
        let token = token.ok_or_else(|| refuse("token_unknown", "there is no such token: make a new one", false))?;
        judge_token(&token, now)?;
        let workload = self.workload_of(&token, request.workload.as_ref())?;
        let agent = AgentId { workload, instance: request.instance.clone() };
        check_denied(directive, &agent, spki, now)?;
        if live(&agent).is_some_and(|live| live != spki) {
            let detail = format!("{agent} is connected with another key: stop it first, or give this one another name");
            return Err(refuse("second_instance", detail, true));
        }
        let reason = Reason { way: "token", token: Some(&token.id) };
        self.issue(&register, agent, key, spki, &reason, now)
    }

    fn workload_of(&self, token: &TokenInfo, wanted: Option<&SpiffeId>) -> Result<SpiffeId, Refused> {
        let pattern: Pattern = token.pattern.parse()?;
        let domain = self.authority.domain();
        let workload = match (wanted, pattern.single(domain)) {
            (Some(wanted), _) => wanted.clone(),
            (None, Some(single)) => single,
            (None, None) => {
                let detail = format!("the token is good for {pattern}: set `workload` in the agent's configuration");
                return Err(refuse("bad_request", detail, false));
            }
        };
        if workload.trust_domain() != *domain || !pattern.covers(workload.path()) || is_reserved(workload.path()) {
            let detail = format!("the token is good for {pattern}, not for {workload}");
            return Err(refuse("token_other_workload", detail, false));
        }
        Ok(workload)
    }

    fn within_grace(
        &self,
        request: &Request,
        key: &SubjectPublicKeyInfo,
        spki: Sha256,
        directive: &Directive,
        now: Timestamp,
    ) -> Result<Grant, Refused> {
        let chain: Vec<CertificateDer<'_>> = request.previous.iter().map(|der| der.0.as_slice().into()).collect();
        let peer = tls::peer_of(&chain, Usage::Client).map_err(|e| refuse("bad_request", e.to_string(), false))?;
        // Judged as of its last valid moment: that it has run out since is what the grace is for, and one that does not hold yet
        // was made by us while a clock was ahead.
        let verified = tls::verify_chain(&chain, &self.authority.trust(), Usage::Client, peer.not_after);
        verified.map_err(|e| refuse("bad_request", format!("the old certificate does not verify: {e}"), false))?;
        if peer.spki != spki {
            return Err(refuse("bad_request", "the request's key is not that of the old certificate", false));
        }
        // Nobody with a right clock asks here while it holds, and what is made now would not hold by the other clock.
        if (peer.not_before..peer.not_after).contains(&now) {
            let detail = format!("clock: the certificate holds by this collector's clock, {now}: set the clock right");
            return Err(refuse("clock", detail, true));
        }
        if now > peer.not_after.plus(self.grace) {
            let detail = format!("the certificate ended {}: enrol with a new token", peer.not_after);
            return Err(refuse("grace_over", detail, false));
        }
        // The old certificate itself may be revoked, or who issued it.
        if let Some(denied) = directive.revokes(&peer) {
            return Err(refuse("revoked", denied.to_string(), false));
        }
        let agent = self.agent_of(&peer, &chain, &request.instance, now)?;
        check_denied(directive, &agent, spki, now)?;
        self.issue(&self.register(), agent, key, spki, &Reason { way: "grace", token: None }, now)
    }

    /// The next certificate of an agent that is connected with `peer`.
    pub fn renew(
        &self,
        agent: &AgentId,
        peer: &Peer,
        csr: &[u8],
        directive: &Directive,
        now: Timestamp,
    ) -> Result<Grant, Refused> {
        let (key, spki) = read_request(csr)?;
        if let Some(deny) = directive.revokes(peer) {
            return Err(refuse("revoked", deny.to_string(), false));
        }
        check_denied(directive, agent, spki, now)?;
        self.issue(&self.register(), agent.clone(), &key, spki, &Reason { way: "renewal", token: None }, now)
    }

    fn agent_of(
        &self,
        peer: &Peer,
        chain: &[CertificateDer<'_>],
        instance: &InstanceId,
        now: Timestamp,
    ) -> Result<AgentId, Refused> {
        let PeerName::Spiffe(workload) = &peer.name else {
            return Err(refuse("bad_request", "the old certificate names no workload", false));
        };
        let agent = AgentId { workload: workload.clone(), instance: instance.clone() };
        self.check_name(workload)?;
        match self.known(&agent, peer, chain, now)? {
            KeyState::Current { .. } => Ok(agent),
            KeyState::Superseded => Err(refuse("revoked", "a newer key of this instance is in use", false)),
            _ => Err(refuse("bad_request", "the old certificate was not issued to this instance", false)),
        }
    }

    /// What is known of the key of `peer`, who shows `chain` (verified) and says to be `agent`. One that another collector
    /// of the trust domain issued is taken into the register when it is first seen: from then on the rules for keys of
    /// one instance hold for it here as well.
    pub fn known(
        &self,
        agent: &AgentId,
        peer: &Peer,
        chain: &[CertificateDer<'_>],
        now: Timestamp,
    ) -> Result<KeyState, Refused> {
        let state = self.key_state(agent, peer.spki)?;
        if state != KeyState::Unknown {
            return Ok(state);
        }
        match member::instance_of(chain, &self.authority.issuers()) {
            None => Ok(KeyState::Unknown),
            Some(other) if other != agent.instance => Ok(KeyState::OtherInstance(other.to_string())),
            Some(_) => {
                let root = chain.last().and_then(|root| tls::spki_of(root).ok()).unwrap_or(Sha256::ZERO);
                let reason = Reason { way: ELSEWHERE, token: None };
                self.record(&self.register(), agent, peer, root, &reason, now)?;
                Ok(KeyState::Current { renewal: false })
            }
        }
    }

    /// Whether what was just issued may be handed out: the instance may have been revoked after it was asked about and
    /// before its new key was in the register, where who revokes it looks.
    pub fn still_allowed(&self, grant: Grant, directive: &Directive, now: Timestamp) -> Result<Grant, Refused> {
        let spki = grant.event.spki.parse().map_err(|_| refuse("internal", "the key's hash cannot be read", true))?;
        check_denied(directive, &grant.agent, spki, now).map(|()| grant)
    }

    /// What is known of the key `spki`, shown by one who says to be `agent`.
    pub fn key_state(&self, agent: &AgentId, spki: Sha256) -> Result<KeyState, CaError> {
        let register = self.register();
        let newest = format!(
            "SELECT i.instance, i.way, {SUPERSEDED} FROM issued i WHERE i.spki = ?1 AND i.workload = ?2
             ORDER BY i.id DESC LIMIT 1"
        );
        let row = register.db.query_row(&newest, params![spki.0, agent.workload.as_str()], |row| {
            Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, row.get::<_, bool>(2)?))
        });
        let Some((instance, way, superseded)) = row.optional().map_err(|e| register.fault(e))? else {
            return Ok(KeyState::Unknown);
        };
        if instance != agent.instance.as_str() {
            return Ok(KeyState::OtherInstance(instance));
        }
        Ok(if superseded {
            KeyState::Superseded
        } else {
            KeyState::Current { renewal: way != "token" && way != ELSEWHERE }
        })
    }

    /// Notes that the key is in use: from now on, older ones of its instance are not.
    pub fn seen(&self, agent: &AgentId, spki: Sha256) -> Result<(), CaError> {
        let register = self.register();
        let sql = "UPDATE issued SET seen = 1 WHERE workload = ?1 AND instance = ?2 AND spki = ?3 AND seen = 0";
        let values = params![agent.workload.as_str(), agent.instance.as_str(), spki.0];
        register.db.execute(sql, values).map(drop).map_err(|e| register.fault(e))
    }

    /// Whoever has the key of a further collector's issuing CA shows a certificate for any name: that of a collector, signed by
    /// us, would make directives.
    fn check_name(&self, workload: &SpiffeId) -> Result<(), Refused> {
        if workload.trust_domain() == *self.authority.domain() && !is_reserved(workload.path()) {
            return Ok(());
        }
        Err(refuse("bad_request", format!("{workload} is no name that agents of this trust domain have"), false))
    }

    /// Forgets certificates that ended long ago and whose keys are judged by newer ones of their instance; how many. An instance
    /// keeps its newest: by a clock that is ahead alone it may have ended. What an older one that has not ended is out of use by
    /// stays as well.
    pub fn forget_ended(&self, now: Timestamp) -> Result<usize, CaError> {
        let sql = format!(
            "DELETE FROM issued WHERE id IN (SELECT i.id FROM issued i WHERE i.not_after < ?1
                 AND ({SUPERSEDED} OR EXISTS (SELECT 1 FROM issued k WHERE k.workload = i.workload
                      AND k.instance = i.instance AND k.spki = i.spki AND k.id > i.id))
                 AND NOT EXISTS (SELECT 1 FROM issued o WHERE o.workload = i.workload AND o.instance = i.instance
                      AND o.id < i.id AND o.not_after >= ?1))"
        );
        let register = self.register();
        register.db.execute(&sql, [now.minus(self.grace + FORGOTTEN_AFTER).0]).map_err(|e| register.fault(e))
    }

    /// Signs, and records it and the token's use in one transaction.
    fn issue(
        &self,
        register: &Register,
        agent: AgentId,
        key: &SubjectPublicKeyInfo,
        spki: Sha256,
        reason: &Reason<'_>,
        now: Timestamp,
    ) -> Result<Grant, Refused> {
        self.check_name(&agent.workload)?;
        if reason.token.is_none() {
            check_pace(register, &agent, now)?;
        }
        let instance = Some(agent.instance.as_str());
        let chain = self.authority.sign(&agent.workload, instance, &[], key, self.life, now)?;
        let peer = tls::peer_of(&chain, Usage::Client).map_err(|e| refuse("internal", e.to_string(), true))?;
        let root = chain.last().map(tls::spki_of).transpose().map_err(|e| refuse("internal", e.to_string(), true))?;
        self.record(register, &agent, &peer, root.unwrap_or(Sha256::ZERO), reason, now)?;
        let event = CertificateIssued {
            workload: agent.workload.clone(),
            instance: agent.instance.to_string(),
            serial: peer.serial,
            spki: spki.to_string(),
            not_after_us: peer.not_after,
            by: reason.way.to_owned(),
        };
        let bundle = self.authority.bundle();
        let chain = chain.into_iter().map(|cert| Der(cert.to_vec())).collect();
        Ok(Grant { issued: Issued { chain, bundle, directive: None }, agent, event })
    }

    fn record(
        &self,
        register: &Register,
        agent: &AgentId,
        peer: &Peer,
        root: Sha256,
        reason: &Reason<'_>,
        now: Timestamp,
    ) -> Result<(), Refused> {
        let fault = |e| Refused::from(register.fault(e));
        let tx = register.db.unchecked_transaction().map_err(fault)?;
        if let Some(token) = reason.token {
            // Judged once more in the transaction: another process may have used or revoked it in between.
            let sql = "UPDATE token SET used = used + 1 WHERE id = ?1 AND used < uses AND revoked = 0";
            if tx.execute(sql, [token]).map_err(fault)? == 0 {
                return Err(refuse("token_used_up", "the token was used or revoked a moment ago", false));
            }
        }
        let sql =
            "INSERT INTO issued (serial, spki, workload, instance, not_before, not_after, issued, way, token, root)
                   VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)";
        let (workload, instance) = (agent.workload.as_str(), agent.instance.as_str());
        let dates = (peer.not_before.0, peer.not_after.0);
        let (spki, serial) = (peer.spki.0, &peer.serial);
        let row = params![serial, spki, workload, instance, dates.0, dates.1, now.0, reason.way, reason.token, root.0];
        tx.execute(sql, row).map_err(fault)?;
        tx.commit().map_err(fault)
    }
}

fn judge_token(token: &TokenInfo, now: Timestamp) -> Result<(), Refused> {
    let again = "make a new one with `sidewarden-collector token create`";
    match token.state(now) {
        TokenState::Valid => Ok(()),
        TokenState::UsedUp => {
            Err(refuse("token_used_up", format!("the token was used {} times: {again}", token.used), false))
        }
        TokenState::Expired => {
            Err(refuse("token_expired", format!("the token ended {}: {again}", token.expires), false))
        }
        TokenState::Revoked => Err(refuse("token_unknown", format!("the token was revoked: {again}"), false)),
    }
}

/// Whatever connections it asks over. What was issued by a clock that was ahead keeps nobody waiting until then.
fn check_pace(register: &Register, agent: &AgentId, now: Timestamp) -> Result<(), Refused> {
    let sql =
        "SELECT EXISTS (SELECT 1 FROM issued WHERE workload = ?1 AND instance = ?2 AND way IN ('grace', 'renewal')
               AND issued > ?3 AND issued <= ?4)";
    let values = params![agent.workload.as_str(), agent.instance.as_str(), now.minus(RENEW_EVERY).0, now.0];
    match register.db.query_row(sql, values, |row| row.get(0)).map_err(|e| register.fault(e))? {
        true => Err(refuse("bad_request", format!("one certificate request every {} s", RENEW_EVERY.as_secs()), true)),
        false => Ok(()),
    }
}

fn check_denied(directive: &Directive, agent: &AgentId, spki: Sha256, now: Timestamp) -> Result<(), Refused> {
    let (name, issuers) = (PeerName::Spiffe(agent.workload.clone()), Arc::default());
    let peer = Peer { name, spki, serial: String::new(), issuers, not_before: now, not_after: now };
    match directive.revokes(&peer).or_else(|| directive.revokes_agent(agent)) {
        Some(denied) => Err(refuse("revoked", denied.to_string(), false)),
        None => Ok(()),
    }
}

/// The key of a certificate request that was signed with it. Everything else in the request is ignored.
pub(super) fn read_request(csr: &[u8]) -> Result<(SubjectPublicKeyInfo, Sha256), Refused> {
    let bad = |detail: &str| refuse("bad_request", detail, false);
    if csr.len() > MAX_CSR {
        return Err(bad("the certificate request is too large"));
    }
    let (rest, request) =
        X509CertificationRequest::from_der(csr).map_err(|_| bad("the certificate request cannot be read"))?;
    if !rest.is_empty() {
        return Err(bad("bytes follow the certificate request"));
    }
    let spki = request.certification_request_info.subject_pki.raw;
    let key = SubjectPublicKeyInfo::from_der(spki).map_err(|_| bad("the request's key is of an unknown kind"))?;
    if ![&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384].contains(&key.algorithm()) {
        return Err(bad("the request's key must be ECDSA P-256 or P-384"));
    }
    request.verify_signature().map_err(|_| bad("the certificate request is not signed by its own key"))?;
    Ok((key, Sha256::of(&[spki])))
}
