//! The store of conversation records. Every key starts with the owner.

use std::collections::HashMap;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{AttributeValue, Put, Select, TransactWriteItem, Update};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::ConversationRecord;
use crate::clock::Time;
use crate::dynamo::{
    BATCH_GET_LIMIT, Item, batch_get_items, from_item, is_condition_failure, number, store_error, text, to_item,
};
use crate::error::{Error, Result};
use crate::id;
use crate::user::UserId;

/// Index: all of a user's conversations by creation.
pub const ALL_BY_CREATED: &str = "all-by-created";
/// Index: a user's conversations without a parent, by creation. Sparse: others have no `top_level_user`.
pub const TOP_LEVEL_BY_CREATED: &str = "top-level-by-created";
/// Index: the conversations of a sandbox.
pub const BY_SANDBOX: &str = "by-sandbox";
/// Index: the sub-conversations of a conversation.
pub const BY_PARENT: &str = "by-parent";

/// The `users` record that holds counts of the user's rows.
const COUNTERS: &str = "counters";

/// Where in a list a page starts: behind this row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct After {
    /// The row's `created_sort`.
    pub created_sort: String,
    /// The row's id.
    pub id: Uuid,
}

/// A page of records.
#[derive(Clone, Debug)]
pub struct Page {
    /// The records.
    pub records: Vec<ConversationRecord>,
    /// Where the next page starts, if there is one.
    pub next: Option<After>,
}

/// The records of all conversations.
#[derive(Clone, Debug)]
pub struct ConversationStore {
    dynamodb: Client,
    table: String,
    users_table: String,
}

impl ConversationStore {
    /// A store on the `conversations` table, with its counters in `users`.
    #[must_use]
    pub fn new(dynamodb: Client, table: String, users_table: String) -> Self {
        Self { dynamodb, table, users_table }
    }

    /// Records in the order of the ids, `None` for those that the user does not have.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn batch_get(&self, user: &UserId, ids: &[Uuid]) -> Result<Vec<Option<ConversationRecord>>> {
        let mut found: HashMap<Uuid, ConversationRecord> = HashMap::new();
        let mut wanted = ids.to_vec();
        wanted.sort_unstable();
        wanted.dedup();
        for chunk in wanted.chunks(BATCH_GET_LIMIT) {
            let keys = chunk.iter().map(|id| key(user, *id)).collect();
            for item in batch_get_items(&self.dynamodb, &self.table, keys, "BatchGetItem conversations").await? {
                let record: ConversationRecord = from_item(item)?;
                found.insert(record.id, record);
            }
        }
        Ok(ids.iter().map(|id| found.get(id).cloned()).collect())
    }

    /// One record.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn get(&self, user: &UserId, id: Uuid) -> Result<Option<ConversationRecord>> {
        Ok(self.batch_get(user, &[id]).await?.pop().flatten())
    }

    /// A page of the user's conversations, newest first.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn list(
        &self,
        user: &UserId,
        include_sub_conversations: bool,
        after: Option<&After>,
        limit: usize,
    ) -> Result<Page> {
        let (index, owner) =
            if include_sub_conversations { (ALL_BY_CREATED, "user") } else { (TOP_LEVEL_BY_CREATED, "top_level_user") };
        let start = after.map(|after| {
            let mut start = key(user, after.id);
            start.insert(owner.into(), text(user.as_str()));
            start.insert("created_sort".into(), text(after.created_sort.clone()));
            start
        });
        let answer = self
            .dynamodb
            .query()
            .table_name(&self.table)
            .index_name(index)
            .key_condition_expression("#owner = :owner")
            .expression_attribute_names("#owner", owner)
            .expression_attribute_values(":owner", text(user.as_str()))
            .scan_index_forward(false)
            .limit(i32::try_from(limit).unwrap_or(i32::MAX))
            .set_exclusive_start_key(start)
            .send()
            .await
            .map_err(store_error("Query conversations"))?;
        let records: Vec<ConversationRecord> =
            answer.items.unwrap_or_default().into_iter().map(from_item).collect::<Result<_>>()?;
        let next = match (answer.last_evaluated_key, records.last()) {
            (Some(_), Some(last)) => Some(After { created_sort: created_sort(last), id: last.id }),
            _ => None,
        };
        Ok(Page { records, next })
    }

    /// How many conversations the sandbox has.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn count_in_sandbox(&self, user: &UserId, sandbox_id: &str) -> Result<usize> {
        let mut pages = self
            .dynamodb
            .query()
            .table_name(&self.table)
            .index_name(BY_SANDBOX)
            .key_condition_expression("sandbox_key = :sandbox")
            .expression_attribute_values(":sandbox", text(user.key_of(sandbox_id)))
            .select(Select::Count)
            .into_paginator()
            .send();
        let mut count = 0;
        while let Some(page) = pages.next().await {
            count += usize::try_from(page.map_err(store_error("Query conversations"))?.count).unwrap_or_default();
        }
        Ok(count)
    }

    /// The ids of a conversation's sub-conversations, oldest first.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn sub_conversations(&self, user: &UserId, parent: Uuid) -> Result<Vec<Uuid>> {
        let mut items = self
            .dynamodb
            .query()
            .table_name(&self.table)
            .index_name(BY_PARENT)
            .key_condition_expression("parent_key = :parent")
            .expression_attribute_values(":parent", text(user.key_of(&id::hex(parent))))
            .into_paginator()
            .items()
            .send();
        let mut ids = Vec::new();
        while let Some(item) = items.next().await {
            let item = item.map_err(store_error("Query conversations"))?;
            let id = item.get("id").and_then(|id| id.as_s().ok()).and_then(|id| Uuid::parse_str(id).ok());
            ids.push(id.ok_or_else(|| Error::internal("a conversation's id does not read as one"))?);
        }
        Ok(ids)
    }

    /// How many conversations the user has, sub-conversations included: one counter, read once.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn count(&self, user: &UserId) -> Result<u64> {
        let found = self
            .dynamodb
            .get_item()
            .table_name(&self.users_table)
            .set_key(Some(counters_key(user)))
            .consistent_read(true)
            .send()
            .await
            .map_err(store_error("GetItem users"))?;
        let count = found.item.as_ref().and_then(|item| item.get("conversations")).and_then(|count| count.as_n().ok());
        Ok(count.and_then(|count| count.parse().ok()).unwrap_or_default())
    }

    /// The writes that add a new record and count it, for a transaction; they fail where the id is taken.
    ///
    /// # Errors
    /// [`Error::Internal`] when the record has no form as an item.
    pub fn put_new(&self, record: &ConversationRecord) -> Result<[TransactWriteItem; 2]> {
        let put = Put::builder()
            .table_name(&self.table)
            .set_item(Some(item(record)?))
            .condition_expression("attribute_not_exists(id)")
            .build()
            .map_err(Error::internal)?;
        let count = Update::builder()
            .table_name(&self.users_table)
            .set_key(Some(counters_key(&record.user)))
            .update_expression("ADD conversations :one")
            .expression_attribute_values(":one", number(1))
            .build()
            .map_err(Error::internal)?;
        Ok([TransactWriteItem::builder().put(put).build(), TransactWriteItem::builder().update(count).build()])
    }

    /// Notes that an existing conversation runs in this sandbox (again), now. False when there is no such record.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn set_sandbox(&self, user: &UserId, id: Uuid, sandbox_id: &str) -> Result<bool> {
        let updated = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(user, id)))
            .update_expression("SET sandbox_id = :sandbox, sandbox_key = :sandbox_key, updated_at = :now")
            .condition_expression("attribute_exists(id)")
            .expression_attribute_values(":sandbox", text(sandbox_id))
            .expression_attribute_values(":sandbox_key", text(user.key_of(sandbox_id)))
            .expression_attribute_values(":now", text(Time::now().sortable()))
            .send()
            .await
            .map_err(store_error("UpdateItem conversations"));
        match updated {
            Ok(_) => Ok(true),
            Err(error) if is_condition_failure(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// The record with the attributes that indexes are made of.
fn item(record: &ConversationRecord) -> Result<Item> {
    let mut item: HashMap<String, AttributeValue> = to_item(record)?;
    item.insert("created_sort".into(), text(created_sort(record)));
    item.insert("sandbox_key".into(), text(record.user.key_of(&record.sandbox_id)));
    match record.parent_conversation_id {
        Some(parent) => item.insert("parent_key".into(), text(record.user.key_of(&id::hex(parent)))),
        None => item.insert("top_level_user".into(), text(record.user.as_str())),
    };
    Ok(item)
}

/// Creation first, the id where two were made at the same instant.
fn created_sort(record: &ConversationRecord) -> String {
    format!("{}#{}", record.created_at.sortable(), id::hex(record.id))
}

fn key(user: &UserId, id: Uuid) -> Item {
    Item::from([("user".into(), text(user.as_str())), ("id".into(), text(id::hex(id)))])
}

fn counters_key(user: &UserId) -> Item {
    Item::from([("user".into(), text(user.as_str())), ("kind".into(), text(COUNTERS))])
}
