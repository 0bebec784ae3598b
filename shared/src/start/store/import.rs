//! Import of start tasks from another server.

use std::collections::{BTreeSet, HashSet};
use std::time::Duration;

use aws_sdk_dynamodb::types::TransactWriteItem;
use futures::future::try_join_all;
use uuid::Uuid;

use super::{StartTaskStore, key, record};
use crate::clock::Time;
use crate::dynamo::{Backoff, Item, TRANSACTION_LIMIT, Transacted, transact};
use crate::error::Result;
use crate::id::UserId;
use crate::start::request::StartRequest;
use crate::start::task::Snapshot;
use crate::user::counters::{self, Counter, SubCounter};

/// The largest number of tasks in one [`StartTaskStore::import`]: one transaction, with the counter.
pub const IMPORT_LIMIT: usize = TRANSACTION_LIMIT - 1;

/// Retries of an import while concurrent writers add tasks with the same ids.
const IMPORT: Backoff = Backoff { first: Duration::from_millis(40), longest: Duration::from_millis(200), attempts: 3 };

/// A start task of another server, finished or not. It is stored only to be listed; no worker continues it, whatever its status.
#[derive(Clone, Debug)]
pub struct ImportedTask {
    pub id: Uuid,
    pub now: Snapshot,
    /// The time of the request.
    pub created_at: Time,
    /// The request. Only the names of its secrets are stored, not the values.
    pub request: StartRequest,
}

impl StartTaskStore {
    /// Adds tasks of another server and counts them, at most [`IMPORT_LIMIT`] at once. Returns for each task whether it was added; a task
    /// with an existing id is skipped. No worker claims these tasks, because they are not in the index of unfinished tasks.
    ///
    /// # Errors
    /// [`crate::Error::Store`]; then no task was added.
    pub async fn import(&self, user: &UserId, tasks: &[ImportedTask]) -> Result<Vec<bool>> {
        const OPERATION: &str = "TransactWriteItems start-tasks";
        let mut attempts = IMPORT.start();
        loop {
            attempts.next().await;
            let mut taken = self.taken(user, tasks.iter().map(|task| task.id)).await?;
            // Of several tasks with the same id, the first one is added.
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
            let first = tasks.iter().zip(&new).find_map(|(task, new)| new.then_some(task.id)).unwrap_or_default();
            writes.push(counters::add(&self.users, user, SubCounter::of(first), &[(Counter::StartTasks, count)])?);
            match transact(&self.table.client, writes, OPERATION).await? {
                Transacted::Written => return Ok(new),
                failed if attempts.is_last() => return failed.require(OPERATION).map(|()| Vec::new()),
                // A concurrent writer has added a task with one of the ids.
                Transacted::ConditionFailed(_) => {}
            }
        }
    }

    /// The ids that already have a row.
    async fn taken(&self, user: &UserId, ids: impl Iterator<Item = Uuid>) -> Result<HashSet<Uuid>> {
        let ids: BTreeSet<Uuid> = ids.collect();
        let items = self.table.batch_get(ids.into_iter().map(|id| key(user, id)).collect()).await?;
        let id = |item: &Item| Uuid::parse_str(item.get("id")?.as_s().ok()?).ok();
        Ok(items.iter().filter_map(id).collect())
    }
}
