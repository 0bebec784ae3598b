//! Retry with exponential backoff and jitter, for every loop of this crate that repeats a call.
//!
//! No crate is used: the loops differ in what they retry (the unprocessed keys of a batch, a transaction with its token, the change of a
//! document that is read again), so they share only this arithmetic.

use std::time::Duration;

use tokio::time::sleep;

use crate::random;

/// The number of attempts and the length of the pauses between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// The longest pause after the first attempt. It doubles with each further attempt.
    pub first: Duration,
    /// The limit of all pauses.
    pub longest: Duration,
    /// The number of attempts, the first one included.
    pub attempts: u32,
}

impl Backoff {
    /// The pause after a number of failed attempts. It is random between half of its limit and its limit, so that callers that failed at
    /// the same time do not retry at the same time ("equal jitter").
    #[must_use]
    pub fn pause_after(&self, failed_attempts: u32) -> Duration {
        let doubled = 2_u32.saturating_pow(failed_attempts.saturating_sub(1));
        let bound = self.first.saturating_mul(doubled).min(self.longest);
        let half = bound / 2;
        half + half.mul_f64(random::fraction())
    }

    /// Starts to count attempts.
    #[must_use]
    pub fn start(self) -> Attempts {
        Attempts { backoff: self, begun: 0 }
    }
}

/// The attempts of one call.
#[derive(Debug)]
pub struct Attempts {
    backoff: Backoff,
    begun: u32,
}

impl Attempts {
    /// Starts the next attempt: the first one at once, every other one after a pause. Returns false when there are no more.
    pub async fn next(&mut self) -> bool {
        if self.is_last() {
            return false;
        }
        if self.begun > 0 {
            sleep(self.backoff.pause_after(self.begun)).await;
        }
        self.begun += 1;
        true
    }

    /// Whether no attempt follows the current one.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.begun >= self.backoff.attempts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff =
        Backoff { first: Duration::from_millis(10), longest: Duration::from_millis(60), attempts: 3 };

    #[test]
    fn pauses_double_up_to_the_longest_and_are_spread() {
        for (failed, bound) in [(0, 10), (1, 10), (2, 20), (3, 40), (4, 60), (40, 60), (u32::MAX, 60)] {
            let bound = Duration::from_millis(bound);
            let pauses: Vec<Duration> = (0..200).map(|_| BACKOFF.pause_after(failed)).collect();
            assert!(pauses.iter().all(|pause| (bound / 2..=bound).contains(pause)), "{failed}: {pauses:?}");
            let (shortest, longest) = (pauses.iter().min(), pauses.iter().max());
            assert!(longest.expect("a pause").saturating_sub(*shortest.expect("a pause")) > bound / 10, "{failed}");
        }
        let huge = Backoff { first: Duration::MAX, longest: Duration::from_secs(1), attempts: 1 };
        assert!(huge.pause_after(u32::MAX) <= Duration::from_secs(1));
    }

    #[tokio::test]
    async fn attempts_are_counted_and_pauses_come_between_them() {
        let began = tokio::time::Instant::now();
        let mut attempts = BACKOFF.start();
        assert!(attempts.next().await);
        assert!(!attempts.is_last());
        assert!(attempts.next().await);
        assert!(began.elapsed() >= Duration::from_millis(5));
        assert!(attempts.next().await);
        assert!(attempts.is_last());
        assert!(!attempts.next().await);
    }
}
