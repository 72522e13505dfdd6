//! One session: lets `session::Sender` decide, and does what it says over a stream, whatever carries it.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use sidewarden_proto::backoff::Random;
use sidewarden_proto::batch::Cursor;
use sidewarden_proto::directive::UNDERSTANDS;
use sidewarden_proto::event::Mode;
use sidewarden_proto::identity::InstanceId;
use sidewarden_proto::session::{FromCollector, Sender, SessionError};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::wire::{Decoder, Frame, Hello, Welcome, WireError};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::identity::keeper::Renewal;
use crate::identity::{Current, Identity};
use crate::metrics::Metrics;
use crate::spool::Spool;

/// Seconds between two pings; a collector takes us for gone after three.
pub const HEARTBEAT_SECS: u32 = 5;
/// A frame that cannot be written for this long ends the session.
const WRITE_WITHIN: Duration = Duration::from_secs(20);
/// At the agent's end, what is not acknowledged by then waits for the next start.
const SETTLE_WITHIN: Duration = Duration::from_secs(3);
/// After the goodbye, the collector gets this long to close first.
const PART_WITHIN: Duration = Duration::from_secs(1);

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The collector's half.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Bytes that are no frame.
    #[error("the collector sent what cannot be read: {0}")]
    Wire(#[from] WireError),
    /// The connection.
    #[error("the connection was lost: {0}")]
    Connection(#[from] io::Error),
    /// Our own spool.
    #[error("the spool does not answer: its disk may be stalled")]
    Spool,
}

/// How a session ended that did not break.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    /// The agent ends.
    Shutdown,
    /// We have another certificate, or another epoch: come back at once.
    ComeBack,
    /// We go to another collector.
    Left,
}

/// What a session needs.
pub struct Session<'a> {
    /// The address of the collector, as the settings have it.
    pub collector: &'a str,
    /// Which instance we are.
    pub instance: &'a InstanceId,
    /// How we stand beside our workload.
    pub mode: Mode,
    /// The identity that the connection was made with.
    pub identity: Arc<Identity>,
    /// The newest.
    pub current: Current,
    /// Events.
    pub spool: &'a Spool,
    /// Requests for certificates.
    pub renewals: &'a mut mpsc::Receiver<Renewal>,
    /// Takes directives.
    pub directives: &'a watch::Sender<Vec<u8>>,
    /// Counts.
    pub metrics: &'a Metrics,
    /// For a new epoch.
    pub random: Random,
    /// Cancelled when we go to another collector.
    pub leave: &'a CancellationToken,
    /// Called once the collector has welcomed us.
    pub welcomed: &'a (dyn Fn(&Welcome) + Sync),
}

struct Driver<'a, S> {
    session: Session<'a>,
    sender: Sender,
    writer: WriteHalf<S>,
    /// Who waits for a certificate.
    waiting: Option<oneshot::Sender<Vec<u8>>>,
    /// Last sequence numbers under way, and when they were sent.
    sent: VecDeque<(u64, Instant)>,
    directive: u64,
}

/// Drives a session over `stream` until it breaks or ends.
pub async fn drive<S>(session: Session<'_>, stream: S, shutdown: &CancellationToken) -> Result<Ended, Fault>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (reader, writer) = tokio::io::split(stream);
    let directive = session.identity.directive_version();
    let hello = Hello {
        version: env!("CARGO_PKG_VERSION").into(),
        instance: session.instance.clone(),
        epoch: session.spool.epoch(),
        directive,
        heartbeat_secs: HEARTBEAT_SECS,
        understands: UNDERSTANDS,
        at_us: Timestamp::now(),
        mode: session.mode.word().into(),
    };
    let (sender, first) = Sender::new(hello, now());
    let mut driver = Driver { session, sender, writer, waiting: None, sent: VecDeque::new(), directive };
    driver.write(first).await?;
    driver.run(reader, shutdown).await
}

/// The session halves count in the clock of the standard library.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}

impl<S: AsyncRead + AsyncWrite + Unpin> Driver<'_, S> {
    async fn run(&mut self, mut reader: ReadHalf<S>, shutdown: &CancellationToken) -> Result<Ended, Fault> {
        let mut decoder = Decoder::default();
        let mut buffer = vec![0; 8 << 10];
        let mut end: Option<Instant> = None;
        loop {
            let has_more = self.send_links().await?;
            if end.is_some_and(|end| (self.sender.is_settled() && !has_more) || Instant::now() >= end) {
                return match self.session.leave.is_cancelled() && !shutdown.is_cancelled() {
                    true => self.part(reader, "it goes to another collector").await.map(|()| Ended::Left),
                    false => self.part(reader, "the agent ends").await.map(|()| Ended::Shutdown),
                };
            }
            let due = Instant::from_std(self.sender.timeout());
            let due = end.map_or(due, |end| due.min(end));
            tokio::select! {
                read = reader.read(&mut buffer) => {
                    let count = read?;
                    if count == 0 {
                        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                    }
                    decoder.push(&buffer[..count]);
                    while let Some(frame) = decoder.next_frame()? {
                        if let Some(ended) = self.take(frame).await? {
                            return Ok(ended);
                        }
                    }
                }
                () = self.session.spool.sealed() => {}
                () = sleep_until(due) => {
                    if let Some(frame) = self.sender.handle_timeout(now())? {
                        self.write(frame).await?;
                    }
                }
                Some(renewal) = self.session.renewals.recv(), if self.waiting.is_none() => {
                    self.write(Frame::Renew(renewal.csr)).await?;
                    self.waiting = Some(renewal.answer);
                }
                changed = self.session.current.changed(), if end.is_none() => {
                    if changed.is_ok() && self.identity_changed().await? {
                        return Ok(Ended::ComeBack);
                    }
                    if changed.is_err() {
                        // Nobody makes identities any more: the agent is about to end.
                        end.get_or_insert(Instant::now() + SETTLE_WITHIN);
                    }
                }
                () = self.session.leave.cancelled(), if end.is_none() => end = Some(Instant::now() + SETTLE_WITHIN),
                () = shutdown.cancelled(), if end.is_none() => end = Some(Instant::now() + SETTLE_WITHIN),
            }
        }
    }

    /// Sends what the window lets through; says whether there is more.
    async fn send_links(&mut self) -> Result<bool, Fault> {
        while let Some(cursor) = self.sender.wants_after() {
            let Some(link) = self.session.spool.after(cursor).await else { return Ok(false) };
            self.sent.push_back((link.last_seq(), Instant::now()));
            let frame = self.sender.send(link, now());
            self.write(frame).await?;
        }
        Ok(true)
    }

    async fn take(&mut self, frame: Frame) -> Result<Option<Ended>, Fault> {
        match self.sender.handle(frame, now())? {
            None => {}
            Some(FromCollector::Acked(cursor)) => self.acknowledged(cursor),
            Some(FromCollector::Directive(bytes)) => drop(self.session.directives.send_replace(bytes)),
            Some(FromCollector::Renewed(answer)) => match self.waiting.take().map(|waiting| waiting.send(answer)) {
                Some(Ok(())) => {}
                _ => tracing::debug!("an answer that nobody waits for any more"),
            },
            Some(FromCollector::Welcomed(welcome)) => return self.welcome(&welcome).await,
        }
        Ok(None)
    }

    /// A collector with another history than ours: we go on in a new epoch, and it keeps what it has.
    async fn welcome(&mut self, welcome: &Welcome) -> Result<Option<Ended>, Fault> {
        if !self.session.spool.meet(self.session.collector, welcome.cursor).await.ok_or(Fault::Spool)?.fits {
            tracing::warn!(at = welcome.cursor.seq, "the collector's history is not ours; going on in a new epoch");
            self.session.spool.begin_epoch(self.session.random).await;
            return Ok(Some(Ended::ComeBack));
        }
        self.sent.clear();
        self.session.spool.acknowledge(welcome.cursor);
        (self.session.welcomed)(welcome);
        // What is in force may have changed while the connection was made.
        Ok(self.identity_changed().await?.then_some(Ended::ComeBack))
    }

    fn acknowledged(&mut self, cursor: Cursor) {
        while let Some((seq, at)) = self.sent.front()
            && *seq <= cursor.seq
        {
            self.session.metrics.acknowledged(at.elapsed());
            self.sent.pop_front();
        }
        self.session.spool.acknowledge(cursor);
    }

    /// Says that another directive is in force; true if the session should be made anew, with another certificate.
    async fn identity_changed(&mut self) -> Result<bool, Fault> {
        let Some(identity) = self.session.current.borrow_and_update().clone() else { return Ok(false) };
        if identity.credential.peer().serial != self.session.identity.credential.peer().serial {
            return Ok(true);
        }
        let version = identity.directive_version();
        if version != self.directive {
            self.directive = version;
            self.write(Frame::DirectiveApplied(version)).await?;
        }
        Ok(false)
    }

    async fn write(&mut self, frame: Frame) -> Result<(), Fault> {
        let bytes = frame.encode();
        let write = async {
            self.writer.write_all(&bytes).await?;
            self.writer.flush().await
        };
        timeout(WRITE_WITHIN, write).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        Ok(())
    }

    async fn part(&mut self, mut reader: ReadHalf<S>, why: &str) -> Result<(), Fault> {
        self.write(Frame::Bye(why.into())).await?;
        self.writer.shutdown().await?;
        let until_closed = async { while reader.read(&mut [0; 1024]).await.is_ok_and(|count| count > 0) {} };
        if timeout(PART_WITHIN, until_closed).await.is_err() {
            tracing::debug!("the collector did not close after the goodbye");
        }
        Ok(())
    }
}
