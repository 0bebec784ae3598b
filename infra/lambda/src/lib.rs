//! The start-up of every Lambda function: logging, configuration, the caller from the request context, the runtime. No other crate
//! depends on Lambda, except the functions that are not HTTP servers.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::{MatchedPath, Request};
use axum::http::HeaderValue;
use axum::http::header::{CONTENT_TYPE, STRICT_TRANSPORT_SECURITY, X_CONTENT_TYPE_OPTIONS};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use futures::TryStreamExt as _;
use lambda_http::Context;
use lambda_http::request::RequestContext;
pub use lambda_runtime::Error;
use metrics_cloudwatch_embedded::{Builder, Collector};
use shared::aws::Aws;
use shared::config::{Config, SealingConfig, permitted_origins, text};
use shared::http::caller::Caller;
use shared::http::cors::cors;
use shared::http::page::{MAX_BODY, size_of_text};
use shared::http::request_trace::RequestTrace;
use shared::http::response::with_common_answers;
use shared::logging::{self, LogFormat};
use shared::metrics;
use shared::user::UserId;
use shared::user::data_key::DataKey;
use shared::user::seal::Sealer;
use tracing::Instrument as _;

/// Reads the configuration and creates the clients and the sealer, once per process.
///
/// # Errors
/// The environment is incomplete.
pub fn set_up() -> Result<(Config, Aws, Sealer), Error> {
    logging::init(LogFormat::Json);
    // The collector has to exist before the first metric is recorded.
    let _collector = metrics();
    let config = Config::from_env()?;
    let sdk = shared::aws::sdk_config_from_env();
    let aws = Aws::new(&sdk);
    let sealer = match &config.sealing {
        SealingConfig::File(path) => Sealer::from_file(path)?,
        SealingConfig::Kms(key) => {
            let users = config.names.users.clone();
            Sealer::from_data_key(DataKey::new(&sdk, aws.dynamodb.clone(), users, key.clone()))
        }
    };
    Ok((config, aws, sealer))
}

/// Serves a router with buffered responses. A response that is too large for Lambda is replaced by a 413.
///
/// # Errors
/// The set-up or the runtime failed.
pub async fn serve(make: impl FnOnce(&Config, &Aws, &Sealer) -> Router) -> Result<(), Error> {
    lambda_http::run(configured(make, |router| router.layer(middleware::from_fn(within_payload_limit)))?).await
}

/// Serves a router with streamed responses. If a body fails after its response has begun, the process exits.
///
/// # Errors
/// The set-up or the runtime failed.
pub async fn serve_streaming(make: impl FnOnce(&Config, &Aws, &Sealer) -> Router) -> Result<(), Error> {
    let router = configured(make, |router| router)?.layer(middleware::map_response(async |response: Response| {
        response.map(|body| Body::from_stream(body.into_data_stream().inspect_err(abort)))
    }));
    lambda_http::run_with_streaming_response(router).await
}

/// Serves a router that needs no configuration, clients or caller.
///
/// # Errors
/// The runtime failed.
pub async fn serve_static(router: Router) -> Result<(), Error> {
    logging::init(LogFormat::Json);
    lambda_http::run(with_middleware(with_common_answers(router), false)).await
}

/// Creates the router with configuration and clients. `inner` is the innermost layer.
fn configured(
    make: impl FnOnce(&Config, &Aws, &Sealer) -> Router,
    inner: impl FnOnce(Router) -> Router,
) -> Result<Router, Error> {
    let (config, aws, sealer) = set_up()?;
    Ok(with_middleware(inner(with_common_answers(make(&config, &aws, &sealer))), config.single_user))
}

fn with_middleware(router: Router, single_user: bool) -> Router {
    let origins = permitted_origins();
    router
        .layer(middleware::from_fn(move |request: Request, next: Next| identify(single_user, request, next)))
        .layer(cors(move |origin| origins.iter().any(|allowed| allowed == origin)))
        .layer(middleware::from_fn(with_security_headers))
        .layer(middleware::from_fn(log))
}

/// Adds headers so that browsers use only HTTPS afterwards, and do not guess content types. Responses of API Gateway itself have the same
/// headers (`template.yaml`).
async fn with_security_headers(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(STRICT_TRANSPORT_SECURITY, HeaderValue::from_static("max-age=31536000"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Exits the process, which aborts the invocation: Lambda then closes the stream early, and the client detects that it is incomplete. The
/// runtime crate would instead append the error to the body as text and end the body as if it were complete.
fn abort(error: &axum::Error) {
    tracing::error!(%error, "lambda.stream_aborted");
    flush_metrics();
    std::process::exit(1);
}

/// Replaces a response that is too large for Lambda by a 413; otherwise API Gateway would return a 502 without a reason. Lists are
/// limited earlier (`shared::http::page`). This limit is for other responses, whose size depends on stored data.
async fn within_payload_limit(request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let (parts, body) = next.run(request).await.into_parts();
    let bytes = match axum::body::to_bytes(body, usize::MAX).await {
        Ok(bytes) => bytes,
        Err(error) => return shared::Error::internal(error).into_response(),
    };
    // Bodies that are not text are encoded as base64.
    let kind = parts.headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let is_text = kind.starts_with("text/") || kind.contains("json");
    let length = bytes.len() as u64;
    let size = if is_text && length > MAX_BODY / 6 { size_of_text(&bytes) } else { length * 4 / 3 };
    if size <= MAX_BODY {
        return Response::from_parts(parts, Body::from(bytes));
    }
    tracing::error!(route = route.as_deref().unwrap_or("none"), size, "lambda.response_too_large");
    let text = "The response is larger than this server can return. Request less data at once";
    shared::Error::TooLarge(text.to_owned()).into_response()
}

/// The collector that writes metrics to the log, in CloudWatch's embedded metric format with the namespace `METRICS_NAMESPACE`; `None`
/// if that is not set.
fn metrics() -> Option<&'static Collector> {
    static COLLECTOR: OnceLock<Option<&'static Collector>> = OnceLock::new();
    *COLLECTOR.get_or_init(|| {
        let namespace = text("METRICS_NAMESPACE")?;
        let function = text("AWS_LAMBDA_FUNCTION_NAME").unwrap_or_default();
        let collector = Builder::new().cloudwatch_namespace(namespace).with_dimension("Function", function).init();
        metrics::describe();
        collector.inspect_err(|error| tracing::error!(%error, "lambda.metrics_init_failed")).ok()
    })
}

/// Writes the metrics since the last flush to the log. Has to run after each invocation, because Lambda may freeze the process afterwards.
pub fn flush_metrics() {
    if let Some(Err(error)) = metrics().map(|metrics| metrics.flush(std::io::stdout())) {
        tracing::warn!(%error, "lambda.metrics_flush_failed");
    }
}

/// Sets the caller to the user in the request context, which the authorizer has set. Headers are ignored.
async fn identify(single_user: bool, mut request: Request, next: Next) -> Response {
    if let Some(user) = caller(single_user, &request) {
        request.extensions_mut().insert(Caller(user));
    }
    next.run(request).await
}

fn caller(single_user: bool, request: &Request) -> Option<UserId> {
    if single_user {
        return Some(UserId::local());
    }
    match request.extensions().get::<RequestContext>() {
        Some(RequestContext::ApiGatewayV1(context)) => {
            let user = context.authorizer.fields.get("user_id")?.as_str()?;
            // The id of local servers' single user is not valid here.
            Some(UserId::new(user)).filter(|user| !user.as_str().is_empty() && user.shown().is_some())
        }
        _ => None,
    }
}

/// Logs one line per request: route, user, status, duration. The route is logged as its template, because paths and queries may contain
/// confidential data.
async fn log(request: Request, next: Next) -> Response {
    let span = RequestTrace::of(request.headers()).span();
    if let Some(context) = request.extensions().get::<Context>() {
        span.record("request_id", &context.request_id);
    }
    log_in_span(request, next).instrument(span).await
}

async fn log_in_span(request: Request, next: Next) -> Response {
    static WARM: AtomicBool = AtomicBool::new(false);
    let cold_start = !WARM.swap(true, Ordering::Relaxed);
    let started_at = Instant::now();
    let request_id = request.extensions().get::<Context>().map(|context| context.request_id.clone());
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let (method, user) = (request.method().clone(), caller(false, &request));
    let response = next.run(request).await;
    tracing::info!(
        request_id = request_id.unwrap_or_default(),
        user = user.as_ref().map(UserId::as_str).unwrap_or_default(),
        %method,
        route = route.as_deref().unwrap_or("none"),
        status = response.status().as_u16(),
        duration_ms = u64::try_from(started_at.elapsed().as_millis()).unwrap_or(u64::MAX),
        cold_start,
        "http.request"
    );
    flush_metrics();
    response
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use http_body_util::BodyExt as _;
    use lambda_http::http::StatusCode;
    use tower::ServiceExt as _;

    use super::*;

    async fn respond_with(kind: &'static str, body: Vec<u8>) -> (StatusCode, usize) {
        let handler = get(async move || ([(CONTENT_TYPE, kind)], body.clone()));
        let router = Router::new().route("/", handler).layer(middleware::from_fn(within_payload_limit));
        let response = router.oneshot(Request::new(Body::empty())).await.unwrap_or_else(|never| match never {});
        let status = response.status();
        (status, response.into_body().collect().await.map(|body| body.to_bytes().len()).unwrap_or_default())
    }

    #[tokio::test]
    async fn responses_that_are_too_large_for_lambda_are_replaced() {
        let most = usize::try_from(MAX_BODY).unwrap_or_default();
        for (kind, byte, size, fits) in [
            ("application/json", b'x', most, true),
            ("application/json", b'x', most + 1, false),
            // Escaping doubles the size, and base64 adds a third.
            ("application/json", b'"', most / 2, true),
            ("application/json", b'"', most / 2 + 1, false),
            ("text/plain; charset=utf-8", 0, most / 6 + 1, false),
            ("image/png", 0, most / 4 * 3, true),
            ("image/png", 0, most / 4 * 3 + 4, false),
        ] {
            let (status, length) = respond_with(kind, vec![byte; size]).await;
            if fits {
                assert_eq!((status, length), (StatusCode::OK, size), "{kind} {size}");
            } else {
                assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{kind} {size}");
            }
        }
    }
}
