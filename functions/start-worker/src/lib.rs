//! The worker behind the queue: advances starts, finishes deletions, fetches titles and processes events, sweeps up what was
//! forgotten, and gives up honestly.

use aws_lambda_events::event::sqs::{BatchItemFailure, SqsBatchResponse, SqsEvent, SqsMessage};
use futures::future::{join, join_all};
use serde_json::Value;
use shared::agent_server::AgentServer;
use shared::aws::Aws;
use shared::config::Config;
use shared::conversation::deletion::{Deleter, Deletion};
use shared::conversation::store::ConversationStore;
use shared::error::Error;
use shared::event::processors::Processors;
use shared::event::store::EventStore;
use shared::sandbox;
use shared::sandbox::store::SandboxStore;
use shared::start::queue::{DEAD_LETTER_SUFFIX, Job, StartQueue};
use shared::start::saga::Saga;
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
    pub processors: Processors,
}

impl Context {
    /// A context on the configured tables, queue and sandboxes.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Result<Self, Error> {
        let (names, dynamodb) = (&config.names, &aws.dynamodb);
        let sandboxes = SandboxStore::new(dynamodb.clone(), names.sandboxes.clone(), sealer.clone());
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
            sandboxes: sandbox::service(&config.sandbox, sandboxes),
            settings: SettingsStore::new(dynamodb.clone(), names.users.clone(), sealer.clone()),
            queue: StartQueue::new(aws.sqs.clone(), names.start_queue_url.clone()),
            http: AgentServer::http_client().map_err(Error::internal)?,
            sealer: sealer.clone(),
            config: config.start.clone(),
        };
        let events = EventStore::new(dynamodb.clone(), names.events.clone(), aws.s3.clone(), names.bucket.clone());
        Ok(Self::new_with(saga, events))
    }

    /// A context around a saga, and the events of the conversations that it makes.
    #[must_use]
    pub fn new_with(saga: Saga, events: EventStore) -> Self {
        let processors = Processors {
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
            sandboxes: saga.sandboxes.clone(),
            http: saga.http.clone(),
        };
        Self { saga, deletion, processors }
    }
}

/// Handles whatever the function is invoked with: messages of the queue or of its dead-letter queue, or the schedule.
/// Of a batch, only the messages that failed are delivered again.
///
/// # Errors
/// When a scheduled sweep fails.
pub async fn handle(context: &Context, event: Value) -> Result<SqsBatchResponse, Error> {
    if event.get("Records").is_none() {
        let (starts, deletions) = join(context.saga.sweep(), context.deletion.sweep()).await;
        let rung = starts? + deletions?;
        if rung > 0 {
            tracing::warn!(rung, "start_worker.swept");
        }
        return Ok(SqsBatchResponse::default());
    }
    let event: SqsEvent = serde_json::from_value(event).map_err(Error::internal)?;
    let handled = event.records.iter().map(async |message| match handle_message(context, message).await {
        Ok(()) => None,
        Err(error) => {
            tracing::error!(message_id = message.message_id, error = %error.context(), "start_worker.failed");
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
            tracing::error!(message_id = message.message_id, error = %error.context(), "start_worker.message_dropped");
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    match job {
        Job::AdvanceStart { user, task } if dead => context.saga.give_up(&user, task).await,
        Job::AdvanceStart { user, task } => {
            let turn = context.saga.advance(&user, task).await?;
            tracing::debug!(%task, ?turn, "start_worker.turn");
            Ok(())
        }
        Job::DeleteConversation { conversation, .. } if dead => {
            // The sweep goes on ringing for it: what is left costs money, and somebody wants it gone.
            tracing::error!(%conversation, "start_worker.deletion_keeps_failing");
            Ok(())
        }
        Job::DeleteConversation { user, conversation } => context.deletion.finish(&user, conversation).await,
        Job::LookAtConversation { conversation, .. } | Job::ProcessEvents { conversation, .. } if dead => {
            // The next event of the conversation asks for it again.
            tracing::error!(%conversation, "start_worker.events_not_processed");
            Ok(())
        }
        Job::LookAtConversation { user, conversation, look } => {
            context.processors.look_at(&user, conversation, look).await
        }
        Job::ProcessEvents { user, conversation } => context.processors.process_events(&user, conversation).await,
    }
}
