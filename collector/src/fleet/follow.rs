//! A member of the trust domain follows the collector that makes the directives: it hands them out as they were signed
//! there, and makes none of its own. So no collector alone can take a denial back. It tells that one of its agents, and
//! gets its next issuing CA from it.

use std::io;
use std::time::Duration;

use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, ServerName};
use sidewarden_proto::config::HostPort;
use sidewarden_proto::directive::Signed;
use sidewarden_proto::enrol::{self, Answer};
use sidewarden_proto::event::{Body, Event, LeaderChanged, Severity};
use sidewarden_proto::identity::Usage;
use sidewarden_proto::tls::{self, Expect, Floor};
use sidewarden_proto::wire::{ALPN_COLLECTOR, Decoder, Frame, Report};
use tokio::io::{AsyncReadExt, AsyncWriteExt, WriteHalf};
use tokio::net::TcpStream;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::DirectivesError;
use crate::app::Core;
use crate::ca::member::{self, Told};

/// For the connection and its handshake.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// The other side speaks every few seconds.
const SILENT_AFTER: Duration = Duration::from_secs(20);
/// Something that it does not take for this long is lost.
const WRITE_WITHIN: Duration = Duration::from_secs(10);
/// The first pause after a failure, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// How often is looked for news of our agents.
const LOOK: Duration = Duration::from_secs(1);
/// An issuing CA that was asked for and did not come is asked for again after this long.
const ASK_AGAIN: Duration = Duration::from_secs(15);

type Writer = WriteHalf<TlsStream<TcpStream>>;

/// Follows `leader` until the shutdown.
pub async fn follow(core: Core, leader: HostPort) {
    let (mut pause, mut fault) = (PAUSES.0, None);
    loop {
        let ended = tokio::select! {
            ended = session(&core, &leader, &mut pause) => ended,
            () = core.shutdown.cancelled() => return,
        };
        match ended {
            // We have another certificate: come back with it at once.
            Ok(()) => continue,
            Err(error) => {
                let is_new = is_new(&mut fault, &error);
                tell(&core, &leader, false, is_new, &error.to_string()).await;
            }
        }
        tokio::select! {
            () = sleep(jittered(pause)) => pause = (pause * 2).min(PAUSES.1),
            () = core.shutdown.cancelled() => return,
        }
    }
}

/// From a half of `pause` to all of it.
fn jittered(pause: Duration) -> Duration {
    let mut dice = [0];
    crate::random(&mut dice);
    pause / 2 + pause / 2 * u32::from(dice[0]) / 255
}

/// Whether the leader's word is not taken, for a reason other than the last: it may have been away before, which is another.
fn is_new(fault: &mut Option<String>, error: &io::Error) -> bool {
    let is_fault = error.get_ref().is_some_and(|inner| inner.is::<DirectivesError>());
    is_fault && fault.replace(error.to_string()) != Some(error.to_string())
}

/// Tells that the leader was reached or lost, when that has changed, or `again`.
async fn tell(core: &Core, leader: &HostPort, reached: bool, again: bool, why: &str) {
    if !core.directives.reached(reached) && !again {
        return tracing::debug!(%leader, why, "the collector that is followed is still away");
    }
    let (severity, summary) = match reached {
        true => (Severity::Notice, format!("the directives of {leader} are followed")),
        false => (Severity::Warning, format!("{leader}, whose directives are followed, cannot be reached: {why}")),
    };
    let body = Body::from(LeaderChanged { leader: leader.to_string(), reached, why: why.to_owned() });
    if core.commits.own(Event::new((core.clock)(), severity, summary, &body)).await.is_err() {
        tracing::debug!("the store was closed before the end of a session with another collector was told");
    }
}

/// A connection with the leader.
struct Session<'a> {
    core: &'a Core,
    writer: Writer,
    told: Told,
    /// What the register had written when it was last looked through.
    writes: Option<i64>,
    /// The key of the issuing CA that was asked for, and when.
    asked: Option<(KeyPair, Instant)>,
    /// The version that was told.
    applied: Option<u64>,
}

/// Until the connection breaks (an error), or until we have another certificate.
async fn session(core: &Core, leader: &HostPort, pause: &mut Duration) -> io::Result<()> {
    let mut own = core.issuer.authority().own();
    let serial = own.borrow_and_update().peer().serial.clone();
    let connected = timeout(CONNECT_WITHIN, connect(core, leader)).await;
    let stream = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    let (mut reader, writer) = tokio::io::split(stream);
    let (told, writes, asked, applied) = (Told::default(), None, None, None);
    let mut session = Session { core, writer, told, writes, asked, applied };
    let (mut decoder, mut buffer, mut heard) = (Decoder::default(), vec![0; 8 << 10], Instant::now());
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            read = reader.read(&mut buffer) => {
                let count = read?;
                if count == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                heard = Instant::now();
                decoder.push(&buffer[..count]);
                while let Some(frame) = decoder.next_frame().map_err(io::Error::other)? {
                    if session.take(frame).await? {
                        tell(core, leader, true, false, "").await;
                        *pause = PAUSES.0;
                    }
                }
            }
            _ = look.tick() => session.look().await?,
            changed = own.changed() => {
                changed.map_err(io::Error::other)?;
                if own.borrow_and_update().peer().serial != serial {
                    return Ok(());
                }
            }
            () = sleep_until(heard + SILENT_AFTER) => return Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

async fn connect(core: &Core, leader: &HostPort) -> io::Result<TlsStream<TcpStream>> {
    let authority = core.issuer.authority();
    let (own, expect) = (authority.own().borrow().clone(), Expect::Workload(tls::collector_id(authority.domain())));
    let config = tls::client_config(&own, &authority.trust(), expect, Floor::Tls13, &[ALPN_COLLECTOR]);
    let tcp = TcpStream::connect((leader.host.as_str(), leader.port)).await?;
    // A confirmation right after another one would wait for 40 ms.
    tcp.set_nodelay(true)?;
    // The name is not sent for anything: who answers is proven by the SPIFFE ID.
    let name = ServerName::from(tcp.peer_addr()?.ip());
    let stream = TlsConnector::from(config.map_err(io::Error::other)?).connect(name, tcp).await?;
    check_key(core, stream.get_ref().1.peer_certificates().unwrap_or_default())?;
    Ok(stream)
}

/// Whoever comes with a leader's key that is revoked is told nothing of our agents.
fn check_key(core: &Core, chain: &[CertificateDer<'_>]) -> io::Result<()> {
    let trust = core.issuer.authority().trust();
    let peer = tls::peer_with(chain, &trust, Usage::Server).map_err(io::Error::other)?;
    match core.directives.now().directive.denies(&peer) {
        Some(denied) => Err(io::Error::other(denied.to_string())),
        None => Ok(()),
    }
}

impl Session<'_> {
    /// Takes a frame; whether it was a directive that holds.
    async fn take(&mut self, frame: Frame) -> io::Result<bool> {
        match frame {
            Frame::Directive(bytes) => {
                self.take_directive(bytes).await?;
                Ok(true)
            }
            Frame::Renewed(answer) => self.take_issuing(&answer).await.map(|()| false),
            _ => Ok(false),
        }
    }

    async fn take_directive(&mut self, bytes: Vec<u8>) -> io::Result<()> {
        let signed = Signed::from_bytes(&bytes).map_err(io::Error::other)?;
        let (authority, directives) = (self.core.issuer.authority().clone(), self.core.directives.clone());
        let now = (self.core.clock)();
        let taken = tokio::task::spawn_blocking(move || {
            let adopted = directives.adopt(signed, &authority.trust(), now)?;
            authority.follow(&directives.now().directive.bundle);
            Ok::<_, DirectivesError>(adopted)
        });
        let taken = taken.await.map_err(io::Error::other)?;
        // So that its rotation does not go on without us: one of that number that says something else is none of its own.
        let ours = match &taken {
            Err(DirectivesError::Older { ours, .. }) => Some(*ours),
            Err(DirectivesError::Differs(_)) => Some(0),
            _ => None,
        };
        if let Some(ours) = ours {
            self.write(&Frame::DirectiveApplied(ours)).await?;
        }
        let newer = taken.map_err(io::Error::other)?;
        let version = self.core.directives.now().directive.version;
        if newer {
            tracing::info!(version, "a newer directive is handed out");
        }
        if self.applied != Some(version) {
            self.applied = Some(version);
            self.write(&Frame::DirectiveApplied(version)).await?;
        }
        Ok(())
    }

    /// What is due once a second: news of our agents, a sign of life, and another issuing CA when it is time.
    async fn look(&mut self) -> io::Result<()> {
        match self.news().await? {
            None => self.write(&Frame::Ping).await?,
            Some(report) => self.write(&Frame::Report(report)).await?,
        }
        if self.wants_issuing() {
            let key = KeyPair::generate().map_err(io::Error::other)?;
            let csr = member::certificate_request(&key).map_err(io::Error::other)?;
            self.asked = Some((key, Instant::now()));
            self.write(&Frame::Renew(csr)).await?;
        }
        Ok(())
    }

    async fn news(&mut self) -> io::Result<Option<Report>> {
        let (issuer, before, now) = (self.core.issuer.clone(), self.writes, (self.core.clock)());
        let looked = tokio::task::spawn_blocking(move || {
            let register = issuer.register();
            let writes = register.writes()?;
            let is_new = before != Some(writes);
            Ok::<_, crate::ca::CaError>((writes, is_new.then(|| register.report(now)).transpose()?))
        });
        let (writes, all) = looked.await.map_err(io::Error::other)?.map_err(io::Error::other)?;
        let Some(all) = all else { return Ok(None) };
        let news = self.told.next(&all);
        // What found no room in one report goes into the next.
        if news.is_none() {
            self.writes = Some(writes);
        }
        Ok(news)
    }

    fn wants_issuing(&self) -> bool {
        if self.asked.as_ref().is_some_and(|(_, at)| at.elapsed() < ASK_AGAIN) {
            return false;
        }
        let (authority, in_force) = (self.core.issuer.authority(), self.core.directives.now());
        let signer = in_force.signed.signer(&authority.trust());
        self.applied.is_some()
            && signer.is_ok_and(|signer| authority.wants_issuing(&in_force.directive, &signer, (self.core.clock)()))
    }

    async fn take_issuing(&mut self, answer: &[u8]) -> io::Result<()> {
        let Some((key, _)) = self.asked.take() else { return Ok(()) };
        let issued = match enrol::from_payload(answer).map_err(io::Error::other)? {
            Answer::Issued(issued) => issued,
            Answer::Refused(refused) => {
                tracing::warn!(detail = refused.detail, "the next issuing CA was refused");
                self.asked = Some((key, Instant::now()));
                return Ok(());
            }
        };
        let (authority, now) = (self.core.issuer.authority().clone(), (self.core.clock)());
        // A root that nobody trusts would make certificates that nobody takes.
        let is_trusted = issued.chain.last().is_some_and(|root| authority.bundle().contains(root));
        if !is_trusted {
            return Err(io::Error::other("the next issuing CA is of a root that is not in the bundle"));
        }
        let chain: Vec<_> = issued.chain.into_iter().map(|der| der.0.into()).collect();
        let taken = tokio::task::spawn_blocking(move || authority.take_issuing(&key, &chain, now));
        taken.await.map_err(io::Error::other)?.map_err(io::Error::other)?;
        tracing::warn!(pin = %self.core.issuer.authority().pin(), "this collector has its next issuing CA");
        Ok(())
    }

    async fn write(&mut self, frame: &Frame) -> io::Result<()> {
        let bytes = frame.encode();
        let write = async {
            self.writer.write_all(&bytes).await?;
            self.writer.flush().await
        };
        timeout(WRITE_WITHIN, write).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}
