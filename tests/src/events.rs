//! The collector's events as they arrive: its own `events --follow`, read line by line.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;

use crate::docker::Docker;
use crate::interrupt;

/// One event, as the collector prints it.
#[derive(Clone, Debug, Deserialize)]
pub struct Event {
    /// Whose it is.
    pub agent: Agent,
    /// What it is, for example `connection.refused`.
    pub kind: String,
    /// How much it matters.
    pub severity: String,
    /// One line for a person.
    pub summary: String,
    /// The details, by kind.
    #[serde(default)]
    pub body: Value,
    /// When the collector had it, by its clock, in microseconds.
    pub received_us: u64,
    /// Which life of the agent's spool it comes from.
    pub epoch: String,
    /// Its place in that.
    pub seq: u64,
}

/// Who sent it.
#[derive(Clone, Debug, Deserialize)]
pub struct Agent {
    /// The workload's SPIFFE ID.
    pub workload: String,
    /// The instance of it.
    pub instance: String,
}

impl Event {
    /// Whether it is about `name`, for example `shop/orders`.
    pub fn of(&self, name: &str) -> bool {
        self.agent.workload.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('/'))
    }

    /// When the collector had it. Its clock is ours: it runs on this machine.
    pub fn received(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_micros(self.received_us)
    }

    /// Its place in the history: no two events have the same.
    pub fn place(&self) -> (String, String, String, u64) {
        (self.agent.workload.clone(), self.agent.instance.clone(), self.epoch.clone(), self.seq)
    }

    /// A text of its body, empty if there is none.
    pub fn text(&self, key: &str) -> &str {
        self.body.get(key).and_then(Value::as_str).unwrap_or_default()
    }
}

/// The stream of events, from now on.
#[derive(Debug)]
pub struct Events {
    child: Child,
    log: Arc<Log>,
}

#[derive(Debug, Default)]
struct Log {
    entries: Mutex<Entries>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Entries {
    seen: Vec<Event>,
    /// Why no more will come.
    ended: Option<String>,
}

impl Events {
    /// Follows the collector that runs in `container`.
    pub fn follow(docker: &Docker, container: &str) -> Result<Events> {
        let program = "/usr/bin/sidewarden-collector";
        let mut command = docker.follow(["exec", container, program, "events", "--follow", "--json"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("the follower has no standard output")?;
        let stderr = child.stderr.take().context("the follower has no standard error")?;
        let log = Arc::new(Log::default());
        let written = log.clone();
        std::thread::spawn(move || {
            let cause = written.read(BufReader::new(stdout));
            written.end(cause, stderr);
        });
        Ok(Events { child, log })
    }

    /// How many there were so far: a place to wait from.
    pub fn mark(&self) -> usize {
        self.log.entries().seen.len()
    }

    /// The first event after `mark` that `is` what is looked for; `None` when it does not come within `limit`.
    pub fn wait(&self, mark: usize, limit: Duration, is: impl Fn(&Event) -> bool) -> Result<Option<Event>> {
        let end = Instant::now() + limit;
        let mut entries = self.log.entries();
        loop {
            if let Some(found) = entries.seen.iter().skip(mark).find(|event| is(event)) {
                return Ok(Some(found.clone()));
            }
            if let Some(why) = &entries.ended {
                bail!("the collector's events ended: {why}");
            }
            interrupt::check()?;
            if Instant::now() >= end {
                return Ok(None);
            }
            let slice = Duration::from_millis(100);
            entries = self.log.changed.wait_timeout(entries, slice).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Everything after `mark`.
    pub fn since(&self, mark: usize) -> Vec<Event> {
        self.log.entries().seen.iter().skip(mark).cloned().collect()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // It may have ended already, with its container.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Log {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes lines in until there are no more, and says why there are no more.
    fn read(&self, lines: impl BufRead) -> String {
        for line in lines.lines() {
            let line = match line {
                Ok(line) => line,
                Err(error) => return error.to_string(),
            };
            match serde_json::from_str(&line) {
                Ok(event) => self.push(event),
                Err(error) => return format!("not an event: {error}: {line}"),
            }
        }
        "end of output".into()
    }

    fn push(&self, event: Event) {
        self.entries().seen.push(event);
        self.changed.notify_all();
    }

    fn end(&self, cause: String, mut stderr: impl Read) {
        let mut complaint = String::new();
        // Only for the message below.
        let _ = stderr.read_to_string(&mut complaint);
        self.entries().ended = Some([cause.as_str(), complaint.trim()].join(": "));
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = r#"{"agent":{"workload":"spiffe://t/shop/orders","instance":"o"},"epoch":"1","seq":1,"at_us":1,
        "received_us":1,"kind":"process.shell","severity":"warning","summary":"s","body":{"reason":"r"}}"#;

    #[test]
    fn lines_become_events_until_one_is_none() {
        let log = Log::default();
        let text = format!("{0}\n{0}\noops\n", LINE.replace('\n', ""));
        assert!(log.read(text.as_bytes()).contains("not an event"));
        assert_eq!(log.entries().seen.len(), 2);
    }

    #[test]
    fn an_event_belongs_to_its_workload_only() {
        let event: Event = serde_json::from_str(LINE).unwrap();
        assert_eq!(event.text("reason"), "r");
        for (name, of) in
            [("shop/orders", true), ("op/orders", false), ("shop/db", false), ("spiffe://t/shop/orders", true)]
        {
            assert_eq!(event.of(name), of, "{name}");
        }
    }
}
