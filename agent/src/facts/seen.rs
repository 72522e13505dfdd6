//! A value that was read, or the reason why it could not be. "I could not tell" is an answer of its own.

use std::fmt;
use std::io;

/// What was read, and where; or why it was not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen<T> {
    /// It stood there.
    Known(T, String),
    /// It could not be read.
    Hidden(Hidden),
}

/// Why something could not be read, and where that was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hidden {
    /// The file.
    pub source: String,
    /// The reason.
    pub why: Why,
}

/// The reasons, told apart because each has another cure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// The kernel refused: a grant would help.
    Denied,
    /// There is no such file: gone, or this kernel or container does not have it.
    Missing,
    /// It is there and is not what was expected.
    Unclear(String),
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Denied => f.write_str("the kernel does not let this agent read it"),
            Why::Missing => f.write_str("it is not there"),
            Why::Unclear(what) => f.write_str(what),
        }
    }
}

impl Hidden {
    /// `source` is there and is not what was expected.
    pub fn unclear(source: impl Into<String>, what: impl Into<String>) -> Hidden {
        Hidden { source: source.into(), why: Why::Unclear(what.into()) }
    }

    /// `source` is not there.
    pub fn missing(source: impl Into<String>) -> Hidden {
        Hidden { source: source.into(), why: Why::Missing }
    }

    pub(crate) fn from_io(source: &str, error: &io::Error) -> Hidden {
        let why = match error.kind() {
            io::ErrorKind::PermissionDenied => Why::Denied,
            // A process that has ended answers ESRCH where its file was already open.
            io::ErrorKind::NotFound => Why::Missing,
            _ if error.raw_os_error() == Some(nix::errno::Errno::ESRCH as i32) => Why::Missing,
            _ => Why::Unclear(error.to_string()),
        };
        Hidden { source: source.to_owned(), why }
    }
}

impl<T> Seen<T> {
    /// The value, if it was read.
    pub fn known(&self) -> Option<&T> {
        match self {
            Seen::Known(value, _) => Some(value),
            Seen::Hidden(_) => None,
        }
    }

    /// `Known` of what `read` gave for `source`, or why not.
    pub(crate) fn at(source: impl Into<String>, read: Result<T, Hidden>) -> Seen<T> {
        match read {
            Ok(value) => Seen::Known(value, source.into()),
            Err(hidden) => Seen::Hidden(hidden),
        }
    }
}
