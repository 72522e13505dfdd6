//! Where things are: the sources, and the folder under cargo's target folder where the demo keeps what it makes.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The checkout we were started from. Cargo says which: with a shared target folder it may not be the one that this
/// program was built in.
pub fn root() -> PathBuf {
    let tests = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&tests).parent().unwrap_or(Path::new("/")).to_owned()
}

/// Cargo's target folder.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// `name` with a mark of this checkout, so that two checkouts on one machine do not take each other's containers down,
/// and the next run of this one finds what a killed run left.
pub fn own_name(name: &str) -> String {
    let mut hasher = DefaultHasher::new();
    target().hash(&mut hasher);
    format!("{name}-{:04x}", hasher.finish() & 0xffff)
}

/// A folder of ours under the target folder, made if it is not there.
pub fn folder(name: &str) -> Result<PathBuf> {
    let path = target().join("demo").join(name);
    std::fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
    Ok(path)
}
