//! The DynamoDB store of start tasks. Workers share it: a worker must hold the lease on a task to write its progress.

mod change;
mod import;
mod lease;
mod list;
mod requests;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{Select, TransactWriteItem};
use uuid::Uuid;

pub use change::{Change, attempts};
pub use import::{IMPORT_LIMIT, ImportedTask};
pub use lease::{Claim, LeaseLost};
pub use list::{Cursor, Filter, SortOrder};

use super::abridged::abridged;
use super::request::StartRequest;
use super::task::{Snapshot, StartStatus, StartTaskRecord};
use crate::clock::Time;
use crate::dynamo::{
    Condition, DueIndex, Item, Table, from_item, store_error, text, to_item, transact, unless_written,
};
use crate::error::{Error, Result};
use crate::id::{self, UserId};
use crate::user::counters::{self, Counter};
use crate::user::seal::Sealer;

/// Index: a user's tasks by creation time.
pub const BY_CREATED: &str = "by-created";
/// Index: a user's tasks by last change.
pub const BY_UPDATED: &str = "by-updated";
/// Index: tasks that made a conversation ready.
pub const BY_CONVERSATION: &str = "by-conversation";
/// Index: unfinished tasks, by the due time at which the sweep enqueues their jobs again. Sparse; in [`SHARDS`] partitions.
pub const UNFINISHED: &str = "unfinished";

/// Partitions of the index of unfinished tasks: the first hex digit of the task's id.
pub const SHARDS: &str = "0123456789abcdef";

/// Requests with more bytes are stored in the bucket, because every update of the record is charged by the record's size.
const INLINE_REQUEST_LIMIT: usize = 8 * 1024;

/// An upper bound of a start's duration; every step has a deadline.
const LONGEST_START: Duration = Duration::from_secs(24 * 3600);

/// The delay between the end of a lease or a wait and the task's due time for the sweep.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(2);

/// The attribute that puts a task into the index of unfinished tasks.
const UNFINISHED_SHARD: &str = "unfinished_shard";

/// The name of the call that creates a task, for the log.
const CREATE: &str = "TransactWriteItems start-tasks";

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

    /// Stores a new task in state WORKING. After that it ends in READY or ERROR, even if workers crash. The create is idempotent towards
    /// the SDK: after a lost response a read shows whether the task exists ([`unless_written`]).
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
        item.insert(UNFINISHED_SHARD.into(), text(shard(id)));
        item.insert("due_at".into(), text(created_at.plus(FORGOTTEN_AFTER).sortable()));
        let count = counters::add(&self.users, user, &[(Counter::StartTasks, 1)])?;
        let written = transact(&self.table.client, vec![self.put_new(item)?, count], CREATE).await;
        // If the outcome of the write is unknown, the row is read. Without that check a client that retries would create a second start.
        unless_written(written.and_then(|written| written.require(CREATE)), async || {
            Ok(self.get(user, id).await?.is_some())
        })
        .await?;
        Ok(record)
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
        let wanted: HashSet<Uuid> = ids.iter().copied().collect();
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

    /// The index of unfinished tasks. A task is due after its lease or its wait has ended, when no worker is about to continue it.
    #[must_use]
    pub fn unfinished(&self) -> DueIndex {
        DueIndex {
            table: self.table.clone(),
            index: UNFINISHED,
            shard_attribute: UNFINISHED_SHARD,
            shards: SHARDS.chars().map(String::from).collect(),
            sort_key: "id",
        }
    }

    /// Whether an unfinished start of the user uses or will use this sandbox.
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

    /// Removes the tasks that made a conversation ready, with their requests. It is idempotent, so it can be repeated after an
    /// interruption.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn delete_of_conversation(&self, user: &UserId, conversation: Uuid) -> Result<()> {
        let mut pages = self.query_of_conversation(user, conversation).into_paginator().items().send();
        while let Some(item) = pages.next().await {
            let record: StartTaskRecord = from_item(item.map_err(store_error("Query start-tasks"))?)?;
            // The object is removed before the row, because only the row refers to it.
            if let Some(object) = &record.request_object {
                self.delete_request(object).await?;
            }
            self.delete(user, record.id).await?;
        }
        Ok(())
    }

    /// Removes a row and decrements the counter once.
    async fn delete(&self, user: &UserId, id: Uuid) -> Result<()> {
        let writes = vec![
            self.table.delete_in_transaction(key(user, id), Some(&Condition::Exists("id")))?,
            counters::add(&self.users, user, &[(Counter::StartTasks, -1)])?,
        ];
        // If the condition fails, another worker has removed the row.
        let _written = transact(&self.table.client, writes, "TransactWriteItems start-tasks").await?;
        Ok(())
    }
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

fn sort_key(at: Time, id: Uuid) -> String {
    format!("{}#{}", at.sortable(), id::hex(id))
}

fn shard(id: Uuid) -> String {
    id::hex(id)[..1].to_owned()
}

fn key(user: &UserId, id: Uuid) -> Item {
    Item::from([("user".into(), text(user.as_str())), ("id".into(), text(id::hex(id)))])
}
