//! Reads files of JSON lines: `{"type":"conversation","data":{…}}`, `{"type":"start_task","data":{…}}`,
//! `{"type":"event","conversation_id":…,"data":{…}}`, in any order.
//!
//! Each file is read twice: first for the owners of conversations, because an event belongs to the owner of its conversation and may
//! precede it; then for its rows. Input that cannot be read twice (standard input, a pipe) is copied to a temporary file.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _};
use std::path::{Path, PathBuf};
use std::vec;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use shared::user::UserId;
use uuid::Uuid;

use super::row::{self, Unfinished};
use super::{Entry, ImportError, Skip};

/// A longer line is skipped: agent servers send no events of this size.
const MAX_LINE_BYTES: u64 = 64 * 1024 * 1024;

/// An iterator over the rows of files.
pub struct JsonLines {
    default: Option<UserId>,
    owners: Owners,
    total: u64,
    files: vec::IntoIter<(String, Lines)>,
    current: Option<(String, Lines)>,
}

/// A line whose `data` is not parsed yet.
#[derive(Deserialize)]
struct Line<'l> {
    #[serde(borrow)]
    r#type: Cow<'l, str>,
    #[serde(borrow, default)]
    conversation_id: Option<Cow<'l, str>>,
    #[serde(borrow)]
    data: &'l RawValue,
}

/// The owners of the conversations that name one. The id of each owner is stored once.
#[derive(Default)]
struct Owners {
    ids: Vec<UserId>,
    index: HashMap<String, usize>,
    /// `None` for a conversation with several owners.
    conversations: HashMap<Uuid, Option<usize>>,
}

impl Owners {
    fn note(&mut self, line: &str) {
        /// The fields of a conversation that identify its owner.
        #[derive(Deserialize)]
        struct Owned<'l> {
            #[serde(borrow)]
            id: Cow<'l, str>,
            #[serde(borrow, default)]
            created_by_user_id: Option<Cow<'l, str>>,
        }
        let Ok(line) = serde_json::from_str::<Line<'_>>(line) else { return };
        if line.r#type != "conversation" {
            return;
        }
        let Ok(Owned { id, created_by_user_id: Some(owner) }) = serde_json::from_str(line.data.get()) else { return };
        let Ok(id) = Uuid::parse_str(&id) else { return };
        let owner = *self.index.entry(owner.into_owned()).or_insert_with_key(|owner| {
            self.ids.push(UserId::new(owner));
            self.ids.len() - 1
        });
        let known = self.conversations.entry(id).or_insert(Some(owner));
        if *known != Some(owner) {
            *known = None;
        }
    }

    fn of(&self, conversation: Uuid, default: Option<&UserId>) -> Result<UserId, String> {
        match self.conversations.get(&conversation) {
            Some(Some(owner)) => Ok(self.ids[*owner].clone()),
            Some(None) => Err("event: several owners have its conversation".into()),
            None => default.cloned().ok_or_else(|| format!("event: {}", row::NO_OWNER)),
        }
    }
}

impl JsonLines {
    /// Opens all files and reads them once; `-` means standard input. Rows without an owner belong to `default`; if it is `None`, they
    /// are skipped.
    ///
    /// # Errors
    /// Names the file that cannot be read.
    pub fn open(paths: &[PathBuf], default: Option<UserId>) -> Result<Self, ImportError> {
        let mut owners = Owners::default();
        let mut total = 0;
        let mut files = Vec::new();
        for path in paths {
            let failed = |source| ImportError::File { path: path.clone(), source };
            let mut lines = Lines::new(open(path).map_err(failed)?);
            while let Some((_, line)) = lines.next().map_err(failed)? {
                total += 1;
                if let Ok(line) = line {
                    owners.note(&line);
                }
            }
            let mut file = lines.file.into_inner();
            file.rewind().map_err(failed)?;
            let name = if path == Path::new("-") { "standard input".to_owned() } else { path.display().to_string() };
            files.push((name, Lines::new(file)));
        }
        Ok(Self { default, owners, total, files: files.into_iter(), current: None })
    }

    /// The number of rows in all files.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    fn entry(&self, text: &str) -> Result<Entry, String> {
        let default = self.default.as_ref();
        let line: Line<'_> = serde_json::from_str(text).map_err(|error| {
            if error.is_data() {
                "line: it is not an object with a type and data".to_owned()
            } else {
                "line: it is not JSON".to_owned()
            }
        })?;
        match &*line.r#type {
            "conversation" => Ok(Entry::Conversation(Box::new(row::conversation(&value(&line)?, default)?))),
            "start_task" => {
                let (user, task) = row::start_task(&value(&line)?, default, Unfinished::Keep)?;
                Ok(Entry::StartTask { user, task: Box::new(task) })
            }
            "event" => {
                let conversation = row::conversation_id(line.conversation_id.as_deref().unwrap_or_default())?;
                let user = self.owners.of(conversation, default)?;
                Ok(Entry::Event { user, conversation, event: row::event(line.data.get())? })
            }
            _ => Err("line: its type is not conversation, start_task or event".into()),
        }
    }
}

fn value(line: &Line<'_>) -> Result<Value, String> {
    serde_json::from_str(line.data.get())
        .map_err(|_| "line: its data is nested too deeply, or contains a number that is too large".into())
}

impl Iterator for JsonLines {
    type Item = Result<Entry, Skip>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.current.is_none() {
                self.current = Some(self.files.next()?);
            }
            let (name, lines) = self.current.as_mut()?;
            let name = name.clone();
            match lines.next() {
                Ok(Some((number, line))) => {
                    let skip = |reason| Skip { location: format!("{name}:{number}"), reason };
                    return Some(line.map_err(ToOwned::to_owned).and_then(|line| self.entry(&line)).map_err(skip));
                }
                Ok(None) => self.current = None,
                Err(error) => {
                    let location = format!("{name}:{}", lines.number + 1);
                    self.current = None;
                    return Some(Err(Skip {
                        location,
                        reason: format!("file: the rest of it cannot be read: {error}"),
                    }));
                }
            }
        }
    }
}

/// Opens a file for reading twice; copies it to a temporary file if necessary.
fn open(path: &Path) -> io::Result<File> {
    if path == Path::new("-") {
        return copied(&mut io::stdin().lock());
    }
    let mut file = File::open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { copied(&mut file) }
}

fn copied(from: &mut dyn io::Read) -> io::Result<File> {
    let mut copy = tempfile::tempfile()?;
    io::copy(from, &mut copy)?;
    copy.rewind()?;
    Ok(copy)
}

/// The lines of a file with their numbers, without empty lines.
struct Lines {
    file: BufReader<File>,
    number: u64,
}

impl Lines {
    fn new(file: File) -> Self {
        Self { file: BufReader::with_capacity(256 * 1024, file), number: 0 }
    }

    /// Returns the next line, or the reason to skip it.
    fn next(&mut self) -> io::Result<Option<(u64, Result<String, &'static str>)>> {
        loop {
            let mut bytes = Vec::new();
            let read = (&mut self.file).take(MAX_LINE_BYTES).read_until(b'\n', &mut bytes)?;
            if read == 0 {
                return Ok(None);
            }
            self.number += 1;
            if read as u64 == MAX_LINE_BYTES && !bytes.ends_with(b"\n") {
                self.file.skip_until(b'\n')?;
                return Ok(Some((self.number, Err("line: it is longer than 64 MiB"))));
            }
            let Ok(mut text) = String::from_utf8(bytes) else {
                return Ok(Some((self.number, Err("line: it is not UTF-8"))));
            };
            if self.number == 1 && text.starts_with('\u{feff}') {
                text.remove(0);
            }
            if !text.trim().is_empty() {
                return Ok(Some((self.number, Ok(text))));
            }
        }
    }
}
