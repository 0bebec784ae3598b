//! The DynamoDB store of start tasks. Workers share it: a worker must hold the lease on a task to write its progress.
//!
//! A start has two rows:
//!
//! - the task's own row, `<id>`: all that its user sees, with the request and the history. It is in the indexes of lists, and changes only
//!   with the task's state.
//! - the lease row, `<id>#lease`: what workers change while the start goes on ([`LEASE_ATTRIBUTES`]). It is narrow, and is only in the
//!   index of unfinished tasks. A READY task has none; that of a failed task stays until the task is removed.
//!
//! Earlier versions had all attributes in one row. Their rows of READY tasks are read as they are. An unfinished one is moved to this
//! layout as follows: `user`, `id` with [`LEASE_SUFFIX`], `unfinished_shard` and all [`LEASE_ATTRIBUTES`] that it has become the lease
//! row, and are removed from the task's own row, except for `user` and `id`; `deadline` is set where it is missing; the user's counter
//! `unfinished_starts` grows by one. An ERROR row that a worker has written gets
//! a lease row with `unfinished_shard`, `expires_at` and, for the sweep, `due_at`; without one it does not expire.

mod change;
mod import;
mod lease;
mod list;
mod requests;
mod unfinished;

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::TransactWriteItem;
use serde::Deserialize;
use uuid::Uuid;

pub use change::{Change, attempts};
pub use import::{IMPORT_LIMIT, ImportedTask};
pub use lease::{Abandoned, Claim, FAILED_STARTS_EXPIRE, LeaseLost};
pub use list::{Cursor, Filter, SortOrder};
pub use unfinished::UnfinishedStart;

use super::abridged::abridged;
use super::identity::StartIdentity;
use super::request::StartRequest;
use super::task::{Snapshot, StartStatus, StartTaskRecord};
use crate::clock::Time;
use crate::dynamo::{
    Cancellation, Condition, DueIndex, Item, Table, Transacted, from_item, store_error, text, to_item, transact,
    unless_written,
};
use crate::error::{Error, Result, StoreErrorKind};
use crate::id::{self, UserId};
use crate::trace::TraceId;
use crate::user::counters::{self, Counter, Recount, SubCounter};
use crate::user::seal::Sealer;

/// Index: a user's tasks by creation time.
pub const BY_CREATED: &str = "by-created";
/// Index: a user's tasks by last change. Its entries have the time of creation, for filters.
pub const BY_UPDATED: &str = "by-updated";
/// The time of creation.
pub const CREATED_AT: &str = "created_at";
/// Index: tasks that made a conversation ready.
pub const BY_CONVERSATION: &str = "by-conversation";
/// Index: unfinished tasks, by the due time at which the sweep enqueues their jobs again. Sparse; in [`SHARDS`] partitions.
pub const UNFINISHED: &str = "unfinished";

/// Partitions of the index of unfinished tasks: the first hex digit of the task's id.
pub const SHARDS: &str = "0123456789abcdef";

/// Requests with more bytes are stored in the bucket, because every update of the record is charged by the record's size.
const INLINE_REQUEST_LIMIT: usize = 8 * 1024;

/// The delay between the end of a lease or a wait and the task's due time for the sweep.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(2);

/// The suffix of a lease row's `id`.
pub const LEASE_SUFFIX: &str = "#lease";

/// The attributes of the lease row, besides its keys, [`UNFINISHED_SHARD`] and those that are in both rows.
pub const LEASE_ATTRIBUTES: [&str; 13] = [
    "due_at",
    "lease_owner",
    "lease_until",
    "last_write",
    "open_claims",
    "claims",
    "attempts",
    "refusals",
    "waits",
    "command",
    "compensation",
    "compensation_attempts",
    "expires_at",
];

/// The trace of the request. It is in both rows, as is [`CREATED_AT`].
const TRACE: &str = "trace";

/// The attribute that puts a task into the index of unfinished tasks.
const UNFINISHED_SHARD: &str = "unfinished_shard";

/// The name of the call that creates a task, for the log.
const CREATE: &str = "TransactWriteItems start-tasks";

/// When a request that exceeds the limit of unfinished starts may be repeated.
const RETRY_AFTER: Duration = Duration::from_secs(10);

/// What a new task has besides its request.
#[derive(Clone, Debug)]
pub struct NewStart {
    pub identity: StartIdentity,
    /// The time limit of the first step.
    pub deadline: Time,
    /// The user's unfinished starts at which no more are created, see [`counters::add_below`].
    pub max_unfinished: u32,
    /// The write by which the start joins the sandbox that its request names. If its condition fails, because there is no such sandbox, the
    /// task is created without it, and the first step ends the start.
    pub membership: Option<TransactWriteItem>,
    /// The trace of the request.
    pub trace: Option<TraceId>,
}

/// The store of all start task records.
#[derive(Clone, Debug)]
pub struct StartTaskStore {
    table: Table,
    users: Table,
    s3: aws_sdk_s3::Client,
    bucket: String,
    sealer: Sealer,
}

impl StartTaskStore {
    /// Creates a store on the `start-tasks` table, with its counter in `users` and large requests in `bucket`.
    #[must_use]
    pub fn new(
        dynamodb: Client,
        table: String,
        users_table: String,
        s3: aws_sdk_s3::Client,
        bucket: String,
        sealer: Sealer,
    ) -> Self {
        let (table, users) = (Table::new(dynamodb.clone(), table), Table::new(dynamodb, users_table));
        Self { table, users, s3, bucket, sealer }
    }

    /// Returns the task that an earlier request with the same idempotency key has created, if there is one.
    ///
    /// # Errors
    /// [`Error::Conflict`] when that was another request; [`Error::Store`].
    pub async fn find(&self, user: &UserId, identity: &StartIdentity) -> Result<Option<StartTaskRecord>> {
        let Some(digest) = &identity.digest else { return Ok(None) };
        let Some(record) = self.get(user, identity.task).await? else { return Ok(None) };
        match &record.digest_sealed {
            Some(sealed) if self.is_digest(user, identity.task, sealed, digest).await? => Ok(Some(record)),
            _ => Err(Error::Conflict(
                "This Idempotency-Key was used for another request; send the same body, or use a new key".into(),
            )),
        }
    }

    /// Stores a new task in state WORKING. After that it ends in READY or ERROR, even if workers crash. If an earlier request with the same
    /// idempotency key has created the task, it is returned and nothing is stored.
    ///
    /// # Errors
    /// [`Error::Saturated`] when the user has too many unfinished starts; [`Error::Conflict`] when the key was used for another request;
    /// [`Error::Store`].
    pub async fn create(&self, user: &UserId, request: &StartRequest, new: &NewStart) -> Result<StartTaskRecord> {
        let created_at = Time::now();
        let id = new.identity.task;
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
            deadline: Some(new.deadline),
            conversation_id,
            // As in the reference, a conversation with a given id gets a sandbox of the same id.
            new_sandbox_id: request.conversation_id.map_or_else(id::new_sandbox_id, id::hex),
            given_sandbox_id: new.membership.as_ref().and(request.sandbox_id.clone()),
            secrets_sealed: self.seal_secrets(user, id, request).await?,
            digest_sealed: self.seal_digest(user, id, new.identity.digest.as_deref()).await?,
            trace: new.trace.clone(),
            ..record(user, id, now, created_at, request)?
        };
        let item = self.item(&mut record).await?;
        let mut lease = lease_key(user, id);
        lease.insert(UNFINISHED_SHARD.into(), text(shard(id)));
        lease.insert("due_at".into(), text(created_at.plus(FORGOTTEN_AFTER).sortable()));
        // For the gauges of the sweep and for the log.
        lease.insert(CREATED_AT.into(), text(created_at.sortable()));
        if let Some(trace) = &new.trace {
            lease.insert(TRACE.into(), text(trace.to_string()));
        }
        let limit = (Counter::UnfinishedStarts, new.max_unfinished);
        let count = counters::add_below(&self.users, user, SubCounter::of(id), &CREATED, limit)?;
        let writes = vec![self.put_new(item)?, self.put_new(lease)?, count];
        let written = match self.transact_with_membership(writes, new.membership.clone()).await {
            Ok(Transacted::ConditionFailed(reasons)) => {
                if let Some(object) = &record.request_object {
                    self.delete_orphan(object).await;
                }
                if reasons.first() == Some(&Cancellation::None) {
                    return Err(saturated(new.max_unfinished));
                }
                // A concurrent request with the same key has created the task.
                let found = self.find(user, &new.identity).await?;
                return found.ok_or_else(|| Error::internal("a new start has the id of an existing one"));
            }
            written => written.and_then(|written| written.require(CREATE)),
        };
        // If the outcome of the write is unknown, the row is read. Without that check a client that retries would create a second start.
        let is_own = |found: StartTaskRecord| found.created_at == created_at;
        unless_written(written, async || Ok(self.get(user, id).await?.is_some_and(is_own))).await?;
        Ok(record)
    }

    /// Writes a new task together with its membership in a sandbox, if that is possible, otherwise without.
    async fn transact_with_membership(
        &self,
        writes: Vec<TransactWriteItem>,
        membership: Option<TransactWriteItem>,
    ) -> Result<Transacted> {
        let Some(membership) = membership else { return transact(&self.table.client, writes, CREATE).await };
        let with_membership = writes.iter().cloned().chain([membership]).collect();
        match transact(&self.table.client, with_membership, CREATE).await {
            Ok(Transacted::ConditionFailed(reasons))
                if !reasons.iter().take(writes.len()).any(|reason| *reason == Cancellation::ConditionFailed) => {}
            // Nothing was written. Many starts may join one sandbox at the same time, and those that succeed keep it.
            Err(Error::Store(error)) if error.kind() == StoreErrorKind::Conflict => {}
            transacted => return transacted,
        }
        transact(&self.table.client, writes, CREATE).await
    }

    /// Removes the object of a request whose task was not created. If this fails, the object stays without a row.
    async fn delete_orphan(&self, object: &str) {
        if let Err(error) = self.delete_request(object).await {
            tracing::warn!(object, error = %error.context(), "start.request_not_removed");
        }
    }

    fn put_new(&self, item: Item) -> Result<TransactWriteItem> {
        self.table.put_in_transaction(item, &Condition::Missing("id"))
    }

    /// Converts a new record to an item, with the attributes that indexes need. Stores a large request in the bucket.
    async fn item(&self, record: &mut StartTaskRecord) -> Result<Item> {
        let mut item = to_item(record)?;
        if record.request.len() > INLINE_REQUEST_LIMIT {
            // The object is written before the row, so that no row lacks its request. No one reads an object without a row.
            let key = self.put_request(record).await?;
            item.insert("request".into(), text(abridged(&record.request)));
            item.insert("request_object".into(), text(&key));
            record.request_object = Some(key);
        }
        item.retain(|name, _| !LEASE_ATTRIBUTES.contains(&name.as_str()));
        item.insert("created_sort".into(), text(sort_key(record.created_at, record.id)));
        item.insert("updated_sort".into(), text(sort_key(record.now.updated_at, record.id)));
        if let Some(conversation) = record.now.app_conversation_id {
            item.insert("conversation_key".into(), text(record.user.key_of(&id::hex(conversation))));
        }
        Ok(item)
    }

    /// Returns records in the order of the ids, `None` for ids that the user does not have. It does not read requests in the bucket.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn batch_get(&self, user: &UserId, ids: &[Uuid]) -> Result<Vec<Option<StartTaskRecord>>> {
        let mut found = HashMap::new();
        let wanted: BTreeSet<Uuid> = ids.iter().copied().collect();
        for item in self.table.batch_get(wanted.into_iter().map(|id| key(user, id)).collect()).await? {
            let record: StartTaskRecord = from_item(item)?;
            found.insert(record.id, record);
        }
        Ok(ids.iter().map(|id| found.get(id).cloned()).collect())
    }

    /// Returns one record.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn get(&self, user: &UserId, id: Uuid) -> Result<Option<StartTaskRecord>> {
        Ok(self.batch_get(user, &[id]).await?.pop().flatten())
    }

    /// Returns the states of a task, oldest first.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn history(&self, user: &UserId, id: Uuid) -> Result<Option<Vec<Snapshot>>> {
        #[derive(Deserialize)]
        struct Row {
            #[serde(default)]
            history: Vec<Snapshot>,
        }
        let rows = self.table.batch_get_attribute(vec![key(user, id)], "history").await?;
        rows.into_iter().next().map(|row| from_item(row).map(|row: Row| row.history)).transpose()
    }

    /// The index of unfinished tasks. A task is due after its lease or its wait has ended, when no worker is about to continue it.
    #[must_use]
    pub fn unfinished(&self) -> DueIndex {
        DueIndex {
            table: self.table.clone(),
            index: UNFINISHED,
            shard_attribute: UNFINISHED_SHARD,
            shards: SHARDS.chars().map(String::from).collect(),
            sort_key: "id",
            has_uuids: true,
        }
    }

    /// Removes the tasks that made a conversation ready, with their requests. It is idempotent, so it can be repeated after an
    /// interruption.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn delete_of_conversation(&self, user: &UserId, conversation: Uuid) -> Result<()> {
        let ids = self.ids_of_conversation(user, conversation).await?;
        for item in self.table.batch_get(ids.into_iter().map(|id| key(user, id)).collect()).await? {
            let record: StartTaskRecord = from_item(item)?;
            // The object is removed before the row, because only the row refers to it.
            if let Some(object) = &record.request_object {
                self.delete_request(object).await?;
            }
            self.delete(user, record.id, Condition::Exists("id"), None).await?;
        }
        Ok(())
    }

    /// Removes a failed task, with its request, unless what it made has not been undone yet. Returns whether it no longer exists.
    ///
    /// # Errors
    /// [`Error::Store`]; the call may be repeated.
    pub async fn remove_failed(&self, user: &UserId, record: &StartTaskRecord) -> Result<bool> {
        if record.compensation.is_some() {
            return Ok(false);
        }
        // The object is removed before the row, because only the row refers to it.
        if let Some(object) = &record.request_object {
            self.delete_request(object).await?;
        }
        let is_unchanged = Condition::equal("updated_sort", text(sort_key(record.now.updated_at, record.id)));
        let is_compensated = Condition::Missing("compensation");
        self.delete(user, record.id, is_unchanged, Some(&is_compensated)).await
    }

    /// Counts the user's tasks, strongly consistent.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn recount(&self, user: &UserId, recount: &mut Recount) -> Result<()> {
        let mut rows = self
            .table
            .query()
            .key_condition_expression("#user = :user")
            // Lease rows have no status.
            .filter_expression("attribute_exists(#status)")
            .projection_expression("id, #status, deadline")
            .expression_attribute_names("#user", "user")
            .expression_attribute_names("#status", "status")
            .expression_attribute_values(":user", text(user.as_str()))
            .consistent_read(true)
            .into_paginator()
            .items()
            .send();
        while let Some(row) = rows.next().await {
            let row: CountedRow = from_item(row.map_err(store_error("Query start-tasks"))?)?;
            recount.add(row.id, Counter::StartTasks);
            // An imported task has no deadline, whatever its status.
            if !row.status.is_final() && row.deadline.is_some() {
                recount.add(row.id, Counter::UnfinishedStarts);
            }
        }
        Ok(())
    }

    /// Removes a task's row on a condition, and with a further condition its lease row, and decrements the counter once. Returns whether
    /// the rows no longer exist.
    async fn delete(&self, user: &UserId, id: Uuid, condition: Condition, lease: Option<&Condition>) -> Result<bool> {
        let mut writes = vec![
            self.table.delete_in_transaction(key(user, id), Some(&condition))?,
            counters::add(&self.users, user, SubCounter::of(id), &[(Counter::StartTasks, -1)])?,
        ];
        if lease.is_some() {
            writes.push(self.table.delete_in_transaction(lease_key(user, id), lease)?);
        }
        if transact(&self.table.client, writes, "TransactWriteItems start-tasks").await?.is_written() {
            return Ok(true);
        }
        // Another worker may have removed the row.
        Ok(self.get(user, id).await?.is_none())
    }
}

/// What a new task adds to the user's counters.
const CREATED: [(Counter, i64); 2] = [(Counter::StartTasks, 1), (Counter::UnfinishedStarts, 1)];

/// The attributes of a row that [`StartTaskStore::recount`] needs.
#[derive(Deserialize)]
struct CountedRow {
    #[serde(with = "id::as_hex")]
    id: Uuid,
    status: StartStatus,
    deadline: Option<String>,
}

fn saturated(limit: u32) -> Error {
    let message = format!(
        "You have too many unfinished starts (the limit is about {limit}). Wait until some have ended, or cancel some, and try again"
    );
    Error::Saturated { message, retry_after: RETRY_AFTER }
}

/// Creates a record in its first state, without the ids that the start will use. Secrets of the request are masked.
fn record(user: &UserId, id: Uuid, now: Snapshot, created_at: Time, request: &StartRequest) -> Result<StartTaskRecord> {
    Ok(StartTaskRecord {
        user: user.clone(),
        id,
        history: vec![now.clone()],
        conversation_id: now.app_conversation_id.or(request.conversation_id).unwrap_or_default(),
        now,
        created_at,
        new_sandbox_id: String::new(),
        given_sandbox_id: None,
        notes: Vec::new(),
        browser: None,
        mcp_servers_left_out: Vec::new(),
        command: None,
        attempts: 0,
        refusals: 0,
        waits: 0,
        open_claims: 0,
        claims: 0,
        compensation: None,
        compensation_attempts: 0,
        failure: None,
        deadline: None,
        request: serde_json::to_string(request).map_err(Error::internal)?,
        request_object: None,
        secrets_sealed: None,
        digest_sealed: None,
        trace: None,
    })
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

/// The key of a task's lease row.
fn lease_key(user: &UserId, id: Uuid) -> Item {
    let id = format!("{}{LEASE_SUFFIX}", id::hex(id));
    Item::from([("user".into(), text(user.as_str())), ("id".into(), text(id))])
}
