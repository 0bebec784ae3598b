//! Files and folders of the data folder, for their owner alone. The process's umask stays as it is: sandboxes inherit it, and
//! what they make in their workspaces has the modes that git and the agent choose.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

/// Of the group and of everyone else.
const OTHERS: u32 = 0o077;

/// Makes a folder, and those above it that are missing, with mode 0700. One that is there becomes private, too.
///
/// # Errors
/// Those of the file system: it cannot be made, or it belongs to another user.
pub(crate) fn make_folder(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    make_private(path)
}

/// Takes a file's or folder's permissions from everyone but its owner. A symbolic link is left as it is.
///
/// # Errors
/// Those of the file system.
pub(crate) fn make_private(path: &Path) -> io::Result<()> {
    let metadata = fs::symlink_metadata(path)?;
    let mode = metadata.permissions().mode() & 0o7777;
    if metadata.is_symlink() || mode & OTHERS == 0 {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(mode & !OTHERS))
}

/// Makes everything below a folder private. What disappears meanwhile is skipped.
///
/// # Errors
/// Those of the file system.
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

/// As [`make_private`], for what may be there without being ours, such as a folder that the Docker daemon has made: what belongs to
/// another user stays as it is, and so does what has disappeared.
///
/// # Errors
/// Those of the file system.
pub(crate) fn make_entry_private(path: &Path) -> io::Result<()> {
    match make_private(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            tracing::warn!(path = %path.display(), "local.file_of_another_user");
            Ok(())
        }
        done => skip_missing(done),
    }
}

/// Makes the files and folders in a folder private, not what is in the folders.
///
/// # Errors
/// Those of the file system.
pub(crate) fn make_entries_private(folder: &Path) -> io::Result<()> {
    entries(folder)?.iter().try_for_each(|entry| make_entry_private(&entry.path()))
}

/// Makes the files in a folder private, not those in the folders below it.
///
/// # Errors
/// Those of the file system.
pub(crate) fn make_files_private(folder: &Path) -> io::Result<()> {
    for entry in entries(folder)? {
        if entry.file_type()?.is_file() {
            make_entry_private(&entry.path())?;
        }
    }
    Ok(())
}

/// Makes a file, if it is not there, and makes it private.
///
/// # Errors
/// Those of the file system.
pub(crate) fn ensure(path: &Path) -> io::Result<()> {
    OpenOptions::new().create(true).truncate(false).append(true).mode(0o600).open(path)?;
    make_private(path)
}

/// Writes a file whole or not at all, with this mode whatever it had before.
///
/// # Errors
/// Those of the file system.
pub fn write(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(".new");
    // One that a crash has left behind may have any mode.
    skip_missing(fs::remove_file(&draft))?;
    let mut file = OpenOptions::new().create_new(true).write(true).mode(mode).open(&draft)?;
    file.write_all(contents)?;
    file.sync_all()?;
    fs::rename(&draft, path)
}

/// None where there is no such folder.
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
    fn a_draft_of_an_earlier_run_lends_its_mode_to_nothing() {
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
