//! Converts failed AWS calls to [`StoreError`]s.

use std::fmt::Display;

use aws_sdk_dynamodb::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};

use crate::error::{Error, Result, StoreError, StoreErrorKind};

/// Converts a failed AWS call to an [`Error`]. `operation` names the call in the log, e.g. `Query events`.
pub fn store_error<E>(operation: impl Display) -> impl FnOnce(SdkError<E>) -> Error
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    move |error| {
        let (code, context) = match error.as_service_error() {
            Some(service) => {
                let code = service.code().unwrap_or_default();
                (code, format!("{operation}: {code}: {}", service.message().unwrap_or_default()))
            }
            None => ("", format!("{operation}: {}", DisplayErrorContext(&error))),
        };
        let kind = kind_of(code);
        StoreError::new(kind, context).with_source(error).into()
    }
}

/// Maps the code of a DynamoDB error, or of a transaction's cancellation reason, to the kind of the error.
pub(super) fn kind_of(code: &str) -> StoreErrorKind {
    match code {
        "ConditionalCheckFailedException" | "ConditionalCheckFailed" => StoreErrorKind::ConditionFailed,
        "TransactionConflictException" | "TransactionConflict" | "TransactionInProgressException" => {
            StoreErrorKind::Conflict
        }
        "ThrottlingException"
        | "ThrottlingError"
        | "ProvisionedThroughputExceededException"
        | "ProvisionedThroughputExceeded"
        | "RequestLimitExceeded" => StoreErrorKind::Throttled,
        _ => StoreErrorKind::Other,
    }
}

/// Whether a write failed because its condition did not hold.
#[must_use]
pub fn is_condition_failure(error: &Error) -> bool {
    matches!(error, Error::Store(store) if store.kind() == StoreErrorKind::ConditionFailed)
}

/// Resolves a failed write whose outcome is unknown: it succeeded if `is_written` finds what it wrote; otherwise its own error is returned.
/// `is_written` must read consistently. An idempotent create needs this, because its caller retries a failed create with another id.
///
/// # Errors
/// The error of the write.
pub async fn unless_written(written: Result<()>, is_written: impl AsyncFnOnce() -> Result<bool>) -> Result<()> {
    let Err(error) = written else { return Ok(()) };
    match is_written().await {
        Ok(true) => {
            tracing::info!(error = %error.context(), "store.lost_write_found");
            Ok(())
        }
        Ok(false) | Err(_) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_sorted_by_what_they_mean() {
        for (code, kind) in [
            ("ConditionalCheckFailedException", StoreErrorKind::ConditionFailed),
            ("TransactionInProgressException", StoreErrorKind::Conflict),
            ("TransactionConflictException", StoreErrorKind::Conflict),
            ("ThrottlingException", StoreErrorKind::Throttled),
            ("RequestLimitExceeded", StoreErrorKind::Throttled),
            ("ValidationException", StoreErrorKind::Other),
            ("", StoreErrorKind::Other),
        ] {
            assert_eq!(kind_of(code), kind, "{code}");
        }
    }

    #[tokio::test]
    async fn a_failed_write_is_looked_for() {
        let failed = || Err(StoreError::new(StoreErrorKind::Other, "PutItem: 500").into());
        unless_written(Ok(()), async || panic!("not looked for")).await.expect("written");
        unless_written(failed(), async || Ok(true)).await.expect("found");
        unless_written(failed(), async || Ok(false)).await.expect_err("not found");
        let error = unless_written(failed(), async || Err(Error::internal("unreachable"))).await.expect_err("unknown");
        assert_eq!(error.context(), "PutItem: 500");
    }
}
