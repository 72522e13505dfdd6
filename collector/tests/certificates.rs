//! The certificates that people meet: which one the page shows, and when each one ends.

mod scene;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use scene::{LIMIT, program, until};
use sidewarden_collector::app::{self, App};
use sidewarden_collector::index::Query;
use sidewarden_collector::{config, identity};
use sidewarden_proto::time::Timestamp;
use tempfile::tempdir;

/// A self-signed certificate with an RSA key, as people make them by hand.
fn make(openssl: &Path, dir: &Path, name: &str) {
    let subject = format!("/CN={name}");
    let (cert, key) = (dir.join("cert.part"), dir.join("key.part"));
    let made = Command::new(openssl)
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", &subject])
        .args(["-addext", &format!("subjectAltName=DNS:{name},IP:127.0.0.1")])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&cert)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    // The key before the certificate, as it may happen.
    std::fs::rename(key, dir.join("key.pem")).unwrap();
    std::fs::rename(cert, dir.join("cert.pem")).unwrap();
}

/// A collector whose page's certificate lies in `files`; `more` is added to its settings of metrics.
async fn collector(dir: &Path, files: &Path, more: &str) -> App {
    let text = format!(
        "data_dir = '{}'\n[agents]\nlisten = '127.0.0.1:0'\n[api]\nlisten = '127.0.0.1:0'\n{}[metrics]\nlisten = '127.0.0.1:0'\n{more}",
        dir.join("data").display(),
        page(files)
    );
    app::start(config::read(&text, &|_| None).unwrap(), Timestamp::now).await.unwrap()
}

fn page(files: &Path) -> String {
    format!("cert = '{0}/cert.pem'\nkey = '{0}/key.pem'\n", files.display())
}

/// Whether curl, which names no roots, opens the page trusting only the certificate in the file `ca`.
async fn opens(ca: &Path, port: u16) -> bool {
    let (ca, url) = (ca.to_owned(), format!("https://127.0.0.1:{port}/healthz"));
    let curl = move || Command::new("curl").args(["--silent", "--noproxy", "*", "--cacert"]).arg(ca).arg(url).output();
    let said = tokio::task::spawn_blocking(curl).await.unwrap().unwrap();
    assert!(said.status.success() || said.status.code() == Some(60), "{said:?}");
    said.status.success()
}

/// What a command says that asks this collector.
fn says(app: &App, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sidewarden-collector"));
    command.arg("--data-dir").arg(&app.core.config.data_dir).args(arguments);
    let said = command.arg("--url").arg(format!("https://127.0.0.1:{}", app.api.port())).output().unwrap();
    assert!(said.status.success(), "{said:?}");
    String::from_utf8(said.stdout).unwrap()
}

async fn told(app: &App, kind: &str, word: &str) {
    until(&format!("{kind} with {word}"), async || {
        let query = Query { kinds: vec![kind.to_owned()], ..Default::default() };
        let events = app.core.index.query(query).await.unwrap().events;
        events.iter().any(|event| event.body.get().contains(word)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_shows_what_is_in_the_files_and_our_own_commands_need_no_other_ca_for_that() {
    let (Some(openssl), Some(_)) = (program("openssl", "openssl"), program("curl", "curl")) else { return };
    let (dir, files) = (tempdir().unwrap(), tempdir().unwrap());
    make(&openssl, files.path(), "wardens.example");
    let app = collector(dir.path(), files.path(), "tls = true\n").await;
    let cert = files.path().join("cert.pem");
    let kept = |name: &str| {
        std::fs::copy(&cert, dir.path().join(name)).unwrap();
        dir.path().join(name)
    };
    let first = kept("first.pem");
    for port in [app.api.port(), app.metrics.port()] {
        assert!(opens(&first, port).await, "{port}");
    }
    let ours = app.core.config.data_dir.join("ca/bundle.pem");
    assert!(!opens(&ours, app.api.port()).await, "who knows our CA, and does not say so");
    let said = says(&app, &["certificates"]);
    for words in
        ["The page shows a certificate of", "wardens.example, 127.0.0.1 from", "cert.pem, until", "somebody else"]
    {
        assert!(said.contains(words), "{words} is missing in:\n{said}");
    }

    // Replaced while it runs; what cannot be used is told, and changes nothing.
    make(&openssl, files.path(), "second.example");
    told(&app, "collector.identity_taken", "second.example").await;
    let second = kept("second.pem");
    assert!(opens(&second, app.api.port()).await && !opens(&first, app.api.port()).await);
    for (file, content) in [("key.pem", "-----BEGIN PRIVATE KEY-----\n"), ("cert.pem", "nothing")] {
        std::fs::write(files.path().join(file), content).unwrap();
        told(&app, "collector.identity_refused", file).await;
        assert!(opens(&second, app.api.port()).await, "{file}");
    }
    make(&openssl, files.path(), "third.example");
    told(&app, "collector.identity_taken", "third.example").await;
    let said: serde_json::Value = serde_json::from_str(&says(&app, &["certificates", "--json"])).unwrap();
    assert_eq!(said["page"]["names"], "third.example, 127.0.0.1");
    let ends: Vec<i64> =
        said["certificates"].as_array().unwrap().iter().map(|one| one["not_after_us"].as_i64().unwrap()).collect();
    assert!(ends.len() >= 4 && ends.is_sorted(), "{said}");
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_files_one_of_our_own_ca_is_shown_and_told_until_they_come() {
    let (Some(openssl), Some(_)) = (program("openssl", "openssl"), program("curl", "curl")) else { return };
    let (dir, files) = (tempdir().unwrap(), tempdir().unwrap());
    let app = collector(dir.path(), files.path(), "").await;
    told(&app, "collector.identity_refused", "cert.pem").await;
    assert!(opens(&app.core.config.data_dir.join("ca/bundle.pem"), app.api.port()).await);
    assert!(says(&app, &["certificates"]).contains("of the collector's own CA, until"));
    make(&openssl, files.path(), "wardens.example");
    told(&app, "collector.identity_taken", "wardens.example").await;
    assert!(opens(&files.path().join("cert.pem"), app.api.port()).await);
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_renew_has_its_end_in_metrics_and_for_alerts_and_is_looked_at_by_check_config() {
    let (Some(openssl), Some(_)) = (program("openssl", "openssl"), program("curl", "curl")) else { return };
    let (dir, files) = (tempdir().unwrap(), tempdir().unwrap());
    make(&openssl, files.path(), "wardens.example");
    let settings = config::read(&format!("[api]\n{}", page(files.path())), &|_| None).unwrap();
    identity::check(&settings, Timestamp::now()).unwrap();
    let late = Timestamp::now().plus(Duration::from_secs(40 * 86_400));
    let fault = identity::check(&settings, late).unwrap_err().to_string();
    assert!(fault.contains("api.cert") && fault.contains("this machine's clock says"), "{fault}");

    let app = collector(dir.path(), files.path(), "").await;
    told(&app, "ca.certificates", "\"what\":\"page\"").await;
    let metrics =
        reqwest::Client::builder().no_proxy().timeout(LIMIT).tls_backend_preconfigured(scene::tls_config(&app));
    let metrics = metrics.build().unwrap().get(format!("http://{}/metrics", app.metrics)).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    assert!(metrics.contains("sidewarden_collector_given_end_timestamp_seconds{what=\"page\"}"), "{metrics}");
    app.stop().await;
}
