//! Stores the event logs of conversations: append, pagination, count and deletion.
//!
//! The key of a row contains the event's id, so appends are idempotent. An event with a stored id replaces the stored event; if its
//! timestamp differs, its position in the log changes. Two narrow indexes contain the order of the log, as a whole and by kind. A page
//! reads index entries first and then only its own events; a count reads only index entries.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::operation::query::builders::QueryFluentBuilder;
use aws_sdk_dynamodb::types::{DeleteRequest, PutRequest, Select, WriteRequest};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::Offset;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::clock::{Time, sortable};
use crate::digest::sha256_hex;
use crate::dynamo::{BATCH_GET_LIMIT, Item, Table, from_item, store_error, text, to_item};
use crate::error::{Error, Result};
use crate::http::page::{PAGE_SIZE, size_of_text, too_large};
use crate::http::pydantic::validation::wire_enum;
use crate::id::{self, UserId};
use crate::mask::MASK;
use crate::objects;
use crate::paging;

/// Index: a conversation's events by position, which is the order of time.
pub const BY_POSITION: &str = "by-position";
/// Index: a conversation's events by kind, then by position.
pub const BY_KIND: &str = "by-kind";
/// The attribute that both indexes project besides keys: the size in bytes of the event in a response. (Earlier versions chose its name.)
pub const SIZE: &str = "room";

/// The longest sort key that DynamoDB accepts, in bytes.
const KEY_LIMIT: usize = 1024;
/// The most pages of 1 MiB that [`EventStore::count_stored`] reads: 4,096 read units in all.
const CHECKED_PAGES: usize = 16;
/// The largest event, in bytes, that is stored in the table; larger ones are objects in the bucket. DynamoDB accepts no item over 400 KB.
const INLINE_EVENT_LIMIT: usize = 300 * 1024;
/// The error for a count that would read too many rows.
const TOO_MANY: &str = "Too many events to count with this filter. Narrow it with timestamp__gte and timestamp__lt, or read the pages of search";
/// The number of objects that are read or deleted concurrently.
const PARALLEL_OBJECTS: usize = 8;

/// The earliest instant whose text has no sign.
const YEAR_0: Timestamp = Timestamp::constant(-62_167_219_200, 0);
/// The prefix of positions of events whose timestamp is invalid. It sorts before every time.
const UNDATED: &str = "!";
/// A bound that sorts before every position with a time.
const FIRST_DATED: &str = "0";
/// A bound that sorts after every position.
const LAST: &str = "~";
/// The kind of events that contain one token each. They are for clients that watch the stream; the complete message follows as another
/// event.
const DELTA: &str = "StreamingDeltaEvent";
/// The key of the headers with which a model is called, as it is in JSON.
const EXTRA_HEADERS: &str = "\"extra_headers\"";

/// An event, as its agent server sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The id that the agent server has assigned.
    pub id: String,
    /// The timestamp as sent; it determines the position in the log.
    pub timestamp: String,
    /// The kind. Any text is accepted.
    pub kind: String,
    /// The JSON of the event, byte for byte.
    pub json: String,
}

impl Event {
    /// The position in the log: the event's instant at a fixed width, then its id. A timestamp without a zone is interpreted as UTC, which
    /// orders the events of one agent server, whatever its zone. Events with an invalid timestamp come first, in the order of the
    /// timestamps' texts: there they affect neither time filters nor queries for the newest events.
    #[must_use]
    pub fn position(&self) -> String {
        match sortable_instant(&self.timestamp) {
            Some(instant) => format!("{instant}#{}", self.id),
            None => format!("{UNDATED}{}#{}", self.timestamp, self.id),
        }
    }

    /// Whether the event is not stored: agent servers do not store these events either.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        self.kind == DELTA
    }

    /// The reason why the event cannot be stored, if there is one.
    #[must_use]
    pub fn fault(&self) -> Option<&'static str> {
        if self.id.is_empty() {
            return Some("id is empty");
        }
        let longest = self.kind_position().len().max(self.id.len());
        (longest > KEY_LIMIT).then_some("id, timestamp and kind are too long")
    }

    /// The event with the values of models' `extra_headers` masked. Agent servers mask the keys of models in the state that they report, but
    /// not these headers, which may contain credentials.
    fn without_credentials(mut self) -> Self {
        let headers =
            |rest: &str| rest.trim_start().strip_prefix(':').is_some_and(|rest| rest.trim_start().starts_with('{'));
        if self.json.split(EXTRA_HEADERS).skip(1).any(headers)
            && let Ok(mut event) = serde_json::from_str(&self.json)
        {
            mask_headers(&mut event, false);
            self.json = event.to_string();
        }
        self
    }

    fn kind_position(&self) -> String {
        of_kind(&self.kind, &self.position())
    }

    /// Its size in bytes in a response, see [`crate::http::page`].
    fn size_bytes(&self) -> u64 {
        size_of_text(self.json.as_bytes()) + 1
    }
}

/// Masks the texts below `extra_headers`, wherever it is.
fn mask_headers(value: &mut Value, is_header: bool) {
    match value {
        Value::String(text) if is_header => MASK.clone_into(text),
        Value::Array(items) => items.iter_mut().for_each(|item| mask_headers(item, is_header)),
        Value::Object(fields) => {
            for (name, value) in fields {
                mask_headers(value, is_header || name == "extra_headers");
            }
        }
        _ => {}
    }
}

/// Parses the timestamp of an event; one without a zone is interpreted as UTC.
fn instant(timestamp: &str) -> Option<Timestamp> {
    let zoned = timestamp.parse().ok();
    let instant: Timestamp = zoned.or_else(|| Offset::UTC.to_timestamp(timestamp.parse::<DateTime>().ok()?).ok())?;
    // The text of an earlier instant does not sort correctly.
    (instant >= YEAR_0).then_some(instant)
}

/// Converts an event's timestamp to a sortable form.
#[must_use]
pub fn sortable_instant(timestamp: &str) -> Option<String> {
    instant(timestamp).map(sortable)
}

/// The last position that an event with a time up to this one can have.
#[must_use]
pub fn last_position_at(time: Time) -> String {
    format!("{}#{LAST}", sortable(Timestamp::from(time)))
}

fn sortable(instant: Timestamp) -> String {
    format!("{instant:.9}")
}

/// The prefix with the length separates kinds that contain any characters.
fn of_kind(kind: &str, position: &str) -> String {
    format!("{}:{kind}#{position}", kind.len())
}

/// The filters of a page or a count; by default they match all events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Events of this kind.
    pub kind: Option<String>,
    /// Events at or after this instant. Excludes events with an invalid timestamp.
    pub timestamp_gte: Option<Time>,
    /// Events before this instant. Excludes events with an invalid timestamp.
    pub timestamp_lt: Option<Time>,
}

wire_enum! {
    /// The order of a page.
    pub enum SortOrder {
        /// Oldest first.
        Timestamp = "TIMESTAMP",
        /// Newest first.
        TimestampDesc = "TIMESTAMP_DESC",
    }
}

/// The cursor of a page: it starts after this position, in the order of the page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// See [`Event::position`].
    pub position: String,
}

/// A page of events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventPage {
    pub events: Vec<Event>,
    /// The cursor of the next page, if there is one.
    pub next: Option<Cursor>,
    /// The number of index entries that the page was read by. Fewer events if some were deleted meanwhile.
    pub entries: u64,
}

/// The version of a log at some time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogVersion {
    /// A random text, different for each version.
    pub version: String,
    /// The time of the last write. The indexes are updated a little later.
    #[serde(serialize_with = "sortable::serialize")]
    pub changed_at: Time,
}

#[derive(Serialize, Deserialize)]
struct EnqueuedBackfill {
    #[serde(serialize_with = "sortable::serialize")]
    enqueued_until: Time,
}

#[derive(Serialize, Deserialize)]
struct Row {
    conversation: String,
    id: String,
    position: String,
    kind_position: String,
    #[serde(rename = "room")]
    size: u64,
    timestamp: String,
    kind: String,
    /// The JSON of the event, unless it is in the bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    event: Option<String>,
    /// The key of the object that contains the event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    event_object: Option<String>,
}

/// The attributes of a row that the indexes project; each index contains one of the two positions.
#[derive(Deserialize)]
struct ProjectedRow {
    id: String,
    position: Option<String>,
    kind_position: Option<String>,
    #[serde(rename = "room")]
    size: u64,
}

/// An entry of an index.
struct IndexEntry {
    id: String,
    position: String,
    size: u64,
}

/// The attributes of a row that its deletion needs.
#[derive(Deserialize)]
struct DeletableRow {
    id: String,
    #[serde(default)]
    event_object: Option<String>,
}

/// The range of an index that contains the events of a filter; both ends are inclusive.
struct Range {
    partition: String,
    kind: Option<String>,
    from: String,
    to: String,
}

impl Range {
    fn new(partition: String, filter: &EventFilter) -> Self {
        let bound = |time: Time| sortable(Timestamp::from(time));
        let dated = filter.timestamp_gte.is_some() || filter.timestamp_lt.is_some();
        // A position is longer than the bound of its instant and therefore sorts after it.
        Self {
            partition,
            kind: filter.kind.clone(),
            from: filter.timestamp_gte.map_or(if dated { FIRST_DATED } else { UNDATED }.to_owned(), bound),
            to: filter.timestamp_lt.map_or(LAST.to_owned(), bound),
        }
    }

    /// Restricts the range to the cursor's position and all positions after it.
    fn starting(mut self, after: &Cursor, order: SortOrder) -> Self {
        match order {
            SortOrder::Timestamp => self.from = self.from.max(after.position.clone()),
            SortOrder::TimestampDesc => self.to = self.to.min(after.position.clone()),
        }
        self
    }

    /// Whether the range ends before it begins. DynamoDB refuses such a range.
    fn is_empty(&self) -> bool {
        self.from > self.to
    }

    fn ask(&self, query: QueryFluentBuilder) -> QueryFluentBuilder {
        let (index, key, from, to) = match &self.kind {
            Some(kind) => (BY_KIND, "kind_position", of_kind(kind, &self.from), of_kind(kind, &self.to)),
            None => (BY_POSITION, "position", self.from.clone(), self.to.clone()),
        };
        query
            .index_name(index)
            .key_condition_expression("conversation = :conversation AND #position BETWEEN :from AND :to")
            .expression_attribute_names("#position", key)
            .expression_attribute_values(":conversation", text(self.partition.clone()))
            .expression_attribute_values(":from", text(from))
            .expression_attribute_values(":to", text(to))
    }
}

#[derive(Clone, Debug)]
pub struct EventStore {
    table: Table,
    s3: aws_sdk_s3::Client,
    bucket: String,
}

impl EventStore {
    /// A store on the `events` table, with large events in `bucket`.
    #[must_use]
    pub(crate) fn new(dynamodb: Client, table: String, s3: aws_sdk_s3::Client, bucket: String) -> Self {
        Self { table: Table::new(dynamodb, table), s3, bucket }
    }

    /// Returns the events whose ids are not stored yet; of several events with the same id, the first.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn unknown(&self, user: &UserId, conversation: Uuid, events: Vec<Event>) -> Result<Vec<Event>> {
        let partition = partition(user, conversation);
        let ids: BTreeSet<&str> = events.iter().map(|event| event.id.as_str()).collect();
        let key = |id: &str| Item::from([("conversation".into(), text(&partition)), ("id".into(), text(id))]);
        let keys: Vec<Item> = ids.into_iter().map(key).collect();
        let items = self.table.batch_get_attribute(keys, "id").await?;
        let mut known: HashSet<String> = items.iter().filter_map(|item| item.get("id")?.as_s().ok().cloned()).collect();
        Ok(events.into_iter().filter(|event| known.insert(event.id.clone())).collect())
    }

    /// Stores events. Idempotent. Of several events with the same id, the last is stored.
    ///
    /// # Errors
    /// [`Error::Store`]; some of them may be stored then.
    pub async fn append(&self, user: &UserId, conversation: Uuid, events: Vec<Event>) -> Result<()> {
        let partition = partition(user, conversation);
        // DynamoDB refuses a batch with duplicate keys.
        let events: BTreeMap<String, Event> =
            events.into_iter().map(|event| (event.id.clone(), event.without_credentials())).collect();
        let mut writes = Vec::with_capacity(events.len());
        for event in events.into_values() {
            let (position, kind_position, size) = (event.position(), event.kind_position(), event.size_bytes());
            let (inline, object) = if event.json.len() > INLINE_EVENT_LIMIT {
                // The object is written before the row, so that no row lacks its event. No reader finds an object without a row.
                let name = sha256_hex(&format!("{partition}#{}", event.id));
                (None, Some(self.put_object(conversation, &name, event.json).await?))
            } else {
                (Some(event.json), None)
            };
            let row = Row {
                conversation: partition.clone(),
                id: event.id,
                position,
                kind_position,
                size,
                timestamp: event.timestamp,
                kind: event.kind,
                event: inline,
                event_object: object,
            };
            let put = PutRequest::builder().set_item(Some(to_item(&row)?)).build().map_err(Error::internal)?;
            writes.push(WriteRequest::builder().put_request(put).build());
        }
        if writes.is_empty() {
            return Ok(());
        }
        let stored = self.table.batch_write(&writes).await;
        // The version is written after the events, so that it is never older than the log; also when only some events were stored.
        let marked = self.put_version(&partition).await;
        stored.and(marked)
    }

    /// Until when no further job that fetches missing events is enqueued for the conversation, because one is enqueued already.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn backfill_enqueued_until(&self, user: &UserId, conversation: Uuid) -> Result<Option<Time>> {
        let found = self.table.get(backfill_key(&partition(user, conversation))).await?;
        Ok(found.map(from_item::<EnqueuedBackfill>).transpose()?.map(|enqueued| enqueued.enqueued_until))
    }

    /// Sets the time of [`EventStore::backfill_enqueued_until`].
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn set_backfill_enqueued_until(&self, user: &UserId, conversation: Uuid, until: Time) -> Result<()> {
        let mut item = to_item(&EnqueuedBackfill { enqueued_until: until })?;
        item.extend(backfill_key(&partition(user, conversation)));
        let put = self.table.client.put_item().table_name(&self.table.name).set_item(Some(item));
        put.send().await.map_err(store_error("PutItem events"))?;
        Ok(())
    }

    /// Returns the version, which changes with every write to the log; `None` for a log without any writes.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn version(&self, user: &UserId, conversation: Uuid) -> Result<Option<LogVersion>> {
        let found = self.table.get(version_key(&partition(user, conversation))).await?;
        found.map(from_item).transpose()
    }

    async fn put_version(&self, partition: &str) -> Result<()> {
        let version = LogVersion { version: id::random_base62(22), changed_at: Time::now() };
        let mut item = to_item(&version)?;
        item.extend(version_key(partition));
        let put = self.table.client.put_item().table_name(&self.table.name).set_item(Some(item));
        put.send().await.map_err(store_error("PutItem events"))?;
        Ok(())
    }

    /// Returns a page of the events that match the filter: at most `limit` and never more than 100, and fewer if they would exceed
    /// [`PAGE_SIZE`] together. During pagination, a new event is included if its position is after the cursor, and no event is included
    /// twice.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn page(
        &self,
        user: &UserId,
        conversation: Uuid,
        filter: &EventFilter,
        order: SortOrder,
        after: Option<&Cursor>,
        limit: usize,
    ) -> Result<EventPage> {
        let limit = limit.clamp(1, BATCH_GET_LIMIT);
        let partition = partition(user, conversation);
        let mut range = Range::new(partition.clone(), filter);
        if let Some(after) = after {
            range = range.starting(after, order);
        }
        let places = self.places(&range, order, after, limit + 1).await?;
        let mut size = 0;
        let fitting = places
            .iter()
            .take(limit)
            .take_while(|place| {
                let first = size == 0;
                size += place.size;
                first || size <= PAGE_SIZE
            })
            .count();
        let places_of_page = &places[..fitting];
        let next = match places_of_page.last() {
            Some(last) if fitting < places.len() => Some(Cursor { position: last.position.clone() }),
            _ => None,
        };
        let ids = places_of_page.iter().map(|place| place.id.clone()).collect();
        let mut rows = self.rows(&partition, ids).await?;
        // A missing row was deleted meanwhile; a row with a changed position is returned at its new position.
        let rows = places_of_page
            .iter()
            .filter_map(|place| rows.remove(&place.id).filter(|row| row.position == place.position));
        let events = stream::iter(rows.collect::<Vec<_>>())
            .map(|row| self.read(row))
            .buffered(PARALLEL_OBJECTS)
            .try_filter_map(async |event| Ok(event))
            .try_collect()
            .await?;
        Ok(EventPage { events, next, entries: fitting as u64 })
    }

    /// Reads the next index entries of a range, at most `limit`, without the entry of the cursor.
    async fn places(
        &self,
        range: &Range,
        order: SortOrder,
        after: Option<&Cursor>,
        limit: usize,
    ) -> Result<Vec<IndexEntry>> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let asked = limit + usize::from(after.is_some());
        let answer = range
            .ask(self.table.query())
            .scan_index_forward(order == SortOrder::Timestamp)
            .limit(i32::try_from(asked).unwrap_or(i32::MAX))
            .send()
            .await
            .map_err(store_error("Query events"))?;
        let prefix = range.kind.as_deref().map_or(0, |kind| of_kind(kind, "").len());
        let mut places = Vec::with_capacity(asked);
        for item in answer.items.unwrap_or_default() {
            let entry: ProjectedRow = from_item(item)?;
            let key = if range.kind.is_some() { entry.kind_position } else { entry.position }.unwrap_or_default();
            let position = key.get(prefix..).unwrap_or_default().to_owned();
            if after.is_none_or(|after| after.position != position) {
                places.push(IndexEntry { id: entry.id, position, size: entry.size });
            }
        }
        places.truncate(limit);
        Ok(places)
    }

    /// Counts the events that match the filter. Reads only index entries, not the events.
    ///
    /// # Errors
    /// [`Error::Store`]; [`Error::Refused`] when there are too many to count in one request.
    pub async fn count(&self, user: &UserId, conversation: Uuid, filter: &EventFilter) -> Result<u64> {
        let range = Range::new(partition(user, conversation), filter);
        if range.is_empty() {
            return Ok(0);
        }
        paging::count("Query events", range.ask(self.table.query()), TOO_MANY).await
    }

    /// Counts the conversation's events without the time limit of a request. Reads only index entries.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn count_all(&self, user: &UserId, conversation: Uuid) -> Result<u64> {
        let range = Range::new(partition(user, conversation), &EventFilter::default());
        let query = range.ask(self.table.query());
        paging::count_within(Duration::from_secs(24 * 3600), "Query events", query, TOO_MANY).await
    }

    /// Counts the conversation's stored events, whether the indexes contain them or not. `None` for a log of more than
    /// [`CHECKED_PAGES`] MiB: unlike [`Self::count_all`], this reads the events themselves.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn count_stored(&self, user: &UserId, conversation: Uuid) -> Result<Option<u64>> {
        let mut pages = self
            .table
            .query()
            .key_condition_expression("conversation = :conversation")
            .expression_attribute_values(":conversation", text(partition(user, conversation)))
            .filter_expression("attribute_exists(#position)")
            .expression_attribute_names("#position", "position")
            .consistent_read(true)
            .select(Select::Count)
            .into_paginator()
            .send();
        let mut count = 0;
        for _ in 0..CHECKED_PAGES {
            let Some(page) = pages.next().await else { return Ok(Some(count)) };
            let page = page.map_err(store_error("Query events"))?;
            count += u64::try_from(page.count).unwrap_or_default();
            if page.last_evaluated_key.is_none() {
                return Ok(Some(count));
            }
        }
        Ok(None)
    }

    /// Returns events in the order of the ids, at most 100; `None` for ids that the conversation does not have.
    ///
    /// # Errors
    /// [`Error::Store`]; [`Error::TooLarge`] when several exceed [`PAGE_SIZE`] together.
    pub async fn batch_get(&self, user: &UserId, conversation: Uuid, ids: &[String]) -> Result<Vec<Option<Event>>> {
        let wanted: Vec<String> = ids.iter().filter(|id| !id.is_empty() && id.len() <= KEY_LIMIT).cloned().collect();
        let rows = self.rows(&partition(user, conversation), wanted).await?;
        let size: u64 = ids.iter().filter_map(|id| rows.get(id)).map(|row| row.size).sum();
        if rows.len() > 1 && size > PAGE_SIZE {
            return Err(too_large("events"));
        }
        let found: HashMap<String, Option<Event>> = stream::iter(rows)
            .map(async |(id, row)| self.read(row).await.map(|event| (id, event)))
            .buffered(PARALLEL_OBJECTS)
            .try_collect()
            .await?;
        Ok(ids.iter().map(|id| found.get(id).cloned().flatten()).collect())
    }

    /// Deletes all events of a conversation with their objects, page by page. Objects are deleted before their rows, so that an interrupted
    /// deletion can be repeated.
    ///
    /// # Errors
    /// [`Error::Store`]; some of them may be deleted then.
    pub async fn delete_all(&self, user: &UserId, conversation: Uuid) -> Result<()> {
        let partition = partition(user, conversation);
        let mut start = None;
        loop {
            let answer = self
                .table
                .query()
                .key_condition_expression("conversation = :conversation")
                .expression_attribute_values(":conversation", text(partition.clone()))
                .projection_expression("id, event_object")
                .consistent_read(true)
                .set_exclusive_start_key(start)
                .send()
                .await
                .map_err(store_error("Query events"))?;
            let rows: Vec<DeletableRow> =
                answer.items.unwrap_or_default().into_iter().map(from_item).collect::<Result<_>>()?;
            let objects: Vec<String> = rows.iter().filter_map(|row| row.event_object.clone()).collect();
            stream::iter(objects)
                .map(|key| self.delete_object(key))
                .buffer_unordered(PARALLEL_OBJECTS)
                .try_collect::<()>()
                .await?;
            let mut writes = Vec::with_capacity(rows.len());
            for row in rows {
                let delete = DeleteRequest::builder().set_key(Some(key(&partition, &row.id))).build();
                let delete = delete.map_err(Error::internal)?;
                writes.push(WriteRequest::builder().delete_request(delete).build());
            }
            self.table.batch_write(&writes).await?;
            start = answer.last_evaluated_key;
            if start.is_none() {
                break;
            }
        }
        for key in [version_key(&partition), backfill_key(&partition)] {
            let delete = self.table.client.delete_item().table_name(&self.table.name).set_key(Some(key));
            delete.send().await.map_err(store_error("DeleteItem events"))?;
        }
        Ok(())
    }

    async fn rows(&self, partition: &str, mut ids: Vec<String>) -> Result<HashMap<String, Row>> {
        // DynamoDB refuses a batch with duplicate keys.
        ids.sort_unstable();
        ids.dedup();
        let mut rows = HashMap::with_capacity(ids.len());
        for item in self.table.batch_get(ids.iter().map(|id| key(partition, id)).collect()).await? {
            let row: Row = from_item(item)?;
            rows.insert(row.id.clone(), row);
        }
        Ok(rows)
    }

    /// The hash covers the whole key of the row, including the owner: two users may have conversations with the same id.
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

    async fn delete_object(&self, key: String) -> Result<()> {
        // S3 reports success for a missing object.
        self.s3
            .delete_object()
            .bucket(&self.bucket)
            .key(key)
            .send()
            .await
            .map_err(store_error("DeleteObject events"))?;
        Ok(())
    }

    /// Reads the event of a row; `None` when its object is missing because the event is being deleted.
    async fn read(&self, row: Row) -> Result<Option<Event>> {
        let json = match (row.event, row.event_object) {
            (Some(json), _) => json,
            (None, Some(key)) => match objects::read_text(&self.s3, &self.bucket, &key, "GetObject events").await? {
                Some(json) => json,
                None => {
                    tracing::warn!(key, "event.object_missing");
                    return Ok(None);
                }
            },
            (None, None) => return Err(Error::internal("the row of an event is without the event")),
        };
        Ok(Some(Event { id: row.id, timestamp: row.timestamp, kind: row.kind, json }))
    }
}

fn partition(user: &UserId, conversation: Uuid) -> String {
    user.key_of(&id::hex(conversation))
}

/// The version has its own partition, so that no page contains it.
fn version_key(partition: &str) -> Item {
    key(&format!("{partition}#version"), "version")
}

fn backfill_key(partition: &str) -> Item {
    key(&format!("{partition}#version"), "backfill")
}

fn key(partition: &str, id: &str) -> Item {
    Item::from([("conversation".into(), text(partition)), ("id".into(), text(id))])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn headers_of_models_are_masked_and_other_events_stay_as_they_are() {
        let stored = |json: &str| {
            let text = String::new;
            Event { id: text(), timestamp: text(), kind: text(), json: json.to_owned() }.without_credentials().json
        };
        let llm = r#"{"value": {"agent": {"llm": {"model": "m", "extra_headers" : {"Authorization": "Bearer canary"}},
            "condenser": {"llm": {"extra_headers": null}}}}}"#;
        let masked: Value = serde_json::from_str(&stored(llm)).expect("JSON");
        assert_eq!(
            masked.pointer("/value/agent/llm"),
            Some(&json!({"model": "m", "extra_headers": {"Authorization": MASK}}))
        );
        for other in [
            r#"{"llm": {"extra_headers": null},  "n": 1.50}"#,
            r#"{"text": "\"extra_headers\": {\"a\": 1}"}"#,
            r#"{"text": "extra_headers"}"#,
            r#"{"extra_headers": {"#,
        ] {
            assert_eq!(stored(other), other);
        }
    }
}
