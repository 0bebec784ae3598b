//! Small helpers around the DynamoDB client: attribute values, items as records, errors.

use std::collections::HashMap;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_dynamodb::operation::transact_write_items::TransactWriteItemsError;
use aws_sdk_dynamodb::types::{AttributeValue, KeysAndAttributes, TransactWriteItem};
use futures::future::join_all;
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::clock::Time;
use crate::error::{Error, Result, StoreError};
use crate::id::UserId;

/// DynamoDB takes at most this many keys in one `BatchGetItem`.
pub const BATCH_GET_LIMIT: usize = 100;

/// A DynamoDB item.
pub type Item = HashMap<String, AttributeValue>;

/// A string attribute.
pub fn text(value: impl Into<String>) -> AttributeValue {
    AttributeValue::S(value.into())
}

/// A number attribute.
#[must_use]
pub fn number(value: u32) -> AttributeValue {
    AttributeValue::N(value.to_string())
}

/// A record as an item.
///
/// # Errors
/// [`Error::Internal`] when the record has no form as an item, which is a fault in its type.
pub fn to_item<T: Serialize>(record: &T) -> Result<Item> {
    serde_dynamo::to_item(record).map_err(|error| Error::internal(format!("a record has no form as an item: {error}")))
}

/// An item as a record; unknown attributes are left alone.
///
/// # Errors
/// [`Error::Internal`] when the item is not of that kind.
pub fn from_item<T: DeserializeOwned>(item: Item) -> Result<T> {
    serde_dynamo::from_item(item)
        .map_err(|error| Error::internal(format!("an item does not read as its record: {error}")))
}

/// Turns a failed AWS call into a [`StoreError`], keeping what is known of whether a write happened.
pub fn store_error<E>(operation: &'static str) -> impl FnOnce(SdkError<E>) -> Error
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    move |error| {
        let code = error.as_service_error().and_then(|service| service.code()).unwrap_or_default().to_owned();
        let cancelled_by_condition = code == "TransactionCanceledException"
            && error
                .as_service_error()
                .and_then(|service| service.message())
                .is_some_and(|message| message.contains("ConditionalCheckFailed"));
        let condition_failed = code == "ConditionalCheckFailedException" || cancelled_by_condition;
        let certainly_not_written = match &error {
            SdkError::ConstructionFailure(_) => true,
            SdkError::ServiceError(service) => !service.raw().status().is_server_error(),
            SdkError::DispatchFailure(failure) => failure.is_user(),
            _ => false,
        };
        let context = match error.as_service_error() {
            Some(service) => format!("{operation}: {code}: {}", service.message().unwrap_or_default()),
            None => format!("{operation}: {}", aws_sdk_dynamodb::error::DisplayErrorContext(&error)),
        };
        Error::Store(StoreError { operation, context, condition_failed, certainly_not_written })
    }
}

/// Whether a write was refused because its condition did not hold.
#[must_use]
pub fn is_condition_failure(error: &Error) -> bool {
    matches!(error, Error::Store(store) if store.condition_failed)
}

/// A sparse index of rows that somebody must look after, by when: partitioned by an attribute with a shard, sorted by `due_at`.
#[derive(Clone, Debug)]
pub struct DueIndex {
    /// The client.
    pub dynamodb: Client,
    /// The table.
    pub table: String,
    /// The index.
    pub index: &'static str,
    /// The attribute that holds the shard.
    pub shard_attribute: &'static str,
    /// All shards.
    pub shards: Vec<String>,
    /// The name of the table's sort key.
    pub sort_key: &'static str,
}

/// A row whose time is over.
#[derive(Clone, Debug, PartialEq)]
pub struct DueRow {
    /// Its owner.
    pub user: UserId,
    /// What it is about: its attribute `id`.
    pub id: Uuid,
    due_at: String,
    key: Item,
}

/// The most rows of a shard that are read at once: among them, tenants take turns.
const DUE_READ: usize = 500;
/// The most rows of a shard that are returned at once.
pub const DUE_LIMIT: usize = 100;

impl DueIndex {
    /// Rows of all users that were due before `now`: of each shard the oldest, up to [`DUE_LIMIT`], users in turn. A shard that
    /// cannot be read does not keep the others from being looked after: the first error comes beside the rows.
    pub async fn due(&self, now: Time) -> (Vec<DueRow>, Option<Error>) {
        let (mut rows, mut failed) = (Vec::new(), None);
        for read in join_all(self.shards.iter().map(|shard| self.due_in(shard, now))).await {
            match read {
                Ok(read) => rows.extend(read),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        (rows, failed)
    }

    async fn due_in(&self, shard: &str, now: Time) -> Result<Vec<DueRow>> {
        let mut rows = Vec::new();
        let mut start = None;
        loop {
            let left = i32::try_from(DUE_READ - rows.len()).map_err(Error::internal)?;
            let page = self
                .dynamodb
                .query()
                .table_name(&self.table)
                .index_name(self.index)
                .key_condition_expression("#shard = :shard AND due_at < :now")
                .expression_attribute_names("#shard", self.shard_attribute)
                .expression_attribute_values(":shard", text(shard))
                .expression_attribute_values(":now", text(now.sortable()))
                .limit(left)
                .set_exclusive_start_key(start)
                .send()
                .await
                .map_err(store_error("Query due rows"))?;
            let items = page.items.unwrap_or_default();
            let read = items.len();
            for item in items {
                match self.row(&item) {
                    Some(row) => rows.push(row),
                    // It must not keep the others from being looked after.
                    None => tracing::error!(index = self.index, "store.row_without_owner_or_id"),
                }
            }
            start = page.last_evaluated_key.filter(|_| read > 0 && rows.len() < DUE_READ);
            if start.is_none() {
                return Ok(in_turn(rows, DUE_LIMIT));
            }
        }
    }

    fn row(&self, item: &Item) -> Option<DueRow> {
        let attribute = |name: &str| item.get(name).and_then(|value| value.as_s().ok());
        let user = attribute("user")?;
        let key = [("user", user), (self.sort_key, attribute(self.sort_key)?)];
        Some(DueRow {
            user: UserId::new(user),
            id: Uuid::try_parse(attribute("id")?).ok()?,
            due_at: attribute("due_at")?.clone(),
            key: key.into_iter().map(|(name, value)| (name.to_owned(), text(value))).collect(),
        })
    }

    /// Moves a row behind those that are due before `until`, unless somebody has looked after it meanwhile.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn postpone(&self, row: &DueRow, until: Time) -> Result<()> {
        let moved = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(row.key.clone()))
            .update_expression("SET due_at = :until")
            .condition_expression("due_at = :seen")
            .expression_attribute_values(":until", text(until.sortable()))
            .expression_attribute_values(":seen", text(&row.due_at))
            .send()
            .await
            .map_err(store_error("UpdateItem due rows"));
        match moved {
            Err(error) if !is_condition_failure(&error) => Err(error),
            _ => Ok(()),
        }
    }
}

/// The first `limit` rows when users take turns, each with the rows in the order in which they come.
fn in_turn(rows: Vec<DueRow>, limit: usize) -> Vec<DueRow> {
    let mut of_users: HashMap<UserId, usize> = HashMap::new();
    let mut turns: Vec<(usize, DueRow)> = rows
        .into_iter()
        .map(|row| {
            let turn = of_users.entry(row.user.clone()).or_default();
            *turn += 1;
            (*turn, row)
        })
        .collect();
    // Stable: within a turn, the oldest first.
    turns.sort_by_key(|(turn, _)| *turn);
    turns.truncate(limit);
    turns.into_iter().map(|(_, row)| row).collect()
}

/// DynamoDB takes at most this many writes in one transaction.
pub const TRANSACTION_LIMIT: usize = 100;

/// Writes all of `items` or none of them. A transaction that collides with another one is tried again: two rows of one user
/// share the item that counts them.
///
/// # Errors
/// [`Error::Store`]; with [`is_condition_failure`] when a condition of one of the writes did not hold.
pub async fn transact(dynamodb: &Client, items: Vec<TransactWriteItem>, operation: &'static str) -> Result<()> {
    const ATTEMPTS: u32 = 8;
    let mut attempt = 0;
    loop {
        let written = dynamodb.transact_write_items().set_transact_items(Some(items.clone())).send().await;
        let Err(error) = written else { return Ok(()) };
        let reasons: Vec<&str> = match error.as_service_error() {
            Some(TransactWriteItemsError::TransactionCanceledException(cancelled)) => {
                cancelled.cancellation_reasons().iter().filter_map(|reason| reason.code()).collect()
            }
            _ => Vec::new(),
        };
        let collided = reasons.contains(&"TransactionConflict") && !reasons.contains(&"ConditionalCheckFailed");
        attempt += 1;
        if !collided || attempt == ATTEMPTS {
            return Err(store_error(operation)(error));
        }
        let longest = 20 << attempt;
        tokio::time::sleep(std::time::Duration::from_millis(rand::random_range(longest / 2..longest))).await;
    }
}

/// Reads up to 100 items by key, asking again for those that DynamoDB left out under load.
///
/// # Errors
/// [`Error::Store`].
pub async fn batch_get_items(
    dynamodb: &Client,
    table: &str,
    keys: Vec<Item>,
    operation: &'static str,
) -> Result<Vec<Item>> {
    batch_get(dynamodb, table, keys, None, operation).await
}

/// As [`batch_get_items`], but of each item nothing but one attribute: the answer is small where items are large.
///
/// # Errors
/// [`Error::Store`].
pub async fn batch_get_attribute(
    dynamodb: &Client,
    table: &str,
    keys: Vec<Item>,
    attribute: &str,
    operation: &'static str,
) -> Result<Vec<Item>> {
    batch_get(dynamodb, table, keys, Some(attribute), operation).await
}

async fn batch_get(
    dynamodb: &Client,
    table: &str,
    keys: Vec<Item>,
    attribute: Option<&str>,
    operation: &'static str,
) -> Result<Vec<Item>> {
    const ATTEMPTS: u32 = 8;
    let mut items = Vec::new();
    let mut left = keys;
    for attempt in 0..ATTEMPTS {
        if left.is_empty() {
            break;
        }
        if attempt > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(10 << attempt)).await;
        }
        let wanted = KeysAndAttributes::builder()
            .set_keys(Some(std::mem::take(&mut left)))
            .consistent_read(true)
            .set_projection_expression(attribute.map(|_| "#attribute".to_owned()))
            .set_expression_attribute_names(
                attribute.map(|name| HashMap::from([("#attribute".to_owned(), name.to_owned())])),
            )
            .build()
            .map_err(Error::internal)?;
        let answer =
            dynamodb.batch_get_item().request_items(table, wanted).send().await.map_err(store_error(operation))?;
        items.extend(answer.responses.unwrap_or_default().remove(table).unwrap_or_default());
        left = answer
            .unprocessed_keys
            .unwrap_or_default()
            .remove(table)
            .map(|unprocessed| unprocessed.keys)
            .unwrap_or_default();
    }
    if left.is_empty() {
        return Ok(items);
    }
    Err(Error::Store(StoreError {
        operation,
        context: format!("{operation}: {} keys stayed unprocessed", left.len()),
        condition_failed: false,
        certainly_not_written: true,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_take_turns() {
        let row = |user: &str, number: u128| DueRow {
            user: UserId::new(user),
            id: Uuid::from_u128(number),
            due_at: String::new(),
            key: Item::new(),
        };
        let rows: Vec<DueRow> =
            (0..500).map(|number| row("flood", number)).chain([row("a", 500), row("b", 501), row("a", 502)]).collect();
        let taken: Vec<u128> = in_turn(rows.clone(), 6).iter().map(|row| row.id.as_u128()).collect();
        assert_eq!(taken, [0, 500, 501, 1, 502, 2]);
        assert_eq!(in_turn(rows, usize::MAX).len(), 503);
    }
}
