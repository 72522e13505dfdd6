//! A resumed handshake does not run the verifier: whoever was let in once would be let in again, whatever has happened
//! since. So nothing may ever be resumed, whatever the client offers.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, HandshakeKind, SignatureScheme};
use sidewarden_collector::fleet::{self, Asked};
use sidewarden_proto::directive::Target;
use sidewarden_proto::identity::Sha256;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::spki_of;
use sidewarden_proto::wire;
use sidewarden_tests::command::run;
use tokio_rustls::TlsConnector;

use crate::gate::{BOTH, Gate, answer_of, dial_from, elsewhere, name, says, trusting};
use crate::tools::{finish, stage};
use crate::world::eventually;

impl Gate {
    /// Puts a key on the collector's deny list, and waits until the agent runs that directive.
    pub async fn deny(&self, spki: Sha256) {
        let core = &self.world.collector().core;
        let asked = Asked { what: Target::Key { spki }, why: "stolen".into(), confirmed: false };
        fleet::revoke(&core.issuer, &core.directives, &core.fleet, asked, Timestamp::now()).unwrap();
        let identity = self.orders.app.identity.clone();
        let has_it = async || {
            let identity = identity.borrow().clone();
            identity.is_some_and(|i| i.directive.as_ref().is_some_and(|d| !d.deny.is_empty())).then_some(())
        };
        eventually(|| "the agent did not get the deny list".into(), has_it).await;
    }
}

/// One visit; how its handshake went.
async fn visit(gate: &Gate, source: Ipv4Addr, config: &Arc<ClientConfig>) -> std::io::Result<HandshakeKind> {
    let tcp = dial_from(source, gate.address()).await;
    let mut stream = TlsConnector::from(config.clone()).connect(name(), tcp).await?;
    says(&mut stream, b"hello").await?;
    Ok(stream.get_ref().1.handshake_kind().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_keeps_sessions_shakes_hands_in_full_and_a_revoked_one_in_vain() {
    for versions in [&BOTH[..1], &BOTH[1..]] {
        let gate = Gate::open().await;
        let shown = gate.web();
        let config = Arc::new(trusting(&shown, versions));
        for _ in 0..3 {
            assert_eq!(visit(&gate, elsewhere(), &config).await.unwrap(), HandshakeKind::Full, "{versions:?}");
        }
        gate.deny(spki_of(&shown.chain[0]).unwrap()).await;
        let source = elsewhere();
        let error = visit(&gate, source, &config).await.unwrap_err();
        let (reason, detail) = gate.event_about(source).await;
        assert_eq!(reason, "revoked", "{detail}; the client saw {:?}", answer_of(&error));
    }
}

/// OpenSSL's client, which writes down what it is offered and offers it again.
#[tokio::test(flavor = "multi_thread")]
async fn openssl_finds_nothing_to_resume() {
    let (gate, dir) = stage().await;
    let address = gate.address().to_string();
    for version in ["-tls1_2", "-tls1_3"] {
        let session = dir.path().join("session");
        let _ = std::fs::remove_file(&session);
        let client = |more: &[&str]| {
            let base = ["s_client", "-connect", &address, version, "-cert", "chain.pem", "-cert_chain", "chain.pem"];
            let visit = run("openssl", base).args(["-key", "key.pem", "-ign_eof"]).args(more);
            // The workload answers and ends: whatever ticket there was would be there by then.
            finish(visit.input("GET / HTTP/1.0\r\n\r\n"), dir.path())
        };
        let first = client(&["-sess_out", "session"]);
        assert!(first.stdout.contains("\nNew, TLSv1.") && first.stdout.contains("hello\n"), "{version}: {first:?}");
        assert!(!first.stdout.contains("Post-Handshake New Session Ticket"), "{version}: {}", first.stdout);
        if session.exists() {
            let second = client(&["-sess_in", "session"]);
            assert!(
                second.stdout.contains("\nNew, TLSv1.") && !second.stdout.contains("Reused"),
                "{version}: {second:?}"
            );
        }
    }
}

/// Counts how often a server's certificate is judged: a resumed handshake shows none.
#[derive(Debug, Default)]
struct Counting(AtomicUsize);

impl ServerCertVerifier for Counting {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.0.fetch_add(1, Relaxed);
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        sidewarden_proto::tls::provider().signature_verification_algorithms.supported_schemes()
    }
}

/// The event channel is mutual TLS too: QUIC, with a client that would resume and would send early data.
#[tokio::test(flavor = "multi_thread")]
async fn the_collectors_quic_resumes_nothing_and_takes_no_early_data() {
    let gate = Gate::open().await;
    let counting = Arc::new(Counting::default());
    let mut config = trusting(&gate.web(), &BOTH[..1]);
    config.dangerous().set_certificate_verifier(counting.clone());
    config.alpn_protocols = vec![wire::ALPN.to_vec()];
    config.enable_early_data = true;
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
    let mut endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
    for visit in 1..=3 {
        let connecting = endpoint.connect(gate.world.agents, "collector").unwrap();
        let connection = match connecting.into_0rtt() {
            Ok(_) => panic!("visit {visit}: the collector took early data"),
            Err(connecting) => connecting.await.unwrap(),
        };
        // Until the collector says something, a ticket could still be on its way.
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(b"no frame of ours").await.unwrap();
        let _ = receive.read(&mut [0; 64]).await;
        connection.close(0u32.into(), b"");
        endpoint.wait_idle().await;
        assert_eq!(counting.0.load(Relaxed), visit, "each handshake shows the collector's certificate");
    }
}
