//! An identity that a SPIFFE Workload API hands out (SPIRE's agent, and others): asked over its Unix socket, and then
//! listened to, because each rotation of key or roots comes as a new answer on the same stream.
//!
//! Here are the socket, HTTP/2 and the waits; what an answer means is `answer`'s. The key never touches a disk.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::client::SendRequest;
use http::{HeaderMap, Request};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::answer::{Answer, AnswerFault, FETCH_X509_SVID, Frames, REQUEST, SECURITY_HEADER};
use crate::backoff::{Backoff, Random, part_of};
use crate::config::FromValue;

/// Where SPIFFE says that workloads find the socket.
pub const ENVIRONMENT: &str = "SPIFFE_ENDPOINT_SOCKET";
/// To connect and to agree on HTTP/2.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// From the question to the first answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// A stream is asked for anew after this, or up to twice that: one that has silently died is noticed well within the life
/// of any certificate.
const STREAM_LIFE: Duration = Duration::from_secs(300);
/// The longest wait between two tries.
const MOST_BACKOFF: Duration = Duration::from_secs(30);
/// Most bytes on their way; an answer is taken from the stream as it comes.
const WINDOW: u32 = 1 << 20;
/// Most bytes of all headers.
const MAX_HEADERS: u32 = 16 << 10;
/// What is shown of a server's own words.
const MAX_WORDS: usize = 200;

/// A Unix socket, written `unix:///run/spire/agent.sock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(PathBuf);

impl Endpoint {
    /// The socket.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Endpoint, String> {
        let path = text.strip_prefix("unix://").or_else(|| text.strip_prefix("unix:")).unwrap_or_default();
        // The kernel's field has 108 bytes, the last one zero.
        if !path.starts_with('/') || path.len() > 107 || path.contains(['\0', '?', '#']) {
            return Err(format!(
                "must be unix:// and an absolute path, like unix:///run/spire/agent.sock, not `{text}`"
            ));
        }
        Ok(Endpoint(path.into()))
    }
}

impl FromValue for Endpoint {
    fn from_text(text: &str) -> Result<Endpoint, String> {
        text.parse()
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadApiError {
    /// Nobody is at the socket.
    #[error("the Workload API at {}: {error}", path.display())]
    Connect {
        /// Where.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
    /// It is no HTTP/2, or broke.
    #[error("the Workload API's connection: {0}")]
    Http(#[from] h2::Error),
    /// Not the API that was expected.
    #[error("the Workload API answers with HTTP status {0}")]
    Status(u16),
    /// It says no.
    #[error("the Workload API says {word}: {text}")]
    Refused {
        /// The word for its status.
        word: &'static str,
        /// Its own words, cut.
        text: String,
    },
    /// The answer cannot be used.
    #[error("the Workload API's answer was not taken: {0}")]
    Answer(#[from] AnswerFault),
    /// It ended the stream.
    #[error("the Workload API ended its stream")]
    Ended,
    /// It does not answer.
    #[error("the Workload API did not answer within {0:?}")]
    Late(Duration),
}

/// Asks, listens and asks again, for ever; tells each answer and why there is none.
pub async fn follow(endpoint: &Endpoint, told: mpsc::Sender<Result<Answer, WorkloadApiError>>, random: Random) {
    let mut backoff = Backoff::new(Duration::from_secs(1), MOST_BACKOFF, random);
    loop {
        let (begun, life) = (Instant::now(), STREAM_LIFE + part_of(STREAM_LIFE, random));
        let Err(error) = listen(endpoint, begun + life, &told).await else { continue };
        if told.send(Err(error)).await.is_err() {
            return;
        }
        if begun.elapsed() > MOST_BACKOFF {
            backoff.reset();
        }
        sleep(backoff.after_failure()).await;
    }
}

/// One stream, until `end`.
async fn listen(
    endpoint: &Endpoint,
    end: Instant,
    told: &mpsc::Sender<Result<Answer, WorkloadApiError>>,
) -> Result<(), WorkloadApiError> {
    let path = endpoint.path();
    let connecting = async {
        let failed = |error| WorkloadApiError::Connect { path: path.to_owned(), error };
        let socket = UnixStream::connect(path).await.map_err(failed)?;
        let mut http = h2::client::Builder::new();
        http.initial_window_size(WINDOW).initial_connection_window_size(WINDOW).max_header_list_size(MAX_HEADERS);
        Ok::<_, WorkloadApiError>(http.enable_push(false).handshake::<_, Bytes>(socket).await?)
    };
    let late = |within| move |_| WorkloadApiError::Late(within);
    let (requests, connection) = timeout(CONNECT_WITHIN, connecting).await.map_err(late(CONNECT_WITHIN))??;
    // The connection moves the bytes. When it ends, what has come is read to its end all the same.
    let driving = async {
        let _ = connection.await;
        std::future::pending::<()>().await
    };
    tokio::select! {
        result = listen_on(requests, end, told) => result,
        () = driving => Ok(()),
    }
}

async fn listen_on(
    requests: SendRequest<Bytes>,
    end: Instant,
    told: &mpsc::Sender<Result<Answer, WorkloadApiError>>,
) -> Result<(), WorkloadApiError> {
    let late = |_| WorkloadApiError::Late(ANSWER_WITHIN);
    let first_by = Instant::now() + ANSWER_WITHIN;
    let mut body = timeout_at(first_by, ask(requests)).await.map_err(late)??;
    let mut frames = Frames::default();
    let mut taken = timeout_at(first_by, next_answer(&mut body, &mut frames)).await.map_err(late)?;
    loop {
        if told.send(Ok(taken?)).await.is_err() {
            return Ok(());
        }
        taken = match timeout_at(end, next_answer(&mut body, &mut frames)).await {
            Ok(taken) => taken,
            Err(_) => return Ok(()),
        };
    }
}

async fn ask(requests: SendRequest<Bytes>) -> Result<RecvStream, WorkloadApiError> {
    let request = Request::post(format!("http://localhost{FETCH_X509_SVID}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", concat!("sidewarden/", env!("CARGO_PKG_VERSION")))
        .header(SECURITY_HEADER.0, SECURITY_HEADER.1)
        .body(());
    // Of constants alone: it cannot fail, and if it did nobody would have answered.
    let Ok(request) = request else { return Err(WorkloadApiError::Ended) };
    let (response, mut sending) = requests.ready().await?.send_request(request, false)?;
    sending.send_data(Bytes::from_static(&REQUEST), true)?;
    let response = response.await?;
    if response.status() != http::StatusCode::OK {
        return Err(WorkloadApiError::Status(response.status().as_u16()));
    }
    match status_of(response.headers()) {
        Some(refused) => Err(refused),
        None => Ok(response.into_body()),
    }
}

/// The next whole message of the stream.
async fn next_answer(body: &mut RecvStream, frames: &mut Frames) -> Result<Answer, WorkloadApiError> {
    loop {
        if let Some(message) = frames.next_message()? {
            return Ok(Answer::from_bytes(&message)?);
        }
        match body.data().await {
            Some(data) => {
                let data = data?;
                frames.push(&data);
                body.flow_control().release_capacity(data.len())?;
            }
            None => {
                let trailers = body.trailers().await?.unwrap_or_default();
                return Err(status_of(&trailers).unwrap_or(WorkloadApiError::Ended));
            }
        }
    }
}

/// What the status in headers or trailers says, if it is not that all is well.
fn status_of(headers: &HeaderMap) -> Option<WorkloadApiError> {
    let code = headers.get("grpc-status")?.to_str().ok()?.trim();
    let word = match code {
        "0" => return None,
        "1" => "cancelled",
        "4" => "deadline exceeded",
        "7" => "permission denied",
        "8" => "resource exhausted",
        "12" => "unimplemented",
        "13" => "internal error",
        "14" => "unavailable",
        "16" => "unauthenticated",
        _ => "no, for a reason of its own",
    };
    let text = headers.get("grpc-message").map(|text| String::from_utf8_lossy(text.as_bytes()).replace("%20", " "));
    let text = text.filter(|text| !text.is_empty()).unwrap_or_else(|| "it gives no reason".into());
    let text = text.chars().filter(|c| !c.is_control()).take(MAX_WORDS).collect();
    Some(WorkloadApiError::Refused { word, text })
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn somebody_else_at_the_socket_gets_no_further_than_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let preface = b"\0\0\0\x04\0\0\0\0\0".to_vec();
        let huge = [&preface[..], &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]].concat();
        let all = [b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), vec![], preface, huge];
        for (i, said) in all.into_iter().enumerate() {
            let socket = dir.path().join(format!("{i}.sock"));
            let listener = UnixListener::bind(&socket).unwrap();
            let serving = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.write_all(&said).await;
            });
            let endpoint: Endpoint = format!("unix:{}", socket.display()).parse().unwrap();
            let (tell, mut told) = mpsc::channel(1);
            let following = tokio::spawn(async move { follow(&endpoint, tell, |bytes| bytes.fill(0)).await });
            let first = timeout(Duration::from_secs(60), told.recv()).await.unwrap().unwrap();
            assert!(first.is_err(), "{i}: {first:?}");
            following.abort();
            serving.await.unwrap();
        }
    }

    #[test]
    fn an_endpoint_is_a_unix_socket() {
        let path = |text: &str| text.parse::<Endpoint>().map(|endpoint| endpoint.path().display().to_string());
        assert_eq!(path("unix:///run/spire/agent.sock").as_deref(), Ok("/run/spire/agent.sock"));
        assert_eq!(path("unix:/run/spire/agent.sock").as_deref(), Ok("/run/spire/agent.sock"));
        let long = format!("unix:///{}", "x".repeat(120));
        for wrong in ["tcp://127.0.0.1:8000", "/run/agent.sock", "unix://agent.sock", "unix:///a?b", "", long.as_str()]
        {
            assert!(path(wrong).unwrap_err().contains("unix:///run/spire/agent.sock"), "{wrong}");
        }
    }
}
