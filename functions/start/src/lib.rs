//! `POST /api/v1/app-conversations`: creates a start task.

use axum::extract::{DefaultBodyLimit, State};
use axum::routing::post;
use axum::{Json, Router};
use shared::aws::Aws;
use shared::config::Config;
use shared::conversation::store::ConversationStore;
use shared::error::Error;
use shared::http::caller::Caller;
use shared::http::extract::JsonBody;
use shared::http::page::PAGE_SIZE;
use shared::jobs::queue::JobQueue;
use shared::start::create::StartService;
use shared::start::request::StartRequest;
use shared::start::store::StartTaskStore;
use shared::start::task::AppConversationStartTask;
use shared::user::seal::Sealer;
use shared::user::settings::SettingsStore;

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
    let names = &config.names;
    StartService {
        conversations: ConversationStore::new(aws.dynamodb.clone(), names.conversations.clone(), names.users.clone()),
        tasks: StartTaskStore::new(
            aws.dynamodb.clone(),
            names.start_tasks.clone(),
            names.users.clone(),
            aws.s3.clone(),
            names.bucket.clone(),
            sealer.clone(),
        ),
        queue: JobQueue::new(aws.sqs.clone(), names.job_queue_url.clone()),
        settings: SettingsStore::new(aws.dynamodb.clone(), names.users.clone(), sealer.clone()),
        allow_insecure_git_access: config.start.allow_insecure_git_access,
        step_timeout: config.start.step_timeout,
    }
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
    JsonBody(request): JsonBody<StartRequest>,
) -> Result<Json<AppConversationStartTask>, Error> {
    // The task exists now, so its response must not exceed Lambda's limit.
    Ok(Json(context.start_service.create(&user, request).await?.show_within(PAGE_SIZE)))
}
