//! The records of exports that are being made, and the objects that they become.
//!
//! A record is there while an export is built, and after a worker has finished one: that one is the answer to every request for
//! [`KEPT`]. Whoever builds an export holds a lease. One that was given back within its time may be gone on with from where it stands; one whose lease ran out
//! has crashed, and is begun anew: what a late process of it still sends goes to an upload that is no more.

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
use uuid::Uuid;

use crate::clock::{Time, sortable};
use crate::digest::sha256_hex;
use crate::dynamo::{Item, from_item, is_condition_failure, store_error, text, to_item};
use crate::error::{Error, Result};
use crate::event::store::Cursor;
use crate::id::{self, UserId};
use crate::objects;

/// All objects of exports begin with this. They are temporary: a lifecycle rule removes them.
pub const PREFIX: &str = "exports/";
/// How long a link to an export is good for; shorter where the credentials that sign it end earlier.
pub const LINK_LIFETIME: Duration = Duration::from_secs(15 * 60);
/// The media type of an export.
pub const CONTENT_TYPE: &str = "application/zip";

/// How long an export that outlasted its request is the answer to every request, even if the conversation has changed since.
const KEPT: Duration = Duration::from_secs(10 * 60);
/// How long one that nobody works on can be gone on with. Later, too much of the log may have changed behind it.
const RESUMABLE: Duration = Duration::from_secs(5 * 60);

const GET: &str = "GetObject exports";

/// In an object's metadata: when reading the log began.
const BEGAN_AT: &str = "began-at";

/// How far an export has come; saved with every part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The object it becomes.
    pub key: String,
    /// The multipart upload.
    pub upload_id: String,
    /// Names of the objects beside it: this, and the number of a part.
    pub notes: String,
    /// Parts that were uploaded.
    pub parts: u32,
    /// Their bytes.
    pub bytes: u64,
    /// Their members.
    pub members: u64,
    /// Behind which event it goes on.
    pub after: Cursor,
    /// When it began, the time of its members.
    #[serde(serialize_with = "sortable::serialize")]
    pub began_at: Time,
    /// When it was saved.
    #[serde(serialize_with = "sortable::serialize")]
    pub saved_at: Time,
}

/// An export that a worker has finished, for the clients that were told to come back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finished {
    /// The object.
    pub key: String,
    /// When it was done.
    #[serde(serialize_with = "sortable::serialize")]
    pub at: Time,
    /// What it may lack.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// The record of a conversation's export.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportRecord {
    /// Who makes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_owner: Option<String>,
    /// Until when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_until: Option<Time>,
    /// Whether somebody was told to come back for it.
    #[serde(default)]
    pub wanted: bool,
    /// What the export that is being built may lack.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// How far it has come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// The one that is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Finished>,
}

impl ExportRecord {
    /// The finished export, while it is the answer to every request.
    #[must_use]
    pub fn kept(&self) -> Option<&Finished> {
        self.finished.as_ref().filter(|finished| Time::now().since(finished.at) < KEPT)
    }

    /// Whether a worker builds it: a request has given it up, and clients were told to come back.
    #[must_use]
    pub fn is_with_a_worker(&self) -> bool {
        self.wanted && self.is_held()
    }

    /// What can be gone on with, by whoever holds the lease now.
    #[must_use]
    pub fn resumable(&self) -> Option<&Progress> {
        let given_back = self.lease_owner.is_none();
        self.progress.as_ref().filter(|progress| given_back && Time::now().since(progress.saved_at) < RESUMABLE)
    }

    /// Whether somebody works on it.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.lease_owner.is_some() && self.lease_until.is_some_and(|until| until >= Time::now())
    }
}

/// The right to make a conversation's export, for a while.
#[derive(Debug)]
pub struct Lease {
    user: UserId,
    conversation: Uuid,
    owner: String,
    lifetime: Duration,
    renewed_at: Time,
}

impl Lease {
    /// The conversation.
    #[must_use]
    pub fn conversation(&self) -> Uuid {
        self.conversation
    }

    /// Its owner.
    #[must_use]
    pub fn user(&self) -> &UserId {
        &self.user
    }

    /// Whether a good part of it is over.
    #[must_use]
    pub fn is_due(&self) -> bool {
        Time::now().since(self.renewed_at) > self.lifetime / 3
    }
}

/// An object that is there.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Bytes.
    pub length: u64,
    /// When reading the log for it began.
    pub began_at: Option<Time>,
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

/// What S3 said of a part, kept for the end of its upload.
#[derive(Clone, Debug, Serialize, Deserialize)]
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

    /// The record, if an export is being made or waits.
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

    /// Takes the lease, with the record as it was before, if no one holds it and no finished export is kept.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn claim(
        &self,
        user: &UserId,
        conversation: Uuid,
        lifetime: Duration,
    ) -> Result<Option<(Lease, ExportRecord)>> {
        let (now, owner) = (Time::now(), id::random_base62(16));
        let lease = Lease { user: user.clone(), conversation, owner, lifetime, renewed_at: now };
        let claimed = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(record_key(user, conversation)))
            .update_expression("SET lease_owner = :me, lease_until = :until REMOVE finished")
            // The SDK repeats a call whose answer was lost: the lease is the caller's own then.
            .condition_expression(
                "(attribute_not_exists(lease_owner) OR lease_until < :now OR lease_owner = :me) \
                 AND (attribute_not_exists(finished) OR finished.#at <= :kept)",
            )
            .expression_attribute_names("#at", "at")
            .expression_attribute_values(":me", text(&lease.owner))
            .expression_attribute_values(":until", text(now.plus(lifetime).sortable()))
            .expression_attribute_values(":now", text(now.sortable()))
            .expression_attribute_values(":kept", text(now.minus(KEPT).sortable()))
            .return_values(ReturnValue::AllOld)
            .send()
            .await
            .map_err(store_error("UpdateItem users"));
        match claimed {
            Ok(answer) => {
                let before = answer.attributes.map(from_item).transpose()?.unwrap_or_default();
                Ok(Some((lease, before)))
            }
            Err(error) if is_condition_failure(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Prolongs the lease and saves progress, if there is new one. False when the lease is lost.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn renew(&self, lease: &mut Lease, progress: Option<&Progress>) -> Result<bool> {
        let now = Time::now();
        let mut set = "SET lease_until = :until".to_owned();
        let mut values = HashMap::from([(":until".to_owned(), text(now.plus(lease.lifetime).sortable()))]);
        if let Some(progress) = progress {
            set += ", progress = :progress";
            values.insert(":progress".to_owned(), AttributeValue::M(to_item(progress)?));
        }
        let held = self.update(lease, &set, values).await?;
        lease.renewed_at = now;
        Ok(held)
    }

    /// Gives the lease back; another process goes on.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn hand_over(&self, lease: &Lease, warning: Option<&str>) -> Result<()> {
        let mut set = "SET wanted = :true".to_owned();
        let mut values = HashMap::from([(":true".to_owned(), AttributeValue::Bool(true))]);
        if let Some(warning) = warning {
            set += ", warning = :warning";
            values.insert(":warning".to_owned(), text(warning));
        }
        self.update(lease, &(set + " REMOVE lease_owner, lease_until"), values).await?;
        Ok(())
    }

    /// Gives the lease back after a failure; the next one begins anew.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn give_up(&self, lease: &Lease) -> Result<()> {
        self.update(lease, "REMOVE lease_owner, lease_until, progress", HashMap::new()).await?;
        Ok(())
    }

    /// Ends the lease: the export is there, for the clients that were told to come back.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn finish_for_others(&self, lease: &Lease, key: &str, warning: Option<String>) -> Result<()> {
        let finished = Finished { key: key.to_owned(), at: Time::now(), warning };
        let values = HashMap::from([(":finished".to_owned(), AttributeValue::M(to_item(&finished)?))]);
        let update = "SET finished = :finished REMOVE lease_owner, lease_until, progress, wanted, warning";
        self.update(lease, update, values).await?;
        Ok(())
    }

    /// Ends the lease: the export is there, and its caller has it.
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
        removed.map(|_| ()).or_else(|error| if is_condition_failure(&error) { Ok(()) } else { Err(error) })
    }

    /// Removes a finished export from the record, whose object is gone.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn forget(&self, user: &UserId, conversation: Uuid, key: &str) -> Result<()> {
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
        removed.map(|_| ()).or_else(|error| if is_condition_failure(&error) { Ok(()) } else { Err(error) })
    }

    async fn update(&self, lease: &Lease, update: &str, values: HashMap<String, AttributeValue>) -> Result<bool> {
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
        match updated {
            Ok(_) => Ok(true),
            Err(error) if is_condition_failure(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The object, if it is there.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn find(&self, key: &str) -> Result<Option<Stored>> {
        let Some(found) = objects::head(&self.s3, &self.bucket, key, "HeadObject exports").await? else {
            return Ok(None);
        };
        let began_at = found.metadata().and_then(|metadata| metadata.get(BEGAN_AT));
        let began_at = began_at.and_then(|text| text.parse::<jiff::Timestamp>().ok()).map(Time::from);
        Ok(Some(Stored { length: length(found.content_length()), began_at }))
    }

    /// The whole object, which must be there.
    ///
    /// # Errors
    /// [`Error::Store`]; [`Error::Internal`] when it is missing.
    pub async fn read(&self, key: &str) -> Result<Bytes> {
        let object = self.open(key).await?.ok_or_else(|| Error::internal(format!("{key} is not in the bucket")))?;
        let body = object.body.collect().await.map_err(|error| objects::interrupted(GET, &error))?;
        Ok(body.into_bytes())
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
    pub async fn put(&self, key: &str, began_at: Time, zip: Bytes) -> Result<()> {
        self.s3
            .put_object()
            .bucket(&self.bucket)
            .key(key)
            .content_type(CONTENT_TYPE)
            .metadata(BEGAN_AT, began_at.sortable())
            .body(zip.into())
            .send()
            .await
            .map_err(store_error("PutObject exports"))?;
        Ok(())
    }

    /// Begins an export in parts.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn begin_upload(&self, key: &str, began_at: Time) -> Result<String> {
        let begun = self
            .s3
            .create_multipart_upload()
            .bucket(&self.bucket)
            .key(key)
            .content_type(CONTENT_TYPE)
            .metadata(BEGAN_AT, began_at.sortable())
            .send()
            .await
            .map_err(store_error("CreateMultipartUpload exports"))?;
        begun.upload_id.ok_or_else(|| Error::internal("a multipart upload has no id"))
    }

    /// Uploads a part. Its number counts from 1.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn upload(&self, key: &str, upload_id: &str, number: u32, bytes: Vec<u8>) -> Result<Part> {
        let sent = self
            .s3
            .upload_part()
            .bucket(&self.bucket)
            .key(key)
            .upload_id(upload_id)
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
    pub async fn complete(&self, key: &str, upload_id: &str, parts: Vec<Part>) -> Result<()> {
        let mut completed = Vec::with_capacity(parts.len());
        for (number, part) in (1..).zip(parts) {
            let builder = CompletedPart::builder().part_number(part_number(number)?);
            completed.push(builder.set_e_tag(part.e_tag).set_checksum_crc32(part.crc32).build());
        }
        self.s3
            .complete_multipart_upload()
            .bucket(&self.bucket)
            .key(key)
            .upload_id(upload_id)
            .multipart_upload(CompletedMultipartUpload::builder().set_parts(Some(completed)).build())
            .send()
            .await
            .map_err(store_error("CompleteMultipartUpload exports"))?;
        Ok(())
    }

    /// Stores what the end of the upload will need to know.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn put_note(&self, key: &str, note: Vec<u8>) -> Result<()> {
        let put = self.s3.put_object().bucket(&self.bucket).key(key).body(note.into());
        put.send().await.map_err(store_error("PutObject exports"))?;
        Ok(())
    }

    /// Removes what an export leaves that is done or given up: its upload, its notes. What stays is removed by the
    /// lifecycle rule, so a failure is only logged.
    pub async fn clean_up(&self, progress: &Progress, is_done: bool) {
        if !is_done {
            let abort = self.s3.abort_multipart_upload().bucket(&self.bucket).key(&progress.key);
            if let Err(error) = abort.upload_id(&progress.upload_id).send().await {
                let error = store_error("AbortMultipartUpload exports")(error).context();
                tracing::info!(error, "export.upload_not_aborted");
            }
        }
        if let Err(error) = self.delete_below(&progress.notes).await {
            tracing::info!(error = %error.context(), "export.checkpoints_not_removed");
        }
    }

    /// Deletes all exports of a conversation, and stops the one that is being made.
    ///
    /// # Errors
    /// [`Error::Store`]; some may be deleted then.
    pub async fn delete_all(&self, user: &UserId, conversation: Uuid) -> Result<()> {
        // The record first: whoever is making an export finds its lease lost, and makes no object.
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
        if let Some(progress) = record.and_then(|record| record.progress) {
            self.clean_up(&progress, false).await;
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

fn length(length: Option<i64>) -> u64 {
    length.and_then(|length| u64::try_from(length).ok()).unwrap_or_default()
}

fn part_number(number: u32) -> Result<i32> {
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
