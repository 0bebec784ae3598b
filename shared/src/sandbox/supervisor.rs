//! Boots agent servers by fork: [`Supervisor`] runs `supervisor.py`, which imports the agent server's modules once, and [`fork`] requests
//! a process from it. Every process that knows the folder may request one; only its owner runs the supervisor.
//!
//! The files in the supervisor's folder, which has mode 0700:
//!
//! ```text
//! supervisor-<version>.py      the program
//! supervisor-<version>.sock    its socket; <version> is a digest of the program, the interpreter and the agent server's version
//! supervisor.pid               its process id and start time
//! supervisor.log               its errors
//! ```
//!
//! The socket gives its clients nothing that they do not have: a process that they start themselves can do the same, and the supervisor
//! knows no secrets. It only forks for processes of its own user.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, IoSlice, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::Stdio;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, BufReader as AsyncBufReader};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use super::config::ProcessSandboxConfig;
use super::proc::{self, StartTime};
use crate::digest::sha256_hex;

/// The program of the boot supervisor, as `supervisor.py`.
pub const PROGRAM: &str = include_str!("supervisor.py");
/// The environment variables of the supervisor: those that modules read while they are imported, as far as they are the same for all
/// sandboxes and contain no secrets. With another value in a request, the supervisor executes a new Python.
const PASSED_ON: [&str; 10] = [
    "LANG",
    "LANGUAGE",
    "LC_ALL",
    "LC_CTYPE",
    "TERM",
    "TZ",
    "TMPDIR",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
];
/// How long a client waits for a process. A supervisor that was just started imports modules first, which takes 6 s, and more on a
/// busy machine.
const FORK_TIMEOUT: Duration = Duration::from_secs(60);
/// The delay before a supervisor that has ended is started again. It doubles with each that ends early.
const FIRST_DELAY: Duration = Duration::from_secs(1);
const LONGEST_DELAY: Duration = Duration::from_secs(60);
/// A supervisor that has run for this time has not ended early.
const LONG: Duration = Duration::from_secs(60);
const LAST_LINE_CHARS: usize = 300;

/// How agent servers of this machine boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BootState {
    /// The supervisor imports modules. It accepts requests already, and boots wait for it.
    Preparing,
    /// Agent servers are forked.
    Fork,
    /// Each agent server is a new Python, for this reason.
    Plain(String),
}

/// Runs the supervisor of a folder.
#[derive(Debug)]
pub struct Supervisor {
    files: Files,
    python: PathBuf,
}

/// The files of a supervisor.
#[derive(Clone, Debug)]
struct Files {
    folder: PathBuf,
    version: String,
}

impl Files {
    fn of(config: &ProcessSandboxConfig) -> Self {
        let python = config.python.display();
        let version = sha256_hex(&format!("{PROGRAM}\n{python}\n{}", config.version))[..12].to_owned();
        // No sandbox has an id that begins with a dot.
        Self { folder: config.folder.join(".boot"), version }
    }

    fn program(&self) -> PathBuf {
        self.folder.join(format!("supervisor-{}.py", self.version))
    }

    fn socket_name(&self) -> String {
        format!("supervisor-{}.sock", self.version)
    }

    fn pid(&self) -> PathBuf {
        self.folder.join("supervisor.pid")
    }

    fn log(&self) -> PathBuf {
        self.folder.join("supervisor.log")
    }
}

impl Supervisor {
    /// The supervisor for these sandboxes. It does not run yet.
    #[must_use]
    pub fn new(config: &ProcessSandboxConfig) -> Self {
        Self { files: Files::of(config), python: config.python.clone() }
    }

    /// Runs the supervisor until `stop`, and again whenever it ends. Reports each state. Returns early when agent servers cannot be forked
    /// on this machine or in this version. The supervisor ends before this function returns, and by itself when this process ends.
    pub async fn run(&self, stop: impl Future<Output = ()> + Send, report: impl Fn(BootState) + Send + Sync) {
        let mut stop = pin!(stop);
        let mut delay = FIRST_DELAY;
        loop {
            let started = Instant::now();
            let reason = match self.run_once(stop.as_mut(), &report).await {
                Ok(Ended::Stopped) => return,
                Ok(Ended::Refused(reason)) => {
                    tracing::warn!(reason, "supervisor.refused");
                    report(BootState::Plain(reason));
                    // Without a socket, a boot does not try to fork.
                    let _gone = fs::remove_file(self.files.folder.join(self.files.socket_name()));
                    return;
                }
                Ok(Ended::Crashed(reason)) => reason,
                Err(error) => format!("the supervisor cannot be started: {error}"),
            };
            if started.elapsed() > LONG {
                delay = FIRST_DELAY;
            }
            tracing::warn!(reason, "supervisor.ended");
            report(BootState::Plain(reason));
            tokio::select! {
                () = sleep(delay) => {}
                () = stop.as_mut() => return,
            }
            delay = (delay * 2).min(LONGEST_DELAY);
        }
    }

    async fn run_once(
        &self,
        stop: impl Future<Output = ()> + Send,
        report: &(impl Fn(BootState) + Sync),
    ) -> io::Result<Ended> {
        self.prepare_folder()?;
        let mut child = self.spawn()?;
        // The supervisor ends when this is closed.
        let _owner = child.stdin.take();
        let ended = tokio::select! {
            ended = self.follow(&mut child, report) => Some(ended?),
            () = stop => None,
        };
        let Some(ended) = ended else {
            child.kill().await?;
            return Ok(Ended::Stopped);
        };
        Ok(ended)
    }

    /// Reports the states of a supervisor until it ends.
    async fn follow(&self, child: &mut Child, report: &(impl Fn(BootState) + Sync)) -> io::Result<Ended> {
        let mut refusal = None;
        if let Some(output) = child.stdout.take() {
            let mut lines = AsyncBufReader::new(output).lines();
            while let Some(line) = lines.next_line().await? {
                if let Some(reason) = line.strip_prefix("refused: ") {
                    refusal = Some(reason.to_owned());
                    report(BootState::Plain(reason.to_owned()));
                } else if line == "listening" {
                    report(BootState::Preparing);
                } else if line == "ready" {
                    tracing::info!("supervisor.ready");
                    report(BootState::Fork);
                }
            }
        }
        let status = child.wait().await?;
        Ok(match refusal {
            Some(reason) => Ended::Refused(reason),
            None => Ended::Crashed(format!("the supervisor has ended ({status}{})", self.last_line())),
        })
    }

    /// Creates the folder with the program, and ends a supervisor of an earlier run that is left.
    fn prepare_folder(&self) -> io::Result<()> {
        let files = &self.files;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&files.folder)?;
        if let Some((pid, started)) = proc::read_start(&files.pid())
            && proc::start_time(pid) == Some(started)
        {
            tracing::info!(pid = pid.as_raw_nonzero(), "supervisor.replaced");
            let _gone = kill_process(pid, Signal::KILL);
        }
        for entry in fs::read_dir(&files.folder)? {
            let path = entry?.path();
            let is_of_a_version = path.extension().is_some_and(|extension| extension == "py" || extension == "sock");
            if is_of_a_version && path != files.program() {
                fs::remove_file(path)?;
            }
        }
        let draft = files.folder.join("supervisor.new");
        let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&draft)?;
        file.write_all(PROGRAM.as_bytes())?;
        fs::rename(draft, files.program())
    }

    fn spawn(&self) -> io::Result<Child> {
        let files = &self.files;
        let log = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(files.log())?;
        let child = Command::new(&self.python)
            .arg(files.program())
            .arg(files.folder.join(files.socket_name()))
            // A shell that executes the interpreter exports the working directory, and processes of sandboxes are found by their folder.
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::from(log))
            // Ctrl-C for this process does not reach it.
            .process_group(0)
            .kill_on_drop(true)
            .env_clear()
            .envs(PASSED_ON.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
            .env("LITELLM_LOCAL_MODEL_COST_MAP", "True")
            .spawn()?;
        if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed()))
            && let Some(started) = proc::start_time(pid)
        {
            proc::write_start(&files.pid(), pid, &started)?;
        }
        Ok(child)
    }

    /// The last line of its errors, such as that of a traceback.
    fn last_line(&self) -> String {
        let text = fs::read(self.files.log()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.lines()
            .last()
            .map_or_else(String::new, |line| format!("; {}", line.chars().take(LAST_LINE_CHARS).collect::<String>()))
    }
}

/// Why the supervisor has ended.
enum Ended {
    /// This process has ended it.
    Stopped,
    /// It cannot fork.
    Refused(String),
    Crashed(String),
}

/// What a forked process becomes.
#[derive(Debug)]
pub(super) struct ForkRequest {
    pub arguments: Vec<String>,
    pub environment: BTreeMap<String, OsString>,
    pub folder: PathBuf,
    pub stdin: File,
    /// Standard output and standard error.
    pub output: File,
}

#[derive(Serialize)]
struct Request<'a> {
    arguments: &'a [String],
    environment: BTreeMap<&'a str, &'a str>,
    folder: &'a str,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Forked {
        pid: i32,
        boot: String,
        /// Why a new Python is executed.
        reason: Option<String>,
    },
    Refused {
        error: String,
    },
}

/// Requests a process from the supervisor of these sandboxes. Calls `before_it_runs` with the process when it exists: if this process
/// fails before or in that call, the forked process ends and runs nothing. Returns false if the process executes a new Python.
///
/// # Errors
/// There is no supervisor, or it cannot fork. The caller boots the agent server itself.
pub(super) async fn fork(
    config: &ProcessSandboxConfig,
    request: ForkRequest,
    before_it_runs: impl FnOnce(Pid, &StartTime) -> io::Result<()> + Send + 'static,
) -> io::Result<bool> {
    let files = Files::of(config);
    let done = tokio::task::spawn_blocking(move || fork_blocking(&files, &request, before_it_runs));
    done.await.map_err(io::Error::other)?
}

fn fork_blocking(
    files: &Files,
    request: &ForkRequest,
    before_it_runs: impl FnOnce(Pid, &StartTime) -> io::Result<()>,
) -> io::Result<bool> {
    let mut connection = connect(&files.folder, &files.socket_name())?;
    connection.set_read_timeout(Some(FORK_TIMEOUT))?;
    connection.set_write_timeout(Some(FORK_TIMEOUT))?;
    let mut message = serde_json::to_vec(&Request {
        arguments: &request.arguments,
        environment: request
            .environment
            .iter()
            .map(|(name, value)| Ok((&**name, text(value)?)))
            .collect::<io::Result<_>>()?,
        folder: text(request.folder.as_os_str())?,
    })?;
    message.push(b'\n');
    let descriptors = [request.stdin.as_fd(), request.output.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    let sent = sendmsg(&connection, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)?;
    connection.write_all(&message[sent..])?;

    let mut line = String::new();
    BufReader::new(&connection).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the forked process has ended"));
    }
    let (pid, boot, reason) = match serde_json::from_str(&line)? {
        Answer::Forked { pid, boot, reason } => (pid, boot, reason),
        Answer::Refused { error } => return Err(io::Error::other(error)),
    };
    let pid = Pid::from_raw(pid).filter(|pid| pid.as_raw_nonzero().get() > 1);
    let (pid, started) = pid
        .and_then(|pid| Some((pid, proc::start_time(pid)?)))
        .ok_or_else(|| io::Error::other("the forked process has ended"))?;
    if let Some(reason) = reason {
        tracing::info!(reason, "sandbox.boot_not_forked");
    }
    before_it_runs(pid, &started)?;
    connection.write_all(b"\n")?;
    Ok(boot == "fork")
}

/// Connects to a socket in a folder. The path of a socket may have 107 bytes, and a data folder may have a longer one.
fn connect(folder: &Path, name: &str) -> io::Result<UnixStream> {
    let path = folder.join(name);
    if path.as_os_str().len() <= 100 {
        return UnixStream::connect(path);
    }
    let folder = File::open(folder)?;
    UnixStream::connect(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))
}

fn text(value: &std::ffi::OsStr) -> io::Result<&str> {
    value.to_str().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a path or a variable is not UTF-8"))
}

#[cfg(target_os = "linux")]
#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::Mutex;

    use super::*;

    /// A supervisor whose interpreter is a shell script.
    struct Fixture {
        folder: PathBuf,
        supervisor: Supervisor,
        states: Mutex<Vec<BootState>>,
    }

    impl Fixture {
        fn new(script: &str) -> Self {
            let folder = std::env::temp_dir().join(crate::id::new_sandbox_id());
            fs::create_dir(&folder).expect("created");
            let python = folder.join("python");
            fs::write(&python, format!("#!/bin/sh\nFOLDER='{}'\n{script}", folder.display())).expect("written");
            fs::set_permissions(&python, fs::Permissions::from_mode(0o700)).expect("executable");
            let config = ProcessSandboxConfig {
                folder: folder.clone(),
                python,
                version: "1".to_owned(),
                webhook_base_url: String::new(),
                max_sandboxes: 1,
                allow_cors_origins: Vec::new(),
            };
            Self { supervisor: Supervisor::new(&config), folder, states: Mutex::default() }
        }

        async fn run(&self, stop: impl Future<Output = ()> + Send) -> Vec<BootState> {
            self.supervisor.run(stop, |state| self.states.lock().expect("states").push(state)).await;
            self.states()
        }

        fn states(&self) -> Vec<BootState> {
            self.states.lock().expect("states").clone()
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.folder.join(name)).unwrap_or_default()
        }
    }

    impl Drop for Fixture {
        fn drop(&mut self) {
            let _gone = fs::remove_dir_all(&self.folder);
        }
    }

    fn is_alive(pid: Pid) -> bool {
        proc::stat(pid).is_some_and(|stat| !stat.is_zombie)
    }

    #[tokio::test]
    async fn a_supervisor_that_cannot_fork_is_not_started_again() {
        let fixture =
            Fixture::new("echo listening; echo $$ >> $FOLDER/runs; touch $2; echo 'refused: no fork here'; exit 1");
        let states = fixture.run(std::future::pending()).await;
        assert_eq!(states.first(), Some(&BootState::Preparing));
        assert_eq!(states.last(), Some(&BootState::Plain("no fork here".to_owned())));
        assert_eq!(fixture.read("runs").lines().count(), 1);
        let files = &fixture.supervisor.files;
        assert!(!files.folder.join(files.socket_name()).exists(), "boots do not try it");
        let mode = fs::metadata(&files.folder).expect("a folder").permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[tokio::test]
    async fn a_supervisor_that_has_ended_is_started_again_until_the_stop() {
        let script = "echo run >> $FOLDER/runs; env > $FOLDER/environment; echo listening; echo ready
            test $(wc -l < $FOLDER/runs) = 1 && { echo 'the cause' >&2; exit 3; }
            echo $$ > $FOLDER/second; read forever";
        let fixture = Fixture::new(script);
        let stop = async {
            while fixture.states().iter().filter(|state| **state == BootState::Fork).count() < 2 {
                sleep(Duration::from_millis(10)).await;
            }
        };
        let reason = "the supervisor has ended (exit status: 3; the cause)".to_owned();
        let (prepared, forks) = (BootState::Preparing, BootState::Fork);
        let expected = [prepared.clone(), forks.clone(), BootState::Plain(reason), prepared, forks];
        assert_eq!(fixture.run(stop).await, expected);
        let second = Pid::from_raw(fixture.read("second").trim().parse().expect("a number")).expect("a process id");
        assert!(!is_alive(second));
        let environment = fixture.read("environment");
        let names = environment.lines().filter_map(|line| Some(line.split_once('=')?.0));
        let of_shell = ["PWD", "OLDPWD", "SHLVL", "_"];
        for name in names.filter(|name| !of_shell.contains(name)) {
            assert!(PASSED_ON.contains(&name) || name == "LITELLM_LOCAL_MODEL_COST_MAP", "{name}");
        }
        assert!(environment.contains("PWD=/\n"), "no process of a sandbox's folder: {environment}");
    }

    #[tokio::test]
    async fn a_supervisor_of_an_earlier_run_is_ended_unless_its_id_belongs_to_another_process() {
        let fixture = Fixture::new("echo 'refused: enough'");
        let files = &fixture.supervisor.files;
        fs::create_dir(&files.folder).expect("created");
        fs::write(files.folder.join("supervisor-of-before.sock"), "").expect("written");
        let mut sleeping = [(); 2].map(|()| Command::new("sleep").arg("60").kill_on_drop(true).spawn().expect("run"));
        let pids =
            sleeping.each_ref().map(|child| Pid::from_raw(child.id().expect("runs").cast_signed()).expect("an id"));
        let started = pids.map(|pid| proc::start_time(pid).expect("runs"));
        proc::write_start(&files.pid(), pids[0], &started[0]).expect("written");
        fixture.run(std::future::pending()).await;
        sleeping[0].wait().await.expect("ended");
        assert!(!files.folder.join("supervisor-of-before.sock").exists());

        let other = proc::start_time(rustix::process::getpid()).expect("runs");
        assert_ne!(other, started[1]);
        proc::write_start(&files.pid(), pids[1], &other).expect("written");
        fixture.run(std::future::pending()).await;
        assert!(is_alive(pids[1]));
    }
}
