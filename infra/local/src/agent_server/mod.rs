//! The agent server that process sandboxes run: finds a Python ([`find_python`]), installs a pinned version of the agent server
//! into a virtual environment, and returns the interpreter that starts it.
//!
//! The files in the install folder:
//!
//! ```text
//! agent-server-install.lock                 locked during an install
//! agent-server-install.log                  output of the last install
//! agent-server-<version>-py<X.Y>-<hash>/    hash of the requirements and constraints
//!     venv-<random>/                        one per attempt
//!     complete                              written last: the name of the finished attempt
//! ```
//!
//! Each attempt has a folder of its own: an installer that outlives its killed parent continues to write for a while, and must
//! not write into the folder of the next attempt.

mod install;
mod progress;
mod python;

use std::path::{Path, PathBuf};

use self::install::InstallSpec;
pub use self::install::{Cause, InstallError, install};
pub use self::progress::{Event, Progress, Terminal};
pub use self::python::{Python, PythonError, PythonVersion, Rejection, find_python};

/// An installed agent server. Sandboxes run `<python> -m openhands.agent_server --host … --port …`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentServer {
    /// The interpreter of the virtual environment, an absolute path.
    pub python: PathBuf,
    pub version: String,
}

/// Returns the installed agent server of this version, for any Python; `None` if it is not installed. Runs no process and needs
/// no network: it only checks that the install is complete and that its interpreter still exists.
#[must_use]
pub fn installed(folder: &Path, version: &str) -> Option<AgentServer> {
    InstallSpec::of(version).find_complete(&std::path::absolute(folder).ok()?)
}

/// Why [`ensure`] failed.
#[derive(Debug, thiserror::Error)]
pub enum EnsureError {
    #[error(transparent)]
    Python(#[from] PythonError),
    #[error(transparent)]
    Install(#[from] InstallError),
}

/// Returns the installed agent server of this version, or installs it with the `wanted` Python or one that is found. A `wanted`
/// Python is checked, and used, even if the agent server is installed for another one.
///
/// # Errors
/// Those of [`find_python`] and [`install`].
pub async fn ensure(
    folder: &Path,
    version: &str,
    wanted: Option<&Path>,
    progress: impl Progress,
) -> Result<AgentServer, EnsureError> {
    if wanted.is_none()
        && let Some(server) = installed(folder, version)
    {
        progress.report(Event::Done);
        return Ok(server);
    }
    progress.report(Event::Searching);
    let python = find_python(wanted).await?;
    progress.report(Event::Found(python.clone()));
    Ok(install(folder, version, &python, progress).await?)
}
