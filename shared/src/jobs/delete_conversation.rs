//! Job: remove everything that belongs to a deleted conversation.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::dead_letter::{DeadLetterPolicy, Requeue};
use super::queue::Job;
use crate::id::{UserId, as_hex};

/// Dead-letter policy: an error in the log. The row stays in the index of deletions and the sweep enqueues the job again, without end:
/// what is left costs money, and its user has asked for its removal.
pub const DEAD_LETTER_POLICY: DeadLetterPolicy = DeadLetterPolicy::LogUntil(Requeue::Sweep);

/// Retry schedule: how long after the deletion was requested the sweep enqueues the job again, if no worker has begun it. The delay
/// is for the message that the request itself enqueues.
pub const RETRY_AFTER_REQUEST: Duration = Duration::from_secs(2);
/// Retry schedule: how long after an attempt began the sweep enqueues the job again, if the deletion is still unfinished. It is
/// longer than an invocation of the worker can be.
pub const RETRY_AFTER_ATTEMPT: Duration = Duration::from_secs(180);

/// Which conversation to remove.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeleteConversation {
    pub user: UserId,
    #[serde(with = "as_hex")]
    pub conversation: Uuid,
}

impl From<DeleteConversation> for Job {
    fn from(job: DeleteConversation) -> Self {
        Self::DeleteConversation(job)
    }
}
