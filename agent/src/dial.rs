//! From a name to a TCP connection, and what went wrong on the way. Names go through hickory-resolver, never getaddrinfo,
//! which would load modules from the file system of the workload.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use rustls::CertificateError;
use sidewarden_proto::config::HostPort;
use sidewarden_proto::event::RefusalReason;
use sidewarden_proto::tls;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, timeout};

/// An address counts this long, whatever its record says: containers get new ones when they restart.
const MAX_TTL: Duration = Duration::from_secs(5);
/// How long one address of several may take.
pub const ONE_ADDRESS: Duration = Duration::from_secs(2);
/// A peer that is gone without a word is noticed after about this long.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The machine's resolver configuration cannot be used.
    #[error("the system's resolver configuration cannot be used: {0}")]
    Resolver(String),
    /// The name has no address.
    #[error("resolving {host}: {error}")]
    Name {
        /// The name.
        host: String,
        /// What the resolver says.
        error: String,
    },
    /// Nobody answers.
    #[error("dialling {address}: {error}")]
    Connect {
        /// The last address tried.
        address: SocketAddr,
        /// Why not.
        error: io::Error,
    },
    /// All of it together took too long.
    #[error("no answer from {to} within {within:?}")]
    Timeout {
        /// Where to.
        to: String,
        /// The limit.
        within: Duration,
    },
}

/// Resolves names.
#[derive(Clone)]
pub struct Resolver {
    inner: Result<TokioResolver, String>,
}

impl Resolver {
    /// With the system's name servers and hosts file.
    pub fn from_system() -> Resolver {
        let built = TokioResolver::builder_tokio().and_then(|mut builder| {
            set_limits(builder.options_mut());
            builder.build()
        });
        Resolver { inner: built.map_err(|e| e.to_string()) }
    }

    /// With this name server alone, over UDP, and the system's hosts file.
    pub fn with_server(server: SocketAddr) -> Resolver {
        let mut over_udp = ConnectionConfig::udp();
        over_udp.port = server.port();
        let server = NameServerConfig::new(server.ip(), true, vec![over_udp]);
        let config = ResolverConfig::from_name_servers(vec![server]);
        let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        set_limits(builder.options_mut());
        Resolver { inner: builder.build().map_err(|e| e.to_string()) }
    }

    /// The addresses of a name. One with a dot in it is taken as it stands; the system's search list is for the others.
    pub async fn addresses_of(&self, name: &str) -> Result<Vec<IpAddr>, DialError> {
        let whole = name.contains('.') && !name.ends_with('.');
        self.ask(name, &format!("{name}{}", if whole { "." } else { "" })).await
    }

    async fn ask(&self, host: &str, query: &str) -> Result<Vec<IpAddr>, DialError> {
        let fault = |error: String| DialError::Name { host: host.to_owned(), error };
        let resolver = self.inner.as_ref().map_err(|e| DialError::Resolver(e.clone()))?;
        let found = resolver.lookup_ip(query).await.map_err(|e| match e.is_no_records_found() {
            true => fault("it has no address".into()),
            false => fault(e.to_string()),
        })?;
        let addresses: Vec<IpAddr> = found.iter().collect();
        if addresses.is_empty() { Err(fault("it has no address".into())) } else { Ok(addresses) }
    }

    /// The addresses of `to`; an IP address is its own.
    pub async fn lookup(&self, to: &HostPort) -> Result<Vec<SocketAddr>, DialError> {
        if let Ok(ip) = to.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, to.port)]);
        }
        let found = self.ask(&to.host, &to.host).await?;
        Ok(found.iter().map(|ip| SocketAddr::new(*ip, to.port)).collect())
    }

    /// Connects to `to`, trying its addresses in turn.
    pub async fn connect(&self, to: &HostPort, within: Duration) -> Result<TcpStream, DialError> {
        let out_of_time = || DialError::Timeout { to: to.to_string(), within };
        timeout(within, self.connect_any(to, within)).await.unwrap_or_else(|_| Err(out_of_time()))
    }

    async fn connect_any(&self, to: &HostPort, within: Duration) -> Result<TcpStream, DialError> {
        let end = Instant::now() + within;
        let addresses = self.lookup(to).await?;
        let left = end.saturating_duration_since(Instant::now());
        connect_first(&addresses, left, |address| connect_from(None, address)).await
    }
}

fn set_limits(options: &mut ResolverOpts) {
    options.positive_max_ttl = Some(MAX_TTL);
    options.negative_max_ttl = Some(Duration::from_secs(1));
    options.timeout = Duration::from_secs(2);
}

/// What `connect` makes of the first of `addresses` that answers; they are tried in turn.
pub async fn connect_first<T, F: Future<Output = io::Result<T>>>(
    addresses: &[SocketAddr],
    within: Duration,
    connect: impl Fn(SocketAddr) -> F,
) -> Result<T, DialError> {
    let end = Instant::now() + within;
    let mut last = DialError::Timeout { to: "no address at all".into(), within };
    for (i, address) in addresses.iter().enumerate() {
        let left = end.saturating_duration_since(Instant::now());
        let span = if i + 1 < addresses.len() { left.min(ONE_ADDRESS) } else { left };
        match timeout(span, connect(*address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = DialError::Connect { address: *address, error },
            Err(_) => last = DialError::Timeout { to: address.to_string(), within: span },
        }
    }
    Err(last)
}

/// Connects to `address` from `source`, or from whatever the system chooses.
pub async fn connect_from(source: Option<IpAddr>, address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(source) = source {
        // The port is chosen at connect, per destination: otherwise the ports of the source alone are the limit.
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(SocketAddr::new(source, 0))?;
    }
    let stream = socket.connect(address).await?;
    tune(&stream, address.ip())?;
    Ok(stream)
}

/// What every connection of ours has: no delay for small writes, and an end when `other` is gone. On this machine nobody
/// goes without the kernel telling, so that four calls for each connection are saved.
pub fn tune(stream: &TcpStream, other: IpAddr) -> io::Result<()> {
    use nix::sys::socket::{setsockopt, sockopt};
    stream.set_nodelay(true)?;
    if other.to_canonical().is_loopback() {
        return Ok(());
    }
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &(KEEPALIVE.as_secs() as u32))?;
    setsockopt(stream, sockopt::TcpKeepInterval, &10)?;
    setsockopt(stream, sockopt::TcpKeepCount, &6)?;
    Ok(())
}

/// The closed word and the exact text for a TLS handshake that failed, or whose connection did.
pub fn handshake_fault(error: &io::Error) -> (RefusalReason, String) {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(fault) => tls_fault(fault),
        None => (RefusalReason::HandshakeFailed, error.to_string()),
    }
}

/// The same, of TLS itself.
pub fn tls_fault(fault: &rustls::Error) -> (RefusalReason, String) {
    let text = match (tls::fault_of(fault), fault) {
        (Some(ours), _) => ours.to_string(),
        (None, rustls::Error::InvalidCertificate(fault)) => certificate_text(fault),
        (None, rustls::Error::NoCertificatesPresented) => "no certificate was shown".into(),
        (None, other) => other.to_string(),
    };
    (tls::refusal_of(fault), text)
}

fn certificate_text(fault: &CertificateError) -> String {
    match fault {
        // A CA of the same name with another key shows as a bad signature.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "its certificate is signed by a CA that is not trusted here".into()
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "its certificate has ended".into(),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "clock: its certificate is not valid yet by our clock: compare both clocks".into()
        }
        other => format!("its certificate is not accepted: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_is_its_own_and_a_closed_port_an_error_that_names_it() {
        let resolver = Resolver::from_system();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let to = HostPort { host: "127.0.0.1".into(), port: address.port() };
        assert_eq!(resolver.lookup(&to).await.unwrap(), [address]);
        resolver.connect(&to, Duration::from_secs(5)).await.unwrap();
        drop(listener);
        let error = resolver.connect(&to, Duration::from_secs(5)).await.unwrap_err();
        assert!(error.to_string().starts_with(&format!("dialling {address}: ")), "{error}");
    }

    #[test]
    fn a_failed_handshake_is_told_in_words() {
        let check = |fault: rustls::Error, reason, part| {
            let (got, text) = handshake_fault(&io::Error::new(io::ErrorKind::InvalidData, fault));
            assert_eq!((got, text.contains(part)), (reason, true), "{text}");
        };
        check(rustls::Error::NoCertificatesPresented, RefusalReason::NoCertificate, "no certificate");
        check(CertificateError::UnknownIssuer.into(), RefusalReason::UnknownCa, "not trusted here");
        check(CertificateError::NotValidYet.into(), RefusalReason::Expired, "clock: ");
        check(tls::PeerFault::PinMismatch.into(), RefusalReason::UnknownCa, "not the pinned one");
    }

    #[tokio::test]
    async fn the_source_is_the_one_asked_for() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let source: IpAddr = "127.0.0.6".parse().unwrap();
        let _ours = connect_from(Some(source), listener.local_addr().unwrap()).await.unwrap();
        assert_eq!(listener.accept().await.unwrap().1.ip(), source);
    }
}
