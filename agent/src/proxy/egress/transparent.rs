//! Connections that nftables sent here instead of where they were going.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, getsockname, getsockopt, socket, sockopt,
};
use tokio::net::TcpStream;

use crate::dial::tune;

/// Where a connection was going before it was redirected; `None` if it came here of its own will.
pub fn original_destination(tcp: &TcpStream) -> Option<SocketAddr> {
    let here = tcp.local_addr().ok()?;
    let there = match here.ip().to_canonical() {
        IpAddr::V4(_) => getsockopt(tcp, sockopt::OriginalDst).ok().map(|found| {
            let ip = Ipv4Addr::from_bits(u32::from_be(found.sin_addr.s_addr));
            SocketAddr::new(ip.into(), u16::from_be(found.sin_port))
        }),
        IpAddr::V6(_) => getsockopt(tcp, sockopt::Ip6tOriginalDst).ok().map(|found| {
            let ip = Ipv6Addr::from_octets(found.sin6_addr.s6_addr);
            SocketAddr::new(ip.into(), u16::from_be(found.sin6_port))
        }),
    };
    // Without a translation the kernel knows nothing, or says where the connection is now.
    there.filter(|there| *there != SocketAddr::new(here.ip().to_canonical(), here.port()))
}

/// The agent's own connections on their way out. If interception does not exempt the agent they come back to it, and
/// each of them would make the next one.
#[derive(Debug, Default)]
pub struct Own {
    /// From where to where.
    connections: Mutex<HashSet<(SocketAddr, SocketAddr)>>,
}

/// Keeps a connection known as ours, until it is dropped.
#[derive(Debug)]
pub struct Known {
    own: Arc<Own>,
    connection: (SocketAddr, SocketAddr),
}

impl Own {
    /// Whether the connection from `source` to `destination` is one of ours.
    pub fn made(&self, source: SocketAddr, destination: SocketAddr) -> bool {
        let connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        connections.contains(&(source, destination))
    }

    /// Connects to `address`. The connection is known as ours before anybody can see it accepted.
    pub async fn connect(self: &Arc<Own>, address: SocketAddr) -> io::Result<(TcpStream, Known)> {
        let (stream, known) = self.begin(address)?;
        let stream = TcpStream::from_std(stream)?;
        stream.writable().await?;
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
        tune(&stream, address.ip())?;
        Ok((stream, known))
    }

    fn begin(self: &Arc<Own>, address: SocketAddr) -> io::Result<(std::net::TcpStream, Known)> {
        let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let socket = socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)?;
        // On one machine the other end may accept as soon as `connect` has returned: it waits here, in `made`.
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        match connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let local = address_of(&getsockname(socket.as_raw_fd())?).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let connection = (local, address);
        connections.insert(connection);
        Ok((socket.into(), Known { own: self.clone(), connection }))
    }
}

fn address_of(storage: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = storage.as_sockaddr_in().map(|v4| SocketAddr::new(v4.ip().into(), v4.port()));
    v4.or_else(|| storage.as_sockaddr_in6().map(|v6| SocketAddr::new(v6.ip().into(), v6.port())))
}

impl Drop for Known {
    fn drop(&mut self) {
        self.own.connections.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.connection);
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_connection_of_ours_is_known_from_its_first_moment_to_its_end() {
        for ip in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(ip).await.unwrap();
            let to = listener.local_addr().unwrap();
            let own = Arc::new(Own::default());
            let (stream, known) = own.connect(to).await.unwrap();
            let (_accepted, source) = listener.accept().await.unwrap();
            assert!(own.made(source, to));
            drop((stream, known));
            assert!(!own.made(source, to));
            drop(listener);
            assert_eq!(own.connect(to).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
            assert!(own.connections.lock().unwrap().is_empty());
        }
    }

    #[tokio::test]
    async fn who_comes_of_its_own_will_has_no_other_destination() {
        for (ip, to) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1"), ("[::]:0", "127.0.0.1"), ("[::]:0", "::1")] {
            let listener = TcpListener::bind(ip).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let _client = TcpStream::connect((to, port)).await.unwrap();
            let (accepted, _) = listener.accept().await.unwrap();
            assert_eq!(original_destination(&accepted), None, "{ip}");
        }
    }
}
