//! A gigabyte each way, and ten thousand connections, one after another.

use std::net::SocketAddr;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sidewarden_tests::command::run;
use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::pair::{CANARY, Pair, client, has, talk};
use crate::web::nginx;
use crate::world::{echo, says};

const GIBIBYTE: u64 = 1 << 30;
const KEY: &str = "00112233445566778899aabbccddeeff";

fn sha256(path: &Path) -> String {
    let said = talk(run("sha256sum", [path]));
    said.split_whitespace().next().unwrap_or_default().to_owned()
}

/// A file that does not repeat itself, so that a part in the wrong place shows: the key stream of a cipher.
fn noise(path: &Path) {
    let text = format!(
        "head -c {GIBIBYTE} /dev/zero | openssl enc -aes-128-ctr -nosalt -K {KEY} -iv {KEY} > '{}'",
        path.display()
    );
    talk(run("sh", ["-c", &text]));
    assert_eq!(std::fs::metadata(path).unwrap().len(), GIBIBYTE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gibibyte_up_and_down_is_the_same_bytes() {
    if !has("bulk", &["nginx", "curl", "openssl"]) {
        return;
    }
    let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let service = tokio::task::block_in_place(|| nginx(dir.path(), false));
    let (sent, kept) = (dir.path().join("noise"), dir.path().join("www/put/noise"));
    noise(&sent);
    let pair = Pair::before(service.address, &["HTTP/1.", "Content-Length"]).await;
    let url = format!("http://{}/put/noise", pair.door());
    let curl = |args: &[&str]| {
        talk(client("curl", &["--silent", "--show-error", "--fail", "--noproxy", "*"]).args(args).args([&url]))
    };
    curl(&["-T", sent.to_str().unwrap()]);
    let expected = sha256(&sent);
    assert_eq!(sha256(&kept), expected, "what arrived is what was sent");
    std::fs::remove_file(&sent).unwrap();
    curl(&["-o", sent.to_str().unwrap()]);
    assert_eq!(sha256(&sent), expected, "what came back is what was kept");
    let counted = pair.settle(2..=2).await;
    for bytes in [counted.up, counted.down] {
        assert!((GIBIBYTE..GIBIBYTE + 4096).contains(&bytes), "{counted:?}");
    }
}

/// More than either agent takes handshakes at a time: those that are too many wait, and none is refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_connections_at_once_all_get_through() {
    const AT_ONCE: u64 = 1_000;
    room_for_descriptors(AT_ONCE);
    let pair = Pair::before(echo().await, &[]).await;
    let door = pair.door();
    let visitors: Vec<_> = (0..AT_ONCE).map(|_| tokio::spawn(stay(door))).collect();
    let mut open = Vec::new();
    for visitor in visitors {
        open.push(visitor.await.unwrap());
    }
    drop(open);
    pair.settle(AT_ONCE..=AT_ONCE).await;
}

/// A word and its echo, and no end yet.
async fn stay(door: SocketAddr) -> TcpStream {
    let mut socket = TcpStream::connect(door).await.unwrap();
    assert_eq!(says(&mut socket, CANARY.as_bytes()).await.unwrap(), CANARY.as_bytes());
    socket
}

/// For both ends of each connection of client, agents, wire and server, which all are in this process.
fn room_for_descriptors(connections: u64) {
    let needed = 10 * connections + 1_000;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(hard >= needed, "this test needs {needed} descriptors and may have {hard}: raise the limit (ulimit -Hn)");
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 20), hard).unwrap();
}

const CONNECTIONS: u64 = 10_000;
const AT_A_TIME: u64 = 16;

/// One after another: a word, its echo, the end.
async fn visit(door: SocketAddr, times: u64) {
    for number in 0..times {
        let word = format!("{CANARY} {number}");
        let mut socket = TcpStream::connect(door).await.unwrap();
        let answer = says(&mut socket, word.as_bytes()).await.unwrap();
        assert_eq!(String::from_utf8(answer).unwrap(), word);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_short_connections_are_each_answered_and_counted_once() {
    let pair = Pair::before(echo().await, &[]).await;
    let visitors: Vec<_> = (0..AT_A_TIME).map(|_| tokio::spawn(visit(pair.door(), CONNECTIONS / AT_A_TIME))).collect();
    for visitor in visitors {
        visitor.await.unwrap();
    }
    let counted = pair.settle(CONNECTIONS..=CONNECTIONS).await;
    assert_eq!(counted.up, counted.down, "an echo");
}
