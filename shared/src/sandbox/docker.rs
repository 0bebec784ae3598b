//! Docker sandbox provider: runs one container per sandbox, through the socket of a Docker engine.

use std::collections::HashMap;
use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use async_trait::async_trait;
use bollard::errors::Error as DockerError;
use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, ContainerStateStatusEnum, ContainerSummary, HostConfig, PortBinding,
    PortMap,
};
use bollard::query_parameters::{
    CreateContainerOptions, CreateImageOptions, ListContainersOptions, RemoveContainerOptions, RemoveVolumeOptions,
    StopContainerOptions,
};
use bollard::{API_DEFAULT_VERSION, Docker};
use futures::future::try_join_all;
use futures::stream::TryStreamExt as _;
use secrecy::{ExposeSecret as _, SecretString};
use tokio::time::timeout;
use uuid::Uuid;

use super::capacity::{others_at_the_limit, to_evict};
use super::config::DockerSandboxConfig;
use super::store::{Desired, SandboxRecord, SandboxStore};
use super::{
    AGENT_SERVER, ExposedUrl, Launch, ProviderSandbox, Sandbox, SandboxService, SandboxStatus, distinct, in_order,
    name_of, new_name, prefix_of,
};
use crate::clock::Time;
use crate::error::{Error, Result};
use crate::http_client::{AddressPolicy, HttpClient};
use crate::id::{self, UserId};
use crate::mask::masked;

/// The working directory of conversations in the image.
pub(super) const WORKING_DIR: &str = "/workspace/project";
/// The environment variables that all sandboxes have in common.
pub(super) const ENVIRONMENT: [(&str, &str); 7] = [
    ("OPENVSCODE_SERVER_ROOT", "/openhands/.openvscode-server"),
    ("OH_ENABLE_VNC", "0"),
    ("LOG_JSON", "true"),
    ("OH_CONVERSATIONS_PATH", "/workspace/conversations"),
    ("OH_BASH_EVENTS_DIR", "/workspace/bash_events"),
    ("PYTHONUNBUFFERED", "1"),
    ("ENV_LOG_LEVEL", "20"),
];
/// The names of the exposed URLs, and their ports inside the container.
const PORTS: [(&str, u16); 4] = [(AGENT_SERVER, 8000), ("VSCODE", 8001), ("WORKER_1", 8011), ("WORKER_2", 8012)];
/// The environment variable with the agent server's session key.
const KEY_VARIABLE: &str = "OH_SESSION_API_KEYS_0";
/// The container label with the sandbox spec (the image).
const SPEC_LABEL: &str = "sandbox_spec_id";
/// The host name by which containers reach the host machine.
const HOST: &str = "host.docker.internal";

/// The timeout of every call to the engine except pulling an image and stopping a container.
const CALL: Duration = Duration::from_secs(10);
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
const HEALTH: Duration = Duration::from_secs(3);
/// While a record is younger than this, a missing container counts as starting.
const LAUNCH_GRACE: Duration = Duration::from_secs(30);

/// The Docker sandbox provider.
#[derive(Debug)]
pub struct DockerSandboxes {
    config: DockerSandboxConfig,
    store: SandboxStore,
    http: HttpClient,
}

impl DockerSandboxes {
    /// Creates the provider. It does not connect to the engine yet.
    #[must_use]
    pub fn new(config: DockerSandboxConfig, store: SandboxStore) -> Self {
        Self { config, store, http: HttpClient::new(AddressPolicy::Any) }
    }

    fn container(&self, record: &SandboxRecord) -> String {
        format!("{}{}", self.config.container_name_prefix, name_of(record))
    }

    fn new_name(&self, user: &UserId, id: &str) -> String {
        new_name(user, id, self.config.deployment.as_deref())
    }

    /// Connects to the engine. Each use connects again, because the engine may be started after this process.
    async fn engine(&self) -> Result<Docker> {
        let engine = match self.config.host.as_deref() {
            Some(host) if !host.starts_with("unix://") => {
                Docker::connect_with_http(host, CALL.as_secs(), API_DEFAULT_VERSION)
            }
            Some(host) => Docker::connect_with_unix(host, CALL.as_secs(), API_DEFAULT_VERSION),
            None => Docker::connect_with_unix_defaults(),
        };
        let engine = engine.map_err(|error| failed("connect", &error))?;
        // Older engines support only older API versions.
        let negotiated =
            timeout(CALL, engine.negotiate_version()).await.map_err(|_| failed("connect", &"no answer"))?;
        negotiated.map_err(|error| failed("connect", &error))
    }

    /// Returns a container, or `None` when no container has this name.
    async fn find(&self, engine: &Docker, name: &str) -> Result<Option<ContainerInspectResponse>> {
        let asked = timeout(CALL, engine.inspect_container(name, None)).await;
        match asked.map_err(|_| failed("inspect", &"no answer in time"))? {
            Ok(container) => Ok(Some(container)),
            Err(error) if status_of(&error) == Some(404) => Ok(None),
            Err(error) => Err(failed("inspect", &error)),
        }
    }

    async fn observe(&self, records: &[&SandboxRecord]) -> Result<Vec<Sandbox>> {
        if records.is_empty() {
            return Ok(Vec::new());
        }
        let engine = self.engine().await;
        try_join_all(records.iter().map(async |record| {
            let name = self.container(record);
            let container = match &engine {
                Ok(engine) => self.find(engine, &name).await,
                Err(error) => Err(failed("connect", &error.context())),
            };
            match container {
                Ok(container) => self.show(record, container.as_ref()).await,
                Err(error) => {
                    tracing::warn!(sandbox = %record.id, error = %error.context(), "sandbox.engine_failed");
                    let detail = Some("The Docker engine does not respond; check that it is running".to_owned());
                    Ok(Sandbox { detail, ..Sandbox::of(record, SandboxStatus::Error, WORKING_DIR) })
                }
            }
        }))
        .await
    }

    /// Combines a record and the state of its container into a sandbox.
    async fn show(&self, record: &SandboxRecord, container: Option<&ContainerInspectResponse>) -> Result<Sandbox> {
        let (status, detail) = match container {
            Some(container) => status(container, record.desired),
            None if Time::now().since(record.created_at) < LAUNCH_GRACE => (SandboxStatus::Starting, None),
            None => (SandboxStatus::Missing, Some("Its container no longer exists".to_owned())),
        };
        let mut sandbox = Sandbox { detail, ..Sandbox::of(record, status, WORKING_DIR) };
        let Some(container) = container.filter(|_| status == SandboxStatus::Running) else { return Ok(sandbox) };
        let key = self.store.session_key(record).await?;
        let urls = self.exposed_urls(record, container, &key);
        let agent = urls.iter().find(|url| url.name == AGENT_SERVER).map(|url| url.url.clone());
        if self.is_healthy(agent.as_deref()).await {
            if !record.answered {
                self.store.set_answered(&record.user, &record.id).await?;
            }
            sandbox.session_api_key = Some(key);
            sandbox.exposed_urls = Some(urls);
        } else if record.answered
            || started_at(container).is_none_or(|at| Time::now().since(at) < self.config.startup_grace)
        {
            // An agent server that has answered before is busy, or starts again: its container runs.
            sandbox.status = SandboxStatus::Starting;
        } else {
            sandbox.status = SandboxStatus::Error;
            sandbox.detail = Some("Its container is running, but its agent server does not respond".to_owned());
        }
        Ok(sandbox)
    }

    async fn is_healthy(&self, url: Option<&str>) -> bool {
        let Some(url) = url else { return false };
        self.http.succeeds(&format!("{url}/health"), HEALTH).await
    }

    fn exposed_urls(
        &self,
        record: &SandboxRecord,
        container: &ContainerInspectResponse,
        key: &SecretString,
    ) -> Vec<ExposedUrl> {
        let published = container.network_settings.as_ref().and_then(|network| network.ports.as_ref());
        let host_port = |port: u16| match self.config.use_host_network {
            true => record.port.filter(|_| port == PORTS[0].1),
            false => published?.get(&format!("{port}/tcp"))?.as_ref()?.first()?.host_port.as_ref()?.parse().ok(),
        };
        let urls = PORTS.iter().filter_map(|(name, port)| {
            let mut url = self.config.url_pattern.replace("{port}", &host_port(*port)?.to_string());
            if *name == "VSCODE" {
                url += &format!("/?tkn={}&folder={WORKING_DIR}", key.expose_secret());
            }
            Some(ExposedUrl { name: (*name).to_owned(), url, port: *port })
        });
        urls.collect()
    }

    /// Creates the container of a record if it does not exist, and starts it. Returns false if the limit of running sandboxes is reached.
    async fn launch(&self, record: &SandboxRecord) -> Result<bool> {
        let engine = self.engine().await?;
        let name = self.container(record);
        if self.find(&engine, &name).await?.is_none() {
            if !self.ensure_capacity(record).await? {
                return Ok(false);
            }
            let mut record = record.clone();
            if self.config.use_host_network && record.port.is_none() {
                let port = free_port()?;
                self.store.set_port(&record.user, &record.id, port).await?;
                record.port = Some(port);
            }
            let body = self.body(&record, &self.store.session_key(&record).await?);
            self.create(&engine, &name, body).await?;
        }
        run(&engine, &name).await?;
        Ok(true)
    }

    /// Creates the container. Pulls the image first if the engine does not have it.
    async fn create(&self, engine: &Docker, name: &str, body: ContainerCreateBody) -> Result<()> {
        // Mask secrets: an error may quote the container's environment.
        let variables = body.env.iter().flatten().filter_map(|line| line.split_once('='));
        let secrets: Vec<String> =
            variables.filter(|(name, _)| name.contains("KEY")).map(|(_, value)| value.to_owned()).collect();
        let said = |error: &DockerError| masked(&error.to_string(), secrets.iter().map(String::as_str));
        let mut made = engine.create_container(Some(options_of(name)), body.clone()).await;
        if made.as_ref().is_err_and(|error| status_of(error) == Some(404)) {
            let image = body.image.clone().unwrap_or_default();
            tracing::info!(image, "sandbox.image_pulled");
            let options = CreateImageOptions { from_image: Some(image.clone()), ..CreateImageOptions::default() };
            let pulled = engine.create_image(Some(options), None, None).try_collect::<Vec<_>>().await;
            if let Err(error) = pulled {
                tracing::warn!(image, %error, "sandbox.image_not_pulled");
                return Err(Error::Refused(format!("The image {image} cannot be pulled")));
            }
            made = engine.create_container(Some(options_of(name)), body).await;
        }
        match made {
            Ok(_) => Ok(()),
            // A concurrent call has created the container.
            Err(error) if status_of(&error) == Some(409) => Ok(()),
            Err(error) if status_of(&error).is_some_and(|status| status < 500) => {
                Err(Error::Refused(format!("The Docker engine refused to create the sandbox: {}", said(&error))))
            }
            Err(error) => Err(failed("create", &said(&error))),
        }
    }

    fn body(&self, record: &SandboxRecord, key: &SecretString) -> ContainerCreateBody {
        let config = &self.config;
        let agent_port = record.port.filter(|_| config.use_host_network).unwrap_or(PORTS[0].1);
        let webhooks = match config.use_host_network {
            true => format!("http://localhost:{}/api/v1/webhooks", config.host_port),
            false => format!("http://{HOST}:{}/api/v1/webhooks", config.host_port),
        };
        let mut environment: Vec<String> = ENVIRONMENT.iter().map(|(name, value)| format!("{name}={value}")).collect();
        environment.push(format!("{KEY_VARIABLE}={}", key.expose_secret()));
        environment.push(format!("OH_SECRET_KEY={}", key.expose_secret()));
        environment.push(format!("OH_WEBHOOKS_0_BASE_URL={webhooks}"));
        let variables = super::WEBHOOK_VARIABLES.iter().chain(&super::STORAGE_VARIABLES);
        environment.extend(variables.map(|(name, value)| format!("{name}={value}")));
        let origins = config.allow_cors_origins.iter().enumerate();
        environment.extend(origins.map(|(index, origin)| format!("OH_ALLOW_CORS_ORIGINS_{index}={origin}")));
        environment.extend(PORTS[1..].iter().map(|(name, port)| format!("{name}={port}")));
        environment.push(format!("{AGENT_SERVER}={agent_port}"));
        let network = if config.use_host_network {
            HostConfig { network_mode: Some("host".to_owned()), ..HostConfig::default() }
        } else {
            // Publish the ports on the loopback interface only; the engine chooses the host ports.
            let binding = PortBinding { host_ip: Some("127.0.0.1".to_owned()), host_port: Some(String::new()) };
            let ports: PortMap =
                PORTS.iter().map(|(_, port)| (format!("{port}/tcp"), Some(vec![binding.clone()]))).collect();
            HostConfig {
                port_bindings: Some(ports),
                extra_hosts: Some(vec![format!("{HOST}:host-gateway")]),
                ..HostConfig::default()
            }
        };
        ContainerCreateBody {
            image: Some(record.spec_id.clone()),
            cmd: Some(vec!["--port".to_owned(), agent_port.to_string()]),
            env: Some(environment),
            working_dir: Some(WORKING_DIR.to_owned()),
            exposed_ports: (!config.use_host_network)
                .then(|| PORTS.iter().map(|(_, port)| format!("{port}/tcp")).collect()),
            labels: Some(HashMap::from([(SPEC_LABEL.to_owned(), record.spec_id.clone())])),
            host_config: Some(HostConfig {
                init: Some(true),
                binds: (!config.volumes.is_empty()).then(|| config.volumes.clone()),
                ..network
            }),
            ..ContainerCreateBody::default()
        }
    }

    /// Evicts (pauses) sandboxes of the user until one more may run. Returns false if that is not possible now.
    async fn ensure_capacity(&self, newcomer: &SandboxRecord) -> Result<bool> {
        let user = &newcomer.user;
        let max = self.config.max_sandboxes;
        let Some(others) = others_at_the_limit(&self.store, newcomer, max, |_| true).await? else { return Ok(true) };
        let observed = self.observe(&others.iter().collect::<Vec<_>>()).await?;
        let others = others.into_iter().zip(observed).collect();
        let Some(evicted) = to_evict(&self.http, newcomer, others, max).await else {
            return Ok(false);
        };
        for id in evicted {
            tracing::info!(sandbox = id, "sandbox.evicted");
            self.pause(user, &id).await?;
        }
        Ok(true)
    }
}

fn options_of(name: &str) -> CreateContainerOptions {
    CreateContainerOptions { name: Some(name.to_owned()), ..CreateContainerOptions::default() }
}

/// Starts or unpauses a container, depending on its state.
async fn run(engine: &Docker, name: &str) -> Result<()> {
    let Some(container) = inspect_state(engine, name).await? else { return Err(failed("start", &"it is gone")) };
    let done = match container {
        ContainerStateStatusEnum::RUNNING | ContainerStateStatusEnum::RESTARTING => return Ok(()),
        ContainerStateStatusEnum::PAUSED => engine.unpause_container(name).await,
        _ => engine.start_container(name, None).await,
    };
    match done {
        Ok(()) => Ok(()),
        // A concurrent call has already started it.
        Err(error) if matches!(status_of(&error), Some(304 | 409)) => Ok(()),
        Err(error) if status_of(&error).is_some_and(|status| status < 500) => {
            Err(Error::Refused(format!("The Docker engine refused to start the sandbox: {error}")))
        }
        Err(error) => Err(failed("start", &error)),
    }
}

async fn inspect_state(engine: &Docker, name: &str) -> Result<Option<ContainerStateStatusEnum>> {
    match engine.inspect_container(name, None).await {
        Ok(container) => Ok(Some(state(&container))),
        Err(error) if status_of(&error) == Some(404) => Ok(None),
        Err(error) => Err(failed("inspect", &error)),
    }
}

fn state(container: &ContainerInspectResponse) -> ContainerStateStatusEnum {
    container.state.as_ref().and_then(|state| state.status).unwrap_or(ContainerStateStatusEnum::EMPTY)
}

fn started_at(container: &ContainerInspectResponse) -> Option<Time> {
    let text = container.state.as_ref()?.started_at.as_ref()?;
    serde_json::from_value(serde_json::Value::String(text.clone())).ok()
}

/// Maps a container's state to the sandbox status and a message for the user.
fn status(container: &ContainerInspectResponse, desired: Desired) -> (SandboxStatus, Option<String>) {
    let exit_code = container.state.as_ref().and_then(|state| state.exit_code).unwrap_or_default();
    match (state(container), desired) {
        (ContainerStateStatusEnum::RUNNING, _) => (SandboxStatus::Running, None),
        (ContainerStateStatusEnum::PAUSED, _)
        | (ContainerStateStatusEnum::EXITED, Desired::Paused | Desired::Stopped | Desired::Deleted) => {
            (SandboxStatus::Paused, None)
        }
        (ContainerStateStatusEnum::CREATED | ContainerStateStatusEnum::RESTARTING, _) => {
            (SandboxStatus::Starting, None)
        }
        (ContainerStateStatusEnum::EXITED, Desired::Running) => {
            (SandboxStatus::Missing, Some(format!("Its container has ended, with exit code {exit_code}")))
        }
        (ContainerStateStatusEnum::REMOVING, _) => {
            (SandboxStatus::Missing, Some("Its container is being removed".to_owned()))
        }
        (state, _) => (SandboxStatus::Error, Some(format!("Its container is {state}"))),
    }
}

fn status_of(error: &DockerError) -> Option<u16> {
    match error {
        DockerError::DockerResponseServerError { status_code, .. } => Some(*status_code),
        _ => None,
    }
}

fn failed(what: &str, error: &dyn std::fmt::Display) -> Error {
    Error::Upstream {
        message: "The Docker engine does not respond; check that it is running".to_owned(),
        context: format!("Docker engine: {what}: {error}"),
    }
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(Error::internal)?;
    Ok(listener.local_addr().map_err(Error::internal)?.port())
}

#[async_trait]
impl SandboxService for DockerSandboxes {
    async fn start(&self, user: &UserId, id: &str, task: Option<Uuid>) -> Result<Launch> {
        let key = SecretString::from(id::new_session_key());
        let mut record = self.store.new_record(user, id, &self.config.image, &key).await?;
        record.name = Some(self.new_name(user, id));
        let Some(record) = self.store.create(record, task).await? else { return Ok(Launch::Deleted) };
        if !self.launch(&record).await? {
            self.store.withdraw(&record).await?;
            return Ok(Launch::Full);
        }
        Ok(Launch::Started)
    }

    async fn inspect(&self, user: &UserId, id: &str) -> Result<Option<Sandbox>> {
        let Some(record) = self.store.get(user, id).await? else { return Ok(None) };
        let container = self.find(&self.engine().await?, &self.container(&record)).await?;
        self.show(&record, container.as_ref()).await.map(Some)
    }

    async fn batch_get(&self, user: &UserId, ids: &[String]) -> Result<Vec<Option<Sandbox>>> {
        let records = self.store.batch_get(user, ids).await?;
        let observed = self.observe(&distinct(&records)).await?;
        Ok(in_order(&records, &observed))
    }

    async fn list(&self, user: &UserId) -> Result<Vec<Sandbox>> {
        let records = self.store.list(user).await?;
        self.observe(&records.iter().collect::<Vec<_>>()).await
    }

    async fn pause(&self, user: &UserId, id: &str) -> Result<bool> {
        let Some(record) = self.store.get(user, id).await? else { return Ok(false) };
        let (engine, name) = (self.engine().await?, self.container(&record));
        match inspect_state(&engine, &name).await? {
            Some(ContainerStateStatusEnum::PAUSED | ContainerStateStatusEnum::EXITED) => {}
            Some(ContainerStateStatusEnum::RUNNING) => match engine.pause_container(&name).await {
                Err(error) if status_of(&error) != Some(409) => return Err(failed("pause", &error)),
                _ => {}
            },
            _ => return Ok(false),
        }
        self.store.set_desired(user, id, Desired::Paused).await
    }

    async fn resume(&self, user: &UserId, id: &str) -> Result<bool> {
        let Some(record) = self.store.get(user, id).await? else { return Ok(false) };
        let (engine, name) = (self.engine().await?, self.container(&record));
        if inspect_state(&engine, &name).await?.is_none() {
            return Ok(false);
        }
        // Its user wants it to run, so it runs even beyond the limit.
        self.ensure_capacity(&record).await?;
        run(&engine, &name).await?;
        self.store.set_desired(user, id, Desired::Running).await
    }

    async fn terminate(&self, user: &UserId, id: &str) -> Result<bool> {
        let record = self.store.find(user, id).await?;
        let name = record.map_or_else(|| self.new_name(user, id), |record| name_of(&record));
        let (engine, name) = (self.engine().await?, format!("{}{name}", self.config.container_name_prefix));
        // A paused container does not process signals, so unpause it first. A container that does not stop is removed by force.
        let _running = engine.unpause_container(&name).await;
        let stop_timeout = i32::try_from(STOP_TIMEOUT.as_secs()).unwrap_or_default();
        let options = StopContainerOptions { t: Some(stop_timeout), ..StopContainerOptions::default() };
        let _stopped = timeout(STOP_TIMEOUT + CALL, engine.stop_container(&name, Some(options))).await;
        let options = RemoveContainerOptions { force: true, v: true, ..RemoveContainerOptions::default() };
        match engine.remove_container(&name, Some(options)).await {
            Err(error) if status_of(&error) != Some(404) => return Err(failed("remove", &error)),
            _ => {}
        }
        let volume = format!("openhands-workspace-{name}");
        match engine.remove_volume(&volume, None::<RemoveVolumeOptions>).await {
            Err(error) if status_of(&error) != Some(404) => {
                tracing::warn!(volume, %error, "sandbox.volume_not_removed");
            }
            _ => {}
        }
        Ok(true)
    }

    fn can_list_provider(&self) -> bool {
        self.config.deployment.is_some()
    }

    /// Only this deployment's containers: other programs use the same engine.
    async fn list_provider(&self) -> Result<Vec<ProviderSandbox>> {
        let Some(own) = self.config.deployment.as_deref().map(prefix_of) else { return Ok(Vec::new()) };
        let beginning = format!("/{}{own}", self.config.container_name_prefix);
        let filters = HashMap::from([("name".to_owned(), vec![beginning.clone()])]);
        let options = ListContainersOptions { all: true, filters: Some(filters), ..ListContainersOptions::default() };
        let engine = self.engine().await?;
        let listed = timeout(CALL, engine.list_containers(Some(options))).await;
        let containers = listed.map_err(|_| failed("list", &"no answer"))?.map_err(|error| failed("list", &error))?;
        let name = |container: &ContainerSummary| {
            let names = container.names.iter().flatten();
            // The engine's filter is a pattern for any part of a name.
            let name = names.into_iter().find(|name| name.starts_with(&beginning))?;
            name.get(1 + self.config.container_name_prefix.len()..).map(ToOwned::to_owned)
        };
        let found = containers.iter().filter_map(|container| {
            let created_at = container.created.and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
            Some(ProviderSandbox { name: name(container)?, is_own: true, created_at: created_at.map(Time::from) })
        });
        Ok(found.collect())
    }

    async fn mark_used(&self, user: &UserId, id: &str) -> Result<()> {
        self.store.mark_used(user, id).await.map(|_| ())
    }
}
