//! Revoking and its undoing: what it would hit is told before, what it hits is in the directive that every agent keeps.
//!
//! An instance is revoked by its keys, for its peers see nothing else of it; which those are is looked up again and again,
//! so that no key issued in the same moment slips through.

use std::time::Duration;

use sidewarden_proto::directive::{Directive, DirectiveFault, Revocation, Target};
use sidewarden_proto::enrol::Refused;
use sidewarden_proto::identity::{AgentId, Peer, PeerName, Sha256, Usage};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{self, Credential, Trust};

use super::quarantine::agent_of;
use super::{Directives, DirectivesError, Fleet};
use crate::ca::{CaError, Grant, Holder, Issuer, MAX_KEYS};

/// Most revocations in force: each is told to every agent.
const MAX_REVOKED: usize = 2_000;
/// Longest reason, in characters.
const MAX_WHY: usize = 200;
/// A new key of a quarantined instance is known to its peers by then, where another collector tells them.
const KEY_WITHIN: Duration = Duration::from_secs(8);
/// Longest serial number, in hex digits (RFC 5280: 20 bytes).
const MAX_SERIAL: usize = 40;

/// What somebody wants to revoke.
#[derive(Clone, Debug)]
pub struct Asked {
    /// What.
    pub what: Target,
    /// The reason.
    pub why: String,
    /// The consequences were told and are wanted.
    pub confirmed: bool,
}

/// What was done.
#[derive(Clone, Debug)]
pub struct Done {
    /// The revocation, or the one that was undone.
    pub revocation: Revocation,
    /// The directive that says so.
    pub version: u64,
    /// What whoever asked should know.
    pub notes: Vec<String>,
}

/// Why nothing was done.
#[derive(Debug, thiserror::Error)]
pub enum RevokeError {
    /// What is asked for cannot be meant.
    #[error("{0}")]
    Wrong(String),
    /// It hits more than one instance, or the collector itself, and was not confirmed.
    #[error("this must be confirmed: {}", .0.join("; "))]
    Unconfirmed(Vec<String>),
    /// It is revoked already.
    #[error("{what} is revoked already, as {id}")]
    Already {
        /// What.
        what: Target,
        /// Under which name.
        id: String,
    },
    /// There is nothing of that name.
    #[error("there is no revocation {0}")]
    Unknown(String),
    /// There are too many.
    #[error("{MAX_REVOKED} revocations are in force: undo those whose certificates have ended")]
    Full,
    /// The directive.
    #[error(transparent)]
    Directive(#[from] DirectivesError),
    /// The register.
    #[error(transparent)]
    Register(#[from] CaError),
}

impl RevokeError {
    /// Whether the directive has no room for it.
    pub fn is_full(&self) -> bool {
        matches!(self, RevokeError::Directive(DirectivesError::Signing(DirectiveFault::TooLarge { .. })))
    }
}

/// Revokes.
pub fn revoke(
    issuer: &Issuer,
    directives: &Directives,
    fleet: &Fleet,
    asked: Asked,
    now: Timestamp,
) -> Result<Done, RevokeError> {
    if directives.is_following() {
        return Err(DirectivesError::Follows.into());
    }
    let what = normal(asked.what, issuer, now)?;
    let why = reason(&asked.why)?;
    let known = Known::look_up(issuer, directives, fleet, &what, now)?;
    let told = consequences(&what, &known);
    if !told.confirm.is_empty() && !asked.confirmed {
        return Err(RevokeError::Unconfirmed(told.confirm));
    }
    let own = issuer.authority().own().borrow().clone();
    let revocation = Revocation { id: new_id(), what, why, at_us: now, keys: known.keys };
    let version = directives.change(&own, now, |directive| add(directive, revocation.clone()))?;
    // A key that was recorded between the look-up and now is found by this one: whoever hands it out later asks again.
    let version = refresh(issuer, directives, now)?.unwrap_or(version);
    let notes = told.confirm.into_iter().chain(told.notes).collect();
    Ok(Done { revocation, version, notes })
}

/// Denies whatever these CA keys have signed, connections that stand included.
pub fn deny_issuers(
    directives: &Directives,
    own: &Credential,
    keys: &[Sha256],
    why: &str,
    now: Timestamp,
) -> Result<(), RevokeError> {
    directives.change(own, now, |directive| {
        let new = |what: &Target| directive.revoked.iter().all(|known| known.what != *what);
        let all = keys.iter().map(|spki| Target::IssuingKey { spki: *spki }).filter(new);
        let added =
            all.map(|what| Revocation { id: new_id(), what, why: why.to_owned(), at_us: now, keys: Vec::new() });
        let revoked = directive.revoked.iter().cloned().chain(added).collect();
        Ok::<_, RevokeError>(directive.clone().with_revoked(revoked))
    })?;
    Ok(())
}

fn new_id() -> String {
    let mut id = [0; 6];
    crate::random(&mut id);
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Undoes the revocation `id`.
pub fn undo(issuer: &Issuer, directives: &Directives, id: &str, now: Timestamp) -> Result<Done, RevokeError> {
    let own = issuer.authority().own().borrow().clone();
    let mut undone = None;
    let version = directives.change(&own, now, |directive| {
        let (out, kept) = directive.revoked.iter().cloned().partition(|revocation| revocation.id == id);
        let out: Vec<Revocation> = out;
        undone = Some(out.into_iter().next().ok_or_else(|| RevokeError::Unknown(id.chars().take(40).collect()))?);
        Ok::<_, RevokeError>(directive.with_revoked(kept))
    })?;
    let revocation = undone.ok_or_else(|| RevokeError::Unknown(id.to_owned()))?;
    let asks_again = "an agent that was refused asks again within five minutes; restart it for sooner".to_owned();
    Ok(Done { revocation, version, notes: vec![asks_again] })
}

/// Looks the keys of revoked and quarantined instances up again; the new version if any have come or gone.
pub fn refresh(issuer: &Issuer, directives: &Directives, now: Timestamp) -> Result<Option<u64>, RevokeError> {
    let is_instance = |revocation: &Revocation| matches!(revocation.what, Target::Instance { .. });
    let before = directives.now();
    // The collector that makes the directives looks them up; it knows our agents' keys from what we report.
    if directives.is_following() {
        return Ok(None);
    }
    if !before.directive.revoked.iter().any(is_instance) && before.directive.quarantined.is_empty() {
        return Ok(None);
    }
    let own = issuer.authority().own().borrow().clone();
    let version = directives.change(&own, now, |directive| {
        let mut revoked = directive.revoked.clone();
        for revocation in &mut revoked {
            if let Some(agent) = instance_of(&revocation.what) {
                revocation.keys = issuer.keys_of(&agent, now)?;
            }
        }
        let mut quarantined = directive.quarantined.clone();
        for quarantine in &mut quarantined {
            quarantine.keys = issuer.keys_of(&agent_of(quarantine), now)?;
        }
        let same = revoked == directive.revoked && quarantined == directive.quarantined;
        Ok::<_, RevokeError>(if same {
            directive
        } else {
            Directive { revoked, ..directive }.with_quarantined(quarantined)
        })
    })?;
    Ok(Some(version).filter(|version| *version != before.directive.version))
}

/// What was just issued, if it may be handed out: peers of an instance that is quarantined know its new key before.
pub fn hand_out(issuer: &Issuer, directives: &Directives, grant: Grant, now: Timestamp) -> Result<Grant, Refused> {
    let grant = issuer.still_allowed(grant, &directives.now().directive, now)?;
    let is_quarantined = |directive: &Directive| directive.quarantined.iter().any(|q| q.is_of(&grant.agent));
    if is_quarantined(&directives.now().directive) && directives.is_following() {
        await_key(directives, &grant)?;
    } else if is_quarantined(&directives.now().directive) {
        refresh(issuer, directives, now).map_err(|error| {
            tracing::error!(%error, agent = %grant.agent, "the new key of a quarantined instance cannot be told to its peers");
            let detail = "the collector could not issue a certificate: see its log".into();
            Refused { reason: "internal".into(), detail, retry: true }
        })?;
    }
    Ok(grant)
}

/// Waits until the collector that makes the directives has told everybody the key of a quarantined instance.
fn await_key(directives: &Directives, grant: &Grant) -> Result<(), Refused> {
    let end = std::time::Instant::now() + KEY_WITHIN;
    while std::time::Instant::now() < end {
        let in_force = directives.now();
        let of = in_force.directive.quarantined.iter().find(|quarantine| quarantine.is_of(&grant.agent));
        if of.is_none_or(|of| of.keys.iter().any(|key| key.to_string() == grant.event.spki)) {
            return Ok(());
        }
        std::thread::sleep(KEY_WITHIN / 80);
    }
    let detail = "the instance is quarantined, and the collector that tells its peers of new keys cannot be reached";
    Err(Refused { reason: "internal".into(), detail: detail.into(), retry: true })
}

fn instance_of(what: &Target) -> Option<AgentId> {
    match what {
        Target::Instance { workload, instance } => {
            Some(AgentId { workload: workload.clone(), instance: instance.clone() })
        }
        _ => None,
    }
}

fn add(directive: Directive, revocation: Revocation) -> Result<Directive, RevokeError> {
    if let Some(same) = directive.revoked.iter().find(|known| known.what == revocation.what) {
        return Err(RevokeError::Already { what: revocation.what, id: same.id.clone() });
    }
    if directive.revoked.len() >= MAX_REVOKED {
        return Err(RevokeError::Full);
    }
    let mut revoked = directive.revoked.clone();
    revoked.push(revocation);
    Ok(directive.with_revoked(revoked))
}

/// A reason in one line.
pub fn reason(why: &str) -> Result<String, RevokeError> {
    let why = why.trim();
    if why.is_empty() || why.chars().count() > MAX_WHY || why.chars().any(char::is_control) {
        return Err(RevokeError::Wrong(format!("a reason is needed, in one line of at most {MAX_WHY} characters")));
    }
    Ok(why.to_owned())
}

/// The one way of writing it: people copy serial numbers with colons and in capitals.
fn normal(what: Target, issuer: &Issuer, now: Timestamp) -> Result<Target, RevokeError> {
    let known = |agent: &AgentId| {
        let (workload, domain) = (&agent.workload, issuer.authority().domain());
        if workload.trust_domain() == *domain || !issuer.keys_of(agent, now)?.is_empty() {
            return Ok(());
        }
        Err(RevokeError::Wrong(format!(
            "{workload} is not of trust domain {domain}, and this instance was not seen here"
        )))
    };
    match what {
        Target::Serial { serial } => Ok(Target::Serial { serial: normal_serial(&serial)? }),
        Target::Instance { workload, instance } => {
            let agent = AgentId { workload, instance };
            known(&agent)?;
            Ok(Target::Instance { workload: agent.workload, instance: agent.instance })
        }
        Target::Unknown => Err(RevokeError::Wrong("this kind of target is unknown to this collector".into())),
        other => Ok(other),
    }
}

fn normal_serial(serial: &str) -> Result<String, RevokeError> {
    let digits: String = serial.trim().chars().filter(|c| *c != ':').collect::<String>().to_ascii_lowercase();
    let digits = digits.strip_prefix("0x").unwrap_or(&digits).trim_start_matches('0');
    if digits.is_empty() || digits.len() > MAX_SERIAL || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        let wrong = "a serial number is 1 to 40 hexadecimal digits, as `openssl x509 -noout -serial` shows it";
        return Err(RevokeError::Wrong(wrong.into()));
    }
    Ok(digits.to_owned())
}

/// What is known of a target when it is asked for.
#[derive(Debug)]
struct Known {
    /// The collector's own certificate, and one that it was given by somebody else.
    own: Vec<Peer>,
    /// Whom its certificate or key was issued to, if it was here.
    holder: Option<Holder>,
    /// The newest certificate of that instance.
    newest: Option<Holder>,
    /// The keys it stands for.
    keys: Vec<Sha256>,
    /// Instances that are connected now and would be hit.
    connected: usize,
    /// Other instances that have a key of it.
    sharers: Vec<AgentId>,
    /// Whether it has its certificates from somebody else's CA.
    is_guest: bool,
}

impl Known {
    fn look_up(
        issuer: &Issuer,
        directives: &Directives,
        fleet: &Fleet,
        what: &Target,
        now: Timestamp,
    ) -> Result<Known, RevokeError> {
        let holder = match what {
            Target::Serial { serial } => issuer.holder_of_serial(serial)?,
            Target::Key { spki } => issuer.holder_of_key(*spki)?,
            _ => None,
        };
        let newest = holder.as_ref().map(|holder| issuer.newest_of(&holder.agent)).transpose()?.flatten();
        let keys = match (what, instance_of(what)) {
            (_, Some(agent)) => issuer.keys_of(&agent, now)?,
            (Target::Serial { .. }, None) => holder.iter().map(|holder| holder.spki).collect(),
            _ => Vec::new(),
        };
        let is_hit = |agent: &AgentId| match what {
            Target::Workload { id } => *id == agent.workload,
            Target::IssuingKey { .. } => true,
            _ => false,
        };
        let connected = fleet.all().iter().filter(|(agent, _)| is_hit(agent)).count();
        let own = [Some(issuer.authority().own().borrow().clone()), directives.also_signs()];
        let directive = directives.now().directive.clone();
        let own = own.into_iter().flatten().map(|credential| shown_by(&credential, &directive)).collect();
        let (sharers, is_guest) = match instance_of(what) {
            Some(agent) => {
                let register = issuer.register();
                (register.sharers(&agent, now)?, register.is_guest(&agent, now)?)
            }
            None => (Vec::new(), false),
        };
        Ok(Known { own, holder, newest, keys, connected, sharers, is_guest })
    }
}

/// As agents see it: a root that has signed it need not be shown.
fn shown_by(credential: &Credential, directive: &Directive) -> Peer {
    let domain = &directive.trust_domain;
    let further = directive.foreign.domains.get(domain).into_iter().flatten();
    let roots = directive.bundle.iter().chain(further).map(|root| root.0.clone().into()).collect();
    let trust = Trust::single(domain.clone(), roots);
    tls::peer_with(credential.chain(), &trust, Usage::Server).unwrap_or_else(|_| credential.peer().clone())
}

/// What has to be confirmed, and what is good to know.
#[derive(Debug, Default, PartialEq, Eq)]
struct Told {
    confirm: Vec<String>,
    notes: Vec<String>,
}

fn consequences(what: &Target, known: &Known) -> Told {
    let mut told = Told::default();
    told.confirm.extend(known.own.iter().find_map(|own| hits_ourselves(what, own)));
    if let [one, rest @ ..] = &known.sharers[..] {
        let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
        told.confirm.push(format!("its key is also that of {}{more}, which is cut off with it", one.instance));
    }
    if known.is_guest {
        let line = "its certificates are of another CA: the next one that it is given there is denied only once a collector has \
                    seen it; end it there as well, or revoke the workload";
        told.notes.push(line.into());
    }
    match what {
        Target::Workload { id } => {
            let line = format!("every instance of {id} is cut off, {} of them connected now", known.connected);
            told.confirm.push(line);
        }
        Target::IssuingKey { .. } => {
            told.confirm.push("everything that this CA has signed is cut off, whoever it is".into());
        }
        Target::Serial { .. } | Target::Key { .. } => told.notes.extend(about_holder(known)),
        Target::Instance { .. } if known.keys.is_empty() => {
            told.notes.push("no certificate of this instance holds now; it gets no new one either".into());
        }
        Target::Instance { .. } if known.keys.len() >= MAX_KEYS => {
            let line =
                format!("it has more than {MAX_KEYS} keys, and peers deny the newest only: revoke the workload too");
            told.notes.push(line);
        }
        Target::Instance { .. } | Target::Unknown => {}
    }
    told
}

fn hits_ourselves(what: &Target, own: &Peer) -> Option<String> {
    let is_ours = match what {
        Target::Serial { serial } => *serial == own.serial,
        Target::Key { spki } => *spki == own.spki,
        Target::Workload { id } => own.name == PeerName::Spiffe(id.clone()),
        Target::IssuingKey { spki } => own.issuers.contains(spki),
        Target::Instance { workload, .. } => own.name == PeerName::Spiffe(workload.clone()),
        Target::Unknown => false,
    };
    is_ours.then(|| match what {
        Target::IssuingKey { .. } => {
            "this CA has signed the collector's own certificate: every agent of this trust domain is cut off, and none \
             takes another word of this collector, so that undoing it does not reach them"
                .to_owned()
        }
        _ => {
            "this is the collector's own certificate: agents take no further word of it, so that undoing does not reach \
             them, until a restart gives it a new one"
                .to_owned()
        }
    })
}

fn about_holder(known: &Known) -> Option<String> {
    let Some(holder) = &known.holder else {
        return Some(
            "this collector has issued nothing like it: it is denied all the same; check it for a slip".into(),
        );
    };
    match &known.newest {
        Some(newest) if newest.spki != holder.spki => Some(format!(
            "its holder {} has had newer certificates since (now {}): revoke the instance to stop it",
            holder.agent, newest.serial
        )),
        _ => Some(format!("its holder is {}", holder.agent)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Peer {
        Peer {
            name: PeerName::Spiffe("spiffe://x/sidewarden/collector".parse().unwrap()),
            spki: Sha256([1; 32]),
            serial: "aa".into(),
            issuers: [Sha256([2; 32])].into(),
            not_before: Timestamp(0),
            not_after: Timestamp(9),
        }
    }

    fn holder(key: u8) -> Holder {
        Holder { agent: "spiffe://x/shop/web#c1".parse().unwrap(), spki: Sha256([key; 32]), serial: format!("{key:x}") }
    }

    #[test]
    fn what_hits_many_or_ourselves_must_be_confirmed() {
        let agent: AgentId = "spiffe://x/shop/web#c1".parse().unwrap();
        let rows = [
            (Target::Serial { serial: "aa".into() }, 1),
            (Target::Serial { serial: "ab".into() }, 0),
            (Target::Key { spki: Sha256([1; 32]) }, 1),
            (Target::Key { spki: Sha256([2; 32]) }, 0),
            (Target::IssuingKey { spki: Sha256([2; 32]) }, 2),
            (Target::IssuingKey { spki: Sha256([3; 32]) }, 1),
            (Target::Workload { id: "spiffe://x/sidewarden/collector".parse().unwrap() }, 2),
            (Target::Workload { id: agent.workload.clone() }, 1),
            (Target::Instance { workload: agent.workload, instance: agent.instance }, 0),
        ];
        for (what, confirm) in rows {
            let known = Known {
                own: vec![own()],
                holder: None,
                newest: None,
                keys: Vec::new(),
                connected: 3,
                sharers: Vec::new(),
                is_guest: false,
            };
            let told = consequences(&what, &known);
            assert_eq!(told.confirm.len(), confirm, "{what}: {told:?}");
        }
    }

    #[test]
    fn a_serial_whose_holder_has_moved_on_is_said_to_stop_nobody() {
        let rows = [
            (None, None, "check it for a slip"),
            (Some(holder(5)), Some(holder(5)), "its holder is spiffe://x/shop/web#c1"),
            (Some(holder(5)), Some(holder(6)), "revoke the instance"),
        ];
        for (holder, newest, wanted) in rows {
            let known = Known {
                own: vec![own()],
                holder,
                newest,
                keys: Vec::new(),
                connected: 0,
                sharers: Vec::new(),
                is_guest: false,
            };
            let told = consequences(&Target::Serial { serial: "5".into() }, &known);
            assert!(told.notes[0].contains(wanted), "{told:?}");
        }
    }

    #[test]
    fn serial_numbers_are_taken_as_people_copy_them() {
        for text in ["0A:1b:2C", "a1b2c", "0x0a1b2c", " 0A1B2C\n"] {
            assert_eq!(normal_serial(text).unwrap(), "a1b2c", "{text:?}");
        }
        for bad in ["", "0", "xyz", "12 34", &"f".repeat(41)] {
            assert!(normal_serial(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_reason_is_one_line() {
        assert_eq!(reason(" laptop lost ").unwrap(), "laptop lost");
        for bad in ["", "  ", "a\nb", "\u{1b}[31m", &"x".repeat(201)] {
            assert!(reason(bad).is_err(), "{bad:?}");
        }
    }
}
