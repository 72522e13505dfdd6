//! Ctrl-C as a fact that every wait looks at, so that containers are taken down on the way out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::sys::signal::{SigSet, Signal};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From here on SIGINT and SIGTERM are noted instead of ending the program. To be called before any thread starts:
/// threads inherit the blocked signals, and one of their own takes them.
pub fn watch() -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block()?;
    std::thread::spawn(move || {
        while signals.wait().is_ok() {
            INTERRUPTED.store(true, Ordering::SeqCst);
        }
    });
    Ok(())
}

/// Whether somebody wants us to end.
pub fn requested() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// An error once somebody wants us to end.
pub fn check() -> Result<()> {
    if requested() {
        bail!("interrupted");
    }
    Ok(())
}

/// Asks until there is an answer, at most for `limit`. For things that cannot call back: engines, other programs.
pub fn poll<T>(limit: Duration, every: Duration, mut ask: impl FnMut() -> Option<T>) -> Result<Option<T>> {
    let end = Instant::now() + limit;
    loop {
        check()?;
        if let Some(answer) = ask() {
            return Ok(Some(answer));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
        std::thread::sleep(every);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_poll_ends_with_the_answer_or_with_nothing() {
        let mut left = 3;
        let mut ask = || {
            left -= 1;
            (left == 0).then_some("there")
        };
        assert_eq!(poll(Duration::from_secs(60), Duration::ZERO, &mut ask).unwrap(), Some("there"));
        assert_eq!(poll(Duration::ZERO, Duration::ZERO, || None::<()>).unwrap(), None);
    }
}
