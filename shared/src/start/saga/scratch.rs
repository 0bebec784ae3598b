//! A temporary folder in which tests run the scripts of the start saga, with real shells and a real git.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Shells that images use as `/bin/sh`, if they are installed on this machine.
pub(super) fn shells() -> Vec<PathBuf> {
    let mut shells: Vec<PathBuf> =
        ["/bin/sh", "/bin/dash", "/bin/bash"].into_iter().flat_map(fs::canonicalize).collect();
    shells.sort();
    shells.dedup();
    shells
}

/// A temporary folder with a home folder in it. Drop removes it.
pub(super) struct Scratch {
    folder: PathBuf,
    shell: PathBuf,
}

impl Scratch {
    /// Uses `/bin/sh`.
    pub(super) fn new() -> Self {
        Self::with(Path::new("/bin/sh"))
    }

    /// Uses the given shell as `sh`.
    pub(super) fn with(shell: &Path) -> Self {
        let folder = std::env::temp_dir().join(crate::id::new_sandbox_id());
        for name in ["bin", "home"] {
            fs::create_dir_all(folder.join(name)).expect("a folder");
        }
        symlink(shell, folder.join("bin/sh")).expect("a link");
        let folder = folder.canonicalize().expect("the folder");
        Self { folder, shell: shell.to_owned() }
    }

    pub(super) fn at(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub(super) fn path(&self, name: &str) -> String {
        self.at(name).display().to_string()
    }

    pub(super) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let file = self.at(name);
        fs::create_dir_all(file.parent().expect("a folder")).expect("a folder");
        fs::write(file, content).expect("written");
    }

    pub(super) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap_or_default()
    }

    pub(super) fn set_mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.at(name), fs::Permissions::from_mode(mode)).expect("a mode");
    }

    pub(super) fn mode(&self, name: &str) -> u32 {
        fs::symlink_metadata(self.at(name)).expect("a file").permissions().mode() & 0o7777
    }

    /// A command that runs this script. Of the test's environment it inherits only PATH.
    pub(super) fn command(&self, script: &str) -> Command {
        let mut command = Command::new(self.at("bin/sh"));
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .args(["-c", script])
            .current_dir(&self.folder)
            .env_clear()
            .env("PATH", format!("{}:{path}", self.path("bin")))
            .env("HOME", self.path("home"))
            .env("TMPDIR", self.path("tmp"))
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        for role in ["AUTHOR", "COMMITTER"] {
            command.env(format!("GIT_{role}_NAME"), "Tests").env(format!("GIT_{role}_EMAIL"), "tests@example.com");
        }
        fs::create_dir_all(self.at("tmp")).expect("a folder");
        command
    }

    pub(super) fn run(&self, script: &str) -> Ran {
        let ran = self.command(script).output().expect("a shell");
        Ran::new(&ran, &self.shell)
    }

    /// Runs a script that must succeed, and returns its output.
    #[track_caller]
    pub(super) fn must(&self, script: &str) -> String {
        let ran = self.run(script);
        assert_eq!(ran.code, Some(0), "{script}: {ran:?}");
        ran.stdout
    }

    /// The output of `git status`, and the mode of each file and folder in the working tree.
    pub(super) fn tree(&self, clone: &str) -> String {
        let mut lines = vec![self.must(&format!("git -C {} status --porcelain --ignored", self.path(clone)))];
        let mut folders = vec![clone.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(self.at(&folder)).expect("a folder").flatten() {
                let name = format!("{folder}/{}", entry.file_name().display());
                if entry.file_name() == ".git" {
                    continue;
                }
                lines.push(format!("{} {:o}", &name[clone.len()..], self.mode(&name)));
                if entry.file_type().expect("a type").is_dir() {
                    folders.push(name);
                }
            }
        }
        lines[1..].sort();
        lines.join("\n")
    }

    /// The remaining temporary files.
    pub(super) fn left(&self) -> Vec<PathBuf> {
        fs::read_dir(self.at("tmp")).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Remaining files in the temporary folder do no harm.
        let _removed = fs::remove_dir_all(&self.folder);
    }
}

/// The result of a script.
#[derive(Debug)]
pub(super) struct Ran {
    pub(super) code: Option<i32>,
    pub(super) stdout: String,
    pub(super) stderr: String,
    /// The shell, shown in failures.
    #[expect(dead_code, reason = "shown by Debug")]
    shell: PathBuf,
}

impl Ran {
    fn new(output: &Output, shell: &Path) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            code: output.status.code(),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
            shell: shell.to_owned(),
        }
    }
}
