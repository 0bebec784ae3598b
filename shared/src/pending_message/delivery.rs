//! Delivery: every message reaches its agent once, in its order.
//!
//! Agent servers have no way to send a message under an id, so a worker that does not know whether one has arrived has to look:
//! before it sends a message it writes down which one, and the newest event of the conversation; behind an attempt whose outcome is
//! unknown it reads the events since then, and takes a user's message with the same parts for its own. (Somebody who says the very
//! same in those moments by another way is then heard once.)
//!
//! An agent server lets no message in while its agent thinks: a request that was given up after 30 s still stands at the door, and
//! the message arrives when the step ends. So nothing is sent again as long as the agent is at work, for a quarter of an hour.

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
use crate::dynamo::Backoff;
use crate::dynamo::lease::Lease;
use crate::error::{Error, Result};
use crate::http_client::HttpClient;
use crate::id;
use crate::jobs::queue::{Job, JobQueue};
use crate::sandbox::{SandboxService, SandboxStatus};
use crate::start::request::Content;
use crate::start::store::StartTaskStore;
use crate::start::sweep::sweep;
use crate::start::task::StartStatus;
use crate::user::UserId;

/// Longer than an agent's step takes: what has not come in by then never will.
const AT_THE_DOOR: Duration = Duration::from_secs(900);
const UNREACHABLE: Outcome = Outcome::Later("the agent server does not answer");
/// What looking for a message may take.
const LOOK: Duration = Duration::from_secs(30);

/// Times of deliveries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// How long after its message a queue counts as forgotten.
    pub forgotten_after: Duration,
    /// How long a worker has a queue.
    pub lease: Duration,
    /// What one message may take: looking and sending.
    pub turn: Duration,
    /// What sending may take.
    pub send: Duration,
    /// Between two attempts: at first, at most for an hour, and from then on.
    pub pauses: [Duration; 3],
    /// An agent server that answers this often in a row with an error of its own never takes the message.
    pub refusals: u32,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            forgotten_after: Duration::from_secs(20),
            lease: Duration::from_secs(90),
            // Looking takes 30 s at most, and so does sending.
            turn: Duration::from_secs(75),
            send: Duration::from_secs(30),
            pauses: [Duration::from_secs(2), Duration::from_secs(60), Duration::from_secs(900)],
            // Within two minutes.
            refusals: 7,
        }
    }
}

/// Pages of events that are looked through for a message at most.
const MAX_PAGES: usize = 20;
/// Bytes of an event's id. One with a longer id is not looked for.
const MAX_EVENT_ID: usize = 256;
/// Parts of a message, and images in a part, up to which a message is recognised.
const MAX_PARTS: usize = 10_000;
const PAGE: usize = 50;

impl Timing {
    fn pause_after(&self, attempts: u32) -> Duration {
        let [first, longest, from_then_on] = self.pauses;
        if attempts > 60 {
            return from_then_on;
        }
        Backoff { first, longest, attempts: u32::MAX }.pause_after(attempts.saturating_add(1))
    }
}

/// Keeps messages, and delivers them.
#[derive(Clone, Debug)]
pub struct Messages {
    /// The queues.
    pub store: MessageStore,
    /// The starts that conversations come from.
    pub tasks: StartTaskStore,
    /// The conversations.
    pub conversations: ConversationStore,
    /// Where they run.
    pub sandboxes: Arc<dyn SandboxService>,
    /// The bell.
    pub queue: JobQueue,
    /// For agent servers.
    pub http: HttpClient,
    /// How long things take.
    pub timing: Timing,
}

/// To whom a message is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addressee {
    /// A start's conversation to be.
    Task(Uuid),
    /// A conversation.
    Conversation(Uuid),
}

impl Addressee {
    /// `task-` and the id of a start, or the id of a conversation, in any form.
    #[must_use]
    pub fn from_path(text: &str) -> Option<Self> {
        match text.strip_prefix("task-") {
            Some(task) => Uuid::try_parse(task).ok().map(Self::Task),
            None => Uuid::try_parse(text).ok().map(Self::Conversation),
        }
    }
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queued {
    /// Its id.
    pub id: Uuid,
    /// Its place in the queue, from 1.
    pub position: usize,
}

/// What came of an attempt to deliver.
enum Outcome {
    /// There is nothing left to deliver.
    Empty,
    /// Try again after a while.
    Later(&'static str),
    /// The agent server answered with an error of its own, for this many times in a row; mostly it is permanent.
    Refused(u32),
    /// It can never be delivered.
    Never(&'static str),
    /// The queue is another worker's.
    Lost,
}

impl Messages {
    /// Keeps a message, and rings for its delivery if the conversation can take it.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the user has no such conversation or start; [`Error::Conflict`] when the start has failed;
    /// [`Error::TooMany`]; [`Error::Store`], and the message may be kept then.
    pub async fn keep(&self, user: &UserId, to: Addressee, content: &[Content]) -> Result<Queued> {
        let (conversation, task) = self.conversation(user, to).await?;
        let id = id::new_uuid();
        let parts = serde_json::to_string(content).map_err(Error::internal)?;
        let due_at = Time::now().plus(self.timing.forgotten_after);
        let position = self.store.append(user, conversation, task, id, parts, due_at).await?.ok_or_else(|| {
            Error::TooMany("Too many pending messages. Maximum 10 messages per conversation.".to_owned())
        })?;
        // Only now: either this sees that the conversation is there, or who makes it sees the message.
        if let Lookup::Present(_) = self.conversations.lookup(user, conversation).await? {
            self.ring(user, conversation, Duration::ZERO).await;
        }
        Ok(Queued { id, position })
    }

    /// The conversation that is meant, and the start if that was named.
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

    /// Delivers what waits for the conversation of a start that has ended.
    ///
    /// # Errors
    /// [`Error::Store`]; it may be done again.
    pub async fn start_ended(&self, user: &UserId, task: Uuid) -> Result<()> {
        let Some(record) = self.tasks.get(user, task).await? else { return Ok(()) };
        self.deliver(user, record.conversation_id).await
    }

    /// Rings for queues that nobody looks after, of all users. Answers how many there were.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn sweep(&self) -> Result<usize> {
        sweep(&self.store.undelivered(), &self.queue, |row| Job::DeliverMessages {
            user: row.user.clone(),
            conversation: row.id,
        })
        .await
    }

    /// Delivers what waits for a conversation, unless another worker does. What cannot be delivered now is looked after again
    /// later.
    ///
    /// # Errors
    /// [`Error::Store`] or what the sandboxes answer; it may be done again.
    pub async fn deliver(&self, user: &UserId, conversation: Uuid) -> Result<()> {
        loop {
            let Some((lease, queue)) = self.store.claim(user, conversation, self.timing.lease).await? else {
                return Ok(());
            };
            let (attempts, newest) = (queue.attempts, queue.newest.clone());
            match self.send_all(user, conversation, &lease, queue).await {
                Ok(Outcome::Lost) => return Ok(()),
                Ok(Outcome::Empty) => {
                    if self.store.end(user, conversation, &lease).await? {
                        return Ok(());
                    }
                    // Another message came meanwhile.
                    self.store.postpone(user, conversation, &lease, 0, Time::now()).await?;
                }
                Ok(Outcome::Later(why)) => {
                    let pause = self.timing.pause_after(attempts);
                    tracing::info!(%conversation, why, attempts, "pending_message.postponed");
                    let due_at = Time::now().plus(pause + self.timing.forgotten_after);
                    self.store.postpone(user, conversation, &lease, attempts + 1, due_at).await?;
                    self.ring(user, conversation, pause).await;
                    return Ok(());
                }
                Ok(Outcome::Refused(refusals)) if refusals < self.timing.refusals => {
                    let pause = self.timing.pause_after(refusals - 1);
                    let due_at = Time::now().plus(pause + self.timing.forgotten_after);
                    let newest = newest.as_deref();
                    if !self.store.refused(user, conversation, &lease, newest, refusals, due_at).await? {
                        self.store.postpone(user, conversation, &lease, attempts, due_at).await?;
                    }
                    self.ring(user, conversation, pause).await;
                    return Ok(());
                }
                Ok(ended @ (Outcome::Refused(_) | Outcome::Never(_))) => {
                    if self.store.give_up(user, conversation, &lease, newest.as_deref()).await? {
                        // They stay with the conversation, should somebody ask what became of them. Its next message has them tried
                        // again. What an agent server answered is in the log already.
                        let why = if let Outcome::Never(why) = ended { why } else { "the agent server refuses it" };
                        tracing::error!(%conversation, why, "pending_message.undeliverable");
                        return Ok(());
                    }
                    // Another message came meanwhile, or another worker.
                    self.store.postpone(user, conversation, &lease, attempts, Time::now()).await?;
                }
                Err(error) => {
                    // Best effort: the lease runs out by itself.
                    let due_at = Time::now().plus(self.timing.forgotten_after);
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
            Lookup::Deleting => return Ok(Outcome::Never("the conversation is being deleted")),
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
        let Some(sandbox) = self.sandboxes.get(user, &record.sandbox_id).await? else {
            return Ok(Outcome::Never("the sandbox was deleted"));
        };
        match sandbox.status {
            SandboxStatus::Running => {}
            SandboxStatus::Starting => return Ok(Outcome::Later("the sandbox is starting")),
            SandboxStatus::Paused => return Ok(Outcome::Later("the sandbox is paused")),
            SandboxStatus::Error | SandboxStatus::Missing => return Ok(Outcome::Later("the sandbox does not run")),
        }
        let Some(agent_server) = sandbox.agent_server(&self.http) else {
            return Ok(Outcome::Later("the sandbox has no agent server"));
        };
        while let Some(message) = queue.messages.first().cloned() {
            // Whoever comes after the lease must not meet a message that is still on its way.
            if Time::now().plus(self.timing.turn) > lease.until {
                return Ok(Outcome::Later("there are many"));
            }
            let parts = self.store.content(&message).await?;
            match self.send(user, conversation, lease, &agent_server, &queue, &message, &parts).await? {
                Some(outcome) => return Ok(outcome),
                None => match self.store.arrived(user, conversation, lease, &message).await? {
                    Some(left) => queue = left,
                    None => return Ok(Outcome::Lost),
                },
            }
            tracing::info!(%conversation, message = %message.id, "pending_message.delivered");
        }
        Ok(Outcome::Empty)
    }

    /// Sends the first message, unless it has arrived already; `None` when it is there.
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
                let looked = async {
                    // First: an agent that is not at work now lets in who stands at the door before we look.
                    let at_work = is_at_work(agent_server, conversation).await?;
                    Ok::<_, AgentServerError>((at_work, has_arrived(agent_server, conversation, sending, parts).await?))
                };
                match tokio::time::timeout(LOOK, looked).await {
                    Ok(Ok((_, true))) => return Ok(None),
                    Ok(Ok((true, false))) if Time::now().since(sending.since) < AT_THE_DOOR => {
                        return Ok(Some(Outcome::Later("the agent is at work, and the message may be at its door")));
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
        match tokio::time::timeout(self.timing.send, sent).await {
            Ok(Ok(())) => Ok(None),
            Ok(Err(error)) => {
                tracing::warn!(%conversation, %error, "pending_message.not_sent");
                Ok(Some(self.after(&error, queue)))
            }
            Err(_) => Ok(Some(UNREACHABLE)),
        }
    }

    /// What a failed request to an agent server means for its queue. A known and permanent mistake is not asked about again.
    fn after(&self, error: &AgentServerError, queue: &MessageQueue) -> Outcome {
        match (error.retry(), error.mistake()) {
            (Retry::Often, _) => UNREACHABLE,
            (Retry::Never, Some(_)) => Outcome::Refused(self.timing.refusals),
            // 404, too: an agent server that has just been resumed may still be loading the conversation.
            (Retry::Few | Retry::Never, _) => Outcome::Refused(queue.refusals.saturating_add(1)),
        }
    }

    /// The row is the truth: the sweep finds it when the bell was not heard.
    async fn ring(&self, user: &UserId, conversation: Uuid, delay: Duration) {
        let job = Job::DeliverMessages { user: user.clone(), conversation };
        if let Err(error) = self.queue.send(&job, delay).await {
            tracing::warn!(%conversation, error = %error.context(), "pending_message.enqueue_failed");
        }
    }
}

/// Whether the conversation's agent is at work, as its agent server says.
async fn is_at_work(agent_server: &AgentServer, conversation: Uuid) -> Result<bool, AgentServerError> {
    let found = agent_server.conversations(&[conversation], LOOK).await?;
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

/// Of an event, the parts by which a message is recognised. Events are the sandbox's: all else is read over.
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

/// What a part says: its images, or its text.
type Said = (Option<Vec<String>>, Option<String>);

/// What a message says, without how its parts are written; `None` for what is no list of parts.
fn essence(parts: &str) -> Option<Vec<Said>> {
    let parts: Bounded<Part, MAX_PARTS> = serde_json::from_str(parts).ok()?;
    let essence = |part: Part| match part.kind.as_deref() {
        Some("image") => (part.image_urls.map(|urls| urls.0), None),
        _ => (None, part.text),
    };
    Some(parts.0.into_iter().map(essence).collect())
}
