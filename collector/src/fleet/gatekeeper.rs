//! Asks the gates whenever an answer could have changed: after events of the kinds that they read, after a change of the
//! directive, and every second for what only time changes.

use std::sync::Arc;
use std::time::Duration;

use sidewarden_proto::directive::Directive;
use sidewarden_proto::event::{Body, Event, GateStatus, QuarantineChanged, Severity};
use sidewarden_proto::identity::AgentId;
use sidewarden_proto::policy::{Applied, Policy};
use sidewarden_proto::time::Timestamp;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::MissedTickBehavior;

use super::RevokeError;
use super::quarantine::{Decided, Free, Sharers, agent_of, decide, enforce};
use crate::app::Core;
use crate::commit::{Closed, Committed};

const EVERY: Duration = Duration::from_secs(1);
/// The least time between two looks, each of which goes over all instances.
const PAUSE: Duration = Duration::from_millis(100);
/// The kinds of event that gates read.
const KINDS: [&str; 4] = ["posture.baseline", "verdict.changed", "process.entered", "process.shell"];

/// The policy of the directive, read once for each version. Until one could be read there is none, which is not an empty one.
#[derive(Default)]
struct Reading {
    of: Option<Option<Applied>>,
    policy: Option<Arc<Policy>>,
}

impl Reading {
    fn of(&mut self, applied: Option<&Applied>) -> Option<Arc<Policy>> {
        if self.of.as_ref().map(Option::as_ref) != Some(applied) {
            match Policy::parse(applied.map_or("", |applied| &applied.text)) {
                Ok(policy) => self.policy = Some(Arc::new(policy)),
                // What was in force stays so: nobody comes free by a text that this version cannot read.
                Err(error) => tracing::error!(%error, "the policy in force cannot be read by this collector"),
            }
            self.of = Some(applied.cloned());
        }
        self.policy.clone()
    }
}

/// Keeps the gates until the shutdown.
pub async fn keep(core: Core) {
    let mut commits = core.commits.subscribe();
    let mut directive = core.directives.subscribe();
    let mut beat = tokio::time::interval(EVERY);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reading = Reading::default();
    loop {
        tokio::select! {
            () = core.shutdown.cancelled() => return,
            _ = beat.tick() => {}
            is_due = next(&mut commits) => if !is_due { continue },
            changed = directive.changed() => if changed.is_err() { return },
        }
        if let Err(Closed) = look(&core, &mut reading).await {
            return;
        }
        // A burst of events is looked at once.
        tokio::time::sleep(PAUSE).await;
    }
}

/// Waits for the next link; whether gates read something in it, or may have missed it.
async fn next(commits: &mut broadcast::Receiver<Arc<Committed>>) -> bool {
    match commits.recv().await {
        Ok(link) => link.events().iter().any(|event| KINDS.contains(&event.kind.as_ref())),
        Err(RecvError::Lagged(_)) => true,
        // The shutdown ends the loop; until then there is nothing to wait for.
        Err(RecvError::Closed) => std::future::pending().await,
    }
}

async fn look(core: &Core, reading: &mut Reading) -> Result<(), Closed> {
    let (in_force, now) = (core.directives.now(), (core.clock)());
    // Of gates that nobody can read, nobody can say who passes them: whoever is quarantined stays so.
    let Some(policy) = reading.of(in_force.directive.policy.as_ref()) else { return Ok(()) };
    let Some(decided) = carry_out(core, &policy, &in_force.directive, now).await else { return Ok(()) };
    let is_any = !decided.changes.is_empty();
    for change in decided.changes {
        core.commits.own(event(change, now)).await?;
    }
    // What was told must be in the state before the next look, or it would be told twice.
    if is_any { core.commits.flush().await } else { Ok(()) }
}

/// Decides, and puts it in force for as many as the directive has room for: whoever finds none is told. `None`: it is tried again.
async fn carry_out(core: &Core, policy: &Policy, directive: &Directive, now: Timestamp) -> Option<Decided> {
    let is_over = directive.released.iter().any(|release| release.until_us <= now);
    let mut free = Free::of(directive);
    loop {
        let decided = decided(core, policy, directive, &free, now).await?;
        if decided.quarantined == directive.quarantined && !is_over {
            return Some(decided);
        }
        let failed = match put_in_force(core, &decided, now).await? {
            Ok(()) => return Some(decided),
            Err(failed) => failed,
        };
        let fewer = if failed.is_full() { Free::fewer(&decided, directive, failed.to_string()) } else { None };
        let Some(fewer) = fewer else {
            tracing::error!(error = %failed, "a quarantine cannot be put in force; it is tried again");
            return None;
        };
        free = fewer;
    }
}

/// The decision. Of whoever it quarantines is asked who has a key in common with it, and then it is made again: what is true of a
/// key is known of all of them before anybody is cut off. `None`: that could not be told, and is asked again.
async fn decided(core: &Core, policy: &Policy, directive: &Directive, free: &Free, now: Timestamp) -> Option<Decided> {
    let mut sharers = Sharers::new();
    loop {
        let decided = decide(policy, directive, &core.commits.state(), &sharers, free.clone(), now);
        let asked = |agent: &AgentId| sharers.contains_key(agent);
        let open: Vec<AgentId> = decided.quarantined.iter().map(agent_of).filter(|agent| !asked(agent)).collect();
        if open.is_empty() {
            return Some(decided);
        }
        // Each round asks about somebody new, of whom there is an end.
        sharers.extend(ask_sharers(core, open, now).await?);
    }
}

async fn ask_sharers(core: &Core, agents: Vec<AgentId>, now: Timestamp) -> Option<Sharers> {
    let issuer = core.issuer.clone();
    let ask = move || {
        let register = issuer.register();
        agents.into_iter().map(|agent| register.sharers(&agent, now).map(|others| (agent, others))).collect()
    };
    match tokio::task::spawn_blocking(ask).await {
        Ok(Ok(sharers)) => Some(sharers),
        Ok(Err(error)) => {
            tracing::error!(%error, "nobody can be quarantined before it is known who has a key in common; it is tried again");
            None
        }
        Err(error) => {
            tracing::error!(%error, "asking who has a key in common ended by a panic");
            None
        }
    }
}

async fn put_in_force(core: &Core, decided: &Decided, now: Timestamp) -> Option<Result<(), RevokeError>> {
    let (issuer, directives, decided) = (core.issuer.clone(), core.directives.clone(), decided.clone());
    let put = tokio::task::spawn_blocking(move || enforce(&issuer, &directives, &decided, now)).await;
    put.inspect_err(|error| tracing::error!(%error, "putting a quarantine in force ended by a panic")).ok()
}

fn event(change: QuarantineChanged, now: Timestamp) -> Event {
    let who = format!("{}#{}", change.workload, change.instance);
    let QuarantineChanged { gate, why, .. } = &change;
    let (severity, summary) = match change.status {
        GateStatus::Quarantined => (Severity::Critical, format!("{who} was quarantined by the gate {gate}: {why}")),
        GateStatus::Capped => {
            (Severity::Critical, format!("{who} breaks the gate {gate} and runs on, for no more may be stopped: {why}"))
        }
        GateStatus::DryRun => (Severity::Warning, format!("{who} would be quarantined by the gate {gate}: {why}")),
        GateStatus::Clear => (Severity::Notice, format!("{who} passes the gate {gate} again: {why}")),
    };
    Event::new(now, severity, summary, &Body::from(change))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_that_cannot_be_read_is_not_an_empty_one_and_takes_no_other_away() {
        let applied = |version, text: &str| Applied { version, text: text.to_owned(), needs: 0 };
        let (good, newer) = (applied(1, "[[gate]]\nname = 'g'\nchecks = ['privileged']\n"), applied(2, "[[moon]]\n"));
        let gates = |read: Option<Arc<Policy>>| read.map(|policy| policy.gates.len());
        let mut reading = Reading::default();
        assert_eq!(gates(reading.of(Some(&newer))), None, "after a restart");
        assert_eq!(gates(reading.of(Some(&newer))), None, "and at each look after it");
        assert_eq!(gates(reading.of(Some(&good))), Some(1));
        assert_eq!(gates(reading.of(Some(&newer))), Some(1), "what was in force stays so");
        assert_eq!(gates(reading.of(None)), Some(0));
        assert_eq!(gates(Reading::default().of(None)), Some(0));
    }
}
