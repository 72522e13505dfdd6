//! HTTP/1 as a forward proxy sees it. Pure: bytes in; out come what is asked for and the bytes to send instead.
//!
//! A connection carries one request: `CONNECT host:port`, or one for `http://…` that is sent on in origin form with
//! `Connection: close` both ways, so that no second request can slip past the list behind the first. What two readers
//! could understand differently is refused rather than mended: bare CR or LF, folded lines, space before a colon, two
//! lengths, a length beside chunks, chunk extensions.

use std::fmt::Write;

use sidewarden_proto::secret::Secret;

use crate::policy::egress::{Host, Target};

/// Most bytes of a head; browsers' largest have some 16 KiB.
pub const MAX_HEAD: usize = 64 << 10;
/// Most fields of a head.
const MAX_FIELDS: usize = 200;
/// Most bytes behind the last chunk.
const MAX_TRAILERS: usize = 8 << 10;
/// What we are called in `Via`.
const NAME: &str = "sidewarden";

/// What is wrong with a head or body, in words for whoever sent it.
pub type Wrong = String;

/// Looks for the end of a head while bytes come in; every byte is looked at once.
#[derive(Debug, Default)]
pub struct HeadScan {
    seen: usize,
}

impl HeadScan {
    /// The length of the head, with its empty line, once `bytes` hold all of it.
    pub fn look(&mut self, bytes: &[u8]) -> Result<Option<usize>, Wrong> {
        while let Some(&byte) = bytes.get(self.seen) {
            let before = self.seen.checked_sub(1).map(|i| bytes[i]);
            match (before, byte) {
                (_, 0) => return Err("a zero byte in the head".into()),
                (Some(b'\r'), b'\n') => {}
                (_, b'\n') => return Err("a line of the head ends in LF alone".into()),
                (Some(b'\r'), _) => return Err("a CR alone in the head".into()),
                _ => {}
            }
            self.seen += 1;
            if bytes[..self.seen].ends_with(b"\r\n\r\n") {
                return Ok(Some(self.seen));
            }
            if self.seen >= MAX_HEAD {
                return Err("a head over 64 KiB".into());
            }
        }
        Ok(None)
    }
}

/// How long the body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// So many bytes.
    Length(u64),
    /// In chunks.
    Chunked,
}

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// `CONNECT`: a tunnel to there.
    Tunnel(Target),
    /// A request for `http://…`, to be sent on.
    Forward(Target),
}

/// The head of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Where to.
    pub asked: Asked,
    /// How long its body is.
    pub framing: Framing,
    method: String,
    /// What the server is asked for: path and query.
    path: String,
    minor: u8,
    fields: Vec<Field>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Field {
    name: String,
    value: Vec<u8>,
}

impl Request {
    /// Whether an answer to it has no body.
    pub fn is_head(&self) -> bool {
        self.method == "HEAD"
    }

    /// Reads what came to a proxy: a whole head, as [`HeadScan`] found it.
    pub fn parse(head: &[u8]) -> Result<Request, Wrong> {
        let (line, fields) = lines_of(head)?;
        let (method, target, minor) = request_line(line)?;
        let framing = framing_of(&fields, minor)?;
        if method == "CONNECT" {
            if framing != Framing::Length(0) {
                return Err("a CONNECT with a body".into());
            }
            let asked = Asked::Tunnel(authority(target, None)?);
            return Ok(Request { asked, framing, method, path: String::new(), minor, fields });
        }
        let (target, path) = absolute(target, &method)?;
        Ok(Request { asked: Asked::Forward(target), framing, method, path, minor, fields })
    }

    /// Reads what was redirected on its way to a server at `port`: the name is the one in `Host`.
    pub fn parse_redirected(head: &[u8], port: u16) -> Result<Request, Wrong> {
        let (line, fields) = lines_of(head)?;
        let (method, path, minor) = request_line(line)?;
        let framing = framing_of(&fields, minor)?;
        if !path.starts_with('/') && path != "*" {
            return Err(format!("`{}` where a path belongs", shown(path)));
        }
        let host = only(&fields, "host")?.ok_or("no Host field")?;
        let host = std::str::from_utf8(host).map_err(|_| "a Host field that is not ASCII")?;
        let target = authority(host, Some(port))?;
        if target.port != port {
            return Err(format!("its Host field says port {}, it went to port {port}", target.port));
        }
        Ok(Request { asked: Asked::Forward(target), framing, path: path.to_owned(), method, minor, fields })
    }

    /// The head that is sent to the server instead.
    pub fn forwarded(&self) -> Vec<u8> {
        self.rewritten(&self.path, "")
    }

    /// The head that is sent to another proxy instead, with the value of its `Proxy-Authorization`.
    pub fn forwarded_to_proxy(&self, authorization: Option<&Secret>) -> Vec<u8> {
        let Request { asked: Asked::Forward(target) | Asked::Tunnel(target), path, .. } = self;
        let path = if path == "*" { "" } else { path };
        let ours = authorization.map(|value| format!("proxy-authorization: {}\r\n", value.reveal()));
        self.rewritten(&format!("http://{}{path}", host_field(target)), &ours.unwrap_or_default())
    }

    /// `asked_for` is what stands in the first line; `ours` are fields of our own.
    fn rewritten(&self, asked_for: &str, ours: &str) -> Vec<u8> {
        let Request { asked: Asked::Forward(target) | Asked::Tunnel(target), method, minor, fields, .. } = self;
        let host = host_field(target);
        let mut head = format!("{method} {asked_for} HTTP/1.{minor}\r\nhost: {host}\r\n{ours}").into_bytes();
        // What stands in `Host` is ignored, as it must be: the server is asked for what was judged.
        end_to_end(fields.iter().filter(|field| field.name != "host").collect(), &mut head);
        head.extend_from_slice(format!("via: 1.{minor} {NAME}\r\nconnection: close\r\n\r\n").as_bytes());
        head
    }
}

/// `Host` of a request for `http://target`.
fn host_field(target: &Target) -> String {
    match (&target.host, target.port) {
        (Host::Name(name), 80) => name.clone(),
        (Host::Address(std::net::IpAddr::V6(ip)), 80) => format!("[{ip}]"),
        (Host::Address(ip), 80) => ip.to_string(),
        _ => target.to_string(),
    }
}

/// The first line, and the fields with their names in lower case.
fn lines_of(head: &[u8]) -> Result<(&[u8], Vec<Field>), Wrong> {
    let head = head.strip_suffix(b"\r\n\r\n").ok_or("a head without an end")?;
    let mut lines = head.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let first = lines.next().unwrap_or_default();
    let fields: Vec<Field> = lines.map(field_of).collect::<Result<_, _>>()?;
    if fields.len() > MAX_FIELDS {
        return Err(format!("over {MAX_FIELDS} fields"));
    }
    Ok((first, fields))
}

fn field_of(line: &[u8]) -> Result<Field, Wrong> {
    if line.starts_with(b" ") || line.starts_with(b"\t") {
        return Err("a folded line".into());
    }
    let colon = line.iter().position(|byte| *byte == b':').ok_or("a line of the head without a colon")?;
    let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
    if name.is_empty() || !name.iter().copied().all(is_token) {
        return Err("a field whose name is no token".into());
    }
    if value.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t') {
        return Err("a control character in a field".into());
    }
    Ok(Field { name: String::from_utf8_lossy(name).to_ascii_lowercase(), value: value.to_owned() })
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn request_line(line: &[u8]) -> Result<(String, &str, u8), Wrong> {
    let line = std::str::from_utf8(line).ok().filter(|line| line.bytes().all(|byte| matches!(byte, b' '..=b'~')));
    let line = line.ok_or("a first line with bytes that belong in none")?;
    let fault = || format!("`{}` is no HTTP request", shown(line));
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(fault());
    };
    let minor = match version {
        "HTTP/1.1" => 1,
        "HTTP/1.0" => 0,
        _ => return Err(fault()),
    };
    if method.is_empty() || method.len() > 32 || !method.bytes().all(is_token) || target.is_empty() {
        return Err(fault());
    }
    Ok((method.to_owned(), target, minor))
}

/// Enough of a text to recognise it. What follows a `?` may be a secret, and what stands before an `@` too.
fn shown(text: &str) -> String {
    let text = text.split('?').next().unwrap_or_default();
    let text = text.rsplit('@').next().unwrap_or_default();
    text.chars().take(60).collect()
}

/// The value of a field that may stand there once at most.
fn only<'f>(fields: &'f [Field], name: &str) -> Result<Option<&'f [u8]>, Wrong> {
    let mut found = fields.iter().filter(|field| field.name == name);
    match (found.next(), found.next()) {
        (_, Some(_)) => Err(format!("two {name} fields")),
        (found, None) => Ok(found.map(|field| &field.value[..])),
    }
}

fn framing_of(fields: &[Field], minor: u8) -> Result<Framing, Wrong> {
    let (length, coding) = (only(fields, "content-length")?, only(fields, "transfer-encoding")?);
    match (length, coding) {
        (Some(_), Some(_)) => Err("both a content-length and a transfer-encoding".into()),
        (None, None) => Ok(Framing::Length(0)),
        (Some(length), None) => {
            whole_number(length).map(Framing::Length).ok_or("a content-length that is no number".into())
        }
        (None, Some(coding)) if minor == 1 && coding.eq_ignore_ascii_case(b"chunked") => Ok(Framing::Chunked),
        (None, Some(_)) => Err("a transfer-encoding other than chunked, or in HTTP/1.0".into()),
    }
}

/// Digits and nothing else; `str::parse` would take a `+`.
fn whole_number(digits: &[u8]) -> Option<u64> {
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// `http://host:port/path?query`: where to, and what is asked for there.
fn absolute(target: &str, method: &str) -> Result<(Target, String), Wrong> {
    let Some((scheme, rest)) = target.split_once("://") else {
        return Err(format!("`{}` is no address of another server: this is a forward proxy", shown(target)));
    };
    match scheme.to_ascii_lowercase().as_str() {
        "http" => {}
        "https" => return Err("https:// goes through a proxy by CONNECT".into()),
        _ => return Err("a scheme that is not http".into()),
    }
    if rest.contains('#') {
        return Err("a fragment in the address".into());
    }
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (place, path) = rest.split_at(end);
    let path = match path.chars().next() {
        None if method == "OPTIONS" => "*".to_owned(),
        None => "/".to_owned(),
        Some('?') => format!("/{path}"),
        Some(_) => path.to_owned(),
    };
    Ok((authority(place, Some(80))?, path))
}

/// `host`, `host:port`, `[::1]:port`. Without a `default` the port must be there.
fn authority(text: &str, default: Option<u16>) -> Result<Target, Wrong> {
    if text.contains('@') {
        return Err("a user name in the address".into());
    }
    let fault = || format!("`{}` is no host and port", shown(text));
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (inner, port) = rest.split_once(']').ok_or_else(fault)?;
            match Host::parse(inner)? {
                host @ Host::Address(std::net::IpAddr::V6(_)) => (host, port),
                _ => return Err(fault()),
            }
        }
        None => {
            let end = text.find(':').unwrap_or(text.len());
            (Host::parse(&text[..end])?, &text[end..])
        }
    };
    let port = match port.strip_prefix(':') {
        Some(digits) if digits.len() <= 5 => whole_number(digits.as_bytes()).and_then(|port| u16::try_from(port).ok()),
        Some(_) => None,
        None if port.is_empty() => default,
        None => None,
    };
    Ok(Target { host, port: port.filter(|port| *port != 0).ok_or_else(fault)? })
}

/// Writes the fields that are meant for the other end, and not for us.
fn end_to_end(fields: Vec<&Field>, head: &mut Vec<u8>) {
    let is_named = |name: &str| {
        let mut lists = fields.iter().filter(|field| field.name == "connection").map(|field| &field.value);
        lists.any(|list| {
            list.split(|byte| *byte == b',').any(|item| item.trim_ascii().eq_ignore_ascii_case(name.as_bytes()))
        })
    };
    for Field { name, value } in &fields {
        // What says how long the body is stays, whoever names it: without it the body would be read as a request.
        let is_framing = matches!(name.as_str(), "content-length" | "transfer-encoding");
        if is_ours(name) || (is_named(name) && !is_framing) {
            continue;
        }
        head.extend_from_slice(name.as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value);
        head.extend_from_slice(b"\r\n");
    }
}

/// Fields for one connection only.
fn is_ours(name: &str) -> bool {
    matches!(name, "connection" | "keep-alive" | "te" | "upgrade" | "http2-settings") || name.starts_with("proxy-")
}

/// The head of an answer, as it is given to the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The bytes.
    pub head: Vec<u8>,
    /// Another head follows (`100 Continue`).
    pub is_interim: bool,
    /// It is the answer of a proxy that wants credentials.
    pub wants_credentials: bool,
}

impl Reply {
    /// Rewrites a whole head, as [`HeadScan`] found it.
    pub fn parse(head: &[u8]) -> Result<Reply, Wrong> {
        let (line, fields) = lines_of(head)?;
        let (status, minor) = status_line(line)?;
        if status == 101 {
            return Err("it switched the protocol, which nobody asked for".into());
        }
        let is_interim = (100..200).contains(&status);
        let mut head = [line, b"\r\n"].concat();
        end_to_end(fields.iter().collect(), &mut head);
        head.extend_from_slice(format!("via: 1.{minor} {NAME}\r\n").as_bytes());
        head.extend_from_slice(if is_interim { b"\r\n" } else { b"connection: close\r\n\r\n" });
        Ok(Reply { head, is_interim, wants_credentials: status == 407 })
    }
}

/// The status and the minor version of `HTTP/1.1 200 OK`.
fn status_line(line: &[u8]) -> Result<(u16, u8), Wrong> {
    let fault = || "it did not answer in HTTP/1".to_owned();
    let (version, rest) = line.split_at_checked(9).ok_or_else(fault)?;
    let minor = match version {
        b"HTTP/1.1 " => 1,
        b"HTTP/1.0 " => 0,
        _ => return Err(fault()),
    };
    let (status, reason) = rest.split_at_checked(3).ok_or_else(fault)?;
    let status = whole_number(status).and_then(|status| u16::try_from(status).ok()).filter(|status| *status >= 100);
    if !(reason.is_empty() || reason.starts_with(b" ")) || reason.iter().any(|b| b.is_ascii_control() && *b != b'\t') {
        return Err(fault());
    }
    Ok((status.ok_or_else(fault)?, minor))
}

/// The answer of a proxy to a CONNECT of ours: the status, and its line in few words.
pub fn connect_answer(head: &[u8]) -> Result<(u16, String), Wrong> {
    let (line, _) = lines_of(head)?;
    let (status, _) = status_line(line)?;
    let words: String = String::from_utf8_lossy(&line[9..]).chars().take(80).flat_map(char::escape_default).collect();
    Ok((status, words))
}

/// Where a body ends. It is told the bytes as they come, however they are cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Body {
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// So many bytes are left, and then it ends.
    Plain(u64),
    /// In the line that says how long a chunk is: digits so far, their value.
    Size(u8, u64),
    /// After the CR of that line.
    SizeEnd(u64),
    /// Within a chunk.
    Chunk(u64),
    /// After a chunk; after its CR.
    ChunkEnd,
    ChunkEndLf,
    /// At the beginning of a line behind the last chunk, with the bytes of those lines so far; within one; after a CR.
    Trailer(usize),
    TrailerLine(usize),
    TrailerLf(usize),
    /// After the CR of the last line.
    Last,
    Ended,
}

impl Body {
    /// At its beginning.
    pub fn new(framing: Framing) -> Body {
        let state = match framing {
            Framing::Length(0) => State::Ended,
            Framing::Length(length) => State::Plain(length),
            Framing::Chunked => State::Size(0, 0),
        };
        Body { state }
    }

    /// Whether all of it has come.
    pub fn has_ended(&self) -> bool {
        self.state == State::Ended
    }

    /// How many of `bytes` belong to it: all of them, unless it ends within.
    pub fn take(&mut self, bytes: &[u8]) -> Result<usize, Wrong> {
        let mut taken = 0;
        while taken < bytes.len() && !self.has_ended() {
            let left = (bytes.len() - taken) as u64;
            taken += match self.state {
                State::Plain(length) => {
                    let count = length.min(left);
                    self.state = if count == length { State::Ended } else { State::Plain(length - count) };
                    count as usize
                }
                State::Chunk(length) => {
                    let count = length.min(left);
                    self.state = if count == length { State::ChunkEnd } else { State::Chunk(length - count) };
                    count as usize
                }
                _ => {
                    self.state = self.next(bytes[taken])?;
                    1
                }
            };
        }
        Ok(taken)
    }

    /// The state after one byte between chunks.
    fn next(&self, byte: u8) -> Result<State, Wrong> {
        let digit = char::from(byte).to_digit(16).map(u64::from);
        Ok(match (&self.state, byte) {
            // Fifteen digits cannot overflow, and are more than any disk holds.
            (State::Size(digits, size), _) if digit.is_some() && *digits < 15 => {
                State::Size(digits + 1, size << 4 | digit.unwrap_or_default())
            }
            (State::Size(1.., size), b'\r') => State::SizeEnd(*size),
            (State::Size(..), _) => return Err("a chunk without a plain length".into()),
            (State::SizeEnd(0), b'\n') => State::Trailer(0),
            (State::SizeEnd(size), b'\n') => State::Chunk(*size),
            (State::ChunkEnd, b'\r') => State::ChunkEndLf,
            (State::ChunkEndLf, b'\n') => State::Size(0, 0),
            (State::Trailer(_), b'\r') => State::Last,
            (State::TrailerLine(length), b'\r') => State::TrailerLf(*length),
            (State::TrailerLf(length), b'\n') => State::Trailer(*length),
            (State::Trailer(length) | State::TrailerLine(length), b'\t' | b' '..=b'~' | 0x80..)
                if *length < MAX_TRAILERS =>
            {
                State::TrailerLine(length + 1)
            }
            (State::Last, b'\n') => State::Ended,
            _ => return Err("a chunk that does not end where it said, or trailers that cannot be read".into()),
        })
    }
}

/// An answer of our own, with one sentence for whoever reads it.
pub fn own_answer(status: u16, sentence: &str, with_body: bool) -> Vec<u8> {
    let reason = match status {
        400 => "Bad Request",
        403 => "Forbidden",
        408 => "Request Timeout",
        _ => "Bad Gateway",
    };
    let mut answer = format!("HTTP/1.1 {status} {reason}\r\ncontent-type: text/plain; charset=utf-8\r\n");
    // Writing to a string cannot fail.
    let _ = write!(answer, "content-length: {}\r\nvia: 1.1 {NAME}\r\nconnection: close\r\n\r\n", sentence.len() + 1);
    if with_body {
        let _ = writeln!(answer, "{sentence}");
    }
    answer.into_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Request, Wrong> {
        match HeadScan::default().look(text.as_bytes())? {
            Some(end) => Request::parse(&text.as_bytes()[..end]),
            None => Err("no end".into()),
        }
    }

    fn target(host: &str, port: u16) -> Target {
        Target { host: Host::parse(host).unwrap(), port }
    }

    #[test]
    fn a_connect_names_host_and_port() {
        for (line, host, port) in [
            ("CONNECT api.example.com:443 HTTP/1.1", "api.example.com", 443),
            ("CONNECT API.example.com.:443 HTTP/1.1", "api.example.com", 443),
            ("CONNECT 10.0.0.1:22 HTTP/1.0", "10.0.0.1", 22),
            ("CONNECT [::1]:8080 HTTP/1.1", "::1", 8080),
            ("CONNECT [::ffff:127.0.0.1]:80 HTTP/1.1", "::ffff:127.0.0.1", 80),
        ] {
            let got = parse(&format!("{line}\r\nHost: other\r\nProxy-Connection: keep-alive\r\n\r\n")).unwrap();
            assert_eq!(got.asked, Asked::Tunnel(target(host, port)), "{line}");
        }
    }

    #[test]
    fn what_is_no_request_for_a_proxy_is_told() {
        for (head, part) in [
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", "this is a forward proxy"),
            ("GET https://a.example/ HTTP/1.1\r\n\r\n", "by CONNECT"),
            ("GET ftp://a.example/ HTTP/1.1\r\n\r\n", "not http"),
            ("GET http://u:secret@a.example/ HTTP/1.1\r\n\r\n", "a user name"),
            ("GET http://a.example/#x HTTP/1.1\r\n\r\n", "a fragment"),
            ("GET http:///x HTTP/1.1\r\n\r\n", "no host name"),
            ("GET http://a.example:0/ HTTP/1.1\r\n\r\n", "no host and port"),
            ("GET http://a.example:/ HTTP/1.1\r\n\r\n", "no host and port"),
            ("GET http://a.example:80:80/ HTTP/1.1\r\n\r\n", "no host and port"),
            ("GET http://0x7f.1/ HTTP/1.1\r\n\r\n", "in a spelling"),
            ("GET http://2130706433/ HTTP/1.1\r\n\r\n", "in a spelling"),
            ("GET http://%31%32%37.0.0.1/ HTTP/1.1\r\n\r\n", "in a spelling"),
            ("GET http://a%2eexample/ HTTP/1.1\r\n\r\n", "no host name"),
            ("GET http://[::1%25lo]/ HTTP/1.1\r\n\r\n", "has a zone"),
            ("GET http://[127.0.0.1]/ HTTP/1.1\r\n\r\n", "no host and port"),
            ("GET http://::1/ HTTP/1.1\r\n\r\n", "no host name"),
            ("CONNECT a.example HTTP/1.1\r\n\r\n", "no host and port"),
            ("CONNECT a.example:443/ HTTP/1.1\r\n\r\n", "no host and port"),
            ("CONNECT http://a.example:443 HTTP/1.1\r\n\r\n", "no host and port"),
            ("CONNECT a.example:+443 HTTP/1.1\r\n\r\n", "no host and port"),
            ("CONNECT a.example:000443 HTTP/1.1\r\n\r\n", "no host and port"),
            ("CONNECT a.example:65536 HTTP/1.1\r\n\r\n", "no host and port"),
            ("CONNECT x@a.example:443 HTTP/1.1\r\n\r\n", "a user name"),
            ("CONNECT a.example:443 HTTP/1.1\r\nContent-Length: 5\r\n\r\n", "with a body"),
            ("CONNECT a.example:443 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", "with a body"),
            ("CONNECT a.example:443 HTTP/2.0\r\n\r\n", "no HTTP request"),
            ("CONNECT  a.example:443 HTTP/1.1\r\n\r\n", "no HTTP request"),
            ("CONNECT a.example:443 HTTP/1.1 \r\n\r\n", "no HTTP request"),
            ("CONNECT\ta.example:443 HTTP/1.1\r\n\r\n", "belong in none"),
            ("GET http://a.example/ü HTTP/1.1\r\n\r\n", "belong in none"),
            ("G(T http://a.example/ HTTP/1.1\r\n\r\n", "no HTTP request"),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "no HTTP request"),
            ("\r\n\r\n", "no HTTP request"),
        ] {
            let wrong = parse(head).unwrap_err();
            assert!(wrong.contains(part) && !wrong.contains("secret"), "{head:?}: {wrong}");
        }
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        for (fields, part) in [
            ("Content-Length: 5\r\nContent-Length: 5\r\n", "two content-length"),
            ("Content-Length: 5, 5\r\n", "no number"),
            ("Content-Length: +5\r\n", "no number"),
            ("Content-Length: -1\r\n", "no number"),
            ("Content-Length: 0x5\r\n", "no number"),
            ("Content-Length:\r\n", "no number"),
            ("Content-Length: 18446744073709551616\r\n", "no number"),
            ("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", "both"),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", "two transfer-encoding"),
            ("Transfer-Encoding: gzip, chunked\r\n", "other than chunked"),
            ("Transfer-Encoding: xchunked\r\n", "other than chunked"),
            ("Transfer-Encoding: chunked\x0b\r\n", "control character"),
            ("Transfer-Encoding:\r\n chunked\r\n", "folded"),
            ("X: a\r\n\tb\r\n", "folded"),
            ("Transfer-Encoding : chunked\r\n", "no token"),
            ("X: a\nTransfer-Encoding: chunked\r\n", "LF alone"),
            ("X: a\rTransfer-Encoding: chunked\r\n", "a CR alone"),
            ("X: a\0b\r\n", "zero byte"),
            ("X\r\n", "without a colon"),
            (": x\r\n", "no token"),
        ] {
            let wrong = parse(&format!("POST http://a.example/ HTTP/1.1\r\n{fields}\r\n")).unwrap_err();
            assert!(wrong.contains(part), "{fields:?}: {wrong}");
        }
        let old = parse("POST http://a.example/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap_err();
        assert!(old.contains("HTTP/1.0"), "{old}");
        assert!(parse("GET http://a.example/ HTTP/1.1\n\n").unwrap_err().contains("LF alone"));
    }

    #[test]
    fn a_head_has_limits() {
        let many = "X: y\r\n".repeat(MAX_FIELDS + 1);
        assert!(parse(&format!("GET http://a.example/ HTTP/1.1\r\n{many}\r\n")).unwrap_err().contains("over 200"));
        let long = "x".repeat(MAX_HEAD);
        assert!(parse(&format!("GET http://a.example/{long} HTTP/1.1\r\n\r\n")).unwrap_err().contains("64 KiB"));
    }

    fn forwarded(head: &str) -> String {
        String::from_utf8(parse(head).unwrap().forwarded()).unwrap()
    }

    #[test]
    fn a_request_is_sent_on_without_what_was_meant_for_us() {
        let head = "POST http://API.example.com:8080/a?b=c HTTP/1.1\r\nHost: other.example\r\nUser-Agent: x\r\n\
                    Proxy-Authorization: Basic c2VjcmV0\r\nProxy-Connection: keep-alive\r\nKeep-Alive: 5\r\nTE: trailers\r\n\
                    Connection: keep-alive, X-Secret, content-length\r\nX-Secret: y\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\n";
        assert_eq!(
            forwarded(head),
            "POST /a?b=c HTTP/1.1\r\nhost: api.example.com:8080\r\nuser-agent: x\r\ncontent-length: 3\r\n\
             via: 1.1 sidewarden\r\nconnection: close\r\n\r\n"
        );
        for (line, first, host) in [
            ("GET http://a.example HTTP/1.1", "GET / HTTP/1.1", "a.example"),
            ("GET http://a.example?x HTTP/1.0", "GET /?x HTTP/1.0", "a.example"),
            ("GET HTTP://a.example:80/%7e HTTP/1.1", "GET /%7e HTTP/1.1", "a.example"),
            ("OPTIONS http://a.example HTTP/1.1", "OPTIONS * HTTP/1.1", "a.example"),
            ("GET http://[2606:4700::1]/ HTTP/1.1", "GET / HTTP/1.1", "[2606:4700::1]"),
            ("GET http://[2606:4700::1]:81/ HTTP/1.1", "GET / HTTP/1.1", "[2606:4700::1]:81"),
            ("GET http://1.1.1.1/ HTTP/1.1", "GET / HTTP/1.1", "1.1.1.1"),
        ] {
            let sent = forwarded(&format!("{line}\r\n\r\n"));
            assert!(sent.starts_with(&format!("{first}\r\nhost: {host}\r\n")), "{line}: {sent}");
        }
    }

    #[test]
    fn another_proxy_is_asked_with_the_whole_address_and_our_own_credentials() {
        let sent = |line: &str| {
            let request = parse(&format!("{line}\r\nProxy-Authorization: Basic dGhlaXJz\r\n\r\n")).unwrap();
            String::from_utf8(request.forwarded_to_proxy(Some(&Secret::new("Basic b3Vycw==")))).unwrap()
        };
        for (line, first) in [
            ("GET http://A.example/x?y HTTP/1.1", "GET http://a.example/x?y HTTP/1.1\r\nhost: a.example\r\n"),
            ("GET http://a.example:81 HTTP/1.1", "GET http://a.example:81/ HTTP/1.1\r\nhost: a.example:81\r\n"),
            ("OPTIONS http://a.example HTTP/1.1", "OPTIONS http://a.example HTTP/1.1\r\nhost: a.example\r\n"),
        ] {
            let got = sent(line);
            assert!(got.starts_with(&format!("{first}proxy-authorization: Basic b3Vycw==\r\n")), "{got}");
            assert!(!got.contains("dGhlaXJz"), "{got}");
        }
    }

    #[test]
    fn what_was_redirected_goes_to_the_host_it_names() {
        let parse = |text: &str| Request::parse_redirected(text.as_bytes(), 80);
        let got = parse("GET /x HTTP/1.1\r\nHost: A.example\r\n\r\n").unwrap();
        assert_eq!(got.asked, Asked::Forward(target("a.example", 80)));
        assert!(got.forwarded().starts_with(b"GET /x HTTP/1.1\r\nhost: a.example\r\n"));
        for (head, part) in [
            ("GET /x HTTP/1.1\r\n\r\n", "no Host"),
            ("GET /x HTTP/1.1\r\nHost: a.example\r\nHost: b.example\r\n\r\n", "two host"),
            ("GET /x HTTP/1.1\r\nHost: a.example:81\r\n\r\n", "port 81"),
            ("GET /x HTTP/1.1\r\nHost: a b\r\n\r\n", "no host name"),
            ("GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", "where a path belongs"),
            ("CONNECT a.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\n", "where a path belongs"),
        ] {
            let wrong = parse(head).unwrap_err();
            assert!(wrong.contains(part), "{head:?}: {wrong}");
        }
    }

    #[test]
    fn an_answer_is_handed_on_as_the_only_one() {
        let head = "HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Hop\r\nKeep-Alive: timeout=5\r\nX-Hop: 1\r\n\
                    Proxy-Authenticate: Basic\r\nSet-Cookie: a=b\r\nSet-Cookie: c=d\r\nTransfer-Encoding: chunked\r\n\r\n";
        let got = Reply::parse(head.as_bytes()).unwrap();
        assert_eq!(
            String::from_utf8(got.head).unwrap(),
            "HTTP/1.1 200 OK\r\nset-cookie: a=b\r\nset-cookie: c=d\r\ntransfer-encoding: chunked\r\n\
             via: 1.1 sidewarden\r\nconnection: close\r\n\r\n"
        );
        let interim = Reply::parse(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
        assert_eq!(
            (interim.is_interim, &interim.head[..]),
            (true, &b"HTTP/1.1 100 Continue\r\nvia: 1.1 sidewarden\r\n\r\n"[..])
        );
        for wrong in [
            "HTTP/1.1 101 Switching Protocols\r\n\r\n",
            "HTTP/2 200 OK\r\n\r\n",
            "HTTP/1.1 20 OK\r\n\r\n",
            "HTTP/1.1 2000 OK\r\n\r\n",
            "HTTP/1.1 099 OK\r\n\r\n",
            "HTTP/1.1 200\x0bOK\r\n\r\n",
            "SSH-2.0-x\r\n\r\n",
            "\r\n\r\n",
        ] {
            assert!(Reply::parse(wrong.as_bytes()).is_err(), "{wrong:?}");
        }
        assert_eq!(connect_answer(b"HTTP/1.1 407 Proxy \x1b Required\r\n\r\n").ok(), None);
        let (status, words) = connect_answer(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n").unwrap();
        assert_eq!((status, words.as_str()), (407, "407 Proxy Authentication Required"));
    }

    /// How much of `bytes` is body, however they are cut; `None` while it has no end.
    fn body(framing: Framing, bytes: &[u8]) -> Result<Option<usize>, Wrong> {
        let mut results = (1..=bytes.len().max(1)).map(|size| {
            let (mut body, mut taken) = (Body::new(framing), 0);
            for piece in bytes.chunks(size) {
                taken += body.take(piece)?;
            }
            Ok(body.has_ended().then_some(taken))
        });
        let first: Result<Option<usize>, Wrong> = results.next().unwrap();
        for other in results {
            assert_eq!(other, first, "it depends on the cut: {bytes:?}");
        }
        first
    }

    #[test]
    fn a_body_ends_where_it_says() {
        assert_eq!(body(Framing::Length(0), b"GET"), Ok(Some(0)));
        assert_eq!(body(Framing::Length(3), b"abcGET"), Ok(Some(3)));
        assert_eq!(body(Framing::Length(3), b"ab"), Ok(None));
        for (chunks, expected) in [
            ("0\r\n\r\n", Some(5)),
            ("3\r\nabc\r\n0\r\n\r\nGET", Some(13)),
            ("00a\r\n0123456789\r\n0\r\n\r\n", Some(22)),
            ("1\r\nx\r\nA\r\n0123456789\r\n0\r\nX: y\r\n\r\nrest", Some(32)),
            ("3\r\nabc\r\n", None),
            ("3\r\nabc\r\n0\r\n", None),
        ] {
            assert_eq!(body(Framing::Chunked, chunks.as_bytes()), Ok(expected), "{chunks:?}");
        }
        for wrong in [
            "\r\n",
            "x\r\n",
            "3;x=y\r\nabc\r\n",
            "3 \r\nabc\r\n",
            " 3\r\nabc\r\n",
            "3\nabc\r\n",
            "3\r\nabcd\r\n",
            "-1\r\n",
            "0x3\r\nabc\r\n",
            "1000000000000000\r\n",
            "0\r\n\n",
            "0\r\nX: y\n\r\n",
            "0\r\nX\0\r\n\r\n",
            "3\r\nabc\n0\r\n\r\n",
        ] {
            assert!(body(Framing::Chunked, wrong.as_bytes()).is_err(), "{wrong:?}");
        }
        let endless = format!("0\r\n{}", "X: y\r\n".repeat(MAX_TRAILERS));
        assert!(Body::new(Framing::Chunked).take(endless.as_bytes()).is_err());
    }

    #[test]
    fn a_head_is_read_across_any_cut() {
        let head = b"GET http://a.example/ HTTP/1.1\r\nHost: a\r\n\r\nrest";
        for size in 1..head.len() {
            let (mut scan, mut bytes, mut found) = (HeadScan::default(), Vec::new(), None);
            for piece in head.chunks(size) {
                bytes.extend_from_slice(piece);
                found = found.or(scan.look(&bytes).unwrap());
            }
            assert_eq!(found, Some(head.len() - 4), "pieces of {size}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), text in "[A-Za-z0-9:/.@ \\[\\]\r\n]{0,80}") {
            for bytes in [&bytes[..], text.as_bytes()] {
                let head = [b"GET http://", bytes, b"\r\n\r\n"].concat();
                let _ = HeadScan::default().look(&head);
                let _ = (Request::parse(&head), Request::parse_redirected(&head, 80), Reply::parse(bytes), connect_answer(bytes));
                let _ = Body::new(Framing::Chunked).take(bytes);
            }
        }

        #[test]
        fn what_is_sent_on_is_one_head_and_no_more(path in "[!-~]{0,40}", name in "[a-zA-Z-]{1,20}", value in "[ -~\r\n]{0,40}") {
            if let Ok(request) = parse(&format!("GET http://a.example/{path} HTTP/1.1\r\n{name}: {value}\r\n\r\n")) {
                let sent = request.forwarded();
                prop_assert_eq!(HeadScan::default().look(&sent), Ok(Some(sent.len())));
                prop_assert_eq!(sent.windows(7).filter(|w| w.eq_ignore_ascii_case(b"\r\nhost:")).count(), 1);
            }
        }
    }
}
