//! Gets notices to sinks: one task and one bounded queue for each, so that a dead receiver keeps nobody waiting.
//!
//! A delivery that fails is tried again with growing, jittered pauses until its patience ends; then it is a dead letter,
//! counted and logged. For a sink that is told everything again every minute, patience ends with the next repeat.

use std::sync::Arc;
use std::time::Duration;

use prometheus::{IntCounterVec, IntGauge, IntGaugeVec, Opts};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Notice, Sink};

/// Notices that wait for one sink.
const QUEUE: usize = 256;
/// How long a change is worth retrying for a sink that is told changes only.
const PATIENCE: Duration = Duration::from_secs(900);
/// First and longest pause between two attempts.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));

/// What delivering did, in numbers.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Attempts by sink and outcome (`delivered`, `retried`, `dead`).
    pub notifications: IntCounterVec,
    /// Notices that wait, by sink.
    pub waiting: IntGaugeVec,
    /// Alerts that were not raised because there were too many.
    pub over_limit: IntGauge,
}

impl Default for Stats {
    fn default() -> Stats {
        let notifications = Opts::new(
            "sidewarden_collector_alert_notifications_total",
            "Alert notifications by sink and outcome; dead ones were given up.",
        );
        let waiting =
            Opts::new("sidewarden_collector_alert_notifications_waiting", "Notifications that wait, by sink.");
        Stats {
            notifications: IntCounterVec::new(notifications, &["sink", "outcome"]).expect("the names are constants"),
            waiting: IntGaugeVec::new(waiting, &["sink"]).expect("the names are constants"),
            over_limit: IntGauge::new(
                "sidewarden_collector_alerts_over_limit",
                "Alerts not raised since the start because there were too many.",
            )
            .expect("the name is a constant"),
        }
    }
}

impl Stats {
    /// All of them, to be registered.
    pub fn collectors(&self) -> Vec<Box<dyn prometheus::core::Collector>> {
        vec![Box::new(self.notifications.clone()), Box::new(self.waiting.clone()), Box::new(self.over_limit.clone())]
    }

    fn count(&self, sink: &dyn Sink, outcome: &str) {
        self.notifications.with_label_values(&[sink.name(), outcome]).inc();
    }
}

/// The ways to all sinks. Their tasks end when this is dropped and their queues are empty.
pub struct Outbox {
    ways: Vec<Way>,
    tasks: JoinSet<()>,
    stats: Stats,
}

/// The way to one sink.
struct Way {
    sink: Arc<dyn Sink>,
    queue: mpsc::Sender<Arc<Notice>>,
}

impl Outbox {
    /// Starts a task for each sink. `repeat` is the interval at which the caller repeats what stands.
    pub fn start(sinks: Vec<Arc<dyn Sink>>, repeat: Duration, stats: Stats) -> Outbox {
        let mut tasks = JoinSet::new();
        let mut ways = Vec::new();
        for sink in sinks {
            let (queue, notices) = mpsc::channel(QUEUE);
            for outcome in ["delivered", "retried", "dead"] {
                stats.notifications.with_label_values(&[sink.name(), outcome]);
            }
            let patience = if sink.wants_repeats() { repeat } else { PATIENCE };
            tasks.spawn(work(sink.clone(), notices, patience, stats.clone()));
            ways.push(Way { sink, queue });
        }
        Outbox { ways, tasks, stats }
    }

    /// Tells every sink what changed.
    pub fn tell(&self, notice: Notice) {
        self.send(notice, |_| true);
    }

    /// Tells the sinks that want it everything that stands.
    pub fn repeat(&self, notice: Notice) {
        self.send(notice, |sink| sink.wants_repeats());
    }

    fn send(&self, notice: Notice, to: impl Fn(&dyn Sink) -> bool) {
        let notice = Arc::new(notice);
        for Way { sink, queue } in self.ways.iter().filter(|way| to(&*way.sink)) {
            match queue.try_send(notice.clone()) {
                Ok(()) => {}
                Err(TrySendError::Full(_)) => {
                    self.stats.count(&**sink, "dead");
                    tracing::error!(sink = sink.name(), waiting = QUEUE, "alerts dropped: too many wait for this sink");
                }
                Err(TrySendError::Closed(_)) => tracing::error!(sink = sink.name(), "the sink's task is gone"),
            }
            self.stats.waiting.with_label_values(&[sink.name()]).set((QUEUE - queue.capacity()) as i64);
        }
    }

    /// What delivering did, in numbers.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Waits until everything queued is delivered or given up, but no longer than `limit`.
    pub async fn drain(mut self, limit: Duration) {
        self.ways.clear();
        let done = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(limit, done).await.is_err() {
            tracing::warn!(limit = ?limit, "some alerts were not delivered before the end");
        }
    }
}

async fn work(sink: Arc<dyn Sink>, mut notices: mpsc::Receiver<Arc<Notice>>, patience: Duration, stats: Stats) {
    while let Some(notice) = notices.recv().await {
        stats.waiting.with_label_values(&[sink.name()]).set(notices.len() as i64);
        deliver(&*sink, &notice, patience, &stats).await;
    }
}

async fn deliver(sink: &dyn Sink, notice: &Notice, patience: Duration, stats: &Stats) {
    let end = Instant::now() + patience;
    for attempt in 0.. {
        let Err(error) = sink.deliver(notice).await else {
            stats.count(sink, "delivered");
            return;
        };
        let pause = pause(attempt, random());
        if !error.retry || Instant::now() + pause >= end {
            stats.count(sink, "dead");
            tracing::error!(sink = sink.name(), alerts = notice.alerts.len(), %error, "alerts were not delivered");
            return;
        }
        stats.count(sink, "retried");
        tracing::warn!(sink = sink.name(), attempt, %error, ?pause, "alerts wait for another attempt");
        tokio::time::sleep(pause).await;
    }
}

/// Doubles with each attempt up to a limit; between half of that and all of it, by `random` from 0 to 1.
fn pause(attempt: u32, random: f64) -> Duration {
    let (first, longest) = PAUSES;
    let whole = first.saturating_mul(1 << attempt.min(16)).min(longest);
    whole.mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
}

/// From 0 to 1. Jitter need not be unpredictable: should the system have no randomness, the middle will do.
fn random() -> f64 {
    let mut bytes = [0; 2];
    match aws_lc_rs::rand::fill(&mut bytes) {
        Ok(()) => f64::from(u16::from_be_bytes(bytes)) / f64::from(u16::MAX),
        Err(_) => 0.5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alert::{Delivery, SinkError};
    use sidewarden_proto::time::Timestamp;
    use std::sync::Mutex;

    /// Answers in turn what it was told to, then success.
    struct Moody {
        answers: Mutex<Vec<Result<(), SinkError>>>,
        repeats: bool,
    }

    impl Sink for Moody {
        fn name(&self) -> &str {
            "moody"
        }
        fn wants_repeats(&self) -> bool {
            self.repeats
        }
        fn deliver<'a>(&'a self, _: &'a Notice) -> Delivery<'a> {
            let answer = self.answers.lock().unwrap().pop().unwrap_or(Ok(()));
            Box::pin(async move { answer })
        }
    }

    fn fails(times: usize, retry: bool) -> Vec<Result<(), SinkError>> {
        vec![Err(SinkError { what: "no".into(), retry }); times]
    }

    fn notice() -> Notice {
        Notice { at: Timestamp(0), alerts: Vec::new(), page: String::new() }
    }

    /// (delivered, retried, dead) after one notice to a sink that fails so often.
    async fn outcome(answers: Vec<Result<(), SinkError>>, repeats: bool) -> (u64, u64, u64) {
        let stats = Stats::default();
        let sink: Arc<dyn Sink> = Arc::new(Moody { answers: Mutex::new(answers), repeats });
        let outbox = Outbox::start(vec![sink], Duration::from_secs(60), stats.clone());
        outbox.tell(notice());
        outbox.drain(Duration::from_secs(3600)).await;
        let count = |outcome| stats.notifications.with_label_values(&["moody", outcome]).get();
        (count("delivered"), count("retried"), count("dead"))
    }

    #[tokio::test(start_paused = true)]
    async fn a_failing_receiver_is_tried_again_until_it_takes_the_alert() {
        assert_eq!(outcome(fails(0, true), false).await, (1, 0, 0));
        assert_eq!(outcome(fails(7, true), false).await, (1, 7, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_that_will_not_change_is_a_dead_letter_at_once() {
        assert_eq!(outcome(fails(1, false), false).await, (0, 0, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn patience_ends_and_the_loss_is_counted() {
        let (delivered, retried, dead) = outcome(fails(10_000, true), false).await;
        assert!((delivered, dead) == (0, 1) && (30..100).contains(&retried), "{retried}");
        let (_, retried, dead) = outcome(fails(10_000, true), true).await;
        assert!(dead == 1 && retried < 20, "{retried}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stuck_sink_fills_its_own_queue_and_what_finds_no_room_is_counted() {
        let stats = Stats::default();
        let sink: Arc<dyn Sink> = Arc::new(Moody { answers: Mutex::new(fails(1_000_000, true)), repeats: false });
        let outbox = Outbox::start(vec![sink], Duration::from_secs(60), stats.clone());
        (0..QUEUE + 50).for_each(|_| outbox.tell(notice()));
        assert_eq!(stats.notifications.with_label_values(&["moody", "dead"]).get(), 50);
    }

    #[test]
    fn pauses_grow_to_a_limit_and_are_never_the_same_for_all() {
        assert_eq!(pause(0, 1.0), Duration::from_millis(250));
        assert_eq!(pause(0, 0.0), Duration::from_millis(125));
        assert_eq!(pause(3, 1.0), Duration::from_secs(2));
        assert_eq!(pause(4_000_000, 1.0), Duration::from_secs(30));
    }
}
