//! Where the workload goes besides its peers: it asks, by HTTP CONNECT, a request for `http://…` or SOCKS5, or nftables
//! brings its connection here; policy decides; what is dialled is the address that was judged.
//!
//! accept -> what is asked for (http, socks5, transparent) -> may it go there (policy) -> look up -> may it go there ->
//! dial, or ask the upstream proxy to (upstream) -> relay -> one event (accounting).

mod forward;
mod http;
mod socks5;
mod transparent;
mod upstream;

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sidewarden_proto::event::{Direction, RefusalReason};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::accounting::{Pair, Refusal, Secured, Traffic};
use super::handshake::{Opening, Replayed, classify, part_soon, shown};
use super::relay::{Bounds, End, Mover, Outcome, Side, copying, relay};
use super::unproven::{Entered, What};
use super::{Room, Shared, accept_each};
use crate::config;
use crate::dial::{DialError, connect_first};
use crate::policy::egress::{self as policy, Host, List, Target, Way};
use forward::{Answering, Asking};
use http::{Asked, HeadScan, MAX_HEAD, Request};
use socks5::{Answer, Read};
pub use transparent::original_destination;
use transparent::{Known, Own};
pub use upstream::{CredentialsError, read_credentials};
use upstream::{Upstream, UpstreamError};

/// Most addresses of one name that an upstream proxy is asked for, one after the other.
const MAX_ASKED_FOR: usize = 4;
/// The answer to a CONNECT that succeeded.
const ESTABLISHED: &[u8] = b"HTTP/1.1 200 Connection established\r\n\r\n";

/// What all egress listeners share.
pub struct Gate {
    shared: Arc<Shared>,
    policy: List,
    upstream: Option<Upstream>,
    own: Arc<Own>,
}

impl Gate {
    /// As the configuration has it.
    pub fn new(shared: Arc<Shared>, config: &config::Egress) -> Gate {
        if config.allow.rules.is_empty() {
            tracing::warn!("egress.allow is empty: everything that the workload asks for is refused");
        }
        let upstream = config.upstream.clone().map(|to| Upstream {
            to,
            credentials_file: config.upstream_credentials_file.clone(),
            resolves: config.upstream_resolves,
        });
        Gate { shared, policy: config.allow.clone(), upstream, own: Arc::default() }
    }
}

/// How connections come to a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Clients know it as their proxy.
    Explicit,
    /// nftables redirects them.
    Transparent,
}

struct Door {
    gate: Arc<Gate>,
    kind: Kind,
    name: String,
}

/// Serves one listener.
pub async fn serve(gate: Arc<Gate>, listener: TcpListener, kind: Kind) {
    let name = listener.local_addr().map_or_else(|_| "egress".into(), |address| address.to_string());
    let (shared, door) = (gate.shared.clone(), Arc::new(Door { gate, kind, name: name.clone() }));
    accept_each(shared, listener, Direction::Egress, name, |tcp, source, room| {
        let door = door.clone();
        async move { door.serve_one(tcp, source, room).await }
    })
    .await;
}

/// What is asked for.
struct Wanted {
    target: Target,
    /// The request to be sent on, where it is no tunnel.
    request: Option<Request>,
    /// What the client sent beyond its question.
    rest: Vec<u8>,
}

impl Wanted {
    fn tunnel(target: Target, rest: Vec<u8>) -> Wanted {
        Wanted { target, request: None, rest }
    }
}

/// What was reached.
struct There {
    stream: Replayed<TcpStream>,
    /// Which address, for the event.
    address: String,
    /// The head to send in place of the client's, if not the usual one.
    head: Option<Vec<u8>>,
    _known: Known,
}

/// Why there is no way out.
#[derive(Debug)]
struct Refused {
    reason: RefusalReason,
    detail: String,
    /// Where it wanted to go, as far as that is known.
    target: Option<Target>,
    /// The line of the list that would allow it.
    rule: Option<String>,
    /// What a SOCKS client is told.
    answer: Answer,
}

impl Refused {
    fn new(reason: RefusalReason, detail: impl Into<String>) -> Refused {
        use RefusalReason as R;
        let answer = match reason {
            R::EgressNotListed | R::EgressPrivateAddress | R::Quarantined => Answer::NotAllowed,
            R::NameUnresolved | R::Unreachable => Answer::HostUnreachable,
            _ => Answer::Failure,
        };
        Refused { reason, detail: detail.into(), target: None, rule: None, answer }
    }

    fn bad(detail: impl Into<String>) -> Refused {
        Refused::new(RefusalReason::BadRequest, detail)
    }

    fn to(self, target: &Target) -> Refused {
        Refused { target: Some(target.clone()), ..self }
    }

    fn status(&self) -> u16 {
        use RefusalReason as R;
        match self.reason {
            R::EgressNotListed | R::EgressPrivateAddress | R::Quarantined => 403,
            R::BadRequest => 400,
            R::RequestTimeout => 408,
            _ => 502,
        }
    }

    /// For whoever reads the answer.
    fn sentence(&self) -> String {
        let Refused { detail, target, rule, .. } = self;
        match (target, rule) {
            (Some(target), Some(rule)) => format!(
                "No egress to {target}: {detail}. To allow it, add \"{rule}\" to `allow` under [egress] in the settings of this service's agent."
            ),
            (Some(target), None) => format!("No egress to {target}: {detail}."),
            (None, _) => {
                format!("This proxy takes HTTP CONNECT, requests for http:// and SOCKS5, and this was {detail}.")
            }
        }
    }
}

impl From<policy::Refused> for Refused {
    fn from(refused: policy::Refused) -> Refused {
        let policy::Refused { reason, detail, rule } = refused;
        Refused { rule: Some(rule), ..Refused::new(reason, detail) }
    }
}

impl From<DialError> for Refused {
    fn from(error: DialError) -> Refused {
        let (reason, answer) = match &error {
            DialError::Name { .. } | DialError::Resolver(_) => (RefusalReason::NameUnresolved, Answer::HostUnreachable),
            DialError::Connect { error, .. } if error.kind() == io::ErrorKind::ConnectionRefused => {
                (RefusalReason::Unreachable, Answer::Refused)
            }
            _ => (RefusalReason::Unreachable, Answer::HostUnreachable),
        };
        Refused { answer, ..Refused::new(reason, error.to_string()) }
    }
}

impl From<UpstreamError> for Refused {
    fn from(error: UpstreamError) -> Refused {
        Refused::new(RefusalReason::UpstreamRefused, error.to_string())
    }
}

/// What the client speaks, and so how it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tongue {
    /// Nothing that could be told in: its connection is reset.
    None,
    /// SOCKS5, its greeting not answered yet.
    Greeting,
    /// SOCKS5.
    Socks,
    /// HTTP, and whether an answer may have a body.
    Http { with_body: bool },
}

impl Tongue {
    async fn refuse(self, mut tcp: TcpStream, refused: &Refused) {
        match self {
            Tongue::None => tcp.reset_on_drop(),
            Tongue::Greeting => part_soon(&mut tcp, &socks5::NO_METHOD).await,
            Tongue::Socks => part_soon(&mut tcp, &refused.answer.bytes()).await,
            Tongue::Http { with_body } => {
                part_soon(&mut tcp, &http::own_answer(refused.status(), &refused.sentence(), with_body)).await;
            }
        }
    }
}

impl Door {
    async fn serve_one(&self, mut tcp: TcpStream, source: SocketAddr, room: Room) {
        let mut tongue = Tongue::None;
        let reached = match self.listen_to(&mut tcp, source, &mut tongue).await {
            Ok(wanted) => {
                let reached = self.gate.reach(&wanted).await;
                reached.map_err(|refused| refused.to(&wanted.target)).map(|(there, live)| (wanted, there, live))
            }
            Err(refused) => Err(refused),
        };
        let Room { _connection, handshake } = room;
        drop(handshake);
        match reached {
            Ok((wanted, there, live)) => self.relay(tcp, source, tongue, (wanted, there), live).await,
            Err(refused) => {
                self.book(&refused, source);
                tongue.refuse(tcp, &refused).await;
            }
        }
    }

    fn book(&self, refused: &Refused, source: SocketAddr) {
        let Refused { reason, detail, target, .. } = refused;
        let listener = target.as_ref().map_or_else(|| self.name.clone(), Target::to_string);
        self.gate.shared.ledger.refused(Refusal {
            direction: Direction::Egress,
            reason: *reason,
            detail: detail.clone(),
            listener,
            source: Some(source),
            peer: String::new(),
        });
    }

    async fn listen_to(&self, tcp: &mut TcpStream, source: SocketAddr, tongue: &mut Tongue) -> Result<Wanted, Refused> {
        let within = self.gate.shared.timeouts.handshake;
        let source = SocketAddr::new(source.ip().to_canonical(), source.port());
        if let Some(here) = tcp.local_addr().ok().filter(|here| self.gate.own.made(source, *here)) {
            let detail = format!("the agent's own connection to {here} came back to it: is it its own upstream?");
            return Err(Refused::new(RefusalReason::EgressLoop, detail));
        }
        if self.kind == Kind::Transparent {
            return self.gate.redirected(tcp, source, within).await;
        }
        let late = || Refused::new(RefusalReason::RequestTimeout, format!("not finished within {within:?}"));
        timeout(within, asked_by(tcp, tongue)).await.unwrap_or_else(|_| Err(late()))
    }

    async fn relay(
        &self,
        mut tcp: TcpStream,
        source: SocketAddr,
        tongue: Tongue,
        (wanted, there): (Wanted, There),
        live: Entered,
    ) {
        let Wanted { target, request, rest } = wanted;
        let There { stream, address, head, _known } = there;
        let shared = &self.gate.shared;
        let pair = Pair { direction: Direction::Egress, peer: target.to_string(), listener: self.name.clone() };
        let how = Secured { address, ..Secured::default() };
        let yes: &[u8] = match (tongue, &request) {
            (Tongue::Socks, _) => &Answer::Succeeded.bytes(),
            (Tongue::Http { .. }, None) => ESTABLISHED,
            _ => &[],
        };
        // So few bytes always fit into a fresh socket: nothing is waited for.
        if let Err(error) = tcp.write_all(yes).await {
            shared.ledger.opened(&pair, how);
            return self.gate.settle(
                &pair,
                &live,
                &Outcome { bytes_in: 0, bytes_out: 0, end: End::WorkloadCut(error) },
            );
        }
        // Whether another proxy wants the request is known with the first byte of its answer; everybody else has said so.
        let (refused, told) = (Arc::new(OnceLock::new()), AtomicBool::new(false));
        let tell = || {
            if refused.get().is_none() && !told.swap(true, Relaxed) {
                shared.ledger.opened(&pair, how.clone());
            }
        };
        if head.is_none() {
            tell();
        }
        let mut mover = mover(Replayed::new(rest, tcp), stream, request, head, refused.clone());
        let outcome = relay(&mut *mover, self.gate.bounds(live.cancel().clone()), tell).await;
        if !told.load(Relaxed) && refused.get().is_some() {
            let words = "the upstream proxy wants other credentials";
            return self.book(&Refused::new(RefusalReason::UpstreamRefused, words).to(&target), source);
        }
        tell();
        self.gate.settle(&pair, &live, &outcome);
    }
}

fn mover(
    client: Replayed<TcpStream>,
    server: Replayed<TcpStream>,
    request: Option<Request>,
    head: Option<Vec<u8>>,
    refused: Arc<OnceLock<()>>,
) -> Box<dyn Mover + Send> {
    match request {
        Some(request) => {
            let head = head.unwrap_or_else(|| request.forwarded());
            Box::new(copying(Asking::new(head, request.framing, client), Answering::new(server, refused)))
        }
        None => Box::new(copying(client, server)),
    }
}

impl Shared {
    /// Of `addresses`, those that the collector's policy lets our workload go to, for `target`.
    fn allowed_centrally(&self, target: &Target, mut addresses: Vec<SocketAddr>) -> Result<Vec<SocketAddr>, Refused> {
        let mut last = None;
        addresses.retain(|address| match self.may_go(target, Some(*address), false) {
            Ok(()) => true,
            Err((reason, why)) => {
                last = Some(Refused::new(reason, why));
                false
            }
        });
        if addresses.is_empty()
            && let Some(refused) = last
        {
            Err(refused)
        } else {
            Ok(addresses)
        }
    }
}

impl Gate {
    fn bounds(&self, cancelled: CancellationToken) -> Bounds {
        let config::Timeouts { idle, half_closed, max_connection_age: age, .. } = self.shared.timeouts;
        let deadline = if age.is_zero() { None } else { Instant::now().checked_add(age) };
        Bounds { cancelled, deadline, idle, half_closed, pace: None }
    }

    fn settle(&self, pair: &Pair, live: &Entered, outcome: &Outcome) {
        let Outcome { bytes_in, bytes_out, end } = outcome;
        let ended_by_us = match end {
            End::Cancelled if self.shared.cut.is_cancelled() => Some("agent_stopping"),
            End::Cancelled => live.ended_for().map(RefusalReason::word),
            End::Deadline => Some("maximum_age"),
            End::Idle => Some("idle"),
            _ => None,
        };
        if let Some(reason) = ended_by_us {
            self.shared
                .ledger
                .with(Direction::Egress, |books| books.ended(Direction::Egress, pair.peer.clone(), reason));
        }
        tracing::debug!(direction = "egress", peer = pair.peer, bytes_in, bytes_out, ?end, "connection ended");
        let truncated = matches!(end, End::PeerCut(_));
        self.shared.ledger.closed(pair, Traffic { bytes_in: *bytes_in, bytes_out: *bytes_out, truncated });
    }

    /// Goes where it is wanted, if it may, within the time to connect.
    async fn reach(&self, wanted: &Wanted) -> Result<(There, Entered), Refused> {
        let within = self.shared.timeouts.connect;
        let late = || Refused::new(RefusalReason::Unreachable, format!("no answer within {within:?}"));
        let unresolved = self.upstream.as_ref().is_some_and(|upstream| upstream.resolves);
        let live = self.shared.enter_unproven(What::Egress { target: wanted.target.clone(), unresolved });
        let may = || self.shared.may(&live).map_err(|(reason, detail)| Refused::new(reason, detail));
        may()?;
        let there = timeout(within, self.go(wanted, within, &live)).await.unwrap_or_else(|_| Err(late()))?;
        // What the collector says may have changed meanwhile, with no address to be judged by.
        may()?;
        Ok((there, live))
    }

    async fn go(&self, wanted: &Wanted, within: Duration, live: &Entered) -> Result<There, Refused> {
        let target = &wanted.target;
        match &self.upstream {
            Some(upstream) if upstream.resolves => {
                self.policy.consider_unresolved(target)?;
                self.unresolved(upstream, wanted, within).await
            }
            Some(upstream) => {
                let addresses = self.allowed(target).await?;
                let (address, (stream, known)) = self.through_to_any(upstream, &addresses, within).await?;
                live.set_dialled(address);
                let address = format!("{address} through {}", upstream.to);
                Ok(There { stream, address, head: None, _known: known })
            }
            None => {
                let addresses = self.allowed(target).await?;
                let dial = |address| async move { Ok((address, self.own.connect(address).await?)) };
                let (address, (tcp, known)) = connect_first(&addresses, within, dial).await?;
                live.set_dialled(address);
                let (stream, address) = (Replayed::new(Vec::new(), tcp), address.to_string());
                Ok(There { stream, address, head: None, _known: known })
            }
        }
    }

    /// Through a proxy that looks names up. It gets a request as a request: many proxies take CONNECT for TLS only.
    async fn unresolved(&self, upstream: &Upstream, wanted: &Wanted, within: Duration) -> Result<There, Refused> {
        let unchecked = match wanted.target.host {
            Host::Name(_) => ", unchecked: it looked the name up",
            Host::Address(_) => "",
        };
        let address = format!("through {}{unchecked}", upstream.to);
        match &wanted.request {
            None => {
                let (stream, known) = self.through(upstream, &wanted.target, within).await?;
                Ok(There { stream, address, head: None, _known: known })
            }
            Some(request) => {
                let (tcp, known) = self.dial_upstream(upstream, within).await?;
                let head = request.forwarded_to_proxy(upstream.credentials()?.as_ref());
                Ok(There { stream: Replayed::new(Vec::new(), tcp), address, head: Some(head), _known: known })
            }
        }
    }

    /// The addresses of `target` that may be dialled: looked up once, judged, and dialled as they are.
    async fn allowed(&self, target: &Target) -> Result<Vec<SocketAddr>, Refused> {
        match (self.policy.consider(target)?, &target.host) {
            (Way::Dial(address), _) => Ok(vec![address]),
            (Way::Resolve, Host::Name(name)) => {
                let found = self.shared.resolver.addresses_of(name).await?;
                self.shared.allowed_centrally(target, self.policy.choose(target, &found)?)
            }
            (Way::Resolve, Host::Address(ip)) => Ok(self.policy.choose(target, &[*ip])?),
        }
    }

    async fn dial_upstream(&self, upstream: &Upstream, within: Duration) -> Result<(TcpStream, Known), Refused> {
        let lost = |error: DialError| {
            let detail = format!("the upstream proxy {} is not reached: {error}", upstream.to);
            Refused::new(RefusalReason::UpstreamRefused, detail)
        };
        let addresses = self.shared.resolver.lookup(&upstream.to).await.map_err(lost)?;
        connect_first(&addresses, within, |to| self.own.connect(to)).await.map_err(lost)
    }

    async fn through(
        &self,
        upstream: &Upstream,
        target: &Target,
        within: Duration,
    ) -> Result<(Replayed<TcpStream>, Known), Refused> {
        let (tcp, known) = self.dial_upstream(upstream, within).await?;
        Ok((upstream.open(tcp, target).await?, known))
    }

    async fn through_to_any(
        &self,
        upstream: &Upstream,
        addresses: &[SocketAddr],
        within: Duration,
    ) -> Result<(SocketAddr, (Replayed<TcpStream>, Known)), Refused> {
        let mut last = Refused::new(RefusalReason::UpstreamRefused, "no address to ask for");
        for address in addresses.iter().take(MAX_ASKED_FOR) {
            let target = Target { host: Host::Address(address.ip()), port: address.port() };
            match self.through(upstream, &target, within).await {
                Ok(reached) => return Ok((*address, reached)),
                Err(refused) => last = refused,
            }
        }
        Err(last)
    }

    /// Whom a redirected connection is for: the address it was going to if that is allowed by itself, otherwise the name
    /// that its first bytes say.
    async fn redirected(&self, tcp: &mut TcpStream, source: SocketAddr, within: Duration) -> Result<Wanted, Refused> {
        let looped = |detail: String| Refused::new(RefusalReason::EgressLoop, detail);
        let there = transparent::original_destination(tcp);
        let there = there.ok_or_else(|| looped("it was not redirected here".into()))?;
        if self.own.made(source, there) {
            return Err(looped(format!("the agent's own connection to {there} was redirected to the agent")));
        }
        let target = Target { host: Host::Address(there.ip()), port: there.port() };
        let by_policy = || self.shared.may_go(&target, None, false).map_err(|(reason, why)| Refused::new(reason, why));
        let refused = match self.policy.consider(&target).map_err(Refused::from).and_then(|_| by_policy()) {
            Ok(()) => return Ok(Wanted::tunnel(target, Vec::new())),
            Err(refused) => refused.to(&target),
        };
        if !self.policy.asks_for_names(there.port()) && !self.shared.policy_asks_for_names(there.port()) {
            return Err(refused);
        }
        let nameless = |why: &str| Refused { detail: format!("{}, and {why}", refused.detail), ..refused };
        match timeout(within, named_by(tcp, there.port())).await {
            Ok(Ok(Some(wanted))) => Ok(wanted),
            Ok(Ok(None)) => Err(nameless("its first bytes name no host")),
            Ok(Err(wrong)) => Err(Refused::bad(wrong).to(&target)),
            Err(_) => Err(nameless(&format!("it named no host within {within:?}"))),
        }
    }
}

/// Reads more of what a client says.
async fn more(tcp: &mut TcpStream, bytes: &mut Vec<u8>) -> Result<(), Refused> {
    match tcp.read_buf(bytes).await {
        Ok(0) if bytes.is_empty() => Err(Refused::bad("a connection without a byte")),
        Ok(0) => Err(Refused::bad("a request that broke off")),
        Ok(_) => Ok(()),
        Err(error) => Err(Refused::bad(format!("a connection that broke: {error}"))),
    }
}

/// What a client of the proxy asks for.
async fn asked_by(tcp: &mut TcpStream, tongue: &mut Tongue) -> Result<Wanted, Refused> {
    let mut bytes = Vec::with_capacity(1024);
    more(tcp, &mut bytes).await?;
    match bytes[0] {
        socks5::VERSION => asked_by_socks(tcp, bytes, tongue).await,
        b'A'..=b'Z' | b'a'..=b'z' => asked_by_http(tcp, bytes, tongue).await,
        4 => Err(Refused::bad("SOCKS4")),
        22 => Err(Refused::bad("a TLS handshake: the proxy's address begins with http://, not https://")),
        _ => Err(Refused::bad(shown(&bytes))),
    }
}

async fn asked_by_socks(tcp: &mut TcpStream, mut bytes: Vec<u8>, tongue: &mut Tongue) -> Result<Wanted, Refused> {
    *tongue = Tongue::Greeting;
    let offers = read_socks(tcp, &mut bytes, socks5::greeting).await?;
    if !offers {
        return Err(Refused::bad("SOCKS5 with authentication only, where there is none"));
    }
    let broke = |error: io::Error| Refused::bad(format!("a connection that broke: {error}"));
    tcp.write_all(&socks5::CHOSEN).await.map_err(broke)?;
    *tongue = Tongue::Socks;
    let target = read_socks(tcp, &mut bytes, socks5::request).await?;
    Ok(Wanted::tunnel(target, bytes))
}

/// Reads one message, and takes it out of `bytes`.
async fn read_socks<T>(
    tcp: &mut TcpStream,
    bytes: &mut Vec<u8>,
    read: impl Fn(&[u8]) -> Read<T>,
) -> Result<T, Refused> {
    loop {
        match read(bytes) {
            Read::Whole(message, length) => {
                bytes.drain(..length);
                return Ok(message);
            }
            Read::Wrong(answer, what) => return Err(Refused { answer, ..Refused::bad(what) }),
            Read::More => more(tcp, bytes).await?,
        }
    }
}

async fn asked_by_http(tcp: &mut TcpStream, mut bytes: Vec<u8>, tongue: &mut Tongue) -> Result<Wanted, Refused> {
    *tongue = Tongue::Http { with_body: true };
    let mut scan = HeadScan::default();
    let end = loop {
        match scan.look(&bytes).map_err(Refused::bad)? {
            Some(end) => break end,
            None => more(tcp, &mut bytes).await?,
        }
    };
    let request = Request::parse(&bytes[..end]).map_err(Refused::bad)?;
    *tongue = Tongue::Http { with_body: !request.is_head() };
    Ok(wanted(request, bytes.split_off(end)))
}

fn wanted(request: Request, rest: Vec<u8>) -> Wanted {
    match request.asked.clone() {
        Asked::Tunnel(target) => Wanted::tunnel(target, rest),
        Asked::Forward(target) => Wanted { target, request: Some(request), rest },
    }
}

/// What the first bytes of a connection to `port` of somebody say whom they are for: the server name of TLS, or the host
/// of HTTP. `None` if they say neither.
async fn named_by(tcp: &mut TcpStream, port: u16) -> Result<Option<Wanted>, String> {
    let (mut bytes, mut scan) = (Vec::with_capacity(2048), HeadScan::default());
    loop {
        match tcp.read_buf(&mut bytes).await {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(format!("a connection that broke: {error}")),
        }
        match bytes.first() {
            Some(22) => match classify(&bytes) {
                Opening::More => {}
                Opening::Tls(hello) => {
                    let Some(name) = hello.server_name else { return Ok(None) };
                    return Ok(Some(Wanted::tunnel(Target { host: Host::parse(&name)?, port }, bytes)));
                }
                Opening::Refuse(_, what) => return Err(what),
            },
            Some(b'A'..=b'Z') => {
                if let Some(end) = scan.look(&bytes)? {
                    let request = Request::parse_redirected(&bytes[..end], port)?;
                    return Ok(Some(wanted(request, bytes.split_off(end))));
                }
            }
            _ => return Ok(None),
        }
        if bytes.len() > MAX_HEAD {
            return Ok(None);
        }
    }
}
