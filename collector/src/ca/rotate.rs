//! The steps by which one root takes over from another: overlap, then use, then distrust. Pure.
//!
//! A root and the issuing CA under it are a generation. What each step does is a change of the list of generations; what
//! it waits for is judged over the agents as the register knows them.

use serde::{Deserialize, Serialize};
use sidewarden_proto::identity::{AgentId, Sha256};
use sidewarden_proto::time::Timestamp;

/// What a generation is used for. Its root is in every agent's bundle at each stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Trusted, and issues nothing yet.
    Prepared,
    /// Issues.
    Active,
    /// Trusted, and issues no more.
    Old,
    /// Trusted for a last while: whoever has a certificate of it gets another one now.
    Tainted,
}

impl Stage {
    /// The word in tables.
    pub const fn word(self) -> &'static str {
        match self {
            Stage::Prepared => "prepared",
            Stage::Active => "active",
            Stage::Old => "old",
            Stage::Tainted => "tainted",
        }
    }
}

/// One generation, as it stands in `generations.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// 1 for the first; its files lie in the CA's directory itself, those of the others in `g<number>`.
    pub number: u32,
    /// What it is used for.
    pub stage: Stage,
    /// Since when.
    pub since_us: Timestamp,
    /// Its root's key is kept by another collector: this one has only an issuing CA.
    #[serde(default)]
    pub member: bool,
    /// Somebody else may have its keys: whatever they have signed ends with it.
    #[serde(default)]
    pub compromised: bool,
}

impl Entry {
    /// The generation that the first start makes.
    pub fn first(now: Timestamp) -> Entry {
        Entry { number: 1, stage: Stage::Active, since_us: now, member: false, compromised: false }
    }
}

/// A step of a rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// A new root goes into every bundle.
    Prepare,
    /// The new root's CA issues.
    Activate,
    /// Whatever the old one issued is renewed now.
    Taint,
    /// The old root leaves every bundle.
    Retire,
    /// The first three at once, because the key is known to somebody else.
    Compromise,
    /// The new root goes again, before it has issued anything.
    Abandon,
}

impl Step {
    /// The word in commands and events.
    pub const fn word(self) -> &'static str {
        match self {
            Step::Prepare => "prepare",
            Step::Activate => "activate",
            Step::Taint => "taint",
            Step::Retire => "retire",
            Step::Compromise => "compromise",
            Step::Abandon => "abandon",
        }
    }

    /// What the step waits for.
    pub const fn wants(self) -> Wants {
        match self {
            Step::Prepare | Step::Compromise | Step::Abandon => Wants::Nothing,
            Step::Activate | Step::Taint => Wants::Confirmed,
            Step::Retire => Wants::Renewed,
        }
    }
}

/// What a step waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wants {
    /// Nothing.
    Nothing,
    /// Every agent runs the newest directive, and so the newest bundle.
    Confirmed,
    /// And has a certificate of the active generation in use.
    Renewed,
}

/// Why a step makes no sense now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OutOfTurn {
    /// Another one is under way.
    #[error("a rotation is under way: finish it first (`ca status` says what is next)")]
    UnderWay,
    /// There is nothing to activate.
    #[error("no new root is prepared: begin with `ca prepare`")]
    NothingPrepared,
    /// There is nothing to abandon.
    #[error("no root is prepared that has not issued yet: once it is activated, the way is forward")]
    NothingToAbandon,
    /// There is nothing to taint.
    #[error("there is no old root: `ca prepare` and `ca activate` come first")]
    NothingOld,
    /// The root's key is elsewhere.
    #[error("this collector has an issuing CA only: rotate where the root's key is")]
    Member,
}

/// The generations after `step`.
pub fn after(entries: &[Entry], step: Step, now: Timestamp) -> Result<Vec<Entry>, OutOfTurn> {
    if entries.iter().any(|entry| entry.member) {
        return Err(OutOfTurn::Member);
    }
    let has = |stage| entries.iter().any(|entry| entry.stage == stage);
    match step {
        Step::Prepare if entries.len() > 1 => Err(OutOfTurn::UnderWay),
        Step::Prepare => Ok(with_another(entries, Stage::Prepared, now)),
        Step::Activate if !has(Stage::Prepared) => Err(OutOfTurn::NothingPrepared),
        Step::Activate => Ok(moved(entries, &[(Stage::Active, Stage::Old), (Stage::Prepared, Stage::Active)], now)),
        Step::Abandon if !has(Stage::Prepared) => Err(OutOfTurn::NothingToAbandon),
        Step::Abandon => Ok(entries.iter().filter(|e| e.stage != Stage::Prepared).cloned().collect()),
        Step::Taint if !has(Stage::Old) => Err(OutOfTurn::NothingOld),
        Step::Taint => Ok(moved(entries, &[(Stage::Old, Stage::Tainted)], now)),
        Step::Retire if !has(Stage::Old) && !has(Stage::Tainted) => Err(OutOfTurn::NothingOld),
        Step::Retire => Ok(entries.iter().filter(|e| !is_leaving(e.stage)).cloned().collect()),
        // Whatever was under way: a prepared root lay on the same disk, so it is as lost as the active one.
        Step::Compromise => {
            let all = [Stage::Prepared, Stage::Active, Stage::Old].map(|stage| (stage, Stage::Tainted));
            let mut lost = moved(entries, &all, now);
            lost.iter_mut().for_each(|entry| entry.compromised = true);
            Ok(with_another(&lost, Stage::Active, now))
        }
    }
}

/// The step that comes next; `None` when no rotation is under way.
pub fn next(entries: &[Entry]) -> Option<Step> {
    let has = |stage| entries.iter().any(|entry| entry.stage == stage);
    let under_way = [(Stage::Prepared, Step::Activate), (Stage::Old, Step::Taint), (Stage::Tainted, Step::Retire)];
    under_way.into_iter().find(|(stage, _)| has(*stage)).map(|(_, step)| step)
}

/// Whether a root at this stage goes with the next [`Step::Retire`].
pub const fn is_leaving(stage: Stage) -> bool {
    matches!(stage, Stage::Old | Stage::Tainted)
}

fn with_another(entries: &[Entry], stage: Stage, now: Timestamp) -> Vec<Entry> {
    let number = entries.iter().map(|entry| entry.number).max().unwrap_or(0) + 1;
    let made = Entry { number, stage, since_us: now, member: false, compromised: false };
    entries.iter().cloned().chain([made]).collect()
}

fn moved(entries: &[Entry], moves: &[(Stage, Stage)], now: Timestamp) -> Vec<Entry> {
    let one = |entry: &Entry| match moves.iter().find(|(from, _)| *from == entry.stage) {
        Some((_, to)) => Entry { stage: *to, since_us: now, ..entry.clone() },
        None => entry.clone(),
    };
    entries.iter().map(one).collect()
}

/// What is known of one instance that has a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Which.
    pub agent: AgentId,
    /// Its newest key.
    pub spki: Sha256,
    /// The root of the newest certificate that it was seen with; of the newest one issued, if it was seen with none.
    pub root: Sha256,
    /// When its newest certificate ends.
    pub not_after: Timestamp,
    /// The directive it last confirmed; 0 for none.
    pub confirmed: u64,
}

/// Who keeps a step from being taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// Which agent, or the name in a certificate that went to somebody without one.
    pub who: String,
    /// What it lacks.
    pub lacks: String,
    /// Its certificate has ended, so it takes part in nothing now; it can still renew within the grace, and will need
    /// a token if the step is taken.
    pub away: bool,
}

/// Whom `step` leaves behind: those whose certificate holds, and, marked as away, those who may still renew by grace.
pub fn missing(
    holders: &[Holder],
    step: Step,
    newest: u64,
    active: Sha256,
    grace: std::time::Duration,
    now: Timestamp,
) -> Vec<Missing> {
    let lacks = |holder: &Holder| match step.wants() {
        Wants::Nothing => None,
        _ if holder.confirmed < newest => Some(format!("runs directive {}, the newest is {newest}", holder.confirmed)),
        _ if holder.confirmed > newest => Some(format!(
            "runs directive {}, which is ahead of our newest, {newest}: it takes none of ours",
            holder.confirmed
        )),
        Wants::Renewed if holder.root != active => {
            Some(format!("its certificate is of the old root, until {}", holder.not_after))
        }
        _ => None,
    };
    let may_come = holders.iter().filter(|holder| now < holder.not_after.plus(grace));
    may_come
        .filter_map(|holder| {
            let lacks = lacks(holder)?;
            Some(Missing { who: holder.agent.to_string(), lacks, away: now >= holder.not_after })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NOW: Timestamp = Timestamp::from_secs(1_000_000);
    const HOUR: Duration = Duration::from_secs(3600);

    fn list(stages: &[Stage]) -> Vec<Entry> {
        let entry = |(at, stage): (usize, &Stage)| Entry {
            number: at as u32 + 1,
            stage: *stage,
            since_us: Timestamp(0),
            member: false,
            compromised: false,
        };
        stages.iter().enumerate().map(entry).collect()
    }

    #[test]
    fn each_step_has_its_turn() {
        use Stage::*;
        type Row<'a> = (&'a [Stage], Step, Result<&'a [(u32, Stage)], OutOfTurn>);
        let rows: [Row<'_>; 17] = [
            (&[Active], Step::Prepare, Ok(&[(1, Active), (2, Prepared)])),
            (&[Active, Prepared], Step::Prepare, Err(OutOfTurn::UnderWay)),
            (&[Old, Active], Step::Prepare, Err(OutOfTurn::UnderWay)),
            (&[Active, Prepared], Step::Activate, Ok(&[(1, Old), (2, Active)])),
            (&[Active], Step::Activate, Err(OutOfTurn::NothingPrepared)),
            (&[Old, Active], Step::Activate, Err(OutOfTurn::NothingPrepared)),
            (&[Old, Active], Step::Taint, Ok(&[(1, Tainted), (2, Active)])),
            (&[Active], Step::Taint, Err(OutOfTurn::NothingOld)),
            (&[Active, Prepared], Step::Retire, Err(OutOfTurn::NothingOld)),
            (&[Old, Active], Step::Retire, Ok(&[(2, Active)])),
            (&[Tainted, Active], Step::Retire, Ok(&[(2, Active)])),
            (&[Active, Prepared], Step::Abandon, Ok(&[(1, Active)])),
            (&[Active], Step::Abandon, Err(OutOfTurn::NothingToAbandon)),
            (&[Old, Active], Step::Abandon, Err(OutOfTurn::NothingToAbandon)),
            (&[Tainted, Active], Step::Abandon, Err(OutOfTurn::NothingToAbandon)),
            (&[Active], Step::Compromise, Ok(&[(1, Tainted), (2, Active)])),
            (&[Active, Prepared], Step::Compromise, Ok(&[(1, Tainted), (2, Tainted), (3, Active)])),
        ];
        for (before, step, expected) in rows {
            let got = after(&list(before), step, NOW);
            let got = got.map(|list| list.iter().map(|e| (e.number, e.stage)).collect::<Vec<_>>());
            assert_eq!(got, expected.map(<[_]>::to_vec), "{before:?} {step:?}");
        }
    }

    #[test]
    fn a_number_is_never_used_twice_in_a_row() {
        let mut list = list(&[Stage::Active]);
        for expected in 2..5 {
            list = after(&list, Step::Prepare, NOW).unwrap();
            while let Some(step) = next(&list) {
                list = after(&list, step, NOW).unwrap();
            }
            assert_eq!((list.iter().map(|e| e.number).collect::<Vec<_>>(), next(&list)), (vec![expected], None));
        }
    }

    #[test]
    fn what_was_compromised_stays_so_and_what_comes_after_is_not() {
        let lost = after(&list(&[Stage::Active, Stage::Prepared]), Step::Compromise, NOW).unwrap();
        assert_eq!(lost.iter().map(|e| e.compromised).collect::<Vec<_>>(), [true, true, false]);
        assert!(!after(&lost, Step::Retire, NOW).unwrap()[0].compromised);
    }

    #[test]
    fn a_collector_without_the_roots_key_rotates_nothing() {
        let mut list = list(&[Stage::Active]);
        list[0].member = true;
        for step in [Step::Prepare, Step::Activate, Step::Taint, Step::Retire, Step::Compromise, Step::Abandon] {
            assert_eq!(after(&list, step, NOW), Err(OutOfTurn::Member));
        }
    }

    #[test]
    fn who_lags_is_named_and_who_is_away_is_marked() {
        let (old, active) = (Sha256([1; 32]), Sha256([2; 32]));
        let holder = |name: &str, root, confirmed, hours: i64| Holder {
            agent: format!("spiffe://x/shop/{name}#1").parse().unwrap(),
            spki: Sha256([0; 32]),
            root,
            not_after: Timestamp::from_secs(NOW.as_secs() + hours * 3600),
            confirmed,
        };
        let holders = [
            holder("done", active, 7, 5),
            holder("lags", active, 6, 5),
            holder("leads", active, 8, 5),
            holder("old", old, 7, 5),
            holder("never", old, 0, 5),
            holder("away", old, 3, -1),
            holder("gone", old, 3, -30),
        ];
        let named = |step| -> Vec<(String, bool)> {
            let found = missing(&holders, step, 7, active, HOUR * 24, NOW);
            found.into_iter().map(|m| (m.who, m.away)).collect()
        };
        let rows = |names: &[(&str, bool)]| {
            names.iter().map(|(n, a)| (format!("spiffe://x/shop/{n}#1"), *a)).collect::<Vec<_>>()
        };
        assert_eq!(named(Step::Prepare), rows(&[]));
        assert_eq!(named(Step::Activate), rows(&[("lags", false), ("leads", false), ("never", false), ("away", true)]));
        assert_eq!(
            named(Step::Retire),
            rows(&[("lags", false), ("leads", false), ("old", false), ("never", false), ("away", true)])
        );
    }
}
