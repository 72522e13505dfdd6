//! TLS 1.3 records, sealed and opened in place: what moves the bytes once rustls has done the handshake.
//!
//! rustls' own data path copies every byte several times through buffers that each connection holds. Here records are
//! made and opened inside the caller's scratch, so that a connection at rest holds nothing and a batch of records costs
//! one system call each way. rustls hands out the traffic keys; those after a KeyUpdate are derived here, from the traffic
//! secrets ([`sidewarden_proto::traffic`]). TLS 1.2 does not come here.
//!
//! ```text
//! slot:  header 5 | plaintext, at most 2^14 | content type 1 | tag 16
//! ```

use std::fmt;
use std::ops::Range;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets, ProtocolVersion};
use sidewarden_proto::traffic::{Secret, Secrets};

use super::aead::{Cipher, Key, TAG};

/// Most plaintext of one record (RFC 8446, 5.1).
pub const MAX_PLAIN: usize = 1 << 14;
/// Bytes of a record before its plaintext.
pub const HEADER: usize = 5;
/// Bytes of a record after its plaintext: the content type and the tag.
pub const TRAILER: usize = 17;
/// Bytes of a whole record of [`MAX_PLAIN`].
pub const SLOT: usize = HEADER + MAX_PLAIN + TRAILER;
/// Bytes of a cache line. The kernel copies to and from addresses that are a multiple of it 3 times as fast as others,
/// because some processors' `rep movsb` takes a slow path everywhere else.
pub const LINE: usize = 64;
/// Plaintext of a record that is sealed in whole lines: as much as still leaves the record within [`MAX_PLAIN`] bytes.
pub const LINED_PLAIN: usize = MAX_PLAIN - LINE;
/// Most bytes a record may have after its header (RFC 8446, 5.2).
const MAX_CIPHERTEXT: usize = MAX_PLAIN + 256;

/// AES-GCM may seal 2^24.5 records with one key (RFC 8446, 5.5); we change keys well before.
const RECORDS_PER_KEY: u64 = 1 << 23;
/// KeyUpdates and empty records in a row without any data: more is an attack on our processor.
const MAX_IDLE_RECORDS: u32 = 32;
/// A handshake message after the handshake is a ticket or a KeyUpdate; tickets are small.
const MAX_MESSAGE: usize = 1 << 14;

const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// Why the records of a connection cannot be read on. Each is the peer's fault unless it says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Not a record of TLS 1.3, or longer than one may be.
    #[error("no TLS 1.3 record: {0}")]
    Form(&'static str),
    /// The tag does not fit: changed on the way, or sealed with another key.
    #[error("a record does not authenticate")]
    BadRecord,
    /// A message that has no place after the handshake.
    #[error("unexpected message of type {0} after the handshake")]
    Unexpected(u8),
    /// Too many records without data.
    #[error("{MAX_IDLE_RECORDS} records in a row without data")]
    Flood,
    /// A fatal alert from the peer.
    #[error("the peer ended the connection with alert {0}")]
    Alert(u8),
    /// Our own side: the keys are not to be had.
    #[error("the keys of the connection are not usable: {0}")]
    Keys(String),
}

/// What the first record of a buffer was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opened {
    /// Not whole yet.
    Partial,
    /// Data, at `plain` of the buffer; the record took `consumed` bytes.
    Data {
        /// Bytes of the record.
        consumed: usize,
        /// Where the plaintext lies.
        plain: Range<usize>,
    },
    /// The peer will send no more.
    Close {
        /// Bytes of the record.
        consumed: usize,
    },
    /// Nothing for the application.
    Control {
        /// Bytes of the record.
        consumed: usize,
    },
}

/// The keys of one direction, what the next ones come from, and the number of the next record.
struct Half {
    key: Key,
    iv: [u8; 12],
    seq: u64,
    secret: Secret,
}

impl Half {
    /// Of keys that come from `secret`. rustls reads whatever lies in its input before it lets go of a connection, and tells
    /// of the first secret alone: a KeyUpdate right behind the handshake leaves keys of the second, and the next ones that
    /// we derive would be these once more, from the first nonce on.
    fn new((seq, keys): (u64, ConnectionTrafficSecrets), secret: Option<Secret>) -> Result<Half, RecordError> {
        let (cipher, key, iv) = Cipher::of(&keys).ok_or_else(|| unusable("an unknown cipher suite"))?;
        let iv: [u8; 12] = iv.try_into().map_err(|_| unusable("the IV is of another length"))?;
        let secret = secret.ok_or_else(|| unusable("their secret was not heard"))?;
        let (mut first, mut first_iv) = ([0; 32], [0; 12]);
        let first = &mut first[..cipher.key_len()];
        secret.keys(first, &mut first_iv).map_err(unusable)?;
        let fits = verify_slices_are_equal(first, key).is_ok() && first_iv == iv;
        first.fill(0);
        if !fits {
            return Err(unusable("they were changed in one breath with the handshake"));
        }
        Ok(Half { key: Key::new(cipher, key).map_err(unusable)?, iv, seq, secret })
    }

    /// What is in use after a KeyUpdate.
    fn next(&self) -> Result<Half, RecordError> {
        let (cipher, mut key, mut iv) = (self.key.cipher(), [0; 32], [0; 12]);
        let key = &mut key[..cipher.key_len()];
        let secret = self.secret.next().map_err(unusable)?;
        secret.keys(key, &mut iv).map_err(unusable)?;
        let next = Half { key: Key::new(cipher, key).map_err(unusable)?, iv, seq: 0, secret };
        key.fill(0);
        Ok(next)
    }

    fn nonce(&self) -> [u8; 12] {
        let mut nonce = self.iv;
        nonce[4..].iter_mut().zip(self.seq.to_be_bytes()).for_each(|(byte, seq)| *byte ^= seq);
        nonce
    }
}

fn unusable(why: impl fmt::Display) -> RecordError {
    RecordError::Keys(why.to_string())
}

/// The records of one TLS 1.3 connection after its handshake.
pub struct Records {
    sealing: Half,
    opening: Half,
    /// Records in a row that brought no data.
    idle: u32,
    /// The peer asked for new keys of ours: a KeyUpdate goes out before the next data.
    owes_update: bool,
    /// The begin of a handshake message whose end has not come.
    message: Vec<u8>,
}

impl fmt::Debug for Records {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Records(sealed {}, opened {})", self.sealing.seq, self.opening.seq)
    }
}

impl Records {
    /// Takes over a server's connection whose handshake is done and whose output is written, with what was heard of its
    /// secrets.
    pub fn of_server(connection: UnbufferedServerConnection, secrets: Secrets) -> Result<Records, RecordError> {
        let (keys, rest) = connection.dangerous_into_kernel_connection().map_err(unusable)?;
        Records::new(rest.protocol_version(), keys, secrets.server, secrets.client)
    }

    /// The same for a client's connection.
    pub fn of_client(connection: UnbufferedClientConnection, secrets: Secrets) -> Result<Records, RecordError> {
        let (keys, rest) = connection.dangerous_into_kernel_connection().map_err(unusable)?;
        Records::new(rest.protocol_version(), keys, secrets.client, secrets.server)
    }

    fn new(
        version: ProtocolVersion,
        keys: ExtractedSecrets,
        ours: Option<Secret>,
        theirs: Option<Secret>,
    ) -> Result<Records, RecordError> {
        if version != ProtocolVersion::TLSv1_3 {
            return Err(unusable("not TLS 1.3"));
        }
        let (sealing, opening) = (Half::new(keys.tx, ours)?, Half::new(keys.rx, theirs)?);
        Ok(Records { sealing, opening, idle: 0, owes_update: false, message: Vec::new() })
    }

    /// Whether a KeyUpdate must go out before the next data: see [`Records::seal_key_update`].
    pub fn owes_key_update(&self) -> bool {
        self.owes_update || self.sealing.seq >= RECORDS_PER_KEY
    }

    /// Seals the `len` bytes of data at [`HEADER`] of `slot`; returns the length of the record.
    ///
    /// `slot` must have room for [`TRAILER`] bytes after the data, and `len` be at most [`MAX_PLAIN`].
    pub fn seal(&mut self, slot: &mut [u8], len: usize) -> Result<usize, RecordError> {
        self.seal_as(DATA, slot, len, 0)
    }

    /// The same with so much padding (RFC 8446, 5.4) that the record is a whole number of [`LINE`]s: the next one in a
    /// row, and what the kernel makes of all of them, lies as this one does.
    pub fn seal_lines(&mut self, slot: &mut [u8], len: usize) -> Result<usize, RecordError> {
        let padding = (HEADER + len + TRAILER).next_multiple_of(LINE) - (HEADER + len + TRAILER);
        self.seal_as(DATA, slot, len, padding)
    }

    /// A KeyUpdate in `slot`, after which our new keys are in use; returns the length of the record.
    pub fn seal_key_update(&mut self, slot: &mut [u8]) -> Result<usize, RecordError> {
        slot[HEADER..HEADER + 5].copy_from_slice(&[KEY_UPDATE, 0, 0, 1, 0]);
        let length = self.seal_as(HANDSHAKE, slot, 5, 0)?;
        self.sealing = self.sealing.next()?;
        self.owes_update = false;
        Ok(length)
    }

    /// A close_notify in `slot`; returns the length of the record.
    pub fn seal_close(&mut self, slot: &mut [u8]) -> Result<usize, RecordError> {
        slot[HEADER..HEADER + 2].copy_from_slice(&[1, 0]);
        self.seal_as(ALERT, slot, 2, 0)
    }

    /// A fatal alert in `slot`; returns the length of the record.
    pub fn seal_alert(&mut self, code: u8, slot: &mut [u8]) -> Result<usize, RecordError> {
        slot[HEADER..HEADER + 2].copy_from_slice(&[2, code]);
        self.seal_as(ALERT, slot, 2, 0)
    }

    fn seal_as(&mut self, kind: u8, slot: &mut [u8], len: usize, padding: usize) -> Result<usize, RecordError> {
        let length = HEADER + len + TRAILER + padding;
        if len + padding > MAX_PLAIN || slot.len() < length {
            return Err(RecordError::Form("the data does not fit its slot"));
        }
        let inner = (length - HEADER) as u16;
        let header = [DATA, 3, 3, (inner >> 8) as u8, inner as u8];
        slot[..HEADER].copy_from_slice(&header);
        slot[HEADER + len] = kind;
        slot[HEADER + len + 1..length - TAG].fill(0);
        let (body, tag) = slot[HEADER..length].split_at_mut(length - HEADER - TAG);
        let sealed = self.sealing.key.seal(self.sealing.nonce(), header, body).map_err(unusable)?;
        tag.copy_from_slice(&sealed);
        self.sealing.seq += 1;
        Ok(length)
    }

    /// Opens the first record of `buffer` in place.
    pub fn open(&mut self, buffer: &mut [u8]) -> Result<Opened, RecordError> {
        let Some((header, rest)) = buffer.split_first_chunk_mut::<HEADER>() else { return Ok(Opened::Partial) };
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        match header[0] {
            DATA => {}
            CHANGE_CIPHER_SPEC | ALERT | HANDSHAKE => return Err(RecordError::Unexpected(header[0])),
            _ => return Err(RecordError::Form("unknown content type")),
        }
        if !(TRAILER..=MAX_CIPHERTEXT).contains(&length) {
            return Err(RecordError::Form("its length is out of bounds"));
        }
        let Some(sealed) = rest.get_mut(..length) else { return Ok(Opened::Partial) };
        let nonce = self.opening.nonce();
        let inner = self.opening.key.open(nonce, *header, sealed).map_err(|_| RecordError::BadRecord)?;
        self.opening.seq += 1;
        debug_assert_eq!(inner.len(), length - TAG);
        let padded = inner.iter().rposition(|byte| *byte != 0).ok_or(RecordError::Form("only padding"))?;
        if padded > MAX_PLAIN {
            return Err(RecordError::Form("its plaintext is too long"));
        }
        self.read(inner[padded], HEADER..HEADER + padded, HEADER + length, buffer)
    }

    fn read(&mut self, kind: u8, plain: Range<usize>, consumed: usize, buffer: &[u8]) -> Result<Opened, RecordError> {
        if kind != DATA || plain.is_empty() {
            self.idle += 1;
            if self.idle > MAX_IDLE_RECORDS {
                return Err(RecordError::Flood);
            }
        } else {
            self.idle = 0;
        }
        match (kind, &buffer[plain.clone()]) {
            (HANDSHAKE, []) => Err(RecordError::Form("an empty handshake record")),
            (DATA | HANDSHAKE, _) if kind == DATA && !self.message.is_empty() => {
                Err(RecordError::Form("data inside a handshake message"))
            }
            (DATA, []) => Ok(Opened::Control { consumed }),
            (DATA, _) => Ok(Opened::Data { consumed, plain }),
            (ALERT, [_, 0]) => Ok(Opened::Close { consumed }),
            // user_canceled only announces the close that follows.
            (ALERT, [_, 90]) => Ok(Opened::Control { consumed }),
            (ALERT, [_, code]) => Err(RecordError::Alert(*code)),
            (HANDSHAKE, bytes) => self.take_message(bytes).map(|()| Opened::Control { consumed }),
            _ => Err(RecordError::Unexpected(kind)),
        }
    }

    /// Handshake messages may be cut over records, and several may stand in one; a KeyUpdate must end its record.
    fn take_message(&mut self, bytes: &[u8]) -> Result<(), RecordError> {
        self.message.extend_from_slice(bytes);
        while let [kind, a, b, c, rest @ ..] = &self.message[..] {
            let (kind, length) = (*kind, u32::from_be_bytes([0, *a, *b, *c]) as usize);
            if length > MAX_MESSAGE {
                return Err(RecordError::Form("a handshake message is too long"));
            }
            let Some(body) = rest.get(..length) else { break };
            let alone = rest.len() == length;
            match (kind, body) {
                (NEW_SESSION_TICKET, _) => {}
                (KEY_UPDATE, [asks @ (0 | 1)]) if alone => {
                    self.owes_update |= *asks == 1;
                    self.opening = self.opening.next()?;
                }
                _ => return Err(RecordError::Unexpected(kind)),
            }
            self.message.drain(..4 + length);
        }
        if self.message.is_empty() {
            self.message = Vec::new();
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::{Read, Write};
    use std::sync::Arc;

    use proptest::prelude::*;
    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
    };
    use rustls::pki_types::PrivateKeyDer;
    use sidewarden_proto::tls::{Credential, Expect, Floor, Trust, client_config, server_config};
    use sidewarden_proto::traffic::hear;

    use super::*;
    use crate::proxy::pump::{Early, Progress, advance};

    fn credential() -> (Credential, Trust) {
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let root = ca.self_signed(&key).unwrap().der().clone();
        let issuer = Issuer::new(ca, key);
        let mut leaf = CertificateParams::default();
        leaf.subject_alt_names = vec![SanType::URI("spiffe://td/a".try_into().unwrap())];
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate().unwrap();
        let chain = vec![leaf.signed_by(&key, &issuer).unwrap().der().clone()];
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        (Credential::from_der(chain, key).unwrap(), Trust::single("td".parse().unwrap(), vec![root]))
    }

    pub(crate) fn configs() -> (Arc<rustls::ClientConfig>, Arc<rustls::ServerConfig>) {
        let (credential, trust) = credential();
        let expect = Expect::Workload("spiffe://td/a".parse().unwrap());
        let client = client_config(&credential, &trust, expect, Floor::Tls13, &[]).unwrap();
        (client, server_config(&credential, &trust, Floor::Tls13, &[]).unwrap())
    }

    /// Our two ends after a handshake, the bytes cut into pieces of `piece`.
    fn pair(piece: usize) -> (Records, Records) {
        let (client, server) = configs();
        let mut client = UnbufferedClientConnection::new(client, "x".try_into().unwrap()).unwrap();
        let mut server = UnbufferedServerConnection::new(server).unwrap();
        let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
        let (mut at_client, mut at_server) = (Vec::new(), Vec::new());
        let (mut of_client, mut of_server) = (Secrets::default(), Secrets::default());
        for _ in 0..100_000 {
            let (one, heard) = hear(|| advance(&mut client, &mut at_client, &mut to_server, &mut Early::default()));
            of_client.add(heard);
            let (two, heard) = hear(|| advance(&mut server, &mut at_server, &mut to_client, &mut Early::default()));
            of_server.add(heard);
            let (one, two) = (one.unwrap(), two.unwrap());
            if one == Progress::Done && two == Progress::Done && to_server.is_empty() && to_client.is_empty() {
                return (
                    Records::of_client(client, of_client).unwrap(),
                    Records::of_server(server, of_server).unwrap(),
                );
            }
            at_server.extend(to_server.drain(..piece.min(to_server.len())));
            at_client.extend(to_client.drain(..piece.min(to_client.len())));
        }
        panic!("the handshake does not end");
    }

    fn seal(records: &mut Records, data: &[u8]) -> Vec<u8> {
        let mut slot = vec![0; HEADER + data.len() + TRAILER];
        slot[HEADER..HEADER + data.len()].copy_from_slice(data);
        let length = records.seal(&mut slot, data.len()).unwrap();
        slot.truncate(length);
        slot
    }

    fn open(records: &mut Records, mut bytes: Vec<u8>) -> Result<Vec<u8>, RecordError> {
        match records.open(&mut bytes)? {
            Opened::Data { plain, .. } => Ok(bytes[plain].to_vec()),
            other => panic!("not data: {other:?}"),
        }
    }

    #[test]
    fn data_goes_both_ways_after_a_handshake_in_pieces_of_any_size() {
        for piece in [1, 7, 100_000] {
            let (mut client, mut server) = pair(piece);
            for data in [&b"x"[..], &[7; 300], &[9; MAX_PLAIN]] {
                assert_eq!(open(&mut server, seal(&mut client, data)).unwrap(), data);
                assert_eq!(open(&mut client, seal(&mut server, data)).unwrap(), data);
            }
        }
    }

    #[test]
    fn a_cut_record_waits_and_a_changed_one_does_not_open() {
        let (mut client, mut server) = pair(9999);
        let record = seal(&mut client, b"hello");
        for cut in 0..record.len() {
            assert_eq!(server.open(&mut record[..cut].to_vec()), Ok(Opened::Partial), "cut at {cut}");
        }
        for at in 0..record.len() {
            let mut changed = record.clone();
            changed[at] ^= 1;
            changed.push(0);
            assert!(!matches!(server.open(&mut changed), Ok(Opened::Data { .. })), "bit changed at {at}");
        }
        assert_eq!(open(&mut server, record).unwrap(), b"hello");
    }

    #[test]
    fn a_record_in_whole_lines_is_padded_to_them_and_opens_to_its_data() {
        let (mut client, mut server) = pair(9999);
        for len in [1, 41, 42, 43, 106, 107, 5000, LINED_PLAIN, LINED_PLAIN + 1] {
            let mut slot = vec![0xff; SLOT];
            slot[HEADER..HEADER + len].fill(7);
            let length = client.seal_lines(&mut slot, len).unwrap();
            assert_eq!(length, (HEADER + len + TRAILER).next_multiple_of(LINE), "{len}");
            slot.truncate(length);
            assert_eq!(open(&mut server, slot).unwrap(), vec![7; len], "{len}");
        }
        let mut slot = vec![0; 2 * SLOT];
        assert!(client.seal_lines(&mut slot, MAX_PLAIN - 1).is_err(), "no room for the padding");
    }

    #[test]
    fn a_record_opens_once() {
        let (mut client, mut server) = pair(9999);
        let record = seal(&mut client, b"hello");
        open(&mut server, record.clone()).unwrap();
        assert_eq!(server.open(&mut record.clone()), Err(RecordError::BadRecord));
    }

    #[test]
    fn new_keys_are_used_by_both_sides_after_a_key_update() {
        let (mut client, mut server) = pair(9999);
        let mut slot = [0; 64];
        let length = client.seal_key_update(&mut slot).unwrap();
        assert_eq!(server.open(&mut slot[..length]), Ok(Opened::Control { consumed: length }));
        assert!(!server.owes_key_update(), "it was not asked for");
        assert_eq!(open(&mut server, seal(&mut client, b"after")).unwrap(), b"after");
        assert_eq!(open(&mut client, seal(&mut server, b"back")).unwrap(), b"back");
    }

    #[test]
    fn a_close_is_told_apart_from_a_cut() {
        let (mut client, mut server) = pair(9999);
        let mut slot = [0; 64];
        let length = client.seal_close(&mut slot).unwrap();
        assert_eq!(server.open(&mut slot[..length]), Ok(Opened::Close { consumed: length }));
    }

    #[test]
    fn floods_of_empty_records_and_key_updates_end_the_connection() {
        let (mut client, mut server) = pair(9999);
        let flood = (0..=MAX_IDLE_RECORDS).map(|_| server.open(&mut seal(&mut client, b"")).err()).last().unwrap();
        assert_eq!(flood, Some(RecordError::Flood));
        let (mut client, mut server) = pair(9999);
        let mut update = || {
            let mut slot = [0; 64];
            let length = client.seal_key_update(&mut slot).unwrap();
            server.open(&mut slot[..length]).err()
        };
        assert_eq!((0..=MAX_IDLE_RECORDS).map(|_| update()).last().unwrap(), Some(RecordError::Flood));
    }

    #[test]
    fn what_has_no_place_after_the_handshake_is_an_error() {
        let (mut client, mut server) = pair(9999);
        assert_eq!(server.open(&mut [20, 3, 3, 0, 1, 1]), Err(RecordError::Unexpected(20)), "change_cipher_spec");
        assert_eq!(server.open(&mut [21, 3, 3, 0, 2, 1, 0]), Err(RecordError::Unexpected(21)), "plaintext alert");
        assert!(matches!(server.open(&mut [23, 3, 3, 255, 255]), Err(RecordError::Form(_))), "too long");
        assert!(matches!(server.open(&mut [23, 3, 3, 0, 3]), Err(RecordError::Form(_))), "too short");
        assert!(matches!(server.open(&mut b"GET / HTTP/1.1".to_vec()), Err(RecordError::Form(_))), "plaintext");
        let mut slot = [0; 64];
        slot[HEADER..HEADER + 4].copy_from_slice(&[13, 0, 0, 0]);
        let length = client.seal_as(HANDSHAKE, &mut slot, 4, 0).unwrap();
        assert_eq!(server.open(&mut slot[..length]), Err(RecordError::Unexpected(13)), "certificate request");
    }

    #[test]
    fn keys_that_were_changed_in_one_breath_with_the_handshake_are_not_taken_over() {
        let (client, server) = configs();
        let mut client = rustls::ClientConnection::new(client, "x".try_into().unwrap()).unwrap();
        let mut server = UnbufferedServerConnection::new(server).unwrap();
        let (mut input, mut output, mut secrets) = (Vec::new(), Vec::new(), Secrets::default());
        loop {
            if !client.is_handshaking() {
                client.refresh_traffic_keys().unwrap();
            }
            while client.wants_write() {
                client.write_tls(&mut input).unwrap();
            }
            let (done, heard) = hear(|| advance(&mut server, &mut input, &mut output, &mut Early::default()));
            secrets.add(heard);
            if done.unwrap() == Progress::Done {
                break;
            }
            client.read_tls(&mut &output[..]).unwrap();
            client.process_new_packets().unwrap();
            output.clear();
        }
        let taken = Records::of_server(server, secrets).map(drop);
        assert_eq!(taken, Err(unusable("they were changed in one breath with the handshake")));
    }

    /// rustls' own end, as a foreign peer is.
    fn with_rustls_client() -> (rustls::ClientConnection, Records) {
        let (client, server) = configs();
        let mut client = rustls::ClientConnection::new(client, "x".try_into().unwrap()).unwrap();
        let mut server = UnbufferedServerConnection::new(server).unwrap();
        let (mut input, mut output, mut secrets) = (Vec::new(), Vec::new(), Secrets::default());
        loop {
            client.write_tls(&mut input).unwrap();
            let (done, heard) = hear(|| advance(&mut server, &mut input, &mut output, &mut Early::default()));
            secrets.add(heard);
            client.read_tls(&mut &output[..]).unwrap();
            client.process_new_packets().unwrap();
            output.clear();
            if done.unwrap() == Progress::Done && !client.is_handshaking() {
                return (client, Records::of_server(server, secrets).unwrap());
            }
        }
    }

    #[test]
    fn a_foreign_peer_may_change_keys_and_ask_for_ours() {
        let (mut client, mut records) = with_rustls_client();
        client.refresh_traffic_keys().unwrap();
        client.writer().write_all(b"after").unwrap();
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let Ok(Opened::Control { consumed }) = records.open(&mut bytes) else { panic!("no key update") };
        assert!(records.owes_key_update());
        assert_eq!(open(&mut records, bytes.split_off(consumed)).unwrap(), b"after");
        let mut slot = [0; 64];
        let length = records.seal_key_update(&mut slot).unwrap();
        let reply = [&slot[..length], &seal(&mut records, b"back")].concat();
        client.read_tls(&mut &reply[..]).unwrap();
        client.process_new_packets().unwrap();
        let mut got = [0; 4];
        client.reader().read_exact(&mut got).unwrap();
        assert_eq!(&got, b"back");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let (_, mut server) = pair(9999);
            let _ = server.open(&mut bytes);
        }
    }
}
