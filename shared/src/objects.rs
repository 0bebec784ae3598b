//! Reads objects of the bucket that may be missing.
//!
//! An object and the row that names it are two writes, so a reader can meet one without the other: while a conversation is
//! deleted, or after a lifecycle rule has removed the object. A missing object is therefore an outcome and not a failure.

use aws_sdk_s3::Client;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::operation::head_object::HeadObjectOutput;

use crate::dynamo::store_error;
use crate::error::{Error, Result, StoreError, StoreErrorKind};

/// Opens an object; `None` when it is missing. The body is not read yet.
///
/// # Errors
/// [`Error::Store`].
pub async fn open(s3: &Client, bucket: &str, key: &str, operation: &'static str) -> Result<Option<GetObjectOutput>> {
    present(s3.get_object().bucket(bucket).key(key).send().await, key, operation)
}

/// The metadata of an object; `None` when it is missing.
///
/// # Errors
/// [`Error::Store`].
pub async fn head(s3: &Client, bucket: &str, key: &str, operation: &'static str) -> Result<Option<HeadObjectOutput>> {
    present(s3.head_object().bucket(bucket).key(key).send().await, key, operation)
}

/// A whole object as text; `None` when it is missing.
///
/// # Errors
/// [`Error::Store`]; [`Error::Internal`] when it is not UTF-8.
pub async fn read_text(s3: &Client, bucket: &str, key: &str, operation: &'static str) -> Result<Option<String>> {
    match open(s3, bucket, key, operation).await? {
        Some(object) => text(object, operation).await.map(Some),
        None => Ok(None),
    }
}

/// The body of an open object as text.
///
/// # Errors
/// [`Error::Store`] when it cannot be read to its end; [`Error::Internal`] when it is not UTF-8.
pub async fn text(object: GetObjectOutput, operation: &'static str) -> Result<String> {
    let body = object.body.collect().await.map_err(|error| interrupted(operation, &error))?;
    String::from_utf8(body.into_bytes().into()).map_err(Error::internal)
}

/// The length of an open object in bytes.
#[must_use]
pub fn length(object: &GetObjectOutput) -> u64 {
    object.content_length().and_then(|length| u64::try_from(length).ok()).unwrap_or_default()
}

/// The error for a body that ended early.
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
    // HeadObject has no body: its errors are known by their status.
    let status = error.raw_response().map(|response| response.status().as_u16());
    let code = error.code().unwrap_or_default();
    match (code, status) {
        ("NoSuchKey" | "NotFound", _) | ("", Some(404)) => Ok(None),
        // S3 answers this for a missing key to a caller without s3:ListBucket. It may also be a policy that lacks
        // s3:GetObject, which must not go unnoticed.
        ("AccessDenied" | "Forbidden", _) | ("", Some(403)) => {
            tracing::error!(key, operation, "object.access_denied");
            Ok(None)
        }
        _ => Err(store_error(operation)(error)),
    }
}
