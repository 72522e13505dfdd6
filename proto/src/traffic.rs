//! The traffic secrets of a TLS 1.3 connection, for a record layer that changes its own keys.
//!
//! rustls can go on deriving keys after a handshake, but keeps the peer's certificates and more for it, 2 KiB that a
//! connection at rest has no use for. What is needed are two secrets, which rustls tells its key log. [`hear`] listens to
//! it for as long as one step of a handshake takes, on its own thread; at all other times nobody does.

use std::cell::RefCell;
use std::fmt;

use aws_lc_rs::hkdf::{Algorithm, HKDF_SHA256, HKDF_SHA384, KeyType, Prk};
use rustls::KeyLog;

thread_local! {
    static HEARD: RefCell<Option<Secrets>> = const { RefCell::new(None) };
}

/// What both sides seal their data with, as far as it was heard.
#[derive(Debug, Default)]
pub struct Secrets {
    /// The client's.
    pub client: Option<Secret>,
    /// The server's.
    pub server: Option<Secret>,
}

impl Secrets {
    /// Adds what was heard later.
    pub fn add(&mut self, later: Secrets) {
        self.client = later.client.or(self.client.take());
        self.server = later.server.or(self.server.take());
    }
}

/// A traffic secret (RFC 8446, 7.1): the keys of one direction come from it, and the secret after it.
pub struct Secret {
    prk: Prk,
    algorithm: Algorithm,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// The secret cannot be what it is said to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a traffic secret is not usable")]
pub struct BadSecret;

impl Secret {
    fn new(secret: &[u8]) -> Result<Secret, BadSecret> {
        let algorithm = match secret.len() {
            32 => HKDF_SHA256,
            48 => HKDF_SHA384,
            _ => return Err(BadSecret),
        };
        Ok(Secret { prk: Prk::new_less_safe(algorithm, secret), algorithm })
    }

    /// The secret after a KeyUpdate (RFC 8446, 7.2).
    pub fn next(&self) -> Result<Secret, BadSecret> {
        let mut secret = [0; 48];
        let secret = &mut secret[..self.algorithm.len()];
        self.expand("traffic upd", secret)?;
        let next = Secret::new(secret);
        secret.fill(0);
        next
    }

    /// Fills `key` and `iv` (RFC 8446, 7.3).
    pub fn keys(&self, key: &mut [u8], iv: &mut [u8]) -> Result<(), BadSecret> {
        self.expand("key", key)?;
        self.expand("iv", iv)
    }

    /// HKDF-Expand-Label with an empty context (RFC 8446, 7.1).
    fn expand(&self, label: &str, out: &mut [u8]) -> Result<(), BadSecret> {
        let (length, label_length) = (out.len() as u16, 6 + label.len() as u8);
        let info = [&length.to_be_bytes()[..], &[label_length], b"tls13 ", label.as_bytes(), &[0]];
        let okm = self.prk.expand(&info, Length(out.len())).map_err(|_| BadSecret)?;
        okm.fill(out).map_err(|_| BadSecret)
    }
}

/// How much is asked of HKDF.
struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// What `step` lets out of traffic secrets.
pub fn hear<T>(step: impl FnOnce() -> T) -> (T, Secrets) {
    HEARD.set(Some(Secrets::default()));
    let done = step();
    (done, HEARD.take().unwrap_or_default())
}

/// The key log of every configuration: tells [`hear`], and nobody else.
#[derive(Debug)]
pub struct ToWhoHears;

const CLIENT: &str = "CLIENT_TRAFFIC_SECRET_0";
const SERVER: &str = "SERVER_TRAFFIC_SECRET_0";

impl KeyLog for ToWhoHears {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        HEARD.with_borrow_mut(|heard| match (label, heard) {
            (CLIENT, Some(heard)) => heard.client = Secret::new(secret).ok(),
            (SERVER, Some(heard)) => heard.server = Secret::new(secret).ok(),
            _ => {}
        });
    }

    fn will_log(&self, label: &str) -> bool {
        [CLIENT, SERVER].contains(&label) && HEARD.with_borrow(Option::is_some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    /// RFC 8448, section 3: the server's application traffic secret, its key and its IV.
    #[test]
    fn keys_are_those_of_the_recorded_handshake() {
        let secret = bytes("a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643");
        let (mut key, mut iv) = ([0; 16], [0; 12]);
        Secret::new(&secret).unwrap().keys(&mut key, &mut iv).unwrap();
        assert_eq!(key[..], bytes("9f02283b6c9c07efc26bb9f2ac92e356"));
        assert_eq!(iv[..], bytes("cf782b88dd83549aadf1e984"));
    }

    #[test]
    fn a_secret_has_the_length_of_a_hash_and_the_next_one_is_another() {
        for length in [0, 16, 31, 33, 64, 4096] {
            assert!(Secret::new(&vec![1; length]).is_err(), "{length}");
        }
        for length in [32, 48] {
            let (first, mut one, mut two) = (Secret::new(&vec![1; length]).unwrap(), [0; 32], [0; 32]);
            first.keys(&mut one, &mut [0; 12]).unwrap();
            first.next().unwrap().keys(&mut two, &mut [0; 12]).unwrap();
            assert_ne!(one, two);
            assert_eq!(format!("{first:?}"), "Secret(…)");
        }
    }

    #[test]
    fn only_who_hears_is_told() {
        let tell = || ToWhoHears.log(CLIENT, &[0; 32], &[1; 32]);
        tell();
        assert!(!ToWhoHears.will_log(CLIENT));
        let ((), heard) = hear(|| assert!(ToWhoHears.will_log(CLIENT) && !ToWhoHears.will_log("EXPORTER_SECRET")));
        assert!(heard.client.is_none(), "what was told before is not kept");
        let ((), heard) = hear(tell);
        assert!(heard.client.is_some() && heard.server.is_none());
        let (_, none) = hear(|| std::thread::spawn(|| ToWhoHears.log(SERVER, &[0; 32], &[1; 32])).join());
        assert!(none.server.is_none(), "another thread's are not ours");
    }
}
