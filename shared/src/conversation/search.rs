//! Search and count of conversations: the filters, the indexes that serve them, pagination, and the cost limits of a request.
//!
//! A page without filters reads the rows that it returns and one more. The bounds of the sort attribute and the sandbox are key conditions,
//! so rows outside them are not read. The other filters are applied to rows as they are read, within the bounds of [`crate::paging`]: a
//! page may be short or empty, and its `next_page_id` continues from there.

use std::collections::HashMap;
use std::time::Duration;

use aws_sdk_dynamodb::operation::query::builders::QueryFluentBuilder;
use aws_sdk_dynamodb::types::AttributeValue;
use serde::{Deserialize, Serialize};

use super::store::{
    ALL_BY_CREATED, ALL_BY_UPDATED, BY_SANDBOX, ConversationStore, TOP_LEVEL_BY_CREATED, TOP_LEVEL_BY_UPDATED,
    id_in_sort_value, key, searchable, sort_value,
};
use super::{AppConversation, ConversationRecord};
use crate::clock::Time;
use crate::dynamo::{Item, from_item, text};
use crate::error::{Error, Result};
pub use crate::http::sort_order::SortOrder;
use crate::http::{page, page_token};
use crate::id::UserId;
use crate::paging::{self, Bounds};
use crate::user::counters::{self, Counter};

/// The error for a count that would read too many rows.
const TOO_MANY: &str = "Too many conversations to count with these filters. Narrow them with created_at__gte and created_at__lt, or read the pages of search";

/// The most bytes that the live status adds to a conversation: its URL, its session key and its statuses.
const LIVE_STATUS_SIZE: u64 = 2048;

/// The longest partition key that DynamoDB accepts, in bytes.
const LONGEST_KEY: usize = 2048;

/// How much earlier than its creation a row may have been updated, because two machines with different clocks wrote the times.
pub(crate) const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// The filters of a list or a count.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// The title contains this text; ASCII letters match in either case. An empty text matches every conversation with a title.
    pub title_contains: Option<String>,
    /// Created at or after this instant.
    pub created_at_gte: Option<Time>,
    /// Created before this instant.
    pub created_at_lt: Option<Time>,
    /// Last changed at or after this instant.
    pub updated_at_gte: Option<Time>,
    /// Last changed before this instant.
    pub updated_at_lt: Option<Time>,
    /// In this sandbox.
    pub sandbox_id: Option<String>,
    /// Whether conversations with a parent are included.
    pub include_sub_conversations: bool,
}

/// The cursor of a page: it starts after the row with this value of the sort attribute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cursor(String);

impl Cursor {
    /// The cursor of a conversation.
    #[must_use]
    pub fn of(conversation: &AppConversation, order: SortOrder) -> Self {
        let at = if order.is_by_created() { conversation.created_at } else { conversation.updated_at };
        Self(sort_value(at, conversation.id))
    }
}

/// A page of records.
#[derive(Clone, Debug)]
pub struct Page {
    /// The records. They may be empty even if there is a next page.
    pub records: Vec<ConversationRecord>,
    /// The cursor of the next page, if there is one.
    pub next: Option<Cursor>,
}

/// The query: its index, the range of its keys, and the filter conditions on its rows.
struct QueryPlan {
    index: &'static str,
    partition: &'static str,
    owner: String,
    sort: &'static str,
    low: Option<String>,
    high: Option<String>,
    conditions: Vec<&'static str>,
    values: HashMap<String, AttributeValue>,
}

impl Filter {
    /// Whether the filter excludes nothing, except possibly sub-conversations.
    fn is_unfiltered(&self) -> bool {
        let open = Self { include_sub_conversations: self.include_sub_conversations, ..Self::default() };
        *self == open
    }

    /// The order in which counting reads the fewest rows.
    fn order_for_counting(&self) -> SortOrder {
        let created = self.created_at_gte.is_some() || self.created_at_lt.is_some() || self.sandbox_id.is_some();
        let updated = self.updated_at_gte.is_some() || self.updated_at_lt.is_some();
        if updated && !created { SortOrder::UpdatedAtDesc } else { SortOrder::CreatedAtDesc }
    }

    fn plan(&self, user: &UserId, order: SortOrder) -> QueryPlan {
        let mut conditions = Vec::new();
        let mut values = HashMap::new();
        let mut ask = |condition, name: &str, value: String| {
            conditions.push(condition);
            values.insert(name.to_owned(), text(value));
        };
        let sandbox = self.sandbox_id.as_deref().map(|sandbox| user.key_of(sandbox));
        let whole = || user.as_str().to_owned();
        let (index, partition, owner) = match (order.is_by_created(), self.include_sub_conversations, &sandbox) {
            (true, _, Some(sandbox)) => (BY_SANDBOX, "sandbox_key", sandbox.clone()),
            (true, true, None) => (ALL_BY_CREATED, "user", whole()),
            (true, false, None) => (TOP_LEVEL_BY_CREATED, "top_level_user", whole()),
            (false, true, _) => (ALL_BY_UPDATED, "user", whole()),
            (false, false, _) => (TOP_LEVEL_BY_UPDATED, "top_level_user", whole()),
        };
        if let Some(sandbox) = sandbox
            && index != BY_SANDBOX
        {
            ask("sandbox_key = :sandbox", ":sandbox", sandbox);
        }
        let created = (self.created_at_gte, self.created_at_lt);
        let updated = (self.updated_at_gte, self.updated_at_lt);
        // A row is created before it is updated, so a bound of one time is a bound of the other, too, and fewer rows are read.
        let (sort, (low, high), (from, before)) = if order.is_by_created() {
            let created_before = self.updated_at_lt.map(|time| time.plus(CLOCK_SKEW));
            let high = created.1.into_iter().chain(created_before).min();
            ("created_sort", (created.0, high), updated)
        } else {
            let updated_from = self.created_at_gte.map(|time| time.minus(CLOCK_SKEW));
            let low = updated.0.into_iter().chain(updated_from).max();
            ("updated_sort", (low, updated.1), created)
        };
        // A row's value is the instant, a `#` and its id, so it never equals an instant.
        let sortable = |time: Option<Time>| time.map(Time::sortable);
        let (low, high, from, before) = (sortable(low), sortable(high), sortable(from), sortable(before));
        let (from_condition, before_condition) = if order.is_by_created() {
            ("updated_sort >= :from", "updated_sort < :before")
        } else {
            ("created_sort >= :from", "created_sort < :before")
        };
        if let Some(from) = from {
            ask(from_condition, ":from", from);
        }
        if let Some(before) = before {
            ask(before_condition, ":before", before);
        }
        match self.title_contains.as_deref() {
            Some("") => conditions.push("attribute_exists(title_search)"),
            Some(part) => {
                conditions.push("contains(title_search, :title)");
                values.insert(":title".to_owned(), text(searchable(part)));
            }
            None => {}
        }
        if index == BY_SANDBOX && !self.include_sub_conversations {
            conditions.push("attribute_exists(top_level_user)");
        }
        QueryPlan { index, partition, owner, sort, low, high, conditions, values }
    }
}

impl QueryPlan {
    /// Whether no row can match, because the range is empty or the key is too long. DynamoDB refuses such a query.
    fn is_empty(&self) -> bool {
        self.owner.len() > LONGEST_KEY || matches!((&self.low, &self.high), (Some(low), Some(high)) if low >= high)
    }

    fn query(&self, store: &ConversationStore) -> QueryFluentBuilder {
        // Below and above every text that begins a time.
        let low = self.low.clone().unwrap_or_else(|| "!".to_owned());
        let high = self.high.clone().unwrap_or_else(|| "~".to_owned());
        let ranged = self.low.is_some() || self.high.is_some();
        let mut query = store
            .table
            .query()
            .index_name(self.index)
            .expression_attribute_names("#owner", self.partition)
            .expression_attribute_values(":owner", text(self.owner.clone()));
        query = if ranged {
            query
                .key_condition_expression("#owner = :owner AND #sort BETWEEN :low AND :high")
                .expression_attribute_names("#sort", self.sort)
                .expression_attribute_values(":low", text(low))
                .expression_attribute_values(":high", text(high))
        } else {
            query.key_condition_expression("#owner = :owner")
        };
        if !self.conditions.is_empty() {
            query = query.filter_expression(self.conditions.join(" AND "));
            for (name, value) in &self.values {
                query = query.expression_attribute_values(name, value.clone());
            }
        }
        query
    }

    /// The exclusive start key of a page.
    fn start(&self, user: &UserId, after: &Cursor) -> Result<Item> {
        let id = id_in_sort_value(&after.0).ok_or_else(page_token::invalid)?;
        let below = self.low.as_ref().is_some_and(|low| after.0 < *low);
        let above = self.high.as_ref().is_some_and(|high| after.0 > *high);
        if below || above {
            return Err(page_token::invalid());
        }
        let mut start = key(user, id);
        start.insert(self.partition.to_owned(), text(self.owner.clone()));
        start.insert(self.sort.to_owned(), text(after.0.clone()));
        Ok(start)
    }

    fn after(&self, item: &Item) -> Result<Cursor> {
        let value = item.get(self.sort).and_then(|value| value.as_s().ok());
        value
            .cloned()
            .map(Cursor)
            .ok_or_else(|| Error::internal(format!("a row of {} is without {}", self.index, self.sort)))
    }
}

impl ConversationStore {
    /// Returns a page of the user's conversations.
    ///
    /// # Errors
    /// [`Error::Store`]; [`Error::Refused`] when `after` is not a cursor of this list.
    pub async fn search(
        &self,
        user: &UserId,
        filter: &Filter,
        order: SortOrder,
        after: Option<&Cursor>,
        limit: usize,
    ) -> Result<Page> {
        let plan = filter.plan(user, order);
        let start = after.map(|after| plan.start(user, after)).transpose()?;
        if plan.is_empty() {
            return Ok(Page { records: Vec::new(), next: None });
        }
        let query = || plan.query(self).scan_index_forward(order.is_ascending());
        let read = |item| {
            let record: ConversationRecord = from_item(item)?;
            let size = page::size_of(&AppConversation::without_sandbox(record.clone()))? + LIVE_STATUS_SIZE;
            Ok((record, size))
        };
        let is_filtered = !plan.conditions.is_empty();
        let bounds = Bounds::of_page(limit);
        let (records, next) =
            paging::page("Query conversations", bounds, start, is_filtered, query, read, |item| plan.after(item))
                .await?;
        Ok(Page { records, next })
    }

    /// Counts the user's conversations that match the filter. Without filters it reads one counter item; otherwise it reads all rows in the
    /// filter's key range.
    ///
    /// # Errors
    /// [`Error::Store`]; [`Error::Refused`] when there are too many rows to read in one request.
    pub async fn count(&self, user: &UserId, filter: &Filter) -> Result<u64> {
        if filter.is_unfiltered() {
            let counter = match filter.include_sub_conversations {
                true => Counter::Conversations,
                false => Counter::TopLevelConversations,
            };
            return counters::read(&self.users, user, counter).await;
        }
        let plan = filter.plan(user, filter.order_for_counting());
        if plan.is_empty() {
            return Ok(0);
        }
        paging::count("Query conversations", plan.query(self), TOO_MANY).await
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn time(text: &str) -> Time {
        serde_json::from_value(text.into()).expect("a time")
    }

    #[test]
    fn filters_are_conditions_on_keys_where_an_index_has_them() {
        let user = UserId::new("u");
        let filter = Filter {
            title_contains: Some("A_b".into()),
            created_at_gte: Some(time("2025-01-01T00:00:00Z")),
            updated_at_lt: Some(time("2025-01-02T00:00:00Z")),
            ..Filter::default()
        };
        let by_created = filter.plan(&user, SortOrder::CreatedAt);
        assert_eq!((by_created.index, by_created.sort), (TOP_LEVEL_BY_CREATED, "created_sort"));
        assert_eq!(by_created.low.as_deref(), Some("2025-01-01T00:00:00.000000Z"));
        assert_eq!(by_created.high.as_deref(), Some("2025-01-02T00:01:00.000000Z"), "none is created after its update");
        assert_eq!(by_created.conditions, ["updated_sort < :before", "contains(title_search, :title)"]);
        assert_eq!(by_created.values[":title"], text("a_b"));
        let by_updated = filter.plan(&user, SortOrder::UpdatedAtDesc);
        assert_eq!((by_updated.index, by_updated.sort), (TOP_LEVEL_BY_UPDATED, "updated_sort"));
        assert_eq!(
            by_updated.low.as_deref(),
            Some("2024-12-31T23:59:00.000000Z"),
            "none is updated before its creation"
        );
        assert_eq!(by_updated.high.as_deref(), Some("2025-01-02T00:00:00.000000Z"));
        assert_eq!(by_updated.conditions, ["created_sort >= :from", "contains(title_search, :title)"]);
        let in_sandbox = Filter { sandbox_id: Some("s".into()), ..Filter::default() };
        let plan = in_sandbox.plan(&user, SortOrder::CreatedAtDesc);
        assert_eq!((plan.index, plan.owner.as_str()), (BY_SANDBOX, "1:u#s"));
        assert_eq!(plan.conditions, ["attribute_exists(top_level_user)"]);
    }

    #[test]
    fn a_range_that_holds_nothing_is_not_asked_for() {
        let filter = Filter {
            created_at_gte: Some(time("2025-01-02T00:00:00Z")),
            created_at_lt: Some(time("2025-01-01T00:00:00Z")),
            ..Filter::default()
        };
        assert!(filter.plan(&UserId::new("u"), SortOrder::CreatedAt).is_empty());
        let filter = Filter { sandbox_id: Some("x".repeat(2048)), ..Filter::default() };
        assert!(filter.plan(&UserId::new("u"), SortOrder::CreatedAt).is_empty());
    }

    #[test]
    fn only_places_in_the_list_can_be_started_from() {
        let filter = Filter { created_at_gte: Some(time("2025-01-02T00:00:00Z")), ..Filter::default() };
        let plan = filter.plan(&UserId::new("u"), SortOrder::CreatedAt);
        let row = |time: &str| Cursor(format!("{time}#{}", Uuid::from_u128(1).simple()));
        assert!(plan.start(&UserId::new("u"), &row("2025-01-02T00:00:00.000000Z")).is_ok());
        for after in [row("2025-01-01T00:00:00.000000Z"), Cursor(String::new()), Cursor("2025#x".into())] {
            assert!(matches!(plan.start(&UserId::new("u"), &after), Err(Error::Refused(_))), "{after:?}");
        }
    }
}
