//! The page in a real Chromium, against a collector with a shop under attack: what a user sees.
//!
//! With SIDEWARDEN_SCREENSHOTS=<dir> every view is also kept as a picture, light and dark.

mod scene;

use std::path::PathBuf;
use std::process::{Command, Stdio};

use scene::{program, shop, start, token, until};
use sidewarden_collector::app::App;
use sidewarden_collector::fleet::Coming;
use sidewarden_proto::directive::UNDERSTANDS;
use sidewarden_proto::event::{
    Body, ConnectionRefused, Direction, Mode, PeerFirstSeen, PostureBaseline, RefusalReason, Severity,
};
use sidewarden_proto::finding::{Vantage, Verdict};
use sidewarden_proto::identity::Sha256;
use sidewarden_proto::time::Timestamp;

struct Browser(PathBuf);

/// How long the page may take by its own clock.
const BUDGET: &str = "--virtual-time-budget=6000";

/// How often a page is asked for when the browser does not get it.
const TRIES: u32 = 6;

/// A network that comes or goes on this machine, as those of containers do, makes the browser drop what it is fetching: then
/// there is no page at all, or the page's own program is missing, or its question has no answer.
fn was_cut_off(document: &str) -> bool {
    let signs = ["main-frame-error", r#"<main id="main" tabindex="-1"></main>"#, "the collector cannot be reached"];
    !document.contains("</html>") || signs.iter().any(|sign| document.contains(sign))
}

impl Browser {
    fn run(&self, url: &str, more: &[String]) -> String {
        let profile = tempfile::tempdir().unwrap();
        let output = Command::new(&self.0)
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-sync", "--incognito"])
            .args(["--ignore-certificate-errors", "--disable-dev-shm-usage", "--window-size=1400,1000", BUDGET])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .args(more)
            .arg(url)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let complaint = said.lines().find(|line| line.contains("CONSOLE") && line.contains("Refused"));
        assert!(complaint.is_none(), "{complaint:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The document as it stands when the page has settled; a picture of it, too, if that is wanted.
    async fn look(self: &std::sync::Arc<Browser>, app: &App, name: &str, place: &str) -> String {
        self.look_at(format!("https://127.0.0.1:{}/{place}", app.api.port()), name).await
    }

    async fn look_at(self: &std::sync::Arc<Browser>, url: String, name: &str) -> String {
        let (browser, name) = (self.clone(), name.to_owned());
        let looked = tokio::task::spawn_blocking(move || {
            if let Some(dir) = std::env::var_os("SIDEWARDEN_SCREENSHOTS") {
                for (suffix, dark) in [("", false), ("-dark", true)] {
                    let path = PathBuf::from(&dir).join(format!("{name}{suffix}.png"));
                    let mut more = vec![format!("--screenshot={}", path.display())];
                    more.extend(dark.then(|| "--blink-settings=preferredColorScheme=0".to_owned()));
                    browser.run(&url, &more);
                }
            }
            let look = || browser.run(&url, &["--dump-dom".to_owned()]);
            (1..TRIES).map(|_| look()).find(|document| !was_cut_off(document)).unwrap_or_else(look)
        });
        tokio::time::timeout(scene::LIMIT * 2, looked).await.unwrap().unwrap()
    }
}

fn browser() -> Option<std::sync::Arc<Browser>> {
    program("chromium", "chromium").map(|path| std::sync::Arc::new(Browser(path)))
}

fn assert_shows(document: &str, wanted: &[&str]) {
    for text in wanted {
        assert!(document.contains(text), "the page does not show `{text}`:\n{document}");
    }
}

/// Waits until there is one of this name: alerts are judged after what they come from is acknowledged.
async fn alert(app: &App, name: &str) {
    until(name, async || scene::ask(app, "/api/v1/alerts").await.to_string().contains(name).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_sees_the_state_of_the_shop() {
    let Some(browser) = browser() else { return };
    let scene = start("").await;
    let agents = shop(&scene.app).await;
    agents[2].disconnect(&scene.app, true).await;
    alert(&scene.app, "ForeignCertificate").await;
    let key = token(&scene.app);
    let at = |place: &str| format!("#token={key}&{place}");

    let page = browser.look(&scene.app, "overview", &at("/")).await;
    assert_shows(
        &page,
        &["shop/rogue", "shop/orders", "shop/db", "RootExec", "somebody entered as root", "checks unknown"],
    );
    assert_shows(&page, &["6 fail, 7 unknown, 5 pass", "1 of 2"]);
    assert!(!page.contains(&key), "the token stays in the document");

    let rogue = "/workload/spiffe%3A%2F%2Fsidewarden.internal%2Fshop%2Frogue";
    let page = browser.look(&scene.app, "workload", &at(rogue)).await;
    assert_shows(
        &page,
        &["5.31", "docker-socket", "the Docker socket is not mounted in the container", ">FAIL<", ">UNKNOWN<"],
    );
    assert_shows(
        &page,
        &["/run/docker.sock", "run a node agent on this host", "cap_drop: [ALL]", "docker run", "Kubernetes"],
    );

    // Beside what was seen and how to mend it: what the rule is good for, in the words of `sidewarden-agent explain`.
    let guards = sidewarden_proto::guards::guards_against("docker-socket").unwrap();
    assert_shows(&page, &[guards, "What it guards against, and how to mend it"]);
    assert_shows(&page, &["What it guards against, and how to keep this rule"]);

    let page = browser.look(&scene.app, "alerts", &at("/alerts")).await;
    assert_shows(&page, &["PlaintextRefused", "from 172.18.0.1, 172.18.0.9", "What to do:", "CheckFailed"]);

    let page = browser.look(&scene.app, "events", &at("/events?min_severity=info")).await;
    assert_shows(&page, &["process.entered", "connection.refused", "posture.baseline", "agent.connected"]);
    // What an attacker writes is shown to the letter, and is nothing but text.
    assert_shows(&page, &["&lt;script&gt;document.title='owned'&lt;/script&gt;"]);
    assert!(!page.contains("<script>document.title") && !page.contains("<title>owned"), "{page}");

    let page = browser.look(&scene.app, "rules", &at("/rules")).await;
    assert_shows(&page, &["id=\"rule-RootExec\"", "What makes an alert"]);
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_auditor_sees_the_table_of_the_fleet_of_a_service_and_of_one_instance_and_at_a_moment() {
    let Some(browser) = browser() else { return };
    let scene = start("").await;
    shop(&scene.app).await;
    let key = token(&scene.app);
    let at = |place: &str| format!("#token={key}&/report{place}");

    let page = browser.look(&scene.app, "report", &at("")).await;
    assert_shows(&page, &["the whole fleet", "<b>Judged </b>5<", "5.31", "the Docker socket is not mounted", ">FAIL<"]);
    assert_shows(&page, &["shop/rogue#rogue-1", "UNKNOWN", "to know:", "<option value=\"shop/*\">"]);
    assert!(!page.contains("/run/docker.sock"), "evidence of one stands beside the verdicts of all: {page}");
    for format in ["csv", "json", "html"] {
        assert_shows(&page, &[&format!("/api/v1/report?numbering=1.3.1&amp;format={format}\"")]);
    }

    let page = browser.look(&scene.app, "report-service", &at("?of=shop%2Forders&numbering=1.6")).await;
    assert_shows(&page, &["<b>Of </b>shop/orders<", "<b>Judged </b>2<", "shop/orders#orders-1, shop/orders#orders-2"]);
    assert_shows(&page, &["numbering=1.6&amp;workload=shop%2Forders&amp;format=csv"]);
    assert!(!page.contains("shop/rogue#rogue-1, "), "{page}");

    let page = browser.look(&scene.app, "report-instance", &at("?of=shop%2Frogue%23rogue-1")).await;
    assert_shows(&page, &["<b>Of </b>shop/rogue#rogue-1<", "<b>Judged </b>1<", "/run/docker.sock"]);

    let page = browser.look(&scene.app, "report-past", &at("?at=2020-02-01T12:30")).await;
    assert_shows(&page, &["As it stood at </b>", "2020-02-01 12:30:00 UTC", "Nobody was judged then"]);
    assert_shows(&page, &["at=2020-02-01T12%3A30%3A00Z&amp;format=html"]);

    let file = tempfile::Builder::new().suffix(".html").tempfile().unwrap();
    std::fs::write(&file, scene::read(&scene.app, "/api/v1/report?format=html").await).unwrap();
    let page = browser.look_at(format!("file://{}", file.path().display()), "report-file").await;
    assert_shows(&page, &["the whole fleet", "The table", "/run/docker.sock", "shop/rogue#rogue-1"]);

    let page = browser.look(&scene.app, "report-wrong", &at("?of=shop%2F%2F")).await;
    assert_shows(&page, &["role=\"alert\"", "write shop/orders, shop/*, or a SPIFFE ID", ">Show<"]);
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_sees_when_each_certificate_ends_and_who_has_not_confirmed_the_newest_directive() {
    let Some(browser) = browser() else { return };
    let scene = start("").await;
    shop(&scene.app).await;
    let key = token(&scene.app);
    let page = browser.look(&scene.app, "certificates", &format!("#token={key}&/certificates")).await;
    assert_shows(&page, &["This page shows a certificate of the collector's own CA", "<code>api.cert</code>"]);
    assert_shows(&page, &["Root CA", "Issuing CA", "Collector, by its own CA", "shop/orders#orders-1", ">Sidewarden<"]);
    assert_shows(
        &page,
        &["tag pass\">96 %<", "tag warning\">25 %<", ">somebody else<", "aria-current=\"page\">Certificates<"],
    );

    // One agent runs the directive in force, another one an older one.
    let (core, version) = (&scene.app.core, scene.app.core.directives.now().directive.version);
    let mut places = Vec::new();
    for (name, directive) in [("shop/web#web-1", version), ("shop/orders#orders-1", version - 1)] {
        let id = std::sync::Arc::new(format!("spiffe://sidewarden.internal/{name}").parse().unwrap());
        let coming = Coming { directive, understands: UNDERSTANDS, ..Coming::default() };
        places.push(core.fleet.enter(&id, Sha256::of(&[name.as_bytes()]), false, coming, Timestamp::now()).unwrap());
    }
    let page = browser.look(&scene.app, "overview-lags", &format!("#token={key}&/")).await;
    assert_shows(
        &page,
        &[&format!("directive {version}: run by 1 of 2 connected agents"), ">lags<", "shop/orders#orders-1"],
    );
    scene.app.stop().await;
}

/// Looks while there is a new event every moment: those it was not open for are past ones to it.
async fn look_while_events_come(
    browser: &std::sync::Arc<Browser>,
    app: &App,
    agent: &mut scene::Agent,
    place: &str,
) -> String {
    let mut look = Box::pin(browser.look(app, "live", place));
    loop {
        tokio::select! {
            page = &mut look => return page,
            () = tokio::time::sleep(std::time::Duration::from_millis(20)) => {
                agent.send(app, vec![scene::plaintext("172.18.0.1:1")]).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_appear_while_the_page_is_open() {
    let Some(browser) = browser() else { return };
    let scene = start("").await;
    let place = format!("#token={}&/events", token(&scene.app));
    let mut agent = scene::Agent::new("shop/web#web-1");
    let mut page = String::new();
    // The browser's own time runs ahead while it waits: a look may be over before the first event comes.
    for _ in 0..TRIES {
        page = look_while_events_come(&browser, &scene.app, &mut agent, &place).await;
        if page.contains("row fresh") {
            break;
        }
    }
    assert_shows(&page, &["class=\"row fresh\"", ">live<", "refused plaintext from 172.18.0.1:1"]);
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_workload_goes_is_shown_apart_from_whom_it_talks_to() {
    let Some(browser) = browser() else { return };
    let scene = start("").await;
    let mut orders = scene::Agent::new("shop/orders#orders-1");
    orders.connect(&scene.app, Mode::Sidecar, Vantage::Open).await;
    let findings = vec![scene::finding("pids-limit", "5.28", "a limit", Severity::Warning, Verdict::Pass, "512")];
    let seen = |direction, peer: &str| PeerFirstSeen {
        direction,
        peer: peer.into(),
        address: String::new(),
        tls_version: String::new(),
        group: String::new(),
    };
    let reason = RefusalReason::EgressPrivateAddress;
    let refused = ConnectionRefused {
        direction: Direction::Egress,
        reason,
        detail: "it is a cloud's metadata address, and not on the list".into(),
        hint: reason.hint().into(),
        listener: "169.254.169.254:80".into(),
        source: "127.0.0.1:4711".into(),
        peer: String::new(),
        count: 3,
    };
    let told: [Body; 4] = [
        PostureBaseline { findings, ..Default::default() }.into(),
        seen(Direction::Inbound, "spiffe://sidewarden.internal/shop/web").into(),
        seen(Direction::Egress, "api.example.com:443").into(),
        refused.into(),
    ];
    orders.send(&scene.app, told.into_iter().map(|body| scene::event(Severity::Info, "told", body)).collect()).await;
    alert(&scene.app, "EgressToPrivateAddress").await;
    let place = "/workload/spiffe%3A%2F%2Fsidewarden.internal%2Fshop%2Forders";
    let page = browser.look(&scene.app, "egress", &format!("#token={}&{place}", token(&scene.app))).await;
    assert_shows(&page, &["<b>Talks to </b>shop/web<", "<b>Goes to </b>api.example.com:443<"]);
    assert_shows(&page, &["<b>Refused </b>3 egress_private_address<", "EgressToPrivateAddress"]);
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_token_the_page_asks_for_one_and_says_when_it_is_wrong() {
    let Some(browser) = browser() else { return };
    let scene = start("").await;
    let page = browser.look(&scene.app, "enter", "").await;
    assert_shows(&page, &["Show your token", "admin.token"]);
    let page = browser.look(&scene.app, "wrong", "#token=wrong").await;
    assert_shows(&page, &["Show your token", "The token is wrong."]);
    scene.app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_collector_teaches_how_to_begin() {
    let Some(browser) = browser() else { return };
    let scene = start("").await;
    let key = token(&scene.app);
    let page = browser.look(&scene.app, "empty", &format!("#token={key}")).await;
    assert_shows(&page, &["No agents yet", "sidewarden-collector token create --workload shop/orders"]);
    let page = browser.look(&scene.app, "calm", &format!("#token={key}&/alerts")).await;
    assert_shows(&page, &["Nothing fires"]);
    scene.app.stop().await;
}
