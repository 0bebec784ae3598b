//! The import commands of `cargo local`.

use std::path::{Path, PathBuf};

use super::jsonl::JsonLines;
use super::openhands::DataFolder;
use super::progress::Progress;
use super::{End, Entry, ImportError, Importer, Pace, Skip};
use crate::options::TargetOptions;
use crate::target::Target;

/// Imports files of JSON lines and prints the summary. Returns whether all rows are now in the target.
///
/// # Errors
/// The target or a file could not be opened, and nothing was imported.
pub async fn import(
    files: &[PathBuf],
    into: &TargetOptions,
    data: &Path,
    stop: impl Future<Output = ()>,
) -> Result<bool, ImportError> {
    let lines = JsonLines::open(files, into.default_owner()?)?;
    let total = lines.total();
    run(lines, total, into, data, stop).await
}

/// Imports the data folder of an OpenHands app server and prints the summary. Returns whether all rows are now in the target.
///
/// # Errors
/// The target or the folder could not be opened, and nothing was imported.
pub async fn import_openhands(
    folder: &Path,
    into: &TargetOptions,
    data: &Path,
    stop: impl Future<Output = ()>,
) -> Result<bool, ImportError> {
    let folder = DataFolder::open(folder, into.default_owner()?)?;
    let total = folder.total();
    run(folder, total, into, data, stop).await
}

async fn run(
    entries: impl Iterator<Item = Result<Entry, Skip>> + Send + 'static,
    total: u64,
    into: &TargetOptions,
    data: &Path,
    stop: impl Future<Output = ()>,
) -> Result<bool, ImportError> {
    let target = Target::open(into, data).await?;
    let pace = if target.is_data_folder() { Pace::EMBEDDED } else { Pace::AWS };
    let importer = Importer::new(&target.aws, &target.names, pace);
    let mut progress = Progress::new(total);
    let (summary, end) = importer.run(entries, stop, |summary| progress.report(summary.settled())).await;
    progress.finish();
    target.close().await;
    print!("{summary}");
    match end {
        End::Complete => Ok(summary.skipped.is_empty()),
        End::Stopped => {
            eprintln!("Stopped. Run the same command again to import the remaining rows.");
            Ok(false)
        }
        End::Failed(error) => {
            eprintln!(
                "A write failed: {}\nThe rows counted above are stored. Run the same command again to import the others.",
                error.context()
            );
            Ok(false)
        }
    }
}
