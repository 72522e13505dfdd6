//! Identities without a collector.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use sidewarden_agent::identity::{Issued, Store};
use sidewarden_proto::enrol::Der;

/// A CA that puts identities where agents look for them: no collector is needed.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    root: Der,
}

impl Ca {
    /// A new one.
    pub fn new() -> Ca {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, "made up root");
        let key = KeyPair::generate().unwrap();
        let root = Der(params.self_signed(&key).unwrap().der().to_vec());
        Ca { issuer: Issuer::new(params, key), root }
    }

    /// Makes `id` the identity of the agent that keeps its data in `dir`.
    pub fn identify(&self, id: &str, dir: &Path) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate().unwrap();
        let leaf = Der(params.signed_by(&key, &self.issuer).unwrap().der().to_vec());
        let issued = Issued::new(&key.serialize_der(), vec![leaf, self.root.clone()], vec![self.root.clone()]);
        Store::open(dir).unwrap().save(&issued).unwrap();
    }
}
