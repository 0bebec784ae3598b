//! Process sandbox provider: runs one agent server process per sandbox on this machine, each with its own folder, port and session key.
//!
//! Several processes may manage the same sandboxes (this server, functions under an emulator, the next run after a crash), so no state is
//! kept in memory. An agent server holds an exclusive lock on a file in its folder until it exits: it inherits the locked file as its
//! standard input, and the kernel releases the lock when the process ends, even after a crash. Its process id is in a file before it runs.
//! Therefore a running agent server can be found at any time.
//!
//! An agent server is forked by the [supervisor](super::supervisor) where there is one. Otherwise it is a new Python (a *plain boot*). A
//! forked process shows the environment of the supervisor in `/proc`, so its start time is recorded: its processes are those of its session.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::net::{Ipv4Addr, TcpListener};
use std::num::NonZero;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::process::Command;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::capacity::{others_at_the_limit, to_evict};
use super::config::ProcessSandboxConfig;
use super::proc::{self, StartTime};
use super::spec::published_image;
use super::store::{Desired, SandboxRecord, SandboxStore};
use super::supervisor::{self, ForkRequest};
use super::{AGENT_SERVER, ExposedUrl, Launch, Sandbox, SandboxService, SandboxStatus};
use crate::clock::Time;
use crate::error::{Error, Result};
use crate::http_client::{AddressPolicy, HttpClient};
use crate::id::{self, UserId};
use crate::random;

/// A shell script that writes its process id and then executes the agent server under the same id.
const LAUNCHER: &str = r#"echo $$ > "$1" && shift && exec "$@""#;

/// The environment variables that an agent server inherits. All others are withheld, because they may contain keys.
const PASSED_ON: [&str; 20] = [
    "PATH",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "TERM",
    "TMPDIR",
    "USER",
    "LOGNAME",
    "SHELL",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "DYLD_LIBRARY_PATH",
];

/// Folders of the user's home directory that a sandbox's home directory links to: the user's skills, and browsers, which are large.
const SHARED_HOME: [&str; 4] =
    [".agents/skills", ".openhands/skills", ".openhands/microagents", ".cache/ms-playwright"];

const TERMINATION_TIMEOUT: Duration = Duration::from_secs(10);
/// The port range of agent servers. It is below the ephemeral ports of the system: an agent server needs seconds until it listens, and the
/// system must not assign its port to another process in that time.
const PORTS: std::ops::RangeInclusive<u16> = 20_000..=32_000;
/// The number of attempts to find a free port.
const PORT_TRIES: usize = 100;
const ALIVE_TIMEOUT: Duration = Duration::from_secs(1);
/// While a record is younger than this, a missing process counts as starting.
const LAUNCH_GRACE: Duration = Duration::from_secs(10);
/// The timeout for the process id file. It is written within milliseconds after the launch.
const PID_TIMEOUT: Duration = Duration::from_secs(1);
/// The agent servers that boot at the same time in this process: each needs a core for some seconds, and with many at once none would
/// respond in time.
static BOOTS: LazyLock<Arc<Semaphore>> =
    LazyLock::new(|| Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(2, NonZero::get).max(2))));
/// How long a request waits until another agent server may boot.
const BOOT_TIMEOUT: Duration = Duration::from_secs(20);
/// An agent server that has not responded after this time no longer delays others.
const LONGEST_BOOT: Duration = Duration::from_secs(120);
const BOOT_POLL: Duration = Duration::from_millis(100);
const LOG_TAIL_LINES: usize = 12;
const LOG_TAIL_BYTES: u64 = 8 * 1024;

/// The process sandbox provider.
#[derive(Debug)]
pub struct ProcessSandboxes {
    config: ProcessSandboxConfig,
    store: SandboxStore,
    http: HttpClient,
}

/// The state of an agent server process, as its folder shows it.
#[derive(Debug, PartialEq, Eq)]
enum Process {
    NotLaunched,
    /// It holds the lock and has not yet written its process id.
    Launching,
    Living(Pid),
    Ended,
}

/// The files of one sandbox.
struct Folder(PathBuf);

impl Folder {
    fn lock(&self) -> PathBuf {
        self.0.join("agent-server.lock")
    }

    fn pid(&self) -> PathBuf {
        self.0.join("agent-server.pid")
    }

    /// The process id and start time of an agent server that was forked.
    fn start(&self) -> PathBuf {
        self.0.join("agent-server.start")
    }

    fn log(&self) -> PathBuf {
        self.0.join("agent-server.log")
    }

    /// A marker file, which exists once the agent server has responded since its launch.
    fn answered(&self) -> PathBuf {
        self.0.join("answered")
    }

    fn working_dir(&self) -> PathBuf {
        self.0.join("workspace/project")
    }

    fn home(&self) -> PathBuf {
        self.0.join("home")
    }

    /// The folder of the sandbox's own tmux server. By default all sandboxes of a user would share one tmux server, and with it the
    /// environment of the first sandbox. A socket's path must be short, so this folder is not below the sandbox's folder.
    fn tmux(&self) -> PathBuf {
        let id = self.0.file_name().unwrap_or_default().to_string_lossy();
        std::env::temp_dir().join(format!("openhands-{id}"))
    }

    fn open_lock(&self) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(self.lock())
    }

    fn is_locked(&self) -> bool {
        File::open(self.lock()).is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// Returns the process id that the launcher has written. The file is empty for an instant after it was created.
    fn written_pid(&self) -> Option<Pid> {
        fs::read_to_string(self.pid()).ok()?.trim().parse().ok().and_then(Pid::from_raw)
    }

    /// Returns the state of this folder's agent server process.
    fn process(&self) -> Process {
        // Read the id before the lock: a process that is launched in between has not ended.
        let launched_before = self.written_pid().is_some();
        match (self.is_locked(), self.written_pid()) {
            (false, _) if launched_before => Process::Ended,
            (false, _) => Process::NotLaunched,
            (true, None) => Process::Launching,
            // A child of a dead agent server may still hold the lock, so check also that the process exists.
            (true, Some(pid)) if self.exists(pid) => Process::Living(pid),
            (true, Some(_)) => Process::Ended,
        }
    }

    /// Whether the agent server with this id exists, and not another process that has the id by now.
    fn exists(&self, pid: Pid) -> bool {
        match proc::read_start(&self.start()) {
            // A forked process is reaped by the supervisor, or by the system after the supervisor has ended.
            Some((forked, started)) if forked == pid => {
                proc::start_time(pid) == Some(started) && proc::stat(pid).is_some_and(|stat| !stat.is_zombie)
            }
            _ => test_kill_process(pid).is_ok(),
        }
    }

    fn is_running(&self) -> bool {
        matches!(self.process(), Process::Launching | Process::Living(_))
    }

    /// Returns the process id of this folder's agent server, if it is running. Waits until an agent server that was just launched has
    /// written its process id, so that no signal misses it.
    async fn living(&self) -> Option<Pid> {
        let deadline = Instant::now() + PID_TIMEOUT;
        loop {
            match self.process() {
                Process::Living(pid) => return Some(pid),
                Process::Launching if Instant::now() < deadline => sleep(Duration::from_millis(5)).await,
                Process::NotLaunched | Process::Launching | Process::Ended => return None,
            }
        }
    }

    /// Returns the last lines of the agent server's output for the user, without its session key.
    fn log_tail(&self, key: Option<&SecretString>) -> Option<String> {
        let mut file = File::open(self.log()).ok()?;
        let length = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES))).ok()?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).ok()?;
        let mut text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        if let Some(key) = key {
            text = text.replace(key.expose_secret(), "[session key]");
        }
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n");
        (!tail.is_empty()).then_some(tail)
    }
}

impl ProcessSandboxes {
    /// Creates the provider for sandboxes below `config.folder`.
    #[must_use]
    pub fn new(config: ProcessSandboxConfig, store: SandboxStore) -> Self {
        Self { config, store, http: HttpClient::new(AddressPolicy::Any) }
    }

    /// Terminates all agent servers of the user, so that a later run can resume them.
    ///
    /// # Errors
    /// [`Error::Store`] when the records cannot be read or written; the other agent servers are terminated nevertheless.
    pub async fn stop_all(&self, user: &UserId) -> Result<()> {
        let stopped = join_all(self.store.list_all(user).await?.into_iter().map(async |record| {
            let folder = self.folder(&record.id);
            if folder.living().await.is_none() {
                end_leftovers(&folder).await;
                return Ok(());
            }
            // Write the record first: if this process is killed now, the next run finds the intended state.
            let recorded = self.store.set_desired(user, &record.id, Desired::Stopped).await;
            terminate(&folder).await;
            recorded.map(|_| ())
        }))
        .await;
        stopped.into_iter().collect()
    }

    /// Terminates orphans: agent servers in the sandbox folder without a record of the user. No request can reach them. Returns their
    /// number. Call it before anything creates sandboxes: the folder belongs to this deployment alone, and then an agent server without a
    /// record is an orphan, whatever its age.
    ///
    /// # Errors
    /// [`Error::Store`] when the records cannot be read.
    pub async fn end_orphans(&self, user: &UserId) -> Result<usize> {
        let Ok(entries) = fs::read_dir(&self.config.folder) else { return Ok(0) };
        let running: Vec<String> = entries
            .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
            .filter(|name| self.folder(name).is_locked())
            .collect();
        let records = self.store.batch_get(user, &running).await?;
        let without_record = running.iter().zip(records).filter(|(_, record)| record.is_none());
        let orphans: Vec<Folder> = without_record.map(|(name, _)| self.folder(name)).collect();
        join_all(orphans.iter().map(terminate)).await;
        Ok(orphans.len())
    }

    fn folder(&self, id: &str) -> Folder {
        Folder(self.config.folder.join(id))
    }

    /// Evicts (stops) sandboxes of the user until one more may run. Returns false if that is not possible now.
    async fn ensure_capacity(&self, newcomer: &SandboxRecord) -> Result<bool> {
        let user = &newcomer.user;
        let max = self.config.max_sandboxes;
        let Some(others) =
            others_at_the_limit(&self.store, newcomer, max, |record| self.folder(&record.id).is_running()).await?
        else {
            return Ok(true);
        };
        let observed: Vec<Sandbox> =
            join_all(others.iter().map(|record| self.observe(record))).await.into_iter().collect::<Result<_>>()?;
        let others = others.into_iter().zip(observed).collect();
        let Some(evicted) = to_evict(&self.http, newcomer, others, max).await else {
            return Ok(false);
        };
        for id in evicted {
            tracing::info!(sandbox = id, "sandbox.evicted");
            // A stopped process still needs its memory, so the agent server is ended. A resume launches it again.
            if self.store.set_desired(user, &id, Desired::Stopped).await? {
                terminate(&self.folder(&id)).await;
            }
        }
        Ok(true)
    }

    /// Launches the sandbox's agent server unless it is running. Keeps `boot` until the agent server responds or has ended.
    async fn launch(&self, record: &SandboxRecord, boot: OwnedSemaphorePermit) -> Result<()> {
        let folder = self.folder(&record.id);
        make_folders(&folder, &self.config.folder).map_err(|error| cannot_make(&folder, &error))?;
        let take = async || take_lock(&folder).await.map_err(|error| cannot_make(&folder, &error));
        let mut lock = take().await?;
        if lock.is_none() {
            if folder.living().await.is_some() {
                return Ok(());
            }
            // A child process of a dead agent server holds the lock.
            kill_all_of(&folder);
            lock = take().await?;
        }
        let Some(lock) = lock else {
            let error = io::Error::other("processes of its earlier agent server do not end");
            return Err(cannot_make(&folder, &error));
        };
        let port = free_port().map_err(|error| cannot_make(&folder, &error))?;
        // The sandbox may have been created with another version.
        let spec_id = published_image(&self.config.version);
        if !self.store.set_launched(&record.user, &record.id, port, &spec_id).await? {
            return Ok(()); // deleted meanwhile
        }
        // Kill the remaining child processes of a killed agent server.
        kill_all_of(&folder);
        // The lock is held: until the new process has written its id, it counts as launching and not as the one that has ended.
        for file in [folder.pid(), folder.start(), folder.answered()] {
            remove_if_there(&file).map_err(|error| cannot_make(&folder, &error))?;
        }
        let key = self.store.session_key(record).await?;
        let boot_kind = self.boot(&folder, lock, port, &key).await.map_err(|error| cannot_make(&folder, &error))?;
        tracing::info!(sandbox = %record.id, port, boot = boot_kind, "sandbox.launched");
        let (http, url) = (self.http.clone(), format!("http://127.0.0.1:{port}/alive"));
        tokio::spawn(async move {
            let deadline = Instant::now() + LONGEST_BOOT;
            while Instant::now() < deadline && !http.succeeds(&url, ALIVE_TIMEOUT).await {
                sleep(BOOT_POLL).await;
                if !folder.is_running() {
                    break;
                }
            }
            drop(boot);
        });
        Ok(())
    }

    /// Boots the agent server: by fork if possible. Returns how.
    async fn boot(&self, folder: &Folder, lock: File, port: u16, key: &SecretString) -> io::Result<&'static str> {
        let log = OpenOptions::new().create(true).append(true).mode(0o600).open(folder.log())?;
        let arguments = ["--host", "127.0.0.1", "--port", &port.to_string()].map(str::to_owned);
        let environment = self.environment(folder, key)?;
        let request = ForkRequest {
            arguments: arguments.to_vec(),
            environment: environment.clone(),
            folder: folder.0.clone(),
            stdin: lock.try_clone()?,
            output: log.try_clone()?,
        };
        let (start_file, pid_file) = (folder.start(), folder.pid());
        let record = move |pid: Pid, started: &StartTime| {
            proc::write_start(&start_file, pid, started)?;
            fs::write(&pid_file, format!("{}\n", pid.as_raw_nonzero()))
        };
        match supervisor::fork(&self.config, request, record).await {
            Ok(true) => return Ok("fork"),
            Ok(false) => return Ok("exec"),
            // Without a supervisor this is the usual case.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(folder = %folder.0.display(), %error, "sandbox.not_forked"),
        }
        // A process that was forked has ended, or ends without running anything.
        for file in [folder.pid(), folder.start()] {
            remove_if_there(&file)?;
        }
        self.spawn(folder, lock, log, &arguments, environment)?;
        Ok("plain")
    }

    fn spawn(
        &self,
        folder: &Folder,
        lock: File,
        log: File,
        arguments: &[String],
        environment: BTreeMap<String, OsString>,
    ) -> io::Result<()> {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", LAUNCHER, "sh"])
            .arg(folder.pid())
            .arg(&self.config.python)
            .args(["-m", "openhands.agent_server"])
            .args(arguments)
            .current_dir(&folder.0)
            .stdin(Stdio::from(lock))
            .stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log))
            // Use a separate process group: Ctrl-C for this process does not reach it, and a signal to the group terminates its children.
            .process_group(0)
            .env_clear()
            .envs(environment);
        // Dropping the handle does not kill the process: the runtime reaps it when it exits, and it may outlive this process.
        command.spawn().map(drop)
    }

    /// The whole environment of an agent server.
    fn environment(&self, folder: &Folder, key: &SecretString) -> io::Result<BTreeMap<String, OsString>> {
        let mut environment: BTreeMap<String, OsString> =
            PASSED_ON.iter().filter_map(|name| Some(((*name).to_owned(), std::env::var_os(name)?))).collect();
        let own: [(&str, OsString); 10] = [
            ("HOME", folder.home().into()),
            ("TMUX_TMPDIR", folder.tmux().into()),
            ("PYTHONUNBUFFERED", "1".into()),
            ("OH_SESSION_API_KEYS_0", key.expose_secret().into()),
            ("OH_SECRET_KEY", key.expose_secret().into()),
            ("OH_WEBHOOKS_0_BASE_URL", self.config.webhook_base_url.clone().into()),
            ("OH_CONVERSATIONS_PATH", folder.0.join("workspace/conversations").into()),
            ("OH_BASH_EVENTS_DIR", folder.0.join("workspace/bash_events").into()),
            ("OH_ENABLE_VSCODE", "0".into()),
            ("OH_ENABLE_VNC", "0".into()),
        ];
        environment.extend(own.map(|(name, value)| (name.to_owned(), value)));
        let common = super::WEBHOOK_VARIABLES.into_iter().chain(super::STORAGE_VARIABLES);
        environment.extend(common.map(|(name, value)| (name.to_owned(), value.into())));
        let origins = self.config.allow_cors_origins.iter().enumerate();
        environment.extend(origins.map(|(index, origin)| (format!("OH_ALLOW_CORS_ORIGINS_{index}"), origin.into())));
        // The operator's variables override the ones above.
        if let Some(given) = crate::env::text("OH_AGENT_SERVER_ENV") {
            let given: BTreeMap<String, String> = serde_json::from_str(&given).map_err(|error| {
                io::Error::new(io::ErrorKind::InvalidInput, format!("OH_AGENT_SERVER_ENV: {error}"))
            })?;
            environment.extend(given.into_iter().map(|(name, value)| (name, value.into())));
        }
        Ok(environment)
    }

    async fn observe(&self, record: &SandboxRecord) -> Result<Sandbox> {
        let folder = self.folder(&record.id);
        let key = self.store.session_key(record).await?;
        let url = record.port.map(|port| ExposedUrl {
            name: AGENT_SERVER.to_owned(),
            url: format!("http://127.0.0.1:{port}"),
            port,
        });
        let process = folder.process();
        let is_young = Time::now().since(record.created_at) < LAUNCH_GRACE;
        let (status, detail) = match (record.desired, process) {
            (Desired::Stopped | Desired::Deleted, _) | (Desired::Paused, Process::Living(_) | Process::Launching) => {
                (SandboxStatus::Paused, None)
            }
            (Desired::Running, Process::Living(_)) if self.answers(&folder, url.as_ref()).await => {
                (SandboxStatus::Running, None)
            }
            (Desired::Running, Process::Living(_) | Process::Launching) => (SandboxStatus::Starting, None),
            (_, _) if folder.answered().exists() => (SandboxStatus::Missing, Some("Its agent server has ended")),
            (_, Process::NotLaunched) if is_young => (SandboxStatus::Starting, None),
            (_, _) => (SandboxStatus::Error, Some("Its agent server ended before its first response")),
        };
        let running = status == SandboxStatus::Running;
        Ok(Sandbox {
            id: record.id.clone(),
            spec_id: record.spec_id.clone(),
            status,
            detail: detail.map(|what| match folder.log_tail(Some(&key)) {
                Some(tail) => format!("{what}. The end of its output:\n{tail}"),
                None => format!("{what}, without any output."),
            }),
            session_api_key: running.then_some(key),
            exposed_urls: running.then(|| url.into_iter().collect()),
            created_at: record.created_at,
            used_at: record.used_at,
            working_dir: folder.working_dir().display().to_string(),
        })
    }

    /// Returns whether the agent server has responded since its launch. Sends a request if that is not known yet.
    async fn answers(&self, folder: &Folder, url: Option<&ExposedUrl>) -> bool {
        if folder.answered().exists() {
            return true;
        }
        let Some(exposed) = url else { return false };
        if !self.http.succeeds(&format!("{}/alive", exposed.url), ALIVE_TIMEOUT).await {
            return false;
        }
        if let Err(error) = OpenOptions::new().create(true).append(true).mode(0o600).open(folder.answered()) {
            // The agent server is alive nevertheless; the next call sends the request again.
            tracing::warn!(folder = %folder.0.display(), %error, "sandbox.answer_not_recorded");
        }
        true
    }
}

#[async_trait]
impl SandboxService for ProcessSandboxes {
    async fn start(&self, user: &UserId, id: &str, task: Option<Uuid>) -> Result<Launch> {
        let is_running = self.folder(id).is_running();
        let boot = match task {
            _ if is_running => None,
            // The start is tried again soon, and waits without a worker meanwhile.
            Some(_) => match BOOTS.clone().try_acquire_owned() {
                Ok(boot) => Some(boot),
                Err(_) => return Ok(Launch::Full),
            },
            None => Some(next_boot().await?),
        };
        let key = SecretString::from(id::new_session_key());
        let spec_id = published_image(&self.config.version);
        let record = self.store.new_record(user, id, &spec_id, &key).await?;
        let Some(record) = self.store.create(record, task).await? else { return Ok(Launch::Deleted) };
        if let Some(boot) = boot {
            if !self.ensure_capacity(&record).await? {
                self.store.withdraw(&record).await?;
                return Ok(Launch::Full);
            }
            self.launch(&record, boot).await?;
        }
        Ok(Launch::Started)
    }

    async fn batch_get(&self, user: &UserId, ids: &[String]) -> Result<Vec<Option<Sandbox>>> {
        let records = self.store.batch_get(user, ids).await?;
        let observed = records.iter().map(async |record| match record {
            Some(record) => self.observe(record).await.map(Some),
            None => Ok(None),
        });
        join_all(observed).await.into_iter().collect()
    }

    async fn list(&self, user: &UserId) -> Result<Vec<Sandbox>> {
        let records = self.store.list(user).await?;
        join_all(records.iter().map(|record| self.observe(record))).await.into_iter().collect()
    }

    async fn pause(&self, user: &UserId, id: &str) -> Result<bool> {
        let Some(pid) = self.folder(id).living().await else { return Ok(false) };
        if !self.store.set_desired(user, id, Desired::Paused).await? {
            return Ok(false);
        }
        Ok(kill_process_group(pid, Signal::STOP).is_ok())
    }

    async fn resume(&self, user: &UserId, id: &str) -> Result<bool> {
        let Some(record) = self.store.get(user, id).await? else { return Ok(false) };
        let resumed = match self.folder(id).living().await {
            Some(pid) => kill_process_group(pid, Signal::CONT).is_ok(),
            // The agent server was stopped or has crashed; its folder contains everything for a new launch.
            None => {
                let boot = next_boot().await?;
                // Its user wants it to run, so it runs even beyond the limit.
                self.ensure_capacity(&record).await?;
                self.launch(&record, boot).await.map(|()| true)?
            }
        };
        // Write the record last: after an interrupted resume the sandbox is paused (and can be resumed again), not missing.
        self.store.set_desired(user, id, Desired::Running).await?;
        Ok(resumed)
    }

    async fn terminate(&self, _user: &UserId, id: &str) -> Result<bool> {
        let folder = self.folder(id);
        terminate(&folder).await;
        if let Err(error) = fs::remove_dir_all(&folder.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(Error::internal(format!("{} cannot be removed: {error}", folder.0.display())));
        }
        Ok(true)
    }

    fn relaunches(&self) -> bool {
        true
    }

    async fn mark_used(&self, user: &UserId, id: &str) -> Result<()> {
        self.store.mark_used(user, id).await.map(|_| ())
    }
}

/// Waits until another agent server may boot.
async fn next_boot() -> Result<OwnedSemaphorePermit> {
    match timeout(BOOT_TIMEOUT, BOOTS.clone().acquire_owned()).await {
        Ok(Ok(boot)) => Ok(boot),
        Ok(Err(_)) | Err(_) => Err(Error::Upstream {
            message: "This machine is busy starting other sandboxes; try again later".to_owned(),
            context: format!("no agent server could boot within {} s", BOOT_TIMEOUT.as_secs()),
        }),
    }
}

/// Terminates the folder's agent server and all its child processes. Returns when the agent server has exited.
async fn terminate(folder: &Folder) {
    if let Some(pid) = folder.living().await {
        end_agent_server(folder, pid).await;
    }
    end_leftovers(folder).await;
    end_terminals(folder).await;
}

async fn end_agent_server(folder: &Folder, pid: Pid) {
    // A stopped process handles no other signal before SIGCONT. A failed signal means that the process no longer exists.
    for signal in [Signal::CONT, Signal::TERM] {
        let _gone = kill_process_group(pid, signal);
    }
    let deadline = Instant::now() + TERMINATION_TIMEOUT;
    while folder.living().await.is_some() && Instant::now() < deadline {
        sleep(Duration::from_millis(50)).await;
    }
    // Kill the group also when the agent server has exited by itself, because its children may still run.
    let _gone = kill_process_group(pid, Signal::KILL);
    while folder.living().await.is_some() {
        sleep(Duration::from_millis(20)).await;
    }
}

/// Terminates the terminals that the agent server has left running: their tmux server has its own session.
async fn end_terminals(folder: &Folder) {
    if !folder.tmux().exists() {
        return;
    }
    let ended = Command::new("tmux")
        .args(["-L", "openhands", "kill-server"])
        .env("TMUX_TMPDIR", folder.tmux())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .await;
    if let Err(error) = ended
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(folder = %folder.0.display(), %error, "sandbox.terminals_not_ended");
    }
    if let Err(error) = fs::remove_dir_all(folder.tmux()) {
        tracing::warn!(folder = %folder.tmux().display(), %error, "sandbox.terminals_folder_left");
    }
}

/// Kills the remaining child processes of a dead agent server, unless another agent server is running by now.
async fn end_leftovers(folder: &Folder) {
    // Hold the lock to prevent a launch: processes of a new agent server would match, too.
    if let Ok(Some(_lock)) = take_lock(folder).await {
        kill_all_of(folder);
    }
}

/// Kills every process whose `HOME` is the sandbox's home directory, and those of the session of an agent server that was forked. Agents'
/// terminals run in their own sessions, so a signal to the agent server's process group does not reach them. On systems that do not show
/// environments in `/proc`, only the agent server itself can terminate them.
fn kill_all_of(folder: &Folder) {
    let home = format!("HOME={}", folder.home().display());
    let forked = proc::read_start(&folder.start());
    // No process gets the id of a session while the session exists. So if the id belongs to another process, the session has ended.
    let session = forked.and_then(|(leader, started)| {
        let is_own = proc::start_time(leader).is_none_or(|now| now == started);
        is_own.then_some(leader.as_raw_nonzero().get())
    });
    for pid in proc::all() {
        // The environment is unreadable when the process has exited or belongs to another user.
        let environment = fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).unwrap_or_default();
        let has_home = environment.split(|byte| *byte == 0).any(|variable| variable == home.as_bytes());
        let is_in_session = session.is_some() && proc::stat(pid).map(|stat| stat.session) == session;
        if has_home || is_in_session {
            let _gone = kill_process(pid, Signal::KILL);
        }
    }
}

/// Acquires the folder's lock. Returns `None` when an agent server holds it.
async fn take_lock(folder: &Folder) -> io::Result<Option<File>> {
    let lock = folder.open_lock()?;
    // A concurrent check of the lock holds it for an instant, so retry.
    for _ in 0..5 {
        match lock.try_lock() {
            Ok(()) => return Ok(Some(lock)),
            Err(TryLockError::WouldBlock) => sleep(Duration::from_millis(10)).await,
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Ok(None)
}

fn make_folders(folder: &Folder, root: &Path) -> io::Result<()> {
    let make = |path: &Path| fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    make(&folder.0)?;
    // The working directory is below the private folder, but has the modes of its user's files: containers mount it, images copy it.
    fs::create_dir_all(folder.working_dir())?;
    make(&folder.home())?;
    make(&folder.tmux())?;
    // All sandboxes share one cache of public skills, which are cloned on first use.
    let cache = root.join(".cache");
    make(&cache)?;
    link(&cache, &folder.home().join(".openhands/cache"))?;
    let Some(home) = std::env::var_os("HOME").map(PathBuf::from) else { return Ok(()) };
    for shared in SHARED_HOME {
        let target = home.join(shared);
        if target.is_dir() {
            link(&target, &folder.home().join(shared))?;
        }
    }
    Ok(())
}

fn link(target: &Path, at: &Path) -> io::Result<()> {
    if let Some(parent) = at.parent() {
        fs::create_dir_all(parent)?;
    }
    match symlink(target, at) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn free_port() -> io::Result<u16> {
    let mut fault = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..PORT_TRIES {
        let port = PORTS.start() + u16::try_from(random::below(PORTS.len())).unwrap_or_default();
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Ok(_) => return Ok(port),
            Err(error) => fault = error,
        }
    }
    Err(fault)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn cannot_make(folder: &Folder, error: &io::Error) -> Error {
    Error::Refused(format!("The sandbox in {} could not be started: {error}", folder.0.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A launcher creates its file before it writes its process id into it.
    #[test]
    fn a_process_that_has_not_written_its_id_is_launching() {
        let folder = Folder(std::env::temp_dir().join(id::new_sandbox_id()));
        fs::create_dir(&folder.0).expect("created");
        let own_id = std::process::id().to_string();
        assert_eq!(folder.process(), Process::NotLaunched);
        let lock = folder.open_lock().expect("opened");
        lock.lock().expect("locked");
        assert_eq!(folder.process(), Process::Launching, "no file yet");
        fs::write(folder.pid(), "").expect("written");
        assert_eq!(folder.process(), Process::Launching, "an empty file");
        fs::write(folder.pid(), format!("{own_id}\n")).expect("written");
        assert_eq!(folder.process(), Process::Living(rustix::process::getpid()));
        // The greatest process id of Linux is 4194304.
        fs::write(folder.pid(), "4194305\n").expect("written");
        assert_eq!(folder.process(), Process::Ended, "a child of the agent server holds the lock");
        fs::write(folder.pid(), own_id).expect("written");
        drop(lock);
        assert_eq!(folder.process(), Process::Ended);
        fs::remove_dir_all(&folder.0).expect("removed");
    }
}
