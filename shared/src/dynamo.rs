//! Small helpers around the DynamoDB client: attribute values, items as records, errors.

use std::collections::HashMap;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_dynamodb::operation::transact_write_items::TransactWriteItemsError;
use aws_sdk_dynamodb::types::{AttributeValue, KeysAndAttributes, TransactWriteItem};
use futures::future::try_join_all;
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::clock::Time;
use crate::error::{Error, Result, StoreError};
use crate::user::UserId;

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

/// Rows of all users whose time is over, from a sparse index that is partitioned by `shard_attribute` and sorted by `due_at`.
///
/// # Errors
/// [`Error::Store`].
pub async fn due_rows(
    dynamodb: &Client,
    table: &str,
    index: &str,
    shard_attribute: &str,
    shards: impl IntoIterator<Item = String>,
    operation: &'static str,
) -> Result<Vec<(UserId, Uuid)>> {
    let now = Time::now().sortable();
    let read = shards.into_iter().map(async |shard| {
        let mut due = Vec::new();
        let mut items = dynamodb
            .query()
            .table_name(table)
            .index_name(index)
            .key_condition_expression("#shard = :shard AND due_at < :now")
            .expression_attribute_names("#shard", shard_attribute)
            .expression_attribute_values(":shard", text(shard))
            .expression_attribute_values(":now", text(&now))
            .into_paginator()
            .items()
            .send();
        while let Some(item) = items.next().await {
            let item = item.map_err(store_error(operation))?;
            let attribute = |name: &str| item.get(name).and_then(|value| value.as_s().ok());
            let (user, id) = (attribute("user"), attribute("id").and_then(|id| Uuid::try_parse(id).ok()));
            match (user, id) {
                (Some(user), Some(id)) => due.push((UserId::new(user), id)),
                // It must not keep the others from being looked after.
                _ => tracing::error!(index, "store.row_without_owner_or_id"),
            }
        }
        Ok::<_, Error>(due)
    });
    Ok(try_join_all(read).await?.into_iter().flatten().collect())
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
