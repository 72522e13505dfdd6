//! The cipher of one direction of a connection, by whichever library is fast on this processor.
//!
//! Half of what bulk traffic costs is AES-GCM. AWS-LC, which does everything else here, has wide code for processors with
//! AVX-512 and seals 16 bytes at a time on others; `ring` has wide code for those that have VAES without AVX-512, which
//! many servers are, or look like to a virtual machine. Both are the same algorithm with the same keys.

use std::sync::LazyLock;

use aws_lc_rs::aead as aws;
use ring::aead as wide;
use rustls::ConnectionTrafficSecrets;

/// Bytes of a tag of every cipher of TLS 1.3.
pub const TAG: usize = 16;

/// The ciphers of TLS 1.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cipher {
    /// AES-128 in Galois/Counter mode.
    Aes128Gcm,
    /// AES-256 in Galois/Counter mode.
    Aes256Gcm,
    /// ChaCha20 with Poly1305.
    ChaCha20Poly1305,
}

impl Cipher {
    /// The cipher of a connection and its key; nothing if we do not know it.
    pub fn of(keys: &ConnectionTrafficSecrets) -> Option<(Cipher, &[u8], &[u8])> {
        match keys {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => Some((Cipher::Aes128Gcm, key.as_ref(), iv.as_ref())),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => Some((Cipher::Aes256Gcm, key.as_ref(), iv.as_ref())),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                Some((Cipher::ChaCha20Poly1305, key.as_ref(), iv.as_ref()))
            }
            _ => None,
        }
    }

    /// Bytes of a key.
    pub fn key_len(self) -> usize {
        if self == Cipher::Aes128Gcm { 16 } else { 32 }
    }

    fn aws(self) -> &'static aws::Algorithm {
        match self {
            Cipher::Aes128Gcm => &aws::AES_128_GCM,
            Cipher::Aes256Gcm => &aws::AES_256_GCM,
            Cipher::ChaCha20Poly1305 => &aws::CHACHA20_POLY1305,
        }
    }

    fn wide(self) -> Option<&'static wide::Algorithm> {
        match self {
            Cipher::Aes128Gcm => Some(&wide::AES_128_GCM),
            Cipher::Aes256Gcm => Some(&wide::AES_256_GCM),
            Cipher::ChaCha20Poly1305 => None,
        }
    }
}

/// Neither key, cipher text nor plain text is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the cipher refused")]
pub struct Refused;

/// A key in use. It has one user, who never gives the same nonce twice.
pub struct Key {
    cipher: Cipher,
    code: Code,
}

enum Code {
    Aws(aws::LessSafeKey),
    Wide(Box<wide::LessSafeKey>),
}

impl Key {
    /// Fails if the key has another length than the cipher's.
    pub fn new(cipher: Cipher, key: &[u8]) -> Result<Key, Refused> {
        Key::with(cipher, key, *WIDE)
    }

    fn with(cipher: Cipher, key: &[u8], wide_code: bool) -> Result<Key, Refused> {
        let code = match cipher.wide().filter(|_| wide_code) {
            Some(algorithm) => {
                let key = wide::UnboundKey::new(algorithm, key).map_err(|_| Refused)?;
                Code::Wide(Box::new(wide::LessSafeKey::new(key)))
            }
            None => {
                let key = aws::UnboundKey::new(cipher.aws(), key).map_err(|_| Refused)?;
                Code::Aws(aws::LessSafeKey::new(key))
            }
        };
        Ok(Key { cipher, code })
    }

    /// What the key is for.
    pub fn cipher(&self) -> Cipher {
        self.cipher
    }

    /// Seals `body` in place and returns its tag.
    pub fn seal(&self, nonce: [u8; 12], header: [u8; 5], body: &mut [u8]) -> Result<[u8; TAG], Refused> {
        let mut tag = [0; TAG];
        match &self.code {
            Code::Aws(key) => {
                let nonce = aws::Nonce::assume_unique_for_key(nonce);
                let sealed = key.seal_in_place_separate_tag(nonce, aws::Aad::from(header), body);
                tag.copy_from_slice(sealed.map_err(|_| Refused)?.as_ref());
            }
            Code::Wide(key) => {
                let nonce = wide::Nonce::assume_unique_for_key(nonce);
                let sealed = key.seal_in_place_separate_tag(nonce, wide::Aad::from(header), body);
                tag.copy_from_slice(sealed.map_err(|_| Refused)?.as_ref());
            }
        }
        Ok(tag)
    }

    /// Opens `sealed`, which ends with its tag, in place; returns the plain text.
    pub fn open<'a>(&self, nonce: [u8; 12], header: [u8; 5], sealed: &'a mut [u8]) -> Result<&'a mut [u8], Refused> {
        match &self.code {
            Code::Aws(key) => {
                let nonce = aws::Nonce::assume_unique_for_key(nonce);
                key.open_in_place(nonce, aws::Aad::from(header), sealed).map_err(|_| Refused)
            }
            Code::Wide(key) => {
                let nonce = wide::Nonce::assume_unique_for_key(nonce);
                key.open_in_place(nonce, wide::Aad::from(header), sealed).map_err(|_| Refused)
            }
        }
    }
}

/// Whether `ring` has the wider code for this processor.
static WIDE: LazyLock<bool> = LazyLock::new(wide_without_avx512);

#[cfg(target_arch = "x86_64")]
fn wide_without_avx512() -> bool {
    let vaes = is_x86_feature_detected!("vaes") && is_x86_feature_detected!("vpclmulqdq");
    vaes && is_x86_feature_detected!("avx2") && !is_x86_feature_detected!("avx512bw")
}

#[cfg(not(target_arch = "x86_64"))]
fn wide_without_avx512() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const CIPHERS: [Cipher; 3] = [Cipher::Aes128Gcm, Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305];
    const HEADER: [u8; 5] = [23, 3, 3, 0, 0];

    #[test]
    fn what_one_library_seals_the_other_opens_at_every_length_around_its_blocks() {
        for cipher in CIPHERS {
            let key = vec![7; cipher.key_len()];
            let (narrow, wide) = (Key::with(cipher, &key, false).unwrap(), Key::with(cipher, &key, true).unwrap());
            for length in (0..600).chain([1 << 14, (1 << 14) + 1]) {
                for (sealer, opener) in [(&narrow, &wide), (&wide, &narrow)] {
                    let plain: Vec<u8> = (0..length).map(|i| i as u8).collect();
                    let mut sealed = plain.clone();
                    let tag = sealer.seal([3; 12], HEADER, &mut sealed).unwrap();
                    sealed.extend(tag);
                    assert_eq!(opener.open([3; 12], HEADER, &mut sealed).unwrap(), plain, "{cipher:?} {length}");
                }
            }
        }
    }

    #[test]
    fn a_changed_byte_anywhere_is_refused_by_both() {
        for (cipher, wide) in CIPHERS.iter().flat_map(|cipher| [(*cipher, false), (*cipher, true)]) {
            let key = Key::with(cipher, &vec![7; cipher.key_len()], wide).unwrap();
            let mut sealed = vec![1; 300];
            let tag = key.seal([3; 12], HEADER, &mut sealed).unwrap();
            sealed.extend(tag);
            for at in 0..sealed.len() {
                let mut changed = sealed.clone();
                changed[at] ^= 1;
                assert_eq!(key.open([3; 12], HEADER, &mut changed), Err(Refused), "{cipher:?} {at}");
            }
            assert_eq!(key.open([4; 12], HEADER, &mut sealed.clone()), Err(Refused), "another nonce");
            assert_eq!(key.open([3; 12], [23, 3, 3, 0, 1], &mut sealed), Err(Refused), "another header");
        }
    }

    #[test]
    fn a_key_of_another_length_is_refused() {
        for (cipher, wide) in CIPHERS.iter().flat_map(|cipher| [(*cipher, false), (*cipher, true)]) {
            for length in [0, 15, 17, 24, 31, 33] {
                assert!(Key::with(cipher, &vec![7; length], wide).is_err(), "{cipher:?} {length}");
            }
        }
    }
}
