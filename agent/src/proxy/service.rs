//! The workload's own end: its port or its Unix socket, and what it is told about who comes.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::header::{Header, TLV_AUTHORITY, TLV_SSL, Tlv};
use crate::config::{Inbound, ProxyProtocol, Service};
use crate::dial::connect_from;

/// Our own TLV: the verified name of the peer, its SPIFFE ID or DNS names, as in events.
pub const TLV_PEER: u8 = 0xE0;
/// Within [`TLV_SSL`]: the version of TLS, as text.
const SSL_VERSION: u8 = 0x21;
/// Within [`TLV_SSL`]: over TLS, with a certificate, shown on this very connection.
const SSL_WITH_CERTIFICATE: u8 = 0x01 | 0x02 | 0x04;

/// Who comes, as the workload may be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Where from.
    pub source: SocketAddr,
    /// Where it connected to.
    pub destination: SocketAddr,
    /// Who, if it proved it.
    pub proven: Option<Proven>,
}

/// What a guest has proved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proven {
    /// Its name.
    pub peer: String,
    /// The version of TLS.
    pub tls_version: String,
    /// The host name it asked for.
    pub server_name: Option<String>,
}

/// Connects to the workload and tells it who comes, where that is wanted.
pub async fn dial(config: &Inbound, guest: &Guest, within: Duration) -> Result<TcpStream, String> {
    let from = match &config.to {
        Service::Tcp(to) => format!("{to} from {}", config.dial_from),
        unix @ Service::Unix(_) => unix.to_string(),
    };
    match timeout(within, connect(config, guest)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(format!("dialling {from}: {error}")),
        Err(_) => Err(format!("dialling {from}: no answer within {within:?}")),
    }
}

async fn connect(config: &Inbound, guest: &Guest) -> io::Result<TcpStream> {
    let mut stream = match &config.to {
        Service::Tcp(address) => connect_from(Some(config.dial_from), *address).await?,
        Service::Unix(path) => connect_unix(path).await?,
    };
    let greeting = greeting(config.proxy_protocol, guest);
    if !greeting.is_empty() {
        stream.write_all(&greeting).await?;
    }
    Ok(stream)
}

/// What moves bytes asks nothing of a stream that only TCP has, so one kind of stream is enough for both. Unix sockets
/// know no reset, though: what is cut looks like an end to a workload behind one.
async fn connect_unix(path: &Path) -> io::Result<TcpStream> {
    let stream = UnixStream::connect(path).await?;
    TcpStream::from_std(std::net::TcpStream::from(OwnedFd::from(stream.into_std()?)))
}

/// The PROXY header in front of a connection to the workload.
fn greeting(version: ProxyProtocol, guest: &Guest) -> Vec<u8> {
    let Guest { source, destination, proven } = guest;
    let header = Header::tcp(*source, *destination);
    match version {
        ProxyProtocol::Off => Vec::new(),
        ProxyProtocol::V1 => header.encode_v1(),
        ProxyProtocol::V2 => {
            let tlvs = proven.as_ref().map(tlvs).unwrap_or_default();
            // Without the names if they are longer than a header can be, which takes a certificate of 16 KiB.
            Header { tlvs, ..header.clone() }.encode_v2(false).or_else(|_| header.encode_v2(false)).unwrap_or_default()
        }
    }
}

fn tlvs(proven: &Proven) -> Vec<Tlv> {
    let Proven { peer, tls_version, server_name } = proven;
    let authority = server_name.as_ref().map(|name| Tlv { kind: TLV_AUTHORITY, value: name.clone().into_bytes() });
    // One byte of flags, four for "verified", and the version as a TLV within.
    let length = (tls_version.len() as u16).to_be_bytes();
    let ssl = [&[SSL_WITH_CERTIFICATE, 0, 0, 0, 0, SSL_VERSION][..], &length, tls_version.as_bytes()].concat();
    let own = [Tlv { kind: TLV_SSL, value: ssl }, Tlv { kind: TLV_PEER, value: peer.clone().into_bytes() }];
    authority.into_iter().chain(own).collect()
}

#[cfg(test)]
mod tests {
    use super::super::header::{Parsed, parse};
    use super::*;

    fn guest(proven: Option<Proven>) -> Guest {
        let (source, destination) = ("10.0.0.7:12345".parse().unwrap(), "10.0.0.9:8443".parse().unwrap());
        Guest { source, destination, proven }
    }

    fn proven(peer: &str) -> Option<Proven> {
        let (tls_version, server_name) = ("TLSv1_3".to_owned(), Some("orders.example".to_owned()));
        Some(Proven { peer: peer.to_owned(), tls_version, server_name })
    }

    fn read(bytes: &[u8]) -> Header {
        match parse(bytes) {
            Parsed::Header(header, length) if length == bytes.len() => header,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_workload_is_told_who_comes_in_the_words_it_wants() {
        let web = guest(proven("spiffe://td/shop/web"));
        assert!(greeting(ProxyProtocol::Off, &web).is_empty());
        assert_eq!(greeting(ProxyProtocol::V1, &web), b"PROXY TCP4 10.0.0.7 10.0.0.9 12345 8443\r\n");
        let header = read(&greeting(ProxyProtocol::V2, &web));
        assert_eq!(header.source(), Some(web.source));
        assert_eq!(header.tlv(TLV_PEER), Some(&b"spiffe://td/shop/web"[..]));
        assert_eq!(header.tlv(TLV_AUTHORITY), Some(&b"orders.example"[..]));
        assert_eq!(header.tlv(TLV_SSL), Some(&b"\x07\0\0\0\0\x21\0\x07TLSv1_3"[..]));
    }

    #[test]
    fn who_proved_nothing_is_told_by_address_alone() {
        let header = read(&greeting(ProxyProtocol::V2, &guest(None)));
        assert_eq!((header.source(), header.tlvs), (Some("10.0.0.7:12345".parse().unwrap()), vec![]));
    }

    #[test]
    fn a_name_longer_than_a_header_is_left_out() {
        let header = read(&greeting(ProxyProtocol::V2, &guest(proven(&"x".repeat(20_000)))));
        assert_eq!((header.source().is_some(), header.tlvs), (true, vec![]));
    }
}
