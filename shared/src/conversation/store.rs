//! The store of conversation records. Every key starts with the owner.
//!
//! A record that is being deleted stays until all that belongs to it is gone, so that a deletion that was cut off is
//! finished by the sweep; to everybody else it does not exist: it is in no other index, no read shows it, no update finds it.

use std::collections::{HashMap, HashSet};

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{AttributeValue, Put, ReturnValue, Select, TransactWriteItem, Update};
use futures::future::try_join_all;
use uuid::Uuid;

use super::ConversationRecord;
use crate::clock::Time;
use crate::dynamo::{
    BATCH_GET_LIMIT, DueIndex, Item, TRANSACTION_LIMIT, batch_get_items, from_item, is_condition_failure, store_error,
    text, to_item, transact,
};
use crate::error::{Error, Result};
use crate::id::{self, UserId};
use crate::user::counters::{self, Counter};
use crate::user::git::ProviderType;

/// Index: all of a user's conversations by creation.
pub const ALL_BY_CREATED: &str = "all-by-created";
/// Index: all of a user's conversations by last change.
pub const ALL_BY_UPDATED: &str = "all-by-updated";
/// Index: a user's conversations without a parent, by creation. Sparse: others have no `top_level_user`.
pub const TOP_LEVEL_BY_CREATED: &str = "top-level-by-created";
/// Index: a user's conversations without a parent, by last change.
pub const TOP_LEVEL_BY_UPDATED: &str = "top-level-by-updated";
/// Index: the conversations of a sandbox.
pub const BY_SANDBOX: &str = "by-sandbox";
/// Index: the sub-conversations of a conversation.
pub const BY_PARENT: &str = "by-parent";
/// Index: conversations that are being deleted, by when somebody must have looked at them. Sparse; in
/// [`DELETION_SHARDS`] partitions.
pub const DELETIONS: &str = "deletions";

/// Partitions of the index of deletions.
pub const DELETION_SHARDS: u128 = 4;

/// The most records that [`ConversationStore::import`] takes at once: one transaction, with the counters.
pub const IMPORT_LIMIT: usize = TRANSACTION_LIMIT - 1;

/// The record is there and is not being deleted.
pub(super) const ALIVE: &str = "attribute_exists(id) AND attribute_not_exists(deleting_since)";

/// A change of single attributes of a record; others are left as they are, whoever writes them at the same time.
#[derive(Clone, Debug, Default)]
pub struct ConversationChange {
    set: Vec<(&'static str, AttributeValue)>,
    remove: Vec<&'static str>,
}

impl ConversationChange {
    /// Whether nothing changes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.remove.is_empty()
    }

    /// Sets the title, or clears it.
    #[must_use]
    pub fn title(self, title: Option<&str>) -> Self {
        self.put("title_search", title.map(|title| text(searchable(title)))).put("title", title.map(text))
    }

    /// Sets whether others may read it, or clears that.
    #[must_use]
    pub fn public(self, public: Option<bool>) -> Self {
        self.put("public", public.map(AttributeValue::Bool))
    }

    /// Sets the repository, or clears it.
    #[must_use]
    pub fn selected_repository(self, repository: Option<&str>) -> Self {
        self.put("selected_repository", repository.map(text))
    }

    /// Sets the branch, or clears it.
    #[must_use]
    pub fn selected_branch(self, branch: Option<&str>) -> Self {
        self.put("selected_branch", branch.map(text))
    }

    /// Sets where the repository is, or clears it.
    #[must_use]
    pub fn git_provider(self, provider: Option<ProviderType>) -> Self {
        self.put("git_provider", provider.map(|provider| text(provider.as_str())))
    }

    /// Sets the user's sandbox that it runs in.
    #[must_use]
    pub fn sandbox(self, user: &UserId, sandbox_id: &str) -> Self {
        self.put("sandbox_id", Some(text(sandbox_id))).put("sandbox_key", Some(text(user.key_of(sandbox_id))))
    }

    fn put(mut self, name: &'static str, value: Option<AttributeValue>) -> Self {
        match value {
            Some(value) => self.set.push((name, value)),
            None => self.remove.push(name),
        }
        self
    }
}

/// The records of all conversations.
#[derive(Clone, Debug)]
pub struct ConversationStore {
    pub(super) dynamodb: Client,
    pub(super) table: String,
    pub(super) users_table: String,
}

impl ConversationStore {
    /// A store on the `conversations` table, with its counters in `users`.
    #[must_use]
    pub(crate) fn new(dynamodb: Client, table: String, users_table: String) -> Self {
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
                if !item.contains_key("deleting_since") {
                    let record: ConversationRecord = from_item(item)?;
                    found.insert(record.id, record);
                }
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
            ids.push(id_of(&item).ok_or_else(|| Error::internal("a conversation's id does not read as one"))?);
        }
        Ok(ids)
    }

    /// Adds records of the user that were made elsewhere, and counts them. At most [`IMPORT_LIMIT`] at once. Answers for each
    /// whether it was added: one whose id is taken is left as it is.
    ///
    /// # Errors
    /// [`Error::Store`]; none of them is added then.
    pub async fn import(&self, user: &UserId, records: &[ConversationRecord]) -> Result<Vec<bool>> {
        const ATTEMPTS: usize = 3;
        let mut outcome = Ok(());
        for _ in 0..ATTEMPTS {
            let ids: Vec<Uuid> = records.iter().map(|record| record.id).collect();
            let mut taken = self.taken(user, &ids).await?;
            // The first of several with the same id is the one that is added.
            let new: Vec<bool> = ids.iter().map(|id| taken.insert(*id)).collect();
            let added = || records.iter().zip(&new).filter(|(_, new)| **new).map(|(record, _)| record);
            if added().next().is_none() {
                return Ok(new);
            }
            let mut writes = added().map(|record| self.put(item(record)?)).collect::<Result<Vec<_>>>()?;
            writes.push(self.add_to_counters(user, added(), 1)?);
            outcome = transact(&self.dynamodb, writes, "TransactWriteItems conversations").await;
            match &outcome {
                Ok(()) => return Ok(new),
                // Somebody else took one of the ids in the meantime.
                Err(error) if is_condition_failure(error) => {}
                Err(_) => break,
            }
        }
        outcome.map(|()| Vec::new())
    }

    /// Which of these ids have a row, be it one that is being deleted.
    async fn taken(&self, user: &UserId, ids: &[Uuid]) -> Result<HashSet<Uuid>> {
        let mut taken = HashSet::new();
        let mut wanted = ids.to_vec();
        wanted.sort_unstable();
        wanted.dedup();
        for chunk in wanted.chunks(BATCH_GET_LIMIT) {
            let keys = chunk.iter().map(|id| key(user, *id)).collect();
            for item in batch_get_items(&self.dynamodb, &self.table, keys, "BatchGetItem conversations").await? {
                taken.extend(id_of(&item));
            }
        }
        Ok(taken)
    }

    /// Changes a record, and moves its `updated_at` to now. Answers the record as it is then, `None` when there is none.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn update(
        &self,
        user: &UserId,
        id: Uuid,
        change: ConversationChange,
    ) -> Result<Option<ConversationRecord>> {
        let now = Time::now();
        let change =
            change.put("updated_at", Some(text(now.sortable()))).put("updated_sort", Some(text(sort_value(now, id))));
        let mut update = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(user, id)))
            .condition_expression(ALIVE)
            .return_values(ReturnValue::AllNew);
        let mut sets = Vec::new();
        for (index, (name, value)) in change.set.into_iter().enumerate() {
            sets.push(format!("#s{index} = :s{index}"));
            update = update
                .expression_attribute_names(format!("#s{index}"), name)
                .expression_attribute_values(format!(":s{index}"), value);
        }
        let mut expression = format!("SET {}", sets.join(", "));
        if !change.remove.is_empty() {
            let names: Vec<String> = (0..change.remove.len()).map(|index| format!("#r{index}")).collect();
            expression = format!("{expression} REMOVE {}", names.join(", "));
            for (name, attribute) in names.into_iter().zip(change.remove) {
                update = update.expression_attribute_names(name, attribute);
            }
        }
        match update.update_expression(expression).send().await.map_err(store_error("UpdateItem conversations")) {
            Ok(updated) => updated.attributes.map(from_item).transpose(),
            Err(error) if is_condition_failure(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Begins to delete records of the user: from now on they do not exist to anybody but who finishes the deletion, and are not
    /// counted. False, and nothing has changed, when one of them is not there (any more). At most [`IMPORT_LIMIT`] at once.
    ///
    /// `due_at` is when the sweep looks after them.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn begin_deletion(&self, user: &UserId, records: &[ConversationRecord], due_at: Time) -> Result<bool> {
        let now = Time::now().sortable();
        let mut writes = Vec::with_capacity(records.len() + 1);
        for record in records {
            let update = Update::builder()
                .table_name(&self.table)
                .set_key(Some(key(user, record.id)))
                .update_expression(
                    "SET deleting_since = :now, deletion_shard = :shard, due_at = :due REMOVE created_sort, updated_sort, top_level_user, sandbox_key, parent_key",
                )
                .condition_expression(ALIVE)
                .expression_attribute_values(":now", text(&now))
                .expression_attribute_values(":shard", text((record.id.as_u128() % DELETION_SHARDS).to_string()))
                .expression_attribute_values(":due", text(due_at.sortable()))
                .build()
                .map_err(Error::internal)?;
            writes.push(TransactWriteItem::builder().update(update).build());
        }
        writes.push(self.add_to_counters(user, records, -1)?);
        match transact(&self.dynamodb, writes, "TransactWriteItems conversations").await {
            Ok(()) => Ok(true),
            Err(error) if is_condition_failure(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The record of a conversation that is being deleted, kept from the sweep until `due_at`. `None` when there is none.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn take_deletion(&self, user: &UserId, id: Uuid, due_at: Time) -> Result<Option<ConversationRecord>> {
        let taken = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(user, id)))
            .update_expression("SET due_at = :due")
            .condition_expression("attribute_exists(deleting_since)")
            .expression_attribute_values(":due", text(due_at.sortable()))
            .return_values(ReturnValue::AllNew)
            .send()
            .await
            .map_err(store_error("UpdateItem conversations"));
        match taken {
            Ok(taken) => taken.attributes.map(from_item).transpose(),
            Err(error) if is_condition_failure(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes the record of a conversation of which nothing else is left.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn end_deletion(&self, user: &UserId, id: Uuid) -> Result<()> {
        let removed = self
            .dynamodb
            .delete_item()
            .table_name(&self.table)
            .set_key(Some(key(user, id)))
            .condition_expression("attribute_exists(deleting_since)")
            .send()
            .await
            .map_err(store_error("DeleteItem conversations"));
        match removed {
            // Another worker was quicker.
            Err(error) if !is_condition_failure(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// The index of deletions that are not finished.
    #[must_use]
    pub fn deletions(&self) -> DueIndex {
        DueIndex {
            dynamodb: self.dynamodb.clone(),
            table: self.table.clone(),
            index: DELETIONS,
            shard_attribute: "deletion_shard",
            shards: (0..DELETION_SHARDS).map(|shard| shard.to_string()).collect(),
            sort_key: "id",
        }
    }

    /// The record and, below it at any depth, its sub-conversations; empty when there is no such record.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn family(&self, user: &UserId, id: Uuid) -> Result<Vec<ConversationRecord>> {
        let mut family: Vec<ConversationRecord> = self.get(user, id).await?.into_iter().collect();
        let mut known = HashSet::from([id]);
        let mut generation: Vec<Uuid> = family.iter().map(|record| record.id).collect();
        while !generation.is_empty() {
            let children = try_join_all(generation.iter().map(|parent| self.sub_conversations(user, *parent))).await?;
            generation = children.into_iter().flatten().filter(|child| known.insert(*child)).collect();
            family.extend(self.batch_get(user, &generation).await?.into_iter().flatten());
        }
        Ok(family)
    }

    /// The write of a new row, for a transaction.
    pub(super) fn put(&self, item: Item) -> Result<TransactWriteItem> {
        let put = Put::builder()
            .table_name(&self.table)
            .set_item(Some(item))
            .condition_expression("attribute_not_exists(id)")
            .build()
            .map_err(Error::internal)?;
        Ok(TransactWriteItem::builder().put(put).build())
    }

    pub(super) fn add_to_counters<'r>(
        &self,
        user: &UserId,
        records: impl IntoIterator<Item = &'r ConversationRecord>,
        sign: i64,
    ) -> Result<TransactWriteItem> {
        let (mut all, mut top_level) = (0, 0);
        for record in records {
            all += sign;
            top_level += if record.parent_conversation_id.is_none() { sign } else { 0 };
        }
        let changes = [(Counter::Conversations, all), (Counter::TopLevelConversations, top_level)];
        counters::add(&self.users_table, user, &changes)
    }
}

/// The record with the attributes that indexes and filters are made of.
pub(super) fn item(record: &ConversationRecord) -> Result<Item> {
    let mut item: HashMap<String, AttributeValue> = to_item(record)?;
    item.insert("created_sort".into(), text(sort_value(record.created_at, record.id)));
    item.insert("updated_sort".into(), text(sort_value(record.updated_at, record.id)));
    item.insert("sandbox_key".into(), text(record.user.key_of(&record.sandbox_id)));
    if let Some(title) = &record.title {
        item.insert("title_search".into(), text(searchable(title)));
    }
    match record.parent_conversation_id {
        Some(parent) => item.insert("parent_key".into(), text(record.user.key_of(&id::hex(parent)))),
        None => item.insert("top_level_user".into(), text(record.user.as_str())),
    };
    Ok(item)
}

/// A text as titles are searched: ASCII letters in one case, as SQL's LIKE compares them.
pub(super) fn searchable(title: &str) -> String {
    title.to_ascii_lowercase()
}

/// The instant first, and behind it, where two rows have the same, the complement of the id: newest first, such rows come in the
/// order of their ids, as the reference shows them.
pub(super) fn sort_value(at: Time, id: Uuid) -> String {
    format!("{}#{}", at.sortable(), id::hex(complement(id)))
}

/// The id in a [`sort_value`], `None` where it is none.
pub(super) fn id_in_sort_value(value: &str) -> Option<Uuid> {
    value.rsplit_once('#').and_then(|(_, id)| Uuid::try_parse(id).ok()).map(complement)
}

fn complement(id: Uuid) -> Uuid {
    Uuid::from_u128(!id.as_u128())
}

pub(super) fn key(user: &UserId, id: Uuid) -> Item {
    Item::from([("user".into(), text(user.as_str())), ("id".into(), text(id::hex(id)))])
}

fn id_of(item: &Item) -> Option<Uuid> {
    item.get("id").and_then(|id| id.as_s().ok()).and_then(|id| Uuid::try_parse(id).ok())
}
