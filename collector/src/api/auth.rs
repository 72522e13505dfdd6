//! Who may ask: a bearer token, compared in constant time, and a limit on wrong ones.
//!
//! The right token always passes. Wrong ones are refused, and a source that shows many is told to wait and is logged
//! once a minute, so that a guesser can neither learn anything nor fill the log.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sidewarden_proto::secret::Secret;
use sidewarden_proto::time::Timestamp;

use crate::ca::{self, CaError};

/// Wrong tokens of one source in a window that are answered with "wrong" rather than "wait".
const MAX_FAILURES: u32 = 10;
/// See [`MAX_FAILURES`].
const WINDOW: Duration = Duration::from_secs(60);
/// Sources remembered; when there are more, the oldest windows go first.
const MAX_SOURCES: usize = 10_000;
/// Bytes of a token that is made here.
const TOKEN_BYTES: usize = 32;

/// The token in the file at `path`; made there, readable by the owner only, if there is none yet.
pub fn admin_token(path: &Path) -> Result<Secret, CaError> {
    if let Ok(text) = std::fs::read_to_string(path)
        && text.trim().len() >= TOKEN_BYTES
    {
        return Ok(Secret::new(text.trim()));
    }
    let mut bytes = [0; TOKEN_BYTES];
    crate::random(&mut bytes);
    let token = Secret::new(URL_SAFE_NO_PAD.encode(bytes));
    ca::write_secret(path, format!("{}\n", token.reveal()).as_bytes())?;
    Ok(token)
}

/// The token of an `Authorization` header.
pub fn bearer(header: Option<&str>) -> Option<&str> {
    let (scheme, token) = header?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// What a wrong token is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Wrong; worth a line in the log.
    Wrong,
    /// Too many: come back after this long. The flag says whether it is worth a line in the log.
    Wait(Duration, bool),
}

/// Wrong tokens by source.
#[derive(Debug, Default)]
pub struct Failures(HashMap<IpAddr, (Timestamp, u32)>);

impl Failures {
    /// Counts a wrong token from `source`.
    pub fn failed(&mut self, source: IpAddr, now: Timestamp) -> Refused {
        if self.0.len() >= MAX_SOURCES && !self.0.contains_key(&source) {
            self.make_room(now);
        }
        let (since, count) = self.0.entry(source).or_insert((now, 0));
        if now.since(*since) >= WINDOW || now < *since {
            (*since, *count) = (now, 0);
        }
        *count = count.saturating_add(1);
        if *count <= MAX_FAILURES {
            return Refused::Wrong;
        }
        Refused::Wait(since.plus(WINDOW).since(now), *count == MAX_FAILURES + 1)
    }

    fn make_room(&mut self, now: Timestamp) {
        self.0.retain(|_, (since, _)| now.since(*since) < WINDOW);
        if self.0.len() >= MAX_SOURCES {
            self.0.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_token_is_made_once_and_readable_by_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.token");
        let made = admin_token(&path).unwrap();
        assert_eq!(made.reveal().len(), 43);
        assert!(admin_token(&path).unwrap().matches(made.reveal()));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn only_a_bearer_token_counts() {
        let rows = [
            (None, None),
            (Some("Bearer abc"), Some("abc")),
            (Some("bearer  abc "), Some("abc")),
            (Some("Basic abc"), None),
            (Some("abc"), None),
            (Some(""), None),
        ];
        for (header, expected) in rows {
            assert_eq!(bearer(header), expected, "{header:?}");
        }
    }

    #[test]
    fn a_guesser_is_told_to_wait_and_logged_once_a_window() {
        let (mut failures, source) = (Failures::default(), "10.0.0.1".parse().unwrap());
        let at = Timestamp::from_secs;
        (0..10).for_each(|_| assert_eq!(failures.failed(source, at(0)), Refused::Wrong));
        assert_eq!(failures.failed(source, at(20)), Refused::Wait(Duration::from_secs(40), true));
        assert_eq!(failures.failed(source, at(21)), Refused::Wait(Duration::from_secs(39), false));
        assert_eq!(failures.failed("10.0.0.2".parse().unwrap(), at(21)), Refused::Wrong);
        assert_eq!(failures.failed(source, at(60)), Refused::Wrong);
    }

    #[test]
    fn the_memory_of_sources_is_bounded() {
        let mut failures = Failures::default();
        for n in 0..(2 * MAX_SOURCES as u32) {
            failures.failed(IpAddr::V4(n.into()), Timestamp(0));
        }
        assert!(failures.0.len() <= MAX_SOURCES);
    }
}
