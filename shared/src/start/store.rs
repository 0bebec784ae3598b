//! The store of start tasks. Workers share it: whoever writes a start's progress must hold its lease.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{AttributeValue, Delete, Put, ReturnValue, Select, TransactWriteItem, Update};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use futures::future::try_join_all;
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::abridged::abridged;
use super::request::StartRequest;
use super::task::{
    ABRIDGED_SIZE, AppConversationStartTask, PendingCommand, Snapshot, StartStatus, StartTask, StartTaskRecord, raw,
};
use crate::clock::Time;
use crate::dynamo::{
    BATCH_GET_LIMIT, DueIndex, Item, TRANSACTION_LIMIT, batch_get_items, from_item, is_condition_failure, number,
    store_error, text, to_item, transact,
};
use crate::error::{Error, Result};
use crate::http::page::{self, Items, PAGE_SIZE};
pub use crate::http::sort_order::SortOrder;
use crate::id;
use crate::objects;
use crate::paging::{self, Bounds};
use crate::user::UserId;
use crate::user::counters::{self, Counter};
use crate::user::seal::Sealer;

/// Index: a user's tasks by creation.
pub const BY_CREATED: &str = "by-created";
/// Index: a user's tasks by last change.
pub const BY_UPDATED: &str = "by-updated";
/// Index: tasks that made a conversation ready.
pub const BY_CONVERSATION: &str = "by-conversation";
/// Index: unfinished tasks by when somebody must have looked at them. Sparse; in [`SHARDS`] partitions.
pub const UNFINISHED: &str = "unfinished";

/// Partitions of the index of unfinished tasks: one hex digit of the task's id.
pub const SHARDS: &str = "0123456789abcdef";

/// A request longer than this is kept in the bucket: every change of the record would pay for it again.
const INLINE_REQUEST_LIMIT: usize = 8 * 1024;

/// The most tasks that [`StartTaskStore::import`] takes at once: one transaction, with the counter.
pub const IMPORT_LIMIT: usize = TRANSACTION_LIMIT - 1;

/// Longer than any start takes: every step of it has a deadline.
const LONGEST_START: Duration = Duration::from_secs(24 * 3600);

/// How long after its time a task counts as forgotten.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(2);

/// Requests that are opened in the bucket at the same time. Their bodies are read one after the other.
const OPEN_REQUESTS: usize = 4;

/// The error for a count that takes too long.
const TOO_MANY: &str =
    "Too many start tasks to count with this filter. Narrow it with created_at__gte, or read the pages of search";
const LEASE_UPDATE: &str = "SET lease_owner = :worker, lease_until = :until, due_at = :due";

/// What became of the attempt to claim a task.
#[derive(Debug)]
pub enum Claim {
    /// It is the caller's until the lease runs out.
    Claimed(Box<StartTask>),
    /// Another worker has it.
    Held,
    /// There is nothing to do.
    Finished,
    /// There is no such task.
    Unknown,
}

/// The caller's lease ran out and the task may be another worker's now.
#[derive(Debug, PartialEq, Eq)]
pub struct LeaseLost;

/// A change of a record's attributes.
#[derive(Clone, Debug, Default)]
pub struct Change {
    set: Vec<(&'static str, AttributeValue)>,
    append: Vec<(&'static str, AttributeValue)>,
    remove: Vec<&'static str>,
}

impl Change {
    /// Sets an attribute.
    #[must_use]
    pub fn set(mut self, name: &'static str, value: AttributeValue) -> Self {
        self.set.push((name, value));
        self
    }

    /// Removes an attribute.
    #[must_use]
    pub fn remove(mut self, name: &'static str) -> Self {
        self.remove.push(name);
        self
    }

    /// Adds a note for the user.
    #[must_use]
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.append.push(("notes", AttributeValue::L(vec![text(note)])));
        self
    }

    /// Sets the command that is waited for.
    ///
    /// # Errors
    /// [`Error::Internal`] when it has no form as an attribute.
    pub fn command(self, command: &PendingCommand) -> Result<Self> {
        Ok(self.set("command", AttributeValue::M(to_item(command)?)))
    }

    /// Goes to another state: the current attributes and the history change together.
    ///
    /// # Errors
    /// [`Error::Internal`] when the snapshot has no form as an item.
    pub fn state(mut self, id: Uuid, snapshot: &Snapshot) -> Result<Self> {
        let item = to_item(snapshot)?;
        for name in ["detail", "app_conversation_id", "sandbox_id", "agent_server_url"] {
            if let Some(value) = item.get(name) {
                self = self.set(name, value.clone());
            }
        }
        self = self
            .set("status", item["status"].clone())
            .set("updated_at", item["updated_at"].clone())
            .set("updated_sort", text(sort_key(snapshot.updated_at, id)));
        self.append.push(("history", AttributeValue::L(vec![AttributeValue::M(item)])));
        Ok(self)
    }

    /// Ends the task: nobody needs to look at it again.
    #[must_use]
    pub fn finished(mut self) -> Self {
        self.remove.extend([
            "unfinished_shard",
            "due_at",
            "lease_owner",
            "lease_until",
            "command",
            "deadline",
            "failure",
            "secrets_sealed",
            "open_claims",
        ]);
        self
    }

    fn expression(&self) -> (String, HashMap<String, String>, HashMap<String, AttributeValue>) {
        let (mut names, mut values, mut sets) = (HashMap::new(), HashMap::new(), Vec::new());
        for (index, (name, value)) in self.set.iter().enumerate() {
            names.insert(format!("#s{index}"), (*name).to_owned());
            values.insert(format!(":s{index}"), value.clone());
            sets.push(format!("#s{index} = :s{index}"));
        }
        // Several additions to one list must be one.
        let mut lists: Vec<(&str, Vec<AttributeValue>)> = Vec::new();
        for (name, value) in &self.append {
            let more = value.as_l().cloned().unwrap_or_default();
            match lists.iter_mut().find(|(known, _)| known == name) {
                Some((_, list)) => list.extend(more),
                None => lists.push((name, more)),
            }
        }
        for (index, (name, list)) in lists.into_iter().enumerate() {
            names.insert(format!("#a{index}"), name.to_owned());
            values.insert(format!(":a{index}"), AttributeValue::L(list));
            values.insert(":none".to_owned(), AttributeValue::L(Vec::new()));
            sets.push(format!("#a{index} = list_append(if_not_exists(#a{index}, :none), :a{index})"));
        }
        let mut removes = Vec::new();
        for (index, name) in self.remove.iter().enumerate() {
            names.insert(format!("#r{index}"), (*name).to_owned());
            removes.push(format!("#r{index}"));
        }
        let mut expression = String::new();
        if !sets.is_empty() {
            expression = format!("SET {}", sets.join(", "));
        }
        if !removes.is_empty() {
            expression = format!("{expression} REMOVE {}", removes.join(", "));
        }
        (expression, names, values)
    }
}

/// The index that has an order, and the attribute that it is sorted by.
fn index_of(order: SortOrder) -> (&'static str, &'static str) {
    if order.is_by_created() { (BY_CREATED, "created_sort") } else { (BY_UPDATED, "updated_sort") }
}

/// Which tasks a list holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// Those that made this conversation ready.
    pub conversation_id: Option<Uuid>,
    /// Those asked for at this instant or later.
    pub created_at_gte: Option<Time>,
}

/// Where in a list a page starts: behind this task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// The value of the attribute that the list is sorted by.
    pub sort: String,
    /// The task's id.
    pub id: Uuid,
}

/// A start that another server did, or began. It is kept to be shown; nobody goes on with it here, whatever its status.
#[derive(Clone, Debug)]
pub struct ImportedTask {
    /// Its id.
    pub id: Uuid,
    /// Its state.
    pub now: Snapshot,
    /// When it was asked for.
    pub created_at: Time,
    /// What was asked for. Values of its secrets are not stored, only their names are.
    pub request: StartRequest,
}

/// The records of all start tasks.
#[derive(Clone, Debug)]
pub struct StartTaskStore {
    dynamodb: Client,
    table: String,
    users_table: String,
    s3: aws_sdk_s3::Client,
    bucket: String,
    sealer: Sealer,
}

impl StartTaskStore {
    /// A store on the `start-tasks` table, with its counter in `users` and large requests in `bucket`.
    #[must_use]
    pub fn new(
        dynamodb: Client,
        table: String,
        users_table: String,
        s3: aws_sdk_s3::Client,
        bucket: String,
        sealer: Sealer,
    ) -> Self {
        Self { dynamodb, table, users_table, s3, bucket, sealer }
    }

    /// Stores a new task in state WORKING; from here on it ends READY or ERROR, whatever happens to its makers.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn create(&self, user: &UserId, request: &StartRequest, deadline: Time) -> Result<StartTaskRecord> {
        let created_at = Time::now();
        let id = id::new_uuid();
        let conversation_id = request.conversation_id.unwrap_or_else(id::new_uuid);
        let now = Snapshot {
            status: StartStatus::Working,
            updated_at: created_at,
            detail: None,
            app_conversation_id: None,
            sandbox_id: None,
            agent_server_url: None,
        };
        let mut record = StartTaskRecord {
            deadline: Some(deadline),
            conversation_id,
            // As in the reference, a conversation with a given id gets a sandbox of the same id.
            new_sandbox_id: request.conversation_id.map_or_else(id::new_sandbox_id, id::hex),
            secrets_sealed: self.seal_secrets(user, id, request).await?,
            ..record(user, id, now, created_at, request)?
        };
        let mut item = self.item(&mut record).await?;
        item.insert("unfinished_shard".into(), text(shard(id)));
        item.insert("due_at".into(), text(created_at.plus(FORGOTTEN_AFTER).sortable()));
        let count = counters::add(&self.users_table, user, &[(Counter::StartTasks, 1)])?;
        transact(&self.dynamodb, vec![self.put_new(item)?, count], "TransactWriteItems start-tasks").await?;
        Ok(record)
    }

    /// Adds tasks of another server and counts them: for each, whether it is new; one that is there already is left as it
    /// is. At most [`IMPORT_LIMIT`] at once. No worker ever takes them, for they are not in the index of unfinished tasks.
    ///
    /// # Errors
    /// [`Error::Store`]; none of them is added then.
    pub async fn import(&self, user: &UserId, tasks: &[ImportedTask]) -> Result<Vec<bool>> {
        const ATTEMPTS: usize = 3;
        let mut outcome = Ok(());
        for _ in 0..ATTEMPTS {
            let mut taken = self.taken(user, tasks.iter().map(|task| task.id)).await?;
            // The first of several with the same id is the one that is added.
            let new: Vec<bool> = tasks.iter().map(|task| taken.insert(task.id)).collect();
            let added: Vec<&ImportedTask> =
                tasks.iter().zip(&new).filter(|(_, new)| **new).map(|(task, _)| task).collect();
            if added.is_empty() {
                return Ok(new);
            }
            let count = i64::try_from(added.len()).unwrap_or_default();
            let items = try_join_all(added.into_iter().map(async |task| {
                let mut record = record(user, task.id, task.now.clone(), task.created_at, &task.request)?;
                self.item(&mut record).await
            }));
            let mut writes =
                items.await?.into_iter().map(|item| self.put_new(item)).collect::<Result<Vec<TransactWriteItem>>>()?;
            writes.push(counters::add(&self.users_table, user, &[(Counter::StartTasks, count)])?);
            outcome = transact(&self.dynamodb, writes, "TransactWriteItems start-tasks").await;
            match &outcome {
                Ok(()) => return Ok(new),
                // Somebody else took one of the ids in the meantime.
                Err(error) if is_condition_failure(error) => {}
                Err(_) => break,
            }
        }
        outcome.map(|()| Vec::new())
    }

    /// Which of these ids have a row.
    async fn taken(&self, user: &UserId, ids: impl Iterator<Item = Uuid>) -> Result<HashSet<Uuid>> {
        let ids: HashSet<Uuid> = ids.collect();
        let keys = ids.into_iter().map(|id| key(user, id)).collect();
        let items = batch_get_items(&self.dynamodb, &self.table, keys, "BatchGetItem start-tasks").await?;
        let id = |item: &Item| Uuid::parse_str(item.get("id")?.as_s().ok()?).ok();
        Ok(items.iter().filter_map(id).collect())
    }

    fn put_new(&self, item: Item) -> Result<TransactWriteItem> {
        let put = Put::builder()
            .table_name(&self.table)
            .set_item(Some(item))
            .condition_expression("attribute_not_exists(id)")
            .build()
            .map_err(Error::internal)?;
        Ok(TransactWriteItem::builder().put(put).build())
    }

    /// A new record as an item, with the attributes that indexes are made of; a large request goes to the bucket.
    async fn item(&self, record: &mut StartTaskRecord) -> Result<Item> {
        let mut item = to_item(record)?;
        if record.request.len() > INLINE_REQUEST_LIMIT {
            // Before the row, so that there is no row without its request. An object without a row is found by no one.
            let owner = crate::digest::sha256_hex(record.user.as_str());
            let key = format!("start-requests/{}/{owner}.json", id::hex(record.id));
            self.s3
                .put_object()
                .bucket(&self.bucket)
                .key(&key)
                .content_type("application/json")
                .body(record.request.clone().into_bytes().into())
                .send()
                .await
                .map_err(store_error("PutObject start-requests"))?;
            item.insert("request".into(), text(abridged(&record.request)));
            item.insert("request_object".into(), text(&key));
            record.request_object = Some(key);
        }
        item.insert("created_sort".into(), text(sort_key(record.created_at, record.id)));
        item.insert("updated_sort".into(), text(sort_key(record.now.updated_at, record.id)));
        if let Some(conversation) = record.now.app_conversation_id {
            item.insert("conversation_key".into(), text(record.user.key_of(&id::hex(conversation))));
        }
        Ok(item)
    }

    /// Records in the order of the ids, `None` for those that the user does not have. Requests that are in the bucket are not
    /// read.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn batch_get(&self, user: &UserId, ids: &[Uuid]) -> Result<Vec<Option<StartTaskRecord>>> {
        let mut found = HashMap::new();
        let mut wanted = ids.to_vec();
        wanted.sort_unstable();
        wanted.dedup();
        for chunk in wanted.chunks(BATCH_GET_LIMIT) {
            let keys = chunk.iter().map(|id| key(user, *id)).collect();
            let items = batch_get_items(&self.dynamodb, &self.table, keys, "BatchGetItem start-tasks").await?;
            for item in items {
                let record: StartTaskRecord = from_item(item)?;
                found.insert(record.id, record);
            }
        }
        Ok(ids.iter().map(|id| found.get(id).cloned()).collect())
    }

    /// One record.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn get(&self, user: &UserId, id: Uuid) -> Result<Option<StartTaskRecord>> {
        Ok(self.batch_get(user, &[id]).await?.pop().flatten())
    }

    /// A page of the user's tasks, within the bounds of [`crate::paging`], and where the next one starts if there is one. Requests
    /// that are in the bucket are not read.
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
            // A conversation has as many tasks as it was started times: hardly ever more than one.
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

    /// Tasks as the contract shows them, until one does not fit into a page.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn show_page(&self, records: &[StartTaskRecord]) -> Result<Items<AppConversationStartTask>> {
        let mut items = Items::default();
        let keys: Vec<Option<String>> = records.iter().map(|record| record.request_object.clone()).collect();
        let mut opened = stream::iter(keys).map(|key| self.open_request(key)).buffered(OPEN_REQUESTS);
        for record in records {
            let Some(request) = opened.try_next().await? else { break };
            // A task that has no room in a page of its own is shown with its request abridged.
            let request = match read_request(record, request, items.left()).await? {
                Some(request) => request,
                None if items.is_empty() => self.abridged_request(record).await?,
                None => break,
            };
            if !items.push(&record.show_at(&record.now, request))? {
                break;
            }
        }
        Ok(items)
    }

    /// Tasks as the contract shows them, all of them in one answer: requests are abridged where all of them have no room.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn show_all(&self, records: &[Option<StartTaskRecord>]) -> Result<Vec<Option<AppConversationStartTask>>> {
        let found = records.iter().flatten().count();
        let mut left = PAGE_SIZE.saturating_sub(ABRIDGED_SIZE * u64::try_from(found).unwrap_or(u64::MAX));
        let keys: Vec<Option<String>> = records.iter().flatten().map(|record| record.request_object.clone()).collect();
        let mut opened = stream::iter(keys).map(|key| self.open_request(key)).buffered(OPEN_REQUESTS);
        let mut shown = Vec::with_capacity(records.len());
        for record in records {
            let Some(record) = record else {
                shown.push(None);
                continue;
            };
            let Some(request) = opened.try_next().await? else { break };
            let request = match read_request(record, request, left).await? {
                Some(request) => {
                    left = left.saturating_sub(page::size_of_text(request.get().as_bytes()));
                    request
                }
                None => self.abridged_request(record).await?,
            };
            shown.push(Some(record.show_at(&record.now, request)));
        }
        Ok(shown)
    }

    /// The place of a task in a list.
    #[must_use]
    pub fn place(record: &StartTaskRecord, order: SortOrder) -> Cursor {
        Cursor { sort: sort_value(record, order), id: record.id }
    }

    /// How many of the user's tasks the filter lets through. Without a filter it is one counter, read once.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn count(&self, user: &UserId, filter: &Filter) -> Result<u64> {
        if *filter == Filter::default() {
            return counters::read(&self.dynamodb, &self.users_table, user, Counter::StartTasks).await;
        }
        if let Some(conversation) = filter.conversation_id {
            let order = SortOrder::CreatedAtDesc;
            return Ok(
                self.list_of_conversation(user, conversation, filter, order, None, usize::MAX).await?.0.len() as u64
            );
        }
        paging::count("Query start-tasks", self.query(user, filter, BY_CREATED), TOO_MANY).await
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
        let mut pages = self
            .dynamodb
            .query()
            .table_name(&self.table)
            .index_name(BY_CONVERSATION)
            .key_condition_expression("conversation_key = :conversation")
            .expression_attribute_values(":conversation", text(user.key_of(&id::hex(conversation))))
            .into_paginator()
            .items()
            .send();
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

    fn query(
        &self,
        user: &UserId,
        filter: &Filter,
        index: &str,
    ) -> aws_sdk_dynamodb::operation::query::builders::QueryFluentBuilder {
        let query = self
            .dynamodb
            .query()
            .table_name(&self.table)
            .index_name(index)
            .expression_attribute_names("#user", "user")
            .expression_attribute_values(":user", text(user.as_str()));
        let Some(earliest) = filter.created_at_gte else { return query.key_condition_expression("#user = :user") };
        if index == BY_CREATED {
            query
                .key_condition_expression("#user = :user AND created_sort >= :earliest")
                .expression_attribute_values(":earliest", text(earliest.sortable()))
        } else {
            query
                .key_condition_expression("#user = :user")
                .filter_expression("created_at >= :earliest")
                .expression_attribute_values(":earliest", text(earliest.sortable()))
        }
    }

    /// Claims an unfinished task for `lease`, unless another worker has it.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn claim(&self, user: &UserId, id: Uuid, worker: &str, lease: Duration) -> Result<Claim> {
        let now = Time::now();
        let claimed = self
            .lease_update(user, id, worker, now.plus(lease))
            // Until it is released, or gets on: a worker that dies does neither.
            .update_expression(format!("{LEASE_UPDATE} ADD open_claims :one"))
            .expression_attribute_values(":one", number(1))
            .condition_expression("attribute_exists(unfinished_shard) AND (attribute_not_exists(lease_until) OR lease_until < :now OR lease_owner = :worker)")
            .expression_attribute_values(":now", text(now.sortable()))
            .return_values(ReturnValue::AllNew)
            .send()
            .await
            .map_err(store_error("UpdateItem start-tasks"));
        match claimed {
            Ok(answer) => {
                let item = answer.attributes.ok_or_else(|| Error::internal("a claimed task came back empty"))?;
                match self.open(from_item(item)?).await {
                    Ok(task) => Ok(Claim::Claimed(Box::new(task))),
                    Err(error) => {
                        // This worker lives: its claim must not count as the death of one.
                        let released = self.release(user, id, worker, now, Change::default()).await;
                        if let Err(error) = released {
                            tracing::warn!(task = %id, error = %error.context(), "start.not_released");
                        }
                        Err(error)
                    }
                }
            }
            Err(error) if is_condition_failure(&error) => Ok(match self.get(user, id).await? {
                None => Claim::Unknown,
                Some(record) if record.now.status.is_final() => Claim::Finished,
                Some(_) => Claim::Held,
            }),
            Err(error) => Err(error),
        }
    }

    /// Renews a lease.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn renew(&self, user: &UserId, id: Uuid, worker: &str, lease: Duration) -> Result<Result<(), LeaseLost>> {
        let renewed = self
            .lease_update(user, id, worker, Time::now().plus(lease))
            .condition_expression("attribute_exists(unfinished_shard) AND lease_owner = :worker")
            .send()
            .await
            .map_err(store_error("UpdateItem start-tasks"));
        held(renewed)
    }

    fn lease_update(
        &self,
        user: &UserId,
        id: Uuid,
        worker: &str,
        until: Time,
    ) -> aws_sdk_dynamodb::operation::update_item::builders::UpdateItemFluentBuilder {
        self.dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(user, id)))
            .update_expression(LEASE_UPDATE)
            .expression_attribute_values(":worker", text(worker))
            .expression_attribute_values(":until", text(until.sortable()))
            .expression_attribute_values(":due", text(until.plus(FORGOTTEN_AFTER).sortable()))
    }

    /// Writes a change of a task that `worker` has.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn save(&self, user: &UserId, id: Uuid, worker: &str, change: &Change) -> Result<Result<(), LeaseLost>> {
        let (expression, names, values) = change.expression();
        let saved = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(user, id)))
            .update_expression(expression)
            .condition_expression("lease_owner = :worker")
            .set_expression_attribute_names((!names.is_empty()).then_some(names))
            .set_expression_attribute_values(Some(values))
            .expression_attribute_values(":worker", text(worker))
            .send()
            .await
            .map_err(store_error("UpdateItem start-tasks"));
        held(saved)
    }

    /// Gives a task back, to be looked at again at `wake_at`.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn release(
        &self,
        user: &UserId,
        id: Uuid,
        worker: &str,
        wake_at: Time,
        change: Change,
    ) -> Result<Result<(), LeaseLost>> {
        let change = change
            .set("due_at", text(wake_at.plus(FORGOTTEN_AFTER).sortable()))
            .set("open_claims", number(0))
            .remove("lease_owner")
            .remove("lease_until");
        self.save(user, id, worker, &change).await
    }

    /// Writes a change together with others, all or nothing; `LeaseLost` also when one of their conditions failed.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn save_with(
        &self,
        user: &UserId,
        id: Uuid,
        worker: &str,
        change: &Change,
        others: impl IntoIterator<Item = TransactWriteItem>,
    ) -> Result<Result<(), LeaseLost>> {
        let (expression, names, mut values) = change.expression();
        values.insert(":worker".to_owned(), text(worker));
        let update = Update::builder()
            .table_name(&self.table)
            .set_key(Some(key(user, id)))
            .update_expression(expression)
            .condition_expression("lease_owner = :worker")
            .set_expression_attribute_names((!names.is_empty()).then_some(names))
            .set_expression_attribute_values(Some(values))
            .build()
            .map_err(Error::internal)?;
        let mut items: Vec<TransactWriteItem> = others.into_iter().collect();
        items.push(TransactWriteItem::builder().update(update).build());
        let saved = transact(&self.dynamodb, items, "TransactWriteItems start-tasks").await;
        held(saved)
    }

    /// The index of unfinished tasks. Those are due whose lease or wait has run out: nobody is about to look at them.
    #[must_use]
    pub fn unfinished(&self) -> DueIndex {
        DueIndex {
            dynamodb: self.dynamodb.clone(),
            table: self.table.clone(),
            index: UNFINISHED,
            shard_attribute: "unfinished_shard",
            shards: SHARDS.chars().map(String::from).collect(),
            sort_key: "id",
        }
    }

    /// Whether an unfinished start of the user is going to run in this sandbox.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn is_bound_for(&self, user: &UserId, sandbox_id: &str) -> Result<bool> {
        let mut pages = self
            .query(
                user,
                &Filter { created_at_gte: Some(Time::now().minus(LONGEST_START)), ..Filter::default() },
                BY_CREATED,
            )
            .filter_expression(
                "attribute_exists(unfinished_shard) AND (sandbox_id = :sandbox OR new_sandbox_id = :sandbox)",
            )
            .expression_attribute_values(":sandbox", text(sandbox_id))
            .select(Select::Count)
            .into_paginator()
            .send();
        while let Some(page) = pages.next().await {
            if page.map_err(store_error("Query start-tasks"))?.count > 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Removes the tasks that made a conversation ready, with their requests; again when it was cut off.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn delete_of_conversation(&self, user: &UserId, conversation: Uuid) -> Result<()> {
        let mut pages = self
            .dynamodb
            .query()
            .table_name(&self.table)
            .index_name(BY_CONVERSATION)
            .key_condition_expression("conversation_key = :conversation")
            .expression_attribute_values(":conversation", text(user.key_of(&id::hex(conversation))))
            .into_paginator()
            .items()
            .send();
        while let Some(item) = pages.next().await {
            let record: StartTaskRecord = from_item(item.map_err(store_error("Query start-tasks"))?)?;
            // Before the row: without it nobody would find the object.
            if let Some(object) = &record.request_object {
                let removed = self.s3.delete_object().bucket(&self.bucket).key(object).send().await;
                removed.map_err(store_error("DeleteObject start-requests"))?;
            }
            self.delete(user, record.id).await?;
        }
        Ok(())
    }

    /// Removes a row and takes it off the count, once.
    async fn delete(&self, user: &UserId, id: Uuid) -> Result<()> {
        let delete = Delete::builder()
            .table_name(&self.table)
            .set_key(Some(key(user, id)))
            .condition_expression("attribute_exists(id)")
            .build()
            .map_err(Error::internal)?;
        let writes = vec![
            TransactWriteItem::builder().delete(delete).build(),
            counters::add(&self.users_table, user, &[(Counter::StartTasks, -1)])?,
        ];
        match transact(&self.dynamodb, writes, "TransactWriteItems start-tasks").await {
            // Somebody else removed it.
            Err(error) if !is_condition_failure(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Ends an unfinished task with ERROR whoever has it. False when it is finished already, or unknown.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn give_up(&self, user: &UserId, id: Uuid, detail: &str) -> Result<bool> {
        let Some(record) = self.get(user, id).await? else { return Ok(false) };
        let snapshot = Snapshot {
            status: StartStatus::Error,
            updated_at: Time::now(),
            detail: Some(detail.to_owned()),
            ..record.now
        };
        let (expression, names, values) = Change::default().state(id, &snapshot)?.finished().expression();
        let ended = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(user, id)))
            .update_expression(expression)
            .condition_expression("attribute_exists(unfinished_shard)")
            .set_expression_attribute_names(Some(names))
            .set_expression_attribute_values(Some(values))
            .send()
            .await
            .map_err(store_error("UpdateItem start-tasks"));
        match ended {
            Ok(_) => Ok(true),
            Err(error) if is_condition_failure(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The change that makes a task READY.
    ///
    /// # Errors
    /// [`Error::Internal`] when the snapshot has no form as an item.
    pub fn ready(user: &UserId, id: Uuid, conversation: Uuid, snapshot: &Snapshot) -> Result<Change> {
        let conversation = text(user.key_of(&id::hex(conversation)));
        Ok(Change::default().state(id, snapshot)?.set("conversation_key", conversation).finished())
    }

    /// Opens the request of a record by its [`StartTaskRecord::request_object`].
    async fn open_request(&self, key: Option<String>) -> Result<OpenRequest> {
        let Some(key) = key else { return Ok(OpenRequest::Inline) };
        let object = objects::open(&self.s3, &self.bucket, &key, "GetObject start-requests").await?;
        Ok(object.map_or(OpenRequest::Missing, |object| OpenRequest::Object(Box::new(object))))
    }

    /// The short form of a record's request.
    async fn abridged_request(&self, record: &StartTaskRecord) -> Result<Box<RawValue>> {
        let Some(key) = &record.request_object else { return Ok(raw(abridged(&record.request))) };
        if !record.request.is_empty() {
            return Ok(raw(record.request.clone()));
        }
        // A record of an earlier version has none.
        let request = objects::read_text(&self.s3, &self.bucket, key, "GetObject start-requests").await?;
        Ok(request.map_or_else(missing_request, |request| raw(abridged(&request))))
    }

    /// A record that was read from the store, with its whole request.
    async fn open(&self, mut record: StartTaskRecord) -> Result<StartTask> {
        if let Some(key) = &record.request_object {
            let request = objects::read_text(&self.s3, &self.bucket, key, "GetObject start-requests").await?;
            record.request = request.ok_or_else(|| Error::internal("the request of a start is not in the bucket"))?;
        }
        let mut request: StartRequest = serde_json::from_str(&record.request)
            .map_err(|error| Error::internal(format!("a stored start request does not read: {error}")))?;
        if let Some(sealed) = &record.secrets_sealed {
            let json = self.sealer.open(&secrets_purpose(&record.user, record.id), sealed).await?;
            let secrets: HashMap<String, String> = serde_json::from_str(json.expose_secret())
                .map_err(|_| Error::internal("sealed secrets of a start do not read"))?;
            request.secrets = Some(secrets.into_iter().map(|(name, value)| (name, value.into())).collect());
        }
        Ok(StartTask { record, request })
    }

    async fn seal_secrets(&self, user: &UserId, id: Uuid, request: &StartRequest) -> Result<Option<String>> {
        let Some(secrets) = &request.secrets else { return Ok(None) };
        let exposed: HashMap<&str, &str> =
            secrets.values().map(|(name, value)| (name, value.expose_secret())).collect();
        if exposed.is_empty() {
            return Ok(None);
        }
        let json = SecretString::from(serde_json::to_string(&exposed).map_err(Error::internal)?);
        self.sealer.seal(&secrets_purpose(user, id), &json).await.map(Some)
    }
}

/// A record in its first state, with nothing chosen yet. Secrets of the request are masked in it.
fn record(user: &UserId, id: Uuid, now: Snapshot, created_at: Time, request: &StartRequest) -> Result<StartTaskRecord> {
    Ok(StartTaskRecord {
        user: user.clone(),
        id,
        history: vec![now.clone()],
        conversation_id: now.app_conversation_id.or(request.conversation_id).unwrap_or_default(),
        now,
        created_at,
        new_sandbox_id: String::new(),
        notes: Vec::new(),
        browser: None,
        mcp_servers_left_out: Vec::new(),
        command: None,
        failure: None,
        attempts: 0,
        refusals: 0,
        open_claims: 0,
        deadline: None,
        request: serde_json::to_string(request).map_err(Error::internal)?,
        request_object: None,
        secrets_sealed: None,
    })
}

/// The request of a record that was read from the store.
enum OpenRequest {
    /// It is in the record.
    Inline,
    /// It is in the bucket.
    Object(Box<GetObjectOutput>),
    /// It was in the bucket.
    Missing,
}

/// Reads the request of a record; `None` when it takes more than `room` bytes of an answer.
async fn read_request(record: &StartTaskRecord, request: OpenRequest, room: u64) -> Result<Option<Box<RawValue>>> {
    let request = match request {
        OpenRequest::Object(object) if objects::length(&object) > room => return Ok(None),
        OpenRequest::Object(object) => objects::text(*object, "GetObject start-requests").await?,
        // The task is being deleted; its request goes first.
        OpenRequest::Missing if record.request.is_empty() => return Ok(Some(missing_request())),
        OpenRequest::Inline | OpenRequest::Missing => record.request.clone(),
    };
    Ok((page::size_of_text(request.as_bytes()) <= room).then(|| raw(request)))
}

/// What a task shows whose request is gone.
fn missing_request() -> Box<RawValue> {
    raw(serde_json::to_string(&StartRequest::default()).unwrap_or_default())
}

fn held<T>(written: Result<T>) -> Result<Result<(), LeaseLost>> {
    match written {
        Ok(_) => Ok(Ok(())),
        Err(error) if is_condition_failure(&error) => Ok(Err(LeaseLost)),
        Err(error) => Err(error),
    }
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

fn sort_key(at: Time, id: Uuid) -> String {
    format!("{}#{}", at.sortable(), id::hex(id))
}

fn shard(id: Uuid) -> String {
    id::hex(id)[..1].to_owned()
}

fn key(user: &UserId, id: Uuid) -> Item {
    Item::from([("user".into(), text(user.as_str())), ("id".into(), text(id::hex(id)))])
}

fn secrets_purpose(user: &UserId, id: Uuid) -> String {
    format!("start-secrets:{user}:{}", id::hex(id))
}

/// An attempt counter as an attribute.
#[must_use]
pub fn attempts(count: u32) -> AttributeValue {
    number(count)
}
