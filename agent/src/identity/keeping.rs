//! What is on its way to disk: no disk, however slow or full, holds up who is trusted and as whom we speak.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use sidewarden_proto::directive::Signed;
use sidewarden_proto::time::Timestamp;
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;

use super::keeper::KeeperError;
use super::store::{Checked, Issued, Store, StoreError};

/// The disk gets this long for what is to be kept.
pub const KEEP_WITHIN: Duration = Duration::from_secs(5);

/// A directive, with what it was proven by and when.
pub struct Proven {
    /// As it came.
    pub signed: Signed,
    /// The roots that it was proven by.
    pub roots: Vec<CertificateDer<'static>>,
    /// When.
    pub at: Timestamp,
}

/// An identity that was issued and is not in use yet.
pub struct Adopting {
    /// As it is kept.
    pub issued: Issued,
    /// As it is used.
    pub checked: Checked,
    /// What came with it.
    pub directive: Option<Signed>,
    /// The token that it was issued for.
    pub token: Option<PathBuf>,
    saving: Option<JoinHandle<Result<(), StoreError>>>,
}

impl Adopting {
    /// Nothing of it is on disk.
    pub fn new(issued: Issued, checked: Checked, directive: Option<Signed>, token: Option<PathBuf>) -> Adopting {
        Adopting { issued, checked, directive, token, saving: None }
    }

    /// Writes it to disk; may be cancelled and called again.
    pub async fn keep(&mut self, store: &Store) -> Result<(), KeeperError> {
        let saving = self.saving.get_or_insert_with(|| {
            let (store, issued) = (store.clone(), self.issued.clone());
            spawn_blocking(move || store.save(&issued))
        });
        let saved = timeout(KEEP_WITHIN, saving).await.map_err(|_| KeeperError::NotYetKept)?;
        self.saving = None;
        Ok(saved??)
    }
}

/// Writes the newest directive to disk, and again when there is a newer one, until nobody has any.
pub async fn keep_directives(store: Store, mut newest: watch::Receiver<Option<Arc<Proven>>>) {
    loop {
        let proven = newest.borrow_and_update().clone();
        if let Some(proven) = proven {
            keep_directive(store.clone(), proven).await;
        }
        if newest.changed().await.is_err() {
            return;
        }
    }
}

async fn keep_directive(store: Store, proven: Arc<Proven>) {
    let save = move || store.save_directive(&proven.signed, &proven.roots, proven.at);
    match spawn_blocking(save).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::error!(%error, "the directive cannot be kept: after a restart the old one is in force");
        }
        Err(error) => tracing::error!(%error, "keeping the directive ended by a panic"),
    }
}
