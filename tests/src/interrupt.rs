//! Ctrl-C as a fact that every wait looks at, so that containers are taken down on the way out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From here on SIGINT, SIGTERM and SIGHUP are noted instead of ending the program. By a handler, not by a blocked mask:
/// what we start would inherit the mask, and could not be ended.
pub fn watch() -> Result<()> {
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler does nothing but store to an atomic, which is allowed in a signal handler.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

extern "C" fn note(_: std::ffi::c_int) {
    INTERRUPTED.store(true, Ordering::SeqCst);
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
