//! The HTTPS API over real sockets: what it answers, whom it refuses, and what it does with bad input.

mod scene;

use scene::{Agent, ask, client, event, plaintext, posture, shop, start, token, until};
use sidewarden_collector::fleet::DirectivesError;
use sidewarden_proto::directive::{Revocation, Target};
use sidewarden_proto::event::{
    AgentDisconnected, EngineBack, EngineLost, Mode, PostureBaseline, ProcessShell, Severity,
};
use sidewarden_proto::finding::Vantage;
use sidewarden_proto::time::Timestamp;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn url(app: &sidewarden_collector::app::App, path: &str) -> String {
    format!("https://127.0.0.1:{}{path}", app.api.port())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_is_shown_as_it_is() {
    let scene = start("").await;
    shop(&scene.app).await;
    let workloads = ask(&scene.app, "/api/v1/workloads").await;
    let names: Vec<&str> =
        workloads["workloads"].as_array().unwrap().iter().map(|w| w["name"].as_str().unwrap()).collect();
    assert_eq!(names.len(), 4);
    assert_eq!(names[0], "shop/rogue");
    let rogue = &workloads["workloads"][0];
    assert_eq!((rogue["posture"]["fail"].as_u64(), rogue["status"].as_str()), (Some(6), Some("live")));
    let agents = ask(&scene.app, "/api/v1/agents").await;
    assert_eq!(agents["agents"].as_array().unwrap().len(), 5);
    let posture = ask(&scene.app, "/api/v1/posture?workload=spiffe://sidewarden.internal/shop/rogue").await;
    let first = &posture["instances"][0]["findings"][0];
    assert_eq!((first["verdict"].as_str(), first["severity"].as_str()), (Some("fail"), Some("critical")));
    assert!(first["remedy"]["compose"].as_str().unwrap().contains("cap_drop"));
    let status = ask(&scene.app, "/api/v1/status").await;
    assert_eq!((status["agents"]["live"].as_u64(), status["store_up"].as_bool()), (Some(5), Some(true)));
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_paged_both_ways_without_gap_or_repeat() {
    let scene = start("").await;
    let mut agent = Agent::new("shop/web#web-1");
    for n in 0..5 {
        agent.send(&scene.app, (0..3).map(|m| plaintext(&format!("10.0.{n}.{m}:1"))).collect()).await;
    }
    scene.app.core.commits.flush().await.unwrap();
    let base = "/api/v1/events?kind=connection.refused&limit=4";
    let (mut newest, mut next) = (Vec::new(), String::new());
    loop {
        let answer = ask(&scene.app, &format!("{base}{next}")).await;
        newest.extend(answer["events"].as_array().unwrap().iter().map(|e| e["cursor"].as_str().unwrap().to_owned()));
        let Some(cursor) = answer["next"].as_str() else { break };
        next = format!("&before={cursor}");
    }
    assert_eq!(newest.len(), 15);
    let (mut oldest, mut after) = (Vec::new(), "0.0".to_owned());
    loop {
        let answer = ask(&scene.app, &format!("{base}&after={after}")).await;
        oldest.extend(answer["events"].as_array().unwrap().iter().map(|e| e["cursor"].as_str().unwrap().to_owned()));
        let Some(cursor) = answer["next"].as_str() else { break };
        after = cursor.to_owned();
    }
    newest.reverse();
    assert_eq!(newest, oldest);
    let event = &ask(&scene.app, base).await["events"][0];
    for field in ["agent", "epoch", "seq", "at_us", "received_us", "kind", "severity", "summary", "body"] {
        assert!(!event[field].is_null(), "{field} is missing in {event}");
    }
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_questions_get_an_error_and_a_hint() {
    let scene = start("").await;
    let rows = [
        ("/api/v1/events?limit=5000", 400, "limit"),
        ("/api/v1/events?kinds=x", 400, "kinds"),
        ("/api/v1/events?before=1", 400, "before"),
        ("/api/v1/events?workload=%00", 400, "workload"),
        ("/api/v1/events?since=%ff%fe", 400, "since"),
        ("/api/v1/posture", 400, "workload is missing"),
        ("/api/v1/posture?workload=spiffe://x/none", 404, "no such workload"),
        ("/api/v1/nothing", 404, "nothing here"),
        ("/../etc/passwd", 404, "nothing here"),
    ];
    for (path, status, expected) in rows {
        let answer = client(&scene.app).get(url(&scene.app, path)).bearer_auth(token(&scene.app)).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), status, "{path}");
        let body: serde_json::Value = answer.json().await.unwrap();
        assert!(body["error"].as_str().unwrap().contains(expected), "{path}: {body}");
        assert!(!body["hint"].as_str().unwrap().is_empty(), "{path}");
    }
    let answer = client(&scene.app).post(url(&scene.app, "/healthz")).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 405);
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_right_token_there_is_no_answer_and_a_guesser_must_wait() {
    let scene = start("").await;
    let (http, path) = (client(&scene.app), url(&scene.app, "/api/v1/status"));
    assert_eq!(http.get(&path).send().await.unwrap().status().as_u16(), 401);
    let right = token(&scene.app);
    for wrong in ["", "x", &right[1..], &format!("{right}x")] {
        assert_eq!(http.get(&path).bearer_auth(wrong).send().await.unwrap().status().as_u16(), 401, "{wrong}");
    }
    for _ in 0..20 {
        http.get(&path).bearer_auth("guess").send().await.unwrap();
    }
    let refused = http.get(&path).bearer_auth("guess").send().await.unwrap();
    assert_eq!(refused.status().as_u16(), 429);
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(http.get(&path).bearer_auth(right).send().await.unwrap().status().as_u16(), 200);
    assert_eq!(http.get(url(&scene.app, "/healthz")).send().await.unwrap().status().as_u16(), 200);
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_carries_the_security_headers_and_no_cors() {
    let scene = start("").await;
    for path in ["/", "/page.js", "/healthz", "/api/v1/status", "/nothing"] {
        let request = client(&scene.app).get(url(&scene.app, path)).header("origin", "https://evil.test");
        let answer = request.send().await.unwrap();
        let headers = answer.headers();
        let policy = headers["content-security-policy"].to_str().unwrap();
        assert!(policy.contains("default-src 'self'") && policy.contains("frame-ancestors 'none'"), "{path}");
        assert!(!policy.contains("unsafe"), "{path}");
        assert_eq!(headers["x-content-type-options"], "nosniff", "{path}");
        assert_eq!(headers["referrer-policy"], "no-referrer", "{path}");
        assert!(headers.contains_key("strict-transport-security"), "{path}");
        assert!(!headers.contains_key("access-control-allow-origin"), "{path}");
        assert!(!headers.contains_key("set-cookie"), "{path}");
    }
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_tells_events_as_they_are_committed() {
    let scene = start("").await;
    let path = url(&scene.app, "/api/v1/events/stream?min_severity=warning");
    let mut answer = client(&scene.app).get(path).bearer_auth(token(&scene.app)).send().await.unwrap();
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    let mut text = String::from_utf8(answer.chunk().await.unwrap().unwrap().to_vec()).unwrap();
    let mut agent = Agent::new("shop/web#web-1");
    agent.connect(&scene.app, Mode::Sidecar, Vantage::Open).await;
    let shell = ProcessShell { process: Default::default() };
    agent.send(&scene.app, vec![event(Severity::Warning, "a <b>line</b>\nand another", shell)]).await;
    while !text.contains("process.shell") {
        text.push_str(std::str::from_utf8(&answer.chunk().await.unwrap().unwrap()).unwrap());
    }
    assert!(!text.contains("agent.started"), "{text}");
    let data =
        text.lines().filter_map(|line| line.strip_prefix("data: ")).find(|d| d.contains("process.shell")).unwrap();
    let record: serde_json::Value = serde_json::from_str(data).unwrap();
    assert_eq!(record["summary"], "a <b>line</b>\nand another");
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_on_the_tls_port_is_sent_to_https_and_garbage_is_dropped() {
    let scene = start("").await;
    let talk = async |bytes: &[u8]| {
        let mut stream = tokio::net::TcpStream::connect(scene.app.api).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    };
    let answer = talk(b"GET /x HTTP/1.1\r\nHost: collector:7444\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 301") && answer.contains("Location: https://collector:7444/x"), "{answer}");
    assert!(!talk(&[0xff; 300]).await.contains("HTTP"));
    assert!(!talk(&[0x16, 3, 1, 0xff, 0xff]).await.contains("HTTP"));
    assert_eq!(client(&scene.app).get(url(&scene.app, "/healthz")).send().await.unwrap().status().as_u16(), 200);
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alert_fires_is_kept_in_the_history_and_survives_a_restart() {
    let scene = start("").await;
    let mut agent = Agent::new("shop/web#web-1");
    agent.connect(&scene.app, Mode::Sidecar, Vantage::Open).await;
    agent.send(&scene.app, vec![plaintext("172.18.0.1:1")]).await;
    let firing = async |app: &sidewarden_collector::app::App| {
        let alerts = ask(app, "/api/v1/alerts").await;
        let list = alerts["alerts"].as_array().unwrap().clone();
        list.into_iter().find(|a| a["alert"] == "PlaintextRefused" && a["status"] == "firing")
    };
    let before = until("the alert", || firing(&scene.app)).await;
    let told = async |app: &sidewarden_collector::app::App| {
        ask(app, "/api/v1/events?kind=alert.firing").await["events"].as_array().unwrap().len()
    };
    until("its event", async || (told(&scene.app).await == 1).then_some(())).await;
    let dir = scene.dir;
    scene.app.stop().await;
    let app = scene::start_in(dir.path(), "").await;
    let after = until("the alert after the restart", || firing(&app)).await;
    assert_eq!((&before["id"], &before["since_us"]), (&after["id"], &after["since_us"]));
    assert_eq!(told(&app).await, 1);
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_events_know_survives_a_restart_and_what_ended_does_not_come_back() {
    let scene = start("").await;
    let mut stands = Agent::new("hosts/one#one-1");
    let mut ended = Agent::new("hosts/two#two-1");
    let lost = || event(Severity::Critical, "lost", EngineLost { why: "connection refused".into() });
    for agent in [&mut stands, &mut ended] {
        agent.connect(&scene.app, Mode::Node, Vantage::Open).await;
        agent.send(&scene.app, vec![lost()]).await;
    }
    let told = async |app: &sidewarden_collector::app::App, word: &str| {
        ask(app, &format!("/api/v1/events?kind=alert.{word}")).await["events"].as_array().unwrap().len()
    };
    until("both are told", async || (told(&scene.app, "firing").await == 2).then_some(())).await;
    ended.send(&scene.app, vec![event(Severity::Notice, "back", EngineBack { version: String::new() })]).await;
    until("one is called off", async || (told(&scene.app, "resolved").await == 1).then_some(())).await;
    let dir = scene.dir;
    scene.app.stop().await;
    let app = scene::start_in(dir.path(), "").await;
    let firing = async || {
        let alerts = ask(&app, "/api/v1/alerts").await;
        let firing = |a: &&serde_json::Value| a["alert"] == "EngineLost" && a["status"] == "firing";
        let instances: Vec<String> = alerts["alerts"]
            .as_array()
            .unwrap()
            .iter()
            .filter(firing)
            .map(|a| a["labels"]["instance"].to_string())
            .collect();
        (!instances.is_empty()).then_some(instances)
    };
    assert_eq!(until("the alert after the restart", firing).await, ["\"one-1\""]);
    assert_eq!((told(&app, "firing").await, told(&app, "resolved").await), (2, 1));
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_cannot_speak_for_the_collector() {
    let scene = start("").await;
    let mut victim = Agent::new("shop/web#web-1");
    victim.connect(&scene.app, Mode::Sidecar, Vantage::Open).await;
    let mut liar = Agent::new("shop/liar#liar-1");
    let lie = AgentDisconnected {
        workload: victim.id.workload.clone(),
        instance: "web-1".into(),
        reason: "gone".into(),
        clean: false,
    };
    liar.send(&scene.app, vec![event(Severity::Critical, "lie", lie), plaintext("10.0.0.1:1")]).await;
    let alerts = until("the alert about the lie", async || {
        let alerts = ask(&scene.app, "/api/v1/alerts").await;
        alerts["alerts"].as_array().unwrap().iter().any(|a| a["alert"] == "ForgedEvent").then_some(alerts)
    });
    let alerts = alerts.await;
    assert!(!alerts.to_string().contains("AgentSilent"), "{alerts}");
    scene.app.stop().await;
}

async fn post(app: &sidewarden_collector::app::App, path: &str, body: &str) -> (u16, serde_json::Value) {
    let request = client(app).post(url(app, path)).bearer_auth(token(app)).header("content-type", "application/json");
    let answer = request.body(body.to_owned()).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn revoking_over_the_api_needs_the_token_a_reason_and_for_many_a_confirmation() {
    let scene = start("").await;
    let (revoke, undo) = ("/api/v1/revocations/revoke", "/api/v1/revocations/undo");
    let own = scene.app.core.issuer.authority().own().borrow().peer().serial.clone();
    let many = r#"{"what":{"by":"workload","id":"spiffe://sidewarden.internal/shop/web"},"why":"x"}"#;
    let rows = [
        ("", 400, "EOF"),
        ("{}", 400, "what"),
        (r#"{"what":{"by":"serial","serial":"zz"},"why":"x"}"#, 400, "hexadecimal"),
        (r#"{"what":{"by":"serial","serial":"ab"},"why":" "}"#, 400, "a reason is needed"),
        (r#"{"what":{"by":"serial","serial":"ab"},"why":"a\nb"}"#, 400, "one line"),
        (r#"{"what":{"by":"serial","serial":"ab"},"why":"x","force":true}"#, 400, "force"),
        (r#"{"what":{"by":"moon_phase"},"why":"x"}"#, 400, "unknown"),
        (r#"{"what":{"by":"key","spki":"12"},"why":"x"}"#, 400, "64 hexadecimal"),
        (r#"{"what":{"by":"instance","workload":"spiffe://other/a/b","instance":"c"},"why":"x"}"#, 400, "trust domain"),
        (many, 409, "every instance"),
        (&format!(r#"{{"what":{{"by":"serial","serial":"{own}"}},"why":"x"}}"#), 409, "collector's own"),
    ];
    for (body, status, expected) in rows {
        let (got, answer) = post(&scene.app, revoke, body).await;
        assert_eq!(got, status, "{body}: {answer}");
        assert!(answer["error"].as_str().unwrap().contains(expected), "{body}: {answer}");
    }
    let bare = client(&scene.app).post(url(&scene.app, revoke)).header("content-type", "application/json");
    assert_eq!(bare.body(many).send().await.unwrap().status().as_u16(), 401);
    assert_eq!(client(&scene.app).get(url(&scene.app, revoke)).send().await.unwrap().status().as_u16(), 405);
    assert_eq!(scene.app.core.directives.now().directive.version, 1, "nothing of this has changed anything");
    let confirmed = many.replace("\"why\":\"x\"", "\"why\":\"x\",\"by\":\"alice\",\"confirmed\":true");
    let (status, done) = post(&scene.app, revoke, &confirmed).await;
    assert_eq!((status, done["version"].as_u64()), (200, Some(2)), "{done}");
    assert_eq!(post(&scene.app, revoke, &confirmed).await.0, 409, "revoked already");
    let listed = ask(&scene.app, "/api/v1/revocations").await;
    assert_eq!(listed["revoked"][0]["id"], done["revocation"]["id"]);
    let told = &ask(&scene.app, "/api/v1/events?kind=identity.revoked").await["events"][0];
    assert_eq!((told["body"]["by"].as_str(), told["body"]["version"].as_u64()), (Some("alice"), Some(2)), "{told}");
    assert!(told["body"]["source"].as_str().unwrap().starts_with("127.0.0.1:"), "{told}");
    let id = done["revocation"]["id"].as_str().unwrap();
    assert_eq!(post(&scene.app, undo, r#"{"id":"none","why":"x"}"#).await.0, 404);
    assert_eq!(post(&scene.app, undo, &format!(r#"{{"id":"{id}","why":"false alarm"}}"#)).await.0, 200);
    assert!(scene.app.core.directives.now().directive.deny.is_empty());
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_checked_before_it_is_in_force_and_its_version_only_grows() {
    let scene = start("").await;
    let apply = "/api/v1/policy/apply";
    let document = |text: &str| serde_json::json!({"text": text, "why": "x", "by": "alice"}).to_string();
    let gate = "[[gate]]\nname = 'g'\nchecks = ['privileged']\n";
    let rows = [
        (document("[[gate]]\nname = 'g'\nhold = 'soon'\n"), 400, "`gate[0].hold`"),
        (document("[[gates]]\n"), 400, "`gate`?"),
        (serde_json::json!({"text": gate, "why": ""}).to_string(), 400, "a reason"),
        ("{}".to_owned(), 400, "text"),
    ];
    for (body, status, expected) in rows {
        let (got, answer) = post(&scene.app, apply, &body).await;
        assert_eq!(got, status, "{body}: {answer}");
        assert!(answer["error"].as_str().unwrap().contains(expected), "{body}: {answer}");
    }
    assert_eq!(ask(&scene.app, "/api/v1/policy").await["version"], 0);
    let versions = [(gate, 1), (gate, 1), ("", 2), (gate, 3)];
    for (text, version) in versions {
        let (status, answer) = post(&scene.app, apply, &document(text)).await;
        assert_eq!((status, answer["policy"].as_u64()), (200, Some(version)), "{answer}");
    }
    assert_eq!(ask(&scene.app, "/api/v1/policy").await["text"], gate);
    let told = &ask(&scene.app, "/api/v1/events?kind=policy.applied").await["events"][0];
    assert_eq!((told["body"]["version"].as_u64(), told["body"]["by"].as_str()), (Some(3), Some("alice")), "{told}");
    let release = "/api/v1/quarantine/release";
    let body = |seconds: u64| {
        let workload = "spiffe://sidewarden.internal/shop/web";
        serde_json::json!({"workload": workload, "instance": "web-1", "seconds": seconds, "why": "x"}).to_string()
    };
    for (seconds, status) in [(0, 400), (8 * 24 * 3600, 400), (60, 200)] {
        assert_eq!(post(&scene.app, release, &body(seconds)).await.0, status, "{seconds}");
    }
    assert_eq!(ask(&scene.app, "/api/v1/quarantine").await["released"][0]["instance"], "web-1");
    scene.app.stop().await;
}

/// Revokes something for so long a reason that less than another revocation fits the directive.
fn fill(app: &sidewarden_collector::app::App) {
    let (directives, own) = (&app.core.directives, app.core.issuer.authority().own().borrow().clone());
    let fill = |directive: sidewarden_proto::directive::Directive| {
        let free = (700 << 10) - serde_json::to_string(&directive).unwrap().len();
        let (what, why) = (Target::Serial { serial: "ff".into() }, "x".repeat(free - 150));
        let large = Revocation { id: "large".into(), what, why, at_us: Timestamp::now(), keys: Vec::new() };
        Ok::<_, DirectivesError>(directive.with_revoked(vec![large]))
    };
    directives.change(&own, Timestamp::now(), fill).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn that_the_directive_is_full_is_told_to_whoever_changes_it_and_of_whoever_breaks_a_gate() {
    let scene = start("").await;
    let gate = "[[gate]]\nname = 'g'\nchecks = ['host-mounts']\nenforce = true\nleave = 0\n";
    let document = |text: &str| serde_json::json!({"text": text, "why": "x"}).to_string();
    assert_eq!(post(&scene.app, "/api/v1/policy/apply", &document(gate)).await.0, 200);
    fill(&scene.app);
    for (path, body) in [
        ("/api/v1/revocations/revoke", r#"{"what":{"by":"serial","serial":"ab"},"why":"x"}"#.to_owned()),
        ("/api/v1/policy/apply", document(&gate.repeat(2).replacen("'g'", "'h'", 1))),
    ] {
        let (status, answer) = post(&scene.app, path, &body).await;
        let said = answer.to_string();
        assert!(status == 409 && said.contains("is full") && said.contains("for revocations"), "{status} {said}");
        assert!(answer["hint"].as_str().unwrap().contains("undo revocations"), "{said}");
    }
    let history = ask(&scene.app, "/api/v1/policy/history").await;
    assert_eq!(history["policies"].as_array().unwrap().len(), 1, "what was never in force is not kept");

    let mut agent = Agent::new("shop/web#web-1");
    agent.connect(&scene.app, Mode::Sidecar, Vantage::Open).await;
    let baseline = PostureBaseline { findings: posture(true), ..Default::default() };
    agent.send(&scene.app, vec![event(Severity::Critical, "posture", baseline)]).await;
    let told = async |count: usize| {
        let events =
            ask(&scene.app, "/api/v1/events?kind=quarantine.changed").await["events"].as_array().unwrap().clone();
        (events.len() == count).then(|| events[0]["body"].clone())
    };
    let capped = until("the event", || told(1)).await;
    assert_eq!(capped["status"], "capped");
    assert!(capped["why"].as_str().unwrap().contains("host-mounts (the directive is full"), "{capped}");
    // It is told once, and has its place as soon as there is one.
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    assert!(told(1).await.is_some());
    let undo = r#"{"id":"large","why":"its certificate has ended"}"#;
    assert_eq!(post(&scene.app, "/api/v1/revocations/undo", undo).await.0, 200);
    assert_eq!(until("the quarantine", || told(2)).await["status"], "quarantined");
    scene.app.stop().await;
}
