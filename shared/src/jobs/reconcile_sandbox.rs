//! Job: compare a sandbox with its record, and delete it if it is marked for deletion or no longer used.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::dead_letter::{DeadLetterPolicy, Requeue};
use super::queue::Job;
use crate::dynamo::Backoff;
use crate::id::UserId;

/// Dead-letter policy: an error in the log. The record stays in the index of due sandboxes and the sweep enqueues the job again, without
/// end: a sandbox that still runs costs money.
pub const DEAD_LETTER_POLICY: DeadLetterPolicy = DeadLetterPolicy::LogUntil(Requeue::Sweep);

/// Failed attempts in a row after which each further one is logged as an error, which raises an alarm: about a quarter of an hour.
pub const ALARM_AFTER: u32 = 8;

/// Failed attempts in a row that are not logged: a provider often has a sandbox for a moment after it has agreed to delete it.
pub const ORDINARY_ATTEMPTS: u32 = 1;

/// The longest delay between two attempts.
pub const LONGEST_RETRY: Duration = Duration::from_secs(600);

const BACKOFF: Backoff = Backoff { first: Duration::from_secs(4), longest: LONGEST_RETRY, attempts: u32::MAX };

/// Which sandbox to reconcile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReconcileSandbox {
    pub user: UserId,
    pub sandbox: String,
}

impl From<ReconcileSandbox> for Job {
    fn from(job: ReconcileSandbox) -> Self {
        Self::ReconcileSandbox(job)
    }
}

/// Retry schedule: the delay after a number of failed attempts in a row, at least one. Exponential backoff up to ten minutes, without end.
#[must_use]
pub fn delay_after(attempts: u32) -> Duration {
    BACKOFF.pause_after(attempts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backoff_grows_and_the_alarm_comes_within_minutes() {
        for (attempts, bound) in [(1, 4), (2, 8), (7, 256), (8, 512), (9, 600), (1000, 600)] {
            let delay = delay_after(attempts).as_secs_f64();
            assert!((f64::from(bound) / 2.0..=f64::from(bound)).contains(&delay), "{attempts}: {delay}");
        }
        let longest: u32 = (1..ALARM_AFTER).map(|attempts| 4 << (attempts - 1)).sum();
        assert!(longest < 10 * 60, "{longest} s");
    }
}
