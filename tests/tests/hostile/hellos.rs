//! First bytes: too old, no TLS at all, in pieces, or never finished.

use std::io;
use std::net::Ipv4Addr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::{ClientConnection, NamedGroup};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::gate::{BOTH, Gate, LIMIT, dial_from, elsewhere, name, says, trusting};

/// A ClientHello with `legacy` as its version, in a record of `record`; with `supported_versions` if there are any.
fn hello(record: u16, legacy: u16, supported: &[u16]) -> Vec<u8> {
    let with_length = |bytes: &[u8]| [&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat();
    let mut body = legacy.to_be_bytes().to_vec();
    body.extend([0x5a; 32]);
    body.push(0);
    body.extend(with_length(&[0xc0, 0x14, 0xc0, 0x13, 0x00, 0x35, 0x00, 0x2f]));
    body.extend([1, 0]);
    if !supported.is_empty() {
        let list: Vec<u8> = supported.iter().flat_map(|version| version.to_be_bytes()).collect();
        let extension = [&[u8::try_from(list.len()).unwrap()], &list[..]].concat();
        body.extend(with_length(&[&[0, 43][..], &with_length(&extension)].concat()));
    }
    let message = [&[1, 0][..], &with_length(&body)].concat();
    [&[22][..], &record.to_be_bytes(), &with_length(&message)].concat()
}

/// A hello of SSL 2.0, as clients of the nineties sent it.
fn ssl2_hello() -> Vec<u8> {
    let body = [&[1, 0, 2, 0, 6, 0, 0, 0, 16][..], &[1, 0, 0x80, 7, 0, 0xc0], &[0x5a; 16]].concat();
    [&[0x80, u8::try_from(body.len()).unwrap()], &body[..]].concat()
}

/// Sends `bytes`, ends, and gives all that comes back.
async fn sends(gate: &Gate, source: Ipv4Addr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = dial_from(source, gate.address()).await;
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    // A reset is an answer too.
    let _ = timeout(LIMIT, stream.read_to_end(&mut answer)).await.expect("an end in time");
    answer
}

/// RFC 8446 section 6: fatal, protocol_version.
const PROTOCOL_VERSION: [u8; 7] = [21, 3, 1, 0, 2, 2, 70];

#[tokio::test(flavor = "multi_thread")]
async fn old_versions_are_told_what_is_wrong_and_by_name_to_the_operator() {
    let gate = Gate::open().await;
    for (bytes, detail) in [
        (ssl2_hello(), "SSL 2.0"),
        (hello(0x0300, 0x0300, &[]), "SSL 3.0"),
        (hello(0x0301, 0x0301, &[]), "TLS 1.0"),
        (hello(0x0301, 0x0302, &[]), "TLS 1.1"),
        // A version that says 1.2 and a list that does not.
        (hello(0x0303, 0x0303, &[0x0302, 0x0301]), "TLS 1.1"),
        (hello(0x0301, 0x0303, &[0x7a7a]), "no known version"),
    ] {
        let source = elsewhere();
        assert_eq!(sends(&gate, source, &bytes).await, PROTOCOL_VERSION, "{detail}");
        let (reason, told) = gate.event_about(source).await;
        assert_eq!(reason, "protocol_version", "{told}");
        assert!(told.contains(detail), "{told}");
    }
    gate.is_open().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_tls_gets_no_answer_and_is_named() {
    let gate = Gate::open().await;
    let proxy_v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01\x12\x34\x01\xbb";
    for (bytes, reason, detail) in [
        (&b"GET /orders?card=4711 HTTP/1.1\r\nHost: orders\r\n\r\n"[..], "plaintext", "`GET /orders`"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "plaintext", "SSH-2.0"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "plaintext", "PRI * HTTP/2.0"),
        // Somebody who would like to be taken for 10.0.0.1; nobody in front of us is trusted to say so.
        (b"PROXY TCP4 10.0.0.1 10.0.0.2 4711 443\r\n", "proxy_header_untrusted", "PROXY TCP4"),
        (proxy_v2, "proxy_header_untrusted", "bytes 0d 0a"),
        (b"\x16\x03\x01\x40\x01\x01\x00\x40\x00", "handshake_failed", ""),
        (b"\x16\x03\x01\x00\x04\x01\xff\xff\xff", "handshake_failed", "16 KiB"),
        (b"\x16\x03\x03\x00\x04\x02\x00\x00\x00", "handshake_failed", "no ClientHello"),
        (b"\x17\x03\x03\x00\x04abcd", "plaintext", "bytes 17 03 03"),
        (b"\x15\x03\x03\x00\x02\x02\x28", "plaintext", "bytes 15 03 03"),
    ] {
        let source = elsewhere();
        let shown = String::from_utf8_lossy(bytes).into_owned();
        let mut stream = dial_from(source, gate.address()).await;
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let _ = timeout(LIMIT, stream.read_to_end(&mut answer)).await.expect("an end in time");
        // Nothing of ours ever goes out in plaintext: an alert at most.
        assert!(answer.is_empty() || answer[0] == 21, "{shown:?} got {answer:?}");
        let (told, why) = gate.event_about(source).await;
        assert_eq!(told, reason, "{shown:?}: {why}");
        assert!(why.contains(detail) && !why.contains("4711 HTTP"), "{shown:?}: {why}");
    }
    gate.is_open().await;
}

/// A PROXY header in front of a good hello does not make a client somebody else: it is refused, certificate or not.
#[tokio::test(flavor = "multi_thread")]
async fn a_spoofed_proxy_header_is_not_believed() {
    let gate = Gate::open().await;
    let source = elsewhere();
    let mut stream = dial_from(source, gate.address()).await;
    stream.write_all(b"PROXY TCP4 10.0.0.1 10.0.0.2 4711 443\r\n").await.unwrap();
    let config = Arc::new(trusting(&gate.web(), &BOTH));
    let shaken = timeout(LIMIT, TlsConnector::from(config).connect(name(), stream)).await.expect("an end in time");
    assert!(shaken.is_err());
    let (reason, detail) = gate.event_about(source).await;
    assert_eq!(reason, "proxy_header_untrusted");
    assert!(detail.contains("PROXY TCP4"), "{detail}");
    gate.is_open().await;
}

/// A stream that hands on one byte at a time.
struct Crumbs(TcpStream);

impl AsyncRead for Crumbs {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Crumbs {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, &buf[..buf.len().min(1)])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_writes_one_byte_at_a_time_gets_in() {
    let gate = Gate::open().await;
    for versions in [&BOTH[..1], &BOTH[1..]] {
        let config = Arc::new(trusting(&gate.web(), versions));
        let stream = Crumbs(dial_from(elsewhere(), gate.address()).await);
        let mut stream = TlsConnector::from(config).connect(name(), stream).await.unwrap();
        // Each byte a write, a record and a flush of its own.
        for byte in b"one byte, one record" {
            says(&mut stream, &[*byte]).await.unwrap();
        }
    }
}

/// A handshake by hand, whose hello is sent in `pieces` of TCP; the group it settled on.
async fn shake(gate: &Gate, pieces: impl FnOnce(&[u8]) -> Vec<Vec<u8>>) -> NamedGroup {
    let config = Arc::new(trusting(&gate.web(), &BOTH));
    let mut connection = ClientConnection::new(config, name()).unwrap();
    let mut hello = Vec::new();
    connection.write_tls(&mut hello).unwrap();
    let mut stream = dial_from(elsewhere(), gate.address()).await;
    for piece in pieces(&hello) {
        stream.write_all(&piece).await.unwrap();
        // A moment, so that it is a read of its own on the other side.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut heard = vec![0; 16 << 10];
    while connection.is_handshaking() || connection.wants_write() {
        if connection.wants_write() {
            let mut bytes = Vec::new();
            connection.write_tls(&mut bytes).unwrap();
            stream.write_all(&bytes).await.unwrap();
            continue;
        }
        let count = timeout(LIMIT, stream.read(&mut heard)).await.expect("an answer in time").unwrap();
        assert_ne!(count, 0, "it closed within the handshake");
        connection.read_tls(&mut &heard[..count]).unwrap();
        connection.process_new_packets().unwrap();
    }
    connection.negotiated_key_exchange_group().unwrap().name()
}

/// The records of `message`, `size` bytes of it in each.
fn records(message: &[u8], size: usize) -> Vec<u8> {
    let header = |part: &[u8]| [&[22, 3, 1][..], &u16::try_from(part.len()).unwrap().to_be_bytes()].concat();
    message.chunks(size).flat_map(|part| [header(part), part.to_vec()].concat()).collect()
}

/// A post-quantum hello is larger than a segment: wherever it is cut, by TCP or into records, it is one hello.
#[tokio::test(flavor = "multi_thread")]
async fn a_post_quantum_hello_may_be_cut_anywhere() {
    const AT_A_TIME: usize = 4;
    let gate = Arc::new(Gate::open().await);
    let length = hello_length(&gate);
    assert!(length > 1_400, "{length} bytes hold no post-quantum share");
    let workers: Vec<_> = (0..AT_A_TIME)
        .map(|worker| {
            let gate = gate.clone();
            tokio::spawn(async move {
                for at in (1 + worker..length).step_by(AT_A_TIME) {
                    let group = shake(&gate, |hello| vec![hello[..at].to_vec(), hello[at..].to_vec()]).await;
                    assert_eq!(group, NamedGroup::X25519MLKEM768, "cut at {at}");
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.unwrap();
    }
    for size in [1, 2, 3, 5, 16, 100, 700, 1_000, 1_400] {
        let group = shake(&gate, |hello| vec![records(&hello[5..], size)]).await;
        assert_eq!(group, NamedGroup::X25519MLKEM768, "records of {size}");
    }
}

/// Of a hello as they are here; it differs by nothing from one to the next.
fn hello_length(gate: &Gate) -> usize {
    let mut connection = ClientConnection::new(Arc::new(trusting(&gate.web(), &BOTH)), name()).unwrap();
    let mut hello = Vec::new();
    connection.write_tls(&mut hello).unwrap();
    hello.len()
}
