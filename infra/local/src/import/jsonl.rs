//! Files of JSON lines: `{"type":"conversation","data":{…}}`, `{"type":"start_task","data":{…}}`,
//! `{"type":"event","conversation_id":…,"data":{…}}`, in any order.
//!
//! A file is read twice: first for the owners of conversations, because events are their conversation's owner's and may
//! come before it; then for its rows. What cannot be read twice (standard input, a pipe) is copied to a temporary file.

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

/// In bytes. A longer line is skipped: an agent server sends no event that long.
const MAX_LINE: u64 = 64 * 1024 * 1024;

/// An iterator of the rows of files.
pub struct JsonLines {
    default: Option<UserId>,
    owners: Owners,
    total: u64,
    files: vec::IntoIter<(String, Lines)>,
    current: Option<(String, Lines)>,
}

/// A line, its parts unread.
#[derive(Deserialize)]
struct Line<'l> {
    #[serde(borrow)]
    r#type: Cow<'l, str>,
    #[serde(borrow, default)]
    conversation_id: Option<Cow<'l, str>>,
    #[serde(borrow)]
    data: &'l RawValue,
}

/// Whose the conversations are that name an owner. Ids of owners are kept once.
#[derive(Default)]
struct Owners {
    ids: Vec<UserId>,
    index: HashMap<String, usize>,
    /// `None` for a conversation that several owners have.
    conversations: HashMap<Uuid, Option<usize>>,
}

impl Owners {
    fn note(&mut self, line: &str) {
        /// The part of a conversation that says whose it is.
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
    /// Opens all of the files, `-` being standard input, and looks through them once. Rows without an owner are `default`'s;
    /// with `None`, they are skipped.
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

    /// How many rows there are.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    fn entry(&self, text: &str) -> Result<Entry, String> {
        let default = self.default.as_ref();
        let line: Line<'_> = serde_json::from_str(text).map_err(|error| {
            if error.is_data() {
                "line: it is no object with a type and data".to_owned()
            } else {
                "line: it is no JSON".to_owned()
            }
        })?;
        match &*line.r#type {
            "conversation" => Ok(Entry::Conversation(Box::new(row::conversation(&value(&line)?, default)?))),
            "start_task" => {
                let (user, task) = row::start_task(&value(&line)?, default, Unfinished::AsGiven)?;
                Ok(Entry::StartTask { user, task: Box::new(task) })
            }
            "event" => {
                let conversation = row::conversation_id(line.conversation_id.as_deref().unwrap_or_default())?;
                let user = self.owners.of(conversation, default)?;
                Ok(Entry::Event { user, conversation, event: row::event(line.data.get())? })
            }
            _ => Err("line: its type is none of conversation, start_task, event".into()),
        }
    }
}

fn value(line: &Line<'_>) -> Result<Value, String> {
    serde_json::from_str(line.data.get())
        .map_err(|_| "line: its data is nested too deeply, or holds numbers too large".into())
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
                    let skip = |reason| Skip { place: format!("{name}:{number}"), reason };
                    return Some(line.map_err(ToOwned::to_owned).and_then(|line| self.entry(&line)).map_err(skip));
                }
                Ok(None) => self.current = None,
                Err(error) => {
                    let place = format!("{name}:{}", lines.number + 1);
                    self.current = None;
                    return Some(Err(Skip { place, reason: format!("file: it cannot be read on: {error}") }));
                }
            }
        }
    }
}

/// A file that can be read twice.
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

/// The lines of a file with their numbers, empty ones left out.
struct Lines {
    file: BufReader<File>,
    number: u64,
}

impl Lines {
    fn new(file: File) -> Self {
        Self { file: BufReader::with_capacity(256 * 1024, file), number: 0 }
    }

    /// The next line, or why it cannot be used.
    fn next(&mut self) -> io::Result<Option<(u64, Result<String, &'static str>)>> {
        loop {
            let mut bytes = Vec::new();
            let read = (&mut self.file).take(MAX_LINE).read_until(b'\n', &mut bytes)?;
            if read == 0 {
                return Ok(None);
            }
            self.number += 1;
            if read as u64 == MAX_LINE && !bytes.ends_with(b"\n") {
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
