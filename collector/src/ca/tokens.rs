//! Enrolment tokens, and the register they are kept in together with every certificate issued.
//!
//! The register is one SQLite file that the server and the `token` commands use at the same time. Of a token's secret
//! only the hash is kept: it has 256 random bits, so a plain SHA-256 cannot be searched.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};
use sidewarden_proto::enrol::Token;
use sidewarden_proto::event::TokenCreated;
use sidewarden_proto::identity::{Sha256, SpiffeId, TrustDomain};
use sidewarden_proto::secret::Secret;
use sidewarden_proto::time::Timestamp;

use super::CaError;

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS token (id TEXT PRIMARY KEY, hash BLOB NOT NULL, pattern TEXT NOT NULL,
        uses INTEGER NOT NULL, used INTEGER NOT NULL DEFAULT 0, created INTEGER NOT NULL, expires INTEGER NOT NULL,
        revoked INTEGER NOT NULL DEFAULT 0, announced INTEGER NOT NULL DEFAULT 0);
    CREATE TABLE IF NOT EXISTS issued (id INTEGER PRIMARY KEY, serial TEXT NOT NULL UNIQUE, spki BLOB NOT NULL,
        workload TEXT NOT NULL, instance TEXT NOT NULL, not_before INTEGER NOT NULL, not_after INTEGER NOT NULL,
        issued INTEGER NOT NULL, way TEXT NOT NULL, token TEXT, seen INTEGER NOT NULL DEFAULT 0);
    CREATE INDEX IF NOT EXISTS issued_instance ON issued (workload, instance);
    CREATE INDEX IF NOT EXISTS issued_spki ON issued (spki);
    CREATE INDEX IF NOT EXISTS issued_ends ON issued (not_after);
    CREATE TABLE IF NOT EXISTS confirmed (workload TEXT NOT NULL, instance TEXT NOT NULL, directive INTEGER NOT NULL,
        PRIMARY KEY (workload, instance)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS outside (serial TEXT PRIMARY KEY, spki BLOB NOT NULL, name TEXT NOT NULL,
        not_after INTEGER NOT NULL, issued INTEGER NOT NULL, root BLOB NOT NULL);
    CREATE TABLE IF NOT EXISTS members (serial TEXT PRIMARY KEY, spki BLOB NOT NULL, root BLOB NOT NULL,
        not_after INTEGER NOT NULL, issued INTEGER NOT NULL, confirmed INTEGER NOT NULL DEFAULT 0, replaced_by BLOB);
    CREATE TABLE IF NOT EXISTS guests (workload TEXT NOT NULL, instance TEXT NOT NULL, spki BLOB NOT NULL,
        serial TEXT NOT NULL, not_before INTEGER NOT NULL, not_after INTEGER NOT NULL, left_at INTEGER,
        elsewhere INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (workload, instance, spki, elsewhere)) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS guests_spki ON guests (spki);
    CREATE INDEX IF NOT EXISTS guests_ends ON guests (not_after);
    CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, at INTEGER NOT NULL, text TEXT NOT NULL, reply TEXT);
";

/// Columns that came later than their table.
const LATER: [(&str, &str, &str); 4] = [
    ("issued", "root", "ALTER TABLE issued ADD COLUMN root BLOB"),
    ("orders", "taken", "ALTER TABLE orders ADD COLUMN taken INTEGER NOT NULL DEFAULT 0"),
    ("issued", "superseded", "ALTER TABLE issued ADD COLUMN superseded INTEGER NOT NULL DEFAULT 0"),
    ("members", "gone", "ALTER TABLE members ADD COLUMN gone INTEGER NOT NULL DEFAULT 0"),
];

/// Which workloads a token is good for: one, or every service of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// Whether `path` (`shop/orders`) is covered.
    pub fn covers(&self, path: &str) -> bool {
        match self.0.strip_suffix("/*") {
            Some(namespace) => path.strip_prefix(namespace).is_some_and(|rest| rest.starts_with('/')),
            None => self.0 == path,
        }
    }

    /// The one workload it stands for, if it is only one.
    pub fn single(&self, domain: &TrustDomain) -> Option<SpiffeId> {
        if self.0.ends_with('*') { None } else { domain.workload(&self.0).ok() }
    }
}

impl FromStr for Pattern {
    type Err = CaError;

    fn from_str(text: &str) -> Result<Pattern, CaError> {
        let bad = || CaError::BadPattern(text.chars().take(120).collect());
        let domain: TrustDomain = "x".parse().map_err(|_| bad())?;
        let path = text.strip_suffix("/*").unwrap_or(text);
        domain.workload(path).map_err(|_| bad())?;
        if text.starts_with('/') {
            return Err(bad());
        }
        if is_reserved(path) {
            return Err(CaError::Reserved(text.to_owned()));
        }
        Ok(Pattern(text.to_owned()))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a path belongs to collectors.
pub fn is_reserved(path: &str) -> bool {
    path == "sidewarden" || path.starts_with("sidewarden/")
}

/// What a token's state is at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenState {
    /// It can be used.
    Valid,
    /// It was used as often as it may be.
    UsedUp,
    /// Its time is over.
    Expired,
    /// It was taken back.
    Revoked,
}

impl TokenState {
    /// The word in tables.
    pub const fn word(self) -> &'static str {
        match self {
            TokenState::Valid => "valid",
            TokenState::UsedUp => "used up",
            TokenState::Expired => "expired",
            TokenState::Revoked => "revoked",
        }
    }
}

/// A token, without its secret.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenInfo {
    /// Its public half.
    pub id: String,
    /// The workloads it is good for.
    pub pattern: String,
    /// How often it may be used.
    pub uses: u32,
    /// How often it was.
    pub used: u32,
    /// When it was made.
    pub created: Timestamp,
    /// When it ends.
    pub expires: Timestamp,
    /// Whether it was taken back.
    pub revoked: bool,
}

impl TokenInfo {
    /// Its state at `now`.
    pub fn state(&self, now: Timestamp) -> TokenState {
        if self.revoked {
            return TokenState::Revoked;
        }
        if self.used >= self.uses {
            return TokenState::UsedUp;
        }
        if now >= self.expires { TokenState::Expired } else { TokenState::Valid }
    }
}

/// The register of tokens and certificates.
#[derive(Debug)]
pub struct Register {
    path: PathBuf,
    pub(super) db: Connection,
}

impl Register {
    /// Opens the register at `path`, or makes it.
    pub fn open(path: &Path) -> Result<Register, CaError> {
        let open = || {
            let db = Connection::open(path)?;
            db.busy_timeout(Duration::from_secs(5))?;
            db.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")?;
            db.execute_batch(SCHEMA)?;
            for (table, column, change) in LATER {
                if !has_column(&db, table, column)? {
                    db.execute_batch(change)?;
                }
            }
            Ok(db)
        };
        let db = open().map_err(|error| CaError::Register { path: path.to_owned(), error })?;
        Ok(Register { path: path.to_owned(), db })
    }

    pub(super) fn fault(&self, error: rusqlite::Error) -> CaError {
        CaError::Register { path: self.path.clone(), error }
    }

    /// Makes a token for `pattern`; its text is shown once and kept nowhere.
    pub fn create(
        &self,
        pattern: &Pattern,
        uses: u32,
        life: Duration,
        pin: Sha256,
        now: Timestamp,
    ) -> Result<(Token, TokenInfo), CaError> {
        let token = Token::new(crate::random, pin);
        let expires = now.plus(life);
        let sql = "INSERT INTO token (id, hash, pattern, uses, created, expires) VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
        let row = params![token.id, hash(&token.secret), pattern.0, uses, now.0, expires.0];
        self.db.execute(sql, row).map_err(|e| self.fault(e))?;
        let (id, pattern) = (token.id.clone(), pattern.0.clone());
        Ok((token, TokenInfo { id, pattern, uses, used: 0, created: now, expires, revoked: false }))
    }

    /// Every token, newest first.
    pub fn tokens(&self) -> Result<Vec<TokenInfo>, CaError> {
        self.select("ORDER BY created DESC LIMIT 1000", [])
    }

    /// Takes a token back.
    pub fn revoke(&self, id: &str) -> Result<(), CaError> {
        let changed = self.db.execute("UPDATE token SET revoked = 1 WHERE id = ?1", [id]);
        if changed.map_err(|e| self.fault(e))? == 0 { Err(CaError::NoToken(id.to_owned())) } else { Ok(()) }
    }

    /// Tokens made since this was last asked, to be told as events. Each is told once.
    pub fn take_unannounced(&self) -> Result<Vec<TokenCreated>, CaError> {
        let tokens = self.select("WHERE announced = 0 ORDER BY created LIMIT 100", [])?;
        let note = || {
            let tx = self.db.unchecked_transaction()?;
            for token in &tokens {
                tx.execute("UPDATE token SET announced = 1 WHERE id = ?1", [&token.id])?;
            }
            tx.commit()
        };
        note().map_err(|e| self.fault(e))?;
        let told = |t: TokenInfo| TokenCreated { id: t.id, workload: t.pattern, uses: t.uses, expires_us: t.expires };
        Ok(tokens.into_iter().map(told).collect())
    }

    fn select(&self, rest: &str, values: impl rusqlite::Params) -> Result<Vec<TokenInfo>, CaError> {
        let sql = format!("SELECT id, pattern, uses, used, created, expires, revoked FROM token {rest}");
        let mut rows = self.db.prepare(&sql).map_err(|e| self.fault(e))?;
        let found = rows.query_map(values, token_info).map_err(|e| self.fault(e))?;
        found.collect::<Result<_, _>>().map_err(|e| self.fault(e))
    }

    /// The token `id`, if `secret` is its own. Which of the two was wrong is not told.
    pub(super) fn find(&self, id: &str, secret: &Secret) -> Result<Option<TokenInfo>, CaError> {
        let row = self.db.query_row("SELECT hash FROM token WHERE id = ?1", [id], |row| row.get::<_, Vec<u8>>(0));
        let kept = row.optional().map_err(|e| self.fault(e))?;
        // The comparison runs for an unknown id too, so that an answer's time says nothing about which ids exist.
        let (kept, exists) = kept.map_or((vec![0; 32], false), |kept| (kept, true));
        let fits = aws_lc_rs::constant_time::verify_slices_are_equal(&kept, &hash(secret)).is_ok();
        if !(exists && fits) {
            return Ok(None);
        }
        Ok(self.select("WHERE id = ?1", [id])?.pop())
    }
}

fn has_column(db: &Connection, table: &str, column: &str) -> rusqlite::Result<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM pragma_table_info(?1) WHERE name = ?2)";
    db.query_row(sql, [table, column], |row| row.get(0))
}

fn hash(secret: &Secret) -> [u8; 32] {
    Sha256::of(&[secret.reveal().as_bytes()]).0
}

fn token_info(row: &rusqlite::Row<'_>) -> rusqlite::Result<TokenInfo> {
    Ok(TokenInfo {
        id: row.get(0)?,
        pattern: row.get(1)?,
        uses: row.get(2)?,
        used: row.get(3)?,
        created: Timestamp(row.get(4)?),
        expires: Timestamp(row.get(5)?),
        revoked: row.get(6)?,
    })
}
