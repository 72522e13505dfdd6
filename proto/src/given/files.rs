//! An identity that somebody else keeps in files: cert-manager, a SPIFFE helper, an operator with openssl.
//!
//! The files are looked at every second: who they are (device, inode, size, time of change), symlinks followed, so that a
//! file put in place by a rename and the swapped symlink of a Kubernetes volume are both seen. They are read once they
//! have stood still for one look, because key and certificate are rarely written in one step.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::Offered;
use crate::crl::CrlFault;
use crate::identity::PeerName;
use crate::tls::{self, Credential, TlsError, Trust};

/// More than any chain or bundle: a file that is larger is a wrong one.
const MAX_FILE: u64 = 1 << 20;

/// Why the files make no identity.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// One cannot be read.
    #[error("reading {}: {error}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// One holds something else.
    #[error("{}: {fault}", path.display())]
    Wrong {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        fault: TlsError,
    },
    /// One holds no revocation lists that can be used.
    #[error("{}: {fault}", path.display())]
    Crl {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        fault: CrlFault,
    },
    /// The certificate names nobody.
    #[error("{} names no workload: it needs one URI name like spiffe://example.org/shop/orders", .0.display())]
    NoWorkload(PathBuf),
}

/// Where the identity lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// PEM, the leaf first.
    pub cert: PathBuf,
    /// PEM.
    pub key: PathBuf,
    /// PEM: the CAs of our own trust domain.
    pub roots: PathBuf,
}

/// A certificate and its key, for a server whose clients show none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// PEM, the leaf first.
    pub cert: PathBuf,
    /// PEM.
    pub key: PathBuf,
}

/// Which files these were: another stamp means that one was changed or replaced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stamp([Option<Seen>; 3]);

/// Device, inode, size, and time of change in seconds and nanoseconds.
pub type Seen = (u64, u64, u64, i64, i64);

/// Which file is at `path` now.
pub fn seen(path: &Path) -> Option<Seen> {
    let meta = fs::metadata(path).ok()?;
    Some((meta.dev(), meta.ino(), meta.len(), meta.ctime(), meta.ctime_nsec()))
}

/// What is done about files at a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// They are those that were taken.
    Same,
    /// They have changed since the last look: whoever writes them may not be done.
    Moves,
    /// They are others, and stand still.
    New,
}

/// Takes files once they have stood still for one look.
#[derive(Clone, Debug, Default)]
pub struct Steady<S = Stamp> {
    taken: S,
    last: S,
}

impl<S: Clone + PartialEq> Steady<S> {
    /// Those that were read before the first look.
    pub fn taken(stamp: S) -> Steady<S> {
        Steady { taken: stamp.clone(), last: stamp }
    }

    /// What to do now.
    pub fn look(&mut self, stamp: S) -> Look {
        if std::mem::replace(&mut self.last, stamp.clone()) != stamp {
            return Look::Moves;
        }
        if stamp == self.taken { Look::Same } else { Look::New }
    }

    /// Those of the last look were read, and could be used.
    pub fn take(&mut self) {
        self.taken = self.last.clone();
    }
}

impl Pair {
    /// Which files are there now.
    pub fn stamp(&self) -> Stamp {
        Stamp([seen(&self.cert), seen(&self.key), None])
    }

    /// Reads them; the key fits the leaf.
    pub fn read(&self) -> Result<Credential, FilesError> {
        let (chain, key) = self.parts()?;
        at(&self.cert, Credential::for_people(chain, key))
    }

    fn parts(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), FilesError> {
        let chain = at(&self.cert, tls::certificates(&read(&self.cert)?))?;
        let key = PrivateKeyDer::from_pem_slice(&read(&self.key)?);
        // What the parser says of a key may quote it.
        let none = |_| TlsError::Pem("it holds no private key (one that is encrypted must be decrypted first)".into());
        Ok((chain, at(&self.key, key.map_err(none))?))
    }

    /// Whether others than we may read the key.
    pub fn key_is_open(&self) -> bool {
        is_open(&self.key)
    }
}

fn is_open(key: &Path) -> bool {
    fs::metadata(key).is_ok_and(|meta| meta.mode() & 0o077 != 0)
}

impl Files {
    /// Which files are there now.
    pub fn stamp(&self) -> Stamp {
        Stamp([&self.cert, &self.key, &self.roots].map(|path| seen(path)))
    }

    /// Reads them and looks them through: the key fits the leaf, and the leaf names a workload.
    pub fn read(&self) -> Result<Offered, FilesError> {
        let (chain, key) = Pair { cert: self.cert.clone(), key: self.key.clone() }.parts()?;
        let credential = at(&self.cert, Credential::from_der(chain, key))?;
        let roots = at(&self.roots, tls::certificates(&read(&self.roots)?))?;
        let PeerName::Spiffe(workload) = credential.peer().name.clone() else {
            return Err(FilesError::NoWorkload(self.cert.clone()));
        };
        let trust = Trust::single(workload.trust_domain(), roots);
        Ok(Offered { credential, workload, trust })
    }

    /// Whether others than we may read the key.
    pub fn key_is_open(&self) -> bool {
        is_open(&self.key)
    }
}

fn at<T>(path: &Path, result: Result<T, TlsError>) -> Result<T, FilesError> {
    result.map_err(|fault| FilesError::Wrong { path: path.to_owned(), fault })
}

/// Reads a file that is not larger than chains and bundles are.
pub fn read(path: &Path) -> Result<Vec<u8>, FilesError> {
    read_up_to(path, MAX_FILE)
}

/// Reads a file that has no more than `most` bytes.
pub fn read_up_to(path: &Path, most: u64) -> Result<Vec<u8>, FilesError> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > most {
            return Err(io::Error::other(format!("it is over {} MiB, which no such file is", most >> 20)));
        }
        Ok(bytes)
    };
    read().map_err(|error| FilesError::Read { path: path.to_owned(), error })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::tls::tests::Authority;

    /// As PEM.
    fn pem(label: &str, der: &[u8]) -> String {
        let text = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, der);
        let lines: Vec<&str> = (0..text.len()).step_by(64).map(|i| &text[i..text.len().min(i + 64)]).collect();
        format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
    }

    /// Writes an identity as PEM.
    fn write(dir: &Path, ca: &Authority) -> Files {
        let files = files_in(dir);
        let (chain, key) = ca.issue_raw("spiffe://td/shop/web");
        fs::write(&files.key, pem("PRIVATE KEY", &key)).unwrap();
        fs::write(&files.cert, pem("CERTIFICATE", &chain)).unwrap();
        fs::write(&files.roots, pem("CERTIFICATE", ca.root())).unwrap();
        files
    }

    fn files_in(dir: &Path) -> Files {
        Files { cert: dir.join("tls.crt"), key: dir.join("tls.key"), roots: dir.join("ca.crt") }
    }

    fn error(files: &Files) -> String {
        files.read().unwrap_err().to_string()
    }

    #[test]
    fn what_is_wrong_is_said_with_the_file_and_never_the_key() {
        let (dir, ca) = (tempfile::tempdir().unwrap(), Authority::new("td"));
        let files = write(dir.path(), &ca);
        assert_eq!(files.read().unwrap().workload.to_string(), "spiffe://td/shop/web");
        let key = fs::read_to_string(&files.key).unwrap();
        let body = key.lines().nth(1).unwrap();

        for length in 0..key.len() - 27 {
            fs::write(&files.key, &key[..length]).unwrap();
            let said = error(&files);
            assert!(said.contains("tls.key: ") && !said.contains(&body[..8]), "{length}: {said}");
        }
        let other = tempfile::tempdir().unwrap();
        fs::copy(write(other.path(), &ca).key, &files.key).unwrap();
        assert!(error(&files).contains("does not belong to the certificate"));
        fs::write(&files.key, &key).unwrap();

        fs::write(&files.roots, "").unwrap();
        assert!(error(&files).contains("ca.crt: "), "an empty bundle trusts nobody");
        fs::write(&files.roots, vec![b'x'; 2 << 20]).unwrap();
        assert!(error(&files).contains("over 1 MiB"));
        fs::remove_file(&files.cert).unwrap();
        assert!(error(&files).starts_with(&format!("reading {}", files.cert.display())));
    }

    #[test]
    fn files_are_taken_once_they_have_stood_still_for_one_look() {
        let mut steady = Steady::taken(1);
        let looks = [1, 2, 3, 3, 3, 1, 1].map(|stamp| steady.look(stamp));
        use Look::{Moves, New, Same};
        assert_eq!(
            looks,
            [Same, Moves, Moves, New, New, Moves, Same],
            "what cannot be used is looked at again and again"
        );
        steady.look(4);
        steady.take();
        assert_eq!(steady.look(4), Same);
        assert_eq!(Steady::default().look(0), Same, "nothing was there, and nothing is");
    }

    #[test]
    fn a_swapped_symlink_and_a_replaced_file_are_seen() {
        let (dir, ca) = (tempfile::tempdir().unwrap(), Authority::new("td"));
        let (one, two) = (dir.path().join("1"), dir.path().join("2"));
        for at in [&one, &two] {
            fs::create_dir(at).unwrap();
            write(at, &ca);
        }
        let data = dir.path().join("data");
        symlink(&one, &data).unwrap();
        let files = files_in(&data);
        let before = files.stamp();
        assert_eq!(files.stamp(), before);
        symlink(&two, dir.path().join("new")).unwrap();
        fs::rename(dir.path().join("new"), &data).unwrap();
        let swapped = files.stamp();
        assert_ne!(swapped, before, "as Kubernetes does it");
        fs::copy(&files.cert, two.join("copy")).unwrap();
        fs::rename(two.join("copy"), &files.cert).unwrap();
        assert_ne!(files.stamp(), swapped);
    }

    #[test]
    fn a_key_that_others_may_read_is_told() {
        let (dir, ca) = (tempfile::tempdir().unwrap(), Authority::new("td"));
        let files = write(dir.path(), &ca);
        for (mode, open) in [(0o600, false), (0o400, false), (0o640, true), (0o604, true)] {
            fs::set_permissions(&files.key, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(files.key_is_open(), open, "{mode:o}");
        }
    }
}
