//! The server: set-up, run, clean end.

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
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::access::{Access, PublicAddress};
use crate::agent_server::{self, EnsureError, PythonError, Terminal, find_python};
use crate::demo;
use crate::docs;
use crate::edge;
use crate::engines::{EngineError, EnginePorts, Engines};
use crate::links::Links;
use crate::options::{CommonOptions, SandboxKind};
use crate::private_file;
use crate::web_ui::{self, Connection, WebUi};
use crate::worker::{Consumer, EXPORT_CONCURRENCY, WORKER_CONCURRENCY, poll, sweep};

/// What the names of the tables on the embedded engines begin with.
pub(crate) const PREFIX: &str = "openhands-";
/// The file of the data folder that holds the keys under which secrets are sealed.
pub const SEALING_KEY: &str = "sealing-key";
/// How long requests in flight may take to end.
const GRACE: Duration = Duration::from_secs(3);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Waiting in this process costs nothing, so starts are given back to the queue only when they take long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why the server did not start. Each one reads as a sentence.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A file or folder.
    #[error("{path} cannot be used: {source}", path = path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The data folder belongs to another user, or its file system keeps no permissions.
    #[error("{path} cannot be kept private to you (mode 0700): {source}. Choose a folder of your own with --data.", path = path.display())]
    NotPrivate {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `OH_WEB_URL` or `WEB_HOST`.
    #[error("{0}")]
    PublicAddress(String),
    /// The port is taken.
    #[error("Port {port} on 127.0.0.1 cannot be listened on: {source}. Choose another with --port.")]
    Port {
        /// Which.
        port: u16,
        /// What the system said.
        source: io::Error,
    },
    /// The engines.
    #[error(transparent)]
    Engines(#[from] EngineError),
    /// The tables.
    #[error(transparent)]
    Schema(#[from] schema::SchemaError),
    /// The Python that was asked for.
    #[error(transparent)]
    Python(#[from] PythonError),
    /// The environment.
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    /// A demo of what it cannot show.
    #[error("--demo runs its agents as processes of this machine: leave --sandbox out.")]
    Demo,
    /// Anything of the domain.
    #[error("{}", .0.context())]
    Domain(#[from] shared::Error),
}

/// What the environment of the process says.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// How starts behave.
    pub start: StartConfig,
    /// How conversations are exported.
    pub export: ExportConfig,
    /// The user's settings; they win over those of a file.
    pub settings: Map<String, Value>,
    /// The instance's key (`SESSION_API_KEY`); without one every request is served.
    pub session_api_key: Option<SecretString>,
    /// Origins of hosted front ends (`PERMITTED_CORS_ORIGINS`).
    pub origins: Vec<String>,
}

impl Environment {
    /// Reads it.
    ///
    /// # Errors
    /// Names the first variable that is malformed.
    pub fn read() -> Result<Self, ServerError> {
        let mut start = StartConfig::from_env()?;
        if config::text("START_INLINE_WAIT_MS").is_none() {
            start.inline_wait = PATIENCE;
        }
        let settings = [("LLM_MODEL", "llm_model"), ("LLM_API_KEY", "llm_api_key"), ("LLM_BASE_URL", "llm_base_url")]
            .into_iter()
            .filter_map(|(variable, field)| Some((field.to_owned(), config::text(variable)?.into())))
            .collect();
        Ok(Self {
            start,
            export: ExportConfig::from_env()?,
            settings,
            session_api_key: config::text("SESSION_API_KEY").map(SecretString::from),
            origins: config::permitted_origins(),
        })
    }
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    /// Where the API is served, or will be by others.
    pub address: SocketAddr,
    /// The configuration of the functions.
    pub config: Config,
    /// Clients of the embedded engines.
    pub aws: Aws,
    engines: Engines,
    sealer: Sealer,
    tasks: Vec<JoinHandle<()>>,
    stop_serving: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
    readiness: Readiness,
}

/// What is still coming.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<&'static str, Part>>>);

/// How far a part is that comes up by itself.
#[derive(Clone, Debug)]
enum Part {
    /// What is being done.
    Coming(&'static str),
    /// What is being done, while nothing waits for it.
    Beside(&'static str),
    Ready,
    /// Starts wait for it in vain.
    Failed(String),
    /// It is not there, and the rest works without it.
    Without(String),
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
            Part::Coming(what) | Part::Beside(what) => what.to_owned(),
            Part::Ready => "ready".to_owned(),
            Part::Failed(why) => format!("failed: {why}"),
            Part::Without(why) => format!("not served: {why}"),
        };
        self.parts().into_iter().map(|(name, part)| (name.to_owned(), shown(part).into())).collect()
    }

    /// Whether everything works that conversations need.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.parts().values().all(|part| matches!(part, Part::Ready | Part::Beside(_) | Part::Without(_)))
    }
}

impl Server {
    /// Starts everything. With `invoke_url`, the worker and the API are others' business: functions under
    /// `cargo lambda watch`.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub async fn start(
        options: &CommonOptions,
        environment: Environment,
        serve: bool,
        invoke_url: Option<String>,
    ) -> Result<Self, ServerError> {
        if options.demo && options.sandbox != SandboxKind::Process {
            return Err(ServerError::Demo);
        }
        // What is installed is for all, records are not.
        let installed = make_data_folder(&options.data)?;
        let data = if options.demo { make_data_folder(&installed.join(demo::FOLDER))? } else { installed.clone() };
        let mut settings = settings(options, environment.settings)?;
        // One that was asked for is looked at before anything runs; one that is looked for may come later.
        if let (Some(wanted), SandboxKind::Process) = (&options.python, options.sandbox) {
            find_python(Some(wanted)).await?;
        }
        let listener = if serve { Some(listen(options.port).await?) } else { None };
        let port = listener
            .as_ref()
            .and_then(|listener| listener.local_addr().ok())
            .map_or(options.port, |address| address.port());
        let containers = options.sandbox == SandboxKind::Docker;
        let public = environment.start.web_url.as_deref().map(PublicAddress::parse).transpose();
        let access = Access::new(containers, public.map_err(ServerError::PublicAddress)?, &environment.origins);
        let own_url = format!("http://127.0.0.1:{port}");
        let engines = match serve {
            true => Engines::in_process(&data, &own_url).await?,
            false => Engines::listening(&data, EnginePorts::default(), access.origins()).await?,
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
        let web_url = match &invoke_url {
            Some(url) => url.trim_end_matches('/').to_owned(),
            None => own_url.clone(),
        };
        let agent_server = AgentServerOptions {
            version: options.agent_server_version.clone(),
            python: options.python.clone(),
            folder: options.agent_server.clone().unwrap_or_else(|| installed.join("agent-server")),
            // One each version: what runs is what the sandbox's record says, also before this version is installed.
            launcher: data.join(format!("agent-server-python-{}", options.agent_server_version)),
        };
        if options.demo {
            settings.extend(demo::settings(&web_url));
        }
        let config = Config {
            start: environment.start,
            sandbox: match options.sandbox {
                SandboxKind::None => SandboxConfig::None,
                SandboxKind::Docker => SandboxConfig::Docker(DockerSandboxConfig {
                    allow_cors_origins: origins_of_agent_servers(&environment.origins, port),
                    ..DockerSandboxConfig::from_env(port, &options.agent_server_version)?
                }),
                SandboxKind::Remote => {
                    let mut remote = RemoteSandboxConfig::from_env(&options.agent_server_version)?;
                    remote.allow_cors_origins.extend(own_origins(port));
                    SandboxConfig::Remote(remote)
                }
                SandboxKind::Process => SandboxConfig::Process(ProcessSandboxConfig {
                    folder: data.join("sandboxes"),
                    python: agent_server.launcher.clone(),
                    version: agent_server.version.clone(),
                    webhook_base_url: format!("{web_url}/api/v1/webhooks"),
                    allow_cors_origins: origins_of_agent_servers(&environment.origins, port),
                }),
            },
            names,
            sealing: SealingConfig::File(sealing_key_file),
            single_user: true,
            live_status_budget: Duration::from_millis(1500),
            sandbox_request_budget: config::SANDBOX_REQUEST_BUDGET,
            address_policy: AddressPolicy::Any,
            export: environment.export,
        };
        let user = UserId::local();
        let stored = Stores::new(&config.names, &aws, &sealer).settings();
        if !settings.is_empty() {
            // Over what was set by way of the API, secrets before all.
            stored.lay_over(&user, &Value::Object(settings).to_string().into()).await?;
        }
        let model = stored.get(&user).await?.and_then(|settings| settings.llm_model);
        let has_model = model.is_some();
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
        let readiness = Readiness::default();
        let mut server = Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            config,
            aws,
            engines,
            sealer,
            tasks: Vec::new(),
            stop_serving: None,
            readiness: readiness.clone(),
        };
        if let Some(sandboxes) = server.process_sandboxes() {
            take_over(&sandboxes, &user).await?;
            readiness.set("agent_server", Part::Coming("being installed"));
        }
        if let Some(listener) = listener {
            let ui = options.ui.then(WebUi::default);
            if let Some(ui) = &ui {
                readiness.set("web_ui", Part::Coming("being fetched"));
                let question = environment.session_api_key.is_some().then_some("SESSION_API_KEY of this server:");
                let reach = match options.sandbox {
                    SandboxKind::Process | SandboxKind::None => web_ui::LOOPBACK,
                    SandboxKind::Docker | SandboxKind::Remote => web_ui::ANYWHERE,
                };
                let connection = Connection { host: None, question, has_model, reach };
                let fetching = fetch_web_ui(ui.clone(), installed.join(web_ui::FOLDER), connection, readiness.clone());
                server.tasks.push(tokio::spawn(fetching));
            }
            let mut router = server.router(environment.session_api_key, &access);
            if options.demo {
                router = router.merge(demo::router());
            }
            if let Some(ui) = ui {
                router = ui.before(router);
            }
            let links = Links::new(&server.config.names.bucket, &own_url, server.engines.s3_router(), access.clone());
            // Outermost: nothing is served that it has not let through.
            server.serve(listener, access.around(links.before(router)));
        }
        let install = matches!(server.config.sandbox, SandboxConfig::Process(_));
        let sqs = server.aws.sqs.clone();
        let poll_exports = poll(sqs.clone(), queues.exports, exports.clone(), EXPORT_CONCURRENCY);
        let poll_dead_exports = poll(sqs.clone(), queues.export_dead_letters, exports, EXPORT_CONCURRENCY);
        server.tasks.extend([tokio::spawn(poll_exports), tokio::spawn(poll_dead_exports)]);
        server.tasks.push(tokio::spawn(async move {
            if install && let Err(text) = install_agent_server(&agent_server).await {
                // The API goes on: records can be read, and starts wait until the next run.
                tracing::error!("{text}");
                readiness.set("agent_server", Part::Failed(text));
                return;
            }
            if install {
                readiness.set("agent_server", Part::Ready);
            }
            // Only now: a start that is polled earlier would fail for want of an agent server.
            let starts = poll(sqs.clone(), queues.jobs, worker.clone(), WORKER_CONCURRENCY);
            let dead_letters = poll(sqs, queues.dead_letters, worker.clone(), WORKER_CONCURRENCY);
            tokio::join!(starts, dead_letters, sweep(worker));
        }));
        Ok(server)
    }

    /// What is still coming.
    #[must_use]
    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    /// The variables with which functions in other processes work on these engines.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        let mut variables = self.engines.environment();
        variables.extend(self.config.to_env().into_iter().map(|(name, value)| (name.to_owned(), value)));
        variables
    }

    /// Ends cleanly: no more work on starts, sandboxes stopped so that they can be resumed, then no more requests, engines
    /// closed. Agent servers post their last events as they end, and wait and try again when nobody takes them.
    pub async fn shutdown(mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
            // Cancelled is what it should be.
            let _cancelled = task.await;
        }
        if let Some(sandboxes) = self.process_sandboxes()
            && let Err(error) = sandboxes.stop_all(&UserId::local()).await
        {
            tracing::error!(error = %error.context(), "local.sandboxes_not_stopped");
        }
        if let Some((stop, mut served)) = self.stop_serving.take() {
            // The receiver is gone if serving has ended by itself.
            let _gone = stop.send(());
            if tokio::time::timeout(GRACE, &mut served).await.is_err() {
                served.abort();
            }
        }
        self.engines.shutdown().await;
    }

    /// The sandboxes, if they are processes.
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
        edge::around(functions, without_user, key, access.origins().clone()).merge(health).merge(docs::router())
    }

    fn serve(&mut self, listener: TcpListener, router: Router) {
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(async move {
            let serving = axum::serve(listener, router).with_graceful_shutdown(async {
                // Also when the sender is dropped: the server is gone then.
                let _stop = stopped.await;
            });
            if let Err(error) = serving.await {
                tracing::error!(%error, "local.serving_failed");
            }
        });
        self.stop_serving = Some((stop, served));
    }
}

/// The routes of all functions but the webhooks. Whoever runs them says who calls, with a `Caller` in each request's extensions.
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

/// The routers that need no user: those for agent servers and the agents in them, who show keys of their sandboxes, and what a
/// front end asks for before anybody is known.
pub fn functions_without_user(config: &Config, aws: &Aws, sealer: &Sealer) -> Router {
    Router::new()
        .merge(events::webhooks_router(events::Context::new(config, aws, sealer)))
        .merge(web_client::router(web_client::Context::from_env()))
        .merge(sandboxes::secrets_router(sandboxes::Context::new(config, aws, sealer)))
}

/// Fetches it, and says when there is none: the rest works without it, and the UI without its editor.
async fn fetch_web_ui(ui: WebUi, folder: PathBuf, connection: Connection, readiness: Readiness) {
    let mut site = match web_ui::ensure(&folder, &connection).await {
        Ok(site) => site,
        Err(error) => {
            tracing::error!("{error} The API is served without it.");
            readiness.set("web_ui", Part::Without(error.to_string()));
            ui.set(Err(error));
            return;
        }
    };
    // The UI is not kept waiting: where there is no network, npm takes a minute or more to say so.
    readiness.set("web_ui_editor", Part::Beside("being fetched"));
    ui.set(Ok(site.clone()));
    readiness.set("web_ui", Part::Ready);
    match site.add_editor(&folder).await {
        Ok(()) => {
            ui.set(Ok(site));
            readiness.set("web_ui_editor", Part::Ready);
        }
        Err(error) => {
            tracing::warn!("{error} The web UI is served without it: diffs are blank. The next run tries again.");
            readiness.set("web_ui_editor", Part::Without(error.to_string()));
        }
    }
}

/// From which pages browsers may reach agent servers. Those of this machine may unless others are named: then they have to be named,
/// too.
fn origins_of_agent_servers(permitted: &[String], port: u16) -> Vec<String> {
    if permitted.is_empty() {
        return Vec::new();
    }
    permitted.iter().cloned().chain(own_origins(port)).collect()
}

/// Where pages of this server are from.
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

/// Makes the folder, if it is not there, and keeps it private to its owner, with every file in it that is ours: it holds keys and
/// conversations. The agent server's and the web UI's installations, and what sandboxes make, keep their modes.
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
    // Through a link: the folder that it leads to is what counts.
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

/// Settings from the file and, over them, the environment; none when there are neither: then what is stored stays.
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

/// Finds the agent servers of earlier runs by their records: the living are ours again, those without one are ended.
async fn take_over(sandboxes: &ProcessSandboxes, user: &UserId) -> Result<(), ServerError> {
    let orphans = sandboxes.end_orphans(user).await?;
    if orphans > 0 {
        tracing::warn!(orphans, "local.orphans_ended");
    }
    for sandbox in sandboxes.list(user).await? {
        tracing::info!(sandbox = %sandbox.id, status = ?sandbox.status, "local.sandbox_found");
    }
    Ok(())
}

/// Which agent server is installed, with what, and where.
struct AgentServerOptions {
    version: String,
    /// The Python asked for.
    python: Option<PathBuf>,
    /// The folder of all installs.
    folder: PathBuf,
    /// The script by which sandboxes find the Python of the install.
    launcher: PathBuf,
}

/// Installs the agent server if need be, and writes its launcher.
async fn install_agent_server(options: &AgentServerOptions) -> Result<(), String> {
    let AgentServerOptions { version, python, folder, launcher } = options;
    let installed = agent_server::ensure(folder, version, python.as_deref(), Terminal::new()).await;
    let installed = installed.map_err(|error: EnsureError| error.to_string())?;
    let python = installed.python.display().to_string().replace('\'', r"'\''");
    let script = format!("#!/bin/sh\nexec '{python}' \"$@\"\n");
    private_file::write(launcher, script.as_bytes(), 0o700)
        .map_err(|error| format!("{} cannot be written: {error}", launcher.display()))
}
