//! One agent's session: proves who it is, then carries links to `commit` and acknowledgements back.
//!
//! The rules of the exchange are `proto::session`'s; here are the waits, the limits and the reasons to end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;
use sidewarden_proto::batch::{Cursor, Epoch};
use sidewarden_proto::enrol::{Answer, Refused};
use sidewarden_proto::event::{AgentConnected, AgentDisconnected, Body, Event, Severity, ShownCertificate};
use sidewarden_proto::identity::{AgentId, Peer, PeerName, Usage};
use sidewarden_proto::session::{FromAgent, Receiver, SessionError};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls;
use sidewarden_proto::wire::{Decoder, Frame, Hello, Refuse, WireError};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::{sleep, sleep_until, timeout};

use super::Shared;
use crate::ca::{CaError, KeyState, RENEW_EVERY, is_reserved};
use crate::commit::{Fault, Progress};
use crate::fleet::{self, Coming, InForce, Place};
use crate::identity::Front;

/// Read at once; small, because ten thousand sessions each hold one.
const READ: usize = 8 << 10;
/// An agent that does not take what we send for this long is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the last frame may take to get out before the connection is closed.
const LINGER: Duration = Duration::from_secs(1);

/// Somebody who has shown a certificate that verifies.
#[derive(Debug)]
pub struct Come {
    /// From where.
    pub source: SocketAddr,
    /// `quic` or `tcp`.
    pub transport: &'static str,
    /// The verified chain, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the agent stopped: {0}")]
    Bye(String),
    #[error("silent for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("connection lost: {0}")]
    Lost(String),
    #[error("the agent came back on another connection")]
    Replaced,
    #[error("its certificate ran out")]
    Expired,
    #[error("{0}")]
    Denied(String),
    #[error("nobody vouches for its certificate any more: {0}")]
    Unvouched(String),
    #[error(transparent)]
    NotTaken(#[from] Fault),
    #[error(transparent)]
    Frame(#[from] WireError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("the collector is shutting down")]
    Shutdown,
}

impl End {
    /// What the agent is told; `None` where there is nobody to tell.
    fn refuse(&self) -> Option<Refuse> {
        let (reason, retry) = match self {
            End::Bye(_) | End::Lost(_) | End::Silent(_) => return None,
            End::Replaced => ("second_instance", true),
            End::Expired => ("expired", true),
            End::Denied(_) => ("revoked", false),
            // It may have another certificate by now.
            End::Unvouched(_) => ("unknown_ca", true),
            End::NotTaken(Fault::Store(_) | Fault::Gap { .. }) => ("overloaded", true),
            End::NotTaken(Fault::Malformed(_)) | End::Frame(_) | End::Session(SessionError::Unexpected(_)) => {
                ("malformed", true)
            }
            End::NotTaken(Fault::ChainBroken { .. }) | End::Session(SessionError::ChainBroken { .. }) => {
                ("chain_broken", true)
            }
            End::Session(_) => ("malformed", true),
            End::Shutdown => ("shutdown", true),
        };
        Some(Refuse { reason: reason.to_owned(), detail: self.to_string(), retry })
    }

    fn is_clean(&self) -> bool {
        matches!(self, End::Bye(_))
    }

    /// What is worth an event of its own: bytes or histories that no honest agent sends.
    fn is_hostile(&self) -> bool {
        matches!(self, End::NotTaken(Fault::Malformed(_) | Fault::ChainBroken { .. }) | End::Frame(_) | End::Session(_))
    }
}

/// Who is not let in, and what is told.
struct NotAdmitted {
    refuse: Refuse,
    /// Worth waking somebody.
    critical: bool,
}

fn not_admitted(reason: &str, detail: impl Into<String>, retry: bool) -> NotAdmitted {
    NotAdmitted { refuse: Refuse { reason: reason.to_owned(), detail: detail.into(), retry }, critical: false }
}

/// Both directions of a connection, in frames.
struct Wire<R, W> {
    reader: R,
    writer: W,
    decoder: Decoder,
    buffer: Vec<u8>,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Wire<R, W> {
    /// Reads what is there; safe to be cancelled.
    async fn read(&mut self) -> Result<(), End> {
        self.buffer.clear();
        match self.reader.read_buf(&mut self.buffer).await {
            Ok(0) if self.decoder.is_mid_frame() => Err(End::Lost("cut in the middle of a frame".into())),
            Ok(0) => Err(End::Lost("closed by the agent".into())),
            Ok(_) => {
                self.decoder.push(&self.buffer);
                Ok(())
            }
            Err(error) => Err(End::Lost(error.to_string())),
        }
    }

    async fn next(&mut self) -> Result<Frame, End> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(frame);
            }
            self.read().await?;
        }
    }

    async fn send(&mut self, frame: &Frame) -> Result<(), End> {
        let write = async {
            self.writer.write_all(&frame.encode()).await?;
            self.writer.flush().await
        };
        match timeout(WRITE_TIMEOUT, write).await {
            Ok(written) => written.map_err(|error| End::Lost(error.to_string())),
            Err(_) => Err(End::Lost("the agent takes nothing".into())),
        }
    }

    /// Says the last word and gives it a moment to arrive.
    async fn close(mut self, refuse: Option<Refuse>) {
        if let Some(refuse) = refuse {
            let _ = self.send(&Frame::Refuse(refuse)).await;
        }
        let _ = timeout(LINGER, async {
            let _ = self.writer.shutdown().await;
            while let Ok(read) = self.reader.read_buf(&mut self.buffer).await {
                if read == 0 {
                    break;
                }
                self.buffer.clear();
            }
        })
        .await;
    }
}

/// Serves one connection to its end.
pub async fn serve<R, W>(shared: &Arc<Shared>, come: Come, reader: R, writer: W)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut wire = Wire { reader, writer, decoder: Decoder::default(), buffer: Vec::with_capacity(READ) };
    let hello = match timeout(shared.handshake_timeout, wire.next()).await {
        Ok(Ok(Frame::Hello(hello))) => hello,
        other => {
            let detail = match other {
                Ok(Ok(_)) => "the first frame is no hello".to_owned(),
                Ok(Err(end)) => end.to_string(),
                Err(_) => "no hello in time".to_owned(),
            };
            shared.refusals.ingest(come.source, "malformed", detail.clone());
            return wire.close(Some(not_admitted("malformed", detail, true).refuse)).await;
        }
    };
    match admit(shared, &come, &hello).await {
        Ok(admitted) => run(shared, &come, &hello, admitted, wire).await,
        Err(NotAdmitted { refuse, critical }) => {
            let tell = if critical { super::Refusals::ingest_critical } else { super::Refusals::ingest };
            tell(&shared.refusals, come.source, &refuse.reason, &refuse.detail);
            wire.close(Some(refuse)).await;
        }
    }
}

/// Who was let in.
struct Admitted {
    agent: Arc<AgentId>,
    peer: Peer,
    place: Place,
    cursor: Cursor,
    /// See [`Session::guest`].
    guest: Option<Vouched>,
}

/// Whose word counts for somebody whose certificate was issued elsewhere, and the chain that it has shown.
type Vouched = (watch::Receiver<Arc<Front>>, Vec<CertificateDer<'static>>);

async fn admit(shared: &Arc<Shared>, come: &Come, hello: &Hello) -> Result<Admitted, NotAdmitted> {
    // What is asked of it now is asked again whenever it changes.
    let mut fronts = shared.identities.front();
    let front = fronts.borrow_and_update().clone();
    let peer = tls::peer_with(&come.chain, front.trust(), Usage::Client);
    let peer = peer.map_err(|e| not_admitted("bad_certificate", e.to_string(), false))?;
    let PeerName::Spiffe(workload) = peer.name.clone() else {
        return Err(not_admitted("bad_certificate", "the certificate names no workload", false));
    };
    let agent = Arc::new(AgentId { workload, instance: hello.instance.clone() });
    if is_reserved(agent.workload.path()) {
        return Err(not_admitted("not_allowed", "a collector's certificate is not an agent's", false));
    }
    if !shared.directives.is_there() {
        return Err(not_admitted("not_ready", super::NO_DIRECTIVE, true));
    }
    let (in_force, now) = (shared.directives.now(), (shared.clock)());
    let is_guest = !front.is_ours(&come.chain, now);
    if is_guest {
        // The handshake may have been a while ago, and with other roots.
        let judged = front.judge_again(&come.chain, now);
        judged.map_err(|e| not_admitted("unknown_ca", format!("{agent}: {e}"), true))?;
    }
    if let Some(denied) = in_force.directive.revokes(&peer).or_else(|| in_force.directive.revokes_agent(&agent)) {
        let refused = not_admitted("revoked", format!("{agent}: {denied}"), false);
        // Its peers know it by its keys, and this one may be new.
        if is_guest {
            note_guest(shared, &agent, &peer, now).await?;
        }
        return Err(refused);
    }
    let follows = match is_guest {
        false => check_key(shared, &agent, &peer, &come.chain).await?,
        true => can_be_told(&front, &in_force, &agent, hello, now).map(|()| false)?,
    };
    let (source, transport) = (come.source.to_string(), come.transport);
    let begins = is_guest.then_some(peer.not_before);
    let coming = Coming { source, transport, directive: hello.directive, understands: hello.understands, begins };
    let place = shared.fleet.enter(&agent, peer.spki, follows, coming, now);
    let place = place.map_err(|second| NotAdmitted {
        critical: true,
        ..not_admitted("second_instance", second.to_string(), true)
    })?;
    // One that was refused its place must not take the key of who has it out of use. On an error the place is free again.
    match is_guest {
        true => note_guest(shared, &agent, &peer, now).await?,
        false => note_key(shared, &agent, &peer).await?,
    }
    let cursor = cursor(shared, &agent, hello.epoch).await?;
    let guest = is_guest.then(|| (fronts, come.chain.clone()));
    Ok(Admitted { agent, peer, place, cursor, guest })
}

/// Whether somebody whose certificate was issued elsewhere can take the directive in force, if it has an older one or none: it would
/// know of no revocation otherwise.
fn can_be_told(
    front: &Front,
    in_force: &InForce,
    agent: &AgentId,
    hello: &Hello,
    now: Timestamp,
) -> Result<(), NotAdmitted> {
    if hello.directive >= in_force.directive.version {
        return Ok(());
    }
    let opened = in_force.signed.open(&front.roots_of_guest(&agent.workload.trust_domain()), now);
    let why = |error| {
        format!(
            "the directive in force bears no signature that {agent} could take ({error}): the collector that makes them needs an \
             `[identity]` of the same CA"
        )
    };
    opened.map(drop).map_err(|error| not_admitted("not_ready", why(error), true))
}

/// Notes the key of somebody whose certificate was issued elsewhere; one that is revoked or quarantined is denied by it at once.
async fn note_guest(
    shared: &Arc<Shared>,
    agent: &Arc<AgentId>,
    peer: &Peer,
    now: Timestamp,
) -> Result<(), NotAdmitted> {
    let (issuer, directives) = (shared.issuer.clone(), shared.directives.clone());
    let (guest, shown) = (agent.clone(), peer.clone());
    let noted = tokio::task::spawn_blocking(move || {
        let noted = issuer.register().guest_seen(&guest, &shown, now)?;
        let directive = directives.now().directive.clone();
        let is_named = directive.revokes_agent(&guest).is_some() || directive.quarantines_agent(&guest).is_some();
        if is_named && directive.denies(&shown).is_none() {
            fleet::refresh(&issuer, &directives, now).map_err(|error| CaError::Request(error.to_string()))?;
        }
        Ok::<_, CaError>(noted)
    });
    match noted.await {
        Ok(Ok(Ok(()))) => Ok(()),
        Ok(Ok(Err(full))) => {
            Err(NotAdmitted { critical: true, ..not_admitted("limit_reached", format!("{agent}: {full}"), true) })
        }
        Ok(Err(error)) => Err(internal(&error.to_string())),
        Err(error) => Err(internal(&error.to_string())),
    }
}

/// Whether the key is this instance's, and follows an earlier one of it.
async fn check_key(
    shared: &Arc<Shared>,
    agent: &Arc<AgentId>,
    peer: &Peer,
    chain: &[CertificateDer<'static>],
) -> Result<bool, NotAdmitted> {
    let (issuer, owner, shown, now) = (shared.issuer.clone(), agent.clone(), peer.clone(), (shared.clock)());
    let chain = chain.to_vec();
    let looked_up = tokio::task::spawn_blocking(move || issuer.known(&owner, &shown, &chain, now)).await;
    let critical = |reason, detail: String| NotAdmitted { critical: true, ..not_admitted(reason, detail, false) };
    match looked_up {
        Ok(Ok(KeyState::Current { renewal })) => Ok(renewal),
        Ok(Ok(KeyState::OtherInstance(other))) => {
            Err(critical("wrong_instance", format!("{agent} shows the key that was issued to instance {other}")))
        }
        Ok(Ok(KeyState::Superseded)) => {
            Err(critical("second_instance", format!("{agent} shows a key that a newer one has replaced")))
        }
        Ok(Ok(KeyState::Unknown)) => {
            Err(critical("not_issued_here", format!("{agent} shows a key that is not in this collector's register")))
        }
        Ok(Err(refused)) => Err(internal(&refused.detail)),
        Err(error) => Err(internal(&error.to_string())),
    }
}

/// Notes that the key is in use: from now on, older ones of its instance are not.
async fn note_key(shared: &Arc<Shared>, agent: &Arc<AgentId>, peer: &Peer) -> Result<(), NotAdmitted> {
    let (issuer, owner, spki) = (shared.issuer.clone(), agent.clone(), peer.spki);
    match tokio::task::spawn_blocking(move || issuer.seen(&owner, spki)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(internal(&error.to_string())),
        Err(error) => Err(internal(&error.to_string())),
    }
}

fn internal(error: &str) -> NotAdmitted {
    tracing::error!(error, "an agent could not be let in");
    not_admitted("overloaded", "the collector has trouble with its store: see its log", true)
}

async fn cursor(shared: &Shared, agent: &Arc<AgentId>, epoch: Epoch) -> Result<Cursor, NotAdmitted> {
    match shared.commits.cursor(agent.clone(), epoch).await {
        Ok(Ok(cursor)) => Ok(cursor),
        Ok(Err(error)) => Err(internal(&error)),
        Err(closed) => Err(not_admitted("shutdown", closed.to_string(), true)),
    }
}

async fn run<R, W>(shared: &Arc<Shared>, come: &Come, hello: &Hello, admitted: Admitted, mut wire: Wire<R, W>)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let agent = admitted.agent.clone();
    let connected = AgentConnected {
        workload: agent.workload.clone(),
        instance: agent.instance.to_string(),
        source: come.source.to_string(),
        transport: come.transport.to_owned(),
        version: hello.version.chars().take(64).collect(),
        clock_ahead_us: clock_ahead(hello.at_us, (shared.clock)()),
        mode: hello.mode.chars().take(16).collect(),
        certificate: Some(shown(&admitted)),
    };
    let summary = format!("{agent} connected from {} over {}", come.source, come.transport);
    tell(shared, Severity::Info, summary, connected.into()).await;
    let end = Session::new(shared, come.source, hello, admitted).drive(&mut wire).await;
    tracing::debug!(%agent, source = %come.source, %end, "session ended");
    if end.is_hostile() {
        let reason = end.refuse().map_or_else(|| "malformed".to_owned(), |refuse| refuse.reason);
        shared.refusals.ingest_critical(come.source, &reason, format!("{agent}: {end}"));
    }
    // As bad as when it comes back: an operator has done this, and knows.
    if matches!(end, End::Denied(_)) {
        shared.refusals.ingest(come.source, "revoked", format!("{agent}: {end}"));
    }
    // One that was replaced is still connected, on the connection that took over.
    if !matches!(end, End::Replaced) {
        tell_disconnected(shared, &agent, &end).await;
    }
    wire.close(end.refuse()).await;
}

fn shown(admitted: &Admitted) -> ShownCertificate {
    let Peer { spki, serial, not_before, not_after, .. } = &admitted.peer;
    ShownCertificate {
        serial: serial.clone(),
        spki: spki.to_string(),
        not_before_us: *not_before,
        not_after_us: *not_after,
        elsewhere: admitted.guest.is_some(),
    }
}

/// How far the agent's clock is ahead, microseconds; the way here took less than the time limit of a handshake.
fn clock_ahead(theirs: Timestamp, ours: Timestamp) -> i64 {
    if theirs == Timestamp(0) { 0 } else { theirs.0.saturating_sub(ours.0) }
}

async fn tell_disconnected(shared: &Shared, agent: &AgentId, end: &End) {
    let body = AgentDisconnected {
        workload: agent.workload.clone(),
        instance: agent.instance.to_string(),
        reason: end.to_string(),
        clean: end.is_clean(),
    };
    let severity = if end.is_clean() { Severity::Info } else { Severity::Notice };
    tell(shared, severity, format!("{agent} disconnected: {end}"), body.into()).await;
}

async fn tell(shared: &Shared, severity: Severity, summary: String, body: Body) {
    let event = Event::new((shared.clock)(), severity, summary, &body);
    if shared.commits.own(event).await.is_err() {
        tracing::debug!("an event came after the store was closed");
    }
}

/// A session that stands.
struct Session<'a> {
    shared: &'a Arc<Shared>,
    source: SocketAddr,
    agent: Arc<AgentId>,
    peer: Peer,
    place: Place,
    receiver: Receiver,
    welcome: Option<Frame>,
    progress: (watch::Sender<Progress>, watch::Receiver<Progress>),
    directive: watch::Receiver<Arc<InForce>>,
    /// Of one whose certificate was issued elsewhere.
    guest: Option<Vouched>,
    expires: tokio::time::Instant,
    pace: Pace,
    renewed: Option<Instant>,
    /// When the last whole frame came.
    heard: tokio::time::Instant,
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

impl<'a> Session<'a> {
    fn new(shared: &'a Arc<Shared>, source: SocketAddr, hello: &Hello, admitted: Admitted) -> Session<'a> {
        let Admitted { agent, peer, place, cursor, guest } = admitted;
        let (receiver, mut welcome) = Receiver::new(hello, cursor, env!("CARGO_PKG_VERSION"), now());
        if let Frame::Welcome(welcome) = &mut welcome {
            welcome.keeps_gates = !shared.directives.is_following();
        }
        let life = peer.not_after.since((shared.clock)()).min(Duration::from_secs(365 * 24 * 3600));
        Session {
            shared,
            source,
            agent,
            peer,
            place,
            receiver,
            welcome: Some(welcome),
            progress: watch::channel(Progress::Committed(cursor)),
            directive: shared.directives.subscribe(),
            guest,
            expires: tokio::time::Instant::now() + life,
            pace: Pace::new(shared.links_per_second, now()),
            renewed: None,
            heard: tokio::time::Instant::now(),
        }
    }

    async fn drive<R, W>(&mut self, wire: &mut Wire<R, W>) -> End
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        match self.exchange(wire).await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn exchange<R, W>(&mut self, wire: &mut Wire<R, W>) -> Result<std::convert::Infallible, End>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if let Some(welcome) = self.welcome.take() {
            wire.send(&welcome).await?;
        }
        self.send_directive(wire).await?;
        loop {
            while let Some(frame) = wire.decoder.next_frame()? {
                self.take(frame, wire).await?;
            }
            let silent_at = tokio::time::Instant::from_std(self.receiver.timeout());
            tokio::select! {
                read = wire.read() => read?,
                _ = self.progress.1.changed() => self.acknowledge(wire).await?,
                changed = self.directive.changed() => match changed {
                    Ok(()) => self.send_directive(wire).await?,
                    Err(_) => return Err(End::Shutdown),
                },
                () = front_changed(&mut self.guest) => self.judge_again()?,
                () = sleep_until(silent_at) => return Err(End::Silent(silent_at.duration_since(self.heard))),
                () = sleep_until(self.expires) => return Err(End::Expired),
                () = self.place.replaced.cancelled() => return Err(End::Replaced),
                () = self.shared.shutdown.cancelled() => return Err(End::Shutdown),
            }
        }
    }

    async fn take<R, W>(&mut self, frame: Frame, wire: &mut Wire<R, W>) -> Result<(), End>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        self.heard = tokio::time::Instant::now();
        match self.receiver.handle(frame, self.heard.into_std())? {
            None => Ok(()),
            Some(FromAgent::Commit(link)) => {
                let wait = self.pace.wait(now());
                if !wait.is_zero() {
                    sleep(wait).await;
                }
                let (agent, progress) = (self.agent.clone(), self.progress.0.clone());
                let received = (self.shared.clock)();
                self.shared.commits.link(agent, received, link, progress).await.map_err(|_| End::Shutdown)
            }
            Some(FromAgent::Reply(frame)) => wire.send(&frame).await,
            Some(FromAgent::Renew(csr)) => {
                let answer = self.renew(csr).await;
                let json = serde_json::to_vec(&answer).map_err(|e| End::Lost(e.to_string()))?;
                wire.send(&Frame::Renewed(json)).await
            }
            Some(FromAgent::DirectiveApplied(version)) => {
                self.place.directive.store(version, Ordering::Relaxed);
                Ok(())
            }
            Some(FromAgent::Bye(reason)) => Err(End::Bye(reason.chars().take(200).collect())),
        }
    }

    async fn acknowledge<R, W>(&mut self, wire: &mut Wire<R, W>) -> Result<(), End>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let progress = self.progress.1.borrow_and_update().clone();
        match progress {
            Progress::Committed(cursor) => {
                let ack = self.receiver.committed(cursor);
                wire.send(&ack).await
            }
            Progress::Failed(fault) => Err(fault.into()),
        }
    }

    /// Sends what is in force, unless it is this very agent that may no longer be here.
    async fn send_directive<R, W>(&mut self, wire: &mut Wire<R, W>) -> Result<(), End>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let in_force = self.directive.borrow_and_update().clone();
        wire.send(&Frame::Directive(in_force.signed.to_bytes())).await?;
        let directive = &in_force.directive;
        match directive.revokes(&self.peer).or_else(|| directive.revokes_agent(&self.agent)) {
            Some(denied) => Err(End::Denied(denied.to_string())),
            None => Ok(()),
        }
    }

    /// Ends the session of one whom nobody vouches for any more.
    fn judge_again(&self) -> Result<(), End> {
        let Some((front, chain)) = &self.guest else { return Ok(()) };
        let judged = front.borrow().judge_again(chain, (self.shared.clock)());
        judged.map_err(|error| End::Unvouched(error.to_string()))
    }

    async fn renew(&mut self, csr: Vec<u8>) -> Answer {
        let refused = |reason: &str, detail: &str| {
            Answer::Refused(Refused { reason: reason.into(), detail: detail.into(), retry: true })
        };
        if self.guest.is_some() {
            let detail = "whoever has issued its certificate renews it: this collector issues none for it".to_owned();
            return Answer::Refused(Refused { reason: "bad_request".into(), detail, retry: false });
        }
        let too_soon = self.renewed.is_some_and(|last| now().duration_since(last) < RENEW_EVERY);
        if too_soon {
            return refused("bad_request", "one certificate request every 5 s");
        }
        self.renewed = Some(now());
        let (issuer, agent, peer) = (self.shared.issuer.clone(), self.agent.clone(), self.peer.clone());
        let (directives, at) = (self.shared.directives.clone(), (self.shared.clock)());
        let issued = tokio::task::spawn_blocking(move || {
            let grant = issuer.renew(&agent, &peer, &csr, &directives.now().directive, at)?;
            fleet::hand_out(&issuer, &directives, grant, at)
        })
        .await;
        match issued {
            Ok(Ok(grant)) => {
                super::enrol::tell_issued(self.shared, &grant).await;
                Answer::Issued(grant.issued)
            }
            Ok(Err(refusal)) => {
                let (reason, detail) = (&refusal.reason, format!("renewal: {}", refusal.detail));
                self.shared.refusals.enrolment(self.source, reason, detail, self.agent.workload.to_string());
                Answer::Refused(refusal)
            }
            Err(_) => refused("internal", "the collector failed: see its log"),
        }
    }
}

/// Waits until whose word counts for a guest has changed; for all others, and once that cannot change any more, for ever.
async fn front_changed(guest: &mut Option<Vouched>) {
    let changed = match guest {
        Some((front, _)) => front.changed().await.is_ok(),
        None => false,
    };
    if !changed {
        std::future::pending().await
    }
}

/// A bucket of links: a burst of one second's worth, then an even pace.
#[derive(Debug)]
struct Pace {
    every: Duration,
    burst: Duration,
    /// When the bucket will be full again.
    full_at: Instant,
}

impl Pace {
    fn new(per_second: u32, now: Instant) -> Pace {
        Pace { every: Duration::from_secs(1) / per_second.max(1), burst: Duration::from_secs(1), full_at: now }
    }

    /// Takes one; how long to wait before.
    fn wait(&mut self, now: Instant) -> Duration {
        self.full_at = self.full_at.max(now) + self.every;
        self.full_at.saturating_duration_since(now + self.burst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_pace_holds() {
        let start = Instant::now();
        let mut pace = Pace::new(10, start);
        let waits: Vec<u128> = (0..12).map(|_| pace.wait(start).as_millis()).collect();
        assert_eq!(waits[..10], [0; 10]);
        assert_eq!(waits[10..], [100, 200]);
        assert_eq!(pace.wait(start + Duration::from_secs(60)), Duration::ZERO);
    }
}
