//! Configuration of sandbox providers.

use std::path::PathBuf;
#[cfg(feature = "docker")]
use std::time::Duration;

use aws_types::SdkConfig;
use secrecy::{ExposeSecret as _, SecretString};

use super::{microvm, spec};
use crate::aws::sdk_config_from_env;
#[cfg(feature = "docker")]
use crate::env::flag;
use crate::env::{ConfigError, list, parsed, permitted_origins, required, text, web_url};

/// The sandbox provider and its configuration.
#[derive(Clone, Debug)]
pub enum SandboxConfig {
    /// One agent server process per sandbox, on this machine.
    Process(ProcessSandboxConfig),
    /// One container per sandbox, in a Docker engine.
    #[cfg(feature = "docker")]
    Docker(DockerSandboxConfig),
    /// Sandboxes of a runtime API, which runs images on remote machines.
    Remote(RemoteSandboxConfig),
    /// One AWS Lambda MicroVM per sandbox.
    Microvm(Box<MicrovmSandboxConfig>),
    /// No sandboxes: a start ends with status ERROR and a message that names the reason.
    None,
}

impl SandboxConfig {
    /// Reads the environment.
    ///
    /// # Errors
    /// Names the first variable that is missing or malformed.
    pub fn from_env() -> Result<Self, ConfigError> {
        Ok(match required("SANDBOX_KIND")?.as_str() {
            "process" => SandboxConfig::Process(ProcessSandboxConfig {
                folder: required("SANDBOX_FOLDER")?.into(),
                python: required("AGENT_SERVER_PYTHON")?.into(),
                version: required("AGENT_SERVER_VERSION")?,
                webhook_base_url: required("WEBHOOK_BASE_URL")?,
                max_sandboxes: max_processes()?,
                allow_cors_origins: permitted_origins(),
            }),
            "remote" => SandboxConfig::Remote(RemoteSandboxConfig::from_env(spec::AGENT_SERVER_VERSION)?),
            "microvm" => SandboxConfig::Microvm(Box::new(MicrovmSandboxConfig::from_env(spec::AGENT_SERVER_VERSION)?)),
            "none" => SandboxConfig::None,
            other => {
                return Err(ConfigError {
                    name: "SANDBOX_KIND",
                    problem: format!("`{other}` is not one of process, remote, microvm, none"),
                });
            }
        })
    }

    /// Returns the variables from which [`SandboxConfig::from_env`] reads this configuration in another process.
    pub(crate) fn to_env(&self) -> Vec<(&'static str, String)> {
        match self {
            SandboxConfig::None => vec![("SANDBOX_KIND", "none".into())],
            SandboxConfig::Remote(remote) => remote.to_env(),
            SandboxConfig::Microvm(microvm) => microvm.to_env(),
            // Other processes cannot use Docker sandboxes: functions under `cargo lambda watch` are built without the feature.
            #[cfg(feature = "docker")]
            SandboxConfig::Docker(_) => vec![("SANDBOX_KIND", "none".into())],
            SandboxConfig::Process(process) => vec![
                ("SANDBOX_KIND", "process".into()),
                ("SANDBOX_FOLDER", process.folder.display().to_string()),
                ("AGENT_SERVER_PYTHON", process.python.display().to_string()),
                ("AGENT_SERVER_VERSION", process.version.clone()),
                ("WEBHOOK_BASE_URL", process.webhook_base_url.clone()),
                ("SANDBOX_MAX_RUNNING", process.max_sandboxes.to_string()),
            ],
        }
    }
}

/// Configuration of agent servers that run as processes of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessSandboxConfig {
    /// The folder that holds one folder per sandbox (`SANDBOX_FOLDER`).
    pub folder: PathBuf,
    /// A Python interpreter that can import `openhands.agent_server` (`AGENT_SERVER_PYTHON`).
    pub python: PathBuf,
    /// The version of that agent server (`AGENT_SERVER_VERSION`).
    pub version: String,
    /// The base URL to which agent servers post events (`WEBHOOK_BASE_URL`), e.g. `http://127.0.0.1:3000/api/v1/webhooks`.
    pub webhook_base_url: String,
    /// The maximum number of running agent servers (`SANDBOX_MAX_RUNNING`, 10); each needs 150 to 300 MB of memory. One more causes the
    /// eviction (a stop) of the one that has been idle for the longest time; a start waits while none may be evicted.
    pub max_sandboxes: usize,
    /// Origins that agent servers accept in addition to those on localhost.
    pub allow_cors_origins: Vec<String>,
}

/// Reads [`ProcessSandboxConfig::max_sandboxes`] from the environment.
///
/// # Errors
/// When the variable is malformed.
pub fn max_processes() -> Result<usize, ConfigError> {
    Ok(parsed("SANDBOX_MAX_RUNNING")?.unwrap_or(10))
}

/// Configuration of agent servers that run in Docker containers.
#[cfg(feature = "docker")]
#[derive(Clone, Debug)]
pub struct DockerSandboxConfig {
    /// The id of the deployment (`DEPLOYMENT_ID`), which distinguishes its sandboxes from others at the same provider. Without it none is
    /// terminated that has no record.
    pub deployment: Option<String>,
    /// The address of the Docker engine: `unix://` and the path of its socket, or an HTTP address (`DOCKER_HOST`). `None` is the default
    /// socket.
    pub host: Option<String>,
    /// The image to run; see [`spec::image`].
    pub image: String,
    /// The URL pattern of a container, with `{port}` (`SANDBOX_CONTAINER_URL_PATTERN`, `http://localhost:{port}`).
    pub url_pattern: String,
    /// The port of this API on this machine, to which containers send webhooks (`SANDBOX_HOST_PORT`).
    pub host_port: u16,
    /// The prefix of container names (`SANDBOX_CONTAINER_NAME_PREFIX`, `oh-agent-server-`).
    pub container_name_prefix: String,
    /// The maximum number of running sandboxes per user (`SANDBOX_MAX_RUNNING`, 5). One more causes the eviction (a pause) of the one that
    /// has been idle for the longest time; a start waits while none may be evicted.
    pub max_sandboxes: usize,
    /// Volumes as `host:container[:mode]` (`SANDBOX_VOLUMES`, comma-separated).
    pub volumes: Vec<String>,
    /// The time until the first response of an agent server, after which its sandbox counts as failed (`SANDBOX_STARTUP_GRACE_SECONDS`,
    /// 60).
    pub startup_grace: Duration,
    /// Whether containers share this machine's network (`AGENT_SERVER_USE_HOST_NETWORK`).
    pub use_host_network: bool,
    /// Origins that agent servers accept in addition to those on localhost.
    pub allow_cors_origins: Vec<String>,
}

#[cfg(feature = "docker")]
impl DockerSandboxConfig {
    /// Reads the environment. `port` is the default for `SANDBOX_HOST_PORT`; `version` is the agent server version of the default image.
    ///
    /// # Errors
    /// Names the first variable that is malformed.
    pub fn from_env(port: u16, version: &str) -> Result<Self, ConfigError> {
        Ok(Self {
            deployment: text("DEPLOYMENT_ID"),
            host: text("DOCKER_HOST"),
            image: spec::image(version),
            url_pattern: text("SANDBOX_CONTAINER_URL_PATTERN").unwrap_or_else(|| "http://localhost:{port}".into()),
            host_port: parsed("SANDBOX_HOST_PORT")?.unwrap_or(port),
            container_name_prefix: text("SANDBOX_CONTAINER_NAME_PREFIX").unwrap_or_else(|| "oh-agent-server-".into()),
            max_sandboxes: parsed("SANDBOX_MAX_RUNNING")?.unwrap_or(5),
            volumes: list("SANDBOX_VOLUMES"),
            startup_grace: Duration::from_secs(parsed("SANDBOX_STARTUP_GRACE_SECONDS")?.unwrap_or(60)),
            use_host_network: flag("AGENT_SERVER_USE_HOST_NETWORK", false)?,
            allow_cors_origins: permitted_origins(),
        })
    }
}

/// Configuration of sandboxes of a runtime API.
#[derive(Clone, Debug)]
pub struct RemoteSandboxConfig {
    /// The id of the deployment (`DEPLOYMENT_ID`), which distinguishes its sandboxes from others at the same provider. Without it none is
    /// terminated that has no record.
    pub deployment: Option<String>,
    /// The URL of the runtime API (`SANDBOX_REMOTE_RUNTIME_API_URL`).
    pub api_url: String,
    /// Our key for the runtime API (`SANDBOX_API_KEY`).
    pub api_key: Option<SecretString>,
    /// The image to run; see [`spec::image`].
    pub image: String,
    /// The machine size of a sandbox: 1, 2, 4 or 8 (`SANDBOX_REMOTE_RESOURCE_FACTOR`, 1).
    pub resource_factor: u32,
    /// `gvisor` or `sysbox` (`SANDBOX_REMOTE_RUNTIME_CLASS`, `gvisor`).
    pub runtime_class: String,
    /// The runtime API's names of the secrets with which it pulls the image (`SANDBOX_REMOTE_IMAGE_PULL_SECRETS`, comma-separated).
    pub image_pull_secrets: Vec<String>,
    /// The maximum number of running sandboxes per user (`SANDBOX_MAX_RUNNING`, 10). One more causes the eviction (a pause) of the one that
    /// has been idle for the longest time; a start waits while none may be evicted.
    pub max_sandboxes: usize,
    /// The public address of this API (`OH_WEB_URL` or `WEB_HOST`). Without it, agent servers cannot send webhooks.
    pub web_url: Option<String>,
    /// Origins that agent servers accept in addition to the origin of this API.
    pub allow_cors_origins: Vec<String>,
}

impl RemoteSandboxConfig {
    /// Reads the environment. `version` is the agent server version of the default image.
    ///
    /// # Errors
    /// Names the first variable that is missing or malformed.
    pub fn from_env(version: &str) -> Result<Self, ConfigError> {
        Ok(Self {
            deployment: text("DEPLOYMENT_ID"),
            api_url: required("SANDBOX_REMOTE_RUNTIME_API_URL")?,
            api_key: text("SANDBOX_API_KEY").map(SecretString::from),
            image: spec::image(version),
            resource_factor: parsed("SANDBOX_REMOTE_RESOURCE_FACTOR")?.unwrap_or(1),
            runtime_class: text("SANDBOX_REMOTE_RUNTIME_CLASS").unwrap_or_else(|| "gvisor".into()),
            image_pull_secrets: list("SANDBOX_REMOTE_IMAGE_PULL_SECRETS"),
            max_sandboxes: parsed("SANDBOX_MAX_RUNNING")?.unwrap_or(10),
            web_url: web_url(),
            allow_cors_origins: permitted_origins(),
        })
    }

    fn to_env(&self) -> Vec<(&'static str, String)> {
        let mut variables = vec![
            ("SANDBOX_KIND", "remote".to_owned()),
            ("SANDBOX_REMOTE_RUNTIME_API_URL", self.api_url.clone()),
            ("SANDBOX_REMOTE_RESOURCE_FACTOR", self.resource_factor.to_string()),
            ("SANDBOX_REMOTE_RUNTIME_CLASS", self.runtime_class.clone()),
            ("SANDBOX_REMOTE_IMAGE_PULL_SECRETS", self.image_pull_secrets.join(",")),
            ("SANDBOX_MAX_RUNNING", self.max_sandboxes.to_string()),
        ];
        if let Some((repository, tag)) = self.image.rsplit_once(':') {
            variables.push(("AGENT_SERVER_IMAGE_REPOSITORY", repository.to_owned()));
            variables.push(("AGENT_SERVER_IMAGE_TAG", tag.to_owned()));
        }
        if let Some(deployment) = &self.deployment {
            variables.push(("DEPLOYMENT_ID", deployment.clone()));
        }
        if let Some(key) = &self.api_key {
            variables.push(("SANDBOX_API_KEY", key.expose_secret().to_owned()));
        }
        variables
    }
}

/// Configuration of sandboxes that are AWS Lambda MicroVMs.
#[derive(Clone, Debug)]
pub struct MicrovmSandboxConfig {
    /// The id of the deployment (`DEPLOYMENT_ID`), which distinguishes its sandboxes from others in the same account.
    pub deployment: Option<String>,
    /// The ARN of the MicroVM image (`SANDBOX_MICROVM_IMAGE`), such as `arn:aws:lambda:us-east-1:123456789012:microvm-image:NAME`.
    pub image: String,
    /// The address of the front door (`SANDBOX_MICROVM_URL`), such as `https://d111111abcdef8.cloudfront.net`.
    pub front_door_url: String,
    /// The ARN of the CloudFront KeyValueStore with the front door's routes (`SANDBOX_MICROVM_ROUTES`).
    pub routes: String,
    /// The container image from which the MicroVM image is built, the id of the sandbox spec; see [`spec::image`].
    pub spec: String,
    /// The maximum number of running sandboxes per user (`SANDBOX_MAX_RUNNING`, 10). One more causes the eviction (a pause) of the one that
    /// has been idle for the longest time; a start waits while none may be evicted.
    pub max_sandboxes: usize,
    /// The public address of this API (`OH_WEB_URL` or `WEB_HOST`). Without it, agent servers cannot send webhooks.
    pub web_url: Option<String>,
    /// Origins that agent servers accept in addition to the origin of this API.
    pub allow_cors_origins: Vec<String>,
    /// The folder in which conversations work, an absolute path in the image.
    pub working_dir: String,
    /// The configuration of the AWS clients.
    pub aws: SdkConfig,
    /// The address of a stand-in for CloudFront KeyValueStore (`AWS_ENDPOINT_URL_CLOUDFRONT_KEYVALUESTORE`).
    pub routes_endpoint: Option<String>,
}

impl MicrovmSandboxConfig {
    /// Reads the environment. `version` is the agent server version of the default image.
    ///
    /// # Errors
    /// Names the first variable that is missing or malformed.
    pub fn from_env(version: &str) -> Result<Self, ConfigError> {
        let config = Self {
            deployment: text("DEPLOYMENT_ID"),
            image: required(IMAGE)?,
            front_door_url: required("SANDBOX_MICROVM_URL")?,
            routes: required("SANDBOX_MICROVM_ROUTES")?,
            spec: spec::image(version),
            max_sandboxes: parsed("SANDBOX_MAX_RUNNING")?.unwrap_or(10),
            web_url: web_url(),
            allow_cors_origins: permitted_origins(),
            working_dir: microvm::WORKING_DIR.to_owned(),
            aws: sdk_config_from_env(),
            routes_endpoint: text("AWS_ENDPOINT_URL_CLOUDFRONT_KEYVALUESTORE"),
        };
        if config.arn().is_none() {
            return Err(ConfigError {
                name: IMAGE,
                problem: format!("`{}` is not the ARN of a MicroVM image", config.image),
            });
        }
        if config.payload(&crate::id::new_session_key().into()).is_err() {
            return Err(ConfigError {
                name: "PERMITTED_CORS_ORIGINS",
                problem: format!("is too long: a MicroVM accepts {} bytes at its start", microvm::LONGEST_PAYLOAD),
            });
        }
        Ok(config)
    }

    /// The partition and the region of the image.
    fn arn(&self) -> Option<(&str, &str)> {
        let parts: Vec<&str> = self.image.split(':').collect();
        match parts[..] {
            ["arn", partition, "lambda", region, _, "microvm-image", name] if !name.is_empty() => {
                Some((partition, region))
            }
            _ => None,
        }
    }

    /// The ARNs of the network connectors that AWS manages: for requests to a MicroVM from the internet, and for its own to the internet.
    #[must_use]
    pub fn connectors(&self) -> [String; 2] {
        let (partition, region) = self.arn().unwrap_or(("aws", "us-east-1"));
        ["HTTP_INGRESS", "INTERNET_EGRESS"]
            .map(|name| format!("arn:{partition}:lambda:{region}:aws:network-connector:aws-network-connector:{name}"))
    }

    fn to_env(&self) -> Vec<(&'static str, String)> {
        let mut variables = vec![
            ("SANDBOX_KIND", "microvm".to_owned()),
            (IMAGE, self.image.clone()),
            ("SANDBOX_MICROVM_URL", self.front_door_url.clone()),
            ("SANDBOX_MICROVM_ROUTES", self.routes.clone()),
            ("SANDBOX_MAX_RUNNING", self.max_sandboxes.to_string()),
        ];
        if let Some((repository, tag)) = self.spec.rsplit_once(':') {
            variables.push(("AGENT_SERVER_IMAGE_REPOSITORY", repository.to_owned()));
            variables.push(("AGENT_SERVER_IMAGE_TAG", tag.to_owned()));
        }
        if let Some(deployment) = &self.deployment {
            variables.push(("DEPLOYMENT_ID", deployment.clone()));
        }
        variables
    }
}

/// The variable with the ARN of the MicroVM image.
const IMAGE: &str = "SANDBOX_MICROVM_IMAGE";
