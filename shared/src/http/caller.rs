//! The user (tenant) who makes a request. The code that runs the router puts it into the request's extensions; handlers read it only from
//! there. Requests of sandboxes carry a session key instead: see [`crate::sandbox::session_key`].

use axum::extract::FromRequestParts;
use http::request::Parts;

use crate::error::{Error, Result};
use crate::id::UserId;

/// The user who makes a request.
#[derive(Clone, Debug)]
pub struct Caller(pub UserId);

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Error> {
        parts.extensions.get::<Self>().cloned().ok_or_else(|| Error::Unauthenticated("Unauthorized".into()))
    }
}
