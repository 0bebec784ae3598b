//! Reads S3 objects that may be missing.
//!
//! An object and the row with its key are two writes, so a reader can find one without the other: while a conversation is being deleted, or
//! after a lifecycle rule has deleted the object. Therefore a missing object is a normal result and not an error.

use aws_sdk_s3::Client;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::operation::head_object::HeadObjectOutput;

use crate::dynamo::store_error;
use crate::error::{Error, Result, StoreError, StoreErrorKind};

/// Opens an object without reading its body. Returns `None` when it is missing.
///
/// # Errors
/// [`Error::Store`].
pub async fn open(s3: &Client, bucket: &str, key: &str, operation: &'static str) -> Result<Option<GetObjectOutput>> {
    present(s3.get_object().bucket(bucket).key(key).send().await, key, operation)
}

/// Returns the metadata of an object, or `None` when it is missing.
///
/// # Errors
/// [`Error::Store`].
pub async fn head(s3: &Client, bucket: &str, key: &str, operation: &'static str) -> Result<Option<HeadObjectOutput>> {
    present(s3.head_object().bucket(bucket).key(key).send().await, key, operation)
}

/// Reads an object as text. Returns `None` when it is missing.
///
/// # Errors
/// [`Error::Store`]; [`Error::Internal`] when it is not UTF-8.
pub async fn read_text(s3: &Client, bucket: &str, key: &str, operation: &'static str) -> Result<Option<String>> {
    match open(s3, bucket, key, operation).await? {
        Some(object) => text(object, operation).await.map(Some),
        None => Ok(None),
    }
}

/// Reads the body of an open object as text.
///
/// # Errors
/// [`Error::Store`] when the body cannot be read completely; [`Error::Internal`] when it is not UTF-8.
pub async fn text(object: GetObjectOutput, operation: &'static str) -> Result<String> {
    let body = object.body.collect().await.map_err(|error| interrupted(operation, &error))?;
    String::from_utf8(body.into_bytes().into()).map_err(Error::internal)
}

/// Returns the length of an open object in bytes.
#[must_use]
pub fn length(object: &GetObjectOutput) -> u64 {
    object.content_length().and_then(|length| u64::try_from(length).ok()).unwrap_or_default()
}

/// Returns the error for an incomplete body.
pub fn interrupted(operation: &'static str, error: &impl std::fmt::Display) -> Error {
    StoreError::new(StoreErrorKind::Other, format!("{operation}: the body was interrupted: {error}")).into()
}

fn present<T, E>(answer: Result<T, SdkError<E>>, key: &str, operation: &'static str) -> Result<Option<T>>
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    let error = match answer {
        Ok(found) => return Ok(Some(found)),
        Err(error) => error,
    };
    // A HeadObject response has no body, so its errors are identified by their status.
    let status = error.raw_response().map(|response| response.status().as_u16());
    let code = error.code().unwrap_or_default();
    match (code, status) {
        ("NoSuchKey" | "NotFound", _) | ("", Some(404)) => Ok(None),
        // S3 returns this error for a missing key if the caller lacks s3:ListBucket. The cause may also be a policy without s3:GetObject,
        // which must not stay unnoticed.
        ("AccessDenied" | "Forbidden", _) | ("", Some(403)) => {
            tracing::error!(key, operation, "object.access_denied");
            Ok(None)
        }
        _ => Err(store_error(operation)(error)),
    }
}
