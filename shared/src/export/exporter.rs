//! Who makes an export, and who waits for it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use uuid::Uuid;

use super::catch_up::{CatchUp, WARNING};
use super::making::{Limit, Made, Making};
use super::store::{ExportRecord, ExportStore, Lease, Stored};
use crate::aws::Aws;
use crate::clock::Time;
use crate::config::{ExportConfig, Names};
use crate::conversation::store::ConversationStore;
use crate::conversation::{AppConversation, ConversationRecord};
use crate::error::{Error, Result};
use crate::event::store::EventStore;
use crate::http_client::HttpClient;
use crate::id::UserId;
use crate::jobs::queue::{Job, JobQueue};
use crate::metrics;
use crate::sandbox::SandboxService;

/// Part of every fingerprint: another form of exports has another number.
const FORM: u32 = 1;
/// The shortest and the longest pause between two reads of an export that another request builds.
const SHORTEST_POLL: Duration = Duration::from_millis(100);
const LONGEST_POLL: Duration = Duration::from_secs(1);
/// What a call that hangs may add to a request's budget.
const GRACE: Duration = Duration::from_secs(5);

/// An export that is there.
#[derive(Clone, Debug)]
pub struct Ready {
    /// The object.
    pub key: String,
    /// Bytes.
    pub length: u64,
    /// The bytes themselves, if they are at hand.
    pub zip: Option<Bytes>,
    /// What may be missing, for the caller.
    pub warning: Option<String>,
}

/// The answer to who wants an export.
#[derive(Clone, Debug)]
pub enum Answer {
    /// It is in the bucket.
    Ready(Ready),
    /// It is being built: come back later.
    Pending,
}

/// What an export would be now.
struct Plan {
    key: String,
    meta: Bytes,
    /// When the log was written last.
    changed_at: Option<Time>,
}

/// Makes exports.
#[derive(Clone, Debug)]
pub struct Exporter {
    conversations: ConversationStore,
    events: EventStore,
    exports: ExportStore,
    queue: JobQueue,
    catch_up: CatchUp,
    config: ExportConfig,
}

impl Exporter {
    /// An exporter on the named tables, bucket and queue, which asks agent servers by way of `http`.
    #[must_use]
    pub fn new(
        config: &ExportConfig,
        names: &Names,
        aws: &Aws,
        sandboxes: Arc<dyn SandboxService>,
        http: HttpClient,
    ) -> Self {
        let (dynamodb, s3) = (&aws.dynamodb, &aws.s3);
        let events = EventStore::new(dynamodb.clone(), names.events.clone(), s3.clone(), names.bucket.clone());
        Self {
            conversations: ConversationStore::new(dynamodb.clone(), names.conversations.clone(), names.users.clone()),
            exports: ExportStore::new(dynamodb.clone(), names.users.clone(), s3.clone(), names.bucket.clone()),
            queue: JobQueue::new(aws.sqs.clone(), names.job_queue_url.clone()),
            catch_up: CatchUp { sandboxes, http, events: events.clone() },
            events,
            config: config.clone(),
        }
    }

    /// The objects.
    #[must_use]
    pub fn store(&self) -> &ExportStore {
        &self.exports
    }

    /// The export of a conversation: the one that is there, or one that is made now. `None` when there is no such
    /// conversation.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::Internal`].
    pub async fn export(&self, user: &UserId, conversation: Uuid) -> Result<Option<Answer>> {
        let deadline = Instant::now() + self.config.budget;
        let Some(record) = self.conversations.get(user, conversation).await? else { return Ok(None) };
        if let Some(answer) = self.lookup(user, conversation).await? {
            return Ok(Some(answer));
        }
        let warning = self.catch_up(&record).await;
        let plan = self.plan(record).await?;
        let found = self.exports.find(&plan.key).await?;
        if let Some(stored) = found.as_ref().filter(|stored| self.is_current(stored, &plan)) {
            return Ok(Some(Answer::Ready(ready(plan.key, stored.length, None, warning))));
        }
        let before = found.and_then(|stored| stored.began_at);
        let mut pause = SHORTEST_POLL;
        loop {
            if let Some((lease, record)) = self.exports.claim(user, conversation, self.config.lease).await? {
                let made = self.make_here(lease, record, &plan, before, deadline, warning);
                // A call that hangs: the lease runs out, and the next one begins anew.
                return timeout_at(deadline + GRACE, made).await.unwrap_or(Ok(Answer::Pending)).map(Some);
            }
            // Another request builds it, which most often is a matter of a second.
            if let Some(answer) = self.lookup(user, conversation).await? {
                return Ok(Some(answer));
            }
            if Instant::now() >= deadline {
                return Ok(Some(Answer::Pending));
            }
            sleep(pause).await;
            pause = (pause * 3 / 2).min(LONGEST_POLL);
        }
    }

    /// Goes on with an export that outlasted its request.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::Internal`].
    pub async fn go_on(&self, user: &UserId, conversation: Uuid) -> Result<()> {
        let record = self.exports.get(user, conversation).await?;
        if !record.is_some_and(|record| record.wanted) {
            return Ok(());
        }
        let Some((mut lease, record)) = self.exports.claim(user, conversation, self.config.lease).await? else {
            return Ok(());
        };
        let limit = Limit { deadline: Instant::now() + self.config.worker_budget, after_a_part: true };
        let made = async {
            let Some(conversation) = self.conversations.get(user, conversation).await? else { return Ok(None) };
            let plan = self.plan(conversation).await?;
            if record.resumable().is_none()
                && let Some(stored) = self.exports.find(&plan.key).await?
                && self.is_current(&stored, &plan)
            {
                return Ok(Some((plan.key, Made::Whole { length: stored.length, zip: None })));
            }
            self.make(&mut lease, &record, &plan, limit).await.map(Some)
        };
        match made.await {
            Ok(Some((key, Made::Whole { length, .. }))) => {
                tracing::info!(key, length, "export.built");
                metrics::export_made(length);
                self.exports.finish_for_others(&lease, &key, record.warning).await
            }
            Ok(Some((_, Made::OutOfTime))) => self.hand_over(&lease, None).await,
            Ok(Some((_, Made::LeaseLost))) => Ok(()),
            Ok(None) => self.exports.finish(&lease).await,
            Err(error) => {
                self.give_up(&lease).await;
                Err(error)
            }
        }
    }

    /// Makes it within the request.
    async fn make_here(
        &self,
        mut lease: Lease,
        record: ExportRecord,
        plan: &Plan,
        before: Option<Time>,
        deadline: Instant,
        warning: Option<String>,
    ) -> Result<Answer> {
        let made = async {
            // Another one may have made it while this one waited.
            if record.resumable().is_none()
                && let Some(stored) = self.exports.find(&plan.key).await?
                && (self.is_current(&stored, plan) || stored.began_at != before)
            {
                return Ok((plan.key.clone(), Made::Whole { length: stored.length, zip: None }));
            }
            self.make(&mut lease, &record, plan, Limit { deadline, after_a_part: false }).await
        };
        match made.await {
            Ok((key, Made::Whole { length, zip })) => {
                if record.wanted {
                    // Other clients were told to come back for it.
                    self.exports.finish_for_others(&lease, &key, warning.clone()).await?;
                } else {
                    self.exports.finish(&lease).await?;
                }
                Ok(Answer::Ready(ready(key, length, zip, warning)))
            }
            Ok((_, Made::OutOfTime)) => {
                self.hand_over(&lease, warning.as_deref()).await?;
                Ok(Answer::Pending)
            }
            Ok((_, Made::LeaseLost)) => Ok(Answer::Pending),
            Err(error) => {
                self.give_up(&lease).await;
                Err(error)
            }
        }
    }

    async fn make(
        &self,
        lease: &mut Lease,
        record: &ExportRecord,
        plan: &Plan,
        limit: Limit,
    ) -> Result<(String, Made)> {
        let mut making = match (record.resumable(), &record.progress) {
            (Some(progress), _) => Making::go_on(&self.exports, &self.events, progress.clone()).await?,
            (None, left) => {
                if let Some(left) = left {
                    self.exports.clean_up(left, false).await;
                }
                Making::new(&self.exports, &self.events, plan.key.clone(), plan.meta.clone())
            }
        };
        let made = making.run(lease, limit).await;
        if made.is_err()
            && let Some(progress) = &making.progress
        {
            self.exports.clean_up(progress, false).await;
        }
        Ok((making.key().to_owned(), made?))
    }

    /// The next process goes on. When the bell fails, whoever asks again does.
    async fn hand_over(&self, lease: &Lease, warning: Option<&str>) -> Result<()> {
        self.exports.hand_over(lease, warning).await?;
        let job = Job::Export { user: lease.user().clone(), conversation: lease.conversation() };
        if let Err(error) = self.queue.send(&job, Duration::ZERO).await {
            tracing::warn!(error = %error.context(), "export.enqueue_failed");
        }
        Ok(())
    }

    /// The failure is told by whoever calls; should this fail too, the lease runs out.
    async fn give_up(&self, lease: &Lease) {
        if let Err(error) = self.exports.give_up(lease).await {
            tracing::warn!(error = %error.context(), "export.lease_not_released");
        }
    }

    /// The answer that a record gives by itself: an export that a worker has finished or is building.
    ///
    /// The finished one is the answer even if the conversation has changed since; otherwise a conversation that changes all the
    /// time could never be exported. A request does not change that, so that it can be repeated.
    async fn lookup(&self, user: &UserId, conversation: Uuid) -> Result<Option<Answer>> {
        let Some(record) = self.exports.get(user, conversation).await? else { return Ok(None) };
        if record.is_with_a_worker() {
            return Ok(Some(Answer::Pending));
        }
        let Some(finished) = record.kept() else { return Ok(None) };
        let Some(stored) = self.exports.find(&finished.key).await? else {
            // Removed before its time: the record must not keep others from building a new one.
            self.exports.forget(user, conversation, &finished.key).await?;
            return Ok(None);
        };
        // Earlier versions have the warning in the record.
        let warning = finished.warning.clone().or(record.warning.clone());
        Ok(Some(Answer::Ready(ready(finished.key.clone(), stored.length, None, warning))))
    }

    /// Fetches what the agent server has not told yet. An export is made in any case, and says when that failed.
    async fn catch_up(&self, record: &ConversationRecord) -> Option<String> {
        let problem = match timeout(self.config.catch_up, self.catch_up.run(record)).await {
            Ok(Ok(0)) => return None,
            Ok(Ok(fetched)) => {
                tracing::info!(conversation = %record.id, fetched, "export.backfilled");
                return None;
            }
            Ok(Err(error)) => error.context(),
            Err(_) => "it took too long".to_owned(),
        };
        tracing::warn!(conversation = %record.id, problem, "export.may_lack_events");
        Some(WARNING.to_owned())
    }

    async fn plan(&self, record: ConversationRecord) -> Result<Plan> {
        let (user, id) = (record.user.clone(), record.id);
        let mut shown = AppConversation::without_sandbox(record);
        let (children, version) =
            tokio::try_join!(self.conversations.sub_conversations(&user, id), self.events.version(&user, id))?;
        shown.sub_conversation_ids = children;
        let meta = meta(&shown)?;
        let log = version.as_ref().map_or("", |version| version.version.as_str());
        let key = ExportStore::key(&user, id, &format!("{FORM}#{log}#{meta}"));
        Ok(Plan { key, meta: meta.into(), changed_at: version.map(|version| version.changed_at) })
    }

    /// Whether an object holds all that there is. One that was begun when the log had just changed may lack what indexes did
    /// not show yet.
    fn is_current(&self, stored: &Stored, plan: &Plan) -> bool {
        match (plan.changed_at, stored.began_at) {
            (None, _) => true,
            (Some(changed_at), Some(began_at)) => began_at >= changed_at.plus(self.config.settle),
            (Some(_), None) => false,
        }
    }
}

fn ready(key: String, length: u64, zip: Option<Bytes>, warning: Option<String>) -> Ready {
    Ready { key, length, zip, warning }
}

/// `meta.json`: the conversation without what it shows of its sandbox.
fn meta(shown: &AppConversation) -> Result<String> {
    let mut value = serde_json::to_value(shown).map_err(Error::internal)?;
    if let Value::Object(fields) = &mut value {
        for field in ["sandbox_status", "execution_status", "conversation_url", "session_api_key"] {
            fields.shift_remove(field);
        }
    }
    serde_json::to_string_pretty(&value).map_err(Error::internal)
}
