//! Imports: records of another server become records of this one.
//!
//! Readers ([`jsonl`], [`openhands`]) are iterators of entries and of what has to be skipped. An [`Importer`] takes any such
//! iterator, makes batches of it and has several of them written at the same time, in bounded memory. Each batch is written
//! with its counters or not at all, and what is there already is left as it is: a run that was stopped or killed at any point
//! is completed by another one.

pub mod command;
pub mod jsonl;
pub mod openhands;
mod progress;
mod row;
pub mod summary;
mod target;

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

/// Events that are written together.
const EVENTS: usize = 100;
/// In bytes. DynamoDB takes transactions of up to 4 MB, and a start task holds its texts twice.
const BATCH_ROOM: usize = 1024 * 1024;
/// How many rows wait for others of the same owner at most.
const WAITING_ROWS: usize = 20_000;
/// In bytes, likewise.
const WAITING_ROOM: usize = 32 * 1024 * 1024;
/// Owners are told apart by this many permits: two of them may have to share one.
const LANES: usize = 256;

/// A row of data, ready to be stored.
#[derive(Clone, Debug)]
pub enum Entry {
    /// A conversation, its owner included.
    Conversation(Box<ConversationRecord>),
    /// A start task.
    StartTask {
        /// Its owner.
        user: UserId,
        /// The task.
        task: Box<ImportedTask>,
    },
    /// An event.
    Event {
        /// The owner of its conversation.
        user: UserId,
        /// Its conversation.
        conversation: Uuid,
        /// The event.
        event: Event,
    },
}

/// Why an import did not begin, or cannot go on. Each one reads as a sentence.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// A file or folder.
    #[error("{path} cannot be read: {source}", path = path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The folder is not one of the server that is imported from.
    #[error("{0}")]
    Source(String),
    /// What is written to.
    #[error(transparent)]
    Place(#[from] crate::place::PlaceError),
}

/// How many batches are written at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// In all.
    pub in_flight: usize,
    /// Conversations and start tasks of one owner. Their transactions share the item that counts them: on AWS two at the same
    /// time collide, and one of them is done again.
    pub per_owner: usize,
}

impl Pace {
    /// For the embedded engines, which do one thing after the other: while one batch is written, the next is made ready.
    pub const EMBEDDED: Self = Self { in_flight: 4, per_owner: 4 };
    /// For AWS.
    pub const AWS: Self = Self { in_flight: 16, per_owner: 1 };
}

/// How a run ended.
#[derive(Debug)]
pub enum End {
    /// All entries were looked at.
    Complete,
    /// It was told to stop.
    Stopped,
    /// A write failed; none of its batch's conversations and start tasks are stored.
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
    lanes: Vec<Semaphore>,
}

impl Importer {
    /// An importer into the tables and the bucket of these names.
    #[must_use]
    pub fn new(aws: &Aws, names: &Names, pace: Pace) -> Self {
        // No sealing key: secrets of imported requests are dropped.
        let stores = Stores::without_key(names, aws);
        Self(Arc::new(Inner {
            conversations: stores.conversations(),
            start_tasks: stores.start_tasks_without_secrets(),
            events: stores.events(),
            pace,
            lanes: (0..LANES).map(|_| Semaphore::new(pace.per_owner.max(1))).collect(),
        }))
    }

    /// Takes all entries, or those up to where `stop` ends: then what is being written is written to its end. Entries are read
    /// in a thread of their own. `progress` is told what is settled after each batch.
    ///
    /// Dropping the future stops the run wherever it is; that, too, another run completes.
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
                        note(&mut summary, written);
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
        // The reader stops at its next batch, unless it is through.
        drop(batches);
        let end = match end {
            Some(End::Complete) if reader.join().is_err() => {
                End::Failed(shared::Error::internal("the reader of the data failed"))
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
                let _permit = self.lane(&user).acquire().await;
                let new = conversations.import(&user, &records).await?;
                Ok(Written::Conversations(user, new))
            }
            Batch::StartTasks(user, tasks) => {
                let _permit = self.lane(&user).acquire().await;
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

    /// What keeps an owner's transactions apart.
    fn lane(&self, user: &UserId) -> &Semaphore {
        let mut hasher = DefaultHasher::new();
        user.hash(&mut hasher);
        let lanes = &self.0.lanes;
        &lanes[usize::try_from(hasher.finish() % LANES as u64).unwrap_or_default()]
    }
}

/// Rows that are written by one call.
enum Batch {
    Conversations(UserId, Vec<ConversationRecord>),
    StartTasks(UserId, Vec<ImportedTask>),
    Events(UserId, Uuid, Vec<Event>),
    Skipped(Vec<Skip>),
}

/// A batch that is settled: for each row, whether it is new.
enum Written {
    Conversations(UserId, Vec<bool>),
    StartTasks(UserId, Vec<bool>),
    Events(UserId, Vec<bool>),
    Skipped(Vec<Skip>),
}

fn note(summary: &mut Summary, written: Written) {
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

/// Makes batches of entries until there are no more, or nobody wants them.
fn read(entries: impl Iterator<Item = Result<Entry, Skip>>, batches: &mpsc::Sender<Batch>) {
    let mut waiting = Waiting::default();
    for entry in entries {
        let full = match entry {
            Ok(entry) => waiting.add(entry),
            Err(skip) => waiting.skip(skip),
        };
        let mut ready: Vec<Batch> = full.into_iter().collect();
        if waiting.rows >= WAITING_ROWS || waiting.room >= WAITING_ROOM {
            ready.extend(waiting.drain());
        }
        for batch in ready {
            if batches.blocking_send(batch).is_err() {
                return;
            }
        }
    }
    for batch in waiting.drain() {
        if batches.blocking_send(batch).is_err() {
            return;
        }
    }
}

/// Rows that are to be written together.
struct Group<T> {
    rows: Vec<T>,
    /// In bytes.
    room: usize,
}

/// Adds a row to its group; answers the group when it is full with it.
fn push<K: Eq + Hash, T>(
    groups: &mut HashMap<K, Group<T>>,
    key: K,
    row: T,
    room: usize,
    limit: usize,
) -> Option<(K, Group<T>)> {
    let mut entry = match groups.entry(key) {
        Occupied(entry) => entry,
        Vacant(entry) => entry.insert_entry(Group { rows: Vec::new(), room: 0 }),
    };
    let group = entry.get_mut();
    group.rows.push(row);
    group.room += room;
    let full = group.rows.len() >= limit || group.room >= BATCH_ROOM;
    full.then(|| entry.remove_entry())
}

/// Rows that wait for others with the same owner.
#[derive(Default)]
struct Waiting {
    conversations: HashMap<UserId, Group<ConversationRecord>>,
    start_tasks: HashMap<UserId, Group<ImportedTask>>,
    events: HashMap<(UserId, Uuid), Group<Event>>,
    skipped: Vec<Skip>,
    rows: usize,
    room: usize,
}

impl Waiting {
    /// Adds an entry; answers the batch that is full with it.
    fn add(&mut self, entry: Entry) -> Option<Batch> {
        self.rows += 1;
        match entry {
            Entry::Conversation(record) => {
                let (user, room) = (record.user.clone(), row::texts_of(&record));
                self.room += room;
                let full = push(&mut self.conversations, user, *record, room, conversations::IMPORT_LIMIT);
                full.map(|(user, group)| Batch::Conversations(user, self.taken(group)))
            }
            Entry::StartTask { user, task } => {
                let room = 2 * row::texts_of_task(&task);
                self.room += room;
                let full = push(&mut self.start_tasks, user, *task, room, start_tasks::IMPORT_LIMIT);
                full.map(|(user, group)| Batch::StartTasks(user, self.taken(group)))
            }
            Entry::Event { user, conversation, event } => {
                let room = event.json.len();
                self.room += room;
                let full = push(&mut self.events, (user, conversation), event, room, EVENTS);
                full.map(|((user, conversation), group)| Batch::Events(user, conversation, self.taken(group)))
            }
        }
    }

    fn skip(&mut self, skip: Skip) -> Option<Batch> {
        self.skipped.push(skip);
        (self.skipped.len() >= EVENTS).then(|| Batch::Skipped(std::mem::take(&mut self.skipped)))
    }

    /// The rows of a group that waits no more.
    fn taken<T>(&mut self, group: Group<T>) -> Vec<T> {
        self.rows -= group.rows.len();
        self.room -= group.room;
        group.rows
    }

    /// Whatever waits.
    fn drain(&mut self) -> Vec<Batch> {
        let waiting = std::mem::take(self);
        let conversations = waiting.conversations.into_iter();
        let start_tasks = waiting.start_tasks.into_iter();
        let events = waiting.events.into_iter();
        let skipped = (!waiting.skipped.is_empty()).then_some(Batch::Skipped(waiting.skipped));
        conversations
            .map(|(user, group)| Batch::Conversations(user, group.rows))
            .chain(start_tasks.map(|(user, group)| Batch::StartTasks(user, group.rows)))
            .chain(events.map(|((user, conversation), group)| Batch::Events(user, conversation, group.rows)))
            .chain(skipped)
            .collect()
    }
}
