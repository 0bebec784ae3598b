//! Webhook ingestion: stores the events of agent servers, updates the conversation's record, and enqueues follow-up jobs.

use futures::FutureExt as _;
use futures::future::{BoxFuture, try_join_all};
use serde::Deserialize as _;
use serde_json::Value;
use uuid::Uuid;

use super::backfill;
use super::batch::{Batch, Reported, reported_model, reported_tags};
use super::store::{Event, EventStore, sortable_instant};
use crate::clock::Time;
use crate::conversation::fields::EventCallbackProcessor;
use crate::conversation::reports::{
    AGENT_USAGE, AgentStats, Lookup, ReportTime, StoredConversation, Touch, default_titles,
};
use crate::conversation::store::{ConversationChange, ConversationStore};
use crate::conversation::tags::Tags;
use crate::conversation::{
    ACP_AGENT, ConversationRecord, LaunchedAgentProfile, MAX_AGENT_NAME, MetricsSnapshot, OPENHANDS_AGENT,
    within_max_name,
};
use crate::error::{Error, Result};
use crate::id::UserId;
use crate::jobs::process_events::{self, ProcessEvents};
use crate::jobs::queue::JobQueue;
use crate::jobs::refresh_conversation::{FIRST_DELAY, RefreshConversation};
use crate::sandbox::store::{SandboxRecord, SandboxStore};

/// The `execution_status` of a conversation that its agent server is about to remove.
const DELETING: &str = "deleting";
/// The `execution_status` of a conversation whose agent has run and does not run any more.
const HALTED: [&str; 5] = ["finished", "paused", "waiting_for_confirmation", "error", "stuck"];

/// A snapshot of a conversation, which its agent server posts when it starts, pauses, renames or deletes the conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct ConversationReport {
    pub id: Uuid,
    execution_status: Option<String>,
    pub title: Option<String>,
    llm_model: Option<String>,
    tags: Option<Tags>,
    agent_kind: &'static str,
    acp_server: Option<String>,
    launched_agent_profile: Option<LaunchedAgentProfile>,
    stats: Option<AgentStats>,
    updated_at: Option<String>,
}

impl ConversationReport {
    /// Reads the values that records have; missing and malformed values are ignored. A title is truncated to
    /// [`crate::conversation::MAX_NAME`] characters, a longer model name is ignored, and tags that exceed a limit are skipped, because the
    /// record would exceed DynamoDB's item limit.
    #[must_use]
    pub fn read(id: Uuid, report: &Value) -> Self {
        let text = |value: Option<&Value>| {
            value.and_then(Value::as_str).map(str::trim).filter(|text| !text.is_empty()).map(ToOwned::to_owned)
        };
        let title = text(report.get("title")).map(|title| {
            let short = within_max_name(&title);
            if short.len() < title.len() {
                tracing::warn!(conversation = %id, bytes = title.len(), "conversation.reported_title_cut");
            }
            short.to_owned()
        });
        let llm_model = text(report.pointer("/agent/llm/model")).and_then(|model| reported_model(&model, id));
        let is_acp = report.pointer("/agent/kind").is_some_and(|kind| kind == "ACPAgent");
        let acp_server = text(report.pointer("/agent/acp_server"));
        let profile = report.get("launched_agent_profile");
        let usage = text(report.pointer("/agent/llm/usage_id")).unwrap_or_else(|| AGENT_USAGE.to_owned());
        Self {
            id,
            execution_status: text(report.get("execution_status")),
            title,
            llm_model,
            tags: report.get("tags").and_then(|tags| reported_tags(tags, id)),
            agent_kind: if is_acp { ACP_AGENT } else { OPENHANDS_AGENT },
            acp_server: acp_server.filter(|name| is_acp && name.chars().count() <= MAX_AGENT_NAME),
            launched_agent_profile: profile.and_then(|profile| LaunchedAgentProfile::deserialize(profile).ok()),
            stats: report.get("stats").and_then(|stats| AgentStats::read(stats, Some(&usage))),
            updated_at: text(report.get("updated_at")),
        }
    }

    /// Whether the agent has run and does not run any more.
    fn has_halted(&self) -> bool {
        self.execution_status.as_deref().is_some_and(|status| HALTED.contains(&status))
    }

    /// Its `updated_at` in a sortable form; an invalid time sorts before all others.
    fn version(&self) -> String {
        self.updated_at.as_deref().and_then(sortable_instant).unwrap_or_else(|| "!".into())
    }

    /// Applies metrics, model and tags to the record, unless newer reports of them were applied.
    pub(super) async fn apply(&self, conversations: &ConversationStore, user: &UserId, touch: Touch) -> Result<()> {
        let source = ReportTime::Snapshot(self.version());
        let mut writes = Writes::new();
        if let Some(stats) = &self.stats {
            writes.push(conversations.set_stats(user, self.id, stats, &source, touch).boxed());
        }
        if let Some(model) = &self.llm_model {
            writes.push(conversations.set_reported_model(user, self.id, model, &source, touch).boxed());
        }
        if let Some(tags) = &self.tags {
            writes.push(conversations.set_tags(user, self.id, tags, &source, touch).boxed());
        }
        try_join_all(writes).await.map(|_| ())
    }
}

/// Concurrent updates of different attributes of a record. They are boxed because the futures of the SDK are large.
type Writes<'w> = Vec<BoxFuture<'w, Result<bool>>>;

/// Ingests events and snapshots of conversations.
#[derive(Clone, Debug)]
pub struct EventIngestor {
    pub conversations: ConversationStore,
    pub events: EventStore,
    /// For the membership of stubs in their sandboxes.
    pub sandboxes: SandboxStore,
    /// Receives the follow-up jobs.
    pub queue: JobQueue,
}

impl EventIngestor {
    /// Looks up a conversation that a sandbox reports. A sandbox may report its own conversations and conversations without a record.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`] when the conversation is in another sandbox; [`Error::Store`].
    pub async fn lookup(&self, sandbox: &SandboxRecord, conversation: Uuid) -> Result<Lookup> {
        let lookup = self.conversations.lookup(&sandbox.user, conversation).await?;
        match &lookup {
            Lookup::Present(known) if known.record.sandbox_id != sandbox.id => {
                Err(Error::Unauthenticated("Unauthorized".into()))
            }
            _ => Ok(lookup),
        }
    }

    /// Stores events, then applies what they report, then enqueues follow-up jobs. Idempotent.
    ///
    /// # Errors
    /// [`Error::Store`]; some of the work may be done, and the agent server resends the events.
    pub async fn ingest_events(
        &self,
        sandbox: &SandboxRecord,
        conversation: Uuid,
        lookup: &Lookup,
        events: Vec<Event>,
    ) -> Result<()> {
        match lookup {
            Lookup::Deleting => Ok(()),
            Lookup::Present(known) => self.ingest(&sandbox.user, conversation, Some(known), events).await,
            Lookup::Absent => self.ingest(&sandbox.user, conversation, None, events).await,
        }
    }

    /// As [`EventIngestor::ingest_events`], for a conversation that is not being deleted.
    pub(super) async fn ingest(
        &self,
        user: &UserId,
        conversation: Uuid,
        known: Option<&StoredConversation>,
        events: Vec<Event>,
    ) -> Result<()> {
        let received = events.len();
        let events: Vec<Event> = events.into_iter().filter(|event| !event.is_transient()).collect();
        let dropped = received - events.len();
        if dropped > 0 {
            tracing::debug!(%conversation, dropped, "event.streamed_tokens_dropped");
        }
        let batch = Batch::of(conversation, &events);
        let last_position = events.iter().map(Event::position).max();
        self.events.append(user, conversation, events).await?;
        self.apply(user, conversation, known, &batch).await?;
        // A conversation without a record may get one. No agent server reports titles by events, and not all report stats.
        let wants_title = batch.has_message && known.is_none_or(StoredConversation::has_default_title);
        let wants_stats =
            batch.may_have_stats && !batch.has_stats_event && known.is_none_or(|known| !known.is_stats_reported);
        if wants_title || wants_stats {
            let job = RefreshConversation { user: user.clone(), conversation, attempt: 0 }.into();
            self.queue.send(&job, FIRST_DELAY).await?;
        }
        let logged = known.is_some_and(|known| known.processors.contains(&EventCallbackProcessor::Logging));
        if logged && last_position.is_some() {
            let job = ProcessEvents { user: user.clone(), conversation, up_to: last_position }.into();
            self.queue.send(&job, process_events::DELAY).await?;
        }
        Ok(())
    }

    /// Applies metrics, model and tags that events report to the record, unless newer reports of them were applied.
    async fn apply(&self, user: &UserId, id: Uuid, known: Option<&StoredConversation>, batch: &Batch) -> Result<()> {
        let conversations = &self.conversations;
        // A message, and the end of a turn, are shown in the order of lists at once.
        let touch = match known {
            Some(known) if !batch.has_message && !batch.has_stopped => Touch::at_intervals(known.record.updated_at),
            _ => Touch::Now,
        };
        let mut writes = Writes::new();
        if let Some(Reported { position, mut value }) = batch.stats.clone() {
            if let Some(known) = known {
                value.keep_current_of(&known.record.metrics);
            }
            let source = batch.stats_source(position);
            writes.push(async move { conversations.set_stats(user, id, &value, &source, touch).await }.boxed());
        }
        if let Some(Reported { position, value }) = batch.model.clone() {
            let source = ReportTime::Event(position);
            writes
                .push(async move { conversations.set_reported_model(user, id, &value, &source, touch).await }.boxed());
        }
        if let Some(Reported { position, value }) = batch.tags.clone() {
            let source = ReportTime::Event(position);
            writes.push(async move { conversations.set_tags(user, id, &value, &source, touch).await }.boxed());
        }
        try_join_all(writes).await.map(|_| ())
    }

    /// Applies a snapshot of the conversation to its record, or creates a stub record from it.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`] when the conversation is in another sandbox; [`Error::Store`].
    pub async fn ingest_report(&self, sandbox: &SandboxRecord, report: &ConversationReport) -> Result<()> {
        let mut lookup = self.lookup(sandbox, report.id).await?;
        if report.execution_status.as_deref() == Some(DELETING) {
            return Ok(());
        }
        if lookup == Lookup::Absent {
            let membership = self.sandboxes.adding(&sandbox.user, &sandbox.id, report.id)?;
            if self.conversations.put_stub(&stub(sandbox, report), &report.version(), membership).await? {
                tracing::info!(conversation = %report.id, sandbox = %sandbox.id, "conversation.found");
                return Ok(());
            }
            // Another request has created a record, or the sandbox is being deleted.
            lookup = self.lookup(sandbox, report.id).await?;
        }
        if !matches!(lookup, Lookup::Present(_)) {
            return Ok(());
        }
        let user = &sandbox.user;
        if let Some(title) = &report.title {
            self.conversations.set_agent_title(user, report.id, title).await?;
        }
        // The last write alone moves the record.
        report.apply(&self.conversations, user, Touch::Keep).await?;
        self.conversations.update(user, report.id, ConversationChange::default()).await?;
        if report.has_halted() {
            backfill::enqueue(&self.events, &self.queue, user, report.id).await?;
        }
        Ok(())
    }
}

fn stub(sandbox: &SandboxRecord, report: &ConversationReport) -> ConversationRecord {
    let now = Time::now();
    let [_, default_title] = default_titles(report.id);
    ConversationRecord {
        user: sandbox.user.clone(),
        id: report.id,
        sandbox_id: sandbox.id.clone(),
        selected_repository: None,
        selected_branch: None,
        git_provider: None,
        title: Some(report.title.clone().unwrap_or(default_title)),
        trigger: None,
        pr_number: Vec::new(),
        llm_model: report.llm_model.clone(),
        metrics: report.stats.clone().map_or_else(MetricsSnapshot::default, AgentStats::into_metrics),
        parent_conversation_id: None,
        public: None,
        tags: report.tags.clone().unwrap_or_default(),
        agent_kind: report.agent_kind.to_owned(),
        acp_server: report.acp_server.clone(),
        launched_agent_profile: report.launched_agent_profile,
        created_at: now,
        updated_at: now,
    }
}
