//! How long to wait before trying again: doubling, with full jitter, so that a fleet does not come back as one.

use std::time::Duration;

/// Fills a buffer with random bytes; passed in, so that tests can choose them.
pub type Random = fn(&mut [u8]);

/// The machine's randomness.
pub fn random(bytes: &mut [u8]) {
    if aws_lc_rs::rand::fill(bytes).is_err() {
        // The provider's generator does not fail once it is seeded; a run without randomness must not go on.
        tracing::error!("the random generator failed");
        std::process::abort();
    }
}

/// A part of `span`, chosen evenly.
pub fn part_of(span: Duration, random: Random) -> Duration {
    let mut bytes = [0; 4];
    random(&mut bytes);
    span.mul_f64(f64::from(u32::from_be_bytes(bytes)) / f64::from(u32::MAX))
}

/// The waits of one series of failures.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    failures: u32,
    random: Random,
}

impl Backoff {
    /// Waits of up to `first`, then twice that, and never more than `most`.
    pub fn new(first: Duration, most: Duration, random: Random) -> Backoff {
        Backoff { first, most, failures: 0, random }
    }

    /// How long to wait after one more failure: at least a tenth of the span, so that no series is a busy loop.
    pub fn after_failure(&mut self) -> Duration {
        let span = self.first.saturating_mul(1 << self.failures.min(20)).min(self.most);
        self.failures = self.failures.saturating_add(1);
        span / 10 + part_of(span * 9 / 10, self.random)
    }

    /// It worked: the next failure is the first of a new series.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_limit_and_begin_anew() {
        let (first, most) = (Duration::from_millis(200), Duration::from_secs(1));
        let mut longest = Backoff::new(first, most, |bytes| bytes.fill(0xFF));
        let waits: Vec<u128> = (0..5).map(|_| longest.after_failure().as_millis()).collect();
        assert_eq!(waits, [200, 400, 800, 1000, 1000]);
        longest.reset();
        assert_eq!(longest.after_failure().as_millis(), 200);
        let mut shortest = Backoff::new(first, most, |bytes| bytes.fill(0));
        assert_eq!(shortest.after_failure().as_millis(), 20);
    }
}
