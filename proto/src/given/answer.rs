//! What is said over the SPIFFE Workload API: the messages of `FetchX509SVID` and their frames, bytes to types, no socket.
//!
//! It is gRPC: one request without content, and a stream of whole answers, each in place of the one before. Only what an
//! X.509 identity needs is read; fields that are not known are passed over, as protobuf demands. An answer counts as a
//! whole or not at all: half of one could lack the very root that vouches for a peer.

use std::collections::BTreeMap;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::Offered;
use crate::identity::{BadName, LeafFault, PeerName, SpiffeId, TrustDomain, Usage, judge_root};
use crate::time::Timestamp;
use crate::tls::{Credential, TlsError, Trust, verify_chain};

/// The path of the call.
pub const FETCH_X509_SVID: &str = "/SpiffeWorkloadAPI/FetchX509SVID";
/// A header that every request must have, so that no web page can make one (SPIFFE Workload API, section 4).
pub const SECURITY_HEADER: (&str, &str) = ("workload.spiffe.io", "true");
/// The request: a frame that is not compressed and has no content.
pub const REQUEST: [u8; PREFIX] = [0; PREFIX];

/// Before each message: whether it is compressed, and its length.
const PREFIX: usize = 5;
/// Most bytes of an answer; a bundle has a few KiB for each trust domain.
const MAX_ANSWER: usize = 4 << 20;
/// Most certificates of one list.
const MAX_CERTIFICATES: usize = 256;
/// Most trust domains, identities or revocation lists.
const MAX_ITEMS: usize = 256;

/// Why an answer does not count.
#[derive(Debug, thiserror::Error)]
pub enum AnswerFault {
    /// The frame is compressed, which was not offered.
    #[error("a frame of the Workload API is compressed, which nobody asked for")]
    Compressed,
    /// Larger than any answer.
    #[error("an answer of {0} bytes is over the limit of {MAX_ANSWER}")]
    TooLarge(usize),
    /// No protobuf of this kind.
    #[error("the answer cannot be read: {0}")]
    Malformed(&'static str),
    /// There is no identity in it.
    #[error("the answer has no identity in it: no registration entry of SPIRE fits this workload")]
    Empty,
    /// None with the name that is wanted.
    #[error("none of its identities is {wanted}; it has {found}")]
    NotOffered {
        /// Whom we are to be.
        wanted: SpiffeId,
        /// Whom we could be.
        found: String,
    },
    /// A name that breaks the rules.
    #[error(transparent)]
    Name(#[from] BadName),
    /// A certificate list that holds something else.
    #[error("{what}: {fault}")]
    Certificates {
        /// Which list.
        what: String,
        /// What is wrong.
        fault: LeafFault,
    },
    /// A list without a certificate.
    #[error("{0} is empty")]
    NoCertificates(String),
    /// The certificate names somebody else than the answer does.
    #[error("the certificate names {certificate}, the answer says {answer}")]
    OtherName {
        /// By the certificate.
        certificate: String,
        /// By the answer.
        answer: SpiffeId,
    },
    /// Key and certificate cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The certificate is not vouched for by the bundle it came with, or does not hold now.
    #[error("the certificate of {0} does not verify with the bundle it came with: {1}")]
    Unverified(SpiffeId, String),
}

/// Cuts the stream into messages.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
}

impl Frames {
    /// Takes what came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, if it is there.
    pub fn next_message(&mut self) -> Result<Option<Vec<u8>>, AnswerFault> {
        let Some(([compressed, length @ ..], rest)) = self.bytes.split_first_chunk::<PREFIX>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if *compressed != 0 {
            return Err(AnswerFault::Compressed);
        }
        if length > MAX_ANSWER {
            return Err(AnswerFault::TooLarge(length));
        }
        let Some(message) = rest.get(..length).map(<[u8]>::to_vec) else { return Ok(None) };
        self.bytes.drain(..PREFIX + length);
        Ok(Some(message))
    }

    /// Whether the stream has been cut within a message.
    pub fn is_mid_message(&self) -> bool {
        !self.bytes.is_empty()
    }
}

/// An identity that is offered.
#[derive(Debug)]
pub struct Svid {
    /// Its name.
    pub id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    bundle: Vec<CertificateDer<'static>>,
}

/// A whole answer, looked through as far as that goes without a clock.
#[derive(Debug)]
pub struct Answer {
    /// In the order of the answer: the first is the one for whoever does not choose.
    pub svids: Vec<Svid>,
    /// The roots of other trust domains.
    pub foreign: BTreeMap<TrustDomain, Vec<CertificateDer<'static>>>,
}

impl Answer {
    /// Reads a message.
    pub fn from_bytes(message: &[u8]) -> Result<Answer, AnswerFault> {
        let mut answer = Answer { svids: Vec::new(), foreign: BTreeMap::new() };
        let mut fields = Fields(message);
        while let Some((number, value)) = fields.next_field()? {
            match number {
                1 => answer.svids.push(read_svid(value)?),
                3 => {
                    let (domain, roots) = read_foreign(value)?;
                    answer.foreign.insert(domain, roots);
                }
                // 2 are revocation lists: those of `trust.crls` alone count, so that one place says who is revoked.
                _ => {}
            }
            if answer.svids.len().max(answer.foreign.len()) > MAX_ITEMS {
                return Err(AnswerFault::Malformed("it has more than 256 items of a kind"));
            }
        }
        if answer.svids.is_empty() { Err(AnswerFault::Empty) } else { Ok(answer) }
    }

    /// The identity called `wanted`, or the first; it holds at `now` and its own bundle vouches for it.
    pub fn choose(&self, wanted: Option<&SpiffeId>, now: Timestamp) -> Result<Offered, AnswerFault> {
        let found = self.svids.iter().map(|svid| svid.id.as_str()).collect::<Vec<_>>().join(", ");
        let svid = self.svids.iter().find(|svid| wanted.is_none_or(|wanted| svid.id == *wanted));
        let not_offered = |wanted: &SpiffeId| AnswerFault::NotOffered { wanted: wanted.clone(), found };
        let Svid { id, chain, key, bundle } = svid.ok_or_else(|| wanted.map_or(AnswerFault::Empty, not_offered))?;
        let mut trust = Trust::single(id.trust_domain(), bundle.clone());
        let verified = verify_chain(chain, &trust, Usage::Client, now);
        verified.map_err(|error| AnswerFault::Unverified(id.clone(), error.to_string()))?;
        let credential = Credential::from_der(chain.clone(), key.clone_key())?;
        if credential.peer().name != PeerName::Spiffe(id.clone()) {
            return Err(AnswerFault::OtherName { certificate: credential.peer().name.to_string(), answer: id.clone() });
        }
        for (domain, roots) in self.foreign.clone() {
            trust.domains.entry(domain).or_insert(roots);
        }
        Ok(Offered { credential, workload: id.clone(), trust })
    }
}

fn read_svid(message: &[u8]) -> Result<Svid, AnswerFault> {
    let (mut id, mut chain, mut key, mut bundle) = (None, &[][..], &[][..], &[][..]);
    let mut fields = Fields(message);
    while let Some((number, value)) = fields.next_field()? {
        match number {
            1 => id = Some(text(value)?.parse::<SpiffeId>()?),
            2 => chain = value,
            3 => key = value,
            4 => bundle = value,
            _ => {}
        }
    }
    let id = id.ok_or(AnswerFault::Malformed("an identity has no name"))?;
    let chain = certificates(chain, &format!("the certificate of {id}"))?;
    let bundle = roots(bundle, &format!("the bundle of {}", id.trust_domain()))?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.to_vec()));
    Ok(Svid { id, chain, key, bundle })
}

/// An entry of the map of foreign bundles.
fn read_foreign(message: &[u8]) -> Result<(TrustDomain, Vec<CertificateDer<'static>>), AnswerFault> {
    let (mut domain, mut bundle) = (None, &[][..]);
    let mut fields = Fields(message);
    while let Some((number, value)) = fields.next_field()? {
        match number {
            1 => domain = Some(text(value)?),
            2 => bundle = value,
            _ => {}
        }
    }
    let Some(name) = domain else { return Err(AnswerFault::Malformed("a foreign bundle has no trust domain")) };
    let domain: TrustDomain = name.strip_prefix("spiffe://").unwrap_or(name).parse()?;
    let roots = roots(bundle, &format!("the bundle of {domain}"))?;
    Ok((domain, roots))
}

fn text(value: &[u8]) -> Result<&str, AnswerFault> {
    std::str::from_utf8(value).map_err(|_| AnswerFault::Malformed("a name is no text"))
}

/// Certificates in DER, one behind the other.
fn certificates(mut bytes: &[u8], what: &str) -> Result<Vec<CertificateDer<'static>>, AnswerFault> {
    let fault = |fault| AnswerFault::Certificates { what: what.to_owned(), fault };
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (rest, _) = X509Certificate::from_der(bytes).map_err(|e| fault(LeafFault::Unreadable(e.to_string())))?;
        found.push(CertificateDer::from(bytes[..bytes.len() - rest.len()].to_vec()));
        bytes = rest;
        if found.len() > MAX_CERTIFICATES {
            return Err(fault(LeafFault::Unreadable(format!("it has more than {MAX_CERTIFICATES} certificates"))));
        }
    }
    if found.is_empty() { Err(AnswerFault::NoCertificates(what.to_owned())) } else { Ok(found) }
}

fn roots(bytes: &[u8], what: &str) -> Result<Vec<CertificateDer<'static>>, AnswerFault> {
    let found = certificates(bytes, what)?;
    let fault = |fault| AnswerFault::Certificates { what: what.to_owned(), fault };
    found.iter().try_for_each(|root| judge_root(root)).map_err(fault)?;
    Ok(found)
}

/// The fields of a protobuf message that have a length; numbers are passed over.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn next_field(&mut self) -> Result<Option<(u64, &'a [u8])>, AnswerFault> {
        while !self.0.is_empty() {
            let tag = self.varint()?;
            match tag & 7 {
                0 => drop(self.varint()?),
                1 => drop(self.take(8)?),
                5 => drop(self.take(4)?),
                2 => {
                    let length = usize::try_from(self.varint()?).unwrap_or(usize::MAX);
                    return Ok(Some((tag >> 3, self.take(length)?)));
                }
                _ => return Err(AnswerFault::Malformed("it has a field of a kind that is not in use")),
            }
        }
        Ok(None)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], AnswerFault> {
        let cut = AnswerFault::Malformed("it ends within a field");
        let (taken, rest) = self.0.split_at_checked(length).ok_or(cut)?;
        self.0 = rest;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64, AnswerFault> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(AnswerFault::Malformed("a number has no end"))
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};

    use super::*;
    use crate::tls::tests::Authority;

    const WEB: &str = "spiffe://td/shop/web";
    const ORDERS: &str = "spiffe://td/shop/orders";

    /// A field with a length.
    fn field(number: u8, value: &[u8]) -> Vec<u8> {
        let mut bytes = vec![number << 3 | 2];
        let mut length = value.len();
        while length >= 0x80 {
            bytes.push(length as u8 | 0x80);
            length >>= 7;
        }
        bytes.push(length as u8);
        [&bytes, value].concat()
    }

    fn svid_of(ca: &Authority, uri: &str, says: &str) -> Vec<u8> {
        let (chain, key) = ca.issue_raw(uri);
        let fields =
            [field(1, says.as_bytes()), field(2, &chain), field(3, &key), field(4, ca.root()), field(5, b"hint")];
        field(1, &fields.concat())
    }

    fn foreign(name: &str, roots: &[u8]) -> Vec<u8> {
        field(3, &[field(1, name.as_bytes()), field(2, roots)].concat())
    }

    fn choose(message: &[u8], wanted: Option<&str>) -> Result<Offered, String> {
        let answer = Answer::from_bytes(message).map_err(|fault| fault.to_string())?;
        let wanted = wanted.map(|id| id.parse().unwrap());
        answer.choose(wanted.as_ref(), Timestamp::now()).map_err(|fault| fault.to_string())
    }

    #[test]
    fn an_answer_gives_an_identity_with_the_roots_of_each_domain() {
        let (ca, partner) = (Authority::new("td"), Authority::new("partner.example"));
        let unknown = [&[9 << 3, 0x96, 1, 10 << 3 | 1][..], &[0; 8], &[11 << 3 | 5][..], &[0; 4]].concat();
        let message = [
            unknown,
            svid_of(&ca, WEB, WEB),
            svid_of(&ca, ORDERS, ORDERS),
            foreign("spiffe://partner.example", partner.root()),
            foreign("bare.example", &[partner.root(), partner.root()].concat()),
        ]
        .concat();
        let first = choose(&message, None).unwrap();
        assert_eq!(first.workload.as_str(), WEB);
        let domains: Vec<_> = first.trust.domains.iter().map(|(name, roots)| (name.as_str(), roots.len())).collect();
        assert_eq!(domains, [("bare.example", 2), ("partner.example", 1), ("td", 1)]);
        assert_eq!(choose(&message, Some(ORDERS)).unwrap().workload.as_str(), ORDERS);
        let none = choose(&message, Some("spiffe://td/shop/db")).unwrap_err();
        assert!(none.contains(WEB) && none.contains("shop/db"), "{none}");
    }

    #[test]
    fn what_is_empty_or_broken_is_refused_with_its_own_words() {
        let (ca, other) = (Authority::new("td"), Authority::new("td"));
        let good = svid_of(&ca, WEB, WEB);
        let (chain, key) = ca.issue_raw(WEB);
        let svid = |id: &str, chain: &[u8], key: &[u8], bundle: &[u8]| {
            let fields = [field(1, id.as_bytes()), field(2, chain), field(3, key), field(4, bundle)];
            field(1, &fields.concat())
        };
        let stranger = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap().serialize_der();
        let expired = ca.issue_expired_raw(WEB);
        for (message, says) in [
            (vec![], "has no identity"),
            (foreign("partner.example", ca.root()), "has no identity"),
            (svid(WEB, &chain, &stranger, ca.root()), "does not belong"),
            (svid(WEB, &chain, b"key", ca.root()), "key"),
            (svid(WEB, &chain, b"", ca.root()), "key"),
            (svid(WEB, b"", &key, ca.root()), "the certificate of spiffe://td/shop/web is empty"),
            (svid(WEB, &chain, &key, b""), "the bundle of td is empty"),
            (svid(WEB, &chain, &key, &chain), "the bundle of td"),
            (svid(WEB, &chain, &key, other.root()), "does not verify"),
            (svid(WEB, &expired.0, &expired.1, ca.root()), "does not verify"),
            (svid(ORDERS, &chain, &key, ca.root()), "the answer says spiffe://td/shop/orders"),
            (svid("spiffe://td", &chain, &key, ca.root()), "no SPIFFE ID"),
            (field(1, &field(2, &chain)), "an identity has no name"),
            ([good.clone(), foreign("UPPER", ca.root())].concat(), "no trust domain"),
            ([good.clone(), foreign("partner.example", b"")].concat(), "the bundle of partner.example is empty"),
            ([good.clone(), foreign("partner.example", &chain)].concat(), "the bundle of partner.example"),
            ([good.clone(), field(3, &[])].concat(), "has no trust domain"),
            ([good.clone(), vec![3]].concat(), "not in use"),
            ([good.clone(), vec![0xff; 11]].concat(), "has no end"),
        ] {
            let said = choose(&message, None).unwrap_err();
            assert!(said.contains(says), "`{said}` instead of `{says}`");
        }
    }

    #[test]
    fn a_message_that_is_cut_anywhere_is_no_answer() {
        let ca = Authority::new("td");
        let message = [svid_of(&ca, WEB, WEB), foreign("partner.example", ca.root())].concat();
        let first = svid_of(&ca, WEB, WEB).len();
        for length in 0..message.len() {
            let whole = Answer::from_bytes(&message[..length]);
            // Cut between two fields it is a smaller answer, which is as it must be.
            assert!(whole.is_err() || length.abs_diff(first) < 8, "{length} of {}", message.len());
        }
    }

    #[test]
    fn lists_without_end_are_refused() {
        let ca = Authority::new("td");
        let many = ca.root().repeat(MAX_CERTIFICATES + 1);
        let message = [svid_of(&ca, WEB, WEB), foreign("partner.example", &many)].concat();
        assert!(choose(&message, None).unwrap_err().contains("more than 256"));
        let svids = svid_of(&ca, WEB, WEB).repeat(MAX_ITEMS + 1);
        assert!(choose(&svids, None).unwrap_err().contains("more than 256"));
    }

    #[test]
    fn frames_come_out_whole_however_they_come_in() {
        let frame = |content: &[u8]| [&[0], &(content.len() as u32).to_be_bytes()[..], content].concat();
        let stream = [frame(b"one"), frame(b""), frame(&[7; 300])].concat();
        for step in [1, 2, 7, stream.len()] {
            let (mut frames, mut found) = (Frames::default(), Vec::new());
            for part in stream.chunks(step) {
                frames.push(part);
                while let Some(message) = frames.next_message().unwrap() {
                    found.push(message);
                }
            }
            assert_eq!(found, [b"one".to_vec(), vec![], vec![7; 300]], "in steps of {step}");
            assert!(!frames.is_mid_message());
        }
        let fault = |bytes: &[u8]| {
            let mut frames = Frames::default();
            frames.push(bytes);
            frames.next_message()
        };
        assert!(matches!(fault(&[1, 0, 0, 0, 0]), Err(AnswerFault::Compressed)));
        assert!(matches!(fault(&[0, 0xff, 0xff, 0xff, 0xff]), Err(AnswerFault::TooLarge(_))));
        assert!(matches!(fault(&[0, 0, 0, 0]), Ok(None)));
    }
}
