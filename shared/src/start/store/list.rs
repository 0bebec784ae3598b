//! Paginated lists and counts of start tasks.

use aws_sdk_dynamodb::operation::query::builders::QueryFluentBuilder;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{BY_CONVERSATION, BY_CREATED, BY_UPDATED, StartTaskStore, key, sort_key};
use crate::clock::Time;
use crate::conversation::search::CLOCK_SKEW;
use crate::dynamo::{Item, from_item, store_error, text};
use crate::error::{Error, Result};
use crate::http::page;
pub use crate::http::sort_order::SortOrder;
use crate::id::{self, UserId};
use crate::paging::{self, Bounds};
use crate::start::task::StartTaskRecord;
use crate::user::counters::{self, Counter};

/// The error for a count that exceeds its time limit.
const TOO_MANY: &str =
    "Too many start tasks to count with this filter. Narrow it with created_at__gte, or read the pages of search";

/// The filter of a list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// Only tasks that made this conversation ready.
    pub conversation_id: Option<Uuid>,
    /// Only tasks that were created at or after this time.
    pub created_at_gte: Option<Time>,
}

/// The pagination cursor: a page starts after this task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// The value of the attribute that the list is sorted by.
    pub sort: String,
    pub id: Uuid,
}

impl StartTaskStore {
    /// Returns a page of the user's tasks, within the bounds of [`crate::paging`], and the cursor of the next page if there is one. It does
    /// not read requests in the bucket.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn list(
        &self,
        user: &UserId,
        filter: &Filter,
        order: SortOrder,
        after: Option<&Cursor>,
        limit: usize,
    ) -> Result<(Vec<StartTaskRecord>, Option<Cursor>)> {
        if let Some(conversation) = filter.conversation_id {
            // Each start of a conversation has a task, so there is rarely more than one.
            return self.list_of_conversation(user, conversation, filter, order, after, limit).await;
        }
        let (index, sort) = index_of(order);
        let start = after.map(|after| {
            let mut start = key(user, after.id);
            start.insert(sort.into(), text(after.sort.clone()));
            start
        });
        let is_filtered = filter.created_at_gte.is_some() && index != BY_CREATED;
        let query = || self.query(user, filter, index).scan_index_forward(order.is_ascending());
        let read = |item| {
            let record: StartTaskRecord = from_item(item)?;
            let size = page::size_of(&record.show())?;
            Ok((record, size))
        };
        let after = |item: &Item| after_key(item, sort);
        paging::page("Query start-tasks", Bounds::of_page(limit), start, is_filtered, query, read, after).await
    }

    /// The cursor of a task in a list.
    #[must_use]
    pub fn place(record: &StartTaskRecord, order: SortOrder) -> Cursor {
        Cursor { sort: sort_value(record, order), id: record.id }
    }

    /// Counts the user's tasks that match the filter. Without a filter the count is one read of a counter.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn count(&self, user: &UserId, filter: &Filter) -> Result<u64> {
        if *filter == Filter::default() {
            return counters::read(&self.users, user, Counter::StartTasks).await;
        }
        if let Some(conversation) = filter.conversation_id {
            let order = SortOrder::CreatedAtDesc;
            return Ok(
                self.list_of_conversation(user, conversation, filter, order, None, usize::MAX).await?.0.len() as u64
            );
        }
        paging::count("Query start-tasks", self.query(user, filter, BY_CREATED), TOO_MANY).await
    }

    /// The query for all tasks of a conversation.
    pub(super) fn query_of_conversation(&self, user: &UserId, conversation: Uuid) -> QueryFluentBuilder {
        self.table
            .query()
            .index_name(BY_CONVERSATION)
            .key_condition_expression("conversation_key = :conversation")
            .expression_attribute_values(":conversation", text(user.key_of(&id::hex(conversation))))
    }

    async fn list_of_conversation(
        &self,
        user: &UserId,
        conversation: Uuid,
        filter: &Filter,
        order: SortOrder,
        after: Option<&Cursor>,
        limit: usize,
    ) -> Result<(Vec<StartTaskRecord>, Option<Cursor>)> {
        let mut items = Vec::new();
        let mut pages = self.query_of_conversation(user, conversation).into_paginator().items().send();
        while let Some(item) = pages.next().await {
            items.push(item.map_err(store_error("Query start-tasks"))?);
        }
        let mut records = items.into_iter().map(from_item).collect::<Result<Vec<StartTaskRecord>>>()?;
        records.retain(|record| filter.created_at_gte.is_none_or(|earliest| record.created_at >= earliest));
        records.sort_by_key(|record| sort_value(record, order));
        if !order.is_ascending() {
            records.reverse();
        }
        if let Some(after) = after {
            records.retain(|record| {
                let value = sort_value(record, order);
                if order.is_ascending() { value > after.sort } else { value < after.sort }
            });
        }
        Ok(cut(records, limit, order))
    }

    pub(super) fn query(&self, user: &UserId, filter: &Filter, index: &str) -> QueryFluentBuilder {
        let query = self
            .table
            .query()
            .index_name(index)
            .expression_attribute_names("#user", "user")
            .expression_attribute_values(":user", text(user.as_str()));
        let Some(earliest) = filter.created_at_gte else { return query.key_condition_expression("#user = :user") };
        if index == BY_CREATED {
            query
                .key_condition_expression("#user = :user AND created_sort >= :earliest")
                .expression_attribute_values(":earliest", text(earliest.sortable()))
        } else {
            // A task is created before it is updated, so rows that were updated earlier are not read.
            query
                .key_condition_expression("#user = :user AND updated_sort >= :updated")
                .filter_expression("created_at >= :earliest")
                .expression_attribute_values(":updated", text(earliest.minus(CLOCK_SKEW).sortable()))
                .expression_attribute_values(":earliest", text(earliest.sortable()))
        }
    }
}

/// The index with this order, and its sort key.
fn index_of(order: SortOrder) -> (&'static str, &'static str) {
    if order.is_by_created() { (BY_CREATED, "created_sort") } else { (BY_UPDATED, "updated_sort") }
}

fn cut(mut records: Vec<StartTaskRecord>, limit: usize, order: SortOrder) -> (Vec<StartTaskRecord>, Option<Cursor>) {
    let more = records.len() > limit;
    records.truncate(limit);
    let next = records.last().filter(|_| more).map(|last| Cursor { sort: sort_value(last, order), id: last.id });
    (records, next)
}

fn sort_value(record: &StartTaskRecord, order: SortOrder) -> String {
    match order {
        SortOrder::CreatedAt | SortOrder::CreatedAtDesc => sort_key(record.created_at, record.id),
        SortOrder::UpdatedAt | SortOrder::UpdatedAtDesc => sort_key(record.now.updated_at, record.id),
    }
}

fn after_key(key: &Item, sort: &str) -> Result<Cursor> {
    let attribute = |name: &str| key.get(name).and_then(|value| value.as_s().ok()).cloned();
    let (Some(sort), Some(Ok(id))) = (attribute(sort), attribute("id").map(|id| Uuid::parse_str(&id))) else {
        return Err(Error::internal("a page's last key is not one of a task"));
    };
    Ok(Cursor { sort, id })
}
