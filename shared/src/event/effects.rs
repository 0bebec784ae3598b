//! What agent servers tell has effects on conversations' records, and calls for work that is done off the request.

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use uuid::Uuid;

use super::processors::FIRST_LOOK;
use super::store::{Event, EventStore, sortable_instant};
use crate::clock::Time;
use crate::conversation::store::{ConversationChange, ConversationStore};
use crate::conversation::told::{AgentStats, Known, Standing, StatsTime, default_titles};
use crate::conversation::{ConversationRecord, MetricsSnapshot, within_max_name};
use crate::error::{Error, Result};
use crate::sandbox::store::SandboxRecord;
use crate::start::queue::{Job, StartQueue};
use crate::start::request::EventCallbackProcessor;

/// `execution_status` of a conversation that its agent server is about to remove.
const DELETING: &str = "deleting";

/// A conversation as a whole, as its agent server tells it when it starts, pauses, is renamed or is deleted.
#[derive(Clone, Debug, PartialEq)]
pub struct ToldConversation {
    /// Its id.
    pub id: Uuid,
    execution_status: Option<String>,
    /// Its title, if it has one.
    pub title: Option<String>,
    llm_model: Option<String>,
    /// What its agent has used, if it says.
    pub stats: Option<AgentStats>,
    updated_at: Option<String>,
}

impl ToldConversation {
    /// Reads what is of interest; what is not there or not as it should be is left alone. A title is cut to
    /// [`crate::conversation::MAX_NAME`] characters, and a longer name of a model ignored: a record with them would exceed what DynamoDB accepts.
    #[must_use]
    pub fn read(id: Uuid, told: &Value) -> Self {
        let text = |value: Option<&Value>| {
            value.and_then(Value::as_str).map(str::trim).filter(|text| !text.is_empty()).map(ToOwned::to_owned)
        };
        let title = text(told.get("title")).map(|title| {
            let short = within_max_name(&title);
            if short.len() < title.len() {
                tracing::warn!(conversation = %id, bytes = title.len(), "conversation.reported_title_cut");
            }
            short.to_owned()
        });
        let llm_model = text(told.pointer("/agent/llm/model")).filter(|model| {
            let fits = within_max_name(model).len() == model.len();
            if !fits {
                tracing::warn!(conversation = %id, bytes = model.len(), "conversation.reported_model_ignored");
            }
            fits
        });
        Self {
            id,
            execution_status: text(told.get("execution_status")),
            title,
            llm_model,
            stats: told.get("stats").and_then(AgentStats::read),
            updated_at: text(told.get("updated_at")),
        }
    }

    /// When its stats were taken, in a form that sorts; a time that does not read is earlier than all others.
    #[must_use]
    pub fn stats_time(&self) -> String {
        self.updated_at.as_deref().and_then(sortable_instant).unwrap_or_else(|| "!".into())
    }
}

/// What is of interest in a batch of events.
#[derive(Default)]
struct Batch {
    /// The newest stats.
    stats: Option<(String, AgentStats)>,
    has_message: bool,
    /// Whether the agent has come to a halt: finished, paused, failed, waiting for somebody.
    has_stopped: bool,
    is_empty: bool,
}

impl Batch {
    fn of(events: &[Event]) -> Self {
        let mut batch = Self { is_empty: events.is_empty(), ..Self::default() };
        for event in events {
            batch.has_message |= event.kind == "MessageEvent";
            match state_update(event) {
                Some(StateUpdate { key, value }) if key == "stats" => {
                    let position = event.position();
                    if let Some(stats) = AgentStats::read(&value)
                        && batch.stats.as_ref().is_none_or(|(newest, _)| *newest < position)
                    {
                        batch.stats = Some((position, stats));
                    }
                }
                Some(StateUpdate { key, value }) if key == "execution_status" => {
                    batch.has_stopped |= value.as_str().is_some_and(|status| status != "running");
                }
                _ => {}
            }
        }
        batch
    }
}

#[derive(Deserialize)]
struct StateUpdate {
    key: String,
    value: Value,
}

fn state_update(event: &Event) -> Option<StateUpdate> {
    // Others need not be read.
    let is_of_interest = event.json.contains("usage_to_metrics") || event.json.contains("execution_status");
    (event.kind == "ConversationStateUpdateEvent" && is_of_interest)
        .then(|| serde_json::from_str(&event.json).ok())
        .flatten()
}

/// Takes in what agent servers tell.
#[derive(Clone, Debug)]
pub struct Intake {
    /// The conversations' records.
    pub conversations: ConversationStore,
    /// Where events are stored.
    pub events: EventStore,
    /// Where work is asked for.
    pub queue: StartQueue,
}

impl Intake {
    /// What is known of a conversation that a sandbox tells of. It may tell of its own conversations, and of such as are not
    /// known (yet).
    ///
    /// # Errors
    /// [`Error::Unauthenticated`] when the conversation is in another sandbox; [`Error::Store`].
    pub async fn standing(&self, sandbox: &SandboxRecord, conversation: Uuid) -> Result<Standing> {
        let standing = self.conversations.standing(&sandbox.user, conversation).await?;
        match &standing {
            Standing::Known(known) if known.record.sandbox_id != sandbox.id => {
                Err(Error::Unauthenticated("Unauthorized".into()))
            }
            _ => Ok(standing),
        }
    }

    /// Stores events, and only then lets them have their effects. All of it may be done again.
    ///
    /// # Errors
    /// [`Error::Store`]; part of it may be done then, and the agent server sends the events again.
    pub async fn take_events(
        &self,
        sandbox: &SandboxRecord,
        conversation: Uuid,
        standing: &Standing,
        events: Vec<Event>,
    ) -> Result<()> {
        let user = &sandbox.user;
        let known = match standing {
            Standing::Deleting => return Ok(()),
            Standing::Known(known) => Some(known.as_ref()),
            Standing::Unknown => None,
        };
        let batch = Batch::of(&events);
        let has_stats = batch.stats.is_some();
        self.events.append(user, conversation, events).await?;
        if let Some((position, stats)) = batch.stats {
            self.conversations.set_stats(user, conversation, &stats, &StatsTime::Event(position)).await?;
        }
        // A record that is not there may be about to be. Agent servers tell of their titles never, of their stats not always.
        let wants_title = batch.has_message && known.is_none_or(Known::has_default_title);
        let wants_stats = batch.has_stopped && !has_stats && known.is_none_or(|known| !known.is_told_stats);
        if wants_title || wants_stats {
            let job = Job::LookAtConversation { user: user.clone(), conversation, look: 0 };
            self.queue.send(&job, FIRST_LOOK).await?;
        }
        let logged = known.is_some_and(|known| known.processors.contains(&EventCallbackProcessor::Logging));
        if logged && !batch.is_empty {
            let job = Job::ProcessEvents { user: user.clone(), conversation };
            self.queue.send(&job, Duration::ZERO).await?;
        }
        Ok(())
    }

    /// Brings the record up to what its agent server tells of the conversation as a whole, or makes one.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`] when the conversation is in another sandbox; [`Error::Store`].
    pub async fn take_conversation(&self, sandbox: &SandboxRecord, told: &ToldConversation) -> Result<()> {
        let mut standing = self.standing(sandbox, told.id).await?;
        if told.execution_status.as_deref() == Some(DELETING) {
            return Ok(());
        }
        if standing == Standing::Unknown {
            let stats_time = told.stats.is_some().then(|| told.stats_time());
            if self.conversations.put_stub(&stub(sandbox, told), stats_time).await? {
                tracing::info!(conversation = %told.id, sandbox = %sandbox.id, "conversation.found");
                return Ok(());
            }
            // Somebody was quicker.
            standing = self.standing(sandbox, told.id).await?;
        }
        if !matches!(standing, Standing::Known(_)) {
            return Ok(());
        }
        let user = &sandbox.user;
        if let Some(title) = &told.title {
            self.conversations.set_agent_title(user, told.id, title).await?;
        }
        if let Some(stats) = &told.stats {
            let time = StatsTime::Snapshot(told.stats_time());
            self.conversations.set_stats(user, told.id, stats, &time).await?;
        }
        let change = match &told.llm_model {
            Some(model) => ConversationChange::default().llm_model(model),
            None => ConversationChange::default(),
        };
        self.conversations.update(user, told.id, change).await?;
        Ok(())
    }
}

fn stub(sandbox: &SandboxRecord, told: &ToldConversation) -> ConversationRecord {
    let now = Time::now();
    let [_, default_title] = default_titles(told.id);
    ConversationRecord {
        user: sandbox.user.clone(),
        id: told.id,
        sandbox_id: sandbox.id.clone(),
        selected_repository: None,
        selected_branch: None,
        git_provider: None,
        title: Some(told.title.clone().unwrap_or(default_title)),
        trigger: None,
        pr_number: Vec::new(),
        llm_model: told.llm_model.clone(),
        metrics: told.stats.clone().map_or_else(MetricsSnapshot::default, AgentStats::into_metrics),
        parent_conversation_id: None,
        public: None,
        created_at: now,
        updated_at: now,
    }
}
