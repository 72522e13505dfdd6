//! One handshake, driven through rustls' unbuffered API: bytes in, bytes out, no socket.
//!
//! Nothing is kept by the connection itself, so that [`super::record`] can take over exactly where the handshake ends:
//! bytes that follow it stay in the caller's buffer.

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};

/// Where a handshake stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The peer must say something.
    NeedsInput,
    /// Done. What is left in the input belongs to the connection's data.
    Done,
}

/// Either end of a connection.
pub trait Handshaking {
    /// What rustls keeps of this end.
    type Data;

    /// Whether something waits to be encoded.
    fn has_output(&self) -> bool;

    /// Looks at the input and says what is to be done.
    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
}

impl Handshaking for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn has_output(&self) -> bool {
        self.wants_write()
    }

    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, ServerConnectionData> {
        self.process_tls_records(input)
    }
}

impl Handshaking for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn has_output(&self) -> bool {
        self.wants_write()
    }

    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, ClientConnectionData> {
        self.process_tls_records(input)
    }
}

/// Takes the handshake as far as `input` leads. What it has to say is added to `output`, also before an error: that is
/// the alert which tells the peer.
///
/// `Done` is answered only when everything before was handed out in `output`; write that before any data.
pub fn advance<C: Handshaking>(
    connection: &mut C,
    input: &mut Vec<u8>,
    output: &mut Vec<u8>,
) -> Result<Progress, rustls::Error> {
    loop {
        let UnbufferedStatus { discard, state } = connection.process(input);
        let next = match state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                encode(output, |out| data.encode(out))?;
                None
            }
            Ok(ConnectionState::TransmitTlsData(data)) => {
                data.done();
                None
            }
            Ok(ConnectionState::BlockedHandshake) => Some(Ok(Progress::NeedsInput)),
            Ok(ConnectionState::WriteTraffic(_)) => Some(Ok(Progress::Done)),
            Ok(ConnectionState::ReadTraffic(_)) => Some(Ok(Progress::Done)),
            Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => {
                Some(Err(rustls::Error::General("the peer closed the connection during the handshake".into())))
            }
            Ok(_) => Some(Err(rustls::Error::General("early data was never offered".into()))),
            Err(error) => Some(Err(error)),
        };
        input.drain(..discard);
        match next {
            None => {}
            Some(Ok(progress)) => return Ok(progress),
            Some(Err(error)) => {
                alert(connection, output);
                return Err(error);
            }
        }
    }
}

/// After an error rustls may still hold the alert to send. It is asked only while it does: with nothing to send it would
/// look for messages again, in an input it has lost its place in.
fn alert<C: Handshaking>(connection: &mut C, output: &mut Vec<u8>) {
    while connection.has_output() {
        let UnbufferedStatus { state: Ok(ConnectionState::EncodeTlsData(mut data)), .. } = connection.process(&mut [])
        else {
            return;
        };
        if encode(output, |out| data.encode(out)).is_err() {
            return;
        }
    }
}

/// Appends what `write` encodes, with as much room as it asks for.
fn encode(
    output: &mut Vec<u8>,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>,
) -> Result<(), rustls::Error> {
    let start = output.len();
    for room in [4 << 10, 64 << 10] {
        output.resize(start + room, 0);
        match write(&mut output[start..]) {
            Ok(written) => {
                output.truncate(start + written);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(needed)) => output.resize(start + needed.required_size, 0),
            Err(EncodeError::AlreadyEncoded) => break,
        }
        if let Ok(written) = write(&mut output[start..]) {
            output.truncate(start + written);
            return Ok(());
        }
    }
    output.truncate(start);
    Err(rustls::Error::General("a handshake flight could not be encoded".into()))
}
