//! Stores conversation records in DynamoDB. Every key starts with the owner.
//!
//! A deletion keeps the record until everything that belongs to it is removed, so that the sweep can resume an interrupted deletion. For
//! all other callers the record no longer exists: it is in no other index, no read returns it, and no update finds it. Afterwards the row
//! stays for [`TOMBSTONE_LIFETIME`] with nothing but its key (a *tombstone*), so that late reports of an agent server do not create the
//! conversation again.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{AttributeValue, TransactWriteItem};
use futures::future::try_join_all;
use serde::Deserialize;
use uuid::Uuid;

use super::ConversationRecord;
use super::title_cache::TitleCache;
use crate::clock::{COMPACT_LENGTH, Time};
use crate::dynamo::{
    Backoff, Condition, DueIndex, Item, Outcome, TRANSACTION_LIMIT, Table, Transacted, Update, from_item, store_error,
    text, to_item, transact,
};
use crate::error::{Error, Result};
use crate::id::{self, UserId};
use crate::user::counters::{self, Counter, Recount, SubCounter};
use crate::user::git::ProviderType;

/// Index: the conversations of each of a user's two lists ([`LIST`]) by creation time.
pub const BY_CREATED: &str = "by-created";
/// Index: the conversations of each of a user's two lists by the time of the last change.
pub const BY_UPDATED: &str = "by-updated";
/// Index: the conversations of a sandbox, by creation time.
pub const BY_SANDBOX: &str = "by-sandbox";
/// Index: the sub-conversations of a conversation.
pub const BY_PARENT: &str = "by-parent";
/// Index: conversations that are being deleted, by the time at which the sweep enqueues them again. Sparse; in
/// [`DELETION_SHARDS`] partitions.
pub const DELETIONS: &str = "deletions";

/// The partition key of the indexes by time. Conversations without a parent and sub-conversations are in separate partitions, so that one
/// index serves lists of the former and, merged, lists of all.
pub const LIST: &str = "list";
/// The sort key by creation time, see [`sort_value`].
pub const CREATED_SORT: &str = "created_sort";
/// The sort key by the time of the last change.
pub const UPDATED_SORT: &str = "updated_sort";
/// The time of creation ([`Time::compact`]), for filters of lists in the order of change.
pub const CREATED: &str = "created";
/// The title in its searchable form. The names of attributes in indexes are short, because DynamoDB charges for them in every entry.
pub const SEARCH: &str = "search";
/// The partition key of [`BY_SANDBOX`].
pub const SANDBOX_KEY: &str = "sandbox_key";

/// Partitions of the deletion index.
pub const DELETION_SHARDS: u128 = 4;

/// How long the id of a deleted conversation is remembered: longer than an agent server that was paused in the meantime keeps its copy.
pub const TOMBSTONE_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// The attribute with the time to live, in seconds since 1970, after which DynamoDB removes a tombstone.
pub const EXPIRES_AT: &str = "expires_at";
/// DynamoDB removes an expired row within a few days. The sweep removes one that is left after this time, as all rows of an engine that
/// removes none.
const EXPIRY_DELAY: Duration = Duration::from_secs(3 * 24 * 3600);

/// The most records that [`ConversationStore::import`] accepts at once: one transaction, together with the counters.
pub const IMPORT_LIMIT: usize = TRANSACTION_LIMIT - 1;

/// The backoff of an import while other writers add records with the same ids.
const IMPORT: Backoff = Backoff { first: Duration::from_millis(40), longest: Duration::from_millis(200), attempts: 3 };

/// The record exists and is not being deleted.
pub(super) fn is_alive() -> Condition {
    Condition::All(vec![Condition::Exists("id"), Condition::Missing("deleting_since")])
}

/// An update of single attributes of a record. It leaves all other attributes unchanged, also under concurrent writes.
#[derive(Clone, Debug, Default)]
pub struct ConversationChange(Update);

impl ConversationChange {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    #[must_use]
    pub fn title(self, title: Option<&str>) -> Self {
        self.put(SEARCH, title.map(|title| text(searchable(title)))).put("title", title.map(text))
    }

    #[must_use]
    pub fn llm_model(self, model: &str) -> Self {
        self.put("llm_model", Some(text(model)))
    }

    /// Sets or clears whether other users may read it.
    #[must_use]
    pub fn public(self, public: Option<bool>) -> Self {
        self.put("public", public.map(AttributeValue::Bool))
    }

    #[must_use]
    pub fn selected_repository(self, repository: Option<&str>) -> Self {
        self.put("selected_repository", repository.map(text))
    }

    #[must_use]
    pub fn selected_branch(self, branch: Option<&str>) -> Self {
        self.put("selected_branch", branch.map(text))
    }

    #[must_use]
    pub fn git_provider(self, provider: Option<ProviderType>) -> Self {
        self.put("git_provider", provider.map(|provider| text(provider.as_str())))
    }

    /// Sets the sandbox in which it runs; it must be one of the user's.
    #[must_use]
    pub fn sandbox(self, user: &UserId, sandbox_id: &str) -> Self {
        self.put("sandbox_id", Some(text(sandbox_id))).put(SANDBOX_KEY, Some(text(user.key_of(sandbox_id))))
    }

    fn put(self, name: &str, value: Option<AttributeValue>) -> Self {
        Self(self.0.set_or_remove(name, value))
    }
}

/// A conversation that is being deleted.
#[derive(Clone, Debug)]
pub struct UnfinishedDeletion {
    pub record: ConversationRecord,
    /// The time of the request.
    pub since: Time,
}

impl UnfinishedDeletion {
    fn read(item: Item) -> Result<Self> {
        #[derive(Deserialize)]
        struct Deleting {
            deleting_since: Time,
        }
        let Deleting { deleting_since } = from_item(item.clone())?;
        Ok(Self { record: from_item(item)?, since: deleting_since })
    }
}

#[derive(Clone, Debug)]
pub struct ConversationStore {
    pub(super) table: Table,
    pub(super) users: Table,
    pub(super) titles: TitleCache,
}

impl ConversationStore {
    /// A store on the `conversations` table, with its counters in `users`.
    #[must_use]
    pub(crate) fn new(dynamodb: Client, table: String, users_table: String) -> Self {
        let users = Table::new(dynamodb.clone(), users_table);
        Self { table: Table::new(dynamodb, table), users, titles: TitleCache::default() }
    }

    /// Returns records in the order of the ids; `None` for ids that the user does not have.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn batch_get(&self, user: &UserId, ids: &[Uuid]) -> Result<Vec<Option<ConversationRecord>>> {
        let mut found: HashMap<Uuid, ConversationRecord> = HashMap::new();
        for item in self.rows(user, ids).await? {
            if !item.contains_key("deleting_since") {
                let record: ConversationRecord = from_item(item)?;
                found.insert(record.id, record);
            }
        }
        Ok(ids.iter().map(|id| found.get(id).cloned()).collect())
    }

    /// The rows of these ids, including records that are being deleted.
    async fn rows(&self, user: &UserId, ids: &[Uuid]) -> Result<Vec<Item>> {
        let ids: BTreeSet<Uuid> = ids.iter().copied().collect();
        self.table.batch_get(ids.into_iter().map(|id| key(user, id)).collect()).await
    }

    /// Returns one record.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn get(&self, user: &UserId, id: Uuid) -> Result<Option<ConversationRecord>> {
        Ok(self.batch_get(user, &[id]).await?.pop().flatten())
    }

    /// Returns the ids of a conversation's sub-conversations, oldest first.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn sub_conversations(&self, user: &UserId, parent: Uuid) -> Result<Vec<Uuid>> {
        let mut items = self
            .table
            .query()
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

    /// Imports records of the user from another server and counts them, at most [`IMPORT_LIMIT`] at once. Returns for each record whether
    /// it was added; a record whose id exists already is left unchanged. Where `updated_at` is before `created_at`, it becomes that: lists
    /// rely on this order.
    ///
    /// # Errors
    /// [`Error::Store`]; then none of them is added.
    pub async fn import(&self, user: &UserId, records: &[ConversationRecord]) -> Result<Vec<bool>> {
        const OPERATION: &str = "TransactWriteItems conversations";
        let ids: Vec<Uuid> = records.iter().map(|record| record.id).collect();
        let mut attempts = IMPORT.start();
        loop {
            attempts.next().await;
            // A conversation that was deleted can be imported again.
            let rows = self.rows(user, &ids).await?;
            let mut taken: HashSet<Uuid> = rows.iter().filter(|row| !is_tombstone(row)).filter_map(id_of).collect();
            // Of several records with the same id, the first is added.
            let new: Vec<bool> = ids.iter().map(|id| taken.insert(*id)).collect();
            let added = || records.iter().zip(&new).filter(|(_, new)| **new).map(|(record, _)| record);
            if added().next().is_none() {
                return Ok(new);
            }
            let is_new = Condition::Any(vec![Condition::Missing("id"), Condition::Exists(EXPIRES_AT)]);
            let put = |record: &ConversationRecord| {
                let updated_at = record.updated_at.max(record.created_at);
                self.table.put_in_transaction(item(&ConversationRecord { updated_at, ..record.clone() })?, &is_new)
            };
            let mut writes = added().map(put).collect::<Result<Vec<_>>>()?;
            let first = ids.iter().zip(&new).find_map(|(id, new)| new.then_some(*id)).unwrap_or_default();
            let count = counters::add(&self.users, user, SubCounter::of(first), &changes_of_counters(added(), 1))?;
            writes.push(count);
            match transact(&self.table.client, writes, OPERATION).await? {
                Transacted::Written => return Ok(new),
                failed if attempts.is_last() => return failed.require(OPERATION).map(|()| Vec::new()),
                // Another writer has added a record with one of the ids meanwhile.
                Transacted::ConditionFailed(_) => {}
            }
        }
    }

    /// Updates a record and sets its `updated_at` to now. Returns the updated record, or `None` if it does not exist.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn update(
        &self,
        user: &UserId,
        id: Uuid,
        change: ConversationChange,
    ) -> Result<Option<ConversationRecord>> {
        let update = updated_now(change.0, id).condition(is_alive());
        self.table.update(key(user, id), update).await?.applied().map(from_item).transpose()
    }

    /// The update of a record as part of a transaction; it fails if the record does not exist.
    ///
    /// # Errors
    /// [`Error::Internal`] when the update cannot be built.
    pub fn update_in_transaction(
        &self,
        user: &UserId,
        id: Uuid,
        change: ConversationChange,
    ) -> Result<TransactWriteItem> {
        let update = updated_now(change.0, id).condition(is_alive());
        update.in_transaction(&self.table.name, key(user, id))
    }

    /// The condition, for a transaction, that a conversation exists and is not being deleted: a deletion that begins afterwards finds what the
    /// transaction has written.
    ///
    /// # Errors
    /// [`Error::Internal`] when the check cannot be built.
    pub fn existing(&self, user: &UserId, id: Uuid) -> Result<TransactWriteItem> {
        self.table.check_in_transaction(key(user, id), &is_alive())
    }

    /// Marks records of the user as being deleted, at most [`IMPORT_LIMIT`] at once. From then on only the worker that finishes the
    /// deletion sees them, and they are not counted. Returns false and changes nothing when one of them does not exist.
    ///
    /// `due_at` is the time from which the sweep enqueues them.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn begin_deletion(&self, user: &UserId, records: &[ConversationRecord], due_at: Time) -> Result<bool> {
        let now = Time::now().sortable();
        let mut writes = Vec::with_capacity(records.len() + 1);
        for record in records {
            let update = Update::new()
                .set("deleting_since", text(&now))
                .set("deletion_shard", text(deletion_shard(record.id)))
                .set("due_at", text(due_at.sortable()))
                .remove_all(&[CREATED_SORT, UPDATED_SORT, LIST, SANDBOX_KEY, "parent_key"])
                .condition(is_alive());
            writes.push(update.in_transaction(&self.table.name, key(user, record.id))?);
        }
        let first = records.first().map(|record| record.id).unwrap_or_default();
        writes.push(counters::add(&self.users, user, SubCounter::of(first), &changes_of_counters(records, -1))?);
        Ok(transact(&self.table.client, writes, "TransactWriteItems conversations").await?.is_written())
    }

    /// Claims a deletion: returns a conversation that is being deleted, and delays the sweep for it until `due_at`. `None` if there is no
    /// such record.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn take_deletion(&self, user: &UserId, id: Uuid, due_at: Time) -> Result<Option<UnfinishedDeletion>> {
        let update = Update::new().set("due_at", text(due_at.sortable())).condition(is_unfinished_deletion());
        match self.table.update(key(user, id), update).await? {
            Outcome::Applied(item) => UnfinishedDeletion::read(item).map(Some),
            Outcome::ConditionFailed(_) => Ok(None),
        }
    }

    /// Whether the id has a tombstone that has expired.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn has_expired(&self, user: &UserId, id: Uuid) -> Result<bool> {
        Ok(self.table.get(key(user, id)).await?.is_some_and(|item| is_expired(&item)))
    }

    /// Removes the tombstone of a conversation.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn remove_tombstone(&self, user: &UserId, id: Uuid) -> Result<()> {
        // If the condition does not hold, another worker has removed it, or the id is used again.
        let _removed = self.table.delete(key(user, id), Condition::Exists(EXPIRES_AT)).await?;
        Ok(())
    }

    /// Replaces the record of a conversation by a tombstone, after everything else that belongs to it is removed.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn end_deletion(&self, user: &UserId, id: Uuid) -> Result<()> {
        let now = Time::now();
        let expires_at = now.plus(TOMBSTONE_LIFETIME);
        let mut tombstone = key(user, id);
        tombstone.insert("deleting_since".into(), text(now.sortable()));
        tombstone.insert(EXPIRES_AT.into(), AttributeValue::N(expires_at.unix_seconds().to_string()));
        tombstone.insert("deletion_shard".into(), text(deletion_shard(id)));
        tombstone.insert("due_at".into(), text(expires_at.plus(EXPIRY_DELAY).sortable()));
        // If the condition does not hold, another worker has replaced the record.
        let _replaced = self.table.put(tombstone, is_unfinished_deletion()).await?;
        Ok(())
    }

    /// Removes the tombstone of a conversation, because a start has requested its id for a new one. Returns false while the deletion of the
    /// conversation is not finished.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn reuse_id(&self, user: &UserId, id: Uuid) -> Result<bool> {
        Ok(match self.table.delete(key(user, id), Condition::Exists(EXPIRES_AT)).await? {
            Ok(()) | Err(None) => true,
            Err(Some(row)) => !row.contains_key("deleting_since"),
        })
    }

    /// The index of unfinished deletions.
    #[must_use]
    pub fn deletions(&self) -> DueIndex {
        DueIndex {
            table: self.table.clone(),
            index: DELETIONS,
            shard_attribute: "deletion_shard",
            shards: (0..DELETION_SHARDS).map(|shard| shard.to_string()).collect(),
            sort_key: "id",
            has_uuids: true,
        }
    }

    /// Returns the record and all of its sub-conversations, at any depth. Empty when there is no such record.
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
        let now = AttributeValue::N(Time::now().unix_seconds().to_string());
        let is_new = vec![Condition::Missing("id"), Condition::Compare(EXPIRES_AT, "<=", now)];
        self.table.put_in_transaction(item, &Condition::Any(is_new))
    }

    /// Counts the user's conversations, strongly consistent.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn recount(&self, user: &UserId, recount: &mut Recount) -> Result<()> {
        let mut rows = self
            .table
            .query()
            .key_condition_expression("#user = :user")
            // A row that is being deleted is in no list, and is not counted.
            .filter_expression("attribute_exists(created_sort)")
            .projection_expression("id, #list")
            .expression_attribute_names("#user", "user")
            .expression_attribute_names("#list", LIST)
            .expression_attribute_values(":user", text(user.as_str()))
            .consistent_read(true)
            .into_paginator()
            .items()
            .send();
        while let Some(row) = rows.next().await {
            let row = row.map_err(store_error("Query conversations"))?;
            let Some(id) = id_of(&row) else { continue };
            recount.add(id, Counter::Conversations);
            if row.get(LIST) == Some(&text(List::TopLevel.key(user))) {
                recount.add(id, Counter::TopLevelConversations);
            }
        }
        Ok(())
    }
}

/// What the counters of a user gain, or lose where the sign is -1, with these records.
pub(super) fn changes_of_counters<'r>(
    records: impl IntoIterator<Item = &'r ConversationRecord>,
    sign: i64,
) -> [(Counter, i64); 2] {
    let (mut all, mut top_level) = (0, 0);
    for record in records {
        all += sign;
        top_level += if record.parent_conversation_id.is_none() { sign } else { 0 };
    }
    [(Counter::Conversations, all), (Counter::TopLevelConversations, top_level)]
}

/// The row is of a conversation whose deletion is not finished.
fn is_unfinished_deletion() -> Condition {
    Condition::All(vec![Condition::Exists("deleting_since"), Condition::Missing(EXPIRES_AT)])
}

fn is_tombstone(row: &Item) -> bool {
    row.contains_key(EXPIRES_AT)
}

/// Whether a row is a tombstone that counts as removed.
pub(super) fn is_expired(row: &Item) -> bool {
    let expires_at = row.get(EXPIRES_AT).and_then(|value| value.as_n().ok()).and_then(|text| text.parse::<i64>().ok());
    expires_at.is_some_and(|expires_at| expires_at <= Time::now().unix_seconds())
}

fn deletion_shard(id: Uuid) -> String {
    (id.as_u128() % DELETION_SHARDS).to_string()
}

/// A list of a user's conversations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum List {
    /// Conversations without a parent.
    TopLevel,
    SubConversations,
}

impl List {
    /// The value of [`LIST`]. The suffixes have the same length, so that the keys of two users differ whatever characters their ids contain.
    pub(super) fn key(self, user: &UserId) -> String {
        let suffix = match self {
            Self::TopLevel => "/t",
            Self::SubConversations => "/s",
        };
        format!("{}{suffix}", user.as_str())
    }
}

/// Converts the record to an item, with the attributes that indexes and filters need.
pub(super) fn item(record: &ConversationRecord) -> Result<Item> {
    let mut item = to_item(record)?;
    item.insert(CREATED_SORT.into(), text(sort_value(record.created_at, record.id)));
    item.insert(UPDATED_SORT.into(), text(sort_value(record.updated_at, record.id)));
    item.insert(CREATED.into(), text(record.created_at.compact()));
    item.insert(SANDBOX_KEY.into(), text(record.user.key_of(&record.sandbox_id)));
    if let Some(title) = &record.title {
        item.insert(SEARCH.into(), text(searchable(title)));
    }
    let list = match record.parent_conversation_id {
        Some(parent) => {
            item.insert("parent_key".into(), text(record.user.key_of(&id::hex(parent))));
            List::SubConversations
        }
        None => List::TopLevel,
    };
    item.insert(LIST.into(), text(list.key(&record.user)));
    Ok(item)
}

/// The searchable form of a title: ASCII letters in one case, as SQL's LIKE compares them.
pub(super) fn searchable(title: &str) -> String {
    title.to_ascii_lowercase()
}

/// The digits of an id in a sort key.
const ID_LENGTH: usize = 22;

/// The sort key: the instant, followed by the complement of the id. Rows with the same instant are then listed, newest first, in the order
/// of their ids, as in the reference.
pub(super) fn sort_value(at: Time, id: Uuid) -> String {
    sort_value_of(&at.compact(), id)
}

/// The sort key of an instant in its compact form.
pub(super) fn sort_value_of(at: &str, id: Uuid) -> String {
    format!("{at}{}", id::base62(complement(id).as_u128(), ID_LENGTH))
}

/// The id in a [`sort_value`]; `None` for an invalid value.
pub(super) fn id_in_sort_value(value: &str) -> Option<Uuid> {
    let (at, id) = value.split_at_checked(COMPACT_LENGTH)?;
    id::from_base62(at)?;
    (id.len() == ID_LENGTH).then(|| id::from_base62(id)).flatten().map(|id| complement(Uuid::from_u128(id)))
}

fn complement(id: Uuid) -> Uuid {
    Uuid::from_u128(!id.as_u128())
}

/// Sets the time of the last change to now.
pub(super) fn updated_now(update: Update, id: Uuid) -> Update {
    let now = Time::now();
    update.set("updated_at", text(now.sortable())).set(UPDATED_SORT, text(sort_value(now, id)))
}

pub(super) fn key(user: &UserId, id: Uuid) -> Item {
    Item::from([("user".into(), text(user.as_str())), ("id".into(), text(id::hex(id)))])
}

pub(super) fn id_of(item: &Item) -> Option<Uuid> {
    item.get("id").and_then(|id| id.as_s().ok()).and_then(|id| Uuid::try_parse(id).ok())
}
