//! One request and its answer between a client and a server, as two streams for [`super::super::relay`]: what is read
//! from the client is the head as it is sent on and the body to its end, and nothing behind it; what is read from the
//! server is its heads rewritten, and the rest as it comes.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::http::{Body, Framing, HeadScan, Reply, own_answer};
use crate::proxy::relay::Side;

/// Most bytes behind a request that are read and dropped, to notice the client's end.
const MAX_DROPPED: usize = 64 << 10;

/// The client's side.
#[derive(Debug)]
pub struct Asking<S> {
    head: Vec<u8>,
    body: Body,
    dropped: usize,
    inner: S,
}

impl<S> Asking<S> {
    /// `inner`, from which a head was read already, in whose place `head` is sent on.
    pub fn new(head: Vec<u8>, framing: Framing, inner: S) -> Asking<S> {
        Asking { head, body: Body::new(framing), dropped: 0, inner }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Asking<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.head.is_empty() {
            give(&mut this.head, buf);
            return Poll::Ready(Ok(()));
        }
        if this.body.has_ended() {
            return this.poll_end(cx);
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
        let came = &buf.filled()[before..];
        if came.is_empty() {
            return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        let taken = this.body.take(came);
        // Neither what is behind the body nor what cannot be read was ever there.
        buf.set_filled(before + *taken.as_ref().unwrap_or(&0));
        Poll::Ready(taken.map(drop).map_err(|wrong| io::Error::new(io::ErrorKind::InvalidData, wrong)))
    }
}

impl<S: AsyncRead + Unpin> Asking<S> {
    /// The request is whole. What the client says now is for nobody; only that it ends is news.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut dropped = [0; 1024];
        while self.dropped < MAX_DROPPED {
            let mut buf = ReadBuf::new(&mut dropped);
            ready!(Pin::new(&mut self.inner).poll_read(cx, &mut buf))?;
            if buf.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            self.dropped += buf.filled().len();
        }
        // It is not listened to any more: the answer's end, or a time limit, ends the connection.
        Poll::Pending
    }
}

fn give(from: &mut Vec<u8>, buf: &mut ReadBuf<'_>) {
    let count = buf.remaining().min(from.len());
    buf.put_slice(&from[..count]);
    from.drain(..count);
    if from.is_empty() {
        *from = Vec::new();
    }
}

/// The server's side.
#[derive(Debug)]
pub struct Answering<S> {
    /// What has come of a head; `None` once the last one has passed.
    coming: Option<Coming>,
    /// What is to be given out first.
    ready: Vec<u8>,
    /// Nothing follows: what stood in for the server's answer was ours.
    ended: bool,
    /// Set if the server is a proxy and wants credentials.
    refused: Arc<OnceLock<()>>,
    inner: S,
}

#[derive(Debug, Default)]
struct Coming {
    bytes: Vec<u8>,
    scan: HeadScan,
}

impl<S> Answering<S> {
    /// `inner`, from which nothing was read yet. `refused` is set if it asks for credentials, as only a proxy does.
    pub fn new(inner: S, refused: Arc<OnceLock<()>>) -> Answering<S> {
        Answering { coming: Some(Coming::default()), ready: Vec::new(), ended: false, refused, inner }
    }

    fn take(&mut self, came: &[u8]) {
        if came.is_empty() {
            return self.give_up("it closed without a whole answer");
        }
        let mut coming = self.coming.take().unwrap_or_default();
        coming.bytes.extend_from_slice(came);
        loop {
            match coming.advance() {
                Ok(Some(reply)) if reply.is_interim => self.ready.extend_from_slice(&reply.head),
                Ok(Some(reply)) if reply.wants_credentials => {
                    self.refused.get_or_init(|| ());
                    return self.give_up("it wants credentials for a proxy");
                }
                Ok(Some(reply)) => return self.ready.extend([reply.head, coming.bytes].concat()),
                Ok(None) => return self.coming = Some(coming),
                Err(wrong) => return self.give_up(&wrong),
            }
        }
    }

    fn give_up(&mut self, wrong: &str) {
        self.ready.extend_from_slice(&own_answer(
            502,
            &format!("The server's answer cannot be handed on: {wrong}."),
            true,
        ));
        (self.coming, self.ended) = (None, true);
    }
}

impl Coming {
    /// The next head, once all of it has come.
    fn advance(&mut self) -> Result<Option<Reply>, String> {
        let Some(end) = self.scan.look(&self.bytes)? else { return Ok(None) };
        let reply = Reply::parse(&self.bytes[..end])?;
        self.bytes.drain(..end);
        self.scan = HeadScan::default();
        Ok(Some(reply))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Answering<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if !this.ready.is_empty() {
                give(&mut this.ready, buf);
                return Poll::Ready(Ok(()));
            }
            if this.ended {
                return Poll::Ready(Ok(()));
            }
            if this.coming.is_none() {
                return Pin::new(&mut this.inner).poll_read(cx, buf);
            }
            let mut piece = [0; 4096];
            let mut came = ReadBuf::new(&mut piece);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut came))?;
            this.take(came.filled());
        }
    }
}

macro_rules! writes_and_resets_as_inner {
    ($stream:ident) => {
        impl<S: AsyncWrite + Unpin> AsyncWrite for $stream<S> {
            fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
                Pin::new(&mut self.inner).poll_write(cx, buf)
            }

            fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(&mut self.inner).poll_flush(cx)
            }

            fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(&mut self.inner).poll_shutdown(cx)
            }
        }

        impl<S: Side> Side for $stream<S> {
            fn reset_on_drop(&self) {
                self.inner.reset_on_drop();
            }
        }
    };
}
writes_and_resets_as_inner!(Asking);
writes_and_resets_as_inner!(Answering);

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::super::http::Request;
    use super::*;

    fn asking<S>(request: &Request, inner: S) -> Asking<S> {
        Asking::new(request.forwarded(), request.framing, inner)
    }

    fn request(fields: &str) -> Request {
        Request::parse(format!("POST http://a.example/ HTTP/1.1\r\n{fields}\r\n").as_bytes()).unwrap()
    }

    #[tokio::test]
    async fn of_two_requests_only_the_first_is_sent_on() {
        for (fields, body) in
            [("Content-Length: 3\r\n", "abc"), ("Transfer-Encoding: chunked\r\n", "3\r\nabc\r\n0\r\n\r\n"), ("", "")]
        {
            let request = request(fields);
            let (mut client, ours) = duplex(1 << 16);
            client.write_all(format!("{body}GET http://evil.example/ HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
            client.shutdown().await.unwrap();
            let mut sent = String::new();
            asking(&request, ours).read_to_string(&mut sent).await.unwrap();
            assert_eq!(sent, format!("{}{body}", String::from_utf8(request.forwarded()).unwrap()));
        }
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_or_cannot_be_read_is_a_fault() {
        for (fields, body, kind) in [
            ("Content-Length: 3\r\n", "ab", io::ErrorKind::UnexpectedEof),
            ("Transfer-Encoding: chunked\r\n", "3\r\nab", io::ErrorKind::UnexpectedEof),
            ("Transfer-Encoding: chunked\r\n", "3;x\r\nabc\r\n", io::ErrorKind::InvalidData),
        ] {
            let (mut client, ours) = duplex(1 << 16);
            client.write_all(body.as_bytes()).await.unwrap();
            client.shutdown().await.unwrap();
            let error = asking(&request(fields), ours).read_to_end(&mut Vec::new()).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{body}");
        }
    }

    async fn answered(pieces: &[&[u8]]) -> String {
        let (mut server, ours) = duplex(1 << 20);
        let mut answering = Answering::new(ours, Arc::default());
        let mut got = Vec::new();
        for piece in pieces {
            server.write_all(piece).await.unwrap();
            // Whatever is there is read, so that the next piece comes by itself.
            while let Ok(Ok(count)) =
                tokio::time::timeout(std::time::Duration::from_millis(1), answering.read_buf(&mut got)).await
            {
                if count == 0 {
                    break;
                }
            }
        }
        drop(server);
        answering.read_to_end(&mut got).await.unwrap();
        String::from_utf8(got).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_rewritten_however_it_is_cut() {
        let answer =
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: 4\r\n\r\nbody";
        let expected = "HTTP/1.1 100 Continue\r\nvia: 1.1 sidewarden\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\
                        via: 1.1 sidewarden\r\nconnection: close\r\n\r\nbody";
        assert_eq!(answered(&[answer]).await, expected);
        for cut in 1..answer.len() {
            assert_eq!(answered(&[&answer[..cut], &answer[cut..]]).await, expected, "cut at {cut}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_no_answer_becomes_one_of_ours() {
        let endless = [&b"HTTP/1.1 200 OK\r\nX: "[..], &vec![b'x'; 70 << 10]].concat();
        let credentials = b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n";
        let switching = b"HTTP/1.1 101 Switching Protocols\r\n\r\nGET /";
        for wrong in [
            &b""[..],
            b"SSH-2.0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nConte",
            b"HTTP/1.1 200 OK\n\n",
            switching,
            credentials,
            &endless,
        ] {
            let got = answered(&[wrong]).await;
            assert!(got.starts_with("HTTP/1.1 502 Bad Gateway\r\n") && got.ends_with(".\n"), "{got}");
        }
    }
}
