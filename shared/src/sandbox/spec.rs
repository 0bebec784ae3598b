//! What sandboxes are made from. There is one spec to each kind of sandbox.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde::Serialize;

use crate::clock::Time;
use crate::config::{SandboxConfig, text};

/// The contract's default image; its version is what process sandboxes run.
const DEFAULT_IMAGE: &str = "ghcr.io/openhands/agent-server:1.15.0-python";

/// A spec as the contract shows it. Nothing in it is secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SandboxSpec {
    /// The image.
    pub id: String,
    /// The agent server's command line.
    pub command: Option<Vec<String>>,
    /// When this process began to know it.
    pub created_at: Time,
    /// The environment that every sandbox of it has, beside its own keys and addresses.
    pub initial_env: BTreeMap<String, String>,
    /// Where conversations work.
    pub working_dir: String,
}

/// The image that sandboxes are made from: `AGENT_SERVER_IMAGE_REPOSITORY` and `AGENT_SERVER_IMAGE_TAG` where both are set, else
/// the contract's.
#[must_use]
pub fn image() -> String {
    match (text("AGENT_SERVER_IMAGE_REPOSITORY"), text("AGENT_SERVER_IMAGE_TAG")) {
        (Some(repository), Some(tag)) => format!("{repository}:{tag}"),
        _ => DEFAULT_IMAGE.to_owned(),
    }
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
        SandboxConfig::Process(_) => {
            let command = ["python", "-m", "openhands.agent_server"];
            vec![spec(super::process::SPEC_ID.to_owned(), &command, "", &[("OH_ENABLE_VSCODE", "0")])]
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
