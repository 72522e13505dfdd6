//! Frames between agent and collector, and their bytes.
//!
//! ```text
//! frame:  length 4 (of what follows, big-endian) | type 1 | payload
//! ```
//! Links travel as they are kept; everything else is JSON, where a field that is missing has its default and a field
//! that is unknown is ignored. A frame of an unknown type is skipped: a newer side may send more than we know.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::batch::{Cursor, Epoch, Link, MAX_LINK, Malformed};
use crate::identity::{AgentId, InstanceId, Sha256};
use crate::time::Timestamp;

/// ALPN of the session between agent and collector.
pub const ALPN: &[u8] = b"sidewarden/1";
/// ALPN between two agents that carry one stream after the other on a connection.
pub const ALPN_STREAMS: &[u8] = b"sidewarden-streams/1";
/// ALPN between two collectors, of which one follows the other's directives.
pub const ALPN_COLLECTOR: &[u8] = b"sidewarden-collector/1";
/// ALPN of enrolment.
pub const ALPN_ENROL: &[u8] = b"sidewarden-enrol/1";
/// Most bytes of a frame after its length.
pub const MAX_FRAME: usize = MAX_LINK + 64;
/// Most bytes of a JSON frame: those are small, but a directive may list many revocations.
pub const MAX_JSON: usize = 1 << 20;

/// The first frame of an agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// The agent's version.
    #[serde(default)]
    pub version: String,
    /// Which instance of the workload that its certificate names.
    pub instance: InstanceId,
    /// The life of its spool.
    pub epoch: Epoch,
    /// Version of the directive it runs; 0 for none.
    #[serde(default)]
    pub directive: u64,
    /// Seconds between its pings.
    #[serde(default)]
    pub heartbeat_secs: u32,
    /// What it understands of directives ([`crate::directive::UNDERSTANDS`]); the first agents do not say.
    #[serde(default)]
    pub understands: u32,
    /// What its clock says; 0 from agents that do not tell.
    #[serde(default)]
    pub at_us: Timestamp,
    /// How it stands beside its workload ([`crate::event::Mode`]'s word); empty from agents that do not tell.
    #[serde(default)]
    pub mode: String,
}

/// The collector's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Welcome {
    /// The collector's version.
    #[serde(default)]
    pub version: String,
    /// How far the collector has this agent's events; the next link must follow here.
    pub cursor: Cursor,
    /// Whether this collector decides about gates. One that follows another does not: an agent is alone with them there.
    #[serde(default = "yes")]
    pub keeps_gates: bool,
}

/// What a collector that follows another tells it of its agents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Certificates that it has issued, or has seen in use.
    #[serde(default)]
    pub issued: Vec<Issued>,
    /// The directives that its agents run.
    #[serde(default)]
    pub confirmed: Vec<(AgentId, u64)>,
    /// Keys of agents that have their certificates from somebody else's CA.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guests: Vec<Guest>,
}

/// A certificate that an agent has from somebody else's CA, as a collector has seen it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// Whose; the instance is its own word.
    pub agent: AgentId,
    /// Its serial number, in hex.
    pub serial: String,
    /// Its public key (SHA-256 of the SPKI).
    pub spki: Sha256,
    /// When it begins.
    pub not_before_us: Timestamp,
    /// When it ends.
    pub not_after_us: Timestamp,
    /// Since when it has been away; `None` while it is connected.
    #[serde(default)]
    pub left_us: Option<Timestamp>,
}

/// A certificate of an agent, as a collector's register has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issued {
    /// To whom.
    pub agent: AgentId,
    /// Its serial number, in hex.
    pub serial: String,
    /// Its public key (SHA-256 of the SPKI).
    pub spki: Sha256,
    /// When it begins.
    pub not_before_us: Timestamp,
    /// When it ends.
    pub not_after_us: Timestamp,
    /// The public key of its root.
    pub root: Sha256,
    /// Whether it was seen in use.
    #[serde(default)]
    pub seen: bool,
    /// Whether a newer key of the instance was seen after it.
    #[serde(default)]
    pub superseded: bool,
}

/// What one side says to the other.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// Agent: who I am.
    Hello(Hello),
    /// Collector: go on from here.
    Welcome(Welcome),
    /// Agent: the next link.
    Link(Link),
    /// Collector: everything up to here is on disk.
    Ack(Cursor),
    /// Collector: something is missing, go on from here.
    Rewind(Cursor),
    /// Agent: I am alive. Answered by an `Ack`.
    Ping,
    /// Collector: a signed directive.
    Directive(Vec<u8>),
    /// Agent: this directive version is in force here.
    DirectiveApplied(u64),
    /// Agent: a certificate request (PKCS#10, DER) for my next certificate.
    Renew(Vec<u8>),
    /// Collector: the next certificate, or why not; a JSON [`crate::enrol::Answer`].
    Renewed(Vec<u8>),
    /// Agent: I end now, for this reason.
    Bye(String),
    /// Collector: I will not go on with you, for this reason.
    Refuse(Refuse),
    /// A collector that follows another: what it knows of its agents.
    Report(Report),
}

/// Why a collector ends a session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refuse {
    /// A word from a list that may grow: `chain_broken`, `second_instance`, `overloaded`, `revoked`, `malformed`.
    pub reason: String,
    /// What a person should know.
    #[serde(default)]
    pub detail: String,
    /// Whether it may help to come back.
    #[serde(default = "yes")]
    pub retry: bool,
}

fn yes() -> bool {
    true
}

/// Bytes that are no frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Longer than a frame may be.
    #[error("a frame of {0} bytes is over the limit of {MAX_FRAME}")]
    TooLong(usize),
    /// Without even a type.
    #[error("a frame without a type")]
    Empty,
    /// JSON that is none, or not of the frame's form.
    #[error("a frame of type {kind} cannot be read: {error}")]
    Json {
        /// The frame's type.
        kind: u8,
        /// What is wrong.
        error: String,
    },
    /// A link that is none.
    #[error(transparent)]
    Link(#[from] Malformed),
}

const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const LINK: u8 = 3;
const ACK: u8 = 4;
const REWIND: u8 = 5;
const PING: u8 = 6;
const DIRECTIVE: u8 = 7;
const DIRECTIVE_APPLIED: u8 = 8;
const RENEW: u8 = 9;
const RENEWED: u8 = 10;
const BYE: u8 = 11;
const REFUSE: u8 = 12;
const REPORT: u8 = 13;

impl Frame {
    /// The frame's bytes, its length in front.
    pub fn encode(&self) -> Vec<u8> {
        let (kind, payload) = match self {
            Frame::Hello(hello) => (HELLO, json(hello)),
            Frame::Welcome(welcome) => (WELCOME, json(welcome)),
            Frame::Link(link) => (LINK, link.encode()),
            Frame::Ack(cursor) => (ACK, json(cursor)),
            Frame::Rewind(cursor) => (REWIND, json(cursor)),
            Frame::Ping => (PING, Vec::new()),
            Frame::Directive(bytes) => (DIRECTIVE, bytes.clone()),
            Frame::DirectiveApplied(version) => (DIRECTIVE_APPLIED, json(version)),
            Frame::Renew(csr) => (RENEW, csr.clone()),
            Frame::Renewed(answer) => (RENEWED, answer.clone()),
            Frame::Bye(reason) => (BYE, json(reason)),
            Frame::Refuse(refuse) => (REFUSE, json(refuse)),
            Frame::Report(report) => (REPORT, json(report)),
        };
        let length = u32::try_from(payload.len() + 1).unwrap_or(u32::MAX);
        [&length.to_be_bytes()[..], &[kind], &payload].concat()
    }

    /// Reads a frame from `bytes`, without its length. `None` for a type this version does not know.
    pub fn decode(bytes: &[u8]) -> Result<Option<Frame>, WireError> {
        let Some((&kind, payload)) = bytes.split_first() else { return Err(WireError::Empty) };
        if kind != LINK && payload.len() > MAX_JSON {
            return Err(WireError::TooLong(bytes.len()));
        }
        Ok(Some(match kind {
            HELLO => Frame::Hello(from_json(kind, payload)?),
            WELCOME => Frame::Welcome(from_json(kind, payload)?),
            LINK => Frame::Link(Link::decode(payload)?),
            ACK => Frame::Ack(from_json(kind, payload)?),
            REWIND => Frame::Rewind(from_json(kind, payload)?),
            PING => Frame::Ping,
            DIRECTIVE => Frame::Directive(payload.to_vec()),
            DIRECTIVE_APPLIED => Frame::DirectiveApplied(from_json(kind, payload)?),
            RENEW => Frame::Renew(payload.to_vec()),
            RENEWED => Frame::Renewed(payload.to_vec()),
            BYE => Frame::Bye(from_json(kind, payload)?),
            REFUSE => Frame::Refuse(from_json(kind, payload)?),
            REPORT => Frame::Report(from_json(kind, payload)?),
            _ => return Ok(None),
        }))
    }
}

fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("frames have string keys and no failing serializer")
}

fn from_json<T: DeserializeOwned>(kind: u8, payload: &[u8]) -> Result<T, WireError> {
    serde_json::from_slice(payload).map_err(|e| WireError::Json { kind, error: e.to_string() })
}

/// Finds frames in a stream of bytes, however they are cut.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes at the front that have been read.
    read: usize,
}

impl Decoder {
    /// Adds bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.read);
        self.read = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, if there is one. After an error the stream is of no more use.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, WireError> {
        loop {
            let rest = &self.buffer[self.read..];
            let Some((length, rest)) = rest.split_first_chunk::<4>() else { return Ok(None) };
            let length = u32::from_be_bytes(*length) as usize;
            if length > MAX_FRAME {
                return Err(WireError::TooLong(length));
            }
            if rest.len() < length {
                return Ok(None);
            }
            let frame = Frame::decode(&rest[..length])?;
            self.read += 4 + length;
            if let Some(frame) = frame {
                return Ok(Some(frame));
            }
        }
    }

    /// Whether a frame has begun and not ended: a stream that ends now was cut.
    pub fn is_mid_frame(&self) -> bool {
        self.read < self.buffer.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::batch::{LossReason, Tombstone};

    fn frames() -> Vec<Frame> {
        let epoch = Epoch([3; 16]);
        let cursor = Cursor { seq: 12, hash: Sha256([5; 32]) };
        let (prev, hash, reason) = (Sha256::ZERO, Sha256([1; 32]), LossReason::SpoolFull);
        let tombstone = Tombstone { epoch, first_seq: 1, last_seq: 2, by_severity: [0; 4], reason, prev, hash };
        vec![
            Frame::Hello(Hello {
                version: "0.1.0".into(),
                instance: "c1".parse().unwrap(),
                epoch,
                directive: 3,
                heartbeat_secs: 5,
                understands: 2,
                at_us: Timestamp(7),
                mode: "exec".into(),
            }),
            Frame::Welcome(Welcome { version: "0.1.0".into(), cursor, keeps_gates: false }),
            Frame::Link(Link::Tombstone(tombstone)),
            Frame::Ack(cursor),
            Frame::Rewind(cursor),
            Frame::Ping,
            Frame::Directive(vec![1, 2, 3]),
            Frame::DirectiveApplied(9),
            Frame::Renew(vec![4]),
            Frame::Renewed(vec![5]),
            Frame::Bye("SIGTERM".into()),
            Frame::Refuse(Refuse { reason: "revoked".into(), detail: String::new(), retry: false }),
            Frame::Report(report()),
        ]
    }

    fn report() -> Report {
        let agent: AgentId = "spiffe://x/shop/web#c1".parse().unwrap();
        let (spki, root) = (Sha256([1; 32]), Sha256([2; 32]));
        let (not_before_us, not_after_us) = (Timestamp(1), Timestamp(2));
        let issued = Issued {
            agent: agent.clone(),
            serial: "a1".into(),
            spki,
            not_before_us,
            not_after_us,
            root,
            seen: true,
            superseded: false,
        };
        let guest =
            Guest { agent: agent.clone(), serial: "b2".into(), spki, not_before_us, not_after_us, left_us: None };
        Report { issued: vec![issued], confirmed: vec![(agent, 7)], guests: vec![guest] }
    }

    #[test]
    fn a_welcome_of_an_older_collector_keeps_gates() {
        let json = format!(r#"{{"cursor":{{"seq":0,"hash":"{}"}}}}"#, Sha256::ZERO);
        let bytes = [&[WELCOME][..], json.as_bytes()].concat();
        let Ok(Some(Frame::Welcome(welcome))) = Frame::decode(&bytes) else { panic!("not read") };
        assert!(welcome.keeps_gates);
    }

    #[test]
    fn every_frame_survives_every_cut() {
        let bytes: Vec<u8> = frames().iter().flat_map(Frame::encode).collect();
        for step in [1, 2, 3, 7, 50, bytes.len()] {
            let mut decoder = Decoder::default();
            let mut got = Vec::new();
            for piece in bytes.chunks(step) {
                decoder.push(piece);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    got.push(frame);
                }
            }
            assert_eq!(got, frames(), "in pieces of {step}");
            assert!(!decoder.is_mid_frame());
        }
    }

    #[test]
    fn a_frame_of_a_newer_version_is_skipped() {
        let mut decoder = Decoder::default();
        decoder.push(&[&[0, 0, 0, 3, 200, 1, 2][..], &Frame::Ping.encode()].concat());
        assert_eq!(decoder.next_frame(), Ok(Some(Frame::Ping)));
    }

    #[test]
    fn a_hello_of_an_older_version_has_defaults() {
        let json = format!(r#"{{"instance":"c1","epoch":"{}","colour":"red"}}"#, Epoch([0; 16]));
        let bytes = [&[HELLO][..], json.as_bytes()].concat();
        let Ok(Some(Frame::Hello(hello))) = Frame::decode(&bytes) else { panic!("not read") };
        assert_eq!((hello.directive, hello.version.as_str()), (0, ""));
    }

    #[test]
    fn oversized_and_broken_frames_are_errors() {
        let mut decoder = Decoder::default();
        decoder.push(&u32::MAX.to_be_bytes());
        assert_eq!(decoder.next_frame(), Err(WireError::TooLong(u32::MAX as usize)));
        assert_eq!(Frame::decode(&[]), Err(WireError::Empty));
        assert!(matches!(Frame::decode(&[ACK, b'{']), Err(WireError::Json { kind: ACK, .. })));
        assert!(matches!(Frame::decode(&vec![DIRECTIVE; MAX_JSON + 2]), Err(WireError::TooLong(_))));
        let deep = [&[BYE][..], &b"[".repeat(10_000)].concat();
        assert!(matches!(Frame::decode(&deep), Err(WireError::Json { .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Frame::decode(&bytes);
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next_frame() {}
        }
    }
}
