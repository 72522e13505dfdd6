//! Whom else we trust, by files: the bundles of other trust domains, the CAs of peers that have DNS names, and the lists of
//! those whom these CAs have revoked.
//!
//! They are looked at every second, and taken once they have stood still for one look. What cannot be used leaves the
//! last good ones in force.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use sidewarden_proto::crl::{self, Crl, CrlFault};
use sidewarden_proto::given::files::{FilesError, Seen, read, read_up_to, seen};
use sidewarden_proto::identity::{TrustDomain, judge_root};
use sidewarden_proto::tls::{self, PeerFault, TlsError};

/// Most files of a folder.
const MAX_BUNDLES: usize = 256;
/// How the files of a folder end.
const ENDING: &str = ".pem";
/// The same, of revocation lists.
const CRL_ENDINGS: [&str; 3] = [".crl", ".pem", ".der"];
/// Most files of revocation lists.
const MAX_CRLS: usize = 64;
/// Most bytes of such a file: some hundred thousand revoked certificates.
const MAX_CRL_FILE: u64 = 16 << 20;

/// Where they lie.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForeignFiles {
    /// A folder with one file for each other trust domain, called `<trust domain>.pem`.
    pub bundles: Option<PathBuf>,
    /// PEM file of the CAs whose DNS names count.
    pub dns_roots: Option<PathBuf>,
    /// A revocation list, or a folder of them.
    pub crls: Option<PathBuf>,
    /// What is not known of foreign peers lets them in.
    pub lenient: bool,
}

/// What was in them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Foreign {
    /// The roots of other trust domains.
    pub domains: BTreeMap<TrustDomain, Vec<CertificateDer<'static>>>,
    /// The roots of peers that have DNS names.
    pub dns_roots: Vec<CertificateDer<'static>>,
    /// Revocation lists, and whether they are needed; `None`: none are asked for.
    pub crls: Option<Crls>,
}

/// Revocation lists by files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crls {
    /// The newest for each CA.
    pub lists: Arc<[Crl]>,
    /// Whether a foreign peer needs one.
    pub strict: bool,
}

/// Which files these were: another stamp means that one was changed, replaced, added or removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stamp(Vec<(PathBuf, Option<Seen>)>);

impl ForeignFiles {
    /// Whether there is anything to look at.
    pub fn is_empty(&self) -> bool {
        *self == ForeignFiles::default()
    }

    /// Which files are there now.
    pub fn stamp(&self) -> Stamp {
        let bundles = self.bundles.iter().flat_map(|dir| bundle_files(dir).unwrap_or_default().into_values());
        let crls = self.crls.iter().flat_map(|path| crl_files(path).unwrap_or_default());
        let all = self.bundles.iter().cloned().chain(bundles).chain(self.dns_roots.clone());
        let all = all.chain(self.crls.clone()).chain(crls);
        Stamp(all.map(|path| (path.clone(), seen(&path))).collect())
    }

    /// Reads them all; a single one that cannot be used is an error.
    pub fn read(&self) -> Result<Foreign, FilesError> {
        let mut foreign = Foreign::default();
        if let Some(dir) = &self.bundles {
            for (domain, path) in bundle_files(dir)? {
                foreign.domains.insert(domain, read_roots(&path)?);
            }
        }
        if let Some(path) = &self.dns_roots {
            foreign.dns_roots = read_roots(path)?;
        }
        if let Some(path) = &self.crls {
            foreign.crls = Some(Crls { lists: read_crls(path)?, strict: !self.lenient });
        }
        Ok(foreign)
    }
}

/// The files of the folder by the trust domain they are for. What begins with a dot is somebody's bookkeeping: Kubernetes
/// keeps `..data` beside the files.
fn bundle_files(dir: &Path) -> Result<BTreeMap<TrustDomain, PathBuf>, FilesError> {
    let unreadable = |error| FilesError::Read { path: dir.to_owned(), error };
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some(domain) = name.strip_suffix(ENDING).filter(|name| !name.starts_with('.')) else { continue };
        let fault = |e: &dyn std::fmt::Display| wrong(&path, TlsError::Roots(e.to_string()));
        let domain = domain.parse::<TrustDomain>().map_err(|e| fault(&e))?;
        found.insert(domain, path.clone());
        if found.len() > MAX_BUNDLES {
            return Err(fault(&format!("there are more than {MAX_BUNDLES} bundles")));
        }
    }
    Ok(found)
}

/// The revocation lists at `path`: a file, or those of a folder that end as such files do.
fn crl_files(path: &Path) -> Result<Vec<PathBuf>, FilesError> {
    let unreadable = |error| FilesError::Read { path: path.to_owned(), error };
    if !fs::metadata(path).map_err(unreadable)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(path).map_err(unreadable)? {
        let file = entry.map_err(unreadable)?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        if !name.starts_with('.') && CRL_ENDINGS.iter().any(|ending| name.ends_with(ending)) {
            found.push(file);
        }
        if found.len() > MAX_CRLS {
            let fault = CrlFault::Unreadable(format!("there are more than {MAX_CRLS} files"));
            return Err(FilesError::Crl { path: path.to_owned(), fault });
        }
    }
    found.sort();
    Ok(found)
}

/// A folder without any is none that cannot be used: strict mode then refuses every foreign peer, and says so.
fn read_crls(path: &Path) -> Result<Arc<[Crl]>, FilesError> {
    let mut lists = Vec::new();
    for file in crl_files(path)? {
        let found = Crl::read_all(&read_up_to(&file, MAX_CRL_FILE)?);
        lists.extend(found.map_err(|fault| FilesError::Crl { path: file, fault })?);
    }
    Ok(crl::newest(lists).into())
}

/// The CAs of a PEM file; what is no CA is an error.
pub fn read_roots(path: &Path) -> Result<Vec<CertificateDer<'static>>, FilesError> {
    let roots = tls::certificates(&read(path)?).map_err(|fault| wrong(path, fault))?;
    let no_ca = |(i, fault): (usize, _)| {
        wrong(path, TlsError::Roots(format!("certificate {} of it: {}", i + 1, PeerFault::Leaf(fault))))
    };
    roots.iter().enumerate().try_for_each(|(i, root)| judge_root(root).map_err(|fault| no_ca((i, fault))))?;
    Ok(roots)
}

fn wrong(path: &Path, fault: TlsError) -> FilesError {
    FilesError::Wrong { path: path.to_owned(), fault }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::made_up::pem;
    use super::*;
    use crate::identity::made_up::Ca;

    fn names(foreign: &Foreign) -> Vec<(&str, usize)> {
        foreign.domains.iter().map(|(name, roots)| (name.as_str(), roots.len())).collect()
    }

    #[test]
    fn a_folder_has_the_roots_of_each_domain_by_its_name() {
        let (dir, one, two) = (tempfile::tempdir().unwrap(), Ca::new("a"), Ca::new("b"));
        let files = ForeignFiles { bundles: Some(dir.path().to_owned()), ..ForeignFiles::default() };
        assert_eq!(names(&files.read().unwrap()), []);
        let both = [pem("CERTIFICATE", &one.root), pem("CERTIFICATE", &two.root)].concat();
        fs::write(dir.path().join("partner.example.pem"), both).unwrap();
        fs::write(dir.path().join("README"), "not looked at").unwrap();
        fs::create_dir(dir.path().join("..2027")).unwrap();
        fs::write(dir.path().join("..2027/other.example.pem"), pem("CERTIFICATE", &one.root)).unwrap();
        symlink("..2027", dir.path().join("..data")).unwrap();
        symlink("..data/other.example.pem", dir.path().join("other.example.pem")).unwrap();
        let before = files.stamp();
        assert_eq!(names(&files.read().unwrap()), [("other.example", 1), ("partner.example", 2)]);
        fs::remove_file(dir.path().join("partner.example.pem")).unwrap();
        assert_ne!(files.stamp(), before, "a bundle that is taken away is a change");
        assert_eq!(names(&files.read().unwrap()), [("other.example", 1)]);
    }

    #[test]
    fn what_is_no_bundle_is_an_error_with_its_file() {
        let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("a"));
        let files = ForeignFiles { bundles: Some(dir.path().to_owned()), ..ForeignFiles::default() };
        let leaf = pem("CERTIFICATE", &ca.issue("shop/web").chain()[0].0);
        let root = pem("CERTIFICATE", &ca.root);
        for (name, content, says) in [
            ("x.example.pem", String::new(), "x.example.pem"),
            ("x.example.pem", leaf.clone(), "certificate 1 of it: the certificate is no CA"),
            ("x.example.pem", [root.as_str(), &leaf].concat(), "certificate 2 of it"),
            ("x.example.pem", root[..root.len() / 2].to_owned(), "x.example.pem"),
            ("X.pem", root.clone(), "no trust domain"),
        ] {
            fs::write(dir.path().join(name), content).unwrap();
            let said = files.read().unwrap_err().to_string();
            assert!(said.contains(says), "`{said}` instead of `{says}`");
            fs::remove_file(dir.path().join(name)).unwrap();
        }
        let missing = ForeignFiles { bundles: Some(dir.path().join("none")), ..ForeignFiles::default() };
        assert!(missing.read().unwrap_err().to_string().starts_with("reading "));
        let _ = missing.stamp();
    }

    #[test]
    fn revocation_lists_come_from_a_file_or_a_folder_and_none_is_not_the_same_as_an_empty_one() {
        let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("a"));
        let at = |path: PathBuf| ForeignFiles { crls: Some(path), ..ForeignFiles::default() };
        let count = |files: &ForeignFiles| files.read().unwrap().crls.unwrap().lists.len();
        let folder = at(dir.path().to_owned());
        assert_eq!(count(&folder), 0, "lists are asked for, and there are none");
        assert_eq!(ForeignFiles::default().read().unwrap().crls, None, "none are asked for");
        fs::write(dir.path().join("a.crl"), ca.list(&[vec![1]])).unwrap();
        fs::write(dir.path().join("b.pem"), pem("X509 CRL", &Ca::new("b").list(&[]))).unwrap();
        fs::write(dir.path().join("README"), "not looked at").unwrap();
        let before = folder.stamp();
        assert_eq!(count(&folder), 1, "of lists by the same name the newest counts");
        assert_eq!(count(&at(dir.path().join("a.crl"))), 1);
        assert_eq!(count(&at(dir.path().join("b.pem"))), 1);
        fs::write(dir.path().join("c.der"), "").unwrap();
        assert_ne!(folder.stamp(), before);
        assert!(folder.read().unwrap_err().to_string().contains("c.der: it holds no revocation list"));
        assert!(at(dir.path().join("none")).read().unwrap_err().to_string().starts_with("reading "));
    }
}
