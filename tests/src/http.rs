//! Just enough of an HTTP client for the plain endpoints of the scene: one GET, one answer.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// How long anything here may take, and how much is read.
const LIMIT: Duration = Duration::from_secs(5);
const MOST: u64 = 32 << 20;

/// The body of `path`; anything but a 200 is an error. HTTP/1.0, so that the answer ends where the connection does.
pub fn get(addr: SocketAddr, path: &str) -> Result<String> {
    let answer = ask(addr, path).with_context(|| format!("GET http://{addr}{path}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer has no end of its head")?;
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        bail!("GET http://{addr}{path}: {status}");
    }
    Ok(body.to_owned())
}

fn ask(addr: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&addr, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    // In one piece: who answers after half of a request and hangs up would reset the connection.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {addr}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(MOST).read_to_string(&mut answer)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answering(answer: &'static str) -> SocketAddr {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 512];
            let _ = stream.read(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        });
        addr
    }

    #[test]
    fn only_a_200_is_an_answer() {
        assert_eq!(get(answering("HTTP/1.0 200 OK\r\n\r\nyes"), "/").unwrap(), "yes");
        for answer in ["HTTP/1.0 500 Oops\r\n\r\nno", "garbage", "", "HTTP/1.0\r\n\r\n"] {
            assert!(get(answering(answer), "/").is_err(), "{answer:?}");
        }
    }
}
