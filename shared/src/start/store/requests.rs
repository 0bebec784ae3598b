//! Storage of start requests: large ones are S3 objects, and secrets are sealed (encrypted).

use std::collections::BTreeMap;

use aws_sdk_s3::operation::get_object::GetObjectOutput;
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::StartTaskStore;
use crate::dynamo::store_error;
use crate::error::{Error, Result};
use crate::http::page::{self, Items, PAGE_SIZE};
use crate::id::{self, UserId};
use crate::objects;
use crate::start::abridged::abridged;
use crate::start::request::StartRequest;
use crate::start::task::{ABRIDGED_SIZE, AppConversationStartTask, StartTask, StartTaskRecord, raw};

/// The number of S3 objects that are opened concurrently. Their bodies are read sequentially.
const OPEN_REQUESTS: usize = 4;

impl StartTaskStore {
    /// Returns the tasks in the form of the API, up to the first one that exceeds the size of the page.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn show_page(&self, records: &[StartTaskRecord]) -> Result<Items<AppConversationStartTask>> {
        let mut items = Items::default();
        let keys: Vec<Option<String>> = records.iter().map(|record| record.request_object.clone()).collect();
        let mut opened = stream::iter(keys).map(|key| self.open_request(key)).buffered(OPEN_REQUESTS);
        for record in records {
            let Some(request) = opened.try_next().await? else { break };
            // A task that exceeds the size of a whole page is shown with its request abridged.
            let request = match read_request(record, request, items.left()).await? {
                Some(request) => request,
                None if items.is_empty() => self.abridged_request(record).await?,
                None => break,
            };
            if !items.push(&record.show_at(&record.now, request))? {
                break;
            }
        }
        Ok(items)
    }

    /// Returns all tasks in the form of the API, in one response. Requests are abridged if the response would be too large.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn show_all(&self, records: &[Option<StartTaskRecord>]) -> Result<Vec<Option<AppConversationStartTask>>> {
        let found = records.iter().flatten().count();
        let mut left = PAGE_SIZE.saturating_sub(ABRIDGED_SIZE * u64::try_from(found).unwrap_or(u64::MAX));
        let keys: Vec<Option<String>> = records.iter().flatten().map(|record| record.request_object.clone()).collect();
        let mut opened = stream::iter(keys).map(|key| self.open_request(key)).buffered(OPEN_REQUESTS);
        let mut shown = Vec::with_capacity(records.len());
        for record in records {
            let Some(record) = record else {
                shown.push(None);
                continue;
            };
            let Some(request) = opened.try_next().await? else { break };
            let request = match read_request(record, request, left).await? {
                Some(request) => {
                    left = left.saturating_sub(page::size_of_text(request.get().as_bytes()));
                    request
                }
                None => self.abridged_request(record).await?,
            };
            shown.push(Some(record.show_at(&record.now, request)));
        }
        Ok(shown)
    }

    /// Stores a large request in the bucket and returns its key.
    pub(super) async fn put_request(&self, record: &StartTaskRecord) -> Result<String> {
        let owner = crate::digest::sha256_hex(record.user.as_str());
        // The random part keeps apart concurrent requests with one idempotency key, of which one creates the task.
        let key = format!("start-requests/{}/{owner}-{}.json", id::hex(record.id), id::random_base62(8));
        self.s3
            .put_object()
            .bucket(&self.bucket)
            .key(&key)
            .content_type("application/json")
            .body(record.request.clone().into_bytes().into())
            .send()
            .await
            .map_err(store_error("PutObject start-requests"))?;
        Ok(key)
    }

    pub(super) async fn delete_request(&self, key: &str) -> Result<()> {
        let removed = self.s3.delete_object().bucket(&self.bucket).key(key).send().await;
        removed.map_err(store_error("DeleteObject start-requests"))?;
        Ok(())
    }

    /// Opens the S3 object of a record's request; `key` is the record's [`StartTaskRecord::request_object`].
    async fn open_request(&self, key: Option<String>) -> Result<OpenRequest> {
        let Some(key) = key else { return Ok(OpenRequest::Inline) };
        let object = objects::open(&self.s3, &self.bucket, &key, "GetObject start-requests").await?;
        Ok(object.map_or(OpenRequest::Missing, |object| OpenRequest::Object(Box::new(object))))
    }

    /// Returns the abridged form of a record's request.
    async fn abridged_request(&self, record: &StartTaskRecord) -> Result<Box<RawValue>> {
        let Some(key) = &record.request_object else { return Ok(raw(abridged(&record.request))) };
        if !record.request.is_empty() {
            return Ok(raw(record.request.clone()));
        }
        // A record of an earlier version has no abridged request.
        let request = objects::read_text(&self.s3, &self.bucket, key, "GetObject start-requests").await?;
        Ok(request.map_or_else(missing_request, |request| raw(abridged(&request))))
    }

    /// Reads the whole request of a record from the table, and returns the task.
    pub(super) async fn open(&self, mut record: StartTaskRecord) -> Result<StartTask> {
        if let Some(key) = &record.request_object {
            let request = objects::read_text(&self.s3, &self.bucket, key, "GetObject start-requests").await?;
            record.request = request.ok_or_else(|| Error::internal("the request of a start is not in the bucket"))?;
        }
        let mut request: StartRequest = serde_json::from_str(&record.request)
            .map_err(|error| Error::internal(format!("a stored start request does not read: {error}")))?;
        if let Some(sealed) = &record.secrets_sealed {
            let json = self.sealer.open(&secrets_purpose(&record.user, record.id), sealed).await?;
            let secrets: BTreeMap<String, String> = serde_json::from_str(json.expose_secret())
                .map_err(|_| Error::internal("sealed secrets of a start do not read"))?;
            request.secrets = Some(secrets.into_iter().map(|(name, value)| (name, value.into())).collect());
        }
        Ok(StartTask { record, request })
    }

    pub(super) async fn seal_digest(&self, user: &UserId, id: Uuid, digest: Option<&str>) -> Result<Option<String>> {
        let Some(digest) = digest else { return Ok(None) };
        self.sealer.seal(&digest_purpose(user, id), &digest.into()).await.map(Some)
    }

    /// Whether a sealed digest of a request is this one.
    pub(super) async fn is_digest(&self, user: &UserId, id: Uuid, sealed: &str, digest: &str) -> Result<bool> {
        Ok(self.sealer.open(&digest_purpose(user, id), sealed).await?.expose_secret() == digest)
    }

    pub(super) async fn seal_secrets(&self, user: &UserId, id: Uuid, request: &StartRequest) -> Result<Option<String>> {
        let Some(secrets) = &request.secrets else { return Ok(None) };
        let exposed: BTreeMap<&str, &str> =
            secrets.values().map(|(name, value)| (name, value.expose_secret())).collect();
        if exposed.is_empty() {
            return Ok(None);
        }
        let json = SecretString::from(serde_json::to_string(&exposed).map_err(Error::internal)?);
        self.sealer.seal(&secrets_purpose(user, id), &json).await.map(Some)
    }
}

/// The source of a record's request.
enum OpenRequest {
    /// The record holds it.
    Inline,
    /// An object in the bucket holds it.
    Object(Box<GetObjectOutput>),
    /// The object was deleted.
    Missing,
}

/// Reads the request of a record; `None` if its size exceeds `limit` bytes of a response.
async fn read_request(record: &StartTaskRecord, request: OpenRequest, limit: u64) -> Result<Option<Box<RawValue>>> {
    let request = match request {
        OpenRequest::Object(object) if objects::length(&object) > limit => return Ok(None),
        OpenRequest::Object(object) => objects::text(*object, "GetObject start-requests").await?,
        // The task is being deleted; a deletion removes the request first.
        OpenRequest::Missing if record.request.is_empty() => return Ok(Some(missing_request())),
        OpenRequest::Inline | OpenRequest::Missing => record.request.clone(),
    };
    Ok((page::size_of_text(request.as_bytes()) <= limit).then(|| raw(request)))
}

/// A placeholder for a deleted request.
fn missing_request() -> Box<RawValue> {
    raw(serde_json::to_string(&StartRequest::default()).unwrap_or_default())
}

fn digest_purpose(user: &UserId, id: Uuid) -> String {
    format!("start-digest:{user}:{}", id::hex(id))
}

fn secrets_purpose(user: &UserId, id: Uuid) -> String {
    format!("start-secrets:{user}:{}", id::hex(id))
}
