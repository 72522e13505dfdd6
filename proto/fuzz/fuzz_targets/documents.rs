//! Texts from outside: configuration, tokens, names, enrolment messages, directives.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sidewarden_proto::config::{Bytes, HostPort};
use sidewarden_proto::directive::Signed;
use sidewarden_proto::enrol::{Answer, Request, Token, from_payload};
use sidewarden_proto::identity::{AgentId, SpiffeId};
use sidewarden_proto::policy::{Policy, difference};
use sidewarden_proto::tls::Trust;
use sidewarden_proto::{config, time::Timestamp};

fuzz_target!(|bytes: &[u8]| {
    let _ = from_payload::<Request>(bytes);
    let _ = from_payload::<Answer>(bytes);
    let _ = Signed::from_bytes(bytes).map(|signed| signed.open(&Trust::default(), Timestamp(0)).is_ok());
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(id.trust_domain().workload(id.path()).as_ref(), Ok(&id));
    }
    let _ = (text.parse::<AgentId>(), text.parse::<Token>(), text.parse::<HostPort>());
    if let Ok(policy) = Policy::parse(text) {
        assert!(difference::between(&policy, &policy).is_empty());
    }
    let _ = config::load(text, &|_| None, |r| {
        let size = r.value("size", Bytes(1));
        let wait = r.value("wait", std::time::Duration::ZERO);
        (size, wait, r.list("route", |r| r.required::<HostPort>("to")), r.section("admin", |r| r.value("listen", true)))
    });
});
