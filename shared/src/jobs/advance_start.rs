//! Job: advance a start by as many steps as are possible without a long wait.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::dead_letter::DeadLetterPolicy;
use super::queue::Job;
use crate::clock::Time;
use crate::dynamo::Backoff;
use crate::id::{UserId, as_hex};

/// Dead-letter policy: the start ends with ERROR, and its `detail` says so. Workers have failed at it without being able to record
/// why, so no further attempt is made, except to undo what it made.
pub const DEAD_LETTER_POLICY: DeadLetterPolicy = DeadLetterPolicy::Fail;

/// Retry schedule: a step that fails this often in a row has failed. An attempt that ends with the death of its worker counts.
pub const MAX_ATTEMPTS: u32 = 8;
/// Retry schedule: a step has failed when an agent server answers it this often in a row with an error of its own (see
/// [`Retry::Few`](crate::agent_server::Retry::Few)). The texts are not compared: they hold paths of temporary files and ids, so that
/// a permanent mistake would look like a new one each time.
pub const MAX_REFUSALS: u32 = 3;

const BACKOFF: Backoff =
    Backoff { first: Duration::from_millis(500), longest: Duration::from_secs(8), attempts: MAX_ATTEMPTS };
/// Retry schedule of the compensation of a failed start. It has no last attempt.
const COMPENSATION: Backoff =
    Backoff { first: Duration::from_secs(1), longest: Duration::from_secs(900), attempts: u32::MAX };
/// Temporary errors of an agent server pass within seconds (a network that a new sandbox does not have yet, a lock).
const FIRST_REFUSAL_DELAY: Duration = Duration::from_secs(1);
const REFUSAL_DELAY_FACTOR: u32 = 3;

/// Which start to advance. Rows of starts whose job was lost are enqueued again by the sweep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdvanceStart {
    pub user: UserId,
    #[serde(with = "as_hex")]
    pub task: Uuid,
    /// For a delayed job: the due time of its row when the job was enqueued. If the row is due later now, another job has been enqueued
    /// since, and this one ends. Otherwise each job that the queue delivers twice would start a second series of retries. Jobs of earlier
    /// versions have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due_at: Option<Time>,
}

impl From<AdvanceStart> for Job {
    fn from(job: AdvanceStart) -> Self {
        Self::AdvanceStart(job)
    }
}

/// Exponential backoff before the next attempt at a step that failed `attempts` times, at least once: 500 ms, doubled up to 8 s,
/// with jitter. All pauses together last for 16 s to 32 s, so that a network failure of 16 s ends no start.
#[must_use]
pub fn delay_after(attempts: u32) -> Duration {
    BACKOFF.pause_after(attempts)
}

/// Exponential backoff before the next attempt to undo what a failed start made, after `attempts` failed ones: 1 s, doubled up to 15
/// minutes, with jitter.
#[must_use]
pub fn delay_after_compensation(attempts: u32) -> Duration {
    COMPENSATION.pause_after(attempts)
}

/// Exponential backoff before the next attempt at a step that an agent server refused `refusals` times, at least once: 1 s, tripled
/// each time.
#[must_use]
pub fn delay_after_refusal(refusals: u32) -> Duration {
    FIRST_REFUSAL_DELAY * REFUSAL_DELAY_FACTOR.saturating_pow(refusals.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backoff_grows_up_to_its_bound() {
        for (attempts, bound) in (1..=MAX_ATTEMPTS).zip([500, 1000, 2000, 4000, 8000, 8000, 8000, 8000]) {
            let delay = delay_after(attempts).as_millis();
            assert!((bound / 2..=bound).contains(&delay), "{attempts}: {delay}");
        }
        let delays: Vec<u64> = (1..=MAX_REFUSALS).map(|refusals| delay_after_refusal(refusals).as_secs()).collect();
        assert_eq!(delays, [1, 3, 9]);
    }
}
