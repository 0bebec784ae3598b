//! Sandboxes as processes of this machine: one agent server each, with a folder, a port and a session key of its own.
//!
//! Several processes may look after the same sandboxes (this server, functions under an emulator, the next run after
//! a crash), so nothing about them lives in memory. An agent server holds an exclusive lock on a file of its folder for
//! as long as it lives: it inherits the locked file as its standard input, and the kernel lets go of the lock when it
//! dies, however it dies. Its process id stands in a file that it writes itself before it becomes the agent server.
//! So there is no moment at which one runs that could not be found again.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::process::Command;
use tokio::time::{Instant, sleep};

use super::config::ProcessSandboxConfig;
use super::spec::published_image;
use super::store::{SandboxRecord, SandboxStore, Wanted};
use super::{AGENT_SERVER, ExposedUrl, Sandbox, SandboxService, SandboxStatus};
use crate::clock::Time;
use crate::error::{Error, Result};
use crate::http_client::{AddressPolicy, HttpClient};
use crate::id::{self, UserId};

/// Writes its process id, then becomes the agent server under the same id.
const LAUNCHER: &str = r#"echo $$ > "$1" && shift && exec "$@""#;

/// What of this process's environment an agent server may see. All else stays here: it holds keys.
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

/// Folders of the user's home that a sandbox's own home shows: skills of the user, and browsers, which are large.
const SHARED_HOME: [&str; 4] =
    [".agents/skills", ".openhands/skills", ".openhands/microagents", ".cache/ms-playwright"];

const TERMINATION_PATIENCE: Duration = Duration::from_secs(10);
/// Where agent servers listen. Below the ports that a system gives to whoever asks for any: one takes seconds until it listens, and
/// nobody else must be given its port meanwhile.
const PORTS: std::ops::RangeInclusive<u16> = 20_000..=32_000;
/// How many of them are tried.
const PORT_TRIES: usize = 100;
const ALIVE_TIMEOUT: Duration = Duration::from_secs(1);
/// A record this young without a process is taken to be on its way.
const LAUNCH_GRACE: Duration = Duration::from_secs(10);
/// Between the launch of a process and the file with its id there are milliseconds.
const PID_PATIENCE: Duration = Duration::from_secs(1);
const LOG_TAIL_LINES: usize = 12;
const LOG_TAIL_BYTES: u64 = 8 * 1024;

/// Runs agent servers as processes.
#[derive(Debug)]
pub struct ProcessSandboxes {
    config: ProcessSandboxConfig,
    store: SandboxStore,
    http: HttpClient,
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

    fn log(&self) -> PathBuf {
        self.0.join("agent-server.log")
    }

    /// Exists once the agent server has answered since it was launched.
    fn answered(&self) -> PathBuf {
        self.0.join("answered")
    }

    fn working_dir(&self) -> PathBuf {
        self.0.join("workspace/project")
    }

    fn home(&self) -> PathBuf {
        self.0.join("home")
    }

    /// The folder of the sandbox's own tmux server: by default all sandboxes of a user would share one, and with it the
    /// environment of the first. A socket's path must be short, so it is not below the sandbox's folder.
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

    /// Whether an agent server of this folder lives, and under which process id.
    fn living(&self) -> Option<Pid> {
        if !self.is_locked() {
            return None;
        }
        // A child of a dead agent server may still hold the lock, so the process itself must be there too.
        let pid = fs::read_to_string(self.pid()).ok()?.trim().parse().ok().and_then(Pid::from_raw)?;
        test_kill_process(pid).ok().map(|()| pid)
    }

    /// As [`Folder::living`], but one that was launched just now is given the time to write its process id: whoever means
    /// to end it must not miss it.
    async fn living_or_launched(&self) -> Option<Pid> {
        let deadline = Instant::now() + PID_PATIENCE;
        loop {
            let living = self.living();
            if living.is_some() || !self.is_locked() || Instant::now() > deadline {
                return living;
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// The end of the agent server's output, for people, without its session key.
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
    /// Sandboxes below `config.folder`.
    #[must_use]
    pub fn new(config: ProcessSandboxConfig, store: SandboxStore) -> Self {
        Self { config, store, http: HttpClient::new(AddressPolicy::Any) }
    }

    /// Ends all agent servers of the user, so that they can be resumed by a later run.
    ///
    /// # Errors
    /// [`Error::Store`] when the records cannot be read or written; what could be ended is ended.
    pub async fn stop_all(&self, user: &UserId) -> Result<()> {
        let stopped = join_all(self.store.list(user).await?.into_iter().map(async |record| {
            let folder = self.folder(&record.id);
            if folder.living_or_launched().await.is_none() {
                end_leftovers(&folder).await;
                return Ok(());
            }
            // First the record: should this run be killed now, the next one sees what was meant.
            let recorded = self.store.set_wanted(user, &record.id, Wanted::Stopped).await;
            terminate(&folder).await;
            recorded.map(|_| ())
        }))
        .await;
        stopped.into_iter().collect()
    }

    /// Ends agent servers in the sandbox folder that no record of the user knows: nobody could ever reach them again.
    /// Returns how many there were.
    ///
    /// # Errors
    /// [`Error::Store`] when the records cannot be read.
    pub async fn end_orphans(&self, user: &UserId) -> Result<usize> {
        let known = self.store.list(user).await?;
        let Ok(entries) = fs::read_dir(&self.config.folder) else { return Ok(0) };
        let orphans: Vec<Folder> = entries
            .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
            .filter(|name| !known.iter().any(|record| record.id == *name))
            .map(|name| self.folder(&name))
            .filter(Folder::is_locked)
            .collect();
        join_all(orphans.iter().map(terminate)).await;
        Ok(orphans.len())
    }

    fn folder(&self, id: &str) -> Folder {
        Folder(self.config.folder.join(id))
    }

    /// Starts the sandbox's agent server unless it lives.
    async fn launch(&self, record: &SandboxRecord) -> Result<()> {
        let folder = self.folder(&record.id);
        make_folders(&folder, &self.config.folder).map_err(|error| cannot_make(&folder, &error))?;
        let take = async || take_lock(&folder).await.map_err(|error| cannot_make(&folder, &error));
        let mut lock = take().await?;
        if lock.is_none() {
            if folder.living_or_launched().await.is_some() {
                return Ok(());
            }
            // Held by a child that a dead agent server left behind.
            kill_all_of(&folder);
            lock = take().await?;
        }
        let Some(lock) = lock else {
            let error = io::Error::other("processes of its earlier agent server do not end");
            return Err(cannot_make(&folder, &error));
        };
        let port = free_port().map_err(|error| cannot_make(&folder, &error))?;
        // The sandbox may have been made by another version.
        let spec_id = published_image(&self.config.version);
        if !self.store.set_launched(&record.user, &record.id, port, &spec_id).await? {
            return Ok(()); // deleted meanwhile
        }
        // What an agent server that was killed left running.
        kill_all_of(&folder);
        remove_if_there(&folder.answered()).map_err(|error| cannot_make(&folder, &error))?;
        let key = self.store.session_key(record).await?;
        self.spawn(&folder, lock, port, &key).map_err(|error| cannot_make(&folder, &error))?;
        tracing::info!(sandbox = %record.id, port, "sandbox.launched");
        Ok(())
    }

    fn spawn(&self, folder: &Folder, lock: File, port: u16, key: &SecretString) -> io::Result<()> {
        let log = OpenOptions::new().create(true).append(true).mode(0o600).open(folder.log())?;
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", LAUNCHER, "sh"])
            .arg(folder.pid())
            .arg(&self.config.python)
            .args(["-m", "openhands.agent_server", "--host", "127.0.0.1", "--port", &port.to_string()])
            .current_dir(&folder.0)
            .stdin(Stdio::from(lock))
            .stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log))
            // A group of its own: a signal to us (Ctrl-C) is not one to it, and its children can be ended with it.
            .process_group(0)
            .env_clear()
            .envs(PASSED_ON.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
            .env("HOME", folder.home())
            .env("TMUX_TMPDIR", folder.tmux())
            .env("PYTHONUNBUFFERED", "1")
            .env("OH_SESSION_API_KEYS_0", key.expose_secret())
            .env("OH_SECRET_KEY", key.expose_secret())
            .env("OH_WEBHOOKS_0_BASE_URL", &self.config.webhook_base_url)
            .envs(super::WEBHOOK_VARIABLES)
            .envs(super::STORAGE_VARIABLES)
            .env("OH_CONVERSATIONS_PATH", folder.0.join("workspace/conversations"))
            .env("OH_BASH_EVENTS_DIR", folder.0.join("workspace/bash_events"))
            .env("OH_ENABLE_VSCODE", "0")
            .env("OH_ENABLE_VNC", "0");
        for (index, origin) in self.config.allow_cors_origins.iter().enumerate() {
            command.env(format!("OH_ALLOW_CORS_ORIGINS_{index}"), origin);
        }
        // The operator's word on what sandboxes see; it wins.
        if let Some(given) = crate::env::text("OH_AGENT_SERVER_ENV") {
            let given: std::collections::BTreeMap<String, String> = serde_json::from_str(&given).map_err(|error| {
                io::Error::new(io::ErrorKind::InvalidInput, format!("OH_AGENT_SERVER_ENV: {error}"))
            })?;
            command.envs(given);
        }
        // Dropped, not killed: the runtime reaps it when it ends, and it outlives us if it must.
        command.spawn().map(drop)
    }

    async fn observe(&self, record: &SandboxRecord) -> Result<Sandbox> {
        let folder = self.folder(&record.id);
        let key = self.store.session_key(record).await?;
        let url = record.port.map(|port| ExposedUrl {
            name: AGENT_SERVER.to_owned(),
            url: format!("http://127.0.0.1:{port}"),
            port,
        });
        let (status, detail) = match (record.wanted, folder.living().is_some()) {
            (Wanted::Stopped, _) | (Wanted::Paused, true) => (SandboxStatus::Paused, None),
            (Wanted::Running, true) if self.answers(&folder, url.as_ref()).await => (SandboxStatus::Running, None),
            (Wanted::Running, true) => (SandboxStatus::Starting, None),
            (_, false) if folder.answered().exists() => (SandboxStatus::Missing, Some("Its agent server has ended")),
            (_, false) if Time::now().since(record.created_at) < LAUNCH_GRACE && !folder.pid().exists() => {
                (SandboxStatus::Starting, None)
            }
            (_, false) => (SandboxStatus::Error, Some("Its agent server ended before its first response")),
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

    /// Whether the agent server has answered since it was launched; asks it if that is not known yet.
    async fn answers(&self, folder: &Folder, url: Option<&ExposedUrl>) -> bool {
        if folder.answered().exists() {
            return true;
        }
        let Some(exposed) = url else { return false };
        if !self.http.succeeds(&format!("{}/alive", exposed.url), ALIVE_TIMEOUT).await {
            return false;
        }
        if let Err(error) = OpenOptions::new().create(true).append(true).mode(0o600).open(folder.answered()) {
            // It answers all the same; it will be asked again next time.
            tracing::warn!(folder = %folder.0.display(), %error, "sandbox.answer_not_recorded");
        }
        true
    }
}

#[async_trait]
impl SandboxService for ProcessSandboxes {
    async fn start(&self, user: &UserId, id: &str) -> Result<()> {
        let key = SecretString::from(id::new_session_key());
        let spec_id = published_image(&self.config.version);
        let record = self.store.put_new(self.store.new_record(user, id, &spec_id, &key).await?).await?;
        self.launch(&record).await
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
        let Some(pid) = self.folder(id).living() else { return Ok(false) };
        if !self.store.set_wanted(user, id, Wanted::Paused).await? {
            return Ok(false);
        }
        Ok(kill_process_group(pid, Signal::STOP).is_ok())
    }

    async fn resume(&self, user: &UserId, id: &str) -> Result<bool> {
        let Some(record) = self.store.get(user, id).await? else { return Ok(false) };
        let resumed = match self.folder(id).living() {
            Some(pid) => kill_process_group(pid, Signal::CONT).is_ok(),
            // Ended, by us or by an accident: its folder has all it needs to come back.
            None => self.launch(&record).await.map(|()| true)?,
        };
        // Last: a resume that is cut off leaves it paused, to be resumed again, and not missing.
        self.store.set_wanted(user, id, Wanted::Running).await?;
        Ok(resumed)
    }

    async fn delete(&self, user: &UserId, id: &str) -> Result<bool> {
        if self.store.get(user, id).await?.is_none() {
            return Ok(false);
        }
        let folder = self.folder(id);
        terminate(&folder).await;
        if let Err(error) = fs::remove_dir_all(&folder.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(Error::internal(format!("{} cannot be removed: {error}", folder.0.display())));
        }
        // Last, so that a deletion that is cut off can be found and repeated.
        self.store.delete(user, id).await
    }

    async fn mark_used(&self, user: &UserId, id: &str) -> Result<()> {
        self.store.mark_used(user, id).await.map(|_| ())
    }
}

/// Ends the folder's agent server and all that it started; returns when it is gone.
async fn terminate(folder: &Folder) {
    if let Some(pid) = folder.living_or_launched().await {
        end_agent_server(folder, pid).await;
    }
    end_leftovers(folder).await;
    end_terminals(folder).await;
}

async fn end_agent_server(folder: &Folder, pid: Pid) {
    // A frozen process takes no other signal before it goes on. A failed signal means that nobody is left to take it.
    for signal in [Signal::CONT, Signal::TERM] {
        let _gone = kill_process_group(pid, signal);
    }
    let deadline = Instant::now() + TERMINATION_PATIENCE;
    while folder.living().is_some() && Instant::now() < deadline {
        sleep(Duration::from_millis(50)).await;
    }
    // Also when it ended by itself: its children get no second chance.
    let _gone = kill_process_group(pid, Signal::KILL);
    while folder.living().is_some() {
        sleep(Duration::from_millis(20)).await;
    }
}

/// Ends the terminals of an agent server that did not end them itself: their tmux server is in a session of its own.
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

/// Ends what a dead agent server left running, unless another one lives by now.
async fn end_leftovers(folder: &Folder) {
    // Held meanwhile, so that none is launched: its processes would look the same.
    if let Ok(Some(_lock)) = take_lock(folder).await {
        kill_all_of(folder);
    }
}

/// Kills every process that has the sandbox's home: agents' terminals are sessions of their own, so that no signal to
/// the agent server's group reaches them. Where the system does not show environments (other than in `/proc`), the agent
/// server itself has to have ended them.
fn kill_all_of(folder: &Folder) {
    let home = format!("HOME={}", folder.home().display());
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| Pid::from_raw(name.parse().ok()?)) else { continue };
        // Not readable: gone meanwhile, or another user's.
        let Ok(environment) = fs::read(entry.path().join("environ")) else { continue };
        if environment.split(|byte| *byte == 0).any(|variable| variable == home.as_bytes()) {
            let _gone = kill_process(pid, Signal::KILL);
        }
    }
}

/// The folder's lock, or `None` when an agent server holds it.
async fn take_lock(folder: &Folder) -> io::Result<Option<File>> {
    let lock = folder.open_lock()?;
    // Somebody who looks whether it is held holds it for an instant.
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
    // Below the private folder, but itself with the modes that its user's files have: containers mount it, images copy it.
    fs::create_dir_all(folder.working_dir())?;
    make(&folder.home())?;
    make(&folder.tmux())?;
    // One cache of public skills for all sandboxes: they are cloned on first use.
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
        let port = rand::random_range(PORTS);
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
