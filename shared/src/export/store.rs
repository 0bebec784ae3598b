//! The records of exports that are being built, and the objects that they become.
//!
//! There is at most one record for a conversation's export. It holds the lease of the process that builds the export, whether
//! clients wait for the function `exports` to build it, the last export that the function has finished, and why the last build
//! failed. An export that a request builds and returns leaves no record.
//!
//! Every build starts from the beginning with an upload of its own, and aborts the upload of the build before: late writes of a
//! process that lost its lease go to an aborted upload.

use std::collections::HashMap;
use std::time::Duration;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{AttributeValue, ReturnValue};
use aws_sdk_s3::presigning::PresigningConfig;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;
use futures::stream::{self, Stream};
use serde::{Deserialize, Serialize};
use tokio::time::sleep;
use uuid::Uuid;

use crate::clock::{Time, sortable};
use crate::digest::sha256_hex;
use crate::dynamo::{Item, from_item, is_condition_failure, number, store_error, text, to_item};
use crate::error::{Error, Result};
use crate::id::{self, UserId};
use crate::objects;

/// All objects of exports begin with this. They are temporary: a lifecycle rule removes them.
pub const PREFIX: &str = "exports/";
/// How long a link to an export is good for; shorter where the credentials that sign it end earlier.
pub const LINK_LIFETIME: Duration = Duration::from_secs(15 * 60);
/// The media type of an export.
pub const CONTENT_TYPE: &str = "application/zip";

/// How long an export that outlasted its request is the response to every request, even if the conversation has changed since.
const KEPT: Duration = Duration::from_secs(10 * 60);
/// How long a failed build is not repeated.
const FAILURE_KEPT: Duration = Duration::from_secs(10 * 60);
/// How long a job may wait in the queue before a request enqueues it again.
const REQUEUE_AFTER: Duration = Duration::from_secs(60);

const GET: &str = "GetObject exports";

/// In an object's metadata: when reading the log began. (The name is that of earlier versions, whose objects stay in use.)
const STARTED_AT: &str = "began-at";

/// A multipart upload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    /// The object that it becomes.
    pub key: String,
    /// S3's id.
    pub upload_id: String,
}

/// An export that the function `exports` has finished.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finished {
    /// The object.
    pub key: String,
    /// When it was finished.
    #[serde(serialize_with = "sortable::serialize")]
    pub at: Time,
    /// What it may lack.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// Why an export could not be built.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureReason {
    /// The conversation has more events than an export holds.
    TooManyEvents {
        /// Events of the conversation.
        count: u64,
        /// The most that an export holds.
        bound: u64,
    },
    /// It took longer than the function may run.
    OutOfTime {
        /// The time that the build had.
        seconds: u64,
    },
    /// The builds crashed, or the store failed each time.
    RepeatedFailure {
        /// How often.
        attempts: u32,
    },
}

/// A build that failed for good. It is not repeated for [`FAILURE_KEPT`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Why.
    pub reason: FailureReason,
    /// When.
    #[serde(serialize_with = "sortable::serialize")]
    pub at: Time,
}

impl Failure {
    pub(super) fn now(reason: FailureReason) -> Self {
        Self { reason, at: Time::now() }
    }

    /// After how many seconds a request builds the export again; at least 1.
    #[must_use]
    pub fn retry_after(&self) -> u64 {
        FAILURE_KEPT.saturating_sub(Time::now().since(self.at)).as_secs().max(1)
    }

    /// What the caller is shown.
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
    /// The process that builds the export.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_owner: Option<String>,
    /// When its lease ends, unless it is renewed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_until: Option<Time>,
    /// Whether a request has left the build to the function `exports`, and clients wait for it. (The name is that of earlier versions.)
    #[serde(default, rename = "wanted")]
    pub is_queued: bool,
    /// When the job was last enqueued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queued_at: Option<Time>,
    /// Builds that the function has started for this job.
    #[serde(default)]
    pub attempts: u32,
    /// What the export that is being built may lack.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// The upload of the build that has the lease, or of the one before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload: Option<Upload>,
    /// The same, as earlier versions wrote it: with a checkpoint, from which builds are not resumed any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Upload>,
    /// The last one that was finished.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Finished>,
    /// Why there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<Failure>,
}

impl ExportRecord {
    /// The finished export, while it is the response to every request.
    #[must_use]
    pub fn kept(&self) -> Option<&Finished> {
        self.finished.as_ref().filter(|finished| Time::now().since(finished.at) < KEPT)
    }

    /// The failure, while the build is not repeated.
    #[must_use]
    pub fn recent_failure(&self) -> Option<&Failure> {
        self.failed.as_ref().filter(|failed| Time::now().since(failed.at) < FAILURE_KEPT)
    }

    /// Whether a process works on it.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.lease_owner.is_some() && self.lease_until.is_some_and(|until| until >= Time::now())
    }

    /// Whether the job must be enqueued again: its process crashed or failed, or its message was lost.
    #[must_use]
    pub fn is_requeue_due(&self) -> bool {
        if !self.is_queued || self.is_held() {
            return false;
        }
        let Some(queued_at) = self.queued_at else { return true };
        let has_crashed = self.lease_owner.is_some() && self.lease_until.is_some_and(|until| until > queued_at);
        has_crashed || Time::now().since(queued_at) >= REQUEUE_AFTER
    }

    /// Uploads of builds that have ended.
    pub(super) fn uploads(&self) -> impl Iterator<Item = &Upload> {
        self.upload.iter().chain(&self.progress)
    }
}

/// The right to build a conversation's export, for a while.
#[derive(Debug)]
pub struct Lease {
    user: UserId,
    conversation: Uuid,
    owner: String,
    lifetime: Duration,
}

impl Lease {
    /// The conversation.
    #[must_use]
    pub fn conversation(&self) -> Uuid {
        self.conversation
    }

    /// The user that the conversation belongs to.
    #[must_use]
    pub fn user(&self) -> &UserId {
        &self.user
    }
}

/// An object in the bucket.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Size in bytes.
    pub length: u64,
    /// When reading the log for it began.
    pub started_at: Option<Time>,
}

/// An object that is being read.
#[derive(Debug)]
pub struct Open {
    /// Bytes.
    pub length: u64,
    body: ByteStream,
}

impl Open {
    /// The body in pieces as they arrive; never more than one is in memory. A body that ends early ends with an error.
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

/// What S3 returned for a part; completing the upload needs it.
#[derive(Clone, Debug)]
pub struct Part {
    e_tag: Option<String>,
    crc32: Option<String>,
}

/// Records in the `users` table, objects in the bucket.
#[derive(Clone, Debug)]
pub struct ExportStore {
    dynamodb: Client,
    table: String,
    s3: aws_sdk_s3::Client,
    bucket: String,
}

impl ExportStore {
    /// A store on the `users` table and the bucket.
    #[must_use]
    pub(crate) fn new(dynamodb: Client, users_table: String, s3: aws_sdk_s3::Client, bucket: String) -> Self {
        Self { dynamodb, table: users_table, s3, bucket }
    }

    /// The key of the export with this fingerprint.
    #[must_use]
    pub fn key(user: &UserId, conversation: Uuid, fingerprint: &str) -> String {
        format!("{}{}.zip", folder(user, conversation), &sha256_hex(fingerprint)[..32])
    }

    /// The record, if there is one.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn get(&self, user: &UserId, conversation: Uuid) -> Result<Option<ExportRecord>> {
        let found = self
            .dynamodb
            .get_item()
            .table_name(&self.table)
            .set_key(Some(record_key(user, conversation)))
            .consistent_read(true)
            .send()
            .await
            .map_err(store_error("GetItem users"))?;
        found.item.map(from_item).transpose()
    }

    /// Acquires the lease for a request, with the record as it was before: if no process holds it, the build is not left to the
    /// function `exports`, and no finished export is kept. An older finished export stays in the record.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn claim_for_request(
        &self,
        user: &UserId,
        conversation: Uuid,
        lifetime: Duration,
    ) -> Result<Option<(Lease, ExportRecord)>> {
        let update = "SET lease_owner = :me, lease_until = :until REMOVE failed";
        let condition = "(attribute_not_exists(wanted) OR wanted = :false) AND (attribute_not_exists(finished) OR finished.#at <= :kept)";
        let values = [(":false", AttributeValue::Bool(false)), (":kept", text(Time::now().minus(KEPT).sortable()))];
        self.claim(user, conversation, lifetime, update, condition, &[("#at", "at")], values).await
    }

    /// Acquires the lease for a job, with the record as it was before: if no process holds it and clients still wait.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn claim_for_job(
        &self,
        user: &UserId,
        conversation: Uuid,
        lifetime: Duration,
    ) -> Result<Option<(Lease, ExportRecord)>> {
        let update = "SET lease_owner = :me, lease_until = :until ADD attempts :one";
        let values = [(":true", AttributeValue::Bool(true)), (":one", number(1))];
        self.claim(user, conversation, lifetime, update, "wanted = :true", &[], values).await
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one DynamoDB call")]
    async fn claim<const VALUES: usize>(
        &self,
        user: &UserId,
        conversation: Uuid,
        lifetime: Duration,
        update: &str,
        condition: &str,
        names: &[(&str, &str)],
        values: [(&str, AttributeValue); VALUES],
    ) -> Result<Option<(Lease, ExportRecord)>> {
        let (now, owner) = (Time::now(), id::random_base62(16));
        let lease = Lease { user: user.clone(), conversation, owner, lifetime };
        let mut call = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(record_key(user, conversation)))
            .update_expression(update)
            // The SDK repeats a call whose response was lost: the lease is the caller's own then.
            .condition_expression(format!(
                "(attribute_not_exists(lease_owner) OR lease_until < :now OR lease_owner = :me) AND {condition}"
            ))
            .expression_attribute_values(":me", text(&lease.owner))
            .expression_attribute_values(":until", text(now.plus(lifetime).sortable()))
            .expression_attribute_values(":now", text(now.sortable()))
            .return_values(ReturnValue::AllOld);
        for (placeholder, name) in names {
            call = call.expression_attribute_names(*placeholder, *name);
        }
        for (placeholder, value) in values {
            call = call.expression_attribute_values(placeholder, value);
        }
        match call.send().await.map_err(store_error("UpdateItem users")) {
            Ok(updated) => {
                let before = updated.attributes.map(from_item).transpose()?.unwrap_or_default();
                Ok(Some((lease, before)))
            }
            Err(error) if is_condition_failure(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Extends the lease. False when it is lost.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn renew(&self, lease: &Lease) -> Result<bool> {
        let until = Time::now().plus(lease.lifetime).sortable();
        self.update(lease, "SET lease_until = :until", [(":until", text(until))]).await
    }

    /// Extends the lease again and again. Returns when it is lost.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn keep(&self, lease: &Lease) -> Result<()> {
        loop {
            sleep(lease.lifetime / 3).await;
            if !self.renew(lease).await? {
                return Ok(());
            }
        }
    }

    /// Records the upload of the build that holds the lease. False when the lease is lost.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn record_upload(&self, lease: &Lease, upload: &Upload) -> Result<bool> {
        let until = Time::now().plus(lease.lifetime).sortable();
        let values = [(":until", text(until)), (":upload", AttributeValue::M(to_item(upload)?))];
        self.update(lease, "SET lease_until = :until, upload = :upload REMOVE progress", values).await
    }

    /// Releases the lease and leaves the build to the function `exports`, for which its caller enqueues a job. False when the
    /// lease is lost.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn release_to_job(&self, lease: &Lease, warning: Option<&str>) -> Result<bool> {
        let values = [
            (":true", AttributeValue::Bool(true)),
            (":now", text(Time::now().sortable())),
            (":zero", number(0)),
            (":warning", warning.map_or(AttributeValue::Null(true), text)),
        ];
        let update = "SET wanted = :true, queued_at = :now, attempts = :zero, warning = :warning \
                      REMOVE lease_owner, lease_until, upload, progress";
        self.update(lease, update, values).await
    }

    /// Notes that the job of a record is enqueued again. False when another request has done so, or the build goes on.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn requeue(&self, user: &UserId, conversation: Uuid, record: &ExportRecord) -> Result<bool> {
        let now = text(Time::now().sortable());
        let call = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(record_key(user, conversation)))
            .update_expression("SET queued_at = :now")
            .expression_attribute_values(":now", now)
            .expression_attribute_values(":true", AttributeValue::Bool(true));
        let unheld = "wanted = :true AND (attribute_not_exists(lease_owner) OR lease_until < :now)";
        let call = match record.queued_at {
            Some(seen) => call
                .condition_expression(format!("{unheld} AND queued_at = :seen"))
                .expression_attribute_values(":seen", text(seen.sortable())),
            None => call.condition_expression(format!("{unheld} AND attribute_not_exists(queued_at)")),
        };
        held(call.send().await.map_err(store_error("UpdateItem users")))
    }

    /// Releases the lease after an error. A request may build the export at once; if clients wait for a job, their next request
    /// enqueues it again.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn release(&self, lease: &Lease) -> Result<()> {
        let update = "REMOVE lease_owner, lease_until, queued_at, upload, progress";
        self.update(lease, update, []).await.map(|_| ())
    }

    /// Ends the lease: the build has failed for good. An older finished export stays in the record.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn fail(&self, lease: &Lease, failure: &Failure) -> Result<()> {
        let values = [(":failed", AttributeValue::M(to_item(failure)?))];
        let update = "SET failed = :failed \
                      REMOVE lease_owner, lease_until, upload, progress, wanted, queued_at, attempts, warning";
        self.update(lease, update, values).await.map(|_| ())
    }

    /// Ends the lease: the export is complete, for the clients that wait for it.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn finish_for_clients(&self, lease: &Lease, key: &str, warning: Option<String>) -> Result<()> {
        let finished = Finished { key: key.to_owned(), at: Time::now(), warning };
        let values = [(":finished", AttributeValue::M(to_item(&finished)?))];
        let update = "SET finished = :finished \
                      REMOVE lease_owner, lease_until, upload, progress, wanted, queued_at, attempts, warning, failed";
        self.update(lease, update, values).await.map(|_| ())
    }

    /// Ends the lease and removes the record: the request that built the export returns it.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn finish(&self, lease: &Lease) -> Result<()> {
        let removed = self
            .dynamodb
            .delete_item()
            .table_name(&self.table)
            .set_key(Some(record_key(&lease.user, lease.conversation)))
            .condition_expression("lease_owner = :me")
            .expression_attribute_values(":me", text(&lease.owner))
            .send()
            .await
            .map_err(store_error("DeleteItem users"));
        held(removed).map(|_| ())
    }

    /// Ends the wait for a job that was given up without a build: the next request builds the export. Does nothing while a process
    /// builds it. True if clients waited.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn abandon(&self, user: &UserId, conversation: Uuid) -> Result<bool> {
        let updated = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(record_key(user, conversation)))
            .update_expression("REMOVE wanted, queued_at, attempts, warning, lease_owner, lease_until")
            .condition_expression("wanted = :true AND (attribute_not_exists(lease_owner) OR lease_until < :now)")
            .expression_attribute_values(":true", AttributeValue::Bool(true))
            .expression_attribute_values(":now", text(Time::now().sortable()))
            .send()
            .await
            .map_err(store_error("UpdateItem users"));
        held(updated)
    }

    /// Removes a finished export from the record, because its object is gone.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn remove_finished(&self, user: &UserId, conversation: Uuid, key: &str) -> Result<()> {
        let removed = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(record_key(user, conversation)))
            .update_expression("REMOVE finished")
            .condition_expression("finished.#key = :key")
            .expression_attribute_names("#key", "key")
            .expression_attribute_values(":key", text(key))
            .send()
            .await
            .map_err(store_error("UpdateItem users"));
        held(removed).map(|_| ())
    }

    async fn update<const VALUES: usize>(
        &self,
        lease: &Lease,
        update: &str,
        values: [(&str, AttributeValue); VALUES],
    ) -> Result<bool> {
        let values: HashMap<String, AttributeValue> =
            values.into_iter().map(|(placeholder, value)| (placeholder.to_owned(), value)).collect();
        let updated = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(record_key(&lease.user, lease.conversation)))
            .update_expression(update)
            .condition_expression("lease_owner = :me")
            .set_expression_attribute_values(Some(values))
            .expression_attribute_values(":me", text(&lease.owner))
            .send()
            .await
            .map_err(store_error("UpdateItem users"));
        held(updated)
    }

    /// The object, if it is there.
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

    /// Opens the object, if it is there. Its body is read as it is consumed.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn open(&self, key: &str) -> Result<Option<Open>> {
        let object = objects::open(&self.s3, &self.bucket, key, GET).await?;
        Ok(object.map(|object| Open { length: objects::length(&object), body: object.body }))
    }

    /// A link to the object that needs nothing else for [`LINK_LIFETIME`], and saves it under `disposition`'s name.
    ///
    /// # Errors
    /// [`Error::Store`] when the credentials cannot be had.
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

    /// Uploads a part. Its number counts from 1.
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

    /// Makes the object of its parts, in their order. Until then there is none.
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

    /// Aborts an upload. The lifecycle rule does so if this fails, so a failure is only logged.
    pub async fn abort(&self, upload: &Upload) {
        let abort = self.s3.abort_multipart_upload().bucket(&self.bucket).key(&upload.key);
        if let Err(error) = abort.upload_id(&upload.upload_id).send().await {
            let error = store_error("AbortMultipartUpload exports")(error).context();
            tracing::info!(error, "export.upload_not_aborted");
        }
    }

    /// Deletes all exports of a conversation, and stops the build of one.
    ///
    /// # Errors
    /// [`Error::Store`]; some may be deleted then.
    pub async fn delete_all(&self, user: &UserId, conversation: Uuid) -> Result<()> {
        // The record first: the process that builds an export finds its lease lost, and makes no object.
        let removed = self
            .dynamodb
            .delete_item()
            .table_name(&self.table)
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

/// Whether a conditional write was made; false when its condition did not hold.
fn held<T>(written: Result<T>) -> Result<bool> {
    match written {
        Ok(_) => Ok(true),
        Err(error) if is_condition_failure(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn length(length: Option<i64>) -> u64 {
    length.and_then(|length| u64::try_from(length).ok()).unwrap_or_default()
}

fn part_number(number: usize) -> Result<i32> {
    i32::try_from(number).map_err(Error::internal)
}

/// Below this are all exports of a conversation. The hash hides whose it is: keys are in logs and links.
fn folder(user: &UserId, conversation: Uuid) -> String {
    format!("{PREFIX}{}/", &sha256_hex(&user.key_of(&id::hex(conversation)))[..32])
}

fn record_key(user: &UserId, conversation: Uuid) -> Item {
    Item::from([
        ("user".into(), text(user.as_str())),
        ("kind".into(), text(format!("export#{}", id::hex(conversation)))),
    ])
}
