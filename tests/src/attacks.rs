//! What an attacker does, byte by byte where it matters. Each tells what the attacker saw; whether it was caught is
//! for the collector to say.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::command::run;

/// The longest an attacker waits for an answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// Plain HTTP, whatever is spoken there.
pub fn plaintext(addr: SocketAddr) -> Result<String> {
    Ok(describe(&talk(addr, format!("GET /orders HTTP/1.1\r\nHost: {addr}\r\n\r\n").as_bytes())?))
}

/// A client that knows nothing newer than TLS 1.1.
pub fn tls11(addr: SocketAddr) -> Result<String> {
    Ok(describe(&talk(addr, &client_hello_tls11())?))
}

/// Sends `bytes`, and gives what came back until the other side had enough.
fn talk(addr: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&addr, PATIENCE).with_context(|| format!("connecting to {addr}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(bytes)?;
    let mut answer = Vec::new();
    // A reset is an answer too: nothing more comes.
    let _ = stream.take(64 << 10).read_to_end(&mut answer);
    Ok(answer)
}

/// A ClientHello of RFC 4346, in full: record, handshake, no extensions but a name.
pub fn client_hello_tls11() -> Vec<u8> {
    const TLS11: [u8; 2] = [3, 2];
    const SUITES: [u16; 4] = [0xc014, 0xc013, 0x0035, 0x002f];
    let mut hello = TLS11.to_vec();
    hello.extend([0x5a; 32]); // random
    hello.push(0); // no session
    hello.extend(u16_length(&SUITES.map(u16::to_be_bytes).concat()));
    hello.extend([1, 0]); // no compression
    let mut handshake = vec![1, 0]; // client_hello; the first byte of a length of three
    handshake.extend(u16_length(&hello));
    let mut record = vec![22]; // handshake
    record.extend(TLS11);
    record.extend(u16_length(&handshake));
    record
}

fn u16_length(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes()[..], bytes].concat()
}

/// What the attacker makes of an answer.
fn describe(answer: &[u8]) -> String {
    match answer {
        [] => "the connection closed, not a byte came back".into(),
        [21, 3, _, 0, 2, level, code, ..] => {
            let level = if *level == 2 { "fatal" } else { "warning" };
            format!("a {level} TLS alert: {}", alert(*code))
        }
        [22, 3, ..] => "the server went on with the handshake".into(),
        text => String::from_utf8_lossy(&text[..text.len().min(60)]).lines().next().unwrap_or_default().to_owned(),
    }
}

/// The names of RFC 8446, section 6, for those that a refusal may end with.
fn alert(code: u8) -> String {
    let name = match code {
        0 => "close_notify",
        10 => "unexpected_message",
        40 => "handshake_failure",
        42 => "bad_certificate",
        46 => "certificate_unknown",
        47 => "illegal_parameter",
        48 => "unknown_ca",
        50 => "decode_error",
        70 => "protocol_version",
        116 => "certificate_required",
        other => return format!("number {other}"),
    };
    name.to_owned()
}

/// A TLS 1.3 client with the certificate that [`forge`] put into `dir`.
pub fn foreign_certificate(addr: SocketAddr, dir: &Path) -> Result<String> {
    let client = run("openssl", ["s_client", "-connect", &addr.to_string(), "-tls1_3", "-ign_eof"])
        .args(["-cert", "leaf.pem", "-key", "leaf.key"])
        .current_dir(dir)
        .input("GET /orders HTTP/1.1\r\nHost: orders\r\n\r\n")
        .limit(PATIENCE)
        .finish()?;
    Ok(told_by_openssl(&client.stdout, &client.stderr))
}

/// OpenSSL tells of an alert by its number: `… SSL alert number 48`.
fn told_by_openssl(stdout: &str, stderr: &str) -> String {
    let number = stderr.rsplit_once("alert number ").and_then(|(_, rest)| rest.lines().next()?.trim().parse().ok());
    match number {
        Some(code) => describe(&[21, 3, 3, 0, 2, 2, code]),
        None if stdout.contains("HTTP/1.") => "an answer of the service".into(),
        None => describe(&[]),
    }
}

/// Makes a CA of the attacker's own in `dir`, and a certificate of it that says what a good one says.
pub fn forge(claims: &str, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"];
    let req = |args: &[&str]| run("openssl", ["req", "-x509"]).args(key).args(args).current_dir(dir).output();
    req(&["-days", "1", "-subj", "/CN=not your CA", "-keyout", "ca.key", "-out", "ca.pem"])?;
    let name = format!("subjectAltName=URI:{claims}");
    let usage = "keyUsage=critical,digitalSignature";
    let purpose = "extendedKeyUsage=serverAuth,clientAuth";
    req(&["-days", "1", "-subj", "/CN=somebody else", "-CA", "ca.pem", "-CAkey", "ca.key"]
        .iter()
        .chain(&[
            "-addext",
            &name,
            "-addext",
            usage,
            "-addext",
            purpose,
            "-addext",
            "basicConstraints=critical,CA:FALSE",
        ])
        .chain(&["-keyout", "leaf.key", "-out", "leaf.pem"])
        .copied()
        .collect::<Vec<_>>())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_hello_is_what_rfc_4346_says() {
        let hello = client_hello_tls11();
        assert_eq!(&hello[..5], [22, 3, 2, 0, u8::try_from(hello.len() - 5).unwrap()]);
        assert_eq!(&hello[5..9], [1, 0, 0, u8::try_from(hello.len() - 9).unwrap()]);
        assert_eq!(&hello[9..11], [3, 2]);
        assert_eq!(hello.len(), 9 + 2 + 32 + 1 + 2 + 8 + 2);
    }

    #[test]
    fn what_openssl_says_of_an_alert_is_told_by_its_name() {
        let error =
            "00CE:error:0A000418:SSL routines:ssl3_read_bytes:tlsv1 alert unknown ca:../s3.c:1:SSL alert number 48\n";
        for (stdout, stderr, expected) in [
            ("", error, "a fatal TLS alert: unknown_ca"),
            ("HTTP/1.1 200 OK", "", "an answer of the service"),
            ("CONNECTED", "", "the connection closed, not a byte came back"),
        ] {
            assert_eq!(told_by_openssl(stdout, stderr), expected);
        }
    }

    #[test]
    fn a_forged_certificate_says_what_a_good_one_says() {
        let dir = tempfile::tempdir().unwrap();
        forge("spiffe://t/shop/web", dir.path()).unwrap();
        let text =
            run("openssl", ["x509", "-noout", "-text", "-in", "leaf.pem"]).current_dir(dir.path()).output().unwrap();
        for part in
            ["URI:spiffe://t/shop/web", "Digital Signature", "TLS Web Client Authentication", "CN = not your CA"]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn answers_are_told_in_words() {
        for (answer, expected) in [
            (&b""[..], "the connection closed, not a byte came back"),
            (&[21, 3, 3, 0, 2, 2, 70], "a fatal TLS alert: protocol_version"),
            (&[21, 3, 3, 0, 2, 2, 99], "a fatal TLS alert: number 99"),
            (&[22, 3, 3, 0, 80], "the server went on with the handshake"),
            (b"HTTP/1.1 200 OK\r\nServer: x", "HTTP/1.1 200 OK"),
        ] {
            assert_eq!(describe(answer), expected);
        }
    }
}
