//! A zip archive, written front to back and given away as it grows.
//!
//! Libraries keep the directory of the whole archive in memory until its end, and cannot stop in one process and go on in
//! another. Here both are the caller's to take: what is held is what was added since.

use std::io::{self, BufWriter, Write};
use std::mem::take;

use flate2::write::DeflateEncoder;
use flate2::{Compression, Crc};
use jiff::Timestamp;

use crate::clock::Time;

const LOCAL_HEADER: u32 = 0x0403_4b50;
const DIRECTORY_HEADER: u32 = 0x0201_4b50;
const END: u32 = 0x0605_4b50;
const END_64: u32 = 0x0606_4b50;
const END_64_LOCATOR: u32 = 0x0706_4b50;

/// Fields of this width say "look at the 64-bit record" when all their bits are set.
const NARROW: u64 = 0xffff_ffff;
const FEW: u64 = 0xffff;

const DEFLATED: u16 = 8;
const VERSION_NEEDED: u16 = 20;
const VERSION_NEEDED_64: u16 = 45;
/// Unix, so that the mode counts.
const MADE_BY: u16 = (3 << 8) | VERSION_NEEDED_64;
/// A regular file, `rw-r--r--`.
const MODE: u32 = 0o100_644 << 16;

/// Writes members; see the module.
#[derive(Debug)]
pub struct ZipWriter {
    /// Date and time of all members, in the form of MS-DOS.
    modified: (u16, u16),
    /// Bytes of the archive that were taken.
    taken: u64,
    members: u64,
    body: Vec<u8>,
    directory: Vec<u8>,
    deflater: DeflateEncoder<Vec<u8>>,
    spare: Vec<u8>,
}

impl ZipWriter {
    /// A new archive whose members were all changed at `modified`, which is written in UTC and even seconds.
    #[must_use]
    pub fn new(modified: Time) -> Self {
        Self::going_on(modified, 0, 0)
    }

    /// Goes on with an archive of which so many bytes and members were taken already.
    #[must_use]
    pub fn going_on(modified: Time, taken: u64, members: u64) -> Self {
        Self {
            modified: dos_time(modified),
            taken,
            members,
            body: Vec::new(),
            directory: Vec::new(),
            deflater: DeflateEncoder::new(Vec::new(), Compression::default()),
            spare: Vec::new(),
        }
    }

    /// Adds a member. Its name must be ASCII, not begin with `/`, and not be longer than 65,535 bytes.
    ///
    /// # Errors
    /// What `content` fails with, or a member of 4 GiB and more. Nothing is added then.
    pub fn add(&mut self, name: &str, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
        let mut member = BufWriter::new(Member { deflater: &mut self.deflater, crc: Crc::new(), length: 0 });
        let written = content(&mut member).and_then(|()| member.flush());
        let (crc, length) = (member.get_ref().crc.sum(), member.get_ref().length);
        // What a failed member left in the buffer must not reach the next one.
        let _discarded = member.into_parts();
        let mut packed = self.deflater.reset(take(&mut self.spare))?;
        written?;
        let too_large = |_| io::Error::new(io::ErrorKind::InvalidData, "a member is larger than 4 GiB");
        let (length, packed_length) =
            (u32::try_from(length).map_err(too_large)?, u32::try_from(packed.len()).map_err(too_large)?);
        let name_length = u16::try_from(name.len()).map_err(|_| io::Error::other("a member's name is too long"))?;
        let offset = self.len();
        let is_far = offset >= NARROW;
        let needed = if is_far { VERSION_NEEDED_64 } else { VERSION_NEEDED };

        let mut common = Vec::with_capacity(24);
        for field in [0, DEFLATED, self.modified.1, self.modified.0] {
            common.extend(u16::to_le_bytes(field));
        }
        for field in [crc, packed_length, length] {
            common.extend(u32::to_le_bytes(field));
        }
        common.extend(name_length.to_le_bytes());

        self.body.extend(LOCAL_HEADER.to_le_bytes());
        self.body.extend(VERSION_NEEDED.to_le_bytes());
        self.body.extend(&common);
        self.body.extend(0_u16.to_le_bytes());
        self.body.extend(name.as_bytes());
        self.body.extend(&packed);

        self.directory.extend(DIRECTORY_HEADER.to_le_bytes());
        self.directory.extend(MADE_BY.to_le_bytes());
        self.directory.extend(needed.to_le_bytes());
        self.directory.extend(&common);
        self.directory.extend(if is_far { 12_u16 } else { 0 }.to_le_bytes());
        // No comment, on the first disk, no internal attributes.
        self.directory.extend([0; 6]);
        self.directory.extend(MODE.to_le_bytes());
        self.directory.extend(low_u32(offset).to_le_bytes());
        self.directory.extend(name.as_bytes());
        if is_far {
            self.directory.extend(1_u16.to_le_bytes());
            self.directory.extend(8_u16.to_le_bytes());
            self.directory.extend(offset.to_le_bytes());
        }
        self.members += 1;
        packed.clear();
        self.spare = packed;
        Ok(())
    }

    /// Bytes of the archive so far, without its directory.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.taken + self.body.len() as u64
    }

    /// Whether nothing has been added.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Members so far.
    #[must_use]
    pub fn members(&self) -> u64 {
        self.members
    }

    /// Bytes that can be taken.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.body.len()
    }

    /// Takes the bytes that have not been taken; the archive goes on behind them.
    #[must_use]
    pub fn take_body(&mut self) -> Vec<u8> {
        self.taken = self.len();
        take(&mut self.body)
    }

    /// Takes the piece of the directory that has not been taken. All pieces, in order, follow the last member.
    #[must_use]
    pub fn take_directory(&mut self) -> Vec<u8> {
        take(&mut self.directory)
    }

    /// What follows the directory.
    #[must_use]
    pub fn end(&self, directory_length: u64) -> Vec<u8> {
        let directory_offset = self.len();
        let mut end = Vec::new();
        if self.members >= FEW || directory_offset >= NARROW || directory_length >= NARROW {
            end.extend(END_64.to_le_bytes());
            end.extend(44_u64.to_le_bytes());
            end.extend(MADE_BY.to_le_bytes());
            end.extend(VERSION_NEEDED_64.to_le_bytes());
            end.extend([0; 8]);
            for field in [self.members, self.members, directory_length, directory_offset] {
                end.extend(field.to_le_bytes());
            }
            end.extend(END_64_LOCATOR.to_le_bytes());
            end.extend(0_u32.to_le_bytes());
            end.extend((directory_offset + directory_length).to_le_bytes());
            end.extend(1_u32.to_le_bytes());
        }
        end.extend(END.to_le_bytes());
        end.extend([0; 4]);
        let members = u16::try_from(self.members).unwrap_or(u16::MAX);
        end.extend(members.to_le_bytes());
        end.extend(members.to_le_bytes());
        end.extend(low_u32(directory_length).to_le_bytes());
        end.extend(low_u32(directory_offset).to_le_bytes());
        end.extend(0_u16.to_le_bytes());
        end
    }
}

/// The number, or all bits set where it has no room.
fn low_u32(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

struct Member<'a> {
    deflater: &'a mut DeflateEncoder<Vec<u8>>,
    crc: Crc,
    length: u64,
}

impl Write for Member<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.deflater.write_all(bytes)?;
        self.crc.update(bytes);
        self.length += bytes.len() as u64;
        Ok(bytes.len())
    }

    /// A flush of the deflater would cost compression.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// MS-DOS counts from 1980 to 2107, in steps of two seconds.
fn dos_time(time: Time) -> (u16, u16) {
    let time = Timestamp::from(time).to_zoned(jiff::tz::TimeZone::UTC);
    let part = |number: i8| u16::try_from(number).unwrap_or_default();
    let year = u16::try_from((time.year() - 1980).clamp(0, 127)).unwrap_or_default();
    let date = (year << 9) | (part(time.month()) << 5) | part(time.day());
    (date, (part(time.hour()) << 11) | (part(time.minute()) << 5) | (part(time.second()) / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_fails_leaves_nothing_behind() {
        let mut zip = ZipWriter::new(Time::now());
        zip.add("a", |out| out.write_all(b"first")).expect("added");
        let before = (zip.body.clone(), zip.directory.clone(), zip.members());
        let failed = zip.add("b", |out| {
            out.write_all(&vec![7; 100_000])?;
            Err(io::Error::other("no"))
        });
        assert!(failed.is_err());
        assert_eq!((zip.body.clone(), zip.directory.clone(), zip.members()), before);
        zip.add("a", |out| out.write_all(b"first")).expect("added");
        assert_eq!(zip.body[..before.0.len()], before.0);
        assert_eq!(zip.body[before.0.len()..], before.0, "the same member again");
    }

    #[test]
    fn what_was_taken_and_gone_on_with_is_the_same_archive() {
        let time = Time::now();
        let whole = {
            let mut zip = ZipWriter::new(time);
            for name in ["a", "b"] {
                zip.add(name, |out| out.write_all(name.as_bytes())).expect("added");
            }
            let (body, directory) = (zip.take_body(), zip.take_directory());
            let end = zip.end(directory.len() as u64);
            [body, directory, end].concat()
        };
        let mut first = ZipWriter::new(time);
        first.add("a", |out| out.write_all(b"a")).expect("added");
        let (body, directory) = (first.take_body(), first.take_directory());
        let mut second = ZipWriter::going_on(time, first.len(), first.members());
        second.add("b", |out| out.write_all(b"b")).expect("added");
        let (more_body, more_directory) = (second.take_body(), second.take_directory());
        let directory = [directory, more_directory].concat();
        let end = second.end(directory.len() as u64);
        assert_eq!([body, more_body, directory, end].concat(), whole);
    }

    #[test]
    fn far_members_and_many_members_use_64_bits() {
        let mut zip = ZipWriter::going_on(Time::now(), 5 << 30, 70_000);
        zip.add("far", |out| out.write_all(b"x")).expect("added");
        let directory = zip.take_directory();
        assert_eq!(directory[42..46], [0xff; 4]);
        assert_eq!(directory[46 + 3..], [&[1, 0, 8, 0][..], &(5_u64 << 30).to_le_bytes()].concat());
        let end = zip.end(directory.len() as u64);
        assert_eq!(end.len(), 56 + 20 + 22);
        assert_eq!(end[32..40], 70_001_u64.to_le_bytes());
        assert_eq!(ZipWriter::new(Time::now()).end(0).len(), 22);
    }
}
