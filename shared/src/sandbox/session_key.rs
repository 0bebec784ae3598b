//! Session key lookup: finds the sandbox that sends a request, such as a webhook.

use http::HeaderMap;

use super::store::{SandboxRecord, SandboxStore};
use crate::agent_server::SESSION_API_KEY;
use crate::error::{Error, Result};

/// Returns the sandbox whose session key a request carries.
///
/// # Errors
/// [`Error::Unauthenticated`] without a key or with an unknown one, [`Error::Store`].
pub async fn sandbox_of_request(sandboxes: &SandboxStore, headers: &HeaderMap) -> Result<SandboxRecord> {
    let refused = |text: &str| Error::Unauthenticated(text.to_owned());
    let key = headers.get(SESSION_API_KEY).filter(|key| !key.is_empty());
    let key = key.ok_or_else(|| refused("X-Session-API-Key header is required"))?;
    let invalid = || refused("Invalid session API key");
    let key = key.to_str().map_err(|_| invalid())?;
    sandboxes.find_by_session_key(key).await?.ok_or_else(invalid)
}
