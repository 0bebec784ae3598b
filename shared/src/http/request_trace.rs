//! The trace of a request.

use std::convert::Infallible;

use axum::extract::FromRequestParts;
use http::HeaderMap;
use http::request::Parts;
use tracing::Span;

use crate::trace::{self, TRACE_HEADER, TraceId};

/// The trace of a request, if its header has a valid one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestTrace(pub Option<TraceId>);

impl RequestTrace {
    /// Reads the header.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Self {
        Self(headers.get(TRACE_HEADER).and_then(|value| TraceId::of_header(value.to_str().ok()?)))
    }

    /// The log span of the request.
    #[must_use]
    pub fn span(&self) -> Span {
        let span = trace::invocation();
        if let Some(trace) = &self.0 {
            span.record("trace", tracing::field::display(trace));
        }
        span
    }
}

impl<S: Send + Sync> FromRequestParts<S> for RequestTrace {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        Ok(Self::of(&parts.headers))
    }
}
