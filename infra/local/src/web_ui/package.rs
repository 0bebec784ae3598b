//! Downloads npm packages into the data folder and verifies their digests.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use axum::body::Bytes;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sha2::{Digest as _, Sha512};
use tokio::process::Command;

use super::{WebUiError, file_error};

/// The time limit of a download, for a registry that does not respond.
const FETCH_TIMEOUT: Duration = Duration::from_secs(300);
const UNPACK_TIMEOUT: Duration = Duration::from_secs(60);
/// The number of lines of npm's error output that an error quotes.
const QUOTED_LINES: usize = 4;
pub(super) const LICENSE: &str = "LICENSE";

/// An npm package that is served to browsers.
#[derive(Debug)]
pub(super) struct Package {
    /// A description, for the beginning of a sentence.
    pub(super) title: &'static str,
    pub(super) name: &'static str,
    pub(super) version: &'static str,
    /// The SHA-512 of the package in base64, as in the registry and in lockfiles.
    pub(super) integrity: &'static str,
    /// The folder of the package whose files are served.
    pub(super) served: &'static str,
    /// License files, which are served and written together with the other files.
    licenses: &'static [&'static str],
}

pub(super) const UI: Package = Package {
    title: "The web UI",
    name: "@openhands/agent-canvas",
    version: "1.20.0",
    integrity: "uq28bmdMapsDN0ltp5ZHYm9xfuk7cHktNkd0NY38w/UTq25wJTqSKSPya+2+ky0+HpGX2vmn0uF3mHuNCoOb2w==",
    served: "build",
    licenses: &[LICENSE],
};

/// The version has to be the one that [`UI`] loads from the CDN: otherwise [`Site::read`] fails.
pub(super) const EDITOR: Package = Package {
    title: "The editor of the web UI",
    name: "monaco-editor",
    version: "0.55.1",
    integrity: "jz4x+TJNFHwHtwuV9vA9rMujcZRb0CEilTEwG2rRSpe/A7Jdkuj8xPKttCgOh+v/lkHy7HsZ64oj+q3xoAFl9A==",
    served: "min/vs",
    licenses: &[LICENSE, "ThirdPartyNotices.txt"],
};

impl Package {
    /// The name of its folder in the data folder.
    pub(super) fn folder_name(&self) -> String {
        let name = self.name.rsplit('/').next().unwrap_or(self.name);
        let digest: String = self.integrity.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
        format!("{name}-{}-{digest}", self.version)
    }

    /// The license files, under names with which browsers show them as text.
    pub(super) fn licenses_from(&self, installed: &Path) -> Result<BTreeMap<String, Bytes>, WebUiError> {
        let read = |license: &&str| {
            let path = installed.join(license);
            let bytes = fs::read(&path).map_err(file_error(&path))?;
            Ok((format!("{}.txt", license.trim_end_matches(".txt")), bytes.into()))
        };
        self.licenses.iter().map(read).collect()
    }
}

/// Returns the folder of the package. Fetches the package first, if necessary.
pub(super) async fn install(package: &Package, folder: &Path) -> Result<PathBuf, WebUiError> {
    let installed = folder.join(package.folder_name());
    if !installed.is_dir() {
        tracing::info!("Fetching {} {} for the web UI.", package.name, package.version);
        fs::create_dir_all(folder).map_err(file_error(folder))?;
        // Removed when dropped, on success and on failure.
        let draft = tempfile::Builder::new().prefix("fetching-").tempdir_in(folder).map_err(file_error(folder))?;
        fetch(package, draft.path()).await?;
        let unpacked = draft.path().join("package");
        // The rename fails if another run was faster, because it does not replace a folder that is not empty.
        if let Err(source) = fs::rename(&unpacked, &installed)
            && !installed.is_dir()
        {
            return Err(WebUiError::File { path: installed, source });
        }
    }
    Ok(installed)
}

/// Downloads the package, and unpacks its served files and licenses into `package/` in this folder.
async fn fetch(package: &Package, folder: &Path) -> Result<(), WebUiError> {
    let what = package.title;
    let mut npm = Command::new("npm");
    npm.arg("pack").arg(format!("{}@{}", package.name, package.version)).arg("--pack-destination").arg(folder);
    // The package's scripts are not needed, so they are not executed.
    npm.args(["--ignore-scripts", "--loglevel=error", "--no-update-notifier", "--no-fund"]).current_dir(folder);
    let hint = "It is part of Node.js. Without --ui it is not needed.";
    run(what, "npm", hint, npm, FETCH_TIMEOUT).await?;
    let packed = fs::read_dir(folder)
        .map_err(file_error(folder))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "tgz"))
        .ok_or_else(|| WebUiError::Failed { what, program: "npm", output: "no package was written.".to_owned() })?;
    check_digest(package, &fs::read(&packed).map_err(file_error(&packed))?)?;
    let mut tar = Command::new("tar");
    tar.arg("-xzf").arg(&packed).arg("-C").arg(folder);
    tar.args(package.licenses.iter().chain([&package.served]).map(|member| format!("package/{member}")));
    run(what, "tar", "Every Linux distribution has a package for it.", tar, UNPACK_TIMEOUT).await
}

/// Compares the digest of a download with the pinned one.
fn check_digest(package: &Package, packed: &[u8]) -> Result<(), WebUiError> {
    let Package { name, version, integrity: expected, .. } = package;
    let found = BASE64_STANDARD.encode(Sha512::digest(packed));
    if found == *expected {
        Ok(())
    } else {
        Err(WebUiError::Digest { package: format!("{name} {version}"), expected, found })
    }
}

async fn run(
    what: &'static str,
    program: &'static str,
    hint: &'static str,
    mut command: Command,
    limit: Duration,
) -> Result<(), WebUiError> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let ended = tokio::time::timeout(limit, command.output());
    let output = match ended.await.map_err(|_| WebUiError::TooSlow { what, program, limit })? {
        Ok(output) => output,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(WebUiError::Missing { what, program, hint });
        }
        Err(error) => return Err(WebUiError::Failed { what, program, output: format!("{error}.") }),
    };
    if output.status.success() {
        Ok(())
    } else {
        Err(WebUiError::Failed { what, program, output: beginning_of(&output) })
    }
}

/// The beginning of a program's error output, in one line: npm first prints the error, and then general advice.
fn beginning_of(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let lines = text.lines().map(|line| line.trim().trim_start_matches("npm error").trim());
    let lines: Vec<&str> = lines.filter(|line| !line.is_empty()).take(QUOTED_LINES).collect();
    if lines.is_empty() { format!("{}.", output.status) } else { format!("{}.", lines.join(" ").trim_end_matches('.')) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_pinned_package_is_used() {
        for package in [&UI, &EDITOR] {
            let error = check_digest(package, b"something else").unwrap_err().to_string();
            let names = error.contains(package.name) && error.contains(package.integrity);
            assert!(names && error.contains("It was discarded"), "{error}");
        }
        let limit = Duration::from_secs(5);
        let missing = run(UI.title, "npm", "Get it.", Command::new("no-such-program-here"), limit).await;
        let missing = missing.unwrap_err().to_string();
        assert_eq!(missing, "The web UI is fetched with npm, which is not on PATH. Get it.");
        let mut fails = Command::new("sh");
        fails.args(["-c", "echo npm error first >&2; echo second >&2; exit 1"]);
        let failed = run(EDITOR.title, "npm", "", fails, limit).await.unwrap_err().to_string();
        assert_eq!(failed, "The editor of the web UI could not be fetched: npm reports: first second.");
        let mut hangs = Command::new("sleep");
        hangs.arg("60");
        let slow = run(UI.title, "npm", "", hangs, Duration::from_millis(10)).await.unwrap_err();
        assert!(matches!(slow, WebUiError::TooSlow { .. }), "{slow}");
    }
}
