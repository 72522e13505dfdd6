//! How far a directive has come: who of those connected runs it, and who cannot do all that it says. Pure.

use std::sync::atomic::Ordering;

use serde::Serialize;
use sidewarden_proto::identity::AgentId;

use super::Live;

/// Names that are listed; of more only the number is told.
const MAX_NAMES: usize = 100;

/// How far the directive in force has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Reach {
    /// The version in force.
    pub version: u64,
    /// Agents that are connected.
    pub connected: usize,
    /// Of those, how many have said that they run it.
    pub running: usize,
    /// The first hundred of those that have not, also those that run one from before a restore or from another collector.
    pub behind: Vec<String>,
    /// The first hundred of those that are too old to do all that it says.
    pub too_old: Vec<String>,
}

impl Reach {
    /// Of version `version`, which asks agents to understand `needs`.
    pub fn of(version: u64, needs: u32, live: &[(AgentId, Live)]) -> Reach {
        // One that runs a newer one than there is takes none of ours: it had that from a collector that knew more.
        let is_behind = |live: &Live| live.directive.load(Ordering::Relaxed) != version;
        let is_too_old = |live: &Live| live.understands.load(Ordering::Relaxed).max(1) < needs;
        let names = |wanted: &dyn Fn(&Live) -> bool| {
            let found = live.iter().filter(|(_, live)| wanted(live)).map(|(agent, _)| agent.to_string());
            found.take(MAX_NAMES).collect()
        };
        let running = live.iter().filter(|(_, live)| !is_behind(live)).count();
        Reach { version, connected: live.len(), running, behind: names(&is_behind), too_old: names(&is_too_old) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sidewarden_proto::identity::Sha256;
    use sidewarden_proto::time::Timestamp;

    use super::*;
    use crate::fleet::{Coming, Fleet};

    #[test]
    fn who_lags_and_who_is_too_old_is_named() {
        let fleet = Arc::new(Fleet::default());
        let places: Vec<_> = [("c1", 3, 2), ("c2", 2, 2), ("c3", 3, 0), ("c4", 4, 2)]
            .map(|(instance, version, understands)| {
                let agent = Arc::new(format!("spiffe://x/shop/web#{instance}").parse().unwrap());
                let coming = Coming { directive: version, understands, ..Coming::default() };
                fleet.enter(&agent, Sha256([1; 32]), false, coming, Timestamp(1)).unwrap()
            })
            .into();
        let reach = Reach::of(3, 2, &fleet.all());
        assert_eq!((reach.connected, reach.running), (4, 2));
        let web = |instance| format!("spiffe://x/shop/web#{instance}");
        assert_eq!((reach.behind, reach.too_old), (vec![web("c2"), web("c4")], vec![web("c3")]));
        assert!(Reach::of(3, 1, &fleet.all()).too_old.is_empty());
        drop(places);
    }
}
