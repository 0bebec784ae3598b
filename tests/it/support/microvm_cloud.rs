//! The services of AWS that MicroVM sandboxes use, together: MicroVMs, their routes, and the front door.

use std::path::PathBuf;
use std::sync::Arc;

use aws_config::{BehaviorVersion, Region};
use aws_sdk_dynamodb::config::Credentials;
use local::agent_server::ensure;
use shared::config::MicrovmSandboxConfig;

use super::edge::Edge;
use super::key_value_store::{ARN, KeyValueStore};
use super::microvm_api::{IMAGE, Machines, MicrovmApi};
use super::product::{agent_server_folder, agent_server_version};

pub struct MicrovmCloud {
    pub api: MicrovmApi,
    pub routes: Arc<KeyValueStore>,
    pub edge: Edge,
}

impl MicrovmCloud {
    pub async fn start(machines: Machines) -> Self {
        let api = MicrovmApi::start(machines).await;
        let routes = Arc::new(KeyValueStore::start().await);
        let edge = Edge::start(routes.clone(), api.endpoints()).await;
        Self { api, routes, edge }
    }

    pub async fn config(&self, deployment: &str) -> MicrovmSandboxConfig {
        self.config_at(deployment, &self.api.url(), &self.routes.url()).await
    }

    /// With calls that go to these addresses, such as those of a proxy.
    pub async fn config_at(&self, deployment: &str, api: &str, routes: &str) -> MicrovmSandboxConfig {
        let aws = aws_config::defaults(BehaviorVersion::latest())
            .region(Region::from_static("us-east-1"))
            .credentials_provider(Credentials::new("AKIDOFTESTS", "secret-of-tests", None, None, "tests"))
            .endpoint_url(api)
            .load()
            .await;
        MicrovmSandboxConfig {
            deployment: Some(deployment.to_owned()),
            image: IMAGE.to_owned(),
            front_door_url: format!("{}/", self.edge.url()),
            routes: ARN.to_owned(),
            spec: "registry.example.com/agent-server:1".to_owned(),
            max_sandboxes: 2,
            web_url: Some("https://app.example.com/v1/".to_owned()),
            allow_cors_origins: vec!["https://ui.example.com".to_owned()],
            working_dir: "/workspace/project".to_owned(),
            aws,
            routes_endpoint: Some(routes.to_owned()),
        }
    }
}

/// The interpreter of an installed agent server, for VMs that run real ones.
pub async fn agent_server_python() -> PathBuf {
    let installed = ensure(&agent_server_folder(), &agent_server_version(), None, ()).await;
    installed.expect("an agent server").python
}
