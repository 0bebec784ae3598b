//! Configuration: all deployment settings, read from environment variables once per process.

use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;

use crate::dynamo::INDEX_LAG;
pub use crate::env::{ConfigError, permitted_origins, text};
use crate::env::{flag, parsed, required, web_url};
use crate::http_client::AddressPolicy;
#[cfg(feature = "docker")]
pub use crate::sandbox::config::DockerSandboxConfig;
pub use crate::sandbox::config::{MicrovmSandboxConfig, ProcessSandboxConfig, RemoteSandboxConfig, SandboxConfig};

/// The names of the tables and the bucket, and the URLs of the queues.
#[derive(Clone, Debug)]
pub struct Names {
    /// `CONVERSATIONS_TABLE`
    pub conversations: String,
    /// `START_TASKS_TABLE`
    pub start_tasks: String,
    /// `SANDBOXES_TABLE`
    pub sandboxes: String,
    /// `EVENTS_TABLE`
    pub events: String,
    /// `USERS_TABLE`
    pub users: String,
    /// `BUCKET`
    pub bucket: String,
    /// `JOB_QUEUE_URL`
    pub job_queue_url: String,
    /// `EXPORT_QUEUE_URL`
    pub export_queue_url: String,
}

impl Names {
    /// Creates names with a common prefix. The caller must set the queue URLs.
    #[must_use]
    pub fn with_prefix(prefix: &str) -> Self {
        Self {
            conversations: format!("{prefix}conversations"),
            start_tasks: format!("{prefix}start-tasks"),
            sandboxes: format!("{prefix}sandboxes"),
            events: format!("{prefix}events"),
            users: format!("{prefix}users"),
            bucket: format!("{prefix}data"),
            job_queue_url: String::new(),
            export_queue_url: String::new(),
        }
    }
}

/// The configuration of starts. The defaults are the contract's.
#[derive(Clone, Debug)]
pub struct StartConfig {
    /// The timeout for the first response of a sandbox's agent server (`SANDBOX_STARTUP_TIMEOUT`, seconds, 120).
    pub sandbox_startup_timeout: Duration,
    /// The timeout of a clone and checkout (`CLONE_TIMEOUT`, seconds, 300).
    pub clone_timeout: Duration,
    /// The timeout of `.openhands/setup.sh` (`SETUP_SCRIPT_TIMEOUT`, seconds, 600).
    pub setup_script_timeout: Duration,
    /// The timeout of every other step (`STEP_TIMEOUT`, seconds, 300).
    pub step_timeout: Duration,
    /// The timeout of one request to an agent server (`AGENT_REQUEST_TIMEOUT`, seconds, 120). The creation of a conversation ends earlier
    /// where a worker would have no time left to find out what became of it.
    pub agent_request_timeout: Duration,
    /// The timeout of an MCP server's response, after which a conversation is created without this server (`MCP_PROBE_TIMEOUT`, seconds, 5;
    /// 0 turns the probe off).
    pub mcp_probe_timeout: Duration,
    /// How long a worker waits in its own process before it returns the task to the queue (`START_INLINE_WAIT_MS`, 2000). On Lambda waiting
    /// costs money; locally it is free.
    pub inline_wait: Duration,
    /// The same while a sandbox boots (`START_BOOT_INLINE_WAIT_MS`, 0). The boots of all waiting starts are observed together, see
    /// [`crate::sandbox::boots`].
    pub boot_inline_wait: Duration,
    /// The longest delay between two polls of a start that waits in the queue (`START_MAX_POLL_DELAY_MS`, 60000).
    pub max_poll_delay: Duration,
    /// The duration of a worker's lease on a task unless it is renewed (`START_LEASE_SECONDS`, 15).
    pub lease: Duration,
    /// The poll interval (`START_POLL_MS`, 100).
    pub poll: Duration,
    /// The keep-alive interval: stream-start sends a newline after this time without output (`STREAM_KEEP_ALIVE_MS`, 10000). CloudFront
    /// ends a stream that is idle for 30 s, and API Gateway one that is idle for 5 minutes.
    pub keep_alive: Duration,
    /// The number of a user's unfinished starts at which further ones are refused with a 429 (`MAX_UNFINISHED_STARTS`, 500). It is
    /// approximate, see [`crate::user::counters::add_below`].
    pub max_unfinished_starts: u32,
    /// The maximum number of conversations that grouping assigns to one sandbox (`MAX_CONVERSATIONS_PER_SANDBOX`, 20).
    pub max_conversations_per_sandbox: usize,
    /// Whether a start initialises an empty git repository in a workspace without one (`INIT_GIT_IN_EMPTY_WORKSPACE`, true).
    pub init_git_in_empty_workspace: bool,
    /// Whether git hosts may be reached over plain HTTP if their setting allows it (`ALLOW_INSECURE_GIT_ACCESS`, false).
    pub allow_insecure_git_access: bool,
    /// Whether agents' models stream tokens, if the agent server can forward them (`TOKEN_STREAMING`, true).
    pub token_streaming: bool,
    /// The public URL of this API (`OH_WEB_URL`, or `https://$WEB_HOST`), for agents' secret lookups and for MCP.
    pub web_url: Option<String>,
    /// `TAVILY_API_KEY` or `SEARCH_API_KEY`
    pub tavily_api_key: Option<SecretString>,
    /// `OPENHANDS_PROVIDER_BASE_URL`
    pub openhands_provider_base_url: Option<String>,
    /// `WEB_HOST`, for trace metadata.
    pub web_host: Option<String>,
    /// The lifetime of a token with which an agent looks up secrets (`ACCESS_TOKEN_HARD_TIMEOUT`, seconds, 14 days).
    pub access_token_lifetime: Duration,
}

impl Default for StartConfig {
    fn default() -> Self {
        Self {
            sandbox_startup_timeout: Duration::from_secs(120),
            clone_timeout: Duration::from_secs(300),
            setup_script_timeout: Duration::from_secs(600),
            step_timeout: Duration::from_secs(300),
            agent_request_timeout: Duration::from_secs(120),
            mcp_probe_timeout: Duration::from_secs(5),
            inline_wait: Duration::from_secs(2),
            boot_inline_wait: Duration::ZERO,
            max_poll_delay: Duration::from_secs(60),
            lease: Duration::from_secs(15),
            poll: Duration::from_millis(100),
            keep_alive: Duration::from_secs(10),
            max_unfinished_starts: 500,
            max_conversations_per_sandbox: 20,
            init_git_in_empty_workspace: true,
            allow_insecure_git_access: false,
            token_streaming: true,
            web_url: None,
            tavily_api_key: None,
            openhands_provider_base_url: None,
            web_host: None,
            access_token_lifetime: Duration::from_secs(14 * 24 * 3600),
        }
    }
}

/// The maximum number of events in an export: the zip directory needs memory for each event. The memory of the functions in `template.yaml`
/// fits this; `docs/adr/0004-zip-crate.md` has the figures.
pub const MAX_EXPORT_EVENTS: u64 = 1_000_000;

/// The configuration of exports.
#[derive(Clone, Debug)]
pub struct ExportConfig {
    /// The maximum size in bytes of a zip that is streamed in the response (`EXPORT_INLINE_LIMIT`, 64 MiB). The response for a larger zip
    /// is a redirect to a link. API Gateway limits a stream to 2 MB/s after its first 10 MB, so 64 MiB need half a minute.
    pub inline_limit: u64,
    /// How long a request builds an export before it hands it over to the function `exports` (`EXPORT_BUDGET_MS`, 20000). API Gateway waits
    /// for 29 s.
    pub budget: Duration,
    /// How long the function `exports` builds an export before the build fails (`EXPORT_BUILD_BUDGET_MS`, 840000). Lambda terminates the
    /// function after 900 s.
    pub build_budget: Duration,
    /// The timeout for the backfill of events that an agent server has not delivered (`EXPORT_CATCH_UP_MS`, 5000).
    pub catch_up: Duration,
    /// The maximum lag of indexes after a write (`EXPORT_SETTLE_MS`, 3000). A build of an export starts no sooner than this after the last
    /// change of the log: the indexes may lack events until then.
    pub settle: Duration,
    /// The duration of the lease on an export unless it is renewed (`EXPORT_LEASE_SECONDS`, 30).
    pub lease: Duration,
    /// The pause before the job of a failed build is enqueued again the first time. Not an environment variable.
    pub retry_pause: Duration,
    /// The maximum number of events in an export. Not an environment variable: the memory of the functions depends on it.
    pub max_events: u64,
}

impl Default for ExportConfig {
    fn default() -> Self {
        Self {
            inline_limit: 64 * 1024 * 1024,
            budget: Duration::from_secs(20),
            build_budget: Duration::from_secs(840),
            catch_up: Duration::from_secs(5),
            settle: INDEX_LAG,
            lease: Duration::from_secs(30),
            retry_pause: Duration::from_secs(10),
            max_events: MAX_EXPORT_EVENTS,
        }
    }
}

impl ExportConfig {
    /// Reads the environment. Unset variables keep their defaults.
    ///
    /// # Errors
    /// Names the first variable that is malformed.
    pub fn from_env() -> Result<Self, ConfigError> {
        let default = Self::default();
        let milliseconds = |name, default| Ok::<_, ConfigError>(parsed(name)?.map_or(default, Duration::from_millis));
        Ok(Self {
            inline_limit: parsed("EXPORT_INLINE_LIMIT")?.unwrap_or(default.inline_limit),
            budget: milliseconds("EXPORT_BUDGET_MS", default.budget)?,
            build_budget: milliseconds("EXPORT_BUILD_BUDGET_MS", default.build_budget)?,
            catch_up: milliseconds("EXPORT_CATCH_UP_MS", default.catch_up)?,
            settle: milliseconds("EXPORT_SETTLE_MS", default.settle)?,
            lease: parsed("EXPORT_LEASE_SECONDS")?.map_or(default.lease, Duration::from_secs),
            retry_pause: default.retry_pause,
            max_events: default.max_events,
        })
    }
}

/// The default of [`Config::sandbox_request_budget`].
pub const SANDBOX_REQUEST_BUDGET: Duration = Duration::from_secs(20);

/// The location of the key that encrypts secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SealingConfig {
    /// A file on this machine (`SEALING_KEY_FILE`).
    File(PathBuf),
    /// The `users` table, where the key is encrypted under a KMS key (`SEALING_KMS_KEY`: its id, alias or ARN).
    Kms(String),
}

/// The whole configuration of a process.
#[derive(Clone, Debug)]
pub struct Config {
    pub names: Names,
    pub start: StartConfig,
    pub sandbox: SandboxConfig,
    /// The location of the key that encrypts secrets.
    pub sealing: SealingConfig,
    /// Whether all requests belong to the one local user (`SINGLE_USER`), instead of the user that the authorizer authenticates.
    pub single_user: bool,
    /// The time budget of one page for requests to agent servers about live status (`LIVE_STATUS_BUDGET_MS`, 1500).
    pub live_status_budget: Duration,
    /// The time limit of a request that inspects a sandbox (`SANDBOX_REQUEST_BUDGET_MS`, 20000). API Gateway waits for 29 s.
    pub sandbox_request_budget: Duration,
    /// How long a sandbox may be idle before it is paused (`SANDBOX_IDLE_MINUTES`). `None`, and 0 in the environment: it is not paused.
    pub sandbox_idle_limit: Option<Duration>,
    pub export: ExportConfig,
    /// The addresses of agent servers that are allowed (`ALLOW_PRIVATE_AGENT_SERVERS`, false): public ones only, or any.
    pub address_policy: AddressPolicy,
}

impl Config {
    /// Reads the environment.
    ///
    /// # Errors
    /// Names the first variable that is missing or malformed.
    pub fn from_env() -> Result<Self, ConfigError> {
        let names = Names {
            conversations: required("CONVERSATIONS_TABLE")?,
            start_tasks: required("START_TASKS_TABLE")?,
            sandboxes: required("SANDBOXES_TABLE")?,
            events: required("EVENTS_TABLE")?,
            users: required("USERS_TABLE")?,
            bucket: required("BUCKET")?,
            job_queue_url: required("JOB_QUEUE_URL")?,
            export_queue_url: required("EXPORT_QUEUE_URL")?,
        };
        Ok(Self {
            names,
            start: StartConfig::from_env()?,
            sandbox: SandboxConfig::from_env()?,
            sealing: match text("SEALING_KMS_KEY") {
                Some(key) => SealingConfig::Kms(key),
                None => SealingConfig::File(required("SEALING_KEY_FILE")?.into()),
            },
            single_user: flag("SINGLE_USER", false)?,
            live_status_budget: Duration::from_millis(parsed("LIVE_STATUS_BUDGET_MS")?.unwrap_or(1500)),
            sandbox_request_budget: parsed("SANDBOX_REQUEST_BUDGET_MS")?
                .map_or(SANDBOX_REQUEST_BUDGET, Duration::from_millis),
            sandbox_idle_limit: idle_limit()?,
            export: ExportConfig::from_env()?,
            address_policy: if flag("ALLOW_PRIVATE_AGENT_SERVERS", false)? {
                AddressPolicy::Any
            } else {
                AddressPolicy::PublicOnly
            },
        })
    }

    /// Returns the variables from which [`Config::from_env`] reads this configuration in another process: tables, queues, sandboxes.
    #[must_use]
    pub fn to_env(&self) -> Vec<(&'static str, String)> {
        let names = &self.names;
        let mut variables = vec![
            ("CONVERSATIONS_TABLE", names.conversations.clone()),
            ("START_TASKS_TABLE", names.start_tasks.clone()),
            ("SANDBOXES_TABLE", names.sandboxes.clone()),
            ("EVENTS_TABLE", names.events.clone()),
            ("USERS_TABLE", names.users.clone()),
            ("BUCKET", names.bucket.clone()),
            ("JOB_QUEUE_URL", names.job_queue_url.clone()),
            ("EXPORT_QUEUE_URL", names.export_queue_url.clone()),
            match &self.sealing {
                SealingConfig::File(path) => ("SEALING_KEY_FILE", path.display().to_string()),
                SealingConfig::Kms(key) => ("SEALING_KMS_KEY", key.clone()),
            },
            ("SINGLE_USER", self.single_user.to_string()),
            ("ALLOW_PRIVATE_AGENT_SERVERS", (self.address_policy == AddressPolicy::Any).to_string()),
        ];
        if let Some(limit) = self.sandbox_idle_limit {
            variables.push(("SANDBOX_IDLE_MINUTES", limit.as_secs().div_ceil(60).to_string()));
        }
        variables.extend(self.sandbox.to_env());
        variables
    }
}

/// Reads [`Config::sandbox_idle_limit`] from the environment.
///
/// # Errors
/// When the variable is malformed.
pub fn idle_limit() -> Result<Option<Duration>, ConfigError> {
    let minutes: Option<u32> = parsed("SANDBOX_IDLE_MINUTES")?;
    Ok(minutes.filter(|minutes| *minutes > 0).map(|minutes| Duration::from_secs(60 * u64::from(minutes))))
}

/// The configuration of the authorizer.
#[derive(Clone, Debug)]
pub struct AuthorizerConfig {
    /// The table with the hashes of API keys (`USERS_TABLE`).
    pub users: String,
    /// The accepted token issuer; `None` if only API keys are accepted.
    pub oidc: Option<OidcConfig>,
}

/// An OpenID Connect issuer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OidcConfig {
    /// The issuer identifier, which is also the base URL of its metadata (`OIDC_ISSUER`), e.g. `https://accounts.example.com`.
    pub issuer: String,
    /// The required audience of tokens (`aud`, `OIDC_AUDIENCE`).
    pub audience: String,
}

impl AuthorizerConfig {
    /// Reads the environment.
    ///
    /// # Errors
    /// Names the first variable that is missing or malformed. The audience is required, because without it a token that the issuer created
    /// for another service would be accepted.
    pub fn from_env() -> Result<Self, ConfigError> {
        let oidc = match text("OIDC_ISSUER") {
            Some(issuer) => Some(OidcConfig { issuer, audience: required("OIDC_AUDIENCE")? }),
            None => None,
        };
        Ok(Self { users: required("USERS_TABLE")?, oidc })
    }
}

impl StartConfig {
    /// Reads the environment. Unset variables keep their defaults.
    ///
    /// # Errors
    /// Names the first variable that is malformed.
    pub fn from_env() -> Result<Self, ConfigError> {
        let default = Self::default();
        let seconds = |name, default| Ok::<_, ConfigError>(parsed(name)?.map_or(default, Duration::from_secs));
        let milliseconds = |name, default| Ok::<_, ConfigError>(parsed(name)?.map_or(default, Duration::from_millis));
        let web_host = text("WEB_HOST");
        Ok(Self {
            sandbox_startup_timeout: seconds("SANDBOX_STARTUP_TIMEOUT", default.sandbox_startup_timeout)?,
            clone_timeout: seconds("CLONE_TIMEOUT", default.clone_timeout)?,
            setup_script_timeout: seconds("SETUP_SCRIPT_TIMEOUT", default.setup_script_timeout)?,
            step_timeout: seconds("STEP_TIMEOUT", default.step_timeout)?,
            agent_request_timeout: seconds("AGENT_REQUEST_TIMEOUT", default.agent_request_timeout)?,
            mcp_probe_timeout: seconds("MCP_PROBE_TIMEOUT", default.mcp_probe_timeout)?,
            inline_wait: milliseconds("START_INLINE_WAIT_MS", default.inline_wait)?,
            boot_inline_wait: milliseconds("START_BOOT_INLINE_WAIT_MS", default.boot_inline_wait)?,
            max_poll_delay: milliseconds("START_MAX_POLL_DELAY_MS", default.max_poll_delay)?,
            lease: seconds("START_LEASE_SECONDS", default.lease)?,
            poll: milliseconds("START_POLL_MS", default.poll)?,
            keep_alive: milliseconds("STREAM_KEEP_ALIVE_MS", default.keep_alive)?,
            max_unfinished_starts: parsed("MAX_UNFINISHED_STARTS")?.unwrap_or(default.max_unfinished_starts),
            max_conversations_per_sandbox: parsed("MAX_CONVERSATIONS_PER_SANDBOX")?
                .unwrap_or(default.max_conversations_per_sandbox),
            init_git_in_empty_workspace: flag("INIT_GIT_IN_EMPTY_WORKSPACE", default.init_git_in_empty_workspace)?,
            allow_insecure_git_access: flag("ALLOW_INSECURE_GIT_ACCESS", false)?,
            token_streaming: flag("TOKEN_STREAMING", true)?,
            web_url: web_url(),
            tavily_api_key: text("TAVILY_API_KEY").or_else(|| text("SEARCH_API_KEY")).map(SecretString::from),
            openhands_provider_base_url: text("OPENHANDS_PROVIDER_BASE_URL"),
            web_host,
            access_token_lifetime: seconds("ACCESS_TOKEN_HARD_TIMEOUT", default.access_token_lifetime)?,
        })
    }
}
