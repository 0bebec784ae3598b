//! The number of rows that a user has: one item, changed in the same transaction as the rows that it counts.

use aws_sdk_dynamodb::types::TransactWriteItem;

use super::UserId;
use crate::dynamo::{Item, Table, Update, text};
use crate::error::Result;

/// The `users` record that holds the counts.
const COUNTERS: &str = "counters";

/// What is counted. Each counter is an attribute of the item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Conversations, sub-conversations included.
    Conversations,
    /// Conversations without a parent.
    TopLevelConversations,
    /// Start tasks.
    StartTasks,
}

impl Counter {
    fn attribute(self) -> &'static str {
        match self {
            Self::Conversations => "conversations",
            Self::TopLevelConversations => "top_level_conversations",
            Self::StartTasks => "start_tasks",
        }
    }
}

/// The write that adds to counts, for the transaction that adds or removes the rows. A transaction takes one such write for each
/// user.
///
/// # Errors
/// [`crate::Error::Internal`] when `changes` is empty.
pub fn add(users: &Table, user: &UserId, changes: &[(Counter, i64)]) -> Result<TransactWriteItem> {
    let add = |update: Update, (counter, change): &(Counter, i64)| update.add(counter.attribute(), *change);
    changes.iter().fold(Update::new(), add).in_transaction(&users.name, key(user))
}

/// Reads a count. It is exact, and reads one item.
///
/// # Errors
/// [`crate::Error::Store`].
pub async fn read(users: &Table, user: &UserId, counter: Counter) -> Result<u64> {
    let found = users.get(key(user)).await?;
    let count = found.as_ref().and_then(|item| item.get(counter.attribute())).and_then(|count| count.as_n().ok());
    Ok(count.and_then(|count| count.parse().ok()).unwrap_or_default())
}

fn key(user: &UserId) -> Item {
    Item::from([("user".into(), text(user.as_str())), ("kind".into(), text(COUNTERS))])
}
