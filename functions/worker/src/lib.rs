//! The worker: runs the jobs of the queue, applies the dead-letter policy to jobs that failed too often, and sweeps overdue rows.

mod dead_letters;
mod jobs;

use std::sync::Arc;

use aws_lambda_events::event::sqs::{BatchItemFailure, SqsBatchResponse, SqsEvent, SqsMessage};
use futures::future::join_all;
use serde_json::Value;
use shared::Time;
use shared::aws::Aws;
use shared::config::{Config, StartConfig};
use shared::deletion::Deletion;
use shared::error::Error;
use shared::event::follow_up::FollowUp;
use shared::http_client::HttpClient;
use shared::jobs::queue::{DEAD_LETTER_SUFFIX, Job};
use shared::pending_message::delivery::Messages;
use shared::sandbox::SandboxService;
use shared::sandbox::reconciler::{IdlePolicy, SandboxReconciler};
use shared::start::saga::Saga;
use shared::stores::Stores;
use shared::trace::invocation;
use shared::user::seal::Sealer;
use tracing::Instrument as _;

/// Everything that this function may access: all that a start needs, and all that belongs to a conversation.
#[derive(Clone, Debug)]
pub struct Context {
    pub saga: Saga,
    pub deletion: Deletion,
    pub follow_up: FollowUp,
    pub messages: Messages,
    pub reconciler: SandboxReconciler,
}

impl Context {
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        let stores = Stores::new(&config.names, aws, sealer);
        let sandboxes = stores.sandbox_service(&config.sandbox);
        let http = HttpClient::new(config.address_policy);
        let mut context = Self::with_sandboxes(&stores, &sandboxes, &http, &config.start);
        context.deletion.index_lag = config.export.settle;
        context.reconciler.idle = config.sandbox_idle_limit.map(|limit| IdlePolicy { limit, http });
        context
    }

    /// A context on these stores, for conversations that run in these sandboxes.
    #[must_use]
    pub fn with_sandboxes(
        stores: &Stores,
        sandboxes: &Arc<dyn SandboxService>,
        http: &HttpClient,
        config: &StartConfig,
    ) -> Self {
        Self {
            saga: stores.saga(sandboxes.clone(), http.clone(), config),
            deletion: stores.deletion(sandboxes.clone(), http.clone()),
            follow_up: stores.follow_up(sandboxes.clone(), http.clone()),
            messages: stores.message_delivery(sandboxes.clone(), http.clone()),
            reconciler: stores.sandbox_reconciler(sandboxes.clone()),
        }
    }
}

/// Handles an invocation: messages of the queue or of its dead-letter queue, or the schedule. Of a batch, only the messages that
/// failed are delivered again.
///
/// # Errors
/// When a scheduled sweep fails.
pub async fn handle(context: &Context, event: Value) -> Result<SqsBatchResponse, Error> {
    handle_invocation(context, event, None).await
}

/// As [`handle`], with the id of the invocation for the log.
///
/// # Errors
/// When a scheduled sweep fails.
pub async fn handle_invocation(
    context: &Context,
    event: Value,
    request_id: Option<&str>,
) -> Result<SqsBatchResponse, Error> {
    let span = || {
        let span = invocation();
        span.record("request_id", request_id);
        span
    };
    if event.get("Records").is_none() {
        return Box::pin(sweep(context)).instrument(span()).await.map(|()| SqsBatchResponse::default());
    }
    let event: SqsEvent = serde_json::from_value(event).map_err(Error::internal)?;
    let handled = event.records.iter().map(|message| {
        // A span for each message, because each is about another subject.
        async move {
            let Err(error) = Box::pin(handle_message(context, message)).await else { return None };
            tracing::error!(message_id = message.message_id, error = %error.context(), "worker.failed");
            let mut failure = BatchItemFailure::default();
            failure.item_identifier = message.message_id.clone().unwrap_or_default();
            Some(failure)
        }
        .instrument(span())
    });
    let mut response = SqsBatchResponse::default();
    response.batch_item_failures = join_all(handled).await.into_iter().flatten().collect();
    Ok(response)
}

/// Enqueues the jobs of overdue rows again, and looks for sandboxes without a record.
async fn sweep(context: &Context) -> Result<(), Error> {
    let (starts, deletions, messages, sandboxes, orphans, boots) = tokio::join!(
        context.saga.sweep(),
        context.deletion.sweep(),
        context.messages.sweep(),
        context.reconciler.sweep(),
        context.reconciler.find_orphans(Time::now()),
        context.saga.boots.sweep(),
    );
    // All of them have run by now, also when one of them failed.
    orphans?;
    let requeued = starts? + deletions? + messages? + sandboxes? + boots?;
    if requeued > 0 {
        tracing::warn!(requeued, "worker.swept");
    }
    Ok(())
}

async fn handle_message(context: &Context, message: &SqsMessage) -> Result<(), Error> {
    let is_dead = message.event_source_arn.as_deref().is_some_and(|arn| arn.ends_with(DEAD_LETTER_SUFFIX));
    match Job::from_body(message.body.as_deref().unwrap_or_default()) {
        Ok(job) if is_dead => dead_letters::handle(context, job).await,
        Ok(job) => jobs::run(context, job).await,
        Err(error) if is_dead => {
            // No version will read it. If it was about a row, the sweep finds that row.
            tracing::error!(message_id = message.message_id, error = %error.context(), "worker.message_dropped");
            Ok(())
        }
        Err(error) => Err(error),
    }
}
