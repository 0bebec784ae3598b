//! The import commands of `cargo local`.

use std::path::{Path, PathBuf};

use super::jsonl::JsonLines;
use super::openhands::DataFolder;
use super::progress::Progress;
use super::target::{Target, default_owner};
use super::{End, Entry, ImportError, Skip};
use crate::options::PlaceOptions;

/// Imports files of JSON lines into what the options say, or into the data folder. Answers whether all rows are there now;
/// the summary is printed.
///
/// # Errors
/// Nothing was imported; the text says why.
pub async fn import(
    files: &[PathBuf],
    into: &PlaceOptions,
    data: &Path,
    stop: impl Future<Output = ()>,
) -> Result<bool, ImportError> {
    let lines = JsonLines::open(files, default_owner(into)?)?;
    let total = lines.total();
    run(lines, total, into, data, stop).await
}

/// Imports the data folder of an OpenHands app server, likewise.
///
/// # Errors
/// Nothing was imported; the text says why.
pub async fn import_openhands(
    folder: &Path,
    into: &PlaceOptions,
    data: &Path,
    stop: impl Future<Output = ()>,
) -> Result<bool, ImportError> {
    let folder = DataFolder::open(folder, default_owner(into)?)?;
    let total = folder.total();
    run(folder, total, into, data, stop).await
}

async fn run(
    entries: impl Iterator<Item = Result<Entry, Skip>> + Send + 'static,
    total: u64,
    into: &PlaceOptions,
    data: &Path,
    stop: impl Future<Output = ()>,
) -> Result<bool, ImportError> {
    let target = Target::open(into, data).await?;
    let mut progress = Progress::new(total);
    let (summary, end) = target.importer.run(entries, stop, |summary| progress.tell(summary.settled())).await;
    progress.end();
    target.close().await;
    print!("{summary}");
    match end {
        End::Complete => Ok(summary.skipped.is_empty()),
        End::Stopped => {
            eprintln!("Stopped: the same command goes on where this one ended.");
            Ok(false)
        }
        End::Failed(error) => {
            eprintln!(
                "A write failed: {}\nWhat is counted above is stored; the same command goes on from there.",
                error.context()
            );
            Ok(false)
        }
    }
}
