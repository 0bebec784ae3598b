//! How many rows a user has: one item, changed in the same transaction as the rows that it counts.

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{AttributeValue, TransactWriteItem, Update};

use super::UserId;
use crate::dynamo::{Item, store_error, text};
use crate::error::{Error, Result};

/// The `users` record that holds the counts.
const COUNTERS: &str = "counters";

/// What is counted; the names of the item's attributes.
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

/// The write that adds to counts, for the transaction that adds or removes the rows. A transaction takes one such write a
/// user.
///
/// # Errors
/// [`Error::Internal`] when `changes` is empty.
pub fn add(table: &str, user: &UserId, changes: &[(Counter, i64)]) -> Result<TransactWriteItem> {
    let parts: Vec<String> = changes.iter().map(|(counter, _)| format!("{0} :{0}", counter.attribute())).collect();
    let mut update = Update::builder()
        .table_name(table)
        .set_key(Some(key(user)))
        .update_expression(format!("ADD {}", parts.join(", ")));
    for (counter, change) in changes {
        let value = AttributeValue::N(change.to_string());
        update = update.expression_attribute_values(format!(":{}", counter.attribute()), value);
    }
    Ok(TransactWriteItem::builder().update(update.build().map_err(Error::internal)?).build())
}

/// A count, exact: one item read.
///
/// # Errors
/// [`Error::Store`].
pub async fn read(dynamodb: &Client, table: &str, user: &UserId, counter: Counter) -> Result<u64> {
    let found = dynamodb
        .get_item()
        .table_name(table)
        .set_key(Some(key(user)))
        .consistent_read(true)
        .send()
        .await
        .map_err(store_error("GetItem users"))?;
    let count = found.item.as_ref().and_then(|item| item.get(counter.attribute())).and_then(|count| count.as_n().ok());
    Ok(count.and_then(|count| count.parse().ok()).unwrap_or_default())
}

fn key(user: &UserId) -> Item {
    Item::from([("user".into(), text(user.as_str())), ("kind".into(), text(COUNTERS))])
}
