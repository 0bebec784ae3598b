//! Imports the records of another server.
//!
//! Readers ([`jsonl`], [`openhands`]) are iterators over entries and over rows to skip. An [`Importer`] groups the entries of such an
//! iterator into batches and writes several batches concurrently, in bounded memory. Each batch is written together with its counters
//! or not at all, and existing rows are not changed. Import is therefore idempotent: a run that was stopped or killed at any point is
//! completed by another run.

pub mod command;
pub mod jsonl;
pub mod openhands;
pub(crate) mod progress;
mod row;
pub mod summary;

use std::collections::HashMap;
use std::collections::hash_map::Entry::{Occupied, Vacant};
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::thread;

use shared::aws::Aws;
use shared::config::Names;
use shared::conversation::ConversationRecord;
use shared::conversation::store::{self as conversations, ConversationStore};
use shared::event::store::{Event, EventStore};
use shared::start::store::{self as start_tasks, ImportedTask, StartTaskStore};
use shared::stores::Stores;
use shared::user::UserId;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use uuid::Uuid;

pub use self::summary::{Skip, Summary};

/// The number of events in a batch.
const EVENT_BATCH: usize = 100;
/// DynamoDB accepts transactions of up to 4 MB, and a start task stores its texts twice.
const MAX_BATCH_BYTES: usize = 1024 * 1024;
/// The maximum number of rows in incomplete batches.
const MAX_BUFFERED_ROWS: usize = 20_000;
/// The maximum size of the rows in incomplete batches.
const MAX_BUFFERED_BYTES: usize = 32 * 1024 * 1024;
/// The number of semaphores that serialize the transactions of an owner. Owners with the same hash share one.
const OWNER_SEMAPHORES: usize = 256;

/// A row that is ready to be stored.
#[derive(Clone, Debug)]
pub enum Entry {
    Conversation(Box<ConversationRecord>),
    StartTask {
        user: UserId,
        task: Box<ImportedTask>,
    },
    Event {
        /// The owner of the conversation.
        user: UserId,
        conversation: Uuid,
        event: Event,
    },
}

/// Why an import did not begin. Each message is a sentence.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error("{path} cannot be read: {source}", path = path.display())]
    File { path: PathBuf, source: std::io::Error },
    /// The folder is not a data folder of an OpenHands app server.
    #[error("{0}")]
    Source(String),
    #[error(transparent)]
    Target(#[from] crate::target::TargetError),
}

/// The number of batches that are written concurrently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// The maximum for all batches.
    pub in_flight: usize,
    /// The maximum for batches of conversations and start tasks of one owner. Their transactions update the same counter item: on AWS
    /// concurrent ones conflict, and one of them has to be retried.
    pub per_owner: usize,
}

impl Pace {
    /// For the embedded engines, which execute one operation at a time: while one batch is written, the next ones are prepared.
    pub const EMBEDDED: Self = Self { in_flight: 4, per_owner: 4 };
    /// For AWS.
    pub const AWS: Self = Self { in_flight: 16, per_owner: 1 };
}

/// How a run ended.
#[derive(Debug)]
pub enum End {
    /// All entries were processed.
    Complete,
    /// The run was stopped early.
    Stopped,
    /// A write failed. None of the conversations or start tasks of its batch are stored.
    Failed(shared::Error),
}

/// Writes entries to the stores.
#[derive(Clone, Debug)]
pub struct Importer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    conversations: ConversationStore,
    start_tasks: StartTaskStore,
    events: EventStore,
    pace: Pace,
    owner_semaphores: Vec<Semaphore>,
}

impl Importer {
    /// Creates an importer into the tables and the bucket with these names.
    #[must_use]
    pub fn new(aws: &Aws, names: &Names, pace: Pace) -> Self {
        // No sealing key: secrets of imported requests are dropped.
        let stores = Stores::without_key(names, aws);
        Self(Arc::new(Inner {
            conversations: stores.conversations(),
            start_tasks: stores.start_tasks_without_secrets(),
            events: stores.events(),
            pace,
            owner_semaphores: (0..OWNER_SEMAPHORES).map(|_| Semaphore::new(pace.per_owner.max(1))).collect(),
        }))
    }

    /// Writes all entries, or those until `stop` completes: batches that are being written are then finished. The entries are read in
    /// a separate thread. `progress` is called with the summary after each batch.
    ///
    /// Dropping the future stops the run at any point. Another run completes it.
    pub async fn run(
        &self,
        entries: impl Iterator<Item = Result<Entry, Skip>> + Send + 'static,
        stop: impl Future<Output = ()>,
        mut progress: impl FnMut(&Summary),
    ) -> (Summary, End) {
        let in_flight = self.0.pace.in_flight.max(1);
        let (sender, mut batches) = mpsc::channel(in_flight);
        let reader = thread::spawn(move || read(entries, &sender));
        let mut stop = pin!(stop);
        let mut running = JoinSet::new();
        let mut summary = Summary::default();
        let mut end = None;
        while end.is_none() || !running.is_empty() {
            tokio::select! {
                biased;
                () = &mut stop, if end.is_none() => end = Some(End::Stopped),
                Some(written) = running.join_next() => match written {
                    Ok(Ok(written)) => {
                        record(&mut summary, written);
                        progress(&summary);
                    }
                    Ok(Err(error)) => end = Some(End::Failed(error)),
                    Err(panicked) => end = Some(End::Failed(shared::Error::internal(panicked))),
                },
                batch = batches.recv(), if end.is_none() && running.len() < in_flight => match batch {
                    Some(batch) => {
                        let importer = self.clone();
                        running.spawn(async move { importer.write(batch).await });
                    }
                    None => end = Some(End::Complete),
                },
            }
        }
        // Closes the channel, which stops the reader at its next batch if it has not finished.
        drop(batches);
        let end = match end {
            Some(End::Complete) if reader.join().is_err() => {
                End::Failed(shared::Error::internal("the thread that reads the entries panicked"))
            }
            Some(end) => end,
            None => End::Complete,
        };
        (summary, end)
    }

    async fn write(&self, batch: Batch) -> shared::error::Result<Written> {
        let Inner { conversations, start_tasks, events, .. } = &*self.0;
        match batch {
            Batch::Conversations(user, records) => {
                let _permit = self.owner_semaphore(&user).acquire().await;
                let new = conversations.import(&user, &records).await?;
                Ok(Written::Conversations(user, new))
            }
            Batch::StartTasks(user, tasks) => {
                let _permit = self.owner_semaphore(&user).acquire().await;
                let new = start_tasks.import(&user, &tasks).await?;
                Ok(Written::StartTasks(user, new))
            }
            Batch::Events(user, conversation, batch) => {
                let all = batch.len();
                let unknown = events.unknown(&user, conversation, batch).await?;
                let new: Vec<bool> = (0..all).map(|index| index < unknown.len()).collect();
                if !unknown.is_empty() {
                    events.append(&user, conversation, unknown).await?;
                }
                Ok(Written::Events(user, new))
            }
            Batch::Skipped(skips) => Ok(Written::Skipped(skips)),
        }
    }

    /// The semaphore that limits the concurrent transactions of an owner.
    fn owner_semaphore(&self, user: &UserId) -> &Semaphore {
        let mut hasher = DefaultHasher::new();
        user.hash(&mut hasher);
        let semaphores = &self.0.owner_semaphores;
        &semaphores[usize::try_from(hasher.finish() % OWNER_SEMAPHORES as u64).unwrap_or_default()]
    }
}

/// Rows that one call writes.
enum Batch {
    Conversations(UserId, Vec<ConversationRecord>),
    StartTasks(UserId, Vec<ImportedTask>),
    Events(UserId, Uuid, Vec<Event>),
    Skipped(Vec<Skip>),
}

/// The outcome of a batch: for each row, whether it was new.
enum Written {
    Conversations(UserId, Vec<bool>),
    StartTasks(UserId, Vec<bool>),
    Events(UserId, Vec<bool>),
    Skipped(Vec<Skip>),
}

fn record(summary: &mut Summary, written: Written) {
    match written {
        Written::Conversations(user, new) => {
            summary.conversations.add(&new);
            summary.owner(&user);
        }
        Written::StartTasks(user, new) => {
            summary.start_tasks.add(&new);
            summary.owner(&user);
        }
        Written::Events(user, new) => {
            summary.events.add(&new);
            summary.owner(&user);
        }
        Written::Skipped(skips) => skips.into_iter().for_each(|skip| summary.skip(skip)),
    }
}

/// Groups the entries into batches, until there are no more entries or the receiver is dropped.
fn read(entries: impl Iterator<Item = Result<Entry, Skip>>, batches: &mpsc::Sender<Batch>) {
    let mut buffer = Buffer::default();
    for entry in entries {
        let full = match entry {
            Ok(entry) => buffer.add(entry),
            Err(skip) => buffer.skip(skip),
        };
        let mut ready: Vec<Batch> = full.into_iter().collect();
        if buffer.rows >= MAX_BUFFERED_ROWS || buffer.size_bytes >= MAX_BUFFERED_BYTES {
            ready.extend(buffer.drain());
        }
        for batch in ready {
            if batches.blocking_send(batch).is_err() {
                return;
            }
        }
    }
    for batch in buffer.drain() {
        if batches.blocking_send(batch).is_err() {
            return;
        }
    }
}

/// Rows that will be written together.
struct Group<T> {
    rows: Vec<T>,
    size_bytes: usize,
}

/// Adds a row to its group. Removes and returns the group if it is then full.
fn push<K: Eq + Hash, T>(
    groups: &mut HashMap<K, Group<T>>,
    key: K,
    row: T,
    size_bytes: usize,
    limit: usize,
) -> Option<(K, Group<T>)> {
    let mut entry = match groups.entry(key) {
        Occupied(entry) => entry,
        Vacant(entry) => entry.insert_entry(Group { rows: Vec::new(), size_bytes: 0 }),
    };
    let group = entry.get_mut();
    group.rows.push(row);
    group.size_bytes += size_bytes;
    let full = group.rows.len() >= limit || group.size_bytes >= MAX_BATCH_BYTES;
    full.then(|| entry.remove_entry())
}

/// Rows in incomplete batches, grouped by owner and conversation.
#[derive(Default)]
struct Buffer {
    conversations: HashMap<UserId, Group<ConversationRecord>>,
    start_tasks: HashMap<UserId, Group<ImportedTask>>,
    events: HashMap<(UserId, Uuid), Group<Event>>,
    skipped: Vec<Skip>,
    rows: usize,
    size_bytes: usize,
}

impl Buffer {
    /// Adds an entry. Returns its batch if that is then full.
    fn add(&mut self, entry: Entry) -> Option<Batch> {
        self.rows += 1;
        match entry {
            Entry::Conversation(record) => {
                let (user, size_bytes) = (record.user.clone(), row::text_bytes(&record));
                self.size_bytes += size_bytes;
                let full = push(&mut self.conversations, user, *record, size_bytes, conversations::IMPORT_LIMIT);
                full.map(|(user, group)| Batch::Conversations(user, self.unbuffer(group)))
            }
            Entry::StartTask { user, task } => {
                let size_bytes = 2 * row::task_text_bytes(&task);
                self.size_bytes += size_bytes;
                let full = push(&mut self.start_tasks, user, *task, size_bytes, start_tasks::IMPORT_LIMIT);
                full.map(|(user, group)| Batch::StartTasks(user, self.unbuffer(group)))
            }
            Entry::Event { user, conversation, event } => {
                let size_bytes = event.json.len();
                self.size_bytes += size_bytes;
                let full = push(&mut self.events, (user, conversation), event, size_bytes, EVENT_BATCH);
                full.map(|((user, conversation), group)| Batch::Events(user, conversation, self.unbuffer(group)))
            }
        }
    }

    fn skip(&mut self, skip: Skip) -> Option<Batch> {
        self.skipped.push(skip);
        (self.skipped.len() >= EVENT_BATCH).then(|| Batch::Skipped(std::mem::take(&mut self.skipped)))
    }

    /// Subtracts a group from the counts of the buffer, and returns its rows.
    fn unbuffer<T>(&mut self, group: Group<T>) -> Vec<T> {
        self.rows -= group.rows.len();
        self.size_bytes -= group.size_bytes;
        group.rows
    }

    /// Removes and returns all rows as batches.
    fn drain(&mut self) -> Vec<Batch> {
        let buffer = std::mem::take(self);
        let conversations = buffer.conversations.into_iter();
        let start_tasks = buffer.start_tasks.into_iter();
        let events = buffer.events.into_iter();
        let skipped = (!buffer.skipped.is_empty()).then_some(Batch::Skipped(buffer.skipped));
        conversations
            .map(|(user, group)| Batch::Conversations(user, group.rows))
            .chain(start_tasks.map(|(user, group)| Batch::StartTasks(user, group.rows)))
            .chain(events.map(|((user, conversation), group)| Batch::Events(user, conversation, group.rows)))
            .chain(skipped)
            .collect()
    }
}
