//! The sweep: enqueues the jobs of overdue rows again, whose message was lost or whose worker died.
//!
//! Starts, deletions and queues of messages are swept by this one function. A run is bounded: each shard of an index gives
//! [`crate::dynamo::DUE_LIMIT`] rows at most, users in turn. A row whose job was enqueued is moved after the others, so that the next
//! run begins with those that this one did not reach. A failure is logged, and the run continues with the other rows.

use std::time::Duration;

use futures::future::join_all;

use crate::clock::Time;
use crate::dynamo::{Due, DueIndex, DueRow};
use crate::error::{Error, Result};
use crate::jobs::queue::{Job, JobQueue};

/// How long a row is left alone after its job was enqueued: shorter than the time between two runs on AWS, so that it only changes
/// the order.
const POSTPONED: Duration = Duration::from_secs(20);
/// The most rows that a sweep returns for gauges.
pub const OBSERVED: usize = 1000;
/// Rows that are postponed at the same time.
const AT_ONCE: usize = 16;

/// Enqueues a job for every row that is due, up to the bound. Returns how many there were. `job` returns `None` for a malformed row.
///
/// # Errors
/// The first failure, after all that could be done was done.
pub async fn sweep<J: Into<Job>>(
    rows: &DueIndex,
    queue: &JobQueue,
    job: impl Fn(&DueRow) -> Option<J>,
) -> Result<usize> {
    sweep_and_observe(rows, queue, Duration::ZERO, job).await.result()
}

/// What a sweep found and did.
#[derive(Debug)]
pub struct Swept {
    /// The rows whose jobs were enqueued.
    pub enqueued: Vec<DueRow>,
    /// The rows that were read, for gauges. `None` if a shard could not be read.
    pub observed: Option<Vec<DueRow>>,
    failed: Option<Error>,
}

impl Swept {
    /// The number of rows whose jobs were enqueued.
    ///
    /// # Errors
    /// The first failure.
    pub fn result(self) -> Result<usize> {
        match self.failed {
            Some(error) => Err(error),
            None => Ok(self.enqueued.len()),
        }
    }
}

/// As [`sweep`], and also reads the rows that become due within `ahead`. Returns at most [`OBSERVED`] of all.
pub async fn sweep_and_observe<J: Into<Job>>(
    rows: &DueIndex,
    queue: &JobQueue,
    ahead: Duration,
    job: impl Fn(&DueRow) -> Option<J>,
) -> Swept {
    let Due { rows: due, others, failed } = rows.due_and_next(Time::now(), ahead).await;
    let found = due.len();
    let observed = failed.is_none().then(|| due.iter().chain(&others).take(OBSERVED).cloned().collect());
    let (mut jobs, mut with_job): (Vec<Job>, Vec<DueRow>) = (Vec::new(), Vec::new());
    for row in due {
        match job(&row) {
            Some(job) => {
                jobs.push(job.into());
                with_job.push(row);
            }
            // Such a row must not delay the others.
            None => tracing::error!(index = rows.index, id = row.id, "sweep.row_malformed"),
        }
    }
    let (sent, not_sent) = queue.send_all(&jobs).await;
    let until = Time::now().plus(POSTPONED);
    let enqueued: Vec<DueRow> = with_job.into_iter().zip(sent).filter_map(|(row, sent)| sent.then_some(row)).collect();
    let mut not_postponed = Vec::new();
    for rows_at_once in enqueued.chunks(AT_ONCE) {
        let done = join_all(rows_at_once.iter().map(async |row| rows.postpone(row, until).await)).await;
        not_postponed.extend(done.into_iter().filter_map(Result::err));
    }
    if let Some(error) = not_postponed.first() {
        // Those rows are enqueued once more than needed.
        tracing::warn!(index = rows.index, rows = not_postponed.len(), error = %error.context(), "sweep.not_postponed");
    }
    if !enqueued.is_empty() {
        tracing::info!(index = rows.index, enqueued = enqueued.len(), due = found, "sweep.requeued");
    }
    Swept { enqueued, observed, failed: failed.or(not_sent) }
}
