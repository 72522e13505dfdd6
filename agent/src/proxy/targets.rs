//! Where a route leads: the addresses that its names have now, one after another until one answers.
//!
//! Which one is next, and which is left alone for a while, is decided in [`super::balance`].

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sidewarden_proto::backoff::Random;
use sidewarden_proto::config::HostPort;
use tokio::time::Instant;

use super::balance::{Balance, Change, Circle, MAX_ADDRESSES};
use crate::dial::{DialError, Resolver};

/// Addresses are looked up again after this long, by [`Targets::refresh`], while the route is in use.
const REFRESH: Duration = Duration::from_secs(5);
/// Older ones are not used: a connection after a pause waits for new ones.
const TOO_OLD: Duration = Duration::from_secs(15);

/// The peers of one route.
pub struct Targets {
    to: Vec<HostPort>,
    circle: Mutex<Circle>,
    resolved: Mutex<Resolved>,
    random: Random,
}

/// When the names were looked up last, and whether a connection has asked since.
#[derive(Clone, Copy, Debug, Default)]
struct Resolved {
    at: Option<Instant>,
    asked: bool,
}

impl Targets {
    /// Of a route to any of `to`.
    pub fn new(to: Vec<HostPort>, balance: Balance, random: Random) -> Targets {
        Targets { to, circle: Mutex::new(Circle::new(balance)), resolved: Mutex::default(), random }
    }

    /// The tries of one connection of the workload. Names are looked up when that was too long ago.
    pub async fn round(self: &Arc<Targets>, resolver: &Resolver) -> Result<Round, DialError> {
        if self.age(true).is_none_or(|age| age > TOO_OLD) {
            self.resolve(resolver).await?;
        }
        Ok(Round { targets: self.clone(), left: self.circle().len(), tried: Vec::new() })
    }

    /// Looks the names up again if it is time to and the route is in use, so that no connection has to wait for it.
    pub async fn refresh(&self, resolver: &Resolver) {
        if !self.is_due() {
            return;
        }
        if let Err(error) = self.resolve(resolver).await {
            // The next connection will say so, if it is still true then.
            tracing::debug!(%error, "the addresses of a route cannot be looked up");
        }
    }

    /// Names without an address are an error only when no other has one.
    async fn resolve(&self, resolver: &Resolver) -> Result<(), DialError> {
        let (mut addresses, mut fault) = (Vec::new(), None);
        for to in &self.to {
            match resolver.lookup(to).await {
                Ok(found) => found.into_iter().for_each(|address| push_new(&mut addresses, address)),
                Err(error) => fault = Some(error),
            }
        }
        if let (true, Some(fault)) = (addresses.is_empty(), fault) {
            return Err(fault);
        }
        self.circle().update(&addresses);
        *self.resolved() = Resolved { at: Some(Instant::now()), asked: false };
        Ok(())
    }

    /// No address answered: perhaps the names lead elsewhere by now.
    pub fn look_again(&self) {
        self.resolved().at = None;
    }

    fn age(&self, asked: bool) -> Option<Duration> {
        let mut resolved = self.resolved();
        resolved.asked |= asked;
        resolved.at.map(|at| at.elapsed())
    }

    fn is_due(&self) -> bool {
        let asked = self.resolved().asked;
        asked && self.age(false).is_some_and(|age| age > REFRESH)
    }

    fn resolved(&self) -> MutexGuard<'_, Resolved> {
        self.resolved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn circle(&self) -> MutexGuard<'_, Circle> {
        self.circle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spread(&self) -> f64 {
        let mut bytes = [0; 4];
        (self.random)(&mut bytes);
        f64::from(u32::from_be_bytes(bytes)) / f64::from(u32::MAX)
    }
}

fn push_new(addresses: &mut Vec<SocketAddr>, address: SocketAddr) {
    if addresses.len() < MAX_ADDRESSES && !addresses.contains(&address) {
        addresses.push(address);
    }
}

/// The tries of one connection, each address once.
pub struct Round {
    targets: Arc<Targets>,
    left: usize,
    tried: Vec<SocketAddr>,
}

impl Round {
    /// The next address to try.
    pub fn next_try(&mut self) -> Option<Try> {
        let address = self.targets.circle().choose(&self.tried, Instant::now())?;
        self.left = self.left.saturating_sub(1);
        self.tried.push(address);
        Some(Try { targets: self.targets.clone(), address })
    }

    /// Whether no other address is left after the one that was given last.
    pub fn is_last(&self) -> bool {
        self.left == 0
    }
}

/// One address that is being tried. Dropped without a word, nothing is known of it.
pub struct Try {
    targets: Arc<Targets>,
    /// Where.
    pub address: SocketAddr,
}

impl Try {
    /// It answered, and was who it should be.
    pub fn answered(self) -> InUse {
        let change = {
            let mut circle = self.targets.circle();
            circle.opened(self.address);
            circle.answered(self.address)
        };
        tell(self.address, change);
        InUse(self)
    }

    /// It did not.
    pub fn failed(self) {
        fail(&self);
    }
}

/// A connection to an address, counted until it is dropped.
pub struct InUse(Try);

impl InUse {
    /// It broke before the peer had said anything.
    pub fn failed(self) {
        fail(&self.0);
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.targets.circle().closed(self.0.address);
    }
}

fn fail(tried: &Try) {
    let Try { targets, address } = tried;
    let change = targets.circle().failed(*address, targets.spread(), Instant::now());
    tell(*address, change);
}

fn tell(address: SocketAddr, change: Option<Change>) {
    match change {
        Some(Change::Left(rest)) => {
            tracing::warn!(%address, ?rest, "an address of a route is left alone: it does not answer")
        }
        Some(Change::Back) => tracing::info!(%address, "an address of a route answers again"),
        None => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets(to: &[&str]) -> Arc<Targets> {
        let to = to.iter().map(|to| to.parse().unwrap()).collect();
        Arc::new(Targets::new(to, Balance::RoundRobin, |bytes| bytes.fill(0xFF)))
    }

    async fn order(targets: &Arc<Targets>) -> Vec<String> {
        let mut round = targets.round(&Resolver::from_system()).await.unwrap();
        std::iter::from_fn(|| round.next_try().map(|tried| tried.address.to_string())).collect()
    }

    #[tokio::test]
    async fn a_round_tries_every_address_once_and_the_next_round_begins_elsewhere() {
        let targets = targets(&["10.0.0.1:1", "10.0.0.2:1", "10.0.0.1:1", "[fd00::3]:1"]);
        assert_eq!(order(&targets).await, ["10.0.0.1:1", "10.0.0.2:1", "[fd00::3]:1"]);
        let mut round = targets.round(&Resolver::from_system()).await.unwrap();
        let last: Vec<bool> = (0..3).map_while(|_| round.next_try().map(|_| round.is_last())).collect();
        assert_eq!(last, [false, false, true]);
        drop(targets.round(&Resolver::from_system()).await.unwrap().next_try());
        assert_eq!(order(&targets).await[0], "10.0.0.2:1");
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_does_not_answer_is_left_and_returned_to() {
        let targets = targets(&["10.0.0.1:1", "10.0.0.2:1"]);
        let mut first = Vec::new();
        for _ in 0..8 {
            let mut round = targets.round(&Resolver::from_system()).await.unwrap();
            let tried = round.next_try().unwrap();
            first.push(tried.address.port() == 1 && tried.address.ip().to_string() == "10.0.0.1");
            if first.last() == Some(&true) { tried.failed() } else { drop(tried.answered()) }
        }
        assert_eq!(first, [true, false, true, false, true, false, false, false], "left after three failures");
        tokio::time::advance(std::time::Duration::from_secs(1)).await;
        let mut round = targets.round(&Resolver::from_system()).await.unwrap();
        let tried = round.next_try().unwrap();
        assert_eq!(tried.address.to_string(), "10.0.0.1:1", "tried again after its rest");
        drop(tried.answered());
        assert_eq!(order(&targets).await[0], "10.0.0.2:1");
        assert_eq!(order(&targets).await[0], "10.0.0.2:1");
    }

    #[tokio::test(start_paused = true)]
    async fn names_are_looked_up_in_time_and_only_while_they_are_used() {
        let (targets, resolver) = (targets(&["10.0.0.1:1"]), Resolver::from_system());
        let wait = async |secs| tokio::time::advance(Duration::from_secs(secs)).await;
        assert!(!targets.is_due(), "nobody has asked");
        drop(targets.round(&resolver).await.unwrap());
        drop(targets.round(&resolver).await.unwrap());
        assert!(!targets.is_due(), "new enough");
        wait(6).await;
        assert!(targets.is_due());
        targets.refresh(&resolver).await;
        assert_eq!(targets.age(false), Some(Duration::ZERO));
        wait(6).await;
        targets.refresh(&resolver).await;
        assert_eq!(targets.age(false), Some(Duration::from_secs(6)), "nobody has asked since");
        wait(10).await;
        drop(targets.round(&resolver).await.unwrap());
        assert_eq!(targets.age(false), Some(Duration::ZERO), "too old to be used");
        targets.look_again();
        drop(targets.round(&resolver).await.unwrap());
        assert_eq!(targets.age(false), Some(Duration::ZERO));
    }

    #[tokio::test]
    async fn a_name_without_an_address_hurts_only_when_there_is_no_other() {
        assert_eq!(order(&targets(&["nowhere.invalid:1", "10.0.0.2:1"])).await, ["10.0.0.2:1"]);
        assert!(targets(&["nowhere.invalid:1"]).round(&Resolver::from_system()).await.is_err());
    }

    #[tokio::test]
    async fn connections_are_counted_while_they_live() {
        let to = vec!["10.0.0.1:1".parse().unwrap(), "10.0.0.2:1".parse().unwrap()];
        let targets = Arc::new(Targets::new(to, Balance::LeastConnections, |bytes| bytes.fill(0)));
        let reach = async || targets.round(&Resolver::from_system()).await.unwrap().next_try().unwrap();
        let first = reach().await.answered();
        let others = [reach().await, reach().await].map(|tried| tried.address.to_string());
        assert_eq!(others, ["10.0.0.2:1", "10.0.0.2:1"]);
        drop(first);
        assert_eq!(reach().await.address.to_string(), "10.0.0.1:1");
    }
}
