//! S3 (moto) and MongoDB's wire protocol (a stub: no server is to be had from Debian).

use sidewarden_tests::python;
use sidewarden_tests::service::{Service, free_address};
use tempfile::TempDir;

use crate::pair::{CANARY, PYTHON, Pair, has, script, script_server, talk};

#[tokio::test(flavor = "multi_thread")]
async fn s3() {
    if !has("s3", &[PYTHON]) {
        return;
    }
    let (dir, address) = (TempDir::new().unwrap(), free_address().unwrap());
    let moto = python::interpreter().unwrap().with_file_name("moto_server");
    let mut command = std::process::Command::new(moto);
    command.args(["-H", &address.ip().to_string(), "-p", &address.port().to_string()]);
    let service = tokio::task::block_in_place(|| Service::start(command, dir.path(), address)).unwrap();
    let pair = Pair::before(service.address, &["AWS4-HMAC-SHA256", "HTTP/1.", "x-amz-"]).await;
    let ([host, port], big) = (pair.host_port(), dir.path().join("big"));
    let said = talk(script("s3_talk.py", &[&host, &port, CANARY, big.to_str().unwrap()]));
    assert_eq!(said, "took back 19200000\n");
    let counted = pair.settle(1..=60).await;
    assert!(counted.up > 19_200_000 && counted.down > 19_200_000, "{counted:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn mongodb() {
    if !has("mongodb", &[PYTHON]) {
        return;
    }
    let (dir, address) = (TempDir::new().unwrap(), free_address().unwrap());
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    let command = script_server(&python::interpreter().unwrap(), "mongo_stub.py", &[&host, &port]);
    let service = tokio::task::block_in_place(|| Service::start(command, dir.path(), address)).unwrap();
    let pair = Pair::before(service.address, &["maxWireVersion", "documents", "insert"]).await;
    let [host, port] = pair.host_port();
    assert_eq!(talk(script("mongo_talk.py", &[&host, &port, CANARY, "500"])), "took back 500\n");
    // A pool of pymongo's own, and its monitor beside it.
    pair.settle(2..=6).await;
}
