//! Files that somebody hands to `trust import`: PEM, DER, PKCS#7, and everything that only looks like them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sidewarden_collector::trust::{judge::judge, read::read};
use sidewarden_proto::time::Timestamp;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(found) = read(bytes) {
        let judged = judge(&found.certificates, Timestamp::from_secs(1_800_000_000));
        assert_eq!(judged.len(), found.certificates.len());
    }
});
