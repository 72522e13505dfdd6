//! What the tools that auditors use say of a listener: versions, ciphers, renegotiation, resumption.
//!
//! None of them was made for a port that demands a client certificate. What each can do is said where it is used.

use std::path::Path;
use std::time::Duration;

use sidewarden_tests::command::{Done, Run, run};
use sidewarden_tests::{packages, suite};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::gate::Gate;

const PATIENCE: Duration = Duration::from_secs(120);

/// Answers every request of HTTP with a word.
async fn web_server() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = [0; 4096];
                if socket.read(&mut request).await.is_ok_and(|count| count > 0) {
                    let _ = socket.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nhello\n").await;
                }
            });
        }
    });
    address
}

/// A gate in front of a web server, and a good client's certificate in files.
pub async fn stage() -> (Gate, TempDir) {
    let (gate, dir) = (Gate::before(web_server().await, "").await, TempDir::new().unwrap());
    gate.web().write(dir.path());
    (gate, dir)
}

pub fn finish(run: Run, dir: &Path) -> Done {
    tokio::task::block_in_place(|| run.current_dir(dir).limit(PATIENCE).finish()).unwrap()
}

/// Whether `program` is there; the rule of all tests for what is not.
fn has(program: &str) -> bool {
    match packages::find(program) {
        Ok(_) => true,
        Err(why) if std::env::var_os(suite::ALLOW_SKIP).is_some() => {
            eprintln!("{} {program}: {why}", suite::SKIPPED);
            false
        }
        Err(why) => panic!("{why} (to leave this test out: {}=1)", suite::ALLOW_SKIP),
    }
}

impl Gate {
    /// A good client whose chain is its leaf alone: these tools send no more than that.
    fn short(&self) -> crate::mint::Shown {
        self.root.leaf(&crate::mint::leaf(crate::mint::WEB), &[])
    }
}

/// s_client shows its certificate, and tells of each version and cipher what came of it.
#[tokio::test(flavor = "multi_thread")]
async fn openssl_agrees_on_versions_ciphers_and_renegotiation() {
    let (gate, dir) = stage().await;
    let address = gate.address().to_string();
    let client = |args: &[&str], input: &str| {
        let base =
            ["s_client", "-connect", &address, "-cert", "chain.pem", "-cert_chain", "chain.pem", "-key", "key.pem"];
        finish(run("openssl", base).args(args).input(input), dir.path())
    };
    const GET: &str = "GET / HTTP/1.0\r\n\r\n";
    const OLD: [&str; 2] = ["-cipher", "ALL:@SECLEVEL=0"];
    for (args, good) in [
        (&["-tls1_3"][..], Ok("New, TLSv1.3")),
        (&["-tls1_2"], Ok("New, TLSv1.2")),
        (
            &["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-GCM-SHA256"],
            Ok("New, TLSv1.2, Cipher is ECDHE-ECDSA-AES128-GCM-SHA256"),
        ),
        (&["-tls1_2", "-cipher", "ECDHE-ECDSA-CHACHA20-POLY1305"], Ok("New, TLSv1.2, Cipher is ECDHE-ECDSA-CHACHA20")),
        (&["-tls1_2", "-cipher", "ECDHE-ECDSA-AES256-SHA384"], Err("alert number 40")),
        (&["-tls1_2", "-cipher", "AES256-GCM-SHA384"], Err("alert number 40")),
        (&["-tls1_3", "-ciphersuites", "TLS_AES_128_CCM_SHA256"], Err("alert number 40")),
        (&[OLD[0], OLD[1], "-tls1_1"], Err("alert number 70")),
        (&[OLD[0], OLD[1], "-tls1"], Err("alert number 70")),
    ] {
        let done = client(&[&["-ign_eof"], args].concat(), GET);
        match good {
            Ok(line) => assert!(done.stdout.contains(line) && done.stdout.contains("hello\n"), "{args:?}: {done:?}"),
            Err(alert) => {
                assert!(done.stderr.contains(alert) && !done.stdout.contains("hello\n"), "{args:?}: {done:?}")
            }
        }
    }
    // Without a certificate TLS 1.3 only notices after its own handshake.
    let bare = finish(run("openssl", ["s_client", "-connect", &address, "-tls1_3", "-ign_eof"]).input(GET), dir.path());
    assert!(bare.stderr.contains("alert number 116") && !bare.stdout.contains("hello\n"), "{bare:?}");
    // `R` on a line of its own asks for renegotiation, and is told no: the certificate is judged once.
    let again = client(&["-tls1_2"], "R\n");
    assert!(again.stderr.contains("RENEGOTIATING") && again.stderr.contains("no renegotiation"), "{again:?}");
    assert_eq!(again.stderr.matches("depth=0").count(), 1, "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_agrees_on_versions_and_needs_its_certificate() {
    if !has("curl") {
        return;
    }
    let (gate, dir) = stage().await;
    let url = format!("https://{}/", gate.address());
    // -k: what curl does not have is our root; who we are is not what is asked here.
    let curl = |args: &[&str]| finish(run("curl", ["-sSk", "--noproxy", "*"]).args(args).args([&url]), dir.path());
    let shown = ["--cert", "chain.pem", "--key", "key.pem"];
    for (args, good) in [
        (&["--tlsv1.3"][..], true),
        (&["--tlsv1.2", "--tls-max", "1.2"], true),
        (&["--tlsv1.0", "--tls-max", "1.1", "--ciphers", "ALL:@SECLEVEL=0"], false),
    ] {
        let done = curl(&[&shown[..], args].concat());
        assert_eq!(done.stdout == "hello\n", good, "{args:?}: {done:?}");
        assert!(good || done.stderr.contains("alert protocol version"), "{args:?}: {done:?}");
    }
    let bare = curl(&[]);
    assert!(bare.stdout.is_empty() && bare.stderr.contains("certificate required"), "{bare:?}");
}

/// sslscan shows a certificate, but only a leaf.
#[tokio::test(flavor = "multi_thread")]
async fn sslscan_agrees_on_versions_ciphers_and_renegotiation() {
    if !has("sslscan") {
        return;
    }
    let (gate, dir) = stage().await;
    gate.short().write(dir.path());
    let scan = ["--certs=chain.pem", "--pk=key.pem", "--xml=out.xml", "--no-colour"];
    finish(run("sslscan", scan).args([gate.address().to_string()]), dir.path());
    let xml = std::fs::read_to_string(dir.path().join("out.xml")).unwrap();
    for (kind, version, enabled) in
        [("ssl", "2", 0), ("ssl", "3", 0), ("tls", "1.0", 0), ("tls", "1.1", 0), ("tls", "1.2", 1), ("tls", "1.3", 1)]
    {
        let line = format!("<protocol type=\"{kind}\" version=\"{version}\" enabled=\"{enabled}\" />");
        assert!(xml.contains(&line), "{line}\n{xml}");
    }
    assert!(xml.contains("<renegotiation supported=\"0\""), "{xml}");
    let mut ciphers: Vec<&str> = xml.split("cipher=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    ciphers.sort_unstable();
    let expected = [
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        "TLS_AES_128_GCM_SHA256",
        "TLS_AES_256_GCM_SHA384",
        "TLS_CHACHA20_POLY1305_SHA256",
    ];
    assert_eq!(ciphers, expected, "{xml}");
}

/// testssl.sh 3.0 cannot show a certificate. It does most by sockets of its own and needs no more than a ServerHello; its
/// checks that need a whole handshake see the refusal, which is why resumption and renegotiation have tests of their own.
#[tokio::test(flavor = "multi_thread")]
async fn testssl_agrees_on_versions_ciphers_and_no_resumption() {
    if !has("testssl") {
        return;
    }
    let (gate, dir) = stage().await;
    let ip = gate.address().ip().to_string();
    let args =
        ["--quiet", "--color", "0", "--warnings", "batch", "--nodns", "none", "--jsonfile", "out.json", "--ip", &ip];
    finish(run("testssl", args).args(["-p", "-s", "-S", "-R", &gate.address().to_string()]), dir.path());
    let found: Vec<serde_json::Value> =
        serde_json::from_str(&std::fs::read_to_string(dir.path().join("out.json")).unwrap()).unwrap();
    let finding =
        |id: &str| found.iter().find(|f| f["id"] == id).and_then(|f| f["finding"].as_str()).unwrap_or("nothing");
    for (id, expected) in [
        ("SSLv2", "not offered"),
        ("SSLv3", "not offered"),
        ("TLS1", "not offered"),
        ("TLS1_1", "not offered"),
        ("TLS1_2", "offered"),
        ("TLS1_3", "offered with final"),
        ("cipherlist_NULL", "not offered"),
        ("cipherlist_aNULL", "not offered"),
        ("cipherlist_EXPORT", "not offered"),
        ("cipherlist_LOW", "not offered"),
        ("cipherlist_3DES_IDEA", "not offered"),
        ("cipherlist_AVERAGE", "not offered"),
        ("cipherlist_STRONG", "offered"),
        ("TLS_session_ticket", "no -- no lifetime advertised"),
        ("SSL_sessionID_support", "no"),
        ("sessionresumption_ticket", "not supported"),
        ("sessionresumption_ID", "No Session ID, no resumption"),
        ("secure_renego", "supported"),
    ] {
        assert_eq!(finding(id), expected, "{id}");
    }
}
