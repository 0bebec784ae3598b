//! The whole product in this process, as `cargo local` runs it, with its own data folder and real agent servers.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use local::options::{CommonOptions, SandboxKind};
use local::server::{Environment, Server};
use reqwest::{Client, RequestBuilder};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::{Value, json};
use shared::config::{SandboxConfig, SealingConfig, StartConfig};
use shared::event::store::Event;
use shared::sandbox::process::ProcessSandboxes;
use shared::sandbox::reconciler::SandboxReconciler;
use shared::sandbox::spec::AGENT_SERVER_VERSION;
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use tempfile::TempDir;
use tokio::sync::Semaphore;
use tracing_subscriber::EnvFilter;
use uuid::Uuid;

use super::log::all_events;
use super::wait::{wait_for, wait_until};

/// The statuses of a successful start, in order.
pub const STATUSES: [&str; 8] = [
    "WORKING",
    "WAITING_FOR_SANDBOX",
    "PREPARING_REPOSITORY",
    "RUNNING_SETUP_SCRIPT",
    "SETTING_UP_GIT_HOOKS",
    "SETTING_UP_SKILLS",
    "STARTING_CONVERSATION",
    "READY",
];

/// The first run installs the agent server.
const INSTALL_LIMIT: Duration = Duration::from_secs(20 * 60);
/// Booting an agent server takes long where several share few cores.
const START_LIMIT: Duration = Duration::from_secs(180);
/// Long, because a machine that runs all tests at once may give an agent server a tenth of a processor.
const TURN_LIMIT: Duration = Duration::from_secs(180);
/// For processes that end by themselves after their agent server has stopped.
const GONE_LIMIT: Duration = Duration::from_secs(60);
const API: &str = "/api/v1/app-conversations";

/// The number of agent servers that may boot at the same time: each one keeps a core busy for seconds.
static BOOTS: Semaphore = Semaphore::const_new(3);
/// The log of all products of this process.
static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// A running product. Dropping it ends its agent servers and removes its folder.
pub struct Product {
    // `None` after a clean shutdown.
    server: Option<Server>,
    folder: TempDir,
    http: Client,
    is_demo: bool,
    web_url: Option<String>,
    agent_server_version: String,
    setup_script_timeout: Duration,
    /// Whether starts wait as on AWS: outside the worker, with polls that are far apart.
    waits_as_on_aws: bool,
}

/// A start that has ended.
#[derive(Debug)]
pub struct Start {
    /// The last state of the task.
    pub task: Value,
    /// Every status that was seen, in order.
    pub statuses: Vec<String>,
}

impl Start {
    /// The conversation of a successful start.
    #[track_caller]
    pub fn conversation_id(&self) -> String {
        assert_eq!(self.task["status"], "READY", "the start failed: {:#}", self.task);
        text(&self.task["app_conversation_id"])
    }

    /// The error of a failed start.
    #[track_caller]
    pub fn error(&self) -> String {
        assert_eq!(self.task["status"], "ERROR", "the start did not fail: {:#}", self.task);
        text(&self.task["detail"])
    }

    /// The sandbox that the start used.
    #[track_caller]
    pub fn sandbox_id(&self) -> String {
        text(&self.task["sandbox_id"])
    }

    /// The notes in `detail`; empty if there are none.
    pub fn detail(&self) -> &str {
        self.task["detail"].as_str().unwrap_or_default()
    }
}

/// A conversation at its agent server, with the address and the key that our API returned.
#[derive(Clone, Debug)]
pub struct AgentConversation {
    http: Client,
    url: String,
    key: String,
}

/// The result of a command in a sandbox.
#[derive(Debug)]
pub struct Ran {
    pub exit_code: i64,
    pub stdout: String,
    pub stderr: String,
}

impl Product {
    /// Starts on an empty data folder, with these settings for the user. Allows git hosts without encryption, and uses
    /// no environment variables. Returns when everything is ready.
    pub async fn start(settings: Value) -> Self {
        Self::start_at(None, settings).await
    }

    /// As [`Product::start`], with a time limit for setup scripts.
    pub async fn start_with_setup_limit(limit: Duration, settings: Value) -> Self {
        let mut product = Self::new(false);
        product.setup_script_timeout = limit;
        product.run_with(settings).await;
        product
    }

    /// As [`Product::start`], with starts that wait as on AWS: outside the worker, with polls that are far apart.
    pub async fn start_with_waits_of_aws(settings: Value) -> Self {
        let mut product = Self::new(false);
        product.waits_as_on_aws = true;
        product.run_with(settings).await;
        product
    }

    /// As [`Product::start`], with a public address, as in `OH_WEB_URL`.
    pub async fn start_at(web_url: Option<String>, settings: Value) -> Self {
        let mut product = Self::new(false);
        product.web_url = web_url;
        product.run_with(settings).await;
        product
    }

    /// As [`Product::start`], with this version of the agent server.
    pub async fn start_with_agent_server(version: &str, settings: Value) -> Self {
        let mut product = Self::new(false);
        version.clone_into(&mut product.agent_server_version);
        product.run_with(settings).await;
        product
    }

    /// Starts as `cargo local --demo` does, on an empty data folder.
    pub async fn demo() -> Self {
        let mut product = Self::new(true);
        product.run(None).await;
        product
    }

    fn new(is_demo: bool) -> Self {
        capture_log();
        let folder = TempDir::new().expect("a folder for the product");
        // Ignores the machine's proxy settings, because the server is on loopback.
        let http = Client::builder().no_proxy().build().expect("a client");
        Self {
            server: None,
            folder,
            http,
            is_demo,
            web_url: None,
            agent_server_version: agent_server_version(),
            setup_script_timeout: StartConfig::default().setup_script_timeout,
            waits_as_on_aws: false,
        }
    }

    /// Shuts this run down and starts another one on the same data folder.
    pub async fn restart(&mut self) {
        self.stop().await;
        self.run(None).await;
    }

    /// As [`Product::restart`], with another version of the agent server.
    pub async fn restart_with_agent_server(&mut self, version: &str) {
        version.clone_into(&mut self.agent_server_version);
        self.restart().await;
    }

    /// The Python interpreter of the agent servers.
    pub fn agent_server_python(&self) -> PathBuf {
        let SandboxConfig::Process(process) = &self.server().config.sandbox else { panic!("sandboxes are processes") };
        process.python.clone()
    }

    /// Shuts down and asserts that no process is left.
    pub async fn shutdown(mut self) {
        self.stop().await;
    }

    async fn run_with(&mut self, settings: Value) {
        let settings_file = self.folder.path().join("settings.json");
        fs::write(&settings_file, settings.to_string()).expect("the settings are written");
        self.run(Some(settings_file)).await;
    }

    async fn run(&mut self, settings: Option<PathBuf>) {
        let options = CommonOptions {
            agent_server: Some(agent_server_folder()),
            agent_server_version: self.agent_server_version.clone(),
            settings,
            demo: self.is_demo,
            ..CommonOptions::on(self.data(), SandboxKind::Process)
        };
        let waits = if self.waits_as_on_aws {
            StartConfig::default()
        } else {
            let wait = Duration::from_secs(60);
            let max_poll_delay = Duration::from_secs(1);
            StartConfig { inline_wait: wait, boot_inline_wait: wait, max_poll_delay, ..StartConfig::default() }
        };
        let start = StartConfig {
            allow_insecure_git_access: true,
            setup_script_timeout: self.setup_script_timeout,
            // Long, for a server on a slow machine.
            mcp_probe_timeout: Duration::from_secs(60),
            web_url: self.web_url.clone(),
            ..waits
        };
        let environment = Environment { start, ..Environment::default() };
        let server = Server::start(&options, environment, true, None).await.expect("the server starts");
        let url = format!("http://{}/ready", server.address);
        self.server = Some(server);
        wait_until("the product is ready", INSTALL_LIMIT, async || {
            let (_, ready) = send(self.http.get(&url)).await;
            let part = ready["parts"]["agent_server"].as_str().unwrap_or_default().to_owned();
            assert!(!part.starts_with("failed"), "the agent server cannot be installed: {part}");
            ready["ready"] == true
        })
        .await;
    }

    async fn stop(&mut self) {
        let server = self.server.take().expect("it runs");
        server.shutdown().await;
        let limit = Instant::now() + GONE_LIMIT;
        while !self.processes().is_empty() {
            let names = || self.processes().into_iter().map(command_line).collect::<Vec<_>>();
            assert!(Instant::now() < limit, "processes are left after a clean shutdown: {:#?}", names());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// The data folder.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn server(&self) -> &Server {
        self.server.as_ref().expect("it runs")
    }

    /// The sandboxes, for operations that have no route.
    pub fn sandboxes(&self) -> ProcessSandboxes {
        self.server().process_sandboxes().expect("sandboxes are processes")
    }

    /// Deletes sandboxes as the product does.
    pub fn reconciler(&self) -> SandboxReconciler {
        let Server { config, aws, .. } = self.server();
        let SealingConfig::File(key) = &config.sealing else { panic!("a local key") };
        let sealer = Sealer::from_file(key).expect("the sealing key");
        Stores::new(&config.names, aws, &sealer).sandbox_reconciler(Arc::new(self.sandboxes()))
    }

    /// The events of a conversation in our store.
    pub async fn events_of(&self, id: &str) -> Vec<Event> {
        let Server { config, aws, .. } = self.server();
        let store = Stores::without_key(&config.names, aws).events();
        all_events(&store, &UserId::local(), Uuid::parse_str(id).expect("an id")).await
    }

    /// Replaces the user's settings.
    pub async fn change_settings(&self, settings: &Value) {
        let Server { config, aws, .. } = self.server();
        let SealingConfig::File(key) = &config.sealing else { panic!("a key file") };
        let sealer = Sealer::from_file(key).expect("the sealing key");
        let store = Stores::new(&config.names, aws, &sealer).settings();
        store.put(&UserId::local(), &settings.to_string().into()).await.expect("the settings are stored");
    }

    /// Runs the demo's conversation, as `cargo local --demo` does in the terminal.
    pub async fn show_demo(&self) -> Result<(), local::demo::ShowError> {
        let _permit = BOOTS.acquire().await.expect("never closed");
        local::demo::show(&format!("http://{}", self.server().address), None).await
    }

    /// `http://127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        format!("http://{}", self.server().address)
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{API}{path}", self.server().address)
    }

    /// The response of a conversation's export.
    pub async fn download(&self, id: &str) -> reqwest::Response {
        self.http.get(self.url(&format!("/{id}/download"))).send().await.expect("an answer")
    }

    /// `GET` below `/api/v1/app-conversations`.
    pub async fn get(&self, path: &str) -> Value {
        let (status, body) = send(self.http.get(self.url(path))).await;
        assert_eq!(status, 200, "GET {path}: {body:#}");
        body
    }

    /// `GET` of an absolute path.
    pub async fn get_from(&self, path: &str) -> Value {
        let (status, body) = send(self.http.get(format!("http://{}{path}", self.server().address))).await;
        assert_eq!(status, 200, "GET {path}: {body:#}");
        body
    }

    /// A `POST` request below `/api/v1/app-conversations`, not yet sent.
    pub fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        self.http.post(self.url(path)).json(body)
    }

    /// A `POST` request to an absolute path, not yet sent.
    pub fn post_to(&self, path: &str, body: &Value) -> RequestBuilder {
        self.http.post(format!("http://{}{path}", self.server().address)).json(body)
    }

    /// The response to any request, as one text: status, headers, body.
    pub async fn answer_to(&self, method: &str, target: &str, headers: &[(&str, &str)], body: Option<&str>) -> String {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        let mut request = self.http.request(method, format!("http://{}{target}", self.server().address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_owned());
        }
        let answer = request.send().await.expect("an answer");
        let head = format!("{} {:?}", answer.status(), answer.headers());
        format!("{head} {}", String::from_utf8_lossy(&answer.bytes().await.expect("a body")))
    }

    /// Stops the agent servers, as the shutdown of the program does.
    pub async fn stop_sandboxes(&self) {
        self.sandboxes().stop_all(&UserId::local()).await.expect("stopped");
    }

    /// Starts a conversation and polls the start until it ends, as a client does.
    pub async fn start_conversation(&self, request: Value) -> Start {
        let boots = ["sandbox_id", "parent_conversation_id"].iter().all(|field| request[field].is_null());
        let _permit = if boots { Some(BOOTS.acquire().await.expect("never closed")) } else { None };
        let (status, task) = send(self.post("", &request)).await;
        assert_eq!(status, 200, "{task:#}");
        assert_eq!(task["status"], "WORKING", "{task:#}");
        self.follow(&text(&task["id"])).await
    }

    /// Polls a start until it ends.
    pub async fn follow(&self, id: &str) -> Start {
        let mut statuses: Vec<String> = Vec::new();
        let what = format!("the start {id} ends");
        let task = wait_for(&what, START_LIMIT, async || {
            let task = self.get(&format!("/start-tasks?ids={id}")).await[0].take();
            let status = text(&task["status"]);
            if statuses.last() != Some(&status) {
                statuses.push(status.clone());
            }
            (status == "READY" || status == "ERROR").then_some(task)
        })
        .await;
        Start { task, statuses }
    }

    /// The conversation as our API returns it.
    pub async fn conversation(&self, id: &str) -> Value {
        self.get(&format!("?ids={id}")).await[0].take()
    }

    /// The conversation as our API returns it, once its agent has this status.
    pub async fn conversation_when(&self, id: &str, status: &str) -> Value {
        self.conversation_within(id, status, TURN_LIMIT).await
    }

    /// As [`Self::conversation_when`], for slow agents.
    pub async fn conversation_within(&self, id: &str, status: &str, limit: Duration) -> Value {
        wait_for(&format!("the conversation {id} is {status}"), limit, async || {
            let conversation = self.conversation(id).await;
            (conversation["execution_status"] == status).then_some(conversation)
        })
        .await
    }

    /// The conversation at its agent server.
    pub async fn at_agent(&self, id: &str) -> AgentConversation {
        let conversation = self.conversation(id).await;
        assert_eq!(conversation["sandbox_status"], "RUNNING", "{conversation:#}");
        AgentConversation {
            http: self.http.clone(),
            url: text(&conversation["conversation_url"]),
            key: text(&conversation["session_api_key"]),
        }
    }

    /// All files of the data folder except links.
    pub fn files(&self) -> Vec<PathBuf> {
        let (mut files, mut folders) = (Vec::new(), vec![self.data()]);
        while let Some(folder) = folders.pop() {
            // Files that were removed meanwhile are skipped.
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                    Ok(kind) if kind.is_file() => files.push(entry.path()),
                    _ => {}
                }
            }
        }
        files
    }

    /// Processes of this product's sandboxes: their environment names its folder.
    pub fn processes(&self) -> Vec<Pid> {
        let data = self.data();
        let mut found: Vec<Pid> = agent_servers(&data.join("sandboxes"));
        let marker = data.display().to_string();
        // Systems without `/proc` find only the agent servers themselves.
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| Pid::from_raw(name.parse().ok()?)) else {
                continue;
            };
            // Not readable: the process has ended, or belongs to another user.
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            if contains(&environment, marker.as_bytes()) && !found.contains(&pid) {
                found.push(pid);
            }
        }
        found
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("The last lines of the products' log:\n{}", tail(&logged(), 60));
            for log in self.files().iter().filter(|path| path.ends_with("agent-server.log")) {
                let text = fs::read_to_string(log).unwrap_or_default();
                eprintln!("The last lines of {}:\n{}", log.display(), tail(&text, 30));
            }
        }
        // Some processes may still be starting: none start any more, because this thread also runs the server.
        for _ in 0..20 {
            let left = self.processes();
            if left.is_empty() {
                break;
            }
            for pid in left {
                // It may just have ended.
                let _gone = (kill_process_group(pid, Signal::KILL), kill_process(pid, Signal::KILL));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl AgentConversation {
    async fn send(&self, request: RequestBuilder) -> Value {
        let (status, body) = send(request.header("X-Session-API-Key", &self.key)).await;
        assert_eq!(status, 200, "{}: {body:#}", self.url);
        body
    }

    /// The conversation as the agent server returns it.
    pub async fn info(&self) -> Value {
        self.send(self.http.get(&self.url)).await
    }

    /// The version of the agent server.
    pub async fn server_version(&self) -> String {
        let base = self.url.split("/api/").next().unwrap_or_default();
        text(&self.send(self.http.get(format!("{base}/server_info"))).await["version"])
    }

    /// The agent's working directory.
    pub async fn folder(&self) -> PathBuf {
        text(&self.info().await["workspace"]["working_dir"]).into()
    }

    /// Sends a message, which the agent responds to.
    pub async fn send_message(&self, message: &str) {
        let body = json!({"role": "user", "content": [{"type": "text", "text": message}], "run": true});
        self.post("events", &body).await;
    }

    /// `POST` below the conversation.
    pub async fn post(&self, path: &str, body: &Value) -> Value {
        self.send(self.http.post(format!("{}/{path}", self.url)).json(body)).await
    }

    /// Updates the conversation itself.
    pub async fn patch(&self, body: &Value) -> Value {
        self.send(self.http.patch(&self.url).json(body)).await
    }

    /// As [`Self::patch`], for any status.
    pub async fn try_patch(&self, body: &Value) -> (u16, Value) {
        send(self.http.patch(&self.url).json(body).header("X-Session-API-Key", &self.key)).await
    }

    /// The URL of its websocket, key included.
    pub fn socket_url(&self) -> String {
        let (base, id) = self.url.split_once("/api/conversations/").expect("a conversation's address");
        format!("{base}/sockets/events/{id}?session_api_key={}", self.key)
    }

    /// All of its events, over all pages.
    pub async fn all_events(&self) -> Vec<Value> {
        let (mut events, mut page_id) = (Vec::new(), None);
        loop {
            let request = self
                .http
                .get(format!("{}/events/search?limit=100", self.url))
                .query(&page_id.map(|id: String| [("page_id", id)]));
            let page = self.send(request).await;
            events.extend(page["items"].as_array().expect("items").clone());
            page_id = page["next_page_id"].as_str().map(str::to_owned);
            if page_id.is_none() {
                return events;
            }
        }
    }

    /// Its events of this kind, in order.
    pub async fn events(&self, kind: &str) -> Vec<Value> {
        self.all_events().await.into_iter().filter(|event| event["kind"] == kind).collect()
    }

    /// The texts of the messages of `user` or `agent`, in order.
    pub async fn said_by(&self, source: &str) -> Vec<String> {
        let messages = self.events("MessageEvent").await;
        let of_source = messages.iter().filter(|message| message["source"] == source);
        of_source.map(|message| content_text(&message["llm_message"]["content"])).collect()
    }

    /// Runs a command in a folder of the sandbox.
    pub async fn run(&self, folder: &Path, command: &str) -> Ran {
        let base = self.url.split("/api/").next().unwrap_or_default();
        let body = json!({"command": command, "cwd": folder, "timeout": 30});
        let ran = self.send(self.http.post(format!("{base}/api/bash/execute_bash_command")).json(&body)).await;
        Ran {
            exit_code: ran["exit_code"].as_i64().unwrap_or(-1),
            stdout: ran["stdout"].as_str().unwrap_or_default().to_owned(),
            stderr: ran["stderr"].as_str().unwrap_or_default().to_owned(),
        }
    }
}

/// A start request with an initial message.
pub fn saying(message: &str) -> Value {
    json!({"initial_message": {"content": [{"type": "text", "text": message}]}})
}

/// `request` with these fields set in addition.
pub fn with(mut request: Value, fields: Value) -> Value {
    let (Some(request_fields), Value::Object(fields)) = (request.as_object_mut(), fields) else {
        panic!("both values have to be objects");
    };
    request_fields.extend(fields);
    request
}

/// The string of a value that must be one.
#[track_caller]
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} should be a string")).to_owned()
}

/// The text of a message, which is a string or a list of parts.
pub fn content_text(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        parts => parts.as_array().into_iter().flatten().filter_map(|part| part["text"].as_str()).collect(),
    }
}

/// The log of all products of this process so far.
pub fn logged() -> String {
    String::from_utf8_lossy(&LOG.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
}

pub fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

async fn send(request: RequestBuilder) -> (u16, Value) {
    let answer = request.send().await.expect("an answer");
    let status = answer.status().as_u16();
    let body = answer.text().await.expect("a body");
    (status, serde_json::from_str(&body).unwrap_or(Value::String(body)))
}

/// One installation for all tests and all runs.
pub fn agent_server_folder() -> PathBuf {
    shared::config::text("OPENHANDS_AGENT_SERVER_FOLDER")
        .map_or_else(|| Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("agent-server"), PathBuf::from)
}

/// The version of the agent server that the tests run on.
pub fn agent_server_version() -> String {
    shared::config::text("OPENHANDS_AGENT_SERVER_VERSION").unwrap_or_else(|| AGENT_SERVER_VERSION.to_owned())
}

/// Whether that is this minor version or a later one.
pub fn is_from(minor: u32) -> bool {
    let version = agent_server_version();
    let mut parts = version.split('.').map(|part| part.parse::<u32>().expect("a number"));
    (parts.next(), parts.next()) >= (Some(1), Some(minor))
}

fn capture_log() {
    struct Buffer;
    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            LOG.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tracing_subscriber::fmt()
            .with_env_filter(EnvFilter::new("warn,shared=trace,local=trace,worker=trace,dynoxide=off"))
            .with_ansi(false)
            .with_writer(|| Buffer)
            .init();
    });
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Agent servers that hold the lock of a sandbox's folder.
pub fn agent_servers(sandboxes: &Path) -> Vec<Pid> {
    let folders = fs::read_dir(sandboxes).into_iter().flatten().flatten().map(|entry| entry.path());
    folders
        .filter(|folder| {
            File::open(folder.join("agent-server.lock"))
                .is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
        })
        .filter_map(|folder| {
            let pid = fs::read_to_string(folder.join("agent-server.pid")).ok()?;
            Pid::from_raw(pid.trim().parse().ok()?)
        })
        .collect()
}

fn command_line(pid: Pid) -> String {
    let words = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    format!("{}: {}", pid.as_raw_nonzero(), String::from_utf8_lossy(&words).replace('\0', " "))
}
