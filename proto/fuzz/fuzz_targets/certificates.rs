//! Certificates as a stranger may show them, before anything about them is verified.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sidewarden_proto::identity::{Usage, judge_leaf, read_server};
use sidewarden_proto::tls::{certificates, spki_of};

fuzz_target!(|bytes: &[u8]| {
    let _ = judge_leaf(bytes, Usage::Client);
    let _ = judge_leaf(bytes, Usage::Server);
    let _ = read_server(bytes);
    let _ = spki_of(&bytes.to_vec().into());
    let _ = certificates(bytes);
});
