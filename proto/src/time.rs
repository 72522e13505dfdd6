//! One kind of moment for events, certificates and logs: microseconds since the Unix epoch, UTC.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// A moment: microseconds since 1970-01-01T00:00:00Z. Displays as RFC 3339.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// The machine's clock now. Only the edges call this; everything else is handed a `Timestamp`.
    pub fn now() -> Timestamp {
        SystemTime::now().into()
    }

    /// The moment `seconds` after the epoch.
    pub const fn from_secs(seconds: i64) -> Timestamp {
        Timestamp(seconds.saturating_mul(1_000_000))
    }

    /// Whole seconds since the epoch, rounded down.
    pub const fn as_secs(self) -> i64 {
        self.0.div_euclid(1_000_000)
    }

    /// How long `earlier` lies back; zero when it lies ahead.
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// This moment and `by` more.
    pub fn plus(self, by: Duration) -> Timestamp {
        Timestamp(self.0.saturating_add(i64::try_from(by.as_micros()).unwrap_or(i64::MAX)))
    }

    /// This moment less `by`.
    pub fn minus(self, by: Duration) -> Timestamp {
        Timestamp(self.0.saturating_sub(i64::try_from(by.as_micros()).unwrap_or(i64::MAX)))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(at: SystemTime) -> Timestamp {
        let micros = |d: Duration| i64::try_from(d.as_micros()).unwrap_or(i64::MAX);
        match at.duration_since(UNIX_EPOCH) {
            Ok(after) => Timestamp(micros(after)),
            Err(before) => Timestamp(-micros(before.duration())),
        }
    }
}

impl From<Timestamp> for SystemTime {
    fn from(at: Timestamp) -> SystemTime {
        let span = Duration::from_micros(at.0.unsigned_abs());
        if at.0 >= 0 { UNIX_EPOCH + span } else { UNIX_EPOCH - span }
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_microsecond(self.0) {
            Ok(at) => write!(f, "{at:.3}"),
            Err(_) => write!(f, "{}us", self.0),
        }
    }
}

impl std::str::FromStr for Timestamp {
    type Err = String;

    fn from_str(text: &str) -> Result<Timestamp, String> {
        let at: jiff::Timestamp = text.parse().map_err(|e| format!("not an RFC 3339 time: {e}"))?;
        Ok(Timestamp(at.as_microsecond()))
    }
}

/// The end of a day, like `2027-01-31`, or a moment, like `2027-01-31T12:00:00Z`.
pub fn end_of(text: &str) -> Result<Timestamp, String> {
    let fault = |_| format!("must be a day, like 2027-01-31, or a time, like 2027-01-31T12:00:00Z, not `{text}`");
    if text.contains('T') {
        return text.parse().map_err(fault);
    }
    let begin: Timestamp = format!("{text}T00:00:00Z").parse().map_err(fault)?;
    Ok(begin.plus(Duration::from_secs(24 * 3600)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_ends_where_the_next_begins() {
        assert_eq!(end_of("2027-01-31").unwrap().to_string(), "2027-02-01T00:00:00.000Z");
        assert_eq!(end_of("2027-01-31T12:00:00Z").unwrap().to_string(), "2027-01-31T12:00:00.000Z");
        ["", "soon", "2027-13-01", "31.1.2027"].iter().for_each(|bad| assert!(end_of(bad).is_err(), "{bad}"));
    }

    #[test]
    fn shows_and_reads_rfc_3339() {
        let at = Timestamp(1_700_000_000_123_000);
        assert_eq!(at.to_string(), "2023-11-14T22:13:20.123Z");
        assert_eq!("2023-11-14T22:13:20.123Z".parse(), Ok(at));
        assert!("yesterday".parse::<Timestamp>().is_err());
    }

    #[test]
    fn differences_never_wrap() {
        assert_eq!(Timestamp(5).since(Timestamp(9)), Duration::ZERO);
        assert_eq!(Timestamp(i64::MAX).plus(Duration::from_secs(1)), Timestamp(i64::MAX));
        assert_eq!(Timestamp(i64::MIN).to_string(), format!("{}us", i64::MIN));
    }
}
