//! A connection whose handshake is done, in the form that its version of TLS allows.
//!
//! TLS 1.3 is driven through rustls' unbuffered API and then moved by [`super::flow`]; TLS 1.2 and foreign servers go
//! through tokio-rustls and are copied.

use std::io;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::UnbufferedServerConnection;
use rustls::{AlertDescription, ClientConfig, CommonState, ServerConfig};
use sidewarden_proto::event::RefusalReason;
use sidewarden_proto::identity::{Peer, Usage};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{Trust, peer_with, unverified_peer};
use sidewarden_proto::traffic::{Secrets, hear};
use sidewarden_proto::wire::ALPN_STREAMS;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::accounting::Secured;
use super::channel::Channel;
use super::flow::Flow;
use super::handshake::{Replayed, part_soon};
use super::pump::{Early, Handshaking, Progress, advance};
use super::record::Records;
use super::relay::{Mover, Side, copying};
use super::secured;
use crate::dial::{handshake_fault, tls_fault};
use crate::identity::Identity;
use crate::policy::Rules;

/// A peer that says this much before its handshake is done wants something else.
const MAX_FLIGHT: usize = 256 << 10;

/// Why there was no handshake: the closed word and the exact text.
pub type Fault = (RefusalReason, String);

/// What a peer is known by.
#[derive(Clone, Copy, Debug)]
pub struct Proof<'a> {
    /// Whom its chain was verified with.
    pub trust: &'a Trust,
    /// Nobody looked at its certificate (`insecure_trust_all`): it is a key, until then.
    pub insecure: Option<Timestamp>,
}

/// Why a handshake of ours came to nothing.
#[derive(Debug)]
pub struct NotConnected {
    /// As people are told.
    pub fault: Fault,
    /// The server is no agent: it knows no protocol that we offered, and has ended the handshake for that alone.
    pub wants_other_alpn: bool,
}

impl From<Fault> for NotConnected {
    fn from(fault: Fault) -> NotConnected {
        NotConnected { fault, wants_other_alpn: false }
    }
}

impl From<&rustls::Error> for NotConnected {
    fn from(error: &rustls::Error) -> NotConnected {
        let wants_other_alpn = matches!(error, rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol));
        NotConnected { fault: tls_fault(error), wants_other_alpn }
    }
}

impl From<NotConnected> for Fault {
    fn from(error: NotConnected) -> Fault {
        error.fault
    }
}

/// The peer's side of a connection, authenticated.
pub struct Secure {
    /// Who is there.
    pub peer: Peer,
    /// How it was settled.
    pub how: Secured,
    /// The chain that proves it, leaf first.
    pub shown: Arc<[CertificateDer<'static>]>,
    /// Nobody has looked at that chain.
    pub insecure: bool,
    stream: Stream,
    carries_streams: bool,
}

enum Stream {
    Records(Box<(Channel, Early)>),
    Accepted(Box<tokio_rustls::server::TlsStream<Replayed<TcpStream>>>),
    Connected(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

impl Secure {
    /// The server's half of a TLS 1.3 handshake that begins with `hello`.
    pub async fn accept(
        mut socket: TcpStream,
        mut hello: Vec<u8>,
        config: Arc<ServerConfig>,
        proof: Proof<'_>,
    ) -> Result<Secure, Fault> {
        let mut connection = UnbufferedServerConnection::new(config).map_err(|error| tls_fault(&error))?;
        let (early, secrets) = drive(&mut connection, &mut socket, &mut hello).await?;
        let (peer, how, shown) = settled(&connection, Usage::Client, proof, &socket)?;
        let carries_streams = connection.alpn_protocol() == Some(ALPN_STREAMS);
        let records = Records::of_server(connection, secrets).map_err(unusable)?;
        let channel = Channel::new(records, socket, hello);
        Ok(Secure {
            peer,
            how,
            shown,
            insecure: proof.insecure.is_some(),
            stream: Stream::Records(Box::new((channel, early))),
            carries_streams,
        })
    }

    /// The server's half of a TLS 1.2 handshake that begins with `hello`.
    pub async fn accept_1_2(
        socket: TcpStream,
        hello: Vec<u8>,
        config: Arc<ServerConfig>,
        proof: Proof<'_>,
    ) -> Result<Secure, Fault> {
        match TlsAcceptor::from(config).accept(Replayed::new(hello, socket)).into_fallible().await {
            Ok(stream) => {
                let (socket, connection) = stream.get_ref();
                let (peer, how, shown) = settled(connection, Usage::Client, proof, socket.inner())?;
                Ok(Secure {
                    peer,
                    how,
                    shown,
                    insecure: proof.insecure.is_some(),
                    stream: Stream::Accepted(Box::new(stream)),
                    carries_streams: false,
                })
            }
            Err((error, mut rest)) => {
                // rustls has written its alert; the client should get to read it.
                part_soon(&mut rest, &[]).await;
                Err(handshake_fault(&error))
            }
        }
    }

    /// The client's half of a TLS 1.3 handshake with another agent. Its identity says who it is; a host name says which
    /// of its services is meant.
    pub async fn connect(
        mut socket: TcpStream,
        config: Arc<ClientConfig>,
        proof: Proof<'_>,
        host: Option<&str>,
    ) -> Result<Secure, NotConnected> {
        let address = socket.peer_addr().map_err(|error| cut(&error))?;
        let host = host.and_then(|host| ServerName::try_from(host.to_owned()).ok());
        let name = host.unwrap_or_else(|| ServerName::from(address.ip()));
        let mut connection = UnbufferedClientConnection::new(config, name).map_err(|error| tls_fault(&error))?;
        let mut rest = Vec::new();
        let (early, secrets) = drive(&mut connection, &mut socket, &mut rest).await?;
        let (peer, how, shown) = settled(&connection, Usage::Server, proof, &socket)?;
        let carries_streams = connection.alpn_protocol() == Some(ALPN_STREAMS);
        let records = Records::of_client(connection, secrets).map_err(unusable)?;
        let channel = Channel::new(records, socket, rest);
        Ok(Secure {
            peer,
            how,
            shown,
            insecure: proof.insecure.is_some(),
            stream: Stream::Records(Box::new((channel, early))),
            carries_streams,
        })
    }

    /// The client's half of a handshake with a foreign server, which may need its name to choose a certificate.
    pub async fn connect_foreign(
        socket: TcpStream,
        config: Arc<ClientConfig>,
        proof: Proof<'_>,
        name: ServerName<'static>,
    ) -> Result<Secure, Fault> {
        let stream = TlsConnector::from(config).connect(name, socket).await.map_err(|error| handshake_fault(&error))?;
        let (socket, connection) = stream.get_ref();
        let (peer, how, shown) = settled(connection, Usage::Server, proof, socket)?;
        Ok(Secure {
            peer,
            how,
            shown,
            insecure: proof.insecure.is_some(),
            stream: Stream::Connected(Box::new(stream)),
            carries_streams: false,
        })
    }

    /// What the peer is judged by.
    pub fn rules(&self, rules: &Arc<Rules>) -> Arc<Rules> {
        match self.insecure {
            true => Arc::new(Rules::Anybody(Box::new(Rules::clone(rules)))),
            false => rules.clone(),
        }
    }

    /// Its chain, where that may have to be judged again.
    pub fn chain_for(&self, identity: &Identity) -> Option<Arc<[CertificateDer<'static>]>> {
        (!self.insecure && identity.may_judge_again(&self.peer)).then(|| self.shown.clone())
    }

    /// Ends the connection with a fatal `alert`, where the form of the stream allows one, and otherwise with a reset.
    pub async fn refuse(self, alert: u8) {
        match self.stream {
            Stream::Records(mut stream) => {
                let channel = &mut stream.0;
                let mut slot = [0; 64];
                match channel.records.seal_alert(alert, &mut slot) {
                    Ok(length) => part_soon(&mut channel.socket, &slot[..length]).await,
                    Err(_) => channel.socket.reset_on_drop(),
                }
            }
            Stream::Accepted(stream) => stream.reset_on_drop(),
            Stream::Connected(stream) => stream.reset_on_drop(),
        }
    }

    /// The connection and what came right behind its handshake, if both ends have agreed to carry streams on it.
    pub fn into_streams(self) -> Result<(Channel, Early), Box<Secure>> {
        match self.stream {
            Stream::Records(stream) if self.carries_streams => Ok(*stream),
            _ => Err(Box::new(self)),
        }
    }

    /// What moves its bytes to `workload` and back.
    pub fn into_mover(self, workload: TcpStream) -> Box<dyn Mover + Send> {
        match self.stream {
            Stream::Records(stream) => {
                let (channel, early) = *stream;
                Box::new(Flow::new(channel, workload, early))
            }
            Stream::Accepted(stream) => Box::new(copying(workload, *stream)),
            Stream::Connected(stream) => Box::new(copying(workload, *stream)),
        }
    }
}

type Settled = (Peer, Secured, Arc<[CertificateDer<'static>]>);

fn settled(connection: &CommonState, usage: Usage, proof: Proof<'_>, socket: &TcpStream) -> Result<Settled, Fault> {
    let address = socket.peer_addr().map_err(|error| cut(&error))?;
    let chain = connection.peer_certificates().unwrap_or_default();
    let peer = match proof.insecure {
        Some(until) => unverified_peer(chain, until),
        None => peer_with(chain, proof.trust, usage),
    };
    let peer = peer.map_err(|fault| (RefusalReason::BadCertificate, fault.to_string()))?;
    let shown = chain.iter().map(|cert| cert.clone().into_owned()).collect();
    Ok((peer, secured(connection, address), shown))
}

fn unusable(error: super::record::RecordError) -> Fault {
    (RefusalReason::HandshakeFailed, error.to_string())
}

fn cut(error: &io::Error) -> Fault {
    (RefusalReason::HandshakeFailed, format!("the connection broke: {error}"))
}

/// Drives a handshake to its end. What is left in `input` then is the begin of a record.
async fn drive<C: Handshaking>(
    connection: &mut C,
    socket: &mut TcpStream,
    input: &mut Vec<u8>,
) -> Result<(Early, Secrets), NotConnected> {
    let (mut output, mut early, mut secrets) = (Vec::new(), Early::default(), Secrets::default());
    loop {
        let (progress, heard) = hear(|| advance(connection, input, &mut output, &mut early));
        secrets.add(heard);
        if let Err(error) = progress {
            part_soon(socket, &output).await;
            return Err(NotConnected::from(&error));
        }
        socket.write_all(&output).await.map_err(|error| cut(&error))?;
        output.clear();
        if progress == Ok(Progress::Done) {
            return Ok((early, secrets));
        }
        if input.len() > MAX_FLIGHT {
            return Err((RefusalReason::HandshakeFailed, "its handshake has no end".into()).into());
        }
        if socket.read_buf(input).await.map_err(|error| cut(&error))? == 0 {
            return Err((RefusalReason::HandshakeFailed, "it closed within the handshake".into()).into());
        }
    }
}
