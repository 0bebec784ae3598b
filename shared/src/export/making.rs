//! Makes one export: reads the log page by page and gives the zip away part by part.

use bytes::Bytes;
use tokio::time::Instant;

use super::python_json;
use super::store::{ExportStore, Lease, Part, Progress};
use super::zip::ZipWriter;
use crate::clock::Time;
use crate::error::{Error, Result};
use crate::event::store::{Cursor, Event, EventFilter, EventPage, EventStore, SortOrder};
use crate::id;

/// S3 takes no part below 5 MiB but the last, and no more than 10,000 of them. A part ends where a page of events does.
const PART_SIZE: usize = 5 * 1024 * 1024;
/// Events that are read at once, at most; the store gives fewer where they are large.
const PAGE: usize = 100;
/// Names in an archive are file names on the disk of whoever unpacks it: 255 bytes at most, index and ending included.
const LONGEST_ID: usize = 200;

/// What became of the attempt.
#[derive(Debug)]
pub(super) enum Made {
    /// The object is there. With its bytes, if they are at hand.
    Whole { length: u64, zip: Option<Bytes> },
    /// The time is over; what can be gone on with is saved.
    OutOfTime,
    /// Another one makes it, or the conversation is deleted.
    LeaseLost,
}

/// Until when to work.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit {
    pub(super) deadline: Instant,
    /// Not before a part is saved: who starts anew each time never ends.
    pub(super) after_a_part: bool,
}

/// An export that is being made.
#[derive(Debug)]
pub(super) struct Making<'a> {
    exports: &'a ExportStore,
    events: &'a EventStore,
    key: String,
    meta: Bytes,
    began_at: Time,
    pub(super) progress: Option<Progress>,
}

impl<'a> Making<'a> {
    /// A new one.
    pub(super) fn new(exports: &'a ExportStore, events: &'a EventStore, key: String, meta: Bytes) -> Self {
        Self { exports, events, key, meta, began_at: Time::now(), progress: None }
    }

    /// One that was begun earlier.
    pub(super) async fn go_on(exports: &'a ExportStore, events: &'a EventStore, progress: Progress) -> Result<Self> {
        let meta = exports.read(&meta_note(&progress.notes)).await?;
        let (key, began_at) = (progress.key.clone(), progress.began_at);
        Ok(Self { exports, events, key, meta, began_at, progress: Some(progress) })
    }

    /// The object it becomes.
    pub(super) fn key(&self) -> &str {
        &self.key
    }

    /// Works on it.
    pub(super) async fn run(&mut self, lease: &mut Lease, limit: Limit) -> Result<Made> {
        let mut must_save = limit.after_a_part;
        if !must_save && Instant::now() >= limit.deadline {
            return Ok(Made::OutOfTime);
        }
        let (mut zip, mut after) = match &self.progress {
            None => (ZipWriter::new(self.began_at), None),
            Some(progress) => {
                let zip = ZipWriter::going_on(self.began_at, progress.bytes, progress.members);
                (zip, Some(progress.after.clone()))
            }
        };
        let mut page = Some(self.page(lease, after.as_ref()).await?);
        while let Some(EventPage { events, next }) = page.take() {
            after = next;
            // The next page is read while this one is zipped.
            let reading = async {
                match &after {
                    Some(after) => self.page(lease, Some(after)).await.map(Some),
                    None => Ok(None),
                }
            };
            let (zipped, read) = tokio::join!(add(zip, events), reading);
            zip = zipped?;
            page = read?;
            let Some(after) = &after else { break };
            if zip.waiting() >= PART_SIZE {
                if !self.save_part(lease, &mut zip, after).await? {
                    return Ok(Made::LeaseLost);
                }
                must_save = false;
            } else if lease.is_due() && !self.exports.renew(lease, None).await? {
                return Ok(Made::LeaseLost);
            }
            if !must_save && Instant::now() >= limit.deadline {
                return Ok(Made::OutOfTime);
            }
        }
        zip.add("meta.json", |out| out.write_all(&self.meta)).map_err(Error::internal)?;
        self.finish(lease, zip).await
    }

    async fn page(&self, lease: &Lease, after: Option<&Cursor>) -> Result<EventPage> {
        let (filter, order) = (EventFilter::default(), SortOrder::Timestamp);
        self.events.page(lease.user(), lease.conversation(), &filter, order, after, PAGE).await
    }

    /// Uploads what has been zipped, and saves where to go on. False when the lease is lost.
    async fn save_part(&mut self, lease: &mut Lease, zip: &mut ZipWriter, after: &Cursor) -> Result<bool> {
        let mut progress = match self.progress.take() {
            Some(progress) => progress,
            None => self.begin_upload(after).await?,
        };
        progress.parts += 1;
        let part = self.exports.upload(&self.key, &progress.upload_id, progress.parts, zip.take_body()).await?;
        // The directory comes last in the archive, and would grow with the log if it was kept in memory.
        let mut note = serde_json::to_vec(&part).map_err(Error::internal)?;
        note.push(b'\n');
        note.extend(zip.take_directory());
        self.exports.put_note(&part_note(&progress.notes, progress.parts), note).await?;
        progress.bytes = zip.len();
        progress.members = zip.members();
        progress.after = after.clone();
        progress.saved_at = Time::now();
        let held = self.exports.renew(lease, Some(&progress)).await?;
        self.progress = Some(progress);
        Ok(held)
    }

    async fn begin_upload(&self, after: &Cursor) -> Result<Progress> {
        let upload_id = self.exports.begin_upload(&self.key, self.began_at).await?;
        let notes = format!("{}.{}.", self.key.trim_end_matches(".zip"), id::random_base62(8));
        self.exports.put_note(&meta_note(&notes), self.meta.to_vec()).await?;
        Ok(Progress {
            key: self.key.clone(),
            upload_id,
            notes,
            parts: 0,
            bytes: 0,
            members: 0,
            after: after.clone(),
            began_at: self.began_at,
            saved_at: self.began_at,
        })
    }

    /// Behind the last member: the directory, and the object is there.
    async fn finish(&self, lease: &mut Lease, mut zip: ZipWriter) -> Result<Made> {
        let mut body = zip.take_body();
        let directory = zip.take_directory();
        let Some(progress) = &self.progress else {
            let end = zip.end(directory.len() as u64);
            body.extend(directory);
            body.extend(end);
            let zip = Bytes::from(body);
            if !self.exports.renew(lease, None).await? {
                return Ok(Made::LeaseLost);
            }
            self.exports.put(&self.key, self.began_at, zip.clone()).await?;
            return Ok(Made::Whole { length: zip.len() as u64, zip: Some(zip) });
        };
        let (mut parts, mut last_parts) = (Vec::new(), Vec::new());
        let (mut number, mut length, mut directory_length) = (progress.parts, zip.len(), directory.len() as u64);
        for part in 1..=progress.parts {
            let note = self.exports.read(&part_note(&progress.notes, part)).await?;
            let end = note.iter().position(|byte| *byte == b'\n').unwrap_or_default();
            parts.push(serde_json::from_slice::<Part>(&note[..end]).map_err(Error::internal)?);
            let piece = &note[end + 1..];
            directory_length += piece.len() as u64;
            body.extend(piece);
            if body.len() >= PART_SIZE {
                number += 1;
                let full = std::mem::take(&mut body);
                last_parts.push(self.exports.upload(&self.key, &progress.upload_id, number, full).await?);
            }
            if lease.is_due() && !self.exports.renew(lease, None).await? {
                return Ok(Made::LeaseLost);
            }
        }
        body.extend(directory);
        let end = zip.end(directory_length);
        length += directory_length + end.len() as u64;
        body.extend(end);
        last_parts.push(self.exports.upload(&self.key, &progress.upload_id, number + 1, body).await?);
        if !self.exports.renew(lease, None).await? {
            return Ok(Made::LeaseLost);
        }
        parts.extend(last_parts);
        self.exports.complete(&self.key, &progress.upload_id, parts).await?;
        self.exports.clean_up(progress, true).await;
        Ok(Made::Whole { length, zip: None })
    }
}

/// Adds events to an archive, on a thread where computing does not keep others waiting.
async fn add(mut zip: ZipWriter, events: Vec<Event>) -> Result<ZipWriter> {
    let adding = tokio::task::spawn_blocking(move || {
        for event in events {
            let name = member_name(zip.members(), &event.id);
            match zip.add(&name, |out| python_json::write(&event.json, out)) {
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                    // The log takes JSON alone. Should there be something else, it is exported as it is.
                    tracing::warn!(id = event.id, %error, "export.event_not_json");
                    zip.add(&name, |out| out.write_all(event.json.as_bytes()))?;
                }
                added => added?,
            }
        }
        Ok::<_, std::io::Error>(zip)
    });
    adding.await.map_err(Error::internal)?.map_err(Error::internal)
}

/// The name of an event's member. Ids are the agent server's: whatever could be a path, or no file name somewhere, is `_`.
fn member_name(index: u64, id: &str) -> String {
    let safe = |character: char| match character {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_' | '.' => character,
        _ => '_',
    };
    let id: String = id.chars().take(LONGEST_ID).map(safe).collect();
    format!("event_{index:06}_{id}.json")
}

fn meta_note(notes: &str) -> String {
    format!("{notes}meta")
}

fn part_note(notes: &str, part: u32) -> String {
    format!("{notes}{part:05}")
}

#[cfg(test)]
mod tests {
    use super::member_name;

    #[test]
    fn no_id_leads_out_of_the_folder_that_an_archive_is_unpacked_into() {
        for (index, id, name) in [
            (0, "02e91efe-e8da-4f0d-ae02-5dba5a95d562", "event_000000_02e91efe-e8da-4f0d-ae02-5dba5a95d562.json"),
            (7, "../../etc/passwd", "event_000007_.._.._etc_passwd.json"),
            (1_234_567, "C:\\x\0\n", "event_1234567_C__x__.json"),
            (1, "é😀", "event_000001___.json"),
        ] {
            assert_eq!(member_name(index, id), name);
        }
        assert_eq!(member_name(0, &"x".repeat(1000)).len(), 218);
    }
}
