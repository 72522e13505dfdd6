//! Alerts arrive at a real Alertmanager and are called off there; other receivers are small servers made here.

mod scene;

use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use scene::{Agent, Running, event, finding, free_port, plaintext, program, start, until};
use serde_json::Value;
use sidewarden_proto::event::{Mode, Severity, VerdictChanged};
use sidewarden_proto::finding::{Vantage, Verdict};

const CONFIG: &str = "route:\n  receiver: none\nreceivers:\n  - name: none\n";

/// A real Alertmanager with nobody to page.
async fn alertmanager(dir: &std::path::Path) -> Option<(Running, String)> {
    let program = program("prometheus-alertmanager", "prometheus-alertmanager")?;
    std::fs::write(dir.join("alertmanager.yml"), CONFIG).unwrap();
    let port = free_port();
    let child = Command::new(program)
        .arg(format!("--config.file={}", dir.join("alertmanager.yml").display()))
        .arg(format!("--storage.path={}", dir.join("am").display()))
        .arg(format!("--web.listen-address=127.0.0.1:{port}"))
        .arg("--cluster.listen-address=")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let running = Running(child);
    let base = format!("http://127.0.0.1:{port}");
    until("Alertmanager", async || get(&format!("{base}/-/ready")).await).await;
    Some((running, base))
}

async fn get(url: &str) -> Option<String> {
    let config = rustls::ClientConfig::builder_with_provider(sidewarden_proto::tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let http = reqwest::Client::builder().no_proxy().tls_backend_preconfigured(config).build().unwrap();
    let answer = http.get(url).send().await.ok()?;
    if answer.status().is_success() { answer.text().await.ok() } else { None }
}

/// What Alertmanager holds as active, by name.
async fn active(base: &str, name: &str) -> Vec<Value> {
    let text = get(&format!("{base}/api/v2/alerts?active=true")).await.unwrap_or_default();
    let all: Vec<Value> = serde_json::from_str(&text).unwrap_or_default();
    all.into_iter().filter(|alert| alert["labels"]["alertname"] == name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_alertmanager_receives_and_resolves() {
    let dir = tempfile::tempdir().unwrap();
    let Some((_running, base)) = alertmanager(dir.path()).await else { return };
    let scene = start(&format!("[alerts]\nalertmanagers = ['{base}']\n")).await;
    let mut agent = Agent::new("shop/orders#orders-1");
    agent.connect(&scene.app, Mode::Sidecar, Vantage::Open).await;
    let changed = |verdict| {
        let finding = finding("docker-socket", "5.31", "no socket", Severity::Critical, verdict, "/run/docker.sock");
        event(Severity::Critical, "docker-socket fails", VerdictChanged { before: "pass".into(), finding })
    };
    let begun = Instant::now();
    agent.send(&scene.app, vec![changed(Verdict::Fail), plaintext("172.18.0.1:1")]).await;
    let alert = until("the alert", async || active(&base, "CheckFailed").await.pop()).await;
    let took = begun.elapsed();
    assert_eq!(alert["labels"]["workload"], "spiffe://sidewarden.internal/shop/orders");
    assert_eq!(
        (alert["labels"]["check"].as_str(), alert["labels"]["severity"].as_str()),
        (Some("docker-socket"), Some("critical"))
    );
    for name in ["summary", "description", "what_to_do", "evidence", "runbook_url"] {
        assert!(!alert["annotations"][name].as_str().unwrap_or_default().is_empty(), "{name} is missing in {alert}");
    }
    until("the other alert", async || active(&base, "PlaintextRefused").await.pop()).await;
    eprintln!("from commit to a poll of Alertmanager: {took:?}");

    agent.send(&scene.app, vec![changed(Verdict::Pass)]).await;
    until("the end of the alert", async || active(&base, "CheckFailed").await.is_empty().then_some(())).await;
    assert_eq!(active(&base, "PlaintextRefused").await.len(), 1);
    scene.app.stop().await;
}

/// The token that was shown, and what was posted.
type Posted = (Option<String>, Value);

/// What a small receiver was posted, and how it answers.
#[derive(Clone, Default)]
struct Receiver {
    posts: Arc<Mutex<Vec<Posted>>>,
    /// How many requests are still to be refused.
    moody: Arc<Mutex<u32>>,
}

async fn take(State(receiver): State<Receiver>, headers: HeaderMap, body: axum::body::Bytes) -> StatusCode {
    let mut moody = receiver.moody.lock().unwrap();
    if *moody > 0 {
        *moody -= 1;
        return StatusCode::SERVICE_UNAVAILABLE;
    }
    let token = headers.get("authorization").map(|value| value.to_str().unwrap().to_owned());
    receiver.posts.lock().unwrap().push((token, serde_json::from_slice(&body).unwrap()));
    StatusCode::OK
}

async fn receiver(moody: u32) -> (Receiver, String) {
    let receiver = Receiver { moody: Arc::new(Mutex::new(moody)), ..Receiver::default() };
    let router =
        Router::new().route("/api/v2/alerts", post(take)).route("/hook", post(take)).with_state(receiver.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else { return };
            let service = hyper_util::service::TowerToHyperService::new(router.clone());
            let io = hyper_util::rt::TokioIo::new(stream);
            tokio::spawn(async move {
                let builder = hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new());
                let _ = builder.serve_connection(io, service).await;
            });
        }
    });
    (receiver, base)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_member_and_every_webhook_is_told_though_some_are_down() {
    let ((moody, one), (_, two)) = (receiver(2).await, receiver(0).await);
    let (hook, three) = receiver(0).await;
    let dead = format!("http://127.0.0.1:{}", free_port());
    let config = format!(
        "[alerts]\nalertmanagers = ['{one}', '{dead}', '{two}']\nresend = '5s'\n\
         [[alerts.webhooks]]\nurl = '{three}/hook'\ntoken = 'hunter2'\n"
    );
    let scene = start(&config).await;
    let mut agent = Agent::new("shop/orders#orders-1");
    agent.connect(&scene.app, Mode::Sidecar, Vantage::Open).await;
    agent.send(&scene.app, vec![plaintext("172.18.0.1:1")]).await;
    let told = |receiver: Receiver| async move { receiver.posts.lock().unwrap().first().cloned() };
    let (token, message) = until("the webhook", || told(hook.clone())).await;
    assert_eq!(token.as_deref(), Some("Bearer hunter2"));
    assert_eq!(
        (message["alerts"][0]["alert"].as_str(), message["alerts"][0]["status"].as_str()),
        (Some("PlaintextRefused"), Some("firing"))
    );
    let (_, posted) = until("the member that refused at first", || told(moody.clone())).await;
    assert_eq!(posted[0]["labels"]["alertname"], "PlaintextRefused");
    until("the repeat", async || (moody.posts.lock().unwrap().len() >= 2).then_some(())).await;
    assert_eq!(hook.posts.lock().unwrap().len(), 1);
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_alert_reaches_its_receiver_without_waiting_for_a_step() {
    let (hook, base) = receiver(0).await;
    let scene = start(&format!("[alerts]\n[[alerts.webhooks]]\nurl = '{base}/hook'\n")).await;
    let mut took = Vec::new();
    for n in 0..5 {
        let mut agent = Agent::new(&format!("shop/w{n}#i{n}"));
        agent.send(&scene.app, vec![plaintext("172.18.0.1:1")]).await;
        let committed = Instant::now();
        while hook.posts.lock().unwrap().len() <= n {
            assert!(committed.elapsed() < scene::LIMIT);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        took.push(committed.elapsed());
    }
    took.sort();
    eprintln!("from commit to receiver: {took:?}");
    scene.app.stop().await;
}
