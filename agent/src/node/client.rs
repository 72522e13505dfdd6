//! Asks the container engine over its Unix socket: a handful of GET requests and the stream of events.
//!
//! hyper rather than a client library: what is needed is small, and every wait, every size and every version is ours to
//! bound. The engine is trusted to tell the truth, not to answer at all, in time, or briefly.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// For one whole answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// For the beginning of an archive, which some engines put together first.
const PREPARED_WITHIN: Duration = Duration::from_secs(300);
/// The largest answer: `/containers/json` of thousands of containers is smaller.
const MAX_ANSWER: usize = 16 << 20;
/// The longest event.
const MAX_EVENT: usize = 1 << 20;
/// The newest version of the API that this program was written for.
const NEWEST: ApiVersion = ApiVersion(1, 47);

/// Why the engine did not tell.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Nobody is there.
    #[error("connecting to {0}: {1}")]
    Connect(PathBuf, std::io::Error),
    /// It hung up, or spoke no HTTP.
    #[error("the engine's answer to {0} broke off: {1}")]
    Broken(String, String),
    /// It took too long.
    #[error("the engine did not answer {0} within {seconds} s", seconds = ANSWER_WITHIN.as_secs())]
    Slow(String),
    /// It answered with something else.
    #[error("the engine answered {0} with status {1}")]
    Status(String, u16),
    /// It answered something that cannot be read.
    #[error("the engine's answer to {0} cannot be read: {1}")]
    Unreadable(String, String),
}

impl EngineError {
    /// Whether the engine is there, and only this answer is of no use.
    pub fn is_about_one_answer(&self) -> bool {
        matches!(self, EngineError::Status(..) | EngineError::Unreadable(..))
    }

    /// Whether what was asked for does not exist.
    pub fn is_missing(&self) -> bool {
        matches!(self, EngineError::Status(_, 404))
    }
}

/// A version of the API, like 1.41.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct ApiVersion(u16, u16);

impl std::str::FromStr for ApiVersion {
    type Err = ();

    fn from_str(text: &str) -> Result<ApiVersion, ()> {
        let (major, minor) = text.split_once('.').ok_or(())?;
        Ok(ApiVersion(major.parse().map_err(|_| ())?, minor.parse().map_err(|_| ())?))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Versions {
    #[serde(default)]
    version: String,
    api_version: String,
    #[serde(default, rename = "MinAPIVersion")]
    min_api_version: String,
}

/// The version to speak: the newest that both know, or the engine's oldest where it no longer knows ours.
fn agreed(versions: &Versions) -> Option<ApiVersion> {
    let newest: ApiVersion = versions.api_version.parse().ok()?;
    let oldest = versions.min_api_version.parse().unwrap_or(ApiVersion(1, 0));
    Some(newest.min(NEWEST).max(oldest))
}

/// An engine that has told its version.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    prefix: String,
    /// The engine's own version.
    pub version: String,
}

impl Client {
    /// Asks the engine behind `socket` for its version.
    pub async fn connect(socket: &Path) -> Result<Client, EngineError> {
        let unversioned = Client { socket: socket.into(), prefix: String::new(), version: String::new() };
        let versions: Versions = unversioned.get("/version").await?;
        let unreadable = || EngineError::Unreadable("/version".into(), "it names no version of the API".into());
        let ApiVersion(major, minor) = agreed(&versions).ok_or_else(unreadable)?;
        let version = crate::watch::plain(&versions.version);
        Ok(Client { prefix: format!("/v{major}.{minor}"), version, ..unversioned })
    }

    /// The answer to `GET path`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, EngineError> {
        let slow = |_| EngineError::Slow(path.into());
        let bytes = timeout(ANSWER_WITHIN, self.bytes(path)).await.map_err(slow)??;
        serde_json::from_slice(&bytes).map_err(|e| EngineError::Unreadable(path.into(), e.to_string()))
    }

    async fn bytes(&self, path: &str) -> Result<Bytes, EngineError> {
        let (response, _connection) = self.open(path).await?;
        let whole = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        whole.map(|b| b.to_bytes()).map_err(|e| EngineError::Broken(path.into(), e.to_string()))
    }

    /// Sends the request, on a connection of its own: they cost little on a Unix socket, and none is ever stale.
    async fn open(&self, path: &str) -> Result<(Response<Incoming>, Connection), EngineError> {
        let broken = |e: hyper::Error| EngineError::Broken(path.into(), e.to_string());
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|e| EngineError::Connect(self.socket.clone(), e))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let connection = Connection(tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to the engine broke off");
            }
        }));
        let request = Request::get(format!("{}{path}", self.prefix)).header("Host", "docker");
        let request = request.body(Empty::<Bytes>::new());
        let request = request.map_err(|e| EngineError::Unreadable(path.into(), e.to_string()))?;
        let response = sender.send_request(request).await.map_err(broken)?;
        match response.status() {
            StatusCode::OK => Ok((response, connection)),
            status => Err(EngineError::Status(path.into(), status.as_u16())),
        }
    }

    /// A long answer to `GET path`, piece by piece; the channel ends with it.
    pub async fn stream(&self, path: &str, pieces: mpsc::Sender<std::io::Result<Bytes>>) -> Result<(), EngineError> {
        let slow = || EngineError::Slow(path.into());
        let (response, _connection) = timeout(PREPARED_WITHIN, self.open(path)).await.map_err(|_| slow())??;
        let mut body = response.into_body();
        while let Some(frame) = timeout(ANSWER_WITHIN, body.frame()).await.map_err(|_| slow())? {
            let frame = frame.map_err(|error| EngineError::Broken(path.into(), error.to_string()))?;
            let Ok(data) = frame.into_data() else { continue };
            // Who reads has seen enough.
            if pieces.send(Ok(data)).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The engine's events from now on.
    pub async fn events(&self) -> Result<Events, EngineError> {
        // {"type":["container","network","daemon"]}
        const PATH: &str = "/events?filters=%7B%22type%22%3A%5B%22container%22%2C%22network%22%2C%22daemon%22%5D%7D";
        let slow = |_| EngineError::Slow("/events".into());
        let (response, connection) = timeout(ANSWER_WITHIN, self.open(PATH)).await.map_err(slow)??;
        Ok(Events { body: response.into_body(), text: Vec::new(), _connection: connection })
    }
}

/// Drives one connection; ends with it.
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A stream of events.
pub struct Events {
    body: Incoming,
    text: Vec<u8>,
    _connection: Connection,
}

/// What an event is about.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct EngineEvent {
    /// `container`, `network`, …
    #[serde(rename = "Type", default)]
    pub kind: String,
    /// `start`, `die`, `exec_create: sh -c …`, …
    #[serde(rename = "Action", default)]
    pub action: String,
    /// Whom it is about.
    #[serde(rename = "Actor", default)]
    pub actor: Actor,
}

/// See [`EngineEvent`].
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Actor {
    /// The id of the container or network.
    #[serde(rename = "ID", default)]
    pub id: String,
    /// For example `execID`, `container`.
    #[serde(rename = "Attributes", default)]
    pub attributes: std::collections::BTreeMap<String, String>,
}

impl Events {
    /// The next event; an error when the stream is over. May be dropped while it waits.
    pub async fn next(&mut self) -> Result<EngineEvent, EngineError> {
        let broken = |what: &str| EngineError::Broken("/events".into(), what.into());
        loop {
            if let Some(end) = self.text.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.text.drain(..=end).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return serde_json::from_slice(&line)
                    .map_err(|e| EngineError::Unreadable("/events".into(), e.to_string()));
            }
            if self.text.len() > MAX_EVENT {
                return Err(broken("an event has no end"));
            }
            if self.body.is_end_stream() {
                return Err(broken("it is over"));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.text.extend_from_slice(frame.data_ref().map_or(&[], |data| data)),
                Some(Err(error)) => return Err(broken(&error.to_string())),
                None => return Err(broken("it is over")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    use super::*;

    /// An engine that answers everything with `answer`, and then hangs up, or holds on.
    async fn engine(answer: Vec<u8>, hold: bool) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("engine.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let answer = answer.clone();
                tokio::spawn(async move {
                    let _ = stream.read(&mut [0; 4096]).await;
                    let _ = stream.write_all(&answer).await;
                    if hold {
                        std::future::pending::<()>().await;
                    }
                });
            }
        });
        (dir, socket)
    }

    fn http(body: &str) -> Vec<u8> {
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
    }

    async fn connect_to(answer: Vec<u8>) -> Result<Client, EngineError> {
        let (_dir, socket) = engine(answer, false).await;
        Client::connect(&socket).await
    }

    #[tokio::test]
    async fn a_good_engine_is_spoken_to_in_a_version_that_both_know() {
        let rows = [
            (r#"{"Version":"20.10","ApiVersion":"1.41","MinAPIVersion":"1.12"}"#, "/v1.41"),
            (r#"{"Version":"29","ApiVersion":"1.60","MinAPIVersion":"1.44"}"#, "/v1.47"),
            (r#"{"Version":"40","ApiVersion":"2.3","MinAPIVersion":"2.0"}"#, "/v2.0"),
        ];
        for (answer, prefix) in rows {
            assert_eq!(connect_to(http(answer)).await.unwrap().prefix, prefix);
        }
    }

    #[tokio::test]
    async fn an_answer_cut_at_any_byte_or_made_of_garbage_is_an_error() {
        let whole = http(r#"{"Version":"20.10","ApiVersion":"1.41","MinAPIVersion":"1.12"}"#);
        for end in 0..whole.len() {
            assert!(connect_to(whole[..end].to_vec()).await.is_err(), "cut at {end}");
        }
        for garbage in ["", "\0\0\0\0", "SSH-2.0-x\r\n", "HTTP/1.1 500 x\r\nContent-Length: 0\r\n\r\n"] {
            assert!(connect_to(garbage.as_bytes().to_vec()).await.is_err(), "{garbage}");
        }
        for body in ["", "null", "[]", "{}", r#"{"ApiVersion":"x"}"#, r#"{"ApiVersion":"1"}"#] {
            assert!(connect_to(http(body)).await.is_err(), "{body}");
        }
    }

    #[tokio::test]
    async fn a_huge_answer_is_not_taken_in() {
        let head = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n".to_vec();
        let error = connect_to([head, vec![b' '; MAX_ANSWER + 9]].concat()).await.unwrap_err();
        assert!(matches!(error, EngineError::Broken(..)), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_engine_that_never_answers_is_given_up() {
        let (_dir, socket) = engine(Vec::new(), true).await;
        let error = Client::connect(&socket).await.unwrap_err();
        assert!(matches!(error, EngineError::Slow(_)), "{error}");
    }

    #[tokio::test]
    async fn nobody_behind_the_socket_is_told_as_such() {
        let error = Client::connect(Path::new("/nowhere/engine.sock")).await.unwrap_err();
        assert!(error.to_string().starts_with("connecting to /nowhere/engine.sock: "), "{error}");
    }

    async fn events_of(body: &str) -> (tempfile::TempDir, Events) {
        let (dir, socket) = engine(http(body), true).await;
        let client = Client { socket, prefix: String::new(), version: String::new() };
        let events = client.events().await.unwrap();
        (dir, events)
    }

    #[tokio::test]
    async fn events_come_one_by_one_and_the_end_is_an_error() {
        let one = r#"{"Type":"container","Action":"start","Actor":{"ID":"aa","Attributes":{"name":"x"}},"timeNano":1}"#;
        let (_dir, mut events) = events_of(&format!("{one}\n\n{{}}\n")).await;
        let first = events.next().await.unwrap();
        assert_eq!((first.kind.as_str(), first.action.as_str(), first.actor.id.as_str()), ("container", "start", "aa"));
        assert_eq!(events.next().await.unwrap(), EngineEvent::default());
        assert!(events.next().await.is_err());
    }

    #[tokio::test]
    async fn an_event_without_an_end_or_a_sense_is_an_error() {
        for body in ["x".repeat(MAX_EVENT + 9), "nonsense\n".into()] {
            let (_dir, mut events) = events_of(&body).await;
            assert!(events.next().await.is_err());
        }
    }
}
