use sidewarden_proto::event::ContainerRef;
use sidewarden_proto::evidence::Pledge;
use sidewarden_proto::finding::{Finding, Vantage};

use super::*;
use crate::state::{Session, Standing};

const AT: Timestamp = Timestamp::from_secs(1_000_000);

fn standing(check: &str, id: &str, verdict: Verdict) -> (String, Standing) {
    let finding = Finding {
        check: check.into(),
        ids: CisIds { v1_3_1: id.into(), v1_6: format!("{id}0") },
        title: format!("<b>{check}</b> is kept"),
        severity: Severity::Warning,
        verdict,
        evidence: vec![Evidence::new("=cmd", "</td><script>alert(1)</script>\u{1b}[2J\"'")],
        remedy: Remedy { compose: "a: <b>\nc: d".into(), ..Remedy::default() },
        vantage: Vantage::Open,
    };
    (check.into(), Standing { finding, since: Timestamp(1) })
}

fn live() -> Session {
    Session::Live { since: Timestamp(0), source: String::new(), transport: String::new() }
}

fn agent(findings: Vec<(String, Standing)>) -> Agent {
    Agent { findings: findings.into_iter().collect(), session: live(), ..Agent::default() }
}

fn unknown() -> Verdict {
    Verdict::Unknown { grant: "a node agent".into() }
}

/// Two of shop/web, one of them with a node agent's word; a container without an agent; one that has ended.
fn state() -> State {
    let mut state = State::default();
    let web = |memory| {
        agent(vec![
            standing("user", "4.1", Verdict::Pass),
            standing("memory-limit", "5.10", memory),
            standing("host-network", "5.9", Verdict::Fail),
            standing("swarm-off", "7.1", unknown()),
        ])
    };
    let one = Agent { host: "h".into(), containers: vec!["c1".into()], ..web(unknown()) };
    state.agents.insert("spiffe://x/shop/web#1".parse().unwrap(), one);
    state.agents.insert("spiffe://x/shop/web#2".parse().unwrap(), web(Verdict::Fail));
    let hosted = |id: &str, name: &str, verdict| Hosted {
        container: ContainerRef {
            id: id.into(),
            name: name.into(),
            image: "db:1".into(),
            state: "running".into(),
            ..ContainerRef::default()
        },
        findings: [standing("memory-limit", "5.10", verdict)].into(),
    };
    let swarm = Verdict::NotApplicable { why: NO_SWARM.into() };
    let mut node = agent(vec![standing("swarm-off", "7.1", swarm)]);
    node.mode = Some(Mode::Node);
    node.host = "h".into();
    node.hosted =
        [("c1".into(), hosted("c1", "web", Verdict::Pass)), ("c2".into(), hosted("c2", "db", Verdict::Fail))].into();
    for hosted in node.hosted.values_mut() {
        hosted.findings.values_mut().for_each(|standing| standing.finding.vantage = Vantage::Node);
    }
    node.findings.values_mut().for_each(|standing| standing.finding.vantage = Vantage::Node);
    state.agents.insert("spiffe://x/hosts/a#h".parse().unwrap(), node);
    let ended = Session::Ended { at: AT, reason: "bye".into(), clean: true };
    let gone = Agent { session: ended, ..agent(vec![standing("user", "4.1", Verdict::Fail)]) };
    state.agents.insert("spiffe://x/shop/old#1".parse().unwrap(), gone);
    state
}

fn made() -> Made<'static> {
    Made { trust_domain: "x", numbering: Numbering::V1_3_1, at: AT, now: AT }
}

fn evidence() -> crate::evidence::Config {
    crate::config::Config::default().evidence
}

fn scope(workloads: &str) -> Scope {
    Scope { workloads: workloads.parse().unwrap(), instance: None }
}

fn table_of(report: &Report) -> Vec<(&str, &str, usize)> {
    report.table.iter().map(|row| (row.reference.as_str(), row.status.as_str(), row.count)).collect()
}

#[test]
fn the_table_of_the_fleet_shows_the_worst_of_each_check_and_whose_it_is() {
    let report = report(&state(), &evidence(), &scope("*"), &made(), &[]);
    let expected =
        [("4.1", "PASS", 2), ("5.9", "FAIL", 2), ("5.10", "FAIL", 2), ("7.1", "UNKNOWN (to know: a node agent)", 1)];
    assert_eq!(table_of(&report), expected);
    assert_eq!(report.table[2].whose, ["hosts/a#h/db", "shop/web#2"]);
    let names: Vec<_> = report.subjects.iter().map(|s| (s.name.as_str(), s.kind)).collect();
    assert_eq!(
        names,
        [("hosts/a#h", "host"), ("hosts/a#h/db", "container"), ("shop/web#1", "instance"), ("shop/web#2", "instance")]
    );
}

#[test]
fn an_instance_has_its_hosts_word_and_a_swarm_that_is_off_is_a_pass_to_auditors() {
    let scope = Scope { instance: Some("1".into()), ..scope("shop/web") };
    let report = report(&state(), &evidence(), &scope, &made(), &[]);
    let expected =
        [("4.1", "PASS", 1), ("5.9", "FAIL", 1), ("5.10", "PASS", 1), ("7.1", "PASS (swarm mode not enabled)", 1)];
    assert_eq!(table_of(&report), expected);
    assert_eq!(report.subjects[0].rows[3].verdict, "not_applicable");
}

#[test]
fn what_is_waived_or_unknown_is_no_pass_in_the_score() {
    let mut state = state();
    let report_of = |state: &State| report(state, &evidence(), &scope("shop/web"), &made(), &[]);
    assert_eq!(report_of(&state).score, Some(42.9), "three of seven");
    state.waivers.push(Pledge {
        check: "host-network".into(),
        workload: "shop/*".into(),
        container: None,
        by: "ops".into(),
        why: "it must".into(),
        at_us: Timestamp(0),
        until_us: AT.plus(std::time::Duration::from_secs(1)),
        source: String::new(),
        key: String::new(),
    });
    let waived = report_of(&state);
    assert_eq!((waived.score, waived.counts["waived"]), (Some(42.9), 2));
    assert_eq!(waived.table[1].status, "FAIL (waived by ops until 1970-01-12T13:46:41.000Z)");
}

#[test]
fn the_other_numbering_changes_references_and_their_order() {
    let made = Made { numbering: Numbering::V1_6, ..made() };
    let report = report(&state(), &evidence(), &scope("shop/web"), &made, &[]);
    let references: Vec<_> = report.table.iter().map(|row| row.reference.as_str()).collect();
    assert_eq!(references, ["4.10", "5.90", "5.100", "7.10"]);
}

#[test]
fn a_difference_has_what_changed_what_came_and_what_went() {
    let (before, mut state) = (state(), state());
    state.agents.remove(&"spiffe://x/hosts/a#h".parse().unwrap());
    let mended = standing("host-network", "5.9", Verdict::Pass).1;
    state
        .agents
        .get_mut(&"spiffe://x/shop/web#2".parse().unwrap())
        .unwrap()
        .findings
        .insert("host-network".into(), mended);
    let of = |state: &State| report(state, &evidence(), &scope("*"), &made(), &[]);
    let difference = difference(of(&before), of(&state));
    let told: Vec<_> = difference
        .changes
        .iter()
        .map(|c| (c.subject.as_str(), c.check.as_str(), c.before.as_str(), c.after.as_str()))
        .collect();
    assert_eq!(
        told,
        [
            ("hosts/a#h", "swarm-off", "PASS (swarm mode not enabled)", ""),
            ("hosts/a#h/db", "memory-limit", "FAIL", ""),
            ("shop/web#1", "memory-limit", "PASS", "UNKNOWN (to know: a node agent)"),
            ("shop/web#1", "swarm-off", "PASS (swarm mode not enabled)", "UNKNOWN (to know: a node agent)"),
            ("shop/web#2", "host-network", "FAIL", "PASS"),
        ]
    );
    assert!(text(&difference.after.clone(), Some(&difference)).contains("5 verdicts changed since"));
    let page = html(&difference.after.clone(), Some(&difference));
    for (told, class) in [("", "unknown"), ("UNKNOWN (to know: a node agent)", "unknown"), ("PASS", "pass")] {
        assert!(page.contains(&format!("<td class=\"{class}\">{told}</td>")), "{told}: {page}");
    }
    assert_eq!(csv(&difference.after.clone(), Some(&difference)).lines().count(), 6);
}

#[test]
fn nothing_from_a_workload_is_obeyed_by_a_browser_a_spreadsheet_or_a_terminal() {
    let report = report(&state(), &evidence(), &scope("*"), &made(), &["spiffe://x/shop/lost#1".parse().unwrap()]);
    let page = html(&report, None);
    assert!(!page.contains("<script") && !page.contains("<b>user"), "{page}");
    assert!(page.contains("&lt;/td&gt;&lt;script&gt;alert(1)"), "{page}");
    assert!(page.contains("default-src 'none'") && page.contains("@media print"));
    assert_eq!(page.matches("<tr>").count(), page.matches("</tr>").count());
    for told in [page, text(&report, None), csv(&report, None)] {
        assert!(!told.contains('\u{1b}') && told.contains("host-network"), "{told}");
    }
    assert!(csv(&report, None).contains(r#""'=cmd: </td>"#));
    assert!(text(&report, None).contains("Not known: shop/lost#1"));
}

#[test]
fn a_container_whose_own_agent_was_stopped_is_told_of_by_its_node_agent() {
    let mut state = state();
    let subjects = |state: &State| {
        let report = report(state, &evidence(), &scope("*"), &made(), &[]);
        report.subjects.iter().map(|subject| subject.name.clone()).collect::<Vec<_>>()
    };
    let beside = state.agents.get_mut(&"spiffe://x/shop/web#1".parse().unwrap()).unwrap();
    beside.session = Session::Ended { at: AT, reason: "bye".into(), clean: true };
    assert_eq!(subjects(&state), ["hosts/a#h", "hosts/a#h/web", "hosts/a#h/db", "shop/web#2"]);
}

#[test]
fn what_is_not_listed_in_a_large_report_is_told_of_and_never_as_if_nothing_failed() {
    let mut state = State::default();
    for n in 0..=MAX_DETAILED {
        let findings = vec![standing("user", "4.1", Verdict::Fail), standing("host-network", "5.9", Verdict::Pass)];
        state.agents.insert(format!("spiffe://x/shop/web#{n:05}").parse().unwrap(), agent(findings));
    }
    let report = report(&state, &evidence(), &scope("*"), &made(), &[]);
    assert_eq!(report.table[0].count, MAX_DETAILED + 1, "the table has them all");
    for told in [text(&report, None), csv(&report, None), html(&report, None)] {
        assert!(!told.contains("nothing fails"));
        assert_eq!(told.matches("1 fail, 1 pass; too many to list here: ask for shop/web alone").count(), 1);
    }
}

#[test]
fn a_report_on_nobody_says_so() {
    let report = report(&State::default(), &evidence(), &scope("*"), &made(), &[]);
    assert!(text(&report, None).contains("nothing is known: 0 pass"));
    assert_eq!((report.score, report.table.len()), (None, 0));
}
