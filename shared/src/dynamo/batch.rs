//! Batch reads and writes. Under load DynamoDB leaves some items of a batch unprocessed; those are retried with backoff.

use std::collections::HashMap;
use std::time::Duration;

use aws_sdk_dynamodb::types::{KeysAndAttributes, WriteRequest};

use super::error::store_error;
use super::retry::Backoff;
use super::{Item, Table};
use crate::error::{Error, Result, StoreError, StoreErrorKind};

/// The most keys in one `BatchGetItem`.
pub const BATCH_GET_LIMIT: usize = 100;
/// The most writes in one `BatchWriteItem`.
pub const BATCH_WRITE_LIMIT: usize = 25;

const UNPROCESSED: Backoff =
    Backoff { first: Duration::from_millis(20), longest: Duration::from_millis(1500), attempts: 8 };

impl Table {
    /// Reads items by key, strongly consistent, in no particular order. Keys without an item are skipped. Keys must be unique.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn batch_get(&self, keys: Vec<Item>) -> Result<Vec<Item>> {
        self.batch_get_all(keys, None, true).await
    }

    /// Like [`Table::batch_get`], but eventually consistent, for half the read units: for the rows of entries of an index, which lags anyway.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn batch_get_eventually(&self, keys: Vec<Item>) -> Result<Vec<Item>> {
        self.batch_get_all(keys, None, false).await
    }

    /// Like [`Table::batch_get`], but reads only one attribute of each item, so that the response is small even if items are large.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn batch_get_attribute(&self, keys: Vec<Item>, attribute: &str) -> Result<Vec<Item>> {
        self.batch_get_all(keys, Some(attribute), true).await
    }

    async fn batch_get_all(&self, keys: Vec<Item>, attribute: Option<&str>, is_consistent: bool) -> Result<Vec<Item>> {
        let mut items = Vec::with_capacity(keys.len());
        for chunk in keys.chunks(BATCH_GET_LIMIT) {
            self.batch_get_chunk(chunk.to_vec(), attribute, is_consistent, &mut items).await?;
        }
        Ok(items)
    }

    async fn batch_get_chunk(
        &self,
        keys: Vec<Item>,
        attribute: Option<&str>,
        is_consistent: bool,
        items: &mut Vec<Item>,
    ) -> Result<()> {
        let mut left = keys;
        let mut attempts = UNPROCESSED.start();
        while attempts.next().await {
            let wanted = KeysAndAttributes::builder()
                .set_keys(Some(left))
                .consistent_read(is_consistent)
                .set_projection_expression(attribute.map(|_| "#attribute".to_owned()))
                .set_expression_attribute_names(
                    attribute.map(|name| HashMap::from([("#attribute".to_owned(), name.to_owned())])),
                )
                .build()
                .map_err(Error::internal)?;
            let get = self.client.batch_get_item().request_items(&self.name, wanted);
            let found = get.send().await.map_err(store_error(self.operation("BatchGetItem")))?;
            items.extend(found.responses.unwrap_or_default().remove(&self.name).unwrap_or_default());
            let unprocessed = found.unprocessed_keys.unwrap_or_default().remove(&self.name);
            left = unprocessed.map(|unprocessed| unprocessed.keys).unwrap_or_default();
            if left.is_empty() {
                return Ok(());
            }
        }
        Err(self.unprocessed("BatchGetItem", left.len()))
    }

    /// Writes or deletes items. Keys must be unique.
    ///
    /// # Errors
    /// [`Error::Store`]; some of them may be written then.
    pub async fn batch_write(&self, writes: &[WriteRequest]) -> Result<()> {
        for chunk in writes.chunks(BATCH_WRITE_LIMIT) {
            self.batch_write_chunk(chunk.to_vec()).await?;
        }
        Ok(())
    }

    async fn batch_write_chunk(&self, writes: Vec<WriteRequest>) -> Result<()> {
        let mut left = writes;
        let mut attempts = UNPROCESSED.start();
        while attempts.next().await {
            let write = self.client.batch_write_item().request_items(&self.name, left);
            let written = write.send().await.map_err(store_error(self.operation("BatchWriteItem")))?;
            left = written.unprocessed_items.unwrap_or_default().remove(&self.name).unwrap_or_default();
            if left.is_empty() {
                return Ok(());
            }
        }
        Err(self.unprocessed("BatchWriteItem", left.len()))
    }

    fn unprocessed(&self, call: &str, items: usize) -> Error {
        let context = format!("{}: {items} items stayed unprocessed", self.operation(call));
        StoreError::new(StoreErrorKind::Throttled, context).into()
    }
}
