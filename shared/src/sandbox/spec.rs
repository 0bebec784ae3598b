//! What sandboxes are made from. There is one spec to each kind of sandbox.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde::Serialize;

use super::config::SandboxConfig;
use crate::clock::Time;
use crate::env::text;

/// The version of the agent server that sandboxes run unless another one is chosen.
pub const AGENT_SERVER_VERSION: &str = "1.58.2";

/// Where the images of agent servers are published.
const IMAGE_REPOSITORY: &str = "ghcr.io/openhands/agent-server";

/// What sandboxes are created from. It contains no secrets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(as = SandboxSpecInfo))]
pub struct SandboxSpec {
    /// The container image.
    pub id: String,
    /// The agent server's command line.
    pub command: Option<Vec<String>>,
    /// When this process loaded the spec.
    #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
    pub created_at: Time,
    /// Environment variables of every sandbox of this spec, in addition to its own keys and URLs.
    pub initial_env: BTreeMap<String, String>,
    /// The folder in which conversations work.
    pub working_dir: String,
}

/// The image that sandboxes are made from: `AGENT_SERVER_IMAGE_REPOSITORY` and `AGENT_SERVER_IMAGE_TAG`, where only one of them is set
/// with the published image's name or with the tag of `version`.
#[must_use]
pub fn image(version: &str) -> String {
    let repository = text("AGENT_SERVER_IMAGE_REPOSITORY");
    let repository = repository.as_deref().unwrap_or(IMAGE_REPOSITORY);
    match text("AGENT_SERVER_IMAGE_TAG") {
        Some(tag) => format!("{repository}:{tag}"),
        None => format!("{repository}:{}", tag(version)),
    }
}

/// The published image of a version. Sandboxes that are processes of this machine have its name as their spec: it says what they run.
#[must_use]
pub fn published_image(version: &str) -> String {
    format!("{IMAGE_REPOSITORY}:{}", tag(version))
}

fn tag(version: &str) -> String {
    format!("{version}-python")
}

/// The specs of the configured kind of sandbox, the default one first; none where there are no sandboxes.
#[must_use]
pub fn specs(config: &SandboxConfig) -> Vec<SandboxSpec> {
    static BEGAN: OnceLock<Time> = OnceLock::new();
    let spec = |id: String, command: &[&str], working_dir: &str, environment: &[(&str, &str)]| SandboxSpec {
        id,
        command: Some(command.iter().map(|word| (*word).to_owned()).collect()),
        created_at: *BEGAN.get_or_init(Time::now),
        initial_env: environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        working_dir: working_dir.to_owned(),
    };
    match config {
        SandboxConfig::Process(process) => {
            let command = ["python", "-m", "openhands.agent_server"];
            vec![spec(published_image(&process.version), &command, "", &[("OH_ENABLE_VSCODE", "0")])]
        }
        #[cfg(feature = "docker")]
        SandboxConfig::Docker(docker) => {
            let environment = super::docker::ENVIRONMENT;
            vec![spec(docker.image.clone(), &["--port", "8000"], super::docker::WORKING_DIR, &environment)]
        }
        SandboxConfig::Remote(remote) => {
            let (command, environment) = (super::remote::COMMAND, super::remote::ENVIRONMENT);
            vec![spec(remote.image.clone(), &command, super::remote::WORKING_DIR, &environment)]
        }
        SandboxConfig::None => Vec::new(),
    }
}
