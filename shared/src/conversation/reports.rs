//! Applies agent servers' reports to conversation records. Each report is a conditional update of only the attributes that it
//! owns, so that concurrent writers do not overwrite each other, and late or duplicate reports are harmless.
//!
//! A conversation that is known only from its agent server's reports gets a *stub*: a record like any other, which the start of
//! the conversation, if there is one, completes with the values of its request.

use std::collections::HashMap;
use std::time::Duration;

use aws_sdk_dynamodb::types::{AttributeValue, TransactWriteItem, Update};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::store::{ALIVE, ConversationStore, item, key, searchable, sort_value};
use super::tags::Tags;
use super::{ConversationRecord, MetricsSnapshot, TokenUsage, within_max_name};
use crate::clock::Time;
use crate::conversation::fields::EventCallbackProcessor;
use crate::dynamo::{Item, from_item, is_condition_failure, store_error, text, transact};
use crate::error::{Error, Result};
use crate::id::{self, UserId};
use crate::user::counters::{self, Counter};

/// The result of looking up a conversation by its id.
#[derive(Clone, Debug, PartialEq)]
pub enum Lookup {
    /// It has no record.
    Absent,
    /// It is being deleted.
    Deleting,
    /// It has a record.
    Present(Box<StoredConversation>),
}

/// A record with its internal attributes.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredConversation {
    /// The record.
    pub record: ConversationRecord,
    /// Whether it was made from a report of its agent server, and no start has completed it.
    pub is_stub: bool,
    /// Whether an event has reported its stats. Agent servers up to 1.15 send no such events.
    pub is_stats_reported: bool,
    /// Whether an event has reported its model.
    pub is_model_reported: bool,
    /// The processors of events that its start requested.
    pub processors: Vec<EventCallbackProcessor>,
    /// The position in its event log up to which events were processed.
    pub processed_to: Option<String>,
}

impl StoredConversation {
    /// Whether neither the user nor the agent has given it a title.
    #[must_use]
    pub fn has_default_title(&self) -> bool {
        self.record.title.as_ref().is_none_or(|title| default_titles(self.record.id).contains(title))
    }
}

/// `Conversation <5 hex>`, as starts name conversations, and `Conversation <32 hex>`, as stubs are named.
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

/// The attributes of a row that name the reports which a value was taken from.
struct Sources {
    /// Holds the position of the newest event that reported the value.
    event: &'static str,
    /// Holds when we received that event.
    received: &'static str,
    /// Holds the `updated_at` of the newest snapshot that reported it.
    snapshot: &'static str,
}

const STATS: Sources = Sources { event: "stats_at", received: "stats_received", snapshot: "snapshot_at" };
const MODEL: Sources = Sources { event: "model_at", received: "model_received", snapshot: "model_snapshot_at" };
const TAGS: Sources = Sources { event: "tags_at", received: "tags_received", snapshot: "tags_snapshot_at" };

/// Events that are received this long after the newest one are newer, whatever their positions say. A position begins with the local
/// time of the sandbox, which may have gone back since: the end of summer time, another zone, a clock that was set. An agent server
/// posts its events in their order, and repeats a batch for less than a minute.
const ORDER_WINDOW: Duration = Duration::from_secs(15 * 60);

/// The sum of what a conversation's models have used so far, including the models of condensers and those that the agent was
/// switched to.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentStats {
    accumulated_cost: f64,
    max_budget_per_task: Option<f64>,
    token_usage: TokenUsage,
    /// Whether budget, context window and tokens of the turn are known: they belong to the agent's current model.
    is_current_known: bool,
}

/// The usage of the agent's model, until the agent is switched to another.
pub const AGENT_USAGE: &str = "agent";
/// The usages of condensers' models end with this.
const CONDENSER_USAGE: &str = "condenser";

impl AgentStats {
    /// Reads `{"usage_to_metrics": {"agent": …, "condenser": …}}`. Missing values count as 0. Returns `None` without any usage.
    /// `context_window`, `per_turn_token` and `max_budget_per_task` are those of the usage `current`, or of `agent` where there is no
    /// such usage. `None` for a report that does not name the current usage: it is `agent` as long as only condensers have another.
    #[must_use]
    pub fn read(stats: &Value, current: Option<&str>) -> Option<Self> {
        let usages = stats.get("usage_to_metrics")?.as_object()?;
        // Within what the store can hold.
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

    /// Keeps what earlier reports say of the agent's current model, where this one does not say which model that is.
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

    /// As a record shows them.
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
    /// [`Error::Store`].
    pub async fn lookup(&self, user: &UserId, id: Uuid) -> Result<Lookup> {
        let found = self
            .dynamodb
            .get_item()
            .table_name(&self.table)
            .set_key(Some(key(user, id)))
            .consistent_read(true)
            .send()
            .await
            .map_err(store_error("GetItem conversations"))?;
        let Some(item) = found.item else { return Ok(Lookup::Absent) };
        if item.contains_key("deleting_since") {
            return Ok(Lookup::Deleting);
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

    /// Adds a stub whose metrics, model and tags are those of a snapshot with this `updated_at`. False when the id is taken.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn put_stub(&self, record: &ConversationRecord, reported_at: &str) -> Result<bool> {
        let at = Some(reported_at.to_owned());
        let internal = InternalAttributes {
            stub: Some(true),
            snapshot_at: at.clone(),
            model_snapshot_at: at.clone(),
            tags_snapshot_at: at,
            ..InternalAttributes::default()
        };
        match transact(&self.dynamodb, self.put_with(record, &internal)?, "TransactWriteItems conversations").await {
            Ok(()) => Ok(true),
            Err(error) if is_condition_failure(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The writes with which a start records its conversation, for a transaction; they fail where the id is taken.
    ///
    /// # Errors
    /// [`Error::Internal`] when the record has no form as an item.
    pub fn put_started(
        &self,
        record: &ConversationRecord,
        processors: &[EventCallbackProcessor],
    ) -> Result<Vec<TransactWriteItem>> {
        self.put_with(record, &InternalAttributes { processors: processors.to_vec(), ..InternalAttributes::default() })
    }

    /// The writes with which a start completes a stub: the record gets the values of the start's request, and keeps what the agent
    /// server has reported meanwhile (metrics, tags, a title, a switch to another model). They fail where the record is no stub any
    /// more, or has another title than when it was read.
    ///
    /// # Errors
    /// [`Error::Internal`] when the record has no form as an item.
    pub fn complete_stub(
        &self,
        stub: &StoredConversation,
        record: &ConversationRecord,
        processors: &[EventCallbackProcessor],
    ) -> Result<Vec<TransactWriteItem>> {
        let mut record = ConversationRecord { created_at: stub.record.created_at, ..record.clone() };
        if !stub.has_default_title()
            && record.title.as_ref().is_some_and(|title| default_titles(record.id).contains(title))
        {
            record.title.clone_from(&stub.record.title);
        }
        let mut set = item(&record)?;
        set.extend(crate::dynamo::to_item(&InternalAttributes {
            processors: processors.to_vec(),
            ..InternalAttributes::default()
        })?);
        for kept in ["user", "id", "metrics", "tags"] {
            set.remove(kept);
        }
        if stub.is_model_reported {
            set.remove("llm_model");
        }
        let mut update = Update::builder().table_name(&self.table).set_key(Some(key(&record.user, record.id)));
        let mut sets = Vec::with_capacity(set.len());
        for (index, (name, value)) in set.into_iter().enumerate() {
            sets.push(format!("#s{index} = :s{index}"));
            update = update
                .expression_attribute_names(format!("#s{index}"), name)
                .expression_attribute_values(format!(":s{index}"), value);
        }
        let mut remove = "stub".to_owned();
        if record.parent_conversation_id.is_some() {
            remove += ", top_level_user";
        }
        let title = match &stub.record.title {
            Some(title) => {
                update = update.expression_attribute_values(":title", text(title));
                "title = :title"
            }
            None => "attribute_not_exists(title)",
        };
        let update = update
            .update_expression(format!("SET {} REMOVE {remove}", sets.join(", ")))
            .condition_expression(format!("{ALIVE} AND stub = :true AND {title}"))
            .expression_attribute_values(":true", AttributeValue::Bool(true))
            .build()
            .map_err(Error::internal)?;
        let mut writes = vec![TransactWriteItem::builder().update(update).build()];
        if record.parent_conversation_id.is_some() {
            // It was counted as one without a parent.
            let changes = [(Counter::TopLevelConversations, -1)];
            writes.push(counters::add(&self.users_table, &record.user, &changes)?);
        }
        Ok(writes)
    }

    /// Sets the title that the agent has found, cut to [`super::MAX_NAME`], unless the conversation has one. Returns whether it did.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn set_agent_title(&self, user: &UserId, id: Uuid, title: &str) -> Result<bool> {
        let [short, long] = default_titles(id);
        let title = within_max_name(title);
        let values = [("short", short), ("long", long), ("title", title.to_owned()), ("search", searchable(title))];
        self.change(
            (user, id),
            "title = :title, title_search = :search",
            "(attribute_not_exists(title) OR title IN (:short, :long))",
            values.map(|(name, value)| (name, text(value))).into(),
        )
        .await
    }

    /// Sets what the models have used so far, unless a newer report was applied. Returns whether it did.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn set_stats(&self, user: &UserId, id: Uuid, stats: &AgentStats, time: &ReportTime) -> Result<bool> {
        let mut set = "#metrics.accumulated_cost = :cost, #metrics.accumulated_token_usage = :usage".to_owned();
        let mut values = HashMap::from([
            ("cost", AttributeValue::N(stats.accumulated_cost.to_string())),
            ("usage", AttributeValue::M(crate::dynamo::to_item(&stats.token_usage)?)),
        ]);
        if let Some(budget) = stats.max_budget_per_task {
            set += ", #metrics.max_budget_per_task = :budget";
            values.insert("budget", AttributeValue::N(budget.to_string()));
        }
        self.change_reported((user, id), &STATS, time, set, values).await
    }

    /// Sets the model that the agent uses, unless a newer report was applied. Returns whether it did.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn set_reported_model(&self, user: &UserId, id: Uuid, model: &str, time: &ReportTime) -> Result<bool> {
        let values = HashMap::from([("model", text(model))]);
        self.change_reported((user, id), &MODEL, time, "llm_model = :model".to_owned(), values).await
    }

    /// Replaces the tags, unless a newer report was applied. Returns whether it did.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn set_tags(&self, user: &UserId, id: Uuid, tags: &Tags, time: &ReportTime) -> Result<bool> {
        let values = HashMap::from([("tags", AttributeValue::M(crate::dynamo::to_item(tags)?))]);
        self.change_reported((user, id), &TAGS, time, "tags = :tags".to_owned(), values).await
    }

    /// Sets a reported value, unless a newer report of it was applied. Returns whether it did.
    async fn change_reported(
        &self,
        record: (&UserId, Uuid),
        Sources { event, received, snapshot }: &Sources,
        time: &ReportTime,
        set: String,
        mut values: HashMap<&str, AttributeValue>,
    ) -> Result<bool> {
        let is_later = format!("{event} < :version OR {received} < :window");
        let (version, set, condition) = match time {
            ReportTime::Event(position) => (
                position,
                format!("{set}, {event} = :version, {received} = :received"),
                format!("(attribute_not_exists({event}) OR {is_later})"),
            ),
            ReportTime::State(position) => (
                position,
                format!("{set}, {event} = :version, {received} = :received"),
                format!("attribute_exists({event}) AND ({is_later})"),
            ),
            ReportTime::Snapshot(updated_at) => (
                updated_at,
                format!("{set}, {snapshot} = :version"),
                format!(
                    "attribute_not_exists({event}) AND (attribute_not_exists({snapshot}) OR {snapshot} <= :version)"
                ),
            ),
        };
        if !matches!(time, ReportTime::Snapshot(_)) {
            let now = Time::now();
            values.insert("received", text(now.sortable()));
            values.insert("window", text(now.minus(ORDER_WINDOW).sortable()));
        }
        values.insert("version", text(version));
        self.change(record, &set, &condition, values).await
    }

    /// Claims the events up to a position in the log for processing, if events were processed up to `from` before. Returns whether it
    /// did; if not, another worker has claimed them.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn move_processed_to(&self, user: &UserId, id: Uuid, from: Option<&str>, to: &str) -> Result<bool> {
        let mut update = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(user, id)))
            .update_expression("SET processed_to = :to")
            .expression_attribute_values(":to", text(to));
        let condition = match from {
            Some(from) => {
                update = update.expression_attribute_values(":from", text(from));
                "processed_to = :from"
            }
            None => "attribute_not_exists(processed_to)",
        };
        let moved = update.condition_expression(format!("{ALIVE} AND {condition}")).send().await;
        whether(moved.map_err(store_error("UpdateItem conversations")))
    }

    /// Changes attributes of a record under a condition, and sets its `updated_at` to now. Returns whether the condition held.
    async fn change(
        &self,
        (user, id): (&UserId, Uuid),
        set: &str,
        condition: &str,
        values: HashMap<&str, AttributeValue>,
    ) -> Result<bool> {
        let now = Time::now();
        let mut update = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(user, id)))
            .update_expression(format!("SET {set}, updated_at = :now, updated_sort = :now_sort"))
            .condition_expression(format!("{ALIVE} AND {condition}"))
            .expression_attribute_values(":now", text(now.sortable()))
            .expression_attribute_values(":now_sort", text(sort_value(now, id)));
        // A reserved word.
        if set.contains("#metrics") {
            update = update.expression_attribute_names("#metrics", "metrics");
        }
        for (name, value) in values {
            update = update.expression_attribute_values(format!(":{name}"), value);
        }
        whether(update.send().await.map_err(store_error("UpdateItem conversations")))
    }

    fn put_with(&self, record: &ConversationRecord, internal: &InternalAttributes) -> Result<Vec<TransactWriteItem>> {
        let mut item: Item = item(record)?;
        item.extend(crate::dynamo::to_item(internal)?);
        let count = self.add_to_counters(&record.user, [record], 1)?;
        Ok(vec![self.put(item)?, count])
    }
}

fn whether<T>(written: Result<T>) -> Result<bool> {
    match written {
        Ok(_) => Ok(true),
        Err(error) if is_condition_failure(&error) => Ok(false),
        Err(error) => Err(error),
    }
}
