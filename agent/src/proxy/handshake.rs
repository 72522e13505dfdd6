//! What the first bytes of a connection are, before TLS sees them.
//!
//! rustls answers an old client with a generic alert and calls plaintext a decoding error; an operator needs the real
//! reason. [`classify`] is pure and takes the bytes however they were cut, over any number of TLS records.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::pki_types::DnsName;
use sidewarden_proto::event::RefusalReason;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::timeout;

/// Most bytes read for a ClientHello; real ones have 200 to 2,000.
const MAX_HELLO: usize = 16 << 10;
/// Extensions of a ClientHello that are read here.
const SERVER_NAME: u16 = 0;
const ALPN: u16 = 16;
const SUPPORTED_VERSIONS: u16 = 43;
/// Most application protocols of one hello that are looked at; real ones offer one to three.
pub const MAX_PROTOCOLS: usize = 16;
/// A fatal alert `protocol_version` (70), in a record of TLS 1.0, which every client reads.
pub const ALERT_PROTOCOL_VERSION: [u8; 7] = [21, 3, 1, 0, 2, 2, 70];

/// A fatal alert `unrecognized_name` (112) in the same form.
pub const ALERT_UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 1, 0, 2, 2, 112];

/// What the bytes are so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opening {
    /// The beginning of a ClientHello: more is needed.
    More,
    /// A ClientHello that offers TLS 1.2 or newer.
    Tls(Hello),
    /// Something to refuse, and what it is.
    Refuse(RefusalReason, String),
}

/// What a ClientHello asks for, as far as it decides where the connection goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// It offers TLS 1.3.
    pub offers_1_3: bool,
    /// The host it asks for (SNI), in lower case; `None` if it names none, or what it names is no DNS name.
    pub server_name: Option<String>,
    /// The application protocols it offers (ALPN), most wanted first, at most [`MAX_PROTOCOLS`] of them.
    pub alpn: Vec<Vec<u8>>,
}

/// Says what a connection that began with `bytes` is.
pub fn classify(bytes: &[u8]) -> Opening {
    match bytes {
        [] | [22] => Opening::More,
        [22, 3, ..] => match hello_of(bytes) {
            Some(Ok(hello)) => judge_version(&hello),
            Some(Err(what)) => broken(what),
            None if bytes.len() >= MAX_HELLO => broken("a ClientHello without end"),
            None => Opening::More,
        },
        [22, major, ..] => broken(&format!("a TLS record of version {major}.x")),
        [length, ..] if length & 0x80 != 0 && bytes.len() < 3 => Opening::More,
        [length, _, 1, ..] if length & 0x80 != 0 => old("an SSL 2.0 hello"),
        _ => Opening::Refuse(RefusalReason::Plaintext, format!("began with {}", shown(bytes))),
    }
}

fn broken(what: &str) -> Opening {
    Opening::Refuse(RefusalReason::HandshakeFailed, what.to_owned())
}

fn old(what: &str) -> Opening {
    Opening::Refuse(RefusalReason::ProtocolVersion, what.to_owned())
}

/// The first line, cut and without control characters: enough to recognise, not to leak.
pub fn shown(bytes: &[u8]) -> String {
    let line = bytes.split(|byte| matches!(byte, b'\r' | b'\n')).next().unwrap_or_default();
    let line = &line[..line.len().min(40)];
    // What follows a `?` of a URL may be a secret.
    let line = line.split(|byte| *byte == b'?').next().unwrap_or_default();
    if line.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ') && !line.is_empty() {
        return format!("`{}`", String::from_utf8_lossy(line));
    }
    let hex: Vec<String> = bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("bytes {}", hex.join(" "))
}

/// The body of the ClientHello, put together over the records; `None` while bytes are missing.
fn hello_of(mut bytes: &[u8]) -> Option<Result<Vec<u8>, &'static str>> {
    let mut message = Vec::new();
    loop {
        let ([kind, major, _minor, high, low], rest) = bytes.split_first_chunk::<5>()?;
        if *kind != 22 || *major != 3 {
            return Some(Err("a ClientHello interrupted by another record"));
        }
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        message.extend_from_slice(&rest[..rest.len().min(length)]);
        if message.first().is_some_and(|kind| *kind != 1) {
            return Some(Err("a handshake message that is no ClientHello"));
        }
        if let Some([_, a, b, c]) = message.first_chunk::<4>() {
            let wanted = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
            if wanted > MAX_HELLO {
                return Some(Err("a ClientHello over 16 KiB"));
            }
            if message.len() >= 4 + wanted {
                return Some(Ok(message[4..4 + wanted].to_vec()));
            }
        }
        bytes = rest.get(length..)?;
    }
}

fn judge_version(hello: &[u8]) -> Opening {
    let Some(fields) = read_hello(hello) else { return broken("a ClientHello that cannot be read") };
    let HelloFields { legacy, offered, server_name, alpn } = fields;
    let offers_1_3 = offered.as_ref().is_some_and(|offered| offered.contains(&0x0304));
    let newest = match offered {
        Some(offered) => offered.into_iter().filter(|version| version >> 8 == 3).max(),
        None => Some(legacy),
    };
    match newest {
        Some(version) if version >= 0x0303 => Opening::Tls(Hello { offers_1_3, server_name, alpn }),
        Some(version) => old(&format!("offered {}", version_name(version))),
        None => old("offered no known version"),
    }
}

fn version_name(version: u16) -> String {
    match version {
        0x0300 => "SSL 3.0".into(),
        0x0301 => "TLS 1.0".into(),
        0x0302 => "TLS 1.1".into(),
        other => format!("version {other:#06x}"),
    }
}

/// What is read of a ClientHello.
#[derive(Default)]
struct HelloFields {
    /// The old version field.
    legacy: u16,
    /// The list of `supported_versions`, if it has one.
    offered: Option<Vec<u16>>,
    server_name: Option<String>,
    alpn: Vec<Vec<u8>>,
}

fn read_hello(hello: &[u8]) -> Option<HelloFields> {
    let mut fields = Fields(hello);
    let mut read = HelloFields { legacy: fields.u16()?, ..HelloFields::default() };
    fields.take(32)?;
    let session = fields.u8()?;
    fields.take(session.into())?;
    let ciphers = fields.u16()?;
    fields.take(ciphers.into())?;
    let compressions = fields.u8()?;
    fields.take(compressions.into())?;
    if fields.0.is_empty() {
        return Some(read);
    }
    let length = fields.u16()?;
    let mut extensions = Fields(fields.take(length.into())?);
    while !extensions.0.is_empty() {
        let (kind, length) = (extensions.u16()?, extensions.u16()?);
        let body = extensions.take(length.into())?;
        // The first of a kind counts; rustls refuses a hello that has two.
        match kind {
            SERVER_NAME if read.server_name.is_none() => read.server_name = server_name(body),
            ALPN if read.alpn.is_empty() => read.alpn = protocols(body).unwrap_or_default(),
            SUPPORTED_VERSIONS if read.offered.is_none() => {
                let list = body.get(1..)?;
                read.offered = Some(list.chunks_exact(2).map(|v| u16::from_be_bytes([v[0], v[1]])).collect());
            }
            _ => {}
        }
    }
    Some(read)
}

/// The host name of a `server_name` extension. One that is broken names nobody: rustls refuses it in its own words.
fn server_name(body: &[u8]) -> Option<String> {
    let mut fields = Fields(body);
    let length = fields.u16()?;
    let mut list = Fields(fields.take(length.into())?);
    let (kind, length) = (list.u8()?, list.u16()?);
    let name = list.take(length.into())?;
    (kind == 0).then(|| host_name(name)).flatten()
}

/// `name` as a DNS name in lower case, if it is one; an IP address is none (RFC 6066, section 3).
fn host_name(name: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(name).ok()?;
    let dns = DnsName::try_from(name).ok()?;
    let is_address = name.parse::<std::net::Ipv4Addr>().is_ok();
    (!is_address && !name.ends_with('.')).then(|| dns.to_lowercase_owned().as_ref().to_owned())
}

/// The list of an ALPN extension.
fn protocols(body: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut fields = Fields(body);
    let length = fields.u16()?;
    let (mut list, mut found) = (Fields(fields.take(length.into())?), Vec::new());
    while !list.0.is_empty() && found.len() < MAX_PROTOCOLS {
        let length = list.u8()?;
        found.push(list.take(length.into())?.to_vec());
    }
    Some(found)
}

/// Takes big-endian fields off the front; `None` where bytes are missing.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|b| b[0])
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|b| u16::from_be_bytes([b[0], b[1]]))
    }
}

/// Reads until it is clear what the connection is; returns what was read with it.
pub async fn read_opening<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<(Opening, Vec<u8>)> {
    let mut bytes = Vec::with_capacity(2048);
    let opening = read_on(stream, &mut bytes).await?;
    Ok((opening, bytes))
}

/// The same, of a connection whose first `bytes` are read already.
pub async fn read_on<S: AsyncRead + Unpin>(stream: &mut S, bytes: &mut Vec<u8>) -> io::Result<Opening> {
    loop {
        match classify(bytes) {
            Opening::More => {}
            settled => return Ok(settled),
        }
        if stream.read_buf(bytes).await? == 0 {
            let what =
                if bytes.is_empty() { "closed without a byte" } else { "closed in the middle of its ClientHello" };
            return Ok(broken(what));
        }
    }
}

/// Ends a refused connection so that the client gets to read `farewell`: a close with unread bytes would reset it.
pub async fn part<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, farewell: &[u8]) -> io::Result<()> {
    stream.write_all(farewell).await?;
    stream.shutdown().await?;
    let mut rest = [0; 1024];
    for _ in 0..64 {
        if stream.read(&mut rest).await? == 0 {
            break;
        }
    }
    Ok(())
}

/// A refused client gets this long to read why.
const PART_WITHIN: Duration = Duration::from_secs(1);

/// [`part`], within a limit. That the client was gone first is no news.
pub async fn part_soon<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, farewell: &[u8]) {
    match timeout(PART_WITHIN, part(stream, farewell)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::trace!(%error, "a refused client was gone first"),
        Err(_) => tracing::trace!("a refused client did not close"),
    }
}

/// A stream that first gives again what was read from it.
#[derive(Debug)]
pub struct Replayed<S> {
    first: Vec<u8>,
    given: usize,
    inner: S,
}

impl<S> Replayed<S> {
    /// `inner`, with `first` in front.
    pub fn new(first: Vec<u8>, inner: S) -> Replayed<S> {
        Replayed { first, given: 0, inner }
    }

    /// The stream itself.
    pub fn inner(&self) -> &S {
        &self.inner
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Replayed<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.given == self.first.len() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let count = buf.remaining().min(self.first.len() - self.given);
        buf.put_slice(&self.first[self.given..self.given + count]);
        self.given += count;
        if self.given == self.first.len() {
            // Nothing is held for the rest of a long connection.
            (self.first, self.given) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Replayed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

/// ClientHellos for tests.
#[cfg(test)]
pub mod made_up {
    /// A hello with this old version field and, if given, these `supported_versions`.
    pub fn hello(legacy: u16, supported: Option<&[u16]>) -> Vec<u8> {
        hello_with(legacy, &supported.map(supported_versions).into_iter().collect::<Vec<_>>())
    }

    /// A hello with this old version field and these extensions; with none, it has no room for them either.
    pub fn hello_with(legacy: u16, extensions: &[Vec<u8>]) -> Vec<u8> {
        let mut body = legacy.to_be_bytes().to_vec();
        body.extend([7; 32]);
        body.push(0);
        body.extend([0, 2, 0, 0x2f, 1, 0]);
        let extensions = extensions.concat();
        if !extensions.is_empty() {
            body.extend((extensions.len() as u16).to_be_bytes());
            body.extend(extensions);
        }
        let length = (body.len() as u32).to_be_bytes();
        [&[1], &length[1..], &body].concat()
    }

    /// An extension of this kind.
    pub fn extension(kind: u16, body: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &sized16(body)].concat()
    }

    /// The extension `supported_versions`.
    pub fn supported_versions(list: &[u16]) -> Vec<u8> {
        let versions: Vec<u8> = list.iter().flat_map(|version| version.to_be_bytes()).collect();
        extension(43, &[&[versions.len() as u8][..], &versions].concat())
    }

    /// The extension `server_name` with one host name.
    pub fn server_name(name: &[u8]) -> Vec<u8> {
        extension(0, &sized16(&[&[0][..], &sized16(name)].concat()))
    }

    /// The extension of ALPN.
    pub fn alpn(protocols: &[&[u8]]) -> Vec<u8> {
        let list: Vec<u8> = protocols.iter().flat_map(|p| [&[p.len() as u8][..], p].concat()).collect();
        extension(16, &sized16(&list))
    }

    fn sized16(bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat()
    }

    /// `message` in records of at most `size` bytes.
    pub fn records(message: &[u8], size: usize) -> Vec<u8> {
        let record = |part: &[u8]| [&[22, 3, 1], &(part.len() as u16).to_be_bytes()[..], part].concat();
        message.chunks(size).flat_map(record).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::made_up::{alpn, extension, hello, hello_with, records, server_name, supported_versions};
    use super::*;

    fn check(bytes: &[u8], reason: RefusalReason, detail: &str) {
        let Opening::Refuse(got, text) = classify(bytes) else { panic!("{bytes:?}: {:?}", classify(bytes)) };
        assert_eq!((got, text.contains(detail)), (reason, true), "{text}");
    }

    #[test]
    fn what_is_no_tls_is_named() {
        check(b"GET /orders?token=x HTTP/1.1\r\n", RefusalReason::Plaintext, "`GET /orders`");
        check(b"SSH-2.0-OpenSSH_9.2\r\n", RefusalReason::Plaintext, "`SSH-2.0-OpenSSH_9.2`");
        check(b"\0\x01\x02", RefusalReason::Plaintext, "bytes 00 01 02");
        check(&[0x80, 0x2e, 1, 0, 2], RefusalReason::ProtocolVersion, "SSL 2.0");
        check(&[22, 9, 1, 0, 1, 1], RefusalReason::HandshakeFailed, "version 9");
        check(&records(&[2, 0, 0, 0], 99), RefusalReason::HandshakeFailed, "no ClientHello");
        check(&records(&[1, 1, 0, 0], 99), RefusalReason::HandshakeFailed, "16 KiB");
        check(&records(&[1, 0, 0, 2, 9, 9], 99), RefusalReason::HandshakeFailed, "cannot be read");
    }

    #[test]
    fn old_versions_are_told_from_new_ones_by_what_is_offered() {
        for (legacy, supported, offered) in [
            (0x0300, None, Some("SSL 3.0")),
            (0x0301, None, Some("TLS 1.0")),
            (0x0302, None, Some("TLS 1.1")),
            (0x0303, Some(&[0x0302, 0x0301][..]), Some("TLS 1.1")),
            (0x0303, Some(&[0x7a7a][..]), Some("no known version")),
            (0x0303, None, None),
            (0x0303, Some(&[0x0304][..]), None),
            (0x0301, Some(&[0x3a3a, 0x0304, 0x0303][..]), None),
        ] {
            let bytes = records(&hello(legacy, supported), 9999);
            match offered {
                Some(offered) => check(&bytes, RefusalReason::ProtocolVersion, offered),
                None => {
                    let offers_1_3 = supported.is_some_and(|list| list.contains(&0x0304));
                    let hello = Hello { offers_1_3, ..Hello::default() };
                    assert_eq!(classify(&bytes), Opening::Tls(hello), "{legacy:x} {supported:?}");
                }
            }
        }
    }

    #[test]
    fn a_hello_is_read_across_any_cut_and_any_records() {
        let extensions = [server_name(b"db.example"), alpn(&[b"h2"]), supported_versions(&[0x0304])];
        let message = hello_with(0x0303, &extensions);
        for size in [1, 2, 3, 7, 60, 999] {
            let bytes = records(&message, size);
            for cut in 0..bytes.len() {
                assert_eq!(classify(&bytes[..cut]), Opening::More, "records of {size}, cut at {cut}");
            }
            let asked = Hello { offers_1_3: true, ..asked(&extensions) };
            assert_eq!((classify(&bytes), asked.server_name.is_some()), (Opening::Tls(asked), true));
        }
    }

    fn asked(extensions: &[Vec<u8>]) -> Hello {
        match classify(&records(&hello_with(0x0303, extensions), 9999)) {
            Opening::Tls(hello) => hello,
            other => panic!("{extensions:?}: {other:?}"),
        }
    }

    #[test]
    fn the_host_that_is_asked_for_is_a_dns_name_or_nothing() {
        for (name, expected) in [
            (&b"db.example"[..], Some("db.example")),
            (b"DB.Example", Some("db.example")),
            (b"_sip.example", Some("_sip.example")),
            (b"db", Some("db")),
            (b"", None),
            (b"10.0.0.1", None),
            (b"::1", None),
            (b"db.example.", None),
            (b"db..example", None),
            (b"db example", None),
            (b"db\0.example", None),
            (b"*.example", None),
            (b"d\xc3\xbc.example", None),
            (b"\xff\xfe", None),
            (&[b'a'; 64], None),
            (&b"a.".repeat(200), None),
        ] {
            assert_eq!(asked(&[server_name(name)]).server_name.as_deref(), expected, "{name:?}");
        }
        assert_eq!(
            asked(&[server_name(b"a.example"), server_name(b"b.example")]).server_name.as_deref(),
            Some("a.example")
        );
        assert_eq!(asked(&[extension(0, &[0, 5, 1, 0, 2, b'd', b'b'])]).server_name, None, "another kind of name");
    }

    #[test]
    fn what_is_offered_above_tls_is_listed_up_to_a_limit() {
        assert_eq!(asked(&[alpn(&[b"h2", b"http/1.1"])]).alpn, [&b"h2"[..], b"http/1.1"]);
        assert_eq!(asked(&[]).alpn, Vec::<Vec<u8>>::new());
        assert_eq!(asked(&[alpn(&[&b"x"[..]; 5_000])]).alpn.len(), MAX_PROTOCOLS);
    }

    #[test]
    fn broken_extensions_ask_for_nothing_and_broken_lengths_are_no_hello() {
        let names = server_name(b"db.example");
        let protocols = alpn(&[b"h2", b"http/1.1"]);
        for cut in 0..names.len() - 4 {
            assert_eq!(asked(&[extension(0, &names[4..4 + cut])]).server_name, None, "cut at {cut}");
        }
        for cut in 0..protocols.len() - 4 {
            assert!(asked(&[extension(16, &protocols[4..4 + cut])]).alpn.is_empty(), "cut at {cut}");
        }
        for cut in 1..names.len() {
            check(
                &records(&hello_with(0x0303, &[names[..cut].to_vec()]), 9999),
                RefusalReason::HandshakeFailed,
                "read",
            );
        }
    }

    #[tokio::test]
    async fn what_was_read_is_given_again() {
        let (mut client, server) = tokio::io::duplex(64);
        let mut replayed = Replayed::new(b"abc".to_vec(), server);
        client.write_all(b"def").await.unwrap();
        let mut got = [0; 6];
        replayed.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"abcdef");
    }

    proptest! {
        #[test]
        fn any_bytes_are_classified_without_a_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), tls: bool) {
            if tls && bytes.len() > 6 {
                bytes[..6].copy_from_slice(&[22, 3, 1, 0, 200, 1]);
            }
            classify(&bytes);
        }

        #[test]
        fn any_extensions_are_read_without_a_panic(names in any::<Vec<u8>>(), protocols in any::<Vec<u8>>(), rest in any::<Vec<u8>>()) {
            let extensions = [extension(0, &names), extension(16, &protocols), rest];
            if let Opening::Tls(hello) = classify(&records(&hello_with(0x0303, &extensions), 9999)) {
                assert!(hello.alpn.len() <= MAX_PROTOCOLS && hello.server_name.is_none_or(|name| name.len() <= 253));
            }
        }
    }
}
