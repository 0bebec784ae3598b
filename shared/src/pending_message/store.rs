//! Stores the queues of pending messages: one row in `users` for each conversation with pending messages. Long messages are objects in the
//! bucket.

use std::time::Duration;

use aws_sdk_dynamodb::Client;
use aws_sdk_s3::primitives::ByteStream;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{MAX_MESSAGES, PendingMessage};
use crate::clock::{Time, sortable};
use crate::digest::sha256_hex;
use crate::dynamo::lease::{self, Lease};
use crate::dynamo::{Condition, DueIndex, Item, Outcome, Table, Update, from_item, number, store_error, text};
use crate::error::{Error, Result};
use crate::id::{self, UserId};
use crate::objects;

/// Index: queues with undelivered messages, by the time at which the sweep enqueues them again.
pub const UNDELIVERED: &str = "undelivered";
/// The attribute that the index projects besides its keys: the id of the conversation.
pub const CONVERSATION: &str = "id";
/// The prefix of the objects in the bucket.
const PREFIX: &str = "messages/";
/// The largest message, in bytes, that is stored in the row; larger ones are objects. Ten of this size and the rest of the row stay below
/// DynamoDB's 400 KB.
const INLINE: usize = 24 * 1024;
/// The ids of messages that a queue remembers after they were delivered. An attempt to append a message may take effect after a repeated one
/// has succeeded and the message was delivered: the SDK gives up an attempt after a few seconds, and the store may still complete it.
const REMEMBERED: usize = 16;
/// The number of partitions of the index.
const SHARDS: u128 = 4;

/// The queue of one conversation.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct MessageQueue {
    /// The messages, oldest first.
    #[serde(default)]
    pub messages: Vec<PendingMessage>,
    /// The start that creates the conversation, if the messages were sent to the start.
    #[serde(default)]
    pub task: Option<String>,
    /// The message that is being sent. It may have arrived.
    #[serde(default)]
    pub sending: Option<Sending>,
    /// The number of consecutive attempts at which delivery had to wait.
    #[serde(default)]
    pub attempts: u32,
    /// The number of consecutive attempts at which the agent server refused the first message.
    #[serde(default)]
    pub refusals: u32,
    /// The id of the message that was added last, in hex.
    #[serde(default)]
    pub newest: Option<String>,
    /// The ids of the messages that were added last, in hex, oldest first. The row stays for them when the queue is empty.
    #[serde(default)]
    pub recent: Vec<String>,
}

impl MessageQueue {
    /// Whether the message with this id, in hex, was added.
    fn has(&self, message: &str) -> bool {
        self.recent.iter().any(|recent| recent == message)
            || self.messages.iter().any(|found| id::hex(found.id) == message)
    }
}

/// A message that is being sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sending {
    /// The message's id, in hex.
    pub message: String,
    /// The conversation's newest event before it was sent.
    pub after: Option<String>,
    /// The time at which it was first sent.
    #[serde(serialize_with = "sortable::serialize")]
    pub since: Time,
}

#[derive(Clone, Debug)]
pub struct MessageStore {
    table: Table,
    s3: aws_sdk_s3::Client,
    bucket: String,
}

impl MessageStore {
    /// A store on the `users` table, with long messages in `bucket`.
    #[must_use]
    pub(crate) fn new(dynamodb: Client, users: String, s3: aws_sdk_s3::Client, bucket: String) -> Self {
        Self { table: Table::new(dynamodb, users), s3, bucket }
    }

    /// Appends a message to a queue. From `due_at` on the sweep enqueues its delivery, even if no job was enqueued. Returns the number of
    /// messages in the queue, or `None` when the queue is full.
    ///
    /// # Errors
    /// [`Error::Store`]; the message may have been added then.
    pub async fn append(
        &self,
        user: &UserId,
        conversation: Uuid,
        task: Option<Uuid>,
        message: Uuid,
        content: String,
        due_at: Time,
    ) -> Result<Option<usize>> {
        let object = if content.len() > INLINE {
            let key = object_key(user, conversation, message);
            let put = self.s3.put_object().bucket(&self.bucket).key(&key);
            put.content_type("application/json")
                .body(ByteStream::from(content.clone().into_bytes()))
                .send()
                .await
                .map_err(store_error("PutObject messages"))?;
            Some(key)
        } else {
            None
        };
        let content = object.is_none().then_some(content);
        let newest = id::hex(message);
        let message = PendingMessage { id: message, content, object: object.clone() };
        let message = serde_dynamo::to_attribute_value(message).map_err(Error::internal)?;
        let mut update = Update::new()
            .append("messages", [message])
            .append("recent", [text(&newest)])
            .set("id", text(id::hex(conversation)))
            .set("undelivered_shard", text(shard(conversation)))
            .set_if_missing("due_at", text(due_at.sortable()))
            .set("newest", text(&newest))
            .remove("refusals")
            .condition(Condition::Any(vec![
                Condition::Missing("messages"),
                Condition::Size("messages", "<", u32::try_from(MAX_MESSAGES).unwrap_or(u32::MAX)),
            ]))
            // The SDK retries an update whose response was lost.
            .condition(Condition::Lacks("recent", text(&newest)));
        if let Some(task) = task {
            update = update.set("task", text(id::hex(task)));
        }
        let key = key(user, conversation);
        let queue = match self.table.update(key.clone(), update).await {
            Ok(Outcome::Applied(item) | Outcome::ConditionFailed(Some(item))) => from_item(item)?,
            Ok(Outcome::ConditionFailed(None)) => MessageQueue::default(),
            // The message may have been added. Its sender would retry with another id.
            Err(error) => match self.table.get(key).await.and_then(|item| item.map(from_item).transpose()) {
                Ok(Some(queue)) if MessageQueue::has(&queue, &newest) => queue,
                _ => return Err(error),
            },
        };
        if queue.has(&newest) {
            return Ok(Some(queue.messages.len()));
        }
        if let Some(object) = object {
            self.remove_object(&object).await;
        }
        Ok(None)
    }

    /// Claims the lease on a queue. Returns `None` when there is no queue, another worker has the lease, or the queue is due later than the
    /// caller's job says.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn claim(
        &self,
        user: &UserId,
        conversation: Uuid,
        duration: Duration,
        due_at: Option<Time>,
    ) -> Result<Option<(Lease, MessageQueue)>> {
        let lease = Lease::random(duration);
        let mut update =
            Update::new().set("due_at", text(lease.until.sortable())).condition(Condition::Exists("messages"));
        if let Some(due_at) = due_at {
            update = update.condition(lease::is_due("due_at", due_at));
        }
        let claimed = lease.claim(&self.table, key(user, conversation), update).await?.applied();
        Ok(claimed.map(from_item).transpose()?.map(|queue| (lease, queue)))
    }

    /// Records that a message is about to be sent. Returns false when the lease is lost.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn begin(&self, user: &UserId, conversation: Uuid, lease: &Lease, sending: &Sending) -> Result<bool> {
        let sending = serde_dynamo::to_attribute_value(sending).map_err(Error::internal)?;
        Ok(self.write(user, conversation, lease, Update::new().set("sending", sending)).await?.is_applied())
    }

    /// Removes the first message of a queue after it has arrived. Returns the rest of the queue, or `None` when the lease is lost.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn arrived(
        &self,
        user: &UserId,
        conversation: Uuid,
        lease: &Lease,
        queue: &MessageQueue,
        message: &PendingMessage,
    ) -> Result<Option<MessageQueue>> {
        let mut update = Update::new()
            .remove_all(&["messages[0]", "sending", "attempts", "refusals"])
            .condition(Condition::equal("messages[0].id", text(id::hex(message.id))));
        // Only the holder of the lease removes ids, and others are added behind them.
        for forgotten in 0..queue.recent.len().saturating_sub(REMEMBERED) {
            update = update.remove(&format!("recent[{forgotten}]"));
        }
        let Some(left) = self.write(user, conversation, lease, update).await?.applied() else { return Ok(None) };
        if let Some(object) = &message.object {
            self.remove_object(object).await;
        }
        from_item(left).map(Some)
    }

    /// Releases the lease; the queue is due again at `due_at`.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn postpone(
        &self,
        user: &UserId,
        conversation: Uuid,
        lease: &Lease,
        attempts: u32,
        due_at: Time,
    ) -> Result<()> {
        let update =
            Update::new().set("attempts", number(attempts)).set("due_at", text(due_at.sortable())).remove("refusals");
        // If the lease is lost, another worker has claimed the queue.
        let _outcome = self.write(user, conversation, lease, lease::release(update)).await?;
        Ok(())
    }

    /// Like [`MessageStore::postpone`], after an agent server has refused the first message for the `refusals`-th consecutive time. Returns
    /// false, with the lease kept, when a message was added since `newest`: that message resets the count.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn refused(
        &self,
        user: &UserId,
        conversation: Uuid,
        lease: &Lease,
        newest: Option<&str>,
        refusals: u32,
        due_at: Time,
    ) -> Result<bool> {
        let update = Update::new().set("refusals", number(refusals)).set("due_at", text(due_at.sortable()));
        self.release_unless_added(user, conversation, lease, newest, update).await
    }

    /// Releases the lease; the queue is not due again until a message is added. Returns false, with the lease kept, when one was added
    /// since `newest`: the job of that message found the queue claimed and ended.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn give_up(
        &self,
        user: &UserId,
        conversation: Uuid,
        lease: &Lease,
        newest: Option<&str>,
    ) -> Result<bool> {
        let update = Update::new().remove_all(&["attempts", "refusals", "undelivered_shard", "due_at"]);
        self.release_unless_added(user, conversation, lease, newest, update).await
    }

    /// Updates a queue and releases its lease. Returns false when a message was added since `newest`, or the lease is lost.
    async fn release_unless_added(
        &self,
        user: &UserId,
        conversation: Uuid,
        lease: &Lease,
        newest: Option<&str>,
        update: Update,
    ) -> Result<bool> {
        let update = lease::release(update).condition(Condition::unchanged("newest", newest.map(text)));
        Ok(self.write(user, conversation, lease, update).await?.is_applied())
    }

    /// Ends the delivery of an empty queue. Its row remembers the latest messages until the conversation is deleted. Returns false when the
    /// queue is not empty, or the lease is lost.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn end(&self, user: &UserId, conversation: Uuid, lease: &Lease) -> Result<bool> {
        let update = Update::new()
            .remove_all(&["messages", "task", "undelivered_shard", "due_at"])
            .condition(Condition::Size("messages", "=", 0));
        Ok(self.write(user, conversation, lease, lease::release(update)).await?.is_applied())
    }

    /// The parts of a message, as JSON.
    ///
    /// # Errors
    /// [`Error::Store`]; [`Error::Internal`] when the object is missing or is not JSON.
    pub async fn content(&self, message: &PendingMessage) -> Result<serde_json::Value> {
        let json = match (&message.content, &message.object) {
            (Some(content), _) => content.clone().into_bytes(),
            (None, Some(object)) => {
                let found = objects::read_text(&self.s3, &self.bucket, object, "GetObject messages").await?;
                found.ok_or_else(|| Error::internal(format!("{object} is not in the bucket")))?.into_bytes()
            }
            (None, None) => return Err(Error::internal(format!("the message {} has no content", message.id))),
        };
        serde_json::from_slice(&json).map_err(Error::internal)
    }

    /// Removes a conversation's queue and all of its messages.
    ///
    /// # Errors
    /// [`Error::Store`]; the call may be repeated then.
    pub async fn delete_all(&self, user: &UserId, conversation: Uuid) -> Result<()> {
        let prefix = object_prefix(user, conversation);
        let mut pages = self.s3.list_objects_v2().bucket(&self.bucket).prefix(prefix).into_paginator().send();
        while let Some(page) = pages.next().await {
            for object in page.map_err(store_error("ListObjectsV2 messages"))?.contents.unwrap_or_default() {
                let key = object.key.unwrap_or_default();
                let delete = self.s3.delete_object().bucket(&self.bucket).key(key);
                delete.send().await.map_err(store_error("DeleteObject messages"))?;
            }
        }
        let delete =
            self.table.client.delete_item().table_name(&self.table.name).set_key(Some(key(user, conversation)));
        delete.send().await.map_err(store_error("DeleteItem users"))?;
        Ok(())
    }

    /// The index of queues with undelivered messages.
    #[must_use]
    pub fn undelivered(&self) -> DueIndex {
        DueIndex {
            table: self.table.clone(),
            index: UNDELIVERED,
            shard_attribute: "undelivered_shard",
            shards: (0..SHARDS).map(|shard| shard.to_string()).collect(),
            sort_key: "kind",
            has_uuids: true,
        }
    }

    async fn write(&self, user: &UserId, conversation: Uuid, lease: &Lease, update: Update) -> Result<Outcome> {
        lease::write(&self.table, key(user, conversation), &lease.owner, update).await
    }

    /// Removes the object of a message; best effort: an object that remains is removed together with its conversation.
    async fn remove_object(&self, object: &str) {
        let removed = self.s3.delete_object().bucket(&self.bucket).key(object).send().await;
        if let Err(error) = removed.map_err(store_error("DeleteObject messages")) {
            tracing::warn!(object, error = %error.context(), "pending_message.object_not_removed");
        }
    }
}

fn key(user: &UserId, conversation: Uuid) -> Item {
    let kind = format!("messages#{}", id::hex(conversation));
    Item::from([("user".into(), text(user.as_str())), ("kind".into(), text(kind))])
}

fn shard(conversation: Uuid) -> String {
    (conversation.as_u128() % SHARDS).to_string()
}

fn object_prefix(user: &UserId, conversation: Uuid) -> String {
    format!("{PREFIX}{}/", &sha256_hex(&user.key_of(&id::hex(conversation)))[..32])
}

fn object_key(user: &UserId, conversation: Uuid, message: Uuid) -> String {
    format!("{}{}", object_prefix(user, conversation), id::hex(message))
}
