//! Through another proxy: CONNECT over HTTP, with a name and password if it wants them.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use sidewarden_proto::config::HostPort;
use sidewarden_proto::secret::Secret;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::http::{self, HeadScan};
use crate::policy::egress::Target;
use crate::proxy::handshake::Replayed;

/// Longest file of credentials.
const MAX_CREDENTIALS: u64 = 1 << 10;

/// The proxy that everything goes through.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// Where it is.
    pub to: HostPort,
    /// Holds `user:password`.
    pub credentials_file: Option<PathBuf>,
    /// It gets names as they were asked for, and looks them up itself.
    pub resolves: bool,
}

/// Why there is no way through it.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The file of credentials.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// It does not answer as a proxy does, or breaks off.
    #[error("the upstream proxy {proxy} broke off: {error}")]
    Broken {
        /// Which.
        proxy: HostPort,
        /// How.
        error: io::Error,
    },
    /// It says no.
    #[error("the upstream proxy {proxy} answered `{answer}`{}", hint(.status))]
    Refused {
        /// Which.
        proxy: HostPort,
        /// The status.
        status: u16,
        /// Status and reason.
        answer: String,
    },
}

fn hint(status: &u16) -> &'static str {
    if *status == 407 { ": it wants other credentials" } else { "" }
}

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The file cannot be read.
    #[error("reading {}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// What is in it.
    #[error("{}: it must hold one line, user:password", path.display())]
    Form {
        /// Which.
        path: PathBuf,
    },
}

/// The value of `Proxy-Authorization` from the file at `path`.
pub fn read_credentials(path: &Path) -> Result<Secret, CredentialsError> {
    let fault = |error| CredentialsError::File { path: path.to_owned(), error };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(fault)?;
    file.take(MAX_CREDENTIALS + 1).read_to_string(&mut text).map_err(fault)?;
    let line = text.strip_suffix('\n').unwrap_or(&text);
    let line = line.strip_suffix('\r').unwrap_or(line);
    let is_good = line.split_once(':').is_some_and(|(user, _)| !user.is_empty())
        && !line.contains(char::is_control)
        && text.len() as u64 <= MAX_CREDENTIALS;
    match is_good {
        true => Ok(Secret::new(format!("Basic {}", BASE64_STANDARD.encode(line)))),
        false => Err(CredentialsError::Form { path: path.to_owned() }),
    }
}

impl Upstream {
    /// Its credentials, if it wants any. The file is read each time, so that a new password takes effect by itself.
    pub fn credentials(&self) -> Result<Option<Secret>, UpstreamError> {
        Ok(self.credentials_file.as_deref().map(read_credentials).transpose()?)
    }

    /// Asks the proxy at the other end of `tcp` for `target`.
    pub async fn open(&self, mut tcp: TcpStream, target: &Target) -> Result<Replayed<TcpStream>, UpstreamError> {
        let credentials = self.credentials()?;
        let broken = |error| UpstreamError::Broken { proxy: self.to.clone(), error };
        tcp.write_all(&connect_request(target, credentials.as_ref())).await.map_err(broken)?;
        let (head, rest) = read_head(&mut tcp).await.map_err(broken)?;
        let (status, answer) = http::connect_answer(&head).map_err(|wrong| broken(io::Error::other(wrong)))?;
        match status {
            200..300 => Ok(Replayed::new(rest, tcp)),
            _ => Err(UpstreamError::Refused { proxy: self.to.clone(), status, answer }),
        }
    }
}

fn connect_request(target: &Target, credentials: Option<&Secret>) -> Vec<u8> {
    let authorization = match credentials {
        Some(credentials) => format!("Proxy-Authorization: {}\r\n", credentials.reveal()),
        None => String::new(),
    };
    format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{authorization}\r\n").into_bytes()
}

/// A head, and what came behind it.
async fn read_head(tcp: &mut TcpStream) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let (mut bytes, mut scan) = (Vec::with_capacity(1024), HeadScan::default());
    loop {
        if tcp.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(end) = scan.look(&bytes).map_err(io::Error::other)? {
            let rest = bytes.split_off(end);
            return Ok((bytes, rest));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::policy::egress::Host;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    fn target() -> Target {
        Target { host: Host::parse("api.example.com").unwrap(), port: 443 }
    }

    #[test]
    fn credentials_are_one_line_and_print_as_dots() {
        for (text, expected) in [
            ("alice:s3cret", Some("Basic YWxpY2U6czNjcmV0")),
            ("alice:s3cret\n", Some("Basic YWxpY2U6czNjcmV0")),
            ("alice:s3cret\r\n", Some("Basic YWxpY2U6czNjcmV0")),
            ("alice:a:b", Some("Basic YWxpY2U6YTpi")),
            ("alice:", Some("Basic YWxpY2U6")),
            ("alice", None),
            (":x", None),
            ("", None),
            ("alice:a\nb:c", None),
            ("alice:a\r\nX: y", None),
            (&format!("alice:{}", "x".repeat(2_000)), None),
        ] {
            let file = file(text);
            match (read_credentials(file.path()), expected) {
                (Ok(got), Some(expected)) => {
                    assert_eq!(got.reveal(), expected);
                    assert!(!format!("{got:?} {got}").contains("YWxp"));
                }
                (Err(error), None) => assert!(error.to_string().contains("user:password"), "{error}"),
                (got, _) => panic!("{text:?}: {got:?}"),
            }
        }
        let error = read_credentials(Path::new("/nowhere/at/all")).unwrap_err().to_string();
        assert!(error.starts_with("reading /nowhere/at/all: "), "{error}");
    }

    /// What comes of asking a proxy that says `answer`, and what it was asked.
    async fn asked(answer: &[u8], credentials_file: Option<PathBuf>) -> (Result<Vec<u8>, UpstreamError>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answer = answer.to_owned();
        let proxy = tokio::spawn(async move {
            let (mut tcp, _) = listener.accept().await.unwrap();
            let (head, _) = read_head(&mut tcp).await.unwrap();
            tcp.write_all(&answer).await.unwrap();
            String::from_utf8(head).unwrap()
        });
        let to = HostPort { host: address.ip().to_string(), port: address.port() };
        let upstream = Upstream { to, credentials_file, resolves: false };
        let opened = upstream.open(TcpStream::connect(address).await.unwrap(), &target()).await;
        let request = proxy.await.unwrap();
        match opened {
            Ok(mut stream) => {
                let mut rest = Vec::new();
                stream.read_to_end(&mut rest).await.unwrap();
                (Ok(rest), request)
            }
            Err(error) => (Err(error), request),
        }
    }

    #[tokio::test]
    async fn what_comes_right_behind_the_yes_belongs_to_the_tunnel() {
        let file = file("alice:s3cret\n");
        let (rest, request) =
            asked(b"HTTP/1.0 200 Connection established\r\nX: y\r\n\r\nhello", Some(file.path().into())).await;
        assert_eq!(rest.unwrap(), b"hello");
        assert_eq!(
            request,
            "CONNECT api.example.com:443 HTTP/1.1\r\nHost: api.example.com:443\r\n\
             Proxy-Authorization: Basic YWxpY2U6czNjcmV0\r\n\r\n"
        );
        assert!(!asked(b"HTTP/1.1 200 \r\n\r\n", None).await.1.contains("Proxy-Authorization"));
    }

    #[tokio::test]
    async fn a_no_is_told_in_the_proxys_words_and_never_with_the_password() {
        let file = file("alice:s3cret\n");
        let endless = [&b"HTTP/1.1 200 OK\r\nX: "[..], &vec![b'x'; 70 << 10]].concat();
        for (answer, part) in [
            (
                &b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"[..],
                "407 Proxy Authentication Required`: it wants other credentials",
            ),
            (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno", "answered `403 Forbidden`"),
            (b"HTTP/1.1 100 Continue\r\n\r\n", "answered `100 Continue`"),
            (b"SSH-2.0-OpenSSH\r\n\r\n", "did not answer in HTTP/1"),
            (b"HTTP/1.1 200 OK\n\n", "LF alone"),
            (b"HTTP/1.1 200 O", "unexpected end of file"),
            (b"", "unexpected end of file"),
            (&endless, "over 64 KiB"),
        ] {
            let error = asked(answer, Some(file.path().into())).await.0.unwrap_err().to_string();
            assert!(error.contains(part) && !error.contains("s3cret") && !error.contains("YWxp"), "{error}");
        }
    }
}
