//! A text closed with a passphrase, as it lies on disk: keys of the CA, and backups.
//!
//! ```text
//! {"sealed": 1, "purpose": "ca key", "memory_kib": 65536, "passes": 3,
//!  "salt": <base64, 16 bytes>, "nonce": <base64, 12 bytes>, "text": <base64, with the tag>}
//! ```
//! The key is Argon2id (one lane, version 0x13) of the passphrase and the salt, the cipher AES-256-GCM, and everything
//! in front of the salt is authenticated with it. A salt is never used twice, so neither is a key.

use argon2::{Algorithm, Argon2, Params, Version};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use sidewarden_proto::secret::Secret;

/// Shorter passphrases are refused where one is set: they are guessed.
pub const MIN_PASSPHRASE: usize = 12;
/// Most memory that a file may ask for. Its numbers are only believed after they were used.
const MAX_MEMORY_KIB: u32 = 1 << 20;
/// Most passes that a file may ask for.
const MAX_PASSES: u32 = 16;

/// What guessing one passphrase costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Memory, KiB.
    pub memory_kib: u32,
    /// How often it is gone through.
    pub passes: u32,
}

impl Default for Cost {
    /// The second choice of RFC 9106: 64 MiB, three passes; about a tenth of a second.
    fn default() -> Cost {
        Cost { memory_kib: 64 << 10, passes: 3 }
    }
}

/// Why a sealed text cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealFault {
    /// Not of the form.
    #[error("it is cut short, changed or no sealed file")]
    Form,
    /// It asks for more memory or passes than anybody needs.
    #[error("it asks for {0} KiB and {1} passes, which is beyond reason")]
    Cost(u32, u32),
    /// The passphrase is wrong, or the text was changed.
    #[error("the passphrase is wrong, or the file was changed")]
    Passphrase,
    /// A passphrase that is too short.
    #[error("the passphrase has fewer than {MIN_PASSPHRASE} characters")]
    Short,
}

#[derive(Serialize, Deserialize)]
struct Sealed {
    sealed: u8,
    purpose: String,
    memory_kib: u32,
    passes: u32,
    salt: String,
    nonce: String,
    text: String,
}

impl Sealed {
    fn header(&self) -> String {
        format!("sidewarden sealed {} {} {} {}", self.sealed, self.purpose, self.memory_kib, self.passes)
    }
}

/// Closes `text`, to be opened for the same `purpose` only; `fill` provides randomness.
pub fn seal(
    text: &[u8],
    purpose: &str,
    passphrase: &Secret,
    cost: Cost,
    fill: impl Fn(&mut [u8]),
) -> Result<Vec<u8>, SealFault> {
    if passphrase.reveal().chars().count() < MIN_PASSPHRASE {
        return Err(SealFault::Short);
    }
    let (mut salt, mut nonce) = ([0; 16], [0; 12]);
    fill(&mut salt);
    fill(&mut nonce);
    let mut sealed = Sealed {
        sealed: 1,
        purpose: purpose.to_owned(),
        memory_kib: cost.memory_kib,
        passes: cost.passes,
        salt: BASE64_STANDARD.encode(salt),
        nonce: BASE64_STANDARD.encode(nonce),
        text: String::new(),
    };
    let key = derive(passphrase, &salt, cost)?;
    let mut bytes = text.to_vec();
    let aad = Aad::from(sealed.header());
    let closed = key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), aad, &mut bytes);
    closed.map_err(|_| SealFault::Form)?;
    sealed.text = BASE64_STANDARD.encode(bytes);
    serde_json::to_vec(&sealed).map_err(|_| SealFault::Form)
}

/// Opens what [`seal`] closed for `purpose`.
pub fn open(file: &[u8], purpose: &str, passphrase: &Secret) -> Result<Vec<u8>, SealFault> {
    let sealed: Sealed = serde_json::from_slice(file).map_err(|_| SealFault::Form)?;
    if sealed.sealed != 1 || sealed.purpose != purpose {
        return Err(SealFault::Form);
    }
    if sealed.memory_kib > MAX_MEMORY_KIB || sealed.passes > MAX_PASSES {
        return Err(SealFault::Cost(sealed.memory_kib, sealed.passes));
    }
    let salt = decode::<16>(&sealed.salt)?;
    let nonce = decode::<12>(&sealed.nonce)?;
    let mut bytes = BASE64_STANDARD.decode(&sealed.text).map_err(|_| SealFault::Form)?;
    let key = derive(passphrase, &salt, Cost { memory_kib: sealed.memory_kib, passes: sealed.passes })?;
    let opened = key.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(sealed.header()), &mut bytes);
    opened.map(|text| text.to_vec()).map_err(|_| SealFault::Passphrase)
}

fn decode<const N: usize>(text: &str) -> Result<[u8; N], SealFault> {
    let bytes = BASE64_STANDARD.decode(text).map_err(|_| SealFault::Form)?;
    bytes.try_into().map_err(|_| SealFault::Form)
}

fn derive(passphrase: &Secret, salt: &[u8], cost: Cost) -> Result<LessSafeKey, SealFault> {
    let params = Params::new(cost.memory_kib, cost.passes, 1, Some(32)).map_err(|_| SealFault::Form)?;
    let mut key = [0; 32];
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    argon2.hash_password_into(passphrase.reveal().as_bytes(), salt, &mut key).map_err(|_| SealFault::Form)?;
    UnboundKey::new(&AES_256_GCM, &key).map(LessSafeKey::new).map_err(|_| SealFault::Form)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// As little as Argon2 allows: what is tested is not the waiting.
    pub const CHEAP: Cost = Cost { memory_kib: 8, passes: 1 };

    pub fn passphrase() -> Secret {
        Secret::new("correct horse battery")
    }

    fn sealed() -> Vec<u8> {
        seal(b"the key", "ca key", &passphrase(), CHEAP, crate::random).unwrap()
    }

    #[test]
    fn what_was_sealed_opens_with_its_passphrase_and_purpose_only() {
        let file = sealed();
        assert_eq!(open(&file, "ca key", &passphrase()).unwrap(), b"the key");
        assert_eq!(open(&file, "ca key", &Secret::new("correct horse batterz")), Err(SealFault::Passphrase));
        assert_eq!(open(&file, "backup", &passphrase()), Err(SealFault::Form));
        assert_ne!(file, sealed(), "no salt is used twice");
        assert_eq!(seal(b"x", "x", &Secret::new("short"), CHEAP, crate::random), Err(SealFault::Short));
    }

    #[test]
    fn a_file_cut_or_changed_anywhere_does_not_open() {
        let file = sealed();
        for end in 0..file.len() {
            assert!(open(&file[..end], "ca key", &passphrase()).is_err(), "cut at {end}");
        }
        for at in 0..file.len() {
            let mut changed = file.clone();
            changed[at] ^= 1;
            assert!(open(&changed, "ca key", &passphrase()).is_err(), "changed at {at}");
        }
    }

    #[test]
    fn a_file_that_asks_for_the_whole_machine_is_refused_before_it_gets_it() {
        for (memory_kib, passes) in [(u32::MAX, 1), (8, u32::MAX)] {
            let text = format!(
                r#"{{"sealed":1,"purpose":"x","memory_kib":{memory_kib},"passes":{passes},"salt":"","nonce":"","text":""}}"#
            );
            assert_eq!(open(text.as_bytes(), "x", &passphrase()), Err(SealFault::Cost(memory_kib, passes)));
        }
        let zero = r#"{"sealed":1,"purpose":"x","memory_kib":0,"passes":0,"salt":"AAAAAAAAAAAAAAAAAAAAAA==","nonce":"AAAAAAAAAAAAAAAA","text":""}"#;
        assert_eq!(open(zero.as_bytes(), "x", &passphrase()), Err(SealFault::Form));
    }
}
