//! Moves bytes between the workload and its peer until both have ended, one is cut off, or it is no longer allowed.
//!
//! Nothing is held for a connection that is idle: bytes go through a buffer of the thread, and only what the other side
//! would not take at once is kept. An end is handed on as an end (FIN, close_notify), a cut as a reset: the workload must
//! never take a truncated message for a whole one.
//!
//! Here are the bounds of every connection, and the plain way of copying, which TLS 1.2 takes. TLS 1.3 goes through
//! [`super::flow`].

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::handshake::Replayed;
use super::limits::Pace;

/// The thread's buffer.
const SCRATCH: usize = 64 << 10;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH]);
}

/// One side of a relay: a stream that can be cut off so that the other end sees a reset, not an end.
pub trait Side: AsyncRead + AsyncWrite + Unpin {
    /// Makes the coming drop a reset.
    fn reset_on_drop(&self);
    /// Whether TLS has something to say that is no data: an alert, or new keys.
    fn owes_answer(&self) -> bool {
        false
    }
}

impl Side for TcpStream {
    fn reset_on_drop(&self) {
        // It may be closed already: then there is nothing to reset.
        let _ = self.set_zero_linger();
    }
}

impl<S: Side> Side for Replayed<S> {
    fn reset_on_drop(&self) {
        self.inner().reset_on_drop();
    }
    fn owes_answer(&self) -> bool {
        self.inner().owes_answer()
    }
}

impl<S: Side> Side for tokio_rustls::server::TlsStream<S> {
    fn reset_on_drop(&self) {
        self.get_ref().0.reset_on_drop();
    }
    fn owes_answer(&self) -> bool {
        self.get_ref().1.wants_write()
    }
}

impl<S: Side> Side for tokio_rustls::client::TlsStream<S> {
    fn reset_on_drop(&self) {
        self.get_ref().0.reset_on_drop();
    }
    fn owes_answer(&self) -> bool {
        self.get_ref().1.wants_write()
    }
}

/// What ends a relay from outside.
#[derive(Debug)]
pub struct Bounds {
    /// No longer allowed, or the agent ends.
    pub cancelled: CancellationToken,
    /// When it ends whatever happens.
    pub deadline: Option<Instant>,
    /// Without a byte for this long; zero for none. Noticed after twice that at the latest.
    pub idle: Duration,
    /// The same once one side has ended its half.
    pub half_closed: Duration,
    /// How many bytes; `None` for as many as come.
    pub pace: Option<Box<Pace>>,
}

/// How it ended.
#[derive(Debug)]
pub enum End {
    /// Both sides said so.
    Whole,
    /// The peer was cut off: no proper end of TLS, a reset, or an alert.
    PeerCut(io::Error),
    /// The workload was cut off.
    WorkloadCut(io::Error),
    /// Cancelled.
    Cancelled,
    /// At its deadline.
    Deadline,
    /// Nothing came for too long.
    Idle,
}

/// What happened.
#[derive(Debug)]
pub struct Outcome {
    /// From the peer to the workload.
    pub bytes_in: u64,
    /// From the workload to the peer.
    pub bytes_out: u64,
    /// How it ended.
    pub end: End,
}

/// Something that moves bytes both ways between the workload and its peer.
pub trait Mover {
    /// Goes on until there is nothing to do, or the end.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End>;
    /// Bytes moved so far: from the peer, and to it.
    fn moved(&self) -> (u64, u64);
    /// Whether just one of the two has said that it is done.
    fn is_half_closed(&self) -> bool;
    /// Makes the end of both a reset.
    fn cut(&mut self);
}

/// Relays until the end. `on_first_byte` is called when the peer has said something: with TLS 1.3 a client has finished
/// its handshake before the server has judged it, so nothing before that is a success.
pub async fn relay(mover: &mut (dyn Mover + Send), mut bounds: Bounds, on_first_byte: impl FnOnce()) -> Outcome {
    let end = run(mover, &mut bounds, on_first_byte).await;
    if !matches!(end, End::Whole) {
        mover.cut();
    }
    let (bytes_in, bytes_out) = mover.moved();
    Outcome { bytes_in, bytes_out, end }
}

/// Copies between two streams.
pub fn copying<W: Side + Send, P: Side + Send>(workload: W, peer: P) -> impl Mover + Send {
    Copying { workload, peer, inward: Flow::default(), outward: Flow::default() }
}

async fn run(mover: &mut (dyn Mover + Send), bounds: &mut Bounds, on_first_byte: impl FnOnce()) -> End {
    let (mut counted, mut on_first_byte, mut paused) = (None, Some(on_first_byte), None);
    loop {
        let half_closed = mover.is_half_closed();
        let patience = if half_closed { bounds.half_closed } else { bounds.idle };
        let wake = next_look(bounds.deadline, paused.unwrap_or(patience));
        let moving = poll_fn(|cx| {
            let polled = mover.poll(cx).map(Step::Ended);
            if mover.moved().0 > 0
                && let Some(tell) = on_first_byte.take()
            {
                tell();
            }
            if polled.is_pending() && mover.is_half_closed() && !half_closed {
                return Poll::Ready(Step::HalfClosed);
            }
            match wait(bounds.pace.as_deref_mut(), mover) {
                Some(wait) if polled.is_pending() => Poll::Ready(Step::Paused(wait)),
                _ => polled,
            }
        });
        tokio::select! {
            biased;
            () = bounds.cancelled.cancelled() => return End::Cancelled,
            step = moving, if paused.is_none() => match step {
                Step::Ended(end) => return end,
                Step::HalfClosed => {}
                Step::Paused(wait) => paused = Some(wait),
            },
            () = sleep_until_some(wake) => {
                if bounds.deadline.is_some_and(|at| at <= Instant::now()) {
                    return End::Deadline;
                }
                let bytes = mover.moved();
                // Who had to wait was not idle.
                if paused.take().is_none() && counted.replace(bytes) == Some(bytes) {
                    return End::Idle;
                }
            }
        }
    }
}

/// When a connection is looked at if nothing moves: at its deadline, or earlier after a while (none if it is zero).
fn next_look(deadline: Option<Instant>, after: Duration) -> Option<Instant> {
    let tick = if after.is_zero() { None } else { Instant::now().checked_add(after) };
    tick.into_iter().chain(deadline).min()
}

async fn sleep_until_some(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

enum Step {
    Ended(End),
    /// The first of the two halves has ended: other patience from now on.
    HalfClosed,
    /// It has moved so much that nothing more may go for this long.
    Paused(Duration),
}

/// A gust is whatever one poll moved: the debt for it is waited off.
fn wait(pace: Option<&mut Pace>, mover: &dyn Mover) -> Option<Duration> {
    let (inward, outward) = mover.moved();
    Some(pace?.wait_after(inward + outward, Instant::now())).filter(|wait| !wait.is_zero())
}

struct Copying<W, P> {
    workload: W,
    peer: P,
    inward: Flow,
    outward: Flow,
}

impl<W: Side, P: Side> Mover for Copying<W, P> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let outward = self.outward.poll(cx, &mut self.workload, &mut self.peer);
        let inward = self.inward.poll(cx, &mut self.peer, &mut self.workload);
        match (outward, inward) {
            (_, Poll::Ready(Err(Fault::Reading(error)))) | (Poll::Ready(Err(Fault::Writing(error))), _) => {
                Poll::Ready(End::PeerCut(error))
            }
            (_, Poll::Ready(Err(Fault::Writing(error)))) | (Poll::Ready(Err(Fault::Reading(error))), _) => {
                Poll::Ready(End::WorkloadCut(error))
            }
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(End::Whole),
            _ => self.answer(cx),
        }
    }

    fn moved(&self) -> (u64, u64) {
        (self.inward.bytes, self.outward.bytes)
    }

    fn is_half_closed(&self) -> bool {
        self.inward.done != self.outward.done
    }

    fn cut(&mut self) {
        self.workload.reset_on_drop();
        self.peer.reset_on_drop();
    }
}

impl<W: Side, P: Side> Copying<W, P> {
    /// What was read may ask for an answer of TLS itself, like the no to a renegotiation. It goes out at once: the next
    /// data may be long in coming.
    fn answer(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if !self.peer.owes_answer() {
            return Poll::Pending;
        }
        match Pin::new(&mut self.peer).poll_flush(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(End::PeerCut(error)),
            _ => Poll::Pending,
        }
    }
}

enum Fault {
    Reading(io::Error),
    Writing(io::Error),
}

/// One direction.
#[derive(Default)]
struct Flow {
    /// What was read and not taken yet.
    rest: Vec<u8>,
    written: usize,
    ended: bool,
    done: bool,
    /// Something was written since the last flush.
    dirty: bool,
    bytes: u64,
}

impl Flow {
    fn poll<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
    ) -> Poll<Result<(), Fault>> {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        loop {
            ready!(self.poll_rest(cx, writer)).map_err(Fault::Writing)?;
            if self.ended {
                ready!(Pin::new(&mut *writer).poll_shutdown(cx)).map_err(Fault::Writing)?;
                self.done = true;
                return Poll::Ready(Ok(()));
            }
            match BUFFER.with_borrow_mut(|buffer| self.poll_some(cx, reader, writer, buffer)) {
                Poll::Ready(result) => result?,
                Poll::Pending => {
                    // Nothing more to add: let go of what the writer may hold back.
                    if self.dirty {
                        ready!(Pin::new(&mut *writer).poll_flush(cx)).map_err(Fault::Writing)?;
                        self.dirty = false;
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    fn poll_rest<W: AsyncWrite + Unpin>(&mut self, cx: &mut Context<'_>, writer: &mut W) -> Poll<io::Result<()>> {
        while self.written < self.rest.len() {
            let count = ready!(Pin::new(&mut *writer).poll_write(cx, &self.rest[self.written..]))?;
            self.account(count)?;
            self.written += count;
        }
        if self.written > 0 {
            (self.rest, self.written) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }

    /// One read, and one write of what it gave.
    fn poll_some<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        buffer: &mut [u8],
    ) -> Poll<Result<(), Fault>> {
        let mut read = ReadBuf::new(buffer);
        ready!(Pin::new(reader).poll_read(cx, &mut read)).map_err(Fault::Reading)?;
        let got = read.filled();
        if got.is_empty() {
            self.ended = true;
            return Poll::Ready(Ok(()));
        }
        let count = match Pin::new(writer).poll_write(cx, got) {
            Poll::Ready(result) => result.map_err(Fault::Writing)?,
            Poll::Pending => 0,
        };
        if count > 0 {
            self.account(count).map_err(Fault::Writing)?;
        }
        self.rest = got[count..].to_vec();
        Poll::Ready(Ok(()))
    }

    fn account(&mut self, count: usize) -> io::Result<()> {
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.bytes += count as u64;
        self.dirty = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    fn bounds() -> Bounds {
        let (cancelled, deadline) = (CancellationToken::new(), None);
        Bounds { cancelled, deadline, idle: Duration::ZERO, half_closed: Duration::from_secs(5), pace: None }
    }

    /// A TCP connection: our end and the other's.
    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (ours, listener.accept().await.unwrap().0)
    }

    struct World {
        workload: TcpStream,
        peer: TcpStream,
        relay: tokio::task::JoinHandle<Outcome>,
    }

    async fn world(bounds: Bounds) -> World {
        let ((to_workload, workload), (to_peer, peer)) = (pair().await, pair().await);
        let mut mover = copying(to_workload, to_peer);
        let relay = tokio::spawn(async move { relay(&mut mover, bounds, || {}).await });
        World { workload, peer, relay }
    }

    #[tokio::test]
    async fn bytes_flow_both_ways_and_each_half_ends_by_itself() {
        let World { mut workload, mut peer, relay } = world(bounds()).await;
        let request: Vec<u8> = (0..300_000u32).map(|i| i as u8).collect();
        let sent = request.clone();
        let writer = tokio::spawn(async move {
            peer.write_all(&sent).await.unwrap();
            peer.shutdown().await.unwrap();
            let mut reply = Vec::new();
            peer.read_to_end(&mut reply).await.unwrap();
            reply
        });
        let mut got = Vec::new();
        workload.read_to_end(&mut got).await.unwrap();
        assert!(got == request);
        workload.write_all(b"the reply after the other's end").await.unwrap();
        drop(workload);
        assert_eq!(writer.await.unwrap(), b"the reply after the other's end");
        let outcome = relay.await.unwrap();
        assert!(matches!(outcome.end, End::Whole), "{outcome:?}");
        assert_eq!((outcome.bytes_in, outcome.bytes_out), (300_000, 31));
    }

    #[tokio::test]
    async fn a_reset_is_handed_on_as_a_reset() {
        let World { mut workload, mut peer, relay } = world(bounds()).await;
        peer.write_all(b"half a mess").await.unwrap();
        let mut got = [0; 11];
        workload.read_exact(&mut got).await.unwrap();
        peer.set_zero_linger().unwrap();
        drop(peer);
        assert!(matches!(relay.await.unwrap().end, End::PeerCut(_)));
        let error = workload.read(&mut got).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_cancelled_relay_resets_both_sides() {
        let bounds = bounds();
        let cancel = bounds.cancelled.clone();
        let World { mut workload, mut peer, relay } = world(bounds).await;
        cancel.cancel();
        assert!(matches!(relay.await.unwrap().end, End::Cancelled));
        for side in [&mut workload, &mut peer] {
            assert!(side.read(&mut [0; 1]).await.is_err());
        }
    }

    #[tokio::test]
    async fn a_slow_reader_gets_everything_and_little_is_held_meanwhile() {
        let World { mut workload, mut peer, relay } = world(bounds()).await;
        let writer = tokio::spawn(async move {
            for _ in 0..200 {
                peer.write_all(&[1; 32 << 10]).await.unwrap();
            }
        });
        let mut total = 0;
        let mut chunk = [0; 4096];
        while total < 200 * (32 << 10) {
            total += workload.read(&mut chunk).await.unwrap();
            tokio::task::yield_now().await;
        }
        writer.await.unwrap();
        drop(workload);
        assert_eq!(relay.await.unwrap().bytes_in, 200 * (32 << 10));
    }

    #[tokio::test(start_paused = true)]
    async fn idle_half_closed_and_too_old_connections_end() {
        let idle = Bounds { idle: Duration::from_secs(60), ..bounds() };
        let World { workload: _w, peer: _p, relay } = world(idle).await;
        assert!(matches!(relay.await.unwrap().end, End::Idle));

        let World { workload: _w, mut peer, relay } = world(bounds()).await;
        peer.shutdown().await.unwrap();
        assert!(matches!(relay.await.unwrap().end, End::Idle));

        let old = Bounds { deadline: Some(Instant::now() + Duration::from_secs(3600)), ..bounds() };
        let World { workload: _w, peer: _p, relay } = world(old).await;
        assert!(matches!(relay.await.unwrap().end, End::Deadline));
    }
}
