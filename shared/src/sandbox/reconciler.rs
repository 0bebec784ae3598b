//! Reconciles sandboxes with their records: deletes what is marked for deletion or no longer used, and retries until nothing is left;
//! pauses what is idle.
//!
//! Every change that may leave a sandbox without members makes its record due in the same write. From the record alone, the reconciler
//! then decides what to do, so no change is lost with a message or a worker. It marks an unused sandbox for deletion on the condition
//! that no start and no conversation has joined it meanwhile. A marked sandbox is deleted at its provider; its record is removed after
//! the provider has reported for [`SandboxService::confirmation_delay`] that nothing is left.
//!
//! A sandbox that runs is due from time to time, if there is an [`IdlePolicy`]. Its agent server reports how long it has been idle, so
//! nothing is written when it is used.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use uuid::Uuid;

use super::store::{Desired, SandboxClaim, SandboxRecord, SandboxStore};
use super::{SandboxService, SandboxStatus};
use crate::agent_server::{AgentServer, AgentServerError};
use crate::clock::Time;
use crate::dynamo::{DueRow, from_item};
use crate::error::{Error, Result};
use crate::http_client::HttpClient;
use crate::id::UserId;
use crate::jobs::backfill_events::BackfillEvents;
use crate::jobs::queue::JobQueue;
use crate::jobs::reconcile_sandbox::{ALARM_AFTER, LONGEST_RETRY, ORDINARY_ATTEMPTS, ReconcileSandbox, delay_after};
use crate::jobs::sweep::sweep_and_observe;
use crate::metrics;

/// The duration of the lease on a sandbox. It is longer than the calls of one attempt can take.
const LEASE: Duration = Duration::from_secs(90);
/// The time limit of the calls to a provider in one attempt.
const TERMINATE_TIMEOUT: Duration = Duration::from_secs(60);
/// The shortest delay between two checks whether a sandbox is idle.
const SHORTEST_IDLE_CHECK: Duration = Duration::from_secs(60);
/// The time limit of a request for the states of a sandbox's conversations.
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);
/// The most conversations per request.
const CONVERSATIONS_AT_ONCE: usize = 50;

/// The time limit of the attempt that a request for a deletion makes itself. API Gateway waits for 29 s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);

/// When an idle sandbox is paused.
#[derive(Clone, Debug)]
pub struct IdlePolicy {
    /// How long neither an agent nor a client may have used the sandbox.
    pub limit: Duration,
    /// The HTTP client for agent servers.
    pub http: HttpClient,
}

/// Reconciles sandboxes with their records.
#[derive(Clone, Debug)]
pub struct SandboxReconciler {
    pub records: SandboxStore,
    pub sandboxes: Arc<dyn SandboxService>,
    pub queue: JobQueue,
    /// `None` if idle sandboxes are not paused.
    pub idle: Option<IdlePolicy>,
}

impl SandboxReconciler {
    /// Deletes a sandbox for its user. It no longer exists for the user when this returns; the deletion at the provider is attempted once,
    /// and repeated by workers until it succeeds. Returns false when there is no such sandbox.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn delete(&self, user: &UserId, id: &str) -> Result<bool> {
        if !self.records.mark_deleted(user, id).await? {
            return Ok(false);
        }
        tracing::info!(sandbox = id, "sandbox.marked_deleted");
        match timeout(REQUEST_TIMEOUT, self.reconcile(user, id)).await {
            Ok(Ok(())) => {}
            // The record is due: the sweep enqueues the job.
            Ok(Err(error)) => {
                tracing::warn!(sandbox = id, error = %error.context(), "sandbox.not_deleted_at_once");
            }
            Err(_elapsed) => tracing::warn!(sandbox = id, error = "timeout", "sandbox.not_deleted_at_once"),
        }
        Ok(true)
    }

    /// Enqueues the job for a record that a member has left, if the sandbox is unused now. A failure is only logged: the record is due,
    /// and the sweep enqueues the job.
    pub async fn member_left(&self, record: &SandboxRecord) {
        if record.is_unused() {
            self.enqueue(&record.user, &record.id, Duration::ZERO).await;
        }
    }

    /// Enqueues the jobs of due sandboxes of all users. Returns how many.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn sweep(&self) -> Result<usize> {
        let job = |row: &DueRow| Some(ReconcileSandbox { user: row.user.clone(), sandbox: row.id.clone() });
        let swept = sweep_and_observe(&self.records.due(), &self.queue, LONGEST_RETRY, job).await;
        if let Some(observed) = &swept.observed
            && let Err(error) = self.observe(observed).await
        {
            tracing::warn!(error = %error.context(), "sandbox.not_observed");
        }
        swept.result()
    }

    /// Records the number of sandboxes that still have to be deleted.
    async fn observe(&self, rows: &[DueRow]) -> Result<()> {
        let mut count = 0;
        for item in self.records.due().read(rows).await? {
            // A malformed record is logged by the job that reads it.
            let Ok(record) = from_item::<SandboxRecord>(item) else { continue };
            let is_to_be_deleted = record.desired == Desired::Deleted || record.is_unused();
            count += u32::from(is_to_be_deleted && record.gone_since.is_none());
        }
        metrics::sandboxes_without_members(count);
        Ok(())
    }

    /// Compares a sandbox with its record, and does what is missing. Does nothing if the record is not due or another worker has it.
    ///
    /// # Errors
    /// [`Error::Store`]; the record stays due.
    pub async fn reconcile(&self, user: &UserId, id: &str) -> Result<()> {
        let Some(claim) = self.records.claim(user, id, LEASE).await? else { return Ok(()) };
        let is_deleted = match claim.record.desired {
            Desired::Deleted => true,
            _ => claim.record.is_unused() && self.records.mark_unused_deleted(&claim).await?,
        };
        if is_deleted {
            return self.finish_deletion(&claim).await;
        }
        let period = self.sandboxes.inspection_period();
        let is_to_run = claim.record.desired == Desired::Running;
        let next = match (&self.idle, period) {
            (Some(policy), _) if is_to_run => self.next_idle_check(&claim, policy).await?,
            (None, Some(period)) if is_to_run => self.next_inspection(&claim.record, period).await?,
            _ => None,
        };
        match next.map(|delay| delay.min(period.unwrap_or(Duration::MAX))) {
            Some(delay) => self.records.postpone(&claim, Time::now().plus(delay), None, 0).await,
            None => self.records.settle(&claim).await,
        }
    }

    /// Inspects a sandbox. Returns the delay until it has to be inspected again; `None` if that is when it is resumed.
    async fn next_inspection(&self, record: &SandboxRecord, period: Duration) -> Result<Option<Duration>> {
        match self.sandboxes.inspect(&record.user, &record.id).await {
            Err(error) if error.is_upstream() => {
                tracing::warn!(sandbox = %record.id, error = %error.context(), "sandbox.not_inspected");
                Ok(Some(SHORTEST_IDLE_CHECK))
            }
            inspected => Ok(inspected?.and_then(|sandbox| match sandbox.status {
                SandboxStatus::Running => Some(period),
                SandboxStatus::Starting | SandboxStatus::Error => Some(SHORTEST_IDLE_CHECK),
                SandboxStatus::Paused | SandboxStatus::Missing => None,
            })),
        }
    }

    /// Pauses a sandbox that is idle. Returns the delay until it has to be checked again; `None` if that is when it is resumed.
    async fn next_idle_check(&self, claim: &SandboxClaim, policy: &IdlePolicy) -> Result<Option<Duration>> {
        let record = &claim.record;
        let is_inspected = self.sandboxes.inspection_period().is_some();
        if !record.starts.is_empty() && !is_inspected {
            return Ok(Some(policy.limit));
        }
        let sandbox = match self.sandboxes.inspect(&record.user, &record.id).await {
            Err(error) if error.is_upstream() => {
                tracing::warn!(sandbox = %record.id, error = %error.context(), "sandbox.idle_check_failed");
                return Ok(Some(policy.limit));
            }
            inspected => inspected?,
        };
        let Some(sandbox) = sandbox else { return Ok(None) };
        let agent_server = match (sandbox.status, sandbox.agent_server(&policy.http)) {
            (SandboxStatus::Running, Some(agent_server)) => agent_server,
            // Its provider has to be asked again soon where it depends on inspections.
            (SandboxStatus::Starting | SandboxStatus::Error, _) if is_inspected => {
                return Ok(Some(SHORTEST_IDLE_CHECK));
            }
            (SandboxStatus::Starting, _) => return Ok(Some(policy.limit)),
            _ => return Ok(None),
        };
        if !record.starts.is_empty() {
            return Ok(Some(policy.limit));
        }
        let idle = match idle_time(&agent_server, record).await {
            Ok(Some(idle)) => idle,
            Ok(None) => return Ok(Some(policy.limit)),
            Err(error) => {
                tracing::warn!(sandbox = %record.id, %error, "sandbox.idle_check_failed");
                return Ok(Some(policy.limit));
            }
        };
        if idle < policy.limit {
            // It was used since the last check. Once it is paused, events that have not arrived cannot be fetched.
            self.fetch_missing_events(record).await;
            return Ok(Some(policy.limit.saturating_sub(idle).max(SHORTEST_IDLE_CHECK)));
        }
        // A start that joins now resumes the sandbox.
        match self.sandboxes.pause(&record.user, &record.id).await {
            Ok(_) => {
                tracing::info!(sandbox = %record.id, idle_seconds = idle.as_secs(), "sandbox.paused_idle");
                Ok(None)
            }
            Err(error) if error.is_upstream() => {
                tracing::warn!(sandbox = %record.id, error = %error.context(), "sandbox.not_paused");
                Ok(Some(SHORTEST_IDLE_CHECK))
            }
            Err(error) => Err(error),
        }
    }

    /// Enqueues the jobs that fetch events that have not arrived. A failure is only logged: the next check enqueues them again.
    async fn fetch_missing_events(&self, record: &SandboxRecord) {
        let conversations = record.conversations.iter().filter_map(|id| Uuid::try_parse(id).ok());
        let job = |conversation| BackfillEvents { user: record.user.clone(), conversation, attempt: 0 }.into();
        let (_, failed) = self.queue.send_all(&conversations.map(job).collect::<Vec<_>>()).await;
        if let Some(error) = failed {
            tracing::warn!(sandbox = %record.id, error = %error.context(), "sandbox.enqueue_failed");
        }
    }

    async fn finish_deletion(&self, claim: &SandboxClaim) -> Result<()> {
        let (record, now) = (&claim.record, Time::now());
        let terminated = timeout(TERMINATE_TIMEOUT, self.sandboxes.terminate(&record.user, &record.id)).await;
        match terminated.unwrap_or_else(|_| Err(Error::internal("the provider took too long to delete a sandbox"))) {
            Ok(true) => {
                let delay = self.sandboxes.confirmation_delay();
                let gone_since = record.gone_since.unwrap_or(now);
                if Time::now().since(gone_since) >= delay {
                    if self.records.remove(claim).await? {
                        tracing::info!(sandbox = %record.id, "sandbox.deleted");
                    }
                    return Ok(());
                }
                self.records.postpone(claim, gone_since.plus(delay), Some(gone_since), 0).await
            }
            Ok(false) => self.retry(claim, "the provider still has it").await,
            // Nothing was attempted, so it does not count towards the alarm about this sandbox. The circuit breaker has its own.
            Err(Error::CircuitOpen) => self.try_again(claim, record.attempts.saturating_sub(1)).await,
            Err(error) => self.retry(claim, &error.context()).await,
        }
    }

    /// Records a failed attempt, and enqueues the next one.
    async fn retry(&self, claim: &SandboxClaim, reason: &str) -> Result<()> {
        let (record, attempts) = (&claim.record, claim.record.attempts);
        if attempts >= ALARM_AFTER {
            tracing::error!(sandbox = %record.id, attempts, error = reason, "sandbox.deletion_keeps_failing");
        } else if attempts > ORDINARY_ATTEMPTS {
            tracing::warn!(sandbox = %record.id, attempts, error = reason, "sandbox.deletion_failed");
        }
        self.try_again(claim, attempts).await
    }

    /// Enqueues the next attempt. `attempts` is the number of failed ones in a row.
    async fn try_again(&self, claim: &SandboxClaim, attempts: u32) -> Result<()> {
        let record = &claim.record;
        let delay = delay_after(attempts.max(1));
        self.records.postpone(claim, Time::now().plus(delay), None, attempts).await?;
        self.enqueue(&record.user, &record.id, delay).await;
        Ok(())
    }

    pub(super) async fn enqueue(&self, user: &UserId, id: &str, delay: Duration) {
        let job = ReconcileSandbox { user: user.clone(), sandbox: id.to_owned() }.into();
        if let Err(error) = self.queue.send(&job, delay).await {
            tracing::warn!(sandbox = id, error = %error.context(), "sandbox.enqueue_failed");
        }
    }
}

/// How long a sandbox has been idle; `None` while an agent runs in it, for example one that waits for a long command, or if its agent
/// server does not report the time.
async fn idle_time(agent_server: &AgentServer, record: &SandboxRecord) -> Result<Option<Duration>, AgentServerError> {
    let idle = agent_server.idle_time().await?;
    let conversations: Vec<Uuid> = record.conversations.iter().filter_map(|id| Uuid::try_parse(id).ok()).collect();
    for some in conversations.chunks(CONVERSATIONS_AT_ONCE) {
        let found = agent_server.conversations(some, STATUS_TIMEOUT).await?;
        if found.into_iter().flatten().any(|found| found.execution_status.as_deref() == Some("running")) {
            return Ok(None);
        }
    }
    Ok(idle)
}
