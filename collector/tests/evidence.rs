//! Scans and attestations over the API and from a folder, and what they answer.

mod scene;

use std::time::Duration;

use scene::{Agent, ask, client, event, start, start_in, token, until};
use serde_json::{Value, json};
use sidewarden_collector::app::App;
use sidewarden_collector::evidence::attest::{Statement, sign};
use sidewarden_proto::event::*;
use sidewarden_proto::finding::{CisIds, Finding, Remedy, Vantage, Verdict};
use sidewarden_proto::time::Timestamp;

const ID: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

fn report(made: Timestamp, severity: &str) -> String {
    json!({
        "SchemaVersion": 2, "CreatedAt": made.to_string(), "ArtifactName": "shop/orders:1.2",
        "Metadata": {"ImageID": ID},
        "Results": [{"Vulnerabilities": [
            {"VulnerabilityID": "CVE-1", "PkgName": "zlib", "InstalledVersion": "1", "FixedVersion": "2", "Severity": severity}
        ]}],
    })
    .to_string()
}

async fn send(app: &App, path: &str, body: impl Into<reqwest::Body>) -> (u16, Value) {
    let url = format!("https://127.0.0.1:{}{path}", app.api.port());
    let request = client(app).post(url).bearer_auth(token(app)).header("content-type", "application/json");
    let answer = request.body(body).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap_or_default())
}

fn unknown(check: &str, id: &str) -> Finding {
    Finding {
        check: check.into(),
        ids: CisIds { v1_3_1: id.into(), v1_6: id.into() },
        title: "t".into(),
        severity: Severity::Warning,
        verdict: Verdict::Unknown { grant: "evidence".into() },
        evidence: Vec::new(),
        remedy: Remedy::default(),
        vantage: Vantage::Node,
    }
}

/// A host with one container of the image.
async fn host(app: &App) -> Agent {
    let mut node = Agent::new("hosts/a#h1");
    node.connect(app, Mode::Node, Vantage::Node).await;
    let container =
        ContainerRef { id: "c1".into(), name: "orders".into(), image_id: ID.into(), ..ContainerRef::default() };
    let findings = vec![unknown("image-scan", "4.4"), unknown("verified-packages", "4.11")];
    let body = ContainerPosture { container, host: "h".into(), findings };
    node.send(app, vec![event(Severity::Info, "a container", body)]).await;
    node
}

async fn verdict(app: &App, check: &str) -> Value {
    let report = ask(app, "/api/v1/report").await;
    report["table"].as_array().unwrap().iter().find(|row| row["check"] == check).unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scan_answers_for_the_image_it_is_of_and_a_bad_one_alerts() {
    let scene = start("").await;
    host(&scene.app).await;
    let now = Timestamp::now();
    assert_eq!(verdict(&scene.app, "image-scan").await["verdict"], "unknown");
    let (status, answer) =
        send(&scene.app, "/api/v1/evidence/trivy?by=ci", report(now.minus(Duration::from_secs(60)), "LOW")).await;
    assert_eq!(
        (status, answer["new"].as_bool(), answer["scan"]["by"].as_str()),
        (200, Some(true), Some("ci")),
        "{answer}"
    );
    assert_eq!(verdict(&scene.app, "image-scan").await["verdict"], "pass");
    // An older one changes nothing, the same one neither; a newer one counts.
    let older = report(now.minus(Duration::from_secs(600)), "CRITICAL");
    assert_eq!(send(&scene.app, "/api/v1/evidence/trivy", older).await.0, 409);
    let between = Timestamp::now();
    assert_eq!(send(&scene.app, "/api/v1/evidence/trivy", report(now, "CRITICAL")).await.0, 200);
    let (_, again) = send(&scene.app, "/api/v1/evidence/trivy", report(now, "CRITICAL")).await;
    assert_eq!(again["new"].as_bool(), Some(false));
    let row = verdict(&scene.app, "image-scan").await;
    assert_eq!(row["verdict"], "fail");
    assert!(row["evidence"].to_string().contains("CVE-1 in zlib 1, mended in 2"), "{row}");
    until("the alert", async || {
        let told = ask(&scene.app, "/api/v1/alerts").await.to_string();
        (told.contains("ContainerCheckFailed") && told.contains("image-scan")).then_some(())
    })
    .await;
    // The past knows the scan of then.
    let then = ask(&scene.app, &format!("/api/v1/report?at={}", between.0)).await;
    let row = then["table"].as_array().unwrap().iter().find(|row| row["check"] == "image-scan").unwrap();
    assert_eq!(row["verdict"], "pass");
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_report_or_too_large_a_one_is_refused() {
    let scene = start("").await;
    for (body, status, expected) in [
        ("{}".to_owned(), 400, "names no image"),
        ("garbage".to_owned(), 400, "no report"),
        (report(Timestamp::now().plus(Duration::from_secs(86_400)), "LOW"), 400, "future"),
        (" ".repeat((64 << 20) + 1), 413, "more than"),
    ] {
        let (got, answer) = send(&scene.app, "/api/v1/evidence/trivy", body).await;
        assert_eq!(got, status, "{expected}: {answer}");
        assert!(answer["error"].as_str().unwrap().contains(expected), "{answer}");
    }
    assert_eq!(ask(&scene.app, "/api/v1/evidence").await["scans"], json!([]));
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_in_the_folder_is_taken_in() {
    let dir = tempfile::tempdir().unwrap();
    let scans = dir.path().join("scans");
    std::fs::create_dir(&scans).unwrap();
    std::fs::write(scans.join("a.json"), report(Timestamp::now(), "LOW")).unwrap();
    std::fs::write(scans.join("bad.json"), "garbage").unwrap();
    let app = start_in(dir.path(), &format!("[evidence]\nfolder = '{}'\n", scans.display())).await;
    until("the scan", async || {
        let told = ask(&app, "/api/v1/evidence").await;
        (told["scans"].as_array().unwrap().len() == 1).then_some(())
    })
    .await;
    app.stop().await;
}

fn statement(until: &str) -> Statement {
    Statement {
        check: "verified-packages".into(),
        workload: "hosts/*".into(),
        container: Some("ord*".into()),
        by: "jane".into(),
        why: "apt verifies every package".into(),
        signed: Timestamp::now().to_string(),
        until: until.into(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_known_key_attests_passes_until_it_is_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let stranger = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let public = dir.path().join("security.pub.pem");
    std::fs::write(&public, key.public_key_pem()).unwrap();
    let config = format!("[[evidence.attestor]]\nname = 'security'\nkey_file = '{}'\n", public.display());
    let app = start_in(dir.path(), &config).await;
    host(&app).await;
    let tomorrow = Timestamp::now().plus(Duration::from_secs(86_400)).to_string();
    let path = "/api/v1/evidence/attestation";
    let forged = sign(&statement(&tomorrow), stranger.serialize_pem().as_bytes()).unwrap();
    assert_eq!(send(&app, path, forged).await.0, 403);
    let ended = sign(&statement("2026-01-01"), key.serialize_pem().as_bytes()).unwrap();
    assert_eq!(send(&app, path, ended).await.0, 400);
    assert_eq!(verdict(&app, "verified-packages").await["verdict"], "unknown");
    let envelope = sign(&statement(&tomorrow), key.serialize_pem().as_bytes()).unwrap();
    let (status, answer) = send(&app, path, envelope).await;
    assert_eq!((status, answer["attestation"]["key"].as_str()), (200, Some("security")), "{answer}");
    let row = verdict(&app, "verified-packages").await;
    assert_eq!(row["verdict"], "pass");
    assert!(row["evidence"][0]["line"].as_str().unwrap().contains("signed by the key security"), "{row}");
    let remove = json!({"check": "verified-packages", "workload": "hosts/*", "container": "ord*", "why": "wrong"});
    assert_eq!(send(&app, "/api/v1/evidence/attestation/remove", remove.to_string()).await.0, 200);
    assert_eq!(verdict(&app, "verified-packages").await["verdict"], "unknown");
    app.stop().await;
}
