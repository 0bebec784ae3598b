//! Sandbox provider without sandboxes, for servers that only keep records.

use async_trait::async_trait;
use uuid::Uuid;

use super::{Launch, Sandbox, SandboxService};
use crate::error::{Error, Result};
use crate::id::UserId;

/// A provider that refuses every start and returns no sandboxes.
#[derive(Clone, Copy, Debug)]
pub struct NoSandboxes;

#[async_trait]
impl SandboxService for NoSandboxes {
    async fn start(&self, _user: &UserId, _id: &str, _task: Option<Uuid>) -> Result<Launch> {
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

    /// Nothing is left of a sandbox of another provider as far as this one knows, so that the user's old records can be deleted.
    async fn terminate(&self, _user: &UserId, _id: &str) -> Result<bool> {
        Ok(true)
    }

    async fn mark_used(&self, _user: &UserId, _id: &str) -> Result<()> {
        Ok(())
    }
}
