//! The consumer of the queue `exports`: builds the exports that exceed the time of their requests.

use aws_lambda_events::event::sqs::{BatchItemFailure, SqsBatchResponse, SqsEvent, SqsMessage};
use serde_json::Value;
use shared::aws::Aws;
use shared::config::Config;
use shared::error::Error;
use shared::export::ExportJobs;
use shared::jobs::queue::{DEAD_LETTER_SUFFIX, Job};
use shared::stores::Stores;

/// What this function can access: it reads conversations and events, and writes exports.
#[derive(Clone, Debug)]
pub struct Context {
    jobs: ExportJobs,
}

impl Context {
    /// A context on the configured tables and bucket.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws) -> Self {
        Self::with_jobs(Stores::without_key(&config.names, aws).export_jobs(&config.export))
    }

    #[must_use]
    pub fn with_jobs(jobs: ExportJobs) -> Self {
        Self { jobs }
    }
}

/// Handles messages of the queue or of its dead-letter queue sequentially, because each build needs the memory of the function. Only the
/// failed messages of a batch are delivered again.
///
/// # Errors
/// When the event is not an SQS event.
pub async fn handle(context: &Context, event: Value) -> Result<SqsBatchResponse, Error> {
    let event: SqsEvent = serde_json::from_value(event).map_err(Error::internal)?;
    let mut response = SqsBatchResponse::default();
    for message in &event.records {
        if let Err(error) = handle_message(context, message).await {
            tracing::error!(message_id = message.message_id, error = %error.context(), "exports.failed");
            let mut failure = BatchItemFailure::default();
            failure.item_identifier = message.message_id.clone().unwrap_or_default();
            response.batch_item_failures.push(failure);
        }
    }
    Ok(response)
}

async fn handle_message(context: &Context, message: &SqsMessage) -> Result<(), Error> {
    let is_dead = message.event_source_arn.as_deref().is_some_and(|arn| arn.ends_with(DEAD_LETTER_SUFFIX));
    let job = Job::from_body(message.body.as_deref().unwrap_or_default());
    match job {
        Ok(Job::Export { user, conversation }) if is_dead => context.jobs.abandon(&user, conversation).await,
        Ok(Job::Export { user, conversation }) => context.jobs.run(&user, conversation).await,
        // A further delivery would not change the outcome. Clients that wait for an export enqueue another message.
        Ok(_) | Err(_) if is_dead => {
            tracing::error!(message_id = message.message_id, "exports.message_dropped");
            Ok(())
        }
        Ok(job) => Err(Error::internal(format!("{job:?} is in the queue of exports"))),
        Err(error) => Err(error),
    }
}
