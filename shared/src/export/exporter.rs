//! Responds to export requests: with an existing export, with one that is built in the request, or with the status of a build.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use uuid::Uuid;

use super::builder::{BuildOutcome, EventLog, ExportBuilder, Snapshot};
use super::store::{ExportRecord, ExportStore, Failure, FailureReason, Lease};
use crate::clock::Time;
use crate::config::ExportConfig;
use crate::conversation::ConversationRecord;
use crate::conversation::store::ConversationStore;
use crate::error::Result;
use crate::event::backfill::Backfill;
use crate::event::store::EventStore;
use crate::http_client::HttpClient;
use crate::id::UserId;
use crate::jobs::queue::{Job, JobQueue};
use crate::sandbox::SandboxService;

/// The warning of an export that is older than the one that was requested.
pub const OLDER_EXPORT: &str = "The conversation has changed since this export, and a newer export could not be built.";

/// The warning of an export that may lack the latest events.
pub const WARNING: &str =
    "The agent server did not return its latest events in time: the export lacks them unless they had arrived before.";

/// The warning of an export that lacks events that the log does not accept.
pub const UNREADABLE: &str = "The agent server returned events that cannot be read: the export lacks them.";

/// The shortest and the longest pause of polling an export that another request builds.
const SHORTEST_POLL: Duration = Duration::from_millis(100);
const LONGEST_POLL: Duration = Duration::from_secs(1);
/// The time that a call without a response may add to a request's budget.
const GRACE: Duration = Duration::from_secs(5);

/// A complete export.
#[derive(Clone, Debug)]
pub struct Ready {
    /// The key of the object.
    pub key: String,
    /// Size in bytes.
    pub length: u64,
    /// The bytes, if they are in memory.
    pub zip: Option<Bytes>,
    /// A warning for the caller about missing events.
    pub warning: Option<String>,
}

/// The response to a request for an export.
#[derive(Clone, Debug)]
pub enum Answer {
    /// The export is in the bucket.
    Ready(Ready),
    /// The export is being built; the client must retry.
    Pending,
    /// The export cannot be built, at least not now.
    Failed(Failure),
}

#[derive(Clone, Debug)]
pub struct Exporter {
    log: EventLog,
    exports: ExportStore,
    queue: JobQueue,
    backfill: Backfill,
    config: ExportConfig,
}

impl Exporter {
    /// An exporter that enqueues jobs in `queue`, and requests events from agent servers through `http`.
    pub(crate) fn new(
        config: &ExportConfig,
        conversations: ConversationStore,
        events: EventStore,
        exports: ExportStore,
        queue: JobQueue,
        sandboxes: Arc<dyn SandboxService>,
        http: HttpClient,
    ) -> Self {
        Self {
            exports,
            queue,
            backfill: Backfill { sandboxes, http, events: events.clone() },
            log: EventLog::new(config, conversations, events),
            config: config.clone(),
        }
    }

    #[must_use]
    pub fn store(&self) -> &ExportStore {
        &self.exports
    }

    /// Returns the export of a conversation: an existing one, or one that is built now. `None` when there is no such conversation.
    ///
    /// # Errors
    /// [`Error::Store`](crate::error::Error::Store), [`Error::Internal`](crate::error::Error::Internal).
    pub async fn export(&self, user: &UserId, conversation: Uuid) -> Result<Option<Answer>> {
        let deadline = Instant::now() + self.config.budget;
        let Some(shown) = self.log.conversations.get(user, conversation).await? else { return Ok(None) };
        let record = self.exports.get(user, conversation).await?.unwrap_or_default();
        if let Some(answer) = self.recorded_answer(user, conversation, &record).await? {
            return Ok(Some(answer));
        }
        let warning = self.backfill(&shown).await;
        let snapshot = self.log.snapshot(shown).await?;
        let found = self.exports.find(&snapshot.key).await?;
        if let Some(stored) = found.as_ref().filter(|stored| self.log.is_current(stored, &snapshot)) {
            return Ok(Some(Answer::Ready(ready(snapshot.key, stored.length, None, warning))));
        }
        if let Some(answer) = self.failed_answer(&record).await? {
            return Ok(Some(answer));
        }
        let before = found.and_then(|stored| stored.started_at);
        let mut pause = SHORTEST_POLL;
        loop {
            let claimed = self.exports.claim_for_request(user, conversation, self.config.lease).await?;
            if let Some((lease, record)) = claimed {
                let built = self.build_in_request(lease, record, &snapshot, before, deadline, warning);
                // A call does not respond: the lease expires, and the next request restarts the build.
                return timeout_at(deadline + GRACE, built).await.unwrap_or(Ok(Answer::Pending)).map(Some);
            }
            // Another request builds the export, usually in about a second.
            let record = self.exports.get(user, conversation).await?.unwrap_or_default();
            if let Some(answer) = self.recorded_answer(user, conversation, &record).await? {
                return Ok(Some(answer));
            }
            if let Some(answer) = self.failed_answer(&record).await? {
                return Ok(Some(answer));
            }
            if Instant::now() >= deadline {
                return Ok(Some(Answer::Pending));
            }
            sleep(pause).await;
            pause = (pause * 3 / 2).min(LONGEST_POLL);
        }
    }

    async fn build_in_request(
        &self,
        lease: Lease,
        record: ExportRecord,
        snapshot: &Snapshot,
        before: Option<Time>,
        deadline: Instant,
        warning: Option<String>,
    ) -> Result<Answer> {
        let built = async {
            for upload in record.uploads() {
                self.exports.abort(upload).await;
            }
            // Another request may have built the export in the meantime.
            if let Some(stored) = self.exports.find(&snapshot.key).await?
                && (self.log.is_current(&stored, snapshot) || stored.started_at != before)
            {
                return Ok(BuildOutcome::Built { length: stored.length, zip: None });
            }
            ExportBuilder::new(&self.exports, &self.log, &lease, snapshot).run(deadline).await
        };
        match built.await {
            Ok(BuildOutcome::Built { length, zip }) => {
                self.exports.finish(&lease).await?;
                Ok(Answer::Ready(ready(snapshot.key.clone(), length, zip, warning)))
            }
            Ok(BuildOutcome::OutOfTime) => {
                if self.exports.release_to_job(&lease, warning.as_deref()).await? {
                    self.enqueue(lease.user(), lease.conversation()).await;
                }
                Ok(Answer::Pending)
            }
            Ok(BuildOutcome::LeaseLost) => Ok(Answer::Pending),
            Ok(BuildOutcome::TooManyEvents(count)) => {
                let failure = too_many_events(count, self.config.max_events);
                self.exports.fail(&lease, &failure).await?;
                Ok(Answer::Failed(failure))
            }
            Err(error) => {
                release(&self.exports, &lease).await;
                Err(error)
            }
        }
    }

    /// A failure is only logged: a later request enqueues the job again.
    async fn enqueue(&self, user: &UserId, conversation: Uuid) {
        let job = Job::Export { user: user.clone(), conversation };
        if let Err(error) = self.queue.send(&job, Duration::ZERO).await {
            tracing::warn!(%conversation, error = %error.context(), "export.enqueue_failed");
        }
    }

    /// Derives the response from the record alone: an export that the function `exports` is building, or has finished recently.
    ///
    /// The finished export is the response even if the conversation has changed since; otherwise an always-active conversation could never
    /// be exported. A request does not change the record, so it can be repeated.
    async fn recorded_answer(
        &self,
        user: &UserId,
        conversation: Uuid,
        record: &ExportRecord,
    ) -> Result<Option<Answer>> {
        if record.is_queued {
            if record.is_requeue_due() && self.exports.requeue(user, conversation, record).await? {
                tracing::warn!(%conversation, attempts = record.attempts, "export.requeued");
                self.enqueue(user, conversation).await;
            }
            return Ok(Some(Answer::Pending));
        }
        let Some(finished) = record.kept() else { return Ok(None) };
        let Some(stored) = self.exports.find(&finished.key).await? else {
            // The object was removed early, and the record must not prevent a new build.
            self.exports.remove_finished(user, conversation, &finished.key).await?;
            return Ok(None);
        };
        // Earlier versions store the warning in the record.
        let warning = finished.warning.clone().or(record.warning.clone());
        Ok(Some(Answer::Ready(ready(finished.key.clone(), stored.length, None, warning))))
    }

    /// The response after a failed build: the previous export if there is one, otherwise the failure.
    async fn failed_answer(&self, record: &ExportRecord) -> Result<Option<Answer>> {
        let Some(failure) = record.recent_failure() else { return Ok(None) };
        if let Some(finished) = &record.finished
            && let Some(stored) = self.exports.find(&finished.key).await?
        {
            let warning = Some(OLDER_EXPORT.to_owned());
            return Ok(Some(Answer::Ready(ready(finished.key.clone(), stored.length, None, warning))));
        }
        Ok(Some(Answer::Failed(failure.clone())))
    }

    /// Fetches the events that the agent server has not posted yet. If that fails, or some cannot be read, the export has a warning.
    async fn backfill(&self, record: &ConversationRecord) -> Option<String> {
        let problem = match timeout(self.config.catch_up, self.backfill.store_missing(record)).await {
            Ok(Ok(backfilled)) => {
                if backfilled.appended > 0 {
                    tracing::info!(conversation = %record.id, fetched = backfilled.appended, "export.backfilled");
                }
                return (backfilled.unreadable > 0).then(|| UNREADABLE.to_owned());
            }
            Ok(Err(error)) => error.context(),
            Err(_) => "it took too long".to_owned(),
        };
        tracing::warn!(conversation = %record.id, problem, "export.may_lack_events");
        Some(WARNING.to_owned())
    }
}

pub(super) fn too_many_events(count: u64, bound: u64) -> Failure {
    Failure::now(FailureReason::TooManyEvents { count, bound })
}

/// Releases the lease after a failure that the caller reports. If the release fails too, the lease expires.
async fn release(exports: &ExportStore, lease: &Lease) {
    if let Err(error) = exports.release(lease).await {
        tracing::warn!(error = %error.context(), "export.lease_not_released");
    }
}

fn ready(key: String, length: u64, zip: Option<Bytes>, warning: Option<String>) -> Ready {
    Ready { key, length, zip, warning }
}
