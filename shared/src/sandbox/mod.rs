//! Sandbox lifecycle (start, pause, resume, delete) as one trait, with one file per provider: process, Docker, MicroVM, runtime API, none.

pub mod boots;
mod capacity;
pub mod circuit;
pub mod config;
#[cfg(feature = "docker")]
pub mod docker;
pub mod microvm;
pub mod none;
pub mod orphans;
mod proc;
pub mod process;
pub mod reconciler;
pub mod remote;
pub mod session_key;
pub mod spec;
pub mod store;
pub mod supervisor;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::try_join_all;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use self::config::SandboxConfig;
use crate::agent_server::AgentServer;
use crate::clock::Time;
use crate::digest::sha256_hex;
use crate::error::Result;
use crate::http_client::HttpClient;
use crate::id::UserId;
use store::{SandboxRecord, SandboxStore};

/// The state of a sandbox, as the contract names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum SandboxStatus {
    /// Made, and its agent server does not answer yet.
    Starting,
    /// Its agent server answers.
    Running,
    /// Stopped so that it can be resumed.
    Paused,
    /// It failed; `detail` says how.
    Error,
    /// It is gone.
    Missing,
}

/// An address of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ExposedUrl {
    /// `AGENT_SERVER`, `VSCODE`, `WORKER_1`, `WORKER_2`
    pub name: String,
    /// The address.
    pub url: String,
    /// The port inside the sandbox.
    pub port: u16,
}

/// The name of the agent server among a sandbox's addresses.
pub const AGENT_SERVER: &str = "AGENT_SERVER";

/// The webhook variables of every agent server that sends webhooks. An event arrives here within a second: the agent server buffers five
/// events and sends them when the buffer is full or after this flush delay (default: 30 s). A batch is at most 2 MiB (default: 5 MiB, from
/// 1.49 on; a larger event is sent alone), because Lambda accepts 6 MB with the body as an escaped JSON string.
pub const WEBHOOK_VARIABLES: [(&str, &str); 2] =
    [("OH_WEBHOOKS_0_FLUSH_DELAY", "1"), ("OH_WEBHOOKS_0_MAX_BATCH_BYTES", "2097152")];

/// The storage variables of every agent server. They turn off leases on conversations, because only one agent server uses them. The lease
/// of a killed agent server would block the next one in the same container for 45 s.
pub const STORAGE_VARIABLES: [(&str, &str); 1] = [("OH_LEASE_TTL_SECONDS", "0")];

/// The maximum length of a sandbox id in bytes. No sandbox has a longer id.
pub const MAX_ID: usize = 255;

/// A sandbox with its current status.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// The id, which is unique per owner.
    pub id: String,
    /// The id of the sandbox spec (the image).
    pub spec_id: String,
    pub status: SandboxStatus,
    /// The session key of its agent server.
    pub session_api_key: Option<SecretString>,
    /// The exposed URLs; `None` unless the sandbox is running.
    pub exposed_urls: Option<Vec<ExposedUrl>>,
    pub created_at: Time,
    /// The time of the latest start of a conversation in the sandbox.
    pub used_at: Time,
    /// The absolute path of the folder in which conversations work.
    pub working_dir: String,
    /// A message for the user about why the sandbox has failed or is missing.
    pub detail: Option<String>,
}

/// A sandbox that exists at a provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProviderSandbox {
    /// Its name there.
    pub name: String,
    /// Whether the name is one that this deployment chooses.
    pub is_own: bool,
    /// `None` if the provider does not report it.
    pub created_at: Option<Time>,
}

impl Sandbox {
    /// Creates a sandbox from its record with this status and without URLs.
    fn of(record: &SandboxRecord, status: SandboxStatus, working_dir: &str) -> Self {
        Self {
            id: record.id.clone(),
            spec_id: record.spec_id.clone(),
            status,
            session_api_key: None,
            exposed_urls: None,
            created_at: record.created_at,
            used_at: record.used_at,
            working_dir: working_dir.to_owned(),
            detail: None,
        }
    }

    /// Returns the URL of its agent server, if the sandbox is running.
    #[must_use]
    pub fn agent_server_url(&self) -> Option<&str> {
        self.exposed_urls
            .as_ref()?
            .iter()
            .find(|exposed| exposed.name == AGENT_SERVER)
            .map(|exposed| exposed.url.as_str())
    }

    /// Returns a client for its agent server, if the sandbox is running.
    #[must_use]
    pub fn agent_server(&self, http: &HttpClient) -> Option<AgentServer> {
        let url = self.agent_server_url().filter(|_| self.status == SandboxStatus::Running)?;
        Some(AgentServer::new(http.clone(), url, self.session_api_key.clone()))
    }
}

/// The outcome of [`SandboxService::start`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launch {
    /// The sandbox exists and starts, or runs already.
    Started,
    /// The sandbox with this id is being deleted. Another id is needed.
    Deleted,
    /// The limit of running sandboxes is reached, and none of the user's others may be evicted now. Nothing was created.
    Full,
}

/// The lifecycle of sandboxes. Every operation is idempotent. A sandbox that is marked for deletion does not exist for any operation but
/// [`SandboxService::terminate`].
#[async_trait]
pub trait SandboxService: Send + Sync + std::fmt::Debug {
    /// Creates the sandbox with this id, or resumes an interrupted earlier call; a running sandbox stays unchanged. Returns before the
    /// agent server responds. `task` is the start that needs the sandbox, which becomes a member before anything is created at the
    /// provider.
    ///
    /// # Errors
    /// [`crate::Error::Refused`] with a message for the user when this server cannot create one; other errors can be retried.
    async fn start(&self, user: &UserId, id: &str, task: Option<Uuid>) -> Result<Launch>;

    /// Returns the user's sandboxes with these ids, in the same order, with `None` for unknown ids. A sandbox whose provider does not
    /// respond has status ERROR and a `detail` about that. This is for lists; use [`SandboxService::inspect`] for decisions.
    ///
    /// # Errors
    /// [`crate::Error::Store`] or [`crate::Error::Upstream`].
    async fn batch_get(&self, user: &UserId, ids: &[String]) -> Result<Vec<Option<Sandbox>>>;

    /// Returns all sandboxes of the user, newest first.
    ///
    /// # Errors
    /// [`crate::Error::Store`] or [`crate::Error::Upstream`].
    async fn list(&self, user: &UserId) -> Result<Vec<Sandbox>>;

    /// Pauses a sandbox, so that it can be resumed. Returns false when it does not exist or cannot be paused any more.
    ///
    /// # Errors
    /// [`crate::Error::Store`] or [`crate::Error::Upstream`].
    async fn pause(&self, user: &UserId, id: &str) -> Result<bool>;

    /// Resumes a paused sandbox. Returns before its agent server responds; returns false when the sandbox does not exist.
    ///
    /// # Errors
    /// [`crate::Error::Store`] or [`crate::Error::Upstream`].
    async fn resume(&self, user: &UserId, id: &str) -> Result<bool>;

    /// Terminates a sandbox at its provider and deletes its content. The record stays. Returns whether the provider has nothing left of it;
    /// if not, the call must be repeated.
    ///
    /// # Errors
    /// [`crate::Error::Store`] or [`crate::Error::Upstream`].
    async fn terminate(&self, user: &UserId, id: &str) -> Result<bool>;

    /// How long a provider must report that nothing is left of a terminated sandbox until its record is removed. It is longer than a
    /// creation whose response was lost can take: the sandbox of such a creation appears after the first report.
    fn confirmation_delay(&self) -> Duration {
        Duration::ZERO
    }

    /// Whether [`SandboxService::resume`] launches a sandbox again that is MISSING, with all of its files.
    fn relaunches(&self) -> bool {
        false
    }

    /// Whether [`SandboxService::list_provider`] distinguishes this deployment's sandboxes from others.
    fn can_list_provider(&self) -> bool {
        false
    }

    /// Returns the sandboxes that exist at the provider, also those without a record.
    ///
    /// # Errors
    /// [`crate::Error::Upstream`] when the provider does not respond.
    async fn list_provider(&self) -> Result<Vec<ProviderSandbox>> {
        Ok(Vec::new())
    }

    /// Terminates what the provider runs for this deployment and no sandbox uses, where [`SandboxService::list_provider`] cannot name it.
    /// Returns how much.
    ///
    /// # Errors
    /// [`crate::Error::Upstream`] when the provider does not respond; [`crate::Error::Store`].
    async fn end_orphans(&self, _now: Time) -> Result<usize> {
        Ok(0)
    }

    /// The longest time between two inspections of a running sandbox; `None` if it need not be inspected.
    fn inspection_period(&self) -> Option<Duration> {
        None
    }

    /// Records that a conversation was started in the sandbox now.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    async fn mark_used(&self, user: &UserId, id: &str) -> Result<()>;

    /// Returns one sandbox of the user with its actual status, or an error if that is unknown because the provider does not respond.
    ///
    /// # Errors
    /// [`crate::Error::Upstream`] when the provider does not respond; [`crate::Error::Store`].
    async fn inspect(&self, user: &UserId, id: &str) -> Result<Option<Sandbox>> {
        self.get(user, id).await
    }

    /// Returns sandboxes of several users as [`SandboxService::inspect`] does, in the order of the keys, with as few calls as possible.
    ///
    /// # Errors
    /// [`crate::Error::Upstream`] when the provider does not respond; [`crate::Error::Store`].
    async fn inspect_all(&self, keys: &[(UserId, String)]) -> Result<Vec<Option<Sandbox>>> {
        try_join_all(keys.iter().map(|(user, id)| self.inspect(user, id))).await
    }

    /// Whether the agent servers know the address of this API, so that commands can notify it of their ends.
    fn sends_webhooks(&self) -> bool {
        true
    }

    /// Returns one sandbox of the user.
    ///
    /// # Errors
    /// Those of [`SandboxService::batch_get`].
    async fn get(&self, user: &UserId, id: &str) -> Result<Option<Sandbox>> {
        Ok(self.batch_get(user, &[id.to_owned()]).await?.pop().flatten())
    }
}

/// Returns the existing records without duplicates.
fn distinct(records: &[Option<SandboxRecord>]) -> Vec<&SandboxRecord> {
    let mut known: Vec<&SandboxRecord> = records.iter().flatten().collect();
    known.sort_by(|one, other| one.id.cmp(&other.id));
    known.dedup_by(|one, other| one.id == other.id);
    known
}

/// Returns the observed sandboxes in the order of `records`.
fn in_order(records: &[Option<SandboxRecord>], observed: &[Sandbox]) -> Vec<Option<Sandbox>> {
    let find = |record: &SandboxRecord| observed.iter().find(|sandbox| sandbox.id == record.id).cloned();
    records.iter().map(|record| record.as_ref().and_then(find)).collect()
}

/// Returns the name of a new sandbox at a provider that several owners and deployments share. Ids are unique per owner only, and clients may
/// choose them: the name must differ between two owners with the same id. It begins with [`prefix_of`] the deployment.
fn new_name(user: &UserId, id: &str, deployment: Option<&str>) -> String {
    let name = &sha256_hex(&user.key_of(id))[..32];
    match deployment {
        Some(deployment) => format!("{}{name}", prefix_of(deployment)),
        None => name.to_owned(),
    }
}

/// Returns the name of a sandbox at its provider. Records of earlier versions do not contain it.
fn name_of(record: &SandboxRecord) -> String {
    record.name.clone().unwrap_or_else(|| new_name(&record.user, &record.id, None))
}

/// Returns the beginning of the names of a deployment's sandboxes. Providers limit names to 63 characters.
fn prefix_of(deployment: &str) -> String {
    format!("{}-", &sha256_hex(deployment)[..12])
}

/// Creates the sandbox provider that the configuration selects. A new provider needs a file in this folder and a line here.
#[must_use]
pub fn service(config: &SandboxConfig, store: SandboxStore) -> Arc<dyn SandboxService> {
    match config {
        SandboxConfig::Process(process) => Arc::new(process::ProcessSandboxes::new(process.clone(), store)),
        #[cfg(feature = "docker")]
        SandboxConfig::Docker(docker) => Arc::new(docker::DockerSandboxes::new(docker.clone(), store)),
        SandboxConfig::Remote(remote) => Arc::new(remote::RemoteSandboxes::new(remote.clone(), store)),
        SandboxConfig::Microvm(microvm) => Arc::new(microvm::MicrovmSandboxes::new((**microvm).clone(), store)),
        SandboxConfig::None => Arc::new(none::NoSandboxes),
    }
}

/// Creates what [`service`] creates, for a function that only shows sandboxes. It contains less code, and needs fewer permissions.
#[must_use]
pub fn viewer(config: &SandboxConfig, store: SandboxStore) -> Arc<dyn SandboxService> {
    match config {
        SandboxConfig::Microvm(microvm) => Arc::new(microvm::MicrovmViewer::new((**microvm).clone(), store)),
        SandboxConfig::Process(process) => Arc::new(process::ProcessSandboxes::new(process.clone(), store)),
        #[cfg(feature = "docker")]
        SandboxConfig::Docker(docker) => Arc::new(docker::DockerSandboxes::new(docker.clone(), store)),
        SandboxConfig::Remote(remote) => Arc::new(remote::RemoteSandboxes::new(remote.clone(), store)),
        SandboxConfig::None => Arc::new(none::NoSandboxes),
    }
}
