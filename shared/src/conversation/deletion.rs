//! Deleting a conversation: with the answer it is gone for everybody, and what belongs to it is removed by a worker.
//!
//! The record stays, seen by nobody, until nothing else is left; so a deletion that is cut off anywhere is finished by the
//! next look at it, which the sweep rings for. Every step may run twice, and at the same time.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::ConversationRecord;
use super::store::{ConversationStore, IMPORT_LIMIT};
use crate::agent_server::Failure;
use crate::clock::Time;
use crate::dynamo::Backoff;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::event::store::EventStore;
use crate::export::store::ExportStore;
use crate::http_client::HttpClient;
use crate::jobs::queue::{Job, JobQueue};
use crate::pending_message::store::MessageStore;
use crate::sandbox::SandboxService;
use crate::start::store::StartTaskStore;
use crate::start::sweep::sweep;
use crate::user::UserId;

/// How long after its message a deletion counts as forgotten.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(2);

/// How long the sweep leaves a deletion to the worker that looks at it: longer than an invocation can be.
const TURN: Duration = Duration::from_secs(180);

/// How often a deletion is repeated while sub-conversations are added or removed.
const DELETE: Backoff = Backoff { first: Duration::from_millis(20), longest: Duration::from_millis(160), attempts: 5 };

/// How long an agent server may take to end a conversation.
const AGENT_TIMEOUT: Duration = Duration::from_secs(30);

/// Begins deletions: all that a request does.
#[derive(Clone, Debug)]
pub struct Deleter {
    /// The records.
    pub conversations: ConversationStore,
    /// Where the bell is rung.
    pub queue: JobQueue,
}

impl Deleter {
    /// Deletes a conversation and its sub-conversations: from now on they do not exist to their user, and are not counted. What
    /// belongs to them is removed later. False when there is no such conversation.
    ///
    /// # Errors
    /// [`crate::Error::Store`]; sub-conversations may be gone then.
    pub async fn delete(&self, user: &UserId, id: Uuid) -> Result<bool> {
        let mut attempts = DELETE.start();
        while attempts.next().await {
            let family = self.conversations.family(user, id).await?;
            if family.is_empty() {
                return Ok(false);
            }
            if self.begin(user, &family).await? {
                return Ok(true);
            }
        }
        let context = format!("the conversation {id} and its sub-conversations kept changing while being deleted");
        Err(StoreError::new(StoreErrorKind::Conflict, context).into())
    }

    /// The first of the family last: as long as it is there, the deletion can be asked for again.
    async fn begin(&self, user: &UserId, family: &[ConversationRecord]) -> Result<bool> {
        for generation in family.chunks(IMPORT_LIMIT).rev() {
            let due_at = Time::now().plus(FORGOTTEN_AFTER);
            if !self.conversations.begin_deletion(user, generation, due_at).await? {
                return Ok(false);
            }
            for record in generation {
                tracing::info!(conversation = %record.id, "conversation.deletion_started");
                self.ring(user, record.id).await;
            }
        }
        Ok(true)
    }

    /// The row is the truth: the sweep finds it when the bell was not heard.
    async fn ring(&self, user: &UserId, conversation: Uuid) {
        let job = Job::DeleteConversation { user: user.clone(), conversation };
        if let Err(error) = self.queue.send(&job, Duration::ZERO).await {
            tracing::warn!(%conversation, error = %error.context(), "conversation.enqueue_failed");
        }
    }
}

/// Finishes deletions: what a worker does.
#[derive(Clone, Debug)]
pub struct Deletion {
    /// For sub-conversations that were not seen when their parent was deleted.
    pub deleter: Deleter,
    /// The tasks that started conversations.
    pub tasks: StartTaskStore,
    /// Their events.
    pub events: EventStore,
    /// Their exports.
    pub exports: ExportStore,
    /// Messages that wait for them.
    pub messages: MessageStore,
    /// The sandboxes that they ran in.
    pub sandboxes: Arc<dyn SandboxService>,
    /// For agent servers.
    pub http: HttpClient,
}

impl Deletion {
    /// Removes what belongs to a conversation that is being deleted, and then its record. Nothing happens when there is none.
    ///
    /// # Errors
    /// [`crate::Error::Store`] or [`crate::Error::Upstream`]: something is left, and the sweep rings again.
    pub async fn finish(&self, user: &UserId, id: Uuid) -> Result<()> {
        let conversations = &self.deleter.conversations;
        let Some(record) = conversations.take_deletion(user, id, Time::now().plus(TURN)).await? else { return Ok(()) };
        for child in conversations.sub_conversations(user, id).await? {
            self.deleter.delete(user, child).await?;
        }
        // First, so that the events it still sends meet a conversation that is being deleted, and are not kept.
        self.delete_from_agent_server(&record).await?;
        self.tasks.delete_of_conversation(user, id).await?;
        self.events.delete_all(user, id).await?;
        self.exports.delete_all(user, id).await?;
        self.messages.delete_all(user, id).await?;
        self.delete_unused_sandbox(&record).await?;
        conversations.end_deletion(user, id).await?;
        tracing::info!(conversation = %id, "conversation.deleted");
        Ok(())
    }

    /// Rings for deletions that nobody looks after, of all users. Answers how many there were.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn sweep(&self) -> Result<usize> {
        sweep(&self.deleter.conversations.deletions(), &self.deleter.queue, |row| Job::DeleteConversation {
            user: row.user.clone(),
            conversation: row.id,
        })
        .await
    }

    /// Best effort: a paused sandbox keeps its copy, which nobody can reach, until the sandbox goes.
    async fn delete_from_agent_server(&self, record: &ConversationRecord) -> Result<()> {
        let sandbox = self.sandboxes.get(&record.user, &record.sandbox_id).await?;
        let Some(agent_server) = sandbox.and_then(|sandbox| sandbox.agent_server(&self.http)) else { return Ok(()) };
        match agent_server.delete_conversation(record.id, AGENT_TIMEOUT).await {
            Err(error) if !matches!(error.failure, Failure::Status(status, _) if status == http::StatusCode::NOT_FOUND) =>
            {
                tracing::warn!(conversation = %record.id, %error, "conversation.not_deleted_from_agent_server");
            }
            _ => {}
        }
        Ok(())
    }

    /// The sandbox goes with the last conversation in it, unless a start is on its way into it.
    async fn delete_unused_sandbox(&self, record: &ConversationRecord) -> Result<()> {
        let (user, sandbox) = (&record.user, &record.sandbox_id);
        if self.sandboxes.get(user, sandbox).await?.is_none()
            || self.deleter.conversations.count_in_sandbox(user, sandbox).await? > 0
            || self.tasks.is_bound_for(user, sandbox).await?
        {
            return Ok(());
        }
        self.sandboxes.delete(user, sandbox).await?;
        tracing::info!(sandbox, "conversation.sandbox_deleted");
        Ok(())
    }
}
