//! A client that keeps whatever session it is offered comes again after what let it in has changed. It has to shake
//! hands in full, and to be refused.

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, DigitallySignedStruct, HandshakeKind, SignatureScheme, SupportedProtocolVersion};
use sidewarden_proto::tls::provider;
use tokio_rustls::TlsConnector;

use super::*;
use crate::identity::{Issued, certificates};

/// One visit: how its handshake went, once the workload has answered.
async fn visit(to: SocketAddr, config: &Arc<ClientConfig>) -> io::Result<HandshakeKind> {
    let tcp = TcpStream::connect(to).await?;
    let mut stream = TlsConnector::from(config.clone()).connect(ServerName::from(to.ip()), tcp).await?;
    stream.write_all(b"x").await?;
    stream.read_exact(&mut [0; 1]).await?;
    Ok(stream.get_ref().1.handshake_kind().expect("the handshake is over"))
}

/// A client that keeps sessions and believes every server.
fn keeping(web: &Issued, version: &'static SupportedProtocolVersion) -> Arc<ClientConfig> {
    let key = PrivateKeyDer::Pkcs8(web.key().unwrap().into());
    let key = CertifiedKey::new(certificates(web.chain()), provider().key_provider.load_private_key(key).unwrap());
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[version])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.resumption = Resumption::in_memory_sessions(64);
    Arc::new(config)
}

#[derive(Clone, Copy, Debug)]
enum Change {
    Revocation,
    Expiry,
    CaRemoval,
    Policy,
}

#[tokio::test]
async fn nothing_is_resumed_after_a_change_and_who_lost_the_right_is_refused() {
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        for (change, reason) in [
            (Change::Revocation, RefusalReason::Revoked),
            (Change::Expiry, RefusalReason::Expired),
            (Change::CaRemoval, RefusalReason::UnknownCa),
            (Change::Policy, RefusalReason::NotAllowed),
        ] {
            let told = come_again_after(change, version).await;
            assert_eq!(told.0, reason, "{:?} after {change:?}: {}", version.version, told.1);
        }
    }
}

/// Two visits, the change, and a third: why that one was refused.
async fn come_again_after(change: Change, version: &'static SupportedProtocolVersion) -> (RefusalReason, String) {
    let ca = Ca::new("td");
    let (web, identity, config, mut orders, until) = in_time(async |until| {
        let mut params = ca.params("shop/web");
        if let Change::Expiry = change {
            validity(&mut params, until.minus(Duration::from_secs(600)), until);
        }
        let (web, identity) = (ca.issue_with(&params), ca.identity("shop/orders"));
        let config = keeping(&web, version);
        let orders = Agent::start(Some(identity.clone()), inbound_config(echo().await, WEB)).await;
        for _ in 0..2 {
            assert_eq!(visit(orders.inbound[0], &config).await.ok()?, HandshakeKind::Full, "{change:?}");
        }
        Some((web, identity, config, orders, until))
    })
    .await;
    match change {
        Change::Revocation => {
            let spki = web.check().unwrap().credential.peer().spki;
            let signed = ca.directive(1, vec![Deny::Key { spki, why: "stolen".into() }], Timestamp::now());
            let directive = Arc::new(signed.open(&ca.trust(), Timestamp::now()).unwrap());
            let checked = ca.issue("shop/orders").check().unwrap();
            orders
                .identity
                .send_replace(Some(Arc::new(Identity::build(checked, Some(directive), &Terms::default()).unwrap())));
        }
        Change::Expiry => {
            while Timestamp::now() <= until {
                sleep(Duration::from_millis(20)).await;
            }
        }
        Change::CaRemoval => drop(orders.identity.send_replace(Some(Ca::new("td").identity("shop/orders")))),
        // The same identity, and with it the same TLS configuration: what it might remember is still there.
        Change::Policy => {
            orders = Agent::start(Some(identity), inbound_config(echo().await, "spiffe://td/shop/other")).await;
        }
    }
    visit(orders.inbound[0], &config).await.unwrap_err();
    let (reason, detail, _) = orders.refusal().await;
    (reason, detail)
}

#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
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
        provider().signature_verification_algorithms.supported_schemes()
    }
}
