//! The CA's files and rules.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use rcgen::KeyPair;
use sidewarden_proto::directive::{Directive, Revocation, Target};
use sidewarden_proto::enrol::Der;
use sidewarden_proto::identity::{AgentId, PeerName, TrustDomain, Usage};
use sidewarden_proto::secret::Secret;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls;
use tempfile::{TempDir, tempdir};

use super::*;

const DAY: Duration = Duration::from_secs(86_400);

fn domain() -> TrustDomain {
    "x.example".parse().unwrap()
}

fn terms(vault: Vault) -> Terms {
    let names = vec!["localhost".into(), "127.0.0.1".into()];
    Terms { domain: domain(), names, own_life: 16 * DAY, vault }
}

fn open_at(dir: &Path, now: Timestamp) -> Result<(Authority, bool), CaError> {
    Authority::open(dir, terms(Vault::default()), now)
}

fn made() -> (TempDir, Timestamp) {
    let (dir, now) = (tempdir().unwrap(), Timestamp::now());
    assert!(open_at(dir.path(), now).unwrap().1, "the first start makes it");
    (dir, now)
}

fn step(authority: &Authority, step: rotate::Step, now: Timestamp) {
    authority.ready(step, now).unwrap().take().unwrap();
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn the_second_start_finds_the_same_root_and_nobody_else_can_read_the_keys() {
    let (dir, now) = made();
    let pin = Authority::read_pin(dir.path()).unwrap();
    let (again, first) = open_at(dir.path(), now).unwrap();
    assert!(!first && again.pin() == pin);
    for name in ["root", "issuing"] {
        assert_eq!(mode(&dir.path().join(name)), 0o700, "{name}");
        assert_eq!(mode(&dir.path().join(name).join("key.pem")), 0o600, "{name}");
    }
}

#[test]
fn what_was_tampered_with_is_named() {
    type Spoil = fn(&Path);
    let rows: [(&str, Spoil, &str); 7] = [
        (
            "readable key",
            |d| std::fs::set_permissions(d.join("root/key.pem"), PermissionsExt::from_mode(0o644)).unwrap(),
            "chmod 600",
        ),
        (
            "open directory",
            |d| std::fs::set_permissions(d.join("issuing"), PermissionsExt::from_mode(0o755)).unwrap(),
            "chmod 700",
        ),
        ("lost root key", |d| std::fs::remove_file(d.join("root/key.pem")).unwrap(), "is there and"),
        ("lost root certificate", |d| std::fs::remove_file(d.join("root/cert.pem")).unwrap(), "is there and"),
        ("keys swapped", swap_keys, "no CA certificate of the key"),
        ("no certificate", |d| std::fs::write(d.join("issuing/cert.pem"), "x").unwrap(), "no certificate"),
        ("another root's", other_issuing, "was not signed by this root"),
    ];
    for (what, spoil, wanted) in rows {
        let (dir, now) = made();
        spoil(dir.path());
        let error = open_at(dir.path(), now).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains(wanted), "{what}: {error:?}");
    }
}

fn swap_keys(dir: &Path) {
    std::fs::copy(dir.join("root/key.pem"), dir.join("issuing/key.pem")).unwrap();
}

fn other_issuing(dir: &Path) {
    let (other, _) = made();
    for name in ["issuing/cert.pem", "issuing/key.pem"] {
        std::fs::copy(other.path().join(name), dir.join(name)).unwrap();
    }
}

#[test]
fn a_crash_while_the_ca_is_made_leaves_nothing_in_the_way() {
    let (dir, now) = (tempdir().unwrap(), Timestamp::now());
    std::fs::create_dir_all(dir.path().join("root.part")).unwrap();
    std::fs::write(dir.path().join("root.part/key.pem"), "half a k").unwrap();
    assert!(open_at(dir.path(), now).unwrap().1);
    std::fs::remove_dir_all(dir.path().join("issuing")).unwrap();
    assert!(!open_at(dir.path(), now).unwrap().1, "the issuing CA is made anew under the same root");
}

#[test]
fn keys_that_the_list_does_not_name_are_gone_after_a_start_and_without_a_list_nothing_is() {
    let (dir, now) = made();
    let is_there = |name: &str| dir.path().join(name).exists();
    let leave = |name: &str| {
        std::fs::create_dir_all(dir.path().join(name)).unwrap();
        std::fs::write(dir.path().join(name).join("key.pem"), "a key").unwrap();
    };
    ["g7/issuing", "member", "g07", "gone"].into_iter().for_each(leave);
    let list = std::fs::read(dir.path().join("generations.json")).unwrap();
    std::fs::remove_file(dir.path().join("generations.json")).unwrap();
    let lost = open_at(dir.path(), now).unwrap_err().to_string();
    assert!(lost.contains("generations.json") && is_there("g7"), "it may have named this one: {lost}");
    std::fs::write(dir.path().join("generations.json"), list).unwrap();
    let (authority, _) = open_at(dir.path(), now).unwrap();
    assert!(!is_there("g7"));
    assert!(["root", "issuing", "member", "g07", "gone"].into_iter().all(is_there), "none of which is of a generation");
    for step in [rotate::Step::Prepare, rotate::Step::Activate] {
        self::step(&authority, step, now);
        open_at(dir.path(), now).unwrap();
        assert!(["root", "issuing", "g2"].into_iter().all(is_there), "{step:?}");
    }
    self::step(&authority, rotate::Step::Retire, now);
    assert!(!is_there("root") && !is_there("issuing"));
    // The process ended before they were removed.
    ["root", "issuing"].into_iter().for_each(leave);
    let pin = authority.pin();
    assert_eq!(open_at(dir.path(), now).unwrap().0.pin(), pin);
    assert!(!is_there("root") && !is_there("issuing") && is_there("g2"));
}

#[test]
fn a_wrong_clock_and_a_wrong_domain_are_named_as_such() {
    let (dir, now) = made();
    for wrong in [now.minus(3 * DAY), now.plus(4000 * DAY)] {
        let error = open_at(dir.path(), wrong).unwrap_err().to_string();
        assert!(error.contains("clock"), "{error}");
    }
    let other = Terms { domain: "y.example".parse().unwrap(), ..terms(Vault::default()) };
    let error = Authority::open(dir.path(), other, now).unwrap_err().to_string();
    assert!(error.contains("trust_domain = \"x.example\""), "{error}");
}

#[test]
fn certificates_renew_before_they_run_out() {
    let (dir, now) = made();
    let (authority, _) = open_at(dir.path(), now).unwrap();
    let (own, issuing) = (authority.own(), std::fs::read(dir.path().join("issuing/cert.pem")).unwrap());
    let serial = own.borrow().peer().serial.clone();
    assert!(!authority.renew_due(now.plus(7 * DAY)).unwrap());
    assert!(authority.renew_due(now.plus(9 * DAY)).unwrap());
    assert_ne!(own.borrow().peer().serial, serial);
    assert_eq!(std::fs::read(dir.path().join("issuing/cert.pem")).unwrap(), issuing);
    assert!(authority.renew_due(now.plus(250 * DAY)).unwrap());
    assert_ne!(std::fs::read(dir.path().join("issuing/cert.pem")).unwrap(), issuing);
    let later = now.plus(250 * DAY);
    tls::verify_chain(own.borrow().chain(), &authority.trust(), Usage::Server, later).unwrap();
}

#[test]
fn an_issuing_ca_that_has_ended_is_made_anew_by_its_root_and_stops_no_start() {
    let (dir, now) = made();
    let (authority, _) = open_at(dir.path(), now).unwrap();
    for step in [rotate::Step::Prepare, rotate::Step::Activate] {
        self::step(&authority, step, now);
    }
    // The rotation is left there, the old issuing CA ends, and the collector runs on.
    let later = |days| now.plus(days * DAY);
    for tens in 1..40 {
        authority.renew_due(later(tens * 10)).unwrap();
    }
    step(&authority, rotate::Step::Taint, later(400));
    drop(authority);
    // And it was off for years, with two generations and with one.
    let (authority, _) = open_at(dir.path(), later(1_500)).unwrap();
    step(&authority, rotate::Step::Retire, later(1_500));
    drop(authority);
    let holds = |at| {
        let (authority, _) = open_at(dir.path(), at).unwrap();
        tls::verify_chain(authority.own().borrow().chain(), &authority.trust(), Usage::Server, at).is_ok()
    };
    assert!(holds(later(3_000)));
    assert!(holds(later(2_000)), "that was a clock ahead, and now it is right");
}

#[test]
fn an_issuing_ca_that_has_ended_and_whose_root_is_elsewhere_is_named() {
    let (dir, now) = made();
    let list = r#"{"generations":[{"number":1,"stage":"active","since_us":0,"member":true}]}"#;
    std::fs::write(dir.path().join("generations.json"), list).unwrap();
    std::fs::remove_file(dir.path().join("root/key.pem")).unwrap();
    assert!(open_at(dir.path(), now).is_ok());
    let error = open_at(dir.path(), now.plus(400 * DAY)).unwrap_err().to_string();
    assert!(error.contains("issuing/cert.pem"), "{error}");
}

#[test]
fn what_ends_with_its_issuer_and_cannot_be_made_longer_is_not_made_anew_each_second() {
    let (dir, now) = made();
    let long = Terms { own_life: 300 * DAY, ..terms(Vault::default()) };
    let (authority, _) = Authority::open(dir.path(), long, now).unwrap();
    let until = |what| authority.dates().iter().find(|one| one.what == what).unwrap().not_after;
    assert!(authority.renew_due(now.plus(151 * DAY)).unwrap());
    assert_eq!(until("collector"), until("issuing"));
    assert!(!authority.renew_due(now.plus(216 * DAY)).unwrap(), "half of its life is over, and more there is not");
    assert!(authority.renew_due(now.plus(250 * DAY)).unwrap(), "with the issuing CA it is");
    // The last issuing CA under the root ends with it.
    for days in (251..3_600).step_by(50) {
        authority.renew_due(now.plus(days * DAY)).unwrap();
    }
    let last = now.plus(3_600 * DAY);
    authority.renew_due(last).unwrap();
    assert_eq!((until("issuing"), until("collector")), (until("root"), until("root")));
    for secs in 1..4 {
        assert!(!authority.renew_due(last.plus(Duration::from_secs(secs))).unwrap());
    }
}

/// An issuer with a token, an agent's certificate of `now`, and the request for the next one.
fn issuer(dir: &Path, now: Timestamp) -> (Issuer, sidewarden_proto::enrol::Token) {
    let authority = std::sync::Arc::new(open_at(dir, now).unwrap().0);
    let register = Register::open(&dir.join("ca.db")).unwrap();
    let pattern = "shop/web".parse().unwrap();
    let token = register.create(&pattern, 9, DAY / 24, authority.pin(), now).unwrap().0;
    (Issuer::new(authority, register, DAY, 7 * DAY), token)
}

fn ask(token: &sidewarden_proto::enrol::Token, key: &KeyPair) -> sidewarden_proto::enrol::Request {
    sidewarden_proto::enrol::Request {
        version: String::new(),
        workload: None,
        instance: "c1".parse().unwrap(),
        token_id: token.id.clone(),
        token_secret: token.secret.clone(),
        csr: Der(rcgen::CertificateParams::default().serialize_request(key).unwrap().der().to_vec()),
        previous: Vec::new(),
    }
}

#[test]
fn a_clock_that_jumps_a_day_spends_no_token_and_what_it_made_is_renewed_by_its_key_once_it_is_right() {
    let (dir, now) = made();
    let ((issuer, token), key) = (issuer(dir.path(), now), KeyPair::generate().unwrap());
    let directive: Directive = serde_json::from_value(
        serde_json::json!({"version": 1, "trust_domain": domain(), "issued_us": now, "bundle": []}),
    )
    .unwrap();
    let enrol = |request: &sidewarden_proto::enrol::Request, at| issuer.enrol(request, &directive, &|_| None, at);
    let holds = |grant: &Grant, at| {
        let chain: Vec<_> = grant.issued.chain.iter().map(|der| der.0.clone().into()).collect();
        tls::verify_chain(&chain, &issuer.authority().trust(), Usage::Client, at).is_ok()
    };
    let (ahead, behind) = (now.plus(DAY), now.minus(DAY).plus(DAY / 24));
    assert_eq!(enrol(&ask(&token, &key), ahead).unwrap_err().reason, "token_expired");
    let good = enrol(&ask(&token, &key), now).unwrap();
    assert!(holds(&good, now), "the token was not spent by the wrong clock");

    // By a clock that is ahead the certificate has ended: it is renewed by its own key, and does not hold yet.
    let previous = good.issued.chain.clone();
    let renewal = sidewarden_proto::enrol::Request { token_id: String::new(), previous, ..ask(&token, &key) };
    let early = enrol(&renewal, ahead).unwrap();
    assert!(holds(&early, ahead) && !holds(&early, now), "an agent whose clock is right says that a clock is wrong");
    // By one that is behind, or set right again, what was made ahead does not hold yet: renewed by its own key as well.
    let previous = early.issued.chain.clone();
    let from_ahead = sidewarden_proto::enrol::Request { token_id: String::new(), previous, ..ask(&token, &key) };
    assert!(holds(&enrol(&from_ahead, now).unwrap(), now));
    assert!(holds(&enrol(&renewal, behind).unwrap(), behind));
    let late = enrol(&ask(&token, &key), behind).unwrap();
    assert!(holds(&late, behind) && !holds(&late, now.plus(DAY / 12)), "it ends with the wrong clock's day");
    let refused = enrol(&renewal, now).unwrap_err();
    assert_eq!(
        (refused.reason.as_str(), refused.retry),
        ("clock", true),
        "it holds: whoever asks here has a wrong clock"
    );
}

#[test]
fn a_certificate_that_is_revoked_or_whose_issuer_is_makes_no_next_one_within_the_grace() {
    let (dir, now) = made();
    let ((issuer, token), key) = (issuer(dir.path(), now), KeyPair::generate().unwrap());
    let json = serde_json::json!({"version": 1, "trust_domain": domain(), "issued_us": now, "bundle": []});
    let directive: Directive = serde_json::from_value(json).unwrap();
    let first = issuer.enrol(&ask(&token, &key), &directive, &|_| None, now).unwrap();
    let previous = first.issued.chain.clone();
    let renewal = sidewarden_proto::enrol::Request { token_id: String::new(), previous, ..ask(&token, &key) };
    let rows = [
        (Target::Serial { serial: first.event.serial.clone() }, Err("revoked".to_owned())),
        (Target::Serial { serial: "77".into() }, Ok(())),
        (Target::IssuingKey { spki: issuer.authority().issuers()[0] }, Err("revoked".to_owned())),
    ];
    for (what, expected) in rows {
        let (id, why, at_us) = ("1".into(), "stolen".into(), now);
        let revoked = vec![Revocation { id, what: what.clone(), why, at_us, keys: Vec::new() }];
        let directive = directive.clone().with_revoked(revoked);
        let answer = issuer.enrol(&renewal, &directive, &|_| None, now.plus(2 * DAY));
        assert_eq!(answer.map(drop).map_err(|refused| refused.reason), expected, "{what:?}");
    }
}

#[test]
fn the_certificates_of_an_instance_follow_each_other_no_faster_over_however_many_connections() {
    let (dir, now) = made();
    let ((issuer, token), key) = (issuer(dir.path(), now), KeyPair::generate().unwrap());
    let json = serde_json::json!({"version": 1, "trust_domain": domain(), "issued_us": now, "bundle": []});
    let directive: Directive = serde_json::from_value(json).unwrap();
    let first = issuer.enrol(&ask(&token, &key), &directive, &|_| None, now).unwrap();
    let chain: Vec<_> = first.issued.chain.iter().map(|der| der.0.clone().into()).collect();
    let (peer, csr) = (tls::peer_of(&chain, Usage::Client).unwrap(), ask(&token, &key).csr.0);
    let renew = |secs| issuer.renew(&first.agent, &peer, &csr, &directive, now.plus(Duration::from_secs(secs)));
    let request = sidewarden_proto::enrol::Request { previous: first.issued.chain.clone(), ..ask(&token, &key) };
    let by_grace = |secs| {
        let at = now.plus(2 * DAY).plus(Duration::from_secs(secs));
        issuer.enrol(&request, &directive, &|_| None, at)
    };
    let allowed = |answer: Result<Grant, sidewarden_proto::enrol::Refused>| match answer {
        Ok(_) => true,
        Err(refused) => {
            assert!(refused.retry && refused.detail.contains("every 5 s"), "{refused:?}");
            false
        }
    };
    for (secs, wanted) in [(0, true), (0, false), (4, false), (5, true), (9, false), (10, true)] {
        assert_eq!((allowed(renew(secs)), allowed(by_grace(secs))), (wanted, wanted), "{secs}");
    }
    let other = AgentId { instance: "c2".parse().unwrap(), ..first.agent.clone() };
    assert!(issuer.renew(&other, &peer, &csr, &directive, now.plus(Duration::from_secs(10))).is_ok());
    assert!(allowed(renew(15)), "what a clock issued that was two days ahead keeps nobody waiting");
}

#[test]
fn of_what_has_long_ended_the_register_keeps_what_a_key_that_may_come_back_is_judged_by() {
    let (dir, now) = made();
    let (issuer, _) = issuer(dir.path(), now);
    // Number, instance, key, days until its end (the grace is seven), whether it was seen, whether it stays.
    let rows = [
        (1, "a", 1, -20, true, false),
        (2, "a", 2, -19, true, false),
        (3, "a", 3, 1, true, true),
        // Nothing has followed: by a clock that is ahead alone it may have ended.
        (4, "alone", 4, -900, true, true),
        (5, "within the grace", 5, -7, true, true),
        (6, "within the grace", 6, 1, true, true),
        (7, "renewed by its key", 7, -20, true, false),
        (8, "renewed by its key", 7, -10, false, true),
        (9, "next was never seen", 8, -20, true, true),
        (10, "next was never seen", 9, -10, false, true),
        // This one is out of use because of the next.
        (11, "older one holds", 10, 1, true, true),
        (12, "older one holds", 11, -20, true, true),
        (13, "older one holds", 12, 1, true, true),
    ];
    for (id, instance, key, days, seen, _) in rows {
        let sql = "INSERT INTO issued (id, serial, spki, workload, instance, not_before, not_after, issued, way, seen)
                   VALUES (?1, ?1, ?2, 'spiffe://x.example/shop/web', ?3, 0, ?4, 0, 'renewal', ?5)";
        let ends = now.0 + days * i64::try_from(DAY.as_micros()).unwrap();
        issuer.register().db.execute(sql, rusqlite::params![id, [key as u8; 32], instance, ends, seen]).unwrap();
    }
    assert_eq!(issuer.forget_ended(now).unwrap(), rows.iter().filter(|row| !row.5).count());
    for (id, instance, _, _, _, stays) in rows {
        let count = "SELECT count(*) FROM issued WHERE id = ?1";
        let count: i64 = issuer.register().db.query_row(count, [id], |row| row.get(0)).unwrap();
        assert_eq!(count == 1, stays, "{id}, {instance}");
    }
}

#[test]
fn our_own_certificate_that_was_made_by_a_clock_ahead_is_made_anew_when_the_clock_is_right() {
    let (dir, now) = made();
    let (authority, _) = open_at(dir.path(), now.plus(DAY)).unwrap();
    let own = authority.own();
    let holds = |at| tls::verify_chain(own.borrow().chain(), &authority.trust(), Usage::Server, at).is_ok();
    assert!(holds(now.plus(DAY)) && !holds(now));
    assert!(authority.renew_due(now).unwrap());
    assert!(holds(now) && !authority.renew_due(now).unwrap());
    // A day back hurts nobody: it holds until long after the right time.
    let (behind, _) = open_at(dir.path(), now.minus(DAY / 2)).unwrap();
    assert!(tls::verify_chain(behind.own().borrow().chain(), &behind.trust(), Usage::Server, now).is_ok());
}

#[test]
fn a_leaf_names_its_workload_and_nothing_else_and_never_outlives_its_issuer() {
    let (dir, now) = made();
    let (authority, _) = open_at(dir.path(), now).unwrap();
    let (workload, key) = (domain().workload("shop/web").unwrap(), KeyPair::generate().unwrap());
    let chain = authority.sign(&workload, None, &[], &key, DAY, now).unwrap();
    let peer = tls::verify_chain(&chain, &authority.trust(), Usage::Client, now).unwrap();
    assert_eq!((peer.name, chain.len()), (PeerName::Spiffe(workload.clone()), 3));
    assert_eq!(peer.not_before.as_secs(), now.minus(LEEWAY).as_secs());
    assert_eq!(peer.not_after.as_secs(), now.plus(DAY).as_secs());
    assert_eq!(tls::spki_of(&chain[2]).unwrap(), authority.pin());
    let long = authority.sign(&workload, Some("web-1"), &[], &key, 900 * DAY, now).unwrap();
    let peer = tls::peer_of(&long, Usage::Client).unwrap();
    assert!(peer.not_after <= now.plus(366 * DAY), "{}", peer.not_after);
}

#[test]
fn patterns_cover_what_they_say() {
    let rows = [
        ("shop/web", "shop/web", true),
        ("shop/web", "shop/webby", false),
        ("shop/*", "shop/web", true),
        ("shop/*", "shop/a/b", true),
        ("shop/*", "shop", false),
        ("shop/*", "shopping/web", false),
    ];
    for (pattern, path, covered) in rows {
        assert_eq!(pattern.parse::<Pattern>().unwrap().covers(path), covered, "{pattern} {path}");
    }
    for bad in
        ["", "*", "/shop", "shop//web", "shop/**", "a*/b", "shop/", "../x", "sidewarden/collector", "sidewarden/*"]
    {
        assert!(bad.parse::<Pattern>().is_err(), "{bad:?}");
    }
}

#[test]
fn of_a_token_only_the_hash_is_kept() {
    let (dir, now) = made();
    let path = dir.path().join("ca.db");
    let register = Register::open(&path).unwrap();
    let pin = Authority::read_pin(dir.path()).unwrap();
    let (token, _) = register.create(&"shop/*".parse().unwrap(), 2, DAY, pin, now).unwrap();
    assert!(register.find(&token.id, &token.secret).unwrap().is_some());
    assert!(register.find(&token.id, &Secret::new("x")).unwrap().is_none());
    assert!(register.find("0000000000000000", &token.secret).unwrap().is_none());
    drop(register);
    for name in ["ca.db", "ca.db-wal"] {
        let bytes = std::fs::read(dir.path().join(name)).unwrap_or_default();
        let secret = token.secret.reveal().as_bytes();
        assert!(!bytes.windows(secret.len()).any(|w| w == secret), "the secret is in {name}");
    }
}

#[test]
fn a_new_token_is_told_once() {
    let (dir, now) = made();
    let register = Register::open(&dir.path().join("ca.db")).unwrap();
    let pin = Authority::read_pin(dir.path()).unwrap();
    register.create(&"shop/web".parse().unwrap(), 1, DAY, pin, now).unwrap();
    assert_eq!(register.take_unannounced().unwrap().len(), 1);
    assert_eq!(register.take_unannounced().unwrap().len(), 0);
    assert!(matches!(register.revoke("nope"), Err(CaError::NoToken(_))));
}

#[test]
fn every_certificate_of_the_ca_is_told_with_its_end_and_its_generation() {
    let (dir, now) = made();
    let (authority, _) = open_at(dir.path(), now).unwrap();
    let told = |authority: &Authority| -> Vec<(String, String, u64)> {
        let days =
            |one: &sidewarden_proto::event::CaCertificate| one.not_after_us.since(now).as_secs().div_ceil(86_400);
        dates_of(authority).iter().map(|one| (one.what.clone(), one.name.clone(), days(one))).collect()
    };
    let line = |what: &str, name: &str, days| (what.to_owned(), name.to_owned(), days);
    let ends = [line("root", "", 3650), line("issuing", "", 365), line("collector", "", 16)];
    assert_eq!(told(&authority), ends);
    step(&authority, rotate::Step::Prepare, now);
    let names: Vec<String> = told(&authority).into_iter().map(|(what, name, _)| format!("{what} {name}")).collect();
    assert_eq!(names[0], "root 1, active");
    assert!(names.contains(&"root 2, prepared".to_owned()), "{names:?}");
}

#[test]
fn with_the_issuing_ca_the_collectors_own_certificate_is_renewed() {
    let (dir, now) = made();
    let (authority, _) = open_at(dir.path(), now).unwrap();
    let issuing = || authority.own().borrow().chain()[1].clone();
    let before = issuing();
    let is_new = || authority.dates().iter().any(|one| one.what == "issuing" && one.not_before > now);
    let due = (1..365).find(|days| {
        authority.renew_due(now.plus(DAY * *days)).unwrap();
        is_new()
    });
    assert!(due.is_some(), "the issuing CA is renewed before its end");
    assert_ne!(issuing(), before, "the chain in use is that of the new one");
}
