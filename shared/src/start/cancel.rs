//! Cancels starts, and removes the records of failed ones.

use uuid::Uuid;

use super::saga::enqueue;
use super::store::{Abandoned, StartTaskStore};
use super::task::StartStatus;
use crate::clock::Time;
use crate::error::{Error, Result};
use crate::id::{self, UserId};
use crate::jobs::queue::JobQueue;
use crate::metrics::{self, Outcome};

/// The `detail` of a start that its user has cancelled.
pub const CANCELLED: &str = "The start was cancelled";

/// Cancels starts.
#[derive(Clone, Debug)]
pub struct Canceller {
    pub tasks: StartTaskStore,
    /// Receives the job that undoes what the start made.
    pub queue: JobQueue,
}

impl Canceller {
    /// Ends an unfinished start with ERROR; a worker undoes what it made. Removes the record of a failed start. While what that start made
    /// is being undone, the record stays. The call may be repeated.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Conflict`] for a start that is READY; [`Error::Store`].
    pub async fn cancel(&self, user: &UserId, task: Uuid) -> Result<()> {
        match self.tasks.abandon(user, task, CANCELLED).await? {
            Abandoned::Now { free_at, record } => {
                record.record_in_log();
                metrics::start_ended(Outcome::Cancelled, Time::now().since(record.created_at), record.claims);
                tracing::info!(%task, "start.cancelled");
                enqueue(&self.queue, user, task, free_at.since(Time::now()), None).await;
                Ok(())
            }
            Abandoned::Before(record) if record.now.status == StartStatus::Ready => {
                let conversation = record.now.app_conversation_id.unwrap_or(record.conversation_id);
                Err(Error::Conflict(format!(
                    "The start is READY. To remove what it made, delete its conversation: DELETE /api/v1/app-conversations/{}",
                    id::dashed(conversation)
                )))
            }
            Abandoned::Before(record) => {
                if self.tasks.remove_failed(user, &record).await? {
                    tracing::info!(%task, "start.removed");
                }
                Ok(())
            }
            Abandoned::Unknown => Err(Error::NotFound("Start not found".into())),
        }
    }
}
