//! Boots of sandboxes, observed for all waiting starts together.
//!
//! A start that waits for its sandbox stores a row here and ends its job. One job, [`ObserveBoots`], observes the sandboxes of all rows
//! with one request to the provider, and enqueues the job of each start whose sandbox has changed. The job repeats itself while there are
//! rows, at delays that grow with the age of the youngest row. So the number of requests does not depend on the number of starts, and a
//! waiting start costs nothing.
//!
//! The rows are in a partition of their own of the table of sandboxes ([`PARTITION`]), where a consistent query finds all of them. The
//! item [`CONTROL`] of the same partition holds the time of the next observation, which makes the job a singleton: a job that comes
//! before this time is superfluous and ends, and a job observes after it has moved the time. It also holds the state of the
//! [`super::circuit`] breaker.
//!
//! Nothing is lost with a job: a start that begins to wait enqueues the job if the time of the next observation is missing or past, so does
//! the sweep, and each start has a due time of its own, [`LONGEST_WAIT`] after it began to wait.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Sandbox, SandboxService, SandboxStatus};
use crate::clock::{Time, sortable};
use crate::dynamo::{Condition, Item, Table, Update, from_item, store_error, text, to_item};
use crate::error::{Error, Result};
use crate::http_client::HttpClient;
use crate::id::{UserId, as_hex, hex};
use crate::jobs::advance_start::AdvanceStart;
use crate::jobs::observe_boots::{ObserveBoots, delay_at_age};
use crate::jobs::queue::{Job, JobQueue};

/// The value of `user` in the keys of the rows of this module. No user has this id, as none has that of the deployment's data key.
pub const PARTITION: &str = "#boots";
/// The value of `id` of the item that is no waiting start. It sorts before the ids of starts.
const CONTROL: &str = "#control";

/// When a waiting start is due, whatever the observations show.
pub const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// The delay between the start of a wait and the first observation.
const FIRST_DELAY: Duration = Duration::from_secs(1);
/// A job may come this much before its time: clocks of workers differ.
const TOLERANCE: Duration = Duration::from_millis(500);
/// The time after a missed observation when its job counts as lost.
const LOST_AFTER: Duration = Duration::from_secs(3);
/// How long a provider may report a sandbox as paused after a start has resumed it. Then the start resumes it again.
const RESUMED_WITHIN: Duration = Duration::from_secs(15);
/// Agent servers that are requested at the same time, and rows that are deleted at the same time.
const AT_ONCE: usize = 16;

/// A start that waits for its sandbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BootWaiter {
    #[serde(rename = "id", with = "as_hex")]
    pub task: Uuid,
    #[serde(rename = "owner")]
    pub user: UserId,
    pub sandbox: String,
    /// The status that the start has seen. The start waits until there is another one, or until the agent server responds.
    pub seen: SandboxStatus,
    /// When the wait began.
    #[serde(serialize_with = "sortable::serialize")]
    pub since: Time,
    /// The deadline of the start's step.
    #[serde(serialize_with = "sortable::serialize")]
    pub until: Time,
}

/// The rows of the partition.
#[derive(Debug, Default)]
struct Waits {
    /// The time of the next observation.
    due_at: Option<Time>,
    waiters: Vec<BootWaiter>,
}

#[derive(Deserialize)]
struct Control {
    due_at: Option<Time>,
}

/// The rows of waiting starts.
#[derive(Clone, Debug)]
pub struct BootStore {
    table: Table,
}

impl BootStore {
    pub(super) fn new(table: Table) -> Self {
        Self { table }
    }

    async fn put(&self, waiter: &BootWaiter) -> Result<()> {
        let mut attributes = to_item(waiter)?;
        attributes.remove("id");
        self.table.apply(key(&hex(waiter.task)), Update::new().set_all(attributes)).await?;
        Ok(())
    }

    /// Removes the row of a start, unless the start has begun to wait again.
    async fn remove(&self, waiter: &BootWaiter) -> Result<()> {
        let is_same = Condition::equal("since", text(waiter.since.sortable()));
        self.table.delete(key(&hex(waiter.task)), is_same).await.map(drop)
    }

    /// Reads all rows, strongly consistent.
    async fn read(&self) -> Result<Waits> {
        let mut waits = Waits::default();
        let mut items = self
            .table
            .query()
            .key_condition_expression("#user = :user")
            .expression_attribute_names("#user", "user")
            .expression_attribute_values(":user", text(PARTITION))
            .consistent_read(true)
            .into_paginator()
            .items()
            .send();
        while let Some(item) = items.next().await {
            let item = item.map_err(store_error("Query sandboxes"))?;
            if item.get("id") == Some(&text(CONTROL)) {
                waits.due_at = from_item::<Control>(item)?.due_at;
                continue;
            }
            match from_item(item) {
                Ok(waiter) => waits.waiters.push(waiter),
                // Such a row must not delay the others.
                Err(error) => tracing::error!(error = %error.context(), "boots.row_malformed"),
            }
        }
        Ok(waits)
    }

    /// The time of the next observation.
    async fn due_at(&self) -> Result<Option<Time>> {
        let Some(item) = self.table.get(control_key()).await? else { return Ok(None) };
        Ok(from_item::<Control>(item)?.due_at)
    }

    /// Moves the time of the next observation, or removes it. Returns false if it is no longer `seen`.
    async fn set_due_at(&self, seen: Option<Time>, due_at: Option<Time>) -> Result<bool> {
        let update = Update::new()
            .set_or_remove("due_at", due_at.map(|at| text(at.sortable())))
            .condition(Condition::unchanged("due_at", seen.map(|at| text(at.sortable()))));
        // Once: a retry whose first attempt took effect must not look like another observer, or the observations end.
        Ok(self.table.update_once(control_key(), update).await?.is_applied())
    }
}

/// Observes the boots of sandboxes.
#[derive(Clone, Debug)]
pub struct BootObserver {
    pub store: BootStore,
    pub sandboxes: Arc<dyn SandboxService>,
    pub queue: JobQueue,
    /// The HTTP client for agent servers.
    pub http: HttpClient,
}

impl BootObserver {
    /// Stores that a start waits for its sandbox, and sees to it that the sandbox is observed soon. The start must not hold its lease any
    /// more, so that the job that continues it finds it free.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn wait(&self, waiter: &BootWaiter) -> Result<()> {
        self.store.put(waiter).await?;
        // The row is written before this read, and an observer that ends removes its time before it reads the rows again: one of both sees
        // the other.
        let seen = self.store.due_at().await?;
        self.hasten(seen).await
    }

    /// Enqueues the job, unless the next observation is soon.
    async fn hasten(&self, seen: Option<Time>) -> Result<()> {
        let now = Time::now();
        let wanted = now.plus(FIRST_DELAY);
        let is_soon = seen.is_some_and(|at| at.plus(LOST_AFTER) > now && at <= wanted.plus(TOLERANCE));
        if !is_soon && self.store.set_due_at(seen, Some(wanted)).await? {
            self.queue.send(&ObserveBoots {}.into(), FIRST_DELAY).await?;
        }
        Ok(())
    }

    /// Observes the sandboxes of all waiting starts, enqueues the jobs of those whose sandbox has changed, and enqueues the next
    /// observation if starts still wait. Does nothing if the observation is not due.
    ///
    /// # Errors
    /// [`Error::Store`]; the sweep repeats the job.
    pub async fn observe(&self) -> Result<()> {
        let Waits { due_at: seen, waiters } = self.store.read().await?;
        let now = Time::now();
        if seen.is_some_and(|at| at > now.plus(TOLERANCE)) {
            return Ok(());
        }
        let Some(youngest) = waiters.iter().map(|waiter| waiter.since).max() else { return self.end(seen).await };
        let delay = delay_at_age(now.since(youngest));
        let next = Some(now.plus(delay));
        if !self.store.set_due_at(seen, next).await? {
            return Ok(());
        }
        let count = waiters.len();
        let woken = self.wake(self.changed(waiters).await).await;
        tracing::debug!(waiting = count, woken, "boots.observed");
        if woken == count { self.end(next).await } else { self.queue.send(&ObserveBoots {}.into(), delay).await }
    }

    /// Ends the observations, unless a start has begun to wait meanwhile.
    async fn end(&self, seen: Option<Time>) -> Result<()> {
        if seen.is_some() && !self.store.set_due_at(seen, None).await? {
            return Ok(());
        }
        let Waits { due_at, waiters } = self.store.read().await?;
        if waiters.is_empty() { Ok(()) } else { self.hasten(due_at).await }
    }

    /// The starts whose sandbox has changed, or whose time is up.
    async fn changed(&self, waiters: Vec<BootWaiter>) -> Vec<BootWaiter> {
        let mut keys: Vec<(UserId, String)> =
            waiters.iter().map(|waiter| (waiter.user.clone(), waiter.sandbox.clone())).collect();
        keys.sort_unstable_by(|one, other| (one.0.as_str(), &one.1).cmp(&(other.0.as_str(), &other.1)));
        keys.dedup();
        let found = self.sandboxes.inspect_all(&keys).await.unwrap_or_else(|error| {
            tracing::warn!(error = %error.context(), starts = waiters.len(), "boots.not_observed");
            Vec::new()
        });
        // Each sandbox is requested once, however many starts wait for it.
        let mut observed: HashMap<(UserId, String), Observed> = HashMap::new();
        for (keys, sandboxes) in keys.chunks(AT_ONCE).zip(found.chunks(AT_ONCE)) {
            let shown = join_all(sandboxes.iter().map(async |sandbox| self.observed(sandbox.as_ref()).await)).await;
            observed.extend(keys.iter().cloned().zip(shown));
        }
        let now = Time::now();
        let has_changed = |waiter: &BootWaiter| {
            let observed = observed.get(&(waiter.user.clone(), waiter.sandbox.clone()));
            let waited = now.since(waiter.since);
            waiter.until < now || observed.is_some_and(|observed| observed.ends_wait(waiter.seen, waited))
        };
        waiters.into_iter().filter(has_changed).collect()
    }

    async fn observed(&self, sandbox: Option<&Sandbox>) -> Observed {
        let Some(sandbox) = sandbox else { return Observed::Unknown };
        match sandbox.agent_server(&self.http) {
            Some(agent_server) if agent_server.is_alive().await => Observed::Alive,
            _ => Observed::In(sandbox.status),
        }
    }

    /// Enqueues the jobs of starts, and removes their rows. Returns how many.
    async fn wake(&self, waiters: Vec<BootWaiter>) -> usize {
        let jobs: Vec<Job> = waiters
            .iter()
            .map(|waiter| AdvanceStart { user: waiter.user.clone(), task: waiter.task, due_at: None }.into())
            .collect();
        let (sent, failed) = self.queue.send_all(&jobs).await;
        // A row is removed after the job is sent. If that fails the job is sent again, which is harmless.
        let woken: Vec<&BootWaiter> =
            waiters.iter().zip(sent).filter_map(|(waiter, sent)| sent.then_some(waiter)).collect();
        let mut failures: Vec<Error> = failed.into_iter().collect();
        for some in woken.chunks(AT_ONCE) {
            let removed = join_all(some.iter().map(async |waiter| self.store.remove(waiter).await)).await;
            failures.extend(removed.into_iter().filter_map(Result::err));
        }
        if let Some(error) = failures.first() {
            tracing::warn!(failures = failures.len(), error = %error.context(), "boots.not_all_woken");
        }
        woken.len()
    }

    /// Enqueues the job if starts wait and the job was lost. Returns how many jobs were enqueued.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn sweep(&self) -> Result<usize> {
        let Waits { due_at, waiters } = self.store.read().await?;
        let is_lost = due_at.is_none_or(|at| at.plus(LOST_AFTER) < Time::now());
        if waiters.is_empty() || !is_lost {
            return Ok(0);
        }
        self.queue.send(&ObserveBoots {}.into(), Duration::ZERO).await?;
        Ok(1)
    }
}

/// What an observation shows of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Observed {
    /// The sandbox does not exist.
    Unknown,
    /// Its agent server responds.
    Alive,
    In(SandboxStatus),
}

impl Observed {
    /// Whether a start that has seen `seen`, and has waited this long since, has something to do now.
    fn ends_wait(self, seen: SandboxStatus, waited: Duration) -> bool {
        match self {
            Self::Unknown | Self::Alive => true,
            Self::In(SandboxStatus::Starting | SandboxStatus::Running) => false,
            // The resume was lost, or the sandbox was paused again.
            Self::In(SandboxStatus::Paused) if seen == SandboxStatus::Paused => waited >= RESUMED_WITHIN,
            Self::In(status) => status != seen,
        }
    }
}

fn key(id: &str) -> Item {
    Item::from([("user".into(), text(PARTITION)), ("id".into(), text(id))])
}

/// The key of the item that all workers share.
pub(super) fn control_key() -> Item {
    key(CONTROL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_when_there_is_something_to_do() {
        use SandboxStatus::{Error, Missing, Paused, Running, Starting};
        for (seen, observed, ends) in [
            (Starting, Observed::In(Starting), false),
            // It runs, and its agent server does not respond yet.
            (Starting, Observed::In(Running), false),
            (Starting, Observed::Alive, true),
            (Running, Observed::Alive, true),
            (Starting, Observed::In(Error), true),
            (Starting, Observed::In(Missing), true),
            (Starting, Observed::In(Paused), true),
            (Starting, Observed::Unknown, true),
            // The start has resumed it, and its provider needs some time for that.
            (Paused, Observed::In(Paused), false),
            (Paused, Observed::In(Missing), true),
        ] {
            assert_eq!(observed.ends_wait(seen, Duration::from_secs(5)), ends, "{seen:?} {observed:?}");
        }
        assert!(Observed::In(Paused).ends_wait(Paused, RESUMED_WITHIN), "the resume was lost");
    }
}
