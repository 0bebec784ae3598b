//! Deletion of a conversation. After the response to the request, no client can see the conversation; a worker then removes everything that
//! belongs to it.
//!
//! The record stays, hidden, until everything else is removed. The sweep enqueues the next attempt of an interrupted deletion. Every step
//! is idempotent and may run concurrently with itself. A tombstone then remembers the id, because an agent server may still report the
//! conversation: one whose sandbox was paused, or whose agent was busy.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::agent_server::Failure;
use crate::clock::Time;
use crate::conversation::ConversationRecord;
use crate::conversation::store::{ConversationStore, IMPORT_LIMIT, UnfinishedDeletion};
use crate::dynamo::Backoff;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::event::store::EventStore;
use crate::export::store::ExportStore;
use crate::http_client::HttpClient;
use crate::id::UserId;
use crate::jobs::delete_conversation::{DeleteConversation, RETRY_AFTER_ATTEMPT, RETRY_AFTER_REQUEST};
use crate::jobs::queue::JobQueue;
use crate::jobs::sweep::sweep;
use crate::pending_message::store::MessageStore;
use crate::sandbox::SandboxService;
use crate::sandbox::reconciler::SandboxReconciler;
use crate::start::store::StartTaskStore;

/// The backoff between attempts to hide a conversation and its sub-conversations while sub-conversations are added or removed.
const DELETE: Backoff = Backoff { first: Duration::from_millis(20), longest: Duration::from_millis(160), attempts: 5 };

/// The shortest delay before the next attempt of a deletion whose sandbox's provider does not respond.
const SHORTEST_DELAY: Duration = Duration::from_secs(2);

/// The time limit of an agent server's request to delete a conversation.
const AGENT_TIMEOUT: Duration = Duration::from_secs(30);

/// Accepts deletions: the part that runs in the request.
#[derive(Clone, Debug)]
pub struct Deleter {
    pub conversations: ConversationStore,
    pub queue: JobQueue,
}

impl Deleter {
    /// Hides a conversation and its sub-conversations from their user, removes them from counts, and enqueues the jobs that delete
    /// them. Returns false when there is no such conversation.
    ///
    /// # Errors
    /// [`crate::Error::Store`]; sub-conversations may be deleted by then.
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

    /// Hides the sub-conversations first: while their parent exists, the user can request the deletion again.
    async fn begin(&self, user: &UserId, family: &[ConversationRecord]) -> Result<bool> {
        for generation in family.chunks(IMPORT_LIMIT).rev() {
            let due_at = Time::now().plus(RETRY_AFTER_REQUEST);
            if !self.conversations.begin_deletion(user, generation, due_at).await? {
                return Ok(false);
            }
            for record in generation {
                tracing::info!(conversation = %record.id, "conversation.deletion_started");
                self.enqueue(user, record.id, Duration::ZERO).await;
            }
        }
        Ok(true)
    }

    /// A failure is only logged: the sweep enqueues the job of an overdue row.
    async fn enqueue(&self, user: &UserId, conversation: Uuid, delay: Duration) {
        let job = DeleteConversation { user: user.clone(), conversation }.into();
        if let Err(error) = self.queue.send(&job, delay).await {
            tracing::warn!(%conversation, error = %error.context(), "conversation.enqueue_failed");
        }
    }
}

/// Finishes deletions: the part that runs in a worker.
#[derive(Clone, Debug)]
pub struct Deletion {
    /// Deletes sub-conversations that were not found when their parent was deleted.
    pub deleter: Deleter,
    pub tasks: StartTaskStore,
    pub events: EventStore,
    pub exports: ExportStore,
    pub messages: MessageStore,
    pub reconciler: SandboxReconciler,
    pub sandboxes: Arc<dyn SandboxService>,
    pub http: HttpClient,
    /// How long indexes may lag.
    pub index_lag: Duration,
}

impl Deletion {
    /// Removes everything that belongs to a conversation that is being deleted, and then replaces its record by a tombstone. Removes an
    /// expired tombstone. Does nothing when there is neither.
    ///
    /// # Errors
    /// [`crate::Error::Store`]; the deletion is unfinished then, and the sweep enqueues it again. If the sandbox's provider does not respond, the
    /// job is enqueued again with a delay.
    pub async fn finish(&self, user: &UserId, id: Uuid) -> Result<()> {
        let conversations = &self.deleter.conversations;
        let taken = conversations.take_deletion(user, id, Time::now().plus(RETRY_AFTER_ATTEMPT)).await?;
        let Some(UnfinishedDeletion { record, since }) = taken else { return self.expire(user, id).await };
        for child in conversations.sub_conversations(user, id).await? {
            self.deleter.delete(user, child).await?;
        }
        // Only when the indexes contain all that was written before the deletion began, they have every sub-conversation and start task.
        // None was added since: a start becomes READY on the condition that the parent of its conversation is not being deleted.
        let left = self.index_lag.saturating_sub(Time::now().since(since));
        if !left.is_zero() {
            self.deleter.enqueue(user, id, left).await;
            return Ok(());
        }
        // This runs before the events are deleted, because the agent server may still send events. They are not stored while the record
        // exists.
        match self.delete_from_agent_server(&record).await {
            Err(error) if error.is_upstream() => {
                // As long as the deletion has lasted so far: soon after a short outage, seldom in a long one.
                let delay = Time::now().since(since).clamp(SHORTEST_DELAY, RETRY_AFTER_ATTEMPT);
                let delay_s = delay.as_secs();
                tracing::warn!(conversation = %id, delay_s, error = %error.context(), "conversation.deletion_delayed");
                self.deleter.enqueue(user, id, delay).await;
                return Ok(());
            }
            deleted => deleted?,
        }
        self.tasks.delete_of_conversation(user, id).await?;
        self.events.delete_all(user, id).await?;
        self.exports.delete_all(user, id).await?;
        self.messages.delete_all(user, id).await?;
        self.leave_sandbox(&record).await?;
        conversations.end_deletion(user, id).await?;
        tracing::info!(conversation = %id, "conversation.deleted");
        Ok(())
    }

    /// Removes a tombstone that has expired. A write of events whose caller no longer waited may have taken effect after the deletion, so events
    /// are removed once more.
    async fn expire(&self, user: &UserId, id: Uuid) -> Result<()> {
        let conversations = &self.deleter.conversations;
        if conversations.has_expired(user, id).await? {
            self.events.delete_all(user, id).await?;
            conversations.remove_tombstone(user, id).await?;
        }
        Ok(())
    }

    /// Enqueues the jobs of overdue deletions of all users again. Returns how many.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn sweep(&self) -> Result<usize> {
        sweep(&self.deleter.conversations.deletions(), &self.deleter.queue, |row| {
            Some(DeleteConversation { user: row.user.clone(), conversation: row.uuid()? })
        })
        .await
    }

    /// Best effort: a paused sandbox keeps its copy, which no client can access, until the sandbox is deleted. An error means that the
    /// state of the sandbox is unknown.
    async fn delete_from_agent_server(&self, record: &ConversationRecord) -> Result<()> {
        let sandbox = self.sandboxes.inspect(&record.user, &record.sandbox_id).await?;
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

    /// Ends the membership of the conversation in its sandbox, which is deleted after its last member has left.
    async fn leave_sandbox(&self, record: &ConversationRecord) -> Result<()> {
        let records = &self.reconciler.records;
        let left = records.remove_conversation(&record.user, &record.sandbox_id, record.id, true).await?;
        if let Some(sandbox) = left {
            self.reconciler.member_left(&sandbox).await;
        }
        Ok(())
    }
}
