//! Installs the agent server into a virtual environment, with uv or pip.

use std::collections::VecDeque;
use std::env;
use std::fmt::Write as _;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::process::Command;
use uuid::Uuid;

use super::progress::{InstallerOutput, Progress};
use super::python::{on_path, search_path, without_python_variables};
use super::{AgentServer, Event, Python, PythonVersion};

/// The tested releases, each with the pinned versions of its dependencies. For other releases the installer chooses the versions.
const CONSTRAINTS: [(&str, &str); 3] = [
    ("1.58.2", include_str!("../../agent-server-constraints/1.58.2.txt")),
    ("1.49.1", include_str!("../../agent-server-constraints/1.49.1.txt")),
    ("1.15.0", include_str!("../../agent-server-constraints/1.15.0.txt")),
];

/// The estimated number of packages of a release without constraints.
const ESTIMATED_PACKAGES: usize = 195;

/// The agent server imports the tools, but its package does not declare this dependency. The fourth package of the family, the
/// workspace package, is only needed by clients.
const PACKAGES: [&str; 3] = ["openhands-agent-server", "openhands-sdk", "openhands-tools"];

/// Imports the modules that a start and a first conversation import, which also compiles their bytecode. Compiling all installed
/// modules takes longer and speeds up no start further.
const SMOKE_TEST: &str = "\
import openhands.agent_server.__main__, openhands.agent_server.api, \
openhands.tools.preset.default, openhands.tools.browser_use.impl, \
uvicorn.protocols.http.h11_impl, uvicorn.protocols.websockets.wsproto_impl, uvicorn.lifespan.on";

const SMOKE_TEST_TIMEOUT: Duration = Duration::from_secs(300);
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(200);
/// The number of output lines that an error quotes.
const QUOTED_LINES: usize = 12;

/// Why the agent server could not be installed. The message is written for the user of the program.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The folder or a file in it cannot be written, read or locked.
    #[error("Cannot {doing} {}: {}", path.display(), io_text(source))]
    File {
        /// The operation, such as `write`.
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// A command of the install cannot be run.
    #[error("Cannot run {}: {source}", program.display())]
    Run { program: PathBuf, source: io::Error },
    /// A command of the install failed.
    #[error("{}", failed_text(.step, *.cause, .quote, .log))]
    Failed {
        /// The purpose of the command.
        step: &'static str,
        cause: Cause,
        /// The last lines of its output.
        quote: Vec<String>,
        /// The file that contains the whole output.
        log: PathBuf,
    },
}

/// The cause of a failed command, derived from its output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// No space is left in the install folder, or for temporary files.
    DiskFull,
    /// The package index could not be reached.
    Network,
    /// The command exceeded its time limit.
    TooSlow,
    /// Another cause; see the quoted output.
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
            "{step} failed: the package index cannot be reached. Only the first start needs the network. \
             (To use a mirror or a proxy, set PIP_INDEX_URL, PIP_PROXY or another of pip's settings. \
             `--sandbox none` needs no agent server.)"
        ),
        Cause::TooSlow => format!("{step} failed: it exceeded its time limit."),
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

/// Derives the cause of a failure from a line of output.
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

/// The packages to install, their pinned dependencies and the installer.
pub(super) struct InstallSpec {
    version: String,
    constraints: String,
    requirements: Vec<String>,
    smoke_test: String,
    smoke_test_timeout: Duration,
    /// `None` to use the virtual environment's own pip.
    uv: Option<PathBuf>,
}

impl InstallSpec {
    /// The install of a release, with pinned dependencies if it is one of [`CONSTRAINTS`].
    pub(super) fn of(version: &str) -> Self {
        let path = search_path();
        let uv = on_path(&path, "uv").next();
        let set = |name: &str| env::var_os(name).is_some_and(|value| !value.is_empty());
        let constraints = CONSTRAINTS.iter().find(|(tested, _)| *tested == version).map(|(_, pins)| *pins);
        Self {
            version: version.to_owned(),
            constraints: constraints.unwrap_or_default().to_owned(),
            requirements: PACKAGES.iter().map(|name| format!("{name}=={version}")).collect(),
            smoke_test: SMOKE_TEST.to_owned(),
            smoke_test_timeout: SMOKE_TEST_TIMEOUT,
            uv: uv.filter(|_| prefers_uv(set, pip_files_exist())),
        }
    }

    fn packages(&self) -> usize {
        match self.constraints.lines().filter(|line| line.contains("==")).count() {
            0 => ESTIMATED_PACKAGES,
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

    /// Returns the finished install in this folder, if its marker exists. Runs no process.
    fn complete(&self, home: &Path) -> Option<AgentServer> {
        let name = fs::read_to_string(home.join("complete")).ok()?;
        let name = name.trim();
        if !name.starts_with("venv-") || name.contains('/') {
            return None;
        }
        let python = home.join(name).join("bin/python");
        // `exists` follows links: it is also false if the Python from which the environment was created is gone.
        python.exists().then(|| AgentServer { python, version: self.version.clone() })
    }

    /// Returns a finished install for any Python.
    pub(super) fn find_complete(&self, folder: &Path) -> Option<AgentServer> {
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

/// Whether to install with uv, which is faster than pip but ignores pip's settings. If pip has settings for the source of packages
/// and uv has none, pip is used.
fn prefers_uv(set: impl Fn(&str) -> bool, pip_files: bool) -> bool {
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

/// Installs this version of the agent server into a virtual environment in the folder, unless it is installed. Tested versions get
/// pinned dependencies. If several processes call this at the same time, one installs and the others wait for it. An interrupted
/// install is repeated from the beginning. Dropping the future kills the installer.
///
/// # Errors
/// The folder cannot be written, or a command failed. The error then quotes the end of its output and names the file that
/// contains all of it.
pub async fn install(
    folder: &Path,
    version: &str,
    python: &Python,
    progress: impl Progress,
) -> Result<AgentServer, InstallError> {
    install_spec(&InstallSpec::of(version), folder, python, &progress).await
}

async fn install_spec(
    spec: &InstallSpec,
    folder: &Path,
    python: &Python,
    progress: &dyn Progress,
) -> Result<AgentServer, InstallError> {
    // Sandboxes have other working directories, so their paths have to be absolute.
    let folder = std::path::absolute(folder).map_err(file_error("find", folder))?;
    let home = spec.home(&folder, python.version);
    if let Some(server) = spec.complete(&home) {
        progress.report(Event::Done);
        return Ok(server);
    }
    fs::create_dir_all(&home).map_err(file_error("create", &home))?;
    // Released when dropped, and by the system when this process is killed.
    let _lock = lock(&folder.join("agent-server-install.lock"), progress).await?;
    if let Some(server) = spec.complete(&home) {
        progress.report(Event::Done);
        return Ok(server);
    }
    remove_old_attempts(&home).await;

    let name = format!("venv-{:08x}", Uuid::new_v4().as_fields().0);
    let venv = home.join(&name);
    let built = build(spec, &folder, &home, &venv, python, progress).await;
    if let Err(error) = built {
        remove_old_attempts(&home).await;
        return Err(error);
    }
    let marker = home.join("complete");
    let draft = home.join("complete.new");
    fs::write(&draft, format!("{name}\n")).map_err(file_error("write", &draft))?;
    fs::rename(&draft, &marker).map_err(file_error("write", &marker))?;
    progress.report(Event::Done);
    Ok(AgentServer { python: venv.join("bin/python"), version: spec.version.clone() })
}

/// Creates the virtual environment, installs the packages and runs the smoke test.
async fn build(
    spec: &InstallSpec,
    folder: &Path,
    home: &Path,
    venv: &Path,
    python: &Python,
    progress: &dyn Progress,
) -> Result<(), InstallError> {
    let of = spec.packages();
    let start = |line: &str| Event::Installing { line: line.to_owned(), done: 0, of };
    let constraints = home.join("constraints.txt");
    fs::write(&constraints, &spec.constraints).map_err(file_error("write", &constraints))?;
    let mut log = Log::create(&folder.join("agent-server-install.log"))?;

    progress.report(start("creating a virtual environment"));
    let mut command = Command::new(&python.path);
    command.args(["-I", "-m", "venv"]);
    if spec.uv.is_some() {
        command.arg("--without-pip");
    }
    command.arg(venv);
    log.run("Creating a virtual environment", command, None, |_| {}).await?;

    progress.report(start("choosing versions"));
    let interpreter = venv.join("bin/python");
    let mut command = installer(spec, &interpreter);
    command.arg("--constraint").arg(&constraints);
    // The working directory is set because uv reads settings from a project file in or above it.
    command.args(&spec.requirements).current_dir(home);
    let mut output = InstallerOutput::new(of);
    log.run("Installing the agent server", command, None, |line| {
        if let Some(event) = output.read(line) {
            progress.report(event);
        }
    })
    .await?;

    progress.report(Event::Verifying);
    let mut command = Command::new(&interpreter);
    command.args(["-I", "-c", &spec.smoke_test]).env("OPENHANDS_SUPPRESS_BANNER", "1").current_dir(home);
    // The agent server reads its settings on import; those of this process are for sandboxes only.
    for (name, _) in env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"OH_") {
            command.env_remove(name);
        }
    }
    let limit = Some(spec.smoke_test_timeout);
    log.run("Checking the agent server", command, limit, |_| {}).await
}

/// The install command, without constraints and requirements.
fn installer(spec: &InstallSpec, interpreter: &Path) -> Command {
    if let Some(uv) = &spec.uv {
        let mut command = Command::new(uv);
        command.args(["pip", "install", "--color", "never", "--no-progress", "--python"]);
        command.arg(interpreter);
        return command;
    }
    let mut command = Command::new(interpreter);
    // Unbuffered (`-u`), so that progress is shown as it happens.
    command.args(["-I", "-u", "-m", "pip", "install"]);
    command.args([
        "--no-input",
        "--no-color",
        "--no-compile",
        "--no-warn-script-location",
        "--disable-pip-version-check",
    ]);
    command.args(["--progress-bar", "off"]);
    // The user's settings apply, except those that would install elsewhere, skip packages, or suppress output. (Setting a variable
    // to 0 also overrides the settings file.)
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

/// Acquires the lock. Waits while another process holds it.
async fn lock(path: &Path, progress: &dyn Progress) -> Result<File, InstallError> {
    let file = File::options().create(true).truncate(false).write(true).open(path).map_err(file_error("open", path))?;
    let mut has_reported = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {
                if !has_reported {
                    has_reported = true;
                    progress.report(Event::Waiting);
                }
                // Polling, because a blocking lock call could not be cancelled.
                tokio::time::sleep(LOCK_POLL_INTERVAL).await;
            }
            Err(TryLockError::Error(error)) => return Err(file_error("lock", path)(error)),
        }
    }
}

/// Removes the attempts that did not finish. The caller holds the lock.
async fn remove_old_attempts(home: &Path) {
    let home = home.to_owned();
    // An installer that is still being killed may write meanwhile; the next call removes those files.
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
                tracing::debug!(path = %entry.path().display(), %error, "agent_server.attempt_removal_failed");
            }
        }
    });
    if let Err(error) = removal.await {
        tracing::debug!(%error, "agent_server.attempt_removal_failed");
    }
}

/// The file that collects the output of all commands.
struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    fn create(path: &Path) -> Result<Self, InstallError> {
        Ok(Self { path: path.to_owned(), file: File::create(path).map_err(file_error("create", path))? })
    }

    fn write(&mut self, line: &str) {
        // Ignored: a full disk also makes the command fail, and that failure is reported.
        let _ = writeln!(self.file, "{line}");
    }

    /// Runs a command to its end and writes its output, both streams, line by line to the log.
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
        without_python_variables(&mut command)
            .stdin(Stdio::null())
            .stdout(writer.try_clone().map_err(cannot_run)?)
            .stderr(writer);
        let mut child = command.spawn().map_err(cannot_run)?;
        // `command` holds the writing end of the pipe: until it is dropped, the output has no end.
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
                // A full disk is reported once, and the errors that follow may look like another cause.
                cause = match (cause, cause_of(&line)) {
                    (Some(Cause::DiskFull), _) => cause,
                    (_, Some(found)) => Some(found),
                    _ => cause,
                };
                if !line.trim().is_empty() {
                    if quote.len() == QUOTED_LINES {
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
    use std::sync::{Arc, Mutex};
    use std::time::Instant;

    use shared::sandbox::spec::AGENT_SERVER_VERSION;
    use tempfile::TempDir;

    use super::super::python::tests::script;
    use super::super::{Terminal, ensure};
    use super::*;

    fn version(text: &str) -> PythonVersion {
        text.parse().unwrap()
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
            assert!(InstallSpec::of(release).packages() > 100);
        }
        assert!(CONSTRAINTS.iter().any(|(release, _)| *release == AGENT_SERVER_VERSION));
        // 1.15 does not run with later versions.
        assert!(InstallSpec::of("1.15.0").constraints.lines().any(|line| line == "fastapi==0.135.1"));
    }

    #[test]
    fn a_release_without_constraints_can_be_installed() {
        let spec = InstallSpec::of("1.52.0");
        assert_eq!(spec.requirements[0], "openhands-agent-server==1.52.0");
        assert_eq!((spec.constraints.as_str(), spec.packages()), ("", ESTIMATED_PACKAGES));
    }

    #[test]
    fn uv_is_not_used_against_pip_settings() {
        assert!(prefers_uv(|_| false, false));
        assert!(!prefers_uv(|_| false, true));
        assert!(!prefers_uv(|name| name == "PIP_INDEX_URL", false));
        assert!(prefers_uv(|name| name == "PIP_INDEX_URL" || name == "UV_DEFAULT_INDEX", true));
    }

    #[test]
    fn errors_name_the_cause() {
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

    /// A fake Python that records its calls and creates a "virtual environment" with a copy of itself.
    const FAKE_PYTHON: &str = r#"#!/bin/sh
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

    struct Fixture {
        root: TempDir,
        spec: InstallSpec,
        python: Python,
    }

    impl Fixture {
        fn new() -> Self {
            let root = TempDir::new().unwrap();
            let path = root.path().join("python");
            let folder = root.path().to_str().unwrap();
            script(&path, &FAKE_PYTHON.replace("ROOT", folder));
            Self {
                spec: InstallSpec {
                    version: "1.0.0".to_owned(),
                    constraints: "a==1\nb==2\n".to_owned(),
                    requirements: vec!["a==1".to_owned()],
                    smoke_test: "import a".to_owned(),
                    smoke_test_timeout: Duration::from_secs(30),
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
            self.spec.home(&self.folder(), self.python.version)
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
            install_spec(&self.spec, &self.folder(), &self.python, progress).await
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
        let fixture = Fixture::new();
        assert_eq!(fixture.spec.find_complete(&fixture.folder()), None);
        let progress = Recorder::default();
        let server = fixture.install(&progress).await.unwrap();
        assert_eq!(fixture.calls(), "venv pip smoke");
        assert!(server.python.is_absolute() && server.python.exists());
        assert_eq!(server.version, "1.0.0");
        let events = progress.events();
        assert!(events.contains(&Event::Installing { line: "a".to_owned(), done: 1, of: 2 }));
        assert_eq!(events[events.len() - 2..], [Event::Verifying, Event::Done]);
        let log = fs::read_to_string(fixture.folder().join("agent-server-install.log")).unwrap();
        assert!(log.contains("Collecting a==1"), "{log}");

        let progress = Recorder::default();
        assert_eq!(fixture.install(&progress).await.unwrap(), server);
        assert_eq!(fixture.calls(), "venv pip smoke");
        assert_eq!(progress.events(), [Event::Done]);
        assert_eq!(fixture.spec.find_complete(&fixture.folder()), Some(server.clone()));

        // The interpreter is gone.
        fs::remove_file(&server.python).unwrap();
        assert_eq!(fixture.spec.find_complete(&fixture.folder()), None);
        let again = fixture.install(&()).await.unwrap();
        assert_ne!(again, server);
        assert_eq!(fixture.venvs(), 1);
    }

    #[tokio::test]
    async fn versions_are_installed_separately() {
        let mut fixture = Fixture::new();
        let first = fixture.install(&()).await.unwrap();
        fixture.spec.constraints.push_str("c==3\n");
        assert_eq!(fixture.spec.find_complete(&fixture.folder()), None);
        let second = fixture.install(&()).await.unwrap();
        fixture.python.version = version("3.13.0");
        let third = fixture.install(&()).await.unwrap();
        assert!(first.python.exists());
        assert_ne!(first, second);
        assert_ne!(second, third);
        assert_eq!(fixture.spec.find_complete(&fixture.folder()), Some(second));
    }

    #[tokio::test]
    async fn two_at_once_install_once() {
        let fixture = Arc::new(Fixture::new());
        let run = |fixture: Arc<Fixture>| {
            tokio::spawn(async move {
                let progress = Recorder::default();
                let server = fixture.install(&progress).await.unwrap();
                (server, progress.events().contains(&Event::Waiting))
            })
        };
        let (a, b) = (run(fixture.clone()), run(fixture.clone()));
        let (a, b) = (a.await.unwrap(), b.await.unwrap());
        assert_eq!(a.0, b.0);
        assert!(a.1 != b.1);
        assert_eq!(fixture.calls(), "venv pip smoke");
    }

    #[tokio::test]
    async fn a_cancelled_install_is_killed_and_repeated() {
        let fixture = Fixture::new();
        fixture.flag("hang", true);
        let pid = fixture.root.path().join("pid");
        tokio::select! {
            _ = fixture.install(&()) => panic!("it hangs"),
            () = async {
                while fs::read_to_string(&pid).unwrap_or_default().trim().is_empty() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            } => {}
        }
        let pid: i32 = fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        // The process is dead, but it may take a moment until it is reaped.
        let limit = Instant::now() + Duration::from_secs(10);
        while rustix::process::test_kill_process(pid).is_ok() {
            assert!(Instant::now() < limit, "pip still runs");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(fixture.venvs(), 1);
        assert_eq!(fixture.spec.find_complete(&fixture.folder()), None);

        fixture.flag("hang", false);
        let progress = Recorder::default();
        let server = fixture.install(&progress).await.unwrap();
        assert!(server.python.exists());
        assert!(!progress.events().contains(&Event::Waiting));
        assert_eq!(fixture.calls(), "venv pip venv pip smoke");
        assert_eq!(fixture.venvs(), 1);
    }

    #[tokio::test]
    async fn a_failed_install_is_reported_and_repeated() {
        let fixture = Fixture::new();
        fixture.flag("fail", true);
        let text = fixture.install(&()).await.unwrap_err().to_string();
        assert!(text.contains("\n  ERROR: no such thing\n"), "{text}");
        assert!(text.contains("agent-server-install.log"), "{text}");
        assert_eq!(fixture.venvs(), 0);
        fixture.flag("fail", false);
        fixture.install(&()).await.unwrap();
    }

    #[tokio::test]
    async fn an_install_that_fails_its_smoke_test_is_not_complete() {
        let mut fixture = Fixture::new();
        fixture.flag("slow", true);
        fixture.spec.smoke_test_timeout = Duration::from_millis(300);
        let text = fixture.install(&()).await.unwrap_err().to_string();
        assert!(text.contains("exceeded its time limit"), "{text}");
        assert_eq!(fixture.spec.find_complete(&fixture.folder()), None);
    }

    #[tokio::test]
    async fn a_folder_that_cannot_be_created_is_reported() {
        let mut fixture = Fixture::new();
        let file = fixture.root.path().join("file");
        fs::write(&file, "").unwrap();
        let text = install_spec(&fixture.spec, &file.join("x"), &fixture.python, &()).await.unwrap_err().to_string();
        assert!(text.starts_with("Cannot create "), "{text}");
        fixture.python.path = fixture.root.path().join("gone");
        let text = fixture.install(&()).await.unwrap_err().to_string();
        assert!(text.starts_with("Cannot run "), "{text}");
    }

    #[test]
    fn the_futures_can_be_spawned() {
        fn sendable<T: Send>(_: T) {}
        sendable(ensure(Path::new("x"), AGENT_SERVER_VERSION, None, Terminal::new()));
    }
}
