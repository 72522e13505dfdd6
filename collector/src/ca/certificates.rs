//! What our certificates say: of CAs, of workloads, of our own. Names, usages and dates are decided here.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose,
    SanType, SerialNumber,
};
use sidewarden_proto::identity::{SpiffeId, TrustDomain};
use sidewarden_proto::time::Timestamp;

use super::CaError;

const DAY: Duration = Duration::from_secs(24 * 3600);
/// Certificates begin this much before they are made: clocks differ.
pub const LEEWAY: Duration = Duration::from_secs(300);

/// Of a CA. Its begin is a day back, so that an agent whose clock is behind still takes a new root.
pub fn ca(domain: &TrustDomain, name: &str, path_len: Option<u8>, life: Duration, now: Timestamp) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.distinguished_name.push(DnType::OrganizationName, domain.as_str());
    params.subject_alt_names = vec![];
    params.is_ca = IsCa::Ca(path_len.map_or(BasicConstraints::Unconstrained, BasicConstraints::Constrained));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial());
    params.not_before = SystemTime::from(now.minus(DAY)).into();
    params.not_after = SystemTime::from(now.plus(life)).into();
    params
}

/// Of a workload, a client without an agent, or a collector: it ends after `life`, and never after `latest`.
///
/// `instance` stands as the common name: another collector of the trust domain learns from it which instance the key was
/// issued to. `names` are DNS names and addresses.
pub fn leaf(
    id: &SpiffeId,
    instance: Option<&str>,
    names: &[String],
    life: Duration,
    now: Timestamp,
    latest: Timestamp,
) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::new(names.to_vec())?;
    params.subject_alt_names.push(SanType::URI(id.as_str().try_into()?));
    params.distinguished_name = DistinguishedName::new();
    if let Some(instance) = instance {
        params.distinguished_name.push(DnType::CommonName, instance);
    }
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial());
    params.not_before = SystemTime::from(now.minus(LEEWAY)).into();
    params.not_after = SystemTime::from(now.plus(life).min(latest)).into();
    Ok(params)
}

/// 128 random bits, the first bit clear so that it is a positive number of fixed length.
fn serial() -> SerialNumber {
    let mut bytes = [0; 16];
    crate::random(&mut bytes);
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    SerialNumber::from_slice(&bytes)
}
