//! Sandboxes: machines that run an agent server. One trait, one file an implementation, one place that chooses.

pub mod config;
#[cfg(feature = "docker")]
pub mod docker;
pub mod none;
pub mod process;
pub mod remote;
pub mod session_key;
pub mod spec;
pub mod store;

use std::sync::Arc;

use async_trait::async_trait;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};

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

/// The webhook variables of every agent server that has a webhook. An event reaches us within a second: the buffer holds five events,
/// and an agent server sends it once it is full, or after this delay, which is 30 s by default. A batch has 2 MiB at most (5 MiB by
/// default, from 1.49 on; a larger event is sent alone): Lambda accepts 6 MB, with the body as an escaped JSON string.
pub const WEBHOOK_VARIABLES: [(&str, &str); 2] =
    [("OH_WEBHOOKS_0_FLUSH_DELAY", "1"), ("OH_WEBHOOKS_0_MAX_BATCH_BYTES", "2097152")];

/// The storage variables of every agent server: it has its conversations to itself, so it needs no leases on them. A lease outlives an
/// agent server that was killed, and keeps the next one in the same container from its conversations for 45 s.
pub const STORAGE_VARIABLES: [(&str, &str); 1] = [("OH_LEASE_TTL_SECONDS", "0")];

/// The longest id of a sandbox, in bytes. Longer ones are of none.
pub const MAX_ID: usize = 255;

/// A sandbox as its service sees it now.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// Its id, unique among its owner's.
    pub id: String,
    /// What it was made from.
    pub spec_id: String,
    /// What state it is in.
    pub status: SandboxStatus,
    /// The key of its agent server.
    pub session_api_key: Option<SecretString>,
    /// Its addresses; `None` unless it runs.
    pub exposed_urls: Option<Vec<ExposedUrl>>,
    /// When it was made.
    pub created_at: Time,
    /// When a conversation was last started in it.
    pub used_at: Time,
    /// The absolute folder in which conversations work.
    pub working_dir: String,
    /// What is wrong, for a person, when it failed or is gone.
    pub detail: Option<String>,
}

impl Sandbox {
    /// A sandbox as its record has it, in this state; nothing is known of its addresses.
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

    /// The address of its agent server, if it runs.
    #[must_use]
    pub fn agent_server_url(&self) -> Option<&str> {
        self.exposed_urls
            .as_ref()?
            .iter()
            .find(|exposed| exposed.name == AGENT_SERVER)
            .map(|exposed| exposed.url.as_str())
    }

    /// Its agent server, if it runs.
    #[must_use]
    pub fn agent_server(&self, http: &HttpClient) -> Option<AgentServer> {
        let url = self.agent_server_url().filter(|_| self.status == SandboxStatus::Running)?;
        Some(AgentServer::new(http.clone(), url, self.session_api_key.clone()))
    }
}

/// Makes and looks after sandboxes. Every operation may be repeated: the outcome is as if it was done once.
#[async_trait]
pub trait SandboxService: Send + Sync + std::fmt::Debug {
    /// Makes the sandbox with this id, or goes on where an earlier call was cut off; one that runs is left as it is. Returns
    /// before its agent server answers.
    ///
    /// # Errors
    /// [`crate::Error::Refused`] when none can be made here, whose text is for the user; others may be tried again.
    async fn start(&self, user: &UserId, id: &str) -> Result<()>;

    /// The user's sandboxes with these ids, in the same order, `None` for unknown ones.
    ///
    /// # Errors
    /// [`crate::Error::Store`] or [`crate::Error::Upstream`].
    async fn batch_get(&self, user: &UserId, ids: &[String]) -> Result<Vec<Option<Sandbox>>>;

    /// All sandboxes of the user, newest first.
    ///
    /// # Errors
    /// [`crate::Error::Store`] or [`crate::Error::Upstream`].
    async fn list(&self, user: &UserId) -> Result<Vec<Sandbox>>;

    /// Stops a sandbox so that it can be resumed. False when there is none, or nothing of it is left to pause.
    ///
    /// # Errors
    /// [`crate::Error::Store`] or [`crate::Error::Upstream`].
    async fn pause(&self, user: &UserId, id: &str) -> Result<bool>;

    /// Lets a paused sandbox go on; returns before its agent server answers. False when there is none.
    ///
    /// # Errors
    /// [`crate::Error::Store`] or [`crate::Error::Upstream`].
    async fn resume(&self, user: &UserId, id: &str) -> Result<bool>;

    /// Ends a sandbox and removes all that is in it. False when there is none.
    ///
    /// # Errors
    /// [`crate::Error::Store`] or [`crate::Error::Upstream`].
    async fn delete(&self, user: &UserId, id: &str) -> Result<bool>;

    /// Notes that a conversation was started in the sandbox now.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    async fn mark_used(&self, user: &UserId, id: &str) -> Result<()>;

    /// One sandbox of the user.
    ///
    /// # Errors
    /// Those of [`SandboxService::batch_get`].
    async fn get(&self, user: &UserId, id: &str) -> Result<Option<Sandbox>> {
        Ok(self.batch_get(user, &[id.to_owned()]).await?.pop().flatten())
    }
}

/// The records that are there, each once.
fn distinct(records: &[Option<SandboxRecord>]) -> Vec<&SandboxRecord> {
    let mut known: Vec<&SandboxRecord> = records.iter().flatten().collect();
    known.sort_by(|one, other| one.id.cmp(&other.id));
    known.dedup_by(|one, other| one.id == other.id);
    known
}

/// What was found of [`distinct`] records, in the order of all of them.
fn in_order(records: &[Option<SandboxRecord>], observed: &[Sandbox]) -> Vec<Option<Sandbox>> {
    let find = |record: &SandboxRecord| observed.iter().find(|sandbox| sandbox.id == record.id).cloned();
    records.iter().map(|record| record.as_ref().and_then(find)).collect()
}

/// What a provider that many owners share calls a sandbox. Ids are unique among their owner's only, and clients may choose them:
/// two owners' must not meet there.
fn name_of(user: &UserId, id: &str) -> String {
    sha256_hex(&user.key_of(id))[..32].to_owned()
}

/// The service that the configuration asks for. A new kind of sandbox is a file beside this one and a line here.
#[must_use]
pub fn service(config: &SandboxConfig, store: SandboxStore) -> Arc<dyn SandboxService> {
    match config {
        SandboxConfig::Process(process) => Arc::new(process::ProcessSandboxes::new(process.clone(), store)),
        #[cfg(feature = "docker")]
        SandboxConfig::Docker(docker) => Arc::new(docker::DockerSandboxes::new(docker.clone(), store)),
        SandboxConfig::Remote(remote) => Arc::new(remote::RemoteSandboxes::new(remote.clone(), store)),
        SandboxConfig::None => Arc::new(none::NoSandboxes::new(store)),
    }
}
