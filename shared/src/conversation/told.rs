//! What agent servers tell of conversations, written into their records: each thing by a conditional change of its own
//! attributes, so that nobody's change is lost, and so that what comes late or twice does no harm.
//!
//! A conversation that is first heard of from its agent server gets a *stub*: a record as good as any, which a start of this
//! conversation, should there be one, completes with what was asked for.

use std::collections::HashMap;

use aws_sdk_dynamodb::types::{AttributeValue, TransactWriteItem, Update};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::store::{ALIVE, ConversationStore, item, key, searchable, sort_value};
use super::tags::Tags;
use super::{ConversationRecord, MetricsSnapshot, TokenUsage, within_max_name};
use crate::clock::Time;
use crate::dynamo::{Item, from_item, is_condition_failure, store_error, text, transact};
use crate::error::{Error, Result};
use crate::id;
use crate::start::request::EventCallbackProcessor;
use crate::user::UserId;
use crate::user::counters::{self, Counter};

/// What is known of a conversation's id.
#[derive(Clone, Debug, PartialEq)]
pub enum Standing {
    /// Nothing.
    Unknown,
    /// It is being deleted.
    Deleting,
    /// It has a record.
    Known(Box<Known>),
}

/// A record, and what does not show of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Known {
    /// The record.
    pub record: ConversationRecord,
    /// Whether it was made because its agent server told of it, and no start has completed it.
    pub is_stub: bool,
    /// Whether its agent server tells its stats by itself, as newer ones do.
    pub is_told_stats: bool,
    /// Whether an event has reported its model.
    pub is_told_model: bool,
    /// What its start asked to be done on its events.
    pub processors: Vec<EventCallbackProcessor>,
    /// The place in its event log up to which that was done.
    pub processed_to: Option<String>,
}

impl Known {
    /// Whether nobody has given it a title: neither the user nor its agent.
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

/// Attributes beside those of the record.
#[derive(Default, Serialize, Deserialize)]
struct Beside {
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

/// The attributes that hold when something was reported last.
struct Times {
    /// The position of the event that reported it.
    event: &'static str,
    /// Positions of other events that report it.
    other_event: Option<&'static str>,
    /// The instant of whichever event it was.
    instant: &'static str,
    /// The `updated_at` of the conversation as a whole.
    snapshot: &'static str,
}

const STATS: Times =
    Times { event: "stats_at", other_event: Some("state_at"), instant: "stats_time", snapshot: "snapshot_at" };
/// Kept apart, because agent servers up to 1.15 report the whole state now and then, and stats never: those have to be asked for.
const STATS_IN_STATE: Times = Times { event: "state_at", other_event: Some("stats_at"), ..STATS };
const MODEL: Times =
    Times { event: "model_at", other_event: None, instant: "model_time", snapshot: "model_snapshot_at" };
const TAGS: Times = Times { event: "tags_at", other_event: None, instant: "tags_time", snapshot: "tags_snapshot_at" };

/// What a conversation's models have been used for so far: all of them together, those of condensers and those that the agent was
/// switched to included.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentStats {
    accumulated_cost: f64,
    max_budget_per_task: Option<f64>,
    token_usage: TokenUsage,
}

/// The usage of the agent's own model, until it is switched to another.
const AGENT_USAGE: &str = "agent";

impl AgentStats {
    /// Reads `{"usage_to_metrics": {"agent": …, "condenser": …}}`; what is not there counts as nothing. `None` without any usage.
    /// The size of the context, the tokens of the last turn and the budget are those of the usage `current`, or else of `agent`.
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
        let current = current.and_then(|current| usages.get(current)).or_else(|| usages.get(AGENT_USAGE));
        if let Some(current) = current {
            total.context_window = tokens(current, "context_window");
            total.per_turn_token = tokens(current, "per_turn_token");
        }
        let max_budget_per_task = current.and_then(|current| amount(current, "max_budget_per_task"));
        has_usage.then_some(Self { accumulated_cost, max_budget_per_task, token_usage: total })
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

/// When something was reported, in forms that sort, and by what. Reports of events are ordered by position alone, which no clock
/// of ours disturbs. Between an event and a conversation as a whole the instants decide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReportTime {
    /// By an event about this alone.
    Event {
        /// The event's position in the log.
        position: String,
        /// The event's instant in UTC.
        instant: String,
    },
    /// By an event about the whole state of the conversation.
    State {
        /// The event's position in the log.
        position: String,
        /// The event's instant in UTC.
        instant: String,
    },
    /// By the conversation as a whole, with this `updated_at`.
    Snapshot(String),
}

impl ConversationStore {
    /// What is known of an id; reads consistently.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn standing(&self, user: &UserId, id: Uuid) -> Result<Standing> {
        let found = self
            .dynamodb
            .get_item()
            .table_name(&self.table)
            .set_key(Some(key(user, id)))
            .consistent_read(true)
            .send()
            .await
            .map_err(store_error("GetItem conversations"))?;
        let Some(item) = found.item else { return Ok(Standing::Unknown) };
        if item.contains_key("deleting_since") {
            return Ok(Standing::Deleting);
        }
        let beside: Beside = from_item(item.clone())?;
        Ok(Standing::Known(Box::new(Known {
            record: from_item(item)?,
            is_stub: beside.stub.unwrap_or_default(),
            is_told_stats: beside.stats_at.is_some(),
            is_told_model: beside.model_at.is_some(),
            processors: beside.processors,
            processed_to: beside.processed_to,
        })))
    }

    /// Adds a stub whose metrics, model and tags were reported at this time, see [`ReportTime::Snapshot`]. False when the id is taken.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn put_stub(&self, record: &ConversationRecord, reported_at: &str) -> Result<bool> {
        let at = Some(reported_at.to_owned());
        let beside = Beside {
            stub: Some(true),
            snapshot_at: at.clone(),
            model_snapshot_at: at.clone(),
            tags_snapshot_at: at,
            ..Beside::default()
        };
        match transact(&self.dynamodb, self.put_with(record, &beside)?, "TransactWriteItems conversations").await {
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
        self.put_with(record, &Beside { processors: processors.to_vec(), ..Beside::default() })
    }

    /// The writes with which a start completes a stub: what it was asked for becomes the record's, and what the agent
    /// server reported meanwhile (metrics, tags, a title, a switch to another model) stays. They fail where the record is no stub any more, or has got another
    /// title than when it was read.
    ///
    /// # Errors
    /// [`Error::Internal`] when the record has no form as an item.
    pub fn complete_stub(
        &self,
        stub: &Known,
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
        set.extend(crate::dynamo::to_item(&Beside { processors: processors.to_vec(), ..Beside::default() })?);
        for kept in ["user", "id", "metrics", "tags"] {
            set.remove(kept);
        }
        if stub.is_told_model {
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

    /// Sets the title that the agent has found, cut to [`super::MAX_NAME`], unless somebody has given it one. Whether it did.
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

    /// Sets what models have been used for so far, unless something newer was reported. Whether it did.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn set_stats(&self, user: &UserId, id: Uuid, stats: &AgentStats, time: &ReportTime) -> Result<bool> {
        let times = if matches!(time, ReportTime::State { .. }) { STATS_IN_STATE } else { STATS };
        let mut set = "#metrics.accumulated_cost = :cost, #metrics.accumulated_token_usage = :usage".to_owned();
        let mut values = HashMap::from([
            ("cost", AttributeValue::N(stats.accumulated_cost.to_string())),
            ("usage", AttributeValue::M(crate::dynamo::to_item(&stats.token_usage)?)),
        ]);
        if let Some(budget) = stats.max_budget_per_task {
            set += ", #metrics.max_budget_per_task = :budget";
            values.insert("budget", AttributeValue::N(budget.to_string()));
        }
        self.change_reported((user, id), &times, time, set, values).await
    }

    /// Sets the model that the agent uses, unless something newer was reported. Whether it did.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn set_reported_model(&self, user: &UserId, id: Uuid, model: &str, time: &ReportTime) -> Result<bool> {
        let values = HashMap::from([("model", text(model))]);
        self.change_reported((user, id), &MODEL, time, "llm_model = :model".to_owned(), values).await
    }

    /// Replaces the tags, unless something newer was reported. Whether it did.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn set_tags(&self, user: &UserId, id: Uuid, tags: &Tags, time: &ReportTime) -> Result<bool> {
        let values = HashMap::from([("tags", AttributeValue::M(crate::dynamo::to_item(tags)?))]);
        self.change_reported((user, id), &TAGS, time, "tags = :tags".to_owned(), values).await
    }

    /// Changes what was reported at `time`, unless it was reported later, too. Whether it did.
    async fn change_reported(
        &self,
        record: (&UserId, Uuid),
        times: &Times,
        time: &ReportTime,
        set: String,
        mut values: HashMap<&str, AttributeValue>,
    ) -> Result<bool> {
        let Times { event, other_event, instant, snapshot } = times;
        let none_or =
            |attribute: &str, rule: &str| format!("(attribute_not_exists({attribute}) OR {attribute} {rule})");
        let (set, condition) = match time {
            ReportTime::Event { position, instant: at } | ReportTime::State { position, instant: at } => {
                values.extend([("position", text(position)), ("instant", text(at))]);
                let mut conditions = vec![none_or(event, "< :position"), none_or(snapshot, "<= :instant")];
                conditions.extend(other_event.map(|other| none_or(other, "< :position")));
                (format!("{set}, {event} = :position, {instant} = :instant"), conditions.join(" AND "))
            }
            ReportTime::Snapshot(at) => {
                values.insert("at", text(at));
                let conditions = [none_or(snapshot, "<= :at"), none_or(instant, "<= :at")];
                (format!("{set}, {snapshot} = :at"), conditions.join(" AND "))
            }
        };
        self.change(record, &set, &condition, values).await
    }

    /// Notes that the events up to a place in the log are being processed, if they were processed up to `from` before. Whether
    /// they were; if not, somebody else has them.
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

    /// Changes attributes of a living record under a condition, and moves its `updated_at` to now. Whether it held.
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

    fn put_with(&self, record: &ConversationRecord, beside: &Beside) -> Result<Vec<TransactWriteItem>> {
        let mut item: Item = item(record)?;
        item.extend(crate::dynamo::to_item(beside)?);
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
