//! Versions of data folders: reads the version of a folder, and migrates an older one to the present layout when it is opened.
//!
//! The version of a folder is `user_version` in its SQLite file, so that data and version are replaced by one rename. The file
//! `schema-version` repeats it for people and for programs that do not open the database. Folders of version 1 have neither.
//!
//! A migration never changes the database of the folder. It copies it to `dynamodb.sqlite.before-N`, builds the new database in
//! `dynamodb.sqlite.migrating`, and renames that over the old one. A migration that was interrupted, at any point, starts again from the
//! unchanged database when the folder is opened next. The copy stays afterwards, so that its owner can go back.
//!
//! A [`Step`] converts the items of one version to the next one. Tables whose definition has changed, and those that a step names, are
//! rebuilt from converted items; the others, above all the events, stay as they are in the copied file.

mod database;
mod step;
#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tests")]
mod tests;
mod version_2;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use self::database::{build, changed_tables, settle};
use self::step::{STEPS, Step};
use crate::engines::EngineError;
use crate::import::progress::Progress;
use crate::private_file;

/// The file that states the version of a data folder.
const VERSION_FILE: &str = "schema-version";
/// The SQLite file of a data folder.
pub(crate) const DATABASE: &str = "dynamodb.sqlite";
/// The suffix of the database that a migration builds.
const DRAFT: &str = ".migrating";
/// The version of folders without a version, if their tables are those of this version.
const FIRST: u32 = 1;
/// The free space in bytes that a migration needs besides the copies of the database.
const SPARE_BYTES: u64 = 32 * 1024 * 1024;
/// The most copies of earlier migrations that are kept beside a new one. The oldest is replaced after that.
const MAX_COPIES: usize = 100;
/// A migration that takes longer than this reports its progress.
const QUIET: Duration = Duration::from_secs(2);

/// The error of a step of the migration; it becomes a part of a sentence.
type Result<T, E = String> = std::result::Result<T, E>;

/// The state of a migration, for its observer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reached {
    /// The database is being copied.
    Copying,
    /// The copy is complete.
    Copied,
    /// Rows that are read, of the total.
    Rows(u64, u64),
    /// The new database is complete, and not yet in place.
    Built,
    /// The new database is in place; the file with the version is not written.
    InPlace,
}

/// Prepares the database of a data folder for the present layout: creates a missing one, migrates an older one. The caller holds the
/// folder's lock.
///
/// # Errors
/// The folder is newer than this program, older than the oldest version that can be migrated, or a migration failed. The database is
/// unchanged then.
pub(crate) fn prepare(data: &Path) -> Result<(), EngineError> {
    let mut shown = Shown::new(data);
    prepare_with(data, &STEPS, &mut |reached| shown.show(reached))
}

/// Refuses a data folder that is newer than this program. It reads only the file `schema-version`, so it also works while another process
/// has the folder open.
///
/// # Errors
/// [`EngineError::Newer`], [`EngineError::Version`].
pub(crate) fn refuse_newer(data: &Path) -> Result<(), EngineError> {
    stated_version(data).map(|_| ())
}

fn prepare_with(data: &Path, steps: &[Step], observe: &mut dyn FnMut(Reached)) -> Result<(), EngineError> {
    let stated = stated_version(data)?;
    let file = data.join(DATABASE);
    let found = match is_missing(&file).map_err(|source| EngineError::folder(&file, source))? {
        true => {
            // SQLite creates its log and its shared memory with the mode of the database.
            private_file::ensure(&file).map_err(|source| EngineError::folder(&file, source))?;
            database::set_version(&file, schema::VERSION)?;
            schema::VERSION
        }
        false => version(data, &file)?,
    };
    if found > schema::VERSION {
        return Err(newer(data, found));
    }
    if found < schema::VERSION {
        let failed = |reason| EngineError::Migration { path: data.to_owned(), reason };
        let copy = migrate(data, found, steps, observe).map_err(failed)?;
        observe(Reached::InPlace);
        eprintln!(
            "The data folder {} now has version {}. The database before that is kept as {}; delete it when you no longer need to go back.",
            data.display(),
            schema::VERSION,
            copy.display()
        );
    } else {
        remove_draft(&draft_of(&file)).map_err(|source| EngineError::folder(&file, source))?;
    }
    if stated != Some(schema::VERSION) {
        let path = data.join(VERSION_FILE);
        private_file::write(&path, format!("{}\n", schema::VERSION).as_bytes(), 0o600)
            .map_err(|source| EngineError::folder(&path, source))?;
    }
    Ok(())
}

/// The version in the file `schema-version`, if there is one.
fn stated_version(data: &Path) -> Result<Option<u32>, EngineError> {
    let path = data.join(VERSION_FILE);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(EngineError::folder(&path, source)),
    };
    match text.trim().parse() {
        Ok(version) if version > schema::VERSION => Err(newer(data, version)),
        Ok(version) => Ok(Some(version)),
        Err(_) => Err(EngineError::Version { path }),
    }
}

fn newer(data: &Path, found: u32) -> EngineError {
    EngineError::Newer { path: data.to_owned(), found, supported: schema::VERSION }
}

/// Whether there is no database: no file, or an empty one, which a first start leaves that was killed.
fn is_missing(file: &Path) -> io::Result<bool> {
    let length = |path: &Path| match fs::metadata(path) {
        Ok(metadata) => Ok(metadata.len()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    };
    Ok(length(file)? == 0 && length(&with_suffix(file, "-wal"))? == 0)
}

/// The version of an existing database.
fn version(data: &Path, file: &Path) -> Result<u32, EngineError> {
    let database::Found { version, tables } = database::inspect(file)?;
    if version > 0 {
        return Ok(version);
    }
    if tables.is_empty() {
        // The first start was killed before it created a table.
        database::set_version(file, schema::VERSION)?;
        return Ok(schema::VERSION);
    }
    match step::missing_in_version_1(&tables) {
        Some(missing) => Err(EngineError::TooOld { path: data.to_owned(), missing }),
        None => Ok(FIRST),
    }
}

/// Migrates the database, and returns the path of the copy.
fn migrate(data: &Path, from: u32, steps: &[Step], observe: &mut dyn FnMut(Reached)) -> Result<PathBuf> {
    let file = data.join(DATABASE);
    let draft = draft_of(&file);
    eprintln!("Migrating the data folder {} from version {from} to version {}.", data.display(), schema::VERSION);
    settle(&file)?;
    check_space(data, &file)?;
    observe(Reached::Copying);
    let copy = copy_database(&file, &draft)?;
    observe(Reached::Copied);
    let mut steps: Vec<_> =
        steps.iter().filter(|step| step.to > from && step.to <= schema::VERSION).map(Step::begin).collect();
    let tables = changed_tables(&draft, &steps)?;
    build(&file, &draft, &tables, &mut steps, &mut |read, total| observe(Reached::Rows(read, total)))?;
    settle(&file)?;
    database::set_version(&draft, schema::VERSION).map_err(|error| error.to_string())?;
    settle(&draft)?;
    sync(&draft)?;
    observe(Reached::Built);
    // SQLite would apply the log of the old database to the new one.
    if fs::metadata(with_suffix(&file, "-wal")).is_ok_and(|log| log.len() > 0) {
        return Err(format!("another program has {} open", file.display()));
    }
    fs::rename(&draft, &file).map_err(at(&file))?;
    sync(data)?;
    Ok(copy)
}

/// Copies the database twice: to the copy that is kept, whose path is returned, and to the draft.
///
/// The draft is created first. It shows that a copy without a migrated database was made by an interrupted migration, and may be replaced.
fn copy_database(file: &Path, draft: &Path) -> Result<PathBuf> {
    let was_interrupted = draft.exists();
    remove_draft(draft).map_err(at(draft))?;
    create_private(draft)?;
    let kept = with_suffix(file, &format!(".before-{}", schema::VERSION));
    let free = |number: usize| match number {
        1 => kept.clone(),
        _ => with_suffix(&kept, &format!(".{number}")),
    };
    let copy = match was_interrupted {
        true => kept.clone(),
        false => (1..=MAX_COPIES).map(free).find(|path| !path.exists()).unwrap_or_else(|| kept.clone()),
    };
    let unfinished = with_suffix(&copy, ".new");
    copy_private(file, &unfinished)?;
    sync(&unfinished)?;
    fs::rename(&unfinished, &copy).map_err(at(&copy))?;
    copy_private(file, draft)?;
    Ok(copy)
}

/// Checks that the disk has space for the copy, the draft, and the growth of the draft while its tables are rebuilt.
fn check_space(data: &Path, file: &Path) -> Result<()> {
    let size = fs::metadata(file).map_err(at(file))?.len();
    let disk = rustix::fs::statvfs(data).map_err(|error| at(data)(error.into()))?;
    enough_space(size, disk.f_bavail.saturating_mul(disk.f_frsize))
}

fn enough_space(size: u64, free: u64) -> Result<()> {
    let needed = size.saturating_mul(3).saturating_add(SPARE_BYTES);
    if free >= needed {
        return Ok(());
    }
    let [needed, free] = [needed, free].map(|bytes| bytes / (1024 * 1024));
    Err(format!("the disk has {free} MiB free, and the migration needs {needed} MiB"))
}

fn draft_of(file: &Path) -> PathBuf {
    with_suffix(file, DRAFT)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut text = path.as_os_str().to_owned();
    text.push(suffix);
    text.into()
}

/// Removes the database of an interrupted migration.
fn remove_draft(draft: &Path) -> io::Result<()> {
    for suffix in ["-wal", "-shm", "-journal", ""] {
        match fs::remove_file(with_suffix(draft, suffix)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Copies a file; only its owner can read the copy.
fn copy_private(from: &Path, to: &Path) -> Result<()> {
    create_private(to)?;
    fs::copy(from, to).map_err(at(to))?;
    // The copy has got the mode of the original.
    private_file::make_private(to).map_err(at(to))
}

fn create_private(path: &Path) -> Result<()> {
    private_file::ensure(path).map_err(at(path))
}

/// Waits until a file, or the entries of a folder, are on the disk.
fn sync(path: &Path) -> Result<()> {
    let file = if path.is_dir() { File::open(path) } else { OpenOptions::new().write(true).open(path) };
    file.and_then(|file| file.sync_all()).map_err(at(path))
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> String {
    move |error| format!("{}: {error}", path.display())
}

/// Shows the progress of a long migration on standard error.
struct Shown<'a> {
    data: &'a Path,
    since: Instant,
    progress: Option<Progress>,
}

impl<'a> Shown<'a> {
    fn new(data: &'a Path) -> Self {
        Self { data, since: Instant::now(), progress: None }
    }

    fn show(&mut self, reached: Reached) {
        match reached {
            Reached::Copying => self.since = Instant::now(),
            Reached::Rows(read, total) => {
                if self.progress.is_none() && self.since.elapsed() >= QUIET {
                    self.progress = Some(Progress::new(total));
                }
                if let Some(progress) = &mut self.progress {
                    progress.report(read);
                }
            }
            Reached::Built => {
                if let Some(progress) = self.progress.take() {
                    progress.finish();
                }
            }
            Reached::Copied => tracing::debug!(data = %self.data.display(), "migration.copied"),
            Reached::InPlace => {
                tracing::info!(data = %self.data.display(), version = schema::VERSION, "migration.done");
            }
        }
    }
}
