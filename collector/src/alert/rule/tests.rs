//! Each rule with events that raise, hold and end it, and with some that must not.

use super::*;
use sidewarden_proto::event::*;
use sidewarden_proto::finding::{CisIds, Evidence, Remedy, Vantage};
use sidewarden_proto::identity::Sha256;

fn agent() -> AgentId {
    "spiffe://x.test/shop/orders#orders-1".parse().unwrap()
}

fn read(at: i64, received: i64, last_tick: Option<i64>, body: &Body) -> Vec<(&'static str, Signal)> {
    let (at, received) = (Timestamp::from_secs(at), Timestamp::from_secs(received));
    signals(at, received, last_tick, Severity::Warning, body)
}

fn read_as(severity: Severity, body: &Body) -> Vec<(&'static str, Signal)> {
    signals(Timestamp(0), Timestamp(0), None, severity, body)
}

fn signals(
    at: Timestamp,
    received: Timestamp,
    last_tick: Option<i64>,
    severity: Severity,
    body: &Body,
) -> Vec<(&'static str, Signal)> {
    let agent = agent();
    let seen = Seen {
        agent: &agent,
        at,
        received,
        kind: body.kind(),
        severity,
        summary: "a line",
        body: Some(body),
        last_tick: last_tick.map(Timestamp::from_secs),
        forged: false,
    };
    let rules = RULES.iter().filter(|rule| rule.reads(seen.kind, false));
    let signals = rules.flat_map(|rule| rule.read(&seen).into_iter().map(|signal| (rule.name, signal)));
    signals.inspect(|(_, signal)| is_listed(signal)).collect()
}

/// After a restart an alert is known by its labels: each is looked for by its name.
fn is_listed(signal: &Signal) {
    if let Signal::Raise(Case { apart: Some((name, _)), .. }) = signal {
        assert!(APART.contains(name), "`{name}` is missing in the list of labels");
    }
}

/// The alerts an event raises, as `name[reason]`.
fn raised(body: impl Into<Body>) -> Vec<String> {
    let signals = read(100, 100, None, &body.into());
    let names = signals.into_iter().filter_map(|(name, signal)| match signal {
        Signal::Raise(case) => Some(match case.apart {
            Some((_, value)) => format!("{name}[{value}]"),
            None => name.to_owned(),
        }),
        _ => None,
    });
    names.collect()
}

fn refusal(reason: RefusalReason) -> ConnectionRefused {
    ConnectionRefused {
        direction: Direction::Inbound,
        reason,
        detail: "GET / HTTP/1.1".into(),
        hint: reason.hint().into(),
        listener: "0.0.0.0:8443".into(),
        source: "172.18.0.1:4711".into(),
        peer: String::new(),
        count: 3,
    }
}

fn a_finding(check: &str, severity: Severity, verdict: Verdict) -> Finding {
    Finding {
        check: check.into(),
        ids: CisIds { v1_3_1: "5.31".into(), v1_6: "5.32".into() },
        title: "the Docker socket is not mounted".into(),
        severity,
        verdict,
        evidence: vec![Evidence::new("/proc/1/mountinfo", "/run/docker.sock")],
        remedy: Remedy { compose: "remove the volume".into(), ..Remedy::default() },
        vantage: Vantage::Open,
    }
}

fn process() -> ProcessInfo {
    ProcessInfo { pid: 42, name: "sh".into(), command: "sh -c id".into(), ..ProcessInfo::default() }
}

#[test]
fn every_refusal_goes_to_at_most_one_rule() {
    let rows = [
        (RefusalReason::Plaintext, Some("PlaintextRefused[plaintext]")),
        (RefusalReason::DirectToService, Some("DirectToService[direct_to_service]")),
        (RefusalReason::ProtocolVersion, Some("LegacyTls[protocol_version]")),
        (RefusalReason::NoCertificate, Some("BadPeerCertificate[no_certificate]")),
        (RefusalReason::UnknownCa, Some("ForeignCertificate[unknown_ca]")),
        (RefusalReason::Expired, Some("BadPeerCertificate[expired]")),
        (RefusalReason::BadCertificate, Some("BadPeerCertificate[bad_certificate]")),
        (RefusalReason::Revoked, Some("BadPeerCertificate[revoked]")),
        (RefusalReason::RevocationUnknown, Some("BadPeerCertificate[revocation_unknown]")),
        (RefusalReason::NotAllowed, Some("PeerNotAllowed[not_allowed]")),
        (RefusalReason::WrongPeer, Some("WrongPeer[wrong_peer]")),
        (RefusalReason::HandshakeFailed, None),
        (RefusalReason::HandshakeTimeout, Some("ConnectionsLimited[handshake_timeout]")),
        (RefusalReason::RefusedByPeer, None),
        (RefusalReason::Unreachable, None),
        (RefusalReason::WorkloadUnreachable, None),
        (RefusalReason::LimitReached, Some("ConnectionsLimited[limit_reached]")),
        (RefusalReason::NoIdentity, None),
        (RefusalReason::ProxyHeaderUntrusted, Some("ProxyHeaderSpoofed[proxy_header_untrusted]")),
        (RefusalReason::ProxyHeaderBroken, None),
        (RefusalReason::UnknownServerName, None),
        (RefusalReason::Loop, Some("RouteLoop[loop]")),
        (RefusalReason::EgressNotListed, Some("EgressRefused[egress_not_listed]")),
        (RefusalReason::EgressPrivateAddress, Some("EgressToPrivateAddress[egress_private_address]")),
        (RefusalReason::EgressLoop, Some("EgressRefused[egress_loop]")),
        (RefusalReason::BadRequest, Some("EgressRefused[bad_request]")),
        (RefusalReason::RequestTimeout, Some("ConnectionsLimited[request_timeout]")),
        (RefusalReason::NameUnresolved, None),
        (RefusalReason::UpstreamRefused, None),
        (RefusalReason::Quarantined, None),
    ];
    for (reason, expected) in rows {
        let expected: Vec<String> = expected.iter().map(|name| name.to_string()).collect();
        assert_eq!(raised(refusal(reason)), expected, "{reason}");
    }
}

#[test]
fn events_raise_the_alert_that_names_them() {
    let entered =
        |as_root, privileged| ProcessEntered { process: process(), as_root, privileged, declared: String::new() };
    let started = |clean| AgentStarted {
        version: "1".into(),
        mode: Mode::Sidecar,
        vantage: Vantage::Open,
        clean,
        heartbeat_secs: 5,
    };
    let permissive = |on, listener: &str| ListenerPermissive {
        listener: listener.into(),
        on,
        reason: "moving".into(),
        until_us: Timestamp::from_secs(9),
    };
    let insecure = |on, place: &str| TrustInsecure {
        direction: Direction::Outbound,
        place: place.into(),
        on,
        reason: "old".into(),
        until_us: Timestamp::from_secs(9),
    };
    let rows: Vec<(Body, &[&str])> = vec![
        (entered(false, false).into(), &["ContainerEntered"]),
        (entered(true, false).into(), &["RootExec"]),
        (entered(true, true).into(), &["PrivilegedExec"]),
        (entered(false, true).into(), &["PrivilegedExec"]),
        (ProcessEntered { declared: "the backup".into(), ..entered(true, false) }.into(), &[]),
        (ProcessEntered { declared: "the backup".into(), ..entered(true, true) }.into(), &["PrivilegedExec"]),
        (ProcessShell { process: process() }.into(), &["ShellInWorkload"]),
        (permissive(true, "0.0.0.0:8443").into(), &["PlaintextAllowed[0.0.0.0:8443]"]),
        (permissive(true, "<b>").into(), &["PlaintextAllowed[other]"]),
        (permissive(false, "0.0.0.0:8443").into(), &[]),
        (
            ConnectionPlaintext {
                listener: "0.0.0.0:8443".into(),
                source: "10.0.0.9:1".into(),
                network: "10.0.0.0/24".into(),
                detail: "began with `GET /`".into(),
                count: 3,
            }
            .into(),
            &["PlaintextLetIn[0.0.0.0:8443]"],
        ),
        (exposed_at("0.0.0.0:80", "").into(), &["ListenerExposed[0.0.0.0:80/tcp]"]),
        (exposed_at("0.0.0.0:80", "old client").into(), &["PlaintextPortOpen[0.0.0.0:80/tcp]"]),
        (exposed_at("<b>", "").into(), &["ListenerExposed[other]"]),
        (InterceptionBroken { why: vec!["no rules".into()] }.into(), &["InterceptionBroken"]),
        (InterceptionHolds { bypass: Vec::new() }.into(), &[]),
        (insecure(true, "db:5432").into(), &["InsecureTrustAll[outbound db:5432]"]),
        (insecure(true, "<b>").into(), &["InsecureTrustAll[outbound other]"]),
        (insecure(false, "db:5432").into(), &[]),
        (LeaderChanged { leader: "a:7443".into(), reached: false, why: "timed out".into() }.into(), &["LeaderLost"]),
        (LeaderChanged { leader: "a:7443".into(), reached: true, why: String::new() }.into(), &[]),
        (given_refused("identity").into(), &["CollectorIdentityRefused[identity]"]),
        (given_refused("page").into(), &["CollectorIdentityRefused[page]"]),
        (given_refused("<b>").into(), &["CollectorIdentityRefused[other]"]),
        (
            CollectorIdentityTaken {
                what: "page".into(),
                name: "x".into(),
                serial: "1".into(),
                not_after_us: Timestamp(9),
            }
            .into(),
            &[],
        ),
        (TrustFilesRefused { error: "x.pem: it is empty".into() }.into(), &["TrustFilesRefused"]),
        (TrustChanged { domains: Default::default(), dns_roots: vec![] }.into(), &[]),
        (
            TrustCrls { strict: true, lists: 1, lacking: vec!["there is none of x".into()] }.into(),
            &["RevocationListsLacking"],
        ),
        (TrustCrls { strict: true, lists: 2, lacking: vec![] }.into(), &[]),
        (started(true).into(), &[]),
        (started(false).into(), &["AgentKilled"]),
        (
            EventsLost { first_seq: 5, last_seq: 9, by_severity: [5, 0, 0, 0], reason: "spool_full".into() }.into(),
            &["EventsLost[spool_full]"],
        ),
        (
            EventsLost { first_seq: 5, last_seq: 9, by_severity: [5, 0, 0, 0], reason: "<b>".into() }.into(),
            &["EventsLost[other]"],
        ),
        (
            QuarantineChanged {
                workload: agent().workload,
                instance: "orders-1".into(),
                gate: "no-root".into(),
                status: GateStatus::DryRun,
                why: "uid 0".into(),
            }
            .into(),
            &["WorkloadQuarantined[no-root]"],
        ),
        (
            QuarantineAlone { gate: "policy".into(), on: true, why: "it cannot be read".into() }.into(),
            &["QuarantinedAlone[policy]"],
        ),
        (
            PolicyApplied {
                version: 2,
                directive: 3,
                hash: Sha256::of(&[]),
                why: "audit".into(),
                by: "ops".into(),
                source: "10.0.0.1:1".into(),
                restores: None,
            }
            .into(),
            &["PolicyChanged[policy]"],
        ),
        (SpoolDamaged { quarantined: "/x".into(), bytes: 9, detail: "crc".into() }.into(), &["SpoolDamaged"]),
        (
            EnrolmentRefused {
                source: "10.0.0.9:1".into(),
                workload: "spiffe://x.test/a/b".into(),
                reason: "token_used_up: 1 of 1".into(),
                count: 1,
            }
            .into(),
            &["EnrolmentRefused[token_used_up]"],
        ),
        (
            IngestRefused { source: "10.0.0.9:1".into(), reason: "garbage".into(), count: 1 }.into(),
            &["IngestRefused[garbage]"],
        ),
        (
            VerdictChanged {
                before: "pass".into(),
                finding: a_finding("docker-socket", Severity::Critical, Verdict::Fail),
            }
            .into(),
            &["CheckFailed[docker-socket]"],
        ),
        (
            VerdictChanged { before: "pass".into(), finding: a_finding("ulimits", Severity::Notice, Verdict::Fail) }
                .into(),
            &[],
        ),
    ];
    for (body, expected) in rows {
        assert_eq!(raised(body.clone()), expected, "{body:?}");
    }
}

#[test]
fn a_refusal_at_the_event_port_is_as_bad_as_the_collector_says_and_says_what_to_do_about_it() {
    let rows = [
        ("chain_broken: x", Severity::Critical, "keep its disk"),
        ("wrong_instance: x", Severity::Critical, "sidewarden-collector revoke --instance"),
        ("second_instance: x", Severity::Critical, "sidewarden-collector revoke --instance"),
        ("not_issued_here: x", Severity::Critical, "sidewarden-collector revoke --instance"),
        ("limit_reached: x", Severity::Warning, "agents.max_connections"),
        ("plaintext: x", Severity::Warning, "find it by its address"),
    ];
    for (reason, severity, way_out) in rows {
        let body = IngestRefused { source: "10.0.0.9:1".into(), reason: reason.into(), count: 1 };
        let signals = read_as(severity, &body.into());
        let [(_, Signal::Raise(case))] = &signals[..] else { panic!("{signals:?}") };
        assert_eq!(case.severity, Some(severity), "{reason}");
        assert!(case.what_to_do.contains(way_out), "{reason}: {}", case.what_to_do);
    }
}

fn exposed_at(address: &str, reason: &str) -> ListenerExposed {
    ListenerExposed {
        address: address.into(),
        detail: String::new(),
        protocol: Protocol::Tcp,
        owner: String::new(),
        reason: reason.into(),
    }
}

#[test]
fn an_exposed_listener_stands_until_it_is_closed_or_a_baseline_does_not_name_it() {
    let subject = Subject::from(&agent());
    let place = || Some("0.0.0.0:80/tcp".to_owned());
    let closed = ListenerClosed { address: "0.0.0.0:80".into(), protocol: Protocol::Tcp, detail: String::new() };
    let signals = read(1, 1, None, &closed.into());
    let clear = Signal::Clear(Some(subject.clone()), place());
    assert_eq!(signals, [("ListenerExposed", clear.clone()), ("PlaintextPortOpen", clear.clone())]);
    let baseline = ListenersBaseline { exposed: vec!["0.0.0.0:80/tcp".into()], declared: vec!["[::]:53/udp".into()] };
    let signals = read(1, 1, None, &baseline.into());
    let only = |listener: &str| Signal::Only(subject.clone(), vec![listener.into()]);
    let expected = [("ListenerExposed", only("0.0.0.0:80/tcp")), ("PlaintextPortOpen", only("[::]:53/udp"))];
    assert_eq!(signals, expected);
    let signals = read(1, 1, None, &exposed_at("0.0.0.0:80", "now declared").into());
    assert_eq!(signals[0], ("ListenerExposed", clear));
}

#[test]
fn a_failed_check_takes_the_severity_of_its_finding_and_carries_its_remedy() {
    let body = VerdictChanged {
        before: "pass".into(),
        finding: a_finding("docker-socket", Severity::Critical, Verdict::Fail),
    };
    let signals = read(1, 1, None, &body.into());
    let (_, Signal::Raise(case)) = &signals[0] else { panic!("{signals:?}") };
    assert_eq!(case.severity, Some(Severity::Critical));
    assert_eq!(case.what_to_do, "compose: remove the volume");
    assert!(case.what.contains("CIS 5.31") && case.what.contains("/run/docker.sock"), "{}", case.what);
}

#[test]
fn plaintext_that_is_let_in_no_longer_ends_its_alert_and_so_does_a_start() {
    let until_us = Timestamp::from_secs(9);
    let off = ListenerPermissive { listener: "0.0.0.0:8443".into(), on: false, reason: String::new(), until_us };
    let clear =
        |apart: Option<&str>| ("PlaintextAllowed", Signal::Clear(Some((&agent()).into()), apart.map(str::to_owned)));
    assert_eq!(read(1, 1, None, &off.into()), vec![clear(Some("0.0.0.0:8443"))]);
    let (version, mode, vantage) = ("1".into(), Mode::Sidecar, Vantage::Open);
    let started = AgentStarted { version, mode, vantage, clean: true, heartbeat_secs: 5 };
    assert!(read(1, 1, None, &started.into()).contains(&clear(None)));
}

#[test]
fn a_verdict_of_unknown_neither_begins_nor_ends_an_alert() {
    let unknown = Verdict::Unknown { grant: "CAP_SYS_PTRACE".into() };
    let rows = [(Verdict::Pass, true), (unknown, false), (Verdict::NotApplicable { why: "x".into() }, true)];
    for (verdict, ends) in rows {
        let finding = a_finding("docker-socket", Severity::Critical, verdict.clone());
        let signals = read(1, 1, None, &VerdictChanged { before: "fail".into(), finding }.into());
        let cleared = signals.iter().any(|(_, s)| matches!(s, Signal::Clear(..)));
        assert_eq!(cleared, ends, "{verdict}");
        assert!(!signals.iter().any(|(_, s)| matches!(s, Signal::Raise(..))), "{verdict}");
    }
}

#[test]
fn a_clean_goodbye_ends_everything_and_a_lost_connection_raises_silence() {
    let gone = |clean| AgentDisconnected {
        workload: agent().workload,
        instance: "orders-1".into(),
        reason: "timed out".into(),
        clean,
    };
    assert_eq!(read(1, 1, None, &gone(true).into()), vec![(SILENT, Signal::Gone((&agent()).into()))]);
    assert_eq!(raised(gone(false)), ["AgentSilent"]);
}

#[test]
fn clocks_that_jump_are_told() {
    let tick = Body::from(ClockTick {});
    let rows = [
        (None, 100, false),
        (Some(90), 100, false),
        (Some(100), 200, true),
        (Some(100), 50, true),
        (Some(100), 100, false),
    ];
    for (before, at, expected) in rows {
        assert_eq!(!read(at, at, before, &tick).is_empty(), expected, "{before:?} -> {at}");
    }
    let baseline = Body::from(PostureBaseline::default());
    let ahead = |at| read(at, 1000, None, &baseline).iter().any(|(name, _)| *name == "AgentClock");
    assert!(ahead(1000 + 3600) && !ahead(1000 + 60) && !ahead(10));
}

#[test]
fn an_expiring_certificate_is_due_at_the_last_third_and_tenth() {
    let body = CertificateIssued {
        workload: agent().workload,
        instance: "orders-1".into(),
        serial: "01".into(),
        spki: String::new(),
        not_after_us: Timestamp::from_secs(500),
        by: "token".into(),
    };
    let body = CertificateIssued { not_after_us: Timestamp::from_secs(400), ..body };
    assert_eq!(dues(&read(100, 100, None, &body.into())), [("CertificateExpiring", 300), ("CertificateEnding", 370)]);
}

#[test]
fn a_certificate_that_an_agent_shows_is_due_by_its_own_life_whoever_issued_it() {
    let certificate = ShownCertificate {
        serial: "01".into(),
        spki: String::new(),
        not_before_us: Timestamp::from_secs(100),
        not_after_us: Timestamp::from_secs(400),
        elsewhere: true,
    };
    let body = AgentConnected {
        workload: agent().workload,
        instance: "orders-1".into(),
        source: String::new(),
        transport: "quic".into(),
        version: String::new(),
        clock_ahead_us: 0,
        mode: String::new(),
        certificate: Some(certificate),
    };
    let signals = read(250, 250, None, &body.into());
    let expected = [("CertificateExpiring", 325), ("CertificateEnding", 370)];
    assert_eq!(dues(&signals), expected, "it came in the middle of it; many renew at a third");
    let Some((_, Signal::Raise(case))) = signals.iter().find(|(name, _)| *name == "CertificateEnding") else {
        panic!()
    };
    assert!(case.evidence.iter().any(|line| line.contains("somebody else's CA")), "{case:?}");
}

#[test]
fn what_is_taken_ends_the_alert_of_its_own_kind() {
    let body = CollectorIdentityTaken {
        what: "page".into(),
        name: "x".into(),
        serial: "1".into(),
        not_after_us: Timestamp(9),
    };
    let signals = read(1, 1, None, &body.into());
    let cleared = signals.iter().filter_map(|(name, signal)| match signal {
        Signal::Clear(_, apart) => Some((*name, apart.clone())),
        _ => None,
    });
    assert_eq!(cleared.collect::<Vec<_>>(), [("CollectorIdentityRefused", Some("page".to_owned()))]);
}

#[test]
fn a_collector_that_starts_tells_anew_what_it_lacks() {
    let signals = read(1, 1, None, &CollectorStarted { version: "1".into(), first: false }.into());
    let clear = Signal::Clear(Some((&agent()).into()), None);
    assert_eq!(signals, [("CollectorIdentityRefused", clear.clone()), ("LeaderLost", clear)]);
}

fn given_refused(what: &str) -> CollectorIdentityRefused {
    CollectorIdentityRefused { what: what.into(), error: "tls.crt: none".into(), in_use_until_us: None }
}

fn dues(signals: &[(&'static str, Signal)]) -> Vec<(&'static str, i64)> {
    let due = |(name, signal): &(&'static str, Signal)| match signal {
        Signal::Raise(Case { due: Some(due), .. }) => Some((*name, due.as_secs())),
        _ => None,
    };
    signals.iter().filter_map(due).collect()
}

#[test]
fn of_each_kind_of_ca_certificate_the_first_to_end_is_told() {
    let one = |what: &str, name: &str, until| CaCertificate {
        what: what.into(),
        name: name.into(),
        not_before_us: Timestamp::from_secs(0),
        not_after_us: Timestamp::from_secs(until),
    };
    let certificates =
        vec![one("root", "1", 3000), one("root", "2", 6000), one("collector", "", 300), one("odd", "", 9)];
    let signals = read(0, 0, None, &CaCertificates { certificates }.into());
    let expected = [("CaExpiring", 2000), ("CaExpiring", 200), ("CaEnding", 2700), ("CaEnding", 270)];
    assert_eq!(dues(&signals), expected);
    let gone = |what: &str| Signal::Clear(None, Some(what.into()));
    assert_eq!(signals.iter().filter(|(_, signal)| *signal == gone("page")).count(), 2, "what is gone alerts no more");
}

#[test]
fn a_clock_that_is_off_at_the_handshake_is_told_either_way() {
    for (ahead_secs, told) in
        [(0, None), (60, None), (-60, None), (90_000, Some("ahead of")), (-90_000, Some("behind"))]
    {
        let body = AgentConnected {
            workload: agent().workload,
            instance: "orders-1".into(),
            source: "10.0.0.1:1".into(),
            transport: "quic".into(),
            version: String::new(),
            clock_ahead_us: ahead_secs * 1_000_000,
            mode: String::new(),
            certificate: None,
        };
        let signals = read(100, 100, None, &body.into());
        let what = signals.iter().find_map(|(name, signal)| match signal {
            Signal::Raise(case) if *name == "AgentClock" => Some(case.what.clone()),
            _ => None,
        });
        assert_eq!(what.is_some(), told.is_some(), "{ahead_secs}");
        assert!(what.zip(told).is_none_or(|(what, word)| what.contains(word)), "{ahead_secs}");
    }
}

#[test]
fn a_kind_from_the_future_alerts_only_when_it_is_serious() {
    let agent = agent();
    for (severity, expected) in [(Severity::Notice, 0), (Severity::Critical, 1)] {
        let seen = Seen {
            agent: &agent,
            at: Timestamp(0),
            received: Timestamp(0),
            kind: "weather.changed",
            severity,
            summary: "hail",
            body: None,
            last_tick: None,
            forged: false,
        };
        let raised = RULES.iter().filter(|r| r.reads(seen.kind, false)).flat_map(|r| r.read(&seen)).count();
        assert_eq!(raised, expected, "{severity}");
    }
}

#[test]
fn no_label_comes_from_outside_unchecked() {
    assert_eq!(word("docker-socket"), "docker-socket");
    assert_eq!(word("<script>"), "other");
    assert_eq!(word(&"x".repeat(65)), "other");
    assert_eq!(word(""), "other");
    assert_eq!(host_of("[fe80::1]:80"), "[fe80::1]");
    assert_eq!(short("äöü", 2), "äö…");
}

#[test]
fn what_to_do_names_a_way_that_there_is() {
    let rows = [
        ("ContainerEntered", "`watch.healthchecks`"),
        ("PolicyChanged", "remove <data_dir>/admin.token and restart"),
        ("IdentityRevoked", "remove <data_dir>/admin.token and restart"),
        ("CaExpiring", "`sidewarden-collector ca prepare`"),
        ("CaEnding", "`sidewarden-collector ca prepare`"),
        ("EnrolmentRefused", "the reason says"),
        ("ForgedEvent", "`sidewarden-collector revoke --instance WORKLOAD#INSTANCE`"),
        ("EventsLost", "`limits.spool`"),
    ];
    for (name, way_out) in rows {
        let what_to_do = by_name(name).unwrap().what_to_do;
        assert!(what_to_do.contains(way_out), "{name}: {what_to_do}");
    }
    for (reason, way_out) in [("spool_full", "limits.spool"), ("damaged", "disk"), ("collector_rewound", "data_dir")] {
        let lost = EventsLost { first_seq: 5, last_seq: 9, by_severity: [5, 0, 0, 0], reason: reason.into() };
        let signals = read(1, 1, None, &lost.into());
        let [(_, Signal::Raise(case))] = &signals[..] else { panic!("{signals:?}") };
        assert!(case.what_to_do.contains(way_out), "{reason}: {}", case.what_to_do);
    }
}

#[test]
fn whatever_only_the_collector_may_tell_is_forged_if_somebody_else_does() {
    let forged = by_name(FORGED).unwrap();
    for kind in KINDS.iter().filter(|kind| state::is_of_the_collector(kind)) {
        assert!(forged.reads(kind, true), "{kind}");
    }
}

#[test]
fn every_rule_is_named_once_and_explained() {
    for (i, rule) in RULES.iter().enumerate() {
        assert!(!RULES[..i].iter().any(|other| other.name == rule.name), "{} twice", rule.name);
        assert!(rule.meaning.len() > 20 && rule.what_to_do.len() > 20, "{}", rule.name);
        assert!(rule.kinds.iter().all(|kind| KINDS.contains(kind)), "{} reads an unknown kind", rule.name);
    }
}
