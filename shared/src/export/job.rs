//! Export jobs: builds the exports that exceed the time of their requests, for the queue `exports`.

use tokio::time::Instant;
use uuid::Uuid;

use super::builder::{BuildOutcome, EventLog, ExportBuilder};
use super::exporter::too_many_events;
use super::store::{ExportRecord, ExportStore, Failure, FailureReason, Lease};
use crate::config::ExportConfig;
use crate::conversation::store::ConversationStore;
use crate::error::Result;
use crate::event::store::EventStore;
use crate::id::UserId;

/// The most builds that are started for a job. A build whose process crashes counts.
const MAX_ATTEMPTS: u32 = 3;
/// The growth of the pause between two builds of a job: 10 s after the first one that failed, 40 s after the second. A store that fails
/// for half a minute does not use up the attempts.
const RETRY_PAUSE_FACTOR: u32 = 4;

/// Builds exports for jobs.
#[derive(Clone, Debug)]
pub struct ExportJobs {
    log: EventLog,
    exports: ExportStore,
    config: ExportConfig,
}

impl ExportJobs {
    pub(crate) fn new(
        config: &ExportConfig,
        conversations: ConversationStore,
        events: EventStore,
        exports: ExportStore,
    ) -> Self {
        Self { log: EventLog::new(config, conversations, events), exports, config: config.clone() }
    }

    /// Builds the export, if clients still wait for it and no other process builds it. A build that exceeds its deadline fails permanently:
    /// a retry would most likely need the same time.
    ///
    /// # Errors
    /// [`Error::Store`](crate::error::Error::Store), [`Error::Internal`](crate::error::Error::Internal); the job may be retried.
    pub async fn run(&self, user: &UserId, conversation: Uuid) -> Result<()> {
        let deadline = Instant::now() + self.config.build_budget;
        let Some((lease, record)) = self.exports.claim_for_job(user, conversation, self.config.lease).await? else {
            return Ok(());
        };
        for upload in record.uploads() {
            self.exports.abort(upload).await;
        }
        // The number of attempts before this one.
        let attempts = record.attempts.saturating_sub(1);
        if attempts >= MAX_ATTEMPTS {
            return self.fail(&lease, Failure::now(FailureReason::RepeatedFailure { attempts })).await;
        }
        match self.build(&lease, record, deadline).await {
            Ok(Some(BuildOutcome::OutOfTime)) => {
                let seconds = self.config.build_budget.as_secs();
                self.fail(&lease, Failure::now(FailureReason::OutOfTime { seconds })).await
            }
            Ok(Some(BuildOutcome::TooManyEvents(count))) => {
                let failure = too_many_events(count, self.config.max_events);
                tracing::warn!(%conversation, count, "export.too_many_events");
                self.exports.fail(&lease, &failure).await
            }
            Ok(Some(BuildOutcome::Built { .. } | BuildOutcome::LeaseLost)) => Ok(()),
            Ok(None) => self.exports.finish(&lease).await,
            Err(error) => {
                let pause = self.config.retry_pause * RETRY_PAUSE_FACTOR.saturating_pow(attempts);
                if let Err(error) = self.exports.release_for_retry(&lease, pause).await {
                    tracing::warn!(error = %error.context(), "export.lease_not_released");
                }
                Err(error)
            }
        }
    }

    /// Builds the export and returns the outcome; `None` when the conversation no longer exists.
    async fn build(&self, lease: &Lease, record: ExportRecord, deadline: Instant) -> Result<Option<BuildOutcome>> {
        let shown = self.log.conversations.get(lease.user(), lease.conversation()).await?;
        let Some(shown) = shown else { return Ok(None) };
        let snapshot = self.log.snapshot(shown).await?;
        let outcome = match self.exports.find(&snapshot.key).await? {
            Some(stored) if self.log.is_current(&stored, &snapshot) => {
                BuildOutcome::Built { length: stored.length, zip: None }
            }
            _ => ExportBuilder::new(&self.exports, &self.log, lease, &snapshot).run(deadline).await?,
        };
        if let BuildOutcome::Built { length, .. } = outcome {
            tracing::info!(key = snapshot.key, length, "export.built");
            self.exports.finish_for_clients(lease, &snapshot.key, record.warning).await?;
        }
        Ok(Some(outcome))
    }

    async fn fail(&self, lease: &Lease, failure: Failure) -> Result<()> {
        tracing::error!(conversation = %lease.conversation(), reason = ?failure.reason, "export.abandoned");
        self.exports.fail(lease, &failure).await
    }

    /// Ends the wait for a job whose message is in the dead-letter queue. The next request builds the export.
    ///
    /// # Errors
    /// [`Error::Store`](crate::error::Error::Store).
    pub async fn abandon(&self, user: &UserId, conversation: Uuid) -> Result<()> {
        let clients_waited = self.exports.abandon(user, conversation).await?;
        tracing::error!(%conversation, clients_waited, "export.abandoned");
        Ok(())
    }
}
