//! Who this collector is to others, and whose agents it lets in.
//!
//! To agents that were issued a certificate here it shows one of its own CA. Beside that it may have its name from somebody
//! else, in files or from a SPIFFE Workload API ([`given`]): it is shown to agents that go by that CA, signs directives as well,
//! and its roots vouch for agents. The page may have a certificate of its own ([`page`]).

pub mod given;
pub mod page;

use std::sync::{Arc, Mutex, PoisonError};

use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use sidewarden_proto::directive::Directive;
use sidewarden_proto::enrol::Der;
use sidewarden_proto::event::CaCertificate;
use sidewarden_proto::given::{Elsewhere, Offered};
use sidewarden_proto::identity::{Sha256, TrustDomain, Usage, describe};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{self, Credential, Floor, TlsError, Trust, Verifier};
use tokio::sync::watch;

use crate::app::Core;
use crate::ca::Authority;
use crate::config::Config;
use crate::fleet::Directives;

/// What sessions begin with. Made anew as a whole when a part of it changes.
#[derive(Debug)]
pub struct Front {
    own: Credential,
    given: Option<Arc<Offered>>,
    trust: Trust,
    /// By the roots of our own CA alone.
    ours: Verifier,
    domain: TrustDomain,
}

impl Front {
    /// For handshakes that begin a session or follow one.
    pub fn config(&self, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>, TlsError> {
        let Some(given) = &self.given else { return tls::server_config(&self.own, &self.trust, Floor::Tls13, alpn) };
        let roots = given.trust.domains.get(&self.domain).map_or(&[][..], Vec::as_slice);
        tls::server_config_with_another(&self.own, (&given.credential, roots), &self.trust, Floor::Tls13, alpn)
    }

    /// Our certificate for whoever knows our CA.
    pub fn own(&self) -> &Credential {
        &self.own
    }

    /// Whether a collector's CA of the trust domain has issued `chain`, and not somebody else.
    pub fn is_ours(&self, chain: &[CertificateDer<'_>], now: Timestamp) -> bool {
        self.ours.verify(chain, Usage::Client, now).is_ok()
    }

    /// Why nobody vouches any more for somebody who was let in.
    pub fn judge_again(&self, chain: &[CertificateDer<'_>], now: Timestamp) -> Result<(), rustls::Error> {
        tls::verify_chain(chain, &self.trust, Usage::Client, now).map(drop)
    }

    /// The roots that vouch for agents, by trust domain.
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// The roots by which somebody of `domain`, whose certificate is not of our own CA, takes our word: for our own domain those
    /// that came with what we were given.
    pub fn roots_of_guest(&self, domain: &TrustDomain) -> Trust {
        let given = self.given.as_ref().filter(|_| *domain == self.domain);
        let roots =
            given.and_then(|given| given.trust.domains.get(domain)).or_else(|| self.trust.domains.get(&self.domain));
        Trust::single(self.domain.clone(), roots.cloned().unwrap_or_default())
    }

    fn is_made_of(&self, own: &Credential, given: Option<&Arc<Offered>>, trust: &Trust) -> bool {
        let same_given = match (&self.given, given) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, None) => true,
            _ => false,
        };
        self.own.chain() == own.chain() && same_given && self.trust == *trust
    }
}

/// Keeps [`Front`] and everything it is made of.
#[derive(Debug)]
pub struct Identities {
    authority: Arc<Authority>,
    directives: Arc<Directives>,
    /// Other trust domains whose agents may come in.
    admitted: Vec<TrustDomain>,
    given: watch::Sender<Option<Arc<Offered>>>,
    /// One change at a time.
    changing: Mutex<()>,
    front: watch::Sender<Arc<Front>>,
    page: watch::Sender<page::Shown>,
}

impl Identities {
    /// With nothing but our own CA.
    pub fn new(
        authority: Arc<Authority>,
        directives: Arc<Directives>,
        admitted: Vec<TrustDomain>,
    ) -> Result<Identities, TlsError> {
        let own = authority.own().borrow().clone();
        let trust = trust(&authority, None, &admitted, &directives.now().directive);
        let front = build(&authority, own.clone(), None, trust)?;
        let (given, page) = (watch::Sender::new(None), watch::Sender::new(page::Shown::own(own)));
        Ok(Identities {
            authority,
            directives,
            admitted,
            given,
            changing: Mutex::default(),
            front: watch::Sender::new(Arc::new(front)),
            page,
        })
    }

    /// What sessions begin with, and every change of it.
    pub fn front(&self) -> watch::Receiver<Arc<Front>> {
        self.front.subscribe()
    }

    /// What somebody else has given us, if there is something.
    pub fn given(&self) -> Option<Arc<Offered>> {
        self.given.borrow().clone()
    }

    /// What the page and the API show.
    pub fn page(&self) -> watch::Receiver<page::Shown> {
        self.page.subscribe()
    }

    /// Roots of our own trust domain that are somebody else's, as agents are told of them.
    pub fn further_roots(&self) -> Vec<Der> {
        let domain = self.authority.domain();
        let given = self.given();
        let roots = given.iter().flat_map(|given| given.trust.domains.get(domain)).flatten();
        roots.map(|root| Der(root.to_vec())).collect()
    }

    /// Puts together what there is now. What cannot be used leaves everything as it was.
    pub fn refresh(&self) -> Result<(), TlsError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let (own, given) = (self.authority.own().borrow().clone(), self.given());
        let trust = trust(&self.authority, given.as_deref(), &self.admitted, &self.directives.now().directive);
        if self.front.borrow().is_made_of(&own, given.as_ref(), &trust) {
            return Ok(());
        }
        self.front.send_replace(Arc::new(build(&self.authority, own, given, trust)?));
        Ok(())
    }

    /// Takes what somebody else has given us; it is shown from the next handshake on.
    fn take(&self, offered: Offered) -> Result<(), TlsError> {
        let before = self.given.send_replace(Some(Arc::new(offered)));
        self.refresh().inspect_err(|_| drop(self.given.send_replace(before)))
    }

    /// The certificates that others have to renew, for whoever tells when they end.
    pub fn dates(&self) -> Vec<CaCertificate> {
        let mut dates = Vec::new();
        if let Some(given) = self.given() {
            dates.push(date("identity", given.credential.peer().name.to_string(), &given.credential.chain()[0]));
            let roots =
                given.trust.domains.iter().flat_map(|(domain, roots)| roots.iter().map(move |root| (domain, root)));
            dates.extend(
                roots.map(|(domain, root)| date("identity_root", format!("{domain}: {}", subject(root)), root)),
            );
        }
        let page = self.page.borrow();
        if page.from().is_some() {
            dates.push(date("page", page.names(), &page.credential().chain()[0]));
        }
        dates
    }
}

/// Puts [`Front`] together anew whenever a part of it has changed, until the shutdown.
pub async fn keep(core: Core) {
    let mut own = core.issuer.authority().own();
    let (mut given, mut directive) = (core.identities.given.subscribe(), core.directives.subscribe());
    loop {
        if let Err(error) = core.identities.refresh() {
            tracing::error!(%error, "sessions go on with the certificates and roots as they were");
        }
        let changed = tokio::select! {
            changed = own.changed() => changed,
            changed = given.changed() => changed,
            changed = directive.changed() => changed,
            () = core.shutdown.cancelled() => return,
        };
        if changed.is_err() {
            return;
        }
    }
}

fn subject(cert: &CertificateDer<'_>) -> String {
    describe(cert).map(|described| described.subject).unwrap_or_default()
}

fn date(what: &str, name: String, cert: &CertificateDer<'_>) -> CaCertificate {
    let (not_before_us, not_after_us) = tls::validity(cert).unwrap_or_default();
    CaCertificate { what: what.into(), name, not_before_us, not_after_us }
}

/// Whose word counts for agents that come in: our own roots; for our own domain what we were given besides, or the collector that
/// we follow was; for others that are admitted what we were given, and what was imported.
fn trust(authority: &Authority, given: Option<&Offered>, admitted: &[TrustDomain], directive: &Directive) -> Trust {
    let mut trust = authority.trust();
    let counts = |domain: &TrustDomain| domain == authority.domain() || admitted.contains(domain);
    let given = given.into_iter().flat_map(|given| &given.trust.domains).filter(|(domain, _)| counts(domain));
    trust.add(&given.map(|(domain, roots)| (domain.clone(), roots.clone())).collect());
    let imported = directive.foreign.domains.iter().filter(|(domain, _)| counts(domain));
    let der = |roots: &[Der]| roots.iter().map(|root| root.0.clone().into()).collect::<Vec<_>>();
    trust.add(&imported.map(|(domain, roots)| (domain.clone(), der(roots))).collect());
    trust
}

fn build(authority: &Authority, own: Credential, given: Option<Arc<Offered>>, trust: Trust) -> Result<Front, TlsError> {
    let (ours, domain) = (Verifier::new(&authority.trust())?, authority.domain().clone());
    let front = Front { own, given, trust, ours, domain };
    // What makes no configuration must not be taken.
    front.config(&[])?;
    Ok(front)
}

/// Whether the certificates that the settings name can be used now; every fault at once. What a Workload API would say is not
/// asked for.
pub fn check(config: &Config, now: Timestamp) -> anyhow::Result<()> {
    let mut faults = Vec::new();
    if let Some(Elsewhere::Files(files)) = &config.identity {
        let follows = config.ca.leader.is_some();
        let judged = files.read().map_err(|fault| fault.to_string());
        let judged = judged.and_then(|offered| judge(&offered, &config.trust_domain, follows, &[], now));
        faults.extend(judged.err().map(|fault| format!("identity: {fault}")));
    }
    if let Some(pair) = &config.api.certificate {
        faults.extend(page::read(pair, now).err().map(|fault| format!("api.cert: {fault}")));
    }
    anyhow::ensure!(faults.is_empty(), faults.join("\n"));
    Ok(())
}

/// Whether `offered` may be this collector's: its name is one of ours, and it can do what a collector must.
fn judge(offered: &Offered, domain: &TrustDomain, follows: bool, own: &[Sha256], now: Timestamp) -> Result<(), String> {
    let (id, ours) = (&offered.workload, tls::collector_id(domain));
    if id.trust_domain() != *domain || !tls::is_collector(id) {
        return Err(format!(
            "it names {id}, and a collector of trust domain {domain} is called {ours}: have it issued for that name, or set trust_domain"
        ));
    }
    if follows && *id == ours {
        return Err(format!(
            "it names {id}, which signs directives: a collector with ca.leader needs a name below it, like {ours}/second"
        ));
    }
    if !follows && *id != ours {
        return Err(format!(
            "it names {id}: the collector that makes the directives is called {ours}, and only the others below it"
        ));
    }
    let verified = tls::verify_chain(offered.credential.chain(), &offered.trust, Usage::Server, now);
    verified.map_err(|error| format!("it does not verify with the roots it came with: {error}"))?;
    let roots = offered.trust.domains.get(domain).into_iter().flatten();
    if roots.filter_map(|root| tls::spki_of(root).ok()).any(|spki| own.contains(&spki)) {
        return Err("its roots hold one of this collector's own CA, which would stay trusted when that is retired: leave it out".into());
    }
    if !follows {
        let signed = offered.credential.sign(b"");
        signed.map_err(|_| "its key must be ECDSA P-256: it signs directives".to_owned())?;
    }
    Ok(())
}
