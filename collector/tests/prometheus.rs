//! What Prometheus makes of `/metrics`: promtool has no complaint, and a real server scrapes it.

mod scene;

use std::io::Write;
use std::process::{Command, Stdio};

use scene::{Running, client, free_port, program, shop, start, until};

async fn metrics(app: &sidewarden_collector::app::App) -> String {
    let url = format!("http://{}/metrics", app.metrics);
    let answer = client(app).get(url).send().await.unwrap();
    assert!(answer.status().is_success());
    assert!(answer.headers()["content-type"].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
    answer.text().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn promtool_has_no_complaint() {
    let Some(promtool) = program("promtool", "prometheus") else { return };
    let scene = start("").await;
    shop(&scene.app).await;
    let text = metrics(&scene.app).await;
    let mut child = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.trim().is_empty(), "{said}\n{text}");
    for line in [
        "sidewarden_collector_agents{status=\"live\"} 5",
        "sidewarden_collector_connections_refused_total{reason=\"plaintext\"} 2",
        "sidewarden_collector_findings{check=\"docker-socket\",verdict=\"fail\"} 1",
        "sidewarden_collector_findings{check=\"docker-socket\",verdict=\"pass\"} 4",
        "sidewarden_collector_store_up 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
    }
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_prometheus_scrapes_it() {
    let Some(prometheus) = program("prometheus", "prometheus") else { return };
    let scene = start("").await;
    shop(&scene.app).await;
    let dir = tempfile::tempdir().unwrap();
    let config = format!(
        "global: {{scrape_interval: 1s}}\nscrape_configs:\n  - job_name: sidewarden\n    static_configs:\n      - targets: ['{}']\n",
        scene.app.metrics
    );
    std::fs::write(dir.path().join("prometheus.yml"), config).unwrap();
    let port = free_port();
    let child = Command::new(prometheus)
        .arg(format!("--config.file={}", dir.path().join("prometheus.yml").display()))
        .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
        .arg(format!("--web.listen-address=127.0.0.1:{port}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _running = Running(child);
    let http = client(&scene.app);
    let ask = async |query: &str| {
        let mut url: reqwest::Url = format!("http://127.0.0.1:{port}/api/v1/query").parse().unwrap();
        url.query_pairs_mut().append_pair("query", query);
        let answer = http.get(url).send().await.ok()?;
        let json: serde_json::Value = answer.json().await.ok()?;
        json["data"]["result"][0]["value"][1].as_str().map(str::to_owned)
    };
    let live = until("a scrape", async || ask("sidewarden_collector_agents{status=\"live\"}").await).await;
    assert_eq!(live, "5");
    assert_eq!(ask("up{job=\"sidewarden\"}").await.as_deref(), Some("1"));
    let firing =
        until("alerts", async || ask("sum(sidewarden_collector_alerts_firing{severity=\"critical\"}) > 0").await);
    assert!(firing.await.parse::<f64>().unwrap() >= 2.0);
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scraper_must_show_the_token_when_there_is_one() {
    let scene = start("").await;
    let mut settings = (*scene.app.core.config).clone();
    scene.app.stop().await;
    settings.metrics.token = Some(sidewarden_proto::secret::Secret::new("hunter2"));
    settings.metrics.tls = true;
    let clock = sidewarden_proto::time::Timestamp::now;
    let app = sidewarden_collector::app::start(settings, clock).await.unwrap();
    let url = format!("https://127.0.0.1:{}/metrics", app.metrics.port());
    let status = async |token: &str| client(&app).get(&url).bearer_auth(token).send().await.unwrap().status().as_u16();
    assert_eq!((status("hunter2").await, status("wrong").await), (200, 401));
    app.stop().await;
}
