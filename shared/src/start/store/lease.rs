//! Leases of workers on start tasks, and the writes that require a lease.

use std::time::Duration;

use aws_sdk_dynamodb::types::TransactWriteItem;
use uuid::Uuid;

use super::{Change, FORGOTTEN_AFTER, StartTaskStore, UNFINISHED_SHARD, key};
use crate::clock::Time;
use crate::dynamo::lease::{self, Lease};
use crate::dynamo::{Condition, Outcome, Update, from_item, number, text, transact};
use crate::error::Result;
use crate::id::UserId;
use crate::start::task::{Snapshot, StartStatus, StartTask, StartTaskRecord};

/// The result of an attempt to claim a task.
#[derive(Debug)]
pub enum Claim {
    /// The caller holds the lease until it expires.
    Claimed(Box<StartTask>),
    /// Another worker holds the lease.
    Held,
    /// The task is finished.
    Finished,
    /// No task with this id exists.
    Unknown,
}

/// The caller's lease has expired, and another worker may hold it now.
#[derive(Debug, PartialEq, Eq)]
pub struct LeaseLost;

impl StartTaskStore {
    /// Claims an unfinished task for a duration, unless another worker holds the lease.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn claim(&self, user: &UserId, id: Uuid, worker: &str, duration: Duration) -> Result<Claim> {
        let lease = Lease::of(worker, duration);
        let update = due_after(&lease)
            // The counter is reset when a worker releases or advances the task. A worker that dies does neither.
            .add("open_claims", 1)
            .condition(Condition::Exists(UNFINISHED_SHARD));
        let item = match lease.claim(&self.table, key(user, id), update).await? {
            Outcome::Applied(item) => item,
            Outcome::ConditionFailed(None) => return Ok(Claim::Unknown),
            Outcome::ConditionFailed(Some(item)) => {
                let record: StartTaskRecord = from_item(item)?;
                return Ok(if record.now.status.is_final() { Claim::Finished } else { Claim::Held });
            }
        };
        let opened = self.open(from_item(item)?).await;
        if opened.is_err() {
            // This worker is alive, so its claim must not count as a death.
            if let Err(error) = self.release(user, id, worker, Time::now(), Change::default()).await {
                tracing::warn!(task = %id, error = %error.context(), "start.not_released");
            }
        }
        opened.map(|task| Claim::Claimed(Box::new(task)))
    }

    /// Renews a lease.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn renew(
        &self,
        user: &UserId,
        id: Uuid,
        worker: &str,
        duration: Duration,
    ) -> Result<Result<(), LeaseLost>> {
        let lease = Lease::of(worker, duration);
        let update = lease.renew(due_after(&lease)).condition(Condition::Exists(UNFINISHED_SHARD));
        Ok(if self.table.apply(key(user, id), update).await? { Ok(()) } else { Err(LeaseLost) })
    }

    /// Writes a change of a task; `worker` must hold the lease.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn save(&self, user: &UserId, id: Uuid, worker: &str, change: &Change) -> Result<Result<(), LeaseLost>> {
        let saved = lease::write(&self.table, key(user, id), worker, change.update()).await?;
        Ok(if saved.is_applied() { Ok(()) } else { Err(LeaseLost) })
    }

    /// Releases the lease; the task is due again at `wake_at`.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn release(
        &self,
        user: &UserId,
        id: Uuid,
        worker: &str,
        wake_at: Time,
        change: Change,
    ) -> Result<Result<(), LeaseLost>> {
        let change = change.set("due_at", text(wake_at.plus(FORGOTTEN_AFTER).sortable())).set("open_claims", number(0));
        self.save(user, id, worker, &change.map(lease::release)).await
    }

    /// Writes a change and other writes in one transaction. Returns [`LeaseLost`] also if a condition of the other writes fails.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn save_with(
        &self,
        user: &UserId,
        id: Uuid,
        worker: &str,
        change: &Change,
        others: impl IntoIterator<Item = TransactWriteItem>,
    ) -> Result<Result<(), LeaseLost>> {
        let mut items: Vec<TransactWriteItem> = others.into_iter().collect();
        items.push(lease::guard(change.update(), worker).in_transaction(&self.table.name, key(user, id))?);
        let saved = transact(&self.table.client, items, "TransactWriteItems start-tasks").await?;
        Ok(if saved.is_written() { Ok(()) } else { Err(LeaseLost) })
    }

    /// Ends an unfinished task with ERROR, regardless of leases. Returns false if it is finished or does not exist.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn give_up(&self, user: &UserId, id: Uuid, detail: &str) -> Result<bool> {
        let Some(record) = self.get(user, id).await? else { return Ok(false) };
        let snapshot = Snapshot {
            status: StartStatus::Error,
            updated_at: Time::now(),
            detail: Some(detail.to_owned()),
            ..record.now
        };
        let change = Change::default().state(id, &snapshot)?.finished();
        let update = change.update().condition(Condition::Exists(UNFINISHED_SHARD));
        Ok(self.table.update_once(key(user, id), update).await?.is_applied())
    }

    /// The change that makes a task READY.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if the snapshot cannot be serialised.
    pub fn ready(user: &UserId, id: Uuid, conversation: Uuid, snapshot: &Snapshot) -> Result<Change> {
        Change::ready(user, id, conversation, snapshot)
    }
}

/// Sets the due time to the end of the lease plus [`FORGOTTEN_AFTER`].
fn due_after(lease: &Lease) -> Update {
    Update::new().set("due_at", text(lease.until.plus(FORGOTTEN_AFTER).sortable()))
}
