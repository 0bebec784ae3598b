//! Delivery of pending messages to agent servers, with leases, retry and backoff: every message arrives exactly once, in order.
//!
//! Agent servers accept no id (idempotency key) with a message, so a worker that does not know whether a message has arrived must look it
//! up. Before it sends a message it records the message, and the newest event of the conversation. After an attempt with an unknown outcome
//! it reads the events since then, and treats a user's message with the same parts as its own. (If a user sends an identical message
//! through another channel in that window, only one copy is kept.)
//!
//! An agent server accepts no message while its agent thinks: a request that timed out after 30 s may still be queued inside it, and its
//! message arrives when the step ends. Therefore nothing is resent while the agent is busy, for up to a quarter of an hour.

use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::PendingMessage;
use super::store::{MessageQueue, MessageStore, Sending};
use crate::agent_server::bounded::{self, Bounded};
use crate::agent_server::{AgentServer, AgentServerError, Retry};
use crate::clock::Time;
use crate::conversation::reports::Lookup;
use crate::conversation::store::ConversationStore;
use crate::dynamo::lease::Lease;
use crate::error::{Error, Result};
use crate::http_client::HttpClient;
use crate::id::{self, UserId};
use crate::jobs::deliver_messages::{DeliverMessages, FREQUENT_ATTEMPTS, RetrySchedule};
use crate::jobs::queue::JobQueue;
use crate::jobs::sweep::sweep;
use crate::sandbox::{SandboxService, SandboxStatus};
use crate::start::request::Content;
use crate::start::store::StartTaskStore;
use crate::start::task::StartStatus;

/// Longer than a step of an agent: a message that has not arrived by then will never arrive.
const QUEUED_INSIDE: Duration = Duration::from_secs(900);
const UNREACHABLE: Outcome = Outcome::Later("the agent server does not answer");
/// The timeout of looking up a message.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(30);

/// The timing of deliveries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// The time after a due attempt at which the sweep enqueues it, if no worker has started it.
    pub sweep_delay: Duration,
    /// The duration of a worker's lease on a queue.
    pub lease: Duration,
    /// The timeout of one message: lookup and sending.
    pub message_timeout: Duration,
    /// The timeout of sending.
    pub send_timeout: Duration,
    pub retry: RetrySchedule,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            sweep_delay: Duration::from_secs(20),
            lease: Duration::from_secs(90),
            // A lookup needs 30 s at most, and so does sending.
            message_timeout: Duration::from_secs(75),
            send_timeout: Duration::from_secs(30),
            retry: RetrySchedule::default(),
        }
    }
}

/// The most pages of events that a lookup reads.
const MAX_PAGES: usize = 20;
/// The longest id of an event, in bytes. Events with longer ids are ignored.
const MAX_EVENT_ID: usize = 256;
/// The most parts of a message, and images in a part, that a lookup compares.
const MAX_PARTS: usize = 10_000;
const PAGE: usize = 50;

/// Stores pending messages and delivers them.
#[derive(Clone, Debug)]
pub struct Messages {
    pub store: MessageStore,
    pub tasks: StartTaskStore,
    pub conversations: ConversationStore,
    pub sandboxes: Arc<dyn SandboxService>,
    pub queue: JobQueue,
    pub http: HttpClient,
    pub timing: Timing,
}

/// The recipient of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addressee {
    /// The conversation that a start will create.
    Task(Uuid),
    Conversation(Uuid),
}

impl Addressee {
    /// Parses `task-` and the id of a start, or the id of a conversation, in any form.
    #[must_use]
    pub fn from_path(text: &str) -> Option<Self> {
        match text.strip_prefix("task-") {
            Some(task) => Uuid::try_parse(task).ok().map(Self::Task),
            None => Uuid::try_parse(text).ok().map(Self::Conversation),
        }
    }
}

/// A message that was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queued {
    pub id: Uuid,
    /// The position in the queue, from 1.
    pub position: usize,
}

/// The outcome of an attempt to deliver a queue.
enum Outcome {
    /// Nothing is left to deliver.
    Empty,
    /// The delivery must be retried after a delay.
    Later(&'static str),
    /// The agent server responded with an error of its own, this many times in a row. Most such errors are permanent.
    Refused(u32),
    /// The message can never be delivered.
    Never(&'static str),
    /// The lease is lost: another worker has claimed the queue, or the queue was removed.
    Lost,
}

impl Messages {
    /// Stores a message, and enqueues its delivery if the conversation can accept it.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the user has no such conversation or start; [`Error::Conflict`] when the start has failed;
    /// [`Error::TooMany`]; [`Error::Store`], after which the message may be stored.
    pub async fn keep(&self, user: &UserId, to: Addressee, content: &[Content]) -> Result<Queued> {
        let (conversation, task) = self.conversation(user, to).await?;
        let id = id::new_uuid();
        let parts = serde_json::to_string(content).map_err(Error::internal)?;
        let due_at = Time::now().plus(self.timing.sweep_delay);
        let position = self.store.append(user, conversation, task, id, parts, due_at).await?.ok_or_else(|| {
            Error::TooMany("Too many pending messages. Maximum 10 messages per conversation.".to_owned())
        })?;
        // The lookup must follow the write: either this lookup finds the conversation, or the start that creates it finds the message.
        if let Lookup::Present(_) = self.conversations.lookup(user, conversation).await? {
            self.enqueue(user, conversation, Duration::ZERO, None).await;
        }
        Ok(Queued { id, position })
    }

    /// The id of the addressed conversation, and the id of the start if the start was addressed.
    async fn conversation(&self, user: &UserId, to: Addressee) -> Result<(Uuid, Option<Uuid>)> {
        match to {
            Addressee::Task(task) => {
                let found = self.tasks.get(user, task).await?;
                let record = found.ok_or_else(|| Error::NotFound("Start not found".to_owned()))?;
                if record.now.status == StartStatus::Error {
                    return Err(Error::Conflict(
                        "The start has failed and accepts no messages; start a new conversation".to_owned(),
                    ));
                }
                Ok((record.now.app_conversation_id.unwrap_or(record.conversation_id), Some(task)))
            }
            Addressee::Conversation(conversation) => match self.conversations.lookup(user, conversation).await? {
                Lookup::Present(_) => Ok((conversation, None)),
                Lookup::Absent | Lookup::Deleting => Err(Error::NotFound("Conversation not found".to_owned())),
            },
        }
    }

    /// Delivers the messages of the conversation of a start that has ended.
    ///
    /// # Errors
    /// [`Error::Store`]; the call may be repeated.
    pub async fn start_ended(&self, user: &UserId, task: Uuid) -> Result<()> {
        let Some(record) = self.tasks.get(user, task).await? else { return Ok(()) };
        self.deliver(&DeliverMessages { user: user.clone(), conversation: record.conversation_id, due_at: None }).await
    }

    /// Enqueues overdue deliveries of all users again. Returns how many.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn sweep(&self) -> Result<usize> {
        sweep(&self.store.undelivered(), &self.queue, |row| {
            Some(DeliverMessages { user: row.user.clone(), conversation: row.uuid()?, due_at: None })
        })
        .await
    }

    /// Delivers the messages of a conversation, unless another worker does. Messages that cannot be delivered now are retried later.
    ///
    /// # Errors
    /// [`Error::Store`] or an error of the sandboxes; the call may be repeated.
    pub async fn deliver(&self, job: &DeliverMessages) -> Result<()> {
        let (user, conversation, mut due_at) = (&job.user, job.conversation, job.due_at);
        loop {
            let claimed = self.store.claim(user, conversation, self.timing.lease, due_at.take()).await?;
            let Some((lease, queue)) = claimed else { return Ok(()) };
            let (attempts, newest) = (queue.attempts, queue.newest.clone());
            match self.send_all(user, conversation, &lease, queue).await {
                Ok(Outcome::Lost) => return Ok(()),
                Ok(Outcome::Empty) => {
                    if self.store.end(user, conversation, &lease).await? {
                        return Ok(());
                    }
                    // Another message was added meanwhile.
                    self.store.postpone(user, conversation, &lease, 0, Time::now()).await?;
                }
                Ok(Outcome::Later(why)) => {
                    let pause = self.timing.retry.delay_after(attempts);
                    tracing::info!(%conversation, why, attempts, "pending_message.postponed");
                    let due_at = Time::now().plus(pause + self.timing.sweep_delay);
                    self.store.postpone(user, conversation, &lease, attempts + 1, due_at).await?;
                    self.enqueue(user, conversation, pause, Some(due_at)).await;
                    return Ok(());
                }
                Ok(Outcome::Refused(refusals)) if refusals < self.timing.retry.max_refusals => {
                    let pause = self.timing.retry.delay_after(refusals - 1);
                    let due_at = Time::now().plus(pause + self.timing.sweep_delay);
                    let newest = newest.as_deref();
                    if !self.store.refused(user, conversation, &lease, newest, refusals, due_at).await? {
                        self.store.postpone(user, conversation, &lease, attempts, due_at).await?;
                    }
                    self.enqueue(user, conversation, pause, Some(due_at)).await;
                    return Ok(());
                }
                Ok(ended @ (Outcome::Refused(_) | Outcome::Never(_))) => {
                    if self.store.give_up(user, conversation, &lease, newest.as_deref()).await? {
                        // The messages stay with the conversation, where an operator can find them. The next message of the conversation
                        // triggers another attempt. The log already contains the agent server's response.
                        let why = if let Outcome::Never(why) = ended { why } else { "the agent server refuses it" };
                        tracing::error!(%conversation, why, "pending_message.undeliverable");
                        return Ok(());
                    }
                    // Another message was added meanwhile, or another worker has the lease.
                    self.store.postpone(user, conversation, &lease, attempts, Time::now()).await?;
                }
                Err(error) => {
                    // Best effort: the lease expires by itself.
                    let due_at = Time::now().plus(self.timing.sweep_delay);
                    let given_back = self.store.postpone(user, conversation, &lease, attempts + 1, due_at).await;
                    if let Err(error) = given_back {
                        tracing::warn!(%conversation, error = %error.context(), "pending_message.lease_not_released");
                    }
                    return Err(error);
                }
            }
        }
    }

    async fn send_all(
        &self,
        user: &UserId,
        conversation: Uuid,
        lease: &Lease,
        mut queue: MessageQueue,
    ) -> Result<Outcome> {
        if queue.messages.is_empty() {
            return Ok(Outcome::Empty);
        }
        let record = match self.conversations.lookup(user, conversation).await? {
            Lookup::Present(known) => known.record,
            Lookup::Deleting => {
                // They may have been added after the deletion had removed the others.
                self.store.delete_all(user, conversation).await?;
                return Ok(Outcome::Lost);
            }
            Lookup::Absent => {
                let task = queue.task.as_deref().and_then(|task| Uuid::try_parse(task).ok());
                let task = match task {
                    Some(task) => self.tasks.get(user, task).await?,
                    None => None,
                };
                return Ok(match task.map(|task| task.now.status) {
                    None => Outcome::Never("there is no such conversation any more"),
                    Some(StartStatus::Error) => Outcome::Never("the start has failed"),
                    Some(_) => Outcome::Later("the conversation is not ready"),
                });
            }
        };
        let sandbox = match self.sandboxes.inspect(user, &record.sandbox_id).await {
            Ok(Some(sandbox)) => sandbox,
            Ok(None) => return Ok(Outcome::Never("the sandbox was deleted")),
            Err(error) if error.is_upstream() => {
                tracing::warn!(%conversation, error = %error.context(), "pending_message.sandbox_unknown");
                return Ok(Outcome::Later("the sandbox provider does not respond"));
            }
            Err(error) => return Err(error),
        };
        match sandbox.status {
            SandboxStatus::Running => {}
            SandboxStatus::Starting => return Ok(Outcome::Later("the sandbox is starting")),
            SandboxStatus::Paused => {
                // It was paused because it was idle, or by its user, who now has a message for it.
                return Ok(match self.sandboxes.resume(user, &record.sandbox_id).await {
                    Ok(_) => Outcome::Later("the sandbox is resumed"),
                    Err(error) if error.is_upstream() || matches!(error, Error::Refused(_)) => {
                        tracing::warn!(%conversation, error = %error.context(), "pending_message.sandbox_not_resumed");
                        Outcome::Later("the sandbox is paused and was not resumed")
                    }
                    Err(error) => return Err(error),
                });
            }
            // A provider may report this of a sandbox that it has created a moment ago, or during an outage of its own.
            SandboxStatus::Error | SandboxStatus::Missing if queue.attempts > FREQUENT_ATTEMPTS => {
                return Ok(Outcome::Never("the sandbox has failed or is gone"));
            }
            SandboxStatus::Error | SandboxStatus::Missing => return Ok(Outcome::Later("the sandbox does not run")),
        }
        let Some(agent_server) = sandbox.agent_server(&self.http) else {
            return Ok(Outcome::Later("the sandbox has no agent server"));
        };
        while let Some(message) = queue.messages.first().cloned() {
            // The next worker must not claim the queue while a message is still being sent.
            if Time::now().plus(self.timing.message_timeout) > lease.until {
                return Ok(Outcome::Later("the lease is too short for the next message"));
            }
            let parts = self.store.content(&message).await?;
            match self.send(user, conversation, lease, &agent_server, &queue, &message, &parts).await? {
                Some(outcome) => return Ok(outcome),
                None => match self.store.arrived(user, conversation, lease, &queue, &message).await? {
                    Some(left) => queue = left,
                    None => return Ok(Outcome::Lost),
                },
            }
            tracing::info!(%conversation, message = %message.id, "pending_message.delivered");
        }
        Ok(Outcome::Empty)
    }

    /// Sends the first message, unless it has arrived already; `None` if it has arrived.
    #[expect(clippy::too_many_arguments, reason = "one step of a loop, which has all of them at hand")]
    async fn send(
        &self,
        user: &UserId,
        conversation: Uuid,
        lease: &Lease,
        agent_server: &AgentServer,
        queue: &MessageQueue,
        message: &PendingMessage,
        parts: &Value,
    ) -> Result<Option<Outcome>> {
        let message_id = id::hex(message.id);
        match queue.sending.as_ref().filter(|sending| sending.message == message_id) {
            Some(sending) => {
                let lookup = async {
                    // The order matters: if the agent is not busy, its agent server accepts the queued requests before the events are read.
                    let is_busy = is_busy(agent_server, conversation).await?;
                    Ok::<_, AgentServerError>((is_busy, has_arrived(agent_server, conversation, sending, parts).await?))
                };
                match tokio::time::timeout(LOOKUP_TIMEOUT, lookup).await {
                    Ok(Ok((_, true))) => return Ok(None),
                    Ok(Ok((true, false))) if Time::now().since(sending.since) < QUEUED_INSIDE => {
                        return Ok(Some(Outcome::Later(
                            "the agent is busy, and the message may be queued inside the agent server",
                        )));
                    }
                    Ok(Ok((_, false))) => {}
                    Ok(Err(error)) => {
                        tracing::warn!(%conversation, %error, "pending_message.lookup_failed");
                        return Ok(Some(self.after(&error, queue)));
                    }
                    Err(_) => return Ok(Some(UNREACHABLE)),
                }
            }
            None => {
                let page = match agent_server.newest_events(conversation, None, 1).await {
                    Ok(page) => page,
                    Err(error) => {
                        tracing::warn!(%conversation, %error, "pending_message.lookup_failed");
                        return Ok(Some(self.after(&error, queue)));
                    }
                };
                let after = page.items.first().and_then(|event| event_id(event.get()));
                let sending = Sending { message: message_id, after, since: Time::now() };
                if !self.store.begin(user, conversation, lease, &sending).await? {
                    return Ok(Some(Outcome::Lost));
                }
            }
        }
        let sent = agent_server.send_message(conversation, "user", parts, true);
        match tokio::time::timeout(self.timing.send_timeout, sent).await {
            Ok(Ok(())) => Ok(None),
            Ok(Err(error)) => {
                tracing::warn!(%conversation, %error, "pending_message.not_sent");
                Ok(Some(self.after(&error, queue)))
            }
            Err(_) => Ok(Some(UNREACHABLE)),
        }
    }

    /// The outcome of a failed request to an agent server. A known, permanent error is not retried.
    fn after(&self, error: &AgentServerError, queue: &MessageQueue) -> Outcome {
        match (error.retry(), error.mistake()) {
            (Retry::Often, _) => UNREACHABLE,
            (Retry::Never, Some(_)) => Outcome::Refused(self.timing.retry.max_refusals),
            // 404 is included: an agent server that was just resumed may still be loading the conversation.
            (Retry::Few | Retry::Never, _) => Outcome::Refused(queue.refusals.saturating_add(1)),
        }
    }

    /// A failure is only logged: the sweep enqueues the job of an overdue row.
    async fn enqueue(&self, user: &UserId, conversation: Uuid, delay: Duration, due_at: Option<Time>) {
        let job = DeliverMessages { user: user.clone(), conversation, due_at }.into();
        if let Err(error) = self.queue.send(&job, delay).await {
            tracing::warn!(%conversation, error = %error.context(), "pending_message.enqueue_failed");
        }
    }
}

/// Whether the agent server reports that the conversation's agent is running.
async fn is_busy(agent_server: &AgentServer, conversation: Uuid) -> Result<bool, AgentServerError> {
    let found = agent_server.conversations(&[conversation], LOOKUP_TIMEOUT).await?;
    Ok(found.into_iter().flatten().any(|found| found.execution_status.as_deref() == Some("running")))
}

/// Whether a message is among the events since it was first sent.
async fn has_arrived(
    agent_server: &AgentServer,
    conversation: Uuid,
    sending: &Sending,
    parts: &Value,
) -> Result<bool, AgentServerError> {
    let wanted = essence(&parts.to_string());
    let mut page_id: Option<String> = None;
    for _ in 0..MAX_PAGES {
        let page = agent_server.newest_events(conversation, page_id.as_deref(), PAGE).await?;
        for event in &page.items {
            let event: Event = serde_json::from_str(event.get()).unwrap_or_default();
            if sending.after.is_some() && event.id == sending.after {
                return Ok(false);
            }
            let said = event.llm_message.and_then(|message| message.content).and_then(|parts| essence(parts.get()));
            if event.source.as_deref() == Some("user") && said.is_some() && said == wanted {
                return Ok(true);
            }
        }
        match page.next_page_id {
            Some(next) if page_id.as_ref() != Some(&next) => page_id = Some(next),
            _ => return Ok(false),
        }
    }
    Ok(false)
}

fn event_id(event: &str) -> Option<String> {
    serde_json::from_str::<Event>(event).ok()?.id
}

/// The fields of an event that identify a message in a lookup. Events come from the sandbox, so all other fields are ignored.
#[derive(Default, Deserialize)]
struct Event {
    #[serde(default, deserialize_with = "bounded::short::<_, MAX_EVENT_ID>")]
    id: Option<String>,
    #[serde(default)]
    source: Option<String>,
    #[serde(default)]
    llm_message: Option<LlmMessage>,
}

#[derive(Deserialize)]
struct LlmMessage {
    #[serde(default)]
    content: Option<Box<RawValue>>,
}

/// A part of a message: a text, or images.
#[derive(Deserialize)]
struct Part {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    image_urls: Option<Bounded<String, MAX_PARTS>>,
}

/// The content of a part: its images, or its text.
type Said = (Option<Vec<String>>, Option<String>);

/// The content of a message, independent of the JSON form of its parts; `None` if the text is not a list of parts.
fn essence(parts: &str) -> Option<Vec<Said>> {
    let parts: Bounded<Part, MAX_PARTS> = serde_json::from_str(parts).ok()?;
    let essence = |part: Part| match part.kind.as_deref() {
        Some("image") => (part.image_urls.map(|urls| urls.0), None),
        _ => (None, part.text),
    };
    Some(parts.0.into_iter().map(essence).collect())
}
