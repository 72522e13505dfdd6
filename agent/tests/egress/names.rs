//! Names whose addresses change, lead inside, or do not exist.

use std::net::IpAddr;

use sidewarden_proto::event::{Body, RefusalReason, Severity};
use tokio::io::AsyncWriteExt;

use crate::scene::{Agent, Dns, OUTSIDE, Server, curl, isolated, read_all};

async fn connect(agent: &Agent, host: &str, port: u16) -> String {
    let mut client = agent.dial().await;
    client.write_all(format!("CONNECT {host}:{port} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
    String::from_utf8(read_all(&mut client).await.0).unwrap()
}

/// A server inside and one outside, on the same port.
async fn servers() -> (Server, Server, u16) {
    let inside = Server::start("127.0.0.1:0").await;
    let port = inside.address.port();
    let outside = Server::start(&format!("{OUTSIDE}:{port}")).await;
    (inside, outside, port)
}

async fn get(agent: &Agent, host: &str, port: u16) -> String {
    let mut client = agent.dial().await;
    client.write_all(format!("GET http://{host}:{port}/ HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
    client.shutdown().await.unwrap();
    String::from_utf8(read_all(&mut client).await.0).unwrap()
}

/// The classic rebinding: good when it is checked, inside when it is dialled.
#[test]
fn a_name_that_moves_inside_between_check_and_dial_gets_nobody_inside() {
    isolated(|| async {
        let (inside, outside, port) = servers().await;
        let addresses: [IpAddr; 2] = [OUTSIDE.parse().unwrap(), "127.0.0.1".parse().unwrap()];
        // The first look-up of a type leads outside, every other one inside: who looks up twice is caught at the second.
        let dns = Dns::start(move |_, before| vec![addresses[before.min(1)]]).await;
        let agent = Agent::explicit(&format!("allow = ['rebind.example.com:{port}']"), dns.resolver()).await;

        let answer = get(&agent, "rebind.example.com", port).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let mut asked = dns.asked();
        asked.sort();
        assert_eq!(asked, ["rebind.example.com 1", "rebind.example.com 28"], "each type once");

        for _ in 0..3 {
            let answer = get(&agent, "rebind.example.com", port).await;
            assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
            assert!(answer.contains("its name leads to 127.0.0.1, a loopback address"), "{answer}");
        }
        let refused = agent.refusal(RefusalReason::EgressPrivateAddress).await;
        assert_eq!(refused.listener, format!("rebind.example.com:{port}"));
        assert_eq!((inside.requests().len(), outside.requests().len()), (0, 1));
    });
}

#[test]
fn a_name_that_leads_inside_and_outside_is_reached_outside_only() {
    isolated(|| async {
        let (inside, outside, port) = servers().await;
        let dns = Dns::of(&["127.0.0.1", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "10.0.0.1", OUTSIDE]).await;
        let agent = Agent::explicit(&format!("allow = ['mixed.example.com:{port}']"), dns.resolver()).await;
        for _ in 0..5 {
            let answer = get(&agent, "mixed.example.com", port).await;
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        }
        assert_eq!((inside.requests().len(), outside.requests().len()), (0, 5));
    });
}

/// By rules for networks alone, a client may still ask by name.
#[test]
fn every_public_address_is_no_way_inside() {
    isolated(|| async {
        let (inside, outside, port) = servers().await;
        let dns =
            Dns::start(|name, _| vec![if name.starts_with("in.") { "127.0.0.1" } else { OUTSIDE }.parse().unwrap()])
                .await;
        let agent = Agent::explicit(&format!("allow = ['0.0.0.0/0:{port}', '[::/0]:{port}']"), dns.resolver()).await;
        for (host, status) in [(OUTSIDE, 200), ("out.example.com", 200), ("in.example.com", 403), ("127.0.0.1", 403)] {
            let answer = get(&agent, host, port).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{host}: {answer}");
        }
        assert_eq!((inside.requests().len(), outside.requests().len()), (0, 2));
    });
}

#[tokio::test]
async fn a_name_may_lie_inside_where_its_rule_says_so() {
    let server = Server::start("127.0.0.1:0").await;
    let port = server.address.port();
    let dns = Dns::of(&["127.0.0.1"]).await;
    for (rule, code) in [("127.0.0.0/8", "200"), ("10.0.0.0/8", "403")] {
        let agent = Agent::explicit(&format!("allow = ['db.internal:{port} in {rule}']"), dns.resolver()).await;
        let url = format!("http://db.internal:{port}/");
        let Some(got) = curl(&["--proxy", &agent.proxy(), "-o", "/dev/null", "-w", "%{http_code}", &url]).await else {
            return;
        };
        assert_eq!(got.out, code, "{rule}: {got:?}");
    }
}

#[tokio::test]
async fn a_name_that_is_not_listed_is_not_even_looked_up() {
    let dns = Dns::of(&["93.184.216.34"]).await;
    let agent = Agent::explicit("allow = ['api.example.com:443', '93.184.216.0/24:8443']", dns.resolver()).await;
    let answer = connect(&agent, "stolen-data.evil.example", 443).await;
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    assert!(dns.asked().is_empty(), "{:?}", dns.asked());
}

#[tokio::test]
async fn a_name_without_an_address_is_told_as_such() {
    let dns = Dns::start(|_, _| Vec::new()).await;
    let agent = Agent::explicit("allow = ['*.example.com:443']", dns.resolver()).await;
    let answer = connect(&agent, "typo.example.com", 443).await;
    assert!(answer.starts_with("HTTP/1.1 502 ") && answer.contains("typo.example.com"), "{answer}");
    let refused = agent.refusal(RefusalReason::NameUnresolved).await;
    assert_eq!(refused.detail, "resolving typo.example.com: it has no address");
    assert!(dns.asked().iter().all(|asked| asked.starts_with("typo.example.com ")), "as it stands: {:?}", dns.asked());
    let events = agent.stop().await;
    let note = |event: &&sidewarden_proto::event::Event| matches!(event.body(), Ok(Some(Body::ConnectionRefused(_))));
    assert_eq!(events.iter().find(note).unwrap().severity, Severity::Notice);
}
