//! Who may bear which name: the trust domain's own CA, enrolment tokens, and everything that was ever issued.
//!
//! The first start makes a root CA and, apart from it, an issuing CA under it. A root is replaced in steps (`rotate`), which
//! commands ask of the running collector (`orders`). Of a certificate request nothing but its key is used; names, usages
//! and dates are decided here.

mod authority;
pub mod backup;
mod certificates;
mod dates;
mod files;
pub mod generation;
mod guests;
mod holders;
mod issue;
mod look_up;
pub mod member;
pub mod orders;
pub mod rotate;
pub mod seal;
mod tokens;
pub mod vault;

#[cfg(test)]
mod tests;

use std::path::PathBuf;

pub use authority::{Authority, Dates, Terms, pem};
pub use certificates::LEEWAY;
pub use dates::{dates_of, tell};
pub use files::{make_dir, write_secret};
pub use guests::NoRoom;
pub use issue::{Grant, Issuer, KeyState, RENEW_EVERY};
pub use look_up::{Holder, MAX_KEYS};
pub use tokens::{Pattern, Register, TokenInfo, TokenState, is_reserved};
pub use vault::Vault;

use sidewarden_proto::tls::TlsError;

/// What is wrong with the CA's files or its register.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file or directory cannot be read or written.
    #[error("{path}: {error}")]
    Access {
        /// Which.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// A key that others may read.
    #[error("{path} has mode {mode:o} and must not be readable by others: chmod {wanted:o} {path}")]
    Mode {
        /// Which file or directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// What it should be.
        wanted: u32,
    },
    /// A sealed key, and nothing to open it with.
    #[error(
        "{0} is sealed and there is no passphrase: set ca.passphrase_file, or give systemd's LoadCredential sidewarden-ca-passphrase"
    )]
    NoPassphrase(PathBuf),
    /// A sealed file, or a passphrase, that cannot be used.
    #[error("{path}: {fault}")]
    Sealed {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        fault: seal::SealFault,
    },
    /// A certificate request that cannot be used, or what was made of it.
    #[error("{0}")]
    Request(String),
    /// A step of a rotation that makes no sense now.
    #[error(transparent)]
    OutOfTurn(#[from] rotate::OutOfTurn),
    /// One half of a pair is missing.
    #[error(
        "{present} is there and {missing} is not: restore it from a backup, or move both away to begin a new trust domain"
    )]
    Half {
        /// The half that is there.
        present: PathBuf,
        /// The half that is not.
        missing: PathBuf,
    },
    /// A certificate and a key that do not belong together, or a certificate that is none.
    #[error("{path}: {fault}")]
    Pair {
        /// Which certificate.
        path: PathBuf,
        /// What is wrong.
        fault: String,
    },
    /// The CA says it is of another trust domain than the configuration.
    #[error(
        "the CA in {path} is of trust domain `{found}`, the configuration says `{configured}`: set trust_domain = \"{found}\", or use another data_dir"
    )]
    OtherDomain {
        /// Where the CA is.
        path: PathBuf,
        /// Its domain.
        found: String,
        /// The domain of the configuration.
        configured: String,
    },
    /// A CA certificate that is not valid at this time.
    #[error("{path} is valid from {from} to {to}, and this machine's clock says {now}: set the clock right")]
    Clock {
        /// Which certificate.
        path: PathBuf,
        /// Begin of validity.
        from: String,
        /// End of validity.
        to: String,
        /// The clock.
        now: String,
    },
    /// Signing failed.
    #[error("a certificate cannot be made: {0}")]
    Sign(#[from] rcgen::Error),
    /// What was made cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The register of tokens and certificates.
    #[error("{path}: {error}")]
    Register {
        /// Where it is.
        path: PathBuf,
        /// What SQLite said.
        error: rusqlite::Error,
    },
    /// A pattern for workloads that is none.
    #[error("`{0}` is no workload: write shop/orders, or shop/* for every service of shop")]
    BadPattern(String),
    /// A name under `sidewarden/`.
    #[error("`{0}` is reserved: names under sidewarden/ belong to collectors")]
    Reserved(String),
    /// A token that is not there.
    #[error("there is no token {0}: see `sidewarden-collector token list`")]
    NoToken(String),
}
