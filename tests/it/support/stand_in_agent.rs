//! A stub agent server for fault injection: it can fail in ways that a real one cannot be made to. It follows version
//! 1.15 in routes, statuses, texts and response formats. It really runs commands and stores files, but has no agent.

use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use axum::response::Response;
use http::{Method, StatusCode};
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::server::{self, Cut, Request, Server};

/// A fault to inject.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Such as `POST /api/conversations` or `GET /api/conversations/{id}`.
    pub route: String,
    pub nth: Nth,
    pub kind: Kind,
}

/// The requests to the route that fail, counted from the injection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nth {
    Next,
    /// Counted from 1.
    On(usize),
    Always,
}

/// The kind of a fault. "The effect" is what the request does: it creates a conversation, writes a file, runs a
/// command.
#[derive(Clone, Debug)]
pub enum Kind {
    /// Both the effect and the response are late.
    Slow(Duration),
    /// The effect is immediate, the response late.
    SlowReply(Duration),
    /// This status and body instead of the effect.
    Status(u16, String),
    /// This status and body after the effect.
    StatusAfter(u16, String),
    /// The connection closes without a byte, and there is no effect.
    CutBefore,
    /// The effect happens, but the connection closes in the middle of the response.
    CutAfter,
    /// The effect happens, but the response is 200 and not JSON.
    Garbage,
    /// A redirect to this address instead of the effect.
    Redirect(String),
    /// 200 and a JSON string of this many bytes instead of the effect.
    Huge(usize),
    /// 200 and a page with one piece of output of this many bytes instead of the effect; there is always another page.
    EndlessPages(usize),
    /// No effect and no response; the connection stays open.
    Hang,
}

impl Fault {
    pub fn new(route: &str, nth: Nth, kind: Kind) -> Self {
        Self { route: route.to_owned(), nth, kind }
    }
}

#[derive(Debug)]
struct Injected {
    fault: Fault,
    seen: usize,
}

impl Injected {
    /// Counts the request, and returns whether the fault applies to it.
    fn strikes(&mut self, request: &Request) -> bool {
        if !request.is(&self.fault.route) {
            return false;
        }
        self.seen += 1;
        match self.fault.nth {
            Nth::Next => self.seen == 1,
            Nth::On(n) => self.seen == n,
            Nth::Always => true,
        }
    }
}

/// What happens to running commands when the server restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// The whole sandbox restarts, and all of its processes end. The server forgets its commands.
    Sandbox,
    /// The server alone restarts. Its commands run on, and it forgets them.
    Server,
    /// The server shuts down in an orderly way: it ends the shells of its commands, and stores the exit code -15 for them.
    Orderly,
}

/// A conversation that a client has requested.
#[derive(Clone, Debug)]
pub struct Conversation {
    pub id: Uuid,
    /// The body that created it, secrets included.
    pub body: Value,
    /// How often it was posted: the creation and every repetition.
    pub posts: usize,
    pub title: Option<String>,
    pub execution_status: String,
    /// The security analyzer that was set last.
    pub security_analyzer: Value,
    created_at: jiff::Timestamp,
    updated_at: jiff::Timestamp,
    last_message: Option<Uuid>,
}

/// Agents whose setup fails. An agent is set up with its first message, so a conversation without a message is created;
/// one with a message is created too, but the response is the error, as for every message to it.
#[derive(Clone, Debug)]
struct SetupFailure {
    /// Only agents with this tool; `None` means all.
    tool: Option<String>,
    status: u16,
    answer: String,
}

impl SetupFailure {
    /// The response to a message to this conversation, if the setup of its agent fails.
    fn strikes(&self, conversation: &Value) -> Option<Response> {
        let mut tools = conversation["agent"]["tools"].as_array().into_iter().flatten();
        let is_meant = self.tool.as_ref().is_none_or(|name| tools.any(|tool| tool["name"] == **name));
        let status = StatusCode::from_u16(self.status).expect("a status code");
        is_meant.then(|| server::raw(status, "application/json", self.answer.clone()))
    }
}

#[derive(Debug)]
struct BashEvent {
    /// The real server's sort key: a file name of second, kind, command and event id.
    name: String,
    command: Option<Uuid>,
    body: Value,
}

#[derive(Debug)]
struct State {
    session_key: String,
    root: PathBuf,
    /// Additional variables of the commands' environment.
    environment: Vec<(String, String)>,
    alive: bool,
    started: Instant,
    faults: Vec<Injected>,
    requests: Vec<Request>,
    conversations: Vec<Conversation>,
    delivered: HashMap<Uuid, Vec<Value>>,
    /// The events of conversations, instead of those about `delivered` messages.
    events: HashMap<Uuid, Vec<Value>>,
    skills: Value,
    hooks: Option<Value>,
    generated_title: Option<String>,
    version: String,
    setup_failure: Option<SetupFailure>,
    bash_events: Vec<BashEvent>,
    commands: JoinSet<()>,
    /// How the server ended that started the commands.
    ended_by: Arc<Mutex<Option<Restart>>>,
}

/// The workspace's path in a container. In paths and in commands it is replaced by the folder below the root, so that a folder of this
/// name on the machine plays no part.
const WORKSPACE: &str = "/workspace";

/// The server. Dropping it closes its connections, kills its commands and removes its files.
#[derive(Debug)]
pub struct StandInAgent {
    server: Server,
    state: Arc<Mutex<State>>,
    root: TempDir,
}

impl StandInAgent {
    /// Starts alive, empty and without faults; `/api` requires `session_key`.
    pub async fn start(session_key: &str) -> Self {
        let root = TempDir::new().expect("a folder for the sandbox");
        for folder in ["home", "workspace"] {
            std::fs::create_dir(root.path().join(folder)).expect("the sandbox's folders");
        }
        let state = Arc::new(Mutex::new(State {
            session_key: session_key.to_owned(),
            root: root.path().to_owned(),
            environment: Vec::new(),
            alive: true,
            started: Instant::now(),
            faults: Vec::new(),
            requests: Vec::new(),
            conversations: Vec::new(),
            delivered: HashMap::new(),
            events: HashMap::new(),
            skills: json!([]),
            hooks: None,
            generated_title: None,
            version: "1.15.0".to_owned(),
            setup_failure: None,
            bash_events: Vec::new(),
            commands: JoinSet::new(),
            ended_by: Arc::default(),
        }));
        let shared = Arc::clone(&state);
        let server = Server::start(move |request| answer(request, Arc::clone(&shared))).await;
        Self { server, state, root }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        self.server.url()
    }

    /// The root of the sandbox's file system: every path and working directory in a request must be below it. The home
    /// directory of commands is `home` in it.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// The working directory to configure: `workspace/project` below [`Self::root`], which does not exist yet.
    pub fn working_dir(&self) -> String {
        self.root().join("workspace/project").display().to_string()
    }

    /// Injects a fault. If several apply to a request, the one injected first wins.
    pub fn inject(&self, fault: Fault) {
        self.state().faults.push(Injected { fault, seen: 0 });
    }

    /// Removes all faults.
    pub fn clear_faults(&self) {
        self.state().faults.clear();
    }

    /// From now on the setup of every agent, or of those with this tool, fails: this is the response to messages for
    /// it.
    pub fn fail_setup(&self, tool: Option<&str>, status: u16, answer: &str) {
        let failure = SetupFailure { tool: tool.map(str::to_owned), status, answer: answer.to_owned() };
        self.state().setup_failure = Some(failure);
    }

    /// From now on the setup of agents succeeds.
    pub fn clear_setup_failure(&self) {
        self.state().setup_failure = None;
    }

    /// While not alive, every connection closes without a response and no request is recorded.
    pub fn set_alive(&self, alive: bool) {
        self.state().alive = alive;
    }

    /// Restarts the server. Conversations and the events of commands are on its disk, and stay; its uptime starts again.
    pub async fn restart(&self, restart: Restart) {
        let (mut commands, unfinished) = {
            let mut state = self.state();
            *state.ended_by.lock().expect("the end") = Some(restart);
            state.ended_by = Arc::default();
            state.started = Instant::now();
            (std::mem::take(&mut state.commands), state.unfinished_commands())
        };
        commands.shutdown().await;
        match restart {
            Restart::Sandbox => self.kill_processes(),
            Restart::Server => {}
            Restart::Orderly => {
                for id in unfinished {
                    Output { id, order: 0, shared: Arc::clone(&self.state) }.add(Some(-15), None, None);
                }
            }
        }
    }

    /// The ids of the sandbox's processes. Linux only: elsewhere there are none.
    pub fn processes(&self) -> Vec<i32> {
        let home = format!("HOME={}\0", self.root().join("home").display());
        let ids = std::fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
        ids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|id| {
                // A process that has ended, but was not waited for, has no environment.
                let environment = std::fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
                find(&environment, home.as_bytes()).is_some()
            })
            .collect()
    }

    fn kill_processes(&self) {
        for id in self.processes() {
            if let Some(id) = rustix::process::Pid::from_raw(id) {
                // It is no error if the process has ended already.
                let _ = rustix::process::kill_process(id, rustix::process::Signal::KILL);
            }
        }
    }

    /// Adds a variable to the environment of later commands.
    pub fn set_variable(&self, name: &str, value: &str) {
        self.state().environment.push((name.to_owned(), value.to_owned()));
    }

    /// The skills to return, in the agent server's format.
    pub fn set_skills(&self, skills: Value) {
        self.state().skills = skills;
    }

    /// The hook configuration to return, regardless of the project's files.
    pub fn set_hooks(&self, hook_config: Value) {
        self.state().hooks = Some(hook_config);
    }

    /// The version that it reports; 1.15.0 unless set.
    pub fn set_version(&self, version: &str) {
        version.clone_into(&mut self.state().version);
    }

    /// The title that it generates on request; without one it behaves like a version that lacks the route.
    pub fn set_generated_title(&self, title: &str) {
        self.state().generated_title = Some(title.to_owned());
    }

    /// Sets the events of a conversation, oldest first.
    pub fn set_events(&self, id: Uuid, events: Vec<Value>) {
        self.state().events.insert(id, events);
    }

    /// Sets the conversation's status. Unless set, it is `idle` before the first message and `finished` after it.
    pub fn set_execution_status(&self, id: Uuid, status: &str) {
        let mut state = self.state();
        let conversation = state.conversation(id).expect("the conversation is there");
        conversation.execution_status = status.to_owned();
    }

    /// All requests so far, refused and faulty ones included.
    pub fn requests(&self) -> Vec<Request> {
        self.state().requests.clone()
    }

    /// The requests so far to a route, such as `POST /api/conversations/{id}/events`.
    pub fn requests_to(&self, route: &str) -> Vec<Request> {
        self.requests().into_iter().filter(|request| request.is(route)).collect()
    }

    /// The commands so far, in order.
    pub fn commands(&self) -> Vec<String> {
        let routes = ["POST /api/bash/start_bash_command", "POST /api/bash/execute_bash_command"];
        let started = self.requests().into_iter().filter(|request| routes.iter().any(|route| request.is(route)));
        started.filter_map(|request| request.json()["command"].as_str().map(str::to_owned)).collect()
    }

    /// Cuts off each request that waits for the end of its command, so that commands are started and polled.
    pub fn refuse_to_wait_for_commands(&self) {
        self.inject(Fault::new("POST /api/bash/execute_bash_command", Nth::Always, Kind::CutBefore));
    }

    /// The existing conversations, oldest first.
    pub fn conversations(&self) -> Vec<Conversation> {
        self.state().conversations.clone()
    }

    /// The messages that an agent would have received, in order: the initial one once per creation, then those posted
    /// as events. They are kept after the conversation is deleted.
    pub fn messages_delivered(&self, id: Uuid) -> Vec<Value> {
        self.state().delivered.get(&id).cloned().unwrap_or_default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the stand-in's state")
    }
}

impl Drop for StandInAgent {
    fn drop(&mut self) {
        // A running command holds a reference to the state that it reports to, so nothing else would end it.
        self.state().commands.abort_all();
        self.kill_processes();
    }
}

impl State {
    fn conversation(&mut self, id: Uuid) -> Option<&mut Conversation> {
        self.conversations.iter_mut().find(|conversation| conversation.id == id)
    }

    fn deliver(&mut self, id: Uuid, message: Value) {
        self.delivered.entry(id).or_default().push(message);
        if let Some(conversation) = self.conversation(id) {
            conversation.last_message = Some(Uuid::new_v4());
            conversation.updated_at = now();
            conversation.execution_status = "finished".to_owned();
        }
    }

    /// The commands without an exit code.
    fn unfinished_commands(&self) -> Vec<Uuid> {
        let has_ended = |id: &Uuid| {
            self.bash_events.iter().any(|event| event.command == Some(*id) && event.body["exit_code"].is_i64())
        };
        let started = self.bash_events.iter().filter(|event| event.body["kind"] == "BashCommand");
        started.filter_map(|event| event.command).filter(|id| !has_ended(id)).collect()
    }

    /// The text with the path that [`WORKSPACE`] has here.
    fn real(&self, text: &str) -> String {
        let real = format!("{}{WORKSPACE}", self.root.display());
        // A client may have learnt the real path from a command's output.
        text.replace(&real, WORKSPACE).replace(WORKSPACE, &real)
    }

    /// Restricts paths to the root, so that an error in a test affects only the test's folder.
    fn holds(&self, path: &Path) -> bool {
        path.starts_with(&self.root) && !path.components().any(|part| part.as_os_str() == "..")
    }

    fn add_bash_event(&mut self, kind: &str, command: Option<Uuid>, mut fields: Value) -> Value {
        let (id, time) = (Uuid::new_v4(), now());
        let parent = command.map(|command| format!("{}_", command.simple())).unwrap_or_default();
        fields["id"] = json!(id.simple().to_string());
        fields["timestamp"] = json!(text(time));
        fields["kind"] = json!(kind);
        self.bash_events.push(BashEvent {
            name: format!("{}_{kind}_{parent}{}", time.strftime("%Y%m%d%H%M%S"), id.simple()),
            command: command.or(Some(id)),
            body: fields.clone(),
        });
        fields
    }
}

fn now() -> jiff::Timestamp {
    jiff::Timestamp::now()
}

fn text(time: jiff::Timestamp) -> String {
    format!("{time:.6}")
}

async fn answer(request: Request, state: Arc<Mutex<State>>) -> Result<Response, Cut> {
    let fault = {
        let mut state = state.lock().expect("the stand-in's state");
        if !state.alive {
            return Err(Cut);
        }
        state.requests.push(request.clone());
        let mut fault = None;
        // Every fault counts the request, also those that another fault precedes.
        for injected in &mut state.faults {
            if injected.strikes(&request) && fault.is_none() {
                fault = Some(injected.fault.kind.clone());
            }
        }
        fault
    };
    let status = |code: u16| StatusCode::from_u16(code).expect("a status code");
    match fault {
        None => Ok(respond(&request, &state).await),
        Some(Kind::Slow(delay)) => {
            tokio::time::sleep(delay).await;
            Ok(respond(&request, &state).await)
        }
        Some(Kind::SlowReply(delay)) => {
            let response = respond(&request, &state).await;
            tokio::time::sleep(delay).await;
            Ok(response)
        }
        Some(Kind::Status(code, body)) => Ok(server::raw(status(code), "application/json", body)),
        Some(Kind::StatusAfter(code, body)) => {
            drop(respond(&request, &state).await);
            Ok(server::raw(status(code), "application/json", body))
        }
        Some(Kind::CutBefore) => Err(Cut),
        Some(Kind::CutAfter) => Ok(server::cut_in_half(respond(&request, &state).await).await),
        Some(Kind::Garbage) => {
            drop(respond(&request, &state).await);
            Ok(server::raw(StatusCode::OK, "application/json", "<html>not what you asked for"))
        }
        Some(Kind::Redirect(to)) => {
            let mut response = server::raw(StatusCode::FOUND, "text/plain", "");
            response.headers_mut().insert("location", to.parse().expect("an address"));
            Ok(response)
        }
        Some(Kind::Huge(length)) => {
            let body = format!("\"{}\"", "x".repeat(length));
            Ok(server::raw(StatusCode::OK, "application/json", body))
        }
        Some(Kind::EndlessPages(length)) => {
            let page = json!({"items": [{"order": 0, "stdout": "x".repeat(length)}], "next_page_id": Uuid::new_v4()});
            Ok(server::raw(StatusCode::OK, "application/json", page.to_string()))
        }
        Some(Kind::Hang) => server::hang().await,
    }
}

/// The response of a route without faults.
async fn respond(request: &Request, state: &Arc<Mutex<State>>) -> Response {
    let response = handle(request, state);
    if !request.is("POST /api/bash/execute_bash_command") || response.status() != StatusCode::OK {
        return response;
    }
    // It is started like every other command, and then waited for.
    let started = state.lock().expect("the stand-in's state").bash_events.last().map(|event| event.body["id"].clone());
    let id = started.and_then(|id| Uuid::parse_str(id.as_str()?).ok()).expect("the command");
    loop {
        let ended = state.lock().expect("the stand-in's state").bash_events.iter().rev().find_map(|event| {
            (event.command == Some(id) && event.body["exit_code"].is_i64()).then(|| event.body.clone())
        });
        match ended {
            Some(output) => return ok(&output),
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

/// An error in the format of the real server's own errors.
fn detail(status: StatusCode, detail: &str) -> Response {
    server::json(status, &json!({"detail": detail}))
}

/// A validation error.
fn invalid(loc: &[&str], kind: &str, message: &str) -> Response {
    let error = json!({"type": kind, "loc": loc, "msg": message, "input": null});
    server::json(StatusCode::UNPROCESSABLE_ENTITY, &json!({"detail": [error]}))
}

fn missing(loc: &[&str]) -> Response {
    invalid(loc, "missing", "Field required")
}

fn broken(what: &str) -> Response {
    let body = json!({"detail": "Internal Server Error", "exception": what});
    server::json(StatusCode::INTERNAL_SERVER_ERROR, &body)
}

fn ok(body: &Value) -> Response {
    server::json(StatusCode::OK, body)
}

fn success(success: bool) -> Response {
    ok(&json!({"success": success}))
}

fn handle(request: &Request, shared: &Arc<Mutex<State>>) -> Response {
    let mut guard = shared.lock().expect("the stand-in's state");
    let state = &mut *guard;
    let segments = request.segments();
    let get = request.method == Method::GET;
    match segments[..] {
        ["alive"] if get => return ok(&json!({"status": "ok"})),
        ["health"] if get => return ok(&json!("OK")),
        ["ready"] if get => return ok(&json!({"status": "ready"})),
        ["server_info"] if get => return server_info(state),
        ["api", ..] => {}
        _ => return detail(StatusCode::NOT_FOUND, "Not Found"),
    }
    if request.header("x-session-api-key") != Some(&state.session_key) {
        return detail(StatusCode::UNAUTHORIZED, "Unauthorized");
    }
    let body = request.json();
    match (request.method.as_str(), &segments[1..]) {
        ("POST", ["bash", "start_bash_command" | "execute_bash_command"]) => start_command(&body, state, shared),
        ("GET", ["bash", "bash_events", "search"]) => search_bash_events(request, state),
        ("POST", ["file", "upload"]) => upload(request, state),
        ("GET", ["file", "download"]) => download(request, state),
        ("POST", ["skills"]) => skills(&body, state),
        ("POST", ["hooks"]) => hooks(&body, state),
        ("POST", ["conversations"]) => start_conversation(body, state),
        ("GET", ["conversations"]) => conversations(request, state),
        ("GET", ["conversations", "count"]) => ok(&json!(state.conversations.len())),
        ("GET", ["conversations", id, "events", "search"]) => search_events(id, request, state),
        (method, ["conversations", id, rest @ ..]) => {
            let Ok(id) = Uuid::parse_str(id) else {
                return invalid(&["path", "conversation_id"], "uuid_parsing", "Input should be a valid UUID");
            };
            conversation(method, id, rest, body, state)
        }
        _ => detail(StatusCode::NOT_FOUND, "Not Found"),
    }
}

fn server_info(state: &State) -> Response {
    ok(&json!({
        "uptime": state.started.elapsed().as_secs() as f64,
        "idle_time": 0.0,
        "title": "OpenHands Agent Server",
        "version": state.version,
        "sdk_version": "1.15.0",
        "tools_version": "1.15.0",
        "workspace_version": "1.15.0",
        "build_git_sha": "unknown",
        "build_git_ref": "unknown",
        "python_version": "3.12.0",
        "docs": "/docs",
        "redoc": "/redoc",
    }))
}

// Commands

/// Longer output is returned in pieces of this size.
const PIECE: usize = 1024 * 1024;

fn start_command(body: &Value, state: &mut State, shared: &Arc<Mutex<State>>) -> Response {
    let Some(command) = body["command"].as_str().map(|command| state.real(command)) else {
        return missing(&["body", "command"]);
    };
    let timeout = body["timeout"].as_u64().unwrap_or(300);
    let cwd = body["cwd"].as_str().map(|cwd| PathBuf::from(state.real(cwd)));
    let event = state.add_bash_event(
        "BashCommand",
        None,
        // As it was sent: clients find a command by its text.
        json!({"command": body["command"], "cwd": cwd, "timeout": timeout, "id": null, "timestamp": null, "kind": null}),
    );
    let id = Uuid::parse_str(event["id"].as_str().expect("an event's id")).expect("an event's id");
    let started = start_shell(&command, cwd.as_deref(), state);
    let shared = Arc::clone(shared);
    state.commands.spawn(async move {
        let output = Arc::new(Mutex::new(Output { id, order: 0, shared }));
        match started {
            Ok(shell) => shell.run(Duration::from_secs(timeout), output).await,
            Err(error) => {
                let text = format!("Error executing command: {error}");
                output.lock().expect("the output").add(Some(-1), None, Some(text));
            }
        }
    });
    ok(&event)
}

fn start_shell(command: &str, cwd: Option<&Path>, state: &State) -> Result<Shell, String> {
    let cwd = cwd.unwrap_or(&state.root);
    if !state.holds(cwd) {
        return Err(format!("'{}' is outside of the stand-in's folder", cwd.display()));
    }
    let child = Command::new("/bin/sh")
        .args(["-c", command])
        .current_dir(cwd)
        .env("HOME", state.root.join("home"))
        .env("TMPDIR", &state.root)
        .envs(state.environment.iter().map(|(name, value)| (name, value)))
        .env_remove("XDG_CONFIG_HOME")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        // A sandbox has no terminal to prompt on.
        .env("GIT_TERMINAL_PROMPT", "0")
        .env_remove("GIT_ASKPASS")
        .env_remove("SSH_ASKPASS")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                format!("[Errno 2] No such file or directory: '{}'", cwd.display())
            }
            _ => error.to_string(),
        })?;
    Ok(Shell { child, done: false, ended_by: Arc::clone(&state.ended_by) })
}

/// A running command. Dropping it ends the command as the end of its server does.
struct Shell {
    child: tokio::process::Child,
    done: bool,
    ended_by: Arc<Mutex<Option<Restart>>>,
}

impl Shell {
    async fn run(mut self, timeout: Duration, output: Arc<Mutex<Output>>) {
        let stdout = self.child.stdout.take().expect("the command's stdout");
        let stderr = self.child.stderr.take().expect("the command's stderr");
        let rest = Arc::new(Mutex::new([String::new(), String::new()]));
        let ended = tokio::time::timeout(timeout, async {
            let streams = async {
                tokio::join!(
                    read(stdout, 0, Arc::clone(&rest), Arc::clone(&output)),
                    read(stderr, 1, Arc::clone(&rest), Arc::clone(&output)),
                )
            };
            tokio::join!(streams, self.child.wait()).1
        })
        .await;
        let exit_code = match ended {
            Ok(status) => {
                use std::os::unix::process::ExitStatusExt;
                self.done = true;
                let status = status.expect("the command's exit status");
                status.code().or(status.signal().map(|signal| -signal)).unwrap_or(-1)
            }
            Err(_) => {
                // As in the real server, which kills the shell alone: what the shell has started runs on.
                self.done = true;
                let _ = self.child.start_kill();
                -1
            }
        };
        drop(self);
        let [stdout, stderr] = std::mem::take(&mut *rest.lock().expect("the output's rest"));
        let some = |text: String| (!text.is_empty()).then_some(text);
        output.lock().expect("the output").add(Some(exit_code), some(stdout), some(stderr));
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        use rustix::process::{Pid, Signal, kill_process, kill_process_group};
        let Some(id) = self.child.id().and_then(|id| Pid::from_raw(id.cast_signed())).filter(|_| !self.done) else {
            return;
        };
        // It is no error if the process has ended already.
        let _ = match *self.ended_by.lock().expect("the end") {
            None | Some(Restart::Sandbox) => kill_process_group(id, Signal::KILL),
            Some(Restart::Orderly) => kill_process(id, Signal::TERM),
            Some(Restart::Server) => Ok(()),
        };
    }
}

/// Collects a command's output.
struct Output {
    id: Uuid,
    order: u64,
    shared: Arc<Mutex<State>>,
}

impl Output {
    fn add(&mut self, exit_code: Option<i32>, stdout: Option<String>, stderr: Option<String>) {
        let fields = json!({
            "id": null,
            "timestamp": null,
            "command_id": self.id.simple().to_string(),
            "order": self.order,
            "exit_code": exit_code,
            "stdout": stdout,
            "stderr": stderr,
            "kind": null,
        });
        self.order += 1;
        let mut state = self.shared.lock().expect("the stand-in's state");
        state.add_bash_event("BashOutput", Some(self.id), fields);
    }
}

/// Reads stdout (0) or stderr (1) to its end; an incomplete piece stays in `rest`.
async fn read(
    mut stream: impl AsyncRead + Unpin,
    which: usize,
    rest: Arc<Mutex<[String; 2]>>,
    output: Arc<Mutex<Output>>,
) {
    let mut bytes = [0; 8192];
    while let Ok(read @ 1..) = stream.read(&mut bytes).await {
        let mut rest = rest.lock().expect("the output's rest");
        rest[which].push_str(&String::from_utf8_lossy(&bytes[..read]));
        while rest[which].len() > PIECE {
            let at = rest[which].floor_char_boundary(PIECE);
            let later = rest[which].split_off(at);
            let piece = Some(std::mem::replace(&mut rest[which], later));
            let (stdout, stderr) = if which == 0 { (piece, None) } else { (None, piece) };
            output.lock().expect("the output").add(None, stdout, stderr);
        }
    }
}

fn search_bash_events(request: &Request, state: &State) -> Response {
    let kind = request.query_value("kind__eq");
    let command = request.query_value("command_id__eq").map(|id| Uuid::parse_str(&id));
    let after = request.query_value("order__gt").and_then(|order| order.parse::<i64>().ok());
    let limit = request.query_value("limit").and_then(|limit| limit.parse().ok()).unwrap_or(100);
    let Ok(command) = command.transpose() else {
        return invalid(&["query", "command_id__eq"], "uuid_parsing", "Input should be a valid UUID");
    };
    let mut events: Vec<&BashEvent> = state.bash_events.iter().collect();
    events.retain(|event| kind.is_none() || event.body["kind"].as_str() == kind.as_deref());
    events.retain(|event| command.is_none() || event.command == command);
    events.sort_by(|a, b| a.name.cmp(&b.name));
    if request.query_value("sort_order").as_deref() == Some("TIMESTAMP_DESC") {
        events.reverse();
    }
    let page = request.query_value("page_id");
    let start = events.iter().position(|event| Some(&event.name) == page.as_ref()).unwrap_or(0);
    let next = events.get(start + limit).map(|event| event.name.clone());
    // The real server filters events that are too old out of the page, not out of the search.
    let items: Vec<&Value> = events[start..]
        .iter()
        .take(limit)
        .map(|event| &event.body)
        .filter(|event| after.is_none_or(|after| event["order"].as_i64().is_none_or(|order| order > after)))
        .collect();
    ok(&json!({"items": items, "next_page_id": next}))
}

// Files

/// The query's `path`, or an error response if it is invalid.
fn path_of(request: &Request, state: &State) -> Result<PathBuf, Box<Response>> {
    let path = request.query_value("path").ok_or_else(|| Box::new(missing(&["query", "path"])))?;
    let path = PathBuf::from(state.real(&path));
    if !path.is_absolute() {
        return Err(Box::new(detail(StatusCode::BAD_REQUEST, "Path must be absolute")));
    }
    match state.holds(&path) {
        true => Ok(path),
        false => {
            let refused = format!("500: '{}' is outside of the stand-in's folder", path.display());
            Err(Box::new(broken(&refused)))
        }
    }
}

fn upload(request: &Request, state: &State) -> Response {
    let Some(content) = multipart_field(request, "file") else {
        return missing(&["body", "file"]);
    };
    let path = match path_of(request, state) {
        Ok(path) => path,
        Err(refusal) => return *refusal,
    };
    let written = std::fs::create_dir_all(path.parent().unwrap_or(&path)).and_then(|()| std::fs::write(&path, content));
    match written {
        Ok(()) => success(true),
        Err(error) => broken(&format!("500: Failed to upload file: {error}")),
    }
}

fn download(request: &Request, state: &State) -> Response {
    let path = match path_of(request, state) {
        Ok(path) => path,
        Err(refusal) => return *refusal,
    };
    if !path.exists() {
        return detail(StatusCode::NOT_FOUND, "File not found");
    }
    if !path.is_file() {
        return detail(StatusCode::BAD_REQUEST, "Path is not a file");
    }
    match std::fs::read(&path) {
        Ok(content) => {
            let mut response = server::raw(StatusCode::OK, "application/octet-stream", content);
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if let Ok(value) = format!("attachment; filename=\"{name}\"").parse() {
                response.headers_mut().insert("content-disposition", value);
            }
            response
        }
        Err(error) => broken(&error.to_string()),
    }
}

/// The content of a file field of a `multipart/form-data` body.
fn multipart_field<'a>(request: &'a Request, field: &str) -> Option<&'a [u8]> {
    let content_type = request.header("content-type")?;
    let boundary = content_type.strip_prefix("multipart/form-data")?.split("boundary=").nth(1)?;
    let delimiter = format!("\r\n--{}", boundary.split(';').next()?.trim_matches('"'));
    let body = &request.body[..];
    // The first delimiter is at the very beginning, without a line break before it.
    let mut at = find(body, &delimiter.as_bytes()[2..])? + delimiter.len() - 2;
    loop {
        let part = body.get(at..)?.strip_prefix(b"\r\n")?;
        let head_end = find(part, b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&part[..head_end]).to_ascii_lowercase();
        let content = &part[head_end + 4..];
        let length = find(content, delimiter.as_bytes())?;
        if head.contains(&format!("name=\"{field}\"")) && head.contains("filename") {
            return Some(&content[..length]);
        }
        at = body.len() - content.len() + length + delimiter.len();
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

// Skills and hooks

/// All skills are public ones.
fn skills(body: &Value, state: &State) -> Response {
    let skills = if body["load_public"].as_bool() == Some(false) { json!([]) } else { state.skills.clone() };
    let count = skills.as_array().map_or(0, Vec::len);
    let sources = json!({"sandbox": 0, "sdk_base": count, "org": 0, "project": 0});
    ok(&json!({"skills": skills, "sources": sources}))
}

const HOOK_EVENTS: [(&str, &str); 6] = [
    ("pre_tool_use", "PreToolUse"),
    ("post_tool_use", "PostToolUse"),
    ("user_prompt_submit", "UserPromptSubmit"),
    ("session_start", "SessionStart"),
    ("session_end", "SessionEnd"),
    ("stop", "Stop"),
];

fn hooks(body: &Value, state: &State) -> Response {
    let hook_config = state.hooks.clone().or_else(|| {
        let file = PathBuf::from(state.real(body["project_dir"].as_str()?)).join(".openhands/hooks.json");
        let read = state.holds(&file).then(|| std::fs::read(file).ok())??;
        hook_config(serde_json::from_slice(&read).ok()?)
    });
    ok(&json!({"hook_config": hook_config}))
}

/// A `hooks.json` with its defaults filled in; `None` if it is invalid or empty.
fn hook_config(mut file: Value) -> Option<Value> {
    if let Some(wrapped) = file.get_mut("hooks") {
        file = wrapped.take();
    }
    let mut given = Map::new();
    for (key, matchers) in file.as_object()? {
        let (field, _) = HOOK_EVENTS.iter().find(|(field, event)| key == field || key == event)?;
        let matchers: Option<Vec<Value>> = matchers.as_array()?.iter().map(hook_matcher).collect();
        if given.insert((*field).to_owned(), json!(matchers?)).is_some() {
            return None;
        }
    }
    let config: Map<String, Value> = HOOK_EVENTS
        .iter()
        .map(|(field, _)| ((*field).to_owned(), given.remove(*field).unwrap_or_else(|| json!([]))))
        .collect();
    config.values().any(|matchers| *matchers != json!([])).then_some(Value::Object(config))
}

fn hook_matcher(matcher: &Value) -> Option<Value> {
    let hooks = matcher.get("hooks").map_or(Some(&[][..]), |hooks| hooks.as_array().map(Vec::as_slice))?;
    let hooks: Option<Vec<Value>> = hooks
        .iter()
        .map(|hook| {
            Some(json!({
                "type": hook.get("type").unwrap_or(&json!("command")),
                "command": hook.get("command")?,
                "timeout": hook.get("timeout").unwrap_or(&json!(60)),
                "async": hook.get("async").or(hook.get("async_")).unwrap_or(&json!(false)),
            }))
        })
        .collect();
    Some(json!({"matcher": matcher.get("matcher").unwrap_or(&json!("*")), "hooks": hooks?}))
}

// Conversations

fn setup_failure(id: Uuid, state: &mut State) -> Option<Response> {
    let failure = state.setup_failure.clone()?;
    failure.strikes(&state.conversation(id)?.body)
}

fn start_conversation(body: Value, state: &mut State) -> Response {
    for field in ["workspace", "agent"] {
        if !body[field].is_object() {
            return missing(&["body", field]);
        }
    }
    let id = match &body["conversation_id"] {
        Value::Null => Uuid::new_v4(),
        id => match id.as_str().map(Uuid::parse_str) {
            Some(Ok(id)) => id,
            _ => {
                return invalid(&["body", "conversation_id"], "uuid_parsing", "Input should be a valid UUID");
            }
        },
    };
    if let Some(conversation) = state.conversation(id) {
        conversation.posts += 1;
        return ok(&conversation.info());
    }
    let (time, message) = (now(), body["initial_message"].clone());
    // 1.15 ignores it.
    let is_read = !state.version.starts_with("1.15.");
    let security_analyzer = if is_read { body["security_analyzer"].clone() } else { Value::Null };
    state.conversations.push(Conversation {
        id,
        body,
        posts: 1,
        title: None,
        execution_status: "idle".to_owned(),
        security_analyzer,
        created_at: time,
        updated_at: time,
        last_message: None,
    });
    if message.is_object() {
        if let Some(failed) = setup_failure(id, state) {
            return failed;
        }
        state.deliver(id, message);
    }
    let mut info = state.conversation(id).expect("just added").info();
    // The agent has only just started.
    info["execution_status"] = json!("idle");
    server::json(StatusCode::CREATED, &info)
}

fn conversations(request: &Request, state: &mut State) -> Response {
    let ids = request.query_values("ids");
    if ids.is_empty() {
        return missing(&["query", "ids"]);
    }
    let infos: Result<Vec<Value>, _> = ids
        .iter()
        .map(|id| Ok(state.conversation(Uuid::parse_str(id)?).map_or(Value::Null, |found| found.info())))
        .collect();
    match infos {
        Err(uuid::Error { .. }) => invalid(&["query", "ids"], "uuid_parsing", "Input should be a valid UUID"),
        Ok(infos) if infos.len() >= 100 => broken(""),
        Ok(infos) => ok(&json!(infos)),
    }
}

/// The users' messages, or the events that a test has set, newest first, in pages.
fn search_events(id: &str, request: &Request, state: &State) -> Response {
    if let Some(events) = Uuid::parse_str(id).ok().and_then(|id| state.events.get(&id)) {
        let limit = request.query_value("limit").and_then(|limit| limit.parse::<usize>().ok()).unwrap_or(100);
        let (first, newest_first) = (request.query_value("page_id"), events.iter().rev());
        let mut rest = newest_first.skip_while(|event| first.as_ref().is_some_and(|first| event["id"] != **first));
        let items: Vec<&Value> = rest.by_ref().take(limit).collect();
        return ok(&json!({"items": items, "next_page_id": rest.next().map(|event| &event["id"])}));
    }
    let Some(said) = Uuid::parse_str(id).ok().and_then(|id| state.delivered.get(&id)) else {
        return ok(&json!({"items": [], "next_page_id": null}));
    };
    let number = |name: &str| request.query_value(name).and_then(|number| number.parse::<usize>().ok());
    let (from, limit) = (number("page_id").unwrap_or(0), number("limit").unwrap_or(100));
    let event = |(index, message): (usize, &Value)| {
        let message = json!({"role": "user", "content": message["content"]});
        json!({"id": format!("event-{index}"), "kind": "MessageEvent", "source": "user", "llm_message": message})
    };
    let items: Vec<Value> = said.iter().enumerate().rev().skip(from).take(limit).map(event).collect();
    let next = (from + limit < said.len()).then(|| (from + limit).to_string());
    ok(&json!({"items": items, "next_page_id": next}))
}

fn conversation(method: &str, id: Uuid, rest: &[&str], body: Value, state: &mut State) -> Response {
    let generated = state.generated_title.clone();
    let found = state.conversation(id);
    match (method, rest, found) {
        ("GET", [], Some(conversation)) => ok(&conversation.info()),
        ("DELETE", [], Some(_)) => {
            state.conversations.retain(|conversation| conversation.id != id);
            success(true)
        }
        ("POST", ["generate_title"], Some(_)) if generated.is_some() => ok(&json!({"title": generated})),
        ("DELETE", [], None) => detail(StatusCode::BAD_REQUEST, "Bad Request"),
        ("PATCH", [], found) => match body["title"].as_str() {
            None => missing(&["body", "title"]),
            Some("") => invalid(&["body", "title"], "string_too_short", "String should have at least 1 character"),
            Some(title) if title.chars().count() > 200 => {
                invalid(&["body", "title"], "string_too_long", "String should have at most 200 characters")
            }
            Some(title) => {
                let there = found.is_some();
                if let Some(conversation) = found {
                    conversation.title = Some(title.trim().to_owned());
                    conversation.updated_at = now();
                }
                success(there)
            }
        },
        ("POST", ["events"], Some(_)) => {
            let roles = ["user", "system", "assistant", "tool"];
            if body.get("role").is_some_and(|role| !roles.iter().any(|known| role == known)) {
                return invalid(&["body", "role"], "literal_error", "Input should be a known role");
            }
            if let Some(failed) = setup_failure(id, state) {
                return failed;
            }
            state.deliver(id, body);
            success(true)
        }
        ("POST", ["events"], None) => {
            detail(StatusCode::NOT_FOUND, &format!("Conversation not found: {}", id.hyphenated()))
        }
        ("POST", ["switch_llm"], Some(_)) => match body["llm"]["model"].as_str() {
            None => missing(&["body", "llm"]),
            Some(_) => success(true),
        },
        ("POST", ["switch_acp_model"], Some(_)) => {
            detail(StatusCode::BAD_REQUEST, "Conversation does not have an ACP agent")
        }
        ("POST", ["security_analyzer"], Some(conversation)) => match body.get("security_analyzer") {
            None => missing(&["body", "security_analyzer"]),
            Some(analyzer) => {
                conversation.security_analyzer = analyzer.clone();
                success(true)
            }
        },
        _ => detail(StatusCode::NOT_FOUND, "Not Found"),
    }
}

impl Conversation {
    /// The conversation in the agent server's format: the body that created it, without secrets.
    fn info(&self) -> Value {
        let body = &self.body;
        let or = |field: &str, default: Value| match &body[field] {
            Value::Null => default,
            given => given.clone(),
        };
        let mut agent = body["agent"].clone();
        let mut usage_to_metrics = Map::new();
        for llm in ["/llm", "/condenser/llm"] {
            let Some(llm) = agent.pointer_mut(llm).filter(|llm| llm.is_object()) else {
                continue;
            };
            llm["api_key"] = Value::Null;
            let usage = llm["usage_id"].as_str().unwrap_or("default").to_owned();
            usage_to_metrics.insert(usage, no_metrics(&llm["model"]));
        }
        let mut secrets = or("secrets", json!({}));
        for secret in secrets.as_object_mut().into_iter().flat_map(|secrets| secrets.values_mut()) {
            if secret["kind"] == "StaticSecret" {
                secret["value"] = Value::Null;
            }
        }
        json!({
            "id": self.id.hyphenated().to_string(),
            "workspace": body["workspace"],
            "persistence_dir": format!("workspace/conversations/{}", self.id.simple()),
            "max_iterations": or("max_iterations", json!(500)),
            "stuck_detection": or("stuck_detection", json!(true)),
            "execution_status": self.execution_status,
            "confirmation_policy": or("confirmation_policy", json!({"kind": "NeverConfirm"})),
            "security_analyzer": self.security_analyzer,
            "activated_knowledge_skills": [],
            "blocked_actions": {},
            "blocked_messages": {},
            "last_user_message_id": self.last_message.map(|id| id.hyphenated().to_string()),
            "stats": {"usage_to_metrics": usage_to_metrics},
            "secret_registry": {"secret_sources": secrets},
            "agent_state": {},
            "hook_config": body["hook_config"],
            "title": self.title,
            "metrics": null,
            "created_at": text(self.created_at),
            "updated_at": text(self.updated_at),
            "agent": agent,
        })
    }
}

fn no_metrics(model: &Value) -> Value {
    json!({
        "model_name": model,
        "accumulated_cost": 0.0,
        "max_budget_per_task": null,
        "accumulated_token_usage": {
            "model": model,
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "cache_read_tokens": 0,
            "cache_write_tokens": 0,
            "reasoning_tokens": 0,
            "context_window": 0,
            "per_turn_token": 0,
            "response_id": "",
        },
        "costs": [],
        "response_latencies": [],
        "token_usages": [],
    })
}

/// Whether the file is executable.
pub fn is_executable(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|file| file.permissions().mode() & 0o111 != 0)
}
