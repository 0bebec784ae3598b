//! Finds a Python interpreter that can run the agent server.

use std::collections::HashSet;
use std::env;
use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;
use std::time::Duration;

use tokio::process::Command;

const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
const OLDEST: PythonVersion = PythonVersion::new(3, 12, 0);
/// Minor versions that the constraints are tested with, in order of preference.
const TESTED_MINORS: [u32; 2] = [12, 13];
/// Minor versions that are searched for on PATH if no tested version is found.
const NEWER_MINORS: std::ops::RangeInclusive<u32> = 14..=19;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PythonVersion {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

impl PythonVersion {
    const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    fn is_tested(self) -> bool {
        self.major == 3 && TESTED_MINORS.contains(&self.minor)
    }

    /// Sort key: tested versions first, then by minor version, then the newest patch first.
    pub(super) fn rank(self) -> (usize, u32, u32, std::cmp::Reverse<u32>) {
        let tested = TESTED_MINORS.iter().position(|minor| *minor == self.minor);
        let preference = match tested {
            Some(index) if self.major == 3 => index,
            _ => TESTED_MINORS.len(),
        };
        (preference, self.major, self.minor, std::cmp::Reverse(self.patch))
    }
}

impl fmt::Display for PythonVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl FromStr for PythonVersion {
    type Err = ();

    /// Parses `3.12.1`, `3.12`, `Python 3.13.0rc1`, `cpython-3.12.4-linux-x86_64-gnu`.
    fn from_str(text: &str) -> Result<Self, ()> {
        let text = text.trim();
        let text = text.strip_prefix("Python ").or_else(|| text.strip_prefix("cpython-")).unwrap_or(text);
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let mut parts = text[..end].split('.');
        let mut next = || parts.next().and_then(|part| part.parse().ok());
        let (major, minor) = (next().ok_or(())?, next().ok_or(())?);
        Ok(Self::new(major, minor, next().unwrap_or(0)))
    }
}

/// An interpreter that can run the agent server: CPython 3.12 or newer that can create virtual environments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Python {
    /// The path of the interpreter itself, not of a version manager's shim.
    pub path: PathBuf,
    pub version: PythonVersion,
}

/// Why an interpreter cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// Older than 3.12.
    TooOld(PythonVersion),
    /// Not CPython, or a free-threaded build of it, for which the packages are not built.
    Other(String, PythonVersion),
    /// `venv` or `ensurepip` is missing. Debian has them in a separate package.
    NoVenv(PythonVersion),
    /// It does not start, or does not behave like a Python interpreter. Holds the first line of its error output.
    DoesNotRun(String),
    /// It did not finish within the time limit.
    TooSlow,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooOld(version) => write!(f, "is Python {version}; 3.12 or newer is needed"),
            Self::Other(name, version) => {
                write!(f, "is {name} {version}; CPython is needed")
            }
            Self::NoVenv(PythonVersion { major, minor, .. }) => {
                write!(f, "is Python {major}.{minor} without venv; install it (apt install python{major}.{minor}-venv)")
            }
            Self::DoesNotRun(output) if output.is_empty() => f.write_str("does not run"),
            Self::DoesNotRun(output) => write!(f, "does not run: {output}"),
            Self::TooSlow => write!(f, "did not respond within {} seconds", PROBE_TIMEOUT.as_secs()),
        }
    }
}

/// Why no Python was found. The message is written for the user of the program.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PythonError {
    /// The requested interpreter does not exist.
    #[error("--python {}: no such file", .0.display())]
    Missing(PathBuf),
    /// The requested interpreter cannot be used.
    #[error("--python {}: {why}", path.display())]
    Rejected { path: PathBuf, why: Rejection },
    /// None was requested and none was found. Holds the rejected interpreters.
    #[error("{}", not_found(.0))]
    NotFound(Vec<(PathBuf, Rejection)>),
}

fn not_found(seen: &[(PathBuf, Rejection)]) -> String {
    let mut text = String::from("No Python 3.12 or newer was found. Ways to get one:\n");
    text.push_str("  package manager: apt install python3.12-venv, dnf install python3.12, brew install python@3.12\n");
    text.push_str("  pyenv: pyenv install 3.12\n");
    text.push_str("  uv: uv python install 3.12\n");
    text.push_str("Or give its path with --python PATH. `--sandbox none` works without Python.");
    // The interpreters that are closest to usable come first, since they help the user most.
    let mut seen: Vec<_> = seen.iter().collect();
    seen.sort_by_key(|(_, why)| match why {
        Rejection::NoVenv(_) => (0, None),
        Rejection::Other(..) => (1, None),
        Rejection::TooSlow => (2, None),
        Rejection::TooOld(version) => (3, Some(std::cmp::Reverse(*version))),
        Rejection::DoesNotRun(_) => (4, None),
    });
    for (path, why) in seen.iter().take(3) {
        let _ = write!(text, "\n{} {why}", path.display());
    }
    text
}

/// Where interpreters are searched for.
#[derive(Debug, Default)]
struct SearchPaths {
    path: Vec<PathBuf>,
    pyenv: Option<PathBuf>,
    uv_pythons: Option<PathBuf>,
    uv: Option<PathBuf>,
}

impl SearchPaths {
    fn from_env() -> Self {
        let home = env::home_dir().filter(|home| !home.as_os_str().is_empty());
        let folder = |variable: &str| env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
        let path = search_path();
        let uv = on_path(&path, "uv").next();
        Self {
            path,
            uv,
            pyenv: folder("PYENV_ROOT").or_else(|| Some(home.as_ref()?.join(".pyenv"))),
            uv_pythons: folder("UV_PYTHON_INSTALL_DIR")
                .or_else(|| Some(folder("XDG_DATA_HOME")?.join("uv/python")))
                .or_else(|| Some(home.as_ref()?.join(".local/share/uv/python"))),
        }
    }

    /// Files that may be interpreters, in the order in which they are tried.
    fn candidates(&self) -> Vec<PathBuf> {
        let mut names: Vec<String> = TESTED_MINORS.iter().map(|n| format!("python3.{n}")).collect();
        names.extend(["python3".to_owned(), "python".to_owned()]);
        let mut found: Vec<PathBuf> = Vec::new();
        for name in &names {
            found.extend(on_path(&self.path, name));
        }
        if let Some(pyenv) = &self.pyenv {
            found.extend(versions_in(&pyenv.join("versions"), "bin/python"));
        }
        if let Some(uv_pythons) = &self.uv_pythons {
            found.extend(versions_in(uv_pythons, "bin/python3"));
        }
        for minor in NEWER_MINORS {
            found.extend(on_path(&self.path, &format!("python3.{minor}")));
        }
        // `/bin` is often a link to `/usr/bin`, so files are compared by their canonical paths. Shims with several names may be
        // one file that depends on the name by which it is called, so a file under another name is another candidate.
        let mut seen = HashSet::new();
        found.retain(|path| {
            let file = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            seen.insert((file, path.file_name().map(OsStr::to_owned)))
        });
        found
    }
}

/// The folders of the environment variable `PATH`.
pub(super) fn search_path() -> Vec<PathBuf> {
    env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default()
}

/// The files with this name in the folders of a PATH.
pub(super) fn on_path<'a>(path: &'a [PathBuf], name: &'a str) -> impl Iterator<Item = PathBuf> + 'a {
    path.iter().filter(|folder| folder.is_absolute()).map(move |folder| folder.join(name)).filter(|file| file.is_file())
}

/// The interpreters in a folder with one subfolder per version. Versions that are too old by their folder's name are skipped
/// without running them.
fn versions_in(folder: &Path, interpreter: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut found: Vec<(PythonVersion, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.parse().ok()?;
            let file = entry.path().join(interpreter);
            (version >= OLDEST && file.is_file()).then_some((version, file))
        })
        .collect();
    found.sort_by(|(a, a_path), (b, b_path)| (a.rank(), a_path).cmp(&(b.rank(), b_path)));
    found.into_iter().map(|(_, file)| file).collect()
}

/// Finds a Python that can run the agent server: the `wanted` one, or else the first Python 3.12 or 3.13 on PATH, in pyenv or in
/// uv, or else a newer one in the same locations. Each candidate is run once, isolated from the user's settings and with a time
/// limit.
///
/// A `wanted` name without a slash is searched for on PATH.
///
/// # Errors
/// The `wanted` interpreter does not exist or cannot be used, or none was found.
pub async fn find_python(wanted: Option<&Path>) -> Result<Python, PythonError> {
    find_python_in(&SearchPaths::from_env(), wanted).await
}

async fn find_python_in(paths: &SearchPaths, wanted: Option<&Path>) -> Result<Python, PythonError> {
    if let Some(wanted) = wanted {
        let files: Vec<PathBuf> = match wanted.to_str() {
            Some(name) if !name.contains('/') && !wanted.is_file() => on_path(&paths.path, name).collect(),
            _ => Some(wanted.to_owned()).filter(|path| path.is_file()).into_iter().collect(),
        };
        let mut first_error = None;
        for path in files {
            // `Command` would search for a relative name on PATH.
            let path = std::path::absolute(&path).unwrap_or(path);
            match probe(&path).await {
                Ok(python) => return Ok(python),
                Err(why) => {
                    first_error.get_or_insert(PythonError::Rejected { path, why });
                }
            }
        }
        return Err(first_error.unwrap_or_else(|| PythonError::Missing(wanted.to_owned())));
    }

    let mut newer: Option<Python> = None;
    let mut seen = Vec::new();
    let mut candidates = paths.candidates();
    let mut has_queried_uv = false;
    loop {
        for path in std::mem::take(&mut candidates) {
            match probe(&path).await {
                Ok(python) if python.version.is_tested() => return Ok(python),
                Ok(python) => {
                    newer.get_or_insert(python);
                }
                Err(why) => {
                    tracing::debug!(path = %path.display(), %why, "python.rejected");
                    seen.push((path, why));
                }
            }
        }
        // uv also finds the interpreters of the system and of other package managers, but running it is slower than reading the
        // folder of its own ones.
        match &paths.uv {
            Some(uv) if !has_queried_uv => {
                has_queried_uv = true;
                candidates = query_uv(uv).await;
            }
            _ => break,
        }
    }
    newer.ok_or(PythonError::NotFound(seen))
}

/// The interpreters that uv finds without downloading one.
async fn query_uv(uv: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for request in ["3.12", "3.13", ">=3.12"] {
        let mut command = Command::new(uv);
        command
            .args(["python", "find", "--system", "--no-project", request])
            .env("UV_PYTHON_DOWNLOADS", "never")
            .env("UV_OFFLINE", "1");
        if let Ok(output) = output_of(command, PROBE_TIMEOUT).await
            && output.status.success()
            && let Some(path) = String::from_utf8_lossy(&output.stdout).lines().next()
        {
            let path = PathBuf::from(path.trim());
            if path.is_file() && !found.contains(&path) {
                found.push(path);
            }
        }
    }
    found
}

/// Runs an interpreter once to determine its kind and version.
async fn probe(path: &Path) -> Result<Python, Rejection> {
    // The first word distinguishes the line from output of a site's own start-up code.
    const SCRIPT: &str = "\
import sys
try:
    import ensurepip, venv
    able = 'venv'
except ImportError:
    able = 'bare'
name = sys.implementation.name
if 't' in getattr(sys, 'abiflags', ''):
    name = 'free-threaded-' + name
print('interpreter %s %d.%d.%d %s %s' % ((name,) + tuple(sys.version_info[:3]) + (able, sys.executable)))
";
    let mut command = Command::new(path);
    command.args(["-I", "-c", SCRIPT]);
    let output = output_of(command, PROBE_TIMEOUT).await?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    let answer = stdout.lines().rev().find_map(|line| line.strip_prefix("interpreter "));
    let Some((name, version, able, executable)) = answer.and_then(parse_probe) else {
        // Python 2 has no `-I`. The error should state that it is too old, not that it does not run.
        let mut command = Command::new(path);
        command.arg("--version");
        if let Ok(output) = output_of(command, PROBE_TIMEOUT).await {
            let printed = [output.stdout, output.stderr].concat();
            let printed = String::from_utf8_lossy(&printed);
            if printed.starts_with("Python ")
                && let Ok(version) = printed.parse::<PythonVersion>()
                && version < OLDEST
            {
                return Err(Rejection::TooOld(version));
            }
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        let first_line = stderr.lines().map(str::trim).find(|line| !line.is_empty());
        return Err(Rejection::DoesNotRun(first_line.unwrap_or_default().to_owned()));
    };
    if name != "cpython" {
        return Err(Rejection::Other(name.to_owned(), version));
    }
    if version < OLDEST {
        return Err(Rejection::TooOld(version));
    }
    if able != "venv" {
        return Err(Rejection::NoVenv(version));
    }
    Ok(Python { path: PathBuf::from(executable), version })
}

fn parse_probe(answer: &str) -> Option<(&str, PythonVersion, &str, &str)> {
    let mut parts = answer.splitn(4, ' ');
    let (name, version) = (parts.next()?, parts.next()?.parse().ok()?);
    let (able, executable) = (parts.next()?, parts.next()?.trim());
    (!executable.is_empty()).then_some((name, version, able, executable))
}

/// Runs a short command to its end, and kills it at the time limit.
async fn output_of(mut command: Command, limit: Duration) -> Result<std::process::Output, Rejection> {
    without_python_variables(&mut command).stdin(Stdio::null());
    match tokio::time::timeout(limit, command.output()).await {
        Ok(Ok(output)) => Ok(output),
        Ok(Err(error)) => Err(Rejection::DoesNotRun(error.to_string())),
        Err(_) => Err(Rejection::TooSlow),
    }
}

/// Removes the environment variables that make an interpreter, or one that it starts, load other modules.
pub(super) fn without_python_variables(command: &mut Command) -> &mut Command {
    for variable in ["PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV"] {
        command.env_remove(variable);
    }
    command.kill_on_drop(true)
}

#[cfg(test)]
pub(super) mod tests {
    use tempfile::TempDir;

    use super::*;

    /// Writes an executable from another process: a file that this process has open for writing, even in a child between fork and
    /// exec, cannot be run.
    pub(in super::super) fn script(path: &Path, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let done = std::process::Command::new("sh")
            .args(["-c", "printf '%s' \"$2\" > \"$1\" && chmod +x \"$1\"", "sh"])
            .arg(path)
            .arg(text)
            .status()
            .unwrap();
        assert!(done.success());
    }

    /// Writes a fake interpreter that prints this line when probed.
    fn fake(path: &Path, answer: &str) {
        script(path, &format!("#!/bin/sh\necho noise\necho \"interpreter {answer} $0\"\n"));
    }

    fn on(folders: &[PathBuf]) -> SearchPaths {
        SearchPaths { path: folders.to_vec(), ..SearchPaths::default() }
    }

    fn version(text: &str) -> PythonVersion {
        text.parse().unwrap()
    }

    #[test]
    fn versions_are_read() {
        for (text, wanted) in [
            ("3.12.1", (3, 12, 1)),
            ("3.12", (3, 12, 0)),
            (" Python 3.13.0rc1\n", (3, 13, 0)),
            ("Python 2.7.18", (2, 7, 18)),
            ("cpython-3.12.4-linux-x86_64-gnu", (3, 12, 4)),
            ("3.14-dev", (3, 14, 0)),
        ] {
            let PythonVersion { major, minor, patch } = version(text);
            assert_eq!((major, minor, patch), wanted, "{text}");
        }
        for text in ["", "3", "pypy3.10-7.3.12", "miniconda3-latest", "system"] {
            assert!(text.parse::<PythonVersion>().is_err(), "{text}");
        }
        assert!(version("3.9.18") < version("3.12"));
    }

    #[tokio::test]
    async fn a_tested_python_is_preferred_wherever_it_is() {
        let root = TempDir::new().unwrap();
        let (a, b) = (root.path().join("a"), root.path().join("b"));
        fake(&a.join("python3"), "cpython 3.14.0 venv");
        fake(&a.join("python3.13"), "cpython 3.13.1 venv");
        // A version manager's shim for a version that is not selected.
        script(&a.join("python3.12"), "#!/bin/sh\necho 'command not found' >&2\nexit 127\n");
        fake(&b.join("python3.12"), "cpython 3.12.5 venv");
        let found = find_python_in(&on(&[a.clone(), b.clone()]), None).await.unwrap();
        assert_eq!(found.path, b.join("python3.12"));
        assert_eq!(found.version, version("3.12.5"));

        let found = find_python_in(&on(std::slice::from_ref(&a)), None).await.unwrap();
        assert_eq!(found.version, version("3.13.1"));

        // A newer version is used only if no tested version is found.
        fs::remove_file(a.join("python3.13")).unwrap();
        let found = find_python_in(&on(std::slice::from_ref(&a)), None).await.unwrap();
        assert_eq!(found.version, version("3.14.0"));
        let pyenv = root.path().join("pyenv");
        for name in ["3.11.7", "3.15.0", "3.12.2", "3.12.10", "pypy3.10"] {
            let number = name.trim_start_matches("pypy");
            fake(&pyenv.join("versions").join(name).join("bin/python"), &format!("cpython {number} venv"));
        }
        let paths = SearchPaths { pyenv: Some(pyenv), ..on(&[a]) };
        let found = find_python_in(&paths, None).await.unwrap();
        assert_eq!(found.version, version("3.12.10"));
    }

    #[tokio::test]
    async fn uv_is_queried_last() {
        let root = TempDir::new().unwrap();
        let python = root.path().join("hidden/python3.13");
        fake(&python, "cpython 3.13.2 venv");
        let uv = root.path().join("uv");
        script(&uv, &format!("#!/bin/sh\ncase \"$*\" in *3.13) echo {};; *) exit 2;; esac\n", python.display()));
        let paths = SearchPaths { uv: Some(uv), ..SearchPaths::default() };
        let found = find_python_in(&paths, None).await.unwrap();
        assert_eq!(found.path, python);
    }

    #[tokio::test]
    async fn a_rejected_interpreter_is_reported_with_the_reason() {
        let root = TempDir::new().unwrap();
        let path = root.path().join("python");
        for (answer, wanted) in [
            ("cpython 3.11.7 venv", "is Python 3.11.7; 3.12 or newer"),
            ("pypy 3.12.1 venv", "is pypy 3.12.1; CPython"),
            ("cpython 3.12.3 bare", "apt install python3.12-venv"),
        ] {
            fake(&path, answer);
            let error = find_python_in(&SearchPaths::default(), Some(&path)).await.unwrap_err();
            let text = error.to_string();
            assert!(text.starts_with(&format!("--python {}", path.display())), "{text}");
            assert!(text.contains(wanted), "{text}");
        }
        script(&path, "#!/bin/sh\n[ \"$1\" = --version ] && { echo Python 2.7.18 >&2; exit; }\nexit 2\n");
        let error = find_python_in(&SearchPaths::default(), Some(&path)).await.unwrap_err();
        assert!(error.to_string().contains("is Python 2.7.18"), "{error}");

        script(&path, "#!/bin/sh\necho broken >&2\nexit 1\n");
        let error = find_python_in(&SearchPaths::default(), Some(&path)).await.unwrap_err();
        assert!(error.to_string().contains("does not run: broken"), "{error}");

        let missing = root.path().join("none");
        let error = find_python_in(&SearchPaths::default(), Some(&missing)).await.unwrap_err();
        assert_eq!(error, PythonError::Missing(missing));
    }

    #[tokio::test]
    async fn a_bare_name_is_searched_for_on_path() {
        let root = TempDir::new().unwrap();
        let path = root.path().join("python-mine");
        fake(&path, "cpython 3.14.2 venv");
        let paths = on(&[root.path().to_owned()]);
        let found = find_python_in(&paths, Some(Path::new("python-mine"))).await.unwrap();
        assert_eq!(found.path, path);
        let missing = Path::new("python-yours");
        let error = find_python_in(&paths, Some(missing)).await.unwrap_err();
        assert_eq!(error.to_string(), "--python python-yours: no such file");
    }

    #[tokio::test]
    async fn the_error_for_no_python_says_how_to_install_one() {
        let root = TempDir::new().unwrap();
        fake(&root.path().join("python3"), "cpython 3.10.12 venv");
        fake(&root.path().join("python3.12"), "cpython 3.12.3 bare");
        let error = find_python_in(&on(&[root.path().to_owned()]), None).await.unwrap_err();
        let text = error.to_string();
        for wanted in [
            "package manager: apt install",
            "pyenv install 3.12",
            "uv python install 3.12",
            "--python",
            "--sandbox none",
            "python3 is Python 3.10.12",
            "python3.12 is Python 3.12 without venv",
        ] {
            assert!(text.contains(wanted), "{wanted} in {text}");
        }
        assert!(text.find("without venv") < text.find("3.10.12"), "{text}");
        assert!(text.lines().all(|line| line.len() < 160), "{text}");
    }
}
