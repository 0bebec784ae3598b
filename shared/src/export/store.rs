//! Stores export records (lease, status of the build, last result) and the export objects in the bucket.
//!
//! A conversation has at most one export record. It contains the lease of the process that builds the export, whether clients wait for the
//! function `exports` to build it, the last export that the function has finished, and why the last build failed. An export that a request
//! builds and returns leaves no record.
//!
//! Every build starts from the beginning with an upload of its own, and aborts the upload of the previous build: late writes of a process
//! that lost its lease go to an aborted upload.

use std::time::Duration;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{AttributeValue, ReturnValue};
use aws_sdk_s3::presigning::PresigningConfig;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;
use futures::stream::{self, Stream};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::clock::{Time, sortable};
use crate::digest::sha256_hex;
use crate::dynamo::lease;
use crate::dynamo::{Condition, Item, Table, Update, from_item, number, store_error, text, to_item};
use crate::error::{Error, Result};
use crate::id::{self, UserId};
use crate::objects;

/// The prefix of all export objects. They are temporary: a lifecycle rule removes them.
pub const PREFIX: &str = "exports/";
/// The lifetime of a link to an export. It is shorter if the credentials that sign the link expire earlier.
pub const LINK_LIFETIME: Duration = Duration::from_secs(15 * 60);
/// The media type of an export.
pub const CONTENT_TYPE: &str = "application/zip";

/// The time for which an export that was built by a job is the response to every request, even if the conversation has changed since.
const KEPT: Duration = Duration::from_secs(10 * 60);
/// The time for which a failed build is not retried.
const FAILURE_KEPT: Duration = Duration::from_secs(10 * 60);
/// The time that a job may wait in the queue before a request enqueues it again.
const REQUEUE_AFTER: Duration = Duration::from_secs(60);

/// The attributes of a build, without the lease.
const BUILD: [&str; 7] = ["upload", "progress", "wanted", "queued_at", "retry_at", "attempts", "warning"];

const GET: &str = "GetObject exports";

/// The object metadata with the time at which reading the log began. (Earlier versions chose the name, and their objects stay in use.)
const STARTED_AT: &str = "began-at";

/// A multipart upload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    /// The key of the object that the upload creates.
    pub key: String,
    pub upload_id: String,
}

/// An export that the function `exports` has finished.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finished {
    /// The key of the object.
    pub key: String,
    /// The time at which it was finished.
    #[serde(serialize_with = "sortable::serialize")]
    pub at: Time,
    /// The warning about missing events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// Why an export could not be built.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureReason {
    /// The conversation has more events than an export may contain.
    TooManyEvents {
        /// The number of the conversation's events.
        count: u64,
        /// The most events of an export.
        bound: u64,
    },
    /// The build exceeded the time limit of the function.
    OutOfTime {
        /// The time limit of the build.
        seconds: u64,
    },
    /// Each build crashed, or the store failed each time.
    RepeatedFailure {
        /// The number of builds.
        attempts: u32,
    },
}

/// A build that failed permanently. It is not retried for [`FAILURE_KEPT`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub reason: FailureReason,
    #[serde(serialize_with = "sortable::serialize")]
    pub at: Time,
}

impl Failure {
    pub(super) fn now(reason: FailureReason) -> Self {
        Self { reason, at: Time::now() }
    }

    /// The seconds after which a request builds the export again; at least 1.
    #[must_use]
    pub fn retry_after(&self) -> u64 {
        FAILURE_KEPT.saturating_sub(Time::now().since(self.at)).as_secs().max(1)
    }

    /// The message for the caller.
    #[must_use]
    pub fn message(&self) -> String {
        match self.reason {
            FailureReason::TooManyEvents { count, bound } => format!(
                "The conversation has {count} events, and an export holds at most {bound}: read the events page by page instead"
            ),
            FailureReason::OutOfTime { seconds } => format!(
                "The export could not be built within {seconds} seconds: retry in {} seconds, or read the events page by page instead",
                self.retry_after()
            ),
            FailureReason::RepeatedFailure { attempts } => format!(
                "The export could not be built in {attempts} attempts because of an error in this server: retry in {} seconds",
                self.retry_after()
            ),
        }
    }
}

/// The record of a conversation's export.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportRecord {
    /// The id of the process that builds the export.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_owner: Option<String>,
    /// The expiry of its lease, unless the lease is renewed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_until: Option<Time>,
    /// Whether a request has left the build to the function `exports`, and clients wait for it. (Earlier versions chose the name.)
    #[serde(default, rename = "wanted")]
    pub is_queued: bool,
    /// The time at which the job was last enqueued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queued_at: Option<Time>,
    /// The time before which the job is not enqueued again, after a build that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Time>,
    /// The number of builds that the function has started for this job.
    #[serde(default)]
    pub attempts: u32,
    /// The warning about events that the current build may lack.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// The upload of the build that has the lease, or of the previous build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload: Option<Upload>,
    /// The same in the format of earlier versions: with a checkpoint, from which builds are no longer resumed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Upload>,
    /// The last finished export.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Finished>,
    /// The failure of the last build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<Failure>,
}

impl ExportRecord {
    /// The finished export, while it is the response to every request.
    #[must_use]
    pub fn kept(&self) -> Option<&Finished> {
        self.finished.as_ref().filter(|finished| Time::now().since(finished.at) < KEPT)
    }

    /// The failure, while the build must not be retried.
    #[must_use]
    pub fn recent_failure(&self) -> Option<&Failure> {
        self.failed.as_ref().filter(|failed| Time::now().since(failed.at) < FAILURE_KEPT)
    }

    /// Whether a process has the lease.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.lease_owner.is_some() && self.lease_until.is_some_and(|until| until >= Time::now())
    }

    /// Whether the job must be enqueued again: its process crashed or failed, or its message was lost.
    #[must_use]
    pub fn is_requeue_due(&self) -> bool {
        let must_wait = self.retry_at.is_some_and(|retry_at| Time::now() < retry_at);
        if !self.is_queued || self.is_held() || must_wait {
            return false;
        }
        let Some(queued_at) = self.queued_at else { return true };
        let has_crashed = self.lease_owner.is_some() && self.lease_until.is_some_and(|until| until > queued_at);
        has_crashed || Time::now().since(queued_at) >= REQUEUE_AFTER
    }

    /// The uploads of builds that have ended.
    pub(super) fn uploads(&self) -> impl Iterator<Item = &Upload> {
        self.upload.iter().chain(&self.progress)
    }
}

/// The lease of a process that builds a conversation's export, kept as [`crate::dynamo::lease`] keeps all.
#[derive(Debug)]
pub struct Lease {
    user: UserId,
    conversation: Uuid,
    owner: String,
    lifetime: Duration,
}

impl Lease {
    #[must_use]
    pub fn conversation(&self) -> Uuid {
        self.conversation
    }

    /// The owner of the conversation.
    #[must_use]
    pub fn user(&self) -> &UserId {
        &self.user
    }

    fn renewed(&self, update: Update) -> Update {
        lease::Lease::of(&self.owner, self.lifetime).renew(update)
    }
}

/// An object in the bucket.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Size in bytes.
    pub length: u64,
    /// The time at which reading the log for it began.
    pub started_at: Option<Time>,
}

/// An object that is being read.
#[derive(Debug)]
pub struct Open {
    /// Size in bytes.
    pub length: u64,
    body: ByteStream,
}

impl Open {
    /// The body as a stream of chunks, of which at most one is in memory. If the body ends early, the stream ends with an error.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes>> {
        stream::try_unfold((self.body, self.length), async |(mut body, left)| {
            let piece = body.try_next().await.map_err(|error| objects::interrupted(GET, &error))?;
            match piece {
                Some(piece) => {
                    let left = left.saturating_sub(piece.len() as u64);
                    Ok(Some((piece, (body, left))))
                }
                None if left > 0 => Err(objects::interrupted(GET, &format!("{left} bytes are missing"))),
                None => Ok(None),
            }
        })
    }
}

/// S3's response to the upload of a part, which completing the upload needs.
#[derive(Clone, Debug)]
pub struct Part {
    e_tag: Option<String>,
    crc32: Option<String>,
}

/// Stores records in the `users` table and objects in the bucket.
#[derive(Clone, Debug)]
pub struct ExportStore {
    table: Table,
    s3: aws_sdk_s3::Client,
    bucket: String,
}

impl ExportStore {
    /// A store on the `users` table and the bucket.
    #[must_use]
    pub(crate) fn new(dynamodb: Client, users_table: String, s3: aws_sdk_s3::Client, bucket: String) -> Self {
        Self { table: Table::new(dynamodb, users_table), s3, bucket }
    }

    /// The key of the export with this fingerprint.
    #[must_use]
    pub fn key(user: &UserId, conversation: Uuid, fingerprint: &str) -> String {
        format!("{}{}.zip", folder(user, conversation), &sha256_hex(fingerprint)[..32])
    }

    /// Returns the record, if there is one.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn get(&self, user: &UserId, conversation: Uuid) -> Result<Option<ExportRecord>> {
        self.table.get(record_key(user, conversation)).await?.map(from_item).transpose()
    }

    /// Claims the lease for a request and returns it with the record, if no process has the lease, the build is not left to the function
    /// `exports`, and no finished export is valid. An older finished export stays in the record.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn claim_for_request(
        &self,
        user: &UserId,
        conversation: Uuid,
        lifetime: Duration,
    ) -> Result<Option<(Lease, ExportRecord)>> {
        let update = Update::new()
            .remove("failed")
            .condition(Condition::Any(vec![
                Condition::Missing("wanted"),
                Condition::equal("wanted", AttributeValue::Bool(false)),
            ]))
            .condition(Condition::Any(vec![
                Condition::Missing("finished"),
                Condition::Compare("finished.at", "<=", text(Time::now().minus(KEPT).sortable())),
            ]));
        self.claim(user, conversation, lifetime, update).await
    }

    /// Claims the lease for a job and returns it with the record, if no process has the lease and clients still wait. The attempts of the
    /// record include this one.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn claim_for_job(
        &self,
        user: &UserId,
        conversation: Uuid,
        lifetime: Duration,
    ) -> Result<Option<(Lease, ExportRecord)>> {
        self.claim(user, conversation, lifetime, Update::new().add("attempts", 1).condition(is_wanted())).await
    }

    async fn claim(
        &self,
        user: &UserId,
        conversation: Uuid,
        lifetime: Duration,
        update: Update,
    ) -> Result<Option<(Lease, ExportRecord)>> {
        let claim = lease::Lease::random(lifetime);
        let claimed = claim.claim(&self.table, record_key(user, conversation), update).await?.applied();
        let lease = Lease { user: user.clone(), conversation, owner: claim.owner, lifetime };
        Ok(claimed.map(from_item).transpose()?.map(|record| (lease, record)))
    }

    /// Renews the lease. False when it is lost.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn renew(&self, lease: &Lease) -> Result<bool> {
        self.table.apply(record_key(&lease.user, lease.conversation), lease.renewed(Update::new())).await
    }

    /// Renews the lease periodically. Returns when it is lost.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn keep(&self, lease: &Lease) -> Result<()> {
        let mut renewed_at = Instant::now();
        loop {
            sleep(lease.lifetime / 3).await;
            let renewed = loop {
                match self.renew(lease).await {
                    // A store that fails for a moment must not end a build of minutes, while the lease lasts.
                    Err(error) if renewed_at.elapsed() < lease.lifetime => {
                        tracing::warn!(error = %error.context(), "export.lease_not_renewed");
                        sleep(lease.lifetime / 10).await;
                    }
                    renewed => break renewed?,
                }
            };
            if !renewed {
                return Ok(());
            }
            renewed_at = Instant::now();
        }
    }

    /// Records the upload of the build that has the lease. False when the lease is lost.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn record_upload(&self, lease: &Lease, upload: &Upload) -> Result<bool> {
        let update = Update::new().set("upload", AttributeValue::M(to_item(upload)?)).remove("progress");
        self.table.apply(record_key(&lease.user, lease.conversation), lease.renewed(update)).await
    }

    /// Releases the lease and leaves the build to the function `exports`; the caller enqueues its job. False when the lease is lost.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn release_to_job(&self, lease: &Lease, warning: Option<&str>) -> Result<bool> {
        let update = Update::new()
            .set("wanted", AttributeValue::Bool(true))
            .set("queued_at", text(Time::now().sortable()))
            .set("attempts", number(0))
            .set("warning", warning.map_or(AttributeValue::Null(true), text))
            .remove_all(&["upload", "progress"]);
        self.release_with(lease, update).await
    }

    /// Records that the job of a record is enqueued again. False when another request has done so, or a build is still running.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn requeue(&self, user: &UserId, conversation: Uuid, record: &ExportRecord) -> Result<bool> {
        let update = Update::new()
            .set("queued_at", text(Time::now().sortable()))
            .condition(is_wanted())
            .condition(lease::is_free())
            .condition(Condition::unchanged("queued_at", record.queued_at.map(|seen| text(seen.sortable()))));
        Ok(self.table.update_once(record_key(user, conversation), update).await?.is_applied())
    }

    /// Releases the lease after an error. A request may restart the build at once; if clients wait for a job, their next request enqueues
    /// it again.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn release(&self, lease: &Lease) -> Result<()> {
        self.release_with(lease, Update::new().remove_all(&["queued_at", "upload", "progress"])).await.map(|_| ())
    }

    /// Releases the lease after a job failed. Requests enqueue the job again after `pause`.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn release_for_retry(&self, lease: &Lease, pause: Duration) -> Result<()> {
        let update = Update::new().set("retry_at", text(Time::now().plus(pause).sortable())).remove_all(&[
            "queued_at",
            "upload",
            "progress",
        ]);
        self.release_with(lease, update).await.map(|_| ())
    }

    /// Releases the lease after a permanent failure of the build. An older finished export stays in the record.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn fail(&self, lease: &Lease, failure: &Failure) -> Result<()> {
        let update = Update::new().set("failed", AttributeValue::M(to_item(failure)?)).remove_all(&BUILD);
        self.release_with(lease, update).await.map(|_| ())
    }

    /// Releases the lease after a complete build, for the clients that wait for the export.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn finish_for_clients(&self, lease: &Lease, key: &str, warning: Option<String>) -> Result<()> {
        let finished = Finished { key: key.to_owned(), at: Time::now(), warning };
        let update =
            Update::new().set("finished", AttributeValue::M(to_item(&finished)?)).remove_all(&BUILD).remove("failed");
        self.release_with(lease, update).await.map(|_| ())
    }

    /// Releases the lease and removes the record: the request that built the export returns it.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn finish(&self, lease: &Lease) -> Result<()> {
        let key = record_key(&lease.user, lease.conversation);
        lease::delete(&self.table, key, &lease.owner, []).await.map(|_| ())
    }

    /// Ends the wait for a job that was abandoned without a build: the next request builds the export. Does nothing while a process builds
    /// it. Returns true if clients waited.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn abandon(&self, user: &UserId, conversation: Uuid) -> Result<bool> {
        let update = lease::release(Update::new().remove_all(&["wanted", "queued_at", "attempts", "warning"]))
            .condition(is_wanted())
            .condition(lease::is_free());
        Ok(self.table.update_once(record_key(user, conversation), update).await?.is_applied())
    }

    /// Removes a finished export from the record, because its object no longer exists.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn remove_finished(&self, user: &UserId, conversation: Uuid, key: &str) -> Result<()> {
        let update = Update::new().remove("finished").condition(Condition::equal("finished.key", text(key)));
        self.table.apply(record_key(user, conversation), update).await.map(|_| ())
    }

    /// Updates the record and releases the lease. False when the lease is lost.
    async fn release_with(&self, lease: &Lease, update: Update) -> Result<bool> {
        let key = record_key(&lease.user, lease.conversation);
        Ok(lease::write(&self.table, key, &lease.owner, lease::release(update)).await?.is_applied())
    }

    /// Finds an object.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn find(&self, key: &str) -> Result<Option<Stored>> {
        let Some(found) = objects::head(&self.s3, &self.bucket, key, "HeadObject exports").await? else {
            return Ok(None);
        };
        let started_at = found.metadata().and_then(|metadata| metadata.get(STARTED_AT));
        let started_at = started_at.and_then(|text| text.parse::<jiff::Timestamp>().ok()).map(Time::from);
        Ok(Some(Stored { length: length(found.content_length()), started_at }))
    }

    /// Opens an object. Its body is read as it is consumed.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn open(&self, key: &str) -> Result<Option<Open>> {
        let object = objects::open(&self.s3, &self.bucket, key, GET).await?;
        Ok(object.map(|object| Open { length: objects::length(&object), body: object.body }))
    }

    /// A presigned link (signed URL) to the object. It needs no other credentials for [`LINK_LIFETIME`], and clients save the object under the name in
    /// `disposition`.
    ///
    /// # Errors
    /// [`Error::Store`] when the credentials are not available.
    pub async fn link(&self, key: &str, disposition: &str) -> Result<String> {
        let lifetime = PresigningConfig::expires_in(LINK_LIFETIME).map_err(Error::internal)?;
        let request = self
            .s3
            .get_object()
            .bucket(&self.bucket)
            .key(key)
            .response_content_type(CONTENT_TYPE)
            .response_content_disposition(disposition)
            .presigned(lifetime)
            .await
            .map_err(store_error("GetObject exports, presigned"))?;
        Ok(request.uri().to_owned())
    }

    /// Stores a whole export.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn put(&self, key: &str, started_at: Time, zip: Bytes) -> Result<()> {
        self.s3
            .put_object()
            .bucket(&self.bucket)
            .key(key)
            .content_type(CONTENT_TYPE)
            .metadata(STARTED_AT, started_at.sortable())
            .body(zip.into())
            .send()
            .await
            .map_err(store_error("PutObject exports"))?;
        Ok(())
    }

    /// Starts a multipart upload, and returns its id.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn start_upload(&self, key: &str, started_at: Time) -> Result<String> {
        let started = self
            .s3
            .create_multipart_upload()
            .bucket(&self.bucket)
            .key(key)
            .content_type(CONTENT_TYPE)
            .metadata(STARTED_AT, started_at.sortable())
            .send()
            .await
            .map_err(store_error("CreateMultipartUpload exports"))?;
        started.upload_id.ok_or_else(|| Error::internal("a multipart upload has no id"))
    }

    /// Uploads a part. Part numbers start at 1.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn upload_part(&self, upload: &Upload, number: usize, bytes: Bytes) -> Result<Part> {
        let sent = self
            .s3
            .upload_part()
            .bucket(&self.bucket)
            .key(&upload.key)
            .upload_id(&upload.upload_id)
            .part_number(part_number(number)?)
            .body(bytes.into())
            .send()
            .await
            .map_err(store_error("UploadPart exports"))?;
        Ok(Part { e_tag: sent.e_tag, crc32: sent.checksum_crc32 })
    }

    /// Completes the upload: creates the object from its parts, in their order. It does not exist before.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn complete(&self, upload: &Upload, parts: Vec<Part>) -> Result<()> {
        let mut completed = Vec::with_capacity(parts.len());
        for (number, part) in (1..).zip(parts) {
            let builder = CompletedPart::builder().part_number(part_number(number)?);
            completed.push(builder.set_e_tag(part.e_tag).set_checksum_crc32(part.crc32).build());
        }
        self.s3
            .complete_multipart_upload()
            .bucket(&self.bucket)
            .key(&upload.key)
            .upload_id(&upload.upload_id)
            .multipart_upload(CompletedMultipartUpload::builder().set_parts(Some(completed)).build())
            .send()
            .await
            .map_err(store_error("CompleteMultipartUpload exports"))?;
        Ok(())
    }

    /// Aborts an upload. A failure is only logged, because the lifecycle rule aborts old uploads.
    pub async fn abort(&self, upload: &Upload) {
        let abort = self.s3.abort_multipart_upload().bucket(&self.bucket).key(&upload.key);
        if let Err(error) = abort.upload_id(&upload.upload_id).send().await {
            let error = store_error("AbortMultipartUpload exports")(error).context();
            tracing::info!(error, "export.upload_not_aborted");
        }
    }

    /// Deletes all exports of a conversation, and stops a running build.
    ///
    /// # Errors
    /// [`Error::Store`]; some of them may be deleted then.
    pub async fn delete_all(&self, user: &UserId, conversation: Uuid) -> Result<()> {
        // The record is removed first: a process that builds an export then finds its lease lost, and creates no object.
        let removed = self
            .table
            .client
            .delete_item()
            .table_name(&self.table.name)
            .set_key(Some(record_key(user, conversation)))
            .return_values(ReturnValue::AllOld)
            .send()
            .await
            .map_err(store_error("DeleteItem users"))?;
        let record: Option<ExportRecord> = removed.attributes.map(from_item).transpose()?;
        for upload in record.iter().flat_map(ExportRecord::uploads) {
            self.abort(upload).await;
        }
        self.delete_below(&folder(user, conversation)).await
    }

    async fn delete_below(&self, prefix: &str) -> Result<()> {
        let mut pages = self.s3.list_objects_v2().bucket(&self.bucket).prefix(prefix).into_paginator().send();
        while let Some(page) = pages.next().await {
            for object in page.map_err(store_error("ListObjectsV2 exports"))?.contents.unwrap_or_default() {
                let delete = self.s3.delete_object().bucket(&self.bucket).set_key(object.key);
                delete.send().await.map_err(store_error("DeleteObject exports"))?;
            }
        }
        Ok(())
    }
}

/// The condition that clients wait for a job.
fn is_wanted() -> Condition {
    Condition::equal("wanted", AttributeValue::Bool(true))
}

fn length(length: Option<i64>) -> u64 {
    length.and_then(|length| u64::try_from(length).ok()).unwrap_or_default()
}

fn part_number(number: usize) -> Result<i32> {
    i32::try_from(number).map_err(Error::internal)
}

/// The prefix of all exports of a conversation. The hash hides the owner, because keys appear in logs and links.
fn folder(user: &UserId, conversation: Uuid) -> String {
    format!("{PREFIX}{}/", &sha256_hex(&user.key_of(&id::hex(conversation)))[..32])
}

fn record_key(user: &UserId, conversation: Uuid) -> Item {
    Item::from([
        ("user".into(), text(user.as_str())),
        ("kind".into(), text(format!("export#{}", id::hex(conversation)))),
    ])
}
