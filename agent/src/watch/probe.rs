//! Asks a listener whether it speaks TLS: the beginning of a handshake, and what comes back. A thread of its own, because
//! an answer may take seconds and the watch has none to spare.
//!
//! A server that speaks first is listened to and not spoken to, so that it sees a client that hangs up, no more. Each
//! question is one connection, which ends with the first bytes of the answer.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use nix::ifaddrs::getifaddrs;
use tokio_util::sync::CancellationToken;

use super::exposure::Key;
use crate::facts::{Listener, Speech, reached_at};
use crate::proxy::handshake::shown;
use sidewarden_proto::backoff::Random;

/// To connect; everything asked is on this machine.
const CONNECT: Duration = Duration::from_secs(1);
/// A server that speaks first has done so by then.
const SPEAKS_FIRST: Duration = Duration::from_millis(300);
/// To answer a hello.
const ANSWER: Duration = Duration::from_secs(3);
/// How often is looked whether the agent ends.
const SLICE: Duration = Duration::from_millis(50);
/// Questions that wait. More are asked later.
const WAITING: usize = 64;
/// Of an answer, what is read: a record's head and the kind of its first message.
const ENOUGH: usize = 6;

/// The thread that asks.
#[derive(Debug)]
pub struct Prober {
    questions: Option<SyncSender<Listener>>,
    answers: Receiver<(Key, Speech)>,
    thread: Option<JoinHandle<()>>,
}

impl Prober {
    /// Starts the thread; it ends soon after `shutdown`, or when this is dropped.
    pub fn start(random: Random, shutdown: CancellationToken) -> io::Result<Prober> {
        let (questions, asked) = sync_channel::<Listener>(WAITING);
        let (answer, answers) = sync_channel(WAITING * 2);
        let thread = Builder::new().name("probe".into()).spawn(move || {
            for listener in asked {
                let speech = ask(reached_at(&listener, &own_addresses()), random, &shutdown);
                // Nobody takes answers any more: the watch has ended.
                if shutdown.is_cancelled() || answer.send(((listener.protocol, listener.address), speech)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Prober { questions: Some(questions), answers, thread: Some(thread) })
    }

    /// Has `listener` asked; false if there is no room for one more question.
    pub fn ask(&self, listener: Listener) -> bool {
        let Some(questions) = &self.questions else { return false };
        !matches!(questions.try_send(listener), Err(TrySendError::Full(_)))
    }

    /// The answers that have come.
    pub fn answers(&self) -> impl Iterator<Item = (Key, Speech)> {
        self.answers.try_iter()
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.questions = None;
        while self.answers.try_recv().is_ok() {}
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the probe's thread ended by a panic");
        }
    }
}

fn own_addresses() -> Vec<IpAddr> {
    let of = |storage: nix::sys::socket::SockaddrStorage| {
        let v4 = storage.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| storage.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    };
    let interfaces = getifaddrs().map_err(|error| tracing::warn!(%error, "the network addresses cannot be listed"));
    interfaces.into_iter().flatten().filter_map(|interface| interface.address.and_then(of)).collect()
}

fn ask(address: SocketAddr, random: Random, shutdown: &CancellationToken) -> Speech {
    let mut stream = match TcpStream::connect_timeout(&address, CONNECT) {
        Ok(stream) => stream,
        Err(error) => return Speech::Unasked(format!("connecting to {address}: {error}")),
    };
    match converse(&mut stream, random, shutdown) {
        Ok(speech) => speech,
        Err(error) if is_hang_up(&error) => Speech::Closed,
        Err(error) => Speech::Unasked(error.to_string()),
    }
}

fn is_hang_up(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof)
}

fn converse(stream: &mut TcpStream, random: Random, shutdown: &CancellationToken) -> io::Result<Speech> {
    stream.set_read_timeout(Some(SLICE))?;
    stream.set_write_timeout(Some(ANSWER))?;
    match hear(stream, 1, SPEAKS_FIRST, shutdown)? {
        Heard::End => return Ok(Speech::Closed),
        Heard::Bytes(said) => return Ok(Speech::First(shown(&said))),
        Heard::Nothing => {}
    }
    let mut secret = [0; 64];
    random(&mut secret);
    stream.write_all(&hello(&secret))?;
    Ok(match hear(stream, ENOUGH, ANSWER, shutdown)? {
        Heard::End => Speech::Closed,
        Heard::Nothing => Speech::Silent,
        Heard::Bytes(said) => speech(&said),
    })
}

/// What was heard in a while.
enum Heard {
    Nothing,
    End,
    Bytes(Vec<u8>),
}

/// Listens until there are `enough` bytes, the end, or no time left. More bytes than asked for may come along.
fn hear(stream: &mut TcpStream, enough: usize, within: Duration, shutdown: &CancellationToken) -> io::Result<Heard> {
    let end = Instant::now() + within;
    let (mut said, mut buffer) = (Vec::new(), [0; 256]);
    while said.len() < enough && Instant::now() < end && !shutdown.is_cancelled() {
        match stream.read(&mut buffer) {
            Ok(0) if said.is_empty() => return Ok(Heard::End),
            Ok(0) => break,
            Ok(count) => said.extend_from_slice(&buffer[..count]),
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(if said.is_empty() { Heard::Nothing } else { Heard::Bytes(said) })
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

/// What an answer to a hello says: a ServerHello, or an alert, is TLS; everything else is not.
fn speech(said: &[u8]) -> Speech {
    match said {
        [22, 3, _, _, _, 2, ..] | [21, 3, _, 0, 2, 1 | 2, ..] => Speech::Tls,
        other => Speech::Plain(shown(other)),
    }
}

/// A ClientHello for TLS 1.2 and 1.3 with what every server has one of, and no host name. `secret` is random; what of it
/// stands for a public key is a valid one, whatever it is.
fn hello(secret: &[u8; 64]) -> Vec<u8> {
    const CIPHERS: [u16; 13] =
        [0x1301, 0x1302, 0x1303, 0xC02B, 0xC02F, 0xC02C, 0xC030, 0xCCA9, 0xCCA8, 0xC013, 0xC014, 0x009C, 0x002F];
    const GROUPS: [u16; 3] = [0x001D, 0x0017, 0x0018];
    const SIGNATURES: [u16; 9] = [0x0403, 0x0503, 0x0603, 0x0804, 0x0805, 0x0806, 0x0401, 0x0501, 0x0807];
    let (random, key) = secret.split_at(32);
    let words = |words: &[u16]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<u8>>();
    let extensions = [
        extension(10, &sized(2, &words(&GROUPS))),
        extension(11, &[1, 0]),
        extension(13, &sized(2, &words(&SIGNATURES))),
        extension(43, &sized(1, &words(&[0x0304, 0x0303]))),
        extension(51, &sized(2, &[&[0, 0x1D][..], &sized(2, key)].concat())),
    ];
    let body = [
        &[3, 3][..],
        random,
        &sized(1, &[]),
        &sized(2, &words(&CIPHERS)),
        &sized(1, &[0]),
        &sized(2, &extensions.concat()),
    ];
    let message = [&[1][..], &sized(3, &body.concat())].concat();
    [&[22, 3, 1][..], &sized(2, &message)].concat()
}

fn extension(kind: u16, body: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &sized(2, body)].concat()
}

/// `bytes` behind their length in so many bytes.
fn sized(width: usize, bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_be_bytes();
    [&length[8 - width..], bytes].concat()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::proxy::handshake::{Opening, classify};

    fn zeros(bytes: &mut [u8]) {
        bytes.fill(7);
    }

    /// What is said of a server that does `serve` with its one client.
    fn asked(serve: impl FnOnce(TcpStream) + Send + 'static) -> Speech {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || serve(listener.accept().unwrap().0));
        let speech = ask(address, zeros, &CancellationToken::new());
        server.join().unwrap();
        speech
    }

    fn after_hello(answer: &'static [u8]) -> Speech {
        asked(move |mut stream| {
            let mut hello = [0; 512];
            assert!(stream.read(&mut hello).unwrap() > 100);
            stream.write_all(answer).unwrap();
        })
    }

    #[test]
    fn the_hello_is_one() {
        let hello = hello(&[7; 64]);
        assert!(matches!(classify(&hello), Opening::Tls(asks) if asks.offers_1_3), "{hello:02x?}");
    }

    #[test]
    fn every_kind_of_server_is_told_by_its_answer() {
        assert_eq!(after_hello(&[22, 3, 3, 0, 90, 2, 0, 0]), Speech::Tls);
        assert_eq!(after_hello(&[21, 3, 3, 0, 2, 2, 40]), Speech::Tls, "it refuses us, in TLS");
        assert_eq!(
            after_hello(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
            Speech::Plain("`HTTP/1.1 400 Bad Request`".into())
        );
        assert_eq!(after_hello(b"-"), Speech::Plain("`-`".into()));
        assert_eq!(after_hello(&[22, 3]), Speech::Plain("bytes 16 03".into()), "half an answer is none");
        assert_eq!(after_hello(b""), Speech::Closed);
        assert_eq!(asked(drop), Speech::Closed);
    }

    #[test]
    fn a_server_that_speaks_first_is_not_spoken_to() {
        let speech = asked(|mut stream| {
            stream.write_all(b"220 mail.example ESMTP\r\n").unwrap();
            assert_eq!(stream.read(&mut [0; 16]).unwrap_or(0), 0, "it was spoken to");
        });
        assert_eq!(speech, Speech::First("`220 mail.example ESMTP`".into()));
    }

    #[test]
    fn a_port_that_nobody_has_cannot_be_asked() {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(
            matches!(ask(address, zeros, &CancellationToken::new()), Speech::Unasked(why) if why.contains("refused"))
        );
    }

    #[test]
    fn the_thread_answers_and_ends_with_its_owner() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let prober = Prober::start(zeros, CancellationToken::new()).unwrap();
        assert!(prober.ask(Listener { address, ..Listener::default() }));
        drop(listener.accept().unwrap());
        let answer = prober.answers.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!(answer.0.1, address);
        drop(prober);
    }
}
