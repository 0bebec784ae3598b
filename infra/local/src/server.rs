//! Starts, runs and shuts down the server of `cargo local`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::StatusCode;
use schema::QueueUrls;
use secrecy::SecretString;
use serde_json::{Map, Value, json};
use shared::aws::Aws;
use shared::config::{
    self, Config, DockerSandboxConfig, ExportConfig, Names, ProcessSandboxConfig, RemoteSandboxConfig, SandboxConfig,
    SealingConfig, StartConfig,
};
use shared::http_client::{AddressPolicy, HttpClient};
use shared::sandbox::SandboxService as _;
use shared::sandbox::process::ProcessSandboxes;
use shared::sandbox::supervisor::{BootState, Supervisor};
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::access::{Access, Origins, PublicAddress};
use crate::agent_server::{self, EnsureError, PythonError, Terminal, find_python};
use crate::demo;
use crate::docs;
use crate::engines::{EngineError, EnginePorts, Engines};
use crate::gateway;
use crate::links::Links;
use crate::options::{CommonOptions, SandboxKind};
use crate::private_file;
use crate::web_ui::{self, Connection, WebUi};
use crate::worker::{Consumer, EXPORT_CONCURRENCY, WORKER_CONCURRENCY, poll, sweep};

/// The prefix of the names of tables, bucket and queues on the embedded engines.
pub(crate) const PREFIX: &str = "openhands-";
/// The file in the data folder that holds the keys under which secrets are sealed.
pub const SEALING_KEY: &str = "sealing-key";
/// How long the first start waits for the supervisor. Without it, sandboxes boot all the same.
const SUPERVISOR_TIMEOUT: Duration = Duration::from_secs(30);
/// The time that requests in flight have to finish at shutdown.
const GRACE_PERIOD: Duration = Duration::from_secs(3);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Waiting in this process costs nothing, so a start returns to the queue only after a long wait.
const INLINE_WAIT: Duration = Duration::from_secs(60);
/// The same applies to polls.
const MAX_POLL_DELAY: Duration = Duration::from_secs(1);

/// Why the server did not start. Each message is a sentence.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("{path} cannot be used: {source}", path = path.display())]
    File { path: PathBuf, source: io::Error },
    /// The data folder belongs to another user, or its file system keeps no permissions.
    #[error("{path} cannot be kept private to you (mode 0700): {source}. Choose a folder of your own with --data.", path = path.display())]
    NotPrivate { path: PathBuf, source: io::Error },
    /// `OH_WEB_URL` or `WEB_HOST` is not an address.
    #[error("{0}")]
    PublicAddress(String),
    #[error("Port {port} on 127.0.0.1 cannot be opened: {source}. Choose another with --port.")]
    Port { port: u16, source: io::Error },
    #[error(transparent)]
    Engines(#[from] EngineError),
    #[error(transparent)]
    Schema(#[from] schema::SchemaError),
    /// The interpreter given with `--python` cannot run the agent server.
    #[error(transparent)]
    Python(#[from] PythonError),
    /// An environment variable is malformed.
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    #[error("--demo runs its agents as processes of this machine. Remove --sandbox.")]
    Demo,
    #[error("{}", .0.context())]
    Domain(#[from] shared::Error),
}

/// The configuration from the environment of the process.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    pub start: StartConfig,
    pub export: ExportConfig,
    /// How long a sandbox may be idle before it is paused (`SANDBOX_IDLE_MINUTES`); without a limit it is not paused.
    pub sandbox_idle_limit: Option<Duration>,
    /// The user's settings; they take precedence over those of a settings file.
    pub settings: Map<String, Value>,
    /// The key that clients have to send (`SESSION_API_KEY`); without one, requests need no key.
    pub session_api_key: Option<SecretString>,
    /// Origins of hosted front ends (`PERMITTED_CORS_ORIGINS`).
    pub origins: Vec<String>,
}

impl Environment {
    /// Reads the environment variables.
    ///
    /// # Errors
    /// Names the first malformed variable.
    pub fn read() -> Result<Self, ServerError> {
        let mut start = StartConfig::from_env()?;
        if config::text("START_INLINE_WAIT_MS").is_none() {
            start.inline_wait = INLINE_WAIT;
        }
        if config::text("START_BOOT_INLINE_WAIT_MS").is_none() {
            start.boot_inline_wait = INLINE_WAIT;
        }
        if config::text("START_MAX_POLL_DELAY_MS").is_none() {
            start.max_poll_delay = MAX_POLL_DELAY;
        }
        let mut export = ExportConfig::from_env()?;
        if config::text("EXPORT_SETTLE_MS").is_none() {
            // Indexes of the embedded engine do not lag.
            export.settle = Duration::ZERO;
        }
        let settings = [("LLM_MODEL", "llm_model"), ("LLM_API_KEY", "llm_api_key"), ("LLM_BASE_URL", "llm_base_url")]
            .into_iter()
            .filter_map(|(variable, field)| Some((field.to_owned(), config::text(variable)?.into())))
            .collect();
        Ok(Self {
            start,
            export,
            sandbox_idle_limit: config::idle_limit()?,
            settings,
            session_api_key: config::text("SESSION_API_KEY").map(SecretString::from),
            origins: config::permitted_origins(),
        })
    }
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    /// The address at which the API is served, or will be served by another process.
    pub address: SocketAddr,
    pub config: Config,
    pub aws: Aws,
    engines: Engines,
    sealer: Sealer,
    tasks: Vec<JoinHandle<()>>,
    stop_serving: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
    /// The supervisor that forks agent servers.
    stop_supervisor: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
    readiness: Readiness,
}

/// The state of each part that becomes ready after the server has started.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<&'static str, Part>>>);

#[derive(Clone, Debug)]
enum Part {
    /// The server is not ready until this part is. Holds the current activity.
    Pending(&'static str),
    /// The server is ready without this part. Holds the current activity.
    Background(&'static str),
    Ready,
    /// Works, in the way that it names.
    Works(String),
    /// Starts cannot succeed. Holds the reason.
    Failed(String),
    /// The part is missing and everything else works without it. Holds the reason.
    Unavailable(String),
}

impl Readiness {
    fn set(&self, part: &'static str, state: Part) {
        if let Ok(mut parts) = self.0.lock() {
            parts.insert(part, state);
        }
    }

    fn parts(&self) -> BTreeMap<&'static str, Part> {
        self.0.lock().map(|parts| parts.clone()).unwrap_or_default()
    }

    fn shown(&self) -> Map<String, Value> {
        let shown = |part| match part {
            Part::Pending(activity) | Part::Background(activity) => activity.to_owned(),
            Part::Ready => "ready".to_owned(),
            Part::Works(how) => how,
            Part::Failed(reason) => format!("failed: {reason}"),
            Part::Unavailable(reason) => format!("not served: {reason}"),
        };
        self.parts().into_iter().map(|(name, part)| (name.to_owned(), shown(part).into())).collect()
    }

    /// Whether everything that conversations need is available.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.parts().values().all(|part| !matches!(part, Part::Pending(_) | Part::Failed(_)))
    }
}

impl Server {
    /// Starts the engines, the API unless `serve` is false, the queue poller and the install of the agent server.
    ///
    /// With `invoke_url`, the functions run elsewhere, under `cargo lambda watch` at this address: it serves the API and its worker
    /// handles the queue's messages.
    ///
    /// # Errors
    /// A sentence that states what is wrong.
    pub async fn start(
        options: &CommonOptions,
        environment: Environment,
        serve: bool,
        invoke_url: Option<String>,
    ) -> Result<Self, ServerError> {
        let folders = Folders::create(options)?;
        let settings = settings(options, environment.settings.clone())?;
        // A Python given with --python is checked before anything runs; otherwise the search for one is part of the install.
        if let (Some(wanted), SandboxKind::Process) = (&options.python, options.sandbox) {
            find_python(Some(wanted)).await?;
        }
        let listener = if serve { Some(listen(options.port).await?) } else { None };
        let port = listener
            .as_ref()
            .and_then(|listener| listener.local_addr().ok())
            .map_or(options.port, |address| address.port());
        let access = access(options, &environment)?;
        let own_url = format!("http://127.0.0.1:{port}");
        let storage = Storage::open(&folders.data, serve.then_some(own_url.as_str()), access.origins()).await?;
        let web_url = match &invoke_url {
            Some(url) => url.trim_end_matches('/').to_owned(),
            None => own_url.clone(),
        };
        let agent_server = AgentServerOptions::new(options, &folders);
        let sandbox = sandbox_config(options, &environment, &folders.data, &agent_server, port, &web_url)?;
        let config = config(&environment, sandbox, &storage);
        let Storage { engines, aws, sealer, queues, .. } = storage;
        let demo_settings = if options.demo { demo::settings(&web_url) } else { Map::new() };
        let settings = settings.into_iter().chain(demo_settings).collect();
        let has_model = store_settings(&config, &aws, &sealer, settings).await?;
        if options.sandbox != SandboxKind::None && !has_model {
            tracing::warn!(
                "No model is set: a start that names no llm_model will end in ERROR. Give LLM_MODEL and LLM_API_KEY, or --settings FILE."
            );
        }
        let (worker, exports) = match invoke_url {
            Some(url) => {
                let http = HttpClient::new(AddressPolicy::Any);
                (Consumer::Remote(http.clone(), url.clone(), "worker"), Consumer::Remote(http, url, "exports"))
            }
            None => (
                Consumer::Worker(Arc::new(worker::Context::new(&config, &aws, &sealer))),
                Consumer::Exports(Arc::new(exports::Context::new(&config, &aws))),
            ),
        };
        let mut server = Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            config,
            aws,
            engines,
            sealer,
            tasks: Vec::new(),
            stop_serving: None,
            stop_supervisor: None,
            readiness: Readiness::default(),
        };
        if let Some(sandboxes) = server.process_sandboxes() {
            adopt_sandboxes(&sandboxes, &UserId::local()).await?;
            server.readiness.set("agent_server", Part::Pending("being installed"));
        }
        if let Some(listener) = listener {
            server.serve_api(listener, options, environment.session_api_key, &access, &folders.shared, has_model);
        }
        server.start_consumers(worker, exports, queues, agent_server);
        Ok(server)
    }

    /// Serves the API, presigned links and, with `--ui`, the web UI.
    fn serve_api(
        &mut self,
        listener: TcpListener,
        options: &CommonOptions,
        key: Option<SecretString>,
        access: &Access,
        shared_folder: &Path,
        has_model: bool,
    ) {
        let ui = options.ui.then(|| {
            let key_prompt = key.is_some().then_some("SESSION_API_KEY of this server:");
            let connect_src = match options.sandbox {
                SandboxKind::Process | SandboxKind::None => web_ui::LOOPBACK,
                SandboxKind::Docker | SandboxKind::Remote => web_ui::ANYWHERE,
            };
            let connection = Connection { host: None, key_prompt, has_model, connect_src };
            self.start_web_ui(shared_folder.join(web_ui::FOLDER), connection)
        });
        let mut router = self.router(key, access);
        if options.demo {
            router = router.merge(demo::router());
        }
        if let Some(ui) = ui {
            router = ui.layer(router);
        }
        let own_url = format!("http://{}", self.address);
        let links = Links::new(&self.config.names.bucket, &own_url, self.engines.s3_router(), access.clone());
        // The access check is the outermost layer: nothing is served that it has not allowed.
        self.serve(listener, access.layer(links.layer(router)));
    }

    /// Starts the download of the web UI in the background.
    fn start_web_ui(&mut self, folder: PathBuf, connection: Connection) -> WebUi {
        let ui = WebUi::default();
        self.readiness.set("web_ui", Part::Pending("being fetched"));
        let fetching = fetch_web_ui(ui.clone(), folder, connection, self.readiness.clone());
        self.tasks.push(tokio::spawn(fetching));
        ui
    }

    /// Polls the queue of exports. Installs the agent server in the background, if sandboxes are processes, and then polls the job
    /// queue and runs the sweep.
    fn start_consumers(
        &mut self,
        worker: Consumer,
        exports: Consumer,
        queues: QueueUrls,
        agent_server: AgentServerOptions,
    ) {
        let install = matches!(self.config.sandbox, SandboxConfig::Process(_));
        let (installed, is_installed) = oneshot::channel();
        let (listens, is_listening) = oneshot::channel();
        if let SandboxConfig::Process(process) = &self.config.sandbox {
            let (stop, stopped) = oneshot::channel();
            let supervisor = Supervisor::new(process);
            let running = run_supervisor(supervisor, is_installed, listens, stopped, self.readiness.clone());
            self.stop_supervisor = Some((stop, tokio::spawn(running)));
        }
        let (sqs, readiness) = (self.aws.sqs.clone(), self.readiness.clone());
        let poll_exports = poll(sqs.clone(), queues.exports, exports.clone(), EXPORT_CONCURRENCY);
        let poll_dead_exports = poll(sqs.clone(), queues.export_dead_letters, exports, EXPORT_CONCURRENCY);
        self.tasks.extend([tokio::spawn(poll_exports), tokio::spawn(poll_dead_exports)]);
        self.tasks.push(tokio::spawn(async move {
            if install && let Err(text) = install_agent_server(&agent_server).await {
                // The API stays available: records can be read, and starts wait until the next run.
                tracing::error!("{text}");
                readiness.set("agent_server", Part::Failed(text));
                return;
            }
            if install {
                // Errors mean that the server is being shut down. The first start waits until the supervisor accepts requests, because its
                // sandbox would boot without it.
                let _gone = installed.send(());
                let _listens = tokio::time::timeout(SUPERVISOR_TIMEOUT, is_listening).await;
                readiness.set("agent_server", Part::Ready);
            }
            // Polling begins after the install: a start that is handled earlier would fail for lack of an agent server.
            let starts = poll(sqs.clone(), queues.jobs, worker.clone(), WORKER_CONCURRENCY);
            let dead_letters = poll(sqs, queues.dead_letters, worker.clone(), WORKER_CONCURRENCY);
            tokio::join!(starts, dead_letters, sweep(worker));
        }));
    }

    #[must_use]
    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    /// The environment variables with which functions in other processes use these engines.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        let mut variables = self.engines.environment();
        variables.extend(self.config.to_env().into_iter().map(|(name, value)| (name.to_owned(), value)));
        variables
    }

    /// Graceful shutdown: stops the worker, stops the sandboxes so that they can be resumed, ends the requests, and closes the engines.
    /// The API is served until the sandboxes have stopped, because agent servers post their last events when they end, and retry
    /// after a wait if the post fails.
    pub async fn shutdown(mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
            // The result is the cancellation.
            let _cancelled = task.await;
        }
        if let Some(sandboxes) = self.process_sandboxes()
            && let Err(error) = sandboxes.stop_all(&UserId::local()).await
        {
            tracing::error!(error = %error.context(), "local.sandboxes_not_stopped");
        }
        // It reaps the agent servers that it has forked, so it ends after them.
        if let Some((stop, stopped)) = self.stop_supervisor.take() {
            // The receiver is gone if agent servers cannot be forked.
            let _gone = stop.send(());
            let _ended = stopped.await;
        }
        if let Some((stop, mut served)) = self.stop_serving.take() {
            // The receiver is gone if serving has already ended.
            let _gone = stop.send(());
            if tokio::time::timeout(GRACE_PERIOD, &mut served).await.is_err() {
                served.abort();
            }
        }
        self.engines.shutdown().await;
    }

    /// The sandbox service, if sandboxes are processes.
    #[must_use]
    pub fn process_sandboxes(&self) -> Option<ProcessSandboxes> {
        let SandboxConfig::Process(process) = &self.config.sandbox else { return None };
        let store = Stores::new(&self.config.names, &self.aws, &self.sealer).sandboxes();
        Some(ProcessSandboxes::new(process.clone(), store))
    }

    fn router(&self, key: Option<SecretString>, access: &Access) -> Router {
        let (config, aws, sealer) = (&self.config, &self.aws, &self.sealer);
        let functions = functions(config, aws, sealer);
        let without_user = functions_without_user(config, aws, sealer);
        let health = Router::new()
            .route("/alive", get(alive))
            .route("/health", get(async || Json("OK")))
            .route("/ready", get(ready))
            .with_state(self.readiness.clone());
        gateway::wrap(functions, without_user, key, access.origins().clone()).merge(health).merge(docs::router())
    }

    fn serve(&mut self, listener: TcpListener, router: Router) {
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(async move {
            let serving = axum::serve(listener, router).with_graceful_shutdown(async {
                // An error means that the sender was dropped with the server, which also ends serving.
                let _stop = stopped.await;
            });
            if let Err(error) = serving.await {
                tracing::error!(%error, "local.serving_failed");
            }
        });
        self.stop_serving = Some((stop, served));
    }
}

/// The folders of a run.
struct Folders {
    /// The folder given with `--data`: installations, which a demo uses as well.
    shared: PathBuf,
    /// Records, objects, keys and sandboxes. A demo has its own, so that its records are separate.
    data: PathBuf,
}

impl Folders {
    fn create(options: &CommonOptions) -> Result<Self, ServerError> {
        if options.demo && options.sandbox != SandboxKind::Process {
            return Err(ServerError::Demo);
        }
        let shared = make_data_folder(&options.data)?;
        let data = if options.demo { make_data_folder(&shared.join(demo::FOLDER))? } else { shared.clone() };
        Ok(Self { shared, data })
    }
}

/// The opened data folder: engines with all tables, queues and the bucket, and the sealing keys.
struct Storage {
    engines: Engines,
    aws: Aws,
    names: Names,
    queues: QueueUrls,
    sealer: Sealer,
    sealing_key_file: PathBuf,
}

impl Storage {
    /// Opens the data folder. With `s3_url`, the engines run in process and presigned links begin with this address; without it,
    /// they listen on loopback ports for other processes.
    async fn open(data: &Path, s3_url: Option<&str>, pages: &Origins) -> Result<Self, ServerError> {
        let engines = match s3_url {
            Some(url) => Engines::in_process(data, url).await?,
            None => Engines::listening(data, EnginePorts::default(), pages).await?,
        };
        let aws = Aws::new(&engines.sdk_config().await);
        let sealing_key_file = data.join(SEALING_KEY);
        let sealer = Sealer::from_file(&sealing_key_file).map_err(file_error(&sealing_key_file))?;
        let mut names = Names::with_prefix(PREFIX);
        let queues = schema::make_all(&aws, &names, PREFIX).await?;
        names.job_queue_url.clone_from(&queues.jobs);
        names.export_queue_url.clone_from(&queues.exports);
        let expiry = schema::EXPORTS_EXPIRE;
        let [objects, uploads] = [expiry.days, expiry.incomplete_upload_days].map(|days| DAY * days);
        engines.expire(&names.bucket, expiry.prefix, objects, uploads)?;
        Ok(Self { engines, aws, names, queues, sealer, sealing_key_file })
    }
}

fn access(options: &CommonOptions, environment: &Environment) -> Result<Access, ServerError> {
    let public = environment.start.web_url.as_deref().map(PublicAddress::parse).transpose();
    let public = public.map_err(ServerError::PublicAddress)?;
    Ok(Access::new(options.sandbox == SandboxKind::Docker, public, &environment.origins))
}

fn sandbox_config(
    options: &CommonOptions,
    environment: &Environment,
    data: &Path,
    agent_server: &AgentServerOptions,
    port: u16,
    web_url: &str,
) -> Result<SandboxConfig, ServerError> {
    Ok(match options.sandbox {
        SandboxKind::None => SandboxConfig::None,
        SandboxKind::Docker => SandboxConfig::Docker(DockerSandboxConfig {
            deployment: Some(deployment_id(data)?),
            allow_cors_origins: origins_of_agent_servers(&environment.origins, port),
            ..DockerSandboxConfig::from_env(port, &options.agent_server_version)?
        }),
        SandboxKind::Remote => {
            let mut remote = RemoteSandboxConfig::from_env(&options.agent_server_version)?;
            remote.deployment = Some(deployment_id(data)?);
            remote.allow_cors_origins.extend(own_origins(port));
            SandboxConfig::Remote(remote)
        }
        SandboxKind::Process => SandboxConfig::Process(ProcessSandboxConfig {
            folder: data.join("sandboxes"),
            python: agent_server.launcher.clone(),
            version: agent_server.version.clone(),
            webhook_base_url: format!("{web_url}/api/v1/webhooks"),
            max_sandboxes: shared::sandbox::config::max_processes()?,
            allow_cors_origins: origins_of_agent_servers(&environment.origins, port),
        }),
    })
}

/// The id of the deployment in a data folder: a random text, created once, and the folder's path, so that a copy of the folder does not take
/// the sandboxes of the original for its own.
fn deployment_id(data: &Path) -> Result<String, ServerError> {
    let file = data.join("deployment-id");
    let stored = match fs::read_to_string(&file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let id = shared::id::random_base62(22);
            private_file::write(&file, id.as_bytes(), 0o600).map_err(file_error(&file))?;
            id
        }
        read => read.map_err(file_error(&file))?,
    };
    let path = data.canonicalize().map_err(file_error(data))?;
    Ok(format!("{stored} {}", path.display()))
}

fn config(environment: &Environment, sandbox: SandboxConfig, storage: &Storage) -> Config {
    Config {
        start: environment.start.clone(),
        sandbox,
        names: storage.names.clone(),
        sealing: SealingConfig::File(storage.sealing_key_file.clone()),
        single_user: true,
        live_status_budget: Duration::from_millis(1500),
        sandbox_request_budget: config::SANDBOX_REQUEST_BUDGET,
        sandbox_idle_limit: environment.sandbox_idle_limit,
        address_policy: AddressPolicy::Any,
        export: environment.export.clone(),
    }
}

/// Stores the given settings over those that were set through the API, secrets included. Returns whether a model is set.
async fn store_settings(
    config: &Config,
    aws: &Aws,
    sealer: &Sealer,
    settings: Map<String, Value>,
) -> Result<bool, ServerError> {
    let user = UserId::local();
    let store = Stores::new(&config.names, aws, sealer).settings();
    if !settings.is_empty() {
        store.lay_over(&user, &Value::Object(settings).to_string().into()).await?;
    }
    Ok(store.get(&user).await?.is_some_and(|settings| settings.llm_model.is_some()))
}

/// The routes of the functions that serve a user. The layers around them have to set a `Caller` in each request's extensions.
pub fn functions(config: &Config, aws: &Aws, sealer: &Sealer) -> Router {
    Router::new()
        .merge(conversations::router(conversations::Context::new(config, aws, sealer)))
        .merge(download::router(download::Context::new(config, aws, sealer)))
        .merge(start::router(start::Context::new(config, aws, sealer)))
        .merge(stream_start::router(stream_start::Context::new(config, aws, sealer)))
        .merge(start_tasks::router(start_tasks::Context::new(config, aws)))
        .merge(skills::router(skills::Context::new(config, aws, sealer)))
        .merge(sandboxes::router(sandboxes::Context::new(config, aws, sealer)))
        .merge(settings::router(settings::Context::new(config, aws, sealer)))
        .merge(events::router(events::Context::new(config, aws, sealer)))
}

/// The routes that need no user: those for agent servers and their agents, which authenticate by the keys of their sandboxes, and
/// those that a front end requests before a user is known.
pub fn functions_without_user(config: &Config, aws: &Aws, sealer: &Sealer) -> Router {
    Router::new()
        .merge(events::webhooks_router(events::Context::new(config, aws, sealer)))
        .merge(web_client::router(web_client::Context::from_env()))
        .merge(sandboxes::secrets_router(sandboxes::Context::new(config, aws, sealer)))
}

/// Fetches the web UI and then its editor. The API works without the UI, and the UI works without the editor.
async fn fetch_web_ui(ui: WebUi, folder: PathBuf, connection: Connection, readiness: Readiness) {
    let mut site = match web_ui::ensure(&folder, &connection).await {
        Ok(site) => site,
        Err(error) => {
            tracing::error!("{error} The API is served without the web UI.");
            readiness.set("web_ui", Part::Unavailable(error.to_string()));
            ui.set(Err(error));
            return;
        }
    };
    // The UI does not wait for the editor: without a network, npm needs a minute or more to fail.
    readiness.set("web_ui_editor", Part::Background("being fetched"));
    ui.set(Ok(site.clone()));
    readiness.set("web_ui", Part::Ready);
    match site.add_editor(&folder).await {
        Ok(()) => {
            ui.set(Ok(site));
            readiness.set("web_ui_editor", Part::Ready);
        }
        Err(error) => {
            tracing::warn!(
                "{error} The web UI is served without its editor, so diffs are blank. The next run retries the download."
            );
            readiness.set("web_ui_editor", Part::Unavailable(error.to_string()));
        }
    }
}

/// The web origins that agent servers accept. Without a list they accept this machine's origins; a list replaces these, so they are
/// added to it.
fn origins_of_agent_servers(permitted: &[String], port: u16) -> Vec<String> {
    if permitted.is_empty() {
        return Vec::new();
    }
    permitted.iter().cloned().chain(own_origins(port)).collect()
}

/// The origins of pages that this server serves.
fn own_origins(port: u16) -> [String; 2] {
    ["127.0.0.1", "localhost"].map(|host| format!("http://{host}:{port}"))
}

async fn alive(State(readiness): State<Readiness>) -> Response {
    if readiness.is_ready() {
        return Json(json!({"status": "ok"})).into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "starting", "parts": readiness.shown()}))).into_response()
}

async fn ready(State(readiness): State<Readiness>) -> Response {
    let status = if readiness.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({"ready": readiness.is_ready(), "parts": readiness.shown()}))).into_response()
}

async fn listen(port: u16) -> Result<TcpListener, ServerError> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.map_err(|source| ServerError::Port { port, source })
}

/// Creates the folder if it is missing, and makes it and the program's files in it private to their owner, because they contain keys
/// and conversations. The installations of the agent server and the web UI, and files that sandboxes write, keep their modes.
///
/// # Errors
/// [`ServerError::File`], and [`ServerError::NotPrivate`] if it belongs to another user.
pub(crate) fn make_data_folder(folder: &Path) -> Result<PathBuf, ServerError> {
    let folder = std::path::absolute(folder).map_err(file_error(folder))?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(file_error(&folder))?;
    let not_private = |path: &Path| {
        let path = path.to_owned();
        move |source| ServerError::NotPrivate { path, source }
    };
    // Of a symbolic link, the target has to be private.
    let real = folder.canonicalize().map_err(file_error(&folder))?;
    private_file::make_private(&real).map_err(not_private(&folder))?;
    private_file::make_entries_private(&folder).map_err(not_private(&folder))?;
    let sandboxes = folder.join("sandboxes");
    for entry in private_file::entries(&sandboxes).map_err(file_error(&sandboxes))? {
        private_file::make_entry_private(&entry.path()).map_err(not_private(&entry.path()))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            private_file::make_files_private(&entry.path()).map_err(not_private(&entry.path()))?;
        }
    }
    Ok(folder)
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> ServerError {
    move |source| ServerError::File { path: path.to_owned(), source }
}

/// Merges the settings of the file with those of the environment, which take precedence. An empty result leaves the stored settings
/// unchanged.
fn settings(options: &CommonOptions, given: Map<String, Value>) -> Result<Map<String, Value>, ServerError> {
    let mut settings = match &options.settings {
        None => Map::new(),
        Some(path) => {
            let text = fs::read_to_string(path).map_err(file_error(path))?;
            serde_json::from_str(&text)
                .map_err(|error| file_error(path)(io::Error::new(io::ErrorKind::InvalidData, error)))?
        }
    };
    settings.extend(given);
    Ok(settings)
}

/// Adopts the running agent servers of earlier runs, by their records, and terminates those without a record.
async fn adopt_sandboxes(sandboxes: &ProcessSandboxes, user: &UserId) -> Result<(), ServerError> {
    let orphans = sandboxes.end_orphans(user).await?;
    if orphans > 0 {
        tracing::warn!(orphans, "local.orphans_terminated");
    }
    for sandbox in sandboxes.list(user).await? {
        tracing::info!(sandbox = %sandbox.id, status = ?sandbox.status, "local.sandbox_found");
    }
    Ok(())
}

/// Runs the supervisor after the install of the agent server. Sends `listens` when it accepts requests, or cannot run. While it is being
/// prepared, boots of sandboxes wait for it.
async fn run_supervisor(
    supervisor: Supervisor,
    installed: oneshot::Receiver<()>,
    listens: oneshot::Sender<()>,
    stop: oneshot::Receiver<()>,
    readiness: Readiness,
) {
    if installed.await.is_err() {
        return; // the install has failed, or the server is being shut down
    }
    let stop = async {
        // An error means that the sender was dropped with the server.
        let _stop = stop.await;
    };
    let listens = Mutex::new(Some(listens));
    let report = |state| {
        if let Some(listens) = listens.lock().ok().and_then(|mut listens| listens.take()) {
            // The receiver is gone if the server is being shut down.
            let _gone = listens.send(());
        }
        let part = match state {
            BootState::Preparing => Part::Background("being prepared"),
            BootState::Fork => Part::Works("fork".to_owned()),
            BootState::Plain(reason) => Part::Works(format!("plain: {reason}")),
        };
        readiness.set("sandbox_boot", part);
    };
    supervisor.run(stop, report).await;
}

struct AgentServerOptions {
    version: String,
    /// The interpreter given with `--python`.
    python: Option<PathBuf>,
    /// The folder that contains all installed versions.
    folder: PathBuf,
    /// A script that runs the Python of the installed version. Sandboxes are configured with its path.
    launcher: PathBuf,
}

impl AgentServerOptions {
    fn new(options: &CommonOptions, folders: &Folders) -> Self {
        let version = &options.agent_server_version;
        Self {
            version: version.clone(),
            python: options.python.clone(),
            folder: options.agent_server.clone().unwrap_or_else(|| folders.shared.join("agent-server")),
            // One launcher per version: a sandbox runs the version in its record, even before this version is installed.
            launcher: folders.data.join(format!("agent-server-python-{version}")),
        }
    }
}

/// Installs the agent server unless it is installed, and writes its launcher.
async fn install_agent_server(options: &AgentServerOptions) -> Result<(), String> {
    let AgentServerOptions { version, python, folder, launcher } = options;
    let installed = agent_server::ensure(folder, version, python.as_deref(), Terminal::new()).await;
    let installed = installed.map_err(|error: EnsureError| error.to_string())?;
    let python = installed.python.display().to_string().replace('\'', r"'\''");
    let script = format!("#!/bin/sh\nexec '{python}' \"$@\"\n");
    private_file::write(launcher, script.as_bytes(), 0o700)
        .map_err(|error| format!("{} cannot be written: {error}", launcher.display()))
}
