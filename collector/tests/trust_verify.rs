//! `trust verify` as an operator meets it: the command, asking a collector whose agents tell what they hold.

mod agent;

use std::process::{Command, Output};

use agent::{Agent, domain, start};
use serde_json::json;
use sidewarden_collector::app::App;
use sidewarden_proto::event::{Body, Event, Severity, TrustChanged};
use sidewarden_proto::identity::Sha256;
use sidewarden_proto::time::Timestamp;

async fn verify(app: &App, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sidewarden-collector"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("SIDEWARDEN_")) {
        command.env_remove(name);
    }
    command.args(["trust", "verify", "--data-dir"]).arg(&app.core.config.data_dir);
    command.args(["--url", &format!("https://127.0.0.1:{}", app.api.port())]).args(arguments);
    let Output { status, stdout, stderr } =
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// The agent says that it holds these roots of its own trust domain, and that is taken in.
async fn holds(app: &App, agent: &mut Agent, roots: &[Sha256]) {
    let roots: Vec<_> = roots.iter().map(|sha256| json!({"sha256": sha256, "not_after_us": 0})).collect();
    let body: TrustChanged = serde_json::from_value(json!({"domains": {domain().as_str(): roots}})).unwrap();
    let event = Event::new(Timestamp::now(), Severity::Notice, "trust", &Body::from(body));
    let link = agent.seal(vec![event]);
    agent.session(app.agents).await.0.deliver(link).await;
    app.core.commits.flush().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_lacks_what_is_shown_and_the_exit_code_says_whether_somebody_does() {
    let dir = tempfile::tempdir().unwrap();
    let app = start(dir.path()).await;
    let (code, out, _) = verify(&app, &[]).await;
    assert!(code == Some(0) && out.contains("sidewarden.internal"), "nobody lacks anything: {code:?} {out}");

    let mut orders = Agent::enrolled(&app, "shop/orders", "orders-1").await;
    let (code, out, err) = verify(&app, &[]).await;
    assert!(code == Some(1) && out.contains("shop/orders#orders-1") && out.contains("not told"), "{out}");
    assert!(err.contains("somebody lacks a root, or has not told which ones it holds"), "{err}");

    holds(&app, &mut orders, &[Sha256([7; 32])]).await;
    let (code, out, _) = verify(&app, &[]).await;
    assert!(code == Some(1) && out.contains("LACKS 1") && out.contains("lacks a root of sidewarden.internal"), "{out}");

    let own = app.core.directives.now().directive.bundle.iter().map(|der| Sha256::of(&[&der.0])).collect::<Vec<_>>();
    holds(&app, &mut orders, &own).await;
    let (code, out, _) = verify(&app, &[]).await;
    assert!(code == Some(0) && out.contains("trusts") && !out.contains("LACKS"), "{out}");
    let (code, out, _) = verify(&app, &["--json"]).await;
    let found: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &found["rows"][1]["cells"][0]["is"]), (Some(0), &json!("trusts")), "{found}");
    let collector = &found["rows"][0];
    assert_eq!(collector["agent"], "spiffe://sidewarden.internal/sidewarden/collector");
    assert_eq!(collector["first_to_end"][1], "collector", "its own certificate is the first of its to end: {found}");

    app.stop().await;
}
