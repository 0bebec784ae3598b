//! Leases of workers on start tasks, the writes that require a lease, and the ends of starts.
//!
//! The lease is in the task's lease row. A write of the task's own row is therefore a transaction that also writes the lease row, on the
//! condition that the worker holds the lease.

use std::time::Duration;

use aws_sdk_dynamodb::types::{AttributeValue, TransactWriteItem};
use uuid::Uuid;

use super::unfinished::LeaseRow;
use super::{Change, FORGOTTEN_AFTER, StartTaskStore, UNFINISHED_SHARD, key, lease_key};
use crate::clock::Time;
use crate::conversation::reports::Recorded;
use crate::dynamo::lease::{self, Lease};
use crate::dynamo::{Backoff, Condition, Item, Outcome, Update, from_item, number, text, transact};
use crate::error::{Error, Result};
use crate::id::UserId;
use crate::start::task::{Snapshot, StartStatus, StartTask, StartTaskRecord};
use crate::trace;
use crate::user::counters::{self, Counter, SubCounter};

/// How long a failed start is kept after what it made has been undone.
pub const FAILED_STARTS_EXPIRE: Duration = Duration::from_secs(30 * 24 * 3600);

/// The name of the transactions here, for the log.
const OPERATION: &str = "TransactWriteItems start-tasks";

/// Attempts to end a task whose state other writers change meanwhile.
const ABANDON: Backoff = Backoff { first: Duration::from_millis(40), longest: Duration::from_secs(1), attempts: 8 };

/// The result of an attempt to claim a task.
#[derive(Debug)]
pub enum Claim {
    /// The caller holds the lease until it expires.
    Claimed(Box<StartTask>),
    /// The start has failed, and what it made must be undone. The caller holds the lease.
    Failed(Box<StartTaskRecord>),
    /// The start has failed long ago, and its record is to be removed. The caller holds the lease.
    Expired(Box<StartTaskRecord>),
    /// Another worker holds the lease, or another job continues the task later.
    Held,
    /// The task is finished.
    Finished,
    /// No task with this id exists.
    Unknown,
}

/// The caller's lease has expired, and another worker may hold it now. Or the start was ended by its user.
#[derive(Debug, PartialEq, Eq)]
pub struct LeaseLost;

/// The result of [`StartTaskStore::abandon`].
#[derive(Debug)]
pub enum Abandoned {
    /// The start has ended with ERROR. A worker can undo what it made from `free_at` on, when the last lease ends.
    Now {
        free_at: Time,
        /// The record as it was before.
        record: Box<StartTaskRecord>,
    },
    /// It had ended before, or no worker continues it.
    Before(Box<StartTaskRecord>),
    /// No task with this id exists.
    Unknown,
}

impl StartTaskStore {
    /// Claims an unfinished task for a duration, unless another worker holds the lease, or the task is due later than the caller's job says.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn claim(
        &self,
        user: &UserId,
        id: Uuid,
        worker: &str,
        duration: Duration,
        due_at: Option<Time>,
    ) -> Result<Claim> {
        let lease = Lease::of(worker, duration);
        let has_expired = Condition::Compare(EXPIRES_AT, "<=", seconds(Time::now()));
        let update = due_after(&lease)
            // The counter is reset when a worker releases or advances the task. A worker that dies does neither.
            .add("open_claims", 1)
            .add("claims", 1)
            .condition(Condition::Exists(UNFINISHED_SHARD))
            .condition(Condition::Any(vec![Condition::Missing(EXPIRES_AT), has_expired]));
        let update = match due_at {
            Some(due_at) => update.condition(lease::is_due("due_at", due_at)),
            None => update,
        };
        let outcome = lease.claim(&self.table, lease_key(user, id), update).await?;
        if let Outcome::Applied(row) | Outcome::ConditionFailed(Some(row)) = &outcome {
            record_trace(id, row);
        }
        let row = match outcome {
            Outcome::Applied(row) => row,
            Outcome::ConditionFailed(Some(row)) if !row.contains_key(EXPIRES_AT) => return Ok(Claim::Held),
            Outcome::ConditionFailed(_) => {
                let Some(record) = self.get(user, id).await? else { return Ok(Claim::Unknown) };
                record.record_in_log();
                return Ok(Claim::Finished);
            }
        };
        let claimed = self.claimed(user, id, worker, row).await;
        if claimed.is_err() {
            // This worker is alive, so its claim must not count as a death.
            if let Err(error) = self.release(user, id, worker, Time::now(), Change::default()).await {
                tracing::warn!(task = %id, error = %error.context(), "start.not_released");
            }
        }
        claimed
    }

    /// Reads the task of a lease row that was claimed.
    async fn claimed(&self, user: &UserId, id: Uuid, worker: &str, row: Item) -> Result<Claim> {
        let Some(mut item) = self.table.batch_get(vec![key(user, id)]).await?.pop() else {
            lease::delete(&self.table, lease_key(user, id), worker, []).await?;
            return Ok(Claim::Unknown);
        };
        let is_expired = row.contains_key(EXPIRES_AT);
        item.extend(row.into_iter().filter(|(name, _)| name != "id"));
        let record: StartTaskRecord = from_item(item)?;
        Ok(match record.now.status {
            StartStatus::Ready | StartStatus::Error if is_expired => Claim::Expired(Box::new(record)),
            // Its request is not needed, and may be missing.
            StartStatus::Ready | StartStatus::Error => Claim::Failed(Box::new(record)),
            _ => Claim::Claimed(Box::new(self.open(record).await?)),
        })
    }

    /// Renews a lease.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn renew(
        &self,
        user: &UserId,
        id: Uuid,
        worker: &str,
        duration: Duration,
    ) -> Result<Result<(), LeaseLost>> {
        let lease = Lease::of(worker, duration);
        let update = lease.renew(due_after(&lease)).condition(Condition::Exists(UNFINISHED_SHARD));
        Ok(if self.table.apply(lease_key(user, id), update).await? { Ok(()) } else { Err(LeaseLost) })
    }

    /// Writes a change of a task; `worker` must hold the lease.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn save(&self, user: &UserId, id: Uuid, worker: &str, change: &Change) -> Result<Result<(), LeaseLost>> {
        self.save_with(user, id, worker, change, Vec::new()).await
    }

    /// Writes a change of a task and other writes in one transaction; `worker` must hold the lease. Returns [`LeaseLost`] also if a
    /// condition of the other writes fails.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn save_with(
        &self,
        user: &UserId,
        id: Uuid,
        worker: &str,
        change: &Change,
        others: Vec<TransactWriteItem>,
    ) -> Result<Result<(), LeaseLost>> {
        let saved = if change.task.is_empty() && others.is_empty() {
            lease::write(&self.table, lease_key(user, id), worker, Update::clone(&change.lease)).await?.is_applied()
        } else {
            let task = Update::clone(&change.task).condition(Condition::Exists("id"));
            let lease = match change.lease.is_empty() {
                // A worker that writes is alive, so its claim is no death.
                true => Update::new().set("open_claims", number(1)),
                false => Update::clone(&change.lease),
            };
            let mut writes = others;
            if !change.task.is_empty() {
                writes.push(task.in_transaction(&self.table.name, key(user, id))?);
            }
            writes.push(lease::guard(lease, worker).in_transaction(&self.table.name, lease_key(user, id))?);
            transact(&self.table.client, writes, OPERATION).await?.is_written()
        };
        Ok(if saved { Ok(()) } else { Err(LeaseLost) })
    }

    /// Releases the lease; the task is to be continued at `wake_at`. Returns the time from which the sweep does that.
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
    ) -> Result<Result<Time, LeaseLost>> {
        let due_at = wake_at.plus(FORGOTTEN_AFTER);
        let change = change.set("due_at", text(due_at.sortable())).set("open_claims", number(0));
        Ok(self.save(user, id, worker, &change.map_lease(lease::release)).await?.map(|()| due_at))
    }

    /// Ends a task READY: one transaction writes the task, removes its lease row, and writes the records that the start made and the
    /// user's counters, from which it removes the unfinished start. Returns [`LeaseLost`] also if a condition of `recorded` fails.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn end(
        &self,
        user: &UserId,
        id: Uuid,
        worker: &str,
        change: &Change,
        recorded: Recorded,
    ) -> Result<Result<(), LeaseLost>> {
        let Recorded { writes: mut items, mut counted } = recorded;
        counted.push(ENDED);
        items.push(counters::add(&self.users, user, SubCounter::of(id), &counted)?);
        let task = Update::clone(&change.task).condition(is_running());
        items.push(task.in_transaction(&self.table.name, key(user, id))?);
        let is_own = lease::is_of(worker);
        items.push(self.table.delete_in_transaction(lease_key(user, id), Some(&is_own))?);
        let saved = transact(&self.table.client, items, OPERATION).await?;
        Ok(if saved.is_written() { Ok(()) } else { Err(LeaseLost) })
    }

    /// Ends a task with ERROR. `worker` must hold the lease, and keeps it to undo what the start made. The task stays in the index of
    /// unfinished tasks until [`StartTaskStore::compensated`].
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn fail(
        &self,
        user: &UserId,
        id: Uuid,
        worker: &str,
        snapshot: &Snapshot,
    ) -> Result<Result<(), LeaseLost>> {
        let Change { task, lease } = Change::failed(id, snapshot)?;
        let written = self.write_failure(user, id, task.condition(is_running()), lease::guard(*lease, worker)).await?;
        Ok(if written { Ok(()) } else { Err(LeaseLost) })
    }

    async fn write_failure(&self, user: &UserId, id: Uuid, task: Update, lease: Update) -> Result<bool> {
        let writes = vec![
            task.in_transaction(&self.table.name, key(user, id))?,
            lease.in_transaction(&self.table.name, lease_key(user, id))?,
            counters::add(&self.users, user, SubCounter::of(id), &[ENDED])?,
        ];
        Ok(transact(&self.table.client, writes, OPERATION).await?.is_written())
    }

    /// Ends an unfinished task with ERROR, regardless of leases. A worker that holds the lease loses it, but the lease stays until its
    /// time is up: until then that worker may still make something, which must be undone.
    ///
    /// # Errors
    /// [`Error::Store`]; the call may be repeated.
    pub async fn abandon(&self, user: &UserId, id: Uuid, detail: &str) -> Result<Abandoned> {
        let mut attempts = ABANDON.start();
        while attempts.next().await {
            let rows = self.table.batch_get(vec![key(user, id), lease_key(user, id)]).await?;
            let (tasks, leases): (Vec<Item>, Vec<Item>) = rows.into_iter().partition(|row| row.contains_key("status"));
            let Some(mut item) = tasks.into_iter().next() else { return Ok(Abandoned::Unknown) };
            let lease = leases.into_iter().next().unwrap_or_default();
            let (state, is_running) = (item.get("updated_sort").cloned(), is_running_row(&item));
            item.extend(lease.clone().into_iter().filter(|(name, _)| name != "id"));
            let record: StartTaskRecord = from_item(item)?;
            if record.now.status.is_final() || !is_running {
                return Ok(Abandoned::Before(Box::new(record)));
            }
            let now = Time::now();
            let free_at = lease::until(&lease).filter(|until| *until > now).unwrap_or(now);
            let snapshot = Snapshot {
                status: StartStatus::Error,
                updated_at: now,
                detail: Some(detail.to_owned()),
                ..record.now.clone()
            };
            let Change { task, lease } = Change::failed(id, &snapshot)?;
            let task = task.condition(self::is_running()).condition(Condition::unchanged("updated_sort", state));
            let lease = lease::revoke(*lease)
                .set("due_at", text(free_at.plus(FORGOTTEN_AFTER).sortable()))
                .condition(Condition::Exists(UNFINISHED_SHARD));
            if self.write_failure(user, id, task, lease).await? {
                return Ok(Abandoned::Now { free_at, record: Box::new(record) });
            }
        }
        Err(Error::internal("a start changed all the time while it was to be ended"))
    }

    /// Records that what a failed start made has been undone, and releases the lease. The record is removed after
    /// [`FAILED_STARTS_EXPIRE`]. `change` may replace the text for the user.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn compensated(
        &self,
        user: &UserId,
        id: Uuid,
        worker: &str,
        change: Change,
    ) -> Result<Result<(), LeaseLost>> {
        let expires_at = Time::now().plus(FAILED_STARTS_EXPIRE);
        let change = change.set(EXPIRES_AT, seconds(expires_at)).set("due_at", text(expires_at.sortable())).map_lease(
            |update| lease::release(update.remove_all(&["compensation", "compensation_attempts", "open_claims"])),
        );
        self.save(user, id, worker, &change).await
    }

    /// The change that makes a task READY.
    ///
    /// # Errors
    /// [`Error::Internal`] if the snapshot cannot be serialised.
    pub fn ready(user: &UserId, id: Uuid, conversation: Uuid, snapshot: &Snapshot) -> Result<Change> {
        Change::ready(user, id, conversation, snapshot)
    }

    /// The change of a failed task's text for the user.
    #[must_use]
    pub fn detail(record: &StartTaskRecord, detail: &str) -> Change {
        Change::default().detail(record.history.len().saturating_sub(1), detail)
    }
}

/// When a failed task is removed, in seconds since 1970. In the lease row: the claim of an expired task begins its removal.
const EXPIRES_AT: &str = "expires_at";

/// What the end of a start changes in its user's counters.
const ENDED: (Counter, i64) = (Counter::UnfinishedStarts, -1);

/// The condition that a task has not ended. Only an unfinished task has a deadline; an imported task has none, whatever its status.
fn is_running() -> Condition {
    Condition::Exists("deadline")
}

/// The same for a row that was read.
fn is_running_row(item: &Item) -> bool {
    item.contains_key("deadline")
}

/// Sets the due time to the end of the lease plus [`FORGOTTEN_AFTER`].
fn due_after(lease: &Lease) -> Update {
    Update::new().set("due_at", text(lease.until.plus(FORGOTTEN_AFTER).sortable()))
}

/// Records the trace of a start in the log, as its lease row has it. Rows of earlier versions have none.
fn record_trace(id: Uuid, row: &Item) {
    if let Some(trace) = LeaseRow::read(row).and_then(|row| row.trace(id)) {
        trace::record_trace(&trace);
    }
}

fn seconds(time: Time) -> AttributeValue {
    AttributeValue::N(time.unix_seconds().to_string())
}
