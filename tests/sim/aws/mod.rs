//! Models of the AWS services that the product uses: DynamoDB, SQS with Lambda's event source mappings, and S3. They have the semantics
//! and the faults that the embedded engines of `cargo local` do not have.

pub mod dynamodb;
mod engine;
mod expressions;
pub mod lambda;
pub mod s3;
pub mod sdk_client;
pub mod services;
pub mod sqs;
mod tests;

use std::collections::BTreeMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use tokio::time::Instant;

use crate::dice;

/// The simulated wall clock: tokio's paused clock, which begins at a fixed time.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    epoch: Timestamp,
    began: Instant,
}

impl Clock {
    /// Begins now, at this wall-clock time.
    pub fn start(epoch: Timestamp) -> Self {
        Self { epoch, began: Instant::now() }
    }

    pub fn now(&self) -> SystemTime {
        SystemTime::from(self.epoch) + self.elapsed()
    }

    pub fn unix_seconds(&self) -> f64 {
        self.now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
    }

    pub fn unix_millis(&self) -> u64 {
        let since = self.now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    /// The time since the simulation began.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }
}

/// What AWS does to calls. Each share is a probability from 0 to 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Faults {
    /// Calls without a connection. They have no effect.
    pub refused: f64,
    /// Calls that fail with status 500 and have no effect.
    pub failed: f64,
    /// Calls that have their effect, and fail with status 500 or without a response.
    pub lost: f64,
    /// Calls that never have a response. Half of them have their effect.
    pub hung: f64,
    /// Minutes in which a service fails half of its calls.
    pub outages: f64,
    /// Calls that take two seconds.
    pub slow: f64,
    /// Calls that have their effect 6 to 20 seconds late, when the client has given up.
    pub stalled: f64,
    /// Partitions of DynamoDB that are throttled for up to five seconds in a period of twenty; calls of S3 and SQS that are throttled.
    pub throttled: f64,
    /// Writes of DynamoDB that conflict with another transaction.
    pub conflicts: f64,
    /// Batches of which DynamoDB leaves a part unprocessed.
    pub unprocessed: f64,
    /// Reads without `ConsistentRead` that a late replica serves.
    pub late_replicas: f64,
    /// How long a replica may be late.
    pub replica_lag: Duration,
    /// How long a secondary index lags at most, except for long lags.
    pub lag: Duration,
    /// Periods in which an index lags by up to [`Faults::longest_lag`].
    pub long_lags: f64,
    pub longest_lag: Duration,
    /// Messages that SQS delivers once more, also after they were deleted.
    pub duplicated: f64,
    /// Messages that SQS delivers up to a minute late.
    pub delayed: f64,
    /// How far the order of messages differs from the order in which they were sent.
    pub reordering: Duration,
    /// Invocations of functions that crash.
    pub crashed: f64,
    /// Invocations whose process stands still for up to two minutes, and then goes on.
    pub frozen: f64,
    /// Deletions by Lambda of messages that were processed, which fail.
    pub undeleted: f64,
}

impl Faults {
    /// No faults. Indexes are current.
    pub fn none() -> Self {
        Self {
            refused: 0.0,
            failed: 0.0,
            lost: 0.0,
            hung: 0.0,
            outages: 0.0,
            slow: 0.0,
            stalled: 0.0,
            throttled: 0.0,
            conflicts: 0.0,
            unprocessed: 0.0,
            late_replicas: 0.0,
            replica_lag: Duration::ZERO,
            lag: Duration::ZERO,
            long_lags: 0.0,
            longest_lag: Duration::ZERO,
            duplicated: 0.0,
            delayed: 0.0,
            reordering: Duration::ZERO,
            crashed: 0.0,
            frozen: 0.0,
            undeleted: 0.0,
        }
    }

    /// AWS on a usual day.
    pub fn usual() -> Self {
        Self {
            refused: 0.000_2,
            failed: 0.000_5,
            lost: 0.000_5,
            hung: 0.000_05,
            outages: 0.0,
            slow: 0.001,
            stalled: 0.000_1,
            throttled: 0.001,
            conflicts: 0.001,
            unprocessed: 0.005,
            late_replicas: 0.3,
            replica_lag: Duration::from_millis(200),
            lag: Duration::from_millis(800),
            long_lags: 0.001,
            longest_lag: Duration::from_secs(5),
            duplicated: 0.002,
            delayed: 0.002,
            reordering: Duration::from_millis(300),
            crashed: 0.001,
            frozen: 0.000_2,
            undeleted: 0.001,
        }
    }

    /// AWS on its worst day.
    pub fn hostile() -> Self {
        Self {
            refused: 0.005,
            failed: 0.01,
            lost: 0.02,
            hung: 0.001,
            outages: 0.02,
            slow: 0.01,
            stalled: 0.002,
            throttled: 0.03,
            conflicts: 0.02,
            unprocessed: 0.05,
            late_replicas: 0.5,
            replica_lag: Duration::from_secs(1),
            lag: Duration::from_secs(3),
            long_lags: 0.02,
            longest_lag: Duration::from_secs(10),
            duplicated: 0.05,
            delayed: 0.02,
            reordering: Duration::from_secs(2),
            crashed: 0.02,
            frozen: 0.005,
            undeleted: 0.02,
        }
    }
}

/// Makes the decisions about the calls of a service.
#[derive(Debug)]
pub struct Decider {
    seed: u64,
    /// The number of calls by the hash of their subject. It is never iterated.
    counts: Mutex<BTreeMap<u64, u64>>,
}

impl Decider {
    pub fn new(seed: u64, service: &str) -> Self {
        Self { seed: dice::seeded(seed, &service), counts: Mutex::default() }
    }

    /// The next call about a subject, for example an operation on an item.
    pub fn call(&self, subject: &impl Hash) -> Call {
        let subject = dice::seeded(self.seed, subject);
        let mut counts = lock(&self.counts);
        let count = counts.entry(subject).or_default();
        *count += 1;
        Call(dice::seeded(subject, &*count))
    }

    /// Whether a call fails because the service has an outage.
    pub fn is_out(&self, faults: &Faults, call: Call, now: Duration) -> bool {
        faults.outages > 0.0
            && self.random(&("outage", now.as_secs() / 60)) < faults.outages
            && call.happens("outage", 0.5)
    }

    /// A number from 0 to 1 that depends on the seed and on `what` alone.
    pub fn random(&self, what: &impl Hash) -> f64 {
        dice::random(self.seed, what)
    }
}

/// The decisions about one call. Each has a name of its own.
#[derive(Clone, Copy, Debug)]
pub struct Call(u64);

impl Call {
    /// A number that identifies the call.
    pub fn id(self) -> u64 {
        self.0
    }

    /// A number from 0 to 1, without 1.
    pub fn random(self, decision: &str) -> f64 {
        dice::random(self.0, &decision)
    }

    pub fn happens(self, decision: &str, share: f64) -> bool {
        share > 0.0 && self.random(decision) < share
    }

    /// An index below `count`, which is not zero.
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        clippy::cast_possible_truncation,
        reason = "the numbers are small"
    )]
    pub fn index(self, decision: &str, count: usize) -> usize {
        (self.random(decision) * count as f64) as usize
    }

    /// A duration between two bounds, short ones more often than long ones.
    pub fn duration(self, decision: &str, shortest: Duration, longest: Duration) -> Duration {
        let ratio = longest.as_secs_f64() / shortest.as_secs_f64();
        shortest.mul_f64(ratio.powf(self.random(decision)))
    }

    /// How long a call travels to the service and back.
    pub fn latency(self, faults: &Faults, [shortest, longest]: [u64; 2]) -> [Duration; 2] {
        let latency = if self.happens("slow", faults.slow) {
            Duration::from_secs(2)
        } else {
            self.duration("latency", Duration::from_millis(shortest), Duration::from_millis(longest))
        };
        let there = latency.mul_f64(self.random("way"));
        [there, latency.saturating_sub(there)]
    }

    /// How long the service itself takes, when the call reaches it late.
    pub fn stall(self, faults: &Faults) -> Option<Duration> {
        let duration = || self.duration("stall", Duration::from_secs(6), Duration::from_secs(20));
        self.happens("stalled", faults.stalled).then(duration)
    }
}

/// When faults happened, by their name, so that a test can show that each of them did.
#[derive(Clone, Debug, Default)]
pub struct Happened(Arc<Mutex<BTreeMap<&'static str, Vec<Instant>>>>);

impl Happened {
    pub fn count(&self, fault: &'static str) {
        lock(&self.0).entry(fault).or_default().push(Instant::now());
    }

    pub fn all(&self) -> BTreeMap<&'static str, u64> {
        lock(&self.0).iter().map(|(fault, times)| (*fault, times.len() as u64)).collect()
    }

    /// When faults with one of these names happened, since the simulation began.
    pub fn times(&self, clock: Clock, faults: &[&str]) -> Vec<Duration> {
        let happened = lock(&self.0);
        let times = faults.iter().filter_map(|fault| happened.get(fault)).flatten();
        times.map(|at| at.duration_since(clock.began)).collect()
    }
}

/// Waits for simulated time. A zero duration does not wait.
pub async fn pause(duration: Duration) {
    if !duration.is_zero() {
        tokio::time::sleep(duration).await;
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the service's part of a call in a task of its own: a request that was sent takes effect, also when its client is gone.
pub async fn detached<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    match tokio::spawn(work).await {
        Ok(done) => done,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
