//! One handshake, driven through rustls' unbuffered API: bytes in, bytes out, no socket.
//!
//! Nothing is kept by the connection itself, so that [`super::record`] can take over where the handshake ends. A peer may
//! send data in the same breath as its last handshake message, which rustls opens before it says that it is done: that
//! data is handed out with the handshake, as [`Early`].

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, ReadTraffic, UnbufferedStatus};

/// Where a handshake stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The peer must say something.
    NeedsInput,
    /// Done. What is left in the input belongs to the connection's data.
    Done,
}

/// What the peer sent right behind its handshake.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Early {
    /// Data that rustls has opened already.
    pub data: Vec<u8>,
    /// The peer has said as well that it will send no more.
    pub closed: bool,
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
    early: &mut Early,
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
            Ok(ConnectionState::ReadTraffic(mut traffic)) => take(&mut traffic, &mut early.data).err().map(Err),
            Ok(ConnectionState::PeerClosed) => {
                early.closed = true;
                None
            }
            Ok(ConnectionState::Closed) => {
                Some(Err(rustls::Error::General("the connection was closed within the handshake".into())))
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

/// Hands out the data that rustls has opened.
fn take<Data>(traffic: &mut ReadTraffic<'_, '_, Data>, data: &mut Vec<u8>) -> Result<(), rustls::Error> {
    while let Some(record) = traffic.next_record() {
        data.extend_from_slice(record?.payload);
    }
    Ok(())
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
