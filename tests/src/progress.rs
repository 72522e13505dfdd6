//! What is being done now and for how long: one line that moves on a terminal, a line now and then elsewhere.

use std::io::{IsTerminal, Write};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;

/// Where work is announced. Several pieces may be under way at once.
#[derive(Debug)]
pub struct Progress {
    board: Arc<Board>,
    stop: Option<Sender<()>>,
    ticker: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Board {
    terminal: bool,
    tasks: Mutex<Vec<Task>>,
}

#[derive(Debug)]
struct Task {
    id: usize,
    title: String,
    detail: String,
    started: Instant,
    told: Instant,
}

/// How often a line is written where no line can be moved.
const QUIET: Duration = Duration::from_secs(30);

impl Progress {
    /// On standard output.
    pub fn start() -> Progress {
        let board = Arc::new(Board { terminal: std::io::stdout().is_terminal(), tasks: Mutex::default() });
        let (stop, stopped) = mpsc::channel();
        let shown = board.clone();
        let ticker = std::thread::spawn(move || {
            let every = Duration::from_millis(200);
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(every) {
                shown.show();
            }
        });
        Progress { board, stop: Some(stop), ticker: Some(ticker) }
    }

    /// Does `work` under `title`; its `Detail` says what goes on inside. At the end there is one line for it.
    pub fn step<T>(&self, title: &str, work: impl FnOnce(&Detail<'_>) -> Result<T>) -> Result<T> {
        let detail = self.board.begin(title);
        let result = work(&detail);
        self.board.finish(&detail, result.is_ok());
        result
    }

    /// A line of its own, above what is under way.
    pub fn note(&self, text: &str) {
        self.board.line(text);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(ticker) = self.ticker.take() {
            // It only prints; there is nothing to lose with it.
            let _ = ticker.join();
        }
    }
}

/// The piece of work that is under way.
#[derive(Debug)]
pub struct Detail<'a> {
    board: &'a Board,
    id: usize,
}

impl Detail<'_> {
    /// What goes on in it right now.
    pub fn now(&self, text: &str) {
        if let Some(task) = self.board.tasks().iter_mut().find(|t| t.id == self.id) {
            task.detail = text.trim().chars().take(48).collect();
        }
    }
}

impl Board {
    fn tasks(&self) -> MutexGuard<'_, Vec<Task>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, title: &str) -> Detail<'_> {
        let now = Instant::now();
        let mut tasks = self.tasks();
        let id = tasks.iter().map(|t| t.id + 1).max().unwrap_or(0);
        tasks.push(Task { id, title: title.into(), detail: String::new(), started: now, told: now });
        Detail { board: self, id }
    }

    fn finish(&self, detail: &Detail<'_>, good: bool) {
        let mut tasks = self.tasks();
        let Some(at) = tasks.iter().position(|t| t.id == detail.id) else { return };
        let task = tasks.remove(at);
        drop(tasks);
        let mark = if good { "✓" } else { "✗" };
        self.line(&format!("  {mark} {} ({})", task.title, seconds(task.started.elapsed())));
    }

    fn line(&self, text: &str) {
        let clear = if self.terminal { "\r\x1b[K" } else { "" };
        println!("{clear}{text}");
    }

    fn show(&self) {
        let mut tasks = self.tasks();
        if tasks.is_empty() {
            return;
        }
        if self.terminal {
            let now: Vec<String> = tasks.iter().map(describe).collect();
            let line: String = now.join("   ").chars().take(118).collect();
            print!("\r\x1b[K{line}");
            // A terminal that went away is no reason to stop.
            let _ = std::io::stdout().flush();
            return;
        }
        for task in tasks.iter_mut().filter(|t| t.told.elapsed() >= QUIET) {
            task.told = Instant::now();
            println!("{}", describe(task));
        }
    }
}

fn describe(task: &Task) -> String {
    let detail = if task.detail.is_empty() { String::new() } else { format!(": {}", task.detail) };
    format!("  … {} {}{detail}", task.title, seconds(task.started.elapsed()))
}

/// A duration as people say it.
pub fn seconds(duration: Duration) -> String {
    match duration.as_secs() {
        0..=9 => format!("{:.1} s", duration.as_secs_f64()),
        s @ 10..=99 => format!("{s} s"),
        s => format!("{} min {:02} s", s / 60, s % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_like_speech() {
        for (millis, text) in [(0, "0.0 s"), (1_250, "1.2 s"), (73_000, "73 s"), (125_900, "2 min 05 s")] {
            assert_eq!(seconds(Duration::from_millis(millis)), text);
        }
    }

    #[test]
    fn a_step_gives_what_its_work_gave() {
        let progress = Progress::start();
        let got = progress.step("adding", |detail| {
            detail.now("two numbers");
            Ok(1 + 1)
        });
        assert_eq!(got.unwrap(), 2);
        assert!(progress.step::<()>("failing", |_| anyhow::bail!("no")).is_err());
        assert!(progress.board.tasks().is_empty());
    }
}
