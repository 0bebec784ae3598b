//! Who calls: a user, put into a request's extensions by whoever runs the router and read from there alone; or a sandbox, which
//! shows its session key.

use axum::extract::FromRequestParts;
use http::HeaderMap;
use http::request::Parts;

use crate::error::{Error, Result};
use crate::id::UserId;
use crate::sandbox::store::{SandboxRecord, SandboxStore};

/// The user who makes a request.
#[derive(Clone, Debug)]
pub struct Caller(pub UserId);

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Error> {
        parts.extensions.get::<Self>().cloned().ok_or_else(|| Error::Unauthenticated("Unauthorized".into()))
    }
}

/// The header by which an agent server, or an agent, shows which sandbox it is in.
const SESSION_API_KEY: &str = "x-session-api-key";

/// The sandbox whose session key a request shows.
///
/// # Errors
/// [`Error::Unauthenticated`] without a key or with one that is nobody's, [`Error::Store`].
pub async fn sandbox(sandboxes: &SandboxStore, headers: &HeaderMap) -> Result<SandboxRecord> {
    let refused = |text: &str| Error::Unauthenticated(text.to_owned());
    let key = headers.get(SESSION_API_KEY).filter(|key| !key.is_empty());
    let key = key.ok_or_else(|| refused("X-Session-API-Key header is required"))?;
    let invalid = || refused("Invalid session API key");
    let key = key.to_str().map_err(|_| invalid())?;
    sandboxes.find_by_session_key(key).await?.ok_or_else(invalid)
}
