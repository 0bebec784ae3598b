//! One table: reads and conditional writes of single items.

use std::time::Duration;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::operation::delete_item::DeleteItemError;
use aws_sdk_dynamodb::operation::query::builders::QueryFluentBuilder;
use aws_sdk_dynamodb::operation::update_item::UpdateItemError;
use aws_sdk_dynamodb::types::{
    ConditionCheck, Delete, Put, ReturnValue, ReturnValuesOnConditionCheckFailure, TransactWriteItem,
};

use super::error::{is_condition_failure, store_error};
use super::retry::Backoff;
use super::update::{Condition, Expression, Outcome, Update};
use super::{Item, text};
use crate::error::{Error, Result, StoreErrorKind};
use crate::id;

/// The backoff for conflicts: a write of one item fails while a transaction writes the same item, and the SDK does not retry it.
pub(super) const CONFLICTS: Backoff =
    Backoff { first: Duration::from_millis(40), longest: Duration::from_millis(2500), attempts: 8 };

/// The attribute with the id of the last write of [`Table::update_once`].
const LAST_WRITE: &str = "last_write";

/// A table. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Table {
    /// The client, for calls that this type does not cover.
    pub client: Client,
    pub name: String,
}

impl Table {
    #[must_use]
    pub fn new(client: Client, name: String) -> Self {
        Self { client, name }
    }

    /// Reads one item, strongly consistent.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn get(&self, key: Item) -> Result<Option<Item>> {
        let get = self.client.get_item().table_name(&self.name).set_key(Some(key)).consistent_read(true);
        let found = get.send().await.map_err(store_error(self.operation("GetItem")))?;
        Ok(found.item)
    }

    /// Starts a query.
    #[must_use]
    pub fn query(&self) -> QueryFluentBuilder {
        self.client.query().table_name(&self.name)
    }

    /// Updates one item and returns it.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn update(&self, key: Item, update: Update) -> Result<Outcome> {
        self.send_update(key, update, ReturnValue::AllNew).await
    }

    /// Updates one item and returns whether its conditions held. The response does not contain the item.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn apply(&self, key: Item, update: Update) -> Result<bool> {
        Ok(self.send_update(key, update, ReturnValue::None).await?.is_applied())
    }

    /// Updates one item exactly once and returns it, also when the update alone is not idempotent: it appends to a list, adds to a number,
    /// or invalidates its own condition. The SDK retries an update whose response was lost. The item therefore stores an id of its last
    /// write, which identifies the retry.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn update_once(&self, key: Item, update: Update) -> Result<Outcome> {
        let write = text(id::random_base62(16));
        let update = update.set(LAST_WRITE, write.clone()).condition(Condition::not_equal(LAST_WRITE, write.clone()));
        Ok(match self.update(key, update).await? {
            Outcome::ConditionFailed(Some(item)) if item.get(LAST_WRITE) == Some(&write) => Outcome::Applied(item),
            outcome => outcome,
        })
    }

    async fn send_update(&self, key: Item, update: Update, returned: ReturnValue) -> Result<Outcome> {
        let (update, condition, expression) = update.expressions();
        let update = self
            .client
            .update_item()
            .table_name(&self.name)
            .set_key(Some(key))
            .set_update_expression(update)
            .set_condition_expression(condition)
            .set_expression_attribute_names(expression.names())
            .set_expression_attribute_values(expression.values())
            .return_values(returned)
            .return_values_on_condition_check_failure(ReturnValuesOnConditionCheckFailure::AllOld);
        let mut attempts = CONFLICTS.start();
        loop {
            attempts.next().await;
            let error = match update.clone().send().await {
                Ok(updated) => return Ok(Outcome::Applied(updated.attributes.unwrap_or_default())),
                Err(error) => error,
            };
            if let Some(UpdateItemError::ConditionalCheckFailedException(failed)) = error.as_service_error() {
                return Ok(Outcome::ConditionFailed(failed.item().cloned()));
            }
            let error = store_error(self.operation("UpdateItem"))(error);
            if attempts.is_last() || !is_conflict(&error) {
                return Err(error);
            }
        }
    }

    /// Writes a whole item. Returns whether the condition held.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn put(&self, item: Item, condition: Condition) -> Result<bool> {
        let (condition, expression) = Expression::of(&condition);
        let put = self
            .client
            .put_item()
            .table_name(&self.name)
            .set_item(Some(item))
            .condition_expression(condition)
            .set_expression_attribute_names(expression.names())
            .set_expression_attribute_values(expression.values());
        let mut attempts = CONFLICTS.start();
        loop {
            attempts.next().await;
            match put.clone().send().await.map_err(store_error(self.operation("PutItem"))) {
                Ok(_) => return Ok(true),
                Err(error) if is_condition_failure(&error) => return Ok(false),
                Err(error) if attempts.is_last() || !is_conflict(&error) => return Err(error),
                Err(_) => {}
            }
        }
    }

    /// Deletes an item. If the condition does not hold, returns the existing item instead.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn delete(&self, key: Item, condition: Condition) -> Result<Result<(), Option<Item>>> {
        let (condition, expression) = Expression::of(&condition);
        let delete = self
            .client
            .delete_item()
            .table_name(&self.name)
            .set_key(Some(key))
            .condition_expression(condition)
            .set_expression_attribute_names(expression.names())
            .set_expression_attribute_values(expression.values())
            .return_values_on_condition_check_failure(ReturnValuesOnConditionCheckFailure::AllOld);
        let mut attempts = CONFLICTS.start();
        loop {
            attempts.next().await;
            let Err(error) = delete.clone().send().await else { return Ok(Ok(())) };
            if let Some(DeleteItemError::ConditionalCheckFailedException(failed)) = error.as_service_error() {
                return Ok(Err(failed.item().cloned()));
            }
            let error = store_error(self.operation("DeleteItem"))(error);
            if attempts.is_last() || !is_conflict(&error) {
                return Err(error);
            }
        }
    }

    /// The write of a whole item, as part of a transaction.
    ///
    /// # Errors
    /// [`Error::Internal`] when the item is empty.
    pub fn put_in_transaction(&self, item: Item, condition: &Condition) -> Result<TransactWriteItem> {
        let (condition, expression) = Expression::of(condition);
        let put = Put::builder()
            .table_name(&self.name)
            .set_item(Some(item))
            .condition_expression(condition)
            .set_expression_attribute_names(expression.names())
            .set_expression_attribute_values(expression.values());
        Ok(TransactWriteItem::builder().put(put.build().map_err(Error::internal)?).build())
    }

    /// The deletion of an item, as part of a transaction.
    ///
    /// # Errors
    /// [`Error::Internal`] when the key is empty.
    pub fn delete_in_transaction(&self, key: Item, condition: Option<&Condition>) -> Result<TransactWriteItem> {
        let mut delete = Delete::builder().table_name(&self.name).set_key(Some(key));
        if let Some(condition) = condition {
            let (condition, expression) = Expression::of(condition);
            delete = delete
                .condition_expression(condition)
                .set_expression_attribute_names(expression.names())
                .set_expression_attribute_values(expression.values());
        }
        Ok(TransactWriteItem::builder().delete(delete.build().map_err(Error::internal)?).build())
    }

    /// A condition on an item that is not written, as part of a transaction.
    ///
    /// # Errors
    /// [`Error::Internal`] when the key is empty.
    pub fn check_in_transaction(&self, key: Item, condition: &Condition) -> Result<TransactWriteItem> {
        let (condition, expression) = Expression::of(condition);
        let check = ConditionCheck::builder()
            .table_name(&self.name)
            .set_key(Some(key))
            .condition_expression(condition)
            .set_expression_attribute_names(expression.names())
            .set_expression_attribute_values(expression.values());
        Ok(TransactWriteItem::builder().condition_check(check.build().map_err(Error::internal)?).build())
    }

    /// The name of a call in the log.
    pub(super) fn operation(&self, call: &str) -> String {
        format!("{call} {}", self.name)
    }
}

fn is_conflict(error: &Error) -> bool {
    matches!(error, Error::Store(store) if store.kind() == StoreErrorKind::Conflict)
}
