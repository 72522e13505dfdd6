//! What two agents say to each other on a connection that carries one stream after the other.
//!
//! ```text
//! client             server
//!   OPEN        ->              who connected, as a PROXY header of version 2; authorized each time
//!               <-  ACCEPT      the workload has taken the connection, or
//!               <-  REFUSE      why not; the connection is free again
//!   DATA        <>  DATA
//!   FIN         <>  FIN         no more from this side, and how many bytes there were
//! ```
//!
//! After both FINs the connection is free for the next OPEN. Nothing else follows OPEN before its answer, so that a
//! connection that had died meanwhile can be replaced without anything being sent twice. A stream that is cut takes its
//! connection with it.
//!
//! A frame is one TLS record: its first byte is the kind, and the rest its payload. Both ends are ours (they agree on
//! [`ALPN_STREAMS`](sidewarden_proto::wire::ALPN_STREAMS)), and nobody between them can cut records anew.

/// Bytes of the kind.
pub const KIND: usize = 1;
/// The kind of data.
pub const DATA: u8 = 0;
const OPEN: u8 = 1;
const ACCEPT: u8 = 2;
const REFUSE: u8 = 3;
const FIN: u8 = 4;

/// Most bytes of a control frame. A PROXY header of TCP has 28, with room for what it may carry.
pub const MAX_CONTROL: usize = 1024;
/// Most bytes of the text of a refusal; what is over is cut.
const MAX_REASON: usize = 200;

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A stream begins: a PROXY header of version 2.
    Open(Vec<u8>),
    /// It may.
    Accept,
    /// It may not, and why: a word of the closed list.
    Refuse(String),
    /// No more from this side, after this many bytes.
    Fin(u64),
    /// Data, which is not copied out.
    Data,
}

impl Frame {
    /// The record's plaintext; data has its own way.
    pub fn encode(&self) -> Vec<u8> {
        let with = |kind: u8, payload: &[u8]| [&[kind], payload].concat();
        match self {
            Frame::Open(header) => with(OPEN, header),
            Frame::Accept => vec![ACCEPT],
            Frame::Refuse(reason) => with(REFUSE, &reason.as_bytes()[..reason.len().min(MAX_REASON)]),
            Frame::Fin(bytes) => with(FIN, &bytes.to_be_bytes()),
            Frame::Data => vec![DATA],
        }
    }

    /// What a record holds.
    pub fn decode(plain: &[u8]) -> Result<Frame, BadFrame> {
        if plain.len() > MAX_CONTROL && plain[0] != DATA {
            return Err(BadFrame::Long(plain[0]));
        }
        match plain {
            [DATA, _, ..] => Ok(Frame::Data),
            [OPEN, header @ ..] => Ok(Frame::Open(header.to_vec())),
            [ACCEPT] => Ok(Frame::Accept),
            [REFUSE, reason @ ..] => Ok(Frame::Refuse(word(reason))),
            [FIN, count @ ..] => {
                count.try_into().map(|count| Frame::Fin(u64::from_be_bytes(count))).map_err(|_| BadFrame::Form(FIN))
            }
            [] => Err(BadFrame::Empty),
            [kind, ..] => Err(BadFrame::Form(*kind)),
        }
    }
}

/// The peer's word, in a form that can be shown.
fn word(reason: &[u8]) -> String {
    let reason = String::from_utf8_lossy(&reason[..reason.len().min(MAX_REASON)]);
    reason.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').collect()
}

/// What is no frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    /// Nothing at all.
    #[error("an empty frame")]
    Empty,
    /// Not in the form of its kind, or of no known kind.
    #[error("a frame of kind {0} that cannot be read")]
    Form(u8),
    /// Too long.
    #[error("a frame of kind {0} over {MAX_CONTROL} bytes")]
    Long(u8),
    /// Where it has no place.
    #[error("{0} where it has no place")]
    Unexpected(&'static str),
    /// The count of a FIN is another than that of the bytes that came.
    #[error("a stream of {told} bytes of which {came} came")]
    Count {
        /// What the FIN says.
        told: u64,
        /// What was counted.
        came: u64,
    },
}

impl From<BadFrame> for std::io::Error {
    fn from(bad: BadFrame) -> std::io::Error {
        std::io::Error::new(std::io::ErrorKind::InvalidData, bad)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frames_are_read_as_they_were_written() {
        for frame in
            [Frame::Open(vec![1, 2, 3]), Frame::Accept, Frame::Refuse("not_allowed".into()), Frame::Fin(u64::MAX)]
        {
            assert_eq!(Frame::decode(&frame.encode()).unwrap(), frame);
        }
        assert_eq!(Frame::decode(&[DATA, 9]).unwrap(), Frame::Data);
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        let check = |bytes: &[u8], expected| assert_eq!(Frame::decode(bytes), Err(expected), "{bytes:?}");
        check(&[], BadFrame::Empty);
        check(&[DATA], BadFrame::Form(DATA));
        check(&[ACCEPT, 0], BadFrame::Form(ACCEPT));
        check(&[FIN, 0, 0, 0], BadFrame::Form(FIN));
        check(&[FIN; 10], BadFrame::Form(FIN));
        check(&[99], BadFrame::Form(99));
        check(&[OPEN; MAX_CONTROL + 1], BadFrame::Long(OPEN));
    }

    #[test]
    fn a_refusal_cannot_smuggle_anything_into_a_terminal() {
        let Frame::Refuse(word) = Frame::decode(b"\x03no\x1b[2J\xffpe").unwrap() else { panic!() };
        assert_eq!(word, "no[2Jpe");
        let long = Frame::Refuse("x".repeat(5_000)).encode();
        assert_eq!(long.len(), KIND + MAX_REASON);
    }

    proptest! {
        #[test]
        fn no_bytes_are_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1100)) {
            let _ = Frame::decode(&bytes);
        }
    }
}
