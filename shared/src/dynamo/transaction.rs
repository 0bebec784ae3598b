//! Transactions, with their cancellation reasons.

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::error::SdkError;
use aws_sdk_dynamodb::operation::transact_write_items::TransactWriteItemsError;
use aws_sdk_dynamodb::types::{CancellationReason, TransactWriteItem};

use super::error::{kind_of, store_error};
use super::table::CONFLICTS;
use crate::error::{Error, Result, StoreError, StoreErrorKind};
use crate::id;

/// The most writes in one transaction.
pub const TRANSACTION_LIMIT: usize = 100;

/// Why one item caused the cancellation of its transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cancellation {
    /// The item did not cause it.
    None,
    /// The item's condition does not hold.
    ConditionFailed,
    /// Another transaction or write of the item was in progress.
    Conflict,
    /// The item's table or partition exceeds its capacity.
    Throttled,
    /// Another reason, identified by its code.
    Other(String),
}

impl Cancellation {
    fn read(reason: &CancellationReason) -> Self {
        match reason.code() {
            None | Some("None" | "") => Self::None,
            Some(code) => match kind_of(code) {
                StoreErrorKind::ConditionFailed => Self::ConditionFailed,
                StoreErrorKind::Conflict => Self::Conflict,
                StoreErrorKind::Throttled => Self::Throttled,
                StoreErrorKind::Other => Self::Other(code.to_owned()),
            },
        }
    }
}

/// The result of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Transacted {
    /// Everything was written.
    Written,
    /// Nothing was written, because at least one condition does not hold. One entry for each item, in the order of the items.
    ConditionFailed(Vec<Cancellation>),
}

impl Transacted {
    /// Whether everything was written.
    #[must_use]
    pub fn is_written(&self) -> bool {
        *self == Self::Written
    }

    /// Converts the result to an error unless everything was written; for transactions whose conditions always hold.
    ///
    /// # Errors
    /// [`Error::Store`] when a condition does not hold.
    pub fn require(self, operation: &str) -> Result<()> {
        match self {
            Self::Written => Ok(()),
            Self::ConditionFailed(reasons) => {
                let context = format!("{operation}: a condition does not hold: {reasons:?}");
                Err(StoreError::new(StoreErrorKind::ConditionFailed, context).into())
            }
        }
    }
}

/// Writes all of `items` or none of them. `operation` identifies the call in the log.
///
/// A transaction that conflicts with another write, or is throttled, is retried with backoff: two rows of one user share the item with
/// their counters. All attempts have the same `ClientRequestToken`: for ten minutes DynamoDB responds to a retry of a written transaction
/// with success and writes nothing again.
///
/// # Errors
/// [`Error::Store`]; the transaction may have been written then.
pub async fn transact(client: &Client, items: Vec<TransactWriteItem>, operation: &str) -> Result<Transacted> {
    // An id in hex fits into the token's 36 characters.
    let token = id::hex(id::new_uuid());
    let write = client.transact_write_items().set_transact_items(Some(items)).client_request_token(token);
    let mut attempts = CONFLICTS.start();
    loop {
        attempts.next().await;
        let Err(error) = write.clone().send().await else { return Ok(Transacted::Written) };
        let reasons = cancellations(&error);
        if reasons.contains(&Cancellation::ConditionFailed) {
            return Ok(Transacted::ConditionFailed(reasons));
        }
        let error = with_kind(store_error(operation)(error), &reasons);
        if attempts.is_last() || !is_temporary(&error) {
            return Err(error);
        }
    }
}

fn cancellations(error: &SdkError<TransactWriteItemsError>) -> Vec<Cancellation> {
    match error.as_service_error() {
        Some(TransactWriteItemsError::TransactionCanceledException(cancelled)) => {
            cancelled.cancellation_reasons().iter().map(Cancellation::read).collect()
        }
        _ => Vec::new(),
    }
}

/// Sets the kind of a cancelled transaction's error by its reasons. A permanent reason has priority.
fn with_kind(error: Error, reasons: &[Cancellation]) -> Error {
    let kind = if reasons.iter().any(|reason| matches!(reason, Cancellation::Other(_))) {
        None
    } else if reasons.contains(&Cancellation::Throttled) {
        Some(StoreErrorKind::Throttled)
    } else {
        reasons.contains(&Cancellation::Conflict).then_some(StoreErrorKind::Conflict)
    };
    match (error, kind) {
        (Error::Store(store), Some(kind)) => Error::Store(store.with_kind(kind)),
        (error, _) => error,
    }
}

fn is_temporary(error: &Error) -> bool {
    matches!(error, Error::Store(store) if matches!(store.kind(), StoreErrorKind::Conflict | StoreErrorKind::Throttled))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_typed_and_the_kind_is_that_of_the_reasons() {
        let read = |code: &str| Cancellation::read(&CancellationReason::builder().code(code).build());
        assert_eq!(Cancellation::read(&CancellationReason::builder().build()), Cancellation::None);
        assert_eq!(read("None"), Cancellation::None);
        assert_eq!(read("ConditionalCheckFailed"), Cancellation::ConditionFailed);
        assert_eq!(read("TransactionConflict"), Cancellation::Conflict);
        for throttled in ["ThrottlingError", "ProvisionedThroughputExceeded", "RequestLimitExceeded"] {
            assert_eq!(read(throttled), Cancellation::Throttled, "{throttled}");
        }
        assert_eq!(read("ValidationError"), Cancellation::Other("ValidationError".into()));

        let kind = |reasons: &[Cancellation]| {
            let error = StoreError::new(StoreErrorKind::Other, "TransactWriteItems").into();
            match with_kind(error, reasons) {
                Error::Store(store) => store.kind(),
                other => panic!("{other:?}"),
            }
        };
        let other = Cancellation::Other("ValidationError".into());
        assert_eq!(kind(&[Cancellation::None, Cancellation::Conflict]), StoreErrorKind::Conflict);
        assert_eq!(kind(&[Cancellation::Conflict, Cancellation::Throttled]), StoreErrorKind::Throttled);
        assert_eq!(kind(&[Cancellation::Conflict, other]), StoreErrorKind::Other);
        assert_eq!(kind(&[]), StoreErrorKind::Other);
    }
}
