//! Connections that nft redirects: clients that know nothing of the agent, with rules written by hand.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use sidewarden_agent::dial::{Resolver, connect_from};
use sidewarden_proto::event::{Body, Event, RefusalReason};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::scene::{Agent, Curled, Dns, OUTSIDE, OUTSIDE_V6, Server, curl_as, isolated, program, read_all, tls_server};

/// The group whose connections are redirected: that of the workload.
const WORKLOAD: u32 = 4242;

/// Where the workload's connections come from that are made by the test itself.
const SOURCE: &str = "127.0.0.77";

/// Redirects what any of `whose` matches to the listeners of `agent`; false if there is no nft and that is allowed.
fn redirect(agent: &Agent, whose: &[&str]) -> bool {
    let Some(nft) = program("nft", "nftables") else { return false };
    let to = |v4: bool| agent.egress.iter().find(|address| address.is_ipv4() == v4).unwrap().port();
    let rules: String = whose
        .iter()
        .map(|whose| {
            format!(
                "{whose} meta nfproto ipv4 meta l4proto tcp redirect to :{}\n\
                 {whose} meta nfproto ipv6 meta l4proto tcp redirect to :{}\n",
                to(true),
                to(false)
            )
        })
        .collect();
    let rules = format!("table inet test {{ chain out {{ type nat hook output priority -100;\n{rules}}}\n}}\n");
    let mut child = Command::new(nft).args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{rules}");
    true
}

/// An agent to which the workload's connections are redirected.
async fn agent(allow: &str, resolver: Resolver) -> Option<Agent> {
    let section = format!("transparent_listen = ['127.0.0.1:0', '[::1]:0']\nallow = [{allow}]");
    let agent = Agent::start(&section, "timeouts.handshake = '1s'", resolver).await;
    redirect(&agent, &[&format!("meta skgid {WORKLOAD}"), &format!("ip saddr {SOURCE}")]).then_some(agent)
}

/// curl, as the workload runs it.
async fn workload(args: &[&str]) -> Curled {
    curl_as(args, |command| _ = command.gid(WORKLOAD)).await.expect("curl, or none of these tests runs")
}

/// The reset may come before curl has seen the connection, before it has sent, or before it has read.
fn was_reset(got: &Curled) -> bool {
    [7, 55, 56].contains(&got.code) && got.out.is_empty()
}

/// What comes back to a connection of the workload that says `bytes`, and whether it ends by an end.
async fn says(to: &str, bytes: &[u8]) -> (Vec<u8>, bool) {
    read_all(&mut speak(to, bytes).await).await
}

async fn speak(to: &str, bytes: &[u8]) -> TcpStream {
    let mut tcp = connect_from(Some(SOURCE.parse().unwrap()), to.parse().unwrap()).await.unwrap();
    tcp.write_all(bytes).await.unwrap();
    tcp
}

#[test]
fn a_connection_to_a_listed_address_goes_on_to_it() {
    isolated(|| async {
        let (v4, v6) =
            (Server::start(&format!("{OUTSIDE}:80")).await, Server::start(&format!("[{OUTSIDE_V6}]:80")).await);
        let allow = format!("'{OUTSIDE}:80', '[{OUTSIDE_V6}]:80'");
        let Some(agent) = agent(&allow, Resolver::from_system()).await else { return };
        for (url, server) in [(format!("http://{OUTSIDE}/x"), v4), (format!("http://[{OUTSIDE_V6}]/x"), v6)] {
            let got = workload(&[&url]).await;
            assert_eq!((got.code, got.out.as_str()), (0, "0 bytes came"), "{url}: {got:?}");
            assert!(server.requests()[0].starts_with("GET /x HTTP/1.1\r\n"), "untouched: {:?}", server.requests());
            let place = server.address.to_string();
            let told =
                agent.summaries().iter().any(|summary| summary.contains(&format!("went to {place} for the first")));
            assert!(told, "{:?}", agent.summaries());
        }
    });
}

#[test]
fn a_connection_to_an_address_that_is_not_listed_is_reset() {
    isolated(|| async {
        let server = Server::start(&format!("{OUTSIDE}:80")).await;
        let Some(agent) = agent("'10.1.0.0/16:80'", Resolver::from_system()).await else { return };
        for (url, reason) in [
            (format!("http://{OUTSIDE}/"), RefusalReason::EgressNotListed),
            (format!("http://[{OUTSIDE_V6}]/"), RefusalReason::EgressNotListed),
            ("http://169.254.169.254/latest/meta-data/".to_owned(), RefusalReason::EgressPrivateAddress),
            ("http://10.2.0.1/".to_owned(), RefusalReason::EgressPrivateAddress),
            ("http://[fd00:ec2::254]/".to_owned(), RefusalReason::EgressPrivateAddress),
        ] {
            let got = workload(&[&url]).await;
            assert!(was_reset(&got), "{url}: {got:?}");
            let place = url.trim_start_matches("http://").split('/').next().unwrap();
            let refused = agent.event(|body| match body {
                Body::ConnectionRefused(refused) => {
                    (refused.listener == format!("{place}:80")).then(|| refused.clone())
                }
                _ => None,
            });
            assert_eq!(refused.await.reason, reason, "{url}");
        }
        assert!(server.requests().is_empty());
    });
}

/// The client goes where it likes to and says a listed name: it gets to where that name really is, and nowhere else.
#[test]
fn by_its_name_a_connection_goes_where_the_name_is_and_not_where_the_client_went() {
    isolated(|| async {
        let dir = tempfile::tempdir().unwrap();
        let Some((_, _tls)) = tls_server(&format!("{OUTSIDE}:443"), dir.path()).await else { return };
        let http = Server::start(&format!("{OUTSIDE}:80")).await;
        let metadata = "169.254.169.254";
        let inside = Server::start(&format!("{metadata}:80")).await;
        let dns = Dns::of(&[OUTSIDE]).await;
        let Some(agent) = agent("'api.example.com:80,443'", dns.resolver()).await else { return };
        let ca = dir.path().join("cert.pem");
        for elsewhere in ["203.0.113.9", metadata, "10.0.0.1"] {
            let resolve = |port: u16| format!("api.example.com:{port}:{elsewhere}");
            let got =
                workload(&["--cacert", ca.to_str().unwrap(), "--resolve", &resolve(443), "https://api.example.com/"])
                    .await;
            assert!(got.code == 0 && got.out.contains("TLSv1.3"), "{elsewhere}: {got:?}");
            let got = workload(&["--resolve", &resolve(80), "http://api.example.com/y"]).await;
            assert_eq!((got.code, got.out.as_str()), (0, "0 bytes came"), "{elsewhere}: {got:?}");
        }
        assert_eq!((http.requests().len(), inside.requests().len()), (3, 0));
        let got = workload(&["-k", "--resolve", &format!("evil.example:443:{OUTSIDE}"), "https://evil.example/"]).await;
        assert!(got.code == 35, "{got:?}");
        let refused = agent.refusal(RefusalReason::EgressNotListed).await;
        assert_eq!(refused.listener, "evil.example:443");
    });
}

#[test]
fn a_connection_that_names_nobody_is_judged_by_its_address() {
    for (bytes, reason, detail) in [
        (&b""[..], RefusalReason::EgressNotListed, "it is not on the list, and it named no host within 1s"),
        (b"\x00\x01binary", RefusalReason::EgressNotListed, "it is not on the list, and its first bytes name no host"),
        (b"GET / HTTP/1.1\r\n\r\n", RefusalReason::BadRequest, "no Host field"),
        (b"GET / HTTP/1.1\r\nHost: api.example.com\r\nHost: b\r\n\r\n", RefusalReason::BadRequest, "two host fields"),
        (
            b"GET / HTTP/1.1\r\nHost: api.example.com:81\r\n\r\n",
            RefusalReason::BadRequest,
            "its Host field says port 81, it went to port 80",
        ),
        (
            b"GET / HTTP/1.1\nHost: api.example.com\n\n",
            RefusalReason::BadRequest,
            "a line of the head ends in LF alone",
        ),
        (
            b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
            RefusalReason::BadRequest,
            "a handshake message that is no ClientHello",
        ),
    ] {
        isolated(move || async move {
            let dns = Dns::of(&[OUTSIDE]).await;
            let Some(agent) = agent("'api.example.com:*'", dns.resolver()).await else { return };
            let server = Server::start(&format!("{OUTSIDE}:80")).await;
            let (answer, whole) = says(&server.address.to_string(), bytes).await;
            assert!(answer.is_empty() && !whole, "a reset: {answer:?}");
            let refused = agent.refusal(reason).await;
            assert_eq!((refused.detail.as_str(), refused.listener), (detail, format!("{OUTSIDE}:80")));
            assert!(server.requests().is_empty() && dns.asked().is_empty());
        });
    }
}

/// One connection, two requests to different hosts: both are not one.
#[test]
fn of_redirected_http_every_request_is_judged() {
    isolated(|| async {
        let http = Server::start(&format!("{OUTSIDE}:80")).await;
        let dns = Dns::of(&[OUTSIDE]).await;
        let Some(_agent) = agent("'api.example.com:80'", dns.resolver()).await else { return };
        let two = "GET /one HTTP/1.1\r\nHost: api.example.com\r\n\r\nGET /two HTTP/1.1\r\nHost: evil.example\r\n\r\n";
        let mut tcp = speak(&format!("{OUTSIDE}:80"), two.as_bytes()).await;
        tcp.shutdown().await.unwrap();
        let (answer, _) = read_all(&mut tcp).await;
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.contains("connection: close") && answer.ends_with("0 bytes came"), "{answer}");
        assert_eq!(http.requests().len(), 1, "{:?}", http.requests());
    });
}

#[test]
fn who_comes_without_a_redirect_is_refused_as_a_loop() {
    isolated(|| async {
        let Some(agent) = agent("'127.0.0.0/8:*', '[::1]:*'", Resolver::from_system()).await else { return };
        for address in &agent.egress {
            let mut tcp = TcpStream::connect(address).await.unwrap();
            assert!(tcp.read(&mut [0; 1]).await.is_err(), "{address}");
        }
        let refused = agent.refusal(RefusalReason::EgressLoop).await;
        assert_eq!(refused.detail, "it was not redirected here");
        assert!(agent.summaries().iter().any(|summary| summary.contains("[::1]:")), "{:?}", agent.summaries());
    });
}

/// Rules that forget to exempt the agent: each connection of its own comes back to it.
#[test]
fn the_agents_own_connection_that_comes_back_ends_there() {
    isolated(|| async {
        let server = Server::start(&format!("{OUTSIDE}:80")).await;
        let section =
            format!("transparent_listen = ['127.0.0.1:0', '[::1]:0']\nallow = ['{OUTSIDE}:80', 'api.example.com:81']");
        let agent = Agent::start(&section, "", Dns::of(&[OUTSIDE]).await.resolver()).await;
        if !redirect(&agent, &[&format!("ip daddr {OUTSIDE}")]) {
            return;
        }
        let got = workload(&[&format!("http://{OUTSIDE}/")]).await;
        assert!(was_reset(&got), "{got:?}");
        let refused = agent.refusal(RefusalReason::EgressLoop).await;
        assert_eq!(refused.detail, format!("the agent's own connection to {OUTSIDE}:80 was redirected to the agent"));
        let events = agent.stop().await;
        let loops: u64 = events.iter().map(count_of_loops).sum();
        assert_eq!(loops, 1, "{events:#?}");
        assert!(server.requests().is_empty());
    });
}

fn count_of_loops(event: &Event) -> u64 {
    match event.body() {
        Ok(Some(Body::ConnectionRefused(refused))) if refused.reason == RefusalReason::EgressLoop => refused.count,
        _ => 0,
    }
}
