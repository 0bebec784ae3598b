//! Export builder: reads the log page by page, compresses it, and uploads it part by part.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};

use super::archive::ArchiveWriter;
use super::store::{ExportStore, Lease, Part, Stored, Upload};
use crate::blocking;
use crate::clock::Time;
use crate::config::ExportConfig;
use crate::conversation::store::ConversationStore;
use crate::conversation::{AppConversation, ConversationRecord};
use crate::error::{Error, Result};
use crate::event::store::{Cursor, EventFilter, EventPage, EventStore, SortOrder};
use crate::metrics;

/// The format version, which is part of every fingerprint.
const FORMAT: u32 = 1;
/// The size of a part in bytes. S3 accepts 10,000 parts of 5 MiB to 5 GiB (the last may be smaller); with 8 MiB an upload can have 78 GiB.
const PART_SIZE: usize = 8 * 1024 * 1024;
const MAX_PARTS: usize = 10_000;
/// The most events that are read at once; the store returns fewer if they are large.
const PAGE: usize = 100;
/// How long a build waits for index entries that lag behind their events. Usually they lag for less than a second.
const LONGEST_LAG: Duration = Duration::from_secs(60);
/// The pause between two attempts while index entries lag.
const LAG_PAUSE: Duration = Duration::from_secs(1);

/// The sources of an export: records and events.
#[derive(Clone, Debug)]
pub(super) struct EventLog {
    pub(super) conversations: ConversationStore,
    pub(super) events: EventStore,
    /// See [`ExportConfig::settle`].
    settle: Duration,
    max_events: u64,
}

/// The current contents of an export.
#[derive(Debug)]
pub(super) struct Snapshot {
    /// The key of the object, derived from the other fields.
    pub(super) key: String,
    /// The contents of `meta.json`.
    meta: Bytes,
    /// The time of the last write to the log.
    changed_at: Option<Time>,
}

impl EventLog {
    pub(super) fn new(config: &ExportConfig, conversations: ConversationStore, events: EventStore) -> Self {
        Self { conversations, events, settle: config.settle, max_events: config.max_events }
    }

    pub(super) async fn snapshot(&self, record: ConversationRecord) -> Result<Snapshot> {
        let (user, id) = (record.user.clone(), record.id);
        let mut shown = AppConversation::without_sandbox(record);
        let (children, version) =
            tokio::try_join!(self.conversations.sub_conversations(&user, id), self.events.version(&user, id))?;
        shown.sub_conversation_ids = children;
        let meta = meta(&shown)?;
        let log = version.as_ref().map_or("", |version| version.version.as_str());
        let key = ExportStore::key(&user, id, &format!("{FORMAT}#{log}#{meta}"));
        Ok(Snapshot { key, meta: meta.into(), changed_at: version.map(|version| version.changed_at) })
    }

    /// Whether an object contains the whole log. An object whose build did not wait until the indexes had settled may lack events.
    pub(super) fn is_current(&self, stored: &Stored, snapshot: &Snapshot) -> bool {
        match (self.settled_at(snapshot), stored.started_at) {
            (None, _) => true,
            (Some(settled_at), Some(started_at)) => started_at >= settled_at,
            (Some(_), None) => false,
        }
    }

    /// When the indexes contain all events of the snapshot; `None` for an empty log.
    fn settled_at(&self, snapshot: &Snapshot) -> Option<Time> {
        snapshot.changed_at.map(|changed_at| changed_at.plus(self.settle))
    }
}

/// Builds `meta.json`: the conversation without the fields that describe its sandbox.
fn meta(shown: &AppConversation) -> Result<String> {
    let mut value = serde_json::to_value(shown).map_err(Error::internal)?;
    if let serde_json::Value::Object(fields) = &mut value {
        for field in ["sandbox_status", "execution_status", "conversation_url", "session_api_key"] {
            fields.shift_remove(field);
        }
    }
    serde_json::to_string_pretty(&value).map_err(Error::internal)
}

/// The result of one attempt to build an export.
#[derive(Debug)]
pub(super) enum BuildOutcome {
    /// The object is complete. Contains its bytes, if they are in memory.
    Built { length: u64, zip: Option<Bytes> },
    /// The deadline has passed.
    OutOfTime,
    /// Another process has the lease, or the conversation is deleted.
    LeaseLost,
    /// The log has this many events, which exceeds the limit of an export.
    TooManyEvents(u64),
}

/// One attempt to build an export.
#[derive(Debug)]
pub(super) struct ExportBuilder<'a> {
    exports: &'a ExportStore,
    log: &'a EventLog,
    lease: &'a Lease,
    snapshot: &'a Snapshot,
    started_at: Time,
    upload: Option<Upload>,
    parts: Vec<Part>,
    length: u64,
}

impl<'a> ExportBuilder<'a> {
    pub(super) fn new(exports: &'a ExportStore, log: &'a EventLog, lease: &'a Lease, snapshot: &'a Snapshot) -> Self {
        let started_at = Time::now();
        Self { exports, log, lease, snapshot, started_at, upload: None, parts: Vec::new(), length: 0 }
    }

    /// Builds the export from the start, once the indexes have settled, and renews the lease meanwhile. An attempt that fails aborts its upload.
    pub(super) async fn run(mut self, deadline: Instant) -> Result<BuildOutcome> {
        if Instant::now() >= deadline {
            return Ok(BuildOutcome::OutOfTime);
        }
        let (exports, lease) = (self.exports, self.lease);
        let outcome = tokio::select! {
            biased;
            lost = exports.keep(lease) => lost.map(|()| BuildOutcome::LeaseLost),
            built = timeout_at(deadline, self.build()) => built.unwrap_or(Ok(BuildOutcome::OutOfTime)),
        };
        match (&outcome, &self.upload) {
            (Ok(BuildOutcome::Built { length, .. }), _) => metrics::export_made(*length),
            (_, Some(upload)) => exports.abort(upload).await,
            (_, None) => {}
        }
        outcome
    }

    async fn build(&mut self) -> Result<BuildOutcome> {
        if let Some(settled_at) = self.log.settled_at(self.snapshot) {
            sleep(settled_at.since(Time::now())).await;
            self.started_at = Time::now();
        }
        let (user, conversation) = (self.lease.user(), self.lease.conversation());
        let stored = self.log.events.count_stored(user, conversation).await?;
        let patience = Instant::now() + LONGEST_LAG;
        loop {
            let has_patience = Instant::now() < patience;
            let expected = stored.filter(|_| has_patience).unwrap_or_default();
            if !has_patience {
                tracing::warn!(%conversation, "export.index_lagged");
                // The object is not current then, so that the next request builds another one.
                self.started_at = self.snapshot.changed_at.unwrap_or(self.started_at);
            }
            if let Some(outcome) = self.build_once(expected).await? {
                return Ok(outcome);
            }
            if let Some(upload) = self.upload.take() {
                self.exports.abort(&upload).await;
            }
            self.parts.clear();
            self.length = 0;
            sleep(LAG_PAUSE).await;
        }
    }

    /// Builds the export from the events that the index contains. Returns `None` if these are fewer than `expected`.
    async fn build_once(&mut self, expected: u64) -> Result<Option<BuildOutcome>> {
        let (user, conversation) = (self.lease.user(), self.lease.conversation());
        let count = self.log.events.count_all(user, conversation).await?;
        if count > self.log.max_events {
            return Ok(Some(BuildOutcome::TooManyEvents(count)));
        }
        if count < expected {
            return Ok(None);
        }
        let mut entries = 0;
        let (mut archive, mut chunks) = ArchiveWriter::new(self.started_at);
        let mut part = Vec::new();
        let mut page = self.page(None).await?;
        loop {
            let EventPage { events, next, entries: of_page } = page;
            entries += of_page;
            // The next page is read while this one is compressed; no page is read while a part is uploaded.
            let adding = blocking::spawn(move || {
                for event in &events {
                    archive.add_event(event)?;
                }
                Ok::<_, std::io::Error>(archive)
            });
            let reading = async {
                match &next {
                    Some(after) => self.page(Some(after)).await.map(Some),
                    None => Ok(None),
                }
            };
            let (added, read) = tokio::join!(collect(adding, &mut chunks, &mut part), reading);
            archive = added?.map_err(Error::internal)?;
            // The log may have grown since its events were counted.
            if archive.members() > self.log.max_events {
                return Ok(Some(BuildOutcome::TooManyEvents(archive.members())));
            }
            let read = read?;
            if part.len() >= PART_SIZE && !self.upload(&mut part).await? {
                return Ok(Some(BuildOutcome::LeaseLost));
            }
            match read {
                Some(read) => page = read,
                None => break,
            }
        }
        // Each page may be from another time.
        if entries < expected {
            return Ok(None);
        }
        let meta = self.snapshot.meta.clone();
        let finishing = blocking::spawn(move || {
            archive.add("meta.json", &meta)?;
            archive.finish()
        });
        // The size of the directory grows with the number of members, so it is uploaded while it is written.
        while let Some(chunk) = chunks.recv().await {
            part.extend_from_slice(&chunk);
            if part.len() >= PART_SIZE && !self.upload(&mut part).await? {
                return Ok(Some(BuildOutcome::LeaseLost));
            }
        }
        finishing.await.map_err(Error::internal)?.map_err(Error::internal)?;
        self.publish(part).await.map(Some)
    }

    async fn page(&self, after: Option<&Cursor>) -> Result<EventPage> {
        let (filter, order) = (EventFilter::default(), SortOrder::Timestamp);
        let (user, conversation) = (self.lease.user(), self.lease.conversation());
        self.log.events.page(user, conversation, &filter, order, after, PAGE).await
    }

    /// Uploads a part. Before the first part, starts the upload. Returns false when the lease is lost.
    async fn upload(&mut self, part: &mut Vec<u8>) -> Result<bool> {
        let key = &self.snapshot.key;
        let upload = match &self.upload {
            Some(upload) => upload,
            None => {
                let upload_id = self.exports.start_upload(key, self.started_at).await?;
                let upload = &*self.upload.insert(Upload { key: key.clone(), upload_id });
                // The next build aborts the upload if this process crashes.
                if !self.exports.record_upload(self.lease, upload).await? {
                    return Ok(false);
                }
                upload
            }
        };
        if self.parts.len() == MAX_PARTS {
            return Err(Error::internal("an export has more parts than S3 accepts"));
        }
        let bytes = Bytes::from(std::mem::take(part));
        self.length += bytes.len() as u64;
        self.parts.push(self.exports.upload_part(upload, self.parts.len() + 1, bytes).await?);
        Ok(true)
    }

    /// Creates the object from the parts and the rest. A small export has no parts and is written with one request.
    async fn publish(&mut self, mut rest: Vec<u8>) -> Result<BuildOutcome> {
        if self.upload.is_some() && !rest.is_empty() && !self.upload(&mut rest).await? {
            return Ok(BuildOutcome::LeaseLost);
        }
        if !self.exports.renew(self.lease).await? {
            return Ok(BuildOutcome::LeaseLost);
        }
        let Some(upload) = &self.upload else {
            let zip = Bytes::from(rest);
            self.exports.put(&self.snapshot.key, self.started_at, zip.clone()).await?;
            return Ok(BuildOutcome::Built { length: zip.len() as u64, zip: Some(zip) });
        };
        self.exports.complete(upload, std::mem::take(&mut self.parts)).await?;
        Ok(BuildOutcome::Built { length: self.length, zip: None })
    }
}

/// Waits for a task that writes to an archive, and receives its output.
async fn collect<T>(mut task: JoinHandle<T>, chunks: &mut mpsc::Receiver<Bytes>, part: &mut Vec<u8>) -> Result<T> {
    loop {
        tokio::select! {
            biased;
            Some(chunk) = chunks.recv() => part.extend_from_slice(&chunk),
            done = &mut task => {
                while let Ok(chunk) = chunks.try_recv() {
                    part.extend_from_slice(&chunk);
                }
                return done.map_err(Error::internal);
            }
        }
    }
}
