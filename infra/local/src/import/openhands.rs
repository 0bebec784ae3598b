//! Reads the data folder of an OpenHands app server: its SQLite database and its event files.
//!
//! Nothing is written to the folder, and the database may be in use. If a database in WAL mode is open in another process, it is read
//! through its shared memory, which is opened read-only as well. If no process has it open, it is copied, because SQLite would create
//! files next to it. Rows are read in short queries: without WAL mode, a longer query would block the server.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::fs::{self, File, ReadDir};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::vec;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, Row};
use serde_json::{Map, Value};
use shared::conversation::ConversationRecord;
use shared::user::UserId;
use tempfile::TempDir;
use uuid::Uuid;

use super::row::{self, Unfinished};
use super::{Entry, ImportError, Skip};

const DATABASE: &str = "openhands.db";
const EVENTS: &str = "v1_conversations";
/// How long to wait while the server writes.
const BUSY: Duration = Duration::from_secs(10);
/// The number of rows that one query reads.
const PAGE_ROWS: usize = 500;
/// A larger event is skipped: agent servers send no events of this size.
const MAX_EVENT_BYTES: u64 = 64 * 1024 * 1024;

const NOT_V1: &str = "conversation: it has version V0, which this server does not support";
const NO_CONVERSATION: &str = "event: its conversation is not in the database, or was skipped";

/// The tables in the order in which they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Table {
    Conversations,
    StartTasks,
}

impl Table {
    fn name(self) -> &'static str {
        match self {
            Self::Conversations => "conversation_metadata",
            Self::StartTasks => "app_conversation_start_task",
        }
    }

    fn key(self) -> &'static str {
        match self {
            Self::Conversations => "conversation_id",
            Self::StartTasks => "id",
        }
    }
}

/// The values of a row by column name, without nulls.
type Columns = Map<String, Value>;

/// An iterator over the rows and events of a data folder.
pub struct DataFolder {
    default: Option<UserId>,
    database: Connection,
    // The folder of a temporary copy. It is declared after the connection, so that it is removed after the connection is closed.
    _copy: Option<TempDir>,
    tables: vec::IntoIter<Table>,
    table: Option<(Table, i64)>,
    page: VecDeque<(Table, Columns)>,
    /// The owners of the imported conversations.
    owners: HashMap<Uuid, UserId>,
    folders: vec::IntoIter<PathBuf>,
    folder: Option<(Option<UserId>, Uuid, ReadDir)>,
    total: u64,
}

impl DataFolder {
    /// Opens a data folder. Rows without an owner belong to `default`; if it is `None`, they are skipped.
    ///
    /// # Errors
    /// The folder is not a data folder of an OpenHands app server, or cannot be read.
    pub fn open(folder: &Path, default: Option<UserId>) -> Result<Self, ImportError> {
        let path = folder.join(DATABASE);
        if !path.is_file() {
            return Err(ImportError::Source(format!(
                "There is no {DATABASE} in {}, so it is not the data folder of an OpenHands app server.",
                folder.display()
            )));
        }
        let unreadable = |error: &rusqlite::Error| {
            ImportError::Source(format!(
                "{} cannot be read: {error}. If its server was killed, start the server again and stop it.",
                path.display()
            ))
        };
        let (database, copy) = connect(&path).map_err(|source| ImportError::File { path: path.clone(), source })?;
        let database = database.map_err(|error| unreadable(&error))?;
        let mut tables = Vec::new();
        let mut total = 0;
        for table in [Table::Conversations, Table::StartTasks] {
            if let Some(rows) = count(&database, table).map_err(|error| unreadable(&error))? {
                total += rows;
                tables.push(table);
            }
        }
        let folders = event_folders(folder).map_err(|source| ImportError::File { path: folder.into(), source })?;
        for folder in &folders {
            let files = fs::read_dir(folder).map_err(|source| ImportError::File { path: folder.clone(), source })?;
            total += files.flatten().filter(|file| is_event(&file.path())).count() as u64;
        }
        Ok(Self {
            default,
            database,
            _copy: copy,
            tables: tables.into_iter(),
            table: None,
            page: VecDeque::new(),
            owners: HashMap::new(),
            folders: folders.into_iter(),
            folder: None,
            total,
        })
    }

    /// The number of rows and events.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Returns the next row of the tables.
    fn row(&mut self) -> Option<Result<(Table, Columns), Skip>> {
        loop {
            if let Some(row) = self.page.pop_front() {
                return Some(Ok(row));
            }
            let (table, after) = match self.table {
                Some(position) => position,
                None => (self.tables.next()?, i64::MIN),
            };
            match page(&self.database, table, after) {
                Ok((rows, last)) => {
                    self.table = last.map(|last| (table, last));
                    self.page.extend(rows.into_iter().map(|row| (table, row)));
                }
                Err(error) => {
                    self.table = None;
                    return Some(Err(Skip {
                        location: format!("{DATABASE}, {}", table.name()),
                        reason: format!("database: the rest of a table cannot be read: {error}"),
                    }));
                }
            }
        }
    }

    fn conversation(&mut self, columns: Columns) -> Result<Entry, String> {
        if columns.get("conversation_version").and_then(Value::as_str) != Some("V1") {
            return Err(NOT_V1.into());
        }
        let record: ConversationRecord = row::conversation(&conversation(columns), self.default.as_ref())?;
        self.owners.insert(record.id, record.user.clone());
        Ok(Entry::Conversation(Box::new(record)))
    }

    fn start_task(&self, mut columns: Columns) -> Result<Entry, String> {
        decode(&mut columns, "request");
        // An unfinished start of another server cannot be continued here. Its status would say that it is still running.
        let (user, task) = row::start_task(&Value::Object(columns), self.default.as_ref(), Unfinished::Fail)?;
        Ok(Entry::StartTask { user, task: Box::new(task) })
    }

    /// Returns the event of the next file.
    fn event(&mut self) -> Option<Result<Entry, Skip>> {
        loop {
            let Some((owner, conversation, files)) = &mut self.folder else {
                let path = self.folders.next()?;
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let skip = |reason: String| Skip { location: path.display().to_string(), reason };
                let Ok(conversation) = Uuid::parse_str(&name) else {
                    return Some(Err(skip("event: the name of its folder is not the id of a conversation".into())));
                };
                match fs::read_dir(&path) {
                    Ok(files) => {
                        self.folder = Some((self.owners.get(&conversation).cloned(), conversation, files));
                    }
                    Err(error) => return Some(Err(skip(format!("event: its folder cannot be read: {error}")))),
                }
                continue;
            };
            let Some(file) = files.next() else {
                self.folder = None;
                continue;
            };
            let path = match file {
                Ok(file) => file.path(),
                Err(error) => {
                    let location = conversation.simple().to_string();
                    self.folder = None;
                    return Some(Err(Skip { location, reason: format!("event: its folder cannot be read: {error}") }));
                }
            };
            if !is_event(&path) {
                continue;
            }
            let entry = match owner {
                None => Err(NO_CONVERSATION.to_owned()),
                Some(owner) => {
                    event(&path).map(|event| Entry::Event { user: owner.clone(), conversation: *conversation, event })
                }
            };
            return Some(entry.map_err(|reason| Skip { location: path.display().to_string(), reason }));
        }
    }
}

impl Iterator for DataFolder {
    type Item = Result<Entry, Skip>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.row() {
            Some(Ok((table, columns))) => {
                let id = columns.get(table.key()).and_then(Value::as_str).unwrap_or("without an id");
                let location = format!("{DATABASE}, {} {id:.64}", table.name());
                let entry = match table {
                    Table::Conversations => self.conversation(columns),
                    Table::StartTasks => self.start_task(columns),
                };
                Some(entry.map_err(|reason| Skip { location, reason }))
            }
            Some(Err(skip)) => Some(Err(skip)),
            None => self.event(),
        }
    }
}

/// Opens the database, or a copy of it in a temporary folder, which is returned as well.
fn connect(path: &Path) -> io::Result<(rusqlite::Result<Connection>, Option<TempDir>)> {
    if !is_wal(path)? {
        return Ok((open(path, "mode=ro"), None));
    }
    let is_open = || sibling(path, "-shm").exists() && sibling(path, "-wal").exists();
    if !is_open() {
        let folder = tempfile::tempdir()?;
        let copy = folder.path().join(DATABASE);
        fs::copy(path, &copy)?;
        match fs::copy(sibling(path, "-wal"), sibling(&copy, "-wal")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // If another process opened the database meanwhile, the copy may be inconsistent.
        if !is_open() {
            return Ok((open(&copy, "mode=rw"), Some(folder)));
        }
    }
    Ok((open(path, "mode=ro&readonly_shm=1"), None))
}

fn open(path: &Path, parameters: &str) -> rusqlite::Result<Connection> {
    let path = path.to_str().ok_or_else(|| rusqlite::Error::InvalidPath(path.into()))?;
    let path = path.replace('%', "%25").replace('?', "%3f").replace('#', "%23");
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(format!("file:{path}?{parameters}"), flags)?;
    connection.busy_timeout(BUSY)?;
    Ok(connection)
}

/// Whether the database is in WAL mode, according to its header.
fn is_wal(path: &Path) -> io::Result<bool> {
    let mut header = Vec::new();
    File::open(path)?.take(20).read_to_end(&mut header)?;
    Ok(header.get(18) == Some(&2))
}

fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// The number of rows of a table; `None` if the table does not exist.
fn count(database: &Connection, table: Table) -> rusqlite::Result<Option<u64>> {
    if !database.table_exists(None, table.name())? {
        return Ok(None);
    }
    let count: i64 = database.query_row(&format!("SELECT count(*) FROM {}", table.name()), [], |row| row.get(0))?;
    Ok(Some(count.unsigned_abs()))
}

/// Returns the rows with a `rowid` greater than `after`, and the last `rowid` as the start of the next page; `None` after the last row.
fn page(database: &Connection, table: Table, after: i64) -> rusqlite::Result<(Vec<Columns>, Option<i64>)> {
    // All columns are selected, because the set of columns depends on the server's version.
    let query = format!("SELECT rowid, * FROM {} WHERE rowid > ? ORDER BY rowid LIMIT {PAGE_ROWS}", table.name());
    let mut statement = database.prepare_cached(&query)?;
    let mut rows = statement.query([after])?;
    let mut page = Vec::new();
    let mut last = None;
    while let Some(row) = rows.next()? {
        last = Some(row.get(0)?);
        page.push(columns(row)?);
    }
    Ok((page, last))
}

fn columns(row: &Row<'_>) -> rusqlite::Result<Columns> {
    let statement = row.as_ref();
    let mut columns = Map::new();
    for index in 1..statement.column_count() {
        let value = match row.get_ref(index)? {
            ValueRef::Integer(integer) => integer.into(),
            ValueRef::Real(real) => real.into(),
            ValueRef::Text(text) => String::from_utf8_lossy(text).into(),
            ValueRef::Null | ValueRef::Blob(_) => continue,
        };
        columns.insert(statement.column_name(index)?.to_owned(), value);
    }
    Ok(columns)
}

/// Converts a row to the API's representation of the conversation.
fn conversation(mut columns: Columns) -> Value {
    decode(&mut columns, "pr_number");
    decode(&mut columns, "tags");
    decode(&mut columns, "launched_agent_profile");
    let mut part = |names: &[(&str, &str)]| -> Map<String, Value> {
        names.iter().filter_map(|(column, field)| Some(((*field).to_owned(), columns.remove(*column)?))).collect()
    };
    let tokens = [
        "prompt_tokens",
        "completion_tokens",
        "cache_read_tokens",
        "cache_write_tokens",
        "reasoning_tokens",
        "context_window",
        "per_turn_token",
    ];
    let tokens = part(&tokens.map(|name| (name, name)));
    let mut metrics = part(&["accumulated_cost", "max_budget_per_task"].map(|name| (name, name)));
    metrics.insert("accumulated_token_usage".into(), tokens.into());
    let renamed =
        part(&[("conversation_id", "id"), ("user_id", "created_by_user_id"), ("last_updated_at", "updated_at")]);
    columns.extend(renamed);
    columns.insert("metrics".into(), metrics.into());
    Value::Object(columns)
}

/// Parses a column that contains JSON. An invalid value stays a text, which the parser of the row rejects later.
fn decode(columns: &mut Columns, name: &str) {
    if let Some(value) = columns.get_mut(name)
        && let Some(Ok(decoded)) = value.as_str().map(serde_json::from_str)
    {
        *value = decoded;
    }
}

/// The folders of events, one per conversation, including those in the folders of users.
fn event_folders(data: &Path) -> io::Result<Vec<PathBuf>> {
    let mut roots = vec![data.join(EVENTS)];
    for user in fs::read_dir(data)? {
        roots.push(user?.path().join(EVENTS));
    }
    let mut folders = Vec::new();
    for root in roots.into_iter().filter(|root| root.is_dir()) {
        for folder in fs::read_dir(root)? {
            folders.push(folder?.path());
        }
    }
    folders.retain(|folder| folder.is_dir());
    folders.sort_unstable();
    Ok(folders)
}

fn is_event(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "json")
}

fn event(path: &Path) -> Result<shared::event::store::Event, String> {
    let mut json = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_EVENT_BYTES + 1).read_to_string(&mut json));
    match read {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err("event: it is not UTF-8".into()),
        Err(error) => Err(format!("event: its file cannot be read: {error}")),
        Ok(length) if length as u64 > MAX_EVENT_BYTES => Err("event: it is longer than 64 MiB".into()),
        Ok(_) => row::event(json.trim()),
    }
}
