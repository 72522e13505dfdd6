//! Other collectors of the trust domain, which follow the directives made here: the newest at once, then each new one. They
//! tell of their agents, and get their next issuing CA.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use sidewarden_proto::enrol::{Answer, Der, Issued, Refused};
use sidewarden_proto::identity::{Peer, PeerName, Sha256, Usage};
use sidewarden_proto::tls;
use sidewarden_proto::wire::{Decoder, Frame};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, WriteHalf};
use tokio::time::{Instant, interval, sleep_until, timeout};

use super::Shared;
use crate::ca::{CaError, member, orders};

/// A sign of life goes out this often.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// One that is silent for this long is gone.
const SILENT_AFTER: Duration = Duration::from_secs(20);
/// One that takes nothing for this long is gone.
const WRITE_WITHIN: Duration = Duration::from_secs(10);
/// Reports are taken no faster; collectors send one a second at most.
const REPORT_EVERY: Duration = Duration::from_millis(250);
/// Issuing CAs may be asked for no faster.
const RENEW_EVERY: Duration = Duration::from_secs(5);

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the connection was lost: {0}")]
    Lost(#[from] std::io::Error),
    #[error(transparent)]
    Frame(#[from] sidewarden_proto::wire::WireError),
    #[error(transparent)]
    Register(#[from] CaError),
    #[error("its certificate ran out")]
    Expired,
    #[error("it is silent")]
    Silent,
    #[error("{0}")]
    NotAllowed(String),
    #[error("this collector is shutting down")]
    Shutdown,
}

/// Serves one connection to its end.
pub async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    shared: &Arc<Shared>,
    source: SocketAddr,
    chain: &[CertificateDer<'_>],
    stream: S,
) {
    let end = match Follower::new(shared, chain) {
        Ok(mut follower) => {
            tracing::info!(%source, "another collector follows the directives made here");
            follower.exchange(stream).await.err().unwrap_or(End::Shutdown)
        }
        Err(end) => end,
    };
    tracing::info!(%source, %end, "another collector follows no more");
    if let End::NotAllowed(why) = end {
        shared.refusals.ingest_critical(source, "not_allowed", why);
    }
}

/// Another collector that is connected.
struct Follower<'a> {
    shared: &'a Arc<Shared>,
    peer: Peer,
    /// The key of its issuing CA.
    issuing: Sha256,
    asked: Option<Instant>,
    reported: Option<Instant>,
}

impl<'a> Follower<'a> {
    /// Only one whose issuing CA was signed here may follow. A certificate of the root alone proves too little: whoever has
    /// the key of a compromised root could ask for a CA under the next one.
    fn new(shared: &'a Arc<Shared>, chain: &[CertificateDer<'_>]) -> Result<Follower<'a>, End> {
        let refused = |why: String| Err(End::NotAllowed(why));
        let peer = match tls::peer_of(chain, Usage::Client) {
            Ok(peer) => peer,
            Err(error) => return refused(error.to_string()),
        };
        // Somebody else's CA may vouch for agents, and for no collector that signs certificates here.
        if !shared.identities.front().borrow().is_ours(chain, (shared.clock)()) {
            return refused("a certificate that no collector of this trust domain has issued".into());
        }
        if peer.name != PeerName::Spiffe(tls::collector_id(shared.issuer.authority().domain())) {
            return refused(format!("{} is no collector", peer.name));
        }
        let members = shared.issuer.register().members((shared.clock)())?;
        let issuing = member::issuer_of(chain).filter(|spki| members.iter().any(|member| member.spki == *spki));
        let Some(issuing) = issuing else {
            return refused("a collector whose issuing CA was not signed by `ca member sign` here".into());
        };
        let follower = Follower { shared, peer, issuing, asked: None, reported: None };
        follower.check_revoked().map(|()| follower)
    }

    fn check_revoked(&self) -> Result<(), End> {
        match self.shared.directives.now().directive.revokes(&self.peer) {
            Some(denied) => Err(End::NotAllowed(format!("a collector that is revoked: {denied}"))),
            None => Ok(()),
        }
    }

    async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(&mut self, stream: S) -> Result<(), End> {
        let (mut reader, mut writer) = tokio::io::split(stream);
        let (mut decoder, mut buffer) = (Decoder::default(), vec![0; 8 << 10]);
        let mut directive = self.shared.directives.subscribe();
        let mut beat = interval(HEARTBEAT);
        let life = self.peer.not_after.since((self.shared.clock)());
        let ends = Instant::now() + life.min(Duration::from_secs(365 * 24 * 3600));
        let mut heard = Instant::now();
        directive.mark_changed();
        loop {
            tokio::select! {
                changed = directive.changed() => {
                    changed.map_err(|_| End::Shutdown)?;
                    let signed = directive.borrow_and_update().signed.to_bytes();
                    write(&mut writer, &Frame::Directive(signed)).await?;
                    self.check_revoked()?;
                }
                _ = beat.tick() => write(&mut writer, &Frame::Ping).await?,
                read = reader.read(&mut buffer) => {
                    let count = read?;
                    if count == 0 {
                        return Err(End::Lost(std::io::ErrorKind::UnexpectedEof.into()));
                    }
                    heard = Instant::now();
                    decoder.push(&buffer[..count]);
                    while let Some(frame) = decoder.next_frame()? {
                        self.take(frame, &mut writer).await?;
                    }
                }
                () = sleep_until(heard + SILENT_AFTER) => return Err(End::Silent),
                () = sleep_until(ends) => return Err(End::Expired),
                () = self.shared.shutdown.cancelled() => return Err(End::Shutdown),
            }
        }
    }

    async fn take<W: AsyncWrite>(&mut self, frame: Frame, writer: &mut WriteHalf<W>) -> Result<(), End> {
        let (issuer, issuing, now) = (self.shared.issuer.clone(), self.issuing, (self.shared.clock)());
        match frame {
            Frame::DirectiveApplied(version) => blocking(move || issuer.register().member_seen(issuing, version)).await,
            Frame::Report(report) => {
                if let Some(last) = self.reported.replace(Instant::now()) {
                    sleep_until(last + REPORT_EVERY).await;
                }
                blocking(move || issuer.register().take_report(&report, issuer.authority().domain(), now)).await
            }
            Frame::Renew(csr) => {
                let answer = self.sign(csr).await?;
                let json = serde_json::to_vec(&answer).map_err(std::io::Error::other)?;
                write(writer, &Frame::Renewed(json)).await
            }
            // Signs of life, and what a newer collector may say.
            _ => Ok(()),
        }
    }

    async fn sign(&mut self, csr: Vec<u8>) -> Result<Answer, End> {
        let refused = |detail: String| Answer::Refused(Refused { reason: "bad_request".into(), detail, retry: true });
        if self.asked.is_some_and(|last| last.elapsed() < RENEW_EVERY) {
            return Ok(refused("one issuing CA every 5 s".into()));
        }
        self.asked = Some(Instant::now());
        let (issuer, issuing, now) = (self.shared.issuer.clone(), self.issuing, (self.shared.clock)());
        let bundle = issuer.authority().bundle();
        let signed = tokio::task::spawn_blocking(move || orders::sign_member(&issuer, &csr, Some(issuing), now)).await;
        match signed.map_err(std::io::Error::other)? {
            Ok((chain, event)) => {
                self.shared.commits.own(event).await.map_err(|_| End::Shutdown)?;
                let chain = chain.iter().map(|cert| Der(cert.to_vec())).collect();
                Ok(Answer::Issued(Issued { chain, bundle, directive: None }))
            }
            Err(error) => Ok(refused(error.to_string())),
        }
    }
}

async fn blocking(act: impl FnOnce() -> Result<(), CaError> + Send + 'static) -> Result<(), End> {
    Ok(tokio::task::spawn_blocking(act).await.map_err(std::io::Error::other)??)
}

async fn write<W: AsyncWrite>(writer: &mut WriteHalf<W>, frame: &Frame) -> Result<(), End> {
    let write = async {
        writer.write_all(&frame.encode()).await?;
        writer.flush().await
    };
    Ok(timeout(WRITE_WITHIN, write).await.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))?)
}
