//! The agent server that runs a sandbox as a process: finds a Python, installs the pinned agent
//! server into a virtual environment of its own, and says how to start it.
//!
//! What is on disk, in the folder given:
//!
//! ```text
//! agent-server-install.lock                 held while installing
//! agent-server-install.log                  output of the last install
//! agent-server-<version>-py<X.Y>-<hash>/    hash of what is to be installed
//!     venv-<random>/                        one a try
//!     complete                              written last: the name of the finished one
//! ```
//!
//! Every try has a folder of its own: an installer that outlives a killed parent goes on writing
//! for a while, and must not write into what the next try makes.

use std::collections::{HashSet, VecDeque};
use std::env;
use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::fs::{self, File, TryLockError};
use std::io::{self, IsTerminal, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::process::Command;
use uuid::Uuid;

/// Releases that are tested, with the versions of all that they are installed with. The dependencies of other releases are
/// chosen by the installer.
const CONSTRAINTS: [(&str, &str); 3] = [
    ("1.58.2", include_str!("../agent-server-constraints/1.58.2.txt")),
    ("1.49.1", include_str!("../agent-server-constraints/1.49.1.txt")),
    ("1.15.0", include_str!("../agent-server-constraints/1.15.0.txt")),
];

/// An estimate of the number of packages where no constraints say.
const USUAL_PACKAGES: usize = 195;

/// The agent server imports the tools without saying so in its package. The workspace package,
/// the fourth of the family, is for its clients.
const PACKAGES: [&str; 3] = ["openhands-agent-server", "openhands-sdk", "openhands-tools"];

/// Imports what a start and a first conversation import, which also leaves their bytecode behind.
/// Compiling everything installed instead takes longer and serves no other start.
const SMOKE: &str = "\
import openhands.agent_server.__main__, openhands.agent_server.api, \
openhands.tools.preset.default, openhands.tools.browser_use.impl, \
uvicorn.protocols.http.h11_impl, uvicorn.protocols.websockets.wsproto_impl, uvicorn.lifespan.on";

const SMOKE_LIMIT: Duration = Duration::from_secs(300);
const PROBE_LIMIT: Duration = Duration::from_secs(5);
const LOCK_POLL: Duration = Duration::from_millis(200);
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Lines of output an error quotes.
const QUOTED: usize = 12;

const OLDEST: PythonVersion = PythonVersion::new(3, 12, 0);
/// Minor versions the constraints are tested with, the preferred one first.
const TESTED_MINORS: [u32; 2] = [12, 13];
/// `python3.N` looked for on PATH when nothing tested is there.
const NEWER_MINORS: std::ops::RangeInclusive<u32> = 14..=19;

// ---------------------------------------------------------------------------------------------
// Python

/// A version of Python. Ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PythonVersion {
    /// 3 of 3.12.1.
    pub major: u32,
    /// 12 of 3.12.1.
    pub minor: u32,
    /// 1 of 3.12.1.
    pub patch: u32,
}

impl PythonVersion {
    const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    fn tested(self) -> bool {
        self.major == 3 && TESTED_MINORS.contains(&self.minor)
    }

    /// Sorts the tested ones first, then by minor version, then the newest patch first.
    fn rank(self) -> (usize, u32, u32, std::cmp::Reverse<u32>) {
        let tested = TESTED_MINORS.iter().position(|minor| *minor == self.minor);
        let place = match tested {
            Some(place) if self.major == 3 => place,
            _ => TESTED_MINORS.len(),
        };
        (place, self.major, self.minor, std::cmp::Reverse(self.patch))
    }
}

impl fmt::Display for PythonVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl FromStr for PythonVersion {
    type Err = ();

    /// Reads `3.12.1`, `3.12`, `Python 3.13.0rc1`, `cpython-3.12.4-linux-x86_64-gnu`.
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

/// An interpreter that can run the agent server: CPython, new enough, able to make virtual
/// environments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Python {
    /// The interpreter itself, never a shim.
    pub path: PathBuf,
    /// What it says it is.
    pub version: PythonVersion,
}

/// Why an interpreter is no use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// Older than 3.12.
    TooOld(PythonVersion),
    /// Not CPython, or a build of it without the lock that the packages are built for.
    Other(String, PythonVersion),
    /// `venv` or `ensurepip` is missing; Debian packages them apart.
    NoVenv(PythonVersion),
    /// It does not start, or does not behave as a Python; with what it said.
    DoesNotRun(String),
    /// No answer within the time limit.
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
            Self::DoesNotRun(said) if said.is_empty() => f.write_str("does not run"),
            Self::DoesNotRun(said) => write!(f, "does not run: {said}"),
            Self::TooSlow => write!(f, "did not answer within {} seconds", PROBE_LIMIT.as_secs()),
        }
    }
}

/// Why there is no Python to use. The text is for the person who started the program.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PythonError {
    /// The one asked for does not exist.
    #[error("--python {}: no such file", .0.display())]
    Missing(PathBuf),
    /// The one asked for is no use.
    #[error("--python {}: {why}", path.display())]
    Rejected {
        /// The one asked for.
        path: PathBuf,
        /// What is wrong with it.
        why: Rejection,
    },
    /// None asked for, and none found; with the ones seen that are no use.
    #[error("{}", not_found(.0))]
    NotFound(Vec<(PathBuf, Rejection)>),
}

fn not_found(seen: &[(PathBuf, Rejection)]) -> String {
    let mut text = String::from("No Python 3.12 or newer was found. Ways to get one:\n");
    text.push_str("  package manager: apt install python3.12-venv, dnf install python3.12, brew install python@3.12\n");
    text.push_str("  pyenv: pyenv install 3.12\n");
    text.push_str("  uv: uv python install 3.12\n");
    text.push_str("Or name one with --python PATH. `--sandbox none` works without Python.");
    // What is nearest to being usable says most.
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

/// Where interpreters are looked for.
#[derive(Debug, Default)]
struct WorkspaceLocator {
    path: Vec<PathBuf>,
    pyenv: Option<PathBuf>,
    uv_pythons: Option<PathBuf>,
    uv: Option<PathBuf>,
}

impl WorkspaceLocator {
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

    /// Files that may be an interpreter, in the order they are to be tried.
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
        // `/bin` is often `/usr/bin`. Shims of several names may be one file that looks at the
        // name it is called by, so a different name is a different candidate.
        let mut seen = HashSet::new();
        found.retain(|path| {
            let file = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            seen.insert((file, path.file_name().map(OsStr::to_owned)))
        });
        found
    }
}

fn search_path() -> Vec<PathBuf> {
    env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default()
}

/// The files of that name in the folders of a PATH.
fn on_path<'a>(path: &'a [PathBuf], name: &'a str) -> impl Iterator<Item = PathBuf> + 'a {
    path.iter().filter(|folder| folder.is_absolute()).map(move |folder| folder.join(name)).filter(|file| file.is_file())
}

/// The interpreters in a folder of installed versions, by the names of the versions: those too old
/// are left out, so that they need not be run.
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

/// Finds a Python that can run the agent server: the one asked for, or else the first of Python
/// 3.12 or 3.13 on PATH, in pyenv and in uv, or else a newer one in the same places. Each is run
/// once, isolated from the user's settings and with a time limit.
///
/// A name without a slash is looked for on PATH.
///
/// # Errors
///
/// The one asked for does not exist or is no use, or none was found.
pub async fn find_python(wanted: Option<&Path>) -> Result<Python, PythonError> {
    find_python_in(&WorkspaceLocator::from_env(), wanted).await
}

async fn find_python_in(places: &WorkspaceLocator, wanted: Option<&Path>) -> Result<Python, PythonError> {
    if let Some(wanted) = wanted {
        let files: Vec<PathBuf> = match wanted.to_str() {
            Some(name) if !name.contains('/') && !wanted.is_file() => on_path(&places.path, name).collect(),
            _ => Some(wanted.to_owned()).filter(|path| path.is_file()).into_iter().collect(),
        };
        let mut first_error = None;
        for path in files {
            // A relative name would be looked for on PATH.
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
    let mut candidates = places.candidates();
    let mut asked_uv = false;
    loop {
        for path in std::mem::take(&mut candidates) {
            match probe(&path).await {
                Ok(python) if python.version.tested() => return Ok(python),
                Ok(python) => {
                    newer.get_or_insert(python);
                }
                Err(why) => {
                    tracing::debug!(path = %path.display(), %why, "not a usable Python");
                    seen.push((path, why));
                }
            }
        }
        // uv knows of more places (other package managers', those of the system),
        // but takes longer than looking where it puts its own.
        match &places.uv {
            Some(uv) if !asked_uv => {
                asked_uv = true;
                candidates = ask_uv(uv).await;
            }
            _ => break,
        }
    }
    newer.ok_or(PythonError::NotFound(seen))
}

/// What uv finds without a download.
async fn ask_uv(uv: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for request in ["3.12", "3.13", ">=3.12"] {
        let mut command = Command::new(uv);
        command
            .args(["python", "find", "--system", "--no-project", request])
            .env("UV_PYTHON_DOWNLOADS", "never")
            .env("UV_OFFLINE", "1");
        if let Ok(output) = output_of(command, PROBE_LIMIT).await
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

/// Runs an interpreter once to see what it is.
async fn probe(path: &Path) -> Result<Python, Rejection> {
    // The word in front tells the line from what a site's own start-up code may print.
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
    let output = output_of(command, PROBE_LIMIT).await?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    let answer = stdout.lines().rev().find_map(|line| line.strip_prefix("interpreter "));
    let Some((name, version, able, executable)) = answer.and_then(parse_probe) else {
        // Python 2 knows no `-I`; say that it is too old rather than that it does not run.
        let mut command = Command::new(path);
        command.arg("--version");
        if let Ok(output) = output_of(command, PROBE_LIMIT).await {
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            if said.starts_with("Python ")
                && let Ok(version) = said.parse::<PythonVersion>()
                && version < OLDEST
            {
                return Err(Rejection::TooOld(version));
            }
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        let said = stderr.lines().map(str::trim).find(|line| !line.is_empty());
        return Err(Rejection::DoesNotRun(said.unwrap_or_default().to_owned()));
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

/// Runs a short command to its end; it is killed at the limit.
async fn output_of(mut command: Command, limit: Duration) -> Result<std::process::Output, Rejection> {
    clean(&mut command).stdin(Stdio::null());
    match tokio::time::timeout(limit, command.output()).await {
        Ok(Ok(output)) => Ok(output),
        Ok(Err(error)) => Err(Rejection::DoesNotRun(error.to_string())),
        Err(_) => Err(Rejection::TooSlow),
    }
}

/// Takes away what would make an interpreter, or one started by it, load other modules.
fn clean(command: &mut Command) -> &mut Command {
    for variable in ["PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV"] {
        command.env_remove(variable);
    }
    command.kill_on_drop(true)
}

// ---------------------------------------------------------------------------------------------
// Progress

/// What an install is at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Looking for a Python.
    Searching,
    /// The Python that is used.
    Found(Python),
    /// Another process is installing into the same folder.
    Waiting,
    /// Installing; the count is of packages and an estimate.
    Installing {
        /// What is done now, in a few words.
        line: String,
        /// Packages so far.
        done: usize,
        /// Packages in all.
        of: usize,
    },
    /// Trying what was installed.
    Verifying,
    /// The agent server is there, whether now installed or before.
    Done,
}

/// Told what an install is at. Called from the install itself, so it should not take long.
pub trait Progress: Send + Sync {
    /// Called at every event.
    fn report(&self, event: Event);
}

/// Tells nobody.
impl Progress for () {
    fn report(&self, _: Event) {}
}

impl<T: Progress + ?Sized> Progress for &T {
    fn report(&self, event: Event) {
        (**self).report(event);
    }
}

/// Shows progress on stderr: a bar on a terminal, otherwise a line every few seconds. Shows
/// nothing when there is nothing to install.
pub struct Terminal {
    state: Mutex<TerminalState>,
}

struct TerminalState {
    /// None when stderr is not a terminal.
    bar: Option<ProgressBar>,
    plain: PlainLines,
    started: Option<Instant>,
}

impl Default for Terminal {
    fn default() -> Self {
        Self::new()
    }
}

impl Terminal {
    /// Looks now whether stderr is a terminal.
    pub fn new() -> Self {
        Self {
            state: Mutex::new(TerminalState {
                bar: io::stderr().is_terminal().then(new_bar),
                plain: PlainLines::default(),
                started: None,
            }),
        }
    }
}

fn new_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.set_style(spinner_style());
    bar
}

fn spinner_style() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {msg}").unwrap_or_else(|_| ProgressStyle::default_spinner())
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {bar:30} {pos}/{len} {wide_msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

impl Progress for Terminal {
    fn report(&self, event: Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &mut *state;
        let took = match (&event, state.started) {
            (Event::Done, started) => started.map(|started| started.elapsed()),
            (Event::Installing { .. } | Event::Waiting, None) => {
                state.started = Some(Instant::now());
                None
            }
            _ => None,
        };
        let Some(bar) = &state.bar else {
            if let Some(line) = state.plain.line(&event, took, Instant::now()) {
                // Nobody reads stderr any more: no reason to stop the install.
                let _ = writeln!(io::stderr(), "{line}");
            }
            return;
        };
        match event {
            Event::Done => {
                bar.finish_and_clear();
                if let Some(took) = took {
                    let _ = writeln!(io::stderr(), "{}", ready(took));
                }
            }
            Event::Installing { line, done, of } => {
                if bar.length() != Some(of as u64) {
                    bar.set_style(bar_style());
                    bar.set_length(of as u64);
                    bar.enable_steady_tick(Duration::from_millis(200));
                }
                bar.set_position(done as u64);
                bar.set_message(line);
            }
            other => {
                bar.unset_length();
                bar.set_style(spinner_style());
                bar.enable_steady_tick(Duration::from_millis(200));
                bar.set_message(describe(&other));
            }
        }
    }
}

fn ready(took: Duration) -> String {
    format!("The agent server is ready ({} s)", took.as_secs())
}

fn describe(event: &Event) -> String {
    match event {
        Event::Searching => "Looking for Python 3.12 or newer".to_owned(),
        Event::Found(python) => format!("Python {} ({})", python.version, python.path.display()),
        Event::Waiting => "Another process is installing the agent server; waiting for it".to_owned(),
        Event::Installing { line, done, of } => {
            format!("Installing the agent server ({done}/{of}): {line}")
        }
        Event::Verifying => "Trying the agent server".to_owned(),
        Event::Done => "The agent server is ready".to_owned(),
    }
}

/// Chooses what is said where no bar can be drawn.
#[derive(Default)]
struct PlainLines {
    last: Option<Instant>,
}

impl PlainLines {
    fn line(&mut self, event: &Event, took: Option<Duration>, now: Instant) -> Option<String> {
        let line = match event {
            Event::Searching | Event::Found(_) => return None,
            Event::Done => return took.map(ready),
            Event::Installing { .. } if self.last.is_some_and(|last| now - last < LINE_EVERY) => {
                return None;
            }
            event => describe(event),
        };
        self.last = Some(now);
        Some(line)
    }
}

/// Reads from an installer's output how far it is.
struct Counter {
    names: HashSet<String>,
    done: usize,
    of: usize,
}

impl Counter {
    fn new(of: usize) -> Self {
        Self { names: HashSet::new(), done: 0, of }
    }

    /// The event a line stands for; most lines stand for none.
    fn read(&mut self, line: &str) -> Option<Event> {
        let line = line.trim();
        let (word, rest) = line.split_once(' ')?;
        let said = match word {
            // pip names every package once, or more when it changes its mind.
            "Collecting" => {
                let name = package_name(rest);
                self.names.insert(name.clone());
                self.done = self.done.max(self.names.len());
                name
            }
            // uv names only the large ones. It says how many there are when it has them all.
            "Downloading" | "Downloaded" | "Building" | "Built"
                if !rest.starts_with("wheel")
                    && !rest.contains(".whl")
                    && !rest.contains(".tar.gz")
                    && !rest.contains("://") =>
            {
                let name = package_name(rest);
                self.names.insert(name.clone());
                self.done = self.done.max(self.names.len());
                format!("{} {name}", word.to_lowercase())
            }
            "Resolved" => "versions chosen".to_owned(),
            "Prepared" => {
                self.done = self.of;
                "writing files".to_owned()
            }
            "Installing" if rest.starts_with("collected packages") => {
                self.done = self.of;
                "writing files".to_owned()
            }
            "Installed" | "Successfully" => {
                self.done = self.of;
                "packages installed".to_owned()
            }
            _ => return None,
        };
        self.done = self.done.min(self.of);
        Some(Event::Installing { line: said, done: self.done, of: self.of })
    }
}

/// `tokenizers` of `tokenizers[extra]<1,>=0.2 (from litellm)`, in the form pip compares names in.
fn package_name(requirement: &str) -> String {
    let end = requirement
        .find(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '-' | '_' | '.'))
        .unwrap_or(requirement.len());
    requirement[..end].to_lowercase().replace(['_', '.'], "-")
}

// ---------------------------------------------------------------------------------------------
// Install

/// An installed agent server. A sandbox is `<python> -m openhands.agent_server --host … --port …`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentServer {
    /// The interpreter of the virtual environment, an absolute path.
    pub python: PathBuf,
    /// The agent server's version.
    pub version: String,
}

/// Why the agent server could not be installed. The text is for the person who started the
/// program.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The folder or a file in it cannot be written, read or locked.
    #[error("Cannot {doing} {}: {}", path.display(), io_text(source))]
    File {
        /// What could not be done, as `write`.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A command of the install cannot be run.
    #[error("Cannot run {}: {source}", program.display())]
    Run {
        /// The command.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A command of the install failed.
    #[error("{}", failed_text(.step, *.cause, .quote, .log))]
    Failed {
        /// What the command was for.
        step: &'static str,
        /// The cause, as far as it can be told.
        cause: Cause,
        /// The last lines of its output.
        quote: Vec<String>,
        /// Where the rest is.
        log: PathBuf,
    },
}

/// What a failed command of the install failed of, as far as its output tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// No space is left where it is installed, or for temporary files.
    DiskFull,
    /// The package index could not be reached.
    Network,
    /// It did not end within its time limit.
    TooSlow,
    /// Something else; the quoted output tells.
    Unknown,
}

fn io_text(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "the disk is full".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        io::ErrorKind::ReadOnlyFilesystem => "the file system is read-only".to_owned(),
        _ => error.to_string(),
    }
}

fn failed_text(step: &str, cause: Cause, quote: &[String], log: &Path) -> String {
    let mut text = match cause {
        Cause::DiskFull => {
            format!("{step} failed: the disk is full. The agent server needs about 700 MB.")
        }
        Cause::Network => format!(
            "{step} failed: the package index cannot be reached. The first start needs the \
             network; later ones do not. (A mirror or proxy is set with pip's settings, \
             as PIP_INDEX_URL or PIP_PROXY; `--sandbox none` works without.)"
        ),
        Cause::TooSlow => format!("{step} failed: it took too long."),
        Cause::Unknown => format!("{step} failed."),
    };
    if !quote.is_empty() {
        text.push_str(" The last lines of its output:");
    }
    for line in quote {
        let _ = write!(text, "\n  {line}");
    }
    let _ = write!(text, "\nThe whole output is in {}", log.display());
    text
}

/// Guesses the cause from the output.
fn cause_of(output: &str) -> Option<Cause> {
    const DISK: [&str; 3] = ["No space left on device", "os error 28", "Disk quota exceeded"];
    const NETWORK: [&str; 15] = [
        "Temporary failure in name resolution",
        "Name or service not known",
        "nodename nor servname",
        "NameResolutionError",
        "NewConnectionError",
        "ConnectTimeoutError",
        "ReadTimeoutError",
        "ProxyError",
        "SSLError",
        "Could not fetch URL",
        "Network is unreachable",
        "Connection refused",
        "dns error",
        "error sending request",
        "network was disabled",
    ];
    let has = |signs: &[&str]| signs.iter().any(|sign| output.contains(sign));
    if has(&DISK) {
        Some(Cause::DiskFull)
    } else if has(&NETWORK) {
        Some(Cause::Network)
    } else {
        None
    }
}

/// What to install and with what.
struct Plan {
    version: String,
    constraints: String,
    requirements: Vec<String>,
    smoke: String,
    smoke_limit: Duration,
    /// None: the virtual environment's own pip.
    uv: Option<PathBuf>,
}

impl Plan {
    /// The install of a release, with pinned dependencies if it is one of [`CONSTRAINTS`].
    fn of(version: &str) -> Self {
        let path = search_path();
        let uv = on_path(&path, "uv").next();
        let set = |name: &str| env::var_os(name).is_some_and(|value| !value.is_empty());
        let constraints = CONSTRAINTS.iter().find(|(tested, _)| *tested == version).map(|(_, pins)| *pins);
        Self {
            version: version.to_owned(),
            constraints: constraints.unwrap_or_default().to_owned(),
            requirements: PACKAGES.iter().map(|name| format!("{name}=={version}")).collect(),
            smoke: SMOKE.to_owned(),
            smoke_limit: SMOKE_LIMIT,
            uv: uv.filter(|_| uv_fits(set, pip_files_exist())),
        }
    }

    fn packages(&self) -> usize {
        match self.constraints.lines().filter(|line| line.contains("==")).count() {
            0 => USUAL_PACKAGES,
            pinned => pinned,
        }
    }

    fn hash(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(&self.constraints);
        for requirement in &self.requirements {
            hash.update(requirement);
            hash.update("\n");
        }
        let digest = hash.finalize();
        digest.iter().take(6).fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }

    fn home(&self, folder: &Path, version: PythonVersion) -> PathBuf {
        folder.join(format!("agent-server-{}-py{}.{}-{}", self.version, version.major, version.minor, self.hash()))
    }

    /// The finished install in a folder of its own, by its marker. Runs nothing.
    fn complete(&self, home: &Path) -> Option<AgentServer> {
        let name = fs::read_to_string(home.join("complete")).ok()?;
        let name = name.trim();
        if !name.starts_with("venv-") || name.contains('/') {
            return None;
        }
        let python = home.join(name).join("bin/python");
        // Follows links: false also when the Python it was made from has gone.
        python.exists().then(|| AgentServer { python, version: self.version.clone() })
    }

    /// A finished install for any Python.
    fn find_complete(&self, folder: &Path) -> Option<AgentServer> {
        let before = format!("agent-server-{}-py", self.version);
        let after = format!("-{}", self.hash());
        let mut found: Vec<(PythonVersion, PathBuf)> = fs::read_dir(folder)
            .ok()?
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let version = name.to_str()?.strip_prefix(&before)?.strip_suffix(&after)?;
                Some((version.parse().ok()?, entry.path()))
            })
            .collect();
        found.sort_by_key(|(version, _)| version.rank());
        found.iter().find_map(|(_, home)| self.complete(home))
    }
}

/// uv is faster, but knows nothing of pip's settings. Where there are some that say where packages
/// come from, and none of uv's own, pip it is.
fn uv_fits(set: impl Fn(&str) -> bool, pip_files: bool) -> bool {
    const UV: [&str; 6] =
        ["UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_CONFIG_FILE"];
    const PIP: [&str; 10] = [
        "PIP_INDEX_URL",
        "PIP_EXTRA_INDEX_URL",
        "PIP_FIND_LINKS",
        "PIP_NO_INDEX",
        "PIP_CONSTRAINT",
        "PIP_PROXY",
        "PIP_CERT",
        "PIP_CLIENT_CERT",
        "PIP_TRUSTED_HOST",
        "PIP_CONFIG_FILE",
    ];
    UV.iter().any(|name| set(name)) || !(pip_files || PIP.iter().any(|name| set(name)))
}

fn pip_files_exist() -> bool {
    let mut files = vec![
        PathBuf::from("/etc/pip.conf"),
        PathBuf::from("/etc/xdg/pip/pip.conf"),
        PathBuf::from("/Library/Application Support/pip/pip.conf"),
    ];
    if let Some(config) = env::var_os("XDG_CONFIG_HOME") {
        files.push(PathBuf::from(config).join("pip/pip.conf"));
    }
    if let Some(home) = env::home_dir() {
        for name in [".pip/pip.conf", ".config/pip/pip.conf", "Library/Application Support/pip/pip.conf"] {
            files.push(home.join(name));
        }
    }
    files.iter().any(|file| file.is_file())
}

/// The agent server of this version installed in a folder, for any Python, if it is. Runs nothing and needs no
/// network; only looks whether the install was finished and its interpreter is still there.
#[must_use]
pub fn installed(folder: &Path, version: &str) -> Option<AgentServer> {
    Plan::of(version).find_complete(&std::path::absolute(folder).ok()?)
}

/// Why there is no agent server.
#[derive(Debug, thiserror::Error)]
pub enum EnsureError {
    /// There is no Python to use.
    #[error(transparent)]
    Python(#[from] PythonError),
    /// There is one, but the install failed.
    #[error(transparent)]
    Install(#[from] InstallError),
}

/// The agent server of this version of a folder: the installed one, or else one that is installed now with the
/// Python asked for or found. A Python asked for is looked at even so, and must fit.
///
/// # Errors
///
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

/// Installs this version of the agent server, with pinned dependencies if it is a tested one, into a virtual environment in the
/// folder, unless it is there. Several processes may do so at once: one installs, the others wait.
/// An install that was cut off is made anew. Dropping the future ends the installer.
///
/// # Errors
///
/// The folder cannot be written, or a command failed: the error quotes the end of its output and
/// names the file that has all of it.
pub async fn install(
    folder: &Path,
    version: &str,
    python: &Python,
    progress: impl Progress,
) -> Result<AgentServer, InstallError> {
    install_plan(&Plan::of(version), folder, python, &progress).await
}

async fn install_plan(
    plan: &Plan,
    folder: &Path,
    python: &Python,
    progress: &dyn Progress,
) -> Result<AgentServer, InstallError> {
    // Sandboxes run elsewhere.
    let folder = std::path::absolute(folder).map_err(file_error("find", folder))?;
    let home = plan.home(&folder, python.version);
    if let Some(server) = plan.complete(&home) {
        progress.report(Event::Done);
        return Ok(server);
    }
    fs::create_dir_all(&home).map_err(file_error("create", &home))?;
    // Let go when dropped, and by the system when this process is killed.
    let _lock = lock(&folder.join("agent-server-install.lock"), progress).await?;
    if let Some(server) = plan.complete(&home) {
        progress.report(Event::Done);
        return Ok(server);
    }
    remove_old_tries(&home).await;

    let name = format!("venv-{:08x}", Uuid::new_v4().as_fields().0);
    let venv = home.join(&name);
    let built = build(plan, &folder, &home, &venv, python, progress).await;
    if let Err(error) = built {
        remove_old_tries(&home).await;
        return Err(error);
    }
    let marker = home.join("complete");
    let draft = home.join("complete.new");
    fs::write(&draft, format!("{name}\n")).map_err(file_error("write", &draft))?;
    fs::rename(&draft, &marker).map_err(file_error("write", &marker))?;
    progress.report(Event::Done);
    Ok(AgentServer { python: venv.join("bin/python"), version: plan.version.clone() })
}

/// Makes the virtual environment, installs into it and tries it.
async fn build(
    plan: &Plan,
    folder: &Path,
    home: &Path,
    venv: &Path,
    python: &Python,
    progress: &dyn Progress,
) -> Result<(), InstallError> {
    let of = plan.packages();
    let start = |line: &str| Event::Installing { line: line.to_owned(), done: 0, of };
    let constraints = home.join("constraints.txt");
    fs::write(&constraints, &plan.constraints).map_err(file_error("write", &constraints))?;
    let mut log = Log::create(&folder.join("agent-server-install.log"))?;

    progress.report(start("making a virtual environment"));
    let mut command = Command::new(&python.path);
    command.args(["-I", "-m", "venv"]);
    if plan.uv.is_some() {
        command.arg("--without-pip");
    }
    command.arg(venv);
    log.run("Making a virtual environment", command, None, |_| {}).await?;

    progress.report(start("choosing versions"));
    let interpreter = venv.join("bin/python");
    let mut command = installer(plan, &interpreter);
    command.arg("--constraint").arg(&constraints);
    // uv takes settings from a project file in or above the working directory.
    command.args(&plan.requirements).current_dir(home);
    let mut counter = Counter::new(of);
    log.run("Installing the agent server", command, None, |line| {
        if let Some(event) = counter.read(line) {
            progress.report(event);
        }
    })
    .await?;

    progress.report(Event::Verifying);
    let mut command = Command::new(&interpreter);
    command.args(["-I", "-c", &plan.smoke]).env("OPENHANDS_SUPPRESS_BANNER", "1").current_dir(home);
    // The agent server's settings, which it reads on import; a sandbox is given its own.
    for (name, _) in env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"OH_") {
            command.env_remove(name);
        }
    }
    let limit = Some(plan.smoke_limit);
    log.run("Trying the agent server", command, limit, |_| {}).await
}

/// The command that installs, but for what.
fn installer(plan: &Plan, interpreter: &Path) -> Command {
    if let Some(uv) = &plan.uv {
        let mut command = Command::new(uv);
        command.args(["pip", "install", "--color", "never", "--no-progress", "--python"]);
        command.arg(interpreter);
        return command;
    }
    let mut command = Command::new(interpreter);
    // Unbuffered, or progress arrives in lumps.
    command.args(["-I", "-u", "-m", "pip", "install"]);
    command.args([
        "--no-input",
        "--no-color",
        "--no-compile",
        "--no-warn-script-location",
        "--disable-pip-version-check",
    ]);
    command.args(["--progress-bar", "off"]);
    // The user's settings hold, but for those that would put the packages elsewhere, leave some
    // out, or be silent. (A variable set to 0 also counters the settings file.)
    for variable in ["PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PIP_REQUIREMENT"] {
        command.env_remove(variable);
    }
    for variable in ["PIP_USER", "PIP_DRY_RUN", "PIP_NO_DEPS", "PIP_QUIET", "PIP_VERBOSE"] {
        command.env(variable, "0");
    }
    command
}

fn file_error<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> InstallError + 'a {
    move |source| InstallError::File { doing, path: path.to_owned(), source }
}

/// Takes the lock, waiting for whoever has it.
async fn lock(path: &Path, progress: &dyn Progress) -> Result<File, InstallError> {
    let file = File::options().create(true).truncate(false).write(true).open(path).map_err(file_error("open", path))?;
    let mut told = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {
                if !told {
                    told = true;
                    progress.report(Event::Waiting);
                }
                // Not the blocking call: it could not be given up.
                tokio::time::sleep(LOCK_POLL).await;
            }
            Err(TryLockError::Error(error)) => return Err(file_error("lock", path)(error)),
        }
    }
}

/// Removes what tries without a marker left. Called with the lock held.
async fn remove_old_tries(home: &Path) {
    let home = home.to_owned();
    // An installer that is not quite dead may still write; what it leaves goes the next time.
    let removal = tokio::task::spawn_blocking(move || {
        let _ = fs::remove_file(home.join("complete"));
        let Ok(entries) = fs::read_dir(&home) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            if name.to_str().is_some_and(|name| name.starts_with("venv-"))
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                tracing::debug!(path = %entry.path().display(), %error, "not removed");
            }
        }
    });
    if let Err(error) = removal.await {
        tracing::debug!(%error, "old tries not removed");
    }
}

/// The file that has the output of all commands.
struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    fn create(path: &Path) -> Result<Self, InstallError> {
        Ok(Self { path: path.to_owned(), file: File::create(path).map_err(file_error("create", path))? })
    }

    fn write(&mut self, line: &str) {
        // A full disk makes the command fail too, and that is told.
        let _ = writeln!(self.file, "{line}");
    }

    /// Runs a command to its end, with its output, both streams, line by line into the log.
    async fn run(
        &mut self,
        step: &'static str,
        mut command: Command,
        limit: Option<Duration>,
        mut on_line: impl FnMut(&str),
    ) -> Result<(), InstallError> {
        let program = PathBuf::from(command.as_std().get_program());
        let cannot_run = |source| InstallError::Run { program: program.clone(), source };
        self.write(&format!("== {step}: {:?}", command.as_std()));

        let (reader, writer) = io::pipe().map_err(cannot_run)?;
        let reader = pipe::Receiver::from_owned_fd(OwnedFd::from(reader)).map_err(cannot_run)?;
        clean(&mut command).stdin(Stdio::null()).stdout(writer.try_clone().map_err(cannot_run)?).stderr(writer);
        let mut child = command.spawn().map_err(cannot_run)?;
        // It holds the writing end, without which there would be no end of the output.
        drop(command);

        let mut quote = VecDeque::new();
        let mut cause = None;
        let mut reader = BufReader::new(reader);
        let work = async {
            let mut bytes = Vec::new();
            while reader.read_until(b'\n', &mut bytes).await? > 0 {
                let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
                bytes.clear();
                self.write(&line);
                on_line(&line);
                // A full disk shows once, and whatever follows may look like something else.
                cause = match (cause, cause_of(&line)) {
                    (Some(Cause::DiskFull), _) => cause,
                    (_, Some(found)) => Some(found),
                    _ => cause,
                };
                if !line.trim().is_empty() {
                    if quote.len() == QUOTED {
                        quote.pop_front();
                    }
                    quote.push_back(line.chars().take(300).collect::<String>());
                }
            }
            child.wait().await
        };
        let status = match limit {
            Some(limit) => tokio::time::timeout(limit, work).await,
            None => Ok(work.await),
        };
        let cause = match status {
            Ok(Ok(status)) if status.success() => return Ok(()),
            Ok(Ok(_)) => cause.unwrap_or(Cause::Unknown),
            Ok(Err(error)) => return Err(cannot_run(error)),
            Err(_) => {
                let _ = child.kill().await;
                Cause::TooSlow
            }
        };
        Err(InstallError::Failed { step, cause, quote: quote.into(), log: self.path.clone() })
    }
}

#[cfg(test)]
mod tests {
    use shared::sandbox::spec::AGENT_SERVER_VERSION;

    use super::*;
    use std::sync::Arc;
    use tempfile::TempDir;

    /// Writes an executable from another process: a file this one has open for writing, even in a
    /// child between fork and exec, cannot be run.
    fn script(path: &Path, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let done = std::process::Command::new("sh")
            .args(["-c", "printf '%s' \"$2\" > \"$1\" && chmod +x \"$1\"", "sh"])
            .arg(path)
            .arg(text)
            .status()
            .unwrap();
        assert!(done.success());
    }

    /// An interpreter that answers the probe.
    fn fake(path: &Path, answer: &str) {
        script(path, &format!("#!/bin/sh\necho noise\necho \"interpreter {answer} $0\"\n"));
    }

    fn on(folders: &[PathBuf]) -> WorkspaceLocator {
        WorkspaceLocator { path: folders.to_vec(), ..WorkspaceLocator::default() }
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
        // A shim of a version manager with that version not chosen.
        script(&a.join("python3.12"), "#!/bin/sh\necho 'command not found' >&2\nexit 127\n");
        fake(&b.join("python3.12"), "cpython 3.12.5 venv");
        let found = find_python_in(&on(&[a.clone(), b.clone()]), None).await.unwrap();
        assert_eq!(found.path, b.join("python3.12"));
        assert_eq!(found.version, version("3.12.5"));

        let found = find_python_in(&on(std::slice::from_ref(&a)), None).await.unwrap();
        assert_eq!(found.version, version("3.13.1"));

        // A newer one only when there is no tested one anywhere.
        fs::remove_file(a.join("python3.13")).unwrap();
        let found = find_python_in(&on(std::slice::from_ref(&a)), None).await.unwrap();
        assert_eq!(found.version, version("3.14.0"));
        let pyenv = root.path().join("pyenv");
        for name in ["3.11.7", "3.15.0", "3.12.2", "3.12.10", "pypy3.10"] {
            let number = name.trim_start_matches("pypy");
            fake(&pyenv.join("versions").join(name).join("bin/python"), &format!("cpython {number} venv"));
        }
        let places = WorkspaceLocator { pyenv: Some(pyenv), ..on(&[a]) };
        let found = find_python_in(&places, None).await.unwrap();
        assert_eq!(found.version, version("3.12.10"));
    }

    #[tokio::test]
    async fn uv_is_asked_last() {
        let root = TempDir::new().unwrap();
        let python = root.path().join("hidden/python3.13");
        fake(&python, "cpython 3.13.2 venv");
        let uv = root.path().join("uv");
        script(&uv, &format!("#!/bin/sh\ncase \"$*\" in *3.13) echo {};; *) exit 2;; esac\n", python.display()));
        let places = WorkspaceLocator { uv: Some(uv), ..WorkspaceLocator::default() };
        let found = find_python_in(&places, None).await.unwrap();
        assert_eq!(found.path, python);
    }

    #[tokio::test]
    async fn an_interpreter_that_is_no_use_is_told_why() {
        let root = TempDir::new().unwrap();
        let path = root.path().join("python");
        for (answer, wanted) in [
            ("cpython 3.11.7 venv", "is Python 3.11.7; 3.12 or newer"),
            ("pypy 3.12.1 venv", "is pypy 3.12.1; CPython"),
            ("cpython 3.12.3 bare", "apt install python3.12-venv"),
        ] {
            fake(&path, answer);
            let error = find_python_in(&WorkspaceLocator::default(), Some(&path)).await.unwrap_err();
            let text = error.to_string();
            assert!(text.starts_with(&format!("--python {}", path.display())), "{text}");
            assert!(text.contains(wanted), "{text}");
        }
        script(&path, "#!/bin/sh\n[ \"$1\" = --version ] && { echo Python 2.7.18 >&2; exit; }\nexit 2\n");
        let error = find_python_in(&WorkspaceLocator::default(), Some(&path)).await.unwrap_err();
        assert!(error.to_string().contains("is Python 2.7.18"), "{error}");

        script(&path, "#!/bin/sh\necho broken >&2\nexit 1\n");
        let error = find_python_in(&WorkspaceLocator::default(), Some(&path)).await.unwrap_err();
        assert!(error.to_string().contains("does not run: broken"), "{error}");

        let missing = root.path().join("none");
        let error = find_python_in(&WorkspaceLocator::default(), Some(&missing)).await.unwrap_err();
        assert_eq!(error, PythonError::Missing(missing));
    }

    #[tokio::test]
    async fn a_bare_name_is_looked_for_on_path() {
        let root = TempDir::new().unwrap();
        let path = root.path().join("python-mine");
        fake(&path, "cpython 3.14.2 venv");
        let places = on(&[root.path().to_owned()]);
        let found = find_python_in(&places, Some(Path::new("python-mine"))).await.unwrap();
        assert_eq!(found.path, path);
        let missing = Path::new("python-yours");
        let error = find_python_in(&places, Some(missing)).await.unwrap_err();
        assert_eq!(error.to_string(), "--python python-yours: no such file");
    }

    #[tokio::test]
    async fn nothing_found_says_how_to_get_one() {
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

    #[test]
    fn progress_is_read_from_pip() {
        let mut counter = Counter::new(3);
        let mut shown = Vec::new();
        for line in [
            "Collecting openhands-sdk==1.15.0",
            "  Downloading openhands_sdk-1.15.0-py3-none-any.whl (400 kB)",
            "Requirement already satisfied: pip in ./venv",
            "Collecting Jinja2[i18n]<4,>=3 (from litellm==1.80.10->openhands-sdk==1.15.0)",
            "Collecting jinja2<5 (from x)",
            "Building wheels for collected packages: func-timeout",
            "Installing collected packages: a, b, c",
            "Successfully installed a-1 b-2 c-3",
            "",
        ] {
            if let Some(Event::Installing { line, done, of }) = counter.read(line) {
                assert_eq!(of, 3);
                shown.push((line, done));
            }
        }
        let shown: Vec<_> = shown.iter().map(|(line, done)| (line.as_str(), *done)).collect();
        assert_eq!(
            shown,
            [("openhands-sdk", 1), ("jinja2", 2), ("jinja2", 2), ("writing files", 3), ("packages installed", 3)]
        );
    }

    #[test]
    fn progress_is_read_from_uv() {
        let mut counter = Counter::new(3);
        let mut shown = Vec::new();
        for line in [
            "Using Python 3.12.1 environment at: venv",
            "Resolved 3 packages in 6.56s",
            "Downloading openai (2.3MiB)",
            "   Building func-timeout==4.3.5",
            " Downloaded openai",
            "      Built func-timeout==4.3.5",
            "Prepared 3 packages in 8.00s",
            "Installed 3 packages in 300ms",
            " + wsproto==1.3.2",
        ] {
            if let Some(Event::Installing { line, done, .. }) = counter.read(line) {
                shown.push((line, done));
            }
        }
        let shown: Vec<_> = shown.iter().map(|(line, done)| (line.as_str(), *done)).collect();
        assert_eq!(
            shown,
            [
                ("versions chosen", 0),
                ("downloading openai", 1),
                ("building func-timeout", 2),
                ("downloaded openai", 2),
                ("built func-timeout", 2),
                ("writing files", 3),
                ("packages installed", 3)
            ]
        );
    }

    #[test]
    fn plain_lines_are_few() {
        let mut lines = PlainLines::default();
        let now = Instant::now();
        let event = |done| Event::Installing { line: "x".to_owned(), done, of: 9 };
        assert!(lines.line(&Event::Searching, None, now).is_none());
        assert!(lines.line(&event(1), None, now).unwrap().contains("(1/9)"));
        assert!(lines.line(&event(2), None, now + Duration::from_secs(1)).is_none());
        assert!(lines.line(&event(3), None, now + Duration::from_secs(6)).is_some());
        assert!(lines.line(&Event::Verifying, None, now + Duration::from_secs(7)).is_some());
        // Nothing was installed, so nothing is said.
        assert!(lines.line(&Event::Done, None, now).is_none());
        assert!(lines.line(&Event::Done, Some(Duration::from_secs(9)), now).is_some());
    }

    #[test]
    fn the_constraints_are_pins_and_name_what_is_installed() {
        for (release, constraints) in CONSTRAINTS {
            for line in constraints.lines().filter(|line| !line.starts_with('#')) {
                let (name, version) = line.split_once("==").unwrap();
                assert!(!name.is_empty() && version.starts_with(|c: char| c.is_ascii_digit()), "{release}: {line}");
                assert!(!line.contains(['/', '@', ' ']), "{release}: {line}");
            }
            for name in PACKAGES {
                assert!(constraints.lines().any(|line| line == format!("{name}=={release}")), "{release}: {name}");
            }
            assert!(Plan::of(release).packages() > 100);
        }
        assert!(CONSTRAINTS.iter().any(|(release, _)| *release == AGENT_SERVER_VERSION));
        // 1.15 does not run with later ones.
        assert!(Plan::of("1.15.0").constraints.lines().any(|line| line == "fastapi==0.135.1"));
    }

    #[test]
    fn a_release_without_constraints_is_installed_all_the_same() {
        let plan = Plan::of("1.52.0");
        assert_eq!(plan.requirements[0], "openhands-agent-server==1.52.0");
        assert_eq!((plan.constraints.as_str(), plan.packages()), ("", USUAL_PACKAGES));
    }

    #[test]
    fn uv_is_not_used_against_pip_settings() {
        assert!(uv_fits(|_| false, false));
        assert!(!uv_fits(|_| false, true));
        assert!(!uv_fits(|name| name == "PIP_INDEX_URL", false));
        assert!(uv_fits(|name| name == "PIP_INDEX_URL" || name == "UV_DEFAULT_INDEX", true));
    }

    #[test]
    fn causes_are_told_in_plain_words() {
        let text = |output: &str| {
            let cause = cause_of(output).unwrap_or(Cause::Unknown);
            let quote = [output.to_owned()];
            failed_text("Installing", cause, &quote, Path::new("/f/install.log"))
        };
        assert!(text("OSError: [Errno 28] No space left on device").contains("disk is full"));
        assert!(text("<...>: Failed to resolve: Name or service not known").contains("cannot be reached"));
        let other = text("ERROR: ResolutionImpossible");
        assert!(other.contains("\n  ERROR: ResolutionImpossible\n"), "{other}");
        assert!(other.ends_with("/f/install.log"), "{other}");
    }

    // -- the install, with an interpreter that only pretends

    /// Stands for a Python: notes its calls, makes a "virtual environment" with a copy of itself.
    const PRETENDER: &str = r#"#!/bin/sh
for last; do :; done
case "$*" in
*"-m venv"*)
    echo venv >> "ROOT/calls"
    mkdir -p "$last/bin" && cp "$0" "$last/bin/python" ;;
*"-m pip"*)
    echo pip >> "ROOT/calls"
    echo "Collecting a==1"
    if [ -f "ROOT/hang" ]; then echo $$ > "ROOT/pid"; exec sleep 60; fi
    if [ -f "ROOT/fail" ]; then echo "ERROR: no such thing" >&2; exit 1; fi
    sleep 0.3 ;;
*)
    echo smoke >> "ROOT/calls"
    if [ -f "ROOT/slow" ]; then exec sleep 60; fi ;;
esac
"#;

    struct Stage {
        root: TempDir,
        plan: Plan,
        python: Python,
    }

    impl Stage {
        fn new() -> Self {
            let root = TempDir::new().unwrap();
            let path = root.path().join("python");
            let place = root.path().to_str().unwrap();
            script(&path, &PRETENDER.replace("ROOT", place));
            Self {
                plan: Plan {
                    version: "1.0.0".to_owned(),
                    constraints: "a==1\nb==2\n".to_owned(),
                    requirements: vec!["a==1".to_owned()],
                    smoke: "import a".to_owned(),
                    smoke_limit: Duration::from_secs(30),
                    uv: None,
                },
                python: Python { path, version: version("3.12.1") },
                root,
            }
        }

        fn folder(&self) -> PathBuf {
            self.root.path().join("state")
        }

        fn home(&self) -> PathBuf {
            self.plan.home(&self.folder(), self.python.version)
        }

        fn flag(&self, name: &str, on: bool) {
            let path = self.root.path().join(name);
            if on {
                fs::write(path, "").unwrap();
            } else {
                fs::remove_file(path).unwrap();
            }
        }

        fn calls(&self) -> String {
            let calls = fs::read_to_string(self.root.path().join("calls")).unwrap_or_default();
            calls.replace('\n', " ").trim().to_owned()
        }

        fn venvs(&self) -> usize {
            let entries = fs::read_dir(self.home()).unwrap().flatten();
            entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("venv-")).count()
        }

        async fn install(&self, progress: &dyn Progress) -> Result<AgentServer, InstallError> {
            install_plan(&self.plan, &self.folder(), &self.python, progress).await
        }
    }

    #[derive(Default)]
    struct Recorder(Mutex<Vec<Event>>);

    impl Recorder {
        fn events(&self) -> Vec<Event> {
            self.0.lock().unwrap().clone()
        }
    }

    impl Progress for Recorder {
        fn report(&self, event: Event) {
            self.0.lock().unwrap().push(event);
        }
    }

    #[tokio::test]
    async fn an_install_is_done_once() {
        let stage = Stage::new();
        assert_eq!(stage.plan.find_complete(&stage.folder()), None);
        let progress = Recorder::default();
        let server = stage.install(&progress).await.unwrap();
        assert_eq!(stage.calls(), "venv pip smoke");
        assert!(server.python.is_absolute() && server.python.exists());
        assert_eq!(server.version, "1.0.0");
        let events = progress.events();
        assert!(events.contains(&Event::Installing { line: "a".to_owned(), done: 1, of: 2 }));
        assert_eq!(events[events.len() - 2..], [Event::Verifying, Event::Done]);
        let log = fs::read_to_string(stage.folder().join("agent-server-install.log")).unwrap();
        assert!(log.contains("Collecting a==1"), "{log}");

        let progress = Recorder::default();
        assert_eq!(stage.install(&progress).await.unwrap(), server);
        assert_eq!(stage.calls(), "venv pip smoke");
        assert_eq!(progress.events(), [Event::Done]);
        assert_eq!(stage.plan.find_complete(&stage.folder()), Some(server.clone()));

        // Its interpreter has gone.
        fs::remove_file(&server.python).unwrap();
        assert_eq!(stage.plan.find_complete(&stage.folder()), None);
        let again = stage.install(&()).await.unwrap();
        assert_ne!(again, server);
        assert_eq!(stage.venvs(), 1);
    }

    #[tokio::test]
    async fn other_versions_are_kept_apart() {
        let mut stage = Stage::new();
        let first = stage.install(&()).await.unwrap();
        stage.plan.constraints.push_str("c==3\n");
        assert_eq!(stage.plan.find_complete(&stage.folder()), None);
        let second = stage.install(&()).await.unwrap();
        stage.python.version = version("3.13.0");
        let third = stage.install(&()).await.unwrap();
        assert!(first.python.exists());
        assert_ne!(first, second);
        assert_ne!(second, third);
        assert_eq!(stage.plan.find_complete(&stage.folder()), Some(second));
    }

    #[tokio::test]
    async fn two_at_once_install_once() {
        let stage = Arc::new(Stage::new());
        let run = |stage: Arc<Stage>| {
            tokio::spawn(async move {
                let progress = Recorder::default();
                let server = stage.install(&progress).await.unwrap();
                (server, progress.events().contains(&Event::Waiting))
            })
        };
        let (a, b) = (run(stage.clone()), run(stage.clone()));
        let (a, b) = (a.await.unwrap(), b.await.unwrap());
        assert_eq!(a.0, b.0);
        assert!(a.1 != b.1);
        assert_eq!(stage.calls(), "venv pip smoke");
    }

    #[tokio::test]
    async fn an_install_given_up_is_ended_and_made_anew() {
        let stage = Stage::new();
        stage.flag("hang", true);
        let pid = stage.root.path().join("pid");
        tokio::select! {
            _ = stage.install(&()) => panic!("it hangs"),
            () = async {
                while fs::read_to_string(&pid).unwrap_or_default().trim().is_empty() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            } => {}
        }
        let pid: i32 = fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        // Dead, though it may take a moment until it is waited for.
        let limit = Instant::now() + Duration::from_secs(10);
        while rustix::process::test_kill_process(pid).is_ok() {
            assert!(Instant::now() < limit, "pip still runs");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(stage.venvs(), 1);
        assert_eq!(stage.plan.find_complete(&stage.folder()), None);

        stage.flag("hang", false);
        let progress = Recorder::default();
        let server = stage.install(&progress).await.unwrap();
        assert!(server.python.exists());
        assert!(!progress.events().contains(&Event::Waiting));
        assert_eq!(stage.calls(), "venv pip venv pip smoke");
        assert_eq!(stage.venvs(), 1);
    }

    #[tokio::test]
    async fn a_failed_install_is_told_and_made_anew() {
        let stage = Stage::new();
        stage.flag("fail", true);
        let text = stage.install(&()).await.unwrap_err().to_string();
        assert!(text.contains("\n  ERROR: no such thing\n"), "{text}");
        assert!(text.contains("agent-server-install.log"), "{text}");
        assert_eq!(stage.venvs(), 0);
        stage.flag("fail", false);
        stage.install(&()).await.unwrap();
    }

    #[tokio::test]
    async fn what_does_not_start_is_not_complete() {
        let mut stage = Stage::new();
        stage.flag("slow", true);
        stage.plan.smoke_limit = Duration::from_millis(300);
        let text = stage.install(&()).await.unwrap_err().to_string();
        assert!(text.contains("took too long"), "{text}");
        assert_eq!(stage.plan.find_complete(&stage.folder()), None);
    }

    #[tokio::test]
    async fn a_folder_that_cannot_be_made_is_told() {
        let mut stage = Stage::new();
        let file = stage.root.path().join("file");
        fs::write(&file, "").unwrap();
        let text = install_plan(&stage.plan, &file.join("x"), &stage.python, &()).await.unwrap_err().to_string();
        assert!(text.starts_with("Cannot create "), "{text}");
        stage.python.path = stage.root.path().join("gone");
        let text = stage.install(&()).await.unwrap_err().to_string();
        assert!(text.starts_with("Cannot run "), "{text}");
    }

    #[test]
    fn the_futures_can_be_spawned() {
        fn sendable<T: Send>(_: T) {}
        sendable(ensure(Path::new("x"), AGENT_SERVER_VERSION, None, Terminal::new()));
    }
}
