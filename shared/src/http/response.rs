//! Responses: how errors map to HTTP, response bodies that several functions share, and what every response has in common.

use axum::Json;
use axum::Router;
use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, EXPIRES, LOCATION, PRAGMA, RETRY_AFTER};
use http::{HeaderValue, StatusCode, Uri};
use serde::Serialize;

use super::pydantic::validation::Violation;
use crate::error::Error;

/// The largest headers of a request, in bytes of names and values. API Gateway itself accepts 10 KB.
pub const MAX_HEADERS: usize = 16 * 1024;

/// The message for a body that exceeds the route's limit.
pub const BODY_TOO_LARGE: &str = "The request is larger than this server accepts; send a smaller one";

/// The response to a change that has no other result.
#[derive(Clone, Copy, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = Success))]
pub struct SuccessOut {
    success: bool,
}

impl SuccessOut {
    /// `{"success": true}`
    pub fn json() -> Json<Self> {
        Json(Self { success: true })
    }
}

/// The response to a change that reports what was done.
#[derive(Clone, Copy, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = Message))]
pub struct MessageOut {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    message: &'static str,
}

impl MessageOut {
    /// `{"message": …}`
    pub fn json(message: &'static str) -> Json<Self> {
        Json(Self { message })
    }
}

/// The body of an error response.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = Detail))]
pub struct DetailOut {
    /// What is wrong and, where the caller can do something about it, what to do.
    #[cfg_attr(feature = "openapi", schema(min_length = 1))]
    pub detail: String,
}

/// The body of a 422 response.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = Invalid))]
pub struct InvalidOut {
    /// Every violation, never none.
    #[cfg_attr(feature = "openapi", schema(min_items = 1))]
    pub detail: Vec<Violation>,
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::Invalid(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Refused(_) => StatusCode::BAD_REQUEST,
            Self::Unauthenticated(_) => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::Gone(_) => StatusCode::GONE,
            Self::TooMany(_) | Self::Saturated { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Unavailable(_) | Self::Store(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Upstream { .. } | Self::CircuitOpen => StatusCode::BAD_GATEWAY,
            Self::Internal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        if status.is_server_error() {
            // The only place that logs it, so that each error is logged once.
            tracing::error!(status = status.as_u16(), fault = self.fault().as_str(), error = %self.context(), "http.failed");
        }
        match self {
            Self::Invalid(detail) => (status, Json(InvalidOut { detail })).into_response(),
            Self::Saturated { message, retry_after } => {
                let after = [(RETRY_AFTER, retry_after.as_secs().to_string())];
                (status, after, Json(DetailOut { detail: message })).into_response()
            }
            other => (status, Json(DetailOut { detail: other.to_string() })).into_response(),
        }
    }
}

/// Adds what all routers have in common: the contract's responses for unknown paths and methods, and the headers of every response.
pub fn with_common_answers(router: Router) -> Router {
    router
        .fallback(unknown_path)
        .method_not_allowed_fallback(async || detail(StatusCode::METHOD_NOT_ALLOWED))
        .layer(middleware::from_fn(limit_headers))
        .layer(middleware::from_fn(forbid_caching))
        .layer(middleware::from_fn(errors_as_json))
}

/// Redirects a path that ends with a slash to the one without, as the reference does; any other path is 404. The redirect does not
/// depend on whether the shorter path exists: on AWS the function that handles unknown paths has no routes of other functions.
async fn unknown_path(uri: Uri) -> Response {
    match without_slash(&uri).and_then(|location| HeaderValue::from_str(&location).ok()) {
        Some(location) => (StatusCode::TEMPORARY_REDIRECT, [(LOCATION, location)]).into_response(),
        None => detail(StatusCode::NOT_FOUND),
    }
}

/// Returns the location of a path that ends with slashes without them, with the query. It is relative, so that it is correct below
/// a stage or a base path, and cannot lead to another host.
fn without_slash(uri: &Uri) -> Option<String> {
    let path = uri.path();
    let shorter = path.trim_end_matches('/');
    let slashes = path.len() - shorter.len();
    let last =
        shorter.rsplit('/').next().filter(|last| slashes > 0 && !last.is_empty() && !matches!(*last, "." | ".."))?;
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    Some(format!("{}{last}{query}", "../".repeat(slashes)))
}

/// Refuses headers over [`MAX_HEADERS`].
async fn limit_headers(request: Request, next: Next) -> Response {
    let bytes: usize = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if bytes > MAX_HEADERS { detail(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE) } else { next.run(request).await }
}

/// An error response whose message is the status's reason phrase.
#[must_use]
pub fn detail(status: StatusCode) -> Response {
    let detail = status.canonical_reason().unwrap_or_default().to_owned();
    (status, Json(DetailOut { detail })).into_response()
}

/// Replaces axum's own error responses, which are text, by JSON. axum makes them for a body that is too large or ends early, and for a
/// path parameter that is not UTF-8.
async fn errors_as_json(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let is_text = response
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.to_str().is_ok_and(|kind| kind.starts_with("text/plain")));
    if !is_text || !response.status().is_client_error() {
        return response;
    }
    let text = match response.status() {
        StatusCode::PAYLOAD_TOO_LARGE => BODY_TOO_LARGE,
        status => status.canonical_reason().unwrap_or_default(),
    };
    let (mut parts, _) = response.into_parts();
    parts.headers.remove(CONTENT_LENGTH);
    parts.headers.remove(CONTENT_TYPE);
    (parts, Json(DetailOut { detail: text.to_owned() })).into_response()
}

async fn forbid_caching(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-cache, no-store, must-revalidate, max-age=0"));
    headers.entry(PRAGMA).or_insert(HeaderValue::from_static("no-cache"));
    headers.entry(EXPIRES).or_insert(HeaderValue::from_static("0"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_a_slash_at_its_end_is_redirected_by_a_relative_location() {
        for (uri, location) in [
            ("/api/v1/settings/", Some("../settings")),
            ("/api/v1/app-conversations/search/?limit=1&a=%2F", Some("../search?limit=1&a=%2F")),
            ("/api/v1/settings//", Some("../../settings")),
            ("/v1/a%20b/", Some("../a%20b")),
            ("//evil.example/", Some("../evil.example")),
            ("//evil.example//", Some("../../evil.example")),
            ("/a:b/", Some("../a:b")),
            ("/", None),
            ("//", None),
            ("/x/../", None),
            ("/api/v1/settings", None),
        ] {
            let parsed: Uri = format!("http://host{uri}").parse().expect("an address");
            assert_eq!(without_slash(&parsed).as_deref(), location, "{uri}");
        }
    }
}
