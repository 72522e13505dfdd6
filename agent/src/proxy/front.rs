//! What stands in front of TLS: the PROXY header of a load balancer, and the first bytes behind it.
//!
//! Who may send a header must send one: guessing would let anybody behind the load balancer begin with a header of their
//! own. From everybody else a header is a lie, and refused as one.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use sidewarden_proto::event::RefusalReason;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

use super::handshake::{Opening, read_on};
use super::header::{Header, MAX_HEADER, Parsed, parse};

/// Reads the header that is due: who really connected, `None` if that is the load balancer itself, or what is wrong.
/// What was read behind it stays in `bytes`. Has no limit of time of its own.
pub async fn real_source<S: AsyncRead + Unpin>(
    stream: &mut S,
    bytes: &mut Vec<u8>,
) -> io::Result<Result<Option<SocketAddr>, String>> {
    let header = read_header(stream, bytes).await?;
    Ok(header.map(|header| header.source()).map_err(|why| format!("PROXY header: {why}")))
}

/// Reads on from `bytes` until it is clear what the connection is. Who says nothing for `silent_after` waits for the
/// service to speak first, in plaintext; zero for nobody. Has no limit of time of its own otherwise.
pub async fn opening<S: AsyncRead + Unpin>(
    stream: &mut S,
    bytes: &mut Vec<u8>,
    silent_after: Duration,
) -> io::Result<Opening> {
    match is_silent(stream, bytes, silent_after).await? {
        true => Ok(Opening::Refuse(RefusalReason::Plaintext, "waited for the service to speak first".into())),
        false => read_on(stream, bytes).await,
    }
}

/// Plaintext that is the beginning of a header nobody asked for is told as what it is: somebody who wants to pass for
/// somebody else.
pub fn unmask(opening: Opening, bytes: &[u8]) -> Opening {
    match opening {
        Opening::Refuse(RefusalReason::Plaintext, detail) if looks_like_header(bytes) => {
            Opening::Refuse(RefusalReason::ProxyHeaderUntrusted, detail)
        }
        other => other,
    }
}

/// Whether nothing came within `patience`, which is none if zero.
async fn is_silent<S: AsyncRead + Unpin>(stream: &mut S, bytes: &mut Vec<u8>, patience: Duration) -> io::Result<bool> {
    if patience.is_zero() || !bytes.is_empty() {
        return Ok(false);
    }
    match timeout(patience, stream.read_buf(bytes)).await {
        Ok(read) => read.map(|_| false),
        Err(_) => Ok(true),
    }
}

/// Takes a header off the front; what came behind it in the same breath stays in `bytes`.
async fn read_header<S: AsyncRead + Unpin>(
    stream: &mut S,
    bytes: &mut Vec<u8>,
) -> io::Result<Result<Header, &'static str>> {
    loop {
        match parse(bytes) {
            Parsed::Header(header, length) => {
                bytes.drain(..length);
                return Ok(Ok(header));
            }
            Parsed::Bad(why) => return Ok(Err(why)),
            Parsed::More if bytes.len() > MAX_HEADER => return Ok(Err("it has no end")),
            Parsed::More => {}
        }
        if stream.read_buf(bytes).await? == 0 {
            return Ok(Err(if bytes.is_empty() { "closed without a byte" } else { "closed in the middle of it" }));
        }
    }
}

/// As long as the fixed beginning of either version; fewer bytes could be anything.
fn looks_like_header(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PROXY ") || bytes.starts_with(b"\r\n\r\n\0\r\nQUIT\n")
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::super::handshake::Hello;
    use super::super::handshake::made_up::{hello, records};
    use super::*;

    const OUTER: &str = "10.0.0.1:1";

    fn good_hello() -> Vec<u8> {
        records(&hello(0x0303, Some(&[0x0304])), 9999)
    }

    fn tls() -> Opening {
        Opening::Tls(Hello { offers_1_3: true, ..Hello::default() })
    }

    fn header() -> Header {
        Header::tcp("192.0.2.7:12345".parse().unwrap(), "192.0.2.9:443".parse().unwrap())
    }

    #[derive(Debug)]
    struct Arrival {
        source: SocketAddr,
        opening: Opening,
        bytes: Vec<u8>,
    }

    async fn arrive(stream: &mut (impl AsyncRead + Unpin), header: bool, silent_after: Duration) -> Arrival {
        let (mut bytes, mut source) = (Vec::new(), OUTER.parse().unwrap());
        if header {
            match real_source(stream, &mut bytes).await.unwrap() {
                Ok(real) => source = real.unwrap_or(source),
                Err(why) => {
                    let opening = Opening::Refuse(RefusalReason::ProxyHeaderBroken, why);
                    return Arrival { source, opening, bytes };
                }
            }
        }
        let opening = opening(stream, &mut bytes, silent_after).await.unwrap();
        let opening = if header { opening } else { unmask(opening, &bytes) };
        Arrival { source, opening, bytes }
    }

    /// What is made of `sent`, written in pieces of `size` and then ended.
    async fn arrived(sent: &[u8], size: usize, header: bool) -> Arrival {
        let (mut client, mut server) = tokio::io::duplex(64 << 10);
        let sent = sent.to_vec();
        let writing = tokio::spawn(async move {
            for piece in sent.chunks(size) {
                if client.write_all(piece).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
        });
        let arrival = arrive(&mut server, header, Duration::ZERO).await;
        drop(server);
        writing.await.unwrap();
        arrival
    }

    fn refusal(arrival: &Arrival) -> Option<(RefusalReason, &str)> {
        match &arrival.opening {
            Opening::Refuse(reason, detail) => Some((*reason, detail)),
            _ => None,
        }
    }

    #[tokio::test]
    async fn a_header_that_is_due_tells_who_connected_however_it_was_cut() {
        for bytes in [header().encode_v1(), header().encode_v2(true).unwrap()] {
            for size in [1, 7, 27, 28, 40, 9999] {
                let arrival = arrived(&[bytes.clone(), good_hello()].concat(), size, true).await;
                assert_eq!((arrival.source.to_string().as_str(), &arrival.opening), ("192.0.2.7:12345", &tls()));
                assert_eq!(arrival.bytes, good_hello());
            }
        }
    }

    #[tokio::test]
    async fn a_health_check_of_the_load_balancer_is_itself() {
        let local = Header::default().encode_v2(false).unwrap();
        for bytes in [local, b"PROXY UNKNOWN\r\n".to_vec()] {
            let arrival = arrived(&[bytes, good_hello()].concat(), 9999, true).await;
            assert_eq!((arrival.source.to_string().as_str(), arrival.opening), (OUTER, tls()));
        }
    }

    #[tokio::test]
    async fn without_the_header_that_is_due_nobody_gets_further() {
        for (sent, detail) in [
            (good_hello(), "PROXY header: there is none"),
            (b"PROXY TCP4 nobody\r\n".to_vec(), "PROXY header: its line is not of the form"),
            (b"PROXY TC".to_vec(), "PROXY header: closed in the middle"),
            (b"".to_vec(), "PROXY header: closed without a byte"),
        ] {
            let arrival = arrived(&sent, 9999, true).await;
            let (reason, got) = refusal(&arrival).unwrap();
            assert_eq!((reason, got.starts_with(detail)), (RefusalReason::ProxyHeaderBroken, true), "{got}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_is_waited_for_only_as_long_as_allowed() {
        let patience = Duration::from_millis(200);
        let (mut client, mut server) = tokio::io::duplex(999);
        let silent = arrive(&mut server, false, patience).await;
        assert_eq!(refusal(&silent), Some((RefusalReason::Plaintext, "waited for the service to speak first")));
        client.write_all(&good_hello()).await.unwrap();
        assert_eq!(arrive(&mut server, false, patience).await.opening, tls());
        let (client, mut server) = tokio::io::duplex(999);
        drop(client);
        let gone = arrive(&mut server, false, patience).await;
        assert_eq!(refusal(&gone), Some((RefusalReason::HandshakeFailed, "closed without a byte")));
        let (_client, mut server) = tokio::io::duplex(999);
        let patient = arrive(&mut server, false, Duration::ZERO);
        assert!(timeout(Duration::from_secs(3600), patient).await.is_err(), "no limit of its own");
    }

    #[tokio::test]
    async fn a_second_header_behind_the_first_is_not_believed() {
        let twice = [header().encode_v1(), b"PROXY TCP4 127.0.0.1 127.0.0.1 1 1\r\n".to_vec(), good_hello()].concat();
        let arrival = arrived(&twice, 9999, true).await;
        assert_eq!(refusal(&arrival).map(|(reason, _)| reason), Some(RefusalReason::Plaintext));
        assert_eq!(arrival.source.to_string(), "192.0.2.7:12345");
    }

    #[tokio::test]
    async fn a_header_that_nobody_asked_for_is_a_lie_and_nothing_else_is() {
        let expected = Some(RefusalReason::ProxyHeaderUntrusted);
        for bytes in [header().encode_v1(), header().encode_v2(true).unwrap()] {
            let arrival = arrived(&[bytes, good_hello()].concat(), 9999, false).await;
            assert_eq!(refusal(&arrival).map(|(reason, _)| reason), expected);
            assert_eq!(arrival.source.to_string(), OUTER);
        }
        let plain = arrived(b"PROPFIND / HTTP/1.1\r\n", 9999, false).await;
        assert_eq!(refusal(&plain), Some((RefusalReason::Plaintext, "began with `PROPFIND / HTTP/1.1`")));
        assert_eq!(arrived(&good_hello(), 1, false).await.opening, tls());
    }
}
