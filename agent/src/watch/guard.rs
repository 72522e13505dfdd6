//! Whether the packet rules that the configuration asks for are in force, and nobody of the workload can get past them.
//! Asking the kernel is at the edge; what to tell is decided by [`Guard::judge`], which is pure.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use sidewarden_proto::event::{Body, Event, InterceptionBroken, InterceptionHolds, Severity};
use sidewarden_proto::time::Timestamp;

use crate::facts::{Lock, Process, ProcessId};
use crate::intercept::{Mark, Ruleset, bypasses};

/// The one-shot that installs the rules joins a network namespace that is there already, often ours: after a start it
/// has this long. Once they were in force there is no grace.
const GRACE: Duration = Duration::from_secs(15);
/// So many ways past the rules are told.
const MAX_TOLD: usize = 8;

/// Watches over the rules.
#[derive(Debug)]
pub struct Guard {
    rules: Ruleset,
    /// Who was there at the last look.
    seen: BTreeSet<ProcessId>,
    since: Option<Instant>,
    why: Vec<String>,
    /// What was told last; `None` before the first time.
    told: Option<Vec<String>>,
}

impl Guard {
    /// Over `rules`. Until the first look they are held to be missing.
    pub fn new(rules: Ruleset) -> Guard {
        Guard {
            rules,
            seen: BTreeSet::new(),
            since: None,
            why: vec!["they were not looked for yet".into()],
            told: None,
        }
    }

    /// Looks; the event if there is something to tell.
    pub fn look(&mut self, members: &[Process], now: Instant, at: Timestamp) -> Option<Event> {
        let mut why: Vec<String> = missing(&self.rules.mark).into_iter().collect();
        why.extend(bypasses(&self.settled(members), self.rules.gid));
        self.judge(why, now, at)
    }

    /// Those that were there at the last look, too: a one-shot that reads the rules has the power to change them, and is
    /// gone at once. So is the power of a container runtime on its way in.
    fn settled<'a>(&mut self, members: &'a [Process]) -> Vec<&'a Process> {
        let before = std::mem::replace(&mut self.seen, members.iter().map(|p| p.id).collect());
        members.iter().filter(|p| before.contains(&p.id) && !p.is_runtime()).collect()
    }

    /// What the rules do for the workload's listeners at the moment.
    pub fn lock(&self) -> Lock {
        match (self.rules.locks, self.why.is_empty()) {
            (false, _) => Lock::Off,
            (true, true) => Lock::InForce,
            (true, false) => Lock::Broken,
        }
    }

    /// What is wrong, if anything is.
    pub fn trouble(&self) -> Option<&[String]> {
        (!self.why.is_empty()).then_some(&self.why)
    }

    /// How things stand is told with the next look, changed or not.
    pub fn tell_anew(&mut self) {
        self.told = self.told.take().and(Some(vec!["told anew".into()]));
    }

    fn judge(&mut self, mut why: Vec<String>, now: Instant, at: Timestamp) -> Option<Event> {
        let more = why.len().saturating_sub(MAX_TOLD);
        why.truncate(MAX_TOLD);
        if more > 0 {
            why.push(format!("and {more} more"));
        }
        let since = *self.since.get_or_insert(now);
        self.why = why;
        let early = self.told.is_none() && now.duration_since(since) < GRACE;
        if self.told.as_ref() == Some(&self.why) || (early && !self.why.is_empty()) {
            return None;
        }
        self.told = Some(self.why.clone());
        Some(event(&self.why, &self.rules.bypass, at))
    }
}

fn missing(mark: &Mark) -> Option<String> {
    match mark.is_in_force() {
        Ok(true) => None,
        Ok(false) => Some("the rules of this configuration are not in force in this network namespace".into()),
        Err(error) => Some(format!("it cannot be told whether the rules are in force: {error}")),
    }
}

fn event(why: &[String], bypass: &[String], at: Timestamp) -> Event {
    match why {
        [] => {
            let summary = "the rules of `intercept` are in force, and nobody seen here can get past them";
            let (severity, but) = match bypass {
                [] => (Severity::Info, String::new()),
                declared => {
                    (Severity::Notice, format!("; as declared, past the agent goes {}", declared.join(", and ")))
                }
            };
            let body = InterceptionHolds { bypass: bypass.to_vec() };
            Event::new(at, severity, format!("{summary}{but}"), &Body::from(body))
        }
        [first, more @ ..] => {
            let more = if more.is_empty() { String::new() } else { format!(" (and {} more)", more.len()) };
            let summary = format!("interception does not hold: {first}{more}");
            Event::new(at, Severity::Critical, summary, &Body::from(InterceptionBroken { why: why.to_vec() }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Ruleset {
        let (table, mark) = (String::new(), Mark::of("nobody installed these"));
        Ruleset { table, mark, gid: 13100, locks: true, bypass: Vec::new() }
    }

    /// Seconds, and what is wrong then.
    type Look = (u64, &'static [&'static str]);

    /// What is told when `why` is found at each of these seconds.
    fn told(looks: &[Look]) -> Vec<String> {
        let (mut guard, begun) = (Guard::new(rules()), Instant::now());
        let mut told = Vec::new();
        for (secs, why) in looks {
            let why: Vec<String> = why.iter().map(|w| (*w).to_owned()).collect();
            let broken = !why.is_empty();
            let event = guard.judge(why, begun + Duration::from_secs(*secs), Timestamp(0));
            assert_eq!(guard.lock() == Lock::Broken, broken);
            assert_eq!(guard.trouble().is_some(), broken);
            told.extend(event.map(|e| format!("{secs} {}", e.kind)));
        }
        told
    }

    #[test]
    fn rules_that_come_in_time_are_told_once_and_their_end_at_once() {
        let gone: &[&str] = &["gone"];
        let rows: [(&[Look], &[&str]); 5] = [
            (&[(0, &[]), (1, &[])], &["0 interception.holds"]),
            (&[(0, gone), (9, gone), (10, &[])], &["10 interception.holds"]),
            (&[(0, gone), (15, gone), (16, gone)], &["15 interception.broken"]),
            (
                &[(0, &[]), (1, gone), (2, &[])],
                &["0 interception.holds", "1 interception.broken", "2 interception.holds"],
            ),
            (
                &[(0, &[]), (1, gone), (2, &["other"])],
                &["0 interception.holds", "1 interception.broken", "2 interception.broken"],
            ),
        ];
        for (looks, expected) in rows {
            assert_eq!(told(looks), expected, "{looks:?}");
        }
    }

    #[test]
    fn rules_for_the_way_out_alone_keep_nobody_off() {
        let mut guard = Guard::new(Ruleset { locks: false, ..rules() });
        assert_eq!(guard.lock(), Lock::Off);
        guard.judge(Vec::new(), Instant::now(), Timestamp(0));
        assert_eq!(guard.lock(), Lock::Off);
    }

    #[test]
    fn it_is_told_anew_when_asked_for() {
        let mut guard = Guard::new(rules());
        guard.tell_anew();
        let judge = |guard: &mut Guard| guard.judge(Vec::new(), Instant::now(), Timestamp(0)).is_some();
        assert!(judge(&mut guard) && !judge(&mut guard));
        guard.tell_anew();
        assert!(judge(&mut guard));
    }

    #[test]
    fn what_may_go_past_the_agent_is_told_with_its_reason() {
        let bypass = vec!["udp to 10.96.0.10, port 53: DNS".to_owned()];
        let told = event(&[], &bypass, Timestamp(0));
        assert_eq!(told.severity, Severity::Notice);
        assert!(told.summary.ends_with("past the agent goes udp to 10.96.0.10, port 53: DNS"), "{}", told.summary);
    }

    #[test]
    fn who_can_get_past_is_named_and_many_are_counted() {
        let evil = Process { gids: [13100; 4], name: "sh".into(), ..Process::default() };
        let mut guard = Guard::new(rules());
        let many = vec![evil; 20];
        guard.look(&many, Instant::now(), Timestamp(0));
        assert_eq!(guard.trouble().unwrap().len(), 1, "they may be gone at once");
        guard.look(&many, Instant::now(), Timestamp(0));
        let why = guard.trouble().unwrap();
        assert_eq!(why.len(), MAX_TOLD + 1);
        assert!(why[0].contains("not in force") && why[1].contains("pid 0 (sh)") && why[8] == "and 13 more", "{why:?}");
    }
}
