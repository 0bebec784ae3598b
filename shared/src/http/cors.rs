//! CORS: the origins whose pages may call, and the response headers that they may read.

use http::{HeaderName, HeaderValue, header};
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};

/// Response headers that are specific to this API.
const OWN_HEADERS: [&str; 5] =
    ["x-changes-truncated", "x-export-warning", "x-file-status", "x-files-truncated", "x-skills-status"];

/// Allows calls with credentials from pages of these origins. Never allow every origin: a page that may call can run agents with the
/// user's keys.
pub fn cors(is_allowed: impl Fn(&str) -> bool + Clone + Send + Sync + 'static) -> CorsLayer {
    CorsLayer::new()
        .allow_credentials(true)
        .allow_methods(AllowMethods::mirror_request())
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(
            [header::CONTENT_DISPOSITION, header::RETRY_AFTER]
                .into_iter()
                .chain(OWN_HEADERS.map(HeaderName::from_static))
                .collect::<Vec<_>>(),
        )
        .allow_origin(AllowOrigin::predicate(move |origin: &HeaderValue, _| origin.to_str().is_ok_and(&is_allowed)))
}
