//! Job: poll a conversation's agent server for its title and metrics, where it does not report them.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::dead_letter::{DeadLetterPolicy, Requeue};
use super::queue::Job;
use crate::id::{UserId, as_hex};

/// Dead-letter policy: an error in the log. The next event of the conversation that calls for a refresh enqueues the job again.
pub const DEAD_LETTER_POLICY: DeadLetterPolicy = DeadLetterPolicy::LogUntil(Requeue::NextEvent);

/// The delay between an event that calls for a refresh and the first attempt.
pub const FIRST_DELAY: Duration = Duration::from_secs(3);
/// Retry schedule: the delay after each attempt, while something is missing. Agent servers do not report when they have found a
/// title.
const DELAYS: [Duration; 5] = [
    Duration::from_secs(3),
    Duration::from_secs(6),
    Duration::from_secs(12),
    Duration::from_secs(30),
    Duration::from_secs(60),
];

/// Which conversation to refresh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefreshConversation {
    pub user: UserId,
    #[serde(with = "as_hex")]
    pub conversation: Uuid,
    /// The number of earlier attempts since the event.
    #[serde(alias = "look")] // in messages of versions before the rename
    pub attempt: usize,
}

impl RefreshConversation {
    /// The next attempt and its delay; `None` when this was the last one. The next message of the conversation starts the schedule
    /// again.
    #[must_use]
    pub fn retry(&self) -> Option<(Self, Duration)> {
        let delay = *DELAYS.get(self.attempt)?;
        Some((Self { attempt: self.attempt + 1, ..self.clone() }, delay))
    }
}

impl From<RefreshConversation> for Job {
    fn from(job: RefreshConversation) -> Self {
        Self::RefreshConversation(job)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_end() {
        let mut job = RefreshConversation { user: UserId::new("u"), conversation: Uuid::nil(), attempt: 0 };
        let mut delays = Vec::new();
        while let Some((next, delay)) = job.retry() {
            delays.push(delay.as_secs());
            job = next;
        }
        assert_eq!(delays, [3, 6, 12, 30, 60]);
        assert_eq!(job.attempt, 5);
    }
}
