//! One request to the collector for a certificate, over TLS/TCP, where only the collector shows one.
//!
//! The collector is known by the hash of its root's public key: from the token at first, from our own roots later.

use std::io;
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::ServerName;
use sidewarden_proto::config::HostPort;
use sidewarden_proto::enrol::{self, Answer, Der, Issued, Refused, Request};
use sidewarden_proto::identity::Sha256;
use sidewarden_proto::tls;
use sidewarden_proto::wire::ALPN_ENROL;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::dial::{DialError, Resolver, handshake_fault};

/// To reach one collector.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// For the handshake, and again for the answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// No collector is named.
    #[error("no collector is configured: set collector.addresses")]
    NoCollector,
    /// The collector cannot be reached.
    #[error("the collector cannot be reached: {0}")]
    Dial(#[from] DialError),
    /// The connection broke.
    #[error("enrolling at {address}: {}", handshake_fault(error).1)]
    Connection {
        /// With whom.
        address: String,
        /// What happened.
        error: io::Error,
    },
    /// It said no.
    #[error("the collector refused: {}", refusal_text(.0))]
    Refused(Refused),
    /// The answer makes no sense.
    #[error("the collector's answer cannot be used: {0}")]
    Answer(String),
}

impl EnrolError {
    /// Whether the same request may succeed later.
    pub fn may_pass(&self) -> bool {
        match self {
            EnrolError::Refused(refused) => refused.retry,
            _ => true,
        }
    }
}

fn refusal_text(refused: &Refused) -> String {
    let new_one = "make a new one with `sidewarden-collector token create --workload <namespace>/<service>`";
    let text = match refused.reason.as_str() {
        "token_unknown" => format!("the token is unknown to it; {new_one}"),
        "token_used_up" => format!("the token is used up; {new_one}"),
        "token_expired" => format!("the token has expired; {new_one}"),
        "token_other_workload" => format!("the token is for another workload; {new_one}"),
        "revoked" => "this agent's key is on the deny list; enrol again with a new token once that is settled".into(),
        "grace_over" => format!("the certificate ended too long ago to be renewed; enrol again: {new_one}"),
        other => other.replace('_', " "),
    };
    if refused.detail.is_empty() { text } else { format!("{text} ({})", refused.detail) }
}

/// A new key of ours: ECDSA P-256. It never leaves the agent.
pub fn new_key() -> Result<KeyPair, EnrolError> {
    KeyPair::generate().map_err(|e| EnrolError::Answer(format!("no key can be made: {e}")))
}

/// A certificate request for `key`. It says nothing but the key: the collector decides the name.
pub fn certificate_request(key: &KeyPair) -> Result<Der, EnrolError> {
    let request = CertificateParams::default().serialize_request(key);
    let request = request.map_err(|e| EnrolError::Answer(format!("no request can be made: {e}")))?;
    Ok(Der(request.der().to_vec()))
}

/// Asks each of `collectors` in turn until one answers; a token is known to the one that made it alone. Each of `pins` is tried, for a root may be on its way out.
pub async fn ask(
    resolver: &Resolver,
    collectors: &[HostPort],
    pins: &[Sha256],
    request: &Request,
) -> Result<Issued, EnrolError> {
    let mut last = EnrolError::NoCollector;
    for address in collectors {
        for pin in pins {
            match ask_one(resolver, address, *pin, request).await {
                Err(error) if error.may_pass() || error.is_unknown_token() => last = last.or(error),
                settled => return settled,
            }
        }
    }
    Err(last)
}

impl EnrolError {
    fn is_unknown_token(&self) -> bool {
        matches!(self, EnrolError::Refused(refused) if refused.reason == "token_unknown")
    }

    /// Of two, the one that may pass: whoever could not be asked may yet know the token.
    fn or(self, next: EnrolError) -> EnrolError {
        if !matches!(self, EnrolError::NoCollector) && self.may_pass() && !next.may_pass() { self } else { next }
    }
}

async fn ask_one(
    resolver: &Resolver,
    address: &HostPort,
    pin: Sha256,
    request: &Request,
) -> Result<Issued, EnrolError> {
    let tcp = resolver.connect(address, CONNECT_WITHIN).await?;
    let broken = |error: io::Error| EnrolError::Connection { address: address.to_string(), error };
    let mut stream = within(handshake(tcp, pin)).await.map_err(broken)?;
    let payload = within(exchange(&mut stream, &enrol::to_message(request))).await.map_err(broken)?;
    match enrol::from_payload(&payload).map_err(|e| EnrolError::Answer(e.to_string()))? {
        Answer::Issued(issued) => Ok(issued),
        Answer::Refused(refused) => Err(EnrolError::Refused(refused)),
    }
}

async fn within<T>(step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(ANSWER_WITHIN, step).await.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)))
}

async fn handshake(tcp: TcpStream, pin: Sha256) -> io::Result<TlsStream<TcpStream>> {
    let config = tls::pinned_client_config(pin, &[ALPN_ENROL]).map_err(io::Error::other)?;
    // The name is not sent for anything: who answers is proven by the pin.
    let name = ServerName::from(tcp.peer_addr()?.ip());
    TlsConnector::from(config).connect(name, tcp).await
}

async fn exchange(stream: &mut TlsStream<TcpStream>, message: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(message).await?;
    stream.flush().await?;
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await?;
    let length = enrol::message_length(prefix).map_err(io::Error::other)?;
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload).await?;
    Ok(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_says_what_to_do() {
        for reason in ["token_unknown", "token_used_up", "token_expired", "token_other_workload", "grace_over"] {
            let refused = Refused { reason: reason.into(), detail: String::new(), retry: false };
            let error = EnrolError::Refused(refused);
            assert!(error.to_string().contains("token create --workload"), "{error}");
            assert!(!error.may_pass());
        }
        let later = EnrolError::Refused(Refused { reason: "internal".into(), detail: "disk full".into(), retry: true });
        assert_eq!(later.to_string(), "the collector refused: internal (disk full)");
        assert!(later.may_pass());
    }
}
