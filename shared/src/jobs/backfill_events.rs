//! Job: fetch the events of a conversation that its agent server has and that have not arrived.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::dead_letter::{DeadLetterPolicy, Requeue};
use super::queue::Job;
use crate::id::{UserId, as_hex};

/// Dead-letter policy: an error in the log. The next report of the conversation's agent server, or the next check whether its sandbox is
/// idle, enqueues the job again.
pub const DEAD_LETTER_POLICY: DeadLetterPolicy = DeadLetterPolicy::LogUntil(Requeue::NextEvent);

/// The delay between a report and the job. In this time agent servers post the events before the report. No second job is enqueued
/// meanwhile.
pub const DELAY: Duration = Duration::from_secs(5);
/// Retry schedule: the delay after each attempt at which the agent server did not respond.
const DELAYS: [Duration; 3] = [Duration::from_secs(10), Duration::from_secs(60), Duration::from_secs(300)];
/// The time limit of an attempt. It is shorter than an invocation of the worker.
pub const TIME_LIMIT: Duration = Duration::from_secs(100);

/// Which conversation's events to fetch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackfillEvents {
    pub user: UserId,
    #[serde(with = "as_hex")]
    pub conversation: Uuid,
    /// The number of earlier attempts.
    pub attempt: usize,
}

impl BackfillEvents {
    /// The next attempt and its delay; `None` when this was the last one.
    #[must_use]
    pub fn retry(&self) -> Option<(Self, Duration)> {
        let delay = *DELAYS.get(self.attempt)?;
        Some((Self { attempt: self.attempt + 1, ..self.clone() }, delay))
    }
}

impl From<BackfillEvents> for Job {
    fn from(job: BackfillEvents) -> Self {
        Self::BackfillEvents(job)
    }
}
