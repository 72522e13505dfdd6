//! Through a real squid that wants a name and password.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use sidewarden_proto::event::{Body, RefusalReason};

use crate::scene::{Agent, Dns, Running, Server, curl, free_port, listens, program};

/// A squid, and its home.
struct Squid {
    port: u16,
    dir: tempfile::TempDir,
    _running: Running,
}

impl Squid {
    async fn start() -> Option<Squid> {
        Squid::with("").await
    }

    /// With more lines before what it allows.
    async fn with(more: &str) -> Option<Squid> {
        let (squid, openssl) = (program("squid", "squid")?, program("openssl", "openssl")?);
        let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
        // Started by root it works as a user of its own.
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let made = Command::new(openssl).args(["passwd", "-apr1", "s3cret"]).output().unwrap();
        std::fs::write(dir.path().join("passwd"), format!("alice:{}", String::from_utf8(made.stdout).unwrap()))
            .unwrap();
        std::fs::write(dir.path().join("hosts"), "127.0.0.1 only.squid-knows.example\n").unwrap();
        let home = dir.path().display();
        let config = format!(
            "http_port 127.0.0.1:{port}\nauth_param basic program /usr/lib/squid/basic_ncsa_auth {home}/passwd\n\
             acl users proxy_auth REQUIRED\nhttp_access deny !users\nacl bad dstdomain .forbidden.example\n\
             http_access deny bad\n{more}http_access allow all\ncache deny all\npid_filename {home}/pid\n\
             access_log stdio:{home}/access.log\ncache_log {home}/cache.log\ncoredump_dir {home}\n\
             hosts_file {home}/hosts\nvisible_hostname squid.test\nshutdown_lifetime 0 seconds\n"
        );
        std::fs::write(dir.path().join("squid.conf"), config).unwrap();
        let child = Command::new(squid)
            .args(["-N", "-f"])
            .arg(dir.path().join("squid.conf"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let running = Running(child);
        listens(([127, 0, 0, 1], port).into()).await;
        Some(Squid { port, dir, _running: running })
    }

    /// The lines of its log, once `part` is in it.
    async fn log(&self, part: &str) -> String {
        for _ in 0..500 {
            let text = std::fs::read_to_string(self.dir.path().join("access.log")).unwrap_or_default();
            if text.contains(part) {
                return text;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let read = |name: &str| std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
        panic!("squid did not log `{part}`: {}\n{}", read("access.log"), read("cache.log"));
    }

    /// The section of an agent that goes through it.
    fn section(&self, allow: &str, credentials: Option<&Path>) -> String {
        let credentials =
            credentials.map_or(String::new(), |path| format!("upstream_credentials_file = '{}'\n", path.display()));
        format!("upstream = '127.0.0.1:{}'\n{credentials}allow = [{allow}]\n", self.port)
    }
}

#[tokio::test]
async fn squid_is_asked_for_the_address_that_was_checked_in_our_name() {
    let Some(squid) = Squid::start().await else { return };
    let (server, dns) = (Server::start("127.0.0.1:0").await, Dns::of(&["127.0.0.1"]).await);
    let (to, port) = (server.address, server.address.port());
    let credentials = squid.dir.path().join("credentials");
    std::fs::write(&credentials, "alice:s3cret\n").unwrap();
    let section = squid.section(&format!("'api.example.com:{port} in 127.0.0.0/8'"), Some(&credentials));
    let agent = Agent::explicit(&section, dns.resolver()).await;
    let url = format!("http://api.example.com:{port}/x");
    let (proxy, socks) = (agent.proxy(), agent.egress[0].to_string());
    for args in [&["--proxy", &proxy][..], &["--proxy", &proxy, "--proxytunnel"], &["--socks5-hostname", &socks]] {
        let Some(got) = curl(&[args, &[&url]].concat()).await else { return };
        assert_eq!((got.code, got.out.as_str()), (0, "0 bytes came"), "{args:?}: {got:?}");
    }
    assert!(server.requests().iter().all(|head| head.to_ascii_lowercase().contains("host: api.example.com:")));
    let log = squid.log(&format!("CONNECT {to} alice")).await;
    assert!(!log.contains("api.example.com"), "{log}");
    let seen = agent.first_seen().await;
    assert_eq!(seen.peer, format!("api.example.com:{port}"));
    assert_eq!(seen.address, format!("{to} through 127.0.0.1:{}", squid.port));
    let got = curl(&["--proxy", &proxy, &format!("http://other.example:{port}/")]).await.unwrap();
    assert!(got.out.contains("it is not on the list"), "our own list counts first: {got:?}");
}

#[tokio::test]
async fn wrong_missing_and_replaced_credentials() {
    let Some(squid) = Squid::start().await else { return };
    let server = Server::start("127.0.0.1:0").await;
    let (allow, url) = (format!("'{}'", server.address), format!("http://{}/", server.address));
    let resolver = sidewarden_agent::dial::Resolver::from_system;
    let none = Agent::explicit(&squid.section(&allow, None), resolver()).await;
    let Some(got) = curl(&["--proxy", &none.proxy(), &url]).await else { return };
    assert!(got.out.contains("407 Proxy Authentication Required`: it wants other credentials"), "{got:?}");
    none.refusal(RefusalReason::UpstreamRefused).await;

    let file = squid.dir.path().join("credentials");
    std::fs::write(&file, "alice:wrong-pass").unwrap();
    let agent = Agent::explicit(&squid.section(&allow, Some(&file)), resolver()).await;
    let got = curl(&["--proxy", &agent.proxy(), &url]).await.unwrap();
    assert!(got.out.contains("407") && !got.out.contains("wrong-pass"), "{got:?}");
    let refused = agent.refusal(RefusalReason::UpstreamRefused).await;
    assert!(!format!("{refused:?}").contains("wrong-pass"));

    std::fs::write(&file, "alice:s3cret").unwrap();
    let got = curl(&["--proxy", &agent.proxy(), &url]).await.unwrap();
    assert_eq!((got.code, got.out.as_str()), (0, "0 bytes came"), "the new password counts at once: {got:?}");

    std::fs::remove_file(&file).unwrap();
    let got = curl(&["--proxy", &agent.proxy(), &url]).await.unwrap();
    assert!(got.out.contains("reading ") && got.out.contains("credentials"), "{got:?}");
}

/// As Debian ships it, squid takes CONNECT for port 443 alone.
const TLS_ONLY: &str = "acl CONNECT method CONNECT\nacl tls port 443\nhttp_access deny CONNECT !tls\n";

#[tokio::test]
async fn where_squid_looks_names_up_the_event_says_that_nobody_checked() {
    for (more, tunnelled) in [("", true), (TLS_ONLY, false)] {
        let Some(squid) = Squid::with(more).await else { return };
        let server = Server::start("127.0.0.1:0").await;
        let port = server.address.port();
        let credentials = squid.dir.path().join("credentials");
        std::fs::write(&credentials, "alice:s3cret").unwrap();
        let allow = format!("'*.squid-knows.example:{port}', '*.forbidden.example:{port}', '127.0.0.0/8:1'");
        let section = squid.section(&allow, Some(&credentials)) + "upstream_resolves = true\n";
        let dns = Dns::of(&["127.0.0.1"]).await;
        let agent = Agent::explicit(&section, dns.resolver()).await;
        let ask = async |host: &str, args: &[&str]| {
            curl(&[args, &["--proxy", &agent.proxy(), &format!("http://{host}:{port}/")]].concat()).await
        };
        let known = "only.squid-knows.example";
        let Some(got) = ask(known, &["--data", "abc"]).await else { return };
        assert_eq!((got.code, got.out.as_str()), (0, "3 bytes came"), "{got:?}");
        squid.log(&format!("POST http://{known}:{port}/ alice")).await;
        let seen = agent.first_seen().await;
        assert_eq!(seen.peer, format!("{known}:{port}"));
        assert!(seen.address.ends_with(", unchecked: it looked the name up"), "{seen:?}");
        let got = ask(known, &["--proxytunnel"]).await.unwrap();
        assert_eq!(got.code == 0, tunnelled, "{got:?}");
        squid.log(&format!("CONNECT {known}:{port} alice")).await;
        assert!(dns.asked().is_empty(), "{:?}", dns.asked());
        let heads = server.requests();
        assert!(heads.iter().all(|head| !head.to_ascii_lowercase().contains("authorization")), "{heads:?}");

        let got = ask("x.forbidden.example", &["--proxytunnel"]).await.unwrap();
        assert!(got.code == 56 && got.err.contains("502"), "{got:?}");
        let refused = agent.event(|body| match body {
            Body::ConnectionRefused(refused) => {
                (refused.listener == format!("x.forbidden.example:{port}")).then(|| refused.clone())
            }
            _ => None,
        });
        let refused = refused.await;
        assert_eq!(refused.reason, RefusalReason::UpstreamRefused);
        assert!(refused.detail.contains("answered `403 Forbidden`"), "{refused:?}");
        let got = ask("elsewhere.example", &[]).await.unwrap();
        assert!(got.out.contains("it is not on the list"), "{got:?}");
        let got = ask("127.0.0.1", &[]).await.unwrap();
        assert!(got.out.contains("a loopback address, and not on the list"), "{got:?}");
    }
}

#[tokio::test]
async fn credentials_that_squid_does_not_take_for_a_request_are_an_event_and_no_success() {
    let Some(squid) = Squid::start().await else { return };
    let server = Server::start("127.0.0.1:0").await;
    let section = squid.section(&format!("'{}'", server.address), None) + "upstream_resolves = true\n";
    let agent = Agent::explicit(&section, sidewarden_agent::dial::Resolver::from_system()).await;
    let Some(got) = curl(&["-i", "--proxy", &agent.proxy(), &format!("http://{}/", server.address)]).await else {
        return;
    };
    assert!(got.out.starts_with("HTTP/1.1 502 ") && got.out.contains("it wants credentials for a proxy"), "{got:?}");
    let refused = agent.refusal(RefusalReason::UpstreamRefused).await;
    assert_eq!(refused.detail, "the upstream proxy wants other credentials");
    let events = agent.stop().await;
    assert_eq!(events.len(), 1, "counted in one event: {events:#?}");
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn an_upstream_that_is_down_is_named() {
    let section = format!("upstream = '127.0.0.1:{}'\nallow = ['93.184.216.34:80']\n", free_port());
    let agent = Agent::explicit(&section, sidewarden_agent::dial::Resolver::from_system()).await;
    let Some(got) = curl(&["--proxy", &agent.proxy(), "http://93.184.216.34/"]).await else { return };
    assert!(got.out.contains("the upstream proxy 127.0.0.1:") && got.out.contains("Connection refused"), "{got:?}");
    agent.refusal(RefusalReason::UpstreamRefused).await;
}

#[tokio::test]
async fn an_agent_that_is_its_own_upstream_does_not_ask_itself_forever() {
    let port = free_port();
    let section = format!("listen = '127.0.0.1:{port}'\nupstream = 'localhost:{port}'\nallow = ['93.184.216.34:80']\n");
    let agent = Agent::start(&section, "", sidewarden_agent::dial::Resolver::from_system()).await;
    let Some(got) = curl(&["--proxy", &agent.proxy(), "http://93.184.216.34/"]).await else { return };
    assert!(got.out.contains("the upstream proxy localhost:"), "{got:?}");
    let refused = agent.refusal(RefusalReason::EgressLoop).await;
    assert!(refused.detail.contains("is it its own upstream?"), "{refused:?}");
    let events = agent.stop().await;
    assert_eq!(events.len(), 2, "one turn, and no more: {events:#?}");
}
