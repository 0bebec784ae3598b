//! Job: run the event callback processors of a conversation on its new events.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::dead_letter::{DeadLetterPolicy, Requeue};
use super::queue::Job;
use crate::dynamo::INDEX_LAG;
use crate::id::{UserId, as_hex};

/// Dead-letter policy: an error in the log. The next event of the conversation enqueues the job again, and it begins where the last
/// successful attempt ended.
///
/// Retry schedule: none of its own; SQS delivers the message again after its visibility timeout.
pub const DEAD_LETTER_POLICY: DeadLetterPolicy = DeadLetterPolicy::LogUntil(Requeue::NextEvent);

/// Which conversation's events to process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEvents {
    pub user: UserId,
    #[serde(with = "as_hex")]
    pub conversation: Uuid,
    /// The last position that this job processes. The index may contain later events in another order than they were stored in; their
    /// own jobs process them. Without it, in messages of earlier versions, the job processes all events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub up_to: Option<String>,
}

/// The delay of the job after its events were stored. Then the index contains all of them.
pub const DELAY: Duration = INDEX_LAG;

impl From<ProcessEvents> for Job {
    fn from(job: ProcessEvents) -> Self {
        Self::ProcessEvents(job)
    }
}
