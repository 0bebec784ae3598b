//! Who calls: put into a request's extensions by whoever runs the router, read from there alone.

use axum::extract::FromRequestParts;
use http::request::Parts;

use crate::error::Error;
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
