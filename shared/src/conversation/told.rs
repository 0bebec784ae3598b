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
}

/// What an agent has used so far, as its agent server tells it: the agent's own use, without its condenser's.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentStats {
    accumulated_cost: f64,
    max_budget_per_task: Option<f64>,
    token_usage: TokenUsage,
}

impl AgentStats {
    /// Reads `{"usage_to_metrics": {"agent": …}}`; what is not there counts as nothing. `None` without an agent.
    #[must_use]
    pub fn read(stats: &Value) -> Option<Self> {
        let agent = stats.get("usage_to_metrics")?.get("agent").filter(|agent| agent.is_object())?;
        // Within what the store can hold.
        let amount = |name: &str| agent.get(name).and_then(Value::as_f64).filter(|amount| amount.abs() < 1e15);
        let tokens = |name: &str| {
            let usage = agent.get("accumulated_token_usage").and_then(|usage| usage.get(name));
            usage.and_then(Value::as_u64).unwrap_or_default()
        };
        Some(Self {
            accumulated_cost: amount("accumulated_cost").unwrap_or_default(),
            max_budget_per_task: amount("max_budget_per_task"),
            token_usage: TokenUsage {
                prompt_tokens: tokens("prompt_tokens"),
                completion_tokens: tokens("completion_tokens"),
                cache_read_tokens: tokens("cache_read_tokens"),
                cache_write_tokens: tokens("cache_write_tokens"),
                reasoning_tokens: tokens("reasoning_tokens"),
                context_window: tokens("context_window"),
                per_turn_token: tokens("per_turn_token"),
                ..TokenUsage::default()
            },
        })
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

/// When stats were taken, in a form that sorts, and who says so. The two clocks cannot be compared: events have the local
/// time of their sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StatsTime {
    /// The position of the event that told them.
    Event(String),
    /// The `updated_at` of a conversation as a whole. Counts only until the first event tells stats.
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
            processors: beside.processors,
            processed_to: beside.processed_to,
        })))
    }

    /// Adds a stub, with stats of this time. False when the id is taken.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn put_stub(&self, record: &ConversationRecord, snapshot_at: Option<String>) -> Result<bool> {
        let beside = Beside { stub: Some(true), snapshot_at, ..Beside::default() };
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
    /// server told meanwhile (metrics, a title) stays. They fail where the record is no stub any more, or has got another
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
        for kept in ["user", "id", "metrics"] {
            set.remove(kept);
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

    /// Sets what the agent has used so far, unless something newer was told already. Whether it did.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn set_stats(&self, user: &UserId, id: Uuid, stats: &AgentStats, time: &StatsTime) -> Result<bool> {
        let (attribute, condition, time) = match time {
            StatsTime::Event(time) => ("stats_at", "(attribute_not_exists(stats_at) OR stats_at < :at)", time),
            StatsTime::Snapshot(time) => (
                "snapshot_at",
                "attribute_not_exists(stats_at) AND (attribute_not_exists(snapshot_at) OR snapshot_at <= :at)",
                time,
            ),
        };
        let mut set =
            format!("#metrics.accumulated_cost = :cost, #metrics.accumulated_token_usage = :usage, {attribute} = :at");
        let mut values = HashMap::from([
            ("cost", AttributeValue::N(stats.accumulated_cost.to_string())),
            ("usage", AttributeValue::M(crate::dynamo::to_item(&stats.token_usage)?)),
            ("at", text(time)),
        ]);
        if let Some(budget) = stats.max_budget_per_task {
            set += ", #metrics.max_budget_per_task = :budget";
            values.insert("budget", AttributeValue::N(budget.to_string()));
        }
        self.change((user, id), &set, condition, values).await
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
