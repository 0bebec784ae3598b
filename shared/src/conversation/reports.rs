//! Applies agent servers' reports to conversation records. Each report is a conditional update of only the attributes that it
//! owns, so that concurrent writers do not overwrite each other, and late or duplicate reports are harmless.
//!
//! A conversation that is known only from its agent server's reports gets a *stub*: a record like any other, which the start of
//! the conversation, if there is one, completes with the values of its request.

use std::time::Duration;

use aws_sdk_dynamodb::types::{AttributeValue, TransactWriteItem};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::store::{
    ConversationStore, SEARCH, changes_of_counters, is_alive, is_expired, item, key, searchable, updated_now,
};
use super::tags::Tags;
use super::{ConversationRecord, MetricsSnapshot, TokenUsage, within_max_name};
use crate::clock::Time;
use crate::conversation::fields::EventCallbackProcessor;
use crate::dynamo::{Condition, Item, Update, from_item, text, to_item, transact};
use crate::error::Result;
use crate::id::{self, UserId};
use crate::user::counters::{self, Counter, SubCounter};

/// How often a stream of reports moves `updated_at`, at most. A move replaces the entry of the index by the time of the last change, and
/// costs more than the report itself.
const TOUCH_INTERVAL: Duration = Duration::from_secs(5);

/// Whether a report sets the `updated_at` of a record to now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    Now,
    /// The record changes, but its place in lists does not.
    Keep,
}

impl Touch {
    /// For a report of a stream: the record is moved if the last move was a while ago.
    #[must_use]
    pub fn at_intervals(updated_at: Time) -> Self {
        if Time::now().since(updated_at) < TOUCH_INTERVAL { Self::Keep } else { Self::Now }
    }
}

/// The result of a conversation lookup by id.
#[derive(Clone, Debug, PartialEq)]
pub enum Lookup {
    /// There is no record.
    Absent,
    /// The conversation is being deleted, or was deleted a short time ago.
    Deleting,
    Present(Box<StoredConversation>),
}

/// A record with its internal attributes.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredConversation {
    pub record: ConversationRecord,
    /// Whether it was created from a report of its agent server, and no start has completed it.
    pub is_stub: bool,
    /// Whether an event has reported its stats. Agent servers up to 1.15 send no such events.
    pub is_stats_reported: bool,
    /// Whether an event has reported its model.
    pub is_model_reported: bool,
    /// The event callback processors that its start requested.
    pub processors: Vec<EventCallbackProcessor>,
    /// The position in its event log up to which events have been processed.
    pub processed_to: Option<String>,
}

impl StoredConversation {
    /// Whether a report has set tags.
    #[must_use]
    pub fn is_tagged(&self) -> bool {
        !self.record.tags.is_empty()
    }

    /// Whether neither the user nor the agent has given it a title.
    #[must_use]
    pub fn has_default_title(&self) -> bool {
        self.record.title.as_ref().is_none_or(|title| default_titles(self.record.id).contains(title))
    }
}

/// The writes that record a conversation, for a transaction that changes the counters as well. They are separate, because a transaction
/// can write each item once, and its other parts may change the same counters.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    pub writes: Vec<TransactWriteItem>,
    /// What the user's counters gain.
    pub counted: Vec<(Counter, i64)>,
}

/// Matches `Conversation <5 hex>`, the default title from starts, and `Conversation <32 hex>`, the default title of stubs.
#[must_use]
pub fn default_titles(id: Uuid) -> [String; 2] {
    let hex = id::hex(id);
    [format!("Conversation {}", &hex[..5]), format!("Conversation {hex}")]
}

/// Attributes of the row that are not part of the record.
#[derive(Default, Serialize, Deserialize)]
struct InternalAttributes {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    stub: Option<bool>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    processors: Vec<EventCallbackProcessor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    processed_to: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    stats_at: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    snapshot_at: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model_at: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model_snapshot_at: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tags_snapshot_at: Option<String>,
}

/// The attributes of a row that record which report a value came from.
struct Sources {
    /// Contains the position of the newest event that reported the value.
    event: &'static str,
    /// Contains the time at which we received that event.
    received: &'static str,
    /// Contains the `updated_at` of the newest snapshot that reported the value.
    snapshot: &'static str,
}

const STATS: Sources = Sources { event: "stats_at", received: "stats_received", snapshot: "snapshot_at" };
const MODEL: Sources = Sources { event: "model_at", received: "model_received", snapshot: "model_snapshot_at" };
const TAGS: Sources = Sources { event: "tags_at", received: "tags_received", snapshot: "tags_snapshot_at" };

/// An event that is received this long after the newest one is newer, whatever their positions. A position begins with the local time of
/// the sandbox, which may have moved back since: at the end of summer time, by a change of the time zone, or because a clock was set. An
/// agent server posts its events in order, and retries a batch for less than a minute.
const ORDER_WINDOW: Duration = Duration::from_secs(15 * 60);

/// The total usage of a conversation's models, including condenser models and models that the agent was switched to.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentStats {
    accumulated_cost: f64,
    max_budget_per_task: Option<f64>,
    token_usage: TokenUsage,
    /// Whether budget, context window and tokens of the turn are known: those values belong to the agent's current model.
    is_current_known: bool,
}

/// The usage id of the agent's model, until the agent is switched to another model.
pub const AGENT_USAGE: &str = "agent";
/// The suffix of the usage ids of condenser models.
const CONDENSER_USAGE: &str = "condenser";

impl AgentStats {
    /// Reads `{"usage_to_metrics": {"agent": …, "condenser": …}}`. Missing values count as 0. Returns `None` without any usage.
    /// `context_window`, `per_turn_token` and `max_budget_per_task` are those of the usage `current`, or of `agent` if there is no such
    /// usage. Pass `None` for a report that does not name the current usage: it is `agent` as long as only condensers have another usage.
    #[must_use]
    pub fn read(stats: &Value, current: Option<&str>) -> Option<Self> {
        let usages = stats.get("usage_to_metrics")?.as_object()?;
        // Limits the amount to what the store can hold.
        let amount =
            |usage: &Value, name: &str| usage.get(name).and_then(Value::as_f64).filter(|amount| amount.abs() < 1e15);
        let tokens = |usage: &Value, name: &str| {
            let tokens = usage.get("accumulated_token_usage").and_then(|usage| usage.get(name));
            tokens.and_then(Value::as_u64).unwrap_or_default()
        };
        let (mut accumulated_cost, mut total) = (0.0, TokenUsage::default());
        let mut has_usage = false;
        for usage in usages.values().filter(|usage| usage.is_object()) {
            has_usage = true;
            accumulated_cost += amount(usage, "accumulated_cost").unwrap_or_default();
            for (sum, name) in [
                (&mut total.prompt_tokens, "prompt_tokens"),
                (&mut total.completion_tokens, "completion_tokens"),
                (&mut total.cache_read_tokens, "cache_read_tokens"),
                (&mut total.cache_write_tokens, "cache_write_tokens"),
                (&mut total.reasoning_tokens, "reasoning_tokens"),
            ] {
                *sum = sum.saturating_add(tokens(usage, name));
            }
        }
        let is_current_known =
            current.is_some() || usages.keys().all(|usage| usage == AGENT_USAGE || usage.ends_with(CONDENSER_USAGE));
        let named = current.and_then(|current| usages.get(current));
        let current = named.or_else(|| usages.get(AGENT_USAGE)).filter(|_| is_current_known);
        if let Some(current) = current {
            total.context_window = tokens(current, "context_window");
            total.per_turn_token = tokens(current, "per_turn_token");
        }
        let max_budget_per_task = current.and_then(|current| amount(current, "max_budget_per_task"));
        has_usage.then_some(Self { accumulated_cost, max_budget_per_task, token_usage: total, is_current_known })
    }

    /// Keeps the earlier values of the agent's current model if this report does not name the current model.
    pub fn keep_current_of(&mut self, earlier: &MetricsSnapshot) {
        if let Some(usage) = earlier.accumulated_token_usage.as_ref().filter(|_| !self.is_current_known) {
            self.token_usage.context_window = usage.context_window;
            self.token_usage.per_turn_token = usage.per_turn_token;
        }
    }

    /// Whether any model was used.
    #[must_use]
    pub fn has_usage(&self) -> bool {
        let TokenUsage { prompt_tokens, completion_tokens, .. } = self.token_usage;
        self.accumulated_cost > 0.0 || prompt_tokens > 0 || completion_tokens > 0
    }

    /// Converts the usage to the form of a record.
    #[must_use]
    pub fn into_metrics(self) -> MetricsSnapshot {
        MetricsSnapshot {
            accumulated_cost: self.accumulated_cost,
            max_budget_per_task: self.max_budget_per_task,
            accumulated_token_usage: Some(self.token_usage),
            ..MetricsSnapshot::default()
        }
    }
}

/// The source of a reported value, with its version in a form that sorts. Versions of events and of snapshots are never compared
/// with each other: events have the local time of their sandbox without a zone, snapshots have UTC. Once an event has reported a
/// value, snapshots of it are ignored, because an agent server whose events report the value reports each change of it by an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReportTime {
    /// An event at this position of the log.
    Event(String),
    /// An event about the state as a whole, at this position. Its stats count only after an event about stats alone: agent servers
    /// up to 1.15 report the state when they load or pause a conversation, and never stats alone, so that their stats are polled.
    State(String),
    /// A snapshot of the whole conversation with this `updated_at`.
    Snapshot(String),
}

impl ConversationStore {
    /// Looks up a conversation with a strongly consistent read.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn lookup(&self, user: &UserId, id: Uuid) -> Result<Lookup> {
        let Some(item) = self.table.get(key(user, id)).await? else { return Ok(Lookup::Absent) };
        if item.contains_key("deleting_since") {
            return Ok(if is_expired(&item) { Lookup::Absent } else { Lookup::Deleting });
        }
        let internal: InternalAttributes = from_item(item.clone())?;
        Ok(Lookup::Present(Box::new(StoredConversation {
            record: from_item(item)?,
            is_stub: internal.stub.unwrap_or_default(),
            is_stats_reported: internal.stats_at.is_some(),
            is_model_reported: internal.model_at.is_some(),
            processors: internal.processors,
            processed_to: internal.processed_to,
        })))
    }

    /// Adds a stub whose metrics, model and tags are those of a snapshot with this `updated_at`, together with `membership`, the write by
    /// which it becomes a member of its sandbox. False when the id exists already, or the sandbox is being deleted.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn put_stub(
        &self,
        record: &ConversationRecord,
        reported_at: &str,
        membership: TransactWriteItem,
    ) -> Result<bool> {
        let at = Some(reported_at.to_owned());
        let internal = InternalAttributes {
            stub: Some(true),
            snapshot_at: at.clone(),
            model_snapshot_at: at.clone(),
            tags_snapshot_at: at,
            ..InternalAttributes::default()
        };
        let Recorded { mut writes, counted } = self.put_with(record, &internal)?;
        writes.push(counters::add(&self.users, &record.user, SubCounter::of(record.id), &counted)?);
        writes.push(membership);
        Ok(transact(&self.table.client, writes, "TransactWriteItems conversations").await?.is_written())
    }

    /// The writes with which a start records its conversation, for a transaction; they fail when the id exists already.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when the record has no form as an item.
    pub fn put_started(&self, record: &ConversationRecord, processors: &[EventCallbackProcessor]) -> Result<Recorded> {
        self.put_with(record, &InternalAttributes { processors: processors.to_vec(), ..InternalAttributes::default() })
    }

    /// The writes with which a start completes a stub: the record gets the values of the start's request, and keeps what the agent
    /// server has reported meanwhile (metrics, tags, a title, a switch to another model). They fail where the record is no stub any
    /// more, or has another title than when it was read.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when the record has no form as an item.
    pub fn complete_stub(
        &self,
        stub: &StoredConversation,
        record: &ConversationRecord,
        processors: &[EventCallbackProcessor],
    ) -> Result<Recorded> {
        let mut record = ConversationRecord { created_at: stub.record.created_at, ..record.clone() };
        if !stub.has_default_title()
            && record.title.as_ref().is_some_and(|title| default_titles(record.id).contains(title))
        {
            record.title.clone_from(&stub.record.title);
        }
        let mut set = item(&record)?;
        set.extend(to_item(&InternalAttributes { processors: processors.to_vec(), ..InternalAttributes::default() })?);
        for kept in ["user", "id", "metrics"] {
            set.remove(kept);
        }
        // An agent server that knows tags has those of the start, and may have reported newer ones. 1.15 does not know them.
        let sets_tags = !stub.is_tagged() && !record.tags.is_empty();
        if !sets_tags {
            set.remove("tags");
        }
        if stub.is_model_reported {
            set.remove("llm_model");
        }
        let mut update = Update::new()
            .set_all(set)
            .remove("stub")
            .condition(is_alive())
            .condition(Condition::equal("stub", AttributeValue::Bool(true)))
            .condition(Condition::unchanged("title", stub.record.title.as_ref().map(text)));
        if sets_tags {
            let no_tags = AttributeValue::M(Item::new());
            update =
                update.condition(Condition::Any(vec![Condition::Missing("tags"), Condition::equal("tags", no_tags)]));
        }
        let writes = vec![update.in_transaction(&self.table.name, key(&record.user, record.id))?];
        // The stub was counted as a top-level conversation.
        let is_child = record.parent_conversation_id.is_some();
        let counted = if is_child { vec![(Counter::TopLevelConversations, -1)] } else { Vec::new() };
        Ok(Recorded { writes, counted })
    }

    /// Sets the title that the agent server generated, truncated to [`super::MAX_NAME`], unless the conversation has a title. Returns
    /// whether it was set.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_agent_title(&self, user: &UserId, id: Uuid, title: &str) -> Result<bool> {
        let title = within_max_name(title);
        let update =
            Update::new().set("title", text(title)).set(SEARCH, text(searchable(title))).condition(Condition::Any(
                vec![Condition::Missing("title"), Condition::In("title", default_titles(id).map(text).into())],
            ));
        self.apply_report((user, id), update, Touch::Now).await
    }

    /// Sets the usage of the models, unless a newer report was applied. Returns whether it was set.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_stats(
        &self,
        user: &UserId,
        id: Uuid,
        stats: &AgentStats,
        time: &ReportTime,
        touch: Touch,
    ) -> Result<bool> {
        let mut update = Update::new()
            .set("metrics.accumulated_cost", AttributeValue::N(stats.accumulated_cost.to_string()))
            .set("metrics.accumulated_token_usage", AttributeValue::M(to_item(&stats.token_usage)?));
        if let Some(budget) = stats.max_budget_per_task {
            update = update.set("metrics.max_budget_per_task", AttributeValue::N(budget.to_string()));
        }
        self.apply_versioned((user, id), &STATS, time, update, touch).await
    }

    /// Sets the model of the agent, unless a newer report was applied. Returns whether it was set.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_reported_model(
        &self,
        user: &UserId,
        id: Uuid,
        model: &str,
        time: &ReportTime,
        touch: Touch,
    ) -> Result<bool> {
        self.apply_versioned((user, id), &MODEL, time, Update::new().set("llm_model", text(model)), touch).await
    }

    /// Replaces the tags, unless a newer report was applied. Returns whether they were replaced.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_tags(
        &self,
        user: &UserId,
        id: Uuid,
        tags: &Tags,
        time: &ReportTime,
        touch: Touch,
    ) -> Result<bool> {
        let update = Update::new().set("tags", AttributeValue::M(to_item(tags)?));
        self.apply_versioned((user, id), &TAGS, time, update, touch).await
    }

    /// Sets a reported value, unless a newer report of it was applied. Returns whether it was set.
    async fn apply_versioned(
        &self,
        record: (&UserId, Uuid),
        Sources { event, received, snapshot }: &Sources,
        time: &ReportTime,
        update: Update,
        touch: Touch,
    ) -> Result<bool> {
        let now = Time::now();
        let is_later = |position: &str| {
            vec![
                Condition::Compare(event, "<", text(position)),
                Condition::Compare(received, "<", text(now.minus(ORDER_WINDOW).sortable())),
            ]
        };
        let from_event = |position: &str| update.clone().set(event, text(position)).set(received, text(now.sortable()));
        let update = match time {
            ReportTime::Event(position) => {
                let mut is_first_or_later = is_later(position);
                is_first_or_later.insert(0, Condition::Missing(event));
                from_event(position).condition(Condition::Any(is_first_or_later))
            }
            ReportTime::State(position) => {
                from_event(position).condition(Condition::Exists(event)).condition(Condition::Any(is_later(position)))
            }
            ReportTime::Snapshot(updated_at) => {
                update.clone().set(snapshot, text(updated_at)).condition(Condition::Missing(event)).condition(
                    Condition::Any(vec![
                        Condition::Missing(snapshot),
                        Condition::Compare(snapshot, "<=", text(updated_at)),
                    ]),
                )
            }
        };
        self.apply_report(record, update, touch).await
    }

    /// Claims the events up to a position in the log for processing, if events were processed up to `from` before. Returns whether the
    /// claim succeeded; if not, another worker has claimed them.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn move_processed_to(&self, user: &UserId, id: Uuid, from: Option<&str>, to: &str) -> Result<bool> {
        // A retry of this call, after its response was lost, recognises its own claim.
        let claim = text(id::random_base62(16));
        let update = Update::new()
            .set("processed_to", text(to))
            .set("processed_claim", claim.clone())
            .condition(is_alive())
            .condition(Condition::Any(vec![
                Condition::unchanged("processed_to", from.map(text)),
                Condition::equal("processed_claim", claim),
            ]));
        self.table.apply(key(user, id), update).await
    }

    /// Updates a record under the update's conditions. Returns whether the conditions held.
    async fn apply_report(&self, (user, id): (&UserId, Uuid), update: Update, touch: Touch) -> Result<bool> {
        let update = match touch {
            Touch::Now => updated_now(update, id),
            Touch::Keep => update,
        };
        self.table.apply(key(user, id), update.condition(is_alive())).await
    }

    fn put_with(&self, record: &ConversationRecord, internal: &InternalAttributes) -> Result<Recorded> {
        let mut item: Item = item(record)?;
        item.extend(to_item(internal)?);
        Ok(Recorded { writes: vec![self.put(item)?], counted: changes_of_counters([record], 1).into() })
    }
}
