//! What agent servers tell has effects on conversations' records, and calls for work that is done off the request.

use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;

use super::batch::{Batch, reported_model, reported_tags};
use super::processors::FIRST_LOOK;
use super::store::{Event, EventStore, sortable_instant};
use crate::clock::Time;
use crate::conversation::store::{ConversationChange, ConversationStore};
use crate::conversation::tags::Tags;
use crate::conversation::told::{AgentStats, Known, ReportTime, Standing, default_titles};
use crate::conversation::{ConversationRecord, MetricsSnapshot, within_max_name};
use crate::error::{Error, Result};
use crate::sandbox::store::SandboxRecord;
use crate::start::queue::{Job, StartQueue};
use crate::start::request::EventCallbackProcessor;
use crate::user::UserId;

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
    tags: Option<Tags>,
    stats: Option<AgentStats>,
    updated_at: Option<String>,
}

impl ToldConversation {
    /// Reads what is of interest; what is not there or not as it should be is left alone. A title is cut to
    /// [`crate::conversation::MAX_NAME`] characters, a longer name of a model ignored, and of tags what exceeds a limit left out: a record
    /// with them would exceed what DynamoDB accepts.
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
        let source = crate::id::hex(id);
        let llm_model = text(told.pointer("/agent/llm/model")).and_then(|model| reported_model(&model, &source));
        let usage = text(told.pointer("/agent/llm/usage_id"));
        Self {
            id,
            execution_status: text(told.get("execution_status")),
            title,
            llm_model,
            tags: told.get("tags").and_then(|tags| reported_tags(tags, &source)),
            stats: told.get("stats").and_then(|stats| AgentStats::read(stats, usage.as_deref())),
            updated_at: text(told.get("updated_at")),
        }
    }

    /// When it was as it is reported, in a form that sorts; a time that does not read is earlier than all others.
    fn time(&self) -> String {
        self.updated_at.as_deref().and_then(sortable_instant).unwrap_or_else(|| "!".into())
    }

    /// Brings metrics, model and tags of the record up to it, unless something newer was reported.
    pub(super) async fn apply(&self, conversations: &ConversationStore, user: &UserId) -> Result<()> {
        let time = ReportTime::Snapshot(self.time());
        if let Some(stats) = &self.stats {
            conversations.set_stats(user, self.id, stats, &time).await?;
        }
        if let Some(model) = &self.llm_model {
            conversations.set_reported_model(user, self.id, model, &time).await?;
        }
        if let Some(tags) = &self.tags {
            conversations.set_tags(user, self.id, tags, &time).await?;
        }
        Ok(())
    }
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
        let events: Vec<Event> = events.into_iter().filter(|event| !event.is_transient()).collect();
        let batch = Batch::of(&events, Time::now());
        let has_stats = batch.stats.is_some();
        self.events.append(user, conversation, events).await?;
        if let Some(stats) = batch.stats {
            self.conversations.set_stats(user, conversation, &stats.value, &stats.time).await?;
        }
        // These are reported each turn and hardly ever change.
        if let Some(model) = batch.model
            && known.is_none_or(|known| known.record.llm_model.as_ref() != Some(&model.value))
        {
            self.conversations.set_reported_model(user, conversation, &model.value, &model.time).await?;
        }
        if let Some(tags) = batch.tags
            && known.is_none_or(|known| known.record.tags != tags.value)
        {
            self.conversations.set_tags(user, conversation, &tags.value, &tags.time).await?;
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
            if self.conversations.put_stub(&stub(sandbox, told), &told.time()).await? {
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
        told.apply(&self.conversations, user).await?;
        self.conversations.update(user, told.id, ConversationChange::default()).await?;
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
        tags: told.tags.clone().unwrap_or_default(),
        created_at: now,
        updated_at: now,
    }
}
