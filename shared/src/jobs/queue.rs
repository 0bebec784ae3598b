//! The job queue: messages that name the row to work on. A lost message causes a delay and nothing else.

use std::time::Duration;

use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::SendMessageBatchRequestEntry;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::advance_start::AdvanceStart;
use super::backfill_events::BackfillEvents;
use super::delete_conversation::DeleteConversation;
use super::deliver_messages::DeliverMessages;
use super::observe_boots::ObserveBoots;
use super::process_events::ProcessEvents;
use super::reconcile_sandbox::ReconcileSandbox;
use super::refresh_conversation::RefreshConversation;
use crate::digest::sha256_hex;
use crate::dynamo::store_error;
use crate::error::{Error, Result};
use crate::id::{UserId, as_hex};

/// The version of messages that this code writes.
const VERSION: u32 = 1;

/// The most messages of one request to SQS.
const BATCH: usize = 10;
/// Batches that may fail as a whole before [`JobQueue::send_all`] gives up.
const MAX_FAILED_BATCHES: usize = 5;

/// The group of jobs that are done for all users, in place of a user.
const GROUP_OF_ALL: &str = "#all";

/// The suffix of a dead-letter queue's name. Workers recognise dead letters by it.
pub const DEAD_LETTER_SUFFIX: &str = "-dead-letters";

/// The work that a message asks for. On the wire, `type` holds the job's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Job {
    AdvanceStart(AdvanceStart),
    /// Build an export. In the queue of exports; earlier versions enqueued it in the job queue.
    Export {
        /// The conversation's owner.
        user: UserId,
        /// Its id.
        #[serde(with = "as_hex")]
        conversation: Uuid,
    },
    #[serde(alias = "look_at_conversation")] // in messages of versions before the rename
    RefreshConversation(RefreshConversation),
    ProcessEvents(ProcessEvents),
    DeliverMessages(DeliverMessages),
    DeleteConversation(DeleteConversation),
    ReconcileSandbox(ReconcileSandbox),
    BackfillEvents(BackfillEvents),
    ObserveBoots(ObserveBoots),
}

#[derive(Serialize, Deserialize)]
struct Message {
    v: u32,
    #[serde(flatten)]
    job: Job,
}

impl Job {
    /// Reads a message's body.
    ///
    /// # Errors
    /// [`Error::Internal`] when it is not a message of a version that this code knows.
    pub fn from_body(body: &str) -> Result<Self> {
        let message: Message = serde_json::from_str(body)
            .map_err(|error| Error::internal(format!("a queue message does not read: {error}")))?;
        if message.v != VERSION {
            return Err(Error::internal(format!("a queue message has version {}, not {VERSION}", message.v)));
        }
        Ok(message.job)
    }

    /// The user for whom the job is done; `None` for a job that is done for all users.
    #[must_use]
    pub fn user(&self) -> Option<&UserId> {
        Some(match self {
            Self::AdvanceStart(job) => &job.user,
            Self::Export { user, .. } => user,
            Self::RefreshConversation(job) => &job.user,
            Self::ProcessEvents(job) => &job.user,
            Self::DeliverMessages(job) => &job.user,
            Self::DeleteConversation(job) => &job.user,
            Self::ReconcileSandbox(job) => &job.user,
            Self::BackfillEvents(job) => &job.user,
            Self::ObserveBoots(_) => return None,
        })
    }

    /// The group of the job's message: its user, hashed to the length that SQS allows. Where the messages of one group are many, SQS
    /// delivers those of other groups first ("fair queues"), so that one user's jobs do not delay those of others.
    fn group(&self) -> String {
        sha256_hex(self.user().map_or(GROUP_OF_ALL, UserId::as_str))
    }

    fn to_body(&self) -> Result<String> {
        serde_json::to_string(&Message { v: VERSION, job: self.clone() }).map_err(Error::internal)
    }
}

/// The queue that workers receive jobs from.
#[derive(Clone, Debug)]
pub struct JobQueue {
    sqs: Client,
    url: String,
}

impl JobQueue {
    /// The queue at `url`.
    #[must_use]
    pub(crate) fn new(sqs: Client, url: String) -> Self {
        Self { sqs, url }
    }

    /// Sends a job, to be delivered after `delay`, which is rounded up to whole seconds.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn send(&self, job: &Job, delay: Duration) -> Result<()> {
        self.sqs
            .send_message()
            .queue_url(&self.url)
            .message_body(job.to_body()?)
            .message_group_id(job.group())
            .delay_seconds(whole_seconds(delay))
            .send()
            .await
            .map_err(store_error("SendMessage"))?;
        Ok(())
    }

    /// Sends many jobs without delay, and continues after a refused one. Returns for each whether it was sent, and the first
    /// failure. Once [`MAX_FAILED_BATCHES`] batches have failed as a whole the others are not tried: the queue cannot be reached.
    pub async fn send_all(&self, jobs: &[Job]) -> (Vec<bool>, Option<Error>) {
        let mut sent = vec![false; jobs.len()];
        let (mut first, mut failed) = (None, 0);
        for (number, batch) in jobs.chunks(BATCH).enumerate() {
            match self.send_batch(batch).await {
                Ok(refused) => {
                    for (index, _) in batch.iter().enumerate() {
                        sent[number * BATCH + index] = !refused.contains(&index.to_string());
                    }
                    if !refused.is_empty() {
                        first = first.or_else(|| Some(Error::internal("the queue refused a message of a batch")));
                    }
                }
                Err(error) => {
                    tracing::warn!(error = %error.context(), "queue.batch_failed");
                    first = first.or(Some(error));
                    failed += 1;
                    if failed == MAX_FAILED_BATCHES {
                        break;
                    }
                }
            }
        }
        (sent, first)
    }

    /// Sends up to ten jobs; returns the indices of those that were refused.
    async fn send_batch(&self, jobs: &[Job]) -> Result<Vec<String>> {
        let entries = jobs.iter().enumerate().map(|(index, job)| {
            let entry = SendMessageBatchRequestEntry::builder().id(index.to_string());
            entry.message_body(job.to_body()?).message_group_id(job.group()).build().map_err(Error::internal)
        });
        let sent = self
            .sqs
            .send_message_batch()
            .queue_url(&self.url)
            .set_entries(Some(entries.collect::<Result<_>>()?))
            .send()
            .await
            .map_err(store_error("SendMessageBatch"))?;
        Ok(sent.failed.into_iter().map(|failed| failed.id).collect())
    }
}

/// Rounded up; a queue delays by 15 minutes at most.
fn whole_seconds(delay: Duration) -> i32 {
    const LONGEST: i32 = 900;
    let seconds = delay.as_secs() + u64::from(delay.subsec_nanos() > 0);
    i32::try_from(seconds).unwrap_or(LONGEST).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> UserId {
        UserId::new("u")
    }

    #[test]
    fn a_message_is_tagged_and_versioned() {
        let job = Job::from(AdvanceStart { user: user(), task: Uuid::from_u128(1), due_at: None });
        let body = job.to_body().expect("a body");
        assert_eq!(body, r#"{"v":1,"type":"advance_start","user":"u","task":"00000000000000000000000000000001"}"#);
        assert_eq!(Job::from_body(&body).expect("a job"), job);
        assert_eq!((job.user(), job.group().len()), (Some(&user()), 64));
        assert!(Job::from_body(&body.replace("\"v\":1", "\"v\":2")).is_err());
        assert!(Job::from_body("{}").is_err());
    }

    /// Messages wait in the queue while the worker is updated: the form of every job, current and former, stays readable.
    #[test]
    fn messages_of_earlier_versions_are_read() {
        const ID: &str = "00000000000000000000000000000002";
        let conversation = Uuid::from_u128(2);
        let body = |fields: &str| format!(r#"{{"v":1,{fields}}}"#);
        let of = |kind: &str| body(&format!(r#""type":"{kind}","user":"u","conversation":"{ID}""#));
        let refresh = RefreshConversation { user: user(), conversation, attempt: 2 };
        let cases: [(String, Job); 10] = [
            (
                body(&format!(r#""type":"advance_start","user":"u","task":"{ID}""#)),
                AdvanceStart { user: user(), task: conversation, due_at: None }.into(),
            ),
            (of("export"), Job::Export { user: user(), conversation }),
            (of("process_events"), ProcessEvents { user: user(), conversation, up_to: None }.into()),
            (of("deliver_messages"), DeliverMessages { user: user(), conversation, due_at: None }.into()),
            (
                body(r#""type":"reconcile_sandbox","user":"u","sandbox":"s""#),
                ReconcileSandbox { user: user(), sandbox: "s".to_owned() }.into(),
            ),
            (
                of("backfill_events").replace('}', r#","attempt":1}"#),
                BackfillEvents { user: user(), conversation, attempt: 1 }.into(),
            ),
            (body(r#""type":"observe_boots""#), ObserveBoots {}.into()),
            (of("delete_conversation"), DeleteConversation { user: user(), conversation }.into()),
            (of("refresh_conversation").replace('}', r#","attempt":2}"#), refresh.clone().into()),
            (of("look_at_conversation").replace('}', r#","look":2}"#), refresh.into()),
        ];
        for (body, job) in cases {
            assert_eq!(Job::from_body(&body).expect("a job"), job, "{body}");
            let is_former = body.contains("look");
            assert!(is_former || job.to_body().expect("a body") == body, "the form of {body} has changed");
        }
    }
}
