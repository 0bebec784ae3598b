//! `POST /api/v1/app-conversations`: begins a start.

use axum::extract::{DefaultBodyLimit, State};
use axum::routing::post;
use axum::{Json, Router};
use bytes::Bytes;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use shared::aws::Aws;
use shared::config::Config;
use shared::error::Error;
use shared::http::caller::Caller;
use shared::http::page::PAGE_SIZE;
use shared::start::create::StartService;
use shared::start::request::StartRequest;
use shared::start::task::AppConversationStartTask;
use shared::stores::Stores;
use shared::user::seal::Sealer;

/// Lambda takes no larger payload.
pub const BODY_LIMIT: usize = 6 * 1024 * 1024;

/// What this function may touch: it reads conversations and settings, writes start tasks, and enqueues jobs.
#[derive(Clone, Debug)]
pub struct Context {
    start_service: StartService,
}

impl Context {
    /// A context on the configured tables and queue.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        Self { start_service: start_service(config, aws, sealer) }
    }
}

/// What begins starts, on the configured tables and queue.
#[must_use]
pub fn start_service(config: &Config, aws: &Aws, sealer: &Sealer) -> StartService {
    Stores::new(&config.names, aws, sealer).start_service(config)
}

/// The routes of this function.
pub fn router(context: Context) -> Router {
    Router::new()
        .route("/api/v1/app-conversations", post(start))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(context)
}

/// Reads the body of a start.
///
/// # Errors
/// [`Error::Invalid`] with every violation.
pub fn request_from(headers: &HeaderMap, body: &[u8]) -> Result<StartRequest, Error> {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    StartRequest::from_body(content_type, body).map_err(Error::Invalid)
}

async fn start(
    State(context): State<Context>,
    Caller(user): Caller,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<AppConversationStartTask>, Error> {
    let request = request_from(&headers, &body)?;
    // The start exists now: its answer must not be too large for Lambda.
    Ok(Json(context.start_service.create(&user, request).await?.show_within(PAGE_SIZE)))
}
