//! Takes a scan into the history, and from there into the state.

use sidewarden_proto::event::{Body, Event, ScanAdded, Severity};
use sidewarden_proto::evidence::Scan;
use sidewarden_proto::time::Timestamp;

use crate::app::Core;
use crate::state::State;

/// What came of a scan.
#[derive(Debug, PartialEq)]
pub enum Taken {
    /// It is in force.
    New,
    /// It was there already.
    Same,
    /// One of the same image that was made later is there.
    Older(Timestamp),
    /// It says that it was made in the future.
    Future,
    /// The store has not taken it yet, and may never do so.
    Waiting,
}

/// A scanner's clock may be ahead by this much.
const AHEAD: std::time::Duration = std::time::Duration::from_secs(300);

/// A store that has not taken it by then stands still.
const WITHIN: std::time::Duration = std::time::Duration::from_secs(5);

/// What to do with a scan, and the one that it takes the place of. Pure.
fn decide(state: &State, scan: &Scan, now: Timestamp) -> (Taken, Option<Scan>) {
    if scan.made_us > now.plus(AHEAD) {
        return (Taken::Future, None);
    }
    let known = state.scans.iter().filter(|other| other.is_of_same(scan)).max_by_key(|other| other.made_us);
    match known {
        Some(known) if known.made_us > scan.made_us => (Taken::Older(known.made_us), None),
        Some(known) if known.made_us == scan.made_us && known.found == scan.found => (Taken::Same, None),
        known => (Taken::New, known.cloned()),
    }
}

/// Takes it, unless there is one that counts more.
pub async fn take(core: &Core, scan: Scan) -> Result<Taken, crate::commit::Closed> {
    let now = (core.clock)();
    let (taken, before) = decide(&core.commits.state(), &scan, now);
    if taken == Taken::New {
        let count = |word: &str| scan.found.get(word).map_or(0, |found| found.all);
        let summary =
            format!("a scan of {} found {} critical and {} high", scan.name, count("critical"), count("high"));
        let told = ScanAdded { scan: scan.clone(), before };
        core.commits.own(Event::new(now, Severity::Notice, summary, &Body::from(told))).await?;
        if let Ok(closed) = tokio::time::timeout(WITHIN, core.commits.flush()).await {
            closed?;
        }
        let is_there = core.commits.state().scans.contains(&scan);
        return Ok(if is_there { Taken::New } else { Taken::Waiting });
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scan_that_was_made_last_counts_and_none_is_taken_twice() {
        let scan =
            |id: &str, secs| Scan { image_id: id.into(), made_us: Timestamp::from_secs(secs), ..Scan::default() };
        let state = State { scans: vec![scan("a", 100)], ..State::default() };
        let of = |new: &Scan| decide(&state, new, Timestamp::from_secs(1_000));
        assert_eq!(of(&scan("b", 50)), (Taken::New, None));
        assert_eq!(of(&scan("a", 101)), (Taken::New, Some(scan("a", 100))));
        assert_eq!(of(&scan("a", 100)), (Taken::Same, None));
        assert_eq!(of(&scan("a", 99)), (Taken::Older(Timestamp::from_secs(100)), None));
        assert_eq!(of(&scan("b", 1_400)).0, Taken::Future);
    }
}
