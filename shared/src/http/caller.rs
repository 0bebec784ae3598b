//! Identifies the caller of a request: a user, whom the process that runs the router has put into the request's extensions (nothing
//! else is read), or a sandbox, which sends its session key.

use axum::extract::FromRequestParts;
use http::HeaderMap;
use http::request::Parts;

use crate::error::{Error, Result};
use crate::sandbox::store::{SandboxRecord, SandboxStore};
use crate::user::UserId;

/// The user who makes a request.
#[derive(Clone, Debug)]
pub struct Caller(pub UserId);

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Error> {
        parts.extensions.get::<Self>().cloned().ok_or_else(|| Error::Unauthenticated("Unauthorized".into()))
    }
}

/// The header with which agent servers and agents authenticate as their sandbox.
pub use crate::agent_server::SESSION_API_KEY;

/// Looks up the sandbox whose session key a request sends.
///
/// # Errors
/// [`Error::Unauthenticated`] without a key or with one that no sandbox has, [`Error::Store`].
pub async fn sandbox(sandboxes: &SandboxStore, headers: &HeaderMap) -> Result<SandboxRecord> {
    let refused = |text: &str| Error::Unauthenticated(text.to_owned());
    let key = headers.get(SESSION_API_KEY).filter(|key| !key.is_empty());
    let key = key.ok_or_else(|| refused("X-Session-API-Key header is required"))?;
    let invalid = || refused("Invalid session API key");
    let key = key.to_str().map_err(|_| invalid())?;
    sandboxes.find_by_session_key(key).await?.ok_or_else(invalid)
}
