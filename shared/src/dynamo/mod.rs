//! DynamoDB access for the stores of this crate: conditional updates, leases, transactions, batches, due rows and retries.
//!
//! Every write here is idempotent, because the SDK retries a call whose response was lost, although the call may have succeeded. A
//! condition that does not hold is therefore a value and never an error: the stores decide what it means.

mod batch;
mod due_index;
mod error;
pub mod lease;
mod retry;
mod table;
mod transaction;
mod update;

use std::collections::HashMap;
use std::time::Duration;

use aws_sdk_dynamodb::types::AttributeValue;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use batch::{BATCH_GET_LIMIT, BATCH_WRITE_LIMIT};
pub use due_index::{DUE_LIMIT, Due, DueIndex, DueRow};
pub use error::{store_error, unless_written};
pub use retry::{Attempts, Backoff};
pub use table::Table;
pub use transaction::{Cancellation, TRANSACTION_LIMIT, Transacted, transact};
pub use update::{Condition, Outcome, Update};

use crate::error::{Error, Result};

/// The time after which an index contains a write. DynamoDB guarantees no bound, and usually needs a fraction of a second.
pub const INDEX_LAG: Duration = Duration::from_secs(3);

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

/// Converts a record to an item.
///
/// # Errors
/// [`Error::Internal`] when the record's type cannot be written as an item, which is a defect of the type.
pub fn to_item<T: Serialize>(record: &T) -> Result<Item> {
    serde_dynamo::to_item(record)
        .map_err(|error| Error::internal(format!("a record cannot be written as an item: {error}")))
}

/// Converts an item to a record. Attributes that the record does not have are ignored.
///
/// # Errors
/// [`Error::Internal`] when the item does not match the record's type.
pub fn from_item<T: DeserializeOwned>(item: Item) -> Result<T> {
    serde_dynamo::from_item(item)
        .map_err(|error| Error::internal(format!("an item does not match its record: {error}")))
}
