//! What the centre's word costs a connection: the deny list and the policy at their largest. Run it by hand, in release:
//! `cargo test --release -p sidewarden-agent --test policy_cost -- --ignored --nocapture`

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use sidewarden_agent::policy::{Central, Decision, Rules, decide};
use sidewarden_proto::directive::{Directive, Revocation, Target};
use sidewarden_proto::identity::{Peer, PeerName, Sha256, SpiffeId};
use sidewarden_proto::policy::connections::At;
use sidewarden_proto::policy::{Extract, Policy};
use sidewarden_proto::time::Timestamp;

const ROUNDS: u32 = 20_000;

fn id(path: &str) -> SpiffeId {
    format!("spiffe://td/{path}").parse().unwrap()
}

fn peer(path: &str) -> Peer {
    Peer {
        name: PeerName::Spiffe(id(path)),
        spki: Sha256([9; 32]),
        serial: "1".into(),
        issuers: Arc::from([Sha256([8; 32])]),
        not_before: Timestamp(0),
        not_after: Timestamp(i64::MAX),
    }
}

/// With so many revocations: a third each of keys, workloads and serial numbers.
fn directive(revoked: u32) -> Directive {
    let json = r#"{"version":1,"trust_domain":"td","issued_us":1,"bundle":[]}"#;
    let one = |number: u32| {
        let mut spki = Sha256([7; 32]);
        spki.0[..4].copy_from_slice(&number.to_be_bytes());
        let what = match number % 3 {
            0 => Target::Key { spki },
            1 => Target::Workload { id: id(&format!("old/service-{number}")) },
            _ => Target::Serial { serial: format!("{number:040x}") },
        };
        Revocation { id: number.to_string(), what, why: "lost".into(), at_us: Timestamp(1), keys: vec![] }
    };
    serde_json::from_str::<Directive>(json).unwrap().with_revoked((0..revoked).map(one).collect())
}

/// With so many lines, one in a hundred of which is about `shop/orders`.
fn policy(lines: usize) -> Policy {
    let line = |number: usize| {
        let to = if number.is_multiple_of(100) { "shop/orders".to_owned() } else { format!("shop/service-{number}") };
        format!("[[allow]]\nfrom = ['shop/client-{number}']\nto = ['{to}']\n")
    };
    Policy::parse(&(0..lines).map(line).collect::<String>()).unwrap()
}

#[test]
#[ignore = "not a test: a measurement of what a decision costs"]
fn the_cost_of_a_decision() {
    let (own, domain) = (id("shop/orders"), "td".parse().unwrap());
    for (revoked, lines) in [(0, 0), (0, 500), (2_000, 0), (2_000, 500)] {
        let (directive, policy) = (directive(revoked), policy(lines));
        let begun = Instant::now();
        let extract = Extract::of(&policy, 1, &own, &domain);
        let extracted = begun.elapsed();
        let last = format!("shop/client-{}", lines.saturating_sub(1) / 100 * 100);
        let at = At { port: 8443, server_name: None };
        let rules = Rules::Inbound { allow: vec![id(&last)], allow_dns: vec![], at };
        let (peer, central) = (peer(&last), Central { directive: Some(&directive), policy: Ok(&extract) });
        assert_eq!(decide(&rules, &peer, central, Timestamp(1)), Decision::Allow);
        let mut rounds: Vec<f64> = (0..5)
            .map(|_| {
                let begun = Instant::now();
                for _ in 0..ROUNDS {
                    black_box(decide(black_box(&rules), black_box(&peer), central, Timestamp(1)));
                }
                begun.elapsed().as_secs_f64() * 1e6 / f64::from(ROUNDS)
            })
            .collect();
        rounds.sort_by(f64::total_cmp);
        println!(
            "{revoked} revocations, {lines} lines of policy: {:.2} us a decision (median of 5), {:.1} ms to extract",
            rounds[2],
            extracted.as_secs_f64() * 1e3
        );
    }
}
