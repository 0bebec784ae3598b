//! `POST /api/v1/app-conversations`: creates a start task.

use axum::extract::{DefaultBodyLimit, State};
use axum::routing::post;
use axum::{Json, Router};
use shared::aws::Aws;
use shared::config::Config;
use shared::error::Error;
use shared::http::caller::Caller;
use shared::http::extract::JsonBody;
use shared::http::idempotency_key::IdempotencyKey;
use shared::http::page::PAGE_SIZE;
use shared::http::request_trace::RequestTrace;
use shared::start::create::StartService;
use shared::start::request::StartRequest;
use shared::start::task::AppConversationStartTask;
use shared::stores::Stores;
use shared::user::seal::Sealer;

/// The largest body, in bytes: Lambda accepts no larger payload.
pub const BODY_LIMIT: usize = 6 * 1024 * 1024;

/// What this function can access: it reads conversations and settings, writes start tasks, and enqueues jobs.
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

/// The service that creates start tasks, on the configured tables and queue.
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

async fn start(
    State(context): State<Context>,
    Caller(user): Caller,
    key: IdempotencyKey,
    trace: RequestTrace,
    JsonBody(request): JsonBody<StartRequest>,
) -> Result<Json<AppConversationStartTask>, Error> {
    // The task exists now, so its response must not exceed Lambda's limit.
    Ok(Json(context.start_service.create(&user, request, &key, &trace).await?.show_within(PAGE_SIZE)))
}
