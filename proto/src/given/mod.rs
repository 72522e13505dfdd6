//! An identity that somebody else gives us: key, certificate and roots, in files or from a SPIFFE Workload API.
//!
//! Agents and collectors take one in the same way. Here is how it is found and looked through; what becomes of it, and what
//! is told of one that cannot be used, is for whoever asked.

pub mod answer;
pub mod files;
pub mod workload_api;

use crate::config::Reader;
use crate::identity::SpiffeId;
use crate::tls::{Credential, Trust};

use files::Files;
use workload_api::Endpoint;

/// Where somebody else keeps an identity for us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Elsewhere {
    /// In files.
    Files(Files),
    /// At a SPIFFE Workload API.
    WorkloadApi(Endpoint),
}

impl Elsewhere {
    /// Reads the keys `cert`, `key` and `roots`, or `workload_api`, of a section of settings; `None` where none is set.
    pub fn read(r: &mut Reader<'_>) -> Option<Elsewhere> {
        let api = r.optional("workload_api").map(Elsewhere::WorkloadApi);
        match (r.optional("cert"), r.optional("key"), r.optional("roots")) {
            (None, None, None) => api,
            _ if api.is_some() => {
                r.fault(
                    "workload_api",
                    "and `cert`, `key`, `roots` exclude each other: who this is comes from one place",
                );
                None
            }
            (Some(cert), Some(key), Some(roots)) => Some(Elsewhere::Files(Files { cert, key, roots })),
            _ => {
                r.fault("cert", "goes with `key` and `roots`: an identity in files needs all three");
                None
            }
        }
    }
}

/// An identity with everything it is used with: the key fits the leaf, and the leaf names a workload.
#[derive(Clone, Debug)]
pub struct Offered {
    /// Key and chain.
    pub credential: Credential,
    /// Whom it names.
    pub workload: SpiffeId,
    /// The roots of its own domain and of those it is federated with.
    pub trust: Trust,
}
