//! How an agent gets its first certificate: one request with a token, one answer.
//!
//! It goes over TLS where only the collector has a certificate. The agent knows the collector by the hash of its root
//! CA's public key, which stands in the token. The agent's key never leaves it: a certificate request (PKCS#10) does.
//! Each message is its length (4 bytes, big-endian) and JSON.

use std::fmt;
use std::str::FromStr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::directive::Signed;
use crate::identity::{InstanceId, Sha256, SpiffeId};
use crate::secret::Secret;

/// Most bytes of a message.
pub const MAX_MESSAGE: usize = 64 << 10;

/// Bytes in JSON as base64: a certificate or a request, DER.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Der(pub Vec<u8>);

impl fmt::Debug for Der {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Der({} bytes)", self.0.len())
    }
}

impl TryFrom<String> for Der {
    type Error = base64::DecodeError;
    fn try_from(text: String) -> Result<Der, Self::Error> {
        base64::Engine::decode(&base64::prelude::BASE64_STANDARD, text).map(Der)
    }
}

impl From<Der> for String {
    fn from(der: Der) -> String {
        base64::Engine::encode(&base64::prelude::BASE64_STANDARD, der.0)
    }
}

/// What an operator hands to an agent: who may enrol, and which collector is the right one.
///
/// Its text is `sw1.<id>.<secret>.<pin>`: the id in hex, the secret in base64url, the pin in hex.
#[derive(Clone, Debug)]
pub struct Token {
    /// The public half, 16 hexadecimal digits: stands in lists and events.
    pub id: String,
    /// The secret half.
    pub secret: Secret,
    /// SHA-256 of the root CA's public key (SPKI).
    pub pin: Sha256,
}

/// A text that is no token. Says nothing of the text itself: it may be a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this is no enrolment token: it should look like sw1.<id>.<secret>.<pin>; make one with `sidewarden-collector token create`"
)]
pub struct BadToken;

impl Token {
    /// A new token; `fill` provides randomness.
    pub fn new(fill: impl Fn(&mut [u8]), pin: Sha256) -> Token {
        let (mut id, mut secret) = ([0; 8], [0; 32]);
        fill(&mut id);
        fill(&mut secret);
        let secret = base64::Engine::encode(&base64::prelude::BASE64_URL_SAFE_NO_PAD, secret);
        Token { id: id.iter().map(|b| format!("{b:02x}")).collect(), secret: Secret::new(secret), pin }
    }

    /// The whole text, to be shown once.
    pub fn text(&self) -> Secret {
        Secret::new(format!("sw1.{}.{}.{}", self.id, self.secret.reveal(), self.pin))
    }
}

impl FromStr for Token {
    type Err = BadToken;

    fn from_str(text: &str) -> Result<Token, BadToken> {
        let parts: Vec<&str> = text.trim().split('.').collect();
        let ["sw1", id, secret, pin] = parts[..] else { return Err(BadToken) };
        let is_id = id.len() == 16 && id.bytes().all(|b| b.is_ascii_hexdigit());
        let is_secret = secret.len() == 43 && secret.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        if !is_id || !is_secret {
            return Err(BadToken);
        }
        Ok(Token { id: id.to_owned(), secret: Secret::new(secret), pin: pin.parse().map_err(|_| BadToken)? })
    }
}

/// What an agent asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// The agent's version.
    #[serde(default)]
    pub version: String,
    /// Which workload it stands beside; needed when the token is good for more than one.
    #[serde(default)]
    pub workload: Option<SpiffeId>,
    /// Which instance of it.
    pub instance: InstanceId,
    /// The token's public half; empty when an expired certificate is renewed.
    #[serde(default)]
    pub token_id: String,
    /// The token's secret half.
    #[serde(default)]
    pub token_secret: Secret,
    /// The certificate request. Nothing of it but its key counts, and that the key signed it.
    pub csr: Der,
    /// The expired chain, leaf first, when it is to be renewed within the grace: the request has the same key.
    #[serde(default)]
    pub previous: Vec<Der>,
}

/// What the collector answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// A certificate.
    Issued(Issued),
    /// None.
    Refused(Refused),
}

/// A certificate and what is needed to use it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Issued {
    /// Leaf first, then the CAs that lead to the root.
    pub chain: Vec<Der>,
    /// The roots of the trust domain.
    pub bundle: Vec<Der>,
    /// What is in force now.
    #[serde(default)]
    pub directive: Option<Signed>,
}

/// Why there is no certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// A word from a list that may grow: `token_unknown`, `token_used_up`, `token_expired`, `token_other_workload`,
    /// `bad_request`, `revoked`, `grace_over`, `second_instance`, `internal`.
    pub reason: String,
    /// What a person should do.
    #[serde(default)]
    pub detail: String,
    /// Whether the same request may succeed later.
    #[serde(default)]
    pub retry: bool,
}

/// A message that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnrolError {
    /// Longer than a message may be.
    #[error("an enrolment message of {0} bytes is over the limit of {MAX_MESSAGE}")]
    TooLong(usize),
    /// JSON that is none, or not of the form. The text is not repeated: it may hold a token.
    #[error("an enrolment message cannot be read, at line {line}, column {column}")]
    Json {
        /// Where.
        line: usize,
        /// Where.
        column: usize,
    },
}

/// The bytes of a message, its length in front.
pub fn to_message<T: Serialize>(message: &T) -> Vec<u8> {
    let json = serde_json::to_vec(message).expect("messages have string keys and no failing serializer");
    let length = u32::try_from(json.len()).unwrap_or(u32::MAX);
    [&length.to_be_bytes()[..], &json].concat()
}

/// The length a message announces, if it is within the limit.
pub fn message_length(prefix: [u8; 4]) -> Result<usize, EnrolError> {
    let length = u32::from_be_bytes(prefix) as usize;
    if length > MAX_MESSAGE { Err(EnrolError::TooLong(length)) } else { Ok(length) }
}

/// Reads a message, without its length.
pub fn from_payload<T: DeserializeOwned>(payload: &[u8]) -> Result<T, EnrolError> {
    serde_json::from_slice(payload).map_err(|e| EnrolError::Json { line: e.line(), column: e.column() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token::new(|bytes| bytes.fill(7), Sha256([1; 32]))
    }

    #[test]
    fn a_token_reads_what_it_shows_and_hides_in_logs() {
        let text = token().text();
        let read: Token = text.reveal().parse().unwrap();
        assert_eq!((read.id, read.pin), (token().id, token().pin));
        assert!(read.secret.matches(token().secret.reveal()));
        assert!(!format!("{:?}", token()).contains(token().secret.reveal()));
    }

    #[test]
    fn what_is_no_token_is_refused_without_repeating_it() {
        let good = token().text().reveal().to_owned();
        for bad in ["", "hunter2", &good[..good.len() - 1], &format!("{good}.x"), &good.replace("sw1", "sw2")] {
            let error = bad.parse::<Token>().unwrap_err().to_string();
            assert!(bad.is_empty() || !error.contains(bad), "{error}");
        }
        assert!(format!(" {good}\n").parse::<Token>().is_ok(), "space around it does not matter");
    }

    #[test]
    fn a_message_comes_back_and_a_long_one_is_refused() {
        let refused = Refused { reason: "token_used_up".into(), detail: "make a new one".into(), retry: false };
        let bytes = to_message(&Answer::Refused(refused.clone()));
        let (length, payload) = bytes.split_first_chunk::<4>().unwrap();
        assert_eq!(message_length(*length), Ok(payload.len()));
        let Ok(Answer::Refused(got)) = from_payload(payload) else { panic!("not read") };
        assert_eq!(got, refused);
        assert_eq!(message_length([255; 4]), Err(EnrolError::TooLong(u32::MAX as usize)));
    }

    #[test]
    fn a_broken_message_is_an_error_that_repeats_nothing() {
        let error = from_payload::<Request>(br#"{"instance":"c1","token_secret":"hunter2","csr":7}"#).unwrap_err();
        assert!(!error.to_string().contains("hunter2"), "{error}");
        assert!(from_payload::<Answer>(b"\xff\xfe").is_err());
    }
}
