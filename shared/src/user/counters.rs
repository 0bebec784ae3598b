//! The number of rows that a user has. The counts change in the same transaction as the rows that they count.
//!
//! Transactions that write the same item conflict, so each count is the sum of [`SUB_COUNTERS`] items. A row's id selects the item, and
//! concurrent transactions of one user rarely meet. A sum is one `BatchGetItem`.
//!
//! Earlier versions had one item for all counts of a user, `counters`. It is one more term of the sum; nothing writes it.

use aws_sdk_dynamodb::types::TransactWriteItem;
use uuid::Uuid;

use super::UserId;
use crate::dynamo::{Condition, Item, Table, Transacted, Update, number, text, transact};
use crate::error::Result;

/// The number of items that share a user's counts.
pub const SUB_COUNTERS: u8 = 8;

/// The `users` record that held all counts of a user in earlier versions.
const FORMER: &str = "counters";

/// What is counted. Each counter is an attribute of the items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Conversations, sub-conversations included.
    Conversations,
    /// Conversations without a parent.
    TopLevelConversations,
    /// Start tasks.
    StartTasks,
    /// Start tasks that are neither READY nor ERROR.
    UnfinishedStarts,
}

impl Counter {
    const ALL: [Self; 4] = [Self::Conversations, Self::TopLevelConversations, Self::StartTasks, Self::UnfinishedStarts];

    fn attribute(self) -> &'static str {
        match self {
            Self::Conversations => "conversations",
            Self::TopLevelConversations => "top_level_conversations",
            Self::StartTasks => "start_tasks",
            Self::UnfinishedStarts => "unfinished_starts",
        }
    }
}

/// One of the items that share a user's counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubCounter(u8);

impl SubCounter {
    /// The item for the row with this id. Where a limit applies to a counter ([`add_below`]), a row must be added to and subtracted from
    /// the same item; otherwise only the sum matters.
    #[must_use]
    pub fn of(id: Uuid) -> Self {
        Self(id.as_bytes().iter().fold(0, |sum, byte| sum ^ byte) % SUB_COUNTERS)
    }

    fn all() -> impl Iterator<Item = Self> {
        (0..SUB_COUNTERS).map(Self)
    }

    fn key(self, user: &UserId) -> Item {
        key(user, format!("{FORMER}#{}", self.0))
    }
}

/// The write that adds to counts, for the transaction that adds or removes the rows. A transaction can contain one such write for each
/// item.
///
/// # Errors
/// [`crate::Error::Internal`] when `changes` is empty.
pub fn add(
    users: &Table,
    user: &UserId,
    sub_counter: SubCounter,
    changes: &[(Counter, i64)],
) -> Result<TransactWriteItem> {
    added(changes).in_transaction(&users.name, sub_counter.key(user))
}

/// As [`add`], on the condition that a counter is below its limit. The limit applies to all items together and is divided among them, so
/// it is approximate: an item can reach its share before the others do.
///
/// # Errors
/// [`crate::Error::Internal`] when `changes` is empty.
pub fn add_below(
    users: &Table,
    user: &UserId,
    sub_counter: SubCounter,
    changes: &[(Counter, i64)],
    (counter, limit): (Counter, u32),
) -> Result<TransactWriteItem> {
    let share = limit.div_ceil(SUB_COUNTERS.into());
    let attribute = counter.attribute();
    let is_below =
        Condition::Any(vec![Condition::Missing(attribute), Condition::Compare(attribute, "<", number(share))]);
    added(changes).condition(is_below).in_transaction(&users.name, sub_counter.key(user))
}

fn added(changes: &[(Counter, i64)]) -> Update {
    let add = |update: Update, (counter, change): &(Counter, i64)| update.add(counter.attribute(), *change);
    changes.iter().fold(Update::new(), add)
}

/// Reads a count with one request. It is exact: the items are read strongly consistent.
///
/// # Errors
/// [`crate::Error::Store`].
pub async fn read(users: &Table, user: &UserId, counter: Counter) -> Result<u64> {
    let keys = SubCounter::all().map(|sub_counter| sub_counter.key(user)).chain([key(user, FORMER)]);
    let items = users.batch_get(keys.collect()).await?;
    let sum: i64 = items.iter().map(|item| value(item, counter)).sum();
    // An item may be negative, because a row may be subtracted from another item than it was added to.
    Ok(u64::try_from(sum).unwrap_or_default())
}

fn value(item: &Item, counter: Counter) -> i64 {
    let count = item.get(counter.attribute()).and_then(|count| count.as_n().ok());
    count.and_then(|count| count.parse().ok()).unwrap_or_default()
}

/// A user's counts, made from the rows.
#[derive(Clone, Debug, Default)]
pub struct Recount([[u32; Counter::ALL.len()]; SUB_COUNTERS as usize]);

impl Recount {
    /// Counts a row.
    pub fn add(&mut self, id: Uuid, counter: Counter) {
        self.0[usize::from(SubCounter::of(id).0)][counter as usize] += 1;
    }

    /// The sum of a counter.
    #[must_use]
    pub fn sum(&self, counter: Counter) -> u32 {
        self.0.iter().map(|counts| counts[counter as usize]).sum()
    }

    /// Replaces the user's counts by these, all at once. Counts that concurrent writers change meanwhile are lost: no function may run.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn store(&self, users: &Table, user: &UserId) -> Result<()> {
        const OPERATION: &str = "TransactWriteItems counters";
        let mut writes = vec![users.delete_in_transaction(key(user, FORMER), None)?];
        for (sub_counter, counts) in SubCounter::all().zip(&self.0) {
            let set =
                |update: Update, counter: Counter| update.set(counter.attribute(), number(counts[counter as usize]));
            let update = Counter::ALL.into_iter().fold(Update::new(), set);
            writes.push(update.in_transaction(&users.name, sub_counter.key(user))?);
        }
        transact(&users.client, writes, OPERATION).await.and_then(|written: Transacted| written.require(OPERATION))
    }
}

fn key(user: &UserId, kind: impl Into<String>) -> Item {
    Item::from([("user".into(), text(user.as_str())), ("kind".into(), text(kind))])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id;

    #[test]
    fn random_and_consecutive_ids_spread_over_all_items() {
        for ids in [(0..800).map(|_| id::new_uuid()).collect::<Vec<_>>(), (0..800).map(Uuid::from_u128).collect()] {
            let mut rows = [0; SUB_COUNTERS as usize];
            for id in ids {
                rows[usize::from(SubCounter::of(id).0)] += 1;
            }
            assert!(rows.iter().all(|rows| (50..=150).contains(rows)), "{rows:?}");
        }
    }

    #[test]
    fn rows_are_counted_once() {
        let mut recount = Recount::default();
        for id in (0..20).map(Uuid::from_u128) {
            recount.add(id, Counter::StartTasks);
        }
        recount.add(Uuid::nil(), Counter::UnfinishedStarts);
        assert_eq!(Counter::ALL.map(|counter| recount.sum(counter)), [0, 0, 20, 1]);
    }
}
