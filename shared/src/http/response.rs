//! Errors as answers, in the contract's shapes; and what every answer has in common.

use axum::Json;
use axum::Router;
use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, EXPIRES, LOCATION, PRAGMA};
use http::{HeaderValue, StatusCode, Uri};
use serde_json::json;

use crate::error::Error;

/// Bytes of a request's headers, names and values. API Gateway itself takes 10 KB.
pub const MAX_HEADERS: usize = 16 * 1024;

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
            Self::TooMany(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Unavailable(_) | Self::Store(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Upstream { .. } => StatusCode::BAD_GATEWAY,
            Self::Internal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        if status.is_server_error() {
            // Here, and nowhere below: an error is logged once, where it leaves.
            tracing::error!(status = status.as_u16(), fault = self.fault().as_str(), error = %self.context(), "http.failed");
        }
        match self {
            Self::Invalid(violations) => (status, Json(json!({"detail": violations}))).into_response(),
            told => (status, Json(json!({"detail": told.to_string()}))).into_response(),
        }
    }
}

/// Gives a router the contract's answers for unknown paths and wrong methods, and the headers that all answers carry.
pub fn with_common_answers(router: Router) -> Router {
    router
        .fallback(unknown_path)
        .method_not_allowed_fallback(async || detail(StatusCode::METHOD_NOT_ALLOWED))
        .layer(middleware::from_fn(headers_in_bounds))
        .layer(middleware::from_fn(never_cached))
        .layer(middleware::from_fn(in_json))
}

/// A path with a slash at its end is redirected to the one without, as the reference does; any other is 404. Which paths there
/// are is not known here: on AWS the function that answers for unknown paths has no routes of other functions.
async fn unknown_path(uri: Uri) -> Response {
    match without_slash(&uri).and_then(|location| HeaderValue::from_str(&location).ok()) {
        Some(location) => (StatusCode::TEMPORARY_REDIRECT, [(LOCATION, location)]).into_response(),
        None => detail(StatusCode::NOT_FOUND),
    }
}

/// The reference from a path that ends with slashes to the one without, with the query. It is relative, so that it is right
/// behind a stage or a base path, and cannot lead to another host.
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
async fn headers_in_bounds(request: Request, next: Next) -> Response {
    let bytes: usize = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if bytes > MAX_HEADERS { detail(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE) } else { next.run(request).await }
}

/// `{"detail": <the status's own words>}`
#[must_use]
pub fn detail(status: StatusCode) -> Response {
    (status, Json(json!({"detail": status.canonical_reason().unwrap_or_default()}))).into_response()
}

/// A body that is too large, or that does not come to its end, is refused by axum before any of our code reads it, as text.
async fn in_json(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let is_text = response
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.to_str().is_ok_and(|kind| kind.starts_with("text/plain")));
    if !is_text || !response.status().is_client_error() {
        return response;
    }
    let text = match response.status() {
        StatusCode::PAYLOAD_TOO_LARGE => "The request is larger than this server takes",
        status => status.canonical_reason().unwrap_or_default(),
    };
    let (mut parts, _) = response.into_parts();
    parts.headers.remove(CONTENT_LENGTH);
    parts.headers.remove(CONTENT_TYPE);
    (parts, Json(json!({"detail": text}))).into_response()
}

async fn never_cached(request: Request, next: Next) -> Response {
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
    fn a_slash_at_the_end_is_left_out_by_a_relative_reference() {
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
