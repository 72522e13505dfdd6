//! What a Workload API answers, and revocation lists.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sidewarden_proto::crl::Crl;
use sidewarden_proto::given::answer::{Answer, Frames};
use sidewarden_proto::time::Timestamp;

fuzz_target!(|bytes: &[u8]| {
    let _ = Crl::read_all(bytes);
    if let Ok(answer) = Answer::from_bytes(bytes) {
        let _ = answer.choose(None, Timestamp::from_secs(1_800_000_000));
    }
    let mut frames = Frames::default();
    for part in bytes.chunks(7) {
        frames.push(part);
        while let Ok(Some(message)) = frames.next_message() {
            let _ = Answer::from_bytes(&message);
        }
    }
});
