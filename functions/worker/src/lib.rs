//! The worker behind the queue: advances starts, goes on with exports that outlasted their requests, finishes deletions,
//! delivers messages, fetches titles and processes events, sweeps up what was forgotten, and gives up honestly.

use aws_lambda_events::event::sqs::{BatchItemFailure, SqsBatchResponse, SqsEvent, SqsMessage};
use futures::future::{join_all, join3};
use serde_json::Value;
use shared::aws::Aws;
use shared::config::Config;
use shared::conversation::store::ConversationStore;
use shared::deletion::{Deleter, Deletion};
use shared::error::Error;
use shared::event::follow_up::FollowUp;
use shared::event::store::EventStore;
use shared::export::Exporter;
use shared::http_client::HttpClient;
use shared::jobs::queue::{DEAD_LETTER_SUFFIX, Job, JobQueue};
use shared::pending_message::delivery::{Messages, Timing};
use shared::pending_message::store::MessageStore;
use shared::sandbox;
use shared::sandbox::store::SandboxStore;
use shared::start::saga::{Attempt, Saga};
use shared::start::store::StartTaskStore;
use shared::user::seal::Sealer;
use shared::user::settings::SettingsStore;

/// What this function may touch: everything that a start touches, and everything that goes with a conversation.
#[derive(Clone, Debug)]
pub struct Context {
    /// Goes on with starts.
    pub saga: Saga,
    /// Finishes deletions.
    pub deletion: Deletion,
    /// Does what is to be done on events.
    pub follow_up: FollowUp,
    /// Goes on with exports.
    pub exporter: Exporter,
    /// Delivers messages.
    pub messages: Messages,
}

impl Context {
    /// A context on the configured tables, queue and sandboxes.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        let (names, dynamodb) = (&config.names, &aws.dynamodb);
        let sandboxes = SandboxStore::new(dynamodb.clone(), names.sandboxes.clone(), sealer.clone());
        let sandboxes = sandbox::service(&config.sandbox, sandboxes);
        let http = HttpClient::new(config.address_policy);
        let exporter = Exporter::new(&config.export, names, aws, sandboxes.clone(), http.clone());
        let saga = Saga {
            tasks: StartTaskStore::new(
                dynamodb.clone(),
                names.start_tasks.clone(),
                names.users.clone(),
                aws.s3.clone(),
                names.bucket.clone(),
                sealer.clone(),
            ),
            conversations: ConversationStore::new(dynamodb.clone(), names.conversations.clone(), names.users.clone()),
            sandboxes,
            settings: SettingsStore::new(dynamodb.clone(), names.users.clone(), sealer.clone()),
            queue: JobQueue::new(aws.sqs.clone(), names.job_queue_url.clone()),
            http,
            sealer: sealer.clone(),
            config: config.start.clone(),
        };
        let events = EventStore::new(dynamodb.clone(), names.events.clone(), aws.s3.clone(), names.bucket.clone());
        let messages = MessageStore::new(dynamodb.clone(), names.users.clone(), aws.s3.clone(), names.bucket.clone());
        Self::new_with(saga, events, exporter, messages)
    }

    /// A context around a saga, and the events, exports and waiting messages of the conversations that it makes.
    #[must_use]
    pub fn new_with(saga: Saga, events: EventStore, exporter: Exporter, messages: MessageStore) -> Self {
        let follow_up = FollowUp {
            conversations: saga.conversations.clone(),
            events: events.clone(),
            sandboxes: saga.sandboxes.clone(),
            queue: saga.queue.clone(),
            http: saga.http.clone(),
        };
        let deletion = Deletion {
            deleter: Deleter { conversations: saga.conversations.clone(), queue: saga.queue.clone() },
            tasks: saga.tasks.clone(),
            events,
            exports: exporter.store().clone(),
            messages: messages.clone(),
            sandboxes: saga.sandboxes.clone(),
            http: saga.http.clone(),
        };
        let messages = Messages {
            store: messages,
            tasks: saga.tasks.clone(),
            conversations: saga.conversations.clone(),
            sandboxes: saga.sandboxes.clone(),
            queue: saga.queue.clone(),
            http: saga.http.clone(),
            timing: Timing::default(),
        };
        Self { saga, deletion, follow_up, exporter, messages }
    }
}

/// Handles whatever the function is invoked with: messages of the queue or of its dead-letter queue, or the schedule.
/// Of a batch, only the messages that failed are delivered again.
///
/// # Errors
/// When a scheduled sweep fails.
pub async fn handle(context: &Context, event: Value) -> Result<SqsBatchResponse, Error> {
    if event.get("Records").is_none() {
        let (starts, deletions, messages) =
            join3(context.saga.sweep(), context.deletion.sweep(), context.messages.sweep()).await;
        // Each has done what it could, whatever became of the others.
        let requeued = starts? + deletions? + messages?;
        if requeued > 0 {
            tracing::warn!(requeued, "worker.swept");
        }
        return Ok(SqsBatchResponse::default());
    }
    let event: SqsEvent = serde_json::from_value(event).map_err(Error::internal)?;
    let handled = event.records.iter().map(async |message| match handle_message(context, message).await {
        Ok(()) => None,
        Err(error) => {
            tracing::error!(message_id = message.message_id, error = %error.context(), "worker.failed");
            let mut failure = BatchItemFailure::default();
            failure.item_identifier = message.message_id.clone().unwrap_or_default();
            Some(failure)
        }
    });
    let mut response = SqsBatchResponse::default();
    response.batch_item_failures = join_all(handled).await.into_iter().flatten().collect();
    Ok(response)
}

async fn handle_message(context: &Context, message: &SqsMessage) -> Result<(), Error> {
    let dead = message.event_source_arn.as_deref().is_some_and(|arn| arn.ends_with(DEAD_LETTER_SUFFIX));
    let job = match Job::from_body(message.body.as_deref().unwrap_or_default()) {
        Ok(job) => job,
        Err(error) if dead => {
            // Nobody will ever read it; the start it may have been about is found by the sweep.
            tracing::error!(message_id = message.message_id, error = %error.context(), "worker.message_dropped");
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    match job {
        Job::AdvanceStart { user, task } if dead => context.saga.give_up(&user, task).await,
        Job::AdvanceStart { user, task } => {
            let attempt = context.saga.advance(&user, task).await?;
            tracing::debug!(%task, ?attempt, "worker.attempt_finished");
            match attempt {
                Attempt::Finished => context.messages.start_ended(&user, task).await,
                Attempt::Waiting | Attempt::Busy | Attempt::Unknown => Ok(()),
            }
        }
        // Whoever asks again rings again.
        Job::Export { conversation, .. } if dead => {
            tracing::error!(%conversation, "export.abandoned");
            Ok(())
        }
        Job::Export { user, conversation } => context.exporter.go_on(&user, conversation).await,
        // The sweep rings again.
        Job::DeliverMessages { conversation, .. } if dead => {
            tracing::error!(%conversation, "worker.messages_not_delivered");
            Ok(())
        }
        Job::DeliverMessages { user, conversation } => context.messages.deliver(&user, conversation).await,
        Job::DeleteConversation { conversation, .. } if dead => {
            // The sweep goes on ringing for it: what is left costs money, and somebody wants it gone.
            tracing::error!(%conversation, "worker.deletion_keeps_failing");
            Ok(())
        }
        Job::DeleteConversation { user, conversation } => context.deletion.finish(&user, conversation).await,
        Job::RefreshConversation { conversation, .. } | Job::ProcessEvents { conversation, .. } if dead => {
            // The next event of the conversation asks for it again.
            tracing::error!(%conversation, "worker.events_not_processed");
            Ok(())
        }
        Job::RefreshConversation { user, conversation, attempt } => {
            context.follow_up.refresh_from_agent_server(&user, conversation, attempt).await
        }
        Job::ProcessEvents { user, conversation } => context.follow_up.process_events(&user, conversation).await,
    }
}
