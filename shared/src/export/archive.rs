//! Streaming zip writer of an export.
//!
//! The writer blocks, so it runs on a thread for blocking work. It sends its bytes through a bounded channel: when the receiver is slow the
//! writer waits, and memory contains no more than a few chunks. The central directory at the end of a zip file needs an entry in memory for
//! each member (see `docs/adr/0004-zip-crate.md`).

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use tokio::sync::mpsc;
use zip::write::{SimpleFileOptions, StreamWriter};
use zip::{CompressionMethod, DateTime, ZipWriter};

use super::python_json;
use crate::blocking;
use crate::clock::Time;
use crate::event::store::Event;

/// The size in bytes from which a chunk is sent.
const CHUNK: usize = 256 * 1024;
/// The capacity of the channel, in chunks.
const CHUNKS: usize = 2;
/// The buffer for a member is not kept if a large event has made it larger than this, in bytes.
const KEPT_BUFFER: usize = 1024 * 1024;
/// The longest event id in a member name. Unpacked members are files on disk, whose names have at most 255 bytes, including index and
/// extension.
const LONGEST_ID: usize = 200;

/// A zip file that is being written. Dropping it without [`ArchiveWriter::finish`] discards the rest of it.
#[derive(Debug)]
pub struct ArchiveWriter {
    zip: Option<ZipWriter<StreamWriter<ChunkSender>>>,
    options: SimpleFileOptions,
    members: u64,
    member: Vec<u8>,
    is_discarded: Arc<AtomicBool>,
}

impl ArchiveWriter {
    /// Creates an empty archive, and the receiver of its chunks. All members have the modification time `modified`, in UTC.
    #[must_use]
    pub fn new(modified: Time) -> (Self, mpsc::Receiver<Bytes>) {
        let (chunks, receiver) = mpsc::channel(blocking::capacity(CHUNKS));
        let is_discarded = Arc::new(AtomicBool::new(false));
        let output = ChunkSender { chunk: Vec::with_capacity(CHUNK), chunks, is_discarded: is_discarded.clone() };
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Deflated)
            .last_modified_time(dos_time(modified))
            .unix_permissions(0o644);
        let zip = Some(ZipWriter::new_stream(output));
        (Self { zip, options, members: 0, member: Vec::new(), is_discarded }, receiver)
    }

    /// Adds a member. Blocks while the receiver of the chunks is slow.
    ///
    /// # Errors
    /// When the archive cannot contain the member: a second one of the same name, or one of 4 GiB or more. The archive is unusable then.
    pub fn add(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        let zip = self.zip.as_mut().ok_or_else(|| io::Error::other("the archive is finished"))?;
        zip.start_file(name, self.options)?;
        zip.write_all(content)?;
        self.members += 1;
        Ok(())
    }

    /// Adds an event in Python's JSON format. Blocks while the receiver of the chunks is slow.
    ///
    /// # Errors
    /// See [`ArchiveWriter::add`].
    pub fn add_event(&mut self, event: &Event) -> io::Result<()> {
        // A member of a stream cannot be removed, so its contents are complete before it is started.
        let mut member = std::mem::take(&mut self.member);
        member.clear();
        let name = member_name(self.members, &event.id);
        let added = match python_json::write(&event.json, &mut member) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                // The log accepts only JSON. Anything else is exported unchanged.
                tracing::warn!(id = event.id, %error, "export.event_not_json");
                self.add(&name, event.json.as_bytes())
            }
            written => written.and_then(|()| self.add(&name, &member)),
        };
        if member.capacity() <= KEPT_BUFFER {
            self.member = member;
        }
        added
    }

    /// The number of members so far.
    #[must_use]
    pub fn members(&self) -> u64 {
        self.members
    }

    /// Writes the central directory. Blocks while the receiver of the chunks is slow. The channel is closed afterwards.
    ///
    /// # Errors
    /// When the archive is unusable.
    pub fn finish(mut self) -> io::Result<()> {
        let zip = self.zip.take().ok_or_else(|| io::Error::other("the archive is finished"))?;
        zip.finish()?.into_inner().send();
        Ok(())
    }
}

impl Drop for ArchiveWriter {
    fn drop(&mut self) {
        // `ZipWriter` writes the central directory when it is dropped, also on a thread that must not block.
        self.is_discarded.store(true, Ordering::Relaxed);
    }
}

/// Sends the written bytes in chunks. If the receiver is dropped, the build was cancelled, and everything is discarded.
#[derive(Debug)]
struct ChunkSender {
    chunk: Vec<u8>,
    chunks: mpsc::Sender<Bytes>,
    is_discarded: Arc<AtomicBool>,
}

impl ChunkSender {
    fn send(&mut self) {
        let chunk = std::mem::replace(&mut self.chunk, Vec::with_capacity(CHUNK));
        if !chunk.is_empty() && blocking::send(&self.chunks, chunk.into()).is_err() {
            self.is_discarded.store(true, Ordering::Relaxed);
        }
    }
}

impl Write for ChunkSender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.is_discarded.load(Ordering::Relaxed) {
            self.chunk.extend_from_slice(bytes);
            if self.chunk.len() >= CHUNK {
                self.send();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The name of an event's member. The agent server chooses the id, so every character that could be part of a path (path traversal), or
/// that a file system refuses, becomes `_`.
fn member_name(index: u64, id: &str) -> String {
    let safe = |character: char| match character {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_' | '.' => character,
        _ => '_',
    };
    let id: String = id.chars().take(LONGEST_ID).map(safe).collect();
    format!("event_{index:06}_{id}.json")
}

/// MS-DOS times range from 1980 to 2107, in steps of two seconds. A time outside becomes the first one.
fn dos_time(time: Time) -> DateTime {
    let time = Timestamp::from(time).to_zoned(TimeZone::UTC);
    let part = |number: i8| u8::try_from(number).unwrap_or_default();
    let year = u16::try_from(time.year()).unwrap_or_default();
    let (month, day) = (part(time.month()), part(time.day()));
    DateTime::from_date_and_time(year, month, day, part(time.hour()), part(time.minute()), part(time.second()))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: &str, json: &str) -> Event {
        Event { id: id.into(), timestamp: String::new(), kind: String::new(), json: json.into() }
    }

    #[test]
    fn member_names_stay_inside_the_folder_that_an_archive_is_unpacked_into() {
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

    #[test]
    fn an_event_that_is_not_json_is_exported_as_it_is() {
        let (mut archive, mut chunks) = ArchiveWriter::new(Time::now());
        archive.add_event(&event("a", "{\"half\": ")).expect("added");
        archive.add_event(&event("b", "[1]")).expect("added");
        archive.finish().expect("finished");
        let chunk = chunks.blocking_recv().expect("one chunk");
        assert!(chunks.blocking_recv().is_none());
        let mut read = zip::ZipArchive::new(io::Cursor::new(chunk)).expect("an archive");
        for (name, text) in [("event_000000_a.json", "{\"half\": "), ("event_000001_b.json", "[\n  1\n]")] {
            let member = io::read_to_string(read.by_name(name).expect("a member")).expect("text");
            assert_eq!(member, text);
        }
    }

    /// Blocking on a runtime thread panics.
    #[tokio::test]
    async fn an_archive_that_is_dropped_sends_nothing_more_and_never_blocks() {
        let noise: Vec<u8> = (0..4 * u32::try_from(CHUNK).expect("a small number"))
            .map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        let (mut archive, mut chunks) = ArchiveWriter::new(Time::now());
        let writing = tokio::task::spawn_blocking(move || {
            archive.add("small", b"x").expect("added");
            archive
        });
        drop(writing.await.expect("written"));
        assert!(chunks.recv().await.is_none(), "no half of an archive");

        // The writer also finishes without a receiver.
        let (mut archive, chunks) = ArchiveWriter::new(Time::now());
        drop(chunks);
        let writing = tokio::task::spawn_blocking(move || {
            archive.add("large", &noise).expect("discarded");
            archive.finish()
        });
        writing.await.expect("ended").expect("discarded");
    }
}
