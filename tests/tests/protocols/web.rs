//! HTTP/1.1, HTTP/2 without TLS of its own (h2c) and WebSockets: nginx, Tomcat, and Python's websockets.

use std::net::SocketAddr;
use std::path::Path;

use sidewarden_tests::python;
use sidewarden_tests::service::{Service, free_address};
use tempfile::TempDir;

use crate::pair::{CANARY, PYTHON, Pair, client, has, number_after, script, script_server, server, talk};

/// nginx with one page, a folder to put files into, and what it is told about a request; with HTTP/2 or without.
pub fn nginx(dir: &Path, http2: bool) -> Service {
    let address = free_address().unwrap();
    std::fs::create_dir_all(dir.join("www/put")).unwrap();
    std::fs::write(dir.join("www/page.txt"), format!("{CANARY}\n")).unwrap();
    let user = if nix::unistd::Uid::effective().is_root() { "user root;" } else { "" };
    let h2 = if http2 { " http2" } else { "" };
    let d = dir.display();
    let config = format!(
        "{user} daemon off; worker_processes 1; pid {d}/pid; error_log {d}/error.log;
        events {{ worker_connections 512; }}
        http {{
            access_log off; client_max_body_size 2g; client_body_temp_path {d}/body; proxy_temp_path {d}/1;
            fastcgi_temp_path {d}/2; uwsgi_temp_path {d}/3; scgi_temp_path {d}/4; sendfile on; keepalive_requests 100000;
            server {{
                listen {address}{h2}; root {d}/www;
                location = /who {{ return 200 \"$remote_addr $server_protocol\\n\"; }}
                location /put/ {{ dav_methods PUT; }}
            }}
        }}"
    );
    std::fs::write(dir.join("nginx.conf"), config).unwrap();
    let mut command = server("nginx");
    command.arg("-p").arg(dir).arg("-c").arg(dir.join("nginx.conf")).arg("-e").arg(dir.join("error.log"));
    Service::start(command, dir, address).unwrap()
}

fn curl(args: &[&str], url: &str) -> String {
    talk(client("curl", &["--silent", "--show-error", "--fail", "--noproxy", "*"]).args(args).args([url]))
}

/// wrk's own summary: nothing but good answers. It closes its connections in the middle of answers, as it does always.
fn wrk(url: &str, connections: &str) {
    let options = ["--threads", "1", "--connections", connections, "--duration", "2s", "--timeout", "60s", url];
    let said = talk(client("wrk", &options));
    assert!(said.contains(" requests in ") && !said.contains("Non-2xx") && !said.contains("Socket errors"), "{said}");
}

/// h2load's own summary: `count` requests over `clients` connections, 16 at a time on each, and all answered.
fn h2load(url: &str, count: u64, clients: u64) {
    let (count_text, clients_text) = (count.to_string(), clients.to_string());
    let said = talk(client("h2load", &["-n", &count_text, "-c", &clients_text, "-m", "16", url]));
    assert_eq!(number_after(&said, "requests: "), count, "{said}");
    assert!(said.contains(&format!("{count} succeeded, 0 failed, 0 errored, 0 timeout")), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_over_http_1() {
    if !has("nginx", &["nginx", "curl", "wrk"]) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let service = tokio::task::block_in_place(|| nginx(dir.path(), false));
    let pair = Pair::before(service.address, &["HTTP/1.", "Content-Length", "keep-alive"]).await;
    let door = pair.door();
    assert_eq!(curl(&[], &format!("http://{door}/page.txt")), format!("{CANARY}\n"));
    assert_eq!(curl(&[], &format!("http://{door}/who")), "127.0.0.6 HTTP/1.1\n");
    // Several on one connection, one of them with a body that waits for `100 Continue`.
    let page = format!("http://{door}/page.txt");
    assert_eq!(curl(&[&page, &page], &page), format!("{CANARY}\n").repeat(3));
    let body = [CANARY, "\n"].concat().repeat(100_000);
    let upload =
        client("curl", &["--silent", "--show-error", "--fail", "--noproxy", "*", "-H", "Expect: 100-continue"]);
    talk(upload.args(["-T", "-", &format!("http://{door}/put/it")]).input(body.clone()));
    assert!(curl(&[], &format!("http://{door}/put/it")) == body);
    wrk(&page, "16");
    pair.settle(21..=30).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_over_h2c() {
    if !has("nginx-h2c", &["nginx", "curl", "h2load"]) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let service = tokio::task::block_in_place(|| nginx(dir.path(), true));
    let pair = Pair::before(service.address, &["PRI * HTTP/2.0"]).await;
    let door = pair.door();
    let page = format!("http://{door}/page.txt");
    assert_eq!(curl(&["--http2-prior-knowledge"], &page), format!("{CANARY}\n"));
    assert_eq!(curl(&["--http2-prior-knowledge"], &format!("http://{door}/who")), "127.0.0.6 HTTP/2.0\n");
    h2load(&page, 4000, 8);
    let counted = pair.settle(10..=10).await;
    assert!(counted.down > 4000 * CANARY.len() as u64, "{counted:?}");
}

/// Tomcat with one page, on HTTP/1.1 and h2c. Left to itself it ends connections of h2c where the processor is busy:
///
/// - It reads a connection that has just begun with two threads. When the one with the earlier frames has to wait, the
///   later ones overtake them, and the earlier have an old stream's number then. `useAsyncIO="false"`: with one.
/// - A thread that has no turn to write its answer within 5 s gives the connection up, with all its streams.
fn tomcat(dir: &Path) -> (Service, SocketAddr) {
    let address = free_address().unwrap();
    for part in ["conf", "logs", "temp", "work", "webapps/ROOT/WEB-INF"] {
        std::fs::create_dir_all(dir.join(part)).unwrap();
    }
    let connector = format!(
        r#"<Connector address="{}" port="{}" protocol="HTTP/1.1" maxKeepAliveRequests="-1" useAsyncIO="false">
             <UpgradeProtocol className="org.apache.coyote.http2.Http2Protocol"
              readTimeout="120000" writeTimeout="120000"/></Connector>"#,
        address.ip(),
        address.port()
    );
    let server_xml = format!(
        r#"<Server port="-1"><Service name="Catalina">{connector}<Engine name="Catalina" defaultHost="localhost">
           <Host name="localhost" appBase="webapps" autoDeploy="false"/></Engine></Service></Server>"#
    );
    std::fs::write(dir.join("conf/server.xml"), server_xml).unwrap();
    let web_xml = r#"<web-app xmlns="https://jakarta.ee/xml/ns/jakartaee" version="5.0">
        <servlet><servlet-name>default</servlet-name>
        <servlet-class>org.apache.catalina.servlets.DefaultServlet</servlet-class></servlet>
        <servlet-mapping><servlet-name>default</servlet-name><url-pattern>/</url-pattern></servlet-mapping></web-app>"#;
    std::fs::write(dir.join("conf/web.xml"), web_xml).unwrap();
    std::fs::write(dir.join("webapps/ROOT/page.txt"), format!("{CANARY}\n")).unwrap();
    let mut command = server("catalina.sh");
    command.arg("run").env("CATALINA_BASE", dir).env("CATALINA_HOME", "/usr/share/tomcat10");
    command
        .env("CATALINA_OPTS", "-Xmx256m -Djava.security.egd=file:/dev/./urandom")
        .env("CATALINA_TMPDIR", dir.join("temp"));
    (Service::start(command, dir, address).unwrap(), address)
}

#[tokio::test(flavor = "multi_thread")]
async fn tomcat_over_http_1_and_h2c() {
    if !has("tomcat", &["catalina.sh", "curl", "wrk", "h2load"]) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (_service, address) = tokio::task::block_in_place(|| tomcat(dir.path()));
    let pair = Pair::before(address, &["HTTP/1.", "PRI * HTTP/2.0"]).await;
    let page = format!("http://{}/page.txt", pair.door());
    assert_eq!(curl(&[], &page), format!("{CANARY}\n"));
    let version = ["--write-out", "%{http_version}"];
    assert_eq!(curl(&[&version[..], &["--http2-prior-knowledge"]].concat(), &page), format!("{CANARY}\n2"));
    assert_eq!(curl(&[&version[..], &["--http2"]].concat(), &page), format!("{CANARY}\n2"), "by upgrade");
    wrk(&page, "8");
    h2load(&page, 2000, 4);
    pair.settle(15..=20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket() {
    if !has("websocket", &[PYTHON]) {
        return;
    }
    let (dir, address) = (TempDir::new().unwrap(), free_address().unwrap());
    let port = address.port().to_string();
    let command = script_server(
        &python::interpreter().unwrap(),
        "websocket_talk.py",
        &["serve", &address.ip().to_string(), &port],
    );
    let service = tokio::task::block_in_place(|| Service::start(command, dir.path(), address)).unwrap();
    let pair = Pair::before(service.address, &["Sec-WebSocket"]).await;
    let [host, port] = pair.host_port();
    assert_eq!(talk(script("websocket_talk.py", &["call", &host, &port, CANARY, "200"])), "took back 201\n");
    pair.settle(1..=1).await;
}
