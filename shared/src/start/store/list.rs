//! Paginated lists and counts of start tasks.

use std::collections::HashMap;

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
use crate::paging::{self, Bounds, Source};
use crate::start::task::StartTaskRecord;
use crate::user::counters::{self, Counter};

/// The name of the reads of lists, for the log.
const OPERATION: &str = "Query start-tasks";

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
        let starts = after.map(|after| {
            let mut start = key(user, after.id);
            start.insert(sort.into(), text(after.sort.clone()));
            vec![start]
        });
        let source = Source {
            queries: vec![self.query(user, filter, index)],
            sort_key: sort,
            is_ascending: order.is_ascending(),
            is_filtered: filter.created_at_gte.is_some() && index != BY_CREATED,
            is_exact: true,
        };
        let fetch = |entries: Vec<Item>| async move {
            let ids: Vec<Uuid> = entries.iter().map(|entry| id_of(entry).unwrap_or_default()).collect();
            self.rows(user, &ids).await
        };
        let size = |record: &StartTaskRecord| page::size_of(&record.show());
        let page = paging::page(OPERATION, Bounds::of_page(limit), source, starts, fetch, size).await?;
        Ok((page.rows, page.next.map(cursor).transpose()?))
    }

    /// The row of each id, if there is one. The read is eventually consistent.
    async fn rows(&self, user: &UserId, ids: &[Uuid]) -> Result<Vec<Option<StartTaskRecord>>> {
        let mut found: HashMap<Uuid, StartTaskRecord> = HashMap::new();
        for item in self.table.batch_get_eventually(ids.iter().map(|id| key(user, *id)).collect()).await? {
            let record: StartTaskRecord = from_item(item)?;
            found.insert(record.id, record);
        }
        Ok(ids.iter().map(|id| found.remove(id)).collect())
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
        paging::count(OPERATION, self.query(user, filter, BY_CREATED), TOO_MANY).await
    }

    /// The ids of all tasks of a conversation.
    pub(super) async fn ids_of_conversation(&self, user: &UserId, conversation: Uuid) -> Result<Vec<Uuid>> {
        let mut entries = self
            .table
            .query()
            .index_name(BY_CONVERSATION)
            .key_condition_expression("conversation_key = :conversation")
            .expression_attribute_values(":conversation", text(user.key_of(&id::hex(conversation))))
            .into_paginator()
            .items()
            .send();
        let mut ids = Vec::new();
        while let Some(entry) = entries.next().await {
            ids.extend(id_of(&entry.map_err(store_error(OPERATION))?));
        }
        Ok(ids)
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
        let ids = self.ids_of_conversation(user, conversation).await?;
        let mut records: Vec<StartTaskRecord> = self.rows(user, &ids).await?.into_iter().flatten().collect();
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

/// The cursor of a task with this sort key.
fn cursor(sort: String) -> Result<Cursor> {
    let id = sort.rsplit_once('#').and_then(|(_, id)| Uuid::try_parse(id).ok());
    let id = id.ok_or_else(|| Error::internal("a page's last key is not one of a task"))?;
    Ok(Cursor { sort, id })
}

fn id_of(entry: &Item) -> Option<Uuid> {
    entry.get("id").and_then(|id| id.as_s().ok()).and_then(|id| Uuid::try_parse(id).ok())
}
