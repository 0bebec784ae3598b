//! What API Gateway does on AWS: who may call, from which pages, and whose request it is.

use axum::Router;
use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use secrecy::{ExposeSecret as _, SecretString};
use shared::digest::sha256_hex;
use shared::http::caller::Caller;
use shared::http::cors::cors;
use shared::http::response::{detail, with_common_answers};
use shared::user::UserId;

use crate::access::Origins;

/// The header that holds the instance's key.
const SESSION_API_KEY: &str = "x-session-api-key";

/// Puts the edge around the functions' routers: the single user, the instance's key if there is one, CORS. The others
/// are open, or find out for themselves whose sandbox is calling.
pub fn around(functions: Router, without_user: Router, key: Option<SecretString>, origins: Origins) -> Router {
    let guarded =
        functions.layer(middleware::from_fn(as_local_user)).route_layer(middleware::from_fn(
            move |request: Request, next: Next| {
                let refused = key.as_ref().is_some_and(|key| !carries(&request, key));
                async move {
                    if refused { detail(StatusCode::UNAUTHORIZED).into_response() } else { next.run(request).await }
                }
            },
        ));
    with_common_answers(guarded.merge(without_user)).layer(cors(move |origin| origins.allows(origin)))
}

async fn as_local_user(mut request: Request, next: Next) -> Response {
    request.extensions_mut().insert(Caller(UserId::local()));
    next.run(request).await
}

/// Compares hashes, so that the time it takes tells nothing of the key. The key may come in each of the headers that a deployed
/// server takes keys in: an agent that shows its sandbox's in one of them can still show this one.
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
