//! Moves the bytes of one TLS 1.3 connection between its peer and the workload, both ways at once.
//!
//! All buffers belong to the thread: they are borrowed for one batch of records and given back before anything waits,
//! so that a connection at rest holds a few hundred bytes. What a slow reader leaves over is the exception: it is kept
//! with the connection until it could be written, and nothing more is read in that direction meanwhile.
//!
//! The end of a stream keeps its meaning: FIN from the workload becomes close_notify and FIN, close_notify becomes FIN,
//! and an end without close_notify is a truncation that resets the other side, never a clean end.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::task::{Context, Poll, ready};

use tokio::net::TcpStream;

use super::channel::{Channel, poll_read, read, read_vectored};
use super::frame::{self, BadFrame, Frame, KIND};
use super::pump::Early;
use super::record::{HEADER, LINE, LINED_PLAIN, MAX_PLAIN, Opened, RecordError, Records};
use super::relay::{End, Mover, Side as _};
use super::scratch::{BATCH, with_scratch};

/// Bytes of a read after which the next one is given room for a whole batch; for less, one record's room costs less.
const BULK: usize = 1 << 10;
/// Batches of one connection before others get their turn.
const TURNS: usize = 4;

/// A socket with what could not be written to it yet.
struct Side {
    socket: TcpStream,
    unsent: Vec<u8>,
    sent: usize,
    /// Nothing more will be read from it.
    ended: bool,
    /// Its write half is shut.
    shut: bool,
}

impl Side {
    fn new(socket: TcpStream) -> Side {
        Side { socket, unsent: Vec::new(), sent: 0, ended: false, shut: false }
    }

    /// Writes what it can of `bytes` at once and keeps the rest.
    fn write_or_keep(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all_or_keep(&[IoSlice::new(bytes)])
    }

    /// The same for several pieces.
    fn write_all_or_keep(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        debug_assert!(self.unsent.is_empty());
        let written = match pieces {
            [piece] => self.socket.try_write(piece),
            _ => self.socket.try_write_vectored(pieces),
        };
        let mut written = match written {
            Ok(n) => n,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
            Err(e) => return Err(e),
        };
        for piece in pieces {
            let gone = written.min(piece.len());
            self.unsent.extend_from_slice(&piece[gone..]);
            written -= gone;
        }
        Ok(())
    }

    /// Writes what was kept; ready once nothing is left.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.unsent.len() {
            ready!(self.socket.poll_write_ready(cx))?;
            match self.socket.try_write(&self.unsent[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
        (self.unsent, self.sent) = (Vec::new(), 0);
        Poll::Ready(Ok(()))
    }

    fn shut(&mut self) -> io::Result<()> {
        self.shut = true;
        match nix::sys::socket::shutdown(self.socket.as_raw_fd(), nix::sys::socket::Shutdown::Write) {
            Err(e) if e != nix::errno::Errno::ENOTCONN => Err(e.into()),
            _ => Ok(()),
        }
    }
}

/// A peer that breaks the protocol, or ends with an alert, is cut like one whose socket fails.
fn broken(error: RecordError) -> End {
    End::PeerCut(io::Error::new(ErrorKind::InvalidData, error))
}

fn bad(frame: BadFrame) -> End {
    End::PeerCut(frame.into())
}

/// One connection whose handshake is done.
pub struct Flow {
    records: Box<Records>,
    peer: Side,
    workload: Side,
    /// Whether the connection is one stream of several, in frames, with FIN in place of close_notify.
    framed: bool,
    /// The begin of a record whose end has not come; at first, what came with the handshake.
    partial: Vec<u8>,
    is_new: bool,
    /// What the workload sent last was [`BULK`] bytes or more.
    is_bulk: bool,
    /// Bytes from the peer to the workload.
    inward: u64,
    /// Bytes from the workload to the peer.
    outward: u64,
}

impl Flow {
    /// A flow between a connection of its own and `workload`. `early` is what came right behind the handshake.
    pub fn new(channel: Channel, workload: TcpStream, early: Early) -> Flow {
        let mut flow = Flow::over(channel, workload, false);
        flow.inward = early.data.len() as u64;
        (flow.workload.unsent, flow.peer.ended) = (early.data, early.closed);
        flow
    }

    /// A flow of one stream, which was accepted.
    pub fn stream(channel: Channel, workload: TcpStream) -> Flow {
        Flow::over(channel, workload, true)
    }

    fn over(channel: Channel, workload: TcpStream, framed: bool) -> Flow {
        let Channel { records, socket, partial } = channel;
        let (peer, workload) = (Side::new(socket), Side::new(workload));
        Flow { records, peer, workload, framed, partial, is_new: true, is_bulk: false, inward: 0, outward: 0 }
    }

    /// The connection, free for the next stream: after a whole one.
    pub fn into_channel(self) -> Option<Channel> {
        let Flow { records, peer, partial, framed, .. } = self;
        (framed && peer.ended && peer.shut).then_some(Channel { records, socket: peer.socket, partial })
    }

    /// Opens what came with the handshake; it is as long as the peer chose, so it has no place in the scratch.
    fn open_rest(&mut self) -> Result<(), End> {
        let mut rest = std::mem::take(&mut self.partial);
        let length = rest.len();
        self.open_batch(&mut rest, 0..length)
    }

    fn poll_both(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if self.is_new {
            if let Err(error) = ready!(self.workload.poll_flush(cx)) {
                return Poll::Ready(End::WorkloadCut(error));
            }
            self.is_new = false;
            if let Err(end) = self.open_rest() {
                return Poll::Ready(end);
            }
        }
        for _ in 0..TURNS {
            let inward = self.poll_inward(cx);
            let outward = self.poll_outward(cx);
            match (inward, outward) {
                (Poll::Ready(Err(end)), _) | (_, Poll::Ready(Err(end))) => return Poll::Ready(end),
                (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) if self.is_done() => return Poll::Ready(End::Whole),
                (Poll::Pending, Poll::Pending) => return Poll::Pending,
                (Poll::Ready(Ok(())), Poll::Pending) if self.workload.shut => return Poll::Pending,
                (Poll::Pending, Poll::Ready(Ok(()))) if self.peer.shut => return Poll::Pending,
                _ => {}
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn is_done(&self) -> bool {
        self.peer.shut && self.workload.shut
    }

    /// One batch from the peer to the workload.
    fn poll_inward(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        ready!(self.workload.poll_flush(cx)).map_err(End::WorkloadCut)?;
        if self.peer.ended {
            if !self.workload.shut {
                self.workload.shut().map_err(End::WorkloadCut)?;
            }
            return Poll::Ready(Ok(()));
        }
        with_scratch(|scratch| {
            // What is read starts at a line, right behind what was kept.
            let kept = self.partial.len();
            let middle = kept.next_multiple_of(LINE);
            let (start, room) = (middle - kept, scratch.len() - middle);
            let n = ready!(poll_read(&self.peer.socket, cx, room, |socket| read(socket, &mut scratch[middle..])));
            match n.map_err(End::PeerCut)? {
                0 => Poll::Ready(Err(End::PeerCut(ErrorKind::UnexpectedEof.into()))),
                n => {
                    scratch[start..middle].copy_from_slice(&self.partial);
                    self.partial.clear();
                    Poll::Ready(self.open_batch(scratch, start..middle + n))
                }
            }
        })
    }

    /// Opens every whole record of `came` and passes their data on.
    fn open_batch(&mut self, scratch: &mut [u8], came: Range<usize>) -> Result<(), End> {
        let (mut at, mut plains, mut total) = (came.start, Plains::default(), 0);
        while at < came.end && !self.peer.ended {
            match self.records.open(&mut scratch[at..came.end]).map_err(broken)? {
                Opened::Partial => break,
                Opened::Control { consumed } => at += consumed,
                // A stream ends with FIN; a close before it cuts it.
                Opened::Close { .. } if self.framed => return Err(End::PeerCut(ErrorKind::UnexpectedEof.into())),
                Opened::Close { consumed } => {
                    self.peer.ended = true;
                    at += consumed;
                }
                Opened::Data { consumed, plain } => {
                    let plain = at + plain.start..at + plain.end;
                    let before = self.inward + total;
                    let plain = if self.framed { self.unframe(&scratch[plain.clone()], before, plain)? } else { plain };
                    at += consumed;
                    total += plain.len() as u64;
                    plains.add(scratch, plain);
                }
            }
        }
        // Behind a FIN may stand the next stream; behind a close, nothing that counts.
        if self.framed || !self.peer.ended {
            self.partial.extend_from_slice(&scratch[at..came.end]);
        }
        if self.partial.is_empty() {
            self.partial = Vec::new();
        }
        self.inward += total;
        if total > 0 { plains.write(scratch, &mut self.workload).map_err(End::WorkloadCut) } else { Ok(()) }
    }

    /// The data of a frame, whose record lies at `range`; nothing for a FIN, which must tell how many bytes `came`.
    fn unframe(&mut self, plain: &[u8], came: u64, range: Range<usize>) -> Result<Range<usize>, End> {
        match Frame::decode(plain).map_err(bad)? {
            Frame::Data => Ok(range.start + KIND..range.end),
            Frame::Fin(told) if told == came => {
                self.peer.ended = true;
                Ok(range.start..range.start)
            }
            Frame::Fin(told) => Err(bad(BadFrame::Count { told, came })),
            _ => Err(bad(BadFrame::Unexpected("a control frame inside a stream"))),
        }
    }

    fn prefix(&self) -> usize {
        if self.framed { KIND } else { 0 }
    }

    /// One batch from the workload to the peer.
    fn poll_outward(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        ready!(self.peer.poll_flush(cx)).map_err(End::PeerCut)?;
        if self.workload.ended {
            return self.poll_close_outward(cx);
        }
        if self.records.owes_key_update() {
            self.update_keys()?;
            ready!(self.peer.poll_flush(cx)).map_err(End::PeerCut)?;
        }
        with_scratch(|scratch| {
            let n = ready!(self.poll_plaintext(cx, scratch));
            match n.map_err(End::WorkloadCut)? {
                0 => {
                    self.workload.ended = true;
                    Poll::Ready(self.seal_close())
                }
                n => Poll::Ready(self.seal_batch(scratch, n)),
            }
        })
    }

    /// Reads into the slots of `scratch`: into all of them, if what came last time was no small message.
    fn poll_plaintext(&mut self, cx: &mut Context<'_>, scratch: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut slots = plaintext_slots(scratch);
        let read = if self.is_bulk {
            poll_read(&self.workload.socket, cx, BATCH * LINED_PLAIN, |socket| read_vectored(socket, &mut slots))
        } else {
            poll_read(&self.workload.socket, cx, LINED_PLAIN, |socket| read(socket, &mut slots[0]))
        };
        if let Poll::Ready(Ok(n)) = &read {
            self.is_bulk = *n >= BULK;
        }
        read
    }

    /// Seals the `n` bytes that lie in the slots of `scratch` and sends the records in one write.
    ///
    /// A record that is full takes [`MAX_PLAIN`] bytes on the wire, so that one ends where the next begins.
    fn seal_batch(&mut self, scratch: &mut [u8], n: usize) -> Result<(), End> {
        let before = self.prefix();
        let start = LINE - HEADER - before;
        let (mut left, mut at) = (n, start);
        while left > 0 {
            let data = left.min(LINED_PLAIN);
            let slot = &mut scratch[at..];
            slot[HEADER..HEADER + before].fill(frame::DATA);
            let many = n > LINED_PLAIN;
            let seal = if many { Records::seal_lines } else { Records::seal };
            at += seal(&mut self.records, slot, before + data).map_err(broken)?;
            left -= data;
        }
        self.outward += n as u64;
        self.peer.write_or_keep(&scratch[start..at]).map_err(End::PeerCut)
    }

    fn update_keys(&mut self) -> Result<(), End> {
        let mut slot = [0; HEADER + 64];
        let length = self.records.seal_key_update(&mut slot).map_err(broken)?;
        self.peer.write_or_keep(&slot[..length]).map_err(End::PeerCut)
    }

    /// The workload has no more to say: FIN, or close_notify.
    fn seal_close(&mut self) -> Result<(), End> {
        let mut slot = [0; HEADER + 64];
        let length = if self.framed {
            let fin = Frame::Fin(self.outward).encode();
            slot[HEADER..HEADER + fin.len()].copy_from_slice(&fin);
            self.records.seal(&mut slot, fin.len())
        } else {
            self.records.seal_close(&mut slot)
        };
        let length = length.map_err(broken)?;
        self.peer.write_or_keep(&slot[..length]).map_err(End::PeerCut)
    }

    /// Once the end is written: FIN of TCP, unless the connection goes on.
    fn poll_close_outward(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        ready!(self.peer.poll_flush(cx)).map_err(End::PeerCut)?;
        if self.framed {
            self.peer.shut = true;
        } else if !self.peer.shut {
            self.peer.shut().map_err(End::PeerCut)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl Mover for Flow {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        self.poll_both(cx)
    }

    fn moved(&self) -> (u64, u64) {
        (self.inward, self.outward)
    }

    fn is_half_closed(&self) -> bool {
        self.peer.ended != self.workload.ended
    }

    fn cut(&mut self) {
        self.peer.socket.reset_on_drop();
        self.workload.socket.reset_on_drop();
    }
}

/// The room for data in each slot of `scratch`, so that one read fills many records. Each starts at a line, and there is
/// room for what comes before it.
fn plaintext_slots(scratch: &mut [u8]) -> [IoSliceMut<'_>; BATCH] {
    let mut slots = scratch[LINE..].chunks_exact_mut(MAX_PLAIN);
    [(); BATCH].map(|()| {
        let slot = slots.next().expect("the scratch is a batch of slots");
        IoSliceMut::new(&mut slot[..LINED_PLAIN])
    })
}

/// Where the plaintexts of a batch lie: in as many pieces as one system call takes well, the rest moved together behind
/// the last.
#[derive(Default)]
struct Plains {
    pieces: [Range<usize>; BATCH],
    count: usize,
}

impl Plains {
    fn add(&mut self, scratch: &mut [u8], plain: Range<usize>) {
        if plain.is_empty() {
            return;
        }
        if self.count < BATCH {
            self.pieces[self.count] = plain;
            self.count += 1;
            return;
        }
        let last = &mut self.pieces[BATCH - 1];
        let end = last.end + plain.len();
        scratch.copy_within(plain, last.end);
        last.end = end;
    }

    fn write(self, scratch: &[u8], to: &mut Side) -> io::Result<()> {
        let slices = self.pieces.map(|piece| IoSlice::new(&scratch[piece]));
        to.write_all_or_keep(&slices[..self.count])
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::sync::Arc;
    use std::time::Duration;

    use rustls::client::UnbufferedClientConnection;
    use rustls::server::UnbufferedServerConnection;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::proxy::pump::{Handshaking, Progress, advance};
    use crate::proxy::record::tests::configs;
    use crate::proxy::relay::{Bounds, Outcome, relay};
    use sidewarden_proto::traffic::{Secrets, hear};

    #[test]
    fn plaintexts_of_a_batch_keep_their_order_however_many_there_are() {
        for count in [0, 1, BATCH - 1, BATCH, BATCH + 1, 3 * BATCH] {
            let mut scratch: Vec<u8> = (0..200).collect();
            let mut plains = Plains::default();
            for record in 0..count {
                plains.add(&mut scratch, record * 4 + 1..record * 4 + 3);
                plains.add(&mut scratch, record * 4..record * 4);
            }
            let got: Vec<u8> = plains.pieces[..plains.count].iter().flat_map(|r| scratch[r.clone()].to_vec()).collect();
            let want: Vec<u8> = (0..count).flat_map(|r| [r as u8 * 4 + 1, r as u8 * 4 + 2]).collect();
            assert_eq!(got, want, "{count}");
        }
    }

    #[test]
    fn every_slot_starts_at_a_line_and_the_records_stand_side_by_side() {
        with_scratch(|scratch| {
            let base = scratch.as_ptr() as usize;
            for (i, slot) in plaintext_slots(scratch).iter().enumerate() {
                assert_eq!(slot.as_ptr() as usize, base + LINE + i * MAX_PLAIN);
                assert_eq!((slot.as_ptr() as usize % LINE, slot.len() % LINE), (0, 0));
            }
        });
    }

    /// Two ends of one TCP connection on loopback.
    async fn wire() -> (tokio::net::TcpStream, tokio::net::TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (one, two) = tokio::join!(tokio::net::TcpStream::connect(address), listener.accept());
        (one.unwrap(), two.unwrap().0)
    }

    async fn shake<C: Handshaking>(
        connection: &mut C,
        socket: &mut tokio::net::TcpStream,
    ) -> (Early, Vec<u8>, Secrets) {
        let (mut input, mut output, mut early) = (Vec::new(), Vec::new(), Early::default());
        let mut secrets = Secrets::default();
        loop {
            let (progress, heard) = hear(|| advance(connection, &mut input, &mut output, &mut early));
            secrets.add(heard);
            socket.write_all(&output).await.unwrap();
            output.clear();
            if progress.unwrap() == Progress::Done {
                return (early, input, secrets);
            }
            assert_ne!(socket.read_buf(&mut input).await.unwrap(), 0, "the peer went away");
        }
    }

    /// An application's end with one flow behind it.
    struct Stage {
        client: tokio::net::TcpStream,
        server: tokio::net::TcpStream,
        ends: [tokio::task::JoinHandle<Outcome>; 2],
    }

    fn spawn(flow: Flow) -> tokio::task::JoinHandle<Outcome> {
        let (cancelled, wait) = (CancellationToken::new(), Duration::from_secs(60));
        let bounds = Bounds { cancelled, deadline: None, idle: wait, half_closed: wait, pace: None };
        let mut flow = flow;
        tokio::spawn(async move { relay(&mut flow, bounds, || {}).await })
    }

    /// client ⇄ flow ⇄ TLS ⇄ flow ⇄ server
    async fn stage() -> Stage {
        let ((client, client_side), (server, server_side), (mut a, mut b)) = (wire().await, wire().await, wire().await);
        let (client_config, server_config) = configs();
        let (client_config, server_config): (Arc<_>, Arc<_>) = (client_config, server_config);
        let mut one = UnbufferedClientConnection::new(client_config, "x".try_into().unwrap()).unwrap();
        let mut two = UnbufferedServerConnection::new(server_config).unwrap();
        let ((early_one, rest_one, secrets_one), (early_two, rest_two, secrets_two)) =
            tokio::join!(shake(&mut one, &mut a), shake(&mut two, &mut b));
        let one = Channel::new(Records::of_client(one, secrets_one).unwrap(), a, rest_one);
        let two = Channel::new(Records::of_server(two, secrets_two).unwrap(), b, rest_two);
        let (one, two) = (Flow::new(one, client_side, early_one), Flow::new(two, server_side, early_two));
        Stage { client, server, ends: [spawn(one), spawn(two)] }
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut x = 1u32;
        std::iter::repeat_with(|| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 24) as u8
        })
        .take(length)
        .collect()
    }

    #[tokio::test]
    async fn megabytes_go_both_ways_at_once_and_both_ends_close_clean() {
        let Stage { client, server, ends } = stage().await;
        let data = noise(5_000_001);
        let push = |socket: tokio::net::TcpStream, data: Vec<u8>| async move {
            let (mut read, mut write) = socket.into_split();
            let send = tokio::spawn(async move {
                write.write_all(&data).await.unwrap();
                write.shutdown().await.unwrap();
            });
            let mut got = Vec::new();
            read.read_to_end(&mut got).await.unwrap();
            send.await.unwrap();
            got
        };
        let (one, two) = tokio::join!(push(client, data.clone()), push(server, data.clone()));
        assert!(one == data && two == data);
        for end in ends {
            let Outcome { bytes_in, bytes_out, end } = end.await.unwrap();
            assert!(matches!(end, End::Whole), "{end:?}");
            assert_eq!((bytes_in, bytes_out), (data.len() as u64, data.len() as u64));
        }
    }

    #[tokio::test]
    async fn a_half_closed_client_still_gets_its_answer() {
        let Stage { mut client, mut server, ends } = stage().await;
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = Vec::new();
        server.read_to_end(&mut question).await.unwrap();
        assert_eq!(question, b"question");
        server.write_all(&noise(300_000)).await.unwrap();
        drop(server);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, noise(300_000));
        for end in ends {
            assert!(matches!(end.await.unwrap().end, End::Whole));
        }
    }

    #[tokio::test]
    async fn a_reader_that_stops_holds_only_its_own_direction() {
        let Stage { mut client, mut server, .. } = stage().await;
        let flood = tokio::spawn(async move {
            let (mut read, mut write) = client.split();
            let data = noise(30_000_000);
            let mut answer = [0; 4];
            let (sent, _) = tokio::join!(write.write_all(&data), read.read_exact(&mut answer));
            sent.unwrap();
            answer
        });
        server.write_all(b"pong").await.unwrap();
        let mut got = vec![0; 30_000_000];
        server.read_exact(&mut got).await.unwrap();
        assert!(got == noise(30_000_000));
        assert_eq!(&flood.await.unwrap(), b"pong");
    }

    #[tokio::test]
    async fn a_stream_cut_without_close_notify_resets_the_workload() {
        let ((mut server, server_side), (mut a, mut b)) = (wire().await, wire().await);
        let (client_config, server_config) = configs();
        let mut one = UnbufferedClientConnection::new(client_config, "x".try_into().unwrap()).unwrap();
        let mut two = UnbufferedServerConnection::new(server_config).unwrap();
        let (_, (early, rest, secrets)) = tokio::join!(shake(&mut one, &mut a), shake(&mut two, &mut b));
        let records = Records::of_server(two, secrets).unwrap();
        let end = spawn(Flow::new(Channel::new(records, b, rest), server_side, early));
        drop(a);
        assert!(matches!(end.await.unwrap().end, End::PeerCut(_)));
        let error = server.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }

    /// A client of rustls' own that says everything in one breath: its Finished, a request, and its close.
    #[tokio::test]
    async fn what_comes_in_one_breath_with_the_handshake_is_not_lost() {
        for closes in [false, true] {
            let ((mut server, server_side), (mut a, mut b)) = (wire().await, wire().await);
            let (client_config, server_config) = configs();
            let mut client = rustls::ClientConnection::new(client_config, "x".try_into().unwrap()).unwrap();
            let mut two = UnbufferedServerConnection::new(server_config).unwrap();
            let talk = async {
                let mut bytes = Vec::new();
                while client.is_handshaking() {
                    client.write_tls(&mut bytes).unwrap();
                    if !client.wants_write() && client.wants_read() {
                        a.write_all(&std::mem::take(&mut bytes)).await.unwrap();
                        let mut heard = vec![0; 16 << 10];
                        let n = a.read(&mut heard).await.unwrap();
                        client.read_tls(&mut &heard[..n]).unwrap();
                        client.process_new_packets().unwrap();
                    }
                }
                client.writer().write_all(b"question").unwrap();
                if closes {
                    client.send_close_notify();
                }
                while client.wants_write() {
                    client.write_tls(&mut bytes).unwrap();
                }
                a.write_all(&bytes).await.unwrap();
            };
            let ((), (early, rest, secrets)) = tokio::join!(talk, shake(&mut two, &mut b));
            let records = Records::of_server(two, secrets).unwrap();
            let end = spawn(Flow::new(Channel::new(records, b, rest), server_side, early));
            let mut question = [0; 8];
            server.read_exact(&mut question).await.unwrap();
            assert_eq!(&question, b"question");
            if closes {
                assert_eq!(server.read(&mut question).await.unwrap(), 0, "the close came too");
                drop(server);
                assert!(matches!(end.await.unwrap().end, End::Whole));
            }
        }
    }
}
