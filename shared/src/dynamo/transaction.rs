//! Transactions, with the reasons for which one was cancelled.

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

/// The part that one item had in the cancellation of its transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cancellation {
    /// None: the item could have been written.
    None,
    /// The item's condition does not hold.
    ConditionFailed,
    /// Another transaction or write of the item was under way.
    Conflict,
    /// The item's table or partition is over its capacity.
    Throttled,
    /// Another reason, by its code.
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
    /// Nothing was written, because at least one condition does not hold. One entry for each item, in their order.
    ConditionFailed(Vec<Cancellation>),
}

impl Transacted {
    /// Whether everything was written.
    #[must_use]
    pub fn is_written(&self) -> bool {
        *self == Self::Written
    }

    /// For transactions whose conditions always hold.
    ///
    /// # Errors
    /// [`Error::Store`] when one does not.
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

/// Writes all of `items` or none of them. `operation` names the call in the log.
///
/// A transaction that collides with another write, or is throttled, is repeated with backoff: two rows of one user share the item
/// that counts them. All attempts carry one `ClientRequestToken`: for ten minutes DynamoDB answers a repetition of a transaction
/// that was written, whose response was lost, with success and writes nothing again.
///
/// # Errors
/// [`Error::Store`]; the transaction may have been written then.
pub async fn transact(client: &Client, items: Vec<TransactWriteItem>, operation: &str) -> Result<Transacted> {
    // An id in hex is within the token's 36 characters.
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

/// Gives the error of a cancelled transaction the kind of its reasons. A reason that no repetition changes prevails.
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
