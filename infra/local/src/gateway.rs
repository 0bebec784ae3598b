//! Stands in for API Gateway and its authorizer: checks `SESSION_API_KEY`, sets the caller, and answers CORS requests.

use axum::Router;
use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use secrecy::{ExposeSecret as _, SecretString};
use shared::agent_server::SESSION_API_KEY;
use shared::digest::sha256_hex;
use shared::http::caller::Caller;
use shared::http::cors::cors;
use shared::http::request_trace::RequestTrace;
use shared::http::response::{detail, with_common_answers};
use shared::user::UserId;
use tracing::Instrument as _;

use crate::access::Origins;

/// Wraps the routers of the functions. `functions` require the instance's key, if there is one, and run as the local user.
/// `without_user` are public routes, or routes that authenticate sandboxes by their own keys.
pub fn wrap(functions: Router, without_user: Router, key: Option<SecretString>, origins: Origins) -> Router {
    let authenticated =
        functions.layer(middleware::from_fn(as_local_user)).route_layer(middleware::from_fn(
            move |request: Request, next: Next| {
                let refused = key.as_ref().is_some_and(|key| !carries(&request, key));
                async move {
                    if refused { detail(StatusCode::UNAUTHORIZED).into_response() } else { next.run(request).await }
                }
            },
        ));
    with_common_answers(authenticated.merge(without_user))
        .layer(cors(move |origin| origins.allows(origin)))
        .layer(middleware::from_fn(with_log_span))
}

async fn with_log_span(request: Request, next: Next) -> Response {
    let span = RequestTrace::of(request.headers()).span();
    next.run(request).instrument(span).await
}

async fn as_local_user(mut request: Request, next: Next) -> Response {
    request.extensions_mut().insert(Caller(UserId::local()));
    next.run(request).await
}

/// Whether the request carries the key. Compares hashes, so that the time of the comparison reveals nothing about the key.
///
/// The key may be in any header in which a deployed server accepts keys: an agent that uses one of them for the key of its
/// sandbox can send this key in another.
fn carries(request: &Request, key: &SecretString) -> bool {
    let given = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
    let bearer = given("authorization")
        .and_then(|value| value.split_once(' '))
        .and_then(|(scheme, token)| scheme.eq_ignore_ascii_case("bearer").then_some(token.trim()));
    let key = sha256_hex(key.expose_secret());
    [given(SESSION_API_KEY), given("x-access-token"), bearer]
        .into_iter()
        .flatten()
        .any(|given| sha256_hex(given) == key)
}
