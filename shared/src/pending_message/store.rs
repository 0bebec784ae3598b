//! The queues of messages: one row in `users` for each conversation that has any. Long messages are in the bucket.

use std::collections::HashMap;
use std::time::Duration;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{AttributeValue, ReturnValue};
use aws_sdk_s3::primitives::ByteStream;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{MAX_MESSAGES, PendingMessage};
use crate::clock::{Time, sortable};
use crate::digest::sha256_hex;
use crate::dynamo::{DueIndex, Item, from_item, is_condition_failure, number, store_error, text};
use crate::error::{Error, Result};
use crate::id::{self, UserId};
use crate::objects;

/// Index: queues that somebody has to look after, by when.
pub const UNDELIVERED: &str = "undelivered";
/// The attribute that the index shows beside its keys: the conversation.
pub const CONVERSATION: &str = "id";
/// Below this prefix are the bucket's objects.
const PREFIX: &str = "messages/";
/// Longer messages are objects, in bytes: ten of these and what else is in the row stay below DynamoDB's 400 KB.
const INLINE: usize = 24 * 1024;
/// Spreads the index over partitions.
const SHARDS: u128 = 4;

/// A queue.
#[derive(Clone, Debug, Deserialize)]
pub struct MessageQueue {
    /// Its messages, oldest first.
    #[serde(default)]
    pub messages: Vec<PendingMessage>,
    /// The start that its conversation comes from, if the messages were sent to that.
    #[serde(default)]
    pub task: Option<String>,
    /// The message that is being sent: it may have arrived.
    #[serde(default)]
    pub sending: Option<Sending>,
    /// How often in a row delivery had to wait.
    #[serde(default)]
    pub attempts: u32,
    /// How often in a row the agent server answered the first message with an error of its own.
    #[serde(default)]
    pub refusals: u32,
    /// The id of the message that was added last.
    #[serde(default)]
    pub newest: Option<String>,
}

/// What is known of a message that is being sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sending {
    /// Its id, in hex.
    pub message: String,
    /// The conversation's newest event before it was sent.
    pub after: Option<String>,
    /// When it was sent first.
    #[serde(serialize_with = "sortable::serialize")]
    pub since: Time,
}

/// A claim on a queue.
#[derive(Clone, Debug)]
pub struct Claim {
    owner: String,
    /// Until when it is nobody else's.
    pub until: Time,
}

/// The queues of all users.
#[derive(Clone, Debug)]
pub struct MessageStore {
    dynamodb: Client,
    table: String,
    s3: aws_sdk_s3::Client,
    bucket: String,
}

impl MessageStore {
    /// A store on the `users` table, with long messages in `bucket`.
    #[must_use]
    pub(crate) fn new(dynamodb: Client, users: String, s3: aws_sdk_s3::Client, bucket: String) -> Self {
        Self { dynamodb, table: users, s3, bucket }
    }

    /// Puts a message at the end of a queue; it is looked after from `due_at` on, whatever becomes of the bell. Answers how many
    /// there are now, or `None` when there is no room.
    ///
    /// # Errors
    /// [`Error::Store`]; the message may be there then.
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
        let newest = text(id::hex(message));
        let message = PendingMessage { id: message, content, object: object.clone() };
        let message = serde_dynamo::to_attribute_value(message).map_err(Error::internal)?;
        let mut values = HashMap::from([
            (":none".to_owned(), AttributeValue::L(Vec::new())),
            (":message".to_owned(), AttributeValue::L(vec![message])),
            (":id".to_owned(), text(id::hex(conversation))),
            (":shard".to_owned(), text(shard(conversation))),
            (":due".to_owned(), text(due_at.sortable())),
            (":newest".to_owned(), newest),
            (":max".to_owned(), number(u32::try_from(MAX_MESSAGES).unwrap_or(u32::MAX))),
        ]);
        if let Some(task) = task {
            values.insert(":task".to_owned(), text(id::hex(task)));
        }
        let update = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(user, conversation)))
            .update_expression(format!(
                "SET messages = list_append(if_not_exists(messages, :none), :message), id = :id, undelivered_shard = :shard, \
                 due_at = if_not_exists(due_at, :due), newest = :newest{} REMOVE refusals",
                if task.is_some() { ", task = :task" } else { "" }
            ))
            .condition_expression("attribute_not_exists(messages) OR size(messages) < :max")
            .set_expression_attribute_values(Some(values))
            .return_values(ReturnValue::UpdatedNew);
        let updated = update.send().await.map_err(store_error("UpdateItem users"));
        match updated {
            Ok(updated) => {
                let messages = updated.attributes.as_ref().and_then(|item| item.get("messages"));
                Ok(Some(messages.and_then(|list| list.as_l().ok()).map_or(0, Vec::len)))
            }
            Err(error) if is_condition_failure(&error) => {
                if let Some(object) = object {
                    self.remove_object(&object).await;
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Claims a queue for `lease`; `None` when there is none, or somebody else has it.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn claim(
        &self,
        user: &UserId,
        conversation: Uuid,
        lease: Duration,
    ) -> Result<Option<(Claim, MessageQueue)>> {
        let now = Time::now();
        let claim = Claim { owner: id::random_base62(16), until: now.plus(lease) };
        let updated = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(user, conversation)))
            .update_expression("SET lease_owner = :me, lease_until = :until, due_at = :until")
            .condition_expression(
                "attribute_exists(messages) AND (attribute_not_exists(lease_until) OR lease_until < :now)",
            )
            .expression_attribute_values(":me", text(&claim.owner))
            .expression_attribute_values(":until", text(claim.until.sortable()))
            .expression_attribute_values(":now", text(now.sortable()))
            .return_values(ReturnValue::AllNew)
            .send()
            .await
            .map_err(store_error("UpdateItem users"));
        match updated {
            Ok(updated) => {
                let queue = updated.attributes.map(from_item).transpose()?;
                Ok(queue.map(|queue| (claim, queue)))
            }
            Err(error) if is_condition_failure(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Notes that a message is about to be sent. False when the claim is lost.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn begin(&self, user: &UserId, conversation: Uuid, claim: &Claim, sending: &Sending) -> Result<bool> {
        let sending = serde_dynamo::to_attribute_value(sending).map_err(Error::internal)?;
        let values = [(":sending", sending)];
        self.change(user, conversation, claim, "SET sending = :sending", &values, "").await.map(|queue| queue.is_some())
    }

    /// Removes the first message, which has arrived. Answers what is left, or `None` when the claim is lost.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn arrived(
        &self,
        user: &UserId,
        conversation: Uuid,
        claim: &Claim,
        message: &PendingMessage,
    ) -> Result<Option<MessageQueue>> {
        let values = [(":first", text(id::hex(message.id)))];
        let condition = " AND messages[0].id = :first";
        let change = "REMOVE messages[0], sending, attempts, refusals";
        let left = self.change(user, conversation, claim, change, &values, condition).await?;
        if left.is_some()
            && let Some(object) = &message.object
        {
            self.remove_object(object).await;
        }
        Ok(left)
    }

    /// Gives a claim back; the queue is due again at `due_at`.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn postpone(
        &self,
        user: &UserId,
        conversation: Uuid,
        claim: &Claim,
        attempts: u32,
        due_at: Time,
    ) -> Result<()> {
        let change = "SET attempts = :attempts, due_at = :due REMOVE lease_owner, lease_until, refusals";
        let values = [(":attempts", number(attempts)), (":due", text(due_at.sortable()))];
        self.change(user, conversation, claim, change, &values, "").await.map(|_| ())
    }

    /// As [`MessageStore::postpone`], after an agent server answered with an error of its own for the `refusals`-th time in a row. False,
    /// with the claim kept, when a message was added since `newest`: the count begins again with it.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn refused(
        &self,
        user: &UserId,
        conversation: Uuid,
        claim: &Claim,
        newest: Option<&str>,
        refusals: u32,
        due_at: Time,
    ) -> Result<bool> {
        let change = "SET refusals = :refusals, due_at = :due REMOVE lease_owner, lease_until";
        let values = vec![(":refusals", number(refusals)), (":due", text(due_at.sortable()))];
        self.change_unless_added(user, conversation, claim, newest, change, values).await
    }

    /// Gives a claim back; the queue is not due again until a message is added. False, with the claim kept, when one was added since
    /// `newest`: its own job found the queue claimed and ended.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn give_up(
        &self,
        user: &UserId,
        conversation: Uuid,
        claim: &Claim,
        newest: Option<&str>,
    ) -> Result<bool> {
        let change = "REMOVE lease_owner, lease_until, attempts, refusals, undelivered_shard, due_at";
        self.change_unless_added(user, conversation, claim, newest, change, Vec::new()).await
    }

    /// Changes a claimed queue. False when a message was added since `newest`, or the claim is lost.
    async fn change_unless_added(
        &self,
        user: &UserId,
        conversation: Uuid,
        claim: &Claim,
        newest: Option<&str>,
        change: &str,
        mut values: Vec<(&str, AttributeValue)>,
    ) -> Result<bool> {
        let condition = match newest {
            Some(newest) => {
                values.push((":newest", text(newest)));
                " AND newest = :newest"
            }
            None => " AND attribute_not_exists(newest)",
        };
        self.change(user, conversation, claim, change, &values, condition).await.map(|queue| queue.is_some())
    }

    /// Removes a queue that is empty. False when it is not, or the claim is lost.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn end(&self, user: &UserId, conversation: Uuid, claim: &Claim) -> Result<bool> {
        let removed = self
            .dynamodb
            .delete_item()
            .table_name(&self.table)
            .set_key(Some(key(user, conversation)))
            .condition_expression("lease_owner = :me AND size(messages) = :none")
            .expression_attribute_values(":me", text(&claim.owner))
            .expression_attribute_values(":none", number(0))
            .send()
            .await
            .map_err(store_error("DeleteItem users"));
        match removed {
            Ok(_) => Ok(true),
            Err(error) if is_condition_failure(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The parts of a message, as JSON.
    ///
    /// # Errors
    /// [`Error::Store`]; [`Error::Internal`] when they are not what was stored.
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

    /// Removes a conversation's queue with all that waits in it.
    ///
    /// # Errors
    /// [`Error::Store`]; it may be done again.
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
        let delete = self.dynamodb.delete_item().table_name(&self.table).set_key(Some(key(user, conversation)));
        delete.send().await.map_err(store_error("DeleteItem users"))?;
        Ok(())
    }

    /// The index of queues with messages that are not delivered.
    #[must_use]
    pub fn undelivered(&self) -> DueIndex {
        DueIndex {
            dynamodb: self.dynamodb.clone(),
            table: self.table.clone(),
            index: UNDELIVERED,
            shard_attribute: "undelivered_shard",
            shards: (0..SHARDS).map(|shard| shard.to_string()).collect(),
            sort_key: "kind",
        }
    }

    async fn change(
        &self,
        user: &UserId,
        conversation: Uuid,
        claim: &Claim,
        change: &str,
        values: &[(&str, AttributeValue)],
        condition: &str,
    ) -> Result<Option<MessageQueue>> {
        let values = values.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
        let values = values.chain([(":me".to_owned(), text(&claim.owner))]).collect();
        let updated = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(user, conversation)))
            .update_expression(change)
            .condition_expression(format!("lease_owner = :me{condition}"))
            .set_expression_attribute_values(Some(values))
            .return_values(ReturnValue::AllNew)
            .send()
            .await
            .map_err(store_error("UpdateItem users"));
        match updated {
            Ok(updated) => updated.attributes.map(from_item).transpose(),
            Err(error) if is_condition_failure(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Best effort: what stays goes with the conversation.
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
