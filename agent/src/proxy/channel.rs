//! An authenticated TLS 1.3 connection without a workload: what a stream begins on, and what is kept warm between two.

use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::task::{Context, Poll, ready};

use tokio::io::Interest;
use tokio::net::TcpStream;

use super::frame::{BadFrame, Frame, MAX_CONTROL};
use super::record::{HEADER, Opened, RecordError, Records, TRAILER};

/// What one read of control frames takes at most.
const READ: usize = 2 << 10;

/// A connection whose handshake is done.
#[derive(Debug)]
pub struct Channel {
    /// Seals and opens; in a box, because a connection goes from hand to hand.
    pub records: Box<Records>,
    /// Its socket.
    pub socket: TcpStream,
    /// What was read and is not opened yet.
    pub partial: Vec<u8>,
}

impl Channel {
    /// Of what a handshake has left, with the begin of a record that came right behind it.
    pub fn new(records: Records, socket: TcpStream, partial: Vec<u8>) -> Channel {
        Channel { records: Box::new(records), socket, partial }
    }

    /// Sends one frame at once. On a connection at rest the socket has room for it; one that has none is broken.
    pub fn send(&mut self, frame: &Frame) -> io::Result<()> {
        let plain = frame.encode();
        let mut sealed = Vec::new();
        if self.records.owes_key_update() {
            let mut slot = [0; HEADER + 64];
            let length = self.records.seal_key_update(&mut slot).map_err(broken)?;
            sealed.extend_from_slice(&slot[..length]);
        }
        let start = sealed.len();
        sealed.resize(start + HEADER, 0);
        sealed.extend_from_slice(&plain);
        sealed.resize(start + HEADER + plain.len() + TRAILER, 0);
        self.records.seal(&mut sealed[start..], plain.len()).map_err(broken)?;
        write_whole(&self.socket, &sealed)
    }

    /// Waits for one frame; `None` when the peer has closed the connection in order, or without a word, between two.
    pub async fn receive(&mut self) -> io::Result<Option<Frame>> {
        loop {
            if let Some(step) = self.take_frame()? {
                return Ok(step);
            }
            let mut bytes = self.read_some().await?;
            if bytes.is_empty() {
                let whole = self.partial.is_empty();
                return if whole { Ok(None) } else { Err(ErrorKind::UnexpectedEof.into()) };
            }
            if self.partial.is_empty() {
                self.partial = bytes;
            } else {
                self.partial.append(&mut bytes);
            }
        }
    }

    /// The first frame of what was read: nothing while it is not whole, `Some(None)` for the end.
    fn take_frame(&mut self) -> io::Result<Option<Option<Frame>>> {
        loop {
            let (consumed, frame) = match self.records.open(&mut self.partial).map_err(broken)? {
                Opened::Partial => {
                    let hopeless = self.partial.len() > HEADER + MAX_CONTROL + 2 * TRAILER;
                    return if hopeless { Err(BadFrame::Unexpected("data").into()) } else { Ok(None) };
                }
                Opened::Close { consumed } => (consumed, Some(None)),
                Opened::Control { consumed } => (consumed, None),
                Opened::Data { consumed, plain } => (consumed, Some(Some(Frame::decode(&self.partial[plain])?))),
            };
            self.drop_front(consumed);
            if frame.is_some() {
                return Ok(frame);
            }
        }
    }

    fn drop_front(&mut self, count: usize) {
        self.partial.drain(..count);
        if self.partial.is_empty() {
            // A connection at rest holds nothing.
            self.partial = Vec::new();
        }
    }

    async fn read_some(&mut self) -> io::Result<Vec<u8>> {
        poll_fn(|cx| {
            let mut bytes = [0; READ];
            let n = ready!(poll_read(&self.socket, cx, READ, |socket| read(socket, &mut bytes)))?;
            Poll::Ready(Ok(bytes[..n].to_vec()))
        })
        .await
    }

    /// Whether nothing has come since the last stream: what has come to a connection at rest is its end.
    pub fn is_quiet(&self) -> bool {
        if !self.partial.is_empty() {
            return false;
        }
        let peek = nix::sys::socket::MsgFlags::MSG_PEEK | nix::sys::socket::MsgFlags::MSG_DONTWAIT;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&self.socket);
        matches!(nix::sys::socket::recv(fd, &mut [0], peek), Err(nix::errno::Errno::EAGAIN))
    }

    /// Says in order that no more streams come.
    pub fn close(mut self) {
        let mut slot = [0; HEADER + 64];
        if let Ok(length) = self.records.seal_close(&mut slot) {
            // The peer may be gone already: then there is nobody to tell.
            let _ = write_whole(&self.socket, &slot[..length]);
        }
    }
}

fn write_whole(socket: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    match nix::unistd::write(socket, bytes)? {
        n if n == bytes.len() => Ok(()),
        _ => Err(ErrorKind::WriteZero.into()),
    }
}

/// A peer that breaks the protocol.
pub fn broken(error: RecordError) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, error)
}

/// One read when there is something to read. A read that comes short has emptied the socket, so the next one would
/// only tell that there is nothing: it is not tried before the kernel says so.
pub fn poll_read(
    socket: &TcpStream,
    cx: &mut Context<'_>,
    room: usize,
    mut read: impl FnMut(&TcpStream) -> io::Result<usize>,
) -> Poll<io::Result<usize>> {
    loop {
        ready!(socket.poll_read_ready(cx))?;
        let mut short = None;
        let result = socket.try_io(Interest::READABLE, || match read(socket)? {
            n if n > 0 && n < room => {
                short = Some(n);
                Err(ErrorKind::WouldBlock.into())
            }
            n => Ok(n),
        });
        match (short, result) {
            (Some(n), _) => return Poll::Ready(Ok(n)),
            (None, Ok(n)) => return Poll::Ready(Ok(n)),
            (None, Err(e)) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            (None, Err(e)) => return Poll::Ready(Err(e)),
        }
    }
}

/// read(2).
pub fn read(socket: &TcpStream, bytes: &mut [u8]) -> io::Result<usize> {
    Ok(nix::unistd::read(socket, bytes)?)
}

/// readv(2).
pub fn read_vectored(socket: &TcpStream, slots: &mut [io::IoSliceMut<'_>]) -> io::Result<usize> {
    Ok(nix::sys::uio::readv(socket, slots)?)
}
