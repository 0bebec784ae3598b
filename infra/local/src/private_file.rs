//! File modes of the data folder: only its owner has access. The process's umask is not changed, because sandboxes inherit it, and
//! files in their workspaces have the modes that git and the agent choose.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

/// The permissions of the group and of others.
const OTHERS: u32 = 0o077;

/// Creates a folder and its missing parents with mode 0700. An existing folder becomes private.
///
/// # Errors
/// The folder cannot be created, or belongs to another user.
pub(crate) fn make_folder(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    make_private(path)
}

/// Removes all permissions of the group and of others from a file or a folder. A symbolic link is not changed.
pub(crate) fn make_private(path: &Path) -> io::Result<()> {
    let metadata = fs::symlink_metadata(path)?;
    let mode = metadata.permissions().mode() & 0o7777;
    if metadata.is_symlink() || mode & OTHERS == 0 {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(mode & !OTHERS))
}

/// Makes all files and folders below a folder private. Skips those that are removed meanwhile.
pub(crate) fn make_tree_private(folder: &Path) -> io::Result<()> {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in entries(&folder)? {
            skip_missing(make_private(&entry.path()))?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    Ok(())
}

/// Like [`make_private`], for entries that other programs may have created, such as a folder of the Docker daemon: skips entries that
/// belong to another user or are missing.
pub(crate) fn make_entry_private(path: &Path) -> io::Result<()> {
    match make_private(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            tracing::warn!(path = %path.display(), "local.foreign_file_skipped");
            Ok(())
        }
        done => skip_missing(done),
    }
}

/// Makes the files and folders in a folder private, but not the contents of those folders.
pub(crate) fn make_entries_private(folder: &Path) -> io::Result<()> {
    entries(folder)?.iter().try_for_each(|entry| make_entry_private(&entry.path()))
}

/// Makes the files in a folder private, but not its subfolders.
pub(crate) fn make_files_private(folder: &Path) -> io::Result<()> {
    for entry in entries(folder)? {
        if entry.file_type()?.is_file() {
            make_entry_private(&entry.path())?;
        }
    }
    Ok(())
}

/// Creates a file if it is missing, and makes it private.
pub(crate) fn ensure(path: &Path) -> io::Result<()> {
    OpenOptions::new().create(true).truncate(false).append(true).mode(0o600).open(path)?;
    make_private(path)
}

/// Writes a file atomically, with this mode even if the file had another one before.
pub fn write(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(".new");
    // A draft that remains after a crash may have any mode.
    skip_missing(fs::remove_file(&draft))?;
    let mut file = OpenOptions::new().create_new(true).write(true).mode(mode).open(&draft)?;
    file.write_all(contents)?;
    file.sync_all()?;
    fs::rename(&draft, path)
}

/// The entries of a folder; none if the folder does not exist.
pub(crate) fn entries(folder: &Path) -> io::Result<Vec<fs::DirEntry>> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn skip_missing(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn only_the_owners_permissions_stay() {
        let folder = tempfile::TempDir::new().unwrap();
        let (script, text) = (folder.path().join("script"), folder.path().join("text"));
        for (path, before) in [(&script, 0o755), (&text, 0o664)] {
            fs::write(path, "").unwrap();
            fs::set_permissions(path, Permissions::from_mode(before)).unwrap();
        }
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        make_folder(folder.path()).unwrap();
        make_tree_private(folder.path()).unwrap();
        assert_eq!([mode(folder.path()), mode(&script), mode(&text)], [0o700, 0o700, 0o600]);
    }

    #[test]
    fn the_mode_of_an_earlier_draft_is_not_kept() {
        let folder = tempfile::TempDir::new().unwrap();
        let (path, draft) = (folder.path().join("keys"), folder.path().join("keys.new"));
        for stale in [&path, &draft] {
            fs::write(stale, "old").unwrap();
            fs::set_permissions(stale, Permissions::from_mode(0o644)).unwrap();
        }
        write(&path, b"new", 0o600).unwrap();
        assert_eq!((fs::read(&path).unwrap().as_slice(), mode(&path)), (&b"new"[..], 0o600));
        assert!(!draft.exists());
    }
}
