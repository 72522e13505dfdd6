//! Certificates out of whatever somebody has been sent: PEM, DER, PKCS#7 (`.p7b`), several of them, in any order.
//!
//! All of it is bytes from outside: lengths are checked before they are used, and there is a limit on everything.

use base64::Engine;
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Most bytes of a file: a bundle of every public CA has a quarter of a MiB.
pub const MAX_FILE: usize = 4 << 20;
/// Most certificates of a file.
const MAX_CERTIFICATES: usize = 1000;
/// signedData of PKCS#7: 1.2.840.113549.1.7.2
const SIGNED_DATA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x02];

/// Why there are no certificates.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadFault {
    /// Larger than anything of this kind.
    #[error("it has more than {} MiB, which no certificate file has", MAX_FILE >> 20)]
    TooLarge,
    /// Many.
    #[error("it has more than {MAX_CERTIFICATES} certificates")]
    TooMany,
    /// None.
    #[error("it holds no certificate: PEM, DER and PKCS#7 (.p7b) are read")]
    None,
    /// A block of PEM that is broken.
    #[error("the PEM block {0} is broken: {1}")]
    Pem(usize, &'static str),
    /// A certificate that is none.
    #[error("certificate {0} cannot be read: {1}")]
    Certificate(usize, String),
    /// PKCS#7 that is broken or of another kind.
    #[error("the PKCS#7 cannot be read: {0}")]
    Pkcs7(&'static str),
    /// A PKCS#12 or another container with a key.
    #[error(
        "this looks like PKCS#12, which holds a private key: take the certificates out with `openssl pkcs12 -nokeys`"
    )]
    Pkcs12,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// As they stand in the file, each once.
    pub certificates: Vec<CertificateDer<'static>>,
    /// A private key lies in the file, too. It was not read.
    pub has_key: bool,
}

/// Reads a file.
pub fn read(bytes: &[u8]) -> Result<Found, ReadFault> {
    if bytes.len() > MAX_FILE {
        return Err(ReadFault::TooLarge);
    }
    let (mut ders, mut has_key) = (Vec::new(), false);
    if bytes.first() == Some(&0x30) {
        ders = from_der(bytes)?;
    } else {
        for (i, block) in blocks(bytes)?.into_iter().enumerate() {
            match block.label.as_str() {
                "CERTIFICATE" | "X509 CERTIFICATE" => ders.push(block.content),
                "PKCS7" | "CMS" => ders.extend(from_pkcs7(&block.content)?),
                label if label.ends_with("PRIVATE KEY") => has_key = true,
                "TRUSTED CERTIFICATE" => {
                    return Err(ReadFault::Pem(
                        i + 1,
                        "OpenSSL's TRUSTED CERTIFICATE is not read: write it as CERTIFICATE with `openssl x509`",
                    ));
                }
                _ => {}
            }
        }
    }
    let mut certificates = Vec::new();
    for (i, der) in ders.into_iter().enumerate() {
        check(i + 1, &der)?;
        let certificate = CertificateDer::from(der);
        if !certificates.contains(&certificate) {
            certificates.push(certificate);
        }
        if certificates.len() > MAX_CERTIFICATES {
            return Err(ReadFault::TooMany);
        }
    }
    if certificates.is_empty() { Err(ReadFault::None) } else { Ok(Found { certificates, has_key }) }
}

fn check(number: usize, der: &[u8]) -> Result<(), ReadFault> {
    match X509Certificate::from_der(der) {
        Ok(([], _)) => Ok(()),
        Ok((rest, _)) => Err(ReadFault::Certificate(number, format!("{} bytes follow it", rest.len()))),
        Err(error) => Err(ReadFault::Certificate(number, error.to_string().chars().take(120).collect())),
    }
}

/// One block of PEM.
struct Block {
    label: String,
    content: Vec<u8>,
}

fn blocks(bytes: &[u8]) -> Result<Vec<Block>, ReadFault> {
    let (mut found, mut open): (Vec<Block>, Option<(String, String)>) = (Vec::new(), None);
    for line in bytes.split(|byte| *byte == b'\n') {
        let Ok(line) = std::str::from_utf8(line).map(str::trim) else { continue };
        let number = found.len() + 1;
        match (&mut open, boundary(line, "-----BEGIN "), boundary(line, "-----END ")) {
            (None, Some(label), _) => open = Some((label.to_owned(), String::new())),
            (Some(_), Some(_), _) => return Err(ReadFault::Pem(number, "another one begins within it")),
            (Some((label, _)), _, Some(end)) if label.as_str() != end => {
                return Err(ReadFault::Pem(number, "it ends as something else than it began"));
            }
            (Some(_), _, Some(_)) => {
                let Some((label, text)) = open.take() else { continue };
                found.push(Block { content: content(number, &label, &text)?, label });
            }
            // `Key: value` headers stand before the text of an encrypted key.
            (Some((_, text)), ..) if !line.contains(':') => text.push_str(line),
            _ => {}
        }
        if found.len() > MAX_CERTIFICATES {
            return Err(ReadFault::TooMany);
        }
    }
    if open.is_some() { Err(ReadFault::Pem(found.len() + 1, "it has no end")) } else { Ok(found) }
}

fn boundary<'a>(line: &'a str, begins: &str) -> Option<&'a str> {
    line.strip_prefix(begins)?.strip_suffix("-----")
}

/// Of a private key nothing is decoded.
fn content(number: usize, label: &str, text: &str) -> Result<Vec<u8>, ReadFault> {
    if label.ends_with("PRIVATE KEY") {
        return Ok(Vec::new());
    }
    let decoded = base64::prelude::BASE64_STANDARD.decode(text);
    decoded.map_err(|_| ReadFault::Pem(number, "its text is no base64"))
}

/// One certificate, several one behind the other, or PKCS#7.
fn from_der(bytes: &[u8]) -> Result<Vec<Vec<u8>>, ReadFault> {
    if is_pkcs7(bytes) {
        return from_pkcs7(bytes);
    }
    // PFX begins with its version, 3.
    if Der(bytes).take(0x30).is_some_and(|inner| inner.starts_with(&[0x02, 0x01, 0x03])) {
        return Err(ReadFault::Pkcs12);
    }
    let (mut rest, mut found) = (bytes, Vec::new());
    while !rest.is_empty() && found.len() <= MAX_CERTIFICATES {
        let mut der = Der(rest);
        let whole = der.whole(0x30).ok_or_else(|| ReadFault::Certificate(found.len() + 1, "it is cut short".into()))?;
        found.push(whole.to_vec());
        rest = der.0;
    }
    Ok(found)
}

fn is_pkcs7(bytes: &[u8]) -> bool {
    Der(bytes).take(0x30).is_some_and(|inner| Der(inner).take(0x06) == Some(SIGNED_DATA)) || indefinite(bytes)
}

/// BER whose lengths are only known at the end; certificates never are, and some programs write PKCS#7 so.
fn indefinite(bytes: &[u8]) -> bool {
    bytes.get(1) == Some(&0x80)
}

fn from_pkcs7(bytes: &[u8]) -> Result<Vec<Vec<u8>>, ReadFault> {
    let fault = ReadFault::Pkcs7;
    if indefinite(bytes) {
        return Err(fault(
            "it is BER of indefinite length: write it anew with `openssl pkcs7 -inform DER -print_certs`",
        ));
    }
    let cut = || fault("it is cut short, or of another kind than signedData");
    let mut outer = Der(bytes);
    let mut info = Der(outer.take(0x30).ok_or_else(cut)?);
    if info.take(0x06) != Some(SIGNED_DATA) {
        return Err(fault("it is no signedData"));
    }
    let mut explicit = Der(info.take(0xa0).ok_or_else(cut)?);
    let mut signed = Der(explicit.take(0x30).ok_or_else(cut)?);
    for tag in [0x02, 0x31, 0x30] {
        signed.take(tag).ok_or_else(cut)?;
    }
    let mut list = Der(signed.take(0xa0).ok_or(fault("there are no certificates in it"))?);
    let mut found = Vec::new();
    while !list.0.is_empty() {
        found.push(list.whole(0x30).ok_or_else(cut)?.to_vec());
        if found.len() > MAX_CERTIFICATES {
            return Err(ReadFault::TooMany);
        }
    }
    Ok(found)
}

/// DER values, one behind the other.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The content of the next value, if it is of this kind.
    fn take(&mut self, tag: u8) -> Option<&'a [u8]> {
        let (head, length) = self.measure(tag)?;
        let content = self.0.get(head..head.checked_add(length)?)?;
        self.0 = &self.0[head + length..];
        Some(content)
    }

    /// The same with its head.
    fn whole(&mut self, tag: u8) -> Option<&'a [u8]> {
        let (head, length) = self.measure(tag)?;
        let (whole, rest) = self.0.split_at_checked(head.checked_add(length)?)?;
        self.0 = rest;
        Some(whole)
    }

    /// Length of the head and of the content.
    fn measure(&self, tag: u8) -> Option<(usize, usize)> {
        if *self.0.first()? != tag {
            return None;
        }
        let first = *self.0.get(1)?;
        if first < 0x80 {
            return Some((2, usize::from(first)));
        }
        let count = usize::from(first & 0x7f);
        let bytes = self.0.get(2..2 + count).filter(|bytes| (1..=4).contains(&bytes.len()))?;
        Some((2 + count, bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte))))
    }
}

#[cfg(test)]
mod tests {
    use super::super::made_up::{Ca, pem, pkcs7};
    use super::*;

    fn count(bytes: &[u8]) -> usize {
        read(bytes).unwrap().certificates.len()
    }

    #[test]
    fn certificates_come_out_of_every_form() {
        let (one, two) = (Ca::new("one").cert, Ca::new("two").cert);
        let both = vec![one.clone(), two.clone()];
        let mess = format!(
            "Bag Attributes\r\n  friendlyName: x\r\n{}\n# and\n{}",
            pem("CERTIFICATE", &one).replace('\n', "\r\n"),
            pem("CERTIFICATE", &two)
        );
        for (bytes, what) in [
            ([&one[..], &two[..]].concat(), "DER"),
            (mess.into_bytes(), "PEM with other text"),
            (pkcs7(&[&one, &two]), "PKCS#7 in DER"),
            (pem("PKCS7", &pkcs7(&[&one, &two])).into_bytes(), "PKCS#7 in PEM"),
            (
                [pem("CERTIFICATE", &one), pem("CERTIFICATE", &two), pem("CERTIFICATE", &one)].concat().into_bytes(),
                "twice",
            ),
        ] {
            assert_eq!(read(&bytes).map(|found| found.certificates), Ok(both.clone()), "{what}");
        }
        assert_eq!(count(&one), 1);
    }

    #[test]
    fn a_private_key_is_noticed_and_not_read() {
        let text = [pem("CERTIFICATE", &Ca::new("one").cert), pem("EC PRIVATE KEY", b"secret")].concat();
        assert!(read(text.as_bytes()).unwrap().has_key);
        assert_eq!(read(pem("PRIVATE KEY", b"secret").as_bytes()), Err(ReadFault::None));
    }

    #[test]
    fn what_is_cut_anywhere_is_an_error_or_less_and_never_a_panic() {
        let (one, two) = (Ca::new("one").cert, Ca::new("two").cert);
        let text = [pem("CERTIFICATE", &one), pem("CERTIFICATE", &two)].concat();
        let (der, container) = ([&one[..], &two[..]].concat(), pkcs7(&[&one, &two]));
        for (whole, least) in [(text.as_bytes(), 1), (&der[..], 1), (&container[..], 2)] {
            for length in 0..whole.len() {
                match read(&whole[..length]) {
                    Err(_) => {}
                    // Between two blocks, or within the line end of the last: what is there is whole.
                    Ok(found) => assert!(found.certificates.len() >= least, "{length} of {}", whole.len()),
                }
            }
        }
    }

    #[test]
    fn hostile_bytes_are_refused_with_a_reason() {
        let one = Ca::new("one").cert;
        let deep = [0x30, 0x84, 0xff, 0xff, 0xff, 0xff].repeat(1000);
        let long = [&[0x30, 0x88][..], &[0xff; 8]].concat();
        let ber = [&[0x30, 0x80, 0x06, 9][..], SIGNED_DATA].concat();
        let mut other_kind = pkcs7(&[&one]);
        let kind = other_kind.windows(SIGNED_DATA.len()).position(|bytes| bytes == SIGNED_DATA).unwrap();
        other_kind[kind + 8] = 3;
        for (bytes, what) in [
            (vec![], "nothing"),
            (b"hello".to_vec(), "text"),
            (vec![0x30], "a head"),
            (vec![0xff; 1 << 20], "noise"),
            (vec![0x30; 1 << 20], "heads"),
            (deep, "lengths beyond the end"),
            (long, "a length of eight bytes"),
            (ber, "BER"),
            (other_kind, "enveloped data"),
            (pkcs7(&[]), "PKCS#7 without certificates"),
            (b"-----BEGIN CERTIFICATE-----\n".to_vec(), "no end"),
            (b"-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n".to_vec(), "no base64"),
            (b"-----BEGIN CERTIFICATE-----\n-----BEGIN CERTIFICATE-----\n".to_vec(), "nested"),
            (b"-----BEGIN CERTIFICATE-----\n-----END PKCS7-----\n".to_vec(), "mixed"),
            (pem("CERTIFICATE", b"\x30\x03\x02\x01\x01").into_bytes(), "no certificate"),
            (pem("CERTIFICATE", &[&one[..], b"x"].concat()).into_bytes(), "bytes behind"),
            (vec![b'x'; MAX_FILE + 1], "huge"),
        ] {
            assert!(read(&bytes).is_err(), "{what}");
        }
        assert_eq!(read(&[0x30, 0x05, 0x02, 0x01, 0x03, 0x30, 0x00]), Err(ReadFault::Pkcs12));
    }

    #[test]
    fn a_thousand_and_one_certificates_are_too_many() {
        let many: Vec<u8> = (0..=MAX_CERTIFICATES).flat_map(|_| pem("X509 CRL", b"x").into_bytes()).collect();
        assert_eq!(read(&many), Err(ReadFault::TooMany));
    }
}
