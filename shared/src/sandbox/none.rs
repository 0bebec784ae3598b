//! Sandbox provider without sandboxes, for servers that only keep records.

use async_trait::async_trait;

use super::store::SandboxStore;
use super::{Sandbox, SandboxService};
use crate::error::{Error, Result};
use crate::id::UserId;

/// A provider that refuses every start and returns no sandboxes.
#[derive(Debug)]
pub struct NoSandboxes {
    store: SandboxStore,
}

impl NoSandboxes {
    /// Creates the provider on the store of the other providers, so that a user's old records can still be deleted.
    #[must_use]
    pub fn new(store: SandboxStore) -> Self {
        Self { store }
    }
}

#[async_trait]
impl SandboxService for NoSandboxes {
    async fn start(&self, _user: &UserId, _id: &str) -> Result<()> {
        Err(Error::Refused(
            "This server runs without sandboxes (SANDBOX_KIND=none, --sandbox none) and cannot start conversations; configure another kind of sandbox."
                .into(),
        ))
    }

    async fn batch_get(&self, _user: &UserId, ids: &[String]) -> Result<Vec<Option<Sandbox>>> {
        Ok(vec![None; ids.len()])
    }

    async fn list(&self, _user: &UserId) -> Result<Vec<Sandbox>> {
        Ok(Vec::new())
    }

    async fn pause(&self, _user: &UserId, _id: &str) -> Result<bool> {
        Ok(false)
    }

    async fn resume(&self, _user: &UserId, _id: &str) -> Result<bool> {
        Ok(false)
    }

    async fn delete(&self, user: &UserId, id: &str) -> Result<bool> {
        self.store.delete(user, id).await
    }

    async fn mark_used(&self, _user: &UserId, _id: &str) -> Result<()> {
        Ok(())
    }
}
