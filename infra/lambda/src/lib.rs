//! What the `main` of every function does: logging, configuration, the caller, the runtime. Nothing else knows Lambda.

use std::future::Future;

use axum::Router;
use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::Response;
use lambda_http::request::RequestContext;
pub use lambda_runtime::Error;
use shared::aws::Aws;
use shared::config::Config;
use shared::http::caller::Caller;
use shared::http::response::with_common_answers;
use shared::telemetry::{self, LogFormat};
use shared::user::UserId;

/// Configuration and clients, read once a process.
///
/// # Errors
/// When the environment is not complete.
pub async fn set_up() -> Result<(Config, Aws), Error> {
    telemetry::init(LogFormat::Json);
    Ok((Config::from_env()?, Aws::from_env().await))
}

/// Serves a router with whole answers.
///
/// # Errors
/// When the set-up or the runtime fails.
pub async fn serve<F: Future<Output = Result<Router, Error>>>(
    make: impl FnOnce(Config, Aws) -> F,
) -> Result<(), Error> {
    lambda_http::run(edge(make).await?).await
}

/// Serves a router whose answers are streamed.
///
/// # Errors
/// When the set-up or the runtime fails.
pub async fn serve_streaming<F: Future<Output = Result<Router, Error>>>(
    make: impl FnOnce(Config, Aws) -> F,
) -> Result<(), Error> {
    lambda_http::run_with_streaming_response(edge(make).await?).await
}

async fn edge<F: Future<Output = Result<Router, Error>>>(make: impl FnOnce(Config, Aws) -> F) -> Result<Router, Error> {
    let (config, aws) = set_up().await?;
    let single_user = config.single_user;
    let router = with_common_answers(make(config, aws).await?);
    Ok(router.layer(middleware::from_fn(move |request: Request, next: Next| identify(single_user, request, next))))
}

/// The caller is whom the authorizer named in the request context; no header counts.
async fn identify(single_user: bool, mut request: Request, next: Next) -> Response {
    let caller = if single_user {
        Some(UserId::local())
    } else {
        match request.extensions().get::<RequestContext>() {
            Some(RequestContext::ApiGatewayV1(context)) => {
                context.authorizer.fields.get("user_id").and_then(|user| user.as_str()).map(UserId::new)
            }
            _ => None,
        }
    };
    if let Some(user) = caller {
        request.extensions_mut().insert(Caller(user));
    }
    next.run(request).await
}
