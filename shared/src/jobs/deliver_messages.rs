//! Job: deliver the pending messages of a conversation.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::dead_letter::{DeadLetterPolicy, Requeue};
use super::queue::Job;
use crate::clock::Time;
use crate::dynamo::Backoff;
use crate::id::{UserId, as_hex};

/// Dead-letter policy: an error in the log. The queue of messages stays in the index of undelivered ones, and the sweep enqueues the
/// job again.
pub const DEAD_LETTER_POLICY: DeadLetterPolicy = DeadLetterPolicy::LogUntil(Requeue::Sweep);

/// Attempts after which the delay is [`RetrySchedule::later_delay`]: with the default delays, about an hour.
pub const FREQUENT_ATTEMPTS: u32 = 60;

/// Which conversation's messages to deliver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeliverMessages {
    pub user: UserId,
    #[serde(with = "as_hex")]
    pub conversation: Uuid,
    /// As in [`AdvanceStart`](super::advance_start::AdvanceStart::due_at).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due_at: Option<Time>,
}

impl From<DeliverMessages> for Job {
    fn from(job: DeliverMessages) -> Self {
        Self::DeliverMessages(job)
    }
}

/// When a delivery that failed is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetrySchedule {
    /// The delay after the first failed attempt. Exponential backoff doubles it up to `max_delay`.
    pub first_delay: Duration,
    pub max_delay: Duration,
    /// The delay once a delivery has failed for about an hour, for as long as the messages wait.
    pub later_delay: Duration,
    /// An agent server that answers this often in a row with an error of its own will never accept the message.
    pub max_refusals: u32,
}

impl Default for RetrySchedule {
    fn default() -> Self {
        Self {
            first_delay: Duration::from_secs(2),
            max_delay: Duration::from_secs(60),
            later_delay: Duration::from_secs(900),
            // Within two minutes.
            max_refusals: 7,
        }
    }
}

impl RetrySchedule {
    /// The delay before the next attempt, after `attempts` failed ones before the current one.
    #[must_use]
    pub fn delay_after(&self, attempts: u32) -> Duration {
        if attempts > FREQUENT_ATTEMPTS {
            return self.later_delay;
        }
        let backoff = Backoff { first: self.first_delay, longest: self.max_delay, attempts: u32::MAX };
        backoff.pause_after(attempts.saturating_add(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backoff_grows_and_then_becomes_rare() {
        let schedule = RetrySchedule::default();
        for (attempts, bound) in [(0, 2_000), (1, 4_000), (4, 32_000), (5, 60_000), (6, 60_000), (60, 60_000)] {
            let delay = schedule.delay_after(attempts).as_millis();
            assert!((bound / 2..=bound).contains(&delay), "{attempts}: {delay}");
        }
        assert_eq!([61, u32::MAX].map(|attempts| schedule.delay_after(attempts).as_secs()), [900, 900]);
    }
}
