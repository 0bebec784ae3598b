//! Lists that have no pages and may be incomplete.

use axum::Json;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderName, HeaderValue};
use serde::Serialize;

/// Whether there are more changes than the response lists: `true`, or the header is absent.
const TRUNCATED: HeaderName = HeaderName::from_static("x-changes-truncated");

/// The response with a list of git changes.
pub fn changes_response(list: &impl Serialize, is_truncated: bool) -> Response {
    let mut response = Json(list).into_response();
    if is_truncated {
        response.headers_mut().insert(TRUNCATED, HeaderValue::from_static("true"));
    }
    response
}
