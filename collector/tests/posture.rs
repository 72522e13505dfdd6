//! What people answer for, and reports: over the API of a whole collector.

mod scene;

use std::time::Duration;

use scene::{Agent, ask, client, event, finding, read, start, start_in, token, until};
use serde_json::{Value, json};
use sidewarden_collector::app::App;
use sidewarden_proto::event::*;
use sidewarden_proto::finding::{Vantage, Verdict};
use sidewarden_proto::time::Timestamp;

const WEB: &str = "spiffe://sidewarden.internal/shop/web";

async fn tell(app: &App, path: &str, body: Value) -> (u16, Value) {
    let url = format!("https://127.0.0.1:{}{path}", app.api.port());
    let request = client(app).post(url).bearer_auth(token(app)).header("content-type", "application/json");
    let answer = request.body(body.to_string()).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap_or_default())
}

fn judged(verdict: Verdict) -> sidewarden_proto::finding::Finding {
    finding("read-only-root", "5.12", "the root is read-only", Severity::Warning, verdict, "overlay / rw")
}

/// shop/web, connected, which breaks one rule.
async fn web(app: &App) -> Agent {
    let mut web = Agent::new("shop/web#web-1");
    web.connect(app, Mode::Sidecar, Vantage::Open).await;
    let user = finding("user", "4.1", "no root", Severity::Warning, Verdict::Pass, "Uid: 10001");
    let baseline = PostureBaseline { findings: vec![judged(Verdict::Fail), user], ..Default::default() };
    web.send(app, vec![event(Severity::Warning, "posture", baseline)]).await;
    web
}

/// Waits until the alert of that name about shop/web stands so.
async fn alert(app: &App, name: &str, status: &str) {
    until(&format!("{name} {status}"), async || {
        let told = ask(app, "/api/v1/alerts").await;
        let found = told["alerts"]
            .as_array()
            .unwrap()
            .iter()
            .any(|alert| alert["alert"] == name && alert["labels"]["workload"] == WEB && alert["status"] == status);
        found.then_some(())
    })
    .await;
}

async fn verdict(app: &App) -> Value {
    let posture = ask(app, &format!("/api/v1/posture?workload={WEB}")).await;
    let findings = posture["instances"][0]["findings"].as_array().unwrap();
    findings.iter().find(|finding| finding["check"] == "read-only-root").unwrap().clone()
}

fn waiver(until_us: Timestamp) -> Value {
    json!({"check": "read-only-root", "workload": "shop/*", "why": "the vendor writes to /opt", "by": "jane", "until_us": until_us})
}

fn soon(secs: u64) -> Timestamp {
    Timestamp::now().plus(Duration::from_secs(secs))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waived_failure_alerts_no_more_is_shown_as_one_and_comes_back_when_it_is_waived_no_longer() {
    let scene = start("").await;
    web(&scene.app).await;
    alert(&scene.app, "CheckFailed", "firing").await;
    let (status, answer) = tell(&scene.app, "/api/v1/waivers/set", waiver(soon(40 * 86_400))).await;
    assert_eq!((status, answer["notes"].as_array().map(Vec::len)), (200, Some(0)), "{answer}");
    alert(&scene.app, "CheckFailed", "resolved").await;
    let shown = verdict(&scene.app).await;
    assert_eq!((shown["verdict"].as_str(), shown["by"].as_str()), (Some("waived"), Some("jane")));
    assert_eq!(shown["evidence"][0]["source"], "waiver");
    assert_eq!(shown["evidence"][1]["line"], "overlay / rw");
    let list = ask(&scene.app, "/api/v1/waivers").await;
    assert_eq!(
        (list["waivers"][0]["covers"].as_u64(), list["waivers"][0]["in_force"].as_bool()),
        (Some(1), Some(true))
    );
    let url = format!("http://127.0.0.1:{}/metrics", scene.app.metrics.port());
    let metrics = client(&scene.app).get(url).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    for line in [
        "sidewarden_collector_findings{check=\"read-only-root\",verdict=\"waived\"} 1",
        "sidewarden_collector_findings{check=\"read-only-root\",verdict=\"fail\"} 0",
        "sidewarden_collector_waivers{state=\"in_force\"} 1",
    ] {
        assert!(metrics.contains(line), "{line} is missing in {metrics}");
    }
    // It outlives the collector, and so does the silence about what it covers.
    let scene::Scene { app, dir } = scene;
    app.stop().await;
    let app = start_in(dir.path(), "").await;
    assert_eq!(verdict(&app).await["verdict"], "waived");
    let mut remove = waiver(Timestamp(0));
    remove.as_object_mut().unwrap().remove("until_us");
    assert_eq!(tell(&app, "/api/v1/waivers/remove", remove.clone()).await.0, 200);
    assert_eq!(tell(&app, "/api/v1/waivers/remove", remove).await.0, 404);
    assert_eq!(verdict(&app).await["verdict"], "fail");
    let told = ask(&app, "/api/v1/events?kind=waiver.set,waiver.removed").await;
    assert_eq!(told["events"].as_array().unwrap().len(), 2);
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiver_that_ends_is_told_of_before_and_is_a_failure_after() {
    let scene = start("").await;
    web(&scene.app).await;
    alert(&scene.app, "CheckFailed", "firing").await;
    assert_eq!(tell(&scene.app, "/api/v1/waivers/set", waiver(soon(86_400))).await.0, 200);
    alert(&scene.app, "CheckFailed", "resolved").await;
    alert(&scene.app, "WaiverEnding", "firing").await;
    // The same again, with an end that comes at once.
    assert_eq!(tell(&scene.app, "/api/v1/waivers/set", waiver(soon(6))).await.0, 200);
    alert(&scene.app, "CheckFailed", "firing").await;
    alert(&scene.app, "WaiverEnding", "resolved").await;
    let shown = verdict(&scene.app).await;
    assert_eq!(shown["verdict"], "fail");
    assert!(shown["evidence"][0]["line"].as_str().unwrap().starts_with("no longer waived"), "{shown}");
    let list = ask(&scene.app, "/api/v1/waivers").await;
    assert_eq!((list["waivers"].as_array().unwrap().len(), list["waivers"][0]["in_force"].as_bool()), (1, Some(false)));
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiver_that_says_too_little_or_holds_too_long_is_refused() {
    let scene = start("").await;
    let with = |key: &str, value: Value| {
        let mut body = waiver(soon(60));
        body[key] = value;
        body
    };
    for (body, expected) in [
        (with("why", json!(" ")), "reason"),
        (with("check", json!("Read Only")), "check"),
        (with("workload", json!("../x")), "workload"),
        (with("container", json!("")), "container"),
        (with("until_us", json!(1)), "cannot end"),
        (with("until_us", json!(soon(367 * 86_400))), "cannot end"),
        (with("by", json!("a\nb")), "by"),
        (with("untl", json!(1)), "untl"),
    ] {
        let (status, answer) = tell(&scene.app, "/api/v1/waivers/set", body).await;
        assert_eq!(status, 400, "{expected}: {answer}");
        assert!(answer["error"].as_str().unwrap().contains(expected), "{expected}: {answer}");
    }
    let (status, answer) = tell(&scene.app, "/api/v1/waivers/set", with("check", json!("read-only-rot"))).await;
    assert_eq!(status, 200);
    assert!(answer["notes"][0].as_str().unwrap().contains("spelt"), "{answer}");
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_cannot_waive_what_it_breaks() {
    let scene = start("").await;
    let mut web = web(&scene.app).await;
    let waiver = serde_json::from_value(json!({"check": "read-only-root", "workload": "*", "by": "web", "why": "x",
                                               "until_us": soon(86_400)}));
    let forged = WaiverSet { waiver: waiver.unwrap(), before: None };
    web.send(&scene.app, vec![event(Severity::Info, "waived", forged)]).await;
    assert_eq!(verdict(&scene.app).await["verdict"], "fail");
    assert_eq!(ask(&scene.app, "/api/v1/waivers").await["waivers"], json!([]));
    alert(&scene.app, "ForgedEvent", "firing").await;
    alert(&scene.app, "CheckFailed", "firing").await;
    scene.app.stop().await;
}

/// A moment after everything so far, and before everything to come.
async fn between() -> Timestamp {
    tokio::time::sleep(Duration::from_millis(5)).await;
    let now = Timestamp::now();
    tokio::time::sleep(Duration::from_millis(5)).await;
    now
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_of_a_past_moment_is_as_it_was_then_waivers_included() {
    let scene = start("").await;
    let before_all = between().await;
    let mut web = web(&scene.app).await;
    let broken = between().await;
    assert_eq!(tell(&scene.app, "/api/v1/waivers/set", waiver(soon(86_400))).await.0, 200);
    let waived = between().await;
    let mut remove = waiver(Timestamp(0));
    remove.as_object_mut().unwrap().remove("until_us");
    assert_eq!(tell(&scene.app, "/api/v1/waivers/remove", remove).await.0, 200);
    let changed = VerdictChanged { before: "fail".into(), finding: judged(Verdict::Pass) };
    web.send(&scene.app, vec![event(Severity::Notice, "mended", changed)]).await;
    let mended = between().await;
    web.disconnect(&scene.app, true).await;
    let gone = between().await;

    let status = async |at: Timestamp| {
        let report = ask(&scene.app, &format!("/api/v1/report?workload=shop/web&at={}", at.0)).await;
        let rows = report["table"].as_array().unwrap();
        let row = rows.iter().find(|row| row["check"] == "read-only-root");
        row.map_or_else(String::new, |row| row["status"].as_str().unwrap().to_owned())
    };
    assert_eq!(status(before_all).await, "");
    assert_eq!(status(broken).await, "FAIL");
    assert!(status(waived).await.starts_with("FAIL (waived by jane until"), "{}", status(waived).await);
    assert_eq!(status(mended).await, "PASS");
    assert_eq!(status(gone).await, "");
    let difference = ask(&scene.app, &format!("/api/v1/report?at={}&since={}", mended.0, broken.0)).await;
    let change = &difference["changes"][0];
    assert_eq!((change["before"].as_str(), change["after"].as_str()), (Some("FAIL"), Some("PASS")));
    assert_eq!(difference["changes"].as_array().unwrap().len(), 1);
    let history =
        ask(&scene.app, &format!("/api/v1/report/history?since={}&until={}&points=2", broken.0, mended.0)).await;
    assert_eq!(
        (history["points"][0]["score"].as_f64(), history["points"][1]["score"].as_f64()),
        (Some(50.0), Some(100.0))
    );
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_past_moment_has_the_containers_that_were_there_then() {
    let scene = start("").await;
    let mut node = Agent::new("hosts/a#h1");
    node.connect(&scene.app, Mode::Node, Vantage::Node).await;
    let container = |name: &str| ContainerRef { id: name.repeat(8), name: name.into(), ..ContainerRef::default() };
    let posture = |name: &str, verdict| {
        let body = ContainerPosture { container: container(name), host: "h".into(), findings: vec![judged(verdict)] };
        event(Severity::Info, "a container", body)
    };
    let own = PostureBaseline { findings: vec![], host: "h".into(), containers: vec![] };
    node.send(&scene.app, vec![event(Severity::Info, "host", own)]).await;
    node.send(&scene.app, vec![posture("web", Verdict::Fail), posture("db", Verdict::Pass)]).await;
    let two = between().await;
    let changed =
        ContainerVerdictChanged { container: container("db"), before: "pass".into(), finding: judged(Verdict::Fail) };
    let gone = ContainerGone { container: container("web") };
    node.send(&scene.app, vec![event(Severity::Warning, "x", changed), event(Severity::Info, "gone", gone)]).await;
    let one = between().await;
    node.connect(&scene.app, Mode::Node, Vantage::Node).await;
    let none = between().await;
    let named = async |at: Timestamp| {
        let report = ask(&scene.app, &format!("/api/v1/report?at={}", at.0)).await;
        let subjects = report["subjects"].as_array().unwrap().iter();
        subjects
            .map(|s| format!("{} {}", s["name"].as_str().unwrap(), s["rows"][0]["status"].as_str().unwrap()))
            .collect::<Vec<_>>()
    };
    assert_eq!(named(two).await, ["hosts/a#h1/db PASS", "hosts/a#h1/web FAIL"]);
    assert_eq!(named(one).await, ["hosts/a#h1/db FAIL"]);
    assert_eq!(named(none).await, Vec::<String>::new(), "it tells anew after a start");
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_has_every_form_and_a_wrong_question_an_answer() {
    let scene = start("").await;
    scene::shop(&scene.app).await;
    let text = read(&scene.app, "/api/v1/report?format=text").await;
    assert!(
        text.contains("REFERENCE  DESCRIPTION") && text.contains("5.31") && text.contains("shop/rogue#rogue-1"),
        "{text}"
    );
    let page = read(&scene.app, "/api/v1/report?format=html&workload=shop/rogue").await;
    assert!(page.starts_with("<!doctype html>") && page.contains("docker-socket"), "{page}");
    let csv = read(&scene.app, "/api/v1/report?format=csv&workload=spiffe://sidewarden.internal/shop/web").await;
    let whole = ask(&scene.app, "/api/v1/report").await;
    let brief = ask(&scene.app, "/api/v1/report?detail=table").await;
    assert_eq!((whole["subjects"].as_array().unwrap().len(), &whole["judged"]), (5, &Value::from(5)));
    assert_eq!((brief["subjects"].as_array().unwrap().len(), &brief["judged"]), (0, &Value::from(5)));
    assert_eq!(brief["table"], whole["table"]);
    assert!(csv.lines().count() > 10 && csv.contains("\"shop/web#web-1\",\"instance\",\"4.1\""), "{csv}");
    for (path, expected) in [
        ("/api/v1/report?at=soon", "at is"),
        ("/api/v1/report?at=9999999999999999", "future"),
        ("/api/v1/report?since=5&at=4", "`since`"),
        ("/api/v1/report?format=pdf", "format"),
        ("/api/v1/report?numbering=2", "numbering"),
        ("/api/v1/report?detail=all", "detail"),
        ("/api/v1/report?workload=%2e%2e/x", "workload"),
        ("/api/v1/report?workload=spiffe://other/x", "trust domain"),
        ("/api/v1/report/history?points=1", "span of time"),
    ] {
        let url = format!("https://127.0.0.1:{}{path}", scene.app.api.port());
        let answer = client(&scene.app).get(url).bearer_auth(token(&scene.app)).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 400, "{path}");
        let told: Value = answer.json().await.unwrap();
        assert!(told["error"].as_str().unwrap().contains(expected), "{path}: {told}");
    }
    scene.app.stop().await;
}

/// `cargo test --release -p sidewarden-collector --test posture -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "not a test: a measurement of what a past moment costs"]
async fn the_posture_of_a_past_moment_takes_so_long() {
    const AGENTS: usize = 1_000;
    let scene = start("").await;
    let checks: Vec<String> = (1..=53).map(|n| format!("check-{n}")).collect();
    let one =
        |n: usize, verdict| finding(&checks[n], &format!("5.{n}"), "a title", Severity::Warning, verdict, "evidence");
    let mut agents: Vec<Agent> = (0..AGENTS).map(|n| Agent::new(&format!("shop/s{n}#1"))).collect();
    for agent in &mut agents {
        agent.connect(&scene.app, Mode::Sidecar, Vantage::Open).await;
        let findings = (0..53).map(|n| one(n, Verdict::Pass)).collect();
        agent
            .send(
                &scene.app,
                vec![event(Severity::Info, "posture", PostureBaseline { findings, ..Default::default() })],
            )
            .await;
    }
    for round in 0..20 {
        for agent in &mut agents {
            let changed = VerdictChanged { before: "pass".into(), finding: one(round, Verdict::Fail) };
            let mut events = vec![event(Severity::Warning, "changed", changed)];
            events.extend((0..20).map(|n| scene::plaintext(&format!("10.0.0.{n}:1"))));
            agent.send(&scene.app, events).await;
        }
    }
    let (at, url) = (between().await, format!("https://127.0.0.1:{}", scene.app.api.port()));
    let http = client(&scene.app);
    for (what, query) in [("one workload", "workload=shop/s500&"), ("a thousand agents", "")] {
        let mut took = Vec::new();
        for _ in 0..9 {
            let begun = std::time::Instant::now();
            let request = http.get(format!("{url}/api/v1/report?{query}at={}&format=csv", at.0));
            let bytes = request.bearer_auth(token(&scene.app)).send().await.unwrap().bytes().await.unwrap().len();
            took.push((begun.elapsed(), bytes));
        }
        took.sort();
        eprintln!("the table of {what} at a past moment, over HTTPS: {:?}, {} bytes", took[4].0, took[4].1);
    }
    scene.app.stop().await;
}

/// A store that refuses from now on, as a full disk does.
fn store(scene: &scene::Scene, sql: &str) {
    let log = rusqlite::Connection::open(scene.dir.path().join("data/log.db")).unwrap();
    log.busy_timeout(Duration::from_secs(60)).unwrap();
    log.execute_batch(sql).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_told_that_a_waiver_changed_while_the_store_refuses_it() {
    let scene = start("").await;
    web(&scene.app).await;
    assert_eq!(tell(&scene.app, "/api/v1/waivers/set", waiver(soon(86_400))).await.0, 200);
    store(&scene, "CREATE TRIGGER full BEFORE INSERT ON link BEGIN SELECT RAISE(FAIL, 'the disk is full'); END");
    let mut remove = waiver(Timestamp(0));
    remove.as_object_mut().unwrap().remove("until_us");
    let (status, answer) = tell(&scene.app, "/api/v1/waivers/remove", remove).await;
    assert_eq!(status, 503, "{answer}");
    assert!(answer.to_string().contains("has not taken it yet"), "{answer}");
    assert_eq!(verdict(&scene.app).await["verdict"], "waived");
    store(&scene, "DROP TRIGGER full");
    until("the waiver is gone", async || (verdict(&scene.app).await["verdict"] == "fail").then_some(())).await;
    scene.app.stop().await;
}
