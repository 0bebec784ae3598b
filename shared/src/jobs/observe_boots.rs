//! Job: observe the sandboxes of all starts that wait for one, in one request to the provider.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::dead_letter::{DeadLetterPolicy, Requeue};
use super::queue::Job;

/// Dead-letter policy: an error in the log. The sweep enqueues the job while starts wait, and each start has a due time of its own.
pub const DEAD_LETTER_POLICY: DeadLetterPolicy = DeadLetterPolicy::LogUntil(Requeue::Sweep);

/// Retry schedule: the delays between observations while starts wait. Most sandboxes boot within seconds, so the delays begin again when
/// another start begins to wait.
const DELAYS: [Duration; 6] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(3),
    Duration::from_secs(5),
    Duration::from_secs(8),
    Duration::from_secs(10),
];

/// The observation of all boots. There is one such job at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObserveBoots {}

impl From<ObserveBoots> for Job {
    fn from(job: ObserveBoots) -> Self {
        Self::ObserveBoots(job)
    }
}

/// The delay before the next observation when the start that waits for the shortest time has waited for `age`.
#[must_use]
pub fn delay_at_age(age: Duration) -> Duration {
    let mut end = Duration::ZERO;
    for delay in DELAYS {
        end += delay;
        // A job comes up to a second late, because queues delay by whole seconds.
        if age < end {
            return delay;
        }
    }
    DELAYS[DELAYS.len() - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_grows_with_the_wait() {
        let (mut age, mut delays) = (0, Vec::new());
        while age < 60 {
            let delay = delay_at_age(Duration::from_secs(age)).as_secs();
            delays.push(delay);
            age += delay;
        }
        assert_eq!(delays, [1, 2, 3, 5, 8, 10, 10, 10, 10, 10]);
    }
}
