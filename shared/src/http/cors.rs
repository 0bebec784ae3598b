//! From which pages browsers may call, and what they may read of our answers.

use http::{HeaderName, HeaderValue, header};
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};

/// What our answers say in headers of our own.
const OWN_HEADERS: [&str; 5] =
    ["x-changes-truncated", "x-export-warning", "x-file-status", "x-files-truncated", "x-skills-status"];

/// Lets pages of these origins call, with credentials. Not every page of the web: agents run with the user's keys for whoever may
/// call.
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
