//! Sandbox specs: the images from which sandboxes are created. Each provider has one spec.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde::Serialize;

use super::config::SandboxConfig;
use crate::clock::Time;
use crate::env::text;

/// The default version of the agent server in sandboxes.
pub const AGENT_SERVER_VERSION: &str = "1.58.2";

/// The repository of the published agent server images.
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

/// Returns the image for new sandboxes: `AGENT_SERVER_IMAGE_REPOSITORY` and `AGENT_SERVER_IMAGE_TAG`. If only one of them is set, the other
/// defaults to the published repository or the tag of `version`.
#[must_use]
pub fn image(version: &str) -> String {
    let repository = text("AGENT_SERVER_IMAGE_REPOSITORY");
    let repository = repository.as_deref().unwrap_or(IMAGE_REPOSITORY);
    match text("AGENT_SERVER_IMAGE_TAG") {
        Some(tag) => format!("{repository}:{tag}"),
        None => format!("{repository}:{}", tag(version)),
    }
}

/// Returns the published image of a version. Process sandboxes use its name as their spec id, because it names their agent server's
/// version.
#[must_use]
pub fn published_image(version: &str) -> String {
    format!("{IMAGE_REPOSITORY}:{}", tag(version))
}

fn tag(version: &str) -> String {
    format!("{version}-python")
}

/// Returns the specs of the configured provider, the default one first; empty without sandboxes.
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
        SandboxConfig::Microvm(microvm) => {
            let (command, environment) = (["--port", "8000"], super::microvm::ENVIRONMENT);
            vec![spec(microvm.spec.clone(), &command, &microvm.working_dir, &environment)]
        }
        SandboxConfig::None => Vec::new(),
    }
}
