//! Private keys of the CA on disk: plain (`key.pem`), or sealed with a passphrase (`key.sealed`).

use std::path::{Path, PathBuf};

use rcgen::KeyPair;
use sidewarden_proto::secret::Secret;

use super::seal::{self, Cost};
use super::{CaError, files};

/// What a sealed key is sealed for.
const PURPOSE: &str = "ca key";
/// The name of the systemd credential with the passphrase.
pub const CREDENTIAL: &str = "sidewarden-ca-passphrase";

/// How keys are written and read.
#[derive(Clone, Debug, Default)]
pub struct Vault {
    passphrase: Option<Secret>,
    cost: Cost,
}

/// How a key lies on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lies {
    /// Readable by whoever reads the file.
    Plain,
    /// Sealed with a passphrase.
    Sealed,
    /// It is not there.
    Nowhere,
}

impl Lies {
    /// The word in tables.
    pub const fn word(self) -> &'static str {
        match self {
            Lies::Plain => "plain",
            Lies::Sealed => "sealed",
            Lies::Nowhere => "elsewhere",
        }
    }
}

impl Vault {
    /// With a passphrase new keys are sealed, without one they are plain.
    pub fn new(passphrase: Option<Secret>, cost: Cost) -> Vault {
        Vault { passphrase, cost }
    }

    /// With the passphrase in `file`; without a file, in the systemd credential `sidewarden-ca-passphrase` if the
    /// directory `credentials` has it.
    pub fn from_files(file: Option<&Path>, credentials: Option<&Path>) -> Result<Vault, CaError> {
        let path: PathBuf = match (file, credentials.map(|dir| dir.join(CREDENTIAL))) {
            (Some(file), _) => file.to_owned(),
            (None, Some(credential)) if credential.exists() => credential,
            (None, _) => return Ok(Vault::default()),
        };
        let text = std::fs::read_to_string(&path).map_err(files::access(&path))?;
        let passphrase = Secret::new(text.trim_end_matches(['\r', '\n']));
        if passphrase.reveal().chars().count() < seal::MIN_PASSPHRASE {
            return Err(CaError::Sealed { path, fault: seal::SealFault::Short });
        }
        Ok(Vault::new(Some(passphrase), Cost::default()))
    }

    /// The passphrase, if there is one.
    pub fn passphrase(&self) -> Option<&Secret> {
        self.passphrase.as_ref()
    }

    /// What guessing the passphrase costs.
    pub fn cost(&self) -> Cost {
        self.cost
    }

    /// Writes a key into `dir`.
    pub(super) fn write(&self, dir: &Path, key: &KeyPair) -> Result<(), CaError> {
        match &self.passphrase {
            None => files::write_secret(&plain(dir), key.serialize_pem().as_bytes()),
            Some(passphrase) => self.write_sealed(dir, key.serialize_pem().as_bytes(), passphrase),
        }
    }

    /// The key in `dir`.
    pub(super) fn read(&self, dir: &Path) -> Result<KeyPair, CaError> {
        let pem = self.pem(dir)?;
        let key = std::str::from_utf8(&pem).ok().and_then(|pem| KeyPair::from_pem(pem).ok());
        key.ok_or_else(|| CaError::Pair {
            path: dir.join("cert.pem"),
            fault: format!("{} holds no key that can be used", path(dir).display()),
        })
    }

    fn pem(&self, dir: &Path) -> Result<Vec<u8>, CaError> {
        let path = sealed(dir);
        if lies(dir) != Lies::Sealed {
            return files::read_secret(&plain(dir));
        }
        let passphrase = self.passphrase.as_ref().ok_or_else(|| CaError::NoPassphrase(path.clone()))?;
        let opened = seal::open(&files::read_secret(&path)?, PURPOSE, passphrase);
        opened.map_err(|fault| CaError::Sealed { path, fault })
    }

    /// Seals the plain key in `dir`; whether there was one. The sealed one is read back before the plain one goes.
    pub fn seal(&self, dir: &Path) -> Result<bool, CaError> {
        let Some(passphrase) = &self.passphrase else { return Err(CaError::NoPassphrase(sealed(dir))) };
        if !plain(dir).exists() {
            return Ok(false);
        }
        let pem = files::read_secret(&plain(dir))?;
        self.write_sealed(dir, &pem, passphrase)?;
        self.read(dir)?;
        std::fs::remove_file(plain(dir)).map_err(files::access(&plain(dir)))?;
        files::sync_dir(dir)?;
        Ok(true)
    }

    /// Writes the sealed key in `dir` plain again; whether there was one.
    pub fn unseal(&self, dir: &Path) -> Result<bool, CaError> {
        if lies(dir) != Lies::Sealed {
            return Ok(false);
        }
        files::write_secret(&plain(dir), &self.pem(dir)?)?;
        std::fs::remove_file(sealed(dir)).map_err(files::access(&sealed(dir)))?;
        files::sync_dir(dir)?;
        Ok(true)
    }

    fn write_sealed(&self, dir: &Path, pem: &[u8], passphrase: &Secret) -> Result<(), CaError> {
        let bytes = seal::seal(pem, PURPOSE, passphrase, self.cost, crate::random);
        files::write_secret(&sealed(dir), &bytes.map_err(|fault| CaError::Sealed { path: sealed(dir), fault })?)
    }
}

fn plain(dir: &Path) -> PathBuf {
    dir.join("key.pem")
}

fn sealed(dir: &Path) -> PathBuf {
    dir.join("key.sealed")
}

/// How the key in `dir` lies there. A crash while it was sealed leaves both: the sealed one is whole then.
pub fn lies(dir: &Path) -> Lies {
    match (sealed(dir).exists(), plain(dir).exists()) {
        (true, _) => Lies::Sealed,
        (false, true) => Lies::Plain,
        (false, false) => Lies::Nowhere,
    }
}

/// Where the key in `dir` is, or would be.
pub(super) fn path(dir: &Path) -> PathBuf {
    if lies(dir) == Lies::Sealed { sealed(dir) } else { plain(dir) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::seal::tests::{CHEAP, passphrase};

    #[test]
    fn a_key_is_sealed_and_unsealed_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let (plain_vault, vault) = (Vault::default(), Vault::new(Some(passphrase()), CHEAP));
        let key = KeyPair::generate().unwrap();
        plain_vault.write(dir.path(), &key).unwrap();
        assert!(vault.seal(dir.path()).unwrap() && !vault.seal(dir.path()).unwrap());
        assert_eq!(lies(dir.path()), Lies::Sealed);
        assert!(!String::from_utf8(std::fs::read(sealed(dir.path())).unwrap()).unwrap().contains("PRIVATE"));
        assert_eq!(vault.read(dir.path()).unwrap().serialize_der(), key.serialize_der());
        let error = plain_vault.read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("ca.passphrase_file"), "{error}");
        let other = Vault::new(Some(Secret::new("another passphrase")), CHEAP);
        let error = other.read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("wrong") && !error.contains("another"), "{error}");
        assert!(vault.unseal(dir.path()).unwrap() && !vault.unseal(dir.path()).unwrap());
        assert_eq!(plain_vault.read(dir.path()).unwrap().serialize_der(), key.serialize_der());
    }

    #[test]
    fn a_crash_while_sealing_leaves_a_key_that_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let (key, vault) = (KeyPair::generate().unwrap(), Vault::new(Some(passphrase()), CHEAP));
        Vault::default().write(dir.path(), &key).unwrap();
        vault.write(dir.path(), &key).unwrap();
        assert_eq!(vault.read(dir.path()).unwrap().serialize_der(), key.serialize_der());
        assert!(vault.seal(dir.path()).unwrap(), "what was left is removed");
        assert!(!plain(dir.path()).exists());
    }

    #[test]
    fn the_passphrase_comes_from_the_file_or_the_credential() {
        let dir = tempfile::tempdir().unwrap();
        let (file, credentials) = (dir.path().join("file"), dir.path().join("credentials"));
        let told = |file: Option<&Path>| {
            let vault = Vault::from_files(file, Some(&credentials)).unwrap();
            vault.passphrase().map(|text| text.reveal().to_owned())
        };
        assert_eq!(told(None), None);
        std::fs::create_dir(&credentials).unwrap();
        std::fs::write(credentials.join(CREDENTIAL), "from the credential\n").unwrap();
        std::fs::write(&file, "from the file itself\r\n").unwrap();
        assert_eq!(told(None).as_deref(), Some("from the credential"));
        assert_eq!(told(Some(&file)).as_deref(), Some("from the file itself"));
        std::fs::write(&file, "short\n").unwrap();
        let error = Vault::from_files(Some(&file), None).unwrap_err().to_string();
        assert!(error.contains("fewer than") && !error.contains("short\n"), "{error}");
        assert!(Vault::from_files(Some(&dir.path().join("missing")), None).is_err());
    }
}
