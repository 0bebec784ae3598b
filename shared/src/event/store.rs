//! Appends and reads the events of conversations. Appending is idempotent on the event's id and timestamp.

use std::collections::BTreeMap;
use std::time::Duration;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{PutRequest, WriteRequest};
use futures::future::try_join_all;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::dynamo::{from_item, store_error, text, to_item};
use crate::error::{Error, Result, StoreError};
use crate::id;
use crate::user::UserId;
use crate::user::seal::hash;

/// DynamoDB takes no longer sort key: the timestamp, a `#` and the id of an event.
pub const MAX_POSITION: usize = 1024;

/// DynamoDB takes at most this many writes in one `BatchWriteItem`.
const BATCH_WRITE_LIMIT: usize = 25;
/// A longer event is kept in the bucket: DynamoDB takes no item over 400 KB.
const INLINE_EVENT_LIMIT: usize = 300 * 1024;

/// An event as its agent server sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its id, the agent server's.
    pub id: String,
    /// Its timestamp as sent; it orders the log.
    pub timestamp: String,
    /// Its kind; any.
    pub kind: String,
    /// The whole event, byte for byte.
    pub json: String,
}

impl Event {
    /// Where it stands in the log.
    #[must_use]
    pub fn position(&self) -> String {
        format!("{}#{}", self.timestamp, self.id)
    }
}

#[derive(Serialize, Deserialize)]
struct Row {
    conversation: String,
    position: String,
    id: String,
    timestamp: String,
    kind: String,
    /// The event, unless it is in the bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    event: Option<String>,
    /// The key of the object that holds the event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    event_object: Option<String>,
}

/// The events of all conversations.
#[derive(Clone, Debug)]
pub struct EventStore {
    dynamodb: Client,
    table: String,
    s3: aws_sdk_s3::Client,
    bucket: String,
}

impl EventStore {
    /// A store on the `events` table, with large events in `bucket`.
    #[must_use]
    pub fn new(dynamodb: Client, table: String, s3: aws_sdk_s3::Client, bucket: String) -> Self {
        Self { dynamodb, table, s3, bucket }
    }

    /// Stores all of the events; storing one again changes nothing.
    ///
    /// # Errors
    /// [`Error::Store`]; some of them may be stored then.
    pub async fn append(&self, user: &UserId, conversation: Uuid, events: Vec<Event>) -> Result<()> {
        let partition = user.key_of(&id::hex(conversation));
        // DynamoDB refuses a batch that names a key twice.
        let events: BTreeMap<String, Event> = events.into_iter().map(|event| (event.position(), event)).collect();
        let mut writes = Vec::with_capacity(events.len());
        for (position, event) in events {
            let (inline, object) = if event.json.len() > INLINE_EVENT_LIMIT {
                // Before the row, so that there is no row without its event. An object without a row is found by no one.
                (
                    None,
                    Some(self.put_object(conversation, &hash(&format!("{partition}#{position}")), event.json).await?),
                )
            } else {
                (Some(event.json), None)
            };
            let row = Row {
                conversation: partition.clone(),
                position,
                id: event.id,
                timestamp: event.timestamp,
                kind: event.kind,
                event: inline,
                event_object: object,
            };
            let put = PutRequest::builder().set_item(Some(to_item(&row)?)).build().map_err(Error::internal)?;
            writes.push(WriteRequest::builder().put_request(put).build());
        }
        for chunk in writes.chunks(BATCH_WRITE_LIMIT) {
            self.write(chunk.to_vec()).await?;
        }
        Ok(())
    }

    /// Writes at most [`BATCH_WRITE_LIMIT`] rows, asking again for those that DynamoDB left out under load.
    async fn write(&self, writes: Vec<WriteRequest>) -> Result<()> {
        const OPERATION: &str = "BatchWriteItem events";
        const ATTEMPTS: u32 = 8;
        let mut left = writes;
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(Duration::from_millis(10 << attempt)).await;
            }
            let answer = self
                .dynamodb
                .batch_write_item()
                .request_items(&self.table, left)
                .send()
                .await
                .map_err(store_error(OPERATION))?;
            left = answer.unprocessed_items.unwrap_or_default().remove(&self.table).unwrap_or_default();
            if left.is_empty() {
                return Ok(());
            }
        }
        Err(Error::Store(StoreError {
            operation: OPERATION,
            context: format!("{OPERATION}: {} events stayed unprocessed", left.len()),
            condition_failed: false,
            certainly_not_written: false,
        }))
    }

    /// The hash is of the whole key of the row, owner included: two users may have conversations with the same id.
    async fn put_object(&self, conversation: Uuid, hash: &str, json: String) -> Result<String> {
        let key = format!("events/{}/{hash}.json", id::hex(conversation));
        self.s3
            .put_object()
            .bucket(&self.bucket)
            .key(&key)
            .content_type("application/json")
            .body(json.into_bytes().into())
            .send()
            .await
            .map_err(store_error("PutObject events"))?;
        Ok(key)
    }

    /// All events of a conversation in the order of their timestamps, those in the bucket fetched.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn list(&self, user: &UserId, conversation: Uuid) -> Result<Vec<Event>> {
        let mut pages = self
            .dynamodb
            .query()
            .table_name(&self.table)
            .key_condition_expression("conversation = :conversation")
            .expression_attribute_values(":conversation", text(user.key_of(&id::hex(conversation))))
            .consistent_read(true)
            .into_paginator()
            .send();
        let mut events = Vec::new();
        while let Some(page) = pages.next().await {
            let items = page.map_err(store_error("Query events"))?.items.unwrap_or_default();
            let rows = items.into_iter().map(from_item::<Row>).collect::<Result<Vec<_>>>()?;
            events.extend(try_join_all(rows.into_iter().map(|row| self.read(row))).await?);
        }
        Ok(events)
    }

    async fn read(&self, row: Row) -> Result<Event> {
        let json = match (row.event, row.event_object) {
            (Some(json), _) => json,
            (None, Some(key)) => {
                let object = self
                    .s3
                    .get_object()
                    .bucket(&self.bucket)
                    .key(key)
                    .send()
                    .await
                    .map_err(store_error("GetObject events"))?;
                let bytes = object.body.collect().await.map_err(Error::internal)?.into_bytes();
                String::from_utf8(bytes.into()).map_err(Error::internal)?
            }
            (None, None) => return Err(Error::internal("the row of an event is without the event")),
        };
        Ok(Event { id: row.id, timestamp: row.timestamp, kind: row.kind, json })
    }
}
